"""Slow references of DD, RaT-BPTT, AT-BPTT and RTP: plain autograd unrolls all steps; random draws are arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]
Logits = Callable[[Params, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]


def gradient(logits: Logits, theta: Params, batch: Batch) -> Params:
    loss = F.cross_entropy(logits(theta, batch[0]), batch[1])
    return dict(zip(theta, torch.autograd.grad(loss, list(theta.values()), create_graph=True), strict=True))


def leaves(theta: Params) -> Params:
    return {name: p.detach().clone().requires_grad_() for name, p in theta.items()}


def dd(logits: Logits, theta: Params, batches: Sequence[Batch], rates: Tensor, real: Batch) -> Tensor:
    """Return the loss on real images after one SGD step on each batch, each with its own learning rate."""
    theta = leaves(theta)
    for t, batch in enumerate(batches):
        g = gradient(logits, theta, batch)
        theta = {name: p - rates[t] * g[name] for name, p in theta.items()}
    return F.cross_entropy(logits(theta, real[0]), real[1])


def rat_bptt(
    logits: Logits, theta: Params, batches: Sequence[Batch], burn_in: int, lr: float, real: Batch, eps_root: float
) -> Tensor:
    """Return the loss on real images after steps of Adam. The graph is cut after ``burn_in`` steps."""
    theta = trained_by_adam(logits, theta, batches, burn_in, lr, eps_root)
    return F.cross_entropy(logits(theta, real[0]), real[1])


def trained_by_adam(
    logits: Logits, theta: Params, batches: Sequence[Batch], burn_in: int, lr: float, eps_root: float
) -> Params:
    theta = leaves(theta)
    mean = {name: torch.zeros_like(p) for name, p in theta.items()}
    square = {name: torch.zeros_like(p) for name, p in theta.items()}
    for t, batch in enumerate(batches):
        g = gradient(logits, theta, batch)
        mean = {name: 0.9 * mean[name] + 0.1 * g[name] for name in theta}
        square = {name: 0.999 * square[name] + 0.001 * g[name] ** 2 for name in theta}
        theta = {
            name: p
            - lr
            * (mean[name] / (1 - 0.9 ** (t + 1)))
            / (torch.sqrt(square[name] / (1 - 0.999 ** (t + 1)) + eps_root) + 1e-8)
            for name, p in theta.items()
        }
        if t + 1 == burn_in:
            theta = leaves(theta)
            mean, square = ({name: p.detach() for name, p in moment.items()} for moment in (mean, square))
    return theta


def at_bptt_norms(logits: Logits, theta: Params, batches: Sequence[Batch], lr: float, eps_root: float) -> list[float]:
    """Return the norm of the gradient of each training step; the training begins anew for each."""
    norms = []
    for t, batch in enumerate(batches):
        reached = leaves(trained_by_adam(logits, theta, batches[:t], t, lr, eps_root))
        norms.append(math.sqrt(sum(float((g.detach() ** 2).sum()) for g in gradient(logits, reached, batch).values())))
    return norms


def at_bptt_window(
    norms: Sequence[float],
    stage: int,
    w: int,
    d: int,
    temperature: float,
    uniform: float,
    integer: Callable[[int], int],
) -> tuple[int, int]:
    """Return where the window begins and how long it is.

    Args:
        uniform: a number in [0, 1) that draws a position in stages 1 and 3.
        integer: draws one of {0, ..., n - 1} in stage 2.
    """
    steps = len(norms)
    if stage == 2:
        return integer(steps - (w + d) + 1), w + d
    weights = [math.exp(norm / (sum(norms) / steps) / temperature) for norm in norms]
    n = next(i for i in range(steps) if sum(weights[: i + 1]) > uniform * sum(weights))
    if stage == 3:
        return max(0, steps - (w - d) - n), w - d
    changes = [0.0] + [abs(norms[t] - norms[t - 1]) for t in range(1, steps)]
    rank = sum(change < changes[n] for change in changes)
    length = math.floor(w - d + 2 * d * rank / steps)
    return (steps - length if n > steps - length else n), length


def at_bptt_stage(
    accuracies: Sequence[float], steps: int, gains: tuple[float, float], patience: tuple[float, float]
) -> int:
    """Return the stage of the epoch that follows epochs with these accuracies on real images."""
    stage, since = 1, 0
    for epoch in range(len(accuracies)):
        if stage == 3:
            break
        row = 0
        for e in range(epoch, since - 1, -1):
            before = accuracies[e - 1] if e else 0.0
            if accuracies[e] - before >= gains[stage - 1]:
                break
            row += 1
        if row >= patience[stage - 1] * steps:
            stage, since = stage + 1, epoch + 1
    return stage


def rtp(logits: Logits, theta: Params, batches: Sequence[Batch], lr: float, momentum: float, real: Batch) -> Tensor:
    """Return the loss on real images after SGD with momentum; the learning rate multiplies the velocity."""
    theta = leaves(theta)
    velocity = {name: torch.zeros_like(p) for name, p in theta.items()}
    for batch in batches:
        g = gradient(logits, theta, batch)
        velocity = {name: momentum * velocity[name] + g[name] for name in theta}
        theta = {name: p - lr * velocity[name] for name, p in theta.items()}
    return F.cross_entropy(logits(theta, real[0]), real[1])
