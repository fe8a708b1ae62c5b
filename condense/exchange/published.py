"""Labelled samples as other people publish them: images, and in the layouts of arrays and tensors clips and series.

    layout   what it is                                                        pixels
    npz      samples and labels of any origin; the entry ``layout`` names      [0, 1] or 0..255
             the axes as in a data set, without it four axes are NCHW or NHWC
             and five NTCHW or NTHWC
    folder   CLASS/*.jpg, *.png: SRe2L, CDA, RDED and others                   0..255
    pair     a ``.pt`` with the list [images, labels]: IDC                     [0, 1]
    res      ``res_*.pt`` of DC, DSA and DM: {"data": [[images, labels], ..]}  transformed
    images   ``images_*.pt`` beside ``labels_*.pt`` and, where the step size   transformed
             is learned, ``lr_*.pt``: MTT, TESLA, FTD; DATM, whose labels are
             logits

In a ``.pt`` images are (N, C, H, W), clips (N, T, C, H, W) and series (N, C, L). The values of series are those of the
data set where images are pixels.

No file says on which data or through which transform it was made: that is the caller's word. A ``.pt`` is read with
``weights_only=True``, so nothing in it is ever run.

Labels of two axes are probabilities where their rows are not negative and sum to 1, else logits. What
``condense.exchange.export`` wrote is read with its soft labels and says itself what they are.

Folders are matched with classes by name, whatever the case and the characters other than letters and digits, with or
without the number of the class before it (``007-T-shirt-top``); else by number, alone or behind a prefix that all
share (``new007``), which counts from 0.
"""

from __future__ import annotations

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
from condense.data.reading import as_rgb, entries, read_images, read_npz, text_of
from condense.data.samples import IN_FILE, check_samples
from condense.data.transform import Transform
from condense.exchange.export import class_folder
from condense.exchange.tables import read_soft_labels
from condense.files import check_expansion, parse_json, read_foreign
from condense.names import excerpt, spelt
from condense.synthetic.decode import Decode, Pixels
from condense.synthetic.labels import Hard, Labels, Logits, Targets, Teacher
from condense.synthetic.set import Origin, SyntheticSet

Space = Literal["pixels", "transformed"]
Meaning = Literal["classes", "logits", "probabilities", "values"]

LAYOUTS = ("npz", "folder", "pair", "res", "images")

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
    """(N, C, H, W), or clips (N, T, C, H, W) or series (N, C, L); float32."""
    labels: Tensor
    """Classes (N,) int64, or (N, classes) float32."""
    meaning: Meaning
    """Of the labels: values are regression targets, which only our own exports have."""
    space: Space
    """pixels: in [0, 1], or as the data set has them for series. transformed: as networks see them."""
    lr: float | None = None
    """A learned step size."""
    classes: tuple[str, ...] = ()
    """Their names, where folders have names."""


def is_foreign(path: Path) -> bool:
    """Whether this looks like a published set and not like one of ours."""
    if path.is_dir():
        return bool(_image_folders(path))
    return path.suffix in (".npz", ".pt", ".pth")


