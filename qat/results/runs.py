"""Runs read from their folders: the finished ones, and which of a folder's others are planned, failed or unfinished."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from qat.config import AntiTransferConfig, AnyExperiment, Experiment, identity_settings, to_plain
from qat.files import read_text, read_yaml
from qat.results.record import Analysis, Result, Scores, read_analysis, read_result

if TYPE_CHECKING:
    import pandas as pd

TASKS = {
    "emotion": "emotion",
    "rhemo": "RH-Emo embedding",
    "speaker": "speaker",
    "word": "word",
    "word-presence": "words that occur",
}
"""Tasks of networks, in the order of a report."""

POSITIONS = {
    "relu": "after ReLU, before pooling",
    "pre-relu": "before ReLU",
    "slice": "input of that convolution",
    "pool5": "last pool, whatever the layer",
}
"""Features that a layer stands for, by ``anti_transfer.position``."""

_FILES = ("result.json", "error.txt", "experiment.yaml")
"""Files by which a run's folder is recognised."""

_SEED = re.compile(r"(?:^|[-_./])seed[-_=]?(\d+)(?=$|[-_./])", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """One finished training; its tables are read at their first use.

    Args:
        folder: run folder.
        name: name of its setting; runs of the same name differ in their seed.
        seed: seed of the training.
        result: record of ``result.json``.
        planned: rows of the campaign's ``plan.csv`` by ``run``, for the names of networks that it builds on.
    """

    folder: Path
    name: str
    seed: int | None
    result: Result
    planned: Mapping[str, Planned] = field(default_factory=dict)

    @cached_property
    def analysis(self) -> Analysis:
        """Record of ``analysis.json``, empty if there is none."""
        return read_analysis(self.folder / "analysis.json")

    @cached_property
    def metrics(self) -> pd.DataFrame | None:
        """``metrics.csv``, one row per epoch."""
        path, epochs = self.folder / "metrics.csv", self.result.epochs
        table = read_csv(path)
        if table is not None:
            for name, column in table.items():
                if column.dtype.kind not in "biuf":
                    raise ValueError(f"{path}: column {name!r} must hold numbers")
            if epochs not in (None, len(table)):
                raise ValueError(f"{path}: has {len(table)} rows; result.json tells of {epochs} epochs")
        return table

    @cached_property
    def predictions(self) -> pd.DataFrame | None:
        """``predictions.csv`` as text."""
        path, samples = self.folder / "predictions.csv", self.result.parts.get("test", Scores()).samples
        table = read_csv(path, dtype=str, keep_default_na=False)
        if table is not None:
            if "part" not in table:
                raise ValueError(f"{path}: lacks the column 'part'")
            if samples not in (None, count := int((table["part"] == "test").sum())):
                raise ValueError(f"{path}: has {count} rows of the test part; result.json tells of {samples}")
        return table

    @property
    def experiment(self) -> AnyExperiment:
        return self.result.experiment

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Settings that decide what is learnt, by ``group.field``."""
        return identity_settings(to_plain(self.experiment))

    @property
    def task(self) -> str:
        """``rhemo``, or the classifier's task."""
        return self.experiment.task if isinstance(self.experiment, Experiment) else "rhemo"

    @property
    def true_classes(self) -> list[str]:
        """The classes without the unused outputs that `network.outputs` adds."""
        return [name for name in self.result.classes if not name.startswith("unused-")]

    @property
    def width(self) -> float:
        """Width of the network, as a multiple of the paper's."""
        experiment = self.experiment
        return experiment.network.width if isinstance(experiment, Experiment) else experiment.rhemo.width

    def score(self, part: str, name: str) -> float | None:
        """A score of one part; None if it was not measured."""
        value: float | None = getattr(self.result.parts.get(part, Scores()), name)
        return value

    @property
    def start(self) -> str:
        """Initial weights: ``random``, or the name of the network they come from."""
        initial = self.experiment.training.initial
        return "random" if initial is None else self._origin(initial)

    @property
    def twin(self) -> AntiTransferConfig | None:
        """The settings of anti-transfer; None without a twin."""
        at = self.experiment.anti_transfer if isinstance(self.experiment, Experiment) else None
        return at if at is not None and (at.twin is not None or at.random_twin) else None

    @property
    def random_twin(self) -> bool:
        return self.twin is not None and self.twin.random_twin

    @property
    def beta(self) -> str:
        """The weight of the loss, or the weights of the layers, as text."""
        beta = self.twin.beta if self.twin else 0.0
        return "+".join(f"{value:g}" for value in (beta if isinstance(beta, list) else [beta]))

    @property
    def transfers(self) -> bool:
        """Whether there is an anti-transfer loss; with beta 0 the similarity is only monitored."""
        return self.twin is not None and any(self.twin.betas)

    @property
    def layers(self) -> list[int]:
        """Layers at which the network is compared with its twin."""
        return list(self.twin.layers) if self.twin else []

    @property
    def anti_transfer(self) -> str:
        """Description of anti-transfer (layers, position, beta, twin, loss), or ``none``."""
        if self.twin is None:
            return "none"
        layers = f"layer{'s' if len(self.layers) > 1 else ''} {'+'.join(map(str, self.layers))}"
        if not self.transfers:
            return f"none ({layers} watched, beta 0)"
        twin = "random twin (control)" if self.random_twin else f"twin {self._origin(self.twin.twin)}"
        return f"{layers} ({POSITIONS[self.twin.position]}), beta {self.beta}, {twin}, {self.twin.loss}"

    def _origin(self, checkpoint: object) -> str:
        """Name of the network that a checkpoint holds."""
        folder = _origin(checkpoint)
        return self.planned[folder].name if folder in self.planned else folder

    @property
    def device(self) -> str:
        """Device of the training, with the number of processes if there were several."""
        processes = self.result.processes
        return f"{f'{processes} × ' if processes > 1 else ''}{self.result.device}"

    def probe(self, name: str, layer: int) -> float | None:
        """A linear probe's accuracy at one layer, ``voice_probe`` or ``word_probe``."""
        return getattr(self.analysis.layers.get(layer), name, None)

    @cached_property
    def answers(self) -> pd.DataFrame | None:
        """Test predictions by ``clip``: ``right`` (0 or 1) and the columns of `predictions`. Each cut of a file is a
        clip. None for word presence, where a clip has several labels.
        """
        table = self.predictions
        if table is None or self.task == "word-presence":
            return None
        if not {"part", "path", "speaker", "label", "predicted"} <= set(table.columns):
            return None
        test = table[table["part"] == "test"]
        clips = test["path"] + "#" + test.groupby("path").cumcount().astype(str)
        right = (test["label"] == test["predicted"]).astype(float)
        return test.assign(clip=clips, right=right).set_index("clip").sort_index()


@dataclass(frozen=True, eq=False)
class Group:
    """The runs of one setting, by seed."""

    name: str
    runs: list[FinishedRun]

    @property
    def first(self) -> FinishedRun:
        return self.runs[0]

    def values(self, of: Callable[[FinishedRun], float | None]) -> list[float]:
        """A value of every run that has it."""
        return [value for value in map(of, self.runs) if value is not None]

    def scores(self, name: str, part: str = "test") -> list[float]:
        """A score of every run that has it."""
        return self.values(lambda run: run.score(part, name))

    def mean(self, of: Callable[[FinishedRun], float | None]) -> float | None:
        values = self.values(of)
        return fmean(values) if values else None

    def score(self, name: str, part: str = "test") -> float | None:
        """Mean of a score over the runs that have it."""
        return self.mean(lambda run: run.score(part, name))


@dataclass(frozen=True, kw_only=True)
class PlannedSetting:
    """Attributes (:data:`qat.config.preset.ATTRIBUTES`) and name of planned trainings that differ only in their seed.

    Attributes that a stage does not have are empty, its layer is 0.
    """

    stage: str
    network: str
    corpus: str
    split: str
    at: str
    layer: int
    name: str


@dataclass(frozen=True, kw_only=True)
class Planned(PlannedSetting):
    """A row of ``plan.csv``; ``run`` is the folder below ``runs``."""

    run: str
    seed: int | None

    @property
    def label(self) -> str:
        """Name and seed."""
        return self.name if self.seed is None else f"{self.name}, seed {self.seed}"


@dataclass(frozen=True, eq=False)
class RunsFolder:
    """The runs at or below a folder: a run, a sweep, a study, a grid.

    Args:
        folder: the folder.
        plan: rows of its ``plan.csv``; empty without that file.
        runs: the finished runs.
        failed: first line of ``error.txt`` by the name of the run.
        unfinished: names of planned or started runs that neither finished nor failed.
        request: text of ``campaign.yaml``, the options of the campaign.
    """

    folder: Path
    plan: list[Planned]
    runs: list[FinishedRun]
    failed: dict[str, str]
    unfinished: list[str]
    request: str

    @classmethod
    def read(cls, folder: Path) -> RunsFolder:
        """The runs of the folder's ``plan.csv``; without one, every run at or below the folder.

        A run's name is the one in its campaign's plan, else the one in ``result.json``, else its path below ``folder``;
        the latter two without the seed.

        Raises:
            ValueError: there is neither a finished run nor a plan, a file cannot be read, or two runs have the same
                name and seed.
        """
        folder = Path(folder)
        plan = read_plan(folder / "plan.csv")
        files = [] if plan else [file for name in _FILES for file in folder.rglob(name)]
        places = dict.fromkeys([folder / "runs" / row.run for row in plan] or sorted(file.parent for file in files))
        plans: dict[Path, dict[str, Planned]] = {}
        runs: dict[tuple[str, int | None], FinishedRun] = {}
        failed, unfinished = {}, []
        for place in places:
            campaign = place.parents[1] if len(place.parents) > 1 else place
            if campaign not in plans:  # of several rows for one run, the first gives its name
                plans[campaign] = {row.run: row for row in reversed(read_plan(campaign / "plan.csv"))}
            row = plans[campaign].get(place.name)
            if row and campaign != folder and campaign.is_relative_to(folder):
                row = replace(row, name=f"{campaign.relative_to(folder).as_posix()}/{row.name}")
            name = row.label if row else place.relative_to(folder).as_posix()
            if (place / "result.json").is_file():
                run = _finished_run(place, folder, row, plans[campaign])
                other = runs.setdefault((run.name, run.seed), run)
                if other is not run:
                    raise ValueError(
                        f"{run.folder}: has the name {run.name!r} and the seed {run.seed} of {other.folder}; "
                        "a report needs different ones"
                    )
            elif (place / "error.txt").is_file():
                text = (place / "error.txt").read_text(encoding="utf-8", errors="replace")
                failed[name] = next(filter(str.strip, text.splitlines()), "")
            else:
                unfinished.append(name)
        if not (plan or runs):
            raise ValueError(f"{folder}: no result.json at or below this folder; a report needs a finished run")
        request = folder / "campaign.yaml"
        text = read_text(request) if request.is_file() else ""
        return cls(folder, plan, list(runs.values()), failed, unfinished, text)

    @cached_property
    def requested(self) -> dict[str, Any]:
        """The request as a mapping."""
        requested = read_yaml(self.folder / "campaign.yaml") if self.request else None
        return requested if isinstance(requested, dict) else {}


def read_plan(path: Path) -> list[Planned]:
    """The rows of a ``plan.csv``; empty if the file does not exist.

    Raises:
        ValueError: the file cannot be read, lacks a column, has a name and seed twice, or has no rows.
    """
    if not path.is_file():
        return []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable as CSV ({error})") from error
    plan: list[Planned] = []
    runs: dict[str, str] = {}
    for line, row in enumerate(rows, 2):
        values: dict[str, Any] = {column.name: row.get(column.name) for column in fields(Planned)}
        if missing := [name for name, value in values.items() if value is None]:
            raise ValueError(f"{path}: lacks the column {missing[0]}; it must have {', '.join(values)}")
        for name in ("layer", "seed"):
            try:
                values[name] = int(float(row[name])) if row[name] else None
            except (ValueError, OverflowError):
                raise ValueError(f"{path}: line {line}: {name} {row[name]!r} must be a number or empty") from None
        plan.append(planned := Planned(**values | {"layer": values["layer"] or 0}))
        if runs.setdefault(planned.label, planned.run) != planned.run:
            raise ValueError(f"{path}: has {planned.name!r} with the seed {planned.seed} twice; it may occur only once")
    if not plan:
        raise ValueError(f"{path}: plans no training; a report needs at least one")
    return plan


def group_runs(runs: Iterable[FinishedRun]) -> list[Group]:
    """Runs by name, sorted by task; then random initial weights first, no anti-transfer first."""
    by_name: dict[str, list[FinishedRun]] = {}
    for run in runs:
        by_name.setdefault(run.name, []).append(run)
    tasks = list(TASKS)

    def place(group: Group) -> tuple[Any, ...]:
        run = group.first
        task = tasks.index(run.task) if run.task in tasks else len(tasks)
        layer = max(run.layers, default=0)
        return task, run.start != "random", run.start, run.transfers, run.random_twin, layer, group.name

    groups = [Group(name, sorted(same, key=lambda run: run.seed or 0)) for name, same in by_name.items()]
    return sorted(groups, key=place)


def devices(runs: Iterable[FinishedRun]) -> str:
    """Every device that these runs were trained on."""
    return "; ".join(sorted({run.device for run in runs}))


def made_with(runs: Sequence[FinishedRun]) -> list[list[str]]:
    """Rows about the origin of runs: devices, commits, commands, and all versions of each program."""
    values: dict[str, set[str]] = {}
    for run in runs:
        result = run.result
        for name, value in {"commit": result.commit, "command": result.command, **result.versions}.items():
            values.setdefault(name, set()).update([value] if value else [])
    return [["devices", devices(runs)], *([name, ", ".join(sorted(each))] for name, each in values.items() if each)]


def _finished_run(place: Path, folder: Path, row: Planned | None, plan: Mapping[str, Planned]) -> FinishedRun:
    """The run in ``place``, at or below ``folder``; ``row`` is its row of the plan, if there is one."""
    result = read_result(place / "result.json")
    if row:
        return FinishedRun(place, row.name, result.seed if row.seed is None else row.seed, result, plan)
    path, own = place.relative_to(folder).as_posix(), place.resolve().name
    # A run without a name was named after its folder, which is ambiguous among folders of several parents.
    name = result.name if result.name not in ("", own) else path if path != "." else own
    in_path = _SEED.search(path)
    seed = result.seed if result.seed is not None else int(in_path[1]) if in_path else None
    return FinishedRun(place, _without_seed(name), seed, result)


def read_csv(path: Path, **options: Any) -> pd.DataFrame | None:
    """A table of a run; None where there is none.

    Raises:
        ValueError: it is not readable, or was cut off.
    """
    import pandas as pd

    if not path.is_file():
        return None
    try:
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            raise ValueError("its last line has no end")
        return pd.read_csv(io.BytesIO(content), **options)
    except (OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: not readable as CSV ({' '.join(str(error).split())})") from error


def _without_seed(path: str) -> str:
    """
    >>> _without_seed("emotion/at-voice/seed-2"), _without_seed("seed3/at_voice"), _without_seed("at-seed1")
    ('emotion/at-voice', 'at_voice', 'at')
    """
    return _SEED.sub("", path).strip("/") or path


def _origin(checkpoint: object) -> str:
    """The name of the run that wrote a checkpoint, from the path of its folder or file.

    >>> _origin("runs/voices/seed-1/best.safetensors"), _origin("demo/twins/voice")
    ('voices', 'voice')
    """
    path = Path(str(checkpoint))
    folder = path.parent if path.suffix == ".safetensors" else path
    return Path(_without_seed(folder.as_posix())).name or path.stem
