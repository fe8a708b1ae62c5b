"""Selection against brute force, and what picking real images implies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from condense import api, engine, registry
from condense.augment import Augment
from condense.compute import Compute
from condense.data.datasets import Arrays, load
from condense.method import Context, Method
from condense.methods.ccs import CCS
from condense.methods.graph_cut import DQ, GraphCut, Similarity, graph_cut
from condense.methods.selection import (
    EL2N,
    FeatureSelection,
    Forgetting,
    Herding,
    KCenter,
    KMeans,
    Random,
    ScoreSelection,
    Selection,
    el2n,
    forgetting_events,
    highest,
    smallest,
)
from condense.networks import Functional, Weights
from condense.recipe import named
from condense.rng import Draws, Rng
from condense.synthetic import Decode, Factor, Hard, Labels, Origin, Pixels
from condense.synthetic.labels import Teacher
from condense.task import Split, make_task
from condense.train import Trainer, Training
from tests.reference import selection as reference

Twin = Callable[[reference.Features, int], list[int]]

COUNTS = (9, 12, 7)
METHODS = [
    Random(),
    Herding(features="pixels"),
    KCenter(features="pixels"),
    KMeans(features="pixels"),
    Forgetting(num_epochs=3),
    EL2N(num_epochs=1, num_networks=2),
    CCS(num_epochs=1, num_networks=2, num_strata=4),
    GraphCut(num_epochs=1),
    DQ(num_epochs=1, num_bins=3),
]


def draw_images(seed: int = 0) -> tuple[Tensor, Tensor]:
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS))
    images = torch.rand(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return images, labels


def make_context(
    images: Tensor,
    labels: Tensor,
    *,
    ipc: int = 3,
    norm: str = "instance",
    decode: Decode | None = None,
    labels_kind: Labels | None = None,
    seed: int = 0,
    fraction: float | None = None,
) -> Context:
    task = make_task(
        load((images, labels)),
        transform="channel",
        split=Split(),
        network=Functional(f"convnet:depth=1,norm={norm},width=8", (1, 8, 8), 3),
        augment=Augment.parse("none"),
        device=torch.device("cpu"),
    )
    origin = Origin(dataset=task.dataset(), transform=task.transform.describe())
    kinds = decode or Pixels(), labels_kind or Hard()
    return Context(task, Rng(seed), ipc, *kinds, Compute(), origin, fraction=fraction)


def select(method: Method, ctx: Context) -> Tensor:
    """The images picked, grouped by class."""
    state = method.init(ctx)
    method.step(ctx, state, 0)
    syn = method.finalize(ctx, state, 1)
    assert syn.classes.tolist() == [c for c in range(3) for _ in range(ctx.ipc)]
    return syn()[0].detach()


def train(
    ctx: Context, num_epochs: int, which: int = 0, on_epoch: Callable[[int, Weights], None] | None = None
) -> Weights:
    """The network that methods train on the real images."""
    task, rng = ctx.task, ctx.rng.child("features", which)
    trainer = Trainer(task.network, Training(num_epochs=num_epochs), ctx.compute)
    start = task.network.init(rng, "network")
    source = trainer.source(task.train.images, task.train.labels, rng, task.augment)
    return trainer.run(start, source, on_epoch=on_epoch)


def same_images(a: Tensor, b: Tensor) -> bool:
    """Whether two stacks hold the same images, in any order."""
    return {x.numpy().tobytes() for x in a} == {x.numpy().tobytes() for x in b}


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_picks_different_real_images_of_each_class(method: Method) -> None:
    ctx = make_context(*draw_images(), ipc=5)
    picked = select(method, ctx)
    for c, images in enumerate(picked.split(5)):
        members = {x.numpy().tobytes() for x in ctx.task.train.images[ctx.task.train.by_class[c]]}
        chosen = {x.numpy().tobytes() for x in images}
        assert len(chosen) == 5
        assert chosen <= members


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_picks_a_fraction_of_each_class(method: Method) -> None:
    assert isinstance(method, Selection)
    ctx = make_context(*draw_images(), fraction=0.5)
    picked, syn = list(method.pick(ctx)), engine.compute(method, ctx)
    assert [len(set(index.tolist())) for index in picked] == [4, 6, 4]
    assert torch.equal(ctx.task.train.labels[torch.cat(picked)], syn.classes)
    assert torch.equal(ctx.task.train.images[torch.cat(picked)], syn()[0])


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_the_whole_class_is_picked_where_it_is_asked_for(method: Method) -> None:
    ctx = make_context(*draw_images(), ipc=min(COUNTS))
    small = COUNTS.index(min(COUNTS))
    picked = select(method, ctx).split(ctx.ipc)[small]
    assert same_images(picked, ctx.task.train.images[ctx.task.train.by_class[small]])


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_more_images_than_a_class_has_are_refused(method: Method) -> None:
    with pytest.raises(ValueError, match=r"class '2' has 7 training images, 8 are needed .* give ipc=7"):
        method.init(make_context(*draw_images(), ipc=8))


@pytest.mark.parametrize(
    ("method", "twin"),
    [(Herding(), reference.herding), (KCenter(), reference.k_center)],
    ids=["herding", "k-center"],
)
@pytest.mark.parametrize("seed", range(5))
def test_picks_what_brute_force_picks(method: FeatureSelection, twin: Twin, seed: int) -> None:
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed))
    assert method.choose(features, 15, seed=0).tolist() == twin(features.double().numpy(), 15)


@pytest.mark.parametrize("seed", range(3))
def test_k_means_picks_the_image_nearest_to_each_centre_of_the_best_partition(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[0.0, 0.0], [20.0, 0.0], [0.0, 20.0]])
    features = centres.repeat_interleave(torch.tensor([2, 4, 3]), 0) + torch.randn(9, 2, generator=generator)
    expected = reference.k_means(features.double().numpy(), 3)
    assert set(KMeans().choose(features, 3, seed=seed).tolist()) == expected


@pytest.mark.parametrize("seed", range(10))
def test_an_image_nearest_to_two_centres_is_picked_once(seed: int) -> None:
    features = torch.tensor([[7.0, 2.0], [4.0, 3.0], [6.0, 6.0], [0.0, 5.0], [4.0, 0.0]])
    assert len(set(KMeans().choose(features, 2, seed=seed).tolist())) == 2


@pytest.mark.parametrize("method", [Herding(), KCenter()], ids=["herding", "k-center"])
def test_equal_images_tie_and_the_lowest_index_wins(method: FeatureSelection) -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert method.choose(features, 4, seed=0).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("method", METHODS[1:3], ids=lambda m: type(m).__name__)
def test_the_order_of_the_training_images_does_not_matter(method: Method) -> None:
    images, labels = draw_images()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))
    picked = select(method, make_context(images, labels))
    shuffled = select(method, make_context(images[order], labels[order]))
    torch.testing.assert_close(picked, shuffled, rtol=0, atol=1e-5)


def test_nothing_is_picked_by_a_network_whose_training_diverged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its features are NaN, and the first image would be the smallest every time."""
    images, labels = draw_images()
    ctx = make_context(images, labels, norm="none")
    monkeypatch.setattr(
        Trainer, "run", lambda self, start, *_, **__: Weights(*({k: t / 0 for k, t in p.items()} for p in start))
    )
    with pytest.raises(ValueError, match=r"the training of convnet:.* diverged; give a network with a norm"):
        select(Herding(num_epochs=3), ctx)


