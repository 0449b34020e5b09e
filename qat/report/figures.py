"""The reports' figures."""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from qat.results.runs import Group, Run, number
from qat.results.statistics import mean_and_sd

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

PANELS = 15
"""Settings in one figure at most, so that the report of a whole grid is a file that opens at once."""

_POINTS = 200  # of a curve: more than its panel can show
_GREY, _DARK, _BLUE, _RED = "#8a8f98", "#5b616b", "#1f5f99", "#b0413e"
_DASHED: tuple[int, tuple[int, int]] = (0, (4, 3))
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qat",  # the same figure has the same bytes
    "text.parse_math": False,  # names may hold dollar signs
    "font.sans-serif": ["DejaVu Sans"],  # every text of an SVG names the whole list
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelcolor": "#444444",
    "axes.edgecolor": "#9aa0a8",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8eaed",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.3,
}
Curve = tuple[list[int], list[float]]


class Drawing(NamedTuple):
    """A figure as an SVG document, for pages and print, and as PNG, for slides."""

    svg: str
    png: bytes


@dataclass(frozen=True)
class Measure:
    """A panel of `dots`: its title, where the figure is found, and what guessing gives."""

    title: str
    of: Callable[[Run], float | None]
    chance: float | None = None


def dots(groups: Sequence[Group], table: pd.DataFrame, measures: Sequence[Measure]) -> Drawing:
    """One row a setting, one panel a measure: every seed, their mean, and in the first panel the interval.

    Args:
        table: rows of `summary_table` by name.
    """
    low, high = (table[f"accuracy_{end}"].to_dict() for end in ("low", "high"))
    with _style():
        figure = _figure(10, 0.9 + 0.34 * len(groups))
        ratios = [1.5, *[1.0] * (len(measures) - 1)]
        axes = figure.subplots(1, len(measures), sharey=True, squeeze=False, width_ratios=ratios)[0]
        for axis, measure in zip(axes, measures, strict=True):
            axis.set_title(measure.title)
            axis.set_xlabel("%")
            axis.grid(axis="y", visible=False)
            if measure.chance is not None:
                axis.axvline(100 * measure.chance, color=_RED, linewidth=1, linestyle=_DASHED)
            for y, group in enumerate(groups):
                if y and group.first.start != groups[y - 1].first.start:
                    axis.axhline(y - 0.5, color="#9aa0a8", linewidth=0.8)
                values = [100 * value for value in group.values(measure.of)]
                if not values:
                    continue
                colour = _BLUE if group.first.transfers else _DARK
                if axis is axes[0]:
                    ends = [100 * value for value in (low[group.name], high[group.name])]
                    axis.plot(ends, [y, y], color=colour, linewidth=2.4, alpha=0.4, solid_capstyle="butt")
                face = "white" if group.first.random_twin else colour
                axis.plot(mean_and_sd(values)[0], y, "o", markersize=7, markeredgecolor=colour, markerfacecolor=face)
                if len(values) > 1:
                    axis.plot(values, [y] * len(values), "|", color=colour, markersize=9, markeredgewidth=1)
            axis.margins(x=0.12)
        axes[0].set_yticks(range(len(groups)), [_short(group.name, 40) for group in groups])
        axes[0].set_ylim(len(groups) - 0.5, -0.5)
        return _drawing(figure)


