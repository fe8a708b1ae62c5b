"""Finding and reading artifacts; what a damaged one does."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from condense import teachers
from condense.api import distill, make_buffer
from condense.artifacts import (
    ArtifactSpec,
    BufferWriter,
    TrainedNetworks,
    TrainedNetworkSpec,
    Trajectories,
    TrajectorySpec,
    expert_file,
    find,
    pack,
    read_manifest,
)
from condense.data.datasets import Arrays
from condense.method import Context, Method, State
from condense.networks import Functional, Weights
from condense.task import Task
from tests import mutations
from tests.conftest import TINY, largest_file

IDENTITY = {
    "dataset": "f00d",
    "split": {"val_fraction": 0.1, "seed": 0},
    "transform": {"kind": "channel", "mean": (0.1307,), "std": (1 / 3,)},
    "network": "convnet:depth=1,width=4",
    "seed": 0,
}
NUM_EPOCHS = 3


def snapshots(expert: int) -> list[Weights]:
    gen = torch.Generator().manual_seed(expert)
    return [
        Weights(
            {"conv.weight": torch.randn(2, 3, generator=gen), "conv.bias": torch.randn(2, generator=gen)},
            {"norm.running_mean": torch.randn(2, generator=gen), "norm.num_batches": torch.tensor(epoch)},
        )
        for epoch in range(NUM_EPOCHS + 1)
    ]


def write(root: Path, num_experts: int = 2, **changes: Any) -> Path:
    writer = BufferWriter(root, "digits", IDENTITY | changes, snapshots(0)[0])
    for expert in range(num_experts):
        params, buffers = (
            torch.stack([pack(part) for part in parts]) for parts in zip(*snapshots(expert), strict=True)
        )
        writer.add(expert, params, buffers, {"origin": "trained"})
        writer.save()
    return writer.folder


def wanted(num_experts: int = 1, num_epochs: int = 1, **changes: Any) -> TrajectorySpec:
    open_seed = {key: value for key, value in IDENTITY.items() if key != "seed"}
    return TrajectorySpec(open_seed | changes, num_experts=num_experts, num_epochs=num_epochs)


def opened(folder: Path) -> Trajectories:
    return Trajectories(folder)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def one_line(action: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and "; " in message, "what is wrong: why; what mends it, in one line"
    return message


def test_reads_what_was_written(tmp_path: Path) -> None:
    buffer = opened(write(tmp_path))
    assert (buffer.num_experts, buffer.num_epochs) == (2, NUM_EPOCHS)
    for expert in range(2):
        for epoch, weights in enumerate(snapshots(expert)):
            assert same(buffer.snapshot(expert, epoch), weights.params)
            floats = {name: tensor.float() for name, tensor in weights.buffers.items()}
            assert same(buffer.buffers(expert, epoch), floats)
    start, target = buffer.pair(1, 0, 2)
    assert same(start, snapshots(1)[0].params) and same(target, snapshots(1)[2].params)


def test_equal_buffers_are_equal_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    assert first.name == second.name
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_name_of_the_folder(tmp_path: Path) -> None:
    folder = write(tmp_path)
    assert folder.name.startswith("digits-convnet-depth-1-width-4-")
    assert write(tmp_path, seed=1) != folder
    assert write(tmp_path, num_experts=1) == folder, "the extent is no part of the identity"


def test_find(tmp_path: Path) -> None:
    folder = write(tmp_path)
    assert find(tmp_path, wanted(num_experts=2, num_epochs=NUM_EPOCHS), "digits") == folder
    assert find(folder, wanted(), "digits") == folder, "the root may be the buffer"
    other = write(tmp_path, dataset="beef")
    assert find(tmp_path, wanted(), "digits") == folder
    assert find(tmp_path, wanted(dataset="beef"), "digits") == other


def test_open_keys(tmp_path: Path) -> None:
    folder = write(tmp_path, training={"lr": 0.01, "momentum": 0.0})
    assert find(tmp_path, wanted(training={"lr": 0.01}), "digits") == folder
    assert "training.lr is 0.01, not 0.1" in one_line(lambda: find(tmp_path, wanted(training={"lr": 0.1}), "digits"))


@pytest.mark.parametrize(
    ("spec", "difference"),
    [
        (wanted(dataset="beef"), 'dataset is "f00d", not "beef"'),
        (wanted(network="mlp"), 'network is "convnet:depth=1,width=4", not "mlp"'),
        (wanted(split={"val_fraction": 0.0, "seed": 0}), "split.val_fraction is 0.1, not 0.0"),
        (wanted(transform={"kind": "none"}), 'transform.kind is "channel", not "none"'),
        (wanted(num_experts=3), "num_experts is 2, less than 3"),
        (wanted(num_epochs=9), "num_epochs is 3, less than 9"),
    ],
)
def test_nothing_serves(tmp_path: Path, spec: TrajectorySpec, difference: str) -> None:
    write(tmp_path)
    message = one_line(lambda: find(tmp_path, spec, "digits"))
    assert difference in message
    assert f"`{spec.command('digits')} --out {tmp_path}`" in message


def test_nothing_there(tmp_path: Path) -> None:
    message = one_line(lambda: find(tmp_path / "absent", wanted(), "digits"))
    assert "there are none" in message and "build them with `condense buffer" in message


def test_data_at_hand_are_no_word_of_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "build them with make_buffer in Python" in one_line(lambda: find(tmp_path, wanted(), "data.npz"))
    (tmp_path / "data.npz").touch()
    assert "build them with `condense buffer" in one_line(lambda: find(tmp_path, wanted(), "data.npz"))


def test_command() -> None:
    zca = {"kind": "zca", "flavour": "relative"}
    spec = wanted(num_experts=5, num_epochs=7, transform=zca)
    assert spec.command("my data.npz").split(" --") == [
        "condense buffer",
        "dataset 'my data.npz'",
        "network convnet:depth=1,width=4",
        "transform zca-relative",
        "split.val-fraction 0.1",
        "split.seed 0",
        "num-experts 5",
        "num-epochs 7",
    ]


def test_several_serve(tmp_path: Path) -> None:
    folders = [write(tmp_path), write(tmp_path, seed=1)]
    message = one_line(lambda: find(tmp_path, wanted(), "digits"))
    assert "buffers" in message and all(folder.name in message for folder in folders)
    assert find(folders[1], wanted(), "digits") == folders[1]


def last(root: Path, num_networks: int = 1, num_epochs: int = 5, **changes: Any) -> Path:
    """A buffer of the last epoch of ``snapshots``."""
    identity = IDENTITY | {"keep": "last", "num_epochs": num_epochs} | changes
    writer = BufferWriter(root, "digits", identity, snapshots(0)[0], "last")
    for index in range(num_networks):
        params, buffers = (pack(part)[None] for part in snapshots(index)[-1])
        writer.add(index, params, buffers, {"origin": "trained"}, num_epochs)
    writer.save()
    return writer.folder


def networks_like(num_networks: int = 1, num_epochs: int = 1, **changes: Any) -> TrainedNetworkSpec:
    return TrainedNetworkSpec(wanted(**changes).identity, num_networks=num_networks, num_epochs=num_epochs)


def test_networks_are_found_by_architecture_number_and_training(tmp_path: Path) -> None:
    folder = last(tmp_path, 2, training={"lr": 0.1})
    other = last(tmp_path, network="mlp", training={"lr": 0.1})
    assert find(tmp_path, networks_like(2, 5), "digits") == folder
    assert find(tmp_path, networks_like(network="mlp", training={"lr": 0.1}), "digits") == other
    for spec, difference in (
        (networks_like(3), "num_experts is 2, less than 3"),
        (networks_like(1, 6), "num_epochs is 5, less than 6"),
        (networks_like(training={"lr": 0.2}), "training.lr is 0.1, not 0.2"),
        (wanted(), "only the last epoch is stored"),
    ):
        message = one_line(lambda spec=spec: find(tmp_path, spec, "digits"))  # type: ignore[misc]
        assert difference in message and f"`{spec.command('digits')} --out {tmp_path}`" in message


def test_the_end_of_a_trajectory_serves_as_a_network(tmp_path: Path) -> None:
    folder = write(tmp_path)
    found = networks_like(2, NUM_EPOCHS).open(find(tmp_path, networks_like(2, NUM_EPOCHS), "digits"))
    assert isinstance(found, Trajectories) and found.folder == folder
    assert found.describe() == {
        "kind": "trajectories",
        "name": folder.name,
        "num_experts": 2,
        "num_epochs": NUM_EPOCHS,
    }
    alone = last(tmp_path / "last", 2)
    assert networks_like().open(alone).describe() == {"kind": "networks", "name": alone.name, "num_networks": 2}


def test_imported_networks_serve_where_their_training_is_open(tmp_path: Path) -> None:
    folder = last(tmp_path, num_epochs=0, origin="imported")
    assert find(tmp_path, networks_like(1, 20), "digits") == folder
    assert "training is null" in one_line(lambda: find(tmp_path, networks_like(training={"lr": 0.1}), "digits"))


def test_command_of_networks() -> None:
    spec = networks_like(4, 20, training={"lr": 0.1, "schedule": {"kind": "cosine", "warmup_steps": 5}})
    assert spec.command("digits").split(" --")[1:] == [
        "dataset digits",
        "network convnet:depth=1,width=4",
        "split.val-fraction 0.1",
        "split.seed 0",
        "lr 0.1",
        "schedule.kind cosine",
        "schedule.warmup-steps 5",
        "num-experts 4",
        "num-epochs 20",
        "keep last",
    ]


def test_networks_of_another_architecture_are_refused(tmp_path: Path) -> None:
    networks = networks_like().open(last(tmp_path))
    message = one_line(lambda: networks.weights(0, Functional("mlp:width=4", (1, 8, 8), 3)))
    assert "cannot label" not in message and "holds networks other than mlp:width=4" in message


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_truncated_network(kept: int, tmp_path: Path) -> None:
    path = last(tmp_path) / expert_file(0)
    path.write_bytes(path.read_bytes()[:kept])
    assert str(path) in one_line(lambda: TrainedNetworks(path.parent)._read("params", 0, (0,)))


@dataclass(frozen=True, kw_only=True)
class Taught(Method):
    """Needs two teachers of another architecture, and experts; labels real images by the mean of the teachers."""

    teachers: tuple[str, ...] = ("mlp", "mlp", "same")

    def needs(self, task: Task) -> Mapping[str, ArtifactSpec]:
        return {**teachers.needed(self.teachers, task), "experts": TrajectorySpec(task.identity(), num_epochs=3)}

    def init(self, ctx: Context) -> State:
        assert isinstance(ctx.artifacts["experts"], Trajectories)
        first, second, same = teachers.opened(self.teachers, ctx)
        assert not all(map(torch.equal, first.weights.params.values(), second.weights.params.values()))
        assert same.network is ctx.task.network
        images, classes = ctx.initial("real")
        logits = torch.stack([teacher.labeller(ctx.compute)(images) for teacher in (first, second, same)])
        assert (logits.mean(0).argmax(1) == classes).all()
        return State(syn=ctx.new_set(images, classes))

    def step(self, ctx: Context, state: State, step: int) -> dict[str, float]:
        return {}


def test_a_method_may_ask_for_two(tiny: Arrays, tiny_buffer: Path, tmp_path: Path) -> None:
    run: dict[str, Any] = {"dataset": tiny, "network": TINY, "ipc": 1, "device": "cpu", "buffers": tmp_path / "buffers"}
    shutil.copytree(tiny_buffer, run["buffers"] / tiny_buffer.name)
    message = one_line(lambda: distill(Taught(), out=tmp_path / "run", **run))
    assert message.startswith("no networks for tiny") and "--network mlp" in message and "--keep last" in message
    teacher = make_buffer(
        tiny, "mlp", num_experts=2, num_epochs=9, lr=0.1, batch_size=12, keep="last", out=run["buffers"], device="cpu"
    )
    syn = distill(Taught(), out=tmp_path / "run", **run)
    assert [(used["kind"], used["name"]) for used in syn.origin.artifacts] == [
        ("networks", teacher.name),
        ("trajectories", tiny_buffer.name),
        ("trajectories", tiny_buffer.name),
    ]


def test_a_row_is_read_without_the_others(tmp_path: Path) -> None:
    """The bytes of every other row may be garbage: only who reads them is told."""
    folder = write(tmp_path)
    path = folder / expert_file(0)
    content = bytearray(path.read_bytes())
    rows = [pack(weights.params).numpy().tobytes() for weights in snapshots(0)]
    for row in (0, 1):
        start = content.index(rows[row])
        content[start : start + len(rows[row])] = bytes(len(rows[row]))
    path.write_bytes(content)
    buffer = opened(folder)
    first, second = buffer.pair(0, 2, 3)
    assert same(first, snapshots(0)[2].params) and same(second, snapshots(0)[3].params)
    assert f"{path} is damaged" in one_line(lambda: buffer.snapshot(0, 1))
    assert same(buffer.snapshot(1, 1), snapshots(1)[1].params)


def test_any_flipped_byte_is_noticed(tmp_path: Path) -> None:
    folder = write(tmp_path, num_experts=1)
    buffer, path = opened(folder), folder / expert_file(0)
    whole = path.read_bytes()
    expected = buffer.snapshot(0, 1)
    noticed = 0
    for position in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            assert same(buffer.snapshot(0, 1), expected), f"byte {position} changed the row unnoticed"
        except ValueError as error:
            assert "\n" not in str(error)
            noticed += 1
    assert noticed >= 4 * len(pack(expected)) // 3


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_truncated_expert(tmp_path: Path, kept: int) -> None:
    folder = write(tmp_path)
    path = folder / expert_file(0)
    path.write_bytes(path.read_bytes()[:kept])
    assert str(path) in one_line(lambda: opened(folder).snapshot(0, 0))


def test_missing_or_foreign_expert(tmp_path: Path) -> None:
    folder, other = write(tmp_path), write(tmp_path, seed=1)
    shutil.copy(other / expert_file(0), folder / expert_file(0))
    assert "another buffer" in one_line(lambda: opened(folder).snapshot(0, 0))
    (folder / expert_file(0)).unlink()
    assert "there is no file" in one_line(lambda: opened(folder).snapshot(0, 0))


def test_damaged_manifest(tmp_path: Path) -> None:
    folder = write(tmp_path)
    path = folder / "manifest.json"
    text = path.read_text()
    for damaged in ("", text[: len(text) // 2], "[]", "{}", text.replace('"f00d"', '"f00e"'), "\x00"):
        path.write_text(damaged)
        assert "damaged" in one_line(lambda: read_manifest(folder))
        assert "damaged" in one_line(lambda: find(tmp_path, wanted(), "digits"))
    path.unlink()
    assert "manifest.json" in one_line(lambda: read_manifest(folder))


def test_another_format_or_kind(tmp_path: Path) -> None:
    folder = write(tmp_path)
    assert "holds trajectories of format 1, not teachers 1" in one_line(lambda: read_manifest(folder, "teachers"))
    path = folder / "manifest.json"
    path.write_text(mutations.reseal_manifest(json.loads(path.read_text()) | {"format": 2}))
    for read in (lambda: read_manifest(folder), lambda: read_manifest(folder, "trajectories"), lambda: opened(folder)):
        assert "holds trajectories of format 2, not " in one_line(read)


def test_another_layout_is_not_mixed_in(tmp_path: Path) -> None:
    write(tmp_path)
    reshaped = Weights({"conv.weight": torch.zeros(8)}, {})
    assert "another buffer" in one_line(lambda: BufferWriter(tmp_path, "digits", IDENTITY, reshaped))


def test_an_added_expert_is_invisible_until_saved(tmp_path: Path) -> None:
    folder = write(tmp_path, num_experts=1)
    writer = BufferWriter(tmp_path, "digits", IDENTITY, snapshots(0)[0])
    writer.add(1, torch.zeros(4, 8), torch.zeros(4, 3), {})
    assert opened(folder).num_experts == 1
    writer.save()
    assert opened(folder).num_experts == 2


def test_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "choose another folder" in one_line(lambda: write(tmp_path / "file"))


def test_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    writer = BufferWriter(tmp_path, "digits", {"network": "mlp"}, Weights({"w": torch.zeros(5000)}, {}))
    writer.add(0, torch.zeros(2, 5000), torch.zeros(2, 0), {})
    writer.save()
    with largest_file(1 << 16):
        assert one_line(lambda: writer.add(0, torch.ones(9, 5000), torch.zeros(9, 0), {})).startswith("cannot write")
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [expert_file(0), "manifest.json"]
    assert json.loads((folder / "manifest.json").read_text())["num_epochs"] == 1
    assert not opened(folder).snapshot(0, 1)["w"].any()
