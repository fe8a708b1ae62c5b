"""Registries of named values, from this package and from entry points of other packages."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import operator
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, TypeVar

from condense import __version__
from condense.names import reason, suggest

T = TypeVar("T", covariant=True)


class Registry(Mapping[str, T]):
    """A mapping of names to values, usually classes. Values of other packages are imported when they are looked up.

    An unknown name raises KeyError. A value of another package that cannot be imported or is not of this kind raises
    ValueError with the name of the package.

    Args:
        kind: the kind of value, for messages, e.g. ``decoder``.
        group: the entry-point group of other packages, with entries ``name = "package.module:attribute"``.
        own: the values of this package or their import paths ``module:attribute``. Other packages cannot replace them.
        complaint: ``complaint(name, value)`` returns why a value cannot have a name ("is not ..."), or None.
    """

    def __init__(
        self, kind: str, group: str, own: Mapping[str, T | str], complaint: Callable[[str, Any], str | None]
    ) -> None:
        self.kind, self.group, self.own, self.complaint = kind, group, own, complaint

    def __iter__(self) -> Iterator[str]:
        yield from self.own
        yield from self._entries()

    def __len__(self) -> int:
        return len(self.own) + len(self._entries())

    def __contains__(self, name: object) -> bool:
        return name in self.own or name in self._entries()

    def __getitem__(self, name: str) -> T:
        if name in self.own:
            value: Any = self.own[name]
            return import_path(value) if isinstance(value, str) else value
        entries = self._entries()[name]
        if len(entries) > 1:
            raise ValueError(
                f"the {self.kind} {name!r} is provided by several packages, {', '.join(map(_package, entries))}; "
                "uninstall all but one"
            )
        package, advice = _package(entries[0]), "update or uninstall that package"
        try:
            value = import_path(entries[0].value)
        except Exception as error:  # code of another package may raise anything
            raise ValueError(
                f"the {self.kind} {name!r} of the package {package} cannot be loaded: {reason(error)}; {advice}"
            ) from error
        complaint = self.complaint(name, value)
        if complaint is not None:
            raise ValueError(f"the {self.kind} {name!r} of the package {package} {complaint}; {advice}")
        return value

    def usable(self) -> dict[str, T]:
        """Return the values by name, without those of other packages that cannot be loaded."""
        values = {}
        for name in self:
            with contextlib.suppress(ValueError):
                values[name] = self[name]
        return values

    def named(self, name: str) -> T:
        """Return the value of a name. Raises ValueError, with the most similar name, if it is unknown."""
        if name not in self:
            raise ValueError(f"unknown {self.kind} {name!r}: {suggest(name, self)}")
        return self[name]

    def package(self, name: str) -> str | None:
        """Return the distribution package that provides a name, or None for a name of this package."""
        return None if name in self.own else _package(self._entries()[name][0])

    def name_of(self, cls: type) -> str | None:
        """Return the registered name of a class, or None if it has none."""
        path = f"{cls.__module__}:{cls.__qualname__}"
        for name, value in self.own.items():
            if value is cls or value == path:
                return name
        for name, (entry, *_) in self._entries().items():
            nearby = (
                entry.module.partition(".")[0] == cls.__module__.partition(".")[0]
            )  # avoids importing other packages
            if entry.value == path or (nearby and self._leads_to(name, cls)):
                return name
        return None

    def _leads_to(self, name: str, cls: type) -> bool:
        try:
            return self[name] is cls
        except ValueError:
            return False

    def _entries(self) -> dict[str, list[EntryPoint]]:
        entries: dict[str, list[EntryPoint]] = {}
        for entry in entry_points(group=self.group):
            if entry.name not in self.own:
                entries.setdefault(entry.name, []).append(entry)
        return entries


def entry_points(group: str) -> Sequence[EntryPoint]:
    """Return the entry points of a group. The metadata of the installed packages are read once, and again after a
    package was installed or removed."""
    return _installed(tuple((path, _changed(path)) for path in sys.path)).get(group, ())


@functools.lru_cache(maxsize=1)
def _installed(places: tuple[tuple[str, int], ...]) -> dict[str, Sequence[EntryPoint]]:
    found = metadata.entry_points()
    return {group: tuple(found.select(group=group)) for group in found.groups}


def _changed(folder: str) -> int:
    """Return when entries were last added to a folder or removed from it, in ns; 0 if it does not exist."""
    try:
        return os.stat(folder or ".").st_mtime_ns
    except OSError:
        return 0


def summaries(names: Iterable[str], describe: Callable[[str], str]) -> dict[str, str]:
    """Return one line per name: its description, or the error if its value cannot be loaded."""
    lines = {}
    for name in names:
        try:
            lines[name] = describe(name)
        except ValueError as error:
            lines[name] = str(error)
    return lines


def import_path(path: str) -> Any:
    """Import ``module:attribute``; the attribute may be nested (``Outer.Inner``). Errors of the import propagate."""
    module, _, attribute = path.partition(":")
    return operator.attrgetter(attribute)(importlib.import_module(module))


def code_of(*modules: str) -> str:
    """Return a version of the code of some imported modules, for the keys of caches.

    It is the version of this package, followed by a hash of the Python files of each other package that has one of the
    modules. What those packages import is not covered.
    """
    packages = {module.partition(".")[0] for module in modules} - {"condense", *sys.stdlib_module_names}
    return " ".join([__version__, *(f"{package}-{_source_hash(package)}" for package in sorted(packages))])


@functools.cache
def _source_hash(package: str) -> str:
    module, digest = sys.modules[package], hashlib.sha256()
    folders, file = getattr(module, "__path__", ()), getattr(module, "__file__", None)
    files = [path for folder in folders for path in sorted(Path(folder).rglob("*.py"))]
    for path in files or ([Path(file)] if file else []):  # a class of a notebook has no file
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def subclass_of(base: type) -> Callable[[str, Any], str | None]:
    """Return a ``complaint`` function of a registry of subclasses of ``base``.

    A value must be a concrete subclass whose fields all have defaults. Its class variable ``name``, if there is one,
    must be its registered name.
    """

    def complaint(name: str, value: Any) -> str | None:
        if not (isinstance(value, type) and issubclass(value, base)):
            return f"is {value!r} and not a subclass of {base.__module__}.{base.__name__}"
        missing = sorted(getattr(value, "__abstractmethods__", ()))
        if missing:
            return f"does not define {', '.join(missing)}"
        fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
        for field in fields:
            if field.init and field.default is field.default_factory is dataclasses.MISSING:
                return f"has no default for its field {field.name}"
        return _misnamed(name, value)

    return complaint


def instance_of(base: type) -> Callable[[str, Any], str | None]:
    """Return a ``complaint`` function of a registry of instances of ``base`` under their own ``name``."""

    def complaint(name: str, value: Any) -> str | None:
        if not isinstance(value, base):
            return f"is {value!r} and not a {base.__module__}.{base.__name__}"
        return _misnamed(name, value)

    return complaint


def _misnamed(name: str, value: Any) -> str | None:
    own = getattr(value, "name", name)
    return None if own == name else f"has another name, {own!r}"


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.module.partition(".")[0]
