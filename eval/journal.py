"""The trained networks of an evaluation that is not done yet: one line each, so that a stopped one goes on."""

from __future__ import annotations

import contextlib
import glob
import hashlib
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from condense.eval import metrics
from condense.eval.metrics import Scores
from condense.files import canonical_json
from condense.schema import from_json
from condense.tracking import Log, read_log


class Cell(NamedTuple):
    """One trained network."""

    scores: Scores
    seconds: float
    peak_memory: int
    """Bytes; see ``condense.compute.peak_memory``."""

    def pack(self) -> Tensor:
        """One float64 vector: the scores, the seconds, the memory."""
        return torch.cat([self.scores.pack(), torch.tensor([self.seconds, self.peak_memory], dtype=torch.float64)])

    @classmethod
    def unpack(cls, vector: Tensor) -> Cell:
        """The inverse of ``pack``."""
        return cls(Scores.unpack(vector[:-2]), float(vector[-2]), int(vector[-1]))


def width(num_classes: int) -> int:
    """Numbers in a packed cell."""
    return metrics.width(num_classes) + 2


@dataclass(frozen=True)
class _Line:
    k: int
    cell: tuple[float, ...]

    def __post_init__(self) -> None:
        seconds, peak_memory = self.cell[-2:]
        if self.k < 0 or not all(0 <= x <= 1 for x in self.cell[:2]) or not (0 <= seconds and 0 <= peak_memory < 2**63):
            raise ValueError("numbers out of range")


class Journal:
    """``NAME.cells.rank<k>.jsonl`` beside the result file; each process appends to its own."""

    def __init__(self, target: Path, rank: int) -> None:
        self._target, self._rank = target, rank

    def find(self, decided_by: Mapping[str, Any]) -> dict[int, Cell]:
        """The networks there are, by number, of those that all of ``decided_by`` decided."""
        key, found = _key(decided_by), {}
        for line in (line for file in self._files() for line in read_log(file) if line.get("key") == key):
            with contextlib.suppress(ValueError):  # a damaged line: that network is trained again
                kept = from_json(_Line, line, "line")
                if len(kept.cell) == decided_by["numbers"]:
                    found[kept.k] = Cell.unpack(torch.tensor(kept.cell, dtype=torch.float64))
        return found

    def add(self, decided_by: Mapping[str, Any], k: int, cell: Cell) -> None:
        """Keep network ``k``; it is on disk when this returns. Raises ValueError where the disk is full."""
        line = {"key": _key(decided_by), "network": decided_by["network"], "k": k, "cell": cell.pack().tolist()}
        with closing(Log(self._target.with_suffix(f".cells.rank{self._rank}.jsonl"))) as log:
            log.write(line)
            log.sync()

    def remove(self) -> None:
        """All of it, once the results are written."""
        for file in self._files():
            file.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self._target.parent.glob(f"{glob.escape(self._target.stem)}.cells.rank*.jsonl"))


def _key(decided_by: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(decided_by).encode()).hexdigest()
