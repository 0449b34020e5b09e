"""Many trainings from one plan: on this machine's processors or GPUs, or as a job array of a Slurm cluster.

The runs' folders are the only state. Whoever trains a run holds the lock in its folder (and, for a moment, whoever
looks whether it is free), so that the same sweep may be started again at any time, wherever it was stopped: finished
runs are left alone, the others go on.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from jsonargparse import ArgumentParser

from qat.config import AnyExperiment, Experiment, RHEmoExperiment, flatten
from qat.config.plain import check, instantiate, parser_of, prefix_errors
from qat.files import write_text
from qat.processes import bar
from qat.training.checkpoint import check_run
from qkernels.losses import Loss

C = TypeVar("C")
Status = Literal["finished", "failed", "busy", "stopped", "waiting"]

SEED = "training.seed"

_IMPORTED = [__name__, "qat.training.classifier", "torchmetrics", "torch.utils.tensorboard", "torch._inductor"]
"""What every training imports, which takes seconds and is done once for all of a job. None of them starts CUDA, which
does not survive a fork."""

_ASK_SLURM = 30.0
"""Seconds between questions whether jobs are still there, which matters only for those that were killed."""

_LAST_BREATH = 1.0
"""Seconds from the death of a training until it counts as failed, which a job that is being killed does not live."""

_REQUEUES = 10
"""Times that a job may use up its time limit before it is given up."""


@dataclass(frozen=True)
class SlurmConfig:
    """What every job asks of a Slurm cluster.

    Args:
        partition: where jobs queue; the cluster's default if absent.
        account: who is charged; the user's default if absent.
        minutes: time limit of a job. One that reaches it, or is preempted, queues again and goes on.
        gpus: of a job.
        cpus: cores of a job; one for each training at once if absent.
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
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"slurm.{name}: {value} must be at least {least}")
        if self.mem is not None and self.mem <= 0:
            raise ValueError(f"slurm.mem: {self.mem:g} must be above 0")


@dataclass(frozen=True)
class Layout:
    """Where trainings run, and how many at once.

    Args:
        at_once: trainings side by side in each job, on its one GPU; on a CPU each has one thread if there are several.
        jobs: the runs are dealt out to so many, and one that is through takes what others have not begun; absent: one
            for each GPU that this process sees, or one.
        cluster: ``slurm``, ``local``, or ``auto``, which is ``slurm`` where there is an sbatch.
        slurm: what jobs ask of it.
    """

    at_once: int = 1
    jobs: int | None = None
    cluster: Literal["auto", "local", "slurm"] = "auto"
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def __post_init__(self) -> None:
        for name in ("at_once", "jobs"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}: {value} must be at least 1")
        if self.cluster == "slurm" and shutil.which("sbatch") is None:
            raise ValueError("cluster: 'slurm' must have the command sbatch, which is not on the PATH")

    @property
    def is_slurm(self) -> bool:
        return self.cluster == "slurm" or (self.cluster == "auto" and shutil.which("sbatch") is not None)


@dataclass(frozen=True)
class Outcome:
    """What became of one run.

    Args:
        path: of its folder, below the sweep's.
        status: ``finished``; ``failed``: it raised, or its process died; ``busy``: somebody else is training it;
            ``stopped``: the jobs ended before it did; ``waiting``: what it builds on is not finished.
        error: one line, unless it is finished. ``error.txt`` in the run's folder has the traceback.
        result: what ``result.json`` holds, if it is finished.
    """

    path: Path
    status: Status
    error: str | None = None
    result: dict[str, Any] | None = None


