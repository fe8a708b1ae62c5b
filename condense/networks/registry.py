"""Build networks by name, such as ``convnet:depth=4,norm=batch``."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args, get_origin, get_type_hints

import torch
from torch import nn

from condense.data.layout import InputShape, Kind, kind, require_kind
from condense.names import spelt
from condense.networks.alexnet import AlexNet
from condense.networks.base import Network
from condense.networks.convnet import ConvNet, ConvNet1d
from condense.networks.convnet3d import ConvNet3d
from condense.networks.external import LIBRARIES, Factory, from_callable
from condense.networks.gnn import GAT, GCN, GIN
from condense.networks.lenet import LeNet
from condense.networks.mlp import MLP
from condense.networks.resnet import ResNet18
from condense.networks.vgg import VGG11
from condense.networks.vit import ViT
from condense.plugins import Registry, subclass_of

Value = bool | int | str

MAX_OPTION = 10_000
"""The maximum width, depth or number of heads in the name of a network."""
MAX_PARAMS = 10**9
"""The maximum number of parameters of a network of this package; one copy takes 4 GB in float32."""

NETWORKS: Registry[type[Network]] = Registry(
    "network",
    "condense.networks",
    {
        "alexnet": AlexNet,
        "convnet": ConvNet,
        "convnet1d": ConvNet1d,
        "convnet3d": ConvNet3d,
        "gat": GAT,
        "gcn": GCN,
        "gin": GIN,
        "lenet": LeNet,
        "mlp": MLP,
        "resnet18": ResNet18,
        "vgg11": VGG11,
        "vit": ViT,
    },
    subclass_of(Network),
)

AUTO = "auto"
"""The name that ``resolve`` replaces by the default network for the data."""

_DEFAULTS: dict[Kind, str] = {"graphs": "gin", "series": "convnet1d", "images": "convnet", "clips": "convnet3d"}


@dataclass(frozen=True)
class NetworkSpec:
    """A named network and the options that differ from its defaults, as returned by ``parse``."""

    name: str
    options: Mapping[str, Value] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        """Return the canonical spelling, with sorted options and without defaults."""
        options = ",".join(f"{key}={_spell(value)}" for key, value in sorted(self.options.items()))
        return f"{self.name}:{options}" if options else self.name


def names() -> list[str]:
    """Return the names of the networks of this package and of installed plugins.

    ``torchvision:NAME``, ``timm:NAME``, ``open_clip:NAME`` and callables are accepted too.
    """
    return list(NETWORKS)


def describe(name: str) -> str:
    """Return one line that describes the network and lists its options with their values, the default first."""
    summary = (inspect.getdoc(NETWORKS[name]) or "").partition("\n")[0]
    options = " ".join(f"{key}={option.values}" for key, option in _options(name).items())
    return f"{summary} [{options}]" if options else summary


def default_for(input_shape: InputShape) -> str:
    """Return the default network for samples of this shape: gin, convnet1d, convnet or convnet3d.

    Raises:
        ValueError: the shape does not have one to four axes.
    """
    return _DEFAULTS[kind(input_shape)]


def resolve(spec: str | NetworkSpec, input_shape: InputShape, field: str = "network") -> NetworkSpec:
    """Return the network that ``spec`` names for samples of this shape.

    ``auto`` stands for the name of the default network and may have options: ``auto:width=32``.
    The error names ``field``.

    Raises:
        ValueError: ``parse`` refuses the spec, or the network takes samples of another kind.
    """
    spec = parse(spec)
    name, _, options = spec.name.partition(":")
    if name == AUTO:
        spec = parse(f"{default_for(input_shape)}:{options}")
    takes, given = NETWORKS[spec.name].takes if spec.name in NETWORKS else Network.takes, kind(input_shape)
    if given not in takes:
        fitting = ", ".join(name for name, network in NETWORKS.usable().items() if given in network.takes)
        remedy = f"give {spelt(field, default_for(input_shape))}; networks for {given} are {fitting}"
        require_kind(f"network {spec.name}", takes, input_shape, remedy)
    return spec


def parse(spec: str | NetworkSpec) -> NetworkSpec:
    """Parse ``name``, ``name:option=value,option=value`` or, for example, ``timm:name``.

    ``auto`` is left to ``resolve``; its options must be those of a default network.

    Raises:
        ValueError: a name, an option or the value of an option is unknown.
    """
    if isinstance(spec, NetworkSpec):
        return spec
    name, _, rest = spec.strip().partition(":")
    if name == AUTO:
        _require_auto_options(rest)
        return NetworkSpec(spec.strip())
    if name in LIBRARIES:
        LIBRARIES[name].require(rest)
        return NetworkSpec(f"{name}:{rest}")
    if name not in NETWORKS:
        raise ValueError(
            f"unknown network {name!r}: there is no network of this name; {_guess(name, NETWORKS)}give one of "
            f"{', '.join(NETWORKS)}, torchvision:NAME, timm:NAME or open_clip:NAME"
        )
    return _with_options(name, rest, spec)


def _with_options(name: str, text: str, given: str) -> NetworkSpec:
    """Return a network of this package with the options that ``text`` sets. Errors quote ``given``, the whole spec."""
    known, options = _options(name), dict[str, Value]()
    for item in filter(None, text.split(",")):
        key, _, value = (part.strip() for part in item.partition("="))
        if key not in known:
            accepted = ", ".join(known) or "no options"
            raise ValueError(
                f"unknown option {key!r} of {name}: it takes {accepted}; {_guess(key, known)}correct {given!r}"
            )
        if key in options:
            raise ValueError(f"option {key} of {name} is given twice: it can have one value; correct {given!r}")
        options[key] = known[key].read(value, f"option {key} of {name}")
    return NetworkSpec(name, {key: value for key, value in options.items() if value != known[key].default})


def _require_auto_options(options: str) -> None:
    """Raise ValueError unless one of the default networks takes these options."""
    refusals: dict[Kind, ValueError] = {}
    for of_kind, name in _DEFAULTS.items():
        try:
            _with_options(name, options, f"{AUTO}:{options}")
        except ValueError as error:
            refusals[of_kind] = error
    if len(refusals) == len(_DEFAULTS):
        raise refusals["images"]


def is_builtin(spec: str | NetworkSpec | Factory) -> bool:
    """Whether the spec names a network of this package or of an installed plugin."""
    return isinstance(spec, str | NetworkSpec) and parse(spec).name in NETWORKS


def require_moderate(spec: str | NetworkSpec | Factory, input_shape: InputShape, num_outputs: int) -> None:
    """Raise ValueError if a network of this package would have more than ``MAX_PARAMS`` parameters."""
    if isinstance(spec, str | NetworkSpec) and is_builtin(spec):
        if _num_params(str(parse(spec)), tuple(input_shape), num_outputs) > MAX_PARAMS:
            raise ValueError(
                f"{parse(spec)} would have more than {MAX_PARAMS:,} parameters for {num_outputs} outputs and samples "
                f"of shape {tuple(input_shape)}, which is the limit; give a smaller width or depth"
            )


@functools.lru_cache(maxsize=64)
def _num_params(spec: str, input_shape: InputShape, num_outputs: int) -> float:
    """Count the parameters on the meta device; infinite if torch cannot represent the shapes."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in build(spec, input_shape, num_outputs).parameters())
    except (OverflowError, RuntimeError, TypeError):
        return math.inf


