"""Runs the Gram cosine's kernels: plain tensors in and out."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkernels.ops import _launch
from qkernels.ops.gram_cosine import config, kernels
from qkernels.ops.gram_cosine.config import Plan

# Of float32 operands, whatever PyTorch's switches: the gradient is a small difference.
PRECISION = "tf32x3"

Axis = list[tuple[int, int]]  # (size, stride) of dimensions, from the outermost one on


class View(NamedTuple):
    """Tensors of one shape as matrices [m, k] of items, each with its own strides.

    Attributes:
        tensors: those given, or copies of what no two strides an axis can reach.
        strides: of each: item; m outer, m inner; k outer, k inner.
        m, k: sizes.
        m_width, k_width: elements along the inner stride.
    """

    tensors: list[Tensor]
    strides: list[tuple[int, ...]]
    m: int
    k: int
    m_width: int
    k_width: int

    def named(self, index: int, name: str) -> dict[str, int]:
        """The strides as the kernels' arguments."""
        return {f"{name}_{key}": stride for key, stride in zip(STRIDES, self.strides[index], strict=True)}

    @property
    def axes(self) -> dict[str, Any]:
        """What all operands share, as the kernels' arguments."""
        return {
            "M": self.m,
            "K": self.k,
            "m_width": self.m_width,
            "k_width": self.k_width,
            "WIDE_M": self.m_width < self.m,
            "WIDE_K": self.k_width < self.k,
        }


STRIDES = ("item", "mo", "mi", "ko", "ki")


