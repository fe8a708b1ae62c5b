"""Update rules of the inner loop: optimisers as pure functions, so that a step can be differentiated.

A rule is its hyper-parameters. What it remembers between steps is a pytree of tensors that ``init`` makes and
``update`` replaces; nothing is changed in place. The learning rate is an input, because it may be learned.
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
"""A pytree of floating-point tensors. What it holds is the rule's own affair."""


class Rule(ABC):
    """One step of an optimiser: ``(grads, state, params, lr) -> (params, state)``."""

    @abstractmethod
    def init(self, params: Params) -> State:
        """The state before the first step."""

    @abstractmethod
    def update(self, grads: Params, state: State, params: Params, lr: Tensor) -> tuple[Params, State]:
        """The parameters and the state after one step; ``lr`` is a 0-d tensor."""


@dataclass(frozen=True, kw_only=True)
class SGD(Rule):
    """Gradient descent with heavy-ball momentum: ``v = momentum v + g``, ``theta = theta - lr v``.

    Equals ``torch.optim.SGD`` (no dampening, no Nesterov): the learning rate stands outside the velocity.
    """

    momentum: float = 0.0
    """Share of the velocity that survives a step."""
    weight_decay: float = 0.0
    """Multiple of the parameters that is added to their gradient."""

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

    Equals ``torch.optim.Adam`` where ``eps_root`` is zero. But then the derivative of the square root is
    infinite wherever a gradient is exactly zero (a dead ReLU), and the meta-gradient is not a number.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running mean and of the running mean square."""
    eps: float = 1e-8
    """Added outside the square root."""
    eps_root: float = 1e-16
    """Added inside the square root; keeps the meta-gradient finite."""

    def __post_init__(self) -> None:
        if not all(0.0 < beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas {self.betas}: both must lie between 0 and 1; take (0.9, 0.999)")

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
        # 1 - beta ** step, without the cancellation that costs float32 half its digits at beta2 = 0.999
        correct1, correct2 = -torch.expm1(step * math.log(beta1)), -torch.expm1(step * math.log(beta2))
        scale = {name: torch.sqrt(square[name] / correct2 + self.eps_root) + self.eps for name in params}
        new = {name: p - lr * (mean[name] / correct1) / scale[name] for name, p in params.items()}
        return new, AdamState(step, mean, square)
