"""Slow reference of NCFM with an update of all classes at once: characteristic functions are computed in complex
numbers, one frequency after the other. Random draws are arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from condense.networks import Network
from tests.reference.idc import decode
from tests.reference.tgdd import cross_entropy


def directions(network: Network, images: Tensor) -> list[Tensor]:
    features = [network.embed(image[None])[0] for image in images]
    return [f / (f * f).sum().sqrt() for f in features]


def characteristic(features: Sequence[Tensor], frequency: Tensor) -> Tensor:
    return torch.stack([torch.exp(1j * (frequency * f).sum()) for f in features]).mean()


def distance(
    real: Sequence[Tensor], syn: Sequence[Tensor], frequencies: Tensor, amplitude: float, phase: float
) -> Tensor:
    total = torch.zeros(())
    for t in frequencies:
        a, b = characteristic(real, t), characteristic(syn, t)
        apart = 2 * a.abs() * b.abs() * (1 - torch.cos(a.angle() - b.angle()))
        total = total + (amplitude * (a.abs() - b.abs()) ** 2 + phase * apart.clamp(min=1e-12)).sqrt()
    return total / len(frequencies)


def frequency_network(width: int, layers: Tensor) -> nn.Sequential:
    """Return psi as modules, with the weights, gains and shifts of ``layers`` (3, F + 2, F)."""
    activations = (nn.LeakyReLU(0.2), nn.LeakyReLU(0.2), nn.Tanh())
    modules: list[nn.Module] = []
    for layer, activation in zip(layers, activations, strict=True):
        linear, norm = nn.Linear(width, width, bias=False), nn.BatchNorm1d(width)
        linear.weight.data, norm.weight.data, norm.bias.data = layer[:width], layer[width], layer[width + 1]
        modules += [linear, norm, activation]
    return nn.Sequential(*modules).train()


def ncfm(
    start: Sequence[Tensor],
    num_iterations: int,
    *,
    factor: int,
    networks: Callable[[int], tuple[Network, Network]],
    real: Callable[[int, int], Tensor],
    augment: Callable[[int, int, Tensor], Tensor],
    noise: Callable[[int], Tensor],
    psi: nn.Sequential | None,
    amplitude: float,
    phase: float,
    calibration: float,
    lr: float,
    momentum: float,
    lr_psi: float,
) -> Iterator[tuple[float, list[Tensor]]]:
    """Yield the loss and the stored images of every class after each step: matching, calibration, matching, ...

    Args:
        start: initial stored images (ipc, C, H, W) of every class.
        networks: returns the matched network of an iteration and the trained one.
        real: returns the real images for a step and class.
        augment: applies the siamese augmentation of a step and class.
        noise: returns Gaussian frequencies for a step, or the input of psi.
        psi: the network of the frequencies, which is trained in place; None: the frequencies are the noise.
    """
    images = [x.clone() for x in start]
    velocity = [torch.zeros_like(x) for x in images]

    def update(loss: Tensor, leaves: Sequence[Tensor]) -> None:
        for c, gradient in enumerate(torch.autograd.grad(loss, leaves, retain_graph=True)):
            velocity[c] = momentum * velocity[c] + gradient
            images[c] = (images[c] - lr * velocity[c]).detach()

    for iteration in range(num_iterations):
        matched, trained = networks(iteration)
        step = 2 * iteration
        leaves = [x.requires_grad_() for x in images]
        frequencies = noise(step) if psi is None else psi(noise(step))
        loss = torch.zeros(())
        for c, leaf in enumerate(leaves):
            wanted = [f.detach() for f in directions(matched, augment(step, c, real(step, c)))]
            found = directions(matched, augment(step, c, decode(leaf, factor)))
            loss = loss + 300 * distance(wanted, found, frequencies, amplitude, phase)
        update(loss, leaves)
        if psi is not None:
            gradients = torch.autograd.grad(loss, list(psi.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(psi.parameters(), gradients, strict=True):
                    parameter.add_(lr_psi * gradient)
        yield loss.item(), [x.clone() for x in images]

        step = 2 * iteration + 1
        leaves = [x.requires_grad_() for x in images]
        loss = torch.zeros(())
        for c, leaf in enumerate(leaves):
            loss = loss + calibration * cross_entropy(trained, augment(step, c, decode(leaf, factor)), c)
        update(loss, leaves)
        yield loss.item(), [x.clone() for x in images]
