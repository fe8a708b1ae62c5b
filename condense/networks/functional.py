"""Networks as pure functions of their weights."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import functools
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from condense.compute import Compute
from condense.data.layout import InputShape, kind
from condense.files import canonical_json, checksum
from condense.names import reason, spelt
from condense.networks.base import ACTIVATIONS, NORMS, Network
from condense.networks.external import Factory
from condense.networks.initial import DrawnFrom
from condense.networks.projected import Projected
from condense.networks.registry import (
    NetworkSpec,
    build,
    default_for,
    is_builtin,
    module_of,
    name_of,
    require_moderate,
    resolve,
)
from condense.rng import Rng


class _Draws(TorchDispatchMode):
    """Notices operations that draw random numbers."""

    found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


class Weights(NamedTuple):
    """The weights of a network by name: parameters, and buffers such as BatchNorm statistics.

    A parameter with two names (tied weights) has the first one. Frozen parameters (``requires_grad_(False)``) are not
    included."""

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]

    @torch.no_grad()
    def assign(self, other: Weights) -> None:
        """Copy other weights into the tensors of these."""
        for mine, theirs in zip(self, other, strict=True):
            for name, tensor in mine.items():
                tensor.copy_(theirs[name])


def without_projector(weights: Weights) -> Weights:
    """Return the weights of a network from those of ``Functional.with_projector``, with the classifier as it was."""
    params, buffers = (
        {name.removeprefix("network."): tensor for name, tensor in part.items() if name.startswith("network.")}
        for part in weights
    )
    return Weights(params, buffers)


class Captured(NamedTuple):
    """The tensors that ``Functional.capture`` captured in one forward pass."""

    values: dict[str, Tensor]
    """Tensors by the name of their module, in the order of the forward pass; ``name#2`` is a module's second run."""
    features: Tensor
    """The input of the final linear layer, (N, F)."""
    logits: Tensor
    """(N, num_outputs)"""


_KINDS: dict[str, tuple[type[nn.Module], ...]] = {"activations": ACTIVATIONS, "norm-inputs": NORMS}


