"""The cache: entries by content, what is damaged or cannot be written, the list, and what is pruned."""

import errno
import json
import multiprocessing
import os
import time
import warnings
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch

from condense import cli
from condense.cache import Cache, Entry, cache_folder, entries, prune
from condense.compute import choose_compiled_folder
from condense.data.datasets import load
from condense.eval.journal import CachedCells, Cell
from condense.eval.metrics import Scores

fork = multiprocessing.get_context("fork")


def store(root: Path | None, key: object, text: str = "content") -> None:
    Cache(root, "notes").write(key, lambda folder: (folder / "text").write_text(text) and None, about=f"note {key}")


def fetch(root: Path | None, key: object) -> str | None:
    return Cache(root, "notes").read(key, lambda folder: (folder / "text").read_text())


def used_before(root: Path, days: float) -> None:
    """Let all entries be as old as that."""
    for entry in entries(root):
        for path in [entry.path, *entry.path.rglob("*")]:
            os.utime(path, (time.time() - 86400 * days,) * 2)


def test_an_entry_is_known_by_its_key(tmp_path: Path) -> None:
    root = tmp_path / "deep" / "cache"
    assert fetch(root, {"a": 1}) is None
    store(root, {"a": 1, "b": [0.1, None]}, "first")
    store(root, {"a": 2}, "second")
    assert fetch(root, {"b": (0.1, None), "a": 1}) == "first" and fetch(root, {"a": 2}) == "second"
    assert fetch(root, {"a": 3}) is None and Cache(root, "others").read({"a": 2}, os.listdir) is None
    store(root, {"a": 2}, "third")
    assert fetch(root, {"a": 2}) == "third" and len(entries(root)) == 2


def test_without_a_folder_nothing_is_kept() -> None:
    store(None, 1)
    with Cache(None, "notes").held(1, about="") as folder:
        assert folder is None
    assert fetch(None, 1) is None


@pytest.mark.parametrize("name", ["text", "entry.json"])
def test_a_damaged_entry_is_none_and_is_replaced(name: str, tmp_path: Path) -> None:
    store(tmp_path, 1)
    (entry,) = entries(tmp_path)
    for content in (None, b"", b"[]", b"\xff"):
        file = entry.path / name
        file.unlink() if content is None else file.write_bytes(content)
        if name == "entry.json" or content in (None, b"\xff"):
            assert fetch(tmp_path, 1) is None
        store(tmp_path, 1, "again")
        assert fetch(tmp_path, 1) == "again"


def test_a_write_that_fails_leaves_what_was_there_and_warns_once(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "text").write_text("half")
        raise OSError(28, "No space left on device")

    store(tmp_path, 1, "before")
    with pytest.warns(UserWarning, match=r"nothing more is cached: .*No space.*; set CONDENSE_CACHE") as said:
        for key in (1, 2):
            Cache(tmp_path, "notes").write(key, fail, about="")
    assert len(said) == 1 and fetch(tmp_path, 1) == "before" and fetch(tmp_path, 2) is None
    assert not list((tmp_path / "notes").glob(".*"))


def test_processes_that_write_one_entry_at_once_leave_one(tmp_path: Path) -> None:
    def work() -> None:
        warnings.simplefilter("error")
        for k in range(40):
            store(tmp_path, k % 3, f"{k % 3}")
            assert fetch(tmp_path, k % 3) in (f"{k % 3}", None)

    processes = [fork.Process(target=work) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert [fetch(tmp_path, k) for k in range(3)] == ["0", "1", "2"]
    assert len(list((tmp_path / "notes").iterdir())) == 3


def test_a_filled_cache_that_can_only_be_read_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path, 1)

    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setenv("CONDENSE_CACHE", str(tmp_path))
    for name in ("condense.files.temporary", "condense.cache.temporary", "os.utime"):
        monkeypatch.setattr(name, refuse)
    with pytest.warns(UserWarning, match=r"nothing more is cached: .*Read-only") as said:
        for _ in range(2):
            root = cache_folder()
            store(root, 2)
    assert root == tmp_path and len(said) == 1
    assert fetch(root, 1) == "content" and fetch(root, 2) is None


