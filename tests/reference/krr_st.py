"""Slow reference of KRR-ST: explicit regression, Adam and SGD steps; random draws are arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn


def loss(h_t: Tensor, h_s: Tensor, y_s: Tensor, y_t: Tensor, ridge: float) -> Tensor:
    """Return the mean squared error of the regression from features (m, F) and (n, F) to the targets of the teacher."""
    one_t, one_s = h_t.new_ones(len(h_t), 1), h_s.new_ones(len(h_s), 1)
    h_t, h_s = torch.hstack([h_t, one_t]), torch.hstack([h_s, one_s])
    kernel = h_s @ h_s.T
    trace = sum(row.detach() @ row.detach() for row in h_s)
    inverse = torch.linalg.inv(kernel + ridge * trace * torch.eye(len(kernel), dtype=kernel.dtype))
    error = h_t @ h_s.T @ inverse @ y_s - y_t
    return (error * error).sum() / error.numel()


def train(
    network: nn.Module, velocity: list[Tensor], x: Tensor, y: Tensor, lr: float, momentum: float, decay: float
) -> None:
    """Take one step of SGD on the whole set, in place."""
    network.train()
    params = list(network.parameters())
    error = network(x) - y
    grads = torch.autograd.grad((error * error).sum() / error.numel(), params)
    with torch.no_grad():
        for param, buffer, grad in zip(params, velocity, grads, strict=True):
            buffer.mul_(momentum).add_(grad + decay * param)
            param.sub_(lr * buffer)


def krr_st(
    images: Tensor,
    targets: Tensor,
    num_steps: int,
    *,
    network: Callable[[int, int], nn.Module],
    used: Callable[[int], int],
    real: Callable[[int], tuple[Tensor, Tensor]],
    ages: Sequence[int],
    max_age: int,
    ridge: float,
    lr: float,
    linear_to: float,
    lr_pool: float,
    momentum: float,
    decay: float,
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Yield the loss, the images and the targets after each step.

    Args:
        network: returns a fresh network for the step that first uses it, and a slot of the pool.
        used: returns the slot that a step uses.
        real: returns the augmented real images of a step and the teacher's features of them.
        ages: the initial ages of the pool.
    """

    def fresh(step: int, slot: int) -> tuple[nn.Module, list[Tensor]]:
        found = network(step, slot)
        return found, [torch.zeros_like(param) for param in found.parameters()]

    members, ages = [fresh(0, slot) for slot in range(len(ages))], list(ages)
    for (member, velocity), age in zip(members, ages, strict=True):
        for _ in range(age):
            train(member, velocity, images, targets, lr_pool, momentum, decay)
    moments = [(torch.zeros_like(leaf), torch.zeros_like(leaf)) for leaf in (images, targets)]
    for step in range(num_steps):
        slot = used(step)
        member, velocity = members[slot]
        member.eval()
        leaves = [images.clone().requires_grad_(), targets.clone().requires_grad_()]
        x, y = real(step)
        value = loss(member.embed(x).detach(), member.embed(leaves[0]), leaves[1], y, ridge)  # type: ignore[operator]
        rate = lr * (1 - (1 - linear_to) * step / num_steps)
        updated = []
        for leaf, grad, (mean, square) in zip(leaves, torch.autograd.grad(value, leaves), moments, strict=True):
            mean.mul_(0.9).add_(0.1 * grad)
            square.mul_(0.999).add_(0.001 * grad * grad)
            first, second = mean / (1 - 0.9 ** (step + 1)), square / (1 - 0.999 ** (step + 1))
            updated.append(leaf.detach() - rate * first / (second.sqrt() + 1e-8))
        images, targets = updated
        train(member, velocity, images, targets, lr_pool, momentum, decay)
        ages[slot] += 1
        if ages[slot] >= max_age:
            members[slot], ages[slot] = fresh(step + 1, slot), 0
        yield value.item(), images, targets
