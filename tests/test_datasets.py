"""Reading, checking and fingerprinting data."""

import dataclasses
import io
import mmap
import os
import re
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from condense.data import Arrays, fingerprint, load, names, to_float
from condense.data.reading import pixels_of
from tests.mutations import mutate_bytes

Split = dict[str, Any]


def colour(n: int = 12, size: int = 6, seed: int = 0) -> Split:
    """A small data set of three classes, NHWC."""
    draw = np.random.default_rng(seed)
    return {
        "x_train": draw.integers(0, 256, (n, size, size, 3), dtype=np.uint8),
        "y_train": np.arange(n) % 3,
        "x_test": draw.integers(0, 256, (n // 2, size, size, 3), dtype=np.uint8),
        "y_test": np.arange(n // 2) % 3,
    }


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def save_folder(root: Path, data: Split, mode: str = "RGB") -> Path:
    for split in ("train", "test"):
        for index, (image, label) in enumerate(zip(data[f"x_{split}"], data[f"y_{split}"], strict=True)):
            folder = root / split / "abc"[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).convert(mode).save(folder / f"{index:03}.png")
    return root


class Pairs(Dataset[Any]):
    def __init__(self, *items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.zeros(1, 3, 3), 0)])


def pairs(images: Any, labels: Any, convert: Callable[[Any], Any] = lambda image: image) -> Pairs:
    return Pairs(*((convert(image), int(label)) for image, label in zip(images, labels, strict=True)))


# Sources


def test_digits_are_embedded_and_split_by_stored_order() -> None:
    arrays = load("digits")
    assert arrays.known is not None and arrays.fingerprint == {
        "train": arrays.known.train,
        "test": arrays.known.test,
    }
    assert (arrays.name, arrays.input_shape, arrays.num_classes) == ("digits", (1, 8, 8), 10)
    assert len(arrays.y_train) + len(arrays.y_test) == 1797
    for label in range(10):
        total = (arrays.y_train == label).sum() + (arrays.y_test == label).sum()
        assert (arrays.y_test == label).sum() == total // 5
    pixels = to_float(arrays.x_train)
    assert torch.equal((pixels * 16).round() / 16, pixels) and pixels.min() == 0 and pixels.max() == 1
    assert pixels.mean().item() == pytest.approx(arrays.known.mean[0], abs=1e-4)
    assert pixels.std().item() == pytest.approx(arrays.known.std[0], abs=1e-4)


@pytest.mark.parametrize(
    ("file", "name", "strategy"),
    [
        ("fashion_mnist.npz", "fashion-mnist", "color_crop_cutout_flip_scale_rotate"),
        ("mnist.npz", "mnist", "color_crop_cutout_scale_rotate"),
    ],
)
def test_a_known_set_is_recognised_whatever_the_file_is_called(
    shared_data: Path, tmp_path: Path, file: str, name: str, strategy: str
) -> None:
    (tmp_path / "mine.npz").symlink_to(shared_data / file)
    arrays = load(tmp_path / "mine.npz")
    assert arrays.name == name and arrays.strategy == strategy
    assert arrays.x_train.shape == (60000, 1, 28, 28) and arrays.x_train.dtype == np.uint8
    assert arrays.known is not None
    assert to_float(arrays.x_train).mean().item() == pytest.approx(arrays.known.mean[0], abs=1e-3)


@pytest.mark.slow
def test_cifar10_is_recognised(shared_data: Path, tmp_path: Path) -> None:
    files = (shared_data / "unpack.py", shared_data / "cifar10_packed.npz", tmp_path / "mine.npz")
    subprocess.run([sys.executable, *files], check=True)
    arrays = load(tmp_path / "mine.npz")
    assert arrays.name == "cifar10" and arrays.input_shape == (3, 32, 32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "name", "side"),
    [("cifar100_q94.npz", "cifar100-jpeg94", 32), ("imagenette64_q92.npz", "imagenette64-jpeg92", 64)],
)
def test_copies_in_jpeg_have_names_of_their_own(
    shared_data: Path, tmp_path: Path, file: str, name: str, side: int
) -> None:
    """Their images differ from the originals, but their classes and the augmentation of the literature do not."""
    subprocess.run([sys.executable, shared_data / "unpack.py", shared_data / file, tmp_path / "mine.npz"], check=True)
    arrays = load(tmp_path / "mine.npz")
    assert arrays.name == name and arrays.input_shape == (3, side, side) and "flip" in arrays.strategy


def test_known_train_images_without_test_are_known_and_with_another_test_are_not() -> None:
    digits = load("digits")
    train = (digits.x_train, digits.y_train)
    assert load(train).name == "digits"
    assert load((*train, digits.x_test, digits.y_test)).name == "digits"
    other = load((*train, digits.x_test[1:], digits.y_test[1:]))
    assert other.name == "custom" and other.known is None


def test_every_name_has_constants_for_its_channels() -> None:
    from condense.data.datasets import _table

    assert names() == ["digits", "mnist", "fashion-mnist", "svhn", "cifar10", "cifar100"]
    assert set(names()) < _table().keys()
    natural = {"cifar10", "cifar100", "cifar100-jpeg94", "imagenette64-jpeg92"}
    for known in _table().values():
        assert len(known.mean) == len(known.std) == (3 if known.name in natural | {"svhn"} else 1)
        assert len(known.classes) == (100 if known.name.startswith("cifar100") else 10)
        assert ("flip" in known.augment) == (known.name in natural | {"fashion-mnist"})


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
def test_npz_layouts_and_dtypes_give_the_same_arrays(tmp_path: Path, layout: str, dtype: str) -> None:
    data = colour()
    expected = np.moveaxis(data["x_train"], 3, 1)
    for key in ("x_train", "x_test"):
        if layout == "NCHW":
            data[key] = np.moveaxis(data[key], 3, 1)
        if dtype != "uint8":
            data[key] = data[key].astype(dtype) / 255
    arrays = load(save(tmp_path / "mine.npz", **data))
    assert (arrays.name, arrays.known, arrays.classes) == ("mine", None, ("0", "1", "2"))
    assert arrays.input_shape == (3, 6, 6)
    assert arrays.x_train.dtype == np.uint8 and np.array_equal(arrays.x_train, expected)
    assert arrays.y_train.dtype == np.int64
    assert arrays.strategy == "color_crop_cutout_scale_rotate"
    reference = load(save(tmp_path / "reference.npz", **colour()))
    assert arrays.fingerprint == reference.fingerprint


