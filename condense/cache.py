"""Derived data that are kept between runs: decoded images, whitening matrices, baselines, results, compiled code.

An entry is a folder ``KIND/DIGEST`` in the cache folder. The digest is that of the entry's *key*, a JSON value that
says all that decides the content, and ``entry.json`` in it names kind and key. Whatever the cache holds can be made
again: an entry that is missing or damaged is made anew, and a cache that cannot be written to never stops a run.

A process that uses an entry holds a shared lock on one of its files, and the files of an entry that is being written
lie in a locked temporary folder; ``prune`` leaves both alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors

from condense.files import (
    canonical_json,
    check_writable,
    expanded,
    read_json,
    remove_leftovers,
    reporting,
    temporary,
    try_lock,
)
from condense.schema import from_json

T = TypeVar("T")

DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError)
"""What reading a damaged entry may raise."""

_MANIFEST = "entry.json"
_LOST_RACE = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY)


def cache_folder() -> Path | None:
    """The folder of the cache: $CONDENSE_CACHE, else ~/.cache/condense.

    A folder that can only be read is used as it is, with one warning; None, with one warning, where there is none.
    """
    name = os.environ.get("CONDENSE_CACHE", "~/.cache/condense")
    folder = None
    try:
        if not name:
            raise ValueError("CONDENSE_CACHE is empty")
        folder = expanded(name)
        check_writable(folder)
    except ValueError as error:
        if folder is not None and str(folder).isprintable() and folder.is_dir():
            _warn_once(str(folder), f"nothing more is cached: {error}")
            return folder
        _warn_once(str(folder or name), f"nothing is cached: {error}")
        return None
    return folder


@dataclass(frozen=True)
class Cache:
    """The entries of one kind.

    Args:
        root: the cache folder; None: nothing is read or written.
        kind: name of the kind, and of its folder.
    """

    root: Path | None
    kind: str

    def read(self, key: Any, read: Callable[[Path], T]) -> T | None:
        """What ``read(folder)`` makes of the files of an entry; None where there is no such entry, or a damaged one.

        Args:
            key: a JSON value, everything that decides the content.
            read: reports damage by one of the exceptions in ``DAMAGE``.
        """
        with contextlib.ExitStack() as lock:
            return self._read(key, read, lock)

    def write(self, key: Any, write: Callable[[Path], None], *, about: str) -> None:
        """Make an entry, or replace it.

        What fails gives one warning for each cache folder. An entry that another process has just made stays.

        Args:
            key: as in ``read``.
            write: puts the files into an empty folder, which becomes the entry when all of them are on disk.
            about: the content in a few words, for the list of entries.
        """
        if self.root is None:
            return
        entry = self._entry(key)
        manifest = {"kind": self.kind, "key": key, "about": about}
        try:
            with reporting(entry):
                entry.parent.mkdir(parents=True, exist_ok=True)
                with temporary(entry.parent, is_folder=True) as scratch:
                    new = scratch / "new"
                    new.mkdir()
                    write(new)
                    (new / _MANIFEST).write_text(canonical_json(manifest), encoding="utf-8")
                    _sync(new)
                    _publish(new, entry, scratch / "old")
        except ValueError as error:
            _warn_once(str(self.root), f"nothing more is cached: {error}")

    @contextlib.contextmanager
    def held(self, key: Any, *, about: str) -> Iterator[Path | None]:
        """The folder of an entry, made empty where there is none, for content that grows.

        What fills the folder takes care of other readers and writers itself. No process removes the entry inside the
        context. None where the entry cannot be made.
        """
        with contextlib.ExitStack() as lock:
            folder = self._read(key, lambda entry: entry, lock)
            if folder is None:
                self.write(key, lambda entry: None, about=about)
                folder = self._read(key, lambda entry: entry, lock)
            yield folder

    def _read(self, key: Any, read: Callable[[Path], T], lock: contextlib.ExitStack) -> T | None:
        """``read``, with the entry locked until ``lock`` ends."""
        if self.root is None:
            return None
        entry = self._entry(key)
        with contextlib.suppress(*DAMAGE):
            if try_lock(entry / _MANIFEST, lock, shared=True) is False:
                return None  # another process is removing it
            if not _is_entry(entry, _manifest(entry)):
                return None
            value = read(entry)
            with contextlib.suppress(OSError):
                os.utime(entry)
            return value
        return None

    def _entry(self, key: Any) -> Path:
        assert self.root is not None
        return self.root / self.kind / _digest(key)


@dataclass(frozen=True)
class Entry:
    """An entry, as ``entries`` lists it."""

    kind: str
    about: str
    """Its content in a few words."""
    path: Path
    size: int
    """Bytes of its files."""
    last_use: float
    """Seconds since the epoch; where nothing else is known, the time at which it was last written."""
    outdated: bool
    """An earlier version made it, and this one does not read it."""


def entries(root: Path) -> list[Entry]:
    """The entries in a cache folder, by kind and size; nothing else that lies there."""
    listed = []
    for path in _candidates(root):
        with contextlib.suppress(OSError, ValueError):  # it is no entry, or another process removes it
            kind, about = _earlier_kind(path, root), path.name
            outdated = kind is not None
            if kind is None:
                manifest = _manifest(path)
                if not _is_entry(path, manifest):
                    continue
                kind, about = manifest.kind, manifest.about
            stats = [file.stat() for file in _files(path)]
            last_use = max((s.st_mtime for s in stats), default=0.0) if outdated else path.stat().st_mtime
            listed.append(Entry(kind, about, path, sum(s.st_size for s in stats), last_use, outdated))
    return sorted(listed, key=lambda entry: (entry.kind, -entry.size, entry.path))


def prune(root: Path, days: float) -> list[Entry]:
    """Remove the entries that were not used for so many days, and all that earlier versions made; the list of these.

    Entries that a process uses at the moment stay.

    Raises:
        ValueError: the folder cannot be written to.
    """
    oldest, removed = time.time() - 86400 * days, []
    with reporting(root):
        for entry in entries(root):
            if (entry.outdated or entry.last_use <= oldest) and _remove(entry.path):
                removed.append(entry)
        for folder in [root, *(path.parent for path in _candidates(root))]:
            remove_leftovers(folder)
    return removed


@dataclass(frozen=True)
class _Manifest:
    kind: str
    key: Any
    about: str


_EARLIER = {
    "decoded": re.compile(r"decoded/[0-9a-f]{16}"),
    "zca": re.compile(r"zca-(absolute|relative)-[0-9a-f]{16}\.safetensors"),
    "teachers": re.compile(r"teachers/[0-9a-f]{64}\.safetensors"),
    "baselines": re.compile(r"baselines/([0-9a-f]{64}-\w+\.safetensors|[0-9a-f]{16}\.cells\.rank\d+\.jsonl)"),
    "compiled": re.compile(
        r"compiled/(default|no avx|avx2|avx512\w*|sve\d*|zvector|vsx|fxgraph|aotautograd|triton|[a-z0-9]{2})"
    ),
}
"""Names of the entries that earlier versions made, by kind; those of `compiled` are torch's."""


