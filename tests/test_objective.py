"""What networks are trained towards, and sets whose targets are no classes."""

import dataclasses
import math
import typing
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import condense
from condense import picture, recipe, registry, show
from condense.augment import Augment
from condense.compute import Compute
from condense.data.datasets import Arrays
from condense.data.transform import Identity
from condense.exchange import export
from condense.files import read_header, write_tensors
from condense.method import Context
from condense.networks import Functional
from condense.objective import (
    KL,
    OBJECTIVES,
    Cosine,
    CrossEntropy,
    Distillation,
    Gift,
    Objective,
    ObjectiveName,
    SquaredError,
)
from condense.recipe import Recipe
from condense.rng import Rng
from condense.schedule import CONSTANT
from condense.synthetic import DCT, Hard, Logits, Origin, Pixels, SyntheticSet, Targets, Teacher, load, save
from condense.task import Split, Task, make_task
from condense.train import Trainer, Training

TINY = "convnet:depth=1,width=4"
WIDTH = 512
NAMES: tuple[ObjectiveName, ...] = typing.get_args(ObjectiveName)
CPU = torch.device("cpu")


def test_the_table_holds_every_name() -> None:
    assert tuple(OBJECTIVES) == NAMES and all(OBJECTIVES[name].name == name for name in NAMES)
    assert [type(Training(loss=name).objective) for name in NAMES] == [OBJECTIVES[name] for name in NAMES]


def test_losses_are_those_of_their_formulas() -> None:
    outputs, targets = torch.randn(5, 3, generator=Rng(0).generator("outputs")), torch.tensor([0, 2, 1, 1, 0])
    rows = F.one_hot(targets, 3).double()
    z = outputs.double()
    log_p, p = z.log_softmax(1), 0.8 * rows + 0.2 / 3
    expected = {
        CrossEntropy(): -(rows * log_p).sum(1),
        CrossEntropy(label_smoothing=0.2): -(p * log_p).sum(1),
        SquaredError(): 0.5 * (z - rows).square().sum(1),
        KL(temperature=4.0): -(rows * (z / 4).log_softmax(1)).sum(1),
        Cosine(): 1 - (z * rows).sum(1) / z.norm(dim=1),
        Gift(): 1 - (z * rows).sum(1) / z.norm(dim=1),
    }
    for objective, values in expected.items():
        for given in (targets, rows.float()):
            torch.testing.assert_close(objective.loss(outputs, given), values.mean().float(), msg=objective.name)
    soft = p.float()
    torch.testing.assert_close(KL().loss(outputs, soft), (p * (p.log() - log_p)).sum(1).mean().float())
    assert Training(label_smoothing=0.2).objective == CrossEntropy(label_smoothing=0.2)
    assert Training(loss="kl", temperature=4.0).objective == KL(temperature=4.0)


def test_distillation_weighs_a_teacher_against_the_classes() -> None:
    z, t = torch.randn(2, 5, 3, generator=Rng(0).generator("logits"), dtype=torch.double).unbind()
    targets = torch.tensor([0, 2, 1, 1, 0])
    p, log_q = (t / 4).softmax(1), (z / 4).log_softmax(1)
    expected = 0.7 * 16 * (p * (p.log() - log_q)).sum(1) - 0.3 * z.log_softmax(1).gather(1, targets[:, None])[:, 0]
    objective = Training(loss="distillation", temperature=4.0, teacher_weight=0.7).objective
    assert objective == Distillation(temperature=4.0, weight=0.7)
    for given in (targets, F.one_hot(targets, 3).double()):
        torch.testing.assert_close(objective.loss(z, objective.taught(t, given)), expected.mean())
    for name in ("rat-bptt", "dm"):
        reason = registry.load(name)().incompatibility(Pixels(), Hard(), "channel", "distillation")
        assert reason == "does not take the objective distillation; give objective='cross-entropy', the default"


