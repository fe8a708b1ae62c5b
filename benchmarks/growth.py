"""How time and peak memory grow with the size of the problem, and the exponents of that.

    python -m benchmarks.growth              # docs/images/growth.png and the table in docs/performance.md
    python -m benchmarks.growth --quick --out /tmp/somewhere

A small network (two blocks of 32 channels, 16x16 pixels), so that the curves reach far; the engine in eager float32,
so that what is seen are its algorithms and not its kernels. Time is the median of three runs, memory the growth of one
more over what was held before; every curve has a process of its own. An exponent is the slope of the least-squares
line through all points in the logarithms of both axes: 1 is proportional, 0 is constant.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import buffer_read, textbook
from benchmarks.harness import Run, allocator, alone, median_seconds, peak_mb, scratch
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
from benchmarks.report import replace_part
from condense.buffers.trajectories import Experts, build

SMALL = Scale(depth=2, width=32, side=16, batch_real=32, batch=32, num_batches=4, compute=EXACT)
CPU = torch.device("cpu")
Curve = Callable[[int], Run]
"""One run of the job of that size."""


@dataclass(frozen=True)
class Panel:
    """What grows, and the two jobs that grow with it."""

    title: str
    label: str
    sizes: tuple[int, ...]
    engine: Curve
    textbook: Curve


def matching(engine: bool, field: str, size: int) -> Run:
    """A step of trajectory matching: through ten steps of the student, or through ``size``."""
    scale = SMALL if field == "steps" else dataclasses.replace(SMALL, **{field: size})
    num_steps = size if field == "steps" else 10
    return (matching_engine if engine else matching_textbook)(num_steps, scale, CPU)


def gradients(engine: bool, num_classes: int) -> Run:
    """A sweep of gradient matching, two synthetic and 32 real images a class."""
    scale = dataclasses.replace(SMALL, num_classes=num_classes, ipc=2)
    return gradient_engine(scale, CPU) if engine else sweep(textbook.dc_step, 0.1, scale, CPU)


def experts(engine: bool, num_experts: int) -> Run:
    """Building a buffer of experts of two epochs."""
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
    """Opening a buffer of so many experts of 50 epochs and reading one pair."""
    layout = buffer_read.Layout(network="convnet:depth=2,width=32", input_shape=(3, 16, 16), num_experts=num_experts)
    folder = buffer_read.write(scratch(), layout)
    return lambda: (buffer_read.ours if engine else buffer_read.published)(folder)(num_experts - 1, 0)


PANELS = (
    Panel(
        "trajectory matching",
        "images per class",
        (1, 3, 10, 30, 100),
        partial(matching, True, "ipc"),
        partial(matching, False, "ipc"),
    ),
    Panel(
        "gradient matching",
        "classes",
        (10, 20, 50, 100),
        partial(gradients, True),
        partial(gradients, False),
    ),
    Panel(
        "trajectory matching",
        "unrolled steps",
        (5, 10, 20, 40, 80),
        partial(matching, True, "steps"),
        partial(matching, False, "steps"),
    ),
    Panel(
        "building a buffer",
        "experts",
        (1, 2, 4, 8, 16),
        partial(experts, True),
        partial(experts, False),
    ),
    Panel(
        "reading a pair",
        "experts in the buffer",
        (1, 4, 16, 64),
        partial(reading, True),
        partial(reading, False),
    ),
)


@dataclass(frozen=True)
class Points:
    """Seconds and MB, by size."""

    seconds: list[float]
    memory: list[float]


def measure(curve: Curve, engine: bool, sizes: Sequence[int], repeats: int) -> Points:
    allocator(engine)
    found = Points([], [])
    for size in sizes:
        run = curve(size)
        run()
        found.seconds.append(median_seconds(run, CPU, repeats))
        found.memory.append(max(peak_mb(run, CPU), 0.1))
    return found


LABELS = {"seconds": "time, s", "memory": "peak memory, MB"}


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def plot(found: dict[Panel, tuple[Points, Points]], path: Path) -> None:
    """Small multiples: time above, memory below, a column for each panel."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(3.4 * len(found), 6.4), layout="constrained", facecolor="white")
    axes = figure.subplots(2, len(found), squeeze=False)
    for column, (panel, sides) in enumerate(found.items()):
        for axis, (quantity, label) in zip(axes[:, column], LABELS.items(), strict=True):
            exponents = []
            for side, points, style in zip(("engine", "textbook"), sides, ("o-", "s--"), strict=True):
                values = getattr(points, quantity)
                axis.loglog(panel.sizes, values, style, label=side)
                exponents.append(f"{side} {exponent(panel.sizes, values):.2f}")
            axis.set_title(f"{panel.title}\n{', '.join(exponents)}", fontsize=10)
            axis.set_xlabel(panel.label)
            axis.set_ylabel(label)
            axis.set_xticks(panel.sizes, [str(size) for size in panel.sizes])
            axis.minorticks_off()
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.grid(alpha=0.3)
    axes[0, 0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def table(found: dict[Panel, tuple[Points, Points]]) -> str:
    lines = [
        "| path | against | from, to | time: engine | textbook | memory: engine | textbook |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for panel, sides in found.items():
        slopes = [exponent(panel.sizes, getattr(points, quantity)) for quantity in LABELS for points in sides]
        cells = [panel.title, panel.label, f"{panel.sizes[0]}, {panel.sizes[-1]}", *(f"{s:.2f}" for s in slopes)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__, formatter_class=formatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the two smallest sizes: shows that everything runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    found = {}
    for panel in PANELS:
        panel = dataclasses.replace(panel, sizes=panel.sizes[:2]) if options.quick else panel
        ours, theirs = (
            alone(measure, curve, engine, panel.sizes, options.repeats)
            for curve, engine in ((panel.engine, True), (panel.textbook, False))
        )
        found[panel] = ours, theirs
        print(f"{panel.title}, {panel.label}: {ours} {theirs}", flush=True)
    plot(found, options.out / "images" / "growth.png")
    page = f"![Time and peak memory against size](images/growth.png)\n\n{table(found)}"
    replace_part(options.out / "performance.md", "growth", page)
    print(table(found))


if __name__ == "__main__":
    main()
