"""Decoded arrays in the cache, mapped into memory: read once, shared by every process that asks again.

An entry holds plain ``.npy`` files and ``facts.json``: what they were made from and facts about them. Arrays are mapped
copy-on-write: processes share the pages, and what one writes into them stays its own.
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

FORMAT = 3
"""Changes with how sources are decoded: 2 turns pictures the way their EXIF orientation says, 3 reads the axes and
lengths that ``.npz`` files name."""
_FACTS = "facts.json"


def stamp(root: Path, files: Iterable[Path]) -> str | None:
    """Changes with the names (under ``root``), sizes and times of the files; None: there are none, or one vanished."""
    try:
        stats = [(file.relative_to(root).as_posix(), file.stat()) for file in sorted(files)]
    except OSError:
        return None
    return _digest([[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in stats]) if stats else None


def read(
    cache: Path | None, key: Mapping[str, Any], source: str
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
    """Arrays by name and facts; None where there is no entry, or one that is damaged or made from another source."""

    def arrays_and_facts(folder: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        content = read_json(folder / _FACTS, fix="decode it again")
        intact = content.pop("sha256") == _digest(content)
        made_of = [content["format"], content["source"], content["arrays"]]
        if not intact or made_of != [FORMAT, source, _arrays(folder)]:
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
    """Put an entry where ``read`` finds it, in place of an existing one; see ``Cache.write``."""

    def lay_out(folder: Path) -> None:
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array, allow_pickle=False)
        content = {"format": FORMAT, "source": source, "arrays": _arrays(folder), "facts": facts}
        (folder / _FACTS).write_text(json.dumps({**content, "sha256": _digest(content)}), encoding="utf-8")

    Cache(cache, "decoded").write(key, lay_out, about=about)


_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _mapped(path: Path) -> NDArray[Any]:
    """The array of a ``.npy`` file, locked against removal for as long as it is mapped: the mapping keeps a duplicate
    of the file's descriptor, and the lock lasts as long as that."""
    with open(path, "rb") as file:
        if try_lock_open(file.fileno(), shared=True) is False:
            raise ValueError("another process is removing it")
        shape, in_columns, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
        return np.asarray(np.memmap(file, dtype, "c", file.tell(), shape, "F" if in_columns else "C"))


def _arrays(entry: Path) -> str | None:
    return stamp(entry, entry.glob("*.npy"))


def _digest(content: Any) -> str:
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()
