"""Graphs as rows, trees of message passing, and Mirage."""

import dataclasses
import math
import sys
from itertools import chain, combinations
from pathlib import Path

import networkx
import numpy as np
import pytest
import torch

from condense import api
from condense.compute import Compute
from condense.data import datasets
from condense.data.datasets import load
from condense.data.graphs import Graph, batched, decode, encode, read_tu, used_length
from condense.eval.metrics import Scores
from condense.eval.protocol import PROTOCOLS
from condense.methods.mirage import Mirage
from condense.networks import Functional
from condense.rng import Rng
from condense.sources import Examples
from condense.synthetic.decode import Graphs
from condense.synthetic.files import load as load_set
from condense.synthetic.files import save
from condense.synthetic.set import Origin, SyntheticSet
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
    without = load(write_tu(tmp_path / "PLAIN", graphs, classes, labels=False))
    degrees = train[0].edges.flatten().bincount(minlength=len(train[0].codes))
    assert torch.equal(decode(torch.from_numpy(without.x_train))[0].codes, degrees)


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


def as_networkx(graph: Graph) -> networkx.Graph:
    """A tree whose root is marked."""
    tree = networkx.Graph(graph.edges.tolist())
    for node, code in enumerate(graph.codes.tolist()):
        tree.add_node(node, code=code)
    return tree


def test_trees_have_the_same_number_if_and_only_if_they_are_isomorphic() -> None:
    trees = Trees()
    numbers = list(dict.fromkeys(n for seed in range(60) for n in trees.of_nodes(random_graph(seed), 2)))
    small = [number for number in numbers if trees.size(number) <= 12]
    drawn = [as_networkx(trees.graph([number])) for number in small]
    same = networkx.algorithms.isomorphism.categorical_node_match("code", None)
    pairs = list(combinations(range(len(small)), 2))[:1000]
    assert len(pairs) == 1000
    assert not any(networkx.is_isomorphic(drawn[i], drawn[j], same) for i, j in pairs)


def test_the_number_of_a_tree_does_not_depend_on_the_order_of_the_nodes() -> None:
    """The other direction: 1,000 trees of relabelled graphs have the numbers of the original ones."""
    trees, checked = Trees(), 0
    for seed in range(170):
        graph, order = random_graph(seed), torch.from_numpy(np.random.default_rng(seed).permutation(6))
        inverse = order.argsort()
        other = Graph(graph.codes[order], inverse[graph.edges].sort(1).values)
        expected = [trees.of_nodes(graph, 3)[node] for node in order.tolist()]
        assert trees.of_nodes(other, 3) == expected
        checked += len(expected)
    assert checked >= 1000


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_network_without_normalisation_sees_the_same_in_the_trees_of_a_graph(depth: int) -> None:
    """The mean over the roots of all trees of a graph is the mean over its nodes."""
    graph, trees = random_graph(3, 8), Trees()
    forest = trees.graph(trees.of_nodes(graph, depth))
    rows = encode([graph, forest])
    network = Functional(f"gin:depth={depth},width=8", rows.shape[1:], 2)
    features = network.features(*network.init(Rng(0), "network"), rows, train=False)
    torch.testing.assert_close(features[0], features[1])


def slow_patterns(transactions: list[set[int]], support: float, maximal: bool) -> dict[frozenset[int], float]:
    """All frequent sets, by counting every subset."""
    items = sorted(set().union(*transactions))
    subsets = chain.from_iterable(combinations(items, size) for size in range(1, len(items) + 1))
    counted = {frozenset(s): sum(set(s) <= t for t in transactions) / len(transactions) for s in subsets}
    frequent = {s: share for s, share in counted.items() if share >= support}
    return {s: share for s, share in frequent.items() if not maximal or not any(s < other for other in frequent)}


@pytest.mark.parametrize("patterns", ["maximal", "all"])
def test_patterns_are_the_frequent_sets_of_trees(patterns: str, shapes: Path, tmp_path: Path) -> None:
    arrays = load(shapes)
    fields = {"depth": 1, "support": (0.2,), "patterns": patterns}
    syn = api.distill("mirage", dataset=arrays, ipc=1000, out=tmp_path / "run", device="cpu", **fields)
    trees = Trees()
    for c in range(2):
        graphs = decode(torch.from_numpy(arrays.x_train[arrays.y_train == c]))
        transactions = [set(trees.of_nodes(graph, 1)) for graph in graphs]
        expected = slow_patterns(transactions, 0.2, patterns == "maximal")
        members = syn.index_of(c)
        found = {}
        for graph, weight in zip(decode(syn()[0][members]), syn.weights[members], strict=True):
            roots = [node for node, code in enumerate(graph.codes.tolist()) if code >= 0]
            parts = networkx.Graph(graph.edges.tolist())
            numbers = set()
            for root in roots:
                nodes = sorted(networkx.node_connected_component(parts, root))
                children = [trees.number(int(graph.labels[node])) for node in nodes if node != root]
                numbers.add(trees.number(int(graph.labels[root]), children))
            found[frozenset(numbers)] = float(weight)
        total = sum(expected.values())
        assert found == pytest.approx({s: 0.5 * share / total for s, share in expected.items()})


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
    assert all(0 <= result.metrics["auc"][0] <= 1 for result in found.results)


def test_networks_for_graphs_are_not_compiled_however_long_they_train() -> None:
    graphs, images = Functional("gin:width=8,depth=1", (30,), 2), Functional("mlp", (1, 8, 8), 2)
    assert images.settled(Compute(), math.inf).compile
    assert graphs.settled(Compute(), math.inf).compile is False


def test_weights_are_frequencies_in_training_batches() -> None:
    images, weights = torch.arange(3.0)[:, None], torch.tensor([1.0, 2.0, 5.0])
    source = Examples(images, torch.arange(3), Rng(0), batch_size=3, num_classes=3, weights=weights)
    drawn = torch.cat([source.batch(epoch, 0).targets for epoch in range(4000)])
    shares = drawn.bincount(minlength=3) / len(drawn)
    assert (shares - weights / 8).abs().max() < 3 * math.sqrt(0.25 / len(drawn))


def test_a_resumed_run_gives_the_same_bytes(shapes: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        api.distill("mirage", dataset=str(shapes), ipc=3, out=tmp_path / name, device="cpu")
    files = [(tmp_path / name / "synthetic.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("dm", {}, "method dm takes series and images and clips, not graphs"),
        ("random", {"transform": "zca"}, "whitened"),
        ("mirage", {"support": (0.1, 0.2, 0.3)}, "3 values for 2 classes"),
        ("mirage", {"max_bytes": 10}, "is frequent and fits"),
        ("random", {"network": "convnet"}, "networks for graphs are"),
        ("random", {"compute": Compute(compile=True)}, "would be compiled anew"),
    ],
)
def test_what_graphs_cannot_have_is_refused(
    method: str, fields: dict, message: str, shapes: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        api.distill(method, dataset=str(shapes), ipc=2, out=tmp_path / "run", device="cpu", **fields)


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