def _candidates(root: Path) -> list[Path]:
    """What may be an entry: all that lies in a folder and in the folders there, but no links."""
    try:
        top = [path for path in root.iterdir() if not path.is_symlink()]
    except OSError:
        return []
    return [*top, *(path for folder in top for path in folder.glob("*") if not path.is_symlink())]


def _earlier_kind(path: Path, root: Path) -> str | None:
    """The kind of an entry that an earlier version made; None of anything else."""
    name = path.relative_to(root).as_posix()
    return next((kind for kind, pattern in _EARLIER.items() if pattern.fullmatch(name)), None)


def _manifest(entry: Path) -> _Manifest:
    return from_json(_Manifest, read_json(entry / _MANIFEST, mend="make it again"), _MANIFEST)


def _digest(key: Any) -> str:
    return hashlib.sha256(canonical_json(key).encode()).hexdigest()[:32]


def _is_entry(path: Path, manifest: _Manifest) -> bool:
    return (path.parent.name, path.name) == (manifest.kind, _digest(manifest.key))


def _files(path: Path) -> list[Path]:
    """The files of an entry, in all folders of it."""
    if not path.is_dir():
        return [path]
    return [Path(folder, name) for folder, _, names in os.walk(path) for name in names]


def _sync(folder: Path) -> None:
    """Let everything in a folder be on disk when this returns."""
    for file in _files(folder):
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())


def _publish(new: Path, entry: Path, old: Path) -> None:
    """Let a folder take the place of an entry, unless another process is just as fast."""
    try:
        if entry.exists():
            entry.rename(old)
        new.rename(entry)
    except OSError as error:
        if error.errno not in _LOST_RACE:
            raise


def _remove(path: Path) -> bool:
    """Remove an entry; False where a process uses it, or has removed it."""
    with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as locks:
        files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]
        if any(try_lock(file, locks) is False for file in files):
            return False
        with temporary(path.parent, is_folder=True) as scratch:
            path.rename(scratch / "old")
        return True
    return False


def _warn_once(folder: str, text: str) -> None:
    if folder not in _warned:
        _warned.add(folder)
        warnings.warn(f"{text}; set CONDENSE_CACHE to a folder that can be written to", stacklevel=3)


_warned: set[str] = set()
"""Cache folders of which a warning was given."""
