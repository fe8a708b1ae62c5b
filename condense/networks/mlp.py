"""MLP, a network without convolutions."""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor, nn

from condense.data.layout import InputShape, Kind
from condense.networks.base import Network


class MLP(Network):
    """Two hidden layers of 128 units with ReLU on the flattened input, which may have any shape."""

    takes: ClassVar[tuple[Kind, ...]] = ("series", "images", "clips")

    def __init__(self, input_shape: InputShape, num_outputs: int, *, width: int = 128) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Flatten(),
            nn.Linear(math.prod(input_shape), width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(width, num_outputs)

    def embed(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.features(x)
        return hidden
