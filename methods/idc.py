"""IDC and IDC-I: gradient matching with students trained on real data.

Kim et al., "Dataset Condensation via Efficient Synthetic-Data Parameterization", ICML 2022.

    min_S  E_theta_0  w sum_t sum_c  D( grad l(A_omega(B_c); theta_t), grad l(A_omega(S_c); theta_t) )

Three things differ from DSA. theta_t is trained on real images, never on S. D compares the gradients of convolutions
only, including their norms. A stored image is decoded into several by the recipe's ``decode`` (IDC: ``factor``, IDC-I:
``pixels``, which stores single images).

    symbol    code
    S_c       decoded images of class c, at most ``batch_syn`` of them, drawn at every step
    B_c       ``batch_real`` real images of class c
    D         ``distance``: squared or absolute differences of the gradients of convolution weights
    w         ``weight``: images per class / 10, times (side / ``base_size``)^2
    theta_t   ``state.params``, ``state.buffers``, ``state.velocity``
    t         ``step`` modulo ``outer_loop``; after each, the student is trained for an epoch on ``num_student`` images
    A, omega  the ``matched`` operations of ``task.augment``; one siamese draw per class and step

Deviations: see docs/methods/idc.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, final

import torch
from torch import Tensor

from condense.augment import Augment
from condense.data.layout import sides
from condense.method import Context, Optim
from condense.methods.dc import DistanceName, GradientMatching, StudentState, student_trainer
from condense.networks import Weights
from condense.schedule import Schedule
from condense.task import Task
from condense.train import Training


@dataclass(frozen=True, kw_only=True)
class IDCBase(GradientMatching):
    """Base class of IDC and IDC-I, which differ only by the decoder of their recipes."""

    num_steps: int = 200000
    """Number of updates of the images: 2000 students with ``outer_loop`` updates each, as published."""
    optim: Optim = Optim(lr=0.248, momentum=0.0)
    """Optimiser of the images (latents); its learning rate is meant for 10 images per class of side ``base_size``. It
    corresponds to the published learning rate 0.005 and momentum 0.5; see docs/methods/idc.md."""
    clamp: bool = True
    """Whether to clamp pixels to [0, 1] after each update."""
    start: Literal["real", "noise"] = "real"
    """Initial images: real ones drawn per class, or standard normal noise."""
    distance: DistanceName = "mse-conv"
    """Distance between gradients: squared (mse-conv) or absolute (l1-conv) differences of convolutions only, or a
    distance of DC (layerwise-cosine, mse, cosine)."""
    batch_real: int = 64
    """Real images per class in each step; all of them if a class has fewer."""
    batch_syn: int = 128
    """Decoded images per class in each step, drawn at random; all of them if a class has fewer."""
    base_size: int = 32
    """Height and width of the images for which ``optim.lr`` is meant."""
    matched: tuple[str, ...] = ("color", "crop", "cutout")
    """Operations of the recipe's augmentation that are used in matching. The student is trained with them too, without
    cutout if it has CutMix."""
    outer_loop: int = 100
    """Number of updates of the images before the student is replaced."""
    num_student: int = 2048
    """Number of real images on which the student is trained for one epoch between two updates: the published 2000,
    rounded to whole batches."""
    batch_student: int = 64
    """Batch size of the student."""
    cutmix_student: float = 0.5
    """Probability of CutMix for a batch of the student."""
    cutmix: float = 0.5
    """Probability of CutMix for a batch of a network trained on the set (protocol ``own``). If it is above 0, the
    augmentation of that training has no cutout."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "batch_syn", "base_size", "outer_loop", "num_student")
        for name in ("cutmix_student", "cutmix"):
            if not 0 <= (probability := getattr(self, name)) <= 1:
                raise ValueError(f"method.{name} must lie in [0, 1], got {probability}; the published value is 0.5")
        Augment(self.matched)  # raises ValueError for unknown operations

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        matching = num_classes * (self.batch_real + 3 * min(self.batch_syn, images_per_class))
        return self.num_steps * (matching + min(self.num_student, num_images))

    def training(self, task: Task) -> Training:
        return Training(
            num_epochs=1000,
            batch_size=64,
            schedule=Schedule(drop_at=(2 / 3, 5 / 6), drop_factor=0.2),
            cutmix=self.cutmix,
        )

    def training_augment(self, task: Task) -> Augment:
        return beside_cutmix(super().training_augment(task), self.cutmix)

    def weight(self, ctx: Context) -> float:
        """The weight of the objective. The paper scales the learning rate by it, which is equivalent under SGD. For a
        series, ``base_size`` takes the place of the missing side."""
        height, width = (self.base_size, *sides(ctx.task.input_shape))[-2:]
        return ctx.ipc / 10 * height * width / self.base_size**2

    def init(self, ctx: Context) -> StudentState:
        state = super().init(ctx)
        state.velocity = {name: torch.zeros_like(p) for name, p in state.params.items()}
        return state

    def losses(self, ctx: Context, state: StudentState, step: int, parts: Sequence[int]) -> Tensor:
        return self.weight(ctx) * super().losses(ctx, state, step, parts)

    def augment(self, ctx: Context) -> Augment:
        return ctx.task.augment.only(self.matched)

    def synthetic(self, ctx: Context, state: StudentState, step: int, part: int) -> tuple[Tensor, Tensor]:
        images, targets = super().synthetic(ctx, state, step, part)
        if len(images) <= self.batch_syn:
            return images, targets
        chosen = ctx.rng("synthetic", step, part).subset(len(images), self.batch_syn).to(images.device)
        return images[chosen], targets[chosen]

    def lifetime(self, ctx: Context) -> int:
        return self.outer_loop

    def trained(self, ctx: Context, state: StudentState, step: int) -> Weights:
        """Train the student for one epoch on real images with the matched operations; ``state.velocity`` is kept."""
        task = ctx.task
        training = Training(
            num_epochs=1,
            batch_size=self.batch_student,
            lr=self.lr_student,
            schedule=Schedule(),
            cutmix=self.cutmix_student,
        )
        augment = beside_cutmix(replace(self.augment(ctx), flips=False), self.cutmix_student)
        trainer = student_trainer(task.network, training, ctx.compute)
        chosen = self.chosen(ctx, state, step)
        images, classes = task.train.images[chosen], task.train.labels[chosen]
        source = trainer.source(images, classes, ctx.rng.child("training", step), augment)
        optimiser = partial(training.optimise, velocity=state.velocity)
        return trainer.run(Weights(state.params, state.buffers), source, optimiser=optimiser)

    def chosen(self, ctx: Context, state: StudentState, step: int) -> Tensor:
        """The indices of the student's real images, drawn on the device into a tensor that stays in place."""
        total = len(ctx.task.train)
        size = min(self.num_student, total)
        place = ctx.kept(
            "images of the student", state, lambda: torch.empty(size, dtype=torch.int64, device=ctx.task.device)
        )

        def draw(step: int) -> None:
            place.copy_(ctx.rng("student images", step).subset(total, size))

        ctx.graphed("draw of the student's images", state, draw)(step)
        return place


@final
@dataclass(frozen=True, kw_only=True)
class IDC(IDCBase):
    """Gradient matching with students trained on real data; a stored image is decoded into four by default."""


@final
@dataclass(frozen=True, kw_only=True)
class IDCI(IDCBase):
    """IDC without multi-formation: each stored image is one image."""


def beside_cutmix(augment: Augment, cutmix: float) -> Augment:
    """Return the augmentation without cutout if the probability of CutMix is above 0, else unchanged."""
    return augment.only([op for op in augment.ops if op != "cutout"]) if cutmix else augment
