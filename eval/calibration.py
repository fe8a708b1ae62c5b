"""Temperature scaling: calibrates a trained network with one number, fitted on held-out real images.

Guo et al., "On calibration of modern neural networks", ICML 2017:

    T* = argmin_T  mean_i  -log softmax(z_i / T)_{y_i},    z_i the logits of validation image i

Masked temperature scaling is for networks trained on distilled data, whose largest logits differ too little (Zhu et
al., "Rethinking data distillation: do not overlook calibration", ICCV 2023): T is fitted after random logits are set to
zero. It is re-implemented from the description, since the authors' code is not public; we chose the share of zeros.
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
"""Number of masked copies of the validation logits to which T is fitted."""


def temperature(kind: Calibration, logits: Tensor, labels: Tensor, generator: torch.Generator) -> float:
    """Return the temperature T by which logits of other images are to be divided.

    Args:
        kind: how T is fitted; ``none`` gives 1.
        logits: (N, C), of the validation images.
        labels: classes (N,) of the validation images.
        generator: CPU generator for the masks.
    """
    if kind == "none":
        return 1.0
    logits, labels = logits.double().cpu(), labels.cpu()
    if kind == "masked-temperature":
        mask = torch.rand(NUM_MASKS, *logits.shape, generator=generator) >= MASKED
        logits, labels = (mask * logits).flatten(0, 1), labels.repeat(NUM_MASKS)
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
