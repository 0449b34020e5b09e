"""The Hamilton convolution as operators; on the Triton backend a linear map is a convolution of maps of one pixel.

<dy, weight (x) x> is linear in each of dy, weight and x. Its gradients by dy, x and weight are the convolution, its
data gradient (the transposed convolution) and its weight gradient, so the derivative of each of the three is made of
the other two, to any order. Behind a fused ReLU, dropout or pool derivatives end at the first order.

A ReLU's mask costs nothing where the gradient that it belongs to is written: `x_is_relu` says that x is a ReLU's
output, and the gradient by x goes through its mask; the layer before may then leave its own out, `mask_gradient` False.

`backend` is "torch" (forms.py), "triton" (launch.py), or "auto": launch.py, and forms.py if Triton cannot build a
kernel. `algorithm` is the form of the product, on the Triton backend with its precision, such as "signed-half"
(`config.algorithm_of`). `window` is (stride, padding, dilation) of both axes and the groups. `tiles` and `tickets` are
those of `hamilton_pack`; without them a launch packs its own. On "torch" the forward reads `tiles` that are
`algebra.product_weight`'s.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qkernels.ops._library import (
    define,
    eager,
    first_order_only,
    or_plain,
    refuse_second_derivative,
    relu_mask,
    relu_mask_,
)
from qkernels.ops.hamilton_conv import forms
from qkernels.ops.hamilton_conv.config import MOST_TICKETS, packed_size
from qkernels.ops.hamilton_conv.reference import conv_output_size

FUSED = "the Triton kernels have no second derivative after a fused ReLU or pool"
Ints = Sequence[int]
Gradient = Tensor | None


def _empty_product(like: Tensor, channels: int, size: Ints, inputs: Any) -> Tensor:
    plain = forms.layout_of(like, inputs.window[6], _plain_form(inputs.algorithm))
    return _empty_map(like, channels, size, inputs.dtype, plain if inputs.backend == "torch" else torch.channels_last)


def _empty_map(
    like: Tensor, channels: int, size: Ints, dtype: torch.dtype, layout: torch.memory_format = torch.channels_last
) -> Tensor:
    return torch.empty((like.shape[0], channels, *size), dtype=dtype, device=like.device, memory_format=layout)


def _output_size(x: Tensor, weight: Tensor, window: Ints) -> tuple[int, int]:
    return conv_output_size(x.shape[2:], weight.shape[3:], window[:2], window[2:4], window[4:6])


def _packed(tiles: Tensor | None, tickets: Tensor | None) -> Any:
    from qkernels.ops.hamilton_conv import launch

    return None if tiles is None or tickets is None else launch.Packed(tiles, tickets)


def _pack_fake(inputs: Any) -> tuple[Tensor, Tensor]:
    first, count = inputs.weights[0], len(inputs.weights)
    sizes = (packed_size(w.numel(), a) for w, a in zip(inputs.weights, inputs.algorithms.split(), strict=True))
    tickets = first.new_empty(count * MOST_TICKETS, dtype=torch.int32)
    return first.new_empty(sum(sizes), dtype=inputs.dtype), tickets


@define("hamilton_pack", _pack_fake, **first_order_only("hamilton_pack has no second derivative"))
def hamilton_pack(
    weights: Sequence[Tensor], algorithms: str, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    """Weights as the Triton kernels read them, and counters for their layers, in one launch.

    Args:
        weights: `[4, P, Q, ...]` each.
        algorithms: form and precision for each, separated by spaces.
        dtype: type of the maps that they are multiplied with.
        backend: "triton" or "auto".

    Returns:
        The tiles of all weights in a row, `config.packed_size` elements each; `config.MOST_TICKETS` zeros each.
    """
    with or_plain(backend):
        from qkernels.ops.hamilton_conv import launch

        return launch.pack(weights, algorithms.split(), dtype)
    tiles = [forms.pack(weight, each, dtype) for weight, each in zip(weights, algorithms.split(), strict=True)]
    return torch.cat(tiles), tiles[0].new_zeros(len(tiles) * MOST_TICKETS, dtype=torch.int32)


def _plain_form(algorithm: str) -> str:
    """The form in which plain PyTorch computes what a kernel would."""
    return "dense" if algorithm.startswith("signed") else algorithm.partition("-")[0]


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x * scale


def _as_kernels(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A result of plain PyTorch as the kernels would have written it."""
    return x.to(dtype, memory_format=torch.channels_last)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Ints,
    relu: bool,
    dropout: float,
    algorithm: str,
    product_weight: Tensor | None = None,
) -> Tensor:
    """A layer in plain PyTorch, whose parameters may be of another type than x."""
    if weight.dtype != x.dtype:
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    y = forms.forward(x, weight, bias, window, _plain_form(algorithm), product_weight)
    y = y.relu_() if relu else y
    return torch.nn.functional.dropout(y, dropout) if dropout else y


