"""CIM: paired alignment of mosaics of selected real images with the images themselves (github.com/LINs-lab/CIM).

The real images of a class that a trained network, the teacher, classifies best are reduced and tiled, f x f of them in
an image. Then the mosaics are learned so that each tile, enlarged, looks to the teacher as the whole image did:

    min_S  sum_c sum_j  mean_units | z(A(x_j)) - z(A(up_j(S_c))) |
    x_1 .. x_{n f^2}  the images of class c with the largest log phi_c(x)

    symbol  code
    phi     ``teachers``, softmax of the logits
    z       ``block`` of the teachers in evaluation mode
    A       ``augment`` of the step and the class, one draw for all images
    up_j    ``tiles``, tile j of the mosaics, enlarged
    f       ``factor``
    n       ``ctx.images_per_class``
    x_j     ``ctx.task.train.images[state.originals[c]]``

Deviations: see docs/methods/cim.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from condense.artifacts import ArtifactSpec
from condense.augment import Augment
from condense.data.layout import Kind
from condense.method import Context, GradientMethod, GradientState, Optim
from condense.methods import mosaic
from condense.mosaic import enlarged, tiles_of
from condense.schedule import Schedule
from condense.synthetic.decode import Factor
from condense.synthetic.set import SyntheticSet
from condense.task import Task
from condense.teachers import OWN, Teacher, assign, needed, opened
from condense.train import Training


@dataclass(kw_only=True)
class CIMState(GradientState):
    originals: Tensor
    """Indices (num_classes, n f^2) of the training images whose reduced copies are the tiles."""


@final
@dataclass(frozen=True, kw_only=True)
class CIM(GradientMethod):
    """Mosaics of real images, learned so that a trained network sees each tile as the whole image it was made of."""

    family: ClassVar[str] = "decoupled"
    learns_labels: ClassVar[bool] = False
    has_teacher: ClassVar[bool] = True
    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    num_steps: int = 200
    """Number of updates of all mosaics."""
    optim: Optim = Optim(kind="adam", lr=0.04, momentum=0.9)
    """Optimiser of the images (latents)."""
    teachers: tuple[str, ...] = (OWN,)
    """Networks that select the images and whose features are matched; same is the recipe's network."""
    factor: int = 2
    """Number of tiles along each side of an image."""
    num_candidates: int = 300
    """Real images per class from which those of the mosaics are selected; all of them if a class has fewer."""
    block: str = ""
    """Name of the module of the teachers whose output is matched. Empty: the input of their classifier."""
    matched: tuple[str, ...] = ("flip", "crop", "cutout")
    """Operations of the recipe's augmentation that are used in matching."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "num_candidates")
        if not 1 <= self.factor <= 9:
            raise ValueError(f"method.factor must be from 1 to 9, got {self.factor}; the published value is 2")
        Augment(self.matched)  # raises ValueError for unknown operations

    def needs(self, task: Task) -> Mapping[str, ArtifactSpec]:
        return needed(self.teachers, task)

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        passes = self.num_steps * images_per_class * self.factor**2 * 4 / 3
        return num_classes * len(self.teachers) * (self.num_candidates / 3 + passes)

    def training(self, task: Task) -> Training:
        return Training(
            num_epochs=1000,
            batch_size=50,
            optimiser="adamw",
            lr=1e-3,
            weight_decay=1e-4,
            schedule=Schedule(drop_at=(2 / 3, 5 / 6), drop_factor=0.2),
        )

    def training_augment(self, task: Task) -> Augment:
        return replace(super().training_augment(task), tile=self.factor)

    def parts(self, ctx: Context) -> Sequence[int]:
        return range(ctx.task.num_classes)

    def graphs(self, ctx: Context) -> bool:
        return True

    def init(self, ctx: Context) -> CIMState:
        task = ctx.task
        mosaic.require_mosaics(ctx, self.factor, self.num_candidates)
        for name in set(self.teachers) if self.block else ():
            (task if name == OWN else task.with_network(name)).network.require_capture(self.block)
        originals, labels, reduce = self.selected(ctx), ctx.classes, Factor(factor=self.factor)
        mosaics = [
            reduce.encode(task.train.images[index], labels, torch.nn.Identity(), ctx.rng.generator("unused"))
            for index in originals
        ]
        syn = ctx.new_set(torch.cat(mosaics), labels)
        return CIMState(syn=syn, optimisers=self.optimisers(syn), originals=originals)

    def selected(self, ctx: Context) -> Tensor:
        """Return the indices (num_classes, n f^2) of the training images of the mosaics; the best ones come first."""
        teachers, selected = mosaic.labellers(self.teachers, ctx), list[Tensor]()
        for c in range(ctx.task.num_classes):
            index = mosaic.candidates(ctx, c, self.num_candidates)
            scores = mosaic.realism(teachers, ctx.task.train.images[index], c)
            selected.append(index[mosaic.best(scores, ctx.images_per_class * self.factor**2).to(index.device)])
        return torch.stack(selected)

    def augment(self, ctx: Context) -> Augment:
        """The augmentation of the matched images."""
        return ctx.task.augment.only(self.matched)

    def features(self, ctx: Context, state: CIMState) -> list[Callable[[Tensor], Tensor]]:
        """Return for each teacher z: maps images (N, C, H, W) to its features (N, ...)."""
        return ctx.kept("features", state, lambda: [self._features(ctx, one) for one in opened(self.teachers, ctx)])

    def _features(self, ctx: Context, teacher: Teacher) -> Callable[[Tensor], Tensor]:
        network, weights = teacher

        def features(images: Tensor) -> Tensor:
            if not self.block:
                return network.features(*weights, images, train=False).float()
            return network.capture(*weights, images, self.block, train=False).values[self.block].float()

        compiled = ctx.compute.first_order(features, network.device)
        return lambda images: compiled(ctx.compute.layout(images))

    def tiles(self, ctx: Context, state: CIMState, label: int) -> Tensor:
        """Return the enlarged tiles (n f^2, C, H, W) of a class, in the order of their originals."""
        images, _ = state.syn(state.syn.index_of(label))
        in_order = images.unflatten(0, (ctx.decode.expansion, -1)).transpose(0, 1).flatten(0, 1)
        height, width = ctx.task.input_shape[1:]
        return enlarged(tiles_of(in_order, self.factor), (height, width))

    def loss(self, ctx: Context, state: CIMState, step: Any, part: int) -> Tensor:
        augment, originals = self.augment(ctx), ctx.task.train.images[state.originals[part]]
        drawn = augment.sample(ctx.rng("siamese", step, part), 1, ctx.task.input_shape, siamese=True)
        real, syn = (
            augment.apply(augment.mirrored(images, images)[0], drawn)
            for images in (originals, self.tiles(ctx, state, part))
        )
        losses = []
        for features in self.features(ctx, state):
            with torch.no_grad():
                wanted = features(real)
            losses.append((features(syn) - wanted).abs().flatten(1).mean(1).sum())
        return torch.stack(losses).mean()

    def finalize(self, ctx: Context, state: CIMState, steps: int) -> SyntheticSet:
        syn = copy.deepcopy(super().finalize(ctx, state, steps))
        assign(syn, mosaic.labellers(self.teachers, ctx))
        return syn
