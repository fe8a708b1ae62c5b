"""Differentiable inner loops: ``unroll`` trains with an update rule and differentiates with an adjoint.

Solutions of inner problems found in any other way are differentiated by ``implicit_gradient``.
"""

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
from condense.inner.implicit import (
    ConjugateGradients,
    Descent,
    Minimum,
    Solver,
    descend,
    hessian_product,
    implicit_gradient,
    minimise,
    mixed_gradient,
    pushforward,
)
from condense.inner.rules import SGD, Adam, Params, Rule
from condense.inner.unroll import advance, unroll

__all__ = [
    "ADJOINTS",
    "SGD",
    "Adam",
    "Adjoint",
    "Checkpointed",
    "ConjugateGradients",
    "Descent",
    "Exact",
    "Full",
    "Higher",
    "Minimum",
    "Params",
    "RandomTruncated",
    "Rule",
    "Solver",
    "Tesla",
    "Truncated",
    "advance",
    "descend",
    "hessian_product",
    "implicit_gradient",
    "minimise",
    "mixed_gradient",
    "pushforward",
    "unroll",
]
