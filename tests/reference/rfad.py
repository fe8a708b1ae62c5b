"""Slow reference of RFAD: the kernel of each pair as a sum over networks and features."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from tests.reference.kip import one_hot_less_mean


class AdaBelief:
    """AdaBelief (Zhuang et al., 2020) for one tensor."""

    def __init__(self, x: Tensor, lr: float) -> None:
        self.lr, self.steps = lr, 0
        self.m, self.s = torch.zeros_like(x), torch.zeros_like(x)

    def step(self, x: Tensor, grad: Tensor) -> Tensor:
        self.steps += 1
        self.m = 0.9 * self.m + 0.1 * grad
        self.s = 0.999 * self.s + 0.001 * (grad - self.m) ** 2 + 1e-16
        m, s = self.m / (1 - 0.9**self.steps), self.s / (1 - 0.999**self.steps)
        return x - self.lr * m / (s.sqrt() + 1e-16)


def matrix(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Return the kernel (n, m) of features ``a`` (n, F) and ``b`` (m, F) of every network."""
    num_networks, size = len(a), a[0].shape[1]
    rows = []
    for i in range(len(a[0])):
        row = []
        for j in range(len(b[0])):
            inner = sum((phi_a[i] @ phi_b[j] for phi_a, phi_b in zip(a, b, strict=True)), torch.zeros(()))
            row.append(2 * inner / (num_networks * size) + 0.01)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def rfad(
    images: Tensor,
    y: Tensor,
    num_steps: int,
    *,
    real: Callable[[int], Sequence[tuple[Tensor, Tensor]]],
    networks: Callable[[int], Sequence[nn.Module]],
    objective: str,
    ridge: float,
    pixel_map: bool,
    learn_labels: bool,
    lr: float,
    lr_temperature: float,
    lr_pixel_map: float,
) -> Iterator[tuple[float, Tensor, Tensor, Tensor, Tensor]]:
    """Yield the loss, images, targets, log-scale k and pixel map after each step, in float64.

    Args:
        real: returns the batches of a step: real images and classes.
        networks: returns the networks of a step, which map images to features.
    """
    k, size = torch.zeros((), dtype=y.dtype), images[0].numel()
    m = torch.eye(size, dtype=y.dtype)
    steppers = [AdaBelief(images, lr), AdaBelief(y, lr), AdaBelief(k, lr_temperature), AdaBelief(m, lr_pixel_map)]
    moves = [True, learn_labels, objective == "platt", pixel_map]
    for step in range(num_steps):
        images, y, k, m = (t.detach().requires_grad_() for t in (images, y, k, m))
        seen = torch.stack([(image.reshape(-1) @ m).reshape(image.shape) for image in images])
        psi = networks(step)
        own = [network(seen) for network in psi]
        k_ss = matrix(own, own)
        ridged = k_ss + ridge * k_ss.trace() / len(k_ss) * torch.eye(len(k_ss), dtype=k_ss.dtype)
        losses = []
        for batch, classes in real(step):
            predicted = matrix([network(batch) for network in psi], own) @ torch.linalg.inv(ridged) @ y
            if objective == "mse":
                losses.append(((predicted - one_hot_less_mean(classes, y.shape[1])) ** 2).sum() / predicted.numel() / 2)
            else:
                scaled = math.e**k * predicted
                each = [torch.logsumexp(row, 0) - row[c] for row, c in zip(scaled, classes.tolist(), strict=True)]
                losses.append(sum(each[1:], each[0]) / len(each))
        loss = sum(losses[1:], losses[0]) / len(losses)
        grads = torch.autograd.grad(loss, [images, y, k, m], materialize_grads=True)
        images, y, k, m = (
            stepper.step(t.detach(), grad) if move else t.detach()
            for stepper, t, grad, move in zip(steppers, (images, y, k, m), grads, moves, strict=True)
        )
        yield loss.item(), images, y, k, m
