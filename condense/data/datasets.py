"""Data in: names, files, folders or what a Python user holds become checked, fingerprinted arrays.

The table ``known.json`` lists the constants that the literature uses for its data sets. It is searched by
content, so a file is recognised whatever it is called; entries without fingerprints (svhn, cifar100) are
matched by name alone. The constants of cifar100 are those of the DC, DSA and DM code (the MTT code reuses the
ones of cifar10); those of digits are measured here.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from condense.data import store
from condense.names import spelt, suggest

Array: TypeAlias = NDArray[Any]
Source: TypeAlias = str | Path | Dataset[Any] | Sequence[Dataset[Any]] | Sequence[Tensor | Array]

_TORCHVISION = {
    "mnist": ("MNIST", "MNIST/raw/*"),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST/raw/*"),
    "svhn": ("SVHN", "*_32x32.mat"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py/*"),
    "cifar100": ("CIFAR100", "cifar-100-python/*"),
}
"""By name: torchvision's class, and the files that it reads under its root."""

_ARRAYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True, kw_only=True)
class Known:
    """What the literature fixes for a data set. ``train``, ``test``: fingerprints, None if not recorded."""

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str
    classes: tuple[str, ...]
    train: str | None
    test: str | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrays:
    """A checked data set.

    Images are NCHW with one or three channels: uint8 (0..255), or float32 in [0, 1] where the source holds
    values other than k/255. Labels are int64, 0..C-1, each with at least one training image. The test arrays
    are empty where only training data were given. ``known`` is None for data that the table does not list. Arrays
    that were found in a cache are mapped from its files.
    """

    name: str
    x_train: Array
    y_train: Array
    x_test: Array
    y_test: Array
    classes: tuple[str, ...]
    fingerprint: dict[str, str]
    known: Known | None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.x_train.shape[1:]
        return channels, height, width

    @property
    def strategy(self) -> str:
        """The augmentation strategy of the literature; for unknown data every operation but the flip.

        Pixels do not tell whether a mirrored image keeps its class, so a flip has to be asked for.
        """
        return self.known.augment if self.known else "color_crop_cutout_scale_rotate"


def names() -> list[str]:
    """The names that ``load`` takes."""
    return list(_table())


def describe(name: str) -> str:
    """One line about a known data set."""
    known = _table()[name]
    classes = ", ".join(known.classes[:3])
    return f"{len(known.classes)} classes ({classes}, ...); DSA by {known.augment.replace('_', ', ')}"


def load(
    source: Source, *, root: str | Path | None = None, download: bool = False, cache: Path | None = None
) -> Arrays:
    """Read, check and fingerprint a data set.

    What is read through torchvision, from a file or from a folder is kept decoded in the folder ``cache``, if one is
    given: as long as the source does not change, later calls map those arrays and share the memory.

    ``source`` is one of

    * a name of ``names()``: ``digits`` is embedded (scikit-learn; of each class every fifth image is test),
      the others are read through torchvision from ``root`` (default: $CONDENSE_DATA, else
      ~/.cache/condense/data) and downloaded only if ``download`` is true;
    * a path to an ``.npz`` file with x_train, y_train, x_test, y_test and, optionally, classes (their names).
      Images are NHW, NHWC or NCHW; of four axes the last holds the channels if its length is 1 or 3, else the
      second;
    * a folder with train/CLASS/* and test/CLASS/*: 8-bit images of one size, gray if all of them are, else
      RGB;
    * a torch Dataset of (image, label) pairs, all of it for training, or a pair (train, test) of them. Images
      are PIL images, arrays (HW, HWC) or tensors (HW, CHW), and the same at every reading;
    * tensors or arrays (x_train, y_train) or (x_train, y_train, x_test, y_test). Arrays are laid out as in a
      file; of the four axes of a tensor the second holds the channels if its length is 1 or 3, else the last.

    Pixels are uint8 (0..255) or floats in [0, 1]; a split of floats that are all exactly k/255 is stored as
    uint8, so both forms are one data set.

    Raises:
        ValueError: in one line, for anything that is missing, damaged or not of this form.
    """
    if isinstance(source, str | Path):
        return _load_path(source, root, download, cache)
    parts = list(source) if isinstance(source, tuple | list) else [source]
    datasets = [part for part in parts if isinstance(part, Dataset)]
    arrays = [part for part in parts if isinstance(part, Tensor | np.ndarray)]
    if len(datasets) == len(parts) and len(parts) in (1, 2):
        arrays = [array for dataset in datasets for array in _read_dataset(dataset)]
    elif len(arrays) != len(parts) or len(parts) not in (2, 4):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise ValueError(
            f"cannot read a data set from ({kinds}): it is no path, no Dataset and no pair of them; "
            "give tensors (x_train, y_train) or (x_train, y_train, x_test, y_test)"
        )
    return _assemble("custom", *arrays, channels_first=isinstance(arrays[0], Tensor))


