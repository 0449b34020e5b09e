"""Rows and whole runs to make tables and charts of, and how tests read a table."""

import re
from pathlib import Path
from typing import Any

from bench import summary
from bench.network import NO_AT
from bench.results import Fresh, Results, Row, Shared, write

GPU = {"device": "Some GPU", "threads": "16", "commit": "abc1234", "torch": "2.11.0", "date": "2026-11-24 20:00 UTC"}
CPU = {**GPU, "device": "cpu: Some CPU", "threads": "2"}
STEP = {"suite": "step", "layer": NO_AT, "work": "step", "provider": "ours"}
LOSS = {"suite": "atl", "layer": "layers 1-2", "variant": "paper", "provider": "ours"}


def row(median: float = 100.0, **fields: Any) -> Row:
    """A right row, p20 and p80 on its median; another status has no time."""
    plain = {
        "suite": "conv", "network": "quaternion", "layer": "conv 2", "variant": "", "batch": 20, "precision": "bf16",
        "work": "forward+backward", "mode": "graph", "provider": "ours auto", "shape": "", "status": "ok",
        "flops": 10**9, "bytes": 10**7,
    }  # fmt: skip
    times = dict.fromkeys(("median_us", "p20_us", "p80_us"), median if fields.get("status", "ok") == "ok" else None)
    return Row(**{**plain, **times, **fields})


def measured(*rows: Any, fresh: Any = (), shared: Any = (), **provenance: Any) -> summary.Folder:
    """A folder of these rows, first calls and trainings side by side, the last of another commit."""
    origin = {**GPU, **provenance}
    beside = Results(list(shared), {**origin, "commit": "def5678"} if shared else {})
    first = Results(list(fresh), origin if fresh else {})
    return summary.Folder(Path("results/gpu/results.csv"), Results(list(rows), origin), first, beside)


def fresh_of(row: Row, **values: Any) -> Fresh:
    """The first run of a row's case and provider."""
    return Fresh(**row.case | {"provider": row.provider, "status": "ok"} | values)


def shared(processes: int, relative: float | None, **fields: Any) -> Shared:
    """A row of trainings side by side, of 1000 samples a second for one of them."""
    plain = {
        "suite": "epoch", "network": "quaternion", "layer": "AT at layer 2", "variant": "9 samples", "batch": 20,
        "precision": "bf16", "work": "epoch", "mode": "processes", "processes": processes, "threads_each": 1,
        "status": "ok", "samples_per_second": relative and 1000 * relative, "trainings_relative": relative,
    }  # fmt: skip
    return Shared(**{**plain, **fields})


def lines_of(text: str) -> list[dict[str, str]]:
    """The lines of all Markdown tables, by their head."""
    found = []
    for table in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE):
        head, rule, *body = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()
        ]
        assert set(rule) == {"---"}
        assert len(set(head)) == len(head)
        found += [dict(zip(head, line, strict=True)) for line in body]
    return found


def line_of(text: str, **cells: Any) -> dict[str, str]:
    """The one line with these cells."""
    (line,) = [line for line in lines_of(text) if all(line.get(name) == value for name, value in cells.items())]
    return line


def steps() -> list[Row]:
    """Microseconds and bytes of steps of three networks by provider, with and without anti-transfer."""
    times = {
        ("quaternion", "ours"): (20.0, 22.0, 30.0), ("quaternion", "research style"): (40.0, 100.0, 120.0),
        ("quaternion", "torch.compile"): (16.0, 25.0, 27.0),
        ("real", "ours"): (160.0, 168.0, 200.0), ("real", "research style"): (200.0, 500.0, 560.0),
        ("real-on-embedding", "ours"): (32.0, 33.0, 35.0), ("real-on-embedding", "research style"): (50.0, 60.0, 70.0),
    }  # fmt: skip
    rows = []
    for (network, provider), values in times.items():
        for layer, us in zip((NO_AT, "AT at layer 2", "AT at layer 13"), values, strict=True):
            names = {**STEP, "network": network, "provider": provider, "layer": layer}
            rows.append(row(us, **names, peak_bytes=int(us * us) * 1000))
    cached = {**STEP, "layer": "AT at layer 2", "variant": "cached targets"}
    part = row(1.0, **{**STEP, "work": "forward"}, peak_bytes=1)  # no step
    return [*rows, row(21.0, **cached, peak_bytes=440_000), part]


def everything(**provenance: Any) -> summary.Folder:
    """A run with rows for every section and chart."""
    rows = [row(50.0, layer=layer) for layer in ("conv 2", "conv 6-7")]
    rows.append(row(80.0, layer="conv 2", provider="concatenated, NHWC"))
    rows.append(row(90.0, layer="conv 6-7", provider="SpeechBrain"))
    rows.append(row(layer="conv 2", provider="SpeechBrain", status="REFUSED"))
    rows.append(row(10.0, **LOSS, peak_bytes=3_000_000))
    rows.append(row(**{**LOSS, "provider": "materialised"}, status="out of memory"))
    for network in ("quaternion", "real"):
        for work, us in zip(summary.WORKS, (5.0, 20.0, 60.0, 70_000.0), strict=True):
            rows.append(row(us, **{**STEP, "layer": "AT at layer 2", "work": work, "network": network}))
    rows.append(row(**{**STEP, "layer": "AT at layer 2", "provider": "research style"}, status="failed"))
    return measured(*rows, roof_bandwidth="4e12", roof_bf16="8e14", **provenance)


def committed(folder: Path, name: str, m: summary.Folder) -> Path:
    """A run in the folder of its name below bench/results."""
    target = folder / "bench/results" / name
    target.mkdir(parents=True)
    write(target / "results.csv", m.results.rows, m.results.provenance)
    write(target / "fresh.csv", m.fresh.rows, m.fresh.provenance)
    write(target / "sharing.csv", m.shared.rows, m.shared.provenance)
    return target
