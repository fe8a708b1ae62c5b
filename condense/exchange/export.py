"""Export of a set to other formats: arrays, a folder of images, a Hugging Face data set.

Any set can be exported as arrays. Folders and Hugging Face data sets hold images only.
"""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from condense.data import layout
from condense.data.samples import STANDARD
from condense.data.transform import Transform
from condense.exchange import tables
from condense.files import canonical_json, check_new_folder, replacing, reporting, temporary
from condense.synthetic.set import Origin, SyntheticSet


def export(syn: SyntheticSet, transform: Transform, path: Path, kind: str) -> None:
    """Write the decoded samples, with the values of the original data, and their labels.

    Args:
        syn: the set.
        transform: the transform of the set; its inverse gives the values of the data.
        path: a file for ``npz``, else a folder; it must not exist.
        kind: one of ``FORMATS``.

    Raises:
        ValueError: ``path`` exists or cannot be written; a library for this format is missing; the format is for
            images, and the set has none.
    """
    check_export(path, kind)
    samples = layout.kind(syn.origin.input_shape)
    if samples == "graphs":
        raise ValueError("sets of graphs have no other format; give away synthetic.safetensors of the run folder")
    if kind != "npz":
        if samples != "images":
            raise ValueError(f"the format {kind} is for images, but this set has {samples}; give the format npz")
        syn.require_classes(f"the format {kind}")
    with torch.no_grad():
        images, targets = syn()
        pixels = transform.to_data(images).cpu()
    targets = targets.cpu()
    with reporting(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) if kind == "npz" else _making(path) as staged:
            FORMATS[kind](syn, pixels, targets, staged)


def check_export(path: Path, kind: str) -> None:
    """Raise ValueError if the format is unknown, or if ``path`` exists or cannot be written."""
    if kind not in FORMATS:
        raise ValueError(f"unknown format {kind!r}: there are {', '.join(FORMATS)}; give one of them")
    if path.exists():
        raise ValueError(f"{path} exists already; give another path")
    check_new_folder(path.parent)


