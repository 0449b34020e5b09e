"""The sections of every report, as functions of its runs; the template of the same name holds the prose.

A function returns the values for its template, or None to omit the section.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import pandas as pd
from markupsafe import Markup

from qat.config import Experiment, flatten, to_plain
from qat.report import figures
from qat.report.figures import BLUE, RED, SOFT, Dot, DotPanel
from qat.report.page import percent, points, records, span
from qat.report.view import View
from qat.results.runs import TASKS, FinishedRun, Group, made_with
from qat.results.tables import MEASURES, means

Section = dict[str, Any] | None
Row = dict[str, Any]
SPEAKER_COLUMNS = 6
CLIPS, CLIP_SECONDS = 3, 4.0


def verdict(view: View) -> Section:
    if not view.main:
        return {"top": None, "best": None, "chart": None}
    table = view.results
    judged = table[table["difference"].notna()]
    clear = judged[(judged["difference_low"] > 0) | (judged["difference_high"] < 0)]
    chances = [value for group in view.main for value in group.values(lambda run: run.analysis.voice_probe_chance)]
    measures: list[tuple[str, Callable[[FinishedRun], float | None], float | None]] = [
        (
            f"accuracy, {'unseen' if view.unseen else 'test'} speakers",
            lambda run: run.score("test", "accuracy"),
            view.guessing,
        ),
        ("accuracy, withheld", lambda run: run.score("withheld", "accuracy"), view.guessing),
        ("shortcut rate", lambda run: run.analysis.shortcut_rate, None),
        ("speaker probe", lambda run: run.analysis.voice_probe, 100 * chances[0] if chances else None),
    ]
    panels = []
    for number, (title, of, line) in enumerate(measures):
        dots = [_dot(view.rows[group.name], group, y, of, number == 0) for y, group in enumerate(view.main)]
        panels += [DotPanel(title, "%", list(filter(None, dots)), line)] if any(dots) else []
    return {
        "judged": len(judged),
        "clear": len(clear),
        "top": _highest(clear if len(clear) else judged, "difference"),
        "best": _highest(table, "accuracy"),
        "chart": figures.dots([group.name for group in view.main], panels, _breaks(view.main)) if panels else None,
        "measures": len(panels),
    }


def trained(view: View) -> Section:
    runs = [run.experiment for group in view.main for run in group.runs]
    experiments = [run for run in runs if isinstance(run, Experiment)]
    networks = [run.network for run in experiments]
    domains, widths = {network.domain for network in networks}, {network.width for network in networks}
    return {
        "seconds": sum(run.result.seconds or 0 for run in view.runs),
        "others": ", ".join(f"{group.name} ({TASKS[group.first.task]})" for group in view.others),
        "first": view.main[0].first if view.main else None,
        "domain": domains.pop() if len(domains) == 1 else "",
        "width": widths.pop() if len(widths) == 1 else 1.0,
        "leak": next((run.split.leak for run in experiments if run.split.rule == "confounded"), None),
        "transfers": any(group.first.transfers for group in view.main),
        "random": any(group.first.random_twin for group in view.main),
        "starts": view.results["start"].nunique(),
        "shown": set(view.results.columns[view.results.notna().any()]),
    }


def missing(view: View) -> Section:
    """The trainings that failed, with their errors, or are not finished."""
    failed, unfinished = view.folder.failed, view.folder.unfinished
    return {"failed": failed, "unfinished": unfinished} if failed or unfinished else None


def results(view: View) -> Section:
    if not view.main:
        return None
    groups = {group.name: group for group in view.main}
    findings = []
    for row in records(view.results[view.results["difference"].notna()]):
        base, layer = dict(view.rows[row["baseline"]]), groups[row["name"]].first.layers[-1]
        base["voice_probe"] = groups[row["baseline"]].mean(partial(FinishedRun.probe, name="voice_probe", layer=layer))
        moved = ", ".join(
            f"{name} {percent(base[column])} → {percent(row[column])}\N{NO-BREAK SPACE}%"
            for column, name in (("shortcut_rate", "shortcut"), ("voice_probe", "speaker probe"))
            if "–" not in (percent(base[column]), percent(row[column]))
        )
        findings.append((row, moved))
    return {"rows": records(view.results), "findings": findings}


def differences(view: View) -> Section:
    """Changes by anti-transfer, over seeds."""
    table = view.paired[view.paired["low"].notna()]
    if table.empty:
        return None
    measures = {name: title for name, title in MEASURES.items() if (table["measure"] == name).any()}
    groups = [group for group in view.main if (table["name"] == group.name).any()]
    places = {group.name: row for row, group in enumerate(groups)}
    looks = {"baseline": (BLUE, False, -0.13), "control": (RED, True, 0.17)}
    panels = []
    for measure, title in measures.items():
        dots = [
            Dot(places[row["name"]], 100 * row["mean"], 100 * row["low"], 100 * row["high"], (), *looks[row["against"]])
            for row in records(table[(table["measure"] == measure) & table["name"].isin(places)])
        ]
        panels.append(DotPanel(title, "points", dots, 0))
    verdicts = []
    for (against, kind), same in table.groupby(["against", "measure"], sort=False):
        sure = same[same["q"] < 0.05].sort_values("p")
        named = "; ".join(f"{row['name']} {points(row['mean'], row['low'], row['high'])}" for row in records(sure)[:8])
        clear = int(((same["low"] > 0) | (same["high"] < 0)).sum())
        verdicts.append((measures[str(kind)], against, clear, len(same), len(sure), named))
    shown = {
        (row["name"], row["against"], row["measure"]): Markup("{}<br><small>{:.0f}↑ {:.0f}↓{}</small>").format(
            points(row["mean"], row["low"], row["high"]), row["rose"], row["fell"], "*" if row["q"] < 0.05 else ""
        )
        for row in records(table)
    }
    pairs = table[["name", "against", "other"]].drop_duplicates().itertuples(index=False)
    return {
        "seeds": span(table["seeds"], "seed"),
        "verdicts": verdicts,
        "chart": figures.dots(list(places), panels, _breaks(groups)),
        "head": ["Setting", "Minus", *measures.values()],
        "body": [
            [name, other, *(shown.get((name, against, m), "–") for m in measures)] for name, against, other in pairs
        ],
    }


def speakers(view: View) -> Section:
    """Accuracy of each test speaker."""
    panels = []
    for panel in view.panels:
        groups = [g for g in panel.groups if any(run.answers is not None for run in g.runs)][: figures.PANELS]
        parts = [groups[start : start + SPEAKER_COLUMNS] for start in range(0, len(groups), SPEAKER_COLUMNS)]
        tables = [table for part in parts if (table := _speaker_table(part))[1]]
        panels += [(panel, tables)] if tables else []
    return {"panels": panels} if panels else None


def wrong(view: View) -> Section:
    """Up to three wrong answers as audio: the most confident ones of the best setting's first seed."""
    group = max(view.main, key=lambda setting: setting.score("accuracy") or 0, default=None)
    answers = group.first.answers if group else None
    if group is None or answers is None:
        return None
    errors = answers[answers["right"] == 0]
    columns = [f"p_{name}" for name in errors["predicted"]]
    if len(errors) and set(columns) <= set(errors):
        sure = [float(row[column] or 0) for column, (_, row) in zip(columns, errors.iterrows(), strict=True)]
        errors = errors.assign(sure=sure).sort_values("sure", ascending=False, kind="stable")
    clips: list[tuple[Any, ...]] = []
    for _, row in errors.drop_duplicates("speaker").iterrows():
        if len(clips) < CLIPS and (sound := _sound(group.first, row)):
            clips.append((row, percent(row.get("sure")), sound))
    return {"name": group.name, "seed": group.first.seed, "clips": clips} if clips else None


