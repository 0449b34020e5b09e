"""Runs Triton kernels, or records what would run."""

import traceback
from typing import Any

import torch
from torch import Tensor

from qkernels.runtime.device import arch_of
from qkernels.runtime.recording import Launch, current_recording, flat_arguments

# Why a build failed; each is tried once, as another attempt would take as long in every step.
_failed: dict[tuple[Any, ...], str] = {}


class KernelUnavailable(RuntimeError):
    """Triton cannot build a kernel, or it is too large for the GPU; the message is one line with settings and cause."""


def float32(like: Tensor, *size: int) -> Tensor:
    """A new float32 tensor on the device of another one."""
    return like.new_empty(size, dtype=torch.float32)


def run(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], warps: int = 4, stages: int = 1, registers: int = 0
) -> None:
    """Launches `kernel` on the current stream of the current device; an empty grid launches nothing.

    Args:
        registers: maximum number of registers of a thread; 0 leaves it to ptxas, which may spill a few so that a
            multiprocessor holds one more block.

    Raises:
        KernelUnavailable: it could not be built. CUDA's errors, of this launch or an earlier one, pass unchanged.
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
        if not _is_build_error(error):
            raise
        build = _build(kernel, arguments, options)
        _failed[build] = _reason(error, *build)
        raise KernelUnavailable(_failed[build]) from error


def _build(kernel: Any, arguments: dict[str, Any], options: dict[str, int]) -> tuple[Any, ...]:
    """The key of a build: kernel, settings, types of the tensors, architecture."""
    constants = kernel.fn.__annotations__  # only tl.constexpr arguments are annotated
    settings = {name: value for name, value in arguments.items() if name in constants} | options
    tensors = [value for _, value in flat_arguments(arguments) if isinstance(value, Tensor)]
    types = tuple(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    return kernel.__name__, ", ".join(f"{name}={value}" for name, value in settings.items()), types, arch_of(tensors[0])


def _is_build_error(error: Exception) -> bool:
    """Whether Triton's compiler or the C compiler of its launcher raised it, or a kernel is too large for the GPU.

    The type does not tell: passes of the compiler raise RuntimeError, and so does a launch on a broken GPU.
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
