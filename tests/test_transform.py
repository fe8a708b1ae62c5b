"""Normalisation and whitening: identities, an oracle, the cache and descriptions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from condense.cache import entries
from condense.data import SPECS, Known, Transform, channel_statistics, fit
from tests.conftest import largest_file

KNOWN = Known(
    name="toy",
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.25, 0.5),
    augment="none",
    classes=("a", "b"),
    train=None,
    test=None,
)


def correlated(num: int = 400, seed: int = 0, shape: tuple[int, int, int] = (3, 4, 4)) -> Tensor:
    """Images (N, C, H, W) in [0, 1] with correlated pixels and channels of unequal spread."""
    gen = torch.Generator().manual_seed(seed)
    size = shape[0] * shape[1] * shape[2]
    mixing = torch.randn(size, size, generator=gen) / size**0.5
    x = (torch.randn(num, size, generator=gen) @ mixing).reshape(num, *shape)
    return (0.45 + 0.1 * x * torch.linspace(0.5, 1.5, shape[0])[:, None, None]).clamp(0, 1)


def fitted(spec: str, images: Tensor, cache: Path | None = None, known: Known | None = None) -> Any:
    return fit(spec, images, known=known, key="train-key", cache=cache)


def covariance(x: Tensor) -> Tensor:
    return torch.cov(x.flatten(1).double().T)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_undoes_and_keeps_shape_and_dtype(spec: str, dtype: torch.dtype) -> None:
    images = correlated()
    transform = fitted(spec, images)
    x = correlated(num=7, seed=1).to(dtype)
    y = transform(x)
    assert y.shape == x.shape and y.dtype == dtype
    torch.testing.assert_close(transform.inverse(y), x, rtol=0, atol=1e-5)
    assert spec == "none" or not torch.allclose(y, x, atol=0.1)


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_flow_both_ways(spec: str) -> None:
    transform = fitted(spec, correlated())
    x = correlated(num=3, seed=1).requires_grad_()
    with torch.inference_mode():
        transform(x.detach())
    transform.inverse(transform(x) * 2).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and (x.grad != 0).all()


def test_channel_takes_published_constants_and_measures_where_there_are_none() -> None:
    images = correlated()
    mean, std = torch.tensor(KNOWN.mean), torch.tensor(KNOWN.std)
    expected = (images - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(fitted("channel", images, known=KNOWN)(images), expected)
    y = fitted("channel", images)(images)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.ones(3), rtol=0, atol=1e-4)


def test_channel_statistics_do_not_depend_on_the_order_or_the_chunks() -> None:
    images = correlated(num=5000)
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    mean, std = channel_statistics(images)
    assert channel_statistics(images[order]) == (mean, std)
    torch.testing.assert_close(torch.tensor(mean), images.mean((0, 2, 3)), rtol=0, atol=2e-6)
    torch.testing.assert_close(torch.tensor(std), images.std((0, 2, 3), correction=0), rtol=0, atol=2e-6)


@pytest.mark.parametrize("scale", [3e-7, 1.5e-6, 2e-12, 1e-3])
def test_series_of_small_amplitude_are_standardised(scale: float) -> None:
    """A recording in volts, with an offset of the same size, beside a channel of ordinary size."""
    noise = torch.randn(200, 2, 50, generator=torch.Generator().manual_seed(0))
    series = torch.stack([scale * (noise[:, 0] + 3), noise[:, 1]], 1)
    y = fitted("channel", series)(series)
    torch.testing.assert_close(y.mean((0, 2)), torch.zeros(2), rtol=0, atol=1e-3)
    torch.testing.assert_close(y.std((0, 2), correction=0), torch.ones(2), rtol=0, atol=1e-3)
    assert channel_statistics(series)[1][1] == round(channel_statistics(series)[1][1], 6)


def test_a_constant_channel_is_refused_whatever_the_rounding_of_its_mean() -> None:
    series = torch.full((3000, 1, 7), 0.1, dtype=torch.float64)
    with pytest.raises(ValueError, match="channel 0 is constant"):
        channel_statistics(series)


def test_statistics_take_few_large_images_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    split, sizes = Tensor.split, list[int]()

    def recorded(images: Tensor, size: int) -> tuple[Tensor, ...]:
        sizes.append(size)
        return split(images, size)

    monkeypatch.setattr(Tensor, "split", recorded)
    channel_statistics(torch.rand(2, 3, 256, 256))
    assert sizes and max(sizes) * 3 * 256 * 256 < 2**24


def test_zca_is_the_one_of_kornia() -> None:
    kornia = pytest.importorskip("kornia")
    images = correlated()
    oracle = kornia.enhance.ZCAWhitening(dim=0, eps=0.1, unbiased=True, compute_inv=True).fit(images.double())
    transform = fitted("zca", images, known=KNOWN)
    torch.testing.assert_close(transform(images.double()), oracle(images.double()), rtol=1e-5, atol=1e-5)
    y = transform(images.double())
    torch.testing.assert_close(transform.inverse(y), oracle.inverse_transform(y), rtol=1e-5, atol=1e-5)


def test_zca_leaves_eigenvalues_s_over_s_plus_eps() -> None:
    images = correlated()
    s = torch.linalg.eigvalsh(covariance(images))
    whitened = covariance(fitted("zca", images)(images.double()))
    torch.testing.assert_close(torch.linalg.eigvalsh(whitened), s / (s + 0.1), rtol=1e-4, atol=1e-6)


def relative_reference(images: Tensor, eps: float = 0.1) -> tuple[Tensor, Tensor]:
    """The definition, step by step: normalise channels, centre, regularise, cap the rank."""
    x = images.double()
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True, correction=0)
    flat = ((x - mean) / std).flatten(1)
    flat = flat - flat.mean(0)
    n, d = flat.shape
    sigma = flat.T @ flat / n
    u, s, _ = torch.linalg.svd(sigma + eps * sigma.trace() / d * torch.eye(d, dtype=x.dtype))
    s[n:] = 1
    matrix = u @ torch.diag(s**-0.5) @ u.T
    return (flat @ matrix).reshape(images.shape), matrix


@pytest.mark.parametrize("num", [400, 20])
def test_zca_relative_follows_its_definition(num: int) -> None:
    images = correlated(num=num)
    transform = fitted("zca-relative", images, known=KNOWN)
    expected, matrix = relative_reference(images)
    torch.testing.assert_close(transform(images.double()), expected, rtol=1e-4, atol=1e-4)
    scale = torch.tensor(channel_statistics(images)[1]).repeat_interleave(16)
    spectrum = torch.linalg.eigvalsh(transform.matrix * scale[:, None])
    torch.testing.assert_close(spectrum.double(), torch.linalg.eigvalsh(matrix), rtol=1e-4, atol=1e-4)


def test_zca_relative_leaves_eigenvalues_s_over_s_plus_eps_mean_s() -> None:
    images = correlated()
    normalised = fitted("channel", images)(images.double())
    s = torch.linalg.eigvalsh(covariance(normalised) * 399 / 400)
    whitened = covariance(fitted("zca-relative", images)(images.double())) * 399 / 400
    torch.testing.assert_close(torch.linalg.eigvalsh(whitened), s / (s + 0.1 * s.mean()), rtol=1e-4, atol=1e-6)


def test_zca_relative_ignores_brightness_and_contrast_and_zca_does_not() -> None:
    images = correlated()
    dimmed = images * 0.5 + 0.1
    relative, absolute = (
        (fitted(spec, images)(images) - fitted(spec, dimmed)(dimmed)).abs().max() for spec in ("zca-relative", "zca")
    )
    assert relative < 1e-3 < 0.1 < absolute


def test_fewer_images_than_pixels_still_invert() -> None:
    images = correlated(num=10)
    for spec in ("zca", "zca-relative"):
        transform = fitted(spec, images)
        torch.testing.assert_close(transform.inverse(transform(images)), images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("spec", ["zca", "zca-relative"])
def test_a_cached_matrix_is_the_identical_one(spec: str, tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "cache"
    images = correlated()
    first = fitted(spec, images, cache)
    assert [entry.kind for entry in entries(cache)] == ["zca"]
    again = fitted(spec, torch.zeros_like(images), cache)
    assert torch.equal(first.matrix, again.matrix) and torch.equal(first.mean, again.mean)
    assert again.describe() == first.describe()


def test_the_cache_tells_keys_and_flavours_apart(tmp_path: Path) -> None:
    images = correlated()
    shas = {
        fit(spec, image, known=None, key=key, cache=tmp_path).describe()["sha256"]
        for spec in ("zca", "zca-relative")
        for key, image in (("a", images), ("b", images.flip(3)))
    }
    assert len(shas) == 4 == len(entries(tmp_path))


def test_a_damaged_cache_is_fitted_again(tmp_path: Path) -> None:
    images = correlated()
    first = fitted("zca", images, tmp_path)
    (file,) = tmp_path.rglob("*.safetensors")
    content = file.read_bytes()
    for damaged in (content[:100], content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        assert fitted("zca", images, tmp_path).sha256 == first.sha256
        assert file.read_bytes() == content


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", refuse)
    with pytest.warns(UserWarning, match="no space left"):
        transform = fitted("zca", correlated(), tmp_path)
    assert transform(correlated()).isfinite().all()
    assert not entries(tmp_path)


def test_a_full_disk_of_the_cache_stops_nothing(tmp_path: Path) -> None:
    with largest_file(1 << 12), pytest.warns(UserWarning, match="nothing more is cached"):
        transform = fitted("zca", correlated(), tmp_path)
    assert transform(correlated()).isfinite().all()
    assert not entries(tmp_path)


@pytest.mark.parametrize("spec", SPECS)
def test_descriptions_round_trip_through_json(spec: str, tmp_path: Path) -> None:
    images = correlated()
    transform = fitted(spec, images, tmp_path)
    description = json.loads(json.dumps(transform.describe()))
    x = correlated(num=5, seed=2)
    for options in ({"cache": tmp_path}, {"images": images}, {"images": images, "cache": tmp_path / "empty"}):
        copy = Transform.from_description(description, **options)
        assert torch.equal(copy(x), transform(x)) and copy.describe() == transform.describe()


def test_a_description_without_matrix_asks_for_the_training_set(tmp_path: Path) -> None:
    description = fitted("zca", correlated()).describe()
    for cache in (None, tmp_path):
        with pytest.raises(ValueError, match="training set with key train-key is needed; give it with dataset"):
            Transform.from_description(description, cache=cache)


def test_a_description_refuses_other_images_and_takes_another_rounding(tmp_path: Path) -> None:
    images = correlated()
    description = fitted("zca", images).describe()
    with pytest.raises(ValueError, match="training set with key train-key is needed"):
        Transform.from_description(description, images=correlated(seed=3), cache=tmp_path)
    noise = 1e-7 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    again = Transform.from_description(description, images=images + noise, cache=tmp_path)
    assert again.describe() == fitted("zca", images, tmp_path).describe() != description


@pytest.mark.parametrize(
    "description",
    [
        {},
        {"kind": "channel", "mean": [0.5]},
        {"kind": "channel", "mean": 0.5, "std": 1},
        {"kind": "zca"},
        None,
    ],
)
def test_a_damaged_description_is_refused(description: Any) -> None:
    with pytest.raises(ValueError, match="damaged description"):
        Transform.from_description(description)


def test_an_unknown_description_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown transform 'pca'"):
        Transform.from_description({"kind": "pca"})


@pytest.mark.parametrize(
    ("spec", "images", "message"),
    [
        ("chanel", correlated(), "unknown transform 'chanel': did you mean 'channel'"),
        ("channel", torch.zeros(5, 1, 4, 4), "channel 0 is constant: .*; give transform='none'"),
        ("zca-relative", torch.zeros(5, 1, 4, 4), "channel 0 is constant"),
        ("zca", torch.zeros(2, 3, 65, 64), "too large for ZCA: .*; give transform='channel'"),
    ],
)
def test_what_cannot_be_fitted_is_refused(spec: str, images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(spec, images)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SPECS)
def test_the_device_does_not_matter(spec: str) -> None:
    images = correlated()
    here, there = fitted(spec, images), fitted(spec, images.cuda())
    torch.testing.assert_close(there(images.cuda()).cpu(), here(images), rtol=1e-4, atol=1e-4)
    assert here.describe() == there.describe()


SHAPES = [(2, 9), (3, 4, 4), (2, 3, 4, 4)]
"""A series, an image and a clip."""


def samples_of(shape: tuple[int, ...], num: int = 300) -> Tensor:
    """Samples whose channels differ in mean and in spread; series leave [0, 1]."""
    gen = torch.Generator().manual_seed(0)
    axis = 1 if len(shape) == 4 else 0
    by_channel = torch.linspace(0.2, 0.8, shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))])
    noise = torch.rand(num, *shape, generator=gen) - 0.5
    return 20 * noise * by_channel - 5 * by_channel if len(shape) == 2 else 0.5 * by_channel + 0.4 * by_channel * noise


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", SPECS)
def test_any_shape_is_transformed_and_back(spec: str, shape: tuple[int, ...]) -> None:
    x = samples_of(shape)
    transform = fitted(spec, x)
    assert transform(x).shape == x.shape
    torch.testing.assert_close(transform.inverse(transform(x)), x, rtol=1e-4, atol=1e-4)
    again = Transform.from_description(json.loads(json.dumps(transform.describe())), x)
    torch.testing.assert_close(again(x), transform(x))


@pytest.mark.parametrize("shape", SHAPES)
def test_channels_of_any_shape_are_standardised(shape: tuple[int, ...]) -> None:
    x = samples_of(shape)
    channels = fitted("channel", x)(x).movedim(2 if len(shape) == 4 else 1, 0).flatten(1)
    torch.testing.assert_close(channels.mean(1), torch.zeros(len(channels)), rtol=0, atol=1e-4)
    torch.testing.assert_close(channels.std(1, correction=0), torch.ones(len(channels)), rtol=0, atol=1e-4)
    mean, std = channel_statistics(x)
    assert len(mean) == len(std) == len(channels)


def test_relative_zca_of_clips_scales_each_channel() -> None:
    """Scaling the channels of clips changes nothing but the rounding, as it does for images."""
    x = samples_of((2, 3, 4, 4))
    scaled = x * torch.tensor([1.0, 0.5, 0.25])[:, None, None]
    expected, found = (fitted("zca-relative", clips)(clips) for clips in (x, scaled))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("shape", "kind"), [((3, 5000), "series"), ((8, 3, 32, 32), "clips")])
def test_what_is_too_large_for_zca_is_refused_by_its_kind(shape: tuple[int, ...], kind: str) -> None:
    with pytest.raises(ValueError, match=f"^{kind} of .* too large for ZCA: .*; give transform='channel'"):
        fitted("zca", torch.zeros(2, *shape))


def test_pixels_are_clamped_on_the_way_back_and_series_are_not() -> None:
    transform = fitted("none", torch.zeros(1, 1, 1, 1))
    for shape in SHAPES:
        values = transform.to_data(torch.full((2, *shape), 3.0))
        assert values.max() == (3 if len(shape) == 2 else 1)