def _save_layer(ctx: Any, inputs: Any, *others: Tensor | None) -> None:
    """Saves what `_layer_gradients` needs, and other tensors."""
    x, weight, bias = inputs.x, inputs.weight, inputs.bias
    need_x, need_weight, *_ = ctx.needs_input_grad
    saved_x = x if need_weight or (need_x and inputs.x_is_relu) else None
    tiles = inputs.tiles if need_x and inputs.backend != "torch" else None  # of "torch" the forward alone reads them
    ctx.save_for_backward(saved_x, weight if need_x else None, tiles, inputs.tickets, *others)
    ctx.size, ctx.x_type = x.shape[2:], x.dtype
    ctx.kernel_size, ctx.weight_type = weight.shape[3:], weight.dtype
    ctx.bias_type = None if bias is None else bias.dtype


def _layer_gradients(ctx: Any, saved: Sequence[Any], dy: Tensor, scale: float) -> tuple[Gradient, ...]:
    """Gradients by x, weight and bias, times `scale`; `saved` is what `_save_layer` saved."""
    x, weight, tiles, tickets, *_ = saved
    need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
    window, computed_by = ctx.inputs.window, (ctx.inputs.backend, ctx.inputs.algorithm)
    dx, dw = None, None
    db: Any = None
    if need_x:
        relu = x if ctx.inputs.x_is_relu else None
        dx = hamilton_conv2d_dx(
            dy, weight, None, tiles, tickets, relu, ctx.size, window, scale, ctx.x_type, *computed_by
        )
    if need_weight:
        options = (ctx.kernel_size, window, need_bias, scale, ctx.weight_type)
        dw, db = hamilton_conv2d_dw(dy, x, tickets, *options, *computed_by)
    elif need_bias:
        db = _scaled(dy.sum((0, 2, 3), dtype=ctx.bias_type), scale)
    return dx, dw, db.to(ctx.bias_type) if need_bias else None


def _joint_gradients(ctx: Any, saved: Sequence[Any], dy: Tensor) -> tuple[Gradient, ...]:
    """The same in plain PyTorch, where nobody will differentiate it: dy is read once, and so brought into the layout
    that the library computes in.
    """
    x, weight, *_ = saved
    sizes, wanted = (ctx.size, ctx.kernel_size), ctx.needs_input_grad[:3]
    dx, dw, db = forms.gradients(dy, x, weight, *sizes, ctx.inputs.window, wanted, ctx.inputs.algorithm)
    return relu_mask_(dx, x) if ctx.inputs.x_is_relu and dx is not None else dx, dw, db


def _conv_fake(inputs: Any) -> Tensor:
    x, weight = inputs.x, inputs.weight
    size = _output_size(x, weight, inputs.window)
    return _empty_product(x, 4 * weight.shape[1], size, inputs)


def _conv_save(ctx: Any, inputs: Any, output: Tensor) -> None:
    _save_layer(ctx, inputs, output if inputs.relu and inputs.mask_gradient else None)


def _conv_backward(ctx: Any, dy: Tensor) -> tuple[Gradient, ...]:
    *saved, y = ctx.saved_tensors  # to be unpacked once, says activation checkpointing
    scale, backend = 1 / (1 - ctx.inputs.dropout), ctx.inputs.backend
    if backend == "torch":
        dy = relu_mask(dy, y)
        if scale == 1 and not torch.is_grad_enabled() and eager(dy, *saved):
            return _joint_gradients(ctx, saved, dy)
    elif y is not None:
        dy, scale = hamilton_conv2d_dy(dy, y, None, None, dy.shape[2:], scale, ctx.x_type, backend), 1.0
    else:  # once for both gradients
        dy = dy.to(ctx.x_type).contiguous(memory_format=torch.channels_last)
    return _layer_gradients(ctx, saved, dy, scale)


@define("hamilton_conv2d", _conv_fake, _conv_save, _conv_backward, ("x", "weight", "bias"))
def hamilton_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tiles: Tensor | None,
    tickets: Tensor | None,
    seed: Tensor | None,
    window: Sequence[int],
    relu: bool,
    dropout: float,
    x_is_relu: bool,
    mask_gradient: bool,
    dtype: torch.dtype,
    backend: str,
    algorithm: str,
) -> Tensor:
    """y = weight (x) x + bias, followed by the ReLU and the dropout, if any, of `dtype`.

    On the Triton backend weight and bias may be float32 beside half types; a dropout needs a ReLU and a `seed`.
    """
    if backend == "torch":
        return _forward(x, weight, bias, window, relu, dropout, algorithm, tiles)
    with or_plain(backend):
        from qkernels.ops.hamilton_conv import launch

        epilogue = launch.Epilogue(bias, relu, seed, 1 / (1 - dropout))
        return launch.forward(x, weight, window, algorithm, epilogue, _packed(tiles, tickets), dtype)
    return _as_kernels(_forward(x, weight, bias, window, relu, dropout, algorithm), dtype)


