"""A grid of trainings in the paper's tables, beside the figures of the paper itself (WASPAA 2023)."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from qat.config.preset import VALUES
from qat.results.runs import FinishedRun, Group, Planned, RunsFolder, devices
from qat.results.statistics import Difference, mean_and_sd
from qat.results.tables import clip_difference, summary_table

if TYPE_CHECKING:
    import pandas as pd

CORPORA = ("iemocap", "ravdess", "tess")
NETWORKS = ("real", "quaternion")
SPLITS = ("random", "actor")
METHODS = {
    "none": "no AT",
    "single_S": "single S",
    "single_W": "single W",
    "dual_SW": "dual SW",
    "dual_WS": "dual WS",
}
"""Columns of table 1: against the speaker's network, the words', or both, one after the other."""

CELL = ["corpus", "network", "split"]
"""What a row of table 1 is, in which methods are compared."""

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
"""Mean gains by anti-transfer that the paper's text states. For RAVDESS its table 1 gives another."""

STATED_RATIOS = {
    ("quaternion / real", "epoch_seconds"): 1 - 0.805,
    ("quaternion / real", "peak_memory"): 1 - 0.537,
    ("AT / no AT", "epoch_seconds"): 2.8,
    ("AT / no AT", "peak_memory"): 2.0,
}
"""What time and memory are multiplied by; the last two are an earlier anti-transfer paper's, memory at most."""


@dataclass(frozen=True, eq=False)
class Setting:
    """One setting of a grid, over its seeds; what a stage does not have is empty, and the layer 0.

    Args:
        name: as the plan calls it.
        planned: trainings, one a seed.
        group: the finished ones.
    """

    stage: str
    network: str
    corpus: str
    split: str
    at: str
    layer: int
    name: str
    planned: int
    group: Group

    @property
    def labels(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _LABELS}

    @property
    def cell(self) -> tuple[str, str, str]:
        return self.corpus, self.network, self.split


_LABELS = ("stage", "corpus", "network", "split", "at", "layer")


@dataclass(frozen=True, eq=False)
class PaperGrid:
    """The paper's trainings that a folder has planned, and what of them there is.

    Args:
        settings: in the order of the paper's tables.
        planned: number of trainings; settings that are the same experiment share one.
        finished: number of these that are finished.
    """

    settings: list[Setting]
    planned: int
    finished: int

    @classmethod
    def of(cls, folder: RunsFolder) -> PaperGrid | None:
        """The grid of a folder, however much of it is finished; None if its plan has other trainings than table 1's."""
        emotion = [row for row in folder.plan if row.stage == "emotion"]
        cells = (row.corpus and row.network and row.split in SPLITS and row.at in METHODS for row in emotion)
        if not emotion or not all(cells):
            return None
        runs = {run.folder.name: run for run in folder.runs}
        settings = []
        for _, same in groupby(sorted(folder.plan, key=_place), key=_place):
            rows = list({row.seed: row for row in same}.values())
            first = rows[0]
            finished = [replace(runs[row.run], name=row.name) for row in rows if row.run in runs]
            group = Group(first.name, sorted(finished, key=lambda run: run.seed or 0))
            labels = {name: getattr(first, name) for name in _LABELS}
            settings.append(Setting(**labels, name=first.name, planned=len(rows), group=group))
        return cls(settings, len({row.run for row in folder.plan}), len(runs))

    @property
    def emotion(self) -> list[Setting]:
        return [setting for setting in self.settings if setting.stage == "emotion"]

    @property
    def corpora(self) -> list[str]:
        """Those of emotion trainings, the paper's first."""
        return list(dict.fromkeys(setting.corpus for setting in self.emotion))

    def read_as(self, corpus: str) -> list[str]:
        """What the finished trainings on a corpus of the plan really read, by ``corpus.name``."""
        return sorted({run.experiment.corpus.name for run in self.runs_on(corpus)}) or [corpus]

    def runs_on(self, corpus: str) -> list[FinishedRun]:
        """The finished emotion trainings on a corpus of the plan."""
        return [run for setting in self.emotion if setting.corpus == corpus for run in setting.group.runs]

    def kind(self, corpus: str) -> str:
        """``synthesised`` (the demo corpus, under whatever name), ``paper`` (one of the paper's) or ``recorded``."""
        if "demo" in (corpus, *self.read_as(corpus)):
            return "synthesised"
        return "paper" if corpus in CORPORA else "recorded"


class Choice(NamedTuple):
    """A cell of table 1: its baseline or the layer that was chosen, and the one that choosing by test would give."""

    chosen: Setting
    by_test: Setting


def published() -> pd.DataFrame:
    """Table 1 of the paper, one row a cell: ``corpus, network, split, at, layer, accuracy, parameters``.

    >>> table = published()
    >>> len(table), float(table["accuracy"].max())
    (60, 1.0)
    """
    import pandas as pd

    with files("qat.results").joinpath("paper_table1.csv").open(encoding="utf-8") as file:
        rows = [
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
            for split in SPLITS
        ]
    return pd.DataFrame(rows)


def choices(grid: PaperGrid) -> list[Choice]:
    """The cells of table 1 that have a finished training, in its order.

    The layer is the one of the highest accuracy on the validation part at the kept checkpoint, mean over seeds; ties
    take the shallower.
    """
    cells = []
    for _, same in groupby(grid.emotion, key=lambda setting: (setting.cell, setting.at)):
        settings = list(same)
        chosen, by_test = _highest(settings, "validation"), _highest(settings, "test")
        if chosen is not None and by_test is not None:
            cells.append(Choice(chosen, by_test))
    return cells


def _highest(settings: Iterable[Setting], part: str) -> Setting | None:
    means = [(setting, setting.group.mean(lambda run: run.score(part, "accuracy"))) for setting in settings]
    scored = [(setting, mean) for setting, mean in means if mean is not None]
    most = max((mean for _, mean in scored), default=0.0)
    # Of accuracies in float32, equal means over seeds may differ in the eighth digit.
    equal = [setting for setting, mean in scored if mean > most - 1e-6]
    return min(equal, key=lambda setting: setting.layer, default=None)


def summary(grid: PaperGrid) -> pd.DataFrame:
    """Every setting of a grid, in one row: figures over the seeds that are finished, NaN where there are none.

    Returns:
        ``stage, corpus, network, split, at, layer, name``; ``planned`` and ``seeds`` (finished); accuracy on the
        validation and the test part, mean and deviation over seeds, and ``uar`` on the test part; ``reconstruction``
        and ``constant`` (RH-Emo's test loss and the best constant's); ``parameters``, ``epochs``, ``kept_epoch`` (from
        1), ``epoch_seconds``, ``seconds`` (of one run), ``peak_memory`` (bytes, highest) and ``device``.
    """
    import pandas as pd

    rows = []
    for setting in grid.settings:
        group = setting.group
        validation, validation_sd = _spread(group, "validation")
        accuracy, accuracy_sd = _spread(group, "test")
        kept = _mean(group, "kept_epoch")
        row = setting.labels | {
            "name": setting.name,
            "planned": setting.planned,
            "seeds": len(group.runs),
            "validation_accuracy": validation,
            "validation_sd": validation_sd,
            "accuracy": accuracy,
            "accuracy_sd": accuracy_sd,
            **{name: _score(group, name) for name in ("uar", "reconstruction", "constant")},
            **{name: _mean(group, name) for name in ("parameters", "epochs")},
            "kept_epoch": None if kept is None else kept + 1,
            "epoch_seconds": _mean(group, "seconds_per_epoch"),
            "seconds": _mean(group, "seconds"),
            "peak_memory": max(group.values(lambda run: run.result.peak_memory), default=None),
            "device": devices(group.runs),
        }
        rows.append(row)
    words = {"stage", "corpus", "network", "split", "at", "layer", "name", "planned", "seeds", "device"}
    table = pd.DataFrame(rows)
    return table.astype({column: float for column in table.columns if column not in words})


def layers(grid: PaperGrid) -> pd.DataFrame:
    """Validation and test accuracy of every emotion setting, and whether it stands in table 1 (``chosen``)."""
    columns = [*CELL, "at", "layer", "name", "planned", "seeds", "validation_accuracy", "validation_sd"]
    table = summary(grid).query("stage == 'emotion'")[[*columns, "accuracy", "accuracy_sd", "uar"]]
    cells = choices(grid)
    chosen, best = {cell.chosen.name for cell in cells}, {cell.by_test.name for cell in cells}
    return table.assign(chosen=table["name"].isin(chosen), best_by_test=table["name"].isin(best))


