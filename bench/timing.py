"""How long a run takes on a GPU, and how fast that GPU is. Runs take turns, so that drift meets all of them.

Modes: "graph", a captured CUDA graph between two events, behind a flush of the L2 cache; "eager", the wall clock of 10
calls in a row, in which host time dominates and the cache is not flushed.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from bench.cases import DTYPES, Roof, Run

ROUNDS, EAGER_ROUNDS, EAGER_CALLS = 30, 7, 10
FLUSH_BYTES = 2**28  # several times any L2 cache; writing it takes longer than the host needs to enqueue a graph


class Clock(Protocol):
    """Samples in microseconds of each run, the runs taking turns."""

    def __call__(self, runs: dict[str, Run], mode: str) -> dict[str, list[float]]: ...


class GpuClock:
    """See the module's docstring for the two modes."""

    def __init__(self) -> None:
        self.flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, runs: dict[str, Run], mode: str) -> dict[str, list[float]]:
        if mode == "eager":
            return _interleaved(EAGER_ROUNDS, runs, self._eager)
        graphs = {name: _captured(run) for name, run in runs.items()}
        return _interleaved(ROUNDS, {name: graph.replay for name, graph in graphs.items()}, self._event)

    def _event(self, run: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)

    def _eager(self, run: Run) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(EAGER_CALLS):
            run()
        torch.cuda.synchronize()
        return 1e6 * (time.perf_counter() - start) / EAGER_CALLS

    def roof(self) -> Roof:
        """Of a 2 GiB copy, and of products of 8192 x 8192 matrices; float32 without tf32 by 4096."""
        source = torch.empty(2**30, dtype=torch.int8, device="cuda").random_()
        target = torch.empty_like(source)
        copy = statistics.median(self._event(lambda: target.copy_(source)) for _ in range(ROUNDS))
        rates = {}
        for precision, size in (("bf16", 8192), ("float32", 4096)):
            a, b = (torch.randn(size, size, device="cuda").to(DTYPES[precision]) for _ in range(2))
            product = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
            times = [self._event(product) for _ in range(ROUNDS)]
            rates[precision] = 2 * size**3 / (1e-6 * statistics.median(times))
        return Roof(2 * source.numel() / (1e-6 * copy), rates)

    def empty_graph(self) -> float:
        """What the events around a graph of nearly nothing measure."""
        one = torch.zeros(1, device="cuda")
        graph = _captured(lambda: (one.add_(1),))
        return statistics.median(self._event(graph.replay) for _ in range(ROUNDS))


def _interleaved(
    rounds: int, runs: dict[str, Callable[[], Any]], sample: Callable[[Callable[[], Any]], float]
) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(sample(run))
    return samples


def _captured(run: Run) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph
