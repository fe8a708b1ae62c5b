"""A folder of small data, experts, runs and results; each case starts with a copy of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from condense.tracking import read_log
from tests.torture.process import learn

TINY = "convnet:depth=1,width=4"
DATA = ["--dataset", "data.npz", "--network", TINY, "--device", "cpu"]
DM = ["distill", "dm", *DATA, "--ipc", "1", "--method.num-steps", "5", "--method.batch-real", "6"]
MTT = ["distill", "mtt", *DATA, "--ipc", "1", "--method.num-steps", "3", "--method.syn-steps", "1"]
MTT += ["--method.max-start-epoch", "1", "--method.expert-epochs", "1"]
EXPERTS = ["buffer", *DATA, "--num-epochs", "2", "--batch-size", "12", "--lr", "0.1", "--num-experts"]
EVALUATE = ["evaluate", "set", "--protocol.num-epochs", "2", "--device", "cpu", "--networks"]
APPLY = ["apply", "continual", "set", "--num-groups", "2", "--num-seeds", "1", "--network", "mlp", "--device", "cpu"]


@dataclass(frozen=True)
class Scenario:
    """A command and its expected outcome."""

    name: str
    words: Sequence[str]
    outcome: Callable[[Path], dict[str, Any]]
    """Returns what the command produces, without times. It is the same however often the command was stopped."""
    resumes: bool = False
    """The command is resumed with ``--resume``; the others are simply run again."""
    makes_new: bool = False
    """The command refuses to replace its output."""

    @property
    def again(self) -> list[str]:
        """The command that continues a stopped one."""
        return [*self.words, *(["--resume"] if self.resumes else [])]


class World:
    """The initial folder of the cases, below ``root``, and the outcomes of undisturbed commands in it."""

    def __init__(self, root: Path) -> None:
        self._root, self._plain = root, root / "plain"
        self._known: dict[str, tuple[dict[str, Any], int]] = {}
        self._plain.mkdir()
        write_data(self._plain / "data.npz")
        for words in (
            [*EXPERTS, "1"],
            [*DM, "--out", "set"],
            [*EVALUATE, "mlp", "--num-seeds", "1"],
            [*APPLY, "--baselines", "random"],
            ["export", "set", "published.npz"],
            ["export", "set", "pictures"],
        ):
            learn(self._plain, words)
        shutil.rmtree(self._plain / "cache")

    def undisturbed(self, scenario: Scenario) -> tuple[dict[str, Any], int]:
        """Return the outcome of an undisturbed command, and the number of its calls that change files."""
        if scenario.name not in self._known:
            folder = self.copy("undisturbed")
            count = learn(folder, scenario.words).count
            self._known[scenario.name] = scenario.outcome(folder), count
        return self._known[scenario.name]

    def copy(self, name: str) -> Path:
        """Return a fresh copy of the initial folder under this name."""
        folder = self._root / name
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(self._plain, folder))


def write_data(path: Path) -> None:
    """Write a data set of three classes of 8x8 images that differ in brightness, with 12 + 6 images per class."""
    rng, arrays = np.random.default_rng(0), {}
    for part, num in (("train", 36), ("test", 18)):
        labels = np.arange(num) % 3
        levels = (30 + 80 * labels)[:, None, None] + rng.integers(0, 40, (num, 8, 8))
        arrays |= {f"x_{part}": levels.astype(np.uint8), f"y_{part}": labels.astype(np.uint8)}
    np.savez(path, **arrays)


def run_outcome(run: Path) -> dict[str, Any]:
    """Return the set, the snapshots, the recipe, and the log without its events."""
    files = [run / "synthetic.safetensors", run / "recipe.yaml", *sorted(run.glob("snapshots/step_*"))]
    steps = [record for record in read_log(run / "log.jsonl") if "event" not in record]
    return {"log.jsonl": steps, **{file.name: file.read_bytes() for file in files}}


def experts(folder: Path) -> dict[str, Any]:
    """Return the bytes of the experts, and the manifest without times."""
    (manifest,) = (folder / "artifacts").glob("*/manifest.json")
    content = json.loads(manifest.read_text())
    del content["checksum"]
    for expert in content["experts"]:
        if expert is not None:
            del expert["seconds"]
    return {"manifest.json": content, **{file.name: file.read_bytes() for file in manifest.parent.glob("expert_*")}}


def rows(folder: Path) -> dict[str, Any]:
    """Return the rows of the evaluation without times and memory."""
    results = json.loads((folder / "set" / "evaluation.json").read_text())["results"]
    omitted = ("seconds", "peak_memory_bytes")
    key = ("method", "network", "seed", "n")
    return {" ".join(str(row[k]) for k in key): {k: v for k, v in row.items() if k not in omitted} for row in results}


def tree(path: Path) -> dict[str, Any]:
    """Return the bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path.parent)): file.read_bytes() for file in files}


def whole_world(folder: Path) -> None:
    """Raise an exception if something is missing that every copy starts with."""
    files = experts(folder)
    assert files["manifest.json"]["experts"][0] and "expert_0000.safetensors" in files, "the first expert is lost"
    assert "dm mlp 0 1" in rows(folder), "the row of another network is lost"
    run_outcome(folder / "set")
    assert json.loads((folder / "set" / "apply-continual.json").read_text())["table"]["rows"]
    assert len(tree(folder / "pictures")) == 5 and (folder / "published.npz").is_file()


SCENARIOS = (
    Scenario("dm", [*DM, "--out", "run"], lambda folder: run_outcome(folder / "run"), resumes=True),
    Scenario("mtt", [*MTT, "--out", "run"], lambda folder: run_outcome(folder / "run"), resumes=True),
    Scenario("buffer", [*EXPERTS, "3"], experts),
    Scenario("evaluate", [*EVALUATE, TINY, "--num-seeds", "2", "--baselines", "random"], rows),
    Scenario("apply", APPLY, lambda folder: tree(folder / "set" / "apply-continual.json")),
    Scenario("npz", ["export", "set", "new.npz"], lambda folder: tree(folder / "new.npz"), makes_new=True),
    Scenario("folder", ["export", "set", "new"], lambda folder: tree(folder / "new"), makes_new=True),
    Scenario(
        "import",
        ["import", "published.npz", "new.safetensors", *DATA[:2]],
        lambda folder: tree(folder / "new.safetensors"),
        makes_new=True,
    ),
    Scenario("report", ["report", "set", "--out", "new.html"], lambda folder: tree(folder / "new.html")),
)
