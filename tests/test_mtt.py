"""MTT against its slow twin, and what its objective and draws imply."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from condense import catalog, recipe
from condense.artifacts import BufferWriter, find, pack
from condense.augment import Augment
from condense.compute import Compute
from condense.data.datasets import load
from condense.inner import Checkpointed, Full, Tesla
from condense.method import Context, GradientState, Optim
from condense.methods.mtt import MTT, minibatches
from condense.methods.unrolled import prepared
from condense.networks import Functional, build
from condense.recipe import Recipe, named
from condense.rng import Rng
from condense.synthetic import Decode, Factor, Hard, Labels, Logits, Origin, Pixels
from condense.task import Labelled, Split, Task, make_task
from tests.reference.mtt import trajectory_matching

STRATEGY = "color_crop_cutout_flip_scale_rotate"
NUM_EPOCHS = 5
TINY = MTT(num_steps=3, syn_steps=4, max_start_epoch=3, lr=0.05, optim=Optim(lr=10.0), optim_lr=Optim(lr=0.5))


def make_task_of_three(augment: str, dtype: torch.dtype, network: str = "convnet:depth=1,width=4") -> Task:
    classes = torch.arange(21) % 3
    images = torch.rand(21, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    task = make_task(
        load((images, classes)),
        transform="channel",
        split=Split(),
        network=Functional(network, (1, 8, 8), 3, dtype=dtype),
        augment=Augment.parse(augment),
        device=torch.device("cpu"),
    )
    return dataclasses.replace(task, train=Labelled(task.train.images[:].to(dtype), task.train.labels))


def write_buffer(root: Path, task: Task, num_experts: int = 2, num_epochs: int = NUM_EPOCHS) -> None:
    """Experts that drift at random."""
    rng = Rng(1)
    writer = BufferWriter(root, task.name, task.identity(), task.network.init(rng, "structure"))
    for expert in range(num_experts):
        first = pack(task.network.init(rng, "expert", 0, expert).params)
        steps = torch.randn(num_epochs, len(first), generator=rng.generator("drift", 0, expert)) * 0.02
        params = torch.cat([first[None], first + steps.cumsum(0)])
        writer.add(expert, params, torch.empty(num_epochs + 1, 0), {})
    writer.save()


@pytest.fixture
def make_context(tmp_path: Path) -> Callable[..., Context]:
    """A context with a buffer on disk."""

    def make(
        augment: str = "none",
        ipc: int = 2,
        decode: Decode | None = None,
        labels: Labels | None = None,
        compute: Compute | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        method: MTT = TINY,
    ) -> Context:
        task = make_task_of_three(augment, dtype)
        if not any(tmp_path.iterdir()):
            write_buffer(tmp_path, task)
        (spec,) = method.needs(task).values()
        return Context(
            task,
            Rng(seed),
            ipc,
            decode or Pixels(),
            labels or Hard(),
            compute or Compute(),
            Origin(dataset=task.dataset(), transform=task.transform.describe()),
            {"experts": spec.open(find(tmp_path, spec, task.name))},
        )

    return make


def begin(method: MTT, ctx: Context) -> GradientState:
    state = method.init(ctx)
    state.syn.to(ctx.task.network.dtype)
    return state


def run(method: MTT, ctx: Context) -> Iterator[tuple[dict[str, float], Tensor]]:
    state = begin(method, ctx)
    for step in range(method.num_steps):
        record = method.step(ctx, state, step)
        yield record, state.syn()[0].detach().clone()


class Recorder:
    """Stands for a buffer: notes what is asked for and answers with the snapshots it was given."""

    def __init__(self, *answers: tuple[dict[str, Tensor], dict[str, Tensor]], num_experts: int = 1) -> None:
        self.answers, self.num_experts = answers, num_experts
        self.asked: list[tuple[int, int, int]] = []

    def pair(self, expert: int, start: int, target: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        self.asked.append((expert, start, target))
        return self.answers[(len(self.asked) - 1) % len(self.answers)]


def twin(method: MTT, ctx: Context) -> Iterator[tuple[float, Tensor, float]]:
    task, draws, buffer = ctx.task, ctx.rng, ctx.artifacts["experts"]
    state = begin(method, ctx)
    images, labels = (t.detach() for t in state.syn())

    def pairs(step: int) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        found = []
        for part in range(method.num_trajectories):
            drawn = draws("trajectory", step, part)
            expert, epoch = (drawn.integer(0, n) for n in (2, method.max_start_epoch))
            epochs = (epoch, epoch + method.expert_epochs)
            start, target = (
                {name: p.to(images.dtype) for name, p in buffer.snapshot(expert, e).items()}  # type: ignore[attr-defined]
                for e in epochs
            )
            found.append((start, target))
        return found

    def pieces(step: int, part: int) -> list[tuple[Sequence[int], Callable[[Tensor], Tensor]]]:
        order = draws("minibatches", step, part)
        chosen: list[tuple[Sequence[int], Callable[[Tensor], Tensor]]] = []
        left: list[int] = []
        size = method.batch_syn or len(images)
        for n in range(method.syn_steps):
            if not left:
                left = order.permutation(len(images)).tolist()
            count = len(left) % size or size
            left, index = left[:-count], left[-count:]
            drawn = task.augment.sample(draws("augment", step, f"{part}/{n}"), count, task.input_shape, siamese=False)
            chosen.append((index, lambda x, drawn=drawn: task.augment.apply(x, drawn)))  # type: ignore[misc]
        return chosen

    return trajectory_matching(
        images,
        labels,
        method.num_steps,
        network=build(task.network.name, task.input_shape, task.num_classes).to(images.dtype),
        pairs=pairs,
        minibatches=pieces,
        lr=method.lr,
        lr_images=method.optim.lr,
        lr_log_lr=method.optim_lr.lr,
        momentum=method.optim.momentum,
        trim=method.trim,
    )


@pytest.mark.parametrize("augment", ["none", STRATEGY])
@pytest.mark.parametrize(
    ("batch_syn", "num_trajectories", "trim"), [(None, 1, 0.0), (4, 2, 0.0), (None, 1, 0.3), (4, 2, 0.5)]
)
def test_agrees_with_the_slow_twin_step_by_step(
    make_context: Callable[..., Context], batch_syn: int | None, num_trajectories: int, trim: float, augment: str
) -> None:
    ctx = make_context(augment, dtype=torch.float64)
    method = dataclasses.replace(TINY, batch_syn=batch_syn, num_trajectories=num_trajectories, trim=trim)
    previous, previous_lr = begin(method, ctx).syn()[0], method.lr
    for (record, images), (loss, expected, lr) in zip(run(method, ctx), twin(method, ctx), strict=True):
        assert record["loss"] == pytest.approx(loss, rel=1e-6)
        assert record["syn_lr"] == pytest.approx(lr, rel=1e-6)
        torch.testing.assert_close(images, expected, rtol=1e-7, atol=1e-8)
        assert (images - previous).abs().max() > 1e-4
        assert abs(record["syn_lr"] / previous_lr - 1) > 1e-5
        previous, previous_lr = images, record["syn_lr"]


def test_the_loss_is_zero_where_the_expert_did_what_the_student_does(
    make_context: Callable[..., Context],
) -> None:
    ctx = make_context()
    state = begin(TINY, ctx)
    images, labels = state.syn()
    start = ctx.task.network.init(ctx.rng, "expert").params
    theta = {name: p.clone().requires_grad_() for name, p in start.items()}
    for _ in range(TINY.syn_steps):
        grads = torch.autograd.grad(ctx.loss_fn(theta, (images, labels)), list(theta.values()))
        theta = {
            name: (p - TINY.lr * g).detach().requires_grad_() for (name, p), g in zip(theta.items(), grads, strict=True)
        }
    target = {name: p.detach() for name, p in theta.items()}
    ctx = dataclasses.replace(ctx, artifacts={"experts": Recorder((start, target))})  # type: ignore[dict-item]
    assert TINY.loss(ctx, state, 0, 0).item() < 1e-8


def test_the_loss_is_one_where_the_student_stands_still(make_context: Callable[..., Context]) -> None:
    ctx, method = make_context(), dataclasses.replace(TINY, lr=1e-12)
    assert method.loss(ctx, begin(method, ctx), 0, 0).item() == pytest.approx(1, rel=1e-6)


def test_start_epochs_and_experts_cover_their_ranges_exactly(make_context: Callable[..., Context]) -> None:
    ctx = make_context()
    weights = ctx.task.network.init(ctx.rng, "any").params
    recorder = Recorder((weights, weights), num_experts=4)
    ctx = dataclasses.replace(ctx, artifacts={"experts": recorder})  # type: ignore[dict-item]
    method = MTT(max_start_epoch=3, expert_epochs=2, num_trajectories=2)
    for step in range(60):
        for part in method.parts(ctx):
            method.snapshots(ctx, step, part)
    experts, starts, _ = map(set, zip(*recorder.asked, strict=True))
    assert experts == {0, 1, 2, 3}
    assert starts == {0, 1, 2}
    assert all(target == start + 2 for _, start, target in recorder.asked)
    assert any(a != b for a, b in zip(recorder.asked[::2], recorder.asked[1::2], strict=True))


def test_the_buffer_must_reach_the_last_target(tmp_path: Path) -> None:
    task = make_task_of_three("none", torch.float32)
    write_buffer(tmp_path, task, num_epochs=4)
    (spec,) = MTT(max_start_epoch=3, expert_epochs=2).needs(task).values()
    assert find(tmp_path, spec, task.name).is_dir()
    (spec,) = MTT(max_start_epoch=4, expert_epochs=2).needs(task).values()
    with pytest.raises(ValueError, match="num_epochs is 4, less than 5"):
        find(tmp_path, spec, task.name)


def test_a_buffer_of_another_network_does_not_serve(tmp_path: Path) -> None:
    write_buffer(tmp_path, make_task_of_three("none", torch.float32, "mlp"))
    task = make_task_of_three("none", torch.float32)
    with pytest.raises(ValueError, match="network"):
        find(tmp_path, TINY.needs(task)["experts"], task.name)


def test_minibatches_are_used_up_from_the_end_of_a_random_order() -> None:
    replay = Rng(3)("minibatches")
    first, second = (replay.permutation(5) for _ in range(2))
    found = list(minibatches(5, 2, 5, Rng(3)("minibatches")))
    expected = [first[4:], first[2:4], first[:2], second[4:], second[2:4]]
    assert [index.tolist() for index in found] == [index.tolist() for index in expected]


@pytest.mark.parametrize("batch", [None, 5, 9])
def test_a_minibatch_may_be_the_whole_set(batch: int | None) -> None:
    found = list(minibatches(5, batch, 3, Rng(0)("minibatches")))
    assert [sorted(index.tolist()) for index in found] == [[0, 1, 2, 3, 4]] * 3


def test_every_image_of_every_inner_step_is_augmented_by_itself(make_context: Callable[..., Context]) -> None:
    ctx = make_context("crop")
    method = dataclasses.replace(TINY, syn_steps=2)
    state = begin(method, ctx)
    with torch.no_grad():
        state.syn.latents.copy_(torch.arange(64.0).view(1, 8, 8).expand(6, 1, 8, 8))
    first, second = (prepared(ctx.task.augment, batch) for batch in method.batches(ctx, *state.syn(), 0, 0))
    assert len(first[0].flatten(1).unique(dim=0)) > 1
    assert not torch.equal(first[0], second[0])


def test_targets_follow_their_images(make_context: Callable[..., Context]) -> None:
    ctx, method = make_context(), dataclasses.replace(TINY, batch_syn=4)
    state = begin(method, ctx)
    with torch.no_grad():
        state.syn.latents.copy_(state.syn.classes.view(-1, 1, 1, 1).expand(-1, 1, 8, 8))
    for batch in method.batches(ctx, *state.syn(), 0, 0):
        images, targets = prepared(ctx.task.augment, batch)
        assert torch.equal(images[:, 0, 0, 0], targets.float())


@pytest.mark.parametrize("augment", ["crop", "crop:flips=true"])
def test_masked_training_is_differentiated_exactly(make_context: Callable[..., Context], augment: str) -> None:
    """The gradient is that of an unrolled loop in which a share of the features never reaches the classifier."""
    ctx = make_context(augment, dtype=torch.float64)
    method = dataclasses.replace(TINY, batch_syn=4, mask=0.3)
    state = begin(method, ctx)
    params = [p for group in state.leaves().values() for p in group]
    loss = method.loss(ctx, state, 1, 0)
    found = torch.autograd.grad(loss, params)

    start, target = method.snapshots(ctx, 1, 0)
    images, labels = state.syn()
    theta = {name: p.clone().requires_grad_() for name, p in start.items()}
    for batch in method.batches(ctx, images, labels, 1, 0):
        x, y = images[batch.chosen], labels[batch.chosen]
        if ctx.task.augment.flips:
            x, y = torch.cat([x, x.flip(3)]), torch.cat([y, y])
        features = ctx.task.network.features(theta, {}, ctx.task.augment.apply(x, batch.drawn)).where(
            batch.feature_mask, 0.0
        )
        error = F.cross_entropy(F.linear(features, theta["classifier.weight"], theta["classifier.bias"]), y)
        grads = torch.autograd.grad(error, list(theta.values()), create_graph=True)
        theta = {name: p - state.syn.lr * g for (name, p), g in zip(theta.items(), grads, strict=True)}
    apart, way = (sum((a[name] - target[name]).square().sum() for name in target) for a in (theta, start))
    assert loss.item() == pytest.approx((apart / way).item(), rel=1e-10)
    for a, b in zip(found, torch.autograd.grad(apart / way, params), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    assert loss.item() != pytest.approx(dataclasses.replace(method, mask=0.0).loss(ctx, state, 1, 0).item(), rel=1e-3)


def test_every_image_of_every_inner_step_has_a_mask_of_its_own(make_context: Callable[..., Context]) -> None:
    method = dataclasses.replace(TINY, num_trajectories=2, mask=0.3)

    def masks(step: int, part: int, seed: int = 0) -> Tensor:
        ctx = make_context(seed=seed)
        return torch.stack([b.feature_mask for b in method.batches(ctx, *begin(method, ctx).syn(), step, part)])

    found = masks(1, 0)
    assert found.shape == (4, 6, 64) and len(found.flatten(0, 1).unique(dim=0)) == 24
    assert found.double().mean().item() == pytest.approx(0.7, abs=0.04)
    assert torch.equal(found, masks(1, 0))
    for other in (masks(2, 0), masks(1, 1), masks(1, 0, seed=1)):
        assert not torch.equal(found, other)


@pytest.mark.parametrize("trim", [-0.1, 1.0])
def test_a_loss_needs_some_weights(trim: float) -> None:
    with pytest.raises(ValueError, match=r"method.trim must lie in \[0, 1\), got .*; a usual value is 0.25"):
        MTT(trim=trim)


def test_a_recipe_that_trims_nothing_is_that_of_earlier_versions() -> None:
    plain, trimmed = (Recipe(method=MTT(trim=trim)) for trim in (0.0, 0.5))
    assert "trim" not in recipe.to_mapping(plain)["method"] and recipe.to_mapping(trimmed)["method"]["trim"] == 0.5
    assert plain.hash("f") != trimmed.hash("f")
    assert recipe.from_mapping(recipe.to_mapping(trimmed), "test") == trimmed


def test_a_zero_learning_rate_leaves_images_and_learned_rate_alone(
    make_context: Callable[..., Context],
) -> None:
    ctx, method = make_context(), dataclasses.replace(TINY, optim=Optim(lr=0.0), optim_lr=Optim(lr=0.0))
    start = begin(method, ctx).syn()[0]
    for record, images in run(method, ctx):
        assert record["grad_latents"] > 0
        assert record["grad_lr"] > 0
        assert torch.equal(images, start)
        assert record["syn_lr"] == pytest.approx(TINY.lr, rel=1e-6)


def test_a_published_rate_over_the_squared_step_size_makes_the_published_first_step(
    make_context: Callable[..., Context],
) -> None:
    ctx, published = make_context(dtype=torch.float64), 1e-8
    method = dataclasses.replace(TINY, num_steps=1, optim_lr=Optim(lr=published / TINY.lr**2))

    def loss(lr: float) -> float:
        at = dataclasses.replace(method, lr=lr)
        return at.loss(ctx, begin(at, ctx), 0, 0).item()

    slope = (loss(TINY.lr + 1e-4) - loss(TINY.lr - 1e-4)) / 2e-4
    state = begin(method, ctx)
    before = state.syn.lr
    method.step(ctx, state, 0)
    assert before is not None and state.syn.lr is not None
    assert (state.syn.lr - before).item() == pytest.approx(-published * slope, rel=1e-3)


def test_the_learned_rate_stays_positive(make_context: Callable[..., Context]) -> None:
    """Where a step of the rate itself, as published, would have led below zero."""
    ctx, method = make_context(), dataclasses.replace(TINY, lr=0.5, optim_lr=Optim(lr=0.0))
    slope = next(run(method, ctx))[0]["grad_lr"]
    large = dataclasses.replace(method, optim_lr=Optim(lr=3 / slope))
    assert next(run(large, ctx))[0]["syn_lr"] == pytest.approx(0.5 * math.exp(-3), rel=1e-4)


def gradient(ctx: Context, method: MTT) -> Tensor:
    state = begin(method, ctx)
    method.loss(ctx, state, 0, 0).backward()
    assert state.syn.latents.grad is not None
    return state.syn.latents.grad


def test_the_adjoint_is_a_choice(make_context: Callable[..., Context]) -> None:
    ctx = make_context(STRATEGY, dtype=torch.float64)
    exact, full, checkpointed, tesla = (
        gradient(ctx, method)
        for method in (
            TINY,
            dataclasses.replace(TINY, adjoint=Full()),
            dataclasses.replace(TINY, adjoint=Checkpointed(2)),
            dataclasses.replace(TINY, adjoint=Tesla()),
        )
    )
    torch.testing.assert_close(exact, full, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(exact, checkpointed, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(exact, tesla, rtol=1e-3)


def test_learns_soft_labels_and_through_a_decoder(make_context: Callable[..., Context]) -> None:
    ctx = make_context(STRATEGY, ipc=1, decode=Factor(factor=2), labels=Logits())
    method = dataclasses.replace(TINY, batch_syn=5)
    *_, (record, images) = run(method, ctx)
    assert images.shape == (12, 1, 8, 8)
    assert min(record[f"grad_{leaf}"] for leaf in ("latents", "labels", "lr")) > 0


def test_descends(make_context: Callable[..., Context]) -> None:
    ctx = make_context()
    start, target = (ctx.artifacts["experts"].snapshot(0, e) for e in (0, 2))  # type: ignore[attr-defined]
    ctx = dataclasses.replace(ctx, artifacts={"experts": Recorder((start, target))})  # type: ignore[dict-item]
    losses = [record["loss"] for record, _ in run(dataclasses.replace(TINY, num_steps=20), ctx)]
    assert losses[-1] < losses[0]


def test_a_step_needs_nothing_but_the_state_and_its_number(make_context: Callable[..., Context]) -> None:
    ctx, method = make_context(STRATEGY), dataclasses.replace(TINY, num_steps=4, batch_syn=4)
    *_, (_, expected) = run(method, ctx)
    saved = begin(method, ctx)
    for step in range(2):
        method.step(ctx, saved, step)
    state = begin(method, ctx)
    state.syn.load_state_dict(saved.syn.state_dict())
    for leaf, optimiser in state.optimisers.items():
        optimiser.load_state_dict(saved.optimisers[leaf].state_dict())
    for step in range(2, 4):
        method.step(ctx, state, step)
    assert torch.equal(state.syn()[0], expected)


def test_the_global_generator_is_left_alone_and_the_seed_matters(
    make_context: Callable[..., Context],
) -> None:
    before = torch.get_rng_state()
    *_, (_, images) = run(TINY, make_context(STRATEGY))
    assert torch.equal(torch.get_rng_state(), before)
    *_, (_, others) = run(TINY, make_context(STRATEGY, seed=1))
    assert not torch.equal(images, others)


def test_sets_are_meant_for_a_thousand_epochs() -> None:
    training = TINY.training(make_task_of_three("none", torch.float32))
    assert (training.num_epochs, training.momentum, training.weight_decay) == (1000, 0.9, 5e-4)


PUBLISHED = {  # syn_steps, expert_epochs, max_start_epoch, lr of images, lr of lr, lr; whitened
    "cifar10-ipc1": (50, 2, 2, 100, 1e-7, 0.01, True),
    "cifar10-ipc10": (30, 2, 20, 100, 1e-5, 0.001, True),
    "cifar10-ipc50": (30, 2, 20, 100, 1e-5, 0.01, True),
    "cifar100-ipc1": (20, 3, 20, 1000, 1e-5, 0.01, True),
    "cifar100-ipc10": (20, 2, 40, 1000, 1e-5, 0.01, True),
    "mnist-ipc1": (50, 2, 5, 100, 1e-7, 0.01, False),
    "mnist-ipc10": (30, 2, 15, 100, 1e-5, 0.01, False),
    "fashion-mnist-ipc1": (50, 2, 5, 100, 1e-7, 0.01, False),
    "fashion-mnist-ipc10": (60, 2, 15, 100, 1e-5, 0.01, False),
    "svhn-ipc1": (50, 2, 5, 100, 1e-7, 0.01, False),
    "svhn-ipc10": (30, 2, 15, 100, 1e-5, 0.01, False),
    "svhn-ipc50": (40, 2, 40, 100, 1e-5, 0.001, False),
}


def test_recipes_hold_the_published_values() -> None:
    """The rate of the logarithm is converted at a learning rate of 0.01 throughout."""
    entries = catalog.recipes().items()
    recipes = {name: named(name) for name, entry in entries if entry.stem == "mtt" and entry.dataset != "digits"}
    assert recipes.keys() == {"mtt"} | {f"mtt-{name}" for name in PUBLISHED}
    assert recipes["mtt"].method == MTT()
    assert all(recipe.augment == "dsa:align_corners=true" for recipe in recipes.values())
    for name, (syn_steps, expert_epochs, max_start, lr_images, lr_lr, lr, whitened) in PUBLISHED.items():
        recipe = recipes[f"mtt-{name}"]
        assert f"{recipe.dataset}-ipc{recipe.ipc}" == name
        assert recipe.transform == ("zca" if whitened else "channel")
        assert recipe.method == MTT(
            syn_steps=syn_steps,
            expert_epochs=expert_epochs,
            max_start_epoch=max_start,
            lr=lr,
            optim=Optim(lr=lr_images, momentum=0.5),
            optim_lr=Optim(lr=float(f"{lr_lr / 0.01**2:.6g}"), momentum=0.5),
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_steps": 0}, "method.num_steps"),
        ({"syn_steps": 0}, "method.syn_steps"),
        ({"batch_syn": 0}, "method.batch_syn"),
        ({"expert_epochs": 0}, "method.expert_epochs"),
        ({"max_start_epoch": 0}, "method.max_start_epoch"),
        ({"num_trajectories": 0}, "method.num_trajectories"),
        ({"lr": -0.1}, "method.lr must be positive"),
        ({"mask": 1.0}, r"method.mask must lie in \[0, 1\), got 1.0"),
        ({"mask": -0.1}, "method.mask must lie in"),
    ],
)
def test_refuses_values_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MTT(**fields)


@pytest.mark.slow
def test_compiled_agrees_with_eager(make_context: Callable[..., Context]) -> None:
    eager, compiled = (list(run(TINY, make_context(STRATEGY, compute=Compute(compile=on)))) for on in (False, True))
    for (_, a), (_, b) in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
