"""Files of a run that are broken in any way: a line with the file, or the run as it was."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from qat.config import Experiment
from qat.data.manifest import Manifest
from qat.results.runs import RunsFolder
from qat.training import loop
from qat.training.checkpoint import load_checkpoint, save_checkpoint
from qat.training.classifier import train_classifier
from qat.training.inference import evaluate_run, predict
from tests.qat.training.trainings import trained

QUICK, MANY = 40, 200

WRONG: list[Any] = [None, [], {}, "x", -1, True, [None], [[]], {"a": 1}, 10**400, float("inf"), ["a", 1], "\0"]

TEXTS = ("result.json", "metrics.csv", "predictions.csv")
STATES = ("model.safetensors", "last.safetensors")


@pytest.fixture(scope="module")
def small(experiment: Experiment) -> Experiment:
    network = replace(experiment.network, domain="real", rhemo=None, embedding_scale="none")
    return trained(replace(experiment, network=network), epochs=2, patience=9, batch=25, checkpoint_seconds=0)


@pytest.fixture(scope="module")
def finished(small: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    train_classifier(small, folder, quiet=True)
    return folder


@pytest.fixture(scope="module")
def interrupted(small: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "interrupted"
    train_epoch = loop.train_epoch

    def failing(steps: Any, train: Any, epoch: int) -> Any:
        if epoch == 1:
            raise KeyboardInterrupt
        return train_epoch(steps, train, epoch)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "train_epoch", failing)
        with pytest.raises(KeyboardInterrupt):
            train_classifier(small, folder, quiet=True)
    return folder


def cut_off(file: Path, rng: np.random.Generator) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.integers(len(content))])


def flipped(file: Path, rng: np.random.Generator) -> None:
    content = bytearray(file.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    file.write_bytes(content)


def overwritten(file: Path, rng: np.random.Generator) -> None:
    content = bytearray(file.read_bytes())
    begin = int(rng.integers(len(content)))
    content[begin : begin + 20] = rng.bytes(20)
    file.write_bytes(content)


def lost(file: Path, rng: np.random.Generator) -> None:
    file.unlink()


def changed(value: Any, rng: np.random.Generator, depth: int) -> Any:
    """The value without one of its entries, or with one of another type, up to ``depth`` levels down."""
    value = copy.copy(value)
    if not value:
        return WRONG[rng.integers(len(WRONG))]
    key = list(value)[rng.integers(len(value))] if isinstance(value, dict) else int(rng.integers(len(value)))
    if depth > 1 and isinstance(value[key], (dict, list)) and rng.random() < 0.7:
        value[key] = changed(value[key], rng, depth - 1)
    elif rng.random() < 0.3:
        del value[key]
    else:
        value[key] = WRONG[rng.integers(len(WRONG))]
    return value


def rewritten(file: Path, rng: np.random.Generator) -> None:
    """Of another form, but readable; a checkpoint as an earlier version wrote it, without a checksum."""
    if file.suffix == ".csv":
        lines = [line.split(",") for line in file.read_text().splitlines()]
        line = lines[rng.integers(len(lines))]
        line[rng.integers(len(line))] = str(WRONG[rng.integers(len(WRONG))])
        file.write_text("\n".join(map(",".join, lines)) + "\n")
    elif file.suffix == ".json":
        file.write_text(json.dumps(changed(json.loads(file.read_text()), rng, 4)))
    elif file.suffix == ".yaml":
        file.write_text(yaml.safe_dump(changed(yaml.safe_load(file.read_text()), rng, 3)))
    else:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            record = json.loads(opened.metadata()["record"])
        del record["sha256"]
        name = list(tensors)[rng.integers(len(tensors))]
        kind = rng.integers(6)
        if kind == 0:
            del tensors[name]
        elif kind == 1:
            tensors[name] = torch.full_like(tensors[name], torch.nan)
        elif kind == 2:
            tensors[name] = tensors[name][None]
        elif kind == 3:
            tensors[name] = tensors[name].to(torch.int64)
        else:
            record = changed(record, rng, 3)
        save_file(tensors, file, metadata={"record": json.dumps(record)})


WAYS: list[Callable[[Path, np.random.Generator], None]] = [cut_off, flipped, overwritten, lost, rewritten, rewritten]


def read_everything(folder: Path) -> None:
    """What a report reads of a run."""
    for run in RunsFolder.read(folder.parent).runs:
        assert run.folder == folder
        assert run.metrics is None or len(run.metrics)
        assert run.answers is None or run.answers["right"].isin([0, 1]).all()


def survives(use: Callable[[], object], folder: Path, how: str) -> bool:
    """Whether a use of a broken run works; else it is an error of one line with a path of the run."""
    text = ""
    try:
        use()
    except (ValueError, OSError) as error:
        text = str(error)
    except Exception as error:
        raise AssertionError(f"{how}: {error!r}") from error
    assert not text or str(folder.parent) in text, f"{how}: {text}"
    assert "\n" not in text, f"{how}: {text}"
    return not text


def break_and_use(
    rng: np.random.Generator,
    count: int,
    small: Experiment,
    finished: Path,
    interrupted: Path,
    corpus: Manifest,
    tmp_path: Path,
) -> None:
    wav = corpus.root / corpus.table["path"][0]
    refused = 0
    for number in range(count):
        source = finished if number % 2 else interrupted
        names = [*TEXTS, "model.safetensors"] if number % 2 else [*STATES, *STATES, "experiment.yaml"]
        name, way = names[rng.integers(len(names))], WAYS[rng.integers(len(WAYS))]
        folder = tmp_path / str(number) / "run"
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("tensorboard"))
        way(folder / name, rng)
        how = f"{source.name}, {name} {way.__name__}, in {folder}"
        uses: list[Callable[[], object]] = [lambda: train_classifier(small, folder, resume=True, quiet=True)]  # noqa: B023
        if number % 2:
            uses = [lambda: read_everything(folder)] if name in TEXTS else []  # noqa: B023
            if name not in TEXTS:
                uses += [lambda: predict(folder, [wav]), lambda: evaluate_run(folder, device="cpu", quiet=True)]  # noqa: B023
            if name == "result.json":
                uses.append(lambda: train_classifier(small, folder, resume=True, quiet=True))  # noqa: B023
        refused += sum(not survives(use, folder, how) for use in uses)
        shutil.rmtree(folder)
    assert refused > count / 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [], "history must have a row of"),
        (lambda rows: None, "history: null must be a list"),
        (lambda rows: [rows[0] | {"epoch": 1}], "history must have a row of"),
        (lambda rows: [{"epoch": 0, "seconds": 1.0, "train_total": 1.0}], "history must have a row of"),
        (lambda rows: [rows[0] | {"seconds": "1.5"}], "history must have a row of"),
        (lambda rows: [rows[0] | {"seconds": "long"}], r"history\[0\]\.seconds: 'long' must be a number"),
        (
            lambda rows: [*rows, rows[0] | {"epoch": 1, "validation_total": -1.0}],
            "model.safetensors: of epoch 0, which",
        ),
    ],
)
def test_a_history_of_another_form_is_refused(
    small: Experiment, interrupted: Path, change: Any, message: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(interrupted, tmp_path / "run")
    last = load_checkpoint(folder / "last.safetensors", "training")
    save_checkpoint(last.path, last.tensors, last.record | {"history": change(last.record["history"])})
    with pytest.raises(ValueError, match=message) as refused:
        train_classifier(small, folder, resume=True, quiet=True)
    assert str(refused.value).startswith(str(folder))


def test_a_model_that_was_written_after_the_last_state_is_for_the_same_rate(
    small: Experiment, interrupted: Path, tmp_path: Path
) -> None:
    """A process may be killed between the two: the epochs until then come again, unless the rate is another."""
    folder = shutil.copytree(interrupted, tmp_path / "run")
    kept = load_checkpoint(folder, "classifier")
    save_checkpoint(kept.path, kept.tensors, kept.record | {"epoch": 1})
    with pytest.raises(
        ValueError, match=r"model\.safetensors: of epoch 1, and last\.safetensors of 0; resume with the"
    ):
        train_classifier(trained(small, lr=1e-5), folder, resume=True, quiet=True)
    train_classifier(small, folder, resume=True, quiet=True)


@pytest.mark.parametrize("name", ["metrics.csv", "predictions.csv"])
def test_a_table_that_was_cut_off_is_noticed(finished: Path, name: str, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "run")
    lines = (folder / name).read_text().splitlines(keepends=True)
    for text, message in (("".join(lines)[:-3], "its last line has no end"), ("".join(lines[:-1]), "rows")):
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
            read_everything(folder)


def test_a_broken_file_of_a_run_is_a_line_or_does_no_harm(
    rng: np.random.Generator, small: Experiment, finished: Path, interrupted: Path, corpus: Manifest, tmp_path: Path
) -> None:
    break_and_use(rng, QUICK, small, finished, interrupted, corpus, tmp_path)


@pytest.mark.slow
def test_files_that_are_broken_in_many_ways_are_lines(
    rng: np.random.Generator, small: Experiment, finished: Path, interrupted: Path, corpus: Manifest, tmp_path: Path
) -> None:
    break_and_use(rng, MANY, small, finished, interrupted, corpus, tmp_path)
