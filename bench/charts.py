"""Charts of folders of results as SVG, in the style of qat's reports; matplotlib is imported when they are drawn."""

import itertools
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from bench import summary, words
from bench.results import Row
from bench.summary import CONDITION, ORDERS, PARTS, Folder, combinations, grouped, median, place, standings
from bench.words import MISSING, conditions, joined, number
from qat.report.figures import AMBER, BLUE, COLOURS, GREY, INK, PAPER, SKY, add_legend, new_figure, style, svg_of

LABEL = {"facecolor": PAPER, "alpha": 0.8, "pad": 0.5, "linewidth": 0}  # covers the lines behind a label
PART_COLOURS = dict(zip(PARTS, (GREY, SKY, BLUE, AMBER), strict=True))


class Bar(NamedTuple):
    """A bar of a chart: series, tick, value (None: failed), and the text at its end."""

    series: str
    tick: int
    end: float | None
    text: str


def charts(folders: Sequence[Folder]) -> dict[tuple[str, str], str]:
    """SVG by section and file name, for each chart whose rows exist; equal results give equal bytes."""
    drawers = (
        ("layers", "layers", speeds),
        ("layers", "roofline", roofline),
        ("anti-transfer", "memory", memory),
        ("step", "step", steps),
    )
    drawn = {}
    with style():
        for folder, (section, name, draw) in itertools.product(folders, drawers):
            if figure := draw(folder):
                file = "-".join(filter(None, (name, folder.path.parent.name)))
                drawn[section, f"{file}.svg"] = svg_of(figure)
    return drawn


def speeds(folder: Folder) -> Any:
    """Speed of every provider by layer; of several variants, such as memory formats, the fastest."""
    rows = folder.headline("layers")
    lines = {line.layer: line for line in standings(rows) if line.best}
    if not lines:
        return None
    ours = {row.case_key: median(row) for row in rows if row.provider in summary.OURS}

    def speed(row: Row, line: summary.Standing) -> float | None:
        """Speed relative to the best baseline, computed through ours of the same case, to agree with the table."""
        relative = summary.ratio(ours.get(row.case_key), median(row))
        if relative is None or line.speedup is None:
            return summary.ratio(median(line.best), median(row))
        return relative * line.speedup

    bars = []
    for (family, layer), variants in grouped(rows, lambda row: (_family(row), summary.label(row))):
        if layer in lines:
            speeds = [speed(row, lines[layer]) for row in variants]
            best = max(filter(None, speeds), default=None)
            text = variants[0].status if best is None else number(best) if family in summary.OURS else ""
            bars.append(Bar(family, list(lines).index(layer), best, text))
    figure, (axis,) = _figure(folder, [conditions(rows[0], *ORDERS)], "speed, 1 = the best baseline")
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}x")
    axis.axhline(1, color=INK, linewidth=1)
    _bars(axis, bars, list(dict.fromkeys(map(_family, rows))), list(lines), 1.0)
    return _with_legend(figure)


def roofline(folder: Folder) -> Any:
    """Rates of ours (full) and of the best baseline (hollow) by batch size, under the measured roof."""
    first = next(iter(folder.headline("layers")), None)
    if first is None:
        return None
    same = attrgetter(*(field for field in ORDERS if field != "batch"))
    batches = combinations((row for row in folder.rows("layers") if same(row) == same(first)), ("batch",))
    figure, (axis,) = _figure(folder, [conditions(first, "network", "work", "precision", "mode")], "TFLOP/s")
    reach = []
    for ((batch,), rows), colour in zip(batches, itertools.cycle(COLOURS), strict=False):
        for who, face in (("ours", colour), ("best", PAPER)):
            points = [(line.layer, row) for line in standings(rows) if median(row := getattr(line, who))]
            x = [row.flops / row.bytes for _, row in points]
            y = [1e-6 * row.flops / row.median_us for _, row in points]
            name = f"{'best baseline' if who == 'best' else who}, batch {batch}"
            axis.plot(x, y, "o", color=colour, markerfacecolor=face, label=name)
            for (layer, _), *point in zip(points, x, y, strict=True) if who == "ours" else ():
                axis.annotate(layer, point, (4, 2), textcoords="offset points", fontsize=6.5, bbox=LABEL)
            reach += x
    rates = [folder.results.provenance.get(name) for name in ("roof_bandwidth", f"roof_{first.precision}")]
    if all(rates) and reach:
        bandwidth, flops = (1e-12 * float(rate or 0) for rate in rates)
        x = sorted({*reach, flops / bandwidth})
        axis.plot(x, [min(flops, bandwidth * intensity) for intensity in x], color=INK, zorder=1, label="measured roof")
    axis.set(xscale="log", yscale="log", xlabel="FLOP per byte of the definition")
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter("{x:g}")
        scale.set_minor_formatter("")
    return _with_legend(figure) if reach else None


