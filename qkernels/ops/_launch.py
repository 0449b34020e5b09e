"""Runs Triton kernels, or records what would run: the one place that asks about the device."""

import contextlib
import contextvars
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Triton decides when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter computes nothing that depends on the architecture; it takes the settings of this one.
INTERPRETED_ARCH = 90
# Streaming multiprocessors of A100, H100 and H200, B200: where no device is there to be asked.
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}


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


def flat(arguments: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The arguments of a launch one by one, those of an operand as well, which is a NamedTuple."""
    for name, value in arguments.items():
        fields = getattr(value, "_fields", None)
        if fields is None:
            yield name, value
        else:
            yield from flat({f"{name}.{field}": one for field, one in zip(fields, value, strict=True)})


_recording: contextvars.ContextVar[Recording | None] = contextvars.ContextVar("recording", default=None)


@contextlib.contextmanager
def record(arch: int) -> Iterator[Recording]:
    """Plans kernels as for a GPU of compute capability `arch` (90 is 9.0), and notes them; nothing is launched.

    For meta tensors; the results of others are whatever lay in their memory.
    """
    recording = Recording(arch)
    token = _recording.set(recording)
    try:
        yield recording
    finally:
        _recording.reset(token)


def run(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], warps: int = 4, stages: int = 1, registers: int = 0
) -> None:
    """Launches `kernel` on the current stream of the current device; an empty grid launches nothing.

    `registers` a thread may have, where that is not left to ptxas: it spills a few for one more block on a
    multiprocessor.
    """
    options = {"num_warps": warps, "num_stages": stages} | ({"maxnreg": registers} if registers else {})
    if 0 in grid:
        return
    if recording := _recording.get():
        recording.launches.append(Launch(kernel, grid, arguments, options))
    else:
        kernel[grid](**arguments, **options)


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the device of `x` the current one: Triton launches there."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def arch_of(x: Tensor) -> int:
    """Compute capability that kernels on `x` are planned for, as 10 major + minor."""
    if recording := _recording.get():
        return recording.arch
    return _properties(x.device)[0] if x.is_cuda else INTERPRETED_ARCH


def multiprocessors_of(x: Tensor) -> int:
    """Number of streaming multiprocessors of the device of `x`."""
    if x.is_cuda:
        return _properties(x.device)[1]
    return MULTIPROCESSORS[max(known for known in MULTIPROCESSORS if known <= arch_of(x))]


def arch_of_device(device: torch.device) -> int:
    """Compute capability of a CUDA device, as 10 major + minor; a constant to `torch.compile`."""
    return _properties(device)[0]


# What torch.compiler.assume_constant_result sets; calling that would import all of Dynamo here.
arch_of_device._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _properties(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def precision_of(dtype: torch.dtype, kind: str) -> str:
    """The precision in which operands of this type are multiplied, "half", "tf32" or "ieee".

    Args:
        dtype: float32, float16 or bfloat16.
        kind: "conv" or "matmul": which of PyTorch's switches lets float32 run as tf32, `torch.backends.cudnn.conv` or
            `torch.backends.cuda.matmul`.
    """
    if dtype != torch.float32:
        return "half"
    switches = torch.backends.cudnn.conv if kind == "conv" else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return "tf32" if switches.fp32_precision == "tf32" else "ieee"


@contextlib.contextmanager
def switched(precision: str) -> Iterator[None]:
    """PyTorch's two TF32 switches on for "tf32", off for any other precision."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
