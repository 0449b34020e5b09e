import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import qat
from qat import cli
from qat.campaign import sweep
from qat.campaign.sweep import Layout, Outcome, SlurmConfig, read_plan, train_all
from qat.commands.parser import instance
from qat.config import Experiment, NetworkConfig, RHEmoConfig, RHEmoExperiment, TrainingConfig, to_plain
from qat.files import sha256_of, write_text
from qat.report.report import collect, summary_table
from qat.training.checkpoint import load_checkpoint
from qat.training.classifier import train_classifier

LOCAL = Layout(cluster="local")


def write(folder: Path, text: str) -> Path:
    path = folder / "plan.yaml"
    path.write_text(text)
    return path


def longer(experiment: Experiment, epochs: int) -> Experiment:
    """So many epochs, each of which is saved."""
    training = replace(experiment.training, epochs=epochs, patience=epochs, checkpoint_seconds=0.0)
    return replace(experiment, training=training)


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def trainer(run: Path) -> int:
    """The process that trains a run."""
    return int((run / ".lock").read_text().split()[1])


def parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def is_locked(run: Path) -> bool:
    with sweep._lock(run / ".lock") as free:
        return not free


def test_a_plan_is_every_combination_in_its_order(tmp_path):
    plan = write(
        tmp_path,
        """
        base:
          training: {lr: 1e-3, epochs: 7}
          network: {width: 0.125, rhemo: runs/rhemo}
        vary:
          training.seed: [2, 1]
          anti_transfer.layers: [[2], [2, 13]]
          anti_transfer.beta: [1e-1, 1]
        """,
    )
    runs = read_plan(plan)
    assert list(map(str, runs)) == [
        f"layers-{layers},beta-{beta}/seed{seed}"
        for seed in (2, 1)
        for layers in ("2", "2+13")
        for beta in ("0.1", "1.0")
    ]
    chosen = runs[Path("layers-2+13,beta-0.1/seed1")]
    assert (chosen.training.seed, chosen.anti_transfer.layers, chosen.anti_transfer.beta) == (1, [2, 13], 0.1)
    assert all((run.training.lr, run.training.epochs, run.network.width) == (1e-3, 7, 0.125) for run in runs.values())
    assert chosen.network.rhemo == Path("runs/rhemo")


def test_a_plan_says_what_qat_train_would(tmp_path):
    settings = "split: {rule: speaker, seed: 3}\nanti_transfer: {layers: [2, 7], beta: [1e-1, 1]}\ntask: speaker\n"
    (tmp_path / "run.yaml").write_text(settings)
    parser, _ = cli.build_parser()
    options = parser.parse_args(["train", "--config", str(tmp_path / "run.yaml"), "--out", "x"])
    trained = instance(Experiment, parser.instantiate(options).train)
    plan = write(tmp_path, "base:\n" + "".join(f"  {line}\n" for line in settings.splitlines()))
    assert read_plan(plan) == {Path("base"): trained}


@pytest.mark.parametrize(
    ("vary", "names"),
    [
        ("training.seed: [1, 2]", ["base/seed1", "base/seed2"]),
        ("task: [speaker, emotion]", ["task-speaker", "task-emotion"]),
        ("anti_transfer.twin: [null, runs/voice, runs/words]", ["twin-none", "twin-voice", "twin-words"]),
        ("anti_transfer.twin: [voice/seed1, voice/seed2]", ["twin-1", "twin-2"]),
        ("anti_transfer.twin: [a/voice, b/voice]", ["twin-1", "twin-2"]),
        ("anti_transfer.random_twin: [true, false]", ["random_twin-true", "random_twin-false"]),
        ("corpus.where: [{speaker: [a, b]}, {speaker: [c]}]", ["where-speaker-a+b", "where-speaker-c"]),
        (
            "anti_transfer.loss: [cka, {name: folded-rowwise, clamp: product}]",
            ["loss-cka", "loss-folded-rowwise+product"],
        ),
        ("split.train: [[one, two], []]", ["train-1", "train-2"]),
        ("training.lr: [1e-5, 0.5]", ["lr-1e-05", "lr-0.5"]),
        ("{split.seed: [1, 2], training.seed: [3]}", ["split-1/seed3", "split-2/seed3"]),
        ("{cache: [a], anti_transfer.cache: [true]}", ["cache-a,anti_transfer.cache-true"]),
    ],
)
def test_names_are_short_and_unique_and_reports_find_the_seed(tmp_path, vary, names):
    runs = read_plan(write(tmp_path, f"vary:\n  {vary}\n"))
    assert list(map(str, runs)) == names
    for path, run in runs.items():
        if "/seed" in str(path):
            assert path.name == f"seed{run.training.seed}"


