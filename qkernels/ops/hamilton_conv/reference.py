"""Definition of the Hamilton convolution: windows and an einsum over the structure tensor, by plain autograd."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.algebra import structure_tensor

Ints = Sequence[int]
Pair = tuple[int, int]


def hamilton_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """y = weight (x) x + bias over the windows of x.

    Args:
        x: `[B, 4 Q, H, W]`, channels planar `[r | i | j | k]`.
        weight: `[4, P, Q/groups, kh, kw]`.
        bias: `[4 P]`.
        stride, padding, dilation: as in `torch.nn.functional.conv2d`.
        groups: groups of the quaternion channels.

    Returns:
        `[B, 4 P, Ho, Wo]`.
    """
    _, p, q, *kernel = weight.shape
    height, width = conv_output_size(x.shape[2:], kernel, stride, padding, dilation)
    windows = F.unfold(x, tuple(kernel), dilation, padding, stride)
    windows = windows.view(x.shape[0], 4, groups, q, kernel[0] * kernel[1], height * width)
    w = weight.reshape(4, groups, p // groups, q, -1)
    y = torch.einsum("abc,bgpqk,ncgqkl->nagpl", structure_tensor(x.dtype, x.device), w, windows)
    y = y.reshape(x.shape[0], 4 * p, height, width)
    return y if bias is None else y + bias.view(-1, 1, 1)


def hamilton_conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    output_padding: Pair = (0, 0),
    groups: int = 1,
    dilation: Pair = (1, 1),
) -> Tensor:
    """The adjoint of `hamilton_conv2d` with the same weight, plus bias.

    Args:
        x: `[B, 4 Q, H, W]`.
        weight: `[4, Q, P/groups, kh, kw]`.
        bias: `[4 P]`.
        stride, padding, output_padding, dilation: as in `torch.nn.functional.conv_transpose2d`.
        groups: groups of the quaternion channels.

    Returns:
        `[B, 4 P, Ho, Wo]`.
    """
    _, q, p, *kernel = weight.shape
    size = transposed_output_size(x.shape[2:], kernel, stride, padding, dilation, output_padding)
    pixels = x.reshape(x.shape[0], 4, groups, q // groups, x.shape[2] * x.shape[3])
    w = weight.reshape(4, groups, q // groups, p, -1)
    windows = torch.einsum("abc,bgqpk,nagql->ncgpkl", structure_tensor(x.dtype, x.device), w, pixels)
    windows = windows.reshape(x.shape[0], 4 * groups * p * kernel[0] * kernel[1], x.shape[2] * x.shape[3])
    y = F.fold(windows, size, tuple(kernel), dilation, padding, stride)
    return y if bias is None else y + bias.view(-1, 1, 1)


def conv_output_size(size: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints) -> tuple[int, int]:
    """Height and width of a convolution's output."""
    axes = zip(size, kernel, stride, padding, dilation, strict=True)
    height, width = ((n + 2 * pad - d * (k - 1) - 1) // step + 1 for n, k, step, pad, d in axes)
    return height, width


def transposed_output_size(
    size: Ints, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, output_padding: Ints
) -> tuple[int, int]:
    """Height and width of a transposed convolution's output."""
    axes = zip(size, kernel, stride, padding, dilation, output_padding, strict=True)
    height, width = ((n - 1) * step - 2 * pad + d * (k - 1) + extra + 1 for n, k, step, pad, d, extra in axes)
    return height, width
