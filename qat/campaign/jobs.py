"""The engine: trains a campaign on this machine's CPU or GPUs, or as job arrays on a Slurm cluster.

The run folders are the only state. A process that trains a run holds the lock in its folder; a process that checks
whether the run is free holds it for a moment. So a campaign can be stopped and started again at any time: finished runs
are skipped, the others continue.

A run is ready as soon as every run that it builds on is finished. A job trains ready runs one after another and ends
when there is none. When more runs become ready than the running jobs take, more jobs are submitted.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from qat.campaign.options import Layout
from qat.campaign.plan import Campaign
from qat.config import AnyExperiment, RHEmoExperiment
from qat.files import LOCK, Busy, held, holder, naming, read_json, write_text
from qat.memory import keep_freed_memory
from qat.processes import GROUP_SIGNALS, bar
from qat.training.checkpoint import check_run

C = TypeVar("C")
Status = Literal["finished", "failed", "busy", "stopped", "waiting"]

_IMPORTED = [
    __name__,
    "qat.training.classifier",
    "qat.results.probes",
    "sklearn.linear_model",
    "torchmetrics",
    "torch.utils.tensorboard",
    "torch._inductor",
]
"""Modules that every training imports. They take seconds to import, so each job imports them once, before it forks.
None of them initialises CUDA, which does not survive a fork."""

_ASK_SLURM = 30.0
"""Seconds between two queries whether the jobs still exist; only a killed job is noticed this way."""

_LAST_BREATH = 1.0
"""Seconds from the death of a training's process until it counts as failed. A job that is being killed itself dies
sooner, so that its trainings do not count as failed."""

_LONGEST_FOLDER = 70
"""Bytes of a temporary folder's name in which a socket may lie: with its own name it has at most 107."""

_REQUEUES = 10
"""Maximum number of times that a job is requeued after reaching its time limit."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one run.

    Args:
        path: folder of the run, relative to the campaign's.
        status: ``finished``; ``failed``: it raised an error, or its process died; ``busy``: another process trains it;
            ``stopped``: the jobs ended before it did; ``waiting``: a run that it builds on is not finished.
        error: error in one line, unless the run is finished. ``error.txt`` in the run's folder has the traceback.
        result: content of ``result.json``, if the run is finished.
    """

    path: Path
    status: Status
    error: str | None = None
    result: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Run:
    """One run of a campaign for a job, with absolute paths.

    Args:
        folder: folder of the run.
        experiment: training.
        name: name in reports.
        probe: whether the trained network is probed.
        needs: folders of the runs that it builds on.
    """

    folder: Path
    experiment: AnyExperiment
    name: str = ""
    probe: bool = False
    needs: tuple[Path, ...] = ()

    @property
    def error(self) -> Path:
        return self.folder / "error.txt"

    @property
    def lock(self) -> Path:
        return self.folder / LOCK

    def missing(self) -> list[Path]:
        """The unfinished runs that it builds on."""
        return [need for need in self.needs if not (need / "result.json").is_file()]

    def is_done(self) -> bool:
        analysed = not self.probe or (self.folder / "analysis.json").is_file()
        return analysed and (self.folder / "result.json").is_file()

    def is_free(self) -> bool:
        """Whether it is ready and no process trains it. A failed run is retried only by a new call of :func:`train`."""
        return not (self.is_done() or self.error.is_file() or self.missing() or _is_held(self.lock))


