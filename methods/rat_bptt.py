"""RaT-BPTT: Feng, Vedantam and Kempe, "Embarrassingly simple dataset distillation", ICLR 2024.

    min_S  E_{theta_0, k}  l(A(R); theta_{k+W}),    theta_{n+1} = Adam(theta_n, grad l(A(b_n); theta_n))

The gradient is back-propagated through the last W steps only, which follow a random number k of steps. The host draws
k and repeats the first steps; all other draws are made on the device, from which nothing is read.

    symbol   code
    k, W     ``adjoint``: burn-in from ``lo`` to ``hi``, and ``window``; k is redrawn every ``same_burn_in`` updates
    b_n      ``batch_per_class`` images of every class, drawn for each step
    A        ``task.augment``, drawn for every image of every step and for every real image
    R        ``batch_real`` real images
    clip     the gradient of the images is clipped to ``clip`` times a running mean of its norm (decay ``clip_decay``)

Deviations: see docs/methods/rat-bptt.md.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor

from condense.augment import Params as Drawn
from condense.cudagraph import copy_into, from_host
from condense.inner import Adam, Adjoint, Exact, Higher, Params, RandomTruncated, Tesla, Truncated, advance
from condense.inner.rules import AdamState
from condense.method import Context, GradientState, Optim, Value, clip_grad, dtype_of_numbers
from condense.methods.bilevel import Bilevel, class_members, draw_per_class
from condense.methods.unrolled import Minibatch, prepared
from condense.names import spelt
from condense.schedule import Schedule
from condense.task import Task
from condense.train import Training


@dataclass(kw_only=True)
class RaTState(GradientState):
    norm: Tensor
    """Running mean of the gradient norm of the images; 0 before the first update."""


@dataclass(frozen=True, kw_only=True)
class WindowedBPTT(Bilevel):
    """Base class of RaT-BPTT and AT-BPTT: a fresh network is trained on the set without a graph, and then for a window
    of steps through which its loss on real images is back-propagated."""

    added_fields: ClassVar[tuple[str, ...]] = ("start",)

    num_steps: int = 600000
    """Number of updates of the images."""
    start: Literal["real", "noise"] = "noise"
    """Initial images: real ones drawn per class, or standard normal noise, each image scaled to norm 1."""
    inner_steps: int = 200
    """Number of training steps of the network."""
    same_burn_in: int = 10
    """Number of updates for which the position of the window stays the same."""
    lr: float = 1e-3
    """Learning rate of Adam, which trains the network."""
    batch_per_class: int = 10
    """Images per class in each training step of the network; all of them if a class has fewer."""
    batch_real: int = 5000
    """Number of real images on which the loss of the trained network is computed."""
    optim: Optim = Optim(kind="adam", lr=1e-3, momentum=0.9)
    """Optimiser of the images (latents)."""
    optim_labels: Optim = Optim(kind="adam", lr=1e-3, momentum=0.9)
    """Optimiser of learned labels."""
    clip: float | None = 2.0
    """Largest gradient norm of the images, as a multiple of its running mean; unset: no limit."""
    clip_decay: float = 0.9
    """Decay of the running mean of the gradient norm that ``clip`` refers to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("inner_steps", "same_burn_in", "lr", "batch_per_class", "batch_real")
        if isinstance(self.adjoint, Tesla | Higher):
            raise ValueError(
                f"method.adjoint {self.adjoint.name} does not fit the network's optimiser, Adam; give "
                f"{spelt('method.adjoint', 'exact')}"
            )
        if not 0 <= self.clip_decay < 1:
            raise ValueError(f"method.clip_decay must lie in [0, 1), got {self.clip_decay}; a usual value is 0.9")

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        batch = num_classes * min(self.batch_per_class, images_per_class)
        return self.num_steps * (self.batch_real + 2.5 * self.inner_steps * batch)

    def training(self, task: Task) -> Training:
        batch = self.batch_per_class * task.num_classes
        return Training(
            num_epochs=1000, batch_size=batch, optimiser="adam", lr=self.lr, weight_decay=0.0, schedule=Schedule()
        )

    def init(self, ctx: Context) -> RaTState:
        images, labels = ctx.initial(self.start)
        if self.start == "noise" and ctx.first_images is None:
            images = images / images.flatten(1).norm(dim=1).view(-1, *[1] * (images.ndim - 1))
        syn = ctx.new_set(images, labels)
        norm = torch.zeros((), dtype=dtype_of_numbers(ctx.task.device), device=ctx.task.device)
        return RaTState(syn=syn, optimisers=self.optimisers(syn), norm=norm)

    @abstractmethod
    def burn_in(self, ctx: Context, state: Any, step: int) -> int:
        """The number of training steps before those that are differentiated."""

    @abstractmethod
    def differentiated(self, ctx: Context, state: Any, step: int) -> tuple[int, Adjoint]:
        """The number of training steps that are differentiated, and how."""

    def outcome(self, ctx: Context, state: RaTState, step: int) -> tuple[Tensor, Tensor]:
        """The logits (N, C) that the trained network gives to real images, and their classes (N,)."""
        task, burn_in = ctx.task, ctx.kept("burn-in", state, lambda: BurnIn(self, ctx, state))
        start = from_host(step, "start", lambda step: burn_in(step, self.burn_in(ctx, state, step)))
        first, theta, adam, buffers = start
        if isinstance(step, int):
            first = self.burn_in(ctx, state, step)
        window, adjoint = self.differentiated(ctx, state, step)
        batches = self.batches(ctx, state, step, window, first)
        theta = self.train(ctx, theta, batches, rule=Adam(), lr=self.lr, adjoint=adjoint, state=adam)
        images, labels = task.train.sample(self.batch_real, ctx.rng("real", step))
        drawn = self.drawn(ctx, len(images), step, "real")
        return self.real_logits(ctx, theta, buffers, task.augment.apply(images, drawn)), labels

    def batches(self, ctx: Context, state: RaTState, step: int, num_steps: int, first: int = 0) -> list[Minibatch]:
        """The minibatches of ``num_steps`` training steps of the network, from the step ``first`` on."""
        data = state.syn()
        return [self.minibatch(ctx, state, data, step, first + n) for n in range(num_steps)]

    def minibatch(self, ctx: Context, state: RaTState, data: tuple[Tensor, Tensor], step: int, n: int) -> Minibatch:
        """The minibatch of the n-th training step of the network; ``data`` are the images and targets of the set."""
        members = class_members(ctx, state)
        index = draw_per_class(members, self.batch_per_class, ctx.rng("minibatches", step, n))
        drawn = self.drawn(ctx, len(index) * ctx.task.augment.copies, step, n)
        (batch,) = self.masked(ctx, [Minibatch(*data, index.to(data[0].device), drawn)], step, first=n)
        return batch

    def drawn(self, ctx: Context, num: int, step: int, unit: int | str) -> Drawn:
        """Draw the augmentation parameters of ``num`` images."""
        return ctx.task.augment.sample(ctx.rng("augment", step, unit), num, ctx.task.input_shape, siamese=False)

    def update(self, state: Any, record: dict[str, Value]) -> None:
        """Clip the gradient and step the optimisers. As published, the running mean includes the norm it bounds."""
        norm = record["grad_latents"]
        mean = self.clip_decay * state.norm + (1 - self.clip_decay) * norm
        state.norm = torch.where(state.norm == 0, norm, mean)
        if self.clip is not None:
            clip_grad(state.syn.latents, norm, self.clip * state.norm)
        for optimiser in state.optimisers.values():
            optimiser.step()


