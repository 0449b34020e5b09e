"""The command `qat sweep` on a real Slurm cluster of one node, which is started here and belongs to nobody else."""

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import qat
from qat.campaign import jobs
from qat.campaign.jobs import train
from qat.campaign.options import Layout, SlurmConfig
from qat.campaign.plan import Campaign
from qat.campaign.sweep import plan_sweep
from qat.config import AntiTransferConfig, Experiment, to_plain
from qat.files import write_text
from qat.training.checkpoint import load_checkpoint
from qat.training.classifier import train_classifier
from tests.qat.campaign.running import campaign_of, trainer, wait_for
from tests.qat.training.trainings import same

PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])  # where daemons are, unless one is root
PROGRAMS = ("setpriv", "munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
MISSING = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]

pytestmark = pytest.mark.skipif(
    bool(MISSING),
    reason=f"no {', '.join(MISSING)}; in Debian: apt-get install slurmctld slurmd slurm-client munge",
)


def two(experiment: Experiment, folder: Path, count: int = 2) -> tuple[Campaign, dict[str, Path]]:
    """A campaign of two trainings that differ in their seed, or of another number."""
    training = experiment.training
    seeds = range(1, count + 1)
    return campaign_of(folder, {str(n): replace(experiment, training=replace(training, seed=n)) for n in seeds})


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands find the cluster."""
    # Not pytest's folder: a socket's path has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o711)  # munged wants it so
        user, host = getpass.getuser(), socket.gethostname().partition(".")[0]
        controller, node = free_ports(2)
        munge = folder / "munge.socket"
        conf = folder / "slurm.conf"
        conf.write_text(
            f"""
            ClusterName=test
            SlurmctldHost={host}(127.0.0.1)
            SlurmctldPort={controller}
            SlurmdPort={node}
            SlurmUser={user}
            SlurmdUser={user}
            AuthType=auth/munge
            CredType=cred/munge
            # A job that is queued again waits until its credential has expired: 120 s otherwise.
            AuthInfo=socket={munge},cred_expire=5
            StateSaveLocation={folder}/state
            SlurmdSpoolDir={folder}/spool
            SlurmctldPidFile={folder}/slurmctld.pid
            SlurmdPidFile={folder}/slurmd.pid
            SlurmctldLogFile={folder}/slurmctld.log
            SlurmdLogFile={folder}/slurmd.log
            ProctrackType=proctrack/linuxproc
            TaskPlugin=task/none
            JobAcctGatherType=jobacct_gather/none
            AccountingStorageType=accounting_storage/none
            SwitchType=switch/none
            MpiDefault=none
            SelectType=select/cons_tres
            SelectTypeParameters=CR_CPU
            SchedulerParameters=sched_interval=1,bf_interval=1
            ReturnToService=2
            KillWait=2
            NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
            PartitionName=all Nodes={host} Default=YES MaxTime=60
            """.replace(" " * 12, "")
        )
        (folder / "state").mkdir()
        (folder / "spool").mkdir()
        environment = os.environ | {"PATH": PATH, "SLURM_CONF": str(conf)}

        def call(*words: object) -> str:
            return subprocess.run(
                list(map(str, words)), env=environment, check=True, capture_output=True, text=True
            ).stdout

        def daemon(*words: object) -> None:
            log = stack.enter_context((folder / f"{words[0]}.out").open("w"))
            command = ["setpriv", "--pdeathsig", "KILL", *map(str, words)]  # not to outlive a test run that is killed
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)

        def is_idle() -> bool:
            return "idle" in subprocess.run(
                ["sinfo", "--noheader", "--format", "%T"],
                env=environment, check=False, capture_output=True, text=True,
            ).stdout  # fmt: skip

        call("mungekey", "--create", "--keyfile", folder / "munge.key")
        daemon(
            *("munged", "--foreground", f"--socket={munge}", f"--key-file={folder}/munge.key"),
            *(f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/munge.seed", "--num-threads=2"),
        )
        wait_for(munge.exists, 20)
        daemon("slurmctld", "-D", "-i", "-f", conf)
        daemon("slurmd", "-D", "-f", conf)
        # Jobs have process groups of their own: they end before the node does.
        stack.callback(wait_for, lambda: not call("squeue", "--noheader"), 20)
        stack.callback(call, "scancel", "--signal=KILL", "--full", "--user", user)
        stack.callback(call, "scancel", "--user", user)
        wait_for(is_idle, 30)
        yield environment


@pytest.fixture
def inside(cluster: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """This process finds the cluster."""
    monkeypatch.setenv("PATH", cluster["PATH"])
    monkeypatch.setenv("SLURM_CONF", cluster["SLURM_CONF"])


def squeue(cluster: dict[str, str]) -> list[list[str]]:
    """Array, number in it, state and reason of every job."""
    command = ["squeue", "--noheader", "--array", "--format", "%F %K %T %r"]
    answer = subprocess.run(command, env=cluster, check=True, capture_output=True, text=True)
    return [line.split() for line in answer.stdout.splitlines()]


def test_one_command_runs_a_job_array_and_a_job_whose_time_is_up_goes_on(
    cluster: dict[str, str], experiment: Experiment, tmp_path: Path
) -> None:
    training = replace(experiment.training, epochs=6, patience=6, checkpoint_seconds=0.0)
    experiment = replace(experiment, training=training)
    plan = {"base": to_plain(experiment), "vary": {"training.seed": [1, 2, 3]}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    command = [sys.executable, "-m", "qat", "sweep", tmp_path / "plan.yaml", "--out", tmp_path / "out", "--json"]
    command += ["--jobs", "2", "--slurm.gpus", "0", "--slurm.partition", "all", "--slurm.minutes", "10"]
    environment = cluster | {"PYTHONPATH": str(Path(qat.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    runs = [tmp_path / "out" / run for run in plan_sweep(tmp_path / "out", tmp_path / "plan.yaml").trainings]
    first = runs[0]

    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as driver:
        try:
            wait_for(lambda: (first / "last.safetensors").is_file() or driver.poll() is not None)
            process = trainer(first)
            os.kill(process, signal.SIGSTOP)
            array = {(job, number) for job, number, *_ in squeue(cluster)}
            assert len({job for job, _ in array}) == 1
            assert {number for _, number in array} <= {"0", "1"}
            before = load_checkpoint(first / "last.safetensors", "training").record["history"]
            assert 0 < len(before) < 6
            # The other job trains all else, and ends.
            wait_for(lambda: len(squeue(cluster)) == 1, 100)
            assert [(run / "result.json").is_file() for run in runs] == [0, 1, 1]
            job = "_".join(squeue(cluster)[0][:2])
            # Slurm may send SIGTERM at any time, which is no reason to end; SIGUSR2 comes when the time is nearly up.
            # With a limit of ten minutes, submitit takes every one for that.
            subprocess.run(["scancel", "--signal", "TERM", job], env=cluster, check=True)
            time.sleep(2)  # until it has arrived
            os.kill(process, signal.SIGCONT)
            os.kill(process, signal.SIGSTOP)
            time.sleep(1)
            assert not (first / "error.txt").exists()
            subprocess.run(["scancel", "--signal", "USR2", job], env=cluster, check=True)
            told, _ = driver.communicate(timeout=120)
        finally:
            driver.kill()
    assert driver.returncode == 0
    assert [(run["training"], run["status"], run["epochs"]) for run in json.loads(told)["runs"]] == [
        (f"base, seed {seed}", "finished", 6) for seed in (1, 2, 3)
    ]
    shown = subprocess.run(["scontrol", "show", "job", job], env=cluster, check=True, capture_output=True, text=True)
    assert "Restarts=1" in shown.stdout
    after = load_checkpoint(first / "last.safetensors", "training").record["history"]
    assert after[: len(before)] == before, "what was trained before is trained again"
    train_classifier(experiment, tmp_path / "alone", quiet=True)
    trained, undisturbed = (load_checkpoint(run, "classifier") for run in (first, tmp_path / "alone"))
    assert same(trained.tensors, undisturbed.tensors)
    assert trained.record == undisturbed.record


def test_what_the_cluster_refuses_is_told_in_one_line(
    inside: None, experiment: Experiment, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    layout = Layout(cluster="slurm", slurm=SlurmConfig(partition="nowhere", gpus=0))
    with pytest.raises(ValueError, match=r"^cluster: 'slurm' rejects the jobs .*invalid partition[^\n]*$"):
        train(two(experiment, tmp_path, 1)[0], layout)
    assert not (tmp_path / "runs").exists()
    assert capfd.readouterr().err == ""


def test_an_interruption_takes_the_jobs_out_of_the_queue(
    cluster: dict[str, str], inside: None, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        assert [state for _, _, state, _ in squeue(cluster)] == ["PENDING"] * 2  # the reason comes later
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "_watch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(two(experiment, tmp_path)[0], LATER)
    wait_for(lambda: not squeue(cluster), 10)
    [script] = (tmp_path / ".jobs").glob("*/*_submission.sh")
    assert "#SBATCH --begin=now+1hour\n" in script.read_text()


def test_runs_of_a_job_that_somebody_cancels_are_stopped(
    cluster: dict[str, str], inside: None, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watch(driver: jobs._Driver) -> None:
        subprocess.run(["scancel", driver.jobs[0].job_id], env=cluster, check=True)
        watched(driver)

    watched = jobs._watch
    monkeypatch.setattr(jobs, "_watch", watch)
    monkeypatch.setattr(jobs, "_ASK_SLURM", 0.0)
    [one] = train(two(experiment, tmp_path, 1)[0], replace(LATER, jobs=1))
    assert one.status == "stopped"


def test_jobs_for_which_nothing_is_left_leave_the_queue(
    cluster: dict[str, str], inside: None, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watch(driver: jobs._Driver) -> None:
        for run in runs.values():
            write_text(run / "result.json", "{}")
        watched(driver)

    watched = jobs._watch
    monkeypatch.setattr(jobs, "_watch", watch)
    campaign, runs = two(experiment, tmp_path)
    outcomes = train(campaign, LATER)
    assert [one.status for one in outcomes] == ["finished"] * 2
    wait_for(lambda: not squeue(cluster), 10)


def test_what_becomes_ready_is_trained_by_jobs_that_are_submitted_then(
    cluster: dict[str, str], inside: None, experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    campaign = Campaign(tmp_path)
    twin = campaign.add(replace(experiment, task="speaker"))
    for layer in (2, 13):
        campaign.add(replace(experiment, anti_transfer=AntiTransferConfig(twin, [layer])))
    outcomes = train(campaign, replace(LATER, slurm=SlurmConfig(minutes=10, gpus=0)))
    assert [one.status for one in outcomes] == ["finished"] * 3
    assert len(list((tmp_path / ".jobs").glob("*/*_submission.sh"))) >= 1
    wait_for(lambda: not squeue(cluster), 10)


LATER = Layout(jobs=2, slurm=SlurmConfig(minutes=10, gpus=0, extra={"begin": "now+1hour"}))
