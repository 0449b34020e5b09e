"""The products of a Gram cosine and their launch settings: pure functions of shape, type and architecture."""

import functools
import math
from typing import NamedTuple

from qkernels.ops._arch import tuned_arch

GRAMS = ("channel", "position", "batch")

# Symmetric products are cut into blocks of at most so many rows. On sm_100 Triton 3.7.1 fails to compile blocks of 64
# whose largest element is taken: 32 there, without the fifth generation's instructions.
BLOCK = {80: 64, 90: 64, 100: 32}
# Up to so many rows a Gram matrix, in parts, goes through memory: the one-tile case.
STORED_ROWS = 128
# Bytes of the parts of Gram matrices: a sixteenth of the features, within these bounds.
PARTS_BYTES = (2 << 20, 8 << 20)
MOST_PARTS = 256  # pairs of blocks, times splits


class Tile(NamedTuple):
    """The part of a matrix that a program computes.

    Attributes:
        m: rows of a product; n: its columns.
        k: elements summed in a step; c: columns of the derivative written in a step.
        warps, stages: warps of a program, depth of the software pipeline.
    """

    m: int
    n: int
    k: int
    c: int
    warps: int
    stages: int


# Tiles that compile into machine code without spills for every layout (tests/compile_only), by architecture and what
# is multiplied: "half", or "single" for float32 and all that is centred. No GPU has chosen between them yet.
FORWARD: dict[int, dict[str, tuple[Tile, ...]]] = {
    80: {
        "half": (Tile(16, 16, 128, 0, 4, 3), Tile(32, 32, 64, 0, 4, 3), Tile(64, 64, 64, 0, 4, 2)),
        "single": (Tile(16, 16, 32, 0, 4, 2), Tile(32, 32, 32, 0, 4, 2), Tile(64, 64, 16, 0, 4, 2)),
    },
    90: {
        "half": (Tile(16, 16, 128, 0, 4, 3), Tile(32, 32, 64, 0, 4, 3), Tile(64, 64, 64, 0, 4, 3)),
        "single": (Tile(16, 16, 32, 0, 4, 2), Tile(32, 32, 32, 0, 4, 2), Tile(64, 64, 32, 0, 4, 2)),
    },
}
FORWARD[100] = {
    "half": (Tile(16, 16, 128, 0, 4, 2), *FORWARD[90]["half"][1:]),
    "single": (Tile(16, 16, 32, 0, 4, 2), Tile(32, 32, 32, 0, 4, 3)),
}
# The last tile of a list keeps no whole row of a matrix on chip.
BACKWARD: dict[int, dict[tuple[str, str], tuple[Tile, ...]]] = {
    80: {
        ("stored", "half"): (
            Tile(16, 16, 64, 64, 4, 2),
            Tile(32, 32, 64, 64, 4, 2),
            Tile(64, 64, 64, 64, 4, 2),
            Tile(64, 128, 32, 64, 8, 2),
        ),
        ("stored", "single"): (
            Tile(16, 16, 32, 32, 4, 2),
            Tile(32, 32, 32, 32, 4, 2),
            Tile(64, 64, 32, 32, 4, 2),
            Tile(32, 128, 16, 16, 8, 1),
        ),
        ("direct", "half"): (Tile(32, 256, 32, 64, 8, 2), Tile(64, 128, 32, 128, 8, 2)),
        ("direct", "single"): (Tile(64, 64, 16, 32, 8, 1),),
        ("dual", "half"): (
            Tile(16, 16, 64, 64, 4, 2),
            Tile(32, 32, 64, 64, 4, 2),
            Tile(64, 64, 32, 64, 8, 2),
            Tile(64, 128, 32, 32, 8, 1),
            Tile(32, 256, 32, 32, 8, 1),
            Tile(32, 64, 32, 64, 8, 2),
        ),
        ("dual", "single"): (
            Tile(16, 16, 32, 32, 4, 2),
            Tile(32, 32, 32, 32, 4, 2),
            Tile(16, 64, 16, 32, 4, 1),
            Tile(32, 32, 16, 32, 4, 1),
        ),
    },
    90: {
        ("stored", "half"): (
            Tile(16, 16, 64, 64, 4, 2),
            Tile(32, 32, 64, 64, 4, 2),
            Tile(64, 64, 64, 64, 4, 2),
            Tile(64, 128, 32, 64, 8, 2),
        ),
        ("stored", "single"): (
            Tile(16, 16, 32, 32, 4, 2),
            Tile(32, 32, 32, 32, 4, 2),
            Tile(64, 64, 32, 32, 4, 2),
            Tile(64, 128, 16, 32, 8, 2),
        ),
        ("direct", "half"): (
            Tile(64, 256, 32, 64, 8, 2),
            Tile(32, 512, 32, 64, 8, 2),
            Tile(64, 128, 32, 128, 8, 2),
        ),
        ("direct", "single"): (Tile(64, 64, 16, 64, 8, 2),),
        ("dual", "half"): (
            Tile(16, 16, 64, 64, 4, 2),
            Tile(32, 32, 64, 64, 4, 2),
            Tile(64, 64, 64, 64, 4, 2),
            Tile(64, 128, 32, 64, 8, 2),
            Tile(64, 256, 16, 16, 8, 1),
            Tile(64, 128, 32, 64, 8, 2),
        ),
        ("dual", "single"): (
            Tile(16, 16, 32, 32, 4, 2),
            Tile(32, 32, 32, 32, 4, 2),
            Tile(64, 64, 32, 32, 8, 2),
            Tile(64, 128, 16, 32, 8, 2),
            Tile(32, 32, 32, 16, 4, 1),
        ),
    },
}
BACKWARD[100] = BACKWARD[90] | {
    ("direct", "single"): (Tile(32, 64, 16, 32, 8, 1),),
    ("dual", "single"): (
        Tile(16, 16, 32, 32, 4, 2),
        Tile(32, 32, 32, 16, 4, 2),
        Tile(64, 64, 32, 32, 8, 2),
        Tile(64, 128, 16, 32, 8, 2),
        Tile(32, 32, 32, 16, 4, 1),
    ),
}


