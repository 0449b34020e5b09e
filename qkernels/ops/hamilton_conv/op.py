"""The Hamilton convolution as operators; a linear map on the Triton backend is a convolution of images of one pixel.

<dy, weight (x) x> is linear in each of dy, weight and x. Its gradients by dy, x and weight are the convolution, its
data gradient (the transposed convolution) and its weight gradient, so the derivative of each of the three is made of
the other two, to any order. Behind a fused ReLU, dropout or pool derivatives end at the first order.

A ReLU's mask costs nothing where the gradient that it belongs to is written: `x_is_relu` says that x is a ReLU's
output, and the gradient by x goes through its mask; the layer before may then leave its own out, `mask_gradient` False.

`backend` is "torch" (forms.py), "triton" (launch.py), or "auto": launch.py, and forms.py where Triton cannot build a
kernel. `how` is the form of the product, on the Triton backend with the precision, such as "signed-half"
(`config.how_of`). `window` is (stride, padding, dilation) of both axes and the groups. `tiles` and
`tickets` are those of `hamilton_pack`; without them a launch packs its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qkernels.ops._library import define, first_order_only, or_plain, refuse_second_derivative, relu_mask
from qkernels.ops.hamilton_conv import forms
from qkernels.ops.hamilton_conv.config import MOST_TICKETS, packed_size
from qkernels.ops.hamilton_conv.reference import conv_output_size

Ints = Sequence[int]


def _empty_map(like: Tensor, channels: int, size: Ints, backend: str, dtype: torch.dtype | None = None) -> Tensor:
    layout = torch.contiguous_format if backend == "torch" else torch.channels_last
    shape = (like.shape[0], channels, *size)
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def _output_size(x: Tensor, weight: Tensor, window: Ints) -> list[int]:
    axes = zip(x.shape[2:], weight.shape[3:], window[:2], window[2:4], window[4:6], strict=True)
    return [conv_output_size(*sizes) for sizes in axes]


def _packed(tiles: Tensor | None, tickets: Tensor | None) -> Any:
    from qkernels.ops.hamilton_conv import launch

    return None if tiles is None or tickets is None else launch.Packed(tiles, tickets)


def _pack_fake(weights: Sequence[Tensor], hows: str, dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
    sizes = [packed_size(weight.numel(), how) for weight, how in zip(weights, hows.split(), strict=True)]
    tickets = weights[0].new_empty(len(weights) * MOST_TICKETS, dtype=torch.int32)
    return weights[0].new_empty(sum(sizes), dtype=dtype), tickets


@define("hamilton_pack", fake=_pack_fake, **first_order_only("hamilton_pack"))
def hamilton_pack(weights: Sequence[Tensor], hows: str, dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
    """Weights as the Triton kernels read them, and counters for their layers, in one launch.

    Args:
        weights: `[4, P, Q, ...]` each.
        hows: form and precision for each, separated by spaces.
        dtype: type of the maps that they are multiplied with.
        backend: "triton" or "auto".

    Returns:
        The tiles, one weight behind the other, `config.packed_size` elements each; `config.MOST_TICKETS` zeros each.
    """
    with or_plain(backend):
        from qkernels.ops.hamilton_conv import launch

        return launch.pack(weights, hows.split(), dtype)
    tiles = [forms.pack(weight, how, dtype) for weight, how in zip(weights, hows.split(), strict=True)]
    return torch.cat(tiles), tiles[0].new_zeros(len(tiles) * MOST_TICKETS, dtype=torch.int32)


def _plain(how: str) -> str:
    """The form in which plain PyTorch computes what a kernel would."""
    return "dense" if how.startswith("signed") else how.partition("-")[0]


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x * scale


def _as_kernels(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A result of plain PyTorch as the kernels would have written it."""
    return x.to(dtype, memory_format=torch.channels_last)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Ints, relu: bool, dropout: float, how: str
) -> Tensor:
    """A layer in plain PyTorch, whose parameters may be of another type than x."""
    y = forms.forward(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), window, _plain(how))
    y = y.relu_() if relu else y
    return torch.nn.functional.dropout(y, dropout) if dropout else y


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tiles: Tensor | None,
    tickets: Tensor | None,
    seed: Tensor | None,
    window: Ints,
    relu: bool,
    dropout: float,
    x_is_relu: bool,
    mask_gradient: bool,
    dtype: torch.dtype,
    backend: str,
    how: str,
) -> Tensor:
    return _empty_map(x, 4 * weight.shape[1], _output_size(x, weight, window), backend, dtype)


