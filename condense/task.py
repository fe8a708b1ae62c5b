"""The input of a method: training data in the transformed space, a class index and a network, but no test data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from condense.augment import Augment
from condense.data.datasets import Arrays, fingerprint
from condense.data.images import Images
from condense.data.layout import InputShape
from condense.data.transform import Transform, fit
from condense.names import spelt
from condense.networks import Factory, Functional, NetworkSpec
from condense.rng import Draws, Rng, check_seed
from condense.schema import Checked

ROUNDING = ("sha256", "trace")
"""Fields of a transform's description that depend on the rounding of a machine; an identity omits them."""


IpcPolicy = Literal["refuse", "all", "repeat"]
"""What happens to a class with fewer real images than the budget: an error, a smaller part of the set, or repeats."""


@dataclass(frozen=True, kw_only=True)
class Split(Checked):
    """The split of the training data into training and validation images."""

    val_fraction: float | None = None
    """Fraction of each class that is held out for validation. Unset: 0.1 if something is selected on it, else 0."""
    seed: int = 0
    """Seed of the split into training and validation images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed, "split.seed")
        if self.val_fraction is not None and not 0 <= self.val_fraction < 1:
            raise ValueError(f"split.val_fraction must lie in [0, 1), got {self.val_fraction}; try 0.1")

    def resolved(self, selects: bool) -> Split:
        """Return this split with ``val_fraction`` set; ``selects``: whether something is selected on held-out data."""
        fraction = (0.1 if selects else 0.0) if self.val_fraction is None else self.val_fraction
        return Split(val_fraction=fraction, seed=self.seed)

    def indices(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sorted indices (train, validation) of a split that is stratified by class."""
        fraction = self.val_fraction or 0.0
        rng, held_out = Rng(self.seed), []
        for label in labels.unique().tolist():
            members = (labels == label).nonzero().flatten()
            order = torch.randperm(len(members), generator=rng.generator("validation", 0, label))
            held_out.append(members[order[: round(fraction * len(members))]])
        is_held_out = torch.zeros(len(labels), dtype=torch.bool)
        is_held_out[torch.cat(held_out)] = True
        return (~is_held_out).nonzero().flatten(), is_held_out.nonzero().flatten()


@dataclass(frozen=True)
class Labelled:
    """Samples (N, *input_shape) and their classes (N,) int64 on one device; indexing gives float32 in the transformed
    space."""

    images: Tensor | Images
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def by_class(self) -> list[Tensor]:
        """Ascending indices of each class."""
        return list(self.labels.argsort(stable=True).split(self.labels.bincount().tolist()))

    def subset(self, index: Tensor) -> Labelled:
        """Return the samples at ``index`` (K,), in this order."""
        images = self.images[index] if isinstance(self.images, Tensor) else self.images.subset(index)
        return Labelled(images, self.labels[index.to(self.labels.device)])

    def draw(self, label: int, num: int, draws: Draws) -> Tensor:
        """Draw ``num`` images of a class without replacement, or all of them, shuffled, if it has fewer."""
        members = self.by_class[label]
        return self.images[members[draws.subset(len(members), num).to(members.device, non_blocking=True)]]

    def sample(self, num: int, draws: Draws) -> tuple[Tensor, Tensor]:
        """Draw ``num`` samples (num, *input_shape) of any class without replacement, or all, shuffled, if there are
        fewer; return them with their classes."""
        index = draws.subset(len(self), num).to(self.labels.device, non_blocking=True)
        return self.images[index], self.labels[index]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A data set to distil, as it is given to methods and artifact builders."""

    name: str
    classes: tuple[str, ...]
    input_shape: InputShape
    fingerprint: str
    """Fingerprint of the whole training part, including the images that are held out for validation."""
    held_out: str
    """Fingerprint of the images that are held out, which depends on the order of the training part; empty if none
    are."""
    train: Labelled
    val: Labelled | None
    transform: Transform
    split: Split
    augment: Augment
    """The augmentation of the recipe, resolved for this data set."""
    network: Functional
    device: torch.device

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def with_network(self, network: str | NetworkSpec | Factory) -> Task:
        """Return a task with the same data and device and another architecture, which has one output per class.

        Raises:
            ValueError: the network is unknown, or does not take these samples.
        """
        return replace(self, network=Functional(network, self.input_shape, self.num_classes, self.device))

    def dataset(self) -> dict[str, Any]:
        """Return the description of the data for files, with the width of targets that are not class scores.

        The network has one output for each value of a target.
        """
        facts = {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "classes": list(self.classes),
            "input_shape": list(self.input_shape),
            **({"held_out": self.held_out} if self.held_out else {}),
        }
        width = self.network.num_outputs
        return facts if width == self.num_classes else facts | {"target_width": width}

    def identity(self) -> Mapping[str, Any]:
        """Return what determines a network that is trained on this task, apart from its training."""
        return {
            "dataset": self.fingerprint,
            "split": {"val_fraction": self.split.val_fraction, "seed": self.split.seed},
            "transform": {k: v for k, v in self.transform.describe().items() if k not in ROUNDING},
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
    """Split off the validation images and fit the transform on the remaining training images.

    Both parts are views of one array: on a CPU the memory of ``arrays``, else a copy on ``device``.

    Raises:
        ValueError: no training image of a class remains, or the augmentation does not take samples of this kind.
    """
    augment.require_kind(arrays.input_shape)
    labels = torch.from_numpy(arrays.y_train)
    train_index, val_index = split.indices(labels)
    counts = labels[train_index].bincount(minlength=arrays.num_classes)
    if not counts.all():
        raise ValueError(
            f"split.val_fraction {split.val_fraction} leaves no training image of class "
            f"{arrays.classes[int(counts.argmin())]!r}; give {spelt('split.val_fraction', 0.1)}"
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
        held_out=fingerprint(arrays.x_train, arrays.y_train, val_index.tolist()) if len(val_index) else "",
        train=part(train_index),
        val=part(val_index) if len(val_index) else None,
        transform=fitted,
        split=split,
        augment=augment,
        network=network,
        device=device,
    )
