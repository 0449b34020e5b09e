"""What the Triton kernels reach on a GPU: `python -m bench.gpu --out DIR`, started by `make gpu`.

The cases of cases.py, timed as in timing.py; the better memory format of a baseline counts. A provider whose result is
wrong is given no time. conv.csv is written as the cases finish, targets.csv at the end.
"""

import argparse
import csv
import datetime
import importlib.metadata
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from bench.cases import (
    STEP,
    SUITES,
    Case,
    Operands,
    Provider,
    Roof,
    Run,
    floor_us,
    gate,
    launches,
    operands_of,
)
from bench.timing import Clock, GpuClock
from qkernels import runtime
from qkernels.ops import _launch


class Row(NamedTuple):
    """One line of conv.csv; times are empty where nothing was timed."""

    suite: str
    layer: str
    channels_in: int
    channels_out: int
    side: int
    batch: int
    precision: str
    product: str
    mode: str
    provider: str
    status: str  # "ok", "REFUSED" by the gate, "smoke": right, and not timed
    error: float
    error_over_tolerance: float
    median_us: float | None
    p20_us: float | None
    p80_us: float | None
    flops: int
    bytes: int
    percent_of_roof: float | None


def measure(
    case: Case, providers: Iterable[Provider], operands: Operands, clock: Clock | None, roof: Roof | None
) -> list[Row]:
    """The rows of a case. Only providers whose results are right reach the clock."""
    admitted: dict[str, Run] = {}
    checked: list[tuple[Provider, float, float]] = []
    for provider in providers:
        run = provider.build(case, operands)
        excess, error = gate(case, operands, provider, run())
        checked.append((provider, excess, error))
        if excess <= 1:
            admitted[provider.name] = run
    rows = []
    for mode in case.modes:
        samples = clock(admitted, mode) if clock else {}
        for provider, excess, error in checked:
            status = "REFUSED" if provider.name not in admitted else "ok" if clock else "smoke"
            times = samples.get(provider.name)
            low, median, high = _quantiles(times) if times else (None, None, None)
            of_roof = 100 * 1e6 * roof.seconds(case) / median if roof and median else None
            rows.append(
                Row(case.suite, case.layer.name, *case.layer[1:3], case.layer.side, case.batch, case.precision,
                    case.product, mode, provider.name, status, error, excess, median, low, high, case.flops, case.bytes,
                    of_roof)
            )  # fmt: skip
    return rows


def _quantiles(samples: list[float]) -> tuple[float, float, float]:
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return deciles[1], statistics.median(samples), deciles[7]


class Target(NamedTuple):
    """A figure that was promised; `worst` is the layer furthest from it."""

    target: str
    wanted: str
    measured: str
    worst: str
    verdict: str  # "met", "MISSED", "not measured"


def targets(rows: list[Row], floors: dict[str, float]) -> list[Target]:
    """The promised figures in the rows. Layers of one shape count as often as the network has them."""

    def speedups(suite: str, product: str, mode: str, against: str) -> dict[str, float] | None:
        return _ratios(rows, suite, product, mode, lambda name: name.startswith(against), "ours auto")

    conv, products = "conv, batch 20", "products, batch 256"
    found = [
        _judged("conv step against concatenated, batch 20, graph", speedups(conv, STEP, "graph", "conc"), 1.6, 1.2),
        _judged("conv step against concatenated, batch 20, eager", speedups(conv, STEP, "eager", "conc"), 3.0),
        _judged("conv step against concatenated, batch 256, graph",
                speedups("conv, batch 256", STEP, "graph", "conc"), 1.25),
        _judged("forward against the real convolution, batch 256", speedups(products, "forward", "graph", "real"), 1.0),
        _judged("dX against the real convolution, batch 256", speedups(products, "dx", "graph", "real"), 1.0),
        _judged("dW against the real convolution, batch 256", speedups(products, "dw", "graph", "real"), 0.9),
        _judged("float32 step against the real layer, TF32 off, batch 20",
                speedups("float32, batch 20", STEP, "graph", "real"), 2.0),
        _judged("linear step against concatenated, batch 20",
                speedups("linear, batch 20", STEP, "graph", "conc"), 3.0, 3.0),
    ]  # fmt: skip
    roofs = {
        row.layer: row.percent_of_roof / 100
        for row in rows
        if (row.suite, row.product, row.provider) == (products, "forward", "ours auto")
        and row.percent_of_roof
        and row.layer != "conv 4"
    }
    found.append(_judged("share of the measured roof, forward, layers 5-13, batch 256", roofs or None, 0.6))
    times = {
        row.layer: row.median_us for row in rows if row.suite == "linear, batch 20" and row.provider == "ours auto"
    }
    inverse = {layer: floors[layer] / us for layer, us in times.items() if us}
    found.append(_judged("linear step: kernels' floor over time, 1 / 1.5", inverse or None, 1 / 1.5, 1 / 1.5))
    return found


def _ratios(
    rows: list[Row], suite: str, product: str, mode: str, is_baseline: Callable[[str], bool], provider: str
) -> dict[str, float] | None:
    """Time of the best baseline over ours, per layer; None where nothing, or not every layer, was measured."""
    chosen = [row for row in rows if (row.suite, row.product, row.mode) == (suite, product, mode)]
    ratios = {}
    for layer in [case.layer.name for case in SUITES[suite][0] if case.product == product]:
        times = {row.provider: row.median_us for row in chosen if row.layer == layer and row.median_us}
        others = [time for name, time in times.items() if is_baseline(name) and time]
        if not others or provider not in times:
            return None
        ratios[layer] = min(others) / (times[provider] or math.nan)
    return ratios


