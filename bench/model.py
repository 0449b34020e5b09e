"""Computed time of a training step on a GPU, launch by launch, from sizes and data sheets; not measured.

The launches are those of `bench.launches`. Kernels of Hamilton products take the time of `config.cost`; all others the
time of their memory traffic or the latency of their steps. The floor is a lower bound for any kernel with these
operands.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.launches import ARCH, PARTS, Event, cases, fields, step_launches, where
from bench.network import NetworkCase
from bench.run import LAUNCH_US
from qkernels.ops.hamilton_conv import config
from qkernels.ops.hamilton_conv.config import Plan, Problem, Tile
from qkernels.runtime.device import MULTIPROCESSORS
from qkernels.runtime.recording import Launch

# Bytes/s of memory and of the L2 cache, and size of the cache: A100, H100, B200 (data sheets; rough for the cache).
MEMORY = {80: 2.0e12, 90: 3.35e12, 100: 8.0e12}
CACHE = {80: 3.5e12, 90: 5.5e12, 100: 9.0e12}
CACHE_BYTES = {80: 40e6, 90: 50e6, 100: 126e6}
CLOCK_MHZ = {80: 1410, 90: 1755, 100: 1850}
GAP_US = 1.0  # time between two kernels of a graph
COMPUTED = "computed, not measured"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The time of one launch.

    Attributes:
        part: part of the step. name: name of the kernel or of PyTorch's operator.
        predicted_us, floor_us: microseconds.
        bound: bottleneck: "products", "loads", "latency", "memory" or "launch".
        grid: number of programs. tile: m x n x k and warps.
        registers: registers per thread. shared: bytes of shared memory per program.
        splits: number of programs that share a sum. parts_share: share of the time for parts of shared sums.
    """

    part: str
    name: str
    predicted_us: float
    floor_us: float
    bound: str
    grid: str = ""
    tile: str = ""
    registers: int | None = None
    shared: int | None = None
    splits: int = 1
    parts_share: float = 0.0


