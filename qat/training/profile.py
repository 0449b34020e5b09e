"""Where a training step's time goes: a table of one page, and Chrome traces."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from qat.files import replacing, write_text
from qat.training.distributed import device_name
from qat.training.examples import Batch
from qat.training.steps import WARM, Steps

log = logging.getLogger(__name__)

PHASES = ("gather", "forward", "twin", "backward", "optimiser")
COUNT = 5
"""Steps of each kind that are looked at."""
LINES = 24


class Profile:
    """Looks at some of the first training steps; the training is the same as without.

    ``profile.txt`` has the phases of a step (``twin`` is a part of ``forward``), then its operators or kernels by the
    time that they take. Phases are known of steps that run one operator after another; on a GPU, where steps are
    captured as CUDA graphs, as many of those are looked at as well. ``trace.json`` and ``trace-captured.json`` open in
    chrome://tracing or ui.perfetto.dev.

    Args:
        steps: of the training.
        folder: for the files, which appear when the steps are done.
    """

    def __init__(self, steps: Steps, folder: Path) -> None:
        self.steps, self.folder = steps, folder
        self.wanted = ["trace"]
        if steps.graphs is not None:
            self.wanted.append("trace-captured")
            steps.graphs.warm = math.inf
        self._wait, self._seen = WARM, 0
        self._pages: list[str] = []
        self._running = contextlib.ExitStack()

    def __enter__(self) -> Profile:
        self.steps.around = self.step
        return self

    def __exit__(self, *_: object) -> None:
        self.steps.around = lambda batch: contextlib.nullcontext()
        self._running.close()
        if self.wanted:
            size = self.steps.config.batch
            log.warning("--profile: no epoch had %d steps of %d samples to look at", WARM + COUNT, size)

    @contextlib.contextmanager
    def step(self, batch: Batch) -> Iterator[None]:
        """Around every training step. A short batch among those that are looked at has them begin anew."""
        if batch.everyones < self.steps.config.batch:
            self._running.close()
            self._seen = 0
        elif self._wait:
            self._wait -= 1
        elif self.wanted:
            if not self._seen:
                self._start()
            yield
            self._seen += 1
            if self._seen == COUNT:
                self._stop(self.wanted.pop(0))
            return
        yield

    def _start(self) -> None:
        # In a thread of autograd's own, kernels would not count as the backward pass's.
        self._running.enter_context(torch.autograd.set_multithreading_enabled(False))
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.steps.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = self._running.enter_context(torch.profiler.profile(activities=activities))
        self._started = self._now()

    def _stop(self, name: str) -> None:
        seconds = (self._now() - self._started) / COUNT
        self._running.close()
        self._seen, self._wait = 0, 1  # the next step is captured, none to look at
        if self.steps.graphs is not None:
            self.steps.graphs.warm = WARM
        with replacing(self.folder / f"{name}.json") as draft:
            self._profiler.export_chrome_trace(str(draft))
        self._pages.append(page(self._profiler.key_averages(), seconds, self.steps, captured=name != "trace"))
        write_text(self.folder / "profile.txt", "\n".join(self._pages))

    def _now(self) -> float:
        if self.steps.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def page(events: Sequence[Any], seconds: float, steps: Steps, *, captured: bool) -> str:
    """The table of one kind of steps.

    Args:
        events: averages over `COUNT` steps, as PyTorch's profiler gives them.
        seconds: of one step.
        steps: what was profiled.
        captured: whether steps were replays of a CUDA graph.
    """
    cuda = steps.device.type == "cuda"
    where = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    times = {
        (event.key, event.count): 1e-3 * getattr(event, own) / COUNT
        for event in events
        if event.device_type == where and event.key not in PHASES
    }
    busy, whole = sum(times.values()), 1e3 * seconds
    kind = "captured as a CUDA graph" if captured else "one operator after another"
    config = steps.config
    lines = [
        f"A training step, {kind}: {whole:.3f} ms",
        f"{device_name(steps.device)}; batch {config.batch}, {config.precision}; mean of {COUNT} steps, looked at",
        "",
    ]
    if cuda:
        lines += [f"{'the GPU computes':60} {busy:10.3f} ms {busy / whole:6.1%}", ""]
    phase = "device_time_total" if cuda else "cpu_time_total"
    spans = {e.key: 1e-3 * getattr(e, phase) / COUNT for e in events if e.key in PHASES and e.device_type.name == "CPU"}
    lines += [f"{name:60} {spans[name]:10.3f} ms {spans[name] / whole:6.1%}" for name in PHASES if name in spans]
    lines += ["", f"{'kernel' if cuda else 'operator, without those that it calls':60} {'':>13} {'':6} {'calls':>6}"]
    shown = sorted(times.items(), key=lambda item: -item[1])
    for (name, count), time_ in shown[:LINES]:
        lines.append(f"{name[:60]:60} {time_:10.3f} ms {time_ / whole:6.1%} {count / COUNT:6.0f}")
    rest = shown[LINES:]
    lines.append(f"{f'{len(rest)} others':60} {sum(t for _, t in rest):10.3f} ms")
    return "\n".join(lines) + "\n"