def to_float(images: Array | Tensor) -> Tensor:
    """Images as float32 in [0, 1], on the device where they are: uint8 is divided by 255.

    New memory, except that a float32 tensor is returned as it is.
    """
    if isinstance(images, np.ndarray):
        images = torch.tensor(images)
    if images.dtype != torch.uint8:
        return images.float()
    return images.float().div_(torch.full((), 255.0, device=images.device))  # a number would be inverted on a GPU


def fingerprint(images: Array, labels: Array) -> str:
    """A sha256 over what a split holds, whatever the order of its images.

    Each image (its bytes as uint8 or little-endian float32) is hashed with its label; the sorted hashes are
    hashed with the image shape.
    """
    if images.dtype != np.uint8:
        images = images.astype("<f4")
    pixels = np.ascontiguousarray(images).reshape(len(images), math.prod(images.shape[1:])).view(np.uint8)
    rows = np.concatenate([pixels, labels.astype("<i8")[:, None].view(np.uint8)], axis=1)
    hashes = sorted(hashlib.sha256(row).digest() for row in rows)
    header = f"{images.dtype.str}/{images.shape[1:]}/".encode()
    return hashlib.sha256(header + b"".join(hashes)).hexdigest()


@functools.cache
def _table() -> dict[str, Known]:
    entries = json.loads(Path(__file__).with_name("known.json").read_text())
    return {
        name: Known(
            name=name,
            mean=tuple(entry["mean"]),
            std=tuple(entry["std"]),
            augment=entry["augment"],
            classes=tuple(entry["classes"]),
            train=entry["train"],
            test=entry["test"],
        )
        for name, entry in entries.items()
    }


def _load_path(source: str | Path, root: str | Path | None, download: bool, cache: Path | None) -> Arrays:
    if source == "digits":
        return _load_digits()
    if source in _TORCHVISION:
        name, files = str(source), _TORCHVISION[str(source)][1]
        place = Path(root or os.environ.get("CONDENSE_DATA") or "~/.cache/condense/data").expanduser()
        return _kept(cache, name, place, lambda: place.glob(files), lambda: _load_torchvision(name, place, download))
    path = Path(source).expanduser()
    if path.is_dir():
        return _kept(cache, "folder", path, lambda: _in_folder(path), lambda: _load_folder(path))
    if path.is_file():
        return _kept(cache, path.stem, path, lambda: [path], lambda: _load_npz(path))
    raise ValueError(
        f"no data set {str(source)!r}: there is no such file or folder; by name {suggest(str(source), names())}"
    )


def _kept(
    cache: Path | None, kind: str, path: Path, files: Callable[[], Iterable[Path]], read: Callable[[], Arrays]
) -> Arrays:
    """What ``read`` returns, from the cache where that was made from the ``files`` as they are now."""
    before = store.stamp(path, files()) if cache else None
    if cache is None or before is None:
        return read()
    digest = hashlib.sha256(f"{kind}/{path.resolve()}".encode()).hexdigest()
    entry = cache / "decoded" / digest[:16]
    if found := _from_store(entry, before):
        return found
    arrays = read()
    if store.stamp(path, files()) != before:
        return arrays
    content = {name: getattr(arrays, name) for name in _ARRAYS}
    facts = {
        "name": arrays.name,
        "classes": arrays.classes,
        "fingerprint": arrays.fingerprint,
        "known": arrays.known.name if arrays.known else None,
    }
    try:
        store.write(entry, before, content, facts)
    except OSError as error:
        if _from_store(entry, before) is None:  # else another process was faster
            warnings.warn(f"{path} is not cached, it will be decoded again next time: {error}", stacklevel=2)
    return _from_store(entry, before) or arrays


def _from_store(entry: Path, source: str) -> Arrays | None:
    found = store.read(entry, source)
    if found is None:
        return None
    arrays, facts = found
    return Arrays(
        **{name: arrays[name] for name in _ARRAYS},
        name=facts["name"],
        classes=tuple(facts["classes"]),
        fingerprint=facts["fingerprint"],
        known=_table().get(facts["known"]),
    )


def _load_digits() -> Arrays:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = (bunch.images / 16).astype(np.float32), bunch.target
    rank = np.empty_like(labels)
    for label in range(10):
        members = labels == label
        rank[members] = np.arange(members.sum())
    test = rank % 5 == 4
    return _assemble("digits", images[~test], labels[~test], images[test], labels[test], known=_table()["digits"])


