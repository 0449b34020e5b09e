"""The kernels of the row form, for at most 64 positions: all products of features, N x N, fit one program.

F_t and F_p are matrices [m, n] of M rows, the (sample, channel), and N positions, (h, w). They are read where they lie,
and all is computed in float32: half types are exact in tf32, so that their products take one product of tensor cores,
and those with anything else the three of tf32x3, an error of 2^-20.

The products F^T F of raw features must lie in the range of float32, which those of 1e-17 to 1e17 do. From there on each
F is scaled by a power of two that brings the largest of F^T F near 1.

Letters: t trained, p frozen; a the operand that gets a gradient, b the other one.
`do_not_specialize` names the sizes that change from call to call: one binary serves them all.
"""

import triton
import triton.language as tl

EPS: tl.constexpr = tl.constexpr(1e-8)
TINY: tl.constexpr = tl.constexpr(2.0**-126)  # the smallest normal number


@triton.jit
def _place(m, n, M, N, channels, layout, WIDE: tl.constexpr):
    """Offsets of a tile [m, n] of features, and which of them exist. WIDE: they need 64 bits."""
    stride_b, stride_c, stride_h, stride_w, width = layout
    b, c, h, w = m // channels, m % channels, n // width, n % width
    if WIDE:
        b, c, h, w = b.to(tl.int64), c.to(tl.int64), h.to(tl.int64), w.to(tl.int64)
    row = b * stride_b + c * stride_c
    column = h * stride_h + w * stride_w
    return row[:, None] + column[None, :], (m < M)[:, None] & (n < N)[None, :]


