"""Networks that were not written for this package: those of torchvision and timm, by name, and Python callables."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from condense.names import suggest
from condense.networks.base import ImageShape, Network, too_small

Factory = Callable[[ImageShape, int], nn.Module]
"""``factory(image_shape, num_classes)``: a fresh network, images (N, C, H, W) to logits (N, num_classes)."""


class Foreign(Network):
    """A network taken apart at its last linear layer: ``body``, then ``classifier``."""

    def __init__(self, body: nn.Module, classifier: nn.Linear) -> None:
        super().__init__()
        self.body = body
        self.classifier = classifier

    def embed(self, x: Tensor) -> Tensor:
        features: Tensor = self.body(x)
        return features


def from_callable(name: str, factory: Factory, image_shape: ImageShape, num_classes: int) -> Network:
    """What ``factory`` returns, as a Network; where it is one already, as it is.

    Raises:
        ValueError: it is no module, cannot take such images, or does not end in a linear layer.
    """
    module = factory(image_shape, num_classes)
    if isinstance(module, Network):
        return module
    if not isinstance(module, nn.Module):
        raise ValueError(f"{name} is no network: it returned {type(module).__name__}; return a torch.nn.Module from it")
    return _take_apart(name, module, image_shape, num_classes)


def from_torchvision(name: str, image_shape: ImageShape, num_classes: int) -> Network:
    """``torchvision:resnet50``: torchvision's architecture with random weights.

    Gray images are repeated to the three channels that these networks expect.

    Raises:
        ValueError: the network cannot take such images, or does not end in a linear layer.
    """
    from torchvision.models import get_model

    if image_shape[0] not in (1, 3):
        raise ValueError(
            f"{name} cannot take images of {image_shape[0]} channels: torchvision's networks expect 3, "
            "and 1 is repeated; give convnet or another network of this package"
        )
    module = get_model(name.partition(":")[2], weights=None, num_classes=num_classes)
    if image_shape[0] == 1:
        module = nn.Sequential(_GrayToColour(), module)
    return _take_apart(name, module, image_shape, num_classes)


def require_torchvision(name: str) -> None:
    """Raise ValueError unless torchvision has a classification network of this name."""
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(f"unknown network 'torchvision:{name}': no such classifier; {suggest(name, known)}")


def from_timm(name: str, image_shape: ImageShape, num_classes: int) -> Network:
    """``timm:resnet10t``: timm's architecture with random weights, made for images of this size where it asks for one.

    Attention is not fused: the fused one has no second derivative.

    Raises:
        ValueError: timm is not installed, or the network cannot take such images or does not end in a linear layer.
    """
    architecture = name.partition(":")[2]
    channels, *size = image_shape
    create = functools.partial(
        _timm(architecture).create_model, architecture, pretrained=False, num_classes=num_classes, in_chans=channels
    )
    try:
        try:
            module = create(img_size=tuple(size))
        except TypeError:
            module = create()
    except Exception as error:
        raise _refused(name, image_shape, error) from error
    for part in module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    return _take_apart(name, module, image_shape, num_classes)


def require_timm(name: str) -> None:
    """Raise ValueError unless timm is installed and has a network of this name, with or without a tag of weights."""
    timm = _timm(name)
    known = timm.list_models()
    if name not in known and name not in timm.list_models(pretrained=True):
        guess = suggest(name, known, "timm.list_models()")
        raise ValueError(f"unknown network 'timm:{name}': no such architecture; {guess}")


def _timm(name: str) -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f"network 'timm:{name}' cannot be built: timm is not installed; run: pip install 'condense-dd[timm]'"
        ) from error
    return timm


class Library(NamedTuple):
    """A package whose networks are known as ``library:name``."""

    require: Callable[[str], None]
    """Raises ValueError for a name that it does not have."""
    build: Callable[[str, ImageShape, int], Network]
    """From ``library:name``."""


LIBRARIES = {
    "torchvision": Library(require_torchvision, from_torchvision),
    "timm": Library(require_timm, from_timm),
}


def _take_apart(name: str, module: nn.Module, image_shape: ImageShape, num_classes: int) -> Network:
    """Try the module on two images in training mode, see which linear layer runs last, and split it off."""
    calls: list[tuple[str, nn.Linear, Tensor]] = []
    hooks = [
        part.register_forward_hook(lambda part, _, output, path=path: calls.append((path, part, output)))
        for path, part in module.named_modules()
        if isinstance(part, nn.Linear)
    ]
    buffers = {key: buffer.clone() for key, buffer in module.named_buffers()}
    x = torch.linspace(-1, 1, 2 * math.prod(image_shape)).reshape(2, *image_shape)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            logits = functional_call(module.train(), buffers, (x,))
    except Exception as error:
        raise _refused(name, image_shape, error) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{name} does not return logits: two images gave {got} in training mode, not {(2, num_classes)}; "
            "wrap it in a callable that returns a module whose output has this shape"
        )
    if not calls or not torch.equal(calls[-1][2], logits):
        raise ValueError(
            f"{name} does not end in a linear layer: its features cannot be told from its classifier; "
            "give a callable that returns a condense.networks.Network, which names both"
        )
    path, classifier, _ = calls[-1]
    module.set_submodule(path, nn.Identity())
    return Foreign(module, classifier)


def _refused(name: str, image_shape: ImageShape, error: Exception) -> ValueError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return too_small(name, image_shape, reason, "use other images or another network")


class _GrayToColour(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.expand(-1, 3, -1, -1)
