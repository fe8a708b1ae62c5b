"""The queue that measures results, its records, and the pages made from them."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from benchmarks import choices, decoupled, harness, labels, methods, pruning, studies
from benchmarks.harness import Provenance
from benchmarks.results import __main__ as results
from benchmarks.results import page, queue, record, table
from benchmarks.results.published import published
from benchmarks.results.queue import STEPS, Failed, Queue, Stopped
from benchmarks.results.table import Row
from condense import api, artifacts, cli, experiment, recipe
from condense.buffers import trajectories
from condense.commands import Buffer
from condense.data import datasets
from condense.data.datasets import Arrays
from condense.files import locked

ROOT = Path(__file__).parents[1]
TINY = "convnet:depth=1,width=4"
WHERE = Provenance(commit="abc", date="2026-01-01", device="cpu", threads=1, torch="2")
ROW = Row(
    name="toy-dm",
    dataset="toy",
    ipc=1,
    method="dm",
    minutes=1.0,
    flags=f"--network {TINY} --method.num-steps 2 --method.batch-real 4",
    scoring=f"--protocol canonical --networks {TINY} --num-seeds 2 --protocol.num-epochs 2",
)


@pytest.fixture
def work(tmp_path: Path) -> Queue:
    generator = np.random.default_rng(0)
    data = {f"x_{part}": generator.random((12, 8, 8, 1), dtype=np.float32) for part in ("train", "test")}
    data |= {f"y_{part}": np.arange(12) % 3 for part in ("train", "test")}
    np.savez(tmp_path / "toy.npz", **data)
    places: dict[str, Any] = {
        "data": {"toy": tmp_path / "toy.npz"},
        "work": tmp_path / "work",
        "rows": tmp_path / "rows",
    }
    return Queue(threads=1, commit=lambda: "abc", **places)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands run in this process; returns the list of those that were run."""
    done: list[list[str]] = []

    def run(self: Queue, words: Sequence[str], row: Row, until: Path | None = None) -> str:
        done.append([*words])
        if time.monotonic() > self.deadline:
            raise Stopped
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert cli.main([str(self.data["toy"]) if word == "toy" else word for word in words]) in (0, None)
        return out.getvalue()

    monkeypatch.setattr(Queue, "run", run)
    return done


def test_a_row_is_measured_once_and_written(work: Queue, here: list[list[str]]) -> None:
    measured = work.measure(ROW)
    assert record.read_all(work.rows) == {"toy-dm": measured}
    assert measured.protocols == ["canonical*"]  # the star says that a field was changed
    assert len(measured.accuracies("canonical*")) == 4  # two distillations with two networks each
    assert (measured.num_images, measured.labels, measured.num_steps) == (3, "hard", 2)
    assert [d.seed for d in measured.distillations] == [0, 1]
    assert measured.distillations[1].command.startswith("condense distill dm --dataset toy --ipc 1 --seed 1")
    assert all(d.minutes > 0 and d.cpu_minutes > 0 for d in measured.distillations)
    here.clear()
    assert work.measure(ROW).distillations == measured.distillations
    assert here == []


def test_other_settings_do_not_read_the_run_of_the_old_ones(work: Queue, here: list[list[str]]) -> None:
    other = dataclasses.replace(ROW, ipc=2)
    assert work.folder(other) != work.folder(ROW)


def test_rows_with_the_same_buffer_share_it(work: Queue, here: list[list[str]]) -> None:
    flags = f"--network {TINY} --num-experts 1 --num-epochs 2"
    steps = "--method.num-steps 1 --method.syn-steps 1 --method.expert-epochs 1 --method.max-start-epoch 1"
    row = dataclasses.replace(
        ROW, name="toy-mtt", method="mtt", buffer=flags, flags=f"--network {TINY} {steps}", distillations=1
    )
    first = work.measure(row)
    work.measure(dataclasses.replace(row, name="toy-mtt-too"))
    assert [words[0] for words in here].count("buffer") == 1
    assert first.buffer == f"condense buffer --dataset toy {flags}" and first.buffer_minutes > 0


