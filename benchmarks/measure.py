"""Measure one path: the times of both sides alternately, the memory of each side in a separate process.

These functions run in new processes (``harness.alone``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Run, allocator, median_seconds, peak_mb, seconds
from benchmarks.jobs import EXACT, QUICK, STRATEGY, Scale, Steps, fresh, make, matching_engine
from benchmarks.textbook import dsa
from benchmarks.tf32 import EmulatedTF32
from condense.compute import Compute

Build = Callable[[Scale, torch.device], Run]


class Times(NamedTuple):
    """Medians, in seconds."""

    textbook: float
    textbook_same_allocator: float
    engine: float
    compilation: float
    """Time of the engine's first run minus the median."""


def times(textbook: Build, engine: Build, scale: Scale, device: torch.device, repeats: int) -> Times:
    """Run both sides alternately, ``repeats`` times, after a first run of each.

    The first run of the textbook is tiny, since it compiles nothing. The textbook runs with glibc's default allocator
    in every turn, and in the first half of the turns with the engine's allocator too.
    """
    textbook(QUICK, device)()
    theirs, ours = textbook(scale, device), engine(scale, device)
    allocator(engine=True)
    first = seconds(ours, device)
    default, same, ours_seconds = [], [], []
    for turn in range(repeats):
        allocator(engine=False)
        default.append(seconds(theirs, device))
        allocator(engine=True)
        if turn < max(repeats // 2, 1):
            same.append(seconds(theirs, device))
        ours_seconds.append(seconds(ours, device))
    median = statistics.median(ours_seconds)
    return Times(statistics.median(default), statistics.median(same), median, max(0.0, first - median))


_side: list[Run] = []
"""What this process runs."""


def take_side(build: Build, engine: bool, scale: Scale, device: torch.device) -> None:
    """Prepare this process for ``turn``: for the engine with its allocator, for the textbook with the default one."""
    if engine:
        allocator(engine=True)
    _side[:] = [build(scale, device)]
    _side[0]()


def turn(device: torch.device) -> float:
    return seconds(_side[0], device)


def start(build: Build, scale: Scale, device: torch.device) -> float:
    """Prepare this process for ``again`` and ``profile``; return the peak memory of the first run, in MB.

    The first run counts because a step that was captured as a CUDA graph allocates nothing later.
    """
    _side[:] = [build(scale, device)]
    peak = peak_mb(_side[0], device)
    _side[0]()
    return peak


def again(device: torch.device, repeats: int) -> float:
    """Return the median of the seconds of a run, after one more run."""
    _side[0]()
    return median_seconds(_side[0], device, repeats)


class Profile(NamedTuple):
    kernels: int
    """Kernels of a run; on a CPU, calls of operators."""
    busy: float
    """Seconds of a run in which the device works."""


def profile(device: torch.device) -> Profile:
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiled:
        seconds(_side[0], device)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    assert profiled.profiler is not None
    # the recorded events themselves, since ``profiled.events`` takes a minute for the kernels of an evaluation
    events = [e for e in profiled.profiler.kineto_results.events() if e.device_type() == kind]
    events = [e for e in events if not e.is_user_annotation()]
    busy = reached = 0
    for begin, end in sorted((e.start_ns(), e.end_ns()) for e in events):
        busy += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return Profile(sum(not e.name().startswith(("Memcpy", "Memset")) for e in events), busy / 1e9)


def first_step(build: Build, scale: Scale, device: torch.device, cache: Path) -> float:
    """Return the seconds of the first run in this process, with ``cache`` as the folder of compiled code."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    return seconds(build(scale, device), device)


class Textbook(NamedTuple):
    seconds: float
    peak_mb: float


def textbook(build: Build, scale: Scale, device: torch.device, repeats: int) -> Textbook:
    """Return the median time of a run after a first run, and the peak memory of the first."""
    run = build(scale, device)
    peak = peak_mb(run, device)
    return Textbook(median_seconds(run, device, repeats), peak)


def engine_seconds(engine: Build, scale: Scale, device: torch.device, repeats: int) -> float:
    run = engine(scale, device)
    allocator(engine=True)
    run()
    return median_seconds(run, device, repeats)


def memory(build: Build, engine: bool, scale: Scale, device: torch.device) -> float:
    """Return the peak memory of a run minus the memory held before it, in MB. Each side uses its own allocator, and
    has one run before, like those of ``times``."""
    allocator(engine)
    run = build(scale, device)
    (run if engine else build(QUICK, device))()
    return peak_mb(run, device)


def narrow_error(scale: Scale, device: torch.device) -> float:
    """Return the error of the gradient of the images in one trajectory-matching step, relative to eager float32."""

    def gradient(scale: Scale) -> torch.Tensor:
        steps = matching_engine(10, scale, device)
        return _gradient(steps, steps)

    exact, narrow = gradient(dataclasses.replace(scale, compute=EXACT)), gradient(scale)
    return ((narrow - exact).norm() / exact.norm()).item()


class Errors(NamedTuple):
    """Errors of a gradient, relative to float64."""

    tf32: float
    float32: float


def errors(engine: Callable[[Scale, torch.device], Steps], scale: Scale, device: torch.device) -> Errors:
    """Return the errors of the gradient of the images in the first update, with TF32 and without; all run eagerly.

    The learning rates that RCIG searches for are those of float64 in all three. On a CPU, TF32 is emulated.
    """
    scale = dataclasses.replace(scale, num_updates=1, compute=EXACT)
    reference = engine(dataclasses.replace(scale, double=True), device)
    exact = _gradient(reference, reference)

    def error(compute: Compute, emulated: bool = False) -> float:
        steps = engine(dataclasses.replace(scale, compute=compute), device)
        with EmulatedTF32() if emulated else contextlib.nullcontext():
            found = _gradient(steps, reference)
        return ((found.double() - exact).norm() / exact.norm()).item()

    tf32 = dataclasses.replace(EXACT, exact=False, tf32=True)
    return Errors(error(tf32, emulated=device.type == "cpu"), error(EXACT))


def _gradient(steps: Steps, reference: Steps) -> torch.Tensor:
    """Return the gradient of the images in an update, with the learning rates of the reference."""
    for name in ("lr_inner", "lr_adjoint"):
        if hasattr(reference.state, name):
            setattr(steps.state, name, getattr(reference.state, name))
    steps()
    grad = steps.state.syn.latents.grad
    assert grad is not None
    return grad.clone()


class Limits(NamedTuple):
    """The rates in GFLOP/s that PyTorch reaches on this machine, and the work of expert training."""

    matmul_float32: float
    matmul_bfloat16: float
    convolution_float32: float
    convolution_bfloat16: float
    gflop_per_image: float
    """Forward and backward pass of one image."""


def limits(scale: Scale, device: torch.device, repeats: int) -> Limits:
    """Measure a large matrix product and the forward pass of the network's second convolution on a batch of experts."""
    allocator(engine=True)

    def rates(dtype: torch.dtype) -> tuple[float, float]:
        side = 64 * scale.side
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        half = scale.side // 2
        x = torch.randn(scale.batch, scale.width, half, half, device=device).to(dtype)
        kernel = torch.randn(scale.width, scale.width, 3, 3, device=device).to(dtype)
        product = 2 * side**3
        convolution = 2 * scale.batch * half**2 * scale.width**2 * 9
        return _rate(lambda: a @ b, product, device, repeats), _rate(
            lambda: F.conv2d(x, kernel, padding=1), convolution, device, repeats
        )

    with torch.no_grad():
        (mm32, conv32), (mm16, conv16) = rates(torch.float32), rates(torch.bfloat16)
    task = make(scale, device)
    x, y = task.train.images[: scale.batch], task.train.labels[: scale.batch]
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(fresh(scale, device)(dsa(x, STRATEGY)), y).backward()
    return Limits(mm32, mm16, conv32, conv16, counter.get_total_flops() / 1e9 / len(x))


def _rate(run: Run, flops: int, device: torch.device, repeats: int) -> float:
    run()
    return flops / 1e9 / median_seconds(run, device, repeats)
