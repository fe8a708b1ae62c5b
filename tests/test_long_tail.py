"""Classes with fewer images than the budget, and unbalanced test classes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import condense
from condense import api, cli
from condense.data import Arrays, load
from condense.eval.metrics import Scores
from condense.method import Optim
from condense.recipe import Recipe, to_mapping
from condense.registry import load as load_method
from condense.synthetic.set import SyntheticSet
from tests.conftest import TINY

COUNTS = [max(2, round(100 * 0.02 ** (label / 9))) for label in range(10)]
"""Training images of each class of digits, from 100 to 2."""


def thinned() -> tuple[np.ndarray, ...]:
    """Digits with an exponential long tail, in the test part too."""
    digits = load("digits")
    arrays = []
    for images, labels, share in (
        (digits.x_train, digits.y_train, 1.0),
        (digits.x_test, digits.y_test, 0.3),
    ):
        members = [np.flatnonzero(labels == c)[: max(1, round(share * COUNTS[c]))] for c in range(10)]
        index = np.concatenate(members)
        arrays += [images[index], labels[index]]
    return tuple(arrays)


@pytest.fixture(scope="module")
def tail() -> Arrays:
    return load(thinned())


def distilled(method: str, tail: Arrays, out: Path, **fields: Any) -> SyntheticSet:
    common = {"network": TINY, "device": "cpu", "out": out, "ipc": 5}
    return condense.distill(method, dataset=tail, **common | fields)


def test_the_default_refuses_and_names_what_mends_it(tail: Arrays, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"class '8' has 3 training images, 5 are .*ipc=3 or less, or "
                       r"ipc_policy='repeat' \(ipc_policy='all' for a selection\)"):  # fmt: skip
        distilled("random", tail, tmp_path)


def test_a_selection_takes_all_that_a_class_has(tail: Arrays, tmp_path: Path) -> None:
    for method in ("random", "herding"):
        syn = distilled(method, tail, tmp_path / method, ipc_policy="all")
        assert syn.classes.bincount().tolist() == [min(5, count) for count in COUNTS]
        assert len(torch.unique(syn()[0].flatten(1), dim=0)) == len(syn) and syn.ipc == 5
        assert syn.origin.ipc_policy == "all"


def test_a_method_starts_from_repeated_images(tail: Arrays, tmp_path: Path) -> None:
    syn = distilled("dm", tail, tmp_path, ipc_policy="repeat", num_steps=1, optim=Optim(lr=1e-9))
    assert syn.classes.bincount().tolist() == [5] * 10
    different = [len(torch.unique(syn()[0][syn.classes == c].round(decimals=4), dim=0)) for c in range(10)]
    assert different == [min(5, count) for count in COUNTS]
    full = distilled("dm", tail, tmp_path / "b", ipc_policy="repeat", ipc=2, num_steps=1)
    usual = distilled("dm", tail, tmp_path / "c", ipc=2, num_steps=1)
    assert torch.equal(full()[0], usual()[0])


def test_datm_repeats_the_images_that_its_experts_classify_correctly(tail: Arrays, tmp_path: Path) -> None:
    network = "convnet:depth=1,width=4"
    api.make_buffer(tail, network, num_experts=1, num_epochs=3, out=tmp_path / "buffers", device="cpu")
    fields: dict[str, Any] = {
        "syn_steps": 1,
        "batch_syn": 4,
        "expert_epochs": 1,
        "max_start_epoch": 2,
        "experts": "any",
    }
    fields |= {"buffers": tmp_path / "buffers", "network": network, "labels": "logits", "first_max_epoch": None}
    syn = distilled("datm", tail, tmp_path / "run", ipc_policy="repeat", num_steps=1, **fields)
    assert syn.classes.bincount().tolist() == [5] * 10


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("dm", {"ipc_policy": "all"}, "dm makes equally many images of each class; give ipc_policy='repeat'"),
        ("random", {"ipc_policy": "repeat"}, "random selects different images .* give ipc_policy='all'"),
        ("random", {"ipc_policy": "all", "decode": "factor"}, "random stores all images of a small class, one in each"),
        ("random", {"ipc_policy": "all", "fraction": 0.1, "ipc": None}, "ipc_policy='all' is for a budget in images"),
        ("random", {"ipc_policy": "some"}, "some"),
    ],
)
def test_policies_that_make_no_sense_are_refused(
    method: str, fields: dict[str, Any], message: str, tail: Arrays, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        distilled(method, tail, tmp_path, **fields)
    assert "\n" not in str(error.value) and not any(tmp_path.iterdir())


def test_recipes_of_earlier_versions_keep_their_hash() -> None:
    method = load_method("dm")()
    assert "ipc_policy" not in to_mapping(Recipe(method=method))
    assert to_mapping(Recipe(method=method, ipc_policy="repeat"))["ipc_policy"] == "repeat"


def test_unbalanced_classes_have_a_balanced_accuracy() -> None:
    logits = torch.eye(3)[torch.tensor([0, 0, 0, 0, 0, 0, 1, 0])]
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])
    found = Scores.of(logits, labels)
    assert found.accuracy == 7 / 8 and found.balanced_accuracy == pytest.approx(3 / 4)
    assert Scores.of(logits[4:], labels[4:]).balanced_accuracy is None
    assert Scores.of(logits[3:], labels[3:]).balanced_accuracy is None  # 3 and 2 images


def test_tables_and_reports_show_it_beside_the_accuracy(
    tail: Arrays, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x_train, y_train, x_test, y_test = thinned()
    data = tmp_path / "tail.npz"
    np.savez(data, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test, layout="NCHW")
    words = ["--dataset", str(data), "--ipc", "5", "--network", TINY, "--device", "cpu", "--out", str(tmp_path / "run")]
    cli.main(["distill", "dm", *words, "--ipc-policy", "repeat", "--method.num-steps", "1"])
    short = ["--protocol.num-epochs", "1", "--networks", TINY, "--num-seeds", "2", "--device", "cpu"]
    cli.main(["evaluate", str(tmp_path / "run"), *short, "--baselines", "random"])
    said = capsys.readouterr().out
    assert "networks per cell (balanced accuracy)" in said and len(re.findall(r" \(\d+\.\d\)", said)) == 2
    cli.main(["show", str(tmp_path / "run")])
    assert "(balanced accuracy)" in capsys.readouterr().out
    assert "(balanced " in api.report(tmp_path / "run").read_text(encoding="utf-8")
