"""The Hamilton product as real linear algebra: the one place that holds its signs.

Components are numbered r, i, j, k = 0, 1, 2, 3. The product of the units ``b`` and ``c`` is, up to sign, the
unit ``b ^ c``, so the left product y = w (x) x is

    y_a = sum over c of SIGNS[a][c] * w_(a ^ c) * x_c.

The same bilinear map needs only 8 real products instead of 16 (Howell & Lafon 1975):

    y  = C   [ (A w) * (B x) ]
    dx = B^T [ (A w) * (C^T dy) ]
    dw = A^T [ (B x) * (C^T dy) ]

with A = [H/4; -2 w-order], B = [H; x-order], C = S [H | I], H the 4x4 Hadamard matrix, S = diag(-1, 1, 1, 1).
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SIGNS = (
    (1, -1, -1, -1),
    (1, 1, -1, 1),
    (1, 1, 1, -1),
    (1, -1, 1, 1),
)
HADAMARD = (
    (1, 1, 1, 1),
    (1, -1, 1, -1),
    (1, 1, -1, -1),
    (1, -1, -1, 1),
)
# Which component of the weight, and of the input, the last four of the 8 products take.
WEIGHT_ORDER = (0, 3, 1, 2)
INPUT_ORDER = (0, 2, 3, 1)
OUTPUT_ORDER = (0, 1, 2, 3)
# The scales that A gives to its Hadamard and to its plain products.
WEIGHT_SCALES = (0.25, -2.0)

FEW = 2**17
"""Largest number of values of a weight that one product expands: with as few, calls take longer than values."""


def structure_tensor(dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    """The tensor T of the left product, y_a = sum over b, c of T[a, b, c] w_b x_c.

    Args:
        dtype: element type of the result.
        device: device of the result.

    Returns:
        `[4, 4, 4]`.

    >>> i, j = torch.eye(4)[1], torch.eye(4)[2]
    >>> torch.einsum("abc,b,c->a", structure_tensor(torch.float32), i, j)  # i j = k
    tensor([0., 0., 0., 1.])
    """
    table = [[[SIGNS[a][c] if b == a ^ c else 0 for c in range(4)] for b in range(4)] for a in range(4)]
    return torch.tensor(table, dtype=dtype, device=device)


def eight_products() -> tuple[Tensor, Tensor, Tensor]:
    """The matrices of the 8-product algorithm, y = C ((A w) * (B x)), in float64.

    Returns:
        A `[8, 4]`, B `[8, 4]`, C `[4, 8]`.
    """
    hadamard = torch.tensor(HADAMARD, dtype=torch.float64)
    unit = torch.eye(4, dtype=torch.float64)
    head, tail = WEIGHT_SCALES
    a = torch.cat([head * hadamard, tail * unit[list(WEIGHT_ORDER)]])
    b = torch.cat([hadamard, unit[list(INPUT_ORDER)]])
    c = torch.cat([hadamard, unit[list(OUTPUT_ORDER)]]).T.contiguous()
    c[0] *= -1
    return a, b, c


def expand_weight(weight: Tensor, groups: int = 1) -> Tensor:
    """The real weight whose ordinary product equals the Hamilton product; not to be differentiated, see `real_weight`.

    Args:
        weight: `[4, P, Q/groups, *kernel]`.
        groups: number of groups of the quaternion channels.

    Returns:
        `[4 P, 4 Q/groups, *kernel]`; rows ordered (group, component, channel), columns (component, channel).
    """
    _, p, q, *kernel = weight.shape
    if _is_few(weight):
        return _real_of(_product(_expansion(weight.dtype), weight.reshape(4, -1)), weight, groups)
    parts = weight.view(4, groups, p // groups, q, *kernel)
    real = weight.new_empty(groups, 4, p // groups, 4, q, *kernel)
    signed = {1: parts, -1: -parts}
    for a in range(4):
        torch.stack([signed[SIGNS[a][c]][a ^ c] for c in range(4)], dim=2, out=real[:, a])
    return real.view(4 * p, 4 * q, *kernel)


def _is_few(weight: Tensor, times: int = 1) -> bool:
    """Whether one product expands a weight, or contracts a real weight, which has 4 times as many values."""
    return weight.numel() <= times * FEW and weight.device.type == "cpu" and weight.dtype == _wide_dtype(weight)


@functools.cache
def _expansion(dtype: torch.dtype) -> Tensor:
    """`[16, 4]`: the blocks of the real weight, row by row, from the components."""
    return structure_tensor(dtype).transpose(1, 2).reshape(16, 4)


class ExpandWeights(torch.autograd.Function):
    """`expand_weight` of several weights, in one product if all are small; `apply(groups, *weights)` returns a tuple.

    The real weight of a weight that needs no gradient needs none; a weight whose real weight gets no gradient has None.
    """

    @staticmethod
    def forward(ctx: Any, groups: int, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.groups = groups
        ctx.set_materialize_grads(False)
        reals = _expanded(groups, *weights)
        ctx.mark_non_differentiable(
            *(real for real, needed in zip(reals, ctx.needs_input_grad[1:], strict=True) if not needed)
        )
        return reals

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_of_those_there(ContractWeights.apply if torch.is_grad_enabled() else _contracted, ctx, gradients)


class ContractWeights(torch.autograd.Function):
    """`contract_weight` of several real weights, the derivative of `ExpandWeights`, whose derivative is that."""

    @staticmethod
    def forward(ctx: Any, groups: int, *reals: Tensor) -> tuple[Tensor, ...]:
        ctx.groups = groups
        ctx.set_materialize_grads(False)
        return _contracted(groups, *reals)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_of_those_there(ExpandWeights.apply, ctx, gradients)


def _of_those_there(function: Any, ctx: Any, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The function's results for the gradients that are not None."""
    places = [place for place, gradient in enumerate(gradients) if gradient is not None]
    results: list[Tensor | None] = [None] * len(gradients)
    if places:
        own = function(ctx.groups, *(gradients[place] for place in places))
        for place, result in zip(places, own, strict=True):
            results[place] = result
    return results


