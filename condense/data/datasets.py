"""Data in: names, files, folders or what a Python user holds become checked, fingerprinted arrays.

The table ``known.json`` lists the constants that the literature uses for its data sets. It is searched by
content, so a file is recognised whatever it is called; entries without fingerprints (svhn, cifar100) are
matched by name alone. The constants of cifar100 are those of the DC, DSA and DM code (the MTT code reuses the
ones of cifar10); those of digits are measured here.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from condense.cache import cache_folder
from condense.data import store
from condense.data.layout import InputShape, kind
from condense.data.pixels import Array, numpy_of
from condense.data.reading import as_rgb, check_names, entries, pixels_of, read_images, read_npz, text_of
from condense.data.samples import IN_FILE, STANDARD, check_samples
from condense.files import expanded
from condense.names import excerpt, reason, spelt, suggest
from condense.plugins import Registry

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

_MOST_CLASSES = 100_000
_READ_TWICE = 16
"""Items of a Dataset that are read twice, to see whether it gives the same at every reading."""


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

    Images (N, C, H, W) and clips (N, T, C, H, W) have one or three channels and are uint8 (0..255), or float32 in
    [0, 1] where the source holds values other than k/255. Series (N, C, L) are float32 and finite. Labels are int64,
    0..C-1, each with at least one training sample. The test arrays are empty where only training data were given.
    ``known`` is None for data that the table does not list. Arrays that were found in a cache are mapped from its
    files.
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
    def input_shape(self) -> InputShape:
        """Of one sample: (C, L), (C, H, W) or (T, C, H, W)."""
        return self.x_train.shape[1:]

    @property
    def strategy(self) -> str:
        """The augmentation strategy of the literature; for unknown images every operation but the flip.

        Pixels do not tell whether a mirrored image keeps its class, so a flip has to be asked for. Series and clips
        are not augmented.
        """
        if kind(self.input_shape) != "images":
            return "none"
        return self.known.augment if self.known else "color_crop_cutout_scale_rotate"


Loader: TypeAlias = Callable[[Path, bool], Source]
"""``loader(root, download)``: a data set of another package, as a path or as what a Python user may hold. ``root`` is
the folder of downloaded data, ``download`` whether the user allows to download. Its docstring describes the data."""

LOADERS: Registry[Loader] = Registry(
    "data set",
    "condense.datasets",
    {},
    lambda name, value: None if callable(value) else f"is {value!r} and not a function of (root, download)",
)
"""Data sets of other packages by name; a name that the literature uses cannot be taken."""


def names() -> list[str]:
    """The names that ``load`` takes."""
    return list(dict.fromkeys([*_table(), *LOADERS]))


def describe(name: str) -> str:
    """One line about a data set that has a name."""
    if name not in _table():
        return (inspect.getdoc(LOADERS[name]) or "").partition("\n")[0]
    known = _table()[name]
    classes = ", ".join(known.classes[:3])
    return f"{len(known.classes)} classes ({classes}, ...); DSA by {known.augment.replace('_', ', ')}"


def load(
    source: Source,
    *,
    layout: str | None = None,
    root: str | Path | None = None,
    download: bool = False,
    cache: Path | None = None,
) -> Arrays:
    """Read, check and fingerprint a data set.

    What is read through torchvision, from a file or from a folder is kept decoded in the folder ``cache``, if one is
    given: as long as the source does not change, later calls map those arrays and share the memory.

    ``source`` is one of

    * a name of ``names()``: ``digits`` is embedded (scikit-learn; of each class every fifth image is test),
      the others are read through torchvision from ``root`` (default: $CONDENSE_DATA, else
      ~/.cache/condense/data) and downloaded only if ``download`` is true;
    * a path to an ``.npz`` file with x_train, y_train, x_test, y_test and, optionally, classes (their names) and
      layout (see ``condense.data.samples``). A file without a layout holds series NCL if it has an array
      ``length_train`` and three axes of floats, as the UCR and UEA archives are stored; else images NHW, NHWC or
      NCHW or clips NTHWC or NTCHW, whose last axis holds the channels if its length is 1 or 3;
    * a folder with train/CLASS/* and test/CLASS/*: 8-bit images of one size, gray if all of them are, else
      RGB. They are turned the way their EXIF orientation says; an alpha channel is dropped;
    * a torch Dataset of (sample, label) pairs, all of it for training, or a pair (train, test) of them. Images
      are PIL images, arrays (HW, HWC) or tensors (HW, CHW); other samples are arrays or tensors. They are the same
      at every reading. Where both have torchvision's ``class_to_idx``, the labels of the test part are matched by
      the names of the classes;
    * tensors or arrays (x_train, y_train) or (x_train, y_train, x_test, y_test).

    ``layout`` names the axes of a Dataset's samples, with N in front, or of tensors or arrays. Without it they are
    images or clips: arrays are laid out as in a file, tensors have the channels before rows and columns if the length
    of that axis is 1 or 3, else at the end.

    Pixels are uint8 (0..255) or floats in [0, 1]; a split of floats that are all exactly k/255 is stored as
    uint8, so both forms are one data set. Series are finite floats, or integers that float32 holds exactly.

    Raises:
        ValueError: in one line, for anything that is missing, damaged or not of this form.
    """
    if isinstance(source, str | Path):
        if layout is not None:
            raise ValueError(
                f"layout={excerpt(layout)!r} with {excerpt(source)!r}: it says the axes of arrays and Datasets; add an "
                f"entry to an .npz file, {IN_FILE.format(excerpt(layout))}, and leave it out for names and folders"
            )
        return _load_path(source, root, download, cache)
    parts = list(source) if isinstance(source, tuple | list) else [source]
    datasets = [part for part in parts if isinstance(part, Dataset)]
    arrays = [part for part in parts if isinstance(part, Tensor | np.ndarray)]
    if len(datasets) == len(parts) and len(parts) in (1, 2):
        return _load_datasets(datasets, layout)
    if len(arrays) != len(parts) or len(parts) not in (2, 4):
        raise ValueError(_no_source(parts))
    return _assemble("custom", *arrays, layout=layout, channels_first=isinstance(arrays[0], Tensor))


Data: TypeAlias = str | Path | Arrays | Dataset[Any] | tuple[Any, ...]
"""A known name, a path, or data at hand: a Dataset, a (train, test) pair, (x_train, y_train, x_test, y_test)."""


def open_data(dataset: Data, download: bool = False) -> Arrays:
    """The data, decoded once and then mapped from the user's cache; see ``load``."""
    return dataset if isinstance(dataset, Arrays) else load(dataset, download=download, cache=cache_folder())


def name_of(dataset: Data) -> str:
    """The name of the data, as far as it is known before they are read: ``load`` gives them another one where it
    recognises a known data set by its content."""
    if isinstance(dataset, Arrays):
        return dataset.name
    if not isinstance(dataset, str | Path):
        return "custom"
    if dataset in names():
        return str(dataset)
    path = Path(dataset)
    return path.stem if path.suffix == ".npz" else path.resolve().name


def _no_source(parts: Sequence[Any]) -> str:
    kinds = ", ".join(type(part).__name__ for part in parts[:4]) + (", ..." if len(parts) > 4 else "")
    if any(type(part).__module__.split(".")[0] == "datasets" for part in parts):
        return (
            f"cannot read a data set from ({kinds}): data sets of Hugging Face are given as arrays; give "
            "(np.stack([np.asarray(image) for image in d['image']]), np.array(d['label'])) with your names of columns"
        )
    return (
        f"cannot read a data set from ({kinds}): it is no path, no Dataset and no pair of them; "
        "give tensors (x_train, y_train) or (x_train, y_train, x_test, y_test)"
    )


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
    """A sha256 over what a split holds, whatever the order of its samples.

    Each sample (its bytes as uint8 or little-endian float32) is hashed with its label; the sorted hashes are
    hashed with the type and the shape of a sample.
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
        name, files, place = str(source), _TORCHVISION[str(source)][1], _root(root)
        return _kept(cache, name, place, lambda: place.glob(files), lambda: _load_torchvision(name, place, download))
    if isinstance(source, str) and source in LOADERS:
        return _load_plugin(source, _root(root), download, cache)
    try:
        path = expanded(source)
        there = path.exists()
        if there:
            _check_encoding(path)
        if path.is_dir():
            return _kept(cache, "folder", path, lambda: _in_folder(path), lambda: _load_folder(path))
        if path.is_file():
            return _kept(cache, path.stem, path, lambda: [path], lambda: _load_npz(path))
    except OSError as error:  # a name that is too long
        raise ValueError(f"no data set {excerpt(source)!r}: {reason(error)}; check the path") from error
    if there:
        raise ValueError(f"no data set {str(source)!r}: it is neither a file nor a folder; give an .npz or a folder")
    raise ValueError(
        f"no data set {excerpt(source)!r}: there is no such file or folder; by name "
        f"{suggest(str(source)[:80], names())}"
    )


def _root(root: str | Path | None) -> Path:
    """Where data that have a name lie."""
    return expanded(root or os.environ.get("CONDENSE_DATA") or "~/.cache/condense/data")


def _load_plugin(name: str, root: Path, download: bool, cache: Path | None) -> Arrays:
    """A data set of another package."""
    try:
        source = LOADERS[name](root, download)
        arrays = load(Path(source) if isinstance(source, str | Path) else source, cache=cache)
    except Exception as error:  # the code of a stranger may raise anything
        raise ValueError(
            f"cannot read the data set {name!r} of the package {LOADERS.package(name)}: {reason(error)}; "
            f"correct or update that package, or give {spelt('dataset', 'PATH.npz')}"
        ) from error
    return dataclasses.replace(arrays, name=name)


def _check_encoding(path: Path) -> None:
    """Raises ValueError where a path is not UTF-8: sets and ``run.json`` name it, and could not be read again."""
    whole = path.resolve()
    try:
        str(whole).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"cannot read {excerpt(whole)}: its path is not valid UTF-8; rename it") from error


def _kept(
    cache: Path | None, kind: str, path: Path, files: Callable[[], Iterable[Path]], read: Callable[[], Arrays]
) -> Arrays:
    """What ``read`` returns, from the cache where that was made from the ``files`` as they are now."""
    before = store.stamp(path, files()) if cache else None
    if before is None:
        return read()
    key = {"reader": kind, "path": str(path.resolve())}
    if stored := _from_store(cache, key, before):
        return stored
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
    store.write(cache, key, before, content, facts, about=str(path))
    return _from_store(cache, key, before) or arrays


def _from_store(cache: Path | None, key: Mapping[str, str], source: str) -> Arrays | None:
    stored = store.read(cache, key, source)
    if stored is None:
        return None
    arrays, facts = stored
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
    except Exception as error:  # a damaged file raises nearly anything
        mend = "check the network" if download else f"add {spelt('download', True)}"
        raise ValueError(
            f"cannot read {name} from {root}: {reason(error)}; {mend}, or give {spelt('dataset', 'PATH.npz')}"
        ) from error
    return _assemble(name, *train, *test, known=_table()[name])


def _load_npz(path: Path) -> Arrays:
    found, present = read_npz(path, (*_ARRAYS, "classes", "layout"))
    missing = [key for key in _ARRAYS if key not in found]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}: all of {', '.join(_ARRAYS)} are needed; add them")
    classes = _names_of(found["classes"], f" of {path}", len(found["x_train"])) if "classes" in found else None
    return _assemble(
        path.stem,
        *(found[key] for key in _ARRAYS),
        classes=classes,
        layout=_layout_of(path, found, present),
        where=f" of {path}",
    )


def _layout_of(path: Path, found: Mapping[str, Array], present: Collection[str]) -> str | None:
    """What an ``.npz`` file says of the axes of its samples; the archives UCR and UEA say it by their lengths."""
    if "layout" in found:
        return text_of(f"layout of {path}", found["layout"])
    samples = found["x_train"]
    return STANDARD["series"] if "length_train" in present and samples.ndim == 3 and samples.dtype.kind == "f" else None


def _names_of(classes: Array, where: str, most: int) -> list[str]:
    """The array ``classes`` of a file as text; each class needs one of the ``most`` training images."""
    if classes.ndim != 1 or classes.dtype.kind not in "USbiufmM":
        raise ValueError(
            f"classes{where} is {excerpt(classes.dtype)} of shape {excerpt(classes.shape)}: names are one axis of "
            "text; give np.array([NAME, NAME, ...])"
        )
    if len(classes) > most:
        raise ValueError(
            f"classes{where} has {len(classes)} names for {most} training images: each class needs one; "
            "leave out the names of absent classes"
        )
    try:
        return classes.astype(str).tolist()
    except UnicodeDecodeError as error:
        raise ValueError(f"classes{where} are bytes other than ASCII: {reason(error)}; give text") from error


def _load_folder(folder: Path) -> Arrays:
    class_folders = [path for path in _visible(folder / "train") if path.is_dir()]
    classes = [path.name for path in class_folders]
    splits: dict[str, list[Array]] = {"train": [], "test": []}
    labels: dict[str, list[int]] = {"train": [], "test": []}
    first: tuple[int, ...] = ()
    for split, images in splits.items():
        files: list[Path] = []
        for class_folder in _visible(folder / split):
            if class_folder.name not in classes:
                raise ValueError(
                    f"{class_folder} is no class: classes are the folders in {folder / 'train'}; move it away"
                )
            inside = _visible(class_folder)
            if split == "train" and not inside:
                raise ValueError(f"{class_folder} has no image: each class needs at least one; move the folder away")
            files += inside
            labels[split] += [classes.index(class_folder.name)] * len(inside)
        if not files:
            raise ValueError(f"{folder / split} has no images: it holds a folder of images for each class; add them")
        for file, image in read_images(files):
            first = first or image.shape[:2]
            if image.shape[:2] != first:
                height, width = image.shape[:2]
                raise ValueError(
                    f"{file} is {width}x{height}, the images before it are {first[1]}x{first[0]}: "
                    "all must share one size; resize it"
                )
            images.append(image)
    all_images = as_rgb(splits["train"] + splits["test"])
    num_train = len(labels["train"])
    arrays = (
        array
        for images, split in ((all_images[:num_train], "train"), (all_images[num_train:], "test"))
        for array in (np.array(images, dtype=np.uint8), np.array(labels[split], dtype=np.int64))
    )
    return _assemble(folder.resolve().name, *arrays, classes=classes, where=f" of {folder}")


def _in_folder(folder: Path) -> Iterable[Path]:
    """All that ``_load_folder`` looks at."""
    return (file for split in ("train", "test") for depth in ("", "/*", "/*/*") for file in folder.glob(split + depth))


