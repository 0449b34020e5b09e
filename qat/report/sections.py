"""The sections of every report, as functions of its runs; each has a template of its name, which holds the prose.

A function returns what its template is given, or None where there is nothing to say.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from qat.config import Experiment, flatten, to_plain
from qat.report import figures
from qat.report.figures import BLUE, RED, SOFT, Dot, DotPanel
from qat.report.page import (
    bar,
    cells,
    count,
    decimal,
    digits,
    duration,
    interval,
    memory,
    percent,
    plus_minus,
    points,
    records,
    span,
)
from qat.report.view import View, guess
from qat.results.runs import TASKS, FinishedRun, Group, made_with
from qat.results.statistics import mean_and_sd
from qat.results.tables import MEASURES

if TYPE_CHECKING:
    import pandas as pd

Section = dict[str, Any] | None
Row = dict[str, Any]
SPEAKER_COLUMNS = 6
CLIPS, CLIP_SECONDS = 3, 4.0


def verdict(view: View) -> Section:
    if view.grid or not view.main:
        return None if view.grid else {"top": None, "best": None, "chart": None}
    table = view.results
    judged = table[table["difference"].notna()]
    clear = judged[(judged["difference_low"] > 0) | (judged["difference_high"] < 0)]
    most = clear if len(clear) else judged
    top = records(most.loc[[most["difference"].abs().idxmax()]])[0] if len(most) else None
    scored = table[table["accuracy"].notna()]
    best = records(scored.loc[[scored["accuracy"].idxmax()]])[0] if len(scored) else None
    measures: list[tuple[str, Callable[[FinishedRun], float | None], float | None]] = [
        (f"accuracy, {'unseen' if view.unseen else 'test'} {view.voice}s", _scored("test"), _guess(view)),
        ("accuracy, withheld", _scored("withheld"), _guess(view)),
        ("shortcut rate", lambda run: run.analysis.shortcut_rate, None),
        ("voice probe", lambda run: run.analysis.voice_probe, _chance(view)),
    ]
    panels = []
    for number, (title, of, line) in enumerate(measures):
        dots = [_dot(view.rows[group.name], group, row, of, number == 0) for row, group in enumerate(view.main)]
        if drawn := [dot for dot in dots if dot]:
            panels.append(DotPanel(title, "%", drawn, line))
    names = [group.name for group in view.main]
    chart = figures.dots(names, panels, _breaks(view.main)) if panels else None
    values = {"judged": len(judged), "clear": len(clear), "top": top, "best": best, "guess": _guess(view)}
    return values | {"chart": chart, "measures": len(panels), "difference": _difference}


def trained(view: View) -> Section:
    if view.grid:
        return None
    runs = [run.experiment for group in view.main for run in group.runs]
    experiments = [run for run in runs if isinstance(run, Experiment)]
    domains, widths = {one.network.domain for one in experiments}, {one.network.width for one in experiments}
    first = view.main[0].first if view.main else None
    shown = {column for column in view.results if view.results[column].notna().any()}
    return {
        "seconds": sum(run.result.seconds or 0 for run in view.runs),
        "others": ", ".join(f"{g.name} ({TASKS.get(g.first.task, g.first.task)})" for g in view.others),
        "first": first,
        "domain": domains.pop() if len(domains) == 1 else "",
        "width": widths.pop() if len(widths) == 1 else 1.0,
        "leak": next((one.split.leak for one in experiments if one.split.rule == "confounded"), None),
        "transfers": any(group.first.transfers for group in view.main),
        "random": any(group.first.random_twin for group in view.main),
        "starts": view.results["start"].nunique(),
        "shown": shown,
    }


def missing(view: View) -> Section:
    """The trainings that are not finished, and why, where that is known."""
    folder = view.folder
    if not (folder.failed or folder.unfinished):
        return None
    values: Row = {"failed": folder.failed, "unfinished": folder.unfinished, "head": None}
    if view.grid:
        from qat.report.paper_sections import by_cell

        values["head"] = ["Corpus", "Network, split", *view.methods.values()]
        values["body"] = by_cell(view, lambda row: f"{row['finished']} of {row['planned']}")
    return values


def results(view: View) -> Section:
    if view.grid or not view.main:
        return None
    columns: dict[str, tuple[str, Callable[[Row], str]]] = {
        "Setting": ("name", lambda row: row["name"]),
        "Starts from": ("start", lambda row: row["start"]),
        "Anti-transfer": ("anti_transfer", lambda row: row["anti_transfer"]),
        "Accuracy ± sd, %": ("accuracy", _accuracy),
        "95 % interval": ("accuracy_low", lambda row: interval(row["accuracy_low"], row["accuracy_high"])),
        "UA, %": ("uar", lambda row: percent(row["uar"])),
        "Difference [95 %], points": ("difference", _difference),
        "Withheld, %": ("withheld_accuracy", lambda row: percent(row["withheld_accuracy"])),
        "Short\N{SOFT HYPHEN}cut, %": ("shortcut_rate", lambda row: percent(row["shortcut_rate"])),
        "Voice probe, %": ("voice_probe", lambda row: percent(row["voice_probe"])),
        "Word probe, %": ("word_probe", lambda row: percent(row["word_probe"])),
        "Average precision": ("average_precision", lambda row: decimal(row["average_precision"])),
    }
    shown = {title: cell for title, (column, cell) in columns.items() if view.results[column].notna().any()}
    groups = {group.name: group for group in view.main}
    findings = []
    for row in records(view.results[view.results["difference"].notna()]):
        base, layer = dict(view.rows[row["baseline"]]), groups[row["name"]].first.layers[-1]
        base["voice_probe"] = groups[row["baseline"]].mean(partial(FinishedRun.probe, name="voice_probe", layer=layer))
        moved = ", ".join(
            f"{name} {percent(base[column])} → {percent(row[column])} %"
            for column, name in (("shortcut_rate", "shortcut"), ("voice_probe", "voice probe"))
            if "–" not in (percent(base[column]), percent(row[column]))
        )
        findings.append((row, base["name"], _difference(row), moved))
    return {"head": list(shown), "body": cells(map(view.rows.get, groups), shown), "findings": findings}


def differences(view: View) -> Section:
    """What anti-transfer changed, over seeds."""
    table = view.paired[view.paired["low"].notna()] if not view.grid else None
    if table is None or table.empty:
        return None
    measures = {name: title for name, title in MEASURES.items() if (table["measure"] == name).any()}
    groups = [group for group in view.main if (table["name"] == group.name).any()]
    places = {group.name: row for row, group in enumerate(groups)}
    looks = {"baseline": (BLUE, False, -0.13), "control": (RED, True, 0.17)}
    panels = []
    for measure, title in measures.items():
        own = records(table[(table["measure"] == measure) & table["name"].isin(places)])
        dots = [
            Dot(places[row["name"]], 100 * row["mean"], 100 * row["low"], 100 * row["high"], (), *looks[row["against"]])
            for row in own
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
        tables = []
        groups = [g for g in panel.groups if any(run.answers is not None for run in g.runs)][: figures.PANELS]
        for start in range(0, len(groups), SPEAKER_COLUMNS):
            columns = {group.name: _by_speaker(group) for group in groups[start : start + SPEAKER_COLUMNS]}
            names = sorted({name for column in columns.values() for name in column.index if name})
            body = [
                [name, *(_speaker_cell(column, name) for column in columns.values()), _clips(columns.values(), name)]
                for name in names
            ]
            if body:
                tables.append((["Speaker", *columns, "Clips"], body))
        panels += [(panel, tables)] if tables else []
    return {"panels": panels} if panels else None


def wrong(view: View) -> Section:
    """Up to three wrong answers to listen to, the most confident ones of the best setting's first seed."""
    scored = [(group.mean(_scored("test")) or 0, -n, group) for n, group in enumerate(view.main)]
    group = max(scored)[2] if scored else None
    answers = group.first.answers if group else None
    if group is None or answers is None:
        return None
    errors = answers[answers["right"] == 0]
    columns = [f"p_{name}" for name in errors["predicted"]]
    if len(errors) and set(columns) <= set(errors):
        sure = [float(row[column] or 0) for column, (_, row) in zip(columns, errors.iterrows(), strict=True)]
        errors = errors.assign(sure=sure).sort_values("sure", ascending=False, kind="stable")
    heard = []
    for _, row in errors.drop_duplicates("speaker").iterrows():
        if sound := _sound(group.first, row):
            heard.append((row, percent(row["sure"]) if "sure" in row else "–", sound))
        if len(heard) == CLIPS:
            break
    return {"name": group.name, "seed": group.first.seed, "clips": heard} if heard else None