def differences(groups: Sequence[Group], table: pd.DataFrame, measures: Mapping[str, str]) -> Drawing:
    """One row a setting, one panel a measure: the mean difference over seeds and its interval.

    Args:
        groups: settings with a baseline.
        table: `seed_differences`.
        measures: title of each panel by the measure's name.
    """
    places = {group.name: y for y, group in enumerate(groups)}
    with _style():
        figure = _figure(10, 0.9 + 0.36 * len(groups))
        axes = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
        for axis, (measure, title) in zip(axes, measures.items(), strict=True):
            axis.set_title(title)
            axis.set_xlabel("points")
            axis.grid(axis="y", visible=False)
            axis.axvline(0, color=_DARK, linewidth=0.8)
            shown = table[(table["measure"] == measure) & table["name"].isin(places)]
            for against, colour, shift, face in (("baseline", _BLUE, -0.13, _BLUE), ("control", _RED, 0.17, "white")):
                for row in shown[shown["against"] == against].to_dict("records"):
                    y, ends = places[row["name"]] + shift, [100 * row["low"], 100 * row["high"]]
                    axis.plot(ends, [y, y], color=colour, linewidth=2, alpha=0.45)
                    axis.plot(100 * row["mean"], y, "o", markersize=5, markeredgecolor=colour, markerfacecolor=face)
            axis.margins(x=0.08)
        for y in range(1, len(groups)):
            if groups[y].first.start != groups[y - 1].first.start:
                for axis in axes:
                    axis.axhline(y - 0.5, color="#9aa0a8", linewidth=0.8)
        axes[0].set_yticks(range(len(groups)), [_short(group.name, 44) for group in groups])
        axes[0].set_ylim(len(groups) - 0.5, -0.5)
        return _drawing(figure)


@dataclass(frozen=True)
class Line:
    """A line of `by_layer`.

    Args:
        label: in the legend; lines of one label look alike.
        look: its colour: that of an anti-transfer method, a network or ``mean``.
        values: by layer, or one level, dashed.
        hollow: dotted with hollow squares, to tell two lines of one colour apart.
        chosen: the layer that gets a ring.
    """

    label: str
    look: str
    values: Mapping[int, float] | float
    hollow: bool = False
    chosen: int | None = None

    @property
    def layers(self) -> list[int]:
        return list(self.values) if isinstance(self.values, Mapping) else []


_AMBER, _GREEN = "#c77d0a", "#3b7d4f"
_LOOKS = {"single_S": _BLUE, "single_W": _AMBER, "dual_SW": _RED, "dual_WS": _GREEN, "mean": "#1d2129"} | {
    "quaternion": _BLUE,
    "real": _AMBER,
}


def by_layer(panels: Mapping[str, Sequence[Line]], ylabel: str, guess: float | None = None) -> Drawing:
    """Lines over the layer of anti-transfer, one panel a title, two in a row, with the same axes.

    Args:
        panels: lines by title.
        ylabel: of the values.
        guess: what guessing gives, dotted in red.
    """
    ticks = {layer for lines in panels.values() for line in lines for layer in line.layers}
    rows, columns = math.ceil(len(panels) / 2), min(2, len(panels))
    with _style():
        figure = _figure(5 * columns, 0.6 + 2.7 * rows)
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
        legend: dict[str, Any] = {}
        for place, (axis, (title, lines)) in enumerate(zip(axes, panels.items(), strict=False)):
            axis.set_title(title)
            if guess is not None:
                legend["guessing"] = axis.axhline(guess, color=_RED, linewidth=1, linestyle=":")
            for line in lines:
                legend.setdefault(line.label, _draw_line(axis, line))
            axis.set_xticks(sorted(ticks))
            axis.set_xlim(min(ticks) - 0.5, max(ticks) + 0.5)
            axis.tick_params(labelbottom=True)
            axis.set_ylabel(ylabel if place % 2 == 0 else "")
            axis.set_xlabel("layer")
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        _legend(figure, legend)
        return _drawing(figure)


def _draw_line(axis: Axes, line: Line) -> Any:
    colour = _LOOKS.get(line.look, _GREY)
    if not isinstance(line.values, Mapping):
        return axis.axhline(line.values, color=colour, linewidth=1.2, linestyle="-." if line.hollow else _DASHED)
    (handle,) = axis.plot(
        line.layers,
        list(line.values.values()),
        color=colour,
        linewidth=2.4 if line.look == "mean" else 1.3,
        linestyle=":" if line.hollow else "-",
        marker="s" if line.hollow else "o",
        markersize=3.5,
        markerfacecolor="white" if line.hollow else colour,
    )
    if line.chosen in line.values:
        assert line.chosen is not None
        ring = line.chosen, line.values[line.chosen]
        axis.plot(*ring, "o", markersize=9, markerfacecolor="none", markeredgecolor=colour)
    return handle


