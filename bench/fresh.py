"""What a case costs in a process of its own: first call, and all memory.

Each headline case runs in one new process after the other, which finds the kernels that were compiled before; then all
of ours run at once, with empty caches. The memory of the GPU is NVML's, which also counts what the allocator does not
know of: CUDA's context, libraries, the kernels themselves.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.case import Case, Provider
from bench.processes import PYTHON, running
from bench.results import Fresh
from bench.timing import Nvml
from qkernels.runtime.precision import switched

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
SECONDS = 600  # until a process is killed
REPORT = "fresh: "


def measured(
    headline: Sequence[tuple[Case, Provider]], device: torch.device, deadline: float
) -> Iterator[tuple[int, Fresh]]:
    """Rows by number, each again when more of it is measured; prints how many are dropped (`time.monotonic`)."""
    nvml = Nvml.open() if device.type == "cuda" else None
    warm: dict[int, Fresh] = {}
    for number, (case, provider) in enumerate(headline):
        if time.monotonic() > deadline:
            print(f"dropped, out of budget: {len(headline) - number} processes", flush=True)
            break
        before = nvml.used() if nvml else 0
        with _process(number, device) as process:
            status, values = _report_of(process, deadline)
        used = values.pop("used", None)
        gpu_bytes = used - before if nvml and used is not None else None
        row = Fresh(**case.case, provider=provider.name, status=status, gpu_bytes=gpu_bytes, **values)
        if provider.ours and status == "ok":
            warm[number] = row
        yield number, row
    if device.type == "cuda" and time.monotonic() < deadline:
        yield from _cold(warm, device, deadline)


def _cold(rows: Mapping[int, Fresh], device: torch.device, deadline: float) -> Iterator[tuple[int, Fresh]]:
    """The rows with their first call where nothing is compiled, all at the same time."""
    with contextlib.ExitStack() as stack:
        processes = {}
        for number in rows:
            cache = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            caches = {name: os.path.join(cache, name) for name in CACHES}
            processes[number] = stack.enter_context(_process(number, device, caches))
        for number, process in processes.items():
            status, values = _report_of(process, deadline)
            if status == "out of time":
                print(f"dropped, out of budget: the cold call of {rows[number].layer}", flush=True)
            elif status == "ok":
                yield number, replace(rows[number], cold_call_s=values["first_call_s"])


def _process(
    number: int, device: torch.device, variables: Mapping[str, str] | None = None
) -> AbstractContextManager["subprocess.Popen[str]"]:
    command = [*PYTHON, "bench", "fresh", "--device", device.type, "--only", str(number)]
    return running(command, variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _report_of(process: "subprocess.Popen[str]", deadline: float) -> tuple[str, dict[str, Any]]:
    """The status of a process, and what it reported."""
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
    """Run the case twice and print its cost, which is what each process does."""
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
    values = {
        "first_call_s": first,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "host_bytes": None if on_gpu or at_start is None else (_peak_resident() or 0) - at_start,
        "used": nvml.used() if nvml else None,
    }
    print(REPORT + json.dumps(values), flush=True)


def _peak_resident() -> int | None:
    """Peak resident memory of this process in bytes; None where there is no /proc.

    Not `ru_maxrss`, which a process inherits from the one that started it.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return None
