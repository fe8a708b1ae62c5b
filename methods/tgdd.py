"""TGDD: distribution matching along the training trajectories of experts (AAAI 2026, github.com/FlyFinley/TGDD).

    min_S  E_{m, s, e, omega}  sum_c ( || mean_{x in B_c} psi_{m,s}(A(x)) - mean_{x in S_c} psi_{m,s}(A(x)) ||^2
                                       + a mean_{x in S_c} l(phi_{m,e}(A(x)), c) )

The random network of DM is replaced by an expert m after s epochs of its training on real data. The same expert after a
few more epochs, e, has to recognise the images. A stored image is decoded into several by the recipe's ``decode``.

    symbol   code
    S_c      decoded images of class c
    B_c      ``batch_real`` real images of class c, drawn at every step
    psi      ``ctx.features``: the input of the classifier, in training mode, under ``state.params``
    phi, l   logits in evaluation mode under ``state.classifier_params``; cross-entropy
    s        uniform over 0 .. ``last_epoch``
    e        uniform over s .. min(s + ``interval`` - 1, ``last_epoch``)
    a        ``weight``
    A        the ``matched`` operations of ``task.augment``; omega is drawn once for both batches of a class

Deviations: see docs/methods/tgdd.md.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor

from condense.artifacts import ArtifactSpec, TrajectorySpec
from condense.augment import Augment
from condense.match import summed_in_chunks
from condense.method import Context, Optim
from condense.methods.dm import DistributionMatching, DMState
from condense.methods.idc import beside_cutmix
from condense.methods.mtt import experts_of
from condense.networks import Weights
from condense.objective import ObjectiveName
from condense.schedule import Schedule
from condense.synthetic import SyntheticSet
from condense.task import Task
from condense.teachers import Teacher, assign
from condense.train import Training


@dataclass(kw_only=True)
class ExpertState(DMState):
    classifier_params: dict[str, Tensor]
    """Weights of the network that classifies the images in the next step."""
    classifier_buffers: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class ExpertMatching(DistributionMatching):
    """Base class of TGDD and NCFM: each step has a network to match and a classifier, both made of an expert."""

    objectives: ClassVar[tuple[ObjectiveName, ...]] = ("cross-entropy",)
    has_teacher: ClassVar[bool] = True

    clamp: bool = True
    """Whether to clamp pixels to [0, 1] after each update."""
    last_epoch: int = 60
    """Last epoch of the experts that is used."""
    matched: tuple[str, ...] = ("color", "crop", "cutout")
    """Operations of the recipe's augmentation that are used in matching."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "last_epoch")
        Augment(self.matched)  # raises ValueError for unknown operations

    @abstractmethod
    def networks(self, ctx: Context, step: int) -> tuple[Weights, Weights]:
        """Return the weights for a step: of the network whose features are matched, and of the classifier."""

    def needs(self, task: Task) -> Mapping[str, ArtifactSpec]:
        return {"experts": TrajectorySpec(identity=task.identity(), num_epochs=self.last_epoch)}

    def augment(self, ctx: Context) -> Augment:
        return ctx.task.augment.only(self.matched)

    def init(self, ctx: Context) -> ExpertState:
        syn = ctx.new_set(*ctx.initial(self.start))
        matched, classifier = self.networks(ctx, 0)
        return ExpertState(
            syn=syn,
            optimisers=self.optimisers(syn),
            params=matched.params,
            buffers={name: buffer.clone() for name, buffer in matched.buffers.items()},
            classifier_params=classifier.params,
            classifier_buffers=classifier.buffers,
        )

    def cross_entropy(self, ctx: Context, state: DMState, classes: Sequence[int], syn: Sequence[Tensor]) -> Tensor:
        """Return the sum over classes of the classifier's mean cross-entropy on images (n, C, H, W) of the class."""
        assert isinstance(state, ExpertState)
        classifier = Teacher(ctx.task.network, Weights(state.classifier_params, state.classifier_buffers))
        label = ctx.kept("classifier", state, lambda: classifier.labeller(ctx.compute))

        def entropy(images: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            return F.cross_entropy(label(images), targets, reduction="none") @ weights

        targets = [torch.full((len(x),), c, device=x.device) for c, x in zip(classes, syn, strict=True)]
        weights = [x.new_full((len(x),), 1 / len(x)) for x in syn]
        inputs = [torch.cat(list(part)) for part in (syn, targets, weights)]
        return summed_in_chunks(entropy, inputs, ctx.compute.micro_batch)

    def after(self, ctx: Context, state: DMState, step: int) -> None:
        assert isinstance(state, ExpertState)
        matched, classifier = self.networks(ctx, step + 1)
        Weights(state.params, state.buffers).assign(matched)
        Weights(state.classifier_params, state.classifier_buffers).assign(classifier)

    def finalize(self, ctx: Context, state: DMState, steps: int) -> SyntheticSet:
        """Return the set to store. Its ``teacher`` labels are the mean softmax of the experts after ``last_epoch``."""
        syn, network, experts = super().finalize(ctx, state, steps), ctx.task.network, experts_of(ctx)
        if ctx.labels.name != "teacher":
            return syn
        labelled = copy.deepcopy(syn)
        ends = (experts.weights(expert, network, self.last_epoch) for expert in range(experts.num_experts))
        assign(labelled, [Teacher(network, end).labeller(ctx.compute) for end in ends])
        return labelled


@final
@dataclass(frozen=True, kw_only=True)
class TGDD(ExpertMatching):
    """Matches mean features under checkpoints of experts; later checkpoints classify the images."""

    num_steps: int = 10000
    """Number of updates of the images, each with other checkpoints."""
    optim: Optim = Optim(lr=4.95, momentum=0.0)
    """Optimiser of the images (latents). The default corresponds to the published learning rate 0.1 and momentum 0.5
    for 10 images per class of CIFAR-10; see docs/methods/tgdd.md."""
    batch_real: int = 128
    """Real images per class in each step; all of them if a class has fewer."""
    interval: int = 7
    """Number of epochs, beginning with that of the matched checkpoint, from which the later one is drawn."""
    weight: float = 2.5
    """Weight of the cross-entropy of the later checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "interval")
        self.require_at_least(0, "weight")

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        return self.num_steps * num_classes * (self.batch_real / 3 + 2 * images_per_class)

    def training(self, task: Task) -> Training:
        schedule = Schedule(drop_at=(2 / 3, 5 / 6), drop_factor=0.2)
        return Training(num_epochs=1500, batch_size=64, schedule=schedule, cutmix=0.5)

    def training_augment(self, task: Task) -> Augment:
        return beside_cutmix(super().training_augment(task), 0.5)

    def networks(self, ctx: Context, step: int) -> tuple[Weights, Weights]:
        experts, draws, network = experts_of(ctx), ctx.rng("checkpoints", step), ctx.task.network
        expert, start = draws.integer(0, experts.num_experts), draws.integer(0, self.last_epoch + 1)
        end = draws.integer(start, min(start + self.interval, self.last_epoch + 1))
        return experts.weights(expert, network, start), experts.weights(expert, network, end)

    def distance(
        self,
        ctx: Context,
        state: DMState,
        step: int,
        classes: Sequence[int],
        real: Sequence[Tensor],
        syn: Sequence[Tensor],
    ) -> Tensor:
        matched = super().distance(ctx, state, step, classes, real, syn)
        return matched + self.weight * self.cross_entropy(ctx, state, classes, syn)
