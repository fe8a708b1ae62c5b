"""The algorithms as the papers' code runs them: the baseline of every ratio in docs/performance.md.

They use eager float32 modules, a data loader, Python loops over classes and one autograd graph for everything.
``tests/test_benchmarks.py`` checks that the engine computes the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

Params = dict[str, Tensor]


class ConvNet(nn.Module):
    """Blocks of 3x3 convolution, instance norm as GroupNorm(C, C), ReLU and 2x2 mean pooling, then a linear layer."""

    def __init__(self, input_shape: Sequence[int], num_classes: int, depth: int = 3, width: int = 128) -> None:
        super().__init__()
        channels, height, breadth = input_shape
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.GroupNorm(width, width),
                nn.ReLU(inplace=True),
                nn.AvgPool2d(2),
            ]
            channels, height, breadth = width, height // 2, breadth // 2
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * height * breadth, num_classes)

    def embed(self, x: Tensor) -> Tensor:
        return self.features(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.embed(x))


# Differentiable Siamese augmentation (Zhao and Bilen, ICML 2021): one operation per batch, drawn from the global
# generator, with parameters for each image, or (siamese) with the same parameters for all images.


def dsa(x: Tensor, strategy: str, siamese: bool = False, seed: int | None = None) -> Tensor:
    """Apply one random operation of the strategy to a batch. Equal seeds draw the same operation and parameters."""
    if not strategy:
        return x
    if seed is not None:
        torch.manual_seed(seed)
    operations = strategy.split("_")
    operation = operations[int(torch.randint(len(operations), ()))]
    return AUGMENTATIONS[operation](x, 1 if siamese else len(x))


def color(x: Tensor, rows: int) -> Tensor:
    x = x + (torch.rand(rows, 1, 1, 1, device=x.device) - 0.5)
    mean = x.mean(dim=1, keepdim=True)
    x = (x - mean) * (torch.rand(rows, 1, 1, 1, device=x.device) * 2) + mean
    mean = x.mean(dim=[1, 2, 3], keepdim=True)
    return (x - mean) * (torch.rand(rows, 1, 1, 1, device=x.device) + 0.5) + mean


def crop(x: Tensor, rows: int) -> Tensor:
    num, _, height, width = x.shape
    down, up = int(height * 0.125 + 0.5), int(width * 0.125 + 0.5)
    shift_y = torch.randint(-down, down + 1, (rows, 1, 1), device=x.device)
    shift_x = torch.randint(-up, up + 1, (rows, 1, 1), device=x.device)
    n, i, j = _indices(num, height, width, x.device)
    i = (i + shift_y + 1).clamp(0, height + 1)
    j = (j + shift_x + 1).clamp(0, width + 1)
    padded = F.pad(x, [1, 1, 1, 1]).permute(0, 2, 3, 1)
    return padded[n, i, j].permute(0, 3, 1, 2)


def cutout(x: Tensor, rows: int) -> Tensor:
    num, _, height, width = x.shape
    tall, wide = int(height * 0.5 + 0.5), int(width * 0.5 + 0.5)
    centre_y = torch.randint(0, height + 1 - tall % 2, (rows, 1, 1), device=x.device)
    centre_x = torch.randint(0, width + 1 - wide % 2, (rows, 1, 1), device=x.device)
    n, i, j = _indices(num, tall, wide, x.device)
    i = (i + centre_y - tall // 2).clamp(0, height - 1)
    j = (j + centre_x - wide // 2).clamp(0, width - 1)
    mask = torch.ones(num, height, width, dtype=x.dtype, device=x.device)
    mask[n, i, j] = 0
    return x * mask.unsqueeze(1)


def flip(x: Tensor, rows: int) -> Tensor:
    return torch.where(torch.rand(rows, 1, 1, 1, device=x.device) < 0.5, x.flip(3), x)


def scale(x: Tensor, rows: int) -> Tensor:
    sx, sy = (torch.rand(rows) * (1.2 - 1 / 1.2) + 1 / 1.2 for _ in range(2))
    return _warp(x, [[[sx[k % rows], 0, 0], [0, sy[k % rows], 0]] for k in range(len(x))])


def rotate(x: Tensor, rows: int) -> Tensor:
    angle = (torch.rand(rows) - 0.5) * 2 * 15 / 180 * torch.pi
    cos, sin = angle.cos(), angle.sin()
    return _warp(x, [[[cos[k % rows], -sin[k % rows], 0], [sin[k % rows], cos[k % rows], 0]] for k in range(len(x))])


def _indices(num: int, height: int, width: int, device: torch.device) -> tuple[Tensor, ...]:
    axes = (torch.arange(length, device=device) for length in (num, height, width))
    return torch.meshgrid(*axes, indexing="ij")


def _warp(x: Tensor, theta: list[list[list[Tensor | int]]]) -> Tensor:
    grid = F.affine_grid(torch.tensor(theta, dtype=x.dtype, device=x.device), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


AUGMENTATIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "color": color,
    "crop": crop,
    "cutout": cutout,
    "flip": flip,
    "scale": scale,
    "rotate": rotate,
}


def train(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    num_epochs: int,
    *,
    lr: float = 0.01,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    batch_size: int = 256,
    strategy: str = "",
) -> None:
    """Train a network; the defaults are those of an expert (Cazenavette et al., CVPR 2022)."""
    loader = DataLoader(TensorDataset(images, labels), batch_size=batch_size, shuffle=True)
    optimiser = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    net.train()
    for _ in range(num_epochs):
        total, hits = 0.0, 0
        for x, y in loader:
            logits = net(dsa(x, strategy))
            loss = F.cross_entropy(logits, y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item() * len(y)
            hits += int((logits.argmax(1) == y).sum())


def evaluate(net: nn.Module, images: Tensor, labels: Tensor, num_epochs: int, strategy: str) -> None:
    """Train a fresh network on a synthetic set. The learning rate drops after half of the epochs, with a new
    optimiser."""
    for lr, epochs in ((0.01, num_epochs // 2), (0.001, num_epochs - num_epochs // 2)):
        train(net, images, labels, epochs, lr=lr, momentum=0.9, weight_decay=5e-4, strategy=strategy)


def expert_buffer(
    fresh: Callable[[], nn.Module],
    images: Tensor,
    labels: Tensor,
    num_experts: int,
    num_epochs: int,
    path: Path,
    *,
    batch_size: int,
    strategy: str,
) -> None:
    """Train experts with a snapshot after every epoch; pickle all of them into one file at the end."""
    buffer = []
    for _ in range(num_experts):
        net = fresh()
        snapshots = [[p.detach().cpu().clone() for p in net.parameters()]]
        for _ in range(num_epochs):
            train(net, images, labels, 1, batch_size=batch_size, strategy=strategy)
            snapshots.append([p.detach().cpu().clone() for p in net.parameters()])
        buffer.append(snapshots)
    torch.save(buffer, path)


def mtt_loss(
    net: nn.Module,
    start: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    num_steps: int,
    strategy: str,
) -> Tensor:
    """Return the loss of trajectory matching (Cazenavette et al., CVPR 2022), with all student steps in one graph."""
    theta: Params = {name: p.clone().requires_grad_() for name, p in start.items()}
    for _ in range(num_steps):
        index = torch.randperm(len(images))
        x = dsa(images[index], strategy)
        loss = F.cross_entropy(functional_call(net, theta, (x,)), labels[index])
        grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        theta = {name: p - lr * g for (name, p), g in zip(theta.items(), grads, strict=True)}

    def distance(params: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([(params[name] - p).square().sum() for name, p in target.items()]).sum()

    return distance(theta) / distance(start)


def mtt_step(
    net: nn.Module,
    start: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    lr: Tensor,
    optimisers: Sequence[torch.optim.Optimizer],
    num_steps: int,
    strategy: str,
) -> None:
    """Update the images and the learning rate of the student once."""
    loss = mtt_loss(net, start, target, images, labels, lr, num_steps, strategy)
    for optimiser in optimisers:
        optimiser.zero_grad()
    loss.backward()
    for optimiser in optimisers:
        optimiser.step()
    loss.item()


def dc_loss(net: nn.Module, real: Tensor, syn: Tensor, label: int) -> Tensor:
    """Return the distance between the gradients of one class (Zhao, Mopuri and Bilen, ICLR 2021)."""
    params = list(net.parameters())

    def gradient(x: Tensor, create_graph: bool) -> tuple[Tensor, ...]:
        classes = torch.full((len(x),), label, device=x.device)
        return torch.autograd.grad(F.cross_entropy(net(x), classes), params, create_graph=create_graph)

    wanted = [g.detach().clone() for g in gradient(real, create_graph=False)]
    total = torch.zeros((), dtype=syn.dtype, device=syn.device)
    for a, b in zip(wanted, gradient(syn, create_graph=True), strict=True):
        if a.ndim > 1:
            a, b = a.flatten(1), b.flatten(1)
            total = total + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum()
    return total


def dc_step(
    net: nn.Module,
    real: Sequence[Tensor],
    syn: Tensor,
    optimiser: torch.optim.Optimizer,
    batch_real: int,
    strategy: str,
) -> None:
    """Update the images once (DSA: Zhao and Bilen, ICML 2021), by one backward pass through the losses of all classes.

    Args:
        real: the real images of every class.
        syn: (C * ipc, ...), grouped by class.
    """
    loss = torch.zeros((), device=syn.device)
    for label, (batch, images) in enumerate(_classes(real, syn, batch_real, strategy)):
        loss = loss + dc_loss(net, batch, images, label)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    loss.item()


def dm_loss(net: ConvNet, real: Tensor, syn: Tensor) -> Tensor:
    """Return the distance between the mean features of one class (Zhao and Bilen, WACV 2023)."""
    wanted = net.embed(real).detach()
    return (wanted.mean(0) - net.embed(syn).mean(0)).square().sum()


def dm_step(
    net: ConvNet,
    real: Sequence[Tensor],
    syn: Tensor,
    optimiser: torch.optim.Optimizer,
    batch_real: int,
    strategy: str,
) -> None:
    """Update the images once; the arguments are those of ``dc_step``."""
    net.requires_grad_(False)
    loss = torch.zeros((), device=syn.device)
    for batch, images in _classes(real, syn, batch_real, strategy):
        loss = loss + dm_loss(net, batch, images)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    loss.item()


def _classes(real: Sequence[Tensor], syn: Tensor, batch_real: int, strategy: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield real and synthetic images of each class, both under the same draw of the augmentation."""
    for members, images in zip(real, syn.chunk(len(real)), strict=True):
        batch = members[torch.randperm(len(members))[:batch_real]]
        seed = random.randrange(100_000)
        yield dsa(batch, strategy, siamese=True, seed=seed), dsa(images, strategy, siamese=True, seed=seed)
