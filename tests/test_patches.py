"""The decoder ``patches``: which patches are stored of an image, in how many bytes, and what becomes of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from condense import api, engine
from condense.cli import main
from condense.data.datasets import Arrays
from condense.data.layout import InputShape
from condense.data.transform import ChannelNorm
from condense.method import Context, Method
from condense.methods.graph_cut import DQ
from condense.methods.selection import Herding, Random, saliency, trained
from condense.networks import Functional, Weights
from condense.synthetic import Origin, Patches, Pixels8Bit, SyntheticSet, load, save
from condense.synthetic.budget import latents_per_class
from condense.synthetic.labels import Hard
from condense.synthetic.patches import filled
from tests.conftest import TINY
from tests.reference import patches as reference
from tests.test_selection import draw_images, make_context, train

pytestmark = pytest.mark.usefixtures("short_protocol")

SHAPES: list[InputShape] = [(1, 8, 8), (3, 7, 9)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(shape: InputShape, num: int = 3) -> tuple[Tensor, Tensor]:
    """Pixels (num, *shape), uint8, and the importance of each place."""
    pixels = torch.randint(0, 256, (num, *shape), generator=generator(), dtype=torch.uint8)
    return pixels, torch.rand(num, *shape[1:], generator=generator(1))


def images_of(pixels: Tensor) -> Tensor:
    """The images in the space of ``none``."""
    return pixels.float() / 255


def kept_pixels(decode: Patches, shape: InputShape, latents: Tensor) -> Tensor:
    """Whether a pixel is stored, (N, H, W)."""
    side, (rows, columns) = decode.side(shape), decode.grid(shape)
    packed = latents[:, : decode.mask_bytes(shape)].numpy()
    bits = np.unpackbits(packed, axis=1, bitorder="little")[:, : rows * columns].reshape(-1, rows, columns)
    return torch.from_numpy(np.kron(bits, np.ones((1, side, side)))[:, : shape[1], : shape[2]] > 0)


@pytest.mark.parametrize(("patch", "drop"), [(None, 0.2), (2, 0.5), (3, 0.3), (3, 0.9), (4, 0.0), (1, 0.7)])
@shapes
def test_it_is_the_slow_twin(patch: int | None, drop: float, shape: InputShape) -> None:
    decode, (pixels, importance) = Patches(patch=patch, drop=drop), draw(shape)
    decoder, side = decode.build(shape, 1), decode.side(shape)
    latents = decode.encode_by(importance, images_of(pixels), decoder)
    decoded = decoder(latents, torch.zeros(3))
    for i in range(3):
        kept = reference.keep(importance[i].double().numpy(), side, decode.kept(shape))
        assert latents[i].tolist() == reference.stored(pixels[i].numpy(), kept, side)
        np.testing.assert_allclose(decoded[i], reference.restored(pixels[i].numpy(), kept, side), rtol=0, atol=1e-6)


@pytest.mark.parametrize("transform", [(0.0, 1.0), (0.3, 0.2)])
@shapes
def test_kept_pixels_are_exact_and_the_others_interpolated(transform: tuple[float, float], shape: InputShape) -> None:
    """A dropped patch is within the values of those kept, and that of an even image is as it was."""
    decode, (pixels, importance) = Patches(patch=2, drop=0.4), draw(shape)
    pixels = 64 + pixels // 2
    mean, std = ((value,) * shape[0] for value in transform)
    norm = ChannelNorm(mean=mean, std=std)
    decoder, plain = (each.build(shape, 1) for each in (decode, Pixels8Bit()))
    decode.fit(decoder, norm)
    Pixels8Bit().fit(plain, norm)
    images = plain(pixels, torch.zeros(3))
    latents = decode.encode_by(importance, images, decoder)
    known, decoded = kept_pixels(decode, shape, latents)[:, None].expand_as(images), decoder(latents, torch.zeros(3))
    assert 0.5 < known.float().mean() < 0.8
    assert torch.equal(decoded[known], images[known])
    assert (decoded[~known] != images[~known]).float().mean() > 0.9
    for image, original, mask in zip(decoded, images, known, strict=True):
        assert original[mask].min() <= image[~mask].min() and image[~mask].max() <= original[mask].max()
    even = plain(torch.full_like(pixels, 77), torch.zeros(3))
    torch.testing.assert_close(decoder(decode.encode_by(importance, even, decoder), torch.zeros(3)), even)


def test_a_dropped_patch_is_like_its_neighbours() -> None:
    """A patch of the left, dark half stays dark, and one of the right half bright."""
    image = torch.zeros(1, 1, 16, 16)
    image[..., 8:] = 1.0
    known = torch.ones(1, 1, 16, 16)
    known[..., 6:8, 2:4] = known[..., 6:8, 12:14] = 0
    result = filled(torch.where(known > 0, image, torch.full_like(image, 0.5)), known)
    assert (result - image).abs().max() < 0.05 and torch.equal(result[known > 0], image[known > 0])
    one = torch.zeros(1, 1, 5, 3)
    one[..., 4, 1] = 1
    assert torch.equal(filled(one * 0.25, one), torch.full_like(one, 0.25)), "one known pixel fills the image"


@pytest.mark.parametrize(
    ("shape", "patch", "drop", "side", "kept", "latent"),
    [
        ((3, 224, 224), None, 0.2, 16, 156, 25 + 156 * 3 * 256),
        ((3, 32, 32), None, 0.2, 2, 204, 32 + 204 * 3 * 4),
        ((3, 32, 32), 8, 0.25, 8, 12, 2 + 12 * 3 * 64),
        ((1, 8, 8), None, 0.2, 2, 12, 2 + 12 * 4),
        ((3, 7, 9), 2, 0.0, 2, 20, 20 * 3 * 4),
        ((1, 8, 8), 4, 0.99, 4, 1, 1 + 16),
        ((3, 64, 96), None, 0.0, 4, 384, 3 * 64 * 96),
        ((1, 31, 31), None, 0.1, 1, 864, 121 + 864),
        ((1, 10, 10), 1, 0.9, 1, 10, 13 + 10),
    ],
)
def test_bytes_by_hand(shape: InputShape, patch: int | None, drop: float, side: int, kept: int, latent: int) -> None:
    """A bit for each patch, unless all are kept, and a byte for each pixel and channel of those kept."""
    decode = Patches(patch=patch, drop=drop)
    assert (decode.side(shape), decode.kept(shape), decode.latent_shape(shape)) == (side, kept, (latent,))


def test_what_patches_save_buys_more_images() -> None:
    """Of the floats of 10 images, and of their bits with the labels."""
    decode, cifar10 = Patches(), ((3, 32, 32), 10, 10)
    assert decode.latents_per_class(10, (3, 32, 32), 10) == 10 * 3072 // 2480 == 12
    allowed = 10 * 10 * (3072 * 32 + 4)
    assert latents_per_class("bits", 10, decode, Hard(), *cifar10) == (allowed - 6 * 32) // (10 * (2480 * 8 + 4)) == 49


def selected(chosen: Method, norm: str) -> tuple[Context, SyntheticSet, SyntheticSet]:
    """The set of three to six images per class in patches of 2 x 2 pixels, of which 9 of 16 are kept, and the same
    images in 8-bit pixels."""
    images, labels = draw_images()
    images = (255 * images).round() / 255
    ctx = make_context(images, labels, ipc=3, norm=norm, decode=Patches(patch=2, drop=0.4))
    whole = make_context(images, labels, ipc=ctx.images_per_class, norm=norm, decode=Pixels8Bit())
    return ctx, engine.compute(chosen, ctx), engine.compute(chosen, whole)


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_dq_keeps_the_patches_that_matter_to_its_network(norm: str) -> None:
    """The twin: the Jacobian of one image after the other."""
    ctx, syn, whole = selected(DQ(num_epochs=2, num_bins=3), norm)
    weights = train(ctx, 2)
    assert len(syn) == len(whole) == 3 * (3 * 64 // 38) and torch.equal(syn.classes, whole.classes)

    def logits(x: Tensor) -> Tensor:
        return ctx.task.network.logits(*weights, x, train=False)

    for latent, original, image in zip(syn.latents, whole.latents, whole()[0], strict=True):
        kept = reference.keep(reference.importance(logits, image[None]), 2, 9)
        assert latent.tolist() == reference.stored(original.numpy(), kept, 2)


@pytest.mark.parametrize(
    ("chosen", "num_epochs"),
    [(Random(teacher_epochs=3), 3), (Herding(num_epochs=2), 2), (DQ(features="pixels", num_epochs=2, num_bins=2), 2)],
)
def test_the_network_of_the_features_scores_or_that_of_the_labels(chosen: Method, num_epochs: int) -> None:
    ctx, syn, whole = selected(chosen, "instance")
    (weights,), images = trained(ctx, num_epochs), whole()[0]
    assert isinstance(ctx.decode, Patches)
    expected = ctx.decode.encode_by(saliency(ctx.task.network, weights, images), images, syn.decoder)
    assert torch.equal(syn.latents, expected)


def test_importance_is_the_gradient_of_the_largest_logit() -> None:
    """Of a linear network with two classes, each of which reads one corner only."""
    network = Functional(lambda shape, n: nn.Sequential(nn.Flatten(), nn.Linear(2 * 36, n)), (2, 6, 6), 2)
    matrix = torch.zeros(2, 2, 6, 6)
    matrix[0, 0, :2, :2], matrix[0, 1, :2, :2], matrix[1, 1, 4:, 4:] = 0.5, -2.0, 3.0
    (weight, bias) = network.shapes
    weights = Weights({weight: matrix.flatten(1), bias: torch.tensor([0.0, 0.1])}, {})
    images = torch.zeros(2, 2, 6, 6)
    images[0, 0] = 1.0
    expected = torch.zeros(2, 6, 6)
    expected[0, :2, :2], expected[1, 4:, 4:] = 2.0, 3.0
    assert torch.equal(saliency(network, weights, images), expected)
    decode, shape = Patches(patch=2, drop=0.8), (2, 6, 6)
    kept = kept_pixels(decode, shape, decode.encode_by(expected, images, decode.build(shape, 2)))
    assert torch.equal(kept, expected > 0), "of 9 patches 1 is kept"
    even = kept_pixels(decode, shape, decode.encode_by(torch.ones(2, 6, 6), images, decode.build(shape, 2)))
    assert even.sum() == 8 and even[:, :2, :2].all(), "the first in a tie"


def test_saliency_is_that_of_each_image_whatever_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = make_context(*draw_images(), norm="batch")
    weights, images = train(ctx, 1), ctx.task.train.images[:]
    at_once = saliency(ctx.task.network, weights, images)
    assert not at_once.requires_grad and at_once.shape == (len(images), 8, 8)
    monkeypatch.setattr("condense.methods.selection.BATCH", 4)
    torch.testing.assert_close(saliency(ctx.task.network, weights, images), at_once)


def test_a_share_of_0_is_the_plain_set(tiny: Arrays, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"dataset": tiny, "network": TINY, "ipc": 3}
    plain = api.distill("random", out=tmp_path / "plain", decode=Pixels8Bit(), **fields)
    all_of_it = api.distill("random", out=tmp_path / "all", decode=Patches(drop=0.0), **fields)
    assert torch.equal(all_of_it()[0], plain()[0]) and all_of_it.cost() == plain.cost()
    exact = api.distill("random", out=tmp_path / "exact", **fields)
    assert torch.equal(all_of_it()[0], exact()[0])


def test_a_fraction_has_the_same_images_in_fewer_bytes(tiny: Arrays, tmp_path: Path) -> None:
    """Of 16 patches of 2 x 2 pixels 12 are kept: 2 bytes and 48, in place of 64; the file grows by no more."""
    fields: dict[str, Any] = {"dataset": tiny, "network": TINY, "fraction": 0.5, "num_bins": 2, "num_epochs": 1}
    whole = api.distill("dq", out=tmp_path / "whole", decode="pixels-8bit", **fields)
    few = api.distill("dq", out=tmp_path / "few", decode="patches", **fields)
    again, num = load(tmp_path / "few"), len(few)
    assert num == len(whole) and torch.equal(few.classes, whole.classes)
    assert again.decode == few.decode == Patches() and torch.equal(again()[0], few()[0])
    known = kept_pixels(Patches(), (1, 8, 8), few.latents)[:, None]
    assert known.float().mean() == 0.75 and torch.equal(few()[0][known], whole()[0][known])
    assert few.cost() == (num * 50, num * 8, 8) and again.latents.nbytes == num * 50
    assert few.num_bits == num * (50 * 8 + 2) + 2 * 32
    size = [(tmp_path / run / "synthetic.safetensors").stat().st_size for run in ("whole", "few")]
    assert abs(size[0] - size[1] - num * 14) < 300, "the headers differ by the fields of the decoder"


def test_classes_of_few_images_give_all_they_have(tiny: Arrays, tmp_path: Path) -> None:
    few = np.flatnonzero(tiny.y_train == 1)[3:]
    arrays = [np.delete(tiny.x_train, few, 0), np.delete(tiny.y_train, few), tiny.x_test, tiny.y_test]
    fields: dict[str, Any] = {"dataset": tuple(arrays), "network": TINY, "ipc": 99, "ipc_policy": "all"}
    syn = api.distill("random", decode="patches", out=tmp_path / "run", **fields)
    assert syn.classes.bincount().tolist() == np.bincount(arrays[1]).tolist() and syn.classes.bincount()[1] == 3


def test_a_set_of_patches_is_shown_evaluated_and_exported(
    tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Baselines have whole images in 8-bit pixels. One of as many bytes has 4 per class, of 72 bytes with a label,
    where the set has 6 of 58. One of as many images has the 5 of the budget."""
    run = tmp_path / "run"
    words = ["--dataset", str(tiny_file), "--network", TINY, "--out", str(run)]
    main(["distill", "dq", "--decode", "patches", "--ipc", "5", "--method.num-epochs", "1", *words])
    main(["show", str(run)])
    shown = " ".join(capsys.readouterr().out.split())
    assert "decode, labels patches, hard" in shown and "images 900, labels 144, decoder 8" in shown
    options: dict[str, Any] = {"networks": [TINY], "num_seeds": 1, "device": "cpu", "baselines": ["random"]}
    for budget, images in (("bytes", 12), ("images", 15)):
        of_set, baseline = api.evaluate(run, tiny_file, budget=budget, **options).results
        assert (of_set.num_images, of_set.stored_bytes["images"]) == (18, 18 * 50)
        assert (baseline.num_images, baseline.stored_bytes["images"]) == (images, images * 64)
    main(["export", str(run), str(tmp_path / "out.npz")])
    with np.load(tmp_path / "out.npz") as arrays:
        pixels = torch.from_numpy(arrays["images"]).reshape(18, 1, 8, 8)
    decoded = load(run).to_dataset("pixels").tensors[0]  # type: ignore[attr-defined]
    torch.testing.assert_close(pixels.float() / (255 if pixels.dtype == torch.uint8 else 1), decoded, atol=1e-2, rtol=0)


