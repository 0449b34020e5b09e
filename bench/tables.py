"""Sections of a report as Markdown tables, each made from all the runs that it is to show."""

import itertools
import math
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from bench import grid as grids
from bench.layers import count_of
from bench.results import Results, Row
from bench.sharing import PROCESSES, Shared, most
from bench.summary import (
    BYTES,
    CACHED,
    CONDITION,
    FRESH_CASE,
    MICROSECONDS,
    MISSING,
    NO_AT,
    ORDERS,
    OURS,
    RESEARCH,
    SEMANTICS,
    Measure,
    Measured,
    Standing,
    best,
    combinations,
    grouped,
    joined,
    median,
    number,
    place,
    ratio,
    scaled,
    source,
    standing,
    standings,
    words,
)

# At most: tables of one device and kind, its conditions and layers beside the paper, lines of a table.
TABLES, CONDITIONS, LINES = 2, 2, 30
PAPER_NETWORKS = ("quaternion", "real")
MEMORY = "Memory: the GPU allocator's peak beside the operands, or, on a CPU, what a fresh process grew by."
SPREAD = 0.05  # of the median, from where on p20 and p80 are shown
SECONDS = ((1.0, "s"),)


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
    """The paper's figures beside ours, each precision in its most valuable condition only."""
    against_real, against_none = [], []
    for m in measured or [Measured(Path(), Results([], {"device": MISSING}), {})]:
        by_precision: dict[str, list[Row]] = {}
        for _, rows in combinations(_whole_steps(m), CONDITION):
            by_precision.setdefault(rows[0].precision, rows)
        for rows in list(by_precision.values())[:CONDITIONS] or [[]]:
            where = joined(m.device, *(words(row, *CONDITION) for row in rows[:1]))
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


def sharing(measured: Sequence[Measured]) -> str:
    """Trainings an hour of one device by how it is shared."""
    head = ["each trains", "mode", "processes", "threads of each", "samples/s in all", "trainings an hour"]
    head += ["GPU allocator, each", "no result"]
    pieces = []

    def order(row: Shared) -> tuple[Any, ...]:
        return place(row.precision, ORDERS["precision"]), place(row.mode, (PROCESSES,)), row.processes

    for m in measured:
        lines = []
        for row in sorted(m.shared.rows, key=order):
            case = joined(words(row, "network"), row.layer, row.variant, words(row, "batch", "precision"))
            speed = "" if row.samples_per_second is None else f"{row.samples_per_second:.0f}"
            gain = "" if row.trainings_relative is None else f"{row.trainings_relative:.2f}x"
            failed = "" if row.status == "ok" else row.status
            sizes = [str(row.processes), str(row.threads_each), speed, gain, scaled(row.peak_bytes, BYTES), failed]
            lines.append([case, row.mode, *sizes])
        if lines:
            path = m.path.with_name("sharing.csv").as_posix()
            caption = f"**{m.device}**: {source(m.shared.provenance)}. All rows in [{path}]({path})."
            against = "*Trainings an hour*: against one after another, each with the whole device."
            pieces.append(f"{caption} {against}\n\n{_table(head, lines)}")
    return "\n\n".join(pieces) or "Not measured yet."


def grid(measured: Sequence[Measured]) -> str:
    """Hours of the paper's grid on one GPU."""
    head = ["device", "steps", *(f"{network} network, an epoch" for network in grids.NETWORKS), "both, an epoch"]
    head += ["both, 100 epochs", "quaternion network, 100 epochs, side by side"]
    lines = [_grid_line(m, way) for m in measured if not m.on_cpu for way in grids.WAYS]
    corpora = ", ".join(f"{name} {utterances}" for name, utterances in grids.CORPORA.items())
    whole, tapped = grids.TRAININGS + grids.OTHERS, ", ".join(map(str, grids.MEASURED))
    return f"""\
GPU-hours of {grids.TRAININGS} of the paper's {whole} trainings: two networks, three corpora ({corpora} utterances,
one cut each) in two splits, each once without anti-transfer and with four kinds of it at each of {grids.LAYERS} layers.
The other {grids.OTHERS} have other batches and inputs and are left out. An epoch is 70 % of a corpus in steps of
{grids.BATCH} and 20 % in forward passes, {grids.PRECISION}, and nothing else. Anti-transfer at layers {tapped}
is measured; between them it is interpolated linearly, and layer 1 is taken as layer {grids.MEASURED[0]}.
*Side by side*: with the most trainings an hour of the table of that name, which are of anti-transfer at layer 2.

{_table(head, lines or [[MISSING] * len(head)])}"""


SECTIONS = {
    "layers": layers,
    "anti-transfer": anti_transfer,
    "step": step,
    "sharing": sharing,
    "paper": paper,
    "grid": grid,
}


