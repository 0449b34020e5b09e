"""Runs suites: every provider is judged, and only those whose results are right reach the clock.

Cases are taken by rank, so that the most valuable are done when the time is up; results.csv is written as they finish.
"""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from bench.case import Case, Provider, Roof, Run, Suite, quantiles
from bench.results import Row
from bench.timing import Clock, Timing
from qkernels.runtime.device import arch_of
from qkernels.runtime.precision import switched
from qkernels.runtime.recording import Launch, flat_arguments, record

COMPILE_SECONDS = 120.0  # for one rank; what is left is compiled when it is first run
LAUNCH_US = 3.0  # of device time that a kernel in a graph costs at least (design notes)


class Attempt(NamedTuple):
    """A provider's first run, judged: `excess` is the error in units of what is allowed."""

    provider: Provider
    status: str
    excess: float | None = None
    error: float | None = None
    first_call: float | None = None
    peak: int | None = None
    run: Run | None = None


def providers_of(suite: Suite, case: Case, device: torch.device) -> list[Provider]:
    """Those that can compute a case there."""
    return [p for p in suite.providers if p.fits(case) and (p.cpu or device.type == "cuda")]


def measure(
    case: Case,
    providers: Sequence[Provider],
    device: torch.device,
    clock: Clock | None = None,
    roof: Roof | None = None,
    moved: dict[str, list[int]] | None = None,
) -> list[Row]:
    """The rows of a case: one for each provider and mode.

    Args:
        case: what is computed.
        providers: who computes it.
        device: where.
        clock: what times it; without one, results are judged only.
        roof: the device's measured rates.
        moved: bytes that each kernel of our providers must move, by the provider's name.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # what was compiled for other cases would count against its limits
    try:
        with switched(case.precision):
            return _measured(case, providers, device, clock, roof, moved or {})
    except Exception as raised:  # operands that do not fit, or a device that is lost
        print(f"{case}: {type(raised).__name__}: {raised}", file=sys.stderr, flush=True)
        return unmeasured(case, providers, "out of memory" if isinstance(raised, torch.OutOfMemoryError) else "failed")


def unmeasured(case: Case, providers: Sequence[Provider], status: str) -> list[Row]:
    """The rows of a case of which nothing is known."""
    attempts = [Attempt(provider, status) for provider in providers]
    return [
        _row(case, mode, a, None, True, None, {}) for mode in case.modes for a in attempts if mode in a.provider.modes
    ]


def _measured(
    case: Case,
    providers: Sequence[Provider],
    device: torch.device,
    clock: Clock | None,
    roof: Roof | None,
    moved: dict[str, list[int]],
) -> list[Row]:
    operands = case.operands(device)
    attempts = [_attempt(case, provider, operands, clock) for provider in providers]
    runs = _rotated(case, attempts, operands, device) if clock else {}
    rows = []
    for mode in case.modes:
        timed = {p.name: runs[p.name] for p in providers if p.name in runs and mode in p.modes}
        times = clock.time(timed, mode, case.energy) if clock and mode in clock.modes else {}
        rows += [
            _row(case, mode, attempt, times.get(attempt.provider.name), clock is not None, roof, moved)
            for attempt in attempts
            if mode in attempt.provider.modes
        ]
    return rows


def _attempt(case: Case, provider: Provider, operands: Any, clock: Clock | None) -> Attempt:
    try:
        before = clock.memory() if clock else 0
        run = provider.build(case, [operands])[0]
        with case.checking(operands):
            start = time.perf_counter()
            results = run()
            if results[0].is_cuda:
                torch.cuda.synchronize()
            first = time.perf_counter() - start
            try:
                excess, error = case.gate(provider, operands, provider.read(results))
            except torch.OutOfMemoryError:
                return Attempt(provider, "not judged")
        del results
        if not excess <= 1:
            return Attempt(provider, "REFUSED", excess, error)
        peak = _peak(run, clock, before) if clock else None
    except torch.OutOfMemoryError:
        return Attempt(provider, "out of memory")
    except Exception as raised:  # whatever a compiler or a peer raises: the others are measured all the same
        print(f"{case}, {provider.name}: {type(raised).__name__}: {raised}", file=sys.stderr, flush=True)
        return Attempt(provider, "failed")
    return Attempt(provider, "ok", excess, error, first, peak, run)


def _peak(run: Run, clock: Clock, before: int) -> int | None:
    """Most memory of a second run, for which libraries search no algorithms any more, beside the operands."""
    clock.memory()
    run()
    peak = clock.peak()
    return None if peak is None else peak - before


def _rotated(case: Case, attempts: Sequence[Attempt], operands: Any, device: torch.device) -> dict[str, list[Run]]:
    """The runs of those that were right, also on further operands."""
    others = [case.operands(device) for _ in range(case.sets - 1)]
    return {
        attempt.provider.name: [attempt.run, *(attempt.provider.build(case, others) if others else ())]
        for attempt in attempts
        if attempt.run
    }


def _row(
    case: Case,
    mode: str,
    attempt: Attempt,
    timing: Timing | None,
    timed: bool,
    roof: Roof | None,
    moved: dict[str, list[int]],
) -> Row:
    name, status = attempt.provider.name, attempt.status
    if status == "ok" and timing is None:
        status = "failed" if timed else "smoke"
    low, median, high = quantiles(timing.samples) if timing else (None, None, None)
    floor = None
    if roof and name in moved:
        floor = sum(max(LAUNCH_US, 1e6 * size / roof.bandwidth) for size in moved[name])
    return Row(
        *case.key,
        mode,
        name,
        shape=case.shape,
        status=status,
        error=attempt.error,
        error_over_tolerance=attempt.excess,
        median_us=median,
        p20_us=low,
        p80_us=high,
        samples=len(timing.samples) if timing else None,
        host_us=timing.host if timing else None,
        first_call_ms=1e3 * attempt.first_call if timing and attempt.first_call is not None else None,
        peak_bytes=attempt.peak if timing else None,
        energy_mj=1e3 * timing.energy if timing and timing.energy is not None else None,
        floor_us=floor,
        flops=case.flops,
        bytes=case.bytes,
        percent_of_roof=1e8 * roof.seconds(case) / median if roof and median else None,
    )


class Session(NamedTuple):
    """What is run, where, by which clock, until when (`time.monotonic`)."""

    suites: Sequence[Suite]
    device: torch.device
    clock: Clock | None = None
    roof: Roof | None = None
    deadline: float = math.inf

    def planned(self, done: set[tuple[Any, ...]]) -> Iterator[tuple[Case, list[Provider], dict[str, list[int]]]]:
        """The cases that are not in `done` (by their `key`), the most valuable first, with what `measure` takes.

        Says which are out of time.
        """
        left = [(case, suite) for suite in self.suites for case in suite.cases if case.key not in done]
        dropped: dict[str, int] = {}
        for rank in sorted({case.rank for case, _ in left}):
            these = [(case, suite) for case, suite in left if case.rank == rank]
            moved = self._compile(these) if time.monotonic() < self.deadline else {}
            for case, suite in these:
                if time.monotonic() < self.deadline:
                    yield case, providers_of(suite, case, self.device), moved.get(case, {})
                else:
                    dropped[case.suite] = dropped.get(case.suite, 0) + 1
        for name, count in dropped.items():
            print(f"dropped, out of budget: {count} cases of the suite {name}", flush=True)

    def _compile(self, planned: Sequence[tuple[Case, Suite]]) -> dict[Case, dict[str, list[int]]]:
        """Compiles our kernels in parallel; the bytes that each must move, by case and provider."""
        if self.device.type != "cuda":
            return {}
        from bench.warm import compile_all

        start = time.monotonic()
        moved: dict[Case, dict[str, list[int]]] = {}

        def launches() -> Iterator[Launch]:
            for case, suite in planned:
                moved[case] = {}
                for provider in providers_of(suite, case, self.device):
                    # An epoch's kernels are those of the steps.
                    if provider.ours and "graph" in case.modes and time.monotonic() < self.deadline:
                        before, timed = recorded_launches(case, provider, self.device)
                        moved[case][provider.name] = [_bytes(launch) for launch in timed]
                        yield from before + timed

        count, errors = compile_all(launches(), min(COMPILE_SECONDS, self.deadline - time.monotonic()))
        print(f"{count} kernels compiled in {time.monotonic() - start:.0f} s", *errors, sep="\n", flush=True)
        return moved


def recorded_launches(case: Case, provider: Provider, device: torch.device) -> tuple[list[Launch], list[Launch]]:
    """The kernels of building a run, and of the run itself: none is launched, results are whatever lay in memory."""
    arch, built = arch_of(torch.empty(0, device=device)), 0
    # In one thread: a backward pass would not be recorded in those of autograd.
    with switched(case.precision), record(arch) as recording, torch.autograd.set_multithreading_enabled(False):
        try:
            run = provider.build(case, [case.operands(device)])[0]
            built = len(recording.launches)
            run()
        except Exception as raised:  # which the measurement meets again, or which comes from meaningless values
            print(
                f"{case}, {provider.name}, only planned: {type(raised).__name__}: {raised}", file=sys.stderr, flush=True
            )
    return recording.launches[:built], recording.launches[built:]


def _bytes(launch: Launch) -> int:
    """Of the tensors that a kernel reads or writes, each once."""
    tensors = {id(value): value for _, value in flat_arguments(launch.arguments) if isinstance(value, torch.Tensor)}
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


def smoke(suites: Sequence[Suite]) -> Iterator[list[Row]]:
    """A tiny case of each kind on the CPU, judged and not timed."""
    device = torch.device("cpu")
    for suite in suites:
        kinds: dict[tuple[str, ...], Case] = {}
        for case in suite.cases:
            kinds.setdefault((case.suite, case.network, case.variant, case.work, _kind(case)), case)
        for case in kinds.values():
            tiny = case.tiny()
            yield measure(tiny, [p for p in providers_of(suite, tiny, device) if p.smoke], device)


def _kind(case: Case) -> str:
    """The word that the names of like layers start with."""
    return case.layer.split()[0]


def line(row: Row) -> str:
    """A row for the terminal."""
    what = " ".join(
        (
            f"{row.suite:9} {row.network:17} {row.layer:14} {row.variant:23} {row.batch:3} {row.precision:7}",
            f"{row.work:16} {row.mode:5} {row.provider:27} {row.status:7}",
        )
    )
    parts = []
    if row.error is not None:
        parts.append(f"error {row.error:.1e} ({row.error_over_tolerance:.2f} of what is allowed)")
    if row.median_us is not None:
        parts.append(f"{row.median_us:.1f} us ({row.p20_us:.1f} to {row.p80_us:.1f})")
    if row.percent_of_roof is not None:
        parts.append(f"{row.percent_of_roof:.0f} % of the roof")
    if row.peak_bytes is not None:
        parts.append(f"{1e-6 * row.peak_bytes:.1f} MB")
    return f"{what} {'  '.join(parts)}".rstrip()
