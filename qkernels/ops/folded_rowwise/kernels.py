"""The kernels of the row form, for at most 64 positions: all products of features, N x N, fit one program.

F_t and F_p are matrices [m, n] of M rows, the (sample, channel), and N positions, (h, w). They are read in place, and
everything is computed in float32: half types are exact in tf32, so that their products take one product of tensor
cores, all others the three of tf32x3, with an error of 2^-20.

The products F^T F of raw features must be in the range of float32, as those of 1e-17 to 1e17 are. After these products
each F is scaled by a power of two that brings the largest of F^T F near 1.

Letters: t trained, p frozen; a the operand that gets a gradient, b the other one.
`do_not_specialize` names the sizes that change from call to call: a binary serves them all.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

EPS: tl.constexpr = tl.constexpr(1e-8)
TINY: tl.constexpr = tl.constexpr(2.0**-126)  # the smallest normal number


class Features(NamedTuple):
    """An operand.

    Attributes:
        ptr: its first element.
        b, c, h, w: strides of sample, channel, and position.
        width: positions along w.
    """

    ptr: Any
    b: Any
    c: Any
    h: Any
    w: Any
    width: Any


class Sizes(NamedTuple):
    """Sizes of all operands."""

    M: Any
    N: Any
    channels: Any


@triton.jit
def _place(x, m, n, sizes, WIDE: tl.constexpr):
    """Addresses of a tile [m, n] of features, and which of them exist. WIDE: offsets need 64 bits."""
    b, c, h, w = m // sizes.channels, m % sizes.channels, n // x.width, n % x.width
    if WIDE:
        b, c, h, w = b.to(tl.int64), c.to(tl.int64), h.to(tl.int64), w.to(tl.int64)
    row = b * x.b + c * x.c
    column = h * x.h + w * x.w
    return x.ptr + (row[:, None] + column[None, :]), (m < sizes.M)[:, None] & (n < sizes.N)[None, :]


@triton.jit
def _load(x, m, n, sizes, WIDE: tl.constexpr):
    """A tile [m, n] of features in float32."""
    at, ok = _place(x, m, n, sizes, WIDE)
    return tl.load(at, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _scale(square_ptr, BLOCK_N: tl.constexpr):
    """The power of two by which F is multiplied, from F^T F: its largest element, on the diagonal, becomes 1 to 4."""
    diagonal = tl.load(square_ptr + tl.arange(0, BLOCK_N) * (BLOCK_N + 1))
    exponent = (tl.max(diagonal, 0).to(tl.int32, bitcast=True) >> 23) - 127
    return ((127 - (exponent >> 1)) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["M", "splits"])
def _folded_products_kernel(
    a, b, factors_ptr, stats_ptr, partial_ptr, M, N, channels, splits,
    WEIGHTED: tl.constexpr, WHICH: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """F_a^T F_a, F_b^T F_b and F_a^T F_b; WEIGHTED, of scaled features, F_b^T alpha F_a and F_a^T beta F_a.

    A program computes BLOCK_C columns of the products over one of `splits` parts of the rows; its sums go to `partial`
    [split, product, n, n].
    """
    split = tl.program_id(0)
    n, c = tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    sizes = Sizes(M, N, channels)
    if WEIGHTED:
        scale_a, scale_b = tl.load(stats_ptr + WHICH), tl.load(stats_ptr + 1 - WHICH)
    steps = tl.cdiv(M, BLOCK_M)
    first, last = split * steps // splits, (split + 1) * steps // splits
    tl.assume(first < last)  # ptxas would serialise the products of a loop that might not run (C7515)
    acc_0 = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    acc_1, acc_2 = acc_0, acc_0
    for step in range(first, last):
        m = step * BLOCK_M + tl.arange(0, BLOCK_M)
        a_n = _load(a, m, n, sizes, WIDE)
        b_n = _load(b, m, n, sizes, WIDE)
        a_c = _load(a, m, c, sizes, WIDE)
        if WEIGHTED:
            alpha = tl.load(factors_ptr + m, mask=m < M, other=0.0)[:, None]
            beta = tl.load(factors_ptr + (1 + WHICH) * M + m, mask=m < M, other=0.0)[:, None]
            a_c *= scale_a
            acc_0 = tl.dot(tl.trans(b_n * scale_b), a_c * alpha, acc_0, input_precision=PRECISION)
            acc_1 = tl.dot(tl.trans(a_n * scale_a), a_c * beta, acc_1, input_precision=PRECISION)
        else:
            b_c = _load(b, m, c, sizes, WIDE)
            acc_0 = tl.dot(tl.trans(a_n), a_c, acc_0, input_precision=PRECISION)
            acc_1 = tl.dot(tl.trans(b_n), b_c, acc_1, input_precision=PRECISION)
            acc_2 = tl.dot(tl.trans(a_n), b_c, acc_2, input_precision=PRECISION)
    size: tl.constexpr = BLOCK_N * BLOCK_N
    at = partial_ptr + split * ((2 if WEIGHTED else 3) * size) + n[:, None] * BLOCK_N + c[None, :]
    tl.store(at, acc_0)
    tl.store(at + size, acc_1)
    if not WEIGHTED:
        tl.store(at + 2 * size, acc_2)


@triton.jit(do_not_specialize=["splits"])
def _folded_sum_kernel(partial_ptr, products_ptr, splits, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of at most SPLITS parts of `size` elements; a program adds BLOCK elements."""
    split = tl.arange(0, SPLITS)[:, None]
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.load(partial_ptr + split * size + element[None, :], mask=split < splits, other=0.0)
    tl.store(products_ptr + element, tl.sum(part, 0))


