"""The kernels of the Gram cosine. F is a matrix [m, k] of each item, read where it lies, in any layout.

Letters: i item; m row of a tile (M of them), k summed index (K of them); a, b operands. An index runs along one stride,
or along two: the position (h, w) of a map that is not dense (WIDE_M, WIDE_K).

    direct  m is a row of the Gram matrix, G_a = F_a F_a^T [M, M], G_b = F_b F_b^T; n = sum G_a G_b
    dual    m is a column of F, k its row: n = |F_a F_b^T|^2, aa = |F_a F_a^T|^2, bb = |F_b F_b^T|^2 with these [M, M]

Symmetric products are made for pairs of blocks (p, q), p <= q, of number q (q + 1) / 2 + p, and count twice off the
diagonal. Sums of squares are (value, exponent): value * 2^exponent, so that no feature is too large or too small.
Centred, the mean over a column of F is subtracted while it is loaded: it belongs to k, or if dual to m.
`do_not_specialize` names the sizes that change from call to call: one binary serves them all.
"""

import triton
import triton.language as tl

from qkernels.ops.gram_cosine import config

# Sums of products of float32 or bfloat16 features are made again, scaled, if none of them lies in this range.
SMALLEST: tl.constexpr = tl.constexpr(2.0**-60)
LARGEST: tl.constexpr = tl.constexpr(2.0**60)
NOTHING: tl.constexpr = tl.constexpr(-1e9)  # exponent of a sum that is 0
MOST_PARTS: tl.constexpr = tl.constexpr(config.MOST_PARTS)


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
def _dot(x, y, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + x y in float32. UPCAST: Triton's interpreter would multiply the bit patterns of bfloat16."""
    if UPCAST:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), acc, input_precision=PRECISION)
    else:
        return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def _pair(number):
    """The blocks (p, q), p <= q, of a pair."""
    q = ((tl.sqrt(8.0 * number + 1.0) - 1.0) * 0.5).to(tl.int32)  # the root is approximate: one off at most
    q = tl.where(q * (q + 1) // 2 > number, q - 1, q)
    q = tl.where((q + 1) * (q + 2) // 2 <= number, q + 1, q)
    return number - q * (q + 1) // 2, q


@triton.jit
def _along(index, width, outer, inner, WIDE: tl.constexpr):
    """Offsets of an index along an axis of two strides, of which the inner one has `width` elements, or of one."""
    if WIDE:
        return (index // width).to(tl.int64) * outer + (index % width).to(tl.int64) * inner
    else:
        return index.to(tl.int64) * inner


@triton.jit
def _rows(operand, m, M, axes, EVEN_M: tl.constexpr, WIDE_M: tl.constexpr):
    """What `_load` needs to know of rows: numbers, offsets, and which of them exist."""
    _, _, stride_mo, stride_mi, _, _ = operand
    return m, _along(m, axes[0], stride_mo, stride_mi, WIDE_M), (m < M) | EVEN_M


@triton.jit
def _load(
    operand, rows, k, K, axes, EVEN_K: tl.constexpr, WIDE_K: tl.constexpr, CENTRED: tl.constexpr, DUAL: tl.constexpr
):
    """A tile [m, k] of F; centred in float32."""
    ptr, mean_ptr, _, _, stride_ko, stride_ki = operand
    m, m_at, m_ok = rows
    k_ok = (k < K) | EVEN_K
    ok = m_ok[:, None] & k_ok[None, :]
    x = tl.load(ptr + m_at[:, None] + _along(k, axes[1], stride_ko, stride_ki, WIDE_K)[None, :], mask=ok, other=0.0)
    if CENTRED:
        if DUAL:
            mean = tl.load(mean_ptr + m, mask=m_ok, other=0.0)[:, None]
        else:
            mean = tl.load(mean_ptr + k, mask=k_ok, other=0.0)[None, :]
        x = tl.where(ok, x.to(tl.float32) - mean, 0.0)
    return x


@triton.jit
def _sum_of_products(
    acc, x, x_rows, y, y_rows, scales, K, axes, first, last,
    SAME: tl.constexpr, SCALED: tl.constexpr, EVEN_K: tl.constexpr, WIDE_K: tl.constexpr, CENTRED: tl.constexpr,
    DUAL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + X Y^T of the rows, over the steps first .. last - 1; SCALED: X is multiplied by both scales first.

    In turn, as their product may leave the type's range; X Y^T with both scaled is the same, and only X is touched.
    """
    for step in range(first, last):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        u = _load(x, x_rows, k, K, axes, EVEN_K, WIDE_K, CENTRED, DUAL)
        v = u if SAME else _load(y, y_rows, k, K, axes, EVEN_K, WIDE_K, CENTRED, DUAL)
        if SCALED:
            u = (u.to(tl.float32) * scales[0] * scales[1]).to(u.dtype)
        acc = _dot(u, tl.trans(v), acc, PRECISION, UPCAST)
    return acc


@triton.jit
def _scale_exponent(
    x, rows, K, axes, first, last,
    EVEN_K: tl.constexpr, WIDE_K: tl.constexpr, CENTRED: tl.constexpr, DUAL: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Exponent of the power of two that brings the largest of these features near 1; 0 if none is finite."""
    largest = 0.0
    for step in range(first, last):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        u = tl.abs(_load(x, rows, k, K, axes, EVEN_K, WIDE_K, CENTRED, DUAL).to(tl.float32))
        largest = tl.maximum(largest, tl.max(tl.max(u, 1), 0))
    exponent = tl.maximum(_exponent(largest), -126.0)
    return tl.where((largest > 0) & (exponent <= 127.0), -exponent, 0.0)


@triton.jit
def _product(
    x, x_rows, y, y_rows, K, axes, first, last,
    SAME: tl.constexpr, EVEN_K: tl.constexpr, WIDE_K: tl.constexpr, CENTRED: tl.constexpr, DUAL: tl.constexpr,
    CHECK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """X Y^T as (P, exponent), which means P * 2^exponent.

    CHECK: where every |P| is too large or too small for a product to be trusted, it is made again of scaled features.
    """
    zero = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    acc = _sum_of_products(
        zero, x, x_rows, y, y_rows, (1.0, 1.0), K, axes, first, last,
        SAME, False, EVEN_K, WIDE_K, CENTRED, DUAL, PRECISION, UPCAST, BLOCK_K,
    )  # fmt: skip
    exponent = 0.0
    if CHECK:
        largest = tl.max(tl.max(tl.abs(acc), 1), 0)
        if (largest < SMALLEST) | (largest > LARGEST) | (largest != largest):
            scale_x = _scale_exponent(x, x_rows, K, axes, first, last, EVEN_K, WIDE_K, CENTRED, DUAL, BLOCK_K)
            if SAME:
                scale_y = scale_x
            else:
                scale_y = _scale_exponent(y, y_rows, K, axes, first, last, EVEN_K, WIDE_K, CENTRED, DUAL, BLOCK_K)
            acc = _sum_of_products(
                zero, x, x_rows, y, y_rows, (_power_of_two(scale_x), _power_of_two(scale_y)), K, axes, first, last,
                SAME, True, EVEN_K, WIDE_K, CENTRED, DUAL, PRECISION, UPCAST, BLOCK_K,
            )  # fmt: skip
            exponent = -(scale_x + scale_y)
    return acc, exponent


@triton.jit
def _triangle_tile(ptr, p, q, M, BLOCK_M: tl.constexpr):
    """Block (p, q) of a packed symmetric matrix: row by row, from the diagonal on."""
    r, c = p * BLOCK_M + tl.arange(0, BLOCK_M)[:, None], q * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    low, high = tl.minimum(r, c), tl.maximum(r, c)
    return tl.load(ptr + low * M - low * (low + 1) // 2 + high, mask=high < M, other=0.0)


@triton.jit(do_not_specialize=["items", "splits"])
def _gram_kernel(
    a_ptr, b_ptr, mean_ptr, gram_ptr, exponent_ptr, items, M, K, columns, m_width, k_width, splits, pairs,
    a_item, a_mo, a_mi, a_ko, a_ki, b_item, b_mo, b_mi, b_ko, b_ki,
    EVEN_M: tl.constexpr, EVEN_K: tl.constexpr, WIDE_M: tl.constexpr, WIDE_K: tl.constexpr, CENTRED: tl.constexpr,
    ONE_BLOCK: tl.constexpr, CHECK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Parts of G_a and G_b of at most 128 rows, `[operand, item, pair, split, BLOCK_M, BLOCK_M]`, and their exponents.

    One program owns one block of one matrix over one of `splits` parts of k. Direct only.
    """
    item, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    operand, pair = tl.program_id(1) // pairs, tl.program_id(1) % pairs
    p, q = _pair(pair)
    steps = tl.cdiv(K, BLOCK_K)
    first, last = split * steps // splits, (split + 1) * steps // splits
    tl.assume(first < last)
    axes = (m_width, k_width)
    lanes = tl.arange(0, BLOCK_M)
    if operand == 0:
        x = (a_ptr + item * a_item, mean_ptr + item * columns, a_mo, a_mi, a_ko, a_ki)
        x_rows = _rows(x, p * BLOCK_M + lanes, M, axes, EVEN_M, WIDE_M)
        y_rows = _rows(x, q * BLOCK_M + lanes, M, axes, EVEN_M, WIDE_M)
        acc, exponent = _product(
            x, x_rows, x, y_rows, K, axes, first, last,
            ONE_BLOCK, EVEN_K, WIDE_K, CENTRED, False, CHECK, PRECISION, UPCAST, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    else:
        x = (b_ptr + item * b_item, mean_ptr + (items + item) * columns, b_mo, b_mi, b_ko, b_ki)
        x_rows = _rows(x, p * BLOCK_M + lanes, M, axes, EVEN_M, WIDE_M)
        y_rows = _rows(x, q * BLOCK_M + lanes, M, axes, EVEN_M, WIDE_M)
        acc, exponent = _product(
            x, x_rows, x, y_rows, K, axes, first, last,
            ONE_BLOCK, EVEN_K, WIDE_K, CENTRED, False, CHECK, PRECISION, UPCAST, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    part = ((operand * items + item) * pairs + pair) * splits + split
    at = part * (BLOCK_M * BLOCK_M) + lanes[:, None] * BLOCK_M + lanes[None, :]
    tl.store(gram_ptr + at, acc)
    tl.store(exponent_ptr + part, tl.where(tl.max(tl.max(tl.abs(acc), 1), 0) > 0, exponent, NOTHING))


@triton.jit
def _block(gram_ptr, exponent_ptr, at, pair, splits, exponent, BLOCK_M: tl.constexpr):
    """A block of a Gram matrix, its parts summed in their order, in units of 2^exponent."""
    total = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    for split in range(splits):
        part = pair * splits + split
        factor = _power_of_two(tl.load(exponent_ptr + part) - exponent)
        total += factor * tl.load(gram_ptr + part * (BLOCK_M * BLOCK_M) + at)
    return total


@triton.jit
def _normaliser(gram_ptr, exponent_ptr, splits, pairs, BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The common exponent of all parts, and that of the scale which brings the largest diagonal element near 1."""
    parts = tl.arange(0, MOST_PARTS)
    common = tl.max(tl.load(exponent_ptr + parts, mask=parts < pairs * splits, other=NOTHING), 0)
    largest = 0.0
    lanes = tl.arange(0, BLOCK_M)
    for block in tl.static_range(BLOCKS):
        diagonal = tl.zeros((BLOCK_M,), tl.float32)
        for split in range(splits):
            part = block * (block + 3) // 2 * splits + split
            factor = _power_of_two(tl.load(exponent_ptr + part) - common)
            diagonal += factor * tl.load(gram_ptr + part * (BLOCK_M * BLOCK_M) + lanes * (BLOCK_M + 1))
        largest = tl.maximum(largest, tl.max(diagonal, 0))
    exponent = tl.minimum(_exponent(largest), 127.0)
    scale = tl.minimum(tl.maximum(-tl.floor((common + exponent) * 0.5), -126.0), 126.0)
    return common, tl.where(largest > 0, scale, 0.0)


@triton.jit(do_not_specialize=["items", "splits"])
def _gram_finish_kernel(
    gram_ptr, exponent_ptr, packed_ptr, known_ptr, cosine_ptr, term_ptr, stats_a_ptr, stats_b_ptr, difference_ptr,
    items, M, weight, splits, pairs,
    PACKED: tl.constexpr, BOTH: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """From the parts of G_a and G_b: cosine, weight * cosine^2, statistics, and what the derivative needs,

        D_a = G_b / (|G_a| |G_b|) - cosine G_a / |G_a|^2        `[item, pair, BLOCK_M, BLOCK_M]`

    of scaled matrices, and after all D_a if BOTH the D_b. One program owns an item.
    """
    item, items = tl.program_id(0).to(tl.int64), tl.cast(items, tl.int64)
    size: tl.constexpr = BLOCK_M * BLOCK_M
    lanes = tl.arange(0, BLOCK_M)
    at = lanes[:, None] * BLOCK_M + lanes[None, :]
    a_gram_ptr, a_exponent_ptr = gram_ptr + item * pairs * splits * size, exponent_ptr + item * pairs * splits
    b_gram_ptr, b_exponent_ptr = a_gram_ptr + items * pairs * splits * size, a_exponent_ptr + items * pairs * splits
    common_a, scale_a = _normaliser(a_gram_ptr, a_exponent_ptr, splits, pairs, BLOCKS, BLOCK_M)
    if PACKED:
        bb = tl.load(known_ptr + item)
        common_b, scale_b = 0.0, 0.0
        power_b = tl.load(known_ptr + items + item)
        packed_item_ptr = packed_ptr + item * (M * (M + 1) // 2)
    else:
        common_b, scale_b = _normaliser(b_gram_ptr, b_exponent_ptr, splits, pairs, BLOCKS, BLOCK_M)
        power_b = _power_of_two(scale_b)
        bb = 0.0
        packed_item_ptr = packed_ptr
    n, aa = 0.0, 0.0
    for pair in range(pairs):
        p, q = _pair(pair)
        count = tl.where(p == q, 1.0, 2.0)
        ga = _times_power_of_two(
            _block(a_gram_ptr, a_exponent_ptr, at, pair, splits, common_a, BLOCK_M), common_a + 2 * scale_a
        )
        if PACKED:
            gb = _triangle_tile(packed_item_ptr, p, q, M, BLOCK_M)
        else:
            gb = _times_power_of_two(
                _block(b_gram_ptr, b_exponent_ptr, at, pair, splits, common_b, BLOCK_M), common_b + 2 * scale_b
            )
            bb += count * _sum(gb * gb)
        n += count * _sum(ga * gb)
        aa += count * _sum(ga * ga)
    norm = tl.sqrt(aa) * tl.sqrt(bb)
    cross = 1.0 / tl.where(norm == 0, 1.0, norm)
    cosine = n * cross
    tl.store(cosine_ptr + item, cosine)
    tl.store(term_ptr + item, weight * cosine * cosine)
    tl.store(stats_a_ptr + item, aa)
    tl.store(stats_a_ptr + items + item, _power_of_two(scale_a))
    tl.store(stats_b_ptr + item, bb)
    tl.store(stats_b_ptr + items + item, power_b)
    own_a, own_b = cosine / tl.where(aa == 0, 1.0, aa), cosine / tl.where(bb == 0, 1.0, bb)
    for pair in range(pairs):
        p, q = _pair(pair)
        ga = _times_power_of_two(
            _block(a_gram_ptr, a_exponent_ptr, at, pair, splits, common_a, BLOCK_M), common_a + 2 * scale_a
        )
        if PACKED:
            gb = _triangle_tile(packed_item_ptr, p, q, M, BLOCK_M)
        else:
            gb = _times_power_of_two(
                _block(b_gram_ptr, b_exponent_ptr, at, pair, splits, common_b, BLOCK_M), common_b + 2 * scale_b
            )
        out_ptr = difference_ptr + (item * pairs + pair) * size + at
        tl.store(out_ptr, cross * gb - own_a * ga)
        if BOTH:
            tl.store(out_ptr + items * pairs * size, cross * ga - own_b * gb)


@triton.jit
def _normalised(product):
    """The product divided by a power of two that brings the largest element near 1, and its exponent."""
    largest = tl.max(tl.max(tl.abs(product), 1), 0)
    exponent = tl.minimum(tl.maximum(_exponent(largest), -126.0), 127.0)
    return _times_power_of_two(product, -exponent), tl.where(largest > 0, exponent, NOTHING)


@triton.jit
def _sum(x):
    return tl.sum(tl.sum(x, 1), 0)


@triton.jit(do_not_specialize=["items"])
def _gram_squares_kernel(
    a_ptr, b_ptr, mean_ptr, partial_ptr, items, M, K, columns, m_width, k_width, pairs,
    a_item, a_mo, a_mi, a_ko, a_ki, b_item, b_mo, b_mi, b_ko, b_ki,
    PACKED: tl.constexpr, DUAL: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_K: tl.constexpr, WIDE_M: tl.constexpr, WIDE_K: tl.constexpr, CENTRED: tl.constexpr,
    ONE_BLOCK: tl.constexpr, CHECK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Parts of n, aa and bb, each (value, exponent): `[item, program, 6]`.

    Direct, one program owns a pair of blocks in both matrices. Dual, it owns a block of F_a F_b^T, or a pair of blocks
    of F_a F_a^T, or (where bb is asked for, as the grid says) of F_b F_b^T.
    """
    item, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    steps = tl.cdiv(K, BLOCK_K)
    tl.assume(steps > 0)
    axes = (m_width, k_width)
    lanes = tl.arange(0, BLOCK_M)
    a = (a_ptr + item * a_item, mean_ptr + item * columns, a_mo, a_mi, a_ko, a_ki)
    b = (b_ptr + item * b_item, mean_ptr + (items + item) * columns, b_mo, b_mi, b_ko, b_ki)
    n, aa, bb = 0.0, 0.0, 0.0
    n_exponent, aa_exponent, bb_exponent = NOTHING, NOTHING, NOTHING
    if DUAL:
        blocks = tl.cdiv(M, BLOCK_M)
        if program < blocks * blocks:
            a_rows = _rows(a, program // blocks * BLOCK_M + lanes, M, axes, EVEN_M, WIDE_M)
            b_rows = _rows(b, program % blocks * BLOCK_M + lanes, M, axes, EVEN_M, WIDE_M)
            acc, n_exponent = _product(
                a, a_rows, b, b_rows, K, axes, 0, steps,
                False, EVEN_K, WIDE_K, CENTRED, True, CHECK, PRECISION, UPCAST, BLOCK_M, BLOCK_K,
            )  # fmt: skip
            acc, exponent = _normalised(acc)
            n, n_exponent = _sum(acc * acc), 2 * (n_exponent + exponent)
        else:
            pair = program - blocks * blocks
            p, q = _pair(pair % pairs)
            weight = tl.where(p == q, 1.0, 2.0)
            if pair < pairs:
                p_rows = _rows(a, p * BLOCK_M + lanes, M, axes, EVEN_M, WIDE_M)
                q_rows = _rows(a, q * BLOCK_M + lanes, M, axes, EVEN_M, WIDE_M)
                acc, aa_exponent = _product(
                    a, p_rows, a, q_rows, K, axes, 0, steps,
                    ONE_BLOCK, EVEN_K, WIDE_K, CENTRED, True, CHECK, PRECISION, UPCAST, BLOCK_M, BLOCK_K,
                )  # fmt: skip
                acc, exponent = _normalised(acc)
                aa, aa_exponent = weight * _sum(acc * acc), 2 * (aa_exponent + exponent)
            else:
                p_rows = _rows(b, p * BLOCK_M + lanes, M, axes, EVEN_M, WIDE_M)
                q_rows = _rows(b, q * BLOCK_M + lanes, M, axes, EVEN_M, WIDE_M)
                acc, bb_exponent = _product(
                    b, p_rows, b, q_rows, K, axes, 0, steps,
                    ONE_BLOCK, EVEN_K, WIDE_K, CENTRED, True, CHECK, PRECISION, UPCAST, BLOCK_M, BLOCK_K,
                )  # fmt: skip
                acc, exponent = _normalised(acc)
                bb, bb_exponent = weight * _sum(acc * acc), 2 * (bb_exponent + exponent)
    else:
        p, q = _pair(program)
        weight = tl.where(p == q, 1.0, 2.0)
        p_rows = _rows(a, p * BLOCK_M + lanes, M, axes, EVEN_M, WIDE_M)
        q_rows = _rows(a, q * BLOCK_M + lanes, M, axes, EVEN_M, WIDE_M)
        ga, a_exponent = _product(
            a, p_rows, a, q_rows, K, axes, 0, steps,
            ONE_BLOCK, EVEN_K, WIDE_K, CENTRED, False, CHECK, PRECISION, UPCAST, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        ga, exponent = _normalised(ga)
        a_exponent += exponent
        if PACKED:
            gb, b_exponent = _triangle_tile(b_ptr + item * (M * (M + 1) // 2), p, q, M, BLOCK_M), 0.0
        else:
            p_rows = _rows(b, p * BLOCK_M + lanes, M, axes, EVEN_M, WIDE_M)
            q_rows = _rows(b, q * BLOCK_M + lanes, M, axes, EVEN_M, WIDE_M)
            gb, b_exponent = _product(
                b, p_rows, b, q_rows, K, axes, 0, steps,
                ONE_BLOCK, EVEN_K, WIDE_K, CENTRED, False, CHECK, PRECISION, UPCAST, BLOCK_M, BLOCK_K,
            )  # fmt: skip
        gb, exponent = _normalised(gb)
        b_exponent += exponent
        n, n_exponent = weight * _sum(ga * gb), a_exponent + b_exponent
        aa, aa_exponent = weight * _sum(ga * ga), 2 * a_exponent
        bb, bb_exponent = weight * _sum(gb * gb), 2 * b_exponent
    out_ptr = partial_ptr + (item * tl.num_programs(1) + program) * 6
    tl.store(out_ptr, n)
    tl.store(out_ptr + 1, n_exponent)
    tl.store(out_ptr + 2, aa)
    tl.store(out_ptr + 3, aa_exponent)
    tl.store(out_ptr + 4, bb)
    tl.store(out_ptr + 5, bb_exponent)


@triton.jit
def _total(partial_ptr, item, item_ok, programs, first, count, BLOCK_P: tl.constexpr):
    """The sums of (value, exponent) over `count` programs of each item, from the first-th on."""
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
    partial_ptr, known_ptr, cosine_ptr, loss_ptr, stats_a_ptr, stats_b_ptr, items, programs, products, pairs, weight,
    KNOWN: tl.constexpr, PACKED: tl.constexpr, DUAL: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """cosine, statistics and weight * sum of squared cosines, from the parts of all items; one program owns all.

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
        if KNOWN:
            bb = tl.load(known_ptr + i, mask=i_ok, other=0.0)
            power_b = tl.load(known_ptr + items + i, mask=i_ok, other=1.0)
            # Packed matrices are scaled already.
            scale_b = 0.0 if PACKED else _exponent(power_b)
        else:
            bb, bb_exponent = _total(partial_ptr + 4, i, i_ok, programs, first_b, pairs, BLOCK_P)
            scale_b = _scale_of(bb_exponent)
            bb = _times_power_of_two(bb, bb_exponent + 4 * scale_b)
            power_b = _power_of_two(scale_b)
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
def _row_block(
    x, x_rows, y, y_rows, scales, acc, K, axes,
    SCALED: tl.constexpr, EVEN_K: tl.constexpr, WIDE_K: tl.constexpr, CENTRED: tl.constexpr, DUAL: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    steps = tl.cdiv(K, BLOCK_K)
    tl.assume(steps > 0)
    return _sum_of_products(
        acc, x, x_rows, y, y_rows, scales, K, axes, 0, steps,
        False, SCALED, EVEN_K, WIDE_K, CENTRED, DUAL, PRECISION, UPCAST, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _split_in_two(x, like, ONE: tl.constexpr):
    """float32 as a sum of two values of the features' type; as it is if that is float32."""
    if ONE:
        return x, x
    else:
        high = x.to(like)
        return high, (x - high.to(tl.float32)).to(like)


@triton.jit
def _times(pair, f, acc, ONE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    acc = _dot(pair[0], f, acc, PRECISION, UPCAST)
    if not ONE:
        acc = _dot(pair[1], f, acc, PRECISION, UPCAST)
    return acc


@triton.jit
def _terms(
    a, b, difference_ptr, packed_ptr, m, n, scales, cross, own, aa, M, K, axes,
    MODE: tl.constexpr, PACKED: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    WIDE_M: tl.constexpr, WIDE_K: tl.constexpr, CENTRED: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows m, columns n of aa D, brought near 1 for the sake of float16's range; or if dual of S_b and of S_a."""
    scale_a, scale_b = scales
    zero = tl.zeros((m.shape[0], n.shape[0]), tl.float32)
    a_rows, a_all = _rows(a, m, M, axes, EVEN_M, WIDE_M), _rows(a, n, M, axes, EVEN_N, WIDE_M)
    if MODE == "stored":
        p, q = m[:, None] // BLOCK, n[None, :] // BLOCK
        r, c = m[:, None] % BLOCK, n[None, :] % BLOCK
        pair = tl.where(p <= q, q * (q + 1) // 2 + p, p * (p + 1) // 2 + q)
        element = pair * (BLOCK * BLOCK) + tl.where(p <= q, r * BLOCK + c, c * BLOCK + r)
        d = aa * tl.load(difference_ptr + element, mask=(m < M)[:, None] & (n < M)[None, :], other=0.0)
        return d, d
    elif MODE == "direct":
        if PACKED:
            low, high = tl.minimum(m[:, None], n[None, :]), tl.maximum(m[:, None], n[None, :])
            acc = tl.load(packed_ptr + low * M - low * (low + 1) // 2 + high, mask=high < M, other=0.0)
        else:
            b_rows, b_all = _rows(b, m, M, axes, EVEN_M, WIDE_M), _rows(b, n, M, axes, EVEN_N, WIDE_M)
            acc = _row_block(
                b, b_rows, b, b_all, (scale_b, scale_b), zero, K, axes,
                SCALED, EVEN_K, WIDE_K, CENTRED, False, PRECISION, UPCAST, BLOCK_K,
            )  # fmt: skip
            if not SCALED:
                acc = acc * scale_b * scale_b
        # One accumulator: G_a' - cross / own G_b'.
        acc = acc * (-cross / own)
        if not SCALED:
            acc = acc / scale_a / scale_a
        acc = _row_block(
            a, a_rows, a, a_all, (scale_a, scale_a), acc, K, axes,
            SCALED, EVEN_K, WIDE_K, CENTRED, False, PRECISION, UPCAST, BLOCK_K,
        )  # fmt: skip
        if not SCALED:
            acc = acc * scale_a * scale_a
        acc = acc * (-own * aa)
        return acc, acc
    else:
        b_all = _rows(b, n, M, axes, EVEN_N, WIDE_M)
        s_b = _row_block(
            a, a_rows, b, b_all, (scale_a, scale_b), zero, K, axes,
            SCALED, EVEN_K, WIDE_K, CENTRED, True, PRECISION, UPCAST, BLOCK_K,
        )  # fmt: skip
        s_a = _row_block(
            a, a_rows, a, a_all, (scale_a, scale_a), zero, K, axes,
            SCALED, EVEN_K, WIDE_K, CENTRED, True, PRECISION, UPCAST, BLOCK_K,
        )  # fmt: skip
        if not SCALED:
            s_b, s_a = s_b * scale_a * scale_b, s_a * scale_a * scale_a
        return s_b, s_a


@triton.jit
def _columns(
    a, b, n, k, x, y, out, own_part, M, K, axes,
    DUAL: tl.constexpr, EVEN_N: tl.constexpr, EVEN_C: tl.constexpr, WIDE_M: tl.constexpr, WIDE_K: tl.constexpr,
    CENTRED: tl.constexpr, ONE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out + D F_a; if dual out + S_b F_b, own_part + S_a F_a.

    A centred D has rows that sum to 0, so there the features' means do not matter.
    """
    f = _load(a, _rows(a, n, M, axes, EVEN_N, WIDE_M), k, K, axes, EVEN_C, WIDE_K, CENTRED and DUAL, DUAL)
    if DUAL:
        own_part = _times(y, f, own_part, ONE, PRECISION, UPCAST)
        f = _load(b, _rows(b, n, M, axes, EVEN_N, WIDE_M), k, K, axes, EVEN_C, WIDE_K, CENTRED, DUAL)
    return _times(x, f, out, ONE, PRECISION, UPCAST), own_part


@triton.jit(do_not_specialize=["items", "splits"])
def _gram_backward_kernel(
    a_ptr, b_ptr, mean_ptr, difference_ptr, cosine_ptr, stats_a_ptr, stats_b_ptr, dcosine_ptr, dloss_ptr,
    incoming_ptr, da_ptr, items, M, K, columns, m_width, k_width, weight, splits, pairs,
    a_item, a_mo, a_mi, a_ko, a_ki, b_item, b_mo, b_mi, b_ko, b_ki,
    incoming_item, incoming_mo, incoming_mi, incoming_ko, incoming_ki, da_item, da_mo, da_mi, da_ko, da_ki,
    MODE: tl.constexpr, PACKED: tl.constexpr, HAS_DCOSINE: tl.constexpr, HAS_DLOSS: tl.constexpr,
    HAS_INCOMING: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    EVEN_C: tl.constexpr, WIDE_M: tl.constexpr, WIDE_K: tl.constexpr, CENTRED: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dcosine/dF_a times dcosine + 2 weight cosine dloss, + the incoming gradient.

    With the scales s, a power of two, and scaled matrices G' = s^2 G:

        stored, direct  dF_a = 2 s_a^2 D F_a,    D = G_b' / (|G_a'| |G_b'|) - cosine G_a' / |G_a'|^2  [M, M]
        dual            dF_a = 2 s_a ( s_b S_b F_b / (|G_a'| |G_b'|) - s_a cosine S_a F_a / |G_a'|^2 ),
                        S_x = s_a s_x F_a F_x^T  [M, M]

    (dual: F [columns, rows]). One program owns BLOCK_M rows of dF_a in one of `splits` parts of the columns k. WHOLE:
    it keeps its rows of D, or of S_a and S_b, on chip, of at most BLOCK_N elements; else it makes BLOCK_N columns of
    them at a time, again for each BLOCK_C columns k. Stored, it reads D; else it sums the products over all k.
    """
    item, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    axes = (m_width, k_width)
    DUAL: tl.constexpr = MODE == "dual"
    a = (a_ptr + item * a_item, mean_ptr + item * columns, a_mo, a_mi, a_ko, a_ki)
    b = (b_ptr + item * b_item, mean_ptr + (items + item) * columns, b_mo, b_mi, b_ko, b_ki)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    aa, scale_a = tl.load(stats_a_ptr + item), tl.load(stats_a_ptr + items + item)
    bb, scale_b = tl.load(stats_b_ptr + item), tl.load(stats_b_ptr + items + item)
    cosine = tl.load(cosine_ptr + item)
    norm = tl.sqrt(aa) * tl.sqrt(bb)
    factor = 0.0
    if HAS_DCOSINE:
        factor += 2 * tl.load(dcosine_ptr + item)
    if HAS_DLOSS:
        factor += 4 * weight * cosine * tl.load(dloss_ptr)
    factor = tl.where(norm == 0, 0.0, factor)
    aa = tl.where(norm == 0, 1.0, aa)
    cross, own = 1.0 / tl.where(norm == 0, 1.0, norm), cosine / aa
    # So that cross / own is finite; the error is of 2^-40 of the other term.
    own = tl.maximum(own, cross * 2.0**-40)
    scales = (scale_a, scale_b)
    packed_ptr = b_ptr + item * (M * (M + 1) // 2) if PACKED else b_ptr
    difference_item_ptr = difference_ptr + item * pairs * (BLOCK * BLOCK)
    ONE: tl.constexpr = a_ptr.dtype.element_ty.primitive_bitwidth == 32 or (CENTRED and DUAL)
    TYPE: tl.constexpr = tl.float32 if ONE else a_ptr.dtype.element_ty
    incoming_at = incoming_ptr + item * incoming_item + _along(m, m_width, incoming_mo, incoming_mi, WIDE_M)[:, None]
    da_at = da_ptr + item * da_item + _along(m, m_width, da_mo, da_mi, WIDE_M)[:, None]
    m_ok = ((m < M) | EVEN_M)[:, None]
    chunks = tl.cdiv(K, BLOCK_C)
    first, last = split * chunks // splits, (split + 1) * chunks // splits
    tl.assume(first < last)
    blocks = tl.cdiv(M, BLOCK_N)
    tl.assume(blocks > 0)
    if WHOLE:
        n = tl.arange(0, BLOCK_N)
        x, y = _terms(
            a, b, difference_item_ptr, packed_ptr, m, n, scales, cross, own, aa, M, K, axes,
            MODE, PACKED, EVEN_M, EVEN_N, EVEN_K, WIDE_M, WIDE_K, CENTRED, SCALED, PRECISION, UPCAST, BLOCK, BLOCK_K,
        )  # fmt: skip
        x = _split_in_two(x, TYPE, ONE)
        if DUAL:
            y = _split_in_two(y, TYPE, ONE)
    for chunk in range(first, last):
        k = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
        out = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        own_part = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        if WHOLE:
            out, own_part = _columns(
                a, b, n, k, x, y, out, own_part, M, K, axes,
                DUAL, EVEN_N, EVEN_C, WIDE_M, WIDE_K, CENTRED, ONE, PRECISION, UPCAST,
            )  # fmt: skip
        else:
            for block in range(blocks):
                n = block * BLOCK_N + tl.arange(0, BLOCK_N)
                x, y = _terms(
                    a, b, difference_item_ptr, packed_ptr, m, n, scales, cross, own, aa, M, K, axes,
                    MODE, PACKED, EVEN_M, EVEN_N, EVEN_K, WIDE_M, WIDE_K, CENTRED, SCALED, PRECISION, UPCAST, BLOCK,
                    BLOCK_K,
                )  # fmt: skip
                x = _split_in_two(x, TYPE, ONE)
                if DUAL:
                    y = _split_in_two(y, TYPE, ONE)
                out, own_part = _columns(
                    a, b, n, k, x, y, out, own_part, M, K, axes,
                    DUAL, EVEN_N, EVEN_C, WIDE_M, WIDE_K, CENTRED, ONE, PRECISION, UPCAST,
                )  # fmt: skip
        if DUAL:
            out = (out * (cross * scale_b) - own_part * (own * scale_a)) * (factor * scale_a)
        else:
            out = out * scale_a * (factor / aa * scale_a)
        ok = m_ok & ((k < K) | EVEN_C)[None, :]
        if HAS_INCOMING:
            at = incoming_at + _along(k, k_width, incoming_ko, incoming_ki, WIDE_K)[None, :]
            out += tl.load(at, mask=ok, other=0.0).to(tl.float32)
        at = da_at + _along(k, k_width, da_ko, da_ki, WIDE_K)[None, :]
        tl.store(at, out.to(da_ptr.dtype.element_ty), mask=ok)
