"""Linear probes of frozen networks: what is trained, what it is compared with, and which networks serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from condense import api, cli
from condense.artifacts import open_buffer
from condense.augment import Augment
from condense.compute import Compute
from condense.data.datasets import Arrays
from condense.eval.applications import Setting
from condense.eval.applications.probe import Probe, backbone, nearest_to_means
from condense.eval.subject import Subject
from condense.method import Optim
from condense.methods.linear_gradient import LinearGradient
from condense.networks import Functional
from condense.probe import linear_classifier
from condense.recipe import Recipe
from condense.rng import Rng
from condense.synthetic import load
from condense.task import Labelled
from condense.train import Training

BACKBONE = "convnet:depth=2,width=4,norm=batch"
OTHER = "convnet:depth=1,width=4"
SHORT: dict[str, Any] = {"num_epochs": 5, "num_seeds": 2}


@pytest.fixture(scope="module")
def backbones(tiny: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("backbones")
    fields: dict[str, Any] = {"num_experts": 1, "num_epochs": 1, "lr": 0.05, "batch_size": 12, "keep": "last"}
    api.make_buffer(tiny, BACKBONE, objective="barlow-twins", projector=8, out=root, device="cpu", **fields)
    api.make_buffer(tiny, OTHER, out=root, device="cpu", **fields)
    return root


@pytest.fixture(scope="module")
def run(tiny_file: Path, backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "lgm"
    method = LinearGradient(num_steps=3, teachers=(BACKBONE,), views=2, grow_every=1, optim=Optim(kind="adam", lr=0.1))
    plan = Recipe(method=method, dataset=str(tiny_file), network="mlp", ipc=1, augment="crop")
    api.run(plan, api.RunOptions(out=out, buffers=backbones, device="cpu"))
    return out


def folder_of(backbones: Path, network: str) -> str:
    (found,) = (p for p in backbones.iterdir() if open_buffer(p).manifest["identity"]["network"].count(network))
    return str(found)


def test_a_set_is_probed_beside_real_images_on_every_network(run: Path, backbones: Path) -> None:
    other = folder_of(backbones, "depth=1")
    found = api.apply("probe", run, backbones=(str(backbones), other), full_epochs=30, lr=0.5, **SHORT)
    names = ["linear-gradient", "3 random images", "3 images nearest to the class means", "all 36 images"]
    assert [row[0] for row in found.rows] == names
    assert found.columns == ("trained on", "convnet:depth=2,norm=batch,width=4", "convnet:depth=1,width=4")
    probes = found.record["probes"]
    for name in names:
        for cell in probes[name].values():
            assert cell["n"] == len(cell["accuracies"]) == 2 and cell["std"] >= 0
    assert all(cell["mean"] > 0.9 for cell in probes["all 36 images"].values()), "brightness tells the classes apart"
    written = json.loads((run / "apply-probe.json").read_text())
    assert written["probes"] == json.loads(json.dumps(probes))
    again = api.apply("probe", run, backbones=(str(backbones),), lr=0.5, **SHORT)
    key = next(iter(again.record["backbones"]))
    assert again.record["probes"]["linear-gradient"][key] == probes["linear-gradient"][key]


def test_the_accuracy_is_that_of_a_training_written_out(run: Path, backbones: Path, tiny: Arrays) -> None:
    """Adam on the cross-entropy of a linear classifier, with the views of every epoch and a cosine of the rate."""
    subject = Subject(syn=load(run), arrays=tiny, device=torch.device("cpu"))
    plan, compute = Probe(num_epochs=7, num_seeds=1, lr=5.0), Compute(exact=True)
    opened = backbone(subject, backbones)
    name, accuracy = next(plan._accuracies(Setting(subject=subject, compute=compute), opened))
    assert name == "linear-gradient"
    rng, augment = Rng(0).child("probe", 0), Augment.parse("crop")
    network, (params, buffers) = opened.teacher
    images, labels = subject.decoded(soft=False)
    weights = Functional(linear_classifier, (1, 16), 3).init(rng, "weights").params.values()
    weight, bias = (param.clone().requires_grad_() for param in sorted(weights, key=lambda p: -p.dim()))
    assert weight.std().item() == pytest.approx(0.01, rel=0.3) and not bias.any()
    adam = torch.optim.Adam([weight, bias])
    views = rng.child("training")
    for epoch in range(7):
        adam.param_groups[0]["lr"] = Probe()._plan(3, 7).lr_at(epoch, 1) * 5000
        order = views("order", epoch).permutation(3)
        drawn = augment.sample(views("augment", epoch, 0), 3, (1, 8, 8), siamese=False)
        seen = augment.apply(images[order], drawn)
        features = network.features(params, buffers, seen, train=False).detach()
        adam.zero_grad()
        torch.nn.functional.cross_entropy(features @ weight.T + bias, labels[order]).backward()
        adam.step()
    test = network.features(params, buffers, subject.test.images[:], train=False)
    right = ((test @ weight.T + bias).argmax(1) == subject.test.labels).float().mean().item()
    assert accuracy == pytest.approx(right)


def test_the_plan_of_the_published_evaluation() -> None:
    plan = Probe()._plan(1000, 1000)
    assert isinstance(plan, Training) and (plan.optimiser, plan.weight_decay, plan.batch_size) == ("adam", 0.0, 100)
    assert plan.lr == pytest.approx(0.001 * 100 / 256) and plan.lr_at(9999, 10) < 1e-9
    assert Probe()._plan(10, 1000).lr == pytest.approx(0.001 * 10 / 256)


def test_the_nearest_images_are_those_nearest_to_the_mean_of_their_class() -> None:
    features = torch.tensor([[0.0], [10.0], [1.0], [5.0], [7.0], [30.0]])
    images = Labelled(features, torch.tensor([0, 1, 0, 0, 1, 1]))  # means 2 and 15.67
    assert nearest_to_means(features, images.by_class, [1, 2]).tolist() == [2, 1, 4]


def test_networks_that_serve_are_of_the_same_data(run: Path, backbones: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no networks for tiny in .*empty: there are none; build them with"):
        api.apply("probe", run, backbones=(str(tmp_path / "empty"),), **SHORT)
    api.distill("random", dataset="digits", ipc=1, out=tmp_path / "digits", device="cpu")
    with pytest.raises(ValueError, match="two of the backbones are one buffer"):
        api.apply("probe", run, backbones=(str(backbones), str(backbones)), **SHORT)
    with pytest.raises(ValueError, match=r"no networks for digits .* where dataset is"):
        api.apply("probe", tmp_path / "digits", backbones=(str(backbones),), **SHORT)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"baselines": ["random"]}, r"probe makes its own comparisons; give baselines=\(\)"),
        ({"num_seeds": 0}, "must be at least 1"),
        ({"lr": 0.0}, "lr positive"),
        ({"backbones": ()}, r"probe needs the folder of a frozen network; give backbones=\('artifacts',\)"),
        ({"augment": "turn"}, "unknown operation 'turn'"),
    ],
)
def test_what_makes_no_sense_is_refused(run: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        api.apply("probe", run, **fields)


def test_the_command(run: Path, backbones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["apply", "probe", str(run), "--backbones", str(backbones), "--num-epochs", "2", "--num-seeds", "1"]
    cli.main([*words, "--augment", "none", "--out", str(tmp_path / "probe.json")])
    assert "3 images nearest to the class means" in capsys.readouterr().out
    assert json.loads((tmp_path / "probe.json").read_text())["num_epochs"] == 2
