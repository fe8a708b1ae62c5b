"""Data sets of Hugging Face: the library's own objects, and a stand-in where it is not installed."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import condense
from condense import cli
from condense.data import load
from condense.data.hugging_face import list_rows

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 6, 6, 3), dtype=np.uint8)


class StandIn:
    """The interface of ``datasets.Dataset`` that is used."""

    def __init__(self, columns: dict[str, list[Any]], features: dict[str, Any]) -> None:
        self.columns, self.features = columns, features

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def cast_column(self, column: str, feature: Any) -> Any:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int | str) -> Any:
        if isinstance(index, str):
            return self.columns[index]
        return {name: values[index] for name, values in self.columns.items()}


def feature(kind: str, **fields: Any) -> Any:
    return type(kind, (), fields)()


def standing_in(first: int = 0, last: int = 12, names: tuple[str, ...] = ("ant", "bee"), **more: Any) -> StandIn:
    columns = {
        "picture": [Image.fromarray(image) for image in IMAGES[first:last]],
        "kind": [index % 2 for index in range(first, last)],
        "note": ["x"] * (last - first),
    }
    features = {"picture": feature("Image"), "kind": feature("ClassLabel", names=list(names)), "note": feature("Value")}
    return StandIn(columns | {name: columns["kind"] for name in more}, features | more)


class Splits(dict[str, Any]):
    """The interface of ``datasets.DatasetDict`` that is used."""

    column_names: Any = ()
    cast_column = StandIn.cast_column


def refused(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load(source)
    assert "\n" not in str(error.value)


def test_images_labels_and_names_come_from_the_features() -> None:
    arrays = load(standing_in())
    assert np.array_equal(arrays.x_train, IMAGES.transpose(0, 3, 1, 2)) and not len(arrays.x_test)
    assert arrays.y_train.tolist() == [0, 1] * 6 and arrays.classes == ("ant", "bee")
    pair = load((standing_in(0, 8), standing_in(8)))
    splits = load(Splits(train=standing_in(0, 8), validation=standing_in(0, 2), test=standing_in(8), extra=None))
    assert pair.fingerprint == splits.fingerprint and len(pair.x_test) == 4
    assert len(load(Splits(train=standing_in(0, 8), validation=standing_in(6, 8))).x_test) == 2


def test_what_cannot_be_told_is_refused_in_one_line() -> None:
    refused(Splits(test=standing_in(), extra=None), "has the splits test, extra and no train")
    refused((standing_in(), standing_in(names=("ant", "cat"))), "the test part has the class 'cat'")
    refused(
        standing_in(fine=feature("ClassLabel", names=["a"])), "has 2 columns of type ClassLabel: .*fine .ClassLabel"
    )
    refused(standing_in(other=feature("Image")), "has 2 columns of type Image")
    text = standing_in()
    text.features = {"picture": feature("Image"), "label": feature("Value", dtype="string")}
    refused(text, r"the column 'label' is text: .* d.class_encode_column\('label'\)")
    text.features = {"picture": feature("Image")}
    refused(text, "has no column of type ClassLabel")
    odd = standing_in()
    odd.columns["picture"][3] = Image.new("RGB", (7, 6))
    refused(odd, r"all must have the same shape; prepare them with condense.prepare\(d, ")


@pytest.mark.parametrize("label", [-1, None, 2])
def test_photos_without_labels_are_refused_before_they_are_decoded(label: int | None) -> None:
    """Public test splits have the label -1."""
    test = standing_in(8)
    test.columns[next(name for name in test.columns if name != "picture")][1] = label
    with pytest.raises(ValueError, match=rf"^row 1 of the test split has the label {label}, but classes are 0..1: "):
        list_rows(Splits(train=standing_in(0, 8), test=test))


def test_a_name_needs_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("hf:owner/name", "hf:owner/name is read by the library datasets, .* pip install datasets")

    def no_internet(name: str) -> Any:
        raise ConnectionError(f"{name} {library.config.HF_HUB_OFFLINE} {hub.constants.HF_HUB_OFFLINE}")

    hub = SimpleNamespace(constants=SimpleNamespace(HF_HUB_OFFLINE=False))
    library = SimpleNamespace(config=SimpleNamespace(HF_HUB_OFFLINE=False), load_dataset=no_internet)
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    refused("hf:owner/name", "cannot read hf:owner/name: owner/name True True; add download=True")
    assert library.config.HF_HUB_OFFLINE is hub.constants.HF_HUB_OFFLINE is False
    with pytest.raises(ValueError, match="owner/name False False; check the name and the internet connection"):
        load("hf:owner/name", download=True)
    library.load_dataset = lambda name: standing_in()
    assert load("hf:owner/name").name == "name"


# The library itself


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two classes with a training and a validation part."""
    root = tmp_path_factory.mktemp("hugging") / "photos"
    for index, image in enumerate(IMAGES):
        path = root / ("train" if index < 8 else "validation") / ("ant", "bee")[index % 2] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return root


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    return datasets


