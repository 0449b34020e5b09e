"""What the engine's tests need to know of runs that are being trained in other processes."""

import importlib
import json
import multiprocessing
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from qat.campaign import jobs
from qat.campaign.options import Layout
from qat.campaign.plan import Campaign
from qat.config import AnyExperiment, Experiment
from qat.files import Busy, held

LOCAL = Layout(cluster="local")


def campaign_of(folder: Path, experiments: Mapping[str, AnyExperiment]) -> tuple[Campaign, dict[str, Path]]:
    """A campaign of independent trainings, and its run folders by the trainings' names."""
    campaign = Campaign(folder)
    return campaign, {name: campaign.add(experiment, name) for name, experiment in experiments.items()}


def longer(experiment: Experiment, epochs: int, seed: int = 1) -> Experiment:
    """So many epochs, each of which is saved."""
    training = replace(experiment.training, epochs=epochs, patience=epochs, checkpoint_seconds=0.0, seed=seed)
    return replace(experiment, training=training)


def fork_instead_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is trained, not of jobs: each of these imports for 9 s of a core before it trains."""

    def drive(driver: jobs._Driver) -> Path:
        for run in driver.runs:
            if run.is_free():
                process = multiprocessing.get_context("fork").Process(target=jobs._train, args=(run, True))
                process.start()
                process.join()
                assert process.exitcode == 0
        return driver.logs

    for name in jobs._IMPORTED:
        importlib.import_module(name)
    monkeypatch.setattr(jobs._Driver, "drive", drive)


def wait_for(condition: Callable[[], object], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def trainer(run: Path) -> int:
    """The process that trains a run."""
    process: int = json.loads((run / ".lock.holder").read_text())["process"]
    return process


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def is_locked(run: Path) -> bool:
    try:
        with held(run / ".lock"):
            return False
    except Busy:
        return True
