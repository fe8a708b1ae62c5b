"""Slow reference of DC and DSA: gradient matching with explicit sums; random draws are arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def layerwise_cosine(real: Sequence[Tensor], syn: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(())
    for a, b in zip(real, syn, strict=True):
        if a.dim() == 1:
            continue
        for row_a, row_b in zip(a, b, strict=True):
            x, y = row_a.reshape(-1), row_b.reshape(-1)
            total = total + 1 - x @ y / (x.norm() * y.norm() + 1e-6)
    return total


def mse(real: Sequence[Tensor], syn: Sequence[Tensor]) -> Tensor:
    return sum((((a - b) ** 2).sum() for a, b in zip(real, syn, strict=True)), torch.zeros(()))


def cosine(real: Sequence[Tensor], syn: Sequence[Tensor]) -> Tensor:
    x, y = (torch.cat([g.reshape(-1) for g in side]) for side in (real, syn))
    return 1 - x @ y / (x.norm() * y.norm() + 1e-6)


DISTANCES = {"layerwise-cosine": layerwise_cosine, "mse": mse, "cosine": cosine}


def gradient_matching(
    start: Sequence[Tensor],
    num_steps: int,
    *,
    outer_loop: int,
    inner_epochs: int,
    network: Callable[[int], nn.Module],
    real: Callable[[int, int], Tensor],
    statistics: Callable[[int], Tensor],
    augment: Callable[[int, int, Tensor], Tensor],
    epoch: Callable[[int, int], Sequence[tuple[Tensor, Callable[[Tensor], Tensor]]]],
    distance: str,
    lr: float,
    momentum: float,
    lr_student: float,
) -> Iterator[tuple[float, Tensor]]:
    """Yield the loss and the images (C * ipc, ...), grouped by class, after each step.

    Args:
        start: initial images (ipc, C, H, W) of every class.
        network: returns a fresh student for a step.
        real: returns the real images for a step and class.
        statistics: returns the images that update the running statistics in a step.
        augment: applies the siamese augmentation of a step and class.
        epoch: returns the minibatches of a step and epoch: indices of images, and their augmentation.
    """
    images = [x.clone() for x in start]
    labels = [torch.full((len(x),), c) for c, x in enumerate(images)]
    velocity = [torch.zeros_like(x) for x in images]
    student = nn.Module()
    for step in range(num_steps):
        if step % outer_loop == 0:
            student = network(step)
        student.train()
        with torch.no_grad():
            student(statistics(step))
        for module in student.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        weights = list(student.parameters())

        loss = 0.0
        for c in range(len(images)):
            batch = augment(step, c, real(step, c))
            real_grads = torch.autograd.grad(F.cross_entropy(student(batch), torch.full((len(batch),), c)), weights)
            leaf = images[c].requires_grad_()
            syn_loss = F.cross_entropy(student(augment(step, c, leaf)), labels[c])
            syn_grads = torch.autograd.grad(syn_loss, weights, create_graph=True)
            value = DISTANCES[distance](real_grads, syn_grads)
            (grad,) = torch.autograd.grad(value, leaf)
            velocity[c] = momentum * velocity[c] + grad
            images[c] = (leaf - lr * velocity[c]).detach()
            loss += value.item()

        if step % outer_loop < outer_loop - 1:
            student.train()
            every, targets = torch.cat(images), torch.cat(labels)
            for number in range(inner_epochs):
                for index, treat in epoch(step, number):
                    student_loss = F.cross_entropy(student(treat(every[index])), targets[index])
                    grads = torch.autograd.grad(student_loss, weights)
                    with torch.no_grad():
                        for w, g in zip(weights, grads, strict=True):
                            w.sub_(lr_student * g)
        yield loss, torch.cat(images)