def test_herding_keeps_the_mean_closer_than_a_random_draw() -> None:
    ctx = make_context(*draw_images(), ipc=4)
    means = torch.stack([ctx.task.train.images[members].mean(0) for members in ctx.task.train.by_class])

    def gap(picked: Tensor) -> float:
        return (picked.unflatten(0, (3, 4)).mean(1) - means).norm().item()

    assert gap(select(Herding(features="pixels"), ctx)) < gap(select(Random(), ctx))


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_network_features_are_those_of_a_network_trained_on_the_real_images(norm: str) -> None:
    ctx, method = make_context(*draw_images(), norm=norm), Herding(num_epochs=3)
    task, weights, expected = ctx.task, train(ctx, 3), []
    for members in task.train.by_class:
        features = task.network.features(*weights, task.train.images[members], train=False)
        chosen = reference.herding(features.double().numpy(), ctx.ipc)
        expected.append(task.train.images[members[chosen]])
    assert torch.equal(select(method, ctx), torch.cat(expected))


@dataclass(frozen=True, kw_only=True)
class Given(ScoreSelection):
    """Scores that the test lays down."""

    given: tuple[float, ...]

    def scores(self, ctx: Context) -> Tensor:
        return torch.tensor(self.given)


def test_the_highest_scores_of_each_class_are_kept_and_the_lowest_index_wins_a_tie() -> None:
    images, _ = draw_images()
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
    scores = (1.0, 5.0, 0.0, 3.0, float("inf"), 0.0, 3.0, 9.0, 0.0, 3.0)
    picked = Given(given=scores).pick(make_context(images[:10], labels, ipc=2))
    assert [p.tolist() for p in picked] == [[3, 6], [4, 7], [2, 5]]


