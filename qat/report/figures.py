"""The figures of reports, and the drawing style that benchmarks share."""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np

from qat.results.runs import FinishedRun, Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

PANELS = 15
"""Maximum number of settings in one figure, so that the report of a whole grid opens quickly."""

_POINTS = 200  # maximum number of points in a curve; a panel cannot show more
INK, SOFT, EDGE, RULE, PAPER = "#1d2129", "#5b616b", "#9aa0a8", "#e8eaed", "#ffffff"
# The palette of Okabe and Ito, which colour-blind readers can distinguish.
BLUE, RED, GREY, GREEN, PURPLE, AMBER, SKY = COLOURS = (
    "#0072b2",
    "#d55e00",
    "#8a8f98",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)
_VARIABLES = {INK: "ink", SOFT: "soft", EDGE: "edge", RULE: "rule", PAPER: "paper", BLUE: "blue", RED: "red"}
"""Names of the CSS variables for colours that change in a page's dark mode."""

_LEGENDS: Any = {"upper": "outside upper left", "lower": "outside lower left"}
DASHED: tuple[int, tuple[int, int]] = (0, (4, 3))
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qat",  # equal figures have equal bytes
    "text.parse_math": False,  # names may hold dollar signs
    "font.sans-serif": ["DejaVu Sans"],  # every text in an SVG repeats the whole list
    "font.size": 9,
    "text.color": INK,
    "figure.facecolor": PAPER,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelcolor": SOFT,
    "axes.edgecolor": EDGE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.3,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
Curve = tuple[list[int], list[float]]
T = TypeVar("T")


class Drawing(NamedTuple):
    """A figure as an SVG document, for pages and print, and as PNG, for slides."""

    svg: str
    png: bytes


class Dot(NamedTuple):
    """A mean in a row of `dots`, with its interval and single values.

    Args:
        row: row number, from 0.
        mean: mean value. low, high: ends of its interval.
        values: single values, such as one per seed.
        colour: colour. hollow: whether the dot is a ring.
        shift: vertical position within the row, -0.5 to 0.5.
    """

    row: int
    mean: float
    low: float | None = None
    high: float | None = None
    values: Sequence[float] = ()
    colour: str = BLUE
    hollow: bool = False
    shift: float = 0.0


class DotPanel(NamedTuple):
    """A panel of `dots`: title, unit, dots, and the value of a reference line, such as no effect or guessing."""

    title: str
    unit: str
    dots: Sequence[Dot]
    line: float | None = None


def dots(rows: Sequence[str], panels: Sequence[DotPanel], breaks: Sequence[int] = ()) -> Drawing:
    """Means and intervals in named rows, panels side by side.

    Args:
        rows: names of the rows.
        panels: panels that share the rows.
        breaks: rows with a separating line above them.
    """
    with style():
        figure = new_figure(10, 0.9 + 0.36 * len(rows))
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, panel in zip(axes, panels, strict=True):
            axis.set_title(panel.title)
            axis.set_xlabel(panel.unit)
            axis.grid(axis="y", visible=False)
            if panel.line is not None:
                axis.axvline(panel.line, color=SOFT, linewidth=1, linestyle="-" if panel.line == 0 else DASHED)
            for row in breaks:
                axis.axhline(row - 0.5, color=EDGE, linewidth=0.8)
            for dot in panel.dots:
                y = dot.row + dot.shift
                if dot.low is not None and dot.high is not None:
                    axis.plot([dot.low, dot.high], [y, y], color=dot.colour, linewidth=2.4, alpha=0.45)
                if len(dot.values) > 1:
                    axis.plot(dot.values, [y] * len(dot.values), "|", color=dot.colour, markersize=8)
                face = PAPER if dot.hollow else dot.colour
                axis.plot(dot.mean, y, "o", markersize=6, markeredgecolor=dot.colour, markerfacecolor=face)
            axis.margins(x=0.1)
        axes[0].set_yticks(range(len(rows)), [_short(name, 44) for name in rows])
        axes[0].set_ylim(len(rows) - 0.5, -0.5)
        return drawing(figure)


