"""The suite under other arithmetic: instruction sets, numbers of threads, the oldest torch (``make test-matrix``).

A processor rounds as its widest instructions do. With a cap on those that torch and oneDNN use, one machine rounds as
older ones do; where the cap lies above what the machine has, the cell tests what the machine has. Each cell is a run of
pytest in a process of its own, and its output lies in ``build/matrix/NAME.log``. Words after ``--`` go to pytest:

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
    """One way to run the suite."""

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
    """Run one cell, print its row, and say whether everything passed."""
    command = [str(cell.python), "-m", "pytest", "-q", "-n", str(workers), *words]
    apart = {
        "TORCHINDUCTOR_CACHE_DIR": str(LOGS / "compiled" / cell.name)
    }  # code of one instruction set fails on another
    environment = os.environ | cell.environment | apart | {"OMP_NUM_THREADS": str(cell.threads)}
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
    parser.add_argument("--workers", type=int, default=2, help="processes of pytest (default: 2)")
    parser.add_argument("words", nargs="*", help="arguments of pytest, after --")
    options = parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    passed = [run(cell, options.words, options.workers) for cell in CELLS if cell.name in options.cells]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    raise SystemExit(main())
