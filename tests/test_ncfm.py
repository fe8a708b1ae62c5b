"""NCFM against its slow twin, and what its objective and draws imply."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from condense import catalog
from condense.compute import Compute
from condense.match import characteristic_distance
from condense.method import Context, Optim
from condense.methods.mtt import experts_of
from condense.methods.ncfm import NCFM
from condense.networks import Network, build
from condense.recipe import named
from condense.schedule import Schedule
from condense.synthetic import Decode, Factor, Pixels
from condense.testing import every_leaf_learns, resumes_to_the_byte
from condense.train import Training
from tests.reference import ncfm as reference
from tests.test_tgdd import STRATEGY, MakeContext, context_of, run, siamese


def small(**fields: Any) -> NCFM:
    usual: dict[str, Any] = {"num_steps": 6, "batch_real": 5, "last_epoch": 4, "num_frequencies": 8, "clamp": False}
    return NCFM(
        **usual | {"optim": Optim(lr=1e-2, momentum=0.5), "optim_frequencies": Optim(lr=0.1, momentum=0.0)} | fields
    )


@pytest.fixture
def make_context(tmp_path: Path) -> MakeContext:
    return functools.partial(context_of, tmp_path)


def twin(method: NCFM, ctx: Context) -> Iterator[tuple[float, list[Tensor]]]:
    task, draws = ctx.task, ctx.rng
    width = task.network.num_features

    def networks(iteration: int) -> tuple[Network, Network]:
        drawn = draws("experts", iteration)
        expert, u = drawn.integer(0, 2), float(drawn.uniform(1))
        first, last = experts_of(ctx).pair(expert, 0, 4)
        both = []
        for weights in ({name: u * first[name] + (1 - u) * last[name] for name in last}, last):
            network = build(task.network.name, task.input_shape, task.num_classes)
            network.load_state_dict(weights)
            both.append(network.eval())
        return both[0], both[1]

    state = method.init(ctx)
    psi = None
    if method.adversarial:
        psi = reference.frequency_network(width, state.learned["frequencies"].detach().clone())
    return reference.ncfm(
        list(state.syn.latents.detach().split(1)),
        method.num_steps // 2,
        factor=getattr(ctx.decode, "factor", 1),
        networks=networks,
        real=lambda step, c: task.train.draw(c, method.batch_real, draws("real", step, c)),
        augment=siamese(ctx),
        noise=lambda step: draws("frequencies", step).normal(8, width),
        psi=psi,
        amplitude=method.amplitude,
        phase=method.phase,
        calibration=method.calibration,
        lr=method.optim.lr,
        momentum=method.optim.momentum,
        lr_psi=method.optim_frequencies.lr,
    )


@pytest.mark.parametrize("adversarial", [False, True])
@pytest.mark.parametrize(("augment", "decode"), [("none", Pixels()), (STRATEGY, Factor(factor=2))])
def test_agrees_with_the_slow_twin_step_by_step(
    augment: str,
    decode: Decode,
    adversarial: bool,
    make_context: MakeContext,
) -> None:
    ctx = make_context(augment, decode)
    method = small(adversarial=adversarial, amplitude=0.7, phase=0.4, calibration=20.0)
    previous = method.init(ctx).syn.latents.detach()
    for (record, latents), (loss, expected) in zip(run(method, ctx), twin(method, ctx), strict=True):
        assert record["loss"] == pytest.approx(loss, rel=1e-4)
        torch.testing.assert_close(latents, torch.cat(expected), rtol=1e-4, atol=1e-4)
        assert (latents - previous).abs().max() > 1e-3
        previous = latents


def test_the_distance_by_hand() -> None:
    """At one frequency: exp(i 0) and exp(i pi) / 2 + 1/2 = 0; exp(i 0) and exp(i pi / 2)."""
    zero, half, quarter = torch.zeros(1, 1), torch.tensor([[0.0], [torch.pi]]), torch.tensor([[torch.pi / 2]])
    one = torch.ones(1, 1)
    torch.testing.assert_close(characteristic_distance(zero, half, one, 0.5, 0.5), torch.tensor(0.5**0.5))
    torch.testing.assert_close(characteristic_distance(zero, quarter, one, 0.5, 0.3), torch.tensor(0.6**0.5))


def test_equal_features_have_no_distance_and_a_finite_gradient() -> None:
    features = torch.randn(4, 6).requires_grad_()
    value = characteristic_distance(features.detach(), features, torch.randn(9, 6), 0.5, 0.5)
    (gradient,) = torch.autograd.grad(value, features)
    assert value < 1e-3 and gradient.isfinite().all()


def test_frequencies_are_learned_to_increase_the_distance(make_context: MakeContext) -> None:
    ctx = make_context()
    method = small(adversarial=True, num_frequencies=64, calibration=0.0, optim_frequencies=Optim(lr=0.1))
    state = method.init(ctx)
    before = sum(method.loss(ctx, state, 0, part) for part in method.parts(ctx))
    latents = state.syn.latents.detach().clone()
    for _ in range(10):
        method.step(ctx, state, 0)
        state.params = method.networks(ctx, 0)[0].params
        state.syn.latents.data.copy_(latents)
    assert sum(method.loss(ctx, state, 0, part) for part in method.parts(ctx)) > before


def test_every_row_of_noise_is_a_frequency_of_its_own(make_context: MakeContext) -> None:
    method = small(adversarial=True, num_frequencies=64)
    frequencies = method.frequencies(make_context(), method.init(make_context()), 0)
    assert len(frequencies.unique(dim=0)) == 64 and frequencies.abs().max() < 1


def test_a_network_lies_between_the_first_and_the_last_weights(make_context: MakeContext) -> None:
    ctx = make_context()
    for share in (0.0, 0.25, 1.0):
        method, seen = small(initial_share=share), list[float]()
        for step in range(0, 80, 2):
            matched, trained = method.networks(ctx, step)
            again = method.networks(ctx, step + 1)
            assert all(torch.equal(trained.params[name], p) for name, p in again[1].params.items())
            pairs = [(experts_of(ctx).pair(expert, 0, 4)) for expert in range(2)]
            (first,) = (a for a, b in pairs if torch.equal(b["classifier.bias"], trained.params["classifier.bias"]))
            apart = [x["classifier.bias"] - trained.params["classifier.bias"] for x in (matched.params, first)]
            seen.append(float(apart[0].norm() / apart[1].norm()))
        assert 0.9 * share <= max(seen) <= share + 1e-4 and min(seen) <= 0.1 * share + 1e-4


def test_without_calibration_every_step_matches(make_context: MakeContext) -> None:
    ctx, method = make_context(), small(calibration=0.0)
    assert method.graphs(ctx) and not small().graphs(ctx)
    losses = [float(record["loss"]) for record, _ in run(method, ctx)]
    alternating = [float(record["loss"]) for record, _ in run(small(calibration=1e-3), ctx)]
    assert min(losses) > 1 and max(alternating[1::2]) < 0.1 < min(alternating[::2])


def test_calibration_reads_no_real_images(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx, method, drawn = make_context(), small(), list[int]()
    source = type(ctx.task.train)
    draw = source.draw
    monkeypatch.setattr(source, "draw", lambda self, c, *rest: drawn.append(c) or draw(self, c, *rest))
    seen = [len(drawn) for _ in run(method, ctx)]
    assert [after - before for before, after in itertools.pairwise(seen)] == [0, 3, 0, 3, 0]


@pytest.mark.parametrize("micro_batch", [1, 3, 99])
def test_micro_batches_change_nothing(micro_batch: int, make_context: MakeContext) -> None:
    usual, other = (
        list(run(small(num_steps=4), make_context(compute=c))) for c in (Compute(), Compute(micro_batch=micro_batch))
    )
    for (record, a), (expected, b) in zip(other, usual, strict=True):
        assert record["loss"] == pytest.approx(float(expected["loss"]), rel=1e-4)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


ADVERSARIAL = NCFM(
    num_steps=4,
    batch_real=6,
    last_epoch=4,
    num_frequencies=8,
    adversarial=True,
    optim=Optim(kind="adam", lr=0.1),
    optim_frequencies=Optim(lr=0.1, momentum=0.9),
)


def test_learned_frequencies_learn_and_resume_to_the_byte() -> None:
    every_leaf_learns(ADVERSARIAL)
    resumes_to_the_byte(ADVERSARIAL)


def test_networks_are_trained_as_published(make_context: MakeContext) -> None:
    task = make_context().task
    assert NCFM().training(task) == Training(
        num_epochs=2000,
        batch_size=128,
        optimiser="adamw",
        lr=1e-3,
        weight_decay=0.01,
        schedule=Schedule(drop_at=(0.2, 0.4, 0.6, 0.8), drop_factor=0.5),
        cutmix=0.5,
    )
    assert NCFM().training_augment(task) == task.augment


def test_recipes_hold_the_published_values() -> None:
    recipes = {name: named(name) for name in catalog.recipes() if name.split("-")[0] == "ncfm"}
    optim = Optim(kind="adam", lr=0.157, momentum=0.35, beta2=0.99)
    published = NCFM(optim=optim)
    assert published == NCFM(
        num_steps=40000,
        batch_real=1024,
        last_epoch=60,
        num_frequencies=4096,
        amplitude=0.5,
        phase=0.5,
        calibration=1.0,
        optim=optim,
    )
    for name in ("ncfm", *(f"ncfm-cifar10-ipc{ipc}" for ipc in (1, 10, 50))):
        plan = recipes.pop(name)
        assert (plan.method, plan.decode, plan.augment) == (published, Factor(factor=2), "dsa:mode=D")
    assert published.optim.lr == pytest.approx(0.01 * 10**0.5 / 0.2009, rel=5e-3)
    assert set(recipes) == {"ncfm-digits-ipc1", "ncfm-digits-ipc10"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_frequencies": 0}, "method.num_frequencies must be at least 1"),
        ({"num_frequencies": 1, "adversarial": True}, "method.num_frequencies must be at least 2"),
        ({"amplitude": -1.0}, "method.amplitude must be at least 0"),
        ({"initial_share": 1.5}, r"method.initial_share must lie in \[0, 1\], got 1.5"),
    ],
)
def test_refuses_bad_values(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**fields)