def _by_device(
    measured: Sequence[Measured],
    kind: str,
    fields: tuple[str, ...],
    table: Callable[[Measured, list[Row]], str],
    more: Callable[[Measured], str] = lambda measured: "",
) -> str:
    """Of each device a caption, the tables of its most valuable combinations, and what more there is."""
    pieces = []
    for m in measured:
        groups = combinations(_whole_steps(m) if kind == "step" else m.rows(kind), fields)
        if groups:
            path = m.path.as_posix()
            shown = f"{min(TABLES, len(groups))} of {len(groups)} tables, all rows in [{path}]({path})"
            note = "" if kind == "layers" else f" {MEMORY}"
            pieces.append(f"**{m.device}**: {m.source}. Medians, with p20 to p80 if over 5 % apart; {shown}.{note}")
            pieces += [f"*{words(rows[0], *fields)}*\n\n{table(m, rows)}" for _, rows in groups[:TABLES]]
            pieces.append(more(m))
    return "\n\n".join(filter(None, pieces)) or "Not measured yet."


def _whole_steps(m: Measured) -> list[Row]:
    return [row for row in m.rows("step") if row.work == "step"]


def _layer_table(m: Measured, rows: list[Row]) -> str:
    head = ["layer", "ours", "best baseline", "by", "speed-up", "real layer / ours", "% of roof", "no time"]
    lines = []
    for line in standings(rows):
        roof = line.ours.percent_of_roof if median(line.ours) and line.ours else None
        numbers = [number(line.speedup), number(line.real), "" if roof is None else f"{roof:.0f}"]
        lines.append([line.layer, _time(line.ours), _time(line.best), _name(line.best), *numbers, _failures(line)])
    return _table(head, lines)


def _overview(m: Measured) -> str:
    """Geometric mean of the speed-ups and the lowest, of every combination; "conv 11-13" counts three times."""
    cells: dict[str, dict[str, str]] = {}
    for _, rows in combinations(m.rows("layers"), tuple(ORDERS)):
        weighed = [(line.speedup, count_of(line.layer)) for line in standings(rows) if line.speedup]
        if weighed:
            mean = math.exp(sum(n * math.log(speed) for speed, n in weighed) / sum(n for _, n in weighed))
            column = cells.setdefault(words(rows[0], "work", "mode"), {})
            column[words(rows[0], "network", "batch", "precision")] = f"{mean:.2f} ({min(weighed)[0]:.2f})"
    names = list(dict.fromkeys(name for column in cells.values() for name in column))
    table = _table(["", *cells], [[name, *(column.get(name, "") for column in cells.values())] for name in names])
    title = "*All combinations: geometric mean of the speed-ups over the network's layers (the lowest)*"
    return f"{title}\n\n{table}" if sum(map(len, cells.values())) > 1 else ""


def _loss_table(m: Measured, rows: list[Row]) -> str:
    head = ["loss", "layers", "ours", "cached target", "best baseline", "by", "speed-up", "cached"]
    head += ["memory: ours", "cached", "least of the baselines", "no time"]
    lines = []
    for (variant, layer), case in grouped(rows, attrgetter("variant", "layer")):
        line = standing(layer, case)
        cached = next((row for row in case if row.provider == CACHED), None)
        times = [_time(line.ours), _time(cached), _time(line.best), _name(line.best)]
        gains = [number(line.speedup), number(ratio(median(line.best), median(cached)))]
        baselines = [m.memory(row) for row in case if not row.provider.startswith("ours")]
        least = min((size for size in baselines if size is not None), default=None)
        sizes = [*(m.memory(row) if row else None for row in (line.ours, cached)), least]
        memory = [scaled(size, BYTES) for size in sizes]
        lines.append([variant, layer.removeprefix("layers "), *times, *gains, *memory, _failures(line)])
    return _table(head, sorted(lines, key=lambda line: (place(line[0], SEMANTICS), place(line[1]))))


def _step_table(m: Measured, rows: list[Row]) -> str:
    providers = sorted({row.provider for row in rows}, key=lambda name: place(name, (*OURS, RESEARCH)))
    lines = []
    for key, case in grouped(rows, attrgetter("network", "layer", "variant")):
        cells = {row.provider: joined(_time(row), scaled(m.memory(row), BYTES)) for row in case}
        lines.append([*key, *(cells.get(name, "") for name in providers), number(standing("", case).speedup)])
    lines.sort(key=lambda line: (place(line[0], ORDERS["network"]), place(line[1]), line[2]))
    return _table(["network", "layer", "variant", *providers, "speed-up"], lines)


def _beside_steps(m: Measured) -> str:
    pieces = []
    for kind in ("epoch", "inference"):
        for _, rows in combinations(m.rows(kind), CONDITION)[:1]:
            pieces.append(f"*{kind}, {words(rows[0], *CONDITION)}*\n\n{_step_table(m, rows)}")
    return "\n\n".join(filter(None, (*pieces, _fresh_table(m))))


def _fresh_table(m: Measured) -> str:
    path = m.path.with_name("fresh.csv").as_posix()
    head = ["", "provider", "first call", "first call, nothing compiled"]
    head += ["GPU allocator", "GPU (NVML)", "host memory", "no result"]
    lines = []
    for line in m.fresh.values():
        *case, provider = (str(getattr(line, field)) for field in FRESH_CASE)
        times = [scaled(seconds, SECONDS) for seconds in (line.first_call_s, line.cold_call_s)]
        sizes = [scaled(size, BYTES) for size in (line.peak_bytes, line.gpu_bytes, line.host_bytes)]
        lines.append([joined(*case), provider, *times, *sizes, "" if line.status == "ok" else line.status])
    return f"*In fresh processes ([{path}]({path}))*\n\n{_table(head, lines)}" if lines else ""


