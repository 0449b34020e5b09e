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
    from qat.report.report import report_and_tables

    return report_and_tables(options.folder, options.out, short=not options.json)
