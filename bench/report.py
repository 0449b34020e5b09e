"""What a reader sees of the benchmarks: README tables and SVG charts, made from the committed results.

A speed-up is the time of the fastest baseline that computes the same over ours, from one case, whose runs took turns;
below 1 we lose. "Ours" is what a user gets who sets nothing; forms of ours to be asked for are in the charts only.
"""

import csv
import io
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from bench.case import STEP as FORWARD_BACKWARD
from bench.results import Results, Row, read
from qat.files import replacing

OURS, CACHED, RESEARCH = ("ours", "ours auto"), "ours, cached target", "research style"
NO_AT, MISSING = "no AT", "not measured"
# At most: tables of one device and kind, its conditions and layers beside the paper, lines of a table.
TABLES, CONDITIONS, LINES = 2, 2, 30
MEMORY = "Memory: the GPU allocator's peak beside the operands, or, on a CPU, what a fresh process grew by."
SPREAD = 0.05  # of the median, from where on p20 and p80 are shown
# What makes rows comparable, and which value of it counts most; what is not listed comes behind.
ORDERS: dict[str, tuple[Any, ...]] = {
    "network": ("quaternion", "real", "real-on-embedding"),
    "work": ("step", FORWARD_BACKWARD, "forward", "backward"),
    "precision": ("bf16", "float32", "fp16", "tf32"),
    "batch": (20,),
    "mode": ("graph", "eager"),
}
PAPER_NETWORKS = ("quaternion", "real")
CONDITION = ("batch", "precision", "mode")
SEMANTICS = ("paper", "folded-rowwise")
TIMES = ((1e6, "s"), (1e3, "ms"), (1.0, "µs"))
BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
FRESH_CASE = ("suite", "network", "layer", "variant", "batch", "precision", "work", "provider")
FRESH_BYTES = ("peak_bytes", "gpu_bytes", "host_bytes")
# The works of a step, each of which holds those before it: the differences are its parts.
WORKS = ("twin forward", "forward", FORWARD_BACKWARD, "step")
PARTS = {"twin": "#999999", "rest of forward": "#56b4e9", "backward": "#0072b2", "optimiser": "#e69f00"}
STYLE: dict[str, Any] = {
    "figure.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "bench",  # the same chart has the same bytes
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e8eaed",
    "legend.frameon": False,
}
# Okabe and Ito's, which colour-blind readers can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#999999", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
Measure = Callable[[Row], float | None]


class Measured(NamedTuple):
    """One folder of results, which is one run on one device.

    Args:
        path: of results.csv, as captions name it.
        fresh: lines of fresh.csv by `FRESH_CASE`, all values as text: first runs, each in a process of its own.
    """

    path: Path
    results: Results
    fresh: dict[tuple[str, ...], dict[str, str]]

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
        found = {name: self.results.provenance.get(name) or "unknown" for name in ("commit", "torch", "date")}
        return f"commit {found['commit']}, PyTorch {found['torch']}, {found['date']}"

    def rows(self, kind: str) -> list[Row]:
        return [row for row in self.results.rows if kind_of(row) == kind]

    def memory(self, row: Row) -> int | None:
        """Bytes: the peak of the GPU's allocator, on a CPU what a fresh process grew by; only of right results."""
        if row.status != "ok":
            return None
        if not self.on_cpu:
            return row.peak_bytes
        fresh = self.fresh.get(tuple(str(getattr(row, field)) for field in FRESH_CASE), {})
        return int(fresh["host_bytes"]) if fresh.get("host_bytes") and fresh["status"] == "ok" else None


class Standing(NamedTuple):
    """How we stand in one layer: `best` is the fastest baseline, `real` a real layer's time over ours."""

    layer: str
    ours: Row | None
    best: Row | None
    real: float | None
    failed: list[Row]

    @property
    def speedup(self) -> float | None:
        return ratio(_median(self.best), _median(self.ours))


class Bar(NamedTuple):
    """Of a chart: whose, at which tick, how far (None: it failed), and what stands at its end."""

    series: str
    tick: int
    end: float | None
    text: str