def losses(groups: Sequence[Group], share: bool) -> Drawing:
    """Training and validation loss by epoch; dotted is cross-entropy alone, where anti-transfer adds to it."""

    def draw(axis: Axes, group: Group) -> None:
        for run in group.runs:
            for part, colour in (("train", _GREY), ("validation", _BLUE)):
                total, entropy = _curve(run, f"{part}_total"), _curve(run, f"{part}_cross_entropy")
                if total:
                    axis.plot(*total, color=colour, alpha=0.8)
                if entropy and entropy != total:
                    axis.plot(*entropy, color=colour, alpha=0.8, linestyle=":")
            _mark_kept(axis, run, "validation_total", 1)
        constant = group.mean(lambda run: run.score("validation", "constant"))
        if constant is not None:
            axis.axhline(constant, color=_RED, linewidth=1, linestyle=_DASHED)

    transfers = any(group.first.transfers for group in groups)
    legend: list[tuple[str, str, Literal["-", ":"]]] = []
    for part, colour in (("train", _GREY), ("validation", _BLUE)):
        legend.append((f"{part}, total", colour, "-"))
        if transfers:
            legend.append((f"{part}, cross-entropy", colour, ":"))
    return _grid(groups, draw, "epoch", "loss", legend=legend, share=share)


def accuracies(groups: Sequence[Group]) -> Drawing:
    """Validation accuracy by epoch."""

    def draw(axis: Axes, group: Group) -> None:
        for run in group.runs:
            if curve := _curve(run, "validation_accuracy"):
                axis.plot(curve[0], [100 * value for value in curve[1]], color=_BLUE, alpha=0.6)
            _mark_kept(axis, run, "validation_accuracy", 100)

    return _grid(groups, draw, "epoch", "accuracy, %", share=True)


def similarities(groups: Sequence[Group]) -> Drawing:
    """Squared Gram cosine to the twin by epoch."""

    def draw(axis: Axes, group: Group) -> None:
        for run in group.runs:
            for style, (layer, curve) in zip(("-", "--", ":", "-.") * 4, similarity(run).items(), strict=False):
                axis.plot(*curve, color=_BLUE, alpha=0.7, linestyle=style)
                if run is group.first and len(run.layers) > 1:
                    axis.annotate(f"layer {layer}", (curve[0][-1], curve[1][-1]), fontsize=7, ha="right", va="bottom")
        first = group.first
        note = f"from {first.start}, layer {'+'.join(map(str, first.layers))}, beta {first.beta}"
        axis.text(
            0.97, 0.95, _short(note, 40), transform=axis.transAxes, fontsize=7.5, color=_DARK, ha="right", va="top"
        )

    return _grid(groups, draw, "epoch", "cos²", share=True, log=True)


def confusions(groups: Sequence[Group]) -> Drawing:
    """Confusion matrices as heat maps of row shares, with counts summed over the seeds."""

    def draw(axis: Axes, group: Group) -> None:
        counts = confusion(group)
        assert counts is not None
        classes = len(counts)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axis.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=1.5)
        for row, column in np.ndindex(counts.shape) if classes <= 12 else ():
            axis.text(
                column + 0.5,
                row + 0.5,
                f"{counts[row, column]:.0f}\n{100 * shares[row, column]:.0f} %",
                ha="center",
                va="center",
                fontsize=7.5 if classes <= 6 else 5.5,
                color="white" if shares[row, column] > 0.55 else "#222222",
            )
        ticks, labels = np.arange(classes) + 0.5, [_short(name, 12) for name in group.first.classes]
        axis.set_xticks(ticks, labels, rotation=0 if classes <= 5 else 90)
        axis.set_yticks(ticks, labels)
        axis.set_ylim(classes, 0)
        axis.grid(visible=False)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)

    return _grid(groups, draw, "predicted", "true", aspect=0.85)


def confusion(group: Group) -> NDArray[np.float64] | None:
    """Test counts `[K, K]` summed over the seeds, rows true; nothing unless every seed has them."""
    total = np.zeros((len(group.first.classes),) * 2)
    for run in group.runs:
        parts = run.result.get("parts")
        scores = parts.get("test") if isinstance(parts, dict) else None
        try:
            counts = np.asarray(scores.get("confusion") if isinstance(scores, dict) else None, dtype=float)
        except (TypeError, ValueError):
            return None
        if counts.shape != total.shape or not total.size:
            return None
        total += counts
    return total