@pytest.mark.filterwarnings("ignore")
def test_without_download_the_internet_is_not_asked(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    for settings in (library.config, constants):
        monkeypatch.setattr(settings, "HF_HUB_OFFLINE", False)
    asked = []

    def connect(self: socket.socket, address: Any) -> None:
        asked.append(address)
        raise OSError("no internet")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: connect(None, address))  # type: ignore[arg-type]
    start = time.monotonic()
    refused("hf:owner/name", "cannot read hf:owner/name: .*; add download=True")
    assert not asked and time.monotonic() - start < 5
    assert not library.config.HF_HUB_OFFLINE and not constants.HF_HUB_OFFLINE


@pytest.mark.filterwarnings("ignore")
def test_objects_of_the_library_and_local_names_are_read(library: Any, folder: Path, tmp_path: Path) -> None:
    splits = library.load_dataset("imagefolder", data_dir=str(folder))
    arrays = load(splits)
    assert arrays.classes == ("ant", "bee") and (len(arrays.x_train), len(arrays.x_test)) == (8, 4)
    assert {image.tobytes() for image in arrays.x_train.transpose(0, 2, 3, 1)} == {i.tobytes() for i in IMAGES[:8]}
    assert load(f"hf:{folder}").fingerprint == load((splits["train"], splits["validation"])).fingerprint
    assert load(f"hf:{folder}").fingerprint == arrays.fingerprint
    run = condense.distill("random", dataset=splits, ipc=1, network="mlp", out=tmp_path / "run", device="cpu")
    assert len(run) == 2

    draw = np.random.default_rng(0)

    def flipped(rows: dict[str, Any]) -> dict[str, Any]:
        return rows | {"image": [Image.fromarray(draw.integers(0, 256, (6, 6), dtype=np.uint8)) for _ in rows["image"]]}

    refused(splits["train"].with_transform(flipped), "item 0 of Rows changes when it is read again")
    refused(library.load_dataset("imagefolder", data_dir=str(folder), streaming=True), "is streamed")


@pytest.mark.filterwarnings("ignore")
def test_stored_images_are_prepared(library: Any, folder: Path, tmp_path: Path, capsys: Any) -> None:
    Image.fromarray(IMAGES[0, :3]).save(folder / "train" / "ant" / "wide.png")
    splits = library.load_dataset("imagefolder", data_dir=str(folder))
    refused(splits, r"prepare them with condense.prepare")
    done = condense.prepare(splits, tmp_path / "a.npz", size=4)
    assert (done.num_train, done.num_test, done.classes) == (9, 4, ("ant", "bee"))
    cli.main(["prepare", f"hf:{folder}", str(tmp_path / "b.npz"), "--size", "4"])
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    by_folder = condense.prepare(folder, tmp_path / "c.npz", size=4)
    assert load(by_folder.path).fingerprint == load(done.path).fingerprint
    with pytest.raises(ValueError, match="has a transform"):
        condense.prepare(splits["train"].with_transform(lambda rows: rows), tmp_path / "d.npz", size=4)
