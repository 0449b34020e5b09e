"""Rows of results, their provenance, and their CSV files."""

import csv
import datetime
import importlib.metadata
import typing
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch

from bench.case import CaseName
from qat.files import read_text, replacing
from qat.results import record
from qkernels import runtime

R = TypeVar("R", "Row", "Fresh", "Shared")


@dataclass(frozen=True, kw_only=True)
class Row(CaseName):
    """One line of results.csv; values that were not measured are empty.

    Args:
        mode: "graph" or "eager".
        provider: name of the provider; names of ours start with "ours".
        shape: sizes, for the reader.
        status: "ok"; "REFUSED": the result is wrong, so it was not timed; "out of memory"; "not judged": the reference
            result does not fit into memory; "failed"; "smoke": right, and not timed.
        error: relative error of the worst result. error_over_tolerance: the same as a multiple of the tolerance.
        median_us, p20_us, p80_us: microseconds of one run. samples: number of timed runs.
        host_us: microseconds until an eager call returns, spent in Python.
        first_call_ms: milliseconds of the first run, with kernels compiled before.
        peak_bytes: peak memory of the GPU's allocator, without the operands.
        energy_mj: energy of the whole GPU in one run, in millijoules.
        floor_us: for ours, sum over its kernels of max(3 us, bytes that the kernel must move / measured bandwidth).
        flops, bytes: minimum work by the definition.
        percent_of_roof: time of that work at the measured rates, in percent of the median.
    """

    FILE: ClassVar[str] = "results.csv"
    mode: str
    provider: str
    shape: str = ""
    status: str
    error: float | None = None
    error_over_tolerance: float | None = None
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    samples: int | None = None
    host_us: float | None = None
    first_call_ms: float | None = None
    peak_bytes: int | None = None
    energy_mj: float | None = None
    floor_us: float | None = None
    flops: int
    bytes: int
    percent_of_roof: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """The fields that identify the row within its results."""
        return (*self.case_key, self.mode, self.provider)


@dataclass(frozen=True, kw_only=True)
class Fresh(CaseName):
    """One line of fresh.csv: a case in its own process; values that were not measured are empty.

    Args:
        provider: name of the provider.
        status: "ok", "failed" or "out of time".
        first_call_s: seconds of building and first run, with kernels compiled before.
        cold_call_s: the same with nothing compiled before, while the other cases compile too.
        peak_bytes: peak memory of the GPU's allocator, operands included.
        gpu_bytes: memory of the GPU that the process took, by NVML.
        host_bytes: on a CPU, growth of the process' peak resident memory after its imports.
    """

    FILE: ClassVar[str] = "fresh.csv"
    provider: str
    status: str
    first_call_s: float | None = None
    cold_call_s: float | None = None
    peak_bytes: int | None = None
    gpu_bytes: int | None = None
    host_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Shared(CaseName):
    """One line of sharing.csv: trainings of a case side by side; values that were not measured are empty.

    Args:
        mode: sharing of the device: by "processes" (on a GPU in time slices) or "MPS".
        processes: number of processes. threads_each: CPU threads of each.
        status: "ok"; "failed": a process failed; "out of time"; or the reason why MPS is not available.
        samples_per_second: sum over all processes, the median of several windows.
        trainings_relative: that rate relative to the case's first row, one process that has the device to itself.
        peak_bytes: highest peak memory of the GPU's allocator in a process, operands included.
    """

    FILE: ClassVar[str] = "sharing.csv"
    mode: str
    processes: int
    threads_each: int
    status: str
    samples_per_second: float | None = None
    trainings_relative: float | None = None
    peak_bytes: int | None = None


class Results(NamedTuple, Generic[R]):
    """Rows of one file and their provenance (see `provenance`)."""

    rows: list[R]
    provenance: dict[str, str]

    @property
    def source(self) -> str:
        """Commit, version and date, for captions."""
        commit, torch, date = (self.provenance.get(name) or "unknown" for name in ("commit", "torch", "date"))
        return f"commit {commit}, PyTorch {torch}, {date}"


def provenance(commit: str | None = None) -> dict[str, str]:
    """Device, commit, versions and time of a measurement."""
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


def git_commit() -> str:
    """The checked-out commit, "unknown" outside of a repository."""
    return record.git_commit(Path(__file__).parents[1]) or "unknown"


def write(path: Path, rows: Iterable[Any], provenance: dict[str, str]) -> None:
    """Write dataclasses as CSV, each with its provenance; the file is replaced atomically."""
    lines = [asdict(row) | provenance for row in rows]
    if not lines:
        return
    with replacing(path) as draft, draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def read(path: Path, kind: type[R]) -> Results[R]:
    """The rows of a CSV file.

    Raises:
        ValueError: the file does not exist, lacks a column, or has a value of a wrong type.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such results")
    return parse(read_text(path), str(path), kind)


def parse(text: str, name: str, kind: type[R]) -> Results[R]:
    """The rows of a CSV file's text; `name` is its name in errors."""
    columns = [field.name for field in fields(kind)]
    lines = list(csv.DictReader(text.splitlines()))
    if lacking := sorted(set(columns) - set(lines[0] if lines else ())):
        raise ValueError(f"{name}: not a {kind.FILE}: it lacks the columns {', '.join(lacking)}")
    hints = typing.get_type_hints(kind)
    rows = [
        kind(**{column: _value(line[column], hints[column], f"{name}:{number}: {column}") for column in columns})
        for number, line in enumerate(lines, 2)
    ]
    return Results(rows, {column: value for column, value in lines[0].items() if column not in columns})


def _value(text: str | None, hint: Any, place: str) -> Any:
    """A cell as a value of the type ``hint``; None if it is empty and optional."""
    kind, *others = typing.get_args(hint) or (hint,)
    if others and text == "":
        return None
    try:
        return kind(text)
    except (TypeError, ValueError):
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{place} is {text!r}; it must be {what}{' or empty' if others else ''}") from None
