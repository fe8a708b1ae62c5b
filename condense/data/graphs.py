"""Graphs as rows of numbers, so that a set of graphs is an array like any other.

A graph of n nodes and m undirected edges is the row

    n, m, code_1, ..., code_n, u_1, v_1, ..., u_m, v_m, 0, ..., 0

of float32 whole numbers, padded with zeros to the same length. Rows of a data set are ``ROOM`` times as long as its
longest graph, because computation trees, which hold nodes several times, can be larger than any graph.

The code of a node is its label k (0, 1, ...) if the readout of a network uses the node, and -1 - k if it does not. All
nodes of a graph that was read are used; in a computation tree only the root is. u and v are the numbers of the nodes
that an edge joins, from 0, with u < v.

Graphs are read in the format of the TU collection (Morris et al., "TUDataset: A collection of benchmark datasets for
learning with graphs", 2020): a folder with ``NAME_A.txt``, ``NAME_graph_indicator.txt``, ``NAME_graph_labels.txt`` and,
optionally, ``NAME_node_labels.txt``. Without node labels, the label of a node is its degree. Self-loops, edge labels,
directions and attributes are not read.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from condense.data.pixels import Array
from condense.names import excerpt, installing, reason

HEADER = 2
"""Numbers of a row before the codes of the nodes."""

ROOM = 4
"""Length of the rows of a data set, as a multiple of the row of its longest graph."""
READER_VERSION = 2
"""Counts the changes of ``read_tu`` and of its rows: rows in the cache that another version read are read again."""


class Graph(NamedTuple):
    """An undirected graph. ``codes`` (n,) int64 are the codes of its nodes, ``edges`` (m, 2) int64 has u < v."""

    codes: Tensor
    edges: Tensor

    @property
    def labels(self) -> Tensor:
        """The labels of the nodes, (n,)."""
        return label_of(self.codes)


class GraphBatch(NamedTuple):
    """The graphs of a batch as one graph without connections between them."""

    labels: Tensor
    """The labels of all nodes, (V,)."""
    edges: Tensor
    """(2, E): both directions of every edge, as numbers of nodes of the batch."""
    graph: Tensor
    """The number of the graph of each node, (V,)."""
    used: Tensor
    """Whether the readout uses a node, (V,), bool."""


def label_of(codes: Tensor) -> Tensor:
    """Return the labels of nodes with these codes."""
    return torch.where(codes < 0, -1 - codes, codes)


def encode(graphs: Sequence[Graph], length: int | None = None) -> Tensor:
    """Return the rows (N, length) of graphs, float32; by default as long as the longest graph needs."""
    sizes = [HEADER + len(graph.codes) + 2 * len(graph.edges) for graph in graphs]
    rows = torch.zeros(len(graphs), max(sizes) if length is None else length)
    for row, size, graph in zip(rows, sizes, graphs, strict=True):
        header = torch.tensor([len(graph.codes), len(graph.edges)])
        row[:size] = torch.cat([header, graph.codes, graph.edges.flatten()])
    return rows


def decode(rows: Tensor) -> list[Graph]:
    """Return the graphs of rows (N, length)."""
    graphs = []
    for row in rows.long():
        n, m = row[:HEADER].tolist()
        codes, ends = row[HEADER : HEADER + n], row[HEADER + n : HEADER + n + 2 * m]
        graphs.append(Graph(codes, ends.reshape(m, 2)))
    return graphs


def batched(rows: Tensor) -> GraphBatch:
    """Return rows (N, length) as one graph."""
    numbers = rows.long()
    n, m = numbers[:, :1], numbers[:, 1:2]
    position = torch.arange(numbers.shape[1], device=rows.device)
    is_node = (position >= HEADER) & (position < HEADER + n)
    is_end = (position >= HEADER + n) & (position < HEADER + n + 2 * m)
    codes, graph = numbers[is_node], is_node.nonzero()[:, 0]
    first = n[:, 0].cumsum(0) - n[:, 0]
    ends = (numbers[is_end] + first[is_end.nonzero()[:, 0]]).view(-1, 2).T
    return GraphBatch(label_of(codes), torch.cat([ends, ends.flip(0)], 1), graph, codes >= 0)


def used_length(rows: Tensor) -> Tensor:
    """Return the numbers of each of the rows (N, length) that are not padding, (N,) int64."""
    n, m = rows[:, :HEADER].long().unbind(1)
    return HEADER + n + 2 * m


def geometric(module: str, why: str) -> Any:
    """Return a module of PyTorch Geometric. It is imported here without its warnings, which concern its own code.

    Raises:
        ValueError: it is not installed; the message begins with ``why``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(f"torch_geometric.{module}")
    except ImportError as error:
        raise ValueError(f"{why}: PyTorch Geometric is not installed; run: {installing('graphs')}") from error


def is_tu_folder(path: Path) -> bool:
    """Whether a folder holds graphs in the format of the TU collection."""
    return any(path.glob("*_graph_indicator.txt"))


def read_tu(path: Path) -> tuple[Array, Array, tuple[str, ...]]:
    """Read a folder of the TU collection: rows (N, length) float32, classes (N,) int64, and the names of the classes.

    Raises:
        ValueError: PyTorch Geometric is not installed, or the files are damaged.
    """
    read_tu_data = geometric("io", f"cannot read the graphs in {path}").read_tu_data
    indicators = sorted(path.glob("*_graph_indicator.txt"))
    if len(indicators) > 1:
        raise ValueError(f"{path} holds {len(indicators)} sets of graphs: one is needed; give a folder with one")
    prefix = indicators[0].name.removesuffix("_graph_indicator.txt")
    try:
        data, slices, sizes = read_tu_data(str(path), prefix)
        columns = None if data.x is None else data.x[:, sizes["num_node_attributes"] :]
        labels = columns.argmax(1) if columns is not None and columns.shape[1] else None
        names, classes = np.unique(_numbers(path / f"{prefix}_graph_labels.txt"), return_inverse=True)
        bounds = {name: part.tolist() for name, part in slices.items()}
        counts = bounds["x"] if "x" in bounds else np.bincount(_numbers(indicators[0])).cumsum().tolist()
        ends_at = bounds["edge_index"]  # stops at the last graph with an edge
        ends_at += ends_at[-1:] * (len(counts) - len(ends_at))
        graphs = []
        for first, last, start, stop in zip(counts[:-1], counts[1:], ends_at[:-1], ends_at[1:], strict=True):
            ends = data.edge_index[:, start:stop].T
            ends = ends.sort(1).values
            edges = ends[ends[:, 0] < ends[:, 1]].unique(dim=0)
            size = last - first
            degrees = edges.flatten().bincount(minlength=size)
            graphs.append(Graph(degrees if labels is None else labels[first:last], edges))
        rows = encode(graphs)
    except Exception as error:  # a damaged file can raise almost any exception
        raise ValueError(
            f"cannot read the graphs in {path}: {reason(error)}; restore its files {excerpt(prefix)}_*.txt"
        ) from error
    rows = F.pad(rows, (0, (ROOM - 1) * rows.shape[1]))
    return rows.numpy(), classes.astype(np.int64), tuple(map(str, names))


def _numbers(path: Path) -> Array:
    return np.loadtxt(path, dtype=np.int64, ndmin=1)
