"""The one plain training loop: expert trajectories, students between matching steps and evaluation all use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from condense.augment import Augment
from condense.compute import Compute
from condense.data.images import Images
from condense.networks import Functional, Weights
from condense.rng import Rng


@dataclass(frozen=True, kw_only=True)
class Training:
    """What decides the result of an ordinary training, apart from data, initial weights and seed."""

    num_epochs: int = 300
    """Passes over the images."""
    batch_size: int = 256
    """Images a step; the last batch of an epoch may be smaller."""
    lr: float = 0.01
    """Learning rate of SGD."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """L2 penalty, added to the gradient."""
    decay_at: float | None = 0.5
    """Fraction of the epochs after which the learning rate drops once; None: never."""
    decay: float = 0.1
    """Factor of that drop; the momentum is kept."""
    loss: Literal["cross-entropy", "mse"] = "cross-entropy"
    """mse: half the squared distance to the targets, summed over classes, averaged over images."""

    def __post_init__(self) -> None:
        if self.num_epochs < 0 or self.batch_size < 1 or not self.lr > 0:
            raise ValueError(
                f"training needs num_epochs >= 0, batch_size >= 1 and lr > 0, got {self.num_epochs}, "
                f"{self.batch_size} and {self.lr}; correct these fields"
            )

    def lr_of(self, epoch: int) -> float:
        dropped = self.decay_at is not None and epoch >= self.decay_at * self.num_epochs
        return self.lr * (self.decay if dropped else 1.0)


def loss_of(logits: Tensor, targets: Tensor, kind: str = "cross-entropy") -> Tensor:
    """Mean loss over a batch. ``targets``: classes (N,) or, for soft labels, probabilities or values (N, C)."""
    if kind == "mse":
        if targets.dim() == 1:
            targets = F.one_hot(targets, logits.shape[1]).to(logits.dtype)
        return 0.5 * (logits - targets).square().sum(1).mean()
    return F.cross_entropy(logits, targets)


class Trainer:
    """Trains networks of one architecture; what it compiled is reused from one network to the next."""

    def __init__(self, network: Functional, training: Training, augment: Augment, compute: Compute) -> None:
        self.network, self.training, self.augment, self.compute = network, training, augment, compute

        def loss_fn(params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor, targets: Tensor) -> Tensor:
            logits = network.logits(params, buffers, images, train=True, update_buffers=True)
            return loss_of(logits.float(), targets, training.loss)

        self._loss = compute.first_order(loss_fn, network.device)

    def run(
        self,
        weights: Weights,
        images: Tensor | Images,
        targets: Tensor,
        rng: Rng,
        *,
        on_epoch: Callable[[int, Weights], None] | None = None,
    ) -> Weights:
        """Train a copy of ``weights`` on ``images`` (N, C, H, W) and ``targets`` (N,) or (N, C).

        Batch order and augmentation are keyed by ``rng``, epoch and batch. ``on_epoch(epochs_done, weights)``
        sees the live weights after each epoch: clone what you keep.
        """
        plan = self.training
        params = {name: p.detach().clone().requires_grad_() for name, p in weights.params.items()}
        buffers = {name: b.detach().clone() for name, b in weights.buffers.items()}
        live = Weights(params, buffers)
        optimiser = torch.optim.SGD(params.values(), lr=plan.lr, momentum=plan.momentum, weight_decay=plan.weight_decay)
        with rng.forked("layers"):  # dropout of foreign networks
            for epoch in range(plan.num_epochs):
                optimiser.param_groups[0]["lr"] = plan.lr_of(epoch)
                order = torch.randperm(len(images), generator=rng("order", epoch)).to(images.device)
                for batch, index in enumerate(order.split(plan.batch_size)):
                    x = images[index]
                    drawn = self.augment.sample(
                        rng("augment", epoch, batch), len(index), tuple(x.shape[1:]), siamese=False
                    )
                    x = self.compute.layout(self.augment.apply(x, drawn))
                    loss = self._loss(params, buffers, x, targets[index])
                    optimiser.zero_grad(set_to_none=True)
                    loss.backward()
                    optimiser.step()
                if on_epoch is not None:
                    on_epoch(epoch + 1, live)
        return Weights({k: p.detach() for k, p in params.items()}, buffers)


class Scorer:
    """Accuracy of networks of one architecture, as a fraction."""

    def __init__(self, network: Functional, compute: Compute, batch_size: int = 1000) -> None:
        self.batch_size, self.compute = batch_size, compute

        def correct(params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
            return (network.logits(params, buffers, images, train=False).argmax(1) == labels).sum()

        self._correct = compute.first_order(correct, network.device)

    @torch.no_grad()
    def accuracy(self, weights: Weights, images: Tensor | Images, labels: Tensor) -> float:
        hits = [
            self._correct(weights.params, weights.buffers, self.compute.layout(x), y)
            for x, y in zip(images.split(self.batch_size), labels.split(self.batch_size), strict=True)
        ]
        return float(torch.stack(hits).sum()) / len(labels)