def test_what_a_teacher_gives_is_that_of_the_formulas() -> None:
    """One image at a time, in plain numbers: probabilities at a temperature, the logits, or those that the class
    corrects."""
    logits = torch.randn(4, 3, generator=Rng(1).generator("logits"))
    mixed = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.3, 0.7], [0.0, 1.0, 0.0], [0.5, 0.5, 0.0]])

    def softmax(row: list[float], temperature: float) -> list[float]:
        powers = [math.exp(value / temperature) for value in row]
        return [power / sum(powers) for power in powers]

    def unit(row: list[float]) -> list[float]:
        length = math.sqrt(sum(value * value for value in row))
        return [value / length for value in row]

    def corrected(row: list[float], own: list[float]) -> list[float]:
        smooth = [0.9 * share + 0.1 / 3 for share in own]
        return [a + 0.1 * b for a, b in zip(unit(row), unit(smooth), strict=True)]

    expected: dict[Objective, Callable[[list[float], list[float]], list[float]]] = {
        CrossEntropy(): lambda row, own: softmax(row, 1),
        KL(temperature=20.0): lambda row, own: softmax(row, 20),
        SquaredError(): lambda row, own: row,
        Cosine(): lambda row, own: row,
        Gift(): corrected,
    }
    for targets, owns in ((mixed, mixed), (torch.tensor([2, 0, 1, 0]), F.one_hot(torch.tensor([2, 0, 1, 0]), 3))):
        for objective, of_row in expected.items():
            rows = [of_row(row, own) for row, own in zip(logits.tolist(), owns.tolist(), strict=True)]
            found = objective.taught(logits, targets)
            torch.testing.assert_close(found, torch.tensor(rows), rtol=1e-5, atol=1e-6)
    assert Training(loss="gift", label_smoothing=0.1).objective == Gift(label_smoothing=0.1)


def test_a_recipe_says_its_objective_only_where_it_is_not_the_usual_one() -> None:
    usual = Recipe(method=registry.load("dm")())
    other = dataclasses.replace(usual, objective="cosine")
    assert "objective" not in recipe.to_mapping(usual) and usual.hash("f") != other.hash("f")
    for plan in (usual, other):
        assert recipe.from_mapping(recipe.to_mapping(plan), "mine") == plan
    with pytest.raises(ValueError, match="objective='mae' is unknown"):
        dataclasses.replace(usual, objective="mae")


