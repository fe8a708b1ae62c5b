"""What to say of a name that nobody knows."""

import difflib
from collections.abc import Iterable


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of an error line: the nearest known name, and all of them."""
    known = list(known)
    near = difflib.get_close_matches(name.lower(), known, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + "there are " + ", ".join(known)
