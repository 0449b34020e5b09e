"""The linear map's three products in plain PyTorch: one real product ("dense") or eight thin ones ("q8")."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels import algebra


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, form: str, product_weight: Tensor | None = None) -> Tensor:
    """y = weight (x) x + bias; `product_weight` is `algebra.product_weight` of the weight, if it is there already."""
    real = algebra.product_weight(weight, form) if product_weight is None else product_weight
    if form in ("dense", "real"):
        return F.linear(x, real, bias)
    y = _rows(algebra.output_from_products, torch.bmm(_products(algebra.input_products, x), real.mT))
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def gradients(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    wanted: Sequence[bool],
    form: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dw and db, as far as they are wanted: of the gradient by y, and the operands that these need."""
    need_x, need_weight, need_bias = wanted
    dx, dw = None, None
    outputs = _products(algebra.output_products, dy) if form == "q8" and (need_x or need_weight) else dy
    if need_x:
        assert weight is not None
        real = algebra.product_weight(weight, form)
        dx = _rows(algebra.input_from_products, torch.bmm(outputs, real)).to(dy.dtype) if form == "q8" else dy @ real
    if need_weight:
        assert x is not None
        if form == "q8":
            products = torch.bmm(outputs.mT, _products(algebra.input_products, x))
            dw = algebra.weight_from_products(products).to(x.dtype)
        else:
            dw = algebra.contract_weight(dy.mT @ x)
    return dx, dw, dy.sum(0) if need_bias else None


def _products(transform: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`[8, M, K]` from `[M, 4 K]`."""
    return transform(x.unflatten(1, (4, -1))).transpose(0, 1)


def _rows(transform: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """`[M, 4 K]` from `[8, M, K]`."""
    return transform(z.transpose(0, 1)).flatten(1)
