"""The Hamilton convolution as operators.

<dy, weight (x) x> is linear in each of dy, weight and x. Its gradients by dy, x and weight are the convolution, its
data gradient (the transposed convolution) and its weight gradient, so the derivative of each of the three is made of
the other two, to any order. The Triton kernels fuse a ReLU or a 2x2 pool into these products: there dy arrives as the
four tensors of `launch.Source`, and behind a fused epilogue derivatives end at the first order.

`backend` says what computes: "torch" (forms.py) or "triton" (launch.py); `form` how.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qkernels.ops._library import define, refuse_second_derivative, relu_mask
from qkernels.ops.hamilton_conv import forms
from qkernels.ops.hamilton_conv.reference import conv_output_size


def _empty_map(
    like: Tensor, channels: int, size: Sequence[int], backend: str, dtype: torch.dtype | None = None
) -> Tensor:
    layout = torch.channels_last if backend == "triton" else torch.contiguous_format
    shape = (like.shape[0], channels, *size)
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=layout)


def _output_size(x: Tensor, weight: Tensor, *window: Sequence[int]) -> list[int]:
    return [conv_output_size(*sizes) for sizes in zip(x.shape[2:], weight.shape[3:], *window, strict=True)]


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
    backend: str,
    form: str,
) -> Tensor:
    return _empty_map(x, 4 * weight.shape[1], _output_size(x, weight, stride, padding, dilation), backend)


def _forward_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *ctx.window, ctx.groups, relu, ctx.backend, ctx.form = inputs
    need_x, need_weight, *_ = ctx.needs_input_grad
    ctx.save_for_backward(x if need_weight else None, weight if need_x else None, output if relu else None)
    ctx.size, ctx.kernel_size = x.shape[2:], weight.shape[3:]


def _forward_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, y = ctx.saved_tensors
    if ctx.backend == "triton":
        dy = dy.contiguous(memory_format=torch.channels_last)  # once for both gradients
    else:
        dy, y = relu_mask(dy, y), None
    return *_gradients(ctx, (dy, y, None, None), x, weight, lambda: relu_mask(dy, y).sum((0, 2, 3))), *[None] * 7


def _gradients(
    ctx: Any, source: tuple[Tensor | None, ...], x: Tensor, weight: Tensor, bias_alone: Callable[[], Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients by x, weight and bias; `bias_alone` gives the last where the kernel of the second does not run."""
    need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
    rest = (*ctx.window, ctx.groups)
    dx, dw, db = None, None, None
    if need_x:
        dx = hamilton_conv2d_dx(*source, weight, None, ctx.size, *rest, ctx.backend, ctx.form)
    if need_weight:
        dw, db = hamilton_conv2d_dw(*source, x, ctx.kernel_size, *rest, need_bias, ctx.backend, ctx.form)
    elif need_bias:
        db = bias_alone()
    return dx, dw, db if need_bias else None


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
    backend: str,
    form: str,
) -> Tensor:
    """y = weight (x) x + bias, behind a ReLU where asked for."""
    if backend == "triton":
        from qkernels.ops.hamilton_conv import launch

        return launch.forward(x, weight, bias, stride, padding, dilation, groups, relu, form)
    y = forms.forward(x, weight, bias, stride, padding, dilation, groups, form)
    return y.relu_() if relu else y