def curves(view: View) -> Section:
    panels = []
    for panel in view.panels:
        logged = [group for group in panel.groups if _logs(group, "train_total")]
        judged = [group for group in logged if _logs(group, "validation_accuracy")]
        if logged:
            accuracy = figures.accuracies(judged) if judged else None
            panels.append((panel, logged, figures.losses(logged, share=True), judged, accuracy))
    others = [group for group in view.others if _logs(group, "train_total")]
    if not (panels or others):
        return None
    rhemo = any(group.first.task == "rhemo" for group in others)
    return {
        "panels": panels,
        "others": others,
        "rhemo": rhemo,
        "beforehand": others and figures.losses(others, share=False),
    }


def confusions(view: View) -> Section:
    panels = []
    for panel in view.panels:
        counted = [group for group in panel.groups if figures.confusion(group) is not None]
        panels += [(panel, counted, figures.confusions(counted))] if counted else []
    return {"panels": panels} if panels else None


def similarity(view: View) -> Section:
    panels = []
    for panel in view.panels:
        watched = [group for group in panel.groups if any(figures.similarity(run) for run in group.runs)]
        panels += [(panel, watched, figures.similarities(watched))] if watched else []
    return {"panels": panels} if panels else None


def beforehand(view: View) -> Section:
    """Networks that the others build on."""
    columns: dict[str, Callable[[Group], str]] = {
        "Network": lambda g: g.name,
        "Task": lambda g: TASKS.get(g.first.task, g.first.task),
        "Corpus": lambda g: g.first.experiment.corpus.name,
        "Classes": lambda g: count(len(g.first.true_classes) or None),
        "Accuracy, %": lambda g: plus_minus(*_spread(g)),
        "UA, %": lambda g: percent(g.mean(lambda run: run.score("test", "uar"))),
        "Average precision": lambda g: decimal(g.mean(lambda run: run.score("test", "average_precision"))),
        "Recon\N{SOFT HYPHEN}struction": lambda g: decimal(g.mean(lambda run: run.score("test", "reconstruction"))),
        "Constant": lambda g: decimal(g.mean(lambda run: run.score("test", "constant"))),
        "Live channels": lambda g: _of_four(g.mean(lambda run: run.score("test", "live_channels"))),
        "Epochs": lambda g: count(g.mean(lambda run: run.result.epochs)),
        "Time": lambda g: duration(g.mean(lambda run: run.result.seconds)),
    }
    return {"head": list(columns), "body": cells(view.others, columns)} if view.others else None


