"""A small vision transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from condense.data.layout import InputShape
from condense.networks.base import LayerNorm, Network


class ViT(Network):
    """Pre-norm transformer encoder over about 8x8 patches, whose mean token is the input of the classifier.

    Dosovitskiy et al. (2021), without class token and dropout. The side of a patch is an eighth of the shorter side of
    the image, and at least 2 pixels. Images that are not a multiple of it are padded with zeros.

    Raises:
        ValueError: the width is not divisible by the number of heads.
    """

    def __init__(
        self, input_shape: InputShape, num_outputs: int, *, depth: int = 6, width: int = 192, heads: int = 3
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(
                f"vit:heads={heads} cannot take width={width}: it must be divisible by the number of heads; "
                f"give width={width + -width % heads}"
            )
        channels, *sides = input_shape
        patch = max(2, round(min(sides) / 8))
        rows, columns = (-(-side // patch) for side in sides)
        top, left = ((-side % patch + 1) // 2 for side in sides)
        self.patches = nn.Conv2d(channels, width, patch, patch, padding=(top, left))
        self.position = nn.Parameter(torch.empty(rows * columns, width))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm = LayerNorm(width)
        self.classifier = nn.Linear(width, num_outputs)

    def embed(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        mean: Tensor = self.norm(self.blocks(tokens)).mean(1)
        return mean


class _Block(nn.Module):
    """Attention and an MLP with a hidden layer of four times the width, both residual, on tokens (N, T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(LayerNorm(width), _Attention(width, heads))
        self.hidden = nn.Sequential(
            LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        mixed: Tensor = x + self.hidden(x)
        return mixed


class _Attention(nn.Module):
    """Multi-head self-attention in basic operations, since fused kernels have no second derivative."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inputs = nn.Linear(width, 3 * width)
        self.outputs = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.inputs(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(2, 3) / query.shape[3] ** 0.5).softmax(3)
        mixed: Tensor = self.outputs((weights @ value).transpose(1, 2).flatten(2))
        return mixed
