"""Every kind of file, damaged at random and sealed again, is either taken or refused in one line."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import yaml

from condense import labelling, recipe, runs, show
from condense.artifacts import Trajectories, TrajectorySpec, find
from condense.eval import results
from condense.eval.journal import Cell, Journal
from condense.eval.metrics import Scores
from condense.eval.protocol import own
from condense.eval.report.collect import collect
from condense.method import Context
from condense.objective import KL
from condense.rng import Rng
from condense.sources import Examples
from condense.synthetic import Codec, Decode, Online, Patches, Projector, Stored, SyntheticSet, ViewLabels, load, save
from condense.synthetic.teaching import LiveTeacher
from condense.tracking import cut_back, read_log
from tests import mutations
from tests.test_engine import Shrink, ctx, run

OLD = Path(__file__).parent / "fixtures" / "v0_1"
TIMES = 120

__all__ = ["ctx"]


def taken_or_refused(action: Callable[[], Any], what: str) -> bool:
    """Whether it was taken; any error but a ``ValueError`` of one line fails the test."""
    try:
        with warnings.catch_warnings(action="ignore"):
            action()
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000 and str(error).isprintable(), what
        return False
    except Exception as error:
        raise AssertionError(f"{what}: {error!r}") from error
    return True


def mutated_text(text: str, rng: Random) -> bytes:
    """JSON, changed as bytes three times in ten and else value by value."""
    if rng.random() < 0.3:
        return mutations.mutate_bytes(text.encode(), rng)
    return json.dumps(mutations.mutate_json(json.loads(text), rng)).encode()


def use(syn: SyntheticSet) -> None:
    """What is done with a set, but training."""
    syn()
    syn.cost(), syn.origin.method, syn.ipc, syn.origin.dataset["fingerprint"][:12]
    assert len(syn.index_of(0)) <= len(syn)
    for action in (lambda: own(syn), lambda: syn.to_dataset("pixels")):
        taken_or_refused(action, "use")


SETS = sorted(OLD.glob("*.safetensors"))
VIEW_LABELS = (
    Stored(epochs=2, batch_size=2, augment="crop_flip:flips=true"),
    Stored(epochs=4, keep=0.5, precision="int8", top_k=1, augment="none"),
    Online(network="convnet:depth=1,width=4"),
    Online(network="convnet:depth=1,width=4", keep_weights=False),
    Projector(network="convnet:depth=1,width=4", rank=2, augment="none"),
    Projector(network="convnet:depth=1,width=4", rank=2, augment="none", keep_encoder=False),
)


def test_sets(tmp_path: Path) -> None:
    taken = 0
    for i in range(2 * TIMES):
        rng, file, target = Random(i), SETS[i % len(SETS)], tmp_path / "set.safetensors"
        mutate = mutations.mutate_bytes if rng.random() < 0.2 else mutations.mutate_tensors
        target.write_bytes(mutate(file.read_bytes(), rng))
        taken += taken_or_refused(lambda: use(load(target)), f"{file.name}, {i}")  # noqa: B023
    assert 0 < taken < TIMES


@pytest.mark.parametrize("kind", VIEW_LABELS, ids=str)
def test_sets_whose_views_are_labelled(kind: ViewLabels, tmp_path: Path) -> None:
    taken, target = 0, tmp_path / "set.safetensors"
    syn = load(SETS[0])
    save(SyntheticSet(syn.latents, syn.classes, syn.origin, decode=syn.decode, label_kind=kind), target)
    good = target.read_bytes()
    assert load(target).label_kind == kind

    def train(syn: SyntheticSet) -> None:
        images, targets = syn()
        source = Examples(images.detach(), targets, Rng(0), batch_size=2, num_classes=syn.origin.num_classes)
        assert len(syn.provider.source(source, KL(), lambda x: x.new_ones(len(x), 3)).batch(1, 0).targets)
        if isinstance(syn.provider, LiveTeacher) and syn.label_kind == kind and not kind.is_named:
            labelling.teacher_of(syn, tmp_path, torch.device("cpu"))

    for i in range(TIMES):
        rng = Random(i)
        mutate = mutations.mutate_bytes if rng.random() < 0.2 else mutations.mutate_tensors
        target.write_bytes(mutate(good, rng))
        taken += taken_or_refused(lambda: (use(made := load(target)), train(made)), f"{kind.name}, {i}")
    assert 0 < taken < TIMES


@pytest.mark.parametrize(
    "decode",
    [Codec(images=1, context=4, context_layers=1, width=3, fit_steps=2), Patches(patch=2, drop=0.5)],
    ids=lambda decode: decode.name,
)
def test_sets_in_an_entropy_code_or_in_patches(decode: Decode, tmp_path: Path) -> None:
    taken, target = 0, tmp_path / "set.safetensors"
    made = load(SETS[0])
    images, classes = made()[0].detach(), made.classes
    decoder = decode.build(made.origin.input_shape, made.origin.num_classes)
    latents = decode.encode(images, classes, decoder, torch.Generator())
    save(SyntheticSet(latents, classes, made.origin, decode=decode, decoder=decoder).finished(), target)
    good = target.read_bytes()
    for i in range(TIMES):
        rng = Random(i)
        mutate = mutations.mutate_bytes if rng.random() < 0.2 else mutations.mutate_tensors
        target.write_bytes(mutate(good, rng))
        taken += taken_or_refused(lambda: use(load(target)), f"{decode.name}, {i}")
    assert 0 < taken < TIMES


def test_checkpoints(ctx: Context, tmp_path: Path) -> None:
    method = Shrink(num_steps=2, optim=dataclasses.replace(Shrink().optim, momentum=0.5))
    run(method, ctx, tmp_path)
    good, target = (tmp_path / "checkpoint.safetensors").read_bytes(), tmp_path / "checkpoint.safetensors"
    for i in range(TIMES):
        rng = Random(i)
        (tmp_path / "checkpoint.previous.safetensors").unlink(missing_ok=True)
        mutate = mutations.mutate_bytes if rng.random() < 0.2 else mutations.mutate_tensors
        target.write_bytes(mutate(good, rng))
        taken_or_refused(lambda: run(method, ctx, tmp_path, resume=True), str(i))


def test_buffers(tmp_path: Path) -> None:
    shutil.copytree(OLD / "buffer", tmp_path / "buffer")
    manifest, expert = tmp_path / "buffer" / "manifest.json", tmp_path / "buffer" / "expert_0000.safetensors"
    text, data = manifest.read_text(), expert.read_bytes()
    spec = TrajectorySpec({"network": "convnet:depth=1,width=4"}, num_epochs=2)

    def read() -> None:
        buffer = Trajectories(find(tmp_path, spec, "tiny"))
        for epoch in range(3):
            assert len(buffer.snapshot(0, epoch)) == 6
        show.show(tmp_path / "buffer")

    for i in range(TIMES):
        rng = Random(i)
        changed = mutations.mutate_json(json.loads(text), rng)
        manifest.write_bytes(mutations.reseal_manifest(changed).encode() if i % 4 else mutated_text(text, rng))
        taken_or_refused(read, f"manifest {i}")
        taken_or_refused(lambda: show.show(tmp_path / "buffer"), f"manifest {i}")
    manifest.write_text(text)
    for i in range(TIMES):
        rng = Random(i)
        expert.write_bytes((mutations.mutate_expert if i % 4 else mutations.mutate_bytes)(data, rng))
        taken_or_refused(read, f"expert {i}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(OLD / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["evaluation.json", "apply-continual.json", "run.json", "log.jsonl"])
def test_files_of_a_run(name: str, folder: Path, tmp_path: Path) -> None:
    text = (folder / name).read_text()
    for i in range(TIMES // 2):
        rng = Random(i)
        content = mutations.mutate_bytes(text.encode(), rng) if name == "log.jsonl" else mutated_text(text, rng)
        (folder / name).write_bytes(content)
        taken_or_refused(lambda: show.show(folder), f"show {i}")
        taken_or_refused(lambda: collect(folder), f"collect {i}")
        runs.source_of(folder, "")
        if name == "log.jsonl":
            taken_or_refused(lambda: (cut_back(folder / name, 1), read_log(folder / name)), f"log {i}")
        if name == "evaluation.json":
            taken_or_refused(lambda: results.merge(folder / name, []), f"merge {i}")


def test_recipes(folder: Path) -> None:
    file = folder / "recipe.yaml"
    text = file.read_text()
    plan = recipe.from_yaml(file)
    for i in range(TIMES // 2):
        rng = Random(i)
        if i % 2:
            file.write_bytes(mutations.mutate_bytes(text.encode(), rng))
        else:
            changed = mutations.mutate_json(yaml.safe_load(text), rng)
            file.write_bytes(yaml.safe_dump(changed, sort_keys=False).encode("utf-8", "replace"))
        taken_or_refused(lambda: runs.claim(folder, plan, runs.written_recipe(folder)), str(i))


def test_journals(tmp_path: Path) -> None:
    scores = Scores.of(torch.eye(3), torch.arange(3))
    journal, key = Journal(tmp_path / "evaluation.json", 0), {"network": "mlp", "num_classes": 3}
    journal.add(key, 0, Cell(scores, 1.0, 2))
    journal.add(key, 1, Cell(scores, 1.0, 2))
    (file,) = tmp_path.glob("*.jsonl")
    assert journal.find(key, 2).keys() == {0, 1}
    lines = file.read_text().splitlines()
    for i in range(TIMES):
        rng = Random(i)
        changed = json.dumps(mutations.mutate_json(json.loads(lines[0]), rng)) if i % 3 else lines[0]
        text = "\n".join([changed, lines[1], ""]).encode()
        file.write_bytes(text if i % 3 else mutations.mutate_bytes(text, rng))
        assert taken_or_refused(lambda: journal.find(key, 2), str(i))
