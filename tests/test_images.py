"""Images as they are drawn: equal to a transformed copy of the whole set, without there being one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from condense.augment import Augment
from condense.compute import Compute
from condense.data import SPECS, Arrays, Images, channel_statistics, fit, load
from condense.networks import Functional
from condense.rng import Rng
from condense.task import Labelled, Split, Task, make_task
from condense.train import Scorer, Trainer, Training

CPU = torch.device("cpu")
KINDS = ["uint8", "float32"]


def source(kind: str = "uint8", num: int = 60) -> tuple[Any, ...]:
    """Three classes of 3x4x4 images in random order; as uint8, or as floats off its grid."""
    draw = np.random.default_rng(0)
    labels = draw.permutation(np.arange(num) % 3)
    images = draw.integers(0, 200, (num, 3, 4, 4)) + 20 * labels[:, None, None, None]
    return (images.astype(np.uint8) if kind == "uint8" else (images / 256).astype(np.float32)), labels


def task_of(arrays: Arrays, spec: str = "channel", device: torch.device = CPU, val_fraction: float = 0.25) -> Task:
    return make_task(
        arrays,
        transform=spec,
        split=Split(val_fraction=val_fraction),
        network=Functional("convnet:depth=1,width=4", arrays.input_shape, arrays.num_classes, device),
        augment=Augment(),
        device=device,
    )


def eager(arrays: Arrays, task: Task) -> tuple[Tensor, Tensor]:
    """Both parts, from one float32 copy of the whole set."""
    images = torch.tensor(arrays.x_train, dtype=torch.float32)
    if arrays.x_train.dtype == np.uint8:
        images = images / 255
    parts = task.split.indices(torch.from_numpy(arrays.y_train))
    description = task.transform.describe()
    if description["kind"] == "channel":
        mean, std = (torch.tensor(description[name])[:, None, None] for name in ("mean", "std"))
        images = (images - mean) / std
    elif description["kind"] == "zca":
        images = task.transform(images)
    return images[parts[0]], images[parts[1]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", SPECS)
def test_what_is_taken_out_equals_a_transformed_copy(spec: str, kind: str) -> None:
    arrays = load(source(kind))
    assert arrays.x_train.dtype == kind
    task = task_of(arrays, spec)
    assert task.val is not None
    exact = spec in ("none", "channel")
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-5}
    for part, expected in zip((task.train, task.val), eager(arrays, task), strict=True):
        images = part.images
        assert images.shape == expected.shape and len(images) == len(expected) == len(part)
        index = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:7]
        torch.testing.assert_close(images[:], expected, **tolerance)
        torch.testing.assert_close(images[index], expected[index], **tolerance)
        torch.testing.assert_close(images[3:5], expected[3:5], **tolerance)
        batches, wanted = list(images.split(4)), expected.split(4)
        assert [len(x) for x in batches] == [len(x) for x in wanted]
        torch.testing.assert_close(torch.cat(batches), expected, **tolerance)


def test_a_draw_is_of_its_class_without_replacement_and_keyed() -> None:
    arrays = load(source())
    task = task_of(arrays)
    eager_images, _ = eager(arrays, task)
    for label, members in enumerate(task.train.by_class):
        assert torch.equal(members, (task.train.labels == label).nonzero().flatten())
        order = Rng(5)("real").permutation(len(members))
        for num in (4, 1000):
            drawn = task.train.draw(label, num, Rng(5)("real"))
            assert torch.equal(drawn, eager_images[members[order[:num]]])


def test_both_parts_and_the_data_set_are_one_array(tmp_path: Path) -> None:
    images, labels = source()
    np.savez(tmp_path / "mine.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    for arrays in (load((images, labels)), load(tmp_path / "mine.npz", cache=tmp_path / "cache")):
        task = task_of(arrays)
        assert task.val is not None
        for part in (task.train, task.val):
            assert isinstance(part.images, Images)
            assert np.shares_memory(part.images.raw.numpy(), arrays.x_train)


def test_images_taken_out_may_be_written_to() -> None:
    for kind in KINDS:
        arrays = load(source(kind))
        before = arrays.x_train.copy()
        task = task_of(arrays, "none")
        task.train.images[:].zero_()
        task.train.images[torch.arange(3)].zero_()
        assert np.array_equal(arrays.x_train, before)


def test_an_array_that_is_read_only_is_taken() -> None:
    images, labels = source()
    images.flags.writeable = False
    arrays = load((images, labels))
    assert torch.equal(task_of(arrays).train.images[:], eager(arrays, task_of(arrays))[0])


class Largest(TorchDispatchMode):
    """The largest floating-point tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("spec", ["none", "channel"])
