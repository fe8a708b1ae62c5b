"""CLIP models of the package open_clip: their image encoders as networks, and embeddings of texts.

A network ``open_clip:MODEL`` has random weights, as every network. ``pretrained`` reads those of ``MODEL/WEIGHTS``,
which open_clip downloads where its own cache does not have them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense.data.layout import InputShape
from condense.files import checksum
from condense.names import installing, reason, suggest
from condense.networks.base import Network

PREFIX = "open_clip:"
"""What the names of these networks and encoders begin with."""

_TEXTS = 256
"""Texts that are embedded at once."""


class ClipEncoder(Network):
    """The image encoder of a CLIP model, followed by a linear layer.

    Grey images are repeated to three channels, and images of any size are resized to that of the model.

    Args:
        model: the CLIP model; only its image encoder ``visual`` becomes part of the network.
        num_outputs: the number of outputs.

    Raises:
        ValueError: the image encoder does not return one vector for each image.
    """

    scale: Tensor
    """(3, 1, 1): with ``shift``, the affine map from the space of the images to the one that the encoder was trained
    in. It is the identity for random weights."""
    shift: Tensor
    """(3, 1, 1)"""

    def __init__(self, model: Any, num_outputs: int) -> None:
        super().__init__()
        self.visual: nn.Module = model.visual.requires_grad_(True)
        size = model.visual.image_size
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        with torch.no_grad():
            x = torch.linspace(-1, 1, 6 * self.size[0] * self.size[1], device="cpu").view(2, 3, *self.size)
            expected, features = model.eval().encode_image(x), self.visual(x)
        if not isinstance(features, Tensor) or features.dim() != 2 or not torch.equal(features, expected):
            raise ValueError(
                f"the image encoder of {type(model).__name__} does not return one vector for each image; give another "
                "model of open_clip, such as open_clip:ViT-B-32"
            )
        self.classifier = nn.Linear(features.shape[1], num_outputs)
        self.register_buffer("scale", torch.ones(3, 1, 1))
        self.register_buffer("shift", torch.zeros(3, 1, 1))

    def embed(self, x: Tensor) -> Tensor:
        x = x.expand(-1, 3, -1, -1)
        if x.shape[2:] != self.size:
            x = F.interpolate(x, self.size, mode="bicubic", antialias=True)
        features: Tensor = self.visual(x * self.scale + self.shift)
        return features


class Pretrained(NamedTuple):
    """A CLIP model with trained weights."""

    network: str
    """The name of the image encoder as a network."""
    weights: dict[str, Tensor]
    """The parameters and buffers of ``ClipEncoder.visual``, by their names in ``ClipEncoder``."""
    mean: Tensor
    """(3, 1, 1): the mean of the pixels in [0, 1] by which images are standardised for the model."""
    std: Tensor
    """(3, 1, 1)"""
    digest: str
    """A checksum of all weights, those of the text encoder included."""
    texts: Callable[[Sequence[str]], Tensor]
    """The embeddings (n, F) of n texts, on the CPU."""


def from_open_clip(name: str, input_shape: InputShape, num_outputs: int) -> Network:
    """Return the image encoder of open_clip's model of this name, such as ``open_clip:ViT-B-32``, with random weights.

    Raises:
        ValueError: open_clip is not installed, or images have other than 1 or 3 channels.
    """
    if input_shape[0] not in (1, 3):
        raise ValueError(
            f"{name} cannot take images of {input_shape[0]} channels: models of open_clip take 3, or 1, which is "
            "repeated; give convnet or another network of this package"
        )
    model, _ = _created(name.removeprefix(PREFIX))
    return ClipEncoder(model, num_outputs)


def require_open_clip(name: str) -> None:
    """Raise ValueError unless open_clip is installed and has a model of this name."""
    known = _open_clip(name).list_models()
    if name not in known:
        guess = suggest(name, known, "open_clip.list_models()")
        raise ValueError(f"unknown network '{PREFIX}{name}': no such model; {guess}")


def pretrained(name: str) -> Pretrained:
    """Read a model with the weights that open_clip publishes for it.

    Weights of other files are not taken, so that a name in the file of a set cannot make this read one.

    Args:
        name: ``open_clip:MODEL/WEIGHTS``, such as ``open_clip:ViT-B-32/laion2b_s34b_b79k``.

    Raises:
        ValueError: open_clip is not installed, knows no such model or weights, or cannot read them.
    """
    architecture, _, tag = name.removeprefix(PREFIX).partition("/")
    require_open_clip(architecture)
    open_clip = _open_clip(architecture)
    known = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in known:
        given = f"no weights {tag!r} of" if tag else "no weights are named for"
        raise ValueError(
            f"{given} '{PREFIX}{architecture}': give {PREFIX}{architecture}/WEIGHTS; {suggest(tag, known)}"
        )
    model, preprocess = _created(architecture, tag)
    standardise = next(part for part in preprocess.transforms if hasattr(part, "std"))
    mean, std = (torch.tensor(list(values)).view(3, 1, 1) for values in (standardise.mean, standardise.std))
    weights = {**dict(model.visual.named_parameters()), **dict(model.visual.named_buffers())}
    tokenise = open_clip.get_tokenizer(architecture)

    @torch.no_grad()
    def texts(given: Sequence[str]) -> Tensor:
        parts = [list(given[i : i + _TEXTS]) for i in range(0, len(given), _TEXTS)]
        return torch.cat([model.encode_text(tokenise(part)).float() for part in parts])

    return Pretrained(
        f"{PREFIX}{architecture}",
        {f"visual.{key}": value.detach() for key, value in weights.items()},
        mean,
        std,
        checksum(dict(model.state_dict())),
        texts,
    )


def _created(architecture: str, tag: str | None = None) -> tuple[Any, Any]:
    """Return a model in evaluation mode, on the CPU, and the preprocessing of its test images."""
    open_clip = _open_clip(architecture)
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(architecture, pretrained=tag)
    except Exception as error:
        name = architecture if tag is None else f"{architecture}/{tag}"
        raise ValueError(
            f"open_clip cannot make '{PREFIX}{name}': {reason(error)}; give another model, or connect to the network "
            "if its weights have to be downloaded"
        ) from error
    return model.eval(), preprocess


def _open_clip(name: str) -> ModuleType:
    try:
        import open_clip
    except ImportError as error:
        raise ValueError(
            f"network '{PREFIX}{name}' cannot be built: open_clip is not installed; run: {installing('clip')}"
        ) from error
    module: ModuleType = open_clip
    return module
