"""The engine: trains a campaign on this machine's processors or GPUs, or as job arrays of a Slurm cluster.

The runs' folders are the only state. Whoever trains a run holds the lock in its folder (and, for a moment, whoever
looks whether it is free), so that the same campaign may be started again at any time, wherever it was stopped: finished
runs are left alone, the others go on.

A job trains whatever is ready, one run after the other, and ends when nothing is; a run is ready as soon as all that
it builds on is finished. Whenever more becomes ready than the jobs there are take, more jobs are submitted.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import threading
import time
import traceback
from collections.abc import Iterator
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
from qat.files import Busy, held, holder, write_text
from qat.processes import bar
from qat.training.checkpoint import check_run

C = TypeVar("C")
Status = Literal["finished", "failed", "busy", "stopped", "waiting"]

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
class Outcome:
    """What became of one run.

    Args:
        path: folder of the run, below the campaign's.
        status: ``finished``; ``failed``: it raised, or its process died; ``busy``: somebody else is training it;
            ``stopped``: the jobs ended before it did; ``waiting``: what it builds on is not finished.
        error: error in one line, unless it is finished. ``error.txt`` in the run's folder has the traceback.
        result: content of ``result.json``, if it is finished.
    """

    path: Path
    status: Status
    error: str | None = None
    result: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Run:
    """One run of a campaign as a job sees it: all paths are absolute.

    Args:
        experiment: training.
        name: name in reports.
        probe: whether the trained network is probed.
        needs: folders of the runs that it builds on.
    """

    experiment: AnyExperiment
    name: str = ""
    probe: bool = False
    needs: tuple[Path, ...] = ()

    def is_ready(self) -> bool:
        return all(_result(need).is_file() for need in self.needs)

    def is_done(self, folder: Path) -> bool:
        return _result(folder).is_file() and (not self.probe or (folder / "analysis.json").is_file())


def train(campaign: Campaign, layout: Layout | None = None) -> list[Outcome]:
    """Train what is not finished, each run as soon as all that it builds on is there.

    Every training is a process of its own: one that fails ends no other, and what builds on it is left out. Probes
    follow their training in its process.

    Args:
        campaign: trainings; on a cluster, the nodes see its folder under the same path. ``.jobs`` in it has logs.
        layout: where they run; by default one after another, on every GPU that this process sees.

    Returns:
        What became of each training, in the order of the campaign.

    Raises:
        ValueError: a folder holds a run of other settings, or the cluster takes no jobs; nothing was trained then.

    Notes:
        An interruption (Ctrl-C) stops the jobs. Jobs on this machine end a second after this process, however it ends;
        those of a cluster go on without it, and a second call finds their runs ``busy``.
    """
    layout = layout or Layout()
    folder = campaign.folder.absolute()
    finished = campaign.finished()
    runs = {
        folder / path: _Run(
            _with_absolute_paths(experiment),
            campaign.names[path],
            path in campaign.probed,
            tuple(folder / need for need in campaign.needs(experiment)),
        )
        for path, experiment in campaign.trainings.items()
    }
    for path, run in runs.items():
        if path.relative_to(folder) not in finished:
            check_run(path, run.experiment)
    left = {path: run for path, run in runs.items() if not run.is_done(path)}
    for path in left:
        _error(path).unlink(missing_ok=True)
    logs = _Driver(left, folder, layout).drive() if left else None
    return [_outcome(path.relative_to(folder), path, run, logs) for path, run in runs.items()]


def _with_absolute_paths(config: C) -> C:
    """The same settings with paths that do not depend on the current folder."""
    changes: dict[str, Any] = {}
    for one in dataclasses.fields(config):  # type: ignore[arg-type]
        value: Any = getattr(config, one.name)
        if dataclasses.is_dataclass(value):
            changes[one.name] = _with_absolute_paths(value)
        elif isinstance(value, Path):
            changes[one.name] = value.absolute()
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def _result(folder: Path) -> Path:
    return folder / "result.json"


def _error(folder: Path) -> Path:
    return folder / "error.txt"


def _lock(folder: Path) -> Path:
    return folder / ".lock"


def _is_held(lock: Path) -> bool:
    try:
        with held(lock):
            return False
    except Busy:
        return True


def _outcome(path: Path, folder: Path, run: _Run, logs: Path | None) -> Outcome:
    if run.is_done(folder):
        return Outcome(path, "finished", result=json.loads(_result(folder).read_text(encoding="utf-8")))
    if _error(folder).is_file():
        return Outcome(path, "failed", _error(folder).read_text(encoding="utf-8").partition("\n")[0])
    if missing := [need for need in run.needs if not _result(need).is_file()]:
        return Outcome(path, "waiting", f"builds on {missing[0].relative_to(folder.parents[1])}, which is not finished")
    if _is_held(_lock(folder)):
        return Outcome(path, "busy", f"{holder(_lock(folder))} is training it")
    return Outcome(path, "stopped", f"the jobs ended before it; the logs in {logs} may tell why")


class _Driver:
    """Submits jobs and waits for them.

    Args:
        runs: runs that are not done, by their folders.
        folder: folder of the campaign.
        layout: where they run.
    """

    def __init__(self, runs: dict[Path, _Run], folder: Path, layout: Layout) -> None:
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
        self.offered: set[Path] = set()  # a run that its job did not train is not tried again
        self.waiting: set[Path] = set()
        self.gone: set[str] = set()  # arrays that Slurm no longer knows
        self.asked = time.monotonic()

    def drive(self) -> Path:
        """Wait until nothing is ready that was not tried; returns the folder of the jobs' logs."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        try:
            with held(self.alive):
                self.submit({path for path, run in self.runs.items() if run.is_ready()})
                _watch(self)
        except (FailedJobError, FailedSubmissionError) as error:
            text = " ".join(str(error).split())
            raise ValueError(f"cluster: 'slurm' takes no such jobs ('local' stays on this machine): {text}") from None
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
        """Offer runs to new jobs, at most one for each."""
        chosen = self.free_slots()[: len(ready)]
        if not chosen:
            return
        self.offered |= ready
        self.asked = time.monotonic()
        # Jobs on this machine end with this process, not by a terminal's Ctrl-C; sbatch's words are in the error.
        with _blocked(), redirect_stderr(io.StringIO()):
            jobs = self.executor.submit_array([self.slots[n] for n in chosen])
        for n, job in zip(chosen, jobs, strict=True):
            self.submitted.setdefault(n, []).append(job)

    def free_slots(self) -> list[int]:
        return [n for n in range(len(self.slots)) if all(map(self.has_ended, self.submitted.get(n, [])))]

    def has_ended(self, job: Any) -> bool:
        if self.layout.is_slurm:  # whose accounting, which submitit would ask, is not everywhere
            return job.paths.result_pickle.exists() or job.job_id.partition("_")[0] in self.gone
        ended: bool = job.done()
        return ended

    def settled(self) -> int:
        """Number of runs that are done, have failed, or build on one that has."""
        failed: set[Path] = set()
        done = 0
        for path, run in self.runs.items():  # what a run builds on comes before it
            if run.is_done(path):
                done += 1
            elif _error(path).is_file() or not failed.isdisjoint(run.needs):
                failed.add(path)
        return done + len(failed)

    def top_up(self) -> None:
        """Submit jobs for runs that have become ready and that no job has taken since the last look."""
        if not self.free_slots():
            return
        ready = {path for path, run in self.runs.items() if path not in self.offered and run.is_ready()}
        untaken = {path for path in ready if _is_free(path, self.runs[path])}
        self.offered |= ready - untaken
        self.submit(untaken & self.waiting)
        self.waiting = untaken

    def ask_slurm(self) -> None:
        if time.monotonic() - self.asked > _ASK_SLURM:
            self.asked = time.monotonic()
            queued = _queued()
            if queued is not None:
                self.gone = {job.job_id.partition("_")[0] for job in self.jobs} - queued


