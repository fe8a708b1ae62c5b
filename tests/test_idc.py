"""IDC and IDC-I against their slow twin, and what their objective and loops imply."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from condense import catalog
from condense.augment import Augment
from condense.compute import Compute
from condense.data.datasets import load
from condense.method import Context, Optim
from condense.methods.dc import StudentState
from condense.methods.idc import IDC, IDCI, IDCBase
from condense.networks import Functional, build
from condense.objective import one_hot
from condense.recipe import named
from condense.rng import Rng
from condense.schedule import Schedule
from condense.sources import Examples
from condense.synthetic import Decode, Factor, Hard, Labels, Logits, Origin, Pixels
from condense.task import Labelled, Split, make_task
from condense.train import Trainer, Training
from condense.views import cutmix
from tests.reference.idc import idc

COUNTS = (8, 11, 9)
STRATEGY = "color_crop_cutout_flip_scale_rotate:mode=D"


def make_context(
    network: str = "convnet:depth=1,width=8",
    augment: str = STRATEGY,
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


def begin(method: IDCBase, ctx: Context) -> StudentState:
    state = method.init(ctx)
    state.syn.to(ctx.task.network.dtype)
    return state


def run(method: IDCBase, ctx: Context) -> Iterator[tuple[dict[str, float], Tensor]]:
    """The record and the latents after each step."""
    state = begin(method, ctx)
    for step in range(method.num_steps):
        record = method.step(ctx, state, step)
        yield record, state.syn.latents.detach().clone()


def twin(method: IDCBase, ctx: Context, lr: float, momentum: float) -> Iterator[tuple[float, list[Tensor]]]:
    task, draws, shape, num_classes = ctx.task, ctx.rng, ctx.task.input_shape, ctx.task.num_classes
    matched, trained = (Augment.parse(f"{ops}:mode=D") for ops in ("_".join(method.matched), "color_crop"))

    def network(step: int) -> nn.Module:
        student = build(task.network.name, shape, num_classes).to(task.network.dtype)
        weights = task.network.init(draws, "student", step)
        student.load_state_dict({**weights.params, **weights.buffers})
        return student

    def siamese(step: int, c: int, x: Tensor) -> Tensor:
        return matched.apply(x, matched.sample(draws("siamese", step, c), 1, shape, siamese=True))

    def chosen(step: int, c: int, num: int) -> Tensor:
        few = num <= method.batch_syn
        return torch.arange(num) if few else draws("synthetic", step, c).permutation(num)[: method.batch_syn]

    def student_batches(step: int) -> list[tuple[Tensor, Tensor]]:
        images, classes = task.train.sample(method.num_student, draws("student images", step))
        rng, found = draws.child("training", step), []
        order = rng("order", 0).permutation(len(images))
        for batch, index in enumerate(order.split(method.batch_student)):
            drawn = trained.sample(rng("augment", 0, batch), len(index), shape, siamese=False)
            x, y = trained.apply(images[index], drawn), one_hot(classes[index], num_classes).to(images.dtype)
            found.append(cutmix(x, y, method.cutmix_student, rng("cutmix", 0, batch)))
        return found

    return idc(
        list(begin(method, ctx).syn.latents.detach().split(ctx.ipc)),
        method.num_steps,
        factor=getattr(ctx.decode, "factor", 1),
        outer_loop=method.outer_loop,
        network=network,
        statistics=lambda step: torch.cat([task.train.draw(c, 16, draws("statistics", step, c)) for c in range(3)]),
        real=lambda step, c: task.train.draw(c, method.batch_real, draws("real", step, c)),
        chosen=chosen,
        augment=siamese,
        student_batches=student_batches,
        distance=method.distance,
        lr=lr,
        momentum=momentum,
        lr_student=method.lr_student,
    )


@pytest.mark.parametrize(
    ("distance", "norm", "decode"),
    [
        ("mse-conv", "instance", Pixels()),
        ("mse-conv", "instance", Factor(factor=2)),
        ("mse-conv", "batch", Factor(factor=2)),
        ("l1-conv", "instance", Factor(factor=2)),
    ],
)
def test_steps_of_all_classes_equal_the_published_steps_of_one(distance: Any, norm: str, decode: Decode) -> None:
    """With momentum m^C and lr (1 - m^C) / (1 - m) for C classes: seen from a class's own turns nothing differs."""
    ctx = make_context(f"convnet:depth=1,norm={norm},width=8", decode=decode, dtype=torch.float64)
    lr, momentum = 1.0 if distance == "mse-conv" else 0.05, 0.5
    method = IDC(
        num_steps=5,
        optim=Optim(lr=lr * (1 - momentum**3) / (1 - momentum), momentum=momentum**3),
        clamp=False,
        distance=distance,
        base_size=8,
        batch_real=6,
        batch_syn=7,
        outer_loop=3,
        num_student=15,
        batch_student=6,
        lr_student=0.1,
        cutmix_student=0.9,
        cutmix=0.0,
    )
    previous, weight = begin(method, ctx).syn.latents.detach(), ctx.ipc / 10
    for (record, latents), (loss, expected) in zip(
        run(method, ctx), twin(method, ctx, weight * lr, momentum), strict=True
    ):
        assert record["loss"] == pytest.approx(weight * loss, rel=1e-5)
        torch.testing.assert_close(latents, torch.cat(expected), rtol=1e-5, atol=1e-6)
        assert (latents - previous).abs().max() > 1e-3
        previous = latents


