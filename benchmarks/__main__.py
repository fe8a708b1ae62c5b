"""Compare time, memory and data read of the engine and of the textbook implementation, path by path.

    python -m benchmarks                                     # all paths; writes docs/performance.{json,md}
    python -m benchmarks --only matching --repeats 3         # paths with this word; printed, not written
    python -m benchmarks --quick --out /tmp/somewhere        # tiny sizes, to check that everything runs

Textbook and engine run alternately in one process; the figures are medians after one run of each. Peak memory is
measured in a separate process for each side. See docs/performance.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import buffer_read, measure, report, startup
from benchmarks.harness import alone, cores, machine, processes
from benchmarks.jobs import JOBS, QUICK, Job, Scale, fast, matching_engine
from benchmarks.report import Row, row
from condense.compute import resolve_device

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Session:
    """The options of the benchmarks, and the rows measured so far."""

    scale: Scale
    device: torch.device
    repeats: int
    rows: list[Row] = field(default_factory=list)
    limits: dict[str, float] = field(default_factory=dict)

    def add(self, *args: Any, **options: Any) -> None:
        self.rows.append(row(*args, **options))
        print(report.table(self.rows[-1:]).splitlines()[-1], flush=True)

    def measured(self, path: str, quantity: str) -> Row | None:
        return next((r for r in self.rows if (r.path, r.quantity) == (path, quantity)), None)


def compare(path: str, job: Job, session: Session) -> None:
    scale, device, n = session.scale, session.device, session.repeats
    times = alone(measure.times, job.textbook, job.engine, scale, device, n)
    theirs, same, ours = (job.value(t, scale) for t in times[:3])
    session.add(path, "time", job.unit, ours, n, textbook=theirs, same=same, at_least=job.ask)
    session.add(path, "compilation", "s", times.compilation, 1)
    if job.ask_memory is not None:
        theirs = alone(measure.memory, job.textbook, False, scale, device)
        ours = alone(measure.memory, job.engine, True, scale, device)
        session.add(path, "memory", "MB", ours, 1, textbook=theirs, at_least=job.ask_memory)


def long_roll_out(session: Session) -> None:
    """Measure the ratio of the engine's peak memory at 40 steps to that at 10."""

    def peak(num_steps: int) -> float:
        return alone(measure.memory, partial(matching_engine, num_steps), True, session.scale, session.device)

    measured = session.measured("trajectory matching, 10 steps", "memory")
    few, many = peak(10) if measured is None else measured.engine, peak(40)
    session.add("trajectory matching, 40 steps over 10", "memory", "x", many / few, 1, at_most=1.2)


def apart(path: str, job: Job, session: Session) -> None:
    """Measure the times alternately with each side in its own process, so that the engine does not change the
    textbook's allocator. In a shared process, the heap that the engine leaves saves the textbook most page faults."""
    scale, device = session.scale, session.device
    with processes(2) as sides:
        for process, build, engine in zip(sides, (job.textbook, job.engine), (False, True), strict=True):
            process.submit(measure.take_side, build, engine, scale, device).result()
        turns = [[p.submit(measure.turn, device).result() for p in sides] for _ in range(session.repeats)]
    theirs, ours = (job.value(statistics.median(side), scale) for side in zip(*turns, strict=True))
    session.add(path, "time, a process each", job.unit, ours, session.repeats, textbook=theirs, at_least=job.ask)


def narrow_adjoint(session: Session) -> None:
    """Measure trajectory matching with second-order work in bfloat16, and the error of its gradient."""
    compute = dataclasses.replace(session.scale.compute, exact=False, adjoint_dtype="bfloat16")
    path, n = "trajectory matching, 10 steps", session.repeats
    scale = dataclasses.replace(session.scale, compute=compute)
    seconds = alone(measure.engine_seconds, partial(matching_engine, 10), scale, session.device, n)
    measured = session.measured(path, "time")
    session.add(f"{path}, bfloat16 adjoint", "time", "s", seconds, n, textbook=measured and measured.textbook)
    error = alone(measure.narrow_error, scale, session.device)
    session.add(f"{path}, bfloat16 adjoint", "error of the gradient", "relative", error, 1)