def _pool_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
    tap: bool,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    channels, size = 4 * weight.shape[1], _output_size(x, weight, stride, padding, dilation)
    half = [length // 2 for length in size]
    y = _empty_map(x, channels, size, "triton") if tap else x.new_empty(0)
    return _empty_map(x, channels, half, "triton"), _empty_map(x, channels, half, "triton", torch.uint8), y


def _pool_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, *ctx.window, ctx.groups, relu, ctx.tap, ctx.form = inputs
    need_x, need_weight, *_ = ctx.needs_input_grad
    _, code, y = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(code)
    gate = y if ctx.tap and relu else None
    ctx.save_for_backward(x if need_weight else None, weight if need_x else None, code, gate)
    ctx.size, ctx.kernel_size, ctx.backend = x.shape[2:], weight.shape[3:], "triton"
    ctx.y_size = _output_size(x, weight, *ctx.window)


def _pool_backward(ctx: Any, dpooled: Tensor | None, _: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, code, gate = ctx.saved_tensors
    dy = dy if ctx.tap else None
    if dpooled is None and dy is None:
        return (None,) * 10
    dpooled, dy = (
        None if grad is None else grad.contiguous(memory_format=torch.channels_last) for grad in (dpooled, dy)
    )

    def bias_alone() -> Tensor:
        parts = [] if dpooled is None else [dpooled.where(code < 4, 0)]
        parts += [] if dy is None else [relu_mask(dy, gate)]
        return torch.stack([part.sum((0, 2, 3)) for part in parts]).sum(0)

    source = (dy, None if dy is None else gate, dpooled, None if dpooled is None else code)
    return *_gradients(ctx, source, x, weight, bias_alone), *[None] * 7


@define("hamilton_conv2d_pool", fake=_pool_fake, save=_pool_save, backward=_pool_backward)
def hamilton_conv2d_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    relu: bool,
    tap: bool,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The maxima of y's 2x2 windows, whence each came (0..3; 4 nowhere), and y (empty without `tap`); Triton only."""
    from qkernels.ops.hamilton_conv import launch

    return launch.forward_pool(x, weight, bias, stride, padding, dilation, groups, relu, tap, form)


def _dx_fake(
    dy: Tensor | None,
    gate: Tensor | None,
    dpooled: Tensor | None,
    code: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
    form: str,
) -> Tensor:
    like = dpooled if dy is None else dy
    assert like is not None
    return _empty_map(like, 4 * weight.shape[2] * groups, size, backend)


def _dx_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, gate, dpooled, _, weight, _, _, *ctx.window, ctx.groups, ctx.backend, ctx.form = inputs
    need_dy, *_, need_weight = ctx.needs_input_grad[:5]
    ctx.fused = gate is not None or dpooled is not None
    ctx.save_for_backward(dy if need_weight else None, weight if need_dy else None)
    ctx.kernel_size = weight.shape[3:]


def _dx_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative(ctx.fused)
    dy, weight = ctx.saved_tensors
    need_dy, _, _, _, need_weight, need_bias, *_ = ctx.needs_input_grad
    window, how = (*ctx.window, ctx.groups), (ctx.backend, ctx.form)
    by_dy = hamilton_conv2d(grad, weight, None, *window, False, *how) if need_dy else None
    by_weight = None
    if need_weight:
        by_weight, _ = hamilton_conv2d_dw(dy, None, None, None, grad, ctx.kernel_size, *window, False, *how)
    by_bias = grad.sum((0, 2, 3)) if need_bias else None
    return by_dy, None, None, None, by_weight, by_bias, *[None] * 7


@define("hamilton_conv2d_dx", fake=_dx_fake, save=_dx_save, backward=_dx_backward)
def hamilton_conv2d_dx(
    dy: Tensor | None,
    gate: Tensor | None,
    dpooled: Tensor | None,
    code: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
    form: str,
) -> Tensor:
    """The transposed convolution onto maps of `size`, plus bias: the data gradient, and a layer itself.

    Its source is dy, or on the Triton backend the gradient in front of a fused epilogue (`launch.Source`).
    """
    if backend == "triton":
        from qkernels.ops.hamilton_conv import launch

        source = launch.Source(dy, gate, dpooled, code)
        return launch.data_gradient(source, weight, bias, size, stride, padding, dilation, groups, form)
    assert dy is not None
    assert gate is None
    assert dpooled is None
    dx = forms.data_gradient(dy, weight, size, stride, padding, dilation, groups, form)
    return dx if bias is None else dx.add_(bias.view(-1, 1, 1))


def _dw_fake(
    dy: Tensor | None,
    gate: Tensor | None,
    dpooled: Tensor | None,
    code: Tensor | None,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    with_bias: bool,
    backend: str,
    form: str,
) -> tuple[Tensor, Tensor]:
    like = dpooled if dy is None else dy
    assert like is not None
    channels = like.shape[1]
    dw = x.new_empty(4, channels // 4, x.shape[1] // (4 * groups), *kernel_size)
    return dw, x.new_empty(channels if with_bias else 0)


def _dw_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    dy, gate, dpooled, _, x, _, *ctx.window, ctx.groups, ctx.with_bias, ctx.backend, ctx.form = inputs
    need_dy, *_, need_x = ctx.needs_input_grad[:5]
    ctx.fused = gate is not None or dpooled is not None
    ctx.save_for_backward(dy if need_x else None, x if need_dy else None)
    ctx.size = x.shape[2:]


def _dw_backward(ctx: Any, grad: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative(ctx.fused)
    dy, x = ctx.saved_tensors
    need_dy, _, _, _, need_x, *_ = ctx.needs_input_grad
    window, how = (*ctx.window, ctx.groups), (ctx.backend, ctx.form)
    bias = grad_bias if ctx.with_bias else None
    by_dy = hamilton_conv2d(x, grad, bias, *window, False, *how) if need_dy else None
    by_x = hamilton_conv2d_dx(dy, None, None, None, grad, None, ctx.size, *window, *how) if need_x else None
    return by_dy, None, None, None, by_x, *[None] * 8


@define("hamilton_conv2d_dw", fake=_dw_fake, save=_dw_save, backward=_dw_backward)
def hamilton_conv2d_dw(
    dy: Tensor | None,
    gate: Tensor | None,
    dpooled: Tensor | None,
    code: Tensor | None,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    with_bias: bool,
    backend: str,
    form: str,
) -> tuple[Tensor, Tensor]:
    """The weight gradient, and the gradient of a bias `[4 P]` (empty without `with_bias`); the source as in `_dx`."""
    if backend == "triton":
        from qkernels.ops.hamilton_conv import launch

        source = launch.Source(dy, gate, dpooled, code)
        return launch.weight_gradient(source, x, kernel_size, stride, padding, dilation, groups, with_bias, form)
    assert dy is not None
    assert gate is None
    assert dpooled is None
    dw = forms.weight_gradient(dy, x, kernel_size, stride, padding, dilation, groups, form)
    return dw, dy.sum((0, 2, 3)) if with_bias else dy.new_empty(0)
