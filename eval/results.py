"""The results of evaluations: one per architecture, the file that stores them, and their grouping into tables."""

from __future__ import annotations

import dataclasses
import json
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import scipy.stats

from condense.data.transform import name_of
from condense.eval.metrics import Scores
from condense.files import locked, read_json, write_text
from condense.names import percent
from condense.schema import brief, from_json
from condense.synthetic.set import SyntheticSet
from condense.synthetic.teaching import ViewLabels

if TYPE_CHECKING:
    import pandas


Scored = Literal["test", "validation"]
"""Images on which trained networks are scored: the test images, or the training images that a set was not made from."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Result:
    """The scores of networks of one architecture that were trained on one set under one protocol, with their
    provenance."""

    method: str
    """Method that made the set; ``full`` for all training data, empty if the set names none."""
    network: str
    num_params: int
    accuracies: tuple[float, ...]
    """Accuracies on ``split`` after the last epoch, one per seed, as fractions."""
    metrics: Mapping[str, Sequence[Any]]
    """The other fields of ``condense.eval.metrics.Scores``, by name, one entry per seed."""
    protocol: str
    """Name of the protocol, with a star if a field differs from the protocol of that name."""
    protocol_hash: str
    protocol_fields: Mapping[str, Any]
    augment: str
    """Operations of the protocol's augmentation for this data set."""
    seed: int
    num_images: int
    """Number of training images, after decoding."""
    synthetic_sha256: str | None
    """SHA-256 of the tensors of the set, as in its file; None for real training data."""
    dataset: str
    train_fingerprint: str
    test_fingerprint: str
    compute: Mapping[str, Any]
    device: str
    threads: int
    seconds: float
    """Sum of the training and scoring times of the networks."""
    peak_memory_bytes: int
    """Peak memory while the networks were trained: of the tensors on a GPU, of the whole process on a CPU."""
    stored_bytes: Mapping[str, int]
    """Bytes of the set as stored: images (latents), labels, decoder."""
    full_bytes: int
    """Bytes of all training images and labels in memory."""
    code: str
    """Version of this package."""
    stored_bits: int | None = None
    """Bits of the set by the convention of docs/budgets.md; None for real images and in rows of earlier versions."""
    teacher: str = ""
    """Network that labelled the batches and is not stored in the set; empty if there is none."""
    split: Scored = "test"
    """The images on which networks were scored: the test images, or the held-out training images."""
    privacy: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The differential privacy of the set; empty if it has none."""
    transform: str = ""
    """Name of the transform of the images; empty in rows of earlier versions."""
    changed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The fields that the caller changed in the protocol of that name; empty in rows of earlier versions."""

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
                f"num_images, full_bytes or stored_bytes {brief(dict(self.stored_bytes))} is negative, or all of "
                "stored_bytes are 0"
            )

    def __repr__(self) -> str:
        return f"Result({self.method or 'set'} on {self.network}, {self.protocol}: {self.percent})"

    @property
    def percent(self) -> str:
        """Mean accuracy in percent with its standard deviation, and n, as text."""
        return f"{percent(self.mean, self.std)} %, n = {self.n}"

    @property
    def n(self) -> int:
        return len(self.accuracies)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float | None:
        """Sample standard deviation (n - 1 in the denominator); None for a single network."""
        return statistics.stdev(self.accuracies) if self.n > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the mean over networks (Student's t); None for a single network."""
        if self.std is None:
            return None
        half = float(scipy.stats.t.ppf(0.975, self.n - 1)) * self.std / self.n**0.5
        return (max(self.mean - half, 0.0), min(self.mean + half, 1.0))

    @property
    def compression(self) -> float:
        """Bytes of all training data divided by the bytes stored."""
        return self.full_bytes / sum(self.stored_bytes.values())

    def row(self) -> dict[str, Any]:
        """Return the fields with ``mean``, ``std``, ``interval``, ``n`` and ``compression``, for JSON."""
        fields = dataclasses.asdict(self)
        head = {"method": fields.pop("method"), "network": fields.pop("network")}
        head["accuracies"] = list(fields.pop("accuracies"))
        head |= {"mean": self.mean, "std": self.std, "interval": self.interval, "n": self.n}
        for name in ("privacy", "stored_bits", "changed", "transform"):
            if not fields[name]:  # as rows of earlier versions
                del fields[name]
        return {**head, **fields, "compression": self.compression}


@dataclass(frozen=True, repr=False)
class Evaluation:
    """The results of one call of ``evaluate``, in the order of the networks."""

    results: tuple[Result, ...]
    classes: tuple[str, ...] = ()
    """Names of the classes, in the order of ``metrics["per_class"]``."""

    def __repr__(self) -> str:
        """Return one line per result."""
        return "\n".join(map(repr, self.results)) or "Evaluation()"

    def _repr_html_(self) -> str:
        """Return a table for a notebook."""
        rows = [(result.method or "set", result.network, result.protocol, result.percent) for result in self.results]
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        scored = " and ".join(dict.fromkeys(result.split for result in self.results)) or "test"
        return f"<table><tr><th>set</th><th>network</th><th>protocol</th><th>{scored} accuracy</th></tr>{body}</table>"

    def to_pandas(self) -> pandas.DataFrame:
        """Return a table with one row for each trained network, and its accuracies and other metrics as fractions.

        ``number`` counts the networks of one architecture. The accuracy within each class is in a column named
        ``accuracy of CLASS``.

        Raises:
            ValueError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ValueError("a table needs pandas, which is not installed; run: pip install pandas") from error
        rows = []
        for result in self.results:
            fields = ("method", "network", "protocol", "dataset", "split", "num_images")
            about = {name: getattr(result, name) for name in fields}
            for k, accuracy in enumerate(result.accuracies):
                row = {**about, "seed": result.seed, "number": k, "accuracy": accuracy}
                row |= {name: of[k] for name, of in result.metrics.items() if name not in ("per_class", "reliability")}
                row |= {
                    f"accuracy of {name}": of_class
                    for name, of_class in zip(self.classes, result.metrics["per_class"][k], strict=False)
                }
                rows.append(row)
        return pandas.DataFrame(rows)

    def write(self, path: Path) -> None:
        """Add the results to the file at ``path``; see ``merge``."""
        merge(path, self.results)


@dataclass(frozen=True)
class Pooled:
    """Accuracies of sets that were distilled alike from several seeds, under one protocol and on one architecture."""

    mean: float
    """Mean over distillations of the mean over networks."""
    between_networks: float | None
    """Standard deviation of networks that are trained on the same set: the root of the mean variance over sets; None
    for single networks."""
    between_distillations: float | None
    """Sample standard deviation of the means of the sets; None for a single set. It contains what the mean over
    finitely many networks leaves of the deviation between networks."""
    num_sets: int
    n: int
    """Networks of each set, at least."""


def pool(rows: Sequence[Mapping[str, Any]]) -> Pooled:
    """Pool the results of sets that differ in the seed of the distillation alone, one row for each set."""
    means, deviations = [row["mean"] for row in rows], [row["std"] for row in rows if row["std"] is not None]
    return Pooled(
        mean=statistics.fmean(means),
        between_networks=statistics.fmean(std**2 for std in deviations) ** 0.5 if deviations else None,
        between_distillations=statistics.stdev(means) if len(means) > 1 else None,
        num_sets=len(rows),
        n=min(row["n"] for row in rows),
    )


def alike(sets: Mapping[str, SyntheticSet | None]) -> list[list[str]]:
    """Group the names of sets that differ in the seed of their distillation alone, and have labels of one kind.

    A set without a recipe is alone, and so are all sets of a group in which two have the same seed: these are moments
    of one run, or sets that were changed afterwards.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, syn in sets.items():
        distillation = syn.origin.distillation if syn is not None else ""
        key = (distillation, str(syn.label_kind)) if syn is not None and distillation else (name, "")
        groups.setdefault(key, []).append(name)
    found = []
    for group in groups.values():
        runs = {syn.origin.recipe_hash for name in group if (syn := sets[name]) is not None}
        found += [group] if len(runs) == len(group) else [[name] for name in group]
    return found


_KEY = (
    *("method", "network", "num_params", "protocol_hash", "n", "seed"),
    *("synthetic_sha256", "transform", "teacher", "test_fingerprint", "split"),
)


def merge(path: Path, results: Sequence[Result]) -> None:
    """Add results to a JSON file ``{"results": [row, ...]}``.

    A row replaces an existing one with the same method, network, protocol, n, seed, set, transform, teacher and scored
    images. Processes that write to the same file take turns.

    Raises:
        ValueError: the file exists and is no file of results, or it cannot be written.
    """
    rows = [result.row() for result in results]
    with locked(path):
        existing = read(path) if path.exists() else []
        others = [old for old in existing if not any(_replaces(new, old) for new in rows)]
        write_text(path, json.dumps({"results": others + rows}, indent=1) + "\n")


def _replaces(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    """Whether both rows answer one question. Rows of earlier versions name no split, transform or teacher."""
    usual = {"split": "test", "transform": new.get("transform"), "teacher": new.get("teacher")}
    return all({**usual, **old}.get(name) == new.get(name) for name in _KEY)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file that ``merge`` wrote.

    Raises:
        ValueError: the file cannot be read, or it is no file of results.
    """
    content = read_json(path, fix=_FIX)
    try:
        return [dict(row) for row in from_json(_Results, content, "it").results]
    except ValueError as error:
        raise ValueError(f"{path} holds no results: {error}; {_FIX}") from error


def read_complete(path: Path, split: Scored = "test") -> list[dict[str, Any]]:
    """Return the rows of ``read`` that were scored on ``split`` and have every field of ``Result`` without a default.
    Rows of earlier versions that lack such fields are left out with a warning.

    Raises:
        ValueError: see ``read``; also if a field of a row has a wrong type or value.
    """
    wanted, scores = (
        {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
        for cls in (Result, Scores)
    )
    scores, rows = scores - {"accuracy"}, read(path)
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
            "run condense evaluate again to replace them",
            stacklevel=2,
        )
    return [row for row in complete if row["split"] == split]


_FIX = "move it away and run condense evaluate again"


@dataclass(frozen=True)
class _Results:
    results: tuple[Mapping[str, Any], ...]


def fits(row: Mapping[str, Any], syn: SyntheticSet) -> bool:
    """Whether a row, of a set or of its baselines, was measured under the transform of the set and with the teacher it
    names, or with that of the protocol."""
    kind = syn.label_kind
    named = kind.teacher if isinstance(kind, ViewLabels) and kind.is_named else ""
    transform = name_of(syn.origin.transform)
    is_taught = bool(row["protocol_fields"].get("teacher")) or row.get("teacher", "") in ("", named)
    return is_taught and row.get("transform", transform) == transform


def standing_for(rows: Sequence[Mapping[str, Any]], network: str | None) -> Mapping[str, Any] | None:
    """Return the row that stands for a set: preferably on this network, then under a protocol whose fields were not
    changed, then with the largest n; None if there is none."""
    return max(
        rows, key=lambda row: (row["network"] == network, not row["protocol"].endswith("*"), row["n"]), default=None
    )


def balanced(row: Mapping[str, Any]) -> float | None:
    """Return the mean balanced accuracy of the networks of a row; None where the test classes are balanced, or the row
    was written by an earlier version."""
    of_each = row["metrics"].get("balanced_accuracy", [None])
    return None if None in of_each else statistics.fmean(of_each)


def by_set(rows: Sequence[Mapping[str, Any]], name: str = "method") -> dict[str, dict[str, Mapping[str, Any]]]:
    """Group rows of one protocol by set, then by network.

    If several rows have the same set and network, the row with the largest n is taken. If several sets share a name,
    their labels contain the start of the checksum; real images have the name of their transform instead.

    Args:
        rows: rows of results.
        name: the key of a row under which the set is named.
    """
    checksums: dict[str, set[Any]] = {}
    transforms: set[str] = {row.get("transform", "") for row in rows if row["synthetic_sha256"] is None}
    for row in rows:
        checksums.setdefault(row[name], set()).add(row["synthetic_sha256"])
    sets: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        label = row[name]
        if row["synthetic_sha256"] is None:
            label += f" ({transform})" if len(transforms) > 1 and (transform := row.get("transform", "")) else ""
        elif len(checksums[label]) > 1:
            label += f" ({row['synthetic_sha256'][:6]}, {row['num_images']} images)"
        cells = sets.setdefault(label, {})
        if row["network"] not in cells or cells[row["network"]]["n"] <= row["n"]:
            cells[row["network"]] = row
    return sets


def by_protocol(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Group rows by protocol, so that the rows of a group are comparable.

    The key is the name of the protocol, followed by the start of the hash if rows of this name differ in their fields.
    All rows of ``own`` form one group, although each set has its own training.
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
