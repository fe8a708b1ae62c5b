"""Soft labels beside a folder of images: a Parquet table, which pyarrow reads and writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from condense.data.pixels import Array
from condense.files import check_expansion
from condense.names import reason

SOFT_LABELS = "soft_labels.parquet"


def arrow():  # type: ignore[no-untyped-def]
    """The modules ``pyarrow`` and ``pyarrow.parquet``.

    Raises:
        ValueError: they are not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("this needs pyarrow; run: pip install 'condense-dd[export]'") from error
    return pyarrow, pyarrow.parquet


def read_soft_labels(folder: Path, files: Sequence[Path]) -> Array | None:
    """The rows (N, classes), float32, of the table in ``folder`` for these files; None where there is no table.

    Raises:
        ValueError: it is damaged, or lacks a file.
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
            check_expansion("its content", size, stored, "move it away to do without soft labels")
            columns = table.read(columns=["file", "soft_label"]).to_pydict()
        rows = dict(zip(columns["file"], columns["soft_label"], strict=True))
        return np.array([rows[file.relative_to(folder).as_posix()] for file in files], dtype=np.float32)
    except Exception as error:  # a damaged table raises nearly anything
        raise ValueError(
            f"cannot read the soft labels in {path}: {reason(error)}; move it away to do without them"
        ) from error
