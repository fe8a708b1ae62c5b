"""Loading data: names, files, folders and Python objects become checked arrays with a fingerprint.

The table ``known.json`` lists the constants that the literature uses for its data sets. A data set is found in it by
its content, whatever the name of its file; entries without fingerprints (svhn) are found by name alone. A copy whose
images went through JPEG has a name with the quality (``cifar100-jpeg94``), because its images are not the original's.
The constants of cifar100 are those of the DC, DSA and DM code (the MTT code reuses those of cifar10), those of
imagenette64 are ImageNet's, and those of digits were measured.
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
from condense.data import hugging_face, store
from condense.data.graphs import READER_VERSION, is_tu_folder, read_tu
from condense.data.hugging_face import HuggingFace
from condense.data.layout import InputShape, kind
from condense.data.listing import is_listing
from condense.data.photos import command as photo_command
from condense.data.pixels import Array, numpy_of
from condense.data.reading import as_rgb, check_names, entries, pixels_of, read_images, read_npz, text_of
from condense.data.samples import IN_FILE, STANDARD, check_samples
from condense.files import expanded
from condense.names import excerpt, reason, spelt, suggest
from condense.plugins import Registry

Source: TypeAlias = (
    str | Path | Dataset[Any] | HuggingFace | Sequence[Dataset[Any] | HuggingFace] | Sequence[Tensor | Array]
)

_TORCHVISION = {
    "mnist": ("MNIST", "MNIST/raw/*"),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST/raw/*"),
    "svhn": ("SVHN", "*_32x32.mat"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py/*"),
    "cifar100": ("CIFAR100", "cifar-100-python/*"),
}
"""Name -> torchvision's class, and the files that it reads below its root."""

_ARRAYS = ("x_train", "y_train", "x_test", "y_test")

