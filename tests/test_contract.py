"""What every method promises; a method joins by being in the table of names."""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from condense import api, match, registry
from condense.compute import Compute
from condense.data.datasets import Arrays
from condense.inner import ADJOINTS, Checkpointed, Full, Higher, RandomTruncated, Truncated, rollout
from condense.method import GradientMethod, Method, Optim
from condense.methods.unrolled import Unrolled
from condense.networks import InputShape
from condense.recipe import Recipe
from condense.synthetic import (
    DECODERS,
    LABELS,
    Codec,
    Factor,
    Hard,
    Logits,
    Patches,
    Pixels,
    Pixels8Bit,
    SyntheticSet,
    load,
)
from condense.synthetic.decode import DCT, Bases, Hallucinator, Pyramid, Siren
from condense.synthetic.labels import Targets, Teacher
from condense.testing import CHECKS, resumes_to_the_byte
from tests.conftest import BATCH, TINY

pytestmark = pytest.mark.usefixtures("short_search")

EXACT: dict[str, Any] = {"compute": Compute(exact=True)}
NUM_STEPS = 4
SMALL: dict[str, dict[str, Any]] = {
    "dm": {"batch_real": 6},
    "datadam": {"batch_real": 6},
    "tgdd": {"batch_real": 6, "last_epoch": 4, "interval": 2},
    "ncfm": {"batch_real": 6, "last_epoch": 4, "num_frequencies": 16, "optim": Optim(lr=0.01)},
    "cim": {"optim": Optim(lr=0.1)},
    "dpdm": {"num_networks": 3, "rate": 0.8, "optim": Optim(lr=1e-3)},
    "cafe": {"batch_real": 6, "batch_probe": 6, "max_epochs": 2, "max_updates": 3},
    "dc": {"batch_real": 6, "outer_loop": 3, "inner_epochs": 1},
    "dsa": {"batch_real": 6, "outer_loop": 3, "inner_epochs": 1},
    "rcig": {
        "batch_real": 12,
        "inner_steps": 3,
        "adjoint_steps": 3,
        "pool_size": 1,
        "max_train_steps": 2,
        "max_age": 6,
    },
    "idc": {"batch_real": 6, "outer_loop": 3, "num_student": 12},
    "idc-i": {"batch_real": 6, "outer_loop": 3, "num_student": 12},
    "frepo": {"batch_real": 12, "pool_size": 1, "max_age": 2},
    "krr-st": {"teachers": (TINY,), "trained_by": "any", "batch_real": 12, "pool_size": 1, "max_age": 3},
    "linear-gradient": {
        "teachers": (TINY,),
        "trained_by": "any",
        "views": 2,
        "grow_every": 1,
        "optim": Optim(kind="adam", lr=0.1, momentum=0.9),
    },
    "dd": {"inner_epochs": 2, "batch_real": 12, "num_networks": 2},
    "rat-bptt": {"adjoint": RandomTruncated(0, 2, 2), "batch_real": 12, "batch_per_class": 1, "same_burn_in": 2},
    "at-bptt": {"inner_steps": 4, "window": 2, "spread": 1, "batch_real": 12, "batch_per_class": 1, "same_burn_in": 2},
    "rtp": {"inner_steps": 3, "batch_per_class": 1, "batch_real": 4},
    "tesla": {"syn_steps": 2, "max_start_epoch": 2, "expert_epochs": 2, "batch_syn": 4},
    "datm": {"syn_steps": 2, "first_max_epoch": 1, "max_start_epoch": 2, "expansion_steps": 3, "batch_syn": 4},
    "selmatch": {"syn_steps": 2, "max_start_epoch": 2, "expert_epochs": 2, "batch_syn": 4, "num_epochs": 2},
    "mtt": {"syn_steps": 2, "max_start_epoch": 2, "expert_epochs": 2, "batch_syn": 4},
    "kip": {"batch_real": 12},
    "rfad": {"num_networks": 2, "num_batches": 2, "batch_real": 12},
    "herding": {"num_epochs": 1},
    "k-center": {"num_epochs": 1},
    "k-means": {"num_epochs": 1},
    "forgetting": {"num_epochs": 2},
    "el2n": {"num_networks": 2, "num_epochs": 1},
    "sre2l": {"chunk": 2},
    "fadrm": {"chunk": 2, "stages": 2, "num_candidates": 4},
    "cudd": {"chunk": 2, "stages": (1,), "student_epochs": 2},
    "ccs": {"num_networks": 2, "num_epochs": 1, "num_strata": 3},
    "graph-cut": {"num_epochs": 1},
    "dq": {"num_epochs": 1, "num_bins": 3},
}
NETWORKS = {"sre2l": BATCH, "fadrm": BATCH, "cudd": BATCH, "mirage": "gin:width=4,depth=1"}
"""Of methods that need another than ``TINY``."""
FIELDS: dict[str, dict[str, Any]] = {"krr-st": {"labels": Targets()}}
"""Fields of the recipe of methods that do not take the default ones."""
NAMES = sorted(registry.METHODS)
TRANSFORMS = {name: "none" for name in NAMES if registry.load(name).private}
"""Of methods that cannot measure the statistics of the data."""
LEARNING = [name for name in NAMES if registry.load(name).learns]
ANY_NORM = [
    name for name in LEARNING if not {name} & {*NETWORKS, *TRANSFORMS} and "teachers" not in SMALL.get(name, {})
]
"""Methods that learn with networks with BatchNorm too, and whose ``SMALL`` names no teachers of another kind."""

