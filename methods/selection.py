"""Selection: real images selected per class, the baselines of distilled sets.

Herding: Welling, "Herding dynamical weights to learn", ICML 2009, in the greedy form of Rebuffi et al.,
"iCaRL", CVPR 2017. K-center: Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985, and
Sener and Savarese, "Active learning for convolutional neural networks: a core-set approach", ICLR 2018.
K-means: Cui et al., "DC-BENCH: Dataset Condensation Benchmark", NeurIPS 2022. Forgetting: Toneva et al., "An
empirical study of example forgetting during deep neural network learning", ICLR 2019. EL2N: Paul, Ganguli and
Dziugaite, "Deep learning on a data diet: finding important examples early in training", NeurIPS 2021.

Of the n images of a class with features f_1 .. f_n and mean mu, a set S of m images is selected:

    random       S uniform without replacement
    herding      s_i = argmin_f || i mu - (s_1 + .. + s_{i-1}) - f ||,  i = 1 .. m
    k-center     s_1 = argmin_f || f - mu ||,  s_i = argmax_f min_{j < i} || f - s_j ||
    k-means      s_i = argmin_f || f - centre_i ||,  centres of m clusters
    forgetting   the m largest  sum_t [ right_t and not right_{t+1} ],  infinite if right_t holds for no t
    el2n         the m largest  E_w || softmax(z_w) - y ||,  or the m smallest

right_t: the network classifies the image correctly after epoch t. z_w: the logits of a network with weights w, trained
for a few epochs. y: the class as a one-hot vector. No image is selected twice. Ties go to the lowest index; values tie
if they differ by at most ``TIE`` times the largest magnitude.

``random-soft``, random images labelled with the softmax of a trained network, is the baseline of Qin, Deng and
Alvarez-Melis, "A label is worth a thousand images in dataset distillation", NeurIPS 2024.

    symbol   code                           symbol   code
    f        ``features`` (n, F)            m        ``num``, ``ctx.images_of_class``
    mu       ``features.mean(0)``           s_i      ``chosen[i - 1]``, an index
    right_t  ``correct[t - 1]`` (N,)        z_w      ``logits`` (N, C)

Deviations: see docs/methods/herding.md, k-center.md, k-means.md, forgetting.md and el2n.md.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import sklearn.cluster
import torch
from torch import Tensor

from condense.cache import cache_folder
from condense.data.layout import Kind
from condense.method import Context, Method, State
from condense.networks import Functional, Weights
from condense.objective import one_hot
from condense.pretraining import pretrained
from condense.synthetic.labels import Assigned
from condense.synthetic.patches import Patches
from condense.train import Scorer, Training

BATCH = 1000

TIE = 1e-5
"""Largest difference that counts as rounding, as a fraction of the largest magnitude. The outputs of a network for one
image differ in the last bits between positions in a batch and between processors."""


@dataclass(frozen=True, kw_only=True)
class Selection(Method):
    """Selects real images, labelled by their classes or by a trained network (``teacher`` labels)."""

    family: ClassVar[str] = "selection"
    has_teacher: ClassVar[bool] = True
    selects: ClassVar[bool] = True
    takes: ClassVar[tuple[Kind, ...]] = ("graphs", "series", "images", "clips")

    teacher_epochs: int = 20
    """Number of training epochs of the network that assigns ``teacher`` labels, or scores patches for the decoder
    ``patches`` if the method trains none for features; small data sets need more."""

    @property
    def patch_epochs(self) -> int:
        """Number of training epochs of the network that decides which patches the decoder ``patches`` keeps."""
        return self.teacher_epochs

    def init(self, ctx: Context) -> State:
        return State(syn=ctx.new_set(*ctx.initial("real")))

    @final
    def step(self, ctx: Context, state: State, step: int) -> dict[str, float]:
        train, index = ctx.task.train, torch.cat(list(self.pick(ctx)))
        images = train.images[index]
        syn = ctx.new_set(images, train.labels[index])
        if isinstance(ctx.decode, Patches):
            (weights,) = trained(ctx, self.patch_epochs)
            importance = saliency(ctx.task.network, weights, images)
            syn.latents.copy_(ctx.decode.encode_by(importance, images, syn.decoder))
        state.syn.load_state_dict(syn.state_dict())
        if isinstance(state.syn.provider, Assigned):
            (weights,) = trained(ctx, self.teacher_epochs)
            with torch.no_grad():
                labels = Scorer(ctx.task.network, ctx.compute).logits(weights, state.syn()[0]).softmax(1)
            state.syn.provider.assign(labels.unflatten(0, (-1, len(state.syn))).mean(0))
        return {}

    @abstractmethod
    def pick(self, ctx: Context) -> Iterator[Tensor]:
        """Yield for each class the indices of different training images, as many as ``ctx.images_of_class`` says."""


@final
@dataclass(frozen=True, kw_only=True)
class Random(Selection):
    """Selects images of each class uniformly without replacement."""

    def pick(self, ctx: Context) -> Iterator[Tensor]:
        for c, (members, num) in enumerate(zip(ctx.task.train.by_class, ctx.images_of_class, strict=True)):
            yield members[ctx.rng("initial images", 0, c).subset(len(members), num).to(members.device)]


@dataclass(frozen=True, kw_only=True)
class FeatureSelection(Selection):
    """Base class of the methods that select the images of each class by their features."""

    features: Literal["network", "pixels"] = "network"
    """Features of an image: network (the input of the classifier of the recipe's network, trained on the real images)
    or pixels (the transformed image itself)."""
    num_epochs: int = 5
    """Number of training epochs of the network that computes the features."""

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        return num_images * (self.num_epochs + 1 / 3) if self.features == "network" else 0.0

    @property
    def patch_epochs(self) -> int:
        return self.num_epochs

    @final
    def pick(self, ctx: Context) -> Iterator[Tensor]:
        train, embed = ctx.task.train, embedding(ctx, self.features, self.num_epochs)
        for c, (members, num) in enumerate(zip(train.by_class, ctx.images_of_class, strict=True)):
            seed = ctx.rng.key("select", 0, c)
            yield members[self.choose(embed(train.images[members]), num, seed).to(members.device)]

    @abstractmethod
    def choose(self, features: Tensor, num: int, seed: int) -> Tensor:
        """Return the indices (num,) of the selected rows of ``features`` (n, F), all different."""


@final
@dataclass(frozen=True, kw_only=True)
class Herding(FeatureSelection):
    """Selects images greedily so that the mean of their features stays near the class mean."""

    def choose(self, features: Tensor, num: int, seed: int) -> Tensor:
        mean, chosen = features.mean(0), features.new_empty(num, dtype=torch.long)
        wanted, free = torch.zeros_like(mean), features.new_zeros(len(features))
        for i in range(num):
            wanted = wanted + mean
            chosen[i] = smallest(distances(features, wanted) + free)
            wanted = wanted - features[chosen[i]]
            free[chosen[i]] = torch.inf
        return chosen


@final
@dataclass(frozen=True, kw_only=True)
class KCenter(FeatureSelection):
    """Selects the image nearest to the class mean, then repeatedly the image farthest from those selected."""

    def choose(self, features: Tensor, num: int, seed: int) -> Tensor:
        chosen = features.new_empty(num, dtype=torch.long)
        chosen[0] = smallest(distances(features, features.mean(0)))
        nearest = features.new_full((len(features),), torch.inf)
        for i in range(1, num):
            last = chosen[i - 1]
            nearest = nearest.minimum(distances(features, features[last]))
            nearest[last] = -torch.inf
            chosen[i] = smallest(-nearest)
        return chosen


@final
@dataclass(frozen=True, kw_only=True)
class KMeans(FeatureSelection):
    """Selects the image nearest to the centre of each of as many clusters as there are images to select."""

    def choose(self, features: Tensor, num: int, seed: int) -> Tensor:
        points = features.cpu().double()  # in float32 the summation order of threads could change the selection
        clusters = sklearn.cluster.KMeans(num, n_init=1, random_state=seed % 2**32).fit(points.numpy())
        chosen, free = torch.empty(num, dtype=torch.long), points.new_zeros(len(points))
        for i, centre in enumerate(torch.from_numpy(clusters.cluster_centers_)):
            chosen[i] = smallest(distances(points, centre) + free)
            free[chosen[i]] = torch.inf
        return chosen.to(features.device)


@dataclass(frozen=True, kw_only=True)
class ScoreSelection(Selection):
    """Base class of the methods that select the images of each class with the highest scores."""

    @final
    def pick(self, ctx: Context) -> Iterator[Tensor]:
        scores = self.scores(ctx).cpu()
        for members, num in zip(ctx.task.train.by_class, ctx.images_of_class, strict=True):
            yield members[highest(scores[members.cpu()], num)]

    @abstractmethod
    def scores(self, ctx: Context) -> Tensor:
        """Return the scores (N,) of the training images."""


@final
@dataclass(frozen=True, kw_only=True)
class Forgetting(ScoreSelection):
    """Selects the images that the recipe's network forgets most often during training on all images."""

    num_epochs: int = 20
    """Number of training epochs of the network; it classifies all images after each epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_epochs < 2:
            raise ValueError(
                f"method.num_epochs must be at least 2, because images are forgotten between two epochs, got "
                f"{self.num_epochs}; try 20"
            )

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        return num_images * self.num_epochs * 4 / 3

    def scores(self, ctx: Context) -> Tensor:
        train, scorer, correct = ctx.task.train, Scorer(ctx.task.network, ctx.compute), list[Tensor]()

        def classify(epochs: int, weights: Weights) -> None:
            correct.append(scorer.logits(weights, train.images).argmax(1) == train.labels)

        list(trained(ctx, self.num_epochs, on_epoch=classify))
        return forgetting_events(torch.stack(correct))


@final
@dataclass(frozen=True, kw_only=True)
class EL2N(ScoreSelection):
    """Selects the images with the largest or smallest error of networks early in training."""

    num_networks: int = 3
    """Number of networks over which the error is averaged."""
    num_epochs: int = 5
    """Number of training epochs of each network."""
    order: Literal["hardest", "easiest"] = "hardest"
    """Images to select: hardest (the largest errors) or easiest (the smallest errors, which is better at few images per
    class)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "num_networks")

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        return num_images * self.num_networks * (self.num_epochs + 1 / 3)

    def scores(self, ctx: Context) -> Tensor:
        train, scorer = ctx.task.train, Scorer(ctx.task.network, ctx.compute)
        networks = trained(ctx, self.num_epochs, self.num_networks)
        errors = torch.stack([el2n(scorer.logits(weights, train.images), train.labels) for weights in networks])
        return errors.mean(0) if self.order == "hardest" else -errors.mean(0)


