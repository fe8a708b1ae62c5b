"""A pool of networks that learn from the set while the set learns from them (FRePo, RCIG).

A member is a plain dict, hence a value that the engine stores: weights, the state of its Adam, and its age. Methods
keep ``list[Member]`` in their state and replace an entry by what ``fresh`` and ``train`` return.
"""

from __future__ import annotations

from collections.abc import Callable
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
from condense.schedule import Schedule
from condense.sources import Minibatches
from condense.train import Trainer, Training

Loss = Callable[[Tensor, Tensor], Tensor]
"""``loss(logits, targets) -> scalar``, both (n, C); a function of a module, for it is part of what is compiled once."""


class Member(TypedDict):
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    adam: dict[str, Any]
    """The fields of ``AdamState``."""
    age: int
    """Steps of training, plus what ``fresh`` was told."""


def targets_of(ctx: Context, targets: Tensor) -> Tensor:
    """What a set's targets say as (n, C) values around zero."""
    return regression_targets(targets, ctx.labels.space, ctx.task.num_classes, ctx.task.network.dtype)


def draw(ctx: Context, num_members: int, step: int) -> int:
    """The slot of the member that a step uses."""
    return int(torch.randint(num_members, (), generator=ctx.rng("pool member", step)))


def fresh(ctx: Context, step: int, slot: int, age: int = 0) -> Member:
    """A member with new weights, a function of the slot and the first step that can use it."""
    params, buffers = ctx.task.network.init(ctx.rng, "pool", step, slot)
    return Member(params=params, buffers=buffers, adam=PLAIN_ADAM.init(params)._asdict(), age=age)


def train(
    ctx: Context,
    member: Member,
    images: Tensor,
    targets: Tensor,
    loss: Loss,
    generator: torch.Generator,
    *,
    lr: float,
    num_steps: int = 1,
    batch_size: int | None = None,
) -> Member:
    """A copy of ``member`` after ``num_steps`` of Adam on its logits, in training mode.

    Args:
        images, targets: (N, C, H, W) and (N, num_classes); held fixed.
        generator: draws the minibatches, each without replacement.
        batch_size: images a step; None, or where there are fewer: all of them.
    """
    num, device = len(images), images.device
    indices = [torch.randperm(num, generator=generator)[:batch_size].to(device) for _ in range(num_steps)]
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
    """One epoch is the steps of one call."""
    return Trainer(network, Training(num_epochs=1, lr=lr, schedule=Schedule()), compute, loss)


class _Adam(torch.optim.Optimizer):
    """``PLAIN_ADAM`` on live parameters; continues from what a member remembers."""

    def __init__(self, params: dict[str, Tensor], lr: float, memory: AdamState) -> None:
        super().__init__(params.values(), {"lr": lr})
        self.named, self.memory = params, memory

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.named.items()}
        lr = torch.tensor(self.param_groups[0]["lr"], device=next(iter(grads.values())).device)
        updated, self.memory = PLAIN_ADAM.update(grads, self.memory, self.named, lr)
        for name, p in self.named.items():
            p.copy_(updated[name])
