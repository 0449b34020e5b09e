"""The form of the loss and the kernels' settings: pure functions of shape and type.

Computed, not yet timed on a GPU: forms by their number of operations, settings so that 132 multiprocessors share the
rows of a batch of 20 of the quaternion network's layers 8 to 13 (10240 rows of 64 or 16 positions).
"""

import torch

PANEL_BYTES = 2**21
# Of the kernels: the products of more positions do not fit a program.
MOST_POSITIONS = 64
MOST_ROWS = 2**27  # steps of 16 rows, times 128 splits, are counted in 32 bits
BLOCK_M, BLOCK_K, WARPS = 32, 16, 4
PRODUCTS_BLOCK_M, PRODUCTS_BLOCK_C, PRODUCTS_WARPS = 16, 32, 4
REGISTERS = 255  # the maximum: by itself ptxas stops at 80, 128 or 168 and spills 8 bytes
MOST_SPLITS, SUM_BLOCK, LOSS_BLOCK = 128, 64, 1024


def is_row_form(rows: int, positions: int) -> bool:
    """Whether row sums come from the N x N products of the features, or else from panels of the M x M Gram matrices.

    The first takes two products of M N N per matrix, the second a product of M M N.

    >>> is_row_form(10240, 64), is_row_form(1280, 65536)
    (True, False)
    """
    return 2 * positions < rows


def panel_rows(rows: int, element_size: int) -> int:
    """Number of rows of an M x M matrix that are computed at a time.

    >>> panel_rows(5120, 4)
    102
    """
    return max(PANEL_BYTES // (rows * element_size), 1)


def padded(positions: int) -> int:
    """The kernels' size of an N x N product: a power of two, at least the 16 of a tensor core.

    >>> padded(4), padded(36)
    (16, 64)
    """
    return 16 if positions <= 16 else 32 if positions <= 32 else 64


def products_stages(precision: str, arch: int) -> int:
    """Stages of a product's loop; Triton 3.6.0 fails to pipeline the fifth generation's single tf32 products.

    >>> products_stages("tf32", 90), products_stages("tf32", 100)
    (2, 1)
    """
    return 1 if precision == "tf32" and 100 <= arch < 120 else 2


def splits_of(rows: int) -> int:
    """Number of programs that share the rows of a product: the fewest that take no more steps each than MOST_SPLITS do.

    >>> splits_of(10240), splits_of(100)
    (128, 7)
    """
    steps = -(-rows // PRODUCTS_BLOCK_M)
    return -(-steps // -(-steps // MOST_SPLITS))


def kernel_obstacle(rows: int, positions: int, trained: torch.dtype, frozen: torch.dtype) -> str | None:
    """The reason why the kernels do not compute features of this shape and these types, if any.

    It names no size, which `torch.compile` would treat as a constant.

    >>> kernel_obstacle(5120, 256, torch.float32, torch.float32)
    "the kernels of semantics 'folded-rowwise' take maps of at most 64 positions"
    """
    if trained != frozen:
        return f"the kernels need features of one type, and trained is of {trained}, frozen of {frozen}"
    if positions > MOST_POSITIONS:
        return f"the kernels of semantics 'folded-rowwise' take maps of at most {MOST_POSITIONS} positions"
    if not is_row_form(rows, positions) or rows > MOST_ROWS:
        return (
            "the kernels of semantics 'folded-rowwise' take more than twice as many rows (samples x channels) as "
            f"positions, and at most {MOST_ROWS}"
        )
    return None
