"""DD, RaT-BPTT and RTP against their slow twins, and what their objectives and draws imply."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from condense import registry
from condense.augment import Augment
from condense.compute import Compute
from condense.data.datasets import load
from condense.experiment import check
from condense.inner import SGD as Descent
from condense.inner import Adam, Full, Higher, RandomTruncated, Tesla, Truncated
from condense.method import Context, Optim
from condense.methods.at_bptt import ATBPTT
from condense.methods.bilevel import Bilevel
from condense.methods.dd import DD
from condense.methods.rat_bptt import RaTBPTT
from condense.methods.rtp import RTP
from condense.methods.unrolled import Minibatch
from condense.networks import Functional
from condense.recipe import Recipe, named, parse
from condense.rng import Rng
from condense.schedule import Schedule
from condense.synthetic import Bases, Decode, Factor, Hard, Labels, Logits, Origin, Pixels
from condense.task import Labelled, Split, make_task
from condense.train import Trainer
from tests.reference import bilevel as twin

SGD = Optim(lr=5.0, momentum=0.5)
DD_TINY = DD(num_steps=3, images_per_step=1, inner_epochs=2, lr=0.1, batch_real=9, optim=SGD, optim_lr=Optim(lr=0.5))
RAT_TINY = RaTBPTT(
    num_steps=4, adjoint=RandomTruncated(0, 3, 2), same_burn_in=2, lr=0.01, batch_per_class=1, batch_real=9, optim=SGD
)
RTP_TINY = RTP(num_steps=3, inner_steps=4, lr=0.05, batch_per_class=1, ways=2, batch_real=4, optim=SGD, clip=None)


def context(
    augment: str = "none",
    ipc: int = 2,
    decode: Decode | None = None,
    labels: Labels | None = None,
    compute: Compute | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    network: str = "convnet:depth=1,width=4",
) -> Context:
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
    task = dataclasses.replace(task, train=Labelled(task.train.images[:].to(dtype), task.train.labels))
    return Context(
        task,
        Rng(seed),
        ipc,
        decode or Pixels(),
        labels or Hard(),
        compute or Compute(),
        Origin(dataset=task.dataset(), transform=task.transform.describe()),
    )


def begin(method: Bilevel, ctx: Context) -> Any:
    state = method.init(ctx)
    state.syn.to(ctx.task.network.dtype)
    return state


def run(method: Bilevel, ctx: Context) -> Iterator[tuple[dict[str, float], Tensor]]:
    state = begin(method, ctx)
    for step in range(method.num_steps):
        record = method.step(ctx, state, step)
        yield record, state.syn()[0].detach().clone()


def seen(ctx: Context, batch: Any) -> tuple[Any, Tensor]:
    """What a step of the network sees, taken apart by hand; images with a mask of their features are a pair."""
    images = torch.stack([batch.images[i] for i in batch.chosen.tolist()])
    targets = torch.stack([batch.targets[i] for i in batch.chosen.tolist()])
    if ctx.task.augment.flips:
        images, targets = torch.cat([images, images.flip(3)]), torch.cat([targets, targets])
    images = ctx.task.augment.apply(images, batch.drawn)
    return (images if batch.feature_mask is None else (images, batch.feature_mask)), targets


def real(ctx: Context, method: Any, step: int, part: int = 0) -> tuple[Tensor, Tensor]:
    return ctx.task.train.sample(method.batch_real, ctx.rng("real", step, part))


def losses(method: Bilevel, ctx: Context, state: Any, step: int) -> Tensor:
    """The loss of a step as the twin has it, with a graph to the set."""
    task = ctx.task
    images, targets = state.syn()

    def logits(theta: dict[str, Tensor], x: Any) -> Tensor:
        if isinstance(x, Tensor):
            return task.network.logits(theta, {}, x)
        features = task.network.features(theta, {}, x[0]).where(x[1], 0.0)
        return F.linear(features, theta["classifier.weight"], theta["classifier.bias"])

    match method:
        case DD():
            size = 3 * method.images_per_step

            def pieces(k: int) -> list[tuple[Tensor, Tensor]]:
                batches = []
                for t in range(method.inner_epochs * len(images) // size):
                    first = t * size % len(images)
                    num, key = size * (2 if task.augment.flips else 1), ctx.rng("augment", step, f"{k}/{t}")
                    drawn = task.augment.sample(key, num, task.input_shape, siamese=False)
                    index = torch.arange(first, first + size)
                    kept = ctx.rng("mask", step, f"{k}/{t}").uniform(num, 64) >= method.mask
                    kept = kept if method.mask else None
                    batches.append(seen(ctx, Minibatch(images, targets, index, drawn, kept)))
                return batches

            found = [
                twin.dd(
                    logits,
                    task.network.init(ctx.rng, "network", step if method.networks == "random" else 0, k).params,
                    pieces(k),
                    state.syn.lr,
                    real(ctx, method, step, k),
                )
                for k in range(method.num_networks)
            ]
            return torch.stack(found).mean()
        case RaTBPTT():
            adjoint: Any = method.adjoint.resolve(ctx.rng("adjoint", step // method.same_burn_in))
            batches = [seen(ctx, b) for b in method.batches(ctx, state, step, adjoint.burn_in + adjoint.window)]
            x, y = real(ctx, method, step)
            x = task.augment.apply(x, method.drawn(ctx, len(x), step, "real"))
            theta = task.network.init(ctx.rng, "network", step).params
            return twin.rat_bptt(logits, theta, batches, adjoint.burn_in, method.lr, (x, y), Adam().eps_root)
        case RTP():
            classes = method.classes(ctx, step)
            batches = [seen(ctx, b) for b in method.batches(ctx, state, step, classes)]
            x = torch.cat([task.train.draw(c, method.batch_real, ctx.rng("real", step, c)) for c in classes])
            y = torch.tensor([c for c in classes for _ in range(method.batch_real)])
            theta = task.network.init(ctx.rng, "network", step).params
            return twin.rtp(logits, theta, batches, method.lr, method.momentum, (x, y))
    raise AssertionError


CASES: dict[str, tuple[Bilevel, dict[str, Any]]] = {
    "dd": (DD_TINY, {}),
    "dd, two networks that stay": (dataclasses.replace(DD_TINY, num_networks=2, networks="fixed"), {}),
    "dd, soft labels": (DD_TINY, {"labels": Logits()}),
    "dd, through a decoder": (DD_TINY, {"decode": Factor()}),
    "dd, augmented pairs": (DD_TINY, {"augment": "color_crop:flips=true"}),
    "dd, masked": (dataclasses.replace(DD_TINY, num_networks=2, mask=0.3), {"augment": "color_crop:flips=true"}),
    "rat-bptt": (RAT_TINY, {}),
    "rat-bptt, augmented, soft labels": (RAT_TINY, {"augment": "flip_rotate", "labels": Logits()}),
    "rat-bptt, masked": (dataclasses.replace(RAT_TINY, mask=0.3), {}),
    "rtp": (RTP_TINY, {}),
    "rtp, augmented, through bases": (
        RTP_TINY,
        {"augment": "color_crop", "decode": Bases(num_bases=2, start="xavier")},
    ),
    "rtp, augmented pairs": (RTP_TINY, {"augment": "color_crop:flips=true"}),
    "rtp, masked": (dataclasses.replace(RTP_TINY, mask=0.3), {}),
    "rtp, clipped": (dataclasses.replace(RTP_TINY, clip=1e-3), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_follows_its_twin_step_by_step(case: str) -> None:
    method, fields = CASES[case]
    ctx = context(**fields)
    ours, theirs = begin(method, ctx), begin(method, ctx)
    norm = 0.0
    for step in range(method.num_steps):
        record = method.step(ctx, ours, step)
        params = [p for group in theirs.leaves().values() for p in group]
        loss = losses(method, ctx, theirs, step)
        for p, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
            p.grad = grad
        latents = theirs.syn.latents
        found = float(latents.grad.norm())
        longest = method.clip
        if isinstance(method, RaTBPTT):
            norm = found if step == 0 else 0.9 * norm + 0.1 * found
            longest = 2 * norm
        if longest is not None and found > longest:
            latents.grad *= longest / found
        for optimiser in theirs.optimisers.values():
            optimiser.step()
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-6)
        for a, b in zip(ours.syn.parameters(), theirs.syn.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", [DD_TINY, RTP_TINY])
def test_exact_and_full_adjoints_agree(method: Bilevel) -> None:
    for (a, x), (b, y) in zip(
        run(method, context()), run(dataclasses.replace(method, adjoint=Full()), context()), strict=True
    ):
        assert a["loss"] == pytest.approx(float(b["loss"]), rel=1e-10)
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("method", [DD_TINY, RAT_TINY, RTP_TINY])
def test_every_image_of_every_inner_step_has_a_mask_of_its_own(method: Bilevel) -> None:
    def masks(step: int, seed: int = 0) -> Tensor:
        ctx, last = context("color_crop:flips=true", seed=seed), {DD: 0, RaTBPTT: 4, RTP: [0, 1, 2]}[type(method)]
        masked = dataclasses.replace(method, mask=0.3)
        batches = masked.batches(ctx, begin(masked, ctx), step, last)  # type: ignore[attr-defined]
        return torch.stack([batch.feature_mask for batch in batches])

    found = masks(1)
    assert found.shape == (4, 6, 64) and len(found.flatten(0, 1).unique(dim=0)) == 24
    assert found.double().mean().item() == pytest.approx(0.7, abs=0.04)
    assert torch.equal(found, masks(1))
    assert not torch.equal(found, masks(2)) and not torch.equal(found, masks(1, seed=1))


@pytest.mark.slow
def test_compiled_and_masked_agrees_with_eager() -> None:
    method = dataclasses.replace(RTP_TINY, num_steps=2, ways=None, mask=0.3)
    contexts = (context(network="mlp", compute=Compute(compile=on)) for on in (False, True))
    for (a, x), (b, y) in zip(*(run(method, ctx) for ctx in contexts), strict=True):
        assert a["loss"] == pytest.approx(float(b["loss"]), rel=1e-10)
        torch.testing.assert_close(x, y)


class TestDD:
    def test_one_step_is_a_product_with_a_mixed_derivative(self) -> None:
        """dL/dx = -eta d/dx <grad l(theta; x), grad L(theta')>, by finite differences."""
        method, ctx = dataclasses.replace(DD_TINY, inner_epochs=1), context(ipc=1)
        state = begin(method, ctx)
        method.loss(ctx, state, 0, 0).backward()
        grad = state.syn.latents.grad
        step = torch.zeros_like(grad)
        step[1, 0, 3, 4] = 1e-5
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                state.syn.latents.add_(sign * step)
                values.append(method.loss(ctx, state, 0, 0).item())
                state.syn.latents.sub_(sign * step)
        assert grad[1, 0, 3, 4].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)

    def test_each_step_has_a_rate_of_its_own_that_is_learned(self) -> None:
        *_, (record, _) = run(DD_TINY, context(ipc=2))
        state = begin(DD_TINY, context(ipc=2))
        assert state.syn.lr.shape == (4,)
        DD_TINY.step(context(ipc=2), state, 0)
        assert len(set(state.syn.lr.tolist())) == 4 and "syn_lr" in record

    def test_batches_hold_every_class_and_are_what_the_evaluator_trains_on(self) -> None:
        method, ctx = dataclasses.replace(DD_TINY, images_per_step=2), context(ipc=4)
        state = begin(method, ctx)
        plan = method.training(ctx.task)
        assert (plan.batch_size, plan.num_epochs, plan.order) == (6, 2, "stored")
        for piece in state.syn()[1].split(plan.batch_size):
            assert sorted(piece.tolist()) == [0, 0, 1, 1, 2, 2]
        assert len(state.syn.lr) == plan.num_epochs * len(state.syn) // plan.batch_size

    @pytest.mark.parametrize("decode", [Pixels(), Factor()])
    def test_the_evaluator_takes_the_steps_that_were_learned(self, decode: Decode) -> None:
        """Its trainer, by the stored training and the learned rates, arrives where the unrolled network does."""
        method, ctx = dataclasses.replace(DD_TINY, images_per_step=2), context(ipc=4, decode=decode)
        state = begin(method, ctx)
        method.step(ctx, state, 0)
        weights = ctx.task.network.init(ctx.rng, "any")
        expected = method.train(
            ctx, weights.params, method.batches(ctx, state, 1, 0), rule=Descent(), lr=state.syn.lr, adjoint=Full()
        )
        plan = dataclasses.replace(
            method.training(ctx.task), schedule=Schedule(lr_per_step=tuple(state.syn.lr.tolist()))
        )
        trainer = Trainer(ctx.task.network, plan, Compute())
        images, targets = (x.detach() for x in state.syn())
        source = trainer.source(images, targets, Rng(5), method.training_augment(ctx.task))
        torch.testing.assert_close(trainer.run(weights, source).params, dict(expected))

    def test_batches_that_do_not_divide_the_budget_are_refused(self) -> None:
        with pytest.raises(ValueError, match="cannot be divided into batches of 2"):
            dataclasses.replace(DD_TINY, images_per_step=2).init(context(ipc=3))

    def test_a_fixed_network_is_learned_better_than_a_fresh_one(self) -> None:
        """After training for one initialisation, its loss is below that of others under the same steps."""
        method = dataclasses.replace(
            DD_TINY, networks="fixed", num_steps=60, batch_real=21, optim=Optim(kind="adam", lr=0.1), inner_epochs=3
        )
        ctx = context(ipc=1)
        state = begin(method, ctx)
        for step in range(method.num_steps):
            method.step(ctx, state, step)
        random = dataclasses.replace(method, networks="random")
        known = method.loss(ctx, state, 0, 0).item()
        others = [random.loss(ctx, state, step, 0).item() for step in range(1, 6)]
        assert known < min(others)


