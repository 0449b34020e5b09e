"""The report: one HTML file that explains a folder of runs to somebody who has read nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qat.files import replacing
from qat.report import grid_sections, sections
from qat.report.page import Page
from qat.report.sections import Section
from qat.report.view import View, read_view

Sections = tuple[tuple[str, Callable[[Any], Section]], ...]

RUNS: Sections = (
    ("In short", sections.verdict),
    ("What was trained", sections.trained),
    ("Results", sections.results),
    ("What is missing", sections.missing),
    ("What anti-transfer changed, over seeds", sections.differences),
    ("Accuracy by speaker", sections.speakers),
    ("Wrong answers to listen to", sections.wrong),
    ("Training curves", sections.curves),
    ("Confusion matrices", sections.confusions),
    ("Similarity to the frozen network", sections.similarity),
    ("Networks trained beforehand", sections.beforehand),
    ("Parameters, time and memory", sections.resources),
    ("What this cannot show", sections.limits),
    ("Provenance and settings", sections.provenance),
)
"""Heading and function of each section; its template has the name of its module and function."""

GRID: Sections = (
    ("In short", grid_sections.verdict),
    ("What is real, and what is there", grid_sections.real),
    ("Table 1", grid_sections.table1),
    ("What is missing", grid_sections.missing),
    ("Average gains by anti-transfer", grid_sections.gains),
    ("Accuracy by layer", grid_sections.layers),
    ("Every cell of table 1", grid_sections.cells_of_table1),
    ("Accuracy by speaker", sections.speakers),
    ("Wrong answers to listen to", sections.wrong),
    ("Training curves", sections.curves),
    ("Confusion matrices", sections.confusions),
    ("Similarity to the frozen network", sections.similarity),
    ("Networks trained beforehand", sections.beforehand),
    ("Parameters, time and memory", sections.resources),
    ("Time and memory beside the papers", grid_sections.costs),
    ("What this cannot show", grid_sections.limits),
    ("Provenance and settings", sections.provenance),
)
"""The same of a grid."""


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of all runs at or below ``folder``, finished or not, with its tables and figures beside it.

    The file needs nothing else: no script, no network, figures inside. The same runs give the same bytes.

    Args:
        folder: folder of a run, a sweep, a study or a grid.
        out: HTML file; default ``report.html`` in ``folder``.

    Returns:
        The HTML file. Beside it stand ``summary.csv`` and ``differences.csv``. Of a grid `folder_beside` has instead
        ``table1.csv``, ``gains.csv``, ``layers.csv``, ``figure2.csv``, ``resources.csv``, ``ratios.csv`` and
        ``summary.csv``, whose columns `qat.results.paper` explains. It has every figure as SVG and PNG.

    Raises:
        ValueError: as `read_view`.
    """
    return _write(read_view(folder), out)


def report_and_tables(folder: Path, out: Path | None = None, *, short: bool) -> dict[str, Any]:
    """Write the report of a folder; returns what a terminal shows of it, and the file, ``report``.

    Args:
        folder, out: as of `write_report`.
        short: leave out what a terminal has no room for.
    """
    view = read_view(folder)
    return {"report": _write(view, out)} | view.terminal(short)


def _write(view: View, out: Path | None) -> Path:
    out = view.folder.folder / "report.html" if out is None else Path(out)
    page, shown = Page(), []
    for heading, section in GRID if view.is_grid else RUNS:
        if (values := section(view)) is not None:
            template = f"{section.__module__.rpartition('.')[2]}/{section.__name__}"
            shown.append((heading, page.render(template, view=view, **values)))
    document = page.render("page", title=view.title, sections=shown, label=view.label)
    for path, table in view.tables(out).items():
        with replacing(path) as draft:
            table.to_csv(draft, index=False)
    page.write(out, document)
    return out