def load(folder: Path) -> list[Measured]:
    """Every `*/results.csv` below a folder, with the fresh.csv beside it; GPUs first, then by name.

    Raises:
        ValueError: there is no such folder, or a file in it has another schema.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of results")
    found = [Measured(path, read(path), _fresh(path.with_name("fresh.csv"))) for path in folder.glob("*/results.csv")]
    return sorted(found, key=lambda measured: (measured.on_cpu, measured.path))


def kind_of(row: Row) -> str:
    """What a row is of: "layers", "anti-transfer", "step", "epoch", "inference"; the suite "cpu" holds all of them."""
    if row.suite != "cpu":
        return {"conv": "layers", "linear": "layers", "atl": "anti-transfer"}.get(row.suite, row.suite)
    if row.work == "epoch":
        return "epoch"
    starts = {"whole network": "inference", NO_AT: "step", "AT at ": "step", "layers ": "anti-transfer"}
    return next((kind for start, kind in starts.items() if row.layer.startswith(start)), "layers")


def standings(rows: Iterable[Row]) -> list[Standing]:
    """One for each layer of one combination; of variants that add a baseline, that with the lowest speed-up."""
    lines = []
    for layer, of_layer in _grouped(rows, _label):
        cases = [_standing(layer, case) for _, case in _grouped(of_layer, attrgetter("variant"))]
        worst = min(cases, key=lambda case: math.inf if case.speedup is None else case.speedup)
        real = next((case.real for case in cases if case.real), None)
        lines.append(worst._replace(real=real, failed=[row for case in cases for row in case.failed]))
    return sorted(lines, key=lambda line: _place(line.layer))


def parts(rows: Iterable[Row]) -> list[float] | None:
    """Microseconds of the `PARTS` of one step, whose works the rows are; nothing where one was not measured.

    They add up to the step: where noise makes a work longer than one that holds it, it ends with that.
    """
    timed = {row.work: row for row in rows if _median(row) is not None}
    ends: list[float] = []
    for work in reversed(WORKS):
        if row := timed.get(work):
            ends.insert(0, min([row.median_us or 0.0, *ends[:1]]))
        elif work == WORKS[0] and ends and any(row.layer == NO_AT or "cached" in row.variant for row in timed.values()):
            ends.insert(0, 0.0)
        else:
            return None
    return [end - start for start, end in itertools.pairwise((0.0, *ends))]


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def layers(measured: Sequence[Measured]) -> str:
    """Speed of convolutions and linear maps: the most valuable tables of each device, and all the others in short."""
    return _by_device(measured, "layers", tuple(ORDERS), _layer_table, _overview)


def anti_transfer(measured: Sequence[Measured]) -> str:
    """Time and memory of the anti-transfer loss, by layer and semantics."""
    return _by_device(measured, "anti-transfer", tuple(ORDERS), _loss_table)


def step(measured: Sequence[Measured]) -> str:
    """Time and memory by provider of training steps; in short of epochs, inference and first calls."""
    return _by_device(measured, "step", CONDITION, _step_table, _beside_steps)


def paper(measured: Sequence[Measured]) -> str:
    """The paper's figures beside ours."""
    against_real, against_none = [], []
    for m in measured or [Measured(Path(), Results([], {"device": MISSING}), {})]:
        for _, rows in _combinations(_whole_steps(m), CONDITION)[:CONDITIONS] or [((), [])]:
            where = _joined(m.device, *(_words(row, *CONDITION) for row in rows[:1]))
            against_real += _against_real(m, where, rows)
            against_none += _against_none(m, where, rows)
    control = "control: real on the embedding"
    head = ["training step", "conditions", "layer", "paper", "best providers", control, f"both {RESEARCH}", control]
    cost = ["network", "provider", "conditions", "time (AT paper: 2.8x)", "memory (AT paper: up to +100 %)"]
    return f"""\
Quaternion network against the real one (paper: WASPAA 2023, means over its trainings). *Best providers*: each side by
the one with its lowest figure, named in this order. The *control*, a real network on the quaternion network's input
against the real network, tells how much of the gain comes from the smaller input alone. {MEMORY}

{_table(head, against_real)}

Anti-transfer (AT) against none, same network and provider, at the layers where it costs least and most (AT paper:
Guizzo, Weyde and Tarroni, 2021, a real network). *Cached targets*: the frozen network is not run.

{_table(cost, against_none)}"""


