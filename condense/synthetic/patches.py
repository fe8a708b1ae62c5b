"""The decoder ``patches``: images of which only some patches are stored, in 8-bit pixels.

It is the second part of dataset quantization: Zhou et al., "Dataset Quantization", ICCV 2023. An image is divided into
square patches. Those that matter most are stored, with one bit for each patch of the image that says whether it is
stored. The others are interpolated from the stored ones when the image is decoded, by the pull-push algorithm of
Gortler et al., "The Lumigraph", SIGGRAPH 1996: means of known pixels over larger and larger squares fill the others.

Deviations from the paper are listed in docs/methods/dq.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense.data.datasets import to_float
from condense.data.layout import InputShape
from condense.data.transform import Transform
from condense.names import spelt
from condense.synthetic.decode import Decode, FromBytes


@dataclass(frozen=True, kw_only=True)
class Patches(Decode):
    """The latents are the most important patches of the images in 8-bit pixels; the others are interpolated.

    Dataset quantization (Zhou et al. 2023, DQ): it is for methods that select real images. A network trained on the
    real images scores the pixels, and the patches with the smallest scores are dropped."""

    name: ClassVar[str] = "patches"
    differentiable: ClassVar[bool] = False
    makes_pixels: ClassVar[bool] = True
    patch: int | None = None
    """Side of a patch in pixels. Default: the largest one of which a whole number fits into both sides, up to a
    fourteenth of the shorter side or 2; that is the published 16 for images of 224 x 224 pixels."""
    drop: float = 0.2
    """Share of the patches that is dropped. The number of those that are kept is rounded down, but at least 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch is not None and self.patch < 1:
            raise ValueError(f"decode.patch must be at least 1, got {self.patch}; the published value is 16")
        if not 0 <= self.drop < 1:
            raise ValueError(f"decode.drop must lie in [0, 1), got {self.drop}; the published value is 0.2")

    def side(self, input_shape: InputShape) -> int:
        """Return the side of a patch for images of this shape, in pixels.

        Raises:
            ValueError: a patch would be larger than an image.
        """
        height, width = input_shape[1:]
        shorter = min(height, width)
        if self.patch is None:
            most = max(2, shorter // 14)
            return max(side for side in range(1, most + 1) if height % side == width % side == 0)
        if self.patch > shorter:
            raise ValueError(
                f"decode.patch is {self.patch}, but the shorter side of an image has {shorter} pixels; give "
                f"{spelt('decode.patch', shorter, 'Patches')} or less"
            )
        return self.patch

    def grid(self, input_shape: InputShape) -> tuple[int, int]:
        """Return the number of rows and of columns of patches; the last ones may be partly outside of the image."""
        side, (height, width) = self.side(input_shape), input_shape[1:]
        return -(-height // side), -(-width // side)

    def kept(self, input_shape: InputShape) -> int:
        """Return the number of patches that are stored of an image of this shape."""
        patches = math.prod(self.grid(input_shape))
        return max(1, math.floor(round(patches * (1 - self.drop), 6)))

    def mask_bytes(self, input_shape: InputShape) -> int:
        """Return the number of bytes that say which patches are stored, a bit for each; 0 if all of them are."""
        patches = math.prod(self.grid(input_shape))
        return 0 if self.kept(input_shape) == patches else -(-patches // 8)

    def latent_shape(self, input_shape: InputShape) -> tuple[int, ...]:
        pixels = self.kept(input_shape) * input_shape[0] * self.side(input_shape) ** 2
        return (self.mask_bytes(input_shape) + pixels,)

    def latents_per_class(self, ipc: int, input_shape: InputShape, num_classes: int) -> int:
        (latent,), image = self.latent_shape(input_shape), math.prod(input_shape)
        if latent > ipc * image:
            enough = spelt("ipc", -(-latent // image))
            raise ValueError(
                f"the {self.kept(input_shape)} patches of an image take {latent} numbers with the bits that say which "
                f"they are, more than the {ipc * image} of {spelt('ipc', ipc)}; give {enough}, or a larger "
                f"{spelt('decode.drop', kind='Patches')}"
            )
        return ipc * image // latent

    def build(self, input_shape: InputShape, num_classes: int) -> nn.Module:
        return _Patched(self, input_shape)

    def fit(self, decoder: nn.Module, transform: Transform) -> None:
        assert isinstance(decoder, _Patched)
        decoder.fit(transform)

    def encode(self, images: Tensor, classes: Tensor, decoder: nn.Module, generator: torch.Generator) -> Tensor:
        """Return latents that keep patches drawn at random; ``encode_by`` keeps the most important ones."""
        drawn = torch.rand(len(images), *images.shape[2:], generator=generator)
        return self.encode_by(drawn.to(images.device), images, decoder)

    def encode_by(self, importance: Tensor, images: Tensor, decoder: nn.Module) -> Tensor:
        """Return the latents (N, L) of images (N, C, H, W). The patches are kept whose pixels have the largest sum of
        ``importance`` (N, H, W); in a tie the first ones, by rows."""
        assert isinstance(decoder, _Patched)
        parts = zip(importance.split(_AT_ONCE), images.split(_AT_ONCE), strict=True)
        return torch.cat([decoder.packed(decoder.rounded(image), scores) for scores, image in parts])

    def check(self, latents: Tensor, decoder: nn.Module) -> None:
        assert isinstance(decoder, _Patched)
        for i, number in enumerate(decoder.bits(latents).sum(1).tolist() if decoder.mask_bytes else []):
            if number != decoder.kept:
                raise ValueError(f"latent {i} marks {number} patches as kept, not {decoder.kept}")


_AT_ONCE = 1000
"""Number of images that are encoded together."""


class _Patched(FromBytes):
    """Decodes latents (N, L) into images (N, C, H, W).

    A latent begins with a bit for each patch, the first one the lowest of its byte, which is 1 if the patch is stored.
    The stored patches (C, side, side) follow, by rows. Pixels outside of the image are 0.
    """

    def __init__(self, decode: Patches, input_shape: InputShape) -> None:
        super().__init__(input_shape)
        self.channels, self.height, self.width = input_shape
        self.side, self.grid = decode.side(input_shape), decode.grid(input_shape)
        self.kept, self.mask_bytes = decode.kept(input_shape), decode.mask_bytes(input_shape)

    def packed(self, pixels: Tensor, importance: Tensor) -> Tensor:
        """Return the latents of pixels (N, C, H, W), uint8; see ``Patches.encode_by``."""
        scores = self.divided(importance[:, None]).sum(2)
        positions = scores.argsort(dim=1, descending=True, stable=True)[:, : self.kept].sort(1).values
        patches = self.divided(pixels)
        stored = patches.gather(1, positions[:, :, None].expand(-1, -1, patches.shape[2])).flatten(1)
        if not self.mask_bytes:
            return stored
        bits = torch.zeros(len(pixels), 8 * self.mask_bytes, dtype=torch.uint8, device=pixels.device)
        bits.scatter_(1, positions, 1)
        return torch.cat([(bits.unflatten(1, (-1, 8)) << _powers(bits)).sum(2, dtype=torch.uint8), stored], 1)

    def divided(self, images: Tensor) -> Tensor:
        """Return the patches (N, P, C * side * side) of images (N, C, H, W); what is outside of the image is 0."""
        (rows, columns), side = self.grid, self.side
        padded = F.pad(images, (0, columns * side - self.width, 0, rows * side - self.height))
        cells = padded.unflatten(3, (columns, side)).unflatten(2, (rows, side))  # (N, C, rows, side, columns, side)
        return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def joined(self, patches: Tensor) -> Tensor:
        """Return the images (N, C, H, W) whose patches are (N, P, C * side * side)."""
        cells = patches.unflatten(2, (-1, self.side, self.side)).unflatten(1, self.grid)
        return cells.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)[..., : self.height, : self.width]

    def bits(self, latents: Tensor) -> Tensor:
        """Return for each patch whether it is stored, (N, P), 0 or 1."""
        bits = (latents[:, : self.mask_bytes, None] >> _powers(latents)) & 1
        return bits.flatten(1)[:, : math.prod(self.grid)]

    def forward(self, latents: Tensor, classes: Tensor) -> Tensor:
        stored = to_float(latents[:, self.mask_bytes :]).unflatten(1, (self.kept, self.channels * self.side**2))
        if not self.mask_bytes:
            return self.transformed(self.joined(stored))
        positions = self.bits(latents).argsort(dim=1, descending=True, stable=True)[:, : self.kept, None]
        index = positions.expand_as(stored)
        patches = stored.new_zeros(len(latents), math.prod(self.grid), stored.shape[2])
        known = patches[..., : self.side**2].scatter(1, positions.expand(-1, -1, self.side**2), 1.0)
        return self.transformed(filled(self.joined(patches.scatter(1, index, stored)), self.joined(known)))


def _powers(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def filled(images: Tensor, known: Tensor) -> Tensor:
    """Return images (N, C, H, W) whose unknown pixels are interpolated from the known ones.

    An unknown pixel has the value of the image of half the size, interpolated bilinearly. A pixel of this one is the
    mean of the known ones among its four, and unknown if there are none, in which case it is filled in the same way.

    Args:
        images: (N, C, H, W); the values of unknown pixels do not matter, if they are finite.
        known: (N, 1, H, W), 1 for known pixels and 0 for others. Each image has a known pixel.
    """
    if max(images.shape[2:]) == 1:
        return images
    total, weight = (F.avg_pool2d(x, 2, ceil_mode=True) for x in (images * known, known))
    half = filled(torch.where(weight > 0, total / weight.clamp(min=1e-6), 0.0), (weight > 0).to(known))
    return torch.where(known > 0, images, F.interpolate(half, size=images.shape[2:], mode="bilinear"))
