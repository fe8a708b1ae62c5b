"""TGDD: distribution matching along the training trajectories of experts (AAAI 2026, github.com/FlyFinley/TGDD).

    min_S  E_{m, s, e, omega}  sum_c ( || mean_{x in B_c} psi_{m,s}(A(x)) - mean_{x in S_c} psi_{m,s}(A(x)) ||^2
                                       + a mean_{x in S_c} l(phi_{m,e}(A(x)), c) )

The random network of DM is replaced by an expert m after s epochs of its training on real data. The same expert after a
few more epochs, e, has to recognise the images. A stored image is decoded into several by the recipe's ``decode``.

    symbol   code
    S_c      decoded images of class c
    B_c      ``batch_real`` real images of class c, drawn at every step
    psi      ``ctx.features``: the input of the classifier, in training mode, under ``state.params``
    phi, l   logits in evaluation mode under ``state.later_params``; cross-entropy
    s        uniform over 0 .. ``last_epoch``
    e        uniform over s .. min(s + ``interval`` - 1, ``last_epoch``)
    a        ``weight``
    A        the ``matched`` operations of ``task.augment``; omega is drawn once for both batches of a class

Deviations: see docs/methods/tgdd.md.
"""

from __future__ import annotations

import copy
import functools
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
from condense.methods.dm import DistributionMatching, DMState, Features
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
class TGDDState(DMState):
    later_params: dict[str, Tensor]
    """Weights of the later checkpoint of the next step."""
    later_buffers: dict[str, Tensor]


@final
@dataclass(frozen=True, kw_only=True)
class TGDD(DistributionMatching):
    """Matches mean features under checkpoints of experts; later checkpoints classify the images."""

    objectives: ClassVar[tuple[ObjectiveName, ...]] = ("cross-entropy",)
    has_teacher: ClassVar[bool] = True

    num_steps: int = 10000
    """Number of updates of the images, each with other checkpoints."""
    optim: Optim = Optim(lr=4.95, momentum=0.0)
    """Optimiser of the images (latents). The default corresponds to the published learning rate 0.1 and momentum 0.5
    for 10 images per class of CIFAR-10; see docs/methods/tgdd.md."""
    clamp: bool = True
    """Whether to clamp pixels to [0, 1] after each update."""
    batch_real: int = 128
    """Real images per class in each step; all of them if a class has fewer."""
    last_epoch: int = 60
    """Last epoch of the experts from which checkpoints are drawn."""
    interval: int = 7
    """Number of epochs, beginning with that of the matched checkpoint, from which the later one is drawn."""
    weight: float = 2.5
    """Weight of the cross-entropy of the later checkpoint."""
    matched: tuple[str, ...] = ("color", "crop", "cutout")
    """Operations of the recipe's augmentation that are used in matching."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "last_epoch", "interval")
        self.require_at_least(0, "weight")
        Augment(self.matched)  # raises ValueError for unknown operations

    def needs(self, task: Task) -> Mapping[str, ArtifactSpec]:
        return {"experts": TrajectorySpec(identity=task.identity(), num_epochs=self.last_epoch)}

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        return self.num_steps * num_classes * (self.batch_real / 3 + 2 * images_per_class)

    def training(self, task: Task) -> Training:
        schedule = Schedule(drop_at=(2 / 3, 5 / 6), drop_factor=0.2)
        return Training(num_epochs=1500, batch_size=64, schedule=schedule, cutmix=0.5)

    def training_augment(self, task: Task) -> Augment:
        return beside_cutmix(super().training_augment(task), 0.5)

    def augment(self, ctx: Context) -> Augment:
        return ctx.task.augment.only(self.matched)

    def init(self, ctx: Context) -> TGDDState:
        syn = ctx.new_set(*ctx.initial(self.start))
        (params, buffers), later = self.checkpoints(ctx, 0)
        return TGDDState(
            syn=syn,
            optimisers=self.optimisers(syn),
            params=params,
            buffers=buffers,
            later_params=later.params,
            later_buffers=later.buffers,
        )

    def checkpoints(self, ctx: Context, step: int) -> tuple[Weights, Weights]:
        """Return the weights of an expert for a step: of the matched checkpoint and of the later one."""
        experts, draws, network = experts_of(ctx), ctx.rng("checkpoints", step), ctx.task.network
        expert, start = draws.integer(0, experts.num_experts), draws.integer(0, self.last_epoch + 1)
        end = draws.integer(start, min(start + self.interval, self.last_epoch + 1))
        return experts.weights(expert, network, start), experts.weights(expert, network, end)

    def features(self, ctx: Context, state: DMState) -> Features:
        return functools.partial(ctx.features, state.params, state.buffers)

    def distance(
        self, ctx: Context, state: DMState, classes: Sequence[int], real: Sequence[Tensor], syn: Sequence[Tensor]
    ) -> Tensor:
        assert isinstance(state, TGDDState)
        later = Teacher(ctx.task.network, Weights(state.later_params, state.later_buffers))
        label = ctx.kept("logits", state, lambda: later.labeller(ctx.compute))

        def entropy(images: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
            return F.cross_entropy(label(images), targets, reduction="none") @ weights

        targets = [torch.full((len(x),), c, device=x.device) for c, x in zip(classes, syn, strict=True)]
        weights = [x.new_full((len(x),), 1 / len(x)) for x in syn]
        inputs = [torch.cat(list(part)) for part in (syn, targets, weights)]
        wrong = summed_in_chunks(entropy, inputs, ctx.compute.micro_batch)
        return super().distance(ctx, state, classes, real, syn) + self.weight * wrong

    def after(self, ctx: Context, state: DMState, step: int) -> None:
        assert isinstance(state, TGDDState)
        checkpoint, later = self.checkpoints(ctx, step + 1)
        Weights(state.params, state.buffers).assign(checkpoint)
        Weights(state.later_params, state.later_buffers).assign(later)

    def finalize(self, ctx: Context, state: DMState, steps: int) -> SyntheticSet:
        """Return the set to store. Its ``teacher`` labels are the mean softmax of the experts after ``last_epoch``."""
        syn, network, experts = super().finalize(ctx, state, steps), ctx.task.network, experts_of(ctx)
        if ctx.labels.name != "teacher":
            return syn
        labelled = copy.deepcopy(syn)
        ends = (experts.weights(expert, network, self.last_epoch) for expert in range(experts.num_experts))
        assign(labelled, [Teacher(network, end).labeller(ctx.compute) for end in ends])
        return labelled
