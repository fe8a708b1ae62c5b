"""Decoded arrays in the cache, which are mapped into memory and shared by all processes.

An entry holds plain ``.npy`` files and ``facts.json``, which records their source and facts about them. Arrays are
mapped copy-on-write: processes share the pages, and a process that writes to them changes only its own copy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from condense.cache import Cache
from condense.files import canonical_json, read_json, try_lock_open

FORMAT = 4
"""Version of the decoding. 2 rotates pictures according to their EXIF orientation; 3 reads the entries ``layout`` and
``length_train`` of ``.npz`` files; 4 rotates TIFF once."""
_FACTS = "facts.json"


def stamp(root: Path, files: Iterable[Path]) -> str | None:
    """Return a hash of the names (relative to ``root``), sizes and times of the files.

    Returns None if there are no files, or one cannot be accessed.
    """
    try:
        stats = [(file.relative_to(root).as_posix(), file.stat()) for file in sorted(files)]
    except OSError:
        return None
    return _digest([[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in stats]) if stats else None


def read(
    cache: Path | None, key: Mapping[str, Any], source: str
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
    """Return arrays by name, and the facts; None if the entry is missing, damaged or made from another source."""

    def arrays_and_facts(folder: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        content = read_json(folder / _FACTS, fix="decode it again")
        intact = content.pop("sha256") == _digest(content)
        provenance = [content["format"], content["source"], content["arrays"]]
        if not intact or provenance != [FORMAT, source, _arrays(folder)]:
            raise ValueError("it is damaged, or made from another source")
        return {file.stem: _mapped(file) for file in folder.glob("*.npy")}, content["facts"]

    return Cache(cache, "decoded").read(key, arrays_and_facts)


def write(
    cache: Path | None,
    key: Mapping[str, Any],
    source: str,
    arrays: Mapping[str, NDArray[Any]],
    facts: Mapping[str, Any],
    *,
    about: str,
) -> None:
    """Write an entry that ``read`` finds; it replaces an existing one. See ``Cache.write``."""

    def write_files(folder: Path) -> None:
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array, allow_pickle=False)
        content = {"format": FORMAT, "source": source, "arrays": _arrays(folder), "facts": facts}
        (folder / _FACTS).write_text(json.dumps({**content, "sha256": _digest(content)}), encoding="utf-8")

    Cache(cache, "decoded").write(key, write_files, about=about)


_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _mapped(path: Path) -> NDArray[Any]:
    """Map the array of a ``.npy`` file. The file is locked against removal while it is mapped, because the mapping
    holds a duplicate of the locked file descriptor."""
    with open(path, "rb") as file:
        if try_lock_open(file.fileno(), shared=True) is False:
            raise ValueError("another process is removing it")
        shape, column_major, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
        return np.asarray(np.memmap(file, dtype, "c", file.tell(), shape, "F" if column_major else "C"))


def _arrays(entry: Path) -> str | None:
    return stamp(entry, entry.glob("*.npy"))


def _digest(content: Any) -> str:
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()
