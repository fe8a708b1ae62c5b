"""Check values against type annotations: the content of JSON files, and fields that are passed in Python.

Both use the same check, so that the error messages are the same.
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
    """Return why ``value`` is not of the annotated type, as "VALUE is not EXPECTED", or None if it is.

    An ``int`` is accepted as a ``float``; a ``bool`` as neither. A ``float`` may be infinite but not NaN. Tuples,
    sequences and mappings are checked element by element, dataclasses and all other classes by ``isinstance``.
    """
    if annotation is Any or annotation is dataclasses.MISSING:
        return None
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return mismatch(value, args[0])
    if origin in (Union, types.UnionType):
        if type(value) in args and type(value) is not float:
            return None  # before the value, which may be large, is described for the lines of the other options
        lines = [line for option in args if (line := mismatch(value, option)) is not None]
        if len(lines) < len(args):
            return None
        of_value = f"{brief(value)} is not "
        return next((line for line in lines if not line.startswith(of_value)), _not(value, annotation))
    if origin is Literal:
        # compare types too, since `True == 1`
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
        return None  # a type variable or an alias, which cannot be checked at run time
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
    """Base class of dataclasses whose fields are checked against their annotations on construction.

    Equivalent values are converted: NumPy numbers, a list to a tuple, an ``int`` to a ``float``, a string to a
    ``Path``, a ``torch.device`` to its name. A subclass that defines ``__post_init__`` must call this one first.

    Raises:
        ValueError: a field has a value of another type.
    """

    def __post_init__(self) -> None:
        hints = hints_of(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            given = getattr(self, field.name)
            value = accepted(given, hints[field.name], type(self).__name__, field.name)
            if value is not given:
                object.__setattr__(self, field.name, value)


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function so that its arguments are converted and checked as in ``Checked``, except ``**fields``."""
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
    """Return ``value`` converted to the annotated type.

    Args:
        owner, name: the class or function and its field, for the message.

    Raises:
        ValueError: ``value`` is of another type.
    """
    value = _as_meant(value, annotation)
    line = mismatch(value, annotation)
    if line is None:
        return value
    text, wanted = brief(value), _in_python(annotation)
    if isinstance(value, str) and typing.get_origin(annotation) is Literal:
        raise ValueError(f"{owner}: {name}={text} is unknown: {suggest(value, typing.get_args(annotation))}")
    reason = line.removeprefix(text) if line.startswith(text) else f": {line}"
    fix = "one of them" if reason.endswith(f"is not {wanted}") else wanted
    raise ValueError(f"{owner}: {name}={text}{reason}; give {fix}")


def replaced(value: D, fields: Mapping[str, Any], others: Iterable[str] = ()) -> D:
    """Call ``dataclasses.replace`` with a helpful error for unknown fields.

    Args:
        value: a dataclass.
        fields: new values by field name.
        others: further names to suggest for an unknown field.

    Raises:
        ValueError: unknown field (the message suggests a similar name), or a value that the constructor refuses.
    """
    names = [f.name for f in dataclasses.fields(value)]
    for name in fields:
        if name not in names:
            raise ValueError(f"{type(value).__name__} has no field {name!r}: {suggest(name, [*names, *others])}")
    return dataclasses.replace(value, **fields)


def from_json(kind: type[T], value: Any, where: str) -> T:
    """Build a dataclass from a JSON mapping. Unknown keys are ignored, and lists are converted to tuples.

    Args:
        kind: a dataclass, whose fields may be dataclasses too.
        value: the result of ``json.loads``.
        where: the file and the position in it, for the message.

    Raises:
        ValueError: not a mapping; missing field without default; wrong type; the constructor refuses a value.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: {_not(value, Mapping)}")
    hints, values = hints_of(kind), {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in value:
            values[field.name] = _converted(value[field.name], hints[field.name], f"{where}, {field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}: the field {field.name!r} is missing")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def brief(value: Any) -> str:
    """Return ``repr(value)`` for a message: one line, printable, at most 60 characters."""
    try:
        return excerpt(repr(value), 60)
    except Exception:  # the repr of any class may fail
        return type(value).__name__


def _hints_of_class(kind: type) -> dict[str, Any]:
    """Return the resolved annotations of a dataclass by field name.

    They are ``Any`` for a class whose annotations use names that are imported only for type checking.
    """
    hints: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        try:
            hints |= inspect.get_annotations(base, eval_str=True)
        except NameError:
            hints |= dict.fromkeys(inspect.get_annotations(base), Any)
    return hints


hints_of: Callable[[type], dict[str, Any]] = functools.cache(_hints_of_class)


def _as_meant(value: Any, annotation: Any) -> Any:
    options = _options(annotation)
    if Any in options:
        return value
    if type(value) not in (int, float, bool, str) and getattr(value, "shape", None) == () and hasattr(value, "item"):
        plain = value.item()  # NumPy and torch scalars
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
    """Return the members of a union, or the annotation itself as the only member."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _options(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return tuple(option for part in typing.get_args(annotation) for option in _options(part))
    return (annotation,)


def _in_python(annotation: Any) -> str:
    """Return an annotation in Python terms, for the advice of an error."""
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
    """Convert mappings and lists in ``value`` to dataclasses and tuples as annotated."""
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
    """Return whether values of this type are converted from a JSON mapping or list."""
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
    """Return an annotation in words."""
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
