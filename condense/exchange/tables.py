"""Parquet tables, which are read and written with pyarrow: the soft labels of a folder of images, and data sets of
Hugging Face."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from condense.data.pixels import Array
from condense.files import check_expansion, parse_json
from condense.names import installing, reason

SOFT_LABELS = "soft_labels.parquet"
"""Table in a folder of images."""
HUB = "data/train.parquet"
"""Table of images and labels in a data set of Hugging Face."""


def arrow():  # type: ignore[no-untyped-def]
    """Return the modules ``pyarrow`` and ``pyarrow.parquet``.

    Raises:
        ValueError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"Parquet tables need pyarrow; run: {installing('export')}") from error
    return pyarrow, pyarrow.parquet


def read_soft_labels(folder: Path, files: Sequence[Path]) -> Array | None:
    """Return the soft labels (N, classes), float32, of these files, from the table in ``folder``; None if there is no
    table.

    Raises:
        ValueError: the table is damaged, or lacks a file.
    """
    path = folder / SOFT_LABELS
    if not path.is_file():
        return None
    _, parquet = arrow()
    try:
        columns, _ = _columns(parquet, path, ["file", "soft_label"], "remove it to read hard labels")
        rows = dict(zip(columns["file"], columns["soft_label"], strict=True))
        return np.array([rows[file.relative_to(folder).as_posix()] for file in files], dtype=np.float32)
    except Exception as error:  # a damaged table can raise almost any exception
        raise ValueError(
            f"cannot read the soft labels in {path}: {reason(error)}; remove the file to read hard labels"
        ) from error


def read_hub(folder: Path) -> tuple[list[bytes], Array, Array | None, tuple[str, ...]]:
    """Read the table of a data set that was exported for Hugging Face.

    Returns:
        The files of the images; the labels (N,); the soft labels (N, classes), float32, if there are any; the names of
        the classes.

    Raises:
        ValueError: the table is damaged, or is of another data set.
    """
    path = folder / HUB
    _, parquet = arrow()
    try:
        columns, metadata = _columns(parquet, path, None, "export the set again")
        names = tuple(map(str, parse_json(metadata[b"huggingface"])["info"]["features"]["label"]["names"]))
        soft = np.array(columns["soft_label"], dtype=np.float32) if "soft_label" in columns else None
        files = [bytes(row["bytes"]) for row in columns["image"]]
        if not files:
            raise ValueError("it has no rows")
        return files, np.array(columns["label"], np.int64), soft, names
    except Exception as error:
        raise ValueError(
            f"cannot read {path}: {reason(error)}; give a folder that `condense export --format huggingface` wrote"
        ) from error


def _columns(parquet: Any, path: Path, names: list[str] | None, fix: str) -> tuple[dict[str, Any], dict[bytes, bytes]]:
    """Return columns of a table, by default all, and its metadata."""
    with parquet.ParquetFile(path) as table:
        facts = table.metadata
        size = sum(facts.row_group(group).total_byte_size for group in range(facts.num_row_groups))
        check_expansion("its content", size, path.stat().st_size, fix)
        return table.read(columns=names).to_pydict(), dict(table.schema_arrow.metadata or {})
