"""Decoders: what all promise, and each against its definition written out."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.fft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from condense import api, recipe
from condense.baselines import Budget
from condense.data.datasets import Arrays, to_float
from condense.data.layout import InputShape, kind
from condense.data.transform import ChannelNorm
from condense.recipe import Recipe, named
from condense.registry import load as method
from condense.synthetic import (
    DCT,
    DECODERS,
    Bases,
    Codec,
    Coded,
    Decode,
    Factor,
    Hallucinator,
    Origin,
    Patches,
    Pixels,
    Pixels8Bit,
    Pyramid,
    Siren,
    StaticDynamic,
    SyntheticSet,
    load,
    save,
)
from condense.synthetic import decode as decode_module
from condense.synthetic.decode import Graphs, dct, inverse_dct
from tests.conftest import TINY

NUM_CLASSES = 3
SHAPES: list[InputShape] = [(1, 8, 8), (3, 7, 9)]
EVERY = [
    Pixels(),
    Pixels8Bit(),
    Patches(),
    Patches(patch=3, drop=0.5),
    Patches(drop=0.0),
    Factor(factor=2),
    DCT(coefficients=16),
    Bases(num_bases=5),
    Bases(num_bases=5, start="xavier"),
    Hallucinator(num_styles=3),
    Pyramid(),
    Pyramid(coarsest=2, finest=4, decorrelated=False),
    Siren(width=4, fit_steps=5),
    Codec(images=2, context=6, context_layers=2, width=4, fit_steps=5),
    StaticDynamic(statics=1, dynamics=1),
]
SERIES, CLIPS = (3, 16), (3, 2, 8, 7)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
cases = pytest.mark.parametrize(
    ("decode", "shape"),
    [(decode, shape) for shape in (*SHAPES, SERIES, CLIPS) for decode in EVERY if kind(shape) in decode.takes],
    ids=str,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(decode: Decode, shape: InputShape, ipc: int = 2) -> tuple[Tensor, Tensor]:
    """Initial images (expansion * N, *shape) and the classes (N,) of their latents."""
    each = decode.latents_per_class(ipc, shape, NUM_CLASSES)
    classes = torch.arange(NUM_CLASSES).repeat_interleave(each)
    return torch.randn(decode.expansion * len(classes), *shape, generator=generator()), classes


def encoded(decode: Decode, shape: InputShape, ipc: int = 2, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """decoder, latents, classes."""
    images, classes = draw(decode, shape, ipc)
    decoder = decode.build(shape, NUM_CLASSES)
    return decoder, decode.encode(images, classes, decoder, generator(seed)), classes


def synthetic(decode: Decode, shape: InputShape, ipc: int = 2) -> SyntheticSet:
    decoder, latents, classes = encoded(decode, shape, ipc)
    dataset = {"name": "made up", "fingerprint": "f", "classes": list("abc"), "input_shape": list(shape)}
    return SyntheticSet(
        latents, classes, Origin(dataset=dataset, transform={"kind": "none"}), decode=decode, decoder=decoder
    )


def test_every_decoder_is_held_to_this() -> None:
    """Except for that of graphs, which ``test_graphs`` tests."""
    assert {type(decode) for decode in EVERY} == set(DECODERS.values()) - {Graphs}


@cases
def test_images_are_as_many_as_promised_and_belong_to_their_latent(decode: Decode, shape: InputShape) -> None:
    decoder, latents, classes = encoded(decode, shape)
    images = decoder(latents, classes)
    assert images.shape == (decode.expansion * len(latents), *shape) and images.isfinite().all()
    order = torch.tensor([4, 0, 5]) % len(latents)
    copies = images.unflatten(0, (decode.expansion, -1))[:, order].flatten(0, 1)
    torch.testing.assert_close(decoder(latents[order], classes[order]), copies)


@cases
def test_latents_are_within_the_budget(decode: Decode, shape: InputShape) -> None:
    """But for those whose bits are learned: the budget does not decide how many there are."""
    if isinstance(decode, Coded):
        assert {decode.latents_per_class(ipc, shape, NUM_CLASSES) for ipc in (1, 9)} == {2}
        return
    syn = synthetic(decode, shape)
    shared = sum(p.numel() for p in syn.decoder.parameters()) if isinstance(decode, Bases) else 0
    assert syn.latents.numel() + shared <= 2 * NUM_CLASSES * math.prod(shape)


@cases
def test_gradient_reaches_every_latent_and_all_of_the_decoder(decode: Decode, shape: InputShape) -> None:
    syn = synthetic(decode, shape)
    images, _ = syn()
    assert images.requires_grad == decode.differentiable == bool(syn.leaves())
    if not decode.differentiable:
        return
    loss = (images * torch.randn(images.shape, generator=generator(1))).sum()
    if isinstance(decode, Coded):
        loss = loss + decode.rates(syn.latents, syn.classes, syn.decoder).sum()
    loss.backward()
    for leaf, params in syn.leaves().items():
        for param in params:
            assert param.grad is not None and param.grad.flatten(1 if param.dim() > 1 else 0).abs().sum(-1).all(), leaf


@pytest.mark.parametrize("decode", EVERY, ids=str)
def test_the_generator_alone_decides(decode: Decode) -> None:
    before = torch.get_rng_state()
    states = []
    for seed in (0, 0, 1):
        decoder, latents, _ = encoded(decode, (1, 8, 8) if "images" in decode.takes else CLIPS, seed=seed)
        states.append([latents, *decoder.state_dict().values()])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    same = all(torch.equal(a, b) for a, b in zip(states[0], states[2], strict=True))
    assert same == (
        not isinstance(decode, Hallucinator | Siren | StaticDynamic | Codec)
        and not (isinstance(decode, Patches) and decode.drop)
        and getattr(decode, "start", "images") == "images"
    )


@cases
def test_a_loaded_set_decodes_to_the_bit(decode: Decode, shape: InputShape, tmp_path: Path) -> None:
    syn = synthetic(decode, shape)
    with torch.no_grad():
        for params in syn.leaves().values():
            for param in params:
                param.add_(torch.randn(param.shape, generator=generator(2)))
    save(syn, tmp_path / "set.safetensors")
    again = load(tmp_path / "set.safetensors")
    assert again.decode == decode and again.cost() == syn.cost()
    assert torch.equal(again()[0], syn()[0])


@pytest.mark.parametrize("decode", EVERY, ids=str)
def test_the_recipe_holds_it(decode: Decode) -> None:
    plan = Recipe(method=method("dm")(), decode=decode)
    assert recipe.from_mapping(recipe.to_mapping(plan), "test") == plan


@pytest.mark.parametrize("name", [name for name, decode in DECODERS.items() if "images" in decode.takes])
def test_a_method_makes_such_a_set(name: str, tiny: Arrays, tmp_path: Path) -> None:
    quick = {"dct": DCT(coefficients=24), "siren": Siren(fit_steps=5), "codec": Codec(images=2, fit_steps=5)}
    decode = quick.get(name, DECODERS[name]())
    syn = api.distill("random", dataset=tiny, network=TINY, ipc=2, decode=decode, out=tmp_path / "run")
    each = decode.latents_per_class(2, (1, 8, 8), 3) * decode.expansion
    assert torch.equal(syn()[1].bincount(), torch.full((3,), each))
    assert torch.equal(load(tmp_path / "run")()[0], syn()[0])


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 4)])
def test_dct_is_the_one_of_scipy_and_its_inverse_is_exact(size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, *size, dtype=torch.float64, generator=generator())
    spectra = dct(images)
    np.testing.assert_allclose(spectra, scipy.fft.dctn(images, axes=(2, 3)), rtol=0, atol=1e-12)
    torch.testing.assert_close(inverse_dct(spectra), images, rtol=0, atol=1e-13)
    assert dct(images.float()).dtype == torch.float32


def test_dct_keeps_the_positions_that_vary_most_in_the_class() -> None:
    """The twin: loops and scipy."""
    decode, shape = DCT(coefficients=11), (3, 6, 5)
    images, classes = draw(decode, shape, ipc=1)
    decoder, latents, _ = encoded(decode, shape, ipc=1)
    for c in range(NUM_CLASSES):
        members = (classes == c).nonzero().flatten().tolist()
        spectra = [np.mean([scipy.fft.dctn(channel) for channel in images[i].numpy()], 0) for i in members]
        kept = sorted(np.argsort(-np.var(spectra, 0).flatten())[:11])
        assert decoder.positions[c].tolist() == kept
        for i in members:
            for channel in range(3):
                spectrum = scipy.fft.dctn(images[i, channel].numpy())
                masked = np.zeros(30, np.float32)
                masked[kept] = spectrum.flatten()[kept]
                np.testing.assert_allclose(latents[i, channel], masked[kept], rtol=1e-4, atol=1e-4)
                expected = scipy.fft.idctn(masked.reshape(6, 5))
                np.testing.assert_allclose(decoder(latents, classes)[i, channel], expected, rtol=1e-4, atol=1e-5)


def test_dct_with_all_coefficients_gives_the_images_back() -> None:
    images, classes = draw(DCT(coefficients=64), (1, 8, 8))
    decoder, latents, _ = encoded(DCT(coefficients=64), (1, 8, 8))
    torch.testing.assert_close(decoder(latents, classes), images)


def test_dct_of_a_single_image_keeps_its_largest_coefficients() -> None:
    decode = DCT(coefficients=40)
    images, _ = draw(decode, (1, 8, 8), ipc=1)
    _, latents, _ = encoded(decode, (1, 8, 8), ipc=1)
    assert len(images) == NUM_CLASSES
    for c in range(NUM_CLASSES):
        largest = np.sort(np.abs(scipy.fft.dctn(images[c, 0].numpy())).flatten())[-40:]
        np.testing.assert_allclose(latents[c].abs().sort().values[0], largest, rtol=1e-4)


def test_dct_of_copies_of_an_image_keeps_what_one_of_them_keeps() -> None:
    """A class with one image is repeated by ``ipc_policy``; the copies have no variance."""
    decode = DCT(coefficients=4)
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    kept = []
    for num in (1, 3):
        decoder, classes = decode.build((1, 8, 8), 1), torch.zeros(num, dtype=torch.long)
        decode.encode(image.expand(num, -1, -1, -1), classes, decoder, torch.Generator())
        kept.append(decoder.positions.tolist())
    assert kept[0] == kept[1]


@pytest.mark.parametrize(("kept", "images"), [(None, 32), (4, 32), (64, 2), (63, 2), (33, 3)])
def test_dct_buys_as_many_images_as_its_floats(kept: int | None, images: int) -> None:
    decode = DCT(coefficients=kept)
    assert decode.latents_per_class(2, (1, 8, 8), 10) == images
    assert DCT().num_coefficients((3, 2, 2)) == 1


@shapes
def test_bases_are_upsampled_and_summed(shape: InputShape) -> None:
    decoder, latents, classes = encoded(Bases(num_bases=5), shape)
    small = (shape[0], math.ceil(shape[1] / 2), math.ceil(shape[2] / 2))
    assert decoder.bases.shape == (5, *small)
    for i, row in enumerate(latents):
        half = sum(value * basis for value, basis in zip(row, decoder.bases, strict=True))
        assert isinstance(half, Tensor)
        expected = F.interpolate(half[None], size=shape[1:], mode="bilinear")[0]
        torch.testing.assert_close(decoder(latents, classes)[i], expected)


@pytest.mark.parametrize(
    ("shape", "small", "mode"), [((3, 15), (3, 8), "linear"), ((5, 2, 8, 7), (3, 2, 4, 4), "trilinear")]
)
def test_bases_of_series_and_clips_have_half_the_resolution(shape: InputShape, small: InputShape, mode: str) -> None:
    decoder, latents, classes = encoded(Bases(num_bases=5), shape)
    assert decoder.bases.shape == (5, *small)
    clips = len(shape) == 4
    half = torch.einsum("nk,k...->n...", latents, decoder.bases.transpose(1, 2) if clips else decoder.bases)
    size = (shape[0], *shape[2:]) if clips else shape[1:]
    expected = F.interpolate(half, size=size, mode=mode)
    torch.testing.assert_close(decoder(latents, classes), expected.transpose(1, 2) if clips else expected)


@pytest.mark.parametrize("shape", [SERIES, CLIPS])
@pytest.mark.parametrize("decode", [decode for decode in EVERY if decode.takes == ("images",)], ids=str)
def test_a_decoder_that_does_not_make_such_samples_names_those_that_do(decode: Decode, shape: InputShape) -> None:
    origin = Origin(dataset={"classes": ["a", "b"], "input_shape": list(shape)}, transform={"kind": "none"})
    names = "pixels, pixels-8bit, bases, static-dynamic" if shape == CLIPS else "pixels, bases"
    line = rf"^decoder {decode.name} takes images, not {kind(shape)} .*; give decode='pixels'; .* are {names}$"
    with pytest.raises(ValueError, match=line):
        SyntheticSet(torch.zeros(2, *shape), torch.arange(2), origin, decode=decode)


def test_bases_begin_at_the_best_fit() -> None:
    """Eckart and Young: what is left over are the singular values that were not kept."""
    images, _ = draw(Bases(num_bases=5), (1, 8, 8))
    decoder, latents, _ = encoded(Bases(num_bases=5), (1, 8, 8))
    small = F.avg_pool2d(images, 2).flatten(1)
    left = (latents @ decoder.bases.flatten(1) - small).square().sum()
    torch.testing.assert_close(left, torch.linalg.svdvals(small)[5:].square().sum())


def test_bases_that_the_fit_does_not_need_can_still_learn() -> None:
    decode = Bases(num_bases=20)
    images, classes = torch.randn(3, 1, 8, 8, generator=generator()), torch.arange(3)
    decoder = decode.build((1, 8, 8), NUM_CLASSES)
    latents = decode.encode(images, classes, decoder, generator()).requires_grad_()
    torch.testing.assert_close(latents @ decoder.bases.flatten(1), F.avg_pool2d(images, 2).flatten(1))
    decoder(latents, classes).square().sum().backward()
    assert latents.grad is not None and latents.grad.count_nonzero() == latents.numel()


def test_bases_as_published_begin_xavier_uniform() -> None:
    decode = Bases(num_bases=40, start="xavier")
    decoder, latents, _ = encoded(decode, (1, 16, 16), ipc=20)
    for matrix in (decoder.bases.detach().flatten(1), latents):
        bound = math.sqrt(6 / sum(matrix.shape))
        assert 0.98 * bound < matrix.abs().max() <= bound and matrix.mean().abs() < 0.05 * bound
        torch.testing.assert_close(matrix.std(), torch.tensor(bound / math.sqrt(3)), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("shape", "num_classes", "ipc", "rows"),
    [((3, 32, 32), 10, 1, 115), ((3, 32, 32), 10, 10, 1843), ((1, 8, 8), 10, 1, 2), ((1, 7, 7), 3, 2, 0)],
)
def test_bases_leave_the_rest_of_the_budget_to_coefficients(
    shape: InputShape, num_classes: int, ipc: int, rows: int
) -> None:
    """Of a budget of ipc * C images: 16 bases at half resolution, then rows of 16 coefficients."""
    if rows:
        assert Bases(num_bases=16).latents_per_class(ipc, shape, num_classes) == rows
        return
    with pytest.raises(ValueError, match=r"16 bases of 16 numbers .* give decode=Bases\(num_bases=15\) or less$"):
        Bases(num_bases=16).latents_per_class(ipc, shape, num_classes)
    assert Bases(num_bases=15).latents_per_class(ipc, shape, num_classes) == 1


@shapes
def test_styles_at_once_are_styles_one_by_one(shape: InputShape) -> None:
    """The twin: the layers of torch, style after style."""
    syn = synthetic(Hallucinator(num_styles=3), shape)
    channels, decoder = shape[0], syn.decoder
    with torch.no_grad():
        for param in syn.parameters():
            param.add_(torch.randn(param.shape, generator=generator(3)))
        expected = []
        for k in range(3):
            part = slice(k * channels, (k + 1) * channels)
            first, last = nn.Conv2d(channels, channels, 3), nn.ConvTranspose2d(channels, channels, 3)
            first.weight.copy_(decoder.kernels[part])
            first.bias.copy_(decoder.bias[part])  # type: ignore[union-attr]
            last.weight.copy_(decoder.kernels_back[part])
            last.bias.copy_(decoder.bias_back[part])  # type: ignore[union-attr]
            expected.append(last(decoder.scale[part] * first(syn.latents) + decoder.shift[part]))
    torch.testing.assert_close(syn()[0], torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_styles_begin_near_the_first_copy_and_differ() -> None:
    decode = Hallucinator(num_styles=4)
    images, classes = draw(decode, (3, 12, 12))
    decoder, latents, _ = encoded(decode, (3, 12, 12))
    assert torch.equal(latents, images[: len(classes)])
    inside = decoder(latents, classes).unflatten(0, (4, -1))[..., 1:-1, 1:-1].detach()
    wanted = latents[..., 1:-1, 1:-1]
    assert (inside - wanted).std() < 0.5 * wanted.std()
    assert all((inside[a] - inside[b]).std() > 0.1 for a in range(4) for b in range(a))


@pytest.mark.parametrize("shape", [(3, 7, 9), (3, 8, 8), (1, 8, 8)], ids=str)
def test_a_pyramid_is_the_sigmoid_of_the_sum_of_its_levels(shape: InputShape) -> None:
    """The twin: one image, level and pixel after the other, from the definition of bilinear interpolation."""
    decode = Pyramid()
    decoder = decode.build(shape, NUM_CLASSES)
    decode.fit(decoder, ChannelNorm(mean=(0.4, 0.5, 0.3)[: shape[0]], std=(0.2, 0.3, 0.1)[: shape[0]]))
    sizes = {(3, 7, 9): [(1, 1), (1, 2), (2, 3), (4, 5), (7, 9)]}.get(shape, [(1, 1), (2, 2), (4, 4), (8, 8)])
    assert decode.levels(shape) == sizes
    latents = torch.randn(2, shape[0], sum(h * w for h, w in sizes), generator=generator())
    colours = np.eye(1)
    if shape[0] == 3:
        colours = np.array([[0.26, 0.09, 0.02], [0.27, 0.0, -0.05], [0.27, -0.09, 0.03]])
        colours /= max(np.sqrt((colours**2).sum(0)))
    channels, height, width = shape

    def at(level: Any, y: int, x: int) -> Any:
        places = []
        for k, side, full in ((y, level.shape[1], height), (x, level.shape[2], width)):
            place = max((k + 0.5) * side / full - 0.5, 0)
            low = int(place)
            places.append((low, min(low + 1, side - 1), place - low))
        (y0, y1, v), (x0, x1, u) = places
        upper, lower = ((1 - u) * level[:, row, x0] + u * level[:, row, x1] for row in (y0, y1))
        return (1 - v) * upper + v * lower

    expected = np.zeros((2, *shape))
    for i in range(2):
        parts = np.split(latents[i].double().numpy(), np.cumsum([h * w for h, w in sizes])[:-1], 1)
        levels = [part.reshape(channels, *size) for part, size in zip(parts, sizes, strict=True)]
        for y in range(height):
            for x in range(width):
                pixel = 1 / (1 + np.exp(-2 * colours @ sum(at(level, y, x) for level in levels)))
                expected[i, :, y, x] = (pixel - [0.4, 0.5, 0.3][:channels]) / np.array([0.2, 0.3, 0.1][:channels])
    np.testing.assert_allclose(decoder(latents, torch.zeros(2)), expected, rtol=1e-4, atol=1e-4)
    first = sum(h * w for h, w in sizes[:2])
    others = torch.cat([latents[:, :, :first], torch.zeros_like(latents[:, :, first:])], 2)
    torch.testing.assert_close(decoder(latents[:, :, :first], torch.zeros(2)), decoder(others, torch.zeros(2)))


@pytest.mark.parametrize("transform", ["none", "channel"])
def test_a_pyramid_of_full_size_begins_at_the_real_images(transform: str, tiny: Arrays, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"dataset": tiny, "network": TINY, "ipc": 2, "transform": transform}
    syn = api.distill("random", decode=Pyramid(), out=tmp_path / "run", **fields)
    pixels = [
        (made.to_dataset("pixels").tensors[0] * 255).round().byte()  # type: ignore[attr-defined]
        for made in (syn, api.distill("random", out=tmp_path / "pixels", **fields))
    ]
    assert len(syn) == 3 and len(pixels[1]) == 6
    for image in pixels[0]:
        assert any(torch.equal(image, other) for other in torch.from_numpy(tiny.x_train).view(-1, 1, 8, 8))


def test_a_pyramid_is_refused_where_it_cannot_be(tiny: Arrays, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"dataset": tiny, "network": TINY, "out": tmp_path / "run"}
    with pytest.raises(ValueError, match=r"random cannot whiten the pixels that pyramid makes by zca; give transform="):
        api.distill("random", decode=Pyramid(), ipc=2, transform="zca", **fields)
    mend = r"a pyramid has 85 numbers per channel, more than the 64 of ipc=1; give ipc=2, or decode=Pyramid\(finest=4\)"
    with pytest.raises(ValueError, match=mend):
        api.distill("random", decode=Pyramid(), ipc=1, **fields)
    with pytest.raises(ValueError, match=r"decode.finest is 9, but the longer side of an image has 8 pixels"):
        api.distill("random", decode=Pyramid(finest=9), ipc=2, **fields)
    assert len(api.distill("random", decode=Pyramid(finest=4), ipc=1, **fields)) == 9
    with pytest.raises(ValueError, match=r"decode.coarsest must be at least 1 and at most decode.finest, got 4 and 2"):
        Pyramid(coarsest=4, finest=2)


def siren(decode: Siren, latent: Tensor, channels: int) -> nn.Sequential:
    """The twin of a network: layers of torch with the weights of a latent (P,)."""

    class Sine(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(self.factor * x)

    layers: list[nn.Module] = [nn.Linear(2, decode.width), Sine(decode.first_frequency)]
    for _ in range(decode.depth - 1):
        layers += [nn.Linear(decode.width, decode.width), Sine(decode.frequency)]
    layers.append(nn.Linear(decode.width, channels))
    numbers = iter(latent.tolist())
    with torch.no_grad():
        for layer in layers:
            for row in range(layer.out_features if isinstance(layer, nn.Linear) else 0):  # type: ignore[arg-type]
                layer.weight[row] = torch.tensor([next(numbers) for _ in range(layer.in_features)])  # type: ignore
                layer.bias[row] = next(numbers)  # type: ignore[index,operator]
    assert next(numbers, None) is None
    return nn.Sequential(*layers)


def seen(network: nn.Module, height: int, width: int) -> Tensor:
    """The image of the twin, from -1 at the first pixel of an axis to 1 at the last: the (H W, C) colours."""
    rows, columns = (2 * np.arange(side) / (side - 1) - 1 for side in (height, width))
    return network(torch.tensor([[row, column] for row in rows for column in columns], dtype=torch.float32))  # type: ignore


@pytest.mark.parametrize("depth", [1, 3])
def test_a_siren_is_fitted_to_each_image_by_itself_and_has_no_size(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: one network after the other, by Adam; and the images that they have at twice the size."""
    monkeypatch.setattr(decode_module, "_FITTED_AT_ONCE", 2 * 5 * 7 * 9)
    shape, classes = (3, 7, 9), torch.zeros(3)
    images = torch.randn(3, *shape, generator=generator())
    decode = Siren(width=5, depth=depth, frequency=3.0, fit_steps=4, fit_lr=0.01)
    start, latents = (
        each.encode(images, classes, each.build(shape, 1), generator())
        for each in (dataclasses.replace(decode, fit_steps=0), decode)
    )
    large = decode.build((3, 14, 18), 1)(latents, classes)
    for i, image in enumerate(images):
        network = siren(decode, start[i], 3)
        for layer in network[::2]:
            bound = 1 / 2 if layer is network[0] else math.sqrt(6 / 5) / 3
            weights = torch.cat([layer.weight.flatten(), layer.bias])  # type: ignore[union-attr,operator]
            assert 0.7 * bound < weights.abs().max() <= bound
        optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
        for _ in range(4):
            optimiser.zero_grad()
            F.mse_loss(seen(network, 7, 9), image.flatten(1).T).backward()
            optimiser.step()
        torch.testing.assert_close(large[i].flatten(1).T, seen(network, 14, 18), rtol=1e-4, atol=1e-4)
    nested = decode.build((3, 13, 17), 1)(latents, classes)[:, :, ::2, ::2]
    torch.testing.assert_close(decode.build(shape, 1)(latents, classes), nested, rtol=1e-4, atol=1e-4)


