"""Building and importing expert trajectories."""

import json
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from condense.artifacts import TrainedNetworks, Trajectories, TrajectorySpec, find, read_manifest
from condense.augment import Augment
from condense.buffers import trajectories
from condense.buffers.imported import import_replay_buffers
from condense.buffers.trajectories import Experts, build
from condense.compute import Compute
from condense.data.datasets import load
from condense.networks import Functional
from condense.rng import Rng
from condense.schedule import Schedule
from condense.task import Split, Task, make_task
from condense.train import Trainer

NETWORK = "convnet:depth=1,width=4"
PLAN = Experts(num_experts=2, num_epochs=3, lr=0.1, batch_size=16)


def make(network: str = NETWORK, val_fraction: float = 0.25, transform: str = "channel") -> Task:
    gen = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    images = 0.4 * torch.rand(40, 1, 8, 8, generator=gen) + 0.5 * labels[:, None, None, None]
    return make_task(
        load((images, labels)),
        transform=transform,
        split=Split(val_fraction=val_fraction),
        network=Functional(network, (1, 8, 8), 2),
        augment=Augment(("color", "crop", "flip")),
        device=torch.device("cpu"),
    )


@pytest.fixture(scope="module")
def task() -> Task:
    return make()


def made(task: Task, root: Path, plan: Experts = PLAN, **options: Any) -> Path:
    return build(task, plan, root=root, **{"seed": 0, "compute": Compute()} | options)


def opened(folder: Path) -> Trajectories:
    return Trajectories(folder)


def flat(params: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in params.values()])


