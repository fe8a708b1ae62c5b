"""TESLA's gradients and updates against those of the authors' code."""

from typing import Any

import pytest
import torch
from torch import Tensor

from condense.augment import Augment
from condense.inner import Adjoint, Exact, Tesla
from condense.method import Context, GradientState, Optim
from condense.methods.mtt import TrajectoryMatching
from condense.methods.tesla import TESLA
from condense.rng import Draws
from tests.parity.recorded import Recorded, apart, context

RECORDED = Recorded("07_tesla")
HYPER = RECORDED.hyper
CLASSES = torch.arange(HYPER["num_classes"]).repeat_interleave(HYPER["ipc"])


def begin(adjoint: Adjoint, patch: pytest.MonkeyPatch) -> tuple[TESLA, Context, GradientState]:
    """A run in which everything that is drawn is what the authors' code drew."""
    orders, drawn = iter(RECORDED["orders"]), RECORDED.draws("aug")

    class Experts:
        def pair(self, expert: int, *_: int) -> list[dict[str, Tensor]]:
            names = list(ctx.task.network.shapes)
            return [RECORDED.weights(RECORDED[f"{end}{expert}"], names) for end in ("start", "target")]

    start = RECORDED["initial"]
    ctx = context(start, CLASSES, HYPER["network"], HYPER["ipc"], augment=HYPER["augment"], experts=Experts())
    patch.setattr(Context, "initial", lambda *_: (start, CLASSES))
    patch.setattr(TrajectoryMatching, "sample_segment", lambda self, ctx, step, part: (step, 0))
    patch.setattr(Augment, "sample", lambda *_, **__: next(drawn))
    patch.setattr(Draws, "permutation", lambda *_: next(orders))
    method = TESLA(
        num_steps=HYPER["steps"],
        adjoint=adjoint,
        **{name: HYPER[name] for name in ("syn_steps", "batch_syn", "expert_epochs")},
        max_start_epoch=3,
        lr=HYPER["lr_teacher"],
        optim=Optim(lr=HYPER["lr_img"] / 2, momentum=HYPER["momentum_img"]),  # the authors' gradients are half
        optim_lr=Optim(lr=HYPER["lr_lr"] / HYPER["lr_teacher"] ** 2, momentum=HYPER["momentum_lr"]),
    )
    state = method.init(ctx)
    state.syn.to(torch.float64)
    return method, ctx, state


def test_every_step_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    method, ctx, state = begin(Tesla(), monkeypatch)
    log_lr: Any = state.syn.log_lr
    for step in range(HYPER["steps"]):
        lr = log_lr.exp().item()
        assert method.step(ctx, state, step)["loss"] == pytest.approx(RECORDED["losses"][step].item(), rel=1e-6)
        assert state.syn.latents.grad is not None
        assert apart(state.syn.latents.grad / 2, RECORDED["image_grads"][step]) < 1e-9
        assert log_lr.grad.item() / lr == pytest.approx(RECORDED["lr_grads"][step].item(), rel=1e-9)
        assert apart(state.syn.latents.detach(), RECORDED["images"][step]) < 1e-9
        after = RECORDED["lrs"][step]
        assert log_lr.exp().item() == pytest.approx(after.item(), rel=5e-4)  # its logarithm is what moves
        with torch.no_grad():
            log_lr.copy_(after.log())


def test_the_exact_gradient_of_the_same_loss_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    method, ctx, state = begin(Exact(), monkeypatch)
    assert method.step(ctx, state, 0)["loss"] == pytest.approx(RECORDED["losses"][0].item(), rel=1e-6)
    assert state.syn.latents.grad is not None
    assert apart(state.syn.latents.grad / 2, RECORDED["image_grads"][0]) > 0.1
