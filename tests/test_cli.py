"""The command line as a user meets it: good commands end in 0, bad input in one line and 2."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from condense import commands, recipe
from condense.cli import COMMANDS, main
from condense.commands import KINDS
from condense.data import datasets
from tests.conftest import largest_file

TINY = "convnet:depth=1,width=4"


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must fail as a user expects, and give back its one line."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("condense: ") and error.count("\n") == 1, error
    return error


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONDENSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CONDENSE_DATA", str(tmp_path / "no data"))


def random_words(data: Path, out: Path) -> list[str]:
    """The command behind ``run_folder``."""
    return ["distill", "random", "--dataset", str(data), "--ipc", "2", "--network", TINY, "--out", str(out)]


@pytest.fixture
def run_folder(tiny_file: Path, tmp_path: Path) -> Path:
    out = tmp_path / "run"
    main(random_words(tiny_file, out))
    return out


def test_warnings_of_torchs_library_are_left_out_where_processes_work_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL", raising=False)
    main(["list", "decoders"])
    assert "TORCH_CPP_LOG_LEVEL" not in os.environ
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "INFO")
    main(["list", "decoders"])
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == "INFO"
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "")
    monkeypatch.delenv("TORCH_CPP_LOG_LEVEL")
    main(["list", "decoders"])
    assert os.environ["TORCH_CPP_LOG_LEVEL"] == "ERROR"


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "'10000'"),
        pytest.param({"GOMP_SPINCOUNT": "7"}, "'7'", marks=pytest.mark.slow),
        pytest.param({"OMP_WAIT_POLICY": "PASSIVE"}, "'0'", marks=pytest.mark.slow),
    ],
)
def test_threads_that_wait_soon_sleep(given: dict[str, str], expected: str) -> None:
    """The library reads the variable when torch is imported, and says what it read."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-m", "condense", "list", "decoders"]
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE", **given}
    said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stderr
    if "GOMP_SPINCOUNT" not in said:
        pytest.skip("torch has another OpenMP")
    assert f"GOMP_SPINCOUNT = {expected}" in said


def test_the_main_job(tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--dataset", str(tiny_file), "--network", TINY]
    main(["buffer", *data, "--num-experts", "2", "--num-epochs", "3", "--batch-size", "12", "--out", "artifacts"])
    buffer = capsys.readouterr().out.splitlines()[-1]
    words = ["distill", "mtt", *data, "--ipc", "2", "--method.num-steps", "3", "--method.syn-steps", "2"]
    words += ["--method.max-start-epoch", "1", "--split.val-fraction", "0", "--out", "run"]
    main(words)
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} >= {
        "recipe.yaml", "log.jsonl", "checkpoint.safetensors", "synthetic.safetensors", "synthetic.png", "snapshots"
    }  # fmt: skip
    main(["evaluate", "run", "--networks", TINY, "mlp", "--num-seeds", "2", "--protocol.num-epochs", "3"])
    rows = json.loads((run / "evaluation.json").read_text())["results"]
    assert [row["network"] for row in rows] == [TINY, "mlp"]
    assert all(0 <= a <= 1 for row in rows for a in row["accuracies"]) and rows[0]["n"] == 2
    assert rows[0]["protocol"] == "canonical*"
    for target in ("run", "run/synthetic.safetensors", buffer):
        main(["show", target])
    printed = capsys.readouterr().out
    assert "mtt" in printed and "2 experts x 3 epochs" in printed


