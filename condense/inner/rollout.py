"""The steps of an inner training run as pure functions: forward, forward with graph, and backward.

Each exists twice. Eager, on plain autograd, which holds less memory than nested ``torch.func`` transforms; and on
``torch.func``, which ``torch.compile`` can trace where it refuses double backward. There the rule goes back by itself,
with the gradient g that the roll-out kept; with c the cotangent of g, the gradients of the slope <g, c> are all that
remains. The slope is a product with a gradient and not a forward-mode derivative, of which torch treats parts as
constants in BatchNorm and LayerNorm where it is differentiated again.
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
"""The input of one step, a pytree: its tensors may require grad, everything else in it is static."""
LossFn = Callable[[Params, Any], Tensor]
"""``loss_fn(theta, batch) -> scalar``, pure."""
Point = tuple[Params, State]
"""Where a run stands: parameters and the state of the rule."""
Prepare = Callable[[Any], Batch]
"""From an item of the batches to what ``loss_fn`` sees: differentiable, draws nothing."""


@dataclass(frozen=True)
class Rollout:
    """An inner training run that has not happened yet: what an adjoint runs, and then goes back through."""

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
        """Whether a gradient may be asked for."""
        return torch.is_grad_enabled() and bool(self.sources)

    def generators(self) -> Generators:
        """What the next step draws from, if it draws: dropout does."""
        return Generators.of(self.lrs[0].device)

    def step(self, t: int, point: Point) -> Point:
        """Step ``t`` as autograd sees it: differentiable in the point, the batch and the learning rate."""
        return _eager_step(self.loss_fn, self.rule, point, self.prepare(self.batches[t]), self.lrs[t])

    def advance(self, t: int, point: Point) -> tuple[Point, Params]:
        """Step ``t`` to first order, and the gradient it took: no graph outlives it.

        An eager step gives no gradient (an empty dict): its way back has one anyway.
        """
        with torch.no_grad():
            args = _detached((point, self.prepare(self.batches[t]), self.lrs[t]))
            stepped: tuple[Point, Params] = self._call(_step, _eager_advance, self.loss_fn, self.rule, *args)
        return stepped

    def pullback(self, t: int, point: Point, grads: Params, lam: Point) -> tuple[Point, list[tuple[Tensor, Tensor]]]:
        """The adjoint of step ``t``: one vector-Jacobian product.

        Args:
            t: the step.
            point: where the run stood before it.
            grads: the gradient that ``advance`` took there.
            lam: gradient of the outer loss with respect to the point after it.

        Returns:
            The gradient with respect to the point before it, and for each tensor of the batch that requires
            grad and the learning rate the pair (tensor, gradient that came through this step).
        """
        items, item_spec = tree_flatten(self.batches[t])
        asked = _require_grad(items)
        sources = [items[i] for i in asked]
        inputs = [x.detach().requires_grad_() for x in sources]
        with torch.enable_grad():
            batch = self.prepare(_merged(items, asked, inputs, item_spec))
        leaves, spec = tree_flatten(batch)
        where = _require_grad(leaves)
        point, grads, fixed, rate, lam = _detached((point, grads, leaves, self.lrs[t], lam))
        args = (self.loss_fn, self.rule, point, grads, fixed, where, spec, rate, lam)
        with torch.no_grad():
            before, into_batch, into_lr = self._call(_pullback, _eager_pullback, *args)
        if where:
            outputs = [leaves[i] for i in where]
            into_items = torch.autograd.grad(outputs, inputs, into_batch, allow_unused=True, materialize_grads=True)
        else:
            into_items = tuple(torch.zeros_like(x) for x in inputs)
        return before, [*zip(sources, into_items, strict=True), (self.lrs[t], into_lr)]

    def after(self, num_steps: int) -> Rollout:
        """The rest of the run, entered at the point that ``num_steps`` first-order steps lead to."""
        point = self.start
        for t in range(num_steps):
            point, _ = self.advance(t, point)
        return replace(self, start=point, batches=self.batches[num_steps:], lrs=self.lrs[num_steps:])

    def until(self, num_steps: int) -> Rollout:
        """The first ``num_steps`` steps of the run."""
        return replace(self, batches=self.batches[:num_steps], lrs=self.lrs[:num_steps])

    def _call(self, function: Callable[..., Any], eager: Callable[..., Any], *args: Any) -> Any:
        failed = _uncompilable.setdefault(self.loss_fn, set())
        if not self.compile or function in failed:
            return eager(*args)
        try:
            with compiling():
                return _compiled(function)(*args)
        except Exception as error:
            output = eager(*args)  # an error of loss_fn's own is raised again here, undisguised
            if not failed:
                reason = next(iter(str(error).splitlines()), "")
                warnings.warn(f"an inner step runs eagerly, it does not compile: {reason}", stacklevel=2)
            failed.add(function)  # it alone, or a resumed run would find another order of events
            return output


_uncompilable: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""What of a step does not compile, by loss function."""


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One compiled function for all runs. ``loss_fn`` and ``rule`` are arguments of it: torch.compile knows a
    function by its code and what that closes over, so one that is made anew every outer step is not compiled
    anew."""
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
    point, chosen, lr = tree_unflatten(inputs, structure)
    after = _eager_step(loss_fn, rule, point, _merged(leaves, where, chosen, spec), lr)
    pairs = [(x, c) for x, c in zip(tree_leaves(after), tree_leaves(lam), strict=True) if x.requires_grad]
    outputs, cotangents = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True, materialize_grads=True)
    return tree_unflatten(found, structure)


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

    def slope(theta: Params, chosen: list[Tensor]) -> Tensor:
        along = torch.func.grad(loss_fn)(theta, _merged(leaves, where, chosen, spec))
        return torch.stack([(along[name] * into_grads[name]).sum() for name in theta]).sum()

    curvature, into_batch = torch.func.grad(slope, argnums=(0, 1))(theta, [leaves[i] for i in where])
    before = {name: into_theta[name] + curvature[name] for name in theta}
    return (before, into_state), into_batch, into_lr


def _require_grad(leaves: Sequence[Any]) -> tuple[int, ...]:
    return tuple(i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad)


def _merged(leaves: list[Any], where: tuple[int, ...], chosen: list[Tensor], spec: TreeSpec) -> Any:
    merged = list(leaves)
    for i, x in zip(where, chosen, strict=True):
        merged[i] = x
    return tree_unflatten(merged, spec)
