"""No step waits for the device: steps run on the meta device, whose tensors have a shape and no values.

To read a value raises an error there, as does an operation on tensors of two devices. The CPU build of torch can
differentiate such tensors, which it cannot on a simulated GPU.
"""

import contextlib
import copy
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from condense.augment import Augment
from condense.compute import Compute
from condense.cudagraph import Graphed
from condense.inner import Adjoint, Exact, RandomTruncated, Truncated
from condense.method import Context, GradientMethod
from condense.methods.bilevel import class_members
from condense.networks import Functional
from condense.registry import METHODS
from condense.registry import load as method
from condense.rng import Draws, Rng
from condense.sources import Examples
from condense.synthetic import Codec, Hard
from condense.task import Labelled
from condense.testing import _Trial
from condense.train import Trainer, Training
from tests.test_contract import SMALL

META = torch.device("meta")
AUGMENT = Augment(("color", "crop", "cutout", "flip", "scale", "rotate"))
_ALWAYS = (
    *("dm", "datadam", "tgdd", "cim", "dc", "dsa", "idc", "idc-i", "mtt", "tesla", "datm", "selmatch"),
    *("frepo", "rfad", "rcig", "dd", "rtp", "rat-bptt"),
)
GRAPHED = {name: SMALL[name] for name in _ALWAYS} | {"ncfm": SMALL["ncfm"] | {"calibration": 0.0}}
"""Fields of the methods whose steps are captured."""
NETWORK = "convnet:depth=1,width=4"


