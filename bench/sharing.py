"""Trainings per hour on one device when several processes share it.

Each process trains its own network. All start a window of some seconds together; their samples per second are summed.
On a GPU they share by time slices or through NVIDIA's Multi-Process Service (MPS). Threads of one process with a stream
each are not measured: they would share one interpreter and one random generator.
"""

import contextlib
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.network import EPOCHS, NetworkCase
from bench.processes import Worker, running
from bench.results import Shared
from bench.suites import AT, SUITES
from qkernels.runtime.precision import switched

OURS = next(provider for provider in EPOCHS.providers if provider.name == "ours")
PRECISIONS = ("bf16", "float32")
PROCESSES, MPS, MPS_CONTROL = "processes", "MPS", "nvidia-cuda-mps-control"
COUNTS = {PROCESSES: (1, 8, 4, 2), MPS: (8, 16, 4, 2)}  # numbers of processes on a GPU, the most valuable first
WARM = 3  # epochs before the first window
SECONDS = {"cpu": 3.0, "cuda": 2.0}  # length of a window
ROUNDS = {"cpu": 3, "cuda": 1}  # windows per row, in turns; several on a CPU, which other programs may use too
# Seconds after which a process hangs that has not started, or not answered in a window; and for MPS to answer.
START_SECONDS, WINDOW_SECONDS, MPS_SECONDS = 240.0, 60.0, 10.0
LEAD = 0.2  # seconds until a window opens, so that all its processes have got the message


class Setting(NamedTuple):
    """How a device is shared, by the fields of `Shared`."""

    mode: str
    processes: int
    threads_each: int


class Window(NamedTuple):
    """Samples per second of all processes and highest peak memory of one; `status` tells why there are none."""

    rate: float | None = None
    peak: int | None = None
    status: str = "ok"


def cases(device: torch.device) -> list[NetworkCase]:
    """The trainings: the quaternion network with anti-transfer at layer 2, small on a CPU."""
    epochs = SUITES["epoch" if device.type == "cuda" else "cpu"][-1]
    return [case for case in epochs.where(network="quaternion", layer=AT) if case.precision in PRECISIONS]