def _judged(name: str, ratios: dict[str, float] | None, wanted: float, at_least: float = 0.0) -> Target:
    text = f">= {wanted:.2f}" + (f", no layer under {at_least:.2f}" if at_least else "")
    if not ratios:
        return Target(name, text, "", "", "not measured")
    logs = [math.log(ratio) for layer, ratio in ratios.items() for _ in range(_count(layer))]
    mean, worst = math.exp(statistics.mean(logs)), min(ratios, key=lambda layer: ratios[layer])
    met = mean >= wanted and ratios[worst] >= at_least
    return Target(name, text, f"{mean:.2f}", f"{worst}: {ratios[worst]:.2f}", "met" if met else "MISSED")


def _count(layer: str) -> int:
    """How many layers of the network a name stands for.

    >>> _count("conv 11-13"), _count("conv 2")
    (3, 1)
    """
    first, _, last = layer.split()[-1].partition("-")
    return int(last) - int(first) + 1 if last else 1


def provenance(commit: str | None) -> dict[str, str]:
    """Where and with what the rows were measured."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "commit": commit or _git_commit(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if runtime.HAS_TRITON else "not installed",
        "cuda": torch.version.cuda or "none",
        "cudnn": str(torch.backends.cudnn.version()),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _git_commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def run_suites(device: torch.device, clock: Clock | None, roof: Roof | None, deadline: float) -> Iterator[list[Row]]:
    """The rows of one case after the other; says which the deadline drops."""
    for cases, providers in SUITES.values():
        for case in cases:
            if time.monotonic() > deadline:
                print(f"dropped, out of budget: {case}", flush=True)
            else:
                yield measure(case, providers, operands_of(case, device), clock, roof)


def smoke() -> Iterator[list[Row]]:
    """One tiny case of each suite and product on the CPU, without the form that only a kernel has.

    In float32: PyTorch's bfloat16 convolutions on a CPU are less accurate than the kernels must be.
    """
    for cases, providers in SUITES.values():
        here = [provider for provider in providers if provider.form != "q16"]
        for first in {case.product: case for case in reversed(cases)}.values():
            side = 0 if first.linear else 4
            layer = first.layer._replace(channels_in=8, channels_out=12, side=side)
            case = first._replace(layer=layer, batch=2, precision="float32")
            yield measure(case, here, operands_of(case, torch.device("cpu")), None, None)


def write(path: Path, rows: Iterable[NamedTuple], extra: dict[str, str]) -> None:
    """The rows as CSV, each with its provenance."""
    lines = [{**row._asdict(), **extra} for row in rows]
    if not lines:
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def _line(row: Row) -> str:
    times = "" if row.median_us is None else f"{row.median_us:.1f} us ({row.p20_us:.1f} to {row.p80_us:.1f})"
    roof = "" if row.percent_of_roof is None else f"{row.percent_of_roof:.0f} % of the roof"
    error = f"error {row.error:.1e} ({row.error_over_tolerance:.2f} of what is allowed)"
    what = f"{row.suite:20} {row.layer:11} {row.product:17} {row.mode:6} {row.provider:19} {row.status:8}"
    return f"{what} {error}  {times}  {roof}".rstrip()


def _prepare(clock: GpuClock, arch: int) -> Roof:
    """Compiles all kernels, and measures the roof."""
    from bench.warm import compile_all

    start = time.monotonic()
    wanted = [(case, p.form) for cases, providers in SUITES.values() for case in cases for p in providers if p.form]
    count, errors = compile_all(launch for case, form in wanted for launch in launches(case, form, arch))
    print(f"{count} kernels compiled in {time.monotonic() - start:.0f} s", *errors, sep="\n")
    roof = clock.roof()
    rates = ", ".join(f"{precision} {1e-12 * rate:.0f} TFLOP/s" for precision, rate in roof.flops.items())
    print(f"roof: copy {1e-12 * roof.bandwidth:.2f} TB/s, {rates}; an empty graph takes {clock.empty_graph():.1f} us")
    return roof


def main(arguments: list[str] | None = None) -> int:
    """Prints every row as it is measured, at the end the targets. Returns 2 without a GPU, 1 if a result was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu"), help="folder of the results")
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="seconds after which the remaining cases are dropped"
    )
    parser.add_argument("--commit", help="what was measured, where git cannot tell")
    parser.add_argument("--smoke", action="store_true", help="tiny cases on the CPU, checked but not timed")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.budget
    if not options.smoke and not torch.cuda.is_available():
        print("bench.gpu needs a CUDA device; --smoke checks everything but the times on a CPU", file=sys.stderr)
        return 2
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    floors: dict[str, float] = {}
    if options.smoke:
        measured = smoke()
    else:
        clock = GpuClock()
        arch = _launch.arch_of(clock.flushed)
        roof = _prepare(clock, arch)
        floors = {case.layer.name: floor_us(case, arch, roof.bandwidth) for case in SUITES["linear, batch 20"][0]}
        measured = run_suites(torch.device("cuda"), clock, roof, deadline)
    extra = provenance(options.commit)
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for new in measured:
        rows += new
        for row in new:
            print(_line(row), flush=True)
        write(options.out / "conv.csv", rows, extra)
    judged = targets(rows, floors)
    write(options.out / "targets.csv", judged, extra)
    for target in judged:
        print(f"{target.target:62} {target.wanted:32} {target.measured:6} {target.worst:18} {target.verdict}")
    return int(any(row.status == "REFUSED" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