def content(folder: Path) -> dict[str, Any]:
    """Bytes of the files; the manifest without what a clock says."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = json.loads(files["manifest.json"])
    del manifest["checksum"]
    for expert in manifest["experts"]:
        assert expert.pop("seconds") >= 0
    return files | {"manifest.json": manifest}


class Stop(Exception):
    pass


def stop_at(expert: int, epoch: int) -> dict[str, Any]:
    def progress(current: int, done: int, accuracies: Mapping[str, float]) -> None:
        if (current, done) == (expert, epoch):
            raise Stop

    return {"progress": progress}


def test_snapshots_are_copies(task: Task, tmp_path: Path) -> None:
    """The published code keeps references: on a CPU every snapshot is then the last one."""
    buffer = opened(made(task, tmp_path))
    rows = [flat(buffer.snapshot(e, k)) for e in range(2) for k in range(PLAN.num_epochs + 1)]
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)


def test_trajectory_is_the_training(task: Task, tmp_path: Path) -> None:
    """One full batch an epoch without augmentation: the snapshots are the steps of gradient descent."""
    plain = replace(task, augment=Augment())
    plan = Experts(num_experts=1, num_epochs=2, lr=0.1, batch_size=len(task.train))
    buffer = opened(made(plain, tmp_path, plan))
    for epoch in range(2):
        params = {name: p.requires_grad_() for name, p in buffer.snapshot(0, epoch).items()}
        logits = task.network.logits(params, {}, task.train.images[:])
        loss = torch.nn.functional.cross_entropy(logits, task.train.labels)
        grads = torch.autograd.grad(loss, list(params.values()))
        expected = {name: p - 0.1 * g for (name, p), g in zip(params.items(), grads, strict=True)}
        torch.testing.assert_close(flat(buffer.snapshot(0, epoch + 1)), flat(expected))


def test_manifest(task: Task, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    folder = made(task, tmp_path, progress=lambda expert, epoch, _: seen.append((expert, epoch)))
    assert seen == [(expert, epoch) for expert in range(2) for epoch in range(4)]
    manifest = read_manifest(folder)
    assert manifest["identity"]["seed"] == 0
    assert "num_epochs" not in manifest["identity"]["training"]
    for expert in manifest["experts"]:
        assert expert["origin"] == "trained" and expert["num_epochs"] == 3
        for name in ("train_accuracy", "val_accuracy"):
            assert len(expert[name]) == 4 and expert[name][-1] > 0.9
    no_val = read_manifest(made(make(val_fraction=0.0), tmp_path))
    assert "val_accuracy" not in no_val["experts"][0]


def test_global_generator_is_untouched(task: Task, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    made(task, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("stop", [(0, 2), (1, 0), (1, 3)])
def test_interrupted_build_goes_on(task: Task, tmp_path: Path, stop: tuple[int, int]) -> None:
    whole = made(task, tmp_path / "whole")
    with pytest.raises(Stop):
        made(task, tmp_path / "stopped", **stop_at(*stop))
    visible = list((tmp_path / "stopped").glob("*/expert_*"))
    assert len(visible) == stop[0], "finished experts, and nothing half-written"
    trained: list[int] = []
    resumed = made(task, tmp_path / "stopped", progress=lambda expert, *_: trained.append(expert))
    assert set(trained) == set(range(stop[0], 2))
    assert content(resumed) == content(whole)


def test_grows_in_experts(task: Task, tmp_path: Path) -> None:
    small = made(task, tmp_path / "grown", replace(PLAN, num_experts=1))
    first = (small / "expert_0000.safetensors").stat().st_mtime_ns
    grown = made(task, tmp_path / "grown")
    assert grown == small and (small / "expert_0000.safetensors").stat().st_mtime_ns == first
    assert content(grown) == content(made(task, tmp_path / "whole"))


def test_finished_buffer_is_left_alone(task: Task, tmp_path: Path) -> None:
    folder = made(task, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    made(task, tmp_path)
    made(task, tmp_path, replace(PLAN, num_experts=1, num_epochs=2))
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_grows_in_epochs(task: Task, tmp_path: Path) -> None:
    short = made(task, tmp_path / "grown")
    prefix = [flat(opened(short).snapshot(1, epoch)) for epoch in range(4)]
    longer = replace(PLAN, num_epochs=5)
    with pytest.warns(UserWarning, match="again from scratch"), pytest.raises(Stop):
        made(task, tmp_path / "grown", longer, **stop_at(1, 4))
    assert opened(short).num_epochs == 3, "as many as every expert has"
    assert [expert["num_epochs"] for expert in opened(short).manifest["experts"]] == [5, 3]
    with pytest.warns(UserWarning, match="1 experts"):
        grown = made(task, tmp_path / "grown", replace(longer, num_experts=1))
    buffer = opened(grown)
    assert grown == short and (buffer.num_experts, buffer.num_epochs) == (2, 5)
    assert all(torch.equal(row, flat(buffer.snapshot(1, epoch))) for epoch, row in enumerate(prefix))
    assert content(grown) == content(made(task, tmp_path / "whole", longer))


def test_is_not_shortened(task: Task, tmp_path: Path) -> None:
    folder = made(task, tmp_path)
    before = content(folder)
    with pytest.raises(ValueError, match="give num_epochs=3"):
        made(task, tmp_path, replace(PLAN, num_experts=3, num_epochs=2))
    assert content(folder) == before


def test_a_shorter_build_at_the_same_time_replaces_no_longer_expert(task: Task, tmp_path: Path) -> None:
    def meanwhile(expert: int, epoch: int, _: Mapping[str, float]) -> None:
        if (expert, epoch) == (0, 1):
            made(task, tmp_path / "both")

    folder = made(task, tmp_path / "both", replace(PLAN, num_epochs=1), progress=meanwhile)
    assert content(folder) == content(made(task, tmp_path / "alone"))


def test_a_shorter_build_at_the_same_time_adds_no_shorter_expert(task: Task, tmp_path: Path) -> None:
    def meanwhile(expert: int, epoch: int, _: Mapping[str, float]) -> None:
        if (expert, epoch) == (0, 1):
            made(task, tmp_path / "both")

    with pytest.raises(ValueError, match="would shorten the buffer; give num_epochs=3"):
        made(task, tmp_path / "both", replace(PLAN, num_experts=3, num_epochs=1), progress=meanwhile)
    (folder,) = (tmp_path / "both").iterdir()
    assert content(folder) == content(made(task, tmp_path / "alone"))


@pytest.mark.parametrize("network", [NETWORK, f"{NETWORK},norm=batch"])
def test_the_last_epoch_alone(network: str, tmp_path: Path) -> None:
    """It is the end of the trajectory of the same seed, and its file holds nothing else."""
    task = make(network)
    whole, last = made(task, tmp_path), made(task, tmp_path, replace(PLAN, keep="last"))
    assert whole != last and read_manifest(last)["kind"] == "networks"
    ends, networks = Trajectories(whole), TrainedNetworks(last)
    assert (networks.num_networks, networks.num_epochs) == (2, 3)
    for expert in range(2):
        expected = ends.weights(expert, task.network, epoch=3)
        for one, other in zip(networks.weights(expert, task.network), expected, strict=True):
            assert list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)
        accuracies = (read_manifest(folder)["experts"][expert]["val_accuracy"] for folder in (last, whole))
        assert next(accuracies) == next(accuracies)
        size, snapshots = (folder / f"expert_000{expert}.safetensors" for folder in (last, whole))
        assert size.stat().st_size < snapshots.stat().st_size / 2
    with pytest.raises(ValueError, match="holds networks of format 1, not trajectories"):
        Trajectories(last)


def test_networks_grow_in_number_and_another_length_is_another_buffer(task: Task, tmp_path: Path) -> None:
    plan = replace(PLAN, keep="last")
    small = made(task, tmp_path / "grown", replace(plan, num_experts=1))
    grown = made(task, tmp_path / "grown", plan)
    assert small == grown and content(grown) == content(made(task, tmp_path / "whole", plan))
    longer = made(task, tmp_path / "grown", replace(plan, num_epochs=5))
    assert longer != grown and TrainedNetworks(grown).num_epochs == 3
    with pytest.raises(Stop):
        made(task, tmp_path / "stopped", plan, **stop_at(1, 1))
    assert content(made(task, tmp_path / "stopped", plan)) == content(grown)


def test_deleted_expert_is_trained_again(task: Task, tmp_path: Path) -> None:
    folder = made(task, tmp_path)
    before = content(folder)
    (folder / "expert_0000.safetensors").unlink()
    with pytest.raises(ValueError, match="would shorten the buffer"):
        made(task, tmp_path, replace(PLAN, num_epochs=2))
    assert content(made(task, tmp_path)) == before


def test_a_drop_after_an_epoch_does_not_depend_on_the_extent(task: Task, tmp_path: Path) -> None:
    for epoch in range(1, 30):
        for num_epochs in range(1, 60):
            schedule = Schedule(drop_after=(epoch,))
            training = Experts(schedule=schedule, num_epochs=num_epochs, lr=1.0).training()
            lrs = [training.lr_at(done, 1) for done in range(num_epochs)]
            assert lrs == [1.0 if done < epoch else 0.1 for done in range(num_epochs)]
    plan = replace(PLAN, schedule=Schedule(drop_after=(2,)))
    assert made(task, tmp_path, plan) != made(task, tmp_path)
    with pytest.warns(UserWarning, match="again from scratch"):
        assert made(task, tmp_path, replace(plan, num_epochs=4)) == made(task, tmp_path, plan)


@pytest.mark.parametrize("schedule", [Schedule(cosine_to=0.0), Schedule(drop_at=(0.5,))])
def test_under_a_schedule_that_depends_on_the_length_a_longer_training_is_another_buffer(
    schedule: Schedule, task: Task, tmp_path: Path
) -> None:
    plan = replace(PLAN, num_experts=1, schedule=schedule)
    short, long = (made(task, tmp_path, replace(plan, num_epochs=n)) for n in (2, 3))
    assert short != long and made(task, tmp_path, replace(plan, num_epochs=2, num_experts=2)) == short
    assert [read_manifest(folder)["identity"]["training"]["num_epochs"] for folder in (short, long)] == [2, 3]
    last = [flat(opened(folder).snapshot(0, 2)) for folder in (short, long)]
    assert not torch.equal(*last)


def test_the_identity_of_usual_experts_is_frozen() -> None:
    """It names the folders that users have."""
    usual = {"batch_size": 256, "lr": 0.01, "momentum": 0.0, "weight_decay": 0.0, "loss": "cross-entropy"}
    assert Experts().identity() == usual
    assert Experts(num_epochs=7, cutmix=0.5).identity() == usual | {"cutmix": 0.5}
    dropped = Experts(schedule=Schedule(drop_after=(15,), drop_factor=0.2))
    assert dropped.identity() == usual | {"decay_epoch": 15, "decay": 0.2}
    both = Experts(schedule=Schedule(drop_at=(0.5,), cosine_to=0.1))
    assert both.identity() == usual | {"num_epochs": 20, "decay_at": 0.5, "decay": 0.1, "cosine_to": 0.1}


def test_the_augmentation_of_experts_is_a_field(task: Task, tmp_path: Path) -> None:
    plan = replace(PLAN, num_experts=1, num_epochs=1)
    none = made(task, tmp_path / "a", replace(plan, augment="none"))
    assert none.name == made(replace(task, augment=Augment()), tmp_path / "b", plan).name
    several = made(task, tmp_path / "a", replace(plan, augment="dsa:mode=M"))
    assert read_manifest(several)["identity"]["augment"]["ops"] == list(task.augment.ops)
    assert len({none, several, made(task, tmp_path / "a", plan)}) == 3
    with pytest.raises(ValueError, match="unknown operation 'smear'"):
        made(task, tmp_path, replace(plan, augment="smear"))


def test_experts_are_trained_with_cutmix(task: Task, tmp_path: Path) -> None:
    plan = replace(PLAN, num_experts=1, cutmix=1.0)
    buffer = opened(made(task, tmp_path, plan))
    rng = Rng(0).child("expert", 0)
    trainer = Trainer(task.network, plan.training(), Compute())
    source = trainer.source(task.train.images, task.train.labels, rng, task.augment)
    assert source.batch(0, 0).targets.shape[1:] == (2,), "targets are mixed"
    weights = trainer.run(task.network.init(rng, "initial weights"), source)
    assert torch.equal(flat(buffer.snapshot(0, plan.num_epochs)), flat(weights.params))


@pytest.mark.parametrize(
    "changes",
    [
        {"task": {"network": "convnet:depth=1,width=8"}},
        {"task": {"transform": "none"}},
        {"task": {"val_fraction": 0.0}},
        {"plan": {"momentum": 0.9}},
        {"plan": {"batch_size": 8}},
        {"augment": Augment()},
        {"augment": Augment(("color", "crop", "flip"), mode="M")},
        {"seed": 1},
    ],
)
def test_another_identity_is_another_folder(task: Task, tmp_path: Path, changes: dict[str, Any]) -> None:
    one = replace(PLAN, num_experts=1, num_epochs=1)
    folder = made(task, tmp_path, one)
    other_task = make(**changes["task"]) if "task" in changes else task
    other_task = replace(other_task, augment=changes.get("augment", other_task.augment))
    plan = replace(one, **changes.get("plan", {}))
    other = made(other_task, tmp_path, plan, seed=changes.get("seed", 0))
    assert other != folder and len(list(tmp_path.iterdir())) == 2


def test_experts_of_earlier_draws_are_found_and_not_mixed_with_new_ones(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        identity = trajectories.identity
        earlier.setattr(
            trajectories, "identity", lambda *a: {k: v for k, v in identity(*a).items() if k != "draws"}
        )  # as version 0.1.0 wrote it
        old = made(task, tmp_path, replace(PLAN, num_experts=1))
    assert find(tmp_path, TrajectorySpec(task.identity(), 1, PLAN.num_epochs), task.name) == old
    before = content(old)
    new = made(task, tmp_path)
    assert new != old and content(old) == before and opened(new).num_experts == 2
    assert find(tmp_path, TrajectorySpec(task.identity(), 2, PLAN.num_epochs), task.name) == new


def test_found_by_the_task(task: Task, tmp_path: Path) -> None:
    folder = made(task, tmp_path)
    spec = TrajectorySpec(task.identity(), num_experts=2, num_epochs=3)
    assert find(tmp_path, spec, task.name) == folder
    elsewhere = TrajectorySpec(make(network="mlp").identity())
    with pytest.raises(ValueError, match=r"network is .*--network mlp"):
        find(tmp_path, elsewhere, task.name)


def test_batchnorm_statistics(tmp_path: Path) -> None:
    task = make("convnet:depth=1,width=4,norm=batch")
    buffer = opened(made(task, tmp_path))
    statistics = [buffer.buffers(0, epoch) for epoch in range(4)]
    assert list(statistics[0]) == list(task.network.init(Rng(0), "any").buffers)
    assert not torch.equal(flat(statistics[0]), flat(statistics[3]))
    logits = task.network.logits(buffer.snapshot(0, 3), statistics[3], task.train.images[:], train=False)
    assert (logits.argmax(1) == task.train.labels).float().mean() > 0.9


def test_divergence_writes_nothing(task: Task, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expert 0 .* diverged; give an lr below 1e\+30") as caught:
        made(task, tmp_path, replace(PLAN, lr=1e30))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*/*"))


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"num_experts": 0}, "at least one expert and one epoch, got 0 and 20; give num_experts=10"),
        ({"num_epochs": 0}, "at least one expert and one epoch, got 10 and 0; give num_experts=10"),
        ({"lr": 0.0}, r"a finite lr > 0, got 20, 256 and 0\.0; correct these fields"),
    ],
)
def test_bad_plans(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        Experts(**fields)


# Published replay buffers


def published(task: Task, folder: Path, num_files: int = 2) -> list[list[list[list[Tensor]]]]:
    """Files of two experts as the code of MTT writes them; the first file sorts last as text."""
    gen = torch.Generator().manual_seed(0)
    shapes = list(task.network.shapes.values())
    files = [
        [[[torch.randn(s, generator=gen) for s in shapes] for _ in range(3)] for _ in range(2)]
        for _ in range(num_files)
    ]
    folder.mkdir()
    for number, experts in enumerate(files):
        torch.save(experts, folder / f"replay_buffer_{number + 9}.pt")
    return files


def test_import(task: Task, tmp_path: Path) -> None:
    files = published(task, tmp_path / "mtt")
    with pytest.warns(UserWarning, match="4 experts .* cannot verify"):
        folder = import_replay_buffers(tmp_path / "mtt", tmp_path / "root", task)
    assert find(tmp_path / "root", TrajectorySpec(task.identity(), 4, 2), task.name) == folder
    buffer = opened(folder)
    assert (buffer.num_experts, buffer.num_epochs) == (4, 2)
    assert buffer.manifest["identity"]["origin"] == "imported"
    assert {expert["origin"] for expert in buffer.manifest["experts"]} == {"imported"}
    experts = [expert for file in files for expert in file]
    for number, expert in enumerate(experts):
        for epoch, tensors in enumerate(expert):
            snapshot = buffer.snapshot(number, epoch)
            assert list(snapshot) == list(task.network.shapes)
            assert all(torch.equal(a, b) for a, b in zip(snapshot.values(), tensors, strict=True))


def test_import_of_one_file(task: Task, tmp_path: Path) -> None:
    published(task, tmp_path / "mtt")
    with pytest.warns(UserWarning, match="2 experts"):
        import_replay_buffers(tmp_path / "mtt" / "replay_buffer_10.pt", tmp_path / "root", task)


def test_trained_and_imported_are_not_mixed(task: Task, tmp_path: Path) -> None:
    published(task, tmp_path / "mtt")
    trained = made(task, tmp_path / "root")
    with pytest.warns(UserWarning):
        imported = import_replay_buffers(tmp_path / "mtt", tmp_path / "root", task)
    with pytest.raises(ValueError, match="several buffers"):
        find(tmp_path / "root", TrajectorySpec(task.identity()), task.name)
    only = TrajectorySpec({**task.identity(), "origin": "imported"})
    assert find(tmp_path / "root", only, task.name) == imported != trained
    with pytest.raises(ValueError, match="imported already"):
        import_replay_buffers(tmp_path / "mtt", tmp_path / "root", task)


class Payload:
    """Unpickling it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def bad_imports(task: Task, folder: Path) -> dict[str, tuple[Any, str]]:
    good = [torch.randn(shape) for shape in task.network.shapes.values()]
    name = next(iter(task.network.shapes))
    wrong = [torch.zeros(7, 7), *good[1:]]
    return {
        "payload": ([[[Payload(folder / "executed")]]], "is refused"),
        "pickle": ([[[Payload(folder / "executed")]]], "is refused"),
        "network": (
            [[wrong, wrong]],
            rf"expert 0, epoch 0: {name} is \(7, 7\), but \(4, 1, .* in convnet",
        ),
        "later": ([[good, [*good[:-1], "x"]]], "expert 0, epoch 1: .* is str, but "),
        "count": ([[good[1:], good[1:]]], f"{len(good) - 1} tensors, but convnet.* has {len(good)}"),
        "empty": ([], "expected a list of experts, found an empty one"),
        "dict": ({"a": 1}, "expected a list of experts, found dict"),
        "flat": ([good], "expected a list of tensors, found Tensor"),
        "diverged": ([[good, [good[0] * torch.nan, *good[1:]]]], "epoch 1: it holds numbers that are not finite"),
        "aliased": ([[good, good]], "the first and the last snapshot are the same"),
    }


