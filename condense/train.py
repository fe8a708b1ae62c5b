"""The one plain training loop: expert trajectories, students between matching steps and evaluation all use it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from condense.augment import Augment
from condense.compute import Compute
from condense.data.images import Images
from condense.names import spelt
from condense.networks import Functional, Weights
from condense.objective import KL, OBJECTIVES, CrossEntropy, Objective, ObjectiveName, one_hot
from condense.rng import Rng
from condense.schema import Checked

Tensors = dict[str, Tensor]
BatchLoss = Callable[[bool], Tensor]
"""The loss of a batch at the weights as they are; whether running statistics are updated."""


@dataclass(frozen=True, kw_only=True)
class Training(Checked):
    """What decides the result of an ordinary training, apart from data, initial weights and seed."""

    num_epochs: int = 300
    """Passes over the images."""
    batch_size: int = 256
    """Images a step; the last batch of an epoch may be smaller."""
    lr: float = 0.01
    """Learning rate."""
    momentum: float = 0.9
    """Momentum of sgd; first beta of the others."""
    weight_decay: float = 5e-4
    """L2 penalty, added to the gradient; of adamw, taken from the weights."""
    decay_at: float | tuple[float, ...] | None = 0.5
    """Fraction of the epochs after which the learning rate drops, or several; None: never."""
    decay: float = 0.1
    """Factor of a drop; the momentum is kept."""
    loss: ObjectiveName = "cross-entropy"
    """mse: half the squared distance to the targets, summed over their width, averaged over images. kl: the divergence
    of the softmax at ``temperature`` from the targets. cosine: one minus the cosine of outputs and targets."""
    optimiser: Literal["sgd", "adam", "adamw"] = "sgd"
    """sgd, adam or adamw."""
    warmup_steps: int = 0
    """Steps in which the learning rate first rises from nothing, linearly."""
    cosine_to: float | None = None
    """Share of lr at the end of a half wave of a cosine, in place of drops; None: no cosine."""
    cosine_span: float = 1.0
    """How much of that half wave the training goes through."""
    rates: tuple[float, ...] = ()
    """A learning rate for every step, in place of lr and all schedules."""
    order: Literal["shuffled", "stored"] = "shuffled"
    """shuffled: a new order in each epoch. stored: the batches are pieces of the set as it is, in their order."""
    cutmix: float = 0.0
    """Probability that a batch is mixed: of each image a rectangle is that of another, and its label in proportion
    (Yun et al. 2019, beta 1)."""
    mixup: float = 0.0
    """Alpha of the beta distribution by which pairs of images and labels are blended (Zhang et al. 2018); 0: none."""
    label_smoothing: float = 0.0
    """Share of a target that goes to all classes evenly, under cross-entropy."""
    temperature: float = 1.0
    """What logits are divided by under kl, those of a teacher too."""
    rho: float = 0.0
    """How far adaptive GSAM goes uphill for its gradient, see ``sharpness_aware``; 0: plain gradients."""
    alpha: float = 0.0
    """How much GSAM counts the part of the plain gradient that lies across that one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_epochs < 0 or self.batch_size < 1 or not 0 < self.lr < math.inf:
            raise ValueError(
                f"training needs num_epochs >= 0, batch_size >= 1 and a finite lr > 0, got {self.num_epochs}, "
                f"{self.batch_size} and {self.lr}; correct these fields"
            )
        if not 0 <= self.momentum < 1 or not self.weight_decay >= 0:
            raise ValueError(
                f"training needs 0 <= momentum < 1 and weight_decay >= 0, got {self.momentum} and {self.weight_decay}; "
                "usual values are 0.9 and 0.0005"
            )
        for name, usual in {"cutmix": 0.5, "label_smoothing": 0.1}.items():
            if not 0 <= getattr(self, name) <= 1:
                value = getattr(self, name)
                raise ValueError(f"training needs a {name} between 0 and 1, got {value}; a usual value is {usual}")
        if self.mixup < 0 or not self.temperature > 0:
            raise ValueError(
                f"training needs mixup >= 0 and temperature > 0, got {self.mixup} and {self.temperature}; "
                "usual values are 0.2 and 20"
            )
        if self.rho < 0 or (self.alpha and not self.rho):
            raise ValueError(
                f"training needs rho >= 0, and rho > 0 where alpha is given, got {self.rho} and {self.alpha}; "
                "the values of FTD's experts are 0.01 and 0.4"
            )

    def content(self) -> dict[str, Any]:
        """The fields, for hashes and files. Those that came after the first results were written stay out of it while
        they have their default, or those results would lose their companions."""
        values = dataclasses.asdict(self)
        return {
            f.name: values[f.name]
            for f in dataclasses.fields(self)
            if f.name in _FIRST_FIELDS or values[f.name] != f.default
        }

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, counted from 0 through all epochs."""
        if self.rates:
            return self.rates[min(step, len(self.rates) - 1)]
        if step < self.warmup_steps:
            return self.lr * step / self.warmup_steps
        if self.cosine_to is not None:
            done = (step - self.warmup_steps) / max(self.num_epochs * steps_per_epoch - self.warmup_steps, 1)
            return self.lr * cosine(self.cosine_to, done * self.cosine_span)
        drops = (self.decay_at,) if isinstance(self.decay_at, float | int) else self.decay_at or ()
        epoch = step // steps_per_epoch
        return self.lr * self.decay ** sum(epoch >= at * self.num_epochs for at in drops)

    def optimise(self, params: Iterable[Tensor]) -> torch.optim.Optimizer:
        """The optimiser of these parameters."""
        if self.optimiser == "sgd":
            return torch.optim.SGD(params, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        kind = torch.optim.Adam if self.optimiser == "adam" else torch.optim.AdamW
        return kind(params, lr=self.lr, betas=(self.momentum, 0.999), weight_decay=self.weight_decay)

    @property
    def objective(self) -> Objective:
        """The objective that ``loss`` names, with its numbers."""
        match self.loss:
            case "cross-entropy":
                return CrossEntropy(label_smoothing=self.label_smoothing)
            case "kl":
                return KL(temperature=self.temperature)
        return OBJECTIVES[self.loss]()


_FIRST_FIELDS = "num_epochs batch_size lr momentum weight_decay decay_at decay loss name augment labels".split()
"""Of ``Training``, and of the protocols made of it."""


def cosine(end: float, done: float) -> float:
    """From 1 to ``end`` along a half wave, of which the fraction ``done`` lies behind."""
    return end + (1 - end) * (1 + math.cos(math.pi * done)) / 2


class Trainer:
    """Trains networks of one architecture; what it compiled is reused from one network to the next."""

    def __init__(
        self,
        network: Functional,
        training: Training,
        augment: Augment,
        compute: Compute,
        teacher: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """``teacher``: images to logits; where there is one, its softmax at ``training.temperature`` on each batch as
        the network sees it takes the place of the targets."""
        self.network, self.training, self.augment, self.compute = network, training, augment, compute
        self.teacher = teacher
        objective = training.objective

        def loss_fn(params: Tensors, buffers: Tensors, images: Tensor, targets: Tensor, update: bool) -> Tensor:
            logits = network.logits(params, buffers, images, train=True, update_buffers=update)
            return objective.loss(logits.float(), targets)

        def losses_fn(params: Tensors, images: Tensor, targets: Tensor) -> Tensor:
            def one(params: Tensors, images: Tensor, targets: Tensor) -> Tensor:
                return objective.loss(network.logits(params, {}, images, train=True).float(), targets)

            losses: Tensor = torch.func.vmap(one, randomness="different")(params, images, targets)
            return losses.sum()

        self._loss = compute.first_order(loss_fn, network.device)
        self._losses = compute.first_order(losses_fn, network.device)

    def run(
        self,
        weights: Weights,
        images: Tensor | Images,
        targets: Tensor,
        rng: Rng,
        *,
        velocity: Tensors | None = None,
        on_epoch: Callable[[int, Weights], None] | None = None,
    ) -> Weights:
        """Train a copy of ``weights`` on ``images`` (N, C, H, W) and ``targets`` (N,) or (N, C).

        Batch order and augmentation are keyed by ``rng``, epoch and batch. ``velocity``, one tensor a parameter, is
        sgd's momentum where a training goes on; it is changed in place. ``on_epoch(epochs_done, weights)`` sees the
        live weights after each epoch: clone what you keep.
        """
        params = {name: p.detach().clone().requires_grad_() for name, p in weights.params.items()}
        live = Weights(params, {name: b.detach().clone() for name, b in weights.buffers.items()})

        def prepare(epoch: int, batch: int, indices: Sequence[Tensor]) -> BatchLoss:
            x, y = self._batch(images, targets, rng, epoch, batch, indices[0])
            return functools.partial(self._loss, *live, self.compute.layout(x), y)

        def after(epochs: int) -> None:
            if on_epoch is not None:
                on_epoch(epochs, live)

        optimiser = self.training.optimise(params.values())
        for name, buffer in (velocity or {}).items():
            optimiser.state[params[name]]["momentum_buffer"] = buffer
        self._epochs(optimiser, len(images), [rng], prepare, after)
        return Weights({name: p.detach() for name, p in params.items()}, live.buffers)

    def run_together(
        self,
        weights: Sequence[Weights],
        images: Tensor | Images,
        targets: Tensor,
        rngs: Sequence[Rng],
        *,
        on_epoch: Callable[[int, Sequence[Weights]], None] | None = None,
    ) -> list[Weights]:
        """``run`` of several networks at once, each with its own ``rng``: equal to rounding, dropout excepted.

        Raises:
            ValueError: the architecture has buffers, such as BatchNorm's running statistics.
        """
        if len(weights) == 1:
            single = None if on_epoch is None else lambda epochs, live: on_epoch(epochs, [live])
            return [self.run(weights[0], images, targets, rngs[0], on_epoch=single)]
        if weights[0].buffers:
            raise ValueError(
                f"networks of {self.network.name} cannot be trained together: they have buffers, such as running "
                f"statistics; give {spelt('compute.networks', 1)}"
            )
        names = list(weights[0].params)
        params = {name: torch.stack([w.params[name].detach() for w in weights]).requires_grad_() for name in names}

        def live() -> list[Weights]:
            return [Weights({name: params[name].detach()[k] for name in names}, {}) for k in range(len(weights))]

        def prepare(epoch: int, batch: int, indices: Sequence[Tensor]) -> BatchLoss:
            pairs = zip(rngs, indices, strict=True)
            xs, ys = zip(*(self._batch(images, targets, *(rng, epoch, batch, i)) for rng, i in pairs), strict=True)
            x, y = torch.stack(xs), torch.stack(ys)
            return lambda update: cast(Tensor, self._losses(params, x, y))

        def after(epochs: int) -> None:
            if on_epoch is not None:
                on_epoch(epochs, live())

        self._epochs(self.training.optimise(params.values()), len(images), rngs, prepare, after)
        return live()

    def _epochs(
        self,
        optimiser: torch.optim.Optimizer,
        num_images: int,
        rngs: Sequence[Rng],
        prepare: Callable[[int, int, Sequence[Tensor]], BatchLoss],
        after: Callable[[int], None],
    ) -> None:
        """``prepare(epoch, batch, indices)`` gives the loss of a batch; ``indices`` has those of every network."""
        plan = self.training
        num_batches = -(-num_images // plan.batch_size)
        with rngs[0].forked("layers"):  # dropout of foreign networks
            for epoch in range(plan.num_epochs):
                orders = [self._order(num_images, rng, epoch) for rng in rngs]
                for batch, indices in enumerate(zip(*(order.split(plan.batch_size) for order in orders), strict=True)):
                    optimiser.param_groups[0]["lr"] = plan.lr_at(epoch * num_batches + batch, num_batches)
                    objective = prepare(epoch, batch, indices)
                    optimiser.zero_grad(set_to_none=True)
                    objective(True).backward()
                    if plan.rho:
                        params = optimiser.param_groups[0]["params"]
                        sharpness_aware(params, objective, plan.rho, plan.alpha, len(rngs))
                    optimiser.step()
                after(epoch + 1)

    def _order(self, num_images: int, rng: Rng, epoch: int) -> Tensor:
        if self.training.order == "stored":
            return torch.arange(num_images, device=self.network.device)
        return torch.randperm(num_images, generator=rng("order", epoch)).to(self.network.device)

    def _batch(
        self, images: Tensor | Images, targets: Tensor, rng: Rng, epoch: int, batch: int, index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Augmented images and targets."""
        x, y = self.augment.mirrored(images[index], targets[index])
        drawn = self.augment.sample(rng("augment", epoch, batch), len(x), tuple(x.shape[1:]), siamese=False)
        x = self.augment.apply(x, drawn)
        if self.training.cutmix or self.training.mixup:
            y = one_hot(y, self.network.num_classes)
        if self.training.cutmix:
            x, y = cutmix(x, y, self.training.cutmix, rng("cutmix", epoch, batch))
        if self.training.mixup:
            x, y = mixup(x, y, self.training.mixup, rng("mixup", epoch, batch))
        if self.teacher is not None:
            with torch.no_grad():
                y = (self.teacher(x) / self.training.temperature).softmax(1)
        return x, y


