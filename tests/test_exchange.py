"""What others publish comes in, and what goes out is read by the libraries it is meant for."""

import csv
import json
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
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
from condense.exchange.export import class_folders
from condense.exchange.published import match
from condense.sets import read_set
from condense.synthetic import Factor, Hard, Labels, Logits, Origin, SyntheticSet, Targets, Teacher, load, save
from tests.mutations import mutate_bytes
from tests.reference import published

ROOT = Path(__file__).resolve().parents[1]
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

    def test_the_classes_of_an_npz_are_matched_by_name(self, real: tuple[Tensor, Tensor], tmp_path: Path) -> None:
        images, labels = real
        names = np.array([f"digit {n}" for n in range(C)])
        pixels, given = (DIGITS.x_train * 255).astype(np.uint8)[:40], {"images": images.numpy(), "classes": names}
        parts = {
            f"{what}_{part}": value
            for part in ("train", "test")
            for what, value in (("x", pixels), ("y", np.arange(40) % C))
        }
        np.savez(tmp_path / "reversed.npz", **parts, classes=names[::-1])
        for name, stored in (("hard", labels.numpy()), ("soft", torch.eye(C)[labels].numpy())):
            np.savez(tmp_path / f"{name}.npz", **given, labels=stored)
            found = api.import_set(tmp_path / f"{name}.npz", tmp_path / "reversed.npz")()[1].detach()
            assert (found if name == "hard" else found.argmax(1)).tolist() == (C - 1 - labels).tolist()
        np.savez(tmp_path / "other.npz", **given | {"classes": [*"abcdefghij"]}, labels=labels.numpy())
        with pytest.raises(ValueError, match=r"the class 'a' matches no class: .*; give another dataset"):
            api.import_set(tmp_path / "other.npz", tmp_path / "reversed.npz")

    def test_a_set_may_get_a_name(self, real: tuple[Tensor, Tensor], channel: Transform, tmp_path: Path) -> None:
        source = published.res(tmp_path, channel(real[0]), real[1])
        target = tmp_path / "named.safetensors"
        cli.main(["import", str(source), str(target), "--dataset", "digits", "--name", "DC, authors' file"])
        assert load(target).origin.method == "imported:DC, authors' file"
        for name in ("", "a\nb", "x" * 61):
            with pytest.raises(ValueError, match="1 to 60 printable characters; give name='mtt'"):
                api.import_set(source, "digits", name=name)

    def test_mtt_with_whitening_and_a_learned_rate(self, real: tuple[Tensor, Tensor], tmp_path: Path) -> None:
        images, labels = real
        whitened = api.plain_task(DIGITS, "mlp", "zca", api.Split(val_fraction=0.0)).transform(images)
        syn = api.import_set(published.mtt(tmp_path, whitened, labels, 0.02), "digits", transform="zca")
        torch.testing.assert_close(syn()[0], whitened)
        assert syn.lr is not None and syn.lr.item() == pytest.approx(0.02)
        assert syn.origin.transform["kind"] == "zca"

    def test_datm_has_logits_for_labels(self, real: tuple[Tensor, Tensor], channel: Transform, tmp_path: Path) -> None:
        images, labels = real
        logits = torch.randn(N, C, generator=torch.Generator().manual_seed(0)) + 9 * torch.eye(C)[labels]
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
        assert "Condense cannot verify them" in capsys.readouterr().out
        torch.testing.assert_close(pixels_of(load(target)), images)
        with pytest.raises(SystemExit) as leave:
            cli.main(["import", str(source), str(target), "--dataset", "digits"])
        assert leave.value.code == 2 and "already exists" in capsys.readouterr().err

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
        with pytest.raises(ValueError, match="which transform"):
            api.evaluate(source, "digits")


FASHION = ("T-shirt/top", "Trouser", "Ankle boot")