def similarity(run: Run) -> dict[int, Curve]:
    """Logged cos^2 by layer: of the validation part, else of the training part."""
    curves = {
        layer: _curve(run, f"validation_similarity_{layer}") or _curve(run, f"train_similarity_{layer}")
        for layer in run.layers
    }
    return {layer: curve for layer, curve in curves.items() if curve}


def _style() -> Any:
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _drawing(figure: Figure) -> Drawing:
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    figure.set_layout_engine(None)  # places are found already, and finding them takes as long as drawing
    figure.savefig(png, format="png", dpi=144, metadata={"Software": None})
    return Drawing(svg.getvalue(), png.getvalue())


def embed(svg: str, number: int, label: str) -> str:
    """The figure without the XML around it, which a page has no need of, with ids of its own among several in one page,
    and a text for those who cannot see it."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1f{number}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


def _grid(
    groups: Sequence[Group],
    draw: Callable[[Axes, Group], None],
    xlabel: str,
    ylabel: str,
    *,
    legend: Sequence[tuple[str, str, Literal["-", ":"]]] = (),
    share: bool = False,
    log: bool = False,
    aspect: float = 0.6,
) -> Drawing:
    """Small multiples: one panel a setting, under its name."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    groups = groups[:PANELS]
    columns = 2 if len(groups) in (2, 4) else min(3, len(groups))
    rows = math.ceil(len(groups) / columns)
    width = {1: 4.5, 2: 7.5, 3: 10.0}[columns]
    with _style():
        figure = _figure(width, rows * aspect * width / columns + 0.3 * bool(legend))
        axes = figure.subplots(rows, columns, sharex=share, sharey=share, squeeze=False).flatten()
        for place, (axis, group) in enumerate(zip(axes, groups, strict=False)):
            if log:
                axis.set_yscale("log")
                axis.yaxis.set_major_formatter("{x:g}")
            axis.set_title("\n".join(textwrap.wrap(_short(group.name, 80), 40)))
            draw(axis, group)
            if xlabel == "epoch":
                axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.tick_params(labelbottom=True)
            axis.set_ylabel(ylabel if place % columns == 0 else "")
            axis.set_xlabel(xlabel if place + columns >= len(groups) else "")
        for axis in axes[len(groups) :]:
            axis.set_visible(False)
        if legend:
            _legend(figure, {label: Line2D([], [], color=colour, linestyle=style) for label, colour, style in legend})
        return _drawing(figure)


def _legend(figure: Figure, handles: Mapping[str, Any]) -> None:
    """Above all panels, in as many columns as fit the figure's width."""
    points = 40 + 4.6 * max(map(len, handles))  # of a column, in letters of 8 points
    columns = max(1, min(len(handles), int(72 * figure.get_figwidth() / points)))
    figure.set_figheight(figure.get_figheight() + 0.18 * (math.ceil(len(handles) / columns) - 1))
    figure.legend(
        handles=list(handles.values()),
        labels=list(handles),
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        fontsize=8,
    )


def _curve(run: Run, name: str) -> Curve | None:
    """Epochs, from 1, and a logged value at them, thinned to what a panel can show."""
    if run.metrics is None or name not in run.metrics:
        return None
    logged = [(epoch, number(value)) for epoch, value in enumerate(run.metrics[name].tolist(), 1)]
    points = [(epoch, value) for epoch, value in logged if value is not None]
    points = points[:: math.ceil(len(points) / _POINTS) or 1]
    return ([epoch for epoch, _ in points], [value for _, value in points]) if points else None


def _mark_kept(axis: Axes, run: Run, name: str, scale: float) -> None:
    """A dot at the epoch whose weights were kept."""
    epoch = number(run.result.get("kept_epoch"))
    if epoch is not None and run.metrics is not None and name in run.metrics and 0 <= epoch < len(run.metrics):
        axis.plot(epoch + 1, scale * run.metrics[name].iloc[int(epoch)], "o", color=_BLUE, markersize=4)


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