def read(path: Path) -> External:
    """Find out the layout of a file or folder, and read it.

    Raises:
        ValueError: there is nothing, or it has none of the layouts, or holds something else than labelled images.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        found = f"{path} is neither a file nor a folder" if path.exists() else f"there is nothing at {path}"
        raise ValueError(f"{found}; check the path")
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(f"{path} is none of .npz, .pt and a folder of images; give one of these")
    if path.name.startswith("images"):
        return _read_images_file(path)
    content = _load(path)
    if isinstance(content, dict) and "data" in content:
        runs = content["data"]
        if not isinstance(runs, list | tuple) or not runs:
            raise ValueError(f"{path}: `data` is no list of runs; give a res_*.pt as the code of DC writes it")
        return _pair(runs[-1], path, "res", "transformed")
    if isinstance(content, list | tuple):
        return _pair(content, path, "pair", "pixels")
    raise ValueError(
        f"{path} holds a {type(content).__name__}: neither the `data` of DC nor the [images, labels] of IDC; for MTT "
        "and DATM give the images_*.pt"
    )


def as_set(
    found: External, arrays: Arrays, transform: Transform, spec: str, *, decode: Decode = Pixels()
) -> SyntheticSet:
    """A set of ours from published images.

    Args:
        found: what ``read`` read.
        arrays: the data set that the caller says it was made from.
        transform: fitted to it; what the images went through if they are ``transformed``, and what they go through if
            they are ``pixels``.
        spec: its name.
        decode: pixels, or factor where the stored images hold several.

    Raises:
        ValueError: other image shape, or classes that the data set does not have.
    """
    shape, num = tuple(found.images.shape[1:]), arrays.num_classes
    if shape != arrays.input_shape:
        raise ValueError(
            f"samples of shape {shape}, {arrays.name} has {arrays.input_shape}; give {spelt('dataset')} with the data "
            "they are of"
        )
    labels, soft = found.labels, found.meaning != "classes"
    if found.classes and not soft:
        labels = torch.tensor(match(found.classes, arrays.classes))[labels]
    if soft and labels.shape[1] != num:
        raise ValueError(
            f"labels for {labels.shape[1]} classes, {arrays.name} has {num}; give another {spelt('dataset')}"
        )
    if not soft and not 0 <= int(labels.min()) <= int(labels.max()) < num:
        raise ValueError(
            f"labels from {int(labels.min())} to {int(labels.max())}, {arrays.name} has {num} classes, 0..{num - 1}; "
            f"give another {spelt('dataset')}, or number the classes as it does"
        )
    if not decode.stores_pixels:
        raise ValueError(f"published images are no {decode.name}; give {spelt('decode', 'pixels')} or factor")
    origin = Origin(
        dataset={
            "name": arrays.name,
            "fingerprint": arrays.fingerprint["train"],
            "classes": list(arrays.classes),
            "input_shape": list(arrays.input_shape),
        },
        transform=transform.describe(),
        recipe={
            "method": {"name": f"imported:{found.layout}"},
            "transform": spec,
            "split": {"val_fraction": 0.0, "seed": 0},
            "ipc": max(len(labels) // num, 1),
        },
        code=__version__,
    )
    images = transform(found.images) if found.space == "pixels" else found.images
    _warn_of_other_space(found, transform, spec)
    logits = labels.log() if found.meaning == "probabilities" else labels
    syn = SyntheticSet(images, logits, origin, decode=decode, label_kind=_LABELS[found.meaning], lr=found.lr)
    if found.meaning == "values":
        syn.provider.load_state_dict({"values": labels})
    _warn_of_absent(syn.classes, arrays)
    return syn


def match(folders: Sequence[str], classes: Sequence[str]) -> list[int]:
    """The class of each folder, by name or by number (see above).

    Raises:
        ValueError: a folder matches no class, or two match one; the line names the first.
    """
    found = _by_name(folders, classes)
    numbers = _by_number(folders) if None in found else None
    if numbers:
        named = all(name.isdecimal() for name in classes)
        labels = {int(name) if named else label: label for label, name in enumerate(classes)}
        found = [labels.get(number) for number in numbers]
    if None in found:
        folder = folders[found.index(None)]
        raise ValueError(
            f"the folder {excerpt(folder)!r} matches no class: there are {_some(classes)}, numbered "
            f"0..{len(classes) - 1}; rename the folders to the names of their classes"
        )
    seen: dict[int, str] = {}
    for label, folder in zip(found, folders, strict=True):
        assert label is not None
        if label in seen:
            raise ValueError(
                f"the folders {excerpt(seen[label])!r} and {excerpt(folder)!r} both match the class "
                f"{classes[label]!r}; give each class one folder"
            )
        seen[label] = folder
    return list(seen)


def _by_name(folders: Sequence[str], classes: Sequence[str]) -> list[int | None]:
    exported = {class_folder(label, name): label for label, name in enumerate(classes)}
    if exported.keys() >= set(folders):
        return [exported[folder] for folder in folders]
    exact = {name: label for label, name in enumerate(classes)}
    keys: dict[str, int | None] = {}
    for label, name in enumerate(classes):
        keys[_key(name)] = None if _key(name) in keys else label  # two that look alike need their exact names
    for label, name in enumerate(classes):
        keys.setdefault(f"{label}-{_key(name)}", label)
    return [exact.get(folder, keys.get(_key(folder))) for folder in folders]


def _by_number(folders: Sequence[str]) -> list[int] | None:
    parts = [re.fullmatch(r"(.*?)(\d{1,9})", folder, re.DOTALL | re.ASCII) for folder in folders]
    found = [part for part in parts if part is not None]
    if len(found) < len(folders) or len({part[1] for part in found}) > 1:
        return None
    return [int(part[2]) for part in found]


def _key(name: str) -> str:
    """A name in any case, without the characters that a file system may refuse and without zeros in front."""
    plain = "".join(c if c.isalnum() else "-" for c in unicodedata.normalize("NFC", name).casefold())
    return re.sub(r"^0+(?=[0-9]+(-|$))", "", plain)


def _some(names: Sequence[str]) -> str:
    return excerpt(", ".join(names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _warn_of_absent(classes: Tensor, arrays: Arrays) -> None:
    """A part of a set would be scored as if it were the whole."""
    counts = classes.bincount(minlength=arrays.num_classes)
    most = int(counts.max())
    absent = [name for name, count in zip(arrays.classes, counts.tolist(), strict=True) if not count]
    few = [name for name, count in zip(arrays.classes, counts.tolist(), strict=True) if 0 < 2 * count < most]
    if absent:
        warnings.warn(
            f"the set has no image of {len(absent)} of {arrays.num_classes} classes ({_some(absent)}): it may be one "
            "part of a set that was published in several, and is scored on all classes",
            stacklevel=2,
        )
    if few:
        warnings.warn(
            f"the set has {most} images of a class, but less than half as many of {_some(few)}; it may be incomplete",
            stacklevel=2,
        )


def _warn_of_other_space(found: External, transform: Transform, spec: str) -> None:
    low, high = float(found.images.min()), float(found.images.max())
    if found.space == "transformed" and low >= 0 and transform.describe()["kind"] != "none":
        warnings.warn(
            f"the images have values from {low:.3g} to {high:.3g}, none below 0, as if they had not gone through "
            f"{spec}; pixels in [0, 1] are imported with the transform none, others are divided first",
            stacklevel=2,
        )


def _load(path: Path) -> Any:
    """A ``.pt`` of tensors, lists, dicts and numbers; numpy's scalars too, which old code left in its logs."""
    scalars: list[Any] = [np.dtype, np.ndarray, *{type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8")}]
    core = getattr(np, "_core", None) or np.core
    scalars += [core.multiarray.scalar, core.multiarray._reconstruct]
    if not path.exists():
        raise ValueError(f"there is no {path}: images, labels and lr lie beside each other; put it there")
    return read_foreign(path, holds="tensors", mend="tensors", allowed=scalars)


def _pair(value: Any, path: Path, layout: str, space: Space, lr: float | None = None) -> External:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(x, Tensor) for x in value):
        raise ValueError(
            f"{path} has no pair of images and labels as the layout `{layout}` has it; save the two tensors as a list"
        )
    images, labels = (_plain(tensor, path) for tensor in value)
    return _checked(images, labels, path, layout, space, lr)


def _plain(tensor: Tensor, path: Path) -> Array:
    """The values of a tensor that holds no more of them than the file."""
    if tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_meta and not tensor.is_quantized:
        size, stored = tensor.numel() * tensor.element_size(), path.stat().st_size
        check_expansion(f"a tensor in {path}", size, stored, "save tensor.clone() if it is right")
    return numpy_of(f"a tensor in {path}", tensor)


def _read_images_file(path: Path) -> External:
    tail = path.name.removeprefix("images")
    labels, rate = path.with_name("labels" + tail), path.with_name("lr" + tail)
    lr = _rate(_load(rate), rate) if rate.exists() else None
    return _pair([_load(path), _load(labels)], path, "images", "transformed", lr)


def _rate(value: Any, path: Path) -> float:
    """A learned step size."""
    number = float("nan")
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, Tensor | float | int) and not isinstance(value, bool):
        found = _plain(torch.as_tensor(value), path)
        if found.size == 1 and found.dtype.kind in "iuf":
            number = float(found.reshape(-1)[0])
    if not 0 < number < math.inf:
        raise ValueError(
            f"{path} holds {excerpt(repr(value))}: a step size is one positive number; move the file away to do without"
        )
    return number


