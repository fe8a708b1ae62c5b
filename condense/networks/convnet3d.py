"""ConvNet3D, the network on which videos are distilled."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from condense.data.layout import InputShape, Kind
from condense.networks.base import Network, Norm, make_norm, make_pooling, too_small
from condense.networks.convnet import Activation, make_activation

KERNEL, STRIDE, PADDING = (3, 7, 7), (1, 2, 2), (1, 3, 3)
"""Of every convolution: frames, rows, columns."""


class ConvNet3d(Network):
    """Blocks of 3x7x7 convolution, activation and pooling for clips, then the maximum over time and a linear layer.

    The small C3D of Wang et al. (2024, "Dancing with Still Images: Video Distillation via Static-Dynamic
    Disentanglement"): convolutions move by two pixels and by one frame, the first pooling halves rows and columns and
    those after it frames as well. The first block has ``width`` channels and the others have twice as many. In training
    mode half of the features, drawn at random, are hidden from the linear layer unless ``dropout=false``.

    Where the last maps have more than one pixel they are averaged over rows and columns. The maximum over time is that
    of the features; in the published network it is that of the class scores, which leaves no features in front of a
    linear layer.

    Raises:
        ValueError: the poolings leave no pixel or no frame.
    """

    takes: ClassVar[tuple[Kind, ...]] = ("clips",)

    def __init__(
        self,
        input_shape: InputShape,
        num_classes: int,
        *,
        depth: int = 3,
        width: int = 64,
        activation: Activation = "relu",
        norm: Norm = "none",
        pooling: Literal["max", "avg"] = "max",
        dropout: bool = True,
    ) -> None:
        super().__init__()
        fitting = _fitting(input_shape, depth)
        if depth > fitting:
            raise too_small(
                f"convnet3d:depth={depth}",
                input_shape,
                "each block divides rows and columns by four, each but the first halves the frames, and nothing would "
                "be left",
                f"give depth={fitting}" if fitting else "use larger clips, or mlp",
            )
        channels = input_shape[1]
        layers: list[nn.Module] = []
        for block in range(depth):
            outputs = 2 * width if block else width
            layers += [nn.Conv3d(channels, outputs, KERNEL, STRIDE, PADDING), make_norm(norm, outputs, axes=3)]
            layers += [make_activation(activation), make_pooling(pooling, (2 if block else 1, 2, 2), axes=3)]
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(0.5 if dropout else 0.0)
        self.classifier = nn.Linear(channels, num_classes)

    def embed(self, x: Tensor) -> Tensor:
        maps: Tensor = self.features(x.transpose(1, 2))
        return maps.mean((3, 4)).amax(2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.dropout(self.embed(x)))
        return logits


def _fitting(input_shape: InputShape, most: int) -> int:
    """How many blocks, ``most`` at the most, leave a pixel and a frame of such clips."""
    frames, _, *sides = input_shape
    for block in range(most):
        frames, sides = frames // (2 if block else 1), [(side + 1) // 2 // 2 for side in sides]
        if min(frames, *sides) < 1:
            return block
    return most
