"""RCIG: reparameterised convexified implicit gradients.

Loo, Hasani, Lechner and Rus, "Dataset Distillation with Convexified Implicit Gradients", ICML 2023.

    min_{X, Y, tau}  E_theta  mean_i CE(exp(tau) f(x_i; d*), y_i)  -  mean_j min(top1(Y_j) - top2(Y_j), 1 / 2C)
    d* = argmin_d  L_in(d) = ( |Y - f(X; d)|^2 / 2 + lambda tr(a^T K a) / 2 + lambda |d|^2 / 2 ) / (n C)
    f(x; d) = o(x; d) + h(x) h(X)^T a,   a = (K + lambda I)^-1 (Y - o(X; d)),   K = h(X) h(X)^T

The network is taken linear about weights theta and without its value there: o is its derivative along d, a move of all
weights but the last layer's matrix, which the ridge regression a on the features h at theta replaces. So L_in is
quadratic in d, and d* is differentiated implicitly (``condense.inner.implicit_gradient``).

    symbol        code
    X, Y          ``state.syn``; Y learned where the labels are ``targets`` (or ``logits``)
    tau           ``state.learned["temperature"]``
    theta         a member of ``state.pool``, drawn at every step, in evaluation mode
    d             ``move``, by name of the parameter
    h, o          ``Convexified.outputs``
    a, L_in, f    ``Convexified.head``, ``Convexified.inner_loss``, ``Convexified.predict``
    lambda        ``ridge`` times the number of images of the set; n is that number, with mirror images
    x_i, y_i      ``batch_real`` real images of any class

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
from condense.inner import Descent, Minimum, Params, minimise, mixed_gradient, pushforward
from condense.kernels import feature_kernel, ridge_solve
from condense.match import differentiated
from condense.method import Context, GradientMethod, GradientState, Loss, Optim
from condense.methods import pool
from condense.networks import Functional, with_options
from condense.schedule import Schedule
from condense.task import Task
from condense.train import Training

HEAD, HEAD_BIAS = "classifier.weight", "classifier.bias"
"""Of the last layer of every ``condense.networks.Network``."""

FIRST_LR_INNER, FIRST_LR_ADJOINT = 1e-5, 5e-5
"""Learning rates from which the search starts."""
RAISE, BACK_OFF = 1.2, 0.84
"""Its factors: for the next attempt, and for the rate that is kept, relative to the first one that fails."""
RISE = 1e-3
"""A rise counts where it is more than this share of the curve's largest magnitude: a smaller one could be rounding."""
ADAPT_EVERY = 50
"""Steps after which the inner learning rate is adapted."""

Batch = tuple[Tensor, Tensor]
"""Images (n, C, H, W) of the set and regression targets (n, num_classes), not yet mirrored."""


@dataclass(kw_only=True)
class RCIGState(GradientState):
    pool: list[pool.Member]
    lr_inner: float
    """Learning rate at which d is found."""
    lr_adjoint: float
    """Learning rate at which ``H v = g`` is solved."""
    tally: Tensor
    """(2,): of the inner runs since the last adaptation, those that ended above their start, and that only fell."""


