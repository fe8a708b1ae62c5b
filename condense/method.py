"""What a method is: a frozen value of hyper-parameters that makes a state and advances it step by step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, cast, final

import torch
from torch import Tensor

from condense.artifacts import Artifact, ArtifactSpec
from condense.compute import Compute
from condense.distributed import Ranks
from condense.rng import Rng
from condense.synthetic.decode import Decode
from condense.synthetic.labels import Labels
from condense.synthetic.set import Origin, SyntheticSet
from condense.task import Task
from condense.train import Training, loss_of


@dataclass(frozen=True, kw_only=True)
class Optim:
    """An optimiser of one learnable leaf of the set."""

    kind: Literal["sgd", "adam"] = "sgd"
    """sgd or adam."""
    lr: float = 0.1
    """Learning rate."""
    momentum: float = 0.5
    """Momentum of sgd; first beta of adam."""

    def __post_init__(self) -> None:
        if not 0 <= self.lr < 1e30 or not 0 <= self.momentum < 1:
            raise ValueError(
                f"an optimiser needs a finite lr >= 0 and 0 <= momentum < 1, got {self.lr} and {self.momentum}; "
                "correct these fields, e.g. --method.optim.lr 0.1"
            )

    def build(self, params: Sequence[Tensor]) -> torch.optim.Optimizer:
        if self.kind == "adam":
            return torch.optim.Adam(params, lr=self.lr, betas=(self.momentum, 0.999))
        return torch.optim.SGD(params, lr=self.lr, momentum=self.momentum)


@dataclass(frozen=True)
class Context:
    """What the engine hands to a method: the task, keyed randomness, and the fields of the recipe that compose.

    ``ranks`` are the processes that share the parts of a step; no result depends on their number.
    """

    task: Task
    rng: Rng
    ipc: int
    decode: Decode
    labels: Labels
    compute: Compute
    origin: Origin
    artifacts: Mapping[type[ArtifactSpec], Artifact] = field(default_factory=dict)
    ranks: Ranks = Ranks()

    @property
    def images_per_class(self) -> int:
        """Decoded images a class: ipc times what the decoder makes of one latent."""
        return self.ipc * self.decode.expansion

    def new_set(self, images: Tensor, labels: Tensor, *, lr: float | Tensor | None = None) -> SyntheticSet:
        """A set with the recipe's decoder and labels.

        Args:
            images: (images_per_class * C, c, h, w) in the transformed space, grouped by class.
            labels: of these images; classes (n,) or logits (n, C).
            lr: initial learned step size, if the method learns one.
        """
        copies, num = self.decode.expansion, self.ipc * self.task.num_classes
        grouped = images.unflatten(0, (self.task.num_classes, self.ipc, copies))
        latents = self.decode.encode(grouped.flatten(0, 1).transpose(0, 1).flatten(0, 1))
        return SyntheticSet(
            latents,
            labels.unflatten(0, (num, copies))[:, 0],
            self.origin,
            decode=self.decode,
            label_kind=self.labels,
            lr=lr,
        )

    def initial(self, kind: Literal["real", "noise"]) -> tuple[Tensor, Tensor]:
        """Images and classes to start from: real ones drawn per class, or standard normal noise.

        Raises:
            ValueError: a class has fewer real images than asked for.
        """
        num, task = self.images_per_class, self.task
        labels = torch.arange(task.num_classes, device=task.device).repeat_interleave(num)
        if kind == "noise":
            noise = torch.randn(len(labels), *task.image_shape, generator=self.rng("initial images"))
            return noise.to(task.device), labels
        self.require_images()
        drawn = [task.train.draw(c, num, self.rng("initial images", 0, c)) for c in range(task.num_classes)]
        return torch.cat(drawn), labels

    def require_images(self) -> None:
        """Raise ValueError where a class has too few real images to pick from."""
        for c, members in enumerate(self.task.train.by_class):
            if len(members) < self.images_per_class:
                raise ValueError(
                    f"class {self.task.classes[c]!r} has {len(members)} training images, {self.images_per_class} "
                    f"are needed for {self.ipc} images a class; give --ipc {len(members) // self.decode.expansion} "
                    "or less"
                )

    @cached_property
    def loss_fn(self) -> Callable[[dict[str, Tensor], tuple[Tensor, Tensor]], Tensor]:
        """Cross-entropy of the task's network: ``loss_fn(params, (images, targets))``, pure, for second order."""
        network, buffers = self.task.network, self.task.network.init(Rng(0), "buffers").buffers

        def loss_fn(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
            return loss_of(network.logits(params, buffers, batch[0], train=True).to(batch[0].dtype), batch[1])

        return self.compute.second_order(loss_fn, network.device)

    @cached_property
    def features(self) -> Callable[[dict[str, Tensor], dict[str, Tensor], Tensor], Tensor]:
        """``features(params, buffers, images) -> (N, F)``, train mode; differentiable once, under the policy."""
        network = self.task.network

        def features(params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
            return network.features(params, buffers, images, train=True).float()

        compiled = self.compute.first_order(features, network.device)
        return lambda params, buffers, images: cast(Tensor, compiled(params, buffers, self.compute.layout(images)))


@dataclass
class State:
    """What a method carries from step to step.

    Leaves are tensors, modules, optimisers, numbers, strings, None, and lists or dicts of these. ``init`` lays
    the structure and steps change only values, so the engine alone saves and restores it: every tensor of a
    module or optimiser by its own state dict, everything else by value.
    """

    syn: SyntheticSet


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """The instance is the hyper-parameters; subclasses are frozen dataclasses."""

    num_steps: int = 1
    """Steps of distillation."""

    learns: ClassVar[bool] = False
    """Learns by gradient; else it selects or computes in one go."""

    learns_labels: ClassVar[bool] = False
    """Its objective depends on the targets, so that soft labels receive gradient."""

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"method.num_steps must be at least 1, got {self.num_steps}; give --method.num-steps 1")

    def needs(self, task: Task) -> tuple[ArtifactSpec, ...]:
        """The artifacts to be found on disk before the run begins."""
        return ()

    def passes(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        """Planned work of all steps: images times passes forth and back through the network. A forward pass alone
        is a third, a step that is differentiated twice about four. What is small is not compiled.

        Args:
            num_images: of the training data.
            num_classes: of the same.
            images_per_class: of the set, decoded.
        """
        return 0.0

    def training(self, task: Task) -> Training:
        """How its sets are meant to be trained on; stored in the file for the protocol ``own``."""
        return Training()

    def parts(self, ctx: Context) -> Sequence[int]:
        """How the work of one step divides (classes, trajectories), fixed by the recipe; empty if it does not."""
        return ()

    @abstractmethod
    def init(self, ctx: Context) -> State: ...

    @abstractmethod
    def step(self, ctx: Context, state: Any, step: int) -> dict[str, float]:
        """Advance ``state`` by one step (counted from 0) and return what is worth logging."""

    def finalize(self, ctx: Context, state: Any) -> SyntheticSet:
        return cast(SyntheticSet, state.syn)


@dataclass(kw_only=True)
class GradientState(State):
    optimisers: dict[str, torch.optim.Optimizer]
    """By leaf of the set."""


@dataclass(frozen=True, kw_only=True)
class GradientMethod(Method):
    """Learns the set by gradient descent. ``step`` is final: a method says its ``parts``, their ``loss`` and what
    comes ``after``."""

    learns: ClassVar[bool] = True
    learns_labels: ClassVar[bool] = True

    optim: Optim = Optim()
    """Optimiser of the images (latents)."""
    optim_labels: Optim = Optim(lr=1.0, momentum=0.9)
    """Optimiser of learned labels."""
    optim_decoder: Optim = Optim()
    """Optimiser of a decoder with parameters."""
    optim_lr: Optim = Optim(lr=1e-3)
    """Optimiser of the logarithm of a learned step size."""
    clip: float | None = None
    """Largest norm of the gradient of the images; longer ones are scaled down."""

    def optimisers(self, syn: SyntheticSet) -> dict[str, torch.optim.Optimizer]:
        """One optimiser per learnable leaf."""
        plans = {
            "latents": self.optim,
            "labels": self.optim_labels,
            "decoder": self.optim_decoder,
            "lr": self.optim_lr,
        }
        return {leaf: plans[leaf].build(params) for leaf, params in syn.leaves().items()}

    def parts(self, ctx: Context) -> Sequence[int]:
        """What the processes of a step deal out among themselves."""
        return (0,)

    @abstractmethod
    def loss(self, ctx: Context, state: Any, step: int, part: int) -> Tensor:
        """This part's share; the loss of the step is the sum over parts."""

    def parts_at_once(self, ctx: Context) -> int:
        """How many parts ``losses`` is given together; bounded by memory, it changes nothing but rounding."""
        return 1

    def losses(self, ctx: Context, state: Any, step: int, parts: Sequence[int]) -> Tensor:
        """The share of several parts, for methods that compute them faster together than one by one."""
        return torch.stack([self.loss(ctx, state, step, part) for part in parts]).sum()

    def after(self, ctx: Context, state: Any, step: int) -> None:
        """What follows the update of the set: advance a student, age a pool."""
        return

    @final
    def step(self, ctx: Context, state: Any, step: int) -> dict[str, float]:
        leaves = state.syn.leaves()
        params = [param for group in leaves.values() for param in group]
        for param in params:
            param.grad = torch.zeros_like(param)
        total = torch.zeros((), device=ctx.task.device)
        parts, at_once = ctx.ranks.deal(self.parts(ctx)), self.parts_at_once(ctx)
        for first in range(0, len(parts), at_once):
            loss = self.losses(ctx, state, step, parts[first : first + at_once])
            loss.backward()
            total += loss.detach()
        ctx.ranks.sum_([*(cast(Tensor, param.grad) for param in params), total])
        values = {"loss": total} | {f"grad_{name}": _norm(params) for name, params in leaves.items()}
        record = dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))
        require_finite(record)
        if self.clip is not None and record["grad_latents"] > self.clip:
            for param in leaves["latents"]:
                assert param.grad is not None
                param.grad.mul_(self.clip / record["grad_latents"])
        for name, optimiser in state.optimisers.items():
            record[f"lr_{name}"] = optimiser.param_groups[0]["lr"]
            optimiser.step()
        if state.syn.lr is not None:
            record["syn_lr"] = state.syn.lr.detach().mean().item()
        self.after(ctx, state, step)
        return record


def require_finite(record: Mapping[str, float]) -> None:
    """Raise FloatingPointError, with all of the record, where a number is not finite."""
    if not all(map(math.isfinite, record.values())):
        raise FloatingPointError(", ".join(f"{name}={value:g}" for name, value in record.items()))


def _norm(params: Sequence[Tensor]) -> Tensor:
    return torch.stack([cast(Tensor, p.grad).norm() for p in params]).norm()
