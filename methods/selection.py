"""Selection: real images picked per class, the baselines that every distilled set is measured against.

Herding: Welling, "Herding dynamical weights to learn", ICML 2009, in the greedy form of Rebuffi et al.,
"iCaRL", CVPR 2017. K-center: Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985, and
Sener and Savarese, "Active learning for convolutional neural networks: a core-set approach", ICLR 2018.
K-means: Cui et al., "DC-BENCH: Dataset Condensation Benchmark", NeurIPS 2022.

Of the n images of a class with features f_1 .. f_n and mean mu, a set S of m images is picked:

    random     S uniform without replacement
    herding    s_i = argmin_f || i mu - (s_1 + .. + s_{i-1}) - f ||,  i = 1 .. m
    k-center   s_1 = argmin_f || f - mu ||,  s_i = argmax_f min_{j < i} || f - s_j ||
    k-means    s_i = argmin_f || f - centre_i ||,  centres of m clusters

No image is picked twice; the lowest index wins a tie.

    symbol  code                           symbol  code
    f       ``features`` (n, F)            m       ``num``: images a class
    mu      ``features.mean(0)``           s_i     ``chosen[i - 1]``, an index

Deviations: see docs/methods/herding.md, k-center.md and k-means.md.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import sklearn.cluster
import torch
from torch import Tensor

from condense.augment import Augment
from condense.method import Context, Method, State
from condense.train import Trainer, Training

BATCH = 1000


@final
@dataclass(frozen=True, kw_only=True)
class Random(Method):
    """Images drawn uniformly from each class, without replacement."""

    family: ClassVar[str] = "selection"

    def init(self, ctx: Context) -> State:
        return State(syn=ctx.new_set(*ctx.initial("real")))

    def step(self, ctx: Context, state: State, step: int) -> dict[str, float]:
        return {}


@dataclass(frozen=True, kw_only=True)
class Selection(Method):
    """Picks the images of each class by their features; a subclass says which."""

    family: ClassVar[str] = "selection"

    features: Literal["network", "pixels"] = "network"
    """network: what the recipe's network, trained on the real images, hands to its classifier; pixels: the
    transformed images themselves."""
    num_epochs: int = 5
    """Epochs of training of that network. Few: ordering the images of a class needs no converged network, and
    a baseline should cost less than what it is compared with."""

    def passes(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        return num_images * (self.num_epochs + 1 / 3) if self.features == "network" else 0.0

    def init(self, ctx: Context) -> State:
        return State(syn=ctx.new_set(*ctx.initial("real")))

    @final
    def step(self, ctx: Context, state: State, step: int) -> dict[str, float]:
        train, embed, chosen = ctx.task.train, self.embedding(ctx), []
        for c, members in enumerate(train.by_class):
            seed = ctx.rng.key("select", 0, c)
            chosen.append(members[self.choose(embed(train.images[members]), ctx.images_per_class, seed).cpu()])
        index = torch.cat(chosen)
        state.syn.load_state_dict(ctx.new_set(train.images[index], train.labels[index]).state_dict())
        return {}

    def embedding(self, ctx: Context) -> Callable[[Tensor], Tensor]:
        """Images (n, C, H, W) -> features (n, F)."""
        if self.features == "pixels":
            return lambda images: images.flatten(1)
        task, rng, training = ctx.task, ctx.rng.child("features"), Training(num_epochs=self.num_epochs)
        trainer = Trainer(task.network, training, Augment(), ctx.compute)
        weights = trainer.run(task.network.init(rng, "network"), task.train.images, task.train.labels, rng)

        @torch.no_grad()
        def embed(images: Tensor) -> Tensor:
            batches = [task.network.features(*weights, x, train=False) for x in images.split(BATCH)]
            return torch.cat(batches).float()

        return embed

    @abstractmethod
    def choose(self, features: Tensor, num: int, seed: int) -> Tensor:
        """Indices (num,) of the rows of ``features`` (n, F) to keep, all different."""


@final
@dataclass(frozen=True, kw_only=True)
class Herding(Selection):
    """Greedily keeps the mean of the picked features at the mean of the class."""

    def choose(self, features: Tensor, num: int, seed: int) -> Tensor:
        mean, chosen = features.mean(0), features.new_empty(num, dtype=torch.long)
        wanted, free = torch.zeros_like(mean), features.new_zeros(len(features))
        for i in range(num):
            wanted = wanted + mean
            chosen[i] = (distances(features, wanted) + free).argmin()
            wanted = wanted - features[chosen[i]]
            free[chosen[i]] = torch.inf
        return chosen


@final
@dataclass(frozen=True, kw_only=True)
class KCenter(Selection):
    """Starts at the image nearest to the class mean, then always adds the one farthest from those picked."""

    def choose(self, features: Tensor, num: int, seed: int) -> Tensor:
        chosen = features.new_empty(num, dtype=torch.long)
        chosen[0] = distances(features, features.mean(0)).argmin()
        nearest = features.new_full((len(features),), torch.inf)
        for i in range(1, num):
            last = chosen[i - 1]
            nearest = nearest.minimum(distances(features, features[last]))
            nearest[last] = -torch.inf
            chosen[i] = nearest.argmax()
        return chosen


@final
@dataclass(frozen=True, kw_only=True)
class KMeans(Selection):
    """Of each of as many clusters as images are wanted, the image nearest to the centre."""

    def choose(self, features: Tensor, num: int, seed: int) -> Tensor:
        points = features.double().cpu()  # in float32 the order in which threads add up could decide a pick
        clusters = sklearn.cluster.KMeans(num, n_init=1, random_state=seed % 2**32).fit(points.numpy())
        chosen, free = torch.empty(num, dtype=torch.long), points.new_zeros(len(points))
        for i, centre in enumerate(torch.from_numpy(clusters.cluster_centers_)):
            chosen[i] = (distances(points, centre) + free).argmin()
            free[chosen[i]] = torch.inf
        return chosen.to(features.device)


def distances(features: Tensor, point: Tensor) -> Tensor:
    """(n, F), (F,) -> (n,); the sum itself and no matrix product, so that equal rows are equally far."""
    return torch.cdist(features, point[None], compute_mode="donot_use_mm_for_euclid_dist")[:, 0]
