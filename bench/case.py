"""The parts of a benchmark: cases, providers that compute them, and the roof of the device.

A case is a computation with its operands, FLOPs, bytes, exact result and tolerance. A provider is one way to compute
it. Everything else (bench/run.py) is the same for all benchmarks.
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "float32": torch.float32}
FORWARD, BACKWARD, STEP = "forward", "backward", "forward+backward"
MODES = ("graph", "eager")  # a captured CUDA graph after a flush of the L2 cache; calls from Python
ROTATED_BYTES = 2**30  # maximum size of the sets of operands that runs rotate through
Results = tuple[Tensor, ...]
Run = Callable[[], Results]


@dataclass(frozen=True, kw_only=True)
class CaseName:
    """The fields that identify a case, in the suites and in every row of results.

    Args:
        suite: suite of the case.
        network: network with these shapes: "quaternion", "real" or "real-on-embedding".
        layer: part of that network, such as "conv 6-7".
        variant: further distinction, such as the anti-transfer loss.
        batch: number of samples.
        precision: "bf16", "fp16", "tf32" or "float32" (which is never rounded to tf32).
        work: computation: "forward", "backward" (only the gradients), "forward+backward", or another work of the suite.
    """

    suite: str
    network: str
    layer: str
    variant: str = ""
    batch: int
    precision: str
    work: str

    @property
    def case(self) -> dict[str, Any]:
        """The fields of `CaseName` by name."""
        return dict(zip(NAMES, self.case_key, strict=True))

    @property
    def case_key(self) -> tuple[Any, ...]:
        return _key(self)

    def __str__(self) -> str:
        words = (self.network, self.layer, self.variant, f"batch {self.batch}", self.precision, self.work)
        return f"{self.suite}: {', '.join(word for word in words if word)}"


NAMES = [field.name for field in fields(CaseName)]
_key: Callable[[CaseName], tuple[Any, ...]] = attrgetter(*NAMES)  # fast, since targets are evaluated after every case


@dataclass(frozen=True, kw_only=True)
class Case(CaseName, ABC):
    """One computation.

    Args:
        modes: modes of timing, see `MODES`.
        rank: priority, 0 is the highest; cases with higher numbers are dropped first when time is short.
    """

    modes: tuple[str, ...] = MODES
    rank: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    @abstractmethod
    def shape(self) -> str:
        """Sizes of the operands, for the reader."""

    @property
    @abstractmethod
    def flops(self) -> int:
        """Number of operations by the definition; a multiplication and an addition count as two."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Minimum memory traffic: every operand is read once, every result written once."""

    @property
    def energy(self) -> bool:
        """Whether the energy of a run is measured, which takes half a second per provider."""
        return False

    @property
    def sets(self) -> int:
        """Number of sets of operands that timed runs rotate through."""
        return 1

    @abstractmethod
    def operands(self, device: torch.device) -> Any:
        """New random operands."""

    @contextlib.contextmanager
    def checking(self, operands: Any) -> Iterator[None]:
        """A context for the run whose results are checked: without randomness such as dropout."""
        yield

    @abstractmethod
    def check(self, provider: "Provider", operands: Any, results: Results) -> tuple[float, float]:
        """The error of a provider's results, as a multiple of the tolerance (above 1: wrong) and as it is."""

    @abstractmethod
    def tiny(self) -> "Case":
        """A small version of the case in float32, for a CPU."""


class Provider(NamedTuple):
    """A way to compute cases.

    Args:
        name: name in the results; ours start with "ours".
        build: ``(case, operands) -> run``; not timed.
        fits: ``case -> whether it can compute the case``.
        real: whether it computes with the real weight of the same shape instead of the quaternion one.
        cpu: whether it can compute on a CPU.
        smoke: whether it can be built in seconds, not minutes.
        read: ``results of a run -> results in the form that the case checks``.
    """

    name: str
    build: Callable[[Any, Any], Run]
    fits: Callable[[Any], bool] = lambda case: True
    real: bool = False
    cpu: bool = True
    smoke: bool = True
    read: Callable[[Results], Results] = lambda results: results

    @property
    def ours(self) -> bool:
        return self.name.startswith("ours")


class Suite(NamedTuple):
    """Cases by rank, and the providers that compute them."""

    cases: Sequence[Case]
    providers: Sequence[Provider]

    @classmethod
    def of(cls, cases: Iterable[Case], *providers: Provider) -> "Suite":
        """A suite of these cases, which it sorts."""
        return cls(sorted(cases, key=lambda case: case.rank), providers)

    def where(self, **names: Any) -> list[Any]:
        """The cases with these values of the fields of `CaseName`."""
        return [case for case in self.cases if names.items() <= case.case.items()]


class Roof(NamedTuple):
    """Measured rates: bytes per second of a copy (read and written); FLOP per second of matrix products by
    precision."""

    bandwidth: float
    flops: dict[str, float]

    def seconds(self, case: Case) -> float:
        """Lower bound of the time for implementations that compute all products of the definition."""
        return max(case.bytes / self.bandwidth, case.flops / self.flops.get(case.precision, math.inf))
