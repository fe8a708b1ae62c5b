"""A synthetic set with its data: the images for training, for choices after distillation, and for scoring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from condense.data.datasets import Arrays
from condense.data.images import Images
from condense.data.transform import Transform
from condense.eval.results import Scored
from condense.labelling import NamedTeacher
from condense.names import spelt
from condense.networks import Factory, Functional
from condense.sets import split_of, transform_of
from condense.synthetic.set import SyntheticSet
from condense.task import Labelled, Split
from condense.teachers import Teacher


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A set with the data that it was made from.

    The real images are transformed as the set was. Everything is computed on first access.

    Raises:
        ValueError: the set was made from other data, or where its real images are asked for, these have another order.
    """

    syn: SyntheticSet
    arrays: Arrays
    device: torch.device
    cache: Path | None = None
    """Cache folder, for example of whitening matrices and teachers; None: nothing is cached."""
    teachers: Mapping[str, Teacher | NamedTeacher] = field(default_factory=dict)
    """Teachers from buffers or from the set, by the names under which protocols and labels record them."""

    def __post_init__(self) -> None:
        origin, arrays = self.syn.origin, self.arrays
        for what, ours, theirs in (
            ("fingerprint", origin.fingerprint[:12], arrays.fingerprint["train"][:12]),
            ("image shape", origin.input_shape, arrays.input_shape),
            ("number of classes", origin.num_classes or arrays.num_classes, arrays.num_classes),
        ):
            if ours != theirs:
                raise ValueError(
                    f"the set was made from {origin.dataset_name} ({what} {ours}), not from {arrays.name} ({theirs}), "
                    f"so its accuracy there is meaningless; give {spelt('dataset')} with the data it was made from"
                )

    def network(self, spec: str | Factory) -> Functional:
        return Functional(spec, self.arrays.input_shape, self.arrays.num_classes, self.device)

    def decoded(self, *, soft: bool) -> tuple[Tensor, Tensor]:
        """Return ``decoded`` of the set, on the device."""
        images, targets = decoded(self.syn, soft=soft)
        return images.to(self.device), targets.to(self.device)

    @cached_property
    def transform(self) -> Transform:
        """The transform of the set. A whitening matrix that is not in the cache is fitted to the training images."""
        return transform_of(self.syn, self.arrays, self.cache)

    @cached_property
    def test(self) -> Labelled:
        return load_test(self.arrays, self.transform, self.device)

    def scored(self, split: Scored) -> Labelled:
        """Return the images on which networks are scored.

        Raises:
            ValueError: there are none.
        """
        if split == "test":
            return self.test
        fraction = require_held_out(self.syn).val_fraction
        if not len(self.held_out):
            raise ValueError(
                f"{spelt('split.val_fraction', fraction)} holds out no image, because the classes are small; "
                "distil the set with a larger fraction"
            )
        return self.held_out

    @property
    def train(self) -> Labelled:
        """The real images that the set was made from."""
        return self._parts[0]

    @property
    def held_out(self) -> Labelled:
        """The real training images that the set was not made from; may be empty (see ``require_held_out``)."""
        return self._parts[1]

    @cached_property
    def _parts(self) -> tuple[Labelled, Labelled]:
        indices, labels = split_of(self.syn, self.arrays), torch.from_numpy(self.arrays.y_train)
        images = Images.of(self.arrays.x_train, self.device).with_transform(self.transform)
        train, held_out = (Labelled(images.subset(index), labels[index].to(self.device)) for index in indices)
        return train, held_out


@torch.no_grad()
def decoded(syn: SyntheticSet, *, soft: bool) -> tuple[Tensor, Tensor]:
    """Return images (n, C, H, W) and classes (n,). If ``soft`` is true and the set has soft targets, return these,
    (n, C), instead of classes."""
    images, targets = syn()
    return images, targets if soft or targets.dim() == 1 else targets.argmax(1)


def load_test(arrays: Arrays, transform: Transform, device: torch.device) -> Labelled:
    """Return the transformed test images with their classes.

    Raises:
        ValueError: the data set has no test images.
    """
    if not len(arrays.x_test):
        raise ValueError(f"{arrays.name} has no test images to score networks on; give a data set with a test split")
    return Labelled(
        Images.of(arrays.x_test, device).with_transform(transform), torch.from_numpy(arrays.y_test).to(device)
    )


def require_held_out(syn: SyntheticSet) -> Split:
    """Return the split that the set was made with. Raises ValueError if it holds out no real images."""
    split = syn.origin.split
    if not split.val_fraction:
        raise ValueError(
            "this evaluation needs held-out real images, and the set was made from all training images; distil it with "
            f"{spelt('split.val_fraction', 0.1)}"
        )
    return split
