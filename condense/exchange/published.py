"""Labelled images as other people publish them.

    layout   what it is                                                        pixels
    npz      images and labels of any origin                                   [0, 1] or 0..255
    folder   CLASS/*.jpg, *.png: SRe2L, CDA, RDED and others                   0..255
    pair     a ``.pt`` with the list [images, labels]: IDC                     [0, 1]
    res      ``res_*.pt`` of DC, DSA and DM: {"data": [[images, labels], ..]}  transformed
    images   ``images_*.pt`` beside ``labels_*.pt`` and, where the step size   transformed
             is learned, ``lr_*.pt``: MTT, TESLA, FTD; DATM, whose labels are
             logits

No file says on which data or through which transform it was made: that is the caller's word. A ``.pt`` is read with
``weights_only=True``, so nothing in it is ever run.
"""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from condense import __version__
from condense.data.datasets import Arrays
from condense.data.transform import Transform
from condense.files import read_foreign, require_file
from condense.names import printable, reason
from condense.schema import brief
from condense.synthetic.decode import Decode, Pixels
from condense.synthetic.labels import Hard, Logits
from condense.synthetic.set import Origin, SyntheticSet

Space = Literal["pixels", "transformed"]

LAYOUTS = ("npz", "folder", "pair", "res", "images")

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_IMAGE_KEYS = ("images", "x", "x_train", "data", "image")
_LABEL_KEYS = ("labels", "y", "y_train", "targets", "label")


@dataclass(frozen=True)
class Foreign:
    """Labelled images of unknown origin."""

    layout: str
    images: Tensor
    """(N, C, H, W), float32."""
    labels: Tensor
    """Classes (N,) int64, or logits (N, classes) float32."""
    space: Space
    """pixels: in [0, 1]. transformed: as networks see them."""
    lr: float | None = None
    """A learned step size."""
    classes: tuple[str, ...] = ()
    """Their names, where folders have names."""


def is_foreign(path: Path) -> bool:
    """Whether this looks like a published set and not like one of ours."""
    if path.is_dir():
        return any(_image_folders(path))
    return path.suffix in (".npz", ".pt", ".pth")