def test_the_number_of_steps_fits_the_budget(work: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight seconds of the processors to begin with and 0.4 a step fill a minute of two cores with 280 steps. All runs
    have the arithmetic that the longest run chooses."""
    seen = []

    def run(self: Queue, words: Sequence[str], row: Row, until: Path | None = None) -> str:
        out, steps = Path(words[words.index("--out") + 1]), int(words[words.index(STEPS) + 1])
        out.mkdir(parents=True)
        if until:
            until.write_text("compute: {exact: false, compile: true, autocast: bfloat16, micro_batch: null}")
        else:
            seen.append((steps, "--compute.autocast bfloat16" in " ".join(words)))
            (out / "run.json").write_text(json.dumps({"cpu_seconds": 8.0 + 0.4 * steps}))
        return ""

    monkeypatch.setattr(Queue, "run", run)
    row = dataclasses.replace(ROW, flags=f"--network {TINY} --compute.compile True")
    long = "--compute.exact False --compute.autocast bfloat16"
    assert shlex.join(work.words(row, 0, work.work)).endswith(f"--compute.compile True {long} {STEPS} 280")
    assert seen == [(steps, True) for steps in (2, 2, 8, 32, 128)]
    assert STEPS not in work.words(dataclasses.replace(row, method="random"), 0, work.work)
    assert STEPS not in work.words(dataclasses.replace(row, device="cuda"), 0, work.work)
    shutil.rmtree(work.work)
    assert work.words(dataclasses.replace(row, minutes=0.05), 0, work.work)[-2:] == [STEPS, "1"]
    assert queue.fitting(lambda steps: float(steps), 60.0, most=20) == 20


def test_a_trial_of_the_arithmetic_ends_when_the_recipe_is_written(work: Queue) -> None:
    out = work.work / "run"
    words = ["distill", "dm", "--dataset", "toy", "--ipc", "1", "--network", TINY, STEPS, "1000000", "--out", str(out)]
    assert work.run(words, ROW, until=out / "recipe.yaml") == ""
    assert "compute:" in (out / "recipe.yaml").read_text() and not (out / queue.SET).exists()


def test_the_minutes_of_a_distillation_include_what_it_trains(work: Queue) -> None:
    """Another distillation finds no network of this one, and this one found none: each has a cache of its own."""
    flags = ["--dataset", "toy", "--ipc", "1", "--network", TINY, "--method.num-epochs", "1", "--device", "cpu"]
    work.run(["distill", "herding", *flags, "--out", str(work.work / "0")], ROW)
    assert len(list((work.work / "0-cache" / "networks").iterdir())) > 0


def test_time_that_was_lost_is_spent_again(work: Queue, here: list[list[str]]) -> None:
    """The cache of a process that ended before it noted its time has networks whose training would not count."""
    lost = work.folder(ROW) / "0-cache" / "networks"
    lost.mkdir(parents=True)
    work.measure(ROW)
    assert not lost.exists()


def test_a_second_queue_in_a_folder_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["results", "--work", str(tmp_path), "--only", "digits-1-dm"])
    monkeypatch.setattr(results, "measured", lambda rows: {})
    with locked(tmp_path / "queue"):
        assert results.main() == 2
    assert re.fullmatch(r"results: process .* measures in .*; wait for its end, or .*\n", capsys.readouterr().err)


def test_a_set_whose_run_did_not_end_is_finished_first(work: Queue, here: list[list[str]]) -> None:
    """A process may be killed when its set is written and its record is not."""
    work.measure(ROW)
    (work.folder(ROW) / "results-0.json").unlink()
    file = work.folder(ROW) / "0" / "run.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps({name: facts[name] for name in ("cpu_seconds", "seconds", "dataset", "steps")}))
    here.clear()
    measured = work.measure(ROW)
    assert [words[0] for words in here] == ["distill", "evaluate"] and measured.provenance.device


def test_a_record_names_the_commits_and_the_machines_that_made_its_parts(
    work: Queue, here: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "machine", lambda device: "slow")
    with pytest.raises(Stopped):
        dataclasses.replace(work, commit=lambda: "old", deadline=0.0).measure(ROW)
    monkeypatch.setattr(queue, "machine", lambda device: "fast")
    measured = work.measure(ROW)
    assert measured.provenance.commit == "old, abc" and measured.machine == "slow, fast"
    assert dataclasses.replace(work, commit=lambda: "new").measure(ROW) == measured


def test_a_queue_whose_time_is_over_leaves_the_row_open(work: Queue, here: list[list[str]]) -> None:
    with pytest.raises(Stopped):
        dataclasses.replace(work, deadline=0.0).measure(ROW)
    assert record.read_all(work.rows) == {}


def test_a_running_command_is_stopped_at_the_deadline_and_an_error_is_one_line(work: Queue) -> None:
    with pytest.raises(Failed, match=r"^condense distill dn: condense: unknown method or recipe 'dn'"):
        work.run(["distill", "dn"], ROW)
    assert queue._last_words(-9, "") == "signal 9 ended it"
    assert queue._last_words(1, " \n") == "it ended with status 1"
    words = ["distill", "dm", "--dataset", "digits", "--out", str(work.work)]
    with pytest.raises(Stopped):  # the thousands of steps that are the default would take hours
        dataclasses.replace(work, deadline=time.monotonic() + 0.1).run(words, ROW)


def test_rows_of_a_gpu_begin_with_the_largest_gain_per_minute() -> None:
    row = dataclasses.replace(ROW, dataset="cifar10", ipc=10, device="cuda")
    slow, quick, unknown = (
        dataclasses.replace(row, name=name, method=method, minutes=minutes)
        for name, method, minutes in [("a", "rcig", 9.0), ("b", "dm", 2.0), ("c", "dd", 1.0)]
    )
    assert [r.name for r in queue.order([unknown, slow, quick])] == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("rows: [{method: dm, ipc: 0}]", "ipc, distillations, tried and minutes must be positive"),
        ("rows: [{method: dm, steps: 3}]", "there is no field 'steps'"),
        ("rows: [{method: dm}, {method: dm}]", "two rows are named s-dm; give one a label"),
        ("rows: [{method: dm, dataset: b}]", "s-dm has the data set b, for which data names no file"),
        ("rows: [{use: pool}]", "there are no settings 'pool'"),
        ("rows: [{use: 5}]", "use is 5; give the name of settings, or a list of names"),
        ("rows: [{use: [5]}]", "there are no settings 5"),
        ("rows: [{method: dm, tried: 3}]", "say in chosen how this one was chosen"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "table.yaml"
    common = "common: {dataset: a, ipc: 1, minutes: 1}"
    file.write_text(f"data: {{a: a.npz}}\nsections:\n- {{name: s, title: t, {common}, {line}}}\n")
    with pytest.raises(ValueError, match=says):
        table.read(file)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sections: 5", "sections: 5 is not a list"),
        ("sections: [{title: t, rows: []}]", "the field 'name' is missing"),
        ("sections: [{name: s, title: 5, rows: []}]", "title: 5 is not text"),
        ("sections: [{name: s, title: t, rows: [dm]}]", "rows: 'dm' is not a mapping"),
        ("sections: [{name: s, title: t, common: [1], rows: []}]", r"common: \[1\] is not a mapping"),
        ("settings: {a: 3}\nsections: [{name: s, title: t, rows: [{use: a}]}]", "settings, a: 3 is not a mapping"),
    ],
)
def test_a_table_of_another_form_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "table.yaml").write_text(text)
    with pytest.raises(ValueError, match=says):
        table.read(tmp_path / "table.yaml")


@pytest.mark.parametrize("name", ["data", "settings", "terms", "zoo"])
def test_parts_of_a_table_are_mappings(tmp_path: Path, name: str) -> None:
    (tmp_path / "table.yaml").write_text(f"{name}: [3]\n")
    with pytest.raises(ValueError, match=rf"table\.yaml, {name}: \[3\] is not a mapping"):
        table.read(tmp_path / "table.yaml")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--data", "nowhere"], "results: there is no folder nowhere; give --data the folder of the .npz files"),
        (["--only", "fm-1-pol"], "results: no row is named fm-1-pol: did you mean 'fm-1-pool'?"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["results", *words])
    assert results.main() == 2
    said = capsys.readouterr()
    assert said.err.startswith(says) and said.err.count("\n") == 1 and not said.out


def made(row: Row, labels: str = "hard", **accuracies: Sequence[float]) -> record.Record:
    scores = tuple(
        record.Score(method=row.method, network=TINY, protocol=name, accuracies=tuple(values), seed=0, seconds=1.0)
        for name, values in accuracies.items()
    )
    distillation = record.Distillation(seed=0, command="condense distill", minutes=3.0, cpu_minutes=2.0, scores=scores)
    facts: dict[str, Any] = {"decode": "pixels", "num_images": 10, "bytes": 100, "num_steps": 5}
    facts |= {"provenance": WHERE, "evaluation": "condense evaluate"}
    return record.Record(row=row, labels=labels, distillations=(distillation,), **facts)


def test_the_page_shows_rows_with_the_best_first_and_what_is_open(tmp_path: Path) -> None:
    rows = [
        dataclasses.replace(ROW, name=f"fm-{method}", method=method, dataset="fashion-mnist", ipc=10)
        for method in ("random", "frepo", "dm", "mtt")
    ]
    section = table.Section(title="Ten images", rows=tuple(rows))
    whole = table.Table(data={"fashion-mnist": "x"}, sections=(section,))
    records = {
        "fm-random": made(rows[0], canonical=[0.7, 0.72]),
        "fm-frepo": made(rows[1], "targets", own=[0.86, 0.88], canonical=[0.5, 0.5]),
        "fm-dm": made(rows[2], own=[0.80, 0.80], canonical=[0.81, 0.83]),
    }
    text = page.page(whole, records, tmp_path)
    assert "| `fm-frepo` | soft (targets) | 5 | 2.0 | 100 | **87.0 ± 1.4** | 50.0 ± 0.0 |" in text
    assert "**82.0 ± 1.4**" in text and "Not measured yet: `fm-mtt`." in text
    assert text.index("`fm-frepo` |") < text.index("`fm-dm` |") < text.index("`fm-random` |")
    assert "86.2 ± 0.2 (unverified)" in text and str(published("random", "fashion-mnist", 10)) == "73.8 ± 0.7"
    best = page.best_rows(whole, records)
    decoded = dataclasses.replace(records["fm-frepo"], decode="factor")
    assert "| `fm-frepo`, decoder `factor` | soft (targets) |" in page.page(whole, {"fm-frepo": decoded}, tmp_path)
    assert "| `frepo`, decoder `factor` | 87.0 ± 1.4 |" in page.best_rows(whole, {"fm-frepo": decoded})
    assert "| fashion-mnist | 10 | `frepo` | 87.0 ± 1.4 | 50.0 ± 0.0 | 2.0 | 71.0 ± 1.4 | 86.2 ± 0.2" in best
    soft = dataclasses.replace(ROW, name="fm-soft", method="random", dataset="fashion-mnist", ipc=10)
    assert "| 71.0 ± 1.4 |" in page.best_rows(whole, records | {"fm-soft": made(soft, "teacher", canonical=[0.1, 0.1])})
    (figure,) = page.figures(whole, records).values()
    assert figure.startswith("<?xml") and "fm-frepo" in figure


def test_all_training_data_have_a_line_and_no_column(tmp_path: Path) -> None:
    row = dataclasses.replace(ROW, name="fm-dm", dataset="fashion-mnist", ipc=10)
    whole = made(row, own=[0.8, 0.82])
    full = record.Score(method="full", network=TINY, protocol="full-data", accuracies=(0.9, 0.94), seed=0, seconds=1.0)
    one = dataclasses.replace(whole.distillations[0], scores=(*whole.distillations[0].scores, full))
    measured = dataclasses.replace(whole, distillations=(one, one))
    assert measured.protocols == ["own"] and len(measured.accuracies("own")) == 4
    section = table.Section(title="Ten images", rows=(row,))
    text = page.section(section, {"fm-dm": measured})
    assert f"All training data under `full-data` on {TINY}: 92.0 ± 2.8 (n = 2)." in text
    assert text.count("full-data") == 1
    whole_table = table.Table(data={"fashion-mnist": "x"}, sections=(section,))
    (with_full,) = page.figures(whole_table, {"fm-dm": measured}).values()
    (without,) = page.figures(whole_table, {"fm-dm": whole}).values()
    assert "all training data" in with_full and "all training data" not in without


def test_every_architecture_has_a_column_and_a_section_may_show_areas() -> None:
    row = dataclasses.replace(ROW, name="graphs-mirage", method="mirage")
    scored = record.Score(method="mirage", network="gin", protocol="graphs", accuracies=(0.5, 0.7), seed=0, seconds=1.0)
    scores = (dataclasses.replace(scored, auc=(0.6, 0.8)), dataclasses.replace(scored, network="gat"))
    whole = made(row)
    measured = dataclasses.replace(whole, distillations=(dataclasses.replace(whole.distillations[0], scores=scores),))
    header, _, line = page.tables([measured], auc=True)
    assert "| `graphs`, gin | `graphs`, gat |" in header
    assert "| **60.0 ± 14.1** (AUC 70.0) | **60.0 ± 14.1** |" in line
    assert "AUC" not in page.tables([measured], auc=False)[2]
    beside = made(dataclasses.replace(ROW, name="graphs-random", method="random"), own=[0.5, 0.7])
    lines = page.tables([measured, beside], auc=False)
    assert "| `graphs`, gat |" in lines[lines.index("Across architectures:") + 2] and "gat" not in lines[0]
    assert page.best_rows(table.Table(data={}, sections=()), {row.name: measured}) == ""


def test_other_benchmarks_have_tables_of_their_records(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"network": TINY, "num_seeds": 2, "dataset": "toy", "ipc": 1, "provenance": WHERE}
    accuracies = {column: [0.5, 0.7] for column in decoupled.COLUMNS}
    sizes = {column: [1000, 2000] for column in decoupled.COLUMNS}
    rows = [
        decoupled.Row(
            fingerprint="0", method=method, accuracies=accuracies, bytes=sizes, seconds=3.0, minutes=1.0, **facts
        )
        for method in ("sre2l", "random")
    ]
    kinds = labels.Rows(
        fingerprint="0",
        images=7000,
        rows=(labels.Row(labels="online", accuracies=(0.5, 0.7), bytes=1500, encoder=1000, minutes=1.0),),
        **facts,
    )
    share: dict[str, Any] = {"method": "random", "accuracies": (0.5, 0.7), "network": TINY, "num_images": 3}
    curves = pruning.Curves(
        dataset="toy",
        command="condense apply pruning toy.npz",
        minutes=2.0,
        provenance=WHERE,
        accuracy_of_teacher=0.9,
        accuracies=tuple(pruning.Accuracy(fraction=f, teacher=t, **share) for t in (False, True) for f in (0.3, 0.1)),
    )
    short = methods.Row(
        method="dm",
        recipe="dm-digits-ipc1",
        ipc=1,
        num_seeds=2,
        draws=2,
        learned=(0.5, 0.7),
        random=(0.4, 0.4, 0.4, 0.4),
        seconds=12.3,
        provenance=WHERE,
    )
    files = {
        "methods/dm": short,
        "decoupled/toy/sre2l-1": rows[0],
        "decoupled/toy/random-1": rows[1],
        "labels/toy": kinds,
        "pruning/toy": curves,
    }
    for name, content in files.items():
        (tmp_path / "results" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(dataclasses.asdict(content)))
    text = page.page(table.Table(data={}, sections=()), {}, tmp_path)
    cells = "1 | 60.0 ± 14.1 | 60.0 ± 14.1 | 60.0 ± 14.1 | 1 | 2 | 2 | 2 | 3 | 1.0 |"
    assert f"| `random` | {cells}\n| `sre2l` | {cells}" in text
    assert "| online | 60.0 ± 14.1 | 1,500 | 1,000 | 1.0 |" in text
    assert "| images kept by | teacher | 10 % | 30 % |" in text
    assert "| `random` | yes | 60.0 ± 14.1 | 60.0 ± 14.1 |" in text
    assert "| `dm-digits-ipc1` | 1 | 60.0 ± 14.1 | 40.0 ± 0.0 | 12 |" in text
    assert text.count("Commit abc, cpu, threads 1, torch 2, 2026-01-01") == 4


def test_the_time_of_a_distillation_is_that_of_its_run(
    tiny: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the row is measured after an interruption, when the set is there already."""
    monkeypatch.setattr(decoupled.Bench, "teacher", tmp_path)
    monkeypatch.setattr(decoupled.Bench, "labelled", lambda self, syn, kind: syn)
    monkeypatch.setattr(decoupled.Bench, "score", lambda *_: (0.5,))
    device = torch.device("cpu")
    bench = decoupled.Bench(
        arrays=tiny, network=TINY, num_seeds=2, device=device, folder=tmp_path, name="tiny", provenance=WHERE
    )
    first = bench.row("random", 1)
    for seed in range(2):
        file = tmp_path / f"random-1-{seed}" / "run.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "seconds": 100.0}))
    again = bench.row("random", 1)
    assert 0 < first.seconds < 100 and again.seconds == pytest.approx(200, abs=9)
    assert again.minutes >= again.seconds / 60


def test_rows_of_labels_are_continued_by_the_same_code_alone(tmp_path: Path) -> None:
    facts: dict[str, Any] = {
        "dataset": "toy",
        "fingerprint": "0",
        "network": TINY,
        "ipc": 1,
        "num_seeds": 2,
    }
    file, later = tmp_path / "labels.json", dataclasses.replace(WHERE, date="2026-01-02")
    row = labels.Row(labels="online", accuracies=(0.5, 0.7), bytes=1500, encoder=1000, minutes=1.0)
    assert labels.begun(file, facts, WHERE) is None
    made = labels.Rows(**facts, images=9, provenance=WHERE, rows=(row,))
    file.write_text(json.dumps(dataclasses.asdict(made)))
    assert labels.begun(file, facts, later) == made
    for given, now in ((facts, dataclasses.replace(WHERE, commit="abd")), ({**facts, "ipc": 10}, WHERE)):
        with pytest.raises(
            ValueError, match=r"labels.json (has rows of C|was measured with ipc 1, n).*; give another p"
        ):
            labels.begun(file, given, now)


def test_rows_of_labels_are_looked_at_before_a_teacher_is_trained(
    tiny_classes: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(api, "make_buffer", None)
    (tmp_path / "labels.json").write_text("{}")
    words = ["labels", str(tmp_path / "toy.npz"), "--network", TINY, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    assert harness.status("labels", labels.main) == 2
    assert "labels.json: the field 'dataset' is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--only", "sre2l", "rdd"], "decoupled: there are no settings of 'rdd': did you mean 'rded'?"),
        (["--num-seeds", "0"], "0 is no whole number of at least 1"),
        (["--ipc", "10", "0"], "0 is no whole number of at least 1"),
    ],
)
def test_names_and_numbers_are_checked_before_a_teacher_is_trained(
    words: list[str],
    says: str,
    tiny_classes: Arrays,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(api, "make_buffer", None)
    places = [str(tmp_path / "toy.npz"), "--network", TINY, "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["decoupled", *places, *words])
    with contextlib.suppress(SystemExit):
        assert harness.status("decoupled", decoupled.main) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_settings_of_decoupled_methods_decide_whether_a_row_is_kept(
    tiny_classes: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: dict[str, Any] = {"device": torch.device("cpu"), "folder": tmp_path, "name": "toy", "provenance": WHERE}
    bench = decoupled.Bench(arrays=tiny_classes, network=TINY, num_seeds=2, **places)
    first = {method: bench.settings(method, 1) for method in decoupled.SETTINGS}
    monkeypatch.setitem(decoupled.SETTINGS, "cda", {**decoupled.RECOVERY, "num_steps": 3})
    assert [method for method in first if bench.settings(method, 1) != first[method]] == ["cda"]
    monkeypatch.setattr(decoupled, "TEACHER", dataclasses.replace(decoupled.TEACHER, num_epochs=3))
    assert all(bench.settings(method, 1) != first[method] for method in first)


def test_a_method_whose_row_is_there_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = []

    def measure(name: str, folder: Path, num_seeds: int, draws: int) -> methods.Row:
        measured.append(name)
        found: dict[str, Any] = {"learned": (0.5,), "random": (0.4,), "seconds": 1.0, "provenance": WHERE}
        chosen = f"{name}-digits-ipc1"
        return methods.Row(method=name, recipe=chosen, ipc=1, num_seeds=num_seeds, draws=draws, **found)

    monkeypatch.setattr(methods, "measure", measure)
    words = ["methods", "--only", "dm", "dc", "--rows", str(tmp_path)]
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", words)
        assert harness.status("methods", methods.main) == 0
        assert "| `dc-digits-ipc1` | 1 | 50.0 | 40.0 | 1 |" in capsys.readouterr().out
    assert measured == ["dm", "dc"]
    monkeypatch.setattr(sys, "argv", [*words, "--num-seeds", "2"])
    assert harness.status("methods", methods.main) == 2
    assert "was measured with num_seeds 3, not 2; give another place with --rows" in capsys.readouterr().err
    for wrong in (
        ["--only", "herding", "--rows", str(tmp_path)],
        ["--only", "dm", "--rows", str(tmp_path / "dm.json")],
    ):
        monkeypatch.setattr(sys, "argv", ["methods", *wrong])
        assert harness.status("methods", methods.main) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert measured == ["dm", "dc"], "a folder that cannot be written is refused first"
    (tmp_path / "dc.json").unlink()
    monkeypatch.setattr(sys, "argv", [*words[:3], "dc", "nothing", *words[4:]])
    assert harness.status("methods", methods.main) == 2 and measured == ["dm", "dc"], "all names are checked first"


def test_the_experts_of_a_method_decide_whether_its_row_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = {name: recipe.named(f"{name}-digits-ipc1") for name in ("dm", "mtt")}
    first = {name: methods.settings(plan) for name, plan in plans.items()}
    assert methods.settings(dataclasses.replace(plans["dm"], augment="none")) != first["dm"]
    monkeypatch.setattr(methods, "EXPERTS", dataclasses.replace(methods.EXPERTS, lr=0.5))
    assert [name for name in plans if methods.settings(plans[name]) != first[name]] == ["mtt"]


def test_a_recipe_is_measured_on_the_device_that_its_row_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices, run, plan = [], api.run, recipe.named("dm-digits-ipc1")

    def noted(*args: Any, device: str, **options: Any) -> SimpleNamespace:
        devices.append(device)
        return SimpleNamespace(results=[SimpleNamespace(accuracies=(0.5,))])

    def noted_run(plan: Any, options: api.RunOptions, **others: Any) -> Any:
        devices.append(options.device)
        return run(plan, options, **others)

    monkeypatch.setattr(api, "run", noted_run)
    monkeypatch.setattr(api, "evaluate", noted)
    monkeypatch.setattr(api, "make_buffer", noted)
    methods.make_buffers(recipe.named("mtt-digits-ipc1"), tmp_path)
    short = dataclasses.replace(plan, method=dataclasses.replace(plan.method, num_steps=1))
    monkeypatch.setattr(recipe, "named", lambda name: short)
    row = methods.measure("dm", tmp_path, num_seeds=1)
    assert devices == ["cpu"] * 5 and row.provenance.device == "cpu" and row.settings == methods.settings(short)


STUDY = """
tiny:
  title: A study
  data: {digits: null}
  commands:
  - distill random --dataset digits --ipc 1 --network mlp --out set
  - apply probe set --backbones none
"""


def test_a_study_goes_on_with_the_command_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "studies.yaml"
    monkeypatch.setattr(studies, "STUDIES", table)
    words = ["studies", str(tmp_path), "--work", str(tmp_path / "work"), "--rows", str(tmp_path / "rows")]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(harness, "commit", lambda: "a")
    table.write_text(STUDY)
    assert harness.status("studies", studies.main) == 2 and not (tmp_path / "rows").exists()
    (tmp_path / "work" / "tiny" / "set" / "kept").touch()
    better = "apply privacy set --network mlp --num-seeds 1 --num-epochs 1"
    table.write_text(STUDY.replace("apply probe set --backbones none", better))
    assert harness.status("studies", studies.main) == 0 and (tmp_path / "work" / "tiny" / "set" / "kept").exists()
    printed = capsys.readouterr().out
    monkeypatch.setattr(studies, "measure", None)
    assert harness.status("studies", studies.main) == 0 and capsys.readouterr().out in printed
    assert f"    condense {better}" in printed and "| trained on | attack AUC |" in printed
    table.write_text(STUDY)
    with pytest.raises(ValueError, match=r"tiny.json was measured with another study; give another place with --rows"):
        studies.main()


def test_commands_of_a_study_after_a_changed_one_are_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def run(words: Sequence[str], folder: Path) -> str:
        done.append(words[0])
        (folder / words[words.index("--out") + 1]).mkdir()
        if words[0] == "stop":
            raise KeyboardInterrupt
        return json.dumps({"table": {"title": "t", "columns": [], "rows": []}})

    def measured(*commands: str) -> list[str]:
        done.clear()
        with contextlib.suppress(KeyboardInterrupt):
            studies.measure(studies.Study(title="s", data={}, commands=commands), tmp_path, tmp_path / "work")
        return [*done]

    monkeypatch.setattr(studies, "_run", run)
    monkeypatch.setattr(harness, "commit", lambda: "a")
    last = "apply --out c"
    assert measured("buffer --out a", "stop --out b", last) == ["buffer", "stop"]
    assert measured("buffer --out a", "distill --out b", last) == ["distill", "apply"]
    assert measured("buffer --out a", "distill --out b", last) == []
    assert measured("buffer 2 --out a", "stop --out b", last) == ["buffer", "stop"]
    assert measured("buffer 2 --out a", "distill --out b", last) == ["distill", "apply"]


def test_commands_of_a_study_are_run_again_by_other_code_and_with_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    code = ["a"]

    def run(words: Sequence[str], folder: Path) -> str:
        done.append(words[0])
        return json.dumps({"table": {"title": "t", "columns": [], "rows": []}})

    def measured(folder: str) -> str:
        done.clear()
        return studies.measure(study, tmp_path / folder, tmp_path / "work").provenance.commit

    monkeypatch.setattr(studies, "_run", run)
    monkeypatch.setattr(harness, "commit", lambda: code[-1])
    study = studies.Study(title="s", data={"toy": "toy.npz"}, commands=("distill toy", "apply a"))
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "toy.npz").touch()
    assert measured("one") == "a" and done == ["distill", "apply"]
    assert measured("one") == "a" and done == []
    assert measured("two") == "a" and done == ["distill", "apply"]
    for commit in ("b", "b+", "b+", ""):  # changes that were not committed have no name
        code.append(commit)
        assert measured("two") == commit and done == ["distill", "apply"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: {title: A, data: {}, commands: [list methods]}", "the last command of the study 'A' prints no table"),
        ("a: {title: A, data: {x: x.npz}, commands: [apply nas x]}", "there is no file"),
        ("[]", "has no studies by name"),
        ("b: {title: B, data: {}, commands: [apply nas x]}", "there is no study 'a'"),
    ],
)
def test_wrong_studies_are_one_line(text: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "STUDIES", tmp_path / "studies.yaml")
    (tmp_path / "studies.yaml").write_text(text)
    words = ["studies", str(tmp_path), "--only", "a", "--work", str(tmp_path), "--rows", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(ValueError, match=line):
        studies.main()


def test_the_committed_studies_are_read() -> None:
    assert all(study.commands for study in studies.read(studies.STUDIES).values())


def test_a_choice_scores_each_combination_on_held_out_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(choices, "CHOICES", tmp_path / "choices.yaml")
    (tmp_path / "choices.yaml").write_text('random: ["ipc=1,20", "network=mlp"]')
    monkeypatch.setattr(sys, "argv", ["choices", "--rows", str(tmp_path)])
    plans, splits, (run, evaluate) = [], [], (api.run, api.evaluate)
    monkeypatch.setattr(api, "run", lambda plan, options: plans.append(plan) or run(plan, options))
    monkeypatch.setattr(api, "evaluate", lambda *a, split, **b: splits.append(split) or evaluate(*a, split=split, **b))
    assert harness.status("choices", choices.main) == 0
    assert [(plan.ipc, plan.seed, plan.split.val_fraction) for plan in plans] == [
        (1, 0, 0.2),
        (1, 1, 0.2),
        (20, 0, 0.2),
        (20, 1, 0.2),
    ]
    assert splits == ["validation"] * 4
    choice = harness.read(choices.Choice, tmp_path / "random.json")
    assert [len(one.accuracies) for one in choice.tried] == [4, 4]
    assert choice.ranked[0].values["ipc"] == "20", "more images are better"
    assert "random:\n  `ipc 20`, `network mlp`: " in capsys.readouterr().out
    assert "| `random` | 2 | `ipc 20`, `network mlp` | " in "\n".join(choices.tables(tmp_path))
    monkeypatch.setattr(choices, "measure", None)
    assert harness.status("choices", choices.main) == 0
    plan = recipe.named("random")
    monkeypatch.setattr(recipe, "named", lambda name: dataclasses.replace(plan, ipc=20, network="mlp"))
    assert harness.status("choices", choices.main) == 0, "the recipe may have the values that were chosen"
    monkeypatch.setattr(choices, "NUM_NETWORKS", 3)
    assert harness.status("choices", choices.main) == 2
    assert "random.json was measured with other settings; give another place" in capsys.readouterr().err


def test_a_choice_for_the_training_of_a_row_needs_one_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "table.yaml").write_text(
        "data: {digits: null}\n"
        "sections: [{name: a, title: A, common: {dataset: digits, ipc: 2, minutes: 1}, "
        "rows: [{method: random, flags: --network mlp}]}]"
    )
    (tmp_path / "choices.yaml").write_text('a-random: ["protocol.num-epochs=1,50"]')
    monkeypatch.setattr(choices, "CHOICES", tmp_path / "choices.yaml")
    monkeypatch.setattr(choices, "TABLE", tmp_path / "table.yaml")
    monkeypatch.setattr(sys, "argv", ["choices", "--rows", str(tmp_path)])
    plans, run = [], api.run
    monkeypatch.setattr(api, "run", lambda plan, options: plans.append(plan) or run(plan, options))
    assert harness.status("choices", choices.main) == 0
    assert [(plan.ipc, plan.network, plan.seed, plan.split.val_fraction) for plan in plans] == [
        (2, "mlp", 0, 0.2),
        (2, "mlp", 1, 0.2),
    ]
    choice = harness.read(choices.Choice, tmp_path / "a-random.json")
    assert [len(one.accuracies) for one in choice.tried] == [4, 4]
    assert choice.ranked[0].values == {"protocol.num-epochs": "50"}, "a longer training is better"


def test_a_choice_for_a_row_needs_its_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fm-1-pool needs the file of fashion-mnist; give --data"):
        choices.measure("fm-1-pool", ["protocol.lr=0.1,1"], tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[]", "is no mapping of recipes"),
        ("a: b", "is no mapping of recipes"),
        ("a: [ipc=1]", "has no recipe or row 'random'"),
        ("random: [ipc=1]", "random has nothing to choose from"),
        ('random: ["ipx=1,2"]', "--ipx"),
    ],
)
def test_wrong_choices_are_one_line(text: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "CHOICES", tmp_path / "choices.yaml")
    (tmp_path / "choices.yaml").write_text(text)
    monkeypatch.setattr(sys, "argv", ["choices", "--only", "random", "--rows", str(tmp_path)])
    with pytest.raises(ValueError, match=line):
        choices.main()


