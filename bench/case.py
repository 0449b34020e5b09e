"""What a benchmark is made of: cases, providers that compute them, and the roof that both are held against.

A case is one thing to compute, with operands of its own; it knows its FLOPs and bytes, what a right result is and how
far a provider may be from it. A provider is one way to compute it. Everything else (bench/run.py) is the same for all.
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkernels.runtime.precision import switched

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "float32": torch.float32}
FORWARD, BACKWARD, STEP = "forward", "backward", "forward+backward"
# "graph": in a captured CUDA graph, behind a flush of the L2 cache. "eager": called from Python.
MODES = ("graph", "eager")

Results = tuple[Tensor, ...]
Run = Callable[[], Results]


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One thing to compute. The fields of this class name it in the results.

    Args:
        suite: the suite that it belongs to.
        network: whose shapes it has: "quaternion", "real" or "real-on-embedding".
        layer: which part of that network, such as "conv 6-7".
        variant: what else tells it from others, such as the semantics of the anti-transfer loss.
        batch: samples.
        precision: "bf16", "fp16", "tf32" or "float32" (which is never rounded to tf32).
        work: what is computed: "forward", "backward" (the gradients alone), both, or what the suite says.
        modes: how it is timed, of `MODES`.
        rank: of its value; what has a higher one is dropped first when time is short.
    """

    suite: str
    network: str
    layer: str
    variant: str = ""
    batch: int
    precision: str
    work: str
    modes: tuple[str, ...] = ("graph",)
    rank: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    @abstractmethod
    def shape(self) -> str:
        """The operands' sizes, for the reader."""

    @property
    @abstractmethod
    def flops(self) -> int:
        """Operations (a multiplication and an addition are 2) that the definition needs."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Least traffic: every operand read once, every result written once."""

    @property
    def energy(self) -> bool:
        """Whether the energy of a run is measured, which takes half a second for each provider."""
        return False

    @property
    def sets(self) -> int:
        """Sets of operands that timed runs rotate through."""
        return 1

    @abstractmethod
    def operands(self, device: torch.device) -> Any:
        """New random operands."""

    @contextlib.contextmanager
    def checking(self, operands: Any) -> Iterator[None]:
        """Around the run whose results are judged: what cannot be compared, such as dropout, is off."""
        yield

    @abstractmethod
    def gate(self, provider: "Provider", operands: Any, results: Results) -> tuple[float, float]:
        """The error of a provider's results, in units of what is allowed (above 1 is wrong), and as it is."""

    @abstractmethod
    def tiny(self) -> "Case":
        """The same in small and in float32, for a CPU."""

    @property
    def key(self) -> tuple[str, str, str, str, int, str, str]:
        """What names it in the results."""
        return (self.suite, self.network, self.layer, self.variant, self.batch, self.precision, self.work)

    def __str__(self) -> str:
        words = (self.network, self.layer, self.variant, f"batch {self.batch}", self.precision, self.work)
        return f"{self.suite}: {', '.join(word for word in words if word)}"


class Provider(NamedTuple):
    """A way to compute cases.

    Args:
        name: in the results; ours start with "ours".
        build: ``(case, sets of operands) -> runs``, one for each set; untimed.
        fits: whether it can compute a case.
        real: it computes with the real weight of the same shape instead of the quaternion one.
        modes: those that it can be timed in.
        cpu: whether it computes on a CPU.
        smoke: whether building it takes seconds, not minutes.
        read: the results as the case's gate wants them, from those that are timed.
    """

    name: str
    build: Callable[[Any, Sequence[Any]], list[Run]]
    fits: Callable[[Any], bool] = lambda case: True
    real: bool = False
    modes: tuple[str, ...] = MODES
    cpu: bool = True
    smoke: bool = True
    read: Callable[[Results], Results] = lambda results: results

    @property
    def ours(self) -> bool:
        return self.name.startswith("ours")


class Suite(NamedTuple):
    """Cases in the order of their value, and who computes them."""

    cases: Sequence[Case]
    providers: Sequence[Provider]


class Roof(NamedTuple):
    """Measured rates: bytes per second of a copy, read and written; FLOP per second of a product by precision."""

    bandwidth: float
    flops: dict[str, float]

    def seconds(self, case: Case) -> float:
        """What no implementation of the definition, with all of its products, can be faster than."""
        return max(case.bytes / self.bandwidth, case.flops / self.flops.get(case.precision, math.inf))


def differentiated(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor, work: str, wanted: Sequence[int] = ()
) -> Run:
    """A run of one of the three works on a function and the gradient of its output.

    Args:
        function: of the inputs.
        inputs: of which all floating ones have gradients, or those numbered in `wanted`.
        dy: gradient of the output.
        work: "forward" returns `(y,)`, "forward+backward" `(y, gradients...)`; "backward" makes y once and returns
            `(y, gradients...)` of it every time.
        wanted: numbers of the inputs whose gradients are made.
    """
    numbers = wanted or range(len(inputs))
    leaves = [x.detach().requires_grad_(n in numbers) for n, x in enumerate(inputs)]
    asked = [leaves[n] for n in numbers]

    def forward() -> Results:
        with torch.no_grad():
            return (function(*leaves),)

    def step() -> Results:
        y = function(*leaves)
        return y.detach(), *torch.autograd.grad(y, asked, dy)

    if work == FORWARD:
        return forward
    if work == STEP:
        return step
    assert work == BACKWARD, work
    y = function(*leaves)
    return lambda: (y.detach(), *torch.autograd.grad(y, asked, dy, retain_graph=True))


@contextlib.contextmanager
def reference_run() -> Iterator[None]:
    """Around what results are judged by: float32 is never rounded to tf32, and cuDNN searches no algorithm for it."""
    searching, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        with switched("float32"):
            yield
    finally:
        torch.backends.cudnn.benchmark = searching


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Relative Frobenius error; infinite where anything is not a number."""
    error = ((actual.to(exact.dtype) - exact).norm() / exact.norm()).item()
    return error if math.isfinite(error) else math.inf


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """20th percentile, median and 80th percentile.

    >>> quantiles([1, 2, 3, 4, 5, 6])
    (2.0, 3.5, 5.0)
    """
    import numpy as np

    low, middle, high = np.quantile(samples, (0.2, 0.5, 0.8)).tolist()
    return low, middle, high
