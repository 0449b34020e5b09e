"""The report: one HTML file that explains a folder of runs to somebody who has read nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.files import replacing
from qat.report import paper_sections, sections
from qat.report.page import Page, folder_beside
from qat.report.paper_sections import short_table
from qat.report.sections import Section
from qat.report.view import View, of_corpora
from qat.results import paper
from qat.results.runs import RunsFolder, collect
from qat.results.tables import summary_table

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["collect", "report_and_tables", "summary_table", "write_report"]

SECTIONS: tuple[tuple[str, Callable[[View], Section]], ...] = (
    ("In short", sections.verdict),
    ("In short", paper_sections.grid_verdict),
    ("What was trained", sections.trained),
    ("What is real, and what is there", paper_sections.real),
    ("Table 1", paper_sections.table1),
    ("Results", sections.results),
    ("What is missing", sections.missing),
    ("What anti-transfer changed, over seeds", sections.differences),
    ("Average gains by anti-transfer", paper_sections.gains),
    ("Accuracy by layer", paper_sections.layers),
    ("Every cell of table 1", paper_sections.table1_cells),
    ("Accuracy by speaker", sections.speakers),
    ("Wrong answers to listen to", sections.wrong),
    ("Training curves", sections.curves),
    ("Confusion matrices", sections.confusions),
    ("Similarity to the frozen network", sections.similarity),
    ("Networks trained beforehand", sections.beforehand),
    ("Parameters, time and memory", sections.resources),
    ("Time and memory beside the papers", paper_sections.costs),
    ("What this cannot show", sections.limits),
    ("What this cannot show", paper_sections.grid_limits),
    ("Provenance and settings", sections.provenance),
)
"""Heading and function of each section; its template has the function's name."""


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
        ValueError: as `RunsFolder.read`.
    """
    return _write(View(RunsFolder.read(folder)), out)


def _write(view: View, out: Path | None) -> Path:
    out = view.folder.folder / "report.html" if out is None else Path(out)
    page = Page()
    shown = []
    for heading, section in SECTIONS:
        if (values := section(view)) is not None:
            shown.append((heading, page.render(f"sections/{section.__name__}", view=view, **values)))
    title = "Report on a grid: table 1 and figure 2" if view.grid else f"Report on {view.corpus}"
    document = page.render("page", title=title, sections=shown, label=_label(view))
    for path, table in _tables(view, out).items():
        with replacing(path) as draft:
            table.to_csv(draft, index=False)
    page.write(out, document)
    return out


def report_and_tables(folder: Path, out: Path | None = None, *, short: bool) -> dict[str, Any]:
    """Write the report of a folder, and tell what a terminal shows of it.

    Args:
        folder, out: as of `write_report`.
        short: leave out what a terminal has no room for.

    Returns:
        ``table1`` of a grid, and what of it is ``synthesised``; ``summary`` of other runs; and the file, ``report``.
    """
    view = View(RunsFolder.read(folder))
    report = _write(view, out)
    tables = _grid_tables(report, short) if view.grid else {"summary": view.table.reset_index(drop=True)}
    return {**tables, "report": report}


def _grid_tables(report: Path, short: bool) -> dict[str, Any]:
    import pandas as pd

    whole = dict.fromkeys(("layer", "seeds", "speakers", "gain_seeds", "test_layer", "paper_layer"), "Int64")
    table = pd.read_csv(folder_beside(report) / "table1.csv", dtype=whole)
    table = table.astype(object).where(table.notna(), None)
    synthesised = sorted(set(table.loc[table["kind"] == "synthesised", "corpus"]))
    if not short:
        return {"table1": table, "synthesised": synthesised}
    notes = {"synthesised, not to compare with the paper": ", ".join(synthesised)} if synthesised else {}
    return {"table1": short_table(table), **notes}


def _label(view: View) -> str:
    if view.grid and (corpora := view.kinds.get("synthesised")):
        return (
            f"Every accuracy on {view.listing(corpora)} was measured on synthesised speech, not on human recordings: "
            "none compares with the paper's, and none stands beside them."
        )
    if view.grid or not view.synthetic:
        return ""
    return f"Every accuracy below was measured on {view.corpus}, not on human recordings."


def _tables(view: View, out: Path) -> dict[Path, pd.DataFrame]:
    """The tables that are written beside the page."""
    import pandas as pd

    if not view.grid:
        return {out.with_name("summary.csv"): view.table, out.with_name("differences.csv"): view.paired}
    kinds = view.kinds.values()
    means = [paper.gains(of_corpora(view.table1, corpora)).assign(corpora="+".join(corpora)) for corpora in kinds]
    lines = [paper.figure2(of_corpora(view.layers, corpora)) for corpora in kinds]
    tables = {
        "table1": view.table1,
        "gains": pd.concat(means) if means else pd.DataFrame(),
        "layers": view.layers,
        "figure2": pd.concat(lines) if lines else pd.DataFrame(),
        "resources": view.costs,
        "ratios": paper.ratios(view.costs),
        "summary": paper.summary(view.grid),
    }
    return {folder_beside(out) / f"{name}.csv": table for name, table in tables.items()}
