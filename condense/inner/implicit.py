"""Implicit differentiation of the solution of an inner problem with respect to its inputs.

With theta*(x) = argmin_theta L(theta, x) and an outer loss F, the gradient of L in theta is zero at theta* for every x.
Differentiating this equation gives

    H dtheta*/dx = - d2L / dtheta dx,   and so   dF/dx = - d/dx <v, dL/dtheta>,   where  H v = dF/dtheta.

H is the Hessian of L in theta: symmetric, and positive definite if L is strictly convex. Only products with H are
computed, each as the gradient of an inner product with a gradient. The direct dependence of F on x, which does not go
through theta*, is not included.
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
from condense.inner.rules import Adam, Params, Rule, number
from condense.rng import Generators

PLAIN_ADAM = Adam(eps_root=0.0)
"""Adam without ``eps_root``, which is only needed where steps are differentiated."""

Product = Callable[[Params], Params]
"""``product(v) -> H v``: trees of tensors with the shapes of the parameters."""


class Minimum(NamedTuple):
    """The final point of a minimisation and its curve."""

    point: Params
    curve: Tensor
    """(num_steps,): the value before each step."""


def pushforward(function: Callable[[Params], Any], params: Params, direction: Params) -> tuple[Any, Any]:
    """Return the value of ``function`` at ``params`` and its derivative along ``direction``.

    It can be differentiated again, except through BatchNorm in training mode, ``F.instance_norm`` and ``F.layer_norm``:
    torch treats parts of their forward-mode derivatives as constants, and the result is wrong without a warning.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)  # raised within torch
        value, derivative, *_ = torch.func.jvp(function, (params,), (direction,))
    return value, derivative


def minimise(
    grad_and_value: Callable[[Params], tuple[Params, Tensor]],
    start: Params,
    *,
    num_steps: int,
    lr: Tensor | float,
    rule: Rule = PLAIN_ADAM,
) -> Minimum:
    """Take ``num_steps`` steps of ``rule`` from ``start``, without building a graph.

    Args:
        grad_and_value: returns the gradient and the value of the function, like
        ``torch.func.grad_and_value(function)``.
    """
    values = []
    with torch.no_grad():
        params, state = start, rule.init(start)
        like = next(iter(start.values()))
        lr = number(lr, like)
        for _ in range(num_steps):
            grads, value = grad_and_value(params)
            params, state = rule.update(grads, state, params, lr)
            values.append(value)
    return Minimum(params, torch.stack(values))


def descend(product: Product, g: Params, *, num_steps: int, lr: Tensor | float, rule: Rule = PLAIN_ADAM) -> Minimum:
    """Minimise the quadratic ``v H v / 2 - <v, g>``, whose minimum solves ``H v = g``, from zero."""

    def quadratic(v: Params) -> tuple[Params, Tensor]:
        curved = product(v)
        return _add(curved, g, -1.0), _dot(v, curved) / 2 - _dot(v, g)

    zero = {name: torch.zeros_like(x) for name, x in g.items()}
    return minimise(quadratic, zero, num_steps=num_steps, lr=lr, rule=rule)


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """A solver of ``H v = g`` that uses only products with H."""

    name: ClassVar[str]
    exact: ClassVar[bool]
    """Whether it converges to the solution, up to rounding, given enough steps."""

    @abstractmethod
    def solve(self, product: Product, g: Params) -> Params:
        """Return v; ``product`` multiplies by H, which is symmetric and positive definite."""


@dataclass(frozen=True, kw_only=True)
class ConjugateGradients(Solver):
    """Conjugate gradients (Hestenes and Stiefel, 1952): exact after as many steps as H has distinct eigenvalues. Where
    ``max_steps`` ends them before ``tol`` is reached, the result is an approximation."""

    name: ClassVar[str] = "conjugate-gradients"
    exact: ClassVar[bool] = True
    max_steps: int = 100
    """Maximum number of products with H."""
    tol: float = 1e-6
    """Tolerance: the iteration stops when the norm of the residual is at most this multiple of the norm of g."""

    def __post_init__(self) -> None:
        if self.max_steps < 1 or not self.tol > 0:
            raise ValueError(
                f"{self.name} needs max_steps >= 1 and tol > 0, got {self.max_steps} and {self.tol}; give 100 and 1e-6"
            )

    def solve(self, product: Product, g: Params) -> Params:
        """Return v. Raises FloatingPointError if H is found not to be positive definite."""
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
                    f"{self.name}: the inner loss is not convex: its curvature along a direction is "
                    f"{curvature.item():g}; use Descent()"
                )
            v = _add(v, direction, square / curvature)
            residual = _add(residual, curved, -square / curvature)
            before, square = square, _dot(residual, residual)
            direction = _add(residual, direction, square / before)
        return v