@pytest.mark.parametrize(
    ("name", "fields", "line"),
    [
        ("dm", {}, r"^dm learns the images, which patches would round in every step; give decode='pixels'$"),
        ("random", {"transform": "zca"}, r"^random cannot round images whitened by zca to patches; give transform="),
        ("rded", {}, r"^rded selects no real images, of which patches would drop .*; give decode='pixels-8bit'$"),
        ("sre2l", {}, r"^sre2l recovers one image after the other, unlike patches; give decode='pixels'$"),
        ("random", {"decode": Patches(patch=9)}, r"^decode.patch is 9, but the shorter side .* 8 pixels; give decode="),
        (
            "random",
            {"decode": Patches(patch=1, drop=0.1), "ipc": 1},
            r"the 57 patches of an image take 65 numbers .* than the 64 of ipc=1; give ipc=2, or a larger decode=",
        ),
    ],
)
def test_where_it_makes_no_sense_it_is_refused(
    name: str, fields: dict[str, Any], line: str, tiny: Arrays, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=line) as error:
        api.distill(name, dataset=tiny, out=tmp_path / "run", **{"network": TINY, "decode": "patches"} | fields)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "shape"), [("series", (40, 2, 16)), ("clips", (40, 3, 1, 8, 8))])
def test_series_and_clips_have_no_patches(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    samples, labels = np.random.default_rng(0).random(shape, dtype=np.float32), np.arange(40) % 2
    layout = "NCL" if name == "series" else "NTCHW"
    np.savez(tmp_path / "data.npz", x_train=samples, y_train=labels, x_test=samples, y_test=labels, layout=layout)
    with pytest.raises(ValueError, match=rf"^decoder patches takes images, not {name} .*; give decode='pixels'; "):
        api.distill("random", dataset=tmp_path / "data.npz", ipc=2, decode="patches", out=tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"patch": 0}, r"^decode.patch must be at least 1, got 0; the published value is 16$"),
        ({"drop": 1.0}, r"^decode.drop must lie in \[0, 1\), got 1.0; the published value is 0.2$"),
        ({"drop": -0.1}, r"^decode.drop must lie in"),
    ],
)
def test_impossible_fields_are_refused(fields: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        Patches(**fields)


def test_a_file_whose_bits_contradict_its_patches_is_refused(tmp_path: Path) -> None:
    decode, (pixels, importance) = Patches(patch=2, drop=0.5), draw((1, 8, 8))
    decoder = decode.build((1, 8, 8), 3)
    latents = decode.encode_by(importance, images_of(pixels), decoder)
    latents[1, 0] = latents[1, 0] ^ 4
    dataset = {"name": "made up", "fingerprint": "f", "classes": list("abc"), "input_shape": [1, 8, 8]}
    origin = Origin(dataset=dataset, transform={"kind": "none"})
    save(SyntheticSet(latents, torch.arange(3), origin, decode=decode, decoder=decoder), tmp_path / "set.safetensors")
    with pytest.raises(ValueError, match=r"does not fit its header: latent 1 marks [79] patches as kept, not 8; "):
        load(tmp_path / "set.safetensors")
