"""SelMatch: real images of a chosen difficulty, of which some are learned by matching training trajectories.

Lee and Chung, "SelMatch: effectively scaling up dataset distillation via selection-based initialization and partial
updates by trajectory matching", ICML 2024.

The n images of a class in the set are a window of the real ones, which are ordered from the hardest, x_1, to the
easiest. It begins after the s = beta n hardest ones. The m = alpha n easiest images of the window are learned, and the
others stay as they are:

    S = F + L,    F = {x_{s+1} .. x_{s+n-m}},    L begins as {x_{s+n-m+1} .. x_{s+n}}
    min_{L, lr}  E_{t, theta*}  || theta_N - theta*_{t+M} ||^2 / || theta*_t - theta*_{t+M} ||^2

The student theta is trained on all of S; see ``condense.methods.mtt`` for the objective and its symbols.

    symbol   code                             symbol   code
    alpha    ``share``                        n        ``ctx.images_per_class``
    beta     ``window``                       m        ``num_learned``

Deviations: see docs/methods/selmatch.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from condense.method import Context, GradientState, Optim
from condense.methods.mtt import TrajectoryMatching
from condense.methods.selection import EL2N, Forgetting, ScoreSelection, highest
from condense.methods.unrolled import Minibatch
from condense.names import spelt
from condense.objective import ObjectiveName
from condense.schedule import Schedule
from condense.synthetic.decode import Decode
from condense.synthetic.labels import Labels
from condense.task import Task
from condense.train import Training


@final
@dataclass(frozen=True, kw_only=True)
class SelMatch(TrajectoryMatching):
    """Starts from real images of a chosen difficulty, and learns a part of them by matching trajectories."""

    num_steps: int = 10000
    """Number of updates of the images."""
    share: float = 0.5
    """Share of the images of each class that is learned, at least one image; the others stay real ones."""
    window: float = 0.5
    """Number of the hardest images of each class that are left out, as a multiple of the number of its images in the
    set."""
    score: Literal["forgetting", "el2n"] = "forgetting"
    """Difficulty of an image: forgetting (how often a network forgets it) or el2n (the mean error of three networks
    early in training)."""
    num_epochs: int = 20
    """Number of training epochs of the networks that give the scores; el2n needs fewer, such as 5."""
    start: Literal["real", "noise"] = "real"
    """What the learned images begin as: the easiest ones of the window, or standard normal noise."""
    syn_steps: int = 55
    """Number of training steps of the student on the set."""
    batch_syn: int | None = 125
    """Batch size of the student; unset: the whole set."""
    max_start_epoch: int = 80
    """Number of start epochs: the student starts from an expert's snapshot of epoch 0 to ``max_start_epoch`` - 1."""
    lr: float = 0.001
    """Initial learning rate of the student; it is learned."""
    optim: Optim = Optim(lr=1000.0)
    """Optimiser of the learned images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"method.share must lie in (0, 1], got {self.share}; {self._usual('share')}")
        self.require_at_least(0, "window")
        self._scored()

    def _scored(self) -> ScoreSelection:
        return EL2N(num_epochs=self.num_epochs) if self.score == "el2n" else Forgetting(num_epochs=self.num_epochs)

    def incompatibility(
        self, decode: Decode, labels: Labels, transform: str, objective: ObjectiveName = "cross-entropy"
    ) -> str | None:
        if decode.name != "pixels":
            return f"keeps some real images as they are, and {decode.name} does not; give {spelt('decode', 'pixels')}"
        return super().incompatibility(decode, labels, transform, objective)

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        work = self._scored().estimated_work(num_images, num_classes, images_per_class)
        return work + super().estimated_work(num_images, num_classes, images_per_class)

    def training(self, task: Task) -> Training:
        return Training(num_epochs=500, batch_size=128, schedule=Schedule(cosine_to=0.01))

    def num_learned(self, num_images: int) -> int:
        """Return how many of the images of a class are learned."""
        return max(1, round(self.share * num_images))

    def learned(self, ctx: Context) -> Tensor:
        """Return which images of the set are learned, (N,), the last ones of each class."""
        num = ctx.images_per_class
        of_a_class = torch.arange(num, device=ctx.task.device) >= num - self.num_learned(num)
        return of_a_class.repeat(ctx.task.num_classes)

    def init(self, ctx: Context) -> GradientState:
        images = self.selected(ctx)
        if self.start == "noise":
            learned = self.learned(ctx)
            images[learned] = ctx.initial("noise")[0][learned]
        syn = ctx.new_set(images, ctx.classes, lr=self.lr)
        return GradientState(syn=syn, optimisers=self.optimisers(syn))

    def selected(self, ctx: Context) -> Tensor:
        """Return the images of the windows (N, *input_shape), those of each class from the hardest to the easiest.

        Raises:
            ValueError: a class has too few images.
        """
        train, num = ctx.task.train, ctx.images_per_class
        first = round(self.window * num)
        for c, members in enumerate(train.by_class):
            if len(members) < first + num:
                raise ValueError(
                    f"class {ctx.task.classes[c]!r} has {len(members)} training images, but the window ends at image "
                    f"{first + num}; give {spelt('ipc', max(1, int(len(members) / (1 + self.window))))} or less, or "
                    f"a smaller {spelt('method.window')}"
                )
        scores = self._scored().scores(ctx).cpu()
        index = [members[highest(scores[members.cpu()], first + num)[first:]] for members in train.by_class]
        return train.images[torch.cat(index)]

    def batches(self, ctx: Context, images: Tensor, targets: Tensor, step: int, part: int) -> list[Minibatch]:
        learned = self.learned(ctx).view(-1, *[1] * (images.dim() - 1))
        return super().batches(ctx, torch.where(learned, images, images.detach()), targets, step, part)
