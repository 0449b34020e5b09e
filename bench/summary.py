"""Results of benchmarks as tables and charts want them: read, grouped, ours beside the baselines, numbers as words.

A speed-up is the time of the fastest baseline that computes the same over ours, from one case, whose runs took turns;
below 1 we lose. "Ours" is what a user gets who sets nothing; forms of ours to be asked for are in the charts only.
"""

import csv
import itertools
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from bench.case import STEP as FORWARD_BACKWARD
from bench.fresh import Fresh
from bench.results import Results, Row, read
from bench.sharing import Shared

OURS, CACHED, RESEARCH = ("ours", "ours auto"), "ours, cached target", "research style"
NO_AT, MISSING = "no AT", "not measured"
# What makes rows comparable, and which value of it counts most; what is not listed comes behind.
ORDERS: dict[str, tuple[Any, ...]] = {
    "network": ("quaternion", "real", "real-on-embedding"),
    "work": ("step", FORWARD_BACKWARD, "forward", "backward"),
    "precision": ("bf16", "float32", "fp16", "tf32"),
    "batch": (20,),
    "mode": ("graph", "eager"),
}
CONDITION = ("batch", "precision", "mode")
SEMANTICS = ("paper", "folded-rowwise")
# The works of a step, each of which holds those before it, and its parts, which are the differences.
WORKS = ("twin forward", "forward", FORWARD_BACKWARD, "step")
PARTS = ("twin", "rest of forward", "backward", "optimiser")
FRESH_CASE = Fresh._fields[: Fresh._fields.index("status")]
MICROSECONDS = ((1e6, "s"), (1e3, "ms"), (1.0, "µs"))
BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
Measure = Callable[[Row], float | None]


class Sharing(NamedTuple):
    """The rows of a sharing.csv, and their provenance."""

    rows: Sequence[Shared] = ()
    provenance: Mapping[str, str] = {}


class Measured(NamedTuple):
    """One folder of results, which is one run on one device.

    Args:
        path: of results.csv, as captions name it.
        fresh: first runs, each in a process of its own, by their `FRESH_CASE`.
        shared: trainings side by side, and where these rows come from.
    """

    path: Path
    results: Results
    fresh: dict[tuple[Any, ...], Fresh]
    shared: Sharing = Sharing()

    @property
    def on_cpu(self) -> bool:
        return self.results.provenance.get("device", "").startswith("cpu")

    @property
    def device(self) -> str:
        name = self.results.provenance.get("device", "unknown device")
        threads = self.results.provenance.get("threads", "unknown")
        return f"{name.removeprefix('cpu: ')}, {threads} threads" if self.on_cpu else name

    @property
    def source(self) -> str:
        return source(self.results.provenance)

    def rows(self, kind: str) -> list[Row]:
        return [row for row in self.results.rows if kind_of(row) == kind]

    def headline(self, kind: str) -> list[Row]:
        """The rows of the most valuable combination."""
        return next((rows for _, rows in combinations(self.rows(kind), tuple(ORDERS))), [])

    def memory(self, row: Row) -> int | None:
        """Bytes: the peak of the GPU's allocator, on a CPU what a fresh process grew by; only of right results."""
        if row.status != "ok":
            return None
        if not self.on_cpu:
            return row.peak_bytes
        fresh = self.fresh.get(tuple(getattr(row, field) for field in FRESH_CASE))
        return fresh.host_bytes if fresh and fresh.status == "ok" else None


class Standing(NamedTuple):
    """How we stand in one layer: `best` is the fastest baseline, `real` a real layer's time over ours."""

    layer: str
    ours: Row | None
    best: Row | None
    real: float | None
    failed: list[Row]

    @property
    def speedup(self) -> float | None:
        return ratio(median(self.best), median(self.ours))


def load(folder: Path) -> list[Measured]:
    """The runs in the folders of a folder; GPUs first, then by name.

    Raises:
        ValueError: there is no such folder, or a file in it has another schema.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of results")
    found = [load_run(path.parent) for path in folder.glob("*/results.csv")]
    return sorted(found, key=lambda measured: (measured.on_cpu, measured.path))


def load_run(folder: Path) -> Measured:
    """The results.csv of a folder, and the fresh.csv and sharing.csv beside it if there are any.

    Raises:
        ValueError: there is no results.csv, or one of the files has another schema.
    """
    path = folder / "results.csv"
    if not path.is_file():
        raise ValueError(f"{folder}: it has no results.csv; `python -m bench run --out FOLDER` writes one")
    fresh, _ = _lines(path.with_name("fresh.csv"), Fresh)
    by_case = {tuple(getattr(row, field) for field in FRESH_CASE): row for row in fresh}
    return Measured(path, read(path), by_case, Sharing(*_lines(path.with_name("sharing.csv"), Shared)))


def kind_of(row: Row) -> str:
    """What a row is of: "layers", "anti-transfer", "step", "epoch", "inference"; the suite "cpu" holds all of them."""
    if row.suite != "cpu":
        return {"conv": "layers", "linear": "layers", "atl": "anti-transfer"}.get(row.suite, row.suite)
    if row.work == "epoch":
        return "epoch"
    starts = {"whole network": "inference", NO_AT: "step", "AT at ": "step", "layers ": "anti-transfer"}
    return next((kind for start, kind in starts.items() if row.layer.startswith(start)), "layers")


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[tuple[Any, list[Row]]]:
    """Rows of equal key, in the order of their first."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


def combinations(rows: Iterable[Row], fields: tuple[str, ...]) -> list[tuple[Any, list[Row]]]:
    """Rows of equal fields, most valuable first: the nearer to the head of each of `ORDERS`, in sum, the more."""

    def places(group: tuple[Any, list[Row]]) -> tuple[Any, ...]:
        found = [place(getattr(group[1][0], field), ORDERS[field]) for field in ORDERS if field in fields]
        return sum(place[0] for place in found), found

    return sorted(grouped(rows, lambda row: tuple(getattr(row, field) for field in fields)), key=places)


