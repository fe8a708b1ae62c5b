"""What every method promises; a method joins by being in the table of names."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from condense import api, engine, registry
from condense.compute import Compute
from condense.data.datasets import Arrays
from condense.files import checksum
from condense.inner import RandomTruncated
from condense.method import GradientMethod, Method
from condense.recipe import Recipe
from condense.synthetic import Factor, Hard, Logits, SyntheticSet, load
from condense.synthetic.decode import Decode
from condense.synthetic.labels import Labels

TINY = "convnet:depth=1,width=4"

EXACT: dict[str, Any] = {"compute": Compute(exact=True)}
FAST: dict[str, Any] = {"compute": Compute().resolved(math.inf, torch.device("cpu"))}
NUM_STEPS = 4
SMALL: dict[str, dict[str, Any]] = {
    "dm": {"batch_real": 6},
    "datadam": {"batch_real": 6},
    "cafe": {"batch_real": 6, "batch_probe": 6, "max_epochs": 2, "max_updates": 3},
    "dc": {"batch_real": 6, "outer_loop": 3, "inner_epochs": 1},
    "dsa": {"batch_real": 6, "outer_loop": 3, "inner_epochs": 1},
    "rcig": {"batch_real": 12, "inner_steps": 3, "adjoint_steps": 3, "pool_size": 2, "max_train_steps": 2},
    "idc": {"batch_real": 6, "outer_loop": 3, "num_student": 12},
    "idc-i": {"batch_real": 6, "outer_loop": 3, "num_student": 12},
    "frepo": {"batch_real": 12, "pool_size": 2, "max_age": 1},
    "dd": {"inner_epochs": 2, "batch_real": 12, "num_networks": 2},
    "rat-bptt": {"adjoint": RandomTruncated(0, 2, 2), "batch_real": 12, "batch_per_class": 1, "same_burn_in": 2},
    "rtp": {"inner_steps": 3, "batch_per_class": 1, "batch_real": 4},
    "tesla": {"syn_steps": 2, "max_start_epoch": 2, "expert_epochs": 2, "batch_syn": 4},
    "datm": {"syn_steps": 2, "first_max_epoch": 1, "max_start_epoch": 2, "expansion_steps": 3, "batch_syn": 4},
    "mtt": {"syn_steps": 2, "max_start_epoch": 2, "expert_epochs": 2, "batch_syn": 4},
    "kip": {"batch_real": 12},
    "rfad": {"num_networks": 2, "num_batches": 2, "batch_real": 12},
    "herding": {"num_epochs": 1},
    "k-center": {"num_epochs": 1},
    "k-means": {"num_epochs": 1},
    "forgetting": {"num_epochs": 2},
    "el2n": {"num_networks": 2, "num_epochs": 1},
}
NAMES = sorted(registry.METHODS)
LEARNING = [name for name in NAMES if registry.load(name).learns]

Run = Callable[..., SyntheticSet]


def small(name: str) -> Method:
    cls = registry.load(name)
    fields = SMALL.get(name, {})
    return cls(num_steps=NUM_STEPS if cls.learns else 1, **fields)


@pytest.fixture
def run(tiny: Arrays, tiny_buffer: Path, tmp_path: Path) -> Run:
    """Distil a small method into a folder of its own."""

    def run(name: str, out: str = "run", resume: bool = False, **fields: Any) -> SyntheticSet:
        plan = Recipe(**{"method": small(name), "dataset": "tiny", "network": TINY, "ipc": 2} | EXACT | fields)
        options = api.RunOptions(out=tmp_path / out, buffers=tiny_buffer, resume=resume, device="cpu")
        return api.run(plan, options, arrays=tiny)

    return run


@pytest.mark.parametrize("name", NAMES)
def test_a_set_has_the_right_shape_and_is_finite(name: str, run: Run) -> None:
    syn = run(name)
    images, targets = syn()
    assert images.shape == (6, 1, 8, 8) and images.isfinite().all()
    classes = targets.argmax(1) if targets.dim() == 2 else targets
    assert classes.tolist() == syn.classes.tolist() and sorted(classes.tolist()) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_the_result_and_the_global_generator_is_not_touched(name: str, run: Run) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = checksum(run(name, "a").state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert checksum(run(name, "b").state_dict()) == first
    if name in ("random", *LEARNING):
        assert checksum(run(name, "c", seed=1).state_dict()) != first


@pytest.mark.parametrize("name", NAMES)
def test_the_file_gives_back_the_set(name: str, run: Run, tmp_path: Path) -> None:
    syn = run(name)
    again = load(tmp_path / "run")
    assert checksum(again.state_dict()) == checksum(syn.state_dict())
    assert again.origin.recipe["method"]["name"] == name
    assert again.origin.training["num_epochs"] > 0


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_stopping_and_resuming_changes_no_byte(
    name: str, stop: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_and_resume(name, stop, run, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", LEARNING)
def test_nor_does_it_where_the_work_is_compiled(
    name: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_and_resume(name, 2, run, tmp_path, monkeypatch, **FAST)


def stop_and_resume(
    name: str, stop: int, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **fields: Any
) -> None:
    run(name, "whole", **fields)
    method = type(small(name))
    step = GradientMethod.step

    def killed(self: Any, ctx: Any, state: Any, done: int) -> dict[str, float]:
        if done == stop:
            raise KeyboardInterrupt
        return step(self, ctx, state, done)

    monkeypatch.setattr(engine, "CHECKPOINT_STEPS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(method, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            run(name, "stopped", **fields)
    torch.compiler.reset()  # as in a new process
    run(name, "stopped", resume=True, **fields)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for file in ("synthetic.safetensors", f"snapshots/step_{NUM_STEPS:07d}.safetensors"):
        assert (stopped / file).read_bytes() == (whole / file).read_bytes()
    lines = (stopped / "log.jsonl").read_text().splitlines()
    assert f'{{"event": "resume", "step": {stop}}}' in lines
    assert [line for line in lines if "event" not in line] == (whole / "log.jsonl").read_text().splitlines()


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("decode", [Factor(factor=2)])
@pytest.mark.parametrize("labels", [Logits()])
def test_every_learnable_leaf_receives_gradient(name: str, decode: Decode, labels: Labels, run: Run) -> None:
    if not registry.load(name).learns_labels:
        labels = Hard()
    start = run(name, "start", decode=decode, labels=labels, method=_frozen(small(name)))
    end = run(name, "end", decode=decode, labels=labels)
    for leaf, params in end.leaves().items():
        moved = [not torch.equal(a, b) for a, b in zip(params, start.leaves()[leaf], strict=True)]
        assert all(moved), leaf


def _frozen(method: Method) -> Method:
    import dataclasses

    from condense.method import Optim

    still = Optim(lr=0.0)
    return dataclasses.replace(method, optim=still, optim_labels=still, optim_decoder=still, optim_lr=still)
