"""DC and DSA: dataset condensation by gradient matching.

DC: Zhao, Mopuri and Bilen, "Dataset Condensation with Gradient Matching", ICLR 2021, algorithm 1.
DSA: Zhao and Bilen, "Dataset Condensation with Differentiable Siamese Augmentation", ICML 2021.

    min_S  E_theta_0  sum_t sum_c  D( grad l(A_omega(B_c); theta_t), grad l(A_omega(S_c); theta_t) )

theta_t is a student: it has fresh weights theta_0 and is trained on S between two updates of S. DC has no A.

    symbol    code
    S_c       ``state.syn`` at the latents of class c
    B_c       ``batch_real`` real images of class c, drawn at every step
    D         ``distance``: one minus the cosine, summed over the rows of every layer
    theta_t   ``state.params``, ``state.buffers``
    t         ``step`` modulo ``outer_loop``; a fresh student begins at 0
    A, omega  ``task.augment`` and one siamese draw per class and step, shared by B_c and S_c

Deviations: see docs/methods/dc.md and docs/methods/dsa.md.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from condense.augment import Augment
from condense.compute import Compute
from condense.match import LossFn, matching_loss, named_distance
from condense.method import Context, GradientMethod, GradientState
from condense.names import spelt
from condense.networks import Functional, Weights, default_for
from condense.schedule import Schedule
from condense.task import Task
from condense.train import Trainer, Training

BATCH_STATISTICS = 16
"""Real images per class by which the running statistics of BatchNorm are updated before a step."""

INNER_EPOCHS = {1: 1, 10: 50, 20: 25, 30: 20, 40: 15, 50: 10}
"""Published number of epochs of the student between two updates of the set, by images per class."""


def published_loops(ipc: int) -> tuple[int, int]:
    """Return (outer_loop, inner_epochs) for any number of images per class.

    ``outer_loop`` is ``ipc``, as published. ``inner_epochs`` is interpolated linearly between the published values.
    Above 50 images it is 500 // ipc, at least 1, which keeps the product of the two near 500.
    """
    if ipc > 50:
        return ipc, max(1, 500 // ipc)
    return ipc, round(float(np.interp(ipc, list(INNER_EPOCHS), list(INNER_EPOCHS.values()))))


DistanceName = Literal["layerwise-cosine", "mse", "cosine", "mse-conv", "l1-conv"]
"""Names of ``condense.match.DISTANCES``."""


@dataclass(kw_only=True)
class StudentState(GradientState):
    params: dict[str, Tensor]
    """Weights of the student for the next step."""
    buffers: dict[str, Tensor]
    velocity: dict[str, Tensor] = field(default_factory=dict)
    """Momentum buffers of the student's optimiser; empty if it has no momentum."""


