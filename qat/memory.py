"""The C library's allocator: a program keeps the memory that it has freed, for its next arrays."""

from __future__ import annotations

import contextlib
import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Numbers of these parameters in glibc's malloc.h."""


def keep_freed_memory() -> bool:
    """Keep freed memory instead of giving it back to the system, which is slow to hand it out again.

    By default glibc gives blocks of 32 MiB and more back as soon as they are freed, and each page of the next array
    costs a page fault: an expression on 84 MB takes 3.7 times as long (170 ms against 46). For programs, on which it
    has an effect as a whole; a library must not call it.

    Returns:
        Whether it was possible; other C libraries than glibc have no such setting.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
    return False
