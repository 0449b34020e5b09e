"""The form of a Hamilton product and its launch settings: pure functions of shape, type and architecture."""

import contextlib
import contextvars
import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qkernels.ops._arch import tuned_arch

# "dense": one real product with the expanded weight, in plain PyTorch. "signed": the 16 products of the definition as
# one, from signed tiles, in the Triton kernels. "q8": the 8 products of the fast algorithm, in both.
FORMS = ("dense", "signed", "q8")
PLAIN_FORMS = ("dense", "q8")
PRODUCTS = {"signed": 16, "q8": 8}


def cpu_form(p: int, q: int, kernel_area: int = 1, pixels: int = 1) -> str:
    """The fastest plain-PyTorch form on a CPU in float32, forward and backward (bench/results/cpu_forms.csv).

    "q8" halves the p q kernel_area products of a pixel at the cost of passes over p + q maps, which are slower for maps
    that do not fit the caches. The batch size has no influence, so that it never changes what is compiled.

    Args:
        p: quaternion channels of the output.
        q: quaternion channels of the input, per group.
        kernel_area: kh kw; 1 for a linear map.
        pixels: H W of the input; 1 for a linear map.

    Returns:
        "dense" or "q8".

    >>> cpu_form(128, 128, 9, 64), cpu_form(16, 16, 9, 4096)
    ('q8', 'dense')
    """
    products_per_map = 80 if pixels <= 64 else 160 if pixels <= 256 else 320
    return "q8" if p * q * kernel_area >= products_per_map * (p + q) else "dense"


def triton_form(p: int, q: int, positions: int, precision: str, arch: int) -> str:
    """The form of the Triton kernels for "auto": a function of the weight's shape, whatever the batch size.

    The form that `python -m qkernels.tune` measured; or else "q8" for accurate float32, where products and not loads
    take the time, from the 16 channels of its tiles on; otherwise "signed". This rule follows from the model of
    `cost`, not from a measurement.

    Args:
        p: rows of quaternions of the weight.
        q: columns of quaternions of the weight, in one group.
        positions: number of kernel positions, kh kw.
        precision: "half", "tf32" or "ieee", see `Plan`.
        arch: compute capability, 90 for 9.0.

    Returns:
        "signed" or "q8".

    >>> triton_form(128, 128, 9, "half", 90), triton_form(128, 128, 9, "ieee", 90), triton_form(16, 1, 9, "ieee", 90)
    ('signed', 'q8', 'signed')
    """
    measured: str | None = _table(arch)["forms"].get((precision, p, q, positions))
    if measured:
        return measured
    return "q8" if precision == "ieee" and min(p, q) >= 16 else "signed"


def algorithm_of(form: str, p: int, q: int, positions: int, precision: str, arch: int) -> str:
    """The operators' `algorithm`: form and precision, such as "signed-half".

    Raises:
        ValueError: the kernels do not have that form.
    """
    if form == "auto":
        form = triton_form(p, q, positions, precision, arch)
    if form == "dense":
        raise ValueError("form 'dense' is plain PyTorch's; the Triton kernels have 'signed' and 'q8', or 'auto'")
    if form == "q8" and precision != "ieee":
        raise ValueError(
            "form 'q8' of the Triton kernels is for float32 operands without TF32, where it adds components unrounded; "
            "use 'signed' or 'auto'"
        )
    return f"{form}-{precision}"


def packed_size(elements: int, algorithm: str) -> int:
    """Number of elements of a packed weight: eight tiles for four components; sixteen for tf32 and as a real weight."""
    return elements * (4 if algorithm == "dense" or algorithm.endswith("-tf32") else 2)