def _load_torchvision(name: str, root: Path, download: bool) -> Arrays:
    from torchvision import datasets

    def read(train: bool) -> tuple[Array, Array]:
        if name == "svhn":
            split = datasets.SVHN(str(root), split="train" if train else "test", download=download)
            return split.data, split.labels
        split = getattr(datasets, _TORCHVISION[name][0])(str(root), train=train, download=download)
        return np.asarray(split.data), np.asarray(split.targets)

    try:
        train, test = read(True), read(False)
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        mend = "check the network" if download else f"add {spelt('download', True)}"
        raise ValueError(
            f"cannot read {name} from {root}: {_first_line(error)}; {mend}, or give {spelt('dataset', 'PATH.npz')}"
        ) from error
    return _assemble(name, *train, *test, known=_table()[name])


def _load_npz(path: Path) -> Arrays:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            found = {key: file[key] for key in _ARRAYS if key in file.files}
            classes = file["classes"].astype(str).ravel().tolist() if "classes" in file.files else None
    except Exception as error:  # a damaged zip raises nearly anything
        raise ValueError(
            f"cannot read {path}: {_first_line(error)}; give an .npz file of plain arrays ({', '.join(_ARRAYS)})"
        ) from error
    missing = [key for key in _ARRAYS if key not in found]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}: all of {', '.join(_ARRAYS)} are needed; add them")
    return _assemble(path.stem, *(found[key] for key in _ARRAYS), classes=classes, where=f" of {path}")


