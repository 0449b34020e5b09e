"""The linear map on the convolution's kernels: rows are images of one pixel; float32 follows the switch of matmuls."""

import torch
from torch import Tensor

from qkernels.ops.hamilton_conv import launch
from qkernels.ops.hamilton_conv.launch import Source

WINDOW = ([1, 1], [0, 0], [1, 1], 1)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, form: str, *, dtype: torch.dtype | None = None
) -> Tensor:
    """y = weight (x) x + bias, behind a ReLU where asked for; x `[M, 4 K]`."""
    y = launch.forward(_image(x), _image(weight), bias, *WINDOW, relu, form, kind="matmul", dtype=dtype)
    return y[:, :, 0, 0]


def data_gradient(
    dy: Tensor, gate: Tensor | None, weight: Tensor, form: str, *, dtype: torch.dtype | None = None
) -> Tensor:
    """dx of [gate > 0] dy."""
    source = Source(_image(dy), None if gate is None else _image(gate))
    dx = launch.data_gradient(source, _image(weight), None, [1, 1], *WINDOW, form, kind="matmul", dtype=dtype)
    return dx[:, :, 0, 0]


def weight_gradient(
    dy: Tensor, gate: Tensor | None, x: Tensor, with_bias: bool, form: str, *, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """dw `[4, N, K]` of [gate > 0] dy, and db `[4 N]` (empty without `with_bias`)."""
    source = Source(_image(dy), None if gate is None else _image(gate))
    dw, db = launch.weight_gradient(source, _image(x), [1, 1], *WINDOW, with_bias, form, kind="matmul", dtype=dtype)
    return dw[..., 0, 0], db


def _image(x: Tensor) -> Tensor:
    return x[..., None, None]
