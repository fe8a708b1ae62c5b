"""SRe2L: Yin, Xing and Shen, "Squeeze, Recover and Relabel: Dataset Condensation at ImageNet Scale From A New
Perspective", NeurIPS 2023. With a curriculum of crops it is CDA: Yin and Shen, "Dataset Distillation via Curriculum
Data Synthesis in Large Data Era", TMLR 2024. With chunks of one class it has the class-wise statistics of LPLD: Xiao
and He, "Are Large-scale Soft Labels Necessary for Large-scale Dataset Distillation?", NeurIPS 2024.

    min_x  CE(f(A(x)), c) + r sum_l w_l ( || mu_l(A(x)) - mu_l ||_2 + || var_l(A(x)) - var_l ||_2 )

for a chunk x of images of the classes c. The teacher f was trained on the real images (squeeze) and is in evaluation
mode. mu_l(.) and var_l(.) are the statistics of the chunk at the input of the l-th BatchNorm layer of f; mu_l and var_l
are the running statistics of that layer. A new network is trained on the images and on the teacher's labels of their
views (relabel), which the protocol of an evaluation does.

    symbol           code                             symbol             code
    x, c             ``images``, ``targets``          r                  ``weight_bn``
    f                ``Teacher``                      w_l                ``first_bn`` for the first layer, else 1
    A                ``ctx.task.augment``             mu_l(.), var_l(.)  ``Teacher.observer``
                                                      mu_l, var_l        ``Teacher.running``, ``real_statistics``

CDA: the smallest area of a crop of A falls from 1 to that of the recipe in the first ``milestone`` of the steps of a
chunk. LPLD (``per_class``): a chunk holds images of one class, and mu_l and var_l are those of its real images.

Deviations: see docs/methods/sre2l.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from condense import teachers
from condense.artifacts import ArtifactSpec
from condense.augment import Augment
from condense.method import Context, GradientState
from condense.methods.recovery import Recovery, by_class, noise, real
from condense.names import spelt
from condense.networks import default_for
from condense.task import Task
from condense.teachers import Statistics

Observer = Callable[[Tensor], tuple[Tensor, dict[str, Statistics]]]
"""See ``Teacher.observer``."""

BATCH = 256
"""Real images per forward pass, for the statistics of a class."""


@dataclass(frozen=True, kw_only=True)
class Inversion(Recovery):
    """Base class of methods that invert BatchNorm networks: classification and statistics of a view of a chunk."""

    weight_bn: float = 0.01
    """Weight of the differences between the statistics of a chunk and the running statistics."""
    first_bn: float = 10.0
    """Weight of the first BatchNorm layer; that of the others is 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(0, "weight_bn", "first_bn")

    def needs(self, task: Task) -> Mapping[str, ArtifactSpec]:
        needed = super().needs(task)
        for name in self.teachers:
            network = (task if name == teachers.OWN else task.with_network(name)).network
            if self.weight_bn and not teachers.has_batch_norm(network):
                field = "network" if name == teachers.OWN else "method.teachers"
                raise ValueError(
                    f"the teacher {network.name} has no BatchNorm layer, whose statistics the images are fitted to; "
                    f"give {spelt(field, f'{default_for(task.input_shape)}:norm=batch')}"
                )
        return needed

    def view(self, ctx: Context, step: int, images: Tensor, augment: Augment) -> Tensor:
        """Return the view A of a step; all images of a chunk share one draw."""
        drawn = augment.sample(ctx.rng("view", step), 1, ctx.task.input_shape, siamese=True)
        return augment.apply(images, drawn)

    def inversion(
        self, ctx: Context, state: GradientState, step: int, view: Tensor, targets: Tensor, label: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits of the teacher of this step, the cross-entropy and the weighted difference of statistics.

        Args:
            ctx, state, step: as for ``loss``.
            view: the view of a chunk.
            targets: its classes.
            label: compare with the real images of this class; None: with the running statistics.
        """
        turn = step % len(self.teachers)
        teacher = self.opened(ctx, state)[turn]
        observe = ctx.kept(f"observer {turn}", state, lambda: teacher.observer(ctx.compute))
        logits, of_batch = observe(view)
        if label is None:
            wanted = {name: teacher.running(name) for name in of_batch}
        else:
            wanted = self._of_class(ctx, state, turn, observe, label)
        distances = [
            (self.first_bn if k == 0 else 1.0) * statistics_distance(of_batch[name], wanted[name])
            for k, name in enumerate(of_batch)
        ]
        difference = torch.stack(distances).sum() if distances else logits.new_zeros(())
        return logits, F.cross_entropy(logits, targets), self.weight_bn * difference

    def _of_class(
        self, ctx: Context, state: GradientState, turn: int, observe: Observer, label: int
    ) -> dict[str, Statistics]:
        """Return the statistics of the real images of a class, which are kept until another class is asked for."""
        kept: dict[int, tuple[int, dict[str, Statistics]]] = ctx.kept("class statistics", state, dict)
        if turn not in kept or kept[turn][0] != label:
            members = ctx.task.train.by_class[label]
            kept[turn] = label, real_statistics(observe, (ctx.task.train.images[part] for part in members.split(BATCH)))
        return kept[turn][1]


@final
@dataclass(frozen=True, kw_only=True)
class SRe2L(Inversion):
    """Recovers images that a teacher classifies correctly and that have the statistics of its BatchNorm layers."""

    start: Literal["noise", "real"] = "noise"
    """Initial images: standard normal noise, or real ones drawn per class."""
    per_class: bool = False
    """Whether a chunk holds images of one class, which have the statistics of the real images of that class (LPLD)."""
    curriculum: Literal["none", "step", "linear", "cosine"] = "none"
    """How the smallest area of resized-crop falls from 1 to that of the augmentation (CDA): at once at the milestone,
    linearly or along half a cosine until the milestone; none: it does not change."""
    milestone: float = 1.0
    """Fraction of the steps at which the curriculum ends."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.milestone <= 1:
            raise ValueError(f"method.milestone must lie in (0, 1], got {self.milestone}; a usual value is 1")
        if self.curriculum == "step" and self.milestone == 1:
            raise ValueError(
                "method.curriculum step changes the crops at the milestone, which is the end; give "
                f"{spelt('method.milestone', 0.5)}"
            )

    def chunks(self, ctx: Context) -> Sequence[Tensor]:
        if self.per_class:
            return by_class(ctx.task.num_classes, ctx.images_per_class, self.chunk)
        return super().chunks(ctx)

    def init(self, ctx: Context) -> GradientState:
        if self.curriculum != "none" and "resized-crop" not in ctx.task.augment.ops:
            raise ValueError(
                f"the curriculum changes the crops of the augmentation, but {str(ctx.task.augment)!r} has none; give "
                f"{spelt('augment', 'resized-crop_flip:mode=M')} or {spelt('method.curriculum', 'none')}"
            )
        if self.start == "real":
            ctx.require_images()
        return super().init(ctx)

    def begin(self, ctx: Context, state: GradientState, rows: Tensor) -> Tensor:
        return noise(ctx, rows) if self.start == "noise" else ctx.task.train.images[real(ctx, rows)]

    def augment_at(self, augment: Augment, step: int) -> Augment:
        """Return the augmentation of a step of a chunk."""
        if self.curriculum == "none":
            return augment
        done = min(step / (self.milestone * self.num_steps), 1.0)
        left = {"step": float(done < 1), "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return replace(augment, min_area=augment.min_area + (1 - augment.min_area) * left[self.curriculum])

    def chunk_loss(
        self, ctx: Context, state: GradientState, step: int, rows: Tensor, images: Tensor, targets: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        augment = self.augment_at(ctx.task.augment, step % self.num_steps)
        label = int(rows[0]) // ctx.images_per_class if self.per_class else None
        view = self.view(ctx, step, images, augment)
        _, entropy, difference = self.inversion(ctx, state, step, view, targets, label)
        return entropy + difference, {"entropy": entropy, "statistics": difference}


def statistics_distance(one: Statistics, other: Statistics) -> Tensor:
    """Return || mean - mean' ||_2 + || var - var' ||_2."""
    return (one.mean - other.mean).norm() + (one.var - other.var).norm()


@torch.no_grad()
def real_statistics(observe: Observer, batches: Iterable[Tensor]) -> dict[str, Statistics]:
    """Return the statistics of all images of some batches in each BatchNorm layer of a teacher."""
    num, sums = 0, dict[str, tuple[Tensor, Tensor]]()
    for images in batches:
        num += len(images)
        for name, (mean, var) in observe(images)[1].items():
            first, second = sums.get(name, (0.0, 0.0))
            mean, var = mean.cpu().double(), var.cpu().double()  # mps has no float64
            sums[name] = first + len(images) * mean, second + len(images) * (var + mean.square())
    return {
        name: Statistics(*(x.float().to(images.device) for x in (first / num, second / num - (first / num).square())))
        for name, (first, second) in sums.items()
    }
