"""The record of a measured row: one JSON file in ``results/rows``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Provenance
from benchmarks.results.table import Row
from condense.eval.baselines import FULL


@dataclass(frozen=True, kw_only=True)
class Score:
    """Networks of one architecture, trained on one set under one protocol. Accuracies are fractions of the test split
    after the last epoch."""

    method: str
    """Method of the set; ``full`` for all training data."""
    network: str
    protocol: str
    accuracies: tuple[float, ...]
    seed: int
    seconds: float
    auc: tuple[float, ...] = ()
    """Areas under the ROC curve, where they were computed."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    seed: int
    command: str
    minutes: float
    """Wall time."""
    cpu_minutes: float
    """Time of the processors divided by two: the time of a machine with two cores that are busy all the time."""
    scores: tuple[Score, ...]


@dataclass(frozen=True, kw_only=True)
class Record:
    row: Row
    """The row as it was in the table."""
    labels: str
    """``hard``, or the kind of the soft labels."""
    decode: str
    num_images: int
    """Number of images, after decoding."""
    bytes: int
    """Bytes of the set as stored: images, labels, decoder."""
    num_steps: int | None
    distillations: tuple[Distillation, ...]
    evaluation: str
    """The command that scored the sets."""
    provenance: Provenance
    buffer: str = ""
    """The command that trained networks for the method; empty if it needs none."""
    buffer_minutes: float = 0.0
    """Its wall time, in however many sessions."""
    networks: dict[str, int] = field(default_factory=dict)
    """Number of parameters by architecture."""
    checksum: str = ""
    """SHA-256 of the file of the first set."""
    machine: str = ""
    """The processors that did the work; empty in records that did not note it."""

    def scores(self, protocol: str, network: str = "") -> list[Score]:
        """The scores of the row's sets under a protocol on one architecture, by default the first."""
        found = [score for score in self._own_scores() if score.protocol == protocol]
        return [score for score in found if score.network == (network or found[0].network)]

    def accuracies(self, protocol: str, network: str = "") -> list[float]:
        """The accuracies of all networks of ``scores``."""
        return [accuracy for score in self.scores(protocol, network) for accuracy in score.accuracies]

    @property
    def full(self) -> list[Score]:
        """The scores of networks that were trained on all training data, the same beside every distillation."""
        return [score for score in self.distillations[0].scores if score.method == FULL]

    def _own_scores(self) -> list[Score]:
        return [score for d in self.distillations for score in d.scores if score.method == self.row.method]

    @property
    def protocols(self) -> list[str]:
        return list(dict.fromkeys(protocol for protocol, _ in self.columns))

    @property
    def columns(self) -> list[tuple[str, str]]:
        """The protocols and architectures under which the sets were scored."""
        return list(dict.fromkeys((score.protocol, score.network) for score in self._own_scores()))


def read_all(folder: Path) -> dict[str, Record]:
    """Return the records in a folder by the name of their row. Raises ValueError if a file is damaged."""
    paths = sorted(folder.glob("*.json"))
    return {path.stem: harness.read(Record, path) for path in paths}


def write(record: Record, folder: Path) -> None:
    harness.write(record, folder / f"{record.row.name}.json")
