"""Reader of published sets: labelled images and, in the layouts of arrays and tensors, clips and series.

    layout   description                                                       pixels
    npz      samples and labels of any origin; the entry ``layout`` names      [0, 1] or 0..255
             the axes as in a data set; without it four axes are NCHW or NHWC
             and five NTCHW or NTHWC
    folder   CLASS/*.jpg, *.png: SRe2L, CDA, RDED and others                   0..255
    hub      a folder that ``condense export --format huggingface`` wrote      0..255
    pair     a ``.pt`` with the list [images, labels]: IDC                     [0, 1]
    res      ``res_*.pt`` of DC, DSA and DM: {"data": [[images, labels], ..]}  transformed
    images   ``images_*.pt`` beside ``labels_*.pt`` and, for a learned         transformed
             learning rate, ``lr_*.pt``: MTT, TESLA, FTD; DATM, whose labels
             are logits

In a ``.pt`` images are (N, C, H, W), clips (N, T, C, H, W) and series (N, C, L). If a layout holds pixels, its series
have the values of the data set.

No file records the data or the transform with which it was made; the caller gives them, and they cannot be verified. A
``.pt`` is read with ``weights_only=True``, so no code in it is run.

Labels with two axes are probabilities if their rows are non-negative and sum to 1, else logits. Files that
``condense.exchange.export`` wrote are read with their soft labels, whose meaning they record.

Folders are matched with classes by name, ignoring case and all characters except letters and digits, with or without
the number of the class in front (``007-T-shirt-top``); else by number, counted from 0, alone or after a prefix that
all folders share (``new007``).
"""

from __future__ import annotations

import io
import math
import re
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from condense import __version__
from condense.data.datasets import Arrays, to_float
from condense.data.layout import kind
from condense.data.pixels import Array, check_pixels, check_series, numpy_of
from condense.data.reading import as_rgb, decoded, entries, read_images, read_npz, text_of
from condense.data.samples import IN_FILE, check_samples
from condense.data.transform import Transform
from condense.exchange.export import class_folders
from condense.exchange.tables import HUB, read_hub, read_soft_labels
from condense.files import check_expansion, parse_json, read_foreign
from condense.names import excerpt, spelt
from condense.synthetic.decode import Decode, Pixels
from condense.synthetic.labels import Hard, Labels, Logits, Targets, Teacher
from condense.synthetic.set import Origin, SyntheticSet

Space = Literal["pixels", "transformed"]
Meaning = Literal["classes", "logits", "probabilities", "values"]

LAYOUTS = ("npz", "folder", "hub", "pair", "res", "images")

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".jp2", ".pgm", ".ppm", ".tga", ".tif", ".tiff", ".webp")
_SAMPLE_KEYS = ("images", "clips", "series", "x", "x_train", "data", "image")
_LABEL_KEYS = ("soft_labels", "labels", "y", "y_train", "targets", "label")
_SUM = 1e-2  # how far probabilities in half precision may be from a sum of 1
_LABELS: dict[Meaning, Labels] = {
    "classes": Hard(),
    "logits": Logits(),
    "probabilities": Teacher(),
    "values": Targets(),
}


@dataclass(frozen=True)
class External:
    """Labelled samples of unknown origin."""

    layout: str
    images: Tensor
    """Images (N, C, H, W), clips (N, T, C, H, W) or series (N, C, L), float32."""
    labels: Tensor
    """Classes (N,) int64, or (N, classes) float32."""
    meaning: Meaning
    """Meaning of the labels; "values" are regression targets, which only our own exports have."""
    space: Space
    """pixels: in [0, 1], or for series the values of the data set. transformed: in the space that networks see."""
    lr: float | None = None
    """Learned learning rate."""
    classes: tuple[str, ...] = ()
    """Names of the class folders, if the set is a folder."""


def is_foreign(path: Path) -> bool:
    """Whether a path looks like a published set and not like one of ours. A run folder may have folders of images."""
    if path.is_dir():
        is_ours = any((path / name).is_file() for name in ("recipe.yaml", "synthetic.safetensors"))
        return not is_ours and ((path / HUB).is_file() or bool(_image_folders(path)))
    return path.suffix in (".npz", ".pt", ".pth")


