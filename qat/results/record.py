"""Records of a finished training: ``result.json`` and ``analysis.json`` as typed values, with a schema version."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from qat.config import AnyExperiment, Experiment, RHEmoExperiment, from_plain, prefix_errors
from qat.files import read_json

SCHEMA = 1
"""Version of the format of ``result.json``; files without one are of version 1."""


@dataclass(frozen=True)
class Scores:
    """Figures of one part of the data at the kept checkpoint; None if the task does not have them.

    Args:
        accuracy: share of correct samples.
        uar: mean recall over the classes.
        macro_f1: mean F1 over the classes.
        average_precision: mean over the labels of a multi-label task.
        reconstruction, constant: RH-Emo's reconstruction loss and that of the best constant.
        live_channels: number of embedding channels that vary, of four.
        samples: number of samples.
        confusion: counts `[K, K]`, rows true, columns predicted.
        losses: mean losses by name, such as ``total`` and ``similarity_13``.
    """

    accuracy: float | None = None
    uar: float | None = None
    macro_f1: float | None = None
    average_precision: float | None = None
    reconstruction: float | None = None
    constant: float | None = None
    live_channels: int | None = None
    samples: int | None = None
    confusion: list[list[float]] | None = None
    losses: dict[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """Content of ``result.json``: settings and results of a training.

    Args:
        kind: ``classifier`` or ``rhemo``.
        name: name in reports; empty: that of the folder.
        seed: seed of the training.
        experiment: settings of the training.
        classes: names of the outputs.
        parts: scores of ``train``, ``validation``, ``test`` and, after a confounded split, ``withheld``.
        epochs: number of epochs. kept_epoch: epoch whose weights were kept, from 0.
        rates: first epoch and value of each ``training.lr``: several where a run was resumed with a lower one, of which
            ``experiment`` has the last.
        seconds: training time. seconds_per_epoch: mean over epochs.
        peak_memory: peak memory in bytes.
        device: name of the device. processes: number of processes.
        versions: version by program. commit: commit of this code. command: command line.
        parameters: number of trained parameters.
    """

    kind: Literal["classifier", "rhemo"] = "classifier"
    name: str = ""
    seed: int | None = None
    experiment: AnyExperiment = field(default_factory=Experiment)
    classes: list[str] = field(default_factory=list)
    parts: dict[str, Scores] = field(default_factory=dict)
    epochs: int | None = None
    rates: list[list[float]] = field(default_factory=list)
    kept_epoch: int | None = None
    seconds: float | None = None
    seconds_per_epoch: float | None = None
    peak_memory: int | None = None
    device: str = "an unnamed device"
    processes: int = 1
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    command: str | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class Probes:
    """Accuracy of linear classifiers of the speaker and of the text from one layer's features."""

    voice_probe: float | None = None
    word_probe: float | None = None


@dataclass(frozen=True)
class Analysis(Probes):
    """Content of ``analysis.json``: information that a network's features still hold.

    Args:
        voice_probe, word_probe: probes of the last layer of anti-transfer.
        voice_probe_chance, word_probe_chance: accuracy of guessing.
        shortcut_rate: share of the withheld clips that are classified as the speaker's own emotion.
        layers: probes by layer.
    """

    voice_probe_chance: float | None = None
    word_probe_chance: float | None = None
    shortcut_rate: float | None = None
    layers: dict[int, Probes] = field(default_factory=dict)


def read_result(path: Path) -> Result:
    """The record of a ``result.json``.

    Raises:
        ValueError: the file is not readable, has another schema version, or a value of a wrong type.
    """
    plain = read_json(path)
    version = plain.pop("schema", SCHEMA)
    if version != SCHEMA:
        raise ValueError(f"{path}: schema {version!r} must be {SCHEMA}; another version of qat wrote this file")
    kind: type[AnyExperiment] = RHEmoExperiment if plain.get("kind") == "rhemo" else Experiment
    with prefix_errors(path):
        with prefix_errors("experiment"):
            experiment = from_plain(kind, plain.get("experiment") or {})
        own = _own(Result, plain) | {"experiment": experiment}
        if isinstance(parts := own.get("parts"), dict):
            own["parts"] = {name: _scores(part) for name, part in parts.items()}
        return from_plain(Result, own)


def read_analysis(path: Path) -> Analysis:
    """The record of an ``analysis.json``, empty if the file does not exist.

    Raises:
        ValueError: the file is not readable or has a value of a wrong type.
    """
    with prefix_errors(path):
        return from_plain(Analysis, _own(Analysis, read_json(path))) if path.is_file() else Analysis()


def origin() -> dict[str, Any]:
    """The origin of a ``result.json``: schema version, commit and command."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"schema": SCHEMA, "commit": git_commit(Path(__file__).parents[2]), "command": command}


@cache
def git_commit(root: Path) -> str | None:
    """The checked-out commit of a repository, with ``-dirty`` if there are changes; None if it is no repository."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _own(kind: type[Any], plain: dict[str, Any]) -> dict[str, Any]:
    """The values that a record has fields for, without nulls."""
    names = [each.name for each in fields(kind)]
    return {name: plain[name] for name in names if plain.get(name) is not None}


def _scores(part: Any) -> Any:
    """Scores from a run's file: numbers without a field of their own go to ``losses``."""
    if not isinstance(part, dict):
        return part
    names = {each.name for each in fields(Scores)}
    losses = {"losses": {name: value for name, value in part.items() if name not in names}}
    return {name: value for name, value in part.items() if name in names} | losses
