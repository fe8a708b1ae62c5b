"""Slow reference of TESLA: its two published passes, with the correct factor of two."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tests.reference.mtt import Params, left_by


def tesla(
    images: Tensor,
    labels: Tensor,
    num_steps: int,
    *,
    network: nn.Module,
    pairs: Callable[[int], tuple[Params, Params]],
    minibatches: Callable[[int], Sequence[tuple[Sequence[int], Callable[[Tensor], Tensor]]]],
    lr: float,
    lr_images: float,
    lr_log_lr: float,
    momentum: float = 0.5,
    trim: float = 0.0,
) -> Iterator[tuple[float, Tensor, float]]:
    """Yield the loss, the images and the learning rate of the student after each update; arguments as for MTT."""
    log_lr = math.log(lr)
    image_velocity, lr_velocity = torch.zeros_like(images), 0.0
    for step in range(num_steps):
        alpha = math.exp(log_lr)
        first, target = pairs(step)
        batches = minibatches(step)

        def gradients(theta: Params, x: Tensor, number: int, create_graph: bool = False) -> Params:
            index, treat = batches[number]  # noqa: B023
            loss = F.cross_entropy(functional_call(network, theta, treat(x[list(index)])), labels[list(index)])
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=create_graph)
            return dict(zip(theta, grads, strict=True))

        # first pass: store the weights of every step, and sum all gradients
        theta = {name: p.clone() for name, p in first.items()}
        visited, total = [], {name: torch.zeros_like(p) for name, p in first.items()}
        for number in range(len(batches)):
            theta = {name: p.detach().requires_grad_() for name, p in theta.items()}
            visited.append(theta)
            grads = gradients(theta, images, number)
            total = {name: total[name] + grads[name] for name in total}
            theta = {name: p - alpha * grads[name] for name, p in theta.items()}
        end = {name: first[name] - alpha * total[name] for name in first}
        kept = left_by(trim, end, target)
        chosen = {
            name: torch.tensor([float(i in kept[name]) for i in range(p.numel())]).view_as(p) for name, p in end.items()
        }
        offset = {name: chosen[name] * (end[name] - target[name]) for name in end}
        scale = sum((chosen[name] * (first[name] - target[name]) ** 2).sum() for name in end)
        loss = sum((offset[name] ** 2).sum() for name in end) / scale

        # second pass: differentiate |theta_0 - alpha sum g - theta*|^2 through one g at a time, with constant weights
        image_grad = torch.zeros_like(images)
        direction = {
            name: chosen[name] * (alpha * (target[name] - first[name]) + alpha**2 * total[name]) for name in first
        }
        for number, theta in enumerate(visited):
            x = images.clone().requires_grad_()
            grads = gradients(theta, x, number, create_graph=True)
            product = torch.stack([(grads[name] * direction[name]).sum() for name in grads]).sum()
            image_grad += 2 / scale * torch.autograd.grad(product, x)[0]
        into_alpha = -2 / scale * torch.stack([(offset[name] * total[name]).sum() for name in total]).sum()

        image_velocity = momentum * image_velocity + image_grad
        lr_velocity = momentum * lr_velocity + into_alpha.item() * alpha
        images = images - lr_images * image_velocity
        log_lr = log_lr - lr_log_lr * lr_velocity
        yield loss.item(), images.clone(), math.exp(log_lr)
