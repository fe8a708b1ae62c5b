"""Temperature scaling: one number that makes the confidence of a trained network true, fitted on held-out real images.

Guo et al., "On calibration of modern neural networks", ICML 2017:

    T* = argmin_T  mean_i  -log softmax(z_i / T)_{y_i},    z_i the logits of validation image i

Masked temperature scaling is for networks trained on distilled data, whose largest logits are too much alike (Zhu et
al., "Rethinking data distillation: do not overlook calibration", ICCV 2023): T is fitted on logits of which random
entries are zero. Re-implemented from description; the authors' code is not public, and the share of zeros is ours.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Calibration = Literal["none", "temperature", "masked-temperature"]

MASKED = 0.1
"""Share of the logits that masked temperature scaling sets to zero."""
NUM_MASKS = 10
"""Masked copies of the validation logits that T is fitted on."""


def temperature(kind: Calibration, logits: Tensor, labels: Tensor, generator: torch.Generator) -> float:
    """What the logits of other images are to be divided by.

    Args:
        kind: how it is found; none gives 1.
        logits: (N, C) of validation images.
        labels: their classes (N,).
        generator: on the CPU, for masks.
    """
    if kind == "none":
        return 1.0
    logits, labels = logits.double().cpu(), labels.cpu()
    if kind == "masked-temperature":
        kept = torch.rand(NUM_MASKS, *logits.shape, generator=generator) >= MASKED
        logits, labels = (kept * logits).flatten(0, 1), labels.repeat(NUM_MASKS)
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_t], max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(logits / log_t.exp(), labels)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    return float(log_t.detach().exp())