def plan(device: torch.device, cores: int) -> dict[str, list[Setting]]:
    """Settings by mode; in the first, one process has the device to itself, in the others processes share the cores."""
    if device.type == "cpu":
        return {PROCESSES: list(dict.fromkeys(Setting(PROCESSES, *n) for n in ((1, cores), (1, 1), (cores, 1))))}
    return {mode: [Setting(mode, n, max(1, cores // n)) for n in several] for mode, several in COUNTS.items()}


def measured(
    trained: Sequence[NetworkCase], device: torch.device, cores: int, deadline: float
) -> Iterator[list[Shared]]:
    """All rows so far, after each window; prints how many are dropped at the deadline (`time.monotonic`)."""
    windows: dict[tuple[NetworkCase, Setting], list[Window]] = {}
    for case in trained:
        for mode, settings in plan(device, cores).items():
            for setting, window in _pooled(case, mode, settings, device, deadline):
                windows.setdefault((case, setting), []).append(window)
                yield rows(windows)
            if dropped := sum((case, setting) not in windows for setting in settings):
                print(f"dropped, out of budget: {dropped} rows of {case}, {mode}", flush=True)


def rows(windows: Mapping[tuple[NetworkCase, Setting], Sequence[Window]]) -> list[Shared]:
    """A row for each setting, in order."""
    alone: dict[NetworkCase, float | None] = {}
    lines = []
    for (case, setting), several in windows.items():
        rates = [window.rate for window in several if window.rate is not None]
        rate, status = (statistics.median(rates), "ok") if rates else (None, several[-1].status)
        first = alone.setdefault(case, rate)
        values: dict[str, Any] = {
            "samples_per_second": rate,
            "trainings_relative": rate / first if rate and first else None,
        }
        peak = max((window.peak for window in several if window.peak is not None), default=None)
        lines.append(Shared(**case.case, **setting._asdict(), status=status, **values, peak_bytes=peak))
    return lines


def most(shared: Sequence[Shared], precision: str) -> Shared | None:
    """The row with the most trainings per hour."""
    right = [row for row in shared if row.precision == precision and row.status == "ok" and row.trainings_relative]
    return max(right, key=lambda row: row.trainings_relative or 0.0, default=None)


def _pooled(
    case: NetworkCase, mode: str, settings: Sequence[Setting], device: torch.device, deadline: float
) -> Iterator[tuple[Setting, Window]]:
    """Windows of the settings in turns, in processes that are started once."""
    if time.monotonic() > deadline:
        return
    service = mps() if mode == MPS else contextlib.nullcontext(dict[str, str]())
    try:
        with service as environment:
            count = max(setting.processes for setting in settings)
            with _pool(case, device, count, environment, deadline) as workers:
                if environment and workers and not _ask_mps("get_server_list", environment).stdout.strip():
                    raise OSError("no process came to it")
                for setting in list(settings) * ROUNDS[device.type]:
                    if time.monotonic() > deadline:
                        break
                    yield setting, _window(workers, setting, SECONDS[device.type])
    except OSError as error:
        if mode != MPS:
            raise
        for setting in settings:
            yield setting, Window(status=f"no MPS: {error}")


def _window(workers: list[Worker], setting: Setting, seconds: float) -> Window:
    """One window of the first workers; a worker that fails or hangs is ended and removed from `workers`."""
    chosen, status = workers[: setting.processes], "ok"
    if len(chosen) < setting.processes:
        return Window(status="failed")
    start, until = time.time() + LEAD, time.monotonic() + seconds + WINDOW_SECONDS
    for worker in chosen:
        with contextlib.suppress(OSError):
            worker.pipe.send((start, seconds, setting.threads_each))
    rates, peaks = [], []
    for worker in chosen:
        try:
            rate, peak = worker.receive(until)
            rates.append(rate)
            peaks.append(peak)
        except (EOFError, OSError) as error:
            status = "out of time" if isinstance(error, TimeoutError) else "failed"
            worker.end()
            workers.remove(worker)
    if status != "ok":
        return Window(status=status)
    return Window(sum(rates), max((peak for peak in peaks if peak is not None), default=None))


@contextlib.contextmanager
def _pool(
    case: NetworkCase, device: torch.device, count: int, environment: dict[str, str], deadline: float
) -> Iterator[list[Worker]]:
    """Processes that are ready to train; all end with the block."""
    with contextlib.ExitStack() as stack:
        start = (Worker.start(_serve, case, device.type, environment) for _ in range(count))
        workers = [stack.enter_context(worker) for worker in start]
        # A process that has not started after half of the remaining time is ended.
        until, ready = time.monotonic() + min(START_SECONDS, (deadline - time.monotonic()) / 2), []
        for worker in workers:
            try:
                worker.receive(until)
                ready.append(worker)
            except (EOFError, OSError):
                worker.end()
        yield ready


def _serve(pipe: Connection, case: NetworkCase, device: str, environment: dict[str, str]) -> None:
    """Run in each process: warm up, send "ready", then rate and peak memory of each window."""
    os.environ.update(environment)
    on_gpu = device == "cuda"
    with switched(case.precision), contextlib.suppress(EOFError):
        epoch = OURS.build(case, case.operands(torch.device(device)))

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
            pipe.send((rate, torch.cuda.max_memory_allocated() if on_gpu else None))


def runs_per_second(run: Callable[[], None], seconds: float) -> float:
    """Rate of the runs that start within the window; one more run keeps the device busy while others finish."""
    start, count = time.perf_counter(), 0
    while (taken := time.perf_counter() - start) < seconds:
        run()
        count += 1
    run()
    return count / taken


@contextlib.contextmanager
def mps() -> Iterator[dict[str, str]]:
    """NVIDIA's Multi-Process Service, for processes with these environment variables; it ends with the block.

    Raises:
        OSError: it cannot be started.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        log = stack.enter_context(tempfile.TemporaryFile("w+"))
        environment = {f"CUDA_MPS_{name}_DIRECTORY": os.path.join(folder, name) for name in ("PIPE", "LOG")}
        for path in environment.values():
            Path(path).mkdir()
        until = time.monotonic() + MPS_SECONDS
        # The server that it starts is in its process group and ends with it.
        service = running([MPS_CONTROL, "-f"], environment, stdout=log, stderr=subprocess.STDOUT)
        control = stack.enter_context(service)
        try:
            while _ask_mps("get_server_list", environment).returncode:
                if control.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    last = log.read().strip().splitlines()[-1:] or ["it says nothing"]
                    raise OSError(f"{MPS_CONTROL} does not start: {last[0]}")
                time.sleep(0.1)
            yield environment
        finally:
            with contextlib.suppress(OSError):
                _ask_mps("quit", environment)


def _ask_mps(command: str, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Send a command to the service; returns its answer.

    Raises:
        OSError: it does not answer.
    """
    options: dict[str, Any] = {"input": f"{command}\n", "env": os.environ | environment, "timeout": MPS_SECONDS}
    try:
        return subprocess.run([MPS_CONTROL], **options, capture_output=True, text=True)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{MPS_CONTROL} does not answer") from error
