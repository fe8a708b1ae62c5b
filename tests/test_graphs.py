"""Graphs as rows, trees of message passing, and Mirage."""

import dataclasses
import math
import sys
from collections import Counter
from itertools import count, product
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import pytest
import torch

from condense import api, cli, engine
from condense.compute import Compute
from condense.data import datasets
from condense.data.datasets import load
from condense.data.graphs import Graph, batched, decode, encode, read_tu, used_length
from condense.eval.evaluate import check
from condense.eval.metrics import Scores
from condense.eval.protocol import PROTOCOLS
from condense.methods import mirage
from condense.methods.mirage import Mirage
from condense.networks import Functional
from condense.rng import Rng
from condense.sources import Examples
from condense.synthetic.decode import Graphs
from condense.synthetic.files import load as load_set
from condense.synthetic.files import save
from condense.synthetic.set import Origin, SyntheticSet
from condense.task import Split
from condense.train import Trainer
from condense.trees import Trees

pytest.importorskip("torch_geometric")
pytest.importorskip("mlxtend")


def random_graph(seed: int, num_nodes: int = 6, num_labels: int = 2) -> Graph:
    rng = np.random.default_rng(seed)
    pairs = [(u, v) for u in range(num_nodes) for v in range(u + 1, num_nodes) if rng.random() < 0.4]
    codes = torch.from_numpy(rng.integers(0, num_labels, num_nodes))
    return Graph(codes, torch.tensor(pairs, dtype=torch.int64).view(-1, 2))


def write_tu(folder: Path, graphs: list[Graph], classes: list[int], *, labels: bool = True) -> Path:
    """Write graphs as the TU collection stores them: nodes are numbered from 1 through all graphs."""
    folder.mkdir(parents=True)
    name, first = folder.name, 1
    ends, indicator, of_nodes = list[str](), list[str](), list[str]()
    for number, graph in enumerate(graphs, 1):
        for u, v in graph.edges.tolist():
            ends += [f"{first + u}, {first + v}", f"{first + v}, {first + u}"]
        indicator += [str(number)] * len(graph.codes)
        of_nodes += map(str, graph.labels.tolist())
        first += len(graph.codes)
    texts = {"A": ends, "graph_indicator": indicator, "graph_labels": map(str, classes)}
    if labels:
        texts["node_labels"] = of_nodes
    for part, lines in texts.items():
        (folder / f"{name}_{part}.txt").write_text("\n".join(lines) + "\n")
    return folder


def ring(num_nodes: int, label: int) -> Graph:
    ends = [tuple(sorted((i, (i + 1) % num_nodes))) for i in range(num_nodes)]
    return Graph(torch.full((num_nodes,), label), torch.tensor(ends))


