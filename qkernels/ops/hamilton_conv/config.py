"""What computes a Hamilton product and with which launch settings: pure functions of shape, type and architecture."""

import contextlib
import contextvars
import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

FORMS = ("dense", "q16", "q8")
PRODUCTS = {"dense": 1, "q16": 16, "q8": 8}


def cpu_form(p: int, q: int, kernel_area: int = 1, pixels: int = 1) -> str:
    """The fastest plain-PyTorch form on a CPU in float32, forward and backward (bench/results/cpu_forms.csv).

    "q8" halves the p q kernel_area products of a pixel and pays with passes over p + q maps, which cost more the less
    of them fits the caches. The batch is left out, so that its size never changes what is compiled.

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


def triton_form(p: int, q: int, taps: int, precision: str, arch: int) -> str:
    """The form that the Triton kernels take by themselves: of the weight's shape alone, so that no batch size changes
    it.

    A measured form (`python -m qkernels.tune`) comes first. Without one, "q16" for half types and tf32, where q8 would
    round sums of components; "q8" for accurate float32, where products and not loads take the time; "dense" for so few
    channels that tiles of quaternions would be empty. This rule is computed from the model of `clocks`, not measured.

    Args:
        p: rows of quaternions of the weight.
        q: columns of quaternions of the weight, those of one group.
        taps: kernel positions, kh kw.
        precision: "half", "tf32" or "ieee", see `Plan`.
        arch: compute capability, 90 for 9.0.

    Returns:
        "dense", "q16" or "q8".

    >>> triton_form(128, 128, 9, "half", 90), triton_form(128, 128, 9, "ieee", 90), triton_form(16, 1, 9, "ieee", 90)
    ('q16', 'q8', 'dense')
    """
    measured = _table(arch)["forms"].get((precision, p, q, taps))
    if measured:
        return measured
    if min(p, q) < (16 if precision == "ieee" else 32):
        return "dense"
    return "q8" if precision == "ieee" else "q16"


@dataclass(frozen=True)
class Tile:
    """Launch settings of one program.

    Args:
        m: rows: pixels of a gather, input channels of a weight gradient.
        n: columns: output channels.
        k: summed in one step: input channels of a gather, pixels of a weight gradient.
        warps: warps of a program.
        stages: depth of the software pipeline.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """How one product is computed.

    Args:
        form: "dense", "q16" or "q8".
        precision: of the products: "half" (float16, bfloat16), "tf32", "ieee" (float32) or "tf32x3" (three tf32
            products for one of float32, where it was measured to be as accurate).
        tile: launch settings.
        splits: programs that share one sum; more than one costs a second kernel that adds their parts.
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
        pixels: of one class of the output: rows of a gather, the sum of a weight gradient.
        n: quaternion channels of a group that are written; for "dw" those of the output.
        k: quaternion channels of a group that are summed; for "dw" those of the input.
        taps: kernel positions.
        groups: of the channels.
        classes: of the output's pixels, see kernels.py.
    """

    kernel: str
    pixels: int
    n: int
    k: int
    taps: int
    groups: int = 1
    classes: int = 1

    @property
    def key(self) -> tuple[str, int, int, int, int, int, int]:
        """What a measurement is looked up by: pixels to the next power of two."""
        return self.kernel, self.pixels.bit_length(), self.n, self.k, self.taps, self.groups, self.classes

    def flat(self, form: str, tile: Tile) -> bool:
        """Whether "dense" has to take (tap, channel) pairs one by one: blocks of the input's channels do not fit."""
        block = tile.m if self.kernel == "dw" else tile.k
        return form == "dense" and (self.groups > 1 or 4 * self.k % block != 0)

    def grid(self, form: str, tile: Tile) -> tuple[int, int]:
        """Programs of one split, and steps of their sum."""
        parts = 4 if form == "dense" else 1
        n, k, copies, flat = parts * self.n, parts * self.k, self.groups * self.classes, self.flat(form, tile)
        block = tile.m if self.kernel == "dw" else tile.k
        blocks = _cdiv(k * self.taps, block) if flat else self.taps * _cdiv(k, block)
        if self.kernel == "dw":
            return _cdiv(n, tile.n) * blocks * copies, _cdiv(self.pixels, tile.k)
        return _cdiv(self.pixels, tile.m) * _cdiv(n, tile.n) * copies, blocks


