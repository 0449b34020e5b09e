"""Numbers, names and times as text, for tables, charts and the terminal."""

import functools
from collections.abc import Sequence

from bench.results import Row, Shared

MISSING = "not measured"
SPREAD = 0.05  # p20 and p80 are shown if they differ by more than this share of the median


def joined(*texts: str) -> str:
    """The non-empty texts, joined with commas."""
    return ", ".join(filter(None, texts))


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def scaled(value: float | None, units: Sequence[tuple[float, str]]) -> str:
    """Three digits, in the largest unit in which the value is at least 1."""
    if value is None:
        return ""
    scale, unit = next(((scale, unit) for scale, unit in units if abs(value) >= scale), units[-1])
    return f"{value / scale:.0f} {unit}" if abs(value) >= 100 * scale else f"{value / scale:.3g} {unit}"


seconds = functools.partial(scaled, units=((1.0, "s"),))
microseconds = functools.partial(scaled, units=((1e6, "s"), (1e3, "ms"), (1.0, "µs")))
size = functools.partial(scaled, units=((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")))


def time(row: Row | None) -> str:
    """The median, with p20 to p80 if they are far apart; the status of a row without a time."""
    if row is None or row.status != "ok":
        return row.status if row else ""
    low, middle, high = (microseconds(us) for us in (row.p20_us, row.median_us, row.p80_us))
    wide = low and high and (row.p80_us or 0) - (row.p20_us or 0) > SPREAD * (row.median_us or 0)
    return f"{middle} ({low} to {high})" if middle and wide else middle or "not timed"


def conditions(row: Row | Shared, *fields: str) -> str:
    """Values of a row's fields, such as "bf16, batch 20, CUDA graph"."""
    names = {"network": f"{row.network} network", "batch": f"batch {row.batch}"}
    names["mode"] = "CUDA graph" if row.mode == "graph" else row.mode
    return ", ".join(names.get(field, getattr(row, field)) for field in fields)