def star(num_nodes: int, label: int) -> Graph:
    return Graph(torch.full((num_nodes,), label), torch.tensor([(0, i) for i in range(1, num_nodes)]))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rings (class 0) and stars (class 1) of 4 to 8 nodes."""
    graphs = [make(size, size % 2) for make in (ring, star) for size in (4, 5, 6, 7, 8) for _ in range(4)]
    return write_tu(tmp_path_factory.mktemp("data") / "SHAPES", graphs, [0] * 20 + [1] * 20)


def test_graphs_are_rows_and_back() -> None:
    graphs = [random_graph(seed, num_nodes) for seed, num_nodes in enumerate((6, 3, 1, 8))]
    rows = encode(graphs)
    for graph, again in zip(graphs, decode(rows), strict=True):
        assert torch.equal(graph.codes, again.codes) and torch.equal(graph.edges, again.edges)
    assert used_length(rows).tolist() == [2 + len(graph.codes) + 2 * len(graph.edges) for graph in graphs]
    together = batched(rows)
    assert together.graph.bincount().tolist() == [6, 3, 1, 8]
    first, expected = 0, list[tuple[int, int]]()
    for graph in graphs:
        expected += [(first + u, first + v) for u, v in graph.edges.tolist()]
        first += len(graph.codes)
    both = expected + [(v, u) for u, v in expected]
    assert sorted(map(tuple, together.edges.T.tolist())) == sorted(both)


def test_folders_of_the_tu_collection_are_read(tmp_path: Path) -> None:
    graphs = [random_graph(seed, 5 + seed % 3) for seed in range(12)]
    classes = [(-1, 1)[seed % 2] for seed in range(12)]
    arrays = load(write_tu(tmp_path / "SOME", graphs, classes))
    assert arrays.name == "SOME" and arrays.classes == ("-1", "1") and len(arrays.x_test) == 2
    train = [graph for seed, graph in enumerate(graphs) if seed // 2 % 5 != 4]
    for graph, row in zip(train, decode(torch.from_numpy(arrays.x_train)), strict=True):
        assert torch.equal(graph.codes, row.codes)
        assert torch.equal(graph.edges, row.edges)
    (tmp_path / "SOME" / "SOME_node_attributes.txt").write_text("0.5, 7\n" * sum(len(graph.codes) for graph in graphs))
    assert np.array_equal(load(tmp_path / "SOME").x_train, arrays.x_train), "attributes are not read"
    without = load(write_tu(tmp_path / "PLAIN", graphs, classes, labels=False))
    degrees = train[0].edges.flatten().bincount(minlength=len(train[0].codes))
    assert torch.equal(decode(torch.from_numpy(without.x_train))[0].codes, degrees)
    (tmp_path / "PLAIN" / "PLAIN_node_attributes.txt").write_text(
        "0.5, 7\n" * sum(len(graph.codes) for graph in graphs)
    )
    assert np.array_equal(load(tmp_path / "PLAIN").x_train, without.x_train)


@pytest.mark.parametrize("labels", [True, False])
def test_the_last_graphs_may_have_no_edge(labels: bool, tmp_path: Path) -> None:
    alone = Graph(torch.tensor([1]), torch.zeros(0, 2, dtype=torch.int64))
    graphs = [ring(4, 0), alone, star(4, 1), alone, alone]
    rows, classes, _ = read_tu(write_tu(tmp_path / "SOME", graphs, [0, 1, 0, 1, 1], labels=labels))
    assert classes.tolist() == [0, 1, 0, 1, 1]
    for graph, again in zip(graphs, decode(torch.from_numpy(rows)), strict=True):
        assert sorted(graph.edges.tolist()) == again.edges.tolist() and len(graph.codes) == len(again.codes)


def test_what_an_earlier_reader_cached_is_read_again(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(datasets, "read_tu", lambda path: calls.append(path) or read_tu(path))
    for version, num_calls in ((1, 1), (1, 1), (2, 2), (2, 2)):
        monkeypatch.setattr(datasets, "READER_VERSION", version)
        load(shapes, cache=tmp_path / "cache")
        assert len(calls) == num_calls


@pytest.mark.parametrize("damage", ["graph_labels", "A"])
def test_damaged_folders_are_refused(damage: str, tmp_path: Path) -> None:
    folder = write_tu(tmp_path / "BAD", [ring(4, 0), star(4, 0)], [0, 1])
    (folder / f"BAD_{damage}.txt").write_text("not, numbers\n")
    with pytest.raises(ValueError, match=r"cannot read the graphs in .*BAD"):
        load(folder)


def small_tree(seed: int, num_labels: int) -> tuple[Graph, int]:
    """A random tree of depth 1 to 3, with nodes in random order, and the number of its root."""
    rng = np.random.default_rng(seed)
    codes, edges, leaves = [int(rng.integers(num_labels))], list[tuple[int, int]](), [0]
    for level in range(rng.integers(1, 4)):
        parents, leaves = leaves, []
        for parent in parents:
            for _ in range(rng.integers(0 if level else 1, 3)):
                edges.append((parent, len(codes)))
                leaves.append(len(codes))
                codes.append(int(rng.integers(num_labels)))
    place = torch.from_numpy(rng.permutation(len(codes)))
    return Graph(torch.tensor(codes)[place.argsort()], place[torch.tensor(edges)].sort(1).values), int(place[0])


def seen_from(graph: Graph, root: int, depth: int) -> networkx.Graph:
    """The walks of at most ``depth`` steps from a node that never turn back, as a tree whose root is marked."""
    ends, labels = networkx.Graph(graph.edges.tolist()), graph.labels.tolist()
    ends.add_nodes_from(range(len(labels)))
    tree, walks = networkx.Graph(), [(root,)]
    for walk in walks:
        tree.add_node(walk, label=(labels[walk[-1]], len(walk) == 1))
        if len(walk) > 1:
            tree.add_edge(walk[:-1], walk)
        if len(walk) <= depth:
            walks += [(*walk, end) for end in ends[walk[-1]] if end not in walk[-2:-1]]
    return tree


def isomorphic(one: networkx.Graph, other: networkx.Graph) -> bool:
    return networkx.is_isomorphic(one, other, networkx.algorithms.isomorphism.categorical_node_match("label", None))


def test_trees_have_the_same_number_if_and_only_if_they_are_isomorphic() -> None:
    """Pairs have as many nodes and at most as many labels, and networkx knows nothing of numbers."""
    trees, alike = Trees(), dict[tuple[int, int], list[tuple[int, networkx.Graph]]]()
    for seed in range(1200):
        num_labels = 1 + seed % 2
        graph, root = small_tree(seed, num_labels)
        drawn = trees.of_nodes(graph, 3)[root], seen_from(graph, root, 3)
        alike.setdefault((len(graph.codes), num_labels), []).append(drawn)
    groups = [group for group in alike.values() if len(group) > 1]
    pairs = [pair for group in groups for pair in zip(group, [*group[1:], group[0]], strict=True)]
    assert len(pairs) >= 1000
    answers = [isomorphic(one, other) for (_, one), (_, other) in pairs]
    assert [one == other for (one, _), (other, _) in pairs] == answers
    assert 300 <= sum(answers) <= len(pairs) - 300


def test_the_number_of_a_tree_does_not_depend_on_the_order_of_the_nodes() -> None:
    """Networkx compares the tree that a number stands for with the walks in both graphs."""
    trees, checked = Trees(), 0
    for seed in count():
        if checked >= 1000:
            break
        graph, order = random_graph(seed), torch.from_numpy(np.random.default_rng(seed).permutation(6))
        inverse = order.argsort()
        edges = inverse[graph.edges.flip(0)].sort(1).values
        other = Graph(graph.codes[order], edges)
        numbers, again = trees.of_nodes(graph, 3), trees.of_nodes(other, 3)
        for node, original in enumerate(order.tolist()):
            assert again[node] == numbers[original]
            stored = trees.graph([again[node]])
            if len(stored.codes) > 14:
                continue  # networkx is slow on trees with many equal leaves
            one, same = seen_from(graph, original, 3), seen_from(other, node, 3)
            assert isomorphic(one, same) and isomorphic(one, seen_from(stored, 0, 3))
            checked += 1


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_network_without_normalisation_sees_the_same_in_the_trees_of_a_graph(depth: int) -> None:
    """The mean over the roots of all trees of a graph is the mean over its nodes."""
    graph, trees = random_graph(3, 8), Trees()
    forest = trees.graph(trees.of_nodes(graph, depth))
    rows = encode([graph, forest])
    network = Functional(f"gin:depth={depth},width=8", rows.shape[1:], 2)
    features = network.features(*network.init(Rng(0), "network"), rows, train=False)
    torch.testing.assert_close(features[0], features[1])


Multiset = frozenset[tuple[int, int]]
"""Trees, by number, with their counts."""


def slow_patterns(transactions: list[Counter[int]], support: float, maximal: bool) -> dict[Multiset, float]:
    """All frequent multisets, by counting every one."""
    most = sum(transactions, Counter())
    most = {tree: max(of_graph[tree] for of_graph in transactions) for tree in most}
    found = dict[Multiset, float]()
    for counts in product(*(range(num + 1) for num in most.values())):
        pattern = Counter(dict(zip(most, counts, strict=True)))
        share = sum(pattern <= of_graph for of_graph in transactions) / len(transactions)
        if sum(counts) and share >= support:
            found[frozenset((+pattern).items())] = share
    return {
        one: share
        for one, share in found.items()
        if not maximal or not any(Counter(dict(one)) < Counter(dict(other)) for other in found)
    }


def trees_of(graph: Graph, trees: Trees) -> Multiset:
    """The trees of depth 1 that a distilled graph consists of."""
    parts, labels = networkx.Graph(graph.edges.tolist()), graph.labels.tolist()
    roots = [node for node, code in enumerate(graph.codes.tolist()) if code >= 0]
    below = [[trees.number(labels[child]) for child in parts[root]] for root in roots]
    return frozenset(Counter(trees.number(labels[r], ends) for r, ends in zip(roots, below, strict=True)).items())


@pytest.mark.parametrize("multiset", [False, True])
@pytest.mark.parametrize("patterns", ["maximal", "all"])
def test_patterns_are_the_frequent_sets_of_trees(patterns: str, multiset: bool, shapes: Path, tmp_path: Path) -> None:
    arrays = load(shapes)
    fields = {"depth": 1, "support": (0.2,), "patterns": patterns, "multiset": multiset}
    syn = api.distill("mirage", dataset=arrays, ipc=1000, out=tmp_path / "run", device="cpu", **fields)
    trees = Trees()
    for c in range(2):
        graphs = decode(torch.from_numpy(arrays.x_train[arrays.y_train == c]))
        numbers = [trees.of_nodes(graph, 1) for graph in graphs]
        transactions = [Counter(of_graph if multiset else set(of_graph)) for of_graph in numbers]
        expected = slow_patterns(transactions, 0.2, patterns == "maximal")
        members = syn.index_of(c)
        found = [trees_of(graph, trees) for graph in decode(syn()[0][members])]
        assert len(set(found)) == len(found), "each is listed once"
        total = sum(expected.values())
        weights = dict(zip(found, syn.weights[members].tolist(), strict=True))
        assert weights == pytest.approx({s: 0.5 * share / total for s, share in expected.items()})


@pytest.mark.parametrize("max_items", [None, 2])
@pytest.mark.parametrize("least", [6, 30])
def test_larger_and_larger_sets_are_all_sets(
    least: int, max_items: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxtend.frequent_patterns import fpgrowth

    present = np.random.default_rng(0).random((40, 9)) < np.linspace(0.2, 0.9, 9)
    table, items = mirage._table([[(item, 0) for item in row.nonzero()[0].tolist()] for row in present], least)
    support = (least - 0.5) / 40
    at_once = fpgrowth(table, min_support=support, max_len=max_items)
    monkeypatch.setattr(mirage, "MOST", 2 ** len(items) - 1)
    found = mirage._all(table, items, support, max_items)
    assert len(found) == len(at_once) > 1
    assert dict(found) == {tuple(items[i] for i in sorted(s)): share for share, s in at_once.values.tolist()}
    monkeypatch.setattr(mirage, "MOST", 1)
    assert 1 < len(mirage._all(table, items, support, max_items)) <= len(items), "no larger sets than needed"


@pytest.mark.parametrize(("support", "higher"), [((0.2,), "0.4"), ((), "0.")])
def test_too_many_frequent_sets_are_refused(
    support: tuple[float, ...], higher: str, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a support, 1000 patterns are asked for, and the support falls to a single graph."""
    fields = {"dataset": str(shapes), "ipc": 1000, "device": "cpu", "depth": 1, "multiset": True}
    fewer = api.distill("mirage", out=tmp_path / "all", **fields, support=support)
    monkeypatch.setattr(mirage, "MOST", int(fewer.classes.bincount().max()) - 1)
    advice = rf"support=\({higher}\d*,\), or patterns='maximal' or max_trees=3"
    with pytest.raises(ValueError, match=rf"more than \d+ frequent sets of trees at a support of .*{advice}"):
        api.distill("mirage", out=tmp_path / "run", **fields, support=support)
    for name, mended in (("patterns", "maximal"), ("max_trees", 1)):
        api.distill("mirage", out=tmp_path / name, **fields, support=support, **{name: mended})