class TestFolders:
    @pytest.mark.parametrize(
        ("folders", "classes", "expected"),
        [
            (["Ankle boot", "T-shirt_top", "Trouser"], FASHION, [2, 0, 1]),
            (["ankle_boot", "t-shirt-top", "trouser"], FASHION, [2, 0, 1]),
            (["000-T-shirt-top", "001-Trouser", "002-Ankle-boot"], FASHION, [0, 1, 2]),
            (["0_T-shirt top", "2_Ankle boot"], FASHION, [0, 2]),
            (["0", "1", "2"], FASHION, [0, 1, 2]),
            (["new002", "new000"], FASHION, [2, 0]),
            ([f"{n}" for n in sorted(map(str, range(11)))], [f"c{n}" for n in range(11)], [0, 1, 10, *range(2, 10)]),
            (["class_1", "class_10", "class_2"], [f"c{n}" for n in range(11)], [1, 10, 2]),
            (["01", "02", "10"], ["1", "2", "10"], [0, 1, 2]),
            (["n10", "n2"], ["1", "2", "10"], [2, 1]),
            (["a-b", "a_b"], ["a_b", "a-b"], [1, 0]),
            (["e\u0301t\u00e9"], ["hiver", "\u00e9t\u00e9"], [1]),
            (["000-e-t-", "001-hiver"], ["e\u0301t/", "hiver"], [0, 1]),
            (["000-001", "001-01", "002-1"], ["001", "01", "1"], [0, 1, 2]),
            (["000-a-b", "001-0-a-b"], ["a b", "0-a b"], [0, 1]),
        ],
    )
    def test_they_match_by_name_then_by_number(self, folders: list[str], classes: Any, expected: list[int]) -> None:
        assert match(folders, classes) == expected

    @pytest.mark.parametrize(
        ("folders", "complaint"),
        [
            (["Ankle boot", "Sandal", "Shirt"], "the folder 'Sandal' matches no class"),
            (["1", "2", "3"], "the folder '3' matches no class.*numbered 0..2"),
            (["0", "1", "Trouser"], "the folder '0' matches no class"),
            (["new1", "old2"], "the folder 'new1' matches no class"),
            (["1-T-shirt-top"], "the folder '1-T-shirt-top' matches no class"),
            (["Trouser", "trouser"], "'Trouser' and 'trouser' both match the class 'Trouser'"),
        ],
    )
    def test_what_matches_nothing_is_named(self, folders: list[str], complaint: str) -> None:
        with pytest.raises(ValueError, match=complaint):
            match(folders, FASHION)

    def test_many_classes_have_folders_in_their_order(self) -> None:
        for count, first in ((3, "000-c"), (1000, "000-c"), (1001, "0000-c")):
            folders = class_folders(["c"] * count)
            assert (
                folders[0] == first and folders == sorted(folders) and match(folders, ["c"] * count) == [*range(count)]
            )

    def test_numbers_without_zeros_in_front(self, real: tuple[Tensor, Tensor], tmp_path: Path) -> None:
        """In the order of names 10 comes before 2."""
        images, labels = real
        dataset = tmp_path / "mine.npz"
        eleven = {"y_train": np.r_[np.arange(10), 10], "y_test": np.arange(3)}
        pixels = (DIGITS.x_train * 255).astype(np.uint8)
        names = np.array([f"name {n}" for n in range(11)])
        np.savez(dataset, x_train=pixels[:11], x_test=pixels[:3], classes=names, **eleven)
        source = published.jpegs(
            tmp_path,
            torch.cat([images, images[:1]]),
            torch.cat([labels, torch.tensor([10])]),
            [str(n) for n in range(11)],
        )
        syn = api.import_set(source, str(dataset))
        assert sorted(syn()[1].tolist()) == sorted([*labels.tolist(), 10])
        torch.testing.assert_close(pixels_of(syn)[syn.classes == 2], images[labels == 2], atol=0.2, rtol=0)

    def test_gray_and_coloured_images_may_be_mixed(self, tmp_path: Path) -> None:
        (tmp_path / "0").mkdir()
        Image.new("L", (4, 4), 51).save(tmp_path / "0" / "a.png")
        Image.new("RGBA", (4, 4), (255, 0, 0, 9)).save(tmp_path / "0" / "b.png")
        found = read(tmp_path)
        assert found.images[0].unique().tolist() == pytest.approx([0.2])
        assert found.images[1, :, 0, 0].tolist() == [1, 0, 0]

    def test_no_picture_is_passed_over(self, tmp_path: Path) -> None:
        (tmp_path / "0").mkdir()
        for name in ("a.png", "b.TIF", "c.gif", "d.JPEG", "e.tga", "f.jp2"):
            Image.new("RGB", (4, 4), (0, 255, 0)).save(tmp_path / "0" / name)
        (tmp_path / "0" / "notes.txt").write_text("no picture")
        assert len(read(tmp_path).images) == 6

    def test_sixteen_bits_do_not_saturate(self, tmp_path: Path) -> None:
        (tmp_path / "0").mkdir()
        Image.fromarray(np.full((4, 4), 9999, np.uint16)).save(tmp_path / "0" / "a.png")
        with pytest.raises(ValueError, match="more than 8 bits"):
            read(tmp_path)

    def test_a_pipe_is_not_waited_for(self, tmp_path: Path) -> None:
        (tmp_path / "0").mkdir()
        os.mkfifo(tmp_path / "0" / "a.png")
        os.mkfifo(tmp_path / "a.pt")
        for place in (tmp_path, tmp_path / "a.pt"):
            with pytest.raises(ValueError, match=r"not a regular file|neither a file nor a folder"):
                read(place)


