"""Runs that compute gradients, and the relative error of results."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bench.case import BACKWARD, FORWARD, STEP, Results, Run
from qkernels.runtime.precision import switched


def differentiated(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor, work: str, wanted: Sequence[int] = ()
) -> Run:
    """A run of one of the three works on a function of `inputs`, whose output has the gradient `dy`.

    "forward" returns `(y,)`, "forward+backward" `(y, gradients...)`; "backward" computes y only once, and `(y,
    gradients...)` in every run. Gradients are those of the inputs with the numbers `wanted`, by default of all.
    """
    numbers = wanted or range(len(inputs))
    leaves = [x.detach().requires_grad_(n in numbers) for n, x in enumerate(inputs)]

    def gradients(y: Tensor, **options: bool) -> Results:
        return y.detach(), *torch.autograd.grad(y, [leaves[n] for n in numbers], dy, **options)

    if work == FORWARD:
        return torch.no_grad()(lambda: (function(*leaves),))
    if work == STEP:
        return lambda: gradients(function(*leaves))
    assert work == BACKWARD, work
    y = function(*leaves)
    return lambda: gradients(y, retain_graph=True)


@contextlib.contextmanager
def reference_run() -> Iterator[None]:
    """A context for reference results: float32 is never rounded to tf32, and cuDNN searches no algorithm for it."""
    searching, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        with switched("float32"):
            yield
    finally:
        torch.backends.cudnn.benchmark = searching


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error; infinite if any value is NaN or infinite."""
    error = ((actual.to(exact.dtype) - exact).norm() / exact.norm()).item()
    return error if math.isfinite(error) else math.inf
