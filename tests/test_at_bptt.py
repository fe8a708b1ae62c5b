"""AT-BPTT against its slow twin, and what its stages and windows imply."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from condense.inner import Adam, RandomTruncated, Truncated
from condense.method import Context, Optim
from condense.methods.at_bptt import ATBPTT, ATState
from condense.recipe import named
from condense.rng import Rng
from condense.synthetic import Logits
from condense.testing import resumes_to_the_byte
from tests.reference import bilevel as twin
from tests.test_bilevel import context, real, seen

TINY = ATBPTT(
    num_steps=12,
    inner_steps=12,
    window=4,
    spread=2,
    same_burn_in=2,
    lr=0.01,
    batch_per_class=1,
    batch_real=9,
    optim=Optim(lr=0.5),
    gains=(1.0, 1.0),
)
"""Every epoch counts towards the end of its stage, which it is after two: 1.8 and 1.5 are asked for."""
T, W, D = TINY.inner_steps, TINY.window, TINY.spread


@pytest.mark.parametrize("augment", ["none", "flip_rotate"])
def test_it_follows_its_twin_step_by_step(augment: str) -> None:
    first_images = torch.randn(9, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ctx = dataclasses.replace(context(augment, ipc=3), first_images=first_images)
    task, ours, theirs = ctx.task, TINY.init(ctx), TINY.init(ctx)

    def logits(theta: dict[str, Tensor], x: Tensor) -> Tensor:
        return task.network.logits(theta, {}, x)

    accuracies, found = list[float](), list[float]()
    stages, norm = [], 0.0
    for step in range(TINY.num_steps):
        theta = task.network.init(ctx.rng, "network", step).params
        adam = (TINY.lr, Adam().eps_root)
        if step % 2 == 0:
            accuracies += [sum(found) / 2] if step else []
            stage = twin.at_bptt_stage(accuracies, T, TINY.gains, TINY.patience)
            batches = [seen(ctx, batch) for batch in TINY.batches(ctx, theirs, step, T)]
            norms = twin.at_bptt_norms(logits, theta, batches, *adam)
            draws, uniform = ctx.rng("window", step), ctx.rng("window", step).uniform(1).item()
            first, length = twin.at_bptt_window(norms, stage, W, D, 1.0, uniform, lambda n, d=draws: d.integer(0, n))  # type: ignore[misc]
            stages.append(stage)
            found = []
        record = TINY.step(ctx, ours, step)
        assert (record["stage"], record["first"], record["window"]) == (stage, first, length)
        batches = [seen(ctx, batch) for batch in TINY.batches(ctx, theirs, step, first + length)]
        x, y = real(ctx, TINY, step)
        x = task.augment.apply(x, TINY.drawn(ctx, len(x), step, "real"))
        trained = twin.trained_by_adam(logits, theta, batches, first, *adam)
        loss = torch.nn.functional.cross_entropy(logits(trained, x), y)
        found.append((logits(trained, x).argmax(1) == y).float().mean().item())
        latents = theirs.syn.latents
        (latents.grad,) = torch.autograd.grad(loss, [latents])
        length_of_gradient = float(latents.grad.norm())
        norm = length_of_gradient if step == 0 else 0.9 * norm + 0.1 * length_of_gradient
        latents.grad *= min(1.0, 2 * norm / length_of_gradient)
        theirs.optimisers["latents"].step()
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert record["loss_accuracy"] == pytest.approx(found[-1])
        torch.testing.assert_close(ours.syn.latents, latents, rtol=1e-6, atol=1e-9)
    assert stages == [1, 1, 2, 2, 3, 3]


def begun(**fields: Any) -> tuple[ATBPTT, Context, ATState]:
    method = dataclasses.replace(TINY, **fields)
    ctx = context(dtype=torch.float32)
    return method, ctx, method.init(ctx)


def test_windows_stay_around_the_one_of_the_recipe() -> None:
    """In the published code the base of the next window is the last one, which grows without end."""
    method, ctx, state = begun()
    for stage, lengths in ((1, set(range(W - D, W + D))), (2, {W + D}), (3, {W - D})):
        state.stage = stage
        places = []
        for epoch in range(30):
            method.place(ctx, state, epoch)
            places.append((state.first, state.length))
        assert {length for _, length in places} <= lengths
        assert all(0 <= first <= T - length for first, length in places)
        assert len({first for first, _ in places}) > 3


@pytest.mark.parametrize(("peak", "expected"), [(0, {1: (0, 2), 3: (10, 2)}), (11, {1: (7, 5), 3: (0, 2)})])
def test_windows_follow_the_gradient_and_stay_inside(
    peak: int, expected: dict[int, tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 1 begins at the largest gradient, stage 3 at its mirror image; where it would begin before 0, at 0."""
    norms = torch.arange(T).double() / 100
    norms[peak] = 50
    monkeypatch.setattr(ATBPTT, "gradient_norms", lambda *_: norms)
    method, ctx, state = begun(temperature=0.1)
    for state.stage, place in expected.items():
        method.place(ctx, state, 0)
        assert (state.first, state.length) == place


