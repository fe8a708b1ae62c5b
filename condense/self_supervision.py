"""Objectives without labels, which compare the outputs for two views of every image.

A batch holds the outputs (2 B, D) for the first views of B images and then for their second views, in the same order
(``condense.sources.Pairs``).

* ``barlow_twins``: Zbontar, Jing, Misra, LeCun and Deny, "Barlow Twins: Self-Supervised Learning via Redundancy
  Reduction", ICML 2021. The cross-correlation of the outputs of both views is to be the identity. It is divided by D,
  so that a learning rate suits projectors of any width; the published loss is not.
* ``simclr``: Chen, Kornblith, Norouzi and Hinton, "A Simple Framework for Contrastive Learning of Visual
  Representations", ICML 2020. Among all other views of the batch, the second view of the same image is to be the most
  similar one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

OFF_DIAGONAL = 0.005
"""Weight of the squared correlations of different outputs in Barlow Twins."""
TEMPERATURE = 0.5
"""Temperature of the similarities in SimCLR."""

SelfSupervision = Literal["barlow-twins", "simclr"]
"""The keys of ``SELF_SUPERVISION``."""


def barlow_twins(outputs: Tensor, targets: Tensor | None = None) -> Tensor:
    """Return (sum_i (1 - C_ii)^2 + 0.005 sum_(i != j) C_ij^2) / D, where C (D, D) is the cross-correlation of the
    outputs (2 B, D) of both views over the batch. ``targets`` are ignored."""
    first, second = (F.batch_norm(half, None, None, training=True) for half in outputs.chunk(2))
    correlation = first.T @ second / len(first)
    diagonal = correlation.diagonal()
    off_diagonal = correlation.square().sum() - diagonal.square().sum()
    return ((1 - diagonal).square().sum() + OFF_DIAGONAL * off_diagonal) / len(diagonal)


def simclr(outputs: Tensor, targets: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of finding the other view of each image among the 2 B - 1 other views, by the cosine
    similarity of the outputs (2 B, D) divided by 0.5. ``targets`` are ignored."""
    z, num = F.normalize(outputs, dim=1), len(outputs)
    itself = torch.eye(num, dtype=torch.bool, device=z.device)
    similarities = (z @ z.T / TEMPERATURE).masked_fill(itself, -torch.inf)
    return F.cross_entropy(similarities, torch.arange(num, device=z.device).roll(num // 2))


SELF_SUPERVISION: dict[SelfSupervision, Callable[[Tensor, Tensor], Tensor]] = {
    "barlow-twins": barlow_twins,
    "simclr": simclr,
}
