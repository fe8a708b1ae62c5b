"""The benchmarks run, and their textbook computes what the engine computes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import __main__ as benchmarks
from benchmarks import gpu, growth, harness, inputs, jobs, measure, profile_matching, report, startup, textbook, tf32
from condense import cli
from condense.augment import Augment, Params
from condense.compute import Compute
from condense.inner import Adam, Descent, Full, Truncated, minimise, mixed_gradient, unroll
from condense.kernels import centred, feature_kernel, regression
from condense.match import (
    convolution_mse_sum,
    feature_mean_distance,
    layerwise_cosine,
    matching_loss,
    trajectory_distance,
)
from condense.methods import rcig
from condense.methods.dc import frozen_loss
from condense.methods.frepo import half_squared_error, margin_loss
from condense.methods.rcig import Convexified, no_longer_than, outer_loss
from condense.methods.sre2l import statistics_distance
from condense.networks import Functional, Weights
from condense.objective import CrossEntropy
from condense.rng import Rng
from condense.schedule import Schedule
from condense.synthetic import Factor
from condense.teachers import Teacher
from condense.train import Trainer, Training

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory and disk are read from /proc")
CPU = torch.device("cpu")
SHAPE = (3, 8, 8)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything in this process, and no gigabyte held."""

    def call(function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    class Here:
        """A process whose tasks run here; what one has set up is there when it gets its next task."""

        def __init__(self) -> None:
            self.side: list[Any] = []

        def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
            monkeypatch.setattr(measure, "_side", self.side)
            done: Future[Any] = Future()
            try:
                done.set_result(function(*args))
            except Exception as error:
                done.set_exception(error)
            return done

        def close(self) -> None:
            self.side.clear()

    def wall(command: Sequence[str], cache: object = None) -> float:
        kind, name, *words = command
        if kind == "-m":
            with monkeypatch.context() as patch:
                patch.setattr(sys, "argv", [name, *words])
                patch.setattr(Trainer, "run_together", Trainer.run_together)  # which the start of a command replaces
                try:
                    {"condense": cli.main, "benchmarks.startup": startup.main}[name]()
                except SystemExit as left:
                    assert not left.code
        return 1.0

    monkeypatch.setattr(startup, "wall", wall)
    for module in (benchmarks, gpu):
        monkeypatch.setattr(module, "processes", lambda num: contextlib.nullcontext([Here() for _ in range(num)]))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TMPDIR"):
        monkeypatch.setenv(name, os.environ.get(name, tempfile.gettempdir()))
    monkeypatch.setattr(benchmarks, "alone", call)
    monkeypatch.setattr(growth, "alone", call)
    monkeypatch.setattr(harness, "_WARM_BYTES", 1)
    monkeypatch.setattr(rcig, "RAISE", 10.0)  # a short search for the learning rates
    monkeypatch.setattr(gc, "collect", lambda: 0)  # of all that the test session holds, which takes a second
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    harness.allocator(engine=False)
    torch.set_num_threads(threads)


FIELDS = {field.name for field in dataclasses.fields(report.Row)}
HEAD = {"machine", "driver", "cores", "threads", "torch", "commit", "date", "limits", "rows"}


@linux
def test_every_benchmark_writes_its_rows(here: None, tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(
        "before\n<!-- table -->\nold\n<!-- /table -->\n<!-- gpu-table -->\nold\n<!-- /gpu-table -->\nafter\n"
    )
    benchmarks.main(["--quick", "--profile", "--repeats", "1", "--commit", "abc", "--out", str(tmp_path)])
    found, on_gpu = (json.loads((tmp_path / name).read_text()) for name in report.TABLES.values())
    assert found.keys() == on_gpu.keys() == HEAD and found["commit"] == on_gpu["commit"] == "abc"
    assert all(row.keys() == FIELDS and row["engine"] >= 0 for row in found["rows"] + on_gpu["rows"])
    asked = [(row["path"], row["quantity"]) for row in found["rows"] if row["ask"] is not None]
    assert len(asked) == len(set(asked)) == 10
    assert {path for path, quantity in asked if quantity == "time"} == {
        name for name, job in jobs.JOBS.items() if job.ask
    }
    assert jobs.JOBS.keys() == {row["path"] for row in found["rows"] if row["quantity"] == "compilation"}
    timed = {row["path"]: row for row in on_gpu["rows"] if row["quantity"] in ("time", "compiled before")}
    assert list(timed) == gpu.paths() and sum(row["ask"] is not None for row in on_gpu["rows"]) == 14
    assert all(timed[v.path]["textbook"] for v in gpu.VARIANTS if v.textbook or v.single)
    assert all(row["engine"] > 0 for row in on_gpu["rows"] if row["quantity"] == "kernels in a step")
    errors = {(row["path"], row["quantity"]): row["engine"] for row in on_gpu["rows"] if row["unit"] == "relative"}
    assert errors.keys() == {(path, quantity) for path in gpu.ERRORS for quantity in (gpu.WITH_TF32, gpu.WITHOUT)}
    text = page.read_text()
    assert text.startswith("before\n<!-- table -->\n| path |") and text.endswith("\n<!-- /gpu-table -->\nafter\n")
    assert "old" not in text and all(f"| {path} |" in text for path in [*jobs.JOBS, *gpu.paths()])


def gpu_rows(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    rows = json.loads((folder / "partial-performance-gpu.json").read_text())["rows"]
    return {(row["path"], row["quantity"]): row for row in rows}


def plan(folder: Path, minutes: float = 1.0) -> gpu.Plan:
    written = report.Report("gpu-table", benchmarks.head(CPU, "abc"), folder)
    return gpu.Plan(report=written, scale=jobs.QUICK, device=CPU, repeats=1, minutes=minutes, cache=folder)


@linux
def test_what_fails_or_is_not_reached_stays_open(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any) -> harness.Run:
        raise RuntimeError("no memory\nmore")

    first, second = gpu.VARIANTS[2:4]
    monkeypatch.setattr(gpu, "FIRST_STEPS", {})
    bad = dataclasses.replace(first, job=dataclasses.replace(first.job, engine=broken))
    monkeypatch.setattr(gpu, "VARIANTS", [bad, second])
    made = plan(tmp_path)
    made.measure()
    rows = gpu_rows(tmp_path)
    assert rows[first.path, "time"]["engine"] is rows[first.path, "time"]["met"] is None
    assert rows[second.path, "time"]["engine"] > 0 and rows[second.path, "time"]["textbook"] > 0
    assert f"{first.path}: RuntimeError: no memory\n" in capsys.readouterr().out
    assert f"| {first.path} | time, ms |  | not measured |" in made.report.text()


@linux
def test_a_process_is_ended_at_the_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = jobs.Job(textbook=forever, engine=forever)
    monkeypatch.setattr(gpu, "VARIANTS", [gpu.Variant(path="endless", job=job)])
    monkeypatch.setattr(gpu, "FIRST_STEPS", {})
    begun = time.monotonic()
    made = plan(tmp_path, minutes=0.02)
    made.measure()
    assert time.monotonic() - begun < 60
    assert [row.engine for row in made.report.rows] == [None, None]


def forever(scale: jobs.Scale, device: torch.device) -> harness.Run:
    time.sleep(1000)
    raise AssertionError


@linux
def test_rows_are_written_as_they_come_and_read_again(tmp_path: Path) -> None:
    made = report.Report("gpu-table", benchmarks.head(CPU, "abc"), tmp_path)
    made.plan("a", "time", "ms", target=3)
    made.add("b", "memory", "MB", 5.0, 1, target=4)
    assert [(row["path"], row["met"]) for row in gpu_rows(tmp_path).values()] == [("a", None), ("b", False)]
    made.add("a", "time", "ms", 2.0, 5, target=3)
    assert not (tmp_path / "performance-gpu.json").exists()
    made.finish(tmp_path)
    read = report.read(tmp_path / "performance-gpu.json")
    assert not (tmp_path / "partial-performance-gpu.json").exists()
    assert (
        read == dataclasses.replace(made, folder=None)
        and "| a | time, ms |  | 2 |  | <= 3 ms | yes | 5 |" in read.text()
    )


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    words = ["--quick", "--only", "command line", "--out", str(tmp_path / "file")]
    assert harness.status("python -m benchmarks", lambda: benchmarks.main(words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"python -m benchmarks: cannot write {tmp_path / 'file'}: ")


def test_pages_are_left_as_they_are_where_rows_were_not_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def first(session: Any) -> None:
        session.report.add("first", "time", "s", 2.0, 1)
        time.sleep(0.01)

    page = "<!-- table -->\nold\n<!-- /table -->\n"
    (tmp_path / "performance.md").write_text(page)
    (tmp_path / "performance.json").write_text("old")
    monkeypatch.setattr(benchmarks, "DOCS", tmp_path)
    monkeypatch.setattr(report, "DOCS", tmp_path)
    monkeypatch.setattr(benchmarks, "BENCHMARKS", {"first": first, "second": lambda session: None})
    benchmarks.main(["--limit", "0.0001"])
    assert (tmp_path / "performance.md").read_text() == page and (tmp_path / "performance.json").read_text() == "old"
    partial = tmp_path / "partial-performance.json"
    said = capsys.readouterr().out
    assert "the limit of 0.0001 minutes is reached before second\n" in said
    assert f"docs are left as they are; python -m benchmarks.report {partial} puts these rows there\n" in said
    monkeypatch.setattr(sys, "argv", ["report", str(partial)])
    report.main()
    assert "| first |" in (tmp_path / "performance.md").read_text()
    assert report.read(tmp_path / "performance.json") == report.read(partial)


def test_a_limit_of_no_minutes_is_no_usual_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Any] = []

    def plan(**options: Any) -> SimpleNamespace:
        plans.append(options["minutes"])
        return SimpleNamespace(measure=lambda: None)

    monkeypatch.setattr(benchmarks.gpu, "Plan", plan)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.setenv("TMPDIR", tempfile.gettempdir())
    for words in (["--limit", "0"], []):
        benchmarks.main(["--quick", "--only", "first step", *words])
    assert plans == [0, 8.5]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "the following arguments are required: file"),
        (["nowhere/performance.json"], "nowhere/performance.json"),
        (["docs/performance-first-run.json"], "has the name of no table; name it performance.json or performance-gpu"),
    ],
)
def test_a_file_that_is_no_report_is_one_line(
    words: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["report", *words])
    with pytest.raises(SystemExit, match="2"):
        sys.exit(harness.status("report", report.main))
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_a_process_is_killed_with_what_waits_for_it() -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        harness.child([sys.executable, "-c", "import time; time.sleep(60)"]) as process,
    ):
        raise KeyboardInterrupt
    assert process.returncode == -9