def build(spec: str | NetworkSpec | Factory, input_shape: InputShape, num_outputs: int) -> Network:
    """Build a network on the CPU. Its weights are drawn from the global generator: call this under ``Rng.forked``.

    Args:
        spec: a name with options, or ``factory(input_shape, num_outputs) -> nn.Module``.
        input_shape: the shape of a sample: (C, L), (C, H, W) or (T, C, H, W).
        num_outputs: the number of outputs, which are logits if the targets are classes.

    Raises:
        ValueError: ``resolve`` refuses the spec, or the network cannot take samples of this size.
    """
    if isinstance(spec, nn.Module):
        raise ValueError(
            f"network={type(spec).__name__}(...) is a single network: experiments need fresh ones; "
            "give a callable of (input_shape, num_outputs) that builds it"
        )
    if not isinstance(spec, str | NetworkSpec):
        return from_callable(name_of(spec), spec, input_shape, num_outputs)
    spec = resolve(spec, input_shape)
    if spec.name not in NETWORKS:
        return LIBRARIES[spec.name.partition(":")[0]].build(spec.name, input_shape, num_outputs)
    return NETWORKS[spec.name](input_shape, num_outputs, **spec.options)


def name_of(spec: str | NetworkSpec | Factory) -> str:
    """Return the canonical spelling, or ``custom:`` and the qualified name of a callable."""
    if isinstance(spec, str | NetworkSpec):
        return str(parse(spec))
    return f"custom:{getattr(spec, '__qualname__', type(spec).__qualname__)}"


def module_of(spec: NetworkSpec | Factory) -> str:
    """Return the module, or the library, that defines a network; ``condense`` for a callable."""
    if not isinstance(spec, NetworkSpec):
        return "condense"
    return NETWORKS[spec.name].__module__ if spec.name in NETWORKS else spec.name.partition(":")[0]


def with_options(name: str, **options: Value) -> str:
    """Return the network ``name`` with these options.

    If the network does not have one of the options, or an option does not take the value, return ``name`` unchanged.
    """
    spec = NetworkSpec(name) if name.startswith("custom:") else parse(name)
    known = _options(spec.name) if spec.name in NETWORKS else {}
    if any(key not in known or _spell(value) not in known[key].choices for key, value in options.items()):
        return name
    return str(parse(str(NetworkSpec(spec.name, {**spec.options, **options}))))


@dataclass(frozen=True)
class _Option:
    """A keyword parameter of a network class: a whole number, true or false, or one of several words."""

    default: Value
    choices: tuple[str, ...]

    @property
    def values(self) -> str:
        default = _spell(self.default)
        return "|".join([default, *(choice for choice in self.choices if choice != default)])

    def read(self, text: str, where: str) -> Value:
        if not self.choices:
            if text.isdecimal() and len(text) <= len(str(MAX_OPTION)) and 0 < int(text) <= MAX_OPTION:
                return int(text)
            raise ValueError(
                f"{where} cannot be {text!r}: it is a whole number from 1 to {MAX_OPTION}; "
                f"give for example {self.default}"
            )
        word = text.lower()
        if word not in self.choices:
            allowed = ", ".join(self.choices)
            raise ValueError(
                f"{where} cannot be {text!r}: it is one of {allowed}; {_guess(word, self.choices)}choose one"
            )
        return word == "true" if isinstance(self.default, bool) else word


def _options(name: str) -> dict[str, _Option]:
    constructor = NETWORKS[name].__init__
    hints = get_type_hints(constructor)
    options = {}
    for key, parameter in inspect.signature(constructor).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            choices = get_args(hints[key]) if get_origin(hints[key]) is Literal else ()
            options[key] = _Option(parameter.default, ("false", "true") if hints[key] is bool else choices)
    return options


def _spell(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _guess(text: str, known: Mapping[str, object] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(text.lower(), known, n=1)
    return f"did you mean {close[0]}? " if close else ""
