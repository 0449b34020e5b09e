"""How many trainings an hour one device gives when several processes share it.

Each process trains a network of its own. All start a window of some seconds together; what counts are their samples a
second in sum. On a GPU they share by time slices or through NVIDIA's Multi-Process Service (MPS). Threads of one
process, with a stream each, are left out: they would wait for one interpreter, and draw from one generator.
"""

import contextlib
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.network import EPOCH, EPOCHS, NetworkCase
from bench.suites import SUITES
from qkernels.runtime.precision import switched

OURS = next(provider for provider in EPOCHS.providers if provider.name == "ours")
PRECISIONS = ("bf16", "float32")
PROCESSES, MPS, MPS_CONTROL = "processes", "MPS", "nvidia-cuda-mps-control"
COUNTS = {PROCESSES: (1, 8, 4, 2), MPS: (8, 16, 4, 2)}  # of processes on a GPU, the most valuable first
WARM = 3  # epochs before all
SECONDS = {"cpu": 3.0, "cuda": 2.0}  # of a window
ROUNDS = {"cpu": 3, "cuda": 1}  # windows of each row, by turns: others may be at work on the CPU
# After which a process that has not started, or not answered in a window, hangs; for the service to answer.
START_SECONDS, WINDOW_SECONDS, MPS_SECONDS = 240.0, 60.0, 10.0
LEAD = 0.2  # seconds until a window opens, which its processes have been told by then


class Shared(NamedTuple):
    """One line of sharing.csv; what was not measured is empty.

    Args:
        suite, network, layer, variant, batch, precision, work: the case, of which each process trains its own.
        mode: how they share: "processes" (on a GPU: by time slices) or "MPS".
        processes: how many. threads_each: CPU threads of each.
        status: "ok"; "failed": a process did; "out of time"; or why there is no MPS.
        samples_per_second: of all processes, the median of several windows.
        trainings_relative: that over the first row's of the case: one process that has the device to itself.
        peak_bytes: most memory of the GPU's allocator in a process, operands included.
    """

    suite: str
    network: str
    layer: str
    variant: str
    batch: int
    precision: str
    work: str
    mode: str
    processes: int
    threads_each: int
    status: str
    samples_per_second: float | None = None
    trainings_relative: float | None = None
    peak_bytes: int | None = None


class Setting(NamedTuple):
    """How a device is shared."""

    mode: str
    processes: int
    threads_each: int


class Worker(NamedTuple):
    """A process, which leads a group of its own, and what it is told and tells through."""

    process: Any
    pipe: Connection

    def end(self) -> None:
        if self.process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.join()


class Report(NamedTuple):
    """What one process did in a window."""

    samples_per_second: float
    peak_bytes: int | None


class Found(NamedTuple):
    """Samples a second and most memory of the windows of a row; why there are none."""

    rates: list[float]
    peaks: list[int]
    status: str = "ok"


Settings = dict[tuple[NetworkCase, Setting], Found]


def cases(device: torch.device) -> list[NetworkCase]:
    """What is trained: the quaternion network with anti-transfer at layer 2, small on a CPU."""
    suites = SUITES["epoch" if device.type == "cuda" else "cpu"]
    found = [
        case
        for suite in suites
        for case in suite.cases
        if isinstance(case, NetworkCase)
        and (case.work, case.network, case.at) == (EPOCH, "quaternion", 2)
        and case.precision in PRECISIONS
    ]
    return sorted(found, key=lambda case: PRECISIONS.index(case.precision))