def forward(
    a: Tensor,
    b: Tensor,
    known: Tensor | None,
    packed: bool,
    gram: str,
    centred: bool,
    beta: float,
    mean: bool,
    both: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `op.gram_cosine`."""
    a, b = _same_type(a, b, packed)
    items, rows, columns = _sizes(a, gram)
    shape = config.workspace_size(rows, columns, items, packed, both, _launch.arch_of(a))
    cosine, loss, workspace, stats_a, stats_b = (
        _floats(a, *size) for size in ((items,), (), shape, (2, items), (2, items))
    )
    if items == 0:
        loss.fill_(torch.nan if mean else 0.0)
        return cosine, loss, stats_a, stats_b, workspace
    plan, view = _plan(a, gram, packed, centred), _view([a] if packed else [a, b], gram, packed)
    weight = beta / items if mean else beta
    block, tile, pairs = plan.block, plan.forward, config.pairs_of(view.m, plan.block)
    operands: dict[str, Any] = {
        "a_ptr": view.tensors[0],
        "b_ptr": b if packed else view.tensors[1],
        "mean_ptr": _means(view.tensors, gram) if centred else cosine,
        "items": items,
        "columns": columns,
        "pairs": pairs,
        **view.axes,
        **view.named(0, "a"),
        **view.named(-1, "b"),
        "EVEN_M": view.m % block == 0,
        "EVEN_K": view.k % tile.k == 0,
        "CENTRED": centred,
        "ONE_BLOCK": pairs == 1,
        "CHECK": a.dtype != torch.float16,
        "PRECISION": PRECISION,
        "UPCAST": _upcast(a),
        "BLOCK_M": block,
        "BLOCK_K": tile.k,
    }
    results: dict[str, Any] = {
        "known_ptr": cosine if known is None else known,
        "cosine_ptr": cosine,
        "stats_a_ptr": stats_a,
        "stats_b_ptr": stats_b,
        "items": items,
        "weight": weight,
    }
    with _launch.device_of(a):
        if plan.mode == "stored":
            count = 1 if packed else 2
            grams = _floats(a, count, items, pairs, plan.splits, block, block)
            exponents = _floats(a, count, items, pairs, plan.splits)
            _launch.run(
                kernels._gram_kernel,
                (items, count * pairs, plan.splits),
                operands
                | {"b_ptr": view.tensors[-1], "gram_ptr": grams, "exponent_ptr": exponents, "splits": plan.splits},
                tile.warps,
                tile.stages,
            )
            terms = torch.empty_like(cosine)
            _launch.run(
                kernels._gram_finish_kernel,
                (items,),
                results
                | {
                    "gram_ptr": grams,
                    "exponent_ptr": exponents,
                    "packed_ptr": b if packed else cosine,
                    "term_ptr": terms,
                    "difference_ptr": workspace,
                    "M": view.m,
                    "splits": plan.splits,
                    "pairs": pairs,
                    "PACKED": packed,
                    "BOTH": both,
                    "BLOCKS": -(-view.m // block),
                    "BLOCK_M": block,
                },
                16 if block > 16 else 4,
            )
            return cosine, terms.sum(), stats_a, stats_b, workspace
        programs = products = pairs
        if plan.mode == "dual":
            products = (-(-view.m // block)) ** 2
            programs = products + (pairs if known is not None else 2 * pairs)
        partial = _floats(a, items, programs, 6)
        _launch.run(
            kernels._gram_squares_kernel,
            (items, programs),
            operands | {"partial_ptr": partial, "PACKED": packed, "DUAL": plan.mode == "dual"},
            tile.warps,
            tile.stages,
        )
        _launch.run(
            kernels._gram_cosine_kernel,
            (1,),
            results
            | {
                "partial_ptr": partial,
                "loss_ptr": loss,
                "programs": programs,
                "products": products,
                "pairs": pairs,
                "KNOWN": known is not None and (packed or plan.mode == "dual"),
                "PACKED": packed,
                "DUAL": plan.mode == "dual",
                "BLOCK_I": 16,
                "BLOCK_P": 64,
            },
        )
    return cosine, loss, stats_a, stats_b, workspace


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
    packed: bool,
    gram: str,
    centred: bool,
    beta: float,
    mean: bool,
) -> Tensor:
    """As `op.gram_cosine_da`."""
    da = torch.empty_like(a)
    if da.numel() == 0:
        return da
    items, _, columns = _sizes(a, gram)
    like, b = _same_type(a, b, packed)
    plan = _plan(like, gram, packed, centred)
    given = [like, *([] if packed else [b]), *([] if incoming is None else [incoming])]
    view = _view([*given, da], gram, packed)
    out = view.tensors[-1]
    block, tile = plan.block, plan.backward
    index_b, index_incoming = 0 if packed else 1, 0 if incoming is None else len(given) - 1
    with _launch.device_of(a):
        _launch.run(
            kernels._gram_backward_kernel,
            (items, -(-view.m // tile.m), plan.parts),
            {
                "a_ptr": view.tensors[0],
                "b_ptr": b if packed else view.tensors[1],
                "mean_ptr": _means(view.tensors[: 1 + index_b], gram) if centred and plan.mode != "stored" else cosine,
                "difference_ptr": workspace[which] if plan.mode == "stored" else cosine,
                "cosine_ptr": cosine,
                "stats_a_ptr": stats_a,
                "stats_b_ptr": stats_b,
                "dcosine_ptr": cosine if dcosine is None else dcosine.contiguous(),
                "dloss_ptr": cosine if dloss is None else dloss,
                "incoming_ptr": view.tensors[index_incoming],
                "da_ptr": out,
                "items": items,
                "columns": columns,
                "weight": beta / items if mean else beta,
                "splits": plan.parts,
                "pairs": config.pairs_of(view.m, block),
                **view.axes,
                **view.named(0, "a"),
                **view.named(index_b, "b"),
                **view.named(index_incoming, "incoming"),
                **view.named(-1, "da"),
                "MODE": plan.mode,
                "PACKED": packed,
                "HAS_DCOSINE": dcosine is not None,
                "HAS_DLOSS": dloss is not None,
                "HAS_INCOMING": incoming is not None,
                "EVEN_M": view.m % tile.m == 0,
                "EVEN_N": view.m % tile.n == 0,
                "EVEN_K": view.k % tile.k == 0,
                "EVEN_C": view.k % tile.c == 0,
                "CENTRED": centred,
                "SCALED": like.dtype != torch.float16,
                "PRECISION": PRECISION,
                "UPCAST": _upcast(like),
                "BLOCK": block,
                "WHOLE": view.m <= tile.n,
                "BLOCK_M": tile.m,
                "BLOCK_N": tile.n,
                "BLOCK_K": tile.k,
                "BLOCK_C": tile.c,
            },
            tile.warps,
            tile.stages,
        )
    return da if out is da else da.copy_(out)


def _floats(like: Tensor, *size: int) -> Tensor:
    return like.new_empty(size, dtype=torch.float32)


def _sizes(a: Tensor, gram: str) -> tuple[int, int, int]:
    return config.sizes(gram, a.shape[0], a.shape[1], a.shape[2:].numel())


def _plan(a: Tensor, gram: str, packed: bool, centred: bool) -> Plan:
    half = a.element_size() == 2 and not centred
    return config.plan(*_sizes(a, gram), half, _launch.arch_of(a), _launch.multiprocessors_of(a), packed)


def _same_type(a: Tensor, b: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    if packed:
        return a, b.contiguous()
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def _means(tensors: list[Tensor], gram: str) -> Tensor:
    """`[operand, item, column]`: the mean over the rows, for one operand or two."""
    means = []
    for x in tensors:
        x = x.flatten(2) if x.dim() > 2 else x[..., None]
        axis = {"channel": 1, "position": 2, "batch": 0}[gram]
        means.append(x.mean(axis, dtype=torch.float32).flatten())
    return torch.cat(means)


def _view(tensors: list[Tensor], gram: str, packed: bool) -> View:
    _, rows, columns = _sizes(tensors[0], gram)
    dual = config.mode_of(rows, columns, packed) == "dual"
    # Maps in NHWC are one dense row of features if positions come first, those in NCHW if channels do.
    orders = (False, True) if gram == "batch" else (False,)
    chosen = tensors
    axes = min((_axes(tensors, gram, dual, order) for order in orders), key=_levels)
    if _levels(axes) > 2:
        chosen = [x.contiguous() for x in tensors]
        axes = _axes(chosen, gram, dual, True)
    item, m, k = ([_two_levels(axis) for axis in by_tensor] for by_tensor in axes)
    strides = [
        (item[i][1][1] if axes[0][i] else 0, *(stride for _, stride in (*m[i], *k[i]))) for i in range(len(tensors))
    ]
    (outer_m, width_m), (outer_k, width_k) = ([size for size, _ in levels[0]] for levels in (m, k))
    return View(chosen, strides, outer_m * width_m, outer_k * width_k, width_m, width_k)


def _axes(tensors: list[Tensor], gram: str, dual: bool, channels_first: bool) -> list[list[Axis]]:
    """Dimensions of the item, of m and of k, each of every tensor, as few as do for all of them."""
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
    return [_merged([axes[number] for axes in by_tensor]) for number in range(3)]


def _levels(axes: list[list[Axis]]) -> int:
    return max(len(axis[0]) for axis in axes)


def _merged(axes: list[Axis]) -> list[Axis]:
    """The same axis of several tensors with the fewest dimensions that all of them have."""
    out: list[Axis] = [[] for _ in axes]
    for dims in zip(*axes, strict=True):
        size = dims[0][0]
        if size == 1:
            continue
        if out[0] and all(o[-1][1] == size * stride for o, (_, stride) in zip(out, dims, strict=True)):
            for o, (_, stride) in zip(out, dims, strict=True):
                o[-1] = (o[-1][0] * size, stride)
        else:
            for o, dim in zip(out, dims, strict=True):
                o.append(dim)
    return out


def _two_levels(axis: Axis) -> list[tuple[int, int]]:
    if not axis:
        return [(1, 0), (1, 1)]
    return [(1, 0), axis[0]] if len(axis) == 1 else axis


def _upcast(x: Tensor) -> bool:
    return _launch.INTERPRETED and x.dtype == torch.bfloat16