@final
@dataclass(frozen=True, kw_only=True)
class RCIG(GradientMethod):
    """Convexified training, differentiated implicitly."""

    family: ClassVar[str] = "kernel"
    regresses: ClassVar[bool] = True

    num_steps: int = 10_000
    """Updates of the set."""
    start: Literal["real", "noise"] = "real"
    """Images to start from: real ones drawn per class, or standard normal noise."""
    batch_real: int = 1024
    """Real images a step, of any class; all of them where there are fewer."""
    ridge: float = 5e-4
    """Of the regression and of the move of the weights, times the number of images of the set."""
    inner_steps: int = 20
    """Steps of Adam on the inner loss, from no move."""
    adjoint_steps: int = 20
    """Steps of Adam towards the solution of the linear system of the implicit gradient."""
    pool_size: int = 30
    """Networks that are trained on the set in turn."""
    max_age: int = 100
    """Steps of training after which a network is replaced by a fresh one."""
    max_train_steps: int = 15
    """Most steps for which a network that was used is trained; the number is uniform from 1."""
    lr_pool: float = 5e-5
    """Learning rate of these networks: Adam."""
    training_epochs: int = 2000
    """Epochs of the training that the set is meant for, in batches of up to 256."""
    optim: Optim = Optim(kind="adabelief", lr=3e-3, momentum=0.9)
    """Optimiser of the images (latents)."""
    optim_labels: Optim = Optim(kind="adabelief", lr=3e-3, momentum=0.9)
    """Optimiser of learned labels."""
    optim_decoder: Optim = Optim(kind="adabelief", lr=3e-3, momentum=0.9)
    """Optimiser of a decoder with parameters."""
    optim_temperature: Optim = Optim(kind="adabelief", lr=0.03, momentum=0.9)
    """Optimiser of the logarithm tau of the factor of the predictions."""
    ema: float | None = 0.99
    """Decay of a running average of the set, which is then what is stored; unset: the set as it is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {
            "batch_real": (1, 1024),
            "inner_steps": (2, 20),
            "adjoint_steps": (2, 20),
            "pool_size": (1, 30),
            "max_age": (1, 100),
            "max_train_steps": (1, 15),
            "training_epochs": (1, 2000),
        }
        for name, (lowest, usual) in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(
                    f"method.{name} must be at least {lowest}, got {getattr(self, name)}; a usual value is {usual}"
                )
        for name, usual_value in {"ridge": 5e-4, "lr_pool": 5e-5}.items():
            if not getattr(self, name) > 0:
                raise ValueError(f"method.{name} must be positive, got {getattr(self, name)}; try {usual_value}")

    def optims(self) -> dict[str, Optim]:
        return super().optims() | {"temperature": self.optim_temperature}

    def estimated_work(self, num_images: int, num_classes: int, images_per_class: int) -> float:
        syn = num_classes * images_per_class
        passes = self.inner_steps + self.adjoint_steps + 5 + self.max_train_steps / 2
        return self.num_steps * (passes * syn + 1.3 * self.batch_real)

    def training(self, task: Task) -> Training:
        return Training(
            num_epochs=self.training_epochs,
            batch_size=256,
            lr=1e-4,
            weight_decay=0.0,
            schedule=Schedule(warmup_steps=500, cosine_to=0.01),
            loss="mse",
            optimiser="adam",
        )

    def training_network(self, task: Task) -> str:
        """With ReLU, where softplus takes its place in the distillation."""
        name = task.network.name
        return with_options(name, activation="relu") if "activation=softplus" in name else name

    def training_augment(self, task: Task) -> Augment:
        """That of the recipe; of a recipe without, the published one. Mirror images are joined as in distillation."""
        if task.augment.ops:
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

    def loss(self, ctx: Context, state: RCIGState, step: int, part: int) -> Loss:
        images, targets = state.syn()
        values, tau = pool.targets_of(ctx, targets), state.learned["temperature"]
        batch, net = (images.detach(), values.detach()), self.convexified(ctx, state, step)
        inner = self.solve(net, batch, state.lr_inner)
        state.tally = state.tally + torch.stack([ends_above(inner.curve), falls(inner.curve)])
        outer = partial(outer_loss, net, self.real(ctx, step))
        with torch.no_grad():
            found, value = torch.func.grad_and_value(outer, argnums=(0, 1, 2))(inner.point, batch, tau.detach())
            into_move, direct, into_tau = found
            v = self.adjoint(state.lr_adjoint).solve(net.hessian_product(batch), into_move)
        leaves = (images.detach().requires_grad_(), values.detach().requires_grad_())
        mixed = mixed_gradient(net.inner_loss, inner.point, leaves, v)
        gradients = [d + no_longer_than(d, -m) for d, m in zip(direct, mixed, strict=True)] + [into_tau]
        known = [(x, g) for x, g in zip((images, values, tau), gradients, strict=True) if x.requires_grad]
        inputs, into = zip(*known, strict=True)
        lead = largest_lead(values.detach())
        return differentiated(value, into, inputs), {"cross_entropy": value + lead, "lead": -lead}

    def after(self, ctx: Context, state: RCIGState, step: int) -> None:
        """Train the network that was used on the updated set; adapt the inner learning rate from time to time."""
        slot = pool.draw(ctx, self.pool_size, step)
        with torch.no_grad():
            images, targets = state.syn()
            images, values = ctx.task.augment.mirrored(images, pool.targets_of(ctx, targets))
        num_steps = int(torch.randint(1, self.max_train_steps + 1, (), generator=ctx.rng("pool steps", step)))
        member = pool.train(
            ctx,
            state.pool[slot],
            images,
            values,
            mean_squared_error,
            ctx.rng("pool batch", step),
            lr=self.lr_pool,
            num_steps=num_steps,
        )
        state.pool[slot] = pool.fresh(ctx, step + 1, slot) if member["age"] >= self.max_age else member
        ctx.ranks.broadcast([state.tally])
        if (step + 1) % ADAPT_EVERY == 0:
            state.lr_inner *= adaptation(*state.tally.tolist())
            state.tally = torch.zeros_like(state.tally)

    @torch.no_grad()
    def search(self, ctx: Context, state: RCIGState) -> None:
        """Find both learning rates, on the set, the network and the real images of step 0."""
        images, targets = state.syn()
        batch, net = (images, pool.targets_of(ctx, targets)), self.convexified(ctx, state, 0)
        state.lr_inner = highest_lr(FIRST_LR_INNER, lambda lr: self.solve(net, batch, lr).curve)
        outer = partial(outer_loss, net, self.real(ctx, 0))
        move = self.solve(net, batch, state.lr_inner).point
        into_move = torch.func.grad(outer)(move, batch, state.learned["temperature"])
        product = net.hessian_product(batch)
        state.lr_adjoint = highest_lr(FIRST_LR_ADJOINT, lambda lr: self.adjoint(lr).minimum(product, into_move).curve)

    def solve(self, net: Convexified, batch: Batch, lr: float) -> Minimum:
        """d, from no move."""
        grad_and_value = torch.func.grad_and_value(lambda move: net.inner_loss(move, batch))
        return minimise(grad_and_value, net.no_move(), num_steps=self.inner_steps, lr=lr)

    def adjoint(self, lr: float) -> Descent:
        return Descent(num_steps=self.adjoint_steps, lr=lr)

    def convexified(self, ctx: Context, state: RCIGState, step: int) -> Convexified:
        """About the network of a step."""
        member = state.pool[pool.draw(ctx, self.pool_size, step)]
        return Convexified(ctx.task.network, member["params"], member["buffers"], ctx.task.augment, self.ridge)

    def real(self, ctx: Context, step: int) -> tuple[Tensor, Tensor]:
        return ctx.task.train.sample(self.batch_real, ctx.rng("real", step))


@dataclass(frozen=True)
class Convexified:
    """A network about frozen weights: linear in a move of its body, its last layer solved for; pure functions."""

    network: Functional
    params: Params
    buffers: dict[str, Tensor]
    augment: Augment
    """Says whether the set is mirrored."""
    ridge: float
    """lambda over the number of images of the set."""

    def no_move(self) -> Params:
        """Of all that moves: the body, and the bias of the last layer."""
        return {name: torch.zeros_like(p) for name, p in self.params.items() if name != HEAD}

    def outputs(self, move: Params, images: Tensor) -> tuple[Tensor, Tensor]:
        """h (n, F), and o (n, num_classes): the derivative of the logits along ``move``."""
        body = {name: d for name, d in move.items() if name != HEAD_BIAS}

        def features(body: Params) -> Tensor:
            return self.network.features(self.params | body, self.buffers, images, train=False)

        h, along = pushforward(features, {name: self.params[name] for name in body}, body)
        o = along @ self.params[HEAD].T
        return h, o + move[HEAD_BIAS] if HEAD_BIAS in move else o

    def head(self, move: Params, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(h, a, r): features of the set, dual weights of the head, and Y - o, what the head is fitted to."""
        images, values = self.augment.mirrored(*batch)
        h, o = self.outputs(move, images)
        return h, ridge_solve(feature_kernel(h, h), values - o, self.ridge * len(batch[0])), values - o

    def inner_loss(self, move: Params, batch: Batch) -> Tensor:
        """L_in. What the head leaves of r is lambda a, so that error and penalty of the head make lambda <r, a> / 2."""
        _, a, r = self.head(move, batch)
        norm = torch.stack([d.square().sum() for d in move.values()]).sum()
        return self.ridge * len(batch[0]) * ((r * a).sum() + norm) / (2 * r.numel())

    def hessian_product(self, batch: Batch) -> Callable[[Params], Params]:
        """The Hessian of L_in. With targets of zero L_in is a quadratic form alone: its gradient is the product."""
        still = (batch[0], torch.zeros_like(batch[1]))
        return torch.func.grad(lambda v: self.inner_loss(v, still))

    def predict(self, move: Params, batch: Batch, images: Tensor) -> Tensor:
        """f (m, num_classes) of ``images``, with the head fitted to ``batch``."""
        h, a, _ = self.head(move, batch)
        h_t, o_t = self.outputs(move, images)
        return o_t + feature_kernel(h_t, h) @ a