def test_the_whole_set_is_never_copied_as_floats(spec: str) -> None:
    arrays = load(source(num=15000))
    with Largest() as largest:
        task = task_of(arrays, spec)
        task.train.draw(0, 100, Rng(0)("real"))
        for _ in task.train.images.split(1000):
            pass
    assert 1000 * 48 <= largest.numel <= 4096 * 48


@pytest.mark.parametrize("spec", ["channel", "zca", "zca-relative"])
def test_fitting_reads_images_in_chunks_and_fits_the_same(spec: str) -> None:
    arrays = load(source(num=6000))
    whole = torch.tensor(arrays.x_train, dtype=torch.float32) / 255
    index = torch.arange(1, 6000)
    part = Images.of(arrays.x_train, CPU).subset(index)
    fits = [fit(spec, images, known=None, key="key", cache=None) for images in (whole[index], part)]
    assert fits[0].describe() == fits[1].describe()
    assert channel_statistics(part) == channel_statistics(whole[index])


def test_training_and_scoring_take_images_as_they_take_a_tensor() -> None:
    task = task_of(load(source()))
    trainer = Trainer(task.network, Training(num_epochs=2, batch_size=16), Compute())
    scorer = Scorer(task.network, Compute(), batch_size=7)
    results = []
    for images in (task.train.images, task.train.images[:]):
        batches = trainer.source(images, task.train.labels, Rng(1), Augment(("flip", "color")))
        weights = trainer.run(task.network.init(Rng(0), "weights"), batches)
        results.append((weights, scorer.accuracy(weights, images, task.train.labels)))
    (one, score), (other, other_score) = results
    assert all(torch.equal(one.params[name], other.params[name]) for name in one.params)
    assert score == other_score


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_draws_on_a_gpu_are_the_same_and_wait_for_nothing(kind: str) -> None:
    arrays = load(source(kind))
    here, there = task_of(arrays), task_of(arrays, device=torch.device("cuda"))

    def draw(part: Labelled) -> Tensor:
        return part.draw(1, 8, Rng(0)("real"))

    draw(there.train)
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = draw(there.train)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert drawn.is_cuda and torch.equal(drawn.cpu(), draw(here.train))


@pytest.mark.parametrize(("shape", "layout"), [((2, 9), "NCL"), ((2, 3, 4, 4), "NTCHW")])
@pytest.mark.parametrize("spec", SPECS)
def test_series_and_clips_are_drawn_like_images(shape: tuple[int, ...], layout: str, spec: str) -> None:
    draw = np.random.default_rng(0)
    labels = draw.permutation(np.arange(40) % 2)
    samples = draw.normal(size=(40, *shape)) if layout == "NCL" else draw.random((40, *shape))
    arrays = load((samples, labels), layout=layout)
    task = make_task(
        arrays,
        transform=spec,
        split=Split(val_fraction=0.25),
        network=Functional("mlp", arrays.input_shape, 2, CPU),
        augment=Augment(),
        device=CPU,
    )
    assert task.input_shape == shape and task.dataset()["input_shape"] == list(shape)
    rows = [torch.from_numpy(arrays.x_train)[index] for index in task.split.indices(torch.from_numpy(arrays.y_train))]
    assert task.val is not None
    for part, raw in zip((task.train, task.val), rows, strict=True):
        torch.testing.assert_close(part.images[:], task.transform(raw))
        assert part.images.shape == raw.shape
