"""Read the recorded numbers, and replace the random draws of the package by the recorded ones."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from condense.augment import Augment, Params
from condense.compute import Compute
from condense.data.datasets import load
from condense.method import Context
from condense.methods.mtt import TrajectoryMatching
from condense.networks import Functional, Weights
from condense.rng import Draws, Rng
from condense.sources import Examples
from condense.synthetic import Hard, Labels, Origin, Pixels
from condense.task import Labelled, Split, make_task


class Recorded:
    """A recorded file: its arrays as float64 or int64 tensors, and its metadata."""

    def __init__(self, name: str) -> None:
        with np.load(Path(__file__).with_name(f"{name}.npz"), allow_pickle=False) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.meta: dict[str, Any] = json.loads(str(self.arrays.pop("meta")))
        self.hyper: dict[str, Any] = self.meta.get("hyper", {})

    def __getitem__(self, key: str) -> Tensor:
        return tensor(self.arrays[key])

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def keys(self, prefix: str = "") -> list[str]:
        return [key for key in self.arrays if key.startswith(prefix)]

    def weights(self, vector: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
        """Split a vector of all parameters by name; the layers of both networks have the same order."""
        shapes = [torch.Size(shape) for _, shape in self.meta["parameters"]]
        parts = vector.split([shape.numel() for shape in shapes])
        return {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}

    def draws(self, prefix: str) -> Iterator[Params]:
        """Yield the recorded augmentations in the order of their use, each with one operation."""
        if f"{prefix}_op" not in self:
            return
        first = 0
        for op, rows in zip(self.arrays[f"{prefix}_op"], self.arrays[f"{prefix}_rows"], strict=True):
            values = self[f"{prefix}_values"][first : first + rows]
            first += rows
            yield Params({str(op): operation(str(op), values)})


def operation(name: str, values: Tensor) -> Tensor:
    """Convert rows of recorded values (n, 3) to the parameters of one operation."""
    match name:
        case "color":
            return values[:, :3]
        case "crop" | "cutout":
            return values[:, :2].long()
        case "scale":
            return values[:, :2]
        case "flip":
            return values[:, 0] > 0.5
        case _:
            return values[:, 0]


class GivenWeights(Functional):
    """A network whose initial weights are the recorded ones of a step."""

    given: Callable[[int], Mapping[str, Tensor]] | None = None

    def init(self, rng: Rng, name: str, step: int = 0, unit: int = 0) -> Weights:
        found = super().init(rng, name, step, unit)
        if self.given is None or name not in ("student", "network"):
            return found
        return Weights({key: p.clone() for key, p in self.given(step).items()}, found.buffers)


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
    """Make the context of a method on recorded real images (N, C, H, W) in float64, without a transform."""
    shape, num_classes = tuple(images.shape[1:]), int(classes.max()) + 1
    arrays = load((torch.rand(images.shape), classes))
    task = make_task(
        arrays,
        transform="none",
        split=Split(),
        network=GivenWeights(network, shape, num_classes, dtype=torch.float64),
        augment=Augment.parse(augment),
        device=torch.device("cpu"),
    )
    task = dataclasses.replace(task, train=Labelled(images, classes))
    origin = Origin(dataset=task.dataset(), transform=task.transform.describe())
    artifacts = {} if experts is None else {"experts": experts}
    return Context(task, Rng(0), ipc, Pixels(), labels or Hard(), Compute(), origin, artifacts)


@contextlib.contextmanager
def drawing(
    *,
    initial: tuple[Tensor, Tensor] | None = None,
    siamese: Iterable[Params] = (),
    each: Iterable[Params] = (),
    real: Callable[[Tensor, int], Tensor] | None = None,
    orders: Iterable[Tensor] = (),
    permutations: Iterable[Tensor] = (),
    length: int = 0,
) -> Iterator[None]:
    """Replace the random draws of the package by recorded ones inside the context.

    Args:
        initial: initial images and labels.
        siamese: augmentations with one draw for all images.
        each: augmentations with one draw for each image.
        real: maps (images of a class, number) to a batch of real images.
        orders: order of the images in each epoch of training.
        permutations: random orders of ``length`` images.
    """

    from_one, from_each, by_epoch, permuting = iter(siamese), iter(each), iter(orders), iter(permutations)

    def sample(self: Augment, draws: Draws, num: int, shape: Any, siamese: bool = False) -> Params:
        return next(from_one if siamese else from_each) if self.ops else Params({})

    def draw(self: Labelled, label: int, num: int, draws: Draws) -> Tensor:
        assert real is not None
        return real(self.images[:], num)

    permutation, subset = Draws.permutation, Draws.subset

    def permuted(self: Draws, num: int) -> Tensor:
        return next(permuting) if num == length else permutation(self, num)

    def chosen(self: Draws, num: int, size: int) -> Tensor:
        return next(permuting)[:size] if num == length else subset(self, num, size)

    patches: list[tuple[Any, str, Any]] = [(Augment, "sample", sample)]
    patches += [(Draws, "permutation", permuted), (Draws, "subset", chosen)]
    if initial is not None:
        patches.append((Context, "initial", lambda self, kind: initial))
    if real is not None:
        patches.append((Labelled, "draw", draw))
    if length == 0:
        patches.append((Examples, "_order", lambda self, epoch: next(by_epoch)))
    else:
        patches.append((TrajectoryMatching, "sample_segment", lambda self, ctx, step, part: (step, 0)))
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in patches:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield
    left = sum(1 for source in (from_one, from_each, by_epoch, permuting) for _ in source)
    assert left == 0, f"{left} recorded draws were not used"


def tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """Convert to float64, or to int64 if the array holds integers."""
    found = torch.as_tensor(array)
    return found.double() if found.is_floating_point() else found.long()


def difference(found: Tensor, wanted: np.ndarray[Any, Any]) -> float:
    """Return ``apart`` for a recorded array."""
    return apart(found, tensor(wanted))


def apart(found: Tensor, wanted: Tensor) -> float:
    """Return the largest absolute difference divided by the largest absolute value of ``wanted``."""
    assert found.shape == wanted.shape
    return float((found.detach() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def assert_close(found: Tensor | float, wanted: Tensor, tolerance: float) -> None:
    """Check that ``apart`` is at most ``tolerance``."""
    error = apart(torch.as_tensor(found).double(), wanted)
    assert error <= tolerance, f"off by {error:.1e}, allowed are {tolerance:.0e}"


def assert_all_close(
    found: Mapping[str, Tensor] | Sequence[Tensor], wanted: Mapping[str, Tensor] | Iterable[Tensor], tolerance: float
) -> None:
    if isinstance(found, Mapping):
        assert isinstance(wanted, Mapping) and found.keys() == wanted.keys()
        found, wanted = list(found.values()), list(wanted.values())
    elif isinstance(wanted, Mapping):
        raise AssertionError("names on one side only")
    for a, b in zip(found, wanted, strict=True):
        assert_close(a, b, tolerance)
