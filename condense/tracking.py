"""Logging of runs: always to ``log.jsonl``, on request to other trackers, and progress on standard error."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from html import escape
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from condense.distributed import rank_of_environment
from condense.files import parse_json, replacing, reporting, require_file
from condense.names import installing, printable, reason, suggest

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
            raise ValueError(f"tracker {name!r} is not installed; run: {installing(name)}")


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


Volume = Literal["quiet", "normal", "verbose"]

_volume: ContextVar[Volume] = ContextVar("volume", default="normal")


@contextlib.contextmanager
def volume(level: Volume) -> Iterator[None]:
    """Set how much is printed inside the context: ``quiet`` shows no progress and no remarks, ``verbose`` also shows
    what a run was resolved to, and progress every second. Warnings and errors are shown in any case."""
    token = _volume.set(level)
    try:
        yield
    finally:
        _volume.reset(token)


def is_quiet() -> bool:
    """Return whether remarks are left out."""
    return _volume.get() == "quiet"


def detail(text: str) -> None:
    """Print lines to standard error where the user asked for details, in the first process of torchrun."""
    if _volume.get() == "verbose" and not rank_of_environment():
        print("\n".join(map(printable, text.splitlines())), file=sys.stderr, flush=True)


SETTLED = 3.0
"""Seconds after the first step before which no time left is estimated."""

LINE_SECONDS: dict[Volume, float] = {"normal": 30.0, "verbose": 1.0}
"""Seconds between two lines of progress where there is no terminal."""


class Pace:
    """Estimates the time left from the items that were done since the first update, which may be long to prepare."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._first: tuple[float, int] | None = None

    def left(self, done: int) -> float | None:
        """Return the seconds left after ``done`` items, or None where it is too early to tell."""
        now = time.monotonic()
        if self._first is None:
            self._first = now, done
        seconds, items = now - self._first[0], done - self._first[1]
        return (self._total - done) * seconds / items if items > 0 and seconds >= SETTLED else None


def duration(seconds: float) -> str:
    """Return a number of seconds in words: ``about 40 s``, ``about 15 h``."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            count = seconds / size
            return (
                f"about {count:.0f} {unit}" if count >= 9.95 else f"about {count:.1f}".removesuffix(".0") + f" {unit}"
            )
    return f"about {seconds:.0f} s"


class Bar(Protocol):
    """A progress bar, updated by the number of items that are done and a note on the last one."""

    def __call__(self, done: int, note: str = "") -> None: ...


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Bar]:
    """Show progress with an estimate of the time left: a bar on a terminal (standard error) and in a notebook, and
    elsewhere a line on standard error every 30 seconds.

    Only the first process of torchrun shows it. ``volume`` changes how much is shown.
    """
    title, pace = printable(title), Pace(total)
    with contextlib.ExitStack() as stack:
        bar = _bar(title, total, stack)

        def update(done: int, note: str = "") -> None:
            left = pace.left(done)
            time_left = f"{duration(left)} left on this machine" if left and done < total else ""
            bar(done, ", ".join(filter(None, (printable(note), time_left))))

        yield update


def _bar(title: str, total: int, stack: contextlib.ExitStack) -> Bar:
    """Return the function that shows progress here; ``stack`` closes what it opens."""
    console = Console(stderr=True)
    if is_quiet() or rank_of_environment():
        return lambda done, note="": None
    if console.is_jupyter:
        return _in_notebook(title, total)
    if not console.is_terminal:
        return _in_lines(title, total)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    bars = stack.enter_context(Progress(*columns, console=console, transient=False))
    task = bars.add_task(title, total=total, note="")
    return lambda done, note="": bars.update(task, completed=done, note=note)


def _in_lines(title: str, total: int) -> Bar:
    """Return a bar that prints a line every 30 seconds."""
    interval, shown = LINE_SECONDS[_volume.get()], time.monotonic()

    def update(done: int, note: str = "") -> None:
        nonlocal shown
        if time.monotonic() - shown >= interval:
            shown = time.monotonic()
            line = f"{title}: {done} of {total}" + (f", {note}" if note else "")
            print(line, file=sys.stderr, flush=True)

    return update


def _in_notebook(title: str, total: int) -> Bar:
    """Return a bar in the output of a notebook's cell, which needs no widgets."""
    from IPython.display import display

    def content(done: int, note: str) -> dict[str, str]:
        text = f"{title}: {done} of {total}" + (f", {note}" if note else "")
        return {"text/plain": text, "text/html": f'<progress value="{done}" max="{total}"></progress> {escape(text)}'}

    handle, shown = display(content(0, ""), raw=True, display_id=True), time.monotonic()

    def update(done: int, note: str = "") -> None:
        nonlocal shown
        if done == total or time.monotonic() - shown >= 0.2:
            shown = time.monotonic()
            handle.update(content(done, note), raw=True)

    return update


def counted(title: str, items: Sequence[T]) -> Iterator[T]:
    """Yield the items and show a progress bar that counts those that are done."""
    with progress(title, len(items)) as bar:
        for done, item in enumerate(items):
            bar(done)
            yield item
        bar(len(items))