_MOST_CLASSES = 100_000
_READ_TWICE = 16
"""Number of items of a Dataset that are read twice, to check that it always returns the same."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """Constants of a data set in the literature. ``train``, ``test``: fingerprints, None if not recorded."""

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
    [0, 1] if the source holds values other than k/255. Series (N, C, L) are float32 and finite. Labels are int64,
    0..C-1, each with at least one training sample. The test arrays are empty if only training data were given.
    ``known`` is None for data that the table does not list. Arrays from a cache are mapped from its files.
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
        """Shape of one sample: (C, L), (C, H, W) or (T, C, H, W)."""
        return self.x_train.shape[1:]

    @property
    def strategy(self) -> str:
        """The augmentation strategy of the literature; for unknown images all operations except the flip.

        Whether a mirrored image keeps its class cannot be seen from the pixels, so a flip has to be requested. Series
        and clips are not augmented.
        """
        return _strategy(self.known, self.input_shape)


Loader: TypeAlias = Callable[[Path, bool], Source]
"""``loader(root, download)`` returns a data set of another package, as a path or an object that ``load`` takes.
``root`` is the folder of downloaded data; ``download`` says whether the user allows a download. The docstring of the
loader describes the data."""

LOADERS: Registry[Loader] = Registry(
    "data set",
    "condense.datasets",
    {},
    lambda name, value: None if callable(value) else f"is {value!r} and not a function of (root, download)",
)
"""Data sets of other packages by name; they cannot replace those of the literature."""


def names() -> list[str]:
    """Return the names that ``load`` accepts."""
    return list(dict.fromkeys(["digits", *_TORCHVISION, *LOADERS]))


def describe(name: str) -> str:
    """Return one line that describes the data set of this name."""
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

    Data that are read through torchvision, from a file or from a folder are stored decoded in the folder ``cache``, if
    one is given. Until the source changes, later calls map these arrays and share the memory.

    ``source`` is one of

    * a name of ``names()``: ``digits`` comes with scikit-learn (every fifth image of each class is a test image), the
      data sets of other packages are read by their loaders, and all others are read through torchvision from ``root``
      (default: $CONDENSE_DATA, else ~/.cache/condense/data). Data are downloaded only if ``download`` is true;
    * a path to an ``.npz`` file with x_train, y_train, x_test, y_test and, optionally, classes (their names) and
      layout (see ``condense.data.samples``). A file without a layout holds series NCL if it has an array
      ``length_train`` and three axes of floats, as the UCR and UEA archives are stored; else images NHW, NHWC or
      NCHW or clips NTHWC or NTCHW, whose last axis holds the channels if its length is 1 or 3;
    * a folder with train/CLASS/* and test/CLASS/*: 8-bit images of one size, gray if all of them are, else RGB. They
      are rotated according to their EXIF orientation; an alpha channel is dropped. ``condense.prepare`` makes a file of
      all other folders of photos;
    * a torch Dataset of (sample, label) pairs, all of it for training, or a pair (train, test) of them. Images
      are PIL images, arrays (HW, HWC) or tensors (HW, CHW); other samples are arrays or tensors. A Dataset must always
      return the same samples. If both have torchvision's ``class_to_idx``, the labels of the test part are matched by
      the names of the classes;
    * a ``Dataset`` or ``DatasetDict`` of Hugging Face, a pair of them, or ``hf:NAME``, see
      ``condense.data.hugging_face``;
    * tensors or arrays (x_train, y_train) or (x_train, y_train, x_test, y_test).

    ``layout`` names the axes of tensors or arrays, or those of a Dataset's samples with N in front. Without it they are
    images or clips: arrays have the axes of a file without a layout; tensors have the channels before rows and columns
    if the length of that axis is 1 or 3, else at the end.

    Pixels are uint8 (0..255) or floats in [0, 1]. A split whose floats are all exactly k/255 is stored as uint8, so
    both forms are the same data set. Series are finite floats, or integers that float32 represents exactly.

    Raises:
        ValueError: the data are missing, damaged or not of this form.
    """
    if isinstance(source, str | Path):
        if layout is not None:
            raise ValueError(
                f"layout={excerpt(layout)!r} with {excerpt(source)!r}: it names the axes of arrays and Datasets; add "
                f"an entry to an .npz file, {IN_FILE.format(excerpt(layout))}, and omit it for names and folders"
            )
        return _load_path(source, root, download, cache)
    parts: list[Any] = list(source) if isinstance(source, tuple | list) else [source]
    if all(isinstance(part, HuggingFace) for part in parts) and len(parts) in (1, 2):
        parts = [rows for part in parts for rows in hugging_face.parts(part)]
    datasets = [part for part in parts if isinstance(part, Dataset)]
    arrays = [part for part in parts if isinstance(part, Tensor | np.ndarray)]
    if len(datasets) == len(parts) and len(parts) in (1, 2):
        return _load_datasets(datasets, layout)
    if len(arrays) != len(parts) or len(parts) not in (2, 4):
        raise ValueError(_no_source(parts))
    return _assemble("custom", *arrays, layout=layout, channels_first=isinstance(arrays[0], Tensor))


Data: TypeAlias = str | Path | Arrays | Dataset[Any] | HuggingFace | tuple[Any, ...]
"""A name, a path, ``Arrays``, a Dataset, a pair (train, test) or arrays (x_train, y_train, x_test, y_test)."""


def open_data(dataset: Data, download: bool = False) -> Arrays:
    """Load the data (see ``load``), which are decoded once and then mapped from the user's cache."""
    return dataset if isinstance(dataset, Arrays) else load(dataset, download=download, cache=cache_folder())


def name_of(dataset: Data) -> str:
    """Return the name of data that were not read yet. ``load`` gives them another name if it recognises the content of
    a known data set."""
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
    return (
        f"cannot read a data set from ({kinds}): it is neither a path nor a Dataset nor a pair of Datasets; "
        "give tensors (x_train, y_train) or (x_train, y_train, x_test, y_test)"
    )


def to_float(images: Array | Tensor) -> Tensor:
    """Return samples as float32 on the same device; uint8 is divided by 255.

    The result is a copy, except that a float32 tensor is returned unchanged.
    """
    if isinstance(images, np.ndarray):
        images = torch.tensor(images)
    if images.dtype != torch.uint8:
        return images.float()
    return images.float().div_(
        torch.full((), 255.0, device=images.device)
    )  # a GPU multiplies by the inverse of a number


