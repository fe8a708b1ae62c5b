"""A pool of networks that are trained on the set during distillation (FRePo, RCIG, KRR-ST).

A member is a plain dict, which the engine can store: weights, the state of Adam, and the age. FRePo and RCIG have a
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
from condense.method import Context, State
from condense.networks import Functional, Weights
from condense.schedule import Schedule
from condense.sources import Minibatches
from condense.train import Trainer, Training

Loss = Callable[[Tensor, Tensor], Tensor]
"""``loss(logits, targets) -> scalar``, both (n, C). It has to be a module-level function: trainers are cached by it."""


def training(num_epochs: int, batch_size: int, lr: float, warmup_steps: int) -> Training:
    """Return the training on a set: Adam on half the squared error, with a warm-up and a cosine to a hundredth."""
    return Training(
        num_epochs=num_epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=0.0,
        schedule=Schedule(warmup_steps=warmup_steps, cosine_to=0.01),
        loss="mse",
        optimiser="adam",
    )


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


def minibatches(
    ctx: Context, state: State, step: int, num_images: int, *, batch_size: int | None = None, num_steps: int = 1
) -> Tensor:
    """Draw the minibatches of up to ``num_steps`` training steps, each without replacement: indices (num_steps, n).

    They are drawn on the device, into a tensor that stays in place. All arguments but ``step`` are the same in all
    calls. A minibatch has ``batch_size`` images; all of them if it is None or there are fewer.
    """
    size = min(batch_size or num_images, num_images)

    def make() -> Tensor:
        return torch.empty(num_steps, size, dtype=torch.int64, device=ctx.task.device)

    place = ctx.kept("minibatches of the pool", state, make)

    def draw(step: int) -> None:
        draws = ctx.rng("pool batch", step)
        for row in place:
            row.copy_(draws.subset(num_images, size))

    ctx.graphed("draws of the pool", state, draw)(step)
    return place


def train(
    ctx: Context, member: Member, images: Tensor, targets: Tensor, loss: Loss, indices: Sequence[Tensor], *, lr: float
) -> Member:
    """Return a copy of ``member`` after a step of Adam, in training mode, for each of the minibatches ``indices``.

    ``images`` (N, C, H, W) and ``targets`` (N, num_classes) get no gradient.
    """
    source = Minibatches(images.detach(), targets.detach(), indices)
    adam: list[_Adam] = []

    def optimiser(params: dict[str, Tensor]) -> _Adam:
        adam.append(_Adam(params, lr, AdamState(**member["adam"])))
        return adam[0]

    weights = Weights(member["params"], member["buffers"])
    params, buffers = _trainer(ctx.task.network, loss, lr, ctx.compute).run(weights, source, optimiser=optimiser)
    return Member(params=params, buffers=buffers, adam=adam[0].memory._asdict(), age=member["age"] + len(indices))


@lru_cache(maxsize=4)
def _trainer(network: Functional, loss: Loss, lr: float, compute: Compute) -> Trainer:
    """A cached trainer; the steps of one call of ``train`` are one epoch."""
    return Trainer(network, Training(num_epochs=1, lr=lr, schedule=Schedule()), compute, loss)


@lru_cache(maxsize=1)
def frozen_features(
    network: Functional, compute: Compute
) -> Callable[[dict[str, Tensor], dict[str, Tensor], Tensor], Tensor]:
    """Return ``features(params, buffers, images) -> (N, F)`` in evaluation mode: BatchNorm uses running statistics."""

    def features(params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
        return network.features(params, buffers, images, train=False).to(images.dtype)

    first_order = compute.first_order(features, network.device)
    return lambda params, buffers, images: first_order(params, buffers, compute.layout(images))


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
