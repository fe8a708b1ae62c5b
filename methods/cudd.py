"""CUDD: Ma, Cao, Yang, Gong and Wei, "Curriculum Dataset Distillation", arXiv 2405.09150, 2024.

    min_x  CE(f(A(x)), c) + r sum_l w_l ( || mu_l(A(x)) - mu_l ||_2 + || var_l(A(x)) - var_l ||_2 )
           + a MSE(A(x), A(x_0)) - b log(1 - softmax(m g(A(x)))_c)

for a chunk x of images of the classes c, which begins at real images x_0. The first two terms and the teacher f are
those of SRe2L. A run has stages over the images per class. In each stage but the first there is a student g, trained
on the images of all earlier stages with the teacher's labels of their views; in the first stage b is 0. m is 1 for an
image whose view f classifies as c, else 0. x_0 are real images of the class that f classifies correctly and g does
not, then those that both do not, then any others; no image twice.

    symbol           code                             symbol             code
    x, c             ``images``, ``targets``          x_0                ``CUDDState.chosen``
    f                ``Teacher``                      a                  ``weight_start``
    g                ``CUDDState.params``             b                  ``weight_adversarial``
    A                ``ctx.task.augment``             r, w_l, mu, var    see ``condense.methods.sre2l``

Deviations: see docs/methods/cudd.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from condense.data.images import Images
from condense.method import Context, GradientState
from condense.methods.recovery import real
from condense.methods.sre2l import BATCH, Inversion
from condense.networks import Weights
from condense.schedule import Schedule
from condense.sources import Relabelled
from condense.task import Labelled
from condense.teachers import Teacher, mean_labeller
from condense.train import Trainer, Training


@dataclass(kw_only=True)
class CUDDState(GradientState):
    params: dict[str, Tensor]
    """Parameters of the student of the current stage; the first stage does not use them."""
    buffers: dict[str, Tensor]
    """Buffers of the student."""
    chosen: Tensor
    """Index of the training image from which each image starts, (N,); of later stages a random one of its class."""


@final
@dataclass(frozen=True, kw_only=True)
class CUDD(Inversion):
    """Recovers images in stages, each from what a student of the images of earlier stages does not know."""

    num_steps: int = 4000
    """Number of steps in which each image is optimised."""
    stages: tuple[int, ...] = (10, 20)
    """Numbers of images per class at which a stage ends; the last stage ends with the budget."""
    weight_start: float = 1.0
    """Weight of the mean squared distance to the real images from which the images start."""
    weight_adversarial: float = 1.0
    """Weight of the loss that keeps the student from classifying the images as their classes."""
    student_epochs: int = 150
    """Epochs for which the student of a stage is trained."""
    student_lr: float = 1e-3
    """Learning rate of the student."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(0, "weight_start", "weight_adversarial")
        self.require_at_least(1, "student_epochs")
        if any(end <= begin for begin, end in itertools.pairwise((0, *self.stages))):
            raise ValueError(f"method.stages must be positive and ascend, got {self.stages}; the default is (10, 20)")
        _ = self.student

    @property
    def student(self) -> Training:
        """The training of a student."""
        return Training(
            num_epochs=self.student_epochs,
            batch_size=128,
            optimiser="adamw",
            lr=self.student_lr,
            weight_decay=0.01,
            schedule=Schedule(cosine_to=0.0),
            loss="kl",
            temperature=20.0,
            cutmix=1.0,
        )

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        seen = sum(end for end in self.stages if end < images_per_class)
        recovery = super().estimated_work(num_images, num_classes, images_per_class)
        return recovery + self.student_epochs * num_classes * seen

    def stage(self, ctx: Context, number: int) -> int:
        """Return the stage of a chunk, counted from 0."""
        image = int(self.chunks(ctx)[number][0]) % ctx.images_per_class
        return sum(image >= end for end in self.stages)

    def init(self, ctx: Context) -> CUDDState:
        ctx.require_images()
        base = self._state(ctx)
        params, buffers = ctx.task.network.init(ctx.rng, "student")
        every = torch.arange(ctx.images_per_class * ctx.task.num_classes)
        state = CUDDState(
            syn=base.syn, optimisers=base.optimisers, params=params, buffers=buffers, chosen=real(ctx, every)
        )
        self.enter(ctx, state, 0)
        return state

    def begin(self, ctx: Context, state: CUDDState, rows: Tensor) -> Tensor:
        return ctx.task.train.images[state.chosen[rows.to(state.chosen.device)]]

    def enter(self, ctx: Context, state: CUDDState, number: int) -> None:
        stage = self.stage(ctx, number)
        if number == 0 or stage > self.stage(ctx, number - 1):
            if stage:
                self._train(ctx, state, number)
            self._choose(ctx, state, stage)
        super().enter(ctx, state, number)

    def _train(self, ctx: Context, state: CUDDState, number: int) -> None:
        """Train a new student on the images of all chunks before ``number``."""
        raw = torch.cat([self.recovered(ctx, k) for k in range(number)])
        classes = torch.cat(list(self.chunks(ctx)[:number])).to(raw.device) // ctx.images_per_class
        images = Images(raw, torch.arange(len(raw), device=raw.device), ctx.task.transform)
        network, plan, stage = ctx.task.network, self.student, self.stage(ctx, number)
        trainer = Trainer(network, plan, ctx.compute)
        views = trainer.source(images, classes, ctx.rng.child("student", stage), self.training_augment(ctx.task))
        label = mean_labeller([teacher.labeller(ctx.compute) for teacher in self.opened(ctx, state)])
        source = Relabelled(views, label, plan.objective)
        trained = trainer.run(network.init(ctx.rng, "student", stage), source)
        self._student(ctx, state).weights.assign(trained)

    def _student(self, ctx: Context, state: CUDDState) -> Teacher:
        return Teacher(ctx.task.network, Weights(state.params, state.buffers))

    @torch.no_grad()
    def _choose(self, ctx: Context, state: CUDDState, stage: int) -> None:
        """Choose the real images from which the images of a stage start."""
        train, each = ctx.task.train, ctx.images_per_class
        ends = (0, *(end for end in self.stages if end < each), each)
        begin, end = ends[stage : stage + 2]
        rank = torch.where(classified(self.opened(ctx, state), train), 0, 1)
        if stage:
            rank[classified([self._student(ctx, state)], train)] = 2
        for label, members in enumerate(train.by_class):
            row = label * each
            free = members[~torch.isin(members, state.chosen[row : row + begin])]
            drawn = free[ctx.rng("starts", stage, label).permutation(len(free)).to(free.device)]
            state.chosen[row + begin : row + end] = drawn[rank[drawn].argsort(stable=True)[: end - begin]]

    def chunk_loss(
        self, ctx: Context, state: CUDDState, step: int, rows: Tensor, images: Tensor, targets: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        starts, _ = ctx.task.augment.mirrored(self.begin(ctx, state, rows), targets)
        view, view_of_starts = (self.view(ctx, step, x, ctx.task.augment) for x in (images, starts))
        logits, entropy, difference = self.inversion(ctx, state, step, view, targets)
        terms = {
            "entropy": entropy,
            "statistics": difference,
            "start": self.weight_start * F.mse_loss(view, view_of_starts),
            "adversarial": torch.zeros_like(entropy),
        }
        if self.weight_adversarial and self.stage(ctx, step // self.num_steps):
            label = ctx.kept("student", state, lambda: self._student(ctx, state).labeller(ctx.compute))
            taught = logits.detach().argmax(1) == targets
            terms["adversarial"] = self.weight_adversarial * unlikelihood(label(view), targets, taught)
        return torch.stack(list(terms.values())).sum(), terms


def classified(networks: Sequence[Teacher], data: Labelled) -> Tensor:
    """Return which samples (N,) some networks classify correctly, by their mean logits in full precision."""
    logits = mean_labeller([network.scorer() for network in networks])
    return torch.cat([logits(images).argmax(1) for images in data.images.split(BATCH)]) == data.labels


def unlikelihood(logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Return the mean of -log(1 - p), where p is the probability of the target.

    Args:
        logits: (n, C).
        targets: classes (n,).
        counted: which rows count (n,); for the others p is 1 / C.
    """
    logits = logits * counted[:, None]
    others = logits.scatter(1, targets[:, None], -torch.inf)
    return (logits.logsumexp(1) - others.logsumexp(1)).mean()
