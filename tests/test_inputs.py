"""Series and clips: what methods, networks, buffers and evaluations do with data that are no images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from condense import api, registry
from condense.compute import Compute
from condense.data.datasets import Arrays, load
from condense.eval.protocol import PROTOCOLS
from condense.method import Method
from condense.methods.krr_st import KRRST
from condense.networks import default_for
from condense.recipe import Recipe
from condense.rng import Rng
from condense.synthetic import Bases, Factor, SyntheticSet
from condense.teachers import OWN
from condense.views import cutmix
from tests.test_contract import FIELDS, small

METHODS = ("random", "herding", "k-means", "dm", "dc", "mtt", "datadam", "frepo", "rat-bptt")
SHORT = dataclasses.replace(PROTOCOLS["canonical"], num_epochs=1)


class Inputs(NamedTuple):
    arrays: Arrays
    network: str
    """One that a test can train many times."""
    buffer: Path


@pytest.fixture(scope="module", params=["series", "clips"])
def inputs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Three classes of series (3, 16) that differ in frequency, or of clips (4, 3, 8, 8) that differ in brightness;
    12 + 6 samples a class."""
    rng, content = np.random.default_rng(0), {}
    for part, num in (("train", 36), ("test", 18)):
        labels = np.arange(num) % 3
        if request.param == "series":
            waves = np.sin((labels + 1)[:, None, None] * np.linspace(0, 6, 16))
            samples = (5 * waves + rng.normal(size=(num, 3, 16))).astype(np.float32)
        else:
            levels = (30 + 80 * labels)[:, None, None, None, None]
            samples = (levels + rng.integers(0, 40, (num, 4, 3, 8, 8))).astype(np.uint8)
        content |= {f"x_{part}": samples, f"y_{part}": labels}
    folder = tmp_path_factory.mktemp(request.param)
    layout, network = {
        "series": ("NCL", "convnet1d:depth=2,width=4"),
        "clips": ("NTCHW", "convnet3d:depth=1,width=4"),
    }[request.param]
    np.savez(folder / "data.npz", **content, layout=layout)
    arrays = load(folder / "data.npz")
    training = {"num_experts": 2, "num_epochs": 4, "batch_size": 12, "lr": 0.1, "out": folder / "artifacts"}
    return Inputs(arrays, network, api.make_buffer(arrays, network, **training, compute=Compute()))


def distilled(inputs: Inputs, method: str | Method, out: Path, **fields: Any) -> SyntheticSet:
    if isinstance(method, str):
        fields = FIELDS.get(method, {}) | fields
        chosen = small(method)
        if isinstance(chosen, KRRST):
            chosen = dataclasses.replace(chosen, teachers=(OWN,))
        method = dataclasses.replace(chosen, num_steps=2) if chosen.learns else chosen
    fields = {"network": inputs.network, "ipc": 2, **fields}
    if method.private:
        fields["transform"] = "none"  # the statistics of these data are not published
    plan = Recipe(method=method, dataset=inputs.arrays.name, **fields)
    options = api.RunOptions(out=out, buffers=inputs.buffer, device="cpu")
    return api.run(plan, options, arrays=inputs.arrays)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_distils_series_and_clips(name: str, inputs: Inputs, tmp_path: Path) -> None:
    syn = distilled(inputs, name, tmp_path / "run")
    assert syn.latents.shape == (6, *inputs.arrays.input_shape) and syn.latents.isfinite().all()
    if registry.load(name).learns:
        start = distilled(inputs, "random", tmp_path / "start")
        assert not torch.equal(syn.latents, start.latents)
    evaluation = api.evaluate(
        tmp_path / "run", networks=inputs.network, num_seeds=1, protocol=SHORT, dataset=inputs.arrays, device="cpu"
    )
    (result,) = evaluation.results
    assert 0 <= result.mean <= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["dc", "datadam"])
def test_compiled_work_on_series_and_clips_agrees_with_eager(name: str, inputs: Inputs, tmp_path: Path) -> None:
    eager, compiled = (
        distilled(inputs, name, tmp_path / str(on), compute=Compute(compile=on, vmap_batch=1)) for on in (False, True)
    )
    torch.testing.assert_close(compiled.latents, eager.latents, rtol=1e-3, atol=1e-4)


