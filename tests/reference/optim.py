"""Slow references of the optimisers, from their update rules.

Each rule takes the parameters w, their gradient g, its state (``memory``), the number of the step from 1, the learning
rate and the first beta (sgd: the momentum), and returns the new parameters.
"""

from __future__ import annotations

import math

from torch import Tensor

BETA_2 = 0.999
Memory = dict[str, Tensor]


def sgd(w: Tensor, g: Tensor, memory: Memory, step: int, lr: float, beta: float) -> Tensor:
    """v = beta v + g;  w = w - lr v."""
    memory["v"] = beta * memory["v"] + g if memory else g
    return w - lr * memory["v"]


def adam(w: Tensor, g: Tensor, memory: Memory, step: int, lr: float, beta: float) -> Tensor:
    """Adam (Kingma and Ba, 2015)."""
    return w - lr * _adam_direction(g, memory, step, beta, 1e-8)


def lamb(w: Tensor, g: Tensor, memory: Memory, step: int, lr: float, beta: float) -> Tensor:
    """LAMB (You et al., 2020): Adam's direction u scaled to the norm of w. The factor is 1 if either norm is zero."""
    u = _adam_direction(g, memory, step, beta, 1e-6)
    norm_w, norm_u = math.sqrt(float((w * w).sum())), math.sqrt(float((u * u).sum()))
    return w - lr * (norm_w / norm_u if norm_w and norm_u else 1.0) * u


def adabelief(w: Tensor, g: Tensor, memory: Memory, step: int, lr: float, beta: float) -> Tensor:
    """AdaBelief (Zhuang et al., 2020): Adam with the variance around the running mean."""
    mean = beta * memory.get("mean", 0 * g) + (1 - beta) * g
    spread = BETA_2 * memory.get("spread", 0 * g) + (1 - BETA_2) * (g - mean) ** 2 + 1e-16
    memory.update(mean=mean, spread=spread)
    return w - lr * (mean / (1 - beta**step)) / ((spread / (1 - BETA_2**step)).sqrt() + 1e-16)


def _adam_direction(g: Tensor, memory: Memory, step: int, beta: float, eps: float) -> Tensor:
    memory["m"] = beta * memory.get("m", 0 * g) + (1 - beta) * g
    memory["s"] = BETA_2 * memory.get("s", 0 * g) + (1 - BETA_2) * g * g
    return (memory["m"] / (1 - beta**step)) / ((memory["s"] / (1 - BETA_2**step)).sqrt() + eps)
