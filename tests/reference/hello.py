"""Slow reference of the projector of HeLlO for an encoder of one convolution: matrices are changed row by row, and the
mean of several teachers, the loss and the start of the head are sums over images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference.optim import Memory, adam


@dataclass
class Encoder:
    """3 x 3 convolution, BatchNorm, ReLU, average pooling of 2 x 2, flattened."""

    weight: Tensor
    bias: Tensor
    scale: Tensor
    shift: Tensor
    mean: Tensor
    var: Tensor

    def __call__(self, images: Tensor, weight: Tensor, train: bool) -> Tensor:
        maps = F.conv2d(images, weight, self.bias, padding=1)
        mean, var = self.mean, self.var
        if train:
            mean, var = maps.mean((0, 2, 3)), maps.var((0, 2, 3), unbiased=False)
            count = maps.numel() // maps.shape[1]
            self.mean = 0.9 * self.mean + 0.1 * mean.detach()
            self.var = 0.9 * self.var + 0.1 * var.detach() * count / (count - 1)
        normal = (maps - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        maps = (normal * self.scale[:, None, None] + self.shift[:, None, None]).clamp(min=0)
        return F.avg_pool2d(maps, 2).flatten(1)


def changed(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """W + B A, where row i of B A is the sum over k of B[i, k] times row k of A."""
    rows = []
    for i in range(len(weight)):
        row = weight[i].flatten()
        for k in range(len(a)):
            row = row + b[i, k] * a[k]
        rows.append(row.reshape(weight[i].shape))
    return torch.stack(rows)


def projector(encoder: Encoder, head: Tensor, changes: Sequence[Tensor], images: Tensor, train: bool) -> Tensor:
    """W E(x), with changes (A, B) of the convolution and (A, B) of the head."""
    a, b, head_a, head_b = changes
    features, w = encoder(images, changed(encoder.weight, a, b), train), changed(head, head_a, head_b)
    return torch.stack([torch.stack([(w[c] * x).sum() for c in range(len(w))]) for x in features])


def class_means(encoder: Encoder, images: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Row c is the mean of E(x) / |E(x)| over the images of class c."""
    rows = []
    for c in range(num_classes):
        features = [encoder(x[None], encoder.weight, train=False)[0] for x in images[labels == c]]
        rows.append(sum(x / math.sqrt(float((x * x).sum())) for x in features) / len(features))
    return torch.stack([torch.as_tensor(row) for row in rows])


def loss(outputs: Tensor, teachers: Sequence[Tensor], labels: Tensor, class_weight: float) -> Tensor:
    """Half the squared distance to the mean logits of the teachers, plus class_weight times the cross-entropy."""
    total = torch.zeros(())
    for i, output in enumerate(outputs):
        mean = sum(logits[i] for logits in teachers) / len(teachers)
        cross_entropy = -(output.exp() / output.exp().sum()).log()[labels[i]]
        total = total + ((output - mean) ** 2).sum() / 2 + class_weight * cross_entropy
    return total / len(outputs)


def train(
    encoder: Encoder,
    head: Tensor,
    changes: list[Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
    teachers: Sequence[Callable[[Tensor], Tensor]],
    class_weight: float,
    lr: float,
) -> Iterator[list[Tensor]]:
    """Yield the changes after each step of AdamW without weight decay, under a rate that falls as a cosine."""
    memories: list[Memory] = [{} for _ in changes]
    for step, (images, labels) in enumerate(batches):
        leaves = [change.clone().requires_grad_() for change in changes]
        outputs = projector(encoder, head, leaves, images, train=True)
        with torch.no_grad():
            answers = [teacher(images) for teacher in teachers]
        gradients = torch.autograd.grad(loss(outputs, answers, labels, class_weight), leaves)
        rate = lr * (1 + math.cos(math.pi * step / len(batches))) / 2
        changes = [
            adam(w.detach(), g, memory, step + 1, rate, 0.9)
            for w, g, memory in zip(leaves, gradients, memories, strict=True)
        ]
        yield changes
