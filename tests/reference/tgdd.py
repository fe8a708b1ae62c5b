"""Slow reference of TGDD as published: after the gradient of each class, a step of SGD on the images of all classes.

Features and cross-entropy are computed image by image; random draws are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from condense.networks import Network
from tests.reference.idc import decode


def mean_features(network: Network, images: Tensor) -> Tensor:
    features = [network.embed(image[None])[0] for image in images]
    return sum(features[1:], features[0]) / len(features)


def cross_entropy(network: Network, images: Tensor, label: int) -> Tensor:
    """Return the mean of log sum_k exp(z_k) - z_label over the images."""
    total = torch.zeros(())
    for image in images:
        logits = network(image[None])[0]
        total = total + logits.exp().sum().log() - logits[label]
    return total / len(images)


def tgdd(
    start: Sequence[Tensor],
    num_steps: int,
    *,
    factor: int,
    checkpoints: Callable[[int], tuple[Network, Network]],
    real: Callable[[int, int], Tensor],
    augment: Callable[[int, int, Tensor], Tensor],
    weight: float,
    lr: float,
    momentum: float,
) -> Iterator[tuple[float, list[Tensor]]]:
    """Yield the loss of each step, and the stored images of every class at which its next gradient is computed.

    Args:
        start: initial stored images (ipc, C, H, W) of every class.
        checkpoints: returns the matched checkpoint of a step and the later one.
        real: returns the real images for a step and class.
        augment: applies the siamese augmentation of a step and class.
    """
    images = [x.clone() for x in start]
    velocity = [torch.zeros_like(x) for x in images]
    for step in range(num_steps):
        matched, later = checkpoints(step)
        total = 0.0
        for c in range(len(images)):
            leaf = images[c].requires_grad_()
            decoded = augment(step, c, decode(leaf, factor))
            wanted = mean_features(matched, augment(step, c, real(step, c))).detach()
            loss = ((wanted - mean_features(matched, decoded)) ** 2).sum() + weight * cross_entropy(later, decoded, c)
            (gradient,) = torch.autograd.grad(loss, leaf)
            for k in range(len(images)):
                velocity[k] = momentum * velocity[k] + (gradient if k == c else 0)
                images[k] = (images[k] - lr * velocity[k]).detach()
            total += loss.item()

        ahead = []
        for c, (x, v) in enumerate(zip(images, velocity, strict=True)):
            for _ in range(c):  # updates after the preceding classes of the next step
                v = momentum * v
                x = x - lr * v
            ahead.append(x)
        yield total, ahead
