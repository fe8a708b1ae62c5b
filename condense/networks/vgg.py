"""VGG11 for small images."""

from __future__ import annotations

from torch import Tensor, nn

from condense.data.layout import InputShape
from condense.networks.base import Conv2d, Network, Norm, extra_padding, make_norm, too_small

# Simonyan and Zisserman (2015), table 1, column A: output channels of the convolutions between poolings.
STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))


class VGG11(Network):
    """Eight 3x3 convolutions with norm and ReLU in five pooled stages, then one linear layer.

    Raises:
        ValueError: the images are smaller than 32x32, except grey 28x28 images, which are padded.
    """

    def __init__(
        self,
        input_shape: InputShape,
        num_outputs: int,
        *,
        norm: Norm = "instance",
    ) -> None:
        super().__init__()
        extra = extra_padding(input_shape)
        channels, *sides = input_shape
        height, width = ((side + 2 * extra) // 32 for side in sides)
        if min(height, width) < 1:
            raise too_small(
                "vgg11",
                input_shape,
                "its five poolings need 32x32",
                "use larger images, or convnet or alexnet",
            )
        layers: list[nn.Module] = []
        for stage in STAGES:
            for outputs in stage:
                padding = 1 if layers else 1 + extra
                layers += [Conv2d(channels, outputs, 3, padding=padding)]
                layers += [make_norm(norm, outputs), nn.ReLU()]
                channels = outputs
            layers += [nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * height * width, num_outputs)

    def embed(self, x: Tensor) -> Tensor:
        maps: Tensor = self.features(x)
        return maps.flatten(1)