def memory(folder: Folder) -> Any:
    """Memory of the loss, one panel for each of the first two variants."""
    rows = folder.headline("anti-transfer")
    sizes = {row.key: folder.memory(row) for row in rows}
    base = min((size for size in sizes.values() if size), default=0) / 2
    if not base:
        return None
    panels = sorted(grouped(rows, attrgetter("variant")), key=lambda panel: place(panel[0], summary.SEMANTICS))[:2]
    figure, axes = _figure(folder, [joined(variant, conditions(rows[0], *ORDERS)) for variant, _ in panels], "memory")
    names = list(dict.fromkeys(row.provider for _, panel in panels for row in panel))
    for axis, (_, panel) in zip(axes, panels, strict=True):
        ticks = sorted({row.layer for row in panel}, key=place)
        shown = [(row, sizes[row.key]) for row in panel if sizes[row.key] is not None or row.status != "ok"]
        bars = [Bar(row.provider, ticks.index(row.layer), size, words.size(size) or row.status) for row, size in shown]
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: words.size(value))
        _bars(axis, bars, names, ticks, base)
    return _with_legend(figure)


def steps(folder: Folder) -> Any:
    """The parts of a training step, one panel for each network."""
    rows = [row for row in folder.rows("step") if row.provider in ("ours", summary.RESEARCH)]
    rows = next((group for _, group in combinations(rows, CONDITION)), [])
    bar = attrgetter("network", "layer", "variant", "provider")
    split = {key: summary.parts(works) for key, works in grouped(rows, bar)}
    if not any(split.values()):
        return None
    panels = sorted(grouped(rows, attrgetter("network")), key=lambda panel: place(panel[0], ORDERS["network"]))
    figure, axes = _figure(
        folder, [f"{network}, {conditions(rows[0], *CONDITION)}" for network, _ in panels], "ms of a step"
    )
    for axis, (_, panel) in zip(axes, panels, strict=True):
        bars = sorted(grouped(panel, bar), key=lambda group: (place(group[0][1]), group[0][2:]))
        for n, (key, works) in enumerate(bars):
            times = [1e-3 * time for time in split[key] or ()]
            for part, time, below in zip(PARTS, times, itertools.accumulate(times, initial=0.0), strict=False):
                axis.bar(n, time, 0.8, below, color=PART_COLOURS[part])
            failed = joined(*dict.fromkeys(row.status for row in works if row.status != "ok")) or MISSING
            text = words.microseconds(1e3 * sum(times)) if times else failed
            axis.text(n, sum(times), text, ha="center", va="bottom")
        axis.set_xticks(range(len(bars)), [joined(*key[1:]) for key, _ in bars], rotation=20, ha="right")
        axis.set_xlim(-0.6, len(bars) - 0.4)  # also if the last bar has no height
        axis.grid(axis="x", visible=False)
        axis.margins(y=0.15)
    for part, colour in PART_COLOURS.items():
        axes[0].bar(0, 0, color=colour, label=part)
    return _with_legend(figure)


def _family(row: Row) -> str:
    return row.provider if row.provider.startswith("ours") else row.provider.split(",")[0]


def _figure(folder: Folder, titles: Sequence[str], ylabel: str) -> tuple[Any, Any]:
    """A figure with device, commit and date, and panels below one another."""
    figure = new_figure(10, 0.6 + 3.6 * len(titles))
    figure.suptitle(f"{folder.device}; {folder.results.source}", fontsize=9, x=0.01, ha="left")
    axes = figure.subplots(len(titles), squeeze=False)[:, 0]
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, ylabel=ylabel)
    return figure, axes


def _with_legend(figure: Any) -> Any:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    add_legend(figure, dict(zip(labels, handles, strict=True)), "lower")
    return figure


def _bars(axis: Any, bars: Sequence[Bar], names: Sequence[str], ticks: Sequence[str], base: float) -> None:
    """Grouped bars of the named series, from `base` up or down, each with its text at the end."""
    width = 0.8 / len(names)
    for n, (name, colour) in enumerate(zip(names, itertools.cycle(COLOURS), strict=False)):
        series = [(bar.tick + (n - (len(names) - 1) / 2) * width, bar) for bar in bars if bar.series == name]
        ends = [base if bar.end is None else max(bar.end, 1e-3 * base) for _, bar in series]
        axis.bar([x for x, _ in series], [end - base for end in ends], width, base, color=colour, label=name)
        for (x, bar), end in zip(series, ends, strict=True):
            side = "bottom" if end >= base else "top"
            axis.text(x, end, f" {bar.text} ", rotation=90, fontsize=7, ha="center", va=side)
    axis.set_xticks(range(len(ticks)), ticks)
    axis.grid(axis="x", visible=False)
    axis.margins(y=0.2)
