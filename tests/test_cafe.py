"""CAFE against its slow twin, and what its objective and its two loops imply."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from condense import catalog
from condense.compute import Compute
from condense.method import Context, Optim
from condense.methods.cafe import CAFE, CAFEState, Levels, discrimination
from condense.networks import Functional, Network, Weights, build
from condense.recipe import named
from condense.schedule import Schedule
from condense.synthetic import Factor
from condense.task import Labelled
from condense.train import Training
from tests.reference.cafe import cafe
from tests.test_dm import COUNTS, DSA, make_context

NETWORK, BATCH = "convnet:depth=2,width=4", "convnet:depth=2,norm=batch,width=4"


def small(**fields: Any) -> CAFE:
    usual = {"num_steps": 6, "batch_real": 5, "batch_probe": 5, "batch_student": 4, "lr_student": 0.1}
    usual |= {
        "window": 3,
        "max_epochs": 3,
        "max_updates": 4,
        "optim": Optim(lr=0.02, schedule=Schedule(drop_at=(0.6, 0.8, 0.9), drop_factor=0.5)),
    }
    return CAFE(**usual | fields)


def run(method: CAFE, ctx: Context) -> Iterator[tuple[dict[str, float], Tensor, CAFEState]]:
    state = method.init(ctx)
    for step in range(method.num_steps):
        record = method.step(ctx, state, step)
        yield record, state.syn()[0].detach().clone(), state


def losses(method: CAFE, ctx: Context) -> list[float]:
    return [float(record["loss"]) for record, _, _ in run(method, ctx)]


def twin(method: CAFE, ctx: Context) -> Iterator[tuple[float, list[Tensor], int]]:
    task, augment, draws = ctx.task, ctx.task.augment, ctx.rng

    def network(step: int) -> Network:
        student = build(task.network.name, task.input_shape, task.num_classes).to(task.network.dtype)
        weights = task.network.init(draws, "student", step)
        student.load_state_dict({**weights.params, **weights.buffers})
        return student

    def siamese(step: int, c: int, x: Tensor) -> Tensor:
        drawn = augment.sample(draws("siamese", step, c), 1, task.input_shape, siamese=True)
        return augment.apply(x, drawn)

    def batches(step: int, epoch: int) -> list[tuple[Tensor, Callable[[Tensor], Tensor]]]:
        rng = draws.child("training", f"{step}/{epoch}")
        order = rng("order", 0).permutation(ctx.ipc * task.num_classes)

        def treatment(batch: int, num: int) -> Callable[[Tensor], Tensor]:
            drawn = augment.sample(rng("augment", 0, batch), num, task.input_shape, siamese=False)
            return lambda x: augment.apply(x, drawn)

        return [(i, treatment(batch, len(i))) for batch, i in enumerate(order.split(method.batch_student))]

    depth = sum(
        name.startswith("features") and name.endswith("weight") and len(shape) == 4
        for name, shape in task.network.shapes.items()
    )
    return cafe(
        list(method.init(ctx).syn()[0].detach().split(ctx.ipc)),
        method.num_steps,
        network=network,
        real=lambda step, c: task.train.draw(c, method.batch_real, draws("real", step, c)),
        augment=siamese,
        probe=lambda step, epoch, c: task.train.draw(c, method.batch_probe, draws("probe", step, f"{epoch}/{c}")),
        batches=batches,
        mixed="norm=batch" in task.network.name,
        weights=[*[0.1] * (depth - 1), 1.0, 1.0, 1.0],
        beta=0.01,
        window=method.window,
        moved=method.moved,
        settled=method.settled,
        max_epochs=method.max_epochs,
        max_updates=method.max_updates,
        lr=method.optim.lr,
        halve_at=method.optim.schedule.drop_at,
        momentum=method.optim.momentum,
        lr_student=method.lr_student,
    )


@pytest.mark.parametrize(("network", "augment"), [(NETWORK, "none"), (NETWORK, DSA), (BATCH, "none")])
def test_agrees_with_the_slow_twin_step_by_step(network: str, augment: str) -> None:
    ctx, method = make_context(network, augment), small(num_steps=8, window=2, max_epochs=5)
    previous, lived = method.init(ctx).syn()[0], []
    for (record, images, state), (loss, expected, epochs) in zip(run(method, ctx), twin(method, ctx), strict=True):
        assert record["loss"] == pytest.approx(loss, rel=1e-4)
        torch.testing.assert_close(images, torch.cat(expected), rtol=1e-4, atol=1e-4)
        assert (images - previous).abs().max() > 1e-4
        assert (state.updates == 0) == (epochs == -1)
        previous = images
        lived.append(epochs)
    assert -1 in lived and max(lived) > 0


def watched(monkeypatch: pytest.MonkeyPatch, accuracies: Callable[[int, int], float]) -> list[tuple[int, int]]:
    """Let students have these accuracies by (step, epoch); returns which were asked for, as they come."""
    asked: list[tuple[int, int]] = []

    def accuracy(self: CAFE, ctx: Context, student: Weights, step: int, epoch: int) -> float:
        asked.append((step, epoch))
        return accuracies(step, epoch)

    monkeypatch.setattr(CAFE, "accuracy", accuracy)
    return asked


def test_a_student_is_trained_for_a_full_window_even_if_its_accuracy_has_moved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The published window of 10 makes that 10 epochs between two updates, or more."""
    asked = watched(monkeypatch, lambda step, epoch: 0.1 * epoch)
    list(run(small(num_steps=2, window=10, max_epochs=50, max_updates=9), make_context(NETWORK, "none")))
    assert asked == [(step, epoch) for step in range(2) for epoch in range(11)]