@dataclass(frozen=True)
class Tile:
    """Launch settings of one program.

    Args:
        m: pixels: of a gather those it writes, of a weight gradient those of a step.
        n: quaternion channels of the output that it writes.
        k: quaternion channels of the input: of a gather those of a step (of one component, or if they are few of all),
            of a weight gradient those it writes.
        warps: warps of a program.
        stages: depth of the software pipeline.
        registers: maximum number of registers of a thread, for one phase and without the epilogue's
            (tests/compile_only); it limits the number of programs on a multiprocessor in the model.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    registers: int = 255


@dataclass(frozen=True)
class Plan:
    """The computation of a product.

    Args:
        form: "signed" or "q8".
        precision: precision of the products: "half" (float16, bfloat16), "tf32", "ieee" (float32) or "tf32x3" (three
            tf32 products for one of float32, measured to be as accurate).
        tile: launch settings.
        splits: number of programs that share a sum; the last one to arrive adds their parts.
    """

    form: str
    precision: str
    tile: Tile
    splits: int


@dataclass(frozen=True)
class Problem:
    """The size of one product.

    Args:
        kernel: "gather" (convolution, data gradient, transposed convolution) or "dw" (weight gradient).
        pixels: pixels of one phase of the output: rows of a gather, terms of the sum of a weight gradient.
        n: quaternion channels of a group that are written; for "dw" the output's.
        k: quaternion channels of a group that are summed; for "dw" the input's.
        positions: number of kernel positions.
        groups: number of channel groups.
        phases: number of phases of the output's pixels, see kernels.py.
        epilogue: whether a gather's epilogue needs registers: for the maxima of windows, or random numbers.
    """

    kernel: str
    pixels: int
    n: int
    k: int
    positions: int
    groups: int = 1
    phases: int = 1
    epilogue: bool = False

    @property
    def key(self) -> tuple[str, int, int, int, int, int, int]:
        """The key of measurements: pixels count up to the next power of two."""
        return self.kernel, self.pixels.bit_length(), self.n, self.k, self.positions, self.groups, self.phases

    def flat(self, form: str, tile: Tile) -> bool:
        """Whether a step runs over (position, channel) pairs, as the input's channels would not fill a block."""
        return form == "signed" and self.k < tile.k

    def blocks(self, form: str, tile: Tile) -> int:
        """Of a gather: steps of the sum. Of a weight gradient: blocks of (position, input channel) pairs."""
        if self.kernel == "dw":
            return _cdiv(self.k * self.positions, tile.k) if self.flat(form, tile) else self._blocks_of_channels(tile)
        if self.flat(form, tile):
            return _cdiv(4 * self.k * self.positions, tile.k)
        return (4 if form == "signed" else 1) * self._blocks_of_channels(tile)

    def _blocks_of_channels(self, tile: Tile) -> int:
        return self.positions * _cdiv(self.k, tile.k)

    def tiles(self, form: str, tile: Tile) -> int:
        """Number of programs of a split, each of which writes a part of the result."""
        copies = self.groups * self.phases
        if self.kernel == "dw":
            return _cdiv(self.n, tile.n) * (self.blocks(form, tile) + 1) * copies  # one sums the bias gradient
        return _cdiv(self.pixels, tile.m) * _cdiv(self.n, tile.n) * copies

    def steps(self, form: str, tile: Tile) -> int:
        """Number of steps of a sum."""
        return _cdiv(self.pixels, tile.m) if self.kernel == "dw" else self.blocks(form, tile)


def plan(problem: Problem, form: str, precision: str, arch: int, multiprocessors: int) -> Plan:
    """Launch settings: the measured ones of a table, else those which `cost` finds fastest among `candidates`.

    Args:
        problem: the product's size.
        form: "signed" or "q8".
        precision: "half", "tf32" or "ieee".
        arch: compute capability, 90 for 9.0; one without tiles of its own takes those of the next lower one.
        multiprocessors: number of streaming multiprocessors of the GPU.

    >>> plan(Problem("gather", 320, 128, 128, 9), "signed", "half", 90, 132).splits > 1  # few pixels: share their sums
    True
    """
    forced = _forced.get()
    return _fitted(forced, problem) if forced else _best(problem, form, precision, arch, multiprocessors)


@functools.cache
def _best(problem: Problem, form: str, precision: str, arch: int, multiprocessors: int) -> Plan:
    measured = _table(arch)["plans"].get((*problem.key, form, precision))
    if measured and not _spills(problem, measured.tile):
        return _fitted(measured, problem)
    costs = {
        option: cost(problem, option, arch, multiprocessors) for option in candidates(problem, form, precision, arch)
    }
    fastest = min(each.total for each in costs.values())

    def rank(option: Plan) -> tuple[float, ...]:
        each, programs = costs[option], problem.tiles(form, option.tile) * option.splits
        slow = each.total > (1 + MODEL_ERROR) * fastest
        return slow, slow * each.total, programs < 0.75 * multiprocessors, each.parts > 0.1, each.total

    return min(costs, key=rank)


def _fitted(option: Plan, problem: Problem) -> Plan:
    """The plan without empty splits: the measurement's number of pixels was rounded."""
    return replace(option, splits=_possible_splits(problem, option.form, option.tile, option.splits))


@contextlib.contextmanager
def force(option: Plan) -> Iterator[None]:
    """Makes every plan in the block this one: for the search for launch settings and for tests."""
    token = _forced.set(option)
    try:
        yield
    finally:
        _forced.reset(token)


_forced: contextvars.ContextVar[Plan | None] = contextvars.ContextVar("forced", default=None)


def candidates(problem: Problem, form: str, precision: str, arch: int) -> Iterator[Plan]:
    """Every plan with the architecture's tiles and 1, 2, 3, 4, 6, 8, 12 ... splits of the sum, none empty."""
    # A tile may be in both lists, in each for a different kernel.
    for tile in _listed(problem.kernel, form, precision, arch):
        if not problem.flat(form, tile) and not _spills(problem, tile):
            yield from _shared_by(problem, form, precision, tile)
    for tile in flat_tiles(problem.kernel, precision, arch) if form == "signed" else ():
        # Blocks of 4 channels are for layers of as few.
        fits = (tile.n < 16) == (problem.n < 16)
        if problem.flat(form, tile) and fits and not _spills(problem, tile):
            yield from _shared_by(problem, form, precision, tile)


def _shared_by(problem: Problem, form: str, precision: str, tile: Tile) -> Iterator[Plan]:
    """The plans of a tile with each number of splits."""
    for exponent in range(MOST_SPLITS.bit_length()):
        for splits in (2**exponent, 3 * 2**exponent // 2):
            yield Plan(form, precision, tile, _possible_splits(problem, form, tile, splits))


def _spills(problem: Problem, tile: Tile) -> bool:
    """Whether the epilogue needs more registers than the tile leaves; tables are measured without such an epilogue."""
    return problem.epilogue and not leaves_registers(tile)


def leaves_registers(tile: Tile) -> bool:
    """Whether a thread has registers left for an epilogue: at most 64 sums of all components (tests/compile_only)."""
    return tile.m * 4 * tile.n <= 64 * 32 * tile.warps


def _possible_splits(problem: Problem, form: str, tile: Tile, splits: int) -> int:
    """The largest number of splits that have a step of the sum each; 1 without a ticket for each tile."""
    return 1 if problem.tiles(form, tile) > MOST_TICKETS else whole_splits(problem.steps(form, tile), splits)


def whole_splits(steps: int, splits: int) -> int:
    """The largest number of splits, at least 1, that have a step of the sum each and whose bounds fit 32 bits.

    >>> whole_splits(9, 4), whole_splits(9, 16)
    (4, 9)
    """
    return max(1, min(steps, splits, (2**31 - 1) // max(steps, 1)))


@dataclass(frozen=True)
class Cost:
    """The model's estimate for a launch, in clock cycles of a multiprocessor.

    Attributes:
        total: cycles of the launch.
        residents: programs that a multiprocessor holds at once.
        shared: bytes of shared memory of a program.
        bound: bottleneck of a step: "products", "loads" (from the L2 cache), or its own "latency".
        parts: share of the total for parts of shared sums.
    """

    total: float
    residents: int
    shared: int
    bound: str
    parts: float


def cost(problem: Problem, plan: Plan, arch: int, multiprocessors: int) -> Cost:
    """A model of the time of a launch; nothing in it was measured on a GPU.

    A multiprocessor holds as many programs as registers and shared memory allow. Their steps take the time of their
    products or of their loads, but no less than the latency of one step of one program. The last round of programs
    may leave multiprocessors idle. Programs that share a sum write their parts, and the last one reads them.

    Rates of products are the data sheets'; L2_BYTES, LATENCY and the fixed costs are assumptions (design notes).
    """
    tile, precision = plan.tile, plan.precision
    rate = PRODUCTS_PER_CLOCK[tuned_arch(arch, TILES)][precision]
    size = 2 if precision == "half" else 4
    rows, columns = (4 * tile.k, 4 * tile.n) if problem.kernel == "dw" else (tile.m, 4 * tile.n)
    depth = tile.m if problem.kernel == "dw" else tile.k
    passes = 1
    if plan.form == "signed":
        products, loads = rows * columns * depth, (rows + columns) * depth * size
    elif problem.kernel == "dw":
        passes, products, loads = 2, 4 * tile.k * tile.n * depth, (rows + columns) * depth * size
    else:
        passes, products, loads = 2, 4 * tile.m * tile.n * depth, (4 * rows + columns) * depth * size
    shared = tile.stages * loads
    registers = tile.registers + EPILOGUE_REGISTERS * problem.epilogue + PHASE_REGISTERS * (problem.phases > 1)
    residents = _residents(tile.warps, min(registers, 255), shared, arch)
    programs, steps = problem.tiles(plan.form, tile) * plan.splits, _cdiv(problem.steps(plan.form, tile), plan.splits)
    product_clocks, load_clocks = products / rate, loads / L2_BYTES
    latency = max(product_clocks, load_clocks, LATENCY / max(1, tile.stages - 1)) + STEP_CLOCKS
    each = _cdiv(programs, multiprocessors)  # of the busiest multiprocessor
    rounds, rest = divmod(each, residents)
    busy = max(product_clocks, load_clocks)

    def round_clocks(together: int) -> float:
        return passes * steps * max(together * busy, latency) + PROGRAM_CLOCKS if together else 0.0

    time = rounds * round_clocks(residents) + round_clocks(rest)
    parts = 0.0
    if plan.splits > 1:
        elements = rows * columns // (4 if problem.kernel == "dw" else 1)
        traffic = 8 * programs * elements / (multiprocessors * L2_BYTES)
        parts = TICKET_CLOCKS + traffic + plan.splits * 4 * elements / LONE_BYTES
    bound = "latency" if latency > residents * busy else "products" if product_clocks >= load_clocks else "loads"
    return Cost(time + parts, residents, shared, bound, parts / (time + parts))


def _residents(warps: int, registers: int, shared: int, arch: int) -> int:
    """Programs that a multiprocessor holds at once."""
    by_registers = 65536 // (32 * warps * _cdiv(registers, 8) * 8)
    by_shared = SHARED_BYTES[tuned_arch(arch, TILES)] // (shared + 1024)
    return max(1, min(by_registers, by_shared, 64 // warps, 32))


# Multiply-adds of a multiprocessor per clock (data sheets of A100, H100, B200); bytes of its shared memory.
PRODUCTS_PER_CLOCK = {
    80: {"half": 1024, "tf32": 512, "tf32x3": 170, "ieee": 64},
    90: {"half": 2048, "tf32": 1024, "tf32x3": 341, "ieee": 128},
    100: {"half": 4096, "tf32": 2048, "tf32x3": 682, "ieee": 128},
}
SHARED_BYTES = {80: 167_936, 90: 233_472, 100: 233_472}
# Bytes that a multiprocessor loads from the L2 cache per clock, where all do and alone; clocks until they are there.
L2_BYTES, LONE_BYTES, LATENCY = 36, 64, 700
# Of a step: barriers, addresses; of a program: its start, its epilogue; of a shared sum: barrier, ticket, first load.
STEP_CLOCKS, PROGRAM_CLOCKS, TICKET_CLOCKS = 120, 1500, 2000
# Between plans that differ by less than this share no model decides, but how many multiprocessors have a program, and
# then whether parts of sums take less than a tenth of the time.
MODEL_ERROR = 0.3
MOST_SPLITS = 256
# What maxima of windows and several phases add to a tile's registers, at most (tests/compile_only). Random numbers, of
# linear maps alone, count as maxima do; two tiles of few channels they cost more, up to 149.
EPILOGUE_REGISTERS, PHASE_REGISTERS = 80, 24
# Tiles of a launch that several programs may share the sum of: each has a counter.
MOST_TICKETS = 1024

# m, n, k, warps, stages, registers of each architecture's tiles, by kernel, form and precision; "flat": those of
# "signed" for few channels.
TILES: dict[int, dict[tuple[str, str, str], tuple[tuple[int, ...], ...]]] = {
    80: {
        ("gather", "signed", "half"): (
            (128, 16, 64, 8, 3, 128),
            (64, 32, 64, 4, 3, 254),
            (64, 16, 64, 4, 4, 145),
            (32, 32, 64, 4, 3, 128),
            (32, 16, 64, 4, 4, 94),
            (128, 16, 32, 8, 3, 117),
            (64, 16, 32, 4, 4, 96),
        ),
        ("gather", "flat", "half"): ((128, 16, 32, 8, 3, 128), (128, 4, 64, 4, 3, 181)),
        ("dw", "signed", "half"): (
            (64, 32, 32, 8, 3, 160),
            (64, 32, 32, 8, 2, 128),
            (64, 32, 16, 8, 3, 128),
            (64, 16, 16, 4, 4, 112),
        ),
        ("dw", "flat", "half"): ((64, 16, 16, 4, 3, 255), (64, 4, 16, 4, 3, 147)),
        ("gather", "signed", "tf32"): ((64, 32, 32, 8, 3, 102), (64, 16, 32, 4, 3, 117), (32, 16, 32, 4, 3, 72)),
        ("gather", "flat", "tf32"): ((64, 16, 32, 8, 3, 80), (32, 16, 32, 4, 2, 72), (64, 4, 32, 4, 2, 72)),
        ("dw", "signed", "tf32"): ((32, 32, 16, 8, 3, 128), (32, 16, 16, 4, 3, 128)),
        ("dw", "flat", "tf32"): ((32, 16, 16, 8, 2, 98), (32, 4, 16, 4, 2, 72)),
        ("gather", "signed", "ieee"): ((32, 16, 16, 4, 2, 96), (32, 16, 16, 8, 2, 80), (16, 16, 16, 4, 2, 72)),
        ("gather", "flat", "ieee"): ((32, 16, 16, 8, 1, 80), (64, 4, 16, 4, 1, 72)),
        ("dw", "signed", "ieee"): ((16, 16, 16, 8, 1, 104), (16, 16, 8, 4, 1, 80)),
        ("dw", "flat", "ieee"): ((16, 16, 16, 8, 1, 104), (16, 16, 8, 4, 1, 80), (16, 4, 16, 4, 1, 64)),
        ("gather", "q8", "ieee"): ((64, 32, 16, 8, 2, 128), (32, 16, 16, 4, 1, 80)),
        ("dw", "q8", "ieee"): ((16, 32, 64, 8, 1, 104), (16, 16, 32, 4, 1, 72)),
        ("gather", "signed", "tf32x3"): ((32, 16, 16, 4, 2, 96),),
        ("gather", "flat", "tf32x3"): ((32, 16, 16, 4, 1, 96), (32, 4, 16, 4, 1, 72)),
        ("dw", "signed", "tf32x3"): ((16, 16, 8, 4, 2, 116),),
        ("dw", "flat", "tf32x3"): ((16, 16, 16, 8, 1, 127), (16, 4, 16, 4, 1, 64)),
        ("gather", "q8", "tf32x3"): ((64, 16, 16, 8, 2, 227), (32, 16, 16, 8, 2, 187)),
        ("dw", "q8", "tf32x3"): ((16, 16, 32, 8, 2, 224),),
    },
    90: {
        ("gather", "signed", "half"): (
            (128, 64, 64, 8, 3, 254),
            (256, 32, 64, 8, 3, 254),
            (128, 32, 64, 8, 3, 128),
            (128, 32, 64, 8, 4, 128),
            (64, 64, 64, 4, 3, 253),
            (64, 32, 64, 4, 3, 128),
            (64, 32, 64, 4, 4, 142),
            (64, 16, 64, 4, 4, 100),
            (32, 32, 64, 4, 3, 128),
            (32, 16, 64, 4, 4, 96),
        ),
        ("gather", "flat", "half"): (
            (128, 16, 64, 4, 3, 157),
            (256, 32, 64, 8, 3, 254),
            (128, 32, 64, 8, 3, 168),
            (256, 16, 64, 8, 3, 162),
            (64, 16, 64, 4, 3, 113),
            (128, 4, 64, 4, 3, 164),
        ),
        ("dw", "signed", "half"): (
            (64, 64, 32, 8, 3, 254),
            (64, 32, 64, 8, 3, 240),
            (64, 32, 32, 8, 4, 162),
            (64, 32, 32, 4, 3, 228),
            (64, 32, 16, 4, 4, 168),
            (64, 16, 32, 4, 4, 152),
            (64, 16, 16, 4, 4, 104),
        ),
        ("dw", "flat", "half"): ((64, 16, 16, 4, 3, 250), (64, 32, 16, 8, 3, 174), (64, 4, 16, 4, 3, 80)),
        ("gather", "signed", "tf32"): (
            (128, 32, 32, 8, 3, 189),
            (64, 32, 32, 4, 3, 188),
            (64, 16, 32, 4, 4, 102),
            (32, 16, 32, 4, 3, 68),
        ),
        ("gather", "flat", "tf32"): ((128, 16, 32, 4, 2, 187), (64, 16, 32, 4, 2, 103), (64, 4, 32, 4, 2, 64)),
        ("dw", "signed", "tf32"): ((32, 32, 32, 8, 3, 162), (32, 32, 16, 4, 3, 168), (32, 16, 16, 4, 3, 104)),
        ("dw", "flat", "tf32"): ((32, 16, 16, 4, 2, 193), (32, 4, 16, 4, 2, 72)),
        ("gather", "signed", "ieee"): ((32, 16, 16, 4, 2, 96), (32, 16, 16, 8, 2, 80), (16, 16, 16, 4, 2, 72)),
        ("gather", "flat", "ieee"): ((32, 16, 16, 4, 1, 96), (32, 16, 16, 8, 1, 80), (64, 4, 16, 4, 1, 72)),
        ("dw", "signed", "ieee"): ((16, 16, 16, 8, 1, 104), (16, 16, 8, 4, 1, 80)),
        ("dw", "flat", "ieee"): ((16, 16, 16, 8, 1, 104), (16, 16, 8, 4, 1, 80), (16, 4, 16, 4, 1, 64)),
        ("gather", "q8", "ieee"): ((64, 64, 16, 8, 2, 254), (64, 32, 16, 8, 2, 128), (32, 16, 16, 4, 2, 96)),
        ("dw", "q8", "ieee"): ((16, 64, 32, 8, 2, 128), (16, 32, 64, 8, 2, 128), (16, 16, 32, 4, 2, 80)),
        ("gather", "signed", "tf32x3"): ((64, 16, 16, 8, 2, 118), (32, 16, 16, 4, 2, 96)),
        ("gather", "flat", "tf32x3"): ((16, 16, 16, 4, 1, 96), (32, 4, 16, 4, 1, 72)),
        ("dw", "signed", "tf32x3"): ((16, 16, 16, 8, 2, 120), (16, 16, 8, 4, 2, 88)),
        ("dw", "flat", "tf32x3"): ((16, 16, 16, 8, 1, 115), (16, 4, 16, 4, 1, 64)),
        ("gather", "q8", "tf32x3"): ((64, 32, 16, 8, 2), (64, 16, 16, 4, 2)),
        ("dw", "q8", "tf32x3"): ((16, 32, 64, 8, 2),),
    },
    100: {
        ("gather", "signed", "half"): (
            (128, 64, 64, 8, 3, 255),
            (128, 32, 64, 8, 4, 146),
            (64, 32, 64, 4, 4, 146),
            (64, 16, 64, 4, 4, 77),
            (32, 16, 64, 8, 4, 72),
        ),
        ("gather", "flat", "half"): ((64, 16, 64, 4, 3, 77), (128, 4, 64, 4, 3, 156)),
        ("dw", "signed", "half"): ((64, 32, 32, 8, 4, 145), (64, 32, 32, 4, 3, 255), (64, 16, 16, 4, 4, 80)),
        ("dw", "flat", "half"): ((32, 16, 16, 8, 3, 77), (64, 4, 16, 4, 3, 86)),
        ("gather", "signed", "tf32"): ((128, 32, 32, 8, 3, 210), (64, 16, 32, 4, 4, 96), (32, 16, 32, 4, 3, 66)),
        ("gather", "flat", "tf32"): ((64, 16, 32, 4, 2, 96), (64, 4, 32, 4, 2, 48)),
        ("dw", "signed", "tf32"): ((32, 32, 32, 8, 3, 128), (32, 16, 16, 4, 3, 106)),
        ("dw", "flat", "tf32"): ((32, 16, 16, 4, 3, 112), (32, 4, 16, 4, 2, 72)),
        ("gather", "signed", "ieee"): ((32, 16, 16, 8, 2, 80), (16, 16, 16, 4, 2, 72)),
        ("gather", "flat", "ieee"): ((32, 16, 16, 8, 1, 80), (64, 4, 16, 4, 1, 72)),
        ("dw", "signed", "ieee"): ((16, 16, 16, 8, 1, 104), (16, 16, 8, 4, 1, 80)),
        ("dw", "flat", "ieee"): ((16, 16, 8, 4, 1, 80), (16, 4, 16, 4, 1, 64)),
        ("gather", "q8", "ieee"): ((64, 32, 16, 8, 1, 128), (32, 16, 16, 8, 1, 96)),
        ("dw", "q8", "ieee"): ((16, 32, 64, 8, 2, 128),),
        ("gather", "signed", "tf32x3"): ((32, 16, 16, 4, 2, 96),),
        ("gather", "flat", "tf32x3"): ((16, 16, 16, 4, 1, 96), (32, 4, 16, 4, 1, 72)),
        ("dw", "signed", "tf32x3"): ((16, 16, 8, 4, 2, 116),),
        ("dw", "flat", "tf32x3"): ((16, 16, 16, 8, 2, 80), (16, 4, 16, 4, 1, 72)),
        ("gather", "q8", "tf32x3"): ((64, 32, 16, 8, 2, 176),),
        ("dw", "q8", "tf32x3"): ((16, 16, 64, 8, 2, 168), (16, 16, 32, 4, 2, 247)),
    },
}


def tiles(kernel: str, form: str, precision: str, arch: int) -> tuple[Tile, ...]:
    """The tiles of an architecture, all of which compile without spills (tests/compile_only)."""
    own = _listed(kernel, form, precision, arch)
    return own + flat_tiles(kernel, precision, arch) if form == "signed" else own


def flat_tiles(kernel: str, precision: str, arch: int) -> tuple[Tile, ...]:
    """The tiles whose steps run over (position, channel) pairs, for few channels."""
    return _listed(kernel, "flat", precision, arch)


def _listed(kernel: str, form: str, precision: str, arch: int) -> tuple[Tile, ...]:
    return tuple(Tile(*numbers) for numbers in TILES[tuned_arch(arch, TILES)][kernel, form, precision])


@functools.cache
def _table(arch: int) -> dict[str, dict[Any, Any]]:
    """Measurements of `python -m qkernels.tune` on this architecture; QKERNELS_TABLES names a folder of your own.

    Raises:
        ValueError: the file is none of that command's.
    """
    folder = Path(os.environ.get("QKERNELS_TABLES") or Path(__file__).parent / "tables")
    path = folder / f"sm_{arch}.json"
    if not path.exists():
        return {"forms": {}, "plans": {}}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        forms = {(row["precision"], row["p"], row["q"], row["positions"]): row["form"] for row in rows["forms"]}
        plans = {(*row["problem"], row["form"], row["asked"]): _measured(row) for row in rows["plans"]}
        if wrong := {*forms.values()} - {"signed", "q8"}:
            raise ValueError(f"unknown form {wrong.pop()!r}")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: no table of `python -m qkernels.tune` ({error!r}); remove it") from None
    return {"forms": forms, "plans": plans}


def _measured(row: dict[str, Any]) -> Plan:
    sizes = [*row["tile"][:5], row["splits"]]
    if not all(isinstance(size, int) and size > 0 for size in sizes) or any(size & size - 1 for size in sizes[:4]):
        raise ValueError(f"tile {row['tile']} must be positive, blocks and warps powers of two; splits {row['splits']}")
    return Plan(row["form"], row["precision"], Tile(*row["tile"]), row["splits"])


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
