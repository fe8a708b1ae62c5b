"""An inner training run as one differentiable call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from condense.inner.adjoint import Adjoint, Exact
from condense.inner.hidden import refuse_hidden_inputs
from condense.inner.rollout import LossFn, Point, Prepare, Rollout
from condense.inner.rules import SGD, Params, Rule, State, number


def _identity(batch: Any) -> Any:
    return batch


def unroll(
    loss_fn: LossFn,
    theta0: Mapping[str, Tensor],
    batches: Sequence[Any],
    *,
    prepare: Prepare = _identity,
    rule: Rule = SGD(),
    lr: Tensor | float,
    adjoint: Adjoint = Exact(),
    state: State | None = None,
    compile: bool = False,  # noqa: A002
) -> Params:
    """Train from ``theta0``, one step per batch; differentiable in ``theta0``, the batches and ``lr``.

    Tensors that need a gradient have to be passed as arguments. Random choices have to be drawn in advance:
    augmentation parameters and minibatch indices are items of a batch. Index and augment in ``prepare``, so that
    neither the images of all steps nor their graph are held in memory, and a tensor in many batches needs memory for
    only one gradient.

    Args:
        loss_fn: ``loss_fn(theta, batch) -> scalar``, pure.
        theta0: the initial parameters by name.
        batches: the inputs of the steps in order, pytrees (tuples, dicts, named tuples). Tensors in them may
            require grad. Everything else is static: with ``compile``, each new value is compiled separately.
        prepare: converts an item of ``batches`` to the input of ``loss_fn`` when the step is taken. It is
            differentiable, pure and not compiled, so it may differ from step to step.
        rule: the optimiser.
        lr: one learning rate for all steps, or a tensor (N,) with one for each of the N batches.
        adjoint: how to compute the gradient.
        state: the state of the rule before the first step, for a run that is continued; None: ``rule.init``.
        compile: run the steps through ``torch.compile``. A step that does not compile runs eagerly, with a warning.
            This pays off for many roll-outs of the same code and shapes.

    Returns:
        The parameters after the last step, without a graph if nothing requires grad. They are differentiable once, with
        ``Full`` and ``Higher`` any number of times.

    Raises:
        ValueError: ``loss_fn`` or ``prepare`` uses another tensor that requires grad; ``lr`` has the wrong shape; the
            adjoint does not support the rule.
    """
    # copies if compiled: the step would be compiled separately for parameters that are views of a larger tensor
    theta = {name: p.clone() if compile else p for name, p in theta0.items()}
    if not batches:
        return theta
    like = next(iter(theta.values()))
    lr = number(lr, like)
    if lr.shape not in ((), (len(batches),)):
        raise ValueError(
            f"lr has shape {tuple(lr.shape)}: it must be one number, or one per batch; give shape () or "
            f"({len(batches)},)"
        )
    refuse_hidden_inputs(loss_fn, prepare, theta, batches[0])
    lrs = lr.unbind() if lr.dim() else (lr,) * len(batches)
    start = theta, rule.init(theta) if state is None else state
    return adjoint.run(Rollout(loss_fn, prepare, rule, start, tuple(batches), lrs, compile))


def advance(
    loss_fn: LossFn,
    start: Point,
    batches: Sequence[Any],
    *,
    prepare: Prepare = _identity,
    rule: Rule,
    lr: Tensor | float,
    compile: bool = False,  # noqa: A002
) -> Point:
    """Train without a graph and return the parameters and the state of the rule after the last step.

    ``start`` has the same two parts. The other arguments are those of ``unroll``; ``lr`` is one number.
    """
    like = next(iter(start[0].values()))
    lrs = (number(lr, like),) * len(batches)
    return Rollout(loss_fn, prepare, rule, start, tuple(batches), lrs, compile).after(len(batches)).start
