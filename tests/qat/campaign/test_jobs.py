"""The engine: which job trains what and when, whatever becomes of runs and jobs."""

import json
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qat.campaign import jobs
from qat.campaign.jobs import train
from qat.campaign.options import Layout, SlurmConfig
from qat.campaign.plan import Campaign
from qat.config import AntiTransferConfig, Experiment, NetworkConfig, RHEmoConfig, RHEmoExperiment, TrainingConfig
from qat.files import held, write_text
from tests.qat.campaign.running import (
    LOCAL,
    campaign_of,
    children,
    fork_instead_of_jobs,
    is_locked,
    longer,
    trainer,
    wait_for,
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout(at_once=0), "at_once: 0 must be at least 1"),
        (lambda: Layout(jobs=0), "jobs: 0 must be at least 1"),
        (lambda: SlurmConfig(minutes=0), "slurm.minutes: 0 must be at least 1"),
        (lambda: SlurmConfig(gpus=-1), "slurm.gpus: -1 must be at least 0"),
        (lambda: SlurmConfig(cpus=0), "slurm.cpus: 0 must be at least 1"),
        (lambda: SlurmConfig(mem=0), "slurm.mem: 0 must be above 0"),
    ],
)
def test_a_wrong_layout_is_told(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_auto_is_slurm_where_there_is_an_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not Layout().is_slurm
    with pytest.raises(ValueError, match="cluster: 'slurm' needs the command sbatch"):
        Layout(cluster="slurm")
    (tmp_path / "sbatch").write_text("")
    (tmp_path / "sbatch").chmod(0o755)
    assert Layout().is_slurm
    assert not LOCAL.is_slurm


def test_jobs_of_a_cluster_inherit_nothing_of_the_job_that_submits_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's memory beside `--slurm.mem` would be refused by srun, its binding would be to another node's cores."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("squeue", "scancel", "scontrol", "sacct", "srun"):
        (tools / name).write_text("#!/bin/sh\nexit 0\n")
    (tools / "sbatch").write_text(f"#!/bin/sh\nenv > {tmp_path}/seen\nexit 1\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    for name, value in (
        ("SLURM_MEM_PER_CPU", "4000"),
        ("SLURM_CPU_BIND", "mask_cpu:0x1"),
        ("RANK", "3"),
        ("SLURM_CONF", "/etc/my.conf"),
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="cluster: 'slurm' rejects the jobs"):
        train(campaign_of(tmp_path / "runs", {"one": Experiment()})[0], Layout(cluster="slurm"))
    seen = (tmp_path / "seen").read_text()
    assert "SLURM_CONF=/etc/my.conf\n" in seen
    assert not any(line.startswith(("SLURM_MEM", "SLURM_CPU", "RANK=")) for line in seen.splitlines())
    assert os.environ["RANK"] == "3"


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [
        (None, None, ["0", "1", "2"]),
        ("4,GPU-ab,6", None, ["4", "GPU-ab", "6"]),
        (None, 2, ["0", "1"]),
        (None, 4, ["0", "1", "2", "0"]),
        (None, 9, ["0", "1", "2", "0", "1"]),
    ],
)
def test_every_job_on_this_machine_sees_one_gpu_of_those_that_are_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int | None, expected: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    runs = [jobs._Run(tmp_path / str(n), Experiment()) for n in range(5)]
    slots = jobs._slots(runs, Layout(jobs=count, cluster="local"), tmp_path / "driver")
    assert [job.gpu for job in slots] == expected
    for job in slots:
        replace(job, runs=[])()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == job.gpu


