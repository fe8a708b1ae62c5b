"""The decoder ``codec``: images as latents of a small learned image codec for each class, with their rate in the loss.

Bao et al., "Dataset Distillation as Data Compression: A Rate-Utility Perspective" (DD-RUO), ICCV 2025. The codec is
that of overfitted image codecs (Cool-Chic, C3): grids of whole numbers of several resolutions, an autoregressive
entropy model, a learned upsampling and a small synthesis network, here for all images of a class. Deviations:
docs/methods/codec.md.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from condense.data.layout import InputShape
from condense.names import spelt
from condense.rng import Draws
from condense.synthetic.decode import Coded

GAIN = 16.0
"""Published factor of the latents before they are quantised. Here latents are in units of quantisation, so the factor
stands in their initial range and learning rate."""
MOST_NEIGHBOURS, MOST_CHANNELS = 256, 1024
"""Largest ``context`` and ``width``, so that a file cannot ask for much more memory than it takes itself."""
_START = 0.05 * GAIN
"""Bound of the uniform initial latents."""
_MOST_LEVELS = 6
_FINEST = 15
"""Exponent k of the smallest step 2^-k of quantised weights. Exponent and order of the code take four bits each."""
_HEADER = 8
"""Bits that a group of weights takes for its step and the order of its code."""
_AT_ONCE = 2**24
"""Largest number of outputs of a layer for images that are decoded together: 64 MiB."""


@dataclass(frozen=True, kw_only=True)
class Codec(Coded):
    """Each class has a small image codec of its own, and the bits of its latents are part of the loss.

    DD-RUO (Bao et al. 2025): a latent holds grids of whole numbers of several resolutions. The networks of a class are
    an entropy model, an upsampling and a synthesis. They are first fitted to the initial images together with the
    latents."""

    name: ClassVar[str] = "codec"
    fits: ClassVar[bool] = True
    used_later: ClassVar[tuple[str, ...]] = ("rate_weight", "weight_error")
    levels: int | None = None
    """Number of grids of a latent, each half the size of the one before. Default: down to 1 or 2 pixels, at most 6."""
    context: int = 32
    """Number of neighbours from which the entropy model predicts a number, which is also its width."""
    context_layers: int = 4
    """Number of hidden layers of the entropy model."""
    width: int = 40
    """Number of hidden channels of the synthesis."""
    fit_steps: int = 5000
    """Number of steps of Adam that fit the codecs to the initial images."""
    fit_lr: float = 0.01
    """Learning rate of the networks in this fit; that of the latents is 16 times as high."""
    fit_rate_weight: float = 0.1
    """Weight of the rate, in bits per pixel, beside the mean squared error in this fit."""
    noise: tuple[float, float] = (0.25, 0.1)
    """Standard deviation of the noise that stands for rounding, at the beginning and the end of the fit, and again of
    the run."""
    temperature: tuple[float, float] = (0.3, 0.1)
    """Temperature of the soft rounding at the beginning and the end; rounding is the limit 0."""
    weight_error: float = 5e-5
    """Largest mean squared error of the images of a class, in the transformed space, by which the quantisation of its
    networks may change them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"levels": 1, "context": 1, "context_layers": 0, "width": 1, "fit_steps": 0}
        for name, bound in least.items():
            if (value := getattr(self, name)) is not None and value < bound:
                raise ValueError(f"decode.{name} must be at least {bound}, got {value}; {self._published(name)}")
        for name, bound in {"context": MOST_NEIGHBOURS, "width": MOST_CHANNELS}.items():
            if (value := getattr(self, name)) > bound:
                raise ValueError(f"decode.{name} must be at most {bound}, got {value}; {self._published(name)}")
        for name in ("fit_rate_weight", "weight_error"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"decode.{name} must be finite and at least 0, got {value}; {self._published(name)}")
        if not 0 < self.fit_lr < 1e30:
            raise ValueError(
                f"decode.fit_lr must be positive and less than 1e30, got {self.fit_lr}; {self._published('fit_lr')}"
            )
        if not all(0 <= std < math.inf for std in self.noise):
            raise ValueError(
                f"decode.noise must be finite and at least 0, got {list(self.noise)}; {self._published('noise')}"
            )
        if not all(0 < value < math.inf for value in self.temperature):
            raise ValueError(
                f"decode.temperature must be positive and finite, got {list(self.temperature)}; "
                f"{self._published('temperature')}"
            )

    def _published(self, name: str) -> str:
        usual = type(self).__dataclass_fields__[name].default
        if usual is None:
            return f"give {spelt(f'decode.{name}', _MOST_LEVELS, 'Codec')}"
        if isinstance(usual, tuple):
            return f"published values are {' and '.join(f'{value:g}' for value in usual)}"
        return f"a published value is {usual:g}"

    def sizes(self, input_shape: InputShape) -> list[tuple[int, int]]:
        """Return the height and width of each grid for images of this shape, the finest first.

        Raises:
            ValueError: the images are too small for so many grids.
        """
        height, width = input_shape[1:]
        most = min(height, width).bit_length()
        levels = min(most, _MOST_LEVELS) if self.levels is None else self.levels
        if levels > most:
            raise ValueError(
                f"decode.levels is {levels}, but images of {height} x {width} pixels have at most {most} grids; give "
                f"{spelt('decode.levels', most, 'Codec')} or less"
            )
        return [(-(-height // 2**k), -(-width // 2**k)) for k in range(levels)]

    def latent_shape(self, input_shape: InputShape) -> tuple[int, ...]:
        return (sum(map(math.prod, self.sizes(input_shape))),)

    def build(self, input_shape: InputShape, num_classes: int) -> nn.Module:
        return CodecDecoder(self, input_shape, num_classes)

    def relaxed(self, latents: Tensor, draws: Draws, progress: float | Tensor) -> Tensor:
        return self._softened(latents, draws.normal(*latents.shape).to(latents), progress)

    def _softened(self, latents: Tensor, noise: Tensor, progress: float | Tensor) -> Tensor:
        std, temperature = (first + (last - first) * progress for first, last in (self.noise, self.temperature))
        return soft_round(soft_round(latents, temperature) + std * noise, temperature)

    def rates(self, latents: Tensor, classes: Tensor, decoder: nn.Module) -> Tensor:
        assert isinstance(decoder, CodecDecoder)
        return decoder.per_class(decoder.bits(latents, classes), classes) / decoder.num_pixels

    def encode(self, images: Tensor, classes: Tensor, decoder: nn.Module, generator: torch.Generator) -> Tensor:
        assert isinstance(decoder, CodecDecoder)
        decoder.initialise(generator)
        (size,) = self.latent_shape(images.shape[1:])
        start = (2 * torch.rand(len(images), size, generator=generator) - 1) * _START
        latents = start.to(images)
        for part in self._groups(classes, decoder):
            latents[part] = self._fitted(latents[part], images[part], classes[part], decoder, generator)
        return latents

    def _groups(self, classes: Tensor, decoder: CodecDecoder) -> Iterator[Tensor]:
        """Yield the positions of the images of as many classes as are fitted together."""
        present = classes.unique()
        most = classes.bincount().max() * self.width * decoder.num_pixels
        for some in present.split(max(1, _AT_ONCE // int(most))):
            yield torch.isin(classes, some).nonzero().flatten()

    @torch.enable_grad()
    def _fitted(
        self, latents: Tensor, images: Tensor, classes: Tensor, decoder: CodecDecoder, generator: torch.Generator
    ) -> Tensor:
        """Return the latents (n, K) after ``fit_steps`` steps on error and rate; the networks learn in place."""
        latents = latents.clone().requires_grad_()
        params = list(decoder.parameters())
        groups = [{"params": [latents], "lr": GAIN * self.fit_lr}, {"params": params, "lr": self.fit_lr}]
        optimiser = torch.optim.Adam(groups)
        for step in range(self.fit_steps):
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            seen = self._softened(latents, noise, step / self.fit_steps)
            errors = (decoder(seen, classes) - images).square().flatten(1).mean(1)
            rates = self.rates(seen, classes, decoder)
            loss = (decoder.per_class(errors, classes) + self.fit_rate_weight * rates).sum()
            leaves = (latents, *params)  # of which a single grid or an entropy model without layers uses not all
            for param, grad in zip(leaves, torch.autograd.grad(loss, leaves, materialize_grads=True), strict=True):
                param.grad = grad
            optimiser.step()
        for param in params:
            param.grad = None
        return latents.detach()

    @torch.no_grad()
    def finished(self, latents: Tensor, classes: Tensor, decoder: nn.Module) -> tuple[Tensor, nn.Module]:
        assert isinstance(decoder, CodecDecoder)
        latents, decoder = latents.round(), copy.deepcopy(decoder)
        wanted = decoder.decoded(latents, classes)
        for number, names in enumerate(DRAWING, 1):
            exact, limit = decoder.group(names), self.weight_error * number / len(DRAWING)
            is_coarse = torch.ones(len(exact), dtype=torch.bool, device=exact.device)
            for k in range(_FINEST + 1):
                decoder.set_group(names, torch.where(is_coarse[:, None], _rounded(exact, k), decoder.group(names)))
                errors = (decoder.decoded(latents, classes) - wanted).square().flatten(1).mean(1)
                is_coarse &= decoder.per_class(errors, classes) > limit
                if not is_coarse.any():
                    break
            decoder.set_group(names, torch.where(is_coarse[:, None], exact, decoder.group(names)))
        for names in PREDICTING:
            exact = best = decoder.group(names)
            fewest = torch.full((len(exact),), math.inf, dtype=torch.float64, device=exact.device)
            for k in range(_FINEST + 1):
                decoder.set_group(names, tried := _rounded(exact, k))
                bits = decoder.latent_bits(latents, classes) + golomb_bits(tried)
                best = torch.where((bits < fewest)[:, None], tried, best)
                fewest = torch.minimum(bits, fewest)
            decoder.set_group(names, best)
        return latents, decoder

    @torch.no_grad()
    def num_bytes(self, latents: Tensor, classes: Tensor, decoder: nn.Module) -> tuple[int, int]:
        assert isinstance(decoder, CodecDecoder)
        of_networks = torch.stack([golomb_bits(decoder.group(names)) for names in (*DRAWING, *PREDICTING)]).sum(0)
        of_latents = decoder.latent_bits(latents.round(), classes)
        if not of_latents.isfinite().all():
            raise ValueError("its latents have no finite number of bits in its entropy model")
        of_images, of_decoder = ((bits / 8).ceil().sum().item() for bits in (of_latents, of_networks))
        return int(of_images), int(of_decoder)


DRAWING = (
    ("upsampling",),
    ("hidden_weight", "colour_weight", "filter_weight"),
    ("hidden_bias", "colour_bias", "filter_bias"),
)
"""Groups of weights of which the images are made. The weights of a group have a common step."""
PREDICTING = (("context_weight", "scale_weight"), ("context_bias", "scale_bias"))
"""Groups of weights of the entropy model."""


class CodecDecoder(nn.Module):
    """Decodes latents (N, K) into images (N, C, H, W), and predicts the latents.

    A latent holds the flattened grids, the finest first. The first axis of every parameter is the class."""

    def __init__(self, codec: Codec, input_shape: InputShape, num_classes: int) -> None:
        super().__init__()
        channels, self.num_pixels = input_shape[0], math.prod(input_shape[1:])
        self.sizes, self.width = codec.sizes(input_shape), codec.width
        k, layers, width = codec.context, codec.context_layers, codec.width

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(num_classes, *shape))

        self.context_weight, self.context_bias = zeros(layers, k, k), zeros(layers, k)
        self.scale_weight, self.scale_bias = zeros(2, k), zeros(2)
        self.upsampling = nn.Parameter(bicubic_kernel().repeat(num_classes, 1, 1))
        self.hidden_weight, self.hidden_bias = zeros(width, len(self.sizes)), zeros(width)
        self.colour_weight, self.colour_bias = zeros(channels, width), zeros(channels)
        self.filter_weight, self.filter_bias = zeros(2, channels, channels, 3, 3), zeros(2, channels)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw the initial weights. The entropy model begins with a scale near 1."""
        stds = {
            "context_weight": 0.1 / math.sqrt(self.context_weight.shape[-1]),
            "scale_weight": 0.1 / math.sqrt(self.context_weight.shape[-1]),
            "hidden_weight": math.sqrt(2 / len(self.sizes)),
            "colour_weight": math.sqrt(1 / self.width),
            "filter_weight": 0.1 / math.sqrt(9 * self.filter_weight.shape[2]),
        }
        for name, std in stds.items():
            weight = self.get_parameter(name)
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)
        self.scale_bias[:, 1] = _SCALE_SHIFT

    def forward(self, latents: Tensor, classes: Tensor) -> Tensor:
        grids = self._grids(latents)
        maps, kernels = grids[-1], self.upsampling[classes]
        for finer in reversed(grids[:-1]):
            maps = torch.cat([finer, _doubled(maps, kernels)[..., : finer.shape[2], : finer.shape[3]]], 1)
        x = maps.flatten(2)
        x = torch.relu(self.hidden_weight[classes] @ x + self.hidden_bias[classes][..., None])
        x = self.colour_weight[classes] @ x + self.colour_bias[classes][..., None]
        images = x.unflatten(2, maps.shape[2:])
        weights, biases = self.filter_weight[classes], self.filter_bias[classes]
        images = images + torch.relu(_convolved(images, weights[:, 0], biases[:, 0]))
        return images + _convolved(images, weights[:, 1], biases[:, 1])

    def decoded(self, latents: Tensor, classes: Tensor) -> Tensor:
        """Return the images, decoded in parts that fit into memory."""
        at_once = max(1, _AT_ONCE // (self.width * self.num_pixels))
        parts = zip(latents.split(at_once), classes.split(at_once), strict=True)
        return torch.cat([self(some, of_class) for some, of_class in parts])

    def predicted(self, latents: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and scale, each (N, K), of the Laplace distributions of the entries of the latents.

        Those of an entry depend on the entries of its grid that come before it in rows and columns."""
        x = torch.cat([self._contexts(grid) for grid in self._grids(latents)], 2)
        weights, biases = self.context_weight[classes], self.context_bias[classes]
        for layer in range(weights.shape[1]):
            x = x + torch.relu(weights[:, layer] @ x + biases[:, layer, :, None])
        mean, raw = (self.scale_weight[classes] @ x + self.scale_bias[classes][..., None]).unbind(1)
        return mean, torch.exp((raw - _SCALE_SHIFT).clamp(*_LOG_SCALES))

    def bits(self, latents: Tensor, classes: Tensor) -> Tensor:
        """Return the bits (N,) of latents (N, K): minus the logarithm of the probabilities of their entries.

        If there are many, the backward pass computes them again, one part after the other."""
        at_once = max(1, _AT_ONCE // (self.context_weight.shape[-1] * latents.shape[1]))
        if len(latents) <= at_once:
            return self._bits(latents, classes)
        parts = zip(latents.split(at_once), classes.split(at_once), strict=True)
        return torch.cat(
            [checkpoint(self._bits, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        )

    def _bits(self, latents: Tensor, classes: Tensor) -> Tensor:
        return laplace_bits(latents, *self.predicted(latents, classes)).sum(1)

    def latent_bits(self, latents: Tensor, classes: Tensor) -> Tensor:
        """Return the bits (num_classes,) of the latents of each class, computed in float64."""
        precise = copy.deepcopy(self).double()
        bits = precise.bits(latents.double(), classes)
        return self._members(classes, bits.dtype) @ bits

    def per_class(self, values: Tensor, classes: Tensor) -> Tensor:
        """Return the mean (num_classes,) over the images of each class of values (N,); 0 for a class without any."""
        members = self._members(classes, values.dtype)
        return (members @ values) / members.sum(1).clamp(min=1)

    def group(self, names: Sequence[str]) -> Tensor:
        """Return parameters as a matrix (num_classes, n)."""
        return torch.cat([self.get_parameter(name).detach().flatten(1) for name in names], 1)

    def set_group(self, names: Sequence[str], values: Tensor) -> None:
        """Replace parameters by the values (num_classes, n)."""
        params = [self.get_parameter(name) for name in names]
        parts = values.split([param[0].numel() for param in params], 1)
        for param, part in zip(params, parts, strict=True):
            param.copy_(part.view_as(param))

    def _members(self, classes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the matrix (num_classes, N) of 1 where an image belongs to a class; else 0."""
        numbers = torch.arange(len(self.upsampling), device=classes.device)
        return (numbers[:, None] == classes).to(dtype)

    def _grids(self, latents: Tensor) -> list[Tensor]:
        parts = latents.split(list(map(math.prod, self.sizes)), 1)
        return [part.unflatten(1, (1, *size)) for part, size in zip(parts, self.sizes, strict=True)]

    def _contexts(self, grid: Tensor) -> Tensor:
        """Return the neighbours (N, k, h w) of the entries of a grid (N, 1, h, w); outside the grid they are 0."""
        above, beside, positions = _windows(self.context_weight.shape[-1], grid.device)
        windows = F.unfold(F.pad(grid, (beside, beside, above, 0)), (above + 1, 2 * beside + 1))
        return windows.index_select(1, positions)


_SCALE_SHIFT = 4.0
_LOG_SCALES = (-4.6, 5.0)
"""The scale of an entry is exp(clamp(raw - 4, -4.6, 5))."""


def soft_round(values: Tensor, temperature: float | Tensor) -> Tensor:
    """Return a differentiable approximation of rounding (Agustsson and Theis 2020), which tends to it at temperature 0
    and to the identity at high temperatures."""
    floor = values.floor()
    bent = torch.tanh((values - floor - 0.5) / temperature)
    most = math.tanh(0.5 / temperature) if isinstance(temperature, float) else torch.tanh(0.5 / temperature)
    return floor + 0.5 + 0.5 * bent / most


def laplace_bits(values: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Return -log2( F(y + 1/2) - F(y - 1/2) ) for the distribution function F of a Laplace distribution.

    Both forms are exact, the first where the interval contains the mean; neither underflows."""
    apart = (values - mean).abs()
    inside = apart.clamp(max=0.5)
    around = -0.5 * (torch.expm1(-(0.5 + inside) / scale) + torch.expm1(-(0.5 - inside) / scale))
    beside = (apart - 0.5) / scale - torch.log(-0.5 * torch.expm1(-1 / scale))
    return torch.where(apart < 0.5, -around.log(), beside) / math.log(2)


def neighbours(num: int) -> list[tuple[int, int]]:
    """Return the offsets (rows, columns) of the nearest entries of a grid that come before an entry."""
    reach = math.isqrt(2 * num) + 1
    before = [(dy, dx) for dy in range(-reach, 1) for dx in range(-reach, reach + 1) if (dy, dx) < (0, 0)]
    return sorted(before, key=lambda offset: (offset[0] ** 2 + offset[1] ** 2, offset))[:num]


@functools.lru_cache(maxsize=16)
def _windows(num: int, device: torch.device) -> tuple[int, int, Tensor]:
    """Return how far the neighbours are above and beside an entry, and their positions (num,) in a window so large."""
    offsets = neighbours(num)
    above, beside = -min(dy for dy, _ in offsets), max(abs(dx) for _, dx in offsets)
    positions = [(dy + above) * (2 * beside + 1) + dx + beside for dy, dx in offsets]
    with torch.inference_mode(False):  # positions made in inference mode could not be used in training
        return above, beside, torch.tensor(positions, device=device)


def bicubic_kernel() -> Tensor:
    """Return the kernel (8, 8) of a transposed convolution of stride 2 that enlarges as bicubic interpolation does."""
    distance = (torch.arange(8, dtype=torch.float64) - 3.5).abs() / 2
    near = 1.25 * distance**3 - 2.25 * distance**2 + 1
    far = -0.75 * distance**3 + 3.75 * distance**2 - 6 * distance + 3
    taps = torch.where(distance <= 1, near, far)
    return torch.outer(taps, taps).float()


def golomb_bits(numbers: Tensor) -> Tensor:
    """Return the bits (C,), float64, of each row of weights (C, n) in an Exp-Golomb code.

    The step of a row is the largest 2^-k of which all its weights are multiples, and its code has the order that takes
    the fewest bits; both are stored in 8 bits. A row that is no multiple of 2^-15 takes 32 bits for each weight."""
    exact = numbers.double()
    steps, is_coded = exact, torch.zeros(len(exact), dtype=torch.bool, device=exact.device)
    for k in reversed(range(_FINEST + 1)):
        tried = exact * 2**k
        is_whole = (tried == tried.round()).all(1)
        steps, is_coded = torch.where(is_whole[:, None], tried, steps), is_coded | is_whole
    naturals = torch.where(steps > 0, 2 * steps - 1, -2 * steps)
    lengths = [
        (2 * torch.frexp((naturals / 2**order).floor() + 1).exponent - 1 + order).sum(1).double()
        for order in range(_FINEST + 1)
    ]
    return torch.where(is_coded, torch.stack(lengths).amin(0), 32.0 * exact.shape[1]) + _HEADER


def _rounded(numbers: Tensor, k: int) -> Tensor:
    return (numbers * 2**k).round() / 2**k


def _doubled(maps: Tensor, kernels: Tensor) -> Tensor:
    """Enlarge maps (N, l, h, w) to (N, l, 2 h, 2 w) by the kernel (8, 8) of each image; edges are continued."""
    x = maps.transpose(0, 1)
    for axis in (2, 3):
        first, last = x.narrow(axis, 0, 1), x.narrow(axis, x.shape[axis] - 1, 1)
        x = torch.cat([first, first, x, last, last], axis)
    return F.conv_transpose2d(x, kernels[:, None], stride=2, padding=7, groups=len(kernels)).transpose(0, 1)


def _convolved(images: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """Convolve each image (N, C, H, W) with its own weights (N, C, C, 3, 3) and biases (N, C)."""
    x = F.conv2d(images.flatten(0, 1)[None], weights.flatten(0, 1), biases.flatten(), padding=1, groups=len(images))
    return x.unflatten(1, images.shape[:2])[0]
