"""Kernels and kernel ridge regression: the predictions of a network fitted to the synthetic set, in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ESCALATIONS = 6
"""The maximum number of Cholesky attempts, each with a ten times larger ridge than the one before."""


def ridge_solve(k_ss: Tensor, y: Tensor, ridge: Tensor | float) -> Tensor:
    """Return ``(K + ridge I)^-1 y``, computed by a Cholesky factorisation; differentiable.

    If the matrix is not numerically positive definite, the ridge is multiplied by ten, and is at least as large as the
    rounding error of the matrix. This is repeated up to ``MAX_ESCALATIONS`` times in total.

    Args:
        k_ss: (n, n), symmetric; only the lower triangle is read.
        y: (n, C).
        ridge: the absolute ridge; see ``relative_ridge``.

    Raises:
        FloatingPointError: the matrix is on the CPU and not finite, or far from positive definite. On other devices the
            solution is NaN in this case, since nothing is read from them.
    """
    dtype, device = k_ss.dtype, k_ss.device
    identity, reads = torch.eye(len(k_ss), dtype=dtype, device=device), device.type == "cpu"
    # a captured step cannot copy a number from the host, so it is written on the device
    ridge = ridge.to(k_ss) if isinstance(ridge, Tensor) else torch.full((), ridge, dtype=dtype, device=device)
    chosen, all_failed = ridge, torch.ones((), dtype=torch.bool, device=device)
    for attempt in range(MAX_ESCALATIONS):
        if attempt:
            rounding = relative_ridge(k_ss.detach(), torch.finfo(k_ss.dtype).eps)
            ridge = torch.maximum(ridge * 10, rounding)
            chosen = torch.where(all_failed, ridge, chosen)
        factor, failed = torch.linalg.cholesky_ex(k_ss + chosen * identity)
        all_failed = all_failed & (failed != 0)
        if reads and not all_failed:
            return torch.cholesky_solve(y, factor)
    if reads:
        raise FloatingPointError(f"a kernel matrix of {len(k_ss)} images is not positive definite")
    return torch.where(all_failed, torch.nan, torch.cholesky_solve(y, factor))


def relative_ridge(k_ss: Tensor, ridge: float) -> Tensor:
    """Return ``ridge`` times the absolute value of the mean of the diagonal; differentiable in the kernel."""
    return ridge * k_ss.diagonal().mean().abs()


def regression(k_ts: Tensor, k_ss: Tensor, y: Tensor, ridge: float) -> Tensor:
    """Return the predictions (m, C) of ridge regression on ``y``, ``K_ts (K_ss + ridge mean(diag K_ss) I)^-1 y``."""
    return k_ts @ ridge_solve(k_ss, y, relative_ridge(k_ss, ridge))


def centred(targets: Tensor, num_classes: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return one-hot vectors of classes (n,), or probabilities (n, C), minus 1/C: (n, C)."""
    if targets.dim() == 1:
        targets = F.one_hot(targets, num_classes)
    return targets.to(dtype) - 1 / num_classes


