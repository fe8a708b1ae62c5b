"""Compare time, memory and data read of the engine and of the textbook implementation, path by path.

    python -m benchmarks                                     # all paths; writes docs/performance.{json,md}
    python -m benchmarks --device cuda                       # the table of a GPU, in under nine minutes
    python -m benchmarks --only matching --repeats 3         # paths with this word; printed, not written
    python -m benchmarks --quick --out /tmp/somewhere        # tiny sizes, to check that everything runs

Rows are collected in ``partial-performance.json``, which replaces ``performance.json`` at the end. On a CPU, docs are
left as they are if the limit of ``--limit`` is reached before the last row.

On a CPU, textbook and engine run alternately in one process, and peak memory is measured in a separate process for each
side. On a GPU, each variant of the engine has a process of its own. The figures are medians after a first run. See
docs/performance.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks import buffer_read, gpu, harness, measure, startup
from benchmarks.harness import alone, cores, count, driver, machine, processes, status
from benchmarks.jobs import GPU, JOBS, QUICK, Job, Scale, fast, matching_engine
from benchmarks.report import DOCS, Report
from condense.compute import resolve_device
from condense.files import check_writable


@dataclass
class Session:
    """The options of the benchmarks of a CPU, and the rows measured so far."""

    scale: Scale
    device: torch.device
    repeats: int
    report: Report


def compare(path: str, job: Job, session: Session) -> None:
    scale, device, n = session.scale, session.device, session.repeats
    times = alone(measure.times, job.textbook, job.engine, scale, device, n)
    theirs, same, ours = (job.value(t, scale) for t in times[:3])
    session.report.add(path, "time", job.unit, ours, n, textbook=theirs, same=same, at_least=job.ask)
    session.report.add(path, "compilation", "s", times.compilation, 1)
    if job.ask_memory is not None:
        theirs = alone(measure.memory, job.textbook, False, scale, device)
        ours = alone(measure.memory, job.engine, True, scale, device)
        session.report.add(path, "memory", "MB", ours, 1, textbook=theirs, at_least=job.ask_memory)


def long_roll_out(session: Session) -> None:
    """Measure the ratio of the engine's peak memory at 40 steps to that at 10."""

    def peak(num_steps: int) -> float:
        return alone(measure.memory, partial(matching_engine, num_steps), True, session.scale, session.device)

    measured = session.report.measured("trajectory matching, 10 steps", "memory")
    few, many = (measured and measured.engine) or peak(10), peak(40)
    session.report.add("trajectory matching, 40 steps over 10", "memory", "x", many / few, 1, target=1.2)


def apart(path: str, job: Job, session: Session) -> None:
    """Measure the times alternately with each side in its own process, so that the engine does not change the
    textbook's allocator. In a shared process, the heap that the engine leaves saves the textbook most page faults."""
    scale, device = session.scale, session.device
    with processes(2) as sides:
        for process, build, engine in zip(sides, (job.textbook, job.engine), (False, True), strict=True):
            process.submit(measure.take_side, build, engine, scale, device).result()
        turns = [[p.submit(measure.turn, device).result() for p in sides] for _ in range(session.repeats)]
    theirs, ours = (job.value(statistics.median(side), scale) for side in zip(*turns, strict=True))
    session.report.add(path, "time, a process each", job.unit, ours, session.repeats, textbook=theirs, at_least=job.ask)


def narrow_adjoint(session: Session) -> None:
    """Measure trajectory matching with second-order work in bfloat16, and the error of its gradient."""
    compute = dataclasses.replace(session.scale.compute, exact=False, adjoint_dtype="bfloat16")
    path, n = "trajectory matching, 10 steps", session.repeats
    scale = dataclasses.replace(session.scale, compute=compute)
    seconds = alone(measure.engine_seconds, partial(matching_engine, 10), scale, session.device, n)
    measured = session.report.measured(path, "time")
    session.report.add(f"{path}, bfloat16 adjoint", "time", "s", seconds, n, textbook=measured and measured.textbook)
    error = alone(measure.narrow_error, scale, session.device)
    session.report.add(f"{path}, bfloat16 adjoint", "error of the gradient", "relative", error, 1)


def tf32_error(session: Session) -> None:
    """Emulate TF32, and measure the error of the gradient with it and in float32, relative to float64."""
    for path, engine in gpu.ERRORS.items():
        found = alone(measure.errors, engine, session.scale, session.device)
        session.report.add(path, f"{gpu.WITH_TF32}, emulated", "relative", found.tf32, 1)
        session.report.add(path, gpu.WITHOUT, "relative", found.float32, 1)