def table1(grid: PaperGrid) -> pd.DataFrame:
    """Table 1 of the paper, ours beside it; one row a cell of the plan, shares in [0, 1].

    Returns:
        ``corpus, network, split, at``; ``kind`` (as `PaperGrid.kind`); ``planned`` and ``finished`` trainings of all
        its layers; ``layer`` (chosen by validation accuracy, 0 without anti-transfer) and ``position`` (which features
        that is); ``validation_accuracy``; ``seeds``; ``accuracy``, ``accuracy_sd`` over seeds, ``accuracy_low`` and
        ``accuracy_high`` (95 % over test speakers, seeds pooled), ``speakers``, ``clips``, ``uar``; ``gain`` over the
        baseline of the same corpus, network and split, paired over ``gain_seeds`` and clips, with ``gain_low`` and
        ``gain_high`` over speakers; ``test_layer`` and ``test_accuracy`` (what choosing by test accuracy would have
        given) and ``optimism`` (by how much that is more); ``parameters``; the paper's ``paper_layer``,
        ``paper_accuracy``, ``paper_gain`` and ``paper_parameters``, and the ``difference`` of the accuracies.
        The paper's are given for its corpora only, and never where the demo corpus was read.
    """
    import pandas as pd

    chosen = {(*cell.chosen.cell, cell.chosen.at): cell for cell in choices(grid)}
    theirs = {(row["corpus"], row["network"], row["split"], row["at"]): row for row in published().to_dict("records")}
    rows = []
    for key, same in groupby(grid.emotion, key=lambda setting: (*setting.cell, setting.at)):
        settings = list(same)
        kind = grid.kind(key[0])
        row: dict[str, Any] = dict(zip([*CELL, "at"], key, strict=True)) | dict.fromkeys(_TABLE1)
        row["kind"] = kind
        row["planned"] = sum(setting.planned for setting in settings)
        row["finished"] = sum(len(setting.group.runs) for setting in settings)
        if key in chosen:
            row |= _ours(chosen[key], chosen.get((*key[:3], "none")))
        if kind == "paper" and key in theirs:
            row |= _beside(row["accuracy"], theirs[key], theirs[*key[:3], "none"])
        rows.append(row)
    table = pd.DataFrame(rows, columns=[*CELL, "at", *_TABLE1])
    whole = {"layer", "seeds", "speakers", "gain_seeds", "test_layer", "paper_layer"}
    floats = [name for name in _TABLE1 if name not in {*whole, "kind", "planned", "finished", "position"}]
    return table.astype({name: float for name in floats} | {name: "Int64" for name in whole})


_TABLE1 = (
    *("kind", "planned", "finished", "layer", "position", "validation_accuracy", "seeds", "accuracy", "accuracy_sd"),
    *("accuracy_low", "accuracy_high", "speakers", "clips", "uar", "gain", "gain_low", "gain_high", "gain_seeds"),
    *("test_layer", "test_accuracy", "optimism", "parameters"),
    *("paper_layer", "paper_accuracy", "difference", "paper_gain", "paper_parameters"),
)


def _ours(choice: Choice, base: Choice | None) -> dict[str, Any]:
    chosen, group = choice.chosen, choice.chosen.group
    at = group.first.twin
    (row,) = summary_table(group.runs).to_dict("records")
    test = _score(choice.by_test.group, "accuracy")
    assert test is not None
    speakers = row["speakers"]
    figures = {
        "layer": chosen.layer,
        "position": at.position if at and chosen.layer else None,
        "validation_accuracy": _spread(group, "validation")[0],
        **{name: row[name] for name in ("seeds", "accuracy", "accuracy_sd", "accuracy_low", "accuracy_high", "clips")},
        "speakers": None if speakers != speakers else int(speakers),
        "uar": row["uar"],
        "test_layer": choice.by_test.layer,
        "test_accuracy": test,
        "optimism": max(0.0, test - row["accuracy"]),  # equal but for rounding, the shallower may have less
        "parameters": row["parameters"],
    }
    gain, seeds = _gain(group, base.chosen.group) if chosen.layer and base else (None, 0)
    if gain is not None:
        low, high = gain.interval or (None, None)
        figures |= {"gain": gain.mean, "gain_low": low, "gain_high": high, "gain_seeds": seeds}
    return figures