class TestValues:
    def write(self, path: Path, images: Any, labels: Any) -> Path:
        if path.suffix == ".npz":
            np.savez(path, images=images.numpy(), labels=labels.numpy())
        else:
            torch.save([images, labels], path)
        return path

    @pytest.mark.parametrize("name", ["a.npz", "a.pt"])
    def test_pixels_are_told_by_type_and_range(self, name: str, real: tuple[Tensor, Tensor], tmp_path: Path) -> None:
        images, labels = real
        found = read(self.write(tmp_path / name, (images * 255).round().byte(), labels))
        torch.testing.assert_close(found.images, images, atol=1 / 254, rtol=0)
        with pytest.raises(ValueError, match=r"pixels from 0 to 255: .* x / 255"):
            read(self.write(tmp_path / name, images * 255, labels))
        with pytest.raises(ValueError, match=r"pixels from -.*undo their normalisation"):
            read(self.write(tmp_path / name, images - 0.5, labels))

    def test_pixels_where_transformed_images_should_be_are_noticed(
        self, real: tuple[Tensor, Tensor], tmp_path: Path
    ) -> None:
        source = published.res(tmp_path, *real)
        with pytest.warns(UserWarning, match=r"none below 0, so the transform channel .*with the transform none"):
            api.import_set(source, "digits")
        torch.testing.assert_close(pixels_of(api.import_set(source, "digits", transform="none")), real[0])
        with pytest.raises(ValueError, match="the images are uint8"):
            read(published.res(tmp_path, (real[0] * 255).byte(), real[1]))

    @pytest.mark.parametrize("name", ["a.npz", "a.pt"])
    def test_probabilities_are_no_logits(self, name: str, real: tuple[Tensor, Tensor], tmp_path: Path) -> None:
        images, labels = real
        probabilities = 0.6 * torch.eye(C)[labels] + 0.4 * torch.rand(N, C).softmax(1)
        probabilities[0] = torch.eye(C)[0]
        for given in (probabilities, probabilities.half()):
            syn = api.import_set(self.write(tmp_path / name, images, given), "digits")
            assert isinstance(syn.label_kind, Teacher) and syn.classes.tolist() == labels.tolist()
            torch.testing.assert_close(syn()[1], probabilities, atol=2e-3, rtol=0)
        save(syn, tmp_path / "set.safetensors")
        torch.testing.assert_close(load(tmp_path / "set.safetensors")()[1], syn()[1])
        logits = probabilities.log().clamp_min(-20) - 1
        syn = api.import_set(self.write(tmp_path / name, images, logits), "digits")
        assert isinstance(syn.label_kind, Logits)
        torch.testing.assert_close(syn()[1], probabilities, atol=1e-6, rtol=0)

    def test_what_may_be_either_is_asked_for(self, real: tuple[Tensor, Tensor], tmp_path: Path) -> None:
        images, labels = real
        y = torch.eye(C)[labels] * 0.5 + 0.1 * torch.rand(N, C)
        with pytest.raises(ValueError, match="may be probabilities or logits") as refused:
            read(self.write(tmp_path / "a.pt", images, y))
        hints = ("y / y.sum(1, keepdims=True)", "y - 1 - y.max()")
        assert all(code in str(refused.value) for code in hints)
        for code, expected in zip(hints, (y / y.sum(1, keepdim=True), y.softmax(1)), strict=True):
            syn = api.import_set(self.write(tmp_path / "a.pt", images, eval(code, {"y": y})), "digits")
            torch.testing.assert_close(syn()[1], expected)
        with pytest.raises(ValueError, match="sums from 100 to 100"):
            read(self.write(tmp_path / "a.pt", images, 100 * y / y.sum(1, keepdim=True)))

    def test_a_part_of_a_set_is_noticed(self, real: tuple[Tensor, Tensor], tmp_path: Path) -> None:
        images, labels = real
        few, some = labels < 2, (labels > 0) | (torch.arange(N) == 0)
        with pytest.warns(UserWarning, match=r"no image of 8 of 10 classes \(2, 3, 4, 5, 6 and 3 more\)"):
            api.import_set(self.write(tmp_path / "a.npz", images[few], labels[few]), "digits")
        twice = torch.cat([images, images[some]]), torch.cat([labels, labels[some]])
        less = torch.cat([torch.tensor([0]), torch.arange(len(twice[1]))[twice[1] > 0]])
        with pytest.warns(UserWarning, match="has 4 images of a class, but fewer than half as many of 0;"):
            api.import_set(self.write(tmp_path / "a.npz", twice[0][less], twice[1][less]), "digits")

    @pytest.mark.parametrize(
        "rate", [torch.tensor([0.1, 0.2]), float("inf"), -1.0, "0.1", {}, torch.tensor(1j), torch.tensor([])]
    )
    def test_a_step_size_is_one_positive_number(self, rate: Any, real: tuple[Tensor, Tensor], tmp_path: Path) -> None:
        source = published.mtt(tmp_path, *real)
        torch.save(rate, tmp_path / "lr_best.pt")
        with pytest.raises(ValueError, match="a learning rate is one positive number; remove the file"):
            read(source)

    def test_a_tensor_that_repeats_a_value_for_ever_is_refused(self, tmp_path: Path) -> None:
        images = torch.rand(1, 1, 1, 1).expand(10**6, 3, 64, 64)
        torch.save([images, torch.zeros(1, dtype=torch.long).expand(10**6)], tmp_path / "a.pt")
        with pytest.raises(ValueError, match="takes 46,875 MiB in memory"):
            read(tmp_path / "a.pt")

    def test_a_compressed_file_that_holds_too_much_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("condense.files._HARMLESS", 1 << 20)
        torch.save([torch.zeros(10**6), torch.zeros(1)], tmp_path / "plain.pt")
        with zipfile.ZipFile(tmp_path / "plain.pt") as plain:
            with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as packed:
                for name in plain.namelist():
                    packed.writestr(name, plain.read(name))
        with pytest.raises(ValueError, match=r"a.pt takes 4 MiB in memory"):
            read(tmp_path / "a.pt")

    @pytest.mark.parametrize("layout", ["npz", "pair", "folder", "hub"])
    def test_a_damaged_file_is_read_or_refused_in_one_line(
        self, layout: str, real: tuple[Tensor, Tensor], tmp_path: Path
    ) -> None:
        if layout == "folder":
            source = published.jpegs(tmp_path, *real, [str(c) for c in range(C)])
            file = source / "0" / "class000_id000.jpg"
        elif layout == "hub":
            syn = api.distill("random", dataset="digits", network="mlp", ipc=1, out=tmp_path / "run", device="cpu")
            source, file = tmp_path / "hub", tmp_path / "hub" / "data" / "train.parquet"
            api.export_set(syn, source, "huggingface")
        else:
            source = file = self.write(tmp_path / ("a.npz" if layout == "npz" else "a.pt"), real[0][:2], real[1][:2])
        refused, content = 0, file.read_bytes()
        for i in range(150):
            file.write_bytes(mutate_bytes(content, Random(i)))
            try:
                with warnings.catch_warnings(action="error"):
                    read(source)
            except ValueError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 900, error
        assert 20 < refused


