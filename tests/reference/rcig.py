"""Slow reference of RCIG: the change of the weights as one vector, full Jacobians and the full Hessian."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def tangent(logits: Callable[[Tensor, Tensor], Tensor], theta: Tensor, images: Tensor) -> Tensor:
    """Return the Jacobian (n, C, P) of the logits with respect to the moving weights ``theta`` (P,)."""
    jacobian: Tensor = torch.func.jacrev(lambda t: logits(t, images))(theta)
    return jacobian


def inner_loss(d: Tensor, h: Tensor, jacobian: Tensor, y: Tensor, l2: float) -> Tensor:
    """Return L_in: the squared error plus the L2 penalties of the head and of the change ``d`` of the weights."""
    kernel = h @ h.T
    o = jacobian @ d
    a = torch.linalg.solve(kernel + l2 * torch.eye(len(h), dtype=h.dtype), y - o)
    error = y - (o + kernel @ a)
    total = 0.5 * (error * error).sum() + 0.5 * l2 * (torch.trace(a.T @ kernel @ a) + d @ d)
    return total / y.numel()


def predict(d: Tensor, h: Tensor, jacobian: Tensor, y: Tensor, l2: float, h_t: Tensor, jacobian_t: Tensor) -> Tensor:
    a = torch.linalg.solve(h @ h.T + l2 * torch.eye(len(h), dtype=h.dtype), y - jacobian @ d)
    return jacobian_t @ d + h_t @ h.T @ a


def adam(gradient: Callable[[Tensor], Tensor], start: Tensor, num_steps: int, lr: float) -> Tensor:
    x, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for t in range(1, num_steps + 1):
        g = gradient(x)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        x = x - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return x


def outer_loss(prediction: Tensor, classes: Tensor, y: Tensor, tau: Tensor) -> Tensor:
    margin = torch.stack(
        [torch.minimum(row.sort().values[-1] - row.sort().values[-2], torch.tensor(0.5 / len(row))) for row in y]
    )
    return F.cross_entropy(tau.exp() * prediction, classes) - margin.mean()
