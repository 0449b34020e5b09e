"""Runs suites: every result is checked against a reference, and only providers with right results are timed.

Cases run by rank, so that the most valuable are done when the time is up; results.csv is written as they finish.
"""

import itertools
import math
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from bench import words
from bench.case import Case, Provider, Roof, Run, Suite
from bench.results import Row, read
from bench.timing import Clock, Timing
from qkernels.runtime.device import arch_of
from qkernels.runtime.precision import switched
from qkernels.runtime.recording import Launch, record

COMPILE_SECONDS = 120.0  # per rank; kernels that are not compiled by then are compiled at their first run
CASE_SECONDS = 90.0  # a case on a GPU that takes longer counts as hanging
LAUNCH_US = 3.0  # minimum device time of a kernel in a graph
Bytes = Mapping[str, Sequence[int]]
"""Bytes that each kernel of a run must move, by provider."""


def measure(
    case: Case,
    providers: Sequence[Provider],
    device: torch.device,
    clock: Clock | None = None,
    roof: Roof | None = None,
    moved: Bytes | None = None,
) -> list[Row]:
    """The rows of a case, one per provider and mode; without a clock, results are only checked.

    `roof` has the measured rates of the device, `moved` the bytes that the kernels of our providers must move.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # graphs compiled for other cases would count against its limits
    try:
        with switched(case.precision):
            operands = case.operands(device)
            first = {provider: _first_run(case, provider, operands, clock) for provider in providers}
            others = [case.operands(device) for _ in range(case.sets - 1)] if clock else []
            runs = {p.name: [run, *(p.build(case, more) for more in others)] for p, (_, run) in first.items() if run}
            rows = []
            for mode in case.modes:
                times = clock.time(runs, mode, case.energy) if clock and mode in clock.modes else {}
                for row, _ in first.values():
                    kernels = (moved or {}).get(row.provider)
                    if roof and kernels is not None:
                        floor = sum(max(LAUNCH_US, 1e6 * size / roof.bandwidth) for size in kernels)
                        row = replace(row, floor_us=floor)
                    row = replace(row, mode=mode)
                    rows.append(_timed(row, times.get(row.provider), roof.seconds(case) if roof else None))
            return rows
    except Exception as raised:  # operands that do not fit into memory, or a lost device
        return unmeasured(case, providers, _failure(f"{case}", raised))


def unmeasured(case: Case, providers: Sequence[Provider], status: str) -> list[Row]:
    """The rows of a case without results."""
    return [replace(_row(case, provider, status), mode=mode) for mode in case.modes for provider in providers]


def _row(case: Case, provider: Provider, status: str, **values: Any) -> Row:
    """A row without a mode."""
    sizes: dict[str, Any] = {"shape": case.shape, "flops": case.flops, "bytes": case.bytes}
    return Row(**case.case, mode="", provider=provider.name, status=status, **sizes, **values)


def _failure(name: str, raised: Exception) -> str:
    """The status after an exception; prints it unless memory was too small."""
    if isinstance(raised, torch.OutOfMemoryError):
        return "out of memory"
    print(f"{name}: {type(raised).__name__}: {raised}", file=sys.stderr, flush=True)
    return "failed"


def _first_run(case: Case, provider: Provider, operands: Any, clock: Clock | None) -> tuple[Row, Run | None]:
    """The row after a provider's first run, and the run if it is right and can be timed."""
    try:
        before = clock.memory() if clock else 0
        run = provider.build(case, operands)
        with case.checking(operands):
            start = time.perf_counter()
            results = run()
            if results[0].is_cuda:
                torch.cuda.synchronize()
            taken = time.perf_counter() - start
            try:
                excess, error = case.check(provider, operands, provider.read(results))
            except torch.OutOfMemoryError:
                return _row(case, provider, "not judged"), None
        del results
        errors = {"error": error, "error_over_tolerance": excess}
        if clock is None or not excess <= 1:
            return _row(case, provider, "smoke" if excess <= 1 else "REFUSED", **errors), None
        clock.memory()
        run()  # again, since the search for algorithms in the first run takes memory
        peak = clock.peak()
        sizes = {"first_call_ms": 1e3 * taken, "peak_bytes": None if peak is None else peak - before}
        return _row(case, provider, "ok", **errors, **sizes), run
    except Exception as raised:  # whatever a compiler or another library raises; the other providers are still measured
        return _row(case, provider, _failure(f"{case}, {provider.name}", raised)), None


def _timed(row: Row, timing: Timing | None, least_seconds: float | None) -> Row:
    if timing is None:  # the capture of a right run failed
        return replace(row, status="failed", first_call_ms=None, peak_bytes=None) if row.status == "ok" else row
    median = statistics.median(timing.samples)
    low, *_, high = statistics.quantiles(timing.samples, n=5, method="inclusive")
    return replace(
        row,
        median_us=median,
        p20_us=low,
        p80_us=high,
        samples=len(timing.samples),
        host_us=timing.host,
        energy_mj=None if timing.energy is None else 1e3 * timing.energy,
        percent_of_roof=None if least_seconds is None else 1e8 * least_seconds / median,
    )


def resumed(out: Path, provenance: Mapping[str, str]) -> list[Row]:
    """The rows of an earlier run, if there is one.

    Raises:
        ValueError: it was measured on another device, at another commit, or with other versions.
    """
    if not (out / "results.csv").is_file():
        return []
    earlier = read(out / "results.csv", Row)
    for name in ("device", "threads", "commit", "torch", "triton"):
        if earlier.provenance[name] != provenance[name]:
            raise ValueError(
                f"{out}: its rows were measured with {name} {earlier.provenance[name]}, this is {provenance[name]}; "
                "choose another folder"
            )
    return earlier.rows