def test_every_command_reads_decoded_data_from_the_cache(
    run_folder: Path, tiny_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("condense.data.datasets.read_npz", lambda *_: pytest.fail("decoded again"))
    main(random_words(tiny_file, run_folder.with_name("again")))
    main(["buffer", "--dataset", str(tiny_file), "--network", TINY, "--num-experts", "1", "--num-epochs", "2"])
    main(["evaluate", str(run_folder), "--networks", TINY, "--num-seeds", "1", "--protocol.num-epochs", "1"])


def test_own_says_which_network_it_trains(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(run_folder), "--protocol", "own", "--protocol.num-epochs", "1", "--num-seeds", "1"]
    main(words)
    assert f"network: {TINY}, which is stored in the set" in capsys.readouterr().out
    (row,) = json.loads((run_folder / "evaluation.json").read_text())["results"]
    assert row["network"] == TINY


def test_a_run_is_never_overwritten(run_folder: Path, tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()}
    again = random_words(tiny_file, run_folder)
    assert "--resume" in fails(capsys, *again)
    assert "seed = 0, not 5" in fails(capsys, *again, "--seed", "5", "--resume")
    assert "method.name = random, not herding" in fails(capsys, again[0], "herding", *again[2:], "--resume")
    assert {path: path.read_bytes() for path in run_folder.rglob("*") if path.is_file()} == before
    main([*again, "--resume"])
    assert (run_folder / "synthetic.safetensors").read_bytes() == before[run_folder / "synthetic.safetensors"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["distil"], "did you mean 'distill'"),
        (["distill"], "the first word is missing"),
        (["distill", "mmt"], "did you mean 'mtt'"),
        (["distill", "mine.yaml"], "there is no recipe mine.yaml"),
        (["distill", "dm", "--dataset", "digit"], "did you mean"),
        (["distill", "dm", "--dataset", "nowhere.npz"], "there is no such file or folder; by name there are digits"),
        (["distill", "dm", "--dataset", "cifar10"], "--download True"),
        (["distill", "dm", "--network", "convnet:depth=9"], "give depth=3 or less, or pooling=none"),
        (["distill", "dm", "--network", "lenet"], "use larger images, or convnet or mlp"),
        (["distill", "dm", "--ipc", "5000"], "give --ipc"),
        (["distill", "dm", "--decode", "factor", "--decode.factor", "13", "--ipc", "1"], "give another --decode"),
        (["distill", "dm", "--decode", "dct", "--decode.coefficients", "65"], "--decode.coefficients 64"),
        (["distill", "dm", "--decode", "bases", "--decode.num-bases", "50", "--ipc", "1"], "--decode.num-bases 24"),
        (["distill", "dm", "--decode", "hallucinator", "--method.clamp", "True"], "--method.clamp False"),
        (["distill", "dm", "--labels", "targets"], "--labels hard"),
        (["buffer", "--augment", "dsa:flips=true"], "leave it out of --augment"),
        (["distill", "dm", "--ipc", "-1"], "ipc must be at least 1, got -1; give --ipc 10"),
        (["distill", "dm", "--device", "gpu9"], "give --device cpu"),
        (["distill", "dm", "--track", "wandbb"], "did you mean 'wandb'? there are wandb, tensorboard"),
        (["distill", "mtt"], "condense buffer --dataset digits"),
        (["distill", "dm", "--method.num-step", "3"], "--method.num-steps"),
        (["distill", "dm", "--method.optim.lr", "1e39"], "--method.optim.lr 0.1"),
        (["distill", "dm", "--method.optim.lr", "nan"], "nan is not a number"),
        (["distill", "dm", "--seed", "-1"], "give --seed 0"),
        (["distill", "dm", "--eval-every", "-1"], "give --eval-every 100"),
        (["distill", "help.yaml"], "unknown field 'help'"),
        (["distill", "dm", "--split.val-fraction", "0.999"], "--split.val-fraction 0.1"),
        (["distill", "dm", "--labels", "logits"], "--labels hard"),
        (["buffer", "--num-expert", "3"], "--num-experts"),
        (["evaluate", "nowhere"], "there is no file nowhere"),
        (["evaluate"], "the first word is missing"),
        (["show", "nowhere"], "nowhere is no file or folder, and no method or recipe has this name"),
        (["show", "mmt"], "did you mean 'mtt'"),
        (["show", "mtt", "--ipcs", "3"], "did you mean --ipc"),
        (["show", "mtt", "--dataset", "cifr10"], "did you mean 'cifar10'"),
        (["show", "mine.yaml"], "there is no recipe mine.yaml"),
        (["apply", "prunning", "digits"], "did you mean 'pruning'"),
        (["apply", "pruning", "digits", "--methods", "dm"], "of the real ones; give --methods random el2n"),
        (["list", "things"], "cannot list things: there are methods, decoders"),
        (["list", "methods", "mtt"], "cannot list methods mtt: there are methods, decoders"),
        (["list", "recipes", "mtt", "cifr10"], "no recipe has the words cifr10 mtt"),
        (["import", __file__, "there", "--dataset", "digits"], "save it again as a list of lists of lists of tensors"),
        (["import", "nowhere", "there"], "there is no file or folder nowhere"),
        (["import", "nowhere", "set.safetensors"], "there is no file or folder nowhere"),
        (["import", "nowhere"], "import needs SRC and DST; e.g. condense import resnet18.pth"),
        (["import", "nowhere", "--network", "mlp"], "import needs SRC and DST; e.g. condense import resnet18.pth"),
        (["export", "nowhere"], "export needs RUN|FILE and DST; e.g. condense export runs/dm"),
        (["export", "nowhere", "--format", "npz"], "export needs RUN|FILE and DST; e.g. condense export runs/dm"),
        (["demo", "--fast"], "demo takes --out FOLDER and nothing else, got '--fast'"),
        (["demo", "--out"], "demo takes --out FOLDER"),
        (["list"], "list needs a kind: there are methods"),
        (["distill", "mine.py:Mine"], "there is no file mine.py"),
        (["distill", f"{__file__}:Path"], "correct the class"),
        (["distill", "mtt", "--buffers", __file__], "test_cli.py is a file; give --buffers the folder"),
    ],
)
def test_bad_words(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "help.yaml").write_text("method: dm\nhelp: true\n")
    assert complaint in fails(capsys, *words)
    (tmp_path / "help.yaml").unlink()
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"cache"}, "something was written"


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--name", "dm"], "--name names a set, and SRC holds networks; leave it out"),
        (["--features-only", "True"], "--features-only is for the weights of one network, and SRC holds trajectories"),
    ],
)
def test_what_describes_no_experts_is_refused_when_they_are_imported(
    flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "experts").mkdir()
    (tmp_path / "experts" / "replay_buffer_0.pt").touch()
    assert complaint in fails(capsys, "import", "experts", "there", *flags)
    assert not (tmp_path / "there").exists()


