"""How to differentiate an inner training run: a value, not a property of the run.

With theta_{t+1} = step(theta_t, x_t, lr_t) and an outer loss L(theta_N), the adjoint lam_t = dL/dtheta_t
starts from lam_N and obeys lam_t = lam_{t+1} . dstep/dtheta_t; on the way each input gets its gradient,
dL/dx_t = lam_{t+1} . dstep/dx_t. Momentum and Adam carry their state in the same way: read theta_t as the
pair of theta_t and the state of the rule.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from condense.inner.rollout import Rollout
from condense.inner.rules import SGD, Adam, Params
from condense.plugins import Registry, subclass_of
from condense.schema import Checked


@dataclass(frozen=True)
class Adjoint(Checked, ABC):
    """A way to run a roll-out, and to get the gradient of what comes after back through it."""

    name: ClassVar[str]
    exact: ClassVar[bool]
    """Whether the gradient is that of the whole roll-out."""

    def resolve(self, generator: torch.Generator) -> Adjoint:
        """This adjoint with its random choices made; one that has none to make returns itself."""
        return self

    @abstractmethod
    def run(self, rollout: Rollout) -> Params:
        """The parameters after the last step."""


@dataclass(frozen=True)
class Exact(Adjoint):
    """The gradient of the full unroll, to rounding, at a fraction of its memory.

    The way forth keeps the parameters (and the state of the rule) of every step and no graph; compiled, also its
    gradient. The way back builds the graph of one step at a time; what a step draws from the global generators, as
    dropout does, is drawn again as it was. Memory: N points, or two, and the graph of one step. (Wang et al., 2018.)
    """

    name: ClassVar[str] = "exact"
    exact: ClassVar[bool] = True
    snapshots: Literal["full", "host", "bfloat16"] = "full"
    """How points are kept: as they are, in the memory of the host, or rounded: then the way back is that of points
    nearby, and no longer exact."""

    def run(self, rollout: Rollout) -> Params:
        return _run_adjoint(rollout, every=1, propagate=True, snapshots=self.snapshots)


@dataclass(frozen=True)
class Checkpointed(Adjoint):
    """``Exact`` with every k-th point kept and those between recomputed: N/k + k points, one more roll-out.

    Worth it where the points outweigh the graph of a step: very long roll-outs. Least memory at ``every``
    near the square root of N. (Chen et al., 2016.)
    """

    name: ClassVar[str] = "checkpointed"
    exact: ClassVar[bool] = True
    every: int = 10
    """Distance of the points that are kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self.name, "every", self.every)

    def run(self, rollout: Rollout) -> Params:
        return _run_adjoint(rollout, every=self.every, propagate=True)


@dataclass(frozen=True)
class Full(Adjoint):
    """Autograd through everything: the graphs of all N steps are held at once. The oracle of the others."""

    name: ClassVar[str] = "full"
    exact: ClassVar[bool] = True

    def run(self, rollout: Rollout) -> Params:
        _require_eager(self.name, rollout)
        if not rollout.recorded:
            return rollout.after(len(rollout)).start[0]
        point = rollout.start
        for t in range(len(rollout)):
            point = rollout.step(t, point)
        return point[0]


@dataclass(frozen=True)
class Truncated(Adjoint):
    """``Exact`` over the last steps only; those before run without graph and their inputs get no gradient.

    The state of the rule crosses the border. With a window of N or more it is ``Exact``.
    """

    name: ClassVar[str] = "truncated"
    exact: ClassVar[bool] = False
    window: int = 60
    """Steps that are differentiated."""
    burn_in: int | None = None
    """Steps before the window. The run ends with the window; later batches stay unused. None: all but it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self.name, "window", self.window)

    def run(self, rollout: Rollout) -> Params:
        if self.burn_in is not None:
            num_steps = self.burn_in + self.window
            if num_steps > len(rollout):
                raise ValueError(
                    f"{len(rollout)} batches are too few: burn_in {self.burn_in} and window {self.window} "
                    f"make {num_steps} steps; give {num_steps} batches"
                )
            rollout = rollout.until(num_steps)
        return Exact().run(rollout.after(max(len(rollout) - self.window, 0)))


@dataclass(frozen=True)
class RandomTruncated(Adjoint):
    """``Truncated`` after a random number of steps (RaT-BPTT: Feng et al., 2024).

    It draws nothing itself: ``resolve(generator)`` draws the burn-in and returns the ``Truncated`` to unroll
    with, over ``burn_in + window`` batches. The defaults are the published ones.
    """

    name: ClassVar[str] = "random-truncated"
    exact: ClassVar[bool] = False
    lo: int = 0
    """Fewest steps before the window."""
    hi: int = 140
    """Most steps before the window."""
    window: int = 60
    """Steps that are differentiated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_positive(self.name, "window", self.window)
        if not 0 <= self.lo <= self.hi:
            raise ValueError(f"{self.name}: lo {self.lo} and hi {self.hi} span no range; give 0 <= lo <= hi")

    def resolve(self, generator: torch.Generator) -> Truncated:
        """Burn-in uniform over {lo, ..., hi}, from a CPU generator."""
        burn_in = int(torch.randint(self.lo, self.hi + 1, (), generator=generator))
        return Truncated(self.window, burn_in)

    def run(self, rollout: Rollout) -> Params:
        raise ValueError(f"{self.name} has no burn-in yet: a roll-out draws nothing; pass adjoint.resolve(generator)")