def test_npz_gray_images_and_class_names(tmp_path: Path) -> None:
    data = {key: value[..., 0] if key[0] == "x" else value for key, value in colour().items()}
    arrays = load(save(tmp_path / "gray.npz", **data, classes=["ant", "bee", "cat"]))
    assert arrays.input_shape == (1, 6, 6) and arrays.classes == ("ant", "bee", "cat")


def test_where_both_axes_could_hold_channels_files_are_nhwc_and_tensors_nchw(tmp_path: Path) -> None:
    data = {
        **colour(),
        "x_train": np.zeros((12, 3, 5, 1), np.uint8),
        "x_test": np.zeros((6, 3, 5, 1), np.uint8),
    }
    assert load(save(tmp_path / "both.npz", **data)).input_shape == (1, 3, 5)
    assert load((torch.from_numpy(data["x_train"]), torch.from_numpy(data["y_train"]))).input_shape == (
        3,
        5,
        1,
    )


def test_floats_off_the_grid_stay_float(tmp_path: Path) -> None:
    data = colour()
    data["x_train"] = data["x_train"] / 256
    arrays = load(save(tmp_path / "mine.npz", **data))
    assert arrays.x_train.dtype == np.float32
    assert np.array_equal(to_float(arrays.x_train).numpy(), arrays.x_train)
    assert not np.shares_memory(to_float(arrays.x_train).numpy(), arrays.x_train)


def test_uint8_survives_the_way_through_float() -> None:
    images = np.arange(256, dtype=np.uint8).reshape(2, 1, 8, 16)
    pixels = to_float(images)
    assert pixels.dtype == torch.float32 and pixels.min() == 0 and pixels.max() == 1
    assert np.array_equal(load((pixels, torch.tensor([0, 1]))).x_train, images)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_image_folder_equals_npz(tmp_path: Path, mode: str) -> None:
    data = colour()
    arrays = load(save_folder(tmp_path / "pets", data, mode))
    if mode == "L":
        for key in ("x_train", "x_test"):
            data[key] = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in data[key]])
    assert arrays.name == "pets" and arrays.classes == ("a", "b", "c")
    assert arrays.fingerprint == load(save(tmp_path / "same.npz", **data)).fingerprint


def test_image_folder_with_some_gray_images_is_rgb(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "pets", colour())
    gray = np.arange(36, dtype=np.uint8).reshape(6, 6)
    Image.fromarray(gray).save(folder / "train" / "a" / "000.png")
    (folder / "train" / ".hidden").touch()
    arrays = load(str(folder))
    assert arrays.input_shape == (3, 6, 6)
    assert np.array_equal(arrays.x_train[0], np.stack([gray] * 3))


@pytest.mark.parametrize("convert", [np.asarray, Image.fromarray, torchvision.transforms.functional.to_tensor])
def test_torch_datasets_equal_npz(tmp_path: Path, convert: Callable[[Any], Any]) -> None:
    data = colour()
    expected = load(save(tmp_path / "same.npz", **data)).fingerprint
    train = pairs(data["x_train"], data["y_train"], convert)
    test = pairs(data["x_test"], data["y_test"], convert)
    assert load((train, test)).fingerprint == expected
    alone = load(train)
    assert alone.fingerprint["train"] == expected["train"]
    assert alone.x_test.shape == (0, 3, 6, 6) and len(alone.y_test) == 0 and alone.name == "custom"


def test_tensors_and_tensor_datasets(tmp_path: Path) -> None:
    data = colour()
    expected = load(save(tmp_path / "same.npz", **data)).fingerprint
    tensors = {
        key: torch.from_numpy(value).movedim(3, 1) if key[0] == "x" else torch.from_numpy(value)
        for key, value in data.items()
    }
    assert load(tuple(tensors.values())).fingerprint == expected
    floats = TensorDataset(tensors["x_train"] / 255, tensors["y_train"])
    assert load(floats).fingerprint["train"] == expected["train"]


def save_idx(folder: Path, data: Any) -> None:
    """MNIST's own file format."""
    folder.mkdir(parents=True)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = data[f"x_{split}"], data[f"y_{split}"]
        header = np.array([0x803, *images.shape], dtype=">i4").tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = np.array([0x801, len(labels)], dtype=">i4").tobytes()
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.astype(np.uint8).tobytes())


def test_names_are_read_through_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {key: value[..., 0] if key[0] == "x" else value for key, value in colour().items()}
    save_idx(tmp_path / "FashionMNIST" / "raw", {**data, "y_train": np.arange(12) % 10})
    monkeypatch.setenv("CONDENSE_DATA", str(tmp_path))
    arrays = load("fashion-mnist")
    assert np.array_equal(arrays.x_train[:, 0], data["x_train"])
    assert arrays.known is not None and arrays.known.name == "fashion-mnist"
    assert arrays.classes[9] == "Ankle boot"


@pytest.mark.parametrize("name", ["svhn", "cifar10", "cifar100"])
def test_colour_names_take_the_layout_of_torchvision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fake(root: str, download: bool, train: bool | None = None, split: str | None = None) -> SimpleNamespace:
        part = split or ("train" if train else "test")
        calls.append((root, download, part))
        images = np.random.default_rng(len(calls)).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
        labels = np.arange(100) % (100 if name == "cifar100" else 10)
        if name == "svhn":
            return SimpleNamespace(data=np.moveaxis(images, 3, 1), labels=labels)
        return SimpleNamespace(data=images, targets=labels.tolist())

    monkeypatch.setattr(torchvision.datasets, name.upper(), fake)
    arrays = load(name, root="/somewhere", download=True)
    assert calls == [("/somewhere", True, "train"), ("/somewhere", True, "test")]
    assert arrays.name == name and arrays.input_shape == (3, 32, 32)


