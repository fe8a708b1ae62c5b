"""Slow references of the adjoints for a loss ``loss(w, x, y)`` of one flat vector ``w``, from the equations.

Plain SGD: w_{t+1} = w_t - lr g_t; backward pass: dx_t = -lr d(g_t . lam)/dx_t, dlr_t = -lam . g_t,
lam <- lam - lr d(g_t . lam)/dw_t. Momentum (Deng and Russakovsky, 2022): v_{t+1} = m v_t + g_t,
w_{t+1} = w_t - lr v_{t+1}; backward pass: dv <- dv - lr dw, products of g_t with dv, dw <- dw + w-product,
dv <- m dv. TESLA (Cui et al., 2023): dx_t = 2 / D d(v . g_t)/dx_t, v = lr (target - start) + lr^2 sum_t g_t,
with every w_t constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Grads = tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]
"""Gradients with respect to every x_t, every y_t, every lr_t, and w_0."""


def gradient(loss: Loss, w: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the inputs as leaves, and the gradient with respect to w with its graph."""
    w, x, y = (z.detach().clone().requires_grad_() for z in (w, x, y))
    (g,) = torch.autograd.grad(loss(w, x, y), w, create_graph=True)
    return w, x, y, g


def roll(
    loss: Loss, w: Tensor, xs: Sequence[Tensor], ys: Sequence[Tensor], lrs: Sequence[float], m: float
) -> list[tuple[Tensor, Tensor]]:
    """Return the pairs (w_t, v_t) for t = 0 .. N."""
    states = [(w, torch.zeros_like(w))]
    for x, y, lr in zip(xs, ys, lrs, strict=True):
        w, v = states[-1]
        v = m * v + gradient(loss, w, x, y)[3].detach()
        states.append((w - lr * v, v))
    return states


def adjoint(
    loss: Loss,
    w: Tensor,
    xs: Sequence[Tensor],
    ys: Sequence[Tensor],
    lrs: Sequence[float],
    m: float,
    outer: Callable[[Tensor], Tensor],
) -> Grads:
    """Return the gradients of ``outer(w_N)`` under SGD with momentum ``m``."""
    states = roll(loss, w, xs, ys, lrs, m)
    end = states[-1][0].clone().requires_grad_()
    (dw,) = torch.autograd.grad(outer(end), end)
    dv = torch.zeros_like(dw)
    dxs, dys, dlrs = [], [], []
    for t in reversed(range(len(xs))):
        dlrs.insert(0, -(dw @ states[t + 1][1]))
        dv = dv - lrs[t] * dw
        leaf_w, leaf_x, leaf_y, g = gradient(loss, states[t][0], xs[t], ys[t])
        product_w, dx, dy = torch.autograd.grad(g, (leaf_w, leaf_x, leaf_y), dv)
        dxs.insert(0, dx)
        dys.insert(0, dy)
        dw, dv = dw + product_w, m * dv
    return dxs, dys, dlrs, dw


def tesla(
    loss: Loss, w: Tensor, xs: Sequence[Tensor], ys: Sequence[Tensor], lr: float, target: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Return the gradients of |w_N - target|^2 / |w_0 - target|^2 with respect to every x_t, and lr."""
    states = roll(loss, w, xs, ys, [lr] * len(xs), 0.0)
    scale = (w - target).square().sum()
    steps = list(zip([w for w, _ in states[:-1]], xs, ys, strict=True))
    total = torch.stack([gradient(loss, *step)[3].detach() for step in steps]).sum(0)
    v = lr * (target - w) + lr**2 * total
    dxs = []
    for step in steps:
        _, leaf_x, _, g = gradient(loss, *step)
        dxs.append(torch.autograd.grad(v @ g, leaf_x)[0] * 2 / scale)
    leaf = torch.tensor(lr, dtype=w.dtype, requires_grad=True)
    (dlr,) = torch.autograd.grad((w - leaf * total - target).square().sum() / scale, leaf)
    return dxs, dlr
