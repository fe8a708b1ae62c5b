"""TESLA: Cui, Wang, Si and Hsieh, "Scaling up dataset distillation to ImageNet-1K with constant memory", ICML 2023.

    theta_N = theta_0 - alpha sum_n g_n
    dL/db_n = 2 alpha / D  d/db_n <theta* - theta_0 + alpha sum_m g_m, g_n(b_n; theta_n)>,  D = |theta_0 - theta*|^2

The objective is MTT's (``condense.methods.mtt``, whose symbols hold). The gradient goes back through each step of the
student alone, at constant theta_n: what a batch does to later gradients is dropped. It is published as equal to the
gradient of the whole and is not; ``--method.adjoint exact`` gives the same recipe with the exact one, in the same
memory.

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
    """Trajectory matching by a gradient that is not exact."""

    num_steps: int = 10000
    """Updates of the images."""
    syn_steps: int = 50
    """Steps of the student on the set."""
    max_start_epoch: int = 5
    """The student starts from one of the first so many snapshots of an expert."""
    adjoint: Adjoint = Tesla()
    """How to differentiate through the student's steps: tesla as published, or exact."""
