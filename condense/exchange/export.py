"""Export of a set to other formats: arrays, a folder of images, a Hugging Face data set.

Any set can be exported as arrays. Folders and Hugging Face data sets hold images only.
"""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from condense import __version__, picture, registry
from condense.data import layout
from condense.data.samples import STANDARD
from condense.data.transform import Transform
from condense.exchange import tables
from condense.files import canonical_json, check_new_folder, replacing, reporting, temporary
from condense.names import percent
from condense.synthetic.set import Origin, SyntheticSet

Rows = Sequence[Mapping[str, Any]]
"""Rows of a file of results."""


@dataclass(frozen=True)
class _Exported:
    """What a format writes."""

    syn: SyntheticSet
    transform: Transform
    pixels: Tensor
    """The decoded samples with the values of the data, (N, *input_shape)."""
    targets: Tensor
    clipped: float | None
    results: Rows


def export(syn: SyntheticSet, transform: Transform, path: Path, kind: str, results: Rows = ()) -> float | None:
    """Write the decoded samples, with the values of the original data, and their labels.

    Args:
        syn: the set.
        transform: the transform of the set; its inverse gives the values of the data.
        path: a file for ``npz``, else a folder; it must not exist.
        kind: one of ``FORMATS``.
        results: results of the set and of its baselines, for the card of ``huggingface``.

    Returns:
        The share of the pixel values that lay outside [0, 1] by more than half a level of 8 bits and were clipped; None
        for series, which are not clipped.

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
    if syn.label_kind.of_views:
        warnings.warn(
            f"the classes are exported, not the {syn.label_kind.name} labels of views: these stay in the .safetensors "
            "file",
            stacklevel=2,
        )
    with torch.no_grad():
        images, targets = syn()
        pixels, clipped = transform.to_data(images), None
        if samples != "series":
            clipped = float(((transform.inverse(images) - pixels).abs() > 0.5 / 255).double().mean())
    exported = _Exported(syn, transform, pixels.cpu(), targets.cpu(), clipped, results)
    with reporting(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) if kind == "npz" else _making(path) as staged:
            FORMATS[kind](exported, staged)
    return clipped


def clipping(share: float) -> str:
    """Return the share of clipped pixel values in words."""
    if not share:
        return "no pixel value was clipped"
    return f"{100 * share:.2g} % of the pixel values lay outside [0, 1] and were clipped"


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


def _npz(exported: _Exported, path: Path) -> None:
    """Write arrays: ``images`` or ``clips``, float32 in [0, 1], or ``series``, float32; ``layout``, the names of their
    axes; ``labels`` (N,), ``classes``, ``soft_labels`` (N, classes) if the labels are soft; ``origin``, the JSON of the
    origin of the set. A set without classes has ``targets`` (N, D) instead of labels and classes."""
    syn, targets = exported.syn, exported.targets
    samples = layout.kind(syn.origin.input_shape)
    arrays: dict[str, Any] = {
        samples: exported.pixels.numpy(),
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


def _folder(exported: _Exported, path: Path) -> None:
    """Write ``CLASS/NNNNN.png``, ``labels.csv`` (file, label, class), ``origin.json`` and, if the labels are soft,
    ``soft_labels.parquet``."""
    syn, targets, names = exported.syn, exported.targets, _write_images(exported, path)
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


def _huggingface(exported: _Exported, path: Path) -> None:
    """Write a folder for ``datasets.load_dataset``: ``data/train.parquet`` with PNG images, labels and soft labels, if
    there are any; ``set.png``, a picture of the set; ``origin.json``; and ``README.md``, the data set card."""
    arrow, parquet = tables.arrow()
    syn, targets, names = exported.syn, exported.targets, _write_images(exported, path / "images")
    rows = [{"bytes": (path / "images" / name).read_bytes(), "path": name} for name in names]
    shutil.rmtree(path / "images")
    classes = list(syn.origin.dataset["classes"])
    features = {"image": {"_type": "Image"}, "label": {"names": classes, "_type": "ClassLabel"}}
    columns = {"image": arrow.array(rows), "label": arrow.array(_classes(targets).tolist(), type=arrow.int64())}
    if targets.dim() == 2:
        columns["soft_label"] = arrow.array(targets.tolist(), type=arrow.list_(arrow.float32()))
        features["soft_label"] = {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "Sequence"}
    table = arrow.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    (path / tables.HUB).parent.mkdir()
    parquet.write_table(table, path / tables.HUB)
    picture.draw(syn, exported.transform, path / "set.png")
    (path / "origin.json").write_text(_origin(syn) + "\n", encoding="utf-8")
    (path / "README.md").write_text(_card(exported), encoding="utf-8")


FORMATS: dict[str, Callable[[_Exported, Path], None]] = {
    "npz": _npz,
    "folder": _folder,
    "huggingface": _huggingface,
}


def class_folders(classes: Sequence[str]) -> list[str]:
    """Return the names of the folders of classes: their numbers, in equally many digits and at least three, so that the
    folders sort as the classes do, and their names, in characters that are valid in file names."""
    digits = max(3, len(str(len(classes) - 1)))
    valid = ["".join(c if c.isalnum() or c in "-_" else "-" for c in name) for name in classes]
    return [f"{label:0{digits}d}-{name}" for label, name in enumerate(valid)]


def _write_images(exported: _Exported, folder: Path) -> list[str]:
    """Write PNG files, in one subfolder per class, and return their names relative to ``folder``."""
    folders, names = class_folders(exported.syn.origin.dataset["classes"]), []
    pixels, labels = (exported.pixels * 255).round().byte(), _classes(exported.targets).tolist()
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        name = f"{folders[label]}/{i:05d}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        array = image.permute(1, 2, 0).numpy()
        Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(folder / name)
        names.append(name)
    return names


def _card(exported: _Exported) -> str:
    syn, clipped = exported.syn, exported.clipped
    origin = _published(syn.origin)
    fingerprint = f" (fingerprint `{origin.fingerprint}`)" if "fingerprint" in origin.dataset else ""
    selected = origin.method in registry.METHODS and registry.load(origin.method).selects
    if origin.privacy:
        privacy = f"The images are differentially private: {origin.guarantee}."
    elif selected:
        privacy = "The images are real training images: they give no privacy."
    else:
        privacy = "The images are synthetic but may resemble training images: they give no privacy guarantee."
    assert clipped is not None
    name, labels = origin.dataset["name"], syn.label_kind.name
    if syn.label_kind.of_views:
        labels = f"classes alone, without the {labels} labels of views"
    count = f"{len(exported.pixels)} {'real' if selected else 'synthetic'}"
    made = f"{'selected' if selected else 'made'} by `{origin.method or 'unknown'}` with condense {origin.code}"
    return f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: {tables.HUB}
task_categories:
- image-classification
tags:
- dataset-distillation
---

# {name}, distilled

{count} images of {origin.num_classes} classes, {made} from the training images of
{name}{fingerprint}.

![Up to ten images of each class, one class in each row](set.png)

Labels: {labels}. Pixels are 8-bit; {clipping(clipped)}. Before a network is trained on them, the
transform `{canonical_json(dict(origin.transform))}` is applied.

{privacy} The licence is that of the
original data.

## Accuracy

{_accuracies(exported.results)}

## Use

```python
from datasets import load_dataset

rows = load_dataset("FOLDER", split="train")  # or the name of its repository
rows[0]["image"], rows.features["label"].int2str(rows[0]["label"])
```

With Condense, which needs the original data set DATA to evaluate the images:

    condense import FOLDER set.safetensors --dataset DATA --transform {_spec(origin)}
    condense evaluate set.safetensors

## Citation

{_citation(origin.method)}

Condense:

```bibtex
@software{{condense,
  title = {{Condense: a dataset-distillation engine}},
  author = {{{{The Condense developers}}}},
  version = {{{__version__}}}
}}
```

## Recipe

Hash `{origin.recipe_hash or "none"}`.

```json
{json.dumps(dict(origin.recipe), indent=1)}
```
"""


