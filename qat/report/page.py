"""What the reports' pages are made of: tables, figures and the document around them."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.files import replacing, write_text
from qat.report import figures
from qat.report.figures import Drawing

if TYPE_CHECKING:
    import pandas as pd


class Page:
    """A page of sections, which count their tables and figures."""

    def __init__(self) -> None:
        self.tables = 0
        self.drawings: dict[str, Drawing] = {}

    def document(self, title: str, sections: Sequence[tuple[str, str]], label: str = "") -> str:
        """One HTML file that needs nothing else: no script, no network, figures inside.

        Args:
            title: of the page.
            sections: heading and content of each; those without content are left out.
            label: what is to be read before anything else.
        """
        sections = [section for section in sections if section[1]]
        contents = "".join(f'<li><a href="#s{n}">{title}</a></li>' for n, (title, _) in enumerate(sections, 1))
        body = "".join(
            f'<section id="s{n}"><h2><span>{n}</span>{title}</h2>{content}</section>'
            for n, (title, content) in enumerate(sections, 1)
        )
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escaped(title)}</title><style>{_CSS}</style></head><body><main>"
            "<header><p>Speech emotion recognition with anti-transfer learning</p>"
            f"<h1>{escaped(title)}</h1></header>{label}"
            f"<nav><ol>{contents}</ol></nav>{body}</main></body></html>\n"
        )

    def write(self, out: Path, document: str) -> None:
        """Write the document, and every figure as SVG and PNG into `folder_beside` it."""
        for name, drawing in self.drawings.items():
            write_text(folder_beside(out) / f"{name}.svg", drawing.svg)
            with replacing(folder_beside(out) / f"{name}.png") as draft:
                draft.write_bytes(drawing.png)
        write_text(out, document)

    def figure(self, drawing: Drawing, caption: str, groups: Sequence[object] = (), name: str = "") -> str:
        """A numbered figure.

        Args:
            drawing: of `qat.report.figures`.
            caption: below it.
            groups: what its panels show, of which there is room for the first `figures.PANELS`.
            name: of its files; default its number.
        """
        number = len(self.drawings) + 1
        self.drawings[name or f"figure-{number}"] = drawing
        if len(groups) > figures.PANELS:
            caption += f" The first {figures.PANELS} of {len(groups)} settings."
        return (
            f"<figure>{figures.embed(drawing.svg, number, caption)}<figcaption><strong>Figure {number}.</strong> "
            f"{escaped(caption)}</figcaption></figure>"
        )

    def tabulate(self, head: Sequence[str], body: Sequence[Sequence[str]], caption: str, words: int) -> str:
        """A numbered table without its empty columns; the first ``words`` columns are text, the others figures."""
        self.tables += 1
        kept = [n for n in range(len(head)) if n < words or any(row[n] != "–" for row in body)]

        def line(cells: Sequence[str], tag: str) -> str:
            kinds = {n: ' class="n"' if n >= words else "" for n in kept}
            return "".join(f"<{tag}{kind}>{escaped(cells[n])}</{tag}>" for n, kind in kinds.items())

        rows = "".join(f"<tr>{line(row, 'td')}</tr>" for row in body)
        return (
            f'<div class="table"><table><caption><strong>Table {self.tables}.</strong> {escaped(caption)}</caption>'
            f"<thead><tr>{line(head, 'th')}</tr></thead><tbody>{rows}</tbody></table></div>"
        )


def folder_beside(out: Path) -> Path:
    """Where a page's figures, and a grid's tables, are for other use.

    >>> folder_beside(Path("runs/report.html")).as_posix()
    'runs/report-files'
    """
    return out.with_name(f"{out.stem}-files")


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(column): value for column, value in row.items()} for row in table.to_dict("records")]


class Html(str):
    """Text that is markup already."""


def escaped(value: Any) -> str:
    return value if isinstance(value, Html) else html.escape(str(value))


def count(value: float, noun: str = "") -> str:
    return "–" if value != value else f"{value:,.0f} {noun}{'s' if noun and value != 1 else ''}".strip()


def seed_count(counts: Iterable[int]) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return count(high, "seed") if low == high else f"{low} to {high} seeds"


def percent(share: float) -> str:
    return "–" if share != share else f"{100 * share:.1f}"


def decimal(value: float) -> str:
    return "–" if value != value else f"{value:.3f}"


def signed(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def interval(low: float, high: float) -> str:
    return "–" if low != low else f"{percent(low)} to {percent(high)}"


def points(value: float, low: float = float("nan"), high: float = float("nan")) -> str:
    """A difference in percentage points, with its interval where there is one."""
    if value != value:
        return "–"
    return signed(value) + (f" [{signed(low)}, {signed(high)}]" if low == low else "")


def plus_minus(deviation: float) -> str:
    return "" if deviation != deviation else f" ± {percent(deviation)}"


def folded(title: str, content: str, note: str = "") -> str:
    return f"<details><summary>{escaped(title)} <span>{escaped(note)}</span></summary>{content}</details>"


def bar(share: float) -> Html:
    return Html(f'<span class="bar" style="width:{12 * share:.2f}em"></span>{100 * share:.0f} %')


def duration(seconds: float) -> str:
    if seconds != seconds:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 2:
        return f"{seconds:.1f} s"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def memory(size: float | None) -> str:
    if size is None or size != size:
        return "–"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


_CSS = """
:root { --ink: #1d2129; --soft: #5b616b; --line: #d8dce2; --blue: #1f5f99; }
* { box-sizing: border-box; }
body, svg text { font-family: system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif !important; }
body { margin: 0; background: #fff; color: var(--ink); font-size: 16px; line-height: 1.55; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
header p { margin: 0; color: var(--soft); }
h1 { margin: .1rem 0 1.2rem; font-size: 2rem; line-height: 1.2; font-weight: 650; }
h2 { margin: 0 0 .8rem; padding-top: 1.6rem; border-top: 1px solid var(--line); font-size: 1.3rem; font-weight: 650; }
h2 span { display: inline-block; min-width: 1.3rem; margin-right: .3rem; color: var(--blue); }
section { margin-top: 2rem; }
p, dl, section > ul { max-width: 48rem; }
a { color: var(--blue); text-decoration: none; }
a:hover { text-decoration: underline; }
.label { padding: .7rem 1rem; border-left: 4px solid #c77d0a; background: #fdf5e6; max-width: none; }
.note { padding: .7rem 1rem; border-left: 4px solid var(--blue); background: #f1f6fb; max-width: none; }
nav ol { columns: 3; column-gap: 2rem; margin: 1.2rem 0 0; padding-left: 1.4rem; font-size: .92rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; font-size: .92rem; }
dt { font-weight: 600; }
dd { margin: 0; }
.table { overflow-x: auto; margin: 1.4rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; line-height: 1.35; }
.n { text-align: right; font-variant-numeric: tabular-nums; }
caption, figcaption { text-align: left; padding: 0 0 .6rem; font-size: .86rem; line-height: 1.45; color: var(--soft); }
caption strong, figcaption strong { color: var(--ink); }
th { text-align: left; vertical-align: bottom; font-weight: 600; border-bottom: 1.5px solid var(--ink); }
td { vertical-align: top; border-bottom: 1px solid var(--line); }
td:first-child { min-width: 7rem; }
td:nth-child(3):not(.n) { min-width: 12rem; }
th, td { padding: .4rem .55rem; }
th:first-child, td:first-child { padding-left: 0; font-weight: 600; }
td.n { white-space: nowrap; }
figure { margin: 1.4rem 0 2rem; }
figcaption { padding: .5rem 0 0; }
svg { display: block; max-width: 100%; height: auto; }
.bar { display: inline-block; height: .65rem; background: var(--blue); opacity: .55; margin-right: .5em; }
details { border-bottom: 1px solid var(--line); padding: .35rem 0; max-width: none; }
summary { cursor: pointer; font-weight: 600; }
summary span { font-weight: 400; color: var(--soft); }
pre { font-size: .78rem; line-height: 1.35; background: #f6f7f9; padding: .8rem; overflow-x: auto; }
details ul { font-size: .86rem; overflow-wrap: anywhere; }
@media (max-width: 45rem) { nav ol { columns: 1; } }
@media print {
  @page { margin: 15mm 13mm; }
  body { font-size: 10.5pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  figure, tr, .note, .label { break-inside: avoid; }
  h2, caption { break-after: avoid; }
  .table { overflow: visible; }
}
"""