def _load_folder(folder: Path) -> Arrays:
    classes = [path.name for path in _visible(folder / "train") if path.is_dir()]
    splits: dict[str, list[Array]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    first: tuple[int, ...] = ()
    for split, images in splits.items():
        for class_folder in _visible(folder / split):
            if class_folder.name not in classes:
                raise ValueError(
                    f"{class_folder} is no class: classes are the folders in {folder / 'train'}; move it away"
                )
            for file in _visible(class_folder):
                image = _read_image(file)
                first = first or image.shape[:2]
                if image.shape[:2] != first:
                    height, width = image.shape[:2]
                    raise ValueError(
                        f"{file} is {width}x{height}, the images before it are {first[1]}x{first[0]}: "
                        "all must share one size; resize it"
                    )
                images.append(image)
                labels[split].append(classes.index(class_folder.name))
    if any(image.ndim == 3 for images in splits.values() for image in images):
        for split, images in splits.items():
            splits[split] = [np.stack([image] * 3, axis=-1) if image.ndim == 2 else image for image in images]
    arrays = (
        array
        for split, images in splits.items()
        for array in (np.array(images, dtype=np.uint8), np.array(labels[split], dtype=np.int64))
    )
    return _assemble(folder.resolve().name, *arrays, classes=classes, where=f" of {folder}")


def _in_folder(folder: Path) -> Iterable[Path]:
    """All that ``_load_folder`` looks at."""
    return (file for split in ("train", "test") for depth in ("", "/*", "/*/*") for file in folder.glob(split + depth))


def _visible(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: an image folder holds train/CLASS/* and test/CLASS/*; create it")
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _read_image(file: Path) -> Array:
    """HW where the file is gray, HWC where it has colour; an alpha channel is dropped."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels have more than 8 bits (mode {image.mode})")
            return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(
            f"cannot read {file}: {_first_line(error)}; replace it by an 8-bit image, or remove it"
        ) from error


def _read_dataset(dataset: Dataset[Any]) -> tuple[Tensor | Array, Array]:
    kind = type(dataset).__name__
    if not isinstance(dataset, Sized):
        raise ValueError(f"{kind} has no length: only map-style datasets are read; give tensors")
    images, labels = [], []
    for index in range(len(dataset)):
        try:
            image, label = dataset[index]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"item {index} of {kind} cannot be read: {_first_line(error)}; make it an (image, label) pair"
            ) from error
        images.append(_numpy(image) if isinstance(image, Tensor) else np.asarray(image))
        labels.append(np.asarray(label))
        if images[-1].shape != images[0].shape:
            raise ValueError(
                f"image {index} of {kind} has shape {images[-1].shape}, the first has {images[0].shape}: "
                "all must share one; resize them in the dataset"
            )
        if labels[-1].shape:
            raise ValueError(
                f"label {index} of {kind} has shape {labels[-1].shape}: labels are single integers; "
                "give the class number"
            )
    if not images:
        raise ValueError(f"{kind} is empty: at least one image is needed; give another dataset")
    stacked = np.stack(images)
    return torch.from_numpy(stacked) if isinstance(image, Tensor) else stacked, np.stack(labels)


def _assemble(
    name: str,
    x_train: Any,
    y_train: Any,
    x_test: Any = None,
    y_test: Any = None,
    *,
    classes: Sequence[str] | None = None,
    channels_first: bool = False,
    known: Known | None = None,
    where: str = "",
) -> Arrays:
    """Check everything and put it in order; ``where`` names the file in messages."""
    x_train = _check_images(f"x_train{where}", x_train, channels_first)
    y_train = _check_labels(f"y_train{where}", y_train, len(x_train))
    present = np.unique(y_train)
    count = int(present[-1]) + 1 if classes is None else len(classes)
    _check_range(f"y_train{where}", y_train, count)
    if len(present) < count:
        empty = next(label for label in range(count) if label not in present)
        raise ValueError(
            f"y_train{where} has no image of class {empty}: each label of 0..{count - 1} needs at least one; "
            "renumber the labels, or leave the class out"
        )
    if count < 2:
        raise ValueError(f"y_train{where} has one class: there is nothing to tell apart; give at least two")
    if x_test is None:
        x_test, y_test = np.empty((0, *x_train.shape[1:]), x_train.dtype), np.empty(0, np.int64)
    else:
        x_test = _check_images(f"x_test{where}", x_test, channels_first)
        y_test = _check_labels(f"y_test{where}", y_test, len(x_test))
        _check_range(f"y_test{where}", y_test, count)
        if x_test.shape[1:] != x_train.shape[1:]:
            raise ValueError(
                f"x_test{where} has images of shape {x_test.shape[1:]}, x_train of shape {x_train.shape[1:]} "
                "(channels, height, width): they must agree; convert one of them"
            )
    found = {"train": fingerprint(x_train, y_train), "test": fingerprint(x_test, y_test)}
    known = known or _recognise(found, has_test=len(x_test) > 0)
    if known:
        name, classes = known.name, known.classes
    return Arrays(
        name=name,
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
        classes=tuple(map(str, range(count)) if classes is None else classes),
        fingerprint=found,
        known=known,
    )


def is_known(name: str, fingerprint: str) -> bool:
    """Whether ``name`` is in the table, and the training split of this fingerprint is what it means there."""
    known = _table().get(name)
    return known is not None and known.train in (None, fingerprint)


def _recognise(found: dict[str, str], has_test: bool) -> Known | None:
    """The known data set of which these are the splits; the test split may be missing, but not be another."""
    for known in _table().values():
        if known.train == found["train"] and (known.test == found["test"] or not has_test):
            return known
    return None


def _check_images(what: str, images: Tensor | Array, channels_first: bool) -> Array:
    images = _numpy(images)
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4:
        axes = [axis for axis in ((1, 3) if channels_first else (3, 1)) if images.shape[axis] in (1, 3)]
        if not axes:
            raise ValueError(
                f"{what} has shape {images.shape}: neither its second nor its last axis has length 1 or 3; "
                "give NHW, NHWC or NCHW"
            )
        images = np.moveaxis(images, axes[0], 1)
    else:
        raise ValueError(f"{what} has shape {images.shape}: images are NHW, NHWC or NCHW; reshape it")
    if images.size == 0:
        raise ValueError(f"{what} is empty (shape {images.shape}): at least one image is needed; add some")
    if images.dtype == np.uint8:
        return np.ascontiguousarray(images)
    if images.dtype.kind != "f":
        raise ValueError(
            f"{what} is {images.dtype}: pixels are uint8 (0 to 255) or floats in [0, 1]; convert with .astype('uint8')"
        )
    if not np.isfinite(images).all():
        raise ValueError(f"{what} has NaN or infinite pixels: every pixel must be in [0, 1]; clean the data")
    low, high = images.min(), images.max()
    if low < 0 or high > 1:
        raise ValueError(
            f"{what} has pixels from {low:g} to {high:g}: floats must lie in [0, 1]; divide by 255 and "
            f"leave normalisation to {spelt('transform')}"
        )
    images = np.ascontiguousarray(images, dtype=np.float32)
    quantised = np.rint(images * 255).astype(np.uint8)
    exact = np.array_equal(quantised.astype(np.float32) / 255, images)
    return quantised if exact else images


def _check_labels(what: str, labels: Tensor | Array, count: int) -> Array:
    labels = _numpy(labels)
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{what} is {labels.dtype}: labels must be integers; convert with .astype('int64')")
    if labels.shape != (count,):
        raise ValueError(
            f"{what} has shape {labels.shape}: there are {count} images, each needs one label; reshape it to ({count},)"
        )
    return labels.astype(np.int64)


def _check_range(what: str, labels: Array, count: int) -> None:
    low, high = labels.min(), labels.max()
    if low < 0 or high >= count:
        raise ValueError(f"{what} has labels from {low} to {high}: they lie in 0..{count - 1}; renumber them")


def _numpy(array: Tensor | Array) -> Array:
    if isinstance(array, Tensor):
        array = array.detach().cpu()
        return (array.float() if array.dtype == torch.bfloat16 else array).numpy()
    return array


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
