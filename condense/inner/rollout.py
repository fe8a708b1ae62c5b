"""The steps of an inner training run as pure functions: forward, forward with graph, and backward.

Each function exists in two versions. The eager version uses plain autograd, which needs less memory than nested
``torch.func`` transforms. The version for ``torch.compile``, which does not support double backward, uses
``torch.func``. It differentiates the update rule separately, at the gradient g that the roll-out stored. With c the
cotangent of g, the remaining terms are the gradients of <g, c>. This inner product is not computed in forward mode,
because torch treats parts of the forward-mode derivatives of BatchNorm and LayerNorm as constants when it
differentiates them again.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from condense.compute import compiling
from condense.inner.rules import Params, Rule, State
from condense.rng import Generators

Batch = tuple[Any, ...]
"""The input of one step, a pytree: its tensors may require grad, and everything else in it is static."""
LossFn = Callable[[Params, Any], Tensor]
"""``loss_fn(theta, batch) -> scalar``, pure."""
Point = tuple[Params, State]
"""The state of a run: the parameters and the state of the rule."""
Prepare = Callable[[Any], Batch]
"""Converts an item of the batches to the input of ``loss_fn``; differentiable and deterministic."""


@dataclass(frozen=True)
class Rollout:
    """The definition of an inner training run, which an adjoint runs and differentiates."""

    loss_fn: LossFn
    prepare: Prepare
    rule: Rule
    start: Point
    batches: Sequence[Any]
    lrs: Sequence[Tensor]
    compile: bool

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def sources(self) -> list[Tensor]:
        """The distinct tensors among the inputs that require grad."""
        leaves = tree_leaves((self.start, self.batches, self.lrs))
        return list({id(x): x for x in leaves if isinstance(x, Tensor) and x.requires_grad}.values())

    @property
    def recorded(self) -> bool:
        """Whether a gradient may be requested."""
        return torch.is_grad_enabled() and bool(self.sources)

    def generators(self) -> Generators:
        """Return the state of the generators from which the next step may draw, for example for dropout."""
        return Generators.of(self.lrs[0].device)

    def step(self, t: int, point: Point) -> Point:
        """Take step ``t`` with a graph: differentiable in the point, the batch and the learning rate."""
        return _eager_step(self.loss_fn, self.rule, point, self.prepare(self.batches[t]), self.lrs[t])

    def advance(self, t: int, point: Point) -> tuple[Point, Params]:
        """Take step ``t`` without a graph, and return the new point and the gradient of the step.

        An eager step returns an empty dict for the gradient, since its backward pass computes the gradient again.
        """
        with torch.no_grad():
            args = _detached((point, self.prepare(self.batches[t]), self.lrs[t]))
            result: tuple[Point, Params] = self._call(_step, _eager_advance, self.loss_fn, self.rule, *args)
        return result

    def pullback(self, t: int, point: Point, grads: Params, lam: Point) -> tuple[Point, list[tuple[Tensor, Tensor]]]:
        """Backpropagate through step ``t`` by one vector-Jacobian product.

        Args:
            t: the step.
            point: the point before the step.
            grads: the gradient that ``advance`` returned for the step.
            lam: the gradient of the outer loss with respect to the point after the step.

        Returns:
            The gradient with respect to the point before the step, and a pair (tensor, gradient through this step) for
            each tensor of the batch that requires grad and for the learning rate.
        """
        items, item_spec = tree_flatten(self.batches[t])
        requested = _require_grad(items)
        sources = [items[i] for i in requested]
        inputs = [x.detach().requires_grad_() for x in sources]
        with torch.enable_grad():
            batch = self.prepare(_merged(items, requested, inputs, item_spec))
        leaves, spec = tree_flatten(batch)
        where = _require_grad(leaves)
        point, grads, fixed, lr, lam = _detached((point, grads, leaves, self.lrs[t], lam))
        args = (self.loss_fn, self.rule, point, grads, fixed, where, spec, lr, lam)
        with torch.no_grad():
            before, into_batch, into_lr = self._call(_pullback, _eager_pullback, *args)
        if where:
            outputs = [leaves[i] for i in where]
            into_items = torch.autograd.grad(outputs, inputs, into_batch, allow_unused=True, materialize_grads=True)
        else:
            into_items = tuple(torch.zeros_like(x) for x in inputs)
        return before, [*zip(sources, into_items, strict=True), (self.lrs[t], into_lr)]

    def after(self, num_steps: int) -> Rollout:
        """Take ``num_steps`` steps without a graph and return the rest of the run."""
        point = self.start
        for t in range(num_steps):
            point, _ = self.advance(t, point)
        return replace(self, start=point, batches=self.batches[num_steps:], lrs=self.lrs[num_steps:])

    def until(self, num_steps: int) -> Rollout:
        """Return the first ``num_steps`` steps of the run."""
        return replace(self, batches=self.batches[:num_steps], lrs=self.lrs[:num_steps])

    def _call(self, function: Callable[..., Any], eager: Callable[..., Any], *args: Any) -> Any:
        failed = _uncompilable.setdefault(self.loss_fn, set())
        if not self.compile or function in failed:
            return eager(*args)
        try:
            with compiling():
                return _compiled(function)(*args)
        except Exception as error:
            output = eager(*args)  # if loss_fn itself raised the error, it is raised again here
            if not failed:
                reason = next(iter(str(error).splitlines()), "")
                warnings.warn(f"an inner step runs eagerly because it does not compile: {reason}", stacklevel=2)
            failed.add(function)  # only this function: otherwise a resumed run could choose differently
            return output


_uncompilable: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The functions of a step that do not compile, by loss function."""


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function once for all runs.

    ``loss_fn`` and ``rule`` are among its arguments. torch.compile identifies a function by its code and the variables
    it closes over, so a ``loss_fn`` that is created again at every outer step is not compiled again.
    """
    return torch.compile(function, fullgraph=True, dynamic=False)


def _detached(tree: Any) -> Any:
    return tree_map_only(Tensor, Tensor.detach, tree)


def _eager_step(loss_fn: LossFn, rule: Rule, point: Point, batch: Batch, lr: Tensor) -> Point:
    theta, state = point
    theta = {name: p if p.requires_grad else p.detach().requires_grad_() for name, p in theta.items()}
    with torch.enable_grad():
        grads = _gradient(loss_fn(theta, batch), theta, create_graph=True)
        return rule.update(grads, state, theta, lr)


def _eager_advance(loss_fn: LossFn, rule: Rule, point: Point, batch: Batch, lr: Tensor) -> tuple[Point, Params]:
    theta, state = point
    with torch.enable_grad():
        leaves = {name: p.detach().requires_grad_() for name, p in theta.items()}
        grads = _gradient(loss_fn(leaves, batch), leaves, create_graph=False)
    return rule.update(grads, state, theta, lr), {}


def _gradient(loss: Tensor, theta: Params, create_graph: bool) -> Params:
    grads = torch.autograd.grad(
        loss, list(theta.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return dict(zip(theta, grads, strict=True))


def _eager_pullback(
    loss_fn: LossFn,
    rule: Rule,
    point: Point,
    grads: Params,
    leaves: list[Any],
    where: tuple[int, ...],
    spec: TreeSpec,
    lr: Tensor,
    lam: Point,
) -> Any:
    fixed, structure = tree_flatten((point, [leaves[i] for i in where], lr))
    inputs = [x.detach().requires_grad_() for x in fixed]
    point, tensors, lr = tree_unflatten(inputs, structure)
    after = _eager_step(loss_fn, rule, point, _merged(leaves, where, tensors, spec), lr)
    pairs = [(x, c) for x, c in zip(tree_leaves(after), tree_leaves(lam), strict=True) if x.requires_grad]
    outputs, cotangents = zip(*pairs, strict=True)
    gradients = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True, materialize_grads=True)
    return tree_unflatten(gradients, structure)


def _step(loss_fn: LossFn, rule: Rule, point: Point, batch: Batch, lr: Tensor) -> tuple[Point, Params]:
    theta, state = point
    grads = torch.func.grad(loss_fn)(theta, batch)
    return rule.update(grads, state, theta, lr), grads


def _pullback(
    loss_fn: LossFn,
    rule: Rule,
    point: Point,
    grads: Params,
    leaves: list[Any],
    where: tuple[int, ...],
    spec: TreeSpec,
    lr: Tensor,
    lam: Point,
) -> Any:
    theta, state = point
    into_grads, into_state, into_theta, into_lr = torch.func.vjp(rule.update, grads, state, theta, lr)[1](lam)

    def product(theta: Params, tensors: list[Tensor]) -> Tensor:
        grads = torch.func.grad(loss_fn)(theta, _merged(leaves, where, tensors, spec))
        return torch.stack([(grads[name] * into_grads[name]).sum() for name in theta]).sum()

    curvature, into_batch = torch.func.grad(product, argnums=(0, 1))(theta, [leaves[i] for i in where])
    before = {name: into_theta[name] + curvature[name] for name in theta}
    return (before, into_state), into_batch, into_lr


def _require_grad(leaves: Sequence[Any]) -> tuple[int, ...]:
    return tuple(i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad)


def _merged(leaves: list[Any], where: tuple[int, ...], tensors: list[Tensor], spec: TreeSpec) -> Any:
    merged = list(leaves)
    for i, x in zip(where, tensors, strict=True):
        merged[i] = x
    return tree_unflatten(merged, spec)
