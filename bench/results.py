"""The results' schema: rows of results.csv, each with its provenance; reading, writing and matching them."""

import csv
import datetime
import importlib.metadata
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from qat.files import replacing
from qat.results import record
from qkernels import runtime


class Row(NamedTuple):
    """One line of results.csv; what was not measured is empty.

    Args:
        suite, network, layer, variant, batch, precision, work: the case, see :class:`bench.case.Case`.
        mode: "graph" or "eager".
        provider: who computed it; names of ours start with "ours".
        shape: sizes, for the reader.
        status: "ok"; "REFUSED": its result is wrong, so that it has no time; "out of memory"; "not judged": what it
            is judged by does not fit into memory; "failed"; "smoke": right, and not timed.
        error: relative error of the worst result. error_over_tolerance: in units of what is allowed.
        median_us, p20_us, p80_us: microseconds of one run. samples: how many were taken.
        host_us: microseconds that Python is busy with one eager run before it returns.
        first_call_ms: milliseconds of the first run, with kernels compiled before.
        peak_bytes: most memory of the GPU's allocator beside the operands.
        energy_mj: millijoules of one run, of the whole GPU.
        floor_us: of ours, the sum over its kernels of max(3 us, bytes that the kernel must move / measured bandwidth).
        flops, bytes: least work of the definition. percent_of_roof: its time at the measured rates over the median.
    """

    suite: str
    network: str
    layer: str
    variant: str
    batch: int
    precision: str
    work: str
    mode: str
    provider: str
    shape: str
    status: str
    error: float | None
    error_over_tolerance: float | None
    median_us: float | None
    p20_us: float | None
    p80_us: float | None
    samples: int | None
    host_us: float | None
    first_call_ms: float | None
    peak_bytes: int | None
    energy_mj: float | None
    floor_us: float | None
    flops: int
    bytes: int
    percent_of_roof: float | None

    @property
    def key(self) -> tuple[Any, ...]:
        """What names a row: nothing else is equal in two results of the same benchmark."""
        return tuple(self[: Row._fields.index("shape")])

    @property
    def case(self) -> tuple[Any, ...]:
        """The key without the provider."""
        return self.key[:-1]


KINDS = typing.get_type_hints(Row)


class Results(NamedTuple):
    """Rows and where they come from, such as device, commit and versions (see `provenance`)."""

    rows: list[Row]
    provenance: dict[str, str]


def provenance(commit: str | None = None) -> dict[str, str]:
    """Where and with what rows are measured: device, commit, versions, time."""
    from qkernels.runtime.__main__ import cpu_name

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu: {cpu_name()}",
        "threads": str(torch.get_num_threads()),
        "commit": commit or git_commit(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if runtime.HAS_TRITON else "not installed",
        "cuda": torch.version.cuda or "none",
        "cudnn": str(torch.backends.cudnn.version()),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def write(path: Path, rows: Iterable[NamedTuple], extra: dict[str, str]) -> None:
    """The rows as CSV, each with its provenance; the file appears whole or not at all."""
    lines = [{**row._asdict(), **extra} for row in rows]
    if not lines:
        return
    with replacing(path) as draft, draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def read(path: Path) -> Results:
    """The rows of a results.csv, or of the one in a folder.

    Raises:
        ValueError: there is no such file, or it is not a results.csv.
    """
    path = path / "results.csv" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such results")
    return parse(path.read_text(), str(path))


def parse(text: str, name: str) -> Results:
    """The rows of a results.csv that was read already; `name` is what errors call it."""
    lines = list(csv.DictReader(text.splitlines()))
    if not lines or not set(Row._fields) <= set(lines[0]):
        missing = sorted(set(Row._fields) - set(lines[0] if lines else ()))
        raise ValueError(f"{name}: not a results.csv: it lacks the columns {', '.join(missing)}")
    rows = [_row(line, f"{name}:{number}") for number, line in enumerate(lines, 2)]
    return Results(rows, {name: value for name, value in lines[0].items() if name not in Row._fields})


def _row(line: dict[str, str], where: str) -> Row:
    values: dict[str, Any] = {}
    for field, kind in KINDS.items():
        allowed = typing.get_args(kind) or (kind,)
        try:
            empty = not line[field] and type(None) in allowed
            values[field] = None if empty else allowed[0](line[field])
        except (TypeError, ValueError):
            raise ValueError(f"{where}: {field} is {line[field]!r}; it must be {allowed[0].__name__}") from None
    return Row(**values)


def git_commit() -> str:
    """What is checked out, "unknown" outside of a repository."""
    return record.git_commit(Path(__file__).parents[1]) or "unknown"
