"""How many variants of its functions a method compiles: each costs seconds before the first step."""

import dataclasses
from typing import Any

import pytest
import torch

from condense.compute import Compute
from condense.inner import rollout
from condense.registry import load as method
from condense.testing import _Trial
from tests.test_contract import SMALL
from tests.test_on_device import AUGMENT, NETWORK

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")

NUMBERS = {
    "mtt": 4,  # a step and its way back, for minibatches of 4 and of 2 images
    "dc": 3,  # the gradient of real images, the matching loss with its gradients, a step of the student
    "dm": 2,  # the features of real and of synthetic images
    "rat-bptt": 2,  # a step and its way back
    "frepo": 3,  # the features of real and of synthetic images, a step of a member of the pool
}
"""Graphs that are compiled in four steps, by method. A change that raises a number has a reason."""


@pytest.mark.parametrize("name", NUMBERS)
def test_number_of_compiled_variants(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[torch.fx.GraphModule] = []
    compile_ = torch.compile

    def counted(fn: Any, **options: Any) -> Any:
        def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            graphs.append(graph)
            return graph

        return compile_(fn, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", counted)
    torch._dynamo.reset()
    rollout._compiled.cache_clear()
    trial = _Trial(method(name)(num_steps=4, **SMALL[name]), None, {"network": NETWORK, "augment": str(AUGMENT)})
    trial.distil(dataclasses.replace(trial.context(), compute=Compute(compile=True)))
    rollout._compiled.cache_clear()
    assert len(graphs) == NUMBERS[name]