def regression_targets(
    targets: Tensor,
    space: Literal["classes", "probabilities", "values"],
    num_classes: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return the regression targets (n, C) of a set: centred classes or probabilities, or unchanged values."""
    return targets.to(dtype) if space == "values" else centred(targets, num_classes, dtype)


def feature_kernel(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products (n, m) of features (n, F) and (m, F)."""
    return a @ b.T


class Kernels(NamedTuple):
    """The kernels of an infinitely wide network, both (n, m)."""

    nngp: Tensor
    """Covariance of the outputs with random weights; its regression corresponds to training only the last layer."""
    ntk: Tensor
    """Inner products of the gradients; its regression corresponds to training all layers by small steps."""


def fully_connected(
    a: Tensor, b: Tensor | None = None, *, depth: int = 1, w_std: float = math.sqrt(2), b_std: float = 0.1
) -> Kernels:
    """Return the kernels of an infinitely wide ReLU network between images (n, ...) and (m, ...), in their dtype.

    Layers are ``w_std / sqrt(fan_in) W x + b_std b`` with standard normal W and b, the parameterisation of Jacot,
    Gabriel and Hongler (2018). A ReLU transforms the kernels by the arc-cosine functions of Cho and Saul (2009).

    The gradient is finite everywhere. Where two images are equal, the NTK has a cone-shaped cusp whose directional
    derivatives cancel, and the gradient is zero up to rounding.

    Args:
        a: images, or other tensors that ``flatten(1)`` turns into vectors.
        b: other images. None: ``a`` itself, for which the diagonal is exact.
        depth: the number of hidden layers.
        w_std, b_std: the standard deviations of weights and biases in all layers.
    """
    x = a.flatten(1)
    y = x if b is None else b.flatten(1)
    same = torch.eye(len(x), dtype=torch.bool, device=x.device) if b is None else None

    def linear(kernel: Tensor) -> Tensor:
        return w_std**2 * kernel + b_std**2

    nngp = linear(x @ y.T / x.shape[1])
    var_x, var_y = (linear(v.square().mean(1)) for v in (x, y))
    ntk = nngp
    for _ in range(depth):
        norms = torch.outer(var_x, var_y).clamp_min(torch.finfo(x.dtype).tiny).sqrt()
        cos = nngp / norms
        if same is not None:
            cos = cos.masked_fill(same, 1)
        nngp = linear(norms * arc_cosine_1(cos) / 2)
        ntk = nngp + w_std**2 * ntk * arc_cosine_0(cos) / 2
        var_x, var_y = linear(var_x / 2), linear(var_y / 2)
    return Kernels(nngp, ntk)


def empirical_ntk(
    logits: Callable[[Mapping[str, Tensor], Tensor], Tensor],
    params: Mapping[str, Tensor],
    a: Tensor,
    b: Tensor | None = None,
    *,
    chunk: int = 32,
) -> Tensor:
    """Return the inner products (n, m) of the gradients of a finite network's outputs, averaged over the outputs.

    Args:
        logits: ``logits(params, images (N, ...)) -> (N, C)``, where each output may depend only on its own image.
        params: the parameters of the network, all of which are included.
        a, b: images (n, ...) and (m, ...). If ``b`` is None, it is ``a``.
        chunk: the number of images, on each side, whose Jacobians are held at a time.
    """

    def of_one(params: Mapping[str, Tensor], image: Tensor) -> Tensor:
        return logits(params, image[None])[0]

    jacobian = torch.func.vmap(torch.func.jacrev(of_one), (None, 0))

    def gradients(images: Tensor) -> Tensor:
        """Return the scaled gradients of all outputs, (N, C P)."""
        jacobians = jacobian(params, images)
        return torch.cat([g.flatten(1) / math.sqrt(g.shape[1]) for g in jacobians.values()], 1)

    def rows(images: Tensor) -> Tensor:
        left = gradients(images)
        return torch.cat([left @ gradients(others).T for others in (a if b is None else b).split(chunk)], 1)

    return torch.cat([rows(images) for images in a.split(chunk)])


def arc_cosine_0(cos: Tensor) -> Tensor:
    """Return ``(pi - theta) / pi`` for cos theta, elementwise: twice the expectation of step(u) step(v)."""
    value: Tensor = _ArcCosine0.apply(cos)
    return value


def arc_cosine_1(cos: Tensor) -> Tensor:
    """Return ``(sin theta + (pi - theta) cos theta) / pi``, elementwise: twice the expectation of relu(u) relu(v)."""
    value: Tensor = _ArcCosine1.apply(cos)
    return value


class _ArcCosine0(torch.autograd.Function):
    """The arc-cosine function of order 0, with a bounded derivative.

    The derivative 1 / (pi sin theta) diverges at cos = +-1, while the factor it is multiplied by, the derivative of the
    cosine in the images, goes to zero like sin theta. sin theta is therefore bounded below by the precision of the
    dtype.
    """

    @staticmethod
    def forward(cos: Tensor) -> Tensor:
        return 1 - cos.clamp(-1, 1).acos() / math.pi

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (cos,) = ctx.saved_tensors
        return grad / (math.pi * ((1 - cos) * (1 + cos)).clamp_min(torch.finfo(cos.dtype).eps).sqrt())


class _ArcCosine1(torch.autograd.Function):
    """The arc-cosine function of order 1.

    Its derivative is the function of order 0, which is finite everywhere; autograd would subtract infinities.
    """

    @staticmethod
    def forward(cos: Tensor) -> Tensor:
        cos = cos.clamp(-1, 1)
        theta = cos.acos()
        return (theta.sin() + (math.pi - theta) * cos) / math.pi

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (cos,) = ctx.saved_tensors
        return grad * arc_cosine_0(cos)
