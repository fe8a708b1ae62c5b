"""Stores for the scores of trained networks, so that no network is trained twice.

``Journal`` stores those of an unfinished evaluation, beside its result file. ``CachedCells`` stores those of baselines
in the cache, where later evaluations find them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import json
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from condense.cache import Cache
from condense.eval.metrics import NUM_BINS, Scores
from condense.files import canonical_json, locked, read_json, reporting, write_text
from condense.schema import from_json
from condense.tracking import Log, read_log


@dataclass(frozen=True)
class Cell:
    """The scores and the cost of one trained network."""

    scores: Scores
    seconds: float
    peak_memory: int
    """Peak memory in bytes; see ``condense.compute.peak_memory``."""

    def __post_init__(self) -> None:
        fractions = (self.scores.accuracy, self.scores.macro_f1, *self.scores.per_class)
        if not all(0 <= x <= 1 for x in fractions) or self.seconds < 0 or not 0 <= self.peak_memory < 2**63:
            raise ValueError("a score, time or memory is out of range")


class CellStore(Protocol):
    """A store of trained networks, each under its provenance and its number k.

    ``provenance`` is a JSON object of everything that affects the scores, with at least ``network`` (the name of the
    architecture) and ``num_classes``.
    """

    def find(self, provenance: Mapping[str, Any], num_networks: int) -> dict[int, Cell]:
        """Return those of networks 0 to ``num_networks`` - 1 that are stored, by number."""

    def add(self, provenance: Mapping[str, Any], k: int, cell: Cell) -> None:
        """Store network ``k``."""


@dataclass(frozen=True)
class CachedCells:
    """A store of baseline networks, with one cache entry for each.

    Args:
        root: the cache folder; None: nothing is stored.
    """

    root: Path | None

    def find(self, provenance: Mapping[str, Any], num_networks: int) -> dict[int, Cell]:
        """See ``CellStore``."""

        def read(folder: Path) -> Cell:
            return _cell(read_json(folder / _CELL, fix="train it again"), provenance)

        stored = {k: self._cache.read({**provenance, "k": k}, read) for k in range(num_networks)}
        return {k: cell for k, cell in stored.items() if cell is not None}

    def add(self, provenance: Mapping[str, Any], k: int, cell: Cell) -> None:
        """See ``CellStore``."""

        def write(folder: Path) -> None:
            (folder / _CELL).write_text(json.dumps(dataclasses.asdict(cell), allow_nan=False), encoding="utf-8")

        about = f"{provenance['network']}, network {k}, accuracy {100 * cell.scores.accuracy:.1f} %"
        self._cache.write({**provenance, "k": k}, write, about=about)

    @property
    def _cache(self) -> Cache:
        return Cache(self.root, "results")


_CELL = "cell.json"


@dataclass(frozen=True)
class _Line:
    key: str
    network: str
    k: int
    cell: Mapping[str, Any]


class Journal:
    """A store in the files ``NAME.cells.rank<k>.jsonl`` beside the result file; process k appends to file k.

    Simultaneous evaluations share these files, so they are written under the lock of the result file.

    Args:
        target: the result file.
        rank: rank of this process.
    """

    def __init__(self, target: Path, rank: int) -> None:
        self._target, self._rank = target, rank
        self._keys: set[str] = set()

    def find(self, provenance: Mapping[str, Any], num_networks: int) -> dict[int, Cell]:
        """See ``CellStore``."""
        key, stored = _key(provenance), {}
        self._keys.add(key)
        for record in (record for file in self._files() for record in read_log(file) if record.get("key") == key):
            with contextlib.suppress(ValueError):  # a damaged line: that network is trained again
                line = from_json(_Line, record, "line")
                if line.k in range(num_networks):
                    stored[line.k] = _cell(line.cell, provenance)
        return stored

    def add(self, provenance: Mapping[str, Any], k: int, cell: Cell) -> None:
        """Store network ``k``; it is on disk when this returns.

        Raises:
            ValueError: it cannot be written.
        """
        key = _key(provenance)
        self._keys.add(key)
        line = _Line(key, provenance["network"], k, dataclasses.asdict(cell))
        file = self._target.with_suffix(f".cells.rank{self._rank}.jsonl")
        with locked(self._target), closing(Log(file)) as log:
            log.write(dataclasses.asdict(line))
            log.sync()

    def remove(self) -> None:
        """Remove the networks of this evaluation; to be called after the results are written.

        Those of other evaluations stay. Lines of earlier versions are removed too, because they cannot be read.
        """
        with locked(self._target), reporting(self._target):
            for file in self._files():
                others = [line for line in read_log(file) if line.get("key") not in self._keys and _is_current(line)]
                if others:
                    write_text(file, "".join(json.dumps(line) + "\n" for line in others))
                else:
                    file.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self._target.parent.glob(f"{glob.escape(self._target.stem)}.cells.rank*.jsonl"))


def _cell(content: Any, provenance: Mapping[str, Any]) -> Cell:
    """Read a network from JSON. Raises ValueError if it is damaged or has another number of classes or bins."""
    cell = from_json(Cell, content, "cell")
    if len(cell.scores.per_class) != provenance["num_classes"] or len(cell.scores.reliability) != NUM_BINS:
        raise ValueError("another number of classes or bins")
    return cell


def _is_current(line: Mapping[str, Any]) -> bool:
    """Whether a line of a journal has the current format, with scores by name."""
    return isinstance(line.get("cell"), Mapping)


def _key(provenance: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(provenance).encode()).hexdigest()
