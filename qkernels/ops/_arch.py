"""The architectures that have launch settings."""

from collections.abc import Iterable


def tuned_arch(arch: int, tables: Iterable[int]) -> int:
    """The architecture whose table another one takes: the next lower one, at least the lowest.

    12.0 takes that of 8.0, whose tiles fit the 99 KiB of shared memory of 8.6, 8.9 and 12.0, too.

    >>> [tuned_arch(arch, (80, 90, 100)) for arch in (75, 89, 90, 103, 120)]
    [80, 80, 90, 100, 80]
    """
    return min(tables) if arch >= 120 else max((table for table in tables if table <= arch), default=min(tables))