@pytest.mark.parametrize("case", list(bad_imports(make(), Path())))
def test_bad_import(task: Task, tmp_path: Path, case: str) -> None:
    value, message = bad_imports(task, tmp_path)[case]
    path = tmp_path / "replay_buffer_0.pt"
    with open(path, "wb") as file:
        if case == "pickle":
            pickle.dump(value, file)
        else:
            torch.save(value, file)
    with pytest.raises(ValueError, match=message) as caught:
        import_replay_buffers(tmp_path, tmp_path / "root", task)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert not (tmp_path / "executed").exists() and not list(tmp_path.glob("root/*"))
    with pytest.raises(ValueError, match="no trajectories"):
        find(tmp_path / "root", TrajectorySpec(task.identity()), task.name)


def test_import_of_damaged_or_missing_files(task: Task, tmp_path: Path) -> None:
    published(task, tmp_path / "mtt", num_files=1)
    path = tmp_path / "mtt" / "replay_buffer_9.pt"
    whole = path.read_bytes()
    for damaged in (b"", b"no pickle", whole[:100], whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"replay_buffer_9\.pt .*; ") as caught:
            import_replay_buffers(tmp_path / "mtt", tmp_path / "root", task)
        assert "\n" not in str(caught.value)
    for source in (tmp_path / "root", tmp_path / "absent"):
        with pytest.raises(ValueError, match=r"no replay_buffer_N\.pt in "):
            import_replay_buffers(source, tmp_path / "root", task)


def test_interrupted_import_is_invisible_and_repeated(task: Task, tmp_path: Path) -> None:
    published(task, tmp_path / "mtt")
    root = tmp_path / "root"

    def stop(done: int, total: int) -> None:
        assert total == 2
        raise Stop

    with pytest.raises(Stop):
        import_replay_buffers(tmp_path / "mtt", root, task, progress=stop)
    with pytest.raises(ValueError, match="there are none"):
        find(root, TrajectorySpec(task.identity()), task.name)
    with pytest.warns(UserWarning):
        assert opened(import_replay_buffers(tmp_path / "mtt", root, task)).num_experts == 4
