"""The recipe: all settings that determine a result, as a dataclass that is also read from YAML files and flags.

A recipe is parsed in two phases. First, fields annotated with a base class (method, decode, labels, a method's
adjoint) are choices, and their names are replaced by the chosen values. Then tyro parses the fields of these values.
``--help`` therefore shows only the fields of the chosen values. YAML and flags go through the same validation.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import io
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, cast

import tyro
import yaml

from condense import catalog, registry
from condense.compute import Compute
from condense.files import canonical_json, expanded
from condense.inner import ADJOINTS, Adjoint
from condense.method import Method, Optim
from condense.names import speaks_flags, spelt, suggest
from condense.objective import ObjectiveName
from condense.plugins import Registry
from condense.rng import check_seed
from condense.schedule import nested
from condense.schema import Checked, mismatch
from condense.synthetic.budget import Unit, in_words
from condense.synthetic.decode import DECODERS, Decode, Pixels
from condense.synthetic.labels import LABELS, Hard, Labels
from condense.synthetic.teaching import ViewLabels
from condense.task import IpcPolicy, Split

T = TypeVar("T")

CHOICES: dict[type, Registry[type[Any]]] = {Decode: DECODERS, Labels: LABELS, ViewLabels: LABELS, Adjoint: ADJOINTS}
"""Registry of each kind of choice, by base class. The method is not in it."""


USUAL_IPC = 10
"""The budget of a recipe that gives none."""

BUDGETS = ("ipc", "fraction")
"""The fields of a recipe that give its budget, of which one is set."""


LEFT_OUT = ("graph", "tf32")
"""Fields of ``compute`` that recipes leave out where they are unset: absent from those, and hashes, of earlier
versions."""


@dataclass(frozen=True, kw_only=True)
class Recipe(Checked):
    """All settings that determine a result. They are hashed and stored in every file of the run."""

    method: Method
    """Method and its hyper-parameters."""
    dataset: str = "digits"
    """Name of a data set, or path of an .npz file or an image folder."""
    fingerprint: str | None = None
    """Fingerprint that the training data must have; unset allows any data."""
    transform: str = "channel"
    """Transform of the images: none, channel, zca (absolute regulariser) or zca-relative."""
    split: Split = Split()
    """Validation split of the training data."""
    network: str = "auto"
    """Network to distil with, e.g. convnet:depth=3,norm=batch. auto selects the ConvNet for the kind of data and
    takes the same options."""
    ipc: int | None = None
    """Budget of the set in images per class; 10 unless a fraction is given."""
    fraction: float | None = None
    """Budget of a selection as a fraction of the training images of each class, at least one of each; given in place of
    ipc."""
    budget: Unit = "floats"
    """Unit of the budget. floats: the stored samples have at most as many floats as ipc images of each class. bits: the
    whole set, with labels and decoder, takes at most the bits of such images and their labels, at 32 bits a float."""
    ipc_policy: IpcPolicy = "refuse"
    """What happens where a class has fewer real images than ipc: refuse, all (a selection takes all it has, so that the
    set has fewer of it) or repeat (the images that a method starts from are repeated)."""
    augment: str = "dsa"
    """Augmentation: none, dsa (the default strategy of the data set) or a strategy, with options as in
    dsa:mode=M,align_corners=true."""
    decode: Decode = Pixels()
    """Decoder from stored latents to images."""
    labels: Labels = Hard()
    """Kind of labels of the images."""
    objective: ObjectiveName = "cross-entropy"
    """Training loss of the networks of the method and of the networks trained on the set. mse and cosine also take
    targets that are not probabilities."""
    compute: Compute = Compute()
    """Numerical precision and speed."""
    seed: int = 0
    """Seed of all random numbers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ipc is not None and self.fraction is not None:
            raise ValueError(
                f"{spelt('ipc', self.ipc)} and {spelt('fraction', self.fraction)} are two budgets; give one of them"
            )
        if self.fraction is not None and self.budget != "floats":
            raise ValueError(
                f"{spelt('budget', self.budget)} is for a budget in images per class, and a fraction counts real "
                "images; leave it out"
            )
        if self.fraction is not None and self.ipc_policy != "refuse":
            raise ValueError(
                f"{spelt('ipc_policy', self.ipc_policy)} is for a budget in images per class, and a fraction never "
                "needs more images than there are; leave it out"
            )
        if self.ipc is None and self.fraction is None:
            object.__setattr__(self, "ipc", USUAL_IPC)
        if self.ipc is not None and self.ipc < 1:
            raise ValueError(f"ipc must be at least 1, got {self.ipc}; give {spelt('ipc', 10)}")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(
                f"fraction must be above 0 and at most 1, got {self.fraction}; give {spelt('fraction', 0.3)}"
            )
        check_seed(self.seed)

    @property
    def budget_in_words(self) -> str:
        """The budget in words: ``ipc 10``, ``ipc 10 in bits`` or ``fraction 0.3``."""
        return in_words(self.ipc, self.fraction, self.budget)

    def hash(self, dataset: str, **inputs: Any) -> str:
        """Return the SHA-256 of all fields, with the fingerprint ``dataset`` in place of the name or path of the data.

        ``inputs`` are further JSON values that determine the result: the identity of the network and the artifacts
        that the method reads.
        """
        fields = to_mapping(self) | {"dataset": dataset} | inputs
        del fields["fingerprint"]
        return hashlib.sha256(canonical_json(fields).encode()).hexdigest()


