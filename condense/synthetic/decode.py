"""Decoders: parameterisations that turn stored latents into images, and that any method can use.

Deviations from the papers are listed in docs/composition.md.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense.data.datasets import to_float
from condense.data.graphs import used_length
from condense.data.layout import InputShape, Kind, channel_axis, kind, require_kind, sides
from condense.data.transform import Transform
from condense.mosaic import enlarged, joined, tiles_of
from condense.names import spelt
from condense.plugins import Registry, subclass_of
from condense.rng import Draws
from condense.schema import Checked


@dataclass(frozen=True, kw_only=True)
class Decode(Checked, ABC):
    """How images are stored as latents and decoded from them."""

    name: ClassVar[str]
    stores_pixels: ClassVar[bool] = False
    """Whether the entries of a latent are pixel values of an image."""
    takes: ClassVar[tuple[Kind, ...]] = ("images",)
    """The kinds of samples that the decoder produces."""
    differentiable: ClassVar[bool] = True
    """Whether latents are floating-point numbers, so that a method can learn them; else they are whole numbers."""
    stored: ClassVar[torch.dtype] = torch.uint8
    """The type of latents that are whole numbers."""
    fits: ClassVar[bool] = False
    """Whether ``encode`` fits the latents to the images step by step, so that its result is cached."""
    used_later: ClassVar[tuple[str, ...]] = ()
    """Fields on which ``encode`` does not depend."""
    makes_pixels: ClassVar[bool] = False
    """Whether the decoder makes pixels in [0, 1], and the images from these by the transform, ``none`` or
    ``channel``."""

    def require_kind(self, input_shape: InputShape) -> None:
        """Raise ValueError if the decoder does not produce samples of this shape."""
        fitting = [name for name, decoder in DECODERS.usable().items() if kind(input_shape) in decoder.takes]
        remedy = f"give {spelt('decode', Pixels.name)}; decoders for {kind(input_shape)} are {', '.join(fitting)}"
        require_kind(f"decoder {self.name}", self.takes, input_shape, remedy)

    @property
    def expansion(self) -> int:
        """The number of images decoded from one latent."""
        return 1

    def latent_shape(self, input_shape: InputShape) -> tuple[int, ...]:
        """Return the shape of one latent, by default that of a sample.

        Raises:
            ValueError: the samples are too small, or the size of a latent depends on its sample.
        """
        return input_shape

    def latents_per_class(self, ipc: int, input_shape: InputShape, num_classes: int) -> int:
        """Return the number of latents per class that have no more floats than ``ipc`` images.

        Raises:
            ValueError: there are not enough floats for one.
        """
        return ipc * math.prod(input_shape) // math.prod(self.latent_shape(input_shape))

    def size(self, latents: Tensor) -> int:
        """Return the number of bytes of the latents."""
        return latents.nbytes

    def num_bytes(self, latents: Tensor, classes: Tensor, decoder: nn.Module) -> tuple[int, int]:
        """Return the number of bytes of the latents (N, ...) of these classes (N,), and of the decoder."""
        return self.size(latents), sum(tensor.nbytes for tensor in decoder.state_dict().values())

    def quantised(self, latents: Tensor) -> Tensor:
        """Return what the decoder gets in place of latents that are being learned, with their gradient."""
        return latents

    @abstractmethod
    def build(self, input_shape: InputShape, num_classes: int) -> nn.Module:
        """Build the decoder, ``decoder(latents (N, ...), classes (N,)) -> images (expansion * N, *input_shape)``.

        Image ``k * N + i`` is the k-th image of latent i. What the decoder learns are its parameters, and what else it
        has to store are its buffers. Their shapes depend only on the arguments and the fields, so that a file can be
        read back.
        """

    def fit(self, decoder: nn.Module, transform: Transform) -> None:
        """Store in a decoder that ``build`` returned what it has to know of the transform of the images."""

    @abstractmethod
    def encode(self, images: Tensor, classes: Tensor, decoder: nn.Module, generator: torch.Generator) -> Tensor:
        """Return initial latents (N, ...) that ``decoder`` decodes to approximately ``images``.

        The parts of the decoder that depend on the images or are random are initialised in place.

        Args:
            images: (expansion * N, *input_shape), in the order of the decoder's output.
            classes: the classes of the latents, (N,).
            decoder: the decoder that ``build`` returned.
            generator: a CPU generator.
        """

    def check(self, latents: Tensor, decoder: nn.Module) -> None:
        """Raise ValueError if latents (N, ...) of the right shape and type, read from a file, contradict themselves."""


@dataclass(frozen=True, kw_only=True)
class Coded(Decode):
    """Base class of decoders whose latents are whole numbers in the end, and are stored in an entropy code.

    The number of bits is learned: it is a penalty beside the loss of every ``GradientMethod``. The budget does not
    decide how many latents there are. ``size`` is not used, since the bits depend on what the decoder predicts.
    """

    images: int = 64
    """Number of images per class. The budget does not change it."""
    rate_weight: tuple[float, ...] = (0.001, 0.015)
    """Weights of the rate, in bits per pixel summed over the classes, beside the loss of the method. Each serves for an
    equal part of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images < 1:
            raise ValueError(f"decode.images must be at least 1, got {self.images}; a published value is 64")
        if not self.rate_weight or not all(0 <= weight < math.inf for weight in self.rate_weight):
            raise ValueError(
                f"decode.rate_weight must be finite numbers of at least 0, got {list(self.rate_weight)}; "
                "published values are 0.001 and 0.015"
            )

    def latents_per_class(self, ipc: int, input_shape: InputShape, num_classes: int) -> int:
        return self.images

    def quantised(self, latents: Tensor) -> Tensor:
        """Return the rounded latents; their gradient is that of the latents themselves."""
        return latents.detach().round() + (latents - latents.detach())

    @abstractmethod
    def relaxed(self, latents: Tensor, draws: Draws, progress: float | Tensor) -> Tensor:
        """Return a differentiable function of the latents that the decoder gets in their place in a step.

        Args:
            latents: (N, ...).
            draws: the random numbers of the step.
            progress: the part of the run before the step, from 0 to less than 1. It may be a tensor on a device, which
                must not be read.
        """

    @abstractmethod
    def rates(self, latents: Tensor, classes: Tensor, decoder: nn.Module) -> Tensor:
        """Return the rate (num_classes,) of each class in bits per pixel of its images, with its gradient.

        Args:
            latents: what ``relaxed`` returned.
            classes: their classes (N,).
            decoder: the decoder.
        """

    def weight_at(self, progress: float | Tensor) -> float | Tensor:
        """Return the weight of the rate when a part of the run is done, from 0 to less than 1."""
        weight: float | Tensor = self.rate_weight[0]
        for k, (before, after) in enumerate(itertools.pairwise(self.rate_weight), 1):
            weight = weight + (after - before) * (progress * len(self.rate_weight) >= k)
        return weight

    @abstractmethod
    def finished(self, latents: Tensor, classes: Tensor, decoder: nn.Module) -> tuple[Tensor, nn.Module]:
        """Return the latents and the decoder as they are stored: rounded. The arguments do not change."""

    @abstractmethod
    def num_bytes(self, latents: Tensor, classes: Tensor, decoder: nn.Module) -> tuple[int, int]: ...


