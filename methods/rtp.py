"""RTP: Deng and Russakovsky, "Remember the past: distilling datasets into addressable memories for neural networks",
NeurIPS 2022.

    min_S  E_{theta_0, C'}  l(R_{C'}; theta_N)
    v_{n+1} = m v_n + grad l(A(b_n); theta_n),    theta_{n+1} = theta_n - lr v_{n+1}

The gradient is back-propagated through all N steps of training with momentum. With the decoder ``bases`` an image is a
combination of basis images that all classes share.

    symbol   code
    N        ``inner_steps``
    m        ``momentum``
    C'       the classes of an update: all, or ``ways`` of them at random
    b_n      ``batch_per_class`` images of each of these classes, drawn for each step
    A        ``task.augment``; its parameters are drawn once for all steps of an update
    R_{C'}   ``batch_real`` real images of each of these classes

Deviations: see docs/methods/rtp.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from condense.inner import SGD, Tesla
from condense.method import Context, GradientState
from condense.methods.bilevel import Bilevel, class_members, draw_per_class
from condense.methods.unrolled import Minibatch
from condense.names import spelt
from condense.schedule import Schedule
from condense.task import Task
from condense.train import Training


@final
@dataclass(frozen=True, kw_only=True)
class RTP(Bilevel):
    """Back-propagates through all steps of training with momentum."""

    num_steps: int = 500000
    """Number of updates of the images."""
    start: Literal["real", "noise"] = "noise"
    """Initial images: real ones drawn per class, or standard normal noise. Some decoders ignore them."""
    inner_steps: int = 150
    """Number of training steps of the network."""
    lr: float = 0.01
    """Learning rate of SGD, which trains the network."""
    momentum: float = 0.9
    """Momentum of SGD, which trains the network."""
    batch_per_class: int = 10
    """Images per class in each training step of the network; all of them if a class has fewer."""
    ways: int | None = None
    """Number of classes that take part in an update, drawn at random; unset, or more than there are: all classes."""
    batch_real: int = 64
    """Number of real images per class on which the loss of the trained network is computed."""
    clip: float | None = 2.0
    """Largest gradient norm of the images; larger gradients are scaled down. Unset: no limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("inner_steps", "lr", "batch_per_class", "batch_real")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"method.momentum must lie in [0, 1), got {self.momentum}; a usual value is 0.9")
        if isinstance(self.adjoint, Tesla) and self.momentum:
            raise ValueError(
                f"method.adjoint tesla needs plain SGD; give {spelt('method.momentum', 0)}, or "
                f"{spelt('method.adjoint', 'exact')}"
            )
        if self.ways is not None and self.ways < 2:
            raise ValueError(f"method.ways must be at least 2, got {self.ways}: one class cannot be classified; give 2")

    def training_steps(self) -> int:
        return self.inner_steps

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        batch = num_classes * min(self.batch_per_class, images_per_class)
        return self.num_steps * (4 * self.inner_steps * batch + num_classes * self.batch_real)

    def training(self, task: Task) -> Training:
        batch = self.batch_per_class * task.num_classes
        return Training(
            num_epochs=300, batch_size=batch, lr=self.lr, momentum=self.momentum, weight_decay=0.0, schedule=Schedule()
        )

    def init(self, ctx: Context) -> GradientState:
        syn = ctx.new_set(*ctx.initial(self.start))
        return GradientState(syn=syn, optimisers=self.optimisers(syn))

    def graphs(self, ctx: Context) -> bool:
        """The classes of a step, if they are drawn, decide what is computed."""
        return self.ways is None and self.adjoint.captures

    def loss(self, ctx: Context, state: GradientState, step: int, part: int) -> Tensor:
        task, classes = ctx.task, self.classes(ctx, step)
        theta, buffers = task.network.init(ctx.rng, "network", step)
        batches = self.batches(ctx, state, step, classes)
        adjoint = self.adjoint.resolve(ctx.rng("adjoint", step))
        theta = self.train(ctx, theta, batches, rule=SGD(momentum=self.momentum), lr=self.lr, adjoint=adjoint)
        drawn = [task.train.draw(c, self.batch_real, ctx.rng("real", step, c)) for c in classes]
        labels = torch.cat([torch.full((len(x),), c, device=x.device) for c, x in zip(classes, drawn, strict=True)])
        return self.real_loss(ctx, theta, buffers, torch.cat(drawn), labels)

    def classes(self, ctx: Context, step: int) -> list[int]:
        """The classes that take part in a step, ascending."""
        if self.ways is None:
            return list(range(ctx.task.num_classes))
        return sorted(ctx.rng("task", step).subset(ctx.task.num_classes, self.ways).tolist())

    def batches(self, ctx: Context, state: GradientState, step: int, classes: list[int]) -> list[Minibatch]:
        """The minibatches of the network's training steps; all share one draw of the augmentation."""
        images, targets = state.syn()
        members = [class_members(ctx, state)[c] for c in classes]
        size = sum(min(self.batch_per_class, len(index)) for index in members) * ctx.task.augment.copies
        drawn = ctx.task.augment.sample(ctx.rng("augment", step), size, ctx.task.input_shape, siamese=False)
        indices = (
            draw_per_class(members, self.batch_per_class, ctx.rng("minibatches", step, n)).to(images.device)
            for n in range(self.inner_steps)
        )
        return self.masked(ctx, [Minibatch(images, targets, index, drawn) for index in indices], step)