def test_sirens_are_as_many_as_their_weights_allow() -> None:
    """With the published widths at 1, 10 and 50 images per class."""
    weights = {"cifar10": {1: 81, 10: 81, 50: 543}, "cifar100": {1: 173, 10: 333, 50: 1113}}
    for matched in ("dm", "mtt"):
        for dataset, budgets in weights.items():
            for ipc, each in budgets.items():
                decode = named(f"{matched}-siren-{dataset}-ipc{ipc}").decode
                assert isinstance(decode, Siren) and (decode.depth, decode.frequency) == (2, 10.0)
                assert decode.latents_per_class(ipc, (3, 32, 32), 10) == ipc * 3072 // each
    line = r"has 67 weights, more than the 64 numbers of ipc=1; give ipc=2, or decode=Siren\(width=5\)$"
    with pytest.raises(ValueError, match=line):
        Siren().latents_per_class(1, (1, 8, 8), 10)


@pytest.mark.parametrize("transform", ["none", "channel"])
def test_pixels_of_8_bits_decode_to_exactly_the_real_images(transform: str, tiny: Arrays, tmp_path: Path) -> None:
    """As they were transformed for the task, in a quarter of the bytes."""
    fields: dict[str, Any] = {"dataset": tiny, "network": TINY, "ipc": 3, "transform": transform}
    exact = api.distill("random", out=tmp_path / "exact", **fields)
    small = api.distill("random", out=tmp_path / "small", decode="pixels-8bit", **fields)
    again = load(tmp_path / "small")
    assert small.latents.dtype == again.latents.dtype == torch.uint8 and not small.latents.requires_grad
    assert torch.equal(small()[0], exact()[0]) and torch.equal(again()[0], exact()[0])
    assert small.cost().images * 4 == exact.cost().images and small.cost().decoder == 2 * 4
    stored = (tmp_path / "small" / "synthetic.safetensors").stat().st_size
    assert stored < (tmp_path / "exact" / "synthetic.safetensors").stat().st_size - 2 * small.cost().images


