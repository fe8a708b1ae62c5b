"""Damaged files: each reader accepts or refuses one in one line, within 20 seconds and two gigabytes."""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import os
import resource
import shutil
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import yaml

from condense import api, artifacts, exchange, recipe, runs, show
from condense.buffers.imported import import_replay_buffers
from condense.data import datasets
from condense.eval.journal import Cell, Journal
from condense.eval.metrics import Scores
from condense.files import read_tensors
from condense.task import Split
from tests.mutations import mutate_bytes, mutate_expert, mutate_json, mutate_tensors, reseal_manifest
from tests.torture.world import TINY, World

BATCH = 100
"""Number of cases that one process reads."""
SECONDS, MEMORY = 20, 2 << 30

Mutate = Callable[[bytes, Random], bytes]


@dataclass(frozen=True)
class Kind:
    """A kind of file, its reader, and the mutations that apply to it besides ``mutate_bytes``."""

    name: str
    file: Path
    read: Callable[[], Any]
    mutate: tuple[Mutate, ...] = ()


def mutations(world: World, seed: int, first: int) -> Iterator[str | None]:
    """Damage one file in one way per case, and read it."""
    folder = world.copy("mutations")
    kinds = _kinds(folder)
    originals = {kind.file: kind.file.read_bytes() for kind in kinds}
    position = mmap.mmap(-1, 8)
    losses = folder.parent / "losses.jsonl"
    while True:
        losses.write_text("")
        for file, data in originals.items():  # a process that ended left one damaged
            file.write_bytes(data)
        position[:] = first.to_bytes(8, "little")
        pid = os.fork()
        if pid == 0:
            _read_batch(kinds, originals, folder, seed, first, position, losses)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        reached = int.from_bytes(position[:], "little")
        losses_by_number = dict(json.loads(line) for line in losses.read_text().splitlines())
        if status:
            cause = f"no answer within {SECONDS} s" if status == -signal.SIGALRM else f"the process ended with {status}"
            losses_by_number[reached] = f"{_drawn(kinds, seed, reached)[1].name}: {cause}"
        for number in range(first, min(reached + 1, first + BATCH)):
            yield losses_by_number.get(number)
        first = min(reached + 1, first + BATCH)


def _drawn(kinds: list[Kind], seed: int, number: int) -> tuple[Random, Kind]:
    rng = Random(f"{seed} mutations {number}")
    return rng, rng.choice(kinds)


def _read_batch(
    kinds: list[Kind],
    originals: dict[Path, bytes],
    folder: Path,
    seed: int,
    first: int,
    position: mmap.mmap,
    losses: Path,
) -> None:
    status = 1
    try:
        in_use = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (in_use + MEMORY, in_use + MEMORY))
        torch.set_num_threads(1)
        os.chdir(folder)
        os.environ["CONDENSE_CACHE"] = str(folder / "cache")
        warnings.showwarning = lambda *_, **__: None
        with open(losses, "a", buffering=1) as lost, contextlib.redirect_stdout(io.StringIO()):
            for number in range(first, first + BATCH):
                position[:] = number.to_bytes(8, "little")
                rng, kind = _drawn(kinds, seed, number)
                mutate = rng.choice((mutate_bytes, *kind.mutate, *kind.mutate))
                kind.file.write_bytes(mutate(originals[kind.file], rng))
                signal.alarm(SECONDS)
                try:
                    kind.read()
                except Exception as error:
                    if type(error) is not ValueError or "\n" in str(error) or not str(error):
                        place = traceback.extract_tb(error.__traceback__)[-1]
                        text = f"{kind.name}: {error!r:.150} in {place.filename}:{place.lineno}"
                        lost.write(json.dumps([number, text]) + "\n")
                finally:
                    signal.alarm(0)
                kind.file.write_bytes(originals[kind.file])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _json(data: bytes, rng: Random) -> bytes:
    return json.dumps(mutate_json(json.loads(data), rng)).encode()


def _lines(data: bytes, rng: Random) -> bytes:
    lines = data.splitlines()
    place = rng.randrange(len(lines))
    return b"\n".join([*lines[:place], _json(lines[place], rng), *lines[place + 1 :]]) + b"\n"


def _manifest(data: bytes, rng: Random) -> bytes:
    return reseal_manifest(mutate_json(json.loads(data), rng)).encode()


def _yaml(data: bytes, rng: Random) -> bytes:
    return json.dumps(mutate_json(yaml.safe_load(data), rng)).encode()  # JSON is YAML


def _pt(data: bytes, rng: Random) -> bytes:
    file = io.BytesIO()
    torch.save(mutate_json(torch.load(io.BytesIO(data), weights_only=True), rng), file)
    return file.getvalue()


def _npz(data: bytes, rng: Random) -> bytes:
    """Remove an array, or change its name, type or shape."""
    with np.load(io.BytesIO(data)) as file:
        arrays = {name: file[name] for name in file.files}
    name, file = rng.choice(list(arrays)), io.BytesIO()
    array = arrays.pop(name)
    kinds = [None, *("f4", "f8", "i1", "i8", "c8", "U3", "?")]
    kind, shape = rng.choice(kinds), rng.choice([array.shape, (-1,), (1, -1), (*array.shape, 1), ()])
    if kind is not None:
        with contextlib.suppress(ValueError):
            array = array.astype(kind)
        if shape:
            arrays[rng.choice((name, name, f"{name}x"))] = array.reshape(shape)
    np.savez(file, **arrays)
    return file.getvalue()


