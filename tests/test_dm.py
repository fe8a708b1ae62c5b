"""DM against its slow twin, and what its objective implies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from condense import catalog
from condense.augment import Augment
from condense.compute import Compute
from condense.data.datasets import load
from condense.method import Context, Optim
from condense.methods.dm import DM, DistributionMatching
from condense.networks import Functional, Network, build
from condense.recipe import named
from condense.rng import Rng
from condense.synthetic import Decode, Factor, Hard, Origin, Pixels
from condense.task import Split, make_task
from tests.reference.dm import distribution_matching

COUNTS = (5, 9, 7)
DSA = "color_crop_cutout_flip_scale_rotate"


def make_context(
    network: str = "convnet:depth=1,width=8",
    augment: str = DSA,
    ipc: int = 2,
    decode: Decode | None = None,
    compute: Compute | None = None,
) -> Context:
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS))
    images = torch.rand(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    task = make_task(
        load((images[order], labels[order])),
        transform="channel",
        split=Split(),
        network=Functional(network, (1, 8, 8), 3),
        augment=Augment.parse(augment),
        device=torch.device("cpu"),
    )
    origin = Origin(dataset=task.dataset(), transform=task.transform.describe())
    return Context(task, Rng(0), ipc, decode or Pixels(), Hard(), compute or Compute(), origin)


def run(method: DistributionMatching, ctx: Context) -> Iterator[tuple[dict[str, float], Tensor]]:
    state = method.init(ctx)
    for step in range(method.num_steps):
        record = method.step(ctx, state, step)
        yield record, state.syn()[0].detach().clone()


def twin(method: DM, ctx: Context) -> Iterator[tuple[float, list[Tensor]]]:
    task = ctx.task

    def network(step: int) -> Network:
        psi = build(task.network.name, task.input_shape, task.num_classes)
        weights = task.network.init(ctx.rng, "network", step)
        psi.load_state_dict({**weights.params, **weights.buffers})
        return psi

    def augment(step: int, c: int, x: Tensor) -> Tensor:
        drawn = task.augment.sample(ctx.rng("siamese", step, c), 1, task.input_shape, siamese=True)
        return task.augment.apply(x, drawn)

    return distribution_matching(
        [task.train.draw(c, ctx.ipc, ctx.rng("initial images", 0, c)) for c in range(task.num_classes)],
        method.num_steps,
        network=network,
        real=lambda step, c: task.train.draw(c, method.batch_real, ctx.rng("real", step, c)),
        augment=augment,
        mixed="norm=batch" in task.network.name,
        lr=method.optim.lr,
        momentum=method.optim.momentum,
    )


@pytest.mark.parametrize("augment", ["none", DSA])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_agrees_with_the_slow_twin_step_by_step(norm: str, augment: str) -> None:
    ctx = make_context(f"convnet:depth=1,norm={norm},width=8", augment)
    method = DM(num_steps=8, batch_real=6, optim=Optim(lr=0.3))
    previous = method.init(ctx).syn()[0]
    for (record, images), (loss, expected) in zip(run(method, ctx), twin(method, ctx), strict=True):
        assert record["loss"] == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(images, torch.cat(expected), rtol=1e-5, atol=1e-5)
        assert (images - previous).abs().max() > 1e-3
        previous = images


def test_batch_norm_mixes_the_classes_in_one_part() -> None:
    assert list(DM().parts(make_context())) == [0, 1, 2]
    assert list(DM().parts(make_context("convnet:depth=1,norm=batch,width=8"))) == [0]


def test_the_loss_is_zero_where_the_synthetic_images_are_the_real_ones() -> None:
    ctx = make_context(augment="none", ipc=min(COUNTS))
    method, small = DM(num_steps=1, batch_real=256), COUNTS.index(min(COUNTS))
    state = method.init(ctx)
    losses = [method.loss(ctx, state, 0, c).item() for c in method.parts(ctx)]
    assert losses[small] < 1e-10
    assert all(loss > 1e-3 for c, loss in enumerate(losses) if c != small)


def test_a_zero_learning_rate_leaves_the_images_alone() -> None:
    ctx = make_context()
    method = DM(num_steps=2, optim=Optim(lr=0.0))
    start = method.init(ctx).syn()[0]
    for record, images in run(method, ctx):
        assert record["grad_latents"] > 0
        assert torch.equal(images, start)


def test_descends_from_noise() -> None:
    method = DM(num_steps=60, start="noise", optim=Optim(lr=0.3))
    losses = [record["loss"] for record, _ in run(method, make_context(augment="none"))]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_every_step_has_a_network_of_its_own() -> None:
    ctx, method = make_context(augment="none"), DM(num_steps=2, batch_real=256, optim=Optim(lr=0.0))
    first, second = (record["loss"] for record, _ in run(method, ctx))
    assert first != second


def test_a_step_needs_nothing_but_the_state_and_its_number() -> None:
    ctx, method = make_context(), DM(num_steps=4, batch_real=4)
    *_, (_, expected) = run(method, ctx)
    saved = method.init(ctx)
    for step in range(2):
        method.step(ctx, saved, step)
    state = method.init(ctx)
    state.syn.load_state_dict(saved.syn.state_dict())
    state.optimisers["latents"].load_state_dict(saved.optimisers["latents"].state_dict())
    state.params, state.buffers = saved.params, saved.buffers
    for step in range(2, 4):
        method.step(ctx, state, step)
    assert torch.equal(state.syn()[0], expected)


def test_the_global_generator_is_left_alone_and_the_seed_matters() -> None:
    method, before = DM(num_steps=2), torch.get_rng_state()
    *_, (_, images) = run(method, make_context())
    assert torch.equal(torch.get_rng_state(), before)
    ctx = make_context()
    other = Context(ctx.task, Rng(1), ctx.ipc, ctx.decode, ctx.labels, ctx.compute, ctx.origin)
    *_, (_, others) = run(method, other)
    assert not torch.equal(images, others)


def test_learns_through_a_decoder() -> None:
    ctx = make_context(ipc=1, decode=Factor(factor=2))
    *_, (record, images) = run(DM(num_steps=2), ctx)
    assert images.shape == (12, 1, 8, 8)
    assert record["grad_latents"] > 0


@pytest.mark.parametrize("compute", [Compute(micro_batch=n) for n in (1, 3, 99)], ids=str)
def test_micro_batches_change_nothing(compute: Compute) -> None:
    """Fewer images than a class has, classes one by one with real images in pieces, or all classes together."""
    method = DM(num_steps=3, batch_real=5)
    usual, other = (list(run(method, make_context(compute=c))) for c in (Compute(), compute))
    for (record, a), (expected, b) in zip(other, usual, strict=True):
        assert record["loss"] == pytest.approx(float(expected["loss"]), rel=1e-5)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_autocast_acts_on_the_features() -> None:
    method = DM(num_steps=1, batch_real=6)
    exact, rough = (
        float(next(run(method, make_context(compute=Compute(autocast=kind))))[0]["loss"])
        for kind in ("none", "bfloat16")
    )
    assert rough != exact
    assert rough == pytest.approx(exact, rel=0.1)


def test_recipes_exist_for_the_published_budgets_and_hold_the_published_values() -> None:
    recipes = {name: named(name) for name, entry in catalog.recipes().items() if entry.stem == "dm"}
    published = DM(num_steps=20000, start="real", batch_real=256, optim=Optim(lr=1.0, momentum=0.5))
    assert published == DM()
    for dataset in ("mnist", "fashion-mnist", "svhn", "cifar10", "cifar100"):
        for ipc in (1, 10, 50):
            recipe = recipes.pop(f"dm-{dataset}-ipc{ipc}")
            assert (recipe.dataset, recipe.ipc, recipe.method) == (dataset, ipc, published)
    assert recipes.pop("dm").method == published
    large = recipes.pop("dm-cifar10-ipc100").method
    assert isinstance(large, DM)
    assert large.optim.lr == 10.0
    assert [name.rsplit("-", 1)[0] for name in recipes] == ["dm-digits"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"batch_real": 0}, "method.batch_real"), ({"num_steps": 0}, "method.num_steps")],
)
def test_refuses_counts_below_one(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DM(**fields)


def test_real_images_to_start_from_must_be_there() -> None:
    with pytest.raises(ValueError, match=r"class '0' has 5 training images, 6 are needed"):
        DM().init(make_context(ipc=6))
    assert len(DM(start="noise").init(make_context(ipc=6)).syn) == 18
