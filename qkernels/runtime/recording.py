"""Records launches of Triton kernels instead of running them: for tests, and for tools that plan and compile."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One call of a kernel, `kernel[grid](**arguments, **options)`."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


@dataclass
class Recording:
    """The launches of a `record` block in order."""

    arch: int
    launches: list[Launch] = field(default_factory=list)


def flat_arguments(arguments: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The arguments of a launch by name; the fields of a NamedTuple are listed as arguments."""
    for name, value in arguments.items():
        fields = getattr(value, "_fields", None)
        if fields is None:
            yield name, value
        else:
            yield from flat_arguments({f"{name}.{field}": item for field, item in zip(fields, value, strict=True)})


class _Current(threading.local):
    """The recording of this thread; torch 2.11 does not compile a ContextVar."""

    def __init__(self) -> None:
        self.recording: Recording | None = None


_current = _Current()


@contextlib.contextmanager
def record(arch: int) -> Iterator[Recording]:
    """Plans launches for a GPU of compute capability `arch` (90 is 9.0) and records them; nothing is launched.

    For meta tensors; the results of other tensors are uninitialised memory.
    """
    before, recording = _current.recording, Recording(arch)
    _current.recording = recording
    try:
        yield recording
    finally:
        _current.recording = before


def current_recording() -> Recording | None:
    """The recording of the innermost `record` block of this thread."""
    return _current.recording
