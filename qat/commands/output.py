"""A command's result on the terminal: tables, or JSON."""

from __future__ import annotations

import json
import re
from pathlib import PurePath
from typing import Any

SUMMARY = {
    "name": "setting",
    "accuracy": "accu-\nracy",
    "accuracy_low": "95 %\nlow",
    "accuracy_high": "95 %\nhigh",
    "difference": "AT\ngains",
    "withheld_accuracy": "with-\nheld",
    "shortcut_rate": "short-\ncut",
    "voice_probe": "speaker\nprobe",
}
"""Columns that a terminal has room for, with their headings; ``summary.csv`` and ``--json`` have every column."""


def show(result: Any, as_json: bool) -> None:
    """Print a result: text as it is, a list as a table, a dictionary by its keys."""
    if as_json:
        print(json.dumps(result, indent=2, default=_jsonable))
        return
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)  # paths and labels are text
    if isinstance(result, str):
        print(result, end="")
        return
    for name, value in result.items() if isinstance(result, dict) else [("", result)]:
        if rows := _rows(name, value):
            console.print(_table(rows))
        elif name != "experiment" and not (isinstance(value, (list, dict)) and not value):
            console.print(f"{name}: {value}")


def _rows(name: str, value: Any) -> list[dict[str, Any]]:
    """The rows of a value that is shown as a table; none of any other."""
    if name == "parts":
        names = dict.fromkeys(n for metrics in value.values() for n in metrics if n != "confusion")
        return [{"": n} | {part: metrics.get(n) for part, metrics in value.items()} for n in names]
    if name in ("problems", "remarks") and all("path" in row for row in value):
        return grouped(value)
    if name == "summary":
        value = value[list(SUMMARY)].dropna(subset="accuracy").dropna(axis=1, how="all")
        value = value.round(3).rename(columns=SUMMARY).to_dict("records")
    return value if isinstance(value, list) and value and isinstance(value[0], dict) else []


def grouped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Problems of files by kind, the most frequent first: how many, the first one whole, and the next two files.

    Args:
        rows: ``path`` and ``problem`` of each; those that differ in the path and in numbers alone are of one kind.
    """
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name = re.escape(PurePath(row["path"]).name)
        kind = re.sub(rf"\S*{name}:?" if name else "$^", "", row["problem"])
        kinds.setdefault(re.sub(r"\d+", "0", kind), []).append(row)
    found = []
    for same in sorted(kinds.values(), key=len, reverse=True):
        others = ", ".join(row["path"] for row in same[1:3])
        more = f" and {len(same) - 3} more" if len(same) > 3 else ""
        found.append({"files": len(same), "the first": same[0]["problem"], "others": others + more})
        if same[0]["path"] not in same[0]["problem"]:
            found[-1]["the first"] = f"{same[0]['path']}: {same[0]['problem']}".lstrip(": ")
    return found


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich import box
    from rich.table import Table

    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=column == columns[0])
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    return table


def _cell(value: Any) -> str:
    if value is None or value != value:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _jsonable(value: Any) -> Any:
    return value.to_dict("records") if hasattr(value, "to_dict") else str(value)