def test_several_classes_at_once_give_what_they_give_one_by_one(inputs: Inputs, tmp_path: Path) -> None:
    one, several = (distilled(inputs, "dc", tmp_path / str(n), compute=Compute(vmap_batch=n)) for n in (1, 6))
    torch.testing.assert_close(several.latents, one.latents, rtol=1e-4, atol=1e-5)


def test_bases_hold_series_and_clips(inputs: Inputs, tmp_path: Path) -> None:
    method = dataclasses.replace(small("dm"), start="noise", num_steps=2)
    syn = distilled(inputs, method, tmp_path / "run", decode=Bases(num_bases=4))
    images, _ = syn()
    assert images.shape[1:] == inputs.arrays.input_shape and len(images) > 6


TAKING = {name for name in registry.METHODS if "series" in registry.load(name).takes}
DECOUPLED = {name for name in registry.METHODS if registry.load(name).family == "decoupled"}


@pytest.mark.parametrize("name", sorted(TAKING - set(METHODS)))
def test_the_other_methods_take_them_too(name: str, inputs: Inputs, tmp_path: Path) -> None:
    assert distilled(inputs, name, tmp_path / "run").latents.isfinite().all()


@pytest.mark.parametrize("name", sorted(DECOUPLED))
def test_decoupled_methods_take_images_and_some_take_clips(name: str, inputs: Inputs, tmp_path: Path) -> None:
    line = f"method {name} takes images( and clips)?, not (series|clips) .*; give another method"
    if inputs.arrays.x_train.ndim > 3 and "clips" in registry.load(name).takes:
        line = "convnet3d:depth=1,width=4 has no BatchNorm layer, .*network='convnet3d:norm=batch'"
    with pytest.raises(ValueError, match=line):
        distilled(inputs, name, tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"network": "convnet"}, "network convnet takes images, not .*; give network='convnet[13]d'; "),
        ({"decode": Factor()}, "decoder factor takes images, not .*; give decode='pixels'; "),
    ],
)
def test_what_does_not_take_them_is_refused(fields: dict[str, Any], line: str, inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=line):
        distilled(inputs, "random", tmp_path / "run", **fields)
    assert not (tmp_path / "run").exists()


def test_augmentations_are_for_images_and_clips(inputs: Inputs, tmp_path: Path) -> None:
    if inputs.arrays.x_train.ndim == 3:
        with pytest.raises(ValueError, match="augmentation 'color_flip' takes images and clips, not series"):
            distilled(inputs, "dm", tmp_path / "run", augment="color_flip")
    else:
        assert distilled(inputs, "dm", tmp_path / "run", augment="color_flip").latents.isfinite().all()
    assert distilled(inputs, "random", tmp_path / "own").origin.training["augment"] == "none"


def test_data_for_which_no_network_is_named_get_the_one_for_their_kind(
    inputs: Inputs, tiny: Arrays, tmp_path: Path
) -> None:
    name = inputs.network.partition(":")[0]
    syn = distilled(inputs, "random", tmp_path / "run", network=f"auto:{inputs.network.partition(':')[2]}")
    assert syn.origin.recipe["network"] == inputs.network
    own = api.run(Recipe(method=small("random"), ipc=1), api.RunOptions(out=tmp_path / "own"), arrays=tiny)
    assert own.origin.recipe["network"] == "convnet"
    explicit = Recipe(method=small("random"), ipc=1, network="convnet")
    again = api.run(explicit, api.RunOptions(out=tmp_path / "explicit"), arrays=tiny)
    assert again.origin.recipe_hash == own.origin.recipe_hash
    assert default_for(inputs.arrays.input_shape) == name


def test_cutmix_exchanges_a_part_of_every_channel_and_frame(inputs: Inputs) -> None:
    shape = inputs.arrays.input_shape
    x = torch.arange(4.0).view(4, *(1 for _ in shape)).expand(4, *shape).contiguous()
    y, changed = torch.eye(4), 0.0
    for seed in range(20):
        mixed, targets = cutmix(x, y, 1.0, Rng(seed)("cutmix"))
        moved = (mixed != x).double()
        torch.testing.assert_close(moved.mean(tuple(range(1, x.dim()))), 1 - targets.diagonal().double())
        whole = moved if len(shape) == 2 else moved.movedim(1, 2)
        assert torch.equal(whole, whole[:, :1].expand_as(whole))
        changed += float(moved.mean())
    assert 0.1 < changed / 20 < 0.6
