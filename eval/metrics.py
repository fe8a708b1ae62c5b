"""Accuracy and calibration metrics of a trained network.

    accuracy        share of images whose most probable class is correct; ``per_class`` within each class
    balanced_accuracy  mean of the accuracies within the classes, where their numbers of images differ much
    macro_f1        mean over classes of 2 TP / (2 TP + FP + FN), 0 for a class that neither occurs nor is predicted
    nll             mean of -log p_y
    brier           mean of sum_c (p_c - [c = y])^2, in [0, 2] (Brier, 1950)
    ece             sum_b share_b |accuracy_b - confidence_b| over 15 equally wide bins of max_c p_c (Guo et al., 2017)
    ece_adaptive    the same over 15 bins that hold equally many images (Nguyen and O'Connor, 2015)
    ece_classwise   mean over c of the same sum for p_c against [c = y] (Kull et al., 2019)
    auc             mean over c of the probability that an image of class c has a larger p_c than one of another class,
                    where equal ones count half

All are fractions, computed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_BINS = 15
UNBALANCED = 1.5
"""Ratio of the numbers of images in the largest and the smallest class above which the balanced accuracy is given."""


@dataclass(frozen=True)
class Scores:
    """The metrics of one network on one labelled set of images."""

    accuracy: float
    macro_f1: float
    nll: float
    brier: float
    ece: float
    ece_adaptive: float
    ece_classwise: float
    per_class: tuple[float, ...]
    """Accuracy within each class; 0 for a class without images."""
    reliability: tuple[tuple[float, float, float], ...]
    """For each bin of the ECE: share of the images, their mean confidence, their accuracy (0 in an empty bin)."""
    balanced_accuracy: float | None = None
    """Mean of the accuracies within the classes that have images; None unless the largest of them has more than 1.5
    times as many as the smallest."""
    auc: float | None = None
    """Area under the ROC curve; None where it was not computed or a class has no images."""

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Scores:
        """Compute the metrics from logits (N, C) and classes (N,). If any logit of an image is not finite, which
        happens when a network diverged, all its classes count as equally probable."""
        logits, labels = logits.double().cpu(), labels.cpu()
        logits = logits.where(logits.isfinite().all(1, keepdim=True), 0.0)
        num, classes = logits.shape
        log_p = logits.log_softmax(1)
        p, onehot = log_p.exp(), F.one_hot(labels, classes).double()
        confidence, predicted = p.max(1)
        correct = (predicted == labels).double()
        counts, hits = onehot.sum(0), onehot[correct.bool()].sum(0)
        predictions = torch.bincount(predicted, minlength=classes)
        bins = _bins(confidence, correct)
        order = confidence.argsort(stable=True)
        chunks = [chunk for chunk in order.tensor_split(NUM_BINS) if len(chunk)]
        adaptive = sum(len(i) / num * abs(float(correct[i].mean() - confidence[i].mean())) for i in chunks)
        return cls(
            accuracy=float(correct.mean()),
            macro_f1=float((2 * hits / (counts + predictions).clamp(min=1)).mean()),
            nll=float(-log_p.gather(1, labels[:, None]).mean()),
            brier=float((p - onehot).square().sum(1).mean()),
            ece=_gap(bins),
            ece_adaptive=adaptive,
            ece_classwise=sum(_gap(_bins(p[:, c], onehot[:, c])) for c in range(classes)) / classes,
            per_class=tuple((hits / counts.clamp(min=1)).tolist()),
            reliability=tuple(tuple(row) for row in bins.tolist()),
            balanced_accuracy=_balanced(counts, hits),
            auc=_auc(p, onehot.bool()),
        )


def _balanced(counts: Tensor, hits: Tensor) -> float | None:
    """Return the mean of the accuracies of the classes with images, where their numbers (C,) are unbalanced."""
    present = counts > 0
    if counts[present].max() <= UNBALANCED * counts[present].min():
        return None
    return float((hits[present] / counts[present]).mean())


def _auc(p: Tensor, onehot: Tensor) -> float | None:
    """Return the mean over classes of the AUC of probabilities (N, C) against membership (N, C)."""
    counts = onehot.sum(0)
    if not counts.all():
        return None
    ranks = torch.stack([_ranks(column) for column in p.T], 1)
    above = (ranks * onehot).sum(0) - counts * (counts + 1) / 2
    return float((above / (counts * (len(p) - counts))).mean())


def _ranks(values: Tensor) -> Tensor:
    """Return the ranks of values (N,), from 1; equal values share the mean of their ranks."""
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[which]


def _bins(confidence: Tensor, correct: Tensor) -> Tensor:
    """Return (NUM_BINS, 3): share, mean confidence and mean of ``correct`` in bins (low, high] of equal width."""
    index = (confidence * NUM_BINS).ceil().long().sub(1).clamp(0, NUM_BINS - 1)
    sums = torch.zeros(NUM_BINS, 3, dtype=torch.float64)
    sums.index_add_(0, index, torch.stack([torch.ones_like(confidence), confidence, correct], 1))
    counts = sums[:, :1]
    return torch.cat([counts / len(confidence), sums[:, 1:] / counts.clamp(min=1)], 1)


def _gap(bins: Tensor) -> float:
    return float((bins[:, 0] * (bins[:, 1] - bins[:, 2]).abs()).sum())
