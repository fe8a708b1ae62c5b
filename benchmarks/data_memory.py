"""What a process pays for its data set: time and memory of loading it and making a task, time of a draw.

Each round is a process of its own: without a cache, the first one that fills it, and a later one. `own` is the growth
of Private_Dirty, which no other process shares; `peak` that of the resident set, shared pages included. Linux only.

    python benchmarks/data_memory.py cifar10.npz channel
"""

from __future__ import annotations

import re
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from condense.augment import Augment
from condense.data import load
from condense.networks import Functional
from condense.task import Split, make_task

DRAWS = 1000


def own_mb() -> float:
    found = re.search(r"^Private_Dirty: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) / 1024


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(file: str, transform: str, cache: Path | None) -> str:
    own, peak, begun = own_mb(), peak_mb(), time.perf_counter()
    arrays = load(file, cache=cache)
    loaded = time.perf_counter()
    network = Functional("convnet", arrays.input_shape, arrays.num_classes)
    split = Split(val_fraction=0.1)
    cpu = torch.device("cpu")
    task = make_task(
        arrays, transform=transform, split=split, network=network, augment=Augment(), device=cpu, cache=cache
    )
    made = time.perf_counter()
    generator, times = torch.Generator().manual_seed(0), []
    for number in range(DRAWS):
        start = time.perf_counter()
        task.train.draw(number % task.num_classes, 256, generator)
        times.append(time.perf_counter() - start)
    draw = 1e3 * statistics.median(times)
    return (
        f"load {loaded - begun:6.3f} s   task {made - loaded:6.3f} s   256 images {draw:.2f} ms   "
        f"own {own_mb() - own:5.0f} MB   peak {peak_mb() - peak:5.0f} MB"
    )


if __name__ == "__main__":
    file, transform = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        for name, cache in (("no cache", None), ("first", Path(folder)), ("later", Path(folder))):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                print(f"{name:10}", pool.submit(measure, file, transform, cache).result(), flush=True)