def test_the_lowest_indices_win_a_tie_of_many() -> None:
    images = torch.rand(120, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    picked = Given(given=(0.0,) * 120).pick(make_context(images, torch.arange(120) % 3))
    assert [p.tolist() for p in picked] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


@pytest.mark.parametrize("seed", range(5))
def test_scores_that_differ_by_rounding_tie(seed: int) -> None:
    noise = 1e-6 * torch.rand(6, generator=torch.Generator().manual_seed(seed))
    scores = torch.tensor([3.0, 5.0, 3.0, torch.inf, 5.0, torch.inf]) + noise
    assert highest(scores, 5).tolist() == [3, 5, 1, 4, 0]
    assert smallest(scores) == 0 and smallest(-scores[:3]) == 1 and smallest(torch.tensor([2.0, 1.0, 1 + 1e-4])) == 1


def test_scores_that_are_close_together_tie_with_the_best_of_them_only() -> None:
    """Each of a thousand scores is within rounding of the next one, as small errors of many images are."""
    scores = torch.cat([torch.tensor([-1.0]), -8e-6 * torch.arange(1000).flip(0)])
    assert highest(scores, 3).tolist() == [999, 1000, 997]


@pytest.mark.parametrize("method", [Herding(), KCenter(), KMeans()], ids=lambda m: type(m).__name__)
def test_features_that_differ_by_rounding_change_no_pick(method: FeatureSelection) -> None:
    """Twelve images, each of them there three times, as one processor and as another one embeds them."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 5, generator=generator).repeat(3, 1)
    picks = [
        method.choose(features + 1e-6 * torch.randn(features.shape, generator=generator), 6, seed=0).tolist()
        for _ in range(8)
    ]
    assert picks == [picks[0]] * 8 and len(set(picks[0])) == 6


def test_forgetting_events_by_hand() -> None:
    events = {"0111": 0, "1111": 0, "0001": 0, "1000": 1, "0100": 1, "0101": 1, "1010": 2, "0000": torch.inf}
    correct = torch.tensor([[digit == "1" for digit in history] for history in events]).T
    assert forgetting_events(correct).tolist() == list(events.values())


@pytest.mark.parametrize("seed", range(5))
def test_forgetting_picks_what_a_walk_through_the_epochs_picks(seed: int) -> None:
    ctx = make_context(*draw_images())
    correct = torch.rand(7, len(ctx.task.train), generator=torch.Generator().manual_seed(seed)) < 0.4
    picked = Given(given=tuple(forgetting_events(correct).tolist())).pick(ctx)
    for members, index in zip(ctx.task.train.by_class, picked, strict=True):
        assert index.tolist() == members[reference.forgetting(correct[:, members].tolist(), ctx.ipc)].tolist()


def test_el2n_by_hand() -> None:
    probabilities = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0], [0.0, 1.0]])
    found = el2n(probabilities.log(), torch.tensor([0, 1, 0, 0]))
    torch.testing.assert_close(found, torch.tensor([0.5, 0.25, 0.0, 1.0]) * 2**0.5)


@pytest.mark.parametrize("order", ["hardest", "easiest"])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_el2n_picks_by_the_mean_error_of_trained_networks(order: Literal["hardest", "easiest"], norm: str) -> None:
    ctx, method = make_context(*draw_images(), norm=norm), EL2N(num_networks=3, num_epochs=2, order=order)
    task, logits = ctx.task, []
    for k in range(3):
        weights = train(ctx, 2, k)
        logits.append(task.network.logits(*weights, task.train.images[:], train=False).double().numpy())
    expected = []
    for c, members in enumerate(task.train.by_class):
        chosen = reference.el2n([z[members] for z in logits], c, ctx.ipc, order)
        expected.append(task.train.images[members[chosen]])
    assert torch.equal(select(method, ctx), torch.cat(expected))


def test_forgetting_picks_by_what_a_network_in_training_forgets() -> None:
    ctx, correct = make_context(*draw_images(), ipc=4), list[list[bool]]()
    task = ctx.task

    def classify(epochs: int, weights: Weights) -> None:
        found = task.network.logits(*weights, task.train.images[:], train=False).argmax(1)
        correct.append((found == task.train.labels).tolist())

    train(ctx, 12, on_epoch=classify)
    expected = []
    for members in task.train.by_class:
        chosen = reference.forgetting([[epoch[i] for i in members] for epoch in correct], ctx.ipc)
        expected.append(task.train.images[members[chosen]])
    assert 0 < sum(map(sum, correct)) < 12 * len(task.train)
    assert torch.equal(select(Forgetting(num_epochs=12), ctx), torch.cat(expected))


@pytest.mark.parametrize("order", ["hardest", "easiest"])
def test_equal_errors_tie_and_the_lowest_index_wins(order: Literal["hardest", "easiest"]) -> None:
    images, _ = draw_images()
    ctx = make_context(images[:1].repeat(8, 1, 1, 1), torch.tensor([2, 1, 0, 0, 1, 2, 0, 0]), ipc=2)
    picked = EL2N(num_networks=1, num_epochs=1, order=order).pick(ctx)
    assert [p.tolist() for p in picked] == [[2, 3], [1, 4], [0, 5]]


def positions(seed: int) -> tuple[Callable[[int], Draws], reference.Draw]:
    """The same draws for a method and for its twin."""
    rng = Rng(seed)
    return lambda k: rng("draw", k), lambda k, n, m: rng("draw", k).subset(n, m).tolist()


@pytest.mark.parametrize("weight", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_graph_cut_picks_what_brute_force_picks(seed: int, weight: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    features, gradients = torch.rand(24, 6, generator=generator), torch.randn(24, 3, generator=generator)
    joined = torch.cat([gradients, (gradients[:, :, None] * features[:, None]).flatten(1)], 1)
    plain, of_gradients = Similarity.cosine(features), Similarity.cosine(features, gradients)
    assert graph_cut(plain, 12, weight).tolist() == reference.graph_cut(features.double().numpy(), 12, weight)
    assert graph_cut(of_gradients, 12, weight).tolist() == reference.graph_cut(joined.double().numpy(), 12, weight)


@pytest.mark.parametrize("num", [1, 2, 7, 11, 25])
@pytest.mark.parametrize("seed", range(2))
def test_dq_draws_an_equal_share_of_every_bin(seed: int, num: int) -> None:
    features = torch.rand(25, 6, generator=torch.Generator().manual_seed(seed))
    draws, draw = positions(seed)
    picked = DQ(num_bins=4).choose(Similarity.cosine(features), num, draws)
    assert len(picked) == num and set(picked.tolist()) == reference.dq(features.double().numpy(), num, 4, draw)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_graph_cut_compares_the_gradients_of_the_last_layer_of_a_trained_network(norm: str) -> None:
    ctx, expected = make_context(*draw_images(), norm=norm, ipc=5), []
    network, weights, images = ctx.task.network, train(ctx, 2), ctx.task.train.images[:]
    logits = network.logits(*weights, images, train=False).double().numpy()
    features = network.features(*weights, images, train=False).double().numpy()
    for c, members in enumerate(ctx.task.train.by_class):
        gradients = reference.gradients(logits[members], features[members], c)
        expected.append(members[reference.graph_cut(gradients, 5)].tolist())
    assert [index.tolist() for index in GraphCut(num_epochs=2).pick(ctx)] == expected


@pytest.mark.parametrize(("cutoff", "num_strata"), [(0.1, 50), (0.3, 4), (0.0, 1), (0.9, 7)])
@pytest.mark.parametrize("num", [1, 5, 17, 30])
def test_ccs_gives_every_stratum_its_share(num: int, cutoff: float, num_strata: int) -> None:
    scores = torch.rand(30, generator=torch.Generator().manual_seed(num)).square()
    draws, draw = positions(num)
    picked = CCS(cutoff=cutoff, num_strata=num_strata).choose(scores, num, draws)
    expected = reference.ccs(scores.tolist(), num, cutoff, num_strata, draw)
    assert len(picked) == num and set(picked.tolist()) == expected


def test_ccs_by_hand() -> None:
    """Of ten images the two hardest are dropped; the strata [0, 1), [1, 2), [2, 3] have 4, 1 and 3 of the others."""
    scores = torch.tensor([0.0, 0.5, 9.0, 0.25, 2.5, 3.0, torch.inf, 1.5, 0.75, 2.0])
    picked = CCS(cutoff=0.2, num_strata=3).choose(scores, 5, positions(0)[0])
    ranges = [{0, 1, 3, 8}, {7}, {4, 5, 9}]
    assert [len(members & set(picked.tolist())) for members in ranges] == [2, 1, 2]
    never = CCS(score="forgetting", cutoff=0.0, num_strata=3).strata(torch.tensor([0.0, 2.0, torch.inf, 1.0]))
    assert never.tolist() == [0, 2, 2, 1], "an image that is never learned is forgotten once more than any other"
    assert CCS().strata(torch.full((3,), torch.inf)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("score", ["el2n", "forgetting"])
def test_ccs_scores_as_the_methods_of_these_names_do(score: Literal["el2n", "forgetting"]) -> None:
    ctx, fields = make_context(*draw_images(), ipc=4), {"num_epochs": 3}
    scores = (EL2N(num_networks=2, **fields) if score == "el2n" else Forgetting(**fields)).scores(ctx)
    one_of_each = list(CCS(score=score, num_networks=2, cutoff=0.5, num_strata=1, **fields).pick(ctx))
    for c, members in enumerate(ctx.task.train.by_class):
        dropped = highest(scores[members], min(len(members) // 2, len(members) - 4))
        assert set(one_of_each[c].tolist()) <= set(members.tolist()) - set(members[dropped].tolist())


def test_values_that_leave_nothing_to_score_are_refused() -> None:
    with pytest.raises(ValueError, match=r"method\.cutoff must lie in \[0, 1\), got 1\.0; a usual value is 0\.1"):
        CCS(cutoff=1.0)
    with pytest.raises(ValueError, match=r"method\.num_bins must be at least 1, got 0"):
        DQ(num_bins=0)
    with pytest.raises(ValueError, match=r"method\.num_epochs must be at least 2.* got 1"):
        Forgetting(num_epochs=1)
    with pytest.raises(ValueError, match=r"method\.num_networks must be at least 1, got 0"):
        EL2N(num_networks=0)


def test_features_of_many_images_are_made_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx, method = make_context(*draw_images()), KCenter(num_epochs=1)
    whole = select(method, ctx)
    monkeypatch.setattr("condense.methods.selection.BATCH", 4)
    assert torch.equal(select(method, ctx), whole)


@pytest.mark.parametrize("method", [*METHODS[::3], *METHODS[4:], Herding(num_epochs=2)], ids=lambda m: type(m).__name__)
def test_the_seed_decides_and_the_global_generator_is_left_alone(method: Method) -> None:
    before = torch.get_rng_state()
    first, again, other = (select(method, make_context(*draw_images(), seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not same_images(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "name", ["random", "herding", "k-center", "k-means", "forgetting", "el2n", "ccs", "graph-cut", "dq"]
)
def test_the_recipe_says_what_the_method_does_by_default(name: str) -> None:
    method = named(name).method
    assert method == registry.load(name)()


def test_a_decoder_gets_as_many_images_as_it_stores() -> None:
    ctx = make_context(*draw_images(), ipc=1, decode=Factor(factor=2))
    state = (method := Herding(features="pixels")).init(ctx)
    method.step(ctx, state, 0)
    assert state.syn.latents.shape == (3, 1, 8, 8)
    assert state.syn()[0].shape == (12, 1, 8, 8)


@pytest.mark.parametrize("method", [Random(teacher_epochs=8), Herding(features="pixels", teacher_epochs=8)])
@pytest.mark.parametrize("decode", [Pixels(), Factor()])
def test_teacher_labels_are_what_a_trained_network_says_of_the_images(method: Method, decode: Decode) -> None:
    """Of stripes, where a network learns the classes; the images are the same as with hard labels."""
    images, labels = draw_images()
    images = images / 4 + labels[:, None, None, None] / 3
    soft = engine.compute(method, make_context(images, labels, ipc=1, decode=decode, labels_kind=Teacher()))
    hard = engine.compute(method, make_context(images, labels, ipc=1, decode=decode))
    assert torch.equal(soft.latents, hard.latents) and torch.equal(soft.classes, hard.classes)
    targets = soft()[1]
    assert targets.shape == (len(soft()[0]), 3)
    assert torch.allclose(targets.sum(1), torch.ones(len(targets)))
    assert 0.4 < targets.gather(1, hard()[1][:, None]).mean() < 1 - 1e-4


@pytest.fixture
def uneven() -> Arrays:
    """Three classes of 9, 12 and 7 training images, and six test images."""
    images, labels = ((255 * draw_images()[0]).byte().numpy(), draw_images()[1].numpy())
    return load((images, labels, images[:6], labels[[0, 10, 25, 1, 11, 26]]))


@pytest.mark.parametrize(
    ("fraction", "counts"), [(0.5, [4, 6, 4]), (0.3, [3, 4, 2]), (0.01, [1, 1, 1]), (1.0, [9, 12, 7])]
)
def test_a_fraction_is_that_of_each_class(fraction: float, counts: list[int], uneven: Arrays, tmp_path: Path) -> None:
    out, common = tmp_path / "run", {"network": "mlp", "device": "cpu"}
    syn = api.distill("random", dataset=uneven, fraction=fraction, out=out, **common)
    assert syn.classes.bincount().tolist() == counts
    assert len({image.numpy().tobytes() for image in syn()[0].detach()}) == sum(counts)
    assert syn.origin.fraction == fraction and syn.origin.ipc is None and syn.ipc == max(1, sum(counts) // 3)
    rows = api.evaluate(out, uneven, networks="mlp", num_seeds=1, baselines="k-center").results
    assert [row.num_images for row in rows] == [sum(counts)] * 2
    assert f"random, fraction {fraction:g}" in api.report(out).read_text()


def test_a_run_by_a_fraction_is_named_after_it_and_resumed(
    uneven: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, again = (
        api.distill("random", dataset=uneven, fraction=0.5, network="mlp", resume=resume) for resume in (False, True)
    )
    assert torch.equal(first.latents, again.latents)
    (folder,) = Path("runs").iterdir()
    assert folder.name.endswith("-fraction0.5-seed0")
    with pytest.raises(ValueError, match=r"started with fraction = 0\.5, not 0\.4"):
        api.distill("random", dataset=uneven, fraction=0.4, network="mlp", resume=True, out=folder)


@pytest.mark.parametrize(
    ("method", "fields", "line"),
    [
        ("dm", {}, "dm makes equally many images of each class, not a fraction of the real ones; give ipc=10"),
        (
            "random",
            {"decode": "factor"},
            "random stores a fraction of the real images, one in each latent; give decode='pixels'",
        ),
        ("random", {"ipc": 3}, "ipc=3 and fraction=0.5 are two budgets; give one of them"),
    ],
)
def test_what_a_fraction_cannot_be_is_refused(method: str, fields: dict[str, Any], line: str, uneven: Arrays) -> None:
    with pytest.raises(ValueError, match=line):
        api.distill(method, dataset=uneven, fraction=0.5, **fields)
