"""Slow reference of DPDM: explicit sums, record by record, and SGD with momentum; all random draws are arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from condense.networks import Network


def noisy_sum(psi: Network, records: Sequence[Tensor], noise: Tensor) -> Tensor:
    """Return the sum (F,) of the clipped features of records (C, H, W), plus the noise (F,)."""
    total = noise.clone()
    for record in records:
        total += _clipped(psi, record).double()
    return total


def private_matching(
    start: Sequence[Tensor],
    num_steps: int,
    *,
    networks: Sequence[Network],
    targets: Sequence[Sequence[Tensor]],
    sizes: Sequence[float],
    augment: Callable[[int, Tensor], Tensor],
    scale: float,
    lr: float,
    momentum: float,
) -> Iterator[tuple[float, list[Tensor]]]:
    """Yield the loss and the images by class after each step.

    Args:
        start: initial images (ipc, C, H, W) of every class.
        num_steps: number of steps.
        networks: random networks, in the order of the steps, and again from the first.
        targets: the noisy sum (F,) of every class, for each network.
        sizes: the expected number of records in the sum of every class.
        augment: applies the augmentation of a network to one image (1, C, H, W).
        scale: number of images to which both sums are scaled.
        lr, momentum: of SGD.
    """
    images = [x.clone() for x in start]
    velocity = [torch.zeros_like(x) for x in images]
    for step in range(num_steps):
        number = step % len(networks)
        leaves = [x.requires_grad_() for x in images]
        loss = torch.zeros(())
        for leaf, target, size in zip(leaves, targets[number], sizes, strict=True):
            ours = torch.zeros(len(target))
            for image in leaf:
                ours = ours + _clipped(networks[number], augment(number, image[None])[0])
            loss = loss + ((scale / len(leaf) * ours - scale / size * target.float()) ** 2).sum()
        grads = torch.autograd.grad(loss, leaves)
        velocity = [momentum * v + g for v, g in zip(velocity, grads, strict=True)]
        images = [x.detach() - lr * v for x, v in zip(leaves, velocity, strict=True)]
        yield loss.item(), [x.clone() for x in images]


def _clipped(psi: Network, image: Tensor) -> Tensor:
    features = psi.train().embed(image[None])[0]
    norm = float(features.detach().norm())
    return features / features.norm() if norm > 1 else features
