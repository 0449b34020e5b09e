"""What a training step would take on a GPU, launch by launch: computed from sizes and data sheets, not measured.

The launches are those of `bench.launches`. A kernel of the Hamilton products takes what `config.cost` says; any other
as long as its memory traffic, or the latency of its steps. No kernel of these operands could be faster than its floor.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from bench.launches import ARCH, PARTS, Event, StepCase, step_launches
from bench.run import LAUNCH_US
from qkernels.ops.hamilton_conv import config
from qkernels.ops.hamilton_conv.config import Plan, Problem, Tile
from qkernels.runtime.device import MULTIPROCESSORS
from qkernels.runtime.recording import Launch

# Bytes a second of memory and of the L2 cache, and bytes of that (data sheets; of the cache rough): A100, H100, B200.
MEMORY = {80: 2.0e12, 90: 3.35e12, 100: 8.0e12}
CACHE = {80: 3.5e12, 90: 5.5e12, 100: 9.0e12}
CACHE_BYTES = {80: 40e6, 90: 50e6, 100: 126e6}
CLOCK_MHZ = {80: 1410, 90: 1755, 100: 1850}
GAP_US = 1.0  # from one kernel of a graph to the next
COMPUTED = "computed, not measured"


class Estimate(NamedTuple):
    """One launch.

    Attributes:
        part: of the step; name: of the kernel or of PyTorch's operator.
        grid: programs; tile: m x n x k and warps; registers: of a thread; shared: bytes of a program.
        predicted_us, floor_us: microseconds.
        bound: what it waits for: "products", "loads", "latency", "memory" or "launch".
        splits: programs that share a sum.
        parts_share: how much of the time goes to parts of shared sums.
    """

    part: str
    name: str
    grid: str
    tile: str
    registers: int | None
    shared: int | None
    predicted_us: float
    floor_us: float
    bound: str
    splits: int = 1
    parts_share: float = 0.0


def estimates(events: Iterable[Event], arch: int = ARCH) -> list[Estimate]:
    """What the model says of each launch."""
    return [_estimate(event, arch) for event in events]


def _estimate(event: Event, arch: int) -> Estimate:
    cached = event.bytes <= CACHE_BYTES[arch] / 2  # what a kernel before it has just written
    traffic = 1e6 * event.bytes / (CACHE if cached else MEMORY)[arch]
    floor = max(LAUNCH_US, traffic)
    clock, processors = CLOCK_MHZ[arch], MULTIPROCESSORS[arch]
    if event.launch is None:
        return _finished(event, "", "", None, None, traffic, "memory", floor)
    launch = event.launch
    grid = " x ".join(map(str, launch.grid))
    if event.name.startswith("_hamilton_conv"):
        problem, plan = _planned(launch, arch)
        cost = config.cost(problem, plan, arch, processors)
        time, bound = max((cost.total / clock, cost.bound), (traffic, "memory"))
        products = 16 * problem.pixels * problem.n * problem.k * problem.positions * problem.groups
        rate = config.PRODUCTS_PER_CLOCK[arch][plan.precision] * processors * clock
        floor = max(floor, products / (2 if plan.form == "q8" else 1) / rate)
        tile = plan.tile
        settings = f"{tile.m}x{tile.n}x{tile.k}, {tile.warps} warps"
        share = cost.parts if bound == cost.bound else 0.0
        found = _finished(event, grid, settings, tile.registers, cost.shared, time, bound, floor)
        return found._replace(splits=plan.splits, parts_share=share)
    latency = _steps(launch) * (config.LATENCY + config.STEP_CLOCKS) / max(1, launch.options["num_stages"] - 1)
    rounds = math.ceil(math.prod(launch.grid) / (processors * max(1, 32 // launch.options["num_warps"])))
    time, bound = max(((rounds * latency + config.PROGRAM_CLOCKS) / clock, "latency"), (traffic, "memory"))
    return _finished(event, grid, f"{launch.options['num_warps']} warps", None, None, time, bound, floor)


def _finished(
    event: Event,
    grid: str,
    tile: str,
    registers: int | None,
    shared: int | None,
    time: float,
    bound: str,
    floor: float,
) -> Estimate:
    """With the gap between two kernels; none is shorter than what a launch in a graph takes."""
    total = max(LAUNCH_US, time + GAP_US)
    bound = "launch" if total == LAUNCH_US else bound
    return Estimate(event.part, event.name, grid, tile, registers, shared, total, floor, bound)


def _planned(launch: Launch, arch: int) -> tuple[Problem, Plan]:
    """The product that a launch of the Hamilton kernels computes, and how."""
    given, how = launch.arguments, launch.arguments["META"]
    kernel, n, k = ("dw", given["P"], given["Q"]) if "dw_ptr" in given else ("gather", given["N"], given["K"])
    if kernel == "dw":
        pixels, phases = given["batch"] * given["y_h"] * given["y_w"], 1
    else:
        pixels = given["batch"] * given["grid_h"] * given["grid_w"] * (4 if how.POOL else 1)
        phases = math.prod(how.STRIDE) if how.ADJOINT else 1
    positions = max(1, math.prod(how.KERNEL) // phases)
    problem = Problem(kernel, pixels, n, k, positions, given["groups"], phases, how.POOL or how.DROPOUT)
    form = "q8" if "q8" in launch.kernel.__name__ else "signed"
    half = given["x_ptr"].element_size() == 2
    precision = "half" if half else how.PRECISION
    options = launch.options
    numbers = (how.BLOCK_M, how.BLOCK_N, how.BLOCK_K, options["num_warps"], options["num_stages"])
    # The same numbers may stand in both lists, with the registers of different kernels.
    few = config.flat_tiles(kernel, precision, arch) if how.FLAT else ()
    known = few or config.tiles(kernel, form, precision, arch)
    tile = next((t for t in known if (t.m, t.n, t.k, t.warps, t.stages) == numbers), Tile(*numbers))
    return problem, Plan(form, precision, tile, given["splits"])


def _steps(launch: Launch) -> int:
    """Of the longest loop of a program, where the arguments tell."""
    given = launch.arguments
    how = given.get("META")
    block, size = getattr(how, "BLOCK_K", given.get("BLOCK_K")), given.get("K") or _named(given, "K")
    return math.ceil(size / block / given.get("splits", 1)) if block and size else 1


def _named(given: dict[str, Any], name: str) -> int | None:
    return next((getattr(value, name) for value in given.values() if hasattr(value, name)), None)


def plain(case: StepCase, arch: int = ARCH) -> dict[str, Any]:
    """A case's sums, for a program."""
    found = estimates(step_launches(case, arch), arch)
    parts = {part: round(sum(e.predicted_us for e in found if e.part == part), 1) for part in PARTS}
    return {
        "network": "quaternion",
        **vars(case),
        "launches": len(found),
        "predicted_us": round(sum(e.predicted_us for e in found), 1),
        "floor_us": round(sum(e.floor_us for e in found), 1),
        "by_part": parts,
        "source": COMPUTED,
    }


def report(wanted: Sequence[StepCase], arch: int = ARCH) -> Iterator[str]:
    """Every launch of every case, and the sums; all of it says that it is computed."""
    for case in wanted:
        found = estimates(step_launches(case, arch), arch)
        yield f"AT at {case.where}, batch {case.batch}, {case.precision}, sm_{arch} ({COMPUTED}):"
        yield f"{'part':10} {'kernel':28} {'grid':16} {'tile':22} regs  shared      us  floor bound"
        for key, group in itertools.groupby(found, key=lambda e: e._replace(part="")):
            same = list(group)
            times = f"{len(same)} x " if len(same) > 1 else ""
            yield (
                f"{same[0].part:10} {times + key.name:28} {key.grid:16} {key.tile:22} {key.registers or '':>4} "
                f"{key.shared or '':>7} {key.predicted_us:7.1f} {key.floor_us:6.1f} {key.bound}"
            )
        by_part = ", ".join(f"{part} {sum(e.predicted_us for e in found if e.part == part):.0f}" for part in PARTS)
        total, floor = sum(e.predicted_us for e in found), sum(e.floor_us for e in found)
        yield f"sum of {len(found)} launches: {total:.0f} us, floor {floor:.0f} us ({COMPUTED}); {by_part}"
        yield ""
