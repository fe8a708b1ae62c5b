"""Slow reference of linear gradient matching: double back-propagation and explicit Adam steps; draws are arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rendered(levels: Sequence[Tensor], size: tuple[int, int], mean: float, std: float) -> Tensor:
    """Return the standardised grey images of a pyramid of levels (n, 1, h, w)."""
    total = sum(F.interpolate(level, size, mode="bilinear", align_corners=False) for level in levels)
    return (1 / (1 + torch.exp(-2 * total)) - mean) / std  # type: ignore[operator]


def distance(phi: nn.Module, weight: Tensor, real: tuple[Tensor, Tensor], syn: tuple[Tensor, Tensor]) -> Tensor:
    """Return one minus the cosine of the gradients of a linear classifier on the features of two batches."""
    gradients = []
    for images, classes in (real, syn):
        classifier = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
        with torch.no_grad():
            classifier.weight.copy_(weight)
            classifier.bias.zero_()
        loss = F.cross_entropy(classifier(phi.embed(images)), classes)  # type: ignore[operator]
        parts = torch.autograd.grad(loss, [classifier.weight, classifier.bias], create_graph=True)
        gradients.append(torch.cat([part.flatten() for part in parts]))
    a, b = gradients[0].detach(), gradients[1]
    return 1 - (a @ b) / (a.norm() * b.norm())


def linear_gradient(
    num_steps: int,
    phi: nn.Module,
    sizes: Sequence[tuple[int, int]],
    classes: Tensor,
    *,
    noise: Callable[[int, int], Tensor],
    head: Callable[[int], Tensor],
    real: Callable[[int], tuple[Tensor, Tensor]],
    view: Callable[[int, Tensor], Tensor],
    num_views: int,
    grow_every: int,
    lr: float,
    mean: float,
    std: float,
) -> Iterator[tuple[float, Tensor]]:
    """Yield the loss of each step and the images after it.

    Args:
        phi: the backbone, in evaluation mode.
        sizes: the height and width of each level, the smallest first.
        classes: (n,).
        noise: returns the noise (n, 1, h, w) with which a level begins before a step.
        head: returns the weights of the classifier of a step.
        real: returns the augmented real images of a step and their classes.
        view: returns the augmented images of a step.
        mean, std: the statistics by which images are standardised.
    """
    levels = [noise(0, 0)]
    moments = [(torch.zeros_like(levels[0]), torch.zeros_like(levels[0]))]
    age = 0
    for step in range(num_steps):
        if step and step % grow_every == 0 and len(levels) < len(sizes):
            count = len(levels)
            levels = [level * count / (count + 1) for level in levels]
            levels.append(noise(count, step) / (count + 1))
            moments = [(torch.zeros_like(level), torch.zeros_like(level)) for level in levels]
            age = 0
        leaves = [level.clone().requires_grad_() for level in levels]
        images = rendered(leaves, sizes[-1], mean, std)
        views = view(step, torch.cat([images] * num_views))
        value = distance(phi, head(step), real(step), (views, torch.cat([classes] * num_views)))
        age += 1
        for k, grad in enumerate(torch.autograd.grad(value, leaves)):
            first, second = moments[k]
            first.mul_(0.9).add_(0.1 * grad)
            second.mul_(0.999).add_(0.001 * grad * grad)
            levels[k] = levels[k] - lr * (first / (1 - 0.9**age)) / ((second / (1 - 0.999**age)).sqrt() + 1e-8)
        yield value.item(), rendered(levels, sizes[-1], mean, std)