def test_commands_have_the_threads_that_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(startup.subprocess, "run", lambda *_, env, **__: given.append(env["OMP_NUM_THREADS"]))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    startup.wall(["-c", ""])
    assert given == ["7"]


def test_a_word_that_nothing_reads_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["profile_matching", "--threads"])
    with pytest.raises(SystemExit):
        profile_matching.main()
    assert "unrecognized arguments: --threads" in capsys.readouterr().err


@linux
def test_a_process_each_is_run_where_it_is_named(here: None, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    benchmarks.main(["--quick", "--repeats", "1", "--only", "10 steps, a process each", "--out", str(folder)])
    (row,) = json.loads((folder / "performance.json").read_text())["rows"]
    assert row["quantity"] == "time, a process each" and row["textbook"] > 0


@linux
def test_growth_is_drawn(here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(growth, "SMALL", dataclasses.replace(jobs.QUICK, shorten=1))
    monkeypatch.setattr(growth, "PANELS", [dataclasses.replace(panel, sizes=(2, 3)) for panel in growth.PANELS])
    growth.main(["--repeats", "1", "--out", str(tmp_path)])
    assert (tmp_path / "images" / "growth.png").read_bytes().startswith(b"\x89PNG")
    curves = harness.read(growth.Growth, tmp_path / "growth.json").curves
    assert [curve.title for curve in curves] == [panel.title for panel in growth.PANELS]
    assert all(len(side.seconds) == 2 for curve in curves for side in (curve.engine, curve.textbook))


def test_growth_keeps_what_was_measured_and_a_quick_one_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ImportError

    monkeypatch.setattr(growth, "DOCS", tmp_path)
    monkeypatch.setattr(growth, "PANELS", [])
    monkeypatch.setattr(growth, "plot", broken)
    growth.main(["--quick"])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ImportError):
        growth.main([])
    assert [file.name for file in tmp_path.iterdir()] == ["growth.json"]


@pytest.mark.slow
@linux
def test_memory_is_measured_in_a_process_of_its_own() -> None:
    job = jobs.JOBS["distribution matching, a step"]
    assert 0 < harness.alone(measure.memory, job.engine, True, jobs.QUICK, CPU) < 100


@linux
def test_the_peak_is_what_a_run_adds() -> None:
    held = torch.ones(50_000_000)
    assert 90 < harness.peak_mb(lambda: torch.ones(25_000_000), CPU) < 120
    del held


def test_ratios_and_asks() -> None:
    rate = report.row("a", "time", "images/s", 30.0, 5, textbook=10.0, same=15.0, at_least=3)
    assert (rate.ratio, rate.ratio_same_allocator, rate.met, rate.ask) == (3.0, 2.0, True, ">= 3 x")
    assert report.row("a", "time", "s", 5.0, 5, textbook=10.0, at_least=3).met is False
    assert report.row("a", "memory", "x", 1.3, 1, target=1.2).met is False
    fast, slow = (report.row("a", "time", "images/s", value, 1, target=1000) for value in (1000.0, 999.0))
    assert (fast.ask, fast.met, slow.met) == (">= 1,000 images/s", True, False)
    assert growth.exponent([1, 10, 100], [2.0, 200.0, 20000.0]) == pytest.approx(2)


def test_a_word_that_fits_no_path_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmarks.main(["--only", "nothing"])
    assert "no path contains" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--threads", "--repeats"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many"])
