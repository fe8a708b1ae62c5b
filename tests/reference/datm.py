"""Slow reference of DATM: MTT with learned logits as soft labels; updates with a large loss are skipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.reference.mtt import Params, trimmed_ratio


def soft_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros((), dtype=logits.dtype)
    for f, target in zip(logits, y, strict=True):
        p = target.exp() / target.exp().sum()
        total = total - sum(p[c] * (f[c] - f.exp().sum().log()) for c in range(len(f)))
    return total / len(logits)


def datm(
    images: Tensor,
    labels: Tensor,
    num_steps: int,
    *,
    network: nn.Module,
    pairs: Callable[[int], tuple[Params, Params]],
    minibatches: Callable[[int], Sequence[tuple[Sequence[int], Callable[[Tensor], Tensor]]]],
    lr: float,
    lr_images: float,
    lr_labels: float,
    lr_log_lr: float,
    threshold: float,
    trim: float = 0.0,
) -> Iterator[tuple[float, Tensor, Tensor, float]]:
    """Yield the loss, the images, the logits and the learning rate of the student after each update."""
    leaves = [images.clone(), labels.clone(), torch.tensor(math.log(lr), dtype=images.dtype)]
    velocity = [torch.zeros_like(x) for x in leaves]
    for step in range(num_steps):
        x, y, log_lr = (leaf.detach().requires_grad_() for leaf in leaves)
        first, target = pairs(step)
        theta = {name: p.clone().requires_grad_() for name, p in first.items()}
        for index, treat in minibatches(step):
            batch = treat(torch.stack([x[i] for i in index]))
            loss = soft_cross_entropy(functional_call(network, theta, batch), torch.stack([y[i] for i in index]))
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta = {name: p - log_lr.exp() * g for (name, p), g in zip(theta.items(), grads, strict=True)}
        total = trimmed_ratio(theta, first, target, trim)
        if total.item() <= threshold:
            grads = torch.autograd.grad(total, (x, y, log_lr))
            for k, (rate, momentum) in enumerate([(lr_images, 0.5), (lr_labels, 0.9), (lr_log_lr, 0.5)]):
                velocity[k] = momentum * velocity[k] + grads[k]
                leaves[k] = (leaves[k] - rate * velocity[k]).detach()
        yield total.item(), leaves[0].clone(), leaves[1].clone(), math.exp(leaves[2].item())
