"""Condense: a dataset-distillation engine.

Public names are loaded on first use, so that ``import condense`` is fast.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from condense.api import RunOptions as RunOptions
    from condense.api import distill as distill
    from condense.api import evaluate as evaluate
    from condense.api import load as load
    from condense.api import make_buffer as make_buffer
    from condense.api import prepare as prepare
    from condense.api import relabel as relabel
    from condense.recipe import Recipe as Recipe
    from condense.synthetic.files import save as save
    from condense.synthetic.set import SyntheticSet as SyntheticSet

_HOMES = {
    "RunOptions": "condense.api",
    "distill": "condense.api",
    "evaluate": "condense.api",
    "load": "condense.api",
    "make_buffer": "condense.api",
    "prepare": "condense.api",
    "relabel": "condense.api",
    "Recipe": "condense.recipe",
    "save": "condense.synthetic.files",
    "SyntheticSet": "condense.synthetic.set",
}

__all__ = [
    "Recipe",
    "RunOptions",
    "SyntheticSet",
    "distill",
    "evaluate",
    "load",
    "make_buffer",
    "prepare",
    "relabel",
    "save",
]

try:
    __version__ = version("condense-dd")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'condense' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
