"""The Hamilton linear map in plain PyTorch as three operators, each the derivative of the other two: see
hamilton_conv/op.py, whose kernels compute it on the Triton backend.
"""

from typing import Any

import torch
from torch import Tensor

from qkernels.ops._library import define, eager, relu_mask, relu_mask_
from qkernels.ops.hamilton_linear import forms


def _linear_fake(inputs: Any) -> Any:
    return inputs.x.new_empty(inputs.x.shape[0], 4 * inputs.weight.shape[1])


def _linear_save(ctx: Any, inputs: Any, output: Tensor) -> None:
    need_x, need_weight, *_ = ctx.needs_input_grad
    x = inputs.x if need_weight or (need_x and inputs.x_is_relu) else None
    y = output if inputs.relu and inputs.mask_gradient else None
    ctx.save_for_backward(x, inputs.weight if need_x else None, y)


def _linear_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, y = ctx.saved_tensors
    need_x, need_weight, need_bias, *_ = wanted = ctx.needs_input_grad[:3]
    form = ctx.inputs.form
    dy = relu_mask(dy, y)
    dx, dw, db = None, None, None
    if not torch.is_grad_enabled() and eager(dy, x, weight):  # nobody will differentiate it
        dx, dw, db = forms.gradients(dy, x, weight, wanted, form)
        return relu_mask_(dx, x) if ctx.inputs.x_is_relu and dx is not None else dx, dw, db
    if need_x:
        dx = relu_mask(hamilton_linear_dx(dy, weight, form), x if ctx.inputs.x_is_relu else None)
    if need_weight:
        dw, db = hamilton_linear_dw(dy, x, need_bias, form)
    elif need_bias:
        db = dy.sum(0)
    return dx, dw, db if need_bias else None


@define("hamilton_linear", _linear_fake, _linear_save, _linear_backward, ("x", "weight", "bias"))
def hamilton_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tiles: Tensor | None,
    relu: bool,
    x_is_relu: bool,
    mask_gradient: bool,
    form: str,
) -> Tensor:
    """y = weight (x) x + bias, followed by a ReLU if `relu`; x `[M, 4 K]`, tiles `algebra.product_weight`'s."""
    y = forms.forward(x, weight, bias, form, tiles)
    return y.relu_() if relu else y


def _dx_fake(inputs: Any) -> Any:
    return inputs.dy.new_empty(inputs.dy.shape[0], 4 * inputs.weight.shape[2])


def _dx_save(ctx: Any, inputs: Any, output: Tensor) -> None:
    need_dy, need_weight, *_ = ctx.needs_input_grad
    ctx.save_for_backward(inputs.dy if need_weight else None, inputs.weight if need_dy else None)


def _dx_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dy, weight = ctx.saved_tensors
    need_dy, need_weight, *_ = ctx.needs_input_grad
    form = ctx.inputs.form
    by_dy = hamilton_linear(grad, weight, None, None, False, False, False, form) if need_dy else None
    by_weight = hamilton_linear_dw(dy, grad, False, form)[0] if need_weight else None
    return by_dy, by_weight


@define("hamilton_linear_dx", _dx_fake, _dx_save, _dx_backward, ("dy", "weight"))
def hamilton_linear_dx(dy: Tensor, weight: Tensor, form: str) -> Tensor:
    """The data gradient, conj(weight)^T (x) dy."""
    dx, _, _ = forms.gradients(dy, None, weight, (True, False, False), form)
    assert dx is not None
    return dx


def _dw_fake(inputs: Any) -> tuple[Tensor, Tensor]:
    x, features = inputs.x, inputs.dy.shape[1]
    return x.new_empty(4, features // 4, x.shape[1] // 4), x.new_empty(features if inputs.with_bias else 0)


def _dw_save(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    need_dy, need_x, *_ = ctx.needs_input_grad
    ctx.save_for_backward(inputs.dy if need_x else None, inputs.x if need_dy else None)


def _dw_backward(ctx: Any, grad: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
    dy, x = ctx.saved_tensors
    need_dy, need_x, *_ = ctx.needs_input_grad
    form, bias = ctx.inputs.form, grad_bias if ctx.inputs.with_bias else None
    by_dy = hamilton_linear(x, grad, bias, None, False, False, False, form) if need_dy else None
    by_x = hamilton_linear_dx(dy, grad, form) if need_x else None
    return by_dy, by_x


@define("hamilton_linear_dw", _dw_fake, _dw_save, _dw_backward, ("dy", "x"))
def hamilton_linear_dw(dy: Tensor, x: Tensor, with_bias: bool, form: str) -> tuple[Tensor, Tensor]:
    """The weight gradient, and the gradient of a bias `[4 N]` (empty without `with_bias`)."""
    _, dw, db = forms.gradients(dy, x, None, (False, True, with_bias), form)
    assert dw is not None
    return dw, dy.new_empty(0) if db is None else db
