"""Implicit differentiation: how the solution of an inner problem depends on its inputs, however it was found.

With theta*(x) = argmin_theta L(theta, x) and an outer loss F, the gradient of L in theta is zero at theta* whatever x
is. Differentiated, that says

    H dtheta*/dx = - d2L / dtheta dx,   and so   dF/dx = - d/dx <v, dL/dtheta>,   where  H v = dF/dtheta,

H the Hessian of L in theta: symmetric, and positive definite where L is strictly convex. Only products with H are
taken, each the gradient of a product with a gradient. What x does to F past theta*, the direct gradient, is no part
of it.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from condense.inner.rollout import LossFn
from condense.inner.rules import Adam, Params, Rule
from condense.rng import Generators

PLAIN_ADAM = Adam(eps_root=0.0)
"""Nothing is differentiated through its steps, so that its root needs no help at zero."""

Product = Callable[[Params], Params]
"""``product(v) -> H v``: trees of tensors shaped as the parameters."""


class Minimum(NamedTuple):
    """Where a descent ended, and how it went."""

    point: Params
    curve: Tensor
    """(num_steps,): the value before each step."""


def pushforward(function: Callable[[Params], Any], params: Params, direction: Params) -> tuple[Any, Any]:
    """The value of ``function`` at ``params``, and its derivative along ``direction``.

    It can be differentiated again, except through BatchNorm in training mode, ``F.instance_norm`` and ``F.layer_norm``:
    torch treats parts of their forward-mode derivatives as constants, and the result is wrong without a warning.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)  # torch's own
        found = torch.func.jvp(function, (params,), (direction,))
    return found[0], found[1]


def minimise(
    grad_and_value: Callable[[Params], tuple[Params, Tensor]],
    start: Params,
    *,
    num_steps: int,
    lr: float,
    rule: Rule = PLAIN_ADAM,
) -> Minimum:
    """``num_steps`` steps of ``rule`` from ``start``; no graph is kept.

    Args:
        grad_and_value: of the function, as ``torch.func.grad_and_value`` makes it.
    """
    values = []
    with torch.no_grad():
        params, state = start, rule.init(start)
        like = next(iter(start.values()))
        rate = torch.tensor(lr, dtype=like.dtype, device=like.device)
        for _ in range(num_steps):
            grads, value = grad_and_value(params)
            params, state = rule.update(grads, state, params, rate)
            values.append(value)
    return Minimum(params, torch.stack(values))


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """A way to solve ``H v = g`` that sees of H its products only."""

    name: ClassVar[str]
    exact: ClassVar[bool]
    """Whether it gets as near to the solution as rounding allows, given the steps."""

    @abstractmethod
    def solve(self, product: Product, g: Params) -> Params:
        """v; ``product`` is H, symmetric and positive definite."""


@dataclass(frozen=True, kw_only=True)
class ConjugateGradients(Solver):
    """Conjugate gradients (Hestenes and Stiefel, 1952): exact after as many steps as H has distinct eigenvalues."""

    name: ClassVar[str] = "conjugate-gradients"
    exact: ClassVar[bool] = True
    max_steps: int = 100
    """Products with H at most."""
    tol: float = 1e-6
    """Stops where the residual's norm is this share of that of g."""

    def __post_init__(self) -> None:
        if self.max_steps < 1 or not self.tol > 0:
            raise ValueError(
                f"{self.name} needs max_steps >= 1 and tol > 0, got {self.max_steps} and {self.tol}; take 100 and 1e-6"
            )

    def solve(self, product: Product, g: Params) -> Params:
        """Raises FloatingPointError where H turns out not to be positive definite."""
        v = {name: torch.zeros_like(x) for name, x in g.items()}
        residual = direction = g
        square = _dot(g, g)
        enough = self.tol**2 * square
        for _ in range(self.max_steps):
            if square <= enough:
                break
            curved = product(direction)
            curvature = _dot(direction, curved)
            if not curvature > 0:
                raise FloatingPointError(
                    f"{self.name}: the inner loss curves by {curvature.item():g} along a direction, it is not convex "
                    "there; take Descent()"
                )
            v = _add(v, direction, square / curvature)
            residual = _add(residual, curved, -square / curvature)
            before, square = square, _dot(residual, residual)
            direction = _add(residual, direction, square / before)
        return v


