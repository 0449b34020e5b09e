"""What a benchmark is made of: cases, providers that compute them, and the roof that both are held against.

A case is one thing to compute, with operands of its own; it knows its FLOPs and bytes, what a right result is and the
tolerance of it. A provider is one way to compute it. Everything else (bench/run.py) is the same for all.
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
MODES = ("graph", "eager")  # in a captured CUDA graph, behind a flush of the L2 cache; called from Python
ROTATED_BYTES = 2**30  # most bytes of operands that runs rotate through
Results = tuple[Tensor, ...]
Run = Callable[[], Results]


@dataclass(frozen=True, kw_only=True)
class CaseName:
    """The fields that name a case, in the suites and in every row of results.

    Args:
        suite: suite that the case belongs to.
        network: network whose shapes it has: "quaternion", "real" or "real-on-embedding".
        layer: part of that network, such as "conv 6-7".
        variant: what else tells it from other cases, such as the anti-transfer loss.
        batch: number of samples.
        precision: "bf16", "fp16", "tf32" or "float32" (which is never rounded to tf32).
        work: what is computed: "forward", "backward" (the gradients alone), both, or what the suite says.
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
        """The fields of this class alone."""
        return dict(zip(NAMES, self.case_key, strict=True))

    @property
    def case_key(self) -> tuple[Any, ...]:
        return _key(self)

    def __str__(self) -> str:
        words = (self.network, self.layer, self.variant, f"batch {self.batch}", self.precision, self.work)
        return f"{self.suite}: {', '.join(word for word in words if word)}"


NAMES = [field.name for field in fields(CaseName)]
_key: Callable[[CaseName], tuple[Any, ...]] = attrgetter(*NAMES)  # fast: targets are judged after every case


@dataclass(frozen=True, kw_only=True)
class Case(CaseName, ABC):
    """One thing to compute.

    Args:
        modes: how it is timed, of `MODES`.
        rank: priority, 0 the highest; cases of a higher number are dropped first when time is short.
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
        """Operations that the definition needs; a multiplication and an addition are 2."""

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
        """A context for the run whose results are checked: randomness, such as dropout, is off."""
        yield

    @abstractmethod
    def check(self, provider: "Provider", operands: Any, results: Results) -> tuple[float, float]:
        """The error of a provider's results: as a multiple of the tolerance (above 1 is wrong), and as it is."""

    @abstractmethod
    def tiny(self) -> "Case":
        """A small version of the case in float32, for a CPU."""


class Provider(NamedTuple):
    """A way to compute cases.

    Args:
        name: name in the results; ours start with "ours".
        build: ``(case, operands) -> run``; not timed.
        fits: whether it can compute a case.
        real: whether it computes with the real weight of the same shape instead of the quaternion one.
        cpu: whether it computes on a CPU.
        smoke: whether building it takes seconds, not minutes.
        read: ``(results of a run) -> results as the case checks them``.
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
        """The suite of these cases, in any order."""
        return cls(sorted(cases, key=lambda case: case.rank), providers)

    def where(self, **names: Any) -> list[Any]:
        """The cases with these values of the fields of `CaseName`."""
        return [case for case in self.cases if names.items() <= case.case.items()]


class Roof(NamedTuple):
    """Measured rates: bytes per second of a copy, read and written; FLOP per second of a product by precision."""

    bandwidth: float
    flops: dict[str, float]

    def seconds(self, case: Case) -> float:
        """A lower bound for every implementation that computes all products of the definition."""
        return max(case.bytes / self.bandwidth, case.flops / self.flops.get(case.precision, math.inf))
