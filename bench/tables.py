"""Sections of a report as Markdown tables; each is a function of the folders of results."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from bench import grid as grids
from bench import summary, words
from bench.layers import count_of
from bench.network import NO_AT
from bench.results import Results, Row, Shared
from bench.sharing import PROCESSES, most
from bench.summary import CONDITION, ORDERS, Folder, best, combinations, grouped, median, place, ratio, standing
from bench.words import MISSING, conditions, joined, number
from qat.campaign.cost import utterances

# Maximum number of tables per device and kind, of conditions and layers beside the paper, and of lines per table.
TABLES, CONDITIONS, LINES = 2, 2, 30
Table = Callable[[Folder, list[Row]], str]
More = Callable[[Folder], str]
PAPER_NETWORKS = ("quaternion", "real")
MEMORY = "Memory: peak of the GPU's allocator without the operands, or, on a CPU, growth of a fresh process."
NOTHING, UNMEASURED = "Not measured yet.", Folder(Path(), Results([], {"device": MISSING}))


def paper(folders: Sequence[Folder]) -> str:
    """Our figures beside the paper's, for each precision in its most valuable condition."""
    against_real, against_none = [], []
    for folder in folders or [UNMEASURED]:
        by_precision: dict[str, list[Row]] = {}
        groups = [rows for _, rows in combinations(_whole_steps(folder), CONDITION)]
        for rows in sorted(groups, key=lambda rows: not {row.network for row in rows} >= {*PAPER_NETWORKS}):
            by_precision.setdefault(rows[0].precision, rows)
        for rows in list(by_precision.values())[:CONDITIONS] or [[]]:
            where = joined(folder.device, *(conditions(row, *CONDITION) for row in rows[:1]))
            against_real += _against_real(folder, where, rows)
            against_none += _against_none(folder, where, rows)
    return f"""\
Quaternion network against the real one (paper: WASPAA 2023, means over its trainings). *Best providers*: both networks
with the provider that has the lowest figure, named in this order. The *control*, a real network on the quaternion
network's input, against the real network shows how much of the gain comes from the smaller input alone. {MEMORY}

{_table(against_real)}

Anti-transfer (AT) against none, with the same network and provider, at the layers where it costs least and most (AT
paper: Guizzo, Weyde and Tarroni, 2021, a real network). *Cached targets*: the frozen network is not run.

{_table(against_none)}"""


def sharing(folders: Sequence[Folder]) -> str:
    """Trainings per hour on one device, by the number of processes that share it."""
    pieces = []

    def order(row: Shared) -> tuple[Any, ...]:
        return place(row.precision, ORDERS["precision"]), place(row.mode, (PROCESSES,)), row.processes

    for folder in folders:
        lines = [
            {
                "each trains": joined(conditions(row, "network"), row.layer, row.variant,
                                      conditions(row, "batch", "precision")),
                "mode": row.mode, "processes": str(row.processes), "threads of each": str(row.threads_each),
                "samples/s in total": "" if row.samples_per_second is None else f"{row.samples_per_second:.0f}",
                "trainings per hour": "" if row.trainings_relative is None else f"{row.trainings_relative:.2f}x",
                "GPU allocator, each": words.size(row.peak_bytes), "no result": _unless_ok(row.status),
            }
            for row in sorted(folder.shared.rows, key=order)
        ]  # fmt: skip
        if lines:
            path = folder.path.with_name("sharing.csv").as_posix()
            caption = f"**{folder.device}**: {folder.shared.source}. All rows in [{path}]({path})."
            against = "*Trainings per hour*: relative to one after another, each with the whole device."
            pieces.append(f"{caption} {against}\n\n{_table(lines)}")
    return "\n\n".join(pieces) or NOTHING


