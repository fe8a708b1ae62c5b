"""RDED: Sun et al., "On the Diversity and Realism of Distilled Dataset: An Efficient Dataset Distillation Paradigm",
CVPR 2024.

Nothing is optimised. An image of the set is a mosaic of f x f random crops of real images that a trained network, the
observer, classifies well:

    realism(p) = log phi_c(p)                     of a crop p of an image of class c
    p_i        = argmax_{p in crops of x_i} realism(p)
    S_c        = mosaics of the n f^2 crops p_i with the largest realism

    symbol  code
    phi     ``teachers``, softmax of the logits
    f       ``factor``
    n       ``ctx.images_per_class``

Deviations: see docs/methods/rded.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from condense.artifacts import ArtifactSpec
from condense.augment import Augment
from condense.data.layout import Kind, sides
from condense.method import Context, Method, State
from condense.methods import mosaic
from condense.mosaic import joined
from condense.schedule import Schedule
from condense.task import Task
from condense.teachers import OWN, assign, needed
from condense.train import Training


@final
@dataclass(frozen=True, kw_only=True)
class RDED(Method):
    """Mosaics of those random crops of real images that a trained network classifies best; nothing is optimised."""

    family: ClassVar[str] = "decoupled"
    has_teacher: ClassVar[bool] = True
    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    teachers: tuple[str, ...] = (OWN,)
    """Networks whose mean log-probability of the class is the score of a crop; same is the recipe's network."""
    factor: int | None = None
    """Number of crops along each side of an image. Unset: 2 for images of at least 64 x 64 pixels, else 1."""
    num_candidates: int = 300
    """Real images per class that are cropped; all of them if a class has fewer."""
    num_crops: int = 5
    """Number of random crops of each image, of which the best is a candidate."""
    min_area: float = 0.08
    """Smallest area of a crop, as a fraction of the largest square in the image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "num_candidates", "num_crops")
        if self.factor is not None and not 1 <= self.factor <= 9:
            raise ValueError(f"method.factor must be from 1 to 9, got {self.factor}; the published values are 1 and 2")
        if not 0 < self.min_area <= 1:
            raise ValueError(f"method.min_area must lie in (0, 1], got {self.min_area}; the published value is 0.08")

    def factor_for(self, task: Task) -> int:
        """The factor for the images of a task."""
        return self.factor or (2 if min(sides(task.input_shape)) >= 64 else 1)

    def needs(self, task: Task) -> Mapping[str, ArtifactSpec]:
        return needed(self.teachers, task)

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        return num_classes * self.num_candidates * self.num_crops * len(self.teachers) / 3

    def training(self, task: Task) -> Training:
        return Training(
            num_epochs=300,
            batch_size=50 if task.num_classes < 100 else 100,
            optimiser="adamw",
            lr=1e-3,
            weight_decay=0.01,
            schedule=Schedule(cosine_to=0.0, cosine_span=0.5),
            cutmix=1.0,
        )

    def training_augment(self, task: Task) -> Augment:
        factor, flip = self.factor_for(task), tuple(op for op in task.augment.ops if op == "flip")
        if factor == 1:
            return Augment(flip)
        return Augment(("resized-crop", *flip), mode="M", min_area=1 / factor, shuffle=factor)

    def init(self, ctx: Context) -> State:
        mosaic.require_mosaics(ctx, self.factor_for(ctx.task), self.num_candidates)
        return State(syn=ctx.new_set(*ctx.initial("real")))

    def step(self, ctx: Context, state: State, step: int) -> dict[str, float]:
        teachers = mosaic.labellers(self.teachers, ctx)
        images = torch.cat([self.mosaics(ctx, teachers, c) for c in range(ctx.task.num_classes)])
        syn = ctx.new_set(images, ctx.classes)
        assign(syn, teachers)
        state.syn.load_state_dict(syn.state_dict())
        return {}

    def mosaics(self, ctx: Context, teachers: Sequence[mosaic.Labeller], label: int) -> Tensor:
        """Return the mosaics (images_per_class, C, H, W) of a class; the best crops come first."""
        factor = self.factor_for(ctx.task)
        crops, scores = self.best_crops(ctx, teachers, label)
        return joined(crops[mosaic.best(scores, ctx.images_per_class * factor**2)], factor)

    def best_crops(self, ctx: Context, teachers: Sequence[mosaic.Labeller], label: int) -> tuple[Tensor, Tensor]:
        """Return the best crop (n, C, h, w) of each candidate of a class, and its score (n,)."""
        task, factor = ctx.task, self.factor_for(ctx.task)
        height, width = task.input_shape[1:]
        images = task.train.images[mosaic.candidates(ctx, label, self.num_candidates)]
        draws = ctx.rng("crops", 0, label)
        best = images.new_empty(len(images), task.input_shape[0], height // factor, width // factor)
        most = images.new_full((len(images),), -torch.inf)
        for _ in range(self.num_crops):
            crops = mosaic.random_crops(images, (height // factor, width // factor), self.min_area, draws)
            scores = mosaic.realism(teachers, mosaic.padded(crops, (height, width)), label)
            better = scores > most
            best[better], most[better] = crops[better], scores[better]
        return best, most
