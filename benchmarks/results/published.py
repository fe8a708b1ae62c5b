"""Published accuracies that stand beside measured ones."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files
from typing import Any, NamedTuple


class Published(NamedTuple):
    """An accuracy in percent."""

    mean: float
    std: float | None
    verified: bool
    """Whether it was read in the publication or the authors' repository."""

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:.1f}"
        return f"{self.mean:.1f}{spread}{'' if self.verified else ' (unverified)'}"


def published(method: str, dataset: str, ipc: int) -> Published | None:
    """Return the published accuracy of a method with ``ipc`` images per class; None if none is known."""
    for row in _table().get(dataset, {}).get("rows", []):
        value = row["accuracy"].get(str(ipc))
        if row["method"] == method and value is not None:
            return Published(value[0], value[1], row["verified"])
    return None


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(files("condense.eval.report").joinpath("published.json").read_text())
    return table
