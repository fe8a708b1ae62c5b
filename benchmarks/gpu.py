"""The table of a GPU: targets are absolute, and each variant of the engine has a process of its own.

All variants are set up and compiled at once. Then each runs in turn what it compiled, alone on the machine. The first
steps with an empty and with a filled cache of compiled code follow, then the errors of TF32, and the textbook at the
end. Rows that the time limit does not reach, or that fail, stay open.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch

from benchmarks import measure
from benchmarks.harness import Process, processes
from benchmarks.jobs import JOBS, Job, Scale, Steps, evaluation, matching, matching_engine, rcig_engine
from benchmarks.report import Report

T = TypeVar("T")

COMPILING = 0.6
"""Fraction of the time limit after which variants that are still being compiled are given up."""
TEXTBOOK_REPEATS = 2
KERNELS, BUSY = "kernels in a step", "share of the time that the GPU is busy"
FIRST_STEPS = {
    "mtt": "trajectory matching, 10 steps",
    "dc": "gradient matching, a sweep of the classes",
    "rat-bptt": "RaT-BPTT, an update",
}
"""The paths whose first step is measured, by method."""
ERRORS: dict[str, Callable[[Scale, torch.device], Steps]] = {
    "trajectory matching, 10 steps": partial(matching_engine, 10),
    "RCIG, an update": rcig_engine,
}
"""The paths of which the error of the gradient with TF32 is measured, relative to float64."""
WITH_TF32, WITHOUT = "error of the gradient, TF32", "error of the gradient, float32"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A path with the size of its work."""

    path: str
    job: Job
    scale: Callable[[Scale], Scale] = lambda scale: scale
    target: float | None = None
    """Target for the time, in the unit of the job."""
    target_memory: float | None = None
    """Target for the memory, in MB."""
    textbook: bool = True
    """Whether to measure the textbook."""
    single: str | None = None
    """For several networks at once: the path whose textbook trains the same networks one after another."""