def plan(problem: Problem, form: str, precision: str, arch: int, multiprocessors: int) -> Plan:
    """Launch settings: the measured ones of a table, else those which `clocks` finds fastest among `candidates`.

    Args:
        problem: the product's size.
        form: "dense", "q16" or "q8".
        precision: "half", "tf32" or "ieee".
        arch: compute capability, 90 for 9.0; one without tiles of its own takes those of the next lower one.
        multiprocessors: of the GPU.

    >>> plan(Problem("gather", 320, 128, 128, 9), "q16", "half", 90, 132).splits > 1  # few pixels: share their sums
    True
    """
    forced = _forced.get()
    return _fitted(forced, problem) if forced else _best(problem, form, precision, arch, multiprocessors)


@functools.cache
def _best(problem: Problem, form: str, precision: str, arch: int, multiprocessors: int) -> Plan:
    measured = _table(arch)["plans"].get((*problem.key, form, precision))
    if measured:
        return _fitted(measured, problem)
    options = candidates(problem, form, precision, arch)
    return min(options, key=lambda option: clocks(problem, option, arch, multiprocessors))


def _fitted(option: Plan, problem: Problem) -> Plan:
    """The same plan with no empty split: measurements are looked up by the rounded number of pixels."""
    _, steps = problem.grid(option.form, option.tile)
    return replace(option, splits=whole_splits(steps, option.splits))


@contextlib.contextmanager
def force(option: Plan) -> Iterator[None]:
    """Within the block every plan is this one: for the search of launch settings and for tests."""
    token = _forced.set(option)
    try:
        yield
    finally:
        _forced.reset(token)


_forced: contextvars.ContextVar[Plan | None] = contextvars.ContextVar("forced", default=None)


def candidates(problem: Problem, form: str, precision: str, arch: int) -> Iterator[Plan]:
    """Every plan that the architecture's tiles allow, with 1, 2, 4 ... splits of the sum, none of them empty."""
    fitting = [tile for tile in tiles(problem.kernel, form, precision, arch) if not problem.flat(form, tile)]
    for tile in fitting or [Tile(*numbers) for numbers in FLAT_TILES[precision]]:
        _, steps = problem.grid(form, tile)
        for exponent in range(min(max(steps, 1), MOST_SPLITS).bit_length()):
            yield Plan(form, precision, tile, whole_splits(steps, 2**exponent))


