"""What applications share: the data of a set, and networks trained on labelled images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condense.compute import Compute
from condense.data.datasets import Arrays
from condense.data.images import Images
from condense.data.transform import Transform
from condense.eval.crossarch import SetScorer, decoded, load_test, settled, transform_of
from condense.eval.protocol import Protocol
from condense.networks import Functional
from condense.rng import Rng
from condense.schema import Checked
from condense.synthetic.set import SyntheticSet
from condense.task import Labelled, Split


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A set with its data, as an application sees them. Test images are there to be scored on, and for nothing else."""

    syn: SyntheticSet
    arrays: Arrays
    device: torch.device
    compute: Compute
    seed: int = 0
    cache: Path | None = None

    @cached_property
    def transform(self) -> Transform:
        return transform_of(self.syn, self.arrays, self.cache)

    @cached_property
    def test(self) -> Labelled:
        return load_test(self.arrays, self.transform, self.device)

    @cached_property
    def _parts(self) -> tuple[Labelled, Labelled]:
        """The training images that the set was made from, and those held out."""
        labels = torch.from_numpy(self.arrays.y_train)
        split = Split(**self.syn.origin.recipe.get("split", {"val_fraction": 0.0}))
        images = Images.of(self.arrays.x_train, self.device).with_transform(self.transform)
        train, val = (Labelled(images.subset(i), labels[i].to(self.device)) for i in split.indices(labels))
        return train, val

    @property
    def train(self) -> Labelled:
        return self._parts[0]

    @property
    def held_out(self) -> Labelled:
        """May be empty."""
        return self._parts[1]

    @property
    def ipc(self) -> int:
        """Of the set's budget."""
        return int(self.syn.origin.recipe.get("ipc", len(self.syn) // self.arrays.num_classes))

    def network(self, name: str) -> Functional:
        return Functional(name, self.arrays.input_shape, self.arrays.num_classes, self.device)

    def scorer(self, network: Functional, plan: Protocol, num_images: int) -> SetScorer:
        """Trains and scores networks under a protocol, for training sets of about so many images."""
        augment = plan.augment_for(self.arrays.input_shape, self.arrays.strategy)
        plan = plan.resolved(num_images, copies=augment.copies)
        return SetScorer(network, plan, settled(self.compute, network, plan, num_images), augment)

    def contenders(self, baselines: Mapping[str, SyntheticSet]) -> dict[str, SyntheticSet]:
        """The set and the baselines, by who made them."""
        own = self.syn.origin.method or "set"
        others = {name if name != own else f"{name}, made anew": syn for name, syn in baselines.items()}
        return {own: self.syn, **others}

    def to_train_on(self, baselines: Mapping[str, SyntheticSet]) -> dict[str, tuple[Tensor, Tensor]]:
        """Images and classes of the set and of the baselines, by who made them."""
        found = {}
        for name, syn in self.contenders(baselines).items():
            images, labels = decoded(syn, soft=False)
            found[name] = images.to(self.device), labels.to(self.device)
        return found

    def rng(self, name: str, unit: int | str = 0) -> Rng:
        return Rng(self.seed).child(name, unit)


@dataclass(frozen=True)
class Findings:
    """A table for people, and everything for a file."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    title: str
    record: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Application(Checked, ABC):
    """Its fields are its choices."""

    def check(self, syn: SyntheticSet, baselines: Sequence[str]) -> None:
        """Raise ValueError where it cannot be done with this set and these baselines, before they are made."""
        return None

    @abstractmethod
    def run(self, setting: Setting, baselines: Mapping[str, SyntheticSet]) -> Findings:
        """``baselines``: sets of the same budget that were made by other methods, by name."""


def mean_and_spread(values: Tensor) -> str:
    """Fractions as percent."""
    spread = f" ± {100 * values.std().item():.1f}" if len(values) > 1 else ""
    return f"{100 * values.mean().item():.1f}{spread}"
