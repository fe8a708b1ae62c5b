"""Mirage: graphs are distilled into their frequent trees of message passing.

Gupta, Manchanda, Ranu and Bedathur, "Mirage: Model-Agnostic Graph Distillation for Graph Classification", ICLR 2024.

    F_c = { (S, s) : S a set of trees,  s = |{ G of class c : S is a subset of T(G) }| / N_c,  s >= support_c }

T(G) is the set of the trees of L steps of the nodes of G. The distilled set has one sample for each (S, s): the trees
of S side by side, of which networks read out the roots. In a training it is drawn with a probability proportional to s.

    symbol      code
    L           ``depth``
    T(G)        ``Trees.of_nodes``; with ``multiset`` the k-th copy of a tree is an element of its own
    support_c   ``support``; without it the largest one that gives enough sets for the budget
    F_c         ``_all`` and ``_maximal``
    s           ``SyntheticSet.weights``, with the share of the class

Deviations: see docs/methods/mirage.md.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, final

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

if TYPE_CHECKING:
    import pandas

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
        mine = _maximal if self.patterns == "maximal" else _all
        found = mine(*_table(transactions, least), (least - 0.5) / num, self.max_trees)
        if len(found) > MOST:
            raise ValueError(
                f"class {name!r} has more than {MOST:,} frequent sets of trees at a support of {support:.2g}; give a "
                f"higher one, e.g. {spelt('method.support', (float(f'{min(1.0, 2 * support):.2g}'),))}, or "
                f"{spelt('method.patterns', 'maximal')} or {spelt('method.max_trees', 3)}"
            )
        patterns = [
            (items, share)
            for items, share in found
            if HEADER + _size(trees, items) <= room
            and all(not copy or (tree, copy - 1) in items for tree, copy in items)
        ]
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


def _table(transactions: Sequence[Sequence[Item]], least: int) -> tuple[pandas.DataFrame, list[Item]]:
    """Return which transaction has which item, of the items that at least ``least`` have, and the items of the columns.

    Raises:
        ValueError: pandas is not installed.
    """
    with _required():
        import pandas

    counts = Counter(item for items in transactions for item in items)
    items = sorted(item for item, count in counts.items() if count >= least)
    column = {item: i for i, item in enumerate(items)}
    table = torch.zeros(len(transactions), len(items), dtype=torch.bool)
    for row, present in zip(table, transactions, strict=True):
        row[[column[item] for item in present if item in column]] = True
    return pandas.DataFrame(table.numpy()), items


def _all(table: pandas.DataFrame, items: Sequence[Item], support: float, max_items: int | None) -> list[Pattern]:
    """Return the frequent sets of items by FP-growth, or at least ``MOST`` + 1 of them if there are more.

    FP-growth lists all sets before it returns, so it is asked for larger and larger ones.

    Raises:
        ValueError: mlxtend is not installed.
    """
    with _required():
        from mlxtend.frequent_patterns import fpgrowth
    if 2 ** len(items) > MOST:
        for size in range(1, (max_items or len(items)) + 1):
            found = fpgrowth(table, min_support=support, max_len=size)
            if len(found) > MOST or found["itemsets"].map(len).max() < size:
                return _patterns(found, items)
    return _patterns(fpgrowth(table, min_support=support, max_len=max_items), items) if items else []


def _maximal(table: pandas.DataFrame, items: Sequence[Item], support: float, max_items: int | None) -> list[Pattern]:
    """Return the frequent sets of items that no larger one contains, by FP-max.

    Raises:
        ValueError: mlxtend is not installed.
    """
    with _required():
        from mlxtend.frequent_patterns import fpmax
    return _patterns(fpmax(table, min_support=support, max_len=max_items), items) if items else []


def _patterns(found: pandas.DataFrame, items: Sequence[Item]) -> list[Pattern]:
    return [
        (tuple(sorted(items[i] for i in columns)), float(share))
        for share, columns in zip(found["support"], found["itemsets"], strict=True)
    ]


@contextlib.contextmanager
def _required() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ValueError(f"mirage needs mlxtend, which mines frequent sets; run: {installing('graphs')}") from error