@dataclass(frozen=True, kw_only=True)
class GradientMatching(GradientMethod):
    """Base class of DC, DSA and IDC, which differ by how the student is trained."""

    family: ClassVar[str] = "gradient matching"

    num_steps: int = 1000
    """Number of updates of the images. The published number is 1000 students with ``outer_loop`` updates each."""
    start: Literal["real", "noise"]
    """Initial images: real ones drawn per class, or standard normal noise."""
    distance: DistanceName = "layerwise-cosine"
    """Distance between gradients: cosine distance per output row of each layer (layerwise-cosine), squared differences
    (mse), one cosine distance (cosine), or squared or absolute differences of convolutions (mse-conv, l1-conv)."""
    batch_real: int = 256
    """Real images per class in each step; all of them if a class has fewer."""
    lr_student: float = 0.01
    """Learning rate of SGD, which trains the student."""
    batch_student: int = 256
    """Batch size of the student."""

    def __post_init__(self) -> None:
        super().__post_init__()
        named_distance(self.distance)
        for name in ("batch_real", "batch_student"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"method.{name} must be at least 1, got {value}; a usual value is 256")
        if not self.lr_student > 0:
            raise ValueError(f"method.lr_student must be positive, got {self.lr_student}; try 0.01")

    @abstractmethod
    def lifetime(self, ctx: Context) -> int:
        """Number of updates of the images before the student is replaced."""

    @abstractmethod
    def trained(self, ctx: Context, state: StudentState, step: int) -> Weights:
        """Return the student after its training between this update of the images and the next."""

    def augment(self, ctx: Context) -> Augment:
        """The augmentation of both sides of a comparison."""
        return ctx.task.augment

    def synthetic(self, ctx: Context, state: StudentState, step: int, part: int) -> tuple[Tensor, Tensor]:
        """The synthetic images (m, *input_shape) and targets of a class that take part in a step."""
        return state.syn(state.syn.index_of(part))

    def init(self, ctx: Context) -> StudentState:
        params, buffers = fresh_student(ctx, 0)
        axes = 1 + len(ctx.task.input_shape)
        if self.distance.endswith("-conv") and all(p.ndim != axes for p in params.values()):
            raise ValueError(
                f"{ctx.task.network.name} has no convolutions, whose gradients {self.distance} compares; "
                f"give {spelt('network', default_for(ctx.task.input_shape))} or {spelt('method.distance', 'mse')}"
            )
        syn = ctx.new_set(*ctx.initial(self.start))
        return StudentState(syn=syn, optimisers=self.optimisers(syn), params=params, buffers=buffers)

    def parts(self, ctx: Context) -> Sequence[int]:
        return range(ctx.task.num_classes)

    def parts_at_once(self, ctx: Context) -> int:
        return max(1, (ctx.compute.vmap_batch or 1) // ctx.images_per_class)

    def loss(self, ctx: Context, state: StudentState, step: int, part: int) -> Tensor:
        return self.losses(ctx, state, step, (part,))

    def graphs(self, ctx: Context) -> bool:
        return True

    def losses(self, ctx: Context, state: StudentState, step: int, parts: Sequence[int]) -> Tensor:
        batches = [self.batches(ctx, state, step, part) for part in parts]
        student = Weights(state.params, state.buffers)
        real_gradient = _real_gradient(ctx.task.network, ctx.compute)
        real_grads = [
            real_gradient(student, batch.real, torch.full((len(batch.real),), part, device=ctx.task.device))
            for part, batch in zip(parts, batches, strict=True)
        ]
        if len(parts) == 1:
            grads, images, targets = real_grads[0], batches[0].images, batches[0].targets
        else:
            grads = {name: torch.stack([g[name] for g in real_grads]) for name in state.params}
            images = torch.stack([batch.images for batch in batches])
            targets = torch.stack([batch.targets for batch in batches])
        return matching_loss(
            ctx.compute.second_order(frozen_loss(ctx.task.network, state.buffers), ctx.task.device),
            state.params,
            grads,
            named_distance(self.distance),
            images,
            targets,
            compile=bool(ctx.compute.compile),
            micro_batch=ctx.compute.micro_batch,
        )

    def batches(self, ctx: Context, state: StudentState, step: int, part: int) -> Batches:
        """The real and synthetic images of one class, under the same augmentation."""
        augment, shape = self.augment(ctx), ctx.task.input_shape
        drawn = augment.sample(ctx.rng("siamese", step, part), 1, shape, siamese=True)
        real = ctx.task.train.draw(part, self.batch_real, ctx.rng("real", step, part))
        images, targets = augment.mirrored(*self.synthetic(ctx, state, step, part))
        return Batches(augment.apply(real, drawn), augment.apply(images, drawn), targets)

    def after(self, ctx: Context, state: StudentState, step: int) -> None:
        """Train the student, or replace it by a fresh one after ``lifetime`` updates."""
        if (step + 1) % self.lifetime(ctx) == 0:
            student = Weights(state.params, state.buffers)
            ctx.graphed("student", state, lambda step: student.assign(fresh_student(ctx, step + 1)))(step)
            for velocity in state.velocity.values():
                velocity.zero_()
        else:
            Weights(state.params, state.buffers).assign(self.trained(ctx, state, step))


class Batches(NamedTuple):
    real: Tensor
    """(n, *input_shape)"""
    images: Tensor
    """Synthetic images (m, *input_shape), with their graph to the set."""
    targets: Tensor
    """Targets of the synthetic images: (m,) or (m, num_classes)."""


@dataclass(frozen=True, kw_only=True)
class Condensation(GradientMatching):
    """Base class of DC and DSA, which differ by the initial images and the training of the protocol ``own``."""

    outer_loop: int | None = None
    """Number of updates of the images before the student is replaced; unset: the number of images per class."""
    inner_epochs: int | None = None
    """Number of epochs of the student on the set between two updates; unset: interpolated from the published table."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outer_loop is not None and self.outer_loop < 1:
            raise ValueError(f"method.outer_loop must be at least 1, got {self.outer_loop}; a usual value is 10")
        if self.inner_epochs is not None and self.inner_epochs < 0:
            raise ValueError(f"method.inner_epochs must be at least 0, got {self.inner_epochs}; try 50")

    def loops(self, ipc: int) -> tuple[int, int]:
        """Return (outer_loop, inner_epochs): the fields, or the published values for this budget if unset."""
        outer, inner = published_loops(ipc)
        return (
            outer if self.outer_loop is None else self.outer_loop,
            inner if self.inner_epochs is None else self.inner_epochs,
        )

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        _, inner_epochs = self.loops(images_per_class)
        return self.num_steps * num_classes * (self.batch_real + (3 + inner_epochs) * images_per_class)

    def lifetime(self, ctx: Context) -> int:
        return self.loops(ctx.ipc)[0]

    def trained(self, ctx: Context, state: StudentState, step: int) -> Weights:
        """Train the student on the current set by SGD without momentum."""
        task, (_, inner_epochs) = ctx.task, self.loops(ctx.ipc)
        training = Training(
            num_epochs=inner_epochs,
            batch_size=self.batch_student,
            lr=self.lr_student,
            momentum=0.0,
            weight_decay=0.0,
            schedule=Schedule(),
        )
        with torch.no_grad():
            images, targets = state.syn()
        trainer = student_trainer(task.network, training, ctx.compute)
        source = trainer.source(images, targets, ctx.rng.child("training", step), task.augment)
        student = trainer.run(Weights(state.params, state.buffers), source)
        set_statistics(ctx, student, step + 1)
        return student


@final
@dataclass(frozen=True, kw_only=True)
class DC(Condensation):
    """Gradient matching that starts from noise; its recipes have no augmentation."""

    start: Literal["real", "noise"] = "noise"
    """Initial images: real ones drawn per class, or standard normal noise."""


@final
@dataclass(frozen=True, kw_only=True)
class DSA(Condensation):
    """Gradient matching under Siamese augmentation (the recipe's ``augment``) that starts from real images."""

    start: Literal["real", "noise"] = "real"
    """Initial images: real ones drawn per class, or standard normal noise."""

    def training(self, task: Task) -> Training:
        return Training(num_epochs=1000)


def fresh_student(ctx: Context, step: int | Tensor) -> Weights:
    """Return a student with fresh weights that is first used in ``step``."""
    student = ctx.task.network.init(ctx.rng, "student", step)
    set_statistics(ctx, student, step)
    return student


@torch.no_grad()
def set_statistics(ctx: Context, student: Weights, step: int | Tensor) -> None:
    """Update the running statistics of BatchNorm in place by one forward pass of real images of all classes."""
    if any(name.endswith("running_mean") for name in student.buffers):
        task = ctx.task
        draws = [task.train.draw(c, BATCH_STATISTICS, ctx.rng("statistics", step, c)) for c in range(task.num_classes)]
        with ctx.rng.forked("layers", step):  # dropout of external networks draws from the global generator
            task.network.logits(*student, torch.cat(draws), train=True, update_buffers=True)


def frozen_loss(network: Functional, buffers: dict[str, Tensor]) -> LossFn:
    """Cross-entropy in evaluation mode: BatchNorm uses the statistics of ``buffers``, and dropout is off."""

    def loss_fn(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(network.logits(params, buffers, batch[0], train=False), batch[1])

    return loss_fn


student_trainer = lru_cache(maxsize=1)(Trainer)
"""The trainer of the student, cached with its compiled functions for all steps of a run."""


@lru_cache(maxsize=1)
def _real_gradient(network: Functional, compute: Compute) -> Callable[[Weights, Tensor, Tensor], dict[str, Tensor]]:
    """The gradient of ``frozen_loss`` at a student, compiled once for all steps."""

    def loss(student: Weights, images: Tensor, classes: Tensor) -> Tensor:
        return frozen_loss(network, student.buffers)(student.params, (images, classes))

    first_order = compute.first_order(loss, network.device)

    def real_gradient(student: Weights, images: Tensor, classes: Tensor) -> dict[str, Tensor]:
        params = {name: p.detach().requires_grad_() for name, p in student.params.items()}
        size = compute.micro_batch or len(images)
        total = {name: torch.zeros_like(p) for name, p in params.items()}
        for x, y in zip(images.split(size), classes.split(size), strict=True):
            value = first_order(Weights(params, student.buffers), compute.layout(x), y)
            grads = torch.autograd.grad(value, list(params.values()), materialize_grads=True)
            for name, grad in zip(params, grads, strict=True):
                total[name].add_(grad, alpha=len(x) / len(images))
        return total

    return real_gradient
