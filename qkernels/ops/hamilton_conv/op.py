"""The Hamilton convolution as three operators.

<dy, weight (x) x> is linear in each of dy, weight and x. Its gradients by dy, x and weight are the
convolution, its data gradient (the transposed convolution) and its weight gradient, so the derivative of each
of the three is made of the other two, to any order.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from qkernels.ops._library import define, relu_mask
from qkernels.ops.hamilton_conv import forms
from qkernels.ops.hamilton_conv.reference import conv_output_size


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
    form: str,
) -> Tensor:
    window = zip(x.shape[2:], weight.shape[3:], stride, padding, dilation, strict=True)
    return x.new_empty(x.shape[0], 4 * weight.shape[1], *(conv_output_size(*sizes) for sizes in window))


def _forward_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *ctx.window, ctx.groups, relu, ctx.form = inputs
    need_x, need_weight, *_ = ctx.needs_input_grad
    ctx.save_for_backward(x if need_weight else None, weight if need_x else None, output if relu else None)
    ctx.size, ctx.kernel_size = x.shape[2:], weight.shape[3:]


def _forward_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, y = ctx.saved_tensors
    need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
    dy = relu_mask(dy, y)
    rest = (*ctx.window, ctx.groups, ctx.form)
    dx = hamilton_conv2d_dx(dy, weight, None, ctx.size, *rest) if need_x else None
    dw = hamilton_conv2d_dw(dy, x, ctx.kernel_size, *rest) if need_weight else None
    db = dy.sum((0, 2, 3)) if need_bias else None
    return dx, dw, db, None, None, None, None, None, None


@define("hamilton_conv2d", fake=_forward_fake, save=_forward_save, backward=_forward_backward)
def hamilton_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
    form: str,
) -> Tensor:
    """y = weight (x) x + bias, behind a ReLU where asked for."""
    y = forms.forward(x, weight, bias, stride, padding, dilation, groups, form)
    return y.relu_() if relu else y


def _dx_fake(
    dy: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    form: str,
) -> Tensor:
    return dy.new_empty(dy.shape[0], 4 * weight.shape[2] * groups, *size)


def _dx_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, weight, _, _, *ctx.window, ctx.groups, ctx.form = inputs
    need_dy, need_weight, *_ = ctx.needs_input_grad
    ctx.save_for_backward(dy if need_weight else None, weight if need_dy else None)
    ctx.kernel_size = weight.shape[3:]


def _dx_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dy, weight = ctx.saved_tensors
    need_dy, need_weight, need_bias, *_ = ctx.needs_input_grad
    window = (*ctx.window, ctx.groups)
    by_dy = hamilton_conv2d(grad, weight, None, *window, False, ctx.form) if need_dy else None
    by_weight = hamilton_conv2d_dw(dy, grad, ctx.kernel_size, *window, ctx.form) if need_weight else None
    by_bias = grad.sum((0, 2, 3)) if need_bias else None
    return by_dy, by_weight, by_bias, None, None, None, None, None, None


@define("hamilton_conv2d_dx", fake=_dx_fake, save=_dx_save, backward=_dx_backward)
def hamilton_conv2d_dx(
    dy: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    form: str,
) -> Tensor:
    """The transposed convolution of dy onto maps of `size`, plus bias: the data gradient, and a layer itself."""
    dx = forms.data_gradient(dy, weight, size, stride, padding, dilation, groups, form)
    return dx if bias is None else dx.add_(bias.view(-1, 1, 1))


def _dw_fake(
    dy: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    form: str,
) -> Tensor:
    return x.new_empty(4, dy.shape[1] // 4, x.shape[1] // (4 * groups), *kernel_size)


def _dw_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, x, _, *ctx.window, ctx.groups, ctx.form = inputs
    need_dy, need_x, *_ = ctx.needs_input_grad
    ctx.save_for_backward(dy if need_x else None, x if need_dy else None)
    ctx.size = x.shape[2:]


def _dw_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dy, x = ctx.saved_tensors
    need_dy, need_x, *_ = ctx.needs_input_grad
    window = (*ctx.window, ctx.groups)
    by_dy = hamilton_conv2d(x, grad, None, *window, False, ctx.form) if need_dy else None
    by_x = hamilton_conv2d_dx(dy, grad, None, ctx.size, *window, ctx.form) if need_x else None
    return by_dy, by_x, None, None, None, None, None, None


@define("hamilton_conv2d_dw", fake=_dw_fake, save=_dw_save, backward=_dw_backward)
def hamilton_conv2d_dw(
    dy: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    form: str,
) -> Tensor:
    """The weight gradient."""
    return forms.weight_gradient(dy, x, kernel_size, stride, padding, dilation, groups, form)
