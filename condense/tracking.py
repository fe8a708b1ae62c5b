"""Logging of runs: always to ``log.jsonl``, on request to other trackers, and progress bars on a terminal."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from condense.distributed import rank_of_environment
from condense.files import parse_json, replacing, reporting, require_file
from condense.names import printable, reason, suggest

T = TypeVar("T")


class Sink(Protocol):
    """A tracker that receives a copy of the log."""

    def log(self, step: int, record: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Log:
    """An append-only JSON-lines file with one line per step, and the sinks that receive a copy.

    Raises:
        ValueError: by every method, if the file cannot be written.
    """

    def __init__(self, path: Path, sinks: tuple[Sink, ...] = ()) -> None:
        self._path, self._sinks = path, sinks
        with reporting(path):
            if path.exists():
                _end_with_a_line(path)
            self._file = open(path, "a", encoding="utf-8", buffering=1)  # a killed process loses no line

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one record to the file but not to the sinks, for events."""
        with reporting(self._path):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")

    def step(self, step: int, record: Mapping[str, float]) -> None:
        """Write the numbers of one step to the file and to every sink."""
        self.write({"step": step, **record})
        for sink in self._sinks:
            sink.log(step, record)

    def sync(self) -> None:
        """Flush the file, so that everything written so far is on disk when this returns."""
        with reporting(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        try:
            with reporting(self._path):
                self._file.close()
        finally:
            for sink in self._sinks:
                sink.close()


LONGEST_LINE = 4 << 20
"""Largest number of bytes of one line of a log."""


def _end_with_a_line(path: Path) -> None:
    """Remove an incomplete record at the end of a file, which a killed process can leave."""
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - LONGEST_LINE, 0))
        tail = file.read()
        if tail and not tail.endswith(b"\n"):
            file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the records of a log, an empty list if there is no file.

    An incomplete line at the end, which a killed run can leave, is skipped. Any other line that holds no record is
    skipped with a warning.

    Raises:
        ValueError: ``path`` is not a file.
    """
    records = [record for _, record in _lines(path)]
    if None in records:
        _warn_of(path, "skipped")
    return [record for record in records if record is not None]


def cut_back(path: Path, step: int) -> None:
    """Truncate a log to its first ``step`` steps. Lines that hold no record are moved to ``NAME.damaged``, with a
    warning.

    Raises:
        ValueError: ``path`` is not a file, or cannot be written.
    """
    damaged, any_damaged = path.with_name(f"{path.name}.damaged"), False
    with replacing(path) as temporary, open(temporary, "wb") as retained:
        for line, record in _lines(path):
            if record is None:
                any_damaged = True
                with open(damaged, "ab") as file:
                    file.write(line)
            elif not isinstance(record.get("step", 0), int) or record.get("step", 0) <= step:
                retained.write(line.rstrip(b"\n") + b"\n")
    if any_damaged:
        _warn_of(path, f"moved to {damaged}")


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield each line and its record, or None if the line holds no record. An incomplete line at the end is omitted; a
    line that is too long is yielded in segments, each with None."""
    if not path.exists():
        return
    require_file(path, "move it away")
    with open(path, "rb") as file:
        begins = True
        while line := file.readline(LONGEST_LINE):
            record, ends = None, line.endswith(b"\n")
            whole = begins and (ends or len(line) < LONGEST_LINE)
            if whole:
                with contextlib.suppress(ValueError):
                    record = parse_json(line)
            if isinstance(record, dict):
                yield line, record
            elif line.strip() and (ends or not whole):
                yield line, None
            begins = ends


def _warn_of(path: Path, action: str) -> None:
    warnings.warn(f"{path} has lines that hold no record; they are {action}", stacklevel=3)


def check_sinks(names: tuple[str, ...]) -> None:
    """Raise ValueError if a tracker is unknown or not installed; nothing is written."""
    for name in names:
        if name not in _SINKS:
            raise ValueError(f"unknown tracker {name!r}: {suggest(name, _SINKS)}")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"tracker {name!r} is not installed; run: pip install 'condense-dd[{name}]'")


def open_sinks(names: tuple[str, ...], folder: Path, recipe: Mapping[str, Any]) -> tuple[Sink, ...]:
    """Open the trackers of these names; they write below ``folder``.

    Raises:
        ValueError: a tracker is unknown or not installed, or wandb fails to start.
    """
    check_sinks(names)
    return tuple(_SINKS[name](folder, recipe) for name in names)


class _Wandb:
    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        import wandb

        try:
            self._run = self._init(wandb, folder, recipe)
        except wandb.Error as error:
            raise ValueError(f"wandb failed: {reason(error)}; run wandb login, or set WANDB_MODE=offline") from error

    @staticmethod
    def _init(wandb: Any, folder: Path, recipe: Mapping[str, Any]) -> Any:
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "condense"),
            dir=folder,
            name=folder.name,
            config=dict(recipe),
            resume="allow",
            id=os.environ.get("WANDB_RUN_ID", hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]),
        )

    def log(self, step: int, record: Mapping[str, float]) -> None:
        self._run.log(dict(record), step=step)

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, folder: Path, recipe: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("recipe", json.dumps(recipe, indent=1, default=str))

    def log(self, step: int, record: Mapping[str, float]) -> None:
        for name, value in record.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


_SINKS: dict[str, Callable[[Path, Mapping[str, Any]], Sink]] = {"wandb": _Wandb, "tensorboard": _TensorBoard}


class Bar(Protocol):
    """A progress bar, updated by the number of items that are done and a note on the last one."""

    def __call__(self, done: int, note: str = "") -> None: ...


@contextlib.contextmanager
def progress(title: str, total: int, *, show: bool | None = None) -> Iterator[Bar]:
    """Show a progress bar with the remaining time on standard error.

    By default it is shown only on a terminal, and only by the first process of torchrun; ``show`` overrides this.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    visible = console.is_terminal and not rank_of_environment() if show is None else show
    with Progress(*columns, console=console, disable=not visible, transient=False) as bars:
        task = bars.add_task(printable(title), total=total, note="")

        def update(done: int, note: str = "") -> None:
            bars.update(task, completed=done, note=printable(note))

        yield update


def counted(title: str, items: Sequence[T]) -> Iterator[T]:
    """Yield the items and show a progress bar that counts those that are done."""
    with progress(title, len(items)) as bar:
        for done, item in enumerate(items):
            bar(done)
            yield item
        bar(len(items))
