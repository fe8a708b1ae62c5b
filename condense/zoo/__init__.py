"""Distilled sets that come with the package.

``condense.load("zoo:digits/ipc1")`` reads one, and every command that reads a set takes its name. ``index.json`` holds
what was measured of each; ``make results`` writes it, together with the sets.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from condense.files import expanded, read_json
from condense.names import percent, suggest
from condense.schema import from_json

PREFIX = "zoo:"
FOLDER = Path(__file__).parent
INDEX = "index.json"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A set of the zoo, how it was made, and its accuracy."""

    dataset: str
    ipc: int
    method: str
    network: str
    protocol: str
    accuracies: tuple[float, ...]
    """Accuracies on the test split, as fractions, of the networks that were trained on the set."""
    distillation: str
    """The command that distilled the set."""
    evaluation: str
    """The command that measured the accuracies; RUN is the set."""
    minutes: float
    """Duration of the distillation: on a CPU half the time of the processors, else wall time."""
    device: str
    commit: str
    date: str
    terms: str
    """Terms of the data set."""

    def describe(self) -> str:
        """Describe the entry in one line."""
        accuracy = percent(statistics.fmean(self.accuracies), statistics.stdev(self.accuracies))
        return (
            f"{self.method}: {accuracy} % ({self.network}, {self.protocol}, "
            f"n = {len(self.accuracies)}), {self.minutes:.1f} min on {self.device}; data: {self.terms}"
        )


@lru_cache(maxsize=1)
def entries() -> dict[str, Entry]:
    """Return the sets of the zoo by name, such as ``digits/ipc1``."""
    content = read_json(FOLDER / INDEX, fix="reinstall the package")
    return {name: from_json(Entry, value, f"{INDEX}, {name}") for name, value in content.items()}


def has_name(path: Path | str) -> bool:
    """Whether a path is the name of a set of the zoo, with its prefix."""
    return str(path).startswith(PREFIX)


def located(path: Path | str) -> Path:
    """Return the file of a set of the zoo by its name with the prefix; other paths are only expanded.

    Raises:
        ValueError: the zoo has no such set, or see ``expanded``.
    """
    if not has_name(path):
        return expanded(path)
    name = str(path).removeprefix(PREFIX)
    if name not in entries():
        raise ValueError(f"the zoo has no set {name!r}: {suggest(name, entries(), '`condense list zoo`')}")
    return FOLDER / f"{name}.safetensors"


def beside(path: Path | str) -> Path:
    """Return the path beside which files about a set are written; for the zoo it lies in the current folder."""
    return Path(str(path).removeprefix(PREFIX).replace("/", "-")) if has_name(path) else expanded(path)
