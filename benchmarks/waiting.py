"""Measure what it costs that threads wait for one another on a machine whose cores other processes keep busy.

    python -m benchmarks.waiting [--threads 2] [--busy 4] [--repeats 7] [--quick] [--write]

The work is an update of FRePo with 512 real images, compiled and in bfloat16 where the processor has it. Every way of
waiting runs in a process of its own, beside ``--busy`` processes that compute without end. Figures are medians over the
updates after the first. GNU's OpenMP, which PyTorch's packages for Linux load, reads the way from the environment.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Mapping

import torch

from benchmarks import costs
from benchmarks.harness import allocator, alone, count, processes, status
from benchmarks.jobs import CPU, QUICK, Scale, fast, frepo_engine
from condense.cli import SPINS
from condense.compute import prepare_device

ONE = "one thread, which waits for none"
WAYS: Mapping[str, Mapping[str, str]] = {
    "300,000 rounds, the default of GNU's OpenMP": {"GOMP_SPINCOUNT": "300000"},
    f"{int(SPINS):,} rounds, as the command line sets it": {"GOMP_SPINCOUNT": SPINS},
    "1,000 rounds": {"GOMP_SPINCOUNT": "1000"},
    "none (`OMP_WAIT_POLICY=passive`)": {"OMP_WAIT_POLICY": "passive"},
    ONE: {},
}
"""The environment of each way to wait."""


def measure(scale: Scale, repeats: int) -> tuple[float, float]:
    """Return the median of the seconds of an update, and that of its seconds of processor time."""
    prepare_device("cpu")
    allocator(engine=True)
    step = frepo_engine(scale, CPU)
    step()
    turns = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        turns.append((time.perf_counter() - wall, time.process_time() - cpu))
    wall, cpu = (statistics.median(turn[clock] for turn in turns) for clock in (0, 1))
    return wall, cpu


def compute() -> None:
    """Keep a core busy, without end."""
    torch.set_num_threads(1)
    x = torch.rand(256, 256)
    while True:
        x = (x @ x).clamp(max=1)


COLUMNS = ("threads", "waiting", "time, s", "processor time, s")


def main(words: list[str] | None = None) -> None:
    parser = costs.parser("waiting", __doc__)
    parser.add_argument("--busy", type=count, default=4, help="number of other processes that compute")
    parser.add_argument("--repeats", type=count, default=7)
    parser.add_argument("--quick", action="store_true", help="a tiny update, to check that everything runs")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    scale = QUICK if options.quick else Scale(num_real=512, compute=fast(CPU))
    with (
        processes(options.busy) as others,
        costs.measuring("waiting", parser, words, COLUMNS, write=options.write) as table,
    ):
        for other in others:
            other.submit(compute)
        for way, environment in WAYS.items():
            threads = 1 if way == ONE else options.threads
            torch.set_num_threads(threads)
            given = dict(os.environ)
            os.environ.update(environment)
            wall, cpu = alone(measure, scale, options.repeats)
            os.environ.clear()
            os.environ.update(given)
            torch.set_num_threads(options.threads)
            table.add(str(threads), way, f"{wall:.2f}", f"{cpu:.2f}")


if __name__ == "__main__":
    sys.exit(status("waiting", main))
