"""Linear probes: classifiers on the features of a network, by ridge regression or as a network to train."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from condense.data.layout import InputShape
from condense.kernels import centred, relative_ridge, ridge_solve

RIDGE = 1e-3
"""Ridge relative to the mean squared length of a feature."""


def ridge_probe(features: Tensor, labels: Tensor, num_classes: int) -> Callable[[Tensor], Tensor]:
    """Fit a linear classifier and return a function from features (M, F) to predicted classes (M,).

    Features are standardised. The weights minimise the squared distance to centred one-hot vectors with a ridge.

    Args:
        features: (N, F).
        labels: the classes (N,).
        num_classes: the number of classes.
    """
    mean, std = features.mean(0), features.std(0, correction=0)

    def standardised(features: Tensor) -> Tensor:
        return torch.where(std > 0, (features - mean) / std, 0)

    x = standardised(features)
    covariance, wanted = x.T @ x, centred(labels, num_classes, x.dtype)
    least = torch.finfo(x.dtype).tiny ** 0.5  # where all features are constant
    weights = ridge_solve(covariance, x.T @ wanted, relative_ridge(covariance, RIDGE).clamp_min(least))
    return lambda features: (standardised(features) @ weights).argmax(1)


def linear_classifier(input_shape: InputShape, num_outputs: int) -> nn.Module:
    """Return a linear classifier of features (N, 1, F), a network whose weights are normal with standard deviation 0.01
    and whose biases are 0."""
    layer = nn.Linear(input_shape[-1], num_outputs)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Flatten(), layer)
