"""The recipe: everything that decides a result, as one typed value that is also a YAML file and a set of flags.

A recipe is read in two phases. Fields annotated with a base class (method, decode, labels, a method's adjoint)
are choices: their value is a name, swapped in first. Then tyro parses the numbers of what was chosen, so that
``--help`` shows these fields only, and YAML and command line go through the same validation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from condense import registry
from condense.compute import Compute
from condense.files import canonical_json, read_yaml
from condense.inner import ADJOINTS, Adjoint
from condense.method import Method
from condense.names import speaks_flags, spelt, suggest
from condense.objective import ObjectiveName
from condense.rng import check_seed
from condense.schema import Checked, mismatch
from condense.synthetic.decode import DECODERS, Decode, Pixels
from condense.synthetic.labels import LABELS, Hard, Labels
from condense.task import Split

T = TypeVar("T")

CHOICES: dict[type, Mapping[str, type]] = {Decode: DECODERS, Labels: LABELS, Adjoint: ADJOINTS}
"""Base class -> name -> class, for every kind of choice but the method itself."""


@dataclass(frozen=True, kw_only=True)
class Recipe(Checked):
    """What decides a result; hashed, and stored in every file made from it."""

    method: Method
    """The method and its hyper-parameters."""
    dataset: str = "digits"
    """Name of a data set, an .npz file or an image folder."""
    fingerprint: str | None = None
    """Of the training data, which have to be these and no others; unset: any."""
    transform: str = "channel"
    """none, channel, zca (absolute regulariser) or zca-relative."""
    split: Split = Split()
    """The validation part of the training data."""
    network: str = "convnet"
    """Network to distil with, e.g. convnet:depth=3,norm=batch."""
    ipc: int = 10
    """Images per class: the budget of stored images."""
    augment: str = "dsa"
    """none, dsa (the data set's own strategy) or a strategy; options as in dsa:mode=M,align_corners=true."""
    decode: Decode = Pixels()
    """How stored latents become images."""
    labels: Labels = Hard()
    """What the images are trained towards."""
    objective: ObjectiveName = "cross-entropy"
    """What the networks of the method, and those that its sets train, are trained towards; mse and cosine take targets
    that are no probabilities."""
    compute: Compute = Compute()
    """Exactness against speed."""
    seed: int = 0
    """Root of every random draw."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ipc < 1:
            raise ValueError(f"ipc must be at least 1, got {self.ipc}; give {spelt('ipc', 10)}")
        check_seed(self.seed)

    def hash(self, dataset: str, **inputs: Any) -> str:
        """Of all fields; ``dataset`` (a fingerprint) stands for the data wherever they lie. ``inputs`` are JSON values
        that decide the result too: the identity of the network, what the method reads from disk."""
        fields = to_mapping(self) | {"dataset": dataset} | inputs
        del fields["fingerprint"]
        return hashlib.sha256(canonical_json(fields).encode()).hexdigest()


def to_mapping(value: Any) -> Any:
    """Nested dicts of plain values; a choice becomes a dict with its ``name``."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return list(value) if isinstance(value, tuple) else value
    fields = {f.name: to_mapping(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Recipe) and value.objective == "cross-entropy":
        del fields["objective"]  # which recipes of earlier versions, and their hashes, do not have
    if isinstance(value, Method):
        return {"name": registry.name_of(value), **fields}
    for base, options in CHOICES.items():
        if isinstance(value, base):
            return {"name": next(name for name, cls in options.items() if cls is type(value)), **fields}
    return fields


def choice(field: str, value: Any) -> Any:
    """The default of a choice given by its name in Python (``decode="factor"``); any other value as it is.

    Raises:
        ValueError: a name that is not known.
    """
    tables: dict[str, Mapping[str, type]] = {"decode": DECODERS, "labels": LABELS, "adjoint": ADJOINTS}
    options = tables.get(field)
    if options is None or not isinstance(value, str):
        return value
    if value not in options:
        raise ValueError(f"unknown {field} {value!r}: {suggest(value, options)}")
    return options[value]()


def to_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(to_mapping(recipe), sort_keys=False)


def from_mapping(mapping: Mapping[str, Any], source: str) -> Recipe:
    """A recipe from nested dicts, over the defaults of the method's class.

    Raises:
        ValueError: unknown key, wrong type, value out of range; prefixed with ``source``.
    """
    try:
        method = mapping.get("method")
        name = method.get("name") if isinstance(method, Mapping) else method
        if not isinstance(name, str):
            raise ValueError("it names no method; begin it with `method: {name: dm}`")
        base = Recipe(method=registry.load(name)())
        _check(mapping, base, "")
        return parse(tyro.conf.FlagConversionOff[Recipe], list(_flags(mapping)), base)
    except ValueError as error:
        line = str(error) if speaks_flags() else _of_fields(str(error))
        raise ValueError(f"recipe {source}: {line}") from error


def from_yaml(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        ValueError: missing, not YAML, or see ``from_mapping``.
    """
    if not path.exists():
        raise ValueError(f"there is no recipe {path}; `condense list recipes` shows the built-in ones")
    try:
        content = read_yaml(path, mend="correct the file")
    except ValueError as error:
        raise ValueError(f"recipe {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"recipe {path} is not a mapping of fields; begin it with `method: {{name: dm}}`")
    return from_mapping(content, str(path))


def recipe_files() -> dict[str, Path]:
    """The built-in recipes: name -> file."""
    folder = Path(str(files("condense.methods.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def published(method: str, dataset: str, ipc: int) -> str | None:
    """The name of the built-in recipe of a method that is nearest to a data set and budget, if there is any.

    The same data set at the nearest IPC (by ratio) comes first, then the recipe for any data set.
    """
    known = recipe_files()
    prefix = f"{method}-{dataset}-ipc"
    budgets = [int(name.removeprefix(prefix)) for name in known if name.startswith(prefix)]
    if budgets:
        nearest = min(budgets, key=lambda k: (max(k, ipc) / min(k, ipc), k))
        return f"{prefix}{nearest}"
    return method if method in known else None


def parse(kind: Any, argv: Sequence[str], default: T, prog: str | None = None) -> T:
    """``default`` with the flags of ``argv``: choices first, then everything else by tyro.

    Raises:
        ValueError: one line for an unknown flag (with the nearest ones), a wrong type or a value out of range.
    """
    argv, default = _choose(list(argv), default, "")
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            return tyro.cli(
                kind,
                args=argv,
                default=default,
                prog=prog,
                description="; ".join(_choices(default)),
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as leave:
        if leave.code in (0, None):
            raise
        raise ValueError(_one_line(output.getvalue())) from None


def _choose(argv: list[str], value: Any, path: str) -> tuple[list[str], Any]:
    """Take the flags that name a choice out of ``argv`` and put the chosen defaults into ``value``."""
    hints = typing.get_type_hints(type(value))
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        current, flag = getattr(value, field.name), f"{path}{field.name}".replace("_", "-")
        if hints[field.name] in CHOICES:
            argv, name = take(argv, f"--{flag}")
            if name is not None:
                chosen = choice(field.name, name)
                current = current if type(current) is type(chosen) else chosen
        if dataclasses.is_dataclass(current):
            argv, current = _choose(argv, current, _nested(path, field.name))
        if current is not getattr(value, field.name):
            changes[field.name] = current
    return argv, dataclasses.replace(value, **changes) if changes else value


def _choices(value: Any, path: str = "") -> Iterator[str]:
    """For the help: every choice below ``value``, what it is and what else there is."""
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        current, flag = getattr(value, field.name), f"{path}{field.name}".replace("_", "-")
        options = CHOICES.get(hints[field.name])
        if options is not None:
            chosen = next(name for name, cls in options.items() if cls is type(current))
            yield f"--{flag} {{{','.join(options)}}} (default: {chosen})"
        if dataclasses.is_dataclass(current):
            yield from _choices(current, _nested(path, field.name))


def _nested(path: str, name: str) -> str:
    """The prefix of flags below a field; parts of a command stand at the top level."""
    return "" if path == "" and name in ("recipe", "options") else f"{path}{name}."


def take(argv: list[str], flag: str) -> tuple[list[str], str | None]:
    """Remove ``flag VALUE`` or ``flag=VALUE``; the last one counts."""
    kept, found, items = [], None, iter(argv)
    for item in items:
        if item == flag:
            found = next(items, "")
        elif item.startswith(flag + "="):
            found = item.removeprefix(flag + "=")
        else:
            kept.append(item)
    return kept, found


def _check(mapping: Mapping[Any, Any], value: Any, path: str) -> None:
    """Raise ValueError for what YAML can say and a recipe cannot, before it is spelt as flags."""
    hints = typing.get_type_hints(type(value))
    for key, item in mapping.items():
        field, where = str(key).replace("-", "_"), f"{path}{key}"
        if field not in (known := [f.name for f in dataclasses.fields(value)]):
            raise ValueError(f"unknown field {where!r}: {suggest(str(key), known)}")
        current, chosen = getattr(value, field), hints[field] in (Method, *CHOICES)
        if not dataclasses.is_dataclass(current):
            for one in item if isinstance(item, list) else [item]:
                _check_plain(one, hints[field], where)
        elif isinstance(item, Mapping):
            content = dict(item)
            name = content.pop("name", None) if chosen else None
            if name is not None and field != "method":
                current = _named(field, name, current, where)
            _check(content, current, f"{where}.")
        elif not chosen:
            raise ValueError(f"{where} holds fields of its own, not {item!r}; write {where}: {{field: value}}")
        elif field != "method":
            _named(field, item, current, where)


def _named(field: str, name: Any, current: Any, where: str) -> Any:
    """``current``, or what a choice is by default where another is named."""
    if not isinstance(name, str):
        raise ValueError(f"{where} is chosen by its name, which {name!r} is not")
    chosen = choice(field, name)
    return current if type(current) is type(chosen) else chosen


def _check_plain(item: Any, annotation: Any, where: str) -> None:
    if item is None and mismatch(None, annotation) is None:
        return
    if not isinstance(item, str | int | float):
        kind = "empty" if item is None else f"a {type(item).__name__}"
        raise ValueError(
            f"{where} is {kind} where a number, a text or a list of them is expected; put a text in quotes"
        )
    if isinstance(item, str) and item.startswith("-") and not re.match(r"-[\d.]", item):
        raise ValueError(f"{where} is {item!r}, which looks like a flag; give its value alone")


def _flags(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The command line that says what a nested mapping says."""
    for key, value in mapping.items():
        flag = f"{prefix}{key}".replace("_", "-")
        if isinstance(value, Mapping):
            nested = dict(value)
            name = nested.pop("name", None)
            if name is not None and flag != "method":
                yield f"--{flag}={name}"
            yield from _flags(nested, f"{prefix}{key}.")
        elif flag == "method":
            continue
        elif isinstance(value, list):
            yield from (f"--{flag}", *map(str, value))
        else:
            yield f"--{flag}={value}"


def _one_line(box: str) -> str:
    """What tyro prints in a frame, as one line: the complaint, and the nearest flags besides those it is about."""
    lines = [line.strip("│╭╮╰╯─ \t") for line in box.splitlines()]
    lines = [line for line in lines if line]
    ends = ("Perhaps", "Argument helptext", "For full", "--")
    end = next((i for i, line in enumerate(lines) if i and line.startswith(ends)), len(lines))
    complaint = " ".join(lines[1:end] or lines)
    given = re.findall(r"--[\w.-]*\w", complaint)
    near = [line.split()[0] for line in lines[end:] if line.startswith("--")]
    near = [flag for flag in dict.fromkeys(near) if flag not in given]
    advice = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"{complaint}{advice}; --help lists the flags"


def _of_fields(line: str) -> str:
    """A complaint of ``parse`` for somebody who wrote fields and no flags."""
    complaint = re.split(r"; (?:did you mean --|--help lists)", line)[0]
    return re.sub(r"--([a-z][\w.-]*)", lambda flag: flag[1].replace("-", "_"), complaint)
