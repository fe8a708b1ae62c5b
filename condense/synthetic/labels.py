"""Labels of synthetic sets: the targets that networks are trained towards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense.data.layout import InputShape
from condense.objective import Objective
from condense.plugins import Registry, subclass_of
from condense.schema import Checked
from condense.sources import Examples, Source
from condense.sources import Teacher as Labeller


class Provider(nn.Module, ABC):
    """The targets of the latents of one set."""

    @abstractmethod
    def forward(self, index: Tensor) -> Tensor:
        """Return the targets of the latents ``index`` (n,): classes (n,), probabilities (n, C) or values (n, D)."""

    def source(self, source: Examples, objective: Objective, teacher: Labeller | None = None) -> Source:
        """Return what networks are trained on, by default ``source``.

        Args:
            source: all decoded images with the targets of ``forward``, in the views of the training.
            objective: the loss; targets that a teacher gives are ``objective.taught`` of its logits.
            teacher: the function from images to logits of the teacher, where ``Labels.of_views`` is True and the
                labels are not stored.
        """
        return source

    def check(self) -> None:
        """Raise ValueError if values that were read from a file are out of range."""


@dataclass(frozen=True, kw_only=True)
class Labels(Checked, ABC):
    """A kind of labels."""

    name: ClassVar[str]
    learned: ClassVar[bool] = False
    space: ClassVar[Literal["classes", "probabilities", "values"]]
    """What a target is: a class, probabilities of the classes, or any values. Sets without classes need values."""
    added_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that later versions added. Files name them where they differ from their defaults."""
    of_views: ClassVar[bool] = False
    """Whether a teacher labels every view of an image (``condense.synthetic.teaching``). The targets are then the
    classes, and ``Provider.source`` gives the labels."""

    @abstractmethod
    def build(self, labels: Tensor, num_classes: int) -> Provider:
        """Return the targets for initial ``labels``: classes (N,) or logits (N, C).

        Args:
            labels: the initial labels of the latents.
            num_classes: C; 0 for a set without classes, whose labels are targets (N, D) of any width D.
        """

    def provider(self, labels: Tensor, num_classes: int, input_shape: InputShape, expansion: int) -> Provider:
        """Return the targets of a set, by default those of ``build``.

        Args:
            labels, num_classes: as in ``build``.
            input_shape: the shape of a sample.
            expansion: the number of images that are decoded from a latent.
        """
        return self.build(labels, num_classes)


@dataclass(frozen=True, kw_only=True)
class Hard(Labels):
    """One fixed class per image."""

    name: ClassVar[str] = "hard"
    space: ClassVar[Literal["classes", "probabilities", "values"]] = "classes"

    def build(self, labels: Tensor, num_classes: int) -> Provider:
        return _Hard(labels if labels.dim() == 1 else labels.argmax(1))


@dataclass(frozen=True, kw_only=True)
class Logits(Labels):
    """A learned vector of logits per image, whose softmax is the target."""

    name: ClassVar[str] = "logits"
    learned: ClassVar[bool] = True
    space: ClassVar[Literal["classes", "probabilities", "values"]] = "probabilities"
    confidence: float = 0.9
    """Initial probability of the image's class; the other classes share the rest equally."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.confidence < 1:
            raise ValueError(f"labels.confidence must lie between 0 and 1, got {self.confidence}; try 0.9")

    def build(self, labels: Tensor, num_classes: int) -> Provider:
        if labels.dim() == 1:
            rest = (1 - self.confidence) / (num_classes - 1)
            labels = (F.one_hot(labels, num_classes) * (self.confidence - rest) + rest).log()
        return _Logits(labels)


@dataclass(frozen=True, kw_only=True)
class Targets(Labels):
    """Learned regression targets, for methods with a squared error loss.

    Zhou et al. (2022), FRePo."""

    name: ClassVar[str] = "targets"
    learned: ClassVar[bool] = True
    space: ClassVar[Literal["classes", "probabilities", "values"]] = "values"
    scale: float = 1.0
    """Scale of the initial targets: one-hot vectors minus 1/C, or the given targets of a set without classes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scale > 0:
            raise ValueError(f"labels.scale must be positive, got {self.scale}; try 1.0")

    def build(self, labels: Tensor, num_classes: int) -> Provider:
        values = _probabilities(labels, num_classes) - 1 / num_classes if num_classes else labels.float()
        return _Targets(self.scale * values)


@dataclass(frozen=True, kw_only=True)
class Teacher(Labels):
    """Probabilities that trained networks assign to the current images; not learned.

    Soft label assignment (Cui et al. 2023, TESLA): the method provides the networks and assigns the labels, and the
    file stores the last assigned ones."""

    name: ClassVar[str] = "teacher"
    space: ClassVar[Literal["classes", "probabilities", "values"]] = "probabilities"

    def build(self, labels: Tensor, num_classes: int) -> Provider:
        return Assigned(_probabilities(labels, num_classes))


def _probabilities(labels: Tensor, num_classes: int) -> Tensor:
    """Convert classes (N,) or logits (N, C) to probabilities (N, C)."""
    return F.one_hot(labels, num_classes).float() if labels.dim() == 1 else labels.float().softmax(1)


class _Hard(Provider):
    classes: Tensor

    def __init__(self, classes: Tensor) -> None:
        super().__init__()
        self.register_buffer("classes", classes.long().clone())

    def forward(self, index: Tensor) -> Tensor:
        return self.classes[index]


class _Logits(Provider):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.float().clone())

    def forward(self, index: Tensor) -> Tensor:
        return self.logits[index].softmax(1)


class _Targets(Provider):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values.clone())

    def forward(self, index: Tensor) -> Tensor:
        return self.values[index]


class Assigned(Provider):
    """Probabilities that a method sets."""

    probabilities: Tensor

    def __init__(self, probabilities: Tensor) -> None:
        super().__init__()
        self.register_buffer("probabilities", probabilities.clone())

    @torch.no_grad()
    def assign(self, probabilities: Tensor) -> None:
        """Set the probabilities (N, C) of all latents."""
        self.probabilities.copy_(probabilities)

    def forward(self, index: Tensor) -> Tensor:
        return self.probabilities[index]


LABELS: Registry[type[Labels]] = Registry(
    "kind of labels",
    "condense.labels",
    {
        **{kind.name: kind for kind in (Hard, Logits, Targets, Teacher)},
        "stored": "condense.synthetic.teaching:Stored",
        "online": "condense.synthetic.teaching:Online",
        "projector": "condense.synthetic.teaching:Projector",
    },
    subclass_of(Labels),
)