def _kinds(folder: Path) -> list[Kind]:
    """Return the files in ``folder`` and their readers; make the files that do not exist yet."""
    run, buffer = folder / "set", next((folder / "artifacts").iterdir())
    provenance = {"network": "mlp", "num_classes": 3}
    plan, arrays = recipe.from_yaml(run / "recipe.yaml"), datasets.load(folder / "data.npz")
    task = api.plain_task(arrays, TINY, "channel", Split(val_fraction=0.0))
    spec = artifacts.TrajectorySpec({"network": TINY}, num_epochs=2)
    journal = Journal(folder / "evaluation.json", 0)
    cell = Cell(Scores.of(torch.eye(3), torch.arange(3)), 1.0, 1)
    for k in range(2):
        journal.add(provenance, k, cell)
    shutil.copytree(folder / "pictures", folder / "photos" / "train")
    shutil.copytree(folder / "pictures", folder / "photos" / "test")
    for name in ("labels.csv", "origin.json"):
        for part in ("train", "test"):
            (folder / "photos" / part / name).unlink()
    images, labels = torch.rand(3, 1, 8, 8), torch.arange(3)
    torch.save({"data": [[images, labels]], "accs_all_exps": {"ConvNet": [0.5]}}, folder / "res.pt")
    torch.save([images, labels], folder / "pair.pt")
    torch.save(images, folder / "images_best.pt")
    torch.save(labels, folder / "labels_best.pt")
    experts = [[[torch.randn(shape) for shape in task.network.shapes.values()] for _ in range(2)]]
    torch.save(experts, folder / "replay_buffer_0.pt")
    shutil.copytree(run, folder / "stopped")
    (folder / "stopped" / "checkpoint.previous.safetensors").unlink(missing_ok=True)

    def read_buffer() -> None:
        experts = artifacts.Trajectories(artifacts.find(folder / "artifacts", spec, "data"))
        experts.pair(0, 0, experts.num_epochs)
        show.show(buffer)

    def read_run() -> None:
        show.show(run)
        api.open_set(run)

    def read_page() -> None:
        api.report([run], folder / "page.html")

    def read_recipe() -> None:
        recipe.from_yaml(run / "recipe.yaml")
        runs.claim(run, plan, runs.written_recipe(run))

    def resume() -> None:
        shutil.rmtree(folder / "resumed", ignore_errors=True)
        shutil.copytree(folder / "stopped", folder / "resumed")
        api.run(plan, api.RunOptions(out=folder / "resumed", resume=True, device="cpu"), arrays=arrays)

    def import_experts() -> None:
        shutil.rmtree(folder / "imported", ignore_errors=True)
        import_replay_buffers(folder / "replay_buffer_0.pt", folder / "imported", task)

    def grow() -> None:
        artifacts.identities(folder / "artifacts", "trajectories", {"network": TINY})
        read_buffer()

    picture = next((folder / "pictures").rglob("*.png"))
    photo = next((folder / "photos" / "train").rglob("*.png"))
    quick = [
        Kind("set", run / "synthetic.safetensors", lambda: api.load(run), (mutate_tensors,)),
        Kind("checkpoint", run / "checkpoint.safetensors", lambda: _checkpoint(run), (mutate_tensors,)),
        Kind("manifest", buffer / "manifest.json", grow, (_manifest, _json)),
        Kind("expert", buffer / "expert_0000.safetensors", read_buffer, (mutate_expert,)),
        Kind("evaluation.json", run / "evaluation.json", read_run, (_json,)),
        Kind("journal", folder / "evaluation.cells.rank0.jsonl", lambda: journal.find(provenance, 2), (_lines,)),
        Kind("apply-continual.json", run / "apply-continual.json", read_run, (_json,)),
        Kind("log", run / "log.jsonl", read_run, (_lines,)),
        Kind("run.json", run / "run.json", read_run, (_json,)),
        Kind("recipe.yaml", run / "recipe.yaml", read_recipe, (_yaml,)),
        Kind("npz", folder / "data.npz", lambda: datasets.load(folder / "data.npz"), (_npz,)),
        Kind("photo", photo, lambda: datasets.load(folder / "photos")),
        Kind("published npz", folder / "published.npz", lambda: exchange.read(folder / "published.npz"), (_npz,)),
        Kind("published picture", picture, lambda: exchange.read(folder / "pictures")),
        Kind("res.pt", folder / "res.pt", lambda: exchange.read(folder / "res.pt"), (_pt,)),
        Kind("pair.pt", folder / "pair.pt", lambda: exchange.read(folder / "pair.pt"), (_pt,)),
        Kind("labels_best.pt", folder / "labels_best.pt", lambda: exchange.read(folder / "images_best.pt"), (_pt,)),
        Kind("replay_buffer.pt", folder / "replay_buffer_0.pt", import_experts, (_pt,)),
    ]
    slow = [
        Kind("evaluation.json, in a page", run / "evaluation.json", read_page, (_json,)),
        Kind("apply-continual.json, in a page", run / "apply-continual.json", read_page, (_json,)),
        Kind("log, in a page", run / "log.jsonl", read_page, (_lines,)),
        Kind("checkpoint, resumed", folder / "stopped" / "checkpoint.safetensors", resume, (mutate_tensors,)),
        Kind("log, resumed", folder / "stopped" / "log.jsonl", resume, (_lines,)),
    ]
    return 10 * quick + slow


def _checkpoint(run: Path) -> None:
    read_tensors(run / "checkpoint.safetensors", "checkpoint")
    show.show(run / "checkpoint.safetensors")