def test_recipes_and_rows_have_the_values_that_were_chosen() -> None:
    axes = choices.read(choices.CHOICES)
    files = {file.stem: file for file in (choices.ROOT / "results" / "choices").glob("*.json")}
    assert files.keys() == axes.keys()
    for name, file in files.items():
        choice = harness.read(choices.Choice, file)
        assert choice.recipe == name and choice.axes == axes[name]
        plan, row = choices.base(name)
        best = dict(choice.ranked[0].values)
        trained = {field: best.pop(field) for field in [*best] if field.startswith(choices.SCORING)}
        task = api.plain_task(datasets.load("digits"), plan.network, plan.transform, plan.split)
        training = plan.method.training(task)
        for field, text in trained.items():
            own_value = getattr(training, field.removeprefix(choices.SCORING).replace("-", "_"))
            assert own_value == float(text), (name, field)
        if row:
            del best["method.num-steps"]
        assert choices.with_values(plan, best) == plan, name


def test_pruning_records_the_device_of_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share = {
        "method": "random",
        "accuracies": [0.5],
        "network": TINY,
        "num_images": 3,
        "fraction": 0.1,
        "teacher": True,
    }

    def run(words: list[str], check: bool) -> None:
        content = {"accuracy_of_teacher": 0.9, "accuracies": [{**share, "device": "a GPU"}]}
        (Path(words[-1]) / "apply-pruning.json").write_text(json.dumps(content))

    monkeypatch.setattr(pruning, "subprocess", SimpleNamespace(run=run))
    made = pruning.measure("folder/toy.npz", ["--device", "cuda"], tmp_path)
    assert made.provenance.device == "a GPU" and made.command == "condense apply pruning toy.npz --device cuda"