def test_entries_are_listed_with_their_size_and_last_use(tmp_path: Path) -> None:
    store(tmp_path, 1, "x" * 1000)
    store(tmp_path, 2, "x")
    used_before(tmp_path, 10)
    fetch(tmp_path, 2)
    large, small = entries(tmp_path)
    assert (large.kind, large.about, large.outdated) == ("notes", "note 1", False)
    assert large.size == sum(file.stat().st_size for file in large.path.iterdir()) > 1000
    assert time.time() - small.last_use < 60 < 86400 < time.time() - large.last_use
    assert entries(tmp_path / "nowhere") == [] == prune(tmp_path / "nowhere", 0)


def test_what_was_not_used_is_pruned(tmp_path: Path) -> None:
    for key in (1, 2):
        store(tmp_path, key)
    used_before(tmp_path, 10)
    fetch(tmp_path, 2)
    assert prune(tmp_path, 11) == [] and [entry.about for entry in prune(tmp_path, 9)] == ["note 1"]
    assert fetch(tmp_path, 1) is None and fetch(tmp_path, 2) == "content"
    assert len(prune(tmp_path, 0)) == 1 and list((tmp_path / "notes").iterdir()) == []


def test_what_is_no_entry_is_neither_listed_nor_removed(tmp_path: Path) -> None:
    store(tmp_path / "cache", 1)
    (entry,) = entries(tmp_path / "cache")
    theirs = tmp_path / "cache" / "data" / "MNIST" / "raw"
    theirs.mkdir(parents=True)
    (theirs / "train").write_text("theirs")
    moved = entry.path.with_name("0" * 32)  # its name is not that of its key
    moved.mkdir()
    (moved / "entry.json").write_text((entry.path / "entry.json").read_text())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "cache" / "decoded").mkdir()
    (tmp_path / "cache" / "decoded" / "0123456789abcdef").symlink_to(elsewhere)
    (tmp_path / "cache" / "notes.txt").write_text("theirs")
    assert prune(tmp_path / "cache", 0) == [entry]
    assert (theirs / "train").exists() and moved.exists() and elsewhere.exists()
    assert (tmp_path / "cache" / "notes.txt").exists()
    assert (tmp_path / "cache" / "decoded" / "0123456789abcdef").is_symlink()


def test_what_earlier_versions_made_is_pruned_whatever_its_age(tmp_path: Path) -> None:
    digest = "0123456789abcdef"
    earlier = (
        f"decoded/{digest}/x_train.npy",
        f"zca-absolute-{digest}.safetensors",
        f"teachers/{4 * digest}.safetensors",
        f"baselines/{4 * digest}-cpu.safetensors",
        f"baselines/{digest}.cells.rank0.jsonl",
        "compiled/avx2/ab/kernel.so",
        "compiled/fxgraph/x/y",
    )
    for name in earlier:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    store(tmp_path, 1)
    assert {(entry.kind, entry.size) for entry in entries(tmp_path) if entry.outdated} == {
        (kind, 5) for kind in ("decoded", "zca", "teachers", "baselines", "compiled")
    }
    assert len(prune(tmp_path, 30)) == 7 and [entry.about for entry in entries(tmp_path)] == ["note 1"]
    assert not any((tmp_path / name).exists() for name in earlier)


def test_an_entry_that_is_held_or_being_read_is_not_pruned(tmp_path: Path) -> None:
    cache = Cache(tmp_path, "notes")
    store(tmp_path, 1)
    assert cache.read(1, lambda folder: prune(tmp_path, 0)) == []
    with cache.held(2, about="grows") as folder:
        assert folder is not None
        (folder / "new").write_text("content")
        assert [entry.about for entry in prune(tmp_path, 0)] == ["note 1"]
    assert [entry.about for entry in prune(tmp_path, 0)] == ["grows"]


def test_an_entry_that_is_held_is_not_replaced(tmp_path: Path) -> None:
    """Of two processes that find no entry, the second one writes when the first one already holds its own."""
    cache = Cache(tmp_path, "notes")
    with cache.held(1, about="grows") as folder:
        assert folder is not None
        (folder / "new").write_text("content")
        cache.write(1, lambda entry: None, about="grows")
        assert (folder / "new").read_text() == "content"
    with cache.held(1, about="grows") as folder:
        assert folder is not None and (folder / "new").exists()


