"""Run the tests with other instruction sets, numbers of threads and the oldest torch (``make test-matrix``).

Rounding depends on the widest instructions that torch and oneDNN use. With a limit on these, a machine rounds like an
older one; a limit above what the machine has is without effect. Each cell is a run of pytest in its own process, with
the output in ``build/matrix/NAME.log``. Arguments after ``--`` are passed to pytest:

    python -m tests.matrix --cells avx2 oldest-torch -- tests/test_golden.py
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build" / "matrix"
OLDEST = ROOT / ".venv-oldest" / "bin" / "python"


@dataclass(frozen=True)
class Cell:
    """One environment in which the tests run."""

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    threads: int = 1
    python: Path = Path(sys.executable)


CELLS = (
    Cell("native"),
    Cell("two-threads", threads=2),
    Cell("no-vectors", {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}),
    Cell("avx2", {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
    Cell("avx512", {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
    Cell("oldest-torch", python=OLDEST),
)


def run(cell: Cell, words: list[str], workers: int) -> bool:
    """Run one cell and print its row; return whether all tests passed."""
    command = [str(cell.python), "-m", "pytest", "-q", "-n", str(workers), *words]
    # each cell has its own compiled code: code for one instruction set fails on another
    compiled = {"TORCHINDUCTOR_CACHE_DIR": str(LOGS / "compiled" / cell.name)}
    environment = os.environ | cell.environment | compiled | {"OMP_NUM_THREADS": str(cell.threads)}
    begun = time.monotonic()
    with open(LOGS / f"{cell.name}.log", "w", encoding="utf-8") as log:
        status = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    lines = (LOGS / f"{cell.name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
    summary = re.sub(r" in [\d.]+s.*", "", lines[-1]) if lines else "nothing was printed"
    print(f"{cell.name:<14}{summary:<60}{(time.monotonic() - begun) / 60:5.1f} min", flush=True)
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            print(f"    {line}", flush=True)
    return status == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [cell.name for cell in CELLS]
    parser.add_argument("--cells", nargs="+", choices=names, default=names, help="the cells to run (default: all)")
    parser.add_argument("--workers", type=int, default=2, help="number of pytest processes (default: 2)")
    parser.add_argument("words", nargs="*", help="arguments for pytest, after --")
    options = parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    passed = [run(cell, options.words, options.workers) for cell in CELLS if cell.name in options.cells]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    raise SystemExit(main())