def test_what_cannot_work_with_an_objective_is_refused_in_one_line(tiny: Arrays, tmp_path: Path) -> None:
    for name in ("mtt", "dc", "frepo"):
        reason = registry.load(name)().incompatibility(Pixels(), Hard(), "channel", "cosine")
        assert reason == "does not take the objective cosine; give objective='cross-entropy', the default"
    bilevel = registry.load("rat-bptt")()
    assert bilevel.incompatibility(Pixels(), Targets(), "channel", "mse") is None
    assert "trains with kl, which cannot use targets" in str(
        bilevel.incompatibility(Pixels(), Targets(), "channel", "kl")
    )
    with pytest.raises(ValueError, match=r"^mtt does not take the objective mse"):
        condense.distill("mtt", dataset=tiny, network=TINY, ipc=1, objective="mse", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("objective", ["cross-entropy", "mse"])
def test_a_run_trains_towards_its_objective(objective: ObjectiveName, tiny: Arrays, tmp_path: Path) -> None:
    options = {"network": TINY, "ipc": 1, "num_steps": 1, "device": "cpu", "out": tmp_path / "run"}
    syn = condense.distill("dd", dataset=tiny, objective=objective, **options)
    assert syn.origin.training["loss"] == objective
    assert syn.origin.recipe.get("objective", "cross-entropy") == objective


def origin(**dataset: object) -> Origin:
    facts = {"name": "tiny", "fingerprint": "f", "input_shape": [1, 8, 8], "target_width": WIDTH}
    return Origin(dataset=facts | dataset, transform={"kind": "none"})


def unlabelled(num: int = 6, **options: object) -> SyntheticSet:
    """Images with features of a teacher instead of classes."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(num, 1, 8, 8, generator=generator)
    targets = torch.randn(num, WIDTH, generator=generator)
    return SyntheticSet(latents, targets, origin(), label_kind=Targets(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", ["cosine", "mse"])
def test_a_network_learns_the_features_of_a_set_without_classes(loss: ObjectiveName, tmp_path: Path) -> None:
    syn = unlabelled()
    save(syn, tmp_path / "set.safetensors")
    again = load(tmp_path / "set.safetensors")
    images, targets = (values.detach() for values in again())
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(syn(), (images, targets), strict=True))
    assert targets.shape == (6, WIDTH) and again.cost().labels == 6 * WIDTH * 4

    network = Functional(TINY, (1, 8, 8), WIDTH)
    training = Training(num_epochs=60, batch_size=6, optimiser="adam", lr=0.02, loss=loss, schedule=CONSTANT)
    start, rng = network.init(Rng(0), "weights"), Rng(0)
    trainer = Trainer(network, training, Compute())
    trained = trainer.run(start, trainer.source(images, targets, rng))
    before, after = (training.objective.loss(network.logits(*w, images), targets) for w in (start, trained))
    assert after < 0.3 * before


def test_a_file_without_classes_says_so_and_has_none(tmp_path: Path) -> None:
    of_one_class = origin(target_width=3, classes=["a"])
    scores = SyntheticSet(torch.zeros(2, 1, 8, 8), torch.ones(2, 3), of_one_class, label_kind=Targets())
    for syn in (unlabelled(), scores):
        file = tmp_path / "set.safetensors"
        save(syn, file)
        assert "classes" not in syn.state_dict() and syn.origin.num_classes == 0
        header = read_header(file)
        assert header["origin"]["dataset"]["target_width"] == syn.origin.target_width
        again = load(file)
        assert again.classes.tolist() == [0] * len(syn) and torch.equal(again.index_of(0), torch.arange(len(syn)))
        with pytest.raises(ValueError, match="target_width"):
            wrong = header | {"origin": header["origin"] | {"dataset": origin(target_width=0).dataset}}
            write_tensors(file, syn.state_dict(), {k: v for k, v in wrong.items() if "sha256" not in k})
            load(file)
        wrong["origin"]["dataset"]["target_width"] = 7
        write_tensors(file, syn.state_dict(), {k: v for k, v in wrong.items() if "sha256" not in k})
        with pytest.raises(ValueError, match=r"provider.values is .* not torch.float32 of \(\d, 7\)"):
            load(file)


@pytest.mark.parametrize("kind", [Hard(), Logits(), Teacher()])
def test_labels_that_need_classes_are_refused_without_them(kind: object) -> None:
    with pytest.raises(ValueError, match=r"a set without classes cannot have .*; give shape \(2, 512\)"):
        SyntheticSet(torch.zeros(2, 1, 8, 8), torch.zeros(2, WIDTH), origin(), label_kind=kind)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"labels of shape \(2,\)"):
        SyntheticSet(torch.zeros(2, 1, 8, 8), torch.zeros(2).long(), origin(), label_kind=Targets())


def test_what_needs_classes_says_so(tiny: Arrays, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    syn, file = unlabelled(), tmp_path / "set.safetensors"
    save(syn, file)
    with pytest.raises(ValueError, match=r"an accuracy needs classes: the targets of this set are 512 values"):
        condense.evaluate(syn, tiny, baselines=["random"], device="cpu")
    for kind in ("folder", "huggingface"):
        with pytest.raises(ValueError, match=f"the format {kind} needs classes"):
            export(syn, Identity(), tmp_path / "out", kind)
    export(syn, Identity(), tmp_path / "out.npz", "npz")
    with np.load(tmp_path / "out.npz") as arrays:
        assert sorted(arrays) == ["images", "layout", "origin", "targets"] and arrays["targets"].shape == (6, WIDTH)
    picture.draw(syn, Identity(), tmp_path / "set.png")
    show.show(file, None, None)
    assert "6 of 1x8x8, targets of 512 values" in capsys.readouterr().out


@pytest.fixture
def task(tiny: Arrays) -> Task:
    network = Functional(TINY, tiny.input_shape, WIDTH)
    split = Split(val_fraction=0.0)
    return make_task(tiny, transform="none", split=split, network=network, augment=Augment(), device=CPU)


@pytest.mark.parametrize("decode", [Pixels(), DCT()])
def test_a_method_makes_a_set_of_targets_as_wide_as_its_network(task: Task, decode: Pixels | DCT) -> None:
    assert (task.network.num_outputs, task.num_classes) == (WIDTH, 3)
    assert task.with_network("mlp").network.num_outputs == 3, "buffers hold networks with an output per class"
    ctx = Context(
        task=task,
        rng=Rng(0),
        ipc=2,
        decode=decode,
        labels=Targets(),
        compute=Compute(),
        origin=Origin(dataset=task.dataset(), transform={"kind": "none"}),
        objective=Cosine(),
    )
    num = 3 * ctx.images_per_class
    images = torch.randn(num, 1, 8, 8, generator=Rng(0).generator("images"))
    targets = torch.randn(num, WIDTH, generator=Rng(0).generator("targets"))
    syn = ctx.new_set(images, targets)
    assert torch.equal(syn()[1].detach(), targets) and syn.origin.target_width == WIDTH
    weights = task.network.init(Rng(0), "weights")
    outputs = task.network.logits(*weights, images)
    assert math.isclose(ctx.loss_fn(weights.params, (images, targets)), Cosine().loss(outputs, targets), rel_tol=1e-6)
    with pytest.raises(ValueError, match=r"give shape \(\d+,\) or \(\d+, 512\)"):
        ctx.new_set(images, targets[:, :3])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_is_traced_as_a_whole(name: str) -> None:
    """Otherwise ``torch.compile`` would run the training step in pieces."""
    objective = OBJECTIVES[name]()
    outputs, classes = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 3
    targets = objective.taught(outputs.flip(0), classes)
    traced = torch.compile(objective.loss, fullgraph=True, backend="eager")
    assert torch.equal(traced(outputs, targets), objective.loss(outputs, targets))