def test_a_file_of_another_kind_is_never_overwritten(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("precious")
    run = str(run_folder)
    for words in (["report", run, "--out"], ["show", run, "--png"], ["apply", "continual", run, "--out"]):
        assert "notes.txt exists already and is no" in fails(capsys, *words, str(notes))
    assert notes.read_text() == "precious"
    for words in (["report", run, "--out", "page"], ["show", run, "--png", "picture"]) * 2:
        main(words)


def write(path: Path, **changes: np.ndarray) -> str:
    """A small good data set with some arrays exchanged."""
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    arrays = {"x_train": images, "y_train": np.arange(12) % 3, "x_test": images[:6], "y_test": np.arange(6) % 3}
    np.savez(path, **arrays | changes)
    return str(path)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"x_train": np.zeros((12, 8), np.uint8)}, "has shape (12, 8): images have three or four axes"),
        ({"y_train": np.arange(11) % 3}, "there are 12 images, each needs one label"),
        ({"y_train": np.arange(12) % 3 - 1}, "has labels from -1 to 1: they must be in 0..1"),
        ({"y_test": np.array([0, 1, 2, 7, 0, 1])}, "remove the test images of other classes"),
        ({"x_train": np.full((12, 8, 8), np.nan, np.float32)}, "has NaN or infinite pixels"),
        ({"x_train": np.full((12, 8, 8), 3.0, np.float32)}, "floats must lie in [0, 1]; divide by TOP"),
        ({"y_train": np.arange(12) % 3 * 2}, "has no image of class 1: each label of 0..4 needs at least one"),
    ],
)
def test_bad_data(
    changes: dict[str, np.ndarray], complaint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = fails(capsys, "distill", "random", "--dataset", write(tmp_path / "bad.npz", **changes), "--ipc", "1")
    assert complaint in line and not (tmp_path / "runs").exists()


def test_damaged_files(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run_folder / "synthetic.safetensors"
    good = file.read_bytes()
    for damaged in (good[:-7], good[:50], b"", good[:-3] + bytes([good[-3] ^ 4]) + good[-2:]):
        file.write_bytes(damaged)
        for words in (["evaluate", str(run_folder)], ["show", str(file)]):
            line = fails(capsys, *words)
            assert f"{file} cannot be read as safetensors: " in line or f"{file} is damaged: its checksum" in line
    file.write_bytes(good)
    (run_folder / "evaluation.json").write_text("{")
    assert "evaluation.json" in fails(capsys, "evaluate", str(run_folder), "--protocol.num-epochs", "1")
    assert (run_folder / "evaluation.json").read_text() == "{"


def test_a_set_of_other_data_is_not_scored(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "digits" in fails(capsys, "evaluate", str(run_folder), "--dataset", "digits")
    assert "--networks names no network" in fails(capsys, "evaluate", str(run_folder), "--networks", "--num-seeds", "1")
    assert "--protocol names no protocol" in fails(capsys, "evaluate", str(run_folder), "--protocol", "--seed", "1")
    several = ["--protocol", "canonical", "own", "--protocol.num-epochs", "3"]
    assert "changed for several protocols; give one --protocol" in fails(capsys, "evaluate", str(run_folder), *several)
    assert "--json takes True or False, not 'yes'" in fails(capsys, "evaluate", str(run_folder), "--json=yes")
    assert "leave out --protocol.name" in fails(capsys, "evaluate", str(run_folder), "--protocol.name", "other")
    assert not (run_folder / "evaluation.json").exists()


def test_a_buffer_of_another_network_is_refused_with_the_command_that_builds_one(
    tiny_file: Path, tiny_buffer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["distill", "mtt", "--dataset", str(tiny_file), "--buffers", str(tiny_buffer), "--network", "mlp"]
    line = fails(capsys, *words)
    assert "network" in line and "condense buffer" in line and "--network mlp" in line


def test_a_full_disk_leaves_earlier_results_alone(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files have 20 kB at most, less than a checkpoint with a convnet."""
    words = ["distill", "dm", "--dataset", str(tiny_file), "--ipc", "1", "--method.num-steps", "2"]
    words += ["--method.batch-real", "4", "--network", "convnet:depth=1", "--device", "cpu", "--out"]
    main([*words, str(tmp_path / "good")])
    earlier = {path: path.read_bytes() for path in (tmp_path / "good").rglob("*") if path.is_file()}
    capsys.readouterr()
    with largest_file(20_000):
        assert "cannot write" in fails(capsys, *words, str(tmp_path / "full"))
    assert not list((tmp_path / "full").rglob("*.tmp")) and not (tmp_path / "full" / "synthetic.safetensors").exists()
    assert {path: path.read_bytes() for path in (tmp_path / "good").rglob("*") if path.is_file()} == earlier


@pytest.mark.parametrize("kind", KINDS)
def test_lists(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["list", kind])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) > 3
    if kind == "methods":
        assert all(len(line.split("  ")) >= 3 for line in shown if line.startswith("  ")), "a name and its summary"
    main(["list", kind, "--json"])
    entries = json.loads(capsys.readouterr().out)
    assert all(isinstance(text, str) and 5 < len(text) < 300 for text in entries.values())


def helped(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command prints with ``--help``, in one line."""
    with pytest.raises(SystemExit) as caught:
        main([*words, "--help"])
    assert caught.value.code == 0
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_help_shows_the_fields_of_the_chosen_method(capsys: pytest.CaptureFixture[str]) -> None:
    text = helped(capsys, "distill", "mtt")
    assert "--method.syn-steps" in text and "--method.batch-real" not in text
    for flag in ("--decode {pixels,pixels-8bit,", "--labels {hard,", "--method.adjoint {exact,"):
        assert flag in text
    assert "dct: Each image is stored as DCT coefficients" in text and "(default: exact)" in text
    assert "--method.adjoint.window INT" in helped(capsys, "distill", "mtt", "--method.adjoint", "truncated")


def test_help_lists_the_kinds_of_labels_that_the_command_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--labels {hard,logits,targets,teacher} " in helped(capsys, "distill", "dm")
    assert "--labels {stored,online,projector} " in helped(capsys, "relabel")


def test_help_shows_the_published_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    text = helped(capsys, "distill", "mtt")
    assert "Cazenavette, Wang, Torralba, Efros and Zhu, CVPR 2022" in text and "Recipe: mtt. Caz" in text
    assert "There are recipes for cifar10, " in text and "Number of updates of the images. (default: 5000)" in text
    text = helped(capsys, "distill", "mtt", "--dataset", "cifar10", "--ipc", "12")
    assert "Recipe: mtt-cifar10-ipc10. Caz" in text and "zca-relative. (default: zca)" in text


def test_show_prints_the_recipe_that_distill_runs(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["show", "mtt", "--dataset", "cifar10", "--ipc", "10"])
    shown = capsys.readouterr().out
    assert shown.startswith("# mtt-cifar10-ipc10\n# Cazenavette et al. (2022, MTT): values of the FTD")
    (tmp_path / "mine.yaml").write_text(shown)
    assert recipe.from_yaml(tmp_path / "mine.yaml") == recipe.named("mtt-cifar10-ipc10")
    main(["show", "mine.yaml", "--ipc", "3", "--json"])
    again = json.loads(capsys.readouterr().out)
    assert again["name"] == "mine.yaml" and again["recipe"]["ipc"] == 3

    words = ["random", "--dataset", str(tiny_file), "--ipc", "2", "--network", TINY]
    main(["show", *words])
    shown = capsys.readouterr().out
    assert "# changed by --dataset" in shown
    (tmp_path / "random.yaml").write_text(shown)
    main(["distill", "random.yaml", "--out", "a"])
    main(["distill", *words, "--out", "b"])
    assert (tmp_path / "a" / "recipe.yaml").read_bytes() == (tmp_path / "b" / "recipe.yaml").read_bytes()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        main([command, "--help"])
    except SystemExit as leave:
        assert leave.code == 0
    assert f"usage: condense {command}" in capsys.readouterr().out


def test_resume_is_spelt_either_way(run_folder: Path, tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = random_words(tiny_file, run_folder)
    for spelling in (["--resume"], ["--resume", "True"], ["--resume=True"]):
        main([*words, *spelling])
    assert "--resume" in fails(capsys, *words, "--resume", "False")


def test_a_file_of_a_run_finds_its_data(run_folder: Path) -> None:
    for file in ("synthetic.safetensors", "snapshots/step_0000001.safetensors"):
        main(
            ["evaluate", str(run_folder / file), "--num-seeds", "1", "--networks", "mlp", "--protocol.num-epochs", "1"]
        )


def test_broken_files_of_a_run(run_folder: Path, tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = random_words(tiny_file, run_folder)
    with open(run_folder / "log.jsonl", "a") as log:
        log.write('{"step": 2, "lo')
    main(["show", str(run_folder)])
    (run_folder / "run.json").write_text("{}")
    main([*words, "--resume"])
    (run_folder / "recipe.yaml").write_text("a: [")
    assert "recipe.yaml cannot be read: it is not valid YAML" in fails(capsys, *words, "--resume")


def test_a_recipe_in_a_run_is_enough_to_resume_it(run_folder: Path, tiny_file: Path) -> None:
    record = run_folder / "run.json"
    main(["distill", str(run_folder / "recipe.yaml"), "--out", str(run_folder), "--resume"])
    assert json.loads(record.read_text())["dataset"] == str(tiny_file.resolve())


def test_show_says_what_was_measured_and_draws(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", str(run_folder), "--num-seeds", "2", "--networks", "mlp", "--protocol.num-epochs", "1"])
    capsys.readouterr()
    for target in (run_folder, run_folder / "synthetic.safetensors"):
        main(["show", str(target), "--png", str(run_folder / "mine.png")])
        with Image.open(run_folder / "mine.png") as picture:
            assert min(picture.size) > 20
        (run_folder / "mine.png").unlink()
    said = capsys.readouterr().out
    for word in ("distilled in", "peak memory", "canonical*", "ECE", "together"):
        assert word in said
    assert "no images to draw" in fails(capsys, "show", str(run_folder / "checkpoint.safetensors"), "--png", "x.png")


def test_what_would_fail_in_the_end_fails_first(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(run_folder), "--protocol.num-epochs", "1"]
    assert "did you mean 'herding'" in fails(capsys, *words, "--baselines", "herdng")
    assert "nowhere" in fails(capsys, *words, "--out", "nowhere/result.json")
    assert not (run_folder / "evaluation.json").exists()


def test_scores_on_held_out_images_have_a_file_of_their_own(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, short = str(tmp_path / "run"), ["--networks", "mlp", "--num-seeds", "1", "--protocol.num-epochs", "1"]
    make = ["distill", "random", "--dataset", str(tiny_file), "--ipc", "1", "--network", "mlp", "--out"]
    main([*make, run, "--split.val-fraction", "0.25"])
    main(["evaluate", run, "--split", "validation", "--baselines", "random", "--seed", "1", *short])
    assert "validation accuracy, %" in capsys.readouterr().out
    rows = json.loads((tmp_path / "run" / "validation.json").read_text())["results"]
    assert [row["split"] for row in rows] == 2 * ["validation"] and not (tmp_path / "run" / "evaluation.json").exists()
    main(["evaluate", run, *short])
    assert "test accuracy, %" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "run" / "validation.json").read_text())["results"]) == 2
    main(["show", run])
    said = capsys.readouterr().out
    assert said.index("test accuracy, %") < said.index("validation accuracy, %")
    on_validation = ["evaluate", run, "--split", "validation", *short]
    mixed = fails(capsys, *on_validation, "--out", str(tmp_path / "run" / "evaluation.json"))
    assert "holds 'test' accuracies; give --out" in mixed
    assert "full is trained on the held-out images too" in fails(capsys, *on_validation, "--baselines", "full")
    file = tmp_path / "run" / "validation.json"
    file.write_text('{"results": [{"split": ["x"]}]}')
    assert "holds ['x'] accuracies; give --out" in fails(capsys, *on_validation)
    main([*make, str(tmp_path / "whole")])
    said = fails(capsys, "evaluate", str(tmp_path / "whole"), "--split", "validation", *short)
    assert "distil it with --split.val-fraction 0.1" in said


def test_help_is_fast_because_torch_is_not_imported() -> None:
    script = "import sys; from condense.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert time.perf_counter() - begun < 10  # a guard against hanging; the import is what is tested


def test_data_that_a_command_decoded_are_mapped_by_the_next(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(random_words(tiny_file, tmp_path / "one"))
    assert len(list((tmp_path / "cache" / "decoded").iterdir())) == 1
    monkeypatch.setattr(datasets, "_load_npz", None)
    main(random_words(tiny_file, tmp_path / "other"))


def test_a_reader_that_ends_early_gets_no_complaint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stdout:  # closing it writes what is left, as at the end of a process
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as caught:
            main(["list", "recipes"])
        assert caught.value.code == 1
    assert capsys.readouterr().err == ""


def test_quiet_and_verbose(tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = random_words(tiny_file, tmp_path / "one")
    main([*words, "--quiet"])
    assert capsys.readouterr() == ("", "")
    main(["--verbose", *random_words(tiny_file, tmp_path / "two")])
    said = capsys.readouterr()
    assert "next: condense evaluate" in said.out and "network: convnet:depth=1,width=4" in said.err
    assert "contradict" in fails(capsys, "list", "decoders", "--quiet", "--verbose")


def test_no_color_is_honoured_by_help() -> None:
    code = "import pty, sys; sys.exit(pty.spawn([sys.executable, '-m', 'condense', 'distill', 'random', '--help']))"
    for value, expected in (("", True), ("1", False)):
        environment = {**os.environ, "NO_COLOR": value, "TERM": "xterm-256color", "COLUMNS": "80"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
        assert (re.search(rb"\x1b\[(\d+;)*3\d", done.stdout) is not None) is expected
        assert b"--dataset" in done.stdout


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("can't allocate memory: 9 bytes")],
)
def test_exhausted_memory_is_one_line(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def exhausted(words: list[str]) -> None:
        raise error

    monkeypatch.setitem(commands.TABLE, "list", exhausted)
    said = fails(capsys, "list", "methods")
    assert said.startswith("condense: memory is exhausted: ") and "--compute.micro-batch" in said
    error = RuntimeError("another fault")
    with pytest.raises(RuntimeError, match="another fault"):
        main(["list", "methods"])