def place(value: Any, order: Sequence[Any] = (NO_AT,)) -> tuple[Any, ...]:
    """Sorts as listed, then in the natural way: "conv 2" before "conv 10"."""
    text = str(value)
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    return order.index(value) if value in order else len(order), re.sub(r"[\d-]", "", text), numbers


def standings(rows: Iterable[Row]) -> list[Standing]:
    """One for each layer of one combination; of variants that add a baseline, that with the lowest speed-up."""
    lines = []
    for layer, of_layer in grouped(rows, label):
        cases = [standing(layer, case) for _, case in grouped(of_layer, attrgetter("variant"))]
        worst = min(cases, key=lambda case: math.inf if case.speedup is None else case.speedup)
        real = next((case.real for case in cases if case.real), None)
        lines.append(worst._replace(real=real, failed=[row for case in cases for row in case.failed]))
    return sorted(lines, key=lambda line: place(line.layer))


def standing(layer: str, rows: Sequence[Row]) -> Standing:
    """Ours among the rows of one case; only of right results is one the best."""
    ours = next((row for row in rows if row.provider in OURS), None)
    best = _fastest(row for row in rows if not row.provider.startswith(("ours", "real")))
    real = _fastest(row for row in rows if row.provider.startswith("real"))
    return Standing(layer, ours, best, ratio(median(real), median(ours)), [row for row in rows if row.status != "ok"])


def parts(rows: Iterable[Row]) -> list[float] | None:
    """Microseconds of the `PARTS` of one step, whose works the rows are; nothing where one was not measured.

    They add up to the step: where noise makes a work longer than one that holds it, it ends with that.
    """
    timed = {row.work: row for row in rows if median(row) is not None}
    ends: list[float] = []
    for work in reversed(WORKS):
        if row := timed.get(work):
            ends.insert(0, min([row.median_us or 0.0, *ends[:1]]))
        elif work == WORKS[0] and ends and any(row.layer == NO_AT or "cached" in row.variant for row in timed.values()):
            ends.insert(0, 0.0)
        else:
            return None
    return [end - start for start, end in itertools.pairwise((0.0, *ends))]


def best(rows: Iterable[Row], network: str, measure: Measure, provider: str | None = None) -> tuple[float, str] | None:
    """The lowest figure of a network and whose it is: of one provider's, or of all."""
    mine = [row for row in rows if row.network == network and provider in (None, row.provider)]
    return min(((value, row.provider) for row in mine if (value := measure(row))), default=None)


def median(row: Row | None) -> float | None:
    """Microseconds, of what has a right result."""
    return row.median_us if row and row.status == "ok" else None


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b, where both are known and b is not 0."""
    return a / b if a is not None and b else None


def label(row: Row) -> str:
    """The layer, with its variant unless that only adds a baseline."""
    return row.layer if row.variant.startswith("against ") else joined(row.layer, row.variant)


def source(provenance: Mapping[str, str]) -> str:
    """Where rows come from."""
    found = {name: provenance.get(name) or "unknown" for name in ("commit", "torch", "date")}
    return f"commit {found['commit']}, PyTorch {found['torch']}, {found['date']}"


def words(row: Row | Shared, *fields: str) -> str:
    """Values of a row's fields, such as "bf16, batch 20, CUDA graph"."""
    names = {"network": f"{row.network} network", "batch": f"batch {row.batch}"}
    names["mode"] = "CUDA graph" if row.mode == "graph" else row.mode
    return ", ".join(names.get(field, getattr(row, field)) for field in fields)


def joined(*texts: str) -> str:
    """Those that are not empty, with commas."""
    return ", ".join(filter(None, texts))


def number(value: float | None) -> str:
    """Two decimals, of what is known."""
    return "" if value is None else f"{value:.2f}"


def scaled(value: float | None, units: Sequence[tuple[float, str]]) -> str:
    """Three digits and the unit that suits, of what is known."""
    if value is None:
        return ""
    size, unit = next(((size, unit) for size, unit in units if abs(value) >= size), units[-1])
    return f"{value / size:.0f} {unit}" if abs(value) >= 100 * size else f"{value / size:.3g} {unit}"


def _fastest(rows: Iterable[Row]) -> Row | None:
    return min((row for row in rows if median(row)), key=lambda row: row.median_us or 0.0, default=None)


def _lines(path: Path, of: Any) -> tuple[list[Any], dict[str, str]]:
    """The rows of a CSV file, if there is one, and what it says of the first's provenance."""
    rows: list[Any] = []
    provenance: dict[str, str] = {}
    kinds = typing.get_type_hints(of)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for line, values in enumerate(csv.DictReader(text.splitlines()), 2):
        if lacking := [field for field in kinds if values.get(field) is None]:
            raise ValueError(f"{path}:{line}: not a {path.name}: it lacks {', '.join(lacking)}")
        rows.append(of(**{field: _value(f"{path}:{line}: {field}", values[field], kinds[field]) for field in kinds}))
        provenance = provenance or {name: value for name, value in values.items() if name not in kinds}
    return rows, provenance


def _value(name: str, text: str, kind: Any) -> Any:
    """A text as the first type of a field's; nothing where it is empty and may be."""
    type_, *others = typing.get_args(kind) or (kind,)
    if others and not text:
        return None
    try:
        return type_(text)
    except ValueError as error:
        what = "a whole number" if type_ is int else "a number"
        raise ValueError(f"{name} is {text!r}; it is {what}{' or empty' if others else ''}") from error
