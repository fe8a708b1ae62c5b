"""DM: Zhao and Bilen, "Dataset Condensation with Distribution Matching", WACV 2023.

    min_S  E_{theta, omega}  sum_c || mean_{x in B_c} psi(A(x)) - mean_{s in S_c} psi(A(s)) ||^2

psi has fresh random weights theta at every step. No network is trained and no second-order gradients are needed.

    symbol  code
    S_c     ``state.syn`` at the latents of class c
    B_c     ``batch_real`` real images of class c, drawn at every step
    psi     ``ctx.features``: the input of the network's classifier, in training mode
    theta   ``state.params`` and ``state.buffers``, drawn for the step
    A       ``augment``; its parameters omega are drawn once for both batches of a class

Deviations: see docs/methods/dm.md.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from condense.augment import Augment, Params
from condense.match import feature_matching_loss, feature_mean_distance
from condense.method import Context, GradientMethod, GradientState, Optim
from condense.networks import Weights
from condense.objective import OBJECTIVES, ObjectiveName
from condense.synthetic import SyntheticSet
from condense.task import Task
from condense.teachers import has_batch_norm
from condense.train import Training

Features = Callable[[Tensor], Tensor]


@dataclass(kw_only=True)
class DMState(GradientState):
    params: dict[str, Tensor]
    """Weights of the network for the next step."""
    buffers: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class DistributionMatching(GradientMethod):
    """Base class of methods that match the features of real and synthetic images of each class under one network."""

    family: ClassVar[str] = "distribution and attention matching"

    learns_labels: ClassVar[bool] = False
    objectives: ClassVar[tuple[ObjectiveName, ...]] = tuple(OBJECTIVES)

    num_steps: int = 20000
    """Number of updates of the images, each with a fresh network."""
    optim: Optim = Optim(lr=1.0)
    """Optimiser of the images (latents)."""
    start: Literal["real", "noise"] = "real"
    """Initial images: real ones drawn per class, or standard normal noise."""
    batch_real: int = 256
    """Real images per class in each step; all of them if a class has fewer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_real < 1:
            raise ValueError(f"method.batch_real must be at least 1, got {self.batch_real}; the published value is 256")

    def features(self, ctx: Context, state: DMState) -> Features:
        """psi of the step: maps images (N, C, H, W) to the features (N, F) whose class means are compared."""
        return functools.partial(ctx.features, state.params, state.buffers)

    def augment(self, ctx: Context) -> Augment:
        """The augmentation of the matched images."""
        return ctx.task.augment

    def graphs(self, ctx: Context) -> bool:
        return True

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        return self.num_steps * num_classes * (self.batch_real / 3 + images_per_class)

    def init(self, ctx: Context) -> DMState:
        syn = ctx.new_set(*ctx.initial(self.start))
        params, buffers = ctx.task.network.init(ctx.rng, "network", 0)
        return DMState(syn=syn, optimisers=self.optimisers(syn), params=params, buffers=buffers)

    def parts(self, ctx: Context) -> Sequence[int]:
        """One part per class; one part for all classes if the network has BatchNorm, whose statistics mix them."""
        return (0,) if has_batch_norm(ctx.task.network) else range(ctx.task.num_classes)

    def parts_at_once(self, ctx: Context) -> int:
        return max(1, (ctx.compute.micro_batch or 1) // ctx.images_per_class)

    def loss(self, ctx: Context, state: DMState, step: int, part: int) -> Tensor:
        return self.losses(ctx, state, step, (part,))

    def losses(self, ctx: Context, state: DMState, step: int, parts: Sequence[int]) -> Tensor:
        classes = self.classes(ctx, parts)
        real, syn = pairs(ctx, self.augment(ctx), state.syn, step, classes, self.batch_real)
        return self.distance(ctx, state, step, classes, real, syn)

    def classes(self, ctx: Context, parts: Sequence[int]) -> Sequence[int]:
        """The classes of parts of a step."""
        return range(ctx.task.num_classes) if has_batch_norm(ctx.task.network) else parts

    def distance(
        self,
        ctx: Context,
        state: DMState,
        step: int,
        classes: Sequence[int],
        real: Sequence[Tensor],
        syn: Sequence[Tensor],
    ) -> Tensor:
        """Return the sum over classes of the distance between augmented real and synthetic images (n, C, H, W)."""
        mixed = has_batch_norm(ctx.task.network)
        features, most = self.features(ctx, state), ctx.compute.micro_batch
        with torch.no_grad():
            wanted = _groups_features(features, real) if mixed else _means(features, real, most)
        if most is not None and not mixed and len(syn) == 1 and len(syn[0]) > most:
            return feature_matching_loss(features, wanted[0].mean(0), syn[0], most)
        both = zip(wanted, _groups_features(features, syn), strict=True)
        return torch.stack([feature_mean_distance(r, s) for r, s in both]).sum()

    def after(self, ctx: Context, state: DMState, step: int) -> None:
        weights, network = Weights(state.params, state.buffers), ctx.task.network
        ctx.graphed("network", state, lambda step: weights.assign(network.init(ctx.rng, "network", step + 1)))(step)


@final
@dataclass(frozen=True, kw_only=True)
class DM(DistributionMatching):
    """Matches the mean features of real and synthetic images of each class under random networks."""

    def training(self, task: Task) -> Training:
        return Training(num_epochs=1000)


def pairs(
    ctx: Context, augment: Augment, syn: SyntheticSet, step: int, classes: Sequence[int], batch_real: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Real and synthetic images (n, C, H, W) of each class, both under the same augmentation."""
    augmented = []
    for c in classes:
        real = ctx.task.train.draw(c, batch_real, ctx.rng("real", step, c))
        images, drawn = synthetic(ctx, augment, syn, step, c)
        augmented.append((augment.apply(real, drawn), images))
    return [real for real, _ in augmented], [images for _, images in augmented]


def synthetic(ctx: Context, augment: Augment, syn: SyntheticSet, step: int, c: int) -> tuple[Tensor, Params]:
    """Augmented synthetic images (n, C, H, W) of a class, and the parameters, under which its real ones are matched."""
    drawn = augment.sample(ctx.rng("siamese", step, c), 1, ctx.task.input_shape, siamese=True)
    images, _ = augment.mirrored(*syn(syn.index_of(c)))
    return augment.apply(images, drawn), drawn


def _groups_features(features: Features, groups: Sequence[Tensor]) -> Sequence[Tensor]:
    """Features (n_i, F) of groups of images (n_i, C, H, W), in one forward pass."""
    return features(torch.cat(list(groups))).split([len(x) for x in groups])


def _means(features: Features, groups: Sequence[Tensor], micro_batch: int | None) -> list[Tensor]:
    """The mean feature (1, F) of each group, with as many groups in one forward pass as ``micro_batch`` allows."""
    means, first = list[Tensor](), 0
    while first < len(groups):
        ends = itertools.accumulate(len(images) for images in groups[first:])
        num = max(1, sum(micro_batch is None or end <= micro_batch for end in ends))
        if num == 1:
            means.append(_mean_features(features, groups[first], micro_batch))
        else:
            means += [x.mean(0, keepdim=True) for x in _groups_features(features, groups[first : first + num])]
        first += num
    return means


def _mean_features(features: Features, images: Tensor, micro_batch: int | None) -> Tensor:
    """The mean feature (1, F) of images (n, C, H, W)."""
    chunks = images.split(micro_batch or len(images))
    return torch.stack([features(x).sum(0) for x in chunks]).sum(0, keepdim=True) / len(images)
