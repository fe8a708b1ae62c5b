"""Settings of glibc's memory allocator that make it keep freed memory.

By default glibc maps the memory of every tensor of some megabytes from the system and unmaps it when the tensor is
freed. The page faults of the next use take up to half of the time of training on a CPU.
"""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Allocate all sizes from the heap and never shrink it; return whether that took effect.

    Nothing is changed if the C library is not glibc, or if the environment configures the allocator: LD_PRELOAD,
    GLIBC_TUNABLES or a variable MALLOC_... is set.
    """
    configured = any(name in ("LD_PRELOAD", "GLIBC_TUNABLES") or name.startswith("MALLOC_") for name in os.environ)
    return not configured and _set({_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1})


def restore_defaults() -> bool:
    """Set the thresholds that glibc reaches by itself after large tensors were freed; return whether that worked."""
    return _set({_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20})


def _set(options: dict[int, int]) -> bool:
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all([libc.mallopt(option, value) == 1 for option, value in options.items()])
