"""A pool of networks that are trained on the set during distillation (FRePo, RCIG).

A member is a plain dict, which the engine can store: weights, the state of Adam, and the age. Methods have a
``list[Member]`` in their state and replace its entries by the results of ``fresh`` and ``train``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypedDict

import torch
from torch import Tensor

from condense.compute import Compute
from condense.inner.implicit import PLAIN_ADAM
from condense.inner.rules import AdamState
from condense.kernels import regression_targets
from condense.method import Context
from condense.networks import Functional, Weights
from condense.rng import Draws
from condense.schedule import Schedule
from condense.sources import Minibatches
from condense.train import Trainer, Training

Loss = Callable[[Tensor, Tensor], Tensor]
"""``loss(logits, targets) -> scalar``, both (n, C). It has to be a module-level function: trainers are cached by it."""


class Member(TypedDict):
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    adam: dict[str, Any]
    """The fields of ``AdamState``."""
    age: int
    """Number of training steps plus the initial ``age`` given to ``fresh``."""


def targets_of(ctx: Context, targets: Tensor) -> Tensor:
    """Convert the targets of a set to regression targets (n, C) centred at zero."""
    return regression_targets(targets, ctx.labels.space, ctx.task.num_classes, ctx.task.network.dtype)


def draw(ctx: Context, num_members: int, step: int) -> int:
    """Draw the slot of the member that a step uses."""
    return ctx.rng("pool member", step).integer(0, num_members)


def weights(ctx: Context, members: Sequence[Member], step: int) -> Weights:
    """Return the weights of the member that a step uses."""
    member = members[draw(ctx, len(members), step)]
    return Weights(member["params"], member["buffers"])


def fresh(ctx: Context, step: int, slot: int, age: int = 0) -> Member:
    """Return a member with new weights, drawn by its slot and the first step that can use it."""
    params, buffers = ctx.task.network.init(ctx.rng, "pool", step, slot)
    return Member(params=params, buffers=buffers, adam=PLAIN_ADAM.init(params)._asdict(), age=age)


def train(
    ctx: Context,
    member: Member,
    images: Tensor,
    targets: Tensor,
    loss: Loss,
    draws: Draws,
    *,
    lr: float,
    num_steps: int = 1,
    batch_size: int | None = None,
) -> Member:
    """Return a copy of ``member`` after ``num_steps`` steps of Adam in training mode.

    Args:
        images, targets: (N, C, H, W) and (N, num_classes); they get no gradient.
        draws: draws the minibatches, each without replacement.
        batch_size: images per step; all of them if it is None or there are fewer.
    """
    num, device = len(images), images.device
    indices = [draws.subset(num, batch_size or num).to(device) for _ in range(num_steps)]
    source = Minibatches(images.detach(), targets.detach(), indices)
    adam: list[_Adam] = []

    def optimiser(params: dict[str, Tensor]) -> _Adam:
        adam.append(_Adam(params, lr, AdamState(**member["adam"])))
        return adam[0]

    weights = Weights(member["params"], member["buffers"])
    params, buffers = _trainer(ctx.task.network, loss, lr, ctx.compute).run(weights, source, optimiser=optimiser)
    return Member(params=params, buffers=buffers, adam=adam[0].memory._asdict(), age=member["age"] + num_steps)


@lru_cache(maxsize=4)
def _trainer(network: Functional, loss: Loss, lr: float, compute: Compute) -> Trainer:
    """A cached trainer; the steps of one call of ``train`` are one epoch."""
    return Trainer(network, Training(num_epochs=1, lr=lr, schedule=Schedule()), compute, loss)


class _Adam(torch.optim.Optimizer):
    """``PLAIN_ADAM`` as an optimiser of parameters in place; continues from the state of a member."""

    def __init__(self, params: dict[str, Tensor], lr: float, memory: AdamState) -> None:
        super().__init__(params.values(), {"lr": lr})
        self.named, self.memory = params, memory

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.named.items()}
        lr = torch.full((), self.param_groups[0]["lr"], device=next(iter(grads.values())).device)
        updated, self.memory = PLAIN_ADAM.update(grads, self.memory, self.named, lr)
        for name, p in self.named.items():
            p.copy_(updated[name])
