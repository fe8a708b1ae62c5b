"""How messages spell fields: as the user writes them, on the command line and in Python."""

from __future__ import annotations

import pytest

from condense import names
from condense.names import spelt

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
