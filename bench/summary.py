"""Results for tables, charts and targets: read and grouped, with ours beside the baselines.

A speed-up is the time of the fastest baseline over that of ours in the same case, whose runs took turns; below 1 ours
is slower. "Ours" has the default settings; forms that must be chosen explicitly are only in the charts.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from bench.case import FORWARD
from bench.case import STEP as FORWARD_BACKWARD
from bench.network import NO_AT, TRAIN, TWIN
from bench.results import Fresh, Results, Row, Shared, read
from bench.words import joined

OURS, CACHED, RESEARCH = ("ours", "ours auto"), "ours, cached target", "research style"
# Fields in which comparable rows agree, with their values by priority; other values come last.
ORDERS: dict[str, tuple[Any, ...]] = {
    "network": ("quaternion", "real", "real-on-embedding"),
    "work": ("step", FORWARD_BACKWARD, "forward", "backward"),
    "precision": ("bf16", "float32", "fp16", "tf32"),
    "batch": (20,),
    "mode": ("graph", "eager"),
}
CONDITION = ("batch", "precision", "mode")
SEMANTICS = ("paper", "folded-rowwise")
# The works of a step, each of which includes those before it, and its parts, which are their differences.
WORKS = (TWIN, FORWARD, FORWARD_BACKWARD, TRAIN)
PARTS = ("twin", "rest of forward", "backward", "optimiser")
Measure = Callable[[Row], float | None]


class Folder(NamedTuple):
    """The files of one folder of results, all of one device; `path` is that of results.csv, for captions."""

    path: Path
    results: Results[Row]
    fresh: Results[Fresh] = Results([], {})
    shared: Results[Shared] = Results([], {})

    @property
    def on_cpu(self) -> bool:
        return self.results.provenance.get("device", "").startswith("cpu")

    @property
    def device(self) -> str:
        name = self.results.provenance.get("device", "unknown device")
        threads = self.results.provenance.get("threads", "unknown")
        return f"{name.removeprefix('cpu: ')}, {threads} threads" if self.on_cpu else name

    def rows(self, kind: str) -> list[Row]:
        return [row for row in self.results.rows if kind_of(row) == kind]

    def headline(self, kind: str) -> list[Row]:
        """The rows of the most valuable combination."""
        return next((rows for _, rows in combinations(self.rows(kind), tuple(ORDERS))), [])

    def memory(self, row: Row) -> int | None:
        """Peak bytes of the GPU's allocator, on a CPU growth of a fresh process; None if the result was not right."""
        if row.status != "ok" or not self.on_cpu:
            return row.peak_bytes if row.status == "ok" else None
        name = (*row.case_key, row.provider)
        fresh = next((fresh for fresh in self.fresh.rows if (*fresh.case_key, fresh.provider) == name), None)
        return fresh.host_bytes if fresh and fresh.status == "ok" else None


class Standing(NamedTuple):
    """Rows of one layer: ours, the fastest baseline, the failed ones; and a real layer's time over ours."""

    layer: str
    ours: Row | None
    best: Row | None
    real: float | None
    failed: list[Row]

    @property
    def speedup(self) -> float | None:
        return ratio(median(self.best), median(self.ours))

    @property
    def by(self) -> str:
        return self.best.provider if self.best else ""

    @property
    def failures(self) -> str:
        return joined(*(f"{row.provider}: {row.status}" for row in self.failed))


def load(folder: Path) -> list[Folder]:
    """The folders of results within a folder; GPUs first, then by name.

    Raises:
        ValueError: the folder does not exist, or a file in it has another schema.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of results")
    folders = [load_folder(path.parent) for path in folder.glob("*/results.csv")]
    return sorted(folders, key=lambda folder: (folder.on_cpu, folder.path))


def load_folder(folder: Path) -> Folder:
    """The results.csv of a folder, with its fresh.csv and sharing.csv if they exist.

    Raises:
        ValueError: there is no results.csv, or one of the files has another schema.
    """
    path = folder / "results.csv"
    if not path.is_file():
        raise ValueError(f"{folder}: has no results.csv; `python -m bench run --out FOLDER` writes one")
    loaded = Folder(path, read(path, Row))
    if (fresh := folder / "fresh.csv").is_file():
        loaded = loaded._replace(fresh=read(fresh, Fresh))
    if (shared := folder / "sharing.csv").is_file():
        loaded = loaded._replace(shared=read(shared, Shared))
    return loaded


def kind_of(row: Row) -> str:
    """The kind of a row: "layers", "anti-transfer", "step", "epoch" or "inference"; the suite "cpu" has all kinds."""
    if row.suite != "cpu":
        return {"conv": "layers", "linear": "layers", "atl": "anti-transfer"}.get(row.suite, row.suite)
    if row.work == "epoch":
        return "epoch"
    starts = {"whole network": "inference", NO_AT: "step", "AT at ": "step", "layers ": "anti-transfer"}
    return next((kind for start, kind in starts.items() if row.layer.startswith(start)), "layers")


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[tuple[Any, list[Row]]]:
    """Rows by key, in the order of first occurrence."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