def updated(method: Bilevel, state: Any, norm: float) -> float:
    """The norm of the images' gradient, ``norm`` before, as an update uses it."""
    for param in state.syn.parameters():
        param.grad = torch.ones_like(param)
    state.syn.latents.grad.mul_(norm / state.syn.latents.grad.norm())
    method.update(state, {"loss": 1.0, "grad_latents": norm})
    return float(state.syn.latents.grad.norm())


class TestRaT:
    def test_images_seen_in_the_burn_in_alone_get_no_gradient(self) -> None:
        method = dataclasses.replace(RAT_TINY, adjoint=Truncated(1, 3), batch_per_class=1)
        ctx = context(ipc=6)
        state = begin(method, ctx)
        method.loss(ctx, state, 0, 0).backward()
        moved = state.syn.latents.grad.flatten(1).norm(dim=1) > 0
        last = method.batches(ctx, state, 0, 4)[-1].chosen
        assert moved.nonzero().flatten().tolist() == sorted(last.tolist())

    def test_the_window_moves_every_few_updates(self) -> None:
        method = dataclasses.replace(RAT_TINY, adjoint=RandomTruncated(0, 50, 2), same_burn_in=10)
        ctx = context()
        places = [method.adjoint.resolve(ctx.rng("adjoint", step // 10)).burn_in for step in range(100)]
        assert all(len(set(places[i : i + 10])) == 1 for i in range(0, 100, 10)) and len(set(places)) > 5

    def test_a_sudden_gradient_is_cut_to_twice_the_running_mean(self) -> None:
        state = begin(RAT_TINY, context())
        assert updated(RAT_TINY, state, 1.0) == pytest.approx(1.0) and state.norm == 1.0
        assert updated(RAT_TINY, state, 11.0) == pytest.approx(4.0) and state.norm == pytest.approx(2.0)

    def test_a_gradient_may_stay_as_it_is(self) -> None:
        method = dataclasses.replace(RAT_TINY, clip=None)
        state = begin(method, context())
        assert updated(method, state, 1.0) == pytest.approx(1.0)
        assert updated(method, state, 1e9) == pytest.approx(1e9)

    def test_images_begin_as_noise_of_unit_length(self) -> None:
        state = RAT_TINY.init(context())
        torch.testing.assert_close(state.syn.latents.flatten(1).norm(dim=1), torch.ones(6))

    def test_images_can_begin_as_real_ones(self) -> None:
        ctx = context()
        latents = dataclasses.replace(RAT_TINY, start="real").init(ctx).syn.latents
        real = ctx.task.train.images[:].to(latents.dtype)
        assert all((real == image).flatten(1).all(dim=1).any() for image in latents)

    def test_given_images_keep_their_scale(self) -> None:
        given = torch.rand(6, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        state = RAT_TINY.init(dataclasses.replace(context(), first_images=given))
        torch.testing.assert_close(state.syn.latents, given, check_dtype=False)


class TestRTP:
    def test_tasks_have_as_many_classes_as_said(self) -> None:
        ctx = context()
        tasks = [RTP_TINY.classes(ctx, step) for step in range(40)]
        assert all(len(task) == 2 and task == sorted(set(task)) for task in tasks)
        assert {c for task in tasks for c in task} == {0, 1, 2}
        for ways in (None, 3, 9):
            assert dataclasses.replace(RTP_TINY, ways=ways).classes(ctx, 5) == [0, 1, 2]

    def test_classes_that_are_not_in_the_task_get_no_gradient(self) -> None:
        ctx = context(ipc=1)
        state = begin(RTP_TINY, ctx)
        RTP_TINY.loss(ctx, state, 0, 0).backward()
        moved = state.syn.latents.grad.flatten(1).norm(dim=1) > 0
        assert moved.nonzero().flatten().tolist() == RTP_TINY.classes(ctx, 0)

    def test_the_augmentation_stays_through_the_steps_of_an_update(self) -> None:
        ctx = context(augment="color_crop:mode=M")
        first, *rest = RTP_TINY.batches(ctx, begin(RTP_TINY, ctx), 0, [0, 1, 2])
        for batch in rest:
            for name, value in batch.drawn.values.items():
                assert torch.equal(value, first.drawn.values[name])
        second = RTP_TINY.batches(ctx, begin(RTP_TINY, ctx), 1, [0, 1, 2])[0]
        assert not torch.equal(first.drawn.values["color"], second.drawn.values["color"])


def test_batch_norm_takes_the_statistics_of_the_real_images() -> None:
    """Its running ones never saw an image."""
    ctx = context(network="convnet:depth=1,width=4,norm=batch")
    theta, buffers = ctx.task.network.init(ctx.rng, "any")
    x, y = ctx.task.train.images[:] * 2 + 3, ctx.task.train.labels
    expected = torch.nn.functional.cross_entropy(ctx.task.network.logits(theta, buffers, x, train=True), y)
    assert DD_TINY.real_loss(ctx, theta, buffers, x, y).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("method", [DD_TINY, RAT_TINY, RTP_TINY])
class TestAll:
    def test_a_step_depends_on_the_state_and_its_number_alone(self, method: Bilevel) -> None:
        torch.manual_seed(0)
        before = torch.get_rng_state()
        (a, x), (b, y) = (list(run(method, context()))[-1] for _ in range(2))
        assert a == b and torch.equal(x, y) and torch.equal(torch.get_rng_state(), before)
        other = list(run(method, context(seed=1)))[-1][1]
        assert not torch.equal(x, other)

    def test_the_loss_falls(self, method: Bilevel) -> None:
        long = dataclasses.replace(method, num_steps=80, optim=Optim(kind="adam", lr=0.05), batch_real=21)
        found = [record["loss"] for record, _ in run(long, context(ipc=1))]
        assert sum(found[-10:]) < 0.97 * sum(found[:10])


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: DD(images_per_step=0), "images_per_step must be positive, got 0; a usual value is 1"),
        (lambda: DD(lr=-1.0), "lr must be positive"),
        (lambda: DD(lr=math.inf), "lr must be finite, got inf"),
        (lambda: DD(mask=1.0), r"method.mask must lie in \[0, 1\), got 1.0: it is a fraction; a usual value is 0.1"),
        (lambda: RaTBPTT(clip_decay=1.0), "clip_decay must lie in"),
        (lambda: RaTBPTT(batch_per_class=0), "batch_per_class must be positive, got 0; a usual value is 10"),
        (lambda: RTP(momentum=1.5), "momentum must lie in"),
        (lambda: RTP(ways=1), "one class cannot be classified"),
        (lambda: DD(clip=-1.0), "clip must be above 0, got -1.0: it is a norm; to turn clipping off, give clip=None"),
        (lambda: RaTBPTT(clip=0.0), "clip must be above 0"),
        (lambda: RTP(clip=-0.5), "clip must be above 0, got -0.5"),
        (lambda: dataclasses.replace(DD_TINY, adjoint=RandomTruncated(0, 9, 2)).init(context()), "takes 4 steps"),
        (lambda: RaTBPTT(adjoint=Tesla()), "method.adjoint tesla does not fit .* Adam; give adjoint='exact'"),
        (lambda: ATBPTT(adjoint=Higher()), "method.adjoint higher does not fit .* Adam"),
        (lambda: RTP(adjoint=Tesla()), "method.adjoint tesla needs plain SGD; give momentum=0, or adjoint='exact'"),
    ],
)
def test_bad_fields_are_refused(make: Callable[[], Bilevel], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()


@pytest.mark.parametrize("name", ["mtt", "tesla", "datm", "selmatch", "rtp"])
def test_a_random_window_lies_within_the_training_of_the_network(name: str) -> None:
    steps = "inner_steps" if name == "rtp" else "syn_steps"
    method: Any = registry.load(name)(**{steps: 6}, adjoint=RandomTruncated(0, 4, 2))
    check(Recipe(method=method))
    with pytest.raises(
        ValueError, match=r"burn-in of up to 4 and a window of 2, but the network takes 5 steps; give .*3"
    ):
        check(Recipe(method=dataclasses.replace(method, **{steps: 5})))
    late = dataclasses.replace(method, adjoint=Truncated(window=2, burn_in=5))
    with pytest.raises(ValueError, match=r"burn-in of 5 and a window of 2, but .* 6 steps; .*burn_in=4"):
        check(Recipe(method=late))


def test_a_random_window_is_chosen_by_flags() -> None:
    words = "--method.inner-steps 6 --method.adjoint random-truncated --method.adjoint.hi 4 --method.adjoint.window 2"
    parsed = parse(Recipe, words.split(), Recipe(method=RTP()))
    assert parsed.method == RTP(inner_steps=6, adjoint=RandomTruncated(0, 4, 2))


def test_the_recipes_hold_the_published_values() -> None:
    dd: Any = named("dd-mnist-ipc10").method
    assert (dd.inner_epochs, dd.images_per_step, dd.lr, dd.batch_real) == (3, 1, 0.02, 1024)
    assert (dd.optim.kind, dd.optim.lr, dd.optim.momentum, len(dd.optim.schedule.drop_at)) == ("adam", 0.01, 0.5, 9)
    rat: Any = named("rat-bptt-cifar10-ipc10").method
    assert rat.adjoint == RandomTruncated(0, 140, 60) and (rat.lr, rat.batch_real, rat.clip) == (1e-3, 5000, 2.0)
    assert rat.num_steps == 10 * 60000 and (rat.optim.kind, rat.optim.lr) == ("adam", 1e-3)
    published = RTP(
        num_steps=500000,
        inner_steps=150,
        lr=0.01,
        momentum=0.9,
        batch_per_class=32,
        ways=None,
        batch_real=64,
        clip=2.0,
        optim=Optim(lr=0.1, momentum=0.5),
        optim_decoder=Optim(lr=0.1, momentum=0.5),
    )
    bases = Bases(num_bases=16, start="xavier")
    for name in ("rtp", "rtp-cifar10-ipc1"):
        rtp = named(name)
        assert (rtp.method, rtp.decode, rtp.augment) == (published, bases, "none")
    assert (rtp.dataset, rtp.ipc, rtp.transform) == ("cifar10", 1, "zca-relative")
    assert bases.latents_per_class(1, (3, 32, 32), 10) == 115, "as in the published code"