def _read_npz(path: Path) -> External:
    arrays, names = read_npz(path, (*_SAMPLE_KEYS, *_LABEL_KEYS, "layout", "origin"))
    images = next((arrays[key] for key in _SAMPLE_KEYS if key in arrays), None)
    labels = next((arrays[key] for key in _LABEL_KEYS if key in arrays), None)
    if images is None or labels is None:
        raise ValueError(
            f"{path} holds {_some(names) or 'nothing'}: the arrays `images` and `labels` are needed; add or rename them"
        )
    if images.size:  # else _checked says what is needed
        layout = text_of(f"layout of {path}", arrays["layout"]) if "layout" in arrays else None
        what = f"{path}: the array of samples"
        images = check_samples(what, images, layout, channels_first=True, remedy=IN_FILE)
    origin = arrays.get("origin")
    text = str(origin) if origin is not None and origin.dtype.kind == "U" and origin.ndim == 0 else ""
    return _checked(images, labels, path, "npz", "pixels", meaning=_meaning_of(text))


def _read_folder(path: Path) -> External:
    folders = _image_folders(path)
    if not folders:
        raise ValueError(f"{path} has no folders of images: CLASS/*.png or CLASS/*.jpg; give such a folder")
    files = [(file, label) for label, folder in enumerate(folders) for file in _image_files(folder)]
    images: list[Array] = []
    for file, image in read_images(file for file, _ in files):
        images.append(image)
        if image.shape[:2] != images[0].shape[:2]:
            sizes = ["x".join(map(str, shape[1::-1])) for shape in (image.shape, images[0].shape)]
            raise ValueError(f"{file} is {sizes[0]}, the images before it are {sizes[1]}; give images of one size")
    stacked = np.stack(as_rgb(images))
    stacked = stacked[:, None] if stacked.ndim == 3 else stacked.transpose(0, 3, 1, 2)
    soft = read_soft_labels(path, [file for file, _ in files])
    if soft is None:
        labels, meaning = np.array([label for _, label in files]), None
    else:
        origin = path / "origin.json"
        labels, meaning = soft, _meaning_of(origin.read_bytes() if origin.is_file() else b"")
    return _checked(
        stacked, labels, path, "folder", "pixels", meaning=meaning, classes=tuple(folder.name for folder in folders)
    )


