"""The sections that a folder has where it is a grid: the paper's table 1, figure 2 and resources, beside ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from qat.report import figures
from qat.report.figures import Dot, DotPanel, Line
from qat.report.page import (
    NAN,
    cells,
    count,
    digits,
    interval,
    memory,
    percent,
    plus_minus,
    points,
    records,
    signed,
    span,
    times,
)
from qat.report.sections import Row, Section
from qat.report.view import KINDS, View, guess, of_corpora
from qat.results import paper
from qat.results.paper import METHODS

if TYPE_CHECKING:
    import pandas as pd

_COSTS = {"epoch_seconds": "time per epoch", "peak_memory": "peak memory"}


def grid_verdict(view: View) -> Section:
    if not view.grid:
        return None
    judged = view.table1[view.table1["gain"].notna()]
    keys = list(dict.fromkeys(map(_key, records(judged))))
    panels = []
    for at, title in view.methods.items():
        dots = []
        for row in records(judged[judged["at"] == at]):
            y, low, high = keys.index(_key(row)), 100 * row["gain_low"], 100 * row["gain_high"]
            dots.append(Dot(y, 100 * row["gain"], low, high, shift=-0.1))
            if row["paper_gain"] == row["paper_gain"]:
                dots.append(Dot(y, 100 * row["paper_gain"], colour=figures.RED, hollow=True, shift=0.15))
        panels += [DotPanel(title, "points", dots, 0)] if dots else []
    rows = [f"{view.called(corpus)}, {network}, {split}" for corpus, network, split in keys]
    kind = next((kind for kind in KINDS if (judged["kind"] == kind).any()), "")  # the nearest to the paper's, alone
    judged = judged[judged["kind"] == kind]
    sure, beside = judged[judged["gain_low"].notna()], judged[judged["paper_gain"].notna()]
    return {
        "corpora": view.listing(dict.fromkeys(judged["corpus"])),
        "finished": view.grid.finished,
        "planned": view.grid.planned,
        "judged": len(judged),
        "above": int((judged["gain"] > 0).sum()),
        "gain": judged["gain"].mean(),
        "paper": beside["paper_gain"].mean(),
        "beside": beside["gain"].mean(),
        "clear": int(((sure["gain_low"] > 0) | (sure["gain_high"] < 0)).sum()),
        "sure": len(sure),
        "chart": figures.dots(rows, panels) if panels else None,
    }


def real(view: View) -> Section:
    """What of a grid is recorded speech, and what is there."""
    if not (grid := view.grid):
        return None
    seeds = sorted({run.seed for setting in grid.settings for run in setting.group.runs if run.seed is not None})
    demo = {
        setting.stage
        for setting in grid.settings
        if setting.stage != "emotion" and any(run.experiment.corpus.name == "demo" for run in setting.group.runs)
    }
    requested = view.folder.requested
    return {
        "preset": requested.get("preset"),
        "finished": grid.finished,
        "planned": grid.planned,
        "seeds": ", ".join(map(str, seeds)),
        "several": len(seeds) > 1,
        "demo": ", ".join(sorted(demo)) if set(view.kinds) != {"synthesised"} else "",
    }


def table1(view: View) -> Section:
    if not view.grid:
        return None
    findings = []
    for kind, corpora in view.kinds.items():
        own = of_corpora(view.table1, corpora)
        judged, beside = own[own["gain"].notna()], own[own["difference"].notna()]
        if len(judged):
            sure = judged[judged["gain_low"].notna()]
            counts = {
                "cells": len(judged),
                "above": int((judged["gain"] > 0).sum()),
                "below": int((judged["gain"] < 0).sum()),
                "sure": len(sure),
                "without_zero": int(((sure["gain_low"] > 0) | (sure["gain_high"] < 0)).sum()),
                "beside": len(beside),
                "mean": beside["difference"].mean(),
                "far": beside["difference"].abs().max(),
            }
            findings.append((KINDS[kind].capitalize(), counts))
    sizes = []
    for network, own in view.table1[view.table1["parameters"].notna()].groupby("network", sort=False):
        theirs = own["paper_parameters"].dropna()
        stated = f", the paper's {theirs.iloc[0]:.1e}".replace(".0e", "e").replace("e+0", "e") if len(theirs) else ""
        sizes.append(f"{network} {span(own['parameters'])}{stated}")
    recalls = view.table1[view.table1["uar"].notna()]
    return {
        "findings": findings,
        "sizes": "; ".join(sizes),
        "common": view.common(),
        "seeds": span(view.table1["seeds"].dropna().astype(int), "seed"),
        "head": ["Corpus", "Network, split", *view.methods.values()],
        "body": by_cell(view, _accuracy_cell),
        "recalls": by_cell(view, lambda row: f"{percent(row['accuracy'])} / {percent(row['uar'])}", recalls),
    }


def gains(view: View) -> Section:
    tables = []
    for kind, corpora in view.kinds.items():
        means = paper.gains(of_corpora(view.table1, corpora))
        columns: dict[str, Callable[[Row], str]] = {
            "Cells with": lambda row: view.called(row["what"]),
            "Cells": lambda row: count(row["cells"]),
            "Ours": lambda row: points(row["gain"]),
            "Paper's table, same cells": lambda row: points(
                NAN if row["cells"] == row["paper_cells"] else row["paper_same"]
            ),
            "Paper's table": lambda row: points(row["paper_table"]),
            "Paper's text": lambda row: points(row["paper_text"]),
        }
        if body := cells(records(means[means["cells"] > 0]), columns):
            tables.append((kind, KINDS[kind].capitalize(), view.listing(corpora), list(columns), body))
    return {"tables": tables} if tables else None


def layers(view: View) -> Section:
    """Figure 2 of the paper, and the same of each corpus."""
    if not view.grid:
        return None
    averaged, each = [], []
    for kind, corpora in view.kinds.items():
        own = of_corpora(view.layers, corpora)
        table = paper.figure2(own)
        panels, left = {}, []
        for network, lines in table.groupby("network", sort=False):
            there = lines["corpora"].iloc[0].split("+")
            panels[f"{network}: {view.listing(there)}"] = [
                _line(line, str(split), str(at)) for (split, at), line in lines.groupby(["split", "at"], sort=False)
            ]
            if lacking := [corpus for corpus in corpora if corpus not in there]:
                left.append(f"{network} without {view.listing(lacking)}")
        left += [f"none yet for {one}" for one in dict.fromkeys(own["network"]) if one not in set(table["network"])]
        if panels:
            averaged.append((kind, KINDS[kind], "; ".join(left), figures.by_layer(panels, "accuracy, %")))
    for corpus in view.grid.corpora:
        table = of_corpora(view.layers, [corpus])
        table = table[table["accuracy"].notna()]
        panels = {
            f"{network}, {split} split": [_line(line, "", str(at)) for at, line in own.groupby("at", sort=False)]
            for (network, split), own in table.groupby(["network", "split"], sort=False)
        }
        if (table["layer"] > 0).any():
            chart = figures.by_layer(panels, "accuracy, %", guess(view.grid.runs_on(corpus)))
            each.append((corpus, view.called(corpus), chart))
    return {"averaged": averaged, "each": each}


def table1_cells(view: View) -> Section:
    """All about every cell of table 1, a table for each corpus."""
    columns: dict[str, Callable[[Row], str]] = {
        "Network, split": lambda row: f"{row['network']},\N{NO-BREAK SPACE}{row['split']}",
        "AT": lambda row: str(METHODS.get(row["at"], row["at"])).replace(" ", "\N{NO-BREAK SPACE}"),
        "Layer": lambda row: _whole(row["layer"]),
        "Valida\N{SOFT HYPHEN}tion, %": lambda row: percent(row["validation_accuracy"]),
        "Test ± sd, %": lambda row: plus_minus(row["accuracy"], row["accuracy_sd"]),
        "Seeds": lambda row: _whole(row["seeds"]),
        "95 % interval": lambda row: interval(row["accuracy_low"], row["accuracy_high"]),
        "Gain [95 %]": lambda row: points(row["gain"], row["gain_low"], row["gain_high"]),
        "By test (layer)": lambda row: at_layer(row["test_accuracy"], row["test_layer"]),
        "Opti\N{SOFT HYPHEN}mism": lambda row: points(row["optimism"]) if row["layer"] else "–",
        "Paper (layer)": lambda row: at_layer(row["paper_accuracy"], row["paper_layer"]),
        "Minus paper": lambda row: points(row["difference"]),
    }
    tables = []
    for corpus in view.grid.corpora if view.grid else ():
        table = of_corpora(view.table1, [corpus])
        table = table[table["accuracy"].notna()]
        if len(table):
            sizes = [
                span(table[name].dropna()) if table[name].notna().any() else "an unknown number of"
                for name in ("clips", "speakers")
            ]
            tables.append((view.called(corpus), *sizes, cells(records(table), columns)))
    return {"head": list(columns), "tables": tables} if tables else None


def costs(view: View) -> Section:
    """What anti-transfer and quaternions cost in time and memory, beside what papers say."""
    if not view.grid or view.costs.empty:
        return None
    ratios = paper.ratios(view.costs)
    body = []
    for (what, device, network), pairs in ratios.groupby(["what", "device", "network"], sort=False):
        adds = what == "AT / no AT"
        for measure, title in _COSTS.items():
            if len(values := pairs[measure].dropna()):
                stated = times(paper.STATED_RATIOS[str(what), measure])
                name = f"{what}, {network} network" if adds else str(what)
                most = "at most " if adds and measure == "peak_memory" else ""
                extent = f"×{values.min():.3g} to ×{values.max():.3g}"
                body.append([name, title, str(device), most + stated, times(values.mean()), extent, count(len(values))])
    charts = []
    for device, pairs in ratios[ratios["what"] == "AT / no AT"].groupby("device", sort=False):
        panels = {
            title: [
                Line(str(network), str(network), dict(own.groupby("layer")[measure].mean()))
                for network, own in pairs[pairs[measure].notna()].groupby("network", sort=False)
            ]
            for measure, title in _COSTS.items()
        }
        if panels := {title: lines for title, lines in panels.items() if lines}:
            charts.append((device, _slug(str(device)), figures.by_layer(panels, "times no AT")))
    return {"body": body, "charts": charts, "rows": _cost_rows(view, ratios)}


def grid_limits(view: View) -> Section:
    if not (grid := view.grid):
        return None
    table = view.table1
    tried = view.layers[(view.layers["at"] != "none") & view.layers["accuracy"].notna()]
    few = table[(table["speakers"].fillna(99) < 2) & table["accuracy"].notna()]
    actor = set(table.loc[(table["split"] == "actor") & table["accuracy"].notna(), "corpus"])
    widths = [run.width for setting in grid.emotion for run in setting.group.runs]
    seeds = table["seeds"].dropna().astype(int)
    return {
        "left": grid.planned - grid.finished,
        "planned": grid.planned,
        "most": tried.groupby([*paper.CELL, "at"]).size().max() if len(tried) else 0,
        "over": table["optimism"].where(table["at"] != "none").mean(),
        "seeds": span(seeds, "seed"),
        "one": seeds.max() == 1 if len(seeds) else None,
        "few": ", ".join(dict.fromkeys(f"{view.called(row['corpus'])} {row['split']}" for row in records(few))),
        "actor": {corpus for corpus in actor if corpus in view.kinds.get("paper", ())},
        "scale": max(widths, default=1.0),
        "random": (table["split"] == "random").any(),
    }


def by_cell(view: View, cell: Callable[[Row], str], table: pd.DataFrame | None = None) -> list[list[str]]:
    """Rows of table 1: corpus, network and split, then ``cell`` of what each method gave."""
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for row in records(view.table1 if table is None else table):
        rows.setdefault(_key(row), {})[row["at"]] = cell(row)
    return [
        [view.called(corpus), f"{network}, {split}", *(of_method.get(at, "–") for at in view.methods)]
        for (corpus, network, split), of_method in rows.items()
    ]


def short_table(table: pd.DataFrame) -> list[Row]:
    """Table 1 for a terminal: accuracy in percent and the layer; finished trainings where it is empty."""
    rows: dict[tuple[str, ...], Row] = {}
    for row in records(table):
        network = "quat" if row["network"] == "quaternion" else row["network"]
        line = rows.setdefault(_key(row), {"corpus": row["corpus"], "network": network, "split": row["split"]})
        shown = percent(row["accuracy"]) == "–"
        text = f"{row['finished']} of {row['planned']}" if shown else at_layer(row["accuracy"], row["layer"])
        line[METHODS.get(row["at"], row["at"])] = text
    return list(rows.values())


def at_layer(accuracy: float, layer: Any) -> str:
    return percent(accuracy) + (f" ({int(layer)})" if _whole(layer) != "–" else "")


def _accuracy_cell(row: Row) -> str:
    if row["accuracy"] != row["accuracy"]:
        return f"{row['finished']} of {row['planned']}"
    deviation = plus_minus(row["accuracy"], row["accuracy_sd"]).partition(" ± ")
    lines = [Markup("<strong>{}</strong>{}{}").format(*deviation) + (f" ({row['layer']})" if row["layer"] else "")]
    small = Markup("<small>{}</small>")
    if row["accuracy_low"] == row["accuracy_low"]:
        lines.append(small.format(interval(row["accuracy_low"], row["accuracy_high"])))
    if row["paper_accuracy"] == row["paper_accuracy"]:
        lines.append(small.format(f"paper {at_layer(row['paper_accuracy'], row['paper_layer'])}"))
        lines.append(small.format(signed(row["difference"])))
    return Markup("<br>").join(lines)


def _cost_rows(view: View, ratios: pd.DataFrame) -> list[list[str]]:
    costs = view.costs[view.costs["stage"] == "emotion"]
    costs = costs.assign(kind=costs["at"].str.split("_").str[0])
    ratios = ratios[ratios["what"] == "AT / no AT"].assign(kind=ratios["at"].str.split("_").str[0])
    names = ["device", "network", "kind", "layer"]
    means = {key: own[list(_COSTS)].mean() for key, own in ratios.groupby(names)}
    rows = []
    for key, own in costs.groupby(names):
        device, network, kind, layer = key
        more = means.get(key, dict.fromkeys(_COSTS, NAN))
        rows.append(
            [
                str(network),
                "no AT" if kind == "none" else f"{kind} AT",
                _whole(layer),
                str(device),
                digits(own["epoch_seconds"].mean()),
                digits(more["epoch_seconds"]),
                memory(own["peak_memory"].max()),
                digits(more["peak_memory"]),
                count(own["epochs"].mean()),
                count(own["seeds"].sum()),
            ]
        )
    return rows


def _line(table: pd.DataFrame, split: str, at: str) -> Line:
    """The accuracies of one method, in percent; without anti-transfer the level."""
    label = f"{METHODS.get(at, at)}{f', {split}' if split else ''}"
    hollow = split == "actor"
    if at == "none":
        return Line(label, at, 100 * table["accuracy"].iloc[0], hollow)
    chosen = table.loc[table["chosen"], "layer"] if "chosen" in table else ()
    values = {int(layer): 100 * value for layer, value in zip(table["layer"], table["accuracy"], strict=True)}
    return Line(label, at, values, hollow, int(next(iter(chosen))) if len(chosen) else None)


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["corpus"], row["network"], row["split"]


def _whole(value: Any) -> str:
    """A number that may be absent; layer 0 is none."""
    import pandas as pd

    return "–" if pd.isna(value) or value == 0 else str(int(value))


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