def fingerprint(images: Array, labels: Array, rows: Iterable[int] | None = None) -> str:
    """Return a sha256 of the content of a split, or of its samples at ``rows``, which does not depend on the order of
    the samples.

    Each sample (its bytes as uint8 or little-endian float32) is hashed with its label. The sorted hashes are then
    hashed with the type and the shape of a sample.
    """
    if images.dtype != np.uint8:
        images = images.astype("<f4", copy=False)
    pixels = np.ascontiguousarray(images).reshape(len(images), math.prod(images.shape[1:])).view(np.uint8)
    classes = labels.astype("<i8")
    chosen = range(len(pixels)) if rows is None else rows
    hashes = sorted(hashlib.sha256(pixels[row].tobytes() + classes[row].tobytes()).digest() for row in chosen)
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
        return _cached(cache, name, place, lambda: place.glob(files), lambda: _load_torchvision(name, place, download))
    if isinstance(source, str) and hugging_face.is_name(source):
        arrays = _load_datasets(hugging_face.parts(hugging_face.named(source, download)), None)
        return arrays if arrays.known else dataclasses.replace(arrays, name=name_of(source))
    if isinstance(source, str) and source in LOADERS:
        return _load_plugin(source, _root(root), download, cache)
    try:
        path = expanded(source)
        exists = path.exists()
        if exists:
            _check_encoding(path)
        if path.is_dir() and is_tu_folder(path):
            reader = f"graphs-{READER_VERSION}"
            return _cached(cache, reader, path, lambda: path.glob("*.txt"), lambda: _load_graphs(path))
        if path.is_dir():
            return _cached(cache, "folder", path, lambda: _in_folder(path), lambda: _load_folder(path))
        if path.is_file() and is_listing(path):
            raise ValueError(f"{path} is a table of photos, not a data set; {_prepared(path)}")
        if path.is_file():
            return _cached(cache, path.stem, path, lambda: [path], lambda: _load_npz(path))
    except OSError as error:  # the name is too long
        raise ValueError(f"no data set {excerpt(source)!r}: {reason(error)}; check the path") from error
    if exists:
        raise ValueError(f"no data set {str(source)!r}: it is neither a file nor a folder; give an .npz or a folder")
    raise ValueError(
        f"no data set {excerpt(source)!r}: there is no such file or folder; by name "
        f"{suggest(str(source)[:80], names())}"
    )


def _root(root: str | Path | None) -> Path:
    """Return the folder of the data sets that are loaded by name."""
    return expanded(root or os.environ.get("CONDENSE_DATA") or "~/.cache/condense/data")


def _load_plugin(name: str, root: Path, download: bool, cache: Path | None) -> Arrays:
    """Load a data set of another package."""
    try:
        source = LOADERS[name](root, download)
        arrays = load(Path(source) if isinstance(source, str | Path) else source, cache=cache)
    except Exception as error:  # code of another package can raise any exception
        raise ValueError(
            f"cannot read the data set {name!r} of the package {LOADERS.package(name)}: {reason(error)}; "
            f"correct or update that package, or give {spelt('dataset', 'PATH.npz')}"
        ) from error
    return dataclasses.replace(arrays, name=name)


def _check_encoding(path: Path) -> None:
    """Raise ValueError if a path is not UTF-8: sets and ``run.json`` store it, and could not be read again."""
    absolute = path.resolve()
    try:
        str(absolute).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"cannot read {excerpt(absolute)}: its path is not valid UTF-8; rename it") from error


def _cached(
    cache: Path | None, kind: str, path: Path, files: Callable[[], Iterable[Path]], read: Callable[[], Arrays]
) -> Arrays:
    """Return the result of ``read``, from the cache if the ``files`` have not changed since it was stored."""
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
    test = _every_fifth(labels)
    return _assemble("digits", images[~test], labels[~test], images[test], labels[test], known=_table()["digits"])


def _load_graphs(path: Path) -> Arrays:
    rows, labels, classes = read_tu(path)
    return of_graphs(path.resolve().name, rows, labels, classes)


def of_graphs(name: str, rows: Array, labels: Array, classes: tuple[str, ...]) -> Arrays:
    """Return a data set of graphs, in which every fifth graph of each class is a test graph.

    Args:
        name: the name of the data set.
        rows: (N, L) float32, as ``condense.data.graphs.encode`` returns them.
        labels: (N,) int64, each of 0 to C - 1.
        classes: the names of the C classes.
    """
    test = _every_fifth(labels)
    fingerprints = {part: fingerprint(rows[index], labels[index]) for part, index in (("train", ~test), ("test", test))}
    return Arrays(
        name=name,
        x_train=rows[~test],
        y_train=labels[~test],
        x_test=rows[test],
        y_test=labels[test],
        classes=classes,
        fingerprint=fingerprints,
        known=None,
    )