def curves(view: View) -> Section:
    losses = view.charts(_logs("train_total"), partial(figures.losses, share=True))
    accuracies = view.charts(_logs("validation_accuracy"), figures.accuracies)
    others = list(filter(_logs("train_total"), view.others))
    if not (losses or others):
        return None
    return {
        "losses": losses,
        "accuracies": {panel.slug: (groups, chart) for panel, groups, chart in accuracies},
        "others": others,
        "beforehand": figures.losses(others, share=False) if others else None,
    }


def confusions(view: View) -> Section:
    charts = view.charts(lambda group: figures.confusion(group) is not None, figures.confusions)
    return {"charts": charts} if charts else None


def similarity(view: View) -> Section:
    charts = view.charts(lambda group: any(figures.similarity(run) for run in group.runs), figures.similarities)
    return {"charts": charts} if charts else None


def beforehand(view: View) -> Section:
    """Networks that other trainings build on."""
    rows = [
        means(group)
        | {"name": group.name, "task": TASKS[group.first.task], "corpus": group.first.experiment.corpus.name}
        | {"classes": len(group.first.true_classes) or None, "live_channels": group.score("live_channels")}
        for group in view.others
    ]
    return {"rows": rows} if rows else None


def resources(view: View) -> Section:
    if not view.runs:
        return None
    planned = {row.run: row.stage for row in view.folder.plan}
    stages: dict[str, list[FinishedRun]] = {}
    for run in view.runs:
        stages.setdefault(planned.get(run.folder.name, TASKS[run.task]), []).append(run)
    seconds = {stage: sum(run.result.seconds or 0 for run in runs) for stage, runs in stages.items()}
    total = sum(seconds.values())
    rows: list[Row] = [
        {"stage": stage, "runs": len(runs), "seconds": seconds[stage], "share": seconds[stage] / (total or 1)}
        | {"memory": max((run.result.peak_memory for run in runs if run.result.peak_memory), default=None)}
        for stage, runs in stages.items()
    ]
    rows.append({"stage": "all", "runs": len(view.runs), "seconds": total, "share": None, "memory": None})
    return {"stages": rows if total else None}


