"""Invertible transforms from the values of the data to the space that networks see, fitted on training data.

The values are pixels in [0, 1] for images and clips, and any floats for series. ``channel`` standardises each channel
over all samples, points, frames, rows and columns; the points that pad a series to the common length are included. ZCA
treats a sample as the vector of all its values.

``none``          x' = x; graphs have no other
``channel``       x' = (x - mean_c) / std_c for each channel c
``zca``           x' = (x - mu) W, W = (Sigma + eps I)^(-1/2), eps = 0.1, Sigma the unbiased covariance of the
                  raw pixels. The definition of kornia, used by the trajectory-matching family (MTT, TESLA,
                  FTD, DATM).
``zca-relative``  channels are normalised first, Sigma = X^T X / N of the centred result, and the regulariser is
                  relative to its scale: W = (Sigma + eps tr(Sigma)/d I)^(-1/2), eps = 0.1; with N < d images all
                  eigenvalues but the N largest are set to 1. The definition of FRePo and RCIG. The channel
                  statistics are always measured, because the published CIFAR-10 constants are not the standard
                  deviations by which FRePo divides.

The two ZCA definitions lead to different spaces: images that were distilled in one are noise in the other.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import safetensors
import torch
from torch import Tensor

from condense.cache import Cache
from condense.data.datasets import Known
from condense.data.layout import channel_axis, kind
from condense.files import save_file
from condense.names import spelt, suggest

SPECS = ("none", "channel", "zca", "zca-relative")

_FLAVOURS = {"zca": "absolute", "zca-relative": "relative"}
_NAMES: Mapping[Any, str] = {flavour: name for name, flavour in _FLAVOURS.items()}
_EPS = 0.1
_MAX_SIZE = 3 * 64 * 64
_CHUNK = 4096
_CHUNK_VALUES = 4096 * 3 * 32 * 32
"""Largest numbers of samples and of values in float64 at once."""
_ROUNDING = 1e-12
"""Standard deviation of a constant channel, relative to its value: that of the rounding of the mean in float64."""


class Samples(Protocol):
    """Samples (N, *input_shape) that can be read in chunks: a tensor, or ``condense.data.Images``."""

    @property
    def shape(self) -> torch.Size: ...

    def __len__(self) -> int: ...

    def split(self, size: int, /) -> Iterable[Tensor]: ...


class Transform(ABC):
    """A differentiable map of samples (N, *input_shape) on any device and in any floating dtype."""

    pointwise: ClassVar[bool] = True
    """Whether each value is mapped independently of the others, so that transforming a batch is cheap."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name in a recipe, such as ``channel`` or ``zca-relative``."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Map values of the data to the space of the networks."""

    @abstractmethod
    def inverse(self, x: Tensor) -> Tensor:
        """Map samples from the space of the networks to values of the data, without clamping."""

    def to_data(self, x: Tensor) -> Tensor:
        """Apply the inverse and clamp pixels to [0, 1]; series and graphs are not clamped."""
        values = self.inverse(x)
        return values.clamp(0, 1) if kind(values.shape[1:]) in ("images", "clips") else values

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the JSON values from which ``from_description`` restores the transform."""

    @staticmethod
    def from_description(
        description: Mapping[str, Any], images: Samples | None = None, cache: Path | None = None
    ) -> Transform:
        """Restore a transform from its description.

        A whitening matrix is too large for a description. It is read from the folder ``cache``, or fitted again to
        ``images``, the training samples (N, *input_shape). Rounding differs between machines, so the trace of the
        matrix has to agree, but not its sha256.

        Raises:
            ValueError: the description is damaged; the matrix is not cached and ``images`` is None; the matrix is
                another one, because it was fitted to other samples.
        """
        try:
            kind = description["kind"]
            if kind == "none":
                return Identity()
            if kind == "channel":
                return ChannelNorm(mean=tuple(description["mean"]), std=tuple(description["std"]))
            if kind == "zca":
                flavour, eps, key, trace = (description[name] for name in ("flavour", "eps", "key", "trace"))
        except (KeyError, TypeError) as error:
            raise ValueError(f"damaged description of a transform: {error!r}; restore the file") from error
        if kind != "zca":
            raise ValueError(f"unknown transform {kind!r}: it is none of none, channel, zca; update condense")
        needed = f"the training set with key {key} is needed; give it with {spelt('dataset')}"
        cached = _read_cache(cache, flavour, eps, key)
        if cached:
            whitening = cached
        elif images is not None:
            whitening = _fit_zca(images, flavour, eps, key)
        else:
            raise ValueError(f"the ZCA matrix of this set is not cached: {needed}")
        if abs(whitening.trace - trace) > 1e-4 * abs(trace):
            raise ValueError(f"this ZCA matrix has trace {whitening.trace:.6g}, not {trace:.6g}: {needed}")
        if not cached:
            _write_cache(cache, whitening)
        return whitening


