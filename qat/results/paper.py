"""The results of a grid in the form of the paper's tables, beside the paper's own (WASPAA 2023)."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from itertools import groupby
from typing import Any, NamedTuple

import pandas as pd

from qat.config.preset import METHODS, PAPER_CORPORA, PAPER_SPLITS, VALUES
from qat.results.runs import FinishedRun, Group, Planned, PlannedSetting, RunsFolder
from qat.results.tables import clip_difference, means, over_speakers, typed

CELL = ["corpus", "network", "split"]
"""Attributes of a row of table 1; its columns are methods."""

_LABELS = ("stage", *CELL, "at", "layer")
_ORDER = VALUES | {"corpus": PAPER_CORPORA}

STATED_GAINS = {
    "real": 0.0366,
    "quaternion": 0.026,
    "single": 0.0312,
    "dual": 0.0315,
    "random": 0.0382,
    "actor": 0.0245,
    "iemocap": 0.0301,
    "ravdess": 0.0262,
    "tess": 0.0377,
    "single speaker": 0.0293,
    "single word": 0.0333,
}
"""Mean gains by anti-transfer as stated in the paper's text. For RAVDESS its table 1 gives a different one."""

STATED_RATIOS = {
    ("quaternion / real", "epoch_seconds"): 1 - 0.805,
    ("quaternion / real", "peak_memory"): 1 - 0.537,
    ("AT / no AT", "epoch_seconds"): 2.8,
    ("AT / no AT", "peak_memory"): 2.0,
}
"""Published ratios of time and memory; the last two are from an earlier anti-transfer paper, memory as a maximum."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Setting(PlannedSetting):
    """One setting of a grid, over its seeds.

    Args:
        planned: number of trainings, one per seed.
        group: finished trainings.
    """

    planned: int
    group: Group

    @property
    def labels(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _LABELS}

    @property
    def cell(self) -> tuple[str, str, str]:
        return self.corpus, self.network, self.split


@dataclass(frozen=True, eq=False)
class PaperGrid:
    """The planned and finished trainings of the paper's grid in a folder.

    Args:
        settings: settings in the order of the paper's tables.
        planned: number of planned trainings; equal experiments count once.
        finished: number of finished trainings.
    """

    settings: list[Setting]
    planned: int
    finished: int

    @classmethod
    def of(cls, folder: RunsFolder) -> PaperGrid | None:
        """The grid of a folder, finished or not; None if its plan has trainings outside the paper's table 1."""
        emotion = [row for row in folder.plan if row.stage == "emotion"]
        cells = (row.corpus and row.network and row.split in PAPER_SPLITS and row.at in METHODS for row in emotion)
        if not emotion or not all(cells):
            return None
        runs = {run.folder.name: run for run in folder.runs}
        settings = []
        for _, same in groupby(sorted(folder.plan, key=_place), key=_place):
            rows = list({row.seed: row for row in same}.values())
            first = rows[0]
            finished = [replace(runs[row.run], name=row.name) for row in rows if row.run in runs]
            group = Group(first.name, sorted(finished, key=lambda run: run.seed or 0))
            shared = {each.name: getattr(first, each.name) for each in fields(PlannedSetting)}
            settings.append(Setting(**shared, planned=len(rows), group=group))
        return cls(settings, len({row.run for row in folder.plan}), len(runs))

    @property
    def emotion(self) -> list[Setting]:
        return [setting for setting in self.settings if setting.stage == "emotion"]

    @property
    def corpora(self) -> list[str]:
        """Emotion corpora, the paper's first."""
        return list(dict.fromkeys(setting.corpus for setting in self.emotion))

    def runs_on(self, corpus: str) -> list[FinishedRun]:
        """The finished emotion trainings on a corpus of the plan."""
        return [run for setting in self.emotion if setting.corpus == corpus for run in setting.group.runs]

    def kind(self, corpus: str) -> str:
        """``synthesised`` (the demo corpus, under any name), ``paper`` (one of the paper's) or ``recorded``."""
        if "demo" in (corpus, *(run.experiment.corpus.name for run in self.runs_on(corpus))):
            return "synthesised"
        return "paper" if corpus in PAPER_CORPORA else "recorded"


