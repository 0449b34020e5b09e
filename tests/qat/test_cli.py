import errno
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import soundfile

from qat import cli
from qat.commands import campaign, train
from qat.commands.parser import instance
from qat.config import Experiment, RHEmoExperiment
from qat.data.manifest import Manifest
from qat.training.checkpoint import load_checkpoint
from qat.training.distributed import process_group


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    try:
        code = cli.main([str(word) for word in words])
    except SystemExit as stop:
        code = int(stop.code)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def options(corpus: Manifest, cache: Path, rhemo: Path) -> list[object]:
    return [
        "--corpus.name", "csv", "--corpus.folder", corpus.root / "tiny.csv", "--cache", cache, "--normalisation", "log",
        "--network.width", "0.01", "--network.init", "he", "--network.rhemo", rhemo, "--network.embedding_scale", "rms",
        "--training.batch", "8", "--training.epochs", "1", "--training.lr", "1e-3", "--training.device", "cpu",
    ]  # fmt: skip


def test_from_a_corpus_to_predictions_by_commands_alone(
    corpus: Manifest, cache: Path, rhemo: Path, options: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    csv = corpus.root / "tiny.csv"
    code, out, _ = run(capsys, "corpus", "check", "csv", "--folder", csv, "--json")
    assert code == 0
    assert {k: json.loads(out)[k] for k in ("files", "speakers", "unusable")} == {
        "files": 36,
        "speakers": 4,
        "unusable": 0,
    }

    code, out, _ = run(capsys, "prepare", "--corpus.name", "csv", "--corpus.folder", csv, "--cache", cache, "--json")
    assert (code, json.loads(out)["cuts"]) == (0, 36)

    small = ["--corpus.name", "csv", "--corpus.folder", csv, "--cache", cache, "--rhemo.width", "0.01"]
    small += ["--training.epochs", "1", "--training.batch", "8"]
    code, out, _ = run(capsys, "pretrain", "rhemo", "--out", tmp_path / "rhemo", *small, "--json")
    assert (code, json.loads(out)["kind"]) == (0, "rhemo")

    code, out, _ = run(capsys, "pretrain", "speakers", "--out", tmp_path / "voice", *options, "--json")
    assert (code, json.loads(out)["classes"]) == (0, ["ann", "ben", "cem", "dan"])
    code, out, _ = run(capsys, "pretrain", "words", "--out", tmp_path / "word", *options, "--json")
    assert (code, json.loads(out)["classes"]) == (0, ["one", "three", "two"])

    at = ["--anti_transfer.twin", tmp_path / "voice", "--anti_transfer.layers", "[2,13]"]
    code, out, _ = run(capsys, "train", "--out", tmp_path / "emotion", *options, *at)
    assert code == 0
    assert "validation" in out
    record = load_checkpoint(tmp_path / "emotion", "classifier").record["experiment"]
    assert record["anti_transfer"]["layers"] == [2, 13]

    code, out, _ = run(capsys, "evaluate", tmp_path / "emotion", "--json")
    assert (code, json.loads(out)["parts"]["test"]["samples"]) == (0, 4)

    wavs = sorted(corpus.root.glob("*.wav"))[:2]
    code, out, _ = run(capsys, "predict", tmp_path / "emotion", *wavs, "--json")
    assert code == 0
    rows = json.loads(out)["predictions"]
    assert [row["path"] for row in rows] == [str(w) for w in wavs]
    assert sum(rows[0][c] for c in ("angry", "neutral", "sad")) == pytest.approx(1)

    code, out, _ = run(capsys, "report", tmp_path, "--json")
    assert code == 0
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert len(json.loads(out)["summary"]) == len(pd.read_csv(tmp_path / "summary.csv")) == 4


def test_settings_come_from_yaml_and_options_win(
    options: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("split: {rule: speaker, seed: 3}\nanti_transfer: {beta: 0.5}\n")
    args = ["--config", tmp_path / "run.yaml", "--anti_transfer.beta", "0.25", "--out", tmp_path / "run"]
    parser, _ = cli.build_parser()
    chosen = parser.instantiate(parser.parse_args(["train", *map(str, args)])).train
    assert (chosen.split.rule, chosen.split.seed, chosen.anti_transfer.beta) == ("speaker", 3, 0.25)
    args = ["--anti_transfer.layers", "[2, 7]", "--anti_transfer.beta", "[1, 0.5]", "--out", tmp_path / "run"]
    chosen = parser.instantiate(parser.parse_args(["train", *map(str, args)])).train
    assert chosen.anti_transfer.betas == [1.0, 0.5]


def test_defaults_are_the_papers() -> None:
    parser, _ = cli.build_parser()
    chosen = parser.instantiate(parser.parse_args(["train", "--out", "x"])).train
    assert instance(Experiment, chosen) == Experiment()
    assert (Experiment().training.lr, Experiment().training.batch, Experiment().training.patience) == (1e-5, 20, 20)
    chosen = parser.instantiate(parser.parse_args(["pretrain", "rhemo", "--out", "x"])).pretrain.rhemo
    assert instance(RHEmoExperiment, chosen) == RHEmoExperiment()
    for task in ("words", "speakers"):
        training = parser.instantiate(parser.parse_args(["pretrain", task, "--out", "x"])).pretrain[task].training
        assert (training.lr, training.batch, training.patience) == (5e-5, 300, 20)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--out", "x", "--network.width", "wide"], "network.width"),
        (["train", "--out", "x", "--network.widht", "1"], "network.widht"),
        (["prepare", "--corpus.name", "timit"], "unknown corpus 'timit'; known are demo, fillets"),
        (["prepare", "--corpus.folder", "/nowhere"], "/nowhere: empty or no folder"),
        (["evaluate", "/nowhere"], "/nowhere: no such checkpoint"),
        (["predict", "/nowhere", "a.wav"], "/nowhere: no such checkpoint"),
        (["report", "/nowhere"], "/nowhere"),
        (["corpus", "make", "fillets", "--folder", "x"], "use `qat corpus fetch fillets`"),
        (["corpus", "fetch", "demo", "--folder", "x"], "use `qat corpus make demo`"),
        (["demo", "--seeds", "0"], "--seeds 0"),
        (["train", "--out", "x", "--training.batch", "0"], "training.batch: 0 must be at least 1"),
        (["train", "--out", "x", "--features.hop", "0"], "features.hop: 0 must be above 0"),
        (["train", "--out", "x", "--network.rhemo", "/nowhere"], "/nowhere: no such checkpoint"),
        (["train", "--out", "x", "--training.device", "abacus"], "'abacus' is not one of PyTorch's"),
        (["sing"], "'sing'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "action", "resumes"),
    [(["train", "--out", "x"], (train, "run_train"), True), (["demo"], (campaign, "run_study"), False)],
)
def test_interruption_is_told_and_has_its_own_exit_code(
    words: list[str], action: Any, resumes: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(*action, interrupted)
    code, _, err = run(capsys, *words)
    assert code == 130
    assert "continues" in err
    assert ("--resume" in err) == resumes


def test_failed_training_exits_with_1(options: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(
        capsys, "train", "--out", tmp_path / "run", *options, "--training.lr", "1e18", "--training.epochs", "5"
    )
    assert code == 1
    assert "lower training.lr" in err


@pytest.mark.parametrize("error", [MemoryError("Unable to allocate 9 TiB"), RuntimeError("CUDA out of memory. Tried")])
def test_too_little_memory_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "run_train", Mock(side_effect=error))
    code, _, err = run(capsys, "train", "--out", "x")
    assert (code, err) == (2, f"qat train: not enough memory for these settings ({error})\n")


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "a"),
            "; make room there, then the same command with --resume",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a"), "; make room there, then the same command with --resume"),
        (OSError("a: cannot be written (I/O error: No space left on device (os error 28))"), "; make room there, then"),
        (OSError(errno.EROFS, "Read-only file system", "a"), "; change its permissions, or name another folder"),
        (OSError(errno.EMFILE, "Too many open files", "a"), "; allow more open files, such as `ulimit -n 1024`"),
        (ChildProcessError("a worker process died"), "died"),
    ],
)
def test_what_the_system_refuses_is_one_line_that_says_what_to_do(
    error: OSError, advice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "run_train", Mock(side_effect=error))
    code, _, err = run(capsys, "train", "--out", "x")
    assert code == 2
    assert err.startswith(f"qat train: {error}")
    assert advice in err
    assert err.count("\n") == 1


