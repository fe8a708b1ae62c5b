"""Where derived data are kept between runs."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from condense.files import check_writable, expanded


def cache_folder() -> Path | None:
    """Where derived data are kept: $CONDENSE_CACHE, else ~/.cache/condense.

    None where nothing can be kept there, with one warning for each place.
    """
    place = os.environ.get("CONDENSE_CACHE", "~/.cache/condense")
    try:
        if not place:
            raise ValueError("CONDENSE_CACHE is empty")
        folder = expanded(place)
        check_writable(folder)
        return folder
    except ValueError as error:
        if place not in _uncached:
            _uncached.add(place)
            mend = "set CONDENSE_CACHE to a folder that can be written to"
            warnings.warn(f"nothing is cached: {error}; {mend}", stacklevel=2)
        return None


_uncached: set[str] = set()
"""Places for the cache of which a warning was given."""