@triton.jit
def _load(ptr, m, n, M, N, channels, layout, WIDE: tl.constexpr):
    """A tile [m, n] of features in float32."""
    at, ok = _place(m, n, M, N, channels, layout, WIDE)
    return tl.load(ptr + at, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _scale(square_ptr, BLOCK_N: tl.constexpr):
    """The power of two by which F is multiplied, from F^T F: its largest element, on the diagonal, becomes 1 to 4."""
    diagonal = tl.load(square_ptr + tl.arange(0, BLOCK_N) * (BLOCK_N + 1))
    exponent = (tl.max(diagonal, 0).to(tl.int32, bitcast=True) >> 23) - 127
    return ((127 - (exponent >> 1)) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["M", "splits"])
def _folded_products_kernel(
    a_ptr, b_ptr, factors_ptr, stats_ptr, partial_ptr, M, N, channels, splits,
    stride_ab, stride_ac, stride_ah, stride_aw, width_a, stride_bb, stride_bc, stride_bh, stride_bw, width_b,
    WEIGHTED: tl.constexpr, WHICH: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """F_a^T F_a, F_b^T F_b and F_a^T F_b; WEIGHTED, of scaled features, F_b^T alpha F_a and F_a^T beta F_a.

    One program owns one of `splits` parts of the rows and BLOCK_C columns of the products; its sums go to `partial`
    [split, product, n, n].
    """
    split = tl.program_id(0)
    n, c = tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    layout_a = (stride_ab, stride_ac, stride_ah, stride_aw, width_a)
    layout_b = (stride_bb, stride_bc, stride_bh, stride_bw, width_b)
    if WEIGHTED:
        scale_a, scale_b = tl.load(stats_ptr + WHICH), tl.load(stats_ptr + 1 - WHICH)
    steps = tl.cdiv(M, BLOCK_M)
    first, last = split * steps // splits, (split + 1) * steps // splits
    tl.assume(first < last)  # ptxas would serialise the products of a loop that might not run (C7515)
    acc_0 = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    acc_1, acc_2 = acc_0, acc_0
    for step in range(first, last):
        m = step * BLOCK_M + tl.arange(0, BLOCK_M)
        a = _load(a_ptr, m, n, M, N, channels, layout_a, WIDE)
        b = _load(b_ptr, m, n, M, N, channels, layout_b, WIDE)
        a_c = _load(a_ptr, m, c, M, N, channels, layout_a, WIDE)
        if WEIGHTED:
            alpha = tl.load(factors_ptr + m, mask=m < M, other=0.0)[:, None]
            beta = tl.load(factors_ptr + (1 + WHICH) * M + m, mask=m < M, other=0.0)[:, None]
            a_c *= scale_a
            acc_0 = tl.dot(tl.trans(b * scale_b), a_c * alpha, acc_0, input_precision=PRECISION)
            acc_1 = tl.dot(tl.trans(a * scale_a), a_c * beta, acc_1, input_precision=PRECISION)
        else:
            b_c = _load(b_ptr, m, c, M, N, channels, layout_b, WIDE)
            acc_0 = tl.dot(tl.trans(a), a_c, acc_0, input_precision=PRECISION)
            acc_1 = tl.dot(tl.trans(b), b_c, acc_1, input_precision=PRECISION)
            acc_2 = tl.dot(tl.trans(a), b_c, acc_2, input_precision=PRECISION)
    size: tl.constexpr = BLOCK_N * BLOCK_N
    at = partial_ptr + split * ((2 if WEIGHTED else 3) * size) + n[:, None] * BLOCK_N + c[None, :]
    tl.store(at, acc_0)
    tl.store(at + size, acc_1)
    if not WEIGHTED:
        tl.store(at + 2 * size, acc_2)


@triton.jit(do_not_specialize=["splits"])
def _folded_sum_kernel(partial_ptr, products_ptr, splits, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of at most SPLITS parts of `size` elements; one program owns BLOCK elements."""
    split = tl.arange(0, SPLITS)[:, None]
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.load(partial_ptr + split * size + element[None, :], mask=split < splits, other=0.0)
    tl.store(products_ptr + element, tl.sum(part, 0))


@triton.jit(do_not_specialize=["M"])
def _folded_rows_kernel(
    t_ptr, p_ptr, products_ptr, factors_ptr, stats_ptr, partial_ptr, M, N, channels,
    stride_tb, stride_tc, stride_th, stride_tw, width_t, stride_pb, stride_pc, stride_ph, stride_pw, width_p,
    CLAMP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Row sums of the Gram matrices, f (F^T F) f^T, the cosines, and their derivatives as `forms._factors` has them.

    One program owns BLOCK_M rows; it writes their factors [3, M] and the sum of their |cosine| to `partial`. All
    programs find the same scales; the first one stores them.
    """
    program = tl.program_id(0)
    m, n = program * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    size: tl.constexpr = BLOCK_N * BLOCK_N
    layout_t = (stride_tb, stride_tc, stride_th, stride_tw, width_t)
    layout_p = (stride_pb, stride_pc, stride_ph, stride_pw, width_p)
    scale_t, scale_p = _scale(products_ptr, BLOCK_N), _scale(products_ptr + size, BLOCK_N)
    acc_t = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_p, acc_c = acc_t, acc_t
    for start in range(0, BLOCK_N, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        at = products_ptr + k[:, None] * BLOCK_N + n[None, :]
        t = _load(t_ptr, m, k, M, N, channels, layout_t, WIDE) * scale_t
        p = _load(p_ptr, m, k, M, N, channels, layout_p, WIDE) * scale_p
        acc_t = tl.dot(t, tl.load(at) * scale_t * scale_t, acc_t, input_precision=PRECISION)
        acc_p = tl.dot(p, tl.load(at + size) * scale_p * scale_p, acc_p, input_precision=PRECISION)
        acc_c = tl.dot(t, tl.load(at + 2 * size) * scale_t * scale_p, acc_c, input_precision=PRECISION)
    t = _load(t_ptr, m, n, M, N, channels, layout_t, WIDE) * scale_t
    p = _load(p_ptr, m, n, M, N, channels, layout_p, WIDE) * scale_p
    tt, pp, inner = tl.sum(acc_t * t, 1), tl.sum(acc_p * p, 1), tl.sum(acc_c * p, 1)

    # Comparisons let NaN through to the cosine.
    dead = (tt < TINY) | (pp < TINY)
    tt, pp = tl.where(dead, 1.0, tt), tl.where(dead, 1.0, pp)
    scale = 1000.0 / (tl.cast(M, tl.float32) * N)
    root_t, root_p = tl.rsqrt(tt), tl.rsqrt(pp)
    if CLAMP == "each":
        most_t, most_p = scale / EPS / scale_t / scale_t, scale / EPS / scale_p / scale_p
        free_t, free_p = root_t < most_t, root_p < most_p
        root = tl.where(root_t > most_t, most_t, root_t) * tl.where(root_p > most_p, most_p, root_p)
    else:
        bound = scale / scale_t / scale_p
        most = bound * bound / EPS
        root = root_t * root_p
        free_t = root < most
        free_p = free_t
        root = tl.where(root > most, most, root)
    root = tl.where(dead, 0.0, root)
    cosine = tl.abs(inner * root)
    sign = tl.where(inner > 0, 1.0, tl.where(inner < 0, -1.0, inner))
    ok = m < M
    tl.store(factors_ptr + m, sign * root, mask=ok)
    tl.store(factors_ptr + M + m, tl.where(free_t & ~dead, -0.5 * cosine / tt, 0.0), mask=ok)
    tl.store(factors_ptr + 2 * M + m, tl.where(free_p & ~dead, -0.5 * cosine / pp, 0.0), mask=ok)
    tl.store(partial_ptr + program, tl.sum(cosine, 0))
    if program == 0:
        tl.store(stats_ptr, scale_t)
        tl.store(stats_ptr + 1, scale_p)


@triton.jit(do_not_specialize=["M", "programs"])
def _folded_loss_kernel(partial_ptr, stats_ptr, loss_ptr, weight, M, programs, BLOCK: tl.constexpr):
    """loss = weight mean^2, from each program's sum of |cosine|; one program."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, programs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + at, mask=at < programs, other=0.0)
    mean = tl.sum(total, 0) / M
    tl.store(stats_ptr + 2, mean)
    tl.store(loss_ptr, weight * mean * mean)


@triton.jit(do_not_specialize=["M"])
def _folded_gradient_kernel(
    a_ptr, b_ptr, products_ptr, weighted_ptr, factors_ptr, stats_ptr, dloss_ptr, da_ptr, weight, M, N, channels,
    stride_ab, stride_ac, stride_ah, stride_aw, width_a, stride_bb, stride_bc, stride_bh, stride_bw, width_b,
    stride_dab, stride_dac, stride_dah, stride_daw, width_da,
    WHICH: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """alpha F_b (F_b^T F_a) + F_b (F_b^T alpha F_a) + 2 beta F_a (F_a^T F_a) + 2 F_a (F_a^T beta F_a), scaled back.

    One program owns BLOCK_M rows. The four terms nearly cancel: they share one accumulator.
    """
    m, n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    size: tl.constexpr = BLOCK_N * BLOCK_N
    layout_a = (stride_ab, stride_ac, stride_ah, stride_aw, width_a)
    layout_b = (stride_bb, stride_bc, stride_bh, stride_bw, width_b)
    scale_a, scale_b = tl.load(stats_ptr + WHICH), tl.load(stats_ptr + 1 - WHICH)
    alpha = tl.load(factors_ptr + m, mask=m < M, other=0.0)[:, None]
    beta = tl.load(factors_ptr + (1 + WHICH) * M + m, mask=m < M, other=0.0)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, BLOCK_N, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        at = k[:, None] * BLOCK_N + n[None, :]
        # The forward stored F_t^T F_p.
        cross_at = at if WHICH else k[:, None] + n[None, :] * BLOCK_N
        b = _load(b_ptr, m, k, M, N, channels, layout_b, WIDE) * scale_b
        cross = tl.load(products_ptr + 2 * size + cross_at) * scale_a * scale_b
        acc = tl.dot(b * alpha, cross, acc, input_precision=PRECISION)
        acc = tl.dot(b, tl.load(weighted_ptr + at), acc, input_precision=PRECISION)
        a = _load(a_ptr, m, k, M, N, channels, layout_a, WIDE) * (2 * scale_a)
        square = tl.load(products_ptr + WHICH * size + at) * scale_a * scale_a
        acc = tl.dot(a * beta, square, acc, input_precision=PRECISION)
        acc = tl.dot(a, tl.load(weighted_ptr + size + at), acc, input_precision=PRECISION)
    acc *= 2.0 * weight / M * tl.load(stats_ptr + 2) * tl.load(dloss_ptr) * scale_a
    at, ok = _place(m, n, M, N, channels, (stride_dab, stride_dac, stride_dah, stride_daw, width_da), WIDE)
    tl.store(da_ptr + at, acc.to(da_ptr.dtype.element_ty), mask=ok)