@dataclass(frozen=True)
class Line:
    """A line of `by_layer`.

    Args:
        label: label in the legend.
        look: anti-transfer method, network or ``mean``, which sets the colour.
        values: values by layer, or one level, which is drawn dashed.
        hollow: whether it is dotted with hollow squares, to distinguish two lines of one colour.
        chosen: layer that gets a ring.
    """

    label: str
    look: str
    values: Mapping[int, float] | float
    hollow: bool = False
    chosen: int | None = None

    @property
    def layers(self) -> list[int]:
        return list(self.values) if isinstance(self.values, Mapping) else []


_LOOKS = {"single_S": BLUE, "single_W": AMBER, "dual_SW": RED, "dual_WS": GREEN, "mean": INK} | {
    "quaternion": BLUE,
    "real": AMBER,
}


def by_layer(panels: Mapping[str, Sequence[Line]], ylabel: str, guess: float | None = None) -> Drawing:
    """Lines over the layer of anti-transfer; panels with the same axes, two in a row.

    Args:
        panels: lines by title of the panel.
        ylabel: label of the vertical axis.
        guess: accuracy of guessing, dotted in red.
    """
    ticks = {layer for lines in panels.values() for line in lines for layer in line.layers}
    legend: dict[str, Any] = {}

    def draw(axis: Axes, lines: Sequence[Line]) -> None:
        if guess is not None:
            legend["guessing"] = axis.axhline(guess, color=RED, linewidth=1, linestyle=":")
        for line in lines:
            legend.setdefault(line.label, _draw_line(axis, line))
        axis.set_xticks(sorted(ticks))
        axis.set_xlim(min(ticks) - 0.5, max(ticks) + 0.5)

    return _multiples(list(panels.items()), draw, "layer", ylabel, legend, most=2)


def _draw_line(axis: Axes, line: Line) -> Any:
    colour = _LOOKS.get(line.look, GREY)
    if not isinstance(line.values, Mapping):
        return axis.axhline(line.values, color=colour, linewidth=1.2, linestyle="-." if line.hollow else DASHED)
    (handle,) = axis.plot(
        line.layers,
        list(line.values.values()),
        color=colour,
        linewidth=2.4 if line.look == "mean" else 1.3,
        linestyle=":" if line.hollow else "-",
        marker="s" if line.hollow else "o",
        markersize=3.5,
        markerfacecolor=PAPER if line.hollow else colour,
    )
    if line.chosen in line.values:
        assert line.chosen is not None
        ring = line.chosen, line.values[line.chosen]
        axis.plot(*ring, "o", markersize=9, markerfacecolor="none", markeredgecolor=colour)
    return handle


def losses(groups: Sequence[Group], share: bool) -> Drawing:
    """Training and validation loss by epoch; dotted: cross-entropy alone, where anti-transfer adds to it."""

    def draw(axis: Axes, group: Group) -> None:
        for run in group.runs:
            for part, colour in (("train", GREY), ("validation", BLUE)):
                total, entropy = _curve(run, f"{part}_total"), _curve(run, f"{part}_cross_entropy")
                if total:
                    _plot(axis, total, colour, "-")
                if entropy and entropy != total:
                    _plot(axis, entropy, colour, ":")
            _mark_kept(axis, run, "validation_total", 1)
        constant = group.mean(lambda run: run.score("validation", "constant"))
        if constant is not None:
            axis.axhline(constant, color=RED, linewidth=1, linestyle=DASHED)

    legend = {}
    for part, colour in (("train", GREY), ("validation", BLUE)):
        legend[f"{part}, total"] = colour, "-"
        if any(group.first.transfers for group in groups):
            legend[f"{part}, cross-entropy"] = colour, ":"
    return _multiples(_named(groups), draw, "epoch", "loss", _lines(legend), share=share)