SECTIONS = {"layers": layers, "anti-transfer": anti_transfer, "step": step, "paper": paper}


def charts(measured: Sequence[Measured]) -> dict[tuple[str, str], str]:
    """SVG by section and file name, of every chart whose rows exist; the same results give the same bytes."""
    from matplotlib import style

    drawers = (
        ("layers", "layers", _speeds),
        ("layers", "roofline", _roofline),
        ("anti-transfer", "memory", _memory),
        ("step", "step", _steps),
    )
    drawn = {}
    with style.context(["default", STYLE]):
        for m, (section, name, draw) in itertools.product(measured, drawers):
            if figure := draw(m):
                svg = io.StringIO()
                figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
                drawn[section, f"{name}-{m.path.parent.name}.svg"] = svg.getvalue()
    return drawn


def write_report(results_folder: Path, docs_folder: Path, readme: Path) -> None:
    """Write the charts to `bench/*.svg` of a folder, and into a README what belongs between its markers.

    What stands between `<!-- bench: NAME -->` and `<!-- /bench -->` becomes the section NAME, of `SECTIONS`. A file is
    replaced whole, after everything was made, and only if it changes.

    Raises:
        ValueError: of `filled` and `load`.
    """
    root, folder = readme.parent, docs_folder / "bench"
    measured = [m._replace(path=Path(os.path.relpath(m.path, root))) for m in load(results_folder)]
    drawn = charts(measured)
    sections = {}
    for name, make in SECTIONS.items():
        files = [file for section, file in drawn if section == name]
        images = [f"![{file[:-4]}]({Path(os.path.relpath(folder / file, root)).as_posix()})" for file in files]
        sections[name] = "\n\n".join((*images, make(measured)))
    text = filled(readme.read_bytes().decode(), sections, str(readme))
    for path, new in [*((folder / file, svg) for (_, file), svg in drawn.items()), (readme, text)]:
        if not path.is_file() or path.read_bytes() != new.encode():
            with replacing(path) as draft:
                draft.write_bytes(new.encode())


def filled(text: str, sections: dict[str, str], name: str) -> str:
    """A text with its sections between their markers, in the text's own line ends; nothing else is touched.

    Raises:
        ValueError: an unknown section, or an opening or closing marker alone: the message has file, line and rule.
    """
    end = "\r\n" if "\r\n" in text else "\n"
    pieces, copied, opened, line = [], 0, None, ""
    for marker in re.finditer(r"<!--\s*(?:bench:\s*(?P<name>.*?)|(?P<close>/bench))\s*-->", text):
        if opened and not marker["close"]:
            break
        line = f"{name}:{text.count(chr(10), 0, marker.start()) + 1}"
        if opened:
            pieces += [text[copied : opened.end()], end, sections[opened["name"]].replace("\n", end), end]
            copied, opened = marker.start(), None
        elif marker["close"]:
            raise ValueError(f"{line}: <!-- /bench --> closes no <!-- bench: NAME -->")
        elif marker["name"] not in sections:
            raise ValueError(f"{line}: no section {marker['name']!r}; a marker names one of {', '.join(sections)}")
        else:
            opened = marker
    if opened:
        raise ValueError(f"{line}: <!-- bench: {opened['name']} --> needs a <!-- /bench --> before the next marker")
    return "".join((*pieces, text[copied:]))


