"""Read sets from files, run folders or published images, together with the data they were distilled from."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from condense import exchange, runs
from condense.cache import cache_folder
from condense.data.datasets import Arrays, Data, fingerprint, open_data
from condense.data.images import Images
from condense.data.transform import Transform
from condense.experiment import plain_task
from condense.files import expanded
from condense.names import spelt
from condense.synthetic.decode import Decode, Pixels
from condense.synthetic.files import load
from condense.synthetic.set import SyntheticSet
from condense.task import Split

Readable = SyntheticSet | Path | str
"""A set, its file or run folder, or labelled images from elsewhere (``.npz``, a folder of images)."""


def read_set(syn: Readable, dataset: Data | None = None) -> tuple[SyntheticSet | exchange.External, Data]:
    """Read a set or external images; return them and the data they belong to, which are not read.

    By default ``dataset`` is the location that the run recorded, else the name stored in the file.

    Raises:
        ValueError: the set cannot be read, or external images come without ``dataset``.
    """
    if isinstance(syn, SyntheticSet):
        return syn, syn.origin.dataset_name if dataset is None else dataset
    path = expanded(syn)
    if not exchange.is_foreign(path):
        result = load(path)
        return result, runs.source_of(path, result.origin.dataset_name) if dataset is None else dataset
    external = exchange.read(path)
    if dataset is None:
        raise ValueError(
            f"{path} does not say which data it was made from; give e.g. {spelt('dataset', 'fashion-mnist')}"
        )
    if external.space == "transformed":
        raise ValueError(
            f"{path} does not say which transform its images have; first run `condense import {path} "
            "set.safetensors --dataset NAME --transform channel` (or zca)"
        )
    return external, dataset


def open_set(syn: Readable, dataset: Data | None = None, *, download: bool = False) -> tuple[SyntheticSet, Arrays]:
    """Read a set and its data. External images become a set with the transform ``channel``.

    Raises:
        ValueError: see ``read_set`` and ``open_data``.
    """
    read, source = read_set(syn, dataset)
    return with_data(read, open_data(source, download))


def with_data(read: SyntheticSet | exchange.External, arrays: Arrays) -> tuple[SyntheticSet, Arrays]:
    """Return the result of ``read_set`` as a set, and its data."""
    return (read if isinstance(read, SyntheticSet) else adopted(read, arrays)), arrays


def adopted(
    external: exchange.External,
    arrays: Arrays,
    transform: str = "channel",
    decode: Decode = Pixels(),
    name: str | None = None,
) -> SyntheticSet:
    """Convert external images to a set of these data with this transform, of a method with this name.

    Raises:
        ValueError: see ``condense.exchange.as_set``.
    """
    task = plain_task(arrays, "mlp", transform, Split(val_fraction=0.0))
    return exchange.as_set(external, arrays, task.transform, transform, decode=decode, name=name)


def transform_of(syn: SyntheticSet, arrays: Arrays, cache: Path | None) -> Transform:
    """Return the transform of a set. A whitening matrix that is not in ``cache`` is fitted to ``arrays`` again.

    Raises:
        ValueError: see ``Transform.from_description``.
    """
    description, images = syn.origin.transform, None
    if description.get("kind") == "zca":
        train_index, _ = syn.origin.split.indices(torch.from_numpy(arrays.y_train))
        images = Images.of(arrays.x_train, torch.device("cpu")).subset(train_index)
    return Transform.from_description(description, images, cache)


def with_transform(
    syn: Readable, dataset: Data | None = None, *, download: bool = False
) -> tuple[SyntheticSet, Transform]:
    """Return a set and its transform, whose inverse gives pixels. Only whitened sets need their data.

    Raises:
        ValueError: see ``open_set``.
    """
    result = syn if isinstance(syn, SyntheticSet) else load(syn)
    if result.origin.transform.get("kind") != "zca":
        return result, Transform.from_description(result.origin.transform)
    _, arrays = open_set(syn, dataset, download=download)
    return result, transform_of(result, arrays, cache_folder())


def split_of(syn: SyntheticSet, arrays: Arrays) -> tuple[Tensor, Tensor]:
    """Return the indices (train, held out) of the training samples that a set was and was not made from.

    Raises:
        ValueError: other samples would be held out, because those of ``arrays`` have another order. Sets of version 0.1
            may not record which samples were.
    """
    train, held_out = syn.origin.split.indices(torch.from_numpy(arrays.y_train))
    recorded = syn.origin.dataset.get("held_out")
    if recorded and fingerprint(arrays.x_train, arrays.y_train, held_out.tolist()) != recorded:
        raise ValueError(
            f"the held-out samples of the set cannot be found in {arrays.name}, which has the same samples in another "
            f"order; give {spelt('dataset')} with the file or folder that the set was distilled from"
        )
    return train, held_out


def training_samples(syn: SyntheticSet, arrays: Arrays) -> Images | None:
    """Return the samples that a set was distilled from, in the space of the data; all training samples if the set does
    not record a split, and None if it was made from other data. Raises ValueError as ``split_of`` does."""
    if arrays.fingerprint["train"] != syn.origin.fingerprint:
        return None
    train_index, _ = split_of(syn, arrays)
    return Images.of(arrays.x_train, torch.device("cpu")).subset(train_index)
