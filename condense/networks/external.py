"""Networks from outside this package: those of torchvision, timm and open_clip, by name, and Python callables."""

from __future__ import annotations

import copy
import functools
import math
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from condense.data.layout import InputShape
from condense.names import installing, suggest
from condense.networks.base import LayerNorm, Network, too_small
from condense.networks.clip import from_open_clip, require_open_clip

Factory = Callable[[InputShape, int], nn.Module]
"""``factory(input_shape, num_outputs)`` returns a new network, samples (N, *input_shape) to logits (N, num_outputs)."""


class External(Network):
    """A network split at its last linear layer into ``body`` and ``classifier``.

    Args:
        path: the name of the classifier in the whole network.
        wrapper: a prefix of the names in the body that the published network does not have.
    """

    def __init__(self, body: nn.Module, classifier: nn.Linear, path: str, wrapper: str = "") -> None:
        super().__init__()
        self.body = body
        self.classifier = classifier
        self.path, self.wrapper = path, wrapper

    def embed(self, x: Tensor) -> Tensor:
        features: Tensor = self.body(x)
        return features

    def published_name(self, name: str) -> str:
        part, _, rest = name.partition(".")
        return (f"{self.path}.{rest}" if part == "classifier" else rest).removeprefix(self.wrapper)


def from_callable(name: str, factory: Factory, input_shape: InputShape, num_outputs: int) -> Network:
    """Return a copy of the module that ``factory`` returns, as a Network.

    Raises:
        ValueError: the factory does not return a module, or returned the same one before; the module cannot be copied,
            cannot take such samples, or does not end in a linear layer.
    """
    module = factory(input_shape, num_outputs)
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"{name} is not a network factory: it returned {type(module).__name__}; return a torch.nn.Module from it"
        )
    if module in _returned:
        raise ValueError(
            f"{name} returned the same module a second time: experiments need fresh networks; build the module inside "
            "the callable, or return copy.deepcopy(module) where every network is to start from the same weights"
        )
    _returned.add(module)
    try:
        module = copy.deepcopy(module)
    except Exception as error:
        raise ValueError(
            f"{name} returned a {type(module).__name__} that cannot be copied: {_first_line(error)}; return a module "
            "that copy.deepcopy takes"
        ) from error
    return module if isinstance(module, Network) else _split(name, module, input_shape, num_outputs)


_returned: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The modules that factories returned and that still exist."""


def from_torchvision(name: str, input_shape: InputShape, num_outputs: int) -> Network:
    """Return torchvision's architecture of this name, such as ``torchvision:resnet50``, with random weights.

    Grey images are repeated to the three channels that these networks expect.

    Raises:
        ValueError: the network cannot take such images, or does not end in a linear layer.
    """
    from torchvision.models import get_model

    if input_shape[0] not in (1, 3):
        raise ValueError(
            f"{name} cannot take images of {input_shape[0]} channels: networks of torchvision take 3, "
            "or 1, which is repeated; give convnet or another network of this package"
        )
    module = get_model(name.partition(":")[2], weights=None, num_classes=num_outputs)
    if input_shape[0] == 1:
        return _split(name, nn.Sequential(_GreyToColour(), module), input_shape, num_outputs, wrapper="1.")
    return _split(name, module, input_shape, num_outputs)


def require_torchvision(name: str) -> None:
    """Raise ValueError unless torchvision has a classification network of this name."""
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(f"unknown network 'torchvision:{name}': no such classifier; {suggest(name, known)}")


def from_timm(name: str, input_shape: InputShape, num_outputs: int) -> Network:
    """Return timm's architecture of this name, such as ``timm:resnet10t``, with random weights.

    If the architecture needs an image size, it is built for that of ``input_shape``.

    Raises:
        ValueError: timm is not installed, or the network cannot take such images or does not end in a linear layer.
    """
    architecture = name.partition(":")[2]
    channels, *size = input_shape
    create = functools.partial(
        _timm(architecture).create_model, architecture, pretrained=False, num_classes=num_outputs, in_chans=channels
    )
    try:
        try:
            module = create(img_size=tuple(size))
        except TypeError:
            module = create()
    except Exception as error:
        raise _refused(name, input_shape, error) from error
    return _split(name, module, input_shape, num_outputs)


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
            f"network 'timm:{name}' cannot be built: timm is not installed; run: {installing('timm')}"
        ) from error
    return timm


class Library(NamedTuple):
    """A package whose networks have names of the form ``library:name``."""

    require: Callable[[str], None]
    """Raises ValueError if the package has no network of the name that follows the colon."""
    build: Callable[[str, InputShape, int], Network]
    """Builds the network ``library:name``."""


LIBRARIES = {
    "torchvision": Library(require_torchvision, from_torchvision),
    "timm": Library(require_timm, from_timm),
    "open_clip": Library(require_open_clip, from_open_clip),
}


def _split(name: str, module: nn.Module, input_shape: InputShape, num_outputs: int, wrapper: str = "") -> Network:
    """Run the module on two samples in training mode to find its last linear layer, and split it off."""
    for path, part in list(module.named_modules()):
        if path and isinstance(part, nn.Hardsigmoid):
            module.set_submodule(path, _Hardsigmoid())
        if type(part) is nn.LayerNorm:
            part.__class__ = LayerNorm
    calls: list[tuple[str, nn.Linear, Tensor]] = []
    hooks = [
        part.register_forward_hook(lambda part, _, output, path=path: calls.append((path, part, output)))
        for path, part in module.named_modules()
        if isinstance(part, nn.Linear)
    ]
    x = torch.linspace(-1, 1, 2 * math.prod(input_shape)).reshape(2, *input_shape)
    try:
        buffers = {key: buffer.clone() for key, buffer in module.named_buffers()}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            logits = functional_call(module.train(), buffers, (x,))
    except Exception as error:
        raise _refused(name, input_shape, error) from error
    finally:
        for hook in hooks:
            hook.remove()
    created = [key for key, _ in module.named_buffers() if key not in buffers]
    if created:
        raise ValueError(
            f"{name} creates its buffer {created[0]} in the first forward pass: its output would depend on earlier "
            "inputs; register the buffer with a tensor"
        )
    if not isinstance(logits, Tensor) or logits.shape != (2, num_outputs):
        actual = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{name} does not return logits: two images gave {actual} in training mode, not {(2, num_outputs)}; "
            "wrap it in a callable that returns a module whose output has this shape"
        )
    if not calls or not torch.equal(calls[-1][2], logits):
        raise ValueError(
            f"{name} does not end in a linear layer: its features and classifier cannot be separated; "
            "give a callable that returns a condense.networks.Network, which defines both"
        )
    path, classifier, _ = calls[-1]
    module.set_submodule(path, nn.Identity())
    return External(module, classifier, path, wrapper)


def _refused(name: str, input_shape: InputShape, error: Exception) -> ValueError:
    return too_small(name, input_shape, _first_line(error), "use other data or another network")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


class _Hardsigmoid(nn.Module):
    """``nn.Hardsigmoid`` as ``relu6(x + 3) / 6``, since torch's version has no second derivative."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x + 3) / 6


class _GreyToColour(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.expand(-1, 3, -1, -1)
