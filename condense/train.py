"""The training loop shared by expert trajectories, students between matching steps, and evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from condense.augment import Augment
from condense.compute import Compute
from condense.cudagraph import Graphed
from condense.data.images import Images
from condense.data.layout import InputShape, require_kind
from condense.names import spelt
from condense.networks import Functional, Weights
from condense.objective import (
    KL,
    OBJECTIVES,
    CrossEntropy,
    Distillation,
    Gift,
    Objective,
    ObjectiveName,
    SquaredDistillation,
)
from condense.rng import Rng
from condense.schedule import DROP_AT_HALF, Schedule
from condense.schema import Checked
from condense.sources import Batch, Examples, Source
from condense.views import Views

Tensors = dict[str, Tensor]
BatchLoss = Callable[[bool], Tensor]
"""``loss(update)``: the loss of a batch at the current weights; ``update``: running statistics are updated."""


MakeOptimiser = Callable[[Tensors], torch.optim.Optimizer]
"""Returns the optimiser of some parameters."""


@dataclass(frozen=True, kw_only=True)
class Training(Checked):
    """Hyperparameters of a training. With the data, the initial weights and the seed they determine its result.

    The training loop reads the fields of the optimiser, the schedule and the loss. ``batch_size``, ``order``,
    ``cutmix`` and ``mixup`` describe the batches, so that a set can record them; ``Trainer.source`` makes a source of
    them.
    """

    num_epochs: int = 300
    """Number of training epochs."""
    batch_size: int = 256
    """Images per batch; the last batch of an epoch may be smaller."""
    lr: float = 0.01
    """Base learning rate of the training."""
    momentum: float = 0.9
    """Momentum of sgd; beta1 of adam and adamw."""
    weight_decay: float = 5e-4
    """Weight decay: an L2 penalty for sgd and adam, decoupled from the gradient for adamw."""
    schedule: Schedule = DROP_AT_HALF
    """Learning rate schedule of the training; the momentum is kept when the learning rate drops."""
    loss: ObjectiveName = "cross-entropy"
    """Training loss. mse: half the squared distance to the targets, summed over their width and averaged over images.
    kl: KL divergence between the targets and the softmax at ``temperature``. cosine: one minus the cosine similarity of
    outputs and targets. gift: the same with a teacher's logits that the class corrects. distillation: a weighted sum of
    the divergence from a teacher at ``temperature`` and of the cross-entropy of the classes. mse-distillation: mse to
    the logits of a teacher, plus ``class_weight`` times the cross-entropy of the classes."""
    optimiser: Literal["sgd", "adam", "adamw"] = "sgd"
    """Optimiser of the training."""
    order: Literal["shuffled", "stored"] = "shuffled"
    """Order of the images. shuffled: a new order in each epoch. stored: the order in which the set stores them."""
    cutmix: float = 0.0
    """Probability of CutMix in a batch: a rectangle of each image is replaced by that of another image, and the labels
    are mixed in proportion (Yun et al. 2019, beta 1)."""
    mixup: float = 0.0
    """Alpha of the beta distribution of the MixUp weights (Zhang et al. 2018); 0: no MixUp."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy, and of the class in gift: the fraction of each target that is spread evenly
    over all classes."""
    temperature: float = 1.0
    """Softmax temperature of the losses kl and distillation, for the logits of the network and of a teacher."""
    teacher_weight: float = 0.5
    """Weight of the divergence from the teacher in the loss distillation; the cross-entropy has the rest."""
    class_weight: float = 1.0
    """Weight of the cross-entropy of the classes in the loss mse-distillation."""
    rho: float = 0.0
    """Radius of the ascent step of adaptive GSAM, see ``sharpness_aware``; 0: plain gradients."""
    alpha: float = 0.0
    """GSAM's weight of the component of the plain gradient that is orthogonal to the perturbed gradient."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_epochs < 0 or self.batch_size < 1 or not 0 < self.lr < math.inf:
            raise ValueError(
                f"training needs num_epochs >= 0, batch_size >= 1 and a finite lr > 0, got {self.num_epochs}, "
                f"{self.batch_size} and {self.lr}; correct these fields"
            )
        if not 0 <= self.momentum < 1 or not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"training needs 0 <= momentum < 1 and a finite weight_decay >= 0, got {self.momentum} and "
                f"{self.weight_decay}; usual values are 0.9 and 0.0005"
            )
        for name, usual in {"cutmix": 0.5, "label_smoothing": 0.1, "teacher_weight": 0.5}.items():
            if not 0 <= getattr(self, name) <= 1:
                value = getattr(self, name)
                raise ValueError(f"training needs a {name} between 0 and 1, got {value}; a usual value is {usual}")
        if not 0 <= self.mixup < math.inf or not 0 < self.temperature < math.inf:
            raise ValueError(
                f"training needs a finite mixup >= 0 and a finite temperature > 0, got {self.mixup} and "
                f"{self.temperature}; usual values are 0.2 and 20"
            )
        if not 0 <= self.class_weight < math.inf:
            raise ValueError(f"training needs a finite class_weight >= 0, got {self.class_weight}; try 1.0")
        if not 0 <= self.rho < math.inf or not math.isfinite(self.alpha) or (self.alpha and not self.rho):
            raise ValueError(
                f"training needs a finite rho >= 0 and alpha, and rho > 0 where alpha is given, got {self.rho} and "
                f"{self.alpha}; the values of FTD's experts are 0.01 and 0.4"
            )

    def content(self) -> dict[str, Any]:
        """Return the fields for hashes and files, with the schedule as flat fields. Fields that were added after the
        first results were written are omitted at their default, so that the hashes of those results stay the same."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "schedule":
                values |= self.schedule.content()
            elif field.name in _FIRST_FIELDS or value != field.default:
                values[field.name] = value
        return values

    def require_kind(self, input_shape: InputShape, within: str = "") -> None:
        """Raise ValueError if samples of this shape would be mixed and cannot be. ``within`` begins the names of the
        fields in the message, such as ``protocol.``."""
        for name in ("cutmix", "mixup"):
            if getattr(self, name):
                require_kind(name, ("series", "images", "clips"), input_shape, f"give {spelt(within + name, 0)}")

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, counted from 0 through all epochs."""
        return self.schedule.lr_at(self.lr, step, self.num_epochs * steps_per_epoch, steps_per_epoch)

    def optimise(self, params: Tensors, velocity: Tensors | None = None) -> torch.optim.Optimizer:
        """Return the optimiser of these parameters.

        ``velocity`` continues a training with sgd: it is the momentum buffer of each parameter, updated in place.
        """
        decay, first = self.weight_decay, next(iter(params.values()))
        fused = first.is_cuda
        lr = torch.tensor(self.lr, device=first.device) if fused else self.lr
        if self.optimiser != "sgd":
            kind = torch.optim.Adam if self.optimiser == "adam" else torch.optim.AdamW
            return kind(params.values(), lr=lr, betas=(self.momentum, 0.999), weight_decay=decay, fused=fused)
        sgd = torch.optim.SGD(params.values(), lr=lr, momentum=self.momentum, weight_decay=decay, fused=fused)
        for name, buffer in (velocity or {}).items():
            sgd.state[params[name]]["momentum_buffer"] = buffer
        return sgd

    @property
    def objective(self) -> Objective:
        """The objective that ``loss`` names, with its parameters."""
        match self.loss:
            case "cross-entropy":
                return CrossEntropy(label_smoothing=self.label_smoothing)
            case "kl":
                return KL(temperature=self.temperature)
            case "distillation":
                return Distillation(temperature=self.temperature, weight=self.teacher_weight)
            case "mse-distillation":
                return SquaredDistillation(class_weight=self.class_weight)
            case "gift":
                return Gift(label_smoothing=self.label_smoothing)
        return OBJECTIVES[self.loss]()