def grid(folders: Sequence[Folder]) -> str:
    """Hours of the paper's grid on one GPU."""
    lines = [_grid_line(folder, way) for folder in folders if not folder.on_cpu for way in grids.WAYS]
    emotion, whole = grids.emotion_trainings(), len(grids.trainings())
    sizes = {training.corpus.name.upper(): utterances(training.corpus) for training in emotion}
    corpora = ", ".join(f"{name} {size}" for name, size in sizes.items())
    first, layers = grids.MEASURED[0], ", ".join(map(str, grids.MEASURED))
    return f"""\
GPU-hours of {len(emotion)} of the paper's {whole} trainings: two networks, three corpora ({corpora} utterances,
one cut each) and two splits, each once without anti-transfer and with four kinds of it at each of {grids.LAYERS}
layers. The other {whole - len(emotion)} have other batches and inputs and are left out. An epoch is the training part
(70 % of a corpus in the random split) in steps of {grids.BATCH} and the validation part in forward passes,
{grids.PRECISION}, and nothing else. Anti-transfer is measured at layers {layers} and interpolated linearly in between;
layer 1 is taken as layer {first}. *Side by side*: at the highest rate in the table of that name, which is measured with
anti-transfer at layer 2.

{_table(lines or [_grid_line(UNMEASURED, grids.WAYS[0]) | {"steps": MISSING}])}"""


def _by_device(
    folders: Sequence[Folder], kind: str, fields: tuple[str, ...], table: Table, more: More = lambda folder: ""
) -> str:
    """For each device: a caption, the tables of its most valuable combinations, and `more`."""
    pieces = []
    for folder in folders:
        groups = combinations(_whole_steps(folder) if kind == "step" else folder.rows(kind), fields)
        if groups:
            path = folder.path.as_posix()
            shown = f"{min(TABLES, len(groups))} of {len(groups)} tables, all rows in [{path}]({path})"
            origin, note = folder.results.source, "" if kind == "layers" else f" {MEMORY}"
            pieces.append(f"**{folder.device}**: {origin}. Medians, with p20 to p80 if over 5 % apart; {shown}.{note}")
            pieces += [f"*{conditions(rows[0], *fields)}*\n\n{table(folder, rows)}" for _, rows in groups[:TABLES]]
            pieces.append(more(folder))
    return "\n\n".join(filter(None, pieces)) or NOTHING


def _whole_steps(folder: Folder) -> list[Row]:
    return [row for row in folder.rows("step") if row.work == "step"]


def _layer_table(folder: Folder, rows: list[Row]) -> str:
    lines = []
    for line in summary.standings(rows):
        roof = line.ours.percent_of_roof if line.ours and median(line.ours) else None
        lines.append({
            "layer": line.layer, "ours": words.time(line.ours), "best baseline": words.time(line.best),
            "by": line.by, "speed-up": number(line.speedup), "real layer / ours": number(line.real),
            "% of roof": "" if roof is None else f"{roof:.0f}", "no time": line.failures,
        })  # fmt: skip
    return _table(lines)


def _overview(folder: Folder) -> str:
    """Geometric mean and minimum of the speed-ups in every combination; "conv 11-13" counts three times."""
    lines: dict[str, dict[str, str]] = {}
    for _, rows in combinations(folder.rows("layers"), tuple(ORDERS)):
        weighed = [(line.speedup, count_of(line.layer)) for line in summary.standings(rows) if line.speedup]
        if weighed:
            mean = math.exp(sum(n * math.log(speed) for speed, n in weighed) / sum(n for _, n in weighed))
            name, column = conditions(rows[0], "network", "batch", "precision"), conditions(rows[0], "work", "mode")
            lines.setdefault(name, {"": name})[column] = f"{mean:.2f} ({min(weighed)[0]:.2f})"
    title = "*All combinations: geometric mean of the speed-ups over the network's layers (the lowest)*"
    return f"{title}\n\n{_table(list(lines.values()))}" if sum(map(len, lines.values())) > len(lines) + 1 else ""