def resources(view: View) -> Section:
    if not view.runs:
        return None
    seconds: dict[str, list[FinishedRun]] = {}
    stages = {row.run: row.stage for row in view.folder.plan}
    for run in view.runs:
        stage = stages.get(run.folder.name) or TASKS.get(run.task, run.task)
        seconds.setdefault(stage, []).append(run)
    total = sum(run.result.seconds or 0 for run in view.runs)
    body = [
        [
            stage,
            count(len(runs)),
            bar(time / total) if total else "–",
            duration(time),
            memory(max((run.result.peak_memory or 0 for run in runs), default=None) or None),
        ]
        for stage, runs in seconds.items()
        for time in [sum(run.result.seconds or 0 for run in runs)]
    ]
    body.append(["all", count(len(view.runs)), "", duration(total), "–"])
    columns: dict[str, Callable[[Row], str]] = {
        "Network": lambda row: row["name"],
        "Parameters": lambda row: count(row["parameters"]),
        "Epochs": lambda row: count(row["epochs"]),
        "Kept epoch": lambda row: count(row["kept_epoch"]),
        "Seconds per epoch": lambda row: digits(row["epoch_seconds"]),
        "Time of a run": lambda row: duration(row["seconds"]),
        "Peak memory": lambda row: memory(row["peak_memory"]),
    }
    return {
        "stages": body if total else None,
        "head": list(columns),
        "body": None if view.grid else cells(view.rows.values(), columns),
    }