def _remember(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, x_is_relu: bool, *saved: Any) -> None:
    """Saves what `_gradients` needs, and the tensors of `saved`."""
    need_x, need_weight, *_ = ctx.needs_input_grad
    ctx.save_for_backward(x if need_weight or (need_x and x_is_relu) else None, weight if need_x else None, *saved)
    ctx.size, ctx.x_type, ctx.x_is_relu = x.shape[2:], x.dtype, x_is_relu
    ctx.kernel_size, ctx.weight_type = weight.shape[3:], weight.dtype
    ctx.bias_type = None if bias is None else bias.dtype


def _forward_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, tiles, tickets, _, window, relu, dropout, x_is_relu, mask, _, backend, how = inputs
    _remember(ctx, x, weight, bias, x_is_relu, tiles, tickets, output if relu and mask else None)
    ctx.window, ctx.backend, ctx.how = window, backend, how
    ctx.scale = 1 / (1 - dropout)


def _forward_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, tiles, tickets, y = ctx.saved_tensors
    scale = ctx.scale
    if ctx.backend == "torch":
        dy = relu_mask(dy, y)
    elif y is not None:
        dy, scale = hamilton_conv2d_dy(dy, y, None, None, dy.shape[2:], scale, ctx.x_type, ctx.backend), 1.0
    else:  # once for both gradients
        dy = dy.to(ctx.x_type).contiguous(memory_format=torch.channels_last)
    return _gradients(ctx, dy, scale, x, weight, tiles, tickets)