def larger_batches(scale: Scale) -> Scale:
    return dataclasses.replace(scale, batch=4 * scale.batch, num_batches=max(1, scale.num_batches // 4))


def shorter(scale: Scale) -> Scale:
    """Return the scale of shorter runs of the same steps."""
    return dataclasses.replace(scale, num_updates=1, expert_epochs=1, num_epochs=max(2, scale.num_epochs // 5))


def without_tf32(scale: Scale) -> Scale:
    return dataclasses.replace(scale, compute=dataclasses.replace(scale.compute, tf32=False))


def _method(path: str, job: Job | None = None, **options: Any) -> Variant:
    return Variant(path=path, job=dataclasses.replace(job or JOBS[path], unit="ms"), **options)


_SINGLE = "evaluation, canonical-dsa"
VARIANTS = [
    Variant(path=_SINGLE, job=evaluation(1), target=1_400),
    Variant(path="evaluation, 8 networks at once", job=evaluation(8), target=6_000, textbook=False, single=_SINGLE),
    _method("distribution matching, a step", target=9),
    _method("trajectory matching, 10 steps", target=40, target_memory=800),
    _method("gradient matching, a sweep of the classes", target=25),
    Variant(path="expert training", job=JOBS["expert training"], target=190_000),
    _method("trajectory matching, 50 steps", matching(50), target=190),
    Variant(path="expert training, batches of 1024", job=JOBS["expert training"], scale=larger_batches),
    Variant(path="evaluation, 4 networks at once", job=evaluation(4), textbook=False, single=_SINGLE),
    *(_method(f"{name}, an update") for name in ("RaT-BPTT", "FRePo", "RCIG", "IDC")),
    *(
        _method(f"trajectory matching, {n} steps, without TF32", matching(n), scale=without_tf32, textbook=False)
        for n in (10, 50)
    ),
]
"""In the order in which they are measured."""


def paths() -> list[str]:
    """Return the names of all paths."""
    return [*(v.path for v in VARIANTS), *map(_first, FIRST_STEPS)]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure, and until when."""

    report: Report
    scale: Scale
    device: torch.device
    repeats: int
    minutes: float
    """Time limit."""
    cache: Path
    """Folder of compiled code."""
    words: Sequence[str] = ("",)
    """Paths whose name contains one of these are measured."""
    profiled: bool = False
    """Whether to count kernels and measure how long the GPU is busy."""
    begun: float = dataclasses.field(default_factory=time.monotonic)

    def left(self, fraction: float = 1.0) -> float:
        """Seconds until this fraction of the time limit has passed."""
        return max(0.0, self.begun + 60 * self.minutes * fraction - time.monotonic())

    def measure(self) -> None:
        chosen = [v for v in VARIANTS if any(word in v.path for word in self.words)]
        firsts = {name: path for name, path in FIRST_STEPS.items() if any(word in _first(name) for word in self.words)}
        self._announce(chosen, firsts)
        with contextlib.suppress(_OutOfTime), processes(len(chosen)) as group:
            running = self._compiled(dict(zip(chosen, group, strict=True)))
            seconds = {v: s for v, process in running.items() if (s := self._timed(v, process)) is not None}
            if self.profiled:
                for v, per_run in seconds.items():
                    self._profile(v, running[v], per_run)
            self._first_steps(firsts)
            for v in chosen:
                if v.path in ERRORS:
                    self._errors(v.path)
            for v in seconds:
                if v.textbook:
                    self._textbook(v, running[v])
                running[v].close()
            return
        print(f"the limit of {self.minutes:g} minutes is reached; the other rows stay open", flush=True)

    def _announce(self, chosen: Sequence[Variant], firsts: Mapping[str, str]) -> None:
        """Plan all rows, so that those that are not reached are in the table."""
        for v in chosen:
            self.report.plan(v.path, "time", v.job.unit, target=v.target)
            self.report.plan(v.path, "memory", "MB", target=v.target_memory)
            if self.profiled:
                self.report.plan(v.path, KERNELS, "")
                self.report.plan(v.path, BUSY, "%")
            for quantity in (WITH_TF32, WITHOUT) if v.path in ERRORS else ():
                self.report.plan(v.path, quantity, "relative")
        for name in firsts:
            self.report.plan(_first(name), "compiling anew", "s", target=25)
            self.report.plan(_first(name), "compiled before", "s", target=6)

    def _compiled(self, group: Mapping[Variant, Process]) -> dict[Variant, Process]:
        """Set up all variants at once; return the processes of those that did their first runs in time."""
        with patch.dict(os.environ, TORCHINDUCTOR_COMPILE_THREADS="2"):  # one process for each core or nearly so
            starts = {
                v: process.submit(measure.start, v.job.engine, v.scale(self.scale), self.device)
                for v, process in group.items()
            }
        wait(starts.values(), self.left(COMPILING))
        running = {}
        for v, future in starts.items():
            if not future.done():
                print(f"{v.path}: not compiled after {COMPILING * self.minutes:.1f} minutes", flush=True)
                group[v].close()
            elif (peak := self._result(v.path, future)) is not None:
                self.report.add(v.path, "memory", "MB", peak, 1, target=v.target_memory)
                running[v] = group[v]
        return running

    def _timed(self, v: Variant, process: Process) -> float | None:
        """Measure the engine; return the seconds of a run."""
        seconds = self._result(v.path, process.submit(measure.again, self.device, self.repeats))
        if seconds is not None:
            value = v.job.value(seconds, v.scale(self.scale))
            self.report.add(v.path, "time", v.job.unit, value, self.repeats, target=v.target)
        return seconds

    def _profile(self, v: Variant, process: Process, seconds: float) -> None:
        profile = self._result(v.path, process.submit(measure.profile, self.device))
        if profile is not None:
            kernels = profile.kernels / v.job.steps(v.scale(self.scale))
            self.report.add(v.path, KERNELS, "", kernels, 1)
            self.report.add(v.path, BUSY, "%", 100 * profile.busy / seconds, 1)

    def _first_steps(self, firsts: Mapping[str, str]) -> None:
        """Measure the first step in a new process: side by side with an empty cache each, then one after another with
        the cache that was filled."""
        self._first_step("compiling anew", firsts, list(firsts), target=25)
        for name in firsts:
            if self.report.measured(_first(name), "compiling anew") is not None:
                self._first_step("compiled before", firsts, [name], target=6)

    def _first_step(self, quantity: str, firsts: Mapping[str, str], names: Sequence[str], target: float) -> None:
        with processes(len(names)) as group:
            scale = shorter(self.scale)
            futures = [
                process.submit(
                    measure.first_step, JOBS[firsts[name]].engine, scale, self.device, self.cache / f"first-{name}"
                )
                for name, process in zip(names, group, strict=True)
            ]
            for name, future in zip(names, futures, strict=True):
                if (seconds := self._result(_first(name), future)) is not None:
                    self.report.add(_first(name), quantity, "s", seconds, 1, target=target)

    def _errors(self, path: str) -> None:
        """Measure the errors of a gradient in a process of its own."""
        with processes(1) as (process,):
            found = self._result(path, process.submit(measure.errors, ERRORS[path], self.scale, self.device))
        if found is not None:
            self.report.add(path, WITH_TF32, "relative", found.tf32, 1)
            self.report.add(path, WITHOUT, "relative", found.float32, 1)

    def _textbook(self, v: Variant, process: Process) -> None:
        scale = shorter(v.scale(self.scale))
        theirs = self._result(
            v.path, process.submit(measure.textbook, v.job.textbook, scale, self.device, TEXTBOOK_REPEATS)
        )
        if theirs is None:
            return
        memory = self.report.measured(v.path, "memory")
        peak = None if memory is None else memory.engine
        self.report.add(v.path, "memory", "MB", peak, 1, textbook=theirs.peak_mb, target=v.target_memory)
        for other in [v, *(w for w in VARIANTS if w.single == v.path)]:
            row = self.report.measured(other.path, "time")
            if row is not None:
                value = v.job.value(theirs.seconds, scale)
                self.report.add(
                    other.path, "time", other.job.unit, row.engine, row.n, textbook=value, target=other.target
                )

    def _result(self, path: str, future: Future[T]) -> T | None:
        """Return the result of a process, or None with a message if it failed."""
        wait([future], self.left())
        if not future.done():
            raise _OutOfTime
        try:
            return future.result()
        except Exception as error:
            print(f"{path}: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}", flush=True)
            return None


class _OutOfTime(Exception):
    """The time limit is reached."""


def _first(name: str) -> str:
    return f"first step, {name}"