def test_bytes_are_filled_with_the_most_frequent_patterns_that_still_fit(shapes: Path, tmp_path: Path) -> None:
    fields = {"dataset": str(shapes), "ipc": 1000, "device": "cpu", "depth": 1}
    whole = api.distill("mirage", out=tmp_path / "whole", **fields)
    trees, sizes = Trees(), [55, 100, 500, 10_000]
    for budget in sizes:
        syn = api.distill("mirage", out=tmp_path / str(budget), **fields, max_bytes=budget)
        for c in range(2):
            expected, left = [], budget
            for row in whole()[0][whole.index_of(c)]:
                size = 2 * int(used_length(row[None]))
                if size <= left:
                    expected.append(trees_of(decode(row[None])[0], trees))
                    left -= size
            found = syn()[0][syn.index_of(c)]
            assert [trees_of(graph, trees) for graph in decode(found)] == expected
            assert 2 * int(used_length(found).sum()) <= budget
    few = api.distill("mirage", out=tmp_path / "few", **fields | {"ipc": 2}, max_bytes=10_000)
    assert few.classes.bincount().tolist() == [2, 2], "the budget of images holds as well"


def test_graphs_of_any_size_are_stored(tmp_path: Path) -> None:
    rows = encode([Graph(torch.arange(2), torch.tensor([[0, 1]]))] * 2, 20_000)
    dataset = {"name": "mine", "fingerprint": "f", "classes": ["a", "b"], "input_shape": [20_000]}
    origin = Origin(dataset=dataset, transform={"kind": "none"})
    save(SyntheticSet(rows.to(torch.int16), torch.arange(2), origin, decode=Graphs()), tmp_path / "set.safetensors")
    assert torch.equal(load_set(tmp_path / "set.safetensors")()[0], rows)


