"""One random (start, target) pair from a buffer: our format against the published one.

Both hold 10 experts with 51 snapshots of ConvNet-D3-W128 for CIFAR-10, random weights, 0.65 GB. Each way of
reading gets a process of its own. `cold` is the first read after the files were dropped from the page cache,
with the bytes that came from the disk and the growth of the peak memory; `warm` is the median of later ones.
Linux only.

    python benchmarks/buffer_read.py
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from condense.artifacts import Trajectories, TrajectoryWriter
from condense.networks import Functional
from condense.rng import Rng

NUM_EXPERTS, NUM_EPOCHS, EXPERT_EPOCHS = 10, 50, 2
PUBLISHED = "replay_buffer_0.pt"


@dataclass(frozen=True)
class Cost:
    cold_ms: float
    warm_ms: float
    disk_mb: float
    memory_mb: float


def write(folder: Path) -> Path:
    """Both formats, with the same weights; returns the folder of ours."""
    network, rng = Functional("convnet", (3, 32, 32), 10), Rng(0)
    assert network.num_params == 320_010
    writer = TrajectoryWriter(folder, "cifar10", {"network": network.name}, network.init(rng, "layout"))
    published = []
    for expert in range(NUM_EXPERTS):
        rows = torch.randn(NUM_EPOCHS + 1, network.num_params, generator=rng("weights", unit=expert))
        writer.add(expert, rows, rows[:, :0], {})
        published.append([[p.clone() for p in network.unflatten(row).values()] for row in rows])
    writer.save()
    torch.save(published, folder / PUBLISHED)
    os.sync()
    return writer.folder


def ours(folder: Path) -> Callable[[int, int], Tensor]:
    buffer = Trajectories(folder)

    def read(expert: int, start: int) -> Tensor:
        pair = buffer.pair(expert, start, start + EXPERT_EPOCHS)
        return torch.stack([torch.cat([p.flatten() for p in params.values()]) for params in pair])

    return read


def published(folder: Path, mmap: bool = False) -> Callable[[int, int], Tensor]:
    def read(expert: int, start: int) -> Tensor:
        experts = torch.load(folder.parent / PUBLISHED, weights_only=True, mmap=mmap)
        pair = experts[expert][start], experts[expert][start + EXPERT_EPOCHS]
        return torch.stack([torch.cat([p.flatten() for p in params]) for params in pair])

    return read


def published_mapped(folder: Path) -> Callable[[int, int], Tensor]:
    return published(folder, mmap=True)


def measure(way: Callable[[Path], Callable[[int, int], Tensor]], folder: Path, num_reads: int) -> Cost:
    draw = random.Random(0)
    for path in [*folder.iterdir(), folder.parent / PUBLISHED]:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    memory, disk = _status("VmRSS"), _disk_bytes()
    times = []
    read = way(folder)
    for number in range(num_reads + 1):
        expert, start = draw.randrange(NUM_EXPERTS), draw.randrange(NUM_EPOCHS - EXPERT_EPOCHS + 1)
        begun = time.perf_counter()
        pair = read(expert, start)
        times.append(1e3 * (time.perf_counter() - begun))
        assert pair.shape == (2, 320_010)
        if number == 0:
            memory, disk = _status("VmHWM") - memory, _disk_bytes() - disk
    return Cost(times[0], statistics.median(times[1:]), disk / 1e6, memory / 1e6)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def _disk_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def main() -> None:
    ways = {
        "condense": (ours, 200),
        "torch.load": (published, 5),
        "torch.load, mmap=True": (published_mapped, 20),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = write(Path(name))
        costs = {}
        for label, (way, num_reads) in ways.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                costs[label] = process.submit(measure, way, folder, num_reads).result()
    base = costs["condense"]
    print(f"| {'one pair from':<21} | cold ms | warm ms | disk MB | memory MB | times slower, warm |")
    print(f"|{'-' * 23}|--------:|--------:|--------:|----------:|-------------------:|")
    for label, cost in costs.items():
        print(
            f"| {label:<21} | {cost.cold_ms:7.1f} | {cost.warm_ms:7.1f} | {cost.disk_mb:7.1f} "
            f"| {cost.memory_mb:9.1f} | {cost.warm_ms / base.warm_ms:18.0f} |"
        )


if __name__ == "__main__":
    main()