def share_of_the_machine(session: Session) -> None:
    """Measure the throughput of expert training relative to that of this machine's matrix product."""
    limits = alone(measure.limits, session.scale, session.device, session.repeats)
    session.limits |= {name: value for name, value in limits._asdict().items() if name != "gflop_per_image"}
    training = session.measured("expert training", "time")
    if training is not None and training.textbook is not None:
        for dtype in ("float32", "bfloat16"):
            share = 100 * limits.gflop_per_image / session.limits[f"matmul_{dtype}"]
            session.add(
                "expert training",
                f"share of the {dtype} matmul limit",
                "%",
                share * training.engine,
                training.n,
                textbook=share * training.textbook,
            )


def reading(session: Session) -> None:
    """Measure reading a (start, target) pair from our buffer and from a pickled one, which is read whole."""
    layout = buffer_read.QUICK if session.scale is QUICK else buffer_read.FULL
    with tempfile.TemporaryDirectory() as name:
        folder = buffer_read.write(Path(name), layout)
        ours = alone(buffer_read.measure, buffer_read.ours, folder, layout, 20 * session.repeats)
        theirs = alone(buffer_read.measure, buffer_read.published, folder, layout, session.repeats)
    path = "reading a pair from a buffer"
    session.add(path, "data", "MB", ours.disk_mb, 1, textbook=theirs.disk_mb, at_least=100)
    session.add(path, "memory", "MB", ours.memory_mb, 1, textbook=theirs.memory_mb)
    session.add(path, "time, warm", "ms", ours.warm_ms, session.repeats, textbook=theirs.warm_ms)


def command_line(session: Session) -> None:
    n = session.repeats
    for name in ("condense", "condense.api"):
        session.add(f"import {name}", "time", "s", startup.median_wall(["-c", f"import {name}"], n), n)
    session.add("condense --help", "time", "s", startup.median_wall(["-m", "condense", "--help"], n), n)
    cold, warm = startup.first_epoch(session.scale, str(session.device), n)
    session.add("condense evaluate, until the first epoch", "time, compiling anew", "s", cold, 1)
    session.add("condense evaluate, until the first epoch", "time, compiled before", "s", warm, n)


BENCHMARKS: dict[str, Callable[[Session], None]] = {
    **{path: partial(compare, path, job) for path, job in JOBS.items()},
    "trajectory matching, 40 steps over 10": long_roll_out,
    "trajectory matching, bfloat16 adjoint": narrow_adjoint,
    "expert training, share of the machine": share_of_the_machine,
    "reading a pair from a buffer": reading,
    "command line": command_line,
}


EXTRAS: dict[str, Callable[[Session], None]] = {
    f"{path}, a process each": partial(apart, path, job) for path, job in JOBS.items() if job.ask_memory is not None
}
"""Benchmarks that run only if ``--only`` names them."""


def head(session: Session) -> dict[str, Any]:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {
        "machine": machine(session.device),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit or "unknown",
        "date": str(datetime.date.today()),
        "limits": session.limits,
    }


def main(words: list[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=formatter)
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORD", help="run the paths whose name contains one of these words"
    )
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side; the median is reported")
    parser.add_argument("--quick", action="store_true", help="use tiny sizes, to check that everything runs")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of performance.json and .md (default: docs in a full run, else none)",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    known = BENCHMARKS if options.only == [""] else BENCHMARKS | EXTRAS
    chosen = [name for name in known if any(word in name for word in options.only)]
    if not chosen:
        parser.error(f"no path contains any of {options.only}; give a word of one of these: {', '.join(known)}")
    device = resolve_device(options.device)
    session = Session(QUICK if options.quick else Scale(compute=fast(device)), device, options.repeats)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for name in chosen:
            known[name](session)
    complete = chosen == list(BENCHMARKS) and not options.quick
    out = options.out or (ROOT / "docs" if complete else None)
    if out is None:
        print(f"\n{report.table(session.rows)}")
    else:
        report.write(out, head(session), session.rows)


if __name__ == "__main__":
    main()