@dataclass(frozen=True, kw_only=True)
class Descent(Solver):
    """A few steps of an optimiser from zero on ``v H v / 2 - <v, g>`` (Loo et al. 2023, RCIG): an approximation."""

    name: ClassVar[str] = "descent"
    exact: ClassVar[bool] = False
    num_steps: int = 20
    """Steps, of one product with H each."""
    lr: float = 1e-3
    """Learning rate."""
    rule: Rule = PLAIN_ADAM
    """The optimiser."""

    def __post_init__(self) -> None:
        if self.num_steps < 1 or not self.lr > 0:
            raise ValueError(
                f"{self.name} needs num_steps >= 1 and lr > 0, got {self.num_steps} and {self.lr}; take 20 and 1e-3"
            )

    def minimum(self, product: Product, g: Params) -> Minimum:
        """v, and what became of the quadratic on the way."""

        def quadratic(v: Params) -> tuple[Params, Tensor]:
            curved = product(v)
            return _add(curved, g, -1.0), _dot(v, curved) / 2 - _dot(v, g)

        zero = {name: torch.zeros_like(x) for name, x in g.items()}
        return minimise(quadratic, zero, num_steps=self.num_steps, lr=self.lr, rule=self.rule)

    def solve(self, product: Product, g: Params) -> Params:
        return self.minimum(product, g).point


def hessian_product(loss_fn: LossFn, theta: Params, inputs: Any) -> Product:
    """The Hessian of ``loss_fn(theta, inputs)`` in ``theta``, as a function that multiplies by it.

    A network with dropout draws the same masks for every product, so that all are products with one Hessian.
    """
    draws = Generators.of(next(iter(theta.values())).device)
    fixed = tree_map_only(Tensor, Tensor.detach, inputs)
    point = {name: p.detach().clone() for name, p in theta.items()}

    def slope(theta: Params, v: Params) -> Tensor:
        return _dot(torch.func.grad(loss_fn)(theta, fixed), v)

    def product(v: Params) -> Params:
        with draws.replayed():
            along: Params = torch.func.grad(slope)(point, v)
        return along

    return product


def mixed_gradient(loss_fn: LossFn, theta: Params, inputs: Any, v: Params) -> list[Tensor]:
    """``d/dx <v, dL/dtheta>`` for every tensor x of ``inputs`` that requires grad, in their order; v is a constant."""
    leaves, spec = tree_flatten(tree_map_only(Tensor, Tensor.detach, inputs))
    wanted = [i for i, x in enumerate(tree_flatten(inputs)[0]) if isinstance(x, Tensor) and x.requires_grad]
    point = {name: p.detach().clone() for name, p in theta.items()}

    def slope(chosen: list[Tensor]) -> Tensor:
        merged = list(leaves)
        for i, x in zip(wanted, chosen, strict=True):
            merged[i] = x
        return _dot(torch.func.grad(loss_fn)(point, tree_unflatten(merged, spec)), v)

    with torch.no_grad():
        found: list[Tensor] = torch.func.grad(slope)([leaves[i] for i in wanted])
    return found


def implicit_gradient(
    loss_fn: LossFn, theta: Params, inputs: Any, cotangent: Params, solver: Solver = ConjugateGradients()
) -> list[Tensor]:
    """The gradient of an outer loss in ``inputs`` that comes through the solution of the inner problem.

    Args:
        loss_fn: the inner loss, ``loss_fn(theta, inputs) -> scalar``; pure, twice differentiable.
        theta: its minimum at these inputs, or near it.
        inputs: a pytree. Its tensors that require grad get a gradient, all else in it is constant.
        cotangent: gradient of the outer loss in ``theta``.
        solver: how to find v with ``H v = cotangent``.

    Returns:
        A gradient for each tensor of ``inputs`` that requires grad, in their order.
    """
    with torch.no_grad():
        g = {name: x.detach() for name, x in cotangent.items()}
        v = solver.solve(hessian_product(loss_fn, theta, inputs), g)
    return [-x for x in mixed_gradient(loss_fn, theta, inputs, v)]


def _dot(a: Params, b: Params) -> Tensor:
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()


def _add(a: Params, b: Params, scale: Tensor | float) -> Params:
    return {name: a[name] + scale * b[name] for name in a}