def test_pixels_of_8_bits_are_the_nearest_ones() -> None:
    decode, images = Pixels8Bit(), torch.tensor([[[[-0.2, 0.499 / 255]], [[1.501 / 255, 1.7]]]])
    decoder = decode.build((2, 1, 2), 1)
    decode.fit(decoder, ChannelNorm(mean=(0.0, 0.0), std=(1.0, 1.0)))
    assert decode.encode(images, torch.zeros(1), decoder, generator()).flatten().tolist() == [0, 0, 2, 255]


@pytest.mark.parametrize(
    ("name", "fields", "why"),
    [
        ("dm", {}, r"learns the images, .*; give decode='pixels'$"),
        ("random", {"transform": "zca"}, r"cannot round images whitened by zca .*; give transform='channel'$"),
    ],
)
def test_pixels_of_8_bits_are_refused_where_they_cannot_be(name: str, fields: Any, why: str, tiny: Arrays) -> None:
    with pytest.raises(ValueError, match=why) as error:
        api.distill(name, dataset=tiny, network=TINY, decode="pixels-8bit", **fields)
    assert "\n" not in str(error.value)


def test_a_set_that_claims_8_bits_has_them(tmp_path: Path) -> None:
    syn = synthetic(Pixels8Bit(), (1, 8, 8))
    syn.latents = nn.Parameter(syn.latents.float())
    save(syn, tmp_path / "set.safetensors")
    with pytest.raises(ValueError, match="it has no 8-bit latents"):
        load(tmp_path / "set.safetensors")