def _fresh(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    if not path.is_file():
        return {}
    found = {}
    for number, line in enumerate(csv.DictReader(path.read_text(encoding="utf-8").splitlines()), 2):
        needed = (*FRESH_CASE, *FRESH_BYTES, "first_call_s", "status")
        if lacking := [field for field in needed if line.get(field) is None]:
            raise ValueError(f"{path}:{number}: not a fresh.csv: it lacks {', '.join(lacking)}")
        if wrong := [field for field in FRESH_BYTES if not re.fullmatch(r"-?\d*", line[field])]:
            raise ValueError(f"{path}:{number}: {wrong[0]} is {line[wrong[0]]!r}; it is a whole number or empty")
        found[tuple(line[field] for field in FRESH_CASE)] = line
    return found


def _grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[tuple[Any, list[Row]]]:
    """Rows of equal key, in the order of their first."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.items())


def _combinations(rows: Iterable[Row], fields: tuple[str, ...]) -> list[tuple[Any, list[Row]]]:
    """Rows of equal fields, most valuable first: the nearer to the head of each of `ORDERS`, in sum, the more."""

    def places(group: tuple[Any, list[Row]]) -> tuple[Any, ...]:
        found = [_place(getattr(group[1][0], field), ORDERS[field]) for field in ORDERS if field in fields]
        return sum(place[0] for place in found), found

    return sorted(_grouped(rows, lambda row: tuple(getattr(row, field) for field in fields)), key=places)


def _place(value: Any, order: Sequence[Any] = (NO_AT,)) -> tuple[Any, ...]:
    """Sorts as listed, then in the natural way: "conv 2" before "conv 10"."""
    text = str(value)
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    return order.index(value) if value in order else len(order), re.sub(r"[\d-]", "", text), numbers


def _standing(layer: str, rows: Sequence[Row]) -> Standing:
    ours = next((row for row in rows if row.provider in OURS), None)
    best = _fastest(row for row in rows if not row.provider.startswith(("ours", "real")))
    real = _fastest(row for row in rows if row.provider.startswith("real"))
    return Standing(layer, ours, best, ratio(_median(real), _median(ours)), [row for row in rows if row.status != "ok"])


def _median(row: Row | None) -> float | None:
    """Microseconds, of what has a right result."""
    return row.median_us if row and row.status == "ok" else None


def _fastest(rows: Iterable[Row]) -> Row | None:
    return min((row for row in rows if _median(row)), key=lambda row: row.median_us or 0.0, default=None)


def _whole_steps(m: Measured) -> list[Row]:
    return [row for row in m.rows("step") if row.work == "step"]


def _label(row: Row) -> str:
    """The layer, with its variant unless that only adds a baseline."""
    return row.layer if row.variant.startswith("against ") else _joined(row.layer, row.variant)


def _words(row: Row, *fields: str) -> str:
    words = {"network": f"{row.network} network", "batch": f"batch {row.batch}"}
    words["mode"] = "CUDA graph" if row.mode == "graph" else row.mode
    return ", ".join(words.get(field, getattr(row, field)) for field in fields)


def _by_device(
    measured: Sequence[Measured],
    kind: str,
    fields: tuple[str, ...],
    table: Callable[[Measured, list[Row]], str],
    more: Callable[[Measured], str] = lambda measured: "",
) -> str:
    pieces = []
    for m in measured:
        groups = _combinations(_whole_steps(m) if kind == "step" else m.rows(kind), fields)
        if groups:
            path = m.path.as_posix()
            shown = f"{min(TABLES, len(groups))} of {len(groups)} tables, all rows in [{path}]({path})"
            note = "" if kind == "layers" else f" {MEMORY}"
            pieces.append(f"**{m.device}**: {m.source}. Medians, with p20 to p80 if over 5 % apart; {shown}.{note}")
            pieces += [f"*{_words(rows[0], *fields)}*\n\n{table(m, rows)}" for _, rows in groups[:TABLES]]
            pieces.append(more(m))
    return "\n\n".join(filter(None, pieces)) or "Not measured yet."


def _layer_table(m: Measured, rows: list[Row]) -> str:
    head = ["layer", "ours", "best baseline", "by", "speed-up", "real layer / ours", "% of roof", "no time"]
    lines = []
    for line in standings(rows):
        roof = line.ours.percent_of_roof if _median(line.ours) and line.ours else None
        numbers = [_number(line.speedup), _number(line.real), "" if roof is None else f"{roof:.0f}"]
        lines.append([line.layer, _time(line.ours), _time(line.best), _name(line.best), *numbers, _failures(line)])
    return _table(head, lines)


def _overview(m: Measured) -> str:
    """Geometric mean of the speed-ups and the lowest, of every combination; "conv 11-13" counts three times."""
    cells: dict[str, dict[str, str]] = {}
    for _, rows in _combinations(m.rows("layers"), tuple(ORDERS)):
        pairs = [(line.speedup, re.fullmatch(r"conv (\d+)-(\d+)", line.layer)) for line in standings(rows)]
        weighed = [(speed, int(span[2]) - int(span[1]) + 1 if span else 1) for speed, span in pairs if speed]
        if weighed:
            mean = math.exp(sum(n * math.log(speed) for speed, n in weighed) / sum(n for _, n in weighed))
            column = cells.setdefault(_words(rows[0], "work", "mode"), {})
            column[_words(rows[0], "network", "batch", "precision")] = f"{mean:.2f} ({min(weighed)[0]:.2f})"
    names = list(dict.fromkeys(name for column in cells.values() for name in column))
    table = _table(["", *cells], [[name, *(column.get(name, "") for column in cells.values())] for name in names])
    title = "*All combinations: geometric mean of the speed-ups over the network's layers (the lowest)*"
    return f"{title}\n\n{table}" if sum(map(len, cells.values())) > 1 else ""


def _loss_table(m: Measured, rows: list[Row]) -> str:
    head = ["loss", "layers", "ours", "cached target", "best baseline", "by", "speed-up", "cached"]
    head += ["memory: ours", "cached", "least of the baselines", "no time"]
    lines = []
    for (variant, layer), case in _grouped(rows, attrgetter("variant", "layer")):
        line = _standing(layer, case)
        cached = next((row for row in case if row.provider == CACHED), None)
        least = [size for row in case if not row.provider.startswith("ours") and (size := m.memory(row)) is not None]
        gains = [_number(line.speedup), _number(ratio(_median(line.best), _median(cached)))]
        sizes = [
            m.memory(line.ours) if line.ours else None,
            m.memory(cached) if cached else None,
            min(least, default=None),
        ]
        times = [_time(line.ours), _time(cached), _time(line.best), _name(line.best)]
        lines.append([variant, layer.removeprefix("layers "), *times, *gains, *map(_bytes, sizes), _failures(line)])
    return _table(head, sorted(lines, key=lambda line: (_place(line[0], SEMANTICS), _place(line[1]))))


def _step_table(m: Measured, rows: list[Row]) -> str:
    providers = sorted({row.provider for row in rows}, key=lambda name: _place(name, (*OURS, RESEARCH)))
    lines = []
    for key, case in _grouped(rows, attrgetter("network", "layer", "variant")):
        cells = {row.provider: _joined(_time(row), _bytes(m.memory(row))) for row in case}
        lines.append([*key, *(cells.get(name, "") for name in providers), _number(_standing("", case).speedup)])
    lines.sort(key=lambda line: (_place(line[0], ORDERS["network"]), _place(line[1]), line[2]))
    return _table(["network", "layer", "variant", *providers, "speed-up"], lines)


def _beside_steps(m: Measured) -> str:
    pieces = []
    for suite in ("epoch", "inference"):
        for _, rows in _combinations(m.rows(suite), CONDITION)[:1]:
            pieces.append(f"*{suite}, {_words(rows[0], *CONDITION)}*\n\n{_step_table(m, rows)}")
    return "\n\n".join(filter(None, (*pieces, _fresh_table(m))))


def _fresh_table(m: Measured) -> str:
    path = m.path.with_name("fresh.csv").as_posix()
    head = ["", "provider", "seconds to the first result", "GPU allocator", "GPU (NVML)", "host memory", "no result"]
    lines = []
    for key, line in m.fresh.items():
        sizes = [_bytes(int(line[field])) if line[field] else "" for field in FRESH_BYTES]
        failed = "" if line["status"] == "ok" else line["status"]
        lines.append([_joined(*key[:-1]), key[-1], line["first_call_s"], *sizes, failed])
    return f"*In fresh processes ([{path}]({path}))*\n\n{_table(head, lines)}" if lines else ""


def _against_real(m: Measured, where: str, rows: Sequence[Row]) -> list[list[str]]:
    groups = _grouped((row for row in rows if not row.variant), attrgetter("layer"))
    lines = []
    groups.sort(key=lambda group: _place(group[0]))
    for layer, of_layer in groups[:CONDITIONS] or [(MISSING, [])]:
        for figure, published, measure in (("time", "-80.5 %", _median), ("memory", "-53.7 %", m.memory)):
            sides = itertools.product((None, RESEARCH), ("quaternion", "real-on-embedding"))
            changes = [_change(of_layer, network, measure, provider) for provider, network in sides]
            lines.append([figure, where, layer, published, *changes])
    return lines


def _change(rows: Sequence[Row], network: str, measure: Measure, provider: str | None) -> str:
    """A network against the real one: by one provider, or each by its best."""
    best = []
    for side in (network, "real"):
        mine = [row for row in rows if row.network == side and provider in (None, row.provider)]
        found = [(value, row.provider) for row in mine if (value := measure(row))]
        if not found:
            return _joined(MISSING, *(f"{side}: {row.provider} {row.status}" for row in mine if row.status != "ok"))
        best.append(min(found))
    names = "" if provider else f" ({best[0][1]}, {best[1][1]})"
    return f"{100 * (best[0][0] / best[1][0] - 1):+.1f} %{names}"


def _against_none(m: Measured, where: str, rows: Sequence[Row]) -> list[list[str]]:
    bases = {(row.network, row.provider): row for row in rows if row.layer == NO_AT}
    tapped_rows = (row for row in rows if row.layer != NO_AT and row.network in PAPER_NETWORKS)
    groups = _grouped(tapped_rows, attrgetter("network", "provider", "variant"))
    groups.sort(key=lambda group: (_place(group[0][0], ORDERS["network"]), group[0][1:]))
    lines = []
    for (network, provider, variant), tapped in groups or [((MISSING, MISSING, ""), [])]:
        costs = [_costs(tapped, bases.get((network, provider)), measure) for measure in (_median, m.memory)]
        lines.append([network, _joined(provider, variant), where, *costs])
    return lines


def _costs(tapped: Sequence[Row], without: Row | None, measure: Measure) -> str:
    """With anti-transfer over without, at the layers where it is least and most; those that failed."""
    base = measure(without) if without else None
    found = [(cost, row.layer) for row in tapped if (cost := ratio(measure(row), base))]
    spans = (
        [f"{cost:.2f}x ({layer})" for cost, layer in dict.fromkeys((min(found), max(found)))] if found else [MISSING]
    )
    failed = [f"{row.layer} {row.status}" for row in tapped if row.status != "ok"]
    return _joined(" to ".join(spans), *failed).replace("AT at ", "")


def _time(row: Row | None) -> str:
    """A median with its unit, p20 to p80 where they are far apart; the status of what has none."""
    if row is None or row.status != "ok":
        return row.status if row else ""
    low, middle, high = (None if us is None else _scaled(us, TIMES) for us in (row.p20_us, row.median_us, row.p80_us))
    if middle is None:
        return "not timed"
    wide = low and high and (row.p80_us or 0) - (row.p20_us or 0) > SPREAD * (row.median_us or 0)
    return f"{middle} ({low} to {high})" if wide else middle


def _name(row: Row | None) -> str:
    return row.provider if row else ""


def _failures(line: Standing) -> str:
    return _joined(*(f"{row.provider}: {row.status}" for row in line.failed))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _bytes(value: float | None) -> str:
    return "" if value is None else _scaled(value, BYTES)


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    """Three digits and a unit."""
    size, unit = next(((size, unit) for size, unit in units if abs(value) >= size), units[-1])
    return f"{value / size:.0f} {unit}" if abs(value) >= 100 * size else f"{value / size:.3g} {unit}"


def _joined(*words: str) -> str:
    return ", ".join(filter(None, words))


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown of the first `LINES`, without the columns that are empty in all."""
    shown = lines[:LINES]
    kept = [n for n in range(len(head)) if any(line[n] for line in shown)]
    rows = [[cells[n].replace("|", r"\|") for n in kept] for cells in (head, *shown)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], ["---"] * len(kept), *rows[1:]))
    return table if len(lines) <= LINES else f"{table}\n\n{len(lines) - LINES} more lines are not shown."