def train(campaign: Campaign, layout: Layout | None = None) -> list[Outcome]:
    """Train every run that is not finished, as soon as the runs that it builds on are.

    Each training runs in its own process, followed by its probes. A failed training does not stop the others; the runs
    that build on it are skipped.

    Args:
        campaign: trainings. On a cluster, its folder must have the same path on every node. Its ``.jobs`` has the logs.
        layout: machine and number of jobs; by default one training at a time on every visible GPU.

    Returns:
        The outcome of each training, in the order of the campaign.

    Raises:
        ValueError: a folder holds a run with other settings, or the cluster rejects the jobs; nothing is trained then.

    Notes:
        An interruption (Ctrl-C) stops the jobs. Jobs on this machine end a second after this process, however it ends.
        Jobs on a cluster go on without it; a second call reports their runs as ``busy``.
    """
    layout = layout or Layout()
    folder = campaign.folder.absolute()
    finished = campaign.finished()
    runs = [
        _Run(
            folder / path,
            _with_absolute_paths(experiment),
            campaign.names[path],
            path in campaign.probed,
            tuple(folder / need for need in campaign.needs(experiment)),
        )
        for path, experiment in campaign.trainings.items()
    ]
    for run in runs:
        if run.folder.relative_to(folder) not in finished:
            check_run(run.folder, run.experiment)
    remaining = [run for run in runs if not run.is_done()]
    for run in remaining:
        run.error.unlink(missing_ok=True)
    logs = _Driver(remaining, folder, layout).drive() if remaining else None
    return [_outcome(run, folder, logs) for run in runs]


def _with_absolute_paths(config: C) -> C:
    """The settings with absolute paths."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value: Any = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = _with_absolute_paths(value)
        elif isinstance(value, Path):
            changes[field.name] = value.absolute()
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def _is_held(lock: Path) -> bool:
    try:
        with held(lock):
            return False
    except Busy:
        return True


def _outcome(run: _Run, folder: Path, logs: Path | None) -> Outcome:
    path = run.folder.relative_to(folder)
    if run.is_done():
        return Outcome(path, "finished", result=read_json(run.folder / "result.json"))
    if run.error.is_file():
        return Outcome(path, "failed", run.error.read_text(encoding="utf-8").partition("\n")[0])
    if missing := run.missing():
        return Outcome(path, "waiting", f"builds on {missing[0].relative_to(folder)}, which is not finished")
    if _is_held(run.lock):
        return Outcome(path, "busy", f"{holder(run.lock)} is training it")
    return Outcome(path, "stopped", f"the jobs ended before it did; the logs in {logs} may tell why")


class _Driver:
    """Submits jobs and waits for them.

    Args:
        runs: unfinished runs, each after the runs that it builds on.
        folder: folder of the campaign.
        layout: machine and number of jobs.
    """

    def __init__(self, runs: list[_Run], folder: Path, layout: Layout) -> None:
        from submitit import AutoExecutor

        logging.getLogger("submitit").setLevel(logging.ERROR)
        self.runs, self.layout = runs, layout
        self.logs = folder / ".jobs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{socket.gethostname()}-{os.getpid()}"
        self.alive = self.logs / "driver"
        cluster = "slurm" if layout.is_slurm else "local"
        self.executor = AutoExecutor(self.logs, cluster=cluster, slurm_max_num_timeout=_REQUEUES)
        self.executor.update_parameters(**_parameters(layout))
        self.slots = _slots(runs, layout, None if layout.is_slurm else self.alive)
        self.submitted: dict[int, list[Any]] = {}  # submitit's jobs, by slot
        self.offered: set[Path] = set()  # a run is offered to a job only once
        self.waiting: set[Path] = set()
        self.gone: set[str] = set()  # arrays that Slurm no longer knows
        self.last_query = time.monotonic()

    def drive(self) -> Path:
        """Submit jobs and wait until every ready run has been tried; returns the folder of their logs."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        try:
            with held(self.alive):
                self.submit({run.folder for run in self.runs if not run.missing()})
                _watch(self)
        except (FailedJobError, FailedSubmissionError) as error:
            text = " ".join(str(error).split())
            raise ValueError(f"cluster: 'slurm' rejects the jobs ('local' trains on this machine): {text}") from None
        except BaseException:
            for job in self.jobs:
                if self.layout.is_slurm:
                    job.cancel(check=False)
                else:
                    job.wait()
            raise
        return self.logs

    @property
    def jobs(self) -> list[Any]:
        return [job for jobs in self.submitted.values() for job in jobs]

    def submit(self, ready: set[Path]) -> None:
        """Offer runs to new jobs, at most one job per run."""
        from submitit.helpers import clean_env

        settings = {name: value for name, value in os.environ.items() if name == "SLURM_CONF"}  # which cluster
        chosen = self.free_slots()[: len(ready)]
        if not chosen:
            return
        self.offered |= ready
        self.last_query = time.monotonic()
        # Jobs on this machine end with this process, not by Ctrl-C. The output of sbatch is hidden: an error repeats
        # it. If this process is a Slurm job itself, its variables must not set memory or cores of the new jobs.
        with _blocked(), redirect_stderr(io.StringIO()), clean_env(), naming(self.logs):
            os.environ.update(settings)
            jobs = self.executor.submit_array([self.slots[n] for n in chosen])
        for n, job in zip(chosen, jobs, strict=True):
            self.submitted.setdefault(n, []).append(job)

    def free_slots(self) -> list[int]:
        return [n for n in range(len(self.slots)) if all(map(self.has_ended, self.submitted.get(n, [])))]

    def has_ended(self, job: Any) -> bool:
        if self.layout.is_slurm:  # submitit would query its accounting, which not every cluster has
            return job.paths.result_pickle.exists() or job.job_id.partition("_")[0] in self.gone
        ended: bool = job.done()
        return ended

    def settled(self) -> int:
        """Number of runs that are done, have failed, or build on a failed run."""
        failed: set[Path] = set()
        done = 0
        for run in self.runs:
            if run.is_done():
                done += 1
            elif run.error.is_file() or not failed.isdisjoint(run.needs):
                failed.add(run.folder)
        return done + len(failed)

    def top_up(self) -> None:
        """Submit jobs for runs that were ready and free at the last call and still are."""
        if not self.free_slots():
            return
        ready = [run for run in self.runs if run.folder not in self.offered and not run.missing()]
        untaken = {run.folder for run in ready if run.is_free()}
        self.offered |= {run.folder for run in ready} - untaken
        self.submit(untaken & self.waiting)
        self.waiting = untaken

    def ask_slurm(self) -> None:
        if time.monotonic() - self.last_query > _ASK_SLURM:
            self.last_query = time.monotonic()
            queued = _queued()
            if queued is not None:
                self.gone = {job.job_id.partition("_")[0] for job in self.jobs} - queued