@dataclass(frozen=True)
class Identity(Transform):
    """The transform ``none``."""

    name: ClassVar[str] = "none"

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def inverse(self, x: Tensor) -> Tensor:
        return x

    def describe(self) -> dict[str, Any]:
        return {"kind": "none"}


@dataclass(frozen=True, kw_only=True)
class ChannelNorm(Transform):
    """The transform ``channel``."""

    name: ClassVar[str] = "channel"

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @functools.cached_property
    def _constants(self) -> _Constants:
        mean, std = torch.tensor([self.mean, self.std], dtype=torch.float64)
        return _Constants(mean, std)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation in a shape that broadcasts with ``x``."""
        shape = _by_channel(x.shape[1:])
        mean, std = self._constants.like(x)
        return mean.reshape(shape), std.reshape(shape)

    def __call__(self, x: Tensor) -> Tensor:
        mean, std = self._statistics(x)
        return (x - mean).div_(std)

    def inverse(self, x: Tensor) -> Tensor:
        mean, std = self._statistics(x)
        return x * std + mean

    def describe(self) -> dict[str, Any]:
        return {"kind": "channel", "mean": list(self.mean), "std": list(self.std)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Whitening(Transform):
    """The transforms ``zca`` (flavour absolute) and ``zca-relative`` (flavour relative): x' = (x - mean) @ matrix.

    ``mean`` (d,) is the mean training sample and ``matrix`` (d, d) the whitening matrix, both float32. The channel
    normalisation of the relative flavour is included: its centring in ``mean``, its scale in the rows of ``matrix``.
    """

    pointwise: ClassVar[bool] = False

    flavour: str
    eps: float
    key: str
    mean: Tensor
    matrix: Tensor

    @functools.cached_property
    def _constants(self) -> _Constants:
        return _Constants(self.mean, self.matrix)

    @functools.cached_property
    def _inverse_constants(self) -> _Constants:
        return _Constants(self.mean, torch.linalg.inv(self.matrix.double()).float())

    @property
    def name(self) -> str:
        return _NAMES[self.flavour]

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the bytes of mean and matrix."""
        return hashlib.sha256(self.mean.numpy().tobytes() + self.matrix.numpy().tobytes()).hexdigest()

    @property
    def trace(self) -> float:
        return float(self.matrix.diagonal().double().sum())

    def __call__(self, x: Tensor) -> Tensor:
        mean, matrix = self._constants.like(x)
        return ((x.flatten(1) - mean) @ matrix).reshape(x.shape)

    def inverse(self, x: Tensor) -> Tensor:
        mean, matrix = self._inverse_constants.like(x)
        return (x.flatten(1) @ matrix + mean).reshape(x.shape)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "zca",
            "flavour": self.flavour,
            "eps": self.eps,
            "key": self.key,
            "sha256": self.sha256,
            "trace": self.trace,
        }


def name_of(description: Mapping[str, Any]) -> str:
    """Return the name in a recipe of a transform with this description."""
    return _NAMES.get(description.get("flavour"), str(description.get("kind")))


def fit(spec: str, images: Samples, *, known: Known | None, key: str, cache: Path | None) -> Transform:
    """Fit a transform to training samples (N, *input_shape), which are read in chunks.

    ``channel`` uses the published constants of a known data set, else measured ones (``channel_statistics``). A ZCA
    matrix is fitted on the CPU in float64 and stored in the folder ``cache`` under ``key``, which has to identify these
    samples by the fingerprint of the data and their split.

    Raises:
        ValueError: the transform is unknown; a channel is constant; the samples are too large for ZCA.
    """
    check_transform(spec)
    if kind(images.shape[1:]) == "graphs":
        if spec in _FLAVOURS:
            raise ValueError(f"graphs cannot be whitened by {spec}; give {spelt('transform', 'none')}")
        return Identity()
    if spec == "none":
        return Identity()
    if spec == "channel":
        mean, std = (known.mean, known.std) if known else channel_statistics(images)
        return ChannelNorm(mean=mean, std=std)
    flavour = _FLAVOURS[spec]
    cached = _read_cache(cache, flavour, _EPS, key)
    if cached:
        return cached
    whitening = _fit_zca(images, flavour, _EPS, key)
    _write_cache(cache, whitening)
    return whitening


def check_transform(spec: str) -> None:
    """Raise ValueError if there is no transform of this name."""
    if spec not in SPECS:
        raise ValueError(f"unknown transform {spec!r}: {suggest(spec, SPECS)}")