def test_a_damaged_entry_is_replaced_when_it_is_held(tmp_path: Path) -> None:
    cache = Cache(tmp_path, "notes")
    with cache.held(1, about="grows") as folder:
        assert folder is not None
        (folder / "entry.json").write_text("{}")
    with cache.held(1, about="grows") as folder:
        assert folder is not None and (folder / "entry.json").read_text() != "{}"


def test_an_entry_that_is_being_written_is_not_pruned(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "text").write_text("content")
        os.utime(folder.parent, (0, 0))
        assert prune(tmp_path, 0) == []

    Cache(tmp_path, "notes").write(1, write, about="")
    assert fetch(tmp_path, 1) == "content"


def test_what_a_killed_process_left_half_written_is_pruned(tmp_path: Path) -> None:
    left = tmp_path / "notes" / f".condense-{'0' * 32}.tmp"
    left.mkdir(parents=True)
    (left / "text").write_text("half")
    os.utime(left, (0, 0))
    prune(tmp_path, 30)
    assert not left.exists()


def test_decoded_data_are_not_pruned_while_they_are_mapped(tmp_path: Path) -> None:
    images, labels = np.arange(6 * 16, dtype=np.uint8).reshape(6, 1, 4, 4), np.arange(6) % 2
    np.savez(tmp_path / "mine.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    load(tmp_path / "mine.npz", cache=tmp_path / "cache")
    mapped = torch.from_numpy(load(tmp_path / "mine.npz", cache=tmp_path / "cache").x_train)[1:]
    assert prune(tmp_path / "cache", 0) == []
    assert torch.equal(mapped, torch.from_numpy(images[1:]))
    del mapped
    assert [entry.about for entry in prune(tmp_path / "cache", 0)] == [str(tmp_path / "mine.npz")]


def test_networks_of_baselines_are_found_by_all_that_decided_them(tmp_path: Path) -> None:
    cell = Cell(Scores.of(torch.eye(3), torch.arange(3)), 1.5, 2)
    cells, key = CachedCells(tmp_path), {"network": "mlp", "num_classes": 3, "seed": 0}
    for k in (0, 2):
        cells.add(key, k, cell)
    assert cells.find(key, 3) == {0: cell, 2: cell} and cells.find(key, 1) == {0: cell}
    assert cells.find({**key, "seed": 1}, 3) == {}
    for file in tmp_path.rglob("cell.json"):
        file.write_text(file.read_text().replace('"accuracy": 1.0', '"accuracy": 2.0'))
    assert cells.find(key, 3) == {}


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    cli.main(["cache", *words])
    return capsys.readouterr().out


def test_the_command_lists_and_prunes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CONDENSE_CACHE", str(tmp_path))
    store(tmp_path, "old", "x" * 3000)
    used_before(tmp_path, 40)
    for key in range(12):
        store(tmp_path, key)
    listed = run([], capsys)
    assert "notes: 13 entries" in listed and "note old" in listed and "and 3 smaller ones" in listed
    assert listed.splitlines()[-1].startswith(f"{tmp_path}: 13 entries, ")
    found = json.loads(run(["--json"], capsys))
    assert found["folder"] == str(tmp_path) and len(found["entries"]) == 13 and found["removed"] == []
    assert Entry(**{**found["entries"][0], "path": Path(found["entries"][0]["path"])}) == entries(tmp_path)[0]
    assert "removed: 1 entries" in run(["--prune"], capsys)
    found = json.loads(run(["--prune", "--days", "0", "--json"], capsys))
    assert len(found["removed"]) == 12 and not entries(tmp_path)
    for words, line in (
        (["--days", "3"], "--days needs --prune; give --prune --days N"),
        (["--prune", "--days", "-1"], "--days must be at least 0, got -1.0; give --days 30"),
        (["--prune", "--days", "nan"], "--days must be at least 0, got nan; give --days 30"),
    ):
        with pytest.raises(SystemExit) as left:
            cli.main(["cache", *words])
        assert left.value.code == 2 and capsys.readouterr().err == f"condense: {line}\n"


def test_compiled_code_of_a_running_process_is_not_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDENSE_CACHE", str(tmp_path / "first"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    choose_compiled_folder()
    assert prune(tmp_path / "first", 0) == [] and len(entries(tmp_path / "first")) == 1
    monkeypatch.setenv("CONDENSE_CACHE", str(tmp_path / "second"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    choose_compiled_folder()
    assert len(prune(tmp_path / "first", 0)) == 1
