"""Measure time and memory of loading a data set and making a task, and the time of drawing a batch.

Three processes run: one without a cache, one that fills the cache, and one that uses it. `private` is the growth of
Private_Dirty, the memory that no other process shares; `peak` is the largest resident set minus the one at the start,
both with shared pages. Linux only.

    python -m benchmarks.data_memory cifar10.npz [--transforms channel zca] [--write]
"""

from __future__ import annotations

import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import costs
from benchmarks.harness import alone, reset_peak, status, status_bytes
from condense.augment import Augment
from condense.compute import prepare_device
from condense.data import load
from condense.networks import Functional
from condense.rng import Rng
from condense.task import Split, make_task

DRAWS = 1000


def private_mb() -> float:
    match = re.search(r"^Private_Dirty: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert match
    return int(match[1]) * 1024 / 1e6


def measure(file: str, transform: str, cache: Path | None) -> tuple[str, ...]:
    """Return the cells of a row: seconds, milliseconds of a draw, and memory."""
    prepare_device("cpu")
    reset_peak()
    private, held, begun = private_mb(), status_bytes("VmRSS"), time.perf_counter()
    arrays = load(file, cache=cache)
    loaded = time.perf_counter()
    network = Functional("convnet", arrays.input_shape, arrays.num_classes)
    split = Split(val_fraction=0.1)
    cpu = torch.device("cpu")
    task = make_task(
        arrays, transform=transform, split=split, network=network, augment=Augment(), device=cpu, cache=cache
    )
    made = time.perf_counter()
    rng, times = Rng(0), []
    for number in range(DRAWS):
        start = time.perf_counter()
        task.train.draw(number % task.num_classes, 256, rng("real", number))
        times.append(time.perf_counter() - start)
    draw = 1e3 * statistics.median(times)
    return (
        f"{loaded - begun:.3f}",
        f"{made - loaded:.3f}",
        f"{draw:.2f}",
        f"{private_mb() - private:.0f}",
        f"{(status_bytes('VmHWM') - held) / 1e6:.0f}",
    )


COLUMNS = ("data", "transform", "process", "load, s", "task, s", "256 images, ms", "private, MB", "peak, MB")


def main(words: list[str] | None = None) -> None:
    parser = costs.parser("data_memory", __doc__)
    parser.add_argument("data", nargs="+", type=Path, help="an .npz file")
    parser.add_argument("--transforms", nargs="+", default=["channel"])
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    with costs.measuring("data-memory", parser, words, COLUMNS, write=options.write) as table:
        for file in options.data:
            for transform in options.transforms:
                with tempfile.TemporaryDirectory() as folder:
                    cache = Path(folder)
                    for process, place in (("without a cache", None), ("first", cache), ("later", cache)):
                        table.add(file.stem, f"`{transform}`", process, *alone(measure, str(file), transform, place))


if __name__ == "__main__":
    sys.exit(status("data-memory", main))