def test_the_weight_follows_the_budget_and_the_size_of_the_images() -> None:
    ctx = make_context(ipc=5)
    assert IDC(base_size=8).weight(ctx) == 0.5
    assert IDC(base_size=16).weight(ctx) == 0.125
    assert IDC(base_size=8).weight(dataclasses.replace(ctx, ipc=50, decode=Factor(factor=2))) == 5
    state = begin(IDC(base_size=8), ctx)
    losses = [IDC(base_size=side).loss(ctx, state, 0, 1).item() for side in (8, 16)]
    assert losses[1] == pytest.approx(losses[0] / 4)


def small(**fields: Any) -> IDC:
    return IDC(**{"num_steps": 2, "num_student": 10, "batch_student": 5} | fields)


def test_the_student_learns_from_real_images_and_never_from_the_set() -> None:
    ctx, method, students = make_context(), small(), []
    for shift in (0.0, 1.0):
        state = begin(method, ctx)
        with torch.no_grad():
            state.syn.latents.add_(shift)
        method.step(ctx, state, 0)
        students.append(state.params)
    fresh = ctx.task.network.init(ctx.rng, "student", 0).params
    assert same(*students) and not same(students[0], fresh)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_student_keeps_its_velocity_until_it_is_replaced() -> None:
    ctx, method = make_context(), small(num_steps=6, outer_loop=3)
    state, still, fresh = begin(method, ctx), [], []
    for step in range(6):
        method.step(ctx, state, step)
        still.append(all(v.abs().max() == 0 for v in state.velocity.values()))
        fresh.append(same(state.params, ctx.task.network.init(ctx.rng, "student", step + 1).params))
    assert fresh == still == [False, False, True, False, False, True]


