"""Measure time and memory of loading a data set and making a task, and the time of drawing a batch.

Three processes run: one without a cache, one that fills the cache, and one that uses it. `private` is the growth of
Private_Dirty, the memory that no other process shares; `peak` is the growth of the largest resident set, which includes
shared pages. Linux only.

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
from condense.rng import Rng
from condense.task import Split, make_task

DRAWS = 1000


def private_mb() -> float:
    match = re.search(r"^Private_Dirty: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert match
    return int(match[1]) / 1024


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(file: str, transform: str, cache: Path | None) -> str:
    private, peak, begun = private_mb(), peak_mb(), time.perf_counter()
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
        f"load {loaded - begun:6.3f} s   task {made - loaded:6.3f} s   256 images {draw:.2f} ms   "
        f"private {private_mb() - private:5.0f} MB   peak {peak_mb() - peak:5.0f} MB"
    )


if __name__ == "__main__":
    file, transform = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        for name, cache in (("no cache", None), ("first", Path(folder)), ("later", Path(folder))):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                print(f"{name:10}", pool.submit(measure, file, transform, cache).result(), flush=True)