def outer_loss(net: Convexified, real: tuple[Tensor, Tensor], move: Params, batch: Batch, tau: Tensor) -> Tensor:
    """Cross-entropy on real images and their classes, less the lead of the largest target as far as it counts."""
    images, classes = real
    return F.cross_entropy(tau.exp() * net.predict(move, batch, images), classes) - largest_lead(batch[1])


def largest_lead(values: Tensor) -> Tensor:
    """Mean over targets (n, num_classes) of how far the largest leads the second, which counts up to 1/(2 C)."""
    first, second = values.topk(2, 1).values.unbind(1)
    return (first - second).clamp(max=1 / (2 * values.shape[1])).mean()


def no_longer_than(direct: Tensor, implicit: Tensor) -> Tensor:
    """``implicit``, scaled down to the norm of ``direct`` where it is longer; nothing where it is not finite."""
    scale = (direct.norm() / implicit.norm()).clamp(max=1)
    return torch.nan_to_num(scale * implicit, nan=0.0, posinf=0.0, neginf=0.0)


def mean_squared_error(logits: Tensor, targets: Tensor) -> Tensor:
    """Half the squared difference, averaged over images and classes."""
    return 0.5 * (logits - targets).square().mean()


def falls(curve: Tensor) -> Tensor:
    """Whether the last value is below the first and no value is above the one before, by the measure of ``RISE``."""
    return (curve[-1] < curve[0]) & (curve.diff() <= RISE * curve.abs().max()).all()


def ends_above(curve: Tensor) -> Tensor:
    """Whether the last value is above the first, by the measure of ``RISE``."""
    return curve[-1] - curve[0] > RISE * curve.abs().max()


def highest_lr(first: float, curve: Callable[[float], Tensor]) -> float:
    """Raise the learning rate from ``first`` until a curve does not fall all the way, and step back from there.

    The curve of Adam on a strictly convex function rises at some rate, so that there is an end.
    """
    lr = first
    while falls(curve(lr)):
        lr *= RAISE
    return BACK_OFF * lr


def adaptation(above: float, monotone: float) -> float:
    """Factor of the inner learning rate, where of the last ``ADAPT_EVERY`` runs ``above`` ended above their start and
    ``monotone`` only fell."""
    if above >= 0.29 * ADAPT_EVERY:
        return 0.9
    return 1.05 if monotone >= 0.7 * ADAPT_EVERY else 1.0
