"""Labels by a projector: changes of low rank in a trained encoder, and a head (HeLlO)."""

import dataclasses
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import condense
from condense import api, cli, labelling
from condense.artifacts import Trajectories
from condense.compute import Compute
from condense.data.datasets import Arrays
from condense.eval.protocol import PROTOCOLS
from condense.eval.subject import Subject
from condense.labelling import open_teacher, trained_projector
from condense.networks import Functional, Weights, build
from condense.networks.lowrank import HEAD, Adapted, low_rank
from condense.objective import SquaredDistillation, SquaredError
from condense.rng import Rng
from condense.schedule import CONSTANT
from condense.sources import Examples
from condense.synthetic import Online, Projector, SyntheticSet, save
from condense.synthetic.teaching import StoredProjector
from tests.conftest import BATCH, TINY
from tests.reference import hello as slow

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"rank": 2, "num_teachers": 3, "epochs": 4, "batch_size": 16, "lr": 0.02, "augment": "none"}
CONV = "encoder.features.0.parametrizations.weight"


@pytest.fixture
def syn(tiny: Arrays, tmp_path: Path) -> SyntheticSet:
    return api.distill("random", dataset=tiny, network=TINY, ipc=2, out=tmp_path / "run", device="cpu")


@pytest.fixture(scope="module")
def encoder(tiny: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with BatchNorm, of which only the last epoch is stored."""
    root = tmp_path_factory.mktemp("encoders")
    fields: dict[str, Any] = {"num_experts": 1, "num_epochs": 3, "batch_size": 12, "lr": 0.1, "keep": "last"}
    return api.make_buffer(tiny, BATCH, out=root, compute=Compute(), **fields)


def relabel(syn: SyntheticSet | Path, encoder: Path, weak: Path, tiny: Arrays, **fields: Any) -> SyntheticSet:
    options: dict[str, Any] = {"weak_teachers": weak, "dataset": tiny, "device": "cpu"}
    return condense.relabel(syn, encoder, "projector", **options, **(SMALL | fields))


def reference(network: Functional, weights: Weights) -> tuple[slow.Encoder, Tensor, list[Tensor]]:
    """The encoder, the head and the changes of a projector of the network with BatchNorm."""
    of, norm = network.frozen, "encoder.features.1"
    encoder = slow.Encoder(
        weight=of[f"{CONV}.original"],
        bias=of["encoder.features.0.bias"],
        scale=of[f"{norm}.weight"],
        shift=of[f"{norm}.bias"],
        mean=weights.buffers[f"{norm}.running_mean"],
        var=weights.buffers[f"{norm}.running_var"],
    )
    layers = CONV, "classifier.parametrizations.weight"
    return encoder, of[HEAD], [weights.params[f"{layer}.0.{factor}"] for layer in layers for factor in "ab"]


def labels(syn: SyntheticSet, buffers: Path, images: Tensor) -> Tensor:
    return labelling.teacher_of(syn, buffers, CPU).teacher.labeller(Compute())(images)


def digest(values: Tensor) -> str:
    return hashlib.sha256(values.detach().numpy().tobytes()).hexdigest()


ANSWERS = """
import hashlib, sys, torch
from pathlib import Path
from condense import api, labelling
from condense.compute import Compute

torch.set_num_threads(int(sys.argv[1]))
for file in sys.argv[3:]:
    syn = api.load(file)
    label = labelling.teacher_of(syn, Path(sys.argv[2]), torch.device("cpu")).teacher.labeller(Compute())
    print(hashlib.sha256(label(syn()[0]).detach().numpy().tobytes()).hexdigest())
"""
"""Prints a checksum of the answers to the images of some sets."""


@pytest.mark.parametrize("rank", [1, 3])
def test_a_projector_is_the_encoder_with_changes_of_low_rank(rank: int) -> None:
    base = Adapted(build(BATCH, (1, 8, 8), 3), 3, rank, 2)
    network = low_rank(base, (1, 8, 8), 3, CPU)
    weights, generator = network.init(Rng(0), "changes"), Rng(0).generator("values")
    assert network.num_params == rank * (4 + 9) + 2 * (3 + 64), "of the convolution and of the head"
    images = torch.randn(5, 1, 8, 8, generator=generator)
    before = network.logits(*weights, images, train=False)
    twin, head, changes = reference(network, weights)
    torch.testing.assert_close(before, twin(images, twin.weight, train=False) @ head.T, msg="no change at first")
    for value in weights.params.values():
        value.copy_(torch.randn(value.shape, generator=generator))
    for train in (False, True):
        outputs = network.logits(*weights, images, train=train)
        twin, head, changes = reference(network, weights)
        torch.testing.assert_close(outputs, slow.projector(twin, head, changes, images, train), rtol=1e-4, atol=1e-4)
    assert (outputs - before).abs().min() > 1e-3
    again = network.init(Rng(0), "changes"), network.init(Rng(1), "changes")
    assert torch.equal(again[0].params[f"{CONV}.0.a"], network.init(Rng(0), "changes").params[f"{CONV}.0.a"])
    assert not torch.equal(again[0].params[f"{CONV}.0.a"], again[1].params[f"{CONV}.0.a"])


@pytest.mark.parametrize("name", ["torchvision:resnet18", "vit:depth=1,width=16,heads=2"])
def test_networks_of_any_library_have_changes(name: str) -> None:
    shape, generator = (3, 32, 32), Rng(0).generator("images")
    original = build(name, shape, 3).eval()
    images = torch.randn(2, *shape, generator=generator)
    features = original.embed(images)
    base = Adapted(original, 3, 2, 2)
    network = low_rank(base, shape, 3, CPU)
    weights = network.init(Rng(0), "changes")
    outputs = network.logits(*weights, images, train=False)
    torch.testing.assert_close(outputs, features @ base.frozen()[HEAD].T, rtol=1e-4, atol=1e-4)
    changes = {key: value.clone().requires_grad_() for key, value in weights.params.items()}
    network.logits(changes, weights.buffers, images, train=False).square().sum().backward()
    assert len(changes) > 6
    for key, value in changes.items():
        assert value.grad is not None and bool(value.grad.any()) == key.endswith(".b"), "A has no gradient while B is 0"


def test_the_loss_is_that_of_its_formula() -> None:
    outputs, one, other = torch.randn(3, 5, 3, generator=Rng(0).generator("logits")).unbind()
    classes = torch.tensor([0, 2, 1, 1, 0])
    for weight in (0.0, 0.7):
        objective = SquaredDistillation(class_weight=weight)
        found = objective.loss(outputs, objective.taught((one + other) / 2, classes))
        torch.testing.assert_close(found, slow.loss(outputs, [one, other], classes, weight))
    assert objective.needs_teacher


def test_the_training_agrees_with_the_reference(
    syn: SyntheticSet, tiny: Arrays, encoder: Path, tiny_buffer: Path
) -> None:
    """Mean logits of evenly spaced epochs, the start of the head, the steps and the running statistics."""
    kind, train = Projector(**SMALL, class_weight=0.5), Subject(syn=syn, arrays=tiny, device=CPU).train
    teacher = open_teacher(encoder, syn.origin, CPU)
    found = trained_projector(kind, teacher, tiny_buffer, train, syn.origin)
    assert (found.name, found.network) == (teacher.name, teacher.network)
    assert found.artifacts[1]["epochs"] == [1, 3, 4]
    network, weights = found.teacher
    weak, weak_network = Trajectories(tiny_buffer), Functional(TINY, (1, 8, 8), 3)
    initial = network.init(rng := Rng(0).child("projector"), "changes of low rank")
    twin, head, changes = reference(network, initial)
    images, classes = train.images[torch.arange(36)], train.labels
    torch.testing.assert_close(head, slow.class_means(twin, images, classes, 3))
    source = Examples(images, classes, rng, batch_size=16, num_classes=3)
    batches = [source.batch(epoch, index) for epoch in range(4) for index in range(3)]

    def of_epoch(epoch: int) -> Any:
        return lambda x: weak_network.logits(*weak.weights(0, weak_network, epoch), x, train=False)

    *_, last = slow.train(twin, head, changes, batches, [of_epoch(e) for e in (1, 3, 4)], 0.5, 0.02)
    _, _, trained = reference(network, weights)
    for ours, theirs in zip(trained, last, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(weights.buffers["encoder.features.1.running_var"], twin.var, rtol=1e-3, atol=1e-4)
    assert twin.var is not initial.buffers["encoder.features.1.running_var"]


def test_labels_are_equal_in_another_process(
    syn: SyntheticSet, tiny: Arrays, encoder: Path, tiny_buffer: Path, tmp_path: Path
) -> None:
    made = relabel(syn, encoder, tiny_buffer, tiny)
    named = relabel(syn, encoder, tiny_buffer, tiny, keep_encoder=False)
    images, _ = syn()
    expected = {digest(labels(one, encoder.parent, images)) for one in (made, named)}
    assert len(expected) == 1
    files = [tmp_path / name for name in ("made.safetensors", "named.safetensors")]
    for one, file in zip((made, named), files, strict=True):
        save(one, file)
    words = [sys.executable, "-c", ANSWERS, str(torch.get_num_threads()), str(encoder), *map(str, files)]
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    assert len(shown) == 2 and set(shown) == expected
    again = relabel(syn, encoder, tiny_buffer, tiny)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), made.state_dict().values(), strict=True))
    other = relabel(syn, encoder, tiny_buffer, tiny, seed=1)
    assert not torch.equal(labels(other, encoder, images), labels(made, encoder, images))


def test_the_set_stores_changes_statistics_head_and_encoder(
    syn: SyntheticSet, tiny: Arrays, encoder: Path, tiny_buffer: Path
) -> None:
    kept = (4 + 1 + 1) * 8, 3 * 64 + 9, 4 * 12  # classes; head and statistics; convolution with bias, norm
    for rank, most in ((1, 1), (3, 3), (99, 4)):
        made = relabel(syn, encoder, tiny_buffer, tiny, rank=rank, head_rank=rank)
        named = relabel(syn, encoder, tiny_buffer, tiny, rank=rank, head_rank=rank, keep_encoder=False)
        changes = most * (4 + 9) + min(most, 3) * (3 + 64)
        assert named.cost().labels == kept[0] + 4 * (kept[1] + changes)
        assert made.cost().labels == named.cost().labels + 4 * kept[2]
        assert isinstance(made.provider, StoredProjector) and made.provider.encoder.nbytes == 4 * kept[2]
        params = labelling.teacher_of(made, encoder, CPU).teacher.weights.params
        change = params[f"{CONV}.0.b"] @ params[f"{CONV}.0.a"]
        assert torch.linalg.matrix_rank(change) == min(rank, 4)
    assert [entry["kind"] for entry in made.origin.artifacts] == ["networks", "trajectories"]
    twice = relabel(made, encoder, tiny_buffer, tiny)
    assert len(twice.origin.artifacts) == 2 and torch.equal(twice.latents, syn.latents)


def test_networks_are_trained_on_the_answers_to_their_views(
    syn: SyntheticSet, tiny: Arrays, encoder: Path, tiny_buffer: Path
) -> None:
    made = relabel(syn, encoder, tiny_buffer, tiny)
    of = labelling.teacher_of(made, encoder.parent, CPU)
    source = Examples(*(x.detach() for x in made()), Rng(0), batch_size=3, num_classes=3)
    images, targets = made.provider.source(source, SquaredError(), of.teacher.labeller(Compute())).batch(1, 0)
    network, weights = of.teacher
    twin, head, changes = reference(network, weights)
    torch.testing.assert_close(targets, slow.projector(twin, head, changes, images, False), rtol=1e-4, atol=1e-5)
    plain = twin(images, twin.weight, train=False) @ head.T
    assert (plain - targets).abs().max() > 1e-2, "the changes are applied"
    assert made()[1].tolist() == syn()[1].tolist(), "the set itself has its classes"


@pytest.mark.parametrize("name", ["relabelled", "mse-teacher", "gift"])
def test_evaluations_take_the_labels(
    name: str, syn: SyntheticSet, tiny: Arrays, encoder: Path, tiny_buffer: Path, tmp_path: Path
) -> None:
    made = relabel(syn, encoder, tiny_buffer, tiny)
    named = relabel(syn, encoder, tiny_buffer, tiny, keep_encoder=False)
    plan = dataclasses.replace(PROTOCOLS[name], num_epochs=4)
    options: dict[str, Any] = {"networks": TINY, "num_seeds": 1, "device": "cpu"}
    whole, rival = condense.evaluate(made, tiny, protocol=plan, baselines="k-center", **options).results
    (lent,) = condense.evaluate(named, tiny, protocol=plan, buffers=encoder.parent, **options).results
    assert whole.accuracies == lent.accuracies and whole.metrics["nll"] == lent.metrics["nll"]
    assert whole.teacher == "" and lent.teacher.startswith(encoder.name)
    assert whole.stored_bytes["labels"] == rival.stored_bytes["labels"] == made.cost().labels
    live = condense.relabel(syn, encoder, Online(), device="cpu")
    (other,) = condense.evaluate(live, tiny, protocol=plan, **options).results
    assert other.metrics["nll"] != whole.metrics["nll"]


def test_students_may_learn_from_the_classes_as_well(
    syn: SyntheticSet, tiny: Arrays, encoder: Path, tiny_buffer: Path
) -> None:
    made, found = relabel(syn, encoder, tiny_buffer, tiny), []
    for fields in ({"loss": "mse"}, *({"loss": "mse-distillation", "class_weight": weight} for weight in (0.0, 2.0))):
        plan = dataclasses.replace(PROTOCOLS["mse-teacher"], num_epochs=4, **fields)
        (result,) = condense.evaluate(made, tiny, protocol=plan, networks=TINY, num_seeds=1, device="cpu").results
        found.append(result.metrics["nll"][0])
    assert found[0] == pytest.approx(found[1], rel=1e-5) and abs(found[2] - found[1]) > 1e-4


def test_baselines_get_the_projector_of_the_set(
    syn: SyntheticSet, tiny: Arrays, encoder: Path, tiny_buffer: Path
) -> None:
    made = relabel(syn, encoder, tiny_buffer, tiny)
    assert isinstance(made.label_kind, Projector)
    by = labelling.teacher_of(made, encoder, CPU)
    other = labelling.relabelled(syn, made.label_kind, by)
    assert other.label_kind == made.label_kind and other.origin.artifacts == made.origin.artifacts
    assert all(torch.equal(a, b) for a, b in zip(other.provider.buffers(), made.provider.buffers(), strict=True))


def test_an_encoder_that_is_missing_or_differs_is_refused(
    syn: SyntheticSet, tiny: Arrays, tiny_buffer: Path, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"num_experts": 1, "batch_size": 12, "lr": 0.1, "momentum": 0.0, "schedule": CONSTANT}
    folder = api.make_buffer(tiny, TINY, out=tmp_path / "a", num_epochs=1, **fields)
    named = relabel(syn, folder, tiny_buffer, tiny, keep_encoder=False)
    shutil.copytree(folder, tmp_path / "b" / "moved")
    images, _ = syn()
    assert torch.equal(labels(named, tmp_path / "b", images), labels(named, folder, images))
    with pytest.raises(ValueError, match=r"of the labels is not in .+; give its folder with"):
        labels(named, tmp_path, images)
    assert isinstance(named.label_kind, Projector)
    moved = dataclasses.replace(named.label_kind, network=f"{TINY},pooling=max")
    named.label_kind, right = moved, named.label_kind
    with pytest.raises(ValueError, match=r"the encoder of the labels is .+pooling=max, but .+ is convnet"):
        labels(named, folder, images)
    named.label_kind = right
    with pytest.warns(UserWarning, match="trained again from scratch"):
        api.make_buffer(tiny, TINY, out=tmp_path / "a", num_epochs=2, **fields)
    with pytest.raises(ValueError, match="is not the teacher of the labels any more"):
        labels(named, folder, images)


def test_mistakes_are_one_line(
    syn: SyntheticSet,
    tiny: Arrays,
    tiny_file: Path,
    encoder: Path,
    tiny_buffer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, weak = str(tmp_path / "run"), ["--weak-teachers", str(tiny_buffer)]
    words = ["relabel", run, "--teacher", str(encoder), "--dataset", str(tiny_file), "--device", "cpu"]
    flags = [f"--labels.{key.replace('_', '-')}={value}" for key, value in SMALL.items()]
    projector = ["--labels", "projector"]
    with np.load(tiny_file) as arrays:
        np.savez(other := tmp_path / "other.npz", **{**arrays, "x_train": 255 - arrays["x_train"]})
    for more, complaint in (
        ([*projector], "only the last epoch is stored; build them with"),
        ([*projector, *weak, "--labels.num-teachers", "9"], "num_epochs is 4, less than 9"),
        ([*projector, *weak, "--labels.rank", "0"], "rank, head_rank and num_teachers of at least 1"),
        ([*projector, *weak, "--labels.class-weight", "-1"], "class_weight >= 0"),
        ([*projector, *weak, "--labels.augment", "flip:flips=true"], "is for synthetic ones"),
        ([*projector, *weak, *flags, "--labels.network", "mlp"], "labels.network is mlp, but the network is"),
        ([*projector, *weak, *flags, "--dataset", str(other)], "the set was made from"),
        ([*projector, *flags, "--weak-teachers", str(tmp_path / "none")], "no trajectories for tiny in"),
        ([*weak], "stored labels have no weak teachers"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main([*words, *more])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and complaint in " ".join(error.split()), error
    cli.main([*words, *projector, *weak, *flags])
    out = capsys.readouterr().out
    assert "synthetic-projector.safetensors: projector labels by tiny-convnet" in out and "192 are the encoder" in out
    cli.main(["show", f"{run}/synthetic-projector.safetensors"])
    assert "a projector of the encoder" in " ".join(capsys.readouterr().out.split())
    first = (tmp_path / "run" / "synthetic-projector.safetensors").read_bytes()
    cli.main([*words, *projector, *weak, *flags])
    assert (tmp_path / "run" / "synthetic-projector.safetensors").read_bytes() == first


def test_weak_teachers_may_be_the_trajectory_of_the_encoder(syn: SyntheticSet, tiny: Arrays, tiny_buffer: Path) -> None:
    made = condense.relabel(syn, tiny_buffer, "projector", dataset=tiny, device="cpu", **SMALL)
    assert [entry["name"] for entry in made.origin.artifacts] == [tiny_buffer.name] * 2
