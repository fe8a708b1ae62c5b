"""Every method that learns by gradient, with every decoder of images and every kind of labels: it runs, or says why
not. The decoder of clips is in test_static_dynamic.py."""

import dataclasses
from pathlib import Path

import pytest
import torch

from condense import api, registry
from condense.data.datasets import Arrays
from condense.method import GradientMethod, Optim
from condense.methods.linear_gradient import LinearGradient
from condense.methods.recovery import Recovery
from condense.recipe import Recipe
from condense.synthetic import DECODERS, LABELS, Codec, Coded, Decode, Hard, Labels, Pixels, load
from condense.synthetic.decode import DCT, Siren
from tests.conftest import TINY
from tests.test_contract import EXACT, FIELDS, LEARNING, NETWORKS, TRANSFORMS, small

pytestmark = pytest.mark.usefixtures("short_search")

NUM_STEPS = 3
LABELS_THAT_FIT = {
    "dm": {"hard"},
    "datadam": {"hard"},
    "tgdd": {"hard", "teacher"},
    "ncfm": {"hard", "teacher"},
    "cafe": {"hard"},
    "dpdm": {"hard"},
    "cim": {"hard", "teacher"},
    "linear-gradient": {"hard"},
    "kip": {"hard", "logits", "targets"},
    "rfad": {"hard", "logits", "targets"},
    "frepo": {"hard", "logits", "targets"},
    "krr-st": {"targets"},
    "rcig": {"hard", "logits", "targets"},
    "mtt": {"hard", "logits", "teacher"},
    "tesla": {"hard", "logits", "teacher"},
    "datm": {"hard", "logits", "teacher"},
    "selmatch": {"hard", "logits", "teacher"},
    "sre2l": {"hard", "teacher"},
    "fadrm": {"hard", "teacher"},
    "cudd": {"hard", "teacher"},
}
"""By method; of those that are not listed hard and logits."""

DECODED = [
    (name, labels)
    for name, decode in DECODERS.items()
    for labels in (("hard",) if name in ("siren", "codec") else LABELS)
    if "images" in decode.takes
]
"""Decoders with kinds of labels. A decoder without parameters of its own goes with all or with none; of these, one does
for the others."""


def takes(name: str, decode: str) -> bool:
    """Methods that recover images from trained networks round them at the end, as does one that renders a pyramid; one
    keeps real images as they are. All others learn them to the end."""
    if name == "selmatch":
        return decode == "pixels"
    if issubclass(registry.load(name), Recovery | LinearGradient):
        return decode in ("pixels", "pixels-8bit")
    return decode not in ("pixels-8bit", "patches")


def decoder(name: str) -> Decode:
    """One that does not make more images of the budget than there are real ones to start from, and begins soon."""
    quick = {"dct": DCT(coefficients=16), "siren": Siren(fit_steps=5), "codec": Codec(images=2, fit_steps=5)}
    return quick.get(name, DECODERS[name]())


def plan_of(name: str, decode: Decode, labels: Labels) -> Recipe:
    method = dataclasses.replace(small(name), num_steps=NUM_STEPS)
    if isinstance(method, GradientMethod) and not decode.stores_pixels:
        method = dataclasses.replace(method, clamp=False)
    if isinstance(method, GradientMethod) and isinstance(decode, Coded):  # what moves by less than 1/2 is rounded away
        method = dataclasses.replace(method, optim=Optim(kind="adam"), optim_decoder=Optim(kind="adam", lr=0.01))
    return Recipe(
        method=method,
        dataset="tiny",
        transform=TRANSFORMS.get(name, "channel"),
        network=NETWORKS.get(name, TINY),
        ipc=2,
        decode=decode,
        labels=labels,
        **EXACT,
    )


@pytest.mark.parametrize(("decode", "labels"), DECODED)
@pytest.mark.parametrize("name", LEARNING)
def test_it_learns_or_is_refused_with_the_reason(
    name: str, decode: str, labels: str, tiny: Arrays, tiny_buffers: Path, tmp_path: Path
) -> None:
    plan = plan_of(name, decoder(decode), LABELS[labels]())
    options = api.RunOptions(out=tmp_path / "run", buffers=tiny_buffers, device="cpu")
    if labels not in LABELS_THAT_FIT.get(name, {"hard", "logits"}) or not takes(name, decode):
        with pytest.raises(ValueError, match=f"^{name} .+; give .+="):
            api.run(plan, options, arrays=tiny)
        assert not options.out.exists()
        return
    api.run(plan, options, arrays=tiny)
    syn = load(tmp_path / "run")
    first = load(tmp_path / "run" / "snapshots" / "step_0000001.safetensors")
    load(tmp_path / "run" / "snapshots" / "step_0000000.safetensors")  # refused if a value is not finite
    images, targets = syn()
    assert images.shape[1:] == (1, 8, 8) and images.isfinite().all()
    assert len(targets) == len(images) and targets.isfinite().all()
    for leaf, params in syn.leaves().items():
        before = first.leaves()[leaf]
        assert any(not torch.equal(a, b) for a, b in zip(params, before, strict=True)), f"{leaf} does not learn"


@pytest.mark.parametrize("name", LEARNING)
def test_mirrored_pairs_average_and_bounded_pixels_go_with_every_method(
    name: str, tiny: Arrays, tiny_buffers: Path, tmp_path: Path
) -> None:
    plan = plan_of(name, Pixels(), FIELDS.get(name, {}).get("labels", Hard()))
    assert isinstance(plan.method, GradientMethod)
    average = None if isinstance(plan.method, Recovery | LinearGradient) else 0.5
    method = dataclasses.replace(plan.method, ema=average, clamp=not isinstance(plan.method, LinearGradient))
    plan = dataclasses.replace(plan, method=method, augment="crop_flip:flips=true")
    syn = api.run(plan, api.RunOptions(out=tmp_path / "run", buffers=tiny_buffers, device="cpu"), arrays=tiny)
    load(tmp_path / "run" / "snapshots" / "step_0000000.safetensors")  # refused if a value is not finite
    pixels = syn.to_dataset("pixels").tensors[0]  # type: ignore[attr-defined]
    assert pixels.isfinite().all()
    assert ("flips" in syn.origin.training["augment"]) == (name == "rcig"), "its networks train on mirror images, too"


def test_the_table_of_labels_names_known_methods_only() -> None:
    assert set(LABELS_THAT_FIT) <= set(registry.METHODS)