def test_positions_follow_the_softmax_of_norms_relative_to_their_mean() -> None:
    norms, rng = torch.tensor([1.0, 4.0, 2.0, 1.0], dtype=torch.float64), Rng(0)

    def positions(norms: Tensor, temperature: float) -> Tensor:
        method = dataclasses.replace(TINY, temperature=temperature)
        return torch.tensor([method.position(norms, rng("window", step)) for step in range(2000)])

    found = positions(norms, 1.0)
    torch.testing.assert_close(found.bincount() / 2000, (norms / 2).softmax(0).float(), rtol=0, atol=0.03)
    assert torch.equal(positions(1000 * norms, 1.0), found)
    assert positions(norms, 1e-2).unique().tolist() == [1]
    assert positions(norms, 1e9).bincount().min() > 430


def test_stages_end_after_enough_epochs_in_a_row_without_gain() -> None:
    """At 300 training steps 45 and 37.5 epochs: the published code waits for a count of exactly 37.5."""
    method = ATBPTT(inner_steps=300)
    state = ATBPTT.init(TINY, context(dtype=torch.float32))
    stages, accuracy = [], 0.0
    for epoch in range(200):
        accuracy += {0: 0.02, 30: 0.02, 90: 0.011}.get(epoch, 0.005)
        method.end_epoch(state, accuracy)
        stages.append(state.stage)
    assert [stages.index(stage) for stage in (2, 3)] == [30 + 45, 90 + 38]
    assert stages[-1] == 3


@pytest.mark.parametrize("labels", [None, Logits()])
def test_it_resumes_to_the_byte_in_every_stage(labels: Any) -> None:
    fields = {} if labels is None else {"labels": labels}
    resumes_to_the_byte(dataclasses.replace(TINY, num_steps=9, same_burn_in=1, optim=Optim(kind="adam")), **fields)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"window": 0}, "window must be positive"),
        ({"temperature": 0.0}, "temperature must be positive"),
        (
            {"spread": 40},
            r"make windows of 0 to 80 steps, .* give windows of 1 to 200 steps, for example spread=0",
        ),
        ({"window": 195}, "windows of 185 to 205 steps, but the network takes 200"),
        ({"adjoint": RandomTruncated()}, "method.adjoint random-truncated has a window of its own; give .*exact"),
        ({"adjoint": Truncated()}, "method.adjoint truncated has a window of its own"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why) as error:
        ATBPTT(**fields)
    assert "\n" not in str(error.value)


def test_the_recipes_hold_the_published_values() -> None:
    ten, hundred = (named(f"at-bptt-{dataset}-ipc10") for dataset in ("cifar10", "cifar100"))
    assert ten.method == ATBPTT(optim=Optim(kind="adam", lr=1e-3, momentum=0.9))
    assert hundred.method == dataclasses.replace(
        ten.method,
        num_steps=60000 * 50,
        inner_steps=300,
        window=100,
        spread=20,
        batch_per_class=1,
        batch_real=1000,
        same_burn_in=50,
    )
    assert (ten.augment, ten.transform, ten.labels.name) == ("flip_rotate", "zca-relative", "hard")
    assert (hundred.augment, hundred.transform, hundred.labels.name) == ("flip_rotate", "zca-relative", "logits")