Run = Callable[..., SyntheticSet]


def small(name: str) -> Method:
    cls = registry.load(name)
    fields = SMALL.get(name, {})
    return cls(num_steps=NUM_STEPS if cls.learns else 1, **fields)


@pytest.fixture
def run(tiny: Arrays, tiny_buffers: Path, tmp_path: Path) -> Run:
    """Distil a small method into a folder of its own."""

    def run(name: str, out: str = "run", **fields: Any) -> SyntheticSet:
        network = NETWORKS.get(name, TINY)
        usual = {"method": small(name), "dataset": "tiny", "network": network, "ipc": 2}
        usual |= {"transform": TRANSFORMS.get(name, "channel")} | EXACT | FIELDS.get(name, {})
        plan = Recipe(**usual | fields)
        options = api.RunOptions(out=tmp_path / out, buffers=tiny_buffers, device="cpu")
        return api.run(plan, options, arrays=tiny)

    return run


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", NAMES)
def test_it_keeps_its_promises(name: str, check: Callable[..., None]) -> None:
    check(small(name), network=NETWORKS.get(name, TINY), **FIELDS.get(name, {}))


@pytest.mark.parametrize("name", ANY_NORM)
def test_networks_with_batch_norm_are_resumed_too(name: str) -> None:
    """Their buffers are leaves of the state."""
    resumes_to_the_byte(small(name), network=BATCH)


def test_images_drawn_by_another_seed_are_other_ones(run: Run) -> None:
    one, other = run("random", "one"), run("random", "other", seed=1)
    assert not torch.equal(one.latents, other.latents)


RESUMED: list[tuple[str, dict[str, Any]]] = [
    (
        "mtt",
        {
            "decode": DCT(coefficients=16),
            "labels": Teacher(),
            "method": {"adjoint": Checkpointed(2), "optim": Optim(kind="adam")},
        },
    ),
    ("mtt", {"decode": Factor(), "labels": Logits(), "method": {"adjoint": Full()}}),
    (
        "mtt",
        {
            "decode": Hallucinator(num_styles=2),
            "method": {"adjoint": Truncated(1), "optim_decoder": Optim(kind="lamb")},
        },
    ),
    ("dd", {"labels": Logits(), "method": {"adjoint": Higher(), "optim_labels": Optim(kind="adabelief"), "ema": 0.9}}),
    ("dm", {"decode": Pyramid()}),
    ("dm", {"decode": Siren(fit_steps=5)}),
    ("dm", {"decode": Codec(images=2, fit_steps=5)}),
    ("kip", {"decode": Bases(num_bases=8), "labels": Targets()}),
    ("dq", {"decode": Patches()}),
    ("sre2l", {"decode": Pixels8Bit(), "labels": Teacher(), "network": BATCH, "method": {"per_class": True}}),
]
"""With ``SMALL`` and the defaults, every decoder, kind of labels, adjoint and kind of optimiser at least once."""


