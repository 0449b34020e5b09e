"""The precision in which float32 is multiplied: read from PyTorch's TF32 switches, and switched for a while."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


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
