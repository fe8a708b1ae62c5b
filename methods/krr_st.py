"""KRR-ST: Lee, Lee, Ko, Lee, Shin and Hwang, "Self-Supervised Dataset Distillation for Transfer Learning", ICLR 2024.

    min_{X, Y}  E_theta  mean || K_ts (K_ss + lambda I)^-1 Y - g(x) ||^2
    K_ss = h(X) h(X)^T,    K_ts = h(x) h(X)^T,    lambda = r tr(K_ss)

The set has no classes: Y are features of a teacher g that was trained without labels, and they are learned with the
images X. theta is a network of a pool, whose members are trained on the set by the squared error to Y. Its features h,
with a 1 appended, replace the network in the inner problem, so that ridge regression solves it: objectives that compare
random views would give the outer gradient a bias. Real images x are augmented, those of the set are not.

    symbol   code                                       symbol    code
    X, Y     ``state.syn``                              x         ``batch_real`` real images in a view
    g        the teacher, in evaluation mode            r         ``ridge``; no gradient flows through tr(K_ss)
    theta    a member of ``state.pool``                 h         ``with_bias`` of the features, in evaluation mode

Deviations: see docs/methods/krr-st.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, TypedDict, final

import torch
import torch.nn.functional as F
from torch import Tensor

from condense.artifacts import ArtifactSpec
from condense.augment import Augment
from condense.compute import Compute
from condense.data.layout import InputShape
from condense.kernels import feature_kernel, ridge_solve
from condense.method import Context, GradientMethod, GradientState, Loss, Optim
from condense.methods import pool
from condense.names import spelt
from condense.networks import Factory, Functional, Weights
from condense.objective import ObjectiveName
from condense.schedule import CONSTANT, Schedule
from condense.sources import Minibatches
from condense.synthetic.decode import Decode
from condense.synthetic.labels import Labels
from condense.task import Task
from condense.teachers import OWN, TrainedBy, needed_backbone, opened_backbone, require_one_backbone
from condense.train import Trainer, Training

LINEAR = Optim(kind="adam", lr=1e-4, momentum=0.9, schedule=Schedule(linear_to=1e-3))


class Student(TypedDict):
    """A network of the pool."""

    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    velocity: dict[str, Tensor]
    """Momentum buffers."""
    age: int
    """Number of training steps."""


@dataclass(kw_only=True)
class StudentState(GradientState):
    pool: list[Student]


@final
@dataclass(frozen=True, kw_only=True)
class KRRST(GradientMethod):
    """Ridge regression on features of networks that train on the set, to the features of a teacher without labels."""

    family: ClassVar[str] = "kernel"
    regresses: ClassVar[bool] = True
    has_classes: ClassVar[bool] = False

    num_steps: int = 160_000
    """Number of updates of the set."""
    teachers: tuple[str, ...] = ("resnet18:norm=batch",)
    """The network of the teacher, whose features are the targets; same is the network of the recipe."""
    trained_by: TrainedBy = "barlow-twins"
    """Objective of the teacher; any accepts teachers that were trained with labels or imported, too."""
    batch_real: int = 1024
    """Number of real images per step; all of them if there are fewer."""
    ridge: float = 1e-6
    """Ridge of the regression, relative to the trace of the kernel."""
    pool_size: int = 10
    """Number of networks in the pool."""
    max_age: int = 1000
    """Number of training steps after which a network of the pool is replaced by a fresh one. The first networks have
    random ages from 1 to this number."""
    lr_pool: float = 0.1
    """Learning rate of the networks on the set, in the pool and in the protocol ``own``."""
    momentum_pool: float = 0.9
    """Momentum of the same."""
    decay_pool: float = 1e-3
    """Weight decay of the same."""
    training_epochs: int = 1000
    """Number of epochs of a training on the set in the protocol ``own``, with a batch size of up to 256."""
    optim: Optim = LINEAR
    """Optimiser of the images (latents)."""
    optim_labels: Optim = LINEAR
    """Optimiser of the targets."""
    optim_decoder: Optim = LINEAR
    """Optimiser of a decoder with parameters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "batch_real", "pool_size", "max_age", "training_epochs")
        self.require_positive("ridge", "lr_pool")
        self.require_at_least(0, "momentum_pool", "decay_pool")
        require_one_backbone(self.teachers)

    def incompatibility(
        self, decode: Decode, labels: Labels, transform: str, objective: ObjectiveName = "cross-entropy"
    ) -> str | None:
        reason = super().incompatibility(decode, labels, transform, objective)
        if reason is None and labels.space != "values":
            return f"learns features of a teacher, not {labels.name} labels; give {spelt('labels', 'targets')}"
        return reason

    def num_outputs(self, network: str | Factory, input_shape: InputShape, num_classes: int) -> int:
        (teacher,) = self.teachers
        return Functional(network if teacher == OWN else teacher, input_shape, num_classes).num_features

    def needs(self, task: Task) -> Mapping[str, ArtifactSpec]:
        return needed_backbone(self.teachers, self.trained_by, task)

    def _teacher(self, ctx: Context) -> Callable[[Tensor], Tensor]:
        """Return a function from images to the features of the teacher."""
        return opened_backbone(self.teachers, ctx).embedder(ctx.compute)

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        num_synthetic = num_classes * images_per_class
        return self.num_steps * (2 * self.batch_real / 3 + 2 * num_synthetic)

    def training(self, task: Task) -> Training:
        """SGD with ``lr_pool`` on the mean squared error, written as SGD on half the sum of squares over the width."""
        scale = 2 / task.network.num_outputs
        return Training(
            num_epochs=self.training_epochs,
            batch_size=256,
            lr=self.lr_pool * scale,
            momentum=self.momentum_pool,
            weight_decay=self.decay_pool / scale,
            schedule=CONSTANT,
            loss="mse",
        )

    def training_augment(self, task: Task) -> Augment:
        return Augment()

    def init(self, ctx: Context) -> StudentState:
        task, num = ctx.task, len(ctx.classes)
        if len(task.train) < num:
            raise ValueError(
                f"{task.name} has {len(task.train)} training images, but {num} are needed for {spelt('ipc', ctx.ipc)}; "
                f"give {spelt('ipc', max(1, ctx.ipc * len(task.train) // num))}"
            )
        if task.network.num_outputs == task.num_classes:
            raise ValueError(
                f"the teacher has as many features as {task.name} has classes, {task.num_classes}, and they would be "
                f"taken for class scores; give {spelt('method.teachers')} a network of another width"
            )
        images = ctx.first_images
        if images is None:
            images, _ = task.train.sample(num, ctx.rng("initial images"))
        teacher = self._teacher(ctx)
        with torch.no_grad():
            targets = torch.cat([teacher(part) for part in images.split(ctx.compute.micro_batch or num)])
        copies = ctx.decode.expansion  # the images of a latent share a target
        targets = targets.unflatten(0, (-1, copies)).mean(1).repeat_interleave(copies, 0)
        syn = ctx.new_set(images, targets)
        state = StudentState(syn=syn, optimisers=self.optimisers(syn), pool=[])
        for slot in range(self.pool_size):
            age = ctx.rng("initial age", 0, slot).integer(1, self.max_age + 1)
            with ctx.rng.forked("layers of the pool", 0, slot):
                state.pool.append(self._trained(ctx, state, _fresh(ctx, 0, slot), age))
        return state

    def loss(self, ctx: Context, state: StudentState, step: int, part: int) -> Loss:
        student, augment = state.pool[pool.draw(ctx, self.pool_size, step)], ctx.task.augment
        teacher = ctx.kept("teacher", state, lambda: self._teacher(ctx))
        real, _ = ctx.task.train.sample(self.batch_real, ctx.rng("real", step))
        drawn = augment.sample(ctx.rng("augment", step), len(real), ctx.task.input_shape, siamese=False)

        def features(images: Tensor) -> Tensor:
            run = pool.frozen_features(ctx.task.network, ctx.compute)
            return with_bias(run(student["params"], student["buffers"], images))

        with torch.no_grad():
            chunks = augment.apply(real, drawn).split(ctx.compute.micro_batch or len(real))
            h_t, wanted = (torch.cat([fn(x) for x in chunks]) for fn in (features, teacher))
        images, targets = augment.mirrored(*state.syn())
        h_s = features(images)
        k_ss, k_ts = feature_kernel(h_s, h_s), feature_kernel(h_t, h_s)
        ridge = self.ridge * k_ss.detach().diagonal().sum()
        return F.mse_loss(k_ts @ ridge_solve(k_ss, targets.to(k_ss.dtype), ridge), wanted.to(k_ss.dtype))

    def after(self, ctx: Context, state: StudentState, step: int) -> None:
        """Train the network of this step for one step on the updated set, and replace it by a fresh one once it is old
        enough."""
        slot = pool.draw(ctx, self.pool_size, step)
        student = self._trained(ctx, state, state.pool[slot], 1)
        state.pool[slot] = student if student["age"] < self.max_age else _fresh(ctx, step + 1, slot)

    def _trained(self, ctx: Context, state: StudentState, student: Student, num_steps: int) -> Student:
        """Return a copy of ``student`` after steps of SGD on the whole set, in training mode."""
        with torch.no_grad():
            images, targets = state.syn()
        everything = torch.arange(len(images), device=images.device)
        source = Minibatches(images, targets, [everything] * num_steps)
        velocity = {name: buffer.clone() for name, buffer in student["velocity"].items()}
        plan = Training(
            num_epochs=1,
            lr=self.lr_pool,
            momentum=self.momentum_pool,
            weight_decay=self.decay_pool,
            schedule=CONSTANT,
        )
        params, buffers = _trainer(ctx.task.network, plan, ctx.compute).run(
            Weights(student["params"], student["buffers"]),
            source,
            optimiser=lambda params: plan.optimise(params, velocity),
        )
        return Student(params=params, buffers=buffers, velocity=velocity, age=student["age"] + num_steps)


def with_bias(features: Tensor) -> Tensor:
    """Append a 1 to features (n, F)."""
    return torch.cat([features, torch.ones_like(features[:, :1])], 1)


def _fresh(ctx: Context, step: int, slot: int) -> Student:
    """Return a network with new weights, drawn by its slot and the first step that can use it."""
    params, buffers = ctx.task.network.init(ctx.rng, "pool", step, slot)
    velocity = {name: torch.zeros_like(param) for name, param in params.items()}
    return Student(params=params, buffers=buffers, velocity=velocity, age=0)


@lru_cache(maxsize=1)
def _trainer(network: Functional, plan: Training, compute: Compute) -> Trainer:
    return Trainer(network, plan, compute, F.mse_loss)
