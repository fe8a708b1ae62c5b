"""Measure time and memory of making a data set of photos.

    python -m benchmarks.photos [--photos 20000] [--write]

The photos are JPEG files of 320x240 pixels in ten classes, made of random colours that vary smoothly.
`condense prepare` reads them into images of 64x64. Memory is the largest size of what the process holds by itself;
pages of files, which the system can drop, are not counted. Linux only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import costs
from benchmarks.harness import child, count, has_ended, left_by, status

NUM_CLASSES = 10
COLUMNS = ("photos", "images, MB", "time, s", "processor time of a photo, ms", "memory, MB")


def write(folder: Path, num_photos: int) -> None:
    """Write photos, ``num_photos`` in all, with a folder for each class."""
    for c in range(NUM_CLASSES):
        (folder / f"class{c}").mkdir(parents=True)

    def save(number: int) -> None:
        colours = np.random.default_rng(number).integers(0, 256, (12, 16, 3), np.uint8)
        photo = Image.fromarray(colours).resize((320, 240), Image.Resampling.BICUBIC)
        photo.save(folder / f"class{number % NUM_CLASSES}" / f"{number}.jpg", quality=90)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(save, range(num_photos)))


def prepared(photos: Path, out: Path, threads: int) -> tuple[float, float, float]:
    """Return the seconds, the seconds of processor time and the megabytes of `condense prepare`."""
    command = [sys.executable, "-m", "condense", "prepare", str(photos), str(out), "--size", "64"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    begun, most = time.perf_counter(), 0
    with child(command, stdout=subprocess.DEVNULL, env=environment) as process:
        memory = Path(f"/proc/{process.pid}/status")
        while not has_ended(process):
            lines = memory.read_text().splitlines()
            most = max([most, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])
            time.sleep(0.02)
        seconds = time.perf_counter() - begun
        usage = left_by(process)
    if process.returncode:
        sys.exit(process.returncode)
    return seconds, usage.ru_utime + usage.ru_stime, most * 1024 / 1e6


def main(words: list[str] | None = None) -> None:
    parser = costs.parser("photos", __doc__)
    parser.add_argument("--photos", nargs="+", type=count, default=[20_000], help="numbers of photos, a row for each")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    with costs.measuring("photos", parser, words, COLUMNS, write=options.write) as table:
        for num in options.photos:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                write(folder / "photos", num)
                seconds, cpu, megabytes = prepared(folder / "photos", folder / "set.npz", options.threads)
            images = num * 64 * 64 * 3 / 1e6
            table.add(f"{num:,}", f"{images:,.0f}", f"{seconds:.0f}", f"{1e3 * cpu / num:.1f}", f"{megabytes:.0f}")


if __name__ == "__main__":
    sys.exit(status("photos", main))
