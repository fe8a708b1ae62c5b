"""Condense: a dataset-distillation engine.

Public names are loaded on first use, so that ``import condense`` is fast.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from condense.api import RunOptions as RunOptions
    from condense.api import apply as apply
    from condense.api import distill as distill
    from condense.api import evaluate as evaluate
    from condense.api import export_set as export
    from condense.api import import_set as import_set
    from condense.api import load as load
    from condense.api import make_buffer as make_buffer
    from condense.api import prepare as prepare
    from condense.api import relabel as relabel
    from condense.api import report as report
    from condense.overview import compare as compare
    from condense.recipe import Recipe as Recipe
    from condense.synthetic.files import save as save
    from condense.synthetic.set import SyntheticSet as SyntheticSet

_HOMES = {
    "Recipe": "condense.recipe:Recipe",
    "RunOptions": "condense.api:RunOptions",
    "SyntheticSet": "condense.synthetic.set:SyntheticSet",
    "apply": "condense.api:apply",
    "compare": "condense.overview:compare",
    "distill": "condense.api:distill",
    "evaluate": "condense.api:evaluate",
    "export": "condense.api:export_set",
    "import_set": "condense.api:import_set",
    "load": "condense.api:load",
    "make_buffer": "condense.api:make_buffer",
    "prepare": "condense.api:prepare",
    "relabel": "condense.api:relabel",
    "report": "condense.api:report",
    "save": "condense.synthetic.files:save",
}

__all__ = [
    "Recipe",
    "RunOptions",
    "SyntheticSet",
    "apply",
    "compare",
    "distill",
    "evaluate",
    "export",
    "import_set",
    "load",
    "make_buffer",
    "prepare",
    "relabel",
    "report",
    "save",
]

try:
    __version__ = version("condense-dd")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'condense' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
