"""The sets that come with the package."""

import dataclasses
import json
import statistics
from pathlib import Path

import pytest

import condense
from benchmarks.results import __main__ as queue
from benchmarks.results import table
from benchmarks.results import zoo as made
from benchmarks.results.queue import SET, checksum
from condense import cli, zoo
from condense.api import evaluation_file, relabelled_file
from condense.synthetic.teaching import Stored

LARGEST = 3_000_000
"""Bytes of all sets together."""


def test_the_index_is_made_of_the_records_and_the_sets_are_small() -> None:
    rows = table.read(queue.RESULTS / "table.yaml")
    index = json.loads((zoo.FOLDER / zoo.INDEX).read_text())
    assert index == json.loads(json.dumps(made.index(rows, queue.measured(rows), zoo.FOLDER)))
    files = {path.relative_to(zoo.FOLDER).with_suffix("").as_posix() for path in zoo.FOLDER.rglob("*.safetensors")}
    assert files == set(zoo.entries()) == set(index)
    assert sum(path.stat().st_size for path in zoo.FOLDER.rglob("*.safetensors")) <= LARGEST


def test_a_set_other_than_the_measured_one_is_neither_copied_nor_listed(tmp_path: Path) -> None:
    rows = table.read(queue.RESULTS / "table.yaml")
    one = dataclasses.replace(rows, zoo={"digits/ipc1": rows.zoo["digits/ipc1"]})
    row = rows.zoo["digits/ipc1"]
    run, folder = tmp_path / "run" / "0" / SET, tmp_path / "zoo"
    run.parent.mkdir(parents=True)
    run.write_text("this set")
    records = {row: dataclasses.replace(queue.measured(rows)[row], checksum=checksum(run))}
    made.write(one, records, {row: tmp_path / "run"}, folder)
    assert (folder / "digits" / "ipc1.safetensors").read_text() == "this set"
    run.write_text("another set")
    made.write(one, records, {row: tmp_path / "run"}, folder)
    assert (folder / "digits" / "ipc1.safetensors").read_text() == "this set" and made.index(one, records, folder)
    (folder / "digits" / "ipc1.safetensors").write_text("another set")
    assert made.index(one, records, folder) == {}


@pytest.mark.parametrize("name", zoo.entries())
def test_a_set_is_what_its_entry_says(name: str) -> None:
    syn, entry = condense.load(f"zoo:{name}"), zoo.entries()[name]
    assert (syn.origin.method, syn.origin.dataset_name, syn.ipc) == (entry.method, entry.dataset, entry.ipc)
    assert entry.terms and entry.commit and entry.distillation.startswith(f"condense distill {entry.method}")


def test_a_set_has_its_stated_accuracy() -> None:
    entry = zoo.entries()["digits/ipc1"]
    again = condense.evaluate(
        "zoo:digits/ipc1", networks=entry.network, protocol=entry.protocol, num_seeds=3, device="cpu"
    )
    spread = 3 * statistics.stdev(entry.accuracies) + 0.01
    assert abs(again.results[0].mean - statistics.fmean(entry.accuracies)) < spread


def test_commands_take_the_names_and_write_nothing_beside_the_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(zoo.FOLDER.rglob("*"))
    assert cli.main(["list", "zoo"]) in (0, None)
    assert "zoo:digits/ipc1" in capsys.readouterr().out
    assert cli.main(["show", "zoo:digits/ipc1"]) in (0, None)
    assert cli.main(["export", "zoo:digits/ipc1", "images.npz"]) in (0, None)
    assert cli.main(["report", "zoo:digits/ipc1"]) in (0, None)
    assert {path.name for path in tmp_path.iterdir()} == {"images.npz", "digits-ipc1.report.html"}
    assert evaluation_file("zoo:digits/ipc1") is None
    assert relabelled_file("zoo:digits/ipc1", Stored()) == Path("digits-ipc1-stored.safetensors")
    assert sorted(zoo.FOLDER.rglob("*")) == before


def test_an_unknown_set_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["show", "zoo:digit/ipc1"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert "the zoo has no set 'digit/ipc1': did you mean 'digits/ipc1'? `condense list zoo` lists them" in said
