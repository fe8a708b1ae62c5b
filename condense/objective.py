"""Training objectives: losses between the outputs of a network and the targets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from condense.schema import Checked

ObjectiveName = Literal["cross-entropy", "mse", "kl", "cosine", "gift", "distillation", "mse-distillation"]
"""The keys of ``OBJECTIVES``."""


@dataclass(frozen=True, kw_only=True)
class Objective(Checked, ABC):
    name: ClassVar[ObjectiveName]
    takes_values: ClassVar[bool] = False
    """Whether targets may be any values (e.g. features of a teacher), not only classes or probabilities."""
    needs_teacher: ClassVar[bool] = False
    """Whether the targets have to be those that ``taught`` returns."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss over a batch, a scalar.

        Args:
            outputs: outputs of the network, (N, D).
            targets: class indices (N,), which are converted to one-hot rows, or rows (N, D).
        """

    def taught(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the targets (N, D) of a batch that a teacher labels, by default the teacher's probabilities.

        Args:
            logits: the teacher's logits (N, D) for the images of the batch.
            targets: the targets of the batch without the teacher, (N,) or (N, D).
        """
        return logits.softmax(1)


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(Objective):
    """Cross-entropy of the softmax of the outputs."""

    name: ClassVar[ObjectiveName] = "cross-entropy"
    label_smoothing: float = 0.0
    """Fraction of each target that is spread evenly over all classes."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, label_smoothing=self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class SquaredError(Objective):
    """Half the squared error, summed over the width of the targets."""

    name: ClassVar[ObjectiveName] = "mse"
    takes_values: ClassVar[bool] = True

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs - _rows(outputs, targets)).square().sum(1).mean()

    def taught(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits


@dataclass(frozen=True, kw_only=True)
class KL(Objective):
    """Kullback-Leibler divergence of the softmax of the outputs from the targets."""

    name: ClassVar[ObjectiveName] = "kl"
    temperature: float = 1.0
    """Temperature by which the outputs, and the logits of a teacher, are divided."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        log_p = (outputs / self.temperature).log_softmax(1)
        return F.kl_div(log_p, _rows(outputs, targets), reduction="batchmean")

    def taught(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (logits / self.temperature).softmax(1)


@dataclass(frozen=True, kw_only=True)
class Distillation(Objective):
    """Knowledge distillation: weight T^2 KL(teacher at T, outputs at T) + (1 - weight) cross-entropy of the classes.

    T^2 keeps the gradients of both terms of the same size (Hinton, Vinyals and Dean 2015). Targets are those that
    ``taught`` returns, rows (N, 2 D): the teacher's probabilities and those of the classes."""

    name: ClassVar[ObjectiveName] = "distillation"
    needs_teacher: ClassVar[bool] = True
    temperature: float = 4.0
    """Temperature T."""
    weight: float = 0.5
    """Weight of the divergence from the teacher."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        taught, classes = targets.chunk(2, dim=1)
        log_p = (outputs / self.temperature).log_softmax(1)
        divergence = F.kl_div(log_p, taught, reduction="batchmean")
        return self.weight * self.temperature**2 * divergence + (1 - self.weight) * F.cross_entropy(outputs, classes)

    def taught(self, logits: Tensor, targets: Tensor) -> Tensor:
        return torch.cat([(logits / self.temperature).softmax(1), _rows(logits, targets)], 1)


@dataclass(frozen=True, kw_only=True)
class SquaredDistillation(Objective):
    """Half the squared distance to a teacher's logits, plus a weight times the cross-entropy of the classes.

    Targets are those that ``taught`` returns, rows (N, 2 D): the teacher's logits and the classes."""

    name: ClassVar[ObjectiveName] = "mse-distillation"
    needs_teacher: ClassVar[bool] = True
    class_weight: float = 1.0
    """Weight of the cross-entropy of the classes."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        taught, classes = targets.chunk(2, dim=1)
        distance = 0.5 * (outputs - taught).square().sum(1).mean()
        return distance + self.class_weight * F.cross_entropy(outputs, classes)

    def taught(self, logits: Tensor, targets: Tensor) -> Tensor:
        return torch.cat([logits, _rows(logits, targets)], 1)


@dataclass(frozen=True, kw_only=True)
class Cosine(Objective):
    """One minus the cosine similarity of outputs and targets."""

    name: ClassVar[ObjectiveName] = "cosine"
    takes_values: ClassVar[bool] = True

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (1 - F.cosine_similarity(outputs, _rows(outputs, targets), dim=1)).mean()

    def taught(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits


@dataclass(frozen=True, kw_only=True)
class Gift(Cosine):
    """One minus the cosine similarity of the outputs and a teacher's logits that the class corrects (GIFT)."""

    name: ClassVar[ObjectiveName] = "gift"
    takes_values: ClassVar[bool] = False
    label_smoothing: float = 0.1
    """Fraction of the class that is spread evenly over all classes before it corrects the logits."""
    weight: float = 0.1
    """Weight of the class relative to the logits, both normalised to length 1."""

    def taught(self, logits: Tensor, targets: Tensor) -> Tensor:
        rows = _rows(logits, targets)
        smooth = (1 - self.label_smoothing) * rows + self.label_smoothing / rows.shape[1]
        return F.normalize(logits, dim=1) + self.weight * F.normalize(smooth, dim=1)


OBJECTIVES: dict[ObjectiveName, type[Objective]] = {
    objective.name: objective
    for objective in (CrossEntropy, SquaredError, KL, Cosine, Gift, Distillation, SquaredDistillation)
}


def one_hot(targets: Tensor, num_classes: int) -> Tensor:
    """Convert class indices (N,) to one-hot rows (N, num_classes), float32. Rows are returned unchanged."""
    return F.one_hot(targets, num_classes).float() if targets.dim() == 1 else targets


def _rows(outputs: Tensor, targets: Tensor) -> Tensor:
    return one_hot(targets, outputs.shape[1]).to(outputs.dtype)
