"""Compare reading a random (start, target) pair from our buffer format and from the published format.

Both buffers hold 10 experts with 51 snapshots of ConvNet-D3-W128 for CIFAR-10, with random weights, 0.65 GB. Each
reader runs in its own process. `cold` is the first read after the files were dropped from the page cache, with the
bytes read from the disk and the growth of the peak memory. `warm` is the median of later reads. Linux only.

    python -m benchmarks.buffer_read [--threads N] [--quick] [--write]
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import costs
from benchmarks.harness import alone, reset_peak, status, status_bytes
from condense.artifacts import BufferWriter, Trajectories
from condense.networks import Functional, InputShape
from condense.rng import Rng

EXPERT_EPOCHS = 2
PUBLISHED = "replay_buffer_0.pt"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The network and the size of a buffer."""

    network: str = "convnet"
    input_shape: InputShape = (3, 32, 32)
    num_experts: int = 10
    num_epochs: int = 50


FULL = Layout()
QUICK = Layout(network="convnet:depth=1,width=4", input_shape=(3, 8, 8), num_experts=2, num_epochs=4)


@dataclass(frozen=True)
class Cost:
    cold_ms: float
    warm_ms: float
    disk_mb: float
    memory_mb: float


def write(folder: Path, layout: Layout) -> Path:
    """Write buffers of both formats with the same weights below ``folder``; return the folder of ours."""
    network, rng = Functional(layout.network, layout.input_shape, 10), Rng(0)
    writer = BufferWriter(folder, "cifar10", {"network": network.name}, network.init(rng, "layout"))
    published = []
    for expert in range(layout.num_experts):
        rows = torch.randn(layout.num_epochs + 1, network.num_params, generator=rng.generator("weights", unit=expert))
        writer.add(expert, rows, rows[:, :0], {})
        published.append([[p.clone() for p in network.unflatten(row).values()] for row in rows])
    writer.save()
    torch.save(published, folder / PUBLISHED)
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


def measure(way: Callable[[Path], Callable[[int, int], Tensor]], folder: Path, layout: Layout, num_reads: int) -> Cost:
    draw = random.Random(0)
    os.sync()  # the page cache drops clean pages only
    for path in [*folder.iterdir(), folder.parent / PUBLISHED]:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    reset_peak()
    memory, disk = status_bytes("VmRSS"), _disk_bytes()
    times = []
    read = way(folder)
    for number in range(num_reads + 1):
        expert, start = draw.randrange(layout.num_experts), draw.randrange(layout.num_epochs - EXPERT_EPOCHS + 1)
        begun = time.perf_counter()
        pair = read(expert, start)
        times.append(1e3 * (time.perf_counter() - begun))
        assert len(pair) == 2
        if number == 0:
            memory, disk = status_bytes("VmHWM") - memory, _disk_bytes() - disk
    return Cost(times[0], statistics.median(times[1:]), disk / 1e6, memory / 1e6)


def _disk_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


COLUMNS = ("one pair from", "cold, ms", "warm, ms", "disk, MB", "memory, MB", "times slower, warm")


def main(words: list[str] | None = None) -> None:
    parser = costs.parser("buffer_read", __doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny buffer, to check that everything runs")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    layout = QUICK if options.quick else FULL
    ways = {
        "condense": (ours, 200),
        "`torch.load`": (published, 5),
        "`torch.load`, `mmap=True`": (published_mapped, 20),
    }
    with (
        tempfile.TemporaryDirectory() as name,
        costs.measuring("buffer-read", parser, words, COLUMNS, write=options.write) as table,
    ):
        folder, base = write(Path(name), layout), None
        for label, (way, num_reads) in ways.items():
            cost = alone(measure, way, folder, layout, num_reads)
            base = base or cost.warm_ms
            numbers = f"{cost.cold_ms:,.1f}", f"{cost.warm_ms:.1f}", f"{cost.disk_mb:.1f}", f"{cost.memory_mb:.1f}"
            table.add(label, *numbers, f"{cost.warm_ms / base:.0f}")


if __name__ == "__main__":
    sys.exit(status("buffer-read", main))
