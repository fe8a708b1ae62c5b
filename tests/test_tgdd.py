"""TGDD against its slow twin, and what its objective and draws imply."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from condense import catalog
from condense.artifacts import find
from condense.augment import Augment
from condense.compute import Compute
from condense.method import Context, GradientMethod, Optim
from condense.methods.dm import DM
from condense.methods.mtt import experts_of
from condense.methods.tgdd import TGDD, ExpertState
from condense.networks import Network, Weights, build
from condense.recipe import named
from condense.rng import Rng
from condense.schedule import Schedule
from condense.synthetic import Decode, Factor, Hard, Labels, Origin, Pixels
from condense.synthetic.labels import Teacher
from condense.train import Training
from tests.reference.tgdd import tgdd
from tests.test_mtt import make_task_of_three, write_buffer

STRATEGY = "color_crop_cutout_flip_scale_rotate:mode=D"
MATCHED = "color_crop_cutout:mode=D"

MakeContext = Callable[..., Context]


def small(**fields: Any) -> TGDD:
    usual = {"num_steps": 5, "batch_real": 5, "last_epoch": 4, "interval": 2, "optim": Optim(lr=1.0), "clamp": False}
    return TGDD(**usual | fields)


def context_of(
    folder: Path,
    augment: str = STRATEGY,
    decode: Decode | None = None,
    labels: Labels | None = None,
    compute: Compute | None = None,
) -> Context:
    """A context of three classes with a buffer of two experts of five epochs in ``folder``."""
    task = make_task_of_three(augment, torch.float32)
    if not any(folder.iterdir()):
        write_buffer(folder, task)
    (spec,) = small().needs(task).values()
    return Context(
        task,
        Rng(0),
        1,
        decode or Factor(factor=2),
        labels or Hard(),
        compute or Compute(),
        Origin(dataset=task.dataset(), transform=task.transform.describe()),
        {"experts": spec.open(find(folder, spec, task.name))},
    )


@pytest.fixture
def make_context(tmp_path: Path) -> MakeContext:
    return functools.partial(context_of, tmp_path)


def run(method: GradientMethod, ctx: Context) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """The record and the latents after each step."""
    state = method.init(ctx)
    for step in range(method.num_steps):
        record = method.step(ctx, state, step)
        yield record, state.syn.latents.detach().clone()


def siamese(ctx: Context) -> Callable[[int, int, Tensor], Tensor]:
    """The augmentation that real and synthetic images of a step and class share."""
    matched = Augment.parse(MATCHED if ctx.task.augment.ops else "none")

    def augment(step: int, c: int, x: Tensor) -> Tensor:
        drawn = matched.sample(ctx.rng("siamese", step, c), 1, ctx.task.input_shape, siamese=True)
        return matched.apply(x, drawn)

    return augment


def twin(method: TGDD, ctx: Context, lr: float, momentum: float) -> Iterator[tuple[float, list[Tensor]]]:
    task, draws = ctx.task, ctx.rng

    def loaded(expert: int, epoch: int) -> Network:
        network = build(task.network.name, task.input_shape, task.num_classes)
        network.load_state_dict(experts_of(ctx).snapshot(expert, epoch))
        return network.eval()

    def checkpoints(step: int) -> tuple[Network, Network]:
        drawn = draws("checkpoints", step)
        expert, start = drawn.integer(0, 2), drawn.integer(0, 5)
        return loaded(expert, start), loaded(expert, drawn.integer(start, min(start + 2, 5)))

    return tgdd(
        list(method.init(ctx).syn.latents.detach().split(1)),
        method.num_steps,
        factor=getattr(ctx.decode, "factor", 1),
        checkpoints=checkpoints,
        real=lambda step, c: task.train.draw(c, method.batch_real, draws("real", step, c)),
        augment=siamese(ctx),
        weight=method.weight,
        lr=lr,
        momentum=momentum,
    )


@pytest.mark.parametrize("decode", [Pixels(), Factor(factor=2)], ids=lambda decode: decode.name)
@pytest.mark.parametrize("augment", ["none", STRATEGY])
def test_steps_of_all_classes_equal_the_published_steps_of_one(
    augment: str, decode: Decode, make_context: MakeContext
) -> None:
    """With momentum m^C and lr (1 - m^C) / (1 - m) for C classes: seen from a class's own turns nothing differs."""
    ctx, lr, m = make_context(augment, decode), 0.5, 0.5
    method = small(optim=Optim(lr=lr * (1 - m**3) / (1 - m), momentum=m**3))
    previous = method.init(ctx).syn.latents.detach()
    for (record, latents), (loss, expected) in zip(run(method, ctx), twin(method, ctx, lr, m), strict=True):
        assert record["loss"] == pytest.approx(loss, rel=1e-4)
        torch.testing.assert_close(latents, torch.cat(expected), rtol=1e-4, atol=1e-4)
        assert (latents - previous).abs().max() > 1e-3
        previous = latents


def test_both_checkpoints_are_of_one_expert_and_cover_their_ranges(make_context: MakeContext) -> None:
    ctx, method = make_context(), small(interval=3)
    known = {
        weights.params["classifier.bias"].sum().item(): (expert, epoch)
        for expert in range(2)
        for epoch in range(5)
        for weights in [experts_of(ctx).weights(expert, ctx.task.network, epoch)]
    }
    drawn = set()
    for step in range(300):
        first, later = (known[w.params["classifier.bias"].sum().item()] for w in method.networks(ctx, step))
        assert first[0] == later[0]
        drawn.add((*first, later[1]))
    assert drawn == {(m, s, e) for m in range(2) for s in range(5) for e in range(s, min(s + 3, 5))}