def test_a_number_below_one_is_refused_in_one_line(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        benchmarks.main([flag, value, "--only", "import"])
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2
    assert line == f"python -m benchmarks: argument {flag}: {value} is no whole number of at least 1; give 1 or more"


@pytest.mark.parametrize("path", gpu.ERRORS)
def test_tf32_is_emulated_on_a_cpu_and_its_error_is_that_of_ten_bits(here: None, path: str) -> None:
    assert path in gpu.paths()
    found = measure.errors(gpu.ERRORS[path], jobs.QUICK, CPU)
    assert 0 < found.float32 < 1e-5
    assert 2**-11 / 10 < found.tf32 < 100 * 2**-11


def test_tf32_rounds_the_factors_of_a_product_to_ten_bits() -> None:
    ulp = 2.0**-10
    numbers = torch.tensor([1 + ulp / 2, 1 + ulp * 0.499, -1 - ulp / 2, 3.0, 0.0])
    assert tf32.rounded(numbers).tolist() == [1 + ulp, 1.0, -1 - ulp, 3.0, 0.0]
    x, y = torch.rand(3, 4), torch.rand(4, 5)
    exact = tf32.rounded(x).double() @ tf32.rounded(y).double()
    bias = torch.rand(5)
    double = x.double() @ y.double()
    with tf32.EmulatedTF32():
        assert torch.allclose((x @ y).double(), exact, rtol=1e-6)
        assert torch.allclose(torch.addmm(bias, x, y).double(), exact + bias, rtol=1e-6)
        assert torch.equal(x.double() @ y.double(), double), "only numbers of 32 bits are rounded"
    assert not torch.allclose((x @ y).double(), exact, rtol=1e-6)


@pytest.mark.parametrize("rank", [1, 2])
def test_tf32_rounds_what_a_convolution_and_its_derivatives_multiply(rank: int) -> None:
    """Numbers of ten bits are not rounded; others give the derivatives of the rounded ones."""
    conv = (F.conv1d, F.conv2d)[rank - 1]
    x, w = torch.rand(2, 3, *[6] * rank), torch.rand(4, 3, *[3] * rank)

    def derivatives(x: Tensor, w: Tensor) -> list[Tensor]:
        x, w = x.requires_grad_(), w.requires_grad_()
        out = conv(x, w)
        return [out.detach(), *torch.autograd.grad(out.sum(), [x, w])]

    with tf32.EmulatedTF32():
        found = derivatives(x.clone(), w.clone())
    expected = derivatives(tf32.rounded(x).double(), tf32.rounded(w).double())
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[0], conv(x, w), rtol=1e-5)


