"""Runs Triton kernels, or records what would run: the one place that asks about the device."""

import contextlib
import functools
import os
import threading
import traceback
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


class KernelUnavailable(RuntimeError):
    """Triton cannot build a kernel, or the GPU not hold it: one line of which, with what settings, and why."""


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


class _Current(threading.local):
    """What records in this thread; a ContextVar is nothing that torch 2.11 compiles."""

    def __init__(self) -> None:
        self.recording: Recording | None = None


_current = _Current()
# Of each build that failed, the reason: to try again would take as long every step.
_failed: dict[tuple[Any, ...], str] = {}


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


def run(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], warps: int = 4, stages: int = 1, registers: int = 0
) -> None:
    """Launches `kernel` on the current stream of the current device; an empty grid launches nothing.

    `registers` a thread may have, where that is not left to ptxas: it spills a few for one more block on a
    multiprocessor.

    Raises:
        KernelUnavailable: it could not be built. What CUDA says of launches, this one or an earlier one, goes through.
    """
    options = {"num_warps": warps, "num_stages": stages} | ({"maxnreg": registers} if registers else {})
    if 0 in grid:
        return
    if recording := _current.recording:
        recording.launches.append(Launch(kernel, grid, arguments, options))
        return
    if _failed and (reason := _failed.get(_build(kernel, arguments, options))):
        raise KernelUnavailable(reason)
    try:
        kernel[grid](**arguments, **options)
    except Exception as error:
        if not _is_of_a_build(error):
            raise
        build = _build(kernel, arguments, options)
        _failed[build] = _reason(error, *build)
        raise KernelUnavailable(_failed[build]) from error


def _build(kernel: Any, arguments: dict[str, Any], options: dict[str, int]) -> tuple[Any, ...]:
    """What is compiled: kernel, settings, types of the tensors, architecture."""
    fixed = kernel.fn.__annotations__  # tl.constexpr, and no others
    settings = {name: value for name, value in arguments.items() if name in fixed} | options
    tensors = [value for _, value in flat(arguments) if isinstance(value, Tensor)]
    types = tuple(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    return kernel.__name__, ", ".join(f"{name}={value}" for name, value in settings.items()), types, arch_of(tensors[0])


def _is_of_a_build(error: Exception) -> bool:
    """Whether the compiler raised it, or the one of the C code that launches, or a kernel is too large for the GPU.

    The type does not tell: passes of the compiler raise RuntimeError, and so does a launch that finds the GPU broken.
    """
    import triton

    builders = {triton.compile.__code__, triton.runtime.build.compile_module_from_src.__code__}
    frames = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
    return isinstance(error, triton.OutOfResources) or not builders.isdisjoint(frames)


def _reason(error: Exception, name: str, settings: str, types: tuple[str, ...], arch: int) -> str:
    import triton

    text = getattr(error, "error_message", None) or str(error)
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return (
        f"Triton {triton.__version__} cannot build {name} for sm_{arch} and {', '.join(dict.fromkeys(types))} with "
        f"{settings}: {type(error).__name__}: {first}"
    )


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the device of `x` the current one: Triton launches there."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def arch_of(place: Tensor | torch.device) -> int:
    """Compute capability that kernels on a tensor or device are planned for, as 10 major + minor."""
    if recording := _current.recording:
        return recording.arch
    device = place.device if isinstance(place, Tensor) else place
    return _properties(device)[0] if device.type == "cuda" else INTERPRETED_ARCH


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
    switch = torch.backends.cudnn.conv if kind == "conv" else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return "tf32" if switch.fp32_precision == "tf32" else "ieee"


@contextlib.contextmanager
def switched(precision: str) -> Iterator[None]:
    """PyTorch's two TF32 switches on for "tf32", off for any other precision; then everything is as it was.

    Only `fp32_precision` is read and written: `allow_tf32` raises once somebody has set the other. A switch without a
    value of its own takes CUDA's, which takes that of `torch.backends`, and reading it tells what holds, not whose it
    is. So CUDA's is set first: a switch that does not follow has a value of its own, and that is what it reads as.
    """
    wanted = "tf32" if precision == "tf32" else "ieee"
    cuda: Any = torch.backends.cudnn  # where the value for all of CUDA is, cuBLAS included
    switches = cuda.conv, torch.backends.cuda.matmul
    before: list[tuple[Any, str]] = []

    def wrong(switch: Any) -> bool:
        return bool((switch.fp32_precision == "tf32") != (wanted == "tf32"))

    try:
        if any(map(wrong, switches)):
            before.append((cuda, _own_of_cuda()))
            cuda.fp32_precision = wanted
        for switch in filter(wrong, switches):
            before.append((switch, switch.fp32_precision))
            switch.fp32_precision = wanted
        yield
    finally:
        for switch, value in reversed(before):
            switch.fp32_precision = value


def _own_of_cuda() -> str:
    """The value that was set for all of CUDA, "none" where it takes that of `torch.backends`."""
    every: Any = torch.backends
    holds, above = every.cudnn.fp32_precision, every.fp32_precision
    if holds == "none" or holds != above:
        return str(holds)
    every.fp32_precision = "ieee" if above == "tf32" else "tf32"  # who follows has none of its own
    own = holds if every.cudnn.fp32_precision == holds else "none"
    every.fp32_precision = above
    return str(own)
