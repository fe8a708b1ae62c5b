"""Commands in processes forked from this one, which spares them the import of torch, and the faults in their calls."""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from condense import cli, engine

PRELOADED = "TORTURE_PRELOADED"
TIMEOUT = 120
"""Seconds after which a command counts as hanging."""

_NO_ERROR = re.compile(
    r"condense: warning: |(\[rank\d+\]:)?\[W|Exception raised from |frame #|<omitting python frames>"
)
"""Beginnings of lines that are warnings: ours, and those of torch's library with their call stacks."""


@dataclass(frozen=True)
class Fault:
    """A fault at one call that changes a file below the folder of a command."""

    at: int = 0
    """Number of the call, from 1; 0: no fault, the calls are only counted."""
    error: int = 0
    """Error number with which the call fails; 0: the process is killed by SIGKILL."""
    full: bool = False
    """The disk stays full: every later call that needs space fails too."""
    torn: bool = False
    """Half of a write is done before the fault."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    """Exit status; negative: the signal that ended it."""
    stderr: list[str]
    """Lines on standard error, without warnings."""
    count: int
    """Number of calls that changed files below the folder."""
    call: str
    """The call at which the fault occurred and its path; empty if there was none."""

    @property
    def refused(self) -> bool:
        """Whether the command ended with status 2 and one line."""
        return self.status == 2 and len(self.stderr) == 1 and self.stderr[0].startswith("condense: ")

    def __str__(self) -> str:
        interrupted = f", interrupted at {self.call}" if self.call else ""
        return f"status {self.status}{interrupted}, stderr {self.stderr[-3:]}"


class _Report(ctypes.Structure):
    _fields_ = (("count", ctypes.c_long), ("call", ctypes.c_char * 16), ("path", ctypes.c_char * 496))


def preload() -> Path:
    """Restart this program with the library that injects faults. In the restarted program, return the library's folder,
    which is new and free for any use.

    Raises:
        RuntimeError: there is no C compiler.
    """
    if PRELOADED in os.environ:
        return Path(os.environ[PRELOADED]).parent
    library, source = Path(tempfile.mkdtemp(prefix="torture-"), "preload.so"), Path(__file__).with_name("preload.c")
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"cannot build {source.name}: {error}; install a C compiler") from error
    wanted = {PRELOADED: str(library), "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    os.execve(sys.executable, [sys.executable, "-m", __package__, *sys.argv[1:]], {**os.environ, **wanted})


def settle() -> None:
    """Prepare this process for forks: one thread, and checkpoints every two steps."""
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    engine.CHECKPOINT_STEPS = 2


class Command:
    """``condense WORDS`` in a forked process, with ``folder`` as working directory, which also holds its cache.

    It starts when the write end of the pipe ``gate`` is closed, or at once without a pipe. Its standard error goes to a
    file beside the folder. After ``TIMEOUT`` seconds SIGALRM ends it.
    """

    def __init__(
        self,
        folder: Path,
        words: Sequence[str],
        fault: Fault = Fault(),
        *,
        environment: Mapping[str, str] = {},
        gate: tuple[int, int] | None = None,
        job: Callable[[Sequence[str]], None] = cli.main,
    ) -> None:
        self._folder, self._words, self._fault, self._job = folder.resolve(), words, fault, job
        self._environment = {"CONDENSE_CACHE": str(self._folder / "cache"), **environment}
        self._report = _Report.from_buffer(mmap.mmap(-1, ctypes.sizeof(_Report)))
        handle, name = tempfile.mkstemp(dir=folder.parent, prefix="stderr-")
        os.close(handle)
        self._stderr = Path(name)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._become(gate)

    def _become(self, gate: tuple[int, int] | None) -> None:
        status = 1
        try:
            signal.alarm(TIMEOUT)
            os.chdir(self._folder)
            os.environ.update(self._environment)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(self._stderr, os.O_WRONLY | os.O_APPEND), 2)
            if gate is not None:
                os.close(gate[1])
                os.read(gate[0], 1)
            fault = self._fault
            arm = ctypes.CDLL(os.environ[PRELOADED]).torture_arm
            arm.argtypes = [ctypes.c_char_p, ctypes.c_long, *[ctypes.c_int] * 3, ctypes.c_void_p]
            numbers = fault.at, fault.error, fault.full, fault.torn
            arm(str(self._folder).encode(), *numbers, ctypes.addressof(self._report))
            self._job(self._words)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def wait(self) -> Ended:
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        written = self._stderr.read_text(errors="replace").splitlines()
        self._stderr.unlink()
        lines = [line for line in written if line.strip() and not _NO_ERROR.match(line)]
        report = self._report
        interrupted = f"{report.call.decode()} of {report.path.decode(errors='replace')}" if report.call else ""
        return Ended(status, lines, report.count, interrupted)


def run(folder: Path, words: Sequence[str], fault: Fault = Fault()) -> Ended:
    """Run a command and wait for its end."""
    return Command(folder, words, fault).wait()


def learn(folder: Path, words: Sequence[str]) -> Ended:
    """Run a command, and import the modules that it imported, so that processes forked later have them.

    The command runs in another process, because here it would leave threads behind, which make forks unsafe.

    Raises:
        RuntimeError: the command fails.
    """
    listed = folder.parent / "modules.txt"

    def job(words: Sequence[str]) -> None:
        cli.main(words)
        listed.write_text("\n".join(sys.modules))

    ended = Command(folder, words, job=job).wait()
    if ended.status:
        raise RuntimeError(f"`condense {' '.join(words)}` fails undisturbed: {ended}")
    for name in listed.read_text().splitlines():
        with suppress(Exception), warnings.catch_warnings(action="ignore"):
            importlib.import_module(name)
    return ended