def test_the_accuracy_right_after_the_update_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = watched(monkeypatch, lambda step, epoch: 0.5 if epoch else 0.0)
    list(run(small(num_steps=1, window=3, max_epochs=7), make_context(NETWORK, "none")))
    assert len(asked) == 8


def test_a_student_is_trained_until_its_accuracy_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = watched(monkeypatch, lambda step, epoch: 0.5 + 0.06 * (epoch >= 6))
    list(run(small(num_steps=1, moved=0.05, window=3, max_epochs=9), make_context(NETWORK, "none")))
    assert len(asked) == 7


def test_only_the_last_accuracies_count(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = watched(monkeypatch, lambda step, epoch: 0.5 + 0.02 * epoch)
    list(run(small(num_steps=1, moved=0.05, window=3, max_epochs=7), make_context(NETWORK, "none")))
    assert len(asked) == 8  # three in a row never differ by more than 0.04


def test_the_epochs_are_bounded_and_may_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = watched(monkeypatch, lambda step, epoch: 0.5)
    ctx = make_context(NETWORK, "none")
    list(run(small(num_steps=1, max_epochs=5), ctx))
    assert len(asked) == 6
    method = small(num_steps=1, max_epochs=0)
    state = method.init(ctx)
    before = {name: p.clone() for name, p in state.params.items()}
    method.step(ctx, state, 0)
    assert all(torch.equal(state.params[name], p) for name, p in before.items())


def test_a_student_is_replaced_when_a_full_window_has_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    watched(monkeypatch, lambda step, epoch: [0.1, 0.4, 0.42, 0.43, 0.5, 0.5, 0.51, 0.51][step])
    method = small(num_steps=8, window=3, settled=0.04, max_epochs=1, max_updates=99)
    ctx = make_context(NETWORK, "none")
    seen = [(state.updates, len(state.accuracies)) for _, _, state in run(method, ctx)]
    assert seen == [(1, 1), (2, 2), (3, 3), (0, 0), (1, 1), (2, 2), (0, 0), (1, 1)]


def test_the_updates_of_a_student_are_bounded_and_a_fresh_one_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    watched(monkeypatch, lambda step, epoch: float(step))
    ctx, method = make_context(NETWORK, "none"), small(num_steps=5, max_updates=2, max_epochs=1)
    fresh = []
    for step, (_, _, state) in enumerate(run(method, ctx)):
        expected = ctx.task.network.init(ctx.rng, "student", step + 1).params
        fresh.append(all(torch.equal(state.params[name], p) for name, p in expected.items()))
    assert fresh == [False, True, False, True, False]


def test_planned_work_counts_the_epochs_between_two_updates() -> None:
    usual = CAFE(num_steps=1, batch_real=3, batch_probe=3)
    assert usual.estimated_work(0, 2, 5) == 2 * (1 + 11 + 11 * 5)
    assert dataclasses.replace(usual, max_epochs=1).estimated_work(0, 2, 5) == 2 * (1 + 2 + 2 * 5)


def test_accuracies_are_of_training_images_only_and_fractions() -> None:
    ctx, method = make_context(NETWORK, "none"), small(batch_probe=256)
    state = method.init(ctx)
    student = Weights(state.params, state.buffers)
    logits = ctx.task.network.logits(*student, ctx.task.train.images[:], train=False)
    expected = (logits.argmax(1) == ctx.task.train.labels).float().mean().item()
    assert method.accuracy(ctx, student, 0, 0) == pytest.approx(expected)


def test_alignment_is_zero_where_the_synthetic_images_are_the_real_ones() -> None:
    ctx = make_context(NETWORK, "none", ipc=min(COUNTS))
    train = ctx.task.train
    members = torch.cat([indices[: min(COUNTS)] for indices in train.by_class])
    task = dataclasses.replace(ctx.task, train=Labelled(train.images[members], train.labels[members]))
    ctx = dataclasses.replace(ctx, task=task)
    method = small(start="real", discrimination=0.0)
    state = method.init(ctx)
    assert method.loss(ctx, state, 0, 0)[0].item() < 1e-6
    assert small(start="real").loss(ctx, state, 0, 0)[0].item() > 1e-3
    with torch.no_grad():
        state.syn.latents[0].mul_(-1)
    assert method.loss(ctx, state, 0, 0)[0].item() > 1e-2


def test_discrimination_by_hand() -> None:
    real = [torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0]])]
    syn = [torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 3.0]])]  # means (1, 0) and (0, 3)
    found = discrimination(*([Levels([], features) for features in side] for side in (real, syn)))
    log_sums = torch.tensor([[1.0, 0.0], [0.0, 6.0], [0.0, 3.0]]).logsumexp(1)
    torch.testing.assert_close(found, (log_sums - torch.tensor([1.0, 0.0, 3.0])).sum())


