"""RCIG against its slow twin, and what its convex inner problem, its pool and its automatic rates imply."""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from condense.augment import Augment
from condense.compute import Compute
from condense.data.datasets import load
from condense.method import Context, Optim
from condense.methods import pool
from condense.methods.rcig import HEAD, RCIG, Convexified, adaptation, ends_above, falls, highest_lr, no_longer_than
from condense.networks import Functional
from condense.recipe import Recipe, named
from condense.rng import Rng
from condense.synthetic import Factor, Hard, Labels, Logits, Origin, Pixels, Targets
from condense.task import Labelled, Split, make_task
from tests.reference import rcig as twin

NETWORK = "convnet:depth=1,width=3,norm=none,activation=softplus"
TINY = RCIG(
    num_steps=3,
    batch_real=9,
    inner_steps=6,
    adjoint_steps=6,
    pool_size=2,
    max_age=4,
    max_train_steps=3,
    ridge=0.1,
    ema=None,
)


def context(augment: str = "none", labels: Labels | None = None, decode: Any = None, seed: int = 0) -> Context:
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
    ctx = Context(task, Rng(seed), 1, decode or Pixels(), labels or Targets(), Compute(), origin)
    new_set = ctx.new_set
    ctx.__dict__["new_set"] = lambda *given, **more: new_set(*given, **more).double()
    return ctx


def begin(method: RCIG, ctx: Context) -> Any:
    state = method.init(ctx)
    state.syn.double()
    state.learned.double()
    state.tally = state.tally.double()
    return state


class Pieces:
    """What the twin needs of a step, taken apart by hand."""

    def __init__(self, method: RCIG, ctx: Context, state: Any, step: int) -> None:
        self.network = ctx.task.network
        self.member = state.pool[pool.draw(ctx, method.pool_size, step)]
        self.moving = {name: p for name, p in self.member["params"].items() if name != HEAD}
        self.theta = torch.cat([p.reshape(-1) for p in self.moving.values()])

    def logits(self, theta: Tensor, images: Tensor) -> Tensor:
        params, offset = dict(self.member["params"]), 0
        for name, p in self.moving.items():
            params[name] = theta[offset : offset + p.numel()].view(p.shape)
            offset += p.numel()
        return self.network.logits(params, {}, images, train=False)

    def features(self, images: Tensor) -> Tensor:
        return self.network.features(self.member["params"], {}, images, train=False)

    def jacobian(self, images: Tensor) -> Tensor:
        return twin.tangent(self.logits, self.theta, images)


