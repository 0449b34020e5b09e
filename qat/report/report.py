"""The report: one HTML file that explains a folder of runs to somebody who has read nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qat.files import held, lock_of, replacing
from qat.report import grid_sections, sections
from qat.report.page import Page
from qat.report.sections import Section
from qat.report.view import View, read_view

SECTIONS: tuple[tuple[str, Callable[[Any], Section] | None, Callable[[Any], Section] | None], ...] = (
    ("In short", sections.verdict, grid_sections.verdict),
    ("What was trained", sections.trained, None),
    ("What is recorded speech, and what is finished", None, grid_sections.real),
    ("Table 1", None, grid_sections.table1),
    ("Results", sections.results, None),
    ("What is missing", sections.missing, grid_sections.missing),
    ("What anti-transfer changed, over seeds", sections.differences, None),
    ("Average gains by anti-transfer", None, grid_sections.gains),
    ("Accuracy by layer", None, grid_sections.layers),
    ("Every cell of table 1", None, grid_sections.cells_of_table1),
    ("Accuracy by speaker", sections.speakers, sections.speakers),
    ("Wrong answers to listen to", sections.wrong, sections.wrong),
    ("Training curves", sections.curves, sections.curves),
    ("Confusion matrices", sections.confusions, sections.confusions),
    ("Similarity to the frozen network", sections.similarity, sections.similarity),
    ("Networks trained beforehand", sections.beforehand, sections.beforehand),
    ("Parameters, time and memory", sections.resources, sections.resources),
    ("Time and memory compared with the papers", None, grid_sections.costs),
    ("Limits of these results", sections.limits, grid_sections.limits),
    ("Provenance and settings", sections.provenance, sections.provenance),
)
"""Heading of each section, its function for runs and for a grid; templates are named after module and function."""


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Write the report of all runs at or below ``folder``, finished or not, with its tables and figures beside it.

    The page is self-contained: figures are inside, there is no script and no link to the network. The same runs give
    the same bytes. Another process that writes a report to the same folder is waited for, so that page, tables and
    figures belong together.

    Args:
        folder: folder of a run, a sweep, a study or a grid.
        out: HTML file; default ``report.html`` in ``folder``.

    Returns:
        The HTML file, with ``summary.csv`` and ``differences.csv`` beside it. For a grid, `folder_beside` has instead
        ``table1.csv``, ``gains.csv``, ``layers.csv``, ``figure2.csv``, ``resources.csv``, ``ratios.csv`` and
        ``summary.csv``, whose columns `qat.results.paper` explains. That folder also has every figure as SVG and PNG.

    Raises:
        ValueError: as `read_view`.
    """
    return _write(read_view(folder), out)


def report_and_tables(folder: Path, out: Path | None = None, *, short: bool) -> dict[str, Any]:
    """Write the report of a folder; returns what a terminal shows, and the file as ``report``.

    Args:
        folder, out: as in `write_report`.
        short: whether to leave out what does not fit a terminal.
    """
    view = read_view(folder)
    report = _write(view, out)
    return view.terminal(short) | {"report": report}


def _write(view: View, out: Path | None) -> Path:
    out = view.folder.folder / "report.html" if out is None else Path(out)
    page, shown = Page(), []
    for heading, of_runs, of_grid in SECTIONS:
        section = of_grid if view.is_grid else of_runs
        if section and (values := section(view)) is not None:
            template = f"{section.__module__.rpartition('.')[2]}/{section.__name__}"
            shown.append((heading, page.render(template, view=view, **values)))
    document = page.render("page", title=view.title, sections=shown, label=view.label)
    with held(lock_of(out.with_name("report")), wait=True):  # one for all pages of a folder, whose tables have one name
        for path, table in view.tables(out).items():
            with replacing(path) as draft:
                table.to_csv(draft, index=False)
        page.write(out, document)
    return out
