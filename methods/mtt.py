"""MTT: dataset distillation by matching training trajectories.

Cazenavette, Wang, Torralba, Efros and Zhu, CVPR 2022, equation 2 and algorithm 1.

    min_{S, alpha}  E_{t, theta*}  || theta_N - theta*_{t+M} ||^2 / || theta*_t - theta*_{t+M} ||^2
    theta_0 = theta*_t,    theta_{n+1} = theta_n - alpha grad l(A(b_n); theta_n),    b_n a minibatch of S

    symbol   code
    S        ``state.syn``
    alpha    ``state.syn.lr``, learned as its logarithm; it begins at ``lr``
    theta*   an expert of the buffer: its initial weights and its weights after every epoch on real data
    t        start epoch, uniform over 0 .. ``max_start_epoch`` - 1
    M        ``expert_epochs``
    N        ``syn_steps``
    b_n      ``batch_syn`` images; see ``minibatches``
    A        ``task.augment``, drawn for every image of every inner step
    trim     the fraction of the weights with the smallest squared error that both norms leave out (PAD, EDF)

Deviations: see docs/methods/mtt.md.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, final

import torch
from torch import Tensor

from condense.artifacts import ArtifactSpec, Trajectories, TrajectorySpec
from condense.cudagraph import from_host
from condense.inner import SGD
from condense.match import trajectory_distance
from condense.method import Context, GradientState, Optim
from condense.methods.unrolled import Minibatch, Unrolled
from condense.rng import Draws
from condense.synthetic.labels import Assigned
from condense.synthetic.set import SyntheticSet
from condense.task import Task
from condense.train import Training

LABELLING_BATCH = 1000
"""Batch size of the forward passes in which an expert labels images."""


@dataclass(frozen=True, kw_only=True)
class TrajectoryMatching(Unrolled):
    """Base class of MTT, TESLA and DATM: the student, its target and the loss."""

    family: ClassVar[str] = "trajectory matching"
    has_teacher: ClassVar[bool] = True
    added_fields: ClassVar[tuple[str, ...]] = ("trim",)

    num_steps: int = 5000
    """Number of updates of the images."""
    start: Literal["real", "noise"] = "real"
    """Initial images: real ones drawn per class, or standard normal noise."""
    syn_steps: int = 30
    """Number of training steps of the student on the set."""
    batch_syn: int | None = None
    """Batch size of the student; unset: the whole set."""
    expert_epochs: int = 2
    """Number of expert epochs between the start and the target snapshot."""
    max_start_epoch: int = 15
    """Number of start epochs: the student starts from an expert's snapshot of epoch 0 to ``max_start_epoch`` - 1."""
    num_trajectories: int = 1
    """Number of trajectory segments matched in one update; the loss is their mean."""
    lr: float = 0.01
    """Initial learning rate of the student; it is learned."""
    optim: Optim = Optim(lr=100.0)
    """Optimiser of the images (latents)."""
    optim_lr: Optim = Optim(lr=0.1)
    """Optimiser of the logarithm of the student's learning rate. To convert a value that was published for the
    learning rate itself, divide it by the square of ``lr``."""
    experts: Literal["any", "sgd", "gsam"] = "any"
    """How the experts of the buffer must have been trained: by SGD, or sharpness-aware by GSAM as in FTD."""
    trim: float = 0.0
    """Fraction of the student's weights that the loss leaves out: those that are nearest to the target. PAD and EDF use
    0.25 to 0.5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("syn_steps", "batch_syn", "expert_epochs", "max_start_epoch", "num_trajectories"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"method.{name} must be at least 1, got {value}; leave it at its default")
        if not self.lr > 0:
            raise ValueError(f"method.lr must be positive, got {self.lr}: its logarithm is learned; try 0.01")
        if not 0 <= self.trim < 1:
            raise ValueError(
                f"method.trim must lie in [0, 1), got {self.trim}: it is a fraction; a usual value is 0.25"
            )

    def training_steps(self) -> int:
        return self.syn_steps

    def needs(self, task: Task) -> Mapping[str, ArtifactSpec]:
        last_epoch = self.max_start_epoch - 1 + self.expert_epochs
        return {"experts": TrajectorySpec(identity=task.identity(), num_epochs=last_epoch, experts=self.experts)}

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        batch = self.batch_syn or num_classes * images_per_class
        return 4 * self.num_steps * self.num_trajectories * self.syn_steps * batch

    def training(self, task: Task) -> Training:
        return Training(num_epochs=1000)

    def init(self, ctx: Context) -> GradientState:
        syn = ctx.new_set(*ctx.initial(self.start), lr=self.lr)
        return GradientState(syn=syn, optimisers=self.optimisers(syn))

    def parts(self, ctx: Context) -> Sequence[int]:
        return range(self.num_trajectories)

    def graphs(self, ctx: Context) -> bool:
        return ctx.labels.name != "teacher" and self.adjoint.captures

    def loss(self, ctx: Context, state: GradientState, step: int, part: int) -> Tensor:
        start, target = from_host(step, f"snapshots {part}", lambda step: self.snapshots(ctx, step, part))
        images, targets = state.syn()
        if ctx.labels.name == "teacher":
            expert, epoch = self.sample_segment(ctx, step, part)
            targets = expert_logits(ctx, expert, epoch + self.expert_epochs, images).softmax(1)
        batches = self.batches(ctx, images, targets, step, part)
        adjoint = self.adjoint.resolve(ctx.rng("adjoint", step, part))
        theta = self.train(ctx, start, batches, rule=SGD(), lr=cast(Tensor, state.syn.lr), adjoint=adjoint)
        return trajectory_distance(theta, target, start, self.trim) / self.num_trajectories

    def snapshots(self, ctx: Context, step: int, part: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the weights that the student starts from and the weights that it is to reach."""
        expert, epoch = self.sample_segment(ctx, step, part)
        start, target = experts_of(ctx).pair(expert, epoch, epoch + self.expert_epochs)
        network = ctx.task.network
        return network.restored(start, {}).params, network.restored(target, {}).params

    def sample_segment(self, ctx: Context, step: int, part: int) -> tuple[int, int]:
        """Draw the trajectory segment of a part: the index of an expert and a start epoch."""
        draws, epochs = ctx.rng("trajectory", step, part), self.start_epochs(step)
        return draws.integer(0, experts_of(ctx).num_experts), draws.integer(epochs.start, epochs.stop)

    def start_epochs(self, step: int) -> range:
        """The epochs of an expert at which the student may start."""
        return range(self.max_start_epoch)

    def batches(self, ctx: Context, images: Tensor, targets: Tensor, step: int, part: int) -> list[Minibatch]:
        """The minibatches of the student's steps; all share the images and targets with their graph to the set."""
        order = ctx.rng("minibatches", step, part)
        batches = []
        for n, index in enumerate(minibatches(len(images), self.batch_syn, self.syn_steps, order)):
            drawn = ctx.task.augment.sample(
                ctx.rng("augment", step, f"{part}/{n}"),
                len(index) * ctx.task.augment.copies,
                ctx.task.input_shape,
                siamese=False,
            )
            batches.append(Minibatch(images, targets, index.to(images.device), drawn))
        return self.masked(ctx, batches, step, part)

    def finalize(self, ctx: Context, state: GradientState, steps: int) -> SyntheticSet:
        """Return the set to store. Its ``teacher`` labels are the softmax of the target snapshot of the last step,
        and before any step of the first."""
        syn = super().finalize(ctx, state, steps)
        if ctx.labels.name != "teacher":
            return syn
        labelled = copy.deepcopy(syn)
        expert, epoch = self.sample_segment(ctx, max(steps - 1, 0), self.num_trajectories - 1)
        with torch.no_grad():
            images, _ = labelled()
            labels = expert_logits(ctx, expert, epoch + self.expert_epochs, images).softmax(1)
            cast(Assigned, labelled.provider).assign(labels.unflatten(0, (-1, len(labelled))).mean(0))
        return labelled


