"""Recipe files with a table: one file per method, with the published values of all data sets and budgets.

In addition to the fields of a recipe, such a file has two keys:

    source   Text. The first line says what the recipe is and where it was published. Further lines say where individual
             values come from.
    table    A list of rows. The keys ``dataset`` and ``ipc`` of a row hold its data sets and budgets, each a value or a
             list. The other keys are the fields that differ from those above the table, and a ``source``.

The fields above the table of ``mtt.yaml`` are the recipe ``mtt`` for any data set. A row for ``cifar10`` and ``10`` is
the recipe ``mtt-cifar10-ipc10``. Rows are independent of each other.

This module reads the files as nested dicts, and ``condense.recipe`` converts these to recipes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Any

from condense.files import read_yaml
from condense.names import reason
from condense.plugins import entry_points

BUILT_IN = "condense.methods.recipes"
"""Package that contains the recipe files of Condense."""
GROUP = "condense.recipes"
"""Entry-point group for recipe files of other packages. The value of an entry is ``package`` for all files in the
folder of the package, or ``package:name`` for a folder or a file in it."""
MAX_RECIPES = 1000
"""Maximum number of pairs of data set and budget in one table."""


@dataclass(frozen=True)
class Entry:
    """One recipe of a file. Its fields have not been validated yet."""

    stem: str
    """File name without suffix, usually the name of the method."""
    source: str
    shared: Mapping[str, Any]
    """Fields above the table as nested dicts."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the row without ``dataset`` and ``ipc``."""
    dataset: str | None = None
    """Data set; None if the recipe is for any data set."""
    ipc: int | None = None
    """Images per class; None if the recipe is for any data set."""

    @property
    def name(self) -> str:
        """Name of the recipe: ``mtt`` for any data set, else e.g. ``mtt-cifar10-ipc10``."""
        return self.stem if self.dataset is None else f"{self.stem}-{self.dataset}-ipc{self.ipc}"

    @property
    def fields(self) -> dict[str, Any]:
        """All fields of the recipe as nested dicts."""
        pair = {} if self.dataset is None else {"dataset": self.dataset, "ipc": self.ipc}
        return _merged(self.shared, self.row) | pair

    @property
    def description(self) -> str:
        """First line of the source."""
        return self.source.partition("\n")[0]


