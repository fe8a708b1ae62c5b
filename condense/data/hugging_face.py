"""Data sets of Hugging Face's library ``datasets``: objects that are at hand, and names.

Splits are found by name: ``train``, and ``test`` or else ``validation``. The column of images is the only one of type
``Image``, that of classes the only ``ClassLabel``, or else the column ``label``.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

from torch.utils.data import Dataset

from condense.data.listing import PARTS, Listing, Photo
from condense.data.reading import check_names
from condense.names import excerpt, reason, spelt

PREFIX = "hf:"
"""What the name of a data set of Hugging Face begins with."""


@runtime_checkable
class HuggingFace(Protocol):
    """A ``datasets.Dataset``, or a ``datasets.DatasetDict`` of its splits."""

    @property
    def column_names(self) -> Any: ...

    def cast_column(self, column: str, feature: Any) -> Any: ...


class Rows(Dataset[Any]):
    """The rows of one split as pairs (image, label), with torchvision's ``class_to_idx``."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.image, self.label = _columns(rows)
        names = getattr(rows.features[self.label], "names", None)
        self.class_to_idx = None if names is None else {name: index for index, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        row = self.rows[index]
        return row[self.image], row[self.label]


def is_name(source: object) -> bool:
    """Return whether a source is the name of a data set of Hugging Face."""
    return isinstance(source, str) and source.startswith(PREFIX)


def named(name: str, download: bool) -> HuggingFace:
    """Return the data set ``hf:NAME``, from the local cache of the library unless ``download`` is true.

    Raises:
        ValueError: the library is not installed, or it cannot read the data set.
    """
    try:
        from datasets import config, load_dataset
        from huggingface_hub import constants
    except ImportError as error:
        raise ValueError(
            f"{excerpt(name)} is read by the library datasets, which is not installed; pip install datasets, or give "
            f"{spelt('dataset', 'PATH.npz')}"
        ) from error
    try:
        with contextlib.nullcontext() if download else _offline(config, constants):
            loaded = load_dataset(name.removeprefix(PREFIX))
    except Exception as error:  # a library that runs code of others can raise any exception
        fix = "check the name and the internet connection" if download else f"add {spelt('download', True)}"
        raise ValueError(f"cannot read {excerpt(name)}: {reason(error)}; {fix}") from error
    assert isinstance(loaded, HuggingFace)
    return loaded


@contextlib.contextmanager
def _offline(*settings: Any) -> Iterator[None]:
    """Keep the library and its client of the hub from the internet, as ``HF_HUB_OFFLINE=1`` in the environment would if
    it had been set before they were imported. ``DownloadConfig(local_files_only=True)`` does not reach the client."""
    with contextlib.ExitStack() as restoring:
        for module in settings:
            restoring.callback(setattr, module, "HF_HUB_OFFLINE", module.HF_HUB_OFFLINE)
            module.HF_HUB_OFFLINE = True
        yield


def parts(source: HuggingFace) -> list[Rows]:
    """Return the training split and, if there is one, the test split.

    Raises:
        ValueError: there is no training split, or the columns cannot be told.
    """
    if not isinstance(source, Mapping):
        return [Rows(source)]
    found = {PARTS[name.lower()]: rows for name, rows in source.items() if name.lower() in PARTS}
    if "train" not in found:
        raise ValueError(
            f"the data set has the splits {excerpt(', '.join(map(str, source)))} and no train: networks need training "
            "images; give a DatasetDict with train and test"
        )
    test = found.get("test", found.get("val"))
    return [Rows(found["train"]), *([] if test is None else [Rows(test)])]


def list_rows(source: HuggingFace) -> Listing:
    """Return the stored images of a data set as photos, which are not decoded.

    Raises:
        ValueError: as ``parts``; a transform is set; the splits have other classes, or the labels have no names.
    """
    train, *test = parts(source)
    classes = check_names("the data set", train.class_to_idx or ())
    if not classes:
        raise ValueError(
            f"the labels in the column {train.label!r} have no names: give d.class_encode_column({train.label!r})"
        )
    if test and test[0].class_to_idx != train.class_to_idx:
        raise ValueError("the test split has other classes than the training split: give splits with the same features")
    for rows in (train, *test):
        for index, label in enumerate(rows.rows[rows.label]):
            if label is None or not 0 <= int(label) < len(classes):
                raise ValueError(
                    f"row {index} of the {'training' if rows is train else 'test'} split has the label {label}, but "
                    f"classes are 0..{len(classes) - 1}: give a DatasetDict of splits with labels"
                )
    photos = [list(_photos(rows)) for rows in (train, *test)]
    return Listing(train=photos[0], test=photos[1] if test else (), classes=classes)


def _photos(part: Rows) -> Iterator[Photo]:
    from datasets import Image

    if part.rows.format["type"] == "custom":
        raise ValueError(
            "the data set has a transform: photos are prepared as they are stored; give d.with_format(None)"
        )
    stored = part.rows.cast_column(part.image, Image(decode=False))
    lock = threading.Lock()

    def opener(index: int) -> Callable[[], BinaryIO]:
        def opened() -> BinaryIO:
            with lock:
                image = stored[index][part.image]
            return io.BytesIO(image["bytes"]) if image["bytes"] is not None else Path(image["path"]).open("rb")

        return opened

    for index, label in enumerate(part.rows[part.label]):
        yield Photo(name=f"row {index}", label=label, open=opener(index))


def _columns(rows: Any) -> tuple[str, str]:
    """Return the names of the columns of images and of labels."""
    if not hasattr(rows, "__len__"):
        raise ValueError(f"a {type(rows).__name__} is streamed: only data sets with a length are read; load it whole")
    kinds = {name: type(feature).__name__ for name, feature in rows.features.items()}
    image = _only("Image", [name for name, kind in kinds.items() if kind == "Image"], kinds)
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    label = _only("ClassLabel", labels or [name for name in kinds if name == "label"], kinds)
    if getattr(rows.features[label], "dtype", "int64") == "string":
        raise ValueError(
            f"the column {label!r} is text: labels are numbers with names; give d.class_encode_column({label!r})"
        )
    return image, label


def _only(kind: str, names: Sequence[str], kinds: Mapping[str, str]) -> str:
    if len(names) != 1:
        listed = excerpt(", ".join(f"{name} ({kind})" for name, kind in kinds.items()))
        count = f"{len(names)} columns" if names else "no column"
        raise ValueError(
            f"the data set has {count} of type {kind}: one is needed, and the columns are {listed}; select two, "
            "d.select_columns([IMAGE, LABEL])"
        )
    return names[0]
