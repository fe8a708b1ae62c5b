"""The compute policy: settled once from planned work, the same on resumption; what does not compile runs eagerly."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from condense import api, compute, engine
from condense.buffers import trajectories
from condense.buffers.trajectories import Experts
from condense.compute import Compute, machine
from condense.data.datasets import Arrays
from condense.eval.evaluate import USUAL_SEEDS, resolved
from condense.eval.protocol import PROTOCOLS
from condense.networks import Functional
from condense.rng import Rng
from condense.train import Trainer, Training
from tests.conftest import TINY

CPU = torch.device("cpu")
SMALL, LARGE = 1e9, 1e18


def test_small_work_is_eager_float32_and_large_work_is_compiled() -> None:
    small, large = Compute().resolved(SMALL, CPU), Compute().resolved(LARGE, CPU)
    assert (small.compile, small.autocast, small.vmap_batch) == (False, "none", 1)
    assert large.compile and large.autocast == ("bfloat16" if compute.has_bfloat16(CPU) else "none")
    assert small.adjoint_dtype == large.adjoint_dtype == "float32"
    for settled in (small, large):
        assert [name for name, value in vars(settled).items() if value is None] == ["tf32"], "which a CPU does not have"


def test_bfloat16_is_chosen_only_where_the_hardware_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (True, False):
        monkeypatch.setattr(compute, "has_bfloat16", lambda device, there=there: there)
        assert Compute().resolved(LARGE, CPU).autocast == ("bfloat16" if there else "none")


def test_what_is_given_stays_and_what_was_settled_is_kept() -> None:
    assert Compute(compile=False).resolved(LARGE, CPU).compile is False
    assert Compute(exact=True).resolved(LARGE, CPU).compile is False
    earlier = vars(Compute().resolved(SMALL, CPU))
    assert Compute().resolved(LARGE, CPU, earlier) == Compute().resolved(SMALL, CPU)
    assert Compute(compile=True).resolved(LARGE, CPU, earlier).compile is True


@pytest.mark.parametrize(
    "fields",
    [{"compile": True}, {"autocast": "bfloat16"}, {"channels_last": True}, {"adjoint_dtype": "bfloat16"}],
    ids=lambda fields: next(iter(fields)),
)
def test_exact_excludes_what_is_not(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"exact excludes compute.{next(iter(fields))}"):
        Compute(exact=True, **fields)


@pytest.mark.parametrize("name", ["micro_batch", "vmap_batch"])
def test_batches_have_at_least_one_image(name: str) -> None:
    with pytest.raises(ValueError, match=f"compute.{name} must be at least 1, got 0"):
        Compute(**{name: 0})


def test_planned_work_counts_steps_images_and_the_network() -> None:
    small, wide = (Functional(f"convnet:depth=1,width={width}", (1, 8, 8), 3) for width in (4, 8))
    # 3x3 convolution of 1 channel on 64 pixels, linear layer from 16 pixels; twice for a product and a sum
    assert small.flops == 3 * 2 * (4 * 9 * 64 + 4 * 16 * 3)
    assert wide.flops == 2 * small.flops
    plan = api.find_recipe("dm", "digits", 10)[0].method
    work = plan.estimated_work(1000, 10, 10)
    assert work == plan.num_steps * 10 * (plan.batch_real / 3 + 10)  # type: ignore[attr-defined]


def test_a_run_is_resumed_as_it_began(tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the table has changed in between."""
    job: dict[str, Any] = {"dataset": tiny_file, "network": TINY, "ipc": 1, "out": tmp_path / "run", "num_steps": 2}
    first = api.distill("dm", **job)
    begun = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["compute"]
    assert begun["compile"] is False and begun["autocast"] == "none"
    monkeypatch.setitem(compute._TABLE, "cpu", compute._Row(fast_from=0.0))
    again = api.distill("dm", **job, resume=True)
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["compute"] == begun
    assert torch.equal(first.latents, again.latents)
    with pytest.raises(ValueError, match=r"compute.compile = False, not True"):
        api.distill("dm", **job, resume=True, compute=Compute(compile=True))