def _headline(m: Measured, kind: str) -> list[Row]:
    """The rows of the most valuable combination."""
    return next((rows for _, rows in _combinations(m.rows(kind), tuple(ORDERS))), [])


def _speeds(m: Measured) -> Any:
    """Every provider by layer; of one that comes in several ways, such as memory formats, the fastest."""
    rows = _headline(m, "layers")
    lines = {line.layer: line for line in standings(rows) if line.best}
    if not lines:
        return None
    ours = {row.case: _median(row) for row in rows if row.provider in OURS}

    def speed(row: Row, line: Standing) -> float | None:
        """Relative to ours of its case first, if there is one, so that the chart says what the table says."""
        relative = ratio(ours.get(row.case), _median(row))
        if relative is None or line.speedup is None:
            return ratio(_median(line.best), _median(row))
        return relative * line.speedup

    bars = []
    for (family, layer), mine in _grouped(rows, lambda row: (_family(row), _label(row))):
        if layer in lines:
            best = max((found for row in mine if (found := speed(row, lines[layer]))), default=None)
            text = mine[0].status if best is None else _number(best) if family in OURS else ""
            bars.append(Bar(family, list(lines).index(layer), best, text))
    figure, (axis,) = _figure(m, [_words(rows[0], *ORDERS)], "speed, 1 = the best baseline")
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter("{x:g}x")
    axis.axhline(1, color="black", linewidth=1)
    _bars(axis, bars, list(dict.fromkeys(map(_family, rows))), list(lines), 1.0)
    return _with_legend(figure)