def _beside(accuracy: float | None, theirs: Mapping[Any, Any], base: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        "paper_layer": theirs["layer"],
        "paper_accuracy": theirs["accuracy"],
        "paper_parameters": theirs["parameters"],
        "paper_gain": theirs["accuracy"] - base["accuracy"] if theirs["layer"] else None,
        "difference": None if accuracy is None else accuracy - theirs["accuracy"],
    }


def _gain(group: Group, base: Group) -> tuple[Difference | None, int]:
    """Accuracy over the baseline's, of the seeds that both have, and how many these are."""
    seeds = {run.seed for run in base.runs}
    own = [run for run in group.runs if run.seed in seeds]
    return (clip_difference(Group(group.name, own), base), len(own)) if own else (None, 0)


def gains(table: pd.DataFrame) -> pd.DataFrame:
    """Mean gains over no anti-transfer, over all cells of `table1` that have one.

    Returns:
        One row a kind of cell: ``cells``, ``gain``; the paper's ``paper_same`` (of the same cells), ``paper_table`` (of
        all its cells) and ``paper_text`` (as its text states it).
    """
    import pandas as pd

    def mean(cells: pd.DataFrame, column: str) -> dict[str, float]:
        return {what: kind[column].mean() for what, kind in _kinds(cells) if len(kind)}

    cells = table[table["at"] != "none"]
    paper = published()
    base = paper[paper["at"] == "none"].set_index(CELL)["accuracy"].rename("base")
    paper = paper[paper["at"] != "none"].join(base, on=CELL)
    paper = paper.assign(gain=paper["accuracy"] - paper["base"])
    ours = cells[cells["gain"].notna()]
    of_paper = (cells["kind"] == "paper").any()
    whole = mean(paper, "gain") if of_paper else {}
    rows = [
        {
            "what": what,
            "cells": len(kind),
            "gain": kind["gain"].mean(),
            "paper_same": kind["paper_gain"].mean(),
            "paper_cells": len(dict(_kinds(paper)).get(what, ())) if of_paper else None,
            "paper_table": whole.get(what),
            "paper_text": STATED_GAINS.get(what) if of_paper else None,
        }
        for what, kind in _kinds(ours, sorted(set(cells["corpus"]), key=_rank(CORPORA)))
    ]
    shares = dict.fromkeys(("gain", "paper_same", "paper_table", "paper_text"), float)
    return pd.DataFrame(rows).astype(shares)


def _kinds(cells: pd.DataFrame, corpora: Sequence[str] = CORPORA) -> list[tuple[str, pd.DataFrame]]:
    """What the paper averages its gains over."""
    at = cells["at"].str
    kinds = [("all", cells)]
    kinds += [(network, cells[cells["network"] == network]) for network in NETWORKS]
    kinds += [(what, cells[at.startswith(what)]) for what in ("single", "dual")]
    kinds += [(split, cells[cells["split"] == split]) for split in SPLITS]
    kinds += [(corpus, cells[cells["corpus"] == corpus]) for corpus in corpora]
    return [*kinds, ("single speaker", cells[at.endswith("_S")]), ("single word", cells[at.endswith("_W")])]


