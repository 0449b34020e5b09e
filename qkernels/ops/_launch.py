"""Runs Triton kernels, or records what would run."""

import traceback
from typing import Any

from torch import Tensor

from qkernels.runtime.device import arch_of
from qkernels.runtime.recording import Launch, current_recording, flat_arguments

# Of each build that failed, the reason: to try again would take as long every step.
_failed: dict[tuple[Any, ...], str] = {}


class KernelUnavailable(RuntimeError):
    """Triton cannot build a kernel, or the GPU not hold it: one line of which, with what settings, and why."""


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
    if recording := current_recording():
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
    tensors = [value for _, value in flat_arguments(arguments) if isinstance(value, Tensor)]
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