def to_mapping(value: Any) -> Any:
    """Convert a recipe to nested dicts of plain values. A choice becomes a dict with the key ``name``."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return list(value) if isinstance(value, tuple) else value
    if isinstance(value, Optim):
        return value.content()
    fields = {f.name: to_mapping(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Recipe) and value.objective == "cross-entropy":
        del fields["objective"]  # absent from recipes, and hashes, of earlier versions
    if isinstance(value, Recipe):
        del fields["fraction" if value.fraction is None else "ipc"]
        for name, default in (("budget", "floats"), ("ipc_policy", "refuse")):
            if fields[name] == default:
                del fields[name]  # absent from recipes, and hashes, of earlier versions
    if isinstance(value, Compute):
        fields = {name: entry for name, entry in fields.items() if entry is not None or name not in LEFT_OUT}
    if isinstance(value, Method):
        for field in dataclasses.fields(value):
            optim = getattr(value, field.name)
            if isinstance(optim, Optim) and isinstance(field.default, Optim) and optim.beta2 != field.default.beta2:
                fields[field.name]["beta2"] = optim.beta2  # what is absent is read as the default of the method
        defaults = {name: to_mapping(type(value).__dataclass_fields__[name].default) for name in value.added_fields}
        fields = {key: entry for key, entry in fields.items() if key not in defaults or entry != defaults[key]}
        return {"name": registry.name_of(value), **fields}
    for base, options in CHOICES.items():
        if isinstance(value, base):
            return {"name": _listed(type(value), options), **fields}
    return fields


def _listed(cls: type, options: Registry[type[Any]]) -> str:
    """Return the registered name of a choice. Raises ValueError if it has none, since a file could not refer to it."""
    name = options.name_of(cls)
    if name is None:
        raise ValueError(
            f"{cls.__module__}.{cls.__name__} has no name to store in a file: it is no {options.kind} of Condense or "
            f"of an installed package; register it in the entry-point group {options.group}"
        )
    return name


def choice(field: str, value: Any) -> Any:
    """Return the default value of a choice given by name (``decode="factor"``), and any other value unchanged.

    Raises:
        ValueError: unknown name.
    """
    tables: dict[str, Registry[type[Any]]] = {"decode": DECODERS, "labels": LABELS, "adjoint": ADJOINTS}
    options = tables.get(field)
    if options is None or not isinstance(value, str):
        return value
    if value not in options:
        raise ValueError(f"unknown {field} {value!r}: {suggest(value, options)}")
    return options[value]()


def to_yaml(recipe: Recipe) -> str:
    """Write a recipe as YAML. Raises ValueError if a field holds a value that YAML cannot store."""
    try:
        return yaml.safe_dump(to_mapping(recipe), sort_keys=False)
    except yaml.representer.RepresenterError as error:
        raise ValueError(f"a field holds a {type(error.args[-1]).__name__}, which YAML cannot store") from error


def from_mapping(mapping: Mapping[str, Any], source: str) -> Recipe:
    """Build a recipe from nested dicts. Missing fields have the defaults of the method's class.

    Raises:
        ValueError: unknown key, wrong type or value out of range; the message starts with ``source``.
    """
    try:
        method = mapping.get("method")
        name = method.get("name") if isinstance(method, Mapping) else method
        if not isinstance(name, str):
            raise ValueError("it names no method; start it with `method: {name: dm}`")
        base = Recipe(method=registry.load(name)())
        mapping = {**mapping, "method": _with_schedules(method, base.method)}
        _check(mapping, base, "")
        return parse(tyro.conf.FlagConversionOff[Recipe], list(_flags(mapping)), base)
    except ValueError as error:
        line = str(error) if speaks_flags() else _of_fields(str(error))
        raise ValueError(f"recipe {source}: {line}") from error


def _with_schedules(fields: Any, method: Method) -> Any:
    """Return the fields of a method with the schedule of each optimiser as a nested field (see ``schedule.nested``)."""
    if not isinstance(fields, Mapping):
        return fields
    optims = {name for name, value in vars(method).items() if isinstance(value, Optim)}
    return {
        key: nested(value) if isinstance(value, Mapping) and str(key).replace("-", "_") in optims else value
        for key, value in fields.items()
    }


def from_yaml(path: Path, dataset: str | None = None, ipc: int | None = None) -> Recipe:
    """Read a recipe file.

    If the file has a table, the recipe nearest to a data set and a budget is returned. By default these are the data
    set and the budget above the table.

    Raises:
        ValueError: see ``condense.catalog.read`` and ``from_mapping``.
    """
    return _of_file(path, dataset, ipc).recipe


def named(name: str) -> Recipe:
    """Return the recipe with a name such as ``mtt`` or ``mtt-cifar10-ipc10``, from any installed package.

    Raises:
        ValueError: there is no such recipe, or it is not valid.
    """
    entry = catalog.named(name)
    if entry is None:
        raise ValueError(f"unknown recipe {name!r}: {suggest(name, catalog.recipes(), '`condense list recipes`')}")
    return from_mapping(entry.fields, name)


class Resolved(NamedTuple):
    """A recipe and where it comes from."""

    recipe: Recipe
    name: str
    """Name of the recipe or path of its file; ``the defaults of the method`` if there is no recipe."""
    source: str
    """Publication, and where individual values come from; empty if unknown."""


def find(name: str, dataset: str | None = None, ipc: int | None = None) -> Resolved:
    """Return the recipe for the name of a method, the name of a recipe, or the path of a recipe file.

    Args:
        name: ``mtt``, ``mtt-cifar10-ipc10``, ``mine.yaml``, or the import path of a method.
        dataset: name of the data set. None selects the recipe for any data set, or the data set named by the file.
        ipc: images per class; the recipe with the nearest published budget is returned.

    Raises:
        ValueError: there is no such method or recipe, or the recipe is not valid.
    """
    if name.endswith((".yaml", ".yml")):
        return _of_file(expanded(name), dataset, ipc)._replace(name=name)
    entry = catalog.published(name, dataset, ipc or USUAL_IPC) or catalog.named(name)
    if entry is not None:
        return Resolved(from_mapping(entry.fields, entry.name), entry.name, entry.source)
    methods = registry.METHODS
    if name in methods or ":" in name:
        return Resolved(Recipe(method=registry.load(name)()), "the defaults of the method", "")
    raise ValueError(f"unknown method or recipe {name!r}: {suggest(name, methods)}")


def _of_file(path: Path, dataset: str | None, ipc: int | None) -> Resolved:
    shared, *rows = catalog.read(path)
    base = from_mapping(shared.fields, str(path))
    budget = ipc or base.ipc or USUAL_IPC
    entry = catalog.nearest([shared, *rows], dataset or base.dataset, budget) if rows else None
    if entry is None or entry is shared:
        return Resolved(base, str(path), shared.source)
    return Resolved(from_mapping(entry.fields, f"{path}, {entry.name}"), str(path), entry.source)


def parse(kind: Any, argv: Sequence[str], default: T, prog: str | None = None, description: str = "") -> T:
    """Apply the flags of ``argv`` to ``default``: first the choices, then all other fields with tyro.

    Args:
        kind: type of ``default``, with tyro's markers.
        argv: the flags. ``--help`` prints the help and exits.
        default: the value that the flags change.
        prog: the command shown in the help.
        description: the help text above the flags.

    Raises:
        ValueError: unknown flag (the message suggests similar ones), wrong type or value out of range; one line.
    """
    argv, default = _choose(list(argv), default, "")
    output = io.StringIO()
    if "--help" in argv or "-h" in argv:
        kind, default = _with_choices(kind, default)
    try:
        with contextlib.redirect_stderr(output):
            return tyro.cli(
                kind,
                args=argv,
                default=default,
                prog=prog,
                description=description,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as leave:
        if leave.code in (0, None):
            raise
        raise ValueError(_one_line(output.getvalue())) from None


def _choose(argv: list[str], value: Any, path: str) -> tuple[list[str], Any]:
    """Remove the flags that name a choice from ``argv``, and set the chosen defaults in ``value``."""
    hints = typing.get_type_hints(type(value))
    if isinstance(value, Recipe):
        given = [name for name in BUDGETS if take(argv, f"--{path}{name}")[1] is not None]
        if len(given) == 1:
            argv = [*argv, *(f"--{path}{name}=None" for name in BUDGETS if name not in given)]
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        current, flag = getattr(value, field.name), f"{path}{field.name}".replace("_", "-")
        if hints[field.name] in CHOICES:
            argv, name = take(argv, f"--{flag}")
            if name is not None:
                chosen, base = choice(field.name, name), hints[field.name]
                if not isinstance(chosen, base):
                    raise ValueError(f"--{flag} takes one of {', '.join(offered(base))}, not {name}; give one of these")
                current = current if type(current) is type(chosen) else chosen
        if dataclasses.is_dataclass(current):
            argv, current = _choose(argv, current, _nested(path, field.name))
        if current is not getattr(value, field.name):
            changes[field.name] = current
    return argv, dataclasses.replace(value, **changes) if changes else value


def _with_choices(kind: Any, default: Any) -> tuple[Any, Any]:
    """Add a field for each nested choice to a type and its default, so that the help lists choices like other flags."""
    fields: dict[str, Any] = {}
    values: dict[str, str] = {}
    for flag, base, chosen in _choices(default):
        options = offered(base)
        names = cast(Any, Literal)[tuple(options)]
        summaries = "\n".join(f"{name}: {(cls.__doc__ or '').strip().splitlines()[0]}" for name, cls in options.items())
        field = f"choice{len(fields)}"
        fields[field] = Annotated[names, tyro.conf.arg(name=flag, help=summaries)]
        values[field] = chosen
    choices = dataclasses.make_dataclass("Choices", fields.items(), kw_only=True, frozen=True)
    flat = tyro.conf.arg(name="")
    parts = [("command", Annotated[kind, flat]), ("choices", Annotated[choices, flat])]
    whole = dataclasses.make_dataclass("Command", parts, kw_only=True, frozen=True)
    return whole, whole(command=default, choices=choices(**values))


def offered(base: type) -> dict[str, type[Any]]:
    """Return the options, by name, of a field annotated with a base class of ``CHOICES``.

    Only a finished set is labelled by view, so ``ViewLabels`` are options of no field annotated with ``Labels``.
    """
    usable = CHOICES[base].usable()
    return {name: cls for name, cls in usable.items() if issubclass(cls, ViewLabels) == (base is ViewLabels)}


def _choices(value: Any, path: str = "") -> Iterator[tuple[str, type, str]]:
    """Yield flag, base class and chosen option of each choice nested in ``value``."""
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        current, flag = getattr(value, field.name), f"{path}{field.name}".replace("_", "-")
        base = hints[field.name]
        if base in CHOICES:
            yield flag, base, _listed(type(current), CHOICES[base])
        if dataclasses.is_dataclass(current):
            yield from _choices(current, _nested(path, field.name))


def _nested(path: str, name: str) -> str:
    """Return the prefix of the flags of a nested field. ``recipe`` and ``options`` of a command add no prefix."""
    return "" if path == "" and name in ("recipe", "options") else f"{path}{name}."


def take(argv: list[str], flag: str) -> tuple[list[str], str | None]:
    """Remove all ``flag VALUE`` and ``flag=VALUE`` from ``argv``; return the rest and the last value, or None."""
    rest, value, items = [], None, iter(argv)
    for item in items:
        if item == flag:
            value = next(items, "")
        elif item.startswith(flag + "="):
            value = item.removeprefix(flag + "=")
        else:
            rest.append(item)
    return rest, value


def _check(mapping: Mapping[Any, Any], value: Any, path: str) -> None:
    """Raise ValueError for YAML values that a recipe cannot hold, before they are converted to flags."""
    hints = typing.get_type_hints(type(value))
    for key, item in mapping.items():
        field, where = str(key).replace("-", "_"), f"{path}{key}"
        if field not in (known := [f.name for f in dataclasses.fields(value)]):
            raise ValueError(f"unknown field {where!r}: {suggest(str(key), known)}")
        current, chosen = getattr(value, field), hints[field] in (Method, *CHOICES)
        if not dataclasses.is_dataclass(current):
            if isinstance(item, list) and not _is_sequence(hints[field]):
                raise ValueError(f"{where} is a list where one value is expected; give one value")
            for one in item if isinstance(item, list) else [item]:
                _check_plain(one, hints[field], where)
        elif isinstance(item, Mapping):
            content = dict(item)
            name = content.pop("name", None) if chosen else None
            if name is not None and field != "method":
                current = _named(field, name, current, where)
            _check(content, current, f"{where}.")
        elif not chosen:
            raise ValueError(f"{where} is a mapping of fields, not {item!r}; write {where}: {{field: value}}")
        elif field != "method":
            _named(field, item, current, where)


def _named(field: str, name: Any, current: Any, where: str) -> Any:
    """Return ``current``, or the default value of the named choice if it has another type."""
    if not isinstance(name, str):
        raise ValueError(f"{where} is {name!r} where the name of a choice is expected; give a name")
    chosen = choice(field, name)
    return current if type(current) is type(chosen) else chosen


def _is_sequence(annotation: Any) -> bool:
    """Whether an annotation is that of a sequence, or a union with one."""
    return any(typing.get_origin(part) in (tuple, list) for part in (annotation, *typing.get_args(annotation)))


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
    """Yield the flags that are equivalent to a nested mapping."""
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
    """Convert an error that tyro prints in a frame to one line: the error, and similar flags that the user may mean.

    The frame has a title and sections separated by rules. The first section is the error. On a terminal without box
    characters a line of dashes follows the title.
    """
    sections: list[list[str]] = [[]]
    for line in box.splitlines():
        text = line.strip("│ \t")
        if text.startswith(("╭", "╰")) or not text.strip("─-"):
            sections.append([])
        else:
            sections[-1].append(text)
    sections = [section for section in sections if section]
    if "╭" not in box and len(sections) > 1:
        del sections[0]
    complaint = " ".join(sections[0]) if sections else "the flags cannot be read"
    usages = [line for section in sections[1:] for line in section if line.startswith("--")]
    if (of_class := re.match(r"Error parsing [A-Za-z][\w.]*: (.*)", complaint)) is not None:
        return of_class[1]  # a message of this package, which names the flag and the remedy
    near = list(dict.fromkeys(usage.split()[0] for usage in usages))[:3] if "Unrecognized" in complaint else []
    advice = f": did you mean {' or '.join(near)}?" if near else ";"
    return f"{_in_words(complaint, usages)}{advice} --help lists the flags"


def _in_words(complaint: str, usages: Sequence[str]) -> str:
    """Rewrite an error of tyro as this package writes its own. An error of an unknown form is returned unchanged.

    Args:
        complaint: the error.
        usages: the lines of tyro's help that begin with a flag, e.g. ``--ipc INT``.
    """
    if found := re.fullmatch(r"Unrecognized options: (.*)", complaint):
        words = found[1].split(", ")
        unknown = [word for word in words if word.startswith("-")]
        return f"unknown flag {' and '.join(unknown)}" if unknown else f"unexpected {' '.join(words)!r}"
    if found := re.match(r"Missing value for argument '(\S+)'", complaint):
        return f"{found[1]} needs a value"
    if found := re.fullmatch(r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*)\)\.", complaint):
        value, flag, choices = found[1], found[2], re.findall(r"[^', ]+", found[3])
        return f"{flag} does not take {value!r}: {suggest(value, choices)}"
    if found := re.fullmatch(r"Error parsing (\S+): .*?(?:: |from )(\[.*\]|'.*'|\".*\")\.?", complaint):
        flag, given = found[1], ast.literal_eval(found[2])
        takes = next((_values(*usage.split(maxsplit=1)[1:]) for usage in usages if usage.split()[0] == flag), "")
        if takes:
            return f"{flag} takes {takes}, not {' '.join(given) if isinstance(given, list) else given!r}"
    return complaint


def _values(metavar: str = "") -> str:
    """Return in words what a flag takes, from tyro's notation of it; empty if these are not numbers."""
    number = "whole number" if "INT" in metavar else "number" if "FLOAT" in metavar else ""
    if not number:
        return ""
    if metavar.startswith("["):
        return f"pairs of {number}s" if re.match(r"\[(\w+) \1", metavar) else f"{number}s"
    return f"None or a {number}" if "None" in metavar else f"a {number}"


def _of_fields(line: str) -> str:
    """Rewrite an error of ``parse`` for a user who wrote fields, not flags."""
    complaint = re.split(r": did you mean --|; --help lists the flags", line)[0]
    return re.sub(r"(?<!')--([a-z][\w.-]*)", lambda flag: flag[1].replace("-", "_"), complaint)
