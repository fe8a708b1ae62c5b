"""FADRM: Cui, Bi, Luo, Zhao, Liu and Shen, "FADRM: Fast and Accurate Data Residual Matching for Dataset Distillation",
NeurIPS 2025. With several teachers in turn it is FADRM+.

    min_x  CE(f(A(x)), c) + r sum_l w_l ( || mu_l(A(x)) - mu_l ||_2 + || var_l(A(x)) - var_l ||_2 )
    x <- a x + (1 - a) x_0    after each of ``stages`` equal parts of the steps but the last

for a chunk x of images of the classes c. The loss and the teacher f are those of SRe2L. x begins at x_0, mosaics of
real images (RDED) that the teachers select. Each stage has a new optimiser, and one cosine covers all stages.

    symbol           code                             symbol             code
    x, c             ``images``, ``targets``          x_0                ``begin``
    f                ``Teacher``                      a                  ``keep``
    A                ``ctx.task.augment``             r, w_l, mu, var    see ``condense.methods.sre2l``

Deviations: see docs/methods/fadrm.md.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from condense.data.datasets import to_float
from condense.data.layout import Kind
from condense.method import Context, GradientState, Optim
from condense.methods.mosaic import require_mosaics
from condense.methods.rded import RDED
from condense.methods.recovery import divided, rounded
from condense.methods.sre2l import Inversion


@final
@dataclass(frozen=True, kw_only=True)
class FADRM(Inversion):
    """Recovers images from mosaics of real ones, to which they are drawn back between stages."""

    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    num_steps: int = 2000
    """Number of steps in which each image is optimised, in all stages together."""
    stages: int = 4
    """Number of stages, each with a new optimiser; their lengths differ by one step at most."""
    keep: float = 0.5
    """Weight of the images in the mean with their mosaics that follows each stage but the last; 1: no mosaics."""
    factor: int | None = None
    """Number of crops along each side of a mosaic. Unset: 2 for images of at least 64 x 64 pixels, else 1."""
    num_candidates: int = 300
    """Real images per class that are cropped; all of them if a class has fewer."""
    num_crops: int = 5
    """Number of random crops of each image, of which the best is a candidate."""
    min_area: float = 0.08
    """Smallest area of a crop, as a fraction of the largest square in the image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "stages")
        if not 0 <= self.keep <= 1:
            raise ValueError(f"method.keep must lie in [0, 1], got {self.keep}; the published value is 0.5")
        _ = self.selection

    @property
    def selection(self) -> RDED:
        """The method that makes the mosaics."""
        return RDED(
            teachers=self.teachers,
            factor=self.factor,
            num_candidates=self.num_candidates,
            num_crops=self.num_crops,
            min_area=self.min_area,
        )

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        sizes = num_images, num_classes, images_per_class
        return super().estimated_work(*sizes) + self.selection.estimated_work(*sizes)

    def chunks(self, ctx: Context) -> Sequence[Tensor]:
        return by_group(ctx.task.num_classes, ctx.images_per_class, self.chunk)

    def init(self, ctx: Context) -> GradientState:
        require_mosaics(ctx, self.selection.factor_for(ctx.task), self.num_candidates)
        return super().init(ctx)

    def begin(self, ctx: Context, state: GradientState, rows: Tensor) -> Tensor:
        """Return the mosaics; those of the classes that were asked for last are kept in memory as 8-bit pixels."""
        each, kept = ctx.images_per_class, ctx.kept("mosaics", state, dict[tuple[int, ...], Tensor])
        classes = tuple((rows // each).tolist())
        if classes not in kept:
            kept.clear()
            teachers = [teacher.scorer() for teacher in self.opened(ctx, state)]
            mosaics = [rounded(ctx.task, self.selection.mosaics(ctx, teachers, label)) for label in classes]
            kept[classes] = torch.stack(mosaics)
        return ctx.task.transform(to_float(kept[classes][:, int(rows[0]) % each]))

    def chunk_loss(
        self, ctx: Context, state: GradientState, step: int, rows: Tensor, images: Tensor, targets: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        view = self.view(ctx, step, images, ctx.task.augment)
        _, entropy, difference = self.inversion(ctx, state, step, view, targets)
        return entropy + difference, {"entropy": entropy, "statistics": difference}

    @torch.no_grad()
    def after(self, ctx: Context, state: GradientState, step: int) -> None:
        """Draw the images back to their mosaics after each stage but the last, which ends the chunk."""
        current, step_of_chunk = divmod(step, self.num_steps)
        stage, following = ((step_of_chunk + k) * self.stages // self.num_steps for k in (0, 1))
        if stage < following < self.stages:
            rows = self.chunks(ctx)[current]
            state.syn.latents[: len(rows)].lerp_(self.begin(ctx, state, rows), 1 - self.keep)
            for optimiser in state.optimisers.values():
                Optim.restart(optimiser)
        super().after(ctx, state, step)


@functools.lru_cache(maxsize=4)
def by_group(num_classes: int, each: int, most: int) -> list[Tensor]:
    """Return the chunks of ``by_image``, but all images of one group of classes before those of the next."""
    return [group * each + image for group in divided(num_classes, most) for image in range(each)]
