"""Label providers: what a synthetic image is trained towards. A value of the recipe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn


class Provider(nn.Module, ABC):
    """Targets of the latents of one set."""

    @abstractmethod
    def forward(self, index: Tensor) -> Tensor:
        """Targets of the latents ``index`` (n,): classes (n,) or probabilities (n, C)."""


@dataclass(frozen=True, kw_only=True)
class Labels(ABC):
    name: ClassVar[str]
    learned: ClassVar[bool] = False

    @abstractmethod
    def build(self, labels: Tensor, num_classes: int) -> Provider:
        """From initial ``labels``: classes (N,) or logits (N, C)."""


@dataclass(frozen=True, kw_only=True)
class Hard(Labels):
    """One fixed class per image."""

    name: ClassVar[str] = "hard"

    def build(self, labels: Tensor, num_classes: int) -> Provider:
        return _Hard(labels if labels.dim() == 1 else labels.argmax(1))


@dataclass(frozen=True, kw_only=True)
class Logits(Labels):
    """A learned logit vector per image; the target is its softmax."""

    name: ClassVar[str] = "logits"
    learned: ClassVar[bool] = True
    confidence: float = 0.9
    """Initial probability of the image's class; the rest is shared evenly."""

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise ValueError(f"labels.confidence must lie between 0 and 1, got {self.confidence}; try 0.9")

    def build(self, labels: Tensor, num_classes: int) -> Provider:
        if labels.dim() == 1:
            rest = (1 - self.confidence) / (num_classes - 1)
            labels = (F.one_hot(labels, num_classes) * (self.confidence - rest) + rest).log()
        return _Logits(labels)


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


LABELS: dict[str, type[Labels]] = {kind.name: kind for kind in (Hard, Logits)}
