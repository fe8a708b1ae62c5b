"""Slow reference of FRePo: explicit regression, LAMB and Adam steps; random draws are arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference import optim


def predictions(phi_t: Tensor, phi_s: Tensor, y: Tensor, ridge: float) -> Tensor:
    k_ss, k_ts = phi_s @ phi_s.T, phi_t @ phi_s.T
    scale = k_ss.trace() / len(k_ss)
    return k_ts @ torch.linalg.solve(k_ss + ridge * scale * torch.eye(len(k_ss), dtype=k_ss.dtype), y)


def loss(
    phi_t: Tensor, phi_s: Tensor, y_s: Tensor, y_t: Tensor, ridge: float, copies: int, tau: Tensor | None
) -> Tensor:
    """Return the loss of the predictions minus the margin. ``phi_s`` and ``y_s`` are repeated for mirrored images; the
    margin counts each label once. With ``tau``, the loss is the cross-entropy of exp(tau) times the predictions."""
    predicted = predictions(phi_t, phi_s, y_s.repeat(copies, 1), ridge)
    if tau is None:
        regression = sum((row * row).sum() / 2 for row in predicted - y_t) / len(y_t)
    else:
        shares = [(tau.exp() * row).exp() / (tau.exp() * row).exp().sum() for row in predicted]
        regression = -sum(share[wanted.argmax()].log() for share, wanted in zip(shares, y_t, strict=True)) / len(y_t)
    margin = torch.zeros((), dtype=y_s.dtype)
    for label in y_s:
        first, second = label.sort(descending=True).values[:2]
        margin = margin + torch.minimum(first - second, torch.tensor(1 / len(label), dtype=y_s.dtype))
    return regression - margin / len(y_s)


def frepo(
    images: Tensor,
    labels: Tensor,
    num_steps: int,
    *,
    network: Callable[[int, int], nn.Module],
    used: Callable[[int], int],
    real: Callable[[int], tuple[Tensor, Tensor]],
    pool_size: int,
    max_age: int,
    ridge: float,
    lr: float,
    momentum: float,
    cosine_to: float,
    lr_pool: float,
    flips: bool,
    lr_temperature: float | None = None,
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Yield the loss, the images and the labels after each step.

    Args:
        network: returns a fresh network for the step that first uses it, and a slot of the pool.
        used: returns the slot that a step uses.
        real: returns the images and centred one-hot labels for a step.
    """
    ages = [slot * max_age // pool_size for slot in range(pool_size)]
    members = [network(0, slot) for slot in range(pool_size)]
    adams: list[Any] = [torch.optim.Adam(member.parameters(), lr=lr_pool) for member in members]
    memory: list[optim.Memory] = [{}, {}]
    tau = None if lr_temperature is None else torch.zeros((), dtype=images.dtype, requires_grad=True)
    adam_tau = None if tau is None else torch.optim.Adam([tau], lr=lr_temperature)
    for step in range(num_steps):
        slot = used(step)
        member = members[slot].eval()
        x, y = images.clone().requires_grad_(), labels.clone().requires_grad_()
        real_images, real_labels = real(step)
        mirrored = torch.cat([x, x.flip(3)]) if flips else x
        value = loss(
            member.embed(real_images).detach(), member.embed(mirrored), y, real_labels, ridge, 2 if flips else 1, tau
        )
        grads = torch.autograd.grad(value, (x, y), retain_graph=True)
        if adam_tau is not None:
            adam_tau.zero_grad()
            value.backward()
            adam_tau.step()
        rate = lr * (cosine_to + (1 - cosine_to) * (1 + math.cos(math.pi * step / num_steps)) / 2)
        images, labels = (
            optim.lamb(w.detach(), g, remembered, step + 1, rate, momentum)
            for w, g, remembered in zip((x, y), grads, memory, strict=True)
        )
        if ages[slot] > max_age:
            members[slot], ages[slot] = network(step + 1, slot), 0
            adams[slot] = torch.optim.Adam(members[slot].parameters(), lr=lr_pool)
        else:
            member.train()
            adams[slot].zero_grad()
            output = member(images)
            (sum(((f - t) ** 2).sum() / 2 for f, t in zip(output, labels, strict=True)) / len(labels)).backward()
            adams[slot].step()
            ages[slot] += 1
        yield value.item(), images, labels
