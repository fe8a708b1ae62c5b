"""DPDM: distribution matching with differential privacy. The noisy class sums are those of Zheng and Li,
"Differentially Private Dataset Condensation" (2023, NDPDC); to take them once and match them any number of times is
due to Zheng et al., "Improving Noise Efficiency in Privacy-preserving Dataset Distillation", ICCV 2025 (DOSSER).

    T_kc = sum_{x in B_kc} clip(psi_k(A_k(x))) + sigma N(0, I)        for k = 1, ..., K, once

    min_S  E_k  sum_c || L / |S_c| sum_{s in S_c} clip(psi_k(A_k(s))) - L / (q N_c) T_kc ||^2

    clip(v) = v / max(1, |v|)

A record is in one class and changes its sum by a vector of norm at most 1, so that K sums of every class are K
releases of the Gaussian mechanism. All else is computed from these sums, and costs no privacy.

    symbol  code
    S_c     ``state.syn`` at the latents of class c
    B_kc    every real image of class c with probability q, ``rate``
    N_c     number of real images of class c, which is public
    psi_k   ``ctx.features``: the input of the classifier of a random network
    A_k     ``task.augment``; its parameters are drawn once for each network
    K       ``num_networks``
    sigma   ``condense.privacy.noise_multiplier``, for ``epsilon`` and ``delta``
    L       ``BATCH``

Deviations: see docs/methods/dpdm.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import numpy as np
import torch
from torch import Tensor

from condense import privacy
from condense.augment import Params
from condense.files import read_tensors, write_tensors
from condense.match import feature_matching_loss
from condense.method import Context, GradientMethod, GradientState, Optim
from condense.names import spelt
from condense.networks import Weights
from condense.objective import OBJECTIVES, ObjectiveName
from condense.privacy import Accountant
from condense.synthetic.decode import Decode
from condense.synthetic.labels import Labels
from condense.task import Task
from condense.train import Training

BATCH = 50
"""Number of images to which both sums are scaled. It is the mean number of real images in a sum of the published code,
and leaves learning rates their meaning for any rate and size of a class."""

KIND = "noisy class sums"
"""Kind of the files of the sums, one for each network."""

_CHUNK = 256
"""Number of real images in one forward pass, unless the compute policy says otherwise."""


@dataclass(kw_only=True)
class DPDMState(GradientState):
    params: dict[str, Tensor]
    """Weights of the network of the next step."""
    buffers: dict[str, Tensor]
    target: Tensor
    """The second sum of the objective for this network, (C, F)."""


@final
@dataclass(frozen=True, kw_only=True)
class DPDM(GradientMethod):
    """Matches noisy class sums of features under random networks; the set is differentially private."""

    family: ClassVar[str] = "private"
    private: ClassVar[bool] = True
    added_fields: ClassVar[tuple[str, ...]] = ("accountant",)

    learns_labels: ClassVar[bool] = False
    objectives: ClassVar[tuple[ObjectiveName, ...]] = tuple(OBJECTIVES)

    num_steps: int = 10000
    """Number of updates of the images. They cost no privacy."""
    optim: Optim = Optim(lr=1.0)
    """Optimiser of the images (latents)."""
    epsilon: float = 10.0
    """Privacy budget of the run, for data sets that differ by one record; smaller protects better."""
    delta: float = 1e-5
    """Probability with which the bound epsilon may fail; far below 1 / number of training images."""
    num_networks: int = 1000
    """Number of random networks whose class sums are taken, each once; at most num_steps."""
    rate: float = 1.0
    """Probability with which a real image takes part in the sum of a network; 1 takes all images."""
    accountant: Accountant = "rdp"
    """Bound of epsilon from which the noise follows: rdp, or prv, which is tighter."""
    start: Literal["noise", "real"] = "noise"
    """Initial images: standard normal noise. Real ones are refused, because no noise would hide them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        privacy.check_budget(self.epsilon, self.delta)
        self.require_at_least(1, "num_networks")
        if not 0 < self.rate <= 1:
            raise ValueError(
                f"method.rate must lie in (0, 1], got {self.rate}; the published value for CIFAR-10 is 0.01"
            )
        if self.start == "real":
            raise ValueError(
                "a private set cannot start from real images, which no noise would hide; give "
                f"{spelt('method.start', 'noise')}"
            )

    @property
    def releases(self) -> int:
        """Number of networks whose class sums are taken."""
        return min(self.num_networks, self.num_steps)

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise in a sum."""
        return privacy.noise_multiplier(self.epsilon, self.delta, self.rate, self.releases, self.accountant)

    def privacy(self) -> Mapping[str, Any]:
        return {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "noise_multiplier": self.sigma,
            "releases": self.releases,
            "rate": self.rate,
            "neighbours": "one record is added or removed; labels and class sizes are public",
            "accountant": privacy.ACCOUNTANTS[self.accountant],
        }

    def incompatibility(
        self, decode: Decode, labels: Labels, transform: str, objective: ObjectiveName = "cross-entropy"
    ) -> str | None:
        if labels.name == "teacher" or labels.of_views:
            return (
                f"is private, and the {labels.name} labels of a teacher trained on the data are not; "
                f"give {spelt('labels', 'hard')}"
            )
        return super().incompatibility(decode, labels, transform, objective)

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        return self.num_steps * num_classes * images_per_class + self.releases * self.rate * num_images / 3

    def training(self, task: Task) -> Training:
        return Training(num_epochs=1000)

    def init(self, ctx: Context) -> DPDMState:
        if self.delta * len(ctx.task.train) >= 1:
            raise ValueError(
                f"method.delta {self.delta:g} is no protection for {len(ctx.task.train)} training images: one of them "
                f"might be published; give {spelt('method.delta', float(f'{0.01 / len(ctx.task.train):.0e}'))}"
            )
        if mixing := [op for op in ctx.task.augment.ops if op in ("crop-dc", "rotate-dc")]:
            raise ValueError(
                f"the augmentation {mixing[0]} fills pixels with the mean of a batch, which mixes records; give "
                f"{spelt('augment', 'dsa')}"
            )
        _require_separate_images(ctx)
        syn, network = ctx.new_set(*ctx.initial("noise")), ctx.task.network
        params, buffers = network.init(ctx.rng, "network", 0)
        target = torch.zeros(ctx.task.num_classes, network.num_features, device=ctx.task.device)
        state = DPDMState(syn=syn, optimisers=self.optimisers(syn), params=params, buffers=buffers, target=target)
        self.enter(ctx, state, 0)
        return state

    def parts(self, ctx: Context) -> Sequence[int]:
        """One part per class."""
        return range(ctx.task.num_classes)

    def parts_at_once(self, ctx: Context) -> int:
        return max(1, (ctx.compute.micro_batch or 1) // ctx.images_per_class)

    def loss(self, ctx: Context, state: DPDMState, step: int, part: int) -> Tensor:
        return self.losses(ctx, state, step, (part,))

    def losses(self, ctx: Context, state: DPDMState, step: int, parts: Sequence[int]) -> Tensor:
        augment, drawn, most = ctx.task.augment, self._augmentation(ctx, step), ctx.compute.micro_batch
        mirrored = [augment.mirrored(*state.syn(state.syn.index_of(c)))[0] for c in parts]
        groups = [augment.apply(images, drawn) for images in mirrored]

        def features(images: Tensor) -> Tensor:
            return BATCH * clipped(ctx.features(state.params, state.buffers, images))

        if most is not None and len(parts) == 1 and len(groups[0]) > most:
            return feature_matching_loss(features, state.target[parts[0]], groups[0], most)
        means = [of_class.mean(0) for of_class in features(torch.cat(groups)).split([len(x) for x in groups])]
        return (torch.stack(means) - state.target[list(parts)]).square().sum()

    def after(self, ctx: Context, state: DPDMState, step: int) -> None:
        self.enter(ctx, state, step + 1)

    def enter(self, ctx: Context, state: DPDMState, step: int) -> None:
        """Put the network of a step, and its sums, in place of those of the step before."""
        weights = ctx.task.network.init(ctx.rng, "network", step % self.releases)
        Weights(state.params, state.buffers).assign(weights)
        sums = torch.zeros(state.target.shape)
        if ctx.ranks.first:
            sums = self.sums(ctx, state, step)
        ctx.ranks.broadcast([sums])
        sizes = torch.tensor([len(members) for members in ctx.task.train.by_class])
        state.target.copy_(BATCH / (self.rate * sizes[:, None]) * sums)

    def sums(self, ctx: Context, state: DPDMState, step: int) -> Tensor:
        """Return the noisy class sums (C, F) of the network of a step.

        They are computed once, and read from their file ever after: noise that was drawn again for the same sums would
        average out. The file is written before the sums are used.

        Raises:
            ValueError: the file is damaged, or of another recipe.
        """
        number = step % self.releases
        path, fix = ctx.scratch_folder / f"sums_{number:06d}.safetensors", f"choose another {spelt('out')}"
        if path.exists():
            tensors, header = read_tensors(path, KIND)
            sums = tensors.get("sums")
            if header.get("recipe_hash") != ctx.origin.recipe_hash or sums is None or sums.shape != state.target.shape:
                raise ValueError(f"{path} belongs to another recipe; {fix} to start again")
            return sums
        sums = self._released(ctx, state, number)
        write_tensors(path, {"sums": sums}, {"kind": KIND, "format": 1, "recipe_hash": ctx.origin.recipe_hash})
        return sums

    @torch.no_grad()
    def _released(self, ctx: Context, state: DPDMState, number: int) -> Tensor:
        key = ctx.kept("secret key", state, privacy.secret_key)
        secret = np.random.Generator(np.random.Philox(key=key, counter=(0, 0, 0, number)))
        train, drawn = ctx.task.train, self._augmentation(ctx, number)
        sums = torch.zeros(state.target.shape, dtype=torch.float64)
        for label, members in enumerate(train.by_class):
            if self.rate < 1:
                taken = torch.from_numpy(secret.random(len(members)) < self.rate)
                members = members[taken.to(members.device)]
            for first in range(0, len(members), size := ctx.compute.micro_batch or _CHUNK):
                images = ctx.task.augment.apply(train.images[members[first : first + size]], drawn)
                features = ctx.features(state.params, state.buffers, images)
                sums[label] += clipped(features.nan_to_num().cpu().double()).sum(0)
            sums[label] += self.sigma * torch.from_numpy(gaussian(secret, sums.shape[1]))
        return sums.float()

    def _augmentation(self, ctx: Context, step: int) -> Params:
        """Return A of the network of a step, one row that real and synthetic images share."""
        draws = ctx.rng("siamese", step % self.releases)
        return ctx.task.augment.sample(draws, 1, ctx.task.input_shape, siamese=True)


def _require_separate_images(ctx: Context) -> None:
    """Raise ValueError if the features of an image depend on the other images of its batch."""
    network = ctx.task.network
    images = ctx.rng("probe").normal(4, *ctx.task.input_shape).to(ctx.task.device)
    with torch.no_grad():
        weights = network.init(ctx.rng, "network", 0)
        few, all_ = (network.features(*weights, x, train=True)[:2] for x in (images[:2], images))
    if not (few - all_).norm() <= 1e-3 * few.norm():
        raise ValueError(
            f"the features of {network.name} depend on the other images of a batch, as with BatchNorm, or on chance: a "
            f"record would change its class sum by more than the noise hides; give {spelt('network', 'convnet')}"
        )


def clipped(features: Tensor) -> Tensor:
    """Return features (N, F) with norms of at most 1; shorter ones are unchanged."""
    return features / features.norm(dim=1, keepdim=True).clamp(min=1)


def gaussian(secret: np.random.Generator, num: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the noise of one class sum, standard normal numbers (num,)."""
    return secret.standard_normal(num)