@pytest.mark.parametrize(("name", "fields"), RESUMED)
def test_it_resumes_to_the_byte_with_any_decoder_labels_adjoint_or_optimiser(name: str, fields: dict[str, Any]) -> None:
    plan = composed(name, fields)
    resumes_to_the_byte(plan.pop("method"), **plan)


def test_every_value_that_composes_is_resumed() -> None:
    plans = [composed(name, {}) for name in LEARNING] + [composed(*case) for case in RESUMED]
    methods = [plan["method"] for plan in plans]
    of_images = {name for name, decode in DECODERS.items() if "images" in decode.takes}
    assert {plan.get("decode", Pixels()).name for plan in plans} == of_images
    assert {plan.get("labels", Hard()).name for plan in plans} == {k for k, kind in LABELS.items() if not kind.of_views}
    assert {method.adjoint.name for method in methods if isinstance(method, Unrolled)} == ADJOINTS.keys()
    kinds = {
        optim.kind for method in methods if isinstance(method, GradientMethod) for optim in method.optims().values()
    }
    assert kinds == set(typing.get_args(typing.get_type_hints(Optim)["kind"]))


def dropping(input_shape: InputShape, num_classes: int) -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(8, num_classes))


@pytest.mark.parametrize("name", ["dd", "dm", "dsa", "frepo"])
def test_it_resumes_to_the_byte_where_the_network_draws(name: str) -> None:
    resumes_to_the_byte(small(name), network=dropping)


WAYS = {
    "in pieces, several classes at once": Compute(channels_last=True, micro_batch=4, vmap_batch=12),
    "bfloat16": Compute(autocast="bfloat16", adjoint_dtype="bfloat16"),
}


@pytest.mark.usefixtures("known_secrets")
@pytest.mark.parametrize("name", LEARNING)
def test_another_way_to_compute_gives_nearly_the_same(name: str, run: Run, tmp_path: Path) -> None:
    exact, start = run(name), load(tmp_path / "run" / "snapshots" / "step_0000000.safetensors")
    moved = (exact.latents - start.latents).norm()
    for way, compute in WAYS.items():
        apart = (exact.latents - run(name, way, compute=compute).latents).norm()
        assert apart < (0.6 if way == "bfloat16" else 1e-3) * moved, way


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``torch.compile`` up to its graphs, which then run eagerly: making machine code takes most of the time."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    cached = (rollout._compiled, match._compiled)
    for compiled in cached:
        compiled.cache_clear()
    yield
    for compiled in cached:
        compiled.cache_clear()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("name", ["mtt", "dsa", "dm"])
def test_what_is_compiled_gives_nearly_the_same(name: str, run: Run) -> None:
    network = {"mtt": TINY}.get(name, f"{TINY},norm=batch")
    fast = dataclasses.replace(WAYS["in pieces, several classes at once"], compile=True)
    exact, other = (run(name, out, network=network, compute=how) for out, how in (("a", Compute()), ("b", fast)))
    torch.testing.assert_close(other.latents, exact.latents, rtol=1e-3, atol=1e-4)


def composed(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a recipe, with those of the small method that ``fields["method"]`` replaces."""
    return fields | {"method": dataclasses.replace(small(name), **fields.get("method", {}))}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", LEARNING)
def test_it_resumes_to_the_byte_where_the_work_is_compiled(name: str) -> None:
    compute = Compute().resolved(math.inf, torch.device("cpu"))
    resumes_to_the_byte(small(name), network=NETWORKS.get(name, TINY), compute=compute, **FIELDS.get(name, {}))
