"""Plans and launches the convolution's kernels: plain tensors in and out, the counterpart of forms.py.

Every map becomes dense NHWC (`torch.channels_last`) before it is read, and every result is. Besides its results each
call allocates the weight as its form reads it (q16 without tf32 reads that of a 1x1 kernel in place) and,
where several programs share a sum, the parts in float32.
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
from qkernels.ops._library import relu_mask
from qkernels.ops.hamilton_conv import config, kernels
from qkernels.ops.hamilton_conv.config import Plan, Problem
from qkernels.ops.hamilton_conv.reference import conv_output_size

Ints = Sequence[int]
NEGATIVE = sum(1 << (4 * a + c) for a in range(4) for c in range(4) if algebra.SIGNS[a][c] < 0)
ELEMENTWISE_BLOCK = 256
# Pixels are counted in 32 bits, up to the end of the last tile.
MOST_PIXELS = 2**31 - 1024


class Source(NamedTuple):
    """What is gathered: a map, or the gradient in front of a ReLU and a 2x2 pool (kernels.py)."""

    map: Tensor | None
    gate: Tensor | None = None
    pooled: Tensor | None = None
    code: Tensor | None = None

    @property
    def kind(self) -> str:
        if self.map is None:
            return "pool"
        return ("map" if self.gate is None else "relu") + ("" if self.pooled is None else "+pool")

    @property
    def any(self) -> Tensor:
        tensor = self.pooled if self.map is None else self.map
        assert tensor is not None
        return tensor

    def whole(self, size: Ints) -> "Source":
        """The same as one map of `size`, put together by PyTorch."""
        if self.kind == "map":
            return self
        total = None if self.map is None else relu_mask(self.map, self.gate)
        if self.pooled is not None and self.code is not None:
            position = torch.arange(4, device=self.code.device).view(2, 1, 2)
            routed = self.pooled[:, :, :, None, :, None].where(self.code[:, :, :, None, :, None] == position, 0)
            routed = routed.flatten(4, 5).flatten(2, 3)
            routed = torch.nn.functional.pad(routed, (0, size[1] - routed.shape[3], 0, size[0] - routed.shape[2]))
            total = routed if total is None else total + routed
        return Source(total)


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution from maps of `x_size` to maps of `y_size`."""

    x_size: tuple[int, int]
    y_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: Ints
    padding: Ints
    dilation: Ints
    groups: int

    @classmethod
    def of(cls, x_size: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int) -> "Window":
        y_size = [conv_output_size(*sizes) for sizes in zip(x_size, kernel, stride, padding, dilation, strict=True)]
        return cls(
            (x_size[0], x_size[1]), (y_size[0], y_size[1]), (kernel[0], kernel[1]), stride, padding, dilation, groups
        )

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    relu: bool,
    form: str,
    *,
    kind: str = "conv",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y = weight (x) x + bias, behind a ReLU where asked for; of `dtype`, by default that of x."""
    window = Window.of(x.shape[2:], weight.shape[3:], stride, padding, dilation, groups)
    y = _map(x, 4 * weight.shape[1], window.y_size, dtype)
    _gather(Source(x), weight, bias, window, (y, None, None), relu=relu, form=form, kind=kind)
    return y


def forward_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    relu: bool,
    tap: bool,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The maxima of the 2x2 windows of y, their codes, and y itself (empty without `tap`)."""
    window = Window.of(x.shape[2:], weight.shape[3:], stride, padding, dilation, groups)
    channels = 4 * weight.shape[1]
    half = (window.y_size[0] // 2, window.y_size[1] // 2)
    pooled, code = _map(x, channels, half), _map(x, channels, half, torch.uint8)
    y = _map(x, channels, window.y_size) if tap else None
    _gather(Source(x), weight, bias, window, (y, pooled, code), relu=relu, form=form)
    return pooled, code, x.new_empty(0) if y is None else y


def data_gradient(
    source: Source,
    weight: Tensor,
    bias: Tensor | None,
    size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    form: str,
    *,
    kind: str = "conv",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """dx, the transposed convolution of the source onto maps of `size`, + bias."""
    window = Window.of(size, weight.shape[3:], stride, padding, dilation, groups)
    dx = _map(source.any, 4 * weight.shape[2] * groups, window.x_size, dtype)
    _gather(source, weight, bias, window, (dx, None, None), adjoint=True, form=form, kind=kind)
    return dx


def weight_gradient(
    source: Source,
    x: Tensor,
    kernel_size: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
    with_bias: bool,
    form: str,
    *,
    kind: str = "conv",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """dw `[4, P, Q/groups, kh, kw]` and db `[4 P]` (empty without `with_bias`)."""
    window = Window.of(x.shape[2:], kernel_size, stride, padding, dilation, groups)
    batch, p, q = x.shape[0], source.any.shape[1] // (4 * groups), x.shape[1] // (4 * groups)
    dtype = dtype or x.dtype
    dw = x.new_empty(4, p * groups, q, *kernel_size, dtype=dtype)
    db = x.new_empty(4 * p * groups if with_bias else 0, dtype=dtype)
    pixels = batch * math.prod(window.y_size)
    if pixels == 0:
        return dw.zero_(), db.zero_()
    _check_pixels(pixels)
    problem = Problem("dw", pixels, p, q, window.taps, groups)
    plan, source = _plan(problem, source, (p * groups, q, window.taps), window.y_size, form, kind)
    tile, dense = plan.tile, plan.form == "dense"
    parts = dense or plan.splits > 1
    factor = 4 if dense else 1
    flat = problem.flat(plan.form, tile)
    shape: tuple[int, ...] = ()
    if dense:
        shape = (plan.splits, window.taps, groups, 4 * p, 4 * q)
        stride_s, stride_t, stride_g, stride_p, stride_q = _strides(shape)
        stride_c = 0
    elif parts:
        shape = (plan.splits, 4, window.taps, groups, p, q)
        stride_s, stride_c, stride_t, stride_g, stride_p, stride_q = _strides(shape)
    else:
        stride_s, stride_c, stride_g, stride_p, stride_q, stride_t = _strides((1, 4, groups, p, q, window.taps))
    out = x.new_empty(shape, dtype=torch.float32) if parts else dw
    out_bias = x.new_empty(plan.splits * db.numel(), dtype=torch.float32) if parts else db
    tiles_p, tiles_q = _cdiv(factor * p, tile.n), _cdiv(factor * q, tile.m)
    columns = _cdiv(factor * q * window.taps, tile.m) if flat else tiles_q * window.taps
    pointers = _source_pointers(source)
    with _launch.device_of(x):
        _launch.run(
            kernels._hamilton_conv_dw_kernel,
            (tiles_p * (columns + with_bias), groups, plan.splits),
            {
                "map_ptr": pointers[0],
                "gate_ptr": pointers[1],
                "pooled_ptr": pointers[2],
                "code_ptr": pointers[3],
                "x_ptr": _nhwc(x),
                "dw_ptr": out,
                "db_ptr": out_bias if with_bias else out,
                "batch": batch,
                **dict(zip(("y_h", "y_w", "x_h", "x_w"), (*window.y_size, *window.x_size), strict=True)),
                "groups": groups,
                "P": factor * p,
                "Q": factor * q,
                "tiles_p": tiles_p,
                "tiles_q": tiles_q,
                "splits": plan.splits,
                "taps": window.taps,
                "kernel_w": window.kernel[1],
                **_geometry(window),
                "stride_ds": stride_s,
                "stride_dc": stride_c,
                "stride_dt": stride_t,
                "stride_dg": stride_g,
                "stride_dp": stride_p,
                "stride_dq": stride_q,
                "FORM": plan.form,
                "SOURCE": source.kind,
                "FLAT": flat,
                "EVEN_P": factor * p % tile.n == 0,
                "EVEN_Q": factor * q % tile.m == 0,
                "HAS_BIAS": with_bias,
                "PRECISION": _input_precision(plan),
                "UPCAST": _upcast(x),
                "BLOCK_M": tile.k,
                "BLOCK_P": tile.n,
                "BLOCK_Q": tile.m,
            },
            tile.warps,
            # Four maps at each stage are more than shared memory holds.
            min(tile.stages, 2) if "+" in source.kind else tile.stages,
        )
        if parts:
            block = ELEMENTWISE_BLOCK
            _launch.run(
                kernels._hamilton_finish_dw_kernel,
                (_cdiv(dw.numel(), block) + _cdiv(db.numel(), block),),
                {
                    "dw_partial_ptr": out,
                    "db_partial_ptr": out_bias if with_bias else out,
                    "dw_ptr": dw,
                    "db_ptr": db if with_bias else dw,
                    "groups": groups,
                    "taps": window.taps,
                    "P": p,
                    "Q": q,
                    "splits": plan.splits,
                    "FORM": plan.form,
                    "NEGATIVE": NEGATIVE,
                    "HAS_BIAS": with_bias,
                    "BLOCK": block,
                },
            )
    return dw, db


def _gather(
    source: Source,
    weight: Tensor,
    bias: Tensor | None,
    window: Window,
    target: tuple[Tensor | None, Tensor | None, Tensor | None],
    *,
    form: str,
    adjoint: bool = False,
    relu: bool = False,
    kind: str = "conv",
) -> None:
    """Fills `target` (map, maxima of its windows, their codes) with the convolution of the source, or its adjoint."""
    y, pooled, code = target
    pool = pooled is not None
    out = pooled if y is None else y
    assert out is not None
    if out.numel() == 0:
        return
    x = source.any
    groups, stride = window.groups, window.stride
    p, q = weight.shape[1] // groups, weight.shape[2]
    k, n = (p, q) if adjoint else (q, p)
    source_size, out_size = (window.y_size, window.x_size) if adjoint else (window.x_size, window.y_size)
    classes = math.prod(stride) if adjoint else 1
    if adjoint:
        grid = [_cdiv(size, step) for size, step in zip(out_size, stride, strict=True)]
    elif pool:
        grid = [size // 2 if y is None else _cdiv(size, 2) for size in out_size]
    else:
        grid = list(out_size)
    rows = out.shape[0] * math.prod(grid) * (4 if pool else 1)
    _check_pixels(rows)
    # The class with the fewest taps says how many programs can share a sum; one without any is filled with the bias.
    taps = _taps_of_classes(window) if classes > 1 else {window.taps}
    problem = Problem("gather", rows, n, k, min(taps - {0}), groups, classes)
    plan, source = _plan(problem, source, (*weight.shape[1:3], window.taps), source_size, form, kind)
    tile, dense, split = plan.tile, plan.form == "dense", plan.splits > 1
    factor = 4 if dense else 1
    w, (stride_c, stride_t, stride_g, stride_p, stride_q) = _packed(weight, plan, groups)
    partial = x.new_empty((plan.splits * classes * rows, out.shape[1]), dtype=torch.float32) if split else None
    steps = [s // math.gcd(s, d) if adjoint else 1 for s, d in zip(stride, window.dilation, strict=True)]
    tiles_n = _cdiv(factor * n, tile.n)
    pointers = _source_pointers(source)
    outputs: dict[str, Any] = {
        "bias_ptr": out if bias is None else bias.contiguous(),
        "y_ptr": out if y is None else y,
        "pooled_ptr": out if pooled is None else pooled,
        "code_ptr": out if code is None else code,
        "batch": out.shape[0],
        "y_h": out_size[0],
        "y_w": out_size[1],
        "grid_h": grid[0],
        "grid_w": grid[1],
        "splits": plan.splits,
    }
    epilogue = {
        "ADJOINT": adjoint,
        "HAS_BIAS": bias is not None,
        "RELU": relu,
        "POOL": pool,
        "WRITE_MAP": y is not None,
    }
    with _launch.device_of(x):
        _launch.run(
            kernels._hamilton_conv_kernel,
            (_cdiv(rows, tile.m) * tiles_n, groups * classes, plan.splits),
            {
                "map_ptr": pointers[0],
                "gate_ptr": pointers[1],
                "pooled_source_ptr": pointers[2],
                "code_source_ptr": pointers[3],
                "w_ptr": w,
                "partial_ptr": out if partial is None else partial,
                "source_h": source_size[0],
                "source_w": source_size[1],
                "groups": groups,
                "K": factor * k,
                "N": factor * n,
                "tiles_n": tiles_n,
                "kernel_h": window.kernel[0],
                "kernel_w": window.kernel[1],
                **_geometry(window),
                "step_h": steps[0],
                "step_w": steps[1],
                "stride_wc": stride_c,
                "stride_wt": stride_t,
                "stride_wg": stride_g,
                "stride_wk": stride_p if adjoint else stride_q,
                "stride_wn": stride_q if adjoint else stride_p,
                **outputs,
                **epilogue,
                "FORM": plan.form,
                "SOURCE": source.kind,
                "FLAT": problem.flat(plan.form, tile),
                "EVEN_K": factor * k % tile.k == 0,
                "EVEN_N": factor * n % tile.n == 0,
                "MAYBE_EMPTY": 0 in taps,
                "SPLIT": split,
                "PRECISION": _input_precision(plan),
                "UPCAST": _upcast(x),
                "BLOCK_M": tile.m,
                "BLOCK_N": tile.n,
                "BLOCK_K": tile.k,
            },
            tile.warps,
            # Four maps at each stage are more than shared memory holds.
            min(tile.stages, 2) if "+" in source.kind else tile.stages,
        )
        if partial is not None:
            block_m, block_n = 16, 64
            tiles_n = _cdiv(out.shape[1], block_n)
            _launch.run(
                kernels._hamilton_finish_kernel,
                (_cdiv(rows, block_m) * tiles_n, classes),
                {
                    "partial_ptr": partial,
                    "stride_h": stride[0],
                    "stride_w": stride[1],
                    "channels": out.shape[1],
                    "tiles_n": tiles_n,
                    **outputs,
                    **epilogue,
                    "BLOCK_M": block_m,
                    "BLOCK_N": block_n,
                },
            )


def _packed(weight: Tensor, plan: Plan, groups: int) -> tuple[Tensor, tuple[int, ...]]:
    """The weight as the kernel reads it, and its strides by component, tap, group, output and input channel."""
    _, rows, q, *kernel = weight.shape
    p, taps = rows // groups, math.prod(kernel)
    if plan.form == "q16" and taps == 1 and plan.precision != "tf32":
        stride_c, stride_p, stride_q, *_ = weight.stride()
        return weight, (stride_c, 0, p * stride_p, stride_p, stride_q)
    if plan.form == "dense":
        packed = weight.new_empty(taps, groups, 4 * p, 4 * q)
        strides = (0, *_strides(packed.shape))
    else:
        packed = weight.new_empty(8 if plan.form == "q8" else 4, taps, groups, p, q)
        strides = _strides(packed.shape)
    with _launch.device_of(weight):
        _launch.run(
            kernels._hamilton_pack_kernel,
            (_cdiv(taps * rows * q, ELEMENTWISE_BLOCK),),
            {
                "w_ptr": weight,
                "out_ptr": packed,
                "groups": groups,
                "taps": taps,
                "kernel_w": kernel[1],
                "P": p,
                "Q": q,
                **dict(
                    zip(("stride_wc", "stride_wp", "stride_wq", "stride_wh", "stride_ww"), weight.stride(), strict=True)
                ),
                "FORM": plan.form,
                "NEGATIVE": NEGATIVE,
                "PRECISION": plan.precision,
                "BLOCK": ELEMENTWISE_BLOCK,
            },
        )
    return packed, strides


def _plan(
    problem: Problem, source: Source, weight_size: tuple[int, int, int], source_size: Ints, form: str, kind: str
) -> tuple[Plan, Source]:
    """Form and launch settings, and the source as that form reads it."""
    x = source.any
    precision, arch = _launch.precision_of(x.dtype, kind), _launch.arch_of(x)
    if form == "auto":
        form = config.triton_form(*weight_size, precision, arch)
    plan = config.plan(problem, form, precision, arch, _launch.multiprocessors_of(x))
    if plan.form == "q8" and plan.precision != "ieee":
        # ptxas serialises products whose operands meet a gate between the two passes of q8 (C7513).
        source = source.whole(source_size)
    return plan, source


def _check_pixels(count: int) -> None:
    if count > MOST_PIXELS:
        raise ValueError(f"x must have at most {MOST_PIXELS} pixels over the batch on the Triton backend; got {count}")


def _taps_of_classes(window: Window) -> set[int]:
    """How many taps the classes of the adjoint's output have."""
    counts = []
    for kernel, stride, padding, dilation in zip(
        window.kernel, window.stride, window.padding, window.dilation, strict=True
    ):
        taps = range(kernel)
        counts.append(
            {sum((phase + padding - tap * dilation) % stride == 0 for tap in taps) for phase in range(stride)}
        )
    return {taps_h * taps_w for taps_h, taps_w in itertools.product(*counts)}


def _map(like: Tensor, channels: int, size: Ints, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(
        (like.shape[0], channels, *size),
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def _nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _source_pointers(source: Source) -> list[Tensor]:
    """Four maps for the kernel; one that its SOURCE does not read stands in for those that are absent."""
    maps = [None if tensor is None else _nhwc(tensor) for tensor in source]
    present = next(tensor for tensor in maps if tensor is not None)
    return [present if tensor is None else tensor for tensor in maps]


def _geometry(window: Window) -> dict[str, int]:
    names = ("stride", "padding", "dilation")
    return {f"{name}_{axis}": getattr(window, name)[index] for name in names for index, axis in enumerate("hw")}


def _input_precision(plan: Plan) -> str:
    return "ieee" if plan.precision == "half" else plan.precision


def _upcast(x: Tensor) -> bool:
    return _launch.INTERPRETED and x.dtype == torch.bfloat16


def _strides(shape: Ints) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
