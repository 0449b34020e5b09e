"""The kernels of the Gram cosine. F is a matrix [m, k] of each item, read in place, in any layout.

Letters: i item; m row of a tile (M of them), k summed index (K of them); a, b operands. An index runs along one stride,
or along two: the position (h, w) of a map that is not dense (WIDE_M, WIDE_K).

    direct  m is a row of the Gram matrix, G_a = F_a F_a^T [M, M], G_b = F_b F_b^T; n = sum G_a G_b
    dual    m is a column of F, k its row: n = |F_a F_b^T|^2, aa = |F_a F_a^T|^2, bb = |F_b F_b^T|^2 with these [M, M]

Symmetric products are computed for pairs of blocks (p, q), p <= q, with number q (q + 1) / 2 + p; those off the
diagonal count twice. Sums of squares are (value, exponent): value * 2^exponent, so that no feature is too large or too
small. If CENTRED, loads of F subtract the mean over its column, which has an index k, or if dual m. Absent operands are
None. `do_not_specialize` names the sizes that change from call to call: a binary serves them all.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from qkernels.ops.gram_cosine import config

# Sums of products of float32 or bfloat16 features are recomputed with a scale if none of them is in this range.
SMALLEST: tl.constexpr = tl.constexpr(2.0**-60)
LARGEST: tl.constexpr = tl.constexpr(2.0**60)
NOTHING: tl.constexpr = tl.constexpr(-1e9)  # exponent of a sum that is 0
MOST_PARTS: tl.constexpr = tl.constexpr(config.MOST_PARTS)
LOSS_ITEMS: tl.constexpr = tl.constexpr(256)  # cosines that are added at a time


class Matrix(NamedTuple):
    """An operand, F [m, k] of each item, or `_of` one item.

    Attributes:
        ptr: its first element.
        mean_ptr: means that centring subtracts, `[item, K]`, or if dual `[item, M]`; ptr without centring (Triton 3.6
            takes no None in tuples).
        item, m_outer, m_inner, k_outer, k_inner: strides.
    """

    ptr: Any
    mean_ptr: Any
    item: Any
    m_outer: Any
    m_inner: Any
    k_outer: Any
    k_inner: Any


class Axes(NamedTuple):
    """Sizes of all operands, and their numbers of elements along the inner of two strides."""

    M: Any
    K: Any
    m_width: Any
    k_width: Any


class Parts(NamedTuple):
    """Parts of Gram matrices, `[operand, item, pair, split, BLOCK_M, BLOCK_M]`, and the exponent of each part."""

    ptr: Any
    exponent_ptr: Any
    splits: Any


class Scalars(NamedTuple):
    """Scalars of an item: both scales, |G_a|^2, and the two factors of its derivative."""

    scale_a: Any
    scale_b: Any
    aa: Any
    cross: Any
    own: Any


@dataclass(frozen=True)
class Meta:
    """Compile-time constants of a kernel that multiplies features. EVEN: the axis is a whole number of blocks.

    Attributes:
        MODE: "stored", "direct" or "dual" (config.py).
        TRIANGLES: b holds triangles of Gram matrices.
        CENTRED: the means over the columns of F are subtracted.
        CHECKED: products may leave the range of float32, unlike those of float16.
        EXACT: the derivative's products read float32, or else sums of two values of the features' type.
        UPCAST: cast bfloat16, whose bit patterns Triton's interpreter would multiply.
        ONE_BLOCK: a Gram matrix is a single block.
        BLOCK: rows of a block of a stored matrix.
        WHOLE: a program of the derivative holds its rows of a matrix on chip.
        BLOCK_N, BLOCK_C: rows of F that the derivative sums over, and columns of F, in a step.
    """

    MODE: str
    TRIANGLES: bool
    CENTRED: bool
    CHECKED: bool
    EXACT: bool
    UPCAST: bool
    PRECISION: str
    WIDE_M: bool
    WIDE_K: bool
    EVEN_M: bool
    EVEN_K: bool
    BLOCK_M: int
    BLOCK_K: int
    ONE_BLOCK: bool = False
    EVEN_N: bool = False
    EVEN_C: bool = False
    BLOCK: int = 0
    WHOLE: bool = False
    BLOCK_N: int = 0
    BLOCK_C: int = 0

    @property
    def DUAL(self) -> bool:
        return self.MODE == "dual"


@triton.jit
def _exponent(x):
    """floor(log2 x) of x > 0 as float32; below -126 for 0, above 127 for inf and NaN."""
    return ((x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127).to(tl.float32)


@triton.jit
def _power_of_two(exponent):
    """2^exponent, exactly; the exponent is cut to -126 .. 127."""
    exponent = tl.minimum(tl.maximum(exponent, -126.0), 127.0)
    return ((exponent.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _times_power_of_two(x, exponent):
    """x * 2^exponent for exponents of -252 .. 254."""
    half = tl.floor(exponent * 0.5)
    return x * _power_of_two(half) * _power_of_two(exponent - half)


@triton.jit
def _dot(x, y, acc, META: tl.constexpr):
    """acc + x y in float32."""
    if META.UPCAST:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision=META.PRECISION)
    else:
        return tl.dot(x, y, acc, input_precision=META.PRECISION)


@triton.jit
def _pair(number):
    """The blocks (p, q), p <= q, of the pair with this number."""
    q = ((tl.sqrt(8.0 * number + 1.0) - 1.0) * 0.5).to(tl.int32)  # approximate: off by at most 1
    q = tl.where(q * (q + 1) // 2 > number, q - 1, q)
    q = tl.where((q + 1) * (q + 2) // 2 <= number, q + 1, q)
    return number - q * (q + 1) // 2, q


@triton.jit
def _along(index, width, outer, inner, WIDE: tl.constexpr):
    """Offsets of an index along an axis of two strides, the inner one with `width` elements, or of a single stride."""
    if WIDE:
        return (index // width).to(tl.int64) * outer + (index % width).to(tl.int64) * inner
    else:
        return index.to(tl.int64) * inner


@triton.jit
def _of(x, item, axes, META: tl.constexpr):
    """The matrix of an item."""
    mean_ptr = x.mean_ptr + item * (axes.M if META.DUAL else axes.K)
    return Matrix(x.ptr + item * x.item, mean_ptr, x.item, x.m_outer, x.m_inner, x.k_outer, x.k_inner)


@triton.jit
def _rows(x, m, axes, EVEN: tl.constexpr, META: tl.constexpr):
    """Rows as `_load` takes them: their numbers, their addresses, and which of them exist."""
    return m, x.ptr + _along(m, axes.m_width, x.m_outer, x.m_inner, META.WIDE_M), (m < axes.M) | EVEN


@triton.jit
def _tile(x, rows, k, axes, EVEN: tl.constexpr, META: tl.constexpr):
    """Addresses of a tile [m, k], and which of its elements exist."""
    _, m_at, m_ok = rows
    k_at = _along(k, axes.k_width, x.k_outer, x.k_inner, META.WIDE_K)
    return m_at[:, None] + k_at[None, :], m_ok[:, None] & ((k < axes.K) | EVEN)[None, :]


@triton.jit
def _load(x, rows, k, axes, EVEN: tl.constexpr, CENTRED: tl.constexpr, META: tl.constexpr):
    """A tile [m, k] of F; centred in float32."""
    at, ok = _tile(x, rows, k, axes, EVEN, META)
    f = tl.load(at, mask=ok, other=0.0)
    if CENTRED:
        if META.DUAL:
            mean = tl.load(x.mean_ptr + rows[0], mask=rows[2], other=0.0)[:, None]
        else:
            mean = tl.load(x.mean_ptr + k, mask=(k < axes.K) | EVEN, other=0.0)[None, :]
        f = tl.where(ok, f.to(tl.float32) - mean, 0.0)
    return f


@triton.jit
def _sum_of_products(
    acc, x, x_rows, y, y_rows, scales, steps, axes, SAME: tl.constexpr, SCALED: tl.constexpr, META: tl.constexpr
):
    """acc + X Y^T of the rows, over these steps; SCALED: X is multiplied by both scales first.

    In turn, as their product may leave the type's range; only X is scaled, which gives the same as scaling X and Y.
    """
    for step in range(steps[0], steps[1]):
        k = step * META.BLOCK_K + tl.arange(0, META.BLOCK_K)
        u = _load(x, x_rows, k, axes, META.EVEN_K, META.CENTRED, META)
        v = u if SAME else _load(y, y_rows, k, axes, META.EVEN_K, META.CENTRED, META)
        if SCALED:
            u = (u.to(tl.float32) * scales[0] * scales[1]).to(u.dtype)
        acc = _dot(u, tl.trans(v), acc, META)
    return acc


@triton.jit
def _scale_exponent(x, rows, steps, axes, META: tl.constexpr):
    """Exponent of the power of two that brings the largest of these features near 1; 0 if none is finite."""
    largest = 0.0
    for step in range(steps[0], steps[1]):
        k = step * META.BLOCK_K + tl.arange(0, META.BLOCK_K)
        u = tl.abs(_load(x, rows, k, axes, META.EVEN_K, META.CENTRED, META).to(tl.float32))
        largest = tl.maximum(largest, tl.max(tl.max(u, 1), 0))
    exponent = tl.maximum(_exponent(largest), -126.0)
    return tl.where((largest > 0) & (exponent <= 127.0), -exponent, 0.0)


@triton.jit
def _product(x, p, y, q, steps, axes, SAME: tl.constexpr, META: tl.constexpr):
    """Rows p of X times rows q of Y, X Y^T as (P, exponent), which means P * 2^exponent.

    CHECKED: if every |P| is too large or too small to be accurate, the product is recomputed from scaled features.
    """
    BLOCK_M: tl.constexpr = META.BLOCK_M
    x_rows, y_rows = _rows(x, p, axes, META.EVEN_M, META), _rows(y, q, axes, META.EVEN_M, META)
    zero = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    acc = _sum_of_products(zero, x, x_rows, y, y_rows, (1.0, 1.0), steps, axes, SAME, False, META)
    exponent = 0.0
    if META.CHECKED:
        largest = tl.max(tl.max(tl.abs(acc), 1), 0)
        if (largest < SMALLEST) | (largest > LARGEST) | (largest != largest):
            scale_x = _scale_exponent(x, x_rows, steps, axes, META)
            scale_y = scale_x if SAME else _scale_exponent(y, y_rows, steps, axes, META)
            scales = (_power_of_two(scale_x), _power_of_two(scale_y))
            acc = _sum_of_products(zero, x, x_rows, y, y_rows, scales, steps, axes, SAME, True, META)
            exponent = -(scale_x + scale_y)
    return acc, exponent


@triton.jit
def _triangle_tile(ptr, p, q, M, BLOCK_M: tl.constexpr):
    """Block (p, q) of the upper triangle of a symmetric matrix: row by row, from the diagonal on."""
    r, c = p * BLOCK_M + tl.arange(0, BLOCK_M)[:, None], q * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    low, high = tl.minimum(r, c), tl.maximum(r, c)
    return tl.load(ptr + low * M - low * (low + 1) // 2 + high, mask=high < M, other=0.0)


@triton.jit(do_not_specialize=["items", "splits"])
def _gram_kernel(a, b, axes, gram_ptr, exponent_ptr, ticket_ptr, items, splits, pairs, META: tl.constexpr):
    """Parts of G_a and G_b of at most 128 rows, `[operand, item, pair, split, BLOCK_M, BLOCK_M]`, and their exponents.

    A program computes a block of a matrix over one of `splits` parts of k. Direct only.
    """
    item, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    operand, pair = tl.program_id(1) // pairs, tl.program_id(1) % pairs
    p, q = _pair(pair)
    count = tl.cdiv(axes.K, META.BLOCK_K)
    steps = (split * count // splits, (split + 1) * count // splits)
    tl.assume(steps[0] < steps[1])
    BLOCK_M: tl.constexpr = META.BLOCK_M
    lanes = tl.arange(0, BLOCK_M)
    p, q = p * BLOCK_M + lanes, q * BLOCK_M + lanes
    # The operands' strides may have different types, so each has its own branch.
    if operand == 0:
        own_a = _of(a, item, axes, META)
        acc, exponent = _product(own_a, p, own_a, q, steps, axes, META.ONE_BLOCK, META)
    else:
        own_b = _of(b, item, axes, META)
        acc, exponent = _product(own_b, p, own_b, q, steps, axes, META.ONE_BLOCK, META)
    part = ((operand * items + item) * pairs + pair) * splits + split
    at = part * (BLOCK_M * BLOCK_M) + lanes[:, None] * BLOCK_M + lanes[None, :]
    tl.store(gram_ptr + at, acc)
    tl.store(exponent_ptr + part, tl.where(tl.max(tl.max(tl.abs(acc), 1), 0) > 0, exponent, NOTHING))
    tl.store(ticket_ptr, 0, mask=part == 0)  # for the next launch, which finishes


@triton.jit
def _block(parts, pair, exponent, BLOCK_M: tl.constexpr):
    """A block of a Gram matrix, its parts summed in their order, in units of 2^exponent."""
    lanes = tl.arange(0, BLOCK_M)
    at = lanes[:, None] * BLOCK_M + lanes[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    for split in range(parts.splits):
        part = pair * parts.splits + split
        factor = _power_of_two(tl.load(parts.exponent_ptr + part) - exponent)
        total += factor * tl.load(parts.ptr + part * (BLOCK_M * BLOCK_M) + at)
    return total


@triton.jit
def _normaliser(parts, pairs, BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The common exponent of all parts, and that of the scale which brings the largest diagonal element near 1."""
    every = tl.arange(0, MOST_PARTS)
    common = tl.max(tl.load(parts.exponent_ptr + every, mask=every < pairs * parts.splits, other=NOTHING), 0)
    largest = 0.0
    lanes = tl.arange(0, BLOCK_M)
    for block in tl.static_range(BLOCKS):
        diagonal = tl.zeros((BLOCK_M,), tl.float32)
        for split in range(parts.splits):
            part = block * (block + 3) // 2 * parts.splits + split
            factor = _power_of_two(tl.load(parts.exponent_ptr + part) - common)
            diagonal += factor * tl.load(parts.ptr + part * (BLOCK_M * BLOCK_M) + lanes * (BLOCK_M + 1))
        largest = tl.maximum(largest, tl.max(diagonal, 0))
    exponent = tl.minimum(_exponent(largest), 127.0)
    scale = tl.minimum(tl.maximum(-tl.floor((common + exponent) * 0.5), -126.0), 126.0)
    return common, tl.where(largest > 0, scale, 0.0)