def _family(row: Row) -> str:
    return row.provider if row.provider.startswith("ours") else row.provider.split(",")[0]


def _memory(m: Measured) -> Any:
    """Memory of the loss, one panel for each of the first two semantics."""
    rows = _headline(m, "anti-transfer")
    sizes = {row.key: m.memory(row) for row in rows}
    base = min((size for size in sizes.values() if size), default=0) / 2
    if not base:
        return None
    panels = sorted(_grouped(rows, attrgetter("variant")), key=lambda panel: _place(panel[0], SEMANTICS))[:2]
    figure, axes = _figure(m, [_joined(variant, _words(rows[0], *ORDERS)) for variant, _ in panels], "memory")
    for axis, (_, mine) in zip(axes, panels, strict=True):
        ticks = sorted({row.layer for row in mine}, key=_place)
        known = [row for row in mine if sizes[row.key] is not None or row.status != "ok"]
        texts = [_bytes(sizes[row.key]) or row.status for row in known]
        places = [(row.provider, ticks.index(row.layer), sizes[row.key]) for row in known]
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: _bytes(value))
        bars = [Bar(*place, text) for place, text in zip(places, texts, strict=True)]
        _bars(axis, bars, list(dict.fromkeys(row.provider for _, panel in panels for row in panel)), ticks, base)
    return _with_legend(figure)


