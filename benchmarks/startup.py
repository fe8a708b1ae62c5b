"""Measure how long the command line takes to answer, and to start its work.

python -m benchmarks.startup RUN [FLAGS]      # `condense evaluate` until the end of the first epoch
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condense import cli

if TYPE_CHECKING:
    from benchmarks.jobs import Scale


def main() -> None:
    """Run `condense evaluate` with the given arguments, and exit after the first epoch of the networks that are
    trained first."""
    from condense.train import Trainer

    plain = Trainer.run_together

    def leave(epochs_done: int, weights: Any) -> None:
        raise SystemExit(0)

    def run_together(self: Trainer, *args: Any, **options: Any) -> Any:
        return plain(self, *args, **options | {"on_epoch": leave})

    Trainer.run_together = run_together  # type: ignore[method-assign]
    cli.main(["evaluate", *sys.argv[1:]])
    raise AssertionError("no epoch was run")


def wall(command: Sequence[str], cache: Path | None = None) -> float:
    """Return the seconds that a command takes with as many threads as this process; raise if it fails. ``cache`` is its
    folder of compiled code."""
    import torch

    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    env |= {} if cache is None else {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    begun = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, env=env, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def median_wall(command: Sequence[str], repeats: int, cache: Path | None = None) -> float:
    return statistics.median(wall(command, cache) for _ in range(repeats))


def first_epoch(scale: Scale, device: str, repeats: int) -> tuple[float, float]:
    """Return the seconds from the start of `condense evaluate` to the end of the first epoch, for a set of ``ipc``
    images per class: with an empty cache of compiled code, and with a filled one (median)."""
    import numpy as np

    from benchmarks.jobs import arrays
    from condense import api

    data = arrays(scale)
    compute = {name: str(value) for name, value in dataclasses.asdict(scale.compute).items() if value is not None}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, run = folder / "data.npz", folder / "run"
        few = {"x_test": data.x_train[:10], "y_test": data.y_train[:10]}
        np.savez(source, x_train=data.x_train, y_train=data.y_train, **few)
        api.distill("random", dataset=source, network=scale.network, ipc=scale.ipc, out=run, device=device)
        flags = [word for field, value in compute.items() for word in (f"--compute.{field.replace('_', '-')}", value)]
        command = [
            *("-m", "benchmarks.startup", str(run), "--networks", scale.network),
            *("--protocol", "canonical-dsa", "--device", device, *flags),
        ]
        cold = wall(command, folder / "cache")
        return cold, median_wall(command, repeats, folder / "cache")


if __name__ == "__main__":
    from benchmarks.harness import status

    sys.exit(status("startup", main))
