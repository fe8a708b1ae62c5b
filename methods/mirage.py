"""Mirage: graphs are distilled into their frequent trees of message passing.

Gupta, Manchanda, Ranu and Bedathur, "Mirage: Model-Agnostic Graph Distillation for Graph Classification", ICLR 2024.

    F_c = { (S, s) : S a set of trees,  s = |{ G of class c : S is a subset of T(G) }| / N_c,  s >= support_c }

T(G) is the set of the trees of L steps of the nodes of G. The distilled set has one sample for each (S, s): the trees
of S side by side, of which networks read out the roots. In a training it is drawn with a probability proportional to s.

    symbol      code
    L           ``depth``
    T(G)        ``Trees.of_nodes``; with ``multiset`` the k-th copy of a tree is an element of its own
    support_c   ``support``; without it the largest one that gives enough sets for the budget
    F_c         ``_frequent`` and ``_maximal``
    s           ``SyntheticSet.weights``, with the share of the class

Deviations: see docs/methods/mirage.md.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from condense.data.graphs import HEADER, decode, encode
from condense.data.layout import Kind
from condense.method import Context, Method, State
from condense.names import installing, spelt
from condense.synthetic.set import SyntheticSet
from condense.task import Task
from condense.train import Training
from condense.trees import Trees

Item = tuple[int, int]
"""The number of a tree, and which of its copies in a graph it is, from 0."""
Items = tuple[Item, ...]
"""A set of trees, in ascending order."""
Pattern = tuple[Items, float]
"""A set of trees and the share of the graphs that have all of them."""

_NUMBER = 2
"""Bytes of a number of a stored graph."""

LOWER = 0.8
"""Factor by which the support falls until there are enough patterns."""

MOST = 100_000
"""Largest number of frequent sets of a class. At a low support there may be one for each subset of a graph's trees."""


