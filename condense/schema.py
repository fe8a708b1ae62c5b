"""Values checked against annotations: the content of a JSON file, and the fields that a Python user passes.

One checker serves both, so that a wrong type is refused in the same words wherever it comes from.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, Union

import torch

from condense.names import excerpt, suggest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
D = TypeVar("D", bound="DataclassInstance")
P = ParamSpec("P")


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
        lines = [line for option in args if (line := mismatch(value, option)) is not None]
        if len(lines) < len(args):
            return None
        of_value = f"{brief(value)} is not "
        return next((line for line in lines if not line.startswith(of_value)), _not(value, annotation))
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
    fits = isinstance(value, kind)
    if not fits or (kind is Sequence and isinstance(value, str | bytes)):
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


class Checked:
    """Base of the dataclasses that a Python user makes: their fields are of the annotated types when they are made.

    What means the same is converted: numpy's numbers, a list where a tuple is expected, an ``int`` where a ``float``
    is, text where a ``Path`` is, a ``torch.device`` where its name is. A subclass with a ``__post_init__`` of its own
    calls this one first.

    Raises:
        ValueError: a value of another type, on construction.
    """

    def __post_init__(self) -> None:
        hints = hints_of(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            given = getattr(self, field.name)
            value = accepted(given, hints[field.name], type(self).__name__, field.name)
            if value is not given:
                object.__setattr__(self, field.name, value)


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """A function whose arguments are converted and checked as the fields of ``Checked`` are; ``**fields`` pass."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        given = signature.bind(*args, **kwargs)
        hints = _hints_of_function(function)
        for name, value in given.arguments.items():
            if signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD:
                given.arguments[name] = accepted(value, hints[name], function.__name__, name)
        return function(*given.args, **given.kwargs)

    return call


_hints_of_function = functools.cache(typing.get_type_hints)


def accepted(value: Any, annotation: Any, owner: str, name: str) -> Any:
    """``value`` as the annotation means it.

    Args:
        owner, name: the class or function and its field, for the message.

    Raises:
        ValueError: it is of another type.
    """
    value = _as_meant(value, annotation)
    line = mismatch(value, annotation)
    if line is None:
        return value
    text, wanted = brief(value), _in_python(annotation)
    if isinstance(value, str) and typing.get_origin(annotation) is Literal:
        raise ValueError(f"{owner}: {name}={text} is unknown: {suggest(value, typing.get_args(annotation))}")
    reason = line.removeprefix(text) if line.startswith(text) else f": {line}"
    mend = "one of them" if reason.endswith(f"is not {wanted}") else wanted
    raise ValueError(f"{owner}: {name}={text}{reason}; give {mend}")


def replaced(value: D, fields: Mapping[str, Any], others: Iterable[str] = ()) -> D:
    """``dataclasses.replace``, with the nearest names where there is no such field.

    Args:
        value: a dataclass.
        fields: its new values, by name.
        others: names that the user may have meant besides those of the fields.

    Raises:
        ValueError: an unknown field, or a value that the constructor refuses.
    """
    names = [f.name for f in dataclasses.fields(value)]
    for name in fields:
        if name not in names:
            raise ValueError(f"{type(value).__name__} has no field {name!r}: {suggest(name, [*names, *others])}")
    return dataclasses.replace(value, **fields)


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
    hints, found = hints_of(kind), {}
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
    """``repr(value)`` for a message: on one line, printable, at most 60 characters."""
    try:
        return excerpt(repr(value), 60)
    except Exception:  # a foreign class may represent itself in any way
        return type(value).__name__


def _hints_of_class(kind: type) -> dict[str, Any]:
    """The resolved annotations of a dataclass, by field name; ``Any`` for those of a class whose annotations name what
    only type checkers import."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        try:
            found |= inspect.get_annotations(base, eval_str=True)
        except NameError:
            found |= dict.fromkeys(inspect.get_annotations(base), Any)
    return found


hints_of: Callable[[type], dict[str, Any]] = functools.cache(_hints_of_class)


def _as_meant(value: Any, annotation: Any) -> Any:
    options = _options(annotation)
    if Any in options:
        return value
    if type(value) not in (int, float, bool, str) and getattr(value, "shape", None) == () and hasattr(value, "item"):
        plain = value.item()  # of numpy and torch
        value = plain if mismatch(plain, annotation) is None else value
    if type(value) is int and float in options and int not in options:
        return float(value) if abs(value) < 2**1000 else value
    if type(value) is str and Path in options and str not in options:
        return Path(value)
    if isinstance(value, torch.device) and str in options:
        return str(value)
    args = next((typing.get_args(option) for option in options if typing.get_origin(option) is tuple), ())
    if args and args[0] in (int, float) and len(getattr(value, "shape", ())) == 1:
        value = value.tolist()
    if args and isinstance(value, list | tuple):
        parts = args[:1] * len(value) if args[1:] == (Ellipsis,) else args
        if len(parts) == len(value):
            return tuple(_as_meant(item, part) for item, part in zip(value, parts, strict=True))
    return value


def _options(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of an annotation: one, or those of a union."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _options(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return tuple(option for part in typing.get_args(annotation) for option in _options(part))
    return (annotation,)


def _in_python(annotation: Any) -> str:
    """What an annotation says, as a Python user names it."""
    names: list[str] = []
    for option in _options(annotation):
        origin, args = typing.get_origin(option), typing.get_args(option)
        kind = origin or option
        if origin is Literal:
            names += map(repr, args)
        elif option is bool:
            names.append("True or False")
        elif option is None or option is type(None):
            names.append("None")
        elif origin is tuple and args[-1] is Ellipsis:
            names.append("a tuple" if args[0] is Any else f"a tuple of {getattr(args[0], '__name__', args[0])}")
        else:
            name = getattr(kind, "__name__", str(kind))
            names.append(f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}")
    return " or ".join(names)


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
