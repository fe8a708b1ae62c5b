"""Graph-cut and dataset quantization: images selected for being similar to their class and different from one another.

Graph-cut: Iyer and Bilmes, "Submodular optimization with submodular cover and submodular knapsack constraints",
NeurIPS 2013, as a coreset method in Guo, Zhao and Bai, "DeepCore: a comprehensive library for coreset selection in deep
learning", DEXA 2022. Dataset quantization (DQ): Zhou et al., "Dataset Quantization", ICCV 2023.

Of the images V of a class, graph-cut selects a set S greedily for the function

    f(S) = lambda sum_{j in V, s in S} sim(j, s) - sum_{s, t in S} sim(s, t)

whose gain of an image i is, up to a constant, lambda sum_{j in V} sim(j, i) - 2 sum_{s in S} sim(s, i). DQ divides the
class into N bins of equal size, each selected by graph-cut from the images that remain (V are these images), and draws
an equal share of every bin at random.

sim is the cosine similarity of the gradients of the cross-entropy in the last layer, [g ; g (x) e], where g is the
gradient in the logits, e the input of the layer and (x) the Kronecker product.

    symbol   code                           symbol   code
    lambda   ``weight``                     g        ``softmax(logits) - one_hot(class)``
    N        ``num_bins``                   e        the features of the network
    sim      ``Similarity.to(i)``           f        the greedy step is ``graph_cut``

No matrix of the similarities of all pairs is made. The vector [g ; g (x) e] is g (x) [1 ; e], so a similarity is the
product of two inner products, and the sum over all images is a product of matrices of the size of the features. Memory
grows with the number of images, not with its square.

Deviations: see docs/methods/graph-cut.md and dq.md.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from condense.method import Context, dtype_of_numbers
from condense.methods.selection import Selection, embedding, embedding_of, smallest, trained
from condense.objective import one_hot
from condense.rng import Draws
from condense.train import Scorer


class Similarity(NamedTuple):
    """The similarities of n images, each the product of the inner products of their rows in two tables."""

    left: Tensor
    """(n, P)"""
    right: Tensor
    """(n, Q)"""

    @classmethod
    def cosine(cls, features: Tensor, gradients: Tensor | None = None) -> Similarity:
        """Return the cosine similarities of ``features`` (n, F), or of the rows [g ; g (x) e] where g are ``gradients``
        (n, C) and e are ``features``."""
        if gradients is None:
            return cls(F.normalize(features), features.new_ones(len(features), 1))
        ones = features.new_ones(len(features), 1)
        return cls(F.normalize(gradients), F.normalize(torch.cat([ones, features], 1)))

    def among(self, index: Tensor) -> Similarity:
        """Return the similarities of the images ``index`` (k,)."""
        return Similarity(self.left[index], self.right[index])

    def to(self, i: Tensor) -> Tensor:
        """Return the similarities (n,) to the image ``i``, a scalar."""
        return (self.left @ self.left[i]) * (self.right @ self.right[i])

    def to_all(self) -> Tensor:
        """Return for each image the sum of its similarities to all images, (n,)."""
        return (self.left @ (self.left.T @ self.right) * self.right).sum(1)


@dataclass(frozen=True, kw_only=True)
class SimilaritySelection(Selection):
    """Base class of the methods that select the images of each class by their similarities."""

    features: Literal["gradient", "network", "pixels"] = "gradient"
    """Vectors whose cosine similarity is taken: gradient (of the loss, in the last layer of the recipe's network after
    training on the real images), network (the input of that layer) or pixels (the transformed image itself)."""
    num_epochs: int = 5
    """Number of training epochs of the network that computes the features."""
    weight: float = 1.0
    """Weight lambda of the similarity to the class, against that to the images already selected."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("weight")

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        passes = {"gradient": 2, "network": 1, "pixels": 0}[self.features]
        return num_images * (self.num_epochs + passes / 3) if passes else 0.0

    @property
    def patch_epochs(self) -> int:
        return self.num_epochs

    @final
    def pick(self, ctx: Context) -> Iterator[Tensor]:
        train, similarity = ctx.task.train, self.similarity(ctx)
        for c, (members, num) in enumerate(zip(train.by_class, ctx.images_of_class, strict=True)):

            def draws(number: int, c: int = c) -> Draws:
                return ctx.rng("bin", number, c)

            yield members[self.choose(similarity(train.images[members], c), num, draws)]

    def similarity(self, ctx: Context) -> Callable[[Tensor, int], Similarity]:
        """Return the function from the images (n, *input_shape) of a class, and the class, to their similarities."""
        if self.features != "gradient":
            features = embedding(ctx, self.features, self.num_epochs)
            return lambda images, c: Similarity.cosine(features(images))
        scorer, (weights,) = Scorer(ctx.task.network, ctx.compute), trained(ctx, self.num_epochs)
        embed = embedding_of(ctx.task.network, weights)

        def similarity(images: Tensor, c: int) -> Similarity:
            probabilities = scorer.logits(weights, images).softmax(1)
            labels = torch.full((len(images),), c, device=images.device)
            return Similarity.cosine(embed(images), probabilities - one_hot(labels, probabilities.shape[1]))

        return similarity

    @abstractmethod
    def choose(self, similarity: Similarity, num: int, draws: Callable[[int], Draws]) -> Tensor:
        """Return the indices (num,) of the selected images of a class, all different.

        Args:
            similarity: the similarities of the images.
            num: the number of images to select.
            draws: the random numbers of each number, such as that of a bin.
        """


@final
@dataclass(frozen=True, kw_only=True)
class GraphCut(SimilaritySelection):
    """Selects images that are similar to their class and different from the images already selected."""

    def choose(self, similarity: Similarity, num: int, draws: Callable[[int], Draws]) -> Tensor:
        return graph_cut(similarity, num, self.weight)


@final
@dataclass(frozen=True, kw_only=True)
class DQ(SimilaritySelection):
    """Divides each class into bins by graph-cut, and draws an equal share of every bin at random."""

    num_bins: int = 10
    """Number of bins of each class."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "num_bins")

    def choose(self, similarity: Similarity, num: int, draws: Callable[[int], Draws]) -> Tensor:
        total = len(similarity.left)
        left, drawn = torch.arange(total, device=similarity.left.device), []
        shares = zip(parts(total, self.num_bins), parts(num, self.num_bins), strict=True)
        for number, (size, share) in enumerate(shares):
            if not share:
                break
            members = graph_cut(similarity.among(left), size, self.weight)
            drawn.append(left[members[draws(number).subset(size, share).to(members.device)]])
            remains = torch.ones(len(left), dtype=torch.bool, device=left.device)
            remains[members] = False
            left = left[remains]
        return torch.cat(drawn)


def graph_cut(similarity: Similarity, num: int, weight: float) -> Tensor:
    """Return the indices (num,) that graph-cut selects greedily, in this order; in a tie the lowest index is first."""
    gains = (weight * similarity.to_all()).to(dtype_of_numbers(similarity.left.device))
    chosen = torch.empty(num, dtype=torch.long, device=gains.device)
    for i in range(num):
        chosen[i] = smallest(-gains)
        gains -= 2 * similarity.to(chosen[i])
        gains[chosen[i]] = -torch.inf
    return chosen


def parts(total: int, num: int) -> list[int]:
    """Divide ``total`` into ``num`` whole numbers that differ by at most 1, the larger ones first."""
    return [total // num + (k < total % num) for k in range(num)]