def whole_splits(steps: int, splits: int) -> int:
    """As many of the splits as can have a step of the sum each, and whose edges fit 32 bits; one at least.

    >>> whole_splits(9, 4), whole_splits(9, 16)
    (4, 9)
    """
    return max(1, min(steps, splits, (2**31 - 1) // max(steps, 1)))


def clocks(problem: Problem, plan: Plan, arch: int, multiprocessors: int) -> float:
    """A model of the time in clock cycles: a step waits for its products or its operands, a multiprocessor for its
    programs.

    The rates of products are the data sheets'; L2_BYTES is the assumption of the design notes; the fixed costs are
    rough.
    """
    tile, parts = plan.tile, 1 if plan.form == "dense" else 4
    programs, steps = problem.grid(plan.form, tile)
    rate = PRODUCTS_PER_CLOCK[_known(arch)][plan.precision]
    passes, size = 2 if plan.form == "q8" else 1, 2 if plan.precision == "half" else 4
    products = PRODUCTS[plan.form] * tile.m * tile.n * tile.k / rate
    operands = passes * parts * (tile.m + tile.n) * tile.k * size / L2_BYTES
    programs *= plan.splits
    side_by_side = max(1, 8 // tile.warps)
    time = _cdiv(programs, multiprocessors) * _cdiv(steps, plan.splits) * (max(products, operands) + STEP_CLOCKS)
    time += _cdiv(programs, side_by_side * multiprocessors) * PROGRAM_CLOCKS
    if plan.splits > 1:
        elements = programs * parts * tile.m * tile.n
        time += LAUNCH_CLOCKS + 8 * elements / (multiprocessors * L2_BYTES)
    return time


# Multiply-adds of a multiprocessor per clock (data sheets of A100, H100, B200); bytes it loads from L2.
PRODUCTS_PER_CLOCK = {
    80: {"half": 1024, "tf32": 512, "tf32x3": 170, "ieee": 64},
    90: {"half": 2048, "tf32": 1024, "tf32x3": 341, "ieee": 128},
    100: {"half": 4096, "tf32": 2048, "tf32x3": 682, "ieee": 128},
}
L2_BYTES = 36
STEP_CLOCKS, PROGRAM_CLOCKS, LAUNCH_CLOCKS = 50, 1500, 5000
MOST_SPLITS = 256

# m, n, k, warps, stages of each architecture's tiles, by form and precision; both kernels take them unless "dw" has
# its own.
TILES: dict[int, dict[tuple[str, ...], tuple[tuple[int, int, int, int, int], ...]]] = {
    80: {
        ("dense", "half"): ((64, 64, 64, 8, 3), (64, 64, 32, 4, 3), (32, 32, 64, 4, 3)),
        ("q16", "half"): ((64, 32, 32, 8, 2), (64, 16, 32, 4, 3), (32, 16, 32, 4, 3)),
        ("dw", "q16", "half"): ((64, 16, 32, 4, 3), (32, 16, 32, 4, 3)),
        ("q8", "half"): ((64, 32, 32, 8, 2), (64, 16, 32, 4, 2), (32, 16, 32, 4, 2)),
        ("dw", "q8", "half"): ((64, 16, 32, 8, 2), (64, 32, 16, 8, 2), (32, 16, 32, 4, 2)),
        ("dense", "tf32"): ((64, 64, 32, 4, 3), (64, 32, 32, 4, 3)),
        ("q16", "tf32"): ((32, 16, 16, 4, 3),),
        ("dw", "q16", "tf32"): ((64, 16, 16, 8, 3), (32, 16, 16, 4, 3)),
        ("q8", "tf32"): ((32, 16, 16, 4, 2),),
        ("dw", "q8", "tf32"): ((64, 16, 16, 8, 2), (32, 16, 16, 4, 2)),
        ("dense", "ieee"): ((64, 64, 16, 8, 2), (32, 32, 16, 4, 2)),
        ("q16", "ieee"): ((32, 16, 16, 8, 1), (16, 16, 16, 4, 1)),
        ("q8", "ieee"): ((64, 32, 16, 8, 2), (32, 16, 16, 4, 1)),
        ("dw", "q8", "ieee"): ((64, 32, 16, 8, 1), (32, 16, 16, 4, 1)),
        ("dense", "tf32x3"): ((64, 32, 16, 4, 2),),
        ("q8", "tf32x3"): ((64, 16, 16, 8, 2), (32, 16, 16, 8, 2)),
    },
    90: {
        ("dense", "half"): ((128, 128, 64, 8, 3), (128, 64, 64, 8, 3), (64, 64, 64, 4, 3), (32, 32, 64, 4, 3)),
        ("q16", "half"): ((128, 64, 32, 8, 3), (128, 32, 32, 8, 3), (64, 32, 32, 4, 3), (32, 16, 32, 4, 3)),
        ("q8", "half"): ((128, 32, 32, 8, 2), (64, 32, 32, 8, 3)),
        ("dense", "tf32"): ((128, 64, 32, 8, 3), (64, 64, 32, 4, 3), (64, 32, 32, 4, 3)),
        ("q16", "tf32"): ((128, 32, 16, 8, 3), (64, 32, 16, 4, 3), (64, 16, 16, 4, 3)),
        ("q8", "tf32"): ((64, 32, 16, 8, 2), (64, 16, 16, 4, 2)),
        ("dense", "ieee"): ((64, 64, 16, 8, 2), (32, 32, 16, 4, 2)),
        ("q16", "ieee"): ((32, 16, 16, 8, 1), (16, 16, 16, 4, 1)),
        ("q8", "ieee"): ((64, 64, 16, 8, 2), (64, 32, 16, 8, 2), (32, 16, 16, 4, 2)),
        ("dense", "tf32x3"): ((64, 64, 16, 4, 2), (64, 32, 16, 4, 2)),
        ("q8", "tf32x3"): ((64, 32, 16, 8, 2), (64, 16, 16, 4, 2)),
        ("dw", "q8", "tf32x3"): ((64, 32, 16, 8, 2),),
    },
    100: {
        ("dense", "half"): ((128, 128, 32, 8, 3), (64, 64, 64, 4, 3), (32, 32, 64, 4, 3)),
        ("q16", "half"): ((64, 32, 32, 8, 3), (64, 16, 32, 4, 3), (32, 16, 32, 4, 3)),
        ("q8", "half"): ((64, 32, 32, 8, 2), (64, 16, 32, 8, 2)),
        ("dw", "q8", "half"): ((64, 16, 32, 8, 2), (32, 16, 32, 4, 2)),
        ("dense", "tf32"): ((128, 64, 32, 8, 3),),
        ("q16", "tf32"): ((64, 32, 16, 8, 3), (64, 16, 16, 8, 3)),
        ("dw", "q16", "tf32"): ((64, 16, 16, 8, 3), (32, 16, 16, 4, 3)),
        ("q8", "tf32"): ((64, 32, 16, 8, 2),),
        ("dw", "q8", "tf32"): ((64, 16, 16, 8, 2), (32, 16, 16, 4, 2)),
        ("dense", "ieee"): ((32, 32, 16, 4, 2),),
        ("q16", "ieee"): ((32, 16, 16, 8, 1), (16, 16, 16, 4, 1)),
        ("q8", "ieee"): ((64, 32, 16, 8, 1), (32, 16, 16, 8, 1)),
        ("dw", "q8", "ieee"): ((64, 32, 16, 8, 2),),
        ("dense", "tf32x3"): ((64, 64, 16, 4, 2), (64, 32, 16, 4, 2)),
        ("q8", "tf32x3"): ((64, 32, 16, 8, 2),),
        ("dw", "q8", "tf32x3"): ((64, 16, 16, 8, 2), (32, 16, 16, 4, 2)),
    },
}


# For "dense" where it is flat, on every architecture: an address of its own for each element leaves few registers.
FLAT_TILES = {
    "half": ((64, 32, 32, 4, 1), (32, 32, 32, 4, 1)),
    "tf32": ((32, 32, 32, 4, 1),),
    "tf32x3": ((32, 32, 16, 4, 1),),
    "ieee": ((32, 32, 16, 4, 1),),
}


def tiles(kernel: str, form: str, precision: str, arch: int) -> tuple[Tile, ...]:
    """The tiles of an architecture: those of its table, all of which compile without spills (tests/compile_only)."""
    table = TILES[_known(arch)]
    return tuple(Tile(*numbers) for numbers in table.get((kernel, form, precision)) or table[form, precision])


def _known(arch: int) -> int:
    """The table that an architecture takes: the next lower one's, but 12.0 is built like sm_80, not like sm_100.

    The tiles of sm_80 fit the 99 KiB of shared memory of 8.6, 8.9 and 12.0, too.
    """
    return 80 if arch >= 120 else max(known for known in TILES if known <= max(arch, min(TILES)))


@functools.cache
def _table(arch: int) -> dict[str, dict[Any, Any]]:
    """What `python -m qkernels.tune` measured on this architecture; QKERNELS_TABLES names the folder of your own."""
    folder = Path(os.environ.get("QKERNELS_TABLES") or Path(__file__).parent / "tables")
    path = folder / f"sm_{arch}.json"
    if not path.exists():
        return {"forms": {}, "plans": {}}
    rows = json.loads(path.read_text())
    forms = {(row["precision"], row["p"], row["q"], row["taps"]): row["form"] for row in rows["forms"]}
    plans = {
        (*row["problem"], row["form"], row["asked"]): Plan(
            row["form"], row["precision"], Tile(*row["tile"]), row["splits"]
        )
        for row in rows["plans"]
    }
    return {"forms": forms, "plans": plans}


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