@pytest.mark.parametrize(
    ("text", "message"),  # of what others have to say, jsonargparse and a YAML parser, no words
    [
        ("[1, 2]", ""),
        ("base: [", ""),
        ("base: 3", "base"),
        ("vary: 3", "vary"),
        ("bases: {task: emotion}", "'bases.task' is not accepted"),
        ("base: {training: {sed: 1}}", "base: training.sed: 1 must be of a setting that `qat train` has"),
        ("base: {training: {lr: wide}}", "training.lr"),
        ("base: {training: 3}", "base: training: 3 must be of one setting; this is a group of them"),
        ("base: {training: {lr: null}}", "base: training.lr: null must be a value"),
        ("base: {training: {lr: -1}}", "base: training.lr: -1.0 must be above 0"),
        ("vary: {training.seed: 1}", "vary"),
        ("vary: {training.seed: []}", "vary: training.seed: [] must be a list of one or more values, each once"),
        ("vary: {training.seed: [1, 2, 1]}", "[1, 2, 1] must be a list of one or more values, each once"),
        ("vary: {training.lr: [0.1, 1e-1]}", "must be a list of one or more values, each once"),
        ("vary: {training.sed: [1]}", "vary: training.sed 1: training.sed: 1 must be of a setting that"),
        ("vary: {1: [2]}", "1: 2 must be of a setting that"),
        ("vary: {training: [{seed: 1}]}", "training: {'seed': 1} must be of one setting; this is a group of them"),
        ("vary: {training.seed: [1, two]}", "training.seed 'two': "),
        ("vary: {task: [emotion, sing]}", "task 'sing': "),
        ("vary: {training.lr: [1, null]}", "training.lr: null must be a value"),
        ("vary: {training.batch: [1, 0]}", "training.batch 0: training.batch: 0 must be at least 1"),
        (
            "base: {anti_transfer: {layers: [2, 7]}}\nvary: {training.seed: [1], anti_transfer.beta: [1, [1, 1, 1]]}",
            "training.seed 1, anti_transfer.beta [1.0, 1.0, 1.0]: anti_transfer.beta: [1.0, 1.0, 1.0] must be",
        ),
    ],
)
def test_a_wrong_plan_is_told_in_one_line_before_anything_runs(tmp_path, text, message, capsys):
    plan, out = write(tmp_path, text), tmp_path / "out"
    with pytest.raises(ValueError, match=r"^[^\n]*$") as raised:
        read_plan(plan)
    assert message in str(raised.value)
    assert str(raised.value).startswith(f"{plan}: ")
    assert cli.main(["sweep", str(plan), "--out", str(out), "--cluster", "local"]) == 2
    assert capsys.readouterr().err == f"qat sweep: {raised.value}\n"
    assert not out.exists()


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
def test_a_wrong_layout_is_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_auto_is_slurm_where_there_is_an_sbatch(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not Layout().is_slurm
    with pytest.raises(ValueError, match="cluster: 'slurm' must have the command sbatch"):
        Layout(cluster="slurm")
    (tmp_path / "sbatch").write_text("")
    (tmp_path / "sbatch").chmod(0o755)
    assert Layout().is_slurm
    assert not LOCAL.is_slurm


@pytest.mark.parametrize(
    ("visible", "jobs", "expected"),
    [
        (None, None, ["0", "1", "2"]),
        ("4,GPU-ab,6", None, ["4", "GPU-ab", "6"]),
        (None, 2, ["0", "1"]),
        (None, 4, ["0", "1", "2", "0"]),
        (None, 9, ["0", "1", "2", "0", "1"]),
    ],
)
def test_every_job_on_this_machine_sees_one_gpu_of_those_that_are_visible(
    tmp_path, monkeypatch, visible, jobs, expected
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    runs = {tmp_path / str(n): Experiment() for n in range(5)}
    made = sweep._jobs(runs, Layout(jobs=jobs, cluster="local"), tmp_path / "driver")
    assert [job.gpu for job in made] == expected
    for job in made:
        replace(job, runs={})()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == job.gpu


@pytest.mark.parametrize(
    ("jobs", "at_once", "own", "slots"),
    [(1, 1, ["01234"], 1), (2, 1, ["024", "13"], 1), (3, 4, ["03", "14", "2"], 2), (9, 4, [*"01234"], 1)],
)
def test_a_job_trains_its_own_runs_first_and_takes_no_more_at_once_than_its_share(tmp_path, jobs, at_once, own, slots):
    runs = {tmp_path / str(n): Experiment(training=TrainingConfig(seed=n)) for n in range(5)}
    made = sweep._jobs(runs, Layout(at_once, jobs, "local"), tmp_path / "driver")
    for n, job in enumerate(made):
        order = "".join(own[n:] + own[:n])
        assert "".join(run.name for run in job.runs) == order
        assert job.runs == runs
        assert (job.at_once, job.one_thread) == (slots, at_once > 1)
    assert len(made) == len(own)


def test_what_failed_in_one_job_is_not_tried_by_another_that_was_about_to(tmp_path, monkeypatch):
    """The second job found the run free while the first was starting it, and gets its lock when it has failed."""
    write = sweep.write_text
    monkeypatch.setattr(
        sweep, "write_text", lambda file, text: write(file, f"locked: {is_locked(file.parent)}. {text}")
    )
    for rhemo in (tmp_path / "absent", None):  # the second would fail otherwise
        experiment = Experiment(network=NetworkConfig(rhemo=rhemo))
        process = multiprocessing.get_context("fork").Process(target=sweep._train, args=(experiment, tmp_path, False))
        process.start()
        process.join(60)
        assert process.exitcode == 0
        told = (tmp_path / "error.txt").read_text()
        assert told.startswith(f"locked: True. ValueError: {tmp_path}/absent: no such checkpoint\n")


def test_a_job_takes_what_is_not_finished_nor_failed_nor_being_trained(tmp_path):
    write_text(tmp_path / "finished/result.json", "{}")
    write_text(tmp_path / "failed/error.txt", "ValueError: no such checkpoint\n")
    write_text(tmp_path / "stopped/last.safetensors", "")
    with sweep._lock(tmp_path / "busy/.lock"):
        names = ["finished", "failed", "busy", "stopped", "new"]
        assert [name for name in names if sweep._is_free(tmp_path / name)] == ["stopped", "new"]
    assert sweep._is_free(tmp_path / "busy")
    job = sweep._Job({tmp_path / name: Experiment() for name in names}, 2, False, None, None)
    assert job._next({}) == tmp_path / "busy"
    assert job._next({0: (tmp_path / "busy", None)}) == tmp_path / "stopped", "it has been started, but has no lock yet"


def test_no_run_waits_behind_a_long_one_while_another_job_is_free(experiment, tmp_path, monkeypatch):
    def watch(*arguments):
        wait_for((tmp_path / "long/last.safetensors").is_file)
        os.kill(process := trainer(tmp_path / "long"), signal.SIGSTOP)
        wait_for(lambda: all((tmp_path / name / "result.json").is_file() for name in ("b", "c", "d")), 100)
        os.kill(process, signal.SIGCONT)
        watched(*arguments)

    watched = sweep._watch
    monkeypatch.setattr(sweep, "_watch", watch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    trainings = {Path("long"): longer(experiment, 30)} | {Path(name): experiment for name in ("b", "c", "d")}
    outcomes = train_all(trainings, tmp_path, replace(LOCAL, jobs=2))
    assert [one.status for one in outcomes] == ["finished"] * 4


def test_a_dry_run_names_what_would_be_trained(tmp_path, capsys):
    plan = write(tmp_path, "vary: {anti_transfer.layers: [[2], [13]], training.seed: [1, 2]}")
    assert cli.main(["sweep", str(plan), "--out", str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["trainings"] == 4
    assert [run["run"] for run in told["runs"]] == [f"layers-{n}/seed{seed}" for n in (2, 13) for seed in (1, 2)]
    assert told["runs"][0]["folder"] == str(tmp_path / "out/layers-2/seed1")
    assert list(tmp_path.iterdir()) == [plan]


def test_one_command_trains_all_and_the_same_again_goes_on_whatever_stopped_it(
    experiment, tmp_path, monkeypatch, capsys
):
    """Killed in the middle; then two runs fail for want of the network that they start from; then it is there."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(experiment.cache, tmp_path / "cache")
    alone = longer(replace(experiment, cache=tmp_path / "cache"), 8)
    base = to_plain(replace(alone, cache=Path("cache")))
    plan = {"base": base, "vary": {"training.initial": [None, "later"], "training.seed": [1, 2]}}
    write(tmp_path, yaml.safe_dump(plan))
    command = ["sweep", "plan.yaml", "--out", "out", "--cluster", "local", "--at-once", "2", "--json"]
    runs = [tmp_path / f"out/initial-none/seed{seed}" for seed in (1, 2)]

    environment = os.environ | {"PYTHONPATH": str(Path(qat.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-m", "qat", *command], env=environment, stderr=subprocess.DEVNULL
    ) as driver:
        try:
            for run in runs:
                wait_for((run / "last.safetensors").is_file)
                os.kill(trainer(run), signal.SIGSTOP)
                assert is_locked(run)
        finally:
            driver.kill()
    wait_for(lambda: not any(map(is_locked, runs)), 20)
    assert not [*tmp_path.rglob("result.json"), *tmp_path.rglob("error.txt")]
    before = [load_checkpoint(run / "last.safetensors", "training").record["history"] for run in runs]
    assert all(0 < len(history) < 8 for history in before)

    assert cli.main(command) == 1
    told = json.loads(capsys.readouterr().out)
    assert [(run["run"], run["status"], run["epochs"]) for run in told["runs"]] == [
        ("initial-none/seed1", "finished", 8),
        ("initial-none/seed2", "finished", 8),
        ("initial-later/seed1", "failed", None),
        ("initial-later/seed2", "failed", None),
    ]
    assert [one["run"] for one in told["problems"]] == ["initial-later/seed1", "initial-later/seed2"]
    assert all(f"ValueError: {tmp_path}/later: no such checkpoint" == one["problem"] for one in told["problems"])
    assert "Traceback" in (tmp_path / "out/initial-later/seed1/error.txt").read_text()
    for run, history in zip(runs, before, strict=True):
        after = load_checkpoint(run / "last.safetensors", "training").record["history"]
        assert after[: len(history)] == history, "what was trained before the kill is trained again"
        assert json.loads((run / "result.json").read_text())["device"] == "cpu, 1 threads"
    train_classifier(alone, tmp_path / "alone", quiet=True)
    for name in ("model.safetensors", "predictions.csv"):
        assert sha256_of(runs[0] / name) == sha256_of(tmp_path / "alone" / name)
        assert sha256_of(runs[0] / name) != sha256_of(runs[1] / name)

    (tmp_path / "alone").rename(tmp_path / "later")
    written = [(run / "result.json").stat().st_mtime_ns for run in runs]
    assert cli.main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert [run["status"] for run in told["runs"]] == ["finished"] * 4
    assert told["problems"] == []
    assert [(run / "result.json").stat().st_mtime_ns for run in runs] == written
    assert not list(tmp_path.rglob("error.txt"))
    table = summary_table(collect(tmp_path / "out"))
    assert sorted(zip(table["name"], table["seeds"], strict=True)) == [("initial-later", 2), ("initial-none", 2)]

    # All is finished: no job.
    jobs = list((tmp_path / "out/.jobs").iterdir())
    assert cli.main(command[:-1]) == 0
    assert "initial-later/seed2" in capsys.readouterr().out
    assert list((tmp_path / "out/.jobs").iterdir()) == jobs

    # Other settings in the same folders are refused before anything runs.
    base["training"]["lr"] = 0.5
    plan["vary"]["training.seed"] = [3, 2]
    write(tmp_path, yaml.safe_dump(plan))
    assert cli.main(command) == 2
    assert f"{runs[1]}: holds a run with training.lr 0.001, and this one has 0.5" in capsys.readouterr().err
    assert not (tmp_path / "out/initial-none/seed3").exists()


def test_what_ends_a_run_ends_no_other(experiment, tmp_path, monkeypatch):
    """Of one job's runs, one is killed, one is being trained by somebody else, one is of RH-Emo; then the job dies."""

    def watch(jobs, *arguments):
        wait_for((tmp_path / "killed/last.safetensors").is_file)
        os.kill(trainer(tmp_path / "killed"), signal.SIGKILL)
        wait_for((tmp_path / "stopped/last.safetensors").is_file)
        controller = jobs[0]._process.pid
        [job] = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
        os.kill(int(job), signal.SIGKILL)
        watched(jobs, *arguments)

    watched = sweep._watch
    monkeypatch.setattr(sweep, "_watch", watch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pretraining = RHEmoExperiment(
        corpus=experiment.corpus,
        normalisation="log",
        rhemo=RHEmoConfig(width=0.01),
        training=experiment.training,
        cache=experiment.cache,
    )
    write_text(tmp_path / "waiting/error.txt", "of an earlier sweep\n")
    endless = longer(experiment, 100_000)
    trainings = {"killed": endless, "busy": experiment, "rhemo": pretraining, "stopped": endless, "waiting": experiment}
    with sweep._lock(tmp_path / "busy/.lock"):
        killed, busy, rhemo, stopped, waiting = train_all({Path(k): v for k, v in trainings.items()}, tmp_path, LOCAL)
    assert killed == Outcome(Path("killed"), "failed", "the process was killed by signal 9")
    assert busy == Outcome(Path("busy"), "busy", f"process {os.getpid()} on {socket.gethostname()} is training it")
    assert not (tmp_path / "busy/split.json").exists()
    assert rhemo.status == "finished"
    assert rhemo.result["kind"] == "rhemo"
    [logs] = (tmp_path / ".jobs").iterdir()
    assert list(logs.glob("*.err"))
    assert [(one.status, one.error) for one in (stopped, waiting)] == [
        ("stopped", f"the jobs ended before it; the logs in {logs} may tell why")
    ] * 2
    wait_for(lambda: not is_locked(tmp_path / "stopped"), 20)


def test_an_interruption_at_the_terminal_ends_the_jobs_first(experiment, tmp_path):
    plan = {"base": to_plain(longer(experiment, 100_000))}
    path = write(tmp_path, yaml.safe_dump(plan))
    command = [sys.executable, "-m", "qat", "sweep", path, "--out", tmp_path, "--cluster", "local"]
    environment = os.environ | {"PYTHONPATH": str(Path(qat.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as driver:
        try:
            wait_for((tmp_path / "base/last.safetensors").is_file)
            job = parent(parent(trainer(tmp_path / "base")))
            os.kill(job, signal.SIGSTOP)
            os.killpg(driver.pid, signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                driver.wait(2)
            os.kill(job, signal.SIGCONT)
            assert driver.wait(100) == 130
            assert not is_locked(tmp_path / "base")
        finally:
            os.killpg(driver.pid, signal.SIGCONT)
            driver.kill()
        assert driver.stderr is not None
        told = driver.stderr.read()
    assert told.endswith("qat sweep: interrupted; what is finished is kept, and the same command goes on\n")
    assert "Traceback" not in told
    assert not (tmp_path / "base/error.txt").exists()
