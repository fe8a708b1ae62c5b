"""Slow reference of the distances of ``condense.match``: sums over single numbers, from the definitions."""

import math

import numpy as np


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    norm_a, norm_b = math.sqrt(sum(x * x for x in a)), math.sqrt(sum(y * y for y in b))
    return dot / (norm_a * norm_b + 1e-6)


def layerwise_cosine(grads_a: dict[str, np.ndarray], grads_b: dict[str, np.ndarray]) -> float:
    total = 0.0
    for name in grads_a:
        a, b = grads_a[name], grads_b[name]
        if a.ndim >= 2:
            for row in range(a.shape[0]):
                total += 1 - cosine(a[row].ravel(), b[row].ravel())
    return total


def mse_sum(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    return sum((x - y) ** 2 for name in a for x, y in zip(a[name].ravel(), b[name].ravel(), strict=True))


def convolution_mse_sum(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    convolutions = [name for name in a if a[name].ndim == 4]
    return mse_sum({name: a[name] for name in convolutions}, {name: b[name] for name in convolutions})


def convolution_l1_sum(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    total = 0.0
    for name in a:
        if a[name].ndim == 4:
            total += sum(abs(x - y) for x, y in zip(a[name].ravel(), b[name].ravel(), strict=True))
    return total


def global_cosine(grads_a: dict[str, np.ndarray], grads_b: dict[str, np.ndarray]) -> float:
    names = list(grads_a)
    a, b = (np.concatenate([grads[name].ravel() for name in names]) for grads in (grads_a, grads_b))
    return 1 - cosine(a, b)


def trajectory_distance(
    theta: dict[str, np.ndarray], target: dict[str, np.ndarray], start: dict[str, np.ndarray], trim: float = 0.0
) -> float:
    errors, scales = [], []
    for name in theta:
        for x, y, z in zip(theta[name].ravel(), target[name].ravel(), start[name].ravel(), strict=True):
            errors.append((x - y) ** 2)
            scales.append((z - y) ** 2)
    kept = sorted(range(len(errors)), key=lambda i: errors[i])[math.floor(trim * len(errors)) :]
    return sum(errors[i] for i in kept) / sum(scales[i] for i in kept)


def feature_mean_distance(real: np.ndarray, syn: np.ndarray) -> float:
    total = 0.0
    for f in range(real.shape[1]):
        mean_real = sum(real[:, f]) / len(real)
        mean_syn = sum(syn[:, f]) / len(syn)
        total += (mean_real - mean_syn) ** 2
    return total
