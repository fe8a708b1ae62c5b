"""A method that breaks a promise is told which one; one that keeps them all passes."""

import copy
import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from condense import testing
from condense.method import Context, GradientMethod, GradientState, Method, Optim
from condense.synthetic import SyntheticSet
from condense.testing import BrokenPromise, check_method


@dataclass(frozen=True, kw_only=True)
class Good(GradientMethod):
    """Pulls the images to one of random brightness, and targets to the first class."""

    num_steps: int = 4
    optim: Optim = Optim(lr=0.05)
    strength: float = 1.0

    def init(self, ctx: Context) -> GradientState:
        syn = ctx.new_set(*ctx.initial("noise"))
        return GradientState(syn=syn, optimisers=self.optimisers(syn))

    def parts(self, ctx: Context) -> Sequence[int]:
        return range(ctx.task.num_classes)

    def loss(self, ctx: Context, state: Any, step: int, part: int) -> Tensor:
        images, targets = state.syn(state.syn.index_of(part))
        goal = ctx.rng("goal", step, part).uniform()
        loss: Tensor = self.strength * (images - goal).square().mean()
        return loss if targets.dim() == 1 else loss - targets[:, 0].sum()


class InitDrawsGlobally(Good):
    def init(self, ctx: Context) -> GradientState:
        syn = ctx.new_set(torch.randn(6, 1, 8, 8), torch.arange(3).repeat_interleave(2))
        return GradientState(syn=syn, optimisers=self.optimisers(syn))


class StepDrawsFromNumpy(Good):
    def loss(self, ctx: Context, state: Any, step: int, part: int) -> Tensor:
        return float(np.random.rand()) * super().loss(ctx, state, step, part)  # noqa: NPY002


class StepDrawsFromRandom(Good):
    def loss(self, ctx: Context, state: Any, step: int, part: int) -> Tensor:
        return random.random() * super().loss(ctx, state, step, part)


class StepDrawsFromTorch(Good):
    def loss(self, ctx: Context, state: Any, step: int, part: int) -> Tensor:
        return torch.rand(()) * super().loss(ctx, state, step, part)


class Remembers(Good):
    def loss(self, ctx: Context, state: Any, step: int, part: int) -> Tensor:
        CALLS.append(step)
        return super().loss(ctx, state, step, part) * len(CALLS)


CALLS: list[int] = []


class Unseeded(Good):
    def init(self, ctx: Context) -> GradientState:
        return super().init(dataclasses.replace(ctx, rng=type(ctx.rng)(0)))

    def loss(self, ctx: Context, state: Any, step: int, part: int) -> Tensor:
        return super().loss(dataclasses.replace(ctx, rng=type(ctx.rng)(0)), state, step, part)


class ForgetsOnResuming(Good):
    """Its count is no field of the state, so no checkpoint holds it."""

    def after(self, ctx: Context, state: Any, step: int) -> None:
        state.count = getattr(state, "count", 0) + 1

    def loss(self, ctx: Context, state: Any, step: int, part: int) -> Tensor:
        return super().loss(ctx, state, step, part) * (1 + getattr(state, "count", 0))


class LogsWhatItForgets(Good):
    def after(self, ctx: Context, state: Any, step: int) -> dict[str, float]:
        state.count = getattr(state, "count", 0) + 1
        return {"count": state.count}


@dataclass(kw_only=True)
class StateWithASet(GradientState):
    seen: set[int] = field(default_factory=set)


class KeepsASet(Good):
    def init(self, ctx: Context) -> GradientState:
        state = super().init(ctx)
        return StateWithASet(syn=state.syn, optimisers=state.optimisers)


class IgnoresLabels(Good):
    def loss(self, ctx: Context, state: Any, step: int, part: int) -> Tensor:
        return state.syn(state.syn.index_of(part))[0].square().mean()


class DetachesImages(Good):
    def loss(self, ctx: Context, state: Any, step: int, part: int) -> Tensor:
        images, targets = state.syn(state.syn.index_of(part))
        return images.detach().square().mean() * targets[:, 0].sum()


class PartsByRank(Good):
    def parts(self, ctx: Context) -> Sequence[int]:
        return range(3 * ctx.ranks.size)


