"""Definition of the Hamilton linear map: one einsum over the structure tensor, by plain autograd."""

import torch
from torch import Tensor

from qkernels.algebra import structure_tensor


def hamilton_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = weight (x) x + bias over the last dimension.

    Args:
        x: `[..., 4 K]`, planar `[r | i | j | k]`.
        weight: `[4, N, K]`.
        bias: `[4 N]`.

    Returns:
        `[..., 4 N]`.
    """
    components = x.unflatten(-1, (4, -1))
    tensor = structure_tensor(x.dtype, x.device)
    y = torch.einsum("abc,bpq,...cq->...ap", tensor, weight, components).flatten(-2)
    return y if bias is None else y + bias
