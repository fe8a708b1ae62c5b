"""Commands in processes that are forked from this one, so that none waits for torch, and the blows that strike them."""

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
LONGEST = 120
"""Seconds after which a command counts as hung."""

_NO_ERROR = re.compile(
    r"condense: warning: |(\[rank\d+\]:)?\[W|Exception raised from |frame #|<omitting python frames>"
)
"""How warnings begin: ours, and those of torch's library, with the call stack below them."""


@dataclass(frozen=True)
class Blow:
    """What happens at one call that changes a file below the folder of a command."""

    at: int = 0
    """Number of the call, from 1; 0: none is struck, they are counted."""
    error: int = 0
    """What the call fails with; 0: the process is killed by SIGKILL."""
    full: bool = False
    """The disk stays full: every later call that needs room fails too."""
    torn: bool = False
    """A write is cut in half."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    """Exit status; the negative number of a signal that ended it."""
    said: list[str]
    """Lines on standard error, without warnings."""
    count: int
    """Calls that changed files below the folder."""
    call: str
    """The call that was struck and its path; empty where none was."""

    @property
    def refused(self) -> bool:
        """It ended as a command ends that cannot go on: status 2 and one line."""
        return self.status == 2 and len(self.said) == 1 and self.said[0].startswith("condense: ")

    def __str__(self) -> str:
        struck = f", struck at {self.call}" if self.call else ""
        return f"status {self.status}{struck}, said {self.said[-3:]}"


class _Report(ctypes.Structure):
    _fields_ = (("count", ctypes.c_long), ("call", ctypes.c_char * 16), ("path", ctypes.c_char * 496))


def preload() -> Path:
    """Start this program again with the library that strikes calls; in the program that has it, return its folder,
    which is new and for any use.

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
    """Make this process one that commands can be forked from: one thread, and checkpoints every two steps."""
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    engine.CHECKPOINT_STEPS = 2


class Command:
    """``condense WORDS`` in a process of its own, with ``folder`` as working folder, where its cache lies too.

    It begins when the writing end of the pipe ``gate`` is closed, at once where there is none. Its standard error goes
    to a file beside the folder. After ``LONGEST`` seconds it is ended by SIGALRM.
    """

    def __init__(
        self,
        folder: Path,
        words: Sequence[str],
        blow: Blow = Blow(),
        *,
        environment: Mapping[str, str] = {},
        gate: tuple[int, int] | None = None,
        job: Callable[[Sequence[str]], None] = cli.main,
    ) -> None:
        self._folder, self._words, self._blow, self._job = folder.resolve(), words, blow, job
        self._environment = {"CONDENSE_CACHE": str(self._folder / "cache"), **environment}
        self._report = _Report.from_buffer(mmap.mmap(-1, ctypes.sizeof(_Report)))
        handle, name = tempfile.mkstemp(dir=folder.parent, prefix="said-")
        os.close(handle)
        self._said = Path(name)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._become(gate)

    def _become(self, gate: tuple[int, int] | None) -> None:
        status = 1
        try:
            signal.alarm(LONGEST)
            os.chdir(self._folder)
            os.environ.update(self._environment)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(self._said, os.O_WRONLY | os.O_APPEND), 2)
            if gate is not None:
                os.close(gate[1])
                os.read(gate[0], 1)
            arm, blow = ctypes.CDLL(os.environ[PRELOADED]).torture_arm, self._blow
            arm.argtypes = [ctypes.c_char_p, ctypes.c_long, *[ctypes.c_int] * 3, ctypes.c_void_p]
            arm(str(self._folder).encode(), blow.at, blow.error, blow.full, blow.torn, ctypes.addressof(self._report))
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
        lines = self._said.read_text(errors="replace").splitlines()
        self._said.unlink()
        said = [line for line in lines if line.strip() and not _NO_ERROR.match(line)]
        report = self._report
        struck = f"{report.call.decode()} of {report.path.decode(errors='replace')}" if report.call else ""
        return Ended(status, said, report.count, struck)


def run(folder: Path, words: Sequence[str], blow: Blow = Blow()) -> Ended:
    """One command from its beginning to its end."""
    return Command(folder, words, blow).wait()


def learn(folder: Path, words: Sequence[str]) -> Ended:
    """Run a command, and import here what it imported, so that those forked later find it.

    The command itself runs in another process: here it would leave threads behind that a fork does not bear.

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
