"""Labels of views: what is stored, what networks are then trained on, and what it costs."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import condense
from condense import api, cli, commands, labelling, recipe
from condense.compute import Compute
from condense.data.datasets import Arrays
from condense.eval import results
from condense.eval.evaluate import evaluate
from condense.eval.protocol import PROTOCOLS, Protocol
from condense.eval.subject import Subject
from condense.networks import Functional
from condense.objective import KL, SquaredError
from condense.rng import Rng
from condense.schedule import CONSTANT
from condense.sources import Examples, Source
from condense.synthetic import Factor, Hard, Online, Stored, SyntheticSet, Teacher, ViewLabels, load, save
from condense.synthetic.teaching import StoredTable
from tests.conftest import BATCH, TINY

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"epochs": 4, "batch_size": 4, "cutmix": 0.5}
SHORT = {name: dataclasses.replace(PROTOCOLS[name], num_epochs=4) for name in ("canonical", "relabelled")}


@pytest.fixture
def syn(tiny: Arrays, tmp_path: Path) -> SyntheticSet:
    return api.distill("random", dataset=tiny, network=TINY, ipc=2, out=tmp_path / "run", device="cpu")


@pytest.fixture(scope="module")
def buffer(tiny: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("teachers")
    fields: dict[str, Any] = {"num_experts": 1, "num_epochs": 2, "batch_size": 12, "lr": 0.1, "keep": "last"}
    return api.make_buffer(tiny, TINY, out=root, **fields)


@pytest.fixture(scope="module")
def another(tiny: Arrays, buffer: Path) -> Path:
    """A buffer of another architecture, in the same folder."""
    fields: dict[str, Any] = {"num_experts": 1, "num_epochs": 2, "batch_size": 12, "lr": 0.1, "keep": "last"}
    return api.make_buffer(tiny, BATCH, out=buffer.parent, **fields)


def teacher_logits(buffer: Path, images: Tensor, architecture: str = TINY) -> Tensor:
    network = Functional(architecture, (1, 8, 8), 3)
    from condense.artifacts import open_buffer

    return network.logits(*open_buffer(buffer).weights(0, network), images, train=False)


def batches(source: Source, num_epochs: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    for epoch in range(num_epochs):
        for index in range(source.num_batches):
            images, targets = source.batch(epoch, index)
            yield epoch, index, images, targets


def examples(syn: SyntheticSet, seed: int) -> Examples:
    """The batches that a training draws from its own seed."""
    with torch.no_grad():
        images, targets = syn()
    return Examples(images, targets, Rng(seed), batch_size=3, num_classes=3)


@pytest.mark.parametrize("decode", ["pixels", "factor"])
def test_stored_labels_are_the_answers_of_the_teacher_to_the_same_views(
    decode: str, tiny: Arrays, buffer: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"out": tmp_path / "run", "device": "cpu", "decode": decode}
    syn = api.distill("dm", dataset=tiny, network=TINY, ipc=2, num_steps=1, batch_real=6, **options)
    kind = Stored(**SMALL, augment="crop_flip:flips=true", seed=3)
    made = condense.relabel(syn, buffer, kind, device="cpu")
    save(made, tmp_path / "set.safetensors")
    again = load(tmp_path / "set.safetensors")
    num = 6 * (4 if decode == "factor" else 1)
    assert again.cost().labels == 4 * 2 * num * 3 * 2 + 6 * 8 and again.label_kind == made.label_kind
    one, other = (again.provider.source(examples(again, seed), KL(temperature=2.0)) for seed in (0, 1))
    seen = []
    for (_, _, images, targets), (_, _, same, _) in zip(batches(one, 6), batches(other, 6), strict=True):
        assert torch.equal(images, same), "the views do not depend on the seed of a network"
        expected = (teacher_logits(buffer, images) / 2.0).softmax(1)
        torch.testing.assert_close(targets, expected, rtol=0, atol=1e-3)
        seen.append(images)
    assert torch.equal(seen[0], seen[4 * one.num_batches]) and not torch.equal(seen[0], seen[one.num_batches])
    raw = again.provider.source(examples(again, 0), SquaredError()).batch(1, 0)
    torch.testing.assert_close(raw.targets, teacher_logits(buffer, raw.images), rtol=1e-2, atol=1e-2)
    assert again()[1].tolist() == syn()[1].tolist(), "the set itself has its classes"


def test_a_field_that_stored_labels_replace_is_refused(tiny: Arrays, buffer: Path, tmp_path: Path) -> None:
    syn = api.distill("random", dataset=tiny, network=TINY, ipc=2, out=tmp_path / "run", device="cpu")
    fields: dict[str, Any] = {"networks": TINY, "num_seeds": 1, "device": "cpu"}
    other = dataclasses.replace(SHORT["relabelled"], batch_size=5)
    stored, online = (condense.relabel(syn, buffer, kind, device="cpu") for kind in (Stored(**SMALL), Online()))
    with pytest.raises(ValueError, match=r"protocol\.batch_size has no effect, because the set stores labels"):
        condense.evaluate(stored, tiny, protocol=other, **fields)
    (found,) = condense.evaluate(online, tiny, protocol=other, **fields).results
    assert found.changed["batch_size"] == 5


def test_a_share_of_the_epochs_is_drawn_by_a_key() -> None:
    few = Stored(epochs=50, keep=0.1, seed=1)
    assert few.num_stored == len(set(few.stored_epochs)) == 5 and max(few.stored_epochs) < 50
    assert few.stored_epochs == Stored(epochs=50, keep=0.1, seed=1).stored_epochs
    assert few.stored_epochs != Stored(epochs=50, keep=0.1, seed=2).stored_epochs != list(range(5))
    assert Stored(epochs=5).stored_epochs == [0, 1, 2, 3, 4] and Stored(epochs=2, keep=0.01).num_stored == 1


def test_kept_epochs_have_their_views_and_labels(syn: SyntheticSet, buffer: Path) -> None:
    made = condense.relabel(syn, buffer, Stored(**SMALL | {"epochs": 8, "seed": 2}, keep=0.25), device="cpu")
    kind = made.label_kind
    assert isinstance(kind, Stored) and kind.stored_epochs not in ([0, 1], [0, 2])
    source = made.provider.source(examples(made, 0), SquaredError())
    views = kind.views(*made(), num_classes=3)
    for epoch, index, images, targets in batches(source, 4):
        assert torch.equal(images, views.batch(kind.stored_epochs[epoch % 2], index).images)
        torch.testing.assert_close(targets, teacher_logits(buffer, images), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("fields", "bytes_per_view", "error"),
    [
        ({}, 2 * 300, 1e-3),
        ({"precision": "int8"}, 300 + 2, 1 / 250),
        ({"top_k": 5}, 5 * (2 + 2) + 2, None),
        ({"top_k": 5, "precision": "int8"}, 5 * (1 + 2) + 2 + 2, None),
    ],
)
def test_logits_are_stored_to_the_precision_of_their_type(
    fields: dict[str, Any], bytes_per_view: int, error: float | None
) -> None:
    kind, classes = Stored(epochs=2, augment="none", **fields), torch.zeros(7, dtype=torch.long)
    table = kind.provider(classes, 300, (1, 8, 8), 1)
    assert isinstance(table, StoredTable)
    logits = 10 * torch.randn(2, 7, 300, generator=Rng(0).generator("logits"))
    for k in range(2):
        table.fill(k, logits[k])
    table.check()
    assert sum(t.nbytes for t in table.state_dict().values()) == 2 * 7 * bytes_per_view + 7 * 8
    for k in range(2):
        found = table.logits(k, torch.tensor([6, 0]))
        rows = logits[k, [6, 0]]
        if error is not None:
            assert (found - rows).abs().max() <= error * rows.abs().max()
            continue
        for row, wanted in zip(found, rows, strict=True):
            order = wanted.argsort(descending=True)
            torch.testing.assert_close(row[order[:5]], wanted[order[:5]], rtol=0, atol=float(wanted.max()) / 250)
            torch.testing.assert_close(row[order[5:]], wanted[order[5:]].mean().expand(295), rtol=1e-3, atol=1e-3)


def test_labels_that_cannot_be_stored_are_refused(syn: SyntheticSet, buffer: Path) -> None:
    table = Stored(epochs=1, augment="none").provider(torch.arange(3), 3, (1, 8, 8), 1)
    assert isinstance(table, StoredTable)
    for value in (1e6, float("nan")):
        with pytest.raises(ValueError, match="not finite or too large"):
            table.fill(0, torch.full((3, 3), value))
    for fields, complaint in (
        ({"top_k": 3}, r"labels.top_k is 3, but there are 3 classes"),
        ({"teacher": "another@0123"}, r"labels.teacher is another@0123, but the teacher is tiny-convnet"),
        ({"network": "mlp"}, r"labels.network is mlp, but the network is convnet:depth=1,width=4"),
        ({"keep": 0.0}, "keep above 0"),
        ({"epochs": 0}, "epochs from 1 to"),
        ({"cutmix": 2.0}, "cutmix between 0 and 1"),
        ({"augment": "fly"}, "fly"),
    ):
        with pytest.raises(ValueError, match=complaint) as raised:
            condense.relabel(syn, buffer, Stored(**SMALL | fields), device="cpu")
        assert "\n" not in str(raised.value)
    for kind in (Hard(), Teacher(), "hard"):
        with pytest.raises(ValueError, match="of the kinds stored, online and projector, not"):
            condense.relabel(syn, buffer, kind, device="cpu")


def test_a_teacher_of_other_data_is_refused(syn: SyntheticSet, tiny: Arrays, buffer: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no networks for tiny in .+: there are none"):
        condense.relabel(syn, tmp_path, device="cpu")
    held_out = api.distill(
        "random", dataset=tiny, network=TINY, ipc=1, split=condense.api.Split(val_fraction=0.25), out=tmp_path / "b"
    )
    with pytest.raises(ValueError, match=r"split.val_fraction is 0.0, not 0.25, .+; build them with"):
        condense.relabel(held_out, buffer, device="cpu")


def test_a_teacher_travels_with_the_set_or_is_named_by_it(
    syn: SyntheticSet, tiny: Arrays, buffer: Path, tmp_path: Path
) -> None:
    whole, named = (condense.relabel(syn, buffer, Online(keep_weights=keep), device="cpu") for keep in (True, False))
    network = Functional(TINY, (1, 8, 8), 3)
    assert whole.cost().labels == 6 * 8 + 4 * network.num_params and named.cost().labels == 6 * 8
    found = []
    for i, made in enumerate((whole, named)):
        save(made, tmp_path / f"{i}.safetensors")
        again = load(tmp_path / f"{i}.safetensors")
        of = labelling.teacher_of(again, buffer.parent if made is named else tmp_path / "nowhere", CPU)
        assert of.name == again.label_kind.teacher  # type: ignore[attr-defined]
        source = again.provider.source(examples(again, 0), SquaredError(), of.teacher.labeller(Compute()))
        for _, _, images, targets in batches(source, 2):
            torch.testing.assert_close(targets, teacher_logits(buffer, images))
        kwargs: dict[str, Any] = {"networks": TINY, "num_seeds": 1, "protocol": SHORT["relabelled"], "device": "cpu"}
        found += condense.evaluate(again, tiny, buffers=buffer.parent, **kwargs).results
    assert found[0].accuracies == found[1].accuracies
    assert (found[0].teacher, found[1].teacher) == ("", named.label_kind.teacher)  # type: ignore[attr-defined]
    with pytest.raises(
        ValueError, match=r"the teacher tiny-convnet.+ of the labels is not in .+; give its folder with"
    ):
        condense.evaluate(named, tiny, buffers=tmp_path, **kwargs)


def test_several_teachers_label_by_the_mean_of_their_logits(
    syn: SyntheticSet, tiny: Arrays, buffer: Path, another: Path, tmp_path: Path
) -> None:
    stored, named = Stored(**SMALL, seed=3), Online(keep_weights=False)
    options: dict[str, Any] = {"networks": "mlp", "num_seeds": 1, "protocol": SHORT["relabelled"], "device": "cpu"}
    singles = sorted(condense.relabel(syn, one, named, device="cpu").label_kind.teacher for one in (buffer, another))  # type: ignore[attr-defined]

    def mean(images: Tensor) -> Tensor:
        return (teacher_logits(buffer, images) + teacher_logits(another, images, BATCH)) / 2

    for kind in (stored, named):
        made, turned = (
            condense.relabel(syn, pair, kind, device="cpu") for pair in ([buffer, another], [another, buffer])
        )
        for file, one in (("a", made), ("b", turned)):
            save(one, tmp_path / file)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes(), "the order does not matter"
        again = load(tmp_path / "a")
        assert again.label_kind.teacher == " + ".join(singles)  # type: ignore[attr-defined]
        assert [entry["name"] for entry in again.origin.artifacts] == [one.partition("@")[0] for one in singles]
        of = labelling.teacher_of(again, buffer.parent, CPU)
        source = again.provider.source(examples(again, 0), SquaredError(), of.labeller(Compute()))
        for _, _, images, targets in batches(source, 2):
            torch.testing.assert_close(targets, mean(images), rtol=1e-2, atol=1e-2)
            assert (targets - teacher_logits(buffer, images)).abs().max() > 0.05, "the teachers differ"
        own, rival = condense.evaluate(again, tiny, buffers=buffer.parent, baselines="random", **options).results
        assert own.teacher == rival.teacher == (again.label_kind.teacher if kind is named else "")  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=r"the teacher tiny-convnet.+ of the labels is not in .+; give its folder"):
            condense.evaluate(again, tiny, buffers=buffer, baselines="random", **options)


def test_mixes_of_teachers_that_cannot_label_are_refused(syn: SyntheticSet, buffer: Path, another: Path) -> None:
    pair = [buffer, another]
    for teachers, labels, fields, complaint in (
        (pair, "online", {}, r"online labels cannot be the mean of 2 teachers, .*keep_weights=False"),
        (pair, "projector", {}, "projector labels cannot be the mean of 2 teachers"),
        (pair, "projector", {"keep_encoder": False}, "projector labels cannot be the mean of 2 teachers"),
        ([buffer, buffer], "stored", {}, r"the teacher tiny-convnet.+ is given twice; give different ones"),
        ([], "stored", {}, "labels of views need a teacher; give teacher"),
    ):
        with pytest.raises(ValueError, match=complaint) as raised:
            condense.relabel(syn, teachers, labels, device="cpu", **fields)
        assert "\n" not in str(raised.value)


def test_a_changed_buffer_is_not_the_teacher(tiny: Arrays, syn: SyntheticSet, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"num_experts": 1, "batch_size": 12, "lr": 0.1, "momentum": 0.0, "schedule": CONSTANT}
    folder = api.make_buffer(tiny, TINY, out=tmp_path, num_epochs=1, **fields)
    named = condense.relabel(syn, folder, Online(keep_weights=False), device="cpu")
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved / "under another name")
    assert labelling.teacher_of(named, moved, CPU).name == named.label_kind.teacher  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match="trained again from scratch"):
        assert api.make_buffer(tiny, TINY, out=tmp_path, num_epochs=2, **fields) == folder
    with pytest.raises(ValueError, match="is not the teacher of the labels any more"):
        labelling.teacher_of(named, folder, CPU)


def test_a_file_is_replaced_only_by_a_file_of_its_kind(syn: SyntheticSet, buffer: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = condense.relabel(run, buffer, device="cpu", **SMALL)
    file = run / "synthetic-stored.safetensors"
    assert load(file).label_kind == first.label_kind and load(run).label_kind == Hard()
    second = condense.relabel(run, buffer, device="cpu", **SMALL | {"seed": 1})
    assert load(file).label_kind == second.label_kind != first.label_kind
    artifacts = load(file).origin.artifacts
    assert [entry["name"] for entry in artifacts] == [buffer.name] and artifacts[0]["use"] == "labels"
    twice = condense.relabel(file, buffer, device="cpu", out=tmp_path / "twice.safetensors", **SMALL)
    assert len(twice.origin.artifacts) == 1
    other = tmp_path / "other.safetensors"
    shutil.copy(buffer / "expert_0000.safetensors", other)
    before = other.read_bytes()
    with pytest.raises(ValueError, match="exists already and is no set"):
        condense.relabel(run, buffer, device="cpu", out=other, **SMALL)
    assert other.read_bytes() == before


def test_hard_and_soft_labels_in_one_evaluation(
    syn: SyntheticSet,
    tiny: Arrays,
    buffer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Baselines get the labels of the set, by its teacher; hard labels count as classes alone."""
    made = condense.relabel(syn, buffer, device="cpu", **SMALL | {"epochs": 60})
    kwargs: dict[str, Any] = {"networks": TINY, "num_seeds": 2, "device": "cpu", "buffers": buffer.parent}
    found = condense.evaluate(
        made, tiny, protocol=list(SHORT.values()), baselines=["k-center", "full"], out=tmp_path / "r.json", **kwargs
    ).results
    assert [(r.method, r.protocol) for r in found] == [
        ("random", "canonical*"),
        ("random", "relabelled*"),
        ("k-center", "canonical*"),
        ("k-center", "relabelled*"),
        ("full", "full-data"),
    ]
    sizes = [r.stored_bytes["labels"] for r in found[:4]]
    assert sizes == [48, made.cost().labels] * 2 and made.cost().labels > made.cost().images
    assert found[1].protocol_fields["batch_size"] == 4 and found[1].protocol_fields["cutmix"] == 0.5
    assert found[1].protocol_hash == SHORT["relabelled"].hash
    hard = condense.evaluate(syn, tiny, protocol=SHORT["canonical"], **kwargs).results[0]
    assert hard.accuracies == found[0].accuracies and hard.stored_bytes == found[0].stored_bytes
    assert (hard.stored_bits, found[1].stored_bits) == (found[0].stored_bits, made.num_bits)
    monkeypatch.setenv("COLUMNS", "200")
    commands.print_results([r.row() for r in found], together=True)
    shown = capsys.readouterr().out
    assert shown.count("n = 2 networks per cell") == 1 and "1.54 kB + 48 B" in shown
    assert {"canonical*", "relabelled*", "full-data"} <= set(shown.split())
    assert len(results.read_complete(tmp_path / "r.json")) == 5


