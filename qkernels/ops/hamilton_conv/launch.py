"""Plans and launches the convolution's kernels: plain tensors in and out, the counterpart of forms.py.

Every map becomes dense NHWC (`torch.channels_last`) before it is read, and every result is. Besides its results a call
allocates the packed weight unless it gets one, for tf32 its rounded operands, and, if several programs share a sum, its
parts in float32.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkernels import algebra
from qkernels.ops import _launch
from qkernels.ops.hamilton_conv import config, kernels
from qkernels.ops.hamilton_conv.config import Plan, Problem
from qkernels.ops.hamilton_conv.reference import conv_output_size
from qkernels.runtime.device import INTERPRETED, arch_of, device_of, multiprocessors_of

Ints = Sequence[int]
# Signs of the definition and of its adjoint, as bits (kernels.py).
NEGATIVE = sum(1 << (4 * a + c) for a in range(4) for c in range(4) if algebra.SIGNS[a][c] < 0)
NEGATIVE_ADJOINT = sum(1 << (4 * a + c) for a in range(4) for c in range(4) if algebra.SIGNS[c][a] < 0)
ELEMENTWISE_BLOCK = 1024
# The maximum: by itself ptxas stops at 80 or 128 and spills 8 to 56 bytes of maxima and of random numbers.
REGISTERS = 255
# Pixels are counted in 32 bits, up to the end of the last tile.
MOST_PIXELS = 2**31 - 1024


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution from maps of `x_size` to maps of `y_size`."""

    x_size: tuple[int, int]
    y_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, x_size: Ints, kernel: Ints, window: Ints) -> "Window":
        """`window` holds stride, padding and dilation of both axes, and the groups: seven numbers."""
        stride, padding, dilation = ((window[i], window[i + 1]) for i in (0, 2, 4))
        y_size = conv_output_size(x_size, kernel, stride, padding, dilation)
        sizes = (x_size[0], x_size[1]), y_size, (kernel[0], kernel[1])
        return cls(*sizes, stride, padding, dilation, window[6])

    @property
    def positions(self) -> int:
        return math.prod(self.kernel)


class Epilogue(NamedTuple):
    """The operations on a sum before it is written, in this order.

    Attributes:
        bias: summand, `[channels]`.
        relu: whether a ReLU is applied.
        seed: seed of a dropout of probability 1 - 1 / scale, int64 `[1]`; random numbers are indexed by output element.
        scale: factor of the result.
        relu_output: output of a ReLU, of the result's shape; the result, its gradient, goes through its mask.
    """

    bias: Tensor | None = None
    relu: bool = False
    seed: Tensor | None = None
    scale: float = 1.0
    relu_output: Tensor | None = None


NO_EPILOGUE = Epilogue()


class Packed(NamedTuple):
    """A weight as the kernels read it: `[8 or 16, position, rows, Q]`, see `kernels._hamilton_pack_kernel`.

    `tickets` are `config.MOST_TICKETS` counters, zero before and after each launch of this weight's layer.
    """

    tiles: Tensor
    tickets: Tensor


