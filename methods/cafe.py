"""CAFE: Wang et al., "CAFE: Learning to Condense Dataset by Aligning Features", CVPR 2022.

    min_S  E_theta  sum_l w_l sum_c || mean_{x in B_c} f_l(A(x)) - mean_{s in S_c} f_l(A(s)) ||^2
                    + beta sum_c sum_{x in B_c} -log softmax_c( <psi(A(x)), m_1>, ..., <psi(A(x)), m_C> )

    m_k = mean_{s in S_k} psi(A(s))

The class means of S match those of B in every layer l, and used as a classifier they separate real images. theta is a
student. Between two updates of S it is trained on S until its accuracy on real images has changed within the last
epochs. It is replaced by a fresh one when its accuracy hardly changes from update to update.

    symbol  code
    S_c     ``state.syn`` at the latents of class c
    B_c     ``batch_real`` real images of class c, drawn at every step
    f_l     ``ctx.maps``: the output of activation l before pooling; the last level is psi
    psi     the input of the network's classifier
    w_l     ``weight_early``, ``weight_last``, ``weight_features``
    beta    ``discrimination``
    theta   ``state.params``, ``state.buffers``
    A       ``task.augment``; its parameters are drawn once for both batches of a class

Deviations: see docs/methods/cafe.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import ClassVar, Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from condense.compute import Compute
from condense.method import Context, GradientMethod, GradientState, Loss, Optim
from condense.methods.dm import pairs
from condense.networks import Functional, Weights
from condense.schedule import Schedule
from condense.task import Task
from condense.teachers import has_batch_norm
from condense.train import Scorer, Trainer, Training


@dataclass(kw_only=True)
class CAFEState(GradientState):
    params: dict[str, Tensor]
    """Weights of the student for the next step."""
    buffers: dict[str, Tensor]
    updates: int = 0
    """Number of updates of the set since the student was initialised."""
    accuracies: list[float] = field(default_factory=list)
    """Accuracies of the student on real images after the last of these updates, at most ``window``."""


@final
@dataclass(frozen=True, kw_only=True)
class CAFE(GradientMethod):
    """Aligns the features of each layer and classifies real images by the class means of the set."""

    family: ClassVar[str] = "distribution and attention matching"

    learns_labels: ClassVar[bool] = False

    num_steps: int = 20000
    """Number of updates of the images. The published number is 2000 students with ``window`` updates or more each."""
    optim: Optim = Optim(lr=0.1, momentum=0.5, schedule=Schedule(drop_at=(0.6, 0.8, 0.9), drop_factor=0.5))
    """Optimiser of the images (latents)."""
    start: Literal["real", "noise"] = "noise"
    """Initial images: real ones drawn per class, or standard normal noise."""
    batch_real: int = 256
    """Real images per class in each step; all of them if a class has fewer."""
    weight_early: float = 0.1
    """Weight of each feature map except the last in the alignment loss."""
    weight_last: float = 1.0
    """Weight of the last feature map in the alignment loss."""
    weight_features: float = 2.0
    """Weight of the features (the input of the classifier) in the alignment loss."""
    discrimination: float = 0.01
    """Weight of the discrimination loss, the cross-entropy summed over real images."""
    lr_student: float = 0.01
    """Learning rate of SGD without momentum, which trains the student."""
    batch_student: int = 256
    """Batch size of the student."""
    batch_probe: int = 128
    """Real training images per class on which the student's accuracy is measured, drawn for each measurement."""
    window: int = 10
    """Number of recent accuracies of the student that are compared; ``moved`` and ``settled`` need that many."""
    moved: float = 0.03
    """Threshold that ends the training of the student between two updates: the range of its accuracies after the last
    ``window`` epochs exceeds this value."""
    settled: float = 0.04
    """Threshold for replacing the student: the range of its accuracies after the last ``window`` updates is below this
    value."""
    max_epochs: int = 50
    """Largest number of epochs of the student between two updates."""
    max_updates: int = 50
    """Largest number of updates of the images before the student is replaced."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "batch_real", "batch_student", "batch_probe", "window", "max_updates")
        self.require_at_least(0, "weight_early", "weight_last", "weight_features", "discrimination", "max_epochs")
        self.require_positive("lr_student")

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        epochs = min(self.window, self.max_epochs)  # the least possible number between two updates
        forward = self.batch_real + (1 + epochs) * self.batch_probe
        return self.num_steps * num_classes * (forward / 3 + (1 + epochs) * images_per_class)

    def training(self, task: Task) -> Training:
        return Training(num_epochs=1000 if task.augment.ops else 600)

    def init(self, ctx: Context) -> CAFEState:
        ctx.task.network.require_maps()
        syn = ctx.new_set(*ctx.initial(self.start))
        params, buffers = ctx.task.network.init(ctx.rng, "student", 0)
        return CAFEState(syn=syn, optimisers=self.optimisers(syn), params=params, buffers=buffers)

    def loss(self, ctx: Context, state: CAFEState, step: int, part: int) -> Loss:
        real, syn = pairs(ctx, ctx.task.augment, state.syn, step, range(ctx.task.num_classes), self.batch_real)
        levels = partial(_levels, ctx, state)
        with torch.no_grad():
            if has_batch_norm(ctx.task.network):
                wanted = _together(levels, real)
            else:
                wanted = [_in_chunks(levels, images, ctx.compute.micro_batch) for images in real]
        synthetic = _together(levels, syn)
        aligned = self.alignment(wanted, synthetic)
        discriminated = self.discrimination * discrimination(wanted, synthetic)
        return aligned + discriminated, {"alignment": aligned, "discrimination": discriminated}

    def alignment(self, real: Sequence[Levels], syn: Sequence[Levels]) -> Tensor:
        """The weighted sum over levels of the squared distances between the class means."""
        weights = [self.weight_early] * (len(real[0].means) - 2) + [self.weight_last, self.weight_features]
        distances = [
            weight * (r - s).square().sum()
            for a, b in zip(real, syn, strict=True)
            for weight, r, s in zip(weights, a.means, b.means, strict=True)
        ]
        return torch.stack(distances).sum()

    def after(self, ctx: Context, state: CAFEState, step: int) -> None:
        """Train the student on the set until its accuracy has changed, or replace it if it hardly changes any more."""
        student = Weights(state.params, state.buffers)
        accuracy = self.accuracy(ctx, student, step, 0)
        state.accuracies = [*state.accuracies, accuracy][-self.window :]
        state.updates += 1
        settled = len(state.accuracies) == self.window and _spread(state.accuracies) < self.settled
        if settled or state.updates == self.max_updates:
            student.assign(ctx.task.network.init(ctx.rng, "student", step + 1))
            state.updates, state.accuracies = 0, []
            return
        with torch.no_grad():
            images, targets = state.syn()
        trainer, recent = self._compiled(ctx).trainer, list[float]()
        for epoch in range(1, self.max_epochs + 1):
            rng = ctx.rng.child("training", f"{step}/{epoch}")
            student = trainer.run(student, trainer.source(images, targets, rng, ctx.task.augment))
            recent = [*recent, self.accuracy(ctx, student, step, epoch)][-self.window :]
            if len(recent) == self.window and _spread(recent) > self.moved:
                break
        Weights(state.params, state.buffers).assign(student)

    def accuracy(self, ctx: Context, student: Weights, step: int, epoch: int) -> float:
        """The accuracy of a student after ``epoch`` epochs that follow ``step``, on real training images drawn anew."""
        train, classes = ctx.task.train, range(ctx.task.num_classes)
        batches = [train.draw(c, self.batch_probe, ctx.rng("probe", step, f"{epoch}/{c}")) for c in classes]
        return self._compiled(ctx).scorer.accuracy(student, torch.cat(batches), _classes(batches))

    def _compiled(self, ctx: Context) -> _Compiled:
        training = Training(
            num_epochs=1,
            batch_size=self.batch_student,
            lr=self.lr_student,
            momentum=0.0,
            weight_decay=0.0,
            schedule=Schedule(),
        )
        return _compile(ctx.task.network, training, ctx.compute)


class Levels(NamedTuple):
    """Outputs of a network for the images of one class."""

    means: list[Tensor]
    """Mean over the images of each feature map (c, h, w) and of the features (F,)."""
    features: Tensor
    """(n, F)"""


def discrimination(real: Sequence[Levels], syn: Sequence[Levels]) -> Tensor:
    """The cross-entropy, summed over all real images, of a classifier whose rows are the synthetic class means."""
    centres = torch.stack([levels.features.mean(0) for levels in syn])
    features = [levels.features for levels in real]
    return F.cross_entropy(torch.cat(features) @ centres.T, _classes(features), reduction="sum")


def _levels(ctx: Context, state: CAFEState, images: Tensor) -> list[Tensor]:
    maps, features = ctx.maps(state.params, state.buffers, images)
    return [*maps, features]


def _together(levels: Callable[[Tensor], list[Tensor]], groups: Sequence[Tensor]) -> list[Levels]:
    """The levels of groups of images (n_i, C, H, W), computed in one forward pass."""
    split = [level.split([len(images) for images in groups]) for level in levels(torch.cat(list(groups)))]
    return [Levels([level.mean(0) for level in group], group[-1]) for group in zip(*split, strict=True)]


def _in_chunks(levels: Callable[[Tensor], list[Tensor]], images: Tensor, micro_batch: int | None) -> Levels:
    """The levels of images (n, C, H, W), computed with ``micro_batch`` images per forward pass."""
    sums, features = [], []
    for chunk in images.split(micro_batch or len(images)):
        outputs = levels(chunk)
        sums.append([level.sum(0) for level in outputs])
        features.append(outputs[-1])
    means = [torch.stack(level).sum(0) / len(images) for level in zip(*sums, strict=True)]
    return Levels(means, torch.cat(features))


def _classes(groups: Sequence[Tensor]) -> Tensor:
    """The class of each row of the groups, of which there is one per class."""
    counts = torch.tensor([len(group) for group in groups])
    return torch.arange(len(groups)).repeat_interleave(counts).to(groups[0].device)


def _spread(accuracies: Sequence[float]) -> float:
    return max(accuracies) - min(accuracies)


class _Compiled(NamedTuple):
    """Functions that are compiled once for all steps."""

    trainer: Trainer
    scorer: Scorer


@lru_cache(maxsize=1)
def _compile(network: Functional, training: Training, compute: Compute) -> _Compiled:
    return _Compiled(Trainer(network, training, compute), Scorer(network, compute))
