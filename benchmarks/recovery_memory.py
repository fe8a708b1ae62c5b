"""Measure the peak memory of a recovery with many classes, and of its continuation from within a chunk.

    python -m benchmarks.recovery_memory                   # 1,000 classes, 1 and 10 images of 64 x 64 pixels of each
    python -m benchmarks.recovery_memory --ipc 1 --classes 200

The data are synthetic: as many training images of each class as are recovered, and one test image. A ConvNet of depth 3
and width 8 with BatchNorm is trained for an epoch. ``condense distill sre2l`` then takes three steps for each chunk of
100 images, once without interruption, and once killed after half of the chunks and resumed. Peak is the largest
resident set of a process, with interpreter and libraries. Linux only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import machine
from condense import api

NETWORK = "convnet:depth=3,width=8,norm=batch"
CHUNK = 100


def main(words: list[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--ipc", nargs="+", type=int, default=[1, 10], help="images per class, a row for each")
    parser.add_argument("--size", type=int, default=64, help="pixels along each side")
    options = parser.parse_args(words)
    print(f"{machine(torch.device('cpu'))}, torch {torch.__version__}, {date.today()}\n")
    print("| images per class | images in 8 bits, MB | peak, MB | peak of the resumed run, MB | seconds |")
    print("|---|---|---|---|---|")
    for ipc in options.ipc:
        with tempfile.TemporaryDirectory() as name:
            folder, num_chunks = Path(name), ipc * -(-options.classes // CHUNK)
            write(folder / "data.npz", options.classes, ipc, (3, options.size, options.size))
            api.make_buffer(
                folder / "data.npz", NETWORK, num_experts=1, num_epochs=1, keep="last", out=folder, device="cpu"
            )
            begun = time.perf_counter()
            whole = distil(folder, "whole", ipc)
            seconds = time.perf_counter() - begun
            distil(folder, "stopped", ipc, kill_after=num_chunks // 2)
            resumed = distil(folder, "stopped", ipc, "--resume")
            sets = [(folder / run / "synthetic.safetensors").read_bytes() for run in ("whole", "stopped")]
            if sets[0] != sets[1]:
                sys.exit("the resumed run wrote other bytes")
        megabytes = 3 * options.size**2 * options.classes * ipc / 1e6
        print(f"| {ipc} | {megabytes:.0f} | {whole:.0f} | {resumed:.0f} | {seconds:.0f} |", flush=True)


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
    process = subprocess.Popen([sys.executable, *command.split(), *flags], stdout=subprocess.DEVNULL)
    if kill_after is not None:
        ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while len(list((out / "scratch").glob("chunk_*.safetensors"))) < kill_after:
            if os.waitid(os.P_PID, process.pid, ended) is not None:
                sys.exit("the run ended before it was killed")
            time.sleep(0.01)
        process.kill()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if kill_after is None and process.returncode:
        sys.exit(process.returncode)
    return usage.ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main()
