"""Slow reference of SRe2L: a plain loop with hooks on the BatchNorm layers of a module; draws are arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

Views = Callable[[int, Tensor], Tensor]
"""(step of the run, image (1, C, H, W)) -> its view."""


def recover(
    chunks: Sequence[tuple[Tensor, Tensor]],
    num_steps: int,
    *,
    teachers: Sequence[nn.Module],
    view: Views,
    wanted: Callable[[int, int], Mapping[str, tuple[Tensor, Tensor]] | None],
    weight_bn: float,
    first_bn: float,
    lr: float,
    betas: tuple[float, float],
    low: Tensor,
    high: Tensor,
) -> Iterator[tuple[float, Tensor]]:
    """Yield the loss and the images of the current chunk after each step.

    Args:
        chunks: initial images (n, C, H, W) and classes (n,) of each chunk.
        num_steps: the number of steps for each chunk.
        teachers: trained networks, used in turn.
        wanted: mean and variance of each BatchNorm layer by name, for a chunk and a teacher; None: the running ones.
        low, high: the images (C, 1, 1) of black and white.
    """
    total = 0
    for number, (start, classes) in enumerate(chunks):
        images, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
        for step in range(num_steps):
            turn = total % len(teachers)
            leaf = images.requires_grad_()
            views = torch.cat([view(total, image[None]) for image in leaf])
            loss = inversion_loss(teachers[turn], views, classes, wanted(number, turn), weight_bn, first_bn)
            (gradient,) = torch.autograd.grad(loss, leaf)
            mean = betas[0] * mean + (1 - betas[0]) * gradient
            square = betas[1] * square + (1 - betas[1]) * gradient**2
            first, second = mean / (1 - betas[0] ** (step + 1)), square / (1 - betas[1] ** (step + 1))
            rate = lr * (1 + math.cos(math.pi * step / num_steps)) / 2
            images = (leaf.detach() - rate * first / (second.sqrt() + 1e-8)).clamp(low, high)
            total += 1
            yield loss.item(), images.clone()


def inversion_loss(
    teacher: nn.Module,
    images: Tensor,
    classes: Tensor,
    wanted: Mapping[str, tuple[Tensor, Tensor]] | None,
    weight_bn: float,
    first_bn: float,
) -> Tensor:
    """Cross-entropy, and the distances of the statistics of each layer to the wanted ones."""
    teacher.eval()
    logits, inputs = with_inputs(teacher, images)
    loss = -sum(row.log_softmax(0)[c] for row, c in zip(logits, classes.tolist(), strict=True)) / len(images)
    for k, (name, x) in enumerate(inputs.items()):
        layer = teacher.get_submodule(name)
        mean, var = (layer.running_mean, layer.running_var) if wanted is None else wanted[name]
        weight = weight_bn * (first_bn if k == 0 else 1.0)
        of_batch, spread = statistics(x)
        loss = loss + weight * (((of_batch - mean) ** 2).sum().sqrt() + ((spread - var) ** 2).sum().sqrt())
    assert isinstance(loss, Tensor)
    return loss


def with_inputs(teacher: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and the inputs of the BatchNorm layers by name."""
    inputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, x, name=name: inputs.update({name: x[0]}))
        for name, module in teacher.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    logits = teacher(images)
    for hook in hooks:
        hook.remove()
    return logits, inputs


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel, value by value."""
    values = x.transpose(0, 1).flatten(1)
    mean = values.sum(1) / values.shape[1]
    return mean, ((values - mean[:, None]) ** 2).sum(1) / values.shape[1]