class LossByRank(Good):
    def loss(self, ctx: Context, state: Any, step: int, part: int) -> Tensor:
        return super().loss(ctx, state, step, part) * (1 + ctx.ranks.rank)


@dataclass(kw_only=True)
class CountingState(GradientState):
    count: int = 0


class CountsItsParts(Good):
    """Each process counts its own share."""

    def init(self, ctx: Context) -> GradientState:
        state = super().init(ctx)
        return CountingState(syn=state.syn, optimisers=state.optimisers)

    def loss(self, ctx: Context, state: Any, step: int, part: int) -> Tensor:
        state.count += 1
        return super().loss(ctx, state, step, part) * state.count


class UpdatesByRank(Good):
    def after(self, ctx: Context, state: Any, step: int) -> None:
        with torch.no_grad():
            state.syn.latents.add_(ctx.ranks.rank)


class MeetsTooOften(Good):
    def after(self, ctx: Context, state: Any, step: int) -> None:
        if ctx.ranks.rank:
            ctx.ranks.barrier()


@dataclass(frozen=True, kw_only=True)
class Doubles(Good):
    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "strength", 2 * self.strength)


class NoDataclass(Good):
    weight: float = 1.0


class MakesAnotherNumber(Good):
    def init(self, ctx: Context) -> GradientState:
        return super().init(dataclasses.replace(ctx, ipc=ctx.ipc + 1))


class IsNotFinite(Good):
    def finalize(self, ctx: Context, state: Any, steps: int) -> SyntheticSet:
        syn = copy.deepcopy(state.syn)
        syn.latents.data[0] = torch.inf
        return syn


class WritesAnotherSet(Good):
    """The label that it stores is none of the classes."""

    def finalize(self, ctx: Context, state: Any, steps: int) -> SyntheticSet:
        syn = copy.deepcopy(state.syn)
        syn.provider.classes += 7
        return syn


class FinalizeRounds(Good):
    def finalize(self, ctx: Context, state: Any, steps: int) -> SyntheticSet:
        state.syn.latents.data.round_()
        return super().finalize(ctx, state, steps)


class FinalizesNothing(Good):
    def finalize(self, ctx: Context, state: Any, steps: int) -> Any:
        return None


class InitsNothing(Good):
    def init(self, ctx: Context) -> Any:
        return None


@dataclass(frozen=True, kw_only=True)
class HoldsATensor(Good):
    weights: Any = field(default_factory=lambda: torch.zeros(2))


@dataclass(frozen=True, kw_only=True)
class NeedsAValue(Good):
    value: int


class DefinesNothing(GradientMethod):
    pass


BROKEN: list[tuple[type[Method], Callable[..., None], str]] = [
    (InitDrawsGlobally, testing.depends_on_the_seed_alone, "it changes the global generator of torch; draw from ctx"),
    (StepDrawsFromNumpy, testing.depends_on_the_seed_alone, "it changes the global generator of numpy; draw from ctx"),
    (StepDrawsFromRandom, testing.depends_on_the_seed_alone, "it changes the global generator of random; draw"),
    (StepDrawsFromTorch, testing.depends_on_the_seed_alone, "a step draws from the global generator of torch; draw"),
    (Remembers, testing.depends_on_the_seed_alone, "two runs with the same seed give different sets"),
    (Unseeded, testing.depends_on_the_seed_alone, "another seed gives the same set"),
    (ForgetsOnResuming, testing.resumes_to_the_byte, "writes a different synthetic.safetensors; store what the next"),
    (LogsWhatItForgets, testing.resumes_to_the_byte, "writes a different log.jsonl; store what the next step"),
    (KeepsASet, testing.resumes_to_the_byte, "its state cannot be stored: state.seen is a set"),
    (IgnoresLabels, testing.every_leaf_learns, "do not change the leaf 'labels'; .*, or declare learns_labels = False"),
    (DetachesImages, testing.every_leaf_learns, "do not change the leaf 'latents'; .* without detach$"),
    (PartsByRank, testing.any_number_of_processes_agrees, "its parts depend on the number of processes"),
    (LossByRank, testing.any_number_of_processes_agrees, "two processes make a different set than one"),
    (CountsItsParts, testing.any_number_of_processes_agrees, "two processes make a different set than one"),
    (UpdatesByRank, testing.any_number_of_processes_agrees, "two processes end with different sets"),
    (
        MeetsTooOften,
        testing.any_number_of_processes_agrees,
        "do not exchange the same tensors; make the same calls",
    ),
    (Doubles, testing.is_a_value, "the field strength is 4.0, but 8.0 after it was written to a recipe file"),
    (NoDataclass, testing.is_a_value, "NoDataclass has fields, but is not a dataclass; add @dataclass"),
    (
        MakesAnotherNumber,
        testing.makes_a_set_of_the_budget,
        r"images of shape \(9, 1, 8, 8\), but the budget is \(6, 1",
    ),
    (IsNotFinite, testing.makes_a_set_of_the_budget, "images or labels that are not finite"),
    (WritesAnotherSet, testing.makes_a_set_of_the_budget, "cannot be saved and loaded: .*classes outside"),
    (cast("type[Method]", DefinesNothing), testing.is_a_value, "does not define init, loss; derive from Method"),
    (NeedsAValue, testing.is_a_value, "has no default for its field value; derive from Method"),
    (HoldsATensor, testing.is_a_value, "a field holds a Tensor, which YAML cannot store; use only plain values"),
    (InitsNothing, testing.makes_a_set_of_the_budget, "init returns a NoneType; return a State"),
    (FinalizesNothing, testing.makes_a_set_of_the_budget, "finalize returns a NoneType; return the set"),
    (FinalizeRounds, testing.finalize_changes_nothing, "finalize changes the state; change a copy"),
]


