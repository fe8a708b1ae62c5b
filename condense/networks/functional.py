"""A network as pure functions of its weights."""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from condense.data.layout import InputShape
from condense.files import canonical_json, checksum
from condense.names import spelt
from condense.networks.base import ACTIVATIONS, NORMS, Network
from condense.networks.external import Factory
from condense.networks.registry import NetworkSpec, build, default_for, from_here, name_of, require_moderate, resolve
from condense.rng import Rng


class Weights(NamedTuple):
    """What training changes of a network, by name: parameters, and buffers such as BatchNorm's statistics.

    A parameter with two names (tied weights) has its first; a frozen one (``requires_grad_(False)``) is in neither."""

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]


class Captured(NamedTuple):
    """What ``Functional.capture`` took from one forward pass."""

    values: dict[str, Tensor]
    """Tensors by the name of their module, in the order of the forward pass; ``name#2`` is the second time that a
    module is run."""
    features: Tensor
    """The input of the final linear layer, (N, F)."""
    logits: Tensor
    """(N, num_classes)"""


_KINDS: dict[str, tuple[type[nn.Module], ...]] = {"activations": ACTIVATIONS, "norm-inputs": NORMS}


class Functional:
    """One architecture for samples of one shape; its weights are arguments.

    The calls go through ``torch.func`` transforms, ``torch.compile`` and second derivatives. What is not trained
    belongs to the architecture: frozen parameters, and the buffers that a network starts with, are the same in all
    of its networks.

    Args:
        spec: what ``build`` takes.
        input_shape: of a sample: (C, L), (C, H, W) or (T, C, H, W).
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
        self._spec = resolve(spec, input_shape) if isinstance(spec, str | NetworkSpec) else spec
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
        """F: what the final linear layer sees of a sample."""
        self.num_params = sum(math.prod(shape) for shape in self.shapes.values())
        self._frozen = {name: p.detach() for name, p in network.named_parameters() if not p.requires_grad}
        self._buffers = {name: buffer.detach() for name, buffer in network.named_buffers()}
        self.buffer_shapes = {name: tuple(buffer.shape) for name, buffer in self._buffers.items()}
        """Shapes of the buffers, in the order of ``Weights.buffers``."""
        self._aliases = _aliases(network)
        # Networks of others may attend by fused kernels, which have no second derivative.
        self._foreign = not from_here(self._spec)
        self._captures: dict[tuple[str | tuple[str, ...], bool], _Capturing] = {}
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
        """Floating-point operations of one sample's forward and backward pass, in matrix products and convolutions."""
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

    @property
    def frozen(self) -> Mapping[str, Tensor]:
        """The parameters that are never trained and are the same in all networks."""
        return self._frozen

    @property
    def published(self) -> dict[str, str]:
        """The names of a state dict of the network as its library has it, each with the name of that tensor here; both
        names of a tied one."""
        network = self._eval.network
        return {network.published_name(name): self._aliases.get(name, name) for name in network.state_dict()}

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
        """Samples (N, *input_shape) to logits (N, num_classes).

        Args:
            params, buffers: as in ``Weights``.
            x: samples.
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
        """Samples (N, *input_shape) to the input of the final linear layer (N, F); arguments as for ``logits``."""
        return self._call(True, params, buffers, x, train, update_buffers)

    def maps(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], x: Tensor, train: bool = True
    ) -> tuple[list[Tensor], Tensor]:
        """Samples (N, *input_shape) to what each activation puts out, before any pooling, and the features (N, F).

        The maps (N, c, l), (N, c, h, w) or (N, c, t, h, w) come in the order of the forward pass; activations of other
        shapes have none.

        Raises:
            ValueError: the network has no such maps.
        """
        values, features, _ = self.capture(params, buffers, x, "activations", train)
        axes = len(self.input_shape) + 1
        maps = [value for value in values.values() if value.dim() == axes]
        if not maps:
            raise ValueError(
                f"{self.name} has no feature maps: none of its activations is a module whose output has channels and "
                f"spatial axes; give {spelt('network', default_for(self.input_shape))}"
            )
        return maps, features

    def require_maps(self) -> None:
        """Raise ValueError where ``maps`` would."""
        self.require_capture("activations")
        self.maps(*self._meta, train=False)

    def capture(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        x: Tensor,
        what: str | Sequence[str],
        train: bool = True,
    ) -> Captured:
        """One forward pass, with what was computed on the way.

        It goes through ``torch.func`` transforms and ``torch.compile``; the latter needs one call outside of it, or
        ``require_capture``, before it traces.

        Args:
            params, buffers: as in ``Weights``.
            x: images (N, C, H, W).
            what: ``"activations"``, their outputs; ``"norm-inputs"``, what every normalisation layer is given, where
                the running statistics of a BatchNorm ``name`` are ``buffers[f"{name}.running_mean"]`` and
                ``running_var``; or names among ``blocks``, whose outputs are captured.
            train: as for ``logits``.

        Raises:
            ValueError: an unknown name, a block that was not run or does not put out a tensor, or a network without
                normalisation layers.
        """
        copies = {name: buffer.clone() for name, buffer in buffers.items()}
        with self._attention():
            values, features, logits = functional_call(
                self._capturing(what, train), self._weights(params, copies), (x,)
            )
        names = () if isinstance(what, str) and what in _KINDS else (what,) if isinstance(what, str) else what
        for name in names:
            if name not in values:
                raise ValueError(f"the block {name!r} of {self.name} is not run in a forward pass; name another one")
        return Captured(values, features, logits)

    def require_capture(self, what: str | Sequence[str]) -> None:
        """Raise ValueError where ``capture`` would."""
        self.capture(*self._meta, what, train=False)
        self._capturing(what, True)

    @property
    def _meta(self) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Weights and two images without memory, for a pass that only finds out shapes."""
        frozen = {name: p.to("meta") for name, p in self._frozen.items()}
        return frozen, {}, torch.empty(2, *self.input_shape, device="meta", dtype=self.dtype)

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of all modules, of which ``capture`` takes the outputs."""
        return tuple(name for name, _ in self._eval.network.named_modules() if name)

    def _capturing(self, what: str | Sequence[str], train: bool) -> _Capturing:
        key = (what if isinstance(what, str) else tuple(what), train)
        if key not in self._captures:
            network = copy.deepcopy((self._train if train else self._eval).network)
            if isinstance(what, str) and what in _KINDS:
                names = [name for name, module in network.named_modules() if isinstance(module, _KINDS[what])]
            else:
                names = [what] if isinstance(what, str) else list(what)
                for name in names:
                    if name not in self.blocks:
                        near = difflib.get_close_matches(name, self.blocks)
                        guess = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
                        raise ValueError(
                            f"{self.name} has no block {name!r}: {guess}`blocks` lists all; or capture "
                            + " or ".join(map(repr, _KINDS))
                        )
            if what == "norm-inputs" and not names:
                raise ValueError(
                    f"{self.name} has no normalisation layer, of which to capture the input; "
                    f"give {spelt('network', 'convnet:norm=batch')}"
                )
            # Networks of others may go on in place from what was captured.
            self._captures[key] = _Capturing(network, names, inputs=what == "norm-inputs", copies=self._foreign)
        return self._captures[key]

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


class _Capturing(nn.Module):
    """The forward pass, with the inputs or outputs of some of its modules."""

    def __init__(self, network: Network, names: Sequence[str], *, inputs: bool, copies: bool) -> None:
        super().__init__()
        self.network, self.copies = network, copies
        self.seen: list[tuple[str, Tensor]] = []
        for name in names:
            module = network.get_submodule(name)
            if inputs:
                module.register_forward_pre_hook(functools.partial(self._see_input, name))
            else:
                module.register_forward_hook(functools.partial(self._see_output, name))

    def _see_input(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._see(name, inputs[0])

    def _see_output(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._see(name, output)

    def _see(self, name: str, value: Tensor) -> None:
        if not isinstance(value, Tensor):
            raise ValueError(f"the block {name!r} puts out a {type(value).__name__}, no tensor; capture one inside it")
        self.seen.append((name, value.clone() if self.copies else value))

    def forward(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        self.seen = []
        features = self.network.embed(x)
        logits = self.network.classifier(features)
        values: dict[str, Tensor] = {}
        for name, value in self.seen:
            call = 1 + sum(other.partition("#")[0] == name for other in values)
            values[name if call == 1 else f"{name}#{call}"] = value
        self.seen = []
        return values, features, logits