def read(path: Path) -> list[Entry]:
    """Read the recipes of a file: the recipe for any data set, followed by those of the table, if there is one.

    Raises:
        ValueError: the file is missing, is not YAML, or has an invalid table.
    """
    if not path.exists():
        raise ValueError(f"there is no recipe {path}; `condense list recipes` shows the built-in recipes")
    try:
        content = read_yaml(path, fix="correct the file")
    except ValueError as error:
        raise ValueError(f"recipe {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"recipe {path} is not a mapping of fields; start it with `method: {{name: dm}}`")
    try:
        return list(_entries(content, path.stem))
    except ValueError as error:
        raise ValueError(f"recipe {path}: {error}") from error


def files() -> list[Path]:
    """Return the recipe files of this package, then those of other packages in the order of their entry points.

    A package whose files cannot be found is left out with a warning.
    """
    paths = _located(BUILT_IN)
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            paths += _located(entry.value)
        except (ImportError, TypeError, ValueError) as error:
            warnings.warn(
                f"the recipes {entry.name!r} ({entry.value}) are left out: {reason(error)}; reinstall their package",
                stacklevel=2,
            )
    return paths


def recipes() -> dict[str, Entry]:
    """Return all recipes by name. Other packages cannot replace a recipe of this package."""
    return _by_name(files())


def search(words: Iterable[str]) -> list[Entry]:
    """Return the recipes that match all words, ignoring case.

    A word matches the name of the recipe or file, the data set, the budget (``ipc10``) or a word of the description.

    Raises:
        ValueError: no recipe matches all words.
    """
    wanted = {word.casefold() for word in words}
    chosen = [entry for entry in recipes().values() if wanted <= _words(entry)]
    if not chosen:
        raise ValueError(
            f"no recipe has the words {' '.join(sorted(wanted))}; `condense list recipes` shows all recipes"
        )
    return chosen


def named(name: str) -> Entry | None:
    """Return the recipe with a name such as ``mtt`` or ``mtt-cifar10-ipc10``, or None."""
    return _by_name(path for path in files() if name == path.stem or name.startswith(f"{path.stem}-")).get(name)


def published(stem: str, dataset: str | None, ipc: int) -> Entry | None:
    """Return the recipe of a method's file that is nearest to a data set and a budget; None if there is no file."""
    return nearest(_by_name(path for path in files() if path.stem == stem).values(), dataset, ipc)


def nearest(entries: Iterable[Entry], dataset: str | None, ipc: int) -> Entry | None:
    """Return the recipe of the data set with the nearest budget (by ratio), else the one for any data set."""
    entries = list(entries)
    rows = [(entry.ipc, entry) for entry in entries if entry.dataset == dataset and entry.ipc is not None]
    if rows:
        return min(rows, key=lambda row: (Fraction(max(row[0], ipc), min(row[0], ipc)), row[0]))[1]
    return next((entry for entry in entries if entry.dataset is None), None)


def _words(entry: Entry) -> set[str]:
    parts = [entry.name, entry.stem, entry.dataset or "", f"ipc{entry.ipc}" if entry.ipc else ""]
    return {word.casefold() for word in (*parts, *re.findall(r"[\w-]+", entry.description))}


def _located(value: str) -> list[Path]:
    package, _, inside = value.partition(":")
    path = Path(str(resources.files(package))) / inside
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    return sorted(path.glob("*.yaml")) if path.is_dir() else [path]


def _by_name(paths: Iterable[Path]) -> dict[str, Entry]:
    known: dict[str, Entry] = {}
    for path in paths:
        for entry in read(path):
            known.setdefault(entry.name, entry)
    return known


def _entries(content: Mapping[str, Any], stem: str) -> Iterator[Entry]:
    shared = {key: value for key, value in content.items() if key not in ("source", "table")}
    source = _source(content, "", "source")
    yield Entry(stem, source, shared)
    table = content.get("table", [])
    if not isinstance(table, list):
        raise ValueError("table is not a list of rows; start each row with `- dataset: cifar10`")
    pairs: set[tuple[str, int]] = set()
    for number, row in enumerate(table, 1):
        where = f"row {number} of the table"
        if not isinstance(row, dict):
            raise ValueError(f"{where} is not a mapping of fields; start it with `- dataset: cifar10`")
        datasets = row.get("dataset")
        datasets = datasets if isinstance(datasets, list) else [datasets]
        budgets = row.get("ipc")
        budgets = budgets if isinstance(budgets, list) else [budgets]
        if not datasets or not all(isinstance(name, str) for name in datasets):
            raise ValueError(f"{where} does not name its data sets; add `dataset: [cifar10, cifar100]`")
        if not budgets or not all(isinstance(ipc, int) and not isinstance(ipc, bool) and ipc > 0 for ipc in budgets):
            raise ValueError(f"{where} does not give its images per class; add `ipc: [1, 10]`")
        if len(pairs) + len(datasets) * len(budgets) > MAX_RECIPES:
            raise ValueError(f"the table has more than {MAX_RECIPES} pairs of data set and budget; split the file")
        differing = {key: value for key, value in row.items() if key not in ("source", "dataset", "ipc")}
        row_source = _source(row, source, f"{where}: source")
        for dataset in datasets:
            for ipc in budgets:
                if (dataset, ipc) in pairs:
                    raise ValueError(
                        f"{where} is the second row for {dataset} at {ipc} images per class; keep one of them"
                    )
                pairs.add((dataset, ipc))
                yield Entry(stem, row_source, shared, differing, dataset, ipc)


def _source(fields: Mapping[str, Any], default: str, where: str) -> str:
    source = fields.get("source", default)
    if not isinstance(source, str):
        raise ValueError(f"{where} is {source!r} where a text is expected; put it in quotes")
    return source.strip()


def _merged(shared: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Apply the fields of a row to ``shared``. A mapping with another ``name`` replaces the shared one completely."""
    merged = dict(shared)
    for key, value in changes.items():
        existing = merged.get(key)
        if isinstance(existing, dict) and isinstance(value, dict) and value.get("name") in (None, existing.get("name")):
            merged[key] = _merged(existing, value)
        else:
            merged[key] = value
    return merged
