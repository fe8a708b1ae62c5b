"""Train networks on the real data: experts, with a snapshot of the weights after every epoch, or teachers, with the
last snapshot only.

Cazenavette et al., "Dataset Distillation by Matching Training Trajectories", CVPR 2022: experts are ConvNets
trained with plain SGD (learning rate 0.01, batches of 256, no momentum) under DSA with one draw per image. Snapshots
are copied, because on a CPU ``p.detach().cpu()`` shares its memory with the weights in training, and every snapshot
would end up as the last epoch.

Each expert draws its initialisation, batch order and augmentation from its own keys. A buffer can therefore grow
without changing the existing experts, an interrupted build continues with the next expert, and an expert trained for
longer starts with the same epochs. This does not hold for a schedule that depends on the length of the training, such
as a cosine; the number of epochs is then part of the buffer's identity.

Networks can also be trained without labels (``Experts.objective``), as teachers whose features are used. A projector
replaces the classifier during the training and is dropped afterwards: the buffer holds the weights of the network, with
the classifier at its initial values.
"""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from condense.artifacts import BufferWriter, Keep, TrainedNetworks, Trajectories, identities, pack
from condense.augment import Augment
from condense.compute import Compute
from condense.data.images import Images
from condense.data.layout import kind
from condense.distributed import Ranks
from condense.names import spelt
from condense.networks import Functional, Weights, without_projector
from condense.probe import ridge_probe
from condense.rng import VERSION, Rng
from condense.schedule import CONSTANT, Schedule
from condense.schema import Checked
from condense.self_supervision import SELF_SUPERVISION
from condense.sources import Pairs, Source
from condense.task import Task
from condense.train import Scorer, Trainer, Training
from condense.views import Views

MAX_SCORED = 5000
"""The maximum number of training images on which accuracies are measured."""

Progress = Callable[[int, int, Mapping[str, float]], None]
"""(expert, epochs done, accuracies or losses): called for the initialisation and after each epoch."""


@dataclass(frozen=True, kw_only=True)
class Experts(Checked):
    """The number of experts and how each of them is trained."""

    num_experts: int = 10
    """Number of experts. Each one has its own initialisation."""
    num_epochs: int = 20
    """Number of epochs for which each expert is trained."""
    keep: Keep = "all"
    """Epochs whose weights are stored: all of them, for trajectories, or only the last one, for teachers."""
    lr: float = 0.01
    """Learning rate of SGD."""
    momentum: float = 0.0
    """Momentum of SGD."""
    weight_decay: float = 0.0
    """Weight decay of SGD (an L2 penalty)."""
    batch_size: int = 256
    """Batch size; the last batch of an epoch may be smaller."""
    schedule: Schedule = CONSTANT
    """Learning rate schedule; ``drop_after`` and ``warmup_steps`` do not depend on the number of epochs."""
    augment: str = "auto"
    """Augmentation of the experts: none, dsa (the augmentation of the data set) or a strategy, with options as in
    dsa:mode=M,align_corners=true. Every image has its own draw. auto: dsa, or for an objective without labels crops of
    at least a fifth of the image, changes of brightness, saturation and contrast, and flips where dsa has them."""
    cutmix: float = 0.0
    """Probability that CutMix is applied to a batch."""
    rho: float = 0.0
    """Radius of the ascent step of adaptive GSAM: 0.01 for FTD and DATM; 0 trains with plain gradients."""
    alpha: float = 0.0
    """Weight of the plain gradient's component orthogonal to the perturbed one (GSAM): 0.4 for FTD, 0.3 for DATM."""
    objective: Literal["cross-entropy", "barlow-twins", "simclr"] = "cross-entropy"
    """Objective of the training. barlow-twins and simclr use no labels but two views of every image, and train no
    classifier."""
    projector: int = 2048
    """Width of the three layers of the projector that replaces the classifier under an objective without labels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projector < 1:
            raise ValueError(
                f"a projector needs a width of at least 1, got {self.projector}; {spelt('projector', 2048)}"
            )
        for name in ("cutmix", "rho") if self.without_labels else ():
            if getattr(self, name):
                raise ValueError(
                    f"{self.objective} trains without labels and without {name}; give {spelt(name, 0.0)} or "
                    f"{spelt('objective', 'cross-entropy')}"
                )
        if self.num_experts < 1 or self.num_epochs < 1:
            raise ValueError(
                f"a buffer needs at least one expert and one epoch, got {self.num_experts} and {self.num_epochs}; "
                f"give {spelt('num_experts', 10)} and {spelt('num_epochs', 20)}"
            )
        self.training()

    def training(self) -> Training:
        """Return how one expert is trained. Raises ValueError as ``Training`` does."""
        return Training(
            num_epochs=self.num_epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            cutmix=self.cutmix,
            rho=self.rho,
            alpha=self.alpha,
        )

    @property
    def without_labels(self) -> bool:
        """Whether the objective uses no labels."""
        return self.objective != "cross-entropy"

    def augmentation(self, own: Augment) -> Augment:
        """Return the augmentation named by ``augment``, where ``own`` is that of the task.

        Raises:
            ValueError: as ``Augment.parse`` does.
        """
        if self.augment == "auto" and self.without_labels:
            flip = ("flip",) if "flip" in own.ops else ()
            return Augment(("resized-crop", *flip, "color"), mode="M", min_area=0.2)
        if self.augment in ("auto", "dsa"):
            return own
        return Augment.parse(self.augment, own="_".join(own.ops) or "none")

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine a trajectory, except for the augmentation.

        They include the number of epochs only if the schedule depends on it.
        """
        content, schedule = self.training().content(), self.schedule
        excluded = {"drops"} if schedule.depends_on_length else {"drops", "num_epochs"}
        excluded |= set() if schedule.drop_at else {"decay_at"}
        excluded |= set() if schedule.drop_at or schedule.drop_after else {"decay"}
        objective = {"objective": self.objective, "projector": self.projector} if self.without_labels else {}
        excluded |= {"loss"} if self.without_labels else set()
        return {name: value for name, value in content.items() if name not in excluded} | objective


