"""Runs side by side in the terminal."""

import dataclasses
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import condense
from condense import overview, runs
from condense.cli import main
from condense.eval import results
from condense.eval.protocol import PROTOCOLS
from condense.eval.report import collect
from condense.eval.results import alike, fits
from condense.synthetic.labels import Logits
from condense.task import Split
from tests.conftest import TINY
from tests.test_graphs import ring, write_tu

pytestmark = pytest.mark.usefixtures("short_protocol")


@pytest.fixture(scope="module")
def folder(tiny_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs that were evaluated, of which one has a validation split, and one that was stopped."""
    root = tmp_path_factory.mktemp("runs")
    common: dict[str, Any] = {"dataset": tiny_file, "network": TINY, "device": "cpu"}
    condense.distill("dm", out=root / "a" / "dm", **common, ipc=2, num_steps=4, eval_every=2, batch_real=4)
    condense.distill("random", out=root / "random", **common, ipc=1, seed=3)
    condense.evaluate(root / "a" / "dm", networks=TINY, num_seeds=2, device="cpu")

    def stop(_: object, file: Path) -> None:
        if file.stem == "step_0000002":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("condense.engine.snapshot_steps", lambda total: {2})
        patch.setattr("condense.engine.save", stop)
        condense.distill("dm", out=root / "stopped", **common, ipc=1, num_steps=5, batch_real=4)
    return root


def test_scores_on_held_out_images_are_not_taken_for_test_accuracies(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though the user has given them the name of the file of test accuracies."""
    run, split = tmp_path / "run", Split(val_fraction=0.25)
    condense.distill("random", dataset=tiny_file, network=TINY, ipc=1, split=split, out=run, device="cpu")
    file = run / "evaluation.json"
    condense.evaluate(run, networks=TINY, num_seeds=1, split="validation", out=file, device="cpu")
    (listed,) = shown(capsys, "runs", str(run))["runs"]
    assert listed["accuracy"] is None and results.read_complete(file) == [] != results.read_complete(file, "validation")
    assert collect(run).results == [] == shown(capsys, "show", str(run))["results"]
    file.rename(run / "validation.json")
    assert len(shown(capsys, "show", str(run))["validation"]) == 1


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """Run a command with --json and return what it prints."""
    capsys.readouterr()
    main([*words, "--json"])
    return json.loads(capsys.readouterr().out)


def test_runs_are_listed_with_what_was_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dm, random, stopped = shown(capsys, "runs", str(folder))["runs"]
    assert dm["folder"] == str(folder / "a" / "dm") and dm["method"] == "dm" and dm["dataset"] == "tiny"
    (row,) = json.loads((folder / "a" / "dm" / "evaluation.json").read_text())["results"]
    assert (dm["accuracy"], dm["std"], dm["budget"], dm["steps"]) == (row["mean"], row["std"], "ipc 2", 4)
    log = [json.loads(line) for line in (folder / "a" / "dm" / "log.jsonl").read_text().splitlines()]
    validated = [line["val_accuracy"] for line in log if "val_accuracy" in line]
    assert len(validated) == 2
    assert (dm["best_val_accuracy"], dm["last_val_accuracy"]) == (max(validated), validated[-1])
    assert (random["state"], random["seed"], random["accuracy"], random["steps"]) == ("finished", 3, None, 1)
    assert random["minutes"] >= 0
    assert (stopped["state"], stopped["steps"], stopped["num_steps"]) == ("stopped", 2, 5)
    assert stopped["minutes"] is None
    main(["runs", str(folder)])
    text = capsys.readouterr().out
    assert "2 of 5" in text and "stopped" in text and f"{100 * row['mean']:.1f} ±" in text


def test_a_run_that_is_running_shows_as_such(folder: Path) -> None:
    with runs.held(folder / "stopped"):
        assert overview.summary(folder / "stopped").state == "running"
    assert overview.summary(folder / "stopped").state == "stopped"


def test_a_damaged_run_is_left_out_with_a_warning(folder: Path) -> None:
    damaged = folder / "damaged"
    damaged.mkdir()
    (damaged / "recipe.yaml").write_text("method: {name: dm}\ndataset: 3\n")
    try:
        with pytest.warns(UserWarning, match=r"damaged is left out: .*3 is not text"):
            assert len(overview.find_runs(folder)) == 3
    finally:
        (damaged / "recipe.yaml").unlink()
        damaged.rmdir()


def test_where_there_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        overview.find_runs(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        overview.find_runs(tmp_path / "none")


def test_tables_are_printed_as_json(folder: Path, tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(folder / "a" / "dm")
    summary = shown(capsys, "show", run)
    assert summary["facts"][run]["method"] == "dm"
    assert summary["results"] == json.loads(Path(run, "evaluation.json").read_text())["results"]
    words = ["evaluate", run, "--networks", TINY, "--num-seeds", "1", "--device", "cpu", "--protocol", "own"]
    (row,) = shown(capsys, *words, "--out", str(folder / "other.json"))["results"]
    assert row["protocol"] == "own" and row["n"] == 1
    words = ["apply", "continual", run, "--num-groups", "3", "--num-seeds", "1", "--network", "mlp", "--baselines"]
    findings = shown(capsys, *words, "--device", "cpu", "--out", str(folder / "continual.json"))
    assert findings["table"] == json.loads((folder / "continual.json").read_text())["table"]


def test_sets_are_compared_alike_and_seeds_are_pooled(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common: dict[str, Any] = {"dataset": tiny_file, "network": TINY, "device": "cpu", "ipc": 1}
    for seed in (0, 1):
        condense.distill("dm", out=tmp_path / f"dm{seed}", **common, num_steps=3, batch_real=4, seed=seed)
    condense.distill("random", out=tmp_path / "random", **common)
    np.savez(tmp_path / "set.npz", images=np.zeros((3, 1, 8, 8), np.float32), labels=np.arange(3))
    paths = [str(tmp_path / name) for name in ("dm0", "random", "dm1", "set.npz")]
    words = [*paths, "--dataset", str(tiny_file), "--networks", TINY, "mlp", "--num-seeds", "2", "--device", "cpu"]
    found = shown(capsys, "compare", *words)
    assert found["protocol"] == "canonical" and found["dataset"] == "tiny"
    names = ["dm, ipc 1 (2 seeds)", "random, ipc 1", paths[3]]
    assert [row["name"] for row in found["rows"]] == [name for name in names for _ in range(2)]
    rows = {path: json.loads(Path(path, "evaluation.json").read_text())["results"] for path in paths[:3]}
    means = {path: {(row["method"], row["network"]): row["mean"] for row in of} for path, of in rows.items()}
    full = [[row for row in rows[path] if row["method"] == "full"] for path in paths[:3]]
    assert full[0] and full[0] == full[1] == full[2], "trained once, the seconds too are equal"
    pooled = found["rows"][0]
    expected = [means[path]["dm", TINY] for path in (paths[0], paths[2])]
    assert pooled["accuracy"]["mean"] == pytest.approx(statistics.mean(expected))
    assert pooled["accuracy"]["between_distillations"] == pytest.approx(statistics.stdev(expected))
    assert pooled["gain"] == pytest.approx(statistics.mean(expected) - means[paths[0]]["random", TINY])
    assert pooled["share"] == pytest.approx(statistics.mean(expected) / means[paths[0]]["full", TINY])
    spread = next(row["std"] for row in rows[paths[0]] if (row["method"], row["network"]) == ("random", TINY))
    assert spread > 0 and pooled["random_std"] == pytest.approx(spread)
    assert found["table"]["rows"][0][6] == f"{100 * pooled['random']:.1f} ± {100 * spread:.1f}"
    assert found["rows"][2]["gain"] == 0.0 and found["rows"][2]["accuracy"]["between_distillations"] is None
    monkeypatch.setattr(overview.api, "evaluate", None)
    main(["compare", *paths[:3], "--networks", TINY, "mlp", "--num-seeds", "2", "--device", "cpu"])
    assert f"{100 * pooled['accuracy']['mean']:.1f} ±" in capsys.readouterr().out
    content = json.loads(Path(paths[0], "evaluation.json").read_text())
    for row in content["results"]:
        row["num_images"] += row["method"] == "random"
    Path(paths[0], "evaluation.json").write_text(json.dumps(content))
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        # random images of another budget do not serve: they are evaluated
        overview.compare(paths[:3], networks=[TINY, "mlp"], num_seeds=2, device="cpu")


def test_each_set_stands_beside_all_data_under_its_own_transform(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(tmp_path / transform) for transform in ("none", "channel")]
    for path in paths:
        condense.distill("random", dataset=tiny_file, out=path, ipc=1, transform=Path(path).name, device="cpu")
    words = [*paths, "--dataset", str(tiny_file), "--networks", "mlp", "--num-seeds", "1", "--device", "cpu"]
    found = shown(capsys, "compare", *words)
    full = [json.loads(Path(path, "evaluation.json").read_text())["results"][-1] for path in paths]
    assert [row["full"] for row in found["rows"]] == [row["mean"] for row in full]
    assert {row["method"] for row in full} == {"full"} and full[0]["metrics"]["nll"] != full[1]["metrics"]["nll"]


def test_random_sets_are_compared_with_others_every_time(tiny_file: Path, tmp_path: Path) -> None:
    """The results that the first comparison stored are those of the second one, also of sets with a decoder."""
    common: dict[str, Any] = {"dataset": tiny_file, "network": TINY, "device": "cpu", "ipc": 1}
    for seed in (1, 2):
        condense.distill("random", out=tmp_path / f"{seed}", **common, seed=seed)
    condense.distill("dm", out=tmp_path / "small", **common, num_steps=1, batch_real=4, decode="factor")
    paths = [str(tmp_path / name) for name in ("1", "2", "small")]
    first = overview.compare(paths, networks=TINY, num_seeds=1, device="cpu")
    assert len({path.stat().st_mtime_ns for path in tmp_path.glob("*/evaluation.json")}) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overview.api, "evaluate", None)
        assert overview.compare(paths, networks=TINY, num_seeds=1, device="cpu") == first
    assert first.rows[0].gain != 0


def test_other_test_images_are_measured_anew(tiny_file: Path, tmp_path: Path) -> None:
    data = tmp_path / "tiny.npz"
    shutil.copy(tiny_file, data)
    common: dict[str, Any] = {"network": TINY, "ipc": 1, "device": "cpu"}
    paths = [str(tmp_path / name) for name in ("a", "b")]
    for seed, path in enumerate(paths):
        condense.distill("random", dataset=data, out=path, seed=seed + 1, **common)
    fields: dict[str, Any] = {"networks": TINY, "num_seeds": 1, "device": "cpu"}
    content = dict(np.load(data))

    def prints(path: str) -> list[str]:
        return [row["test_fingerprint"] for row in json.loads(Path(path, "evaluation.json").read_text())["results"]]

    for path, test in ((paths[1], content["x_test"]), (paths[0], 255 - content["x_test"])):
        np.savez(data, **content | {"x_test": test})
        condense.evaluate(path, data, baselines=["random", "full"], **fields)
    assert {*prints(paths[0])}.isdisjoint(prints(paths[1]))
    overview.compare(paths, **fields)
    assert prints(paths[1])[3:] == prints(paths[0]) and len(prints(paths[1])) == 6
    with pytest.raises(ValueError, match=r"none\.npz"):
        overview.compare(paths, tmp_path / "none.npz", **fields)


def test_a_row_belongs_to_a_set_under_its_transform_and_its_teacher(tiny_file: Path, tmp_path: Path) -> None:
    syn = condense.distill("random", dataset=tiny_file, out=tmp_path / "run", ipc=1, network=TINY, device="cpu")
    row: dict[str, Any] = {"protocol_fields": {}, "transform": "channel", "teacher": ""}
    of_protocol = row | {"protocol_fields": {"teacher": "x@1"}, "teacher": "x@1"}
    assert all(fits(of, syn) for of in (row, of_protocol, {"protocol_fields": {}}))
    assert not any(fits(of, syn) for of in (row | {"transform": "zca"}, row | {"teacher": "x@1"}))


@pytest.mark.parametrize("protocol", ["soft-teacher", "pruned", "canonical"])
def test_results_of_every_protocol_are_found_again(protocol: str, tiny_file: Path, tmp_path: Path) -> None:
    syn = condense.distill("random", dataset=tiny_file, out=tmp_path / "run", ipc=1, network=TINY, device="cpu")
    short = dataclasses.replace(PROTOCOLS[protocol], num_epochs=1)
    found = condense.evaluate(tmp_path / "run", networks=TINY, num_seeds=1, protocol=short, device="cpu").results
    assert all(fits(result.row(), syn) for result in found)
    assert collect(tmp_path / "run").own_results


def test_results_of_graphs_are_found_again(tmp_path: Path) -> None:
    """The recipe names another transform than the one that graphs have, which is none."""
    folder = write_tu(tmp_path / "RINGS", [ring(4 + n % 3, n % 2) for n in range(20)], [0] * 10 + [1] * 10)
    condense.distill("random", dataset=folder, out=tmp_path / "run", ipc=1, device="cpu")
    short = dataclasses.replace(PROTOCOLS["graphs"], num_epochs=1)
    condense.evaluate(tmp_path / "run", networks="gin:width=8,depth=1", num_seeds=1, protocol=short, device="cpu")
    assert collect(tmp_path / "run").own_results


def test_the_compression_is_that_of_the_set(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    condense.distill("random", dataset=tiny_file, out=tmp_path / "run", ipc=1, network=TINY, device="cpu")
    for baselines in ("full", "random"):
        condense.evaluate(tmp_path / "run", networks=TINY, num_seeds=1, baselines=[baselines], device="cpu")
        rows = json.loads((tmp_path / "run" / "evaluation.json").read_text())["results"]
        own = next(row for row in rows if row["method"] == "random")
        main(["show", str(tmp_path / "run")])
        assert f"{own['compression']:,.1f} : 1" in capsys.readouterr().out


def test_moments_of_one_run_are_not_pooled(tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, later = tmp_path / "dm0", tmp_path / "dm1"
    common: dict[str, Any] = {"dataset": tiny_file, "network": TINY, "device": "cpu", "ipc": 1}
    for seed, out in enumerate((run, later)):
        condense.distill("dm", out=out, **common, num_steps=2, batch_real=4, seed=seed)
    begin = min((run / "snapshots").glob("*.safetensors"))
    words = ["--dataset", str(tiny_file), "--networks", TINY, "--num-seeds", "1", "--device", "cpu"]
    found = shown(capsys, "compare", str(run), str(begin), *words)
    assert [row["sets"] for row in found["rows"]] == [[str(run)], [str(begin)]]
    title, columns, rows = (found["table"][name] for name in ("title", "columns", "rows"))
    assert "tiny" in title and len(columns) == len(rows[0]) and rows[0][columns.index("bytes")] == "792"
    sets = {str(path): condense.load(path) for path in (run, begin, later)}
    assert alike(sets) == [[str(run)], [str(begin)], [str(later)]]
    del sets[str(begin)]
    assert alike(sets) == [[str(run), str(later)]]
    sets[str(later)].label_kind = Logits()
    assert alike({**sets, "images": None, "others": None}) == [[str(run)], [str(later)], ["images"], ["others"]]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(0.5, 0.1), (0.7, 0.3)], (0.6, 0.05**0.5, 0.02**0.5)),
        ([(0.5, None), (0.7, None)], (0.6, None, 0.02**0.5)),
        ([(0.5, 0.1)], (0.5, 0.1, None)),
    ],
)
def test_deviations_between_networks_and_distillations_are_kept_apart(
    rows: list[tuple[float, float | None]], expected: tuple[float, float | None, float | None]
) -> None:
    pooled = results.pool([{"mean": mean, "std": std, "n": 5} for mean, std in rows])
    found = (pooled.mean, pooled.between_networks, pooled.between_distillations)
    assert found == pytest.approx(expected)


def test_what_cannot_be_compared_is_one_line(folder: Path, tmp_path: Path, tiny_file: Path) -> None:
    one = str(folder / "random")
    for targets in ([], [one], [one, one]):
        with pytest.raises(ValueError, match="two or more different sets"):
            overview.compare(targets)
    with np.load(tiny_file) as arrays:
        np.savez(tmp_path / "other.npz", **{**arrays, "x_train": arrays["x_train"] + 1})
    condense.distill("random", dataset=tmp_path / "other.npz", network=TINY, ipc=1, out=tmp_path / "other")
    with pytest.raises(ValueError, match=r"random is of tiny .*, .*other of other .*; compare sets of one data set"):
        overview.compare([one, tmp_path / "other"])
