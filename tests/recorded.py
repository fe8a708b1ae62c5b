"""Numbers that the authors' code made, with the draws behind them (``tests/parity``)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from condense.artifacts import TrajectorySpec
from condense.augment import Augment, Params
from condense.compute import Compute
from condense.data.datasets import load
from condense.method import Context
from condense.networks import Functional
from condense.rng import Rng
from condense.synthetic import Hard, Labels, Origin, Pixels
from condense.task import Labelled, Split, make_task


class Recorded:
    """One file of numbers."""

    def __init__(self, name: str) -> None:
        with np.load(Path(__file__).parent / "parity" / f"{name}.npz") as file:
            self.arrays = {key: file[key] for key in file.files}
        self.meta: dict[str, Any] = json.loads(str(self.arrays.pop("meta")))
        self.hyper: dict[str, Any] = self.meta.get("hyper", {})

    def __getitem__(self, key: str) -> Tensor:
        """float64, or int64 where the numbers are whole."""
        found = torch.as_tensor(self.arrays[key])
        return found.double() if found.dtype.is_floating_point else found.long()

    def weights(self, vector: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """A vector of all parameters by name; the layers of both networks have the same order."""
        shapes = [torch.Size(shape) for _, shape in self.meta["parameters"]]
        parts = vector.split([shape.numel() for shape in shapes])
        return {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}

    def draws(self, prefix: str) -> Iterator[Params]:
        """The draws of the augmentation in the order in which they were used, of one operation each."""
        kinds, rows, values = (self.arrays[f"{prefix}_{what}"] for what in ("op", "rows", "values"))
        for op, value in zip(kinds.tolist(), torch.as_tensor(values).split(rows.tolist()), strict=True):
            yield Params({op: _COLUMNS[op](value)})


_COLUMNS = {
    "color": lambda v: v,
    "crop": lambda v: v[:, :2].long(),
    "cutout": lambda v: v[:, :2].long(),
    "scale": lambda v: v[:, :2],
    "flip": lambda v: v[:, 0] > 0.5,
    "rotate": lambda v: v[:, 0],
}


def context(
    images: Tensor,
    classes: Tensor,
    network: str,
    ipc: int,
    *,
    augment: str = "none",
    labels: Labels | None = None,
    experts: Any = None,
) -> Context:
    """A context in float64 whose training data are these images as they are."""
    shape = images.shape[1:]
    task = make_task(
        load((torch.rand(len(images), *shape), classes)),
        transform="none",
        split=Split(),
        network=Functional(network, tuple(shape), int(classes.max()) + 1, dtype=torch.float64),
        augment=Augment.parse(augment),
        device=torch.device("cpu"),
    )
    task = dataclasses.replace(task, train=Labelled(images, classes))
    origin = Origin(dataset=task.dataset(), transform=task.transform.describe())
    artifacts = {} if experts is None else {TrajectorySpec: experts}
    return Context(task, Rng(0), ipc, Pixels(), labels or Hard(), Compute(), origin, artifacts)


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest entry."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())