@pytest.mark.parametrize(("folder", "taken"), [("/" + 69 * "a", "/" + 69 * "a"), ("/" + 70 * "a", "/tmp")])
def test_sockets_lie_where_their_names_fit(folder: str, taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system takes 107 bytes, and temporary folders of clusters have long names."""
    monkeypatch.setattr("tempfile.tempdir", folder)
    jobs._Job([], 1, False, None, None)()
    assert tempfile.tempdir == taken


@pytest.mark.parametrize(
    ("count", "at_once", "own", "most"),
    [(1, 1, ["01234"], 1), (2, 1, ["024", "13"], 1), (3, 4, ["03", "14", "2"], 2), (9, 4, [*"01234"], 1)],
)
def test_a_job_trains_its_own_runs_first_and_takes_no_more_at_once_than_its_share(
    tmp_path: Path, count: int, at_once: int, own: list[str], most: int
) -> None:
    runs = [jobs._Run(tmp_path / str(n), Experiment(training=TrainingConfig(seed=n))) for n in range(5)]
    slots = jobs._slots(runs, Layout(at_once, count, "local"), tmp_path / "driver")
    for n, job in enumerate(slots):
        order = "".join(own[n:] + own[:n])
        assert "".join(run.folder.name for run in job.runs) == order
        assert sorted(job.runs, key=runs.index) == runs
        assert (job.at_once, job.one_thread) == (most, at_once > 1)
    assert len(slots) == len(own)


def test_what_failed_in_one_job_is_not_tried_by_another_that_was_about_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second job found the run free while the first was starting it, and gets its lock when it has failed."""
    write = jobs.write_text
    monkeypatch.setattr(jobs, "write_text", lambda file, text: write(file, f"locked: {is_locked(file.parent)}. {text}"))
    for rhemo in (tmp_path / "absent", None):  # the second would fail otherwise
        run = jobs._Run(tmp_path, Experiment(network=NetworkConfig(rhemo=rhemo)))
        process = multiprocessing.get_context("fork").Process(target=jobs._train, args=(run, False))
        process.start()
        process.join(60)
        assert process.exitcode == 0
        told = (tmp_path / "error.txt").read_text()
        assert told.startswith(f"locked: True. ValueError: {tmp_path}/absent: no such checkpoint\n")


def test_a_job_takes_what_is_ready_and_not_finished_nor_failed_nor_being_trained(tmp_path: Path) -> None:
    options = {name: {} for name in ("finished", "failed", "busy", "stopped", "new")} | {
        "unready": {"needs": (tmp_path / "finished", tmp_path / "stopped")},
        "ready": {"needs": (tmp_path / "finished",)},
        "unprobed": {"probe": True},
        "probed": {"probe": True},
    }
    runs = {name: jobs._Run(tmp_path / name, Experiment(), **chosen) for name, chosen in options.items()}
    for name in ("finished", "unprobed", "probed"):
        write_text(tmp_path / name / "result.json", "{}")
    write_text(tmp_path / "probed/analysis.json", "{}")
    write_text(tmp_path / "failed/error.txt", "ValueError: no such checkpoint\n")
    write_text(tmp_path / "stopped/last.safetensors", "")
    free = ["stopped", "new", "ready", "unprobed"]
    with held(tmp_path / "busy/.lock"):
        assert [name for name, run in runs.items() if run.is_free()] == free
    assert runs["busy"].is_free()
    job = jobs._Job(list(runs.values()), 2, False, None, None)
    assert job._next({}) == runs["busy"]
    assert job._next({0: (runs["busy"], None, True)}) == runs["stopped"], "it has been started, but has no lock yet"


def test_while_one_run_is_trained_the_recordings_of_those_that_wait_are_prepared_once(
    experiment: Experiment, tmp_path: Path
) -> None:
    needs = (tmp_path / "first",)
    other = replace(experiment, features=replace(experiment.features, cut="word"))
    options = {
        "first": (experiment, ()),
        "same": (experiment, needs),
        "again": (experiment, needs),
        "other": (other, needs),
    }
    runs = {name: jobs._Run(tmp_path / name, of_run, needs=needed) for name, (of_run, needed) in options.items()}
    job, prepared = jobs._Job(list(runs.values()), 2, False, None, None), []
    assert job._waiting({}, prepared) is None, "nothing is trained"
    assert job._waiting({0: ()}, prepared) == runs["same"]
    assert job._waiting({0: ()}, prepared) == runs["other"]
    assert job._waiting({0: ()}, prepared) is None
    write_text(tmp_path / "first/result.json", "{}")
    assert job._waiting({0: ()}, []) is None, "nothing waits"

    run = replace(runs["same"], experiment=replace(experiment, cache=tmp_path / "cache"))
    broken = replace(run, experiment=replace(experiment, corpus=replace(experiment.corpus, folder=tmp_path / "absent")))
    for each in (run, broken):  # what is wrong, the training tells
        process = multiprocessing.get_context("fork").Process(target=jobs._prepare, args=(each, True))
        process.start()
        process.join(60)
        assert process.exitcode == 0
    assert [path.name for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]
    assert not list(tmp_path.glob("*/error.txt"))


def test_all_that_is_ready_is_trained_while_a_long_run_goes_on(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run is ready at first, so one job starts. Of those that wait for it, it is held up by one. Another job is
    submitted then; it trains the others, in whosever share they are, and what becomes ready by that.
    """

    def settled(driver: jobs._Driver) -> int:
        if not stopped and (runs["long"] / "last.safetensors").is_file():
            stopped.append(trainer(runs["long"]))
            os.kill(stopped[0], signal.SIGSTOP)
        elif stopped and not finished:
            done = [name for name, run in runs.items() if (run / "result.json").is_file()]
            if len(done) == len(runs) - 1 or len(numbers) > 100:
                finished.extend(done)
                os.kill(stopped[0], signal.SIGCONT)
        numbers.append(len(driver.jobs))
        return counted(driver)

    numbers: list[int] = []
    stopped: list[int] = []
    finished: list[str] = []
    counted = jobs._Driver.settled
    monkeypatch.setattr(jobs._Driver, "settled", settled)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    campaign = Campaign(tmp_path)
    runs = {"twin": campaign.add(replace(experiment, task="speaker"))}
    single, long, third = (replace(experiment, anti_transfer=AntiTransferConfig(runs["twin"], [n])) for n in (2, 7, 13))
    runs["single"] = campaign.add(single)
    runs["long"] = campaign.add(longer(long, 60))
    runs["dual"] = campaign.add(replace(single, training=replace(single.training, initial=runs["single"])))
    runs["of the first job's share"] = campaign.add(third)
    outcomes = train(campaign, replace(LOCAL, jobs=2))
    assert finished == ["twin", "single", "dual", "of the first job's share"]
    assert [one.status for one in outcomes] == ["finished"] * 5
    assert list(dict.fromkeys(numbers)) == [1, 2]


def test_what_ends_a_run_ends_no_other(experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one job's runs, one is killed, one is being trained by somebody else, one is of RH-Emo; then the job dies."""

    def watch(driver: jobs._Driver) -> None:
        wait_for((runs["killed"] / "last.safetensors").is_file)
        os.kill(trainer(runs["killed"]), signal.SIGKILL)
        wait_for((runs["stopped"] / "last.safetensors").is_file)
        [job] = children(driver.jobs[0]._process.pid)
        os.kill(job, signal.SIGKILL)
        watched(driver)

    watched = jobs._watch
    monkeypatch.setattr(jobs, "_watch", watch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pretraining = RHEmoExperiment(
        corpus=experiment.corpus,
        normalisation="log",
        rhemo=RHEmoConfig(width=0.01),
        training=experiment.training,
        cache=experiment.cache,
    )
    trainings = {"killed": longer(experiment, 100_000, 1), "busy": experiment, "rhemo": pretraining}
    trainings |= {"stopped": longer(experiment, 100_000, 2), "untried": longer(experiment, 2, 3)}
    campaign, runs = campaign_of(tmp_path, trainings)
    runs["waiting"] = campaign.add(replace(experiment, anti_transfer=AntiTransferConfig(runs["killed"], [2])))
    write_text(runs["untried"] / "error.txt", "of an earlier call\n")
    with held(runs["busy"] / ".lock"):
        killed, busy, rhemo, stopped, untried, waiting = train(campaign, LOCAL)
    assert (killed.status, killed.error) == ("failed", "the process was killed by signal 9")
    assert busy.status == "busy"
    assert busy.error.startswith(f"process {os.getpid()} on ")
    assert not (runs["busy"] / "split.json").exists()
    assert rhemo.status == "finished"
    assert rhemo.result["kind"] == "rhemo"
    [logs] = (tmp_path / ".jobs").iterdir()
    assert list(logs.glob("*.err"))
    assert [(one.status, one.error) for one in (stopped, untried)] == [
        ("stopped", f"the jobs ended before it did; the logs in {logs} may tell why")
    ] * 2
    assert (waiting.status, waiting.error) == ("waiting", f"builds on {killed.path}, which is not finished")
    wait_for(lambda: not is_locked(runs["stopped"]), 20)


def test_probes_follow_their_training_and_are_made_up_for(
    experiment: Experiment, twin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fork_instead_of_jobs(monkeypatch)
    campaign = Campaign(tmp_path)
    at = replace(experiment, anti_transfer=AntiTransferConfig(twin, [2]))
    run = campaign.add(at, "at-speaker", probe=True)
    assert [one.status for one in train(campaign, LOCAL)] == ["finished"]
    probes = json.loads((run / "analysis.json").read_text())
    assert 0 <= probes["voice_probe"] <= 1
    written = (run / "result.json").stat().st_mtime_ns
    (run / "analysis.json").unlink()
    assert campaign.finished() == set(campaign.trainings)
    assert [one.status for one in train(campaign, LOCAL)] == ["finished"]
    assert json.loads((run / "analysis.json").read_text()) == probes
    assert (run / "result.json").stat().st_mtime_ns == written
    (run / "analysis.json").unlink()
    (run / "predictions.csv").unlink()
    [outcome] = train(campaign, LOCAL)
    assert outcome.status == "failed"
    assert "predictions.csv" in outcome.error