def test_baselines_are_labelled_by_the_same_teacher(
    syn: SyntheticSet, tiny: Arrays, buffer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, seen = condense.relabel(syn, buffer, device="cpu", **SMALL), list[SyntheticSet]()
    spied = api.evaluation.evaluate
    monkeypatch.setattr("condense.eval.baselines.evaluate", lambda subject, **_: seen.append(subject.syn))
    monkeypatch.setattr(api.evaluation, "evaluate", lambda *args, **kwargs: spied(*args, **kwargs))
    kwargs: dict[str, Any] = {"networks": TINY, "num_seeds": 1, "device": "cpu", "buffers": buffer.parent}
    for budget in ("images", "bytes"):
        protocol = SHORT["relabelled"]
        condense.evaluate(made, tiny, protocol=protocol, baselines=["random", "k-center"], budget=budget, **kwargs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="random-soft has labels of its own, and here the teacher of the set"):
        condense.evaluate(made, tiny, protocol=SHORT["relabelled"], baselines="random-soft", **kwargs)
    assert len(seen) == 4 and all(one.label_kind == made.label_kind and one.cost() == made.cost() for one in seen)
    source = seen[1].provider.source(examples(seen[1], 0), SquaredError())
    images, targets = source.batch(2, 0)
    torch.testing.assert_close(targets, teacher_logits(buffer, images), rtol=1e-2, atol=1e-2)


def test_a_set_without_labels_of_views_is_refused(syn: SyntheticSet, tiny: Arrays) -> None:
    for name in ("relabelled", "mse-teacher", "gift"):
        with pytest.raises(
            ValueError, match=rf"the protocol {name} needs labels by a teacher .+ has hard labels: label"
        ):
            condense.evaluate(syn, tiny, protocol=name, device="cpu")


def test_the_protocols_are_what_was_published() -> None:
    relabelled, squared, gift = (PROTOCOLS[name] for name in ("relabelled", "mse-teacher", "gift"))
    for plan in (relabelled, squared, gift):
        assert (plan.optimiser, plan.lr, plan.momentum, plan.labels) == ("adamw", 1e-3, 0.9, "teacher")
    assert (relabelled.num_epochs, relabelled.weight_decay, relabelled.objective) == (300, 0.01, KL(temperature=20.0))
    assert relabelled.lr_at(150, 1) == pytest.approx(1e-3 * (1 + 2**-0.5) / 2)
    assert (squared.num_epochs, squared.weight_decay, squared.loss) == (1000, 1e-4, "mse")
    assert [squared.lr_at(epoch, 1) for epoch in (666, 667, 834)] == pytest.approx([1e-3, 2e-4, 4e-5])
    assert (gift.weight_decay, gift.loss, gift.label_smoothing) == (1e-4, "gift", 0.1)


@pytest.mark.parametrize("name", ["relabelled", "mse-teacher", "gift"])
def test_every_protocol_of_a_teacher_trains_on_stored_labels_as_on_the_live_ones(
    name: str, syn: SyntheticSet, tiny: Arrays, buffer: Path
) -> None:
    """The teacher of the protocol, which is given as a folder, sees the views of another seed; with no views at all the
    accuracies agree."""
    plan = dataclasses.replace(PROTOCOLS[name], num_epochs=3, augment="none", cutmix=0.0, order="stored", batch_size=6)
    made = condense.relabel(syn, buffer, Stored(epochs=1, augment="none", cutmix=0.0, batch_size=6), device="cpu")
    kwargs: dict[str, Any] = {"networks": TINY, "num_seeds": 1, "device": "cpu"}
    as_labelled = dataclasses.replace(plan, order="shuffled")
    (stored,) = condense.evaluate(made, tiny, protocol=as_labelled, **kwargs).results
    by_folder = dataclasses.replace(plan, teacher=str(buffer))
    (live,) = condense.evaluate(syn, tiny, protocol=by_folder, **kwargs).results
    assert stored.accuracies == live.accuracies
    torch.testing.assert_close(
        torch.tensor(stored.metrics["nll"]), torch.tensor(live.metrics["nll"]), rtol=1e-3, atol=0
    )
    assert live.teacher == made.label_kind.teacher and stored.teacher == ""  # type: ignore[attr-defined]


def test_a_folder_is_recorded_by_what_it_holds(syn: SyntheticSet, tiny: Arrays, buffer: Path, tmp_path: Path) -> None:
    shutil.copytree(buffer, tmp_path / "copy")
    hashes = set()
    for folder in (buffer, tmp_path / "copy"):
        plan: Protocol = dataclasses.replace(SHORT["relabelled"], teacher=str(folder))
        (result,) = condense.evaluate(syn, tiny, protocol=plan, networks="mlp", num_seeds=1, device="cpu").results
        hashes.add(result.protocol_hash)
        assert result.protocol_fields["teacher"] == result.teacher and result.teacher.startswith(f"{buffer.name}@")
    assert len(hashes) == 1
    with pytest.raises(ValueError, match="networks for tiny"):
        other = dataclasses.replace(tiny, fingerprint={**tiny.fingerprint, "train": "0" * 64})
        moved = dataclasses.replace(syn.origin, dataset={**syn.origin.dataset, "fingerprint": "0" * 64})
        syn.origin = moved
        condense.evaluate(syn, other, protocol=plan, networks="mlp", num_seeds=1, device="cpu")


def test_the_commands_say_what_labels_cost(
    syn: SyntheticSet, tiny_file: Path, buffer: Path, another: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    flags = ["--labels.epochs", "4", "--labels.batch-size", "4", "--device", "cpu"]
    cli.main(["relabel", run, "--teacher", str(buffer), *flags])
    out = capsys.readouterr().out
    assert "synthetic-stored.safetensors: stored labels by tiny-convnet" in out and "labels 192 bytes" in out
    assert "times the bytes of the images" not in out
    cli.main(["relabel", run, "--teacher", str(buffer), *flags, "--labels.epochs", "400"])
    assert "the labels take 9.41 times the bytes of the images" in capsys.readouterr().out
    file = str(tmp_path / "run" / "synthetic-stored.safetensors")
    cli.main(["show", file])
    shown = " ".join(capsys.readouterr().out.split())
    assert "the labels take 9.41 times" in shown and "tiny-convnet" in shown
    few = ["--num-seeds", "1", "--networks", "mlp", "--dataset", str(tiny_file), "--device", "cpu"]
    cli.main(["evaluate", file, "--protocol", "canonical", "relabelled", *few])
    table = " ".join(capsys.readouterr().out.split())
    assert "test accuracy, %: mlp, n = 1" in table and "canonical images + labels relabelled images + labels" in table
    with pytest.warns(UserWarning, match="the classes are exported, not the stored labels of views"):
        api.export_set(file, tmp_path / "hub", "huggingface")
    assert "Labels: classes alone, without the stored labels" in (tmp_path / "hub" / "README.md").read_text()
    cli.main(["relabel", run, "--teacher", str(buffer), str(another), *flags])
    assert capsys.readouterr().out.count("@") == 2, "all teachers are named"
    for words, complaint in (
        (["relabel", run], "labels of views need a teacher; give --teacher"),
        (["relabel", run, "--teacher", str(buffer), "--labels", "hard"], "takes one of stored, online, projector"),
        (["evaluate", file, "--protocol", "canonical", "gift", "--protocol.lr", "1"], "give one --protocol"),
    ):
        with pytest.raises(SystemExit):
            cli.main(words)
        assert complaint in capsys.readouterr().err


def test_a_teacher_is_needed_where_it_labels(syn: SyntheticSet, tiny: Arrays, buffer: Path) -> None:
    named = condense.relabel(syn, buffer, Online(keep_weights=False), device="cpu")
    subject = Subject(syn=named, arrays=tiny, device=CPU)
    plan: dict[str, Any] = {"networks": ["mlp"], "num_seeds": 1, "compute": Compute()}
    assert evaluate(subject, protocol=SHORT["canonical"], **plan).results[0].teacher == ""


def test_a_decoder_has_labels_of_every_image(syn: SyntheticSet) -> None:
    kind = Stored(epochs=2, augment="none")
    table = kind.provider(torch.arange(3), 3, (1, 8, 8), Factor().expansion)
    assert isinstance(table, StoredTable) and table.values.shape == (2, 12, 3)


@pytest.mark.parametrize(
    "kind", [Stored(**SMALL | {"epochs": 60}), Online(keep_weights=False)], ids=["stored", "named"]
)
def test_a_report_shows_labels_and_images_apart(
    kind: Stored | Online, syn: SyntheticSet, tiny_file: Path, buffer: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    condense.relabel(run, buffer, kind, out=run / "synthetic.safetensors", device="cpu")
    options: dict[str, Any] = {"networks": TINY, "num_seeds": 1, "buffers": buffer.parent, "device": "cpu"}
    condense.evaluate(run, tiny_file, protocol=SHORT["relabelled"], **options)
    text = api.report(run).read_text()
    assert f"Labels: {kind.name}, for every view of the images, by {buffer.name}@" in text
    stored = isinstance(kind, Stored)
    assert ("The labels take 1.44 times the bytes of the images" in text) == stored
    assert ("random, ipc 2, teacher not stored" in text) == (not stored)
    assert (">2.21 kB<" in text) == stored and ">1.54 kB<" in text


@pytest.mark.parametrize(("kind", "flag"), [("online", "keep-weights"), ("projector", "keep-encoder")])
def test_a_teacher_is_named_instead_of_kept_by_a_flag(kind: str, flag: str) -> None:
    words = ["--labels", kind, f"--labels.{flag}", "False"]
    command = recipe.parse(commands.Relabel, words, commands.Relabel(), prog="condense relabel")
    assert isinstance(command.labels, ViewLabels) and command.labels.is_named
