"""The convolution's three products in plain PyTorch: one real convolution ("dense") or eight thin ones ("q8").

Of "real" there are only a layer's own two, of operators that can be differentiated, transformed and exported.

`window` is (stride, padding, dilation) of both axes and the groups, seven numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels import algebra
from qkernels.ops._library import relu_mask
from qkernels.ops.hamilton_conv.reference import transposed_output_size

Ints = Sequence[int]


def layout_of(x: Tensor, groups: int, form: str) -> torch.memory_format:
    """The memory format of a product's map: x's own, unless its channels are sorted first."""
    nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if nhwc and groups == 1 and form != "q8" else torch.contiguous_format


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Ints, form: str, product_weight: Tensor | None = None
) -> Tensor:
    """y = weight (x) x + bias; `product_weight` is `algebra.product_weight` of the weight, if it is there already."""
    stride, padding, dilation, groups = _geometry(window)
    real = algebra.product_weight(weight, form, groups) if product_weight is None else product_weight
    if form in ("dense", "real"):
        real_bias = None if bias is None else _group_first(bias[None], groups)[0]
        y = F.conv2d(_group_first(x, groups), real, real_bias, stride, padding, dilation, groups)
        y = _component_first(y, groups)
        return y.contiguous(memory_format=layout_of(x, groups, form)) if form == "dense" else y
    inputs = _products(algebra.input_products, x)
    z = F.conv2d(inputs, real.flatten(0, 1), None, stride, padding, dilation, 8 * groups)
    y = algebra.output_from_products(z.unflatten(1, (8, -1))).flatten(1, 2)
    return (y if bias is None else y.add_(bias.view(-1, 1, 1))).to(x.dtype)


def data_gradient(dy: Tensor, weight: Tensor, size: Ints, window: Ints, form: str) -> Tensor:
    """dx, the gradient of <dy, weight (x) x>: a transposed convolution of dy onto maps of `size`."""
    stride, padding, dilation, groups = _geometry(window)
    if form == "real":
        real = algebra.real_weight(weight, groups)
        natural = transposed_output_size(dy.shape[2:], weight.shape[3:], stride, padding, dilation, (0, 0))
        extra = [there - own for there, own in zip(size, natural, strict=True)]
        dx = F.conv_transpose2d(_group_first(dy, groups), real, None, stride, padding, extra, groups, dilation)
        return _component_first(dx, groups)
    by_x, _, _ = gradients(dy, None, weight, size, weight.shape[3:], window, (True, False, False), form)
    assert by_x is not None
    return by_x.contiguous(memory_format=layout_of(dy, groups, form))


def weight_gradient(dy: Tensor, x: Tensor, kernel_size: Ints, window: Ints, form: str) -> Tensor:
    """dw, the gradient of <dy, weight (x) x>."""
    _, dw, _ = gradients(dy, x, None, x.shape[2:], kernel_size, window, (False, True, False), form)
    assert dw is not None
    return dw


def gradients(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    size: Ints,
    kernel_size: Ints,
    window: Ints,
    wanted: Sequence[bool],
    form: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dw and db, as far as they are wanted: of the gradient by y, and the operands that these need."""
    need_x, need_weight, need_bias = wanted
    if not (need_x or need_weight):
        return None, None, dy.sum((0, 2, 3)) if need_bias else None
    p, batch, groups = dy.shape[1] // 4, dy.shape[0], window[6]
    q = weight.shape[2] if weight is not None else x.shape[1] // (4 * groups)  # type: ignore[union-attr]
    real = None
    if need_x:
        assert weight is not None
        real = algebra.product_weight(weight, form, groups)
    if form == "dense":
        outputs, inputs = _group_first(dy, groups), None if x is None else _group_first(x, groups)
        dx, dreal, db = _convolution_backward(
            outputs, inputs, real, (batch, 4 * q * groups, *size), (4 * p, 4 * q, *kernel_size), window, groups, wanted
        )
        dx = _component_first(dx, groups) if need_x else None
        dw = algebra.contract_weight(dreal, groups) if need_weight else None
        return dx, dw, _component_first(db[None], groups)[0] if need_bias else None
    outputs, inputs = _products(algebra.output_products, dy), None
    if need_weight:
        assert x is not None
        inputs = _products(algebra.input_products, x)
    products = None if real is None else real.flatten(0, 1)
    shapes = (batch, 8 * q * groups, *size), (8 * p, q, *kernel_size)
    zx, zw, _ = _convolution_backward(
        outputs, inputs, products, *shapes, window, 8 * groups, (need_x, need_weight, False)
    )
    dx = algebra.input_from_products(zx.unflatten(1, (8, -1))).flatten(1, 2).to(dy.dtype) if need_x else None
    dw = algebra.weight_from_products(zw.unflatten(0, (8, -1))).to(dy.dtype) if need_weight else None
    return dx, dw, dy.sum((0, 2, 3)) if need_bias else None


