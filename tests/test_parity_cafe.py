"""CAFE's loss and its first update against those of the authors' code."""

import numpy as np
import pytest
import torch
from torch import Tensor

from condense.augment import Augment, Params
from condense.method import Optim
from condense.methods.cafe import CAFE
from condense.networks import Functional, Weights
from condense.task import Labelled
from tests.parity.recorded import Recorded, apart, context


@pytest.mark.parametrize("case", ["plain", "dsa"])
def test_the_first_update_agrees(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded("11_cafe")
    hyper, ipc = recorded.hyper, recorded.hyper["ipc"]
    r = np.random.RandomState(11)
    real, start = (torch.from_numpy(r.randint(-16, 17, (num, 3, 32, 32)) / 8) for num in (40, 10 * ipc))
    augment = hyper["dsa_strategy"] if case == "dsa" else "none"
    ctx = context(real, torch.arange(10).repeat(4), hyper["network"], ipc, augment=augment)
    weights = Weights(recorded.weights(recorded["network"], list(ctx.task.network.shapes)), {})
    chosen, drawn = iter(recorded[f"{case}/real_index"]), recorded.draws("siamese")
    monkeypatch.setattr(Functional, "init", lambda *_: weights)
    monkeypatch.setattr(Labelled, "draw", lambda train, *_: train.images[next(chosen)])
    monkeypatch.setattr(type(ctx), "initial", lambda *_: (start, torch.arange(10).repeat_interleave(ipc)))

    def sample(augment: Augment, *_: object, siamese: bool) -> Params:
        assert siamese
        return next(drawn) if augment.ops else Params({})

    monkeypatch.setattr(Augment, "sample", sample)
    method = CAFE(
        num_steps=1,
        batch_real=hyper["batch_real"],
        max_epochs=0,
        optim=Optim(lr=hyper["lr_img"], momentum=hyper["momentum_img"]),
    )
    monkeypatch.setattr(CAFE, "accuracy", lambda *_: 0.0)
    state = method.init(ctx)
    state.syn.to(torch.float64)
    loss = method.step(ctx, state, 0)["loss"]
    expected = recorded[f"{case}/loss"] - recorded[f"{case}/loss_real"][0]  # no function of the images
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    gradient = state.syn.latents.grad
    assert gradient is not None

    def part(images: Tensor) -> Tensor:
        return images[:, :, 1::4, 2::4]

    assert apart(part(gradient), recorded[f"{case}/grad_part"]) < 1e-6
    assert apart(gradient.flatten(1).norm(dim=1), recorded[f"{case}/grad_norms"]) < 1e-6
    assert apart(part(state.syn.latents.detach()), recorded[f"{case}/image_part_after"]) < 1e-6
    assert next(chosen, None) is None and (case == "plain" or next(drawn, None) is None)