def twin_step(method: RCIG, ctx: Context, state: Any, step: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Value, and gradients in images, labels and tau, of the state as it is before the step."""
    pieces = Pieces(method, ctx, state, step)
    real, classes = method.real(ctx, step)
    x = state.syn.latents.detach().clone().requires_grad_()
    y = state.syn()[1].detach().clone().requires_grad_()
    tau = state.learned["temperature"].detach().clone().requires_grad_()
    l2 = method.ridge * len(x)

    def parts(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if ctx.task.augment.flips:
            x, y = torch.cat([x, x.flip(3)]), torch.cat([y, y])
        return pieces.features(x), pieces.jacobian(x), y

    def inner(d: Tensor, x: Tensor, y: Tensor) -> Tensor:
        h, jacobian, targets = parts(x, y)
        return twin.inner_loss(d, h, jacobian, targets, l2)

    def outer(d: Tensor, x: Tensor, y: Tensor, tau: Tensor) -> Tensor:
        h, jacobian, targets = parts(x, y)
        found = twin.predict(d, h, jacobian, targets, l2, pieces.features(real), pieces.jacobian(real))
        return twin.outer_loss(found, classes, y, tau)

    zero, fixed = torch.zeros_like(pieces.theta), parts(x.detach(), y.detach())
    slope_of = torch.func.grad(lambda d: twin.inner_loss(d, *fixed, l2))
    d = twin.adam(slope_of, zero, method.inner_steps, state.lr_inner).detach().requires_grad_()
    value = outer(d, x, y, tau)
    g, into_x, into_y, into_tau = torch.autograd.grad(value, (d, x, y, tau))
    hessian = torch.func.hessian(lambda d: twin.inner_loss(d, *fixed, l2))(d.detach())
    v = twin.adam(lambda v: hessian @ v - g, zero, method.adjoint_steps, state.lr_adjoint)
    slope = torch.autograd.grad(inner(d, x, y), d, create_graph=True)[0] @ v
    mixed = torch.autograd.grad(slope, (x, y))
    whole_x, whole_y = (
        direct - m * min(1.0, float(direct.norm() / m.norm()))
        for direct, m in zip((into_x, into_y), mixed, strict=True)
    )
    return value, (whole_x, whole_y, into_tau)


@pytest.mark.parametrize("augment", ["none", "none:flips=true"])
def test_values_and_gradients_are_those_of_the_twin_step_by_step(augment: str) -> None:
    ctx, method = context(augment), TINY
    state = begin(method, ctx)
    for step in range(method.num_steps):
        value, gradients = twin_step(method, ctx, state, step)
        assert method.step(ctx, state, step)["loss"] == pytest.approx(value.item(), rel=1e-7)
        learned = (state.syn.latents, state.syn.provider.values, state.learned["temperature"])
        for param, gradient in zip(learned, gradients, strict=True):
            torch.testing.assert_close(param.grad, gradient, rtol=1e-5, atol=1e-8)


def test_a_network_from_elsewhere_is_taken_apart_at_its_last_layer() -> None:
    def factory(input_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        size = math.prod(input_shape)
        return nn.Sequential(nn.Flatten(), nn.Linear(size, 4), nn.Softplus(), nn.Linear(4, num_classes, bias=False))

    ctx = context()
    task = dataclasses.replace(ctx.task, network=Functional(factory, (1, 8, 8), 3, dtype=torch.float64))
    ctx = dataclasses.replace(ctx, task=task)
    params, buffers = task.network.init(ctx.rng, "network")
    net = Convexified(task.network, params, buffers, task.augment, 0.1)
    move, images = {name: torch.full_like(p, 0.01) for name, p in net.no_move().items()}, task.train.images[:5]
    h = 1e-6
    ahead, behind = (
        task.network.logits({name: p + s * h * move.get(name, 0) for name, p in params.items()}, buffers, images)
        for s in (1, -1)
    )
    assert move.keys() == params.keys() - {HEAD}
    torch.testing.assert_close(net.outputs(move, images)[1], (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-9)


def test_the_inner_problem_is_quadratic_and_its_product_the_hessian() -> None:
    ctx, method = context(), TINY
    state = begin(method, ctx)
    net, pieces = method.convexified(ctx, state, 0), Pieces(method, ctx, state, 0)
    batch = (state.syn.latents.detach(), state.syn()[1].detach())
    zero = net.no_move()
    direction = {name: torch.full_like(p, 0.1 * (i + 1)) for i, (name, p) in enumerate(zero.items())}
    losses = [float(net.inner_loss({k: s * p for k, p in direction.items()}, batch)) for s in (-1.0, 0.0, 1.0, 2.0)]
    second = losses[0] - 2 * losses[1] + losses[2]
    assert losses[3] == pytest.approx(losses[1] + (losses[2] - losses[0]) + 2 * second, rel=1e-9)
    h, jacobian = pieces.features(batch[0]), pieces.jacobian(batch[0])
    hessian = torch.func.hessian(lambda d: twin.inner_loss(d, h, jacobian, batch[1], method.ridge * 3))(
        torch.zeros_like(pieces.theta)
    )
    flat = torch.cat([direction[name].reshape(-1) for name in pieces.moving])
    product = net.hessian_product(batch)(direction)
    torch.testing.assert_close(torch.cat([product[name].reshape(-1) for name in pieces.moving]), hessian @ flat)


def test_the_implicit_part_is_no_longer_than_the_direct_one() -> None:
    direct, implicit = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 20.0])
    assert no_longer_than(direct, implicit).norm().item() == pytest.approx(5.0)
    assert torch.equal(no_longer_than(direct, implicit / 10), implicit / 10)
    assert torch.equal(no_longer_than(direct, torch.tensor([torch.nan, torch.nan])), torch.zeros(2))


def test_rates_are_raised_until_a_curve_no_longer_falls() -> None:
    found = highest_lr(1e-5, lambda lr: torch.tensor([3.0, 2.0, 1.0]) if lr < 1e-2 else torch.tensor([1.0, 2.0]))
    assert 0.84 * 1e-2 <= found <= 0.84 * 1.2e-2
    assert falls(torch.tensor([3.0, 2.0])) and not falls(torch.tensor([3.0, 3.0]))
    assert (adaptation(25, 45), adaptation(5, 45), adaptation(5, 10)) == (0.9, 1.05, 1.0)
    assert (adaptation(15, 0), adaptation(14, 35), adaptation(14, 34)) == (0.9, 1.05, 1.0), "29 % and 70 % of 50"
    state = TINY.init(context())
    assert state.lr_inner > 1e-5 and state.lr_adjoint > 5e-5


def test_a_rise_counts_from_a_thousandth_of_the_curve() -> None:
    flat_end = torch.tensor([2.0, 1.0, 1.0 + 1e-6])
    assert falls(flat_end) and not falls(torch.tensor([2.0, 1.0, 1.003]))
    assert ends_above(torch.tensor([2.0, 2.003])) and not ends_above(torch.tensor([2.0, 2.0 + 1e-6]))
    assert not falls(torch.tensor([2.0, torch.nan])) and not falls(torch.zeros(3))


def test_the_rate_found_does_not_hang_on_rounding() -> None:
    """Curves that are flat once the problem is solved, until too high a rate makes them rise; noise of 1e-6."""
    generator, steps = torch.Generator().manual_seed(0), torch.arange(20, dtype=torch.float64)
    for _ in range(200):
        fast, high = (1 + torch.rand(2, generator=generator)).tolist()

        def curve(lr: float, noise: float, fast: float = fast, high: float = high) -> Tensor:
            exact = 1 + (-fast * lr * steps).exp() + 1e-4 * (steps * (lr - 4 * high)).exp()
            return exact * (1 + noise * torch.randn(20, generator=generator))

        found = highest_lr(1e-3, partial(curve, noise=0.0))
        assert found == highest_lr(1e-3, partial(curve, noise=1e-6)) and found > 0.84 * 4 * high


def test_the_network_that_was_used_is_trained_and_replaced_in_time() -> None:
    method, ctx = dataclasses.replace(TINY, pool_size=1, max_age=5, num_steps=12), context()
    state = begin(method, ctx)
    ages = []
    for step in range(method.num_steps):
        method.step(ctx, state, step)
        ages.append(state.pool[0]["age"])
    assert all(age < 5 for age in ages) and 0 in ages and len({b - a for a, b in itertools.pairwise(ages)}) > 2


@pytest.mark.parametrize(("labels", "decode"), [(Hard(), Pixels()), (Logits(), Factor()), (Targets(), Pixels())])
def test_the_loss_falls_with_every_kind_of_labels(labels: Labels, decode: Any) -> None:
    optim = Optim(kind="adabelief", lr=0.03, momentum=0.9)
    method = dataclasses.replace(TINY, num_steps=30, batch_real=21, optim=optim, optim_labels=optim, max_age=100)
    ctx = context(labels=labels, decode=decode)
    state = begin(method, ctx)
    found = [method.step(ctx, state, step)["loss"] for step in range(method.num_steps)]
    assert sum(found[-5:]) < sum(found[:5])
    assert state.learned["temperature"].item() != 0


def test_a_step_depends_on_the_state_and_its_number_alone() -> None:
    before, sets = torch.get_rng_state(), []
    for seed in (0, 0, 1):
        ctx = context(seed=seed)
        state = begin(TINY, ctx)
        for step in range(2):
            TINY.step(ctx, state, step)
        sets.append(state.syn.latents.detach().clone())
    assert torch.equal(sets[0], sets[1]) and not torch.equal(sets[0], sets[2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fields", [{"pool_size": 0}, {"ridge": 0.0}, {"inner_steps": 1}, {"lr_pool": -1.0}])
def test_bad_fields_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"method.{next(iter(fields))} must be"):
        RCIG(**fields)


def test_sets_are_for_networks_with_relu_and_the_published_augmentation() -> None:
    task = context("none:flips=true").task
    assert RCIG().training_network(task) == "convnet:depth=1,norm=none,width=3"
    assert str(RCIG().training_augment(task)) == "zoom_rotate_translate_cutout-quarter:mode=P,flips=true"
    chosen = dataclasses.replace(task, augment=Augment.parse("crop_flip"))
    assert str(RCIG().training_augment(chosen)) == "crop_flip"


def test_the_training_on_a_set_can_be_changed() -> None:
    task, changed = context("none:flips=true").task, RCIG(training_lr=1e-3, training_warmup=50, augment_training=False)
    assert (RCIG().training(task).lr, RCIG().training(task).schedule.warmup_steps) == (1e-4, 500)
    assert (changed.training(task).lr, changed.training(task).schedule.warmup_steps) == (1e-3, 50)
    assert str(changed.training_augment(task)) == "none:flips=true"
    assert Recipe(method=RCIG()).hash("data") != Recipe(method=changed).hash("data")


def test_the_recipes_hold_the_published_values() -> None:
    plan = named("rcig-cifar10-ipc10")
    method: Any = plan.method
    assert (method.ridge, method.inner_steps, method.adjoint_steps, method.pool_size) == (5e-4, 20, 20, 30)
    assert (method.lr_pool, method.max_age, method.max_train_steps, method.ema) == (5e-5, 100, 15, 0.99)
    assert (method.optim.kind, method.optim.lr, method.optim_temperature.lr) == ("adabelief", 3e-3, 0.03)
    assert plan.augment == "none:flips=true" and plan.labels == Targets()
    assert named("rcig-mnist-ipc10").augment == "none"
