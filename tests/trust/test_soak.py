"""Thousands of steps: memory, open files and the time of a step stay what they were."""

import csv
import os
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
"""A step's time in the last tenth by that in the second: medians of a hundred epochs each differ by less than 10 % on a
machine that is otherwise idle; what grows with the number of steps would show as a multiple."""


@pytest.mark.parametrize(
    "steps", [300, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])], ids=["short", "long"]
)
def test_nothing_grows_with_the_number_of_steps(
    steps: int, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(checkpoints: loop._Checkpoints, *, ended: bool) -> None:
        written(checkpoints, ended=ended)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen.append((pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))))

    seen: list[tuple[int, int]] = []
    written = loop._Checkpoints.update
    monkeypatch.setattr(loop._Checkpoints, "update", update)
    epochs = steps // 4
    training = replace(experiment.training, batch=8, epochs=epochs, patience=epochs, checkpoint_seconds=0.5)
    train_classifier(replace(experiment, training=training), tmp_path / "run", quiet=True)
    memory, files = np.array(seen).T
    tenth = epochs // 10
    assert memory[-tenth:].max() - memory[tenth : 2 * tenth].max() < GROWTH
    assert files[-1] <= files[tenth]
    with (tmp_path / "run/metrics.csv").open() as file:
        seconds = np.array([float(row["seconds"]) for row in csv.DictReader(file)])
    if steps > 1000:
        slower = np.median(seconds[-tenth:]) / np.median(seconds[tenth : 2 * tenth])
        print(
            f"\n{steps} steps: {(memory[-1] - memory[tenth]) / 2**20:.1f} MiB more, a step {slower:.2f} times as long"
        )
        assert slower < SLOWER
