"""The checker of types that files and Python arguments share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from condense import schema


@dataclass(frozen=True)
class Inner:
    name: str
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outer:
    steps: int
    rate: float = 0.1
    kind: Literal["sgd", "adam"] = "sgd"
    inner: Inner = Inner("plain")
    table: Mapping[str, float] = field(default_factory=dict)


RIGHT: list[tuple[Any, Any]] = [
    (3, int),
    (3, float),
    (math.inf, float),
    (True, bool),
    (None, int | None),
    ((1, 2), tuple[int, ...]),
    ((1, "a"), tuple[int, str]),
    ([1.5, 2], Sequence[float]),
    ({"a": 1}, Mapping[str, float]),
    ("adam", Literal["sgd", "adam"]),
    (..., Any),
]
WRONG: list[tuple[Any, Any]] = [
    (3.5, int),
    (3.0, int),
    (True, int),
    (True, float),
    (math.nan, float),
    ("1", float),
    ("False", bool),
    (1, bool),
    (1, Literal[True]),
    ((1, 2.5), tuple[int, ...]),
    ((1,), tuple[int, str]),
    ("ab", Sequence[str]),
    ({"a": "b"}, Mapping[str, float]),
    ({1: 2}, Mapping[str, int]),
    ("rmsprop", Literal["sgd", "adam"]),
    (None, int),
]


@pytest.mark.parametrize("value, annotation", RIGHT, ids=str)
def test_a_value_of_the_annotated_type_passes(value: Any, annotation: Any) -> None:
    assert schema.mismatch(value, annotation) is None


@pytest.mark.parametrize("value, annotation", WRONG, ids=str)
def test_any_other_value_is_named(value: Any, annotation: Any) -> None:
    line = schema.mismatch(value, annotation)
    assert line is not None and "\n" not in line


def test_fields_of_an_instance_are_checked_by_name() -> None:
    schema.check_fields(Outer(3))
    with pytest.raises(ValueError, match=r"^method\.steps: 3\.5 is not a whole number$"):
        schema.check_fields(Outer(3.5), "method.")  # type: ignore[arg-type]


def test_a_dataclass_is_made_of_json() -> None:
    found = schema.from_json(Outer, {"steps": 2, "inner": {"name": "n", "sizes": [1, 2]}, "later": 1}, "f.json")
    assert found == Outer(2, inner=Inner("n", (1, 2)))


@pytest.mark.parametrize(
    "value, words",
    [
        ([], "f.json: .* is not a mapping"),
        ({}, "f.json: the field 'steps' is missing"),
        ({"steps": "2"}, "f.json, steps: '2' is not a whole number"),
        ({"steps": 2, "inner": {"name": 3}}, "f.json, inner, name: 3 is not text"),
        ({"steps": 2, "inner": {"name": "n", "sizes": [1, None]}}, "f.json, inner, sizes: None is not a whole number"),
        ({"steps": 2, "table": {"a": "b"}}, "f.json, table: 'b' is not a number"),
    ],
)
def test_json_of_another_form_is_refused_with_its_place(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        schema.from_json(Outer, value, "f.json")