@dataclass(frozen=True, kw_only=True)
class Pixels(Decode):
    """The latents are the images."""

    name: ClassVar[str] = "pixels"
    stores_pixels: ClassVar[bool] = True
    takes: ClassVar[tuple[Kind, ...]] = ("series", "images", "clips")

    def build(self, input_shape: InputShape, num_classes: int) -> nn.Module:
        return _Identity()

    def encode(self, images: Tensor, classes: Tensor, decoder: nn.Module, generator: torch.Generator) -> Tensor:
        return images.clone()


@dataclass(frozen=True, kw_only=True)
class Graphs(Decode):
    """The latents are graphs in 16-bit numbers. The zeros after the last edge of a graph do not count as bytes."""

    name: ClassVar[str] = "graphs"
    takes: ClassVar[tuple[Kind, ...]] = ("graphs",)
    differentiable: ClassVar[bool] = False
    stored: ClassVar[torch.dtype] = torch.int16

    def latent_shape(self, input_shape: InputShape) -> tuple[int, ...]:
        raise ValueError(f"graphs differ in size, so that bits buy no fixed number; give {spelt('budget', 'floats')}")

    def latents_per_class(self, ipc: int, input_shape: InputShape, num_classes: int) -> int:
        return ipc

    def size(self, latents: Tensor) -> int:
        return int(used_length(latents).sum()) * latents.element_size()

    def build(self, input_shape: InputShape, num_classes: int) -> nn.Module:
        return _ToFloat()

    def encode(self, images: Tensor, classes: Tensor, decoder: nn.Module, generator: torch.Generator) -> Tensor:
        if images.numel() and images.max() > (most := torch.iinfo(torch.int16).max):
            raise ValueError(
                f"a graph has more than {most} nodes, edges or labels, which 16-bit numbers cannot hold; leave it out"
            )
        return images.to(torch.int16)


class _ToFloat(nn.Module):
    def forward(self, latents: Tensor, classes: Tensor) -> Tensor:
        return latents.float()


class _Identity(nn.Module):
    def forward(self, latents: Tensor, classes: Tensor) -> Tensor:
        return latents


@dataclass(frozen=True, kw_only=True)
class Pixels8Bit(Decode):
    """The latents are the images in 8-bit pixels, a quarter of the bytes of ``pixels``.

    It is for methods that select images or round what they have learned."""

    name: ClassVar[str] = "pixels-8bit"
    stores_pixels: ClassVar[bool] = True
    takes: ClassVar[tuple[Kind, ...]] = ("images", "clips")
    differentiable: ClassVar[bool] = False
    makes_pixels: ClassVar[bool] = True

    def build(self, input_shape: InputShape, num_classes: int) -> nn.Module:
        return FromBytes(input_shape)

    def fit(self, decoder: nn.Module, transform: Transform) -> None:
        assert isinstance(decoder, FromBytes)
        decoder.fit(transform)

    def encode(self, images: Tensor, classes: Tensor, decoder: nn.Module, generator: torch.Generator) -> Tensor:
        assert isinstance(decoder, FromBytes)
        return torch.cat([decoder.rounded(part) for part in images.split(1000)])


