"""Continual learning, architecture search and privacy, on data where the answer is known."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from condense import api, cli
from condense.compute import Compute
from condense.data import load as load_arrays
from condense.data.datasets import Arrays
from condense.eval import protocol
from condense.eval.applications import APPLICATIONS, Setting
from condense.eval.applications.nas import rank_correlations
from condense.eval.applications.privacy import membership_auc
from condense.eval.evaluate import SetScorer
from condense.eval.subject import Subject
from condense.synthetic import SyntheticSet, load

TINY = "convnet:depth=1,width=4"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocol that is used where none is named has fewer epochs."""
    canonical = dataclasses.replace(protocol.PROTOCOLS["canonical"], num_epochs=30)
    monkeypatch.setitem(protocol.PROTOCOLS.own, "canonical", canonical)


@pytest.fixture(scope="module")
def run(tiny: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four real images a class of the tiny data, a quarter of which is held out."""
    out = tmp_path_factory.mktemp("run") / "random"
    split = api.Split(val_fraction=0.25)
    api.distill("random", dataset=tiny, network=TINY, ipc=4, split=split, out=out, device="cpu")
    return out


def test_continual_tests_the_classes_seen_on_what_was_kept_of_them(run: Path, tiny: Arrays) -> None:
    found = api.apply("continual", run, tiny, num_groups=3, num_seeds=2, network="mlp", baselines=["herding"])
    assert found.record["classes_seen"] == [1, 2, 3]
    accuracies = torch.tensor(found.record["accuracies"]["random"])
    assert accuracies.shape == (3, 2) and (accuracies[0] == 1).all(), "one class is always right"
    whole = api.evaluate(run, tiny, networks=["mlp"], num_seeds=2, out=run / "evaluation.json")
    assert accuracies[2].mean() == pytest.approx(whole.results[0].mean, abs=0.2)
    assert [row[0] for row in found.rows] == ["random", "herding"]
    written = json.loads((run / "apply-continual.json").read_text())
    assert written["application"] == "continual" and written["num_groups"] == 3
    assert written["accuracies"] == found.record["accuracies"]


def test_a_protocol_with_steps_by_size_trains_for_as_many_in_use_as_in_an_evaluation(run: Path, tiny: Arrays) -> None:
    subject = Subject(syn=load(run), arrays=tiny, device=torch.device("cpu"))
    setting = Setting(subject=subject, compute=Compute())
    plan = protocol.PROTOCOLS["frepo"]
    scorer = setting.scorer(subject.network("mlp"), plan, num_images=12)
    assert scorer._trainer.training == plan.resolved(12)
    assert scorer._trainer.training.num_epochs != plan.num_epochs


def test_a_baseline_by_the_method_of_the_set_does_not_take_its_place(run: Path, tiny: Arrays) -> None:
    found = api.apply("continual", run, tiny, num_groups=1, num_seeds=1, network="mlp", baselines=["random"])
    assert [row[0] for row in found.rows] == ["random", "random, made anew"]


def test_findings_replace_findings_alone(run: Path, tiny: Arrays, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"num_groups": 1, "num_seeds": 1, "network": "mlp", "device": "cpu"}
    other = tmp_path / "notebook.ipynb"
    other.write_text('{"cells": []}')
    with pytest.raises(ValueError, match=r"notebook.ipynb exists already and is not from condense apply; give another"):
        api.apply("continual", run, tiny, out=other, **fields)
    assert other.read_text() == '{"cells": []}'
    for _ in range(2):
        api.apply("continual", run, tiny, out=tmp_path / "found.json", **fields)


def test_nas_correlates_a_ranking_with_the_truth_on_held_out_images(
    run: Path, tiny: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"random": [0.1, 0.4, 0.2, 0.3], "real": [0.2, 0.5, 0.3, 0.9]}
    accuracies = [value for pair in zip(*given.values(), strict=True) for value in pair]

    def score(self: SetScorer, images: Any, labels: Any, scored: Any, *_: Any, **__: Any) -> list[SimpleNamespace]:
        assert len(scored) == 9, "a quarter of the training images"
        return [SimpleNamespace(accuracy=accuracies.pop(0))]

    monkeypatch.setattr(SetScorer, "score", score)
    found = api.apply("nas", run, tiny, widths=(2, 6), depths=(1, 2), norms=("none",), poolings=("avg",), num_epochs=2)
    assert len(found.record["architectures"]) == 4 and "held-out" in found.title
    assert {name: pytest.approx(values) for name, values in found.record["accuracies"].items()} == given
    ranking = found.record["rankings"]["random"]
    assert (ranking["spearman"], ranking["kendall"]) == pytest.approx((0.8, 4 / 6))
    assert ranking["chosen"] == found.record["architectures"][1]
    assert found.rows == [("random", "0.80", "0.67", "50.0", "90.0")]


def test_series_are_put_to_use_by_their_own_network(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(256, (24, 2, 16), generator=generator, dtype=torch.uint8), torch.arange(24) % 3
    data = load_arrays((x[:12], y[:12], x[12:], y[12:]), layout="NCL")
    option = "auto:width=4,depth=1"
    syn = api.distill("random", dataset=data, network=option, ipc=1, out=tmp_path / "run", device="cpu")
    common: dict[str, Any] = {"syn": syn, "dataset": data, "device": "cpu"}
    grid: dict[str, Any] = {"widths": (2, 4, 6), "depths": (1,), "norms": ("none",), "poolings": ("max",)}
    nas = api.apply("nas", **common, **grid, num_epochs=1)
    assert [name.partition(":")[0] for name in nas.record["architectures"]] == ["convnet1d"] * 3
    assert nas.title.startswith("3 networks ranked") and "12 real series" in nas.title
    privacy = api.apply("privacy", **common, network=option, num_members=6, num_seeds=1, num_epochs=1)
    assert "random" in privacy.record["found"]
    continual = api.apply("continual", **common, network=option, num_groups=3, num_seeds=1)
    assert continual.record["classes_seen"] == [1, 2, 3]
    with pytest.raises(ValueError, match="give network='convnet1d'"):
        api.apply("continual", **common, network="convnet", num_groups=3)


def test_an_attack_on_the_members_themselves_finds_them_better(tiny: Arrays, tmp_path: Path) -> None:
    """Random labels can only be learned by heart."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (240, 1, 8, 8), generator=generator, dtype=torch.uint8)
    y = torch.arange(240) % 3
    data = (x[:120], y[:120], x[120:], y[120:])
    syn = api.distill("random", dataset=data, network="mlp", ipc=1, out=tmp_path / "run", device="cpu")
    found = api.apply("privacy", syn, data, num_members=100, num_seeds=1, network="mlp", num_epochs=150)
    aucs = {name: values["auc"][0] for name, values in found.record["found"].items()}
    assert aucs["the members themselves"] > 0.9 and 0.35 < aucs["random"] < 0.65
    assert max(found.record["found"]["random"]["nearest"]) < 1e-2, "these are real images"
    assert min(found.record["usual_nearest"]) > 1


def test_the_ranking_scores_are_those_of_the_accuracies_it_records(
    tiny: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = dataclasses.replace(protocol.PROTOCOLS["dd-ranking"], num_epochs=8)
    monkeypatch.setitem(protocol.PROTOCOLS.own, "dd-ranking", plan)
    split = api.Split(val_fraction=0.25)
    options: dict[str, Any] = {"dataset": tiny, "network": "mlp", "split": split, "device": "cpu"}
    api.distill("kip", ipc=2, num_steps=4, labels="targets", out=tmp_path / "run", **options)
    found = api.apply("ranking", tmp_path / "run", tiny, network="mlp", num_seeds=1, baselines=["random", "herding"])
    assert set(found.record["rankings"]) == {"kip", "herding"} and len(found.rows) == 2
    for row in found.record["rankings"].values():
        acc, scores = row["accuracies"], row["scores"]
        assert scores["HLR"] == pytest.approx(acc["real hard"] - acc["hard"])
        assert scores["IOR"] == pytest.approx(acc["own"] - acc["random own"])
        both = (acc["augmented"] - acc["random augmented"] + acc["plain"] - acc["random plain"]) / 2
        for name, value in (("LRS", (scores["IOR"] - scores["HLR"]) / 2), ("ARS", both)):
            assert scores[name] == pytest.approx((math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1)))
            assert 0 <= scores[name] <= 1
    kip, herding = (found.record["rankings"][name]["accuracies"] for name in ("kip", "herding"))
    assert herding["own"] == herding["hard"], "hard labels have no other training"
    assert herding["hard"] == herding["augmented"], "dd-ranking augments"
    plan = protocol.named("own", api.load(tmp_path / "run"))
    again = api.evaluate(tmp_path / "run", tiny, networks="mlp", num_seeds=1, protocol=plan, device="cpu")
    assert again.results[0].mean == kip["own"]


def test_the_set_of_the_user_is_ranked_beside_a_baseline_of_its_name(tiny: Arrays, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dataset": tiny, "network": "mlp", "ipc": 2, "device": "cpu"}
    api.distill("random", out=tmp_path / "run", seed=5, **options)
    again = {"network": "mlp", "num_seeds": 1, "protocol": "canonical", "baselines": ["random", "herding"]}
    found = api.apply("ranking", tmp_path / "run", tiny, **again)
    assert set(found.record["rankings"]) == {"random", "herding"}
    mine = found.record["rankings"]["random"]["accuracies"]
    assert mine["hard"] == api.evaluate(tmp_path / "run", tiny, networks="mlp", num_seeds=1).results[0].mean
    assert mine["hard"] == mine["plain"], "canonical does not"


def test_a_ranking_needs_random_images_and_held_out_ones(run: Path, tiny: Arrays, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"baselines=\('random',\)"):
        api.apply("ranking", run, tiny, network="mlp", baselines=["herding"])
    api.distill("random", dataset=tiny, network="mlp", ipc=1, out=tmp_path / "run", device="cpu")
    with pytest.raises(ValueError, match="val_fraction"):
        api.apply("ranking", tmp_path / "run", tiny, network="mlp", num_seeds=1, baselines=["random"])


def test_a_proxy_that_tells_nothing_apart_correlates_with_nothing() -> None:
    assert rank_correlations([0.5, 0.5, 0.5], [0.1, 0.2, 0.3]) == (0.0, 0.0)
    assert rank_correlations([0.1, 0.2, 0.4], [0.1, 0.3, 0.9]) == pytest.approx((1.0, 1.0))
    assert rank_correlations([1, 3, 2, 4], [1, 2, 3, 4]) == pytest.approx((0.8, 4 / 6))


def test_the_area_under_the_curve() -> None:
    members, non_members = torch.tensor([0.1, 0.2, 0.9]), torch.tensor([0.5, 1.0])
    assert membership_auc(members, non_members) == pytest.approx(5 / 6)
    assert membership_auc(members, members) == 0.5


@pytest.mark.parametrize(
    ("name", "fields", "complaint"),
    [
        ("continual", {"num_groups": 9}, "3 classes cannot arrive in 9 groups"),
        ("continual", {"num_groups": 0}, "at least 1"),
        ("nas", {"widths": (2,), "depths": (1,), "norms": ("none",), "poolings": ("avg",)}, "three architectures"),
        ("privacy", {"num_members": 0}, "at least 1"),
        ("privacy", {"protocol": "canon"}, "unknown protocol"),
        ("privacy", {"protocol": "pruned"}, "trained on classes alone, and the protocol pruned needs"),
        ("continual", {"protocol": "soft-teacher"}, "give protocol='canonical'"),
        ("nas", {"protocol": "dd-ranking"}, "held-out images"),
        ("nas", {"depths": (1, 2, 9)}, "depth=9"),
        ("ranking", {"protocol": "relabelled", "baselines": ["random"]}, "and the set has hard labels"),
        ("continuous", {}, "did you mean 'continual'"),
        ("nas", {"width": 3}, "no field 'width'"),
    ],
)
def test_bad_choices_are_refused(name: str, fields: dict[str, Any], complaint: str, run: Path, tiny: Arrays) -> None:
    with pytest.raises(ValueError, match=complaint):
        api.apply(name, run, tiny, **fields)


def test_every_class_that_arrives_has_samples_to_learn_and_to_test(run: Path, tiny: Arrays) -> None:
    fields: dict[str, Any] = {"num_groups": 3, "num_seeds": 1, "network": "mlp"}
    whole = load(run)
    kept = whole.classes != 1
    syn = SyntheticSet(whole.latents.detach()[kept], whole.classes[kept], whole.origin)
    with pytest.raises(ValueError, match=f"the class '{tiny.classes[1]}' has no sample in the set random"):
        api.apply("continual", syn, tiny, **fields)
    tested = tiny.y_test != 2
    part = dataclasses.replace(tiny, x_test=tiny.x_test[tested], y_test=tiny.y_test[tested])
    with pytest.raises(ValueError, match=f"the class '{tiny.classes[2]}' has no sample in the test split"):
        api.apply("continual", whole, part, **fields)


def test_a_ranking_of_labels_of_views_is_refused(run: Path, tiny: Arrays, tmp_path: Path) -> None:
    split = api.Split(val_fraction=0.25)
    buffer = api.make_buffer(tiny, "mlp", out=tmp_path, split=split, num_experts=1, num_epochs=1, device="cpu")
    labelled = api.relabel(load(run), buffer, epochs=1, device="cpu")
    with pytest.raises(ValueError, match="the set has stored labels of its views"):
        api.apply("ranking", labelled, tiny, protocol="canonical", baselines=["random"])


def test_the_command(tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    api.distill("random", dataset=tiny_file, network=TINY, ipc=2, out=out, device="cpu")
    words = ["--num-groups", "3", "--num-seeds", "1", "--network", "mlp", "--baselines", "random", "--device", "cpu"]
    cli.main(["apply", "continual", str(out), *words])
    assert "3 classes" in capsys.readouterr().out and (out / "apply-continual.json").exists()
    with pytest.raises(SystemExit) as leave:
        cli.main(["apply", "nas", str(out), "--num-epoch", "1"])
    assert leave.value.code == 2 and "--num-epochs" in capsys.readouterr().err
    for name in APPLICATIONS:
        with pytest.raises(SystemExit) as leave:
            cli.main(["apply", name, "--help"])
        assert leave.value.code == 0
