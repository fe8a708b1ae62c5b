"""Slow reference of CUDD: one chunk, image by image; draws are arguments."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from tests.reference.sre2l import Views, inversion_loss


def recover(
    start: Tensor,
    classes: Sequence[int],
    num_steps: int,
    first_step: int,
    *,
    teachers: Sequence[nn.Module],
    student: nn.Module | None,
    view: Views,
    weight_bn: float,
    first_bn: float,
    weight_start: float,
    weight_adversarial: float,
    lr: float,
    betas: tuple[float, float],
    low: Tensor,
    high: Tensor,
) -> Iterator[tuple[float, Tensor]]:
    """Yield the loss and the images after each step.

    Args:
        start: real images (n, C, H, W), at which the images begin.
        first_step: number of the first step in the run.
        teachers: trained networks, used in turn.
        student: a trained network; None in the first stage.
        low, high: the images (C, 1, 1) of black and white.
    """
    images, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for k in range(num_steps):
        number = first_step + k
        leaf, teacher = images.clone().requires_grad_(), teachers[number % len(teachers)]
        views = [view(number, image[None]) for image in leaf]
        loss = inversion_loss(teacher, torch.cat(views), torch.tensor(classes), None, weight_bn, first_bn)
        for image, real, c in zip(views, start, classes, strict=True):
            apart = (image - view(number, real[None])).flatten()
            loss = loss + weight_start * (apart @ apart) / len(apart) / len(classes)
            if student is not None:
                scores = student.eval()(image)[0]
                if int(teacher(image)[0].argmax()) != c:
                    scores = 0 * scores
                probability = scores[c].exp() / scores.exp().sum()
                loss = loss - weight_adversarial * (1 - probability).log() / len(classes)
        (gradient,) = torch.autograd.grad(loss, leaf)
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        square = betas[1] * square + (1 - betas[1]) * gradient**2
        rate = lr * math.cos(math.pi * k / num_steps / 2) ** 2
        update = (mean / (1 - betas[0] ** (k + 1))) / ((square / (1 - betas[1] ** (k + 1))).sqrt() + 1e-8)
        images = torch.minimum(torch.maximum(images - rate * update, low), high)
        yield loss.item(), images.clone()
