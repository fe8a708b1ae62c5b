"""Networks for graphs: GCN, GAT and GIN, with the layers of PyTorch Geometric.

Kipf and Welling, "Semi-Supervised Classification with Graph Convolutional Networks", ICLR 2017 (GCN); Velickovic et
al., "Graph Attention Networks", ICLR 2018 (GAT); Xu et al., "How Powerful are Graph Neural Networks?", ICLR 2019 (GIN).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from condense.data.graphs import batched, geometric
from condense.data.layout import InputShape, Kind
from condense.networks.base import Network


def _layers() -> Any:
    return geometric("nn", "cannot build a network for graphs")


class GNN(Network):
    """Node features from a table of labels, message passing with ReLU, and the mean over the nodes that are read out.

    ``labels`` rows of the table are learned; larger labels share the last one.
    """

    takes: ClassVar[tuple[Kind, ...]] = ("graphs",)

    def __init__(
        self, input_shape: InputShape, num_outputs: int, *, width: int = 128, depth: int = 3, labels: int = 256
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(labels, width)
        self.layers = nn.ModuleList([self.layer(width) for _ in range(depth)])
        self.classifier = nn.Linear(width, num_outputs)

    @abstractmethod
    def layer(self, width: int) -> nn.Module:
        """Return a layer ``layer(x (V, width), edges (2, E)) -> (V, width)``."""

    def embed(self, x: Tensor) -> Tensor:
        graphs = batched(x)
        nodes = self.table(graphs.labels.clamp(max=self.table.num_embeddings - 1))
        for layer in self.layers:
            nodes = layer(nodes, graphs.edges).relu()
        total = nodes.new_zeros(len(x), nodes.shape[1] + 1)
        counted = torch.cat([nodes, nodes.new_ones(len(nodes), 1)], 1) * graphs.used[:, None]
        total = total.index_add(0, graphs.graph, counted)
        return total[:, :-1] / total[:, -1:].clamp(min=1)


class GCN(GNN):
    """Graph convolutions with the symmetrically normalised adjacency matrix."""

    def layer(self, width: int) -> Any:
        return _layers().GCNConv(width, width)


class GAT(GNN):
    """Graph attention with four heads."""

    def layer(self, width: int) -> Any:
        return _layers().GATConv(width, width, heads=4, concat=False)


class GIN(GNN):
    """Sums over neighbours, followed by two linear layers."""

    def layer(self, width: int) -> Any:
        return _layers().GINConv(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)))