@contextlib.contextmanager
def _making(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to ``folder`` once it is complete."""
    with temporary(folder.parent, is_folder=True) as staged:
        yield staged
        staged.rename(folder)


def _npz(syn: SyntheticSet, pixels: Tensor, targets: Tensor, path: Path) -> None:
    """Write arrays: ``images`` or ``clips``, float32 in [0, 1], or ``series``, float32; ``layout``, the names of their
    axes; ``labels`` (N,), ``classes``, ``soft_labels`` (N, classes) if the labels are soft; ``origin``, the JSON of the
    origin of the set. A set without classes has ``targets`` (N, D) instead of labels and classes."""
    samples = layout.kind(syn.origin.input_shape)
    arrays: dict[str, Any] = {
        samples: pixels.numpy(),
        "layout": np.array(STANDARD[samples]),
        "origin": np.array(_origin(syn)),
    }
    if not syn.origin.num_classes:
        arrays["targets"] = targets.numpy()
    else:
        arrays |= {"labels": _classes(targets).numpy(), "classes": np.array(syn.origin.dataset["classes"])}
        if targets.dim() == 2:
            arrays["soft_labels"] = targets.numpy()
    with open(path, "wb") as file:
        np.savez(file, **arrays)


def _folder(syn: SyntheticSet, pixels: Tensor, targets: Tensor, path: Path) -> None:
    """Write ``CLASS/NNNNN.png``, ``labels.csv`` (file, label, class), ``origin.json`` and, if the labels are soft,
    ``soft_labels.parquet``."""
    names = _write_images(syn, pixels, targets, path)
    with open(path / "labels.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "label", "class"])
        classes = syn.origin.dataset["classes"]
        rows.writerows(
            [name, label, classes[label]] for name, label in zip(names, _classes(targets).tolist(), strict=True)
        )
    if targets.dim() == 2:
        arrow, parquet = tables.arrow()
        soft = arrow.array(targets.tolist(), type=arrow.list_(arrow.float32()))
        parquet.write_table(arrow.table({"file": names, "soft_label": soft}), path / tables.SOFT_LABELS)
    (path / "origin.json").write_text(_origin(syn) + "\n", encoding="utf-8")


def _huggingface(syn: SyntheticSet, pixels: Tensor, targets: Tensor, path: Path) -> None:
    """Write a folder for ``datasets.load_dataset``: ``data/train.parquet`` with PNG images, labels and soft labels, if
    there are any, and a data set card."""
    arrow, parquet = tables.arrow()
    names = _write_images(syn, pixels, targets, path / "images")
    rows = [{"bytes": (path / "images" / name).read_bytes(), "path": name} for name in names]
    shutil.rmtree(path / "images")
    classes = list(syn.origin.dataset["classes"])
    features = {"image": {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
    columns = {"image": arrow.array(rows), "label": arrow.array(_classes(targets).tolist(), type=arrow.int64())}
    if targets.dim() == 2:
        columns["soft_label"] = arrow.array(targets.tolist(), type=arrow.list_(arrow.float32()))
        features["soft_label"] = {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "List"}
    table = arrow.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    (path / "data").mkdir()
    parquet.write_table(table, path / "data" / "train.parquet")
    (path / "README.md").write_text(_card(syn, len(names)), encoding="utf-8")


FORMATS: dict[str, Callable[[SyntheticSet, Tensor, Tensor, Path], None]] = {
    "npz": _npz,
    "folder": _folder,
    "huggingface": _huggingface,
}


def class_folder(label: int, name: str) -> str:
    """Return the name of the folder of a class: its number and its name, in characters that are valid in file names."""
    return f"{label:03d}-" + "".join(c if c.isalnum() or c in "-_" else "-" for c in name)


def _write_images(syn: SyntheticSet, pixels: Tensor, targets: Tensor, folder: Path) -> list[str]:
    """Write PNG files, in one subfolder per class, and return their names relative to ``folder``."""
    classes, names = syn.origin.dataset["classes"], []
    for i, (image, label) in enumerate(zip((pixels * 255).round().byte(), _classes(targets).tolist(), strict=True)):
        name = f"{class_folder(label, classes[label])}/{i:05d}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        array = image.permute(1, 2, 0).numpy()
        Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(folder / name)
        names.append(name)
    return names


def _card(syn: SyntheticSet, num_images: int) -> str:
    origin = _published(syn.origin)
    method = origin.method or "unknown"
    fingerprint = f" (fingerprint `{origin.fingerprint}`)" if "fingerprint" in origin.dataset else ""
    privacy = (
        f"The images are differentially private: {origin.guarantee}."
        if origin.privacy
        else "The images are synthetic but may resemble training images: they give no privacy guarantee."
    )
    return f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train.parquet
task_categories:
- image-classification
tags:
- dataset-distillation
---

# {origin.dataset["name"]}, distilled

{num_images} synthetic images of {origin.num_classes} classes, made by `{method}` with condense {origin.code} from the
training images of {origin.dataset["name"]}{fingerprint}.
Labels: {syn.label_kind.name}. Pixels are 8-bit. Apply the transform `{canonical_json(dict(origin.transform))}`
before training a network on them.

{privacy} The licence is that of the
original data.

Recipe (hash `{origin.recipe_hash or "none"}`):

```json
{json.dumps(dict(origin.recipe), indent=1)}
```
"""


def _origin(syn: SyntheticSet) -> str:
    origin = _published(syn.origin)
    return canonical_json(
        {
            "dataset": dict(origin.dataset),
            "transform": dict(origin.transform),
            "recipe": dict(origin.recipe),
            "targets": syn.label_kind.space,
            **({"privacy": dict(origin.privacy)} if origin.privacy else {}),
        }
    )


def _published(origin: Origin) -> Origin:
    """Return an origin for export. That of a private set has no hash of the data, by which whoever has all other
    records could check a guess of the missing one."""
    if not origin.privacy:
        return origin
    dataset, recipe = (
        {name: value for name, value in of.items() if name != "fingerprint"} for of in (origin.dataset, origin.recipe)
    )
    return replace(origin, dataset=dataset, recipe=recipe, recipe_hash="")


def _classes(targets: Tensor) -> Tensor:
    return targets if targets.dim() == 1 else targets.argmax(1)
