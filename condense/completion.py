"""``condense completion``: a script for a shell that completes commands, names and flags. tyro writes it.

The flags of a command are collected from the dataclass that it parses, without their help, which would make the script
much longer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import operator
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from condense.names import suggest
from condense.recipe import CHOICES, offered

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class Completed:
    """What is completed after a word: other words with what follows them, or flags."""

    flags: Any = None
    """Dataclass whose fields are the flags."""
    choices: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Further flags and their choices."""
    words: Mapping[str, Completed] = dataclasses.field(default_factory=dict)


def script(shell: str, commands: Completed) -> str:
    """Return the script for a shell.

    Raises:
        ValueError: the shell is unknown, or the installed tyro does not know it.
    """
    if shell not in SHELLS:
        raise ValueError(f"unknown shell {shell!r}: {suggest(shell, SHELLS)}")
    written, complaint = io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(written):
            tyro.cli(
                _type_of("condense", commands),
                prog="condense",
                args=["--tyro-print-completion", shell],
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as leave:
        complaint = str(leave.code or "")
    except AssertionError as error:
        complaint = str(error)
    if complaint:
        raise ValueError(f"the installed tyro has no completion for {shell}; run: pip install --upgrade tyro")
    return _completing_paths(shell, written.getvalue())


def _completing_paths(shell: str, script: str) -> str:
    """Return a script of tyro that completes paths where nothing else fits."""
    if shell == "bash":
        return script + "complete -o default -F _tyro_condense condense\n"
    if shell == "zsh":
        return script + "(( compstate[nmatches] )) || _files\n"
    argument, piped = '($python_cmd -c "$pycode" ', '(printf %s "$pycode" | $python_cmd - '  # Linux limits arguments
    word = '"^"(string escape --style=regex -- (commandline -ct))'
    files, none_too = 'if test "$results" =', f'if not string match -qr -- {word} $results; or test "$results" ='
    return script.replace(argument, piped).replace(files, none_too)


def _type_of(name: str, completed: Completed) -> Any:
    """Return a dataclass whose fields are flags, or one whose field is a choice of words."""
    fields: list[Any] = []
    if completed.words:
        options = tuple(
            Annotated[_type_of(f"{name} {word}", after), tyro.conf.subcommand(word, prefix_name=False)]
            for word, after in completed.words.items()
        )
        fields.append(("word", Annotated[functools.reduce(operator.or_, options), tyro.conf.arg(name="")]))
    flags = {} if completed.flags is None else dict(_flags(completed.flags))
    flags |= {flag: Literal[names] for flag, names in completed.choices.items()}
    for number, (flag, kind) in enumerate(sorted(flags.items())):
        fields.append((f"flag{number}", Annotated[kind, tyro.conf.arg(name=flag, help="", help_behavior_hint="")]))
    return dataclasses.make_dataclass("".join(c if c.isalnum() else "_" for c in name), fields)


def _flags(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the flags of a dataclass without their dashes, and what they take: choices, or any text."""
    hints = typing.get_type_hints(type(value), include_extras=True)
    for field in dataclasses.fields(value):
        current, flag = getattr(value, field.name), f"{prefix}{field.name}".replace("_", "-")
        hint = hints[field.name]
        plain, *marks = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        if plain in CHOICES:
            yield flag, Literal[tuple(offered(plain))]
        if dataclasses.is_dataclass(current):
            is_flat = any(getattr(mark, "name", None) == "" for mark in marks)
            yield from _flags(current, prefix if is_flat else f"{flag}.")
        elif plain is bool:
            yield flag, Literal["True", "False"]
        elif plain not in CHOICES:
            yield flag, plain if typing.get_origin(plain) is Literal else str