@pytest.mark.parametrize("bench", [decoupled, labels, pruning])
def test_missing_data_are_one_line_and_leave_nothing(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    places = [] if bench is pruning else ["--network", TINY, "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["bench", "nowhere.npz", *places, "--rows", str(tmp_path / "rows")])
    assert harness.status("bench", bench.main) == 2
    said = capfd.readouterr()
    assert said.err.count("\n") == 1 and "nowhere.npz" in said.err and not said.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_flags_of_the_committed_rows_are_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    """They are checked as far as that is possible without data; files of graphs have no name of a data set."""
    for row in table.read(results.RESULTS / "table.yaml").rows:
        data = ["--dataset", row.dataset] if row.dataset in datasets.names() else []
        words = ["show", row.method, *data, "--ipc", str(row.ipc), *shlex.split(row.flags)]
        assert cli.main(words) in (0, None), row.name
        assert f"name: {row.method}" in capsys.readouterr().out


@pytest.fixture
def tiny_classes(tmp_path: Path) -> Arrays:
    """Twenty images of 8x8 pixels of each of ten classes."""
    classes = (np.arange(200) % 10).astype(np.uint8)
    images = np.broadcast_to(classes[:, None, None, None], (200, 8, 8, 1))
    np.savez(tmp_path / "toy.npz", x_train=images, y_train=classes, x_test=images, y_test=classes)
    return datasets.load(tmp_path / "toy.npz")


def test_the_buffers_of_the_committed_rows_serve_their_methods(
    tiny_classes: Arrays, capsys: pytest.CaptureFixture[str]
) -> None:
    for row in table.read(results.RESULTS / "table.yaml").rows:
        if not row.buffer:
            continue
        assert not cli.main(["show", row.method, "--dataset", row.dataset, "--ipc", "10", *shlex.split(row.flags)])
        plan = recipe.from_mapping(yaml.safe_load(capsys.readouterr().out), row.name)
        resolved = experiment.resolve(plan, tiny_classes, device=torch.device("cpu"))
        fields = {name: getattr(resolved.plan, name) for name in ("transform", "split", "augment")}
        needs = plan.method.needs(experiment.open_task(tiny_classes, resolved.network, **fields)).values()
        given = recipe.parse(Buffer, ["--dataset", row.dataset, *shlex.split(row.buffer)], Buffer(), "buffer")
        task = experiment.plain_task(tiny_classes, given.network, given.transform, given.split)
        extent = {"num_experts": given.experts.num_experts, "num_epochs": given.experts.num_epochs}
        identity = trajectories.identity(task, given.experts, given.seed, given.compute)
        manifest = {"kind": artifacts.Trajectories.kind, "identity": identity, **extent}
        assert [spec.misfits(manifest) for spec in needs] == [[] for _ in needs] != [], row.name


def test_the_committed_pages_are_those_of_the_committed_rows() -> None:
    rows = table.read(results.RESULTS / "table.yaml")
    records = results.measured(rows)
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == page.page(rows, records, ROOT)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert page.with_table(readme, page.best_rows(rows, records)) == readme
    for path in page.figures(rows, records):
        assert (ROOT / "docs" / path).exists()
    with pytest.raises(ValueError, match=r"README\.md lacks the lines"):
        page.with_table("no marks", "")


def test_accuracies_that_pages_quote_are_in_the_tables_of_results() -> None:
    tables = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    pages = [ROOT / "README.md", *{*(ROOT / "docs").rglob("*.md")} - {ROOT / "docs" / "results.md"}]
    quoted = [
        (file.name, number)
        for file in pages
        for number in re.findall(r"\d+\.\d ± \d+\.\d", file.read_text(encoding="utf-8"))
    ]
    assert len(quoted) > 40 and [(file, number) for file, number in quoted if number not in tables] == []


def test_a_commit_is_marked_if_code_differs_but_not_if_sets_of_the_zoo_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *words], check=True)

    monkeypatch.setattr(harness, "__file__", str(tmp_path / "benchmarks" / "harness.py"))
    zoo = tmp_path / "condense" / "zoo"
    (zoo / "digits").mkdir(parents=True)
    for file in (zoo / "index.json", zoo / "digits" / "ipc1.safetensors", zoo / "zoo.py"):
        file.write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "all")
    (zoo / "index.json").write_text("{}")
    (zoo / "digits" / "ipc1.safetensors").write_text("set")
    assert re.fullmatch("[0-9a-f]+", harness.commit())
    (zoo / "zoo.py").write_text("1")
    assert re.fullmatch(r"[0-9a-f]+\+", harness.commit())


def test_a_process_that_misses_a_signal_gets_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "STOP_AGAIN", 0.1)
    deaf_once = (
        "import signal, time\nsignal.signal(15, lambda *_: signal.signal(15, 0))\nprint(flush=True)\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", deaf_once], text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "\n"
    queue._stop(process)
    assert process.returncode == -signal.SIGTERM


def test_a_queue_in_the_background_is_stopped_with_its_process(tmp_path: Path) -> None:
    """A shell lets the processes that it starts in the background ignore SIGINT."""
    script = (
        "import signal, sys\n"
        "from pathlib import Path\n"
        "from benchmarks.harness import status\n"
        "from benchmarks.results.queue import Queue\n"
        "from tests.test_results import ROW\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"work = Path({str(tmp_path)!r})\n"
        "queue = Queue(data={}, work=work, rows=work, threads=1, commit=lambda: 'abc')\n"
        "words = ['distill', 'dm', '--dataset', 'digits', '--out', str(work / 'run')]\n"
        "sys.exit(status('results', lambda: queue.run(words, ROW)))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, text=True, stderr=subprocess.PIPE)
    while not (tmp_path / "run" / "log.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    assert process.communicate(timeout=60)[1] == "results: stopped\n" and process.returncode == 143