def limits(view: View) -> Section:
    if not view.main:
        return None
    table = view.results
    judged = table[table["difference_low"].notna()]
    return {
        "not_run": view.folder.requested.get("not_run") or [],
        "speakers": table["speakers"].min(),
        "width": 100 * (table["accuracy_high"] - table["accuracy_low"]).mean(),
        "judged": len(judged),
        "half": 50 * (judged["difference_high"] - judged["difference_low"]).mean(),
        "seeds": int(table["seeds"].min()),
        "scale": max(run.width for group in view.main for run in group.runs),
    }


def provenance(view: View) -> Section:
    bundles = [(title, runs, *_settings(runs), _files(runs[0])) for title, runs in view.bundles.items() if runs]
    return {"facts": made_with(view.runs), "bundles": bundles}


def _settings(runs: Sequence[FinishedRun]) -> tuple[str, list[tuple[str, str]]]:
    """Settings that all runs share, and the values of the settings that differ."""
    values: dict[str, dict[str, None]] = {}
    for run in runs:
        for key, value in flatten(to_plain(run.experiment)).items():
            values.setdefault(key, {})[json.dumps(value, ensure_ascii=False)] = None
    shared = "\n".join(f"{key}: {next(iter(each))}" for key, each in values.items() if len(each) == 1)
    varied = [(key, list(each)) for key, each in values.items() if len(each) > 1]
    return shared, [(k, ", ".join(v[:8]) + (f" and {len(v) - 8} more" if len(v) > 8 else "")) for k, v in varied]


def _files(run: FinishedRun) -> str:
    return ", ".join(sorted(path.name for path in run.folder.iterdir() if not path.name.startswith(".")))


def _highest(table: pd.DataFrame, column: str) -> Row | None:
    """The row with the largest absolute value."""
    values = table[column].abs().dropna()
    return records(table.loc[[values.idxmax()]])[0] if len(values) else None


def _dot(row: Row, group: Group, y: int, of: Callable[[FinishedRun], float | None], ends: bool) -> Dot | None:
    values = [100 * value for value in group.values(of)]
    low, high = (100 * row[f"accuracy_{end}"] if ends else None for end in ("low", "high"))
    colour = BLUE if group.first.transfers else SOFT
    return Dot(y, fmean(values), low, high, values, colour, group.first.random_twin) if values else None


def _breaks(groups: Sequence[Group]) -> list[int]:
    """Rows at which the initial weights change."""
    return [n for n in range(1, len(groups)) if groups[n].first.start != groups[n - 1].first.start]


def _logs(column: str) -> Callable[[Group], bool]:
    return lambda group: any(run.metrics is not None and column in run.metrics for run in group.runs)


def _speaker_table(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Head and body: accuracy by speaker and setting, seeds pooled, and number of clips per seed."""
    columns, sizes = {}, {}
    for group in groups:
        answers = [run.answers for run in group.runs if run.answers is not None]
        right = pd.concat(answers).groupby("speaker")["right"]
        columns[group.name], sizes[group.name] = right.mean(), right.size() / len(answers)
    names = sorted({name for column in columns.values() for name in column.index if name})
    body = [
        [
            name,
            *(percent(column.get(name)) for column in columns.values()),
            span(size[name] for size in sizes.values() if name in size),
        ]
        for name in names
    ]
    return ["Speaker", *columns, "Clips"], body


def _sound(run: FinishedRun, row: pd.Series) -> str | None:
    """The beginning of a clip as a data URI; None if its file is missing."""
    import soundfile

    from qat.data.audio import AudioError, decode

    corpus = run.experiment.corpus.folder
    root = corpus if corpus.is_dir() else corpus.parent
    try:
        audio = decode(root / row["path"], start=float(row.get("start") or 0), duration=CLIP_SECONDS)
    except (AudioError, ValueError, OSError):
        return None
    file = io.BytesIO()
    soundfile.write(file, audio, 16000, format="FLAC", subtype="PCM_16")
    return f"data:audio/flac;base64,{base64.b64encode(file.getvalue()).decode()}"
