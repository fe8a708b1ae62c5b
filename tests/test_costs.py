"""Tables of single benchmarks: what is measured is written, and pages quote what was written."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import (
    buffer_read,
    costs,
    data_memory,
    growth,
    harness,
    inner_memory,
    parts,
    photos,
    recovery_memory,
    report,
    tesla_error,
    waiting,
)
from benchmarks.costs import Costs

ROOT = Path(__file__).parents[1]
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory and disk are read from /proc")
Main = Callable[[list[str]], None]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Main, str, Sequence[str]], Costs]:
    """Run a benchmark that writes into another folder, and return its record after a look at the page."""
    monkeypatch.setattr(costs, "ROOT", tmp_path)
    monkeypatch.setattr(costs, "RECORDS", tmp_path / "records")
    (tmp_path / "docs").mkdir()

    def run(main: Main, name: str, words: Sequence[str]) -> Costs:
        page = tmp_path / "docs" / costs.PAGES[name]
        page.write_text(f"before\n<!-- {name} -->\nold\n<!-- /{name} -->\nafter\n")
        threads = torch.get_num_threads()
        try:
            main([*words, "--threads", "1", "--write"])
        finally:
            torch.set_num_threads(threads)
        record = harness.read(Costs, tmp_path / "records" / f"{name}.json")
        assert page.read_text() == f"before\n<!-- {name} -->\n{record.text()}\n<!-- /{name} -->\nafter\n"
        assert all(len(row) == len(record.columns) for row in record.rows)
        return record

    return run


@linux
def test_reading_a_pair(written: Callable[..., Costs], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer_read, "alone", lambda function, *args: function(*args))
    record = written(buffer_read.main, "buffer-read", ["--quick"])
    assert [row[0] for row in record.rows] == ["condense", "`torch.load`", "`torch.load`, `mmap=True`"]
    assert record.rows[0][-1] == "1" and record.command == "python -m benchmarks.buffer_read --quick --threads 1"


@linux
def test_memory_of_data(written: Callable[..., Costs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_memory, "alone", lambda function, *args: function(*args))
    monkeypatch.setattr(data_memory, "DRAWS", 2)
    file, rng = tmp_path / "some.npz", np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (600, 3, 8, 8), np.uint8), np.arange(600) % 2
    np.savez(file, x_train=images, y_train=labels, x_test=images[:4], y_test=labels[:4])
    record = written(data_memory.main, "data-memory", [str(file), "--transforms", "channel", "zca"])
    assert [row[:3] for row in record.rows] == [
        ("some", f"`{transform}`", process)
        for transform in ("channel", "zca")
        for process in ("without a cache", "first", "later")
    ]
    assert record.command == "python -m benchmarks.data_memory some.npz --transforms channel zca --threads 1"


@pytest.mark.parametrize("name", parts.METHODS)
def test_a_step_is_compared_with_its_parts(
    name: str, written: Callable[..., Costs], monkeypatch: pytest.MonkeyPatch
) -> None:
    from condense.methods import rcig

    monkeypatch.setattr(harness, "_WARM_BYTES", 1)
    monkeypatch.setattr(rcig, "RAISE", 10.0)  # a short search for the learning rates
    record = written(parts.main, "parts", ["--quick", "--repeats", "1", "--only", name])
    step, *of_step, ratio = [[float(cell.strip("*").replace(",", "")) for cell in row[2:]] for row in record.rows]
    assert record.rows[0][:2] == (f"`{name}`", "a step") and len(of_step) >= 3
    assert ratio[0] == pytest.approx(step[0] / sum(wall for wall, _ in of_step), rel=0.2)
    harness.allocator(engine=False)


def test_a_record_names_the_commit_and_the_threads_that_were_measured(
    written: Callable[..., Costs], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = ["before"]

    def prepared(photos: Path, out: Path, threads: int) -> tuple[float, float, float]:
        code.append("after")
        return 1.0, 1.0, 1.0

    monkeypatch.setattr(harness, "commit", lambda: code[-1])
    monkeypatch.setattr(photos, "prepared", prepared)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    where = written(photos.main, "photos", ["--photos", "1"]).provenance
    torch.set_num_threads(threads)
    assert (where.commit, where.threads) == ("before", 1)


@pytest.mark.slow
@linux
def test_photos(written: Callable[..., Costs]) -> None:
    (row,) = written(photos.main, "photos", ["--photos", "20"]).rows
    assert row[0] == "20" and 50 < float(row[-1]) < 2000


@pytest.mark.slow
@linux
def test_waiting_beside_busy_processes(written: Callable[..., Costs]) -> None:
    rows = written(waiting.main, "waiting", ["--quick", "--repeats", "1", "--busy", "1"]).rows
    assert [row[0] for row in rows] == ["1"] * 5 and len({row[1] for row in rows}) == 5


@pytest.mark.slow
@linux
def test_memory_of_a_recovery(written: Callable[..., Costs]) -> None:
    words = ["--classes", "200", "--ipc", "1", "--size", "8"]
    ((ipc, _, peak, resumed),) = written(recovery_memory.main, "recovery-memory", words).rows
    assert ipc == "1" and float(peak.replace(",", "")) > 200 < float(resumed.replace(",", ""))


@pytest.mark.slow
@linux
def test_memory_of_an_adjoint(written: Callable[..., Costs]) -> None:
    record = written(inner_memory.main, "inner-memory", ["--steps", "1", "2", "--adjoints", "exact"])
    assert [row[:2] for row in record.rows] == [("`exact`", "1"), ("`exact`", "2")]
    assert record.remark.startswith("`exact` at 2 steps is within the bound")


def test_the_error_of_tesla_is_that_of_its_gradient() -> None:
    table = costs.Table(inner_memory.OF_ERRORS)
    inner_memory.add_errors(table, inner_memory.MLP, (1, 0.05), (5, 0.05))
    one, five = ([float(cell) for cell in row[3:]] for row in table.rows)
    assert max(one[0], one[3], five[0]) < 1e-12 and max(one[1:3] + five[1:3]) < 1e-5, "one step of TESLA is exact"
    assert 0.01 < five[3] < 0.2 and 0.99 < five[4] < 1


def test_the_error_of_tesla_with_an_expert(written: Callable[..., Costs], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tesla_error, "CASES", [tesla_error.Case(1, 0, 0.01, steps) for steps in (1, 2)])
    monkeypatch.setattr(tesla_error, "EXPERTS", dataclasses.replace(tesla_error.EXPERTS, num_epochs=2))
    record = written(tesla_error.main, "tesla-error-experts", ["--num-train", "100"])
    one, two = record.rows
    assert one[:4] == ("1", "0", "0.01", "1") and one[5:] == ("0.00", "1.000"), "one step of TESLA is exact"
    assert float(two[5]) > 0.01 and 0.5 < float(two[6]) < 1
    assert "training images after 0 to 2" in record.remark


def test_nothing_is_written_unless_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(costs, "RECORDS", tmp_path)
    used = costs.parser("photos", "")
    with costs.measuring("photos", used, [], ("a", "b"), write=False) as table:
        table.add("1", "2")
        with pytest.raises(TypeError, match="1 cells do not fill the 2 columns"):
            table.add("1")
    assert capsys.readouterr().out.splitlines()[-1] == "| 1 | 2 |" and not list(tmp_path.iterdir())


def test_a_benchmark_that_fails_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "RECORDS", tmp_path)
    with (
        pytest.raises(ValueError, match="broken"),
        costs.measuring("photos", costs.parser("photos", ""), [], ("a",), write=True) as table,
    ):
        table.add("1")
        raise ValueError("broken")
    assert not list(tmp_path.iterdir())


def quoted(page: str, name: str) -> str:
    """The part of a page between the markers of a table."""
    _, _, rest = (ROOT / "docs" / page).read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    return rest.partition(f"\n<!-- /{name} -->")[0]


@pytest.mark.parametrize("name", costs.PAGES)
def test_the_committed_pages_quote_the_committed_records(name: str) -> None:
    assert quoted(costs.PAGES[name], name) == harness.read(Costs, costs.RECORDS / f"{name}.json").text()


@pytest.mark.parametrize("name", report.TABLES)
def test_the_page_of_performance_quotes_its_records(name: str) -> None:
    assert quoted("performance.md", name) == report.read(ROOT / "docs" / report.TABLES[name]).text()


def test_the_page_of_performance_quotes_the_record_of_growth() -> None:
    assert quoted("performance.md", "growth") == harness.read(growth.Growth, ROOT / "docs" / "growth.json").text()
