"""Runs the kernels of the row form: plain tensors in and out, the counterpart of forms.py."""

from typing import Any

import torch
from torch import Tensor

from qkernels.ops import _launch
from qkernels.ops._strides import merged, two_levels
from qkernels.ops.folded_rowwise import config, kernels
from qkernels.ops.folded_rowwise.kernels import Features
from qkernels.runtime.device import arch_of, device_of

# Precision of float32 operands, whatever PyTorch's switches: the gradient is a small difference.
PRECISION = "tf32x3"


def forward(trained: Tensor, frozen: Tensor, clamp: str, weight: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, factors, statistics and workspace, as `op.folded_rowwise` returns them: four launches."""
    rows, block = trained.shape[0] * trained.shape[1], config.padded(trained.shape[2:].numel())
    programs = -(-rows // config.BLOCK_M)
    factors, partial = _launch.float32(trained, 3, rows), _launch.float32(trained, programs)
    loss, stats = _launch.float32(trained), _launch.float32(trained, 3)
    # Features of half types are exact in tf32.
    precision = PRECISION if trained.dtype == torch.float32 else "tf32"
    arguments = _operands(t=trained, p=frozen) | _blocks(block)
    with device_of(trained):
        products = _products(trained, frozen, factors, stats, None, precision)
        arguments |= {"products_ptr": products, "factors_ptr": factors, "stats_ptr": stats, "partial_ptr": partial}
        arguments |= {"CLAMP": clamp}
        _launch.run(kernels._folded_rows_kernel, (programs,), arguments, config.WARPS, registers=config.REGISTERS)
        sums = {"partial_ptr": partial, "stats_ptr": stats, "loss_ptr": loss, "weight": weight}
        sums |= {"M": rows, "programs": programs, "BLOCK": config.LOSS_BLOCK}
        _launch.run(kernels._folded_loss_kernel, (1,), sums)
    return loss, factors, stats, products


def gradient(
    dloss: Tensor, a: Tensor, b: Tensor, factors: Tensor, stats: Tensor, workspace: Tensor, which: int, weight: float
) -> Tensor:
    """As `op.folded_rowwise_da`: three launches."""
    da = torch.empty_like(a)
    arguments = _operands(a=a, b=b, da=da) | _blocks(workspace.shape[-1])
    arguments |= {"products_ptr": workspace, "factors_ptr": factors, "stats_ptr": stats, "dloss_ptr": dloss}
    programs = -(-factors.shape[1] // config.BLOCK_M)
    with device_of(a):
        weighted = _products(a, b, factors, stats, which, PRECISION)
        arguments |= {"weighted_ptr": weighted, "weight": weight, "WHICH": which}
        _launch.run(kernels._folded_gradient_kernel, (programs,), arguments, config.WARPS, registers=config.REGISTERS)
    out = arguments["da"].ptr
    return da if out is da else da.copy_(out)


def _blocks(block: int) -> dict[str, Any]:
    """Constants of the kernels that compute rows."""
    sizes = {"BLOCK_M": config.BLOCK_M, "BLOCK_N": block, "BLOCK_K": config.BLOCK_K}
    return {"PRECISION": PRECISION, **sizes}


def _products(a: Tensor, b: Tensor, factors: Tensor, stats: Tensor, which: int | None, precision: str) -> Tensor:
    """The products of `_folded_products_kernel`, three, or two weighted ones: two launches."""
    block, splits = config.padded(a.shape[2:].numel()), config.splits_of(factors.shape[1])
    columns = min(config.PRODUCTS_BLOCK_C, block)
    shape = (3 if which is None else 2, block, block)
    partial, products = _launch.float32(a, splits, *shape), _launch.float32(a, *shape)
    arguments = _operands(a=a, b=b) | {"factors_ptr": factors, "stats_ptr": stats, "partial_ptr": partial}
    arguments |= {"splits": splits, "WEIGHTED": which is not None, "WHICH": which or 0, "PRECISION": precision}
    arguments |= {"BLOCK_M": config.PRODUCTS_BLOCK_M, "BLOCK_N": block, "BLOCK_C": columns}
    settings = (config.PRODUCTS_WARPS, config.products_stages(precision, arch_of(a)), config.REGISTERS)
    _launch.run(kernels._folded_products_kernel, (splits, block // columns), arguments, *settings)
    size = products.numel()
    sums = {"partial_ptr": partial, "products_ptr": products, "splits": splits, "size": size}
    sums |= {"SPLITS": config.MOST_SPLITS, "BLOCK": config.SUM_BLOCK}
    _launch.run(kernels._folded_sum_kernel, (size // config.SUM_BLOCK,), sums)
    return products


def _operands(**operands: Tensor) -> dict[str, Any]:
    """Operands of one shape, and their sizes, as the kernels' arguments."""
    first = next(iter(operands.values()))
    arguments: dict[str, Any] = {
        "M": first.shape[0] * first.shape[1],
        "N": first.shape[2:].numel(),
        "channels": first.shape[1],
    }
    layouts = {name: _layout(features) for name, features in operands.items()}
    return arguments | layouts | {"WIDE": any(_last(layout.ptr) >= 2**31 for layout in layouts.values())}


def _last(x: Tensor) -> int:
    """Offset of the last element."""
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def _layout(features: Tensor) -> Features:
    """The dimensions of a position as two, h and w; a tensor whose strides do not allow that is copied."""
    sample, channel, *spatial = zip(features.shape, features.stride(), strict=True)
    (axis,) = merged([spatial])
    if len(axis) > 2:
        return _layout(features.contiguous())
    (_, h), (width, w) = two_levels(axis)
    return Features(features, sample[1], channel[1], h, w, width)
