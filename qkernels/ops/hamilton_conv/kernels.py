"""The convolution's kernels. A map is dense NHWC; its channels are planar, (component, group, channel).

Letters: b image; h, w pixel; c component; k channel that is summed over, n channel that is written.

A *gather* covers both directions. For the tap (u, v), output pixel (i, j) reads the source pixel (i * scale +
shift(u), j * scale + shift(v)). A convolution is one gather, with scale = stride and shift(u) = u * dilation -
padding. Its adjoint is one for each class of output pixels with the same remainder by the stride, `phase`: pixel phase
+ i * stride reads i + (phase + padding - u * dilation) / stride, from the taps for which that is whole. No tap is read
in vain.

A *source* is the map that is gathered, or the gradient in front of an epilogue, put together while it is loaded:

    SOURCE      map [pixels]  gate           pooled [windows]  code       value
    "map"       x or dy                                                   map
    "relu"      dy            y behind ReLU                               [gate > 0] map
    "pool"                                   d pooled          position   [code == position] pooled
    "map+pool"  dy                           d pooled          position   the sum of "map" and "pool"
    "relu+pool" dy            y behind ReLU  d pooled          position   the sum of "relu" and "pool"

`do_not_specialize` names the sizes that change from call to call: one binary serves them all.

`code` says which pixel of a 2x2 window its maximum came from, 0 to 3 in reading order; 4: none, behind a ReLU.
"""

import triton
import triton.language as tl


@triton.jit
def _negated(x):
    """-x by the sign bit for half types: one integer operation for two values."""
    if x.dtype.primitive_bitwidth == 16:
        return (x.to(tl.int16, bitcast=True) ^ -32768).to(x.dtype, bitcast=True)
    else:
        return -x


@triton.jit
def _rounded(x, PRECISION: tl.constexpr):
    """float32 to the nearest tf32, ties away from zero, NaN kept; tensor cores would cut the low bits off."""
    if PRECISION == "tf32":
        near = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        return tl.where(x == x, near, x)
    else:
        return x


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a b in float32. UPCAST: Triton's interpreter would multiply the bit patterns of bfloat16."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _first_tap(phase, padding, dilation, stride, kernel):
    """The smallest tap that hits a source pixel from this class of output pixels; `kernel` where none does."""
    first = kernel
    for back in range(kernel):
        tap = kernel - 1 - back
        first = tl.where((phase + padding - tap * dilation) % stride == 0, tap, first)
    return first