@triton.jit
def _scaled_block(parts, pair, common, scale, BLOCK_M: tl.constexpr):
    """A block of the Gram matrix of features times 2^scale."""
    return _times_power_of_two(_block(parts, pair, common, BLOCK_M), common + 2 * scale)


@triton.jit(do_not_specialize=["items", "splits"])
def _gram_finish_kernel(
    gram_ptr, exponent_ptr, triangles_ptr, b_stats_ptr, cosine_ptr, loss_ptr, stats_a_ptr, stats_b_ptr, difference_ptr,
    ticket_ptr, items, M, weight, splits, pairs,
    BOTH: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """From the parts of G_a and G_b: cosine, loss, statistics, and what the derivative needs,

        D_a = G_b / (|G_a| |G_b|) - cosine G_a / |G_a|^2        `[item, pair, BLOCK_M, BLOCK_M]`

    of scaled matrices, and if BOTH the D_b after all D_a. A program computes an item; the last one to store its cosine
    adds up the loss, weight * cosine^2 of all items.
    """
    item, items = tl.program_id(0).to(tl.int64), tl.cast(items, tl.int64)
    size: tl.constexpr = BLOCK_M * BLOCK_M
    first = item * pairs * splits
    a = Parts(gram_ptr + first * size, exponent_ptr + first, splits)
    first += items * pairs * splits
    b = Parts(gram_ptr + first * size, exponent_ptr + first, splits)
    common_a, scale_a = _normaliser(a, pairs, BLOCKS, BLOCK_M)
    bb = 0.0
    if triangles_ptr is None:
        common_b, scale_b = _normaliser(b, pairs, BLOCKS, BLOCK_M)
        power_b = _power_of_two(scale_b)
    else:
        triangles_ptr += item * (M * (M + 1) // 2)
        bb += tl.load(b_stats_ptr + item)
        power_b = tl.load(b_stats_ptr + items + item)
    n, aa = 0.0, 0.0
    for pair in range(pairs):
        p, q = _pair(pair)
        count = tl.where(p == q, 1.0, 2.0)
        ga = _scaled_block(a, pair, common_a, scale_a, BLOCK_M)
        if triangles_ptr is None:
            gb = _scaled_block(b, pair, common_b, scale_b, BLOCK_M)
            bb += count * _sum(gb * gb)
        else:
            gb = _triangle_tile(triangles_ptr, p, q, M, BLOCK_M)
        n += count * _sum(ga * gb)
        aa += count * _sum(ga * ga)
    norm = tl.sqrt(aa) * tl.sqrt(bb)
    cross = 1.0 / tl.where(norm == 0, 1.0, norm)
    cosine = n * cross
    tl.store(cosine_ptr + item, cosine)
    tl.store(stats_a_ptr + item, aa)
    tl.store(stats_a_ptr + items + item, _power_of_two(scale_a))
    tl.store(stats_b_ptr + item, bb)
    tl.store(stats_b_ptr + items + item, power_b)
    # The ticket decides which program adds, never in which order.
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == items - 1:
        losses = tl.zeros((LOSS_ITEMS,), tl.float32)
        for start in range(0, items, LOSS_ITEMS):
            i = start + tl.arange(0, LOSS_ITEMS)
            # Not from this multiprocessor's cache, which may hold old values of the others' cosines.
            of_others = tl.load(cosine_ptr + i, mask=i < items, other=0.0, cache_modifier=".cg")
            losses += of_others * of_others
        tl.store(loss_ptr, weight * tl.sum(losses, 0))
    own_a, own_b = cosine / tl.where(aa == 0, 1.0, aa), cosine / tl.where(bb == 0, 1.0, bb)
    lanes = tl.arange(0, BLOCK_M)
    difference_ptr += item * pairs * size + lanes[:, None] * BLOCK_M + lanes[None, :]
    for pair in range(pairs):
        p, q = _pair(pair)
        ga = _scaled_block(a, pair, common_a, scale_a, BLOCK_M)
        if triangles_ptr is None:
            gb = _scaled_block(b, pair, common_b, scale_b, BLOCK_M)
        else:
            gb = _triangle_tile(triangles_ptr, p, q, M, BLOCK_M)
        tl.store(difference_ptr + pair * size, cross * gb - own_a * ga)
        if BOTH:
            tl.store(difference_ptr + (items * pairs + pair) * size, cross * ga - own_b * gb)


@triton.jit
def _normalised(product):
    """The product divided by a power of two that brings the largest element near 1, and its exponent."""
    largest = tl.max(tl.max(tl.abs(product), 1), 0)
    exponent = tl.minimum(tl.maximum(_exponent(largest), -126.0), 127.0)
    return _times_power_of_two(product, -exponent), tl.where(largest > 0, exponent, NOTHING)


@triton.jit
def _sum(x):
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit
def _normalised_product(x, p, y, q, steps, axes, SAME: tl.constexpr, META: tl.constexpr):
    """`_product`, its largest element brought near 1."""
    product, exponent = _product(x, p, y, q, steps, axes, SAME, META)
    product, more = _normalised(product)
    return product, exponent + more


@triton.jit
def _square(x, p, y, q, steps, axes, SAME: tl.constexpr, META: tl.constexpr):
    """The sum of the squares of a `_product`, as (value, exponent)."""
    product, exponent = _product(x, p, y, q, steps, axes, SAME, META)
    product, more = _normalised(product)
    return _sum(product * product), 2 * (exponent + more)


@triton.jit
def _gram_squares_kernel(a, b, axes, partial_ptr, pairs, META: tl.constexpr):
    """Parts of n, aa and bb, each (value, exponent): `[item, program, 6]`.

    Direct, a program computes a pair of blocks of both matrices. Dual, it computes a block of F_a F_b^T, or a pair of
    blocks of F_a F_a^T or (with the grid's last programs, if bb is needed) of F_b F_b^T.
    """
    item, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    steps = (0, tl.cdiv(axes.K, META.BLOCK_K))
    tl.assume(steps[1] > 0)
    BLOCK_M: tl.constexpr = META.BLOCK_M
    lanes = tl.arange(0, BLOCK_M)
    a, b = _of(a, item, axes, META), _of(b, item, axes, META)
    n, aa, bb = 0.0, 0.0, 0.0
    n_exponent, aa_exponent, bb_exponent = NOTHING, NOTHING, NOTHING
    if META.DUAL:
        blocks = tl.cdiv(axes.M, BLOCK_M)
        if program < blocks * blocks:
            a_rows, b_rows = program // blocks * BLOCK_M + lanes, program % blocks * BLOCK_M + lanes
            n, n_exponent = _square(a, a_rows, b, b_rows, steps, axes, False, META)
        else:
            pair = program - blocks * blocks
            p, q = _pair(pair % pairs)
            weight = tl.where(p == q, 1.0, 2.0)
            p_rows, q_rows = p * BLOCK_M + lanes, q * BLOCK_M + lanes
            if pair < pairs:
                aa, aa_exponent = _square(a, p_rows, a, q_rows, steps, axes, META.ONE_BLOCK, META)
                aa *= weight
            else:
                bb, bb_exponent = _square(b, p_rows, b, q_rows, steps, axes, META.ONE_BLOCK, META)
                bb *= weight
    else:
        p, q = _pair(program)
        weight = tl.where(p == q, 1.0, 2.0)
        p_rows, q_rows = p * BLOCK_M + lanes, q * BLOCK_M + lanes
        ga, a_exponent = _normalised_product(a, p_rows, a, q_rows, steps, axes, META.ONE_BLOCK, META)
        if META.TRIANGLES:
            gb, b_exponent = _normalised(_triangle_tile(b.ptr, p, q, axes.M, BLOCK_M))
        else:
            gb, b_exponent = _normalised_product(b, p_rows, b, q_rows, steps, axes, META.ONE_BLOCK, META)
        n, n_exponent = weight * _sum(ga * gb), a_exponent + b_exponent
        aa, aa_exponent = weight * _sum(ga * ga), 2 * a_exponent
        bb, bb_exponent = weight * _sum(gb * gb), 2 * b_exponent
    partial_ptr += (item * tl.num_programs(1) + program) * 6
    tl.store(partial_ptr, n)
    tl.store(partial_ptr + 1, n_exponent)
    tl.store(partial_ptr + 2, aa)
    tl.store(partial_ptr + 3, aa_exponent)
    tl.store(partial_ptr + 4, bb)
    tl.store(partial_ptr + 5, bb_exponent)


@triton.jit
def _total(partial_ptr, item, item_ok, programs, first, count, BLOCK_P: tl.constexpr):
    """The sums of (value, exponent) over `count` programs of each item, from number `first` on."""
    total, exponent = tl.zeros(item.shape, tl.float32), tl.full(item.shape, NOTHING, tl.float32)
    for start in range(0, count, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)[None, :]
        at = (item.to(tl.int64)[:, None] * programs + first + p) * 6
        ok = item_ok[:, None] & (p < count)
        value = tl.load(partial_ptr + at, mask=ok, other=0.0)
        of_value = tl.load(partial_ptr + at + 1, mask=ok, other=NOTHING)
        largest = tl.maximum(tl.max(of_value, 1), exponent)
        total = total * _ratio(exponent, largest) + tl.sum(value * _ratio(of_value, largest[:, None]), 1)
        exponent = largest
    return total, exponent


@triton.jit
def _ratio(exponent, largest):
    """2^(exponent - largest), 1 for equal ones, however small."""
    return tl.where(exponent == largest, 1.0, _power_of_two(exponent - largest))


@triton.jit
def _scale_of(exponent):
    """Exponent of the scale that brings a sum of fourth powers of features, of 2^exponent, near 1."""
    scale = tl.minimum(tl.maximum(-tl.floor(exponent * 0.25), -126.0), 126.0)
    return tl.where(exponent < 0.5 * NOTHING, 0.0, scale)


@triton.jit(do_not_specialize=["items", "programs"])
def _gram_cosine_kernel(
    partial_ptr, b_stats_ptr, cosine_ptr, loss_ptr, stats_a_ptr, stats_b_ptr, items, programs, products, pairs, weight,
    TRIANGLES: tl.constexpr, DUAL: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """cosine, statistics and weight * sum of squared cosines, from the parts of all items, by a single program.

    Dual, the first `products` programs have the parts of n, the next `pairs` those of aa, the next those of bb.
    """
    first_a = products if DUAL else 0
    first_b = products + pairs if DUAL else 0
    losses = tl.zeros((BLOCK_I,), tl.float32)
    for first in range(0, items, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        i_ok = i < items
        n, n_exponent = _total(partial_ptr, i, i_ok, programs, 0, products, BLOCK_P)
        aa, aa_exponent = _total(partial_ptr + 2, i, i_ok, programs, first_a, pairs, BLOCK_P)
        scale_a = _scale_of(aa_exponent)
        aa = _times_power_of_two(aa, aa_exponent + 4 * scale_a)
        if b_stats_ptr is None:
            bb, bb_exponent = _total(partial_ptr + 4, i, i_ok, programs, first_b, pairs, BLOCK_P)
            scale_b = _scale_of(bb_exponent)
            bb = _times_power_of_two(bb, bb_exponent + 4 * scale_b)
            power_b = _power_of_two(scale_b)
        else:
            bb = tl.load(b_stats_ptr + i, mask=i_ok, other=0.0)
            power_b = tl.load(b_stats_ptr + items + i, mask=i_ok, other=1.0)
            # Triangles are of scaled matrices.
            scale_b = 0.0 if TRIANGLES else _exponent(power_b)
        n = _times_power_of_two(n, tl.maximum(n_exponent + 2 * (scale_a + scale_b), -252.0))
        norm = tl.sqrt(aa) * tl.sqrt(bb)
        cosine = n / tl.where(norm == 0, 1.0, norm)
        tl.store(cosine_ptr + i, cosine, mask=i_ok)
        tl.store(stats_a_ptr + i, aa, mask=i_ok)
        tl.store(stats_a_ptr + items + i, _power_of_two(scale_a), mask=i_ok)
        tl.store(stats_b_ptr + i, bb, mask=i_ok)
        tl.store(stats_b_ptr + items + i, power_b, mask=i_ok)
        losses += tl.where(i_ok, cosine * cosine, 0.0)
    tl.store(loss_ptr, weight * tl.sum(losses, 0))


@triton.jit
def _split_in_two(x, like, META: tl.constexpr):
    """float32 as a sum of two values of the features' type; unchanged if EXACT."""
    if META.EXACT:
        return x, x
    else:
        high = x.to(like)
        return high, (x - high.to(tl.float32)).to(like)


@triton.jit
def _times(pair, f, acc, META: tl.constexpr):
    acc = _dot(pair[0], f, acc, META)
    if not META.EXACT:
        acc = _dot(pair[1], f, acc, META)
    return acc


@triton.jit
def _row_block(x, x_rows, y, y_rows, scales, acc, axes, META: tl.constexpr):
    steps = (0, tl.cdiv(axes.K, META.BLOCK_K))
    tl.assume(steps[1] > 0)
    return _sum_of_products(acc, x, x_rows, y, y_rows, scales, steps, axes, False, META.CHECKED, META)


@triton.jit
def _terms(a, b, m, n, scalars, axes, META: tl.constexpr):
    """Rows m, columns n of aa D, brought near 1 for the sake of float16's range; or if dual of S_b and of S_a."""
    scale_a, scale_b = scalars.scale_a, scalars.scale_b
    zero = tl.zeros((m.shape[0], n.shape[0]), tl.float32)
    a_rows, a_all = _rows(a, m, axes, META.EVEN_M, META), _rows(a, n, axes, META.EVEN_N, META)
    if META.MODE == "stored":
        p, q = m[:, None] // META.BLOCK, n[None, :] // META.BLOCK
        r, c = m[:, None] % META.BLOCK, n[None, :] % META.BLOCK
        pair = tl.where(p <= q, q * (q + 1) // 2 + p, p * (p + 1) // 2 + q)
        element = pair * (META.BLOCK * META.BLOCK) + tl.where(p <= q, r * META.BLOCK + c, c * META.BLOCK + r)
        d = tl.load(b.ptr + element, mask=(m < axes.M)[:, None] & (n < axes.M)[None, :], other=0.0)
        d *= scalars.aa
        return d, d
    elif META.MODE == "direct":
        if META.TRIANGLES:
            low, high = tl.minimum(m[:, None], n[None, :]), tl.maximum(m[:, None], n[None, :])
            acc = tl.load(b.ptr + low * axes.M - low * (low + 1) // 2 + high, mask=high < axes.M, other=0.0)
        else:
            b_rows, b_all = _rows(b, m, axes, META.EVEN_M, META), _rows(b, n, axes, META.EVEN_N, META)
            acc = _row_block(b, b_rows, b, b_all, (scale_b, scale_b), zero, axes, META)
            if not META.CHECKED:
                acc = acc * scale_b * scale_b
        # One accumulator: G_a' - cross / own G_b'.
        acc = acc * (-scalars.cross / scalars.own)
        if not META.CHECKED:
            acc = acc / scale_a / scale_a
        acc = _row_block(a, a_rows, a, a_all, (scale_a, scale_a), acc, axes, META)
        if not META.CHECKED:
            acc = acc * scale_a * scale_a
        acc = acc * (-scalars.own * scalars.aa)
        return acc, acc
    else:
        b_all = _rows(b, n, axes, META.EVEN_N, META)
        s_b = _row_block(a, a_rows, b, b_all, (scale_a, scale_b), zero, axes, META)
        s_a = _row_block(a, a_rows, a, a_all, (scale_a, scale_a), zero, axes, META)
        if not META.CHECKED:
            s_b, s_a = s_b * scale_a * scale_b, s_a * scale_a * scale_a
        return s_b, s_a


@triton.jit
def _terms_in_two(a, b, m, n, scalars, axes, META: tl.constexpr):
    """The terms as `_times` takes them."""
    TYPE: tl.constexpr = tl.float32 if META.EXACT else a.ptr.dtype.element_ty
    x, y = _terms(a, b, m, n, scalars, axes, META)
    return _split_in_two(x, TYPE, META), _split_in_two(y, TYPE, META)


@triton.jit
def _columns(a, b, n, k, x, y, out, own_part, axes, META: tl.constexpr):
    """out + D F_a; if dual out + S_b F_b, own_part + S_a F_a.

    A centred D has rows that sum to 0, so there the features' means do not matter.
    """
    f = _load(a, _rows(a, n, axes, META.EVEN_N, META), k, axes, META.EVEN_C, META.CENTRED and META.DUAL, META)
    if META.DUAL:
        own_part = _times(y, f, own_part, META)
        f = _load(b, _rows(b, n, axes, META.EVEN_N, META), k, axes, META.EVEN_C, META.CENTRED, META)
    return _times(x, f, out, META), own_part


@triton.jit(do_not_specialize=["items", "splits"])
def _gram_backward_kernel(
    a, b, incoming, da, axes, cosine_ptr, stats_a_ptr, stats_b_ptr, dcosine_ptr, dloss_ptr, items, weight, splits,
    META: tl.constexpr,
):  # fmt: skip
    """dcosine/dF_a times dcosine + 2 weight cosine dloss, + the incoming gradient.

    With the scales s, a power of two, and scaled matrices G' = s^2 G:

        stored, direct  dF_a = 2 s_a^2 D F_a,    D = G_b' / (|G_a'| |G_b'|) - cosine G_a' / |G_a'|^2  [M, M]
        dual            dF_a = 2 s_a ( s_b S_b F_b / (|G_a'| |G_b'|) - s_a cosine S_a F_a / |G_a'|^2 ),
                        S_x = s_a s_x F_a F_x^T  [M, M]

    (dual: F [columns, rows]). A program computes BLOCK_M rows of dF_a in one of `splits` parts of the columns k. If
    WHOLE, it holds its rows of D, or of S_a and S_b, on chip, at most BLOCK_N elements each; else it computes BLOCK_N
    columns of them at a time, again for each BLOCK_C columns k. Stored, it reads D as b; else it sums the products over
    all k.
    """
    BLOCK_M: tl.constexpr = META.BLOCK_M
    BLOCK_C: tl.constexpr = META.BLOCK_C
    item, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    a, b, da = _of(a, item, axes, META), _of(b, item, axes, META), _of(da, item, axes, META)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    aa, scale_a = tl.load(stats_a_ptr + item), tl.load(stats_a_ptr + items + item)
    bb, scale_b = tl.load(stats_b_ptr + item), tl.load(stats_b_ptr + items + item)
    cosine = tl.load(cosine_ptr + item)
    norm = tl.sqrt(aa) * tl.sqrt(bb)
    factor = 0.0
    if dcosine_ptr is not None:
        factor += 2 * tl.load(dcosine_ptr + item)
    if dloss_ptr is not None:
        factor += 4 * weight * cosine * tl.load(dloss_ptr)
    factor = tl.where(norm == 0, 0.0, factor)
    aa = tl.where(norm == 0, 1.0, aa)
    cross, own = 1.0 / tl.where(norm == 0, 1.0, norm), cosine / aa
    # So that cross / own is finite; the error is 2^-40 of the other term.
    own = tl.maximum(own, cross * 2.0**-40)
    scalars = Scalars(scale_a, scale_b, aa, cross, own)
    da_rows = _rows(da, m, axes, META.EVEN_M, META)
    if incoming is not None:
        incoming = _of(incoming, item, axes, META)
        incoming_rows = _rows(incoming, m, axes, META.EVEN_M, META)
    chunks = tl.cdiv(axes.K, BLOCK_C)
    first, last = split * chunks // splits, (split + 1) * chunks // splits
    tl.assume(first < last)
    blocks = tl.cdiv(axes.M, META.BLOCK_N)
    tl.assume(blocks > 0)
    if META.WHOLE:
        n = tl.arange(0, META.BLOCK_N)
        x, y = _terms_in_two(a, b, m, n, scalars, axes, META)
    for chunk in range(first, last):
        k = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
        out = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        own_part = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        if META.WHOLE:
            out, own_part = _columns(a, b, n, k, x, y, out, own_part, axes, META)
        else:
            for block in range(blocks):
                n = block * META.BLOCK_N + tl.arange(0, META.BLOCK_N)
                x, y = _terms_in_two(a, b, m, n, scalars, axes, META)
                out, own_part = _columns(a, b, n, k, x, y, out, own_part, axes, META)
        if META.DUAL:
            out = (out * (cross * scale_b) - own_part * (own * scale_a)) * (factor * scale_a)
        else:
            out = out * scale_a * (factor / aa * scale_a)
        if incoming is not None:
            at, ok = _tile(incoming, incoming_rows, k, axes, META.EVEN_C, META)
            out += tl.load(at, mask=ok, other=0.0).to(tl.float32)
        at, ok = _tile(da, da_rows, k, axes, META.EVEN_C, META)
        tl.store(at, out.to(da.ptr.dtype.element_ty), mask=ok)
