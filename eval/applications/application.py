"""What applications share: a set with its data, and networks trained on labelled images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from condense.compute import Compute
from condense.eval.evaluate import SetScorer, resolved
from condense.eval.protocol import Protocol
from condense.eval.subject import Subject, decoded
from condense.networks import Functional
from condense.rng import Rng
from condense.schema import Checked
from condense.synthetic.set import SyntheticSet


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A set with its data, and how networks are trained on it. Test images are only ever scored on."""

    subject: Subject
    compute: Compute
    seed: int = 0

    def scorer(self, network: Functional, plan: Protocol, num_images: int) -> SetScorer:
        """Trains and scores networks under a protocol, for training sets of about so many images."""
        augment = plan.augment_for(self.subject.arrays.input_shape, self.subject.arrays.strategy)
        plan = plan.resolved(num_images, copies=augment.copies)
        return SetScorer(network, plan, resolved(self.compute, network, plan, num_images), augment)

    def contenders(self, baselines: Mapping[str, SyntheticSet]) -> dict[str, SyntheticSet]:
        """The set and the baselines, by who made them."""
        own = self.subject.syn.origin.method or "set"
        others = {name if name != own else f"{name}, made anew": syn for name, syn in baselines.items()}
        return {own: self.subject.syn, **others}

    def to_train_on(self, baselines: Mapping[str, SyntheticSet]) -> dict[str, tuple[Tensor, Tensor]]:
        """Images and classes of the set and of the baselines, by who made them."""
        decoded_sets = {}
        for name, syn in self.contenders(baselines).items():
            images, labels = decoded(syn, soft=False)
            decoded_sets[name] = images.to(self.subject.device), labels.to(self.subject.device)
        return decoded_sets

    def rng(self, name: str, unit: int | str = 0) -> Rng:
        return Rng(self.seed).child(name, unit)


@dataclass(frozen=True)
class Findings:
    """A table for people, and everything for a file."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    title: str
    record: Mapping[str, Any]

    def content(self) -> dict[str, Any]:
        """For JSON: the record, and the table as ``table``."""
        return {**self.record, "table": {"title": self.title, "columns": self.columns, "rows": self.rows}}


@dataclass(frozen=True, kw_only=True)
class Application(Checked, ABC):
    """Its fields are its choices."""

    def check(self, syn: SyntheticSet, baselines: Sequence[str]) -> None:
        """Raise ValueError where it cannot be done with this set and these baselines, before data are read."""
        return None

    @abstractmethod
    def run(self, setting: Setting, baselines: Mapping[str, SyntheticSet]) -> Findings:
        """``baselines``: sets of the same budget that were made by other methods, by name."""


def mean_and_spread(values: Tensor) -> str:
    """Fractions as percent."""
    spread = f" ± {100 * values.std().item():.1f}" if len(values) > 1 else ""
    return f"{100 * values.mean().item():.1f}{spread}"
