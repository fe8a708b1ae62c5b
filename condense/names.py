"""Names and texts as people are shown them, and how a user writes the one that mends an error."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar

_as_flags: ContextVar[bool] = ContextVar("as_flags", default=False)


def printable(text: str, longest: int | None = None) -> str:
    """Text as a terminal may show it: what is not printable is escaped, what is beyond ``longest`` characters left out.

    File names, and names in files that others wrote, may hold sequences that move the cursor or change colours."""
    if longest is not None and len(text) > longest:
        text = text[: longest - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def excerpt(value: object, longest: int = 200) -> str:
    """``str(value)`` for a message: on one line, printable, at most ``longest`` characters."""
    return printable(" ".join(str(value).split()), longest)


def reason(error: BaseException) -> str:
    """What an error says, as an ``excerpt``; its type where it says nothing."""
    return excerpt(error) or type(error).__name__


def suggest(name: str, known: Iterable[str], listing: str | None = None) -> str:
    """The end of an error line: the nearest known name, and all of them, or what lists them where they are too many."""
    known = list(known)
    near = difflib.get_close_matches(name.lower(), known, n=1)
    rest = f"{listing} lists them" if listing else "there are " + ", ".join(known)
    return (f"did you mean {near[0]!r}? " if near else "") + rest


@contextlib.contextmanager
def flags() -> Iterator[None]:
    """Inside, ``spelt`` spells fields as flags: the command line speaks."""
    token = _as_flags.set(True)
    try:
        yield
    finally:
        _as_flags.reset(token)


def speaks_flags() -> bool:
    """Whether the user reads flags."""
    return _as_flags.get()


def spelt(field: str, value: object = ..., kind: str = "") -> str:
    """How the user writes a field: on the command line ``--split.val-fraction 0.1``, in Python
    ``split=Split(val_fraction=0.1)``.

    Args:
        field: as the command line nests it, ``method.num_steps``; fields of the method are keywords of their own in
            Python.
        value: left out where the message leaves it to the user.
        kind: the class of the outer field, where it is not the field's name in upper case: ``RandomTruncated``.
    """
    if speaks_flags():
        words = value if isinstance(value, tuple) else () if value is ... else (value,)
        return " ".join([f"--{field.replace('_', '-')}", *map(str, words)])
    *outer, name = field.removeprefix("method.").split(".")
    given = f"{name}={value!r}" if value is not ... else f"{name}=..." if outer else name
    for part in reversed(outer):
        given = f"{part}={kind or part.capitalize()}({given})"
    return given