def _watch(driver: _Driver) -> None:
    """Show how many runs have ended until every job has, or nothing is left for those still in a queue."""
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
    """The arrays of which Slurm still has a job; None where it does not answer."""
    command = ["squeue", "--noheader", "--user", str(os.getuid()), "--format", "%F"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    return set(answer.stdout.split()) if answer.returncode == 0 else None


def _slots(runs: dict[Path, _Run], layout: Layout, driver: Path | None) -> list[_Job]:
    """Every job that there may be at once, each with all runs; first its own, round-robin."""
    gpus = [] if layout.is_slurm else _gpus()
    jobs = min(layout.jobs or len(gpus) or 1, len(runs))
    shares = [list(runs)[n::jobs] for n in range(jobs)]
    return [
        _Job(
            runs={run: runs[run] for share in shares[n:] + shares[:n] for run in share},
            at_once=min(layout.at_once, len(shares[0])),
            one_thread=layout.at_once > 1,
            gpu=gpus[n % len(gpus)] if gpus else None,
            driver=driver,
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


@dataclass(frozen=True)
class _Job:
    """Trains one run after the other that is ready and free, each in a process of its own. What submitit calls.

    Args:
        runs: runs by their folders, in the order in which this job prefers them.
        at_once: number of processes at once.
        one_thread: whether each has one CPU thread.
        gpu: the only GPU that they may see; None leaves that to the cluster.
        driver: file that is locked as long as somebody waits for this job; it ends without.
    """

    runs: dict[Path, _Run]
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
                if self.driver is not None and not _is_held(self.driver):
                    return
        finally:
            for _, process in running.values():
                process.kill()
            for _, process in running.values():
                process.join()

    def _next(self, running: dict[int, tuple[Path, Any]]) -> Path | None:
        mine = {folder for folder, _ in running.values()}  # which may not have locked it yet
        return next((path for path, run in self.runs.items() if path not in mine and _is_free(path, run)), None)

    def checkpoint(self) -> Any:
        """What submitit queues again when the time is up or the job is preempted: the same, which goes on."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _is_free(folder: Path, run: _Run) -> bool:
    """Whether a run is ready and nobody trains it. Only a new call of :func:`train` tries again what has failed."""
    if run.is_done(folder) or _error(folder).is_file() or not run.is_ready():
        return False
    return not _is_held(_lock(folder))


def _record_death(folder: Path, code: int) -> None:
    """The process of a run has died: it has failed, unless the job is being killed too or another has taken over."""
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    with suppress(Busy), held(_lock(folder)):
        time.sleep(_LAST_BREATH)
        write_text(_error(folder), f"the process {how}\n")


def _train(run: _Run, folder: Path, one_thread: bool) -> None:
    """One training in this process, unless another one is at it; what goes wrong is written to its folder."""
    for number in _signals():
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _signals())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if one_thread:
        torch.set_num_threads(1)
    with suppress(Busy), held(_lock(folder)):
        if _error(folder).is_file():
            return
        try:
            _train_and_probe(run, folder)
        except Exception as error:
            line = " ".join(f"{type(error).__name__}: {error}".split())
            write_text(_error(folder), f"{line}\n\n{traceback.format_exc()}")


def _train_and_probe(run: _Run, folder: Path) -> None:
    from qat.results.probes import analyse
    from qat.training.classifier import train_classifier
    from qat.training.rhemo import pretrain_rhemo

    if isinstance(run.experiment, RHEmoExperiment):
        pretrain_rhemo(run.experiment, folder, resume=True, quiet=True, name=run.name or None)
    else:
        train_classifier(run.experiment, folder, resume=True, quiet=True, name=run.name or None)
    if run.probe:
        analyse(folder)


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
