"""How long runs take, what they hold and use, and how fast the device is.

Runs take turns, so that drift meets all of them. On a GPU, mode "graph" is a captured CUDA graph between two events,
behind a flush of the L2 cache; "eager" the wall clock of 10 calls in a row, in which host time dominates and nothing
is flushed. On a CPU there is "eager" alone, single calls. Several runs of one provider, on operands of their own, are
rotated through.
"""

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from bench.case import DTYPES, MODES, Roof
from qkernels.runtime.precision import switched

ROUNDS, EAGER_ROUNDS = 30, 7
EAGER_CALLS, CALLS_SECONDS = 10, 0.1  # of an eager sample: at most so many calls, and so long
LEAST_ROUNDS, SECONDS = 3, 5.0  # rounds of slow runs: as many as fit these seconds, but at least 3
Turn = Iterator[Callable[[], Any]]
Runs = Mapping[str, Sequence[Callable[[], Any]]]
FLUSH_BYTES = 2**30  # many times any L2 cache; writing it takes longer than the host needs to enqueue a graph
ENERGY_SECONDS = 0.5  # the counter moves about every 20 to 100 ms


class Timing(NamedTuple):
    """What one provider's runs took.

    Args:
        samples: microseconds.
        host: microseconds until an eager call returned; None where that is the whole time, or not asked for.
        energy: joules of one run.
    """

    samples: list[float]
    host: float | None = None
    energy: float | None = None


class Clock(Protocol):
    """Times runs on one device."""

    modes: tuple[str, ...]

    def time(self, runs: Runs, mode: str, energy: bool = False) -> dict[str, Timing]:
        """What the runs of every name took, the names taking turns; a name whose capture fails is left out."""

    def memory(self) -> int:
        """Bytes that are allocated; the peak starts anew."""

    def peak(self) -> int | None:
        """Most bytes that were allocated since; None where nobody counts."""

    def roof(self, precisions: Sequence[str]) -> Roof:
        """The device's measured rates."""


class CpuClock:
    """Wall clock."""

    modes: tuple[str, ...] = ("eager",)

    def time(self, runs: Runs, mode: str, energy: bool = False) -> dict[str, Timing]:
        samples = _interleaved(EAGER_ROUNDS, runs, _wall)
        return {name: Timing(taken) for name, taken in samples.items()}

    def memory(self) -> int:
        return 0

    def peak(self) -> int | None:
        return None

    def roof(self, precisions: Sequence[str]) -> Roof:
        """Of a copy of 256 MiB, and of a product of 2048 x 2048 matrices in float32."""
        source = torch.rand(2**26)
        target, (a, b) = torch.empty_like(source), torch.rand(2, 2048, 2048)
        copy, product = (
            1e-6 * statistics.median(_interleaved(EAGER_ROUNDS, {"": [run]}, _wall)[""])
            for run in (lambda: target.copy_(source), lambda: a @ b)
        )
        return Roof(2 * source.nbytes / copy, {"float32": 2 * 2048**3 / product})


