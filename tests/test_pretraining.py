"""Networks trained once and read from the cache after that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from condense import api, plugins, pretraining
from condense.artifacts import TrainedNetworks, Trajectories
from condense.compute import Compute
from condense.data.datasets import Arrays
from condense.eval import teachers
from condense.eval.protocol import PROTOCOLS
from condense.networks import Functional, Weights
from condense.networks.base import InputShape
from condense.pretraining import pretrained
from condense.rng import Rng
from condense.task import Split, Task
from condense.train import Trainer, Training
from tests.conftest import TINY

PLAN = Training(num_epochs=3, batch_size=12)
BATCH_NORM = f"{TINY},norm=batch"


def train(task: Task, cache: Path | None, *, plan: Training = PLAN, seed: int = 0, **more: Any) -> Weights:
    rng = Rng(seed)
    return pretrained(task, plan, Compute(compile=False), task.network.init(rng, "network"), rng, cache=cache, **more)


def plainly(task: Task, on_epoch: Callable[[int, Weights], None] | None = None) -> Weights:
    trainer, rng = Trainer(task.network, PLAN, Compute(compile=False)), Rng(0)
    source = trainer.source(task.train.images, task.train.labels, rng)
    return trainer.run(task.network.init(rng, "network"), source, on_epoch=on_epoch)


def tensors(weights: Weights) -> dict[str, Tensor]:
    return {name: tensor.clone() for part in weights for name, tensor in part.items()}


def same(one: Weights, other: Weights) -> bool:
    ours, theirs = tensors(one), tensors(other)
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours
    )


def buffer_in(cache: Path) -> Path:
    """The buffer of the one network in a cache."""
    (manifest,) = (cache / "networks").glob("*/*/manifest.json")
    return manifest.parent


@pytest.fixture
def task(tiny: Arrays) -> Task:
    return api.plain_task(tiny, BATCH_NORM, "channel", Split(val_fraction=0.0))


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def forbid() -> None:
        def run(*_: Any, **__: Any) -> None:
            raise AssertionError("a network was trained")

        monkeypatch.setattr(Trainer, "run", run)

    return forbid


def test_it_is_the_plain_training_and_the_second_one_is_read(
    task: Task, tmp_path: Path, no_training: Callable[[], None]
) -> None:
    expected = plainly(task)
    assert same(train(task, None), expected) and same(train(task, tmp_path), expected)
    folder = buffer_in(tmp_path)
    assert TrainedNetworks(folder).extent() == {"num_networks": 1}
    no_training()
    assert same(train(task, tmp_path), expected)


def test_every_epoch_is_seen_again(task: Task, tmp_path: Path, no_training: Callable[[], None]) -> None:
    expected, seen = list[tuple[int, dict[str, Tensor]]](), list[tuple[int, dict[str, Tensor]]]()
    plainly(task, lambda epochs, weights: expected.append((epochs, tensors(weights))))
    train(task, tmp_path, on_epoch=lambda *_: None)
    folder = buffer_in(tmp_path)
    assert Trajectories(folder).extent() == {"num_experts": 1, "num_epochs": 3}
    no_training()
    train(task, tmp_path, on_epoch=lambda epochs, weights: seen.append((epochs, tensors(weights))))
    assert [epochs for epochs, _ in seen] == [epochs for epochs, _ in expected] == [1, 2, 3]
    for (_, one), (_, other) in zip(seen, expected, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_decides_the_weights_decides_the_entry(
    task: Task, tiny: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(task, tmp_path)
    train(task, tmp_path, seed=1)
    train(task, tmp_path, plan=Training(num_epochs=3, batch_size=6))
    train(api.plain_task(tiny, BATCH_NORM, "none", Split(val_fraction=0.0)), tmp_path)
    train(api.plain_task(tiny, BATCH_NORM, "channel", Split(val_fraction=0.25)), tmp_path)
    initial = task.network.init(Rng(0), "network")
    for draws in (Rng(1), Rng(1).child("a", 1), Rng(1).child("a", 2)):
        pretrained(task, PLAN, Compute(compile=False), initial, draws, cache=tmp_path)
    monkeypatch.setattr("condense.rng.VERSION", -1)
    train(task, tmp_path)
    assert len(list((tmp_path / "networks").iterdir())) == 9


@pytest.mark.parametrize("damaged", ["manifest.json", "expert_0000.safetensors"])
@pytest.mark.parametrize("kept", [0, 60, -4])
def test_a_damaged_entry_is_written_anew(damaged: str, kept: int, task: Task, tmp_path: Path) -> None:
    expected = train(task, tmp_path)
    folder = buffer_in(tmp_path)
    whole = (folder / damaged).read_bytes()
    (folder / damaged).write_bytes(whole[:kept])
    assert same(train(task, tmp_path), expected)
    assert same(TrainedNetworks(folder).weights(0, task.network), expected)


def test_a_cache_that_cannot_be_written_is_done_without(task: Task, tmp_path: Path) -> None:
    (tmp_path / "networks").touch()
    with pytest.warns(UserWarning, match="nothing more is cached"):
        assert same(train(task, tmp_path), plainly(task))


def test_what_would_take_too_much_room_is_not_cached(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining, "MOST_CACHED", 4 * 2 * task.network.num_params)
    seen: list[int] = []
    train(task, tmp_path, on_epoch=lambda epochs, _: seen.append(epochs))
    assert seen == [1, 2, 3] and not (tmp_path / "networks").exists()
    train(task, tmp_path)
    assert (tmp_path / "networks").exists()


def test_a_network_without_a_name_is_not_cached(tiny: Arrays, tmp_path: Path) -> None:
    """The name of a callable does not say its code."""

    def factory(input_shape: InputShape, num_classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

    task = api.plain_task(tiny, "mlp", "channel", Split(val_fraction=0.0))
    task = replace(task, network=Functional(factory, (1, 8, 8), 3))
    assert same(train(task, tmp_path), plainly(task)) and not (tmp_path / "networks").exists()


def test_a_network_of_another_package_is_trained_again_after_its_code_changed(
    tiny: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, cache = tmp_path / "condense_flat.py", tmp_path / "cache"
    module.write_text("from condense.networks.mlp import MLP\n\nclass Flat(MLP):\n    scale = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    entries = {"condense.networks": [EntryPoint("flat", "condense_flat:Flat", "condense.networks")]}
    monkeypatch.setattr(plugins, "entry_points", lambda group: entries.get(group, []))
    task = api.plain_task(tiny, "flat", "channel", Split(val_fraction=0.0))
    train(task, cache)
    train(task, cache)
    assert len(list((cache / "networks").iterdir())) == 1
    module.write_text(module.read_text().replace("scale = 1", "scale = 2"))
    plugins._source_hash.cache_clear()  # as in a new process
    train(task, cache)
    assert len(list((cache / "networks").iterdir())) == 2


@pytest.mark.parametrize("keep", ["last", "all"])
def test_a_training_of_no_epochs_returns_the_initial_weights(keep: str, task: Task, tmp_path: Path) -> None:
    seen: list[int] = []
    on_epoch = (lambda epochs, weights: seen.append(epochs)) if keep == "all" else None
    initial = task.network.init(Rng(0), "network")
    assert same(train(task, tmp_path, plan=Training(num_epochs=0), on_epoch=on_epoch), initial) and not seen


def test_the_teacher_of_an_evaluation(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its keys are those with which the recorded accuracies were measured."""
    plan = PROTOCOLS["full-data"]
    rng = Rng(4).child("teacher", task.network.name)
    trainer = Trainer(task.network, plan, Compute().resolved(1e6, task.device))
    initial = task.network.init(rng, "weights")
    expected = trainer.run(initial, trainer.source(task.train.images, task.train.labels, rng.child("training")))
    for _ in range(2):
        assert same(teachers.trained(task, seed=4, compute=Compute(), cache=tmp_path).weights, expected)
