"""Slow reference of IDC as published: after the gradient of each class, a step of SGD on the images of all classes.

Random draws are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mse(real: Sequence[Tensor], syn: Sequence[Tensor]) -> Tensor:
    return sum((((a - b) ** 2).sum() for a, b in zip(real, syn, strict=True)), torch.zeros(()))


def l1(real: Sequence[Tensor], syn: Sequence[Tensor]) -> Tensor:
    return sum(((a - b).abs().sum() for a, b in zip(real, syn, strict=True)), torch.zeros(()))


DISTANCES = {"mse-conv": mse, "l1-conv": l1}


def decode(stored: Tensor, factor: int) -> Tensor:
    """Decode (n, C, H, W) to (factor^2 n, C, H, W): the upper left tile of every image, then the next to its right."""
    height, width = stored.shape[2] // factor, stored.shape[3] // factor
    tiles = []
    for i in range(factor):
        for j in range(factor):
            tile = stored[:, :, i * height : (i + 1) * height, j * width : (j + 1) * width]
            tiles.append(F.interpolate(tile, scale_factor=factor, mode="bilinear", align_corners=False))
    return torch.cat(tiles)


def idc(
    start: Sequence[Tensor],
    num_steps: int,
    *,
    factor: int,
    outer_loop: int,
    network: Callable[[int], nn.Module],
    statistics: Callable[[int], Tensor],
    real: Callable[[int, int], Tensor],
    chosen: Callable[[int, int, int], Tensor],
    augment: Callable[[int, int, Tensor], Tensor],
    student_batches: Callable[[int], Sequence[tuple[Tensor, Tensor]]],
    distance: str,
    lr: float,
    momentum: float,
    lr_student: float,
) -> Iterator[tuple[float, list[Tensor]]]:
    """Yield the loss of each step, and the stored images of every class at which its next gradient is computed.

    Args:
        start: initial stored images (ipc, C, H, W) of every class.
        network: returns a fresh student for a step.
        statistics: returns the images that set the running statistics of the student.
        real: returns the real images for a step and class.
        chosen: returns the indices of the decoded images to use, for a step, a class and the number of decoded images.
        augment: applies the siamese augmentation of a step and class.
        student_batches: returns the images and probabilities of the minibatches after a step.
    """
    images = [x.clone() for x in start]
    velocity = [torch.zeros_like(x) for x in images]
    student, weights, speed = nn.Module(), [nn.Parameter()], [torch.zeros(())]
    for step in range(num_steps):
        if step % outer_loop == 0:
            student = network(step)
            student.train()
            with torch.no_grad():
                student(statistics(step))
            weights = list(student.parameters())
            speed = [torch.zeros_like(w) for w in weights]
        student.eval()
        convolutions = [m.weight for m in student.modules() if isinstance(m, nn.Conv2d)]

        loss = 0.0
        for c in range(len(images)):
            batch = augment(step, c, real(step, c))
            real_grads = torch.autograd.grad(
                F.cross_entropy(student(batch), torch.full((len(batch),), c)), convolutions
            )
            leaf = images[c].requires_grad_()
            decoded = decode(leaf, factor)
            decoded = augment(step, c, decoded[chosen(step, c, len(decoded))])
            syn_loss = F.cross_entropy(student(decoded), torch.full((len(decoded),), c))
            syn_grads = torch.autograd.grad(syn_loss, convolutions, create_graph=True)
            value = DISTANCES[distance](real_grads, syn_grads)
            (grad,) = torch.autograd.grad(value, leaf)
            for k in range(len(images)):
                velocity[k] = momentum * velocity[k] + (grad if k == c else 0)
                images[k] = (images[k] - lr * velocity[k]).detach()
            loss += value.item()

        if step % outer_loop < outer_loop - 1:
            student.train()
            for x, y in student_batches(step):
                grads = torch.autograd.grad(-(y * student(x).log_softmax(1)).sum(1).mean(), weights)
                with torch.no_grad():
                    for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
                        speed[i] = 0.9 * speed[i] + g + 5e-4 * w
                        w.sub_(lr_student * speed[i])

        ahead = []
        for c, (x, v) in enumerate(zip(images, velocity, strict=True)):
            for _ in range(c):  # updates after the preceding classes of the next step
                v = momentum * v
                x = x - lr * v
            ahead.append(x)
        yield loss, ahead