def test_a_buffer_grows_as_it_began(tiny: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(num_experts: int, **options: Any) -> Path:
        plan = Experts(num_experts=num_experts, num_epochs=1, batch_size=12)
        return api.make_buffer(tiny, TINY, experts=plan, out=tmp_path, **options)

    folder = build(1)
    monkeypatch.setitem(compute._TABLE, "cpu", compute._Row(fast_from=0.0))
    assert build(2) == folder
    other = build(1, compute=Compute(compile=False, autocast="bfloat16"))
    assert other != folder


def test_an_exact_buffer_is_made_beside_one_that_is_not(tiny: Arrays, tmp_path: Path) -> None:
    plan = Experts(num_experts=1, num_epochs=1, batch_size=12)
    folders = {
        api.make_buffer(tiny, TINY, experts=plan, out=tmp_path, compute=chosen)
        for chosen in (Compute(channels_last=True), Compute(exact=True))
    }
    assert len(folders) == 2


@pytest.mark.parametrize("work", [SMALL, LARGE])
def test_what_a_buffer_leaves_out_is_off_when_it_grows(work: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "has_bfloat16", lambda device: True)
    cuda = torch.device("cuda")
    for begun in (Compute().resolved(work, cuda), Compute().resolved(work, CPU)):
        grown = Compute().resolved(LARGE, cuda, begun.first_order_identity())
        assert grown.first_order_identity() == begun.first_order_identity()
        assert grown.tf32 is bool(begun.tf32), "and not what PyTorch chooses"


def test_an_exact_policy_takes_nothing_of_one_that_was_not() -> None:
    exact, fast = Compute(exact=True), Compute(compile=True, channels_last=True)
    assert exact.resolved(LARGE, CPU, fast.first_order_identity()) == exact.resolved(LARGE, CPU)
    begun = exact.resolved(LARGE, CPU)
    assert exact.resolved(LARGE, torch.device("cuda"), vars(begun)) == begun


@pytest.mark.parametrize(("name", "current"), [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_the_current_gpu_is_the_one_that_was_asked_for(
    name: str, current: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On it steps are captured as CUDA graphs."""
    chosen: list[str] = []
    monkeypatch.setattr(compute, "resolve_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    assert compute.prepare_device(name) == torch.device(name)
    assert chosen == current


def test_a_policy_depends_neither_on_experts_nor_on_seeds(
    tiny: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, settled = list[float](), Functional.settled
    monkeypatch.setattr(Functional, "settled", lambda *args: samples.append(args[2]) or settled(*args))
    task = api.plain_task(tiny, TINY, "channel", api.Split(val_fraction=0.0))
    for plan in (Experts(num_experts=1, num_epochs=1), Experts(num_experts=100), Experts(num_epochs=9, keep="last")):
        trajectories.resolved(task, plan, tmp_path, 0, Compute())
    assert samples == [36 * 200] * 3
    plan = dataclasses.replace(PROTOCOLS["canonical"], num_epochs=2)
    syn = api.distill("random", dataset=tiny, network=TINY, ipc=1, out=tmp_path / "run", device="cpu")
    samples.clear()
    for num_seeds in (1, 2):
        api.evaluate(syn, tiny, networks=[TINY], protocol=plan, num_seeds=num_seeds, device="cpu")
    assert samples == [3 * 2 * USUAL_SEEDS] * 2
    network = Functional("convnet", (3, 32, 32), 10)
    assert resolved(Compute(), network, PROTOCOLS["canonical"], 100).compile is True
    assert resolved(Compute(), network, PROTOCOLS["canonical"], 10).compile is False
    assert trajectories.USUAL_EPOCHS == Experts().num_experts * Experts().num_epochs


def test_a_gpu_trains_networks_side_by_side_where_the_work_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/performance.md states the works of evaluations."""
    monkeypatch.setattr(compute, "has_bfloat16", lambda device: True)
    cuda, network = torch.device("cuda"), Functional("convnet", (3, 32, 32), 10)
    works = {ipc: network.flops * 10 * ipc * PROTOCOLS["canonical"].num_epochs * USUAL_SEEDS for ipc in (10, 50)}
    assert {ipc: f"{work:.1e}" for ipc, work in works.items()} == {10: "4.6e+13", 50: "2.3e+14"}
    assert network.flops * 50_000 * trajectories.USUAL_EPOCHS > 1e15
    for work, num in ((works[10], 1), (works[50], 1), (0.99e15, 1), (1e15, 4), (LARGE, 4)):
        settled = Compute().resolved(work, cuda)
        assert (settled.networks, settled.graph) == (num, True), work
        fast = num > 1
        assert (settled.compile, settled.tf32, settled.channels_last) == (fast, fast, fast)
        assert settled.autocast == ("bfloat16" if fast else "none")
    assert Compute(networks=4).resolved(works[10], cuda).networks == 4


def test_micro_batches_do_not_depend_on_the_work() -> None:
    assert Compute().resolved(SMALL, CPU).micro_batch == Compute().resolved(LARGE, CPU).micro_batch == 256


@pytest.mark.parametrize("partial", [False, True])
def test_what_does_not_compile_runs_eagerly_with_one_warning(partial: bool) -> None:
    def fails(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1 if torch.compiler.is_compiling() else x * 2

    def refuse(fn: Any, **options: Any) -> Any:
        def raises(*inputs: Any) -> Any:
            raise RuntimeError("no compiler\nsecond line")

        return raises

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", refuse)
        call = Compute(compile=True).first_order(functools.partial(fails) if partial else fails, CPU)
    with pytest.warns(UserWarning, match="fails runs eagerly, it does not compile: no compiler") as seen:
        assert call(torch.ones(2)).tolist() == [2, 2]
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert call(torch.ones(2)).tolist() == [2, 2]


def test_an_error_of_the_function_itself_is_raised_undisguised() -> None:
    def wrong(x: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda fn, **options: fn)
        call = Compute(compile=True).first_order(wrong, CPU)
    with pytest.raises(KeyError, match="mine"):
        call(torch.ones(1))


def test_channels_last_changes_the_layout_and_nothing_else() -> None:
    network = Functional("convnet:depth=2,width=8", (3, 8, 8), 3, dtype=torch.float64)
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=Rng(0).generator("images"))
    plan = Training(num_epochs=2, batch_size=4)
    assert Compute(channels_last=True).layout(images).is_contiguous(memory_format=torch.channels_last)
    trainers = [Trainer(network, plan, Compute(channels_last=on)) for on in (False, True)]
    start, labels = network.init(Rng(0), "weights"), torch.arange(6) % 3
    ends = [trainer.run(start, trainer.source(images, labels, Rng(1))) for trainer in trainers]
    for a, b in zip(ends[0].params.values(), ends[1].params.values(), strict=True):
        torch.testing.assert_close(a, b)


ALLOCATE = """
import resource, sys
from condense import allocator
import torch
def faults():
    for _ in range(12):
        torch.ones(1 << 24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
if {restore}:
    assert allocator.keep_freed_memory() and allocator.restore_defaults()
print(faults())
assert allocator.keep_freed_memory()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the page faults of glibc")
def test_the_allocator_keeps_what_is_freed() -> None:
    def faults(restore: bool) -> list[int]:
        code = ALLOCATE.format(restore=restore)
        found = subprocess.run([sys.executable, "-c", code], env={"PATH": ""}, stdout=subprocess.PIPE, check=True)
        return [int(number) for number in found.stdout.split()]

    for restore in (False, True):
        default, kept = faults(restore)
        assert default > 10_000 and kept < 100


def test_the_allocator_respects_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from condense.allocator import keep_freed_memory

    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert keep_freed_memory() is False


def precisions() -> list[Any]:
    return [switch.get() for switch in compute._PRECISIONS]


@pytest.fixture
def imprecise() -> Iterator[list[Any]]:
    """A process that allows TF32 and bfloat16 in products and convolutions of float32 numbers."""
    before = precisions()
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    yield precisions()
    torch.set_float32_matmul_precision("highest")
    for switch, value in zip(compute._PRECISIONS, before, strict=True):
        switch.restore(value)


def test_exact_is_full_precision_inside_a_run_and_only_there(
    imprecise: list[Any], tiny: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Any]] = {}

    def spied(where: str, function: Any) -> Any:
        def spy(*args: Any, **kwargs: Any) -> Any:
            seen[where] = precisions()
            return function(*args, **kwargs)

        return spy

    monkeypatch.setattr(engine, "_step", spied("step", engine._step))
    monkeypatch.setattr(Trainer, "batch_loss", spied("training", Trainer.batch_loss))
    full = [switch.full for switch in compute._PRECISIONS]
    assert imprecise != full
    for exact in (True, False):
        policy, out = Compute(exact=exact), tmp_path / str(exact)
        fields: dict[str, Any] = {"compute": policy, "device": "cpu"}
        api.distill("dm", dataset=tiny, network=TINY, ipc=1, num_steps=1, batch_real=4, out=out / "run", **fields)
        api.make_buffer(tiny, TINY, num_experts=1, num_epochs=1, batch_size=12, out=out, **fields)
        assert seen.pop("training") == (full if exact else imprecise)
        short = dataclasses.replace(PROTOCOLS["canonical"], num_epochs=1)
        api.evaluate(out / "run", tiny, networks="mlp", num_seeds=1, protocol=short, **fields)
        assert seen.pop("training") == (full if exact else imprecise)
        api.apply("continual", out / "run", tiny, num_groups=1, num_seeds=1, network="mlp", **fields)
        assert seen.pop("training") == seen.pop("step") == (full if exact else imprecise)
        assert precisions() == imprecise


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has no switch for all operations")
def test_a_switch_for_all_operations_keeps_its_effect() -> None:
    before, everywhere = precisions(), torch.backends.fp32_precision
    for switch in compute._PRECISIONS:
        switch.set_(switch.inherits)  # an earlier test may have set it
    try:
        torch.backends.fp32_precision = "tf32"
        assert precisions() == ["tf32"] * len(before)
        with Compute(exact=True).arithmetic():
            assert precisions() == ["ieee"] * len(before)
        assert precisions() == ["tf32"] * len(before)
        torch.backends.fp32_precision = "ieee"
        assert precisions() == ["ieee"] * len(before)
    finally:
        torch.backends.fp32_precision = everywhere
        for switch, value in zip(compute._PRECISIONS, before, strict=True):
            switch.restore(value)


def test_caches_keep_results_of_different_precision_apart() -> None:
    gpu = torch.device("cuda")
    with Compute(exact=True).arithmetic():
        full = machine(gpu), machine(torch.device("cpu"))
    with Compute(exact=False, tf32=True).arithmetic():
        assert machine(gpu) == full[0] | {"reduced_precision": True} and machine(torch.device("cpu")) == full[1]


def test_precision_is_restored_after_an_error(imprecise: list[Any]) -> None:
    with pytest.raises(RuntimeError), Compute(exact=True).arithmetic():
        assert precisions() != imprecise
        raise RuntimeError
    assert precisions() == imprecise and torch.get_float32_matmul_precision() == "medium"
    assert torch.backends.cudnn.allow_tf32


def test_compiled_transpositions_of_bfloat16_read_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GCC 12 miscompiles them on processors with AVX-512, unless it is kept from it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    draws = torch.Generator().manual_seed(0)
    maps = [torch.randn(10, 128, side, side, generator=draws).bfloat16() for side in (8, 32, 16)]
    stored = [m.to(memory_format=torch.channels_last) for m in maps]
    found = compute.compiled_or_eager(lambda *maps: [m.float().contiguous() for m in maps])(*stored)
    assert all(torch.equal(f, m.float()) for f, m in zip(found, maps, strict=True))
