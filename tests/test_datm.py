"""DATM, TESLA, labels by a teacher and sharpness-aware experts against slow twins, and what they imply."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from condense import api, catalog, engine
from condense.artifacts import TrajectorySpec, find
from condense.augment import Augment
from condense.buffers.trajectories import Experts
from condense.compute import Compute
from condense.data.datasets import Arrays
from condense.data.layout import InputShape
from condense.inner import Exact, Tesla
from condense.method import Context, GradientState, Optim
from condense.methods.datm import CONFIDENCE, DATM, correctly_classified, mean_logits
from condense.methods.mtt import MTT, TrajectoryMatching, expert_logits, experts_of
from condense.methods.tesla import TESLA
from condense.networks import Functional, Weights, build
from condense.recipe import Recipe, named
from condense.rng import Rng
from condense.schedule import Schedule
from condense.synthetic import Decode, Factor, Hard, Labels, Logits, Origin, Pixels, Teacher
from condense.task import Split, Task, make_task
from condense.tracking import read_log
from condense.train import Trainer, Training
from tests.reference import gsam
from tests.reference.datm import datm
from tests.reference.tesla import tesla

NETWORK = "convnet:depth=1,width=4"
METHOD = DATM(
    num_steps=4,
    syn_steps=3,
    batch_syn=4,
    first_max_epoch=1,
    expansion_steps=2,
    max_start_epoch=3,
    threshold=100.0,
    lr=0.05,
    optim=Optim(lr=10.0),
    optim_labels=Optim(lr=2.0, momentum=0.9),
    optim_lr=Optim(lr=0.5),
)


@pytest.fixture
def make_context(tiny: Arrays, tiny_buffer: Path) -> Callable[..., Context]:
    def make(
        augment: str = "none", labels: Labels | None = None, decode: Decode | None = None, ipc: int = 2
    ) -> Context:
        network = Functional(NETWORK, (1, 8, 8), 3)
        task = make_task(
            tiny,
            transform="channel",
            split=Split(val_fraction=0.0),
            network=network,
            augment=Augment.parse(augment),
            device=torch.device("cpu"),
        )
        (spec,) = METHOD.needs(task).values()
        return Context(
            task,
            Rng(0),
            ipc,
            decode or Pixels(),
            labels or Logits(),
            Compute(),
            Origin(dataset=task.dataset(), transform=task.transform.describe()),
            {"experts": spec.open(find(tiny_buffer, spec, task.name))},
        )

    return make


def advance(method: TrajectoryMatching, ctx: Context, state: GradientState) -> list[dict[str, float]]:
    return [method.step(ctx, state, step) for step in range(method.num_steps)]


@pytest.mark.parametrize("augment", ["none", "color_crop"])
@pytest.mark.parametrize(("threshold", "trim"), [(100.0, 0.0), (1.05, 0.0), (100.0, 0.5)])
def test_datm_follows_its_twin_step_by_step(
    augment: str, threshold: float, trim: float, make_context: Callable[..., Context]
) -> None:
    method, ctx = dataclasses.replace(METHOD, threshold=threshold, trim=trim), make_context(augment)
    state = method.init(ctx)
    start = {name: p.detach().clone() for name, p in state.syn.named_parameters()}

    def minibatches(step: int) -> Any:
        drawn = method.batches(ctx, *state.syn(), step, 0)
        return [(b.chosen.tolist(), lambda x, b=b: ctx.task.augment.apply(x, b.drawn)) for b in drawn]

    expected = datm(
        start["latents"],
        start["provider.logits"],
        method.num_steps,
        network=build(NETWORK, (1, 8, 8), 3),
        pairs=lambda step: method.snapshots(ctx, step, 0),
        minibatches=minibatches,
        lr=method.lr,
        lr_images=method.optim.lr,
        lr_labels=method.optim_labels.lr,
        lr_log_lr=method.optim_lr.lr,
        threshold=threshold,
        trim=trim,
    )
    for step, (loss, images, logits, lr) in enumerate(expected):
        record = method.step(ctx, state, step)
        assert record["loss"] == pytest.approx(loss, rel=1e-4)
        torch.testing.assert_close(state.syn.latents.detach(), images, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            dict(state.syn.named_parameters())["provider.logits"].detach(), logits, rtol=1e-3, atol=1e-4
        )
        assert state.syn.lr is not None and state.syn.lr.item() == pytest.approx(lr, rel=1e-4)


def test_an_update_above_the_threshold_changes_nothing(make_context: Callable[..., Context]) -> None:
    ctx, never = make_context(), dataclasses.replace(METHOD, threshold=1e-9)
    state = never.init(ctx)
    before = {name: p.detach().clone() for name, p in state.syn.named_parameters()}
    records = advance(never, ctx, state)
    assert all(record["loss"] > 1e-9 for record in records)
    for name, p in state.syn.named_parameters():
        assert torch.equal(p, before[name]), name
    assert not any(optimiser.state for optimiser in state.optimisers.values()), "no momentum either"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_is_skipped_and_the_run_goes_on(
    bad: float, make_context: Callable[..., Context], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx, loss, seen = make_context(), TrajectoryMatching.loss, list[Tensor]()

    def with_one_bad(self: DATM, ctx: Context, state: GradientState, step: int, part: int) -> Tensor:
        seen.append(state.syn.latents.detach().clone())
        return loss(self, ctx, state, step, part) * (bad if step == 1 else 1.0)

    monkeypatch.setattr(DATM, "loss", with_one_bad)
    engine.run(METHOD, ctx, METHOD.init(ctx), tmp_path)
    lines = read_log(tmp_path / "log.jsonl")
    assert [line.get("skipped", 0) for line in lines] == [0, 1, 0, 0]
    assert ["loss" in line for line in lines] == [True, False, True, True]
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[2], seen[3])


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"first_max_epoch": 10, "max_start_epoch": 20, "expansion_steps": 1000}, {0: 10, 500: 15, 999: 19, 5000: 20}),
        ({"first_max_epoch": None, "max_start_epoch": 4}, {0: 4, 9: 4}),
    ],
)
def test_the_window_of_start_epochs_grows(fields: dict[str, Any], windows: dict[int, int]) -> None:
    method = DATM(min_start_epoch=2, **fields)
    assert {step: method.start_epochs(step).stop for step in windows} == windows
    assert method.start_epochs(0).start == 2


def test_images_begin_where_experts_are_right(
    make_context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = make_context()
    members = ctx.task.train.by_class[1]

    def judge(right: list[set[int]]) -> None:
        """Expert e is right about the images of class 1 at these positions in the data."""

        def fake(ctx: Context, images: Tensor) -> Any:
            everything = ctx.task.train.images[:]
            positions = [int((everything - x).flatten(1).abs().sum(1).argmin()) for x in images]
            for known in right:
                hits = torch.tensor([p in known for p in positions])
                yield torch.stack([torch.zeros(3), torch.tensor([0.0, 5.0, 0.0])])[hits.long()]

        monkeypatch.setattr("condense.methods.datm.logits_of_experts", fake)

    def chosen(num: int) -> set[int]:
        everything = ctx.task.train.images[:]
        return {int((everything - x).flatten(1).abs().sum(1).argmin()) for x in correctly_classified(ctx, 1, num)}

    first, second = set(members[:2].tolist()), set(members[2:5].tolist())
    judge([first, second])
    assert chosen(2) == first
    assert first < chosen(4) < first | second
    assert first | second < chosen(7) and len(chosen(7)) == 7, "then any"
    labels = torch.ones(3, dtype=torch.long)
    logits = mean_logits(ctx, ctx.task.train.images[members[[0, 2, 8]]], labels)
    torch.testing.assert_close(logits[:2], torch.tensor([[0.0, 5.0, 0.0], [0.0, 5.0, 0.0]]))
    assert logits[2].softmax(0)[1].item() == pytest.approx(CONFIDENCE)


def test_learned_labels_begin_at_the_experts_logits(make_context: Callable[..., Context]) -> None:
    ctx = make_context()
    state = METHOD.init(ctx)
    images, targets = state.syn()
    expected = mean_logits(ctx, images.detach(), state.syn.classes).softmax(1)
    torch.testing.assert_close(targets, expected)


class TestTesla:
    def test_it_is_mtt_with_another_adjoint(self, make_context: Callable[..., Context]) -> None:
        ctx = make_context(labels=Hard())
        fields: dict[str, Any] = {"num_steps": 1, "syn_steps": 3, "max_start_epoch": 2, "lr": 0.05}
        grads = {}
        for name, method in {
            "mtt": MTT(**fields),
            "exact": TESLA(adjoint=Exact(), **fields),
            "tesla": TESLA(**fields),
            "stopped": MTT(adjoint=Tesla(), **fields),
        }.items():
            state = method.init(ctx)
            method.loss(ctx, state, 0, 0).backward()
            grads[name] = state.syn.latents.grad
        assert torch.equal(grads["mtt"], grads["exact"]) and torch.equal(grads["tesla"], grads["stopped"])
        error = (grads["tesla"] - grads["exact"]).norm() / grads["exact"].norm()
        assert error > 1e-3

    @pytest.mark.parametrize("trim", [0.0, 0.5])
    @pytest.mark.parametrize("augment", ["none", "color_crop"])
    def test_it_follows_its_twin_step_by_step(
        self, augment: str, trim: float, make_context: Callable[..., Context]
    ) -> None:
        ctx = make_context(augment, labels=Hard())
        fields: dict[str, Any] = {"num_steps": 4, "syn_steps": 4, "batch_syn": 4, "max_start_epoch": 2, "lr": 0.05}
        method = TESLA(optim=Optim(lr=10.0), trim=trim, **fields)
        state = method.init(ctx)
        images, labels = (t.detach().clone() for t in state.syn())

        def minibatches(step: int) -> Any:
            drawn = method.batches(ctx, *state.syn(), step, 0)
            return [(b.chosen.tolist(), lambda x, b=b: ctx.task.augment.apply(x, b.drawn)) for b in drawn]

        expected = tesla(
            images,
            labels,
            method.num_steps,
            network=build(NETWORK, (1, 8, 8), 3),
            pairs=lambda step: method.snapshots(ctx, step, 0),
            minibatches=minibatches,
            lr=method.lr,
            lr_images=method.optim.lr,
            lr_log_lr=method.optim_lr.lr,
            trim=trim,
        )
        for step, (loss, found, lr) in enumerate(expected):
            before = state.syn.latents.detach().clone()
            assert method.step(ctx, state, step)["loss"] == pytest.approx(loss, rel=1e-4)
            torch.testing.assert_close(state.syn.latents.detach(), found, rtol=1e-3, atol=1e-4)
            assert state.syn.lr is not None and state.syn.lr.item() == pytest.approx(lr, rel=1e-4)
            assert (state.syn.latents - before).abs().max() > 1e-3

    def test_one_step_is_exact(self, make_context: Callable[..., Context]) -> None:
        ctx, grads = make_context(labels=Hard()), []
        for adjoint in (Exact(), Tesla()):
            method = TESLA(num_steps=1, syn_steps=1, max_start_epoch=2, adjoint=adjoint)
            state = method.init(ctx)
            method.loss(ctx, state, 0, 0).backward()
            grads.append(state.syn.latents.grad)
        torch.testing.assert_close(*grads)


class TestTeacher:
    def test_the_student_learns_what_its_target_says(self, make_context: Callable[..., Context]) -> None:
        """Labels of a step are the softmax of the target snapshot on the images as they are."""
        ctx = make_context(labels=Teacher())
        method = MTT(num_steps=1, syn_steps=2, max_start_epoch=2, lr=0.05)
        state = method.init(ctx)
        found = method.loss(ctx, state, 0, 0)
        _, target = method.snapshots(ctx, 0, 0)
        images, _ = state.syn()
        probabilities = ctx.task.network.logits(target, {}, images, train=False).softmax(1).detach()
        soft = make_context(labels=Logits())
        other = method.init(soft)
        with torch.no_grad():
            dict(other.syn.named_parameters())["provider.logits"].copy_(probabilities.log())
        assert found.item() == pytest.approx(method.loss(soft, other, 0, 0).item(), rel=1e-5)

    @pytest.mark.parametrize("decode", [Pixels(), Factor()])
    def test_the_file_keeps_what_the_last_target_says(
        self, decode: Decode, make_context: Callable[..., Context]
    ) -> None:
        ctx = make_context(labels=Teacher(), decode=decode)
        method = MTT(num_steps=5, syn_steps=2, max_start_epoch=2, num_trajectories=2)
        state = method.init(ctx)
        before = state.syn()[1].clone()
        kept = []
        for steps in (3, 5):
            stored = method.finalize(ctx, state, steps)
            images, targets = stored()
            _, target = method.snapshots(ctx, steps - 1, 1)
            said = ctx.task.network.logits(target, {}, images, train=False).softmax(1)
            each = said.detach().unflatten(0, (decode.expansion, -1)).mean(0)
            torch.testing.assert_close(targets, each.repeat(decode.expansion, 1))
            kept.append(targets)
        assert not torch.allclose(*kept), "other steps have other targets"
        assert torch.equal(state.syn()[1], before), "the state stays as it is"

    def test_batchnorm_takes_the_statistics_of_the_expert(
        self, tiny: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        network = f"{NETWORK},norm=batch"
        folder = api.make_buffer(tiny, network, num_experts=1, num_epochs=2, lr=0.1, out=tmp_path, device="cpu")
        task, spec = api.plain_task(tiny, network, "channel", Split()), TrajectorySpec({})
        origin = Origin(dataset=task.dataset(), transform=task.transform.describe())
        ctx = Context(task, Rng(0), 1, Pixels(), Teacher(), Compute(), origin, {"experts": spec.open(folder)})
        buffer, images = experts_of(ctx), task.train.images[:4]
        live = Weights(buffer.snapshot(0, 2), buffer.buffers(0, 2))
        expected = task.network.logits(*live, images, train=False)
        assert torch.equal(expert_logits(ctx, 0, 2, images), expected)
        assert not torch.allclose(expert_logits(ctx, 0, 1, images), expected)
        monkeypatch.setitem(buffer.manifest, "buffers", [])
        with pytest.raises(ValueError, match=r"has no running statistics, which .* needs; train them with"):
            expert_logits(ctx, 0, 2, images)


class WithUnused(torch.nn.Module):
    """It has a layer that takes no part in a forward pass."""

    def __init__(self, input_shape: InputShape, num_outputs: int) -> None:
        super().__init__()
        self.unused, self.last = torch.nn.Linear(2, 2), torch.nn.Linear(64, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(x.flatten(1))
        return logits


class TestSharpness:
    def train(self, task: Task, **fields: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], Trainer]:
        plan = Training(
            num_epochs=2, batch_size=12, lr=0.1, momentum=0.0, weight_decay=0.0, schedule=Schedule(), **fields
        )
        trainer = Trainer(task.network, plan, Compute())
        start = task.network.init(Rng(3), "weights")
        source = trainer.source(task.train.images, task.train.labels, Rng(4), task.augment)
        return start.params, trainer.run(start, source).params, trainer

    def test_it_follows_its_twin(self, make_context: Callable[..., Context]) -> None:
        task = make_context("crop").task
        start, found, trainer = self.train(task, rho=0.5, alpha=0.3)
        network = task.network
        gradients = []
        source = trainer.source(task.train.images, task.train.labels, Rng(4), task.augment)
        for epoch in range(2):
            for index in range(source.num_batches):
                x, y = source.batch(epoch, index)

                def gradient(w: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
                    leaf = w.clone().requires_grad_()
                    logits = network.logits(network.unflatten(leaf), {}, x)
                    loss = torch.nn.functional.cross_entropy(logits, y)
                    return torch.autograd.grad(loss, leaf)[0]

                gradients.append(gradient)
        expected = gsam.run(network.flatten(start), gradients, rho=0.5, alpha=0.3, lr=0.1)
        torch.testing.assert_close(network.flatten(found), expected, rtol=1e-4, atol=1e-5)

    def test_no_radius_and_no_share_is_sgd(self, make_context: Callable[..., Context]) -> None:
        task = make_context().task
        _, plain, _ = self.train(task)
        _, none, _ = self.train(task, rho=0.0, alpha=0.0)
        _, sharp, _ = self.train(task, rho=0.5, alpha=0.0)
        for name, p in plain.items():
            torch.testing.assert_close(none[name], p)
        assert not torch.allclose(network_vector(sharp), network_vector(plain), atol=1e-5)

    def test_the_second_gradient_leaves_the_statistics_alone(self, make_context: Callable[..., Context]) -> None:
        task = make_context().task
        network = Functional("convnet:depth=1,width=4,norm=batch", (1, 8, 8), 3)
        plan = Training(num_epochs=2, batch_size=12, rho=0.1, alpha=0.3)
        trainer = Trainer(network, plan, Compute())
        source = trainer.source(task.train.images, task.train.labels, Rng(1))
        weights = trainer.run(network.init(Rng(0), "weights"), source)
        assert int(weights.buffers["features.1.num_batches_tracked"]) == 2 * 3

    def test_parameters_without_a_gradient_stay_as_they_are(self, make_context: Callable[..., Context]) -> None:
        task = make_context().task
        trainer = Trainer(Functional(WithUnused, (1, 8, 8), 3), Training(num_epochs=1, rho=0.1, alpha=0.3), Compute())
        start = trainer.network.init(Rng(0), "weights")
        end = trainer.run(start, trainer.source(task.train.images, task.train.labels, Rng(1)))
        changed = {name for name, p in end.params.items() if not torch.equal(p, start.params[name])}
        assert changed and changed == {name for name in start.params if "unused" not in name}

    def test_several_at_once_are_as_one_by_one(self, make_context: Callable[..., Context]) -> None:
        task = make_context().task
        plan = Training(num_epochs=2, batch_size=12, lr=0.1, rho=0.5, alpha=0.3)
        trainer, rngs = Trainer(task.network, plan, Compute()), [Rng(0), Rng(1)]
        weights = [task.network.init(rng, "weights") for rng in rngs]
        sources = [trainer.source(task.train.images, task.train.labels, rng) for rng in rngs]
        together = trainer.run_together(weights, sources)
        for start, source, found in zip(weights, sources, together, strict=True):
            alone = trainer.run(start, source)
            torch.testing.assert_close(network_vector(found.params), network_vector(alone.params), rtol=1e-4, atol=1e-5)

    def test_a_method_may_ask_for_such_experts(self, tiny: Arrays, tmp_path: Path) -> None:
        fields: dict[str, Any] = {"num_experts": 1, "num_epochs": 3, "out": tmp_path, "device": "cpu"}
        plain = api.make_buffer(tiny, NETWORK, **fields)
        sharp = api.make_buffer(tiny, NETWORK, rho=0.01, alpha=0.3, **fields)
        assert plain != sharp
        task = api.plain_task(tiny, NETWORK, "channel", Split())
        for experts, folder in {"sgd": plain, "gsam": sharp}.items():
            (spec,) = MTT(experts=experts, max_start_epoch=1).needs(task).values()  # type: ignore[arg-type]
            assert find(tmp_path, spec, "tiny") == folder
        (spec,) = MTT(experts="gsam", max_start_epoch=1).needs(task).values()
        with pytest.raises(ValueError, match=r"trained by sgd, not gsam.*--rho 0.01 --alpha 0.3"):
            find(plain, spec, "tiny")
        imported = {
            "kind": "trajectories",
            "identity": {**task.identity(), "origin": "imported"},
            "num_experts": 1,
            "num_epochs": 3,
        }
        assert spec.misfits(imported) == [], "nobody knows how they were trained"

    def test_plain_experts_keep_their_name(self, make_context: Callable[..., Context]) -> None:
        assert Experts(rho=0.0, alpha=0.0).identity() == Experts().identity()
        assert not {"rho", "alpha"} & Experts().identity().keys()
        assert Experts(rho=0.01, alpha=0.3).identity() == Experts().identity() | {"rho": 0.01, "alpha": 0.3}

    @pytest.mark.parametrize("fields", [{"rho": -0.1}, {"alpha": 0.3}])
    def test_bad_values_are_refused(self, fields: dict[str, float]) -> None:
        with pytest.raises(ValueError, match=r"FTD's experts are 0.01 and 0.4"):
            Experts(**fields)  # type: ignore[arg-type]


def network_vector(params: dict[str, Tensor]) -> Tensor:
    return torch.cat([p.reshape(-1) for p in params.values()])


@pytest.mark.parametrize(
    "fields", [{"min_start_epoch": 20}, {"first_max_epoch": 30}, {"threshold": 0.0}, {"expansion_steps": 0}]
)
def test_bad_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"growing window|must be positive"):
        DATM(**fields)


PUBLISHED = {  # syn_steps, batch_syn, expert_epochs, window, growth, lr of images, of labels, of lr; threshold
    "cifar10-ipc1": (80, 10, 2, (0, None, 4), None, 100, 5, 1e-7, 1.1),
    "cifar10-ipc10": (80, 100, 2, (0, 10, 20), 1000, 100, 2, 1e-5, 1.0),
    "cifar10-ipc50": (80, 500, 2, (0, 20, 40), 2000, 1000, 2, 1e-5, 1.0),
    "cifar10-ipc500": (40, 1000, 2, (40, None, 60), None, 50, 10, 1e-5, 1.0),
    "cifar10-ipc1000": (100, 1000, 2, (40, None, 60), None, 50, 10, 1e-5, 1.0),
    "cifar100-ipc1": (40, 1000, 3, (0, 10, 20), 1000, 1000, 10, 1e-5, 1.0),
    "cifar100-ipc10": (80, 1000, 2, (0, 30, 50), 2000, 1000, 10, 1e-5, 1.0),
    "cifar100-ipc50": (80, 1000, 2, (20, None, 70), None, 1000, 10, 1e-5, 1.0),
    "cifar100-ipc100": (80, 1000, 2, (30, None, 70), None, 50, 10, 1e-5, 1.0),
}


def published(name: str) -> dict[str, Recipe]:
    return {key: named(key) for key in catalog.recipes() if key.split("-")[0] == name and "digits" not in key}


def test_recipes_of_datm_hold_the_published_values() -> None:
    recipes = published("datm")
    assert recipes.keys() == {"datm"} | {f"datm-{name}" for name in PUBLISHED}
    assert recipes["datm"].method == dataclasses.replace(recipes["datm-cifar10-ipc10"].method)
    for name, (syn_steps, batch, epochs, window, growth, lr, lr_y, lr_lr, threshold) in PUBLISHED.items():
        plan = recipes[f"datm-{name}"]
        assert f"{plan.dataset}-ipc{plan.ipc}" == name
        assert (plan.transform, plan.labels, plan.augment) == ("zca", Logits(), "dsa:align_corners=true")
        first, middle, last = window
        assert plan.method == DATM(
            num_steps=10000,
            experts="gsam",
            correct_only=name != "cifar100-ipc50",
            syn_steps=syn_steps,
            batch_syn=batch,
            expert_epochs=epochs,
            min_start_epoch=first,
            first_max_epoch=middle,
            max_start_epoch=last,
            expansion_steps=growth or 1000,
            lr=0.01,
            optim=Optim(lr=lr, momentum=0.5),
            optim_labels=Optim(lr=lr_y, momentum=0.9),
            optim_lr=Optim(lr=float(f"{lr_lr / 0.01**2:.6g}"), momentum=0.5),
            threshold=threshold,
        )


def test_recipes_of_pad_are_those_of_datm_with_a_trimmed_loss() -> None:
    recipes, budgets = published("pad"), {1: 0.0, 10: 0.5, 50: 0.25, 500: 0.5, 1000: 0.5}
    assert recipes.keys() == {"pad"} | {f"pad-cifar10-ipc{ipc}" for ipc in budgets}
    assert recipes["pad"].method == recipes["pad-cifar10-ipc10"].method
    for ipc, trim in budgets.items():
        plan, datm = recipes[f"pad-cifar10-ipc{ipc}"], named(f"datm-cifar10-ipc{ipc}")
        assert plan == dataclasses.replace(datm, method=dataclasses.replace(datm.method, trim=trim))  # type: ignore


def test_recipes_of_tesla_hold_the_published_values() -> None:
    """Half the published rate of the images: the published code halves their gradients."""
    recipes = published("tesla")
    assert recipes.keys() == {"tesla", "tesla-cifar10-ipc1", "tesla-cifar100-ipc50"}
    small = TESLA(syn_steps=50, max_start_epoch=5, optim=Optim(lr=1000 / 2), optim_lr=Optim(lr=1e-7 / 0.01**2))
    large = TESLA(
        syn_steps=80, batch_syn=125, max_start_epoch=40, optim=Optim(lr=1000 / 2), optim_lr=Optim(lr=1e-5 / 0.01**2)
    )
    for name, plan in recipes.items():
        method: Any = plan.method
        rate = Optim(lr=float(f"{method.optim_lr.lr:.6g}"))
        expected = large if "cifar100" in name else small
        assert dataclasses.replace(method, optim_lr=rate) == dataclasses.replace(expected, optim_lr=rate)
        assert rate.lr == pytest.approx(expected.optim_lr.lr)
        assert plan.transform == ("zca" if "cifar100" in name else "channel")


def test_recipes_of_ftd_hold_the_published_values() -> None:
    recipes = published("ftd")
    assert recipes.keys() == {"ftd", "ftd-cifar10-ipc10", "ftd-cifar100-ipc10"}
    assert recipes["ftd"].method == recipes["ftd-cifar10-ipc10"].method
    common: dict[str, Any] = {"experts": "gsam", "ema": 0.9995, "optim_lr": Optim(lr=0.1)}
    assert recipes["ftd-cifar10-ipc10"].method == MTT(
        syn_steps=30, max_start_epoch=20, lr=0.001, optim=Optim(lr=100.0), **common
    )
    assert recipes["ftd-cifar100-ipc10"].method == MTT(
        syn_steps=20, max_start_epoch=40, lr=0.01, optim=Optim(lr=1000.0), **common
    )
