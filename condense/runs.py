"""Options of a run, its folder, and its record of facts that do not affect the result (location of the data, time,
machine)."""

from __future__ import annotations

import contextlib
import json
import platform
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tyro.conf import FlagConversionOff

from condense import __version__, registry
from condense.compute import Compute, device_name, peak_memory
from condense.data import datasets
from condense.engine import SCRATCH
from condense.files import check_new_folder, content, expanded, locked, read_json, read_yaml, write_text
from condense.names import printable, spelt
from condense.recipe import Recipe, to_mapping
from condense.schema import Checked, from_json, mismatch

RECORD = "run.json"


@dataclass(frozen=True, kw_only=True)
class RunOptions(Checked):
    """Options of a run. They do not affect the result, except that ``eval_every`` holds out a validation split where
    the recipe leaves that open."""

    out: Path | None = None
    """Run folder. The default is runs/METHOD-DATASET-ipcN-seedS."""
    buffers: Path = Path("artifacts")
    """Folder to search for buffers, or the folder of one buffer."""
    resume: bool = False
    """Continue from the checkpoint, or start anew if there is none. Implied when torchrun restarts a run."""
    eval_every: int = 0
    """Number of steps between evaluations on the validation split; 0 turns them off."""
    track: tuple[str, ...] = ()
    """Trackers to use in addition to log.jsonl: wandb, tensorboard."""
    device: str = "auto"
    """Device to compute on: auto, cpu, cuda, cuda:1 or mps."""
    download: FlagConversionOff[bool] = False
    """Let torchvision download a missing data set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_every < 0:
            raise ValueError(f"eval_every must be at least 0, got {self.eval_every}; give {spelt('eval_every', 100)}")


def run_folder(plan: Recipe, out: Path | None, dataset: str) -> Path:
    """Return ``out``, or the default run folder, which is named after method, data set, budget and seed."""
    method = registry.name_of(plan.method).replace(":", ".").replace("<locals>.", "")
    return expanded(out or Path("runs") / f"{method}-{dataset}-{plan.budget_in_words.replace(' ', '')}-seed{plan.seed}")


def located(plan: Recipe, options: RunOptions) -> Recipe:
    """Return the recipe with the location of its data, as recorded by the run to be resumed, else as in the recipe.

    Raises:
        ValueError: the recipe names data with a fingerprint that are neither a known data set nor an existing path.
    """
    run = expanded(options.out) if options.resume and options.out is not None else None
    source = source_of(run, plan.dataset)
    if plan.fingerprint is not None and source not in datasets.names() and not expanded(source).exists():
        raise ValueError(
            f"the recipe is for the data set {plan.dataset!r} with fingerprint {plan.fingerprint[:12]}, which is "
            f"neither a known data set nor an existing file; give {spelt('dataset', 'PATH')}"
        )
    return replace(plan, dataset=source)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Create a run folder if necessary, and lock it against all other processes.

    Raises:
        ValueError: the folder cannot be created, or another process is running in it.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file; choose another {spelt('out')}")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot create the run folder {folder}: {error.strerror}; choose another {spelt('out')}"
        ) from error
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, made)
        try:
            stack.enter_context(locked(folder / RECORD, wait=False))
        except BlockingIOError as error:
            raise ValueError(
                f"{error} is running in {folder}; wait until it has ended, or choose another {spelt('out')}"
            ) from None
        yield


def _remove_empty(folders: Sequence[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def check_folder(folder: Path, resume: bool) -> None:
    """Raise ValueError if no run can be written to ``folder``: it is a file, it holds other files or a run that is not
    to be resumed, or it cannot be created. The check leaves no files behind.

    What a method stored in a run that was stopped before its first step is no hindrance.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file; choose another {spelt('out')}")
    if folder.exists() and {path.name for path in content(folder)} - {SCRATCH}:
        if not (folder / "recipe.yaml").exists():
            raise ValueError(f"{folder} is not empty and holds no run; choose another {spelt('out')}")
        if not resume:
            raise ValueError(
                f"{folder} already holds a run; give {spelt('resume', True)} to continue it, or another {spelt('out')}"
            )
    check_new_folder(folder)


def written_recipe(folder: Path) -> Mapping[str, Any] | None:
    """Return the fields of the recipe of the run in ``folder``, with ``compute`` checked; None if there is no run.

    Raises:
        ValueError: the file is damaged.
    """
    file, fix = folder / "recipe.yaml", f"restore it, or choose another {spelt('out')}"
    if not file.exists():
        return None
    written = read_yaml(file, fix=fix)
    if not isinstance(written, dict):
        raise ValueError(f"{file} is damaged: it is not a mapping of fields; {fix}")
    if written.get("compute") is not None:
        from_json(Compute, written["compute"], f"{file}, compute")
    return written


