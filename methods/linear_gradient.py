"""Linear gradient matching: Cazenavette, Torralba and Sitzmann, "Dataset Distillation for Pre-Trained Self-Supervised
Vision Models", NeurIPS 2025.

    min_p  E_W  1 - cos( grad_W CE(W phi(A(x)), y), grad_W CE(W phi(A(s)), c) ),    s = decoder(p)

phi is a trained network, the backbone, which never changes. Each step draws a linear classifier W of its features and
compares the gradients that real images x of all classes and several views of the synthetic images s give it. With n
views, classes c as one-hot vectors e_c and z = phi(A(s)), the gradient is known, so the loss is differentiated once:

    grad_W CE = sum_i (softmax(W z_i) - e_{c_i}) (z_i, 1)^T / n

The parameters p are the levels of a pyramid of images (decoder ``pyramid``). A run begins with the smallest level and
adds the next one after every ``grow_every`` steps. The set holds the rendered images.

    symbol  code                                      symbol  code
    phi     ``opened_backbone``, in evaluation mode   p       ``state.syn.latents``, the levels ``visible`` in the step
    W       ``head``, with a bias of 0                s       ``state.syn.decoder`` of these
    x, y    as many real images as there are views    A       ``view``: the recipe's augmentation, then noise

Deviations: see docs/methods/linear-gradient.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from condense.artifacts import ArtifactSpec
from condense.data.layout import Kind
from condense.method import Context, GradientMethod, GradientState, Optim
from condense.names import spelt
from condense.objective import ObjectiveName
from condense.synthetic.decode import Decode, Pixels, Pyramid
from condense.synthetic.labels import Labels
from condense.synthetic.set import SyntheticSet
from condense.task import Task
from condense.teachers import OWN, TrainedBy, needed_backbone, opened_backbone, require_one_backbone
from condense.train import Training


@final
@dataclass(frozen=True, kw_only=True)
class LinearGradient(GradientMethod):
    """Matches the gradients of random linear classifiers on the features of a frozen network."""

    family: ClassVar[str] = "gradient matching"
    learns_labels: ClassVar[bool] = False
    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    num_steps: int = 5000
    """Number of updates of the pyramids."""
    optim: Optim = Optim(kind="adam", lr=2e-3, momentum=0.9)
    """Optimiser of the levels of the pyramids; a new one when a level is added."""
    teachers: tuple[str, ...] = (OWN,)
    """The network whose features are used, the backbone; same is the network of the recipe."""
    trained_by: TrainedBy = "barlow-twins"
    """Objective of the backbone; any accepts networks that were trained with labels or imported, too."""
    views: int = 10
    """Number of views of each synthetic image in a step; as many real images are drawn."""
    head_std: float = 0.01
    """Standard deviation of the weights of the linear classifiers."""
    noise: float = 0.2
    """Standard deviation of the noise that is added to half of the views, where pixels are from 0 to 1."""
    grow_every: int = 200
    """Number of steps after which the next level of the pyramid is added."""
    coarsest: int = 1
    """Largest side of the smallest level of the pyramid in pixels; that of the image gives a single level."""
    decorrelated: bool = True
    """Whether the channels of the pyramid are decorrelated colours."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "views", "grow_every", "coarsest")
        self.require_at_least(0, "noise")
        self.require_positive("head_std")
        require_one_backbone(self.teachers)

    def incompatibility(
        self, decode: Decode, labels: Labels, transform: str, objective: ObjectiveName = "cross-entropy"
    ) -> str | None:
        if not decode.stores_pixels or decode.expansion > 1:
            return f"stores the images of its own pyramid, not those of {decode.name}; give {spelt('decode', 'pixels')}"
        if transform not in ("none", "channel"):
            return f"learns pixels from 0 to 1, which {transform} whitens; give {spelt('transform', 'channel')}"
        if self.clamp:
            return f"has no pixels below 0 or above 1 to clamp; give {spelt('method.clamp', False)}"
        if self.ema is not None:
            return f"adds levels to its pyramid, which cannot be averaged; give {spelt('method.ema', None)}"
        return super().incompatibility(Pixels(), labels, transform, objective)

    def needs(self, task: Task) -> Mapping[str, ArtifactSpec]:
        return needed_backbone(self.teachers, self.trained_by, task)

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        return self.num_steps * self.views * num_classes * images_per_class * 4 / 3

    def training(self, task: Task) -> Training:
        return Training(num_epochs=1000)

    def init(self, ctx: Context) -> GradientState:
        pyramid, shape, device = self._pyramid, ctx.task.input_shape, ctx.task.device
        decoder = pyramid.build(shape, ctx.task.num_classes).to(device)
        pyramid.fit(decoder, ctx.task.transform)
        latents = torch.zeros(len(ctx.classes), shape[0], sum(self._counts(ctx)), device=device)
        latents[:, :, : self._counts(ctx)[0]] = self._noise(ctx, 0, 0)
        syn = SyntheticSet(latents, ctx.classes, ctx.origin, decode=pyramid, decoder=decoder)
        return GradientState(syn=syn, optimisers=self.optimisers(syn))

    def loss(self, ctx: Context, state: GradientState, step: int, part: int) -> Tensor:
        syn, network = state.syn, ctx.kept("backbone", state, lambda: opened_backbone(self.teachers, ctx))
        embed = ctx.kept("embedder", state, lambda: network.embedder(ctx.compute))
        images = syn.decoder(syn.latents[:, :, : self.visible(ctx, step)], syn.classes)
        images, targets = ctx.task.augment.mirrored(images, syn.classes)
        images, targets = images.repeat(self.views, 1, 1, 1), targets.repeat(self.views)
        real, classes = ctx.task.train.sample(len(images), ctx.rng("real", step))
        most = ctx.compute.micro_batch or max(len(images), len(real))
        head = ctx.rng("head", step).normal(ctx.task.num_classes, network.network.num_features) * self.head_std
        with torch.no_grad():
            features = torch.cat([embed(part) for part in self.view(ctx, real, "real", step).split(most)])
            wanted = head_gradient(features, classes, head.to(features))
        views = self.view(ctx, images, "syn", step).split(most)
        if len(views) == 1:
            features = embed(views[0])
        else:  # the backward pass computes the features again, one part after the other
            features = torch.cat([checkpoint(embed, part, use_reentrant=False) for part in views])
        given = head_gradient(features, targets, head.to(features))
        return 1 - F.cosine_similarity(wanted.flatten(), given.flatten(), dim=0)

    def view(self, ctx: Context, images: Tensor, name: str, step: int) -> Tensor:
        """Return a view of each image (n, *input_shape), drawn under ``name`` and the step."""
        augment, transform = ctx.task.augment, ctx.task.transform
        drawn = augment.sample(ctx.rng(f"{name} views", step), len(images), ctx.task.input_shape, siamese=False)
        images = augment.apply(images, drawn)
        if not self.noise:
            return images
        draws = ctx.rng(f"{name} noise", step)
        has_noise = draws.uniform(len(images), 1, 1, 1) < 0.5
        noise = (draws.normal(*images.shape) * has_noise * self.noise).to(images)
        return images + (transform(noise) - transform(torch.zeros_like(noise)))

    def after(self, ctx: Context, state: GradientState, step: int) -> None:
        """Add the next level of the pyramids: with k levels each is noise over k, as if all had begun together."""
        before, after = self.visible(ctx, step), self.visible(ctx, step + 1)
        if after == before or step + 1 == self.num_steps:
            return
        level, latents = self.num_levels(ctx, step), state.syn.latents.detach()
        latents *= level / (level + 1)
        latents[:, :, before:after] = self._noise(ctx, level, step + 1) / (level + 1)
        Optim.restart(state.optimisers["latents"])

    def num_levels(self, ctx: Context, step: int) -> int:
        """Return how many levels the pyramids have in a step."""
        return min(1 + step // self.grow_every, len(self._counts(ctx)))

    def visible(self, ctx: Context, step: int) -> int:
        """Return how many numbers per channel the levels of a step have."""
        return sum(self._counts(ctx)[: self.num_levels(ctx, step)])

    def finalize(self, ctx: Context, state: GradientState, steps: int) -> SyntheticSet:
        decoder = ctx.new_decoder()
        with torch.no_grad():
            images, _ = state.syn()
        latents = ctx.decode.encode(images, ctx.classes, decoder, ctx.rng.generator("decoder"))
        return SyntheticSet(latents, ctx.classes, ctx.origin, decode=ctx.decode, decoder=decoder, label_kind=ctx.labels)

    @property
    def _pyramid(self) -> Pyramid:
        return Pyramid(coarsest=self.coarsest, decorrelated=self.decorrelated)

    def _counts(self, ctx: Context) -> list[int]:
        """Return the number of pixels of each level."""
        return [math.prod(size) for size in self._pyramid.levels(ctx.task.input_shape)]

    def _noise(self, ctx: Context, level: int, step: int) -> Tensor:
        """Return standard normal values (N, C, pixels) of a level."""
        shape = len(ctx.classes), ctx.task.input_shape[0], self._counts(ctx)[level]
        return torch.randn(shape, generator=ctx.rng.generator("level", step, level)).to(ctx.task.device)


def head_gradient(features: Tensor, targets: Tensor, head: Tensor) -> Tensor:
    """Return the gradient (C, F + 1) of the mean cross-entropy in the weights and biases of a linear classifier.

    Args:
        features: (n, F).
        targets: the classes (n,).
        head: the weights (C, F); the biases are 0.
    """
    residuals = torch.softmax(features @ head.T, 1) - F.one_hot(targets, len(head)).to(features)
    return residuals.T @ F.pad(features, (0, 1), value=1.0) / len(features)