def embedding(ctx: Context, kind: Literal["network", "pixels"], num_epochs: int) -> Callable[[Tensor], Tensor]:
    """Return the function from images (n, *input_shape) to features (n, F); see ``FeatureSelection.features``."""
    if kind == "pixels":
        return lambda images: images.flatten(1)
    (weights,) = trained(ctx, num_epochs)
    return embedding_of(ctx.task.network, weights)


def embedding_of(network: Functional, weights: Weights) -> Callable[[Tensor], Tensor]:
    """Return the function from images (n, *input_shape) to the features (n, F) of a network."""

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        batches = [network.features(*weights, x, train=False) for x in images.split(BATCH)]
        return torch.cat(batches).float()

    return embed


def saliency(network: Functional, weights: Weights, images: Tensor) -> Tensor:
    """Return how much each pixel of images (n, C, H, W) matters to a network, (n, H, W): the magnitude of the gradient
    of the largest logit, in the channel where it is largest. Source: Simonyan, Vedaldi and Zisserman, "Deep inside
    convolutional networks: visualising image classification models and saliency maps", ICLR 2014 workshop."""
    maps = []
    for part in images.split(BATCH):
        x = part.detach().requires_grad_()
        logits = network.logits(*weights, x, train=False)
        (gradient,) = torch.autograd.grad(logits.max(1).values.sum(), x)
        maps.append(gradient.abs().amax(1).float())
    return torch.cat(maps)


