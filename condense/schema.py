"""Values checked against annotations: the content of a JSON file, and the fields that a Python user passes.

One checker serves both, so that a wrong type is refused in the same words wherever it comes from.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

from condense.names import printable

T = TypeVar("T")

field_types: Any = functools.cache(typing.get_type_hints)
"""The resolved annotations of a dataclass, by field name."""


def mismatch(value: Any, annotation: Any) -> str | None:
    """Why ``value`` is not of the annotated type, as "VALUE is not EXPECTED"; None where it is.

    An ``int`` serves as a ``float``; a ``bool`` serves as neither. ``float`` means a finite number or an infinity,
    never NaN. Tuples, sequences and mappings are checked element by element; a dataclass and any other class by
    ``isinstance``.
    """
    if annotation is Any or annotation is dataclasses.MISSING:
        return None
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return mismatch(value, args[0])
    if origin in (Union, types.UnionType):
        return None if any(mismatch(value, option) is None for option in args) else _not(value, annotation)
    if origin is Literal:
        # `True == 1`: the type decides too
        return None if any(value == x and type(value) is type(x) for x in args) else _not(value, annotation)
    if annotation is None or annotation is type(None):
        return None if value is None else _not(value, annotation)
    if annotation is float:
        right = isinstance(value, int | float) and not isinstance(value, bool) and value == value
        return None if right else _not(value, annotation)
    if annotation is int:
        return None if isinstance(value, int) and not isinstance(value, bool) else _not(value, annotation)
    kind = origin or annotation
    if not isinstance(kind, type):
        return None  # a type variable or an alias that says nothing at run time
    if not isinstance(value, kind) or (kind is Sequence and isinstance(value, str | bytes)):
        return _not(value, annotation)
    holder: Any = value
    if issubclass(kind, tuple) and args:
        return _of_tuple(holder, args)
    if issubclass(kind, Mapping) and args:
        pairs = ((item, part) for pair in holder.items() for item, part in zip(pair, args, strict=True))
        return next((line for item, part in pairs if (line := mismatch(item, part))), None)
    if issubclass(kind, Sequence) and args:
        return next((line for item in holder if (line := mismatch(item, args[0]))), None)
    return None


def check_fields(instance: Any, prefix: str = "") -> None:
    """Raise ``ValueError`` for the first field of a dataclass whose value is not of its annotated type.

    Args:
        instance: a dataclass instance; fields that are dataclasses themselves are checked by their own constructor.
        prefix: what stands before the name of the field in the message, such as ``method.``.
    """
    hints = field_types(type(instance))
    for field in dataclasses.fields(instance):
        line = mismatch(getattr(instance, field.name), hints[field.name])
        if line is not None:
            raise ValueError(f"{prefix}{field.name}: {line}")


def from_json(kind: type[T], value: Any, where: str) -> T:
    """A dataclass from the mapping that JSON gave; keys beyond its fields are ignored, lists serve as tuples.

    Args:
        kind: a dataclass whose nested fields may be dataclasses themselves.
        value: what ``json.loads`` returned.
        where: the file, and the place in it, for the message.

    Raises:
        ValueError: not a mapping; a field without default is missing; a field has another type; the constructor of
            the dataclass refuses it.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: {_not(value, Mapping)}")
    hints, found = field_types(kind), {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in value:
            found[field.name] = _converted(value[field.name], hints[field.name], f"{where}, {field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}: the field {field.name!r} is missing")
    try:
        return kind(**found)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def brief(value: Any) -> str:
    """A value in a message: on one line, without control characters, and short."""
    try:
        text = printable(" ".join(repr(value).split()))
    except Exception:
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:56]}..."


def _converted(value: Any, annotation: Any, where: str) -> Any:
    """``value`` with dataclasses and tuples made of the mappings and lists in it, wherever the annotation has them."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return from_json(annotation, value, where)
    if origin in (Union, types.UnionType) and value is not None:
        options = [option for option in args if option is not type(None)]
        if len(options) > 1 and isinstance(value, list | Mapping):
            options = [option for option in options if _has_parts(option)]
        if len(options) == 1:
            return _converted(value, options[0], where)
    if origin is tuple and isinstance(value, list):
        each = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(each) == len(value) and any(map(_has_parts, each)):
            pairs = enumerate(zip(value, each, strict=True))
            return tuple(_converted(item, part, f"{where}, entry {i}") for i, (item, part) in pairs)
        value = tuple(value)
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping) and _has_parts(args[1]):
        return {name: _converted(item, args[1], f"{where}, {brief(name)}") for name, item in value.items()}
    line = mismatch(value, annotation)
    if line is not None:
        raise ValueError(f"{where}: {line}")
    return value


def _has_parts(annotation: Any) -> bool:
    """Whether JSON holds such a value as a mapping or list that is to be converted."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return any(map(_has_parts, typing.get_args(annotation)))
    return dataclasses.is_dataclass(annotation) or typing.get_origin(annotation) is tuple


def _of_tuple(value: tuple[Any, ...], args: tuple[Any, ...]) -> str | None:
    if len(args) == 2 and args[1] is Ellipsis:
        return next((line for item in value if (line := mismatch(item, args[0]))), None)
    if len(value) != len(args):
        return f"{brief(value)} has {len(value)} elements, not {len(args)}"
    return next((line for item, part in zip(value, args, strict=True) if (line := mismatch(item, part))), None)


def _not(value: Any, annotation: Any) -> str:
    return f"{brief(value)} is not {_plain(annotation)}"


def _plain(annotation: Any) -> str:
    """What an annotation says, in words."""
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "text", type(None): "None"}
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _plain(args[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_plain(option) for option in args)
    if origin is Literal:
        return " or ".join(map(repr, args))
    kind = origin or annotation
    if kind in words:
        return words[kind]
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return "a mapping"
    if isinstance(kind, type) and issubclass(kind, Sequence) and kind is not str:
        return "a sequence" + (f" of {_plain(args[0]).removeprefix('a ')}s" if args and args[0] in (int, float) else "")
    return f"of type {kind.__name__}" if isinstance(kind, type) else str(kind)