def figure2(table: pd.DataFrame) -> pd.DataFrame:
    """Figure 2 of the paper: test accuracy by layer, averaged over corpora.

    A network's averages are over the corpora that have at least one finished training of every split, task and layer
    which is planned for that network on any corpus, and of the baselines: no average is over other corpora than
    another.

    Args:
        table: of `layers`, of corpora that may be averaged.

    Returns:
        ``network, split, at, layer, accuracy, corpora``: ``at`` is ``single_S``, ``single_W``, ``none`` (the baseline,
        layer 0), or ``mean``, over all splits and tasks, where the split is empty.
    """
    import pandas as pd

    table = table[table["at"].isin(["none", "single_S", "single_W"])]
    parts = []
    for network, of_network in table.groupby("network", sort=False):
        needed = set(zip(of_network["split"], of_network["at"], of_network["layer"], strict=True))
        there = of_network[of_network["accuracy"].notna()]
        complete = [
            corpus
            for corpus, own in there.groupby("corpus", sort=False)
            if set(zip(own["split"], own["at"], own["layer"], strict=True)) == needed
        ]
        if not complete or not (of_network["layer"] > 0).any():
            continue
        there = there[there["corpus"].isin(complete)]
        lines = there.groupby(["split", "at", "layer"], sort=False)["accuracy"].mean().reset_index()
        mean = lines[lines["at"] != "none"].groupby("layer")["accuracy"].mean().reset_index()
        both = pd.concat([lines, mean.assign(split="", at="mean")])
        parts.append(both.assign(network=network, corpora="+".join(map(str, complete))))
    columns = ["network", "split", "at", "layer", "accuracy", "corpora"]
    return pd.concat(parts)[columns] if parts else pd.DataFrame(columns=columns)


def resources(grid: PaperGrid) -> pd.DataFrame:
    """Time and memory of every setting on every device.

    Returns:
        ``device``, the setting, ``seeds``; means over these: ``epoch_seconds``, ``epochs``, ``seconds``;
        ``peak_memory`` (bytes, highest), ``parameters`` and ``train_clips``.
    """
    import pandas as pd

    rows = []
    for setting in grid.settings:
        for name in sorted({run.device for run in setting.group.runs}):
            group = Group(setting.name, [run for run in setting.group.runs if run.device == name])
            memory = group.values(lambda run: run.result.peak_memory)
            rows.append(
                {"device": name, **setting.labels, "seeds": len(group.runs)}
                | {"epoch_seconds": _mean(group, "seconds_per_epoch")}
                | {key: _mean(group, key) for key in ("epochs", "seconds")}
                | {"peak_memory": max(memory, default=None), "parameters": _mean(group, "parameters")}
                | {"train_clips": group.mean(lambda run: run.score("train", "samples"))}
            )
    floats = ("epoch_seconds", "epochs", "seconds", "peak_memory", "parameters", "train_clips")
    columns = ["device", *_LABELS, "seeds", *floats]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(floats, float))


def ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Time per epoch and peak memory of pairs of settings that differ in one thing, on one device.

    Args:
        table: of `resources`.

    Returns:
        One row a pair: ``what`` (``AT / no AT`` or ``quaternion / real``), ``device``, the first one's ``corpus,
        network, split, at, layer``, and the ratios of ``epoch_seconds`` and ``peak_memory``.
    """
    import pandas as pd

    table = table[table["stage"] == "emotion"]
    at, none = table[table["at"] != "none"], table[table["at"] == "none"]
    quaternion, real = (table[table["network"] == network] for network in ("quaternion", "real"))
    parts = []
    for what, first, second, shared in (
        ("quaternion / real", quaternion, real, ["device", "corpus", "split", "at", "layer"]),
        ("AT / no AT", at, none, ["device", *CELL]),
    ):
        measures = ["epoch_seconds", "peak_memory"]
        both = first.merge(second[[*shared, *measures]], on=shared, suffixes=("", "_second"))
        pairs = both[["device", *CELL, "at", "layer"]].assign(what=what)
        for measure in measures:
            pairs[measure] = both[measure] / both[f"{measure}_second"]
        parts.append(pairs)
    return pd.concat(parts, ignore_index=True)


def _place(row: Planned) -> tuple[Any, ...]:
    """The order of the paper's table 1."""
    named = (
        ("stage", VALUES["stage"]),
        ("corpus", CORPORA),
        ("network", NETWORKS),
        ("split", SPLITS),
        ("at", tuple(METHODS)),
    )
    return *(_rank(order)(getattr(row, name)) for name, order in named), row.layer, row.name


def _rank(order: Sequence[str]) -> Any:
    return lambda name: (order.index(name) if name in order else len(order), name)


def _spread(group: Group, part: str) -> tuple[float | None, float | None]:
    values = group.values(lambda run: run.score(part, "accuracy"))
    return mean_and_sd(values) if values else (None, None)


def _score(group: Group, name: str) -> float | None:
    return group.mean(lambda run: run.score("test", name))


def _mean(group: Group, name: str) -> float | None:
    return group.mean(lambda run: getattr(run.result, name))