def share_of_the_machine(session: Session) -> None:
    """Measure the throughput of expert training relative to that of this machine's matrix product."""
    limits = alone(measure.limits, session.scale, session.device, session.repeats)
    rates = {name: value for name, value in limits._asdict().items() if name != "gflop_per_image"}
    session.report.head["limits"] |= rates
    training = session.report.measured("expert training", "time")
    if training is not None and training.textbook is not None:
        for dtype in ("float32", "bfloat16"):
            share = 100 * limits.gflop_per_image / rates[f"matmul_{dtype}"]
            session.report.add(
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
    session.report.add(path, "data", "MB", ours.disk_mb, 1, textbook=theirs.disk_mb, at_least=100)
    session.report.add(path, "memory", "MB", ours.memory_mb, 1, textbook=theirs.memory_mb)
    session.report.add(path, "time, warm", "ms", ours.warm_ms, session.repeats, textbook=theirs.warm_ms)


def command_line(session: Session) -> None:
    n = session.repeats
    for name in ("condense", "condense.api"):
        session.report.add(f"import {name}", "time", "s", startup.median_wall(["-c", f"import {name}"], n), n)
    session.report.add("condense --help", "time", "s", startup.median_wall(["-m", "condense", "--help"], n), n)
    cold, warm = startup.first_epoch(session.scale, str(session.device), n)
    session.report.add("condense evaluate, until the first epoch", "time, compiling anew", "s", cold, 1)
    session.report.add("condense evaluate, until the first epoch", "time, compiled before", "s", warm, n)


BENCHMARKS: dict[str, Callable[[Session], None]] = {
    **{path: partial(compare, path, job) for path, job in JOBS.items()},
    "trajectory matching, 40 steps over 10": long_roll_out,
    "trajectory matching, bfloat16 adjoint": narrow_adjoint,
    "error of the gradient with TF32": tf32_error,
    "expert training, share of the machine": share_of_the_machine,
    "reading a pair from a buffer": reading,
    "command line": command_line,
}


EXTRAS: dict[str, Callable[[Session], None]] = {
    f"{path}, a process each": partial(apart, path, job) for path, job in JOBS.items() if job.ask_memory is not None
}
"""Benchmarks that run only if ``--only`` names them."""


def head(device: torch.device, commit: str | None) -> dict[str, Any]:
    return {
        "machine": machine(device),
        "driver": driver(device),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit or harness.commit() or "unknown",
        "date": str(datetime.date.today()),
        "limits": {},
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Report a mistake in one line, without the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(words: list[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="python -m benchmarks", description=__doc__, formatter_class=formatter)
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORD", help="run the paths whose name contains one of these words"
    )
    parser.add_argument("--repeats", type=count, default=5, help="runs of each side; the median is reported")
    parser.add_argument("--quick", action="store_true", help="use tiny sizes, to check that everything runs")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the JSON files and of performance.md (default: docs in a full run, else none)",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=count, default=torch.get_num_threads())
    parser.add_argument("--limit", type=float, metavar="MIN", help="minutes; rows not reached stay open (GPU: 8.5)")
    parser.add_argument("--profile", action="store_true", help="count the kernels, and measure how busy the GPU is")
    parser.add_argument("--commit", help="commit to record, where the folder is not a repository")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    on_cpu, on_gpu = device.type == "cpu", device.type != "cpu" or options.quick
    of_cpu = [*BENCHMARKS, *(EXTRAS if options.only != [""] else ())] if on_cpu else []
    known = [*of_cpu, *(gpu.paths() if on_gpu else ())]
    if not any(word in path for path in known for word in options.only):
        parser.error(f"no path contains any of {options.only}; give a word of one of these: {', '.join(known)}")
    if options.profile and not on_gpu:
        parser.error("--profile is for a GPU; give --device cuda")
    complete = options.only == [""] and not options.quick
    folder = options.out or (DOCS if complete else None)
    if folder is not None:
        check_writable(folder)
    reports, reached = [], True

    def report(name: str) -> Report:
        reports.append(Report(name, head(device, options.commit), folder))
        return reports[-1]

    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TMPDIR": cache}
        if on_cpu:
            scale = QUICK if options.quick else Scale(compute=fast(device))
            session = Session(scale, device, options.repeats, report("table"))
            names = [name for name in of_cpu if any(word in name for word in options.only)]
            reached = measure_all(session, names, options.limit)
        if on_gpu:
            gpu.Plan(
                report=report("gpu-table"),
                scale=QUICK if options.quick else dataclasses.replace(GPU, compute=fast(device)),
                device=device,
                repeats=options.repeats,
                minutes=8.5 if options.limit is None else options.limit,
                cache=Path(cache),
                words=options.only,
                profiled=options.profile,
            ).measure()
    for made in reports:
        print(f"\n{made.text()}")
        if folder is not None and (reached or options.out):
            made.finish(folder)
        elif folder is not None:
            file = made.write(folder)
            print(f"docs are left as they are; python -m benchmarks.report {file} puts these rows there", flush=True)


def measure_all(session: Session, names: Sequence[str], minutes: float | None) -> bool:
    """Run the benchmarks of a CPU that are among ``names``, until the time limit; return whether all were reached."""
    begun, known = time.monotonic(), BENCHMARKS | EXTRAS
    for name in names:
        if minutes is not None and time.monotonic() > begun + 60 * minutes:
            print(f"the limit of {minutes:g} minutes is reached before {name}", flush=True)
            return False
        known[name](session)
    return True


if __name__ == "__main__":
    sys.exit(status("python -m benchmarks", main))
