"""The inner training run as one differentiable call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from condense.inner.adjoint import Adjoint, Exact
from condense.inner.hidden import refuse_hidden_inputs
from condense.inner.rollout import LossFn, Prepare, Rollout
from condense.inner.rules import SGD, Params, Rule


def _as_it_is(batch: Any) -> Any:
    return batch


def unroll(
    loss_fn: LossFn,
    theta0: Mapping[str, Tensor],
    batches: Sequence[Any],
    *,
    prepare: Prepare = _as_it_is,
    rule: Rule = SGD(),
    lr: Tensor | float,
    adjoint: Adjoint = Exact(),
    compile: bool = False,  # noqa: A002
) -> Params:
    """Train from ``theta0``, one step a batch; differentiable in ``theta0``, the batches and ``lr``.

    Whatever wants a gradient enters through the arguments. Randomness enters drawn: augmentation parameters
    and minibatch indices are items of a batch. Index and augment in ``prepare``: then neither the images of
    every step nor their graph are held, and a tensor that occurs in many batches costs one gradient.

    Args:
        loss_fn: ``loss_fn(theta, batch) -> scalar``, pure.
        theta0: parameters by name.
        batches: the inputs of the steps in order, pytrees (tuples, dicts, named tuples). Tensors in them may
            require grad; everything else is static: under ``compile`` each new value of it is compiled anew.
        prepare: makes of an item of ``batches`` what ``loss_fn`` takes, at the moment of its step; differentiable,
            pure, and not compiled, so that it may be another computation at every step.
        rule: the optimiser.
        lr: one learning rate for all steps, or a tensor (N,) with one for each of the N batches.
        adjoint: how to get the gradient back: ``Exact`` unless you know better.
        compile: send the steps through ``torch.compile``; a step that it cannot take runs eagerly, with a
            warning. Pays off where many roll-outs of the same code and shapes follow.

    Returns:
        The parameters after the last step, without graph if nothing requires grad. Differentiable once;
        under ``Full`` and ``Higher`` any number of times.

    Raises:
        ValueError: ``loss_fn`` or ``prepare`` uses another tensor that requires grad; ``lr`` has the wrong shape; the
            adjoint does not know the rule.
    """
    # copies where it is compiled: views of a part of a tensor would be another variant of the step
    theta = {name: p.clone() if compile else p for name, p in theta0.items()}
    if not batches:
        return theta
    like = next(iter(theta.values()))
    lr = torch.as_tensor(lr, dtype=like.dtype, device=like.device)
    if lr.shape not in ((), (len(batches),)):
        raise ValueError(
            f"lr has shape {tuple(lr.shape)}: it is one number, or one for every batch; give shape () or "
            f"({len(batches)},)"
        )
    refuse_hidden_inputs(loss_fn, prepare, theta, batches[0])
    lrs = lr.unbind() if lr.dim() else (lr,) * len(batches)
    return adjoint.run(Rollout(loss_fn, prepare, rule, (theta, rule.init(theta)), tuple(batches), lrs, compile))
