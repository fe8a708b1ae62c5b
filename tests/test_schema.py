"""The checker of types that files and Python arguments share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

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


@dataclass(frozen=True)
class Asked(schema.Checked):
    steps: int = 1
    rate: float = 0.1
    sizes: tuple[int, ...] = ()
    place: Path | None = None
    kind: Literal["sgd", "adam"] = "sgd"
    clamp: bool = False
    limit: float | None = None
    device: str = "auto"
    names: str | Sequence[str] = ()


@pytest.mark.parametrize(
    "given, meant",
    [
        ({"steps": np.int64(5)}, {"steps": 5}),
        ({"steps": np.array(5)}, {"steps": 5}),
        ({"rate": np.float32(0.5)}, {"rate": 0.5}),
        ({"rate": np.float64(0.5)}, {"rate": 0.5}),
        ({"rate": 1}, {"rate": 1.0}),
        ({"limit": 2}, {"limit": 2.0}),
        ({"sizes": [1, 2]}, {"sizes": (1, 2)}),
        ({"sizes": np.arange(3)}, {"sizes": (0, 1, 2)}),
        ({"place": "runs/x"}, {"place": Path("runs/x")}),
        ({"clamp": np.bool_(True)}, {"clamp": True}),
        ({"device": torch.device("cuda", 1)}, {"device": "cuda:1"}),
    ],
    ids=str,
)
def test_what_means_the_same_becomes_plain_python(given: dict[str, Any], meant: dict[str, Any]) -> None:
    made = Asked(**given)
    for name, value in meant.items():
        assert getattr(made, name) == value and type(getattr(made, name)) is type(value)
    assert all(type(size) is int for size in made.sizes)


@pytest.mark.parametrize(
    "given, line",
    [
        ({"steps": 3.5}, r"^Asked: steps=3\.5 is not a whole number; give an int$"),
        ({"steps": "3"}, r"^Asked: steps='3' is not a whole number; give an int$"),
        ({"steps": None}, "^Asked: steps=None is not a whole number; give an int$"),
        ({"rate": math.nan}, "^Asked: rate=nan is not a number; give a float$"),
        ({"sizes": (1, "a")}, r"^Asked: sizes=\(1, 'a'\): 'a' is not a whole number; give a tuple of int$"),
        ({"clamp": "False"}, "^Asked: clamp='False' is not True or False; give one of them$"),
        ({"kind": "adan"}, "^Asked: kind='adan' is unknown: did you mean 'adam'"),
        ({"names": ["a", 3]}, r"^Asked: names=\['a', 3\]: 3 is not text; give a str or a Sequence$"),
        ({"names": 3}, "^Asked: names=3 is not text or a sequence; give a str or a Sequence$"),
        ({"place": 3}, "^Asked: place=3 is not of type Path or None; give a Path or None$"),
    ],
    ids=str,
)
def test_anything_else_is_refused_on_construction(given: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        Asked(**given)


def test_arguments_are_checked_as_fields_are() -> None:
    @schema.checked
    def measure(name: str, num_seeds: int = 5, **fields: Any) -> tuple[str, int, dict[str, Any]]:
        return name, num_seeds, fields

    found = measure("a", np.int64(3), other="x")
    assert found == ("a", 3, {"other": "x"}) and type(found[1]) is int
    with pytest.raises(ValueError, match=r"^measure: num_seeds=2\.5 is not a whole number; give an int$"):
        measure("a", num_seeds=2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="name"):
        measure()  # type: ignore[call-arg]


def test_annotations_that_only_type_checkers_see_are_passed_over() -> None:
    @dataclass(frozen=True)
    class Local(Asked):
        extra: Unseen = None  # type: ignore[name-defined]  # noqa: F821

    assert Local(extra="anything").steps == 1
    with pytest.raises(ValueError, match=r"^Local: steps=3\.5"):
        Local(steps=3.5)  # type: ignore[arg-type]


def test_a_field_that_is_not_there_gets_a_suggestion() -> None:
    assert schema.replaced(Inner(name="a"), {"name": "b"}) == Inner(name="b")
    with pytest.raises(ValueError, match=r"^Inner has no field 'nam': did you mean 'name'\? there are name"):
        schema.replaced(Inner(name="a"), {"nam": "b"})
    with pytest.raises(ValueError, match="did you mean 'seed'"):
        schema.replaced(Inner(name="a"), {"sed": 3}, others=["seed"])
