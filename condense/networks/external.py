"""Networks that were not written for this package: those of torchvision and timm, by name, and Python callables."""

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
from condense.names import suggest
from condense.networks.base import LayerNorm, Network, too_small

Factory = Callable[[InputShape, int], nn.Module]
"""``factory(input_shape, num_classes)``: a fresh network, samples (N, *input_shape) to logits (N, num_classes)."""


class External(Network):
    """A network taken apart at its last linear layer: ``body``, then ``classifier``.

    Args:
        path: the name of the classifier in the whole network.
        wrapper: what the names of the body begin with and those of the published network do not.
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


def from_callable(name: str, factory: Factory, input_shape: InputShape, num_classes: int) -> Network:
    """A copy of what ``factory`` returns, as a Network.

    Raises:
        ValueError: it is no module, or one that was returned before; it cannot be copied, cannot take such samples, or
            does not end in a linear layer.
    """
    module = factory(input_shape, num_classes)
    if not isinstance(module, nn.Module):
        raise ValueError(f"{name} is no network: it returned {type(module).__name__}; return a torch.nn.Module from it")
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
    return module if isinstance(module, Network) else _take_apart(name, module, input_shape, num_classes)


_returned: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Of callables, what they returned as long as it lives."""


def from_torchvision(name: str, input_shape: InputShape, num_classes: int) -> Network:
    """``torchvision:resnet50``: torchvision's architecture with random weights.

    Gray images are repeated to the three channels that these networks expect.

    Raises:
        ValueError: the network cannot take such images, or does not end in a linear layer.
    """
    from torchvision.models import get_model

    if input_shape[0] not in (1, 3):
        raise ValueError(
            f"{name} cannot take images of {input_shape[0]} channels: torchvision's networks expect 3, "
            "and 1 is repeated; give convnet or another network of this package"
        )
    module = get_model(name.partition(":")[2], weights=None, num_classes=num_classes)
    if input_shape[0] == 1:
        return _take_apart(name, nn.Sequential(_GrayToColour(), module), input_shape, num_classes, wrapper="1.")
    return _take_apart(name, module, input_shape, num_classes)


def require_torchvision(name: str) -> None:
    """Raise ValueError unless torchvision has a classification network of this name."""
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(f"unknown network 'torchvision:{name}': no such classifier; {suggest(name, known)}")


def from_timm(name: str, input_shape: InputShape, num_classes: int) -> Network:
    """``timm:resnet10t``: timm's architecture with random weights, made for images of this size where it asks for one.

    Raises:
        ValueError: timm is not installed, or the network cannot take such images or does not end in a linear layer.
    """
    architecture = name.partition(":")[2]
    channels, *size = input_shape
    create = functools.partial(
        _timm(architecture).create_model, architecture, pretrained=False, num_classes=num_classes, in_chans=channels
    )
    try:
        try:
            module = create(img_size=tuple(size))
        except TypeError:
            module = create()
    except Exception as error:
        raise _refused(name, input_shape, error) from error
    return _take_apart(name, module, input_shape, num_classes)


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
    build: Callable[[str, InputShape, int], Network]
    """From ``library:name``."""


LIBRARIES = {
    "torchvision": Library(require_torchvision, from_torchvision),
    "timm": Library(require_timm, from_timm),
}


def _take_apart(name: str, module: nn.Module, input_shape: InputShape, num_classes: int, wrapper: str = "") -> Network:
    """Try the module on two samples in training mode, see which linear layer runs last, and split it off."""
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
    made = [key for key, _ in module.named_buffers() if key not in buffers]
    if made:
        raise ValueError(
            f"{name} makes its buffer {made[0]} in the first forward pass: its output would depend on what it saw "
            "before; register the buffer with a tensor"
        )
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
    return External(module, classifier, path, wrapper)


def _refused(name: str, input_shape: InputShape, error: Exception) -> ValueError:
    return too_small(name, input_shape, _first_line(error), "use other data or another network")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


class _Hardsigmoid(nn.Module):
    """``nn.Hardsigmoid``, which has no second derivative in torch, as ``relu6(x + 3) / 6``."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x + 3) / 6


class _GrayToColour(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.expand(-1, 3, -1, -1)
