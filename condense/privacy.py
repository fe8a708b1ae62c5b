"""Differential privacy: the noise that a budget asks for, and the key from which it is drawn.

A mechanism is (epsilon, delta)-differentially private if for any two data sets of which one has one more record, and
any set of results, the probabilities satisfy P(results | one) <= exp(epsilon) P(results | other) + delta (Dwork and
Roth, "The algorithmic foundations of differential privacy", 2014). What is computed from a private result alone is as
private as the result.
"""

from __future__ import annotations

import functools
import secrets
import warnings
from typing import Any, Literal

from condense.names import installing, spelt

Accountant = Literal["rdp", "prv"]

ACCOUNTANTS: dict[Accountant, str] = {
    "rdp": "Opacus, Renyi differential privacy",
    "prv": "Opacus, privacy loss random variables",
}
"""The accountants, as files name them."""

_ORDERS = [1 + k / 10 for k in range(1, 100)] + [*range(11, 64), 72, 96, 128, 192, 256, 384, 512, 768, 1024]
"""Orders of the Renyi divergence, of which the accountant takes the best."""


@functools.cache
def noise_multiplier(epsilon: float, delta: float, rate: float, releases: int, accountant: Accountant = "rdp") -> float:
    """Return the standard deviation of the noise, as a multiple of the largest norm of the contribution of a record.

    It is that of the Gaussian mechanism with Poisson sampling, composed ``releases`` times, for records that are added
    or removed, by an accountant of Opacus. Both bound epsilon from above. ``rdp`` is Renyi privacy (Mironov,
    Talwar and Zhang 2019): for a single release without sampling it asks for about a tenth more noise than is needed.
    ``prv`` composes the distributions of the privacy loss numerically (Gopi, Lee and Wutschitz, "Numerical composition
    of differential privacy", 2021), and was within 0.6 % of epsilon where it is known.

    Args:
        epsilon, delta: the budget of all releases together.
        rate: probability with which a record takes part in a release.
        releases: number of releases.
        accountant: which bound of epsilon is used.

    Raises:
        ValueError: Opacus is not installed, or it cannot certify so small an epsilon.
    """
    try:
        from opacus.accountants.utils import get_noise_multiplier
    except ImportError as error:
        raise ValueError(
            f"the noise for an epsilon is computed by Opacus, which is not installed; run: {installing('private')}"
        ) from error
    options: dict[str, Any] = {"epsilon_tolerance": min(0.01, 1e-3 * epsilon), "alphas": _ORDERS}
    if accountant == "prv":
        tolerance = max(1e-4, 3e-3 * epsilon)
        options = {"epsilon_tolerance": tolerance, "eps_error": tolerance}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the best order is the first or last one; log 0 without sampling
            noise = get_noise_multiplier(
                target_epsilon=epsilon,
                target_delta=delta,
                sample_rate=rate,
                steps=releases,
                accountant=accountant,
                **options,
            )
    except ValueError as error:
        raise ValueError(
            f"there is no noise that the accountant certifies for epsilon {epsilon:g} and delta {delta:g}; give "
            f"{spelt('method.epsilon', 1.0)}"
        ) from error
    return float(noise)


def secret_key() -> int:
    """Return 128 random bits of the operating system.

    Numbers that protect the data must not follow from the seed of a recipe, because whoever knows the recipe could
    subtract them. The key is not stored; whoever draws from it twice must use another counter.
    """
    return secrets.randbits(128)


def check_budget(epsilon: float, delta: float) -> None:
    """Raise ValueError if epsilon is not positive and finite, or delta not a probability below one half."""
    if not 0 < epsilon < float("inf"):
        raise ValueError(
            f"method.epsilon must be positive and finite, got {epsilon}; give {spelt('method.epsilon', 10.0)}"
        )
    if not 0 < delta < 0.5:
        raise ValueError(
            f"method.delta must be a small positive number, got {delta}; give {spelt('method.delta', 1e-5)}"
        )