@pytest.mark.parametrize("budget", ["images", "bytes"])
def test_a_baseline_has_8_bit_pixels_where_the_set_has_them(budget: Budget, tiny: Arrays, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"dataset": tiny, "network": TINY, "ipc": 2}
    small = api.distill("random", out=tmp_path / "small", decode="pixels-8bit", **fields)
    options: dict[str, Any] = {"networks": ["mlp"], "num_seeds": 1, "device": "cpu"}
    row = api.evaluate(small, tiny, baselines=["random"], budget=budget, **options).results[1]
    assert row.num_images == 6 and row.stored_bytes["images"] == small.cost().images


def test_costs_are_told_apart() -> None:
    """Bytes; the five published hallucinators of 32 x 32 colour images have 5568 numbers each."""
    ipc, pixels = 4, 3 * 32 * 32
    images = NUM_CLASSES * ipc * pixels * 4
    costs: dict[str, Any] = {}
    for decode in (Pixels(), Factor(), DCT(coefficients=64), Bases(num_bases=16), Hallucinator(), Pyramid(finest=16)):
        costs[decode.name] = synthetic(decode, (3, 32, 32), ipc).cost()
    assert [costs[name].images for name in ("pixels", "factor", "dct", "hallucinator")] == [images] * 4
    assert costs["pixels"].decoder == costs["factor"].decoder == 0
    assert costs["dct"].decoder == NUM_CLASSES * 64 * 4
    assert costs["hallucinator"].decoder == 5 * 5568 * 4
    assert costs["bases"].decoder == 16 * pixels // 4 * 4 and costs["pyramid"].decoder == (3 + 3 + 9) * 4
    siren = synthetic(Siren(width=20, fit_steps=0), (3, 32, 32), ipc).cost()
    assert (siren.images, siren.decoder) == (NUM_CLASSES * 22 * 543 * 4, 0)
    assert images - NUM_CLASSES * 16 * 4 < costs["bases"].images + costs["bases"].decoder <= images


