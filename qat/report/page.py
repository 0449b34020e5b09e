"""Pages: formats of numbers, numbered tables and figures, and the document from its templates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qat.files import replacing, write_text
from qat.report import figures
from qat.report.figures import Drawing


class Page:
    """A page with numbered tables and figures.

    Templates call ``figure``, ``table`` and ``folded``; the block of the call is the caption or the content.
    """

    def __init__(self) -> None:
        self.tables = 0
        self.drawings: dict[str, Drawing] = {}
        self._templates = Environment(loader=PackageLoader("qat.report"), autoescape=True, undefined=StrictUndefined)
        self._templates.filters |= _FORMATS
        self._templates.globals |= {"figure": self.figure, "table": self.table, "folded": self.folded}

    def render(self, template: str, **values: Any) -> Markup:
        """The markup of a template of this package."""
        return Markup(self._templates.get_template(f"{template}.html.j2").render(values))

    def write(self, out: Path, document: str) -> None:
        """Write the document, and every figure as SVG and PNG to `folder_beside`."""
        for name, drawing in self.drawings.items():
            write_text(folder_beside(out) / f"{name}.svg", drawing.svg)
            with replacing(folder_beside(out) / f"{name}.png") as draft:
                draft.write_bytes(drawing.png)
        write_text(out, document)

    def figure(
        self, drawing: Drawing, name: str, groups: Sequence[object] = (), *, caller: Callable[[], str]
    ) -> Markup:
        """A numbered figure.

        Args:
            drawing: the figure.
            name: name of its files.
            groups: settings of its panels; only the first `figures.PANELS` are drawn.
            caller: function that returns the caption.
        """
        self.drawings[name] = drawing
        number = len(self.drawings)
        caption = Markup(" ").join(map(Markup, caller().split()))
        if len(groups) > figures.PANELS:
            caption += f" The first {figures.PANELS} of {len(groups)} settings."
        svg = figures.embed(drawing.svg, number, caption.striptags())
        return self.render("figure", svg=Markup(svg), number=number, caption=caption)

    def table(
        self,
        rows: Iterable[Any],
        columns: Mapping[str, Sequence[str]] | Sequence[str],
        words: int,
        *,
        caller: Callable[[], str],
    ) -> Markup:
        """A numbered table without its empty columns.

        Args:
            rows: rows as mappings or lists of cells.
            columns: for mappings, by title, the name of a value, or of a format and its values; for lists, the titles.
            words: number of text columns on the left; the others are numbers.
            caller: function that returns the caption.
        """
        self.tables += 1
        head, body = list(columns), list(rows)
        if isinstance(columns, Mapping):
            body = [[self._cell(row, *column) for column in columns.values()] for row in body]
        shown = [n for n in range(len(head)) if n < words or any(row[n] != "–" for row in body)]
        caption = Markup(" ").join(map(Markup, caller().split()))
        return self.render("table", head=head, body=body, words=words, shown=shown, number=self.tables, caption=caption)

    def _cell(self, row: Mapping[str, Any], first: str, *names: str) -> str:
        return _FORMATS[first](*(row[name] for name in names)) if names else str(row[first])

    def folded(self, title: str, note: str = "", *, caller: Callable[[], str]) -> Markup:
        """Content that unfolds under its title; without a title, the plain content."""
        content = Markup(caller())
        return self.render("folded", title=title, note=note, content=content) if title else content


def folder_beside(out: Path) -> Path:
    """The folder of a page's figures and of a grid's tables.

    >>> folder_beside(Path("runs/report.html")).as_posix()
    'runs/report-files'
    """
    return out.with_name(f"{out.stem}-files")


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(column): value for column, value in row.items()} for row in table.to_dict("records")]


_FORMATS: dict[str, Callable[..., str]] = {}


def _format(show: Callable[..., str]) -> Callable[..., str]:
    """Register a format for templates; a missing number is shown as a dash."""

    @wraps(show)
    def shown(value: Any, *rest: Any) -> str:
        return "–" if pd.isna(value) else show(value, *rest)

    _FORMATS[show.__name__] = shown
    return shown


@_format
def count(value: float, noun: str = "") -> str:
    """A number with its noun, such as ``2 seeds``."""
    return f"{value:,.0f} {noun}{'s' if noun and value != 1 else ''}".strip()


def span(counts: Iterable[float], noun: str = "") -> str:
    """The range of several counts, such as ``2 to 3 seeds``."""
    low, high = min(counts := list(counts), default=0), max(counts, default=0)
    return count(high, noun) if low == high else f"{low:,.0f} to {count(high, noun)}"


@_format
def layer_number(value: float) -> str:
    return str(int(value)) if value else "–"


@_format
def percent(share: float) -> str:
    return f"{100 * share:.1f}"


@_format
def decimal(value: float) -> str:
    return f"{value:.3f}"


@_format
def digits(value: float) -> str:
    return f"{value:.3g}"


def signed(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


@_format
def interval(low: float, high: float) -> str:
    return f"{percent(low)} to {percent(high)}"


@_format
def points(value: float, low: float | None = None, high: float | None = None) -> str:
    """A difference in percentage points, with its interval if there is one."""
    return signed(value) + ("" if pd.isna(low) else f" [{signed(low)}, {signed(high)}]")  # type: ignore[arg-type]


@_format
def plus_minus(share: float, deviation: float | None) -> str:
    return percent(share) + ("" if pd.isna(deviation) else f" ± {percent(deviation)}")


@_format
def at_layer(accuracy: float, layer: float) -> str:
    return percent(accuracy) + ("" if layer_number(layer) == "–" else f" ({layer_number(layer)})")


def times(ratio: float) -> str:
    return f"×{ratio:.3g} ({100 * (ratio - 1):+.1f} %)".replace("-", "−")


@_format
def bar(share: float) -> Markup:
    return Markup('<span class="bar" style="width:{:.2f}em"></span>{:.0f} %').format(12 * share, 100 * share)


@_format
def duration(seconds: float) -> str:
    """Seconds in a suitable unit.

    >>> duration(7.25), duration(200), duration(7300)
    ('7.2 s', '3 min 20 s', '2 h 01 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 2:
        return f"{seconds:.1f} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


@_format
def memory(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