def sharpness_aware(
    params: Sequence[Tensor], objective: BatchLoss, rho: float, alpha: float, num_networks: int = 1
) -> None:
    """Replace the gradient g of a batch at the weights w by that of adaptive GSAM.

    Zhuang et al. (2022), "Surrogate Gap Minimization Improves Sharpness-Aware Training", with the adaptive ascent of
    Kwon et al. (2021), as FTD trains its experts. With h the gradient of the same batch at ``w + rho w^2 g / |w g|``
    (squares and products by element, norms over all weights of a network) it is ``h - alpha (g - (g.h / h.h) h)``.

    Args:
        params: with g as their gradients. They come back as they are.
        objective: the loss of the batch.
        rho, alpha: as in ``Training``.
        num_networks: how many the first axis of ``params`` holds, if there are several.
    """

    def rows(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [t.reshape(num_networks, -1) for t in tensors]

    def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        return torch.stack([(x * y).sum(1) for x, y in zip(a, b, strict=True)]).sum(0)[:, None]

    with torch.no_grad():
        before = [p.clone() for p in params]
        w, g = rows(before), rows([cast(Tensor, p.grad) for p in params])
        adapted = [x * y for x, y in zip(w, g, strict=True)]
        far = rho / (inner(adapted, adapted).sqrt() + 1e-12)
        for p, x, y in zip(params, w, adapted, strict=True):
            p.add_((far * x * y).view_as(p))
            p.grad = None
    objective(False).backward()
    with torch.no_grad():
        h = rows([cast(Tensor, p.grad) for p in params])
        along = inner(g, h) / inner(h, h).clamp(min=torch.finfo(h[0].dtype).tiny)
        for p, old, x, y in zip(params, before, g, h, strict=True):
            p.copy_(old)
            p.grad = (y - alpha * (x - along * y)).view_as(p)


def cutmix(x: Tensor, y: Tensor, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) of which a rectangle comes from another image, and targets (N, C) mixed by its area.

    Yun et al. (2019): the area kept is uniform over (0, 1), before the rectangle is cut at the border; it is the same
    for the whole batch, which stays as it is with one minus the ``probability``.
    """
    u = torch.rand(4, generator=generator).tolist()
    other = torch.randperm(len(x), generator=generator).to(x.device)
    if u[0] >= probability:
        return x, y
    height, width = x.shape[2:]
    side = math.sqrt(u[1])
    top, bottom = _cut(u[2], side, height)
    left, right = _cut(u[3], side, width)
    mixed = x.clone()
    mixed[:, :, top:bottom, left:right] = x[other, :, top:bottom, left:right]
    share = (bottom - top) * (right - left) / (height * width)
    return mixed, y * (1 - share) + y[other] * share


def mixup(x: Tensor, y: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) and targets (N, C), each blended with another of the batch by one weight from
    Beta(alpha, alpha) for all."""
    seed = int(torch.randint(2**31, (), generator=generator))
    weight = float(np.random.default_rng(seed).beta(alpha, alpha))
    other = torch.randperm(len(x), generator=generator).to(x.device)
    return weight * x + (1 - weight) * x[other], weight * y + (1 - weight) * y[other]


def _cut(centre: float, side: float, size: int) -> tuple[int, int]:
    middle, half = int(centre * size), int(side * size) // 2
    return max(middle - half, 0), min(middle + half, size)


class Scorer:
    """Accuracy of networks of one architecture, as a fraction."""

    def __init__(self, network: Functional, compute: Compute, batch_size: int = 1000) -> None:
        self.batch_size, self.compute = batch_size, compute

        def logits(params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
            return network.logits(params, buffers, images, train=False).float()

        self._logits = compute.first_order(logits, network.device)

    @torch.no_grad()
    def logits(self, weights: Weights, images: Tensor | Images) -> Tensor:
        """Images (N, C, H, W) to logits (N, num_classes), float32."""
        batches = images.split(self.batch_size)
        return torch.cat([self._logits(*weights, self.compute.layout(x)) for x in batches])

    def accuracy(self, weights: Weights, images: Tensor | Images, labels: Tensor) -> float:
        return float((self.logits(weights, images).argmax(1) == labels).sum()) / len(labels)