@final
@dataclass(frozen=True, kw_only=True)
class Mirage(Method):
    """Mines frequent sets of trees of message passing; needs no gradients and no network."""

    family: ClassVar[str] = "graphs"
    takes: ClassVar[tuple[Kind, ...]] = ("graphs",)
    fills_budget: ClassVar[bool] = False

    num_steps: int = 1
    """The set is made in one step."""
    depth: int = 2
    """Depth of the trees, L: the number of layers whose messages they hold."""
    support: tuple[float, ...] = ()
    """Smallest share of the graphs of a class that have a pattern: one for each class, or one for all. Empty: the
    largest share that gives as many patterns of each class as the budget has graphs."""
    patterns: Literal["all", "maximal"] = "all"
    """Frequent sets to keep: all of them, or those that no larger frequent set contains."""
    multiset: bool = False
    """Whether a tree that occurs several times in a graph counts as often."""
    max_trees: int | None = None
    """Largest number of trees in a pattern; unset: no limit."""
    max_bytes: int | None = None
    """Largest number of bytes of the graphs of a class, of which there are never more than the budget has; unset: no
    limit."""
    balanced: bool = False
    """Whether all classes are drawn equally often in a training; else as often as in the data."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "num_steps", "depth")
        for name, usual in (("max_trees", 3), ("max_bytes", 1000)):
            if (limit := getattr(self, name)) is not None and limit < 1:
                raise ValueError(
                    f"method.{name} must be at least 1, got {limit}; leave it unset, or give "
                    f"{spelt(f'method.{name}', usual)}"
                )
        if not all(0 < share <= 1 for share in self.support):
            raise ValueError(
                f"method.support must be above 0 and at most 1, got {self.support}; "
                f"give {spelt('method.support', (0.1,))}"
            )

    def training(self, task: Task) -> Training:
        return Training(num_epochs=500, batch_size=64, lr=1e-3, weight_decay=0.0, optimiser="adam")

    def init(self, ctx: Context) -> State:
        """Mine the patterns: their number is the size of the set.

        Raises:
            ValueError: a class has no pattern, or mlxtend is not installed.
        """
        task, trees = ctx.task, Trees()
        if len(self.support) not in (0, 1, task.num_classes):
            raise ValueError(
                f"method.support has {len(self.support)} values for {task.num_classes} classes; give one for all, or "
                "one for each class"
            )
        rows, classes, weights = list[Tensor](), list[int](), list[float]()
        for c, members in enumerate(task.train.by_class):
            graphs = [trees.of_nodes(graph, self.depth) for graph in decode(task.train.images[members])]
            chosen = self._chosen(ctx, c, trees, graphs)
            share = 1 / task.num_classes if self.balanced else len(members) / len(task.train)
            total = sum(support for _, support in chosen)
            for items, support in chosen:
                rows.append(encode([trees.graph([tree for tree, _ in items])], task.input_shape[0]))
                classes.append(c)
                weights.append(share * support / total)
        device = task.device
        samples, labels = torch.cat(rows).to(device), torch.tensor(classes, device=device)
        decoder = ctx.new_decoder()
        syn = SyntheticSet(
            ctx.decode.encode(samples, labels, decoder, ctx.rng.generator("decoder")),
            labels,
            ctx.origin,
            decode=ctx.decode,
            decoder=decoder,
            label_kind=ctx.labels,
            weights=torch.tensor(weights, device=device),
        )
        return State(syn=syn)

    def step(self, ctx: Context, state: State, step: int) -> Mapping[str, float]:
        return {"patterns": float(len(state.syn)), "bytes": float(state.syn.cost().images)}

    def _chosen(self, ctx: Context, c: int, trees: Trees, graphs: Sequence[Sequence[int]]) -> list[Pattern]:
        """Return the patterns of a class within the budget, the most frequent first.

        All patterns of a support come before those of a lower one, so what was chosen stays when the support falls.
        Maximal patterns are others at each support, and are chosen anew.
        """
        limit, num, name = ctx.task.input_shape[0], ctx.images_of_class[c], ctx.task.classes[c]
        transactions = [self._items(trees, nodes) for nodes in graphs]
        most = math.inf if self.max_bytes is None else self.max_bytes // _NUMBER
        chosen, room = dict[Items, float](), most
        for share in (self.support[c % len(self.support)],) if self.support else _shares(len(graphs)):
            if self.patterns == "maximal":
                chosen, room = {}, most
            found = self._mined(trees, transactions, share, min(limit, room), name)
            for items, support in found:
                if len(chosen) < num and items not in chosen and (size := HEADER + _size(trees, items)) <= room:
                    chosen[items] = support
                    room -= size
            if len(chosen if self.patterns == "all" else found) >= num:
                break
        if not chosen:
            raise ValueError(
                f"no set of trees of class {name!r} is frequent and fits: trees of depth {self.depth} are too rare, or "
                f"larger than a graph of {limit} numbers; give {spelt('method.depth', 1)}, a smaller support or more "
                "bytes"
            )
        return list(chosen.items())

    def _items(self, trees: Trees, nodes: Sequence[int]) -> list[Item]:
        """Return the items of a graph; trees of one node say nothing about edges and are left out."""
        counts = Counter(tree for tree in nodes if trees.size(tree) > 1)
        return [(tree, copy) for tree, count in counts.items() for copy in range(count if self.multiset else 1)]

    def _mined(
        self, trees: Trees, transactions: Sequence[Sequence[Item]], support: float, room: float, name: str
    ) -> list[Pattern]:
        """Return the patterns of class ``name`` that at least this share of the transactions have, as graphs of at most
        ``room`` numbers: the most frequent first, and then the largest.

        Raises:
            ValueError: there are more than ``MOST``.
        """
        num = len(transactions)
        least = next(count for count in range(1, num + 1) if count / num >= support)
        columns = _columns(transactions, least)
        if self.patterns == "maximal":
            maximal = _maximal(columns, num, least, self.max_trees)
            found = [(items, count) for items, count in maximal if HEADER + _size(trees, items) <= room]
        else:
            sizes = {item: _size(trees, (item,)) for item in columns}
            found = list(itertools.islice(_frequent(columns, least, sizes, room - HEADER, self.max_trees), MOST + 1))
        if len(found) > MOST:
            raise ValueError(
                f"class {name!r} has more than {MOST:,} frequent sets of trees at a support of {support:.2g}; give a "
                f"higher one, e.g. {spelt('method.support', (float(f'{min(1.0, 2 * support):.2g}'),))}, or "
                f"{spelt('method.patterns', 'maximal')} or {spelt('method.max_trees', 3)}"
            )
        patterns = [(items, count / num) for items, count in found]
        return sorted(patterns, key=lambda pattern: (-pattern[1], -len(pattern[0]), pattern[0]))


def _size(trees: Trees, items: Sequence[Item]) -> int:
    """Return the numbers of the row of a set of trees without its header: a node is one number, and an edge two."""
    return sum(3 * trees.size(tree) - 2 for tree, _ in items)


def _shares(num_graphs: int) -> Iterator[float]:
    """Yield supports from 1 down to one graph."""
    share = 1.0
    while share * num_graphs >= 1:
        yield share
        share *= LOWER
    yield 1 / num_graphs


def _columns(transactions: Sequence[Sequence[Item]], least: int) -> dict[Item, int]:
    """Return the items that at least ``least`` transactions have, ascending, with these transactions as bits."""
    columns = Counter[Item]()
    for row, items in enumerate(transactions):
        for item in items:
            columns[item] |= 1 << row
    return {item: rows for item, rows in sorted(columns.items()) if rows.bit_count() >= least}


def _frequent(
    columns: Mapping[Item, int], least: int, sizes: Mapping[Item, int], room: float, max_items: int | None
) -> Iterator[tuple[Items, int]]:
    """Yield the sets of items that at least ``least`` transactions have, with the number of these transactions.

    The search is depth-first and intersects the sets of transactions (Zaki, "Scalable algorithms for association
    mining", 2000). A copy of a tree is only added next to the copy below it, without which no transaction has it, so
    that a multiset is met once.

    Args:
        columns: the transactions of each frequent item, see ``_columns``.
        sizes: the size of each item.
        room: largest size of a set.
        max_items: largest number of items of a set; None: no limit.
    """
    pending = [(Items(), -1, 0.0, list(columns.items()), 0)]
    while pending:
        items, rows, size, others, first = pending.pop()
        if len(items) == max_items:
            continue
        fitting = [
            (other, both)
            for other, of_other in itertools.islice(others, first, None)
            if (both := rows & of_other).bit_count() >= least and size + sizes[other] <= room
        ]
        for i, ((tree, copy), both) in enumerate(fitting):
            if not copy or items[-1:] == ((tree, copy - 1),):
                larger = (*items, (tree, copy))
                yield larger, both.bit_count()
                pending.append((larger, both, size + sizes[tree, copy], fitting, i + 1))


def _maximal(columns: Mapping[Item, int], num: int, least: int, max_items: int | None) -> list[tuple[Items, int]]:
    """Return the frequent sets that no larger one contains, see ``_frequent``; with a copy they have all below it.

    Raises:
        ValueError: mlxtend is not installed.
    """
    try:
        import pandas
        from mlxtend.frequent_patterns import fpmax
    except ImportError as error:
        raise ValueError(
            f"maximal patterns are mined by mlxtend, which is not installed; run: {installing('graphs')}"
        ) from error
    if not columns:
        return []
    items = list(columns)
    table = pandas.DataFrame([[bool(rows >> row & 1) for rows in columns.values()] for row in range(num)])
    found = fpmax(table, min_support=(least - 0.5) / num, max_len=max_items)
    return [
        (tuple(sorted(items[i] for i in members)), round(share * num))
        for share, members in zip(found["support"], found["itemsets"], strict=True)
    ]