@dataclass(frozen=True)
class Tesla(Adjoint):
    """INEXACT: the stop-gradient approximation of TESLA (Cui et al., 2023), for comparison.

    theta_N = theta_0 - sum_t lr_t g_t with every g_t taken at a constant theta_t: the adjoint stays lam_N all
    the way, so what a batch does to later gradients is lost. Equal to ``Exact`` for one step. Deviation from
    the authors' code: that doubles the tuple of gradients instead of the gradient, and so halves the images'.
    """

    name: ClassVar[str] = "tesla"
    exact: ClassVar[bool] = False

    def run(self, rollout: Rollout) -> Params:
        if rollout.rule != SGD():
            raise ValueError(f"tesla does not know {rollout.rule}: it is defined for plain SGD; take SGD(), or Exact()")
        return _run_adjoint(rollout, every=1, propagate=False)


@dataclass(frozen=True)
class Higher(Adjoint):
    """The ``higher`` library (Grefenstette et al., 2019), a second oracle, as costly as ``Full``.

    It knows SGD, and Adam without ``eps_root``.
    """

    name: ClassVar[str] = "higher"
    exact: ClassVar[bool] = True

    def run(self, rollout: Rollout) -> Params:
        from higher.optim import get_diff_optim

        _require_eager(self.name, rollout)
        theta, rule = rollout.start[0], rollout.rule
        reference = [p.detach().clone().requires_grad_() for p in theta.values()]
        optimizer: torch.optim.Optimizer
        match rule:
            case SGD():
                optimizer = torch.optim.SGD(reference, lr=1.0, momentum=rule.momentum, weight_decay=rule.weight_decay)
            case Adam(eps_root=0.0):
                optimizer = torch.optim.Adam(reference, lr=1.0, betas=rule.betas)
            case _:
                raise ValueError(f"higher does not know {rule}: it has SGD and Adam(eps_root=0.0); take Exact()")
        diff_optimizer = get_diff_optim(optimizer, reference)
        params = [p if p.requires_grad else p.detach().requires_grad_() for p in theta.values()]
        for t, (item, lr) in enumerate(zip(rollout.batches, rollout.lrs, strict=True)):
            override: dict[str, list[Any]] = {"lr": [lr]}
            if isinstance(rule, Adam):
                # higher adds eps before the bias correction of the root, torch.optim after it
                override["eps"] = [rule.eps * (1 - rule.betas[1] ** (t + 1)) ** 0.5]
            with torch.enable_grad():
                loss = rollout.loss_fn(dict(zip(theta, params, strict=True)), rollout.prepare(item))
                params = diff_optimizer.step(loss, params=params, override=override)
        return dict(zip(theta, params if rollout.recorded else [p.detach() for p in params], strict=True))


ADJOINTS: Registry[type[Adjoint]] = Registry(
    "adjoint",
    "condense.adjoints",
    {kind.name: kind for kind in (Exact, Checkpointed, Full, Truncated, RandomTruncated, Tesla, Higher)},
    subclass_of(Adjoint),
)