def _watch(driver: _Driver) -> None:
    """Show progress until every job has ended, or until nothing is left for the jobs in Slurm's queue."""
    with bar(True) as progress:
        task = progress.add_task("trainings", total=len(driver.runs))
        while True:
            ended = all(map(driver.has_ended, driver.jobs))
            driver.top_up()
            done = driver.settled()
            progress.update(task, completed=done)
            if (ended and not driver.waiting) or (done == len(driver.runs) and driver.layout.is_slurm):
                break
            if driver.layout.is_slurm:
                driver.ask_slurm()
            time.sleep(1)
    if driver.layout.is_slurm:
        for array in {job.job_id.partition("_")[0] for job in driver.jobs}:
            subprocess.run(["scancel", "--state", "PENDING", array], capture_output=True, check=False)


def _queued() -> set[str] | None:
    """The job arrays that Slurm still knows; None if it does not answer."""
    command = ["squeue", "--noheader", "--user", str(os.getuid()), "--format", "%F"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return set(answer.stdout.split()) if answer.returncode == 0 else None


def _slots(runs: list[_Run], layout: Layout, driver: Path | None) -> list[_Job]:
    """The jobs that may run at the same time. Each has all runs, its own (assigned round-robin) first."""
    gpus = [] if layout.is_slurm else _gpus()
    jobs = min(layout.jobs or len(gpus) or 1, len(runs))
    shares = [runs[n::jobs] for n in range(jobs)]
    return [
        _Job(
            runs=[run for share in shares[n:] + shares[:n] for run in share],
            at_once=min(layout.at_once, len(shares[0])),
            one_thread=layout.at_once > 1,
            gpu=gpus[n % len(gpus)] if gpus else None,
            driver=driver,
        )
        for n in range(jobs)
    ]


def _gpus() -> list[str]:
    """The visible GPUs, by their names in ``CUDA_VISIBLE_DEVICES``."""
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


@dataclass(frozen=True)
class _Job:
    """A job, which submitit calls: trains runs that are ready and free, each in its own process.

    Args:
        runs: runs in order of preference.
        at_once: maximum number of processes at the same time.
        one_thread: whether each process has one CPU thread.
        gpu: the only GPU that they may see; None: the cluster decides.
        driver: file that the waiting driver locks; the job ends when nobody holds the lock.
    """

    runs: list[_Run]
    at_once: int
    one_thread: bool
    gpu: str | None
    driver: Path | None

    def __call__(self) -> None:
        if self.gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpu
        if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_FOLDER:
            tempfile.tempdir = "/tmp"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_IMPORTED)
        resource_tracker.ensure_running()  # first, since starting it unblocks SIGTERM for processes started afterwards
        running: dict[int, tuple[_Run, Any, bool]] = {}  # with whether the run is trained, not only prepared
        prepared: list[Any] = []
        try:
            while self.driver is None or _is_held(self.driver):
                while len(running) < self.at_once:
                    ready = self._next(running)
                    run = ready or self._waiting(running, prepared)
                    if run is None:
                        break
                    trains = ready is not None
                    process = context.Process(target=_train if trains else _prepare, args=(run, self.one_thread))
                    with _blocked():
                        process.start()
                    running[process.sentinel] = run, process, trains
                if not running:
                    return
                for ended in wait(list(running), timeout=1):
                    run, process, trains = running.pop(ended)  # type: ignore[arg-type]
                    process.join()
                    if process.exitcode and trains:
                        _record_death(run, process.exitcode)
        finally:
            for _, process, _ in running.values():
                process.kill()
            for _, process, _ in running.values():
                process.join()

    def _next(self, running: dict[int, tuple[_Run, Any, bool]]) -> _Run | None:
        started = {run.folder for run, *_ in running.values()}  # their processes may not hold the lock yet
        return next((run for run in self.runs if run.folder not in started and run.is_free()), None)

    def _waiting(self, running: Collection[Any], prepared: list[Any]) -> _Run | None:
        """While a process trains, a run that has to wait, of which the recordings can be prepared meanwhile.

        Adds what is prepared to `prepared`: a corpus and its features.
        """
        for run in self.runs if running else ():
            source = run.experiment.corpus, run.experiment.features
            if source not in prepared and run.missing() and not (run.is_done() or run.error.is_file()):
                prepared.append(source)
                return run
        return None

    def checkpoint(self) -> Any:
        """The job that submitit queues after a timeout or a preemption: the same one, which continues."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _record_death(run: _Run, code: int) -> None:
    """Mark a run as failed whose process died, unless this job is being killed too or another process trains it."""
    cause = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    with suppress(Busy), held(run.lock):
        time.sleep(_LAST_BREATH)
        write_text(run.error, f"the process {cause}\n")


def _start(one_thread: bool) -> None:
    """What the process of a run does first."""
    for number in _signals():
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _signals())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    keep_freed_memory()
    if one_thread:
        torch.set_num_threads(1)


def _prepare(run: _Run, one_thread: bool) -> None:
    """Prepare the recordings of a run that waits for others; what is wrong with them, its training will tell."""
    from qat.training.data import load_data

    _start(one_thread)
    with suppress(Exception):
        load_data(run.experiment, quiet=True)


def _train(run: _Run, one_thread: bool) -> None:
    """Train one run in this process, unless another process does; an error is written to the run's folder."""
    _start(one_thread)
    with suppress(Busy), held(run.lock):
        if run.error.is_file():
            return
        try:
            _train_and_probe(run)
        except Exception as error:
            line = " ".join(f"{type(error).__name__}: {error}".split())
            write_text(run.error, f"{line}\n\n{traceback.format_exc()}")


def _train_and_probe(run: _Run) -> None:
    from qat.results.probes import analyse
    from qat.training.classifier import train_classifier
    from qat.training.rhemo import pretrain_rhemo

    train_run: Any = pretrain_rhemo if isinstance(run.experiment, RHEmoExperiment) else train_classifier
    train_run(run.experiment, run.folder, resume=True, quiet=True, name=run.name or None)
    if run.probe:
        analyse(run.folder)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _signals() -> set[signal.Signals]:
    """Signals that a terminal or Slurm sends to all processes at once; only the leading process handles them."""
    return {*GROUP_SIGNALS, signal.SIGUSR2}


@contextmanager
def _blocked() -> Iterator[None]:
    """Block these signals in processes that are started within, until they unblock them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