class Choice(NamedTuple):
    """A cell of table 1: the setting chosen by validation accuracy, and the one that test accuracy would choose."""

    chosen: Setting
    by_test: Setting


def published() -> pd.DataFrame:
    """Table 1 of the paper, one row per cell: ``corpus, network, split, at, layer, accuracy, parameters, gain``.

    >>> table = published()
    >>> len(table), float(table["accuracy"].max())
    (60, 1.0)
    """
    with files("qat.results").joinpath("paper_table1.csv").open(encoding="utf-8") as file:
        rows: list[dict[str, Any]] = [
            {
                "corpus": row["corpus"].lower(),
                "network": {"quat": "quaternion"}.get(row["network"], row["network"]),
                "split": split,
                "at": row["at_type"],
                "layer": int(row[f"layer_{split}"] or 0),
                "accuracy": round(float(row[f"acc_{split}"]) / 100, 6),
                "parameters": float(row["params"]),
            }
            for row in csv.DictReader(file)
            for split in PAPER_SPLITS
        ]
    base = {_key(row): row["accuracy"] for row in rows if row["at"] == "none"}
    gains = [row | {"gain": row["accuracy"] - base[_key(row)] if row["layer"] else None} for row in rows]
    return typed(gains, {*CELL, "at", "layer"})


def choices(grid: PaperGrid) -> list[Choice]:
    """The cells of table 1 with a finished training, in the order of the table.

    The chosen layer has the highest validation accuracy at the kept checkpoint, mean over seeds; ties take the
    shallower layer.
    """
    cells = []
    for _, same in groupby(grid.emotion, key=lambda setting: (setting.cell, setting.at)):
        settings = list(same)
        chosen, by_test = _highest(settings, "validation"), _highest(settings, "test")
        if chosen is not None and by_test is not None:
            cells.append(Choice(chosen, by_test))
    return cells


def _highest(settings: Iterable[Setting], part: str) -> Setting | None:
    scores = [(setting, setting.group.score("accuracy", part)) for setting in settings]
    scored = [(setting, score) for setting, score in scores if score is not None]
    most = max((score for _, score in scored), default=0.0)
    # Accuracies are float32, so that equal means over seeds may differ in the eighth digit.
    equal = [setting for setting, score in scored if score > most - 1e-6]
    return min(equal, key=lambda setting: setting.layer, default=None)


def summary(grid: PaperGrid) -> pd.DataFrame:
    """One row per setting: ``stage, corpus, network, split, at, layer, name``, ``planned`` trainings, and its
    `means`."""
    return _table(s.labels | {"name": s.name, "planned": s.planned} | means(s.group) for s in grid.settings)


def resources(grid: PaperGrid) -> pd.DataFrame:
    """Time and memory: one row per setting and device, with its `means` there."""
    rows = []
    for setting in grid.settings:
        for device in sorted({run.device for run in setting.group.runs}):
            group = Group(setting.name, [run for run in setting.group.runs if run.device == device])
            rows.append(setting.labels | means(group))
    return _table(rows, [*_LABELS, *means(Group("", []))])


def _table(rows: Iterable[dict[str, Any]], columns: list[str] | None = None) -> pd.DataFrame:
    return typed(rows, {*_LABELS, "name", "planned", "seeds", "device"}, columns)


def layers(grid: PaperGrid) -> pd.DataFrame:
    """The emotion rows of `summary`, with whether each is ``chosen`` for table 1 and ``best_by_test``."""
    table = summary(grid).query("stage == 'emotion'")
    cells = choices(grid)
    chosen, best = {cell.chosen.name for cell in cells}, {cell.by_test.name for cell in cells}
    return table.assign(chosen=table["name"].isin(chosen), best_by_test=table["name"].isin(best))


_COUNTS = ("layer", "seeds", "speakers", "gain_seeds", "test_layer", "paper_layer")
_TABLE1 = (
    *("kind", "planned", "finished", "layer", "position", "validation_accuracy", "seeds", "accuracy", "accuracy_sd"),
    *("accuracy_low", "accuracy_high", "speakers", "clips", "uar", "gain", "gain_low", "gain_high", "gain_seeds"),
    *("test_layer", "test_accuracy", "optimism", "parameters"),
    *("paper_layer", "paper_accuracy", "difference", "paper_gain", "paper_parameters"),
)