def _require_positive(owner: str, field: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{owner}: {field} is {value}: it counts steps; give 1 or more")


def _require_eager(owner: str, rollout: Rollout) -> None:
    if rollout.compile:
        raise ValueError(f"{owner} is not compiled: it is an oracle for the others; take Exact(), or compile=False")


def _run_adjoint(rollout: Rollout, every: int, propagate: bool, snapshots: str = "full") -> Params:
    if not rollout.recorded:
        return rollout.after(len(rollout)).start[0]
    outputs = _Unrolled.apply(rollout, every, propagate, snapshots, *rollout.sources)
    return dict(zip(rollout.start[0], outputs, strict=True))


class _Unrolled(torch.autograd.Function):
    """From what requires grad to theta_N; keeps every ``every``-th point, and what every step draws from.

    Without ``propagate`` the adjoint stays lam_N on the way back.
    """

    @staticmethod
    def forward(ctx: Any, rollout: Rollout, every: int, propagate: bool, snapshots: str, *sources: Tensor) -> Any:
        ctx.rollout, ctx.every, ctx.propagate = rollout, every, propagate
        ctx.kept = _Kept(len(range(0, len(rollout), every)), snapshots)
        ctx.draws = []
        point = rollout.start
        for t in range(len(rollout)):
            before = point
            ctx.draws.append(rollout.generators())
            point, grads = rollout.advance(t, before)
            if t % every == 0:
                ctx.kept.put(t // every, (before, grads if every == 1 else {}))
        # autograd refuses the way back if a source was changed in place meanwhile
        ctx.save_for_backward(*sources, *ctx.kept.release())
        return tuple(point[0].values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        rollout = cast(Rollout, ctx.rollout)
        theta, state = rollout.start
        sources = rollout.sources
        kept = ctx.kept.holding(ctx.saved_tensors[len(sources) :])

        totals: dict[int, Tensor] = {}

        def add(source: Tensor, grad: Tensor) -> None:
            total = totals.get(id(source))
            totals[id(source)] = grad if total is None else total + grad

        lam = (dict(zip(theta, cotangents, strict=True)), tree_map(torch.zeros_like, state))
        for start in reversed(range(0, len(rollout), ctx.every)):
            stop = min(start + ctx.every, len(rollout))
            point, grads = kept.get(start // ctx.every)
            segment = [(point, grads)]
            if ctx.every > 1:
                segment = []
                for t in range(start, stop):
                    with ctx.draws[t].replayed():
                        after, grads = rollout.advance(t, point)
                    segment.append((point, grads))
                    point = after
            for t in reversed(range(start, stop)):
                with ctx.draws[t].replayed():
                    lam_before, found = rollout.pullback(t, *segment.pop(), lam)
                for source, grad in found:
                    add(source, grad)
                if ctx.propagate:
                    lam = lam_before
        for p, grad in zip(tree_leaves(rollout.start), tree_leaves(lam), strict=True):
            add(p, grad)
        return (None, None, None, None, *(totals[id(source)] for source in sources))


class _Kept:
    """Trees of tensors, alike and as many as said at first: one table for each leaf, made before the work begins, so
    that no small tensor that has to stay lies between large ones that go."""

    def __init__(self, num: int, how: str) -> None:
        self._num, self._how = num, how
        self._tables: tuple[Tensor, ...] = ()

    def put(self, row: int, tree: Any) -> None:
        leaves, self._spec = tree_flatten(tree)
        if not self._tables:
            self._like = [(x.dtype, x.device) for x in leaves]
            self._tables = tuple(self._table(x) for x in leaves)
        for table, x in zip(self._tables, leaves, strict=True):
            table[row].copy_(x)

    def get(self, row: int) -> Any:
        # copies: a compiled step is then given tensors that look alike at every step
        rows = zip(self._tables, self._like, strict=True)
        leaves = [table[row].to(device, dtype, copy=True) for table, (dtype, device) in rows]
        return tree_unflatten(leaves, self._spec)

    def release(self) -> tuple[Tensor, ...]:
        """The tables, which are no longer held here."""
        tables, self._tables = self._tables, ()
        return tables

    def holding(self, tables: Sequence[Tensor]) -> _Kept:
        """These, which holds what ``release`` gave."""
        kept = copy.copy(self)
        kept._tables = tuple(tables)
        return kept

    def _table(self, x: Tensor) -> Tensor:
        rounded = self._how == "bfloat16" and x.dim()
        device = "cpu" if self._how == "host" else x.device
        return torch.empty(self._num, *x.shape, dtype=torch.bfloat16 if rounded else x.dtype, device=device)