def read(path: Path) -> External:
    """Detect the layout of a file or folder, and read it.

    Raises:
        ValueError: the path does not exist, has none of the layouts, or holds something else than labelled samples.
    """
    if path.is_dir():
        return _read_hub(path) if (path / HUB).is_file() else _read_folder(path)
    if not path.is_file():
        fault = f"{path} is neither a file nor a folder" if path.exists() else f"there is no file or folder {path}"
        raise ValueError(f"{fault}; check the path")
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(f"{path} is neither an .npz nor a .pt nor a folder of images; give one of these")
    if path.name.startswith("images"):
        return _read_images_file(path)
    content = _load(path)
    if isinstance(content, dict) and "data" in content:
        runs = content["data"]
        if not isinstance(runs, list | tuple) or not runs:
            raise ValueError(f"{path}: `data` is not a list of runs; give a res_*.pt as the code of DC writes it")
        return _pair(runs[-1], path, "res", "transformed")
    if isinstance(content, list | tuple):
        return _pair(content, path, "pair", "pixels")
    raise ValueError(
        f"{path} holds a {type(content).__name__}: it is neither the `data` of DC nor the [images, labels] of IDC; for "
        "MTT and DATM give the images_*.pt"
    )


def as_set(
    external: External,
    arrays: Arrays,
    transform: Transform,
    spec: str,
    *,
    decode: Decode = Pixels(),
    name: str | None = None,
) -> SyntheticSet:
    """Make a synthetic set from a published set.

    Args:
        external: the published set, as ``read`` returned it.
        arrays: the data set from which it was made, according to the caller.
        transform: the transform that was fitted to ``arrays``. It is applied to ``pixels``; ``transformed`` samples
            are already in its space.
        spec: the name of the transform.
        decode: pixels, or factor if the stored images hold several images.
        name: the name of its method, after ``imported:``; the layout of the file if it is None.

    Raises:
        ValueError: the samples have another shape than the data set, or classes that it does not have.
    """
    shape, num = tuple(external.images.shape[1:]), arrays.num_classes
    if shape != arrays.input_shape:
        raise ValueError(
            f"the set has samples of shape {shape}, but {arrays.name} has {arrays.input_shape}; give "
            f"{spelt('dataset')} with the data from which the set was made"
        )
    labels, soft = external.labels, external.meaning != "classes"
    if soft and labels.shape[1] != num:
        raise ValueError(
            f"the set has labels for {labels.shape[1]} classes, but {arrays.name} has {num}; give another "
            f"{spelt('dataset')}"
        )
    named = 0 if external.classes == arrays.classes else len(external.classes)
    if named and (named == num if soft else 0 <= int(labels.min()) <= int(labels.max()) < named):
        ours = torch.tensor(
            match(external.classes, arrays.classes, "folder" if external.layout == "folder" else "class")
        )
        labels = labels[:, ours.argsort()] if soft else ours[labels]
    if not soft and not 0 <= int(labels.min()) <= int(labels.max()) < num:
        raise ValueError(
            f"the set has labels from {int(labels.min())} to {int(labels.max())}, but {arrays.name} has {num} classes, "
            f"0..{num - 1}; give another {spelt('dataset')}, or number the classes in the same way"
        )
    if not decode.stores_pixels or not decode.differentiable:
        raise ValueError(
            f"published images are not stored as {decode.name}; give {spelt('decode', 'pixels')} or factor"
        )
    origin = Origin(
        dataset={
            "name": arrays.name,
            "fingerprint": arrays.fingerprint["train"],
            "classes": list(arrays.classes),
            "input_shape": list(arrays.input_shape),
        },
        transform=transform.describe(),
        recipe={
            "method": {"name": f"imported:{name or external.layout}"},
            "transform": spec,
            "split": {"val_fraction": 0.0, "seed": 0},
            "ipc": max(len(labels) // num, 1),
        },
        code=__version__,
    )
    images = transform(external.images) if external.space == "pixels" else external.images
    _warn_of_other_space(external, transform, spec)
    logits = labels.log() if external.meaning == "probabilities" else labels
    syn = SyntheticSet(images, logits, origin, decode=decode, label_kind=_LABELS[external.meaning], lr=external.lr)
    if external.meaning == "values":
        syn.provider.load_state_dict({"values": labels})
    _warn_of_absent(syn.classes, arrays)
    return syn


def match(folders: Sequence[str], classes: Sequence[str], what: str = "folder") -> list[int]:
    """Return the class of each folder, by name or by number (see the docstring of the module).

    Raises:
        ValueError: a folder, or ``what`` the names are, matches no class, or two of them match the same class.
    """
    matched = _by_name(folders, classes)
    numbers = _by_number(folders) if None in matched else None
    if numbers:
        numeric = all(name.isdecimal() for name in classes)
        labels = {int(name) if numeric else label: label for label, name in enumerate(classes)}
        matched = [labels.get(number) for number in numbers]
    if None in matched:
        folder = folders[matched.index(None)]
        raise ValueError(
            f"the {what} {excerpt(folder)!r} matches no class: there are {_some(classes)}, numbered "
            f"0..{len(classes) - 1}; "
            + (
                "rename the folders to the names of their classes"
                if what == "folder"
                else f"give another {spelt('dataset')}"
            )
        )
    seen: dict[int, str] = {}
    for label, folder in zip(matched, folders, strict=True):
        assert label is not None
        if label in seen:
            raise ValueError(
                f"{excerpt(seen[label])!r} and {excerpt(folder)!r} both match the class {classes[label]!r}; give each "
                f"class one {'folder' if what == 'folder' else 'name'}"
            )
        seen[label] = folder
    return list(seen)


def _by_name(folders: Sequence[str], classes: Sequence[str]) -> list[int | None]:
    exported = {folder: label for label, folder in enumerate(class_folders(classes))}
    if exported.keys() >= set(folders):
        return [exported[folder] for folder in folders]
    exact = {name: label for label, name in enumerate(classes)}
    keys: dict[str, int | None] = {}
    for label, name in enumerate(classes):
        keys[_key(name)] = None if _key(name) in keys else label  # classes with the same key need their exact names
    for label, name in enumerate(classes):
        keys.setdefault(f"{label}-{_key(name)}", label)
    return [exact.get(folder, keys.get(_key(folder))) for folder in folders]


def _by_number(folders: Sequence[str]) -> list[int] | None:
    parts = [re.fullmatch(r"(.*?)(\d{1,9})", folder, re.DOTALL | re.ASCII) for folder in folders]
    matched = [part for part in parts if part is not None]
    if len(matched) < len(folders) or len({part[1] for part in matched}) > 1:
        return None
    return [int(part[2]) for part in matched]


def _key(name: str) -> str:
    """Return a name in lower case, with "-" for all characters but letters and digits; "007" becomes "7"."""
    plain = "".join(c if c.isalnum() else "-" for c in unicodedata.normalize("NFC", name).casefold())
    return re.sub(r"^0+(?=[0-9]+(-|$))", "", plain)


def _some(names: Sequence[str]) -> str:
    return excerpt(", ".join(names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _warn_of_absent(classes: Tensor, arrays: Arrays) -> None:
    """Warn of missing images, because a part of a set would be evaluated as if it were complete."""
    counts = classes.bincount(minlength=arrays.num_classes)
    most = int(counts.max())
    absent = [name for name, count in zip(arrays.classes, counts.tolist(), strict=True) if not count]
    few = [name for name, count in zip(arrays.classes, counts.tolist(), strict=True) if 0 < 2 * count < most]
    if absent:
        warnings.warn(
            f"the set has no image of {len(absent)} of {arrays.num_classes} classes ({_some(absent)}): it may be one "
            "of several parts of a published set, and is evaluated on all classes",
            stacklevel=2,
        )
    if few:
        warnings.warn(
            f"the set has {most} images of a class, but fewer than half as many of {_some(few)}; it may be incomplete",
            stacklevel=2,
        )


def _warn_of_other_space(external: External, transform: Transform, spec: str) -> None:
    low, high = float(external.images.min()), float(external.images.max())
    if external.space == "transformed" and low >= 0 and transform.describe()["kind"] != "none":
        warnings.warn(
            f"the images have values from {low:.3g} to {high:.3g} and none below 0, so the transform {spec} was "
            "probably not applied; import pixels in [0, 1] with the transform none, and divide other pixels first",
            stacklevel=2,
        )


def _load(path: Path) -> Any:
    """Read a ``.pt`` of tensors, lists, dicts, numbers and numpy scalars, which old code stored in its logs."""
    scalars: list[Any] = [np.dtype, np.ndarray, *{type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8")}]
    core = getattr(np, "_core", None) or np.core
    scalars += [core.multiarray.scalar, core.multiarray._reconstruct]
    if not path.exists():
        raise ValueError(f"there is no {path}: images, labels and lr belong in one folder; put it there")
    return read_foreign(path, holds="tensors", save_as="tensors", allowed=scalars)


def _pair(value: Any, path: Path, layout: str, space: Space, lr: float | None = None) -> External:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(x, Tensor) for x in value):
        raise ValueError(
            f"{path} does not hold the pair of images and labels of the layout `{layout}`; save the two tensors as a "
            "list"
        )
    images, labels = (_plain(tensor, path) for tensor in value)
    return _checked(images, labels, path, layout, space, lr)


def _plain(tensor: Tensor, path: Path) -> Array:
    """Return the values of a tensor; raise ValueError if they are much larger than the file."""
    if tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_meta and not tensor.is_quantized:
        size, stored = tensor.numel() * tensor.element_size(), path.stat().st_size
        check_expansion(f"a tensor in {path}", size, stored, "save tensor.clone() if it is right")
    return numpy_of(f"a tensor in {path}", tensor)


def _read_images_file(path: Path) -> External:
    tail = path.name.removeprefix("images")
    labels, lr_file = path.with_name("labels" + tail), path.with_name("lr" + tail)
    lr = _lr(_load(lr_file), lr_file) if lr_file.exists() else None
    return _pair([_load(path), _load(labels)], path, "images", "transformed", lr)


def _lr(value: Any, path: Path) -> float:
    """Return a learned learning rate."""
    number = float("nan")
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, Tensor | float | int) and not isinstance(value, bool):
        array = _plain(torch.as_tensor(value), path)
        if array.size == 1 and array.dtype.kind in "iuf":
            number = float(array.reshape(-1)[0])
    if not 0 < number < math.inf:
        raise ValueError(
            f"{path} holds {excerpt(repr(value))}: a learning rate is one positive number; remove the file to import "
            "the set without it"
        )
    return number


def _read_npz(path: Path) -> External:
    arrays, names = read_npz(path, (*_SAMPLE_KEYS, *_LABEL_KEYS, "layout", "origin", "classes"))
    images = next((arrays[key] for key in _SAMPLE_KEYS if key in arrays), None)
    labels = next((arrays[key] for key in _LABEL_KEYS if key in arrays), None)
    if images is None or labels is None:
        raise ValueError(
            f"{path} holds {_some(names) or 'no arrays'}: `images` and `labels` are needed; add or rename these arrays"
        )
    if images.size:  # else _checked raises
        layout = text_of(f"layout of {path}", arrays["layout"]) if "layout" in arrays else None
        what = f"{path}: the array of samples"
        images = check_samples(what, images, layout, channels_first=True, remedy=IN_FILE)
    origin = arrays.get("origin")
    text = str(origin) if origin is not None and origin.dtype.kind == "U" and origin.ndim == 0 else ""
    named = arrays.get("classes", np.empty(0))
    classes = tuple(map(str, named)) if named.ndim == 1 and named.dtype.kind == "U" else ()
    return _checked(images, labels, path, "npz", "pixels", meaning=_meaning_of(text), classes=classes)


def _read_folder(path: Path) -> External:
    folders = _image_folders(path)
    if not folders:
        raise ValueError(f"{path} has no folders of images, CLASS/*.png or CLASS/*.jpg; give such a folder")
    files = [(file, label) for label, folder in enumerate(folders) for file in _image_files(folder)]
    images: list[Array] = []
    for file, image in read_images(file for file, _ in files):
        images.append(image)
        if image.shape[:2] != images[0].shape[:2]:
            sizes = ["x".join(map(str, shape[1::-1])) for shape in (image.shape, images[0].shape)]
            raise ValueError(f"{file} is {sizes[0]}, the images before it are {sizes[1]}; give images of one size")
    labels, soft = np.array([label for _, label in files]), read_soft_labels(path, [file for file, _ in files])
    return _of_pictures(images, labels, soft, tuple(folder.name for folder in folders), path, "folder")


def _read_hub(path: Path) -> External:
    files, labels, soft, classes = read_hub(path)
    sources = [(io.BytesIO(file), len(file)) for file in files]
    images = list(decoded(sources, lambda index: f"row {index} of {path / HUB}"))
    if len({image.shape[:2] for image in images}) > 1:
        raise ValueError(f"{path / HUB} has images of several sizes; give images of one size")
    if labels.size and not 0 <= labels.min() <= labels.max() < len(classes):
        raise ValueError(
            f"{path / HUB} has labels from {labels.min()} to {labels.max()} and {len(classes)} classes; download it "
            "again"
        )
    return _of_pictures(images, labels, soft, classes, path, "hub")


def _of_pictures(
    images: list[Array], labels: Array, soft: Array | None, classes: tuple[str, ...], path: Path, layout: str
) -> External:
    """Return pictures of one size, and their classes or soft labels, whose meaning ``origin.json`` may state."""
    stacked, meaning, origin = np.stack(as_rgb(images)), None, path / "origin.json"
    stacked = stacked[:, None] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2)
    if soft is not None:
        labels, meaning = soft, _meaning_of(origin.read_bytes() if origin.is_file() else b"")
    return _checked(stacked, labels, path, layout, "pixels", meaning=meaning, classes=classes)


def _image_folders(path: Path) -> list[Path]:
    return [folder for folder in entries(path) if folder.is_dir() and _image_files(folder)]


def _image_files(folder: Path) -> list[Path]:
    return [file for file in entries(folder) if file.suffix.lower() in _IMAGE_SUFFIXES]


def _meaning_of(origin: str | bytes) -> Meaning | None:
    """Return the meaning of soft labels that our own export records in the JSON text of its origin."""
    try:
        meaning = parse_json(origin)["targets"]
    except (ValueError, KeyError, TypeError):
        return None
    return meaning if meaning in get_args(Meaning) else None


def _checked(
    images: Array,
    labels: Array,
    path: Path,
    layout: str,
    space: Space,
    lr: float | None = None,
    *,
    meaning: Meaning | None = None,
    classes: tuple[str, ...] = (),
) -> External:
    """Check a published set. ``meaning``: that of labels with two axes, None if the file does not record it."""
    if images.ndim not in (3, 4, 5) or labels.ndim not in (1, 2) or len(images) != len(labels) or not images.size:
        raise ValueError(
            f"{path} has samples of shape {excerpt(images.shape)} and labels of shape {excerpt(labels.shape)}; give "
            "samples (N, C, L), (N, C, H, W) or (N, T, C, H, W) and labels (N,) or (N, classes)"
        )
    for what, array in (("images", images), ("labels", labels)):
        if array.dtype.kind not in "iufb":
            raise ValueError(
                f"{path}: the {what} are {excerpt(array.dtype)}, not numbers; save them as float32 or int64"
            )
        if not np.isfinite(array).all():
            raise ValueError(f"{path} holds {what} that are not finite; download it again")
    if space == "pixels":
        check = check_series if kind(images.shape[1:]) == "series" else check_pixels
        images = check(f"{path}: the array of samples", images)
    elif images.dtype.kind != "f":
        raise ValueError(
            f"{path}: the images are {images.dtype}, but the layout `{layout}` holds transformed floats; if they are "
            "pixels, save [images, labels] under another name"
        )
    samples = to_float(images)
    if labels.ndim == 1:
        if labels.dtype.kind == "f" and not np.array_equal(labels, np.rint(labels)):
            raise ValueError(
                f"{path}: labels with one axis are classes, but these are not integers; save classes (N,), or logits "
                "or probabilities (N, classes)"
            )
        if np.abs(labels.astype(np.float64)).max() > 2**53:
            raise ValueError(f"{path}: labels up to {labels.max():g} are not classes; give 0..C-1")
        return External(layout, samples, torch.from_numpy(labels.astype(np.int64)), "classes", space, lr, classes)
    soft = torch.from_numpy(labels.astype(np.float32))
    if not soft.isfinite().all():
        raise ValueError(f"{path} holds labels that are too large for float32; download it again")
    return External(layout, samples, soft, meaning or _meaning(soft, path), space, lr, classes)


def _meaning(labels: Tensor, path: Path) -> Meaning:
    """Return the meaning of labels (N, classes), guessed from their values."""
    sums = labels.sum(1)
    low, high = float(sums.min()), float(sums.max())
    if not labels.numel() or labels.min() < 0:
        return "logits"
    if abs(low - 1) <= _SUM and abs(high - 1) <= _SUM:
        return "probabilities"
    if labels.max() <= 1 or high - low <= _SUM * high:
        raise ValueError(
            f"{path}: the rows of labels are non-negative with sums from {low:.4g} to {high:.4g}, so they may be "
            "probabilities or logits; save y / y.sum(1, keepdims=True) for probabilities, or y - 1 - y.max() for logits"
        )
    return "logits"