def test_discrimination_moves_the_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = dict.fromkeys(("weight_early", "weight_last", "weight_features"), 0.0)
    ctx, method = make_context(NETWORK, "none"), small(**weights, discrimination=1.0)
    state = method.init(ctx)
    loss = method.loss(ctx, state, 0, 0)[0]
    loss.backward()
    assert state.syn.latents.grad is not None and state.syn.latents.grad.flatten(1).norm(dim=1).all()
    assert not any(p.requires_grad for p in state.params.values())


def test_the_loss_does_not_depend_on_the_order_of_the_classes() -> None:
    ctx, method = make_context(NETWORK, "none"), small(batch_real=256)
    state = method.init(ctx)
    loss = method.loss(ctx, state, 0, 0)[0]
    order = torch.tensor([2, 0, 1])  # new class i was class order[i]
    train = ctx.task.train
    task = dataclasses.replace(ctx.task, train=Labelled(train.images, order.argsort()[train.labels]))
    renamed = dataclasses.replace(ctx, task=task)
    with torch.no_grad():
        state.syn.latents.copy_(state.syn.latents.unflatten(0, (3, 2))[order].flatten(0, 1))
    torch.testing.assert_close(method.loss(renamed, state, 0, 0)[0], loss, rtol=1e-4, atol=1e-4)


def test_every_weight_weighs_its_part() -> None:
    ctx = make_context("convnet:depth=3,width=4", "none")
    names = ("weight_early", "weight_last", "weight_features", "discrimination")

    def loss(**weights: float) -> float:
        method = small(**dict.fromkeys(names, 0.0) | weights)
        return method.loss(ctx, method.init(ctx), 0, 0)[0].item()

    alone = {name: loss(**{name: 1.0}) for name in names}
    assert all(value > 0 for value in alone.values()) and len(set(alone.values())) == 4
    usual = small()
    expected = sum(getattr(usual, name) * alone[name] for name in names)
    assert usual.loss(ctx, usual.init(ctx), 0, 0)[0].item() == pytest.approx(expected, rel=1e-4)