def combinations(rows: Iterable[Row], fields: tuple[str, ...]) -> list[tuple[Any, list[Row]]]:
    """Rows by the values of these fields, most valuable first: by the sum of their places in `ORDERS`."""

    def places(group: tuple[Any, list[Row]]) -> tuple[Any, ...]:
        each = [place(getattr(group[1][0], field), ORDERS[field]) for field in ORDERS if field in fields]
        return sum(place[0] for place in each), each

    return sorted(grouped(rows, lambda row: tuple(getattr(row, field) for field in fields)), key=places)


def place(value: Any, order: Sequence[Any] = (NO_AT,)) -> tuple[Any, ...]:
    """Sort key: listed values first, then natural order, with "conv 2" before "conv 10"."""
    text = str(value)
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    return order.index(value) if value in order else len(order), re.sub(r"[\d-]", "", text), numbers


def standings(rows: Iterable[Row]) -> list[Standing]:
    """One standing per layer of a combination; of variants that add a baseline, the one with the lowest speed-up."""
    lines = []
    for layer, of_layer in grouped(rows, label):
        cases = [standing(layer, case) for _, case in grouped(of_layer, attrgetter("variant"))]
        worst = min(cases, key=lambda case: math.inf if case.speedup is None else case.speedup)
        real = next((case.real for case in cases if case.real), None)
        lines.append(worst._replace(real=real, failed=[row for case in cases for row in case.failed]))
    return sorted(lines, key=lambda line: place(line.layer))


def standing(layer: str, rows: Sequence[Row]) -> Standing:
    """Our standing among the rows of one case."""
    ours = next((row for row in rows if row.provider in OURS), None)
    best = _fastest(row for row in rows if not row.provider.startswith(("ours", "real")))
    real = _fastest(row for row in rows if row.provider.startswith("real"))
    return Standing(layer, ours, best, ratio(median(real), median(ours)), [row for row in rows if row.status != "ok"])


def parts(rows: Iterable[Row]) -> list[float] | None:
    """Microseconds of the `PARTS` of one step, from the rows of its works; None if one was not measured.

    They add up to the step: a work that noise made longer than a work that includes it is cut to the latter.
    """
    timed = {row.work: row for row in rows if median(row) is not None}
    ends: list[float] = []
    for work in reversed(WORKS):
        if row := timed.get(work):
            ends.insert(0, min([row.median_us or 0.0, *ends[:1]]))
        elif work == TWIN and ends and any(row.layer == NO_AT or "cached" in row.variant for row in timed.values()):
            ends.insert(0, 0.0)
        else:
            return None
    return [end - start for start, end in itertools.pairwise((0.0, *ends))]


def best(rows: Iterable[Row], network: str, measure: Measure, provider: str | None = None) -> tuple[float, str] | None:
    """The lowest value of a network, and its provider: the given one, or any."""
    rows = [row for row in rows if row.network == network and provider in (None, row.provider)]
    return min(((value, row.provider) for row in rows if (value := measure(row))), default=None)


def median(row: Row | None) -> float | None:
    """Median microseconds; None unless the result is right."""
    return row.median_us if row and row.status == "ok" else None


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b; None if one of them is unknown or b is 0."""
    return a / b if a is not None and b else None


def label(row: Row) -> str:
    """The layer, with its variant unless that only adds a baseline."""
    return row.layer if row.variant.startswith("against ") else joined(row.layer, row.variant)


def _fastest(rows: Iterable[Row]) -> Row | None:
    return min((row for row in rows if median(row)), key=lambda row: row.median_us or 0.0, default=None)