class GpuClock:
    """CUDA events and wall clock. Everything runs in one stream of its own, in which graphs are captured too."""

    modes: tuple[str, ...] = MODES

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        torch.cuda.set_stream(self.stream)
        self.flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        # Libraries take their workspaces now, and not while the memory of a provider is counted.
        for dtype in (torch.float64, *DTYPES.values()):
            a = torch.rand(256, 256, dtype=dtype, device="cuda", requires_grad=True)
            (a @ a).sum().backward()
        self.nvml = Nvml.open()

    def time(self, runs: Runs, mode: str, energy: bool = False) -> dict[str, Timing]:
        if mode == "eager":
            slow = {name for name, several in runs.items() if self._eager(iter(several), 1) > 1e6 * CALLS_SECONDS / 2}
            calls = {name: 1 if name in slow else EAGER_CALLS for name in runs}
            samples = _interleaved(EAGER_ROUNDS, runs, lambda name, turn: self._eager(turn, calls[name]))
            # What is slow has synchronised, or is dominated by its work.
            return {name: Timing(s, None if name in slow else self._host(runs[name])) for name, s in samples.items()}
        graphs: dict[str, list[Any]] = {}
        for name, several in runs.items():
            try:
                graphs[name] = [self._captured(run) for run in several]
            except Exception as raised:  # whatever a compiler or a peer raises
                print(f"{name}: not captured: {type(raised).__name__}: {raised}", flush=True)
        replays = {name: [graph.replay for graph in several] for name, several in graphs.items()}
        samples = _interleaved(ROUNDS, replays, lambda _, turn: self._event(next(turn)))
        used = {name: self._energy(several[0]) if energy else None for name, several in replays.items()}
        return {name: Timing(taken, energy=used[name]) for name, taken in samples.items()}

    def memory(self) -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def roof(self, precisions: Sequence[str]) -> Roof:
        """Of a 2 GiB copy, and of products of 8192 x 8192 matrices, 4096 x 4096 in float32 without tf32."""
        source = torch.empty(2**30, dtype=torch.int8, device="cuda").random_()
        target = torch.empty_like(source)
        copy = statistics.median(self._event(lambda: target.copy_(source)) for _ in range(ROUNDS))
        rates = {}
        for precision in precisions:
            size = 4096 if precision == "float32" else 8192
            a, b = (torch.randn(size, size, device="cuda").to(DTYPES[precision]) for _ in range(2))
            product = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
            with switched(precision):
                rates[precision] = 2e6 * size**3 / statistics.median(self._event(product) for _ in range(ROUNDS))
        return Roof(2e6 * source.numel() / copy, rates)

    def empty_graph(self) -> float:
        """Microseconds that the events around a graph of nearly nothing measure."""
        one = torch.zeros(1, device="cuda")
        graph = self._captured(lambda: (one.add_(1),))
        return statistics.median(self._event(graph.replay) for _ in range(ROUNDS))

    def _event(self, run: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return 1e3 * float(start.elapsed_time(end))

    def _eager(self, turn: Turn, calls: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            next(turn)()
        torch.cuda.synchronize()
        return 1e6 * (time.perf_counter() - start) / calls

    def _host(self, runs: Sequence[Callable[[], Any]]) -> float:
        """Median microseconds of a call with nothing else enqueued, so that it waits for nothing but Python."""
        samples = []
        for _ in range(EAGER_ROUNDS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            runs[0]()
            samples.append(1e6 * (time.perf_counter() - start))
        torch.cuda.synchronize()
        return statistics.median(samples)

    def _energy(self, run: Callable[[], Any]) -> float | None:
        """Joules that the whole GPU uses for a run, replayed back to back."""
        torch.cuda.synchronize()
        start, count = time.perf_counter(), 0
        if self.nvml is None or (first := self.nvml.joules()) is None:
            return None
        while time.perf_counter() - start < ENERGY_SECONDS:
            for _ in range(10):
                run()
            torch.cuda.synchronize()
            count += 10
        last = self.nvml.joules()
        return None if last is None else (last - first) / count

    def _captured(self, run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            run()
        return graph


class Nvml:
    """NVIDIA's management library: energy of the GPU, and memory of a process on it."""

    def __init__(self, library: Any, handle: Any) -> None:
        self.library, self.handle = library, handle

    @classmethod
    def open(cls) -> "Nvml | None":
        """The library for the current device; None where package or driver are missing."""
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid))
        except ImportError:
            print("no energy, no memory of the process: the package nvidia-ml-py is not installed", flush=True)
            return None
        except pynvml.NVMLError as error:
            print(f"no energy, no memory of the process: NVML says {error}", flush=True)
            return None

    def joules(self) -> float | None:
        """Since the driver was loaded; None where nobody counts."""
        try:
            return 1e-3 * float(self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle))
        except self.library.NVMLError:
            return None

    def used(self) -> int:
        """Bytes of the device's memory that are taken, by whoever runs on it."""
        return int(self.library.nvmlDeviceGetMemoryInfo(self.handle).used)


def clock_of(device: torch.device) -> Clock:
    """The clock of a device, which is the current one."""
    return GpuClock() if device.type == "cuda" else CpuClock()


def _wall(_: str, turn: Turn) -> float:
    run = next(turn)
    start = time.perf_counter()
    run()
    return 1e6 * (time.perf_counter() - start)


def _interleaved(rounds: int, runs: Runs, sample: Callable[[str, Turn], float]) -> dict[str, list[float]]:
    """Samples of every name, which take turns; fewer rounds where all of them would take over `SECONDS`."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    turns = {name: itertools.cycle(several) for name, several in runs.items()}
    start = time.perf_counter()
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.perf_counter() - start > SECONDS:
            break
        for name, turn in turns.items():
            samples[name].append(sample(name, turn))
    return samples
