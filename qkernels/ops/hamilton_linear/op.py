"""The Hamilton linear map as three operators, each the derivative of the other two: see hamilton_conv/op.py."""

from typing import Any

from torch import Tensor

from qkernels.ops._library import define, refuse_second_derivative, relu_mask
from qkernels.ops.hamilton_linear import forms


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, backend: str, form: str) -> Tensor:
    return x.new_empty(x.shape[0], 4 * weight.shape[1])


def _forward_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, relu, *ctx.how = inputs
    need_x, need_weight, *_ = ctx.needs_input_grad
    ctx.save_for_backward(x if need_weight else None, weight if need_x else None, output if relu else None)


def _forward_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, y = ctx.saved_tensors
    need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
    if ctx.how[0] != "triton":
        dy, y = relu_mask(dy, y), None
    dx, dw, db = None, None, None
    if need_x:
        dx = hamilton_linear_dx(dy, y, weight, *ctx.how)
    if need_weight:
        dw, db = hamilton_linear_dw(dy, y, x, need_bias, *ctx.how)
    elif need_bias:
        db = relu_mask(dy, y).sum(0)
    return dx, dw, db if need_bias else None, None, None, None


@define("hamilton_linear", fake=_forward_fake, save=_forward_save, backward=_forward_backward)
def hamilton_linear(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, backend: str, form: str) -> Tensor:
    """y = weight (x) x + bias, behind a ReLU where asked for; x `[M, 4 K]`."""
    if backend == "triton":
        from qkernels.ops.hamilton_linear import launch

        return launch.forward(x, weight, bias, relu, form)
    y = forms.forward(x, weight, bias, form)
    return y.relu_() if relu else y


def _dx_fake(dy: Tensor, gate: Tensor | None, weight: Tensor, backend: str, form: str) -> Tensor:
    return dy.new_empty(dy.shape[0], 4 * weight.shape[2])


def _dx_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, gate, weight, *ctx.how = inputs
    need_dy, _, need_weight, *_ = ctx.needs_input_grad
    ctx.fused = gate is not None
    ctx.save_for_backward(dy if need_weight else None, weight if need_dy else None)


def _dx_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative(ctx.fused)
    dy, weight = ctx.saved_tensors
    need_dy, _, need_weight, *_ = ctx.needs_input_grad
    by_dy = hamilton_linear(grad, weight, None, False, *ctx.how) if need_dy else None
    by_weight = hamilton_linear_dw(dy, None, grad, False, *ctx.how)[0] if need_weight else None
    return by_dy, None, by_weight, None, None


@define("hamilton_linear_dx", fake=_dx_fake, save=_dx_save, backward=_dx_backward)
def hamilton_linear_dx(dy: Tensor, gate: Tensor | None, weight: Tensor, backend: str, form: str) -> Tensor:
    """The data gradient, conj(weight)^T (x) [gate > 0] dy; a gate only on the Triton backend."""
    if backend == "triton":
        from qkernels.ops.hamilton_linear import launch

        return launch.data_gradient(dy, gate, weight, form)
    assert gate is None
    return forms.data_gradient(dy, weight, form)


def _dw_fake(
    dy: Tensor, gate: Tensor | None, x: Tensor, with_bias: bool, backend: str, form: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(4, dy.shape[1] // 4, x.shape[1] // 4), x.new_empty(dy.shape[1] if with_bias else 0)


def _dw_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    dy, gate, x, ctx.with_bias, *ctx.how = inputs
    need_dy, _, need_x, *_ = ctx.needs_input_grad
    ctx.fused = gate is not None
    ctx.save_for_backward(dy if need_x else None, x if need_dy else None)


def _dw_backward(ctx: Any, grad: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative(ctx.fused)
    dy, x = ctx.saved_tensors
    need_dy, _, need_x, *_ = ctx.needs_input_grad
    bias = grad_bias if ctx.with_bias else None
    by_dy = hamilton_linear(x, grad, bias, False, *ctx.how) if need_dy else None
    by_x = hamilton_linear_dx(dy, None, grad, *ctx.how) if need_x else None
    return by_dy, None, by_x, None, None, None


@define("hamilton_linear_dw", fake=_dw_fake, save=_dw_save, backward=_dw_backward)
def hamilton_linear_dw(
    dy: Tensor, gate: Tensor | None, x: Tensor, with_bias: bool, backend: str, form: str
) -> tuple[Tensor, Tensor]:
    """The weight gradient of [gate > 0] dy, and the gradient of a bias `[4 N]` (empty without `with_bias`)."""
    if backend == "triton":
        from qkernels.ops.hamilton_linear import launch

        return launch.weight_gradient(dy, gate, x, with_bias, form)
    assert gate is None
    return forms.weight_gradient(dy, x, form), dy.sum(0) if with_bias else dy.new_empty(0)