def test_importing_the_package_does_not_import_torchvision() -> None:
    code = "import sys, condense.data; sys.exit('torchvision' in sys.modules or 'sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Fingerprints


def test_fingerprint_ignores_order_and_nothing_else() -> None:
    data = colour()
    images, labels = np.moveaxis(data["x_train"], 3, 1), data["y_train"]
    reference = fingerprint(images, labels)
    order = np.random.default_rng(1).permutation(len(labels))
    assert fingerprint(images[order], labels[order]) == reference

    pixel = images.copy()
    pixel[5, 1, 2, 3] ^= 1
    twice = np.concatenate([np.arange(12), [0]])
    others = [
        fingerprint(pixel, labels),
        fingerprint(images, labels[order]),
        fingerprint(images[1:], labels[1:]),
        fingerprint(images[twice], labels[twice]),
        fingerprint(images.reshape(12, 3, 4, 9), labels),
        fingerprint(images.astype(np.float32) / 255, labels),
    ]
    assert len({reference, *others}) == 1 + len(others)


def test_fingerprint_is_per_split() -> None:
    data = colour()
    reference = load(tuple(data.values())).fingerprint
    data["x_test"][0] ^= 255
    changed = load(tuple(data.values())).fingerprint
    assert changed["train"] == reference["train"] and changed["test"] != reference["test"]


# The cache of decoded arrays


def gray(data: Split) -> Split:
    return {key: value[..., 0] if key[0] == "x" else value for key, value in data.items()}


def save_as(kind: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """A source of this kind and the options to load it with."""
    match kind:
        case "file":
            return save(folder / "mine.npz", **colour(), classes=["ant", "bee", "cat"]), {}
        case "floats":
            data = colour()
            return save(folder / "mine.npz", **data | {"x_train": data["x_train"] / 256}), {}
        case "folder":
            return save_folder(folder / "pets", colour()), {}
        case _:
            save_idx(folder / "FashionMNIST" / "raw", {**gray(colour()), "y_train": np.arange(12) % 10})
            return "fashion-mnist", {"root": folder}


def same(one: Arrays, other: Arrays) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(Arrays)]
    arrays = [(a, b) for a, b in pairs if isinstance(a, np.ndarray)]
    assert len(arrays) == 4
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in arrays) and all(
        a == b for a, b in pairs if not isinstance(a, np.ndarray)
    )


def is_mapped(array: Any) -> bool:
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("decoded again")

    for place in ("zipfile.ZipFile", "PIL.Image.open", "torchvision.datasets.FashionMNIST"):
        monkeypatch.setattr(place, refuse)


