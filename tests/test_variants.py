"""How many variants of its functions a method compiles: each costs seconds before the first step."""

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from condense import cudagraph, match
from condense.compute import Compute
from condense.inner import rollout
from condense.registry import load as method
from condense.testing import _Trial
from tests.test_contract import SMALL
from tests.test_on_device import AUGMENT, NETWORK

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")

NUMBERS: dict[str, tuple[int, int]] = {
    "mtt": (4, 7),  # a step and its way back, for minibatches of 4 and of 2 images
    "dc": (3, 7),  # the gradient of real images, the matching loss with its gradients, a step of the student
    "dsa": (3, 7),  # as dc
    "idc": (3, 7),  # as dc
    "dm": (2, 6),  # the features of real and of synthetic images
    "datadam": (2, 6),  # the feature maps of both
    "rat-bptt": (2, 8),  # a step and its way back
    "frepo": (3, 1),  # the features of real and of synthetic images, a step of a member of the pool
    "rcig": (1, 1),  # a step of a member of the pool
}
"""Graphs that are compiled in four steps, by method, and how many captured steps add, as on a GPU: those of the fused
functions, which draw random words and apply an augmentation. A change that raises a number has a reason."""


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[collections.Counter[str]]:
    """Count the graphs that are compiled, by function, from an empty cache."""
    graphs: collections.Counter[str] = collections.Counter()
    compile_ = torch.compile

    def counting(fn: Any, **options: Any) -> Any:
        def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            graphs[fn.__name__] += 1
            return graph

        return compile_(fn, backend=backend, **options)

    def forget() -> None:
        torch._dynamo.reset()
        for cached in (rollout._compiled, match._compiled, cudagraph._compiled):
            cached.cache_clear()

    monkeypatch.setattr(torch, "compile", counting)
    forget()
    yield graphs
    forget()


@pytest.mark.parametrize("graph", [False, True], ids=["plain", "captured"])
@pytest.mark.parametrize("name", NUMBERS)
def test_number_of_compiled_variants(name: str, graph: bool, counted: collections.Counter[str]) -> None:
    trial = _Trial(method(name)(num_steps=4, **SMALL[name]), None, {"network": NETWORK, "augment": str(AUGMENT)})
    trial.distil(dataclasses.replace(trial.context(), compute=Compute(compile=True, graph=graph)))
    plain, added = NUMBERS[name]
    assert counted.total() == plain + graph * added, counted