def table1(grid: PaperGrid) -> pd.DataFrame:
    """Our table 1 beside the paper's; one row per cell of the plan, shares in [0, 1].

    Returns:
        ``corpus, network, split, at``; ``kind`` (as `PaperGrid.kind`); ``planned`` and ``finished`` trainings of all
        its layers; ``layer`` (chosen by validation accuracy, 0 without anti-transfer) and ``position`` (the features
        that it stands for), with the columns of `means` and `over_speakers`; ``gain`` over the baseline of the same
        corpus, network and split, paired over ``gain_seeds`` and clips, with ``gain_low`` and ``gain_high`` over
        speakers; ``test_layer`` and ``test_accuracy`` (if test accuracy had chosen the layer) and ``optimism`` (how
        much higher that accuracy is); the paper's ``paper_layer``, ``paper_accuracy``, ``paper_gain`` and
        ``paper_parameters``, and the ``difference`` of the accuracies. The paper's are given only for its corpora, and
        never where the demo corpus was read.
    """
    chosen = {(*cell.chosen.cell, cell.chosen.at): cell for cell in choices(grid)}
    theirs = {(*_key(row), row["at"]): row for row in published().to_dict("records")}
    rows = []
    for key, same in groupby(grid.emotion, key=lambda setting: (*setting.cell, setting.at)):
        settings, kind = list(same), grid.kind(key[0])
        row: dict[str, Any] = dict(zip([*CELL, "at"], key, strict=True)) | {"kind": kind}
        row["planned"] = sum(setting.planned for setting in settings)
        row["finished"] = sum(len(setting.group.runs) for setting in settings)
        if key in chosen:
            row |= _ours(chosen[key], chosen.get((*key[:3], "none")))
        if kind == "paper" and key in theirs:
            own = theirs[key]
            row |= {f"paper_{name}": own[name] for name in ("layer", "accuracy", "gain", "parameters")}
            row["difference"] = row["accuracy"] - own["accuracy"] if key in chosen else None
        rows.append(row)
    words = {*CELL, "at", "kind", "planned", "finished", "position", *_COUNTS}
    return typed(rows, words, [*CELL, "at", *_TABLE1]).astype(dict.fromkeys(_COUNTS, "Int64"))


def _ours(choice: Choice, base: Choice | None) -> dict[str, Any]:
    chosen, group = choice.chosen, choice.chosen.group
    at, test = group.first.twin, choice.by_test.group.score("accuracy")
    row = means(group) | over_speakers(group) | {"layer": chosen.layer, "position": at.position if at else None}
    # Among layers that are equal up to rounding, the shallower one may be lower.
    row |= {"test_layer": choice.by_test.layer, "test_accuracy": test, "optimism": max(0.0, test - row["accuracy"])}
    gain = clip_difference(group, base.chosen.group) if chosen.layer and base else None
    if gain is not None:
        low, high = gain.interval or (None, None)
        row |= {"gain": gain.mean, "gain_low": low, "gain_high": high, "gain_seeds": gain.seeds}
    return row


def gains(table: pd.DataFrame) -> pd.DataFrame:
    """Mean gains over no anti-transfer, over all cells of `table1` with a gain.

    Returns:
        One row per kind of cell, ``what``: ``cells``, ``gain``; the paper's ``paper_same`` (over the same cells),
        ``paper_cells``, ``paper_table`` (over all its cells) and ``paper_text`` (as stated in its text).
    """
    table = table[table["at"] != "none"]
    paper = published() if (table["kind"] == "paper").any() else published()[:0]
    theirs = _kinds(paper[paper["at"] != "none"], PAPER_CORPORA)
    corpora = sorted(set(table["corpus"]), key=lambda name: _rank("corpus", name))
    rows = []
    for what, cells in _kinds(table[table["gain"].notna()], corpora).items():
        row = {"what": what, "cells": len(cells)}
        row |= {"gain": cells["gain"].mean(), "paper_same": cells["paper_gain"].mean()}
        if len(theirs.get(what, ())):
            row |= {"paper_cells": len(theirs[what]), "paper_table": theirs[what]["gain"].mean()}
            row["paper_text"] = STATED_GAINS.get(what)
        rows.append(row)
    columns = ["what", "cells", "gain", "paper_same", "paper_cells", "paper_table", "paper_text"]
    return typed(rows, {"what", "cells"}, columns)


