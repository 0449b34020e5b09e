"""The sections that only a grid has: table 1, figure 2 and resources, ours beside the paper's."""

from __future__ import annotations

from typing import Any

import pandas as pd
from markupsafe import Markup

from qat.config.preset import METHODS
from qat.report import figures, sections
from qat.report.figures import Dot, DotPanel, Line
from qat.report.page import at_layer, count, interval, percent, plus_minus, records, signed, span, times
from qat.report.sections import Row, Section
from qat.report.view import KINDS, GridView, guess
from qat.results import paper
from qat.results.paper import CELL, of_corpora

_COSTS = {"epoch_seconds": "time per epoch", "peak_memory": "peak memory"}


def verdict(view: GridView) -> Section:
    judged = view.table1[view.table1["gain"].notna()]
    keys = list(judged[CELL].drop_duplicates().itertuples(index=False, name=None))
    panels = []
    for at, title in view.methods.items():
        dots = []
        for row in records(judged[judged["at"] == at]):
            y, low, high = keys.index(tuple(row[name] for name in CELL)), 100 * row["gain_low"], 100 * row["gain_high"]
            dots.append(Dot(y, 100 * row["gain"], low, high, shift=-0.1))
            if pd.notna(row["paper_gain"]):
                dots.append(Dot(y, 100 * row["paper_gain"], colour=figures.RED, hollow=True, shift=0.15))
        panels += [DotPanel(title, "points", dots, 0)] if dots else []
    rows = [f"{view.called(corpus)}, {network}, {split}" for corpus, network, split in keys]
    # Only the kind that is closest to the paper's corpora.
    kind = next((kind for kind in KINDS if (judged["kind"] == kind).any()), "")
    judged = judged[judged["kind"] == kind]
    beside = judged[judged["paper_gain"].notna()]
    return _counts(judged) | {
        "corpora": view.listing(dict.fromkeys(judged["corpus"])),
        "gain": judged["gain"].mean(),
        "paper": beside["paper_gain"].mean(),
        "beside": beside["gain"].mean(),
        "chart": figures.dots(rows, panels) if panels else None,
    }


def real(view: GridView) -> Section:
    """Which results are from recorded speech, and how many trainings are finished."""
    pretrained = [setting for setting in view.grid.settings if setting.stage != "emotion"]
    demo = {s.stage for s in pretrained if any(run.experiment.corpus.name == "demo" for run in s.group.runs)}
    return {
        "preset": view.folder.requested.get("preset"),
        "seeds": sorted({run.seed for run in view.runs if run.seed is not None}),
        "demo": ", ".join(sorted(demo)) if set(view.kinds) != {"synthesised"} else "",
    }


def table1(view: GridView) -> Section:
    findings = []
    for kind, corpora in view.kinds.items():
        own = of_corpora(view.table1, corpora)
        beside = own["difference"].dropna()
        counts = _counts(own) | {"beside": len(beside), "mean": beside.mean(), "far": beside.abs().max()}
        findings += [(KINDS[kind].capitalize(), counts)] if counts["judged"] else []
    sizes = []
    for network, own in view.table1[view.table1["parameters"].notna()].groupby("network", sort=False):
        theirs = own["paper_parameters"].dropna()
        stated = f", the paper's {theirs.iloc[0]:.1e}".replace(".0e", "e").replace("e+0", "e") if len(theirs) else ""
        sizes.append(f"{network} {span(own['parameters'])}{stated}")
    recalls = view.table1["uar"].notna().any()
    return view.cell_table(_accuracy) | {
        "findings": findings,
        "sizes": "; ".join(sizes),
        "seeds": span(view.table1["seeds"].dropna().astype(int), "seed"),
        "recalls": recalls and view.cell_table(lambda row: f"{percent(row['accuracy'])} / {percent(row['uar'])}"),
    }


def missing(view: GridView) -> Section:
    """Finished trainings of each cell; those that failed, with their errors, or are not finished."""
    values = sections.missing(view)
    return values and values | view.cell_table(lambda row: f"{row['finished']} of {row['planned']}")


def gains(view: GridView) -> Section:
    tables = []
    for kind, corpora in view.kinds.items():
        means = paper.gains(of_corpora(view.table1, corpora)).query("cells > 0")
        same = means["paper_same"].where(means["cells"] != means["paper_cells"])
        rows = records(means.assign(what=means["what"].map(view.called), paper_same=same))
        tables += [(kind, KINDS[kind].capitalize(), view.listing(corpora), rows)] if rows else []
    return {"tables": tables} if tables else None


def layers(view: GridView) -> Section:
    """Figure 2 of the paper, and accuracy by layer for each corpus."""
    averaged, each = [], []
    for kind, corpora in view.kinds.items():
        own = of_corpora(view.layers, corpora)
        table = paper.figure2(own)
        panels, left = {}, []
        for network, lines in table.groupby("network", sort=False):
            there = lines["corpora"].iloc[0].split("+")
            panels[f"{network}: {view.listing(there)}"] = _lines(lines, ["split", "at"])
            if lacking := [corpus for corpus in corpora if corpus not in there]:
                left.append(f"{network} without {view.listing(lacking)}")
        left += [f"none yet for {name}" for name in dict.fromkeys(own["network"]) if name not in set(table["network"])]
        if panels:
            averaged.append((kind, KINDS[kind], "; ".join(left), figures.by_layer(panels, "accuracy, %")))
    for corpus in view.grid.corpora:
        table = of_corpora(view.layers, [corpus])
        table = table[table["accuracy"].notna()]
        if (table["layer"] > 0).any():
            panels = {
                f"{network}, {split} split": _lines(own, ["at"])
                for (network, split), own in table.groupby(["network", "split"], sort=False)
            }
            chart = figures.by_layer(panels, "accuracy, %", guess(view.grid.runs_on(corpus)))
            each.append((corpus, view.called(corpus), chart))
    return {"averaged": averaged, "each": each}


