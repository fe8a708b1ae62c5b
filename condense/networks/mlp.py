"""MLP, the network without convolutions."""

from __future__ import annotations

import math

from torch import Tensor, nn

from condense.networks.base import InputShape, Network


class MLP(Network):
    """Two hidden layers of 128 units with ReLU on the flattened pixels."""

    def __init__(self, input_shape: InputShape, num_classes: int, *, width: int = 128) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Flatten(),
            nn.Linear(math.prod(input_shape), width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(width, num_classes)

    def embed(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.features(x)
        return hidden