class Functional:
    """An architecture for samples of one shape, with weights as arguments.

    The methods support ``torch.func`` transforms, ``torch.compile`` and second derivatives. Frozen parameters and the
    initial buffers belong to the architecture: they are the same in all networks.

    Args:
        spec: the network, as for ``build``.
        input_shape: the shape of a sample: (C, L), (C, H, W) or (T, C, H, W).
        num_outputs: the number of outputs, which are logits if the targets are classes.
        device: the device of the weights that ``init`` returns and of the computation.
        dtype: the dtype of the same.

    Raises:
        ValueError: ``build`` raises it, the network has no parameter that requires grad, or it has too many parameters.
    """

    def __init__(
        self,
        spec: str | NetworkSpec | Factory,
        input_shape: InputShape,
        num_outputs: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.spec = resolve(spec, input_shape) if isinstance(spec, str | NetworkSpec) else spec
        """The architecture."""
        self.name, self.module = name_of(self.spec), module_of(self.spec)
        self.input_shape, self.num_outputs = input_shape, num_outputs
        self.device, self.dtype = torch.device(device), dtype
        require_moderate(self.spec, input_shape, num_outputs)
        with Rng(0).forked("architecture"):
            network = build(self.spec, input_shape, num_outputs).to(self.device, self.dtype)
        self.shapes = {name: tuple(p.shape) for name, p in network.named_parameters() if p.requires_grad}
        """Shapes of the trained parameters, in the order of ``flatten``."""
        if not self.shapes:
            raise ValueError(
                f"{self.name} has no parameter that requires grad: there is nothing to train; leave "
                "requires_grad on for the parameters to be trained"
            )
        self.num_features = network.classifier.in_features
        """F, the number of inputs of the final linear layer."""
        self.num_params = sum(math.prod(shape) for shape in self.shapes.values())
        self._frozen = {name: p.detach() for name, p in network.named_parameters() if not p.requires_grad}
        self._buffers = {name: buffer.detach() for name, buffer in network.named_buffers()}
        self.buffer_shapes = {name: tuple(buffer.shape) for name, buffer in self._buffers.items()}
        """Shapes of the buffers, in the order of ``Weights.buffers``."""
        self._aliases = _aliases(network)
        # Networks from outside this package may use fused attention kernels, which have no second derivative.
        self._is_external = not is_builtin(self.spec)
        self._captures: dict[tuple[str | tuple[str, ...], bool], _Capturing] = {}
        self._eval = _Skeleton(network).to("meta").eval()
        self._tracking = copy.deepcopy(self._eval).train()
        self._train = copy.deepcopy(self._tracking)
        for module in self._train.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                # Use only the statistics of the batch, since vmap does not support updates of running statistics.
                module.track_running_stats = False
        for module in self._eval.modules():
            # With ``training=False`` both use a fused path that has no derivatives.
            if isinstance(module, nn.MultiheadAttention):
                module.training, module.dropout = True, 0.0
            if isinstance(module, nn.TransformerEncoderLayer):
                module.training = True

    @cached_property
    def flops(self) -> float:
        """The floating-point operations of one sample's forward and backward pass (matrix products, convolutions); of
        networks for samples of one shape, so not of graphs."""
        with FlopCounterMode(display=False) as counter, self._without_values():
            self._eval(torch.empty(2, *self.input_shape, device="meta", dtype=self.dtype), False)
        return 3 * counter.get_total_flops() / 2

    @cached_property
    def draws(self) -> bool:
        """Whether a pass in training mode draws random numbers, as dropout does."""
        with _Draws() as draws, self._without_values():
            self._train(torch.empty(2, *self.input_shape, device="meta", dtype=self.dtype), False)
        return draws.found

    def settled(self, compute: Compute, num_samples: float, earlier: Mapping[str, Any] | None = None) -> Compute:
        """Return ``compute`` with every automatic choice made, for training on ``num_samples`` samples in all.

        Networks for graphs run eagerly, because the shapes of their batches differ and each would be compiled anew.
        Networks with dropout are trained one at a time, because networks side by side would share its random draws.

        Args:
            compute: the policy that was asked for.
            num_samples: samples of all planned forward and backward passes.
            earlier: the fields that were resolved when the run began; see ``Compute.resolved``.

        Raises:
            ValueError: compilation was asked for, and the network is one for graphs.
        """
        if kind(self.input_shape) != "graphs":
            chosen = compute.resolved(self.flops * num_samples, self.device, earlier)
            side_by_side = (chosen.networks or 1) > 1 and not self.draws
            return chosen if side_by_side else dataclasses.replace(chosen, networks=1)
        if compute.compile:
            raise ValueError(
                f"batches of graphs have different shapes, so each would be compiled anew; leave out "
                f"{spelt('compute.compile')}"
            )
        return compute.resolved(0, self.device, earlier)

    def identity(self) -> dict[str, Any]:
        """Return the JSON-serialisable identity of the architecture.

        For callables it includes a hash of the parameter shapes and a checksum of the frozen parameters.
        """
        if isinstance(self.spec, NetworkSpec):
            return {"network": self.name}
        shapes = canonical_json([[name, list(shape)] for name, shape in self.shapes.items()])
        frozen = {"frozen": checksum(self._frozen)} if self._frozen else {}
        return {"network": self.name, "shapes": hashlib.sha256(shapes.encode()).hexdigest()} | frozen

    def init(self, rng: Rng, name: str, step: int | Tensor = 0, unit: int | str = 0) -> Weights:
        """Return initial weights that depend only on the key; the state of the global generator does not change.

        Raises:
            ValueError: as ``build`` does.
        """
        draws = rng(name, step, unit)
        with (
            DrawnFrom(draws),
            rng.forked(name, step, unit),  # for draws of other kinds
            draws.device,
        ):
            network = build(self.spec, self.input_shape, self.num_outputs)
        params = dict(network.named_parameters())
        return Weights(
            {key: params[key].detach().to(self.device, self.dtype) for key in self.shapes},
            {key: buffer.clone() for key, buffer in self._buffers.items()},
        )

    def with_projector(self, width: int) -> Functional:
        """Return this architecture with a projector in place of the classifier, and ``width`` outputs.

        Under the same key ``init`` gives the shared layers the same weights; see ``without_projector``.
        """

        def projected(input_shape: InputShape, width: int) -> Network:
            return Projected(build(self.spec, input_shape, self.num_outputs), width)

        return Functional(projected, self.input_shape, width, self.device, self.dtype)

    @property
    def frozen(self) -> Mapping[str, Tensor]:
        """The parameters that are never trained and are the same in all networks."""
        return self._frozen

    @property
    def published(self) -> dict[str, str]:
        """The names in the state dict that the network's library publishes, each with the name used here.

        Tied tensors appear under both of their names.
        """
        network = self._eval.network
        return {network.published_name(name): self._aliases.get(name, name) for name in network.state_dict()}

    def restored(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Weights:
        """Return weights that were stored as float32 on the network's device and in their original dtypes."""
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
        """Return the logits (N, num_outputs) of samples (N, *input_shape).

        Args:
            params, buffers: as in ``Weights``.
            x: the samples.
            train: use batch statistics in BatchNorm (else those of ``buffers``) and enable dropout.
            update_buffers: update the tensors of ``buffers`` in place; ignored if ``train`` is False.
            feature_mask: (N, F), multiplied with the features before the final linear layer.
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
        """Return the features (N, F) of samples (N, *input_shape), the input of the final linear layer.

        The arguments are those of ``logits``.
        """
        return self._call(True, params, buffers, x, train, update_buffers)

    def maps(
        self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor], x: Tensor, train: bool = True
    ) -> tuple[list[Tensor], Tensor]:
        """Return the feature maps of samples (N, *input_shape), and the features (N, F).

        The maps (N, c, l), (N, c, h, w) or (N, c, t, h, w) are the outputs of the activations, before any pooling, in
        the order of the forward pass. Outputs of other shapes are left out.

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
        """Raise ValueError if ``maps`` would."""
        self.require_capture("activations")
        with self._without_values():
            self.maps(*self._meta, train=False)

    def capture(
        self,
        params: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        x: Tensor,
        what: str | Sequence[str],
        train: bool = True,
    ) -> Captured:
        """Run one forward pass and capture intermediate tensors.

        The method supports ``torch.func`` transforms and ``torch.compile``. Before tracing, the latter needs one call
        outside of it, or ``require_capture``.

        Args:
            params, buffers: as in ``Weights``.
            x: samples (N, *input_shape).
            what: ``"activations"`` captures the outputs of activations. ``"norm-inputs"`` captures the inputs of
                normalisation layers; the running statistics of a BatchNorm ``name`` are
                ``buffers[f"{name}.running_mean"]`` and ``buffers[f"{name}.running_var"]``. Names among ``blocks``
                capture the outputs of these modules.
            train: as for ``logits``.

        Raises:
            ValueError: a name is unknown; a block is not run or its output is not a tensor; the network has no
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
                raise ValueError(f"the block {name!r} of {self.name} is not run in a forward pass; give another one")
        return Captured(values, features, logits)

    def require_capture(self, what: str | Sequence[str]) -> None:
        """Raise ValueError if ``capture`` would."""
        with self._without_values():
            self.capture(*self._meta, what, train=False)
        self._capturing(what, True)

    @property
    def _meta(self) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Weights and two samples on the meta device, for a pass that computes only shapes."""
        frozen = {name: p.to("meta") for name, p in self._frozen.items()}
        return frozen, {}, torch.empty(2, *self.input_shape, device="meta", dtype=self.dtype)

    @contextlib.contextmanager
    def _without_values(self) -> Iterator[None]:
        """In the context a pass on the meta device that needs values raises ValueError."""
        try:
            yield
        except RuntimeError as error:
            raise ValueError(
                f"{self.name} cannot be run without values, on torch's device meta, which tells its shapes and costs "
                f"({reason(error)}): register its tensors with register_buffer, and read no values in its forward pass"
            ) from error

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of all modules whose outputs ``capture`` can return."""
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
                    f"{self.name} has no normalisation layer whose input could be captured; "
                    f"give {spelt('network', 'convnet:norm=batch')}"
                )
            # Networks from outside this package may change the captured tensors in place.
            self._captures[key] = _Capturing(network, names, inputs=what == "norm-inputs", copies=self._is_external)
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
        """Return all tensors of a skeleton, under all of their names."""
        values = {**self._frozen, **params, **buffers}
        aliases = {alias: values[name] for alias, name in self._aliases.items() if name in values}
        return {f"network.{name}": value for name, value in {**values, **aliases}.items()}

    def _attention(self) -> contextlib.AbstractContextManager[None]:
        return sdpa_kernel(SDPBackend.MATH) if self._is_external else contextlib.nullcontext()

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """Return the parameters as one vector (num_params,)."""
        return torch.cat([params[name].reshape(-1) for name in self.shapes])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the parameters as views of ``vector``; the inverse of ``flatten``."""
        parts = vector.split([math.prod(shape) for shape in self.shapes.values()])
        pairs = zip(self.shapes.items(), parts, strict=True)
        return {name: part.view(shape) for (name, shape), part in pairs}


def _aliases(network: Network) -> dict[str, str]:
    """Return the additional names of tied parameters and buffers, mapped to their first name."""
    first: dict[int, str] = {}
    aliases = {}
    for named in (network.named_parameters, network.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            if first.setdefault(id(tensor), name) != name:
                aliases[name] = first[id(tensor)]
    return aliases


class _Skeleton(nn.Module):
    """A module for ``functional_call`` whose forward pass can also return the features."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, embed: bool, feature_mask: Tensor | None = None) -> Tensor:
        if embed:
            return self.network.embed(x)
        output: Tensor = (
            self.network(x) if feature_mask is None else self.network.classify(self.network.embed(x) * feature_mask)
        )
        return output


class _Capturing(nn.Module):
    """A module whose forward pass also returns the inputs or outputs of some modules of the network."""

    def __init__(self, network: Network, names: Sequence[str], *, inputs: bool, copies: bool) -> None:
        super().__init__()
        self.network, self.copies = network, copies
        self.captured: list[tuple[str, Tensor]] = []
        for name in names:
            module = network.get_submodule(name)
            if inputs:
                module.register_forward_pre_hook(functools.partial(self._capture_input, name))
            else:
                module.register_forward_hook(functools.partial(self._capture_output, name))

    def _capture_input(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._capture(name, inputs[0])

    def _capture_output(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._capture(name, output)

    def _capture(self, name: str, value: Tensor) -> None:
        if not isinstance(value, Tensor):
            raise ValueError(
                f"the block {name!r} cannot be captured: its output is a {type(value).__name__}, not a tensor; "
                "capture a block inside it"
            )
        self.captured.append((name, value.clone() if self.copies else value))

    def forward(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        self.captured = []
        features = self.network.embed(x)
        logits = self.network.classify(features)
        values: dict[str, Tensor] = {}
        for name, value in self.captured:
            call = 1 + sum(other.partition("#")[0] == name for other in values)
            values[name if call == 1 else f"{name}#{call}"] = value
        self.captured = []
        return values, features, logits