def _accuracies(results: Rows) -> str:
    """Return a table of test accuracies in percent, or a line that says that there are none."""
    if not results:
        return "No accuracy was measured before the export."
    lines = ["| set | images | network | protocol | accuracy, % | n | seed |", "|---|---|---|---|---|---|---|"]
    for row in results:
        head = f"| {row['method'] or 'set'} | {row['num_images']} | {row['network']} | {row['protocol']} |"
        lines.append(f"{head} {percent(row['mean'], row['std'])} | {row['n']} | {row['seed']} |")
    return "\n".join(lines) + (
        "\n\nTest accuracy, mean ± standard deviation over n networks. They were trained on the set before its pixels "
        "were\nrounded to 8 bits."
    )


def _spec(origin: Origin) -> str:
    """Return the name of the transform for the command line."""
    return str(origin.recipe.get("transform", origin.transform["kind"]))


def _citation(method: str) -> str:
    """Return what a method says of its paper."""
    if method in registry.METHODS:
        return registry.citation(registry.load(method))
    return f"The images were made by `{method or 'unknown'}`, whose paper Condense does not know."


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
        {name: value for name, value in of.items() if name not in ("fingerprint", "held_out")}
        for of in (origin.dataset, origin.recipe)
    )
    return replace(origin, dataset=dataset, recipe=recipe, recipe_hash="")


def _classes(targets: Tensor) -> Tensor:
    return targets if targets.dim() == 1 else targets.argmax(1)