def _image_folders(path: Path) -> list[Path]:
    return [folder for folder in entries(path) if folder.is_dir() and _image_files(folder)]


def _image_files(folder: Path) -> list[Path]:
    return [file for file in entries(folder) if file.suffix.lower() in _IMAGE_SUFFIXES]


def _meaning_of(origin: str | bytes) -> Meaning | None:
    """What our own export says of its soft labels in the JSON text of its origin."""
    try:
        said = parse_json(origin)["targets"]
    except (ValueError, KeyError, TypeError):
        return None
    return said if said in get_args(Meaning) else None


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
    """Args: ``meaning`` as the file says it of labels of two axes, None where it does not."""
    if images.ndim not in (3, 4, 5) or labels.ndim not in (1, 2) or len(images) != len(labels) or not images.size:
        raise ValueError(
            f"{path}: samples {excerpt(images.shape)} and labels {excerpt(labels.shape)}; (N, C, L), (N, T, C, H, W) "
            "or (N, C, H, W) and (N,) or (N, classes) are needed"
        )
    for what, array in (("images", images), ("labels", labels)):
        if array.dtype.kind not in "iufb":
            raise ValueError(
                f"{path}: the {what} are {excerpt(array.dtype)}, not numbers; save them as float32 or int64"
            )
        if not np.isfinite(array).all():
            raise ValueError(f"{path} holds {what} that are not finite; get it again")
    if space == "pixels":
        check = check_series if kind(images.shape[1:]) == "series" else check_pixels
        images = check(f"{path}: the array of samples", images)
    elif images.dtype.kind != "f":
        raise ValueError(
            f"{path}: the images are {images.dtype}, networks see floats in the layout `{layout}`; save "
            "[images, labels] under another name if they are pixels"
        )
    found = to_float(images)
    if labels.ndim == 1:
        if labels.dtype.kind == "f" and not np.array_equal(labels, np.rint(labels)):
            raise ValueError(
                f"{path}: labels of one axis are classes, these are no whole numbers; save classes (N,), or logits or "
                "probabilities (N, classes)"
            )
        if np.abs(labels.astype(np.float64)).max() > 2**53:
            raise ValueError(f"{path}: labels up to {labels.max():g} are no classes; give 0..C-1")
        return External(layout, found, torch.from_numpy(labels.astype(np.int64)), "classes", space, lr, classes)
    soft = torch.from_numpy(labels.astype(np.float32))
    if not soft.isfinite().all():
        raise ValueError(f"{path} holds labels beyond float32; get it again")
    return External(layout, found, soft, meaning or _meaning(soft, path), space, lr, classes)


def _meaning(labels: Tensor, path: Path) -> Meaning:
    """What labels (N, classes) are, by their values."""
    sums = labels.sum(1)
    low, high = float(sums.min()), float(sums.max())
    if not labels.numel() or labels.min() < 0:
        return "logits"
    if abs(low - 1) <= _SUM and abs(high - 1) <= _SUM:
        return "probabilities"
    if labels.max() <= 1 or high - low <= _SUM * high:
        raise ValueError(
            f"{path}: rows of labels are not negative and sum to {low:.4g} to {high:.4g}, so they may be "
            "probabilities or logits; save y / y.sum(1, keepdims=True) for probabilities, or y - 1 - y.max() for logits"
        )
    return "logits"
