"""How files are written: all or nothing, by one process at a time, and with a reason where that fails."""

import contextlib
import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from condense import files
from condense.eval import results
from condense.eval.journal import Cell, Journal
from condense.eval.metrics import Scores
from condense.files import (
    check_writable,
    content,
    expanded,
    locked,
    replacing,
    temporary,
    try_lock,
    write_text,
)
from condense.tracking import Log, read_log

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
fork = multiprocessing.get_context("fork")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "file.txt"
    path.write_text("before")
    return path


def failing(monkeypatch: pytest.MonkeyPatch, operation: str, code: int) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise OSError(code, os.strerror(code), "a path")

    if operation == "open":
        monkeypatch.setattr(files, "open", fail, raising=False)
    elif operation == "write":
        monkeypatch.setattr(Path, "write_text", fail)
    else:
        monkeypatch.setattr(os, operation, fail)


@pytest.mark.parametrize("operation", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_write_that_fails_says_why_and_changes_nothing(
    written: Path, monkeypatch: pytest.MonkeyPatch, operation: str, code: int
) -> None:
    with monkeypatch.context() as patch:
        failing(patch, operation, code)
        with pytest.raises(ValueError, match=r"cannot write .*file.txt") as caught:
            write_text(written, "after")
    line = str(caught.value)
    assert os.strerror(code) in line and "\n" not in line
    assert ("free some space" in line) == (code in (errno.ENOSPC, errno.EDQUOT))
    assert written.read_bytes() == b"before" and list(written.parent.iterdir()) == [written]


@pytest.mark.parametrize("operation", ["write", "fsync", "replace"])
def test_a_clean_up_that_fails_does_not_hide_the_reason(
    written: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    with monkeypatch.context() as patch:
        failing(patch, operation, errno.EIO)
        failing(patch, "unlink", errno.EROFS)
        with pytest.raises(ValueError, match="Input/output error"):
            write_text(written, "after")
    assert content(written.parent) == [written]


def test_what_was_there_may_be_kept(written: Path) -> None:
    older = written.with_name("older.txt")
    with replacing(written, older) as fresh:
        fresh.write_text("after")
    assert (written.read_text(), older.read_text()) == ("after", "before")


def test_the_rename_is_synced(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    write_text(written, "after")
    assert synced == [written.stat().st_ino, written.parent.stat().st_ino]


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_a_killed_process_left_is_removed_and_what_is_being_written_is_not(written: Path, is_folder: bool) -> None:
    folder = written.parent

    def age(path: Path, seconds: float) -> None:
        os.utime(path, (path.stat().st_atime - seconds,) * 2)

    dead, young = (folder / f".condense-{digit * 32}.tmp" for digit in "ab")
    foreign = folder / ".condense-notes.tmp"
    for path in (dead, young, foreign):
        path.mkdir() if is_folder else path.write_text("")
    if is_folder:
        (dead / "inside").write_text("")
    with temporary(folder, is_folder=is_folder) as live:
        for path in (dead, foreign, live):
            age(path, 3600)
        write_text(written, "after")
        assert live.exists() and young.exists() and foreign.exists() and not dead.exists()
    assert sorted(content(folder)) == sorted([written, foreign])


def test_names_of_an_earlier_version_are_no_content(tmp_path: Path) -> None:
    for name in (f".recipe.yaml.{'0' * 32}.tmp", ".checkpoint.next.safetensors", ".manifest.lock"):
        (tmp_path / name).write_text("")
    assert content(tmp_path) == []


def holding(path: Path) -> Any:
    """A process that holds a lock until it is killed."""
    held = fork.Event()

    def hold() -> None:
        with locked(path):
            held.set()
            signal.pause()

    process = fork.Process(target=hold, daemon=True)
    process.start()
    assert held.wait(30)
    return process


def test_a_lock_says_who_holds_it_and_ends_with_its_holder(tmp_path: Path) -> None:
    process = holding(tmp_path / "run")
    with pytest.raises(BlockingIOError, match=f"process {process.pid} on "), locked(tmp_path / "run", wait=False):
        pass
    process.kill()
    process.join()
    with locked(tmp_path / "run", wait=False):
        pass
    assert list(tmp_path.iterdir()) == []


def test_whoever_asks_for_an_instant_whether_a_lock_is_held_stops_nobody(tmp_path: Path) -> None:
    with contextlib.ExitStack() as asking:
        (tmp_path / ".run.lock").touch()
        assert try_lock(tmp_path / ".run.lock", asking, shared=True)
        threading.Timer(0.05, asking.pop_all().close).start()
        with locked(tmp_path / "run", wait=False):
            pass


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    process = holding(tmp_path / "run")
    threading.Timer(0.2, process.kill).start()
    with locked(tmp_path / "run"):
        process.join()


def test_a_file_system_without_locks_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="has no locks"), locked(tmp_path / "run", wait=False):
        write_text(tmp_path / "file", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@dataclass(frozen=True)
class Row:
    """Stands in for a result: what ``merge`` asks of one."""

    seed: int

    def row(self) -> dict[str, Any]:
        return {name: self.seed if name == "seed" else "same" for name in results._KEY}


def at_once(work: Callable[[int], None], count: int = 4) -> None:
    processes = [fork.Process(target=work, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * count


def test_evaluations_at_once_lose_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "evaluation.json"
    monkeypatch.setattr(results, "read", lambda path: json.loads(path.read_text())["results"])

    def work(number: int) -> None:
        for k in range(10):
            results.merge(path, [Row(10 * number + k)])  # type: ignore[list-item]

    at_once(work)
    assert sorted(row["seed"] for row in json.loads(path.read_text())["results"]) == list(range(40))
    assert list(tmp_path.iterdir()) == [path]


def cell(accuracy: float) -> Cell:
    import torch

    return Cell(Scores.of(torch.eye(3) * accuracy, torch.arange(3)), 1.0, 2)


def test_evaluations_at_once_keep_each_others_networks(tmp_path: Path) -> None:
    target = tmp_path / "evaluation.json"

    def asked(number: int) -> dict[str, Any]:
        return {"network": f"net{number}", "num_classes": 3}

    def work(number: int) -> None:
        journal = Journal(target, 0)
        for k in range(8):
            journal.add(asked(number), k, cell(1.0))
        if number % 2:
            journal.remove()

    at_once(work)
    journal = Journal(target, 0)
    found = [sorted(journal.find(asked(number), 8)) for number in range(4)]
    assert found == [list(range(8)), [], list(range(8)), []]
    journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_journal_of_an_earlier_version_is_passed_over_and_removed(tmp_path: Path) -> None:
    """It had a network's numbers without names."""
    asked, file = {"network": "mlp", "num_classes": 3}, tmp_path / "evaluation.cells.rank0.jsonl"
    journal = Journal(tmp_path / "evaluation.json", 0)
    journal.add(asked, 0, cell(1.0))
    (line,) = read_log(file)
    file.write_text(json.dumps(line) + "\n" + json.dumps({**line, "k": 1, "cell": [1.0, 1.0, 0.5, 2.0]}) + "\n")
    assert journal.find(asked, 2) == {0: cell(1.0)}
    Journal(tmp_path / "evaluation.json", 0).remove()
    assert [line["k"] for line in read_log(file)] == [0]
    journal.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_half_written_line_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    for step in (3, 4):
        log = Log(path)
        log.write({"step": step})
        log.close()
    assert [record["step"] for record in read_log(path)] == [1, 3, 4]


def test_a_home_folder_is_expanded_or_its_absence_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/x") == tmp_path / "x" and expanded("a/~/x") == Path("a/~/x")
    with pytest.raises(ValueError, match="home folder is not known; give the full path"):
        expanded("~no-such-user/x")


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place, reason in (
        (tmp_path / "file", "File exists"),
        (Path("/proc/x"), "No such"),
        (tmp_path / "a\nb", "print"),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            check_writable(place)
        assert "\n" not in str(caught.value)
    check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


WITHOUT = """
import importlib, pkgutil, sys
from pathlib import Path

sys.modules |= {"fcntl": None, "resource": None}
import torch
import condense
from condense import compute, files

for module in pkgutil.walk_packages(condense.__path__, "condense."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
with files.locked(Path(sys.argv[1], "run"), wait=False):
    files.write_text(Path(sys.argv[1], "file"), "text")
print(compute.peak_memory(torch.device("cpu")), "pytest" in sys.modules)
"""


def test_the_package_does_without_what_windows_lacks_and_without_a_test_runner(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(tmp_path)], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout == "0 False\n" and [path.name for path in tmp_path.iterdir()] == ["file"]
