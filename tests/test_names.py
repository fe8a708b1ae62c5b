"""How messages spell fields: as the user writes them, on the command line and in Python."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from condense import names
from condense.names import installing, spelt

SPELT = [
    (("ipc", 10), "--ipc 10", "ipc=10"),
    (("out",), "--out", "out"),
    (("network", "convnet"), "--network convnet", "network='convnet'"),
    (("widths", (16, 32)), "--widths 16 32", "widths=(16, 32)"),
    (("fingerprint", None), "--fingerprint None", "fingerprint=None"),
    (("method.num_steps", 1), "--method.num-steps 1", "num_steps=1"),
    (("method.optim.lr", 0.1), "--method.optim.lr 0.1", "optim=Optim(lr=0.1)"),
    (("method.optim.lr",), "--method.optim.lr", "optim=Optim(lr=...)"),
    (("split.val_fraction", 0.1), "--split.val-fraction 0.1", "split=Split(val_fraction=0.1)"),
    (("decode.num_bases", 3, "Bases"), "--decode.num-bases 3", "decode=Bases(num_bases=3)"),
]


@pytest.mark.parametrize(("field", "flag", "python"), SPELT)
def test_a_field_is_spelt_for_the_one_who_reads_it(field: tuple[str, ...], flag: str, python: str) -> None:
    assert spelt(*field) == python
    with names.flags():
        assert spelt(*field) == flag
    assert spelt(*field) == python


def test_what_is_missing_is_installed_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """No index has Condense. An installation that is older than the extra, or that never was, is a checkout."""
    lines = ["torch>=2.6", 'timm>=1.0; extra == "timm"', "one>=1; extra == 'graphs'", "two; extra == 'graphs'"]
    monkeypatch.setattr(names.metadata, "requires", lambda name: lines)
    assert installing("timm") == "pip install 'timm>=1.0'"
    assert installing("graphs") == "pip install 'one>=1' two"
    assert installing("private") == "pip install '.[private]' in the checkout"

    def absent(name: str) -> None:
        raise names.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(names.metadata, "requires", absent)
    assert installing("timm") == "pip install '.[timm]' in the checkout"


def test_every_optional_part_that_is_named_exists() -> None:
    root = Path(__file__).resolve().parents[1]
    known = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    code = "".join(
        p.read_text() for folder in ("condense", "methods", "buffers", "eval") for p in root.glob(f"{folder}/**/*.py")
    )
    named = re.findall(r"installing\([\"'](\w+)", code)
    assert len(named) > 3 and set(named) <= set(known) and "condense-dd[" not in code
