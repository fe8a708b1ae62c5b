"""Studies of some sets: commands one after the other, the last of which compares the sets or applies one.

    python -m benchmarks.studies FOLDER [--only NAME ...] [--work build/studies] [--rows results/studies]

The studies are those of ``results/studies.yaml``; FOLDER has the ``.npz`` files that they name. Each runs in a
folder of its own in ``--work``, with one thread. Commands that ended well with the same code and FOLDER are not run
again, and a study whose result lies in ``--rows`` is not measured again. docs/results.md has a table of each result.
"""

from __future__ import annotations

import argparse
import dataclasses
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

import torch

from benchmarks import harness
from benchmarks.harness import Provenance
from condense.files import read_json, read_yaml, write_text
from condense.names import suggest
from condense.schema import from_json

ROOT = Path(__file__).parents[1]
STUDIES = ROOT / "results" / "studies.yaml"


@dataclass(frozen=True, kw_only=True)
class Study:
    title: str
    commands: tuple[str, ...]
    """Commands of ``condense``, the last one ``apply`` or ``compare``. A word that is the name of a data set stands for
    its file."""
    data: Mapping[str, str | None]
    """The file of each data set, in the folder that the user gives; None for embedded data."""

    def __post_init__(self) -> None:
        if not self.commands or not self.commands[-1].startswith(("apply ", "compare ")):
            raise ValueError(
                f"the last command of the study {self.title!r} prints no table; begin it with apply or compare"
            )


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the last command of a study found, as it prints it."""

    study: Study
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    minutes: float
    """Wall time of all commands."""
    provenance: Provenance


def read(path: Path) -> dict[str, Study]:
    """Return the studies by name. Raises ValueError if the file or a study is wrong."""
    content = read_yaml(path, fix="mend it")
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} has no studies by name")
    return {str(name): from_json(Study, study, f"{path}, {name}") for name, study in content.items()}


def measure(study: Study, folder: Path, work: Path) -> Finding:
    """Run the commands of a study from the first one on that has not been run by this code and with this data.

    Commands after it are run again. What an interrupted command has left in the folder after ``--out`` is removed. The
    provenance names the commits of all commands.

    Args:
        study: the study.
        folder: folder of its data.
        work: the folder in which the commands are run.

    Raises:
        ValueError: a file of data is missing.
        CalledProcessError: a command failed; it has said why.
    """
    files = {name: (folder / file).resolve() for name, file in study.data.items() if file is not None}
    for file in files.values():
        if not file.exists():
            raise ValueError(f"there is no file {file}; give the folder that has it")
    work.mkdir(parents=True, exist_ok=True)
    records = []
    for number, command in enumerate(study.commands):
        words = [str(files.get(word, word)) for word in shlex.split(command)]
        done = work / f"{number}.json"
        record = read_json(done, fix="delete it") if done.exists() else {}
        facts = {"command": shlex.join(words), "commit": harness.commit()}
        unknown = not facts["commit"] or facts["commit"].endswith("+")
        if unknown or any(record.get(name) != value for name, value in facts.items()):
            for later in range(number, len(study.commands)):
                (work / f"{later}.json").unlink(missing_ok=True)
            out = work / words[words.index("--out") + 1] if "--out" in words else None
            if out and work.resolve() in out.resolve().parents:
                shutil.rmtree(out, ignore_errors=True)
            begun = time.monotonic()
            printed = _run([*words, *(["--json"] if number == len(study.commands) - 1 else [])], work)
            record = {**facts, "minutes": (time.monotonic() - begun) / 60, "printed": printed}
            write_text(done, json.dumps(record))
        records.append(record)
    table = json.loads(record["printed"])["table"]
    return Finding(
        study=study,
        caption=table["title"],
        columns=tuple(table["columns"]),
        rows=tuple(map(tuple, table["rows"])),
        minutes=sum(record["minutes"] for record in records),
        provenance=dataclasses.replace(
            Provenance.now(torch.device("cpu")),
            commit=", ".join(dict.fromkeys(record["commit"] for record in records)),
        ),
    )


def _run(words: Sequence[str], folder: Path) -> str:
    """Run a command of ``condense`` in a folder and return what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "condense", *words, "--device", "cpu"]
    return subprocess.run(command, cwd=folder, env=environment, check=True, text=True, stdout=subprocess.PIPE).stdout


def tables(folder: Path) -> list[str]:
    """The lines of a table for each study that ``folder`` has a result of. Columns without an entry are left out."""
    files = [folder / f"{name}.json" for name in read(STUDIES)]
    lines = []
    for file in filter(Path.exists, files):
        found = harness.read(Finding, file)
        columns = [column for column in zip(found.columns, *found.rows, strict=True) if {*column[1:]} != {"-"}]
        titles, *rows = zip(*columns, strict=True)
        lines += [f"### {found.study.title}", "", f"{found.caption}:", ""]
        lines += [*harness.table_head(titles), *map(harness.table_line, rows)]
        lines += ["", *(f"    condense {command}" for command in found.study.commands), ""]
        lines += [f"{found.provenance}, {found.minutes:.1f} minutes; seed 0.", ""]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the data")
    parser.add_argument("--only", nargs="+", help="studies")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "studies", help="folder of the runs")
    parser.add_argument("--rows", type=Path, default=ROOT / "results" / "studies", help="folder of the results")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    studies = read(STUDIES)
    for name in chosen.only or studies:
        if name not in studies:
            raise ValueError(f"there is no study {name!r}; {suggest(name, studies)}")
        file = chosen.rows / f"{name}.json"
        if harness.kept(Finding, file, {"study": studies[name]}) is None:
            print(f"{name} ...", flush=True)
            harness.write(measure(studies[name], chosen.folder, chosen.work / name), file)
    print("\n".join(tables(chosen.rows)))


if __name__ == "__main__":
    sys.exit(harness.status("studies", main))
