"""The queue: rows that are not measured are distilled and evaluated, one process at a time.

What a row has done lies in a folder of its own: a queue that is stopped or killed goes on from the last checkpoint of
the run that it was in.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Provenance, machine
from benchmarks.results import record as records
from benchmarks.results.published import published
from benchmarks.results.record import Distillation, Record, Score
from benchmarks.results.table import Row
from condense import api
from condense.files import read_json, read_yaml, write_text
from condense.recipe import find
from condense.runs import read_record

STEPS = "--method.num-steps"
SET = "synthetic.safetensors"
CORES = 2
"""Number of cores of the machine of which the table gives minutes, however many threads a process has."""
FEW = 2
"""Number of steps of the shortest trial."""
TRIAL_SECONDS = 20.0
"""Time that the longest trial takes for steps alone."""
STOP_AGAIN = 20.0
"""Seconds after which a process that has not ended gets the signal again."""
POLL = 0.5
"""Seconds between two looks at a file for which a command is waited for."""


class Stopped(Exception):
    """The time of the queue is over."""


class Failed(Exception):
    """A command ended with an error; its last line of output is the message."""


@dataclass(frozen=True, kw_only=True)
class Queue:
    """Where the data lie, where the work is done, and for how long."""

    data: Mapping[str, Path]
    """The file of each data set by name."""
    work: Path
    rows: Path
    threads: int
    commit: Callable[[], str]
    """Returns the commit of the code."""
    deadline: float = float("inf")
    """``time.monotonic()`` at which the running command is stopped."""

    def measure(self, row: Row) -> Record:
        """Distil and evaluate one row, and write its record.

        Raises:
            Stopped: the deadline has passed. What is done is kept.
            Failed: a command ended with an error.
        """
        folder = self.folder(row)
        buffers = self.buffer(row)
        done = [self.distillation(row, seed, buffers) for seed in range(row.distillations)]
        syn = api.load(folder / "0")
        cost = syn.cost()
        rows = self.results(row, 0)
        record = Record(
            row=row,
            labels=syn.label_kind.name,
            decode=syn.decode.name,
            num_images=len(syn) * syn.decode.expansion,
            bytes=cost.images + cost.labels + cost.decoder,
            num_steps=syn.origin.num_steps,
            distillations=tuple(done),
            evaluation=shown(["evaluate", "RUN", *shlex.split(row.scoring)]),
            provenance=Provenance(
                commit=", ".join(_noted("commits", buffers, folder)),
                date=datetime.date.today().isoformat(),
                device=read_record(folder / "0")["device"],
                threads=self.threads,
                torch=torch.__version__,
            ),
            buffer=shown(self.buffer_words(row)) if row.buffer else "",
            buffer_minutes=_minutes(buffers) if row.buffer else 0.0,
            networks={result["network"]: result["num_params"] for result in rows},
            checksum=checksum(folder / "0" / SET),
            machine=", ".join(_noted("machines", buffers, folder)),
        )
        records.write(record, self.rows)
        return record

    def folder(self, row: Row) -> Path:
        """The folder of a row with these settings."""
        return self.work / f"{row.name}-{_digest(dataclasses.asdict(row))}"

    def buffer_words(self, row: Row) -> list[str]:
        return ["buffer", "--dataset", row.dataset, *shlex.split(row.buffer)]

    def buffer(self, row: Row) -> Path:
        """Train the networks that a method needs; rows with the same flags and device share them."""
        if not row.buffer:
            return self.work / "no-buffer"
        words = self.buffer_words(row)
        out = self.work / "buffers" / _digest(words if row.device == "cpu" else [*words, row.device])
        finished = out.with_suffix(".json")
        if not finished.exists():
            self.noted([*words, "--device", row.device, "--out", str(out)], row, out)
            write_text(finished, "true")
        return out

    def distillation(self, row: Row, seed: int, buffers: Path) -> Distillation:
        out = self.folder(row) / str(seed)
        words = self.words(row, seed, buffers)
        if "finished" not in (record := read_record(out)):
            if "seconds" not in record:  # the time of what the cache holds was lost with the process
                shutil.rmtree(_cache(out), ignore_errors=True)
            self.noted([*words, "--buffers", str(buffers), "--out", str(out), "--resume"], row, self.folder(row))
        scores = [
            Score(
                **{name: result[name] for name in ("method", "network", "protocol", "seed", "seconds")},
                accuracies=tuple(result["accuracies"]),
                auc=tuple(value for value in result["metrics"].get("auc", ()) if value is not None),
            )
            for result in self.results(row, seed)
        ]
        spent = read_record(out)
        return Distillation(
            seed=seed,
            command=shown(words),
            minutes=spent["seconds"] / 60,
            cpu_minutes=spent["cpu_seconds"] / CORES / 60,
            scores=tuple(scores),
        )

    def results(self, row: Row, seed: int) -> list[dict[str, Any]]:
        """The results of one set, which is evaluated once."""
        kept = self.folder(row) / f"results-{seed}.json"
        if not kept.exists():
            words = ["evaluate", str(self.folder(row) / str(seed)), "--json", "--device", row.device]
            write_text(kept, self.noted([*words, *shlex.split(row.scoring)], row, self.folder(row)))
        found: list[dict[str, Any]] = read_json(kept, fix="delete it")["results"]
        return found

    def words(self, row: Row, seed: int, buffers: Path) -> list[str]:
        """The words of ``condense distill`` for a row, with the number of steps that fits its budget."""
        words = ["distill", row.method, "--dataset", row.dataset, "--ipc", str(row.ipc), "--seed", str(seed)]
        words += ["--device", row.device, *shlex.split(row.flags)]
        published = _published_steps(row)
        if STEPS in words or row.device != "cpu" or published is None:
            return words
        kept = self.folder(row) / "fitted.json"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, json.dumps(self.fitted(row, words, buffers, published)))
        return [*words, *read_json(kept, fix="delete it")]

    def fitted(self, row: Row, words: Sequence[str], buffers: Path, most: int) -> list[str]:
        """Return flags for the number of steps that fits the budget, at most ``most``, and for the arithmetic.

        The arithmetic is that of a run of ``most`` steps, because a trial would choose another one for itself.
        """
        out = self.folder(row) / "trial"

        def clear() -> None:
            for folder in (out, _cache(out)):
                shutil.rmtree(folder, ignore_errors=True)

        def trial(steps: int, *flags: str, until: Path | None = None) -> None:
            clear()
            self.run([*words, *flags, STEPS, str(steps), "--buffers", str(buffers), "--out", str(out)], row, until)

        trial(most, until=out / "recipe.yaml")
        arithmetic = [
            word
            for name, value in read_yaml(out / "recipe.yaml", fix="delete it")["compute"].items()
            if value is not None and (flag := f"--compute.{name.replace('_', '-')}") not in words
            for word in (flag, str(value))
        ]

        def seconds(steps: int) -> float:
            trial(steps, *arithmetic)
            return float(read_record(out)["cpu_seconds"]) / CORES

        seconds(min(FEW, most))  # fills the cache of compiled code
        steps = fitting(seconds, 60 * row.minutes, most)
        clear()
        return [*arithmetic, STEPS, str(steps)]

    def noted(self, words: Sequence[str], row: Row, place: Path) -> str:
        """Run a command, and note the commits of the code before and after it, and the machine, beside its results."""
        self.note(row, place)
        out = self.run(words, row)
        self.note(row, place)
        return out

    def note(self, row: Row, place: Path) -> None:
        file = _notes(place)
        file.parent.mkdir(parents=True, exist_ok=True)
        now = {"commits": self.commit(), "machines": machine(torch.device(row.device))}
        both = {kind: [*dict.fromkeys([*_noted(kind, place), value])] for kind, value in now.items()}
        write_text(file, json.dumps(both))

    def run(self, words: Sequence[str], row: Row, until: Path | None = None) -> str:
        """Run one command of ``condense``, to its end or until a file exists, and return what it prints.

        It is stopped, and keeps what it has, when the time of the queue is over or the queue is stopped.
        """
        if time.monotonic() >= self.deadline:
            raise Stopped
        named = [str(self.data[row.dataset]) if word == row.dataset else word for word in words]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "NO_COLOR": "1"}
        if words[0] == "distill" and "--out" in words:  # its minutes include all that it trains, but no compilation
            environment["CONDENSE_CACHE"] = str(_cache(Path(words[words.index("--out") + 1])))
            instructions = torch.backends.cpu.get_cpu_capability().lower()  # their compiled code is not interchangeable
            environment["TORCHINDUCTOR_CACHE_DIR"] = str(self.work / "compiled" / instructions)
        process = subprocess.Popen(
            [sys.executable, "-m", "condense", *named],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            while True:
                left = self.deadline - time.monotonic()
                try:
                    out, err = process.communicate(timeout=POLL if until else None if left == float("inf") else left)
                    break
                except subprocess.TimeoutExpired:
                    if until and until.exists():
                        _stop(process)
                        return ""
                    if time.monotonic() >= self.deadline:
                        raise Stopped from None
        except (Stopped, KeyboardInterrupt):
            _stop(process)
            raise
        if process.returncode:
            raise Failed(f"{shown(words)}: {_last_words(process.returncode, err.strip() or out)}")
        return out


def _cache(out: Path) -> Path:
    """The cache of one distillation, which holds nothing that another command trained."""
    return out.with_name(f"{out.name}-cache")


def fitting(seconds: Callable[[int], float], budget: float, most: int) -> int:
    """Return the number of steps, at most ``most``, that fits a budget in seconds.

    ``seconds`` measures trials of 2, 8, 32, ... steps, of which the first shows what does not depend on the number.
    """
    few = min(FEW, most)
    fixed, many = seconds(few), few
    while many < most:
        many = min(4 * many, most)
        spent = seconds(many)
        if many < most and spent - fixed > TRIAL_SECONDS:
            per_step = (spent - fixed) / (many - few)
            return max(1, min(most, few + int((budget - fixed) / per_step)))
    return most


def _stop(process: subprocess.Popen[str]) -> None:
    """Send SIGTERM to a process until it ends: the interrupt that it becomes is lost if it is raised in a callback. A
    process that a shell started in the background would ignore SIGINT."""
    while True:
        process.terminate()
        try:
            process.communicate(timeout=STOP_AGAIN)
            return
        except subprocess.TimeoutExpired:
            continue


def order(rows: Sequence[Row]) -> list[Row]:
    """Rows of a CPU in the order of the table; those of a GPU by the published gain over random images per minute, the
    largest first."""

    def rank(row: Row) -> float:
        ours, random = (published(method, row.dataset, row.ipc) for method in (row.method, "random"))
        if row.device == "cpu" or ours is None or random is None:
            return 0.0
        return -(ours.mean - random.mean) / row.minutes

    return sorted(rows, key=rank)


def shown(words: Sequence[str]) -> str:
    """A command as the page shows it."""
    return shlex.join(["condense", *words])


def files(data: Mapping[str, str | None], folder: Path | None) -> dict[str, Path]:
    """The file of each data set that is in a folder; embedded data are found by their name."""
    embedded = {name: Path(name) for name, file in data.items() if file is None}
    given = {name: folder / file for name, file in data.items() if folder and file}
    return embedded | {name: place for name, place in given.items() if place.exists()}


def _published_steps(row: Row) -> int | None:
    """The number of steps of the recipe of a row; None if its method does not learn."""
    method = find(row.method, row.dataset, row.ipc).recipe.method
    return getattr(method, "num_steps", None) if method.learns else None


def _notes(place: Path) -> Path:
    return place.with_name(f"{place.name}-made-by.json")


def _noted(kind: str, *places: Path) -> list[str]:
    """The commits of the code, or the machines, that made what lies in folders."""
    files = [_notes(place) for place in places if _notes(place).exists()]
    return [*dict.fromkeys(value for file in files for value in read_json(file, fix="delete it")[kind])]


def _minutes(buffers: Path) -> float:
    """The time that the networks of a buffer took, in however many sessions."""
    (manifest,) = buffers.glob("*/manifest.json")
    return float(sum(expert["seconds"] for expert in read_json(manifest, fix="restore it")["experts"])) / 60


def _last_words(status: int, output: str) -> str:
    """The last line of what a command that failed has printed, or how it ended."""
    if status < 0:
        return f"signal {-status} ended it"
    return (output.strip().splitlines() or [f"it ended with status {status}"])[-1]


def checksum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
