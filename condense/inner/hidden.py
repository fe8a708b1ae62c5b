"""Find the tensors that a loss function uses although they are not among its arguments."""

from __future__ import annotations

import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from condense.rng import Generators

_checked: WeakIdKeyDictionary = WeakIdKeyDictionary()


def refuse_hidden_inputs(
    loss_fn: Callable[[Any, Any], Tensor], prepare: Callable[[Any], Any], theta: dict[str, Tensor], item: Any
) -> None:
    """Raise an error if a function depends on a tensor that requires grad and is not among its arguments.

    An adjoint returns gradients of arguments only, so the gradient of such a tensor would be lost silently. ``loss_fn``
    is checked once, ``prepare`` at every call. The check leaves the state of the random generators unchanged.

    Raises:
        ValueError: there are such tensors. The message names them.
    """
    item, theta = tree_map_only(Tensor, Tensor.detach, (item, theta))
    with torch.enable_grad(), Generators.of(next(iter(theta.values())).device).replayed():
        batch = prepare(item)
    for made in tree_leaves(batch):
        if isinstance(made, Tensor) and made.requires_grad:
            _refuse("prepare", made, {"": prepare, "batch": item})
    if loss_fn in _checked:
        return
    with torch.enable_grad(), Generators.of(next(iter(theta.values())).device).replayed():
        loss = loss_fn(theta, batch)
    if loss.requires_grad:
        _refuse("loss_fn", loss, {"": loss_fn, "batch": batch})
    _checked[loss_fn] = True


def _refuse(owner: str, result: Tensor, roots: Mapping[str, Any]) -> None:
    raise ValueError(
        f"{owner} uses {', '.join(_names(result, roots))} from outside: only theta0, batches and lr are "
        "differentiated, so its gradient would be lost; pass it through batches, or detach it"
    )


def _names(loss: Tensor, roots: Mapping[str, Any]) -> list[str]:
    """Return the names of the tensors reachable from ``roots`` in the graph of ``loss``, or the shapes of its leaves if
    there are none."""
    nodes, leaves = _graph(loss)
    names: dict[int, str] = {}
    for name, value in _reachable(roots):
        if isinstance(value, Tensor) and (id(value) in leaves or value.grad_fn in nodes):
            names.setdefault(id(value), name)
    return list(names.values()) or [f"a tensor of shape {tuple(leaf.shape)}" for leaf in leaves.values()]


def _graph(loss: Tensor) -> tuple[set[Any], dict[int, Tensor]]:
    """Return all nodes of the graph of ``loss``, and its leaf tensors."""
    nodes, leaves, pending = set(), {}, [loss.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves[id(leaf)] = leaf
        pending += [parent for parent, _ in node.next_functions]
    return nodes, leaves


def _reachable(roots: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the objects that ``roots`` reference, directly or indirectly, with their names, breadth first."""
    pending, seen = deque(roots.items()), set()
    while pending:
        name, value = pending.popleft()
        if id(value) not in seen and not isinstance(value, type | ModuleType | str):
            seen.add(id(value))
            yield name, value
            pending.extend((_join(name, part), v) for part, v in _parts(value))


def _join(name: str, part: str) -> str:
    return name + part if not name or not part or part.startswith("[") else f"{name}.{part}"


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    match value:
        case Tensor():
            return
        case FunctionType():
            variables = inspect.getclosurevars(value)
            yield from {**variables.nonlocals, **variables.globals}.items()
            yield from ((f"[default {i}]", v) for i, v in enumerate(value.__defaults__ or ()))
        case MethodType():
            yield "self", value.__self__
            yield "", value.__func__
        case functools.partial():
            yield "", value.func
            yield from ((f"[{i}]", v) for i, v in enumerate(value.args))
            yield from value.keywords.items()
        case nn.Module():
            yield from value.named_parameters()
            yield from value.named_buffers()
            yield from vars(value).items()
        case Mapping():
            yield from ((f"[{key!r}]", v) for key, v in value.items())
        case Sequence():
            yield from ((f"[{i}]", v) for i, v in enumerate(value))
        case _:
            yield from getattr(value, "__dict__", {}).items()