def accuracies(groups: Sequence[Group]) -> Drawing:
    """Validation accuracy by epoch."""

    def draw(axis: Axes, group: Group) -> None:
        for run in group.runs:
            if curve := _curve(run, "validation_accuracy"):
                _plot(axis, (curve[0], [100 * value for value in curve[1]]), BLUE, "-")
            _mark_kept(axis, run, "validation_accuracy", 100)

    return _multiples(_named(groups), draw, "epoch", "accuracy, %")


def similarities(groups: Sequence[Group]) -> Drawing:
    """Squared Gram cosine to the twin by epoch."""
    layers = sorted({layer for group in groups for layer in group.first.layers})
    looks = {layer: (COLOURS[n % len(COLOURS)], "-" if n < len(COLOURS) else ":") for n, layer in enumerate(layers)}

    def draw(axis: Axes, group: Group) -> None:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        for run in group.runs:
            for layer, curve in similarity(run).items():
                _plot(axis, curve, *looks[layer])

    titles = [(f"{group.name}\nfrom {group.first.start}, beta {group.first.beta}", group) for group in groups]
    legend = _lines({f"layer {layer}": look for layer, look in looks.items()})
    return _multiples(titles, draw, "epoch", "cos²", legend)


def confusions(groups: Sequence[Group]) -> Drawing:
    """Confusion matrices as heat maps of row shares, with counts summed over seeds."""
    from matplotlib.patches import Rectangle

    def draw(axis: Axes, group: Group) -> None:
        counts = confusion(group)
        assert counts is not None
        classes = len(counts)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        for (row, column), share in np.ndenumerate(shares):
            # The share is the opacity, so that the page's background shows through in both modes.
            corner = (column + 0.03, row + 0.03)
            axis.add_patch(Rectangle(corner, 0.94, 0.94, color=BLUE, alpha=0.9 * share, linewidth=0))
            if classes <= 12:
                look: dict[str, Any] = {
                    "fontsize": 7.5 if classes <= 6 else 5.5,
                    "color": PAPER if share > 0.6 else INK,
                }
                text = f"{counts[row, column]:.0f}\n{100 * share:.0f} %"
                axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", **look)
        ticks, labels = np.arange(classes) + 0.5, [_short(name, 12) for name in group.first.result.classes]
        axis.set_xticks(ticks, labels, rotation=0 if classes <= 5 else 90)
        axis.set_yticks(ticks, labels)
        axis.set_xlim(0, classes)
        axis.set_ylim(classes, 0)
        axis.grid(visible=False)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)

    return _multiples(_named(groups), draw, "predicted", "true", share=False, aspect=0.85)


def confusion(group: Group) -> NDArray[np.float64] | None:
    """Test counts `[K, K]` summed over seeds, rows true; None unless every seed has them."""
    classes = len(group.first.result.classes)
    counts = [np.array(run.score("test", "confusion")) for run in group.runs]
    return np.sum(counts, axis=0) if all(matrix.shape == (classes, classes) for matrix in counts) else None


def similarity(run: FinishedRun) -> dict[int, Curve]:
    """Logged cos^2 by layer, of the validation part or, if it has none, of the training part."""
    curves = {
        layer: _curve(run, f"validation_similarity_{layer}") or _curve(run, f"train_similarity_{layer}")
        for layer in run.layers
    }
    return {layer: curve for layer, curve in curves.items() if curve}


def style() -> Any:
    """A context with the drawing style, independent of the user's own settings."""
    from matplotlib import style as styles

    return styles.context(["default", STYLE])


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def svg_of(figure: Figure) -> str:
    """The SVG document of a figure; equal figures give equal bytes."""
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return svg.getvalue()


def drawing(figure: Figure) -> Drawing:
    svg, png = svg_of(figure), io.BytesIO()
    figure.set_layout_engine(None)  # the layout is computed already, which takes as long as drawing
    figure.savefig(png, format="png", dpi=144, metadata={"Software": None})
    return Drawing(svg, png.getvalue())