def _steps(m: Measured) -> Any:
    """Parts of a training step, one panel for each network."""
    rows = [row for row in m.rows("step") if row.provider in ("ours", RESEARCH)]
    rows = next((group for _, group in _combinations(rows, CONDITION)), [])
    bar = attrgetter("network", "layer", "variant", "provider")
    split = {key: parts(works) for key, works in _grouped(rows, bar)}
    if not any(split.values()):
        return None
    panels = sorted(_grouped(rows, attrgetter("network")), key=lambda panel: _place(panel[0], ORDERS["network"]))
    figure, axes = _figure(m, [f"{network}, {_words(rows[0], *CONDITION)}" for network, _ in panels], "ms of a step")
    for axis, (_, mine) in zip(axes, panels, strict=True):
        bars = sorted(_grouped(mine, bar), key=lambda group: (_place(group[0][1]), group[0][2:]))
        for n, (key, works) in enumerate(bars):
            times = [1e-3 * time for time in split[key] or ()]
            for part, time, below in zip(PARTS, times, itertools.accumulate(times, initial=0.0), strict=False):
                axis.bar(n, time, 0.8, below, color=PARTS[part])
            failed = _joined(*dict.fromkeys(row.status for row in works if row.status != "ok")) or MISSING
            axis.text(n, sum(times), _scaled(1e3 * sum(times), TIMES) if times else failed, ha="center", va="bottom")
        axis.set_xticks(range(len(bars)), [_joined(*key[1:]) for key, _ in bars], rotation=20, ha="right")
        axis.set_xlim(-0.6, len(bars) - 0.4)  # also where the last has no height
        axis.grid(axis="x", visible=False)
        axis.margins(y=0.15)
    for part, colour in PARTS.items():
        axes[0].bar(0, 0, color=colour, label=part)
    return _with_legend(figure)