@pytest.mark.parametrize(("method", "check", "message"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_promise_is_named(method: type[Method], check: Callable[..., None], message: str) -> None:
    with pytest.raises(BrokenPromise, match=message) as caught:
        check(method)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda value: None, "a loss is None; return a tensor, or"),
        (lambda value: value.item(), "a loss is [0-9.]+; return a tensor, or"),
        (lambda value: (value, value), "a loss is .*; return a tensor, or"),
        (lambda value: value.detach(), "the loss has no gradient; compute it from what state.syn"),
    ],
)
def test_a_loss_of_another_form_is_refused(loss: Callable[[Tensor], Any], message: str) -> None:
    class Strange(Good):
        def loss(self, ctx: Context, state: Any, step: int, part: int) -> Any:
            return loss(super().loss(ctx, state, step, part))

    with pytest.raises(ValueError, match=message):
        testing.makes_a_set_of_the_budget(Strange)


@pytest.mark.parametrize("record", [{"note": "fast"}, {"each": torch.ones(3)}])
def test_a_step_logs_numbers(record: dict[str, Any]) -> None:
    class Strange(Good):
        def after(self, ctx: Context, state: Any, step: int) -> Any:
            return record

    with pytest.raises(ValueError, match=f"a step logs {next(iter(record))}=.*, which is no number; return a number"):
        testing.makes_a_set_of_the_budget(Strange)


def test_the_first_broken_promise_ends_all_checks() -> None:
    with pytest.raises(BrokenPromise, match="its parts depend on the number of processes"):
        check_method(PartsByRank)


def test_a_class_inside_a_function_cannot_be_read_again() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Hidden(Good):
        pass

    with pytest.raises(BrokenPromise, match=r"its recipe cannot be read again: .* inside a function"):
        testing.is_a_value(Hidden)


def test_a_method_that_keeps_its_promises_passes_and_leaves_the_generators_alone() -> None:
    check_method(Good)  # what it imports first may draw
    before = torch.get_rng_state(), repr(np.random.get_state())  # noqa: NPY002
    check_method(Good(num_steps=10**6), network="mlp", ipc=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert repr(np.random.get_state()) == before[1]  # noqa: NPY002


class IgnoresLabelsOfSquaredErrors(IgnoresLabels):
    objectives = ("mse",)


def test_the_checks_ask_what_fits_the_objective_that_is_given() -> None:
    with pytest.raises(BrokenPromise, match="do not change the leaf 'labels'"):
        testing.every_leaf_learns(IgnoresLabelsOfSquaredErrors, objective="mse")


def test_every_promise_is_broken_once() -> None:
    assert {check for _, check, _ in BROKEN} == set(testing.CHECKS)