def _every_fifth(labels: Array) -> Array:
    """Return whether each sample, (N,) bool, is every fifth one of its class."""
    rank = np.empty_like(labels)
    for label in np.unique(labels):
        members = labels == label
        rank[members] = np.arange(members.sum())
    return rank % 5 == 4


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
    except Exception as error:  # a damaged file can raise almost any exception
        fix = "check the internet connection" if download else f"add {spelt('download', True)}"
        raise ValueError(
            f"cannot read {name} from {root}: {reason(error)}; {fix}, or give {spelt('dataset', 'PATH.npz')}"
        ) from error
    return _assemble(name, *train, *test, known=_table()[name])


def _load_npz(path: Path) -> Arrays:
    arrays, present = read_npz(path, (*_ARRAYS, "classes", "layout"))
    missing = [key for key in _ARRAYS if key not in arrays]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}: all of {', '.join(_ARRAYS)} are needed; add them")
    classes = _names_of(arrays["classes"], f" of {path}", len(arrays["x_train"])) if "classes" in arrays else None
    return _assemble(
        path.stem,
        *(arrays[key] for key in _ARRAYS),
        classes=classes,
        layout=_layout_of(path, arrays, present),
        where=f" of {path}",
    )


def _layout_of(path: Path, arrays: Mapping[str, Array], present: Collection[str]) -> str | None:
    """Return the layout that an ``.npz`` file gives; UCR and UEA archives are recognised by their lengths."""
    if "layout" in arrays:
        return text_of(f"layout of {path}", arrays["layout"])
    samples = arrays["x_train"]
    return STANDARD["series"] if "length_train" in present and samples.ndim == 3 and samples.dtype.kind == "f" else None