class Bomb:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ("touch /tmp/condense-was-here",)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"data": [[Bomb(), Bomb()]]}, "is refused"),
        ({"images": torch.zeros(3)}, "neither the `data` of DC"),
        ({"data": []}, "is not a list of runs"),
        ([torch.zeros(3, 1, 8, 8)], "does not hold the pair of images"),
        (
            [torch.zeros(3, 1, 8, 8), torch.zeros(2, dtype=torch.long)],
            r"\(N, C, H, W\) or \(N, T, C, H, W\) and labels \(N,\)",
        ),
        ([torch.full((3, 1, 8, 8), torch.nan), torch.zeros(3, dtype=torch.long)], "not finite"),
        ([torch.zeros(3, 1, 8, 8), torch.full((3,), 0.5)], "are not integers"),
        ([torch.zeros(3, 3, 8, 8), torch.zeros(3, dtype=torch.long)], "give dataset"),
        ([torch.zeros(3, 1, 8, 8), torch.full((3,), 12)], "labels from 12 to 12"),
        ([torch.zeros(3, 1, 8, 8), -torch.ones(3, 7)], "labels for 7 classes"),
    ],
)
def test_rubbish_is_refused_in_one_line(content: Any, complaint: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "data.pt")
    with pytest.raises(ValueError, match=complaint) as refused:
        api.import_set(tmp_path / "data.pt", "digits")
    assert "\n" not in str(refused.value)
    assert not Path("/tmp/condense-was-here").exists()


