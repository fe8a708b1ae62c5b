"""Methods by name. The table holds paths, not classes: a method is imported when it is asked for."""

from __future__ import annotations

import importlib
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
    },
    subclass_of(Method),
)


def load(name: str) -> type[Method]:
    """The class behind a name, or behind an import path: ``module:Class`` as ``name_of`` gives it for a class that is
    not listed, or ``FILE.py:Class``. A module is also looked for in the current folder, that of a file in its own.

    Raises:
        ValueError: unknown name, or a path that does not lead to a method.
    """
    if name in METHODS or ":" not in name:
        return METHODS.named(name)
    module, _, attribute = name.rpartition(":")
    file = Path(module).expanduser() if module.endswith(".py") else None
    if file is not None:
        module = file.stem
    if "<locals>" in attribute:
        raise ValueError(
            f"method {name!r} is a class inside a function, which nobody else can import; move it to the top level of "
            "its module, or pass an instance of it in Python"
        )
    try:
        with _importable(file.parent if file else Path()):
            place = getattr(importlib.import_module(module), "__file__", None)
            if file is not None and (place is None or not file.samefile(place)):
                raise ImportError(f"another module has that name, {place or 'a built-in one'}")
            value = import_path(f"{module}:{attribute}")
    except Exception as error:  # the module may raise anything
        if module == "__main__":
            advice = "it stood in a script: run that script again, or move the class to a module that can be imported"
        else:
            advice = "correct or rename the file" if file else "install its package, or put its folder on PYTHONPATH"
        raise ValueError(f"method {name!r} cannot be loaded: {reason(error)}; {advice}") from error
    complaint = METHODS.complaint(name, value)
    if complaint is not None:
        raise ValueError(f"method {name!r} {complaint}; give another name")
    return value


def name_of(method: Method) -> str:
    """The name a method is listed under; for a class that is not listed its import path."""
    cls = type(method)
    return METHODS.name_of(cls) or f"{cls.__module__}:{cls.__qualname__}"


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Inside, modules of a folder can be imported; what is installed comes first."""
    place = str(folder.resolve())
    sys.path.append(place)
    try:
        yield
    finally:
        sys.path.remove(place)
