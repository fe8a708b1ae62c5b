"""What others publish comes in, and what goes out is read by the libraries it is meant for."""

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from condense import api, cli
from condense.data.datasets import load as load_data
from condense.data.transform import Transform
from condense.exchange import FORMATS, is_foreign, read
from condense.synthetic import Factor, Logits, SyntheticSet, load
from tests.reference import published

N, C = 20, 10
DIGITS = load_data("digits")


@pytest.fixture(scope="module")
def real() -> tuple[Tensor, Tensor]:
    """Two digits a class, in [0, 1]."""
    rows = np.concatenate([np.flatnonzero(DIGITS.y_train == c)[:2] for c in range(C)])
    return torch.from_numpy(DIGITS.x_train[rows]), torch.from_numpy(DIGITS.y_train[rows])


@pytest.fixture(scope="module")
def channel() -> Transform:
    return api.plain_task(DIGITS, "mlp", "channel", api.Split(val_fraction=0.0)).transform


def pixels_of(syn: SyntheticSet) -> Tensor:
    return syn.to_dataset("pixels").tensors[0]  # type: ignore[attr-defined,no-any-return]


class TestIn:
    def test_dc_and_dm(self, real: tuple[Tensor, Tensor], channel: Transform, tmp_path: Path) -> None:
        """The last run counts; numpy's numbers in the log do no harm."""
        images, labels = real
        syn = api.import_set(published.res(tmp_path, channel(images), labels), "digits")
        torch.testing.assert_close(pixels_of(syn), images)
        assert syn()[1].tolist() == labels.tolist() and syn.lr is None
        assert syn.origin.recipe["method"]["name"] == "imported:res"

    def test_mtt_with_whitening_and_a_learned_rate(self, real: tuple[Tensor, Tensor], tmp_path: Path) -> None:
        images, labels = real
        whitened = api.plain_task(DIGITS, "mlp", "zca", api.Split(val_fraction=0.0)).transform(images)
        syn = api.import_set(published.mtt(tmp_path, whitened, labels, 0.02), "digits", transform="zca")
        torch.testing.assert_close(syn()[0], whitened)
        assert syn.lr is not None and syn.lr.item() == pytest.approx(0.02)
        assert syn.origin.transform["kind"] == "zca"

    def test_datm_has_logits_for_labels(self, real: tuple[Tensor, Tensor], channel: Transform, tmp_path: Path) -> None:
        images, _ = real
        logits = torch.randn(N, C, generator=torch.Generator().manual_seed(0))
        syn = api.import_set(published.mtt(tmp_path, channel(images), logits, 0.01), "digits")
        assert isinstance(syn.label_kind, Logits)
        torch.testing.assert_close(syn()[1], logits.softmax(1))

    def test_idc_holds_several_images_in_one(
        self, real: tuple[Tensor, Tensor], channel: Transform, tmp_path: Path
    ) -> None:
        images, labels = real
        syn = api.import_set(published.idc(tmp_path, images, labels), "digits", decode="factor")
        decoded, targets = syn()
        assert syn.decode == Factor() and decoded.shape == (4 * N, 1, 8, 8) and targets.tolist() == labels.tolist() * 4
        torch.testing.assert_close(syn.latents.detach(), channel(images))

    def test_folders_of_jpeg_follow_the_names_of_classes(self, real: tuple[Tensor, Tensor], tmp_path: Path) -> None:
        images, labels = real
        syn = api.import_set(published.jpegs(tmp_path, images, labels, [str(c) for c in range(C)]), "digits")
        assert syn()[1].tolist() == labels.tolist()
        assert (pixels_of(syn) - images).abs().mean() < 0.05

    def test_folders_of_unknown_names_are_classes_in_their_order(
        self, real: tuple[Tensor, Tensor], tmp_path: Path
    ) -> None:
        images, labels = real
        syn = api.import_set(published.jpegs(tmp_path, images, labels, [f"new{c:03d}" for c in range(C)]), "digits")
        assert syn()[1].tolist() == labels.tolist()

    @pytest.mark.parametrize("layout", ["NCHW", "NHW", "NHWC"])
    @pytest.mark.parametrize("dtype", [np.uint8, np.float32])
    def test_any_labelled_arrays(self, layout: str, dtype: Any, real: tuple[Tensor, Tensor], tmp_path: Path) -> None:
        images, labels = real
        array = (images * 255).numpy().astype(np.uint8) if dtype is np.uint8 else images.numpy()
        array = {"NCHW": array, "NHW": array[:, 0], "NHWC": array.transpose(0, 2, 3, 1)}[layout]
        np.savez(tmp_path / "a.npz", x=array, y=labels.numpy())
        found = read(tmp_path / "a.npz")
        torch.testing.assert_close(found.images, images, atol=1 / 254, rtol=0)
        assert found.labels.tolist() == labels.tolist()

    def test_the_command_writes_a_set_of_ours(
        self, real: tuple[Tensor, Tensor], channel: Transform, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        images, labels = real
        source, target = published.res(tmp_path, channel(images), labels), tmp_path / "set.safetensors"
        cli.main(["import", str(source), str(target), "--dataset", "digits"])
        assert "is your word" in capsys.readouterr().out
        torch.testing.assert_close(pixels_of(load(target)), images)
        with pytest.raises(SystemExit) as leave:
            cli.main(["import", str(source), str(target), "--dataset", "digits"])
        assert leave.value.code == 2 and "exists already" in capsys.readouterr().err

    def test_pixels_are_evaluated_without_a_recipe(
        self, real: tuple[Tensor, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        images, labels = real
        np.savez(tmp_path / "mine.npz", images=images.numpy(), labels=labels.numpy())
        words = ["--networks", "mlp", "--num-seeds", "1", "--protocol.num-epochs", "150", "--device", "cpu"]
        cli.main(["evaluate", str(tmp_path / "mine.npz"), "--dataset", "digits", *words])
        assert "imported:npz" in capsys.readouterr().out
        (row,) = json.loads((tmp_path / "mine.evaluation.json").read_text())["results"]
        assert row["num_images"] == N and row["mean"] > 0.5

    def test_what_does_not_say_enough_is_refused(
        self, real: tuple[Tensor, Tensor], channel: Transform, tmp_path: Path
    ) -> None:
        images, labels = real
        np.savez(tmp_path / "mine.npz", images=images.numpy(), labels=labels.numpy())
        with pytest.raises(ValueError, match="does not say which data"):
            api.evaluate(tmp_path / "mine.npz")
        source = published.res(tmp_path, channel(images), labels)
        with pytest.raises(ValueError, match="through which transform"):
            api.evaluate(source, "digits")


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("touch /tmp/condense-was-here",)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"data": [[Bomb(), Bomb()]]}, "is refused"),
        ({"images": torch.zeros(3)}, "neither the `data` of DC"),
        ({"data": []}, "no list of runs"),
        ([torch.zeros(3, 1, 8, 8)], "no pair of images and labels"),
        ([torch.zeros(3, 1, 8, 8), torch.zeros(2, dtype=torch.long)], r"\(N, C, H, W\) and \(N,\)"),
        ([torch.full((3, 1, 8, 8), torch.nan), torch.zeros(3, dtype=torch.long)], "not finite"),
        ([torch.zeros(3, 1, 8, 8), torch.full((3,), 0.5)], "no whole numbers"),
        ([torch.zeros(3, 3, 8, 8), torch.zeros(3, dtype=torch.long)], "give dataset"),
        ([torch.zeros(3, 1, 8, 8), torch.full((3,), 12)], "labels from 12 to 12"),
        ([torch.zeros(3, 1, 8, 8), torch.zeros(3, 7)], "labels for 7 classes"),
    ],
)
def test_rubbish_is_refused_in_one_line(content: Any, complaint: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "data.pt")
    with pytest.raises(ValueError, match=complaint) as refused:
        api.import_set(tmp_path / "data.pt", "digits")
    assert "\n" not in str(refused.value)
    assert not Path("/tmp/condense-was-here").exists()


