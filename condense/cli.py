"""Entry point of the command line. It only knows the names of the commands; each command imports torch itself."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from condense.distributed import rank_of_environment
from condense.names import excerpt, flags, suggest

if TYPE_CHECKING:
    from condense.tracking import Volume

USAGE = """\
usage: condense COMMAND ...

Distil a data set into a few images per class, and evaluate them.

  demo                         buffer, distil and evaluate on embedded data, in a few minutes
  prepare   PHOTOS DST.npz     make a data set of a folder of photos of any sizes and formats
  buffer    --dataset D ...    train and store expert trajectories, or teachers (--keep last)
  distill   METHOD|RECIPE ...  distil a data set
  relabel   RUN|FILE ...       label the views of a synthetic set by a teacher
  evaluate  RUN|FILE ...       train new networks on a synthetic set and test them
  apply     NAME RUN|FILE ...  test a set in an application: continual, nas, privacy, probe, ranking, transfer
  apply     pruning DATA ...   accuracy by the share of the real images that selections keep
  compare   RUN|FILE...        evaluate sets alike: gain over random images, share of all training data
  report    RUN|FILE...        compare runs and imported sets in one HTML page
  runs      [FOLDER]           list the runs below a folder, finished or not
  show      RUN|FILE|BUFFER    summarise a run, a set or a buffer
  show      METHOD|RECIPE ...  print the recipe for a data set and budget as YAML
  list      methods|decoders|labels|adjoints|objectives|datasets|networks|recipes|protocols|zoo
  cache     [--prune]          list or prune the cached data
  import    SRC DST ...        import published sets, expert buffers or weights
  export    RUN|FILE DST ...   export a set as .npz, image folder or Hugging Face data set
  frames    CLIPS DST.npz      write the middle frame of every clip as a data set of images
  completion bash|zsh|fish     print a script that completes commands and flags in a shell

`condense COMMAND --help` lists the flags of a command. Commands that print a table take --json.
Every command takes --quiet (no progress, no remarks), --verbose (details of a run, progress every second) and --debug
(tracebacks). NO_COLOR=1 turns colours off.
"""

SWITCHES = ("--debug", "--quiet", "--verbose")
"""Flags of every command."""

LONGEST_MESSAGE = 2000
"""Maximum number of characters shown of an error or a warning."""

SPINS = "10000"
"""How often a thread of GNU's OpenMP, which torch loads, looks for work before it sleeps; the default is 300,000. Where
another process is busy, threads that wait for each other would take the processor from those that compute."""

COMMANDS = (
    *("apply", "buffer", "cache", "compare", "completion", "demo", "distill", "evaluate", "export", "frames"),
    *("import", "list", "prepare", "relabel", "report", "runs", "show"),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. For invalid input, print one line to standard error and exit with status 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug, quiet, verbose = (switch in words for switch in SWITCHES)
    given, words = words, [word for word in words if word not in SWITCHES]
    if words in (["--version"], ["-V"]):
        from condense import __version__

        print(f"condense {__version__}")
        return
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return
    try:
        if words[0] not in COMMANDS:
            raise ValueError(f"unknown command {words[0]!r}: {suggest(words[0], COMMANDS)}")
        if quiet and verbose:
            raise ValueError("--quiet and --verbose contradict each other; give one of them")
        if os.environ.get("NO_COLOR"):
            os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")
        if "RANK" in os.environ:  # this package reports a lost process itself, in one line
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
            os.environ["GOMP_SPINCOUNT"] = SPINS
        from condense import commands
        from condense.tracking import volume

        level: Volume = "quiet" if quiet else "verbose" if verbose else "normal"
        with flags(), volume(level), warnings.catch_warnings(), stopped_by_sigterm():
            warnings.showwarning = _say_warning
            commands.TABLE[words[0]](words[1:])
    except BrokenPipeError:  # whatever read the output has ended, as in `condense list methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (ValueError, OSError) as error:
        if debug:
            raise
        print(f"condense: {_rank()}{excerpt(error, LONGEST_MESSAGE)}", file=sys.stderr)
        raise SystemExit(2) from None
    except RuntimeError as error:  # torch is not imported here, and its allocators raise different classes
        if debug or not _is_out_of_memory(error):
            raise
        first = excerpt(str(error).partition("\n")[0], LONGEST_MESSAGE)
        remedy = "where a command has --compute.networks and --compute.micro-batch, smaller numbers take less"
        print(f"condense: {_rank()}memory is exhausted: {first}; {remedy}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        notes = "".join(f"{note}; " for note in getattr(stop, "__notes__", ()))
        print(f"condense: {_rank()}stopped; {notes}to continue: {_again(given)}", file=sys.stderr)
        raise SystemExit(128 + (stop.args[0] if stop.args else signal.SIGINT)) from None


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Make SIGTERM end a command as Ctrl-C does.

    Under torchrun SIGTERM keeps its default effect: a process that waits for another would never run a handler.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or "RANK" in os.environ or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _again(words: Sequence[str]) -> str:
    """Return the command that continues a stopped one."""
    command = next(word for word in words if word not in SWITCHES)
    resume = ["--resume"] if command == "distill" and "--resume" not in words else []
    if "RANK" in os.environ:
        return " ".join(["the same torchrun command", *(["with --resume"] if resume else [])])
    return shlex.join(["condense", *words, *resume])


def _is_out_of_memory(error: RuntimeError) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _rank() -> str:
    """Return the prefix that names the rank, or an empty string for rank 0."""
    with contextlib.suppress(ValueError):  # an invalid RANK is the error being reported
        if rank := rank_of_environment():
            return f"rank {rank}: "
    return ""


def _say_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"condense: warning: {excerpt(message, LONGEST_MESSAGE)}", file=sys.stderr)