@triton.jit
def _pixels(m, height, width, batch, POOL: tl.constexpr):
    """Image and pixel of row m, and whether there is one. POOL: four rows are one of height x width 2x2 windows."""
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
def _source_rows(b, h, w, ok, source_h, source_w, channels, SOURCE: tl.constexpr):
    """Where the pixels (h, w) of a map of source_h x source_w lie: offsets and masks of the map and of its 2x2
    windows, and the position in the window.
    """
    inside = ok & (h >= 0) & (h < source_h) & (w >= 0) & (w < source_w)
    pixel = (b.to(tl.int64) * source_h * source_w + h * source_w + w) * channels
    if SOURCE == "map" or SOURCE == "relu":
        return pixel, inside, pixel, inside, w
    else:
        windows_h, windows_w = source_h // 2, source_w // 2
        windowed = inside & (h // 2 < windows_h) & (w // 2 < windows_w)
        window = (b.to(tl.int64) * windows_h * windows_w + h // 2 * windows_w + w // 2) * channels
        return pixel, inside, window, windowed, h % 2 * 2 + w % 2


@triton.jit
def _load(source, rows, channels, channels_ok, SOURCE: tl.constexpr, PRECISION: tl.constexpr):
    """A tile [pixels, channels] of the source; rows [pixels, 1], or of the tile where each column has its own tap."""
    map_ptr, gate_ptr, pooled_ptr, code_ptr = source
    pixel, inside, window, windowed, position = rows
    if SOURCE != "pool":
        at = pixel + channels
        mask = inside & channels_ok
        value = tl.load(map_ptr + at, mask=mask, other=0.0)
        if SOURCE == "relu" or SOURCE == "relu+pool":
            gate = tl.load(gate_ptr + at, mask=mask, other=0.0)
            value = tl.where(gate.to(tl.float32) <= 0, 0.0, value)  # NaN lets pass, as in PyTorch
    if SOURCE == "pool" or SOURCE == "map+pool" or SOURCE == "relu+pool":
        at = window + channels
        mask = windowed & channels_ok
        code = tl.load(code_ptr + at, mask=mask, other=4).to(tl.int32)
        routed = tl.load(pooled_ptr + at, mask=mask, other=0.0)
        routed = tl.where(code == position, routed, 0.0)
        if SOURCE == "pool":  # noqa: SIM108 (Triton has no value yet in the other branch)
            value = routed
        else:
            value = (value.to(tl.float32) + routed.to(tl.float32)).to(routed.dtype)
    return _rounded(value, PRECISION)


@triton.jit
def _load_quaternions(source, rows, channels, ok, size, SOURCE: tl.constexpr, PRECISION: tl.constexpr):
    """The tiles of the components r, i, j, k, which lie `size` channels apart."""
    r = _load(source, rows, channels, ok, SOURCE, PRECISION)
    i = _load(source, rows, channels + size, ok, SOURCE, PRECISION)
    j = _load(source, rows, channels + 2 * size, ok, SOURCE, PRECISION)
    k = _load(source, rows, channels + 3 * size, ok, SOURCE, PRECISION)
    return r, i, j, k


@triton.jit
def _hadamard(r, i, j, k):
    """H (r, i, j, k), see algebra.HADAMARD."""
    s, t, p, q = r + i, r - i, j + k, j - k
    return s + p, t + q, s - p, t - q


@triton.jit
def _hadamard_operands(x, scale, PRECISION: tl.constexpr):
    """scale H x, summed in float32 and rounded once to the type of x, or to tf32."""
    h0, h1, h2, h3 = _hadamard(x[0].to(tl.float32), x[1].to(tl.float32), x[2].to(tl.float32), x[3].to(tl.float32))
    h0, h1 = _rounded((h0 * scale).to(x[0].dtype), PRECISION), _rounded((h1 * scale).to(x[0].dtype), PRECISION)
    h2, h3 = _rounded((h2 * scale).to(x[0].dtype), PRECISION), _rounded((h3 * scale).to(x[0].dtype), PRECISION)
    return h0, h1, h2, h3


@triton.jit
def _first_maximum(value, code, other, other_code):
    """The larger of two values with its code; NaN counts as largest, the smaller code wins a tie."""
    take = (value > other) | (value != value) | ((value == other) & (code < other_code))
    return tl.where(take, value, other), tl.where(take, code, other_code)


@triton.jit
def _output_rows(m, grid, phase, stride, y_size, ADJOINT: tl.constexpr, POOL: tl.constexpr):
    """Where the rows m of one class are written: offsets and masks of pixels `[M, 1]` and of windows `[M / 4, 1]`."""
    batch, grid_h, grid_w = grid
    y_h, y_w, channels = y_size
    b, h, w, ok = _pixels(m[:, None], grid_h, grid_w, batch, POOL)
    if ADJOINT:
        h, w = phase[0] + h * stride[0], phase[1] + w * stride[1]
    pixel = (b.to(tl.int64) * y_h * y_w + h * y_w + w) * channels
    pixel_ok = ok & (h < y_h) & (w < y_w)
    if POOL:
        first = tl.max(tl.reshape(m, (m.shape[0] // 4, 4)), 1, keep_dims=True)
        b, h, w, ok = _pixels(first // 4, grid_h, grid_w, batch, False)
        window = (b.to(tl.int64) * (y_h // 2) * (y_w // 2) + h * (y_w // 2) + w) * channels
        return pixel, pixel_ok, window, ok & (h < y_h // 2) & (w < y_w // 2)
    else:
        return pixel, pixel_ok, pixel, pixel_ok


@triton.jit
def _store_output(
    acc, target, bias_ptr, rows, n, n_ok,
    HAS_BIAS: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr, WRITE_MAP: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile [pixels, channels]: + bias, ReLU, the map, the maxima of its windows with their codes."""
    y_ptr, pooled_ptr, code_ptr = target
    pixel, pixel_ok, window, window_ok = rows
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)
    y = acc.to(y_ptr.dtype.element_ty)
    if WRITE_MAP:
        tl.store(y_ptr + pixel + n[None, :], y, mask=pixel_ok & n_ok[None, :])
    if POOL:
        # The maxima are those of the map as stored, so that codes and ties are those of pooling it afterwards.
        windows = tl.reshape(y.to(tl.float32), (y.shape[0] // 4, 4, y.shape[1]))
        codes = tl.zeros_like(windows).to(tl.int32) + tl.arange(0, 4)[None, :, None]
        largest, code = tl.reduce((windows, codes), 1, _first_maximum)
        if RELU:
            code = tl.where(largest <= 0, 4, code)
        mask = window_ok & n_ok[None, :]
        tl.store(pooled_ptr + window + n[None, :], largest.to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(code_ptr + window + n[None, :], code.to(tl.uint8), mask=mask)


@triton.jit
def _shift(tap, phase, padding, dilation, stride, ADJOINT: tl.constexpr):
    """From a row of the output's class to the source pixel under the tap."""
    if ADJOINT:
        return (phase + padding - tap * dilation) // stride
    else:
        return tap * dilation - padding


@triton.jit
def _gather(tap, place, window, SOURCE: tl.constexpr, ADJOINT: tl.constexpr):
    """The source rows under the tap-th tap that counts, and the number of that tap in the kernel."""
    b, h0, w0, ok, source_h, source_w, channels = place
    taps_w, kernel_w, first, step, phase, padding, dilation, stride = window
    u, v = first[0] + tap // taps_w * step[0], first[1] + tap % taps_w * step[1]
    h = h0 + _shift(u, phase[0], padding[0], dilation[0], stride[0], ADJOINT)
    w = w0 + _shift(v, phase[1], padding[1], dilation[1], stride[1], ADJOINT)
    return _source_rows(b, h, w, ok, source_h, source_w, channels, SOURCE), u * kernel_w + v


@triton.jit
def _planar(channel, size, group, groups):
    """Where the (component, channel) of one group, of `size` quaternion channels, lies in a map of all groups."""
    return channel // size * (groups * size) + group * size + channel % size


@triton.jit
def _quaternion_operands(
    step, source, place, window, weight, k_tile, n, n_ok, K, first_channel, size,
    SOURCE: tl.constexpr, ADJOINT: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The component tiles of the source `[pixels, k]` and of the weight `[k, n]` in one step of the sum."""
    w_ptr, stride_wc, stride_wt, stride_wk, stride_wn = weight
    k_chunks = tl.cdiv(K, k_tile.shape[0])
    k = step % k_chunks * k_tile.shape[0] + k_tile
    k_ok = (k < K) | EVEN_K
    rows, tap = _gather(step // k_chunks, place, window, SOURCE, ADJOINT)
    x = _load_quaternions(source, rows, (first_channel + k)[None, :], k_ok[None, :], size, SOURCE, PRECISION)
    at = w_ptr + tap * stride_wt + k[:, None] * stride_wk + n[None, :] * stride_wn
    ok = k_ok[:, None] & n_ok[None, :]
    w0 = tl.load(at, mask=ok, other=0.0)
    w1 = tl.load(at + stride_wc, mask=ok, other=0.0)
    w2 = tl.load(at + 2 * stride_wc, mask=ok, other=0.0)
    w3 = tl.load(at + 3 * stride_wc, mask=ok, other=0.0)
    return x, (w0, w1, w2, w3)


@triton.jit
def _dense_operands(
    step, source, place, window, weight, k_tile, n, n_ok, K, group, groups, taps, size,
    SOURCE: tl.constexpr, ADJOINT: tl.constexpr, FLAT: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tiles of the source and of the expanded weight; FLAT: of (tap, channel) pairs, not of one tap's channels."""
    w_ptr, _, stride_wt, stride_wk, stride_wn = weight
    if FLAT:
        e = step * k_tile.shape[0] + k_tile
        k, k_ok = e % K, e < taps * K
        rows, tap = _gather((e // K)[None, :], place, window, SOURCE, ADJOINT)
        channels = _planar(k, K // 4, group, groups)
        at = w_ptr + tl.trans(tap) * stride_wt + k[:, None] * stride_wk + n[None, :] * stride_wn
    else:
        k_chunks = tl.cdiv(K, k_tile.shape[0])
        k = step % k_chunks * k_tile.shape[0] + k_tile
        k_ok = (k < K) | EVEN_K
        rows, tap = _gather(step // k_chunks, place, window, SOURCE, ADJOINT)
        channels = k
        at = w_ptr + tap * stride_wt + k[:, None] * stride_wk + n[None, :] * stride_wn
    x = _load(source, rows, channels[None, :], k_ok[None, :], SOURCE, PRECISION)
    return x, tl.load(at, mask=k_ok[:, None] & n_ok[None, :], other=0.0)


@triton.jit
def _q16_products(acc, x, w, ADJOINT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + M(w) x, for the adjoint acc + (M(w) - 2 w_r I) x; each accumulator in one run, which ptxas pipelines."""
    acc_r, acc_i, acc_j, acc_k = acc
    xr, xi, xj, xk = x
    w0, w1, w2, w3 = w
    nr, ni, nj, nk = _negated(xr), _negated(xi), _negated(xj), _negated(xk)
    tr, ti, tj, tk = (nr, ni, nj, nk) if ADJOINT else (xr, xi, xj, xk)
    acc_r = _dot(tr, w0, acc_r, PRECISION, UPCAST)
    acc_r = _dot(ni, w1, acc_r, PRECISION, UPCAST)
    acc_r = _dot(nj, w2, acc_r, PRECISION, UPCAST)
    acc_r = _dot(nk, w3, acc_r, PRECISION, UPCAST)
    acc_i = _dot(ti, w0, acc_i, PRECISION, UPCAST)
    acc_i = _dot(xr, w1, acc_i, PRECISION, UPCAST)
    acc_i = _dot(xk, w2, acc_i, PRECISION, UPCAST)
    acc_i = _dot(nj, w3, acc_i, PRECISION, UPCAST)
    acc_j = _dot(tj, w0, acc_j, PRECISION, UPCAST)
    acc_j = _dot(nk, w1, acc_j, PRECISION, UPCAST)
    acc_j = _dot(xr, w2, acc_j, PRECISION, UPCAST)
    acc_j = _dot(xi, w3, acc_j, PRECISION, UPCAST)
    acc_k = _dot(tk, w0, acc_k, PRECISION, UPCAST)
    acc_k = _dot(xj, w1, acc_k, PRECISION, UPCAST)
    acc_k = _dot(ni, w2, acc_k, PRECISION, UPCAST)
    acc_k = _dot(xr, w3, acc_k, PRECISION, UPCAST)
    return acc_r, acc_i, acc_j, acc_k


@triton.jit
def _four_products(acc, x, w, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + x w, component by component."""
    acc_r = _dot(x[0], w[0], acc[0], PRECISION, UPCAST)
    acc_i = _dot(x[1], w[1], acc[1], PRECISION, UPCAST)
    acc_j = _dot(x[2], w[2], acc[2], PRECISION, UPCAST)
    acc_k = _dot(x[3], w[3], acc[3], PRECISION, UPCAST)
    return acc_r, acc_i, acc_j, acc_k


@triton.jit(do_not_specialize=["batch", "source_h", "source_w", "y_h", "y_w", "grid_h", "grid_w", "tiles_n", "splits"])
def _hamilton_conv_kernel(
    map_ptr, gate_ptr, pooled_source_ptr, code_source_ptr, w_ptr, bias_ptr, y_ptr, pooled_ptr, code_ptr, partial_ptr,
    batch, source_h, source_w, y_h, y_w, grid_h, grid_w, groups, K, N, tiles_n, splits,
    kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, step_h, step_w,
    stride_wc, stride_wt, stride_wg, stride_wk, stride_wn,
    FORM: tl.constexpr, ADJOINT: tl.constexpr, SOURCE: tl.constexpr, FLAT: tl.constexpr, EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr, MAYBE_EMPTY: tl.constexpr, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr, POOL: tl.constexpr, WRITE_MAP: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = epilogue(w (x) source), or its adjoint: the convolution, and its data gradient or transposed convolution.

    One program owns BLOCK_M pixels of one class, BLOCK_N channels of one group, and one of `splits` parts of the sum
    over taps and channels; a part goes to `partial` [split, class, pixel, channel] in float32, for
    `_hamilton_finish_kernel`. K and N count the quaternion channels of a group, and a program has all four components;
    for "dense", the real ones.

    "q16": the 16 products of algebra.SIGNS. M(w)^T = 2 r I - M(w), so the adjoint changes the sign of the tiles that
    meet r, and of the result. "q8": y = C ((A w) * (B x)), the adjoint B^T ((A w) * (C^T dy)), with w_ptr on [H w; -2
    w]; the factor 1/4 of A goes to the source, which keeps half types in range (Howell & Lafon 1975). It reads the
    source twice: four accumulators at a time fit the registers, eight spill. "dense": w_ptr on the expanded weight;
    FLAT sums over single (tap, channel) pairs, for few channels and for groups.
    """
    group = tl.program_id(1) % groups
    phase = tl.program_id(1) // groups
    split = tl.program_id(2)
    m = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = (n < N) | EVEN_N
    if ADJOINT:
        phase_h, phase_w = phase // stride_w, phase % stride_w
        first_u = _first_tap(phase_h, padding_h, dilation_h, stride_h, kernel_h)
        first_v = _first_tap(phase_w, padding_w, dilation_w, stride_w, kernel_w)
        scale_h, scale_w, classes = 1, 1, stride_h * stride_w
    else:
        phase_h, phase_w, first_u, first_v = 0, 0, 0, 0
        scale_h, scale_w, classes = stride_h, stride_w, 1
    taps_w = tl.cdiv(kernel_w - first_v, step_w)
    taps = tl.cdiv(kernel_h - first_u, step_h) * taps_w
    parts: tl.constexpr = 1 if FORM == "dense" else 4
    size = groups * K * parts // 4
    source = (map_ptr, gate_ptr, pooled_source_ptr, code_source_ptr)
    b, i, j, m_ok = _pixels(m[:, None], grid_h, grid_w, batch, POOL)
    place = (b, i * scale_h, j * scale_w, m_ok, source_h, source_w, 4 * size)
    window = (taps_w, kernel_w, (first_u, first_v), (step_h, step_w), (phase_h, phase_w), (padding_h, padding_w),
              (dilation_h, dilation_w), (stride_h, stride_w))  # fmt: skip

    weight = (w_ptr + group * stride_wg, stride_wc, stride_wt, stride_wk, stride_wn)
    k_tile = tl.arange(0, BLOCK_K)
    steps = tl.cdiv(taps * K, BLOCK_K) if FLAT else taps * tl.cdiv(K, BLOCK_K)
    first_step, last_step = split * steps // splits, (split + 1) * steps // splits
    if not MAYBE_EMPTY:  # ptxas would serialise the products of a loop that might not run (C7515)
        tl.assume(first_step < last_step)
    acc_r = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if FORM == "dense":
        for step in range(first_step, last_step):
            x, w = _dense_operands(step, source, place, window, weight, k_tile, n, n_ok, K, group, groups, taps, size,
                                   SOURCE, ADJOINT, FLAT, EVEN_K, PRECISION)  # fmt: skip
            acc_r = _dot(x, w, acc_r, PRECISION, UPCAST)
    else:
        acc_i, acc_j, acc_k = acc_r, acc_r, acc_r
        for step in range(first_step, last_step):
            x, w = _quaternion_operands(step, source, place, window, weight, k_tile, n, n_ok, K, group * K, size,
                                        SOURCE, ADJOINT, EVEN_K, PRECISION)  # fmt: skip
            acc = (acc_r, acc_i, acc_j, acc_k)
            if FORM == "q16":
                acc_r, acc_i, acc_j, acc_k = _q16_products(acc, x, w, ADJOINT, PRECISION, UPCAST)
            else:
                x = (_negated(x[0]) if ADJOINT else x[0], x[1], x[2], x[3])
                h = _hadamard_operands(x, 0.25, PRECISION)
                acc_r, acc_i, acc_j, acc_k = _four_products(acc, h, w, PRECISION, UPCAST)
        if FORM == "q8":
            # C = S [H | I] and B^T = [H | I by algebra.INPUT_ORDER]: the plain products join the transformed ones.
            acc_r, acc_i, acc_j, acc_k = _hadamard(acc_r, acc_i, acc_j, acc_k)
            acc_r = -acc_r if ADJOINT else acc_r
            weight = (w_ptr + group * stride_wg + 4 * stride_wc, stride_wc, stride_wt, stride_wk, stride_wn)
            for step in range(first_step, last_step):
                x, w = _quaternion_operands(step, source, place, window, weight, k_tile, n, n_ok, K, group * K, size,
                                            SOURCE, ADJOINT, EVEN_K, PRECISION)  # fmt: skip
                if ADJOINT:
                    acc = (acc_r, acc_j, acc_k, acc_i)
                    acc_r, acc_j, acc_k, acc_i = _four_products(acc, x, w, PRECISION, UPCAST)
                else:
                    acc = (acc_r, acc_i, acc_j, acc_k)
                    acc_r, acc_i, acc_j, acc_k = _four_products(acc, (x[0], x[2], x[3], x[1]), w, PRECISION, UPCAST)
            acc_r = -acc_r
        elif ADJOINT:
            acc_r, acc_i, acc_j, acc_k = -acc_r, -acc_i, -acc_j, -acc_k

    y_channels = groups * N * parts
    spread = groups * N  # from one component to the next
    column = _planar(n, N // 4, group, groups) if FORM == "dense" else group * N + n
    if SPLIT:
        rows_of_class = batch * grid_h * grid_w * (4 if POOL else 1)
        part = (split * classes + phase).to(tl.int64) * rows_of_class + m
        at = partial_ptr + part[:, None] * y_channels + column[None, :]
        mask = m_ok & n_ok[None, :]
        tl.store(at, acc_r, mask=mask)
        if FORM != "dense":
            tl.store(at + spread, acc_i, mask=mask)
            tl.store(at + 2 * spread, acc_j, mask=mask)
            tl.store(at + 3 * spread, acc_k, mask=mask)
    else:
        target = (y_ptr, pooled_ptr, code_ptr)
        rows = _output_rows(m, (batch, grid_h, grid_w), (phase_h, phase_w), (stride_h, stride_w),
                            (y_h, y_w, y_channels), ADJOINT, POOL)  # fmt: skip
        _store_output(acc_r, target, bias_ptr, rows, column, n_ok, HAS_BIAS, RELU, POOL, WRITE_MAP)
        if FORM != "dense":
            _store_output(acc_i, target, bias_ptr, rows, column + spread, n_ok, HAS_BIAS, RELU, POOL, WRITE_MAP)
            _store_output(acc_j, target, bias_ptr, rows, column + 2 * spread, n_ok, HAS_BIAS, RELU, POOL, WRITE_MAP)
            _store_output(acc_k, target, bias_ptr, rows, column + 3 * spread, n_ok, HAS_BIAS, RELU, POOL, WRITE_MAP)


@triton.jit(do_not_specialize=["batch", "y_h", "y_w", "grid_h", "grid_w", "tiles_n", "splits"])
def _hamilton_finish_kernel(
    partial_ptr, bias_ptr, y_ptr, pooled_ptr, code_ptr,
    batch, y_h, y_w, grid_h, grid_w, stride_h, stride_w, channels, tiles_n, splits,
    ADJOINT: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr, POOL: tl.constexpr, WRITE_MAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = epilogue(sum over splits of `partial`), in their order. One program owns BLOCK_M pixels of a class, BLOCK_N
    channels.
    """
    phase = tl.program_id(1)
    m = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_of_class = batch * grid_h * grid_w * (4 if POOL else 1)
    mask = (m < rows_of_class)[:, None] & (n < channels)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for split in range(splits):
        part = tl.cast(split * tl.num_programs(1) + phase, tl.int64) * rows_of_class + m
        acc += tl.load(partial_ptr + part[:, None] * channels + n[None, :], mask=mask, other=0.0)
    rows = _output_rows(m, (batch, grid_h, grid_w), (phase // stride_w, phase % stride_w), (stride_h, stride_w),
                        (y_h, y_w, channels), ADJOINT, POOL)  # fmt: skip
    _store_output(acc, (y_ptr, pooled_ptr, code_ptr), bias_ptr, rows, n, n < channels, HAS_BIAS, RELU, POOL, WRITE_MAP)


@triton.jit
def _pixel_pairs(m, place, window, SOURCE: tl.constexpr):
    """The rows of the output's pixels m, and of the input's pixels under the tap."""
    batch, y_h, y_w, x_h, x_w, y_channels, x_channels = place
    stride_h, stride_w, shift_h, shift_w = window
    b, h, w, ok = _pixels(m[:, None], y_h, y_w, batch, False)
    rows = _source_rows(b, h, w, ok, y_h, y_w, y_channels, SOURCE)
    return rows, _source_rows(b, h * stride_h + shift_h, w * stride_w + shift_w, ok, x_h, x_w, x_channels, "map")


@triton.jit
def _four_weight_products(acc, x, y, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + x^T y, component by component; each tile is transposed just before it is used, or float32 spills."""
    acc_r = _dot(tl.trans(x[0]), y[0], acc[0], PRECISION, UPCAST)
    acc_i = _dot(tl.trans(x[1]), y[1], acc[1], PRECISION, UPCAST)
    acc_j = _dot(tl.trans(x[2]), y[2], acc[2], PRECISION, UPCAST)
    acc_k = _dot(tl.trans(x[3]), y[3], acc[3], PRECISION, UPCAST)
    return acc_r, acc_i, acc_j, acc_k


@triton.jit
def _q16_weight_products(acc, x, y, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + the 16 products of algebra.SIGNS in dw: dw_b is the sum over c of SIGNS[b ^ c][c] x_c^T y_(b ^ c)."""
    acc_r, acc_i, acc_j, acc_k = acc
    xr, xi, xj, xk = tl.trans(x[0]), tl.trans(x[1]), tl.trans(x[2]), tl.trans(x[3])
    yr, yi, yj, yk = y
    ni, nj, nk = _negated(xi), _negated(xj), _negated(xk)
    acc_r = _dot(xr, yr, acc_r, PRECISION, UPCAST)
    acc_r = _dot(xi, yi, acc_r, PRECISION, UPCAST)
    acc_r = _dot(xj, yj, acc_r, PRECISION, UPCAST)
    acc_r = _dot(xk, yk, acc_r, PRECISION, UPCAST)
    acc_i = _dot(xr, yi, acc_i, PRECISION, UPCAST)
    acc_i = _dot(ni, yr, acc_i, PRECISION, UPCAST)
    acc_i = _dot(xj, yk, acc_i, PRECISION, UPCAST)
    acc_i = _dot(nk, yj, acc_i, PRECISION, UPCAST)
    acc_j = _dot(xr, yj, acc_j, PRECISION, UPCAST)
    acc_j = _dot(ni, yk, acc_j, PRECISION, UPCAST)
    acc_j = _dot(nj, yr, acc_j, PRECISION, UPCAST)
    acc_j = _dot(xk, yi, acc_j, PRECISION, UPCAST)
    acc_k = _dot(xr, yk, acc_k, PRECISION, UPCAST)
    acc_k = _dot(xi, yj, acc_k, PRECISION, UPCAST)
    acc_k = _dot(nj, yi, acc_k, PRECISION, UPCAST)
    acc_k = _dot(nk, yr, acc_k, PRECISION, UPCAST)
    return acc_r, acc_i, acc_j, acc_k


@triton.jit(do_not_specialize=["batch", "y_h", "y_w", "x_h", "x_w", "tiles_p", "tiles_q", "splits"])
def _hamilton_conv_dw_kernel(
    map_ptr, gate_ptr, pooled_ptr, code_ptr, x_ptr, dw_ptr, db_ptr,
    batch, y_h, y_w, x_h, x_w, groups, P, Q, tiles_p, tiles_q, splits,
    taps, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    stride_ds, stride_dc, stride_dt, stride_dg, stride_dp, stride_dq,
    FORM: tl.constexpr, SOURCE: tl.constexpr, FLAT: tl.constexpr, EVEN_P: tl.constexpr, EVEN_Q: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """dw = sum over pixels of source (x) conj(x under the tap), db = sum over pixels of the source.

    One program owns BLOCK_P channels of the output, BLOCK_Q of the input, one tap, one group and one of `splits`
    ranges of pixels, in steps of BLOCK_M; FLAT: BLOCK_Q (tap, channel) pairs. P and Q count quaternion channels of a
    group, for "dense" real ones. Where there is a bias, the first column of programs sums the source alone. With
    several splits, and for "dense" always, dw_ptr and db_ptr are float32 parts for `_hamilton_finish_dw_kernel`; else
    the gradients themselves.

    "q8": dw = A^T [(B x) * (C^T dy)], as -2 (-H z / 8 + plain products); half of 1/4 goes to each operand.
    """
    group = tl.program_id(1)
    split = tl.program_id(2)
    tile_p = tl.program_id(0) % tiles_p
    tile_q = tl.program_id(0) // tiles_p - (1 if HAS_BIAS else 0)
    parts: tl.constexpr = 1 if FORM == "dense" else 4
    p = tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
    p_ok = (p < P) | EVEN_P
    size_p, size_q = groups * P * parts // 4, groups * Q * parts // 4
    p_channels = _planar(p, P // 4, group, groups) if FORM == "dense" else group * P + p
    p_columns, p_columns_ok = p_channels[None, :], p_ok[None, :]
    source = (map_ptr, gate_ptr, pooled_ptr, code_ptr)
    x_source = (x_ptr, x_ptr, x_ptr, x_ptr)
    place = (batch, y_h, y_w, x_h, x_w, 4 * size_p, 4 * size_q)
    pixels = tl.arange(0, BLOCK_M)
    steps = tl.cdiv(batch * y_h * y_w, BLOCK_M)
    first_step, last_step = split * steps // splits, (split + 1) * steps // splits
    dw_ptr += tl.cast(split, tl.int64) * stride_ds

    if HAS_BIAS:  # noqa: SIM102 (the inner condition is one of the GPU's)
        if tile_q < 0:
            db_r = tl.zeros((BLOCK_P,), tl.float32)
            db_i, db_j, db_k = db_r, db_r, db_r
            for step in range(first_step, last_step):
                rows, _ = _pixel_pairs(step * BLOCK_M + pixels, place, (1, 1, 0, 0), SOURCE)
                if FORM == "dense":
                    db_r += tl.sum(_load(source, rows, p_columns, p_columns_ok, SOURCE, "ieee").to(tl.float32), 0)
                else:
                    yr, yi, yj, yk = _load_quaternions(source, rows, p_columns, p_columns_ok, size_p, SOURCE, "ieee")
                    db_r += tl.sum(yr.to(tl.float32), 0)
                    db_i += tl.sum(yi.to(tl.float32), 0)
                    db_j += tl.sum(yj.to(tl.float32), 0)
                    db_k += tl.sum(yk.to(tl.float32), 0)
            at = db_ptr + split * 4 * size_p + p_channels
            tl.store(at, db_r.to(db_ptr.dtype.element_ty), mask=p_ok)
            if FORM != "dense":
                tl.store(at + size_p, db_i.to(db_ptr.dtype.element_ty), mask=p_ok)
                tl.store(at + 2 * size_p, db_j.to(db_ptr.dtype.element_ty), mask=p_ok)
                tl.store(at + 3 * size_p, db_k.to(db_ptr.dtype.element_ty), mask=p_ok)
            return
    tl.assume(first_step < last_step)

    if FLAT:
        e = tile_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
        tap, q = e // Q, e % Q
        q_ok = tap < taps
        columns = _planar(q, Q // 4, group, groups)[None, :]
        u, v = (tap // kernel_w)[None, :], (tap % kernel_w)[None, :]
    else:
        tap = tile_q // tiles_q
        q = tile_q % tiles_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
        q_ok = (q < Q) | EVEN_Q
        columns = (q if FORM == "dense" else group * Q + q)[None, :]
        u, v = tap // kernel_w, tap % kernel_w
    window = (stride_h, stride_w, u * dilation_h - padding_h, v * dilation_w - padding_w)
    dw_at = dw_ptr + group * stride_dg + (tap * stride_dt + q * stride_dq)[:, None] + p[None, :] * stride_dp
    dw_ok = q_ok[:, None] & p_ok[None, :]
    acc_r = tl.zeros((BLOCK_Q, BLOCK_P), tl.float32)
    if FORM == "dense":
        for step in range(first_step, last_step):
            rows, x_rows = _pixel_pairs(step * BLOCK_M + pixels, place, window, SOURCE)
            x = tl.trans(_load(x_source, x_rows, columns, q_ok[None, :], "map", PRECISION))
            dy = _load(source, rows, p_columns, p_columns_ok, SOURCE, PRECISION)
            acc_r = _dot(x, dy, acc_r, PRECISION, UPCAST)
        tl.store(dw_at, acc_r, mask=dw_ok)
    else:
        acc_i, acc_j, acc_k = acc_r, acc_r, acc_r
        for step in range(first_step, last_step):
            rows, x_rows = _pixel_pairs(step * BLOCK_M + pixels, place, window, SOURCE)
            x = _load_quaternions(x_source, x_rows, columns, q_ok[None, :], size_q, "map", PRECISION)
            y = _load_quaternions(source, rows, p_columns, p_columns_ok, size_p, SOURCE, PRECISION)
            acc = (acc_r, acc_i, acc_j, acc_k)
            if FORM == "q16":
                acc_r, acc_i, acc_j, acc_k = _q16_weight_products(acc, x, y, PRECISION, UPCAST)
            else:
                h = _hadamard_operands(x, 0.5, PRECISION)
                g = _hadamard_operands((_negated(y[0]), y[1], y[2], y[3]), 0.5, PRECISION)
                acc_r, acc_i, acc_j, acc_k = _four_weight_products(acc, h, g, PRECISION, UPCAST)
        if FORM == "q8":
            acc_r, acc_i, acc_j, acc_k = _hadamard(-0.5 * acc_r, -0.5 * acc_i, -0.5 * acc_j, -0.5 * acc_k)
            acc_r = -acc_r
            for step in range(first_step, last_step):
                rows, x_rows = _pixel_pairs(step * BLOCK_M + pixels, place, window, SOURCE)
                xr, xi, xj, xk = _load_quaternions(x_source, x_rows, columns, q_ok[None, :], size_q, "map", PRECISION)
                y = _load_quaternions(source, rows, p_columns, p_columns_ok, size_p, SOURCE, PRECISION)
                acc, x = (acc_r, acc_k, acc_i, acc_j), (xr, xj, xk, xi)
                acc_r, acc_k, acc_i, acc_j = _four_weight_products(acc, x, y, PRECISION, UPCAST)
            acc_r, acc_i, acc_j, acc_k = 2 * acc_r, -2 * acc_i, -2 * acc_j, -2 * acc_k
        dtype = dw_ptr.dtype.element_ty
        tl.store(dw_at, acc_r.to(dtype), mask=dw_ok)
        tl.store(dw_at + stride_dc, acc_i.to(dtype), mask=dw_ok)
        tl.store(dw_at + 2 * stride_dc, acc_j.to(dtype), mask=dw_ok)
        tl.store(dw_at + 3 * stride_dc, acc_k.to(dtype), mask=dw_ok)


@triton.jit(do_not_specialize=["splits"])
def _hamilton_finish_dw_kernel(
    dw_partial_ptr, db_partial_ptr, dw_ptr, db_ptr, groups, taps, P, Q, splits,
    FORM: tl.constexpr, NEGATIVE: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dw `[4, groups P, Q, taps]` and db `[4 groups P]`, the parts summed in their order.

    Parts of dw are `[split, 4, tap, groups P, Q]`, or for "dense" those of the real weight, `[split, tap, group, 4 P,
    4 Q]`: dw_b is the sum over c of SIGNS[b ^ c][c] times block (b ^ c, c). One program owns BLOCK elements of dw in
    the order of its parts; the last ones own those of db.
    """
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = 4 * taps * groups * P * Q
    q, p, tap, b = e % Q, e // Q % (groups * P), e // (groups * P * Q) % taps, e // (taps * groups * P * Q)
    dw = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        if FORM == "dense":
            group_ptr = (
                dw_partial_ptr
                + tl.cast(split, tl.int64) * (4 * count)
                + (tap * groups + p // P).to(tl.int64) * (16 * P * Q)
            )
            for c in tl.static_range(4):
                a = b ^ c
                sign = 1 - 2 * ((NEGATIVE >> (4 * a + c)) & 1)
                dw += sign * tl.load(group_ptr + (a * P + p % P) * (4 * Q) + c * Q + q, mask=e < count, other=0.0)
        else:
            dw += tl.load(dw_partial_ptr + tl.cast(split, tl.int64) * count + e, mask=e < count, other=0.0)
    tl.store(
        dw_ptr + (b * groups * P + p).to(tl.int64) * Q * taps + q * taps + tap,
        dw.to(dw_ptr.dtype.element_ty),
        mask=e < count,
    )
    if HAS_BIAS:
        channels = 4 * groups * P
        n = e - tl.cdiv(count, BLOCK) * BLOCK
        mask = (n >= 0) & (n < channels)
        db = tl.zeros((BLOCK,), tl.float32)
        for split in range(splits):
            db += tl.load(db_partial_ptr + split * channels + n, mask=mask, other=0.0)
        tl.store(db_ptr + n, db.to(db_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _hamilton_pack_kernel(
    w_ptr, out_ptr, groups, taps, kernel_w, P, Q, stride_wc, stride_wp, stride_wq, stride_wh, stride_ww,
    FORM: tl.constexpr, NEGATIVE: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weight `[4, groups P, Q, kh, kw]` as `_hamilton_conv_kernel` reads it, in the same type (rounded to tf32).

    "q16": the components, `[4, tap, groups P, Q]`. "q8": [H w; -2 w in algebra.WEIGHT_ORDER], `[8, tap, groups P, Q]`.
    "dense": the expanded weight, `[tap, group, 4 P, 4 Q]`. One program owns BLOCK quaternions.
    """
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = taps * groups * P * Q
    ok = e < count
    q, p, tap = e % Q, e // Q % (groups * P), e // (groups * P * Q)
    at = w_ptr + p.to(tl.int64) * stride_wp + q * stride_wq + tap // kernel_w * stride_wh + tap % kernel_w * stride_ww
    if FORM == "dense":
        block_ptr = out_ptr + (tap * groups + p // P).to(tl.int64) * (16 * P * Q)
        for b in tl.static_range(4):
            w = _rounded(tl.load(at + b * stride_wc, mask=ok, other=0.0), PRECISION)
            for c in tl.static_range(4):
                value = _negated(w) if (NEGATIVE >> (4 * (b ^ c) + c)) & 1 else w
                tl.store(block_ptr + ((b ^ c) * P + p % P) * (4 * Q) + c * Q + q, value, mask=ok)
    else:
        r = tl.load(at, mask=ok, other=0.0)
        i = tl.load(at + stride_wc, mask=ok, other=0.0)
        j = tl.load(at + 2 * stride_wc, mask=ok, other=0.0)
        k = tl.load(at + 3 * stride_wc, mask=ok, other=0.0)
        out = out_ptr + e
        if FORM == "q8":
            h0, h1, h2, h3 = _hadamard_operands((r, i, j, k), 1.0, PRECISION)
            tl.store(out, h0, mask=ok)
            tl.store(out + count, h1, mask=ok)
            tl.store(out + 2 * count, h2, mask=ok)
            tl.store(out + 3 * count, h3, mask=ok)
            out += 4 * count
            r, i, j, k = -2 * r.to(tl.float32), -2 * k.to(tl.float32), -2 * i.to(tl.float32), -2 * j.to(tl.float32)
        dtype = out_ptr.dtype.element_ty
        tl.store(out, _rounded(r.to(dtype), PRECISION), mask=ok)
        tl.store(out + count, _rounded(i.to(dtype), PRECISION), mask=ok)
        tl.store(out + 2 * count, _rounded(j.to(dtype), PRECISION), mask=ok)
        tl.store(out + 3 * count, _rounded(k.to(dtype), PRECISION), mask=ok)
