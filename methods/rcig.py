"""RCIG: reparameterised convexified implicit gradients.

Loo, Hasani, Lechner and Rus, "Dataset Distillation with Convexified Implicit Gradients", ICML 2023.

    min_{X, Y, tau}  E_theta  mean_i CE(exp(tau) f(x_i; d*), y_i)  -  mean_j min(top1(Y_j) - top2(Y_j), 1 / 2C)
    d* = argmin_d  L_in(d) = ( |Y - f(X; d)|^2 / 2 + lambda tr(a^T K a) / 2 + lambda |d|^2 / 2 ) / (n C)
    f(x; d) = o(x; d) + h(x) h(X)^T a,   a = (K + lambda I)^-1 (Y - o(X; d)),   K = h(X) h(X)^T

The network is linearised at its weights theta, without the constant term: o is its directional derivative along d, a
change of all weights except the matrix of the last layer, which the ridge regression a on the features h at theta
replaces. L_in is therefore quadratic in d, and d* is differentiated implicitly (``condense.inner.implicit``).

    symbol        code
    X, Y          ``state.syn``; Y is learned if the labels are ``targets`` (or ``logits``)
    tau           ``state.learned["temperature"]``
    theta         a member of ``state.pool``, drawn at every step, in evaluation mode
    d             ``move``, a dictionary by names of parameters
    h, o          ``Convexified.outputs``
    a, L_in, f    ``Convexified.head``, ``Convexified.inner_loss``, ``Convexified.predict``
    lambda        ``ridge`` times the number of images of the set; n is that number including mirror images
    x_i, y_i      ``batch_real`` real images of any class

A step reads nothing from the device, except the counts in ``RCIGState.tally`` once in ``ADAPT_EVERY`` steps. The search
for the learning rates, before the first step, reads each of its curves.

Deviations: see docs/methods/rcig.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from condense.augment import MILD, Augment, mild
from condense.cudagraph import from_host
from condense.inner import Minimum, Params, descend, minimise, mixed_gradient, pushforward
from condense.kernels import feature_kernel, ridge_solve
from condense.match import differentiated
from condense.method import Context, GradientMethod, GradientState, Loss, Optim
from condense.methods import pool
from condense.networks import Functional, with_options
from condense.task import Task
from condense.train import Training

HEAD, HEAD_BIAS = "classifier.weight", "classifier.bias"
"""Parameters of the last layer of every ``condense.networks.Network``."""

FIRST_LR_INNER, FIRST_LR_ADJOINT = 1e-5, 5e-5
"""Learning rates at which the search starts."""
RAISE, BACK_OFF = 1.2, 0.84
"""Factors of the search: of the learning rate between attempts, and of the first rate that fails, to get the result."""
RISE = 1e-3
"""Smallest increase that counts, as a fraction of the largest magnitude of the curve; a smaller one may be rounding."""
ADAPT_EVERY = 50
"""Number of steps between adaptations of the inner learning rate."""

Batch = tuple[Tensor, Tensor]
"""Images (n, C, H, W) of the set and regression targets (n, num_classes), not yet mirrored."""


@dataclass(kw_only=True)
class RCIGState(GradientState):
    pool: list[pool.Member]
    lr_inner: float
    """Learning rate of the inner problem, whose solution is d."""
    lr_adjoint: float
    """Learning rate of the linear system ``H v = g``."""
    tally: Tensor
    """Counts (2,) of the inner runs since the last adaptation: those whose loss ended above its start, and those whose
    loss decreased at every step."""


@final
@dataclass(frozen=True, kw_only=True)
class RCIG(GradientMethod):
    """Implicit differentiation through a convexified training on the set."""

    family: ClassVar[str] = "kernel"
    regresses: ClassVar[bool] = True
    added_fields: ClassVar[tuple[str, ...]] = ("training_lr", "training_warmup", "augment_training")

    num_steps: int = 10_000
    """Number of updates of the set."""
    start: Literal["real", "noise"] = "real"
    """Initial images: real ones drawn per class, or standard normal noise."""
    batch_real: int = 1024
    """Number of real images per step, of any class; all of them if there are fewer."""
    ridge: float = 5e-4
    """Regularisation of the regression and of the change of the weights, per image of the set."""
    inner_steps: int = 20
    """Number of Adam steps on the inner loss, starting from unchanged weights."""
    adjoint_steps: int = 20
    """Number of Adam steps on the linear system of the implicit gradient."""
    pool_size: int = 30
    """Number of networks in the pool."""
    max_age: int = 100
    """Number of training steps after which a network of the pool is replaced by a fresh one."""
    max_train_steps: int = 15
    """Largest number of training steps of a network of the pool after its use; the number is uniform from 1 to this."""
    lr_pool: float = 5e-5
    """Learning rate of Adam, which trains the networks of the pool."""
    training_epochs: int = 2000
    """Number of epochs of a training on the set in the protocol ``own``, with a batch size of up to 256."""
    training_lr: float = 1e-4
    """Learning rate of Adam in that training, after the warm-up."""
    training_warmup: int = 500
    """Number of steps in which that learning rate rises from 0."""
    augment_training: bool = True
    """Whether that training has the published augmentation where the recipe has none."""
    optim: Optim = Optim(kind="adabelief", lr=3e-3, momentum=0.9)
    """Optimiser of the images (latents)."""
    optim_labels: Optim = Optim(kind="adabelief", lr=3e-3, momentum=0.9)
    """Optimiser of learned labels."""
    optim_decoder: Optim = Optim(kind="adabelief", lr=3e-3, momentum=0.9)
    """Optimiser of a decoder with parameters."""
    optim_temperature: Optim = Optim(kind="adabelief", lr=0.03, momentum=0.9)
    """Optimiser of the temperature tau, the logarithm of the factor of the predictions."""
    ema: float | None = 0.99
    """Decay of the running average of the set, which is stored in place of the set; unset: the set itself is stored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(1, "batch_real", "pool_size", "max_age", "max_train_steps", "training_epochs")
        self.require_at_least(2, "inner_steps", "adjoint_steps")
        self.require_at_least(0, "training_warmup")
        self.require_positive("ridge", "lr_pool", "training_lr")

    def optims(self) -> dict[str, Optim]:
        return super().optims() | {"temperature": self.optim_temperature}

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        syn = num_classes * images_per_class
        passes = self.inner_steps + self.adjoint_steps + 5 + self.max_train_steps / 2
        return self.num_steps * (passes * syn + 1.3 * self.batch_real)

    def training(self, task: Task) -> Training:
        return pool.training(self.training_epochs, 256, self.training_lr, self.training_warmup)

    def training_network(self, task: Task) -> str:
        """The network of the recipe, with ReLU in place of softplus."""
        name = task.network.name
        return with_options(name, activation="relu") if "activation=softplus" in name else name

    def training_augment(self, task: Task) -> Augment:
        """The augmentation of the recipe, or the published one if the recipe has none and it is wanted. Mirror images
        are added as in the distillation."""
        if task.augment.ops or not self.augment_training:
            return task.augment
        ops = MILD[1:] if mild(task.input_shape) == MILD else mild(task.input_shape)
        return Augment(ops, mode="P", flips=task.augment.flips)

    def init(self, ctx: Context) -> RCIGState:
        syn = ctx.new_set(*ctx.initial(self.start))
        learned = nn.ParameterDict({"temperature": torch.zeros((), device=ctx.task.device)})
        state = RCIGState(
            syn=syn,
            optimisers=self.optimisers(syn, learned),
            learned=learned,
            pool=[pool.fresh(ctx, 0, slot) for slot in range(self.pool_size)],
            lr_inner=FIRST_LR_INNER,
            lr_adjoint=FIRST_LR_ADJOINT,
            tally=torch.zeros(2, device=ctx.task.device),
        )
        self.search(ctx, state)
        return state

    def graphs(self, ctx: Context) -> bool:
        return True

    def loss(self, ctx: Context, state: RCIGState, step: int, part: int) -> Loss:
        images, targets = state.syn()
        values, tau = pool.targets_of(ctx, targets), state.learned["temperature"]
        batch, net = (images.detach(), values.detach()), self.convexified(ctx, state, step)
        lr_inner, lr_adjoint = from_host(step, "learning rates", lambda step: rates(ctx, state))
        inner = self.solve(net, batch, lr_inner)
        state.tally.add_(torch.stack([ends_above(inner.curve), falls(inner.curve)]))
        outer = partial(outer_loss, net, self.real(ctx, step))
        with torch.no_grad():
            outer_grads, value = torch.func.grad_and_value(outer, argnums=(0, 1, 2))(inner.point, batch, tau.detach())
            into_move, direct, into_tau = outer_grads
            v = self.adjoint(net.hessian_product(batch), into_move, lr_adjoint).point
        leaves = (images.detach().requires_grad_(), values.detach().requires_grad_())
        mixed = mixed_gradient(net.inner_loss, inner.point, leaves, v)
        gradients = [d + no_longer_than(d, -m) for d, m in zip(direct, mixed, strict=True)] + [into_tau]
        learned = [(x, g) for x, g in zip((images, values, tau), gradients, strict=True) if x.requires_grad]
        inputs, into = zip(*learned, strict=True)
        lead = largest_lead(values.detach())
        return differentiated(value, into, inputs), {"cross_entropy": value + lead, "lead": -lead}

    def after(self, ctx: Context, state: RCIGState, step: int) -> None:
        """Train the network of this step on the updated set; adapt the inner learning rate every ``ADAPT_EVERY``."""
        slot = pool.draw(ctx, self.pool_size, step)
        with torch.no_grad():
            images, targets = state.syn()
            images, values = ctx.task.augment.mirrored(images, pool.targets_of(ctx, targets))
        num_steps = ctx.rng("pool steps", step).integer(1, self.max_train_steps + 1)
        batches = pool.minibatches(ctx, state, step, len(images), num_steps=self.max_train_steps)
        chosen = batches[:num_steps].unbind()
        member = pool.train(ctx, state.pool[slot], images, values, mean_squared_error, chosen, lr=self.lr_pool)
        state.pool[slot] = pool.fresh(ctx, step + 1, slot) if member["age"] >= self.max_age else member
        ctx.ranks.broadcast([state.tally])
        if (step + 1) % ADAPT_EVERY == 0:
            state.lr_inner *= adaptation(*state.tally.tolist())
            state.tally.zero_()

    @torch.no_grad()
    def search(self, ctx: Context, state: RCIGState) -> None:
        """Search for both learning rates with the set, the network and the real images of step 0."""
        images, targets = state.syn()
        batch, net = (images, pool.targets_of(ctx, targets)), self.convexified(ctx, state, 0)
        state.lr_inner = highest_lr(FIRST_LR_INNER, lambda lr: self.solve(net, batch, lr).curve)
        outer = partial(outer_loss, net, self.real(ctx, 0))
        move = self.solve(net, batch, state.lr_inner).point
        into_move = torch.func.grad(outer)(move, batch, state.learned["temperature"])
        product = net.hessian_product(batch)
        state.lr_adjoint = highest_lr(FIRST_LR_ADJOINT, lambda lr: self.adjoint(product, into_move, lr).curve)

    def solve(self, net: Convexified, batch: Batch, lr: Tensor | float) -> Minimum:
        """Minimise the inner loss over d, starting at 0."""
        grad_and_value = torch.func.grad_and_value(lambda move: net.inner_loss(move, batch))
        return minimise(grad_and_value, net.no_move(), num_steps=self.inner_steps, lr=lr)

    def adjoint(self, product: Callable[[Params], Params], g: Params, lr: Tensor | float) -> Minimum:
        """Solve ``H v = g``; ``product`` multiplies by H."""
        return descend(product, g, num_steps=self.adjoint_steps, lr=lr)

    def convexified(self, ctx: Context, state: RCIGState, step: int) -> Convexified:
        """The network of a step, convexified."""
        params, buffers = from_host(step, "member", lambda step: pool.weights(ctx, state.pool, step))
        return Convexified(ctx.task.network, params, buffers, ctx.task.augment, self.ridge)

    def real(self, ctx: Context, step: int) -> tuple[Tensor, Tensor]:
        return ctx.task.train.sample(self.batch_real, ctx.rng("real", step))


