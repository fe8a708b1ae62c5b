"""TESLA: Cui, Wang, Si and Hsieh, "Scaling up dataset distillation to ImageNet-1K with constant memory", ICML 2023.

    theta_N = theta_0 - alpha sum_n g_n
    dL/db_n = 2 alpha / D  d/db_n <theta* - theta_0 + alpha sum_m g_m, g_n(b_n; theta_n)>,  D = |theta_0 - theta*|^2

The objective is that of MTT (see ``condense.methods.mtt`` for its symbols). Each step of the student is differentiated
separately, with theta_n held constant: the influence of a batch on the gradients of later steps is neglected. The paper
takes the result for the exact gradient, which it is not. ``--method.adjoint exact`` computes the exact gradient in the
same memory.

Deviations: see docs/methods/tesla.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from condense.inner import Adjoint, Tesla
from condense.methods.mtt import TrajectoryMatching


@final
@dataclass(frozen=True, kw_only=True)
class TESLA(TrajectoryMatching):
    """Trajectory matching with the constant-memory gradient of TESLA, which is not exact."""

    num_steps: int = 10000
    """Number of updates of the images."""
    syn_steps: int = 50
    """Number of training steps of the student on the set."""
    max_start_epoch: int = 5
    """Number of start epochs: the student starts from an expert's snapshot of epoch 0 to ``max_start_epoch`` - 1."""
    adjoint: Adjoint = Tesla()
    """How to differentiate through the steps of the student: tesla (as published) or exact, for example."""
