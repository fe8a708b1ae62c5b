"""DD: Wang, Zhu, Torralba and Efros, "Dataset distillation", 2018, algorithm 1.

    min_{S, eta}  E_theta_0  l(R; theta_T),    theta_{t+1} = theta_t - eta_t grad l(S_t; theta_t)

    symbol   code
    S_t      batch t of the decoded set in its stored order, ``images_per_step`` images of every class, augmented as the
             recipe says; each of ``inner_epochs`` goes through the batches in this order
    eta_t    ``state.syn.lr`` (T,), one for each step of all epochs, learned as its logarithm; initially ``lr``
    theta_0  ``num_networks`` networks, fresh at every step or always the same ones: ``networks``
    R        ``batch_real`` real images

Deviations: see docs/methods/dd.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, final

import torch
from torch import Tensor

from condense.inner import SGD
from condense.method import Context, GradientState, Optim
from condense.methods.bilevel import Bilevel
from condense.methods.unrolled import Minibatch
from condense.names import spelt
from condense.schedule import Schedule
from condense.task import Task
from condense.train import Training

TENTHS = Schedule(drop_at=tuple(k / 10 for k in range(1, 10)), drop_factor=0.5)
"""The learning rate is halved after each tenth of the run."""


@final
@dataclass(frozen=True, kw_only=True)
class DD(Bilevel):
    """Learns a few batches in a fixed order and a learning rate for each training step on them."""

    num_steps: int = 23600
    """Number of updates of the images."""
    start: Literal["real", "noise"] = "noise"
    """Initial images: real ones drawn per class, or standard normal noise."""
    images_per_step: int = 1
    """Images per class in each training step of the network."""
    inner_epochs: int = 3
    """Number of passes of the network over the set; each has learning rates of its own."""
    lr: float = 0.02
    """Initial learning rate of every training step of the network; the learning rates are learned."""
    networks: Literal["random", "fixed"] = "random"
    """random: fresh networks at every update. fixed: the same networks at every update; the set fits only these."""
    num_networks: int = 1
    """Number of networks trained per update; the loss is their mean."""
    batch_real: int = 1024
    """Number of real images on which the loss of a trained network is computed."""
    optim: Optim = Optim(kind="adam", lr=0.01, momentum=0.5, schedule=TENTHS)
    """Optimiser of the images (latents)."""
    optim_lr: Optim = Optim(kind="adam", lr=0.01, momentum=0.5, schedule=TENTHS)
    """Optimiser of the logarithms of the network's learning rates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("images_per_step", "inner_epochs", "lr", "num_networks", "batch_real")

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        inner = 4 * self.inner_epochs * num_classes * images_per_class
        return self.num_steps * self.num_networks * (inner + self.batch_real)

    def training(self, task: Task) -> Training:
        """Training on the stored batches in their order."""
        return Training(
            num_epochs=self.inner_epochs,
            batch_size=self.images_per_step * task.num_classes,
            lr=self.lr,
            momentum=0.0,
            weight_decay=0.0,
            schedule=Schedule(),
            order="stored",
        )

    def init(self, ctx: Context) -> GradientState:
        if ctx.images_per_class % self.images_per_step:
            raise ValueError(
                f"{ctx.images_per_class} images per class cannot be divided into batches of {self.images_per_step} per "
                f"class; give {spelt('method.images_per_step', 1)}"
            )
        num_steps = self.inner_epochs * (ctx.images_per_class // self.images_per_step)
        if (reason := self.why_no_room(num_steps)) is not None:
            raise ValueError(f"dd {reason}")
        syn = ctx.new_set(*ctx.initial(self.start), lr=torch.full((num_steps,), self.lr), interleave=True)
        return GradientState(syn=syn, optimisers=self.optimisers(syn))

    def parts(self, ctx: Context) -> Sequence[int]:
        return range(self.num_networks)

    def graphs(self, ctx: Context) -> bool:
        return self.networks == "random" and self.adjoint.captures

    def loss(self, ctx: Context, state: GradientState, step: int, part: int) -> Tensor:
        theta, buffers = ctx.task.network.init(ctx.rng, "network", step if self.networks == "random" else 0, part)
        batches, adjoint = self.batches(ctx, state, step, part), self.adjoint.resolve(ctx.rng("adjoint", step, part))
        theta = self.train(ctx, theta, batches, rule=SGD(), lr=cast(Tensor, state.syn.lr), adjoint=adjoint)
        real = ctx.task.train.sample(self.batch_real, ctx.rng("real", step, part))
        return self.real_loss(ctx, theta, buffers, *real) / self.num_networks

    def batches(self, ctx: Context, state: GradientState, step: int, part: int) -> list[Minibatch]:
        """The batches of the set in their stored order, repeated for each epoch."""
        task, (images, targets) = ctx.task, state.syn()
        size = self.images_per_step * task.num_classes
        indices = torch.arange(len(images), device=images.device).split(size) * self.inner_epochs
        rngs = (ctx.rng("augment", step, f"{part}/{t}") for t in range(len(indices)))
        draws = (task.augment.sample(rng, size * task.augment.copies, task.input_shape, siamese=False) for rng in rngs)
        batches = [Minibatch(images, targets, index, drawn) for index, drawn in zip(indices, draws, strict=True)]
        return self.masked(ctx, batches, step, part)