@dataclass(frozen=True)
class Convexified:
    """A network linearised at fixed weights, with its last layer replaced by ridge regression; pure functions."""

    network: Functional
    params: Params
    buffers: dict[str, Tensor]
    augment: Augment
    """Its ``flips`` says whether mirror images are added to the set."""
    ridge: float
    """lambda divided by the number of images of the set."""

    def no_move(self) -> Params:
        """A zero change of all weights except the matrix of the last layer."""
        return {name: torch.zeros_like(p) for name, p in self.params.items() if name != HEAD}

    def outputs(self, move: Params, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return h (n, F) and o (n, num_classes), the directional derivative of the logits along ``move``."""
        body = {name: d for name, d in move.items() if name != HEAD_BIAS}

        def features(body: Params) -> Tensor:
            return self.network.features(self.params | body, self.buffers, images, train=False)

        h, along = pushforward(features, {name: self.params[name] for name in body}, body)
        o = along @ self.params[HEAD].T
        return h, o + move[HEAD_BIAS] if HEAD_BIAS in move else o

    def head(self, move: Params, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return (h, a, r): the features of the set, the dual weights of the head, and Y - o, to which it is fitted."""
        images, values = self.augment.mirrored(*batch)
        h, o = self.outputs(move, images)
        return h, ridge_solve(feature_kernel(h, h), values - o, self.ridge * len(batch[0])), values - o

    def inner_loss(self, move: Params, batch: Batch) -> Tensor:
        """L_in. The residual of the head is lambda a, so its error and penalty add up to lambda <r, a> / 2."""
        _, a, r = self.head(move, batch)
        norm = torch.stack([d.square().sum() for d in move.values()]).sum()
        return self.ridge * len(batch[0]) * ((r * a).sum() + norm) / (2 * r.numel())

    def hessian_product(self, batch: Batch) -> Callable[[Params], Params]:
        """Return the product with the Hessian of L_in. With targets 0, L_in is a quadratic form, whose gradient is this
        product."""
        still = (batch[0], torch.zeros_like(batch[1]))
        return torch.func.grad(lambda v: self.inner_loss(v, still))

    def predict(self, move: Params, batch: Batch, images: Tensor) -> Tensor:
        """f (m, num_classes) of ``images``, with the head fitted to ``batch``."""
        h, a, _ = self.head(move, batch)
        h_t, o_t = self.outputs(move, images)
        return o_t + feature_kernel(h_t, h) @ a


def outer_loss(net: Convexified, real: tuple[Tensor, Tensor], move: Params, batch: Batch, tau: Tensor) -> Tensor:
    """The cross-entropy on real images and their classes, minus ``largest_lead`` of the targets."""
    images, classes = real
    return F.cross_entropy(tau.exp() * net.predict(move, batch, images), classes) - largest_lead(batch[1])


def largest_lead(values: Tensor) -> Tensor:
    """The margin between the largest and the second largest value, at most 1/(2 C), averaged over targets (n, C)."""
    first, second = values.topk(2, 1).values.unbind(1)
    return (first - second).clamp(max=1 / (2 * values.shape[1])).mean()


def no_longer_than(direct: Tensor, implicit: Tensor) -> Tensor:
    """Return ``implicit``, scaled down to the norm of ``direct`` if its norm is larger; entries that are not finite
    become 0."""
    scale = (direct.norm() / implicit.norm()).clamp(max=1)
    return torch.nan_to_num(scale * implicit, nan=0.0, posinf=0.0, neginf=0.0)


def mean_squared_error(logits: Tensor, targets: Tensor) -> Tensor:
    """Return half the squared difference, averaged over images and classes."""
    return 0.5 * (logits - targets).square().mean()


def falls(curve: Tensor) -> Tensor:
    """Whether the last value is below the first and no value exceeds the previous one by more than ``RISE`` allows."""
    return (curve[-1] < curve[0]) & (curve.diff() <= RISE * curve.abs().max()).all()


def ends_above(curve: Tensor) -> Tensor:
    """Whether the last value exceeds the first by more than ``RISE`` allows."""
    return curve[-1] - curve[0] > RISE * curve.abs().max()


def rates(ctx: Context, state: RCIGState) -> list[Tensor]:
    """The learning rates of the inner problem and of the linear system, as tensors."""
    return [torch.tensor(lr, dtype=ctx.task.network.dtype) for lr in (state.lr_inner, state.lr_adjoint)]


def highest_lr(first: float, curve: Callable[[float], Tensor]) -> float:
    """Raise the learning rate from ``first`` until the loss curve does not decrease at every step, then reduce it once.

    The search ends because the loss of Adam on a strictly convex function increases at some learning rate.
    """
    lr = first
    while falls(curve(lr)):
        lr *= RAISE
    return BACK_OFF * lr


def adaptation(above: float, monotone: float) -> float:
    """Return the factor of the inner learning rate, given how many of the last ``ADAPT_EVERY`` runs ended above their
    start (``above``) and how many decreased at every step (``monotone``)."""
    if above >= 0.29 * ADAPT_EVERY:
        return 0.9
    return 1.05 if monotone >= 0.7 * ADAPT_EVERY else 1.0