_FIRST_FIELDS = "num_epochs batch_size lr momentum weight_decay loss name augment labels".split()
"""Fields of ``Training``, and of the protocols made of it, that ``content`` always writes."""


class Trainer:
    """Trains networks of one architecture; its compiled functions are reused from one network to the next."""

    def __init__(
        self,
        network: Functional,
        training: Training,
        compute: Compute,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        """``loss(outputs, targets)`` replaces the loss of ``training``; it returns the mean loss of a batch.

        Raises:
            ValueError: the training mixes samples that cannot be mixed.
        """
        training.require_kind(network.input_shape)
        self.network, self.training, self.compute = network, training, compute
        loss_of = loss or training.objective.loss

        def loss_fn(params: Tensors, buffers: Tensors, images: Tensor, targets: Tensor, update: bool) -> Tensor:
            outputs = network.logits(params, buffers, images, train=True, update_buffers=update)
            return loss_of(outputs.to(images.dtype), targets)

        self._loss = compute.first_order(loss_fn, network.device)

    def source(
        self,
        images: Tensor | Images,
        targets: Tensor,
        rng: Rng,
        augment: Augment = Augment(),
        weights: Tensor | None = None,
    ) -> Examples:
        """Return a source of ``images`` (N, *input_shape) and ``targets`` (N,) or (N, num_outputs), with the batch
        size, order, CutMix and MixUp of ``training``. All draws are keyed by ``rng``, epoch and batch. With ``weights``
        (N,) images are drawn in proportion to these."""
        plan = self.training
        return Examples(
            images,
            targets,
            rng,
            batch_size=plan.batch_size,
            num_classes=self.network.num_outputs,
            order=plan.order,
            views=Views(augment=augment, cutmix=plan.cutmix, mixup=plan.mixup),
            weights=weights,
        )

    def run(
        self,
        weights: Weights,
        source: Source,
        *,
        optimiser: MakeOptimiser | None = None,
        on_epoch: Callable[[int, Weights], None] | None = None,
    ) -> Weights:
        """Train a copy of ``weights`` on the batches of ``source``.

        Args:
            optimiser: returns the optimiser of the trained parameters, for a training that is continued or has its own
                update rule; default: ``training.optimise``.
            on_epoch: ``on_epoch(epochs_done, weights)`` is called after each epoch. The weights change later: clone
                what you keep.

        Raises:
            ValueError: a batch has one image, which BatchNorm cannot normalise.
        """
        each = None if on_epoch is None else lambda epochs, live: on_epoch(epochs, live[0])
        return self.run_together([weights], [source], optimiser=optimiser, on_epoch=each)[0]

    def run_together(
        self,
        weights: Sequence[Weights],
        sources: Sequence[Source],
        *,
        optimiser: MakeOptimiser | None = None,
        on_epoch: Callable[[int, Sequence[Weights]], None] | None = None,
    ) -> list[Weights]:
        """Train several networks side by side, each on its own source; all sources have equally many batches.

        On a GPU each network has a stream, so that kernels of several networks run at the same time. The results equal
        those of ``run`` for each network, except with dropout.
        """
        plan, num_batches, rng = self.training, sources[0].num_batches, sources[0].rng
        with (
            self.compute.arithmetic(),
            contextlib.nullcontext() if rng is None else rng.forked("layers"),  # dropout of external networks
        ):
            lanes = [
                _Lane(self, one, source, optimiser or plan.optimise, alone=len(weights) == 1)
                for one, source in zip(weights, sources, strict=True)
            ]
            for epoch in range(plan.num_epochs):
                for index in range(num_batches):
                    lr = plan.lr_at(epoch * num_batches + index, num_batches)
                    for lane in lanes:
                        lane.step(epoch, index, lr)
                if on_epoch is not None:
                    with _waiting(lanes):
                        on_epoch(epoch + 1, [lane.live for lane in lanes])
            with _waiting(lanes):
                return [lane.finish() for lane in lanes]

    def batch_loss(self, live: Weights, batch: Batch) -> BatchLoss:
        """Return the loss of a batch at the weights ``live``."""
        return functools.partial(self._loss, *live, self.compute.layout(batch.images), batch.targets)


class _Lane:
    """A network in training, with its optimiser and its source, and on a GPU with its stream."""

    def __init__(
        self, trainer: Trainer, weights: Weights, source: Source, optimiser: MakeOptimiser, *, alone: bool
    ) -> None:
        self._trainer, self._source, device = trainer, source, trainer.network.device
        params = {name: p.detach().clone().requires_grad_() for name, p in weights.params.items()}
        self.live = Weights(params, {name: b.detach().clone() for name, b in weights.buffers.items()})
        self._optimiser = optimiser(params)
        self.stream = None if alone or device.type != "cuda" else torch.cuda.Stream(device)
        self.follow()
        self._graphs: _Graphs | None = None
        if trainer.compute.graph and source.on_device:
            compiles = bool(trainer.compute.compile)
            self._graphs = _Graphs(self._step, self._optimiser, source.num_batches, device, compile=compiles)

    def step(self, epoch: int, index: int, lr: float) -> None:
        """Take one step on a batch."""
        with contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            if index == 0:
                self._source.begin(epoch)
            if self._graphs is None:
                set_lr(self._optimiser, lr)
                self._step(epoch, index)
            else:
                self._graphs(epoch, index, lr)

    def finish(self) -> Weights:
        """Return the weights, without requiring grad, and free the graphs with their memory."""
        self._graphs = None
        return Weights({name: p.detach() for name, p in self.live.params.items()}, self.live.buffers)

    def follow(self) -> None:
        """Let the stream wait for the current one."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))

    def precede(self) -> None:
        """Let the current stream wait for that of the network."""
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def _step(self, epoch: int | Tensor, index: int | Tensor) -> None:
        plan = self._trainer.training
        batch = self._source.batch(epoch, index)
        loss = self._trainer.batch_loss(self.live, batch)
        self._optimiser.zero_grad(set_to_none=True)
        try:
            loss(True).backward()
        except (ValueError, RuntimeError) as error:
            if len(batch.images) != 1 or "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                f"{self._trainer.network.name} cannot be trained on a batch of one image, which its BatchNorm cannot "
                f"normalise, and batch size {plan.batch_size} leaves such a batch; give another batch size, or a "
                "network without BatchNorm"
            ) from error
        if plan.rho:
            sharpness_aware(self._optimiser.param_groups[0]["params"], loss, plan.rho, plan.alpha)
        self._optimiser.step()


@contextlib.contextmanager
def _waiting(lanes: Sequence[_Lane]) -> Iterator[None]:
    """In the context the current stream sees the weights of all networks, and their streams wait for what it does."""
    for lane in lanes:
        lane.precede()
    yield
    for lane in lanes:
        lane.follow()


class _Graphs:
    """The steps of a training as CUDA graphs: one for the last batch of an epoch, which may be smaller, and one for
    all others."""

    def __init__(
        self,
        step: Callable[[int | Tensor, int | Tensor], None],
        optimiser: torch.optim.Optimizer,
        num_batches: int,
        device: torch.device,
        compile: bool,  # noqa: A002
    ) -> None:
        epoch, index = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
        self._epoch, self._index = epoch, index
        (group,) = optimiser.param_groups
        group["lr"] = self._lr = torch.as_tensor(group["lr"], device=device)
        self._last = last = num_batches - 1
        self._values = (-1, -1.0)
        graphed = functools.partial(Graphed, device=device, name="a training step", compile=compile)
        self._step, self._last_step = graphed(lambda: step(epoch, index)), graphed(lambda: step(epoch, last))

    def __call__(self, epoch: int, index: int, lr: float) -> None:
        if self._values != (epoch, lr):
            self._epoch.fill_(epoch)
            self._lr.fill_(lr)
            self._values = epoch, lr
        if index == self._last:
            self._last_step()
        else:
            self._index.fill_(index)
            self._step()


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the first group of an optimiser; in place if it is a tensor, on any device."""
    group = optimiser.param_groups[0]
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def sharpness_aware(params: Sequence[Tensor], objective: BatchLoss, rho: float, alpha: float) -> None:
    """Replace the gradient g of a batch at the weights w by the gradient of adaptive GSAM.

    Zhuang et al. (2022), "Surrogate Gap Minimization Improves Sharpness-Aware Training", with the adaptive ascent step
    of Kwon et al. (2021), as FTD trains its experts. The perturbed gradient h is that of the same batch at
    ``w + rho w^2 g / |w g|`` (elementwise squares and products, norms over all weights). The new gradient
    is ``h - alpha (g - (g.h / h.h) h)``.

    Args:
        params: the weights w, whose ``grad`` is g; those without one are left out. Their values stay the same.
        objective: the loss of the batch.
        rho, alpha: as in ``Training``.
    """

    def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()

    params = [p for p in params if p.grad is not None]
    with torch.no_grad():
        before, g = [p.clone() for p in params], [cast(Tensor, p.grad) for p in params]
        adapted = [x * y for x, y in zip(before, g, strict=True)]
        scale = rho / (inner(adapted, adapted).sqrt() + 1e-12)
        for p, x, y in zip(params, before, adapted, strict=True):
            p.add_(scale * x * y)
            p.grad = None
    objective(False).backward()
    with torch.no_grad():
        h = [cast(Tensor, p.grad) for p in params]
        coefficient = inner(g, h) / inner(h, h).clamp(min=torch.finfo(h[0].dtype).tiny)
        for p, old, x, y in zip(params, before, g, h, strict=True):
            p.copy_(old)
            p.grad = y - alpha * (x - coefficient * y)


class Scorer:
    """Computes logits and accuracies (fractions) of networks of one architecture."""

    def __init__(self, network: Functional, compute: Compute, batch_size: int = 1000) -> None:
        self.batch_size, self.compute = batch_size, compute

        def logits(params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
            return network.logits(params, buffers, images, train=False).float()

        self._logits = compute.first_order(logits, network.device)

    @torch.no_grad()
    def logits(self, weights: Weights, images: Tensor | Images) -> Tensor:
        """Return the logits (N, num_outputs), float32, of samples (N, *input_shape)."""
        batches = images.split(self.batch_size)
        return torch.cat([self._logits(*weights, self.compute.layout(x)) for x in batches])

    def accuracy(self, weights: Weights, images: Tensor | Images, labels: Tensor) -> float:
        """Return the fraction of samples whose predicted class is their label; ``labels`` is (N,)."""
        return float((self.logits(weights, images).argmax(1) == labels).sum()) / len(labels)