def cells_of_table1(view: GridView) -> Section:
    """Every value of each cell of table 1, one table per corpus."""
    space, tables = "\N{NO-BREAK SPACE}", []
    for corpus, table in view.table1[view.table1["accuracy"].notna()].groupby("corpus", sort=False):
        counts = [table[name].dropna() for name in ("clips", "speakers")]
        sizes = [span(values) if len(values) else "an unknown number of" for values in counts]
        table = table.assign(
            place=table["network"] + "," + space + table["split"],
            method=table["at"].map(METHODS).str.replace(" ", space),
            optimism=table["optimism"].where(table["layer"] > 0),
        )
        tables.append((view.called(str(corpus)), *sizes, records(table)))
    return {"tables": tables} if tables else None


def costs(view: GridView) -> Section:
    """Cost of anti-transfer and quaternions in time and memory, beside published figures."""
    if view.costs.empty:
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
    ratios = ratios[ratios["what"] == "AT / no AT"]
    charts = []
    for device, pairs in ratios.groupby("device", sort=False):
        panels = {
            title: [
                Line(str(network), str(network), dict(own.groupby("layer")[measure].mean()))
                for network, own in pairs[pairs[measure].notna()].groupby("network", sort=False)
            ]
            for measure, title in _COSTS.items()
        }
        if panels := {title: lines for title, lines in panels.items() if lines}:
            slug = "-".join("".join(c if c.isalnum() else " " for c in str(device).lower()).split())
            charts.append((device, slug, figures.by_layer(panels, "times no AT")))
    return {"body": body, "charts": charts, "rows": _cost_rows(view, ratios)}


def limits(view: GridView) -> Section:
    table = view.table1[view.table1["accuracy"].notna()]
    tried = view.layers[(view.layers["at"] != "none") & view.layers["accuracy"].notna()]
    few = table[table["speakers"].fillna(99) < 2]
    actor = set(table.loc[table["split"] == "actor", "corpus"])
    seeds = table["seeds"].astype(int)
    return {
        "most": tried.groupby([*CELL, "at"]).size().max() if len(tried) else 0,
        "over": table["optimism"].where(table["at"] != "none").mean(),
        "seeds": span(seeds, "seed"),
        "one": seeds.max() == 1 if len(seeds) else None,
        "few": ", ".join(dict.fromkeys(f"{view.called(row['corpus'])} {row['split']}" for row in records(few))),
        "actor": actor & set(view.kinds.get("paper", ())),
        "scale": max((run.width for setting in view.grid.emotion for run in setting.group.runs), default=1.0),
        "random": (view.table1["split"] == "random").any(),
    }


def _counts(table: pd.DataFrame) -> dict[str, int]:
    """Numbers of cells: with a gain, above and below the baseline, with an interval, with one that excludes 0."""
    gain, sure = table["gain"].dropna(), table[table["gain_low"].notna()]
    clear = (sure["gain_low"] > 0) | (sure["gain_high"] < 0)
    counts = {"judged": len(gain), "above": (gain > 0).sum(), "below": (gain < 0).sum(), "sure": len(sure)}
    return {name: int(value) for name, value in (counts | {"without_zero": clear.sum()}).items()}


def _accuracy(row: Row) -> str:
    deviation = plus_minus(row["accuracy"], row["accuracy_sd"]).partition(" ± ")
    lines = [Markup("<strong>{}</strong>{}{}").format(*deviation) + (f" ({row['layer']})" if row["layer"] else "")]
    small = Markup("<small>{}</small>")
    if pd.notna(row["accuracy_low"]):
        lines.append(small.format(interval(row["accuracy_low"], row["accuracy_high"])))
    if pd.notna(row["paper_accuracy"]):
        lines.append(small.format(f"paper {at_layer(row['paper_accuracy'], row['paper_layer'])}"))
        lines.append(small.format(signed(row["difference"])))
    return Markup("<br>").join(lines)


def _cost_rows(view: GridView, ratios: pd.DataFrame) -> list[Row]:
    """Means by device, network, kind of anti-transfer and layer."""
    names = ["device", "network", "kind", "layer"]
    table = view.costs[view.costs["stage"] == "emotion"]
    kinds = {"none": "no AT"} | {at: f"{at.split('_')[0]} AT" for at in METHODS if at != "none"}
    own, more = (part.assign(kind=part["at"].map(kinds)).groupby(names) for part in (table, ratios))
    means = own[["epoch_seconds", "epochs"]].mean()
    means = means.assign(peak_memory=own["peak_memory"].max(), seeds=own["seeds"].sum())
    return records(means.join(more[list(_COSTS)].mean().add_suffix("_ratio")).reset_index())


def _lines(table: pd.DataFrame, names: list[str]) -> list[Line]:
    """Lines of accuracies in percent, one per method and, if ``names`` has it, per split."""
    lines = []
    for key, own in table.groupby(names, sort=False):
        split, at = ("", *map(str, key))[-2:]
        label = f"{METHODS.get(at, at)}{f', {split}' if split else ''}"
        values: Any = dict(zip(own["layer"], 100 * own["accuracy"], strict=True))
        chosen = own.loc[own["chosen"], "layer"] if "chosen" in own else ()
        ring = next(iter(chosen), None) if at != "none" else None
        lines.append(Line(label, at, values[0] if at == "none" else values, split == "actor", ring))
    return lines