def embed(svg: str, number: int, label: str) -> str:
    """The SVG for a page: without XML header, in the page's colours, with unique ids and a text for screen readers."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1f{number}-", svg)
    svg = re.sub("|".join(_VARIABLES), lambda colour: f"var(--{_VARIABLES[colour[0]]})", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


def _named(groups: Sequence[Group]) -> list[tuple[str, Group]]:
    return [(group.name, group) for group in groups]


def _lines(looks: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """Legend lines by label, from colours and line styles."""
    from matplotlib.lines import Line2D

    return {label: Line2D([], [], color=colour, linestyle=style) for label, (colour, style) in looks.items()}


def _multiples(
    panels: Sequence[tuple[str, T]],
    draw: Callable[[Axes, T], None],
    xlabel: str,
    ylabel: str,
    legend: Mapping[str, Any] | None = None,
    *,
    most: int = 3,
    share: bool = True,
    aspect: float = 0.6,
) -> Drawing:
    """Small multiples: panels of one kind, each under its title.

    Args:
        panels: title and content of each panel.
        draw: function that draws the content of a panel.
        xlabel, ylabel: labels of the axes.
        legend: handles by label; ``draw`` may add to them.
        most: maximum number of columns.
        share: whether the panels share their axes.
        aspect: height of a panel over its width.
    """
    from matplotlib.ticker import MaxNLocator

    panels = panels[:PANELS]
    columns = min(2 if len(panels) in (2, 4) else most, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = 10.0 if columns == most else {1: 4.5, 2: 7.5}[columns]
    with style():
        figure = new_figure(width, rows * aspect * width / columns + 0.3 * (legend is not None))
        axes = figure.subplots(rows, columns, sharex=share, sharey=share, squeeze=False).flatten()
        for place, (axis, (title, panel)) in enumerate(zip(axes, panels, strict=False)):
            axis.set_title(
                "\n".join(line for text in title.split("\n") for line in textwrap.wrap(_short(text, 80), 40))
            )
            draw(axis, panel)
            if xlabel == "epoch":
                axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
                low, high = axis.get_xlim()
                axis.set_xlim(min(low, 0.5), max(high, 1.5))  # a single epoch has no width
            axis.tick_params(labelbottom=True)
            axis.set_ylabel(ylabel if place % columns == 0 else "")
            axis.set_xlabel(xlabel if place + columns >= len(panels) else "")
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        if legend:
            add_legend(figure, legend)
        return drawing(figure)


def add_legend(figure: Figure, handles: Mapping[str, Any], side: Literal["upper", "lower"] = "upper") -> None:
    """A legend above all panels, or below them (``lower``), in as many columns as fit the figure's width."""
    points = 40 + 4.6 * max(map(len, handles))  # width of a column, with letters of 8 points
    columns = max(1, min(len(handles), int(72 * figure.get_figwidth() / points)))
    figure.set_figheight(figure.get_figheight() + 0.18 * (math.ceil(len(handles) / columns) - 1))
    figure.legend(handles=list(handles.values()), labels=list(handles), loc=_LEGENDS[side], ncols=columns)


def _plot(axis: Axes, curve: Curve, colour: str, line: str) -> None:
    """A curve; a single epoch is drawn as a point."""
    axis.plot(*curve, color=colour, alpha=0.8, linestyle=line, marker="" if len(curve[0]) > 1 else "o", markersize=3)


def _curve(run: FinishedRun, name: str) -> Curve | None:
    """Epochs, from 1, and the logged value in each, thinned to `_POINTS`."""
    if run.metrics is None or name not in run.metrics:
        return None
    points = [(epoch, float(value)) for epoch, value in enumerate(run.metrics[name], 1) if math.isfinite(value)]
    points = points[:: math.ceil(len(points) / _POINTS) or 1]
    return ([epoch for epoch, _ in points], [value for _, value in points]) if points else None


def _mark_kept(axis: Axes, run: FinishedRun, name: str, scale: float) -> None:
    """A dot at the epoch whose weights were kept."""
    epoch = run.result.kept_epoch
    if epoch is not None and run.metrics is not None and name in run.metrics and 0 <= epoch < len(run.metrics):
        axis.plot(epoch + 1, scale * run.metrics[name].iloc[epoch], "o", color=BLUE, markersize=4)


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"
