"""The run folder: whose it is, and what is true of a run and not of its result (place, time, machine)."""

from __future__ import annotations

import json
import platform
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from condense import __version__
from condense.compute import device_name, peak_memory
from condense.data import datasets
from condense.files import write_text
from condense.names import spelt
from condense.recipe import Recipe, to_mapping

RECORD = "run.json"


def claim(folder: Path, plan: Recipe, resume: bool) -> None:
    """Refuse a folder that holds something else, before anything is written.

    Raises:
        ValueError: no run, a run that is not to be resumed, or a run of another recipe (names the field).
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file; choose another {spelt('out')}")
    if not folder.exists() or not any(folder.iterdir()):
        return
    written = folder / "recipe.yaml"
    if not written.exists():
        raise ValueError(f"{folder} holds other files and is no run; choose another {spelt('out')}")
    if not resume:
        raise ValueError(
            f"{folder} already holds a run; give {spelt('resume', True)} to continue it, or another {spelt('out')}"
        )
    theirs, ours = _read(written), to_mapping(plan)
    if "fingerprint" not in theirs:  # of version 0.1.0, which wrote where the data lie
        theirs |= {name: ours[name] for name in ("dataset", "fingerprint")}
    different = _difference(theirs, ours)
    if different is not None:
        name, old, new = different
        raise ValueError(
            f"{folder} was begun with {name} = {old}, not {new}: it is another recipe; choose another {spelt('out')}"
        )


def settled(folder: Path) -> Mapping[str, Any] | None:
    """What a run that began in ``folder`` settled of its ``compute``; None where there is none."""
    written = folder / "recipe.yaml"
    return _read(written).get("compute") if written.exists() else None


def _read(written: Path) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(written.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{written} is damaged: {' '.join(str(error).split())}; choose another {spelt('out')}"
        ) from error


def _difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """The first field in which two recipes differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*new, *(k for k in old if k not in new)]:
            found = _difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
            if found is not None:
                return found
        return None
    return None if old == new else (path, old, new)


def write_source(folder: Path, dataset: str) -> None:
    """Where the data of a run lie, into ``run.json`` as the run begins."""
    record = read_record(folder) | {"dataset": _place(dataset)}
    write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")


def _place(dataset: str) -> str:
    local = dataset not in datasets.names() and Path(dataset).exists()
    return str(Path(dataset).resolve()) if local else dataset


def write_record(folder: Path, dataset: str, device: torch.device, seconds: float, processes: int) -> None:
    """``run.json``; ``seconds`` add up over resumptions."""
    record = {
        "dataset": _place(dataset),
        "seconds": round(float(read_record(folder).get("seconds", 0.0)) + seconds, 2),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "machine": platform.machine(),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "device": device_name(device),
        "peak_memory_bytes": peak_memory(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "condense": __version__,
    }
    write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """What ``write_record`` wrote; empty where there is nothing readable. Numbers that are none are left out."""
    try:
        record = dict(json.loads((folder / RECORD).read_text(encoding="utf-8")))
        numbers = ("seconds", "peak_memory_bytes")
        return {name: value for name, value in record.items() if name not in numbers or isinstance(value, int | float)}
    except (OSError, ValueError, TypeError):
        return {}


def source_of(path: Path | None, name: str) -> str:
    """Where the data of a set lie: as its run recorded it (``path``: the run, or a file in it), else ``name``; so too
    where they are not there any more."""
    for folder in () if path is None else (path, *path.parents[:2]):
        place = str(read_record(folder).get("dataset", ""))
        if place in datasets.names() or (place and Path(place).exists()):
            return place
    return name
