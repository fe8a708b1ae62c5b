"""Registry of methods. It holds import paths; a method is imported when it is looked up."""

from __future__ import annotations

import importlib
import inspect
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from condense.method import Method
from condense.names import reason
from condense.plugins import Registry, import_path, subclass_of

METHODS: Registry[type[Method]] = Registry(
    "method",
    "condense.methods",
    {
        "random": "condense.methods.selection:Random",
        "herding": "condense.methods.selection:Herding",
        "k-center": "condense.methods.selection:KCenter",
        "k-means": "condense.methods.selection:KMeans",
        "forgetting": "condense.methods.selection:Forgetting",
        "el2n": "condense.methods.selection:EL2N",
        "rded": "condense.methods.rded:RDED",
        "cim": "condense.methods.cim:CIM",
        "ccs": "condense.methods.ccs:CCS",
        "graph-cut": "condense.methods.graph_cut:GraphCut",
        "dq": "condense.methods.graph_cut:DQ",
        "dd": "condense.methods.dd:DD",
        "rat-bptt": "condense.methods.rat_bptt:RaTBPTT",
        "at-bptt": "condense.methods.at_bptt:ATBPTT",
        "rtp": "condense.methods.rtp:RTP",
        "dc": "condense.methods.dc:DC",
        "dsa": "condense.methods.dc:DSA",
        "idc": "condense.methods.idc:IDC",
        "idc-i": "condense.methods.idc:IDCI",
        "mtt": "condense.methods.mtt:MTT",
        "tesla": "condense.methods.tesla:TESLA",
        "datm": "condense.methods.datm:DATM",
        "selmatch": "condense.methods.selmatch:SelMatch",
        "dm": "condense.methods.dm:DM",
        "datadam": "condense.methods.datadam:DataDAM",
        "tgdd": "condense.methods.tgdd:TGDD",
        "ncfm": "condense.methods.ncfm:NCFM",
        "cafe": "condense.methods.cafe:CAFE",
        "dpdm": "condense.methods.dpdm:DPDM",
        "kip": "condense.methods.kip:KIP",
        "rfad": "condense.methods.rfad:RFAD",
        "frepo": "condense.methods.frepo:FRePo",
        "rcig": "condense.methods.rcig:RCIG",
        "krr-st": "condense.methods.krr_st:KRRST",
        "linear-gradient": "condense.methods.linear_gradient:LinearGradient",
        "sre2l": "condense.methods.sre2l:SRe2L",
        "fadrm": "condense.methods.fadrm:FADRM",
        "cudd": "condense.methods.cudd:CUDD",
        "mirage": "condense.methods.mirage:Mirage",
    },
    subclass_of(Method),
)


def load(name: str) -> type[Method]:
    """Return the class of a method, given its name or an import path.

    The path is ``module:Class``, as returned by ``name_of`` for a class that is not registered, or ``FILE.py:Class``.
    Modules are also searched in the current folder or, for a file, in its folder.

    Raises:
        ValueError: unknown name, or the path does not lead to a method.
    """
    if name in METHODS or ":" not in name:
        return METHODS.named(name)
    module, _, attribute = name.rpartition(":")
    file = Path(module).expanduser() if module.endswith(".py") else None
    if file is not None:
        module = file.stem
        if not file.is_file():
            raise ValueError(f"method {name!r} cannot be loaded: there is no file {file}; check the path")
    if "<locals>" in attribute:
        raise ValueError(
            f"method {name!r} is a class inside a function and cannot be imported; move it to the top level of "
            "its module, or pass an instance of it in Python"
        )
    try:
        with _importable(file.parent if file else Path()):
            origin = getattr(importlib.import_module(module), "__file__", None)
            if file is not None and (origin is None or not file.samefile(origin)):
                raise ImportError(f"another module has this name: {origin or 'a built-in one'}")
            value = import_path(f"{module}:{attribute}")
    except Exception as error:  # the module may raise anything
        if module == "__main__":
            advice = (
                "it was defined in a script: run that script again, or move the class to a module that can be imported"
            )
        else:
            advice = "correct or rename the file" if file else "install its package, or add its folder to PYTHONPATH"
        raise ValueError(f"method {name!r} cannot be loaded: {reason(error)}; {advice}") from error
    complaint = METHODS.complaint(name, value)
    if complaint is not None:
        raise ValueError(f"method {name!r} {complaint}; correct the class or give another one")
    return value


def name_of(method: Method) -> str:
    """Return the registered name of a method, or the import path of its class if it is not registered."""
    cls = type(method)
    return METHODS.name_of(cls) or f"{cls.__module__}:{cls.__qualname__}"


def citation(cls: type[Method]) -> str:
    """Return the docstring of the module of a method up to its equations, which names the paper."""
    paragraphs = (inspect.getdoc(sys.modules[cls.__module__]) or "").split("\n\n")
    return "\n\n".join(
        itertools.takewhile(lambda text: not text.startswith(" ") and not text.endswith(":"), paragraphs)
    )


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Make the modules of a folder importable inside the context. Installed modules take precedence."""
    entry = str(folder.resolve())
    sys.path.append(entry)
    try:
        yield
    finally:
        sys.path.remove(entry)