def _names_of(classes: Array, where: str, num_images: int) -> list[str]:
    """Return the array ``classes`` of a file as text; each class needs at least one training image."""
    if classes.ndim != 1 or classes.dtype.kind not in "USbiufmM":
        raise ValueError(
            f"classes{where} is {excerpt(classes.dtype)} of shape {excerpt(classes.shape)}: names are text with one "
            "axis; give np.array([NAME, NAME, ...])"
        )
    if len(classes) > num_images:
        raise ValueError(
            f"classes{where} has {len(classes)} names for {num_images} training images: each class needs one; "
            "remove the names of absent classes"
        )
    try:
        return classes.astype(str).tolist()
    except UnicodeDecodeError as error:
        raise ValueError(f"classes{where} are bytes that are not ASCII: {reason(error)}; give text") from error


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
                otherwise = "add training images of it" if class_folder.is_dir() else _prepared(folder)
                raise ValueError(
                    f"{class_folder} is not a class: classes are the folders in {folder / 'train'}; move it away, or "
                    + otherwise
                )
            inside = _visible(class_folder)
            if split == "train" and not inside:
                raise ValueError(f"{class_folder} has no image: each class needs at least one; move the folder away")
            files += inside
            labels[split] += [classes.index(class_folder.name)] * len(inside)
        if not files:
            raise ValueError(f"{folder / split} has no images: it needs a folder of images for each class; add them")
        for file, image in read_images(files):
            first = first or image.shape[:2]
            if image.shape[:2] != first:
                height, width = image.shape[:2]
                raise ValueError(
                    f"{file} is {width}x{height}, the images before it are {first[1]}x{first[0]}: "
                    f"all images must have the same size; {_prepared(folder)}"
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
    """Yield all files and folders that ``_load_folder`` reads."""
    return (file for split in ("train", "test") for depth in ("", "/*", "/*/*") for file in folder.glob(split + depth))


def _visible(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder: an image folder holds train/CLASS/* and test/CLASS/*; for photos in other "
            f"folders {_prepared(folder.parent)}"
        )
    return entries(folder)


def _prepared(photos: Path) -> str:
    """Return the end of an error line: the command that makes a data set of any photos."""
    return f"prepare a data set with {photo_command(photos)}"


def _load_datasets(parts: Sequence[Dataset[Any]], layout: str | None) -> Arrays:
    """Load one Dataset for training and, optionally, one for testing."""
    read = [_read_dataset(part) for part in parts]
    names = [_class_indices(part) for part in parts]
    train = names[0]
    if len(parts) == 2 and train and names[1] and names[1] != train:
        unknown = [name for name in names[1] if name not in train]
        if unknown:
            raise ValueError(
                f"the test part has the class {unknown[0]!r}, which the training part lacks: classes are matched by "
                "name; give two parts with the same classes"
            )
        images, labels = read[1]
        _check_range("the test part", labels, len(names[1]), "make class_to_idx agree with the labels of the items")
        order = sorted(names[1], key=names[1].__getitem__)
        read[1] = images, np.array([train[name] for name in order])[labels]
    count = int(read[0][1].max()) + 1
    if train and len(train) < count:
        raise ValueError(
            f"the training part has the label {count - 1} and {len(train)} names of classes: each label needs a name; "
            "correct the dataset"
        )
    return _assemble(
        "custom",
        *(array for part in read for array in part),
        classes=sorted(train, key=train.__getitem__)[:count] if train else None,
        layout=layout,
        channels_first=isinstance(read[0][0], Tensor),
    )


def _class_indices(dataset: Dataset[Any]) -> dict[str, int] | None:
    """Return torchvision's ``class_to_idx`` (class name -> label), or that of ``classes``, if it is valid."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    indices = getattr(dataset, "class_to_idx", None)
    if indices is None and isinstance(names := getattr(dataset, "classes", None), list | tuple):
        indices = {name: index for index, name in enumerate(names)}
    if not isinstance(indices, dict) or getattr(dataset, "target_transform", None) is not None:
        return None
    numbers = list(indices.values())
    whole = all(isinstance(number, int) for number in numbers)
    return indices if whole and sorted(numbers) == list(range(len(numbers))) else None


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
                f"item {index} of {kind} changes when it is read again: a single random draw would be distilled; "
                "remove random transforms from the dataset, and give an augmentation instead"
            )
    images, labels = [], []
    form: type = Tensor
    for index in range(num):
        image, label, form = _item(dataset, index)
        images.append(image)
        labels.append(label)
        axes = None if form in (Tensor, np.ndarray) else 2  # PIL images may be gray and coloured in one data set
        if image.shape[:axes] != images[0].shape[:axes]:
            raise ValueError(
                f"image {index} of {kind} has shape {image.shape}, the first has {images[0].shape}: all must have the "
                f"same shape; {_resized(dataset)}"
            )
    stacked = np.stack(images if form in (Tensor, np.ndarray) else as_rgb(images))
    return torch.from_numpy(stacked) if form is Tensor else stacked, np.array(labels)


def _resized(dataset: Dataset[Any]) -> str:
    """Return the remedy for images of different sizes."""
    from torchvision.datasets import ImageFolder

    if isinstance(dataset, hugging_face.Rows):
        return 'prepare them with condense.prepare(d, "images.npz", size=64)'
    return _prepared(Path(dataset.root)) if isinstance(dataset, ImageFolder) else "resize them in the dataset"


def _item(dataset: Dataset[Any], index: int) -> tuple[Array, int, type]:
    """Return the image, its label, and the type of the image: a tensor, an array or a PIL image."""
    from PIL import Image

    kind = type(dataset).__name__
    try:
        item = dataset[index]
    except Exception as error:
        raise ValueError(f"item {index} of {kind} cannot be read: {reason(error)}; correct the dataset") from error
    if not isinstance(item, tuple | list) or len(item) != 2:
        what = f"a {type(item).__name__}"
        if isinstance(item, dict):
            what += f" with the keys {excerpt(', '.join(map(str, item)))}"
        elif isinstance(item, tuple | list):
            what += f" of {len(item)}"
        raise ValueError(f"item {index} of {kind} is {what}: items are (image, label) pairs; return such a pair")
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
    """Check all arrays and return them in the standard layout; ``where`` names the file in messages."""
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
        raise ValueError(f"y_train{where} has one class: a classifier needs at least two; add images of others")
    if count > _MOST_CLASSES:
        raise ValueError(f"y_train{where} has {count} classes: at most {_MOST_CLASSES} are supported; give fewer")
    if x_test is None:
        x_test, y_test = np.empty((0, *x_train.shape[1:]), x_train.dtype), np.empty(0, np.int64)
    else:
        x_test = check_samples(f"x_test{where}", x_test, layout, channels_first=channels_first, remedy=remedy)
        y_test = _check_labels(f"y_test{where}", y_test, len(x_test), renumber)
        _check_range(f"y_test{where}", y_test, count, "remove the test images of other classes")
        if x_test.shape[1:] != x_train.shape[1:]:
            raise ValueError(
                f"x_test{where} has samples of shape {x_test.shape[1:]}, x_train of shape {x_train.shape[1:]} "
                f"({', '.join(STANDARD[kind(x_train.shape[1:])][1:])}): they must agree; convert one of them"
            )
    fingerprints = {"train": fingerprint(x_train, y_train), "test": fingerprint(x_test, y_test)}
    known = known or _recognise(fingerprints, has_test=len(x_test) > 0)
    if known:
        name, classes = known.name, known.classes
    return Arrays(
        name=name,
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
        classes=tuple(map(str, range(count)) if classes is None else classes),
        fingerprint=fingerprints,
        known=known,
    )


def is_known(name: str, fingerprint: str) -> bool:
    """Whether ``name`` is in the table, and its training split there has this fingerprint or none is recorded."""
    known = _table().get(name)
    return known is not None and known.train in (None, fingerprint)


def strategy(name: str, fingerprint: str, input_shape: InputShape) -> str:
    """Return ``Arrays.strategy`` of the data of this name and fingerprint of the training split."""
    return _strategy(_table()[name] if is_known(name, fingerprint) else None, input_shape)


def _strategy(known: Known | None, input_shape: InputShape) -> str:
    if kind(input_shape) != "images":
        return "none"
    return known.augment if known else "color_crop_cutout_scale_rotate"


def _recognise(fingerprints: dict[str, str], has_test: bool) -> Known | None:
    """Return the known data set with these splits. A missing test split is allowed, a different one is not."""
    for known in _table().values():
        if known.train == fingerprints["train"] and (known.test == fingerprints["test"] or not has_test):
            return known
    return None


def _check_labels(what: str, labels: Tensor | Array, count: int, renumber: str) -> Array:
    cast = ".long()" if isinstance(labels, Tensor) else ".astype('int64')"
    labels = numpy_of(what, labels)
    if labels.shape != (count,):
        fix = "give one for each image"
        if labels.ndim == 2 and labels.shape == (count, 1):
            fix = "give y.reshape(-1)"
        elif labels.ndim == 2 and len(labels) == count:
            fix = "give the class numbers, y.argmax(1) if the rows are one-hot"
        raise ValueError(
            f"{what} has shape {excerpt(labels.shape)}: there are {count} images, each needs one label; {fix}"
        )
    kind = labels.dtype.kind
    if kind in "iu" and labels.max() <= np.iinfo(np.int64).max:
        return labels.astype(np.int64)
    if kind == "f" and not np.isfinite(labels).all():
        fix = "remove the images without a label"
    elif kind == "f" and not np.array_equal(labels, np.rint(labels)):
        fix = "regression targets are not supported, so give the class number of each image"
    elif kind == "b" or (kind == "f" and np.abs(labels).max() < 2**53):
        fix = f"give y{cast}"
    elif kind in "iufUSmM":
        fix = renumber
    else:
        fix = "give the class number of each image"
    raise ValueError(f"{what} is {excerpt(labels.dtype)}: labels must be integers, 0..C-1; {fix}")


def _check_range(what: str, labels: Array, count: int, fix: str) -> None:
    low, high = labels.min(), labels.max()
    if low < 0 or high >= count:
        raise ValueError(f"{what} has labels from {low} to {high}: they must be in 0..{count - 1}; {fix}")


def _renumber(with_test: bool) -> str:
    """Return the code that renumbers any labels to 0..C-1, consistently in both parts."""
    if not with_test:
        return "number them with classes, y_train = np.unique(y_train, return_inverse=True)"
    return (
        "number them together with classes, y = np.unique(np.concatenate([y_train, y_test]), return_inverse=True), "
        "then y_train, y_test = y[:len(y_train)], y[len(y_train):]"
    )


def _without_class(empty: int, y_test: Any, classes: Sequence[str] | None, renumber: str) -> str:
    """Return the remedy for a class ``empty`` without training images."""
    if y_test is not None and empty in numpy_of("y_test", y_test):
        return "the test part has some, so add training images, or remove its test images and renumber the classes"
    if classes is not None:
        return f"remove the name {excerpt(classes[empty])!r} from the classes and lower all labels above {empty} by 1"
    return renumber
