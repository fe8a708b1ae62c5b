"""The table of rows: which data, method, settings and budget."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from condense.files import read_yaml
from condense.names import suggest
from condense.schema import from_json


@dataclass(frozen=True, kw_only=True)
class Row:
    """One set of settings at one budget. ``flags``, ``buffer`` and ``scoring`` are words of a command line."""

    name: str
    """Name of the row and of its file."""
    dataset: str
    """Name of the data set."""
    ipc: int
    """Budget in images per class."""
    method: str
    minutes: float
    """On a CPU the budget of one distillation, in minutes of a machine with two cores, that is half the time of the
    processors, which does not depend on other work of the machine. On a GPU the wall time that a distillation and its
    experts are expected to take, which decides the order of the rows only."""
    flags: str = ""
    """Further flags of ``condense distill``. Without ``--method.num-steps``, a method on a CPU gets the number of steps
    that fits the budget, and at most that of its recipe."""
    buffer: str = ""
    """Flags of ``condense buffer`` for methods that need trained networks, whose time is counted apart."""
    scoring: str = "--protocol own canonical --num-seeds 3"
    """Flags of ``condense evaluate``."""
    device: Literal["cpu", "cuda"] = "cpu"
    distillations: int = 2
    """Number of distillations, with the seeds 0, 1, ..."""
    tried: int = 1
    """Number of configurations that were tried."""
    chosen: str = ""
    """How the configuration was chosen, if more than one was tried."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.name):
            raise ValueError(f"the name {self.name!r} has characters other than a-z, 0-9, - and .")
        if min(self.ipc, self.distillations, self.tried) < 1 or self.minutes <= 0:
            raise ValueError("ipc, distillations, tried and minutes must be positive")
        if self.tried > 1 and not self.chosen:
            raise ValueError(f"{self.tried} configurations were tried: say in chosen how this one was chosen")


@dataclass(frozen=True, kw_only=True)
class Section:
    """Rows that are compared with one another."""

    title: str
    rows: tuple[Row, ...]
    text: str = ""
    """What the page says below the title."""
    auc: bool = False
    """Whether the page shows the mean area under the ROC curve as well."""


@dataclass(frozen=True, kw_only=True)
class Table:
    data: Mapping[str, str | None]
    """The name of the ``.npz`` file of each data set, in the folder that the user gives; None for embedded data."""
    sections: tuple[Section, ...]
    terms: Mapping[str, str] = field(default_factory=dict)
    """Terms of data sets of which the zoo has images."""
    zoo: Mapping[str, str] = field(default_factory=dict)
    """The row from which each set of the zoo comes."""

    @property
    def rows(self) -> list[Row]:
        return [row for section in self.sections for row in section.rows]


def read(path: Path) -> Table:
    """Read a table.

    A row has the fields in ``common`` of its section, then those of the ``settings`` that it names with ``use``, one
    or several, then its own. Its name is that of the section followed by its ``label``, or else its only ``use`` or its
    method.

    Raises:
        ValueError: the file cannot be read; a field is unknown, missing or wrong; two rows have one name.
    """
    content = _known(read_yaml(path, fix="mend it"), ("data", "terms", "zoo", "settings", "sections"), str(path))
    data, settings, terms, zoo = (
        _mapping(content.get(name, {}), f"{path}, {name}") for name in ("data", "settings", "terms", "zoo")
    )
    entries = content.get("sections", [])
    if not isinstance(entries, list):
        raise ValueError(f"{path}, sections: {entries!r} is not a list")
    sections = [_section(entry, settings, str(path)) for entry in entries]
    table = Table(data=data, sections=tuple(sections), terms=terms, zoo=zoo)
    names = [row.name for row in table.rows]
    for row in table.rows:
        if names.count(row.name) > 1:
            raise ValueError(f"{path}: two rows are named {row.name}; give one a label")
        if row.dataset not in data:
            raise ValueError(f"{path}: {row.name} has the data set {row.dataset}, for which data names no file")
    for name, source in table.zoo.items():
        if source not in names:
            raise ValueError(f"{path}: the set {name} of the zoo comes from a row {source}; {suggest(source, names)}")
        dataset = table.rows[names.index(source)].dataset
        if dataset not in table.terms:
            raise ValueError(f"{path}: the set {name} of the zoo has images of {dataset}, for which terms has no line")
    return table


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A section as the file has it."""

    name: str
    title: str
    rows: tuple[dict[str, Any], ...]
    text: str = ""
    auc: bool = False
    common: dict[str, Any] = field(default_factory=dict)


def _section(given: Any, settings: Mapping[str, Any], where: str) -> Section:
    entry = from_json(_Entry, _known(given, _names(_Entry), where), where)
    fields = [name for name in _names(Row) if name != "name"]
    place, rows = f"{where}, {entry.name}", []
    for own in entry.rows:
        merged, used = dict(entry.common), own.get("use", [])
        if not isinstance(used, str | list):
            raise ValueError(f"{place}: use is {used!r}; give the name of settings, or a list of names")
        for name in [used] if isinstance(used, str) else used:
            if not isinstance(name, str) or name not in settings:
                raise ValueError(f"{place}: there are no settings {name!r}; {suggest(str(name), settings)}")
            merged |= _mapping(settings[name], f"{where}, settings, {name}")
        merged |= own
        _known(merged, (*fields, "label", "use"), place)
        label, used = merged.pop("label", None), merged.pop("use", None)
        label = label or (used if isinstance(used, str) else None) or merged.get("method")
        name = f"{entry.name}-{label}"
        rows.append(from_json(Row, {"name": name, **merged}, f"{where}, {name}"))
    return Section(title=entry.title, text=entry.text, auc=entry.auc, rows=tuple(rows))


def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


def _known(entry: Any, names: Sequence[str], where: str) -> dict[str, Any]:
    for name in _mapping(entry, where):
        if name not in names:
            raise ValueError(f"{where}: there is no field {name!r}; {suggest(str(name), names)}")
    return dict(entry)


def _mapping(entry: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: {entry!r} is not a mapping")
    return entry
