"""Cost of a case in a process of its own: time of the first call, and memory.

The headline cases run one after another, each in a new process that finds kernels compiled earlier. Then all of ours
run at the same time with empty caches. GPU memory is measured by NVML, which also counts what the allocator does not:
CUDA's context, libraries, the kernels themselves.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.case import Case, Provider
from bench.processes import Worker
from bench.results import Fresh
from bench.suites import HEADLINE
from bench.timing import Nvml
from qkernels.runtime.precision import switched

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
SECONDS = 600  # until a process is killed


def measured(device: str, deadline: float) -> Iterator[tuple[int, Fresh]]:
    """Numbered rows; a row is yielded again when more of it is measured. Prints how many are dropped at the
    deadline."""
    nvml = Nvml.open() if device == "cuda" else None
    ours: dict[int, Fresh] = {}
    for number, (case, provider) in enumerate(HEADLINE[device]):
        if time.monotonic() > deadline:
            print(f"dropped, out of budget: {len(HEADLINE[device]) - number} processes", flush=True)
            break
        before = nvml.used() if nvml else 0
        with Worker.start(_report, device, number, {}) as worker:
            status, costs = _received(worker, deadline)
        used = costs.pop("used", None)
        gpu_bytes = used - before if nvml and used is not None else None
        row = Fresh(**case.case, provider=provider.name, status=status, gpu_bytes=gpu_bytes, **costs)
        if provider.ours and status == "ok":
            ours[number] = row
        yield number, row
    if device == "cuda" and time.monotonic() < deadline:
        yield from _cold(ours, device, deadline)


def _cold(rows: Mapping[int, Fresh], device: str, deadline: float) -> Iterator[tuple[int, Fresh]]:
    """The rows with the time of a first call without compiled kernels; all run at the same time."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for number in rows:
            cache = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            caches = {name: os.path.join(cache, name) for name in CACHES}
            workers[number] = stack.enter_context(Worker.start(_report, device, number, caches))
        for number, worker in workers.items():
            status, costs = _received(worker, deadline)
            if status == "out of time":
                print(f"dropped, out of budget: the cold call of {rows[number].layer}", flush=True)
            elif status == "ok":
                yield number, replace(rows[number], cold_call_s=costs["first_call_s"])


def _received(worker: Worker, deadline: float) -> tuple[str, dict[str, Any]]:
    """The status of a process, and its reported costs."""
    now = time.monotonic()
    try:
        return "ok", worker.receive(min(now + SECONDS, max(now + 1, deadline)))
    except TimeoutError:
        return "out of time", {}
    except (EOFError, OSError):
        return "failed", {}


def _report(pipe: Connection, device: str, number: int, caches: Mapping[str, str]) -> None:
    os.environ.update(caches)
    pipe.send(costs(*HEADLINE[device][number], torch.device(device)))


def costs(case: Case, provider: Provider, device: torch.device) -> dict[str, Any]:
    """Cost of running the case twice in this process, by fields of `Fresh`, and `used`: memory of all processes on the
    GPU."""
    on_gpu = device.type == "cuda"
    at_start = _peak_resident()
    with switched(case.precision):
        operands = case.operands(device)
        start = time.perf_counter()
        run = provider.build(case, operands)
        run()
        if on_gpu:
            torch.cuda.synchronize()
        first = time.perf_counter() - start
        run()
    nvml = Nvml.open() if on_gpu else None
    return {
        "first_call_s": first,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "host_bytes": None if on_gpu or at_start is None else (_peak_resident() or 0) - at_start,
        "used": nvml.used() if nvml else None,
    }


def _peak_resident() -> int | None:
    """Peak resident memory of this process in bytes; None without /proc.

    Not `ru_maxrss`, which a process inherits from its parent.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return None
