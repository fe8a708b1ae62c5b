"""FRePo against its slow twin, and what its regression and its pool imply."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from condense.augment import Augment
from condense.compute import Compute
from condense.data.datasets import load
from condense.kernels import feature_kernel, relative_ridge, ridge_solve
from condense.method import Context, Optim
from condense.methods import pool
from condense.methods.frepo import FRePo, PoolState, half_squared_error, margin_loss
from condense.networks import Functional, build
from condense.recipe import Recipe, named
from condense.rng import Rng
from condense.schedule import Schedule
from condense.synthetic import Factor, Hard, Labels, Logits, Origin, Pixels, Targets
from condense.task import Labelled, Split, make_task
from tests.reference import frepo as twin

NETWORK = "convnet:depth=1,width=8,norm=batch"
LAMB = Optim(kind="lamb", lr=0.02, momentum=0.9, schedule=Schedule(cosine_to=0.1))
TINY = FRePo(num_steps=6, batch_real=9, pool_size=2, max_age=2, lr_pool=0.01, ridge=1e-3, optim=LAMB, optim_labels=LAMB)


def context(
    augment: str = "none", labels: Labels | None = None, decode: Any = None, seed: int = 0, ipc: int = 1
) -> Context:
    classes = torch.arange(21) % 3
    images = torch.rand(21, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    task = make_task(
        load((images, classes)),
        transform="channel",
        split=Split(),
        network=Functional(NETWORK, (1, 8, 8), 3, dtype=torch.float64),
        augment=Augment.parse(augment),
        device=torch.device("cpu"),
    )
    task = dataclasses.replace(task, train=Labelled(task.train.images[:].double(), task.train.labels))
    origin = Origin(dataset=task.dataset(), transform=task.transform.describe())
    return Context(task, Rng(seed), ipc, decode or Pixels(), labels or Targets(), Compute(), origin)


def begin(method: FRePo, ctx: Context) -> PoolState:
    state = method.init(ctx)
    state.syn.double()
    return state


@pytest.mark.parametrize("objective", ["mse", "platt"])
@pytest.mark.parametrize("augment", ["none", "none:flips=true"])
def test_it_follows_its_twin_through_the_ages_of_the_pool(augment: str, objective: Literal["mse", "platt"]) -> None:
    ctx, method = context(augment), dataclasses.replace(TINY, objective=objective)
    state = begin(method, ctx)

    def network(step: int, slot: int) -> nn.Module:
        found = build(NETWORK, (1, 8, 8), 3).double()
        weights = ctx.task.network.init(ctx.rng, "pool", step, slot)
        found.load_state_dict({**weights.params, **weights.buffers})
        return found

    def real(step: int) -> tuple[Tensor, Tensor]:
        images, classes = ctx.task.train.sample(method.batch_real, ctx.rng("real", step))
        return images, torch.nn.functional.one_hot(classes, 3).double() - 1 / 3

    expected = twin.frepo(
        state.syn.latents.detach().clone(),
        state.syn()[1].detach().clone(),
        method.num_steps,
        network=network,
        used=lambda step: pool.draw(ctx, method.pool_size, step),
        real=real,
        pool_size=method.pool_size,
        max_age=method.max_age,
        ridge=method.ridge,
        lr=LAMB.lr,
        momentum=LAMB.momentum,
        cosine_to=0.1,
        lr_pool=method.lr_pool,
        flips=ctx.task.augment.flips,
        lr_temperature=0.01 if objective == "platt" else None,
    )
    for step, (loss, images, labels) in enumerate(expected):
        record = method.step(ctx, state, step)
        assert record["loss"] == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(state.syn.latents.detach(), images, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(state.syn()[1].detach(), labels, rtol=1e-6, atol=1e-8)
    ages = [member["age"] for member in state.pool]
    assert 0 in ages or max(ages) <= method.max_age + 1


def test_with_a_small_ridge_the_support_is_fitted() -> None:
    phi = torch.randn(6, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    kernel = feature_kernel(phi, phi)
    torch.testing.assert_close(kernel @ ridge_solve(kernel, y, relative_ridge(kernel, 1e-12)), y)


def test_the_margin_counts_up_to_one_over_c() -> None:
    labels = torch.tensor([[0.5, 0.4, 0.0], [1.0, -1.0, 0.0]])
    assert margin_loss(labels).item() == pytest.approx(-(0.1 + 1 / 3) / 2)
    assert half_squared_error(torch.zeros(2, 3), labels).item() == pytest.approx((0.41 / 2 + 1.0) / 2)


def test_the_gradient_is_that_of_finite_differences() -> None:
    ctx = context()
    state = begin(TINY, ctx)

    def loss(latents: Tensor, values: Tensor) -> Tensor:
        return torch.func.functional_call(
            _Loss(ctx, state), {"syn.latents": latents, "syn.provider.values": values}, ()
        )

    values = dict(state.syn.named_parameters())["provider.values"].detach().requires_grad_()
    assert torch.autograd.gradcheck(loss, (state.syn.latents.detach().requires_grad_(), values))


class _Loss(nn.Module):
    def __init__(self, ctx: Context, state: PoolState) -> None:
        super().__init__()
        self.ctx, self.state, self.syn = ctx, state, state.syn

    def forward(self) -> Tensor:
        return TINY.loss(self.ctx, self.state, 0, 0)[0]


def test_regression_uses_running_statistics_and_leaves_the_network_alone() -> None:
    ctx = context()
    state = begin(TINY, ctx)
    slot = pool.draw(ctx, TINY.pool_size, 0)
    before = {name: p.clone() for table in ("params", "buffers") for name, p in state.pool[slot][table].items()}
    first = TINY.loss(ctx, state, 0, 0)[0].item()
    for name, p in before.items():
        table = "params" if name in state.pool[slot]["params"] else "buffers"
        assert torch.equal(state.pool[slot][table][name], p), name
    state.pool[slot]["buffers"]["features.1.running_mean"] += 1.0
    assert TINY.loss(ctx, state, 0, 0)[0].item() != pytest.approx(first, rel=1e-3)


def test_the_network_that_was_used_ages_and_is_replaced() -> None:
    ctx, method = context(), dataclasses.replace(TINY, pool_size=1, max_age=2, num_steps=8)
    state, ages = begin(method, ctx), []
    for step in range(method.num_steps):
        method.step(ctx, state, step)
        ages.append(state.pool[0]["age"])
    assert ages == [1, 2, 3, 0, 1, 2, 3, 0]
    staggered = FRePo(pool_size=10).init(context())
    assert [member["age"] for member in staggered.pool] == list(range(0, 100, 10))


@pytest.mark.parametrize("labels", [Hard(), Logits(), Targets()])
@pytest.mark.parametrize("decode", [Pixels(), Factor()])
def test_the_loss_falls_with_every_kind_of_labels(labels: Labels, decode: Any) -> None:
    optim = Optim(kind="adam", lr=0.05, momentum=0.9)
    method = dataclasses.replace(TINY, num_steps=60, batch_real=21, optim=optim, optim_labels=optim, max_age=20)
    ctx = context(labels=labels, decode=decode)
    state = begin(method, ctx)
    found = [method.step(ctx, state, step)["loss"] for step in range(method.num_steps)]
    assert sum(found[-10:]) < sum(found[:10])


def test_a_step_depends_on_the_state_and_its_number_alone() -> None:
    before = torch.get_rng_state()
    sets = []
    for seed in (0, 0, 1):
        ctx = context(seed=seed)
        state = begin(TINY, ctx)
        for step in range(3):
            TINY.step(ctx, state, step)
        sets.append(state.syn.latents.detach().clone())
    assert torch.equal(sets[0], sets[1]) and not torch.equal(sets[0], sets[2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fields", [{"pool_size": 0}, {"ridge": 0.0}, {"lr_pool": -1.0}, {"batch_real": 0}])
def test_bad_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"method.{next(iter(fields))} must be"):
        FRePo(**fields)


def test_sets_are_for_networks_without_norm_and_the_published_augmentation() -> None:
    task = context().task
    assert FRePo().training_network(task) == "convnet:depth=1,norm=none,width=8"
    assert str(FRePo().training_augment(task)) == "jitter_zoom_rotate_translate_cutout-quarter"
    colour = make_task(
        load((torch.rand(6, 3, 8, 8), torch.arange(6) % 3)),
        transform="none",
        split=Split(),
        network=Functional("resnet18:norm=batch", (3, 8, 8), 3),
        augment=Augment(flips=True),
        device=torch.device("cpu"),
    )
    assert FRePo().training_network(colour) == "resnet18:norm=batch", "it cannot be without"
    assert str(FRePo().training_augment(colour)).startswith("flip_jitter")
    chosen = dataclasses.replace(task, augment=Augment.parse("crop_flip:flips=true"))
    assert str(FRePo().training_augment(chosen)) == "crop_flip"


def test_the_training_on_a_set_can_be_changed() -> None:
    task, changed = context().task, FRePo(training_lr=1e-3, training_warmup=50, augment_training=False)
    assert (FRePo().training(task).lr, FRePo().training(task).schedule.warmup_steps) == (3e-4, 500)
    assert (changed.training(task).lr, changed.training(task).schedule.warmup_steps) == (1e-3, 50)
    assert str(changed.training_augment(task)) == "none"
    mirrored = dataclasses.replace(task, augment=Augment(flips=True))
    assert str(changed.training_augment(mirrored)) == "flip", "labels and images were learned for both orientations"
    assert Recipe(method=FRePo()).hash("data") != Recipe(method=changed).hash("data")


def test_the_recipes_hold_the_published_values() -> None:
    plan = named("frepo-cifar100-ipc1")
    method: Any = plan.method
    assert (method.batch_real, method.pool_size, method.max_age, method.lr_pool) == (1024, 10, 100, 3e-4)
    assert (method.optim.kind, method.optim.lr, method.optim.schedule.cosine_to) == ("lamb", 3e-4, 0.1)
    assert plan.labels == Targets(scale=10**-0.5) and plan.augment == "none:flips=true"
    assert plan.network == "auto:widen=true,norm=batch-before"
    gray = named("frepo-mnist-ipc1")
    assert gray.labels == Targets() and gray.augment == "none" and gray.transform == "channel"