class Plan(NamedTuple):
    """Launch settings.

    Attributes:
        mode: "stored", "direct" or "dual", see kernels.py.
        block: rows of a block of a symmetric matrix.
        forward: tile of the products.
        splits: number of programs that share the sum of a block ("stored").
        backward: tile of the derivative.
        column_splits: number of programs that share the columns of the derivative.
    """

    mode: str
    block: int
    forward: Tile
    splits: int
    backward: Tile
    column_splits: int


def is_direct(rows: int, columns: int) -> bool:
    """Whether F F^T, rows x rows, is no larger than F^T F, columns x columns."""
    return rows <= columns


def gram_form(gram: str, samples: int, channels: int, positions: int) -> str:
    """The axis whose pairwise products are squared and summed: "channel", "position", "batch" or "feature".

    The cosine of the Gram matrices F F^T follows from the products F_a^T F_b, F_a^T F_a and F_b^T F_b too.

    >>> gram_form("channel", 20, 512, 16)
    'position'
    """
    if gram == "batch":
        return "batch" if is_direct(samples, channels * positions) else "feature"
    return "channel" if channels <= positions else "position"


def sizes(gram: str, samples: int, channels: int, positions: int) -> tuple[int, int, int]:
    """Items, rows and columns of the matrices F.

    >>> sizes("position", 20, 512, 16)
    (20, 16, 512)
    """
    if gram == "batch":
        return 1, samples, channels * positions
    return (samples, channels, positions) if gram == "channel" else (samples, positions, channels)


def mode_of(rows: int, columns: int, triangles: bool = False) -> str:
    """The mode of the kernels, see kernels.py.

    >>> mode_of(64, 4096), mode_of(256, 256), mode_of(512, 64)
    ('stored', 'direct', 'dual')
    """
    if not is_direct(rows, columns) and not triangles:
        return "dual"
    return "stored" if rows <= STORED_ROWS else "direct"


def workspace_size(rows: int, columns: int, items: int, triangles: bool, both: bool, arch: int) -> tuple[int, ...]:
    """Shape of the blocks of symmetric matrices that the forward stores for the derivative, if the mode stores any."""
    if mode_of(rows, columns, triangles) != "stored":
        return (0,)
    block = block_of(rows, arch)
    return (1 + both, items, pairs_of(rows, block), block, block)


def block_of(rows: int, arch: int) -> int:
    """Rows of a block: a power of two."""
    return min(padded(rows), BLOCK[tuned_arch(arch, BLOCK)])


def pairs_of(rows: int, block: int) -> int:
    """Blocks on and above the diagonal."""
    blocks = -(-rows // block)
    return blocks * (blocks + 1) // 2


@functools.cache
def plan(
    items: int, rows: int, columns: int, half: bool, arch: int, multiprocessors: int, triangles: bool = False
) -> Plan:
    """Launch settings for `items` matrices F, in a half type or in float32.

    >>> plan(20, 64, 4096, True, 90, 132).splits
    3
    """
    mode = mode_of(rows, columns, triangles)
    m, k = (columns, rows) if mode == "dual" else (rows, columns)
    block = block_of(m, arch)
    forward, backward = _forward_tile(block, half, arch), _backward_tile(padded(m), mode, half, arch)
    splits = 1
    if mode == "stored":
        programs = items * (1 if triangles else 2) * pairs_of(m, block)
        size = programs * block * block * 4  # bytes of the parts of a split
        least, most = PARTS_BYTES
        room = min(max(items * rows * columns * (2 if half else 4) // 8, least), most) // size
        needed = -(-2 * multiprocessors // programs)
        splits = max(1, min(needed, room, -(-k // forward.k), MOST_PARTS // pairs_of(m, block)))
    tiles, chunks = items * -(-m // backward.m), -(-k // backward.c)
    # Steps of a program, each of about the same time: the products over all k, which every split of the columns repeats
    # (and every chunk, unless they stay on chip), and those of its own columns.
    products = 0 if mode == "stored" else 2 * -(-k // backward.k)
    whole = m <= backward.n

    def time(splits: int) -> tuple[int, int]:
        waves, columns = -(-tiles * splits // multiprocessors), -(-chunks // splits)
        return waves * (products * (1 if whole else columns) + columns), splits

    column_splits = min(range(1, min(chunks, 64) + 1), key=time)
    return Plan(mode, block, forward, splits, backward, column_splits)


def _forward_tile(block: int, half: bool, arch: int) -> Tile:
    table = FORWARD[tuned_arch(arch, FORWARD)]["half" if half else "single"]
    return next(tile for tile in table if tile.m == block)


def _backward_tile(n: int, mode: str, half: bool, arch: int) -> Tile:
    """The first tile that keeps n rows on chip, or else the last one, which keeps none."""
    *whole, chunked = BACKWARD[tuned_arch(arch, BACKWARD)][mode, "half" if half else "single"]
    return next((tile for tile in whole if tile.n >= n), chunked)


def padded(rows: int) -> int:
    """Rows of a whole matrix on chip: a power of two that the tensor cores multiply."""
    return max(1 << math.ceil(math.log2(rows)), 16)