def _kinds(cells: pd.DataFrame, corpora: Sequence[str]) -> dict[str, pd.DataFrame]:
    """The sets of cells over which the paper averages gains."""
    at = cells["at"].str
    return {
        "all": cells,
        **{network: cells[cells["network"] == network] for network in VALUES["network"]},
        **{what: cells[at.startswith(what)] for what in ("single", "dual")},
        **{split: cells[cells["split"] == split] for split in PAPER_SPLITS},
        **{corpus: cells[cells["corpus"] == corpus] for corpus in corpora},
        "single speaker": cells[at.endswith("_S")],
        "single word": cells[at.endswith("_W")],
    }


def figure2(table: pd.DataFrame) -> pd.DataFrame:
    """Figure 2 of the paper: test accuracy by layer, averaged over corpora.

    A network's averages are over the corpora with at least one finished training of every split, task and layer that is
    planned for that network on any corpus, and of every baseline. So all averages of a network are over the same
    corpora.

    Args:
        table: table from `layers`, of corpora that may be averaged.

    Returns:
        ``network, split, at, layer, accuracy, corpora``: ``at`` is ``single_S``, ``single_W``, ``none`` (the baseline,
        layer 0), or ``mean``, over all splits and tasks, where the split is empty.
    """
    key, parts = ["split", "at", "layer"], []
    table = table[table["at"].isin(["none", "single_S", "single_W"])]
    for network, planned in table.groupby("network", sort=False):
        finished = planned[planned["accuracy"].notna()]
        needed = len(planned[key].drop_duplicates())
        complete = [str(name) for name, own in finished.groupby("corpus", sort=False) if len(own) == needed]
        if not complete or not (planned["layer"] > 0).any():
            continue
        lines = of_corpora(finished, complete).groupby(key, sort=False)["accuracy"].mean().reset_index()
        mean = lines[lines["at"] != "none"].groupby("layer")["accuracy"].mean().reset_index()
        both = pd.concat([lines, mean.assign(split="", at="mean")])
        parts.append(both.assign(network=network, corpora="+".join(complete)))
    columns = ["network", *key, "accuracy", "corpora"]
    return pd.concat(parts)[columns] if parts else pd.DataFrame(columns=columns)


def ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Ratios of time per epoch and peak memory between settings that differ in one attribute, on one device.

    Args:
        table: table from `resources`.

    Returns:
        One row per pair: ``what`` (``AT / no AT`` or ``quaternion / real``), ``device``, the first one's ``corpus,
        network, split, at, layer``, and the ratios of ``epoch_seconds`` and ``peak_memory``.
    """
    table = table[table["stage"] == "emotion"]
    at, none = table[table["at"] != "none"], table[table["at"] == "none"]
    quaternion, real = (table[table["network"] == network] for network in ("quaternion", "real"))
    labels, measures = ["device", *CELL, "at", "layer"], ["epoch_seconds", "peak_memory"]
    parts = []
    for what, first, second, shared in (
        ("quaternion / real", quaternion, real, [name for name in labels if name != "network"]),
        ("AT / no AT", at, none, ["device", *CELL]),
    ):
        both = first.merge(second[[*shared, *measures]], on=shared, suffixes=("", "_second"))
        changes = {measure: both[measure] / both[f"{measure}_second"] for measure in measures}
        parts.append(both[labels].assign(what=what, **changes))
    return pd.concat(parts, ignore_index=True)


def of_corpora(table: pd.DataFrame, corpora: Iterable[str]) -> pd.DataFrame:
    """The rows of some corpora."""
    return table[table["corpus"].isin(list(corpora))]


def _place(row: Planned) -> tuple[Any, ...]:
    """The order of the paper's table 1."""
    named = ("stage", "corpus", "network", "split", "at")
    return *(_rank(name, getattr(row, name)) for name in named), row.layer, row.name


def _rank(attribute: str, value: str) -> tuple[int, str]:
    order = list(_ORDER[attribute])
    return order.index(value) if value in order else len(order), value


def _key(row: Mapping[Any, Any]) -> tuple[str, str, str]:
    return row["corpus"], row["network"], row["split"]
