"""Kernels and kernel ridge regression: what a network fitted to the synthetic set would predict, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ESCALATIONS = 6
"""How often the ridge is multiplied by ten, where the matrix is not numerically positive definite."""


def ridge_solve(k_ss: Tensor, y: Tensor, ridge: Tensor | float) -> Tensor:
    """``(K + ridge I)^-1 y`` by a Cholesky factorisation; differentiable.

    A ridge that leaves the matrix indefinite to rounding is multiplied by ten until it does not.

    Args:
        k_ss: (n, n), symmetric.
        y: (n, C).
        ridge: absolute; see ``relative_ridge``.

    Raises:
        FloatingPointError: the matrix is not finite, or far from positive definite.
    """
    identity = torch.eye(len(k_ss), dtype=k_ss.dtype, device=k_ss.device)
    with torch.no_grad():
        for _ in range(MAX_ESCALATIONS):
            _, failed = torch.linalg.cholesky_ex(k_ss + ridge * identity)
            if not failed:
                break
            ridge = ridge * 10
        else:
            raise FloatingPointError(f"a kernel matrix of {len(k_ss)} images is not positive definite")
    factor = torch.linalg.cholesky(k_ss + ridge * identity)
    return torch.cholesky_solve(y, factor)


def relative_ridge(k_ss: Tensor, ridge: float) -> Tensor:
    """``ridge`` times the mean of the diagonal, a constant."""
    return ridge * k_ss.detach().diagonal().mean().abs()


def feature_kernel(a: Tensor, b: Tensor) -> Tensor:
    """Inner products (n, m) of features (n, F) and (m, F)."""
    return a @ b.T
