"""The precision of products: read from autocast and PyTorch's TF32 switches, and set for a block."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def precision_of(dtype: torch.dtype, operation: str) -> str:
    """The precision of products of this type, "half", "tf32" or "ieee".

    Args:
        dtype: float32, float16 or bfloat16.
        operation: "conv" or "matmul", whose switch in PyTorch lets float32 run as tf32: `torch.backends.cudnn.conv` or
            `torch.backends.cuda.matmul`.
    """
    if dtype != torch.float32:
        return "half"
    switch = torch.backends.cudnn.conv if operation == "conv" else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return "tf32" if switch.fp32_precision == "tf32" else "ieee"


def autocast_dtype(device: str) -> torch.dtype | None:
    """The type that autocast casts to on this type of device; None where it is off or unknown."""
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


# Dynamo cannot trace this call before torch 2.12, and its answer never changes; see `device.arch_of_device`.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def switched(precision: str) -> Iterator[None]:
    """Turns PyTorch's two TF32 switches on for "tf32", off for any other precision; at the end restores all settings.

    Only `fp32_precision` is read and written: `allow_tf32` raises once the other has been set. A switch without its own
    value inherits CUDA's, which inherits that of `torch.backends`; reading tells the effective value, not its origin.
    So CUDA's is set first: a switch that does not follow it has its own value, and reads as that.
    """
    value = "tf32" if precision == "tf32" else "ieee"
    cuda: Any = torch.backends.cudnn  # the value for all of CUDA, cuBLAS included
    switches = cuda.conv, torch.backends.cuda.matmul
    before: list[tuple[Any, str]] = []

    def wrong(switch: Any) -> bool:
        return bool((switch.fp32_precision == "tf32") != (value == "tf32"))

    try:
        if any(map(wrong, switches)):
            before.append((cuda, _own_of_cuda()))
            cuda.fp32_precision = value
        for switch in filter(wrong, switches):
            before.append((switch, switch.fp32_precision))
            switch.fp32_precision = value
        yield
    finally:
        for switch, previous in reversed(before):
            switch.fp32_precision = previous


def _own_of_cuda() -> str:
    """The value that was set for all of CUDA, "none" if it inherits that of `torch.backends`."""
    backends: Any = torch.backends
    effective, parent = backends.cudnn.fp32_precision, backends.fp32_precision
    if effective == "none" or effective != parent:
        return str(effective)
    backends.fp32_precision = "ieee" if parent == "tf32" else "tf32"  # CUDA's follows unless it was set
    own = effective if backends.cudnn.fp32_precision == effective else "none"
    backends.fp32_precision = parent
    return str(own)
