"""DC and DSA against their slow twin, and what their objective and loops imply."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from condense import catalog
from condense.augment import Augment
from condense.compute import Compute
from condense.data.datasets import load
from condense.method import Context, Optim
from condense.methods import dc
from condense.methods.dc import DC, DSA, Condensation, StudentState
from condense.networks import Functional, build
from condense.recipe import named
from condense.rng import Rng
from condense.synthetic import Decode, Factor, Hard, Labels, Logits, Origin, Pixels
from condense.task import Labelled, Split, make_task
from tests.reference.dc import gradient_matching

COUNTS = (5, 9, 7)
STRATEGY = "color_crop_cutout_flip_scale_rotate"


def make_context(
    network: str = "convnet:depth=1,width=8",
    augment: str = "none",
    ipc: int = 2,
    decode: Decode | None = None,
    labels: Labels | None = None,
    compute: Compute | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Context:
    """Three classes of random 1x8x8 images."""
    classes = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS))
    images = torch.rand(len(classes), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(1))
    task = make_task(
        load((images[order], classes[order])),
        transform="channel",
        split=Split(),
        network=Functional(network, (1, 8, 8), 3, dtype=dtype),
        augment=Augment.parse(augment),
        device=torch.device("cpu"),
    )
    task = dataclasses.replace(task, train=Labelled(task.train.images[:].to(dtype), task.train.labels))
    origin = Origin(dataset=task.dataset(), transform=task.transform.describe())
    return Context(task, Rng(seed), ipc, decode or Pixels(), labels or Hard(), compute or Compute(), origin)


def begin(method: Condensation, ctx: Context) -> StudentState:
    state = method.init(ctx)
    state.syn.to(ctx.task.network.dtype)
    return state


def run(method: Condensation, ctx: Context) -> Iterator[tuple[dict[str, float], Tensor]]:
    state = begin(method, ctx)
    for step in range(method.num_steps):
        record = method.step(ctx, state, step)
        yield record, state.syn()[0].detach().clone()


def twin(method: Condensation, ctx: Context) -> Iterator[tuple[float, Tensor]]:
    task, augment, draws = ctx.task, ctx.task.augment, ctx.rng
    outer_loop, inner_epochs = method.loops(ctx.ipc)

    def network(step: int) -> nn.Module:
        student = build(task.network.name, task.input_shape, task.num_classes).to(task.network.dtype)
        weights = task.network.init(draws, "student", step)
        student.load_state_dict({**weights.params, **weights.buffers})
        return student

    def siamese(step: int, c: int, x: Tensor) -> Tensor:
        drawn = augment.sample(draws("siamese", step, c), 1, task.input_shape, siamese=True)
        return augment.apply(x, drawn)

    def epoch(step: int, number: int) -> list[tuple[Tensor, Callable[[Tensor], Tensor]]]:
        rng = draws.child("training", step)
        order = rng("order", number).permutation(ctx.ipc * task.num_classes)

        def treatment(batch: int, num: int) -> Callable[[Tensor], Tensor]:
            drawn = augment.sample(rng("augment", number, batch), num, task.input_shape, siamese=False)
            return lambda x: augment.apply(x, drawn)

        pieces = order.split(method.batch_student)
        return [(index, treatment(batch, len(index))) for batch, index in enumerate(pieces)]

    classes = range(task.num_classes)
    return gradient_matching(
        list(begin(method, ctx).syn()[0].detach().split(ctx.ipc)),
        method.num_steps,
        outer_loop=outer_loop,
        inner_epochs=inner_epochs,
        network=network,
        real=lambda step, c: task.train.draw(c, method.batch_real, draws("real", step, c)),
        statistics=lambda step: torch.cat([task.train.draw(c, 16, draws("statistics", step, c)) for c in classes]),
        augment=siamese,
        epoch=epoch,
        distance=method.distance,
        lr=method.optim.lr,
        momentum=method.optim.momentum,
        lr_student=method.lr_student,
    )


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize(("kind", "augment"), [(DC, "none"), (DSA, STRATEGY)])
def test_agrees_with_the_slow_twin_step_by_step(kind: type[DC] | type[DSA], augment: str, norm: str) -> None:
    ctx = make_context(f"convnet:depth=1,norm={norm},width=8", augment, dtype=torch.float64)
    method = kind(num_steps=5, batch_real=6, batch_student=4, outer_loop=3, inner_epochs=2, lr_student=0.1)
    previous = begin(method, ctx).syn()[0]
    for (record, images), (loss, expected) in zip(run(method, ctx), twin(method, ctx), strict=True):
        assert record["loss"] == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-6)
        assert (images - previous).abs().max() > 1e-3
        previous = images


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_other_distances_agree_with_the_slow_twin(distance: Any) -> None:
    ctx, method = make_context(), DC(num_steps=2, outer_loop=1, distance=distance)
    for (record, images), (loss, expected) in zip(run(method, ctx), twin(method, ctx), strict=True):
        assert record["loss"] == pytest.approx(loss, rel=1e-4)
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)


def test_the_loop_table_holds_the_published_values_and_is_interpolated_between_them() -> None:
    published = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
    assert {ipc: DC().loops(ipc) for ipc in published} == published
    assert DC().loops(2) == (2, 6)
    assert DC().loops(25) == (25, 22)
    assert DC().loops(100) == (100, 5)
    assert DC().loops(1000) == (1000, 1)


def test_the_fields_of_the_loops_override_the_table() -> None:
    assert DC(outer_loop=3).loops(10) == (3, 50)
    assert DC(inner_epochs=0).loops(10) == (10, 0)


def test_the_loss_does_not_depend_on_the_order_of_the_classes() -> None:
    """Renaming the classes of images, real draws and student outputs alike changes nothing."""
    ctx, method = make_context("mlp", ipc=2), DC(num_steps=1, batch_real=256)
    state = begin(method, ctx)
    losses = [method.loss(ctx, state, 0, c).item() for c in range(3)]

    order = torch.tensor([2, 0, 1])  # new class i was class order[i]
    renamed = make_context("mlp", ipc=2)
    train = renamed.task.train
    task = dataclasses.replace(renamed.task, train=Labelled(train.images, order.argsort()[train.labels]))
    renamed = dataclasses.replace(renamed, task=task)
    other = begin(method, renamed)
    with torch.no_grad():
        other.syn.latents.copy_(state.syn.latents.unflatten(0, (3, 2))[order].flatten(0, 1))
    last = {name for name in state.params if name.startswith("classifier")}
    other.params = {name: p[order] if name in last else p for name, p in state.params.items()}
    assert len(last) == 2
    renamed_losses = [method.loss(renamed, other, 0, c).item() for c in range(3)]
    assert renamed_losses == pytest.approx([losses[c] for c in order], rel=1e-4)


def test_the_loss_is_zero_where_the_synthetic_images_are_the_real_ones() -> None:
    ctx = make_context(augment=STRATEGY, ipc=min(COUNTS))
    method, small = DSA(num_steps=1), COUNTS.index(min(COUNTS))
    state = begin(method, ctx)
    losses = [method.loss(ctx, state, 0, c).item() for c in method.parts(ctx)]
    assert losses[small] < 1e-2  # 1e-6 in the denominator, once a row
    assert all(loss > 10 * losses[small] for c, loss in enumerate(losses) if c != small)


def test_a_zero_learning_rate_leaves_the_images_alone() -> None:
    ctx, method = make_context(), DC(num_steps=2, outer_loop=2, inner_epochs=1, optim=Optim(lr=0.0))
    start = begin(method, ctx).syn()[0]
    for record, images in run(method, ctx):
        assert record["grad_latents"] > 0
        assert torch.equal(images, start)


def test_a_pair_gets_one_draw_and_every_class_and_step_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx, method = make_context(augment="color_scale_rotate"), DSA(num_steps=2, outer_loop=1)
    seen: list[tuple[int, dict[str, Tensor]]] = []
    apply = Augment.apply

    def record(self: Augment, x: Tensor, params: Any) -> Tensor:
        seen.append((len(x), params.values))
        return apply(self, x, params)

    monkeypatch.setattr(Augment, "apply", record)
    list(run(method, ctx))
    pairs = list(zip(seen[::2], seen[1::2], strict=True))
    assert [(len_real, len_syn) for (len_real, _), (len_syn, _) in pairs] == [(n, 2) for n in COUNTS * 2]
    for (_, real), (_, syn) in pairs:
        assert real.keys() == syn.keys()
        assert all(len(real[op]) == 1 and torch.equal(real[op], syn[op]) for op in real)
    assert len({str(real) for (_, real), _ in pairs}) == len(pairs)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies, since a step changes the weights of the student in place."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def test_a_student_is_trained_between_updates_and_replaced_after_the_last() -> None:
    ctx = make_context()
    method = DC(num_steps=6, outer_loop=3, inner_epochs=1)
    state, fresh = begin(method, ctx), []
    students = [copied(state.params)]
    for step in range(6):
        method.step(ctx, state, step)
        students.append(copied(state.params))
        fresh.append(same(state.params, ctx.task.network.init(ctx.rng, "student", step + 1).params))
    assert fresh == [False, False, True, False, False, True]
    assert not any(same(students[i], students[i + 1]) for i in range(6))


def test_a_student_without_epochs_stays_as_it_is() -> None:
    ctx, method = make_context(), DC(num_steps=2, outer_loop=3, inner_epochs=0)
    state = begin(method, ctx)
    before = copied(state.params)
    method.step(ctx, state, 0)
    assert same(state.params, before)


def test_the_student_is_trained_on_the_updated_images(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx, method = make_context(), DC(num_steps=1, outer_loop=2, inner_epochs=1)
    seen: list[Tensor] = []
    train = dc.Trainer.run

    def record(self: Any, weights: Any, source: Any, **rest: Any) -> Any:
        seen.append(source.images)
        return train(self, weights, source, **rest)

    monkeypatch.setattr(dc.Trainer, "run", record)
    (_, images), *_ = run(method, ctx)
    assert not torch.equal(images, begin(method, ctx).syn()[0])
    assert torch.equal(seen[0], images)


def test_batch_norm_is_frozen_at_statistics_of_real_images_while_matching() -> None:
    ctx = make_context("convnet:depth=1,norm=batch,width=8")
    method = DC(num_steps=1, outer_loop=1)
    state = begin(method, ctx)
    untouched = ctx.task.network.init(ctx.rng, "student", 0).buffers
    mean = next(name for name in state.buffers if name.endswith("running_mean"))
    assert not torch.equal(state.buffers[mean], untouched[mean])
    before = copied(state.buffers)
    loss = method.loss(ctx, state, 0, 0)
    assert same(state.buffers, before)
    state.buffers = {**state.buffers, mean: state.buffers[mean] + 1}
    assert method.loss(ctx, state, 0, 0) != loss


def test_starts_from_noise_and_from_real_images() -> None:
    ctx = make_context()
    assert torch.equal(DC().init(ctx).syn()[0], ctx.initial("noise")[0])
    assert torch.equal(DSA().init(ctx).syn()[0], ctx.initial("real")[0])


def test_descends_from_noise() -> None:
    method = DC(num_steps=40, outer_loop=1, optim=Optim(lr=1.0))
    losses = [record["loss"] for record, _ in run(method, make_context())]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_a_step_needs_nothing_but_the_state_and_its_number() -> None:
    ctx = make_context("convnet:depth=1,norm=batch,width=8", STRATEGY)
    method = DSA(num_steps=5, batch_real=4, outer_loop=3, inner_epochs=1)
    *_, (_, expected) = run(method, ctx)
    saved = begin(method, ctx)
    for step in range(2):
        method.step(ctx, saved, step)
    state = begin(method, ctx)
    state.syn.load_state_dict(saved.syn.state_dict())
    state.optimisers["latents"].load_state_dict(saved.optimisers["latents"].state_dict())
    state.params, state.buffers = (
        {name: t.clone() for name, t in tensors.items()} for tensors in (saved.params, saved.buffers)
    )
    for step in range(2, 5):
        method.step(ctx, state, step)
    assert torch.equal(state.syn()[0], expected)


def test_the_global_generator_is_left_alone_and_the_seed_matters() -> None:
    method, before = DSA(num_steps=2), torch.get_rng_state()
    *_, (_, images) = run(method, make_context(augment=STRATEGY))
    assert torch.equal(torch.get_rng_state(), before)
    *_, (_, others) = run(method, make_context(augment=STRATEGY, seed=1))
    assert not torch.equal(images, others)


def test_learns_soft_labels_and_through_a_decoder() -> None:
    ctx = make_context(ipc=1, decode=Factor(factor=2), labels=Logits())
    *_, (record, images) = run(DC(num_steps=2, outer_loop=2, inner_epochs=1), ctx)
    assert images.shape == (12, 1, 8, 8)
    assert record["grad_latents"] > 0
    assert record["grad_labels"] > 0


@pytest.mark.parametrize("network", ["convnet:depth=1,width=8", "convnet:depth=1,width=8,norm=batch"])
@pytest.mark.parametrize("compute", [Compute(vmap_batch=4), Compute(vmap_batch=99), Compute(micro_batch=1)], ids=str)
def test_classes_together_or_in_pieces_change_nothing(compute: Compute, network: str) -> None:
    method = DSA(num_steps=3, batch_real=5, outer_loop=2, inner_epochs=1)
    usual, other = (
        list(run(method, make_context(network, augment=STRATEGY, compute=c, dtype=torch.float64)))
        for c in (Compute(), compute)
    )
    for (record, a), (expected, b) in zip(other, usual, strict=True):
        assert record["loss"] == pytest.approx(float(expected["loss"]), rel=1e-6)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("vmap_batch", "calls"), [(None, 3), (4, 2), (6, 1)])
def test_classes_share_a_call_as_far_as_the_batch_allows(
    vmap_batch: int | None, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sequence[int]] = []
    losses = DSA.losses

    def spy(self: DSA, ctx: Context, state: Any, step: int, parts: Sequence[int]) -> Tensor:
        seen.append(parts)
        return losses(self, ctx, state, step, parts)

    monkeypatch.setattr(DSA, "losses", spy)
    list(run(DSA(num_steps=1, batch_real=5), make_context(ipc=2, compute=Compute(vmap_batch=vmap_batch))))
    assert len(seen) == calls and [c for parts in seen for c in parts] == [0, 1, 2]


def test_autocast_acts_on_first_order_work_alone() -> None:
    method = DC(num_steps=1, batch_real=6)
    exact, rough = (
        float(next(run(method, make_context(compute=Compute(autocast=kind))))[0]["loss"])
        for kind in ("none", "bfloat16")
    )
    assert rough != exact
    assert rough == pytest.approx(exact, rel=0.05)


def test_sets_of_dsa_are_meant_for_longer_training() -> None:
    task = make_context().task
    assert DC().training(task).num_epochs == 300
    assert DSA().training(task).num_epochs == 1000


@pytest.mark.parametrize(("kind", "augment"), [(DC, "none"), (DSA, "dsa")])
def test_recipes_hold_the_published_values(kind: type[DC] | type[DSA], augment: str) -> None:
    method = kind.__name__.lower()
    recipes = {name: named(name) for name in catalog.recipes() if name.split("-")[0] == method}
    for dataset in ("mnist", "fashion-mnist", "cifar10"):
        for ipc in (1, 10, 50):
            recipe = recipes.pop(f"{method}-{dataset}-ipc{ipc}")
            assert (recipe.dataset, recipe.ipc, recipe.augment) == (dataset, ipc, augment)
            assert recipe.method == kind(num_steps=1000 * ipc, optim=Optim(lr=0.1, momentum=0.5))
    general = recipes.pop(method)
    assert (general.method, general.augment) == (kind(), augment)
    assert [name.rsplit("-", 1)[0] for name in recipes] == [f"{method}-digits"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_steps": 0}, "method.num_steps"),
        ({"batch_real": 0}, "method.batch_real"),
        ({"batch_student": 0}, "method.batch_student"),
        ({"outer_loop": 0}, "method.outer_loop"),
        ({"inner_epochs": -1}, "method.inner_epochs"),
        ({"lr_student": 0.0}, "method.lr_student"),
        ({"distance": "cosin"}, "did you mean 'cosine'"),
    ],
)
def test_refuses_values_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DC(**fields)


@pytest.mark.slow
def test_compiled_agrees_with_eager() -> None:
    method = DSA(num_steps=3, batch_real=5, outer_loop=2, inner_epochs=1)
    eager, compiled = (
        list(run(method, make_context(augment=STRATEGY, compute=Compute(compile=on)))) for on in (False, True)
    )
    for (_, a), (_, b) in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
