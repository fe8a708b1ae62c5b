"""What is measured of one path: both sides in turn for the time, each in a process of its own for the memory.

These functions run in processes of their own (``harness.alone``).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Run, allocator, median_seconds, peak_mb, seconds
from benchmarks.jobs import EXACT, QUICK, STRATEGY, Scale, fresh, make, matching_engine
from benchmarks.textbook import dsa

Build = Callable[[Scale, torch.device], Run]


class Times(NamedTuple):
    """Medians, in seconds."""

    textbook: float
    textbook_same_allocator: float
    engine: float
    compilation: float
    """What the engine's first run took longer."""


def times(textbook: Build, engine: Build, scale: Scale, device: torch.device, repeats: int) -> Times:
    """The two sides in turn, ``repeats`` times after a run of each; a tiny one of the textbook: it compiles nothing.

    The textbook runs under both allocators; under that of the engine in the first half of the turns.
    """
    textbook(QUICK, device)()
    theirs, ours = textbook(scale, device), engine(scale, device)
    allocator(engine=True)
    first = seconds(ours, device)
    default, same, found = [], [], []
    for turn in range(repeats):
        allocator(engine=False)
        default.append(seconds(theirs, device))
        allocator(engine=True)
        if turn < max(repeats // 2, 1):
            same.append(seconds(theirs, device))
        found.append(seconds(ours, device))
    median = statistics.median(found)
    return Times(statistics.median(default), statistics.median(same), median, max(0.0, first - median))


_side: list[Run] = []


def take_side(build: Build, engine: bool, scale: Scale, device: torch.device) -> None:
    """Set this process up for ``turn``: the engine's with its allocator, the textbook's untouched."""
    if engine:
        allocator(engine=True)
    _side[:] = [build(scale, device)]
    _side[0]()


def turn(device: torch.device) -> float:
    return seconds(_side[0], device)


def engine_seconds(engine: Build, scale: Scale, device: torch.device, repeats: int) -> float:
    run = engine(scale, device)
    allocator(engine=True)
    run()
    return median_seconds(run, device, repeats)


def memory(build: Build, engine: bool, scale: Scale, device: torch.device) -> float:
    """Peak of a run over what the process held before it, in MB, each side under its own allocator and after a run
    like those of ``times``."""
    allocator(engine)
    run = build(scale, device)
    (run if engine else build(QUICK, device))()
    return peak_mb(run, device)


def narrow_error(scale: Scale, device: torch.device) -> float:
    """Error of the images' gradient in one step of trajectory matching, relative to eager float32."""

    def gradient(scale: Scale) -> torch.Tensor:
        steps = matching_engine(10, scale, device)
        steps()
        grad = steps.state.syn.latents.grad
        assert grad is not None
        return grad

    exact, narrow = gradient(dataclasses.replace(scale, compute=EXACT)), gradient(scale)
    return ((narrow - exact).norm() / exact.norm()).item()


class Limits(NamedTuple):
    """The machine's own rates in GFLOP/s, as PyTorch reaches them, and the work of expert training."""

    matmul_float32: float
    matmul_bfloat16: float
    convolution_float32: float
    convolution_bfloat16: float
    gflop_per_image: float
    """Forward and backward of one image."""


def limits(scale: Scale, device: torch.device, repeats: int) -> Limits:
    """A large matrix product; and the forward pass of the middle convolution of the network, a batch of experts."""
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