@triton.jit(do_not_specialize=["M"])
def _folded_rows_kernel(
    t, p, products_ptr, factors_ptr, stats_ptr, partial_ptr, M, N, channels,
    CLAMP: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Row sums of the Gram matrices, f (F^T F) f^T, the cosines, and their derivatives as `forms._factors` has them.

    A program computes BLOCK_M rows; it writes their factors [3, M] and the sum of their |cosine| to `partial`. All
    programs compute the same scales; the first one stores them.
    """
    program = tl.program_id(0)
    m, n = program * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    size: tl.constexpr = BLOCK_N * BLOCK_N
    sizes = Sizes(M, N, channels)
    scale_t, scale_p = _scale(products_ptr, BLOCK_N), _scale(products_ptr + size, BLOCK_N)
    acc_t = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_p, acc_c = acc_t, acc_t
    for start in range(0, BLOCK_N, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        at = products_ptr + k[:, None] * BLOCK_N + n[None, :]
        t_k = _load(t, m, k, sizes, WIDE) * scale_t
        p_k = _load(p, m, k, sizes, WIDE) * scale_p
        acc_t = tl.dot(t_k, tl.load(at) * scale_t * scale_t, acc_t, input_precision=PRECISION)
        acc_p = tl.dot(p_k, tl.load(at + size) * scale_p * scale_p, acc_p, input_precision=PRECISION)
        acc_c = tl.dot(t_k, tl.load(at + 2 * size) * scale_t * scale_p, acc_c, input_precision=PRECISION)
    t_n = _load(t, m, n, sizes, WIDE) * scale_t
    p_n = _load(p, m, n, sizes, WIDE) * scale_p
    tt, pp, inner = tl.sum(acc_t * t_n, 1), tl.sum(acc_p * p_n, 1), tl.sum(acc_c * p_n, 1)

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
    """loss = weight mean^2, from each program's sum of |cosine|, by a single program."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, programs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + at, mask=at < programs, other=0.0)
    mean = tl.sum(total, 0) / M
    tl.store(stats_ptr + 2, mean)
    tl.store(loss_ptr, weight * mean * mean)


@triton.jit(do_not_specialize=["M"])
def _folded_gradient_kernel(
    a, b, products_ptr, weighted_ptr, factors_ptr, stats_ptr, dloss_ptr, da, weight, M, N, channels,
    WHICH: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """alpha F_b (F_b^T F_a) + F_b (F_b^T alpha F_a) + 2 beta F_a (F_a^T F_a) + 2 F_a (F_a^T beta F_a), scaled back.

    A program computes BLOCK_M rows. The four terms nearly cancel: they share one accumulator.
    """
    m, n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    size: tl.constexpr = BLOCK_N * BLOCK_N
    sizes = Sizes(M, N, channels)
    scale_a, scale_b = tl.load(stats_ptr + WHICH), tl.load(stats_ptr + 1 - WHICH)
    alpha = tl.load(factors_ptr + m, mask=m < M, other=0.0)[:, None]
    beta = tl.load(factors_ptr + (1 + WHICH) * M + m, mask=m < M, other=0.0)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, BLOCK_N, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        at = k[:, None] * BLOCK_N + n[None, :]
        # The forward stored F_t^T F_p.
        cross_at = at if WHICH else k[:, None] + n[None, :] * BLOCK_N
        b_k = _load(b, m, k, sizes, WIDE) * scale_b
        cross = tl.load(products_ptr + 2 * size + cross_at) * scale_a * scale_b
        acc = tl.dot(b_k * alpha, cross, acc, input_precision=PRECISION)
        acc = tl.dot(b_k, tl.load(weighted_ptr + at), acc, input_precision=PRECISION)
        a_k = _load(a, m, k, sizes, WIDE) * (2 * scale_a)
        square = tl.load(products_ptr + WHICH * size + at) * scale_a * scale_a
        acc = tl.dot(a_k * beta, square, acc, input_precision=PRECISION)
        acc = tl.dot(a_k, tl.load(weighted_ptr + size + at), acc, input_precision=PRECISION)
    acc *= 2.0 * weight / M * tl.load(stats_ptr + 2) * tl.load(dloss_ptr) * scale_a
    at, ok = _place(da, m, n, sizes, WIDE)
    tl.store(at, acc.to(da.ptr.dtype.element_ty), mask=ok)
