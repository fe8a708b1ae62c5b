"""Rooted trees of message passing: what a network of L layers sees of a graph from one node.

The tree of a node v is the universal cover of the graph up to L steps away: v has its neighbours as children, and a
node that was reached from u has all its neighbours except u as children. In a graph network of L layers without
normalisation by degree, v has the same output in this tree as in the graph. Two trees are isomorphic, as rooted trees
with labels, if and only if they have the same number, since children are sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from condense.data.graphs import Graph


class Trees:
    """Numbers trees: equal trees have the same number, and different ones have different numbers."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[int, tuple[int, ...]], int] = {}
        self._trees: list[tuple[int, tuple[int, ...]]] = []
        self.size = cache(self._size)

    def number(self, label: int, children: Sequence[int] = ()) -> int:
        """Return the number of the tree with this label at its root and these trees, by number, below it."""
        tree = label, tuple(sorted(children))
        if tree not in self._numbers:
            self._numbers[tree] = len(self._trees)
            self._trees.append(tree)
        return self._numbers[tree]

    def of_nodes(self, graph: Graph, depth: int) -> list[int]:
        """Return the number of the tree of each node of a graph, ``depth`` >= 1 steps deep."""
        labels, neighbours = graph.labels.tolist(), [list[int]() for _ in graph.codes]
        for u, v in graph.edges.tolist():
            neighbours[u].append(v)
            neighbours[v].append(u)
        below = {(u, v): self.number(labels[v]) for u, ends in enumerate(neighbours) for v in ends}
        for _ in range(depth - 1):
            below = {(u, v): self.number(labels[v], [below[v, w] for w in neighbours[v] if w != u]) for u, v in below}
        return [self.number(labels[v], [below[v, u] for u in ends]) for v, ends in enumerate(neighbours)]

    def graph(self, trees: Sequence[int]) -> Graph:
        """Return the disjoint union of trees; networks read out their roots only."""
        codes, edges = list[int](), list[tuple[int, int]]()
        for tree in trees:
            pending = [(tree, -1)]
            while pending:
                number, parent = pending.pop()
                label, children = self._trees[number]
                node = len(codes)
                codes.append(label if parent < 0 else -1 - label)
                if parent >= 0:
                    edges.append((parent, node))
                pending += [(child, node) for child in children]
        return Graph(torch.tensor(codes), torch.tensor(edges, dtype=torch.int64).view(-1, 2))

    def _size(self, tree: int) -> int:
        """Return the number of nodes of a tree."""
        return 1 + sum(self.size(child) for child in self._trees[tree][1])
