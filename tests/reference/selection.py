"""Slow references of the selection methods, from their definitions, for one class in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float64]

Draw = Callable[[int, int, int], list[int]]
"""``draw(k, n, m)``: the m of n positions that the draw with the number k selects."""


def herding(features: Features, num: int) -> list[int]:
    """Select s_i = argmin over the images not yet selected of || i mu - (s_1 + .. + s_{i-1}) - f ||."""
    mean = features.sum(0) / len(features)
    chosen: list[int] = []
    for i in range(1, num + 1):
        rest = i * mean - sum((features[j] for j in chosen), np.zeros_like(mean))
        candidates = [j for j in range(len(features)) if j not in chosen]
        chosen.append(min(candidates, key=lambda j: np.linalg.norm(rest - features[j])))
    return chosen


def k_center(features: Features, num: int) -> list[int]:
    """Select s_1 nearest to the mean, and s_i farthest from its nearest selected image."""
    mean = features.sum(0) / len(features)
    chosen = [min(range(len(features)), key=lambda j: np.linalg.norm(features[j] - mean))]
    while len(chosen) < num:
        candidates = [j for j in range(len(features)) if j not in chosen]
        gaps = {j: min(np.linalg.norm(features[j] - features[s]) for s in chosen) for j in candidates}
        chosen.append(max(candidates, key=lambda j: gaps[j]))
    return chosen


def k_means(features: Features, num: int) -> set[int]:
    """Return the image nearest to the mean of each cluster, for the partition into ``num`` clusters of least inertia.

    Tries all partitions, so it is for few points, in well-separated clusters.
    """
    best, least = set[int](), np.inf
    for labels in itertools.product(range(num), repeat=len(features)):
        if len(set(labels)) < num:
            continue
        members = [[j for j, label in enumerate(labels) if label == k] for k in range(num)]
        means = [features[m].mean(0) for m in members]
        inertia = sum(np.sum((features[m] - mean) ** 2) for m, mean in zip(members, means, strict=True))
        if inertia < least:
            least = inertia
            best = {min(range(len(features)), key=lambda j: np.linalg.norm(features[j] - mean)) for mean in means}
    return best


def forgetting(correct: Sequence[Sequence[bool]], num: int) -> list[int]:
    """Select the images that are forgotten most often; those that are never learned come first.

    ``correct[t][i]``: whether image i is classified correctly after epoch t.
    """
    events = []
    for i in range(len(correct[0])):
        learned, forgotten, before = False, 0, False
        for epoch in correct:
            if before and not epoch[i]:
                forgotten += 1
            before = epoch[i]
            learned = learned or before
        events.append(forgotten if learned else math.inf)
    return sorted(range(len(events)), key=lambda i: (-events[i], i))[:num]


def el2n(logits: Sequence[Features], label: int, num: int, order: str) -> list[int]:
    """Select by mean EL2N score. ``logits`` are those of each network, (n, C); all images have the class ``label``."""
    scores = []
    for i in range(len(logits[0])):
        lengths = []
        for network in logits:
            powers = [math.exp(z - max(network[i])) for z in network[i]]
            errors = [p / sum(powers) - (k == label) for k, p in enumerate(powers)]
            lengths.append(math.sqrt(sum(e * e for e in errors)))
        scores.append(sum(lengths) / len(lengths))
    sign = -1 if order == "hardest" else 1
    return sorted(range(len(scores)), key=lambda i: (sign * scores[i], i))[:num]


def gradients(logits: Features, features: Features, label: int) -> Features:
    """Return for each image the gradient of the cross-entropy in the bias and the weights of the last layer."""
    rows = []
    for z, e in zip(logits, features, strict=True):
        powers = [math.exp(value - max(z)) for value in z]
        g = [p / sum(powers) - (k == label) for k, p in enumerate(powers)]
        rows.append([*g, *(x * y for x in g for y in e)])
    return np.array(rows)


def graph_cut(features: Features, num: int, weight: float = 1.0) -> list[int]:
    """Select the image that increases f(S) = weight * sum_{j, s in S} sim(j, s) - sum_{s, t in S} sim(s, t) most."""
    lengths = [math.sqrt(sum(row**2)) for row in features]
    sim = [
        [a @ b / (x * y) for b, y in zip(features, lengths, strict=True)]
        for a, x in zip(features, lengths, strict=True)
    ]

    def value(chosen: list[int]) -> float:
        to_all = sum(sim[j][s] for j in range(len(features)) for s in chosen)
        return weight * to_all - sum(sim[s][t] for s in chosen for t in chosen)

    chosen: list[int] = []
    while len(chosen) < num:
        candidates = [j for j in range(len(features)) if j not in chosen]
        chosen.append(max(candidates, key=lambda j: value([*chosen, j])))
    return chosen


def dq(features: Features, num: int, num_bins: int, draw: Draw) -> set[int]:
    """Fill bins one after the other by graph-cut on the images that remain, and draw an equal share of each."""
    left, selected = list(range(len(features))), set[int]()
    for k in range(num_bins):
        size = len([i for i in range(len(features)) if i % num_bins == k])
        share = len([i for i in range(num) if i % num_bins == k])
        members = [left[i] for i in graph_cut(features[left], size)]
        selected |= {members[i] for i in draw(k, size, share)}
        left = [i for i in left if i not in members]
    return selected


def ccs(scores: Sequence[float], num: int, cutoff: float, num_strata: int, draw: Draw) -> set[int]:
    """Drop the hardest images, and share the budget among strata of the others, the smallest stratum first."""
    by_difficulty = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    kept = by_difficulty[min(math.floor(cutoff * len(scores)), len(scores) - num) :]
    low, high = min(scores[i] for i in kept), max(scores[i] for i in kept)
    strata: dict[int, list[int]] = {}
    for i in sorted(kept):
        k = 0 if low == high else min(int((scores[i] - low) / (high - low) * num_strata), num_strata - 1)
        strata.setdefault(k, []).append(i)
    selected = set[int]()
    while strata:
        k = min(strata, key=lambda k: (len(strata[k]), k))
        share = min(len(strata[k]), (num - len(selected)) // len(strata))
        members = strata.pop(k)
        selected |= {members[i] for i in draw(k, len(members), share)}
    return selected
