"""Slow reference of MTT: the student steps are unrolled by plain autograd; random draws are arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Params = dict[str, Tensor]


def trajectory_matching(
    start: Tensor,
    labels: Tensor,
    num_steps: int,
    *,
    network: nn.Module,
    pairs: Callable[[int], Sequence[tuple[Params, Params]]],
    minibatches: Callable[[int, int], Sequence[tuple[Sequence[int], Callable[[Tensor], Tensor]]]],
    lr: float,
    lr_images: float,
    lr_log_lr: float,
    momentum: float,
    trim: float = 0.0,
) -> Iterator[tuple[float, Tensor, float]]:
    """Yield the loss, the images and the learning rate of the student after each step.

    Args:
        start: initial images (n, C, H, W), with ``labels`` (n,).
        network: the architecture; its weights are not used.
        pairs: returns (theta*_t, theta*_{t+M}) for each trajectory of a step.
        minibatches: returns the minibatches of a step and trajectory: indices of images, and their augmentation.
    """
    images, log_lr = start.clone(), torch.tensor(math.log(lr), dtype=start.dtype)
    image_velocity, lr_velocity = torch.zeros_like(images), torch.zeros_like(log_lr)
    for step in range(num_steps):
        images.requires_grad_()
        log_lr.requires_grad_()
        losses = []
        for number, (first, target) in enumerate(pairs(step)):
            theta = {name: p.clone().requires_grad_() for name, p in first.items()}
            for index, treat in minibatches(step, number):
                batch = torch.stack([images[i] for i in index])
                classes = torch.stack([labels[i] for i in index])
                loss = F.cross_entropy(functional_call(network, theta, treat(batch)), classes)
                grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
                theta = {name: p - log_lr.exp() * g for (name, p), g in zip(theta.items(), grads, strict=True)}
            losses.append(trimmed_ratio(theta, first, target, trim))
        total = sum(losses) / torch.tensor(len(losses))
        image_grad, lr_grad = torch.autograd.grad(total, (images, log_lr))
        image_velocity = momentum * image_velocity + image_grad
        lr_velocity = momentum * lr_velocity + lr_grad
        images = (images - lr_images * image_velocity).detach()
        log_lr = (log_lr - lr_log_lr * lr_velocity).detach()
        yield total.item(), images.clone(), math.exp(log_lr.item())


def squared_distance(a: Params, b: Params) -> Tensor:
    return sum((((a[name] - b[name]) ** 2).sum() for name in a), torch.zeros(()))


def left_by(trim: float, theta: Params, target: Params) -> dict[str, list[int]]:
    """Return the entries of each parameter that a loss keeps without the fraction ``trim`` of smallest errors."""
    places = [(name, i) for name in theta for i in range(theta[name].numel())]
    errors = {name: ((theta[name] - target[name]) ** 2).flatten().tolist() for name in theta}
    ranked = sorted(places, key=lambda place: errors[place[0]][place[1]])
    kept = ranked[math.floor(trim * len(ranked)) :]
    return {name: [i for other, i in kept if other == name] for name in theta}


def trimmed_ratio(theta: Params, first: Params, target: Params, trim: float) -> Tensor:
    kept = left_by(trim, theta, target)
    theta, first, target = ({name: p.flatten()[kept[name]] for name, p in x.items()} for x in (theta, first, target))
    return squared_distance(theta, target) / squared_distance(first, target)
