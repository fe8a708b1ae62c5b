"""The base class of applications, and their inputs and outputs."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from condense.compute import Compute
from condense.data.layout import Kind, kind, require_kind
from condense.eval.evaluate import SetScorer, resolved
from condense.eval.protocol import Protocol, fixed
from condense.eval.subject import Subject
from condense.names import percent, spelt
from condense.networks import Functional
from condense.rng import Rng
from condense.schema import Checked
from condense.synthetic.set import SyntheticSet


class Samples(NamedTuple):
    """Decoded images (N, C, H, W) of a set and their classes (N,). Networks are trained on images that are drawn in
    proportion to their weights (N,); None: each once in an epoch."""

    images: Tensor
    classes: Tensor
    weights: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A set with its data, the compute policy and the seed. Test images are used only to score networks."""

    subject: Subject
    compute: Compute
    seed: int = 0
    download: bool = False
    """Whether missing data may be downloaded."""

    @property
    def kind(self) -> Kind:
        """The kind of samples, for titles: series, images or clips."""
        return kind(self.subject.arrays.input_shape)

    def scorer(self, network: Functional, plan: Protocol, num_images: int) -> SetScorer:
        """Return a scorer for networks under a protocol, for training sets of about ``num_images`` images."""
        augment = plan.augment_for(self.subject.arrays.input_shape, self.subject.arrays.strategy)
        plan = plan.resolved(num_images, copies=augment.copies)
        return SetScorer(network, plan, resolved(self.compute, network, plan, num_images), augment)

    def contenders(self, baselines: Mapping[str, SyntheticSet]) -> dict[str, SyntheticSet]:
        """Return the set and the baselines by name. A baseline of the set's own method is marked as ``made anew``."""
        own = self.subject.syn.origin.method or "set"
        others = {name if name != own else f"{name}, made anew": syn for name, syn in baselines.items()}
        return {own: self.subject.syn, **others}

    def to_train_on(self, baselines: Mapping[str, SyntheticSet]) -> dict[str, Samples]:
        """Return what networks are trained on of the set and of the baselines, by name."""
        return {name: self._samples(syn) for name, syn in self.contenders(baselines).items()}

    def _samples(self, syn: SyntheticSet) -> Samples:
        images, classes = replace(self.subject, syn=syn).decoded(soft=False)
        return Samples(images, classes, None if syn.weights is None else syn.weights.to(images.device))

    def rng(self, name: str, unit: int | str = 0) -> Rng:
        return Rng(self.seed).child(name, unit)


@dataclass(frozen=True)
class Findings:
    """The findings of an application: a table, and a record of all numbers."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    title: str
    record: Mapping[str, Any]
    note: str = ""
    """A line that is printed below the table."""

    def content(self) -> dict[str, Any]:
        """Return the record with the table under ``table``, for JSON."""
        return {**self.record, "table": {"title": self.title, "columns": self.columns, "rows": self.rows}}


@dataclass(frozen=True, kw_only=True)
class Application(Checked, ABC):
    """A use of synthetic sets; the fields of a subclass are its settings."""

    needs_classes: ClassVar[bool] = True
    """Whether the set has to have classes."""
    takes_baselines: ClassVar[bool] = True
    """Whether the set is compared with baselines of the same budget."""
    takes: ClassVar[tuple[Kind, ...]] = ("graphs", "series", "images", "clips")
    """The kinds of samples that the application is defined for."""

    def check(self, syn: SyntheticSet, baselines: Sequence[str]) -> None:
        """Check, before data are read, that the application can run on this set and these baselines.

        Raises:
            ValueError: it cannot.
        """
        name = type(self).__name__.lower()
        require_kind(name, self.takes, syn.origin.input_shape, "measure the set with `condense evaluate`")
        if baselines and not self.takes_baselines:
            raise ValueError(f"{name} makes its own comparisons; give {spelt('baselines', ())}")

    @abstractmethod
    def run(self, setting: Setting, baselines: Mapping[str, SyntheticSet]) -> Findings:
        """Run the application.

        Args:
            setting: the set with its data.
            baselines: sets of the same budget by other methods, by name.
        """


def protocol_of_classes(name: str) -> Protocol:
    """Return the protocol of that name, for networks that are trained on images and their classes alone.

    Raises:
        ValueError: the name is unknown, or the protocol needs other labels, a teacher or held-out images.
    """
    plan = fixed(name)
    if plan.labels != "hard" or plan.loss == "mse" or plan.teacher or plan.holds_out or plan.learned_lr:
        raise ValueError(
            f"the networks of an application are trained on classes alone, and the protocol {name} needs other labels, "
            f"a teacher or held-out images; give {spelt('protocol', 'canonical')}"
        )
    return plan


def numbers_of(accuracies: Sequence[float]) -> dict[str, Any]:
    """Return the accuracies of several networks, as fractions, for the file of results."""
    return {
        "mean": statistics.fmean(accuracies),
        "std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "n": len(accuracies),
        "accuracies": list(accuracies),
    }


def mean_and_spread(values: Tensor) -> str:
    """Format the mean and the standard deviation of fractions as percentages."""
    return percent(values.mean().item(), values.std().item() if len(values) > 1 else None)