@final
@dataclass(frozen=True, kw_only=True)
class RaTBPTT(WindowedBPTT):
    """Back-propagates through a window of training steps at a random position."""

    adjoint: Adjoint = RandomTruncated()
    """How to differentiate through the training steps of the network."""
    inner_steps: int = 200
    """Number of training steps of the network, if the adjoint does not determine it."""

    def graphs(self, ctx: Context) -> bool:
        """The host draws the burn-in, which is not part of what is captured."""
        return not self.mask and (self.adjoint.captures or isinstance(self.adjoint, RandomTruncated))

    def loss(self, ctx: Context, state: RaTState, step: int, part: int) -> Tensor:
        return ctx.objective.loss(*self.outcome(ctx, state, step))

    def burn_in(self, ctx: Context, state: RaTState, step: int) -> int:
        adjoint = self.adjoint.resolve(ctx.rng("adjoint", step // self.same_burn_in))
        if not isinstance(adjoint, Truncated):
            return 0
        return max(self.inner_steps - adjoint.window, 0) if adjoint.burn_in is None else adjoint.burn_in

    def differentiated(self, ctx: Context, state: RaTState, step: int) -> tuple[int, Adjoint]:
        match self.adjoint:
            case Truncated(burn_in=None):
                return min(self.adjoint.window, self.inner_steps), Exact()
            case Truncated() | RandomTruncated():
                return self.adjoint.window, Exact()
        return self.inner_steps, self.adjoint.resolve(ctx.rng("adjoint", step // self.same_burn_in))


class BurnIn:
    """Trains a fresh network on the set without a graph, on tensors that stay in place, so that its step can be
    captured."""

    def __init__(self, method: WindowedBPTT, ctx: Context, state: RaTState) -> None:
        self._method, self._ctx, self._state = method, ctx, state
        self._step: Any = 0
        self._data, self._point, self._buffers = self._fresh(0)
        self._begin = ctx.graphed("fresh network", state, self._restart)
        self._advance = ctx.graphed("burn-in", state, self._train)

    def __call__(self, step: int, num_steps: int) -> tuple[Tensor, Params, AdamState, Params]:
        """Return ``num_steps``, and the weights, the state of Adam and the buffers of the network of a step after so
        many training steps."""
        self._begin(step)
        for n in range(num_steps):
            self._advance(n)
        return torch.tensor(num_steps), *self._point, self._buffers

    @torch.no_grad()
    def _fresh(self, step: Any) -> tuple[tuple[Tensor, Tensor], tuple[Params, AdamState], Params]:
        theta, buffers = self._ctx.task.network.init(self._ctx.rng, "network", step)
        syn = self._state.syn
        with syn.decoding(None):
            return syn(), (theta, Adam().init(theta)), buffers

    def _restart(self, step: Any) -> None:
        self._step = step  # if it is a tensor, it stays in place
        copy_into((self._data, self._point, self._buffers), self._fresh(step))

    def _train(self, n: Any) -> None:
        method, ctx = self._method, self._ctx
        end = advance(
            ctx.loss_fn,
            self._point,
            [method.minibatch(ctx, self._state, self._data, self._step, n)],
            prepare=partial(prepared, ctx.task.augment),
            rule=Adam(),
            lr=method.lr,
            compile=bool(ctx.compute.compile),
        )
        copy_into(self._point, end)
