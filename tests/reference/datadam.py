"""Slow reference of DataDAM: attention is computed image by image; random draws are arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from condense.networks import Network


def attention(activations: Tensor, power: float) -> Tensor:
    """Return the normalised attention (H * W,) of the activations (C, H, W) of one image."""
    _, height, width = activations.shape
    sums = []
    for i in range(height):
        for j in range(width):
            sums.append(sum((abs(a) ** power for a in activations[:, i, j]), torch.zeros(())))
    vector = torch.stack(sums)
    return vector / vector.norm()


def layers(psi: Network, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the outputs of all ReLUs of a ConvNet, and the features."""
    blocks, maps, x = psi.get_submodule("features"), [], images
    for block in blocks.children():
        x = block(x)
        if isinstance(block, nn.ReLU):
            maps.append(x)
    return maps, x.flatten(1)


def class_means(psi: Network, classes: Sequence[Tensor], power: float, mixed: bool) -> list[list[Tensor]]:
    """Return for every class the mean attention of each layer except the last one, and the mean features."""
    means_by_class = []
    everything = layers(psi, torch.cat(list(classes))) if mixed else None
    begin = 0
    for images in classes:
        if everything is None:
            maps, features = layers(psi, images)
        else:
            maps = [layer[begin : begin + len(images)] for layer in everything[0]]
            features = everything[1][begin : begin + len(images)]
        begin += len(images)
        means = []
        for layer in maps[:-1]:
            means.append(sum((attention(a, power) for a in layer), torch.zeros(())) / len(images))
        means_by_class.append([*means, sum(features, torch.zeros(())) / len(images)])
    return means_by_class


def attention_matching(
    start: Sequence[Tensor],
    num_steps: int,
    *,
    network: Callable[[int], Network],
    real: Callable[[int, int], Tensor],
    augment: Callable[[int, int, Tensor], Tensor],
    power: float,
    balance: float,
    mixed: bool,
    lr: float,
    momentum: float,
) -> Iterator[tuple[float, list[Tensor]]]:
    """Yield the loss and the images by class after each step.

    Args:
        start: initial images (ipc, C, H, W) of every class.
        real: returns a batch of real images for a step and class.
        augment: applies the augmentation of a step and class to images.
        mixed: whether one forward pass covers all classes.
    """
    images = [x.clone() for x in start]
    velocity = [torch.zeros_like(x) for x in images]
    for step in range(num_steps):
        psi = network(step).train()
        leaves = [x.requires_grad_() for x in images]
        real_images = [augment(step, c, real(step, c)) for c in range(len(leaves))]
        syn_images = [augment(step, c, x) for c, x in enumerate(leaves)]
        real_means = class_means(psi, real_images, power, mixed)
        syn_means = class_means(psi, syn_images, power, mixed)
        loss_attention, loss_features = torch.zeros(()), torch.zeros(())
        for a, b in zip(real_means, syn_means, strict=True):
            for layer in range(len(a) - 1):
                loss_attention = loss_attention + ((a[layer].detach() - b[layer]) ** 2).sum()
            loss_features = loss_features + ((a[-1].detach() - b[-1]) ** 2).sum()
        loss = 100 * loss_attention + 100 * balance * loss_features
        grads = torch.autograd.grad(loss, leaves)
        velocity = [momentum * v + g for v, g in zip(velocity, grads, strict=True)]
        images = [x.detach() - lr * v for x, v in zip(leaves, velocity, strict=True)]
        yield loss.item(), [x.clone() for x in images]
