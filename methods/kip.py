"""KIP: kernel inducing points, and Label Solve.

Nguyen, Chen and Lee, "Dataset Meta-Learning from Kernel Ridge-Regression", ICLR 2021. Nguyen, Novak, Xiao and Lee,
"Dataset Distillation with Infinitely Wide Convolutional Networks", NeurIPS 2021.

    min_(X_s, y_s)  1/2 mean | K_ts (K_ss + lambda tr(K_ss)/n I)^-1 y_s - y_t |^2

K is the kernel of an infinitely wide network. The objective is the error on real images of that network after training
to convergence on the synthetic images. No weights are drawn and no training is unrolled.

    symbol    code
    X_s, y_s  ``support``: the images of ``state.syn`` and their centred targets
    X_t, y_t  ``batch_real`` real images, equally many of every class, and their centred one-hot vectors
    K         ``kernel`` of a fully connected ReLU network with ``depth`` hidden layers
    lambda    ``ridge``

Label Solve keeps the images and computes the y_s that minimise the same objective over all real images.

Deviations: see docs/methods/kip.md.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from condense.data.images import Images
from condense.kernels import centred, fully_connected, regression, regression_targets
from condense.method import Context, GradientMethod, GradientState, Optim, Value
from condense.names import spelt
from condense.objective import ObjectiveName
from condense.schedule import Schedule
from condense.synthetic.decode import Decode
from condense.synthetic.labels import Labels
from condense.synthetic.set import SyntheticSet
from condense.task import Task
from condense.train import Training

CHUNK = 5000
"""Number of real images whose kernel with the support is computed at a time, where all real images take part."""

VAL_EVERY = 10
"""Steps between two measurements of the accuracy of the regression on the validation images."""


@final
@dataclass(frozen=True, kw_only=True)
class KIP(GradientMethod):
    """Kernel ridge regression with the kernel of an infinitely wide network."""

    family: ClassVar[str] = "kernel"
    regresses: ClassVar[bool] = True

    num_steps: int = 1000
    """Number of updates of the images."""
    optim: Optim = Optim(kind="adam", lr=0.04, momentum=0.9)
    """Optimiser of the images (latents)."""
    optim_labels: Optim = Optim(kind="adam", lr=0.04, momentum=0.9)
    """Optimiser of learned labels."""
    start: Literal["real", "noise"] = "real"
    """Initial images: real ones drawn per class, or standard normal noise."""
    kernel: Literal["ntk", "nngp"] = "ntk"
    """Kernel of the infinitely wide network: ntk (all of its layers are trained) or nngp (only the last layer is)."""
    depth: int = 1
    """Number of hidden layers of the infinitely wide network."""
    w_std: float = math.sqrt(2)
    """Standard deviation of the weights of the infinitely wide network, before division by the root of the fan-in."""
    b_std: float = 0.1
    """Standard deviation of the biases of the infinitely wide network."""
    ridge: float = 1e-6
    """Ridge of the regression, relative to the mean of the kernel's diagonal."""
    batch_real: int = 5000
    """Number of real images per step, equally many of every class; all of a class if it has fewer."""
    solve_labels: bool = False
    """Label Solve: store the targets that fit all real images best (in closed form); needs the labels ``targets``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(0, "depth", "b_std")
        self.require_at_least(1, "batch_real")
        self.require_positive("w_std", "ridge")

    def incompatibility(
        self, decode: Decode, labels: Labels, transform: str, objective: ObjectiveName = "cross-entropy"
    ) -> str | None:
        if self.solve_labels and labels.name != "targets":
            return f"cannot store solved targets in {labels.name} labels; give {spelt('labels', 'targets')}"
        return super().incompatibility(decode, labels, transform, objective)

    def training(self, task: Task) -> Training:
        return Training(num_epochs=1000, batch_size=100, lr=0.01, weight_decay=1e-3, schedule=Schedule(), loss="mse")

    def init(self, ctx: Context) -> GradientState:
        syn = ctx.new_set(*ctx.initial(self.start))
        return GradientState(syn=syn, optimisers=self.optimisers(syn))

    def loss(self, ctx: Context, state: GradientState, step: int, part: int) -> Tensor:
        train, classes = ctx.task.train, ctx.task.num_classes
        each = max(1, self.batch_real // classes)
        drawn = [train.draw(c, each, ctx.rng("real", step, c)) for c in range(classes)]
        labels = torch.arange(classes).repeat_interleave(torch.tensor([len(x) for x in drawn]))
        wanted = centred(labels.to(ctx.task.device), classes)
        images, targets = state.syn()
        images, targets = support(ctx, images, targets, step)
        predicted = self._regression(torch.cat(drawn), images, regression_targets(targets, ctx.labels.space, classes))
        return 0.5 * (predicted - wanted).square().mean()

    def after(self, ctx: Context, state: GradientState, step: int) -> Mapping[str, Value]:
        """Every ``VAL_EVERY`` steps and at the end, log the accuracy of the regression on the validation images."""
        val = ctx.task.val
        if val is None or ((step + 1) % VAL_EVERY and step + 1 < self.num_steps):
            return {}
        scores = self.predict(ctx, self.finalize(ctx, state, step + 1), val.images)
        return {"val_regression": (scores.argmax(1) == val.labels).double().mean()}

    @torch.no_grad()
    def predict(self, ctx: Context, syn: SyntheticSet, images: Tensor | Images) -> Tensor:
        """Outputs (N, num_classes) of the infinitely wide network, trained on the set, for ``images`` (N, C, H, W)."""
        own, targets = ctx.task.augment.mirrored(*syn())
        y = regression_targets(targets, syn.label_kind.space, ctx.task.num_classes)
        return torch.cat([self._regression(chunk, own, y) for chunk in images.split(CHUNK)])

    def finalize(self, ctx: Context, state: GradientState, steps: int) -> SyntheticSet:
        syn = super().finalize(ctx, state, steps)
        if not self.solve_labels:
            return syn
        solved = copy.deepcopy(syn)
        with torch.no_grad():
            (values,) = solved.leaves()["labels"]
            values.copy_(self._solved(ctx, solved))
        return solved

    def _solved(self, ctx: Context, syn: SyntheticSet) -> Tensor:
        """Solve for the targets (N, num_classes) of the latents by least squares in float64.

        All images that are decoded from a latent share its target: ``owners`` @ targets are the targets of the images.
        Equal images share the weight, by the solution of least norm, which torch finds on a CPU only.
        """
        train, classes = ctx.task.train, ctx.task.num_classes
        images, _ = syn()
        owners = torch.eye(len(syn), dtype=torch.float64, device=images.device).repeat(len(images) // len(syn), 1)
        images, owners = ctx.task.augment.mirrored(images, owners)
        chunks = [self._regression(chunk, images, owners) for chunk in train.images.split(CHUNK)]
        wanted = centred(train.labels, classes)
        return torch.linalg.lstsq(torch.cat(chunks).cpu(), wanted.cpu()).solution.to(images.device)

    def _regression(self, real: Tensor, images: Tensor, y: Tensor) -> Tensor:
        """Predictions for ``real`` of the regression that is fitted to ``images`` and ``y``, in float64."""
        images = images.double()
        return regression(self._kernel(real.double(), images), self._kernel(images), y, self.ridge)

    def _kernel(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        kernels = fully_connected(a, b, depth=self.depth, w_std=self.w_std, b_std=self.b_std)
        return kernels.ntk if self.kernel == "ntk" else kernels.nngp


def support(ctx: Context, images: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """The support of the regression in a step: the decoded set, mirrored and augmented with one draw per image."""
    augment = ctx.task.augment
    images, targets = augment.mirrored(images, targets)
    drawn = augment.sample(ctx.rng("augment", step), len(images), ctx.task.input_shape, siamese=False)
    return augment.apply(images, drawn), targets