def _gradients(
    ctx: Any,
    dy: Tensor,
    scale: float,
    x: Tensor | None,
    weight: Tensor | None,
    tiles: Tensor | None,
    tickets: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by x, weight and bias, times `scale`."""
    need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
    how = (ctx.backend, ctx.how)
    dx, dw, db = None, None, None
    if need_x:
        assert weight is not None
        relu = x if ctx.x_is_relu else None
        dx = hamilton_conv2d_dx(dy, weight, None, tiles, tickets, relu, ctx.size, ctx.window, scale, ctx.x_type, *how)
    if need_weight:
        assert x is not None
        dw, db = hamilton_conv2d_dw(
            dy, x, tickets, ctx.kernel_size, ctx.window, need_bias, scale, ctx.weight_type, *how
        )
    elif need_bias:
        db = _scaled(dy.sum((0, 2, 3), dtype=ctx.bias_type), scale)
    return dx, dw, db.to(ctx.bias_type) if need_bias and db is not None else None


@define(
    "hamilton_conv2d",
    fake=_forward_fake,
    save=_forward_save,
    backward=_forward_backward,
    differentiable=("x", "weight", "bias"),
)
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
    how: str,
) -> Tensor:
    """y = weight (x) x + bias, followed by the ReLU and the dropout, if any, of `dtype`.

    On the Triton backend weight and bias may be float32 beside half types; a dropout needs a ReLU and a `seed`.
    """
    if backend == "torch":
        return _forward(x, weight, bias, window, relu, dropout, how)
    with or_plain(backend):
        from qkernels.ops.hamilton_conv import launch

        epilogue = launch.Epilogue(bias, relu, seed, 1 / (1 - dropout))
        return launch.forward(x, weight, window, how, epilogue, _packed(tiles, tickets), dtype)
    return _as_kernels(_forward(x, weight, bias, window, relu, dropout, how), dtype)


def _pool_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tiles: Tensor | None,
    tickets: Tensor | None,
    window: Ints,
    relu: bool,
    return_map: bool,
    x_is_relu: bool,
    backend: str,
    how: str,
) -> tuple[Tensor, Tensor, Tensor]:
    channels, size = 4 * weight.shape[1], _output_size(x, weight, window)
    half = [length // 2 for length in size]
    y = _empty_map(x, channels, size, "triton") if return_map else x.new_empty(0)
    return _empty_map(x, channels, half, "triton"), _empty_map(x, channels, half, "triton", torch.uint8), y


def _pool_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, tiles, tickets, ctx.window, relu, ctx.return_map, x_is_relu, ctx.backend, ctx.how = inputs
    _, argmax, y = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(argmax)
    _remember(ctx, x, weight, bias, x_is_relu, tiles, tickets, argmax, y if ctx.return_map and relu else None)
    ctx.y_size = _output_size(x, weight, ctx.window)


def _pool_backward(ctx: Any, dpooled: Tensor | None, _: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, tiles, tickets, argmax, y = ctx.saved_tensors
    dy = dy if ctx.return_map else None
    if dpooled is None and dy is None:
        return None, None, None
    argmax, y = (None if dpooled is None else argmax), (None if dy is None else y)
    gradient = hamilton_conv2d_dy(dy, y, dpooled, argmax, ctx.y_size, 1.0, ctx.x_type, ctx.backend)
    return _gradients(ctx, gradient, 1.0, x, weight, tiles, tickets)


@define(
    "hamilton_conv2d_pool",
    fake=_pool_fake,
    save=_pool_save,
    backward=_pool_backward,
    differentiable=("x", "weight", "bias"),
)
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
    how: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The maxima of y's 2x2 windows; the argmax in each window, 0 to 3 in reading order, 4 if the ReLU zeroed all four;
    y (empty without `return_map`). Not for the backend "torch".
    """
    with or_plain(backend):
        from qkernels.ops.hamilton_conv import launch

        epilogue = launch.Epilogue(bias, relu)
        return launch.forward_pool(x, weight, window, how, epilogue, _packed(tiles, tickets), return_map)
    y = _as_kernels(_forward(x, weight, bias, window, relu, 0.0, how), x.dtype)
    pooled, argmax = forms.max_pool(y, relu)
    return _as_kernels(pooled, x.dtype), _as_kernels(argmax, torch.uint8), y if return_map else x.new_empty(0)


def _dy_fake(
    dy: Tensor | None,
    y: Tensor | None,
    dpooled: Tensor | None,
    argmax: Tensor | None,
    size: Ints,
    scale: float,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    like = dpooled if dy is None else dy
    assert like is not None
    return _empty_map(like, like.shape[1], size, "triton", dtype)


def _refuse(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative(True)
    return ()


@define("hamilton_conv2d_dy", fake=_dy_fake, save=lambda ctx, inputs, output: None, backward=_refuse)
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
    """The gradient in front of an epilogue, as one map of `size`, of `dtype`: scale [y > 0] dy, and dpooled where the
    maxima came from. Not for the backend "torch".
    """
    with or_plain(backend):
        from qkernels.ops.hamilton_conv import launch

        return launch.epilogue_gradient(dy, y, dpooled, argmax, size, scale, dtype)
    return _as_kernels(forms.epilogue_gradient(dy, y, dpooled, argmax, size, scale), dtype)


def _dx_fake(
    dy: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tiles: Tensor | None,
    tickets: Tensor | None,
    x: Tensor | None,
    size: Ints,
    window: Ints,
    scale: float,
    dtype: torch.dtype,
    backend: str,
    how: str,
) -> Tensor:
    return _empty_map(dy, 4 * weight.shape[2] * window[6], size, backend, dtype)


def _dx_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, weight, bias, _, _, x, _, ctx.window, scale, _, ctx.backend, ctx.how = inputs
    need_dy, need_weight, *_ = ctx.needs_input_grad
    ctx.fused = x is not None or scale != 1
    ctx.save_for_backward(dy if need_weight else None, weight if need_dy else None)
    ctx.kernel_size, ctx.dy_type, ctx.weight_type = weight.shape[3:], dy.dtype, weight.dtype
    ctx.bias_type = None if bias is None else bias.dtype


def _dx_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative(ctx.fused)
    dy, weight = ctx.saved_tensors
    need_dy, need_weight, need_bias, *_ = ctx.needs_input_grad
    how = (ctx.backend, ctx.how)
    by_dy, by_weight = None, None
    if need_dy:
        plain = (None, None, None, None, ctx.window, False, 0.0, False, False)
        by_dy = hamilton_conv2d(grad, weight, *plain, ctx.dy_type, *how)
    if need_weight:
        rest = (None, ctx.kernel_size, ctx.window, False, 1.0, ctx.weight_type)
        by_weight, _ = hamilton_conv2d_dw(dy, grad, *rest, *how)
    return by_dy, by_weight, grad.sum((0, 2, 3), dtype=ctx.bias_type) if need_bias else None


@define(
    "hamilton_conv2d_dx",
    fake=_dx_fake,
    save=_dx_save,
    backward=_dx_backward,
    differentiable=("dy", "weight", "bias"),
)
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
    how: str,
) -> Tensor:
    """The transposed convolution onto maps of `size`, plus bias: the data gradient, and a layer itself.

    Times `scale`, and where `x` is given, a ReLU's output, through its mask.
    """
    if backend != "torch":
        with or_plain(backend):
            from qkernels.ops.hamilton_conv import launch

            epilogue = launch.Epilogue(bias, scale=scale, relu_output=x)
            return launch.data_gradient(dy, weight, size, window, how, epilogue, _packed(tiles, tickets), dtype)
    dx = forms.data_gradient(dy, weight.to(dy.dtype), size, window, _plain(how))
    dx = relu_mask(_scaled(dx if bias is None else dx.add_(bias.to(dx.dtype).view(-1, 1, 1)), scale), x)
    return dx if backend == "torch" else _as_kernels(dx, dtype)


def _dw_fake(
    dy: Tensor,
    x: Tensor,
    tickets: Tensor | None,
    kernel_size: Ints,
    window: Ints,
    with_bias: bool,
    scale: float,
    dtype: torch.dtype,
    backend: str,
    how: str,
) -> tuple[Tensor, Tensor]:
    channels = dy.shape[1]
    dw = x.new_empty(4, channels // 4, x.shape[1] // (4 * window[6]), *kernel_size, dtype=dtype)
    return dw, x.new_empty(channels if with_bias else 0, dtype=dtype)


def _dw_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    dy, x, _, _, ctx.window, ctx.with_bias, scale, _, ctx.backend, ctx.how = inputs
    need_dy, need_x, *_ = ctx.needs_input_grad
    ctx.fused = scale != 1
    ctx.save_for_backward(dy if need_x else None, x if need_dy else None)
    ctx.size, ctx.dy_type, ctx.x_type = x.shape[2:], dy.dtype, x.dtype


def _dw_backward(ctx: Any, grad: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative(ctx.fused)
    dy, x = ctx.saved_tensors
    need_dy, need_x, *_ = ctx.needs_input_grad
    bias, how = grad_bias if ctx.with_bias else None, (ctx.backend, ctx.how)
    by_dy, by_x = None, None
    if need_dy:
        plain = (None, None, None, ctx.window, False, 0.0, False, False)
        by_dy = hamilton_conv2d(x, grad, bias, *plain, ctx.dy_type, *how)
    if need_x:
        by_x = hamilton_conv2d_dx(dy, grad, None, None, None, None, ctx.size, ctx.window, 1.0, ctx.x_type, *how)
    return by_dy, by_x


@define("hamilton_conv2d_dw", fake=_dw_fake, save=_dw_save, backward=_dw_backward, differentiable=("dy", "x"))
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
    how: str,
) -> tuple[Tensor, Tensor]:
    """The weight gradient, and the gradient of a bias `[4 P]` (empty without `with_bias`), times `scale`."""
    if backend != "torch":
        with or_plain(backend):
            from qkernels.ops.hamilton_conv import launch

            return launch.weight_gradient(
                dy, x, kernel_size, window, with_bias, how, scale=scale, tickets=tickets, dtype=dtype
            )
    dw = forms.weight_gradient(dy, x, kernel_size, window, _plain(how))
    db = dy.sum((0, 2, 3)) if with_bias else dy.new_empty(0)
    return _scaled(dw, scale).to(dtype), _scaled(db, scale).to(dtype)