def _loss_table(folder: Folder, rows: list[Row]) -> str:
    lines = []
    for (variant, layer), case in grouped(rows, attrgetter("variant", "layer")):
        line = standing(layer, case)
        cached = next((row for row in case if row.provider == summary.CACHED), None)
        baselines = [folder.memory(row) for row in case if not row.provider.startswith("ours")]
        least = min((size for size in baselines if size is not None), default=None)
        ours, target = (words.size(folder.memory(row)) if row else "" for row in (line.ours, cached))
        lines.append({
            "loss": variant, "layers": layer.removeprefix("layers "), "ours": words.time(line.ours),
            "cached target": words.time(cached), "best baseline": words.time(line.best), "by": line.by,
            "speed-up": number(line.speedup), "speed-up, cached": number(ratio(median(line.best), median(cached))),
            "memory: ours": ours, "memory: cached": target, "memory: least of the baselines": words.size(least),
            "no time": line.failures,
        })  # fmt: skip
    return _table(sorted(lines, key=lambda line: (place(line["loss"], summary.SEMANTICS), place(line["layers"]))))


def _step_table(folder: Folder, rows: list[Row]) -> str:
    providers = sorted({row.provider for row in rows}, key=lambda name: place(name, (*summary.OURS, summary.RESEARCH)))
    lines = []
    for (network, layer, variant), case in grouped(rows, attrgetter("network", "layer", "variant")):
        cells = {row.provider: joined(words.time(row), words.size(folder.memory(row))) for row in case}
        line = {"network": network, "layer": layer, "variant": variant}
        line |= {name: cells.get(name, "") for name in providers}
        lines.append(line | {"speed-up": number(standing("", case).speedup)})
    lines.sort(key=lambda line: (place(line["network"], ORDERS["network"]), place(line["layer"]), line["variant"]))
    return _table(lines)


def _beside_steps(folder: Folder) -> str:
    pieces = [
        f"*{kind}, {conditions(rows[0], *CONDITION)}*\n\n{_step_table(folder, rows)}"
        for kind in ("epoch", "inference")
        for _, rows in combinations(folder.rows(kind), CONDITION)[:1]
    ]
    return "\n\n".join(filter(None, (*pieces, _fresh_table(folder))))


def _fresh_table(folder: Folder) -> str:
    path = folder.path.with_name("fresh.csv").as_posix()
    lines = [
        {
            "": joined(*map(str, row.case_key)), "provider": row.provider,
            "first call": words.seconds(row.first_call_s),
            "first call, nothing compiled": words.seconds(row.cold_call_s),
            "GPU allocator": words.size(row.peak_bytes), "GPU (NVML)": words.size(row.gpu_bytes),
            "host memory": words.size(row.host_bytes), "no result": _unless_ok(row.status),
        }
        for row in folder.fresh.rows
    ]  # fmt: skip
    return f"*In fresh processes ([{path}]({path}))*\n\n{_table(lines)}" if lines else ""


def _against_real(folder: Folder, where: str, rows: Sequence[Row]) -> list[dict[str, str]]:
    groups = grouped((row for row in rows if not row.variant), attrgetter("layer"))
    groups.sort(key=lambda group: place(group[0]))
    measures = (("time", "-80.5 %", median), ("memory", "-53.7 %", folder.memory))
    return [
        {
            "training step": figure, "conditions": where, "layer": layer, "paper": published,
            "best providers": _change(of_layer, "quaternion", measure),
            "control, best providers": _change(of_layer, "real-on-embedding", measure),
            f"both {summary.RESEARCH}": _change(of_layer, "quaternion", measure, summary.RESEARCH),
            f"control, {summary.RESEARCH}": _change(of_layer, "real-on-embedding", measure, summary.RESEARCH),
        }
        for layer, of_layer in groups[:CONDITIONS] or [(MISSING, [])]
        for figure, published, measure in measures
    ]  # fmt: skip


def _change(rows: Sequence[Row], network: str, measure: summary.Measure, provider: str | None = None) -> str:
    """A network against the real one, both with one provider, or each with its best."""
    sides = []
    for side in (network, "real"):
        if not (lowest := best(rows, side, measure, provider)):
            failed = [row for row in rows if row.network == side and row.status != "ok"]
            shown = [row for row in failed if provider in (None, row.provider)]
            return joined(MISSING, *(f"{side}: {row.provider} {row.status}" for row in shown))
        sides.append(lowest)
    names = "" if provider else f" ({sides[0][1]}, {sides[1][1]})"
    return f"{100 * (sides[0][0] / sides[1][0] - 1):+.1f} %{names}"


