"""A network with a projector in place of its classifier, as objectives without labels train it."""

from __future__ import annotations

from torch import Tensor, nn

from condense.networks.base import Network


class Projected(Network):
    """A network whose features pass through three linear layers, the first two with BatchNorm and a ReLU.

    Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML 2021. No layer has a bias.
    ``network`` keeps its classifier, which gets no gradient.
    """

    def __init__(self, network: Network, width: int) -> None:
        super().__init__()
        self.network = network
        self.hidden = nn.Sequential(
            *(nn.Linear(network.classifier.in_features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()),
        )
        self.classifier = nn.Linear(width, width, bias=False)

    def embed(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.hidden(self.network.embed(x))
        return hidden