def test_each_step_has_the_checkpoints_of_its_number(make_context: MakeContext) -> None:
    ctx, method = make_context(), small()
    state = method.init(ctx)
    for step in range(3):
        for mine, drawn in zip(held(state), method.networks(ctx, step), strict=True):
            assert all(torch.equal(mine.params[name], p) for name, p in drawn.params.items())
        method.step(ctx, state, step)


def held(state: ExpertState) -> tuple[Weights, Weights]:
    return Weights(state.params, state.buffers), Weights(state.classifier_params, state.classifier_buffers)


def test_without_the_cross_entropy_it_is_dm_under_a_checkpoint(make_context: MakeContext) -> None:
    ctx = make_context("crop_color:mode=M")
    method, plain = small(weight=0.0), DM(batch_real=5)
    state = method.init(ctx)
    for part in method.parts(ctx):
        torch.testing.assert_close(method.loss(ctx, state, 0, part), plain.loss(ctx, state, 0, part))


def test_images_that_are_wrongly_classified_cost_more(make_context: MakeContext) -> None:
    ctx, method = make_context("none"), small(weight=1.0, last_epoch=1, interval=1)
    state = method.init(ctx)
    losses = []
    for shift in (0.0, 5.0):
        state.classifier_params["classifier.bias"][0] = shift
        losses.append([method.loss(ctx, state, 0, c).item() for c in range(3)])
    assert losses[1][0] < losses[0][0] and all(losses[1][c] > losses[0][c] for c in (1, 2))


@pytest.mark.parametrize("micro_batch", [1, 3, 99])
def test_micro_batches_change_nothing(micro_batch: int, make_context: MakeContext) -> None:
    """Four decoded images of a class in pieces, or all classes together."""
    usual, other = (
        list(run(small(num_steps=3), make_context(compute=c))) for c in (Compute(), Compute(micro_batch=micro_batch))
    )
    for (record, a), (expected, b) in zip(other, usual, strict=True):
        assert record["loss"] == pytest.approx(float(expected["loss"]), rel=1e-5)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_experts_at_their_last_epoch_label_the_images(make_context: MakeContext) -> None:
    ctx, method = make_context(labels=Teacher()), small(num_steps=1)
    state = method.init(ctx)
    syn = method.finalize(ctx, state, 1)
    images, targets = syn()
    network, experts = ctx.task.network, experts_of(ctx)
    answers = [network.logits(*experts.weights(e, network, 4), images, train=False).softmax(1) for e in range(2)]
    labels = torch.stack(answers).mean(0).unflatten(0, (-1, len(syn))).mean(0)
    torch.testing.assert_close(targets, labels.repeat(4, 1))


def test_networks_are_trained_with_cutmix_in_place_of_cutout(make_context: MakeContext) -> None:
    task = make_context().task
    schedule = Schedule(drop_at=(2 / 3, 5 / 6), drop_factor=0.2)
    assert TGDD().training(task) == Training(num_epochs=1500, batch_size=64, schedule=schedule, cutmix=0.5)
    assert TGDD().training_augment(task) == Augment.parse("color_crop_flip_scale_rotate:mode=D")


def test_a_buffer_with_an_epoch_too_few_is_refused(tmp_path: Path) -> None:
    task = make_task_of_three("none", torch.float32)
    write_buffer(tmp_path, task, num_epochs=5)
    (spec,) = small(last_epoch=6).needs(task).values()
    with pytest.raises(ValueError, match="num_epochs is 5, less than 6"):
        find(tmp_path, spec, task.name)


def test_recipes_hold_the_published_values() -> None:
    recipes = {name: named(name) for name in catalog.recipes() if name.split("-")[0] == "tgdd"}
    assert recipes.pop("tgdd").method == TGDD(num_steps=10000, batch_real=128, last_epoch=60, interval=7, weight=2.5)
    assert [recipes.pop(f"tgdd-digits-ipc{ipc}").decode for ipc in (1, 10)] == [Pixels()] * 2
    stds = {"cifar10": (0.2023, 0.1994, 0.2010), "cifar100": (0.2673, 0.2564, 0.2762)}
    for plan in recipes.values():
        method, num_classes = plan.method, {"cifar10": 10, "cifar100": 100}[plan.dataset]
        assert isinstance(method, TGDD) and plan.decode == Factor(factor=2) and plan.augment == "dsa:mode=D"
        lr = 0.01 * plan.ipc * (1 - 0.5**num_classes) / 0.5 / (sum(stds[plan.dataset]) / 3) ** 2
        assert (method.optim.lr, method.optim.momentum) == (pytest.approx(lr, rel=5e-3), 0.0)
        assert method.weight == (0.5 if plan.ipc == 50 else 2.5)
    assert set(recipes) == {
        f"tgdd-{name}" for name in ("cifar10-ipc1", *(f"{d}-ipc{k}" for d in stds for k in (10, 50)))
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"last_epoch": 0}, "method.last_epoch must be at least 1"),
        ({"interval": 0}, "method.interval must be at least 1"),
        ({"weight": -1.0}, "method.weight must be at least 0"),
        ({"matched": ("crop", "warp")}, "unknown operation 'warp'"),
    ],
)
def test_refuses_bad_values(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**fields)
