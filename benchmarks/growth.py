"""Measure how time and peak memory grow with the size of the problem, and fit exponents.

    python -m benchmarks.growth              # docs/growth.json, and its figure and table in docs/performance.md
    python -m benchmarks.growth --quick --out /tmp/somewhere

The network is small (two blocks of 32 channels, 16x16 pixels), so that the curves cover a wide range. The engine runs
in eager float32, because the comparison is of algorithms, not of kernels. Time is the median of three runs; memory is
the peak of a further run minus the memory held before it. Each curve is measured in its own process. An exponent is the
slope of the least-squares line through all points on logarithmic axes: 1 is proportional, 0 is constant.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import buffer_read, textbook
from benchmarks.harness import (
    Provenance,
    Run,
    allocator,
    alone,
    cores,
    count,
    machine,
    median_seconds,
    peak_mb,
    scratch,
    status,
    table_line,
    write,
)
from benchmarks.jobs import (
    EXACT,
    STRATEGY,
    Scale,
    fresh,
    gradient_engine,
    make,
    matching_engine,
    matching_textbook,
    sweep,
)
from benchmarks.report import DOCS, replace_part
from condense.buffers.trajectories import Experts, build
from condense.files import check_new_folder, replacing

SMALL = Scale(depth=2, width=32, side=16, batch_real=32, batch=32, num_batches=4, compute=EXACT)
CPU = torch.device("cpu")
Job = Callable[[bool, int], Run]
"""``job(engine, size)`` sets up the work of this size for the engine or the textbook, and returns one run of it."""


@dataclass(frozen=True)
class Panel:
    """A quantity that grows, its sizes, and the work that is measured."""

    title: str
    label: str
    sizes: tuple[int, ...]
    job: Job


def matching(engine: bool, size: int, *, field: str) -> Run:
    """Return a run of one step of trajectory matching with the given field, or number of student steps, set to
    ``size``; the other fields are those of ``SMALL``, with ten student steps."""
    scale = SMALL if field == "steps" else dataclasses.replace(SMALL, **{field: size})
    num_steps = size if field == "steps" else 10
    return (matching_engine if engine else matching_textbook)(num_steps, scale, CPU)


def gradients(engine: bool, num_classes: int) -> Run:
    """Return a run of one sweep of gradient matching over the classes, 2 synthetic and 32 real images per class."""
    scale = dataclasses.replace(SMALL, num_classes=num_classes, ipc=2)
    return gradient_engine(scale, CPU) if engine else sweep(textbook.dc_step, 0.1, scale, CPU)


def experts(engine: bool, num_experts: int) -> Run:
    """Return a run that builds a buffer of experts of two epochs."""
    task, num_epochs = make(SMALL, CPU), 2
    plan = Experts(num_experts=num_experts, num_epochs=num_epochs, batch_size=SMALL.batch)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as folder:
            build(task, plan, root=Path(folder), seed=0, compute=EXACT)

    def theirs() -> None:
        with tempfile.TemporaryDirectory() as folder:
            textbook.expert_buffer(
                partial(fresh, SMALL, CPU),
                task.train.images[:],
                task.train.labels,
                num_experts,
                num_epochs,
                Path(folder) / "buffer.pt",
                batch_size=SMALL.batch,
                strategy=STRATEGY,
            )

    return ours if engine else theirs


def reading(engine: bool, num_experts: int) -> Run:
    """Return a run that opens a buffer of ``num_experts`` experts of 50 epochs and reads one pair."""
    layout = buffer_read.Layout(network="convnet:depth=2,width=32", input_shape=(3, 16, 16), num_experts=num_experts)
    folder = buffer_read.write(scratch(), layout)
    return lambda: (buffer_read.ours if engine else buffer_read.published)(folder)(num_experts - 1, 0)


PANELS = (
    Panel("trajectory matching", "images per class", (1, 3, 10, 30, 100), partial(matching, field="ipc")),
    Panel("gradient matching", "classes", (10, 20, 50, 100), gradients),
    Panel("trajectory matching", "unrolled steps", (5, 10, 20, 40, 80), partial(matching, field="steps")),
    Panel("building a buffer", "experts", (1, 2, 4, 8, 16), experts),
    Panel("reading a pair", "experts in the buffer", (1, 4, 16, 64), reading),
)


@dataclass(frozen=True)
class Points:
    """Seconds and megabytes for each size."""

    seconds: list[float]
    memory: list[float]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What was measured for a panel."""

    title: str
    label: str
    sizes: tuple[int, ...]
    engine: Points
    textbook: Points