def read(path: Path) -> Foreign:
    """Find out the layout of a file or folder, and read it.

    Raises:
        ValueError: there is nothing, or it has none of the layouts, or holds something else than labelled images.
    """
    if not path.exists():
        raise ValueError(f"there is nothing at {path}; check the path")
    if path.is_dir():
        return _read_folder(path)
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
    found: Foreign, arrays: Arrays, transform: Transform, spec: str, *, decode: Decode = Pixels()
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
    if shape != arrays.image_shape:
        raise ValueError(
            f"images of shape {shape}, {arrays.name} has {arrays.image_shape}; give --dataset with the data they are of"
        )
    labels = found.labels
    if found.classes and set(found.classes) <= set(arrays.classes):
        labels = torch.tensor([arrays.classes.index(name) for name in found.classes])[labels]
    soft = labels.dim() == 2
    if soft and labels.shape[1] != num:
        raise ValueError(f"labels for {labels.shape[1]} classes, {arrays.name} has {num}; give another --dataset")
    if not soft and not 0 <= int(labels.min()) <= int(labels.max()) < num:
        raise ValueError(f"labels from {int(labels.min())} to {int(labels.max())}, {arrays.name} has {num} classes")
    if not decode.stores_pixels:
        raise ValueError(f"published images are no {decode.name}; give --decode pixels or factor")
    origin = Origin(
        dataset={
            "name": arrays.name,
            "fingerprint": arrays.fingerprint["train"],
            "classes": list(arrays.classes),
            "image_shape": list(arrays.image_shape),
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
    return SyntheticSet(images, labels, origin, decode=decode, label_kind=Logits() if soft else Hard(), lr=found.lr)


def _load(path: Path) -> Any:
    """A ``.pt`` of tensors, lists, dicts and numbers; numpy's scalars too, which old code left in its logs."""
    scalars: list[Any] = [np.dtype, np.ndarray, *{type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8")}]
    core = getattr(np, "_core", None) or np.core
    scalars += [core.multiarray.scalar, core.multiarray._reconstruct]
    if not path.exists():
        raise ValueError(f"there is no {path}; images, labels and lr lie beside each other in this layout")
    return read_foreign(path, holds="tensors", mend="tensors", allowed=scalars)


def _pair(value: Any, path: Path, layout: str, space: Space, lr: float | None = None) -> Foreign:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(x, Tensor) for x in value):
        raise ValueError(f"{path}: no pair of images and labels in the layout `{layout}`; save it as tensors")
    if not all(map(_is_whole, value)):
        raise ValueError(f"{path}: its tensors are not plain ones of real numbers; save them as such, with .clone()")
    return _checked(value[0].detach(), value[1].detach(), path, layout, space, lr)


def _read_images_file(path: Path) -> Foreign:
    tail = path.name.removeprefix("images")
    labels, rate = path.with_name("labels" + tail), path.with_name("lr" + tail)
    lr = None
    if rate.exists():
        lr = _step_size(_load(rate), rate)
    return _pair([_load(path), _load(labels)], path, "images", "transformed", lr)


def _step_size(value: Any, path: Path) -> float:
    """A positive number, or the first one of a tensor, an array or a list."""
    if isinstance(value, list | tuple) and value:
        value = value[0]
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "uif":
        value = torch.as_tensor(value)
    if isinstance(value, Tensor) and _is_whole(value) and value.numel():
        value = value.detach().reshape(-1)[0].item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(
            f"{path} holds {brief(value)}: a step size is a positive number; remove the file to do without"
        )
    return float(value)


def _is_whole(tensor: Tensor) -> bool:
    """Whether it is an ordinary tensor of real numbers that holds each of its entries; one of a few bytes may claim
    any shape."""
    plain = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_complex() or tensor.is_meta)
    return plain and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.itemsize


def _read_npz(path: Path) -> Foreign:
    require_file(path)
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as .npz: {reason(error)}; write it again") from error
    images = next((arrays[key] for key in _IMAGE_KEYS if key in arrays), None)
    labels = next((arrays[key] for key in _LABEL_KEYS if key in arrays), None)
    if images is None or labels is None:
        names = printable(", ".join(arrays) or "nothing", 100)
        raise ValueError(f"{path} holds {names}; it needs the arrays `images` and `labels`")
    if images.dtype.kind not in "uif" or labels.dtype.kind not in "uif":
        raise ValueError(f"{path} holds images of {images.dtype} and labels of {labels.dtype}; both must be numbers")
    scale = 255 if images.dtype == np.uint8 else 1
    images = images[:, None] if images.ndim == 3 else images
    if images.ndim == 4 and images.shape[3] in (1, 3) and images.shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    found = _checked(torch.as_tensor(np.ascontiguousarray(images)), torch.as_tensor(labels), path, "npz", "pixels")
    found = Foreign("npz", found.images / scale, found.labels, "pixels")
    if not 0 <= float(found.images.min()) <= float(found.images.max()) <= 1:
        raise ValueError(
            f"{path} has values from {float(found.images.min()):.3g} to {float(found.images.max()):.3g}: they are no "
            "pixels in [0, 1] or 0..255; undo their normalisation"
        )
    return found


def _read_folder(path: Path) -> Foreign:
    folders = sorted(_image_folders(path))
    if not folders:
        raise ValueError(f"{path} has no folders of images: CLASS/*.png or CLASS/*.jpg; give such a folder")
    images, labels, shape = [], [], None
    for label, folder in enumerate(folders):
        for file in _image_files(folder):
            try:
                with Image.open(file) as opened:
                    image = np.asarray(opened.convert("L" if opened.mode in ("L", "1") else "RGB"))
            except (OSError, UnidentifiedImageError) as error:
                raise ValueError(f"{file} cannot be read as an image; replace it or take it out") from error
            image = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
            shape = shape or image.shape
            if image.shape != shape:
                raise ValueError(f"{file} is {image.shape}, the images before it {shape}; give images of one size")
            images.append(image)
            labels.append(label)
    stacked = torch.from_numpy(np.stack(images)).float() / 255
    found = _checked(stacked, torch.tensor(labels), path, "folder", "pixels")
    return Foreign("folder", found.images, found.labels, "pixels", classes=tuple(folder.name for folder in folders))


def _image_folders(path: Path) -> list[Path]:
    return [folder for folder in path.iterdir() if folder.is_dir() and _image_files(folder)]


def _image_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in _IMAGE_SUFFIXES)


def _checked(
    images: Tensor,
    labels: Tensor,
    path: Path,
    layout: str,
    space: Space,
    lr: float | None = None,
) -> Foreign:
    if images.dim() != 4 or labels.dim() not in (1, 2) or len(images) != len(labels) or not len(images):
        raise ValueError(
            f"{path}: images {tuple(images.shape)} and labels {tuple(labels.shape)}; (N, C, H, W) and (N,) or "
            "(N, classes) are needed"
        )
    images = images.float()
    labels = labels.float() if labels.dim() == 2 else labels
    if not images.isfinite().all() or not labels.isfinite().all():
        raise ValueError(f"{path} holds values that are not finite; get it again")
    if labels.dim() == 1:
        if not torch.equal(labels, labels.long().to(labels.dtype)):
            raise ValueError(
                f"{path}: labels of one axis are classes, these are no whole numbers; give logits (N, classes)"
            )
        labels = labels.long()
    return Foreign(layout, images, labels, space, lr)