@final
@dataclass(frozen=True, kw_only=True)
class MTT(TrajectoryMatching):
    """Matches the end of a segment of an expert's training trajectory; also learns the student's learning rate."""


def experts_of(ctx: Context) -> Trajectories:
    """The expert trajectories of the buffer."""
    return cast(Trajectories, ctx.artifacts["experts"])


@torch.no_grad()
def expert_logits(ctx: Context, expert: int, epoch: int, images: Tensor) -> Tensor:
    """Logits (N, C) of an expert after ``epoch`` epochs, for images without augmentation, in evaluation mode.

    Raises:
        ValueError: the network has BatchNorm and the buffer does not hold its running statistics.
    """
    network = ctx.task.network
    weights = experts_of(ctx).weights(expert, network, epoch)
    return torch.cat([network.logits(*weights, x, train=False) for x in images.detach().split(LABELLING_BATCH)])


def logits_of_experts(ctx: Context, images: Tensor) -> Iterator[Tensor]:
    """Yield the logits (N, C) of each expert at the end of its training."""
    experts = experts_of(ctx)
    return (expert_logits(ctx, expert, experts.num_epochs, images) for expert in range(experts.num_experts))


def minibatches(num_images: int, batch: int | None, num_steps: int, draws: Draws) -> Iterator[Tensor]:
    """Yield the indices (n,) of the images of each step.

    A random order of the images is split into batches of ``batch`` images (None: one batch of all). They are used from
    the last one, which may be smaller, to the first; then a new order is drawn.
    """
    batches: list[Tensor] = []
    for _ in range(num_steps):
        batches = batches or list(draws.permutation(num_images).split(batch or num_images))
        yield batches.pop()
