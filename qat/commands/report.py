"""``qat report``: a table and a page from finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from qat.commands.parser import Commands


def add_report(commands: Commands) -> None:
    parser = commands.add(
        "report", run_report, "Write a table and an HTML page from finished runs, or from those of a grid."
    )
    parser.add_argument("folder", type=Path, help="folder that holds runs, at any depth")
    parser.add_argument("--out", type=Path | None, default=None, help="HTML file (default: report.html in the folder)")


def run_report(options: Namespace) -> Any:
    from qat.report.report import collect, is_grid, summary_table, write_report

    report = write_report(options.folder, options.out)
    if is_grid(options.folder):
        from qat.report.grid_report import read_table1, short_table

        table = read_table1(report)
        made_up = sorted(set(table.loc[table["kind"] == "synthesised", "corpus"]))
        if options.json:
            return {"table1": table, "synthesised": made_up, "report": report}
        notes = {"synthesised, not to compare with the paper": ", ".join(made_up)} if made_up else {}
        return {"table1": short_table(table), **notes, "report": report}
    return {"summary": summary_table(collect(options.folder)), "report": report}
