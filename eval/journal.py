"""The trained networks of an evaluation that is not done yet: one line each, so that a stopped one goes on."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import warnings
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from condense.eval import metrics
from condense.eval.metrics import Scores
from condense.files import canonical_json, locked, reporting, write_text
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
    """``NAME.cells.rank<k>.jsonl`` beside the result file: each process of one evaluation appends to its own.

    Evaluations that run at once share these files, so they are written under the lock of the result file.

    Args:
        target: the result file.
        rank: number of this process.
        needed: whether a line that cannot be written is an error; else there is one warning, and no further line.
    """

    def __init__(self, target: Path, rank: int, *, needed: bool = True) -> None:
        self._target, self._rank, self._needed = target, rank, needed
        self._keys: set[str] = set()
        self._given_up = False

    def find(self, decided_by: Mapping[str, Any]) -> dict[int, Cell]:
        """The networks there are, by number, of those that all of ``decided_by`` decided."""
        key, found = _key(decided_by), {}
        self._keys.add(key)
        for line in (line for file in self._files() for line in read_log(file) if line.get("key") == key):
            with contextlib.suppress(ValueError):  # a damaged line: that network is trained again
                kept = from_json(_Line, line, "line")
                if len(kept.cell) == decided_by["numbers"]:
                    found[kept.k] = Cell.unpack(torch.tensor(kept.cell, dtype=torch.float64))
        return found

    def add(self, decided_by: Mapping[str, Any], k: int, cell: Cell) -> None:
        """Keep network ``k``; it is on disk when this returns. Raises ValueError where it is needed and not written."""
        if self._given_up:
            return
        key = _key(decided_by)
        self._keys.add(key)
        line = {"key": key, "network": decided_by["network"], "k": k, "cell": cell.pack().tolist()}
        file = self._target.with_suffix(f".cells.rank{self._rank}.jsonl")
        try:
            with locked(self._target), closing(Log(file)) as log:
                log.write(line)
                log.sync()
        except ValueError as error:
            if self._needed:
                raise
            self._given_up = True
            warnings.warn(f"trained networks are not kept: {error}", stacklevel=2)

    def remove(self) -> None:
        """The networks that this journal was asked for, once the results are written.

        Those of other evaluations stay.
        """
        with locked(self._target), reporting(self._target):
            for file in self._files():
                others = [line for line in read_log(file) if line.get("key") not in self._keys]
                if others:
                    write_text(file, "".join(json.dumps(line) + "\n" for line in others))
                else:
                    file.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self._target.parent.glob(f"{glob.escape(self._target.stem)}.cells.rank*.jsonl"))


def _key(decided_by: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(decided_by).encode()).hexdigest()
