"""Runs the Gram cosine's kernels: plain tensors in and out."""

from typing import Any

import torch
from torch import Tensor

from qkernels.ops import _launch
from qkernels.ops._strides import Axis, merged, two_levels
from qkernels.ops.gram_cosine import config, kernels
from qkernels.ops.gram_cosine.config import Plan
from qkernels.ops.gram_cosine.kernels import Axes, Matrix, Meta
from qkernels.runtime.device import INTERPRETED, arch_of, device_of, multiprocessors_of

# Precision of float32 operands, whatever PyTorch's switches: the gradient is a small difference.
PRECISION = "tf32x3"
# The maximum: by itself ptxas stops at 72 or 128 and spills 8 bytes of centred features and of the last sums.
REGISTERS = 255


def forward(
    a: Tensor,
    b: Tensor,
    b_stats: Tensor | None,
    triangles: bool,
    gram: str,
    centred: bool,
    beta: float,
    mean: bool,
    both: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `op.gram_cosine`."""
    a, b = _same_type(a, b, triangles)
    items, rows, columns = _sizes(a, gram)
    size = config.workspace_size(rows, columns, items, triangles, both, arch_of(a))
    shapes: tuple[tuple[int, ...], ...] = ((items,), (), (2, items), (2, items), size)
    cosine, loss, stats_a, stats_b, workspace = [_launch.float32(a, *shape) for shape in shapes]
    if items == 0:
        loss.fill_(torch.nan if mean else 0.0)
        return cosine, loss, stats_a, stats_b, workspace
    plan = _plan(a, gram, triangles, centred)
    matrices, axes = _view([a] if triangles else [a, b], gram, triangles)
    if centred:
        matrices = [_centred(x, gram) for x in matrices]
    tile, pairs = plan.forward, config.pairs_of(axes.M, plan.block)
    meta = _meta(plan, axes, a, triangles, centred, plan.block, tile.k, ONE_BLOCK=pairs == 1)
    operands: dict[str, Any] = {"a": matrices[0], "b": matrices[-1], "axes": axes, "pairs": pairs, "META": meta}
    results: dict[str, Any] = {"cosine_ptr": cosine, "loss_ptr": loss, "stats_a_ptr": stats_a, "stats_b_ptr": stats_b}
    results |= {"items": items, "weight": beta / items if mean else beta, "pairs": pairs}
    results |= {"b_stats_ptr": b_stats if triangles or plan.mode == "dual" else None}
    settings = (tile.warps, tile.stages, REGISTERS if centred else 0)
    with device_of(a):
        if plan.mode == "stored":
            results |= {"triangles_ptr": b if triangles else None, "difference_ptr": workspace, "BOTH": both}
            _stored(plan, operands, results, 1 if triangles else 2, settings)
        else:
            operands["b"] = _items(b) if triangles else operands["b"]
            _squared(plan, operands, results, triangles, settings)
    return cosine, loss, stats_a, stats_b, workspace


def _stored(
    plan: Plan, operands: dict[str, Any], results: dict[str, Any], matrices: int, settings: tuple[int, int, int]
) -> None:
    """Parts of one or two Gram matrices in memory, then everything that is computed from them: two launches."""
    like, M = results["cosine_ptr"], operands["axes"].M
    items, pairs, block = results["items"], results["pairs"], plan.block
    parts = {
        "gram_ptr": _launch.float32(like, matrices, items, pairs, plan.splits, block, block),
        "exponent_ptr": _launch.float32(like, matrices, items, pairs, plan.splits),
        "ticket_ptr": like.new_empty((), dtype=torch.int32),
        "splits": plan.splits,
    }
    grid = (items, matrices * pairs, plan.splits)
    _launch.run(kernels._gram_kernel, grid, operands | parts | {"items": items}, *settings)
    blocks = {"M": M, "BLOCKS": -(-M // block), "BLOCK_M": block}
    _launch.run(kernels._gram_finish_kernel, (items,), results | parts | blocks, 16 if block > 16 else 4)


def _squared(
    plan: Plan, operands: dict[str, Any], results: dict[str, Any], triangles: bool, settings: tuple[int, int, int]
) -> None:
    """Sums of squares of each program's products, then the cosines: two launches."""
    items, pairs, dual = results["items"], results["pairs"], plan.mode == "dual"
    programs = products = pairs
    if dual:
        products = (-(-operands["axes"].M // plan.block)) ** 2
        programs = products + (2 * pairs if results["b_stats_ptr"] is None else pairs)
    partial = _launch.float32(results["cosine_ptr"], items, programs, 6)
    operands["partial_ptr"] = partial
    _launch.run(kernels._gram_squares_kernel, (items, programs), operands, *settings)
    results |= {
        "partial_ptr": partial,
        "programs": programs,
        "products": products,
        "TRIANGLES": triangles,
        "DUAL": dual,
    }
    results |= {"BLOCK_I": 16, "BLOCK_P": 64}
    _launch.run(kernels._gram_cosine_kernel, (1,), results, registers=REGISTERS)


def gradient(
    dcosine: Tensor | None,
    dloss: Tensor | None,
    incoming: Tensor | None,
    cosine: Tensor,
    a: Tensor,
    b: Tensor,
    stats_a: Tensor,
    stats_b: Tensor,
    workspace: Tensor,
    which: int,
    triangles: bool,
    gram: str,
    centred: bool,
    beta: float,
    mean: bool,
) -> Tensor:
    """As `op.gram_cosine_da`."""
    da = torch.empty_like(a)
    if da.numel() == 0:
        return da
    items, *_ = _sizes(a, gram)
    like, b = _same_type(a, b, triangles)
    plan, registers = _plan(like, gram, triangles, centred), REGISTERS if centred else 0
    centred = centred and plan.mode != "stored"  # whose D needs no means
    operands = [like, *([] if triangles else [b]), *([] if incoming is None else [incoming]), da]
    matrices, axes = _view(operands, gram, triangles)
    if centred:
        matrices[: 1 if triangles else 2] = [_centred(x, gram) for x in matrices[: 1 if triangles else 2]]
    other = _items(workspace[which]) if plan.mode == "stored" else _items(b) if triangles else matrices[1]
    tile, out = plan.backward, matrices[-1]
    blocks = {"BLOCK": plan.block, "WHOLE": tile.n >= axes.M, "BLOCK_N": tile.n, "BLOCK_C": tile.c}
    blocks |= {"EVEN_N": axes.M % tile.n == 0, "EVEN_C": axes.K % tile.c == 0}
    arguments: dict[str, Any] = {"a": matrices[0], "b": other, "da": out, "axes": axes, "items": items}
    arguments |= {"incoming": None if incoming is None else matrices[-2], "splits": plan.column_splits}
    arguments |= {"cosine_ptr": cosine, "stats_a_ptr": stats_a, "stats_b_ptr": stats_b, "dloss_ptr": dloss}
    arguments |= {"dcosine_ptr": None if dcosine is None else dcosine.contiguous()}
    arguments |= {"weight": beta / items if mean else beta}
    arguments |= {"META": _meta(plan, axes, like, triangles, centred, tile.m, tile.k, **blocks)}
    grid = (items, -(-axes.M // tile.m), plan.column_splits)
    with device_of(a):
        _launch.run(kernels._gram_backward_kernel, grid, arguments, tile.warps, tile.stages, registers)
    return da if out.ptr is da else da.copy_(out.ptr)


def _meta(
    plan: Plan, axes: Axes, like: Tensor, triangles: bool, centred: bool, block_m: int, block_k: int, **more: Any
) -> Meta:
    return Meta(
        MODE=plan.mode,
        TRIANGLES=triangles,
        CENTRED=centred,
        CHECKED=like.dtype != torch.float16,
        EXACT=like.dtype == torch.float32 or (centred and plan.mode == "dual"),
        UPCAST=INTERPRETED and like.dtype == torch.bfloat16,
        PRECISION=PRECISION,
        WIDE_M=axes.m_width < axes.M,
        WIDE_K=axes.k_width < axes.K,
        EVEN_M=axes.M % block_m == 0,
        EVEN_K=axes.K % block_k == 0,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        **more,
    )


def _sizes(a: Tensor, gram: str) -> tuple[int, int, int]:
    return config.sizes(gram, a.shape[0], a.shape[1], a.shape[2:].numel())


def _plan(a: Tensor, gram: str, triangles: bool, centred: bool) -> Plan:
    half = a.element_size() == 2 and not centred
    return config.plan(*_sizes(a, gram), half, arch_of(a), multiprocessors_of(a), triangles)


def _same_type(a: Tensor, b: Tensor, triangles: bool) -> tuple[Tensor, Tensor]:
    if triangles:
        return a, b.contiguous()
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def _centred(x: Matrix, gram: str) -> Matrix:
    """With the means over the rows, `[item, column]`."""
    features = x.ptr.flatten(2) if x.ptr.dim() > 2 else x.ptr[..., None]
    mean = features.mean({"channel": 1, "position": 2, "batch": 0}[gram], dtype=torch.float32)
    return x._replace(mean_ptr=mean.contiguous())


def _items(x: Tensor) -> Matrix:
    """A tensor that is no matrix [m, k]: its elements of each item are contiguous."""
    return Matrix(x, x, x.shape[1:].numel(), 0, 0, 0, 0)


def _view(tensors: list[Tensor], gram: str, triangles: bool) -> tuple[list[Matrix], Axes]:
    """Tensors of one shape as matrices [m, k]; all are copied if one has more than two strides along an axis."""
    _, rows, columns = _sizes(tensors[0], gram)
    dual = config.mode_of(rows, columns, triangles) == "dual"
    # Maps in NHWC are one dense row of features if positions come first, those in NCHW if channels do.
    orders = (False, True) if gram == "batch" else (False,)
    axes = min((_axes(tensors, gram, dual, order) for order in orders), key=_levels)
    if _levels(axes) > 2:
        tensors = [x.contiguous() for x in tensors]
        axes = _axes(tensors, gram, dual, True)
    items, m, k = ([two_levels(axis) for axis in by_tensor] for by_tensor in axes)
    matrices = [
        Matrix(x, x, item[1][1] if dims else 0, *(stride for _, stride in (*of_m, *of_k)))
        for x, dims, item, of_m, of_k in zip(tensors, axes[0], items, m, k, strict=True)
    ]
    (outer_m, width_m), (outer_k, width_k) = ([size for size, _ in levels[0]] for levels in (m, k))
    return matrices, Axes(outer_m * width_m, outer_k * width_k, width_m, width_k)


def _axes(tensors: list[Tensor], gram: str, dual: bool, channels_first: bool) -> list[list[Axis]]:
    """Dimensions of the item, of m and of k, for every tensor, as few as fit all of them."""
    by_tensor = []
    for x in tensors:
        sample, channel, *spatial = zip(x.shape, x.stride(), strict=True)
        rows, columns = [channel], list(spatial)
        item: Axis = [sample]
        if gram == "position":
            rows, columns = columns, rows
        elif gram == "batch":
            item, rows = [], [sample]
            columns = [channel, *spatial] if channels_first else [*spatial, channel]
        by_tensor.append((item, columns, rows) if dual else (item, rows, columns))
    return [merged([axes[number] for axes in by_tensor]) for number in range(3)]


def _levels(axes: list[list[Axis]]) -> int:
    return max(len(axis[0]) for axis in axes)
