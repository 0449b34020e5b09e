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
from qat.files import LOCK, Busy, held, holder, naming, read_json, write_text
from qat.processes import GROUP_SIGNALS, bar
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

_LONGEST_FOLDER = 70
"""Bytes of a temporary folder's name in which a socket may lie: with its own name it has at most 107."""

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
        """The runs that it builds on and that are not finished."""
        return [need for need in self.needs if not (need / "result.json").is_file()]

    def is_done(self) -> bool:
        analysed = not self.probe or (self.folder / "analysis.json").is_file()
        return analysed and (self.folder / "result.json").is_file()

    def is_free(self) -> bool:
        """Whether it is ready and nobody trains it. Only a new call of :func:`train` tries again what has failed."""
        return not (self.is_done() or self.error.is_file() or self.missing() or _is_held(self.lock))


def train(campaign: Campaign, layout: Layout | None = None) -> list[Outcome]:
    """Train what is not finished, each run as soon as all that it builds on is there.

    Every training is a process of its own: one that fails ends no other, and what builds on it is left out. Probes
    follow their training in its process.

    Args:
        campaign: trainings; on a cluster, the nodes see its folder under the same path. ``.jobs`` in it has logs.
        layout: machine and number of jobs; by default one after another, on every GPU that this process sees.

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
    """The same settings with paths that do not depend on the current folder."""
    changes: dict[str, Any] = {}
    for one in dataclasses.fields(config):  # type: ignore[arg-type]
        value: Any = getattr(config, one.name)
        if dataclasses.is_dataclass(value):
            changes[one.name] = _with_absolute_paths(value)
        elif isinstance(value, Path):
            changes[one.name] = value.absolute()
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
    return Outcome(path, "stopped", f"the jobs ended before it; the logs in {logs} may tell why")


class _Driver:
    """Submits jobs and waits for them.

    Args:
        runs: runs that are not done; what a run builds on comes before it.
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
        self.offered: set[Path] = set()  # a run that its job did not train is not tried again
        self.waiting: set[Path] = set()
        self.gone: set[str] = set()  # arrays that Slurm no longer knows
        self.last_query = time.monotonic()

    def drive(self) -> Path:
        """Wait until nothing is ready that was not tried; returns the folder of the jobs' logs."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        try:
            with held(self.alive):
                self.submit({run.folder for run in self.runs if not run.missing()})
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
        from submitit.helpers import clean_env

        settings = {name: value for name, value in os.environ.items() if name == "SLURM_CONF"}  # of the cluster
        chosen = self.free_slots()[: len(ready)]
        if not chosen:
            return
        self.offered |= ready
        self.last_query = time.monotonic()
        # Jobs on this machine end with this process, not by a terminal's Ctrl-C; sbatch's words are in the error. A job
        # that this process runs in gives neither its memory nor its cores to the new ones.
        with _blocked(), redirect_stderr(io.StringIO()), clean_env(), naming(self.logs):
            os.environ.update(settings)
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
        for run in self.runs:
            if run.is_done():
                done += 1
            elif run.error.is_file() or not failed.isdisjoint(run.needs):
                failed.add(run.folder)
        return done + len(failed)

    def top_up(self) -> None:
        """Submit jobs for runs that have become ready and that no job has taken since the last look."""
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


def _slots(runs: list[_Run], layout: Layout, driver: Path | None) -> list[_Job]:
    """Every job that there may be at once, each with all runs; first its own, round-robin."""
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
        runs: runs, in the order in which this job prefers them.
        at_once: number of processes at once.
        one_thread: whether each has one CPU thread.
        gpu: the only GPU that they may see; None leaves that to the cluster.
        driver: file that is locked as long as somebody waits for this job; it ends without.
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
        resource_tracker.ensure_running()  # now, because starting it unblocks SIGTERM for what is started afterwards
        running: dict[int, tuple[_Run, Any]] = {}
        try:
            while self.driver is None or _is_held(self.driver):
                while len(running) < self.at_once and (run := self._next(running)) is not None:
                    process = context.Process(target=_train, args=(run, self.one_thread))
                    with _blocked():
                        process.start()
                    running[process.sentinel] = run, process
                if not running:
                    return
                for ended in wait(list(running), timeout=1):
                    run, process = running.pop(ended)  # type: ignore[arg-type]
                    process.join()
                    if process.exitcode:
                        _record_death(run, process.exitcode)
        finally:
            for _, process in running.values():
                process.kill()
            for _, process in running.values():
                process.join()

    def _next(self, running: dict[int, tuple[_Run, Any]]) -> _Run | None:
        started = {run.folder for run, _ in running.values()}  # whose processes may not have locked them yet
        return next((run for run in self.runs if run.folder not in started and run.is_free()), None)

    def checkpoint(self) -> Any:
        """What submitit queues again when the time is up or the job is preempted: the same, which goes on."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _record_death(run: _Run, code: int) -> None:
    """The process of a run has died: it has failed, unless the job is being killed too or another has taken over."""
    cause = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    with suppress(Busy), held(run.lock):
        time.sleep(_LAST_BREATH)
        write_text(run.error, f"the process {cause}\n")


def _train(run: _Run, one_thread: bool) -> None:
    """One training in this process, unless another one is at it; what goes wrong is written to its folder."""
    for number in _signals():
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _signals())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if one_thread:
        torch.set_num_threads(1)
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

    train_one: Any = pretrain_rhemo if isinstance(run.experiment, RHEmoExperiment) else train_classifier
    train_one(run.experiment, run.folder, resume=True, quiet=True, name=run.name or None)
    if run.probe:
        analyse(run.folder)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _signals() -> set[signal.Signals]:
    """What a terminal and Slurm send to every process at once; only the one that leads the others may answer."""
    return {*GROUP_SIGNALS, signal.SIGUSR2}


@contextmanager
def _blocked() -> Iterator[None]:
    """Start processes that get none of these signals until they say so."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
