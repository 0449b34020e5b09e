"""Tables with one row per setting: means over seeds, intervals, and differences by anti-transfer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import pandas as pd

from qat.results.runs import FinishedRun, Group, devices, group_runs
from qat.results.statistics import (
    Difference,
    cluster_interval,
    deviation,
    false_discovery,
    over_seeds,
    paired_difference,
)


def means(group: Group) -> dict[str, Any]:
    """Means of one setting over its seeds; None if no run has the value. Shares are in [0, 1].

    Returns:
        ``seeds``; on the test part ``accuracy``, ``accuracy_sd`` (over seeds), ``uar``, ``average_precision``,
        ``reconstruction`` and ``constant`` (RH-Emo's binary cross-entropy and the best constant's), ``clips``; on other
        parts ``validation_accuracy``, ``validation_sd``, ``withheld_accuracy``, ``train_clips``; ``shortcut_rate``,
        ``voice_probe``, ``word_probe``; ``parameters``, ``epochs``, ``kept_epoch`` (from 1), ``epoch_seconds``,
        ``seconds`` (of one run), ``peak_memory`` (bytes, maximum) and ``device``.
    """

    def result(name: str) -> float | None:
        return group.mean(lambda run: getattr(run.result, name))

    def analysis(name: str) -> float | None:
        return group.mean(lambda run: getattr(run.analysis, name))

    kept = result("kept_epoch")
    return {
        "seeds": len(group.runs),
        "accuracy": group.score("accuracy"),
        "accuracy_sd": deviation(group.scores("accuracy")),
        "uar": group.score("uar"),
        "average_precision": group.score("average_precision"),
        "validation_accuracy": group.score("accuracy", "validation"),
        "validation_sd": deviation(group.scores("accuracy", "validation")),
        "withheld_accuracy": group.score("accuracy", "withheld"),
        "shortcut_rate": analysis("shortcut_rate"),
        "voice_probe": analysis("voice_probe"),
        "word_probe": analysis("word_probe"),
        "reconstruction": group.score("reconstruction"),
        "constant": group.score("constant"),
        "clips": group.score("samples"),
        "train_clips": group.score("samples", "train"),
        "parameters": result("parameters"),
        "epochs": result("epochs"),
        "kept_epoch": None if kept is None else kept + 1,
        "epoch_seconds": result("seconds_per_epoch"),
        "seconds": result("seconds"),
        "peak_memory": max(group.values(lambda run: run.result.peak_memory), default=None),
        "device": devices(group.runs),
    }


def over_speakers(group: Group) -> dict[str, Any]:
    """``speakers``: their number in the test part; ``accuracy_low``, ``accuracy_high``: 95 % interval over them."""
    answers = [run.answers for run in group.runs]
    pooled = None if any(table is None for table in answers) else pd.concat(answers)
    if pooled is None or (pooled["speaker"] == "").any():
        return dict.fromkeys(("speakers", "accuracy_low", "accuracy_high"))
    low, high = cluster_interval(pooled["right"], list(pooled["speaker"])) or (None, None)
    return {"speakers": pooled["speaker"].nunique(), "accuracy_low": low, "accuracy_high": high}


def typed(rows: Iterable[dict[str, Any]], words: Iterable[str], columns: list[str] | None = None) -> pd.DataFrame:
    """A table of floats, NaN for None, except for the columns in ``words``."""
    table = pd.DataFrame(rows, columns=columns)
    return table.astype({column: float for column in table.columns if column not in words})


def summary_table(runs: Iterable[FinishedRun]) -> pd.DataFrame:
    """One row per setting (runs of one name): emotion classifiers first, then the networks that they build on.

    Returns:
        ``name``, ``task``, ``start`` (initial weights), ``anti_transfer``; the columns of `means` and `over_speakers`;
        ``baseline`` (the setting that differs only in having no anti-transfer), ``difference`` from it (paired over
        seeds and clips), ``difference_low`` and ``difference_high`` (95 % interval over speakers).
    """
    groups = group_runs(runs)
    rows = []
    for group in groups:
        first = group.first
        labels = {"name": group.name, "task": first.task, "start": first.start, "anti_transfer": first.anti_transfer}
        base = _baseline(group, groups)
        mean, interval, _ = (base and clip_difference(group, base)) or (None, None, 0)
        low, high = interval or (None, None)
        change = {"difference": mean, "difference_low": low, "difference_high": high}
        rows.append(labels | means(group) | over_speakers(group) | {"baseline": base and base.name} | change)
    return typed(rows, {"name", "task", "start", "anti_transfer", "baseline", "seeds", "device"})


MEASURES = {
    "accuracy": "accuracy",
    "withheld_accuracy": "accuracy, withheld",
    "shortcut_rate": "shortcut rate",
    "voice_probe": "speaker probe",
    "word_probe": "word probe",
}
"""Measures of `seed_differences` with their titles, in the order of a report."""


def seed_differences(runs: Iterable[FinishedRun]) -> pd.DataFrame:
    """Differences by anti-transfer between trainings of the same seed.

    Each setting with anti-transfer is compared with its baseline (which differs only in having none) and, if there is
    one, with its control (which differs only in its twin, which was trained on nothing). Probes of both are taken at
    the setting's last layer.

    Returns:
        One row per comparison and measure: ``name``, ``other``, ``against`` (``baseline`` or ``control``), ``measure``
        (of `MEASURES`), ``seeds``, ``mean``, ``low`` and ``high`` (95 % over seeds), ``rose`` and ``fell`` (number of
        seeds), ``p`` (paired t test) and ``q`` (adjusted for all comparisons of this measure and kind,
        Benjamini-Hochberg).
    """
    groups = group_runs(runs)
    rows = []
    for group in groups:
        layer = group.first.layers[-1] if group.first.layers else 0
        for against, other in (("baseline", _baseline(group, groups)), ("control", _control(group, groups))):
            if other is None:
                continue
            for measure in MEASURES:
                both = [(_measured(a, measure, layer), _measured(b, measure, layer)) for a, b in _pairs(group, other)]
                measured = [(a, b) for a, b in both if a is not None and b is not None]
                if measured:
                    change = over_seeds(*zip(*measured, strict=True))
                    low, high = change.interval or (None, None)
                    names = {"name": group.name, "other": other.name, "against": against, "measure": measure}
                    figures = {"seeds": len(measured), "mean": change.mean, "low": low, "high": high}
                    rows.append(names | figures | {"rose": change.rose, "fell": change.fell, "p": change.p, "q": None})
    columns = ["name", "other", "against", "measure", "seeds", "mean", "low", "high", "rose", "fell", "p", "q"]
    table = typed(rows, [*columns[:5], "rose", "fell"], columns)
    for _, same in table[table["p"].notna()].groupby(["against", "measure"]):
        table.loc[same.index, "q"] = false_discovery(same["p"].tolist())
    return table


def _measured(run: FinishedRun, measure: str, layer: int) -> float | None:
    part = {"accuracy": "test", "withheld_accuracy": "withheld"}.get(measure)
    if part:
        return run.score(part, "accuracy")
    return run.analysis.shortcut_rate if measure == "shortcut_rate" else run.probe(measure, layer)


def _baseline(group: Group, groups: Sequence[Group]) -> Group | None:
    """The setting without anti-transfer that otherwise agrees on every shared seed; of several, the one with most."""
    same = [other for other in groups if not other.first.transfers and _agree(group, other, "anti_transfer.")]
    return max(same, key=lambda other: len(_pairs(group, other)), default=None) if group.first.transfers else None


def _control(group: Group, groups: Sequence[Group]) -> Group | None:
    """The setting that agrees on every shared seed except for its random twin."""
    if not group.first.transfers or group.first.random_twin:
        return None
    free = ("anti_transfer.twin", "anti_transfer.random_twin")
    return next((other for other in groups if other.first.random_twin and _agree(group, other, *free)), None)


def _agree(first: Group, second: Group, *free: str) -> bool:
    """Whether both share seeds, and agree on each in all settings except those whose names begin with ``free``."""
    pairs = _pairs(first, second)
    return bool(pairs) and all(_settings(a, free) == _settings(b, free) for a, b in pairs)


def _pairs(first: Group, second: Group) -> list[tuple[FinishedRun, FinishedRun]]:
    by_seed = {run.seed: run for run in second.runs}
    return [(run, by_seed[run.seed]) for run in first.runs if run.seed in by_seed]


def _settings(run: FinishedRun, free: tuple[str, ...]) -> dict[str, Any]:
    """All settings that could change the result, except those whose names begin with one of ``free``."""
    free = ("training.deterministic", *free)
    settings = {name: value for name, value in run.settings.items() if not name.startswith(free)}
    return {"kind": run.result.kind} | settings


def clip_difference(group: Group, base: Group) -> Difference | None:
    """Accuracy minus the baseline's on shared seeds, with an interval if both have predictions of the same clips."""
    pairs = _pairs(group, base)
    if not pairs:
        return None
    both = [(a.answers, b.answers) for a, b in pairs]
    if all(a is not None and b is not None and a.index.equals(b.index) and (a["speaker"] != "").all() for a, b in both):
        first, second = (pd.concat(tables) for tables in zip(*both, strict=True))
        difference = paired_difference(first["right"], second["right"], list(first["speaker"]))
        return difference._replace(seeds=len(pairs))
    scores = [(a.score("test", "accuracy"), b.score("test", "accuracy")) for a, b in pairs]
    measured = [a - b for a, b in scores if a is not None and b is not None]
    return Difference(fmean(measured), None, len(pairs)) if len(measured) == len(pairs) else None
