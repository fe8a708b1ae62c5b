"""Methods by name. The table holds paths, not classes: a method is imported when it is asked for."""

from __future__ import annotations

import importlib
import operator
from importlib.metadata import entry_points

from condense.method import Method
from condense.names import suggest

METHODS = {
    "random": "condense.methods.selection:Random",
    "herding": "condense.methods.selection:Herding",
    "k-center": "condense.methods.selection:KCenter",
    "k-means": "condense.methods.selection:KMeans",
    "forgetting": "condense.methods.selection:Forgetting",
    "el2n": "condense.methods.selection:EL2N",
    "dd": "condense.methods.dd:DD",
    "rat-bptt": "condense.methods.rat_bptt:RaTBPTT",
    "rtp": "condense.methods.rtp:RTP",
    "dc": "condense.methods.dc:DC",
    "dsa": "condense.methods.dc:DSA",
    "idc": "condense.methods.idc:IDC",
    "idc-i": "condense.methods.idc:IDCI",
    "mtt": "condense.methods.mtt:MTT",
    "tesla": "condense.methods.tesla:TESLA",
    "datm": "condense.methods.datm:DATM",
    "dm": "condense.methods.dm:DM",
    "datadam": "condense.methods.datadam:DataDAM",
    "cafe": "condense.methods.cafe:CAFE",
    "kip": "condense.methods.kip:KIP",
    "rfad": "condense.methods.rfad:RFAD",
    "frepo": "condense.methods.frepo:FRePo",
    "rcig": "condense.methods.rcig:RCIG",
}

GROUP = "condense.methods"
"""Entry-point group through which other packages add methods: ``name = "package.module:Class"``."""


def table() -> dict[str, str]:
    """name -> "module:Class", ours and those of other packages; a name of ours cannot be taken."""
    return {entry.name: entry.value for entry in entry_points(group=GROUP)} | METHODS


def load(name: str) -> type[Method]:
    """The class behind a name, or behind the import path ``module:Class`` that ``name_of`` gives an unlisted one.

    Raises:
        ValueError: unknown name, or a path that does not lead to a method.
    """
    methods = table()
    if name not in methods and ":" not in name:
        raise ValueError(f"unknown method {name!r}: {suggest(name, methods)}")
    module, _, attribute = methods.get(name, name).partition(":")
    if "<locals>" in attribute:
        raise ValueError(
            f"method {name!r} is a class inside a function, which nobody else can import; move it to the top level of "
            "its module, or pass an instance of it in Python"
        )
    try:
        found = operator.attrgetter(attribute)(importlib.import_module(module))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        if name in methods:
            mend = "reinstall the package it comes from"
        elif module == "__main__":
            mend = "it stood in a script: run that script again, or move the class to a module that can be imported"
        else:
            mend = "install its package, or put its folder on PYTHONPATH"
        raise ValueError(f"method {name!r} cannot be loaded: {error}; {mend}") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(f"method {name!r} leads to {found!r}, which is not a Method; give another name")
    return found


def name_of(method: Method) -> str:
    """The name a method is listed under; for an unlisted class its import path."""
    path = f"{type(method).__module__}:{type(method).__qualname__}"
    return next((name for name, value in table().items() if value == path), path)
