"""The convolution's kernels. A map is dense NHWC; its channels are planar, (component, group, channel).

Letters: b image; h, w pixel; m row of a tile of pixels; k input channel, summed over, and n output channel, each within
a component; a output component; c input component, summed over; u, v position in the kernel.

A *gather* covers both directions. For the position (u, v), output pixel (i, j) reads the source pixel (i * stride + u *
dilation - padding, ...). Its adjoint is one gather for each *phase*, the output pixels with the same remainder by the
stride: pixel phase + i * stride reads i + (phase + padding - u * dilation) / stride, for the positions for which that
is a whole number; the others are skipped. In both, the source moves by a fixed `DELTA` from each position to the next.

*Signed*: the 16 products of the definition as one. In a step, a tile of the source has one component c, and a tile of
the weight all four components a of the output side by side: its columns (a, n) come from component a ^ c with the sign
of algebra.SIGNS[a][c], out of eight tiles [w, -w] that `_hamilton_pack_kernel` wrote. The expanded weight, twice as
large, is never stored. A product runs asynchronously only if nothing else in its iteration needs the result: so an
iteration has a single product.

`do_not_specialize` names the sizes that change from call to call: a binary serves them all.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

# Rows of a tile that are written at a time if several programs share a sum.
FINISH_ROWS: tl.constexpr = tl.constexpr(16)


@dataclass(frozen=True)
class Meta:
    """Compile-time constants of a kernel.

    Attributes:
        BLOCK_M: pixels of a tile; for a weight gradient, pixels of a step.
        BLOCK_N: channels of each component that are written; for a weight gradient, output channels.
        BLOCK_K: channels that are summed in a step; for a weight gradient, input channels that are written.
        FLAT: 0, or the number of channels of a component if they are so few that a step runs over (position, component,
            channel).
        EVEN_K, EVEN_N: whether the number of channels is a multiple of the block.
        PRECISION, UPCAST: precision of the products, see `_dot`.
        NEGATIVE: bit 4 a + c is set if component c enters component a with a minus.
        SPLIT: whether several programs share a sum.
        KERNEL, STRIDE, PADDING, DILATION: geometry of the convolution, (vertical, horizontal).
        STEP: distance of the kernel positions of a phase; DELTA: distance of their source pixels.
        ADJOINT: whether this is the adjoint.
        MAYBE_EMPTY: whether a phase may have no position.
        HAS_BIAS, RELU, POOL, WRITE_MAP: epilogue of a convolution; for a weight gradient, whether there is a bias.
        DROPOUT: whether elements after the ReLU are zeroed at random, and the others scaled.
        MASKED: whether the result, a gradient, goes through the mask of a ReLU's output.
        SCALED: whether the result is multiplied by a number.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    FLAT: int = 0
    EVEN_K: bool = False
    EVEN_N: bool = False
    PRECISION: str = "ieee"
    UPCAST: bool = False
    NEGATIVE: int = 0
    SPLIT: bool = False
    KERNEL: tuple[int, int] = (1, 1)
    STRIDE: tuple[int, int] = (1, 1)
    PADDING: tuple[int, int] = (0, 0)
    DILATION: tuple[int, int] = (1, 1)
    STEP: tuple[int, int] = (1, 1)
    DELTA: tuple[int, int] = (1, 1)
    ADJOINT: bool = False
    MAYBE_EMPTY: bool = False
    HAS_BIAS: bool = False
    RELU: bool = False
    POOL: bool = False
    WRITE_MAP: bool = True
    DROPOUT: bool = False
    MASKED: bool = False
    SCALED: bool = False


class Weight(NamedTuple):
    """The packed weight, and the strides of its tiles, positions, groups and channels."""

    ptr: Any
    stride_tile: Any
    stride_position: Any
    stride_group: Any
    stride_k: Any
    stride_n: Any


class Output(NamedTuple):
    """Results of an epilogue: the map, the maxima of its windows, their argmax; and its operands: bias, output of the
    ReLU whose mask a gradient goes through, seed of a dropout.
    """

    y_ptr: Any
    pooled_ptr: Any
    argmax_ptr: Any
    bias_ptr: Any
    relu_ptr: Any
    seed_ptr: Any


class Rows(NamedTuple):
    """The pixels that a launch writes: number of images, grid of a phase, size of the map, phase."""

    batch: Any
    grid_h: Any
    grid_w: Any
    y_h: Any
    y_w: Any
    phase_h: Any
    phase_w: Any


class Shared(NamedTuple):
    """Memory for the parts of programs that share a sum, and the counter of those that have arrived."""

    partial_ptr: Any
    ticket_ptr: Any
    splits: Any


@triton.jit
def _rounded(x, PRECISION: tl.constexpr):
    """float32 to the nearest tf32, ties away from zero, NaN unchanged; tensor cores would truncate."""
    if PRECISION == "tf32":
        near = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(x == x, near, x)
    else:
        return x


@triton.jit
def _dot(a, b, acc, META: tl.constexpr):
    """acc + a b in float32. UPCAST: cast bfloat16, whose bit patterns Triton's interpreter would multiply."""
    if META.UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=META.PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=META.PRECISION)


@triton.jit
def _first_position(phase, padding, dilation, stride, kernel):
    """The first position that hits a source pixel from this phase; `kernel` if none does."""
    first = kernel
    for back in range(kernel):
        position = kernel - 1 - back
        first = tl.where((phase + padding - position * dilation) % stride == 0, position, first)
    return first


@triton.jit
def _pixels(m, height, width, batch, POOL: tl.constexpr):
    """Image and pixel of row m, and whether it exists. POOL: each four rows are one of height x width 2x2 windows."""
    if POOL:
        row = m // 4
        h = row // width % height * 2 + m % 4 // 2
        w = row % width * 2 + m % 2
    else:
        row = m
        h = row // width % height
        w = row % width
    b = row // (width * height)
    return b, h, w, b < batch


@triton.jit
def _first_maximum(value, at, other, other_at):
    """The larger of two values and its place; NaN counts as largest, the earlier one wins a tie."""
    take = (value > other) | (value != value) | ((value == other) & (at < other_at))
    return tl.where(take, value, other), tl.where(take, at, other_at)


