"""Transfer of networks that are pre-trained on a set without classes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from condense import api, cli, overview
from condense.data.datasets import Arrays
from condense.eval.applications import transfer
from condense.eval.applications.transfer import RANDOM_WEIGHTS, teacher_of
from condense.eval.subject import Subject
from condense.methods.krr_st import KRRST
from condense.recipe import Recipe
from condense.synthetic import Targets, load

NETWORK = "convnet:depth=1,width=8,norm=batch"
TEACHER = "convnet:depth=2,width=4,norm=batch"
SHORT: dict[str, Any] = {"num_epochs": 5, "tune_steps": 12, "num_seeds": 2, "augment": "none"}


@pytest.fixture(scope="module")
def teachers(tiny: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("teachers")
    fields: dict[str, Any] = {"num_experts": 1, "num_epochs": 1, "lr": 0.05, "batch_size": 12, "projector": 8}
    api.make_buffer(tiny, TEACHER, objective="barlow-twins", keep="last", out=root, device="cpu", **fields)
    return root


@pytest.fixture(scope="module")
def run(tiny_file: Path, teachers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "krr-st"
    method = KRRST(num_steps=2, teachers=(TEACHER,), batch_real=9, pool_size=1, max_age=2, training_epochs=5)
    plan = Recipe(method=method, dataset=str(tiny_file), network=NETWORK, labels=Targets(), ipc=2, augment="none")
    api.run(plan, api.RunOptions(out=out, buffers=teachers, device="cpu"))
    return out


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes that differ in the side that is bright."""
    rng, arrays = np.random.default_rng(1), {}
    for part, num in (("train", 40), ("test", 20)):
        labels = np.arange(num) % 2
        images = rng.integers(0, 60, (num, 8, 8))
        images[labels == 0, :4] += 150
        images[labels == 1, 4:] += 150
        arrays |= {f"x_{part}": images.astype(np.uint8), f"y_{part}": labels.astype(np.uint8)}
    path = tmp_path_factory.mktemp("data") / "sides.npz"
    np.savez(path, **arrays)
    return path


def test_every_start_is_probed_and_fine_tuned(run: Path, teachers: Path, other: Path) -> None:
    found = api.apply("transfer", run, to=(str(other),), buffers=str(teachers), full_steps=3, **SHORT)
    starts = ["krr-st", "6 random images", "all 36 images", RANDOM_WEIGHTS]
    assert [row[0] for row in found.rows] == starts and len(found.columns) == 3
    of = found.record["transfers"]
    for start in starts:
        for use in ("probe", "tuned"):
            cell = of[start]["sides"][use]
            assert cell["n"] == len(cell["accuracies"]) == 2 and 0 <= cell["mean"] <= 1 and cell["std"] >= 0
        assert of[start]["sides"]["probe"]["mean"] > 0.9, "the features of any network tell the sides apart"
    written = json.loads((run / "apply-transfer.json").read_text())
    assert written["transfers"] == json.loads(json.dumps(of)) and written["seed"] == 0
    again = api.apply("transfer", run, to=(str(other),), buffers=str(teachers), **SHORT)
    assert again.record["transfers"]["krr-st"] == of["krr-st"], "a result does not depend on the other starts"


def test_one_line_tells_that_all_images_were_left_out(
    run: Path, teachers: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["apply", "transfer", str(run), "--to", str(other), "--buffers", str(teachers), "--num-epochs", "3"]
    words += ["--tune-steps", "1", "--num-seeds", "1", "--augment", "none", "--out", str(tmp_path / "transfer.json")]
    cli.main(words)
    printed = capsys.readouterr().out
    line = "left out: networks pre-trained on all 36 images of tiny; --full-steps 3 adds them, with as many steps as"
    assert f"{line} on the set\n" in printed
    cli.main([*words, "--full-steps", "3"])
    assert "left out" not in capsys.readouterr().out


def test_a_missing_target_is_downloaded(run: Path, teachers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(name: str, download: bool) -> Arrays:
        raise ValueError(f"{name}: {download}")

    monkeypatch.setattr(transfer, "open_data", opened)
    for download in (True, False):
        with pytest.raises(ValueError, match=f"cifar10: {download}"):
            api.apply("transfer", run, to=("cifar10",), buffers=str(teachers), download=download)


def test_a_comparison_names_the_set_that_has_no_classes(run: Path, tiny_file: Path, tmp_path: Path) -> None:
    api.distill("random", dataset=tiny_file, ipc=1, out=tmp_path / "random", device="cpu")
    with pytest.raises(ValueError, match=rf"a comparison needs classes: the targets of {run} are \d+ values"):
        overview.compare([tmp_path / "random", run])


def test_a_pre_training_of_no_use_is_that_from_random_weights(run: Path, teachers: Path, other: Path) -> None:
    """Networks of one seed start from the same weights whatever they are pre-trained on."""
    seen = []
    for epochs in (1, 40):
        found = api.apply("transfer", run, to=(str(other),), buffers=str(teachers), **SHORT | {"num_epochs": epochs})
        seen.append(found.record["transfers"])
    assert seen[0][RANDOM_WEIGHTS] == seen[1][RANDOM_WEIGHTS]


def test_the_teacher_is_that_of_the_set(run: Path, teachers: Path, tiny: Arrays, tmp_path: Path) -> None:
    syn = load(run)
    subject = Subject(syn=syn, arrays=tiny, device=torch.device("cpu"))
    folder = next(teachers.iterdir())
    for place in (teachers, folder):
        assert teacher_of(subject, place).network.name == "convnet:depth=2,norm=batch,width=4"
    with pytest.raises(ValueError, match=rf"the teacher of the set, {folder.name}, is not in"):
        teacher_of(subject, tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"transfer needs labelled data sets; give to=\('cifar10',\)"),
        ({"to": ("digits",), "baselines": ["random"]}, "transfer makes its own comparisons"),
        ({"to": ("digits",), "num_seeds": 0}, "must be at least 1"),
        ({"to": ("digits",), "tune_lr": 0.0}, "tune_lr positive"),
    ],
)
def test_what_makes_no_sense_is_refused(run: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        api.apply("transfer", run, **fields)


def test_a_set_with_classes_and_data_of_another_shape_are_refused(
    run: Path, teachers: Path, tiny: Arrays, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api.distill("random", dataset=tiny, ipc=1, out=tmp_path / "run", device="cpu")
    with pytest.raises(ValueError, match="this one has classes; `condense evaluate` measures it"):
        api.apply("transfer", tmp_path / "run", tiny, to=("digits",))
    wide = tmp_path / "wide.npz"
    arrays = {name: np.zeros((4, 8, 9), np.uint8) for name in ("x_train", "x_test")}
    np.savez(wide, **arrays, y_train=np.arange(4) % 2, y_test=np.arange(4) % 2)
    with pytest.raises(ValueError, match="two of the target data sets have one name"):
        api.apply("transfer", run, to=("digits", "digits"), buffers=str(teachers))
    words = ["apply", "transfer", str(run), "--to", str(wide), "--buffers", str(teachers)]
    with pytest.raises(SystemExit):
        cli.main(words)
    line = capsys.readouterr().err
    assert "have shape (1, 8, 9), not (1, 8, 8)" in line and line.count("\n") == 1
