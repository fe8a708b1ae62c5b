"""The results of an evaluation: one value for each architecture, the file that holds them, and their grouping."""

from __future__ import annotations

import dataclasses
import json
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scipy.stats

from condense.eval.metrics import Scores
from condense.files import locked, read_json, write_text
from condense.schema import brief, from_json


@dataclass(frozen=True, kw_only=True)
class Result:
    """Networks of one architecture, trained on one labelled set under one protocol, and what decided it."""

    method: str
    """What made the set; ``full`` for all training data, empty where the set does not say."""
    network: str
    num_params: int
    accuracies: tuple[float, ...]
    """On the test split, at the last epoch, one per seed; fractions."""
    metrics: Mapping[str, Sequence[Any]]
    """The rest of ``condense.eval.metrics.Scores``, by name, one entry per seed."""
    protocol: str
    """Its name; with a star where fields differ from the protocol that owns the name."""
    protocol_hash: str
    protocol_fields: Mapping[str, Any]
    augment: str
    """The operations that the protocol's augmentation means for this data set."""
    seed: int
    num_images: int
    """Images trained on, decoded."""
    synthetic_sha256: str | None
    """Of the tensors of the set, as in its file; None: real training data."""
    dataset: str
    train_fingerprint: str
    test_fingerprint: str
    compute: Mapping[str, Any]
    device: str
    threads: int
    seconds: float
    """Time of training and scoring all of them, one after the other."""
    peak_memory_bytes: int
    """The most until the last of them was trained: of the tensors of each on a GPU, of the whole process on a CPU."""
    stored_bytes: Mapping[str, int]
    """What was trained on, as stored: images (latents), labels, decoder."""
    full_bytes: int
    """All training images and labels as they are held, of which a set is the compression."""
    code: str
    """Version of this package."""

    def __post_init__(self) -> None:
        if not self.accuracies or not all(0 <= accuracy <= 1 for accuracy in self.accuracies):
            raise ValueError(f"accuracies {brief(self.accuracies)} are not fractions, one for each network")
        for name, of_each in self.metrics.items():
            if len(of_each) != self.n:
                raise ValueError(f"metrics, {brief(name)}: {len(of_each)} entries of {self.n} networks")
        for k, accuracy in enumerate(self.accuracies):
            scores = {name: of_each[k] for name, of_each in self.metrics.items()}
            from_json(Scores, {"accuracy": accuracy, **scores}, f"metrics of network {k}")
        for name in ("per_class", "reliability"):
            if len({len(of_one) for of_one in self.metrics[name]}) > 1:
                raise ValueError(f"metrics, {name}: networks of different numbers of classes or bins")
        sizes = self.stored_bytes.values()
        if min(self.full_bytes, self.num_images, *sizes) < 0 or not sum(sizes):
            raise ValueError(
                f"num_images, full_bytes or stored_bytes {brief(dict(self.stored_bytes))} are negative, or nothing is "
                "stored"
            )

    @property
    def n(self) -> int:
        return len(self.accuracies)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float | None:
        """Standard deviation of the sample (n - 1 in the denominator); None of a single network."""
        return statistics.stdev(self.accuracies) if self.n > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the mean over such networks (Student's t); None of a single one."""
        if self.std is None:
            return None
        half = float(scipy.stats.t.ppf(0.975, self.n - 1)) * self.std / self.n**0.5
        return (max(self.mean - half, 0.0), min(self.mean + half, 1.0))

    @property
    def compression(self) -> float:
        """Bytes of all training data for each byte stored."""
        return self.full_bytes / sum(self.stored_bytes.values())

    def row(self) -> dict[str, Any]:
        """For JSON: the fields, and ``mean``, ``std``, ``interval``, ``n`` and ``compression``."""
        fields = dataclasses.asdict(self)
        head = {"method": fields.pop("method"), "network": fields.pop("network")}
        head["accuracies"] = list(fields.pop("accuracies"))
        head |= {"mean": self.mean, "std": self.std, "interval": self.interval, "n": self.n}
        return {**head, **fields, "compression": self.compression}


@dataclass(frozen=True)
class Evaluation:
    """What one call of ``evaluate`` measured, in the order of the networks."""

    results: tuple[Result, ...]

    def write(self, path: Path) -> None:
        """Add the results to ``evaluation.json``; see ``merge``."""
        merge(path, self.results)


_KEY = ("network", "num_params", "protocol_hash", "n", "seed", "synthetic_sha256", "test_fingerprint")


def merge(path: Path, results: Sequence[Result]) -> None:
    """Write the results into a JSON file, beside those that it holds: ``{"results": [row, ...]}``.

    A row replaces an existing one that agrees in network, protocol, n, seed, set and test split. Processes that write
    to one file take turns.

    Raises:
        ValueError: the file exists and holds something else; it cannot be written.
    """
    rows = [result.row() for result in results]
    asked = [[row[name] for name in _KEY] for row in rows]
    with locked(path):
        existing = read(path) if path.exists() else []
        others = [row for row in existing if [row.get(name) for name in _KEY] not in asked]
        write_text(path, json.dumps({"results": others + rows}, indent=1) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that ``merge`` wrote.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    content = read_json(path, fix=_FIX)
    try:
        return [dict(row) for row in from_json(_Results, content, "it").results]
    except ValueError as error:
        raise ValueError(f"{path} holds no results: {error}; {_FIX}") from error


def read_complete(path: Path) -> list[dict[str, Any]]:
    """The rows of ``read`` that have every field of ``Result``. Rows of earlier versions, which lack some, are left out
    with a warning.

    Raises:
        ValueError: see ``read``; a row whose fields have other types or values.
    """
    wanted = {f.name for f in dataclasses.fields(Result)}
    scores, rows = {f.name for f in dataclasses.fields(Scores)} - {"accuracy"}, read(path)
    complete = []
    for number, row in enumerate(rows, 1):
        metrics = row.get("metrics")
        if wanted <= row.keys() and not (isinstance(metrics, Mapping) and not scores <= metrics.keys()):
            try:
                complete.append(from_json(Result, row, f"row {number}").row())
            except ValueError as error:
                raise ValueError(f"{path}, {error}; {_FIX}") from error
    if len(complete) < len(rows):
        warnings.warn(
            f"{len(rows) - len(complete)} rows of {path} were written by another version and are left out; "
            "condense evaluate writes them again",
            stacklevel=2,
        )
    return complete


_FIX = "move it away, and condense evaluate writes it anew"


@dataclass(frozen=True)
class _Results:
    results: tuple[Mapping[str, Any], ...]


def by_set(rows: Sequence[Mapping[str, Any]], name: str = "method") -> dict[str, dict[str, Mapping[str, Any]]]:
    """Rows of one protocol, by the set that was trained on and then by network.

    Of several rows of one set and network the one with the largest n counts. The labels of sets that share a name
    carry the start of their checksum.

    Args:
        rows: rows of results.
        name: the key of a row that holds the name of the set.
    """
    checksums: dict[str, list[Any]] = {}
    for row in rows:
        known = checksums.setdefault(row[name], [])
        if row["synthetic_sha256"] not in known:
            known.append(row["synthetic_sha256"])
    sets: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        alone = len(checksums[row[name]]) == 1 or row["synthetic_sha256"] is None
        label = row[name] if alone else f"{row[name]} ({row['synthetic_sha256'][:6]}, {row['num_images']} images)"
        cells = sets.setdefault(label, {})
        if row["network"] not in cells or cells[row["network"]]["n"] <= row["n"]:
            cells[row["network"]] = row
    return sets


def by_protocol(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows grouped by protocol, so that the rows of one group compare.

    The key is the name of the protocol; where rows of one name differ in their fields, it ends with the start of the
    hash. Rows of ``own``, which is another training for each set, form one group.
    """
    hashes: dict[str, set[str]] = {}
    for row in rows:
        hashes.setdefault(row["protocol"], set()).add(row["protocol_hash"])
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        name = row["protocol"]
        alone = len(hashes[name]) == 1 or name == "own"
        groups.setdefault(name if alone else f"{name} {row['protocol_hash'][:6]}", []).append(row)
    return groups
