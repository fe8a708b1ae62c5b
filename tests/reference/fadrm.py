"""Slow reference of FADRM for one chunk: each stage is a run of Adam of its own; draws are arguments."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from tests.reference.sre2l import Views, inversion_loss


def recover(
    mosaics: Tensor,
    classes: Tensor,
    lengths: Sequence[int],
    first_step: int,
    *,
    teachers: Sequence[nn.Module],
    view: Views,
    keep: float,
    weight_bn: float,
    first_bn: float,
    lr: float,
    betas: tuple[float, float],
    low: Tensor,
    high: Tensor,
) -> Iterator[tuple[float, Tensor]]:
    """Yield the loss and the images after each step.

    Args:
        mosaics: initial images (n, C, H, W).
        lengths: number of steps of each stage.
        first_step: number of the first step in the run.
        teachers: trained networks, used in turn.
        low, high: the images (C, 1, 1) of black and white.
    """
    images, done = mosaics.clone(), 0
    for stage, length in enumerate(lengths):
        mean, square = torch.zeros_like(images), torch.zeros_like(images)
        for k in range(1, length + 1):
            leaf, number = images.clone().requires_grad_(), first_step + done
            views = torch.cat([view(number, image[None]) for image in leaf])
            loss = inversion_loss(teachers[number % len(teachers)], views, classes, None, weight_bn, first_bn)
            (gradient,) = torch.autograd.grad(loss, leaf)
            mean = betas[0] * mean + (1 - betas[0]) * gradient
            square = betas[1] * square + (1 - betas[1]) * gradient**2
            rate = lr * math.cos(math.pi * done / sum(lengths) / 2) ** 2
            update = (mean / (1 - betas[0] ** k)) / ((square / (1 - betas[1] ** k)).sqrt() + 1e-8)
            images, done = torch.minimum(torch.maximum(images - rate * update, low), high), done + 1
            if k == length and stage + 1 < len(lengths):
                images = keep * images + (1 - keep) * mosaics
            yield loss.item(), images.clone()
