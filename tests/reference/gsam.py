"""Slow twin of sharpness-aware training: the vectors of a step written out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gsam_step(w: Tensor, gradient: Callable[[Tensor], Tensor], *, rho: float, alpha: float, lr: float) -> Tensor:
    """One step of SGD from the flat weights ``w`` (P,)."""
    g0 = gradient(w)
    ascended = w + rho * w**2 * g0 / ((w.abs() * g0).norm() + 1e-12)
    g1 = gradient(ascended)
    cosine = (g0 @ g1) / (g0.norm() * g1.norm())
    across = g0 - cosine * g0.norm() * g1 / g1.norm()
    return w - lr * (g1 - alpha * across)


def run(w: Tensor, gradients: Sequence[Callable[[Tensor], Tensor]], **fields: float) -> Tensor:
    for gradient in gradients:
        w = gsam_step(w, gradient, **fields)
    return w


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])