@pytest.mark.parametrize("words", ["--network mlp", "--split.val-fraction 0.3", "--features-only True"])
def test_flags_of_networks_are_refused_for_a_set(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = published.res(tmp_path, torch.rand(10, 1, 8, 8), torch.arange(10))
    with pytest.raises(SystemExit):
        cli.main(["import", str(source), str(tmp_path / "set.safetensors"), "--dataset", "digits", *words.split()])
    assert "describes networks, and DST is a set; leave it out" in capsys.readouterr().err
    assert not (tmp_path / "set.safetensors").exists()


@pytest.mark.parametrize("decode", ["pixels-8bit", "dct"])
def test_decoders_of_other_latents_than_the_images_are_refused(
    decode: str, real: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    images, labels = real
    np.savez(tmp_path / "pub.npz", images=images, labels=labels)
    with pytest.raises(ValueError, match=f"images are not stored as {decode}; give decode='pixels' or factor"):
        api.import_set(tmp_path / "pub.npz", "digits", decode=decode)


@pytest.mark.parametrize("name", ["a.npz", "a.pt", "images_1.pt"])
def test_damaged_files_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04 nothing of the kind")
    assert is_foreign(tmp_path / name)
    with pytest.raises(ValueError, match=f"cannot read .+{name}|{name} cannot be read"):
        api.import_set(tmp_path / name, "digits")
    with pytest.raises(ValueError, match="there is no file or folder"):
        api.import_set(tmp_path / "missing.npz", "digits")


def test_a_run_folder_with_a_folder_of_pictures_is_still_the_run(tmp_path: Path) -> None:
    syn = api.distill("random", dataset="digits", ipc=1, out=tmp_path / "run")
    for folder in (tmp_path / "run", tmp_path / "others"):
        (folder / "pictures").mkdir(parents=True)
        Image.new("L", (8, 8)).save(folder / "pictures" / "set.png")
    assert is_foreign(tmp_path / "others")
    found, _ = read_set(tmp_path / "run")
    assert isinstance(found, SyntheticSet) and found.origin == syn.origin


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
        assert "No accuracy was measured" in card and "20 synthetic images" in card and "(set.png)" in card
        with Image.open(tmp_path / "hub" / "set.png") as shown:
            assert shown.height > 100

    @pytest.mark.parametrize("kind", FORMATS)
    def test_nothing_is_overwritten(self, kind: str, syn: SyntheticSet, tmp_path: Path) -> None:
        (tmp_path / "there").write_text("mine")
        with pytest.raises(ValueError, match="exists already"):
            api.export_set(syn, tmp_path / "there", kind)
        assert (tmp_path / "there").read_text() == "mine"


@pytest.mark.parametrize("kind", ["npz", "folder", "hub"])
@pytest.mark.parametrize("labels", [Hard(), Logits(), Targets(), Teacher()], ids=lambda labels: labels.name)
def test_out_and_in_again_keeps_the_targets(
    kind: str, labels: Labels, real: tuple[Tensor, Tensor], channel: Transform, tmp_path: Path
) -> None:
    images, classes = real
    dataset = {"name": "digits", "fingerprint": "", "classes": list(DIGITS.classes), "input_shape": [1, 8, 8]}
    origin = Origin(dataset=dataset, transform=channel.describe())
    scores = 3 * torch.eye(C)[classes] + torch.rand(N, C)
    syn = SyntheticSet(channel(images), scores, origin, label_kind=labels)
    api.export_set(syn, tmp_path / f"a.{kind}", {"hub": "huggingface"}.get(kind, kind))
    again = api.import_set(tmp_path / f"a.{kind}", "digits")
    assert again.label_kind.space == labels.space
    torch.testing.assert_close(again()[1], syn()[1].detach())
    torch.testing.assert_close(pixels_of(again), images, atol=1e-6 if kind == "npz" else 0.5 / 255 + 1e-6, rtol=0)
    save(again, tmp_path / "set.safetensors")
    torch.testing.assert_close(load(tmp_path / "set.safetensors")()[1], again()[1])


NAMES = ("T-shirt/top", 'Größe  "XL"', "it's, well; both", "CON", "../up", "a\\b", "犬", "a b", "a-b", "7")


@pytest.mark.filterwarnings("default")
def test_names_of_classes_go_out_as_they_are_and_come_in_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    labels = np.arange(40) % len(NAMES)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", x_train=pixels, y_train=labels, x_test=pixels, y_test=labels, classes=NAMES)
    data = str(tmp_path / "d.npz")
    syn = api.distill("random", dataset=data, network="mlp", ipc=1, out=tmp_path / "run", device="cpu")
    for name, kind in (("a.npz", "npz"), ("folder", "folder"), ("hub", "huggingface")):
        api.export_set(syn, tmp_path / name, kind)
        torch.testing.assert_close(api.import_set(tmp_path / name, data)()[1], syn()[1])
    with np.load(tmp_path / "a.npz") as file:
        assert tuple(file["classes"]) == NAMES
    with open(tmp_path / "folder" / "labels.csv", newline="", encoding="utf-8") as file:
        assert tuple(row["class"] for row in csv.DictReader(file)) == NAMES
    found = datasets.load_dataset(str(tmp_path / "hub"), split="train", cache_dir=str(tmp_path / "cache"))
    assert tuple(found.features["label"].names) == NAMES
    assert len(list(tmp_path.glob("folder/*/*.png"))) == len(NAMES)


@pytest.mark.parametrize("kind", FORMATS)
def test_clipped_pixels_are_counted(
    kind: str, real: tuple[Tensor, Tensor], channel: Transform, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, classes = real
    dataset = {"name": "digits", "fingerprint": "", "classes": list(DIGITS.classes), "input_shape": [1, 8, 8]}
    origin = Origin(dataset=dataset, transform=channel.describe())
    inside, beside = images.clone(), images.clone()
    beside[:2, 0, 0] = torch.tensor([[1.2, -0.1], [1.0001, 0.0]]).repeat(1, 4)  # 8 of 1280 values, and rounding errors
    for name, pixels, said in (
        ("in", inside, "no pixel value was clipped"),
        ("out", beside, "0.62 % of the pixel val"),
    ):
        save(SyntheticSet(channel(pixels), classes, origin), tmp_path / f"{name}.safetensors")
        cli.main(["export", str(tmp_path / f"{name}.safetensors"), str(tmp_path / name), "--format", kind])
        assert said in capsys.readouterr().out
        if kind == "huggingface":
            assert said in (tmp_path / name / "README.md").read_text()


def test_the_card_has_results_use_and_citations(tmp_path: Path, short_protocol: None) -> None:
    run = tmp_path / "run"
    api.distill("herding", dataset="digits", network="mlp", ipc=1, num_epochs=1, out=run, device="cpu")
    found = api.evaluate(run, networks="mlp", num_seeds=2, baselines="random", device="cpu")
    stale = json.loads((run / "evaluation.json").read_text())
    stale["results"].append(found.results[0].row() | {"synthetic_sha256": "0" * 64, "mean": 0.123})
    (run / "evaluation.json").write_text(json.dumps(stale))
    api.export_set(run, tmp_path / "hub", "huggingface")
    card = (tmp_path / "hub" / "README.md").read_text()
    for result in found.results:
        accuracy = f"{100 * result.mean:.1f} ± {100 * (result.std or 0):.1f}"
        assert f"| {result.method} | 10 | mlp | {result.protocol} | {accuracy} | 2 | 0 |" in card
    assert "12.3" not in card and "iCaRL" in card and "10 real images of 10 classes" in card
    title = re.search(r'^title: "(.*)"$', (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert title is not None and f"title = {{{title[1]}}}" in card
    (command,) = re.findall(r"^    condense import FOLDER (.*)$", card, re.MULTILINE)
    words = command.replace("DATA", "digits").replace("set.safetensors", str(tmp_path / "again.safetensors")).split()
    cli.main(["import", str(tmp_path / "hub"), *words])
    torch.testing.assert_close(pixels_of(load(tmp_path / "again.safetensors")), pixels_of(load(run)), atol=2e-3, rtol=0)


@pytest.mark.parametrize("syn", ["logits"], indirect=True)
@pytest.mark.parametrize("damage", ["cut", "a file less"])
def test_damaged_soft_labels_are_refused(damage: str, syn: SyntheticSet, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    api.export_set(syn, folder, "folder")
    table = folder / "soft_labels.parquet"
    if damage == "cut":
        table.write_bytes(table.read_bytes()[:-9])
    else:
        image = next(folder.glob("*/*.png"))
        image.rename(image.with_name("another.png"))
    with pytest.raises(ValueError, match=r"cannot read the soft labels in .*; remove the file"):
        read(folder)
    table.unlink()
    assert read(folder).meaning == "classes"


@pytest.mark.parametrize("kind", ["folder", "huggingface"])
def test_a_folder_that_cannot_be_finished_is_not_left(
    kind: str, syn: SyntheticSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules["condense.exchange.export"], "_origin", full)  # the package has a function there
    monkeypatch.setattr(sys.modules["condense.exchange.export"], "_card", full)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"cannot write .*: No space left on device"):
        api.export_set(syn, tmp_path / "out" / "there", kind)
    assert not list((tmp_path / "out").iterdir())


def test_the_export_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    api.distill("random", dataset="digits", network="mlp", ipc=1, out=out, transform="zca", device="cpu")
    cli.main(["export", str(out), str(tmp_path / "a.npz")])
    assert read(tmp_path / "a.npz").images.shape == (10, 1, 8, 8)
    with pytest.raises(SystemExit) as leave:
        cli.main(["export", str(out), str(tmp_path / "b"), "--format", "tar"])
    assert leave.value.code == 2 and "unknown format" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.fixture(params=["series", "clips"])
def other_data(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A data set of two classes of series or clips that differ in their mean."""
    shape = {"series": (2, 9), "clips": (3, 1, 4, 4)}[request.param]
    labels = np.arange(16) % 2
    levels = labels.reshape(-1, *(1 for _ in shape))
    draws = np.random.default_rng(0).random((16, *shape))
    samples = 6 * levels - 3 + draws if request.param == "series" else 0.5 * levels + 0.5 * draws
    layout = {"series": "NCL", "clips": "NTCHW"}[request.param]
    np.savez(tmp_path / "data.npz", x_train=samples, y_train=labels, x_test=samples, y_test=labels, layout=layout)
    return tmp_path / "data.npz"


class TestOtherShapes:
    def test_arrays_go_out_and_come_in(self, other_data: Path, tmp_path: Path) -> None:
        syn = api.distill("random", dataset=other_data, network="mlp", ipc=2, out=tmp_path / "run", device="cpu")
        api.export_set(syn, tmp_path / "a.npz", "npz")
        with np.load(tmp_path / "a.npz") as file:
            (name,) = {"series", "clips"} & set(file)
            np.testing.assert_allclose(file[name], pixels_of(syn).numpy())
            assert str(file["layout"]) == {"series": "NCL", "clips": "NTCHW"}[name]
        again = api.import_set(tmp_path / "a.npz", str(other_data))
        torch.testing.assert_close(again()[0], syn()[0])
        assert again.origin.input_shape == syn.origin.input_shape

    @pytest.mark.parametrize("kind", ["folder", "huggingface"])
    def test_formats_of_images_are_refused(self, kind: str, other_data: Path, tmp_path: Path) -> None:
        syn = api.distill("random", dataset=other_data, network="mlp", ipc=1, out=tmp_path / "run", device="cpu")
        with pytest.raises(
            ValueError, match=f"the format {kind} is for images, but this set has .*; give the format npz"
        ):
            api.export_set(syn, tmp_path / "out", kind)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("form", ["last", "first", "tensors"])
    def test_arrays_of_others_are_evaluated(
        self, form: str, other_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """With the channels at the end or in front, or as tensors in the space of the data."""
        with np.load(other_data) as file:
            samples, labels, layout = file["x_train"][:4], file["y_train"][:4], str(file["layout"])
        path = tmp_path / ("mine.pt" if form == "tensors" else "mine.npz")
        if form == "tensors":
            torch.save([torch.from_numpy(samples), torch.from_numpy(labels)], path)
        elif form == "last":
            axis = layout.index("C")
            np.savez(path, x=np.moveaxis(samples, axis, -1), y=labels, layout=layout.replace("C", "") + "C")
        else:
            np.savez(path, x=samples, y=labels, layout=layout)
        words = ["--networks", "mlp", "--num-seeds", "1", "--protocol.num-epochs", "60", "--device", "cpu"]
        cli.main(["evaluate", str(path), "--dataset", str(other_data), *words])
        assert "imported:" in capsys.readouterr().out
        (row,) = json.loads((tmp_path / "mine.evaluation.json").read_text())["results"]
        assert row["num_images"] == 4 and row["mean"] == 1

    def test_series_without_a_layout_are_asked_for_it(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=np.random.default_rng(0).normal(size=(4, 2, 9)), y=np.arange(4))
        with pytest.raises(ValueError, match=r'if these are series, give a layout, np.savez\(..., layout="NCL"\)'):
            read(tmp_path / "a.npz")

    def test_samples_of_another_shape_are_refused(self, other_data: Path, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=np.zeros((4, 3, 7)), y=np.arange(4) % 2, layout="NCL")
        with pytest.raises(ValueError, match=r"samples of shape \(3, 7\), but data has .*; give dataset"):
            api.import_set(tmp_path / "a.npz", str(other_data))
