"""Time, memory and energy of runs, and the rates of the device.

Runs take turns, in another order each round, so that drift affects all alike, and so does what the run before left in
the caches. On a GPU, mode "graph" times a captured CUDA graph between two events
after a flush of the L2 cache; "eager" is the wall clock of 10 calls in a row, dominated by the host, without a flush. A
CPU has only "eager", with single calls. Several runs of one provider, each with its own operands, alternate.
"""

import functools
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from bench.case import DTYPES, MODES, Roof
from qkernels.runtime.precision import switched

ROUNDS, EAGER_ROUNDS = 30, 7
EAGER_CALLS, CALLS_SECONDS = 10, 0.1  # maximum number of calls, and of seconds, in an eager sample
LEAST_ROUNDS, SECONDS = 3, 5.0  # slow runs get as many rounds as fit these seconds, but at least 3
Turn = Iterator[Callable[[], Any]]
Runs = Mapping[str, Sequence[Callable[[], Any]]]
FLUSH_BYTES = 2**30  # many times any L2 cache; writing it takes longer than the host needs to enqueue a graph
ENERGY_SECONDS = 0.5  # the counter is updated every 20 to 100 ms


class Timing(NamedTuple):
    """Microseconds of one provider's runs, and joules of one run.

    `host` is the time until an eager call returns; None if that is the whole time, or was not measured.
    """

    samples: list[float]
    host: float | None = None
    energy: float | None = None


class Clock:
    """Times runs on a CPU, by wall clock."""

    modes: tuple[str, ...] = ("eager",)
    device, copied, sizes = "cpu", 2**28, {"float32": 2048}  # for the roof: bytes to copy, sizes of matrices

    def time(self, runs: Runs, mode: str, energy: bool = False) -> dict[str, Timing]:
        """Times of the runs by name, which take turns; a name whose capture fails is left out."""
        times = _interleaved(ROUNDS, runs, lambda _, turn: self._eager(turn, 1))
        return {name: Timing(samples) for name, samples in times.items()}

    def memory(self) -> int:
        """Allocated bytes; starts a new count of the peak."""
        return 0

    def peak(self) -> int | None:
        """Peak of the allocated bytes since `memory`; None if unknown."""
        return None

    def roof(self, precisions: Sequence[str]) -> Roof:
        """The device's rates, by a copy and by products of square matrices."""
        source = torch.rand(self.copied // 4, device=self.device)
        copy, rates = self._microseconds(functools.partial(torch.empty_like(source).copy_, source)), {}
        for precision in precisions:
            size = self.sizes.get(precision, 8192)
            a, b = (torch.randn(size, size, device=self.device).to(DTYPES[precision]) for _ in range(2))
            with switched(precision):
                product = self._microseconds(functools.partial(torch.mm, a, b, out=torch.empty_like(a)))
            rates[precision] = 2e6 * size**3 / product
        return Roof(2e6 * self.copied / copy, rates)

    def _microseconds(self, run: Callable[[], Any]) -> float:
        """Median time of a run."""
        return statistics.median(self._eager(itertools.repeat(run), 1) for _ in range(EAGER_ROUNDS))

    def _eager(self, turn: Turn, calls: int) -> float:
        self._synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            next(turn)()
        self._synchronize()
        return 1e6 * (time.perf_counter() - start) / calls

    def _synchronize(self) -> None:
        """Wait for the device."""


class GpuClock(Clock):
    """Times runs on a GPU, by CUDA events and wall clock. Runs and captures use one stream."""

    modes = MODES
    device, copied, sizes = "cuda", 2**30, {"float32": 4096}

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        torch.cuda.set_stream(self.stream)
        self.flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        # Libraries allocate their workspaces now, so that they do not count as memory of a provider.
        for dtype in (torch.float64, *DTYPES.values()):
            a = torch.rand(256, 256, dtype=dtype, device="cuda", requires_grad=True)
            (a @ a).sum().backward()
        self.nvml = Nvml.open()

    def time(self, runs: Runs, mode: str, energy: bool = False) -> dict[str, Timing]:
        if mode == "eager":
            slow = {name for name, several in runs.items() if self._eager(iter(several), 1) > 1e6 * CALLS_SECONDS / 2}
            calls = {name: 1 if name in slow else EAGER_CALLS for name in runs}
            times = _interleaved(EAGER_ROUNDS, runs, lambda name, turn: self._eager(turn, calls[name]))
            # A slow run has synchronised or is dominated by the device.
            return {name: Timing(t, None if name in slow else self._host(runs[name])) for name, t in times.items()}
        replays: dict[str, list[Callable[[], Any]]] = {}
        for name, several in runs.items():
            try:
                replays[name] = [self._captured(run).replay for run in several]
            except Exception as raised:  # whatever a compiler or another library raises
                print(f"{name}: not captured: {type(raised).__name__}: {raised}", flush=True)
        times = _interleaved(ROUNDS, replays, lambda _, turn: self._event(next(turn)))
        used = {name: self._energy(several[0]) if energy else None for name, several in replays.items()}
        return {name: Timing(samples, energy=used[name]) for name, samples in times.items()}

    def memory(self) -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def empty_graph(self) -> float:
        """Microseconds of a graph with one addition."""
        value = torch.zeros(1, device="cuda")
        return self._microseconds(self._captured(lambda: value.add_(1)).replay)

    def _microseconds(self, run: Callable[[], Any]) -> float:
        return statistics.median(self._event(run) for _ in range(ROUNDS))

    def _event(self, run: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return 1e3 * float(start.elapsed_time(end))

    def _synchronize(self) -> None:
        torch.cuda.synchronize()

    def _host(self, runs: Sequence[Callable[[], Any]]) -> float:
        """Median microseconds of a call on an idle device: the time that Python takes."""
        samples = []
        for _ in range(EAGER_ROUNDS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            runs[0]()
            samples.append(1e6 * (time.perf_counter() - start))
        torch.cuda.synchronize()
        return statistics.median(samples)

    def _energy(self, run: Callable[[], Any]) -> float | None:
        """Joules of the whole GPU per run, from many runs back to back; None if unknown."""
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
        """The library for the current device; None if package or driver are missing."""
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
        """Joules since the driver was loaded; None if unknown."""
        try:
            return 1e-3 * float(self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle))
        except self.library.NVMLError:
            return None

    def used(self) -> int:
        """Bytes of the device's memory in use by all processes."""
        return int(self.library.nvmlDeviceGetMemoryInfo(self.handle).used)


def clock_of(device: torch.device) -> Clock:
    """The clock of the current device."""
    return GpuClock() if device.type == "cuda" else Clock()


def _interleaved(rounds: int, runs: Runs, sample: Callable[[str, Turn], float]) -> dict[str, list[float]]:
    """Samples by name, which take turns in random order; fewer rounds if all of them would take over `SECONDS`."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    turns = {name: itertools.cycle(several) for name, several in runs.items()}
    start = time.perf_counter()
    for number in range(rounds):
        if number >= LEAST_ROUNDS and time.perf_counter() - start > SECONDS:
            break
        for name in random.Random(number).sample([*turns], len(turns)):
            samples[name].append(sample(name, turns[name]))
    return samples
