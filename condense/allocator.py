"""glibc's memory allocator, told to keep what is freed.

By default every tensor of some megabytes is mapped from the system and given back when it is freed; each use then
faults its pages in anew, which costs training on a CPU up to half of its time.
"""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Serve all sizes from the heap and never shrink it; whether that took effect.

    Nothing is changed where the C library is not glibc, or where the environment chose otherwise: LD_PRELOAD,
    GLIBC_TUNABLES or a variable MALLOC_... is set.
    """
    chosen = any(name in ("LD_PRELOAD", "GLIBC_TUNABLES") or name.startswith("MALLOC_") for name in os.environ)
    return not chosen and _set({_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1})


def restore_defaults() -> bool:
    """What glibc does by itself once tensors have come and gone; whether that took effect."""
    return _set({_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20})


def _set(options: dict[int, int]) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all([libc.mallopt(option, value) == 1 for option, value in options.items()])
