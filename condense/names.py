"""Names and texts as people are shown them."""

import difflib
from collections.abc import Iterable


def printable(text: str, longest: int | None = None) -> str:
    """Text as a terminal may show it: what is not printable is escaped, what is beyond ``longest`` characters left out.

    File names, and names in files that others wrote, may hold sequences that move the cursor or change colours."""
    if longest is not None and len(text) > longest:
        text = text[: longest - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def reason(error: BaseException) -> str:
    """What an error says, on one line of at most 200 characters."""
    return printable(" ".join(str(error).split()) or type(error).__name__, 200)


def suggest(name: str, known: Iterable[str], listing: str | None = None) -> str:
    """The end of an error line: the nearest known name, and all of them, or what lists them where they are too many."""
    known = list(known)
    near = difflib.get_close_matches(name.lower(), known, n=1)
    rest = f"{listing} lists them" if listing else "there are " + ", ".join(known)
    return (f"did you mean {near[0]!r}? " if near else "") + rest
