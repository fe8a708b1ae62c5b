"""Base classes of methods. A method is a frozen dataclass of hyper-parameters that creates a state and updates it."""

from __future__ import annotations

import copy
import math
import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast, final

import torch
from torch import Tensor, nn

from condense.artifacts import Artifact, ArtifactSpec
from condense.augment import Augment
from condense.compute import Compute
from condense.cudagraph import GraphedStep
from condense.data.layout import InputShape, Kind, kind
from condense.distributed import Ranks
from condense.files import reporting
from condense.names import spelt
from condense.networks import Factory
from condense.objective import OBJECTIVES, CrossEntropy, Objective, ObjectiveName
from condense.rng import Rng
from condense.schedule import CONSTANT, Schedule
from condense.schema import Checked, brief
from condense.synthetic.budget import Unit, latents_per_class
from condense.synthetic.decode import Coded, Decode, StaticDynamic
from condense.synthetic.fits import encoded
from condense.synthetic.labels import Labels
from condense.synthetic.patches import Patches
from condense.synthetic.set import Origin, SyntheticSet
from condense.task import IpcPolicy, Task
from condense.train import Training, set_lr


@dataclass(frozen=True, kw_only=True)
class Optim(Checked):
    """Optimiser of one learnable leaf of the set."""

    kind: Literal["sgd", "adam", "lamb", "adabelief"] = "sgd"
    """Optimiser: sgd, adam, lamb (with unbounded trust ratio) or adabelief."""
    lr: float = 0.1
    """Learning rate."""
    momentum: float = 0.5
    """Momentum of sgd, or the first beta of the other optimisers."""
    beta2: float = 0.999
    """Second beta of all optimisers but sgd."""
    schedule: Schedule = CONSTANT
    """Schedule of the learning rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.lr < 1e30 or not 0 <= self.momentum < 1:
            raise ValueError(
                f"an optimiser needs a finite lr >= 0 and 0 <= momentum < 1, got {self.lr} and {self.momentum}; "
                f"correct these fields, e.g. {spelt('method.optim.lr', 0.1)}"
            )
        if not 0 <= self.beta2 < 1:
            raise ValueError(
                f"an optimiser needs 0 <= beta2 < 1, got {self.beta2}; give {spelt('method.optim.beta2', 0.999)}"
            )

    def build(self, params: Sequence[Tensor]) -> torch.optim.Optimizer:
        betas = (self.momentum, self.beta2)
        match self.kind:
            case "sgd":
                return torch.optim.SGD(params, lr=self.lr, momentum=self.momentum)
            case "adam":
                return torch.optim.Adam(params, lr=self.lr, betas=betas)
            case "lamb":
                return Lamb(params, self.lr, betas)
            case "adabelief":
                from pytorch_optimizer import AdaBelief

                return AdaBelief(params, lr=self.lr, betas=betas, eps=1e-16, foreach=False)

    @staticmethod
    def restart(optimiser: torch.optim.Optimizer) -> None:
        """Make an optimiser that ``build`` returned begin anew. AdaBelief counts its steps beside its state."""
        optimiser.state.clear()
        for group in optimiser.param_groups:
            group.pop("step", None)

    def lr_at(self, step: int, num_steps: int) -> float:
        """Return the learning rate at a step, counted from 0, of a run of ``num_steps`` steps."""
        return self.schedule.lr_at(self.lr, step, num_steps)

    def content(self) -> dict[str, Any]:
        """Return the fields as stored in recipes and sets, see ``Schedule.optimiser_content``; beta2 if it is not the
        default, because earlier versions did not write it."""
        beta2 = {} if self.beta2 == Optim.beta2 else {"beta2": self.beta2}
        fields = {"kind": self.kind, "lr": self.lr, "momentum": self.momentum}
        return fields | beta2 | self.schedule.optimiser_content()


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al., 2020): Adam's update u, scaled per parameter w by the trust ratio |w| / |u|.

    Both moments are bias-corrected before ``eps`` is added, and the trust ratio is unbounded. It is 1 where w or u is
    zero.
    """

    def __init__(self, params: Sequence[Tensor], lr: float, betas: tuple[float, float], eps: float = 1e-6) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            beta_1, beta_2 = group["betas"]
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state |= {"step": 0, "mean": torch.zeros_like(param), "square": torch.zeros_like(param)}
                state["step"] += 1
                mean, square, step = state["mean"], state["square"], state["step"]
                mean.lerp_(param.grad, 1 - beta_1)
                square.mul_(beta_2).addcmul_(param.grad, param.grad, value=1 - beta_2)
                u = (mean / (1 - beta_1**step)) / ((square / (1 - beta_2**step)).sqrt() + group["eps"])
                ratio = param.norm() / u.norm()
                param.sub_(group["lr"] * torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0) * u)


T = TypeVar("T")


