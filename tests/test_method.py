"""What every gradient method has: optimisers, the running average, bounded pixels."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from condense import engine, testing
from condense.augment import Augment
from condense.compute import Compute
from condense.data.datasets import Arrays
from condense.data.transform import Identity
from condense.method import Context, GradientMethod, GradientState, Optim, Value, clip_grad
from condense.networks import Functional
from condense.rng import Rng
from condense.schedule import Schedule
from condense.synthetic import DECODERS, Factor, Hallucinator, Hard, Logits, Origin, Pixels, load
from condense.task import Split, make_task
from tests.reference import optim as twins

KINDS = ("sgd", "adam", "lamb", "adabelief")


@dataclass(frozen=True, kw_only=True)
class Pull(GradientMethod):
    """Pulls images to ``goal``, targets to the first class and the step size to 1."""

    num_steps: int = 6
    goal: float = 3.0

    def init(self, ctx: Context) -> GradientState:
        syn = ctx.new_set(*ctx.initial("real"), lr=0.5)
        return GradientState(syn=syn, optimisers=self.optimisers(syn))

    def loss(self, ctx: Context, state: Any, step: int, part: int) -> Tensor:
        images, targets = state.syn()
        loss: Tensor = (images - self.goal).square().sum() + (state.syn.lr - 1).square()
        return loss if targets.dim() == 1 else loss - targets[:, 0].sum()


@pytest.fixture
def ctx(tiny: Arrays) -> Context:
    task = make_task(
        tiny,
        transform="channel",
        split=Split(val_fraction=0.0),
        network=Functional("mlp", tiny.input_shape, 3, "cpu"),
        augment=Augment(),
        device=torch.device("cpu"),
    )
    origin = Origin(dataset=task.dataset(), transform=task.transform.describe(), recipe_hash="h")
    return Context(task, Rng(0), 2, Pixels(), Hard(), Compute(), origin)


def params() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [20 * torch.randn(3, 4, generator=generator, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]


def grads(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params()]


def follow(optimiser: torch.optim.Optimizer, leaves: list[Tensor], steps: range) -> None:
    for step in steps:
        for leaf, grad in zip(leaves, grads(step), strict=True):
            leaf.grad = grad
        optimiser.param_groups[0]["lr"] = 0.1 / step
        optimiser.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_every_optimiser_is_its_update_rule_written_out(kind: Any, momentum: float) -> None:
    """The parameters are longer than the 10 at which some definitions of lamb bound them; one begins at zero."""
    leaves, expected, memory = params(), params(), [{}, {}]  # type: ignore[var-annotated]
    optimiser = Optim(kind=kind, lr=7.0, momentum=momentum).build(leaves)
    rule: Callable[..., Tensor] = getattr(twins, kind)
    for step in range(1, 8):
        follow(optimiser, leaves, range(step, step + 1))
        pairs = zip(expected, grads(step), memory, strict=True)
        expected = [rule(w, g, remembered, step, 0.1 / step, momentum) for w, g, remembered in pairs]
        for leaf, w in zip(leaves, expected, strict=True):
            torch.testing.assert_close(leaf, w, rtol=1e-12, atol=1e-12)
        assert leaves[0].norm() > 10


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimiser_goes_on_from_what_it_stored(kind: Any) -> None:
    whole, stopped = params(), params()
    follow(Optim(kind=kind).build(whole), whole, range(1, 7))
    first, second = (Optim(kind=kind).build(stopped) for _ in range(2))
    follow(first, stopped, range(1, 4))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    follow(second, stopped, range(4, 7))
    assert all(torch.equal(a, b) for a, b in zip(whole, stopped, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimiser_that_begins_anew_takes_the_steps_of_a_new_one(kind: Any) -> None:
    used, fresh = params(), params()
    first = Optim(kind=kind, momentum=0.5).build(used)
    follow(first, used, range(1, 7))
    for leaf, w in zip(used, params(), strict=True):
        leaf.data.copy_(w)
    Optim.restart(first)
    follow(first, used, range(1, 4))
    follow(Optim(kind=kind, momentum=0.5).build(fresh), fresh, range(1, 4))
    assert all(torch.equal(a, b) for a, b in zip(used, fresh, strict=True))


def test_the_rate_follows_cosine_and_halves() -> None:
    plain, halved = Optim(lr=0.8), Optim(lr=0.8, schedule=Schedule(drop_at=(0.5, 0.75), drop_factor=0.5))
    cosine = Optim(lr=0.8, schedule=Schedule(cosine_to=0.25))
    assert {plain.lr_at(step, 100) for step in (0, 30, 100)} == {0.8}
    assert [halved.lr_at(step, 100) for step in (0, 49, 50, 74, 75, 100)] == [0.8, 0.8, 0.4, 0.4, 0.2, 0.2]
    assert [cosine.lr_at(step, 2) for step in range(3)] == pytest.approx([0.8, 0.5, 0.2])
    assert cosine.lr_at(1, 4) == pytest.approx(0.2 + 0.6 * (1 + math.sqrt(0.5)) / 2)
    assert replace(cosine, schedule=replace(cosine.schedule, drop_at=(0.5,), drop_factor=0.5)).lr_at(
        1, 1
    ) == pytest.approx(0.1)


def test_a_step_uses_the_rate_of_its_fraction_of_the_run(ctx: Context) -> None:
    method = Pull(
        num_steps=4,
        optim=Optim(lr=0.01, schedule=Schedule(drop_at=(0.5,), drop_factor=0.5)),
        optim_lr=Optim(lr=0.1, schedule=Schedule(cosine_to=0.0)),
    )
    state = method.init(ctx)
    records = [method.step(ctx, state, step) for step in range(4)]
    assert [record["lr_latents"] for record in records] == [0.01, 0.01, 0.005, 0.005]
    wave = [0.1 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert [record["lr_lr"] for record in records] == pytest.approx(wave)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"lr": math.inf}, "finite lr >= 0"),
        ({"lr": -1.0}, "finite lr >= 0"),
        ({"momentum": 1.0}, "momentum < 1"),
    ],
)
def test_bad_optimisers_are_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Optim(**fields)


@pytest.mark.parametrize("ema", [0.0, 1.0, -0.5])
def test_a_bad_decay_is_refused(ema: float) -> None:
    with pytest.raises(ValueError, match=r"try 0\.999"):
        Pull(ema=ema)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_for_no_number(kind: Any, ctx: Context) -> None:
    """On the device ``meta`` tensors have no values: to read one is an error."""
    few = Optim(kind=kind, schedule=Schedule(cosine_to=0.1))
    method = Pull(clip=0.3, ema=0.9, clamp=True, optim=few, optim_labels=few, optim_decoder=few, optim_lr=few)
    ctx = replace(ctx, decode=Factor(factor=2), labels=Logits())
    syn = method.init(ctx).syn.to("meta")
    state = GradientState(syn=syn, optimisers=method.optimisers(syn))
    there = replace(ctx, task=replace(ctx.task, transform=Identity(), device=torch.device("meta")))
    for step in range(2):
        record = engine._step(method, there, state, step, None)
    read_later = {name for name, value in record.items() if isinstance(value, Tensor) and not value.dim()}
    norms = {f"grad_{name}" for name in state.leaves()}
    assert read_later == {"loss", *norms, "syn_lr", "image_mean", "image_std", "image_max"}


def test_a_learning_rate_on_the_device_is_set_in_place(ctx: Context) -> None:
    method = Pull(optim=Optim(lr=0.01, schedule=Schedule(cosine_to=0.0)))
    one, two = method.init(ctx), method.init(ctx)
    rate = torch.tensor(7.0)
    two.optimisers["latents"].param_groups[0]["lr"] = rate
    for step in range(3):
        method.step(ctx, one, step)
        method.step(ctx, two, step)
        assert rate == torch.tensor(method.optim.lr_at(step, method.num_steps))
        torch.testing.assert_close(one.syn.latents, two.syn.latents)
    assert two.optimisers["latents"].param_groups[0]["lr"] is rate


@pytest.mark.parametrize("max_norm", [0.3, 2.0, 1e9])
def test_a_gradient_is_clipped_to_the_last_bit_as_with_a_norm_that_was_read(max_norm: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        grad = torch.randn(3, 4, generator=generator) * torch.rand((), generator=generator)
        param, norm = torch.nn.Parameter(torch.zeros(3, 4)), grad.norm()
        param.grad = grad.clone()
        clip_grad(param, norm.double(), max_norm)
        assert torch.equal(param.grad, grad * (max_norm / norm.item()) if norm.item() > max_norm else grad)


def composed(ctx: Context) -> Context:
    """With something to learn in every leaf."""
    return replace(ctx, decode=Hallucinator(num_styles=2), labels=Logits())


def test_the_average_is_that_of_all_leaves_corrected_for_its_beginning(ctx: Context) -> None:
    ctx, method = composed(ctx), Pull(ema=0.7, optim=Optim(lr=1e-3), optim_decoder=Optim(lr=1e-5))
    state, seen = method.init(ctx), []
    for step in range(method.num_steps):
        method.step(ctx, state, step)
        seen.append({name: tensor.clone() for name, tensor in state.syn.state_dict().items()})
        averaged = method.finalize(ctx, state, step + 1).state_dict()
        weights = [0.7 ** (step - t) for t in range(step + 1)]
        learned = [name for name, _ in state.syn.named_parameters()]
        assert {name.split(".")[0] for name in learned} == {"latents", "provider", "decoder", "log_lr"}
        for name in learned:
            mean = sum(w * past[name] for w, past in zip(weights, seen, strict=True)) / sum(weights)
            torch.testing.assert_close(averaged[name], mean)
            assert step == 0 or not torch.equal(averaged[name], seen[-1][name])
            assert torch.equal(state.syn.state_dict()[name], seen[-1][name]), "finalize changed the state"
    assert torch.equal(averaged["classes"], seen[-1]["classes"])


def test_the_average_of_the_first_step_is_the_first_step_and_without_ema_the_set_is_stored(ctx: Context) -> None:
    for method in (Pull(ema=0.9, num_steps=1), Pull(num_steps=3)):
        state = method.init(ctx)
        for step in range(method.num_steps):
            method.step(ctx, state, step)
        torch.testing.assert_close(method.finalize(ctx, state, method.num_steps).latents, state.syn.latents)


@pytest.mark.parametrize("kind", KINDS)
def test_average_and_optimisers_survive_stop_and_resume(
    kind: Any, ctx: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx, few = composed(ctx), Optim(kind=kind, lr=1e-5, schedule=Schedule(cosine_to=0.1))
    method = Pull(ema=0.8, optim=few, optim_labels=few, optim_decoder=few, optim_lr=few)
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    engine.run(method, ctx, method.init(ctx), tmp_path / "whole")
    step = GradientMethod.step

    def killed(self: Any, ctx: Any, state: Any, done: int) -> dict[str, Value]:
        if done == 3:
            raise KeyboardInterrupt
        return step(self, ctx, state, done)

    monkeypatch.setattr(engine, "CHECKPOINT_STEPS", 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Pull, "step", killed)
        engine.run(method, ctx, method.init(ctx), tmp_path / "stopped")
    engine.run(method, ctx, method.init(ctx), tmp_path / "stopped", resume=True)
    for file in ("synthetic.safetensors", "snapshots/step_0000006.safetensors"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    stored, early = load(tmp_path / "whole"), load(tmp_path / "whole" / "snapshots" / "step_0000001.safetensors")
    assert not torch.equal(stored.latents, early.latents)


@pytest.mark.parametrize("decode", [Pixels(), Factor(factor=2)])
@pytest.mark.parametrize("goal", [30.0, -30.0])
def test_clamp_moves_back_what_left_and_nothing_else(ctx: Context, decode: Any, goal: float) -> None:
    ctx = replace(ctx, decode=decode)
    still = Optim(lr=0.0)
    free = Pull(goal=goal, optim=Optim(lr=0.01, momentum=0.0), optim_lr=still)
    bounded = replace(free, clamp=True)
    one, two = free.init(ctx), bounded.init(ctx)
    for step in range(3):
        with torch.no_grad():
            one.syn.latents.copy_(two.syn.latents)
        free.step(ctx, one, step)
        bounded.step(ctx, two, step)
        pixels = ctx.task.transform.inverse(one.syn.latents.detach())
        outside = (pixels < 0) | (pixels > 1)
        assert outside.any()
        assert torch.equal(two.syn.latents[~outside], one.syn.latents[~outside])
        border = ctx.task.transform.inverse(two.syn.latents.detach())[outside]
        torch.testing.assert_close(border, torch.full_like(border, float(goal > 0)), rtol=0, atol=1e-5)


def test_mirror_images_have_no_part_in_training_on_the_set(ctx: Context) -> None:
    task = replace(ctx.task, augment=Augment.parse("crop_flip:mode=M,flips=true"))
    assert str(Pull().training_augment(task)) == "crop_flip:mode=M"


@pytest.mark.parametrize("name", [name for name, decode in DECODERS.items() if decode.differentiable])
def test_clamp_is_refused_where_no_pixels_are_stored_or_they_are_whitened(name: str) -> None:
    method, decode = Pull(clamp=True), DECODERS[name]()
    refused = method.incompatibility(decode, Hard(), "channel")
    assert (refused is None) == decode.stores_pixels == (name in ("pixels", "factor"))
    assert refused is None or refused.endswith(f"{name} does not store; give clamp=False")
    assert "give clamp=False" in str(method.incompatibility(Pixels(), Hard(), "zca"))
    refused = Pull().incompatibility(decode, Hard(), "zca")
    assert "give transform='channel'" in str(refused) if decode.makes_pixels else refused is None


@dataclass(frozen=True, kw_only=True)
class Terms(Pull):
    """A loss of two parts, each with terms."""

    num_steps: int = 1

    def parts(self, ctx: Context) -> range:
        return range(2)

    def loss(self, ctx: Context, state: Any, step: int, part: int) -> tuple[Tensor, dict[str, Tensor]]:
        near, small = super().loss(ctx, state, step, part), state.syn()[0].square().sum()
        return near + small, {"near": near, "small": small}


def test_terms_are_summed_over_parts_and_logged_and_add_nothing_to_the_gradient(ctx: Context, tmp_path: Path) -> None:
    method = Terms()
    state = method.init(ctx)
    expected = [method.loss(ctx, state, 0, part) for part in range(2)]
    grads = torch.autograd.grad(expected[0][0] + expected[1][0], state.syn.latents)
    engine.run(method, ctx, state, tmp_path)
    (line,) = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    for name in ("near", "small"):
        assert line[f"loss_{name}"] == pytest.approx(sum(terms[name].item() for _, terms in expected), rel=1e-5)
    assert line["loss"] == pytest.approx(line["loss_near"] + line["loss_small"], rel=1e-5)
    assert line["grad_latents"] == pytest.approx(grads[0].norm().item(), rel=1e-5)


@dataclass(frozen=True, kw_only=True)
class TermsByPart(Terms):
    def loss(self, ctx: Context, state: Any, step: int, part: int) -> tuple[Tensor, dict[str, Tensor]]:
        value, terms = super().loss(ctx, state, step, part)
        return value, {f"{name} {part}": term for name, term in terms.items()}


@dataclass(frozen=True, kw_only=True)
class ManyTerms(Terms):
    def loss(self, ctx: Context, state: Any, step: int, part: int) -> tuple[Tensor, dict[str, Tensor]]:
        value, terms = super().loss(ctx, state, step, part)
        return value, {str(number): terms["near"] for number in range(17)}


@pytest.mark.parametrize(
    ("method", "complaint"),
    [
        (TermsByPart(), "different terms, near 1, small 1 and near 0, small 0"),
        (ManyTerms(), "17 terms, but at most 16"),
    ],
)
def test_terms_that_cannot_be_summed_are_refused(method: Terms, complaint: str, ctx: Context) -> None:
    with pytest.raises(ValueError, match=complaint):
        method.step(ctx, method.init(ctx), 0)


@dataclass(frozen=True, kw_only=True)
class OneTerm(Pull):
    """One part, so that a second process has none and does not know the term."""

    num_steps: int = 2

    def loss(self, ctx: Context, state: Any, step: int, part: int) -> tuple[Tensor, dict[str, Tensor]]:
        value = super().loss(ctx, state, step, part)
        return value, {"whole": value}


def test_a_process_without_a_part_adds_nothing_to_the_terms() -> None:
    testing.any_number_of_processes_agrees(OneTerm())


@dataclass(frozen=True, kw_only=True)
class Own(Pull):
    """Updates by a rule of its own, and has more to say."""

    def update(self, state: Any, record: dict[str, Value]) -> None:
        record["seen"] = record["grad_latents"]
        if record["lr_latents"] < 0.01:
            super().update(state, record)

    def after(self, ctx: Context, state: Any, step: int) -> dict[str, float]:
        return {"largest": state.syn.latents.abs().max().item()}


def test_an_update_of_its_own_sees_gradients_and_rates_and_what_follows_is_logged(ctx: Context) -> None:
    method = Own(num_steps=2, optim=Optim(lr=0.01, schedule=Schedule(drop_at=(0.5,), drop_factor=0.5)))
    state = method.init(ctx)
    before = state.syn.latents.clone()
    record = method.step(ctx, state, 0)
    assert torch.equal(state.syn.latents, before) and record["seen"] == record["grad_latents"] > 0
    record = method.step(ctx, state, 1)
    assert not torch.equal(state.syn.latents, before)
    assert record["largest"] == state.syn.latents.abs().max().item()
