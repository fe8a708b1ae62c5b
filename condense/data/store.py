"""Cache of decoded arrays on disk, which are mapped into memory and shared by all processes.

An entry is a folder of plain ``.npy`` files and ``entry.json``, which records their source and facts about them. It is
written under a temporary name and then renamed. Arrays are mapped copy-on-write: processes share the pages, and a
process that writes to them changes only its own copy.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from condense.files import canonical_json, temporary

FORMAT = 2
"""Changes with how sources are decoded: 2 turns pictures the way their EXIF orientation says."""
_FACTS = "entry.json"


def stamp(root: Path, files: Iterable[Path]) -> str | None:
    """Return a hash of the names (relative to ``root``), sizes and times of the files.

    Returns None if there are no files, or one cannot be accessed.
    """
    try:
        stats = [(file.relative_to(root).as_posix(), file.stat()) for file in sorted(files)]
    except OSError:
        return None
    return _digest([[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in stats]) if stats else None


def read(entry: Path, source: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
    """Return arrays by name, and the facts; None if the entry is missing, damaged or made from another source."""
    try:
        content = json.loads((entry / _FACTS).read_text(encoding="utf-8"))
        intact = content.pop("sha256") == _digest(content)
        if not intact or [content["format"], content["source"], content["arrays"]] != [FORMAT, source, _arrays(entry)]:
            return None
        files = entry.glob("*.npy")
        arrays = {file.stem: np.asarray(np.load(file, mmap_mode="c", allow_pickle=False)) for file in files}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return arrays, content["facts"]


def write(entry: Path, source: str, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> None:
    """Write an entry that ``read`` finds; it replaces an existing one.

    Raises:
        OSError: the disk is full or not writable, or another process wrote the entry at the same time.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    with temporary(entry.parent, is_folder=True) as scratch:
        new = scratch / "new"
        new.mkdir()
        for name, array in arrays.items():
            with open(new / f"{name}.npy", "wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        content = {"format": FORMAT, "source": source, "arrays": _arrays(new), "facts": facts}
        (new / _FACTS).write_text(json.dumps({**content, "sha256": _digest(content)}), encoding="utf-8")
        if entry.exists():
            entry.rename(scratch / "old")
        new.rename(entry)


def _arrays(entry: Path) -> str | None:
    return stamp(entry, entry.glob("*.npy"))


def _digest(content: Any) -> str:
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()