def test_numbers_that_are_too_large_are_refused() -> None:
    rows = encode([Graph(torch.tensor([40_000, 0]), torch.tensor([[0, 1]]))])
    with pytest.raises(ValueError, match="more than 32767 nodes, edges or labels"):
        Graphs().encode(rows, torch.zeros(1), torch.nn.Identity(), torch.Generator())


def test_networks_are_trained_on_a_set_of_frequent_trees(shapes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    api.distill("mirage", dataset=str(shapes), ipc=10, out=run, device="cpu", depth=1)
    assert load_set(run).weights is not None
    short = dataclasses.replace(PROTOCOLS["graphs"], num_epochs=20)
    networks = [f"{name}:width=8,depth=1" for name in ("gin", "gcn", "gat")]
    found = api.evaluate(run, networks=networks, num_seeds=1, protocol=short, baselines=["herding"], device="cpu")
    assert [result.method for result in found.results] == ["mirage"] * 3 + ["herding"] * 3
    buffer = api.make_buffer(str(shapes), networks[0], out=tmp_path / "b", num_experts=1, num_epochs=1, keep="last")
    with pytest.raises(ValueError, match=r"in proportion to weights, .* give labels='online'"):
        api.relabel(run, buffer, epochs=1, augment="none", cutmix=0.0, device="cpu")
    api.distill("random", dataset=str(shapes), ipc=1, out=tmp_path / "random", device="cpu")
    with pytest.raises(ValueError, match=r"labels.cutmix takes .*, not graphs .* give labels=Stored\(cutmix=0\)"):
        api.relabel(tmp_path / "random", buffer, epochs=1, augment="none", device="cpu")
    assert all(0 <= result.metrics["auc"][0] <= 1 for result in found.results)


@pytest.mark.parametrize("budget", [{"fraction": 0.25}, {"ipc": 12, "ipc_policy": "all"}])
def test_selections_of_graphs_can_be_repeated_and_compared(
    budget: dict[str, Any], shapes: Path, tmp_path: Path
) -> None:
    syn = api.distill("random", dataset=str(shapes), out=tmp_path / "run", device="cpu", **budget)
    again = api.distill(tmp_path / "run" / "recipe.yaml", dataset=str(shapes), out=tmp_path / "again", device="cpu")
    assert torch.equal(syn.latents, again.latents)
    short = dataclasses.replace(PROTOCOLS["graphs"], num_epochs=1)
    networks = ["gin:width=8,depth=1"]
    common: dict[str, Any] = {"networks": networks, "num_seeds": 1, "protocol": short, "device": "cpu"}
    _, random = api.evaluate(tmp_path / "run", baselines=["random"], **common).results
    assert random.num_images == len(syn)


def test_applications_and_validation_draw_samples_by_their_weights(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    syn = api.distill("mirage", dataset=str(shapes), ipc=10, out=tmp_path / "run", device="cpu", depth=1)
    seen: list[Any] = []
    source = Trainer.source

    def noted(self: Trainer, images: Any, *args: Any) -> Any:
        seen.append(args[-1])
        return source(self, images, *args)

    monkeypatch.setattr(Trainer, "source", noted)
    common: dict[str, Any] = {"network": "gin:width=8,depth=1", "num_seeds": 1, "device": "cpu"}
    api.apply("continual", tmp_path / "run", num_groups=1, **common)
    api.apply("privacy", tmp_path / "run", num_epochs=1, **common)
    assert syn.weights is not None
    assert all(torch.equal(weights, syn.weights) for weights in seen[:2]) and seen[2:] == [None]
    seen.clear()
    fields: dict[str, Any] = {"ipc": 10, "depth": 1, "split": Split(val_fraction=0.2), "eval_every": 1}
    held_out = api.distill("mirage", dataset=str(shapes), out=tmp_path / "validated", device="cpu", **fields)
    assert held_out.weights is not None
    assert seen and all(torch.equal(weights, held_out.weights) for weights in seen)


def test_networks_for_graphs_are_not_compiled_however_long_they_train() -> None:
    graphs, images = Functional("gin:width=8,depth=1", (30,), 2), Functional("mlp", (1, 8, 8), 2)
    assert images.settled(Compute(), math.inf).compile
    assert graphs.settled(Compute(), math.inf).compile is False


def test_an_attack_on_graphs_measures_no_distances(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, short = tmp_path / "run", {"num_seeds": 1, "num_epochs": 1, "protocol": "graphs"}
    api.distill("mirage", dataset=str(shapes), ipc=2, out=run, device="cpu", depth=1)
    found = api.apply("privacy", run, network="gin:width=4,depth=1", num_members=4, device="cpu", **short)
    assert [row[3:] for row in found.rows] == [("-", "-")] * 2
    assert found.title == "4 members against 4 test graphs, n = 1"
    assert found.record["usual_nearest"] == [] and "nearest" not in found.record["found"]["mirage"]
    for name in ("nas", "probe"):
        with pytest.raises(SystemExit):
            cli.main(["apply", name, str(run)])
        line = capsys.readouterr().err
        assert f"{name} takes series and images and clips, not graphs" in line and line.count("\n") == 1


def test_weights_are_frequencies_in_training_batches() -> None:
    images, weights = torch.arange(3.0)[:, None], torch.tensor([1.0, 2.0, 5.0])
    source = Examples(images, torch.arange(3), Rng(0), batch_size=3, num_classes=3, weights=weights)
    drawn = torch.cat([source.batch(epoch, 0).targets for epoch in range(4000)])
    shares = drawn.bincount(minlength=3) / len(drawn)
    assert (shares - weights / 8).abs().max() < 3 * math.sqrt(0.25 / len(drawn))


def test_a_resumed_run_gives_the_same_bytes(shapes: Path, tmp_path: Path) -> None:
    def stop(syn: SyntheticSet, path: Path) -> None:
        if path.name == "synthetic.safetensors":
            raise KeyboardInterrupt

    fields = {"dataset": str(shapes), "ipc": 3, "device": "cpu"}
    api.distill("mirage", out=tmp_path / "one", **fields)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "save", stop)
        api.distill("mirage", out=tmp_path / "two", **fields)
    api.distill("mirage", out=tmp_path / "two", resume=True, **fields)
    assert '{"event": "resume", "step": 1}' in (tmp_path / "two" / "log.jsonl").read_text()
    files = [(tmp_path / name / "synthetic.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("dm", {}, "method dm takes series and images and clips, not graphs"),
        ("random", {"transform": "zca"}, "whitened"),
        ("mirage", {"support": (0.1, 0.2, 0.3)}, "3 values for 2 classes"),
        ("mirage", {"max_bytes": 10}, "is frequent and fits"),
        ("mirage", {"max_bytes": 0}, "max_bytes must be at least 1, got 0; leave it unset, or give max_bytes=1000"),
        ("mirage", {"max_trees": 0}, "max_trees must be at least 1, got 0; leave it unset, or give max_trees=3"),
        ("random", {"network": "convnet"}, "networks for graphs are"),
        ("random", {"compute": Compute(compile=True)}, "would be compiled anew"),
    ],
)
def test_what_graphs_cannot_have_is_refused(
    method: str, fields: dict, message: str, shapes: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        api.distill(method, dataset=str(shapes), ipc=2, out=tmp_path / "run", device="cpu", **fields)


@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
def test_graphs_are_not_mixed(mixing: str, shapes: Path, tmp_path: Path) -> None:
    syn = api.distill("random", dataset=str(shapes), ipc=2, out=tmp_path / "run", device="cpu")
    line = f"^{mixing} takes series and images and clips, not graphs of shape .*; give "
    protocol = dataclasses.replace(PROTOCOLS["graphs"], **{mixing: 0.5})
    with pytest.raises(ValueError, match=rf"{line}protocol=Protocol\({mixing}=0\)$"):
        check(syn, ["gin"], protocol, 1)
    with pytest.raises(ValueError, match=f"{line}{mixing}=0$"):
        Trainer(Functional("gin", syn.origin.input_shape, 2), protocol, Compute())


def test_mirage_refuses_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="method mirage takes graphs, not images"):
        api.distill(Mirage(), dataset="digits", ipc=1, out=tmp_path / "run", device="cpu")


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(40, 3, generator=generator).round(decimals=1), torch.arange(40) % 3
    p, pairs = logits.double().softmax(1), list[float]()
    for c in range(3):
        inside, outside = p[labels == c, c], p[labels != c, c]
        better = (inside[:, None] > outside).double() + 0.5 * (inside[:, None] == outside).double()
        pairs.append(float(better.mean()))
    assert Scores.of(logits, labels).auc == pytest.approx(sum(pairs) / 3)
    assert Scores.of(logits, torch.zeros(40, dtype=torch.long)).auc is None


@pytest.mark.parametrize("dataset", ["graphs", "network"])
def test_a_missing_package_is_one_line_with_the_command(
    dataset: str, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch_geometric.io", None)
    monkeypatch.setitem(sys.modules, "torch_geometric.nn", None)
    with pytest.raises(ValueError, match=r"PyTorch Geometric is not installed; run: pip install "):
        load(shapes) if dataset == "graphs" else Functional("gin", (40,), 2)


def test_graphs_are_drawn_and_not_exported(shapes: Path, tmp_path: Path) -> None:
    syn = api.distill("random", dataset=str(shapes), ipc=2, out=tmp_path / "run", device="cpu")
    assert (tmp_path / "run" / "synthetic.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="sets of graphs have no other format"):
        api.export_set(syn, tmp_path / "out.npz", "npz")
    assert not (tmp_path / "out.npz").exists()