def test_matching_and_student_have_their_part_of_the_augmentation_each(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx, method = make_context(), small(outer_loop=2)
    seen: list[tuple[int, dict[str, Tensor]]] = []
    apply = Augment.apply

    def record(self: Augment, x: Tensor, params: Any) -> Tensor:
        seen.append((len(x), params.values))
        return apply(self, x, params)

    monkeypatch.setattr(Augment, "apply", record)
    list(run(method, ctx))
    matched, trained = [*seen[:6], *seen[8:]], seen[6:8]
    assert len(seen) == 14 and all([*values] == ["color", "crop", "cutout"] for _, values in matched)
    for (_, real), (num, syn) in zip(matched[::2], matched[1::2], strict=True):
        assert num == 2 and all(len(real[op]) == 1 and torch.equal(real[op], syn[op]) for op in real)
    assert len({str(values) for _, values in matched}) == 6
    for num, values in trained:
        assert num == 5 and [*values] == ["color", "crop"]
        assert all(len(value) == 5 for value in values.values())


def test_at_most_batch_syn_images_of_a_class_take_part_and_others_in_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx, method = make_context(augment="none", decode=Factor(factor=2)), small(batch_syn=3)
    state = begin(method, ctx)
    images, _ = state.syn(state.syn.index_of(1))
    assert len(images) == 8
    drawn = []
    for step in range(4):
        part, targets = method.synthetic(ctx, state, step, 1)
        assert targets.tolist() == [1, 1, 1]
        drawn.append([next(k for k, image in enumerate(images) if torch.equal(image, x)) for x in part])
        assert len(set(drawn[-1])) == 3
    assert len({tuple(d) for d in drawn}) > 1
    assert torch.equal(small(batch_syn=8).synthetic(ctx, state, 0, 1)[0], images)


def test_pixels_stay_within_their_bounds() -> None:
    ctx = make_context()
    low, high = (ctx.task.transform(torch.full((1, 1, 8, 8), end)) for end in (0.0, 1.0))
    *_, (_, kept) = run(small(optim=Optim(lr=100.0, momentum=0.0)), ctx)
    *_, (_, free) = run(small(optim=Optim(lr=100.0, momentum=0.0), clamp=False), ctx)
    assert ((low <= kept) & (kept <= high)).all() and (kept == high).any()
    assert ((free < low) | (free > high)).any()


def test_descends() -> None:
    method = small(
        num_steps=60, outer_loop=1, optim=Optim(lr=30.0, momentum=0.0), start="noise", clamp=False, base_size=8
    )
    losses = [record["loss"] for record, _ in run(method, make_context(augment="none"))]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_learns_soft_labels_and_through_a_decoder() -> None:
    ctx = make_context(ipc=1, decode=Factor(factor=2), labels=Logits())
    *_, (record, _) = run(small(), ctx)
    assert record["grad_latents"] > 0
    assert record["grad_labels"] > 0


@pytest.mark.parametrize("compute", [Compute(vmap_batch=4), Compute(vmap_batch=99), Compute(micro_batch=1)], ids=str)
def test_classes_together_or_in_pieces_change_nothing(compute: Compute) -> None:
    usual, other = (
        list(run(small(batch_syn=3), make_context(compute=c, dtype=torch.float64, decode=Factor(factor=2))))
        for c in (Compute(), compute)
    )
    for (record, a), (expected, b) in zip(other, usual, strict=True):
        assert record["loss"] == pytest.approx(float(expected["loss"]), rel=1e-6)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_both_are_one_method() -> None:
    ctx = make_context()
    *_, (_, a) = run(small(), ctx)
    *_, (_, b) = run(IDCI(num_steps=2, num_student=10, batch_student=5), ctx)
    assert torch.equal(a, b)


def test_sets_are_meant_for_a_thousand_epochs_with_mixed_batches() -> None:
    task = make_context().task
    schedule = Schedule(drop_at=(2 / 3, 5 / 6), drop_factor=0.2)
    expected = Training(num_epochs=1000, batch_size=64, schedule=schedule, cutmix=0.5)
    assert IDC().training(task) == expected
    assert IDC(cutmix=0.0).training(task) == dataclasses.replace(expected, cutmix=0.0)


def test_cutmix_takes_the_place_of_cutout(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_context().task
    assert str(IDC().training_augment(task)) == "color_crop_flip_scale_rotate:mode=D"
    assert str(IDC(cutmix=0.0).training_augment(task)) == STRATEGY
    seen, source = list[Augment](), Trainer.source

    def spy(self: Trainer, images: Tensor, targets: Tensor, rng: Rng, augment: Augment) -> Examples:
        seen.append(augment)
        return source(self, images, targets, rng, augment)

    monkeypatch.setattr(Trainer, "source", spy)
    for fields in ({}, {"cutmix_student": 0.0}, {"matched": ("crop", "flip")}):
        list(run(small(num_steps=1, **fields), make_context(augment=f"{STRATEGY},flips=true")))
    assert [str(augment) for augment in seen] == ["color_crop:mode=D", "color_crop_cutout:mode=D", "crop_flip:mode=D"]


LR = {"cifar10": 0.005, "svhn": 0.005, "mnist": 1e-4, "fashion-mnist": 1e-4}
STD = {"cifar10": 0.2009, "svhn": 0.1987, "mnist": 0.3081, "fashion-mnist": 0.353}


@pytest.mark.parametrize(("kind", "name", "decode"), [(IDC, "idc", Factor(factor=2)), (IDCI, "idc-i", Pixels())])
def test_recipes_hold_the_published_values(kind: type[IDCBase], name: str, decode: Decode) -> None:
    recipes = {key: named(key) for key in catalog.recipes() if key == name or key.startswith(f"{name}-")}
    if name == "idc":
        recipes = {key: recipe for key, recipe in recipes.items() if not key.startswith("idc-i")}
    for dataset, lr in LR.items():
        gray = "mnist" in dataset
        for ipc in (1, 10, 50):
            recipe = recipes.pop(f"{name}-{dataset}-ipc{ipc}")
            assert isinstance(recipe.method, IDCBase)
            assert (recipe.dataset, recipe.ipc, recipe.decode) == (dataset, ipc, decode)
            assert (recipe.augment, recipe.network, recipe.transform) == ("dsa:mode=D", "auto", "channel")
            plain = (name, dataset) == ("idc", "mnist")
            assert recipe.method.optim.lr == pytest.approx(2 * lr / STD[dataset] ** 2, rel=5e-3)
            assert recipe.method == kind(
                optim=Optim(lr=recipe.method.optim.lr, momentum=0.0),
                distance="l1-conv" if gray else "mse-conv",
                base_size=28 if dataset == "mnist" else 32,
                num_student=2048 if dataset == "cifar10" else 512,
                matched=("color", "crop") if plain else ("color", "crop", "cutout"),
                cutmix_student=0.0 if plain else 0.5,
                cutmix=0.0 if plain or (name, dataset, ipc) == ("idc-i", "svhn", 1) else 0.5,
            )
    general = recipes.pop(name)
    assert (general.method, general.decode, general.augment) == (kind(), decode, "dsa:mode=D")
    assert [key.rsplit("-", 1)[0] for key in recipes] == [f"{name}-digits"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_steps": 0}, "method.num_steps"),
        ({"batch_real": 0}, "method.batch_real"),
        ({"batch_syn": 0}, "method.batch_syn .* 128"),
        ({"batch_student": 0}, "method.batch_student"),
        ({"outer_loop": 0}, "method.outer_loop"),
        ({"num_student": 0}, "method.num_student"),
        ({"base_size": 0}, "method.base_size"),
        ({"lr_student": 0.0}, "method.lr_student"),
        ({"cutmix": 1.5}, "method.cutmix must"),
        ({"cutmix_student": -0.5}, "method.cutmix_student"),
        ({"distance": "mse-con"}, "did you mean 'mse-conv'"),
        ({"matched": ("colour",)}, "did you mean 'color'"),
    ],
)
def test_refuses_values_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IDC(**fields)


def test_refuses_networks_without_convolutions_and_decoders_whose_pixels_cannot_be_clamped() -> None:
    with pytest.raises(ValueError, match=r"mlp has no convolutions.*distance='mse'"):
        IDC().init(make_context("mlp"))
    assert small(distance="mse").init(make_context("mlp"))

    class Waves(Pixels):
        name = "waves"
        stores_pixels = False

    assert "cannot clamp" in str(IDC().incompatibility(Waves(), Hard(), "channel"))
    assert IDC(clamp=False).incompatibility(Waves(), Hard(), "channel") is None


@pytest.mark.slow
def test_compiled_agrees_with_eager() -> None:
    eager, compiled = (list(run(small(num_steps=3), make_context(compute=Compute(compile=on)))) for on in (False, True))
    for (_, a), (_, b) in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
