"""The command `qat sweep`: what is planned, and that the same command goes on, whatever stopped it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import qat
from qat import cli
from qat.campaign.sweep import plan_sweep, read_plan
from qat.commands.parser import instance
from qat.config import Experiment, to_plain
from qat.files import sha256_of
from qat.results.runs import RunsFolder
from qat.results.tables import summary_table
from qat.training.checkpoint import load_checkpoint
from qat.training.classifier import train_classifier
from tests.qat.campaign.running import fork_instead_of_jobs, is_locked, longer, parent, trainer, wait_for
from tests.qat.training.trainings import same


def write(folder: Path, text: str) -> Path:
    path = folder / "plan.yaml"
    path.write_text(text)
    return path


def test_a_plan_is_every_combination_in_its_order(tmp_path: Path) -> None:
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
    runs = [(name, run.training.seed, run) for name, run in read_plan(plan)]
    assert [(name, seed) for name, seed, _ in runs] == [
        (f"layers-{layers},beta-{beta}", seed) for seed in (2, 1) for layers in ("2", "2+13") for beta in ("0.1", "1.0")
    ]
    [chosen] = [run for name, seed, run in runs if (name, seed) == ("layers-2+13,beta-0.1", 1)]
    assert (chosen.anti_transfer.layers, chosen.anti_transfer.beta) == ([2, 13], 0.1)
    assert all((run.training.lr, run.training.epochs, run.network.width) == (1e-3, 7, 0.125) for *_, run in runs)
    assert chosen.network.rhemo == Path("runs/rhemo")
    assert {run.training.seed for _, run in read_plan(plan, [5, 6])} == {5, 6}


def test_a_plan_says_what_qat_train_would(tmp_path: Path) -> None:
    settings = "split: {rule: speaker, seed: 3}\nanti_transfer: {layers: [2, 7], beta: [1e-1, 1]}\ntask: speaker\n"
    (tmp_path / "run.yaml").write_text(settings)
    parser, _ = cli.build_parser()
    options = parser.parse_args(["train", "--config", str(tmp_path / "run.yaml"), "--out", "x"])
    trained = instance(Experiment, parser.instantiate(options).train)
    plan = write(tmp_path, "base:\n" + "".join(f"  {line}\n" for line in settings.splitlines()))
    assert read_plan(plan) == [("base", trained)]


@pytest.mark.parametrize(
    ("vary", "names"),
    [
        ("training.seed: [1, 2]", ["base", "base"]),
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
        ("{split.seed: [1, 2], training.seed: [3]}", ["split-1", "split-2"]),
        ("{cache: [a], anti_transfer.cache: [true]}", ["cache-a,anti_transfer.cache-true"]),
    ],
)
def test_names_are_short_and_unique_but_for_the_seed(tmp_path: Path, vary: str, names: list[str]) -> None:
    assert [name for name, _ in read_plan(write(tmp_path, f"vary:\n  {vary}\n"))] == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "[1, 2] must be a mapping of settings"),
        ("base: [", "not readable as YAML"),
        ("base: 3", "base: 3 must be a mapping"),
        ("vary: 3", "vary: 3 must be a mapping"),
        ("bases: {task: emotion}", "unknown setting bases; Sweep has base, vary"),
        ("base: {training: {sed: 1}}", "base: training.sed: unknown setting; TrainingConfig has lr, "),
        ("base: {training: {lr: wide}}", "base: training.lr: 'wide' must be a number"),
        ("base: {training: 3}", "base: training: 3 must be of one setting; this is a group of settings"),
        ("base: {training: {lr: null}}", "base: training.lr: null must be a number"),
        ("base: {training: {lr: -1}}", "base: training.lr: -1.0 must be above 0"),
        ("vary: {training.seed: 1}", "vary.training.seed: 1 must be a list"),
        ("vary: {training.seed: []}", "vary: training.seed: [] must be a list of one or more values, each once"),
        ("vary: {training.seed: [1, 2, 1]}", "[1, 2, 1] must be a list of one or more values, each once"),
        ("vary: {training.lr: [0.1, 1e-1]}", "must be a list of one or more values, each once"),
        ("vary: {training.sed: [1]}", "vary: training.sed: unknown setting; TrainingConfig has lr, "),
        ("vary: {1: [2]}", "vary: 1 must be text"),
        ("vary: {training: [{seed: 1}]}", "training: {'seed': 1} must be of one setting; this is a group of settings"),
        ("vary: {training.seed: [1, two]}", "vary: training.seed: 'two' must be a whole number"),
        ("vary: {task: [emotion, sing]}", "vary: task: 'sing' must be one of emotion, speaker, word, word-presence"),
        ("vary: {training.lr: [1, null]}", "vary: training.lr: null must be a number"),
        ("vary: {training.batch: [1, 0]}", "training.batch 0: training.batch: 0 must be at least 1"),
        (
            "base: {anti_transfer: {layers: [2, 7]}}\nvary: {training.seed: [1], anti_transfer.beta: [1, [1, 1, 1]]}",
            "training.seed 1, anti_transfer.beta [1, 1, 1]: anti_transfer.beta: [1.0, 1.0, 1.0] must be",
        ),
    ],
)
def test_a_wrong_plan_is_told_in_one_line_before_anything_runs(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, out = write(tmp_path, text), tmp_path / "out"
    with pytest.raises(ValueError, match=r"^[^\n]*$") as raised:
        read_plan(plan)
    assert message in str(raised.value)
    assert str(raised.value).startswith(f"{plan}: ")
    assert cli.main(["sweep", str(plan), "--out", str(out), "--cluster", "local"]) == 2
    assert capsys.readouterr().err == f"qat sweep: {raised.value}\n"
    assert not out.exists()


def test_a_dry_run_names_what_would_be_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = write(tmp_path, "vary: {anti_transfer.layers: [[2], [13]], training.seed: [1, 2]}")
    assert cli.main(["sweep", str(plan), "--out", str(tmp_path / "out"), "--dry-run", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["trainings"] == 4
    names = [(run["name"], run["seed"]) for run in told["runs"]]
    assert names == [(f"layers-{n}", seed) for n in (2, 13) for seed in (1, 2)]
    assert len({run["run"] for run in told["runs"]}) == 4
    assert told["hours"] > 0
    assert list(tmp_path.iterdir()) == [plan]


def test_what_varies_must_change_what_is_learnt(tmp_path: Path) -> None:
    plan = write(tmp_path, "vary: {training.capture: [true, false]}")
    message = r"plan.yaml: capture-false: is the same training as capture-true; varied settings must change"
    with pytest.raises(ValueError, match=message):
        plan_sweep(tmp_path / "out", plan)


def test_a_checkpoint_that_is_not_there_is_told_before_anything_runs(tmp_path: Path) -> None:
    plan = write(tmp_path, "base: {anti_transfer: {twin: absent}}")
    with pytest.raises(ValueError, match=r"plan.yaml: base: anti_transfer.twin: absent must be a checkpoint"):
        plan_sweep(tmp_path / "out", plan)


def test_runs_of_an_earlier_layout_are_refused(tmp_path: Path) -> None:
    plan, old = write(tmp_path, "base: {}"), tmp_path / "out/layers-2/seed1/result.json"
    old.parent.mkdir(parents=True)
    old.write_text("{}")
    message = r"out: has layers-2/seed1/result.json, of an older layout than plan.csv and runs/ADDRESS; choose another"
    with pytest.raises(ValueError, match=message):
        plan_sweep(tmp_path / "out", plan).finished()


def test_one_command_trains_all_and_the_same_again_goes_on_whatever_stopped_it(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed in the middle; then two runs fail for want of their corpus; then it is there."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(experiment.cache, tmp_path / "cache")
    alone = longer(replace(experiment, cache=tmp_path / "cache"), 8)
    base = to_plain(replace(alone, cache=Path("cache")))
    plan = {
        "base": base,
        "vary": {"corpus.folder": [base["corpus"]["folder"], "later/later.csv"], "training.seed": [1, 2]},
    }
    file = write(tmp_path, yaml.safe_dump(plan))
    command = ["sweep", "plan.yaml", "--out", "out", "--cluster", "local", "--at-once", "2", "--json"]
    addresses = list(plan_sweep(Path("out"), file).trainings)
    runs = [tmp_path / "out" / address for address in addresses[:2]]

    stopped = set()

    def is_stopped(run: Path) -> bool:
        """Stops it after its first epoch."""
        if run not in stopped and (run / "last.safetensors").is_file():
            os.kill(trainer(run), signal.SIGSTOP)
            stopped.add(run)
        return run in stopped

    environment = os.environ | {"PYTHONPATH": str(Path(qat.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-m", "qat", *command], env=environment, stderr=subprocess.DEVNULL
    ) as driver:
        try:
            wait_for(lambda: all([is_stopped(run) for run in runs]))
            assert all(map(is_locked, runs))
        finally:
            driver.kill()
    wait_for(lambda: not any(map(is_locked, runs)), 20)
    assert not [*tmp_path.rglob("result.json"), *tmp_path.rglob("error.txt")]
    before = [load_checkpoint(run / "last.safetensors", "training").record["history"] for run in runs]
    assert all(0 < len(history) < 8 for history in before)

    assert cli.main(command) == 1
    told = json.loads(capsys.readouterr().out)
    assert [(run["training"], run["status"], run["epochs"]) for run in told["runs"]] == [
        ("folder-tiny.csv, seed 1", "finished", 8),
        ("folder-tiny.csv, seed 2", "finished", 8),
        ("folder-later.csv, seed 1", "failed", None),
        ("folder-later.csv, seed 2", "failed", None),
    ]
    assert [run["run"] for run in told["runs"]] == list(map(str, addresses))
    assert [one["training"] for one in told["problems"]] == ["folder-later.csv, seed 1", "folder-later.csv, seed 2"]
    assert all(f"{tmp_path}/later/later.csv" in one["problem"] for one in told["problems"])
    assert "Traceback" in (tmp_path / "out" / addresses[2] / "error.txt").read_text()
    for run, history in zip(runs, before, strict=True):
        after = load_checkpoint(run / "last.safetensors", "training").record["history"]
        assert after[: len(history)] == history, "what was trained before the kill is trained again"
        assert json.loads((run / "result.json").read_text())["device"] == "cpu, 1 threads"
    train_classifier(alone, tmp_path / "alone", quiet=True)
    trained, other, undisturbed = (load_checkpoint(run, "classifier") for run in (*runs, tmp_path / "alone"))
    assert same(trained.tensors, undisturbed.tensors)
    assert trained.record == undisturbed.record
    assert not same(trained.tensors, other.tensors)
    assert sha256_of(runs[0] / "predictions.csv") == sha256_of(tmp_path / "alone/predictions.csv")
    assert sha256_of(runs[0] / "predictions.csv") != sha256_of(runs[1] / "predictions.csv")

    shutil.copytree(alone.corpus.folder.parent, tmp_path / "later")
    (tmp_path / "later" / alone.corpus.folder.name).rename(tmp_path / "later/later.csv")
    written = [(run / "result.json").stat().st_mtime_ns for run in runs]
    fork_instead_of_jobs(monkeypatch)
    assert cli.main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert [run["status"] for run in told["runs"]] == ["finished"] * 4
    assert told["problems"] == []
    assert [(run / "result.json").stat().st_mtime_ns for run in runs] == written
    assert not list(tmp_path.rglob("error.txt"))
    table = summary_table(RunsFolder.read(tmp_path / "out").runs)
    assert sorted(zip(table["name"], table["seeds"], strict=True)) == [("folder-later.csv", 2), ("folder-tiny.csv", 2)]

    # All is finished: no job.
    jobs = list((tmp_path / "out/.jobs").iterdir())
    assert cli.main(command[:-1]) == 0
    assert "folder-later.csv, seed" in " ".join(capsys.readouterr().out.split())
    assert list((tmp_path / "out/.jobs").iterdir()) == jobs

    # Of another plan in the same folder only what is new is to be trained; of a changed run nothing is.
    capsys.readouterr()
    plan["vary"]["training.seed"] = [3, 2]
    write(tmp_path, yaml.safe_dump(plan))
    assert cli.main([*command, "--dry-run"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["trainings"], told["finished"]) == (4, 2)
    result = json.loads((runs[1] / "result.json").read_text())
    result["experiment"]["training"]["lr"] = 0.5
    (runs[1] / "result.json").write_text(json.dumps(result))
    assert cli.main(command) == 2
    assert f"out/{addresses[1]}: holds a run with training.lr 0.5, and this one has 0.001" in capsys.readouterr().err


def test_an_interruption_at_the_terminal_ends_the_jobs_first(experiment: Experiment, tmp_path: Path) -> None:
    plan = {"base": to_plain(longer(experiment, 100_000))}
    path = write(tmp_path, yaml.safe_dump(plan))
    command = [sys.executable, "-m", "qat", "sweep", path, "--out", tmp_path, "--cluster", "local"]
    run = tmp_path / next(iter(plan_sweep(tmp_path, path).trainings))
    environment = os.environ | {"PYTHONPATH": str(Path(qat.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as driver:
        try:
            wait_for((run / "last.safetensors").is_file)
            job = parent(parent(trainer(run)))
            os.kill(job, signal.SIGSTOP)
            os.killpg(driver.pid, signal.SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                driver.wait(2)
            os.kill(job, signal.SIGCONT)
            assert driver.wait(100) == 130
            assert not is_locked(run)
        finally:
            with suppress(ProcessLookupError):  # all of them have ended
                os.killpg(driver.pid, signal.SIGCONT)
            driver.kill()
        assert driver.stderr is not None
        told = driver.stderr.read()
    assert told.endswith("qat sweep: interrupted; finished work is kept, and the same command continues\n")
    assert "Traceback" not in told
    assert not (run / "error.txt").exists()