def channel_statistics(images: Samples) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and population standard deviation of each channel of samples (N, *input_shape), to six decimals; of a
    channel whose standard deviation is below 1e-3, to seven significant digits of that.

    Raises:
        ValueError: a channel is constant.
    """
    shape = images.shape[1:]
    channels = channel_axis(shape) + 1
    axes = [axis for axis in range(len(shape) + 1) if axis != channels]
    count = len(images) * math.prod(shape) // images.shape[channels]
    mean = torch.stack([chunk.sum(axes) for chunk in _chunks(images)]).sum(0) / count
    centred = (chunk - mean.reshape(_by_channel(shape)) for chunk in _chunks(images))
    std = (torch.stack([chunk.square().sum(axes) for chunk in centred]).sum(0) / count).sqrt()
    constant = (std <= _ROUNDING * mean.abs()).tolist()
    if any(constant):
        raise ValueError(
            f"channel {constant.index(True)} is constant: it cannot be normalised; give {spelt('transform', 'none')}"
        )
    digits = [6 if value >= 1e-3 else 6 - math.floor(math.log10(value)) for value in std.tolist()]
    means, stds = (tuple(map(round, values.tolist(), digits)) for values in (mean, std))
    return means, stds


def _by_channel(shape: Sequence[int]) -> list[int]:
    """Return the shape in which one value per channel broadcasts with samples of this shape."""
    axis = channel_axis(shape)
    return [-1 if i == axis else 1 for i in range(len(shape))]


def _chunks(images: Samples) -> Iterator[Tensor]:
    """Yield the samples in chunks, float64 on the CPU."""
    size = min(_CHUNK, max(1, _CHUNK_VALUES // math.prod(images.shape[1:])))
    return (chunk.cpu().double() for chunk in images.split(size))


class _Constants:
    """Tensors with one cached copy for each device and dtype with which they are used."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors
        self.copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor, ...]] = {}

    def like(self, x: Tensor) -> tuple[Tensor, ...]:
        place = (x.device, x.dtype)
        if place not in self.copies:
            with torch.inference_mode(False):  # a copy made in inference mode could not be used in training
                self.copies[place] = tuple(tensor.to(*place) for tensor in self.tensors)
        return self.copies[place]


def _fit_zca(images: Samples, flavour: str, eps: float, key: str) -> Whitening:
    n, d = len(images), math.prod(images.shape[1:])
    if d > _MAX_SIZE:
        raise ValueError(
            f"{kind(images.shape[1:])} of {d} values are too large for ZCA: the limit is {_MAX_SIZE} (3x64x64); "
            f"give {spelt('transform', 'channel')}"
        )
    mean = torch.stack([chunk.flatten(1).sum(0) for chunk in _chunks(images)]).sum(0) / n
    scatter = torch.zeros(d, d, dtype=torch.float64)
    for chunk in _chunks(images):
        centred = chunk.flatten(1) - mean
        scatter.addmm_(centred.T, centred)
    if flavour == "absolute":
        scale = torch.ones(d, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(scatter / (n - 1))
        values = values.clamp_min(0) + eps
    else:
        _, std = channel_statistics(images)
        shape = images.shape[1:]
        scale = torch.tensor(std, dtype=torch.float64).reshape(_by_channel(shape)).expand(shape).flatten()
        sigma = scatter / n / torch.outer(scale, scale)
        sigma.diagonal().add_(eps * sigma.trace() / d)
        values, vectors = torch.linalg.eigh(sigma)
        values[: max(d - n, 0)] = 1
    matrix = (vectors * values.rsqrt()) @ vectors.T / scale[:, None]
    return Whitening(flavour=flavour, eps=eps, key=key, mean=mean.float(), matrix=matrix.float())


def _identity(flavour: str, eps: float, key: str) -> dict[str, Any]:
    return {"flavour": flavour, "eps": eps, "images": key}


def _write_cache(cache: Path | None, whitening: Whitening) -> None:
    def write(folder: Path) -> None:
        metadata = {"condense": json.dumps(whitening.describe(), sort_keys=True)}
        save_file(folder / _MATRIX, {"mean": whitening.mean, "matrix": whitening.matrix}, metadata)

    Cache(cache, "zca").write(
        _identity(whitening.flavour, whitening.eps, whitening.key),
        write,
        about=f"{whitening.flavour}, {len(whitening.mean)} values per sample, data {whitening.key[:12]}",
    )


def _read_cache(cache: Path | None, flavour: str, eps: float, key: str) -> Whitening | None:
    """Return the cached matrix, or None if its entry is missing or damaged."""

    def read(folder: Path) -> Whitening:
        with safetensors.safe_open(folder / _MATRIX, "pt") as file:
            description = json.loads(file.metadata()["condense"])
            mean, matrix = file.get_tensor("mean"), file.get_tensor("matrix")
        whitening = Whitening(flavour=flavour, eps=eps, key=key, mean=mean, matrix=matrix)
        if whitening.describe() != description:
            raise ValueError("it is not the matrix that was written")
        return whitening

    return Cache(cache, "zca").read(_identity(flavour, eps, key), read)


_MATRIX = "whitening.safetensors"