def _visible(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: an image folder holds train/CLASS/* and test/CLASS/*; create it")
    return entries(folder)


def _load_datasets(parts: Sequence[Dataset[Any]], layout: str | None) -> Arrays:
    """One Dataset for training and, optionally, one for testing."""
    read = [_read_dataset(part) for part in parts]
    names = [_class_indices(part) for part in parts]
    train = names[0]
    if len(parts) == 2 and train and names[1] and names[1] != train:
        foreign = [name for name in names[1] if name not in train]
        if foreign:
            raise ValueError(
                f"the test part has the class {foreign[0]!r}, the training part has not: classes are matched by name; "
                "give two parts with the same classes"
            )
        images, labels = read[1]
        _check_range("the test part", labels, len(names[1]), "class_to_idx has to tell the labels of the items")
        order = sorted(names[1], key=names[1].__getitem__)
        read[1] = images, np.array([train[name] for name in order])[labels]
    count = int(read[0][1].max()) + 1
    return _assemble(
        "custom",
        *(array for part in read for array in part),
        classes=sorted(train, key=train.__getitem__) if train and len(train) == count else None,
        layout=layout,
        channels_first=isinstance(read[0][0], Tensor),
    )


def _class_indices(dataset: Dataset[Any]) -> dict[str, int] | None:
    """The label of each class by its name, where a data set in the manner of torchvision says so."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    found = getattr(dataset, "class_to_idx", None)
    if not isinstance(found, dict) or getattr(dataset, "target_transform", None) is not None:
        return None
    numbers = list(found.values())
    whole = all(isinstance(number, int) for number in numbers)
    return found if whole and sorted(numbers) == list(range(len(numbers))) else None


def _read_dataset(dataset: Dataset[Any]) -> tuple[Tensor | Array, Array]:
    kind = type(dataset).__name__
    if not isinstance(dataset, Sized):
        raise ValueError(f"{kind} has no length: only map-style datasets are read; give tensors")
    num = len(dataset)
    if not num:
        raise ValueError(f"{kind} is empty: at least one image is needed; give another dataset")
    for index in np.unique(np.linspace(0, num - 1, _READ_TWICE).astype(int)).tolist():
        (one, label, _), (other, other_label, _) = _item(dataset, index), _item(dataset, index)
        if label != other_label or one.shape != other.shape or one.tobytes() != other.tobytes():
            raise ValueError(
                f"item {index} of {kind} differs from one reading to the next: one random draw would be distilled; "
                "take random transforms out of the dataset and name an augmentation instead"
            )
    images, labels = [], []
    form: type = Tensor
    for index in range(num):
        image, label, form = _item(dataset, index)
        images.append(image)
        labels.append(label)
        axes = None if form in (Tensor, np.ndarray) else 2  # of PIL images, gray ones may stand beside coloured ones
        if image.shape[:axes] != images[0].shape[:axes]:
            raise ValueError(
                f"image {index} of {kind} has shape {image.shape}, the first has {images[0].shape}: "
                "all must share one; make them so in the dataset"
            )
    stacked = np.stack(images if form in (Tensor, np.ndarray) else as_rgb(images))
    return torch.from_numpy(stacked) if form is Tensor else stacked, np.array(labels)


def _item(dataset: Dataset[Any], index: int) -> tuple[Array, int, type]:
    """Image, label, and what the image was: a tensor, an array or a picture of PIL."""
    from PIL import Image

    kind = type(dataset).__name__
    try:
        item = dataset[index]
    except Exception as error:
        raise ValueError(f"item {index} of {kind} cannot be read: {reason(error)}; mend the dataset") from error
    if not isinstance(item, tuple | list) or len(item) != 2:
        found = f"a {type(item).__name__}"
        if isinstance(item, dict):
            found += f" with the keys {excerpt(', '.join(map(str, item)))}"
        elif isinstance(item, tuple | list):
            found += f" of {len(item)}"
        raise ValueError(f"item {index} of {kind} is {found}: items are (image, label) pairs; return such a pair")
    image, label = item
    form = next((form for form in (Tensor, Image.Image, np.ndarray) if isinstance(image, form)), None)
    if form is None:
        raise ValueError(
            f"image {index} of {kind} is of type {type(image).__name__}: images are PIL images, arrays or tensors; "
            "convert it in the dataset"
        )
    try:
        pixels = pixels_of(image) if form is Image.Image else numpy_of(f"image {index} of {kind}", image)
    except (OSError, ValueError) as error:
        raise ValueError(f"item {index} of {kind} cannot be read: {error}") from error
    number = np.asarray(label) if not isinstance(label, Tensor) else numpy_of(f"label {index} of {kind}", label)
    if number.shape:
        raise ValueError(
            f"label {index} of {kind} has shape {excerpt(number.shape)}: labels are single integers; "
            "give the class number"
        )
    if number.dtype.kind not in "iu":
        raise ValueError(
            f"label {index} of {kind} is {excerpt(repr(label))}: labels must be integers; give the class number, "
            "an int in 0..C-1"
        )
    return pixels, int(number), form


def _assemble(
    name: str,
    x_train: Any,
    y_train: Any,
    x_test: Any = None,
    y_test: Any = None,
    *,
    classes: Sequence[str] | None = None,
    layout: str | None = None,
    channels_first: bool = False,
    known: Known | None = None,
    where: str = "",
) -> Arrays:
    """Check everything and put it in order; ``where`` names the file in messages."""
    renumber = _renumber(with_test=x_test is not None)
    remedy = IN_FILE if where else 'condense.data.load(..., layout="{}")'
    x_train = check_samples(f"x_train{where}", x_train, layout, channels_first=channels_first, remedy=remedy)
    y_train = _check_labels(f"y_train{where}", y_train, len(x_train), renumber)
    classes = None if classes is None else check_names(f"classes{where}", classes)
    present = np.unique(y_train)
    count = int(present[-1]) + 1 if classes is None else len(classes)
    _check_range(f"y_train{where}", y_train, count, renumber if present[0] < 0 else "give a name for each class")
    if len(present) < count:
        empty = int(np.append(np.flatnonzero(present != np.arange(len(present))), len(present))[0])
        raise ValueError(
            f"y_train{where} has no image of class {empty}: each label of 0..{count - 1} needs at least one; "
            + _without_class(empty, y_test, classes, renumber)
        )
    if count < 2:
        raise ValueError(f"y_train{where} has one class: there is nothing to tell apart; give at least two")
    if count > _MOST_CLASSES:
        raise ValueError(f"y_train{where} has {count} classes: {_MOST_CLASSES} are the most; give fewer")
    if x_test is None:
        x_test, y_test = np.empty((0, *x_train.shape[1:]), x_train.dtype), np.empty(0, np.int64)
    else:
        x_test = check_samples(f"x_test{where}", x_test, layout, channels_first=channels_first, remedy=remedy)
        y_test = _check_labels(f"y_test{where}", y_test, len(x_test), renumber)
        _check_range(f"y_test{where}", y_test, count, "leave out the test images of other classes")
        if x_test.shape[1:] != x_train.shape[1:]:
            raise ValueError(
                f"x_test{where} has samples of shape {x_test.shape[1:]}, x_train of shape {x_train.shape[1:]} "
                f"({', '.join(STANDARD[kind(x_train.shape[1:])][1:])}): they must agree; convert one of them"
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


def _check_labels(what: str, labels: Tensor | Array, count: int, renumber: str) -> Array:
    cast = ".long()" if isinstance(labels, Tensor) else ".astype('int64')"
    labels = numpy_of(what, labels)
    if labels.shape != (count,):
        mend = "give one for each image"
        if labels.ndim == 2 and labels.shape == (count, 1):
            mend = "give y.reshape(-1)"
        elif labels.ndim == 2 and len(labels) == count:
            mend = "give the class numbers, y.argmax(1) where the rows are one-hot"
        raise ValueError(
            f"{what} has shape {excerpt(labels.shape)}: there are {count} images, each needs one label; {mend}"
        )
    kind = labels.dtype.kind
    if kind in "iu" and labels.max() <= np.iinfo(np.int64).max:
        return labels.astype(np.int64)
    if kind == "f" and not np.isfinite(labels).all():
        mend = "leave out the images without a label"
    elif kind == "f" and not np.array_equal(labels, np.rint(labels)):
        mend = "only classes are distilled, no regression targets, so give the number of each image's class"
    elif kind == "b" or (kind == "f" and np.abs(labels).max() < 2**53):
        mend = f"give y{cast}"
    elif kind in "iufUSmM":
        mend = renumber
    else:
        mend = "give the number of each image's class"
    raise ValueError(f"{what} is {excerpt(labels.dtype)}: labels must be integers, 0..C-1; {mend}")


def _check_range(what: str, labels: Array, count: int, mend: str) -> None:
    low, high = labels.min(), labels.max()
    if low < 0 or high >= count:
        raise ValueError(f"{what} has labels from {low} to {high}: they lie in 0..{count - 1}; {mend}")


def _renumber(with_test: bool) -> str:
    """How any labels become 0..C-1, the same in both parts."""
    if not with_test:
        return "number them with classes, y_train = np.unique(y_train, return_inverse=True)"
    return (
        "number them together with classes, y = np.unique(np.concatenate([y_train, y_test]), return_inverse=True), "
        "then y_train, y_test = y[:len(y_train)], y[len(y_train):]"
    )


def _without_class(empty: int, y_test: Any, classes: Sequence[str] | None, renumber: str) -> str:
    """What mends that the class ``empty`` has no training image."""
    if y_test is not None and empty in numpy_of("y_test", y_test):
        return "the test part has some, so add training images, or leave its test images out and number the rest anew"
    if classes is not None:
        return f"take the name {excerpt(classes[empty])!r} out of the classes and lower all labels above {empty} by one"
    return renumber