@pytest.mark.parametrize("kind", ["file", "floats", "folder", "torchvision"])
def test_a_later_load_maps_what_the_first_decoded(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, options = save_as(kind, tmp_path)
    reference = load(source, **options)
    first = load(source, **options, cache=tmp_path / "deep" / "cache")
    no_decoding(monkeypatch)
    with pytest.raises(ValueError, match="decoded again"):
        load(source, **options)
    later = load(source, **options, cache=tmp_path / "deep" / "cache")
    assert same(first, reference) and same(later, reference)
    assert is_mapped(first.x_train) and is_mapped(later.x_train) and not is_mapped(reference.x_train)


def test_a_write_into_mapped_arrays_stays_in_the_process(tmp_path: Path) -> None:
    source, _ = save_as("file", tmp_path)
    ours, theirs = (load(source, cache=tmp_path / "cache") for _ in range(2))
    ours.x_train[:] = 0
    assert same(theirs, load(source)) and same(load(source, cache=tmp_path / "cache"), theirs)


def test_what_is_at_hand_is_not_cached(tmp_path: Path) -> None:
    for source in ("digits", tuple(colour().values()), pairs(colour()["x_train"], colour()["y_train"])):
        load(source, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    cache, path = tmp_path / "cache", tmp_path / "mine.npz"
    load(save(path, **colour()), cache=cache)
    before = path.stat()
    time.sleep(0.05)  # clocks of file systems are coarse
    other = load(save(path, **colour(seed=1)), cache=cache)
    assert same(other, load(path)) and path.stat().st_size == before.st_size
    before = path.stat()
    time.sleep(0.05)
    save(path, **colour(seed=2))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert same(load(path, cache=cache), load(path))
    assert len(list((cache / "decoded").iterdir())) == 1


def change_folder(folder: Path, case: str) -> None:
    image = folder / "train" / "b" / "001.png"
    match case:
        case "a new image":
            image.with_name("new.png").write_bytes(image.read_bytes())
        case "one image less":
            image.unlink()
        case "another image":
            image.write_bytes((folder / "test" / "b" / "001.png").read_bytes())
        case "another name":
            (folder / "train" / "b").rename(folder / "train" / "bb")
            (folder / "test" / "b").rename(folder / "test" / "bb")


@pytest.mark.parametrize("case", ["a new image", "one image less", "another image", "another name"])
def test_a_changed_folder_is_read_again(case: str, tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "pets", colour())
    before = load(folder, cache=tmp_path / "cache")
    time.sleep(0.05)
    change_folder(folder, case)
    after = load(folder, cache=tmp_path / "cache")
    assert same(after, load(folder)) and not same(after, before)


def test_names_come_from_the_path_as_it_was_given(tmp_path: Path) -> None:
    path = save(tmp_path / "mine.npz", **colour())
    (tmp_path / "yours.npz").symlink_to(path)
    assert load(path, cache=tmp_path / "cache").name == "mine"
    assert load(tmp_path / "yours.npz", cache=tmp_path / "cache").name == "yours"


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "deleted": lambda content: None,
    "empty": lambda content: b"",
    "cut short": lambda content: content[:-1],
    "a flipped byte": lambda content: flipped(content, len(content) * 3 // 4),
    "something else": lambda content: b"[]",
}


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("name", ["entry.json", "facts.json", "x_train.npy", "y_test.npy"])
def test_damage_is_healed(name: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    source, _ = save_as("file", tmp_path)
    reference = load(source, cache=cache)
    (file,) = cache.rglob(name)
    content = DAMAGE[case](file.read_bytes())
    time.sleep(0.02)
    if content is None:
        file.unlink()
    else:
        damaged = tmp_path / "damaged"  # not in place: `reference` maps the old bytes
        damaged.write_bytes(content)
        damaged.replace(file)
    assert same(load(source, cache=cache), reference)
    no_decoding(monkeypatch)
    assert same(load(source, cache=cache), reference)
    assert not list((cache / "decoded").glob(".*"))


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = save_as("file", tmp_path)
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="nothing more is cached"):
        assert same(load(source, cache=tmp_path / "file"), load(source))

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("numpy.save", refuse)
    with pytest.warns(UserWarning, match="no space left"):
        assert same(load(source, cache=tmp_path / "cache"), load(source))
    assert not list((tmp_path / "cache" / "decoded").iterdir())


def test_processes_that_load_at_once_agree(tmp_path: Path) -> None:
    source = save(tmp_path / "mine.npz", **colour(n=3000, size=32))
    code = (
        "import sys; from pathlib import Path; from condense.data import load, fingerprint\n"
        "for _ in range(5):\n"
        "    a = load(sys.argv[1], cache=Path(sys.argv[2]))\n"
        "    assert fingerprint(a.x_train, a.y_train) == a.fingerprint['train']\n"
        "print(a.fingerprint)"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(source), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs == [f"{load(source).fingerprint}\n"] * 2
    (entry,) = (tmp_path / "cache" / "decoded").iterdir()
    assert len(list(entry.iterdir())) == 6


# Bad input


def with_nan(images: np.ndarray) -> np.ndarray:
    images = images / 255
    images[3, 0, 0, 0] = np.nan
    return images


BAD_ARRAYS: dict[str, tuple[dict[str, Callable[[Split], Any]], str]] = {
    "a flat vector": ({"x_train": lambda d: d["x_train"].reshape(12, -1)}, "x_train of .* has shape"),
    "two channels": ({"x_train": lambda d: d["x_train"][..., :2]}, "neither its second nor its last axis"),
    "no images": ({"x_train": lambda d: d["x_train"][:0], "y_train": lambda d: d["y_train"][:0]}, "is empty"),
    "no test images": (
        {"x_test": lambda d: d["x_test"][:0], "y_test": lambda d: d["y_test"][:0]},
        "is empty",
    ),
    "integers": (
        {"x_train": lambda d: d["x_train"].astype(int)},
        "is int64 with values from 0 to 255: pixels are uint8",
    ),
    "strings": ({"x_train": lambda d: d["x_train"].astype(str)}, "pixels are uint8"),
    "a NaN pixel": ({"x_train": lambda d: with_nan(d["x_train"])}, "NaN or infinite"),
    "a NaN test pixel": ({"x_test": lambda d: with_nan(d["x_test"])}, "x_test of .* NaN or infinite"),
    "floats to 255": ({"x_train": lambda d: d["x_train"].astype(float)}, r"must lie in \[0, 1\]"),
    "negative floats": ({"x_train": lambda d: d["x_train"] / 255 - 0.5}, r"must lie in \[0, 1\]"),
    "another test shape": ({"x_test": lambda d: d["x_test"][:, 1:]}, "they must agree"),
    "too few labels": ({"y_train": lambda d: d["y_train"][1:]}, "there are 12 images"),
    "one-hot labels": ({"y_train": lambda d: np.eye(3, dtype=int)[d["y_train"]]}, "there are 12 images"),
    "float labels": ({"y_train": lambda d: d["y_train"] + 0.5}, "labels must be integers"),
    "a negative label": ({"y_train": lambda d: d["y_train"] - 1}, "from -1 to 1"),
    "labels from one": ({"y_train": lambda d: d["y_train"] + 1}, "no image of class 0"),
    "a hole in the labels": ({"y_train": lambda d: d["y_train"] * 2}, "no image of class 1"),
    "a test label too many": ({"y_test": lambda d: d["y_test"] + 1}, "y_test of .* from 1 to 3"),
    "an empty named class": ({"classes": lambda d: ["a", "b", "c", "d"]}, "no image of class 3"),
    "too few class names": ({"classes": lambda d: ["a", "b"]}, "y_train of .* from 0 to 2"),
    "one class": ({key: lambda d, key=key: d[key] * 0 for key in ("y_train", "y_test")}, "has one class"),  # type: ignore[misc]
    "Python objects": (
        {"x_train": lambda d: np.array([{}] * 12)},
        "cannot read .*bad.npz: x_train.npy holds Python objects",
    ),
}


def fails(source: Any, message: str, **options: Any) -> None:
    with pytest.raises(ValueError) as caught:
        load(source, **options)
    text = str(caught.value)
    assert re.search(message, text), text
    assert "\n" not in text and ": " in text and "; " in text, text


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    changes, message = BAD_ARRAYS[case]
    data = colour()
    fails(save(tmp_path / "bad.npz", **data | {key: change(data) for key, change in changes.items()}), message)


def test_missing_keys_are_named(tmp_path: Path) -> None:
    data = colour()
    del data["y_train"], data["x_test"]
    fails(save(tmp_path / "bad.npz", **data), "has no y_train, x_test")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    content = save(tmp_path / "good.npz", **colour()).read_bytes()
    bad = tmp_path / "bad.npz"
    for length in (0, 1, 10, 500, len(content) - 1):
        bad.write_bytes(content[:length])
        fails(bad, "cannot read .*bad.npz")
    bad.write_bytes(b"no zip file at all")
    fails(bad, "cannot read .*bad.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    fails(tmp_path / "array.npy", "cannot read .*array.npy")


def test_a_flipped_byte_is_refused_or_harmless(tmp_path: Path) -> None:
    content = save(tmp_path / "good.npz", **colour()).read_bytes()
    reference = load(tmp_path / "good.npz").fingerprint
    bad = tmp_path / "bad.npz"
    refused = 0
    for position in range(0, len(content), 23):
        bad.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        try:
            assert load(bad).fingerprint == reference
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > len(content) / 23 / 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("fashionmnist", "did you mean 'fashion-mnist'"),
        ("nowhere/data.npz", "no such file or folder"),
        (Path("nowhere"), "no such file or folder"),
        (3, r"cannot read a data set from \(int\)"),
        (torch.zeros(2, 1, 3, 3), r"cannot read a data set from \(Tensor\)"),
        ((torch.zeros(2, 1, 3, 3),) * 3, r"\(Tensor, Tensor, Tensor\)"),
        ((Pairs(), torch.zeros(2)), r"\(Pairs, Tensor\)"),
        (Pairs(), "Pairs is empty"),
        (Stream(), "Stream has no length"),
        (Pairs(torch.zeros(1, 3, 3)), "item 0 of Pairs is a Tensor: items are"),
        (Pairs((torch.zeros(1, 3, 3), 0), (torch.zeros(1, 4, 3), 1)), "image 1 of Pairs has shape"),
        (Pairs((torch.zeros(1, 3, 3), [0, 1])), "label 0 of Pairs has shape"),
        (Pairs((torch.zeros(1, 3, 3), 0), (torch.zeros(1, 3, 3), 0.5)), "labels must be integers"),
    ],
)
def test_bad_sources_are_refused_in_one_line(source: Any, message: str) -> None:
    fails(source, message)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "svhn", "cifar10", "cifar100"])