@dataclass(frozen=True, kw_only=True)
class Descent(Solver):
    """An approximate solver: a few optimiser steps from zero on ``v H v / 2 - <v, g>`` (Loo et al. 2023, RCIG)."""

    name: ClassVar[str] = "descent"
    exact: ClassVar[bool] = False
    num_steps: int = 20
    """Number of optimiser steps, each of which needs one product with H."""
    lr: float = 1e-3
    """Learning rate of the optimiser."""
    rule: Rule = PLAIN_ADAM
    """The optimiser of the quadratic."""

    def __post_init__(self) -> None:
        if self.num_steps < 1 or not self.lr > 0:
            raise ValueError(
                f"{self.name} needs num_steps >= 1 and lr > 0, got {self.num_steps} and {self.lr}; give 20 and 1e-3"
            )

    def solve(self, product: Product, g: Params) -> Params:
        return descend(product, g, num_steps=self.num_steps, lr=self.lr, rule=self.rule).point


def hessian_product(loss_fn: LossFn, theta: Params, inputs: Any) -> Product:
    """Return a function that multiplies by the Hessian of ``loss_fn(theta, inputs)`` in ``theta``.

    Dropout draws the same masks for every product, so that all products are with the same Hessian.
    """
    generators = Generators.of(next(iter(theta.values())).device)
    fixed = tree_map_only(Tensor, Tensor.detach, inputs)
    point = {name: p.detach().clone() for name, p in theta.items()}

    def directional(theta: Params, v: Params) -> Tensor:
        return _dot(torch.func.grad(loss_fn)(theta, fixed), v)

    def product(v: Params) -> Params:
        with generators.replayed():
            result: Params = torch.func.grad(directional)(point, v)
        return result

    return product


def mixed_gradient(loss_fn: LossFn, theta: Params, inputs: Any, v: Params) -> list[Tensor]:
    """Return ``d/dx <v, dL/dtheta>`` for every tensor x of ``inputs`` that requires grad, in order; v is constant."""
    leaves, spec = tree_flatten(tree_map_only(Tensor, Tensor.detach, inputs))
    wanted = [i for i, x in enumerate(tree_flatten(inputs)[0]) if isinstance(x, Tensor) and x.requires_grad]
    point = {name: p.detach().clone() for name, p in theta.items()}

    def directional(inputs: list[Tensor]) -> Tensor:
        merged = list(leaves)
        for i, x in zip(wanted, inputs, strict=True):
            merged[i] = x
        return _dot(torch.func.grad(loss_fn)(point, tree_unflatten(merged, spec)), v)

    with torch.no_grad():
        gradients: list[Tensor] = torch.func.grad(directional)([leaves[i] for i in wanted])
    return gradients


def implicit_gradient(
    loss_fn: LossFn, theta: Params, inputs: Any, cotangent: Params, solver: Solver = ConjugateGradients()
) -> list[Tensor]:
    """Return the gradient of an outer loss in ``inputs`` through the solution of the inner problem.

    Args:
        loss_fn: the inner loss, ``loss_fn(theta, inputs) -> scalar``; pure and twice differentiable.
        theta: the minimum of the inner loss at these inputs, or a point near it.
        inputs: a pytree. Its tensors that require grad get a gradient; everything else in it is constant.
        cotangent: the gradient of the outer loss in ``theta``.
        solver: solves ``H v = cotangent`` for v.

    Returns:
        A gradient for each tensor of ``inputs`` that requires grad, in order.
    """
    with torch.no_grad():
        g = {name: x.detach() for name, x in cotangent.items()}
        v = solver.solve(hessian_product(loss_fn, theta, inputs), g)
    return [-x for x in mixed_gradient(loss_fn, theta, inputs, v)]


def _dot(a: Params, b: Params) -> Tensor:
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()


def _add(a: Params, b: Params, scale: Tensor | float) -> Params:
    return {name: a[name] + scale * b[name] for name in a}
