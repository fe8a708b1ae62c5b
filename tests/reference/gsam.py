"""Slow reference of adaptive GSAM, from the equations of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gsam_step(w: Tensor, gradient: Callable[[Tensor], Tensor], *, rho: float, alpha: float, lr: float) -> Tensor:
    """Return the flat weights after one step of SGD from ``w`` (P,)."""
    g0 = gradient(w)
    ascended = w + rho * w**2 * g0 / ((w.abs() * g0).norm() + 1e-12)
    g1 = gradient(ascended)
    cosine = (g0 @ g1) / (g0.norm() * g1.norm())
    orthogonal = g0 - cosine * g0.norm() * g1 / g1.norm()
    return w - lr * (g1 - alpha * orthogonal)


def run(w: Tensor, gradients: Sequence[Callable[[Tensor], Tensor]], **fields: float) -> Tensor:
    for gradient in gradients:
        w = gsam_step(w, gradient, **fields)
    return w


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])