def test_a_set_that_is_not_there_names_the_option_that_brings_it(name: str, tmp_path: Path) -> None:
    fails(name, f"cannot read {name} from .*; add download=True, or give dataset='PATH.npz'", root=tmp_path)


def test_a_damaged_torchvision_file_is_refused(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    save_idx(raw, {key: value[..., 0] if key[0] == "x" else value for key, value in colour().items()})
    images = raw / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-5])
    fails("mnist", "cannot read mnist from", root=tmp_path)


# What mends a fault is said, and does mend it


def deep(images: Any) -> Any:
    """The same pictures with 12 bits a value, integers."""
    return images.astype(np.int64) * 4095 // 255


PIXELS: dict[str, tuple[Callable[[Any], Any], str, Callable[[Any], Any]]] = {
    "8-bit integers": (lambda x: x.astype(np.int64), "x / 255", lambda x: x),
    "8-bit floats": (lambda x: x.astype(np.float32), "x / 255", lambda x: x),
    "12-bit integers": (deep, "x / 4095", lambda x: (deep(x) / 4095).astype(np.float32)),
    "12-bit floats": (lambda x: deep(x) * 1.0, "x / 4095", lambda x: (deep(x) / 4095).astype(np.float32)),
    "black and white": (lambda x: x > 99, "x * 1.0", lambda x: (x > 99) * np.uint8(255)),
    "0 and 1": (lambda x: (x > 99).astype(np.int32), "x * 1.0", lambda x: (x > 99) * np.uint8(255)),
    "rounding": (lambda x: x / 255 * 1.00001, "x.clip(0, 1)", lambda x: (x / 255 * 1.00001).clip(0, 1)),
}


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("case", PIXELS)
def test_the_hint_about_pixels_gives_the_same_pictures(case: str, tensors: bool, tmp_path: Path) -> None:
    spoil, code, expected = PIXELS[case]
    data = colour()
    data["x_train"][0, 0, 0] = (0, 128, 255)
    bad: dict[str, Any] = data | {"x_train": spoil(data["x_train"])}
    if tensors:
        bad = {key: torch.from_numpy(value) for key, value in bad.items()}
        bad |= {key: bad[key].movedim(3, 1) for key in ("x_train", "x_test")}
    source = (lambda: tuple(bad.values())) if tensors else (lambda: save(tmp_path / "bad.npz", **bad))
    fails(source(), re.escape(code))
    bad["x_train"] = eval(code, {"x": bad["x_train"]})
    found, right = load(source()).x_train, np.moveaxis(expected(data["x_train"]), 3, 1)
    assert np.array_equal(found, right.astype(found.dtype)) or np.allclose(found, right, atol=1e-7)


JOINT = (
    "classes, y = np.unique(np.concatenate([y_train, y_test]), return_inverse=True)",
    "y_train, y_test = y[:len(y_train)], y[len(y_train):]",
)
LABELS: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "names": (lambda y: np.array(["ant", "bee", "cat"])[y], JOINT),
    "dates": (lambda y: np.array(["2001", "2002", "2003"], "M8[Y]")[y], JOINT),
    "from one": (lambda y: y + 1, JOINT),
    "below zero": (lambda y: y - 1, JOINT),
    "with holes": (lambda y: y * 7, JOINT),
    "whole floats": (lambda y: y * 1.0, ("y.astype('int64')",)),
    "one-hot": (lambda y: np.eye(3)[y], ("y.argmax(1)",)),
    "a column": (lambda y: y[:, None], ("y.reshape(-1)",)),
}


@pytest.mark.parametrize("case", LABELS)
def test_the_hint_about_labels_gives_the_same_classes(case: str, tmp_path: Path) -> None:
    spoil, hints = LABELS[case]
    data = colour()
    bad = data | {key: spoil(data[key]) for key in ("y_train", "y_test")}
    path = save(tmp_path / "bad.npz", **bad)
    for code in hints:
        fails(path, re.escape(code))
    if hints is JOINT:
        exec("\n".join(hints), {"np": np}, bad)
        bad.pop("y")
    else:
        bad |= {key: eval(hints[0], {"y": bad[key]}) for key in ("y_train", "y_test")}
    arrays = load(save(path, **bad))
    assert arrays.y_train.tolist() == data["y_train"].tolist() and arrays.y_test.tolist() == data["y_test"].tolist()
    assert case != "names" or arrays.classes == ("ant", "bee", "cat")