@pytest.mark.parametrize("name", ["a.npz", "a.pt", "images_1.pt"])
def test_damaged_files_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04 nothing of the kind")
    assert is_foreign(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}.+cannot be read|{name} is refused"):
        api.import_set(tmp_path / name, "digits")
    with pytest.raises(ValueError, match="there is nothing at"):
        api.import_set(tmp_path / "missing.npz", "digits")


def test_normalised_values_are_no_pixels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.random.default_rng(0).normal(size=(3, 1, 8, 8)), labels=np.arange(3))
    with pytest.raises(ValueError, match="undo their normalisation"):
        api.import_set(tmp_path / "a.npz", "digits")


@pytest.fixture(params=["hard", "logits"])
def syn(request: pytest.FixtureRequest, tmp_path: Path) -> SyntheticSet:
    fields: dict[str, Any] = {"num_steps": 1, "ipc": 2, "outer_loop": 1, "inner_epochs": 0, "start": "real"}
    return api.distill(
        "dc", dataset="digits", network="mlp", labels=request.param, out=tmp_path / "run", device="cpu", **fields
    )


class TestOut:
    def test_npz_is_read_by_numpy_and_by_us(self, syn: SyntheticSet, tmp_path: Path) -> None:
        api.export_set(syn, tmp_path / "a.npz", "npz")
        with np.load(tmp_path / "a.npz") as file:
            np.testing.assert_allclose(file["images"], pixels_of(syn).numpy())
            assert file["labels"].tolist() == syn.classes.tolist() and list(file["classes"]) == list(DIGITS.classes)
            assert ("soft_labels" in file) == syn.label_kind.learned
            assert json.loads(str(file["origin"]))["recipe"]["method"]["name"] == "dc"
        assert read(tmp_path / "a.npz").labels.tolist() == syn.classes.tolist()

    def test_a_folder_is_read_by_torchvision(self, syn: SyntheticSet, tmp_path: Path) -> None:
        from torchvision.datasets import ImageFolder

        api.export_set(syn, tmp_path / "images", "folder")
        found = ImageFolder(str(tmp_path / "images"))
        assert [label for _, label in found.samples] == syn.classes.tolist()
        first = np.asarray(Image.open(found.samples[0][0]))
        assert np.abs(first / 255 - pixels_of(syn)[0, 0].numpy()).max() <= 0.5 / 255 + 1e-6
        with open(tmp_path / "images" / "labels.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["label"]) for row in rows] == syn.classes.tolist()
        assert all((tmp_path / "images" / row["file"]).exists() for row in rows)
        if syn.label_kind.learned:
            from pyarrow import parquet

            soft = parquet.read_table(tmp_path / "images" / "soft_labels.parquet")["soft_label"].to_pylist()
            torch.testing.assert_close(torch.tensor(soft), syn()[1].detach())

    @pytest.mark.filterwarnings("default")
    def test_hugging_face_reads_images_classes_and_soft_labels(
        self, syn: SyntheticSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        datasets = pytest.importorskip("datasets")
        api.export_set(syn, tmp_path / "hub", "huggingface")
        found = datasets.load_dataset(str(tmp_path / "hub"), split="train", cache_dir=str(tmp_path / "cache"))
        assert found["label"] == syn.classes.tolist() and found.features["label"].names == list(DIGITS.classes)
        image = np.asarray(found[0]["image"]) / 255
        assert np.abs(image - pixels_of(syn)[0, 0].numpy()).max() <= 0.5 / 255 + 1e-6
        if syn.label_kind.learned:
            torch.testing.assert_close(torch.tensor(found["soft_label"]), syn()[1].detach())
        card = (tmp_path / "hub" / "README.md").read_text()
        assert "dataset-distillation" in card and DIGITS.fingerprint["train"] in card

    @pytest.mark.parametrize("kind", FORMATS)
    def test_nothing_is_overwritten(self, kind: str, syn: SyntheticSet, tmp_path: Path) -> None:
        (tmp_path / "there").write_text("mine")
        with pytest.raises(ValueError, match="exists already"):
            api.export_set(syn, tmp_path / "there", kind)
        assert (tmp_path / "there").read_text() == "mine"


def test_the_export_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    api.distill("random", dataset="digits", network="mlp", ipc=1, out=out, transform="zca", device="cpu")
    cli.main(["export", str(out), str(tmp_path / "a.npz")])
    assert read(tmp_path / "a.npz").images.shape == (10, 1, 8, 8)
    with pytest.raises(SystemExit) as leave:
        cli.main(["export", str(out), str(tmp_path / "b"), "--format", "tar"])
    assert leave.value.code == 2 and "unknown format" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
