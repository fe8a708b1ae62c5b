"""Differentiable inner loops: ``unroll`` trains, a rule says how, an adjoint says how to differentiate it."""

from condense.inner.adjoint import (
    ADJOINTS,
    Adjoint,
    Checkpointed,
    Exact,
    Full,
    Higher,
    RandomTruncated,
    Tesla,
    Truncated,
)
from condense.inner.rules import SGD, Adam, Params, Rule
from condense.inner.unroll import unroll

__all__ = [
    "ADJOINTS",
    "SGD",
    "Adam",
    "Adjoint",
    "Checkpointed",
    "Exact",
    "Full",
    "Higher",
    "Params",
    "RandomTruncated",
    "Rule",
    "Tesla",
    "Truncated",
    "unroll",
]