def test_values_that_are_no_classes_get_no_conversion(tmp_path: Path) -> None:
    data = colour()
    path = tmp_path / "bad.npz"
    fails(save(path, **data | {"y_train": np.linspace(0, 9, 12)}), "regression targets are not supported")
    fails(save(path, **data | {"y_train": np.full(12, np.nan)}), "remove the images without a label")
    fails(save(path, **data | {"y_train": np.full(12, 2**63, np.uint64)}), re.escape(JOINT[0]))
    fails(save(path, **data | {"x_train": np.zeros((12, 6, 6), "M8[s]")}), "give numbers")
    train = (data["x_train"], data["y_train"] * 2)
    fails(train, "classes, y_train = np.unique")
    fails(save(path, **data | {"y_train": data["y_train"] * 2, "y_test": data["y_test"]}), "the test part has some")


def test_the_hint_about_16_bits_gives_the_same_picture(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "pets", colour(), "L")
    expected = load(folder).x_train
    file = folder / "train" / "a" / "000.png"
    deep = Image.fromarray(np.asarray(Image.open(file)).astype(np.uint16) * 257)
    deep.save(file)
    code = "Image.fromarray((np.asarray(image) / TOP * 255).round().astype('uint8'))"
    fails(folder, re.escape(code))
    fails(pairs([deep, deep], [0, 1]), re.escape(code))
    eval(code, {"image": deep, "TOP": 65535, "Image": Image, "np": np}).save(file)
    assert np.array_equal(load(folder).x_train, expected)


# Pictures of every kind