def _against_real(m: Measured, where: str, rows: Sequence[Row]) -> list[list[str]]:
    groups = grouped((row for row in rows if not row.variant), attrgetter("layer"))
    groups.sort(key=lambda group: place(group[0]))
    lines = []
    for layer, of_layer in groups[:CONDITIONS] or [(MISSING, [])]:
        for figure, published, measure in (("time", "-80.5 %", median), ("memory", "-53.7 %", m.memory)):
            sides = itertools.product((None, RESEARCH), ("quaternion", "real-on-embedding"))
            changes = [_change(of_layer, network, measure, provider) for provider, network in sides]
            lines.append([figure, where, layer, published, *changes])
    return lines


def _change(rows: Sequence[Row], network: str, measure: Measure, provider: str | None) -> str:
    """A network against the real one: by one provider, or each by its best."""
    found = []
    for side in (network, "real"):
        if not (lowest := best(rows, side, measure, provider)):
            mine = [row for row in rows if row.network == side and provider in (None, row.provider)]
            return joined(MISSING, *(f"{side}: {row.provider} {row.status}" for row in mine if row.status != "ok"))
        found.append(lowest)
    names = "" if provider else f" ({found[0][1]}, {found[1][1]})"
    return f"{100 * (found[0][0] / found[1][0] - 1):+.1f} %{names}"


def _against_none(m: Measured, where: str, rows: Sequence[Row]) -> list[list[str]]:
    bases = {(row.network, row.provider): row for row in rows if row.layer == NO_AT}
    tapped_rows = (
        row
        for row in rows
        if row.layer != NO_AT and row.network in PAPER_NETWORKS and not row.variant.startswith("against ")
    )
    groups = grouped(tapped_rows, attrgetter("network", "provider", "variant"))
    groups.sort(key=lambda group: (place(group[0][0], ORDERS["network"]), group[0][1:]))
    lines = []
    for (network, provider, variant), tapped in groups or [((MISSING, MISSING, ""), [])]:
        costs = [_costs(tapped, bases.get((network, provider)), measure) for measure in (median, m.memory)]
        lines.append([network, joined(provider, variant), where, *costs])
    return lines


def _costs(tapped: Sequence[Row], without: Row | None, measure: Measure) -> str:
    """With anti-transfer over without, at the layers where it is least and most; those that failed."""
    base = measure(without) if without else None
    found = [(cost, row.layer) for row in tapped if (cost := ratio(measure(row), base))]
    ends = dict.fromkeys((min(found), max(found))) if found else ()
    spans = [f"{cost:.2f}x ({layer})" for cost, layer in ends] or [MISSING]
    failed = [f"{row.layer} {row.status}" for row in tapped if row.status != "ok"]
    return joined(" to ".join(spans), *failed).replace("AT at ", "")


def _grid_line(m: Measured, way: grids.Way) -> list[str]:
    times = [grids.measured(m.results.rows, network, way) for network in grids.NETWORKS]
    quaternion, real = (grids.epoch_seconds(found) / 3600 if found else math.nan for found in times)
    shared = most(m.shared.rows, grids.PRECISION) if way == grids.SHARED else None
    gain = (shared.trainings_relative if shared else None) or math.nan
    both = quaternion + real
    hours = (quaternion, real, both, 100 * both, 100 * quaternion / gain)
    cells = [MISSING if math.isnan(value) else f"{value:.3g} h" for value in hours]
    return [m.device, joined(way.provider, way.variant, "CUDA graph" if way.mode == "graph" else way.mode), *cells]


def _time(row: Row | None) -> str:
    """A median with its unit, p20 to p80 where they are far apart; the status of what has none."""
    if row is None or row.status != "ok":
        return row.status if row else ""
    low, middle, high = (scaled(us, MICROSECONDS) for us in (row.p20_us, row.median_us, row.p80_us))
    wide = low and high and (row.p80_us or 0) - (row.p20_us or 0) > SPREAD * (row.median_us or 0)
    return f"{middle} ({low} to {high})" if middle and wide else middle or "not timed"


def _name(row: Row | None) -> str:
    return row.provider if row else ""


def _failures(line: Standing) -> str:
    return joined(*(f"{row.provider}: {row.status}" for row in line.failed))


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown of the first `LINES`, without the columns that are empty in all."""
    shown = lines[:LINES]
    kept = [n for n in range(len(head)) if any(line[n] for line in shown)]
    rows = [[cells[n].replace("|", r"\|") for n in kept] for cells in (head, *shown)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], ["---"] * len(kept), *rows[1:]))
    return table if len(lines) <= LINES else f"{table}\n\n{len(lines) - LINES} more lines are not shown."