@triton.jit
def _write(acc, m, channel, n_ok, channels, rows, output, scale, META: tl.constexpr):
    """The epilogue of a tile [pixels m, channels]: adds the bias, applies ReLU, dropout or a gradient's mask; writes
    the map, or the maxima of its windows with their argmax, or both.
    """
    b, h, w, ok = _pixels(m[:, None], rows.grid_h, rows.grid_w, rows.batch, META.POOL)
    if META.ADJOINT:
        h, w = rows.phase_h + h * META.STRIDE[0], rows.phase_w + w * META.STRIDE[1]
    at = (b.to(tl.int64) * rows.y_h * rows.y_w + h * rows.y_w + w) * channels + channel[None, :]
    mask = ok & (h < rows.y_h) & (w < rows.y_w) & n_ok[None, :]
    if META.HAS_BIAS:
        acc += tl.load(output.bias_ptr + channel, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    if META.RELU:
        acc = tl.where(acc < 0, 0.0, acc)
    if META.DROPOUT:  # of probability 1 - 1 / scale
        # Indexed by the element's number in 32 bits, beyond which random numbers repeat: 64 bits spill.
        keep = tl.rand(tl.load(output.seed_ptr), at.to(tl.int32)) * scale < 1.0
        acc = tl.where(keep, acc * scale, 0.0)
    elif META.SCALED:
        acc *= scale
    if META.MASKED:
        of_relu = tl.load(output.relu_ptr + at, mask=mask, other=0.0)
        acc = tl.where(of_relu.to(tl.float32) <= 0, 0.0, acc)  # NaN passes, as in PyTorch
    y = acc.to(output.y_ptr.dtype.element_ty)
    if META.WRITE_MAP:
        tl.store(output.y_ptr + at, y, mask=mask)
    if META.POOL:
        # Maxima of the map as stored: argmax and ties are those of a pool of the stored map.
        windows = tl.reshape(y.to(tl.float32), (y.shape[0] // 4, 4, y.shape[1]))
        argmax = tl.zeros_like(windows).to(tl.int32) + tl.arange(0, 4)[None, :, None]
        largest, argmax = tl.reduce((windows, argmax), 1, _first_maximum)
        if META.RELU:
            argmax = tl.where(largest <= 0, 4, argmax)
        first = tl.max(tl.reshape(m, (m.shape[0] // 4, 4)), 1, keep_dims=True) // 4
        b, h, w, ok = _pixels(first, rows.grid_h, rows.grid_w, rows.batch, False)
        half_h, half_w = rows.y_h // 2, rows.y_w // 2
        at = (b.to(tl.int64) * half_h * half_w + h * half_w + w) * channels + channel[None, :]
        mask = ok & (h < half_h) & (w < half_w) & n_ok[None, :]
        tl.store(output.pooled_ptr + at, largest.to(output.y_ptr.dtype.element_ty), mask=mask)
        tl.store(output.argmax_ptr + at, argmax.to(tl.uint8), mask=mask)


@triton.jit
def _all_there(ticket_ptr, splits):
    """Whether this is the last of `splits` programs to arrive, each with its part in memory; the counter returns to 0.

    It decides which program sums the parts, never in which order.
    """
    tl.debug_barrier()  # all stores of the program come before its ticket
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == splits - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last


@triton.jit
def _summed(partial_ptr, at, part, parts, splits):
    """The sum of an element's parts in order: [split, part, element]. ".cg": an L1 cache may hold old values."""
    total = tl.zeros(at.shape, tl.float32)
    for split in range(splits):
        total += tl.load(partial_ptr + (tl.cast(split, tl.int64) * parts + part) + at, cache_modifier=".cg")
    return total


@triton.jit
def _own_part(shared, size):
    """This program's tile, the offset of its part of the sum, of `size` elements, and the stride of the splits."""
    tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    parts = (tl.num_programs(0) * tl.num_programs(1)).to(tl.int64) * size
    return tile, tile.to(tl.int64) * size, parts


@triton.jit
def _write_shared(first_row, channel, n_ok, channels, rows, output, scale, shared, META: tl.constexpr):
    """The epilogue of all parts `[BLOCK_M, 4 BLOCK_N]` of a tile, by the last program to arrive."""
    COLUMNS: tl.constexpr = 4 * META.BLOCK_N
    tile, part, parts = _own_part(shared, META.BLOCK_M * COLUMNS)
    if _all_there(shared.ticket_ptr + tile, shared.splits):
        for block in range(META.BLOCK_M // FINISH_ROWS):
            row = block * FINISH_ROWS + tl.arange(0, FINISH_ROWS)
            at = row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            total = _summed(shared.partial_ptr, at, part, parts, shared.splits)
            _write(total, first_row + row, channel, n_ok, channels, rows, output, scale, META)


@triton.jit
def _range_of_steps(steps, splits, META: tl.constexpr):
    """This program's steps of the sum; all of a sum that is not shared, which avoids a loop for a single step."""
    if META.SPLIT:
        split = tl.program_id(2)
        return split * steps // splits, (split + 1) * steps // splits
    else:
        return tl.full((), 0, tl.int32), steps


@triton.jit
def _gather_of(phase, META: tl.constexpr):
    """The phase, its first position, its shift of the source, its positions per row of the kernel, and in all."""
    if META.ADJOINT:
        phase_h, phase_w = phase // META.STRIDE[1], phase % META.STRIDE[1]
        u = _first_position(phase_h, META.PADDING[0], META.DILATION[0], META.STRIDE[0], META.KERNEL[0])
        v = _first_position(phase_w, META.PADDING[1], META.DILATION[1], META.STRIDE[1], META.KERNEL[1])
        shift_h = (phase_h + META.PADDING[0] - u * META.DILATION[0]) // META.STRIDE[0]
        shift_w = (phase_w + META.PADDING[1] - v * META.DILATION[1]) // META.STRIDE[1]
        across = tl.cdiv(META.KERNEL[1] - v, META.STEP[1])
        positions = tl.cdiv(META.KERNEL[0] - u, META.STEP[0]) * across
        return (phase_h, phase_w), (u, v), (shift_h, shift_w), across, positions
    else:
        zero = tl.full((), 0, tl.int32)  # functions cannot return plain numbers
        shift = (zero - META.PADDING[0], zero - META.PADDING[1])
        return (zero, zero), (zero, zero), shift, zero + META.KERNEL[1], zero + META.KERNEL[0] * META.KERNEL[1]


@triton.jit(do_not_specialize=["batch", "x_h", "x_w", "y_h", "y_w", "grid_h", "grid_w", "tiles_n", "splits", "scale"])
def _hamilton_conv_kernel(
    x_ptr, weight, output, partial_ptr, ticket_ptr, batch, x_h, x_w, y_h, y_w, grid_h, grid_w, groups, K, N, tiles_n,
    splits, scale, META: tl.constexpr,
):  # fmt: skip
    """y = epilogue(w (x) x), or its adjoint, from signed tiles: a convolution, a data gradient, a linear map.

    A program computes BLOCK_M pixels of a phase, BLOCK_N channels of all four components of a group, and one of
    `splits` parts of the sum over positions, components and channels. Each block of channels reads the source once for
    each position, each block of pixels the tile of the weight.
    """
    BLOCK_M: tl.constexpr = META.BLOCK_M
    BLOCK_N: tl.constexpr = META.BLOCK_N
    BLOCK_K: tl.constexpr = META.BLOCK_K
    Q: tl.constexpr = META.FLAT
    NEGATIVE: tl.constexpr = META.NEGATIVE
    group, split = tl.program_id(1) % groups, tl.program_id(2)
    phase, first, shift, across, positions = _gather_of(tl.program_id(1) // groups, META)
    first_row = tl.program_id(0) // tiles_n * BLOCK_M
    m = first_row + tl.arange(0, BLOCK_M)
    column = tl.arange(0, 4 * BLOCK_N)
    a = column // BLOCK_N
    n = tl.program_id(0) % tiles_n * BLOCK_N + column % BLOCK_N
    n_ok = (n < N) | META.EVEN_N
    b, i, j, m_ok = _pixels(m, grid_h, grid_w, batch, META.POOL)
    if not META.ADJOINT:
        i, j = i * META.STRIDE[0], j * META.STRIDE[1]
    h, w = i + shift[0], j + shift[1]
    x_channels = 4 * groups * (Q if Q else K)
    pixel = ((b.to(tl.int64) * x_h + h) * x_w + w) * x_channels
    k = tl.arange(0, BLOCK_K)
    w_at = weight.ptr + group * weight.stride_group + (n * weight.stride_n)[None, :]
    chunks = tl.cdiv(K, BLOCK_K)
    steps = tl.cdiv(4 * Q * positions, BLOCK_K) if Q else 4 * positions * chunks
    first_step, last_step = _range_of_steps(steps, splits, META)
    if not META.MAYBE_EMPTY:  # ptxas would serialise the products of a loop that might not run (C7515)
        tl.assume(first_step < last_step)
    acc = tl.zeros((BLOCK_M, 4 * BLOCK_N), tl.float32)
    if Q:
        for step in range(first_step, last_step):
            e = step * BLOCK_K + k
            position, c, q = e // (4 * Q), e // Q % 4, e % Q
            k_ok = position < positions
            u, v = position // across, position % across
            source_h, source_w = h[:, None] + (u * META.DELTA[0])[None, :], w[:, None] + (v * META.DELTA[1])[None, :]
            ok = m_ok[:, None] & k_ok[None, :] & (source_h >= 0) & (source_h < x_h) & (source_w >= 0) & (source_w < x_w)
            offset = (u * META.DELTA[0] * x_w + v * META.DELTA[1]) * x_channels
            # Channels of a group are contiguous only if there is no other group.
            channel = e % (4 * Q) if groups == 1 else c * (groups * Q) + group * Q + q
            x = tl.load(x_ptr + pixel[:, None] + (offset + channel)[None, :], mask=ok, other=0.0)
            u, v = first[0] + u * META.STEP[0], first[1] + v * META.STEP[1]
            at = (u * META.KERNEL[1] + v) * weight.stride_position + q * weight.stride_k
            tile = (a[None, :] ^ c[:, None]) + 4 * ((NEGATIVE >> (4 * a[None, :] + c[:, None])) & 1)
            w_tile = tl.load(
                w_at + tile * weight.stride_tile + at[:, None], mask=k_ok[:, None] & n_ok[None, :], other=0.0
            )
            acc = _dot(x, w_tile, acc, META)
    else:
        x_at = x_ptr + pixel[:, None] + (group * K + k)[None, :]
        w_at += (k * weight.stride_k)[:, None]
        for step in range(first_step, last_step):
            chunk, c, position = step % chunks * BLOCK_K, step // chunks % 4, step // (4 * chunks)
            k_ok = (chunk + k < K) | META.EVEN_K
            u, v = position // across, position % across
            source_h, source_w = h + u * META.DELTA[0], w + v * META.DELTA[1]
            ok = m_ok & (source_h >= 0) & (source_h < x_h) & (source_w >= 0) & (source_w < x_w)
            offset = (u * META.DELTA[0] * x_w + v * META.DELTA[1]) * x_channels + c * (groups * K) + chunk
            x = tl.load(x_at + offset, mask=ok[:, None] & k_ok[None, :], other=0.0)
            u, v = first[0] + u * META.STEP[0], first[1] + v * META.STEP[1]
            tile = (a ^ c) + 4 * ((NEGATIVE >> (4 * a + c)) & 1)
            at = (u * META.KERNEL[1] + v) * weight.stride_position + chunk * weight.stride_k
            w_tile = tl.load(
                w_at + ((tile * weight.stride_tile)[None, :] + at), mask=k_ok[:, None] & n_ok[None, :], other=0.0
            )
            acc = _dot(x, w_tile, acc, META)
    rows = Rows(batch, grid_h, grid_w, y_h, y_w, phase[0], phase[1])
    shared = Shared(partial_ptr, ticket_ptr, splits)
    channel = a * (groups * N) + group * N + n
    if META.SPLIT:
        _, part, parts = _own_part(shared, BLOCK_M * 4 * BLOCK_N)
        at = tl.arange(0, BLOCK_M)[:, None] * (4 * BLOCK_N) + column[None, :]
        tl.store(partial_ptr + (split * parts + part) + at, acc)
        _write_shared(first_row, channel, n_ok, 4 * groups * N, rows, output, scale, shared, META)
    else:
        _write(acc, m, channel, n_ok, 4 * groups * N, rows, output, scale, META)


@triton.jit
def _hadamard(r, i, j, k):
    """H (r, i, j, k), see algebra.HADAMARD."""
    s, t, p, q = r + i, r - i, j + k, j - k
    return s + p, t + q, s - p, t - q


@triton.jit
def _four_tiles(at, stride, mask):
    """Four tiles, `stride` apart."""
    t0 = tl.load(at, mask=mask, other=0.0)
    t1 = tl.load(at + stride, mask=mask, other=0.0)
    t2 = tl.load(at + 2 * stride, mask=mask, other=0.0)
    t3 = tl.load(at + 3 * stride, mask=mask, other=0.0)
    return t0, t1, t2, t3


@triton.jit
def _four_products(acc, x, w, META: tl.constexpr):
    """acc + x w, component by component."""
    acc_r = _dot(x[0], w[0], acc[0], META)
    acc_i = _dot(x[1], w[1], acc[1], META)
    acc_j = _dot(x[2], w[2], acc[2], META)
    acc_k = _dot(x[3], w[3], acc[3], META)
    return acc_r, acc_i, acc_j, acc_k


@triton.jit
def _q8_operands(step, chunks, x_at, w_at, place, weight, first, n_ok, META: tl.constexpr):
    """The component tiles of the source `[pixels, k]` and of the weight `[k, n]` in a step of the sum."""
    h, w, m_ok, x_h, x_w, across, size, K = place
    k = step % chunks * META.BLOCK_K + tl.arange(0, META.BLOCK_K)
    k_ok = (k < K) | META.EVEN_K
    u, v = step // chunks // across, step // chunks % across
    source_h, source_w = h + u * META.DELTA[0], w + v * META.DELTA[1]
    ok = m_ok & (source_h >= 0) & (source_h < x_h) & (source_w >= 0) & (source_w < x_w)
    x_at += (u * META.DELTA[0] * x_w + v * META.DELTA[1]) * (4 * size) + k[None, :]
    u, v = first[0] + u * META.STEP[0], first[1] + v * META.STEP[1]
    w_at += ((u * META.KERNEL[1] + v) * weight.stride_position + k * weight.stride_k)[:, None]
    x = _four_tiles(x_at, size, ok[:, None] & k_ok[None, :])
    return x, _four_tiles(w_at, weight.stride_tile, k_ok[:, None] & n_ok[None, :])


@triton.jit(do_not_specialize=["batch", "x_h", "x_w", "y_h", "y_w", "grid_h", "grid_w", "tiles_n", "splits", "scale"])
def _hamilton_conv_q8_kernel(
    x_ptr, weight, output, partial_ptr, ticket_ptr, batch, x_h, x_w, y_h, y_w, grid_h, grid_w, groups, K, N, tiles_n,
    splits, scale, META: tl.constexpr,
):  # fmt: skip
    """As `_hamilton_conv_kernel`, by 8 products: y = C ((A w) * (B x)), the adjoint B^T ((A w) * (C^T dy)).

    The packed weight is [H w; -2 w]; the factor 1/4 of A goes to the source (Howell & Lafon 1975). It reads the source
    twice: four accumulators at a time fit the registers, eight spill.
    """
    BLOCK_M: tl.constexpr = META.BLOCK_M
    BLOCK_N: tl.constexpr = META.BLOCK_N
    group, split = tl.program_id(1) % groups, tl.program_id(2)
    phase, first, shift, across, positions = _gather_of(tl.program_id(1) // groups, META)
    first_row = tl.program_id(0) // tiles_n * BLOCK_M
    m = first_row + tl.arange(0, BLOCK_M)
    first_n = tl.program_id(0) % tiles_n * BLOCK_N
    n = first_n + tl.arange(0, BLOCK_N)
    n_ok = (n < N) | META.EVEN_N
    b, i, j, m_ok = _pixels(m, grid_h, grid_w, batch, META.POOL)
    if not META.ADJOINT:
        i, j = i * META.STRIDE[0], j * META.STRIDE[1]
    h, w = i + shift[0], j + shift[1]
    size = groups * K
    x_at = x_ptr + (((b.to(tl.int64) * x_h + h) * x_w + w) * (4 * size))[:, None] + group * K
    w_at = weight.ptr + group * weight.stride_group + (n * weight.stride_n)[None, :]
    place = (h, w, m_ok, x_h, x_w, across, size, K)
    chunks = tl.cdiv(K, META.BLOCK_K)
    steps = positions * chunks
    first_step, last_step = _range_of_steps(steps, splits, META)
    if not META.MAYBE_EMPTY:
        tl.assume(first_step < last_step)
    acc_r = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_i, acc_j, acc_k = acc_r, acc_r, acc_r
    for step in range(first_step, last_step):
        x, tiles = _q8_operands(step, chunks, x_at, w_at, place, weight, first, n_ok, META)
        h0, h1, h2, h3 = _hadamard(-x[0] if META.ADJOINT else x[0], x[1], x[2], x[3])
        x = (h0 * 0.25, h1 * 0.25, h2 * 0.25, h3 * 0.25)
        acc_r, acc_i, acc_j, acc_k = _four_products((acc_r, acc_i, acc_j, acc_k), x, tiles, META)
    # C = S [H | I] and B^T = [H | I by algebra.INPUT_ORDER]: the plain products join the transformed ones.
    acc_r, acc_i, acc_j, acc_k = _hadamard(acc_r, acc_i, acc_j, acc_k)
    acc_r = -acc_r if META.ADJOINT else acc_r
    w_at += 4 * weight.stride_tile
    for step in range(first_step, last_step):
        x, tiles = _q8_operands(step, chunks, x_at, w_at, place, weight, first, n_ok, META)
        if META.ADJOINT:
            acc_r, acc_j, acc_k, acc_i = _four_products((acc_r, acc_j, acc_k, acc_i), x, tiles, META)
        else:
            x = (x[0], x[2], x[3], x[1])
            acc_r, acc_i, acc_j, acc_k = _four_products((acc_r, acc_i, acc_j, acc_k), x, tiles, META)
    acc_r = -acc_r
    rows = Rows(batch, grid_h, grid_w, y_h, y_w, phase[0], phase[1])
    channel, spread, channels = group * N + n, groups * N, 4 * groups * N
    if META.SPLIT:
        shared = Shared(partial_ptr, ticket_ptr, splits)
        _, part, parts = _own_part(shared, BLOCK_M * 4 * BLOCK_N)
        at = tl.arange(0, BLOCK_M)[:, None] * (4 * BLOCK_N) + tl.arange(0, BLOCK_N)[None, :]
        own_ptr = partial_ptr + (split * parts + part) + at
        tl.store(own_ptr, acc_r)
        tl.store(own_ptr + BLOCK_N, acc_i)
        tl.store(own_ptr + 2 * BLOCK_N, acc_j)
        tl.store(own_ptr + 3 * BLOCK_N, acc_k)
        column = tl.arange(0, 4 * BLOCK_N)
        n = first_n + column % BLOCK_N
        channel = column // BLOCK_N * spread + group * N + n
        _write_shared(first_row, channel, (n < N) | META.EVEN_N, channels, rows, output, scale, shared, META)
    else:
        _write(acc_r, m, channel, n_ok, channels, rows, output, scale, META)
        _write(acc_i, m, channel + spread, n_ok, channels, rows, output, scale, META)
        _write(acc_j, m, channel + 2 * spread, n_ok, channels, rows, output, scale, META)
        _write(acc_k, m, channel + 3 * spread, n_ok, channels, rows, output, scale, META)


class Gradients(NamedTuple):
    """Results of a weight gradient: dw `[4, groups P, Q, position]` and db `[4 groups P]`."""

    dw_ptr: Any
    db_ptr: Any
    groups: Any
    P: Any
    Q: Any


@triton.jit
def _write_dw(part, component, group, p, e, ok, to, scale, META: tl.constexpr):
    """A component's tile `[e, p]` of dw; e is (positions, channels), or (position, channels)."""
    POSITIONS: tl.constexpr = META.KERNEL[0] * META.KERNEL[1]
    position, q = e
    at = (component * (to.groups * to.P) + group * to.P + p).to(tl.int64)[None, :] * (to.Q * POSITIONS)
    if META.SCALED:
        part *= scale
    tl.store(to.dw_ptr + at + (q * POSITIONS + position)[:, None], part.to(to.dw_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _write_db(db, tile_p, group, first_split, to, scale, shared, META: tl.constexpr):
    """The bias gradient `[4 BLOCK_N]` of a column of programs."""
    BLOCK_N: tl.constexpr = META.BLOCK_N
    column = tl.arange(0, 4 * BLOCK_N)
    p = tile_p * BLOCK_N + column % BLOCK_N
    at = column // BLOCK_N * (to.groups * to.P) + group * to.P + p
    if META.SPLIT:
        tile, part, parts = _own_part(shared, 4 * META.BLOCK_K * BLOCK_N)
        tl.store(shared.partial_ptr + (first_split * parts + part) + column, db)
        if _all_there(shared.ticket_ptr + tile, shared.splits):
            db = _summed(shared.partial_ptr, column, part, parts, shared.splits)
            if META.SCALED:
                db *= scale
            tl.store(to.db_ptr + at, db.to(to.db_ptr.dtype.element_ty), mask=p < to.P)
    else:
        if META.SCALED:
            db *= scale
        tl.store(to.db_ptr + at, db.to(to.db_ptr.dtype.element_ty), mask=p < to.P)


@triton.jit
def _bias_sums(dy_ptr, columns, columns_ok, first_step, last_step, pixels, channels, META: tl.constexpr):
    """The sum of dy over the pixels of these steps, `[columns]`."""
    BLOCK_M: tl.constexpr = META.BLOCK_M  # a shape takes no attribute
    total = tl.zeros((BLOCK_M, columns.shape[0]), tl.float32)
    for step in range(first_step, last_step):
        row = step * BLOCK_M + tl.arange(0, BLOCK_M)
        at = row.to(tl.int64)[:, None] * channels + columns[None, :]
        mask = (row < pixels)[:, None] & columns_ok[None, :]
        total += tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["batch", "y_h", "y_w", "x_h", "x_w", "tiles_p", "tiles_q", "splits", "scale"])
def _hamilton_conv_dw_kernel(
    dy_ptr, x_ptr, dw_ptr, db_ptr, partial_ptr, ticket_ptr, batch, y_h, y_w, x_h, x_w, groups, P, Q, tiles_p, tiles_q,
    splits, scale, META: tl.constexpr,
):  # fmt: skip
    """dw = sum over pixels of dy (x) conj(x under the position), db = sum over pixels of dy.

    The four components of x times the four of dy are one product `[4 BLOCK_K, BLOCK_M] x [BLOCK_M, 4 BLOCK_N]`; its
    sixteen blocks are folded into four after the loop: dw_b is the sum over c of SIGNS[b ^ c][c] times block (c, b ^
    c). A program computes BLOCK_N output channels and BLOCK_K input channels under a position (FLAT: BLOCK_K (position,
    channel) pairs) of a group, over one of `splits` ranges of pixels, in steps of BLOCK_M. P and Q count quaternion
    channels of a group. If there is a bias, the first column of programs only sums dy.
    """
    BLOCK_M: tl.constexpr = META.BLOCK_M
    BLOCK_P: tl.constexpr = META.BLOCK_N
    BLOCK_Q: tl.constexpr = META.BLOCK_K
    FLAT: tl.constexpr = META.FLAT
    NEGATIVE: tl.constexpr = META.NEGATIVE
    # If there is a single channel, one load takes the four components of a pixel.
    PIXELWISE: tl.constexpr = META.FLAT == 1
    group, split = tl.program_id(1), tl.program_id(2)
    tile_p = tl.program_id(0) % tiles_p
    tile_q = tl.program_id(0) // tiles_p - (1 if META.HAS_BIAS else 0)
    to, shared = Gradients(dw_ptr, db_ptr, groups, P, Q), Shared(partial_ptr, ticket_ptr, splits)
    column = tl.arange(0, 4 * BLOCK_P)
    p = tile_p * BLOCK_P + column % BLOCK_P
    p_ok = (p < P) | META.EVEN_N
    columns = column // BLOCK_P * (groups * P) + group * P + p
    pixels = batch * y_h * y_w
    steps = tl.cdiv(pixels, BLOCK_M)
    first_step, last_step = _range_of_steps(steps, splits, META)
    if META.HAS_BIAS:  # noqa: SIM102 (the inner condition is one of the GPU's)
        if tile_q < 0:
            db = _bias_sums(dy_ptr, columns, p_ok, first_step, last_step, pixels, 4 * groups * P, META)
            _write_db(db, tile_p, group, split, to, scale, shared, META)
            return
    tl.assume(first_step < last_step)

    row = tl.arange(0, 4 * BLOCK_Q)
    if PIXELWISE:
        c, e = row % 4, row // 4
    else:
        c, e = row // BLOCK_Q, row % BLOCK_Q
    lanes = tl.arange(0, BLOCK_Q)
    if FLAT:
        position, q = (tile_q * BLOCK_Q + e) // FLAT, (tile_q * BLOCK_Q + e) % FLAT
        x_ok = position < META.KERNEL[0] * META.KERNEL[1]
        x_rows = row % 4 if PIXELWISE and groups == 1 else c * (groups * FLAT) + group * FLAT + q
        u, v = position // META.KERNEL[1] * META.DILATION[0], position % META.KERNEL[1] * META.DILATION[1]
        place = ((tile_q * BLOCK_Q + lanes) // FLAT, (tile_q * BLOCK_Q + lanes) % FLAT)
        lanes_ok = place[0] < META.KERNEL[0] * META.KERNEL[1]
    else:
        position, q = tile_q // tiles_q, tile_q % tiles_q * BLOCK_Q + e
        x_ok = (q < Q) | META.EVEN_K
        x_rows = c * (groups * Q) + group * Q + q
        u, v = position // META.KERNEL[1] * META.DILATION[0], position % META.KERNEL[1] * META.DILATION[1]
        place = (position, tile_q % tiles_q * BLOCK_Q + lanes)
        lanes_ok = (place[1] < Q) | META.EVEN_K
    x_channels = 4 * groups * (FLAT if FLAT else Q)
    acc = tl.zeros((4 * BLOCK_Q, 4 * BLOCK_P), tl.float32)
    for step in range(first_step, last_step):
        m = step * BLOCK_M + tl.arange(0, BLOCK_M)
        b, i, j, m_ok = _pixels(m, y_h, y_w, batch, False)
        h, w = i * META.STRIDE[0] - META.PADDING[0], j * META.STRIDE[1] - META.PADDING[1]
        pixel = ((b.to(tl.int64) * x_h + h) * x_w + w) * x_channels
        # x is transposed by its addresses: a tile that is transposed afterwards is not copied asynchronously on sm_80.
        if FLAT:
            source_h, source_w = h[None, :] + u[:, None], w[None, :] + v[:, None]
            at = pixel[None, :] + ((u * x_w + v) * x_channels + x_rows)[:, None]
            ok = m_ok[None, :] & x_ok[:, None] & (source_h >= 0) & (source_h < x_h) & (source_w >= 0) & (source_w < x_w)
        else:
            source_h, source_w = h + u, w + v
            at = (pixel + (u * x_w + v) * x_channels)[None, :] + x_rows[:, None]
            ok = m_ok & (source_h >= 0) & (source_h < x_h) & (source_w >= 0) & (source_w < x_w)
            ok = ok[None, :] & x_ok[:, None]
        x = tl.load(x_ptr + at, mask=ok, other=0.0)
        at = m.to(tl.int64)[:, None] * (4 * groups * P) + columns[None, :]
        dy = tl.load(dy_ptr + at, mask=m_ok[:, None] & p_ok[None, :], other=0.0)
        acc = _dot(x, dy, acc, META)

    a4 = tl.arange(0, 4)[None, None, :, None]
    if PIXELWISE:
        blocks = tl.reshape(acc, (BLOCK_Q, 4, 4, BLOCK_P))
        c4 = tl.arange(0, 4)[None, :, None, None]
    else:
        blocks = tl.reshape(acc, (4, BLOCK_Q, 4, BLOCK_P))
        c4 = tl.arange(0, 4)[:, None, None, None]
    blocks = tl.where(((NEGATIVE >> (4 * a4 + c4)) & 1) == 1, -blocks, blocks)
    p = tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
    ok = lanes_ok[:, None] & ((p < P) | META.EVEN_N)[None, :]
    size: tl.constexpr = BLOCK_Q * BLOCK_P
    _, part, parts = _own_part(shared, 4 * size)
    at = lanes[:, None] * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    for component in tl.static_range(4):
        folded = tl.sum(tl.sum(tl.where((a4 ^ c4) == component, blocks, 0.0), 2), 1 if PIXELWISE else 0)
        if META.SPLIT:
            tl.store(partial_ptr + (split * parts + part + component * size) + at, folded)
        else:
            _write_dw(folded, component, group, p, place, ok, to, scale, META)
    if META.SPLIT:
        _write_shared_dw(at, group, p, place, ok, to, scale, shared, META)


@triton.jit
def _write_shared_dw(at, group, p, place, ok, to, scale, shared, META: tl.constexpr):
    """dw of all parts `[4, BLOCK_K, BLOCK_N]` of a tile, by the last program to arrive."""
    size: tl.constexpr = META.BLOCK_K * META.BLOCK_N
    tile, part, parts = _own_part(shared, 4 * size)
    if _all_there(shared.ticket_ptr + tile, shared.splits):
        for component in range(4):
            total = _summed(shared.partial_ptr, at, part + component * size, parts, shared.splits)
            _write_dw(total, component, group, p, place, ok, to, scale, META)


@triton.jit
def _four_weight_products(acc, x, y, META: tl.constexpr):
    """acc + x^T y, component by component; each tile is transposed just before it is used, or float32 spills."""
    acc_r = _dot(tl.trans(x[0]), y[0], acc[0], META)
    acc_i = _dot(tl.trans(x[1]), y[1], acc[1], META)
    acc_j = _dot(tl.trans(x[2]), y[2], acc[2], META)
    acc_k = _dot(tl.trans(x[3]), y[3], acc[3], META)
    return acc_r, acc_i, acc_j, acc_k


@triton.jit
def _q8_pixel_tiles(step, sizes, shift, x_at, y_at, x_ok, y_ok, META: tl.constexpr):
    """The component tiles of x under the position `[pixels, q]` and of dy `[pixels, p]` in a step."""
    batch, y_h, y_w, x_h, x_w, x_size, y_size = sizes
    m = step * META.BLOCK_M + tl.arange(0, META.BLOCK_M)
    b, i, j, m_ok = _pixels(m, y_h, y_w, batch, False)
    h, w = i * META.STRIDE[0] + shift[0], j * META.STRIDE[1] + shift[1]
    ok = m_ok & (h >= 0) & (h < x_h) & (w >= 0) & (w < x_w)
    pixel = ((b.to(tl.int64) * x_h + h) * x_w + w) * (4 * x_size)
    x = _four_tiles(x_at + pixel[:, None], x_size, ok[:, None] & x_ok)
    return x, _four_tiles(y_at + m.to(tl.int64)[:, None] * (4 * y_size), y_size, m_ok[:, None] & y_ok)


@triton.jit(do_not_specialize=["batch", "y_h", "y_w", "x_h", "x_w", "tiles_p", "tiles_q", "splits", "scale"])
def _hamilton_conv_dw_q8_kernel(
    dy_ptr, x_ptr, dw_ptr, db_ptr, partial_ptr, ticket_ptr, batch, y_h, y_w, x_h, x_w, groups, P, Q, tiles_p, tiles_q,
    splits, scale, META: tl.constexpr,
):  # fmt: skip
    """As `_hamilton_conv_dw_kernel`, by 8 products: dw = A^T [(B x) * (C^T dy)], as -2 (-H z / 8 + plain products).

    Half of 1/4 goes to each operand.
    """
    BLOCK_M: tl.constexpr = META.BLOCK_M
    BLOCK_P: tl.constexpr = META.BLOCK_N
    BLOCK_Q: tl.constexpr = META.BLOCK_K
    group, split = tl.program_id(1), tl.program_id(2)
    tile_p = tl.program_id(0) % tiles_p
    tile_q = tl.program_id(0) // tiles_p - (1 if META.HAS_BIAS else 0)
    to, shared = Gradients(dw_ptr, db_ptr, groups, P, Q), Shared(partial_ptr, ticket_ptr, splits)
    steps = tl.cdiv(batch * y_h * y_w, BLOCK_M)
    first_step, last_step = _range_of_steps(steps, splits, META)
    if META.HAS_BIAS:  # noqa: SIM102 (the inner condition is one of the GPU's)
        if tile_q < 0:
            column = tl.arange(0, 4 * BLOCK_P)
            p = tile_p * BLOCK_P + column % BLOCK_P
            columns = column // BLOCK_P * (groups * P) + group * P + p
            pixels = batch * y_h * y_w
            db = _bias_sums(dy_ptr, columns, p < P, first_step, last_step, pixels, 4 * groups * P, META)
            _write_db(db, tile_p, group, split, to, scale, shared, META)
            return
    tl.assume(first_step < last_step)

    position = tile_q // tiles_q
    q, p = tile_q % tiles_q * BLOCK_Q + tl.arange(0, BLOCK_Q), tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
    q_ok, p_ok = (q < Q) | META.EVEN_K, (p < P) | META.EVEN_N
    x_at, y_at = x_ptr + (group * Q + q)[None, :], dy_ptr + (group * P + p)[None, :]
    shift_h = position // META.KERNEL[1] * META.DILATION[0] - META.PADDING[0]
    shift_w = position % META.KERNEL[1] * META.DILATION[1] - META.PADDING[1]
    sizes, shift = (batch, y_h, y_w, x_h, x_w, groups * Q, groups * P), (shift_h, shift_w)
    acc_r = tl.zeros((BLOCK_Q, BLOCK_P), tl.float32)
    acc_i, acc_j, acc_k = acc_r, acc_r, acc_r
    for step in range(first_step, last_step):
        x, y = _q8_pixel_tiles(step, sizes, shift, x_at, y_at, q_ok[None, :], p_ok[None, :], META)
        h0, h1, h2, h3 = _hadamard(x[0], x[1], x[2], x[3])
        g0, g1, g2, g3 = _hadamard(-y[0], y[1], y[2], y[3])
        x, y = (h0 * 0.5, h1 * 0.5, h2 * 0.5, h3 * 0.5), (g0 * 0.5, g1 * 0.5, g2 * 0.5, g3 * 0.5)
        acc_r, acc_i, acc_j, acc_k = _four_weight_products((acc_r, acc_i, acc_j, acc_k), x, y, META)
    acc_r, acc_i, acc_j, acc_k = _hadamard(-0.5 * acc_r, -0.5 * acc_i, -0.5 * acc_j, -0.5 * acc_k)
    acc_r = -acc_r
    for step in range(first_step, last_step):
        x, y = _q8_pixel_tiles(step, sizes, shift, x_at, y_at, q_ok[None, :], p_ok[None, :], META)
        x = (x[0], x[2], x[3], x[1])
        acc_r, acc_k, acc_i, acc_j = _four_weight_products((acc_r, acc_k, acc_i, acc_j), x, y, META)
    acc_r, acc_i, acc_j, acc_k = 2 * acc_r, -2 * acc_i, -2 * acc_j, -2 * acc_k
    place, ok = (position, q), q_ok[:, None] & p_ok[None, :]
    if META.SPLIT:
        size: tl.constexpr = BLOCK_Q * BLOCK_P
        _, part, parts = _own_part(shared, 4 * size)
        at = tl.arange(0, BLOCK_Q)[:, None] * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
        own_ptr = partial_ptr + (split * parts + part) + at
        tl.store(own_ptr, acc_r)
        tl.store(own_ptr + size, acc_i)
        tl.store(own_ptr + 2 * size, acc_j)
        tl.store(own_ptr + 3 * size, acc_k)
        _write_shared_dw(at, group, p, place, ok, to, scale, shared, META)
    else:
        _write_dw(acc_r, 0, group, p, place, ok, to, scale, META)
        _write_dw(acc_i, 1, group, p, place, ok, to, scale, META)
        _write_dw(acc_j, 2, group, p, place, ok, to, scale, META)
        _write_dw(acc_k, 3, group, p, place, ok, to, scale, META)


@triton.jit(do_not_specialize=["size_h", "size_w", "scale"])
def _hamilton_gradient_kernel(
    dy_ptr, relu_ptr, dpooled_ptr, argmax_ptr, out_ptr, size_h, size_w, channels, count, scale,
    HAS_DY: tl.constexpr, MASKED: tl.constexpr, POOLED: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient in front of an epilogue, computed once for the kernels that read it for each position:

        out = scale [relu > 0] dy + [argmax == place in the window] dpooled

    of maps of size_h x size_w pixels, rounded to tf32 for this PRECISION, so that it also rounds operands. A program
    computes BLOCK consecutive elements.
    """
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = e < count
    value = tl.zeros((BLOCK,), tl.float32)
    if HAS_DY:
        value = tl.load(dy_ptr + e, mask=ok, other=0.0).to(tl.float32)
        if MASKED:
            of_relu = tl.load(relu_ptr + e, mask=ok, other=0.0).to(tl.float32)
            value = tl.where(of_relu <= 0, 0.0, value)  # NaN passes, as in PyTorch
        if SCALED:
            value *= scale
    if POOLED:
        pixel, channel = e // channels, e % channels
        b, h, w = pixel // (size_h * size_w), (pixel // size_w % size_h).to(tl.int32), (pixel % size_w).to(tl.int32)
        half_h, half_w = size_h // 2, size_w // 2
        at = ((b * half_h + h // 2) * half_w + w // 2) * channels + channel
        windowed = ok & (h // 2 < half_h) & (w // 2 < half_w)
        argmax = tl.load(argmax_ptr + at, mask=windowed, other=4).to(tl.int32)
        routed = tl.load(dpooled_ptr + at, mask=windowed, other=0.0).to(tl.float32)
        value += tl.where(argmax == h % 2 * 2 + w % 2, routed, 0.0)
    tl.store(out_ptr + e, _rounded(value, PRECISION).to(out_ptr.dtype.element_ty), mask=ok)


class Unpacked(NamedTuple):
    """A weight `[4, rows, Q, position]`, dense."""

    ptr: Any
    rows: Any
    Q: Any
    positions: Any


@triton.jit
def _pack(e, w, out_ptr, Q8: tl.constexpr, TF32: tl.constexpr):
    """Packs the quaternions e of a weight, `[4, rows, Q, position]`, as `[8, position, rows, Q]`."""
    count = w.rows * w.Q * w.positions
    ok = e < count
    q, row, position = e % w.Q, e // w.Q % w.rows, e // (w.Q * w.rows)
    at = w.ptr + (row.to(tl.int64) * w.Q + q) * w.positions + position
    component = tl.cast(count, tl.int64)
    r = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    i = tl.load(at + component, mask=ok, other=0.0).to(tl.float32)
    j = tl.load(at + 2 * component, mask=ok, other=0.0).to(tl.float32)
    k = tl.load(at + 3 * component, mask=ok, other=0.0).to(tl.float32)
    if Q8:
        first, second = _hadamard(r, i, j, k), (-2 * r, -2 * k, -2 * i, -2 * j)
    else:
        first, second = (r, i, j, k), (-r, -i, -j, -k)
    other = (position.to(tl.int64) * w.Q + q) * w.rows + row
    for tile in tl.static_range(4):
        x, y = _rounded(first[tile], "tf32" if TF32 else "ieee"), _rounded(second[tile], "tf32" if TF32 else "ieee")
        dtype = out_ptr.dtype.element_ty
        tl.store(out_ptr + tile * component + e, x.to(dtype), mask=ok)
        tl.store(out_ptr + (4 + tile) * component + e, y.to(dtype), mask=ok)
        if TF32:
            # Tensor cores read 32-bit operands along the sum alone: the adjoint's tiles are [8, position, Q, rows].
            tl.store(out_ptr + (8 + tile) * component + other, x.to(dtype), mask=ok)
            tl.store(out_ptr + (12 + tile) * component + other, y.to(dtype), mask=ok)


@triton.jit
def _hamilton_pack_kernel(weights, out_ptr, ticket_ptr, tickets, LAYOUTS: tl.constexpr, BLOCK: tl.constexpr):
    """All weights of a network as the convolutions read them, in a row, and `tickets` zeros.

    Signed: [w, -w] `[8, position, rows, Q]`, in the maps' type (rounded to tf32). "q8": [H w; -2 w by
    algebra.WEIGHT_ORDER]. LAYOUTS holds for each weight whether it is for q8, and whether for tf32. A program packs
    BLOCK quaternions of a weight.
    """
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    at = program * BLOCK + lanes
    tl.store(ticket_ptr + at, 0, mask=at < tickets)
    first = 0
    for number in tl.static_range(len(weights)):
        w = weights[number]
        programs = tl.cdiv(w.rows * w.Q * w.positions, BLOCK)
        if (program >= first) & (program < first + programs):
            _pack((program - first) * BLOCK + lanes, w, out_ptr, LAYOUTS[number][0], LAYOUTS[number][1])
        first += programs
        out_ptr += tl.cast(w.rows * w.Q * w.positions, tl.int64) * (16 if LAYOUTS[number][1] else 8)
