"""Slow reference of DM: explicit sums, image by image, and SGD with momentum; random draws are arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from condense.networks import Network


def distribution_matching(
    start: Sequence[Tensor],
    num_steps: int,
    *,
    network: Callable[[int], Network],
    real: Callable[[int, int], Tensor],
    augment: Callable[[int, int, Tensor], Tensor],
    mixed: bool,
    lr: float,
    momentum: float,
) -> Iterator[tuple[float, list[Tensor]]]:
    """Yield the loss and the images by class after each step.

    Args:
        start: initial images (ipc, C, H, W) of every class.
        real: returns a batch of real images for a step and class.
        augment: applies the augmentation of a step and class to one image (1, C, H, W).
        mixed: whether one forward pass covers all classes.
    """
    images = [x.clone() for x in start]
    velocity = [torch.zeros_like(x) for x in images]
    for step in range(num_steps):
        psi = network(step).train()
        leaves = [x.requires_grad_() for x in images]
        real_means = _means(psi, [_each(augment, step, c, real(step, c)) for c in range(len(leaves))], mixed)
        syn_means = _means(psi, [_each(augment, step, c, x) for c, x in enumerate(leaves)], mixed)
        loss = torch.zeros(())
        for a, b in zip(real_means, syn_means, strict=True):
            loss = loss + ((a.detach() - b) ** 2).sum()
        grads = torch.autograd.grad(loss, leaves)
        velocity = [momentum * v + g for v, g in zip(velocity, grads, strict=True)]
        images = [x.detach() - lr * v for x, v in zip(leaves, velocity, strict=True)]
        yield loss.item(), [x.clone() for x in images]


def _each(augment: Callable[[int, int, Tensor], Tensor], step: int, c: int, images: Tensor) -> list[Tensor]:
    return [augment(step, c, image[None]) for image in images]


def _means(psi: Network, classes: Sequence[Sequence[Tensor]], mixed: bool) -> list[Tensor]:
    """Return the mean features of every class, computed image by image, or in one pass for batch statistics."""
    if mixed:
        features = list(psi.embed(torch.cat([x for images in classes for x in images])))
        groups = [[features.pop(0) for _ in images] for images in classes]
    else:
        groups = [[psi.embed(x)[0] for x in images] for images in classes]
    return [sum(group[1:], group[0]) / len(group) for group in groups]