def check_augment(augment: Augment) -> None:
    """Raise ValueError for an augmentation that experts cannot use."""
    options = ["flips=true"] if augment.flips else [f"{view}={factor}" for view, factor in augment.views.items()]
    if options:
        raise ValueError(
            f"experts are trained on real images, but {options[0]} is for synthetic ones; leave it out of "
            f"{spelt('augment')}"
        )


def identity(task: Task, plan: Experts, seed: int, compute: Compute) -> dict[str, Any]:
    """Return everything that determines the snapshots of a buffer.

    Where only the last epoch is stored, this includes the number of epochs, since longer training ends in different
    weights. Otherwise the number of epochs belongs to the extent, which may grow.
    """
    return {
        **task.identity(),
        "training": plan.identity(),
        "augment": plan.augmentation(task.augment).content(),
        "compute": compute.first_order_identity(),
        "seed": seed,
        "draws": VERSION,
        **({"keep": plan.keep, "num_epochs": plan.num_epochs} if plan.keep == "last" else {}),
    }


def _changed(fields: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that differ from the usual ones."""
    changed: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            inner = _changed(value, usual[name])
            changed |= {name: inner} if inner else {}
        elif value != usual[name]:
            changed[name] = value
    return changed


USUAL_EPOCHS = 200
"""The epochs of a typical buffer: ten experts of twenty epochs. The compute policy is resolved for this amount of work,
whatever was requested, because the policy belongs to the identity of a buffer and its extent does not."""


def resolved(task: Task, plan: Experts, root: Path, seed: int, compute: Compute) -> Compute:
    """Return ``compute`` with every choice made; the choices of an otherwise equal existing buffer are reused."""
    like = {k: v for k, v in identity(task, plan, seed, compute).items() if k != "compute"}
    kind = Trajectories.kind if plan.keep == "all" else TrainedNetworks.kind
    existing = identities(root, kind, like)
    earlier = existing[0]["compute"] if len(existing) == 1 else None
    return task.network.settled(compute, len(task.train) * USUAL_EPOCHS, earlier)


def build(
    task: Task,
    plan: Experts,
    *,
    root: Path,
    seed: int,
    compute: Compute,
    progress: Progress | None = None,
    ranks: Ranks = Ranks(),
) -> Path:
    """Train the missing experts of a buffer under ``root`` and return its folder.

    Several processes divide the missing experts among them; each returns when all experts are finished. Existing
    experts with fewer epochs than requested are trained again from scratch, with a warning.

    Raises:
        ValueError: new experts would have fewer epochs than the existing ones; an expert diverged; the buffer is
            damaged or cannot be written; another process ended. Finished experts are kept.
    """
    check_augment(plan.augmentation(task.augment))
    network, rng = task.network, Rng(seed)
    compute = resolved(task, plan, root, seed, compute)
    layout = network.init(rng, "layout")
    usual = dataclasses.asdict(Experts()) | {"seed": 0, "compute": dataclasses.asdict(Compute())}
    asked = _changed(dataclasses.asdict(plan) | {"seed": seed, "compute": dataclasses.asdict(compute)}, usual)
    for extent in ("num_experts", "keep", *(("num_epochs",) if plan.keep == "all" else ())):
        asked.pop(extent, None)
    writer = BufferWriter(root, task.name, identity(task, plan, seed, compute), layout, plan.keep, asked)
    writer.make_folder()
    num_experts = max(plan.num_experts, len(writer.complete))
    missing = [expert for expert in range(num_experts) if writer.epochs(expert) < plan.num_epochs]
    if missing:
        writer.refuse_shorter(plan.num_epochs)
    short = [expert for expert in missing if writer.epochs(expert)]
    if short:
        warnings.warn(
            f"{len(short)} experts of {writer.folder} have fewer than {plan.num_epochs} epochs: they are "
            "trained again from scratch, and each replaces its shorter version when it is finished",
            stacklevel=2,
        )
    ranks.barrier()  # every rank has listed the missing experts before any rank adds one
    lesson = (_without_labels if plan.without_labels else _with_labels)(task, plan, compute, rng)
    mine, at_once = ranks.shard(missing), compute.networks or 1
    for group in (mine[first : first + at_once] for first in range(0, len(mine), at_once)):
        begun, keys = time.perf_counter(), [rng.child("expert", expert) for expert in group]
        initial = [lesson.trainer.network.init(key, "initial weights") for key in keys]
        recorders = [_Recorder(*pair, plan, lesson, progress) for pair in zip(group, initial, strict=True)]

        def record(epoch: int, weights: Sequence[Weights], recorders: Sequence[_Recorder] = recorders) -> None:
            for recorder, one in zip(recorders, weights, strict=True):
                recorder(epoch, one)

        lesson.trainer.run_together(initial, [lesson.source(key) for key in keys], on_epoch=record)
        seconds = round((time.perf_counter() - begun) / len(group), 3)
        for expert, recorder in zip(group, recorders, strict=True):
            about = {"origin": "trained", "device": task.device.type, "seconds": seconds, **recorder.measured}
            writer.extend(expert, recorder.params, recorder.buffers, about, plan.num_epochs)
    ranks.barrier()
    return writer.folder


class _Lesson(NamedTuple):
    """How experts are trained and measured."""

    trainer: Trainer
    source: Callable[[Rng], Source]
    """The batches of an expert, given its key."""
    measure: Callable[[Weights], dict[str, float]]
    """Numbers of an expert for the manifest."""
    stored: Callable[[Weights], Weights]
    """The weights to store, from those of the trained network."""


def _with_labels(task: Task, plan: Experts, compute: Compute, rng: Rng) -> _Lesson:
    trainer = Trainer(task.network, plan.training(), compute)
    source = functools.partial(trainer.source, task.train.images, task.train.labels)
    measure = measure_accuracy(task, Scorer(task.network, compute), rng)
    augment = plan.augmentation(task.augment)
    return _Lesson(trainer, lambda key: source(key, augment), measure, lambda weights: weights)


def _without_labels(task: Task, plan: Experts, compute: Compute, rng: Rng) -> _Lesson:
    """Networks are measured by the loss on a fixed batch of training images, and by the accuracy on the second half of
    the scored training images of a ridge regression on the features of the first half."""
    assert plan.objective != "cross-entropy"
    if kind(task.input_shape) == "series" or not plan.augmentation(task.augment).ops:
        is_series = kind(task.input_shape) == "series"
        raise ValueError(
            f"{plan.objective} compares two augmented views of a sample, and "
            + ("series have no augmentations" if is_series else "without augmentation these are equal")
            + f"; give {spelt('objective', 'cross-entropy') if is_series else spelt('augment', 'auto')}"
        )
    learner = task.network.with_projector(plan.projector)
    trainer = Trainer(learner, plan.training(), compute, SELF_SUPERVISION[plan.objective])
    views, index = Views(augment=plan.augmentation(task.augment)), _scored(task, rng)
    scored, probe = task.train.subset(index), measure_probe(task, compute, rng)
    fixed = Pairs(
        scored.images[: plan.batch_size],
        scored.labels[: plan.batch_size],
        rng.child("scored views"),
        batch_size=plan.batch_size,
        views=views,
    ).batch(0, 0)

    @torch.no_grad()
    def measure(weights: Weights) -> dict[str, float]:
        return {"loss": float(trainer.batch_loss(weights, fixed)(False)), **probe(without_projector(weights))}

    def source(key: Rng) -> Pairs:
        return Pairs(task.train.images, task.train.labels, key, batch_size=plan.batch_size, views=views)

    return _Lesson(trainer, source, measure, without_projector)


def _features(network: Functional, params: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
    return network.features(params, buffers, images, train=False).float()


def _scored(task: Task, rng: Rng) -> Tensor:
    """Return the indices of the fixed part of the training images on which networks are measured."""
    return torch.randperm(len(task.train), generator=rng.generator("scored images"))[:MAX_SCORED].to(task.device)


def measure_accuracy(task: Task, scorer: Scorer, rng: Rng) -> Callable[[Weights], dict[str, float]]:
    """Return a function that measures accuracy on a fixed part of the training images and on any validation split."""
    index = _scored(task, rng)
    parts: dict[str, tuple[Tensor | Images, Tensor]] = {}
    parts["train_accuracy"] = (task.train.images[index], task.train.labels[index])
    if task.val is not None:
        parts["val_accuracy"] = (task.val.images, task.val.labels)
    return lambda weights: {name: scorer.accuracy(weights, *part) for name, part in parts.items()}


def measure_probe(task: Task, compute: Compute, rng: Rng) -> Callable[[Weights], dict[str, float]]:
    """Return a function that measures the accuracy of a ridge regression on the features of a network. It is fitted to
    the first half of the scored training images, and its accuracy is that on the second."""
    index = _scored(task, rng)
    scored, half = task.train.subset(index), len(index) // 2
    features_of = compute.first_order(functools.partial(_features, task.network), task.device)

    @torch.no_grad()
    def measure(weights: Weights) -> dict[str, float]:
        batches = scored.images.split(MAX_SCORED // 5)
        features = torch.cat([features_of(*weights, compute.layout(x)) for x in batches])
        predict = ridge_probe(features[:half], scored.labels[:half], task.num_classes)
        return {"probe_accuracy": float((predict(features[half:]) == scored.labels[half:]).float().mean())}

    return measure


class _Recorder:
    """Collects the snapshots and measurements of one expert."""

    def __init__(
        self, expert: int, initial: Weights, plan: Experts, lesson: _Lesson, progress: Progress | None
    ) -> None:
        self.expert, self.plan, self.lesson, self.progress = expert, plan, lesson, progress
        self.num_rows = plan.num_epochs + 1 if plan.keep == "all" else 1
        stored = lesson.stored(initial)
        self.params, self.buffers = (torch.empty(self.num_rows, len(pack(tensors))) for tensors in stored)
        self.measured: dict[str, list[float]] = {}
        self(0, initial)

    def __call__(self, epoch: int, weights: Weights) -> None:
        row, stored = epoch % self.num_rows, self.lesson.stored(weights)
        self.params[row], self.buffers[row] = pack(stored.params), pack(stored.buffers)
        if not self.params[row].isfinite().all():
            raise ValueError(
                f"expert {self.expert} has weights that are not finite after {epoch} epochs: its training "
                f"diverged; give an {spelt('lr')} below {self.plan.lr:g}"
            )
        measured = self.lesson.measure(weights)
        for name, value in measured.items():
            self.measured.setdefault(name, []).append(value)
        if self.progress is not None:
            self.progress(self.expert, epoch, measured)