@pytest.mark.parametrize(
    ("make", "mend"),
    [
        (lambda: Factor(factor=0), "the published value is 2"),
        (lambda: DCT(coefficients=0), "try 64"),
        (
            lambda: DCT(coefficients=65).latents_per_class(1, (1, 8, 8), 10),
            r"give decode=DCT\(coefficients=64\) or less",
        ),
        (lambda: Bases(num_bases=0), "try 16"),
        (lambda: Hallucinator(num_styles=0), "the published value is 5"),
        (lambda: Siren(width=0), "decode.width must be at least 1, got 0; the published value is 6"),
        (lambda: Siren(fit_lr=0.0), "decode.fit_lr must be .*less than 1e30, got 0.0; the published value is 0.0005"),
        (lambda: Hallucinator().latents_per_class(1, (1, 2, 8), 10), "give decode='pixels'"),
    ],
)
def test_bad_fields_are_refused_with_the_mend(make: Any, mend: str) -> None:
    with pytest.raises(ValueError, match=mend) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("decode", [DCT(), Codec(levels=2, context=5)])
def test_what_was_decoded_in_inference_mode_can_be_learned_later(decode: Decode) -> None:
    """No other test uses this size and context, so that matrices and windows are made in inference mode."""
    decoder, classes = decode.build((1, 11, 13), 1), torch.zeros(2, dtype=torch.long)
    latents = torch.zeros(2, *decode.latent_shape((1, 11, 13)), requires_grad=True)

    def loss() -> Tensor:
        squares = decoder(latents, classes).square().sum()
        return squares + decode.rates(latents, classes, decoder).sum() if isinstance(decode, Coded) else squares

    with torch.inference_mode():
        loss()
    loss().backward()
    assert latents.grad is not None


@pytest.mark.parametrize("finest", [0, -1])
def test_a_pyramid_without_a_level_is_refused(finest: int) -> None:
    line = rf"decode.coarsest must be at least 1 and at most decode.finest, got 1 and {finest}"
    with pytest.raises(ValueError, match=line):
        Pyramid(finest=finest)


class AsOnGPU(TorchFunctionMode):
    """Divides by a number as a GPU does, by multiplication with its inverse."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.div, Tensor.div_, Tensor.__truediv__) and isinstance(args[1], int | float):
            return args[0].mul(torch.tensor(1 / args[1], dtype=args[0].dtype))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("decode", [Pixels8Bit(), Patches(patch=4, drop=0.0), Patches(patch=4, drop=0.5)])
def test_bytes_are_decoded_to_the_pixels_of_the_data_on_any_device(decode: Decode) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    decoder = decode.build((1, 16, 16), 1)
    latents = pixels if isinstance(decode, Pixels8Bit) else decoder.packed(pixels, torch.ones(1, 16, 16))
    with AsOnGPU():
        decoded = decoder(latents, torch.zeros(1))
    known = torch.isin(decoded, to_float(pixels))
    assert known.all() if not isinstance(decode, Patches) or not decode.drop else known[..., :8, :].all()