def estimate(event: Event, arch: int = ARCH) -> Estimate:
    in_cache = event.bytes <= CACHE_BYTES[arch] / 2  # written by a kernel just before
    times = {"memory": 1e6 * event.bytes / (CACHE if in_cache else MEMORY)[arch]}
    floor, clock, processors = max(LAUNCH_US, times["memory"]), CLOCK_MHZ[arch], MULTIPROCESSORS[arch]
    details: dict[str, Any] = {}
    if (launch := event.launch) is not None:
        details["grid"] = " x ".join(map(str, launch.grid))
        if event.name.startswith("_hamilton_conv"):
            problem, plan = _planned(launch, arch)
            cost, tile = config.cost(problem, plan, arch, processors), plan.tile
            times[cost.bound] = cost.total / clock
            products = 16 * problem.pixels * problem.n * problem.k * problem.positions * problem.groups
            rate = config.PRODUCTS_PER_CLOCK[arch][plan.precision] * processors * clock
            floor = max(floor, products / (2 if plan.form == "q8" else 1) / rate)
            details |= {"tile": f"{tile.m}x{tile.n}x{tile.k}, {tile.warps} warps", "registers": tile.registers}
            details |= {"shared": cost.shared, "splits": plan.splits}
            if times[cost.bound] >= times["memory"]:
                details["parts_share"] = cost.parts
        else:
            warps, stages = launch.options["num_warps"], launch.options["num_stages"]
            latency = _steps(launch) * (config.LATENCY + config.STEP_CLOCKS) / max(1, stages - 1)
            rounds = math.ceil(math.prod(launch.grid) / (processors * max(1, 32 // warps)))
            times["latency"] = (rounds * latency + config.PROGRAM_CLOCKS) / clock
            details["tile"] = f"{warps} warps"
    bound = max(times, key=lambda name: times[name])
    total = max(LAUNCH_US, times[bound] + GAP_US)  # no launch of a graph is shorter
    bound = "launch" if total == LAUNCH_US else bound
    return Estimate(part=event.part, name=event.name, predicted_us=total, floor_us=floor, bound=bound, **details)


def _planned(launch: Launch, arch: int) -> tuple[Problem, Plan]:
    """The product of a launch of the Hamilton kernels, and the launch's plan."""
    arguments, meta = launch.arguments, launch.arguments["META"]
    kernel, n, k = (
        ("dw", arguments["P"], arguments["Q"]) if "dw_ptr" in arguments else ("gather", arguments["N"], arguments["K"])
    )
    if kernel == "dw":
        pixels, phases = arguments["batch"] * arguments["y_h"] * arguments["y_w"], 1
    else:
        pixels = arguments["batch"] * arguments["grid_h"] * arguments["grid_w"] * (4 if meta.POOL else 1)
        phases = math.prod(meta.STRIDE) if meta.ADJOINT else 1
    positions = max(1, math.prod(meta.KERNEL) // phases)
    problem = Problem(kernel, pixels, n, k, positions, arguments["groups"], phases, meta.POOL or meta.DROPOUT)
    form = "q8" if "q8" in launch.kernel.__name__ else "signed"
    half = arguments["x_ptr"].element_size() == 2
    precision = "half" if half else meta.PRECISION
    options = launch.options
    numbers = (meta.BLOCK_M, meta.BLOCK_N, meta.BLOCK_K, options["num_warps"], options["num_stages"])
    # A tile may be in both lists, with the registers of different kernels.
    few = config.flat_tiles(kernel, precision, arch) if meta.FLAT else ()
    tiles = few or config.tiles(kernel, form, precision, arch)
    tile = next((t for t in tiles if (t.m, t.n, t.k, t.warps, t.stages) == numbers), Tile(*numbers))
    return problem, Plan(form, precision, tile, arguments["splits"])


def _steps(launch: Launch) -> int:
    """Number of steps in the longest loop of a program; 1 if the arguments do not tell."""
    arguments = launch.arguments
    block = getattr(arguments.get("META"), "BLOCK_K", arguments.get("BLOCK_K"))
    size = arguments.get("K") or next((value.K for value in arguments.values() if hasattr(value, "K")), None)
    return math.ceil(size / block / arguments.get("splits", 1)) if block and size else 1


def estimates(case: NetworkCase, arch: int = ARCH) -> list[Estimate]:
    """The estimate of each launch of a step."""
    return [estimate(event, arch) for event in step_launches(case, arch)]


def sums(estimates: Sequence[Estimate]) -> dict[str, Any]:
    """Number of launches and their microseconds, in total and by part."""
    totals = {name: round(sum(getattr(each, name) for each in estimates), 1) for name in ("predicted_us", "floor_us")}
    by_part = {part: round(sum(each.predicted_us for each in estimates if each.part == part), 1) for part in PARTS}
    return {"launches": len(estimates), **totals, "by_part": by_part}


def plain(arch: int = ARCH) -> list[dict[str, Any]]:
    """The sums of all cases, for JSON."""
    return [{**fields(case), **sums(estimates(case, arch)), "source": COMPUTED} for case in cases()]


def report(arch: int = ARCH) -> Iterator[str]:
    """Every launch of every case, and the sums; every heading says that they are computed."""
    for case in cases():
        yield f"AT at {where(case)}, batch {case.batch}, {case.precision}, sm_{arch} ({COMPUTED}):"
        yield f"{'part':10} {'kernel':28} {'grid':16} {'tile':22} regs  shared      us  floor bound"
        launches = estimates(case, arch)
        for _, group in itertools.groupby(launches, key=lambda each: replace(each, part="")):
            each, *others = group
            count = f"{1 + len(others)} x " if others else ""
            yield (
                f"{each.part:10} {count + each.name:28} {each.grid:16} {each.tile:22} {each.registers or '':>4} "
                f"{each.shared or '':>7} {each.predicted_us:7.1f} {each.floor_us:6.1f} {each.bound}"
            )
        total = sums(launches)
        by_part = ", ".join(f"{part} {us:.0f}" for part, us in total["by_part"].items())
        microseconds = f"{total['predicted_us']:.0f} us, floor {total['floor_us']:.0f} us"
        yield f"sum of {len(launches)} launches: {microseconds} ({COMPUTED}); {by_part}\n"
