"""Slow reference of SelMatch: the window of a class, and trajectory matching that learns some of the images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tests.reference.mtt import Params, squared_distance


def window(difficulty: Sequence[float], num: int, alpha: float, beta: float) -> tuple[list[int], list[int]]:
    """Return the images of a class that stay real and those that are learned, each from the hardest to the easiest."""
    ranked = sorted(range(len(difficulty)), key=lambda i: (-difficulty[i], i))
    skipped, learned = int(beta * num), int(alpha * num)
    inside = ranked[skipped : skipped + num]
    return inside[: num - learned], inside[num - learned :]


def selmatch(
    fixed: dict[int, Tensor],
    learned: dict[int, Tensor],
    labels: Tensor,
    num_steps: int,
    *,
    network: nn.Module,
    pairs: Callable[[int], tuple[Params, Params]],
    minibatches: Callable[[int], Sequence[tuple[Sequence[int], Callable[[Tensor], Tensor]]]],
    lr: float,
    lr_images: float,
    lr_log_lr: float,
    momentum: float,
) -> Iterator[tuple[float, list[Tensor], float]]:
    """Yield the loss, all images in their order, and the learning rate of the student after each update.

    Args:
        fixed, learned: the images (C, H, W) by their positions in the set.
    """
    leaves = [*(learned[i].clone() for i in sorted(learned)), torch.tensor(math.log(lr), dtype=torch.float64)]
    velocity = [torch.zeros_like(leaf) for leaf in leaves]
    for step in range(num_steps):
        *images, log_lr = (leaf.detach().requires_grad_() for leaf in leaves)
        everything = fixed | dict(zip(sorted(learned), images, strict=True))
        first, target = pairs(step)
        theta = {name: p.clone().requires_grad_() for name, p in first.items()}
        for index, treat in minibatches(step):
            batch = treat(torch.stack([everything[i] for i in index]))
            loss = F.cross_entropy(functional_call(network, theta, batch), labels[list(index)])
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta = {name: p - log_lr.exp() * g for (name, p), g in zip(theta.items(), grads, strict=True)}
        total = squared_distance(theta, target) / squared_distance(first, target)
        for k, grad in enumerate(torch.autograd.grad(total, [*images, log_lr])):
            velocity[k] = momentum * velocity[k] + grad
            rate = lr_log_lr if k == len(images) else lr_images
            leaves[k] = (leaves[k] - rate * velocity[k]).detach()
        everything |= dict(zip(sorted(learned), leaves, strict=False))
        yield total.item(), [everything[i] for i in sorted(everything)], math.exp(leaves[-1].item())