class _FromPixels(nn.Module):
    """Knows the transform of the images: ``channel``, or ``none`` (mean 0, std 1)."""

    mean: Tensor
    std: Tensor

    def __init__(self, input_shape: InputShape) -> None:
        super().__init__()
        axis = channel_axis(input_shape)
        shape = [size if k == axis else 1 for k, size in enumerate(input_shape)]
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    def fit(self, transform: Transform) -> None:
        described = transform.describe()
        if described["kind"] == "channel":
            for statistic in ("mean", "std"):
                buffer = self.get_buffer(statistic)
                buffer.copy_(torch.tensor(described[statistic]).view_as(buffer))


class FromBytes(_FromPixels):
    """Turns 8-bit pixels into images in the space of the transform."""

    def rounded(self, images: Tensor) -> Tensor:
        """Return the pixels (N, *input_shape), uint8, that are nearest to the images."""
        return ((images * self.std + self.mean) * 255).round_().clamp_(0, 255).to(torch.uint8)

    def transformed(self, pixels: Tensor) -> Tensor:
        """Return the images of pixels (N, *input_shape) in [0, 1]."""
        return (pixels - self.mean).div_(self.std)

    def forward(self, latents: Tensor, classes: Tensor) -> Tensor:
        return self.transformed(to_float(latents))


