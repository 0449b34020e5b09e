"""What a run costs in a process of its own: its first call, and all memory.

Each headline case is run in one new process after the other, which finds the kernels that were compiled before; then
all of ours at once, with empty caches. The memory of the GPU is NVML's, which also counts what the allocator does not
know of: CUDA's context, libraries, the kernels themselves.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.case import Case, Provider
from bench.processes import start
from bench.timing import Nvml
from qkernels.runtime.precision import switched

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
SECONDS = 600  # after which a process is ended
REPORT = "fresh: "


class Fresh(NamedTuple):
    """One line of fresh.csv; what was not measured is empty.

    Args:
        suite, network, layer, variant, batch, precision, work: the case.
        provider: who computed it.
        status: "ok", "failed" or "out of time".
        first_call_s: seconds of building and running it for the first time, with kernels compiled before.
        cold_call_s: the same with nothing compiled before, while the others of the table do so too.
        peak_bytes: most memory of the GPU's allocator, operands included.
        gpu_bytes: the GPU's memory that the process took, by NVML.
        host_bytes: on a CPU, what the process' resident memory grew by after its imports, at most.
    """

    suite: str
    network: str
    layer: str
    variant: str
    batch: int
    precision: str
    work: str
    provider: str
    status: str
    first_call_s: float | None = None
    cold_call_s: float | None = None
    peak_bytes: int | None = None
    gpu_bytes: int | None = None
    host_bytes: int | None = None


def measured(
    headline: Sequence[tuple[Case, Provider]], device: torch.device, deadline: float
) -> Iterator[tuple[int, Fresh]]:
    """Rows by number, each again when more is known of it; says which are out of time (`time.monotonic`)."""
    nvml = Nvml.open() if device.type == "cuda" else None
    rows: dict[int, Fresh] = {}
    for number, (case, provider) in enumerate(headline):
        if time.monotonic() > deadline:
            print(f"dropped, out of budget: {len(headline) - number} processes", flush=True)
            break
        before = nvml.used() if nvml else 0
        with _process(number, device, os.environ) as process:
            status, found = _report_of(process, deadline)
        used = found.pop("used", None)
        taken = used - before if nvml and used is not None else None
        rows[number] = Fresh(*case.key, provider.name, status, **found, gpu_bytes=taken)
        yield number, rows[number]
    if device.type == "cuda" and time.monotonic() < deadline:
        yield from _cold({n: row for n, row in rows.items() if headline[n][1].ours and row.status == "ok"}, deadline)


def _cold(rows: dict[int, Fresh], deadline: float) -> Iterator[tuple[int, Fresh]]:
    with contextlib.ExitStack() as stack:
        processes = {}
        for number in rows:
            cache = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            environment = {**os.environ, **{name: os.path.join(cache, name) for name in CACHES}}
            processes[number] = stack.enter_context(_process(number, torch.device("cuda"), environment))
        for number, process in processes.items():
            status, found = _report_of(process, deadline)
            if status == "out of time":
                print(f"dropped, out of budget: the cold call of {rows[number].layer}", flush=True)
            elif status == "ok":
                yield number, rows[number]._replace(cold_call_s=found["first_call_s"])


@contextlib.contextmanager
def _process(number: int, device: torch.device, environment: Any) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "bench", "fresh", "--device", device.type, "--only", str(number)]
    started = start(command, environment, group=False, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def _report_of(process: subprocess.Popen[str], deadline: float) -> tuple[str, dict[str, Any]]:
    """How it ended, and what it reported."""
    try:
        text, errors = process.communicate(timeout=min(SECONDS, max(1.0, deadline - time.monotonic())))
    except subprocess.TimeoutExpired:
        return "out of time", {}
    reports = [line.removeprefix(REPORT) for line in text.splitlines() if line.startswith(REPORT)]
    if process.returncode or not reports:
        print(errors.strip()[-500:], file=sys.stderr, flush=True)
        return "failed", {}
    return "ok", json.loads(reports[-1])


def report(case: Case, provider: Provider, device: torch.device) -> None:
    """Runs the case twice and prints what it took: what happens in each process."""
    on_gpu = device.type == "cuda"
    at_start = _resident()
    with switched(case.precision):
        operands = case.operands(device)
        start = time.perf_counter()
        run = provider.build(case, [operands])[0]
        run()
        if on_gpu:
            torch.cuda.synchronize()
        first = time.perf_counter() - start
        run()
    nvml = Nvml.open() if on_gpu else None
    grown = None if on_gpu or at_start is None else (_resident() or 0) - at_start
    found = {
        "first_call_s": first,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "host_bytes": grown,
        "used": nvml.used() if nvml else None,
    }
    print(REPORT + json.dumps(found), flush=True)


def _resident() -> int | None:
    """Most bytes of resident memory that this process has had; None where there is no /proc.

    Not `ru_maxrss`, which a process inherits from the one that started it.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return None
