"""Update rules of the inner loop: optimisers as pure functions, so that a step can be differentiated.

A rule consists of its hyper-parameters. Its state is a pytree of tensors that ``init`` creates and ``update`` replaces;
nothing is changed in place. The learning rate is an argument, because it may be learned.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Params = dict[str, Tensor]
State = Any
"""A pytree of floating-point tensors, whose structure depends on the rule."""


def number(value: Tensor | float, like: Tensor) -> Tensor:
    """Return a value as a tensor of the dtype and on the device of another one. A number is not copied from the host,
    which a captured step cannot do."""
    if isinstance(value, int | float):
        return torch.full((), value, dtype=like.dtype, device=like.device)
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


class Rule(ABC):
    """One step of an optimiser: ``(grads, state, params, lr) -> (params, state)``."""

    @abstractmethod
    def init(self, params: Params) -> State:
        """Return the state before the first step."""

    @abstractmethod
    def update(self, grads: Params, state: State, params: Params, lr: Tensor) -> tuple[Params, State]:
        """Return the parameters and the state after one step; ``lr`` is a 0-d tensor."""


@dataclass(frozen=True, kw_only=True)
class SGD(Rule):
    """Gradient descent with heavy-ball momentum: ``v = momentum v + g``, ``theta = theta - lr v``.

    It equals ``torch.optim.SGD`` without dampening or Nesterov momentum: the learning rate is not part of the velocity.
    """

    momentum: float = 0.0
    """Momentum coefficient."""
    weight_decay: float = 0.0
    """Weight decay, added to the gradient as a multiple of the parameters."""

    def init(self, params: Params) -> State:
        return {name: torch.zeros_like(p) for name, p in params.items()} if self.momentum else {}

    def update(self, grads: Params, state: State, params: Params, lr: Tensor) -> tuple[Params, State]:
        if self.weight_decay:
            grads = {name: grads[name] + self.weight_decay * p for name, p in params.items()}
        if self.momentum:
            grads = state = {name: self.momentum * state[name] + grads[name] for name in params}
        return {name: p - lr * grads[name] for name, p in params.items()}, state


class AdamState(NamedTuple):
    step: Tensor
    mean: Params
    square: Params


@dataclass(frozen=True, kw_only=True)
class Adam(Rule):
    """Adam (Kingma and Ba, 2015): ``theta - lr m / (sqrt(v + eps_root) + eps)``, m and v bias-corrected.

    It equals ``torch.optim.Adam`` if ``eps_root`` is zero. In this case the derivative of the square root is infinite
    wherever a gradient is exactly zero (for example behind a dead ReLU), and the meta-gradient is NaN.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the running mean and of the running mean square."""
    eps: float = 1e-8
    """Constant added outside the square root."""
    eps_root: float = 1e-16
    """Constant added inside the square root, which keeps the meta-gradient finite."""

    def __post_init__(self) -> None:
        if not all(0.0 < beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas {self.betas}: both must be between 0 and 1; give (0.9, 0.999)")

    def init(self, params: Params) -> State:
        like = next(iter(params.values()))
        step = torch.zeros((), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        mean, square = ({name: torch.zeros_like(p) for name, p in params.items()} for _ in range(2))
        return AdamState(step, mean, square)

    def update(self, grads: Params, state: State, params: Params, lr: Tensor) -> tuple[Params, State]:
        beta1, beta2 = self.betas
        step = state.step + 1
        mean = {name: beta1 * state.mean[name] + (1 - beta1) * grads[name] for name in params}
        square = {name: beta2 * state.square[name] + (1 - beta2) * grads[name] ** 2 for name in params}
        # 1 - beta ** step, without the cancellation that loses half the digits of float32 at beta2 = 0.999
        correct1, correct2 = -torch.expm1(step * math.log(beta1)), -torch.expm1(step * math.log(beta2))
        scale = {name: torch.sqrt(square[name] / correct2 + self.eps_root) + self.eps for name in params}
        new = {name: p - lr * (mean[name] / correct1) / scale[name] for name, p in params.items()}
        return new, AdamState(step, mean, square)
