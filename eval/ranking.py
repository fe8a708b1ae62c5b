"""Scores that separate the quality of the images from the effect of labels, augmentation and tuning.

Li et al., "DD-Ranking: rethinking the evaluation of dataset distillation", 2024:

    HLR = Acc(real, hard) - Acc(syn, hard)              hard-label recovery: accuracy lost with hard labels
    IOR = Acc(syn, own) - Acc(random, own)              improvement over random images under the same training
    LRS = f(w IOR - (1 - w) HLR)                        label-robust score
    ARS = f(g (syn - random with augmentation) + (1 - g) (syn - random without))
    f(a) = (e^a - e^-1) / (e - e^-1),  which maps [-1, 1] to [0, 1]

Accuracies are fractions. The published package applies f to percentages, so its values may be outside [0, 1].
"""

from __future__ import annotations

import math


def hard_label_recovery(real_hard: float, syn_hard: float) -> float:
    """Return HLR, in [-1, 1]; smaller is better."""
    return _fraction(real_hard) - _fraction(syn_hard)


def improvement_over_random(syn_own: float, random_own: float) -> float:
    """Return IOR, in [-1, 1]; larger is better."""
    return _fraction(syn_own) - _fraction(random_own)


def label_robust_score(
    real_hard: float, syn_hard: float, syn_own: float, random_own: float, weight: float = 0.5
) -> float:
    """Return LRS, in [0, 1]; ``weight`` is w."""
    gain, loss = improvement_over_random(syn_own, random_own), hard_label_recovery(real_hard, syn_hard)
    return _normalised(weight * gain - (1 - weight) * loss)


def augmentation_robust_score(
    syn_augmented: float, random_augmented: float, syn_plain: float, random_plain: float, weight: float = 0.5
) -> float:
    """Return ARS, in [0, 1]; ``weight`` is g."""
    with_it = improvement_over_random(syn_augmented, random_augmented)
    without = improvement_over_random(syn_plain, random_plain)
    return _normalised(weight * with_it + (1 - weight) * without)


def _normalised(value: float) -> float:
    return (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))


def _fraction(accuracy: float) -> float:
    if not 0 <= accuracy <= 1:
        raise ValueError(f"an accuracy is a fraction between 0 and 1, got {accuracy}; divide percents by 100")
    return accuracy
