"""Parameterisations: how stored latents become images. A value of the recipe that composes with any method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ImageShape = tuple[int, int, int]
"""(channels, height, width)"""


@dataclass(frozen=True, kw_only=True)
class Decode(ABC):
    """How many images a latent holds, how images are stored and how they are read back."""

    name: ClassVar[str]
    stores_pixels: ClassVar[bool] = False
    """An entry of a latent is a pixel value of an image."""

    @property
    def expansion(self) -> int:
        """Images decoded from one latent."""
        return 1

    def latents_per_class(self, ipc: int, image_shape: ImageShape, num_classes: int) -> int:
        """Latents of a class that the floats of ``ipc`` images buy.

        Raises:
            ValueError: they buy none.
        """
        return ipc

    @abstractmethod
    def build(self, image_shape: ImageShape, num_classes: int) -> nn.Module:
        """The decoder: ``decoder(latents (N, ...), classes (N,)) -> images (expansion * N, C, H, W)``, copy-major:
        image ``k * N + i`` is copy k of latent i.

        What it learns are parameters, what it has to remember buffers; their shapes follow from the arguments and
        the fields, so that a file can be read back."""

    @abstractmethod
    def encode(self, images: Tensor, classes: Tensor, decoder: nn.Module, generator: torch.Generator) -> Tensor:
        """Initial latents (N, ...) that ``decoder`` turns into something like ``images``; what of the decoder
        depends on these, or is random, is set in place.

        Args:
            images: (expansion * N, C, H, W), copy-major.
            classes: of the latents, (N,).
            decoder: as ``build`` made it.
            generator: on the CPU.
        """


@dataclass(frozen=True, kw_only=True)
class Pixels(Decode):
    """The latents are the images."""

    name: ClassVar[str] = "pixels"
    stores_pixels: ClassVar[bool] = True

    def build(self, image_shape: ImageShape, num_classes: int) -> nn.Module:
        return _AsTheyAre()

    def encode(self, images: Tensor, classes: Tensor, decoder: nn.Module, generator: torch.Generator) -> Tensor:
        return images.clone()


class _AsTheyAre(nn.Module):
    def forward(self, latents: Tensor, classes: Tensor) -> Tensor:
        return latents


@dataclass(frozen=True, kw_only=True)
class Factor(Decode):
    """Uniform multi-formation (Kim et al. 2022, IDC): a stored image holds factor x factor smaller ones, each
    upsampled to full size. Deviation: sizes that do not divide are padded with 0 in the transformed space
    (the data mean) instead of grey 0.5 in pixel space."""

    name: ClassVar[str] = "factor"
    stores_pixels: ClassVar[bool] = True
    factor: int = 2
    """Images along each side of a stored image."""

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"decode.factor must be at least 1, got {self.factor}; the published value is 2")

    @property
    def expansion(self) -> int:
        return self.factor**2

    def encode(self, images: Tensor, classes: Tensor, decoder: nn.Module, generator: torch.Generator) -> Tensor:
        f, (h, w) = self.factor, images.shape[-2:]
        small = F.interpolate(images, size=(-(-h // f), -(-w // f)), mode="nearest")
        grid = small.unflatten(0, (f, f, -1))  # (row, column, N, C, h, w)
        rows = torch.cat(list(torch.cat(list(grid.unbind(1)), dim=-1).unbind(0)), dim=-2)
        return rows[..., :h, :w].contiguous()

    def build(self, image_shape: ImageShape, num_classes: int) -> nn.Module:
        return _Crops(self.factor, image_shape[-2:])


class _Crops(nn.Module):
    def __init__(self, factor: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.factor, self.size = factor, size

    def forward(self, latents: Tensor, classes: Tensor) -> Tensor:
        f, (h, w) = self.factor, self.size
        ch, cw = -(-h // f), -(-w // f)
        padded = F.pad(latents, (0, cw * f - w, 0, ch * f - h))
        crops = padded.unflatten(-2, (f, ch)).unflatten(-1, (f, cw)).permute(2, 4, 0, 1, 3, 5)
        return F.interpolate(crops.flatten(0, 2), size=(h, w), mode="bilinear", align_corners=False)


DECODERS: dict[str, type[Decode]] = {d.name: d for d in (Pixels, Factor)}