def _against_none(folder: Folder, where: str, rows: Sequence[Row]) -> list[dict[str, str]]:
    bases = {(row.network, row.provider): row for row in rows if row.layer == NO_AT}
    tapped = [row for row in rows if row.layer != NO_AT and not row.variant.startswith("against ")]
    groups = grouped(
        (row for row in tapped if row.network in PAPER_NETWORKS), attrgetter("network", "provider", "variant")
    )
    groups.sort(key=lambda group: (place(group[0][0], ORDERS["network"]), group[0][1:]))
    return [
        {
            "network": network, "provider": joined(provider, variant), "conditions": where,
            "time (AT paper: 2.8x)": _costs(with_at, bases.get((network, provider)), median),
            "memory (AT paper: up to +100 %)": _costs(with_at, bases.get((network, provider)), folder.memory),
        }
        for (network, provider, variant), with_at in groups or [((MISSING, MISSING, ""), [])]
    ]  # fmt: skip


def _costs(tapped: Sequence[Row], without: Row | None, measure: summary.Measure) -> str:
    """Cost with anti-transfer over without, at the layers where it is lowest and highest; the layers that failed."""
    base = measure(without) if without else None
    costs = [(cost, row.layer) for row in tapped if (cost := ratio(measure(row), base))]
    ends = dict.fromkeys((min(costs), max(costs))) if costs else ()
    spans = [f"{cost:.2f}x ({layer})" for cost, layer in ends] or [MISSING]
    failed = [f"{row.layer} {row.status}" for row in tapped if row.status != "ok"]
    return joined(" to ".join(spans), *failed).replace("AT at ", "")


def _grid_line(folder: Folder, way: grids.Way) -> dict[str, str]:
    times = {network: grids.measured(folder.results.rows, network, way) for network in grids.NETWORKS}
    hours_of = {name: grids.epoch_seconds(name, each) / 3600 if each else math.nan for name, each in times.items()}
    quaternion, real = hours_of.values()
    shared = most(folder.shared.rows, grids.PRECISION) if way == grids.SHARED else None
    gain = (shared.trainings_relative if shared else None) or math.nan
    hours = {
        "quaternion network, an epoch": quaternion, "real network, an epoch": real, "both, an epoch": quaternion + real,
        "both, 100 epochs": 100 * (quaternion + real),
        "quaternion network, 100 epochs, side by side": 100 * quaternion / gain,
    }  # fmt: skip
    steps = joined(way.provider, way.variant, "CUDA graph" if way.mode == "graph" else way.mode)
    cells = {name: MISSING if math.isnan(value) else f"{value:.3g} h" for name, value in hours.items()}
    return {"device": folder.device, "steps": steps, **cells}


def _unless_ok(status: str) -> str:
    return "" if status == "ok" else status


def _table(lines: Sequence[Mapping[str, str]]) -> str:
    """Markdown of the first `LINES` lines, which are cells by column; empty columns are omitted."""
    shown = lines[:LINES]
    columns = [name for name in dict.fromkeys(itertools.chain(*shown)) if any(line.get(name) for line in shown)]
    rows = [columns, ["---"] * len(columns), *([line.get(name, "") for name in columns] for line in shown)]
    table = "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows)
    return table if len(lines) <= LINES else f"{table}\n\n{len(lines) - LINES} more lines are not shown."


# Speed of convolutions and linear layers: the most valuable tables of each device, and a summary of all.
layers = functools.partial(_by_device, kind="layers", fields=tuple(ORDERS), table=_layer_table, more=_overview)
# Time and memory of the loss by layer and variant; of steps by provider, then of epochs, inference and first calls.
anti_transfer = functools.partial(_by_device, kind="anti-transfer", fields=tuple(ORDERS), table=_loss_table)
step = functools.partial(_by_device, kind="step", fields=CONDITION, table=_step_table, more=_beside_steps)
SECTIONS: Mapping[str, Callable[[Sequence[Folder]], str]] = {
    "layers": layers, "anti-transfer": anti_transfer, "step": step, "sharing": sharing, "paper": paper, "grid": grid
}  # fmt: skip
