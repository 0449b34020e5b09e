"""Options of campaigns: trainings, machines and assumed cost. Imports no PyTorch, so that help is quick."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, fields
from typing import Literal

from qat.config.experiment import require
from qat.config.preset import PAPER_CORPORA, PAPER_SPLITS, VALUES, check_values


@dataclass(frozen=True)
class Selection:
    """Emotion trainings of the paper's grid; the networks that they build on are added.

    Args:
        corpora: emotion corpora, see ``qat corpus list``.
        networks: ``quaternion``, ``real``.
        splits: ``random``, ``actor``; ``confounded`` for the demo corpus.
        at: kinds of anti-transfer: ``none``, ``single_S``, ``single_W``, ``dual_SW``, ``dual_WS``.
        layers: layers of anti-transfer, 1 to 13.
    """

    corpora: list[str] = field(default_factory=lambda: list(PAPER_CORPORA))
    networks: list[str] = field(default_factory=lambda: list(VALUES["network"]))
    splits: list[str] = field(default_factory=lambda: list(PAPER_SPLITS))
    at: list[str] = field(default_factory=lambda: list(VALUES["at"]))
    layers: list[int] = field(default_factory=lambda: list(VALUES["layer"][1:]))

    def __post_init__(self) -> None:
        from qat.data.corpora import EMOTION

        allowed = (EMOTION, VALUES["network"], VALUES["split"], VALUES["at"], VALUES["layer"][1:])
        for name, values in zip([option.name for option in fields(self)], allowed, strict=True):
            chosen = getattr(self, name)
            check_values(name, chosen, values)
            require(chosen and len(set(chosen)) == len(chosen), name, chosen, "one or more, each once")


@dataclass(frozen=True)
class SlurmConfig:
    """Resources of each job on a Slurm cluster.

    Args:
        partition: partition of the jobs; the cluster's default if absent.
        account: account to be charged; the user's default if absent.
        minutes: time limit of a job. A job that reaches it or is preempted is requeued and continues.
        gpus: GPUs of a job.
        cpus: cores of a job; one for each simultaneous training if absent.
        mem: memory of a job in GB; the cluster's default if absent.
        extra: further options of sbatch by their long names, e.g. ``{qos: high, constraint: a100}``.
    """

    partition: str | None = None
    account: str | None = None
    minutes: int = 1440
    gpus: int = 1
    cpus: int | None = None
    mem: float | None = None
    extra: dict[str, str | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("minutes", 1), ("gpus", 0), ("cpus", 1)):
            value = getattr(self, name)
            require(value is None or value >= least, f"slurm.{name}", value, f"at least {least}")
        require(self.mem is None or self.mem > 0, "slurm.mem", self.mem, "above 0")


@dataclass(frozen=True)
class Layout:
    """Where trainings run, and how many at the same time.

    Args:
        at_once: number of simultaneous trainings in each job, which share its GPU; if above 1, each has one CPU thread.
        jobs: number of jobs; runs are assigned round-robin, and an idle job takes runs that nobody has started. If
            absent, one for each visible GPU, or one without GPUs.
        cluster: ``slurm``, ``local`` (this machine), or ``auto``: ``slurm`` where the command sbatch exists.
        slurm: resources of each Slurm job.
    """

    at_once: int = 1
    jobs: int | None = None
    cluster: Literal["auto", "local", "slurm"] = "auto"
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def __post_init__(self) -> None:
        for name in ("at_once", "jobs"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        if self.cluster == "slurm" and shutil.which("sbatch") is None:
            raise ValueError("cluster: 'slurm' needs the command sbatch, which is not on the PATH")

    @property
    def is_slurm(self) -> bool:
        return self.cluster == "slurm" or (self.cluster == "auto" and shutil.which("sbatch") is not None)


@dataclass(frozen=True)
class Assumed:
    """Assumed cost of a training where nothing was measured.

    Args:
        epochs: number of epochs of a training, within the limits of its settings (maximum epochs, patience).
        tflops: rate of a training in 1e12 operations per second.
    """

    epochs: int = 60
    tflops: float = 10.0

    def __post_init__(self) -> None:
        for name in ("epochs", "tflops"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
