"""Settings in rows: figures over seeds, with intervals, and what anti-transfer changed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from qat.results.runs import FinishedRun, Group, group_runs
from qat.results.statistics import (
    Difference,
    cluster_interval,
    false_discovery,
    mean_and_sd,
    over_seeds,
    paired_difference,
)

if TYPE_CHECKING:
    import pandas as pd


def summary_table(runs: Iterable[FinishedRun]) -> pd.DataFrame:
    """One row per setting (runs of one name), figures over its seeds; what was not measured is NaN or None.

    Emotion classifiers come first, then the networks that were trained for them. Shares lie in [0, 1].

    Returns:
        Columns ``name``, ``task``, ``start`` (initial weights), ``anti_transfer``, ``seeds``; ``accuracy`` (test part,
        mean over seeds), ``accuracy_sd`` (over seeds), ``accuracy_low`` and ``accuracy_high`` (95 % interval over
        speakers, seeds pooled), ``uar``, ``average_precision``; ``baseline`` (the setting that differs in nothing but
        having no anti-transfer), ``difference``, ``difference_low`` and ``difference_high`` from it (same seeds and
        clips, paired); ``withheld_accuracy``, ``shortcut_rate``, ``voice_probe``, ``word_probe``; ``reconstruction``
        and ``constant`` (RH-Emo's binary cross-entropy and the best constant's); ``speakers`` and ``clips`` of the test
        part; ``parameters``, ``epochs``, ``kept_epoch`` (from 1), ``epoch_seconds``, ``seconds`` (of one run) and
        ``peak_memory`` (bytes, highest).
    """
    import pandas as pd

    groups = group_runs(runs)
    table = pd.DataFrame([_summary(group, groups) for group in groups])
    words = {"name", "task", "start", "anti_transfer", "baseline", "seeds"}
    return table.astype({column: float for column in table.columns if column not in words})


MEASURES = {
    "accuracy": "accuracy",
    "withheld_accuracy": "accuracy, withheld",
    "shortcut_rate": "shortcut rate",
    "voice_probe": "voice probe",
    "word_probe": "word probe",
}
"""What `seed_differences` compares, in the order of a report."""


def seed_differences(runs: Iterable[FinishedRun]) -> pd.DataFrame:
    """What anti-transfer changed, as differences between trainings of the same seed.

    Each setting with anti-transfer is compared with its baseline (which differs in nothing but having none) and, where
    there is one, with its control (which differs in nothing but a twin that was trained on nothing). Probes of both are
    those of the setting's last layer.

    Returns:
        One row a comparison and measure: ``name``, ``other``, ``against`` (``baseline`` or ``control``), ``measure``
        (of `MEASURES`), ``seeds``, ``mean``, ``low`` and ``high`` (95 % over seeds), ``rose`` and ``fell`` (seeds),
        ``p`` (paired t test) and ``q`` (adjusted for all comparisons of this measure and kind, Benjamini-Hochberg).
    """
    import pandas as pd

    groups = group_runs(runs)
    rows: list[tuple[Any, ...]] = []
    for group in groups:
        for against, other in (("baseline", _baseline(group, groups)), ("control", _control(group, groups))):
            for measure in MEASURES if other else ():
                assert other is not None
                layer = group.first.layers[-1]
                both = [(_measured(a, measure, layer), _measured(b, measure, layer)) for a, b in _pairs(group, other)]
                measured = [(a, b) for a, b in both if a is not None and b is not None]
                if measured:
                    change = over_seeds(*zip(*measured, strict=True))
                    low, high = change.interval or (None, None)
                    names = (group.name, other.name, against, measure, len(measured))
                    rows.append((*names, change.mean, low, high, change.rose, change.fell, change.p, None))
    columns = ["name", "other", "against", "measure", "seeds", "mean", "low", "high", "rose", "fell", "p", "q"]
    table = pd.DataFrame(rows, columns=columns).astype({name: float for name in ("mean", "low", "high", "p", "q")})
    for _, same in table[table["p"].notna()].groupby(["against", "measure"]):
        table.loc[same.index, "q"] = false_discovery(same["p"].tolist())
    return table


def _measured(run: FinishedRun, measure: str, layer: int) -> float | None:
    if measure == "accuracy":
        return run.score("test", "accuracy")
    if measure == "withheld_accuracy":
        return run.score("withheld", "accuracy")
    return run.analysis.shortcut_rate if measure == "shortcut_rate" else run.probe(measure, layer)


def _summary(group: Group, groups: Sequence[Group]) -> dict[str, Any]:
    import pandas as pd

    accuracies = group.values(lambda run: run.score("test", "accuracy"))
    accuracy, deviation = mean_and_sd(accuracies) if accuracies else (None, None)
    answers = [run.answers for run in group.runs if run.answers is not None]
    speakers, interval = None, None
    if len(answers) == len(group.runs):
        pooled = pd.concat(answers)
        if (pooled["speaker"] != "").all():
            speakers = pooled["speaker"].nunique()
            interval = cluster_interval(pooled["right"], list(pooled["speaker"]))
    base = _baseline(group, groups)
    difference = clip_difference(group, base) if base else None

    def score(name: str, part: str = "test") -> float | None:
        return group.mean(lambda run: run.score(part, name))

    def result(name: str) -> float | None:
        return group.mean(lambda run: getattr(run.result, name))

    def analysis(name: str) -> float | None:
        return group.mean(lambda run: getattr(run.analysis, name))

    kept = result("kept_epoch")
    return {
        "name": group.name,
        "task": group.first.task,
        "start": group.first.start,
        "anti_transfer": group.first.anti_transfer,
        "seeds": len(group.runs),
        "accuracy": accuracy,
        "accuracy_sd": deviation,
        "accuracy_low": interval and interval.low,
        "accuracy_high": interval and interval.high,
        "uar": score("uar"),
        "average_precision": score("average_precision"),
        "baseline": base and base.name,
        "difference": difference and difference.mean,
        "difference_low": difference and difference.interval and difference.interval.low,
        "difference_high": difference and difference.interval and difference.interval.high,
        "withheld_accuracy": score("accuracy", "withheld"),
        "shortcut_rate": analysis("shortcut_rate"),
        "voice_probe": analysis("voice_probe"),
        "word_probe": analysis("word_probe"),
        "reconstruction": score("reconstruction"),
        "constant": score("constant"),
        "speakers": speakers,
        "clips": score("samples"),
        "parameters": result("parameters"),
        "epochs": result("epochs"),
        "kept_epoch": None if kept is None else kept + 1,
        "epoch_seconds": result("seconds_per_epoch"),
        "seconds": result("seconds"),
        "peak_memory": max(group.values(lambda run: run.result.peak_memory), default=None),
    }


def _baseline(group: Group, groups: Sequence[Group]) -> Group | None:
    """The setting without anti-transfer that agrees in all else on every shared seed; the one with most of them."""
    best, most = None, 0
    for other in groups if group.first.transfers else ():
        pairs = _pairs(group, other)
        same = all(_settings(a, ("anti_transfer.",)) == _settings(b, ("anti_transfer.",)) for a, b in pairs)
        if not other.first.transfers and same and len(pairs) > most:
            best, most = other, len(pairs)
    return best


def _control(group: Group, groups: Sequence[Group]) -> Group | None:
    """The setting that agrees in all on every shared seed, but for a random twin."""

    free = ("anti_transfer.twin", "anti_transfer.random_twin")

    for other in groups if group.first.transfers and not group.first.random_twin else ():
        pairs = _pairs(group, other)
        if other.first.random_twin and pairs and all(_settings(a, free) == _settings(b, free) for a, b in pairs):
            return other
    return None


def _pairs(first: Group, second: Group) -> list[tuple[FinishedRun, FinishedRun]]:
    by_seed = {run.seed: run for run in second.runs}
    return [(run, by_seed[run.seed]) for run in first.runs if run.seed in by_seed]


def _settings(run: FinishedRun, free: tuple[str, ...]) -> dict[str, Any]:
    """All settings that could change the outcome, but for those whose names begin with one of ``free``."""
    free = ("training.deterministic", *free)
    settings = {name: value for name, value in run.settings.items() if not name.startswith(free)}
    return {"kind": run.result.kind} | settings


def clip_difference(group: Group, base: Group) -> Difference | None:
    """Accuracy of the group minus the baseline's; no interval without both runs' answers to the same clips."""
    import pandas as pd

    pairs = _pairs(group, base)
    both = [
        (a.answers, b.answers)
        for a, b in pairs
        if a.answers is not None and b.answers is not None and a.answers.index.equals(b.answers.index)
    ]
    if len(both) == len(pairs) and all((a["speaker"] != "").all() for a, _ in both):
        first, second = pd.concat([a for a, _ in both]), pd.concat([b for _, b in both])
        return paired_difference(first["right"], second["right"], list(first["speaker"]))
    scores = [(a.score("test", "accuracy"), b.score("test", "accuracy")) for a, b in pairs]
    measured = [a - b for a, b in scores if a is not None and b is not None]
    return Difference(mean_and_sd(measured)[0], None) if len(measured) == len(pairs) else None
