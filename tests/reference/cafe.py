"""Slow reference of CAFE: explicit sums, students trained by plain SGD; random draws are arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from condense.networks import Network

Treatment = Callable[[Tensor], Tensor]


def levels(network: Network, images: Tensor) -> list[Tensor]:
    """Return the outputs f_1 to f_L of the ReLUs of a ConvNet, the last pooled map, and that map flattened."""
    blocks, maps, x = network.get_submodule("features"), [], images
    for block in blocks.children():
        x = block(x)
        if isinstance(block, nn.ReLU):
            maps.append(x)
    return [*maps, x, x.flatten(1)]


def cafe_loss(
    real: Sequence[Sequence[Tensor]], syn: Sequence[Sequence[Tensor]], weights: Sequence[float], beta: float
) -> Tensor:
    """Return the sum of the alignment loss, with one weight per level, and ``beta`` times the discrimination loss."""
    loss = torch.zeros((), dtype=syn[0][0].dtype)
    for a, b in zip(real, syn, strict=True):
        for weight, r, s in zip(weights, a, b, strict=True):
            loss = loss + weight * ((r.mean(0) - s.mean(0)) ** 2).sum()
    centres = [b[-1].mean(0) for b in syn]
    for c, a in enumerate(real):
        for features in a[-1]:
            logits = torch.stack([features @ centre for centre in centres])
            loss = loss + beta * (logits.exp().sum().log() - logits[c])
    return loss


def cafe(
    start: Sequence[Tensor],
    num_steps: int,
    *,
    network: Callable[[int], Network],
    real: Callable[[int, int], Tensor],
    augment: Callable[[int, int, Tensor], Tensor],
    probe: Callable[[int, int, int], Tensor],
    batches: Callable[[int, int], Sequence[tuple[Tensor, Treatment]]],
    mixed: bool,
    weights: Sequence[float],
    beta: float,
    window: int,
    moved: float,
    settled: float,
    max_epochs: int,
    max_updates: int,
    lr: float,
    halve_at: Sequence[float],
    momentum: float,
    lr_student: float,
) -> Iterator[tuple[float, list[Tensor], int]]:
    """Yield after each step the loss, the images by class, and the number of epochs of the student.

    The number of epochs is -1 if the student was replaced.

    Args:
        start: initial images (ipc, C, H, W) of every class.
        network: returns a fresh student for a step.
        real: returns the real images for a step and class.
        augment: applies the siamese augmentation of a step and class.
        probe: returns the images on which the student is measured, for a step, the epochs since that step, and a class.
        batches: returns the minibatches of a step and epoch: indices of images, and their augmentation.
        mixed: whether one forward pass covers all classes.
        weights: weights of the levels.
    """
    images = [x.clone() for x in start]
    velocity = [torch.zeros_like(x) for x in images]
    classes = range(len(images))
    student, accuracies, updates = network(0), [0.0][:0], 0

    def measure(step: int, epochs: int) -> float:
        student.eval()
        right = total = 0
        for c in classes:
            for image in probe(step, epochs, c):
                right += int(student(image[None]).argmax() == c)
                total += 1
        return right / total

    for step in range(num_steps):
        frozen = {name: buffer.clone() for name, buffer in student.named_buffers()}
        student.train()
        leaves = [x.requires_grad_() for x in images]
        real_images = [augment(step, c, real(step, c)) for c in classes]
        syn_images = [augment(step, c, x) for c, x in enumerate(leaves)]
        loss = cafe_loss(by_class(student, real_images, mixed), by_class(student, syn_images, mixed), weights, beta)
        grads = torch.autograd.grad(loss, leaves)
        student.load_state_dict(frozen, strict=False)
        rate = lr
        for at in halve_at:
            if step >= at * num_steps:
                rate = rate / 2
        velocity = [momentum * v + g for v, g in zip(velocity, grads, strict=True)]
        images = [x.detach() - rate * v for x, v in zip(leaves, velocity, strict=True)]

        accuracies.append(measure(step, 0))
        updates += 1
        recent = accuracies[-window:]
        if updates == max_updates or (len(recent) == window and max(recent) - min(recent) < settled):
            student, accuracies, updates = network(step + 1), [], 0
            yield loss.item(), [x.clone() for x in images], -1
            continue
        inner, epochs = [0.0][:0], 0
        while epochs < max_epochs:
            epochs += 1
            train_epoch(student, torch.cat(images), len(images[0]), batches(step, epochs), lr_student)
            inner.append(measure(step, epochs))
            recent = inner[-window:]
            if len(recent) == window and max(recent) - min(recent) > moved:
                break
        yield loss.item(), [x.clone() for x in images], epochs


def by_class(student: Network, groups: Sequence[Tensor], mixed: bool) -> list[list[Tensor]]:
    if not mixed:
        return [levels(student, images) for images in groups]
    levels_by_class, begin = [], 0
    everything = levels(student, torch.cat(list(groups)))
    for images in groups:
        levels_by_class.append([level[begin : begin + len(images)] for level in everything])
        begin += len(images)
    return levels_by_class


def train_epoch(
    student: Network, images: Tensor, ipc: int, batches: Sequence[tuple[Tensor, Treatment]], lr: float
) -> None:
    student.train()
    for index, treat in batches:
        loss = nn.functional.cross_entropy(student(treat(images[index])), index // ipc)
        params = list(student.parameters())
        grads = torch.autograd.grad(loss, params)
        with torch.no_grad():
            for param, grad in zip(params, grads, strict=True):
                param -= lr * grad
