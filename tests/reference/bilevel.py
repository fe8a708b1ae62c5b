"""Slow references of DD, RaT-BPTT and RTP: all steps are unrolled by plain autograd; random draws are arguments."""

from __future__ import annotations

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
    return F.cross_entropy(logits(theta, real[0]), real[1])


def rtp(logits: Logits, theta: Params, batches: Sequence[Batch], lr: float, momentum: float, real: Batch) -> Tensor:
    """Return the loss on real images after SGD with momentum; the learning rate multiplies the velocity."""
    theta = leaves(theta)
    velocity = {name: torch.zeros_like(p) for name, p in theta.items()}
    for batch in batches:
        g = gradient(logits, theta, batch)
        velocity = {name: momentum * velocity[name] + g[name] for name in theta}
        theta = {name: p - lr * velocity[name] for name, p in theta.items()}
    return F.cross_entropy(logits(theta, real[0]), real[1])