def limits(view: View) -> Section:
    if view.grid or not view.main:
        return None
    table = view.results
    judged = table[table["difference_low"].notna()]
    widths = [run.width for group in view.main for run in group.runs]
    return {
        "not_run": view.folder.requested.get("not_run") or [],
        "speakers": table["speakers"].min(),
        "width": 100 * (table["accuracy_high"] - table["accuracy_low"]).mean(),
        "judged": len(judged),
        "half": 50 * (judged["difference_high"] - judged["difference_low"]).mean(),
        "seeds": int(table["seeds"].min()),
        "scale": max(widths),
    }


def provenance(view: View) -> Section:
    bundles: dict[str, list[FinishedRun]] = {}
    if view.grid:
        for setting in view.grid.settings:
            bundles.setdefault(f"{setting.stage} {setting.network}".strip(), []).extend(setting.group.runs)
    else:
        bundles = {group.name: group.runs for group in (*view.others, *view.main)}
    shown = [(title, runs, *_settings(runs), _files(runs[0])) for title, runs in bundles.items() if runs]
    return {
        "facts": made_with(view.runs),
        "bundles": shown,
        "folder": view.folder.folder,
        "request": view.folder.request,
    }


def _settings(runs: Sequence[FinishedRun]) -> tuple[str, list[tuple[str, str]]]:
    """The settings that all runs share, and the values of those that differ."""
    values: dict[str, dict[str, None]] = {}
    for run in runs:
        for key, value in flatten(to_plain(run.experiment)).items():
            values.setdefault(key, {})[json.dumps(value, ensure_ascii=False)] = None
    shared = "\n".join(f"{key}: {next(iter(each))}" for key, each in values.items() if len(each) == 1)
    varied = [(key, list(each)) for key, each in values.items() if len(each) > 1]
    return shared, [(k, ", ".join(v[:8]) + (f" and {len(v) - 8} more" if len(v) > 8 else "")) for k, v in varied]


def _files(run: FinishedRun) -> str:
    return ", ".join(sorted(path.name for path in run.folder.iterdir() if not path.name.startswith(".")))


def _dot(row: Row, group: Group, y: int, of: Callable[[FinishedRun], float | None], ends: bool) -> Dot | None:
    values = [100 * value for value in group.values(of)]
    low, high = (100 * row[f"accuracy_{end}"] if ends else None for end in ("low", "high"))
    colour = BLUE if group.first.transfers else SOFT
    return Dot(y, mean_and_sd(values)[0], low, high, values, colour, group.first.random_twin) if values else None


def _breaks(groups: Sequence[Group]) -> list[int]:
    """Where other initial weights begin."""
    return [n for n in range(1, len(groups)) if groups[n].first.start != groups[n - 1].first.start]


def _scored(part: str) -> Callable[[FinishedRun], float | None]:
    return lambda run: run.score(part, "accuracy")


def _guess(view: View) -> float | None:
    return guess(run for group in view.main for run in group.runs)


def _chance(view: View) -> float | None:
    chances = [value for g in view.main for value in g.values(lambda run: run.analysis.voice_probe_chance)]
    return 100 * chances[0] if chances else None


def _spread(group: Group) -> tuple[float, float]:
    values = group.values(_scored("test"))
    mean, deviation = mean_and_sd(values) if values else (float("nan"), None)
    return mean, float("nan") if deviation is None else deviation


def _logs(group: Group, column: str) -> bool:
    return any(run.metrics is not None and column in run.metrics for run in group.runs)


def _of_four(channels: float | None) -> str:
    return "–" if channels is None else f"{channels:g} of 4"


def _accuracy(row: Row) -> str:
    return plus_minus(row["accuracy"], row["accuracy_sd"])


def _difference(row: Row) -> str:
    return points(row["difference"], row["difference_low"], row["difference_high"])


def _by_speaker(group: Group) -> pd.DataFrame:
    """Accuracy (seeds pooled) and clips (of one seed) by test speaker."""
    import pandas as pd

    answers = [run.answers for run in group.runs if run.answers is not None]
    table = pd.concat(answers).groupby("speaker")["right"].agg(["mean", "size"])
    return table.assign(size=table["size"] / len(answers))


def _speaker_cell(column: pd.DataFrame, name: str) -> str:
    return percent(column["mean"].get(name))


def _clips(columns: Any, name: str) -> str:
    return span(column["size"][name] for column in columns if name in column.index)


def _sound(run: FinishedRun, row: pd.Series) -> str | None:
    """The beginning of a clip as a data URI, where the corpus is still there."""
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