def claim(folder: Path, plan: Recipe, written: Mapping[str, Any] | None) -> None:
    """Check that a run may write to a folder, before anything is written.

    Args:
        folder: the run folder.
        plan: the recipe of the run.
        written: the result of ``written_recipe``, if that run is to be resumed. The location of its data is ignored.

    Raises:
        ValueError: see ``check_folder``; or the existing run has another recipe (the error names the field).
    """
    if written is None:
        return check_folder(folder, resume=False)
    ours = to_mapping(plan)
    # the fingerprint identifies the data; version 0.1.0 wrote no fingerprint, and the path of the data
    theirs = {"fingerprint": ours["fingerprint"], **written} | {"dataset": ours["dataset"]}
    different = _difference(theirs, ours)
    if different is not None:
        name, old, new = (printable(str(part), 60) for part in different)
        raise ValueError(
            f"{folder} was started with {name} = {old}, not {new}: it is another recipe; give "
            f"the same one to continue, or choose another {spelt('out')}"
        )


def _difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Return path, old and new value of the first field in which two recipes differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*new, *(k for k in old if k not in new)]:
            difference = _difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
            if difference is not None:
                return difference
        return None
    return None if old == new else (path, old, new)


def write_start(folder: Path, dataset: str, steps: int) -> None:
    """Write the location of the data and the total number of steps to ``run.json`` at the start of a run.

    Data that were passed in Python have a name but no location. For these an earlier record is retained, else the name
    is written.
    """
    record, path = read_record(folder), expanded(dataset)
    if dataset not in datasets.names() and path.exists():
        record["dataset"] = str(path.resolve())
    elif dataset in datasets.names() or "dataset" not in record:
        record["dataset"] = dataset
    record["steps"] = steps
    write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")


class Stopwatch:
    """Adds the time of a session of a run to ``run.json``, from the moment that it is made.

    Steps that an interrupted session took after its last checkpoint are taken again by the next one, so a run that
    calls ``save`` after each checkpoint counts every step once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read = self._now()

    @staticmethod
    def _now() -> dict[str, float]:
        return {"seconds": time.monotonic(), "cpu_seconds": time.process_time()}

    def save(self) -> None:
        """Add the time since the last call. ``cpu_seconds`` is that of all threads of this process."""
        record, now = read_record(self.folder), self._now()
        for name, value in now.items():
            record[name] = round(float(record.get(name, 0.0)) + value - self._read[name], 2)
        self._read = now
        write_text(self.folder / RECORD, json.dumps(record, indent=1) + "\n")


def write_record(folder: Path, device: torch.device, processes: int, buffers: Mapping[str, Mapping[str, Any]]) -> None:
    """Complete ``run.json`` at the end of a run. ``buffers`` has the settings of the buffers it used, by their name."""
    earlier = read_record(folder)
    record: dict[str, Any] = {
        **{name: earlier[name] for name in ("dataset", "steps", "seconds", "cpu_seconds") if name in earlier},
        "buffers": {name: dict(plan) for name, plan in buffers.items()},
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
    """Return the content of ``run.json`` without fields of a wrong type; empty if it cannot be read."""
    path = folder / RECORD
    if not path.exists():
        return {}
    try:
        content = read_json(path, fix="remove it")
    except ValueError:
        return {}
    record = content if isinstance(content, dict) else {}
    return {name: value for name, value in record.items() if _is_of_record(name, value)}


def _is_of_record(name: str, value: Any) -> bool:
    numbers = {"seconds": float, "cpu_seconds": float, "peak_memory_bytes": int}
    counts = {"processes": int, "threads": int, "steps": int}
    kind = ({"buffers": Mapping[str, Mapping[str, Any]]} | numbers | counts).get(name, str)
    return mismatch(value, kind) is None and (kind not in (int, float) or 0 <= value < 2**63)


def source_of(path: Path | None, name: str) -> str:
    """Return the location of the data recorded by a run, or ``name`` if none is recorded or the data no longer exist.

    ``path`` is the run folder or a file in it.
    """
    for folder in () if path is None else (path, *path.parents[:2]):
        source = str(read_record(folder).get("dataset", ""))
        if source in datasets.names() or (source and Path(source).exists()):
            return source
    return name
