"""Thousands of steps: memory, open files and the time of a step stay what they were."""

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qat.config import Experiment
from qat.training import loop
from qat.training.classifier import train_classifier

GROWTH = 8 << 20
"""Bytes that the process may grow by: those of the rows in `metrics.csv`, and what the allocator keeps. A leaked batch
a step would be 300 MB in 10,000."""

SLOWER = 1.2
"""Processor time of an epoch in the last tenth by that in the second. Medians of 250 epochs each differ by some percent
with what else the machine does; a cost that grows with the number of steps would be five times as high."""


@pytest.mark.parametrize(
    "steps", [300, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])], ids=["short", "long"]
)
def test_nothing_grows_with_the_number_of_steps(
    steps: int, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(checkpoints: loop._Checkpoints, *, ended: bool) -> None:
        written(checkpoints, ended=ended)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen.append((pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), time.process_time()))

    seen: list[tuple[float, ...]] = []
    written = loop._Checkpoints.update
    monkeypatch.setattr(loop._Checkpoints, "update", update)
    epochs = steps // 4
    training = replace(experiment.training, batch=8, epochs=epochs, patience=epochs, checkpoint_seconds=0.5)
    train_classifier(replace(experiment, training=training), tmp_path / "run", quiet=True)
    memory, files, clock = np.array(seen).T
    tenth = epochs // 10
    growth = memory[-tenth:].max() - memory[tenth : 2 * tenth].max()
    assert growth < GROWTH
    assert files[-1] <= files[tenth]
    if steps > 1000:
        seconds = np.diff(clock)
        slower = np.median(seconds[-tenth:]) / np.median(seconds[tenth : 2 * tenth])
        print(f"\n{steps} steps: {growth / 2**20:.1f} MiB more, a step takes {slower:.2f} times as long")
        assert slower < SLOWER