@dataclass(frozen=True, kw_only=True)
class Factor(Decode):
    """Each stored image holds factor x factor small images.

    Uniform multi-formation (Kim et al. 2022, IDC): each small image is upsampled to full size. If the factor does not
    divide the sides, the stored image is padded with zeros."""

    name: ClassVar[str] = "factor"
    stores_pixels: ClassVar[bool] = True
    factor: int = 2
    """Number of images along each side of a stored image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor < 1:
            raise ValueError(f"decode.factor must be at least 1, got {self.factor}; the published value is 2")

    @property
    def expansion(self) -> int:
        return self.factor**2

    def encode(self, images: Tensor, classes: Tensor, decoder: nn.Module, generator: torch.Generator) -> Tensor:
        f, (h, w) = self.factor, images.shape[-2:]
        small = F.interpolate(images, size=(-(-h // f), -(-w // f)), mode="nearest")
        return joined(small, f)[..., :h, :w].contiguous()

    def build(self, input_shape: InputShape, num_classes: int) -> nn.Module:
        height, width = input_shape[-2:]
        return _Crops(self.factor, (height, width))


class _Crops(nn.Module):
    def __init__(self, factor: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.factor, self.size = factor, size

    def forward(self, latents: Tensor, classes: Tensor) -> Tensor:
        f, (h, w) = self.factor, self.size
        ch, cw = -(-h // f), -(-w // f)
        padded = F.pad(latents, (0, cw * f - w, 0, ch * f - h))
        return enlarged(tiles_of(padded, f), (h, w))


@dataclass(frozen=True, kw_only=True)
class DCT(Decode):
    """Each image is stored as DCT coefficients at positions chosen for its class.

    FreD (Shin et al. 2023): these are the coefficients of the discrete cosine transform that vary most among the
    initial images of the class. All other coefficients are zero."""

    name: ClassVar[str] = "dct"
    coefficients: int | None = None
    """Number of DCT coefficients stored per channel. Default: a sixteenth of the pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coefficients is not None and self.coefficients < 1:
            raise ValueError(f"decode.coefficients must be at least 1, got {self.coefficients}; try 64")

    def num_coefficients(self, input_shape: InputShape) -> int:
        """Return the number of coefficients stored per channel for images of this shape.

        Raises:
            ValueError: it exceeds the number of pixels.
        """
        pixels = math.prod(input_shape[1:])
        if self.coefficients is None:
            return max(1, pixels // 16)
        if self.coefficients > pixels:
            raise ValueError(
                f"decode.coefficients is {self.coefficients}, but an image has {pixels} pixels per channel; "
                f"give {spelt('decode.coefficients', pixels, 'DCT')} or less"
            )
        return self.coefficients

    def latent_shape(self, input_shape: InputShape) -> tuple[int, ...]:
        return input_shape[0], self.num_coefficients(input_shape)

    def build(self, input_shape: InputShape, num_classes: int) -> nn.Module:
        return _Frequencies(input_shape[1:], num_classes, self.num_coefficients(input_shape))

    def encode(self, images: Tensor, classes: Tensor, decoder: nn.Module, generator: torch.Generator) -> Tensor:
        assert isinstance(decoder, _Frequencies)
        spectra = dct(images).flatten(2)
        for c in classes.unique().tolist():
            of_class = spectra[classes == c].mean(1)
            alike = (of_class == of_class[0]).all()  # one image, or copies of it
            spread = of_class[0].square() if alike else of_class.var(0)
            order = spread.argsort(descending=True, stable=True)
            decoder.positions[c] = order[: decoder.positions.shape[1]].sort().values
        return spectra.gather(2, decoder.index(classes, images.shape[1]))


class _Frequencies(nn.Module):
    positions: Tensor
    """Positions of each class's coefficients in a flattened spectrum, (num_classes, k), ascending."""

    def __init__(self, size: tuple[int, ...], num_classes: int, num_coefficients: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("positions", torch.arange(num_coefficients, dtype=torch.int32).repeat(num_classes, 1))

    def index(self, classes: Tensor, channels: int) -> Tensor:
        """Return the positions (N, channels, k) for latents of these classes."""
        return self.positions[classes].long()[:, None].expand(-1, channels, -1)

    def forward(self, latents: Tensor, classes: Tensor) -> Tensor:
        spectra = latents.new_zeros(*latents.shape[:2], math.prod(self.size))
        spectra = spectra.scatter(2, self.index(classes, latents.shape[1]), latents)
        return inverse_dct(spectra.unflatten(2, self.size))


def dct(images: Tensor) -> Tensor:
    """Return the unnormalised DCT-II of images (..., H, W), as scipy's ``dctn`` does."""
    rows, columns = (_matrices(side, images.dtype, images.device)[0] for side in images.shape[-2:])
    return torch.einsum("ka,lb,...ab->...kl", rows, columns, images)


def inverse_dct(spectra: Tensor) -> Tensor:
    """Return the images (..., H, W) whose ``dct`` is ``spectra``."""
    rows, columns = (_matrices(side, spectra.dtype, spectra.device)[1] for side in spectra.shape[-2:])
    return torch.einsum("ka,lb,...kl->...ab", rows, columns, spectra)


@functools.lru_cache(maxsize=16)
def _matrices(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the matrices of the DCT-II and of its inverse, both indexed [coefficient, entry]."""
    with torch.inference_mode(False):  # matrices made in inference mode could not be used in training
        k = torch.arange(size, dtype=torch.float64)[:, None]
        cosines = torch.cos(math.pi * k * (k.T + 0.5) / size)
        scale = torch.full_like(k, 1 / size)
        scale[0] /= 2
        return (2 * cosines).to(device, dtype), (scale * cosines).to(device, dtype)


@dataclass(frozen=True, kw_only=True)
class Bases(Decode):
    """Images are weighted sums of basis images that all classes share.

    Addressing (Deng and Russakovsky 2022, RTP): the bases are learned and stored at half resolution, and each image is
    stored as a row of coefficients."""

    name: ClassVar[str] = "bases"
    takes: ClassVar[tuple[Kind, ...]] = ("series", "images", "clips")
    num_bases: int = 16
    """Number of basis images."""
    start: Literal["images", "xavier"] = "images"
    """Initialisation of the bases and coefficients. images: the best low-rank fit to the initial images. xavier: Xavier
    uniform, as published."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_bases < 1:
            raise ValueError(f"decode.num_bases must be at least 1, got {self.num_bases}; try 16")

    def latent_shape(self, input_shape: InputShape) -> tuple[int, ...]:
        return (self.num_bases,)

    def latents_per_class(self, ipc: int, input_shape: InputShape, num_classes: int) -> int:
        basis, budget = math.prod(_halved(input_shape)), ipc * num_classes * math.prod(input_shape)
        rows = (budget - self.num_bases * basis) // (num_classes * self.num_bases)
        if rows < 1:
            raise ValueError(
                f"{self.num_bases} bases of {basis} numbers leave too few of the {budget} numbers of "
                f"{spelt('ipc', ipc)} for one image of each class; give "
                f"{spelt('decode.num_bases', budget // (basis + num_classes), 'Bases')} or less"
            )
        return rows

    def build(self, input_shape: InputShape, num_classes: int) -> nn.Module:
        return _Bases(self.num_bases, input_shape)

    def encode(self, images: Tensor, classes: Tensor, decoder: nn.Module, generator: torch.Generator) -> Tensor:
        assert isinstance(decoder, _Bases)
        bases = decoder.bases.data
        random = torch.empty(len(bases), bases[0].numel())
        bases.copy_(nn.init.xavier_uniform_(random, generator=generator).view_as(bases))
        coefficients = images.new_empty(len(images), len(bases), device="cpu")
        if self.start == "xavier":
            return nn.init.xavier_uniform_(coefficients, generator=generator).to(images.device)
        small = _resized(images, bases.shape[1:], "area").flatten(1)
        u, s, v = torch.linalg.svd(small, full_matrices=False)
        rank = min(len(s), len(bases))
        root = s[:rank].sqrt()
        bases[:rank] = (root[:, None] * v[:rank]).unflatten(1, bases.shape[1:])
        return F.pad(u[:, :rank] * root, (0, len(bases) - rank))


class _Bases(nn.Module):
    def __init__(self, num_bases: int, input_shape: InputShape) -> None:
        super().__init__()
        self.input_shape = input_shape
        self.bases = nn.Parameter(torch.zeros(num_bases, *_halved(input_shape)))

    def forward(self, latents: Tensor, classes: Tensor) -> Tensor:
        return torch.einsum("nk,k...->n...", latents, _resized(self.bases, self.input_shape, "linear"))


def _halved(input_shape: InputShape) -> InputShape:
    """Return the shape with every axis but the channels halved, rounded up."""
    channels = channel_axis(input_shape)
    return tuple(size if axis == channels else -(-size // 2) for axis, size in enumerate(input_shape))


def _resized(samples: Tensor, shape: Sequence[int], mode: Literal["area", "linear"]) -> Tensor:
    """Interpolate samples (N, ...) to (N, *shape), which has the same number of channels."""
    channels, size = channel_axis(shape), sides(shape)
    align = None if mode == "area" else False
    name = "area" if mode == "area" else ("linear", "bilinear", "trilinear")[len(size) - 1]
    resized = F.interpolate(samples.movedim(channels + 1, 1), size=size, mode=name, align_corners=align)
    return resized.movedim(1, channels + 1)


@dataclass(frozen=True, kw_only=True)
class Hallucinator(Decode):
    """Each latent is decoded by several small learned networks, the styles.

    HaBa (Liu et al. 2022): all latents share the styles. Each style is a convolution, an affine map of each entry and a
    transposed convolution."""

    name: ClassVar[str] = "hallucinator"
    num_styles: int = 5
    """Number of styles, which is the number of images decoded from each latent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_styles < 1:
            raise ValueError(f"decode.num_styles must be at least 1, got {self.num_styles}; the published value is 5")

    @property
    def expansion(self) -> int:
        return self.num_styles

    def latent_shape(self, input_shape: InputShape) -> tuple[int, ...]:
        if min(input_shape[1:]) < 3:
            raise ValueError(f"{self.name} needs images of at least 3 x 3 pixels; give {spelt('decode', 'pixels')}")
        return input_shape

    def build(self, input_shape: InputShape, num_classes: int) -> nn.Module:
        return _Styles(self.num_styles, input_shape)

    def encode(self, images: Tensor, classes: Tensor, decoder: nn.Module, generator: torch.Generator) -> Tensor:
        assert isinstance(decoder, _Styles)
        channels = images.shape[1]
        for kernels in (decoder.kernels, decoder.kernels_back):
            noise = torch.randn(kernels.shape, generator=generator) * _DIFFERENCE / math.sqrt(9 * channels)
            kernels.data.add_(noise.to(kernels))
        return images[: len(classes)].clone()


_DIFFERENCE = 0.2
"""Norm of the initial noise added to the kernels of each style; the norm of the identity kernel is 1."""


class _Styles(nn.Module):
    """All styles at once, as groups of channels."""

    def __init__(self, num_styles: int, input_shape: InputShape) -> None:
        super().__init__()
        channels, height, width = input_shape
        self.num_styles, rows = num_styles, num_styles * channels
        identity = nn.init.dirac_(torch.empty(channels, channels, 3, 3)).repeat(num_styles, 1, 1, 1)
        self.kernels, self.bias = nn.Parameter(identity.clone()), nn.Parameter(torch.zeros(rows))
        self.scale = nn.Parameter(torch.ones(rows, height - 2, width - 2))
        self.shift = nn.Parameter(torch.zeros(rows, height - 2, width - 2))
        self.kernels_back, self.bias_back = nn.Parameter(identity.clone()), nn.Parameter(torch.zeros(rows))

    def forward(self, latents: Tensor, classes: Tensor) -> Tensor:
        x = self.scale * F.conv2d(latents, self.kernels, self.bias) + self.shift
        x = F.conv_transpose2d(x, self.kernels_back, self.bias_back, groups=self.num_styles)
        return x.unflatten(1, (self.num_styles, -1)).transpose(0, 1).flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class StaticDynamic(Decode):
    """Each clip is a fixed still image and a learned sequence of one channel, combined by a convolution.

    Static-dynamic disentanglement (Wang et al. 2024): the convolution over frames, rows and columns is learned and
    shared by all clips. A latent holds a few stills and sequences, and is decoded into one clip for each pair."""

    name: ClassVar[str] = "static-dynamic"
    takes: ClassVar[tuple[Kind, ...]] = ("clips",)
    stills: str | None = None
    """Run folder or file of the distilled frames that are the stills, ``statics`` times ipc images of each class.
    Unset: the middle frames of the initial clips."""
    statics: int = 2
    """Number of stills in a latent."""
    dynamics: int = 2
    """Number of sequences in a latent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("statics", "dynamics"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"decode.{name} must be at least 1, got {value}; the published value is 2")

    @property
    def expansion(self) -> int:
        return self.statics * self.dynamics

    def sizes(self, input_shape: InputShape) -> tuple[int, int]:
        """Return how many numbers of a latent belong to the stills and how many to the sequences."""
        frames, channels, *size = input_shape
        return self.statics * channels * math.prod(size), self.dynamics * frames * math.prod(size)

    def latent_shape(self, input_shape: InputShape) -> tuple[int, ...]:
        return (sum(self.sizes(input_shape)),)

    def latents_per_class(self, ipc: int, input_shape: InputShape, num_classes: int) -> int:
        latent, budget = sum(self.sizes(input_shape)), ipc * math.prod(input_shape)
        if latent > budget:
            raise ValueError(
                f"{self.statics} stills and {self.dynamics} sequences are {latent} numbers, more than the {budget} of "
                f"{spelt('ipc', ipc)}; give {spelt('ipc', -(-latent // math.prod(input_shape)))} or more"
            )
        return min(ipc, budget // latent)

    def build(self, input_shape: InputShape, num_classes: int) -> nn.Module:
        return _StaticDynamic(self, input_shape)

    def encode(self, images: Tensor, classes: Tensor, decoder: nn.Module, generator: torch.Generator) -> Tensor:
        assert isinstance(decoder, _StaticDynamic)
        kernels, (frames, _, *size) = decoder.kernels, images.shape[1:]
        noise = torch.randn(kernels.shape, generator=generator) * _DIFFERENCE / math.sqrt(kernels[0].numel())
        kernels.data.add_(noise.to(kernels))
        stills = images.unflatten(0, (self.statics, self.dynamics, -1))[:, 0, :, frames // 2].transpose(0, 1)
        sequences = torch.randn(len(classes), self.dynamics, frames, *size, generator=generator)
        return torch.cat([stills.flatten(1), sequences.to(images).flatten(1)], 1)


class _StaticDynamic(nn.Module):
    """Decodes latents (N, statics * C * H * W + dynamics * T * H * W) into clips; the stills get no gradient."""

    def __init__(self, decode: StaticDynamic, input_shape: InputShape) -> None:
        super().__init__()
        self.decode, self.input_shape, channels = decode, input_shape, input_shape[1]
        self.kernels = nn.Parameter(nn.init.dirac_(torch.empty(channels, channels + 1, 3, 3, 3)))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, latents: Tensor, classes: Tensor) -> Tensor:
        frames, channels, *size = self.input_shape
        stills, sequences = latents.split(self.decode.sizes(self.input_shape), 1)
        still = stills.detach().unflatten(1, (-1, 1, channels, 1, *size))
        sequence = sequences.unflatten(1, (1, -1, 1, frames, *size))
        pairs = len(latents), self.decode.statics, self.decode.dynamics
        parts = (x.expand(*pairs, x.shape[3], frames, *size) for x in (still, sequence))
        inputs = torch.cat(list(parts), 3).movedim(0, 2).flatten(0, 2)
        return F.conv3d(inputs, self.kernels, self.bias, padding=1).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class Pyramid(Decode):
    """An image is the sum of images of several scales, in decorrelated colours, as the argument of a sigmoid.

    Linear gradient matching (Cazenavette et al. 2025): the sides of each level are half those of the next, rounded up,
    and each level is enlarged bilinearly. A latent holds all levels. These are about 4/3 of the numbers of an image if
    the largest level has its size."""

    name: ClassVar[str] = "pyramid"
    makes_pixels: ClassVar[bool] = True
    coarsest: int = 1
    """Largest longer side of the smallest level in pixels."""
    finest: int | None = None
    """Longer side of the largest level in pixels. Default: that of the image."""
    decorrelated: bool = True
    """Whether the channels of the levels of colour images are decorrelated: brightness and two differences of
    colours, in the proportions of natural images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coarsest < 1 or (self.finest is not None and self.finest < self.coarsest):
            raise ValueError(
                f"decode.coarsest must be at least 1 and at most decode.finest, got {self.coarsest} and {self.finest}; "
                "the published value is 1"
            )

    def levels(self, input_shape: InputShape) -> list[tuple[int, int]]:
        """Return the height and width of each level for images of this shape, the smallest first.

        Raises:
            ValueError: the largest or the smallest level would be larger than the image.
        """
        height, width = input_shape[1:]
        longest = max(height, width)
        finest = longest if self.finest is None else self.finest
        for field, side in (("finest", finest), ("coarsest", self.coarsest)):
            if side > longest:
                raise ValueError(
                    f"decode.{field} is {side}, but the longer side of an image has {longest} pixels; give "
                    f"{spelt(f'decode.{field}', longest, 'Pyramid')} or less"
                )
        sizes = [(-(-height * finest // longest), -(-width * finest // longest))]
        while max(sizes[0]) > self.coarsest:
            height, width = sizes[0]
            sizes.insert(0, (-(-height // 2), -(-width // 2)))
        return sizes

    def latent_shape(self, input_shape: InputShape) -> tuple[int, ...]:
        return input_shape[0], sum(map(math.prod, self.levels(input_shape)))

    def latents_per_class(self, ipc: int, input_shape: InputShape, num_classes: int) -> int:
        (_, latent), pixels = self.latent_shape(input_shape), math.prod(input_shape[1:])
        if latent > ipc * pixels:
            half = -(-max(input_shape[1:]) // 2)
            smaller = f", or {spelt('decode.finest', half, 'Pyramid')}" if half >= self.coarsest else ""
            raise ValueError(
                f"a pyramid has {latent} numbers per channel, more than the {ipc * pixels} of {spelt('ipc', ipc)}; "
                f"give {spelt('ipc', -(-latent // pixels))}{smaller}"
            )
        return ipc * pixels // latent

    def build(self, input_shape: InputShape, num_classes: int) -> nn.Module:
        return PyramidDecoder(input_shape, self.levels(input_shape), self.decorrelated)

    def fit(self, decoder: nn.Module, transform: Transform) -> None:
        assert isinstance(decoder, PyramidDecoder)
        decoder.fit(transform)

    def encode(self, images: Tensor, classes: Tensor, decoder: nn.Module, generator: torch.Generator) -> Tensor:
        assert isinstance(decoder, PyramidDecoder)
        pixels = (images * decoder.std + decoder.mean).clamp(_DARKEST, 1 - _DARKEST)
        colours = torch.linalg.inv(decoder.colours.cpu().double()).to(images)  # mps has no float64
        rest = torch.einsum("cd,ndhw->nchw", colours, pixels.logit() / decoder.SLOPE)
        levels = []
        for size in decoder.levels:
            level = F.interpolate(rest, size=size, mode="area")
            rest = rest - decoder.enlarged(level)
            levels.append(level.flatten(2))
        return torch.cat(levels, 2)


_DARKEST = 1 / 512
"""Half a grey level: pixels of 0 and 1 are encoded as if they were this far inside, where the logit is finite."""

_COLOURS = torch.tensor([[0.26, 0.09, 0.02], [0.27, 0.00, -0.05], [0.27, -0.09, 0.03]], dtype=torch.float64)
"""A square root of the covariance of the colours of natural images, as published with "Feature Visualization" (Olah,
Mordvintsev and Schubert 2017): its columns are brightness and two differences of colours."""


class PyramidDecoder(_FromPixels):
    """Decodes latents (N, C, K), the flattened levels one after the other, into images (N, C, H, W).

    If K is the number of pixels of the first levels only, the image is the sum of these."""

    SLOPE: ClassVar[float] = 2.0
    """Factor of the argument of the sigmoid."""
    colours: Tensor
    """(C, C): the decorrelated channels of the levels to the arguments of the sigmoid."""

    def __init__(self, input_shape: InputShape, levels: Sequence[tuple[int, int]], decorrelated: bool) -> None:
        super().__init__(input_shape)
        self.levels, self.size = tuple(levels), input_shape[1:]
        colours = torch.eye(input_shape[0])
        if decorrelated and input_shape[0] == 3:
            colours = (_COLOURS / _COLOURS.norm(dim=0).max()).float()
        self.register_buffer("colours", colours)

    def enlarged(self, level: Tensor) -> Tensor:
        return F.interpolate(level, size=self.size, mode="bilinear", align_corners=False)

    def forward(self, latents: Tensor, classes: Tensor) -> Tensor:
        total, first = latents.new_zeros(*latents.shape[:2], *self.size), 0
        for size in self.levels:
            last = first + math.prod(size)
            if last > latents.shape[2]:
                break
            total = total + self.enlarged(latents[:, :, first:last].unflatten(2, size))
            first = last
        values = torch.einsum("cd,ndhw->nchw", self.colours, total)
        return (torch.sigmoid(self.SLOPE * values) - self.mean) / self.std


@dataclass(frozen=True, kw_only=True)
class Siren(Decode):
    """Each image is stored as the weights of a small network that maps a position to the colour there.

    DDiF (Shin et al. 2025): the network is a SIREN (Sitzmann et al. 2020), layers with a sine and a linear one. It is
    first fitted to its initial image. Its weights do not depend on the size of the image."""

    name: ClassVar[str] = "siren"
    fits: ClassVar[bool] = True
    width: int = 6
    """Number of outputs of each layer with a sine."""
    depth: int = 2
    """Number of layers with a sine."""
    first_frequency: float = 30.0
    """Factor of the argument of the sine in the first layer."""
    frequency: float = 10.0
    """Factor of the argument of the sine in the other layers."""
    fit_steps: int = 5000
    """Number of steps of Adam that fit a network to its initial image."""
    fit_lr: float = 5e-4
    """Learning rate of Adam for this fit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in {"width": 1, "depth": 1, "fit_steps": 0}.items():
            if (value := getattr(self, name)) < least:
                usual = type(self).__dataclass_fields__[name].default
                raise ValueError(f"decode.{name} must be at least {least}, got {value}; the published value is {usual}")
        for name in ("first_frequency", "frequency", "fit_lr"):
            if not 0 < (value := getattr(self, name)) < 1e30:
                usual = type(self).__dataclass_fields__[name].default
                raise ValueError(
                    f"decode.{name} must be positive and less than 1e30, got {value}; the published value is {usual:g}"
                )

    def layers(self, channels: int) -> list[tuple[int, int, float | None]]:
        """Return the number of inputs and outputs of each layer and the factor in its sine; the last layer has none."""
        units = [2, *[self.width] * self.depth, channels]
        factors = [self.first_frequency, *[self.frequency] * (self.depth - 1), None]
        return [(*sizes, factor) for sizes, factor in zip(itertools.pairwise(units), factors, strict=True)]

    def num_weights(self, channels: int) -> int:
        """Return the number of weights and biases of the network of an image, P."""
        return sum((inputs + 1) * outputs for inputs, outputs, _ in self.layers(channels))

    def latent_shape(self, input_shape: InputShape) -> tuple[int, ...]:
        return (self.num_weights(input_shape[0]),)

    def latents_per_class(self, ipc: int, input_shape: InputShape, num_classes: int) -> int:
        channels, budget = input_shape[0], ipc * math.prod(input_shape)
        if (latent := self.num_weights(channels)) > budget:
            narrower = (dataclasses.replace(self, width=width) for width in range(self.width - 1, 0, -1))
            fitting = next((each.width for each in narrower if each.num_weights(channels) <= budget), None)
            raise ValueError(
                f"a SIREN of width {self.width} and depth {self.depth} has {latent} weights, more than the {budget} "
                f"numbers of {spelt('ipc', ipc)}; give {spelt('ipc', -(-latent // math.prod(input_shape)))}"
                + (f", or {spelt('decode.width', fitting, 'Siren')}" if fitting else "")
            )
        return budget // latent

    def build(self, input_shape: InputShape, num_classes: int) -> nn.Module:
        return _Siren(self, input_shape)

    def encode(self, images: Tensor, classes: Tensor, decoder: nn.Module, generator: torch.Generator) -> Tensor:
        assert isinstance(decoder, _Siren)
        bounds = []
        for k, (inputs, outputs, _) in enumerate(self.layers(images.shape[1])):
            bound = math.sqrt(6 / inputs) / self.frequency if k else 1 / inputs
            bounds.append(torch.full(((inputs + 1) * outputs,), bound))
        uniform = 2 * torch.rand(len(images), self.num_weights(images.shape[1]), generator=generator) - 1
        start = (uniform * torch.cat(bounds)).to(images)
        at_once = max(1, _FITTED_AT_ONCE // (self.width * math.prod(images.shape[2:])))
        parts = zip(start.split(at_once), images.split(at_once), strict=True)
        return torch.cat([self._fitted(latents, part, decoder) for latents, part in parts])

    @torch.enable_grad()
    def _fitted(self, latents: Tensor, images: Tensor, decoder: nn.Module) -> Tensor:
        """Return the latents (n, P) after ``fit_steps`` steps on the mean squared error of each image."""
        latents, classes = latents.clone().requires_grad_(), torch.zeros(len(latents))
        optimiser = torch.optim.Adam([latents], lr=self.fit_lr)
        for _ in range(self.fit_steps):
            errors = (decoder(latents, classes) - images).square().flatten(1).mean(1)
            (latents.grad,) = torch.autograd.grad(errors.sum(), latents)
            optimiser.step()
        return latents.detach()


_FITTED_AT_ONCE = 2**24
"""Largest number of outputs of a layer of all networks that are fitted together: 64 MiB."""


class _Siren(nn.Module):
    """Decodes latents (N, P) into images (N, C, H, W), all at once.

    A latent holds the matrix (outputs, inputs + 1) of each layer, whose last column is the bias. The inputs of the
    first layer are the row and the column, from -1 at the first pixel to 1 at the last."""

    def __init__(self, decode: Siren, input_shape: InputShape) -> None:
        super().__init__()
        channels, *self.size = input_shape
        self.layers = decode.layers(channels)

    def forward(self, latents: Tensor, classes: Tensor) -> Tensor:
        axes = (torch.linspace(-1, 1, side, dtype=latents.dtype, device=latents.device) for side in self.size)
        x = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
        parts = latents.split([(inputs + 1) * outputs for inputs, outputs, _ in self.layers], 1)
        for part, (inputs, outputs, factor) in zip(parts, self.layers, strict=True):
            matrix = part.unflatten(1, (outputs, inputs + 1))
            x = matrix[:, :, :-1] @ x + matrix[:, :, -1:]
            if factor is not None:
                x = torch.sin(factor * x)
        return x.unflatten(2, self.size)


DECODERS: Registry[type[Decode]] = Registry(
    "decoder",
    "condense.decoders",
    {
        decode.name: decode
        for decode in (Pixels, Pixels8Bit, Graphs, Factor, DCT, Bases, Hallucinator, Pyramid, Siren, StaticDynamic)
    }
    # These modules import this one.
    | {"patches": "condense.synthetic.patches:Patches", "codec": "condense.synthetic.codec:Codec"},
    subclass_of(Decode),
)
