"""Commands of `qat` as processes that may be killed, miniature ones, and what they leave, apart from times."""

import csv
import dataclasses
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from tests.qat.campaign.running import is_locked

_IMPORTED = ["qat.training.classifier", "qat.training.rhemo", "qat.report.report", "qat.campaign.jobs", "torchmetrics"]
_IMPORTED += ["torch.utils.tensorboard", "torch._inductor", "submitit", "joblib.externals.loky", __name__]
"""What takes seconds to import, and is imported once for all processes."""

NOTHING = "before any file"

_OF_ONE_RUN = ("seconds", "seconds_per_epoch", "peak_memory", "command")
"""Of `result.json`: times, memory, and the command, which in a campaign names a job's log."""


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line of `qat`.

    Args:
        words: command line.
        folder: folder of all that it writes.
        limits: for instance the size of files, by `resource`'s numbers.
        number: of several at the same time, which.
    """

    words: tuple[str, ...]
    folder: Path
    limits: Mapping[int, int] = dataclasses.field(default_factory=dict)
    number: int = 0

    def start(self) -> Any:
        """Begin it, in a process whose output is `Command.told`."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_IMPORTED)
        process = context.Process(target=_main, args=(self.words, self._log, dict(self.limits)))
        process.start()
        return process

    def run(self) -> int:
        """Run it to its end; the exit code."""
        process = self.start()
        process.join()
        code: int = process.exitcode
        return code

    def told(self) -> str:
        return self._log.read_text()

    @property
    def _log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}-{self.number}.log")

    def clear(self) -> None:
        """Remove what it has written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def killed_after(self, seconds: float) -> str:
        """Begin it anew, kill it after so long, wait until nothing of it lives; what it was about, "" if done."""
        self.clear()
        process = self.start()
        process.join(seconds)
        if process.exitcode is not None:
            return ""
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        state = self.state()
        end = time.monotonic() + 60
        while any(map(is_locked, {lock.parent for lock in self.folder.rglob(".lock")})):
            assert time.monotonic() < end, f"something of {self.words} lives on"
            time.sleep(0.1)
        return state

    def state(self) -> str:
        """The file that is being written, else the last that was."""
        files = [path for path in self.folder.rglob("*") if ".lock" not in path.name and path.is_file()]
        if half := [path for path in files if any(part.endswith(".part") for part in path.parts)]:
            return f"in {max(half, key=_written).name.strip('.').partition('.part')[0].rpartition('.')[0] or 'a draft'}"
        done = [path for path in files if not {".jobs", "tensorboard"} & set(path.parts)]
        return f"after {max(done, key=_written).name}" if done else NOTHING

    def left(self) -> dict[str, str]:
        """Digests of all that it has left, without times, by path."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            inside = path.relative_to(self.folder)
            if path.is_file() and not {".jobs", "tensorboard"} & set(inside.parts) and ".lock" not in path.name:
                found[inside.as_posix()] = hashlib.sha256(_content(path)).hexdigest()[:12]
        return found


def _main(words: tuple[str, ...], log: Path, limits: dict[int, int]) -> None:
    import torch

    from qat import cli

    torch.set_num_threads(1)
    number = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(number, 1)
    os.dup2(number, 2)
    os.environ["OMP_NUM_THREADS"] = "1"  # for processes that it starts
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing too much is an error
    for name, value in limits.items():
        resource.setrlimit(name, (value, resource.getrlimit(name)[1]))
    sys.exit(cli.main(list(words)))


def _written(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def _content(path: Path) -> bytes:
    """The bytes of a file, without the times in it."""
    if path.name == "result.json":
        result = json.loads(path.read_text())
        return json.dumps({key: value for key, value in result.items() if key not in _OF_ONE_RUN}).encode()
    if path.name == "metrics.csv":
        with path.open() as file:
            return repr([{**row, "seconds": ""} for row in csv.DictReader(file)]).encode()
    if path.suffix == ".safetensors":
        with safe_open(path, framework="np") as file:
            record = json.loads(file.metadata()["record"])
            del record["sha256"]  # of the seconds below, too
            for row in record.get("history", []):
                del row["seconds"]
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        described = json.dumps(record) + repr([(name, one.shape, one.dtype.str) for name, one in tensors.items()])
        return described.encode() + b"".join(one.tobytes() for one in tensors.values())
    return path.read_bytes()


def commands(top: Path, corpus: Path, cache: Path, rhemo: Path) -> dict[str, Command]:
    """Miniature commands, by name, each with a folder of its own below `top`.

    Args:
        top: folder of what they write.
        corpus: manifest of the corpus of `tests/qat`.
        cache: its prepared spectrograms.
        rhemo: run of RH-Emo.
    """
    read = ["--corpus.name", "csv", "--corpus.folder", str(corpus)]
    short = ["--training.batch", "8", "--training.epochs", "3", "--training.device", "cpu", "--training.lr", "1e-3"]
    short += ["--training.checkpoint_seconds", "0", "--normalisation", "log", "--cache", str(cache), "--resume"]
    network = ["--network.width", "0.01", "--network.init", "he", "--network.rhemo", str(rhemo)]
    words = {
        "train": ["train", *read, *short, *network, "--out", str(top / "train/run")],
        "pretrain": ["pretrain", "rhemo", *read, *short, "--rhemo.width", "0.01", "--out", str(top / "pretrain/run")],
        "prepare": ["prepare", *read, "--cache", str(top / "prepare/cache")],
        "report": ["report", str(rhemo.parent), "--out", str(top / "report/report.html")],
    }
    return {name: Command(tuple(line), top / name) for name, line in words.items()}


def sweep(top: Path, corpus: Path, cache: Path) -> Command:
    """Two trainings; arguments as of `commands`."""
    training = {"batch": 8, "epochs": 2, "device": "cpu", "checkpoint_seconds": 0}
    base: dict[str, Any] = {"corpus": {"name": "csv", "folder": str(corpus)}, "cache": str(cache)}
    base |= {"network": {"domain": "real", "width": 0.01}, "training": training}
    plan = top / "plan.yaml"
    plan.write_text(yaml.safe_dump({"base": base, "vary": {"training.seed": [1, 2]}}))
    return Command(("sweep", str(plan), "--out", str(top / "sweep/out"), "--cluster", "local"), top / "sweep")


def grid(top: Path, small: Path) -> Command:
    """A part of the grid.

    Args:
        top: folder of what it writes.
        small: folder of the fixture of that name.
    """
    words = ["--preset", "demo", "--settings", str(small / "tiny.yaml"), "--folders", f"{{demo: {small / 'demo'}}}"]
    words += ["--corpora", "[demo]", "--networks", "[real]", "--splits", "[random]", "--at", "[none]"]
    return Command(("grid", *words, "--out", str(top / "grid/out"), "--cluster", "local"), top / "grid")


def timed(command: Command) -> tuple[float, float]:
    """Run it undisturbed, where nothing is; the seconds until it writes, and until it ends."""
    dataclasses.replace(command, words=("--version",)).run()  # by now, what all of them import is imported
    started = time.monotonic()
    process = command.start()
    while command.state() == NOTHING and process.exitcode is None:
        process.join(0.05)
    first = time.monotonic() - started
    process.join()
    assert process.exitcode == 0, command.told()
    return first, time.monotonic() - started