def test_a_run_folder_that_cannot_be_made_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read_only = OSError(errno.EROFS, "Read-only file system", str(tmp_path / "run"))
    monkeypatch.setattr("qat.training.run.held", Mock(side_effect=read_only))
    code, _, err = run(capsys, "train", "--out", tmp_path / "run")
    assert (code, err) == (2, f"qat train: {read_only}; change its permissions, or name another folder\n")


def test_other_errors_of_the_program_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "run_train", Mock(side_effect=RuntimeError("a shape")))
    with pytest.raises(RuntimeError, match="a shape"):
        cli.main(["train", "--out", "x"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_termination_is_an_interruption(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What Slurm, containers and CI send first, and terminals that are closed."""
    before = signal.getsignal(number)
    monkeypatch.setattr(train, "run_train", lambda options: signal.raise_signal(number))
    code, _, err = run(capsys, "train", "--out", "x")
    assert code == 130
    assert "interrupted; finished work is kept" in err
    assert signal.getsignal(number) == before


def test_under_nohup_a_closed_terminal_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(train, "run_train", lambda options: signal.raise_signal(signal.SIGHUP) or "done")
        assert cli.main(["train", "--out", "x"]) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_writer_is_told_who_holds_the_folder(
    options: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "import pathlib, sys, time\nfrom qat.files import LOCK, held\n"
        "with held(pathlib.Path(sys.argv[1]) / LOCK):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        exit_code, _, err = run(capsys, "train", "--out", tmp_path / "run", *options)
        other.kill()
    assert exit_code == 2
    assert re.search(rf"run: process {other.pid} on \S+ \(since .*\) writes there; choose another folder, or wait", err)
    assert not (tmp_path / "run/experiment.yaml").exists()


def test_doctor_and_corpus_list(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["torchaudio (spectrograms)"].startswith("ok")
    code, out, _ = run(capsys, "corpus", "list")
    assert code == 0
    assert "hedgewars" in out


def test_corpus_check_tells_what_cannot_be_used(
    corpus: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in corpus.table["path"][:3]:
        (tmp_path / path).write_bytes((corpus.root / path).read_bytes())
    corpus.table[:3].drop(columns=["checksum", "duration"]).to_csv(tmp_path / "some.csv", index=False)
    (tmp_path / corpus.table["path"][1]).write_text("no audio")
    soundfile.write(tmp_path / corpus.table["path"][2], np.ones(100), 16000)
    code, out, _ = run(capsys, "corpus", "check", "csv", "--folder", tmp_path / "some.csv", "--json")
    assert code == 1
    assert json.loads(out)["unusable"] == 2
    assert ["cannot be decoded" in p["problem"] for p in json.loads(out)["problems"]] == [True, False]
    assert "fewer than one window" in json.loads(out)["problems"][1]["problem"]


def test_files_that_cannot_be_used_are_left_out_or_with_strict_an_error(
    corpus: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 and a line on stderr tell that a training had to leave files out."""
    for path in corpus.table["path"]:
        (tmp_path / path).write_bytes((corpus.root / path).read_bytes())
    corpus.table.drop(columns=["checksum", "duration"]).to_csv(tmp_path / "some.csv", index=False)
    bad = corpus.table["path"][1]
    (tmp_path / bad).write_text("no audio")
    options = ["--corpus.name", "csv", "--corpus.folder", tmp_path / "some.csv", "--cache", tmp_path / "cache"]
    training = [*options, "--network.domain", "real", "--network.width", "0.01", "--training.epochs", "1"]
    check = ["corpus", "check", "csv", tmp_path / "some.csv"]
    run_folder = tmp_path / "run"
    for words in (
        ["train", "--out", run_folder, *training],
        ["pretrain", "rhemo", "--out", run_folder, *options, "--rhemo.width", "0.01", "--training.epochs", "1"],
        ["prepare", *options],
        check,
    ):
        code, out, err = run(capsys, *words, "--strict")
        assert (code, out, run_folder.exists()) == (2, "", False), words
        assert err.splitlines()[-1].endswith("(1 problem)")
        assert bad in err.splitlines()[-1]
    for words in (["train", "--out", run_folder, *training], ["prepare", *options], check):
        code, out, err = run(capsys, *words, "--json")
        assert (code, [problem["path"] for problem in json.loads(out)["problems"]]) == (1, [bad]), words
        assert bad in err.splitlines()[-1]
    assert len(json.loads((run_folder / "split.json").read_text())["train"]) == 24
    good = tmp_path / corpus.table["path"][0]
    code, out, _ = run(capsys, "predict", run_folder, tmp_path / bad, good, "--json")
    assert (code, [row["path"] for row in json.loads(out)["predictions"]]) == (1, [str(good)])
    code, out, err = run(capsys, "predict", run_folder, tmp_path / bad, good, "--strict")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert bad in err


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"RANK": "1", "WORLD_SIZE": "2"},
            "RANK=1 and WORLD_SIZE=2 are set, as by torchrun, but MASTER_ADDR, MASTER_PORT are not; unset them, "
            "or start with torchrun",
        ),
        ({"RANK": "0"}, "RANK=0 is set, as by torchrun, but WORLD_SIZE, MASTER_ADDR, MASTER_PORT are not"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "but RANK is not"),
        ({"RANK": "one", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "whole numbers"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "a rank is from 0"),
    ],
)
def test_what_torchrun_sets_is_there_as_a_whole_or_not_at_all(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, out, err = run(capsys, "train", "--out", "/nowhere/run")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    with pytest.raises(ValueError, match=message.split(";")[0]), process_group("cpu"):
        pass


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["train"], ["pretrain", "rhemo"], ["demo"], ["corpus", "fetch"], ["predict"], ["prepare"]):
        code, out, _ = run(capsys, *words, "--help")
        assert code == 0
        assert "--json" in out


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["demo", "--help"], ["train", "--help"], ["grid", "--help"]]
)
def test_help_and_version_import_no_torch(words: list[str]) -> None:
    code = (
        "import sys\nfrom qat.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'pandas', 'matplotlib'} & sys.modules.keys()"
    )
    shown = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout
