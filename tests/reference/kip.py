"""Slow reference of KIP: the kernel of each pair from the angle between two images, differentiated by autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


def pair_kernel(x: Tensor, y: Tensor, depth: int, w_std: float, b_std: float) -> tuple[Tensor, Tensor]:
    """Return the NNGP and NTK of two images. For equal images the angle is the constant zero, without gradient."""
    x, y, size = x.reshape(-1), y.reshape(-1), x.numel()
    xx = w_std**2 * (x @ x) / size + b_std**2
    yy = w_std**2 * (y @ y) / size + b_std**2
    xy = w_std**2 * (x @ y) / size + b_std**2
    ntk = xy
    for _ in range(depth):
        if torch.equal(x, y):
            both, active = torch.sqrt(xx * yy) / 2, torch.tensor(0.5)
        else:
            theta = torch.acos(xy / torch.sqrt(xx * yy))
            both = torch.sqrt(xx * yy) * (torch.sin(theta) + (math.pi - theta) * torch.cos(theta)) / (2 * math.pi)
            active = (math.pi - theta) / (2 * math.pi)
        xx, yy = w_std**2 * xx / 2 + b_std**2, w_std**2 * yy / 2 + b_std**2
        xy = w_std**2 * both + b_std**2
        ntk = xy + w_std**2 * ntk * active
    return xy, ntk


def matrix(a: Tensor, b: Tensor, kernel: str, depth: int, w_std: float, b_std: float) -> Tensor:
    which = ("nngp", "ntk").index(kernel)
    rows = [torch.stack([pair_kernel(x, y, depth, w_std, b_std)[which] for y in b]) for x in a]
    return torch.stack(rows)


def one_hot_less_mean(labels: Tensor, num_classes: int) -> Tensor:
    y = torch.full((len(labels), num_classes), -1 / num_classes, dtype=torch.float64)
    for i, c in enumerate(labels.tolist()):
        y[i, c] += 1
    return y


class Adam:
    """Adam (Kingma and Ba, 2015) for one tensor."""

    def __init__(self, x: Tensor, lr: float, beta: float) -> None:
        self.lr, self.beta, self.steps = lr, beta, 0
        self.m, self.v = torch.zeros_like(x), torch.zeros_like(x)

    def step(self, x: Tensor, grad: Tensor) -> Tensor:
        self.steps += 1
        self.m = self.beta * self.m + (1 - self.beta) * grad
        self.v = 0.999 * self.v + 0.001 * grad**2
        m, v = self.m / (1 - self.beta**self.steps), self.v / (1 - 0.999**self.steps)
        return x - self.lr * m / (v.sqrt() + 1e-8)


def kip(
    images: Tensor,
    y: Tensor,
    num_steps: int,
    *,
    real: Callable[[int], tuple[Tensor, Tensor]],
    augment: Callable[[int, Tensor], Tensor],
    kernel: str,
    depth: int,
    w_std: float,
    b_std: float,
    ridge: float,
    lr: float,
    lr_labels: float,
    learn_labels: bool,
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Yield the loss, the images and the targets after each step, in float64.

    Args:
        images: initial images (n, ...).
        y: initial targets (n, C).
        real: returns the real images and classes for a step.
        augment: applies the augmentation of a step to the images.
    """
    settings = (kernel, depth, w_std, b_std)
    adam, adam_labels = Adam(images, lr, 0.9), Adam(y, lr_labels, 0.9)
    for step in range(num_steps):
        images, y = images.detach().requires_grad_(), y.detach().requires_grad_()
        batch, classes = real(step)
        wanted = one_hot_less_mean(classes, y.shape[1])
        seen = augment(step, images)
        k_ss, k_ts = matrix(seen, seen, *settings), matrix(batch, seen, *settings)
        size = ridge * k_ss.trace() / len(k_ss)
        predicted = k_ts @ torch.linalg.inv(k_ss + size * torch.eye(len(k_ss), dtype=k_ss.dtype)) @ y
        loss = ((predicted - wanted) ** 2).sum() / predicted.numel() / 2
        grad, grad_labels = torch.autograd.grad(loss, [images, y])
        images = adam.step(images.detach(), grad)
        y = adam_labels.step(y.detach(), grad_labels) if learn_labels else y.detach()
        yield loss.item(), images, y
