"""What to say of a name that nobody knows."""

import difflib
from collections.abc import Iterable


def suggest(name: str, known: Iterable[str], listing: str | None = None) -> str:
    """The end of an error line: the nearest known name, and all of them, or what lists them where they are too many."""
    known = list(known)
    near = difflib.get_close_matches(name.lower(), known, n=1)
    rest = f"{listing} lists them" if listing else "there are " + ", ".join(known)
    return (f"did you mean {near[0]!r}? " if near else "") + rest
