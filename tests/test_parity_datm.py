"""DATM's beginning, window, gradients and updates against those of the authors' code."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from condense.augment import Augment
from condense.method import Context, Optim
from condense.methods.datm import DATM
from condense.methods.mtt import TrajectoryMatching
from condense.networks import Functional, Weights
from condense.rng import Draws
from condense.synthetic import Logits
from tests.parity.recorded import Recorded, apart, context

RECORDED = Recorded("08_datm")
HYPER = RECORDED.hyper


def make(num_steps: int, first: int, last: int, growth: int) -> DATM:
    return DATM(
        num_steps=num_steps,
        first_max_epoch=first,
        max_start_epoch=last,
        expansion_steps=growth,
        **{name: HYPER[name] for name in ("syn_steps", "batch_syn", "expert_epochs", "min_start_epoch", "threshold")},
        lr=HYPER["lr_teacher"],
        optim=Optim(lr=HYPER["lr_img"], momentum=HYPER["momentum_img"]),
        optim_labels=Optim(lr=HYPER["lr_y"], momentum=HYPER["momentum_y"]),
        optim_lr=Optim(lr=HYPER["lr_lr"] / HYPER["lr_teacher"] ** 2, momentum=HYPER["momentum_lr"]),
    )


METHOD = make(HYPER["steps"], HYPER["current_max_start_epoch"], HYPER["max_start_epoch"], HYPER["expansion_end_epoch"])


@pytest.mark.parametrize(("method", "name"), [(METHOD, "windows"), (make(60, 3, 14, 37), "long_windows")])
def test_the_window_of_start_epochs_agrees(method: DATM, name: str) -> None:
    windows = RECORDED[name].tolist()
    assert [[epochs.start, epochs.stop] for epochs in map(method.start_epochs, range(len(windows)))] == windows


class Experts:
    """Those of the recorded run."""

    num_experts, num_epochs, folder = HYPER["num_experts"], 7, "recorded"

    def __init__(self) -> None:
        self.names: list[str] = []

    def pair(self, step: int, *_: int) -> list[dict[str, Tensor]]:
        return [RECORDED.weights(RECORDED[f"{end}{step}"], self.names) for end in ("start", "target")]

    def weights(self, expert: int, network: Functional, epoch: int) -> Weights:
        assert epoch == self.num_epochs
        return Weights(RECORDED.weights(RECORDED["expert_end"][expert], self.names), {})


def orders_of_candidates(ctx: Context) -> Iterator[Tensor]:
    """For each class the recorded order of its images, by their places among those of the class."""
    for members, order in zip(ctx.task.train.by_class, RECORDED["class_orders"], strict=True):
        yield torch.searchsorted(members, order)


def test_the_beginning_and_every_step_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = Experts()
    ctx = context(
        RECORDED["real_images"],
        RECORDED["real_labels"],
        HYPER["network"],
        HYPER["ipc"],
        augment=HYPER["augment"],
        labels=Logits(),
        experts=experts,
    )
    experts.names = list(ctx.task.network.shapes)
    classes = torch.arange(HYPER["num_classes"]).repeat_interleave(HYPER["ipc"])
    with monkeypatch.context() as patch:
        candidates = orders_of_candidates(ctx)
        patch.setattr(Context, "initial", lambda *_: (ctx.task.train.images[:9], classes))
        patch.setattr(Draws, "permutation", lambda *_: next(candidates))
        state = METHOD.init(ctx)
    state.syn.to(torch.float64)
    logits: Any = state.syn.provider.get_parameter("logits")
    log_lr: Any = state.syn.log_lr
    assert torch.equal(state.syn.latents, RECORDED["initial"])
    assert apart(logits.detach(), RECORDED["initial_logits"]) < 1e-6

    orders, drawn = iter(RECORDED["orders"]), RECORDED.draws("aug")
    epochs = RECORDED["start_epochs"].tolist()
    monkeypatch.setattr(Draws, "permutation", lambda *_: next(orders))
    monkeypatch.setattr(Augment, "sample", lambda *_, **__: next(drawn))
    monkeypatch.setattr(TrajectoryMatching, "sample_segment", lambda self, ctx, step, part: (step, epochs[step]))
    updates = 0
    for step, updated in enumerate(RECORDED["updated"].tolist()):
        before, lr = state.syn.latents.detach().clone(), log_lr.exp().item()
        loss = METHOD.step(ctx, state, step)["loss"]
        assert loss == pytest.approx(RECORDED["losses"][step].item(), rel=1e-6)
        if not updated:
            assert loss > HYPER["threshold"] and torch.equal(state.syn.latents, before)
            continue
        assert state.syn.latents.grad is not None
        assert apart(state.syn.latents.grad, RECORDED["image_grads"][updates]) < 1e-6
        assert apart(logits.grad, RECORDED["label_grads"][updates]) < 1e-6
        assert log_lr.grad.item() / lr == pytest.approx(RECORDED["lr_grads"][updates].item(), rel=1e-6)
        assert apart(state.syn.latents.detach(), RECORDED["images"][updates]) < 1e-6
        assert apart(logits.detach(), RECORDED["logits"][updates]) < 1e-6
        with torch.no_grad():
            log_lr.copy_(RECORDED["lrs"][updates].log())  # the package moves its logarithm
        updates += 1
    assert updates == 3 and next(orders, None) is None and next(drawn, None) is None
