"""KIP and Label Solve against the slow twin, and what closed-form regression implies."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from condense import api, catalog
from condense.augment import Augment
from condense.compute import Compute
from condense.data.datasets import load
from condense.kernels import centred
from condense.method import Context, GradientState, Optim
from condense.methods.kip import KIP
from condense.networks import Functional
from condense.recipe import Recipe, named
from condense.rng import Draws, Rng
from condense.synthetic import Decode, Factor, Hard, Labels, Logits, Origin, Pixels, Targets
from condense.task import Labelled, Split, Task, make_task
from tests.reference.kip import kip, matrix, one_hot_less_mean

COUNTS = (5, 9, 7)


def make_context(
    augment: str = "none",
    ipc: int = 2,
    decode: Decode | None = None,
    labels: Labels | None = None,
    network: str = "mlp",
    seed: int = 0,
    val_fraction: float = 0.0,
    counts: tuple[int, ...] = COUNTS,
) -> Context:
    """Three classes of random 1x4x4 images, in float64."""
    classes = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    images = torch.rand(len(classes), 1, 4, 4, generator=torch.Generator().manual_seed(0))
    task = make_task(
        load((images, classes)),
        transform="channel",
        split=Split(val_fraction=val_fraction),
        network=Functional(network, (1, 4, 4), 3, dtype=torch.float64),
        augment=Augment.parse(augment),
        device=torch.device("cpu"),
    )
    task = dataclasses.replace(task, train=Labelled(task.train.images[:].double(), task.train.labels))
    return context(task, ipc, decode, labels, seed)


def context(task: Task, ipc: int, decode: Decode | None, labels: Labels | None, seed: int = 0) -> Context:
    origin = Origin(dataset=task.dataset(), transform=task.transform.describe())
    return Context(task, Rng(seed), ipc, decode or Pixels(), labels or Hard(), Compute(), origin)


def begin(method: KIP, ctx: Context) -> GradientState:
    state = method.init(ctx)
    state.syn.double()
    return state


def run(method: KIP, ctx: Context) -> Iterator[tuple[dict[str, float], Tensor, Tensor]]:
    state = begin(method, ctx)
    for step in range(method.num_steps):
        record = method.step(ctx, state, step)
        images, targets = (t.detach().clone() for t in state.syn())
        yield record, images, targets


@pytest.mark.parametrize("kernel", ["ntk", "nngp"])
@pytest.mark.parametrize(("augment", "labels"), [("none", Hard()), ("crop_scale", Targets())])
def test_agrees_with_the_slow_twin_step_by_step(kernel: Any, augment: str, labels: Labels) -> None:
    ctx = make_context(augment, labels=labels)
    method = KIP(num_steps=4, kernel=kernel, depth=2, batch_real=12, ridge=1e-3)

    def real(step: int) -> tuple[Tensor, Tensor]:
        drawn = [ctx.task.train.draw(c, 4, ctx.rng("real", step, c)) for c in range(3)]
        return torch.cat(drawn), torch.arange(3).repeat_interleave(4)

    def treatment(step: int, x: Tensor) -> Tensor:
        drawn = ctx.task.augment.sample(ctx.rng("augment", step), len(x), ctx.task.input_shape, siamese=False)
        return ctx.task.augment.apply(x, drawn)

    images, _ = begin(method, ctx).syn()
    twin = kip(
        images.detach(),
        one_hot_less_mean(torch.arange(3).repeat_interleave(2), 3),
        4,
        real=real,
        augment=treatment,
        kernel=kernel,
        depth=2,
        w_std=method.w_std,
        b_std=method.b_std,
        ridge=1e-3,
        lr=method.optim.lr,
        lr_labels=method.optim_labels.lr,
        learn_labels=labels.learned,
    )
    previous = images
    for (record, found, targets), (loss, expected, y) in zip(run(method, ctx), twin, strict=True):
        assert record["loss"] == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        if labels.learned:
            torch.testing.assert_close(targets, y, rtol=1e-6, atol=1e-7)
        assert (found - previous).abs().max() > 1e-3
        previous = found


def test_the_batch_has_as_many_of_every_class_and_all_of_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx, seen = make_context(), []
    draw = Labelled.draw

    def spy(self: Labelled, label: int, num: int, draws: Draws) -> Tensor:
        images = draw(self, label, num, draws)
        seen.append((label, len(images)))
        return images

    monkeypatch.setattr(Labelled, "draw", spy)
    method = KIP(num_steps=1, batch_real=21)
    state = begin(method, ctx)
    seen.clear()
    method.loss(ctx, state, 0, 0)
    assert seen == [(0, 5), (1, 7), (2, 7)]


def test_the_loss_is_nothing_where_the_set_is_the_real_images() -> None:
    ctx, method = make_context(ipc=5, counts=(5, 5, 5)), KIP(num_steps=1, ridge=1e-10)
    assert method.loss(ctx, begin(method, ctx), 0, 0).item() < 1e-12
    smaller = make_context(ipc=4, counts=(5, 5, 5))
    assert method.loss(smaller, begin(method, smaller), 0, 0).item() > 1e-4


def test_gradients_are_finite_where_a_synthetic_image_equals_a_real_one() -> None:
    ctx, method = make_context(ipc=5), KIP(num_steps=2, ridge=1e-4)
    for record, images, _ in run(method, ctx):  # begins at real images, and meets all of class 0
        assert 0 < record["grad_latents"] < 100 and images.isfinite().all()


def test_soft_labels_are_centred_and_stay_probabilities() -> None:
    ctx = make_context(labels=Logits(confidence=0.999999))
    hard = make_context()
    method = KIP(num_steps=1, ridge=1e-3)
    losses = [method.loss(c, begin(method, c), 0, 0).item() for c in (ctx, hard)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    *_, (record, _, targets) = run(dataclasses.replace(method, num_steps=2), ctx)
    assert record["grad_labels"] > 0
    torch.testing.assert_close(targets.sum(1), torch.ones(6, dtype=targets.dtype))


def test_learns_through_a_decoder_and_mirrored_images() -> None:
    ctx = make_context("none:flips=true", ipc=1, decode=Factor(factor=2), labels=Targets())
    *_, (record, images, targets) = run(KIP(num_steps=2, ridge=1e-3), ctx)
    assert images.shape == (12, 1, 4, 4) and targets.shape == (12, 3)
    assert record["grad_latents"] > 0 and record["grad_labels"] > 0


def solved(ctx: Context, **fields: Any) -> tuple[KIP, GradientState, Tensor]:
    method = KIP(num_steps=1, optim=Optim(lr=0.0), solve_labels=True, **fields)
    state = begin(method, ctx)
    before = {name: t.clone() for name, t in state.syn.state_dict().items()}
    stored = method.finalize(ctx, state, 0)
    assert all(torch.equal(t, before[name]) for name, t in state.syn.state_dict().items())
    assert torch.equal(stored.latents, state.syn.latents)
    return method, state, stored()[1].detach()


def test_solved_labels_are_the_published_pseudo_inverse() -> None:
    """y_s = (K_ss + lambda I) pinv(K_ts) y_t."""
    ctx = make_context(labels=Targets())
    method, state, targets = solved(ctx, ridge=1e-3)
    images, settings = state.syn()[0].detach(), ("ntk", 1, method.w_std, method.b_std)
    k_ss, k_ts = matrix(images, images, *settings), matrix(ctx.task.train.images[:], images, *settings)
    ridged = k_ss + 1e-3 * k_ss.trace() / len(k_ss) * torch.eye(len(k_ss), dtype=k_ss.dtype)
    expected = ridged @ torch.linalg.pinv(k_ts) @ one_hot_less_mean(ctx.task.train.labels, 3)
    torch.testing.assert_close(targets, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("augment", "decode"), [("none", Pixels()), ("none:flips=true", Factor(factor=2))])
def test_no_other_labels_fit_better_than_the_solved_ones(augment: str, decode: Decode) -> None:
    ctx = make_context(augment, ipc=1, labels=Targets(), decode=decode)
    method, state, _ = solved(ctx, ridge=1e-3)
    best = method.finalize(ctx, state, 0)
    wanted = centred(ctx.task.train.labels, 3)

    def error() -> float:
        return (method.predict(ctx, best, ctx.task.train.images) - wanted).square().sum().item()

    least, (values,) = error(), best.leaves()["labels"]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        step = 0.01 * torch.randn(values.shape, generator=generator, dtype=values.dtype)
        with torch.no_grad():
            values += step
        assert error() > least
        with torch.no_grad():
            values -= step


@pytest.mark.parametrize("labels", [Hard(), Logits()])
def test_solved_labels_need_a_place_that_holds_any_value(labels: Labels) -> None:
    reason = KIP(solve_labels=True).incompatibility(Pixels(), labels, "channel")
    assert reason is not None and reason.endswith("; give labels='targets'")
    assert KIP(solve_labels=True).incompatibility(Pixels(), Targets(), "channel") is None


def test_the_regression_is_logged_where_images_are_held_out() -> None:
    ctx = make_context(val_fraction=0.3)
    method = KIP(num_steps=13, batch_real=9)
    logged = [record.get("val_regression") for record, *_ in run(method, ctx)]
    assert [step for step, value in enumerate(logged) if value is not None] == [9, 12]
    assert not any("val_regression" in record for record, *_ in run(method, make_context()))


def test_the_regression_reads_digits_and_gets_better(tmp_path: Path) -> None:
    """Of ten images a class, on digits that were held out: the accuracy of the infinitely wide network itself."""
    method = KIP(num_steps=40, optim=Optim(kind="adam", lr=0.02, momentum=0.9), batch_real=500)
    plan = Recipe(method=method, network="mlp", ipc=10, augment="none", split=Split(val_fraction=0.25))
    api.run(plan, api.RunOptions(out=tmp_path / "run", device="cpu"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["val_regression"] > 0.95
    assert lines[-1]["loss"] < lines[0]["loss"] / 2


def test_a_step_needs_nothing_but_the_state_and_its_number() -> None:
    ctx, method = make_context("crop_scale", labels=Targets()), KIP(num_steps=4, batch_real=9)
    *_, (_, expected, _) = run(method, ctx)
    saved = begin(method, ctx)
    for step in range(2):
        method.step(ctx, saved, step)
    state = begin(method, ctx)
    state.syn.load_state_dict(saved.syn.state_dict())
    for name, optimiser in state.optimisers.items():
        optimiser.load_state_dict(saved.optimisers[name].state_dict())
    for step in range(2, 4):
        method.step(ctx, state, step)
    assert torch.equal(state.syn()[0], expected)


def test_the_global_generator_is_left_alone_and_the_seed_matters() -> None:
    method, before = KIP(num_steps=2, batch_real=9), torch.get_rng_state()
    *_, (_, images, _) = run(method, make_context())
    assert torch.equal(torch.get_rng_state(), before)
    *_, (_, others, _) = run(method, make_context(seed=1))
    assert not torch.equal(images, others)


def test_starts_from_real_images_and_from_noise() -> None:
    ctx = make_context()
    for kind in ("real", "noise"):
        assert torch.equal(KIP(start=kind).init(ctx).syn()[0], ctx.initial(kind)[0].float())  # type: ignore[arg-type]


def test_recipes_hold_the_published_values() -> None:
    recipes = {name: named(name) for name in catalog.recipes() if name.split("-")[0] == "kip"}
    del recipes["kip-digits-ipc10"]
    published = KIP(num_steps=1000, batch_real=5000, optim=Optim(kind="adam", lr=0.04, momentum=0.9))
    assert (published.kernel, published.depth, published.ridge, published.b_std) == ("ntk", 1, 1e-6, 0.1)
    for dataset, transform in (("mnist", "channel"), ("fashion-mnist", "channel"), ("cifar10", "zca-relative")):
        for ipc in (1, 10, 50):
            recipe = recipes.pop(f"kip-{dataset}-ipc{ipc}")
            assert (recipe.dataset, recipe.ipc, recipe.transform) == (dataset, ipc, transform)
            assert recipe.method == published and recipe.augment == "none"
    assert recipes.pop("kip").method == published
    assert not recipes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_steps": 0}, "method.num_steps"),
        ({"batch_real": 0}, "method.batch_real"),
        ({"depth": -1}, "method.depth"),
        ({"ridge": 0.0}, "method.ridge"),
        ({"w_std": 0.0}, "method.w_std"),
        ({"b_std": -0.1}, "method.b_std"),
    ],
)
def test_refuses_values_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KIP(**fields)
