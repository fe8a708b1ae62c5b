"""Reads the recorded numbers, and puts the recorded draws where the package would draw."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
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
from condense.rng import Rng
from condense.synthetic import Hard, Origin, Pixels
from condense.task import Labelled, Split, make_task
from condense.train import Trainer


class Recorded:
    """One file: its arrays as float64 or int64 tensors, and what it says of itself."""

    def __init__(self, name: str) -> None:
        with np.load(Path(__file__).with_name(f"{name}.npz"), allow_pickle=False) as file:
            self._arrays = {key: file[key] for key in file.files}
        self.meta: dict[str, Any] = json.loads(str(self._arrays.pop("meta")))
        self.hyper: dict[str, Any] = self.meta.get("hyper", {})

    def __getitem__(self, key: str) -> Tensor:
        array = torch.as_tensor(self._arrays[key])
        return array.double() if array.is_floating_point() else array.long()

    def __contains__(self, key: str) -> bool:
        return key in self._arrays

    def keys(self, prefix: str = "") -> list[str]:
        return [key for key in self._arrays if key.startswith(prefix)]

    def array(self, key: str) -> np.ndarray[Any, Any]:
        return self._arrays[key]

    def weights(self, key: str, network: Functional) -> dict[str, Tensor]:
        """A recorded vector as the parameters of ``network``, whose layers are in the same order."""
        sizes = [math.prod(shape) for _, shape in self.meta["parameters"]]
        parts = self[key].split(sizes)
        return {name: part.view(shape) for (name, shape), part in zip(network.shapes.items(), parts, strict=True)}

    def draws(self, prefix: str) -> Iterator[Params]:
        """The recorded augmentations in the order of their use: one operation each."""
        if f"{prefix}_op" not in self:
            return
        first = 0
        for op, rows in zip(self.array(f"{prefix}_op"), self.array(f"{prefix}_rows"), strict=True):
            values = self[f"{prefix}_values"][first : first + rows]
            first += rows
            yield Params({str(op): operation(str(op), values)})


def operation(name: str, values: Tensor) -> Tensor:
    """Rows of recorded values (n, 3) as the parameters of one operation."""
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
    """A network whose fresh weights are the recorded ones, by the step that asks for them."""

    given: Callable[[int], Mapping[str, Tensor]]

    def init(self, rng: Rng, name: str, step: int = 0, unit: int = 0) -> Weights:
        found = super().init(rng, name, step, unit)
        if name not in ("student", "network"):
            return found
        return Weights({key: p.clone() for key, p in self.given(step).items()}, found.buffers)


def context(
    images: Tensor,
    labels: Tensor,
    network: str,
    ipc: int,
    augment: str,
    artifacts: Mapping[Any, Any] | None = None,
) -> Context:
    """The context of a method on recorded real images (N, C, H, W) in float64, untransformed."""
    shape, num_classes = tuple(images.shape[1:]), int(labels.max()) + 1
    arrays = load((torch.rand(images.shape), labels))
    task = make_task(
        arrays,
        transform="none",
        split=Split(),
        network=GivenWeights(network, shape, num_classes, dtype=torch.float64),
        augment=Augment.parse(augment),
        device=torch.device("cpu"),
    )
    task = dataclasses.replace(task, train=Labelled(images, labels))
    origin = Origin(dataset=task.dataset(), transform=task.transform.describe())
    return Context(task, Rng(0), ipc, Pixels(), Hard(), Compute(), origin, {} if artifacts is None else artifacts)


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
    """Inside, what the package would draw is what was recorded.

    Args:
        initial: images and labels to start from.
        siamese, each: augmentations of one draw for all images, and of one for each.
        real: from (images, number) to a batch of real images of a class.
        orders: of the images, one for each epoch of a plain training.
        permutations: what ``torch.randperm(length)`` gives.
    """

    from_one, from_each, by_epoch, permuting = iter(siamese), iter(each), iter(orders), iter(permutations)

    def sample(self: Augment, generator: Any, num: int, shape: Any, siamese: bool = False) -> Params:
        return next(from_one if siamese else from_each) if self.ops else Params({})

    def draw(self: Labelled, label: int, num: int, generator: Any) -> Tensor:
        assert real is not None
        return real(self.images[:], num)

    randperm = torch.randperm

    def permuted(num: int, **kwargs: Any) -> Tensor:
        return next(permuting) if num == length else randperm(num, **kwargs)

    patches: list[tuple[Any, str, Any]] = [(Augment, "sample", sample), (torch, "randperm", permuted)]
    if initial is not None:
        patches.append((Context, "initial", lambda self, kind: initial))
    if real is not None:
        patches.append((Labelled, "draw", draw))
    if length == 0:
        patches.append((Trainer, "_order", lambda self, num, rng, epoch: next(by_epoch)))
    else:
        patches.append((TrajectoryMatching, "piece", lambda self, ctx, step, part: (step, 0)))
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in patches:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield
    left = sum(1 for source in (from_one, from_each, by_epoch, permuting) for _ in source)
    assert left == 0, f"{left} recorded draws were not used"


def assert_close(found: Tensor | float, wanted: Tensor | float, tolerance: float) -> None:
    """The largest difference is below ``tolerance`` times the largest wanted value."""
    a, b = (torch.as_tensor(x).detach().double() for x in (found, wanted))
    assert a.shape == b.shape
    error = float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
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