def _roofline(m: Measured) -> Any:
    """Rates of ours (full) and of the best baseline (hollow) at every batch size, under the measured roof."""
    first = next(iter(_headline(m, "layers")), None)
    if first is None:
        return None
    same = attrgetter(*(field for field in ORDERS if field != "batch"))
    batches = _combinations((row for row in m.rows("layers") if same(row) == same(first)), ("batch",))
    figure, (axis,) = _figure(m, [_words(first, "network", "work", "precision", "mode")], "TFLOP/s")
    reach = []
    for ((batch,), rows), colour in zip(batches, itertools.cycle(COLOURS), strict=False):
        for who, face in (("ours", colour), ("best", "white")):
            found = [(line.layer, row) for line in standings(rows) if _median(row := getattr(line, who))]
            x = [row.flops / row.bytes for _, row in found]
            y = [1e-6 * row.flops / row.median_us for _, row in found]
            label = f"{'best baseline' if who == 'best' else who}, batch {batch}"
            axis.plot(x, y, "o", color=colour, markerfacecolor=face, label=label)
            for (layer, _), *point in zip(found, x, y, strict=True) if who == "ours" else ():
                axis.annotate(layer, point, (4, 2), textcoords="offset points", fontsize=6.5)
            reach += x
    rates = [m.results.provenance.get(name) for name in ("roof_bandwidth", f"roof_{first.precision}")]
    if all(rates) and reach:
        bandwidth, flops = (1e-12 * float(rate or 0) for rate in rates)
        x = sorted({*reach, flops / bandwidth})
        axis.plot(x, [min(flops, bandwidth * intensity) for intensity in x], color="black", label="measured roof")
    axis.set(xscale="log", yscale="log", xlabel="FLOP per byte of the definition")
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter("{x:g}")
        scale.set_minor_formatter("")
    return _with_legend(figure) if reach else None


def _figure(m: Measured, titles: Sequence[str], ylabel: str) -> tuple[Any, Any]:
    """A figure that names its device, commit and date, with panels below one another."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.6 + 3.6 * len(titles)), layout="constrained")
    figure.suptitle(f"{m.device}; {m.source}", fontsize=9, x=0.01, ha="left")
    axes = figure.subplots(len(titles), squeeze=False)[:, 0]
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, ylabel=ylabel)
    return figure, axes


def _with_legend(figure: Any) -> Any:
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=6)
    return figure


def _bars(axis: Any, bars: Sequence[Bar], names: Sequence[str], ticks: Sequence[str], base: float) -> None:
    """Groups of bars of the named series, from `base` up or down, each with its text at the end."""
    width = 0.8 / len(names)
    for n, (name, colour) in enumerate(zip(names, itertools.cycle(COLOURS), strict=False)):
        mine = [(bar.tick + (n - (len(names) - 1) / 2) * width, bar) for bar in bars if bar.series == name]
        ends = [base if bar.end is None else max(bar.end, 1e-3 * base) for _, bar in mine]
        axis.bar([x for x, _ in mine], [end - base for end in ends], width, base, color=colour, label=name)
        for (x, bar), end in zip(mine, ends, strict=True):
            side = "bottom" if end >= base else "top"
            axis.text(x, end, f" {bar.text} ", rotation=90, fontsize=7, ha="center", va=side)
    axis.set_xticks(range(len(ticks)), ticks)
    axis.grid(axis="x", visible=False)
    axis.margins(y=0.2)
