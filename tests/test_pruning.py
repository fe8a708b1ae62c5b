"""Accuracy against the share of the images that selections keep, with and without a teacher."""

import dataclasses
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from condense import api, cli
from condense.buffers.trajectories import Experts
from condense.data.datasets import Arrays
from condense.eval import evaluate
from condense.eval.applications.pruning import Pruning
from condense.eval.protocol import PROTOCOLS
from condense.sources import Relabelled, Source

SHORT = dataclasses.replace(PROTOCOLS["pruned"], num_epochs=8, batch_size=6, lr=0.05)
PLAN = Pruning(fractions=(0.25, 0.5), methods=("random", "ccs"), network="mlp", num_seeds=2, protocol=SHORT)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """The number of images of each network that is trained, and whether a teacher labels them."""
    seen, train = list[tuple[int, bool]](), evaluate.Trainer.run_together

    def record(self: evaluate.Trainer, weights: list, sources: list[Source], **options: object) -> list:  # type: ignore[type-arg]
        for source in sources:
            inner = source.source if isinstance(source, Relabelled) else source
            seen.append(
                (len(torch.cat([inner.batch(0, k).targets for k in range(inner.num_batches)])), inner is not source)
            )
        return train(self, weights, sources, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluate.Trainer, "run_together", record)
    return seen


def test_every_share_is_trained_with_and_without_a_teacher_and_not_again(
    tiny: Arrays, tmp_path: Path, trainings: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONDENSE_CACHE", str(tmp_path / "cache"))
    first = api.prune(tiny, PLAN, out=tmp_path / "curve", device="cpu")
    students = [
        (num, taught) for num in (9, 18) for taught in (False, True) for _ in ("random", "ccs") for _ in range(2)
    ]
    assert sorted(pair for pair in trainings if pair[0] in (9, 18)) == sorted(students)
    trainings.clear()
    again = api.prune(tiny, PLAN, device="cpu")
    assert not trainings and again.content() == first.content()
    wider = api.prune(tiny, PLAN, fractions=(0.25, 0.5, 1.0), methods=("random",), device="cpu")
    assert sorted(trainings) == [(36, False)] * 2 + [(36, True)] * 2
    assert wider.record["accuracies"][:2] == first.record["accuracies"][:2]


def test_the_findings_are_a_table_a_file_and_a_figure(tiny: Arrays, tmp_path: Path) -> None:
    found = api.prune(tiny, PLAN, out=tmp_path / "curve", device="cpu")
    assert found.columns == ("images kept by", "teacher", "25 %", "50 %")
    assert [row[:2] for row in found.rows] == [(name, yes) for name in ("random", "ccs") for yes in ("no", "yes")]
    content = json.loads((tmp_path / "curve" / "apply-pruning.json").read_text())
    assert [(row["method"], row["fraction"], row["teacher"]) for row in content["accuracies"]] == [
        (name, fraction, taught) for name in PLAN.methods for taught in (False, True) for fraction in PLAN.fractions
    ]
    for row in content["accuracies"]:
        assert row["num_images"] == 36 * row["fraction"] and len(row["accuracies"]) == 2
        assert row["protocol"] == "pruned*"
    assert 0.5 < content["accuracy_of_teacher"] <= 1 and content["protocol_fields"]["teacher_weight"] == 0.9
    text = (tmp_path / "curve" / "pruning.svg").read_text()
    ElementTree.fromstring(text)
    assert "ccs + teacher" in text and "--series-0" in text


def test_selections_of_the_same_size_are_different_trainings(
    tiny: Arrays, tmp_path: Path, trainings: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONDENSE_CACHE", str(tmp_path / "cache"))
    for method in ("random", "k-center"):
        trainings.clear()
        api.prune(tiny, PLAN, fractions=(0.25,), methods=(method,), device="cpu")
        assert sorted(pair for pair in trainings if pair[0] == 9) == [(9, False)] * 2 + [(9, True)] * 2


def test_the_teacher_may_be_a_trained_network(tiny: Arrays, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"fractions": (0.5,), "methods": ("random",), "device": "cpu"}
    found = []
    for num_epochs in (1, 30):
        experts = Experts(num_experts=1, num_epochs=num_epochs, keep="last", batch_size=9, lr=0.05)
        teacher = api.make_buffer(tiny, "mlp", experts=experts, out=tmp_path / str(num_epochs), device="cpu")
        found.append(api.prune(tiny, PLAN, protocol=dataclasses.replace(SHORT, teacher=str(teacher)), **fields).record)
    short, long = (record["accuracy_of_teacher"] for record in found)
    assert short < long
    names = [record["protocol_fields"]["teacher"] for record in found]
    assert len(set(names)) == 2 and str(tmp_path) not in names[0]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("digits --methods dm", "dm makes equally many images of each class, not a fraction of the real ones"),
        ("digits --methods random-soft", "the recipe random-soft has labels of its own, and here the images keep"),
        ("digits --methods random random", "--methods random random has a value twice; give each once"),
        ("digits --fractions 0.1 0.1", "--fractions 0.1 0.1 has a value twice; give each once"),
        ("digits --methods rando", "unknown method or recipe 'rando': did you mean 'random'"),
        (
            "digits --fractions 0.3 2",
            "fractions must be above 0 and at most 1, got (0.3, 2.0); give --fractions 0.1 0.3",
        ),
        ("digits --protocol canonical", "the protocol canonical has no teacher"),
        ("digits --protocol.teacher=", "the loss distillation needs a teacher; give --protocol.teacher same"),
        ("digits --protocol own", "unknown protocol 'own': there are "),
        ("digits --network convnets", "unknown network 'convnets'"),
        ("", "the first word is missing; give a data set, e.g. digits"),
    ],
)
def test_wrong_words_are_one_line(words: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["apply", "pruning", *words.split()])
    (message,) = capsys.readouterr().err.splitlines()
    assert line in message


def test_a_protocol_gets_its_teacher_by_a_flag(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--fractions 0.5 --methods random --network mlp --num-seeds 1 --protocol canonical --protocol.num-epochs 1"
    flags = [*words.split(), "--protocol.teacher", "same", "--device", "cpu", "--out", str(tmp_path / "curve")]
    cli.main(["apply", "pruning", str(tiny_file), *flags])
    assert "canonical*" in capsys.readouterr().out


def test_the_command_prints_the_table(tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--fractions 0.5 --methods random --network mlp --num-seeds 1 --protocol.num-epochs 1 --device cpu --out"
    cli.main(["apply", "pruning", str(tiny_file), *flags.split(), str(tmp_path / "curve")])
    printed = capsys.readouterr().out
    assert "random          yes" in printed and (tmp_path / "curve" / "pruning.svg").exists()
