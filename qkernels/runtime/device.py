"""The device that kernels are planned for: the only module that queries it."""

import contextlib
import functools
import os
from typing import Any

import torch
from torch import Tensor

from qkernels.runtime.recording import current_recording

# Triton reads this variable when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter, whose results do not depend on the architecture, takes the settings of this one.
INTERPRETED_ARCH = 90
# Streaming multiprocessors of A100, H100 and H200, B200, for plans without a device.
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Context in which the device of `x` is the current device, where Triton launches kernels."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def arch_of(place: Tensor | torch.device) -> int:
    """Compute capability that kernels for a tensor or device are planned for, as 10 major + minor."""
    if recording := current_recording():
        return recording.arch
    device = place.device if isinstance(place, Tensor) else place
    return _properties(device)[0] if device.type == "cuda" else INTERPRETED_ARCH


def multiprocessors_of(x: Tensor) -> int:
    """Number of streaming multiprocessors of the device of `x`."""
    if x.is_cuda:
        return _properties(x.device)[1]
    return MULTIPROCESSORS[max(arch for arch in MULTIPROCESSORS if arch <= arch_of(x))]


def arch_of_device(device: torch.device) -> int:
    """Compute capability of a CUDA device, as 10 major + minor; a constant to `torch.compile`."""
    return _properties(device)[0]


# As torch.compiler.assume_constant_result, which would import all of Dynamo here.
arch_of_device._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _properties(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count
