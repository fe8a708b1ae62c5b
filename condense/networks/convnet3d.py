"""ConvNet3D, a network for clips."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from condense.data.layout import InputShape, Kind
from condense.networks.base import Network, Norm, make_norm, make_pooling, too_small
from condense.networks.convnet import Activation, make_activation

KERNEL, STRIDE, PADDING = (3, 7, 7), (1, 2, 2), (1, 3, 3)
"""The parameters of every convolution along frames, rows and columns."""


class ConvNet3d(Network):
    """Blocks of 3x7x7 convolution, activation and pooling for clips, then the maximum over time and a linear layer.

    The small C3D of Wang et al. (2024, "Dancing with Still Images: Video Distillation via Static-Dynamic
    Disentanglement"): convolutions have a stride of two pixels and one frame. The first pooling halves rows and
    columns, and later ones also halve the frames. The first block has ``width`` channels and the others have twice as
    many. Dropout of 0.5 precedes the linear layer unless ``dropout=false``.

    Maps with more than one pixel are averaged over rows and columns. The maximum over time is taken over the features.
    The published network takes it over the class scores and so has no features before a final linear layer.

    Raises:
        ValueError: the poolings leave no pixel or no frame.
    """

    takes: ClassVar[tuple[Kind, ...]] = ("clips",)

    def __init__(
        self,
        input_shape: InputShape,
        num_outputs: int,
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
                "each block divides rows and columns by four, all but the first also halve the frames, and nothing "
                "would be left",
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
        self.classifier = nn.Linear(channels, num_outputs)

    def embed(self, x: Tensor) -> Tensor:
        maps: Tensor = self.features(x.transpose(1, 2))
        return maps.mean((3, 4)).amax(2)

    def classify(self, features: Tensor) -> Tensor:
        return super().classify(self.dropout(features))


def _fitting(input_shape: InputShape, maximum: int) -> int:
    """Return the number of blocks, up to ``maximum``, that leave at least one pixel and one frame."""
    frames, _, *sides = input_shape
    for block in range(maximum):
        frames, sides = frames // (2 if block else 1), [(side + 1) // 2 // 2 for side in sides]
        if min(frames, *sides) < 1:
            return block
    return maximum
