"""Profile of training steps: a one-page table, and Chrome traces."""

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

PHASES = ("gather", "forward", "twin", "loss", "backward", "optimiser")
COUNT = 5
"""Number of profiled steps of each kind."""
LINES = 24


class Profile:
    """Profiles some of the first training steps, without changing the training.

    ``profile.txt`` lists the phases of a step (``twin`` and ``loss`` are parts of ``forward``), then its operators or
    kernels by time. Phases are only known of eager steps; on a GPU, where steps are captured as CUDA graphs, as many
    captured ones are profiled as well. ``trace.json`` and ``trace-captured.json`` open in chrome://tracing or
    ui.perfetto.dev.

    Args:
        steps: steps of the training.
        folder: folder of the files, which are written when the profiled steps are done.
    """

    def __init__(self, steps: Steps, folder: Path) -> None:
        self.steps, self.folder = steps, folder
        self.pending = ["trace"]
        if steps.graphs is not None:
            self.pending.append("trace-captured")
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
        if self.steps.graphs is not None:
            self.steps.graphs.warm = WARM
        if self.pending:
            size = self.steps.config.batch
            log.warning(
                "--profile: after the first %d steps there were no %d consecutive steps of %d samples",
                WARM,
                COUNT,
                size,
            )

    @contextlib.contextmanager
    def step(self, batch: Batch) -> Iterator[None]:
        """Context of every training step. A short batch restarts the profile, so that profiled steps are equal."""
        if batch.whole < self.steps.config.batch:
            self._running.close()
            self._seen = 0
        elif self._wait:
            self._wait -= 1
        elif self.pending:
            if not self._seen:
                self._start()
            yield
            self._seen += 1
            if self._seen == COUNT:
                self._stop(self.pending.pop(0))
            return
        yield

    def _start(self) -> None:
        # With autograd's own thread, kernels would not be attributed to the backward pass.
        self._running.enter_context(torch.autograd.set_multithreading_enabled(False))
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.steps.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = self._running.enter_context(torch.profiler.profile(activities=activities))
        self._started = self._now()

    def _stop(self, name: str) -> None:
        seconds = (self._now() - self._started) / COUNT
        self._running.close()
        self._seen, self._wait = 0, 1  # the next step is the capture
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
        events: averages over `COUNT` steps, from PyTorch's profiler.
        seconds: time of one step.
        steps: profiled steps.
        captured: whether steps were replays of a CUDA graph.
    """
    cuda, config, whole = steps.device.type == "cuda", steps.config, 1e3 * seconds
    name, all_, own = ("CUDA", "device_time_total", "self_device_time_total") if cuda else (
        "CPU", "cpu_time_total", "self_cpu_time_total")  # fmt: skip
    # On a GPU the profiler also marks the spans of phases and of the optimiser, beside the kernels in them.
    work = [e for e in events if e.device_type.name == name and e.key not in PHASES]
    work = [e for e in work if not (cuda and e.is_user_annotation)]
    work.sort(key=lambda event: -getattr(event, own))

    def line(name: str, microseconds: float, calls: str = "") -> str:
        milliseconds = 1e-3 * microseconds / COUNT
        return f"{name[:60]:60} {milliseconds:10.3f} ms {milliseconds / whole:6.1%} {calls:>6}".rstrip()

    def total(these: Sequence[Any]) -> float:
        return float(sum(getattr(event, own) for event in these))

    kind = "captured as a CUDA graph" if captured else "one operator after another"
    spans = {e.key: getattr(e, all_) for e in events if e.key in PHASES and e.device_type.name == "CPU"}
    return "\n".join(
        [
            f"A training step, {kind}: {whole:.3f} ms",
            f"{device_name(steps.device)}; batch {config.batch}, {config.precision}; mean of {COUNT} profiled steps",
            "",
            *([line("the GPU computes", total(work)), ""] if cuda else []),
            *(line(phase, spans[phase]) for phase in PHASES if phase in spans),
            "",
            f"{'kernel' if cuda else 'operator, without those that it calls':82} calls",
            *(line(event.key, getattr(event, own), f"{event.count / COUNT:.0f}") for event in work[:LINES]),
            line(f"{len(work[LINES:])} others", total(work[LINES:])),
            "",
        ]
    )
