"""Twenty steps on the embedded data, compared with the curves that were written down.

A change that moves a curve is a change of numbers: ``python tests/test_golden.py`` writes them anew, and the commit
says why.
"""

import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from condense import api, privacy
from condense.inner import RandomTruncated
from condense.method import Optim
from condense.recipe import Recipe
from condense.registry import load as method
from condense.synthetic import Targets

GOLDEN = Path(__file__).parent / "golden" / "cpu.json"
NETWORK = "convnet:depth=2,width=8"
BATCH = f"{NETWORK},norm=batch"
NETWORKS = {
    "sre2l": BATCH,
    "fadrm": BATCH,
    "cudd": BATCH,
    "krr-st": BATCH,
    "rcig": "convnet:depth=2,width=8,norm=none,activation=softplus",
}
"""Of methods that need another. A norm leaves the biases before it without gradient, and the Adam of rcig's inner
problem makes whole steps of what rounding puts in its place: such a curve differs between machines."""
TOLERANCE = 2e-3
"""Relative, on each loss: machines differ in rounding, and twenty steps amplify it."""

METHODS: dict[str, dict[str, Any]] = {
    "dm": {"batch_real": 32},
    "datadam": {"batch_real": 32},
    "tgdd": {"batch_real": 32, "last_epoch": 1, "interval": 2, "weight": 0.5, "optim": Optim(lr=1.0)},
    "ncfm": {"batch_real": 32, "last_epoch": 1, "num_frequencies": 64, "optim": Optim(lr=0.01)},
    "cim": {"num_candidates": 50, "optim": Optim(lr=1.0)},
    "dpdm": {"num_networks": 5},
    "cafe": {"batch_real": 32, "batch_probe": 32, "max_epochs": 1, "max_updates": 5},
    "dc": {"batch_real": 32, "outer_loop": 5, "inner_epochs": 2},
    "dsa": {"batch_real": 32, "outer_loop": 5, "inner_epochs": 2},
    "kip": {"batch_real": 200},
    "rfad": {"num_networks": 2, "num_batches": 2, "batch_real": 64},
    "rcig": {"batch_real": 200, "inner_steps": 5, "adjoint_steps": 5, "pool_size": 2, "max_train_steps": 2},
    "idc": {"batch_real": 32, "outer_loop": 5, "num_student": 100},
    "idc-i": {"batch_real": 32, "outer_loop": 5, "num_student": 100},
    "frepo": {"batch_real": 200, "pool_size": 2, "max_age": 3},
    "krr-st": {"teachers": (BATCH,), "trained_by": "any", "batch_real": 200, "pool_size": 2, "max_age": 5},
    "linear-gradient": {
        "teachers": (BATCH,),
        "trained_by": "any",
        "grow_every": 5,
        "optim": Optim(kind="adam", lr=0.02, momentum=0.9),
    },
    "dd": {"inner_epochs": 2, "batch_real": 200},
    "rat-bptt": {"adjoint": RandomTruncated(0, 3, 3), "batch_real": 200},
    "at-bptt": {"inner_steps": 6, "window": 3, "spread": 1, "batch_real": 200, "same_burn_in": 5},
    "rtp": {"inner_steps": 5, "batch_real": 16},
    "tesla": {"syn_steps": 3, "max_start_epoch": 1, "expert_epochs": 1},
    # at 100, its default, twenty steps magnify rounding by 1e5
    "datm": {"syn_steps": 3, "max_start_epoch": 1, "expert_epochs": 1, "optim": Optim(lr=30.0)},
    "mtt": {"syn_steps": 3, "max_start_epoch": 1, "expert_epochs": 1},
    "selmatch": {
        "score": "el2n",
        "num_epochs": 1,
        "syn_steps": 3,
        "max_start_epoch": 1,
        "expert_epochs": 1,
        "lr": 0.01,
        "optim": Optim(lr=30.0),
    },
    "sre2l": {"num_steps": 5, "chunk": 5, "optim": Optim(lr=0.05)},  # 4 chunks
    "fadrm": {"num_steps": 10, "stages": 2, "num_candidates": 20, "optim": Optim(lr=0.05)},  # 2 chunks
    "cudd": {"num_steps": 10, "stages": (1,), "student_epochs": 1, "optim": Optim(lr=0.05)},  # 2 chunks
}


def experts(folder: Path) -> Path:
    for network in (NETWORK, BATCH):
        api.make_buffer("digits", network, num_experts=1, num_epochs=1, out=folder, device="cpu")
    return folder


@pytest.fixture(scope="module")
def buffer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return experts(tmp_path_factory.mktemp("artifacts"))


def curve(name: str, buffer: Path, folder: Path) -> list[float]:
    """The losses of twenty steps at 2 images a class."""
    learned = {"labels": Targets()} if name == "krr-st" else {}
    network = NETWORKS.get(name, NETWORK)
    plan = Recipe(method=method(name)(**{"num_steps": 20} | METHODS[name]), network=network, ipc=2, **learned)
    with mock.patch.object(privacy, "secret_key", new=lambda: 0):
        api.run(plan, api.RunOptions(out=folder / name, buffers=buffer, device="cpu"))
    return [json.loads(line)["loss"] for line in (folder / name / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", METHODS)
def test_losses_follow_the_golden_curve(name: str, buffer: Path, tmp_path: Path) -> None:
    assert curve(name, buffer, tmp_path) == pytest.approx(json.loads(GOLDEN.read_text())[name], rel=TOLERANCE)


def test_every_learning_method_has_a_curve() -> None:
    from condense.registry import METHODS as TABLE

    assert set(METHODS) == {name for name in TABLE if method(name).learns}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        buffer = experts(Path(folder) / "artifacts")
        curves = {name: curve(name, buffer, Path(folder)) for name in METHODS}
    GOLDEN.write_text(json.dumps(curves, indent=1) + "\n")
