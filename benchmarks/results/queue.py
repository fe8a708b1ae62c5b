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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Provenance
from benchmarks.results import record as records
from benchmarks.results.published import published
from benchmarks.results.record import Distillation, Record, Score
from benchmarks.results.table import Row
from condense import api
from condense.files import read_json, write_text
from condense.recipe import find
from condense.runs import read_record

STEPS = "--method.num-steps"
CORES = 2
"""Number of cores of the machine of which the table gives minutes, however many threads a process has."""
TRIAL_SECONDS = 20.0
"""Time that the longest trial takes for steps alone."""
STOP_AGAIN = 20.0
"""Seconds after which a process that has not ended gets the signal again."""


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
    commit: str
    deadline: float = float("inf")
    """``time.monotonic()`` at which the running command is stopped."""

    def measure(self, row: Row) -> Record:
        """Distil and evaluate one row, and write its record.

        Raises:
            Stopped: the deadline has passed. What is done is kept.
            Failed: a command ended with an error.
        """
        folder = self.folder(row)
        buffers, buffer_minutes = self.buffer(row)
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
                commit=self.commit,
                date=datetime.date.today().isoformat(),
                device=read_record(folder / "0")["device"],
                threads=self.threads,
                torch=torch.__version__,
            ),
            buffer=shown(self.buffer_words(row)) if row.buffer else "",
            buffer_minutes=buffer_minutes,
            networks={result["network"]: result["num_params"] for result in rows},
        )
        records.write(record, self.rows)
        return record

    def folder(self, row: Row) -> Path:
        """The folder of a row with these settings."""
        return self.work / f"{row.name}-{_digest(dataclasses.asdict(row))}"

    def buffer_words(self, row: Row) -> list[str]:
        return ["buffer", "--dataset", row.dataset, *shlex.split(row.buffer)]

    def buffer(self, row: Row) -> tuple[Path, float]:
        """Train the networks that a method needs; rows with the same flags share them."""
        if not row.buffer:
            return self.work / "no-buffer", 0.0
        words = self.buffer_words(row)
        out = self.work / "buffers" / _digest(words)
        spent = out.with_suffix(".json")
        if not spent.exists():
            begun = time.monotonic()
            self.run([*words, "--out", str(out)], row)
            write_text(spent, json.dumps((time.monotonic() - begun) / 60))
        return out, float(read_json(spent, fix="delete it"))

    def distillation(self, row: Row, seed: int, buffers: Path) -> Distillation:
        out = self.folder(row) / str(seed)
        words = self.words(row, seed, buffers)
        places = ["--buffers", str(buffers), "--out", str(out), "--resume"]
        if not (out / "synthetic.safetensors").exists():
            self.run([*words, *places], row)
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
            write_text(kept, self.run([*words, *shlex.split(row.scoring)], row))
        found: list[dict[str, Any]] = read_json(kept, fix="delete it")["results"]
        return found

    def words(self, row: Row, seed: int, buffers: Path) -> list[str]:
        """The words of ``condense distill`` for a row, with the number of steps that fits its budget."""
        words = ["distill", row.method, "--dataset", row.dataset, "--ipc", str(row.ipc), "--seed", str(seed)]
        words += ["--device", row.device, *shlex.split(row.flags)]
        published = _published_steps(row)
        if STEPS in words or row.device != "cpu" or published is None:
            return words
        return [*words, STEPS, str(self.fitted_steps(row, words, buffers, published))]

    def fitted_steps(self, row: Row, words: Sequence[str], buffers: Path, most: int) -> int:
        """Return the number of steps that fits the budget, at most ``most``."""
        kept = self.folder(row) / "steps.json"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, json.dumps(self.trial(row, words, buffers, most)))
        return int(read_json(kept, fix="delete it"))

    def trial(self, row: Row, words: Sequence[str], buffers: Path, most: int) -> int:
        """Find that number by trials of 2, 8, 32, ... steps, of which the first shows what does not depend on it."""
        fixed, few, many = None, 0, 2
        while True:
            many = min(many, most)
            out = self.folder(row) / "trial"
            shutil.rmtree(out, ignore_errors=True)
            self.run([*words, STEPS, str(many), "--buffers", str(buffers), "--out", str(out)], row)
            spent = read_record(out)["cpu_seconds"] / CORES
            shutil.rmtree(out)
            if many == most:
                return most
            if fixed is None:
                fixed, few = spent, many
            elif spent - fixed > TRIAL_SECONDS:
                per_step = (spent - fixed) / (many - few)
                return max(1, min(most, few + int((60 * row.minutes - fixed) / per_step)))
            many *= 4

    def run(self, words: Sequence[str], row: Row) -> str:
        """Run one command of ``condense`` and return what it prints.

        It is stopped, and keeps what it has, when the time of the queue is over or the queue is stopped.
        """
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise Stopped
        named = [str(self.data[row.dataset]) if word == row.dataset else word for word in words]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "NO_COLOR": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "condense", *named],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            out, err = process.communicate(timeout=None if left == float("inf") else left)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as stop:
            _stop(process)
            raise (Stopped if isinstance(stop, subprocess.TimeoutExpired) else stop) from None
        if process.returncode:
            raise Failed(f"{shown(words)}: {(err.strip() or out.strip()).splitlines()[-1]}")
        return out


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


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
