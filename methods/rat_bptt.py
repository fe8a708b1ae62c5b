"""RaT-BPTT: Feng, Vedantam and Kempe, "Embarrassingly simple dataset distillation", ICLR 2024.

    min_S  E_{theta_0, k}  l(A(R); theta_{k+W}),    theta_{n+1} = Adam(theta_n, grad l(A(b_n); theta_n))

The gradient is back-propagated through the last W steps only, which follow a random number k of steps.

    symbol   code
    k, W     ``adjoint``: burn-in from ``lo`` to ``hi``, and ``window``; k is redrawn every ``same_burn_in`` updates
    b_n      ``batch_per_class`` images of every class, drawn for each step
    A        ``task.augment``, drawn for every image of every step and for every real image
    R        ``batch_real`` real images
    clip     the gradient of the images is clipped to ``clip`` times a running mean of its norm (decay ``clip_decay``)

Deviations: see docs/methods/rat-bptt.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from condense.augment import Params
from condense.inner import Adam, Adjoint, RandomTruncated, Truncated
from condense.method import Context, GradientState, Optim, Value, clip_grad, dtype_of_numbers
from condense.methods.bilevel import Bilevel, class_members, draw_per_class
from condense.methods.unrolled import Minibatch
from condense.schedule import Schedule
from condense.task import Task
from condense.train import Training


@dataclass(kw_only=True)
class RaTState(GradientState):
    norm: Tensor
    """Running mean of the gradient norm of the images; 0 before the first update."""


@final
@dataclass(frozen=True, kw_only=True)
class RaTBPTT(Bilevel):
    """Back-propagates through a window of training steps at a random position."""

    num_steps: int = 600000
    """Number of updates of the images."""
    adjoint: Adjoint = RandomTruncated()
    """How to differentiate through the training steps of the network."""
    inner_steps: int = 200
    """Number of training steps of the network, if the adjoint does not determine it."""
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
        images, labels = ctx.initial("noise")
        rows = images.flatten(1)
        syn = ctx.new_set((rows / rows.norm(dim=1, keepdim=True)).view_as(images), labels)
        norm = torch.zeros((), dtype=dtype_of_numbers(ctx.task.device), device=ctx.task.device)
        return RaTState(syn=syn, optimisers=self.optimisers(syn), norm=norm)

    def loss(self, ctx: Context, state: RaTState, step: int, part: int) -> Tensor:
        task = ctx.task
        adjoint = self.adjoint.resolve(ctx.rng("adjoint", step // self.same_burn_in))
        num_steps = self.inner_steps
        if isinstance(adjoint, Truncated) and adjoint.burn_in is not None:
            num_steps = adjoint.burn_in + adjoint.window
        theta, buffers = task.network.init(ctx.rng, "network", step)
        batches = self.batches(ctx, state, step, num_steps)
        theta = self.train(ctx, theta, batches, rule=Adam(), lr=self.lr, adjoint=adjoint)
        images, labels = task.train.sample(self.batch_real, ctx.rng("real", step))
        drawn = self.drawn(ctx, len(images), step, "real")
        return self.real_loss(ctx, theta, buffers, task.augment.apply(images, drawn), labels)

    def batches(self, ctx: Context, state: RaTState, step: int, num_steps: int) -> list[Minibatch]:
        """The minibatches of the network's training steps."""
        images, targets = state.syn()
        members = class_members(state.syn, len(images), range(ctx.task.num_classes))
        batches = []
        for n in range(num_steps):
            index = draw_per_class(members, self.batch_per_class, ctx.rng("minibatches", step, n))
            drawn = self.drawn(ctx, len(index) * ctx.task.augment.copies, step, n)
            batches.append(Minibatch(images, targets, index.to(images.device), drawn))
        return self.masked(ctx, batches, step)

    def drawn(self, ctx: Context, num: int, step: int, unit: int | str) -> Params:
        """Draw the augmentation parameters of ``num`` images."""
        return ctx.task.augment.sample(ctx.rng("augment", step, unit), num, ctx.task.input_shape, siamese=False)

    def update(self, state: RaTState, record: dict[str, Value]) -> None:
        """Clip the gradient and step the optimisers. As published, the running mean includes the norm it bounds."""
        norm = record["grad_latents"]
        mean = self.clip_decay * state.norm + (1 - self.clip_decay) * norm
        state.norm = torch.where(state.norm == 0, norm, mean)
        if self.clip is not None:
            clip_grad(state.syn.latents, norm, self.clip * state.norm)
        for optimiser in state.optimisers.values():
            optimiser.step()
