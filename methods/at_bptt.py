"""AT-BPTT: "Beyond random: automatic inner-loop optimization in dataset distillation", NeurIPS 2025.

The objective and the update are those of RaT-BPTT (see ``condense.methods.rat_bptt`` for its symbols). The training of
the network decides where the window of differentiated steps begins and how long it is:

    g_t = || grad l(b_t; theta_t) ||,  t = 0 .. T - 1, in a training without a graph before each epoch
    n  ~  softmax( g / (tau mean g) ),    r(n) = #{ t : |g_t - g_{t-1}| < |g_n - g_{n-1}| }

    stage 1   W_k = floor(W - d + 2 d r(n) / T),   k = min(n, T - W_k)
    stage 2   W_k = W + d,                         k uniform over 0 .. T - W_k
    stage 3   W_k = W - d,                         k = max(T - W_k - n, 0)

    symbol   code
    T        ``inner_steps``
    W, d     ``window``, ``spread``
    tau      ``temperature``
    k, W_k   ``state.first`` and ``state.length``: the steps before the window, and its own; new in each epoch
    epoch    ``same_burn_in`` updates
    stage    ``state.stage``: the next one begins after ``patience`` T epochs in a row whose gain in accuracy on real
             images is below ``gains``

RE-IMPLEMENTATION FROM DESCRIPTION: the authors' code was not read. Deviations: see docs/methods/at-bptt.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from condense.inner import Adam, Adjoint, Exact, RandomTruncated, Truncated
from condense.method import Context, Loss, Value
from condense.methods.rat_bptt import RaTState, WindowedBPTT
from condense.methods.unrolled import prepared
from condense.names import spelt
from condense.rng import Draws


@dataclass(kw_only=True)
class ATState(RaTState):
    stage: int
    stalled: int
    """Number of epochs in a row whose gain in accuracy was too small."""
    accuracy: float
    """Mean accuracy on the real images of the last epoch; 0 in the first."""
    total: Tensor
    """Sum of the accuracies of the updates of this epoch."""
    first: int
    """Number of training steps before the window of this epoch."""
    length: int
    """Number of training steps in the window of this epoch."""


@final
@dataclass(frozen=True, kw_only=True)
class ATBPTT(WindowedBPTT):
    """Back-propagates through a window of training steps whose position and length follow the gradients of training."""

    terms: ClassVar[tuple[str, ...]] = ("accuracy",)

    adjoint: Adjoint = Exact()
    """How to differentiate through the training steps in the window: exact or checkpointed, for example."""
    window: int = 40
    """Mean number of training steps in the window (W)."""
    spread: int = 10
    """Largest difference between the number of steps in a window and ``window`` (d)."""
    temperature: float = 1.0
    """Temperature of the softmax of the gradient norms, which are divided by their mean; at large values all positions
    are equally likely."""
    gains: tuple[float, float] = (0.015, 0.01)
    """Gains in accuracy from one epoch to the next, below which an epoch counts towards the end of stages 1 and 2."""
    patience: tuple[float, float] = (0.15, 0.125)
    """Numbers of such epochs in a row after which stages 1 and 2 end, as fractions of ``inner_steps``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("window", "temperature")
        if not 0 <= self.spread < self.window or self.window + self.spread > self.inner_steps:
            raise ValueError(
                f"method.window {self.window} and spread {self.spread} make windows of {self.window - self.spread} to "
                f"{self.window + self.spread} steps, but the network takes {self.inner_steps}; give windows of 1 to "
                f"{self.inner_steps} steps, for example {spelt('method.spread', 0)}"
            )
        if isinstance(self.adjoint, Truncated | RandomTruncated):
            raise ValueError(
                f"method.adjoint {self.adjoint.name} has a window of its own; give {spelt('method.adjoint', 'exact')}, "
                "with method.window and spread"
            )

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        batch = num_classes * min(self.batch_per_class, images_per_class)
        dry_runs = self.num_steps / self.same_burn_in * self.inner_steps * batch
        return super().estimated_work(num_images, num_classes, images_per_class) + dry_runs

    def init(self, ctx: Context) -> ATState:
        rat = super().init(ctx)
        state = ATState(
            **vars(rat),
            stage=1,
            stalled=0,
            accuracy=0.0,
            total=torch.zeros_like(rat.norm),
            first=0,
            length=self.window,
        )
        self.place(ctx, state, 0)
        return state

    def burn_in(self, ctx: Context, state: ATState, step: int) -> int:
        return state.first

    def differentiated(self, ctx: Context, state: ATState, step: int) -> tuple[int, Adjoint]:
        return state.length, self.adjoint

    def loss(self, ctx: Context, state: ATState, step: int, part: int) -> Loss:
        logits, labels = self.outcome(ctx, state, step)
        accuracy = (logits.argmax(1) == labels).to(logits.dtype).mean()
        return ctx.objective.loss(logits, labels), {"accuracy": accuracy}

    def update(self, state: Any, record: dict[str, Value]) -> None:
        super().update(state, record)
        state.total += record["loss_accuracy"]

    def after(self, ctx: Context, state: ATState, step: int) -> Mapping[str, Value]:
        """Place the window of the next epoch at the end of each, for which the accuracy is read."""
        used = {"stage": float(state.stage), "first": float(state.first), "window": float(state.length)}
        if (step + 1) % self.same_burn_in == 0:
            self.end_epoch(state, state.total.item() / self.same_burn_in)
            state.total.zero_()
            self.place(ctx, state, step + 1)
        return used

    def end_epoch(self, state: ATState, accuracy: float) -> None:
        """Count an epoch of this accuracy on real images, and begin the next stage if it is due."""
        gain, state.accuracy = accuracy - state.accuracy, accuracy
        if state.stage == 3:
            return
        state.stalled = state.stalled + 1 if gain < self.gains[state.stage - 1] else 0
        if state.stalled >= self.patience[state.stage - 1] * self.inner_steps:
            state.stage, state.stalled = state.stage + 1, 0

    def place(self, ctx: Context, state: ATState, step: int) -> None:
        """Choose the window of the epoch that begins with this step."""
        draws = ctx.rng("window", step)
        if state.stage == 2:
            state.length = self.window + self.spread
            state.first = draws.integer(0, self.inner_steps - state.length + 1)
            return
        norms = self.gradient_norms(ctx, state, step)
        position = self.position(norms, draws)
        if state.stage == 3:
            state.length = self.window - self.spread
            state.first = max(self.inner_steps - state.length - position, 0)
            return
        changes = norms.diff(prepend=norms[:1]).abs()
        rank = int((changes < changes[position]).sum())
        state.length = self.window - self.spread + 2 * self.spread * rank // self.inner_steps
        state.first = min(position, self.inner_steps - state.length)

    def position(self, norms: Tensor, draws: Draws) -> int:
        """Draw a training step in proportion to the softmax of the gradient norms (T,), divided by their mean."""
        return int(draws.weighted((norms / (self.temperature * norms.mean())).softmax(0), 1))

    def gradient_norms(self, ctx: Context, state: ATState, step: int) -> Tensor:
        """Train the network of a step on the set without a graph; return the gradient norm (T,) of each training step,
        on the CPU in float64."""
        with torch.no_grad(), ctx.rng.forked("gradient norms", step):
            data, (theta, _) = state.syn(), ctx.task.network.init(ctx.rng, "network", step)
            rule, norms = Adam(), list[Tensor]()
            adam, lr = rule.init(theta), torch.as_tensor(self.lr, dtype=data[0].dtype, device=data[0].device)
            prepare = partial(prepared, ctx.task.augment)
            for n in range(self.inner_steps):
                gradient = torch.func.grad(ctx.loss_fn)(theta, prepare(self.minibatch(ctx, state, data, step, n)))
                norms.append(torch.stack([g.norm() for g in gradient.values()]).norm())
                theta, adam = rule.update(gradient, adam, theta, lr)
            return torch.stack(norms).cpu().double()  # mps has no float64
