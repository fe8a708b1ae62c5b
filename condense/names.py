"""Format names and texts for messages, and spell fields as the user writes them."""

import contextlib
import difflib
import shlex
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from importlib import metadata

_as_flags: ContextVar[bool] = ContextVar("as_flags", default=False)


def printable(text: str, longest: int | None = None) -> str:
    """Escape characters that are not printable, and cut the text after ``longest`` characters.

    File names, and names stored in files, may hold sequences that move the cursor or change colours."""
    if longest is not None and len(text) > longest:
        text = text[: longest - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def percent(mean: float | None, std: float | None = None) -> str:
    """Return a mean and a standard deviation, given as fractions, in percent; a dash for no mean."""
    if mean is None:
        return "-"
    return f"{100 * mean:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")


def excerpt(value: object, longest: int = 200) -> str:
    """Return ``str(value)`` for a message: one line, printable, at most ``longest`` characters."""
    return printable(" ".join(str(value).split()), longest)


def reason(error: BaseException) -> str:
    """Return the message of an error as an ``excerpt``, or the name of its type if the message is empty."""
    return excerpt(error) or type(error).__name__


def suggest(name: str, known: Iterable[str], listing: str | None = None) -> str:
    """Return the end of an error line: the most similar known name, and all names or the command that lists them."""
    known = list(known)
    near = difflib.get_close_matches(name.lower(), known, n=1)
    rest = f"{listing} lists them" if listing else "there are " + ", ".join(known)
    return (f"did you mean {near[0]!r}? " if near else "") + rest


def installing(extra: str) -> str:
    """Return the command that installs the packages of an optional part. It names the packages and not Condense, which
    may be a checkout or a wheel and is in no index."""
    try:
        lines = metadata.requires("condense-dd") or []
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        lines = []
    packages = [line.split(";")[0].strip() for line in lines if f'extra == "{extra}"' in line.replace("'", '"')]
    return shlex.join(["pip", "install", *packages]) if packages else f"pip install '.[{extra}]' in the checkout"


@contextlib.contextmanager
def flags() -> Iterator[None]:
    """Make ``spelt`` spell fields as flags inside the context, for the command line."""
    token = _as_flags.set(True)
    try:
        yield
    finally:
        _as_flags.reset(token)


def speaks_flags() -> bool:
    """Return whether messages spell fields as flags."""
    return _as_flags.get()


def spelt(field: str, value: object = ..., kind: str = "") -> str:
    """Spell a field as the user writes it: ``--split.val-fraction 0.1`` on the command line,
    ``split=Split(val_fraction=0.1)`` in Python.

    Args:
        field: path of the field, e.g. ``method.num_steps``. In Python, fields of the method are keyword arguments.
        value: the suggested value, if there is one.
        kind: class of the outer field if it differs from the capitalised name of the field, e.g. ``RandomTruncated``.
    """
    if speaks_flags():
        words = value if isinstance(value, tuple) else () if value is ... else (value,)
        return " ".join([f"--{field.replace('_', '-')}", *map(str, words)])
    *outer, name = field.removeprefix("method.").split(".")
    given = f"{name}={value!r}" if value is not ... else f"{name}=..." if outer else name
    for part in reversed(outer):
        given = f"{part}={kind or part.capitalize()}({given})"
    return given
