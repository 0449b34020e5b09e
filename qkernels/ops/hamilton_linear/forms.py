"""The linear map's three products in plain PyTorch: one real product ("dense") or eight thin ones ("q8")."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels import algebra


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """y = weight (x) x + bias."""
    if form in ("dense", "real"):
        real = (algebra.expand_weight if form == "dense" else algebra.real_weight)(weight)
        return F.linear(x, real, bias)
    z = torch.bmm(_products(algebra.input_products, x), algebra.weight_products(weight).mT)
    y = algebra.output_from_products(z.transpose(0, 1)).flatten(1)
    return (y if bias is None else y + bias).to(x.dtype)


def data_gradient(dy: Tensor, weight: Tensor, form: str) -> Tensor:
    """dx, the gradient of <dy, weight (x) x>."""
    if form == "dense":
        return dy @ algebra.expand_weight(weight)
    z = torch.bmm(_products(algebra.output_products, dy), algebra.weight_products(weight))
    return algebra.input_from_products(z.transpose(0, 1)).flatten(1).to(dy.dtype)


def weight_gradient(dy: Tensor, x: Tensor, form: str) -> Tensor:
    """dw, the gradient of <dy, weight (x) x>."""
    if form == "dense":
        return algebra.contract_weight(dy.mT @ x)
    z = torch.bmm(_products(algebra.output_products, dy).mT, _products(algebra.input_products, x))
    return algebra.weight_from_products(z).to(x.dtype)


def _products(transform: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`[8, M, K]` from `[M, 4 K]`."""
    return transform(x.unflatten(1, (4, -1))).transpose(0, 1)
