"""The commands that repeat a run and its results."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from condense.artifacts import DEFAULT_ROOT
from condense.eval.protocol import changed_in
from condense.eval.report.collect import Run
from condense.labelling import OF_LABELS
from condense.synthetic.teaching import Projector, ViewLabels

ENDING = ".safetensors"


def commands(run: Run) -> list[str]:
    """Return the commands that reproduce the run and its results in an empty folder: its recipe, buffers, the
    distillation, the labels of views, and the evaluations with their baselines."""
    data = str(run.record.get("dataset", run.dataset))
    data = data if data == run.dataset else Path(data).name  # a report must not reveal local paths
    buffers: dict[str, dict[str, Any]] = {}
    for used in run.syn.origin.artifacts:
        buffers.setdefault(str(used.get("name")), {}).update(used)
    made, shown = _set(run, data)
    lines = [*(words for used in buffers.values() for words in _buffer(run, data, used)), *made]
    lines += _evaluations(run, shown)
    recipe = [f"cat > recipe.yaml << 'END'\n{recipe_text(run)}END"] if run.is_recorded else []
    return [*recipe, *map(shlex.join, lines)]


def _set(run: Run, data: str) -> tuple[list[list[str]], str]:
    """Return the commands that make the set, and the path at which it then lies."""
    path, labels = run.path.resolve(), run.syn.label_kind
    if run.is_recorded:
        in_folder = path.is_file() and (path.parent / "recipe.yaml").exists()
        shown = path.parent.name if in_folder else path.name.removesuffix(ENDING)
        made = [["condense", "distill", "recipe.yaml", "--dataset", data, "--out", shown]]
    elif run.method.startswith("imported:"):
        shown = path.name
        made = [_import(run, data, shown)]
    else:
        return [], path.name
    if not isinstance(labels, ViewLabels):
        return made, shown
    labelled = f"-{labels.name}{ENDING}"
    file = f"{shown}/synthetic{labelled}" if run.is_recorded else shown.removesuffix(ENDING) + labelled
    return [*made, _relabel(run, labels, data, shown)], file


def _with_path(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of a protocol with a recorded teacher, FOLDER@HASH, as the folder of its buffer."""
    folder, at, _ = str(fields.get("teacher", "")).partition("@")
    return {**fields, "teacher": f"{DEFAULT_ROOT}/{folder}"} if at else dict(fields)


def _evaluations(run: Run, shown: str) -> list[list[str]]:
    asked: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in run.own_results:
        asked.setdefault((row["protocol"], row["protocol_hash"], row["n"], row["seed"]), []).append(row)
    baselines = [row for row in run.results if row["synthetic_sha256"] != run.sha256]
    commands = []
    for (protocol, _, n, seed), rows in asked.items():
        networks = [row["network"] for row in rows]
        name = protocol.removesuffix("*")
        options = ["--num-seeds", str(n), "--protocol", name, "--seed", str(seed)]
        options += _flags("--protocol.", _with_path(changed_in(rows[0])))
        beside = [
            row
            for row in baselines
            if (row["n"], row["seed"]) == (n, seed)
            and row["network"] in networks
            and (row["synthetic_sha256"] is None or _is_beside(row, rows[0]))
        ]
        by_budget: dict[str, dict[str, None]] = {"images": {}}
        for row in beside:
            same = row["synthetic_sha256"] is None or row["num_images"] == run.ipc * run.syn.origin.num_classes
            by_budget.setdefault("images" if same or run.syn.origin.fraction else "bytes", {})[row["method"]] = None
        for budget, methods in by_budget.items():
            words = ["--baselines", *methods] if methods else []
            words += ["--budget", budget] if budget != "images" else []
            commands.append(["condense", "evaluate", shown, "--networks", *networks, *options, *words])
    return commands


def _is_beside(baseline: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether a baseline was evaluated under the protocol of a set: under ``own`` that is its own one, and soft labels
    are kept."""
    name, asked = row["protocol"].removesuffix("*"), changed_in(row)
    if baseline["protocol"].removesuffix("*") != name:
        return False
    return name == "own" or changed_in(baseline) in (asked, {**asked, "labels": "own"})


def recipe_text(run: Run) -> str:
    """Return the recipe of a run as YAML."""
    return yaml.safe_dump(json.loads(json.dumps(dict(run.syn.origin.recipe))), sort_keys=False)


PUBLISHED = "PUBLISHED"
"""Stands for the published file of an imported set, whose name is not recorded."""


def _import(run: Run, data: str, target: str) -> list[str]:
    origin, decode = run.syn.origin, run.syn.decode
    words = ["condense", "import", PUBLISHED, target, "--dataset", data, "--transform", origin.transform_name]
    words += ["--decode", decode.name, *_flags("--decode.", _given(dataclasses.asdict(decode)))]
    return [*words, "--name", run.method.removeprefix("imported:")]


def _relabel(run: Run, labels: ViewLabels, data: str, target: str) -> list[str]:
    names = [_folder(used) for used in run.syn.origin.artifacts if used.get("use") == OF_LABELS]
    words = ["condense", "relabel", target, "--labels", labels.name]
    if isinstance(labels, Projector):
        words += ["--weak-teachers", *names[-1:], "--dataset", data]
        names = names[:-1]
    usual = type(labels)()
    fields = (field.name for field in dataclasses.fields(labels) if field.name not in ("teacher", "network"))
    changed = {name: value for name in fields if (value := getattr(labels, name)) != getattr(usual, name)}
    return [*words, "--teacher", *names, *_flags("--labels.", changed)]


def _folder(used: Mapping[str, Any]) -> str:
    """Return the default folder of a buffer, or the name of an encoder of open_clip."""
    name = str(used.get("name", ""))
    return name.rpartition("@")[0] if used.get("kind") == "open_clip" else str(DEFAULT_ROOT / name)


def _buffer(run: Run, data: str, used: Mapping[str, Any]) -> list[list[str]]:
    """Return the command that builds a buffer of the recorded extent with the recorded settings; nothing for other
    artifacts."""
    if used.get("kind") not in ("trajectories", "networks"):
        return []
    origin = run.syn.origin
    plan = used.get("plan", run.record.get("buffers", {}).get(used.get("name")))
    words = ["condense", "buffer", "--dataset", data, "--network", str(used.get("network", run.network))]
    words += ["--transform", origin.transform_name] if origin.transform_name != "channel" else []
    if origin.split.val_fraction:
        words += ["--split.val-fraction", str(origin.split.val_fraction), "--split.seed", str(origin.split.seed)]
    words += ["--num-experts", str(used.get("num_experts", used.get("num_networks", 1)))]
    words += ["--num-epochs", str(used["num_epochs"])] if "num_epochs" in used else []
    words += ["--keep", "last"] if used["kind"] == "networks" else []
    return [words + _flags("--", _given(plan) if isinstance(plan, Mapping) else {})]


def _flags(prefix: str, fields: Mapping[str, Any]) -> list[str]:
    """Return the flags that set fields."""
    words = []
    for name, value in fields.items():
        flag = f"{prefix}{name.replace('_', '-')}"
        words += _flags(f"{flag}.", value) if isinstance(value, Mapping) else [flag, *_words(value)]
    return words


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that are not None."""
    nested = {name: _given(value) if isinstance(value, Mapping) else value for name, value in fields.items()}
    return {name: value for name, value in nested.items() if value is not None}


def _words(value: Any) -> list[str]:
    """Return the words of a value after its flag."""
    return [word for item in value for word in _words(item)] if isinstance(value, list | tuple) else [str(value)]