def _pool_fake(inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, channels, size = inputs.x, 4 * inputs.weight.shape[1], _output_size(inputs.x, inputs.weight, inputs.window)
    half = [length // 2 for length in size]
    y = _empty_map(x, channels, size, x.dtype) if inputs.return_map else x.new_empty(0)
    return _empty_map(x, channels, half, x.dtype), _empty_map(x, channels, half, torch.uint8), y


def _pool_save(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, argmax, y = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(argmax)
    _save_layer(ctx, inputs, argmax, y if inputs.return_map and inputs.relu else None)
    ctx.y_size = _output_size(inputs.x, inputs.weight, inputs.window)


def _pool_backward(ctx: Any, dpooled: Gradient, _: Any, dy: Gradient) -> tuple[Gradient, ...]:
    *saved, argmax, y = ctx.saved_tensors
    dy = dy if ctx.inputs.return_map else None
    if dpooled is None and dy is None:
        return None, None, None
    argmax, y = (None if dpooled is None else argmax), (None if dy is None else y)
    gradient = hamilton_conv2d_dy(dy, y, dpooled, argmax, ctx.y_size, 1.0, ctx.x_type, ctx.inputs.backend)
    return _layer_gradients(ctx, saved, gradient, 1.0)


@define("hamilton_conv2d_pool", _pool_fake, _pool_save, _pool_backward, ("x", "weight", "bias"))
def hamilton_conv2d_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tiles: Tensor | None,
    tickets: Tensor | None,
    window: Sequence[int],
    relu: bool,
    return_map: bool,
    x_is_relu: bool,
    backend: str,
    algorithm: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The maxima of y's 2x2 windows; the argmax in each window, 0 to 3 in reading order, 4 if the ReLU zeroed all four;
    y (empty without `return_map`). Not for the backend "torch".
    """
    with or_plain(backend):
        from qkernels.ops.hamilton_conv import launch

        epilogue = launch.Epilogue(bias, relu)
        return launch.forward_pool(x, weight, window, algorithm, epilogue, _packed(tiles, tickets), return_map)
    y = _as_kernels(_forward(x, weight, bias, window, relu, 0.0, algorithm), x.dtype)
    pooled, argmax = forms.max_pool(y, relu)
    return _as_kernels(pooled, x.dtype), _as_kernels(argmax, torch.uint8), y if return_map else x.new_empty(0)


def _dy_fake(inputs: Any) -> Tensor:
    like = inputs.dpooled if inputs.dy is None else inputs.dy
    return _empty_map(like, like.shape[1], inputs.size, inputs.dtype)


@define("hamilton_conv2d_dy", _dy_fake, **first_order_only(FUSED))
def hamilton_conv2d_dy(
    dy: Tensor | None,
    y: Tensor | None,
    dpooled: Tensor | None,
    argmax: Tensor | None,
    size: Sequence[int],
    scale: float,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """The gradient in front of an epilogue, as one map of `size`, of `dtype`: scale [y > 0] dy, plus dpooled at each
    window's maximum. Not for the backend "torch".
    """
    with or_plain(backend):
        from qkernels.ops.hamilton_conv import launch

        return launch.epilogue_gradient(dy, y, dpooled, argmax, size, scale, dtype)
    return _as_kernels(forms.epilogue_gradient(dy, y, dpooled, argmax, size, scale), dtype)


def _dx_fake(inputs: Any) -> Tensor:
    channels = 4 * inputs.weight.shape[2] * inputs.window[6]
    return _empty_product(inputs.dy, channels, inputs.size, inputs)


def _dx_save(ctx: Any, inputs: Any, output: Tensor) -> None:
    dy, weight, bias = inputs.dy, inputs.weight, inputs.bias
    need_dy, need_weight, *_ = ctx.needs_input_grad
    ctx.fused = inputs.x is not None or inputs.scale != 1
    ctx.save_for_backward(dy if need_weight else None, weight if need_dy else None)
    ctx.kernel_size, ctx.dy_type, ctx.weight_type = weight.shape[3:], dy.dtype, weight.dtype
    ctx.bias_type = None if bias is None else bias.dtype


def _dx_backward(ctx: Any, grad: Tensor) -> tuple[Gradient, ...]:
    if ctx.fused:
        refuse_second_derivative(FUSED)
    dy, weight = ctx.saved_tensors
    need_dy, need_weight, need_bias, *_ = ctx.needs_input_grad
    window, computed_by = ctx.inputs.window, (ctx.inputs.backend, ctx.inputs.algorithm)
    by_dy, by_weight = None, None
    if need_dy:
        plain = (None, None, None, None, window, False, 0.0, False, False)
        by_dy = hamilton_conv2d(grad, weight, *plain, ctx.dy_type, *computed_by)
    if need_weight:
        size = ctx.kernel_size
        by_weight, _ = hamilton_conv2d_dw(dy, grad, None, size, window, False, 1.0, ctx.weight_type, *computed_by)
    return by_dy, by_weight, grad.sum((0, 2, 3), dtype=ctx.bias_type) if need_bias else None


@define("hamilton_conv2d_dx", _dx_fake, _dx_save, _dx_backward, ("dy", "weight", "bias"))
def hamilton_conv2d_dx(
    dy: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tiles: Tensor | None,
    tickets: Tensor | None,
    x: Tensor | None,
    size: Sequence[int],
    window: Sequence[int],
    scale: float,
    dtype: torch.dtype,
    backend: str,
    algorithm: str,
) -> Tensor:
    """The transposed convolution onto maps of `size`, plus bias: the data gradient, and a layer itself.

    Times `scale`; with `x`, a ReLU's output, through its mask.
    """
    if backend != "torch":
        with or_plain(backend):
            from qkernels.ops.hamilton_conv import launch

            epilogue = launch.Epilogue(bias, scale=scale, relu_output=x)
            return launch.data_gradient(dy, weight, size, window, algorithm, epilogue, _packed(tiles, tickets), dtype)
    dx = forms.data_gradient(dy, weight.to(dy.dtype), size, window, _plain_form(algorithm))
    dx = relu_mask(_scaled(dx if bias is None else dx.add_(bias.to(dx.dtype).view(-1, 1, 1)), scale), x)
    return dx if backend == "torch" else _as_kernels(dx, dtype)


def _dw_fake(inputs: Any) -> tuple[Tensor, Tensor]:
    x, channels, dtype = inputs.x, inputs.dy.shape[1], inputs.dtype
    shape = (4, channels // 4, x.shape[1] // (4 * inputs.window[6]), *inputs.kernel_size)
    return x.new_empty(shape, dtype=dtype), x.new_empty(channels if inputs.with_bias else 0, dtype=dtype)


def _dw_save(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    dy, x = inputs.dy, inputs.x
    need_dy, need_x, *_ = ctx.needs_input_grad
    ctx.save_for_backward(dy if need_x else None, x if need_dy else None)
    ctx.size, ctx.dy_type, ctx.x_type = x.shape[2:], dy.dtype, x.dtype


def _dw_backward(ctx: Any, grad: Tensor, grad_bias: Tensor) -> tuple[Gradient, ...]:
    if ctx.inputs.scale != 1:
        refuse_second_derivative(FUSED)
    dy, x = ctx.saved_tensors
    need_dy, need_x, *_ = ctx.needs_input_grad
    window, computed_by = ctx.inputs.window, (ctx.inputs.backend, ctx.inputs.algorithm)
    by_dy, by_x = None, None
    if need_dy:
        bias = grad_bias if ctx.inputs.with_bias else None
        plain = (None, None, None, window, False, 0.0, False, False)
        by_dy = hamilton_conv2d(x, grad, bias, *plain, ctx.dy_type, *computed_by)
    if need_x:
        by_x = hamilton_conv2d_dx(dy, grad, None, None, None, None, ctx.size, window, 1.0, ctx.x_type, *computed_by)
    return by_dy, by_x


@define("hamilton_conv2d_dw", _dw_fake, _dw_save, _dw_backward, ("dy", "x"))
def hamilton_conv2d_dw(
    dy: Tensor,
    x: Tensor,
    tickets: Tensor | None,
    kernel_size: Sequence[int],
    window: Sequence[int],
    with_bias: bool,
    scale: float,
    dtype: torch.dtype,
    backend: str,
    algorithm: str,
) -> tuple[Tensor, Tensor]:
    """The weight gradient, and the gradient of a bias `[4 P]` (empty without `with_bias`), times `scale`."""
    if backend != "torch":
        with or_plain(backend):
            from qkernels.ops.hamilton_conv import launch

            return launch.weight_gradient(
                dy, x, kernel_size, window, with_bias, algorithm, scale=scale, tickets=tickets, dtype=dtype
            )
    dw = forms.weight_gradient(dy, x, kernel_size, window, _plain_form(algorithm))
    db = dy.sum((0, 2, 3)) if with_bias else dy.new_empty(0)
    return _scaled(dw, scale).to(dtype), _scaled(db, scale).to(dtype)
