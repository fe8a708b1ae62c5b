"""RFAD against the slow twin, and what its random features imply."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from condense import api, catalog
from condense.compute import Compute
from condense.kernels import fully_connected
from condense.method import Context, GradientState, Optim
from condense.methods.rfad import RFAD, gaussian
from condense.networks import Functional, build
from condense.recipe import Recipe, named
from condense.rng import Rng
from condense.synthetic import Factor, Hard, Labels, Logits, Pixels, Targets
from condense.synthetic import load as load_set
from tests.reference.kip import one_hot_less_mean
from tests.reference.rfad import rfad
from tests.test_kip import make_context

NETWORK = "convnet:depth=1,norm=none,width=4"
SMALL: dict[str, Any] = {"num_networks": 3, "num_batches": 2, "batch_real": 7}


def begin(method: RFAD, ctx: Context) -> GradientState:
    state = method.init(ctx)
    state.syn.double()
    state.learned.double()
    return state


def run(method: RFAD, ctx: Context) -> tuple[list[dict[str, float]], GradientState]:
    state = begin(method, ctx)
    return [method.step(ctx, state, step) for step in range(method.num_steps)], state


class Embed(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.network.embed(x)
        return features


def exact_features(ctx: Context) -> Context:
    """In the tests' float64; the engine's features are float32."""
    network = ctx.task.network
    ctx.__dict__["features"] = lambda params, buffers, x: network.features(params, buffers, x, train=True)
    return ctx


@pytest.mark.parametrize(
    ("objective", "pixel_map", "labels"),
    [("mse", False, Hard()), ("platt", False, Targets()), ("platt", True, Hard())],
)
def test_agrees_with_the_slow_twin_step_by_step(objective: Any, pixel_map: bool, labels: Labels) -> None:
    ctx = exact_features(make_context(network=NETWORK, labels=labels))
    task, draws = ctx.task, ctx.rng
    method = RFAD(
        num_steps=4,
        objective=objective,
        pixel_map=pixel_map,
        optim=Optim(kind="adabelief", lr=0.01, momentum=0.9),
        optim_labels=Optim(kind="adabelief", lr=0.01, momentum=0.9),
        **SMALL,
    )

    def networks(step: int) -> Sequence[nn.Module]:
        made = []
        for k in range(3):
            network = build(NETWORK, task.input_shape, 3).double()
            network.load_state_dict(gaussian(task.network, draws, step, k).params)
            made.append(Embed(network))
        return made

    state = begin(method, ctx)
    twin = rfad(
        state.syn()[0].detach(),
        one_hot_less_mean(state.syn.classes, 3),
        4,
        real=lambda step: [task.train.sample(7, draws("real", step, part)) for part in range(2)],
        networks=networks,
        objective=objective,
        ridge=method.ridge,
        pixel_map=pixel_map,
        learn_labels=labels.learned,
        lr=0.01,
        lr_temperature=1e-2,
        lr_pixel_map=5e-5,
    )
    previous = state.syn()[0].detach()
    for step, (loss, images, y, k, m) in enumerate(twin):
        record = method.step(ctx, state, step)
        assert record["loss"] == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(state.syn.latents.detach(), images, rtol=1e-5, atol=1e-6)
        if labels.learned:
            torch.testing.assert_close(state.syn()[1].detach(), y, rtol=1e-5, atol=1e-6)
        if objective == "platt":
            assert state.learned["temperature"].item() == pytest.approx(k.item(), rel=1e-5)
        if pixel_map:
            torch.testing.assert_close(state.learned["pixel_map"].detach(), m, rtol=1e-5, atol=1e-9)
        assert (state.syn.latents - previous).abs().max() > 1e-3
        previous = state.syn.latents.detach().clone()


def test_layers_are_gaussian_and_what_is_no_layer_stays_as_it_is() -> None:
    network = Functional("convnet:depth=2,width=64,norm=instance", (3, 8, 8), 10)
    params, usual = gaussian(network, Rng(0), 3, 1).params, network.init(Rng(0), "network", 3, 1).params
    convs = [name for name, shape in network.shapes.items() if len(shape) == 4]
    assert len(convs) == 2
    for name in convs:
        fan_in = math.prod(network.shapes[name][1:])
        assert params[name].std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.1)
        bias = params[name.replace("weight", "bias")]
        assert bias.std().item() == pytest.approx(0.1, rel=0.3)
    norms = [name for name, shape in network.shapes.items() if shape == (64,) and params[name].std() == 0]
    assert len(norms) == 4 and all(torch.equal(params[name], usual[name]) for name in norms)


def test_networks_differ_between_steps_and_units_and_follow_from_the_key() -> None:
    network = Functional(NETWORK, (1, 4, 4), 3)
    drawn = [gaussian(network, Rng(0), *key).params["features.0.weight"] for key in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert torch.equal(drawn[0], drawn[3])
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_with_many_networks_the_kernel_is_that_of_the_infinitely_wide_one() -> None:
    """For an MLP, whose kernel is known: two hidden layers, and a last one on top of the features."""
    ctx = make_context(network="mlp:width=512")
    a, b = (torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1))
    k_ts, k_ss = RFAD(num_networks=200)._kernels(ctx, [a[:1], a[1:]], b, 0)
    expected = fully_connected(a, b, depth=2).nngp, fully_connected(b, depth=2).nngp
    torch.testing.assert_close(k_ts, expected[0], rtol=0.03, atol=0.03)
    torch.testing.assert_close(k_ss, expected[1], rtol=0.03, atol=0.03)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_all_batches_count_alike_together_and_apart(norm: str) -> None:
    """With BatchNorm too, so that any number of processes computes the same."""
    ctx = make_context(network=NETWORK.replace("none", norm))
    method = RFAD(num_steps=1, **SMALL | {"num_batches": 3})
    state = begin(method, ctx)
    apart = [method.loss(ctx, state, 0, part).item() for part in method.parts(ctx)]
    assert len(set(apart)) == 3
    assert method.losses(ctx, state, 0, method.parts(ctx)).item() == pytest.approx(sum(apart), rel=1e-6)
    assert method.losses(ctx, state, 0, (0, 2)).item() == pytest.approx(apart[0] + apart[2], rel=1e-6)


def test_real_images_in_pieces_change_nothing() -> None:
    ctx, method = make_context(network=NETWORK), RFAD(num_steps=1, **SMALL)
    pieces = dataclasses.replace(ctx, compute=Compute(micro_batch=4))
    losses = [method.losses(c, begin(method, c), 0, (0, 1)).item() for c in (ctx, pieces)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_temperature_grows_where_the_regression_is_right() -> None:
    ctx = make_context(network=NETWORK, ipc=5, counts=(5, 5, 5))
    records, state = run(RFAD(num_steps=10, ridge=1e-3, **SMALL), ctx)
    assert state.learned["temperature"].item() > 0.05
    assert records[-1]["loss"] < records[0]["loss"]
    assert RFAD(objective="mse").init(ctx).learned.keys() == set()


def test_the_map_of_pixels_is_folded_into_the_stored_images() -> None:
    ctx = make_context(network=NETWORK)
    method = RFAD(num_steps=3, pixel_map=True, optim_pixel_map=Optim(kind="adabelief", lr=0.01, momentum=0.9), **SMALL)
    _, state = run(method, ctx)
    before = {name: t.clone() for name, t in state.syn.state_dict().items()}
    stored = method.finalize(ctx, state, 3)
    expected = (state.syn.latents.flatten(1) @ state.learned["pixel_map"]).view(6, 1, 4, 4)
    torch.testing.assert_close(stored()[0].detach(), expected.detach())
    assert (stored.latents - state.syn.latents).abs().max() > 1e-3
    assert all(torch.equal(t, before[name]) for name, t in state.syn.state_dict().items())
    plain = dataclasses.replace(method, pixel_map=False)
    fresh = begin(plain, ctx)
    with torch.no_grad():
        fresh.syn.latents.copy_(stored.latents)
        fresh.learned["temperature"].copy_(state.learned["temperature"])
    assert plain.loss(ctx, fresh, 3, 0).item() == pytest.approx(method.loss(ctx, state, 3, 0).item(), rel=1e-5)


def test_a_map_that_cannot_be_folded_is_refused() -> None:
    reason = RFAD(pixel_map=True).incompatibility(Factor(), Hard(), "channel")
    assert reason is not None and "factor" in reason and reason.endswith("; give pixel_map=False")
    assert RFAD(pixel_map=True).incompatibility(Pixels(), Hard(), "channel") is None
    reason = RFAD(pixel_map=True, clamp=True).incompatibility(Pixels(), Hard(), "channel")
    assert reason is not None and reason.endswith("; give clamp=False")
    assert RFAD(clamp=True).incompatibility(Factor(), Hard(), "channel") is None


def test_a_run_with_all_that_it_can_learn_resumes_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = RFAD(num_steps=4, pixel_map=True, **SMALL)
    plan = Recipe(method=method, network=NETWORK, ipc=1, labels=Targets(), compute=Compute(exact=True))
    whole = api.run(plan, api.RunOptions(out=tmp_path / "whole", device="cpu"))
    step = RFAD.step

    def killed(self: Any, ctx: Any, state: Any, done: int) -> dict[str, float]:
        if done == 2:
            raise KeyboardInterrupt
        return step(self, ctx, state, done)

    with monkeypatch.context() as patch:
        patch.setattr("condense.engine.CHECKPOINT_STEPS", 1)
        patch.setattr(RFAD, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            api.run(plan, api.RunOptions(out=tmp_path / "part", device="cpu"))
    api.run(plan, api.RunOptions(out=tmp_path / "part", device="cpu", resume=True))
    again = load_set(tmp_path / "part")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_learns_soft_labels_through_a_decoder_with_mirrored_images() -> None:
    ctx = make_context("none:flips=true", network=NETWORK, ipc=1, decode=Factor(factor=2), labels=Logits())
    records, state = run(RFAD(num_steps=2, **SMALL), ctx)
    assert state.syn()[0].shape == (12, 1, 4, 4)
    assert records[-1]["grad_latents"] > 0 and records[-1]["grad_labels"] > 0


def test_the_global_generator_is_left_alone_and_the_seed_matters() -> None:
    method, before = RFAD(num_steps=2, **SMALL), torch.get_rng_state()
    _, state = run(method, make_context(network=NETWORK))
    assert torch.equal(torch.get_rng_state(), before)
    _, other = run(method, make_context(network=NETWORK, seed=1))
    assert not torch.equal(state.syn.latents, other.syn.latents)


def test_recipes_hold_the_published_values() -> None:
    recipes = {name: named(name) for name in catalog.recipes() if name.split("-")[0] == "rfad"}
    del recipes["rfad-digits-ipc10"]
    published = RFAD(
        num_networks=8,
        num_batches=4,
        batch_real=1280,
        ridge=5e-3,
        objective="platt",
        pixel_map=True,
        optim=Optim(kind="adabelief", lr=1e-3, momentum=0.9),
        optim_temperature=Optim(kind="adabelief", lr=1e-2, momentum=0.9),
        optim_pixel_map=Optim(kind="adabelief", lr=5e-5, momentum=0.9),
    )
    for dataset, transform in (("mnist", "channel"), ("fashion-mnist", "channel"), ("cifar10", "zca-relative")):
        for ipc in (1, 10, 50):
            recipe = recipes.pop(f"rfad-{dataset}-ipc{ipc}")
            assert (recipe.dataset, recipe.ipc, recipe.transform) == (dataset, ipc, transform)
            assert (recipe.network, recipe.augment) == ("auto:norm=none,width=256", "none")
            assert recipe.method == published
    assert recipes.pop("rfad").method == dataclasses.replace(published, pixel_map=False)
    assert not recipes


@pytest.mark.parametrize("field", ["num_steps", "num_networks", "num_batches", "batch_real", "ridge"])
def test_refuses_values_out_of_range(field: str) -> None:
    with pytest.raises(ValueError, match=f"method.{field}"):
        RFAD(**{field: 0})