def read_plan(path: Path) -> dict[Path, Experiment]:
    """Every training of a plan file, by a path that is made of what varies.

    The file holds ``base``, the settings of every run as ``qat train --config`` takes them, and ``vary``, a list of
    values for each setting that varies, by its dotted name. The runs are all combinations, the first setting varying
    slowest. Runs that differ in ``training.seed`` only are called ``seed1``, ``seed2``... in one folder.

    Args:
        path: the YAML file.

    Raises:
        ValueError: the file is no such plan, or a training has a wrong or unknown setting.
    """
    plan = ArgumentParser(exit_on_error=False)
    plan.add_argument("--base", type=dict[str, Any], default={})
    plan.add_argument("--vary", type=dict[str, list[Any]], default={})
    parser = parser_of(Experiment)
    text = path.read_text(encoding="utf-8")
    with prefix_errors(path):
        read = plan.parse_string(text)
        base, vary = read.base or {}, read.vary or {}
    with prefix_errors(path, "base"):
        for setting, value in flatten(base).items():
            check(Experiment, setting, value)
        settings = parser.parse_object(base)
    values: dict[str, list[Any]] = {}
    for setting, listed in vary.items():
        values[setting] = []
        for value in listed:
            with prefix_errors(path, "vary", f"{setting} {value!r}"):
                check(Experiment, setting, value)
                values[setting].append(parser.parse_object({setting: value})[setting])
        if not listed or any(value in values[setting][:n] for n, value in enumerate(values[setting])):
            raise ValueError(f"{path}: vary: {setting}: {listed!r} must be a list of one or more values, each once")
    names = _names(values)
    trainings = {}
    for numbers in itertools.product(*(range(len(listed)) for listed in values.values())):
        choice = dict(zip(values, numbers, strict=True))
        for setting, n in choice.items():
            settings[setting] = values[setting][n]
        with prefix_errors(
            path, ", ".join(f"{setting} {vary[setting][n]!r}" for setting, n in choice.items()) or "base"
        ):
            experiment = instantiate(parser, Experiment, settings)
        parts = {setting: names[setting][n] for setting, n in choice.items()}
        seed = [parts.pop(SEED)] if SEED in parts else []
        assert isinstance(experiment, Experiment)
        trainings[Path(",".join(parts.values()) or "base", *seed)] = experiment
    return trainings


def _names(values: dict[str, list[Any]]) -> dict[str, list[str]]:
    """What folders are called after each value of each setting: ``layers-2``, ``seed1``."""
    last = Counter(setting.rpartition(".")[2] for setting in values)
    names = {}
    for setting, listed in values.items():
        group, _, label = setting.rpartition(".")
        if setting == SEED:
            names[setting] = [f"seed{value}" for value in listed]
            continue
        if last[label] > 1 or label == "seed":
            # Reports take "seed" and a number for that of the training.
            label = group if label == "seed" else setting
        slugs = [_slug(value) for value in listed]
        if len(set(slugs)) < len(slugs) or not all(
            0 < len(slug) <= 32 and "seed" not in slug.lower() for slug in slugs
        ):
            slugs = [str(n) for n in range(1, len(slugs) + 1)]
        names[setting] = [f"{label}-{slug}" for slug in slugs]
    return names


def _slug(value: Any) -> str:
    """
    >>> _slug([2, 13]), _slug(0.5), _slug(Path("runs/voice")), _slug({"speaker": ["ann", "ben"]})
    ('2+13', '0.5', 'voice', 'speaker-ann+ben')
    """
    if isinstance(value, Loss):
        plain = value.plain()
        value = list(plain.values()) if isinstance(plain, dict) else plain
    if isinstance(value, list):
        return "+".join(map(_slug, value))
    if isinstance(value, dict):
        return "+".join(f"{key}-{_slug(one)}" for key, one in value.items())
    text = value.name if isinstance(value, Path) else str(value)
    if value is None or isinstance(value, bool):
        text = text.lower()
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.")


def train_all(trainings: Mapping[Path, AnyExperiment], folder: Path, layout: Layout | None = None) -> list[Outcome]:
    """Train every experiment in a folder of its own; go on with those that were stopped, leave those that are finished.

    Every training is a process of its own: one that fails ends no other. Paths in experiments are taken relative to the
    current folder. Where a later training builds on an earlier one, call this once for each stage.

    Args:
        trainings: the experiments by the paths of their folders below ``folder``.
        folder: for all of them; on a cluster, one that its nodes see under the same path. ``.jobs`` in it has logs.
        layout: where they run; by default one after another, on every GPU that this process sees.

    Returns:
        What became of each training, in order.

    Raises:
        ValueError: a folder holds a run of other settings, or the cluster takes no jobs; nothing was trained then.

    Notes:
        An interruption (Ctrl-C) stops the jobs. Jobs on this machine end a second after this process, however it ends;
        those of a cluster go on without it, and a second call finds their runs ``busy``. Locks are ``flock``'s.
    """
    layout = layout or Layout()
    folder = folder.absolute()
    experiments = {path: _absolute(experiment) for path, experiment in trainings.items()}
    for path, experiment in experiments.items():
        check_run(folder / path, experiment)
    runs = {folder / path: experiment for path, experiment in experiments.items()}
    runs = {run: experiment for run, experiment in runs.items() if not _result(run).is_file()}
    for run in runs:
        _error(run).unlink(missing_ok=True)
    logs = _train_in_jobs(runs, folder, layout) if runs else None
    return [_outcome(path, folder / path, logs) for path in experiments]