class Schedule(NamedTuple):
    """Suites, the device to run them on, and the deadline (`time.monotonic`)."""

    suites: Sequence[Suite]
    device: torch.device
    deadline: float = math.inf

    def planned(self, done: set[tuple[Any, ...]]) -> Iterator[tuple[Case, list[Provider], Bytes]]:
        """The cases whose key is not in `done`, by rank, with arguments of `measure`; prints how many are dropped."""
        left = [(case, suite) for suite in self.suites for case in suite.cases if case.case_key not in done]
        dropped = Counter[str]()
        for _, rank in itertools.groupby(sorted(left, key=lambda pair: pair[0].rank), lambda pair: pair[0].rank):
            cases = [(case, self.providers(suite, case)) for case, suite in rank]
            moved = self._compile(cases) if time.monotonic() < self.deadline else {}
            for case, providers in cases:
                if time.monotonic() < self.deadline:
                    yield case, providers, moved.get(case, {})
                else:
                    dropped[case.suite] += 1
        for name, count in dropped.items():
            print(f"dropped, out of budget: {count} cases of the suite {name}", flush=True)

    def providers(self, suite: Suite, case: Case) -> list[Provider]:
        """The providers that can compute a case on the device."""
        return [p for p in suite.providers if p.fits(case) and (p.cpu or self.device.type == "cuda")]

    def smoke(self) -> Iterator[list[Row]]:
        """The rows of a tiny case of each kind, checked and not timed."""
        for suite in self.suites:
            kinds: dict[tuple[str, ...], Case] = {}
            for case in suite.cases:  # names of similar layers start with the same word
                kinds.setdefault((case.suite, case.network, case.variant, case.work, case.layer.split()[0]), case)
            for tiny in (case.tiny() for case in kinds.values()):
                yield measure(tiny, [p for p in self.providers(suite, tiny) if p.smoke], self.device)

    def measured(
        self,
        clock: Clock,
        roof: Roof,
        done: Sequence[Row],
        note: Callable[[list[Row]], None],
        restart: Callable[[str], None],
    ) -> Iterator[list[Row]]:
        """The rows of each case that is not done.

        On a GPU, a case that crashes or hangs the device costs only its own rows: before each case, `note` writes it to
        disk as failed. If the case takes over `CASE_SECONDS`, or the device is lost, `restart` replaces this program.
        """
        on_gpu = self.device.type == "cuda"
        for case, providers, moved in self.planned({row.case_key for row in done}):
            if on_gpu:
                note(unmeasured(case, providers, "failed"))
                watchdog = threading.Timer(CASE_SECONDS, restart, [f"{case}: hangs"])
                watchdog.daemon = True
                watchdog.start()
            new = measure(case, providers, self.device, clock, roof, moved)
            if on_gpu:
                watchdog.cancel()
                try:
                    torch.cuda.synchronize()
                except RuntimeError as error:
                    restart(f"{case}: {error}")
            yield new

    def _compile(self, cases: Sequence[tuple[Case, Sequence[Provider]]]) -> Mapping[Case, Bytes]:
        """Compile our kernels in parallel; return the bytes that each must move, by case."""
        if self.device.type != "cuda":
            return {}
        from bench.warm import compile_all

        start = time.monotonic()
        moved: dict[Case, dict[str, list[int]]] = {case: {} for case, _ in cases}

        def launches() -> Iterator[Launch]:
            for case, providers in cases:
                for provider in providers:
                    # The kernels of epochs are those of the steps.
                    if provider.ours and "graph" in case.modes and time.monotonic() < self.deadline:
                        before, timed = recorded_launches(case, provider, self.device)
                        moved[case][provider.name] = [tensor_bytes(launch.arguments) for launch in timed]
                        yield from (*before, *timed)

        count, errors = compile_all(launches(), min(COMPILE_SECONDS, self.deadline - time.monotonic()))
        print(f"{count} kernels compiled in {time.monotonic() - start:.0f} s", *errors, sep="\n", flush=True)
        return moved


def recorded_launches(case: Case, provider: Provider, device: torch.device) -> tuple[list[Launch], list[Launch]]:
    """The launches of building a run, and of the run; none is executed, so results are arbitrary."""
    arch, built = arch_of(torch.empty(0, device=device)), 0
    # In one thread: in autograd's own threads a backward pass would not be recorded.
    with switched(case.precision), record(arch) as recording, torch.autograd.set_multithreading_enabled(False):
        try:
            run = provider.build(case, case.operands(device))
            built = len(recording.launches)
            run()
        except Exception as raised:  # the measurement raises it again, or arbitrary values caused it
            _failure(f"{case}, {provider.name}, only planned", raised)
    return recording.launches[:built], recording.launches[built:]


def tensor_bytes(values: Any) -> int:
    """Size of the tensors among these values, each once."""
    tensors = {id(value): value for value in tree_leaves(values) if isinstance(value, torch.Tensor)}
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


def line(row: Row) -> str:
    """A row for the terminal."""
    values = [
        f"{row.suite:9} {row.network:17} {row.layer:14} {row.variant:23} {row.batch:3} {row.precision:7} {row.work:16}",
        f"{row.mode:5} {row.provider:27} {row.status:7}",
        "" if row.error is None else f"error {row.error:.1e} ({row.error_over_tolerance:.2f} of the tolerance) ",
        "" if row.median_us is None else f"{words.time(row)} ",
        "" if row.percent_of_roof is None else f"{row.percent_of_roof:.0f} % of the roof ",
        words.size(row.peak_bytes),
    ]
    return " ".join(filter(None, values)).rstrip()