class _OffTheHost(TorchDispatchMode):
    """Refuses operations on tensors of the CPU, which a graph cannot contain: copies from there above all."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        assert all(tensor.device.type != "cpu" for tensor in tensors), f"{func} in a captured step uses the CPU"
        return result


@contextlib.contextmanager
def without_the_host() -> Iterator[list[int]]:
    """Refuse what captured functions do on the CPU, and anywhere random tensors that are drawn there.

    Single numbers, with which the host decides, are allowed, and the order of an epoch. The list that the context
    yields gets an entry for each of these orders. Run a captured function once before: it may then prepare what all
    steps share.
    """
    run = Graphed._run

    def captured(graphed: Graphed) -> None:
        with _OffTheHost(), mock.patch.object(torch, "tensor", copied), mock.patch.object(torch, "as_tensor", given):
            run(graphed)

    with mock.patch.object(Graphed, "_run", captured), _no_draw_on_the_host() as orders:
        yield orders


def copied(data: Any, *, device: Any = None, **_: Any) -> Tensor:
    """``torch.tensor`` copies numbers from the host."""
    raise AssertionError(f"{data} is copied from the CPU to {device} in a captured step")


_as_tensor = torch.as_tensor


def given(data: Any, **fields: Any) -> Tensor:
    return _as_tensor(data, **fields) if isinstance(data, Tensor) else copied(data, **fields)


@contextlib.contextmanager
def _no_draw_on_the_host() -> Iterator[list[int]]:
    words, order = Draws.words, Examples._order
    orders: list[int] = []

    def checked(draws: Draws, num: int) -> Tensor:
        assert num == 1 or not draws.on_host, "drawn on the CPU"
        return words(draws, num)

    def ordered(source: Examples, epoch: int) -> Tensor:
        orders.append(epoch)
        with mock.patch.object(Draws, "words", words):
            return order(source, epoch)

    with mock.patch.object(Draws, "words", checked), mock.patch.object(Examples, "_order", ordered):
        yield orders


def on_device(value: Any) -> Any:
    """Return a deep copy of a value whose tensors are on the meta device."""

    def moved(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        if id(tensor) not in memo:
            plain = torch.empty_like(tensor, device=META, requires_grad=False)
            memo[id(tensor)] = nn.Parameter(plain) if isinstance(tensor, nn.Parameter) else plain
        return memo[id(tensor)]

    with mock.patch.object(Tensor, "__deepcopy__", moved), mock.patch.object(nn.Parameter, "__deepcopy__", moved):
        return copy.deepcopy(value)


def prepared(name: str, **fields: Any) -> tuple[GradientMethod, Context, Any]:
    """Return a method, and a context and a state on the meta device whose steps are captured."""
    trial = _Trial(method(name)(num_steps=4, **GRAPHED[name]), None, {"network": NETWORK, **fields})
    ctx = trial.context()
    state, task = on_device(trial.method.init(ctx)), ctx.task
    state.optimisers = trial.method.optimisers(state.syn, state.learned)  # a copy lacks what constructors add
    state.syn._members = state.syn.classes._version, [torch.empty(2, dtype=torch.int64, device=META)] * 3
    train = Labelled(torch.empty(task.train.images.shape, device=META), task.train.labels.to(META))
    train.__dict__["by_class"] = [index.to(META) for index in task.train.by_class]
    network = Functional(NETWORK, task.input_shape, task.num_classes, META)
    task = dataclasses.replace(task, train=train, val=None, network=network, device=META, augment=AUGMENT)
    return trial.method, dataclasses.replace(ctx, task=task, compute=Compute(graph=True)), state


@pytest.mark.parametrize("name", GRAPHED)
def test_gradients_are_computed_without_the_host(name: str) -> None:
    plan, ctx, state = prepared(name)
    assert plan.graphs(ctx)
    plan._differentiate(ctx, state, 0)  # prepares what all steps share
    with without_the_host():
        record = plan._differentiate(ctx, state, 0)
    assert {tensor.device for tensor in record.values()} == {META}


@pytest.mark.parametrize("name", ["dm", "dsa", "mtt"])
def test_the_rate_is_computed_without_the_host(name: str) -> None:
    plan, ctx, state = prepared(name, decode=Codec(images=2, fit_steps=1, rate_weight=(0.1, 1.0)))
    plan._differentiate(ctx, state, 0)
    with without_the_host():
        record = plan._differentiate(ctx, state, 0)
    assert record["rate"].device == META


@contextlib.contextmanager
def without_fused_optimisers() -> Iterator[None]:
    """Leave out the updates of students. Their optimisers are fused on a GPU, and such do not exist on the meta device;
    others read a learning rate that is a tensor."""
    with contextlib.ExitStack() as stack:
        for kind in (torch.optim.SGD, torch.optim.Adam):
            stack.enter_context(mock.patch.object(kind, "step", _unless_fused(kind.step)))
        yield


def _unless_fused(step: Any) -> Any:
    return lambda optimiser: None if isinstance(optimiser.param_groups[0]["lr"], Tensor) else step(optimiser)


@pytest.mark.parametrize("name", GRAPHED)
def test_an_update_and_what_follows_it_read_nothing(name: str) -> None:
    plan, ctx, state = prepared(name)
    record = plan._differentiate(ctx, state, 0)
    with without_fused_optimisers():
        if name == "datm":
            with pytest.raises(RuntimeError, match="meta"):
                plan.update(state, record)  # it skips an update by its loss
            return
        plan._advance(ctx, state, 0, record)
        record = plan._differentiate(ctx, state, 1)
        with without_the_host():
            plan._advance(ctx, state, 1, record)


@pytest.mark.parametrize("name", ["frepo", "rcig"])
def test_the_minibatches_of_a_pool_are_drawn_on_the_device(name: str) -> None:
    plan, ctx, state = prepared(name)
    with without_the_host():
        plan.after(ctx, state, 0)
    assert all(member["age"] for member in state.pool), "trained, not replaced by a network that the host draws"


@pytest.mark.parametrize("adjoint", [Exact(snapshots="host"), RandomTruncated(0, 2, 2), Exact(), Truncated(2)], ids=str)
@pytest.mark.parametrize("name", ["mtt", "tesla", "datm", "selmatch", "dd", "rtp", "rat-bptt"])
def test_what_the_host_stores_or_decides_is_not_captured(name: str, adjoint: Adjoint) -> None:
    ctx: Any = SimpleNamespace(labels=Hard())
    expected = adjoint != Exact(snapshots="host")
    if isinstance(adjoint, RandomTruncated):
        expected = name == "rat-bptt"  # whose burn-in ends before what is captured
    assert method(name)(adjoint=adjoint).graphs(ctx) == expected


def test_the_documentation_lists_the_methods_that_are_not_captured() -> None:
    ctx: Any = SimpleNamespace(labels=Hard())
    learning = {name for name in METHODS if method(name).learns}
    uncaptured = {name for name in learning if not method(name)().graphs(ctx)}
    page = Path(__file__).parents[1].joinpath("docs/performance.md").read_text(encoding="utf-8")
    found = re.search(r"At their defaults, the gradients of (.*?) are not captured", page, re.DOTALL)
    assert found is not None
    assert sorted(re.findall(r"`([\w-]+)`", found[1])) == sorted(uncaptured)
    assert learning - uncaptured == GRAPHED.keys() - {"ncfm"}


@pytest.mark.parametrize("name", ["rtp", "rat-bptt"])
def test_the_images_of_a_class_are_found_once(name: str) -> None:
    """To find them is to wait for the device."""
    plan, ctx, state = prepared(name)
    class_members(ctx, state)
    state.syn._members = None
    plan._differentiate(ctx, state, 0)


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@pytest.mark.parametrize("num_networks", [1, 3])
def test_a_training_step_runs_without_the_host(optimiser: Any, num_networks: int) -> None:
    trainer = Trainer(
        Functional(NETWORK, (3, 8, 8), 4, META),
        Training(num_epochs=2, batch_size=4, optimiser=optimiser, cutmix=0.5),
        Compute(graph=True),
    )
    images, targets = torch.empty(10, 3, 8, 8, device=META), torch.empty(10, dtype=torch.int64, device=META)
    weights = [trainer.network.init(Rng(k), "weights") for k in range(num_networks)]
    sources = [trainer.source(images, targets, Rng(k), AUGMENT) for k in range(num_networks)]
    with without_fused_optimisers(), without_the_host() as orders:
        trainer.run_together(weights, sources)
    assert orders == [epoch for epoch in range(2) for _ in sources], "drawn once for an epoch of three batches"


def test_the_harness_notices_what_it_is_for() -> None:
    x, host = torch.zeros(3, device=META), torch.zeros(3)
    with pytest.raises(RuntimeError, match="meta"):
        x.sum().item()
    with pytest.raises(RuntimeError, match="device"):
        x + torch.zeros(3)
    with pytest.raises(AssertionError, match="drawn on the CPU"), without_the_host():
        Rng(0)("a", 3).uniform(2)
    for fault in (lambda: torch.tensor(2.0, device=META), lambda: x.copy_(host), lambda: x * host[0]):
        graphed = Graphed(fault, META, name="a step")
        graphed()
        with pytest.raises(AssertionError, match="in a captured step"), without_the_host():
            graphed()
