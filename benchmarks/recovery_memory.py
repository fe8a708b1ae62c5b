"""Measure the peak memory of a recovery with many classes, and of its continuation from within a chunk.

    python -m benchmarks.recovery_memory                   # 1,000 classes, 1 and 10 images of 64 x 64 pixels of each
    python -m benchmarks.recovery_memory --ipc 1 --classes 200

The data are synthetic: as many training images of each class as are recovered, and one test image. A ConvNet of depth 3
and width 8 with BatchNorm is trained for an epoch. ``condense distill sre2l`` then takes three steps for each chunk of
100 images, once without interruption, and once killed after half of the chunks and resumed. Peak is the largest
resident set of a process, with interpreter and libraries. Linux only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import costs
from benchmarks.harness import alone, child, count, has_ended, left_by, status
from condense import api

NETWORK = "convnet:depth=3,width=8,norm=batch"
CHUNK = 100


COLUMNS = ("images per class", "images in 8 bits, MB", "peak, MB", "peak, resumed, MB")


def main(words: list[str] | None = None) -> None:
    parser = costs.parser("recovery_memory", __doc__)
    parser.add_argument("--classes", type=count, default=1000)
    parser.add_argument("--ipc", nargs="+", type=count, default=[1, 10], help="images per class, a row for each")
    parser.add_argument("--size", type=count, default=64, help="pixels along each side")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    with costs.measuring("recovery-memory", parser, words, COLUMNS, write=options.write) as table:
        for ipc in options.ipc:
            with tempfile.TemporaryDirectory() as name:
                whole, resumed = peaks(Path(name), options.classes, ipc, options.size)
            megabytes = 3 * options.size**2 * options.classes * ipc / 1e6
            table.add(str(ipc), f"{megabytes:.0f}", f"{whole:,.0f}", f"{resumed:,.0f}")


def peaks(folder: Path, num_classes: int, ipc: int, size: int) -> tuple[float, float]:
    """Return the peaks, in MB, of a recovery and of the process that continues a killed one; both write the same
    bytes."""
    alone(prepare, folder, num_classes, ipc, size)
    whole = distil(folder, "whole", ipc)
    distil(folder, "stopped", ipc, kill_after=ipc * -(-num_classes // CHUNK) // 2)
    resumed = distil(folder, "stopped", ipc, "--resume")
    sets = [(folder / run / "synthetic.safetensors").read_bytes() for run in ("whole", "stopped")]
    if sets[0] != sets[1]:
        sys.exit("the resumed run wrote other bytes")
    return whole, resumed


def prepare(folder: Path, num_classes: int, ipc: int, size: int) -> None:
    """Write data and buffer. The memory of the process that starts a command counts in the command's peak, so this one
    runs in another."""
    write(folder / "data.npz", num_classes, ipc, (3, size, size))
    api.make_buffer(folder / "data.npz", NETWORK, num_experts=1, num_epochs=1, keep="last", out=folder, device="cpu")


def write(path: Path, num_classes: int, each: int, shape: tuple[int, int, int]) -> None:
    """Write random images, ``each`` training images of every class and one test image."""
    rng, parts = np.random.default_rng(0), dict[str, np.ndarray]()
    for part, num in (("train", num_classes * each), ("test", num_classes)):
        parts |= {f"x_{part}": rng.integers(0, 256, (num, *shape), np.uint8), f"y_{part}": np.arange(num) % num_classes}
    np.savez(path, **parts)


def distil(folder: Path, run: str, ipc: int, *flags: str, kill_after: int | None = None) -> float:
    """Return the peak of the resident set, in MB, of a command that distils, or is killed after some chunks."""
    out = folder / run
    command = f"-m condense distill sre2l --dataset {folder / 'data.npz'} --network {NETWORK} --ipc {ipc} --device cpu"
    command += f" --buffers {folder} --out {out} --method.num-steps 3 --method.chunk {CHUNK} --decode pixels-8bit"
    with child([sys.executable, *command.split(), *flags], stdout=subprocess.DEVNULL) as process:
        if kill_after is not None:
            while len(list((out / "scratch").glob("chunk_*.safetensors"))) < kill_after:
                if has_ended(process):
                    sys.exit("the run ended before it was killed")
                time.sleep(0.01)
            process.kill()
        usage = left_by(process)
    if kill_after is None and process.returncode:
        sys.exit(process.returncode)
    return usage.ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    sys.exit(status("recovery-memory", main))