def trained(
    ctx: Context, num_epochs: int, num_networks: int = 1, on_epoch: Callable[[int, Weights], None] | None = None
) -> Iterator[Weights]:
    """Yield the weights of ``num_networks`` of the recipe's network, trained on the real images; ``on_epoch`` is passed
    to ``pretrained``."""
    training, cache = Training(num_epochs=num_epochs), cache_folder()
    for k in range(num_networks):
        rng = ctx.rng.child("features", k)
        initial = ctx.task.network.init(rng, "network")
        yield pretrained(ctx.task, training, ctx.compute, initial, rng, cache=cache, on_epoch=on_epoch)


def forgetting_events(correct: Tensor) -> Tensor:
    """Return how often each image is forgotten, (N,), given whether it is classified correctly after each epoch,
    (epochs, N). The count is infinite for an image that is never classified correctly."""
    events = (correct[:-1] & ~correct[1:]).sum(0).float()
    return events.where(correct.any(0), torch.inf)


def el2n(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the norm (N,) of the error of the softmax of ``logits`` (N, C)."""
    return (logits.softmax(1) - one_hot(labels, logits.shape[1])).norm(dim=1)


def distances(features: Tensor, point: Tensor) -> Tensor:
    """Return the distances (n,) of the rows of ``features`` (n, F) to ``point`` (F,), computed without a matrix product
    so that equal rows have equal distances."""
    return torch.cdist(features, point[None], compute_mode="donot_use_mm_for_euclid_dist")[:, 0]


def smallest(values: Tensor) -> Tensor:
    """Return the index (0-d) of the smallest of the values (n,); the lowest index if there are ties."""
    return (values <= values.min() + rounding(values)).int().argmax()


def highest(scores: Tensor, num: int) -> Tensor:
    """Return the indices (num,) of the highest scores (n,) in descending order; in a tie the lowest index is first."""
    left, chosen = -scores, torch.empty(num, dtype=torch.long, device=scores.device)
    for i in range(num):
        chosen[i] = smallest(left)
        left[chosen[i]] = torch.inf
    return chosen


def rounding(values: Tensor) -> Tensor:
    """Return the difference (0-d) up to which values (n,) tie; infinite values are ignored."""
    return TIE * values.where(values.isfinite(), 0.0).abs().max()