def _absolute(config: C) -> C:
    """The same settings with paths that do not depend on the current folder."""
    changes: dict[str, Any] = {}
    for one in dataclasses.fields(config):  # type: ignore[arg-type]
        value: Any = getattr(config, one.name)
        if dataclasses.is_dataclass(value):
            changes[one.name] = _absolute(value)
        elif isinstance(value, Path):
            changes[one.name] = value.absolute()
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def _result(folder: Path) -> Path:
    return folder / "result.json"


def _error(folder: Path) -> Path:
    return folder / "error.txt"


def _outcome(path: Path, folder: Path, logs: Path | None) -> Outcome:
    if _result(folder).is_file():
        return Outcome(path, "finished", result=json.loads(_result(folder).read_text(encoding="utf-8")))
    if _error(folder).is_file():
        return Outcome(path, "failed", _error(folder).read_text(encoding="utf-8").partition("\n")[0])
    with _lock(folder / ".lock") as free:
        if not free:
            return Outcome(path, "busy", f"{(folder / '.lock').read_text(encoding='utf-8')} is training it")
    return Outcome(path, "stopped", f"the jobs ended before it; the logs in {logs} may tell why")


@contextmanager
def _lock(file: Path) -> Iterator[bool]:
    """Hold the lock of a file, which ends with this process at the latest; yields whether it could be had.

    The file says who holds it.
    """
    import fcntl

    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {socket.gethostname()}")
            handle.flush()
            yield True


def _train_in_jobs(runs: dict[Path, AnyExperiment], folder: Path, layout: Layout) -> Path:
    """Wait until every job has ended; returns the folder of their logs."""
    from submitit import AutoExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    logging.getLogger("submitit").setLevel(logging.ERROR)
    own = folder / ".jobs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{socket.gethostname()}-{os.getpid()}"
    driver = own / "driver"
    executor = AutoExecutor(own, cluster="slurm" if layout.is_slurm else "local", slurm_max_num_timeout=_REQUEUES)
    executor.update_parameters(**_parameters(layout))
    submitted: list[Any] = []
    try:
        with _lock(driver):
            # Jobs on this machine end with this process, not by a terminal's Ctrl-C; sbatch's words are in the error.
            with _blocked(), redirect_stderr(io.StringIO()):
                submitted += executor.submit_array(_jobs(runs, layout, driver))
            _watch(submitted, list(runs), layout.is_slurm)
    except (FailedJobError, FailedSubmissionError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"cluster: 'slurm' takes no such jobs ('local' stays on this machine): {told}") from None
    except BaseException:
        for job in submitted:
            if layout.is_slurm:
                job.cancel(check=False)
            else:
                job.wait()
        raise
    return own


def _jobs(runs: dict[Path, AnyExperiment], layout: Layout, driver: Path) -> list[_Job]:
    """Every job with all runs; first its own, dealt by turns so that neighbours of like length are spread."""
    gpus = [] if layout.is_slurm else _gpus()
    jobs = min(layout.jobs or len(gpus) or 1, len(runs))
    shares = [list(runs)[n::jobs] for n in range(jobs)]
    return [
        _Job(
            runs={run: runs[run] for share in shares[n:] + shares[:n] for run in share},
            at_once=min(layout.at_once, len(shares[0])),
            one_thread=layout.at_once > 1,
            gpu=gpus[n % len(gpus)] if gpus else None,
            driver=None if layout.is_slurm else driver,
        )
        for n in range(jobs)
    ]


