"""Several distillations of one command."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from condense import engine, overview, sweep
from condense.cli import main
from condense.data import datasets
from condense.runs import read_record
from tests.conftest import TINY
from tests.test_cli import fails


def words(data: Path, *more: str) -> list[str]:
    flags = ["--network", TINY, "--ipc", "1", "--method.num-steps", "2", "--method.batch-real", "4", "--device", "cpu"]
    return ["distill", "dm", "--dataset", str(data), *flags, *more]


def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which the number of every step is added."""
    taken, step = [], engine._step

    def counted(method: Any, ctx: Any, state: Any, done: int, checkpoint: Path) -> dict[str, Any]:
        taken.append(done)
        return dict(step(method, ctx, state, done, checkpoint))

    monkeypatch.setattr(engine, "_step", counted)
    return taken


def test_seeds_have_a_run_each(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(words(tiny_file, "--seeds", "0-1"))
    said = capsys.readouterr().out
    folders = [tmp_path / "runs" / f"dm-tiny-ipc1-seed{seed}" for seed in (0, 1)]
    assert [overview.summary(folder).seed for folder in folders] == [0, 1]
    assert "next: condense compare runs/dm-tiny-ipc1-seed0 runs/dm-tiny-ipc1-seed1" in said
    main(words(tiny_file, "--seeds", "3", "--out", "mine"))
    assert overview.summary(tmp_path / "mine" / "seed3").state == "finished"


def test_the_folder_that_is_checked_is_that_of_the_cell(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for used in (tmp_path / "runs" / "dm-tiny-ipc1-seed0", tmp_path / "taken" / "seed0"):
        used.mkdir(parents=True)
        (used / "thesis.tex").touch()
    main(words(tiny_file, "--seeds", "0", "--out", "free"))
    assert overview.summary(tmp_path / "free" / "seed0").state == "finished"
    monkeypatch.setattr(datasets, "load", lambda *_, **__: pytest.fail("data were read"))
    line = fails(capsys, *words(tiny_file, "--seeds", "0", "--out", "taken"))
    assert "taken/seed0 is not empty and holds no run" in line


def test_a_cell_is_finished_when_all_of_its_files_are_there(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = words(tiny_file, "--seeds", "0", "--out", str(tmp_path))
    with monkeypatch.context() as stopped:
        stopped.setattr("condense.picture.draw", lambda *_: (_ for _ in ()).throw(ValueError("the disk is full; wait")))
        fails(capsys, *command)
    assert (tmp_path / "seed0" / "synthetic.safetensors").exists()
    taken = steps_taken(monkeypatch)
    main(command)
    assert (tmp_path / "seed0" / "synthetic.png").exists() and "finished" in read_record(tmp_path / "seed0")
    assert not taken


def test_a_grid_is_chosen_on_validation_images_and_continued(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = steps_taken(monkeypatch)
    command = words(
        tiny_file, "--sweep", "method.optim.lr=0.01,1000", "--seeds", "0,4", "--out", str(tmp_path / "grid")
    )
    main(command)
    assert "grid/method.optim.lr=0.01,seed0: recipe" in capsys.readouterr().out
    assert len(taken) == 8
    (tmp_path / "grid" / "method.optim.lr=1000,seed4" / "synthetic.safetensors").unlink()
    main([*command, "--json"])
    assert len(taken) == 8, "a run whose last checkpoint is there takes no step"
    found = json.loads(capsys.readouterr().out)
    assert [point["values"] for point in found["points"]] == [{"method.optim.lr": "0.01"}, {"method.optim.lr": "1000"}]
    for point in found["points"]:
        summaries = [overview.summary(Path(folder)) for folder in point["folders"]]
        assert [run.seed for run in summaries] == [0, 4]
        assert point["val_accuracies"] == [run.last_val_accuracy for run in summaries]
    means = [statistics.mean(point["val_accuracies"]) for point in found["points"]]
    assert found["best"] == found["points"][means.index(max(means))]["values"]
    main(command)
    shown = capsys.readouterr().out
    assert "best on the validation split: method.optim.lr=" in shown and shown.count(": finished") == 4
    assert len(taken) == 8


@pytest.mark.filterwarnings("default")
def test_what_diverges_is_not_chosen(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = engine._step

    def diverging(method: Any, ctx: Any, state: Any, done: int, checkpoint: Path) -> dict[str, Any]:
        found = dict(step(method, ctx, state, done, checkpoint))
        return {**found, "loss": float("nan")} if method.optim.lr == 7 else found

    monkeypatch.setattr(engine, "_step", diverging)
    main([*words(tiny_file, "--sweep", "method.optim.lr=7,0.1", "--out", str(tmp_path)), "--json", "--quiet"])
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["best"] == {"method.optim.lr": "0.1"}
    assert [point["diverged"] for point in found["points"]] == [1, 0]
    assert said.err.startswith("condense: warning: ") and "diverged" in said.err and said.err.count("\n") == 1


@pytest.mark.filterwarnings("default")
def test_where_all_runs_diverge_the_exit_status_says_so(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = engine._step
    monkeypatch.setattr(engine, "_step", lambda *args: {**step(*args), "loss": float("nan")})
    with pytest.raises(SystemExit) as ended:
        main([*words(tiny_file, "--seeds", "0-1", "--out", str(tmp_path)), "--quiet"])
    assert ended.value.code == 2 and "diverged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--seeds", "4-0"], "--seeds takes whole numbers, not '4-0'"),
        (["--seeds", ""], "--seeds takes whole numbers"),
        (["--seeds", "0-99999999"], "--seeds takes whole numbers"),
        (["--seeds", "1,0-2"], "has a seed twice"),
        (["--seeds", "0-1", "--seed", "3"], "--seed is given once and swept"),
        (["--sweep"], "--sweep names no values"),
        (["--sweep", "method.optim.lr"], "--sweep takes a field and its different values"),
        (["--sweep", "method.optim.lr=1,1"], "--sweep takes a field and its different values"),
        (["--sweep", "method.optim.lr=1", "method.optim.lr=2"], "names method.optim.lr twice"),
        (["--sweep", "method.batch-real=3,4"], "--method.batch-real is given once and swept"),
        (["--sweep", "method.batch_real=3,4"], "--method.batch-real is given once and swept"),
        (["--sweep", "seed=1,2"], "give --seeds 0-4"),
        (["--sweep", "seeds=1,2"], "give --seeds 0-4"),
        (["--sweep", "resume=True,False"], "--sweep does not take resume; give one command for each"),
        (["--sweep", "dataset=a,b"], "does not take dataset"),
        (["--sweep", "method.nothing=1,2"], "unknown flag --method.nothing"),
        (["--sweep", "transform=none,wrong"], "unknown transform 'wrong'"),
        (["--sweep", "transform=none,channel", "--split.val-fraction", "0"], "the recipe has none"),
        (["--json"], "give --seeds or --sweep"),
    ],
)
def test_a_sweep_that_cannot_be_run_is_one_line(
    more: list[str], complaint: str, tiny_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert complaint in fails(capsys, *words(tiny_file, *more, "--out", str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_another_recipe_is_not_mistaken_for_a_finished_cell(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--seeds", "0-1", "--out", str(tmp_path / "runs")]
    main(words(tiny_file, *more))
    assert "it is another recipe" in fails(capsys, *words(tiny_file, *more, "--method.optim.lr", "3"))


def test_names_of_cells_are_names_of_folders() -> None:
    (one, two) = sweep.grid(["network=convnet:depth=1,a/b"], [])
    assert (one.name, two.name) == ("network=convnet_depth=1", "network=a_b")
    with pytest.raises(ValueError, match="would share a run folder"):
        sweep.grid(["network=a/b,a:b"], [])
    with pytest.raises(ValueError, match="more than 10000"):
        sweep.grid(["a=" + ",".join(map(str, range(101))), "b=" + ",".join(map(str, range(101)))], [])
