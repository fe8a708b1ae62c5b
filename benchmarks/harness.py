"""Measure time and peak memory, set the allocator, and run functions in separate processes."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import dataclasses
import datetime
import gc
import hashlib
import json
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch

from condense.allocator import keep_freed_memory, restore_defaults
from condense.cli import stopped_by_sigterm
from condense.compute import Compute, has_bfloat16
from condense.data.datasets import Arrays
from condense.files import canonical_json, check_new_folder, read_json, write_text
from condense.names import percent
from condense.schema import from_json

T = TypeVar("T")
Run = Callable[[], object]
"""One unit of work, which can be repeated."""

_WARM_BYTES = 1 << 30


def allocator(engine: bool) -> None:
    """Set the thresholds of glibc's allocator to those of the engine, or to glibc's defaults.

    The engine keeps the memory that it frees. By default, every block of more than 32 MB is mapped anew and zeroed by
    the kernel at each use, and a free end of the heap beyond 64 MB is returned to the system; glibc's defaults adapt to
    these thresholds after a few large blocks. In both cases the next run finds the heap as it is in a long run: with
    the engine's thresholds it already holds a gigabyte, by default it holds no free memory.
    """
    if engine and keep_freed_memory():
        torch.ones(_WARM_BYTES, dtype=torch.uint8)
    elif not engine and restore_defaults():
        ctypes.CDLL(None).malloc_trim(0)


def _glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def seconds(run: Run, device: torch.device) -> float:
    synchronise(device)
    begun = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - begun


def median_seconds(run: Run, device: torch.device, repeats: int) -> float:
    return statistics.median(seconds(run, device) for _ in range(repeats))


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mb(run: Run, device: torch.device) -> float:
    """Peak memory of a run minus the memory held before it, in MB: of the resident set on a CPU (Linux), or of the
    tensors on a GPU. Do the run once before, so that what it compiles and keeps is not counted."""
    gc.collect()
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - held) / 1e6
    if _glibc():
        ctypes.CDLL(None).malloc_trim(0)
    reset_peak()
    held = status_bytes("VmRSS")
    run()
    return (status_bytes("VmHWM") - held) / 1e6


def reset_peak() -> None:
    """Reset the peak of the resident set of this process (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def alone(function: Callable[..., T], *args: Any) -> T:
    """Return ``function(*args)``, run in a new process with as many threads as this one."""
    with processes(1) as (process,):
        return process.submit(function, *args).result()


class Process:
    """A new process with as many threads as this one, for one task at a time."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(
            1, get_context("spawn"), initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
        )
        self._last: Future[Any] | None = None

    def submit(self, function: Callable[..., T], *args: Any) -> Future[T]:
        future = self._pool.submit(function, *args)
        self._last = future
        return future

    def close(self) -> None:
        """End the process, in the middle of its task if it has one."""
        if self._last is not None and not self._last.done():
            for process in self._pool._processes.values():  # from Python 3.14 on: kill_workers
                process.kill()
        self._pool.shutdown()


@contextlib.contextmanager
def processes(num: int) -> Iterator[list[Process]]:
    """Start ``num`` processes, which end with the context."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(contextlib.closing(Process())) for _ in range(num)]


def scratch() -> Path:
    """Make a temporary folder, which is removed when this process ends."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """Give what runs inside a cache of its own, so that its time includes what an earlier command may have cached."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, CONDENSE_CACHE=folder):
        yield


def driver(device: torch.device) -> str | None:
    """Return the version of the driver of a GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def commit() -> str:
    """Return the commit of the code, with a plus sign if its files differ from it; empty without a repository. The sets
    of the zoo, which are results, are no code."""
    code = [
        "condense",
        "methods",
        "buffers",
        "eval",
        "benchmarks",
        ":!condense/zoo/*.safetensors",
        ":!condense/zoo/*.json",
    ]

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        head, changed = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "--", *code)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if changed else "")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where, when and with which code something was measured."""

    commit: str
    """Commit of the code, with a plus sign if files differed from it."""
    date: str
    device: str
    threads: int
    torch: str

    @classmethod
    def now(cls, device: torch.device) -> Provenance:
        return cls(
            commit=commit(),
            date=datetime.date.today().isoformat(),
            device=device.type,
            threads=torch.get_num_threads(),
            torch=torch.__version__,
        )

    def __str__(self) -> str:
        return f"Commit {self.commit}, {self.device}, threads {self.threads}, torch {self.torch}, {self.date}"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all rows of a benchmark of methods share."""

    arrays: Arrays
    network: str
    num_seeds: int
    device: torch.device
    folder: Path
    """For runs and experts."""
    name: str
    """Of the data, in the rows."""
    provenance: Provenance

    @property
    def common(self) -> dict[str, Any]:
        """The fields of a row that decide whether it can be kept."""
        return {
            "fingerprint": self.arrays.fingerprint["train"],
            "network": self.network,
            "num_seeds": self.num_seeds,
        }


def mean_and_std(accuracies: Sequence[float]) -> str:
    """Mean and standard deviation of fractions, in percent; the mean alone if there is one, a dash if there is none."""
    if not accuracies:
        return "—"
    return percent(statistics.fmean(accuracies), statistics.stdev(accuracies) if len(accuracies) > 1 else None)


def table_head(titles: Sequence[str]) -> list[str]:
    """Return the first two lines of a table in Markdown."""
    return [table_line(titles), "|" + "---|" * len(titles)]


def table_line(cells: Sequence[str]) -> str:
    """Return a row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


@contextlib.contextmanager
def child(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Start a process, which is killed if the context is left before it has ended."""
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()


def has_ended(process: subprocess.Popen[Any]) -> bool:
    """Whether a process has ended. What it used can still be asked for (``left_by``)."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def left_by(process: subprocess.Popen[Any]) -> resource.struct_rusage:
    """Wait for a process and return what it used (Linux)."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage


def read(cls: type[T], file: Path) -> T:
    """Return the dataclass that ``write`` wrote. Raises ValueError if the file is damaged or of another kind."""
    return from_json(cls, read_json(file, fix="delete it"), str(file))


def digest(*settings: Any) -> str:
    """Return a short hash of values of JSON and of dataclasses, for the field ``settings`` of a record."""
    text = canonical_json(json.loads(json.dumps(settings, default=dataclasses.asdict)))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def kept(cls: type[T], file: Path, facts: Mapping[str, Any]) -> T | None:
    """Return the record that an earlier run wrote, if there is one.

    A record whose ``settings`` are empty was written before there was such a field. It is kept if its other facts are
    the same, because nothing in it says that its settings were others.

    Raises:
        ValueError: the file is damaged, its record differs in one of the facts, or it is missing and cannot be written.
    """
    if not file.exists():
        check_new_folder(file.parent)
        return None
    record = read(cls, file)
    for name, value in facts.items():
        if (found := getattr(record, name)) == value or (name, found) == ("settings", ""):
            continue
        what = f"another {name}" if dataclasses.is_dataclass(value) else f"{name} {found}, not {value}"
        what = "other settings" if name == "settings" else what
        raise ValueError(f"{file} was measured with {what}; give another place with --rows")
    return record


def write(record: Any, file: Path) -> None:
    """Write a dataclass to a JSON file, whose folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(dataclasses.asdict(record), indent=1) + "\n")


def status(name: str, command: Callable[[], int | None]) -> int:
    """Run a command and return its exit status. A mistake is one line that begins with ``name``, and status 2. If a
    process that the command started failed, it has said why, and its status is returned. SIGTERM stops the command, and
    the process that it waits for, as Ctrl-C does."""
    try:
        with stopped_by_sigterm():
            return command() or 0
    except KeyboardInterrupt as stop:
        print(f"{name}: stopped", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except subprocess.CalledProcessError as error:
        return error.returncode
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2


def count(text: str) -> int:
    """Return the whole number that a flag has, at least 1; argparse reports others in one line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least 1; give 1 or more")
    return int(text)


def uncompiled(device: torch.device) -> Compute:
    """Return arithmetic without compilation for many short trainings: bfloat16 where the device has it."""
    narrow = has_bfloat16(device)
    return Compute(compile=False, autocast="bfloat16" if narrow else "none", channels_last=narrow)


def machine(device: torch.device) -> str:
    """Return the name of the processor; on Linux with its family and model, because different ones share a name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    facts = dict(reversed([[word.strip() for word in line.split(":", 1)] for line in lines if ":" in line]))
    if "model name" not in facts:
        return platform.machine()
    return f"{facts['model name']} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')})"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
