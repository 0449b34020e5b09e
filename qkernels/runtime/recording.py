"""Records the launches of Triton kernels instead of running them: for tests, and for tools that plan and compile."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One call of a kernel: what `kernel[grid](**arguments, **options)` would do."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


@dataclass
class Recording:
    """The launches of a `record` block, in their order."""

    arch: int
    launches: list[Launch] = field(default_factory=list)


def flat_arguments(arguments: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The arguments of a launch one by one, those of an operand as well, which is a NamedTuple."""
    for name, value in arguments.items():
        fields = getattr(value, "_fields", None)
        if fields is None:
            yield name, value
        else:
            yield from flat_arguments({f"{name}.{field}": one for field, one in zip(fields, value, strict=True)})


class _Current(threading.local):
    """What records in this thread; a ContextVar is nothing that torch 2.11 compiles."""

    def __init__(self) -> None:
        self.recording: Recording | None = None


_current = _Current()


@contextlib.contextmanager
def record(arch: int) -> Iterator[Recording]:
    """Plans kernels as for a GPU of compute capability `arch` (90 is 9.0), and notes them; nothing is launched.

    For meta tensors; the results of others are whatever lay in their memory.
    """
    before, recording = _current.recording, Recording(arch)
    _current.recording = recording
    try:
        yield recording
    finally:
        _current.recording = before


def recorded() -> bool:
    """Whether kernels are noted and not launched, so that tensors may be anywhere."""
    return _current.recording is not None


def current_recording() -> Recording | None:
    """The recording of the innermost `record` block of this thread."""
    return _current.recording