def _convolution_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    x_shape: Ints,
    weight_shape: Ints,
    window: Ints,
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Any, Any, Any]:
    """A real convolution's gradients by x, weight and bias in one call; an operand that they do not need may lack."""
    x = dy.new_empty(1).expand(x_shape) if x is None else x
    weight = dy.new_empty(1).expand(weight_shape) if weight is None else weight
    stride, padding, dilation, _ = _geometry(window)
    bias_shape = [dy.shape[1]]
    return torch.ops.aten.convolution_backward.default(  # type: ignore[no-any-return]
        dy, x, weight, bias_shape, stride, padding, dilation, False, [0, 0], groups, wanted
    )


def max_pool(y: Tensor, relu: bool) -> tuple[Tensor, Tensor]:
    """The maxima of 2x2 windows; the argmax in each, 0 to 3 in reading order, 4 if the ReLU zeroed all four."""
    pooled, index = F.max_pool2d(y, 2, return_indices=True)
    argmax = index // y.shape[3] % 2 * 2 + index % y.shape[3] % 2
    return pooled, (argmax.where(pooled > 0, 4) if relu else argmax).to(torch.uint8)


def epilogue_gradient(
    dy: Tensor | None,
    relu_output: Tensor | None,
    dpooled: Tensor | None,
    argmax: Tensor | None,
    size: Ints,
    scale: float,
) -> Tensor:
    """The gradient in front of an epilogue: scale [relu_output > 0] dy, and dpooled where the maxima came from."""
    total = None if dy is None else relu_mask(dy, relu_output).float() * scale
    if dpooled is not None and argmax is not None:
        position = torch.arange(4, device=argmax.device).view(2, 1, 2)
        routed = dpooled[:, :, :, None, :, None].where(argmax[:, :, :, None, :, None] == position, 0).float()
        routed = routed.flatten(4, 5).flatten(2, 3)
        routed = F.pad(routed, (0, size[1] - routed.shape[3], 0, size[0] - routed.shape[2]))
        total = routed if total is None else total + routed
    assert total is not None
    return total


def pack(weight: Tensor, algorithm: str, dtype: torch.dtype) -> Tensor:
    """A weight `[4, P, Q, ...]` as the Triton kernels read it, flat: see `kernels._hamilton_pack_kernel`."""
    form, precision = algorithm.split("-")
    w = weight.flatten(3).float() if weight.dim() > 3 else weight[..., None].float()
    if form == "q8":
        hadamard = w.new_tensor(algebra.HADAMARD)
        tiles = torch.cat([torch.einsum("ab,b...->a...", hadamard, w), -2 * w[list(algebra.WEIGHT_ORDER)]])
    else:
        tiles = torch.cat([w, -w])
    if precision == "tf32":
        near = ((tiles.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
        tiles = near.where(tiles == tiles, tiles)  # NaN stays
    packed = [tiles.permute(0, 3, 1, 2).flatten()]
    if precision == "tf32":
        packed.append(tiles.permute(0, 3, 2, 1).flatten())
    return torch.cat(packed).to(dtype)


def _geometry(window: Ints) -> tuple[Ints, Ints, Ints, int]:
    """Stride, padding and dilation of both axes, and the groups."""
    return window[:2], window[2:4], window[4:6], window[6]


def _products(transform: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return transform(x.unflatten(1, (4, -1))).flatten(1, 2)


def _group_first(x: Tensor, groups: int) -> Tensor:
    """Channels (component, group, channel) to the (group, component, channel) of a real grouped convolution."""
    if groups == 1:
        return x
    parts: Tensor = x.unflatten(1, (4, groups, -1))
    return parts.transpose(1, 2).flatten(1, 3).contiguous()


def _component_first(x: Tensor, groups: int) -> Tensor:
    if groups == 1:
        return x
    parts: Tensor = x.unflatten(1, (groups, 4, -1))
    return parts.transpose(1, 2).flatten(1, 3).contiguous()