GRAY = np.arange(36, dtype=np.uint8).reshape(6, 6) * 7
RGB = np.stack([GRAY, 255 - GRAY, GRAY // 2], axis=-1)


def picture(mode: str) -> tuple[Image.Image, Any]:
    """A picture in this mode, and what it looks like."""
    black_and_white = (GRAY > 99) * np.uint8(255)
    alpha = Image.fromarray(255 - GRAY)
    match mode:
        case "1":
            return Image.fromarray(black_and_white).convert("1"), black_and_white
        case "LA":
            return Image.merge("LA", (Image.fromarray(GRAY), alpha)), GRAY
        case "P":
            image = Image.fromarray(GRAY // 7, "L")
            image.putpalette([value for colour in RGB.reshape(-1, 3) for value in colour.tolist()])
            return image, RGB
        case "RGBA":
            return Image.merge("RGBA", (*Image.fromarray(RGB).split(), alpha)), RGB
        case "CMYK":
            cmyk = Image.fromarray(RGB).convert("CMYK")
            return cmyk, np.asarray(cmyk.convert("RGB"))
        case _:
            return Image.fromarray(GRAY if mode == "L" else RGB), GRAY if mode == "L" else RGB


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_pictures_of_every_mode_look_the_same(mode: str, tmp_path: Path) -> None:
    image, expected = picture(mode)
    for label in ("train/a", "train/b", "test/a"):
        (tmp_path / label).mkdir(parents=True)
        image.save(tmp_path / label / f"1.{'tif' if mode == 'CMYK' else 'png'}")
    shown = np.moveaxis(np.atleast_3d(expected), 2, 0)
    assert np.array_equal(load(tmp_path).x_train[1], shown)
    assert np.array_equal(load(pairs([image, image], [0, 1])).x_train[1], shown)


def test_gray_pictures_of_a_dataset_stand_beside_coloured_ones() -> None:
    arrays = load(pairs([Image.fromarray(GRAY), Image.fromarray(RGB)], [0, 1]))
    assert np.array_equal(arrays.x_train[0], np.stack([GRAY] * 3)) and arrays.input_shape == (3, 6, 6)


def test_pictures_are_turned_the_way_their_exif_says(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "pets", colour())
    expected, file = load(folder, cache=tmp_path / "cache"), folder / "train" / "a" / "000.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    Image.open(file).transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)
    assert np.array_equal(load(folder, cache=tmp_path / "cache").x_train, expected.x_train)
    assert load(pairs([Image.open(file)] * 2, [0, 1])).x_train[0].tolist() == expected.x_train[0].tolist()


@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_a_tiff_is_turned_once(turn: int, tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "pets", colour())
    file = folder / "train" / "a" / "000.png"
    shown = Image.open(file).copy()
    kind = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    file.unlink()
    stored = shown if turn == 1 else shown.transpose(kind[turn])
    stored.save(file.with_suffix(".tif"), exif={0x0112: turn})
    assert np.array_equal(load(folder).x_train[0].transpose(1, 2, 0), np.asarray(shown))


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_turned_as_pillow_turns_it(orientation: int) -> None:
    image = Image.fromarray(RGB)
    image.getexif()[0x0112] = orientation
    assert np.array_equal(pixels_of(image), np.asarray(ImageOps.exif_transpose(image)))


def test_odd_tags_of_a_picture_do_not_matter(tmp_path: Path) -> None:
    """The quarter turn, and a resolution that is text."""
    tags = struct.pack("<HHHI4sHHI4sI", 2, 0x0112, 3, 1, b"\6\0\0\0", 0x011A, 2, 4, b"72/1", 0)
    upright, turned = Image.fromarray(GRAY), tmp_path / "turned.jpg"
    upright.save(turned, quality=100, exif=b"Exif\0\0II*\0\10\0\0\0" + tags)
    read = load(pairs([Image.open(turned), Image.open(turned)], [0, 1])).x_train[0, 0]
    assert np.abs(read.astype(int) - np.rot90(GRAY, -1)).max() <= 2


def test_what_an_earlier_version_decoded_is_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It did not turn pictures."""
    folder = save_folder(tmp_path / "pets", colour())
    with monkeypatch.context() as patch:
        patch.setattr("condense.data.store.FORMAT", 1)
        load(folder, cache=tmp_path / "cache")
    no_decoding(monkeypatch)
    fails(folder, "decoded again", cache=tmp_path / "cache")


# Data sets of Python


def image_folder(root: Path) -> Any:
    return torchvision.datasets.ImageFolder(str(root))


def test_the_parts_of_an_image_folder_are_matched_by_names_of_classes(tmp_path: Path) -> None:
    """Without a test folder for the first class torchvision numbers the others from 0."""
    folder = save_folder(tmp_path / "pets", colour())
    for file in (folder / "test" / "a").iterdir():
        file.unlink()
    (folder / "test" / "a").rmdir()
    expected = load(folder)
    train, test = image_folder(folder / "train"), image_folder(folder / "test")
    for part in (test, Subset(test, range(len(test)))):
        arrays = load((train, part))
        assert arrays.y_test.tolist() == expected.y_test.tolist() and set(expected.y_test) == {1, 2}
        assert arrays.classes == ("a", "b", "c") and arrays.fingerprint == expected.fingerprint
    (folder / "test" / "b").rename(folder / "test" / "d")
    fails((train, image_folder(folder / "test")), "the test part has the class 'd'")
    Image.new("RGB", (6, 7)).save(folder / "train" / "c" / "wide.png")
    fails(image_folder(folder / "train"), "all must have the same shape; .* condense.prepare.'.*train', 'train.npz', s")


def test_names_of_classes_come_from_the_dataset() -> None:
    images = [Image.fromarray(image) for image in colour()["x_train"]]
    dataset = pairs(images, [index % 3 for index in range(12)])
    dataset.classes = ["ant", "bee", "cat"]  # type: ignore[attr-defined]
    assert load(dataset).classes == load(Subset(dataset, range(12))).classes == ("ant", "bee", "cat")
    assert load(Subset(dataset, [0, 1, 3, 4])).classes == ("ant", "bee")
    dataset.classes = ["ant", "bee"]  # type: ignore[attr-defined]
    fails(dataset, "the training part has the label 2 and 2 names of classes")


class Drawn(Pairs):
    """Read again, the last item is another."""

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return (image + torch.rand(()) / 9 if index == len(self) - 1 else image), label


class Counted(Pairs):
    reads = 0

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"image": torch.zeros(1, 3, 3), "label": 0}, "item 0 of Counted is a dict with the keys image, label"),
        ((torch.zeros(1, 3, 3), 0, "name"), "item 0 of Counted is a tuple of 3"),
        (("image", "label"), "image 0 of Counted is of type str"),
        ((torch.zeros(1, 3, 3), "cat"), "label 0 of Counted is 'cat': labels must be integers"),
        ((torch.zeros(1, 3, 3), torch.zeros(3)), "label 0 of Counted has shape"),
        ((torch.zeros(1, 3, 3).to_sparse(), 0), "is a sparse tensor"),
    ],
)
def test_items_that_are_no_pairs_are_refused_at_the_first(item: Any, message: str) -> None:
    dataset = Counted(*[item] * 20_000)
    fails(dataset, message)
    assert dataset.reads == 1


def test_random_transforms_are_noticed() -> None:
    fails(Drawn(*[(torch.zeros(1, 3, 3), i % 2) for i in range(40)]), "item 39 of Drawn changes when it is read again")


def test_many_items_are_not_listed() -> None:
    fails([{"image": 0}] * 20_000, r"from \(dict, dict, dict, dict, ...\)")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.to_sparse(), r"give x.to_dense\(\)"),
        (lambda x: torch.quantize_per_tensor(x, 1 / 255, 0, torch.quint8), r"give x.dequantize\(\)"),
        (lambda x: x.to(torch.complex64), "is complex64"),
        (lambda x: x.to("meta"), "meta tensor"),
        (lambda x: x.reshape([1] * 70 + [-1]), "is not an array"),
        (lambda x: np.ma.masked_array(x.numpy(), x.numpy() > 0.5), "masked"),
    ],
)
def test_unusual_tensors_are_refused(spoil: Callable[[Any], Any], message: str) -> None:
    fails((spoil(torch.rand(4, 1, 3, 3)), torch.arange(4)), message)


# Odd files, and files that promise more than they hold


def promising(path: Path, shape: tuple[int, ...], dtype: str = "|u1", num_bytes: int = 0) -> Path:
    """An .npz whose x_train declares this shape."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, array in colour().items():
            content = io.BytesIO()
            np.save(content, array)
            if name == "x_train":
                content = io.BytesIO()
                header = {"shape": shape, "descr": dtype, "fortran_order": False}
                np.lib.format.write_array_header_1_0(content, header)
                content.write(bytes(num_bytes))
            file.writestr(f"{name}.npy", content.getvalue())
    return path


def test_promises_are_compared_with_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bad.npz"
    for shape, dtype in (((10**12, 8, 8), "|u1"), ((10**12,), "<U0"), ((-1, 8), "|u1"), ((2**70,), "<f4")):
        fails(promising(path, shape, dtype), r"x_train.npy declares shape \(.*which does not fit its size")
    monkeypatch.setattr("condense.files._HARMLESS", 1 << 20)
    fails(promising(path, (2**15, 8, 8), num_bytes=2**21), "takes 2 MiB in memory and 0.0 MiB on disk")
    data = colour() | {"x_train": np.zeros((12, 300, 300, 3), np.uint8), "x_test": np.zeros((6, 300, 300, 3), np.uint8)}
    np.savez_compressed(path, **data)
    fails(path, "save it with np.savez if it is right")
    assert load(save(path, **data)).input_shape == (3, 300, 300)


def test_a_picture_that_declares_too_much_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_folder(tmp_path / "pets", colour())
    file = folder / "train" / "a" / "000.png"
    content = file.read_bytes()
    for width, height in ((50_000, 50_000), (12_000, 9_000)):
        size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        header = b"IHDR" + size + content[24:29]
        file.write_bytes(content[:12] + header + zipfile.crc32(header).to_bytes(4, "big") + content[33:])
        fails(folder, "cannot read .*000.png: .*pixels")
    monkeypatch.setattr("condense.files._HARMLESS", 1 << 20)
    Image.new("RGB", (2000, 2000)).save(file)
    fails(folder, "000.png: this picture with those before it takes 11 MiB in memory")


@pytest.mark.parametrize("place", ["data.npz", "pets/train/a/000.png", "pets/train/a"])
def test_a_pipe_is_refused_and_not_waited_for(place: str, tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "pets", colour())
    pipe = tmp_path / place
    if pipe.is_dir():
        pipe = pipe / "loop.png"
        pipe.symlink_to(pipe)
    else:
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
    fails(pipe if place == "data.npz" else folder, "it is neither a file nor a folder|it is not a regular file")


def test_postscript_is_not_run(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "pets", colour())
    Image.fromarray(RGB).save(folder / "train" / "a" / "000.eps")
    fails(folder, "000.eps: cannot identify")


@pytest.mark.parametrize("path", ["/dev/null", "a" * 5000, "a\0b", "~nobody-of-this-name/x"])
def test_odd_paths_are_refused(path: str) -> None:
    fails(path, "cannot expand .*: the home folder is not known" if path.startswith("~") else "no data set")


@pytest.mark.parametrize("kind", ["file", "folder", "link to one"])
def test_a_path_that_is_not_utf_8_is_refused(kind: str, tmp_path: Path) -> None:
    """The set would be named after it, and could not be read again."""
    odd = tmp_path / os.fsdecode(b"\xe4")
    try:
        odd.mkdir()
    except OSError:
        pytest.skip("names of files are UTF-8 here")
    if kind == "file":
        np.savez(odd / "a.npz", **colour())
        fails(odd / "a.npz", "its path is not valid UTF-8; rename it")
    else:
        folder = save_folder(odd, colour())
        (tmp_path / "link").symlink_to(folder)
        fails(folder if kind == "folder" else tmp_path / "link", "its path is not valid UTF-8; rename it")


def test_names_of_pictures_may_be_in_any_encoding(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "pets", colour())
    expected = load(folder).fingerprint
    try:
        (folder / "train" / "a" / "000.png").rename(folder / "train" / "a" / os.fsdecode(b"\xe4.png"))
    except OSError:
        pytest.skip("names of files are UTF-8 here")
    for _ in range(2):
        assert load(folder, cache=tmp_path / "cache").fingerprint == expected


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([f"c{i}" for i in range(10_000)], "has 10000 names for 12 training images"),
        (["a", "b", "b"], "has two classes with the name b"),
        (["a", "b\n", "c"], r"class name 'b\\n'"),
        (["a", "b" * 10_000, "c"], "has at most 200 bytes"),
        ([1j, 2j, 3j], "is complex128 of shape"),
        ([["a", "b", "c"]], r"shape \(1, 3\)"),
        ([b"a", b"\xff", b"c"], "that are not ASCII"),
    ],
)
def test_names_of_classes_are_checked(classes: Any, message: str, tmp_path: Path) -> None:
    fails(save(tmp_path / "bad.npz", **colour(), classes=np.array(classes)), message)


def test_the_number_of_classes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("condense.data.datasets._MOST_CLASSES", 5)
    fails((np.zeros((6, 1, 1), np.uint8), np.arange(6)), "has 6 classes: at most 5 are supported")


@pytest.mark.parametrize("kind", ["npz", "png", "jpeg"])
def test_a_damaged_file_loads_or_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    source = save(tmp_path / "a.npz", **colour(6, 4)) if kind == "npz" else save_folder(tmp_path / "pets", colour(6, 4))
    file = source if kind == "npz" else source / "train" / "a" / "000.png"
    if kind == "jpeg":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.open(file).save(file, "JPEG", exif=exif)
    refused, content = 0, file.read_bytes()
    for i in range(200):
        file.write_bytes(mutate_bytes(content, Random(i)))
        try:
            with warnings.catch_warnings(action="error"):
                load(source)
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 900, error
    assert 20 < refused


def break_folder(folder: Path, case: str) -> None:
    image = folder / "train" / "b" / "001.png"
    match case:
        case "another size":
            Image.new("RGB", (6, 7)).save(image)
        case "not an image":
            image.write_text("hello")
        case "truncated":
            image.write_bytes(image.read_bytes()[:60])
        case "16 bits":
            Image.fromarray(np.zeros((6, 6), np.uint16)).save(image)
        case "a class in test only":
            (folder / "test" / "d").mkdir()
        case "a file among the classes":
            (folder / "train" / "notes.txt").touch()
        case "an empty class":
            (folder / "train" / "bb").mkdir()
        case "no test images":
            for file in (folder / "test").glob("*/*"):
                file.unlink()
        case "no test folder":
            (folder / "test").rename(folder / "tset")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("another size", "001.png is 6x7, the images before it are 6x6"),
        ("not an image", "cannot read .*001.png"),
        ("truncated", "cannot read .*001.png"),
        ("16 bits", "cannot read .*001.png: its pixels have more than 8 bits"),
        ("a class in test only", "/d is not a class: .*; move it away, or add training images of it"),
        ("a file among the classes", "notes.txt is not a class"),
        ("an empty class", "bb has no image: each class"),
        ("no test images", "test has no images: it needs a folder"),
        ("no test folder", "test is not a folder"),
    ],
)
def test_bad_folders_are_refused_in_one_line(case: str, message: str, tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "pets", colour())
    break_folder(folder, case)
    fails(folder, message)


def test_what_was_refused_is_not_cached_and_what_breaks_later_is_refused(tmp_path: Path) -> None:
    cache, folder = tmp_path / "cache", save_folder(tmp_path / "pets", colour())
    load(folder, cache=cache)
    time.sleep(0.05)
    break_folder(folder, "an empty class")
    for _ in range(2):
        fails(folder, "bb has no image: each class", cache=cache)
    bad = save(tmp_path / "bad.npz", **colour() | {"y_train": np.zeros(12, np.int64)})
    for _ in range(2):
        fails(bad, "has one class", cache=cache)
    assert len(list((cache / "decoded").iterdir())) == 1
