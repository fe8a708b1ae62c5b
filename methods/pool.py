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
from condense.networks import Functional

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
    gradient = _gradient(ctx.task.network, loss, ctx.compute)
    images, targets, rate = images.detach(), targets.detach(), torch.tensor(lr, device=images.device)
    params, state = member["params"], AdamState(**member["adam"])
    buffers = {name: buffer.clone() for name, buffer in member["buffers"].items()}
    for _ in range(num_steps):
        index = torch.randperm(len(images), generator=generator)[:batch_size].to(images.device)
        grads = gradient(params, buffers, images[index], targets[index])
        with torch.no_grad():
            params, state = PLAIN_ADAM.update(grads, state, params, rate)
    return Member(params=params, buffers=buffers, adam=state._asdict(), age=member["age"] + num_steps)


@lru_cache(maxsize=4)
def _gradient(network: Functional, loss: Loss, compute: Compute) -> Callable[..., dict[str, Tensor]]:
    """The gradient in the parameters; moves BatchNorm's running statistics in ``buffers``."""

    def value(params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor, targets: Tensor) -> Tensor:
        logits = network.logits(params, buffers, images, train=True, update_buffers=True)
        return loss(logits.to(images.dtype), targets)

    first_order = compute.first_order(value, network.device)

    def gradient(
        params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor, targets: Tensor
    ) -> dict[str, Tensor]:
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        found = first_order(leaves, buffers, compute.layout(images), targets)
        grads = torch.autograd.grad(found, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, grads, strict=True))

    return gradient
