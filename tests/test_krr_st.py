"""KRR-ST against its slow twin, its teacher, and what its sets can be used for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import condense
from condense import api, experiment, show
from condense.artifacts import open_buffer
from condense.augment import Augment
from condense.compute import Compute
from condense.data.datasets import Arrays
from condense.method import Context, Optim
from condense.methods import pool
from condense.methods.krr_st import KRRST
from condense.networks import Functional, InputShape, build
from condense.recipe import Recipe, named
from condense.rng import Rng
from condense.schedule import Schedule
from condense.synthetic import Hard, Origin, Pixels, Targets
from condense.synthetic import load as read
from condense.task import Labelled, Split, make_task
from condense.teachers import OWN
from tests.reference import krr_st as twin
from tests.test_contract import FIELDS, small

NETWORK = "convnet:depth=1,width=8,norm=batch"
TEACHER = "convnet:depth=2,width=4,norm=batch"
WIDTH = 16
ADAM = Optim(kind="adam", lr=0.02, momentum=0.9, schedule=Schedule(linear_to=0.1))
TINY = KRRST(
    num_steps=6, teachers=(TEACHER,), batch_real=9, pool_size=2, max_age=4, ridge=1e-3, optim=ADAM, optim_labels=ADAM
)


@pytest.fixture(scope="module")
def teachers(tiny: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("teachers")
    fields: dict[str, Any] = {"num_experts": 1, "num_epochs": 2, "lr": 0.05, "batch_size": 12, "projector": 8}
    api.make_buffer(tiny, TEACHER, objective="barlow-twins", keep="last", out=root, device="cpu", **fields)
    return root


def context(teachers: Path, tiny: Arrays, augment: str = "none", ipc: int = 1) -> Context:
    task = make_task(
        tiny,
        transform="channel",
        split=Split(),
        network=Functional(NETWORK, (1, 8, 8), WIDTH, dtype=torch.float64),
        augment=Augment.parse(augment),
        device=torch.device("cpu"),
    )
    task = dataclasses.replace(task, train=Labelled(task.train.images[:].double(), task.train.labels))
    origin = Origin(dataset=task.dataset(), transform=task.transform.describe())
    opened = {"teacher": open_buffer(next(teachers.iterdir()))}
    return Context(task, Rng(0), ipc, Pixels(), Targets(), Compute(), origin, opened)


@pytest.mark.usefixtures("double_teachers")
@pytest.mark.parametrize("augment", ["none", "crop_flip:mode=M"])
def test_it_follows_its_twin_through_the_ages_of_the_pool(augment: str, teachers: Path, tiny: Arrays) -> None:
    ctx, method = context(teachers, tiny, augment), TINY
    state = method.init(ctx)
    state.syn.double()
    teacher = method._teacher(ctx)
    ages = [ctx.rng("initial age", 0, slot).integer(1, method.max_age + 1) for slot in range(2)]
    assert [student["age"] for student in state.pool] == ages
    start = state.syn.latents.detach().clone()
    torch.testing.assert_close(state.syn()[1].detach(), teacher(start), rtol=1e-6, atol=1e-6)
    targets = state.syn()[1].detach().clone()
    state = dataclasses.replace(state, pool=[])
    for slot in range(2):
        params, buffers = ctx.task.network.init(ctx.rng, "pool", 0, slot)
        fresh = {"params": params, "buffers": buffers, "age": 0}
        velocity = {name: torch.zeros_like(param) for name, param in params.items()}
        state.pool.append(method._trained(ctx, state, {**fresh, "velocity": velocity}, ages[slot]))  # type: ignore[typeddict-item]

    def network(step: int, slot: int) -> nn.Module:
        found = build(NETWORK, (1, 8, 8), WIDTH).double()
        weights = ctx.task.network.init(ctx.rng, "pool", step, slot)
        found.load_state_dict({**weights.params, **weights.buffers})
        return found

    def real(step: int) -> tuple[Tensor, Tensor]:
        images, _ = ctx.task.train.sample(method.batch_real, ctx.rng("real", step))
        drawn = ctx.task.augment.sample(ctx.rng("augment", step), len(images), (1, 8, 8), siamese=False)
        images = ctx.task.augment.apply(images, drawn)
        return images, teacher(images)

    expected = twin.krr_st(
        start,
        targets,
        method.num_steps,
        network=network,
        used=lambda step: pool.draw(ctx, method.pool_size, step),
        real=real,
        ages=ages,
        max_age=method.max_age,
        ridge=method.ridge,
        lr=ADAM.lr,
        linear_to=0.1,
        lr_pool=method.lr_pool,
        momentum=method.momentum_pool,
        decay=method.decay_pool,
    )
    replaced = False
    for step, (loss, images, values) in enumerate(expected):
        record = method.step(ctx, state, step)
        assert record["loss"] == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(state.syn.latents.detach(), images, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(state.syn()[1].detach(), values, rtol=1e-6, atol=1e-7)
        replaced |= any(student["age"] == 0 for student in state.pool)
    assert replaced, "no network became too old"


PLAN: dict[str, Any] = {"network": NETWORK, "labels": Targets(), "ipc": 2, "augment": "none"}


@pytest.fixture
def run(teachers: Path, tiny: Arrays, tmp_path: Path) -> Path:
    options = api.RunOptions(out=tmp_path / "run", buffers=teachers, device="cpu")
    api.run(Recipe(method=TINY, dataset="tiny", **PLAN), options, arrays=tiny)
    return tmp_path / "run"


def test_its_set_has_features_and_no_classes(run: Path, tiny: Arrays, capsys: pytest.CaptureFixture[str]) -> None:
    syn = read(run)
    assert syn.origin.num_classes == 0 and syn.origin.target_width == WIDTH and len(syn) == 6
    assert syn()[1].shape == (6, WIDTH) and syn.origin.artifacts[0]["kind"] == "networks"
    training = syn.origin.training
    assert training["lr"] == pytest.approx(0.1 * 2 / WIDTH) and training["weight_decay"] == pytest.approx(
        1e-3 * WIDTH / 2
    )
    show.show(run)
    assert f"targets of {WIDTH} values" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"an accuracy needs classes.*condense apply transfer"):
        condense.evaluate(run, tiny)
    with pytest.raises(ValueError, match="needs classes"):
        api.apply("continual", run, tiny)
    assert api.report(run).exists() and (run / "synthetic.png").exists()


def test_the_training_of_its_set_is_that_of_its_pool(run: Path, teachers: Path, tiny: Arrays) -> None:
    """SGD on the mean squared error, written as SGD on half the sum of squares."""
    ctx = context(teachers, tiny)
    task = dataclasses.replace(ctx.task, network=Functional(NETWORK, (1, 8, 8), WIDTH))
    plan = TINY.training(task)
    images, targets = (values.detach() for values in read(run)())
    weights = task.network.init(Rng(0), "weights")
    steps = {}
    for name, lr, decay, loss in (
        ("own", plan.lr, plan.weight_decay, plan.objective.loss),
        ("pool", TINY.lr_pool, TINY.decay_pool, torch.nn.functional.mse_loss),
    ):
        params = {key: p.clone().requires_grad_() for key, p in weights.params.items()}
        sgd = torch.optim.SGD(params.values(), lr=lr, momentum=0.9, weight_decay=decay)
        for _ in range(2):
            sgd.zero_grad()
            loss(task.network.logits(params, weights.buffers, images), targets).backward()
            sgd.step()
        steps[name] = params
    for key, ours in steps["own"].items():
        torch.testing.assert_close(ours, steps["pool"][key], rtol=1e-4, atol=1e-6)


def test_its_teacher_is_one_that_was_trained_without_labels(tiny: Arrays, tmp_path: Path, teachers: Path) -> None:
    options = api.RunOptions(out=tmp_path / "run", buffers=tmp_path, device="cpu")
    plan = Recipe(method=TINY, dataset="tiny", **PLAN)
    command = rf"condense buffer --dataset tiny --network {TEACHER}.* --objective barlow-twins .*--keep last"
    with pytest.raises(ValueError, match=command.replace("depth=2,width=4,norm=batch", "depth=2,norm=batch,width=4")):
        api.run(plan, options, arrays=tiny)
    other = dataclasses.replace(TINY, trained_by="simclr")
    with pytest.raises(ValueError, match='objective is "barlow-twins", not "simclr"'):
        api.run(dataclasses.replace(plan, method=other), dataclasses.replace(options, buffers=teachers), arrays=tiny)


@pytest.mark.usefixtures("double_teachers")
def test_dropout_in_the_first_pool_follows_the_seed(teachers: Path, tiny: Arrays) -> None:
    def network(input_shape: InputShape, num_outputs: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(), nn.Linear(8, num_outputs))

    ctx = context(teachers, tiny)
    other = Functional(network, (1, 8, 8), WIDTH, dtype=torch.float64)
    ctx = dataclasses.replace(ctx, task=dataclasses.replace(ctx.task, network=other))
    pools = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        pools.append(TINY.init(ctx).pool)
    for one, again in zip(*pools, strict=True):
        torch.testing.assert_close(one["params"], again["params"], rtol=0, atol=0)


@pytest.mark.usefixtures("double_teachers")
def test_targets_are_those_of_the_given_images(teachers: Path, tiny: Arrays) -> None:
    ctx = context(teachers, tiny)
    given = torch.rand(3, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images, targets = TINY.init(dataclasses.replace(ctx, first_images=given)).syn()
    torch.testing.assert_close(images.double(), given, rtol=0, atol=1e-6)
    torch.testing.assert_close(targets.double(), TINY._teacher(ctx)(given).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["krr-st", "linear-gradient"])
def test_the_backbone_may_be_a_network_of_python(name: str, tiny: Arrays, tmp_path: Path) -> None:
    def network(input_shape: InputShape, num_outputs: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, num_outputs))

    common: dict[str, Any] = {"device": "cpu", "compute": Compute()}
    api.make_buffer(
        tiny, network, num_experts=1, num_epochs=1, batch_size=12, keep="last", out=tmp_path / "b", **common
    )
    plan = dataclasses.replace(small(name), teachers=(OWN,))
    fields: dict[str, Any] = {"dataset": tiny, "network": network, "ipc": 2, "buffers": tmp_path / "b"} | FIELDS.get(
        name, {}
    )
    assert api.distill(plan, out=tmp_path / "run", **fields, **common).latents.isfinite().all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": Hard()}, "learns features of a teacher, not hard labels; give labels='targets'"),
        ({"ipc": 13}, "has 36 training images, but 39 are needed for ipc=13; give ipc=12"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(
    fields: dict[str, Any], message: str, teachers: Path, tiny: Arrays, tmp_path: Path
) -> None:
    options = api.RunOptions(out=tmp_path / "run", buffers=teachers, device="cpu")
    with pytest.raises(ValueError, match=message):
        api.run(Recipe(method=TINY, dataset="tiny", **PLAN | fields), options, arrays=tiny)


def test_settings_that_make_no_sense_are_refused() -> None:
    for fields, message in (({"teachers": ("mlp", "mlp")}, "has 2 networks"), ({"max_age": 0}, "max_age")):
        with pytest.raises(ValueError, match=message):
            KRRST(**fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="eval_every measures accuracies, but the sets of krr-st have no classes"):
        experiment.check(Recipe(method=KRRST(), labels=Targets()), validates=True)


def test_the_recipes_have_the_described_values() -> None:
    plan = named("krr-st-cifar100-ipc10")
    method = plan.method
    assert isinstance(method, KRRST) and plan.ipc == 10 and plan.network == "auto:widen=true,norm=batch"
    assert (method.num_steps, method.batch_real, method.max_age, method.optim.lr) == (160_000, 1024, 1000, 1e-4)
    assert method.optim.lr_at(159_999, 160_000) == pytest.approx(1e-7, rel=0.01)
    large = named("krr-st-imagenette64-ipc100").method
    assert isinstance(large, KRRST) and large.optim.lr == large.optim_labels.lr == 1e-5