class Twins:
    """The same network as a function and as a module, in float64."""

    def __init__(self, smooth: bool = False) -> None:
        options = ",norm=none,activation=softplus" if smooth else ""
        self.network = Functional(f"convnet:depth=2,width=6{options}", SHAPE, 4, dtype=torch.float64)
        self.params, self.buffers = self.network.init(Rng(0), "weights")
        self.net = textbook.ConvNet(SHAPE, 4, depth=2, width=6, smooth=smooth).double()
        self.net.load_state_dict(self.params)
        self.loss_fn = frozen_loss(self.network, self.buffers)


@pytest.fixture
def twins() -> Iterator[Twins]:
    with torch.random.fork_rng():
        yield Twins()


def images(num: int, seed: int = 0) -> Tensor:
    return torch.randn(num, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_textbook_network(twins: Twins) -> None:
    x = images(5)
    torch.testing.assert_close(twins.net(x), twins.network.logits(twins.params, twins.buffers, x))


def test_textbook_training(twins: Twins) -> None:
    x, y = images(12), torch.arange(12) % 4
    plan = Training(num_epochs=3, batch_size=12, lr=0.1, momentum=0.9, weight_decay=0.01, schedule=Schedule())
    trainer = Trainer(twins.network, plan, Compute())
    trained = trainer.run(twins.network.init(Rng(0), "weights"), trainer.source(x, y, Rng(0)))
    textbook.train(twins.net, x, y, 3, lr=0.1, momentum=0.9, weight_decay=0.01, batch_size=12)
    torch.testing.assert_close(dict(twins.net.named_parameters()), trained.params, check_dtype=True)


def test_textbook_trajectory_matching(twins: Twins) -> None:
    x, y, lr = images(8).requires_grad_(), torch.arange(8) % 4, torch.tensor(0.1, dtype=torch.float64).requires_grad_()
    target = {name: p + 0.01 for name, p in twins.params.items()}
    theirs = textbook.mtt_loss(twins.net, twins.params, target, x, y, lr, num_steps=4, strategy="")
    theta = unroll(twins.loss_fn, twins.params, [(x, y)] * 4, lr=lr, adjoint=Full())
    ours = trajectory_distance(theta, target, twins.params)
    torch.testing.assert_close(theirs, ours)
    torch.testing.assert_close(torch.autograd.grad(theirs, (x, lr)), torch.autograd.grad(ours, (x, lr)))


def test_textbook_gradient_matching(twins: Twins) -> None:
    real, syn = images(9), images(3, seed=1).requires_grad_()
    theirs = textbook.dc_loss(twins.net, real, syn, 2)
    params = {name: p.clone().requires_grad_() for name, p in twins.params.items()}
    loss = CrossEntropy().loss(twins.network.logits(params, twins.buffers, real), torch.full((9,), 2))
    wanted = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    ours = matching_loss(twins.loss_fn, twins.params, wanted, layerwise_cosine, syn, torch.full((3,), 2))
    torch.testing.assert_close(theirs, ours)
    torch.testing.assert_close(torch.autograd.grad(theirs, syn), torch.autograd.grad(ours, syn))


def test_textbook_distribution_matching(twins: Twins) -> None:
    real, syn = images(9), images(3, seed=1).requires_grad_()
    theirs = textbook.dm_loss(twins.net, real, syn)
    features = [twins.network.features(twins.params, twins.buffers, x) for x in (real, syn)]
    ours = feature_mean_distance(*features)
    torch.testing.assert_close(theirs, ours)
    torch.testing.assert_close(torch.autograd.grad(theirs, syn), torch.autograd.grad(ours, syn))


def test_textbook_decoder() -> None:
    latents = images(6)
    decoder = Factor().build(SHAPE, 4)
    torch.testing.assert_close(textbook.decode(latents), decoder(latents, torch.zeros(6)))


def test_textbook_matching_of_convolutions(twins: Twins) -> None:
    real, syn = images(9), images(3, seed=1).requires_grad_()
    theirs = textbook.idc_loss(twins.net, real, syn, 2)
    wanted = torch.func.grad(twins.loss_fn)(twins.params, (real, torch.full((9,), 2)))
    ours = matching_loss(twins.loss_fn, twins.params, wanted, convolution_mse_sum, syn, torch.full((3,), 2))
    torch.testing.assert_close(theirs, ours)
    torch.testing.assert_close(torch.autograd.grad(theirs, syn), torch.autograd.grad(ours, syn))


def test_textbook_feature_regression(twins: Twins) -> None:
    real, syn, wanted = images(9), images(8, seed=1).requires_grad_(), centred(torch.arange(9) % 4, 4)
    targets = (centred(torch.arange(8) % 4, 4) * torch.linspace(0.1, 1, 8)[:, None]).requires_grad_()
    theirs = textbook.frepo_loss(twins.net, real, wanted, syn, targets, 1e-3)
    phi_t, phi_s = (twins.network.features(twins.params, twins.buffers, x) for x in (real, syn))
    predictions = regression(feature_kernel(phi_t, phi_s), feature_kernel(phi_s, phi_s), targets, 1e-3)
    ours = half_squared_error(predictions, wanted) + margin_loss(targets)
    torch.testing.assert_close(theirs, ours)
    torch.testing.assert_close(torch.autograd.grad(theirs, (syn, targets)), torch.autograd.grad(ours, (syn, targets)))


@pytest.mark.parametrize("burn_in", [0, 2])
def test_textbook_truncated_unrolling(twins: Twins, burn_in: int) -> None:
    x, y = images(8).requires_grad_(), torch.arange(8) % 4
    real = images(9, seed=1), torch.arange(9) % 4
    theirs = textbook.rat_bptt_loss(
        twins.net, twins.params, x, y, real, burn_in=burn_in, window=3, lr=0.01, strategy=""
    )
    adjoint = Truncated(window=3, burn_in=burn_in)
    theta = unroll(twins.loss_fn, twins.params, [(x, y)] * (burn_in + 3), rule=Adam(), lr=0.01, adjoint=adjoint)
    ours = twins.loss_fn(theta, real)
    torch.testing.assert_close(theirs, ours)
    torch.testing.assert_close(torch.autograd.grad(theirs, x), torch.autograd.grad(ours, x))


def test_textbook_implicit_gradients() -> None:
    twins, steps, lr = Twins(smooth=True), 6, 1e-3
    real, targets = (images(9, seed=1), torch.arange(9) % 4), centred(torch.arange(8) % 4, 4).requires_grad_()
    x, tau = images(8).requires_grad_(), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    linearised = textbook.Linearised(twins.net, 0.1)
    value, theirs = textbook.rcig_gradients(linearised, real, x, targets, tau, steps, lr, lr)
    net, batch = Convexified(twins.network, twins.params, twins.buffers, Augment(), 0.1), (x.detach(), targets.detach())
    point = minimise(
        torch.func.grad_and_value(lambda move: net.inner_loss(move, batch)), net.no_move(), num_steps=steps, lr=lr
    ).point
    outer = torch.func.grad_and_value(functools.partial(outer_loss, net, real), argnums=(0, 1, 2))
    (into_move, direct, into_tau), ours = outer(point, batch, tau.detach())
    v = Descent(num_steps=steps, lr=lr).solve(net.hessian_product(batch), into_move)
    mixed = mixed_gradient(net.inner_loss, point, (x, targets), v)
    torch.testing.assert_close(value, ours)
    gradients = [d + no_longer_than(d, -m) for d, m in zip(direct, mixed, strict=True)]
    torch.testing.assert_close(theirs, [*gradients, into_tau], rtol=1e-5, atol=1e-8)


def test_textbook_recovery() -> None:
    network = Functional("convnet:depth=2,width=6,norm=batch", SHAPE, 4)
    params, buffers = network.init(Rng(0), "weights")
    with torch.random.fork_rng():
        buffers = {name: b + torch.rand(b.shape) if b.is_floating_point() else b for name, b in buffers.items()}
        net = textbook.ConvNet(SHAPE, 4, depth=2, width=6, batch=True).eval()
    net.load_state_dict(params | buffers)
    x, y = images(8).float().requires_grad_(), torch.arange(8) % 4
    theirs = textbook.sre2l_loss(net, textbook.hooks_of(net), x, y)
    teacher = Teacher(network, Weights(params, buffers))
    logits, found = teacher.observer(Compute())(x)
    weights = [0.1] + [0.01] * (len(found) - 1)
    distances = [
        w * statistics_distance(of, teacher.running(name)) for w, (name, of) in zip(weights, found.items(), strict=True)
    ]
    ours = torch.nn.functional.cross_entropy(logits, y) + torch.stack(distances).sum()
    torch.testing.assert_close(theirs, ours)
    torch.testing.assert_close(torch.autograd.grad(theirs, x), torch.autograd.grad(ours, x))


def drawn(operation: str, rows: int) -> Tensor:
    """What the textbook draws from the global generator, as the engine's parameters of that operation."""
    match operation:
        case "color":
            u = [torch.rand(rows, 1, 1, 1).flatten() for _ in range(3)]
            return torch.stack([u[0] - 0.5, u[1] * 2, u[2] + 0.5], 1)
        case "crop":
            return torch.cat([torch.randint(-1, 2, (rows, 1, 1)).flatten(1) for _ in range(2)], 1)
        case "cutout":
            return torch.cat([torch.randint(0, 9, (rows, 1, 1)).flatten(1) for _ in range(2)], 1)
        case "flip":
            return torch.rand(rows, 1, 1, 1).flatten() < 0.5
        case "scale":
            return torch.stack([torch.rand(rows) * (1.2 - 1 / 1.2) + 1 / 1.2 for _ in range(2)], 1)
        case _:
            return (torch.rand(rows) - 0.5) * 2 * 15 / 180 * torch.pi


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("operation", textbook.AUGMENTATIONS)
def test_textbook_augmentation(operation: str, rows: int) -> None:
    x = images(6).float()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = textbook.AUGMENTATIONS[operation](x, rows)
        torch.manual_seed(3)
        params = Params({operation: drawn(operation, rows)})
    torch.testing.assert_close(theirs, Augment((operation,)).apply(x, params), atol=1e-5, rtol=1e-5)


def test_the_same_seed_treats_two_batches_alike() -> None:
    x = images(6).float()
    with torch.random.fork_rng():
        for seed in range(6):
            both = textbook.dsa(x, jobs.STRATEGY, siamese=True, seed=seed)
            half = textbook.dsa(x[3:], jobs.STRATEGY, siamese=True, seed=seed)
            torch.testing.assert_close(both[3:], half)


def test_inputs_are_measured_once_and_beside_random_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    y_train, y_test, draw = np.arange(20) % 2, np.arange(10) % 2, np.random.default_rng(0)
    x_train, x_test = (draw.normal(size=(len(y), 1, 8)) + 9 * y[:, None, None] for y in (y_train, y_test))
    np.savez(tmp_path / "s.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test, layout="NCL")
    monkeypatch.setitem(inputs.SETTINGS, "series", {"frepo": {"num_steps": 1, "training_epochs": 1}})
    rows = str(tmp_path / "rows")
    command = ["inputs", str(tmp_path / "s.npz"), "--network", "auto:depth=1,width=4,norm=none", "--rows", rows]
    monkeypatch.setattr(sys, "argv", [*command, *"--only random frepo --ipc 1 --num-seeds 1".split()])
    inputs.main()
    first = capsys.readouterr().out
    frepo = next(line for line in first.splitlines() if "frepo" in line)
    assert [cell.strip() != "—" for cell in frepo.split("|")[1:-1]] == [True] * 8
    monkeypatch.setattr(inputs.Bench, "row", None)
    inputs.main()
    assert capsys.readouterr().out == first
    assert "\n".join(first.splitlines()) in "\n".join(inputs.tables(tmp_path))
    monkeypatch.setattr(sys, "argv", [*command, "--num-seeds", "2"])
    with pytest.raises(ValueError, match=r"random-1.json was measured with num_seeds 1, not 2; give another place"):
        inputs.main()
    monkeypatch.setattr(sys, "argv", [*command, *"--only frepo --ipc 1 --num-seeds 1".split()])
    monkeypatch.setitem(inputs.SETTINGS, "series", {"frepo": {"num_steps": 2, "training_epochs": 1}})
    with pytest.raises(ValueError, match=r"frepo-1.json was measured with other settings; give another place"):
        inputs.main()
    file = tmp_path / "rows" / "frepo-1.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "settings"}))
    inputs.main()
    assert frepo in capsys.readouterr().out, "an older row does not say that its settings were others"
    for words, says in (
        ("--only frepo tesla", "there are no settings of 'tesla' for series: there are random, full, frepo"),
        ("--ipc 0", "0 is no whole number of at least 1"),
        ("--num-seeds 0", "0 is no whole number of at least 1"),
    ):
        monkeypatch.setattr(sys, "argv", [*command, *words.split()])
        with pytest.raises((ValueError, SystemExit)) as refused:
            inputs.main()
        assert says in f"{refused.value}{capsys.readouterr().err}"


def test_the_time_of_a_distillation_has_what_a_cache_would_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, bool]] = []

    def noted(name: str, result: Any) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            seen.append((name, os.environ.get("CONDENSE_CACHE") != "ours"))
            return result

        return call

    monkeypatch.setenv("CONDENSE_CACHE", "ours")
    monkeypatch.setattr(inputs, "_bytes", lambda syn: 1)
    for name, result in (("distill", None), ("stills", tmp_path), ("experts", tmp_path), ("score", (0.5,))):
        monkeypatch.setattr(inputs.Bench, name, noted(name, result))
    clips = np.zeros((4, 2, 1, 8, 8), np.float32)
    bench = inputs.Bench(
        arrays=inputs.load((clips, np.arange(4) % 2, clips, np.arange(4) % 2), layout="NTCHW"),
        network="auto",
        num_seeds=1,
        device=CPU,
        compute=Compute(),
        folder=tmp_path,
        name="clips",
        provenance=harness.Provenance.now(CPU),
    )
    bench.row("dm-static-dynamic", 1)
    assert seen == [("stills", False), ("distill", True), ("score", False)]


def test_held_out_samples_stand_in_the_place_of_the_test_split() -> None:
    series = np.arange(40, dtype=np.float32)[:, None, None] * np.ones((1, 1, 8), np.float32)
    labels = np.arange(40) % 4
    arrays = inputs.with_held_out(inputs.load((series, labels, series[:4] + 100, labels[:4]), layout="NCL"))
    assert np.bincount(arrays.y_train).tolist() == [7] * 4 and np.bincount(arrays.y_test).tolist() == [3] * 4
    values = [*arrays.x_train[:, 0, 0].tolist(), *arrays.x_test[:, 0, 0].tolist()]
    assert sorted(values) == list(range(40))