@dataclass(frozen=True, kw_only=True)
class Growth:
    """The curves of all panels, with their provenance."""

    curves: tuple[Curve, ...]
    repeats: int
    machine: str
    cores: int
    provenance: Provenance

    def text(self) -> str:
        """The figure, the table of exponents and the provenance, as a part of a page."""
        lines = [
            "![Time and peak memory against size](images/growth.png)",
            "",
            "| path | against | from, to | time: engine | textbook | memory: engine | textbook |",
            "|---|---|---|---:|---:|---:|---:|",
        ]
        for curve in self.curves:
            slopes = [
                exponent(curve.sizes, getattr(points, quantity))
                for quantity in LABELS
                for points in (curve.engine, curve.textbook)
            ]
            cells = [curve.title, curve.label, f"{curve.sizes[0]}, {curve.sizes[-1]}", *(f"{s:.2f}" for s in slopes)]
            lines.append(table_line(cells))
        return "\n".join([*lines, "", f"{self.machine}, {self.cores} cores. {self.provenance}, n = {self.repeats}."])


def measure(job: Job, engine: bool, sizes: Sequence[int], repeats: int) -> Points:
    allocator(engine)
    results = Points([], [])
    for size in sizes:
        run = job(engine, size)
        run()
        results.seconds.append(median_seconds(run, CPU, repeats))
        results.memory.append(max(peak_mb(run, CPU), 0.1))
    return results


LABELS = {"seconds": "time, s", "memory": "peak memory, MB"}


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def plot(curves: Sequence[Curve], path: Path) -> None:
    """Plot time in the upper row and memory in the lower row, with one column for each panel."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(3.4 * len(curves), 6.4), layout="constrained", facecolor="white")
    axes = figure.subplots(2, len(curves), squeeze=False)
    for column, curve in enumerate(curves):
        for axis, (quantity, label) in zip(axes[:, column], LABELS.items(), strict=True):
            exponents = []
            for side, points, style in (("engine", curve.engine, "o-"), ("textbook", curve.textbook, "s--")):
                values = getattr(points, quantity)
                axis.loglog(curve.sizes, values, style, label=side)
                exponents.append(f"{side} {exponent(curve.sizes, values):.2f}")
            axis.set_title(f"{curve.title}\n{', '.join(exponents)}", fontsize=10)
            axis.set_xlabel(curve.label)
            axis.set_ylabel(label)
            axis.set_xticks(curve.sizes, [str(size) for size in curve.sizes])
            axis.minorticks_off()
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.grid(alpha=0.3)
    axes[0, 0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as fresh:
        figure.savefig(fresh, dpi=110, format="png")


def main(words: list[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__, formatter_class=formatter)
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--quick", action="store_true", help="two smallest sizes only, to check that everything runs")
    parser.add_argument("--out", type=Path, help="folder of all that is written (default: docs; with --quick: none)")
    parser.add_argument("--threads", type=count, default=torch.get_num_threads())
    options = parser.parse_args(words)
    folder = options.out or (None if options.quick else DOCS)
    if folder is not None:
        check_new_folder(folder)
    torch.set_num_threads(options.threads)
    curves = []
    for panel in PANELS:
        sizes = panel.sizes[:2] if options.quick else panel.sizes
        engine, theirs = (alone(measure, panel.job, side, sizes, options.repeats) for side in (True, False))
        curves.append(Curve(title=panel.title, label=panel.label, sizes=sizes, engine=engine, textbook=theirs))
        print(f"{panel.title}, {panel.label}: {engine} {theirs}", flush=True)
    growth = Growth(
        curves=tuple(curves),
        repeats=options.repeats,
        machine=machine(CPU),
        cores=cores(),
        provenance=Provenance.now(CPU),
    )
    print(growth.text())
    if folder is not None:
        write(growth, folder / "growth.json")
        plot(curves, folder / "images" / "growth.png")
        replace_part(folder / "performance.md", "growth", growth.text())


if __name__ == "__main__":
    sys.exit(status("growth", main))