def pack(weights: Sequence[Tensor], algorithms: Sequence[str], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The tiles of all weights in a row, for maps of `dtype`, and their tickets: one launch."""
    sizes = [config.packed_size(w.numel(), algorithm) for w, algorithm in zip(weights, algorithms, strict=True)]
    tickets = len(weights) * config.MOST_TICKETS
    tiles = weights[0].new_empty(sum(sizes), dtype=dtype)
    counters = weights[0].new_empty(tickets, dtype=torch.int32)
    dense = [_aligned(weight.contiguous()) for weight in weights]
    programs = sum(_cdiv(weight.numel() // 4, ELEMENTWISE_BLOCK) for weight in dense)
    with device_of(tiles):
        _launch.run(
            kernels._hamilton_pack_kernel,
            (max(programs, _cdiv(tickets, ELEMENTWISE_BLOCK)),),
            {
                "weights": tuple(
                    kernels.Unpacked(weight, weight.shape[1], weight.shape[2], math.prod(weight.shape[3:]))
                    for weight in dense
                ),
                "out_ptr": tiles,
                "ticket_ptr": counters,
                "tickets": tickets,
                "LAYOUTS": tuple((algorithm.startswith("q8"), algorithm.endswith("tf32")) for algorithm in algorithms),
                "BLOCK": ELEMENTWISE_BLOCK,
            },
        )
    return tiles, counters


def forward(
    x: Tensor,
    weight: Tensor,
    window: Ints,
    algorithm: str,
    epilogue: Epilogue = NO_EPILOGUE,
    packed: Packed | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y = epilogue(weight (x) x), of `dtype`, by default that of x; `algorithm` as in `config.algorithm_of`."""
    geometry = Window.of(x.shape[2:], weight.shape[3:], window)
    y = _map(x, 4 * weight.shape[1], geometry.y_size, dtype)
    _gather(x, weight, packed, geometry, (y, None, None), epilogue, algorithm)
    return y


def forward_pool(
    x: Tensor,
    weight: Tensor,
    window: Ints,
    algorithm: str,
    epilogue: Epilogue = NO_EPILOGUE,
    packed: Packed | None = None,
    return_map: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The maxima of the 2x2 windows of y, their argmax, and y itself (empty without `return_map`)."""
    geometry = Window.of(x.shape[2:], weight.shape[3:], window)
    channels = 4 * weight.shape[1]
    half = (geometry.y_size[0] // 2, geometry.y_size[1] // 2)
    pooled, argmax = _map(x, channels, half), _map(x, channels, half, torch.uint8)
    y = _map(x, channels, geometry.y_size) if return_map else None
    _gather(x, weight, packed, geometry, (y, pooled, argmax), epilogue, algorithm)
    return pooled, argmax, x.new_empty(0) if y is None else y


def data_gradient(
    dy: Tensor,
    weight: Tensor,
    size: Ints,
    window: Ints,
    algorithm: str,
    epilogue: Epilogue = NO_EPILOGUE,
    packed: Packed | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """dx, the transposed convolution of dy onto maps of `size`."""
    geometry = Window.of(size, weight.shape[3:], window)
    dx = _map(dy, 4 * weight.shape[2] * geometry.groups, geometry.x_size, dtype)
    _gather(dy, weight, packed, geometry, (dx, None, None), epilogue, algorithm, adjoint=True)
    return dx


def weight_gradient(
    dy: Tensor,
    x: Tensor,
    kernel_size: Ints,
    window: Ints,
    with_bias: bool,
    algorithm: str,
    *,
    scale: float = 1.0,
    tickets: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """dw `[4, P, Q/groups, kh, kw]` and db `[4 P]` (empty without `with_bias`), times `scale`, of `dtype`."""
    geometry = Window.of(x.shape[2:], kernel_size, window)
    groups = geometry.groups
    batch, p, q = x.shape[0], dy.shape[1] // (4 * groups), x.shape[1] // (4 * groups)
    dtype = dtype or x.dtype
    dw = x.new_empty(4, p * groups, q, *kernel_size, dtype=dtype)
    db = x.new_empty(4 * p * groups if with_bias else 0, dtype=dtype)
    pixels = batch * math.prod(geometry.y_size)
    if pixels == 0:
        return dw.zero_(), db.zero_()
    _check_pixels(pixels)
    problem = Problem("dw", pixels, p, q, geometry.positions, groups)
    plan = _plan(problem, algorithm, x)
    tile = plan.tile
    tiles_p, columns = _cdiv(p, tile.n), problem.blocks(plan.form, tile)
    grid = (tiles_p * (columns + with_bias), groups, plan.splits)
    kernel = kernels._hamilton_conv_dw_q8_kernel if plan.form == "q8" else kernels._hamilton_conv_dw_kernel
    options = {"NEGATIVE": NEGATIVE, "HAS_BIAS": with_bias, "SCALED": scale != 1}
    sizes = {"batch": batch, "groups": groups, "P": p, "Q": q, "tiles_p": tiles_p, "tiles_q": _cdiv(q, tile.k)}
    sizes |= zip(("y_h", "y_w", "x_h", "x_w"), (*geometry.y_size, *geometry.x_size), strict=True)
    with device_of(x):
        arguments: dict[str, Any] = {"dy_ptr": operand(dy, plan.precision), "x_ptr": operand(x, plan.precision)}
        arguments |= {"dw_ptr": dw, "db_ptr": db if with_bias else dw}
        arguments |= _shared(plan, grid, 4 * tile.n * tile.k, dw, tickets) | {"scale": scale}
        arguments |= sizes | {"META": _meta(problem, plan, x, geometry, **options)}
        _launch.run(kernel, grid, arguments, tile.warps, tile.stages)
    return dw, db


def epilogue_gradient(
    dy: Tensor | None,
    relu_output: Tensor | None,
    dpooled: Tensor | None,
    argmax: Tensor | None,
    size: Ints,
    scale: float,
    dtype: torch.dtype,
    precision: str = "ieee",
) -> Tensor:
    """The gradient in front of an epilogue, a map of `size`, of `dtype`, rounded to tf32 for that precision.

    scale [relu_output > 0] dy, plus dpooled at the pixels of the pool's maxima; either of both may be None.
    """
    like = dpooled if dy is None else dy
    assert like is not None
    out, block = _map(like, like.shape[1], size, dtype), ELEMENTWISE_BLOCK
    operands = {"dy_ptr": dy, "relu_ptr": relu_output, "dpooled_ptr": dpooled, "argmax_ptr": argmax}
    sizes = {"size_h": out.shape[2], "size_w": out.shape[3], "channels": out.shape[1], "count": out.numel()}
    with device_of(out):
        _launch.run(
            kernels._hamilton_gradient_kernel,
            (_cdiv(out.numel(), block),),
            {
                **{name: out if x is None else _dense(x) for name, x in operands.items()},
                **sizes,
                "out_ptr": out,
                "scale": scale,
                "HAS_DY": dy is not None,
                "MASKED": relu_output is not None,
                "POOLED": dpooled is not None,
                "SCALED": scale != 1,
                "PRECISION": precision,
                "BLOCK": block,
            },
        )
    return out


def operand(x: Tensor, precision: str) -> Tensor:
    """A map as the kernels read it: dense NHWC; for tf32 rounded to it, since tensor cores would truncate.

    It is not rounded as it is loaded: an operand in registers would not be copied to the tensor core asynchronously.
    """
    if precision != "tf32" or x.numel() == 0:
        return _dense(x)
    return epilogue_gradient(x, None, None, None, x.shape[2:], 1.0, x.dtype, precision)


def _dense(x: Tensor) -> Tensor:
    """A map in dense NHWC, aligned."""
    return _aligned(x.contiguous(memory_format=torch.channels_last))


def _aligned(x: Tensor) -> Tensor:
    """x at an address that is a multiple of 16 bytes.

    For memory that is not aligned (`bias[1:]`, odd slices) Triton compiles another binary, which would spill.
    """
    return x.clone() if x.storage_offset() * x.element_size() % 16 else x


def _gather(
    x: Tensor,
    weight: Tensor,
    packed: Packed | None,
    window: Window,
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    epilogue: Epilogue,
    algorithm: str,
    *,
    adjoint: bool = False,
) -> None:
    """Fills `outputs` (map, maxima of its windows, their argmax) with the convolution of x, or its adjoint."""
    y, pooled, argmax = outputs
    bias, relu, seed, scale, relu_output = epilogue
    pool = pooled is not None
    out = pooled if y is None else y
    assert out is not None
    if out.numel() == 0:
        return
    groups, stride = window.groups, window.stride
    p, q = weight.shape[1] // groups, weight.shape[2]
    k, n = (p, q) if adjoint else (q, p)
    x_size, y_size = (window.y_size, window.x_size) if adjoint else (window.x_size, window.y_size)
    phases = math.prod(stride) if adjoint else 1
    if adjoint:
        grid = [_cdiv(size, step) for size, step in zip(y_size, stride, strict=True)]
    elif pool:
        grid = [size // 2 if y is None else _cdiv(size, 2) for size in y_size]
    else:
        grid = list(y_size)
    rows = out.shape[0] * math.prod(grid) * (4 if pool else 1)
    _check_pixels(rows)
    # The phase with the fewest positions limits the number of splits; one without positions writes the bias.
    positions = _positions_of_phases(window) if phases > 1 else {window.positions}
    problem = Problem("gather", rows, n, k, min(positions - {0}), groups, phases, epilogue=pool or seed is not None)
    plan = _plan(problem, algorithm, x)
    tile = plan.tile
    if packed is None:
        packed = Packed(*pack([weight], [algorithm], x.dtype))
    tiles_n = _cdiv(n, tile.n)
    programs = (_cdiv(rows, tile.m) * tiles_n, groups * phases, plan.splits)
    step = [s // math.gcd(s, d) if adjoint else 1 for s, d in zip(stride, window.dilation, strict=True)]
    # Whole numbers: see kernels.py.
    delta = [-t * d // s if adjoint else d for t, d, s in zip(step, window.dilation, stride, strict=True)]
    # Maxima of tensor cores' products do not spill, but would take far more registers than they need.
    crowded = seed is not None or (pool and plan.precision == "ieee")
    kernel = kernels._hamilton_conv_q8_kernel if plan.form == "q8" else kernels._hamilton_conv_kernel
    sizes = {"batch": out.shape[0], "groups": groups, "K": k, "N": n, "tiles_n": tiles_n}
    sizes |= zip(("x_h", "x_w", "y_h", "y_w", "grid_h", "grid_w"), (*x_size, *y_size, *grid), strict=True)
    options = {
        "NEGATIVE": NEGATIVE_ADJOINT if adjoint else NEGATIVE,
        "STEP": (step[0], step[1]),
        "DELTA": (delta[0], delta[1]),
        "ADJOINT": adjoint,
        "MAYBE_EMPTY": 0 in positions,
        "HAS_BIAS": bias is not None,
        "RELU": relu,
        "POOL": pool,
        "WRITE_MAP": y is not None,
        "DROPOUT": seed is not None,
        "MASKED": relu_output is not None,
        # A mask of the sums themselves makes ptxas serialise the products (C7514); of scaled sums not.
        "SCALED": scale != 1 or relu_output is not None,
    }
    with device_of(x):
        output = kernels.Output(
            out if y is None else y,
            out if pooled is None else pooled,
            out if argmax is None else argmax,
            out if bias is None else _aligned(bias.contiguous()),
            out if relu_output is None else _dense(relu_output),
            out if seed is None else seed,
        )
        arguments: dict[str, Any] = {"x_ptr": operand(x, plan.precision), "output": output, "scale": scale}
        arguments |= {"weight": _weight_operand(packed.tiles, weight, window, adjoint, plan.precision)}
        arguments |= _shared(plan, programs, 4 * tile.m * tile.n, out, packed.tickets)
        arguments |= sizes | {"META": _meta(problem, plan, x, window, **options)}
        _launch.run(kernel, programs, arguments, tile.warps, tile.stages, REGISTERS if crowded else 0)


def _meta(problem: Problem, plan: Plan, x: Tensor, window: Window, **options: Any) -> kernels.Meta:
    """The constants of a product's kernel; `options` are those of its direction and epilogue."""
    tile, n, k = plan.tile, problem.n, problem.k
    return kernels.Meta(
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        FLAT=k if problem.flat(plan.form, tile) else 0,
        EVEN_K=k % tile.k == 0,
        EVEN_N=n % tile.n == 0,
        PRECISION="ieee" if plan.precision == "half" else plan.precision,
        UPCAST=INTERPRETED and x.dtype == torch.bfloat16,
        SPLIT=plan.splits > 1,
        KERNEL=window.kernel,
        STRIDE=window.stride,
        PADDING=window.padding,
        DILATION=window.dilation,
        **options,
    )


def _weight_operand(tiles: Tensor, weight: Tensor, window: Window, adjoint: bool, precision: str) -> kernels.Weight:
    _, rows, q, *_ = weight.shape
    count, p = window.positions * rows * q, rows // window.groups
    if adjoint and precision == "tf32":  # which has separate tiles, [position, Q, rows]
        return kernels.Weight(tiles.view(-1)[8 * count :], count, rows * q, p, 1, rows)
    k, n = (q, 1) if adjoint else (1, q)
    return kernels.Weight(tiles, count, rows * q, p * q, k, n)


def _shared(plan: Plan, grid: tuple[int, ...], size: int, like: Tensor, tickets: Tensor | None) -> dict[str, Any]:
    """Memory for parts of `size` elements and counters of arriving programs, if several share a sum."""
    if plan.splits == 1:
        return {"partial_ptr": like, "ticket_ptr": like, "splits": 1}
    assert grid[0] * grid[1] <= config.MOST_TICKETS
    if tickets is None:
        tickets = like.new_zeros(config.MOST_TICKETS, dtype=torch.int32)
    partial = _launch.float32(like, math.prod(grid) * size)
    return {"partial_ptr": partial, "ticket_ptr": tickets, "splits": plan.splits}


def _plan(problem: Problem, algorithm: str, x: Tensor) -> Plan:
    form, precision = algorithm.split("-")
    return config.plan(problem, form, precision, arch_of(x), multiprocessors_of(x))


def _check_pixels(count: int) -> None:
    if count > MOST_PIXELS:
        raise ValueError(f"x must have at most {MOST_PIXELS} pixels over the batch on the Triton backend; got {count}")


def _positions_of_phases(window: Window) -> set[int]:
    """The numbers of kernel positions that the phases of the adjoint's output have."""
    axes = zip(window.kernel, window.stride, window.padding, window.dilation, strict=True)
    counts = (
        {sum((phase + padding - u * dilation) % stride == 0 for u in range(kernel)) for phase in range(stride)}
        for kernel, stride, padding, dilation in axes
    )
    return {across * down for across, down in itertools.product(*counts)}


def _map(like: Tensor, channels: int, size: Ints, dtype: torch.dtype | None = None) -> Tensor:
    options: dict[str, Any] = {"dtype": dtype or like.dtype, "device": like.device}
    return torch.empty((like.shape[0], channels, *size), memory_format=torch.channels_last, **options)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
