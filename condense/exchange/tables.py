"""Soft labels of a folder of images: a Parquet table, which is read and written with pyarrow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from condense.data.pixels import Array
from condense.files import check_expansion
from condense.names import installing, reason

SOFT_LABELS = "soft_labels.parquet"


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
        stored = path.stat().st_size
        with parquet.ParquetFile(path) as table:
            facts = table.metadata
            size = sum(facts.row_group(group).total_byte_size for group in range(facts.num_row_groups))
            check_expansion("its content", size, stored, "remove it to read hard labels")
            columns = table.read(columns=["file", "soft_label"]).to_pydict()
        rows = dict(zip(columns["file"], columns["soft_label"], strict=True))
        return np.array([rows[file.relative_to(folder).as_posix()] for file in files], dtype=np.float32)
    except Exception as error:  # a damaged table can raise almost any exception
        raise ValueError(
            f"cannot read the soft labels in {path}: {reason(error)}; remove the file to read hard labels"
        ) from error