@dataclass(frozen=True)
class Context:
    """What the engine passes to a method: the task, keyed random numbers, and fields of the recipe.

    ``ranks`` are the processes that share the parts of a step. Their number does not affect the result.
    """

    task: Task
    rng: Rng
    ipc: int
    decode: Decode
    labels: Labels
    compute: Compute
    origin: Origin
    artifacts: Mapping[str, Artifact] = field(default_factory=dict)
    """Artifacts opened for ``Method.needs``, by the same names."""
    ranks: Ranks = Ranks()
    objective: Objective = field(default_factory=CrossEntropy)
    """Training objective of the networks of the method."""
    fraction: float | None = None
    """Budget as a fraction of the real images of each class. If it is given, ``ipc`` is the mean over classes."""
    budget: Unit = "floats"
    """What the budget of ``ipc`` images per class counts."""
    ipc_policy: IpcPolicy = "refuse"
    """What happens to a class with fewer real images than ``ipc`` asks for: an error where real images are needed
    (refuse), fewer images in the set (all), or repeated real images (repeat)."""
    first_images: Tensor | None = None
    """Images (n, *input_shape) from which every set of the run begins, grouped by class; None: those of the method."""
    scratch: Path | None = None
    """Folder in which the method may store what would make its state too large; None: a temporary one."""

    @cached_property
    def scratch_folder(self) -> Path:
        """``scratch``, or a temporary folder that is removed together with this object.

        A method writes there before it returns from a step, so that every file is older than the checkpoint that counts
        on it. All processes of a run write the same.
        """
        if self.scratch is None:
            folder = Path(tempfile.mkdtemp(prefix="condense-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            return folder
        with reporting(self.scratch):
            self.scratch.mkdir(parents=True, exist_ok=True)
        return self.scratch

    @cached_property
    def latents_per_class(self) -> int:
        """Number of latents per class within the budget of ``ipc`` images."""
        sizes = self.task.input_shape, self.task.num_classes, self.origin.target_width
        return latents_per_class(self.budget, self.ipc, self.decode, self.labels, *sizes)

    @property
    def images_per_class(self) -> int:
        """Number of decoded images per class: the latents per class times the images decoded from each."""
        return self.latents_per_class * self.decode.expansion

    @cached_property
    def images_of_class(self) -> tuple[int, ...]:
        """Number of decoded images of each class: ``images_per_class``, at most all real ones under the policy ``all``;
        or the fraction of the real images, rounded, at least 1."""
        if self.fraction is None and self.ipc_policy == "all":
            return tuple(min(self.images_per_class, len(members)) for members in self.task.train.by_class)
        if self.fraction is None:
            return (self.images_per_class,) * self.task.num_classes
        return tuple(max(1, round(self.fraction * len(members))) for members in self.task.train.by_class)

    @property
    def classes(self) -> Tensor:
        """The classes of the decoded images of a set, in ascending order."""
        counts = torch.tensor(self.images_of_class, device=self.task.device)
        return torch.arange(self.task.num_classes, device=self.task.device).repeat_interleave(counts)

    def new_set(
        self, images: Tensor, labels: Tensor, *, lr: float | Tensor | None = None, interleave: bool = False
    ) -> SyntheticSet:
        """Create a set with the decoder and the labels of the recipe.

        Args:
            images: (n, *input_shape) in the transformed space, grouped by class: ``images_of_class`` of each.
            labels: labels of the images: classes (n,), logits (n, C), or targets (n, D) of another width.
            lr: initial value of the learned learning rate, if the method learns one.
            interleave: order the latents so that each C consecutive ones hold one of every class.

        Raises:
            ValueError: wrong number or shape of images or labels, or images not grouped by class.
        """
        images = images if self.first_images is None else self.first_images
        self._require_grouped(images, labels)
        copies = self.decode.expansion
        grouped = images.unflatten(0, (-1, copies))
        labels = labels.unflatten(0, (-1, copies))[:, 0]
        decoder = self.new_decoder()
        latents = encoded(
            self.decode,
            grouped.transpose(0, 1).flatten(0, 1),
            self.origin.classes_of(labels),
            decoder,
            self.rng,
        )
        if self.budget == "bits" and latents.shape[1:] != (shape := self.decode.latent_shape(self.task.input_shape)):
            raise ValueError(
                f"decoder {self.decode.name} has latents of shape {tuple(latents.shape[1:])}, but its latent_shape is "
                f"{shape}; correct this, since the bits of a set follow from it"
            )
        if interleave:
            numbers = [torch.arange(num // copies, device=images.device) for num in self.images_of_class]
            order = torch.cat(numbers).argsort(stable=True)
            latents, labels = latents[order], labels[order]
        return SyntheticSet(
            latents, labels, self.origin, decode=self.decode, decoder=decoder, label_kind=self.labels, lr=lr
        )

    def new_decoder(self) -> nn.Module:
        """Return a decoder of the recipe for the transform of the task, on its device."""
        decoder = self.decode.build(self.task.input_shape, self.origin.num_classes or 1).to(self.task.device)
        self.decode.fit(decoder, self.task.transform)
        return decoder

    def _require_grouped(self, images: Tensor, labels: Tensor) -> None:
        """Raise ValueError if the shapes are wrong or the images are not grouped by class."""
        counts, classes = self.images_of_class, self.classes.to(labels.device)
        wanted = (len(classes), *self.task.input_shape)
        if images.shape != wanted:
            each = " or ".join(map(str, sorted({min(counts), max(counts)})))
            raise ValueError(
                f"the images of a new set have shape {tuple(images.shape)}, not {wanted}: each of {len(counts)} "
                f"classes needs {each} images; give ctx.images_of_class images of every class, as ctx.initial does"
            )
        width = self.origin.target_width
        if labels.shape not in (wanted[:1], (wanted[0], width)):
            raise ValueError(
                f"the labels of a new set have shape {tuple(labels.shape)}: {len(images)} images need one class each, "
                f"or targets of width {width}; give shape {wanted[:1]} or {(wanted[0], width)}"
            )
        if labels.dim() == 1 and not torch.equal(labels, classes.to(labels.dtype)):
            raise ValueError(
                f"the classes of a new set are not grouped: the first {counts[0]} images belong to class 0, the next "
                f"ones to class 1, and so on; order the images like this, as ctx.initial does"
            )

    def initial(self, kind: Literal["real", "noise"]) -> tuple[Tensor, Tensor]:
        """Return initial images and classes: ``first_images``, random real images of each class, or standard normal
        noise. Under the policy ``repeat`` a class with too few real images has each of them several times.

        Raises:
            ValueError: a class has fewer real images than needed.
        """
        task, labels = self.task, self.classes
        if self.first_images is not None:
            return self.first_images, labels
        if kind == "noise":
            noise = torch.randn(len(labels), *task.input_shape, generator=self.rng.generator("initial images"))
            return noise.to(task.device), labels
        if self.ipc_policy != "repeat":
            self.require_images(f", or {spelt('ipc_policy', 'repeat')} ({spelt('ipc_policy', 'all')} for a selection)")
        drawn = [task.train.draw(c, n, self.rng("initial images", 0, c)) for c, n in enumerate(self.images_of_class)]
        if self.ipc_policy == "repeat":
            counts = zip(drawn, self.images_of_class, strict=True)
            drawn = [repeated(images, num) for images, num in counts]
        return torch.cat(drawn), labels

    def require_images(self, otherwise: str = "") -> None:
        """Raise ValueError if a class has fewer real images than its part of ``images_of_class``. ``otherwise`` is the
        end of the message: what else mends it."""
        for c, (members, num) in enumerate(zip(self.task.train.by_class, self.images_of_class, strict=True)):
            if len(members) < num and isinstance(self.decode, Coded):
                given, enough = (spelt("decode.images", n, type(self.decode).__name__) for n in (num, len(members)))
                raise ValueError(
                    f"class {self.task.classes[c]!r} has {len(members)} training images, fewer than {given}; give "
                    f"{enough} or less{otherwise}"
                )
            if len(members) < num:
                most = self.ipc * len(members) // num
                raise ValueError(
                    f"class {self.task.classes[c]!r} has {len(members)} training images, {num} are "
                    f"needed for {spelt('ipc', self.ipc)}; give "
                    + (f"{spelt('ipc', most)} or less" if most else f"another {spelt('decode')}")
                    + otherwise
                )

    @cached_property
    def loss_fn(self) -> Callable[[dict[str, Tensor], tuple[Tensor, ...]], Tensor]:
        """The training loss of the network, ``loss_fn(params, (images, targets))``: pure and twice differentiable.

        A third tensor (N, F) in the batch is a mask of the features that the classifier uses.
        """
        network, buffers = self.task.network, self.task.network.init(Rng(0), "buffers").buffers
        objective = self.objective

        def loss_fn(params: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
            images, targets, *mask = batch
            outputs = network.logits(params, buffers, images, True, False, *mask).to(images.dtype)
            return objective.loss(outputs, targets)

        return self.compute.second_order(loss_fn, network.device)

    @cached_property
    def features(self) -> Callable[[dict[str, Tensor], dict[str, Tensor], Tensor], Tensor]:
        """``features(params, buffers, images) -> (N, F)``: features in training mode, differentiable once."""
        network = self.task.network

        def features(params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
            return network.features(params, buffers, images, train=True).float()

        compiled = self.compute.first_order(features, network.device)
        return lambda params, buffers, images: cast(Tensor, compiled(params, buffers, self.compute.layout(images)))

    @cached_property
    def maps(self) -> Callable[[dict[str, Tensor], dict[str, Tensor], Tensor], tuple[list[Tensor], Tensor]]:
        """``maps(params, buffers, images)``: the output of each activation, (N, c, ...), and the features (N, F).

        Otherwise like ``features``.

        Raises:
            ValueError: the network has no feature maps.
        """
        network = self.task.network
        network.require_maps()

        def maps(params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> tuple[list[Tensor], Tensor]:
            seen, features = network.maps(params, buffers, images, train=True)
            return [m.float() for m in seen], features.float()

        compiled = self.compute.first_order(maps, network.device)
        return lambda params, buffers, images: compiled(params, buffers, self.compute.layout(images))

    @cached_property
    def _kept(self) -> dict[tuple[str, int], tuple[State, Any]]:
        return {}

    def kept(self, name: str, state: State, make: Callable[[], T]) -> T:
        """Return what ``make`` returned in the first call with this name and state."""
        key = name, id(state)
        if key not in self._kept:
            self._kept[key] = state, make()  # while the state is held, no other has its id
        return cast(T, self._kept[key][1])

    @property
    def captures(self) -> bool:
        """Whether steps are captured as CUDA graphs. Those of networks with dropout cannot be, since it draws from the
        global generator."""
        return bool(self.compute.graph) and not self.task.network.draws

    def graphed(self, name: str, state: State, fn: Callable[[Any], None]) -> Callable[[int], None]:
        """Return a function of the step, captured as a CUDA graph if the compute policy says so.

        Args:
            name: names the function among those of the method.
            state: the state that it reads and writes, in place.
            fn: the function. Its argument is an int, or a 0-d tensor that may only be used as the step of ``rng``, and
                in sums with ints. Of later calls with this name and state it is ignored.
        """
        if not self.captures:
            return fn
        return self.kept(name, state, lambda: self.graphed_step(name, fn))

    def graphed_step(self, name: str, fn: Callable[[Tensor], None]) -> GraphedStep:
        """Return a step of its own that is captured as a CUDA graph."""
        return GraphedStep(
            fn, self.task.device, name=f"the part {name!r} of a step", compile=bool(self.compute.compile)
        )


Value = float | Tensor
"""A number to log: a float, or a 0-d tensor, which the engine reads later. To read one inside a step is to wait for the
device."""


@dataclass
class State:
    """State of a method between steps.

    Leaves are tensors, modules, optimisers, numbers, strings, None, and lists or dicts of these. ``init`` creates
    the structure and steps change only values, so the engine can save and restore it: modules and optimisers by
    their state dicts, everything else by value.
    """

    syn: SyntheticSet


@dataclass(frozen=True, kw_only=True)
class Method(Checked, ABC):
    """Base class of methods. Subclasses are frozen dataclasses whose fields are the hyper-parameters."""

    num_steps: int = 1
    """Number of distillation steps."""

    learns: ClassVar[bool] = False
    """Whether the set is learned by gradient descent. Other methods select images or compute the set directly."""

    learns_labels: ClassVar[bool] = False
    """Whether the loss depends on the targets, so that soft labels receive a gradient."""

    regresses: ClassVar[bool] = False
    """Whether the loss is a squared error, so that targets need not be probabilities."""

    objectives: ClassVar[tuple[ObjectiveName, ...]] = ("cross-entropy",)
    """Objectives that a recipe may choose. A method may list others only if ``Context.objective`` is its every loss on
    targets."""

    has_teacher: ClassVar[bool] = False
    """Whether the method has trained networks that label the images, as ``teacher`` labels need."""

    selects: ClassVar[bool] = False
    """Whether the method selects real images, so that the budget may be a fraction of each class."""

    private: ClassVar[bool] = False
    """Whether the set is differentially private. Recipes are then refused in which anything else reads the data."""

    has_classes: ClassVar[bool] = True
    """Whether the targets of its sets are classes or scores of them. Otherwise they have the width ``num_outputs``."""

    takes: ClassVar[tuple[Kind, ...]] = ("series", "images", "clips")
    """The kinds of samples that the method distils."""

    fills_budget: ClassVar[bool] = True
    """Whether the set has exactly the budgeted number of samples of each class; else it may have fewer."""

    added_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that earlier versions did not have. At their defaults they are absent from recipes, sets and hashes."""

    family: ClassVar[str] = "other"
    """Heading under which ``condense list methods`` shows the method."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_steps < 1:
            raise ValueError(
                f"method.num_steps must be at least 1, got {self.num_steps}; give {spelt('method.num_steps', 1)}"
            )

    def require_positive(self, *names: str) -> None:
        """Raise ValueError if one of these fields is not positive and finite. The message states its default."""
        for name in names:
            if not 0 < (value := getattr(self, name)) < math.inf:
                wanted = "finite" if value == math.inf else "positive"
                raise ValueError(f"method.{name} must be {wanted}, got {value}; {self._usual(name)}")

    def require_at_least(self, least: float, *names: str) -> None:
        """Raise ValueError if one of these fields is below ``least`` or infinite. The message states its default."""
        for name in names:
            if not least <= (value := getattr(self, name)) < math.inf:
                wanted = "finite" if value == math.inf else f"at least {least:g}"
                raise ValueError(f"method.{name} must be {wanted}, got {value}; {self._usual(name)}")

    def _usual(self, name: str) -> str:
        return f"a usual value is {type(self).__dataclass_fields__[name].default:g}"

    def num_outputs(self, network: str | Factory, input_shape: InputShape, num_classes: int) -> int:
        """Return the number of outputs of the recipe's network, which is the width of the targets of the set."""
        return num_classes

    def needs(self, task: Task) -> Mapping[str, ArtifactSpec]:
        """Return the artifacts that must exist before the run starts, by their names in ``Context.artifacts``.

        Files list the artifacts in the order of these names.
        """
        return {}

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        """Return the estimated work of all steps, in images times forward-backward passes through the network.

        A forward pass alone counts a third, a step that is differentiated twice about four. Small runs are not
        compiled.

        Args:
            num_images: number of training images.
            num_classes: number of classes.
            images_per_class: number of decoded images of the set per class.
        """
        return 0.0

    def total_steps(self, ctx: Context) -> int:
        """Return the number of steps of a run: ``num_steps``, unless the method repeats these for parts of the set."""
        return self.num_steps

    def training(self, task: Task) -> Training:
        """Return how to train networks on the set; stored in its file for the protocol ``own``."""
        return Training()

    def training_network(self, task: Task) -> str:
        """Return the network of this training, by default the one used for distillation."""
        return task.network.name

    def training_augment(self, task: Task) -> Augment:
        """Return the augmentation of this training, by default the one used for distillation without flips."""
        return replace(task.augment, flips=False)

    def incompatibility(
        self, decode: Decode, labels: Labels, transform: str, objective: ObjectiveName = "cross-entropy"
    ) -> str | None:
        """Return why the method cannot be used with this decoder, labels, transform or objective, and what to give
        instead; None if it can."""
        if objective not in self.objectives or OBJECTIVES[objective].needs_teacher:
            return f"does not take the objective {objective}; give {spelt('objective', 'cross-entropy')}, the default"
        if labels.learned and not self.learns_labels:
            return f"gives labels no gradient: {labels.name} would never change; give {spelt('labels', 'hard')}"
        if labels.space == "values" and not self.regresses and not OBJECTIVES[objective].takes_values:
            return f"trains with {objective}, which cannot use {labels.name}; give {spelt('labels', 'logits')}"
        if labels.of_views:
            return (
                f"does not label views: {labels.name} labels are given to a finished set; give "
                f"{spelt('labels', 'hard')}, and label the set with `condense relabel`"
            )
        if labels.name == "teacher" and not self.has_teacher:
            return f"has no trained network that could label the images; give {spelt('labels', 'hard')}"
        if not decode.differentiable and self.learns:
            return f"learns the images, which {decode.name} would round in every step; give {spelt('decode', 'pixels')}"
        if not decode.differentiable and transform not in ("none", "channel"):
            return f"cannot round images whitened by {transform} to {decode.name}; give {spelt('transform', 'channel')}"
        if isinstance(decode, Patches) and not self.selects:
            return (
                f"selects no real images, of which {decode.name} would drop what matters least; give "
                f"{spelt('decode', 'pixels-8bit')}"
            )
        if decode.makes_pixels and transform not in ("none", "channel"):
            fix = spelt("transform", "channel")
            return f"cannot whiten the pixels that {decode.name} makes by {transform}; give {fix}"
        if isinstance(decode, Coded) and self.learns and not isinstance(self, GradientMethod):
            return (
                f"adds no rate to its loss, which decides the bits of {decode.name}; give {spelt('decode', 'pixels')}"
            )
        if isinstance(decode, StaticDynamic) and decode.stills and not self.learns:
            fix = spelt("decode.stills", None, "StaticDynamic")
            return f"takes real clips and learns nothing, so that distilled stills would have no use; give {fix}"
        is_noise = getattr(self, "start", "real") == "noise" and not self.private
        if is_noise and isinstance(decode, StaticDynamic) and decode.stills is None:
            return (
                f"starts from noise, and the stills of {decode.name} never change; give "
                f"{spelt('decode.stills', 'RUN', 'StaticDynamic')}, or {spelt('method.start', 'real')}"
            )
        return None

    def privacy(self) -> Mapping[str, Any]:
        """Return the guarantee of a private method as JSON values, for files: epsilon, delta, the standard deviation of
        the noise (noise_multiplier), releases and rate; an empty mapping for other methods."""
        return {}

    def parts(self, ctx: Context) -> Sequence[int]:
        """Return the parts of one step (classes, trajectories), fixed by the recipe; empty if it cannot be divided."""
        return ()

    @abstractmethod
    def init(self, ctx: Context) -> State:
        """Return the state before the first step: the set with its initial images, and what the steps change."""

    @abstractmethod
    def step(self, ctx: Context, state: Any, step: int) -> Mapping[str, Value]:
        """Advance ``state`` by one step (counted from 0) and return the values to log. The engine reads those that are
        tensors, and ends the run if one is not finite."""

    def finalize(self, ctx: Context, state: Any, steps: int) -> SyntheticSet:
        """Return the set to store after ``steps`` steps, 0 for the start. The state must not change."""
        return cast(SyntheticSet, state.syn)


@dataclass(kw_only=True)
class GradientState(State):
    optimisers: dict[str, torch.optim.Optimizer]
    """Optimisers by leaf."""
    learned: nn.ParameterDict = field(default_factory=nn.ParameterDict)
    """Parameters that the method learns in addition to the set, each a leaf of its own."""
    average: dict[str, Tensor] = field(default_factory=dict)
    """Exponential moving average of the leaves of the set, without bias correction; empty if ``ema`` is unset."""

    def leaves(self) -> dict[str, list[nn.Parameter]]:
        """Return the learnable leaves of the set and the additional learned parameters."""
        return self.syn.leaves() | {name: [param] for name, param in self.learned.items()}


Loss = Tensor | tuple[Tensor, Mapping[str, Tensor]]
"""The loss, a scalar; or (loss, terms), where terms are named scalars that are logged separately."""

MAX_TERMS = 16
"""Maximum number of terms of a loss. All processes reduce this many numbers, since a process without parts does not
know the names of the terms."""


@dataclass(frozen=True, kw_only=True)
class GradientMethod(Method):
    """Base class of methods that learn the set by gradient descent.

    ``step`` is final: a subclass defines the ``parts`` of a step, their ``loss`` and what follows ``after`` the update.
    """

    learns: ClassVar[bool] = True
    learns_labels: ClassVar[bool] = True

    terms: ClassVar[tuple[str, ...]] = ()
    """Names of all terms of the loss. Needed only if ``update`` reads terms, since a process without parts has no other
    way to know the names."""

    optim: Optim = Optim()
    """Optimiser of the images (latents)."""
    optim_labels: Optim = Optim(lr=1.0, momentum=0.9)
    """Optimiser of the learned labels."""
    optim_decoder: Optim = Optim()
    """Optimiser of the parameters of the decoder."""
    optim_lr: Optim = Optim(lr=1e-3)
    """Optimiser of the logarithm of the learned learning rate."""
    clip: float | None = None
    """Maximum norm of the gradient of the images (gradient clipping); unset turns clipping off."""
    ema: float | None = None
    """Decay of an exponential moving average of the set, which is stored in place of the set; unset turns it off."""
    clamp: bool = False
    """Clamp pixels to [0, 1] after each step; has no effect on series."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"method.ema must be between 0 and 1, got {self.ema}; try 0.999")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(
                f"method.clip must be above 0, got {self.clip}: it is a norm; to turn clipping off, give "
                f"{spelt('method.clip', None)}"
            )

    def incompatibility(
        self, decode: Decode, labels: Labels, transform: str, objective: ObjectiveName = "cross-entropy"
    ) -> str | None:
        if self.clamp and not decode.stores_pixels:
            return f"cannot clamp pixels that {decode.name} does not store; give {spelt('method.clamp', False)}"
        if self.clamp and transform not in ("none", "channel"):
            return f"cannot clamp pixels whitened by {transform}; give {spelt('method.clamp', False)}"
        return super().incompatibility(decode, labels, transform, objective)

    def optims(self) -> dict[str, Optim]:
        """Return the optimiser of each leaf."""
        return {
            "latents": self.optim,
            "labels": self.optim_labels,
            "decoder": self.optim_decoder,
            "lr": self.optim_lr,
        }

    def optimisers(
        self, syn: SyntheticSet, learned: nn.ParameterDict | None = None
    ) -> dict[str, torch.optim.Optimizer]:
        """Build one optimiser per leaf of the set and per additional learned parameter."""
        plans, leaves = self.optims(), syn.leaves()
        leaves |= {name: [param] for name, param in (learned or {}).items()}
        return {leaf: plans[leaf].build(params) for leaf, params in leaves.items()}

    def parts(self, ctx: Context) -> Sequence[int]:
        """Return the parts that are sharded over the processes."""
        return (0,)

    @abstractmethod
    def loss(self, ctx: Context, state: Any, step: Any, part: int) -> Loss:
        """Return the loss of one part, a scalar. The loss of the step is the sum over all parts.

        It may be returned with its terms, ``(loss, {"alignment": ..., "margin": ...})``: at most ``MAX_TERMS`` scalars
        with the same names in every part. They are summed over parts and logged as ``loss_alignment`` and
        ``loss_margin``; no gradient is computed of them.
        """

    def parts_at_once(self, ctx: Context) -> int:
        """Return how many parts ``losses`` receives at once; limited by memory. It only affects rounding and the random
        numbers of layers such as dropout."""
        return 1

    def losses(self, ctx: Context, state: Any, step: Any, parts: Sequence[int]) -> Loss:
        """Return the sum of the losses of several parts. Override it if they are faster to compute together."""
        values, terms = zip(*(_with_terms(self.loss(ctx, state, step, part)) for part in parts), strict=True)
        names = dict.fromkeys(name for each in terms for name in each)
        return torch.stack(values).sum(), {
            name: torch.stack([each[name] for each in terms if name in each]).sum() for name in names
        }

    def graphs(self, ctx: Context) -> bool:
        """Whether ``losses`` can be captured as a CUDA graph: the step may then be a tensor and is used only to draw
        and in ``from_host``, nothing is read from the device, and the tensors of the state stay in place."""
        return False

    def update(self, state: Any, record: dict[str, Value]) -> None:
        """Clip the gradient of the images and step all optimisers. Every process has all gradients.

        Methods may override this.

        Args:
            record: values to log, to which entries may be added: ``loss``, its terms, and for each leaf the norm
                ``grad_NAME`` of its gradient, all as tensors, and its learning rate ``lr_NAME``. Whether they are
                finite is found out when the engine reads them.
        """
        if self.clip is not None:
            clip_grad(state.syn.latents, record["grad_latents"], self.clip)
        for optimiser in state.optimisers.values():
            optimiser.step()

    def after(self, ctx: Context, state: Any, step: int) -> Mapping[str, Value] | None:
        """Run what follows the update, e.g. train a student or replace a network. Return additional values to log."""
        return None

    @final
    def step(self, ctx: Context, state: Any, step: int) -> dict[str, Value]:
        record = self._differentiate(ctx, state, step)
        try:
            self._advance(ctx, state, step, record)
        except Exception:
            require_finite(record)  # a number that is not finite is the cause of what fails after it
            raise
        return record

    def _differentiate(self, ctx: Context, state: Any, step: int) -> dict[str, Value]:
        """Compute the gradients of all leaves; return the loss, its terms and the norms of the gradients."""
        leaves = state.leaves()
        gradients = ctx.kept("gradients", state, lambda: _Gradients(self, ctx, state))
        gradients(step)
        total, names = gradients.total, gradients.names
        rates = {} if gradients.rate is None else {"rate": gradients.rate}
        ctx.ranks.all_reduce_([*(cast(Tensor, param.grad) for param in gradients.params), total, *rates.values()])
        values = {"loss": total[0]} | {f"loss_{name}": value for name, value in zip(names, total[1:], strict=False)}
        values |= rates | {f"grad_{name}": _norm(params) for name, params in leaves.items()}
        numbers = torch.stack(list(values.values())).to(dtype_of_numbers(ctx.task.device))
        return dict(zip(values, numbers.unbind(), strict=True))

    def _advance(self, ctx: Context, state: Any, step: int, record: dict[str, Value]) -> None:
        """Update all leaves, and do what follows."""
        plans = self.optims()
        for name, optimiser in state.optimisers.items():
            record[f"lr_{name}"] = rate = plans[name].lr_at(step % self.num_steps, self.num_steps)
            set_lr(optimiser, rate)
        self.update(state, record)
        with torch.no_grad():
            if self.clamp and kind(ctx.task.input_shape) in ("images", "clips"):
                latents = state.syn.latents
                low, high = (ctx.task.transform(torch.full_like(latents[:1], end)) for end in (0.0, 1.0))
                latents.clamp_(low, high)
            if self.ema is not None:
                for name, param in state.syn.named_parameters():
                    mean = state.average.get(name, torch.zeros_like(param)).to(param.device)
                    state.average[name] = torch.lerp(param, mean, self.ema)
        if state.syn.lr is not None:
            record["syn_lr"] = state.syn.lr.detach().mean()
        record |= self.after(ctx, state, step) or {}

    def finalize(self, ctx: Context, state: Any, steps: int) -> SyntheticSet:
        if self.ema is None or not steps:
            return cast(SyntheticSet, state.syn)
        averaged: SyntheticSet = copy.deepcopy(state.syn)
        weight = 1 - self.ema**steps
        averaged.load_state_dict({name: mean / weight for name, mean in state.average.items()}, strict=False)
        return averaged


class _Gradients:
    """Computes the gradients of all leaves, and the loss with its terms, summed over the parts of this process.

    All results stay in place: the gradients in ``grad`` of the parameters, the loss and its terms in ``total``. If the
    decoder has an entropy code, the gradients include those of its penalty, and ``rate`` is the rate in bits per pixel;
    in all processes but the first they do not, and it is 0.
    """

    def __init__(self, method: GradientMethod, ctx: Context, state: GradientState) -> None:
        self._method, self._ctx, self._state = method, ctx, state
        self.params = [param for group in state.leaves().values() for param in group]
        for param in self.params:
            param.grad = torch.zeros_like(param)
        self.total = torch.zeros(1 + MAX_TERMS, device=ctx.task.device)
        coded = isinstance(state.syn.decode, Coded)
        self.rate = torch.zeros((), device=ctx.task.device) if coded else None
        self.names = [*sorted(method.terms), *map(str, range(len(method.terms), MAX_TERMS))]
        """Names of the terms; in a process without parts those of ``method.terms``, and placeholders."""
        graph = ctx.captures and method.graphs(ctx)
        self._run: Callable[[Any], None] = ctx.graphed_step("gradients", self._compute) if graph else self._compute

    def __call__(self, step: int) -> None:
        self._run(step)

    def _compute(self, step: int | Tensor) -> None:
        for tensor in (self.total, *(cast(Tensor, param.grad) for param in self.params)):
            tensor.zero_()
        syn, ctx = self._state.syn, self._ctx
        if not isinstance(syn.decode, Coded):
            return self._sum_over_parts(step)
        num_steps, rate = self._method.num_steps, cast(Tensor, self.rate).zero_()
        progress = step % num_steps / num_steps
        relaxed = syn.decode.relaxed(syn.latents, ctx.rng("quantisation", step), progress)
        decoded = relaxed.detach().requires_grad_()
        decoded.grad = torch.zeros_like(decoded)
        with syn.decoding(decoded):
            self._sum_over_parts(step)
        if not ctx.ranks.first:
            return relaxed.backward(decoded.grad)
        rates = syn.decode.rates(relaxed, syn.classes, syn.decoder)
        torch.autograd.backward(
            (relaxed, rates), (decoded.grad, torch.ones_like(rates) * syn.decode.weight_at(progress))
        )
        rate.copy_(rates.detach().mean())

    def _sum_over_parts(self, step: int | Tensor) -> None:
        method, ctx, total = self._method, self._ctx, self.total
        parts, at_once = ctx.ranks.shard(method.parts(ctx)), method.parts_at_once(ctx)
        for first in range(0, len(parts), at_once):
            with ctx.rng.forked("layers of a part", step, parts[first]):  # same dropout masks for any sharding
                loss, terms = _with_terms(method.losses(ctx, self._state, step, parts[first : first + at_once]))
                if not loss.requires_grad:
                    raise ValueError("the loss has no gradient; compute it from what state.syn() returns")
                loss.backward()
            if first and sorted(terms) != self.names:
                raise ValueError(
                    f"the parts of a loss have different terms, {', '.join(sorted(terms))} and "
                    f"{', '.join(self.names)}: each term is summed over all parts; return the same names for every part"
                )
            self.names = sorted(terms)
            total[0] += loss.detach()
            if terms:
                total[1 : 1 + len(terms)] += torch.stack([terms[name].detach().to(total) for name in self.names])


def repeated(rows: Tensor, num: int) -> Tensor:
    """Return the first ``num`` rows (num, ...) of a tensor (n, ...), which begins again after its last row."""
    return rows[torch.arange(num, device=rows.device) % len(rows)]


def require_finite(record: Mapping[str, Value]) -> None:
    """Raise FloatingPointError, with the whole record, if a value is not finite. Waits for the device."""
    if not all(map(math.isfinite, record.values())):
        raise FloatingPointError(", ".join(f"{name}={value:g}" for name, value in record.items()))


def dtype_of_numbers(device: torch.device) -> torch.dtype:
    """Return the type of the numbers of a step: float64, as in Python; float32 on mps, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def clip_grad(param: nn.Parameter, norm: Value, max_norm: Value) -> None:
    """Scale the gradient of ``param``, whose norm is ``norm``, to at most ``max_norm``; one of both is a tensor."""
    cast(Tensor, param.grad).mul_(cast(Tensor, max_norm / norm).clamp(max=1))


def _with_terms(loss: Loss) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Return a loss and its terms. Raises ValueError if it has another form or too many terms."""
    given: Any = loss  # a method of another package may return anything
    value, terms = given if isinstance(given, tuple) and len(given) == 2 else (given, {})
    if not isinstance(value, Tensor) or not isinstance(terms, Mapping):
        raise ValueError(f"a loss is {brief(loss)}; return a tensor, or (tensor, {{name: tensor}})")
    if len(terms) > MAX_TERMS:
        raise ValueError(f"a loss has {len(terms)} terms, but at most {MAX_TERMS} can be logged; return fewer terms")
    return value, terms


def _norm(params: Sequence[Tensor]) -> Tensor:
    return torch.stack([cast(Tensor, p.grad).norm() for p in params]).norm()
