"""What a method is given: real tensors in the transformed space, a class index, a network. Never test data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from condense.augment import Augment
from condense.data.datasets import Arrays
from condense.data.images import Images
from condense.data.layout import InputShape
from condense.data.transform import Transform, fit
from condense.names import spelt
from condense.networks import Functional
from condense.rng import Rng, check_seed
from condense.schema import Checked

_ROUNDING = ("sha256", "trace")
"""What a transform's description says of one machine's rounding: a record, no part of an identity."""


@dataclass(frozen=True, kw_only=True)
class Split(Checked):
    """The validation part carved from the training data."""

    val_fraction: float | None = None
    """Share of each class held out for validation; unset: 0.1 where something is selected on it, else 0."""
    seed: int = 0
    """Seed of the draw."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed, "split.seed")
        if self.val_fraction is not None and not 0 <= self.val_fraction < 1:
            raise ValueError(f"split.val_fraction must lie in [0, 1), got {self.val_fraction}; try 0.1")

    def resolved(self, selects: bool) -> Split:
        fraction = (0.1 if selects else 0.0) if self.val_fraction is None else self.val_fraction
        return Split(val_fraction=fraction, seed=self.seed)

    def indices(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sorted indices (train, validation), stratified by class."""
        fraction = self.val_fraction or 0.0
        rng, held = Rng(self.seed), []
        for label in labels.unique().tolist():
            members = (labels == label).nonzero().flatten()
            order = torch.randperm(len(members), generator=rng("validation", 0, label))
            held.append(members[order[: round(fraction * len(members))]])
        is_held = torch.zeros(len(labels), dtype=torch.bool)
        is_held[torch.cat(held)] = True
        return (~is_held).nonzero().flatten(), is_held.nonzero().flatten()


@dataclass(frozen=True)
class Labelled:
    """Samples (N, *input_shape), float32 in the transformed space as they are taken out, and their classes (N,) int64,
    on one device."""

    images: Tensor | Images
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def by_class(self) -> list[Tensor]:
        """Indices of every class, ascending; on the CPU, where draws are made."""
        labels = self.labels.cpu()
        return list(labels.argsort(stable=True).split(labels.bincount().tolist()))

    def draw(self, label: int, num: int, generator: torch.Generator) -> Tensor:
        """``num`` images of a class without replacement; all of them, shuffled, where it has fewer."""
        members = self.by_class[label]
        index = members[torch.randperm(len(members), generator=generator)[:num]]
        return self.images[index.to(self.images.device, non_blocking=True)]

    def sample(self, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``num`` samples (num, *input_shape) of any class, without replacement, and their classes; all, shuffled,
        where there are fewer."""
        index = torch.randperm(len(self), generator=generator)[:num].to(self.images.device, non_blocking=True)
        return self.images[index], self.labels[index]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A data set to distil, as methods and builders see it."""

    name: str
    classes: tuple[str, ...]
    input_shape: InputShape
    fingerprint: str
    """Of the whole training split, before validation is carved from it."""
    train: Labelled
    val: Labelled | None
    transform: Transform
    split: Split
    augment: Augment
    """The augmentation that the recipe names, resolved for this data set."""
    network: Functional
    device: torch.device

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def target_width(self) -> int:
        """Numbers in a target, which are the outputs of the network: one for each class, or those of something else."""
        return self.network.num_classes

    def with_network(self, network: str) -> Task:
        """The same data for another architecture, on the same device.

        Raises:
            ValueError: as ``Functional`` does.
        """
        return replace(self, network=Functional(network, self.input_shape, self.target_width, self.device))

    def dataset(self) -> dict[str, Any]:
        """What files say of the data; of the width of targets only where they are not scores of the classes."""
        facts = {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "classes": list(self.classes),
            "input_shape": list(self.input_shape),
        }
        return facts if self.target_width == self.num_classes else facts | {"target_width": self.target_width}

    def identity(self) -> Mapping[str, Any]:
        """What decides a network trained on this task, apart from how it is trained."""
        return {
            "dataset": self.fingerprint,
            "split": {"val_fraction": self.split.val_fraction, "seed": self.split.seed},
            "transform": {k: v for k, v in self.transform.describe().items() if k not in _ROUNDING},
            **self.network.identity(),
        }


def make_task(
    arrays: Arrays,
    *,
    transform: str,
    split: Split,
    network: Functional,
    augment: Augment,
    device: torch.device,
    cache: Path | None = None,
) -> Task:
    """Carve validation and fit the transform on what is left of the training data.

    Both parts are views of one array: on a CPU the memory of ``arrays``, else a copy on ``device``.

    Raises:
        ValueError: a class is left without training images, or the augmentation takes samples of another kind.
    """
    augment.require_kind(arrays.input_shape)
    labels = torch.from_numpy(arrays.y_train)
    train_index, val_index = split.indices(labels)
    left = labels[train_index].bincount(minlength=arrays.num_classes)
    if not left.all():
        raise ValueError(
            f"split.val_fraction {split.val_fraction} leaves no training image of class "
            f"{arrays.classes[int(left.argmin())]!r}; give {spelt('split.val_fraction', 0.1)}"
        )
    pixels = Images.of(arrays.x_train, device)
    key = f"{arrays.fingerprint['train']}-{split.val_fraction}-{split.seed}"
    fitted = fit(transform, pixels.subset(train_index), known=arrays.known, key=key, cache=cache)
    images = pixels.with_transform(fitted)

    def part(index: Tensor) -> Labelled:
        return Labelled(images.subset(index), labels[index].to(device))

    return Task(
        name=arrays.name,
        classes=arrays.classes,
        input_shape=arrays.input_shape,
        fingerprint=arrays.fingerprint["train"],
        train=part(train_index),
        val=part(val_index) if len(val_index) else None,
        transform=fitted,
        split=split,
        augment=augment,
        network=network,
        device=device,
    )