def _gpus() -> list[str]:
    """The GPUs that this process sees, as ``CUDA_VISIBLE_DEVICES`` calls them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(n) for n in range(count)]


def _parameters(layout: Layout) -> dict[str, Any]:
    if not layout.is_slurm:
        return {"timeout_min": 10 * 365 * 24 * 60}
    slurm = layout.slurm
    return {
        "name": "qat",
        "timeout_min": slurm.minutes,
        "gpus_per_node": slurm.gpus or None,
        "cpus_per_task": slurm.cpus or layout.at_once,
        "mem_gb": slurm.mem,
        "slurm_partition": slurm.partition,
        "slurm_account": slurm.account,
        "slurm_additional_parameters": slurm.extra or None,
    }


def _watch(jobs: list[Any], folders: list[Path], is_slurm: bool) -> None:
    """Show how many runs have ended until every job has, or nothing is left for those still in a queue."""
    asked = time.monotonic()
    array = jobs[0].job_id.partition("_")[0]
    with bar(True) as progress:
        task = progress.add_task("trainings", total=len(folders))
        ended, done = False, 0
        while not ended:
            if is_slurm:
                ended = done == len(folders) or all(job.paths.result_pickle.exists() for job in jobs)
                if not ended and time.monotonic() - asked > _ASK_SLURM:
                    asked = time.monotonic()
                    ended = not _queued(array)
            else:
                ended = all(job.done() for job in jobs)
            done = sum(_result(one).is_file() or _error(one).is_file() for one in folders)
            progress.update(task, completed=done)
            if not ended:
                time.sleep(1)
    if is_slurm:
        subprocess.run(["scancel", "--state", "PENDING", array], capture_output=True, check=False)


def _queued(array: str) -> bool:
    """Whether Slurm still has a job of this array. Its accounting, which submitit asks, is not everywhere."""
    command = ["squeue", "--noheader", "--user", str(os.getuid()), "--format", "%F"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return answer.returncode != 0 or array in answer.stdout.split()


@dataclass(frozen=True)
class _Job:
    """Trains one run after the other that is free, so many at once, each in its own process. What submitit calls.

    Args:
        runs: by their folders, in the order in which this job wants them.
        at_once: processes.
        one_thread: of each on a CPU.
        gpu: the only one that they may see; None leaves that to the cluster.
        driver: a file that is locked as long as somebody waits for this job; it ends without.
    """

    runs: dict[Path, AnyExperiment]
    at_once: int
    one_thread: bool
    gpu: str | None
    driver: Path | None

    def __call__(self) -> None:
        if self.gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpu
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_IMPORTED)
        resource_tracker.ensure_running()  # now, because starting it unblocks SIGTERM for what is started afterwards
        running: dict[int, tuple[Path, Any]] = {}
        try:
            while True:
                while len(running) < self.at_once and (folder := self._next(running)) is not None:
                    arguments = (self.runs[folder], folder, self.one_thread)
                    process = context.Process(target=_train, args=arguments)
                    with _blocked():
                        process.start()
                    running[process.sentinel] = folder, process
                if not running:
                    return
                for ended in wait(list(running), timeout=1):
                    folder, process = running.pop(ended)  # type: ignore[arg-type]
                    process.join()
                    if process.exitcode:
                        _record_death(folder, process.exitcode)
                if self.driver is not None:
                    with _lock(self.driver) as alone:
                        if alone:
                            return
        finally:
            for _, process in running.values():
                process.kill()
            for _, process in running.values():
                process.join()

    def _next(self, running: dict[int, tuple[Path, Any]]) -> Path | None:
        mine = {folder for folder, _ in running.values()}  # which may not have locked it yet
        return next((folder for folder in self.runs if folder not in mine and _is_free(folder)), None)

    def checkpoint(self) -> Any:
        """What submitit queues again when the time is up or the job is preempted: the same, which goes on."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _is_free(folder: Path) -> bool:
    """Whether a run is neither finished nor failed, and nobody trains it. Only a new sweep tries again what failed."""
    if _result(folder).is_file() or _error(folder).is_file():
        return False
    with _lock(folder / ".lock") as free:
        return free


def _record_death(folder: Path, code: int) -> None:
    """The process of a run has died: it has failed, unless the job is being killed too or another has taken over."""
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    with _lock(folder / ".lock") as mine:
        if mine:
            time.sleep(_LAST_BREATH)
            write_text(_error(folder), f"the process {how}\n")


def _train(experiment: AnyExperiment, folder: Path, one_thread: bool) -> None:
    """One training in this process, unless another one is at it; what goes wrong is written to its folder."""
    from qat.training.classifier import train_classifier
    from qat.training.rhemo import pretrain_rhemo

    for number in _signals():
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _signals())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if one_thread:
        torch.set_num_threads(1)
    with _lock(folder / ".lock") as mine:
        if not mine or _error(folder).is_file():
            return
        try:
            if isinstance(experiment, RHEmoExperiment):
                pretrain_rhemo(experiment, folder, resume=True, quiet=True)
            else:
                train_classifier(experiment, folder, resume=True, quiet=True)
        except Exception as error:
            line = " ".join(f"{type(error).__name__}: {error}".split())
            write_text(_error(folder), f"{line}\n\n{traceback.format_exc()}")


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _signals() -> set[signal.Signals]:
    """What a terminal and Slurm send to every process at once; only the one that leads the others may answer."""
    return {signal.SIGINT, signal.SIGTERM, signal.SIGUSR2}


@contextmanager
def _blocked() -> Iterator[None]:
    """Start processes that get none of these signals until they say so."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
