"""Budgets in floats and in bits."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import condense
from condense import api, experiment, overview, recipe
from condense.cli import main
from condense.data.datasets import Arrays
from condense.data.layout import InputShape
from condense.eval.results import read_complete
from condense.recipe import Recipe
from condense.registry import load as method
from condense.synthetic import (
    DCT,
    Bases,
    Coded,
    Decode,
    Hallucinator,
    Hard,
    Logits,
    Origin,
    Pixels,
    Pixels8Bit,
    SyntheticSet,
    Targets,
)
from condense.synthetic.budget import allowed_bits, latents_per_class
from tests.conftest import TINY
from tests.test_decode import NUM_CLASSES, cases

pytestmark = pytest.mark.usefixtures("short_protocol")

CIFAR10 = (3, 32, 32), 10, 10


@cases
def test_bits_buy_as_many_latents_as_fit(decode: Decode, shape: InputShape) -> None:
    """Counted from sets that are made. Where bits are learned, test_codec says what happens."""
    if isinstance(decode, Coded):
        assert latents_per_class("bits", 12, decode, Hard(), shape, NUM_CLASSES, NUM_CLASSES) == 2
        return
    sizes = shape, NUM_CLASSES, NUM_CLASSES
    num, allowed = latents_per_class("bits", 12, decode, Hard(), *sizes), allowed_bits(12, Hard(), *sizes)

    def taken(latents: int) -> int:
        classes = torch.arange(NUM_CLASSES).repeat_interleave(latents)
        decoder = decode.build(shape, NUM_CLASSES)
        images = torch.randn(decode.expansion * len(classes), *shape)
        origin = Origin(dataset={"classes": list("abc"), "input_shape": shape}, transform={"kind": "none"})
        encoded = decode.encode(images, classes, decoder, torch.Generator())
        return SyntheticSet(encoded, classes, origin, decode=decode, decoder=decoder).num_bits

    assert taken(num) <= allowed < taken(num + 1)


@pytest.mark.parametrize(
    ("decode", "labels", "each", "shared"),
    [
        (Pixels(), Hard(), 3072 * 32 + 4, 0),
        (Pixels(), Logits(), 3072 * 32 + 10 * 32, 0),
        (Pixels8Bit(), Hard(), 3072 * 8 + 4, 6 * 32),
        (DCT(coefficients=64), Hard(), 3 * 64 * 32 + 4, 10 * 64 * 32),
        (Bases(num_bases=16), Hard(), 16 * 32 + 4, 16 * 768 * 32),
        (Hallucinator(), Hard(), 3072 * 32 + 4, 5 * 5568 * 32),
    ],
)
def test_the_convention(decode: Decode, labels: Any, each: int, shared: int) -> None:
    """A float has 32 bits, a stored pixel 8, one of ten classes 4; the decoder counts."""
    ipc = 7
    allowed = ipc * 10 * (3072 * 32 + 4)
    assert allowed_bits(ipc, labels, *CIFAR10) == allowed
    assert latents_per_class("bits", ipc, decode, labels, *CIFAR10) == (allowed - shared) // (10 * each)


def test_where_there_are_no_classes_the_budget_has_targets() -> None:
    sizes = (1, 8, 8), 3, 5
    assert allowed_bits(4, Targets(), *sizes) == 4 * 3 * (64 + 5) * 32
    assert latents_per_class("bits", 4, Pixels(), Targets(), *sizes) == 4


def test_a_budget_in_bits_is_the_same_everywhere(
    tiny: Arrays, tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """7 images of 64 bytes and a label of 2 bits per class, and a decoder of 64 bits, in place of 2 of 64 floats."""
    fields: dict[str, Any] = {"decode": "pixels-8bit", "ipc": 2, "budget": "bits", "network": TINY, "device": "cpu"}
    made = condense.distill("random", dataset=tiny_file, seed=1, out=tmp_path / "run", **fields)
    allowed, taken = 2 * 3 * (64 * 32 + 2), 7 * 3 * (64 * 8 + 2) + 64
    syn = condense.load(tmp_path / "run")
    assert (len(syn), syn.num_bits, syn.allowed_bits) == (21, taken, allowed) and "ipc 2 in bits" in repr(made)
    assert "budget: bits\n" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert overview.find_runs(tmp_path)[0].budget == "ipc 2 in bits"
    found = condense.evaluate(tmp_path / "run", networks=[TINY], num_seeds=2, baselines=["random"], device="cpu")
    assert [result.stored_bits for result in found.results] == [taken, taken], "random images of the same budget"
    rows = read_complete(tmp_path / "run" / "evaluation.json")
    assert [row["stored_bits"] for row in rows] == [taken, taken]
    page = api.report([tmp_path / "run"], tmp_path / "report.html").read_text()
    wanted = f"ipc 2 in bits, at most {allowed} bits", f'<td data-value="{taken}">{taken:,}</td>'
    assert [text for text in wanted if text not in page] == []
    main(["show", str(tmp_path / "run")])
    shown = capsys.readouterr().out
    assert f"ipc 2 in bits, at most {allowed} bits" in shown and f"; {taken} bits)" in shown


def test_a_budget_in_floats_leaves_recipes_as_they_were(tiny: Arrays) -> None:
    plan = Recipe(method=method("random")(), ipc=2)
    in_bits = dataclasses.replace(plan, budget="bits")
    assert "budget" not in recipe.to_mapping(plan) and plan.hash("f") != in_bits.hash("f")
    assert recipe.from_mapping(recipe.to_mapping(in_bits), "file") == in_bits
    assert (plan.budget_in_words, in_bits.budget_in_words) == ("ipc 2", "ipc 2 in bits")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        (
            {"decode": "hallucinator"},
            r"decoder hallucinator take \d+ bits, more than the 6150 .*; give ipc=4 or budget",
        ),
        ({"labels": "logits"}, "one latent of each class and the decoder pixels take 6432 bits, .*; give ipc=2 or"),
        (
            {"fraction": 0.5},
            "budget='bits' is for a budget in images .*, and a fraction counts real images; leave it out",
        ),
    ],
)
def test_what_bits_do_not_buy_is_refused_in_one_line(
    fields: dict[str, Any], complaint: str, tiny: Arrays, tmp_path: Path
) -> None:
    fields = {"budget": "bits", "num_steps": 1, "out": tmp_path / "run"} | fields
    fields |= {} if "fraction" in fields else {"ipc": 1}
    with pytest.raises(ValueError, match=complaint) as error:
        condense.distill("mtt" if "labels" in fields else "dm", dataset=tiny, network=TINY, **fields)
    assert "\n" not in str(error.value)


class Halves(Pixels):
    """Stores the upper half of an image, and does not say so."""

    name: ClassVar[str] = "halves"

    def build(self, input_shape: InputShape, num_classes: int) -> nn.Module:
        return nn.Identity()

    def encode(self, images: Tensor, classes: Tensor, decoder: nn.Module, generator: torch.Generator) -> Tensor:
        return images[..., : images.shape[-2] // 2, :].clone()


def test_a_decoder_that_miscounts_is_found_out(tiny: Arrays) -> None:
    plan = Recipe(method=method("random")(), dataset="tiny", network=TINY, ipc=2, budget="bits")
    resolved = experiment.resolve(plan, tiny, device=torch.device("cpu"))
    ctx = dataclasses.replace(experiment.prepare(resolved), decode=Halves())
    with pytest.raises(ValueError, match=r"halves has latents of shape \(1, 4, 8\), but its latent_shape is"):
        ctx.new_set(*ctx.initial("real"))
