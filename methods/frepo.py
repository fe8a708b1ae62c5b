"""FRePo: dataset distillation by neural feature regression with pooling.

Zhou, Nezhadarya and Ba, "Dataset Distillation using Neural Feature Regression", NeurIPS 2022.

    min_{X, Y}  E_theta  mean_i 1/2 | K_ts (K_ss + lambda I)^-1 Y - y_i |^2  -  mean_j min(top1(Y_j) - top2(Y_j), 1/C)
    K_ss = phi_theta(X) phi_theta(X)^T,    K_ts = phi_theta(x) phi_theta(X)^T

theta is a network of the pool, which has been trained on earlier versions of the set for some steps. The ridge
regression approximates the rest of its training.

    symbol      code
    X, Y        ``state.syn``; Y is learned if the labels are ``targets`` (or ``logits``)
    theta       a member of ``state.pool``, drawn at every step, in evaluation mode
    phi         ``pool.frozen_features``: the input of the last linear layer
    x_i, y_i    ``batch_real`` real images of any class, and their classes as one-hot vectors less 1/C
    lambda      ``ridge`` times the mean of the diagonal of K_ss

The error of the predictions can also be the cross-entropy of RFAD and RCIG (``objective``), whose factor exp(tau) of
the predictions is learned: ``state.learned["temperature"]`` is tau.

Deviations: see docs/methods/frepo.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense.augment import Augment, mild
from condense.cudagraph import from_host
from condense.kernels import centred, feature_kernel, regression
from condense.method import Context, GradientMethod, GradientState, Loss, Optim
from condense.methods import pool
from condense.networks import with_options
from condense.schedule import Schedule
from condense.task import Task
from condense.train import Training


@dataclass(kw_only=True)
class PoolState(GradientState):
    pool: list[pool.Member]


@final
@dataclass(frozen=True, kw_only=True)
class FRePo(GradientMethod):
    """Ridge regression on features of networks that train on the set."""

    family: ClassVar[str] = "kernel"
    regresses: ClassVar[bool] = True
    added_fields: ClassVar[tuple[str, ...]] = (
        "objective",
        "optim_temperature",
        "training_lr",
        "training_warmup",
        "augment_training",
    )

    num_steps: int = 500_000
    """Number of updates of the set."""
    start: Literal["real", "noise"] = "real"
    """Initial images: real ones drawn per class, or standard normal noise."""
    batch_real: int = 1024
    """Number of real images per step, of any class; all of them if there are fewer."""
    ridge: float = 1e-6
    """Ridge of the regression, relative to the mean of the kernel's diagonal."""
    objective: Literal["mse", "platt"] = "mse"
    """Loss of the predictions: mse (half the squared error) or platt (cross-entropy, learned temperature)."""
    pool_size: int = 10
    """Number of networks in the pool."""
    max_age: int = 100
    """Largest number of training steps of a network of the pool; a network with more is replaced by a fresh one."""
    lr_pool: float = 3e-4
    """Learning rate of Adam, which trains the networks of the pool."""
    batch_pool: int = 1000
    """Batch size of a training step of a network of the pool; all images of the set if there are fewer."""
    training_epochs: int = 2000
    """Number of epochs of a training on the set in the protocol ``own``, with a batch size of up to 500."""
    training_lr: float = 3e-4
    """Learning rate of Adam in that training, after the warm-up."""
    training_warmup: int = 500
    """Number of steps in which that learning rate rises from 0."""
    augment_training: bool = True
    """Whether that training has the published augmentation where the recipe has none."""
    optim: Optim = Optim(kind="lamb", lr=3e-4, momentum=0.9, schedule=Schedule(cosine_to=0.1))
    """Optimiser of the images (latents)."""
    optim_labels: Optim = Optim(kind="lamb", lr=3e-4, momentum=0.9, schedule=Schedule(cosine_to=0.1))
    """Optimiser of learned labels."""
    optim_decoder: Optim = Optim(kind="lamb", lr=3e-4, momentum=0.9, schedule=Schedule(cosine_to=0.1))
    """Optimiser of a decoder with parameters."""
    optim_temperature: Optim = Optim(kind="adam", lr=0.01, momentum=0.9)
    """Optimiser of the logarithm of the temperature of Platt scaling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "batch_real", "pool_size", "batch_pool", "training_epochs")
        self.require_at_least(0, "max_age", "training_warmup")
        self.require_positive("ridge", "lr_pool", "training_lr")

    def optims(self) -> dict[str, Optim]:
        return super().optims() | {"temperature": self.optim_temperature}

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        num_synthetic = num_classes * images_per_class
        return self.num_steps * (self.batch_real / 3 + num_synthetic + min(num_synthetic, self.batch_pool))

    def training(self, task: Task) -> Training:
        return pool.training(self.training_epochs, 500, self.training_lr, self.training_warmup)

    def training_network(self, task: Task) -> str:
        return with_options(task.network.name, norm="none")

    def training_augment(self, task: Task) -> Augment:
        """The operations of the recipe, or the published ones if the recipe has none and they are wanted. Without
        either, images are flipped if the distillation mirrors them."""
        if task.augment.ops:
            return super().training_augment(task)
        if self.augment_training:
            return Augment(mild(task.input_shape))
        return Augment(("flip",) if task.augment.flips else ())

    def init(self, ctx: Context) -> PoolState:
        syn, learned = ctx.new_set(*ctx.initial(self.start)), nn.ParameterDict()
        if self.objective == "platt":
            learned["temperature"] = nn.Parameter(torch.zeros((), device=ctx.task.device))
        members = [pool.fresh(ctx, 0, slot, slot * self.max_age // self.pool_size) for slot in range(self.pool_size)]
        return PoolState(syn=syn, optimisers=self.optimisers(syn, learned), learned=learned, pool=members)

    def graphs(self, ctx: Context) -> bool:
        return True

    def loss(self, ctx: Context, state: PoolState, step: int, part: int) -> Loss:
        params, buffers = from_host(step, "member", lambda step: pool.weights(ctx, state.pool, step))
        features = pool.frozen_features(ctx.task.network, ctx.compute)
        images, targets = state.syn()
        labels = pool.targets_of(ctx, targets)
        real, classes = ctx.task.train.sample(self.batch_real, ctx.rng("real", step))
        with torch.no_grad():
            chunks = real.split(ctx.compute.micro_batch or len(real))
            phi_t = torch.cat([features(params, buffers, x) for x in chunks])
        images, values = ctx.task.augment.mirrored(images, labels)
        phi_s = features(params, buffers, images)
        k_ss, k_ts = feature_kernel(phi_s, phi_s), feature_kernel(phi_t, phi_s)
        predicted = regression(k_ts, k_ss, values, self.ridge)
        if self.objective == "platt":
            error = F.cross_entropy(state.learned["temperature"].exp() * predicted, classes)
        else:
            error = half_squared_error(predicted, centred(classes, ctx.task.num_classes, real.dtype))
        if not ctx.labels.learned:
            return error
        margin = margin_loss(labels)
        return error + margin, {"regression": error, "margin": margin}

    def after(self, ctx: Context, state: PoolState, step: int) -> None:
        """Train the network of this step for one step on the updated set, or replace it by a fresh one."""
        slot = pool.draw(ctx, self.pool_size, step)
        if state.pool[slot]["age"] > self.max_age:
            state.pool[slot] = pool.fresh(ctx, step + 1, slot)
            return
        with torch.no_grad():
            images, targets = state.syn()
        batch = pool.minibatches(ctx, state, step, len(images), batch_size=self.batch_pool).unbind()
        values = pool.targets_of(ctx, targets)
        state.pool[slot] = pool.train(ctx, state.pool[slot], images, values, half_squared_error, batch, lr=self.lr_pool)


def margin_loss(labels: Tensor) -> Tensor:
    """Return minus the margin between the largest and the second largest value, at most 1/C, averaged over labels
    (n, C)."""
    first, second = labels.topk(2, 1).values.unbind(1)
    return -(first - second).clamp(max=1 / labels.shape[1]).mean()


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared distance, summed over classes and averaged over images."""
    return 0.5 * (outputs - targets).square().sum(1).mean()
