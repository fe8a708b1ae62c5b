"""Cache of derived data: decoded images, whitening matrices, baselines, results, compiled code.

An entry is a folder ``KIND/DIGEST`` in the cache folder. The digest is computed from the *key* of the entry, a JSON
value of everything that determines its content; ``entry.json`` in the folder holds kind and key. Every entry can be
computed again: missing or damaged entries are replaced, and a cache that is not writable never stops a run.

A process that uses an entry holds a shared lock on one of its files. An entry is first written to a locked temporary
folder. ``prune`` removes neither.
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
"""Exceptions that reading a damaged entry may raise."""

_MANIFEST = "entry.json"
_LOST_RACE = (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY)


def cache_folder() -> Path | None:
    """Return the cache folder, $CONDENSE_CACHE or ~/.cache/condense, or None if it cannot be created.

    A read-only folder is used for reading. Both cases give one warning.
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
    """Cache entries of one kind.

    Args:
        root: the cache folder; None turns the cache off.
        kind: name of the kind and of its folder.
    """

    root: Path | None
    kind: str

    def read(self, key: Any, read: Callable[[Path], T]) -> T | None:
        """Return ``read(folder)`` of an entry, or None if the entry is missing or damaged.

        Args:
            key: a JSON value of everything that determines the content.
            read: a function that raises one of ``DAMAGE`` if the entry is damaged.
        """
        with contextlib.ExitStack() as lock:
            return self._read(key, read, lock)

    def write(self, key: Any, write: Callable[[Path], None], *, about: str) -> None:
        """Write or replace an entry.

        A failure gives one warning per cache folder. If another process writes the entry at the same time, one of them
        is kept. An entry that is in use is not replaced.

        Args:
            key: as in ``read``.
            write: writes the files to an empty folder, which becomes the entry when all files are on disk.
            about: short description for the list of entries.
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
        """Yield the folder of an entry whose content grows. An empty one is created if necessary; None if that fails.

        The caller must handle concurrent readers and writers itself. The entry is not removed inside the context.
        """
        with contextlib.ExitStack() as lock:
            folder = self._read(key, lambda entry: entry, lock)
            if folder is None:
                lock.close()
                self.write(key, lambda entry: None, about=about)
                folder = self._read(key, lambda entry: entry, lock)
            yield folder

    def _read(self, key: Any, read: Callable[[Path], T], lock: contextlib.ExitStack) -> T | None:
        """Read an entry as ``read`` does, and lock it until ``lock`` is closed."""
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
    """A cache entry in the list of ``entries``."""

    kind: str
    about: str
    """Short description of the content."""
    path: Path
    size: int
    """Size of all files in bytes."""
    last_use: float
    """Time of the last use in seconds since the epoch; for outdated entries, of the last write."""
    outdated: bool
    """Whether an earlier version wrote the entry, so that this version does not read it."""


def entries(root: Path) -> list[Entry]:
    """List the entries in a cache folder by kind and size. Other files are ignored."""
    listed = []
    for path in _candidates(root):
        with contextlib.suppress(OSError, ValueError):  # not an entry, or removed by another process
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
    """Remove entries that were not used for ``days`` days and all entries of earlier versions; return the removed ones.

    Entries in use are kept.

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
"""Names of the entries of earlier versions, by kind. Those of `compiled` are chosen by torch."""


def _candidates(root: Path) -> list[Path]:
    """Return all possible entries: files and folders in the cache folder and in its subfolders, without links."""
    try:
        top = [path for path in root.iterdir() if not path.is_symlink()]
    except OSError:
        return []
    return [*top, *(path for folder in top for path in folder.glob("*") if not path.is_symlink())]


def _earlier_kind(path: Path, root: Path) -> str | None:
    """Return the kind of an entry of an earlier version, or None if it is not one."""
    name = path.relative_to(root).as_posix()
    return next((kind for kind, pattern in _EARLIER.items() if pattern.fullmatch(name)), None)


def _manifest(entry: Path) -> _Manifest:
    return from_json(_Manifest, read_json(entry / _MANIFEST, fix="make it again"), _MANIFEST)


def _digest(key: Any) -> str:
    return hashlib.sha256(canonical_json(key).encode()).hexdigest()[:32]


def _is_entry(path: Path, manifest: _Manifest) -> bool:
    return (path.parent.name, path.name) == (manifest.kind, _digest(manifest.key))


def _files(path: Path) -> list[Path]:
    """Return all files of an entry, including those in subfolders."""
    if not path.is_dir():
        return [path]
    return [Path(folder, name) for folder, _, names in os.walk(path) for name in names]


def _sync(folder: Path) -> None:
    """Flush all files in a folder to disk."""
    for file in _files(folder):
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())


def _publish(new: Path, entry: Path, old: Path) -> None:
    """Move a folder to the place of an entry, unless another process uses the entry or does so at the same time."""
    try:
        with contextlib.ExitStack() as lock:
            if entry.exists():
                manifest = entry / _MANIFEST
                if manifest.is_file() and try_lock(manifest, lock) is False:
                    return
                entry.rename(old)
            new.rename(entry)
    except OSError as error:
        if error.errno not in _LOST_RACE:
            raise


def _remove(path: Path) -> bool:
    """Remove an entry. Return False if it is in use or was already removed."""
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
        warnings.warn(f"{text}; set CONDENSE_CACHE to a writable folder", stacklevel=3)


_warned: set[str] = set()
"""Cache folders for which a warning was given."""