def test_descends_from_noise() -> None:
    method = small(num_steps=60, batch_real=9, optim=Optim(lr=0.02))
    found = losses(method, make_context(NETWORK, "none"))
    assert sum(found[-10:]) < 0.7 * sum(found[:10])


def test_images_in_pieces_change_nothing() -> None:
    usual, pieces = (
        losses(small(num_steps=3), make_context(NETWORK, compute=compute))
        for compute in (Compute(), Compute(micro_batch=2))
    )
    assert pieces == pytest.approx(usual, rel=1e-4)


def test_a_step_needs_nothing_but_the_state_and_its_number() -> None:
    ctx, method = make_context(NETWORK), small(num_steps=5)
    *_, (_, expected, _) = run(method, ctx)
    saved, state = method.init(ctx), method.init(ctx)
    for step in range(2):
        method.step(ctx, saved, step)
    state.syn.load_state_dict(saved.syn.state_dict())
    state.optimisers["latents"].load_state_dict(saved.optimisers["latents"].state_dict())
    for name in ("params", "buffers", "updates", "accuracies"):
        setattr(state, name, getattr(saved, name))
    for step in range(2, 5):
        method.step(ctx, state, step)
    assert torch.equal(state.syn()[0], expected)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    list(run(small(num_steps=2), make_context(NETWORK)))
    assert torch.equal(torch.get_rng_state(), before)


def test_learns_through_a_decoder() -> None:
    ctx = make_context(NETWORK, ipc=1, decode=Factor(factor=2))
    *_, (record, images, _) = run(small(num_steps=2), ctx)
    assert images.shape == (12, 1, 8, 8)
    assert record["grad_latents"] > 0


def test_a_network_without_maps_is_refused_before_the_first_step() -> None:
    with pytest.raises(ValueError, match=r"mlp has no feature maps: .*; give network='convnet'"):
        CAFE().init(make_context("mlp"))


def test_any_number_of_maps_will_do() -> None:
    ctx = make_context("resnet18:norm=batch", "none", ipc=1)
    assert isinstance(ctx.task.network, Functional)
    assert torch.isfinite(small().loss(ctx, small().init(ctx), 0, 0)[0])


def test_recipes_hold_the_published_values() -> None:
    recipes = {name: named(name) for name in catalog.recipes() if name.split("-")[0] == "cafe"}
    published = CAFE(
        num_steps=20000,
        start="noise",
        batch_real=256,
        batch_probe=128,
        lr_student=0.01,
        batch_student=256,
        optim=Optim(lr=0.1, momentum=0.5, schedule=Schedule(drop_at=(0.6, 0.8, 0.9), drop_factor=0.5)),
    )
    assert published == CAFE()
    names = ["cafe", *(f"cafe-cifar10-ipc{ipc}" for ipc in (1, 10, 50))]
    for name in names:
        assert recipes[name].method == published
        assert recipes[name].augment == "none"
    assert set(recipes) == {*names, "cafe-digits-ipc1"}


def test_its_sets_are_trained_on_for_longer_under_augmentation() -> None:
    plain, augmented = (CAFE().training(make_context(NETWORK, augment).task) for augment in ("none", DSA))
    assert (plain, augmented) == (Training(num_epochs=600), Training(num_epochs=1000))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_real": 0}, "method.batch_real must be at least 1, got 0; a usual value is 256"),
        ({"window": 0}, "method.window"),
        ({"max_updates": 0}, "method.max_updates"),
        ({"max_epochs": -1}, "method.max_epochs must be at least 0"),
        ({"discrimination": -0.1}, "method.discrimination"),
        ({"lr_student": 0.0}, "method.lr_student"),
    ],
)
def test_refuses_bad_values(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        CAFE(**fields)
    assert "\n" not in str(caught.value)
