"""Objectives without labels against their twins, and teachers that are trained by them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from condense import api, artifacts
from condense.artifacts import TrainedNetworkSpec, TrajectorySpec
from condense.augment import Augment
from condense.buffers.trajectories import Experts
from condense.compute import Compute
from condense.data import datasets
from condense.data.datasets import Arrays, load
from condense.networks import Functional, without_projector
from condense.probe import ridge_probe
from condense.rng import Rng
from condense.self_supervision import OFF_DIAGONAL, SELF_SUPERVISION, TEMPERATURE, barlow_twins, simclr
from condense.sources import Pairs
from condense.views import Views
from tests.conftest import BATCH
from tests.reference import self_supervision as twin

NAMES = list(SELF_SUPERVISION)


def outputs(num: int = 6, width: int = 5) -> Tensor:
    return torch.randn(2 * num, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def with_gradient(fn: Any, values: Tensor) -> tuple[Tensor, Tensor]:
    values = values.clone().requires_grad_()
    value = fn(values)
    return value.detach(), torch.autograd.grad(value, values)[0]


def test_they_equal_their_twins_with_gradients() -> None:
    twins = {
        "barlow-twins": lambda z: twin.barlow_twins(*z.chunk(2), OFF_DIAGONAL),
        "simclr": lambda z: twin.simclr(*z.chunk(2), TEMPERATURE),
    }
    assert twins.keys() == SELF_SUPERVISION.keys()
    for name, of_twin in twins.items():
        fast = with_gradient(lambda z, name=name: SELF_SUPERVISION[name](z, torch.zeros(0)), outputs())
        for ours, theirs in zip(fast, with_gradient(of_twin, outputs()), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_neither_the_order_of_the_images_nor_that_of_the_views_matters(name: str) -> None:
    first, second = outputs().chunk(2)
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(1))
    loss = SELF_SUPERVISION[name]  # type: ignore[index]
    value = loss(torch.cat([first, second]), first)
    for changed in ((first[order], second[order]), (second, first)):
        torch.testing.assert_close(loss(torch.cat(changed), first), value)
    assert not torch.isclose(loss(torch.cat([first, second[order]]), first), value), "the views are of other images"


def test_their_minima_are_where_the_papers_say() -> None:
    square = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0][:, :3]
    square = torch.linalg.qr(square - square.mean(0))[0]  # three uncorrelated outputs
    assert barlow_twins(torch.cat([square, square])) < 1e-6
    collapsed = square[:, :1].expand(-1, 3)
    assert barlow_twins(torch.cat([collapsed, collapsed])) == pytest.approx(OFF_DIAGONAL * 2, rel=1e-3)
    apart = torch.eye(4, dtype=torch.float64)
    same = torch.ones(4, 4, dtype=torch.float64)
    assert simclr(torch.cat([apart, apart])) < simclr(torch.cat([same, same]))
    assert simclr(torch.cat([same, same])).item() == pytest.approx(torch.tensor(7.0).log().item(), rel=1e-6)


def test_pairs_are_two_views_of_the_same_images() -> None:
    images = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    views = Views(augment=Augment(("resized-crop",), mode="M"))
    source = Pairs(images, torch.arange(10), Rng(0), batch_size=4, views=views)
    assert (source.num_batches, source.batch_size) == (3, 8)
    seen = [source.batch(0, index) for index in range(3)]
    assert [len(batch.images) for batch in seen] == [8, 8, 4]
    assert sorted(torch.cat([b.targets.chunk(2)[0] for b in seen]).tolist()) == list(range(10))
    for batch in seen:
        first, second = batch.images.chunk(2)
        assert torch.equal(*batch.targets.chunk(2)) and not torch.equal(first, second)
    assert torch.equal(source.batch(0, 1).images, seen[1].images), "a batch is a function of its number"
    plain = Pairs(images, torch.arange(10), Rng(0), batch_size=4, views=Views()).batch(0, 0)
    assert torch.equal(*plain.images.chunk(2))


def test_a_projector_shares_the_weights_of_the_network_and_is_dropped_again() -> None:
    network = Functional(BATCH, (1, 8, 8), 3)
    learner = network.with_projector(6)
    whole, own = learner.init(Rng(0), "weights"), network.init(Rng(0), "weights")
    for ours, theirs in zip(without_projector(whole), own, strict=True):
        assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    images = torch.rand(4, 1, 8, 8)
    assert learner.logits(*whole, images).shape == (4, 6)
    z = network.features(*own, images)
    for number in (0, 3):
        z = z @ whole.params[f"hidden.{number}.weight"].T
        z = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt()).relu()
    torch.testing.assert_close(learner.logits(*whole, images), z @ whole.params["classifier.weight"].T)


def test_the_probe_separates_what_a_plane_separates() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.cat([torch.randn(60, 4, generator=generator), torch.full((60, 1), 3.0)], 1)
    labels = (features[:, 0] + features[:, 1] > 0).long()
    predict = ridge_probe(features[:40], labels[:40], 2)
    assert (predict(features[40:]) == labels[40:]).float().mean() > 0.8
    scaled = ridge_probe(100 * features[:40] + 7, labels[:40], 2)
    assert torch.equal(scaled(100 * features[40:] + 7), predict(features[40:]))
    assert ridge_probe(torch.ones(40, 5), labels[:40], 2)(torch.ones(3, 5)).shape == (3,), "equal features tell nothing"


PLAN: dict[str, Any] = {"num_experts": 1, "batch_size": 12, "lr": 0.05, "projector": 8, "compute": Compute(exact=True)}


@pytest.mark.parametrize("objective", NAMES)
def test_a_buffer_without_labels_is_one_of_the_same_network(objective: str, tiny: Arrays, tmp_path: Path) -> None:
    fields = PLAN | {"objective": objective, "num_epochs": 3, "out": tmp_path, "device": "cpu"}
    buffer = artifacts.Trajectories(api.make_buffer(tiny, BATCH, **fields))
    identity = buffer.manifest["identity"]
    assert identity["training"]["objective"] == objective and identity["training"]["projector"] == 8
    assert identity["augment"]["ops"] == ["resized-crop", "color"], "unknown data are not flipped"
    network = Functional(BATCH, tiny.input_shape, 3)
    start, end = (buffer.weights(0, network, epoch) for epoch in (0, 3))
    assert all(
        torch.equal(start.params[f"classifier.{part}"], end.params[f"classifier.{part}"]) for part in ("weight", "bias")
    )
    others = [name for name in start.params if not name.startswith("classifier")]
    assert others and all(not torch.equal(start.params[name], end.params[name]) for name in others if "weight" in name)
    record = buffer.manifest["experts"][0]
    assert len(record["loss"]) == len(record["probe_accuracy"]) == 4 and "train_accuracy" not in record
    permuted = datasets.load((torch.tensor(tiny.x_train), torch.tensor(tiny.y_train).roll(1)))
    others_labels = artifacts.Trajectories(api.make_buffer(permuted, BATCH, **fields | {"out": tmp_path / "permuted"}))
    torch.testing.assert_close(others_labels.weights(0, network, 3).params, end.params, rtol=0, atol=0)


def test_only_features_of_such_a_buffer_are_used(tiny: Arrays, tmp_path: Path) -> None:
    fields = PLAN | {"objective": "barlow-twins", "num_epochs": 1, "out": tmp_path, "device": "cpu"}
    folder = api.make_buffer(tiny, BATCH, **fields)
    identity = {"network": artifacts.read_manifest(folder)["identity"]["network"]}
    assert artifacts.find(tmp_path, TrainedNetworkSpec(identity=identity, features_only=True), "tiny") == folder
    for spec in (TrainedNetworkSpec(identity=identity), TrajectorySpec(identity=identity)):
        with pytest.raises(ValueError, match="barlow-twins trained no classifier; build them with"):
            artifacts.find(tmp_path, spec, "tiny")
    wanted = TrainedNetworkSpec(identity=identity | {"training": {"objective": "simclr"}}, features_only=True)
    with pytest.raises(ValueError, match=r"objective is \"barlow-twins\", not \"simclr\".*--objective simclr"):
        artifacts.find(tmp_path, wanted, "tiny")
    random = api.distill("random", dataset=tiny, ipc=1, out=tmp_path / "run")
    with pytest.raises(ValueError, match="trained no classifier"):
        api.relabel(random, folder)


def test_identities_with_labels_are_what_they_were() -> None:
    assert Experts().identity() == Experts(projector=7).identity()
    assert not {"objective", "projector"} & Experts().identity().keys()
    assert Experts(objective="simclr").identity() != Experts(objective="barlow-twins").identity()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cutmix": 0.5}, "without cutmix; give cutmix=0.0"),
        ({"rho": 0.01}, "without rho; give rho=0.0"),
        ({"projector": 0}, "width of at least 1"),
    ],
)
def test_settings_that_need_labels_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Experts(objective="simclr", **fields)


def test_equal_views_are_refused(tiny: Arrays, tmp_path: Path) -> None:
    fields = PLAN | {"objective": "simclr", "num_epochs": 1, "out": tmp_path, "device": "cpu"}
    with pytest.raises(ValueError, match="without augmentation these are equal; give augment='auto'"):
        api.make_buffer(tiny, BATCH, augment="none", **fields)
    series = load((torch.rand(6, 2, 32), torch.arange(6) % 2), layout="NCL")
    with pytest.raises(ValueError, match="series have no augmentations"):
        api.make_buffer(series, "convnet1d:depth=1,width=4,norm=batch", **fields)


@pytest.mark.parametrize("objective", NAMES)
def test_the_features_of_the_digits_get_better(objective: str, tmp_path: Path) -> None:
    """The network has so few features that random ones are clearly worse than learned ones."""
    plan: dict[str, Any] = {"num_experts": 1, "num_epochs": 5, "lr": 0.1, "momentum": 0.9, "batch_size": 128}
    network = "convnet:depth=2,width=4,norm=batch"
    folder = api.make_buffer("digits", network, objective=objective, projector=128, out=tmp_path, device="cpu", **plan)
    record = artifacts.open_buffer(folder).manifest["experts"][0]
    assert record["loss"][-1] < record["loss"][0]
    assert record["probe_accuracy"][-1] > record["probe_accuracy"][0] + 0.08, record["probe_accuracy"]