def plan(device: torch.device, cores: int) -> dict[str, list[Setting]]:
    """Settings by mode; the first has the device to itself, and processes share the cores."""
    if device.type == "cpu":
        return {PROCESSES: list(dict.fromkeys(Setting(PROCESSES, *n) for n in ((1, cores), (1, 1), (cores, 1))))}
    return {mode: [Setting(mode, n, max(1, cores // n)) for n in several] for mode, several in COUNTS.items()}


def measured(
    trained: Sequence[NetworkCase], device: torch.device, cores: int, deadline: float
) -> Iterator[list[Shared]]:
    """All rows so far, whenever more is known of one; says which are out of time (`time.monotonic`)."""
    found: Settings = {}
    for case in trained:
        for mode, settings in plan(device, cores).items():
            for setting, new in _of_a_pool(case, mode, settings, device, deadline):
                found[case, setting] = _joined(found.get((case, setting)), new)
                yield rows(found)
            if dropped := sum((case, setting) not in found for setting in settings):
                print(f"dropped, out of budget: {dropped} rows of {case}, {mode}", flush=True)


def rows(found: Settings) -> list[Shared]:
    """A line for each setting, in order."""
    alone: dict[NetworkCase, float | None] = {}
    lines = []
    for (case, setting), (rates, peaks, status) in found.items():
        rate = statistics.median(rates) if rates else None
        first = alone.setdefault(case, rate)
        relative = rate / first if rate and first else None
        lines.append(Shared(*case.key, *setting, status, rate, relative, max(peaks, default=None)))
    return lines


def most(shared: Sequence[Shared], precision: str) -> Shared | None:
    """The row with the most trainings an hour."""
    known = [row for row in shared if row.precision == precision and row.status == "ok" and row.trainings_relative]
    return max(known, key=lambda row: row.trainings_relative or 0.0, default=None)


@contextlib.contextmanager
def terminating() -> Iterator[None]:
    """SIGTERM ends this program as an exception does, so that no process is left behind."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _joined(old: Found | None, new: Found) -> Found:
    """Windows of one row; it is right where one of them was."""
    if old is None:
        return new
    rates, peaks = old.rates + new.rates, old.peaks + new.peaks
    return Found(rates, peaks, "ok" if rates else new.status)


def _of_a_pool(
    case: NetworkCase, mode: str, settings: Sequence[Setting], device: torch.device, deadline: float
) -> Iterator[tuple[Setting, Found]]:
    """Windows of each setting, by turns, by processes that are started once."""
    if time.monotonic() > deadline:
        return
    alone: dict[str, str] = {}
    service = mps() if mode == MPS else contextlib.nullcontext(alone)
    try:
        with service as environment:
            count = max(setting.processes for setting in settings)
            with _pool(case, device, count, environment, deadline) as workers:
                if environment and workers and not _asked("get_server_list", environment).stdout.strip():
                    raise OSError("no process came to it")
                for setting in list(settings) * ROUNDS[device.type]:
                    if time.monotonic() > deadline:
                        break
                    yield setting, _window(workers, setting, SECONDS[device.type])
    except OSError as error:
        if mode != MPS:
            raise
        for setting in settings:
            yield setting, Found([], [], f"no MPS: {error}")


def _window(workers: list[Worker], setting: Setting, seconds: float) -> Found:
    """What that many processes do at once; one that fails or hangs is ended, and no longer among the workers."""
    chosen, status = workers[: setting.processes], "ok"
    if len(chosen) < setting.processes:
        return Found([], [], "failed")
    start, until = time.time() + LEAD, time.monotonic() + seconds + WINDOW_SECONDS
    for worker in chosen:
        with contextlib.suppress(OSError):
            worker.pipe.send((start, seconds, setting.threads_each))
    reports = []
    for worker in chosen:
        try:
            reports.append(_heard(worker, until))
        except (EOFError, OSError) as error:
            status = "out of time" if isinstance(error, TimeoutError) else "failed"
            worker.end()
            workers.remove(worker)
    if status != "ok":
        return Found([], [], status)
    peaks = [report.peak_bytes for report in reports if report.peak_bytes is not None]
    return Found([sum(report.samples_per_second for report in reports)], peaks)


def _heard(worker: Worker, until: float) -> Any:
    """What a process says next.

    Raises:
        TimeoutError: it says nothing.
        EOFError, OSError: it is no more.
    """
    if not worker.pipe.poll(max(0.0, until - time.monotonic())):
        raise TimeoutError
    return worker.pipe.recv()


@contextlib.contextmanager
def _pool(
    case: NetworkCase, device: torch.device, count: int, environment: dict[str, str], deadline: float
) -> Iterator[list[Worker]]:
    """Processes that are ready to train; all of them end with the context."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    workers: list[Worker] = []
    try:
        for _ in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, case, device.type, environment), daemon=True)
            process.start()
            there.close()
            workers.append(Worker(process, here))
        # Who has not started by half of the time that is left is done without.
        until, ready = time.monotonic() + min(START_SECONDS, (deadline - time.monotonic()) / 2), []
        for worker in workers:
            try:
                _heard(worker, until)
                ready.append(worker)
            except (EOFError, OSError):
                worker.end()
        yield ready
    finally:
        for worker in workers:
            worker.end()


def _serve(pipe: Connection, case: NetworkCase, device: str, environment: dict[str, str]) -> None:
    """What happens in each process: it makes its run warm, says so, and answers each window that it is told of."""
    os.setsid()
    os.environ.update(environment)
    on_gpu = device == "cuda"
    with switched(case.precision), contextlib.suppress(EOFError):
        epoch = OURS.build(case, [case.operands(torch.device(device))])[0]

        def run() -> None:
            epoch()
            if on_gpu:
                torch.cuda.synchronize()

        for _ in range(WARM):
            run()
        pipe.send("ready")
        while True:
            start, seconds, threads = pipe.recv()
            torch.set_num_threads(threads)
            time.sleep(max(0.0, start - time.time()))
            rate = case.samples * runs_per_second(run, seconds)
            pipe.send(Report(rate, torch.cuda.max_memory_allocated() if on_gpu else None))


def runs_per_second(run: Callable[[], None], seconds: float) -> float:
    """Of the runs that begin within so many seconds; one more is not counted, while which others may end theirs."""
    begun, count = time.perf_counter(), 0
    while (taken := time.perf_counter() - begun) < seconds:
        run()
        count += 1
    run()
    return count / taken


@contextlib.contextmanager
def mps() -> Iterator[dict[str, str]]:
    """NVIDIA's Multi-Process Service, for processes with this environment; it ends with the context.

    Raises:
        OSError: it cannot be started.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile("w+") as log:
        environment = {f"CUDA_MPS_{name}_DIRECTORY": os.path.join(folder, name) for name in ("PIPE", "LOG")}
        for path in environment.values():
            Path(path).mkdir()
        command, until = [MPS_CONTROL, "-f"], time.monotonic() + MPS_SECONDS
        # In a group of its own, so that the server that it starts ends with it.
        control = subprocess.Popen(
            command, env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while _asked("get_server_list", environment).returncode:
                if control.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    said = log.read().strip().splitlines()[-1:] or ["it says nothing"]
                    raise OSError(f"{MPS_CONTROL} does not start: {said[0]}")
                time.sleep(0.1)
            yield environment
        finally:
            with contextlib.suppress(OSError):
                _asked("quit", environment)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(control.pid, signal.SIGKILL)
            control.wait()


def _asked(text: str, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """A command to the service, and its answer.

    Raises:
        OSError: there is none.
    """
    told: dict[str, Any] = {"input": f"{text}\n", "env": os.environ | environment, "timeout": MPS_SECONDS}
    try:
        return subprocess.run([MPS_CONTROL], **told, capture_output=True, text=True)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{MPS_CONTROL} does not answer") from error
