"""Coverage-centric coreset selection (CCS): an equal budget for every range of difficulty.

Zheng, Liu, Lai and Prakash, "Coverage-centric coreset selection for high pruning rates", ICLR 2023. Written from a
description of the algorithm.

Of the n images of a class with scores (difficulties), of which m are selected:

1. The floor(beta n) images with the highest scores are dropped: many of them are mislabelled.
2. The range of the other scores is divided into k strata of equal width.
3. The strata share the budget equally. Starting with the stratum that has the fewest images, as many images of it are
   drawn at random as its share m / (strata left) allows, or all of them; what is left of the budget goes to the others.

    symbol   code                           symbol   code
    beta     ``cutoff``                     m        ``num``, ``ctx.images_of_class``
    k        ``num_strata``

Deviations: see docs/methods/ccs.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from condense.method import Context
from condense.methods.selection import EL2N, Forgetting, ScoreSelection, Selection, highest
from condense.rng import Draws


@final
@dataclass(frozen=True, kw_only=True)
class CCS(Selection):
    """Drops the hardest images of each class, and draws from all ranges of difficulty of the others alike."""

    score: Literal["el2n", "forgetting"] = "el2n"
    """Difficulty of an image: el2n (the mean error of networks early in training) or forgetting (how often a network
    forgets it)."""
    num_networks: int = 3
    """Number of networks over which el2n is averaged; forgetting takes one."""
    num_epochs: int = 5
    """Number of training epochs of each network. Forgetting needs more, such as 20."""
    cutoff: float = 0.1
    """Fraction of the images, the hardest of each class, that are dropped first."""
    num_strata: int = 50
    """Number of ranges of the score, all of the same width."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "num_strata")
        if not 0 <= self.cutoff < 1:
            raise ValueError(f"method.cutoff must lie in [0, 1), got {self.cutoff}; {self._usual('cutoff')}")
        self._scored()

    def _scored(self) -> ScoreSelection:
        if self.score == "el2n":
            return EL2N(num_networks=self.num_networks, num_epochs=self.num_epochs)
        return Forgetting(num_epochs=self.num_epochs)

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        return self._scored().estimated_work(num_images, num_classes, images_per_class)

    def pick(self, ctx: Context) -> Iterator[Tensor]:
        scores = self._scored().scores(ctx).cpu()
        for c, (members, num) in enumerate(zip(ctx.task.train.by_class, ctx.images_of_class, strict=True)):

            def draws(number: int, c: int = c) -> Draws:
                return ctx.rng("stratum", number, c)

            yield members[self.choose(scores[members.cpu()], num, draws)]

    def choose(self, scores: Tensor, num: int, draws: Callable[[int], Draws]) -> Tensor:
        """Return the indices (num,) of the selected images of a class, all different.

        Args:
            scores: their scores (n,); an infinite one counts as one more than the largest finite score.
            num: the number of images to select.
            draws: the random numbers of each stratum.
        """
        remains = torch.ones(len(scores), dtype=torch.bool)
        remains[highest(scores, min(int(self.cutoff * len(scores)), len(scores) - num))] = False
        kept = remains.nonzero().flatten()
        strata = self.strata(scores[kept])
        sizes = strata.bincount()
        order = [stratum for stratum in sizes.argsort(stable=True).tolist() if sizes[stratum]]
        drawn, left = [], num
        for done, stratum in enumerate(order):
            members = kept[strata == stratum]
            share = min(len(members), left // (len(order) - done))
            drawn.append(members[draws(stratum).subset(len(members), share)])
            left -= share
        return torch.cat(drawn)

    def strata(self, scores: Tensor) -> Tensor:
        """Return the stratum (n,) of each score (n,), counted from 0; some strata may be empty."""
        finite = scores[scores.isfinite()]
        scores = scores.where(scores.isfinite(), finite.max() + 1 if len(finite) else 0.0).double()
        above = scores - scores.min()
        if not above.any():
            return above.long()
        return (self.num_strata * above / above.max()).long().clamp(max=self.num_strata - 1)
