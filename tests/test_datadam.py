"""DataDAM against its slow twin, and what its objective implies."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from condense import catalog
from condense.compute import Compute
from condense.match import attention_map
from condense.method import Context, Optim
from condense.methods.datadam import DataDAM
from condense.methods.dm import DM, DMState
from condense.networks import Network, build
from condense.recipe import named
from condense.synthetic import Factor
from condense.task import Labelled
from condense.train import Training
from tests.reference.datadam import attention_matching
from tests.test_dm import COUNTS, DSA, make_context, run

INSTANCE, BATCH = "convnet:depth=2,width=4", "convnet:depth=2,norm=batch,width=4"


def twin(method: DataDAM, ctx: Context) -> Iterator[tuple[float, list[Tensor]]]:
    task = ctx.task

    def network(step: int) -> Network:
        psi = build(task.network.name, task.input_shape, task.num_classes)
        weights = task.network.init(ctx.rng, "network", step)
        psi.load_state_dict({**weights.params, **weights.buffers})
        return psi

    def augment(step: int, c: int, x: Tensor) -> Tensor:
        drawn = task.augment.sample(ctx.rng("siamese", step, c), 1, task.input_shape, siamese=True)
        return task.augment.apply(x, drawn)

    return attention_matching(
        [task.train.draw(c, ctx.ipc, ctx.rng("initial images", 0, c)) for c in range(task.num_classes)],
        method.num_steps,
        network=network,
        real=lambda step, c: task.train.draw(c, method.batch_real, ctx.rng("real", step, c)),
        augment=augment,
        power=method.power,
        balance=method.balance,
        mixed="norm=batch" in task.network.name,
        lr=method.optim.lr,
        momentum=method.optim.momentum,
    )


def small(**fields: Any) -> DataDAM:
    return DataDAM(**{"num_steps": 4, "batch_real": 5, "optim": Optim(lr=0.1)} | fields)


@pytest.mark.parametrize("power", [1.0, 4.0])
@pytest.mark.parametrize(("network", "augment"), [(INSTANCE, "none"), (BATCH, "none"), (BATCH, DSA)])
def test_agrees_with_the_slow_twin_step_by_step(network: str, augment: str, power: float) -> None:
    ctx, method = make_context(network, augment), small(power=power)
    previous = method.init(ctx).syn()[0]
    for (record, images), (loss, expected) in zip(run(method, ctx), twin(method, ctx), strict=True):
        assert record["loss"] == pytest.approx(loss, rel=1e-4)
        torch.testing.assert_close(images, torch.cat(expected), rtol=1e-4, atol=1e-4)
        assert (images - previous).abs().max() > 1e-3
        previous = images


def test_attention_by_hand() -> None:
    maps = torch.tensor([[[[1.0, -2.0]], [[0.0, 2.0]]]])  # one image, two channels, one row of two pixels
    torch.testing.assert_close(attention_map(maps, 1), torch.tensor([[1.0, 4.0]]) / 17**0.5)
    torch.testing.assert_close(attention_map(maps, 2), torch.tensor([[1.0, 8.0]]) / 65**0.5)
    torch.testing.assert_close(attention_map(maps, 4), torch.tensor([[1.0, 32.0]]) / 1025**0.5)


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_attention_does_not_depend_on_scale_sign_or_order_of_channels(power: float) -> None:
    maps = torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([0.5, 2.0, -30.0])[:, None, None, None]  # of each image its own
    expected = attention_map(maps, power)
    torch.testing.assert_close(attention_map(maps * scale, power), expected)
    torch.testing.assert_close(attention_map(maps.flip(1), power), expected)
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(3))
    assert not torch.allclose(attention_map(maps.flip(3), power), expected)


def test_maps_without_any_activation_have_no_attention_and_finite_slopes() -> None:
    maps = torch.zeros(2, 3, 4, 4, requires_grad=True)
    attention = attention_map(maps, 1)
    assert not attention.any()
    (gradient,) = torch.autograd.grad(attention.sum(), maps)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("network", [INSTANCE, BATCH])
def test_the_loss_is_zero_where_the_synthetic_images_are_the_real_ones(network: str) -> None:
    ctx = make_context(network, "none", ipc=min(COUNTS))
    train = ctx.task.train
    members = torch.cat([indices[: min(COUNTS)] for indices in train.by_class])
    task = dataclasses.replace(ctx.task, train=Labelled(train.images[members], train.labels[members]))
    ctx = dataclasses.replace(ctx, task=task)
    method = small()
    state = method.init(ctx)
    assert sum(method.loss(ctx, state, 0, part).item() for part in method.parts(ctx)) < 1e-6
    with torch.no_grad():
        state.syn.latents[0].mul_(-1)
    assert sum(method.loss(ctx, state, 0, part).item() for part in method.parts(ctx)) > 1e-2


def test_the_loss_does_not_depend_on_the_order_of_the_classes() -> None:
    ctx, method = make_context(BATCH, "none"), small(batch_real=256)
    state = method.init(ctx)
    loss = method.loss(ctx, state, 0, 0)
    order = torch.tensor([2, 0, 1])  # new class i was class order[i]
    train = ctx.task.train
    task = dataclasses.replace(ctx.task, train=Labelled(train.images, order.argsort()[train.labels]))
    renamed = dataclasses.replace(ctx, task=task)
    with torch.no_grad():
        state.syn.latents.copy_(state.syn.latents.unflatten(0, (3, 2))[order].flatten(0, 1))
    torch.testing.assert_close(method.loss(renamed, state, 0, 0), loss, rtol=1e-4, atol=1e-5)


def test_the_classes_share_the_batch_statistics_of_one_pass() -> None:
    assert list(DataDAM().parts(make_context(BATCH))) == [0]
    assert list(DataDAM().parts(make_context(INSTANCE))) == [0, 1, 2]


def test_of_a_single_layer_only_the_features_are_left() -> None:
    ctx = make_context(augment="none")
    method, plain = small(balance=0.5), DM(batch_real=5)
    state = method.init(ctx)
    for part in method.parts(ctx):
        torch.testing.assert_close(method.loss(ctx, state, 0, part), 50 * plain.loss(ctx, state, 0, part))


def test_balance_weighs_the_features_and_power_the_attention() -> None:
    ctx = make_context(BATCH, "none")

    def loss(**fields: Any) -> float:
        method = small(**fields)
        return method.loss(ctx, method.init(ctx), 0, 0).item()

    attention, both, more = (loss(balance=balance) for balance in (0.0, 0.01, 0.03))
    assert 0 < attention < both
    assert more - attention == pytest.approx(3 * (both - attention), rel=1e-3)
    assert loss(balance=0.0, power=4.0) != pytest.approx(attention, rel=0.1)


def test_descends_from_noise() -> None:
    method = DataDAM(num_steps=60, start="noise", batch_real=9, optim=Optim(lr=0.1))
    losses = [record["loss"] for record, _ in run(method, make_context(BATCH, "none"))]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


@pytest.mark.parametrize("compute", [Compute(micro_batch=1), Compute(micro_batch=4)], ids=str)
def test_classes_together_or_in_pieces_change_nothing(compute: Compute) -> None:
    usual, other = (list(run(small(), make_context(INSTANCE, compute=c))) for c in (Compute(), compute))
    for (record, a), (expected, b) in zip(other, usual, strict=True):
        assert record["loss"] == pytest.approx(float(expected["loss"]), rel=1e-4)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_learns_through_a_decoder() -> None:
    ctx = make_context(BATCH, ipc=1, decode=Factor(factor=2))
    *_, (record, images) = run(small(num_steps=2), ctx)
    assert images.shape == (12, 1, 8, 8)
    assert record["grad_latents"] > 0


def test_a_network_without_maps_is_refused_before_the_first_step() -> None:
    with pytest.raises(ValueError, match=r"mlp has no feature maps: .*; give network='convnet'") as caught:
        DataDAM().init(make_context("mlp"))
    assert "\n" not in str(caught.value)


def test_every_step_has_a_network_of_its_own() -> None:
    ctx, method = make_context(BATCH, "none"), small(num_steps=1)
    state = method.init(ctx)
    assert isinstance(state, DMState)
    before = {name: p.clone() for name, p in state.params.items()}
    method.step(ctx, state, 0)
    assert not any(torch.equal(state.params[name], p) for name, p in before.items() if p.dim() > 1)


def test_recipes_hold_the_published_values() -> None:
    recipes = {name: named(name) for name in catalog.recipes() if name.split("-")[0] == "datadam"}
    published = DataDAM(num_steps=20000, batch_real=64, power=1.0, balance=0.01, optim=Optim(lr=1.0, momentum=0.5))
    assert published == DataDAM()
    names = ["datadam", *(f"datadam-cifar10-ipc{ipc}" for ipc in (1, 10, 50))]
    for name in names:
        assert recipes[name].method == published
        assert recipes[name].network == "auto:norm=batch" and recipes[name].augment == "dsa"
    large = dataclasses.replace(published, optim=Optim(lr=10.0, momentum=0.5))
    assert recipes["datadam-cifar10-ipc100"].method == large
    assert set(recipes) == {*names, "datadam-cifar10-ipc100", "datadam-digits-ipc1"}
    assert DataDAM().training(make_context().task) == Training(num_epochs=1800, batch_size=64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_real": 0}, "method.batch_real"),
        ({"power": 0.5}, "method.power must be at least 1, got 0.5"),
        ({"balance": -1.0}, "method.balance"),
    ],
)
def test_refuses_bad_values(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        DataDAM(**fields)
    assert "\n" not in str(caught.value)