def _expanded(groups: int, *weights: Tensor) -> tuple[Tensor, ...]:
    if len(weights) == 1 or not all(map(_is_few, weights)):
        return tuple(expand_weight(weight, groups) for weight in weights)
    blocks = _product(_expansion(weights[0].dtype), torch.cat([weight.reshape(4, -1) for weight in weights], 1))
    parts = blocks.split([weight.numel() // 4 for weight in weights], 1)
    return tuple(_real_of(part, weight, groups) for part, weight in zip(parts, weights, strict=True))


def _contracted(groups: int, *reals: Tensor) -> tuple[Tensor, ...]:
    if len(reals) == 1 or not all(_is_few(real, 4) for real in reals):
        return tuple(contract_weight(real.contiguous(), groups) for real in reals)
    sizes = [real.numel() // 16 for real in reals]
    blocks = reals[0].new_empty(16, sum(sizes))
    for part, real in zip(blocks.split(sizes, 1), reals, strict=True):
        own = _blocks_of(real, groups)
        part.view(own.shape).copy_(own)
    parts = _product(_expansion(blocks.dtype).t(), blocks).split(sizes, 1)
    return tuple(
        part.reshape(4, real.shape[0] // 4, real.shape[1] // 4, *real.shape[2:])
        for part, real in zip(parts, reals, strict=True)
    )


def _real_of(blocks: Tensor, weight: Tensor, groups: int) -> Tensor:
    """The real weight of its 4 x 4 blocks `[16, P Q/groups ...]`; `weight` has the quaternion weight's shape."""
    _, p, q, *kernel = weight.shape
    return blocks.view(4, 4, groups, p // groups, -1).permute(2, 0, 3, 1, 4).reshape(4 * p, 4 * q, *kernel)


def _blocks_of(real: Tensor, groups: int) -> Tensor:
    """The blocks `[4, 4, groups, P/groups, Q/groups ...]` of a real weight."""
    return real.reshape(groups, 4, real.shape[0] // (4 * groups), 4, -1).permute(1, 3, 0, 2, 4)


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x y in the operands' type: autocast leaves operators with an output alone."""
    return torch.mm(x, y, out=x.new_empty(x.shape[0], y.shape[1]))


def real_weight(weight: Tensor, groups: int = 1) -> Tensor:
    """The same as `expand_weight`, of operators that can be differentiated, transformed and exported; copies twice."""
    _, p, q, *kernel = weight.shape
    parts = weight.reshape(4, groups, p // groups, q, *kernel)
    rows = [torch.stack([SIGNS[a][c] * parts[a ^ c] for c in range(4)], dim=2) for a in range(4)]
    return torch.stack(rows, dim=1).reshape(4 * p, 4 * q, *kernel)


def contract_weight(real: Tensor, groups: int = 1) -> Tensor:
    """The adjoint of `expand_weight`: gradient of the real weight in, of the quaternion weight out.

    Args:
        real: `[4 P, 4 Q/groups, *kernel]`.
        groups: number of groups of the quaternion channels.

    Returns:
        `[4, P, Q/groups, *kernel]`, summed in float32 or wider and rounded once.
    """
    rows, columns, *kernel = real.shape
    if _is_few(real, 4):
        products = _product(_expansion(real.dtype).t(), _blocks_of(real, groups).reshape(16, -1))
        return products.view(4, rows // 4, columns // 4, *kernel)
    blocks = real.view(groups, 4, rows // (4 * groups), 4, columns // 4, *kernel)
    shape = (4, groups, rows // (4 * groups), columns // 4, *kernel)
    weight = torch.zeros(shape, dtype=_wide_dtype(real), device=real.device)
    for a in range(4):
        for c in range(4):
            weight[a ^ c].add_(blocks[:, a, :, c], alpha=SIGNS[a][c])
    return weight.view(4, rows // 4, columns // 4, *kernel).to(real.dtype)


def product_weight(weight: Tensor, form: str, groups: int = 1) -> Tensor:
    """The weight of a form's real products: "dense" and "real" have one, "q8" the eight of `weight_products`."""
    if form == "q8":
        return weight_products(weight)
    return (expand_weight if form == "dense" else real_weight)(weight, groups)


def weight_products(weight: Tensor) -> Tensor:
    """A w: `[4, ...]` to `[8, ...]`; half types come back as float32."""
    return _analyse(_widen(weight).unbind(0), 0, WEIGHT_ORDER, *WEIGHT_SCALES)


def weight_from_products(products: Tensor) -> Tensor:
    """A^T z: `[8, ...]` to `[4, ...]`; overwrites `products`."""
    return _synthesise(products, 0, WEIGHT_ORDER, *WEIGHT_SCALES)


def input_products(x: Tensor) -> Tensor:
    """B x over dimension 1: `[B, 4, ...]` to `[B, 8, ...]`; half types come back as float32."""
    return _analyse(_widen(x).unbind(1), 1, INPUT_ORDER)


def input_from_products(products: Tensor) -> Tensor:
    """B^T z over dimension 1: `[B, 8, ...]` to `[B, 4, ...]`; overwrites `products`."""
    return _synthesise(products, 1, INPUT_ORDER)


def output_products(dy: Tensor) -> Tensor:
    """C^T dy over dimension 1: `[B, 4, ...]` to `[B, 8, ...]`; half types come back as float32."""
    r, i, j, k = _widen(dy).unbind(1)
    return _analyse((-r, i, j, k), 1, OUTPUT_ORDER)


def output_from_products(products: Tensor) -> Tensor:
    """C z over dimension 1: `[B, 8, ...]` to `[B, 4, ...]`; overwrites `products`."""
    y = _synthesise(products, 1, OUTPUT_ORDER)
    y.select(1, 0).neg_()
    return y


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _widen(x: Tensor) -> Tensor:
    """A sum of components rounds in half types: it is taken in float32."""
    return x.to(_wide_dtype(x))


def _analyse(parts: Sequence[Tensor], dim: int, order: Sequence[int], head: float = 1.0, tail: float = 1.0) -> Tensor:
    """[head H x; tail x in `order`]. The output is its own scratch: temporaries cost more than the sums."""
    shape = list(parts[1].shape)
    out = parts[1].new_empty(*shape[:dim], 8, *shape[dim:])
    products = out.unbind(dim)
    _hadamard(parts, scratch=products[4:], out=products[:4])
    if head != 1.0:
        out.narrow(dim, 0, 4).mul_(head)
    for product, component in zip(products[4:], order, strict=True):
        torch.mul(parts[component], tail, out=product)
    return out


def _synthesise(products: Tensor, dim: int, order: Sequence[int], head: float = 1.0, tail: float = 1.0) -> Tensor:
    """The adjoint of `_analyse`; uses `products` as scratch."""
    shape = list(products.shape)
    shape[dim] = 4
    out = products.new_empty(shape)
    parts = products.unbind(dim)
    _hadamard(parts[:4], scratch=out.unbind(dim), out=parts[:4])
    if head != 1.0:
        products.narrow(dim, 0, 4).mul_(head)
    for plain, component in zip(parts[4:], order, strict=True):
        torch.add(parts[component], plain, alpha=tail, out=out.select(dim, component))
    return out


def _hadamard(x: Sequence[Tensor], scratch: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """out = H x in 8 additions; `out` may be `x`, `scratch` must not overlap either."""
    torch.add(x[0], x[1], out=scratch[0])
    torch.sub(x[0], x[1], out=scratch[1])
    torch.add(x[2], x[3], out=scratch[2])
    torch.sub(x[2], x[3], out=scratch[3])
    torch.add(scratch[0], scratch[2], out=out[0])
    torch.add(scratch[1], scratch[3], out=out[1])
    torch.sub(scratch[0], scratch[2], out=out[2])
    torch.sub(scratch[1], scratch[3], out=out[3])
