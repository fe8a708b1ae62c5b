"""A network as pure functions of its weights."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from condense.files import canonical_json, checksum
from condense.names import spelt
from condense.networks.base import ACTIVATIONS, InputShape, Network
from condense.networks.external import Factory
from condense.networks.registry import NetworkSpec, build, from_here, name_of, parse, require_moderate
from condense.rng import Rng


class Weights(NamedTuple):
    """What training changes of a network, by name: parameters, and buffers such as BatchNorm's statistics.

    A parameter with two names (tied weights) has its first; a frozen one (``requires_grad_(False)``) is in neither."""

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]


class Functional:
    """One architecture for images of one shape; its weights are arguments.

    The calls go through ``torch.func`` transforms, ``torch.compile`` and second derivatives. What is not trained
    belongs to the architecture: frozen parameters, and the buffers that a network starts with, are the same in all
    of its networks.

    Args:
        spec: what ``build`` takes.
        input_shape: (channels, height, width).
        num_classes: the number of logits.
        device: of the weights that ``init`` makes, and of the calls.
        dtype: of the same.

    Raises:
        ValueError: as ``build`` does.
    """

    def __init__(
        self,
        spec: str | NetworkSpec | Factory,
        input_shape: InputShape,
        num_classes: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._spec = parse(spec) if isinstance(spec, str) else spec
        self.name = name_of(self._spec)
        self.input_shape, self.num_classes = input_shape, num_classes
        self.device, self.dtype = torch.device(device), dtype
        require_moderate(self._spec, input_shape, num_classes)
        with Rng(0).forked("architecture"):
            network = build(self._spec, input_shape, num_classes).to(self.device, self.dtype)
        self.shapes = {name: tuple(p.shape) for name, p in network.named_parameters() if p.requires_grad}
        """Shapes of the parameters that are trained, in the order of ``flatten``."""
        if not self.shapes:
            raise ValueError(
                f"{self.name} has no parameter that requires grad: there is nothing to train; leave "
                "requires_grad on where the network is to learn"
            )
        self.num_features = network.classifier.in_features
        """F: what the final linear layer sees of an image."""
        self.num_params = sum(math.prod(shape) for shape in self.shapes.values())
        self._frozen = {name: p.detach() for name, p in network.named_parameters() if not p.requires_grad}
        self._buffers = {name: buffer.detach() for name, buffer in network.named_buffers()}
        self.buffer_shapes = {name: tuple(buffer.shape) for name, buffer in self._buffers.items()}
        """Shapes of the buffers, in the order of ``Weights.buffers``."""
        self._aliases = _aliases(network)
        # Networks of others may attend by fused kernels, which have no second derivative.
        self._foreign = not from_here(self._spec)
        self._eval = _Skeleton(network).to("meta").eval()
        self._tracking = copy.deepcopy(self._eval).train()
        self._train = copy.deepcopy(self._tracking)
        for module in self._train.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                # Statistics of the batch alone: vmap refuses the update of running ones.
                module.track_running_stats = False
        for module in self._eval.modules():
            # In evaluation mode both take a fused path, which has no derivatives; their flag ``training`` decides it.
            if isinstance(module, nn.MultiheadAttention):
                module.training, module.dropout = True, 0.0
            if isinstance(module, nn.TransformerEncoderLayer):
                module.training = True

    @cached_property
    def flops(self) -> float:
        """Floating-point operations of one image's forward and backward pass, in matrix products and convolutions."""
        with FlopCounterMode(display=False) as counter:
            self._eval(torch.empty(2, *self.input_shape, device="meta", dtype=self.dtype), False)
        return 3 * counter.get_total_flops() / 2

    def identity(self) -> dict[str, Any]:
        """What tells this network from others, JSON-able; for callables with a hash of parameter shapes, and one of the
        values of those that are frozen."""
        if isinstance(self._spec, NetworkSpec):
            return {"network": self.name}
        shapes = canonical_json([[name, list(shape)] for name, shape in self.shapes.items()])
        frozen = {"frozen": checksum(self._frozen)} if self._frozen else {}
        return {"network": self.name, "shapes": hashlib.sha256(shapes.encode()).hexdigest()} | frozen

    def init(self, rng: Rng, name: str, step: int = 0, unit: int | str = 0) -> Weights:
        """Fresh weights, a function of the key; the global generator stays untouched.

        Raises:
            ValueError: as ``build`` does.
        """
        with rng.forked(name, step, unit):
            network = build(self._spec, self.input_shape, self.num_classes)
        found = dict(network.to(self.device, self.dtype).named_parameters())
        return Weights(
            {key: found[key].detach() for key in self.shapes},
            {key: buffer.clone() for key, buffer in self._buffers.items()},
        )

    def restored(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Weights:
        """Weights that were stored as float32, on the network's device and in their own types again."""
        return Weights(
            {name: p.to(self.device, self.dtype) for name, p in params.items()},
            {name: buffer.to(self._buffers[name]) for name, buffer in buffers.items()},
        )

    def logits(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        x: Tensor,
        train: bool = True,
        update_buffers: bool = False,
        feature_mask: Tensor | None = None,
    ) -> Tensor:
        """Images (N, C, H, W) to logits (N, num_classes).

        Args:
            params, buffers: as in ``Weights``.
            x: images.
            train: BatchNorm takes its statistics from the batch (else from ``buffers``) and dropout is on.
            update_buffers: in training mode, update the tensors of ``buffers`` in place, else never.
            feature_mask: (N, F), what the features are multiplied by before the final linear layer; None: nothing.
        """
        return self._call(False, params, buffers, x, train, update_buffers, feature_mask)

    def features(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        x: Tensor,
        train: bool = True,
        update_buffers: bool = False,
    ) -> Tensor:
        """Images (N, C, H, W) to the input of the final linear layer (N, F); arguments as for ``logits``."""
        return self._call(True, params, buffers, x, train, update_buffers)

    def maps(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], x: Tensor, train: bool = True
    ) -> tuple[list[Tensor], Tensor]:
        """Images (N, C, H, W) to what each activation puts out, before any pooling, and the features (N, F).

        The maps (N, c, h, w) come in the order of the forward pass; activations of other shapes have none.

        Raises:
            ValueError: the network has no such maps.
        """
        copies = {name: buffer.clone() for name, buffer in buffers.items()}
        with self._attention():
            seen, features = functional_call(self._mapped[train], self._weights(params, copies), (x,))
        if not seen:
            raise ValueError(
                f"{self.name} has no feature maps: none of its activations is a module that puts out (N, C, H, W); "
                f"give {spelt('network', 'convnet')}"
            )
        return seen, features

    def require_maps(self) -> None:
        """Raise ValueError where ``maps`` would."""
        frozen = {name: p.to("meta") for name, p in self._frozen.items()}
        self.maps(frozen, {}, torch.empty(2, *self.input_shape, device="meta", dtype=self.dtype), train=False)

    @cached_property
    def _mapped(self) -> dict[bool, _Mapped]:
        """By ``train``."""
        skeletons = {True: self._train, False: self._eval}
        return {train: _Mapped(copy.deepcopy(skeleton.network)) for train, skeleton in skeletons.items()}

    def _call(
        self,
        embed: bool,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        x: Tensor,
        train: bool,
        update_buffers: bool,
        feature_mask: Tensor | None = None,
    ) -> Tensor:
        if not update_buffers:
            buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        skeleton = (self._tracking if update_buffers else self._train) if train else self._eval
        with self._attention():
            output: Tensor = functional_call(skeleton, self._weights(params, buffers), (x, embed, feature_mask))
        return output

    def _weights(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a skeleton is called with: everything, under all of its names."""
        values = {**self._frozen, **params, **buffers}
        values |= {alias: values[name] for alias, name in self._aliases.items() if name in values}
        return {f"network.{name}": value for name, value in values.items()}

    def _attention(self) -> contextlib.AbstractContextManager[None]:
        return sdpa_kernel(SDPBackend.MATH) if self._foreign else contextlib.nullcontext()

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """Parameters to one vector (num_params,)."""
        return torch.cat([params[name].reshape(-1) for name in self.shapes])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """The inverse of ``flatten``; the parameters are views of ``vector``."""
        parts = vector.split([math.prod(shape) for shape in self.shapes.values()])
        pairs = zip(self.shapes.items(), parts, strict=True)
        return {name: part.view(shape) for (name, shape), part in pairs}


def _aliases(network: Network) -> dict[str, str]:
    """The further names of parameters and buffers that have several, with the first."""
    first: dict[int, str] = {}
    found = {}
    for named in (network.named_parameters, network.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            if first.setdefault(id(tensor), name) != name:
                found[name] = first[id(tensor)]
    return found


class _Skeleton(nn.Module):
    """Gives ``functional_call`` a forward that also reaches ``embed``."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, embed: bool, feature_mask: Tensor | None = None) -> Tensor:
        if embed:
            return self.network.embed(x)
        output: Tensor = (
            self.network(x) if feature_mask is None else self.network.classifier(self.network.embed(x) * feature_mask)
        )
        return output


class _Mapped(nn.Module):
    """``embed``, with the maps that activations put out on the way."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.seen: list[Tensor] = []
        for module in network.modules():
            if isinstance(module, ACTIVATIONS):
                module.register_forward_hook(self._see)

    def _see(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if output.dim() == 4:
            self.seen.append(output)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        self.seen = []
        features = self.network.embed(x)
        seen, self.seen = self.seen, []
        return seen, features
