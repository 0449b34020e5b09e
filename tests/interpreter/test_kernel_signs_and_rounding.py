"""The kernels' unrolled signs against the one table, and what tf32 does to operands."""

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from interpreted import Tiles, assert_accurate, to_tf32
from triton.runtime import interpreter

import qkernels
from qkernels.algebra import SIGNS
from qkernels.ops import _launch
from qkernels.ops.hamilton_conv import kernels, launch, reference
from qkernels.ops.hamilton_conv.config import Tile

UNIT = (1, 1, 0, 0, 1, 1, 1)
# sign[component of y, of x]; the weight's component is the exclusive or of both.
SIGN = torch.tensor(SIGNS, dtype=torch.float32)


# Of few channels one by one, and of channels in blocks (config.Problem.flat), which q8 always takes.
STYLES = {"flat": ("signed-ieee", Tile(16, 4, 8, 4, 1)), "blocks": ("signed-ieee", Tile(16, 4, 1, 4, 1)),
          "q8": ("q8-ieee", Tile(16, 4, 4, 4, 1))}  # fmt: skip


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("style", STYLES)
def test_all_unit_products(style: str, splits: int, tiles: Tiles) -> None:
    """16 products of units through the convolution, its adjoint and the weight gradient, as one sum or split."""
    (algorithm, tiles.style), tiles.splits = STYLES[style], splits
    # Row b of the weight is the unit b; image c is the unit c. The second position lies on zeros.
    weight = torch.eye(4).view(4, 4, 1, 1, 1).repeat(1, 1, 1, 1, 2)
    x = torch.nn.functional.pad(torch.eye(4).view(4, 4, 1, 1), (0, 1))
    y = launch.forward(x, weight, UNIT, algorithm).view(4, 4, 4)  # [image, component, row]
    for b in range(4):
        for c in range(4):
            expected = torch.zeros(4)
            expected[b ^ c] = SIGN[b ^ c, c]
            assert y[c, :, b].tolist() == expected.tolist()
    # <dy, w x> seen from x: the unit b is a column now, dy the unit a.
    dy = torch.eye(4).view(4, 4, 1, 1)
    dx = launch.data_gradient(dy, weight.transpose(1, 2), [1, 2], UNIT, algorithm)
    for b in range(4):
        for a in range(4):
            expected = torch.zeros(4)
            expected[a ^ b] = SIGN[a, a ^ b]
            assert dx.view(4, 4, 4, 2)[a, :, b, 0].tolist() == expected.tolist()
    # Seen from w, over two images of which the second is empty: row a of dy is the unit a, column c of x the unit c.
    x = torch.stack([torch.eye(4), torch.zeros(4, 4)]).view(2, 16, 1, 1).repeat(16, 1, 1, 1) / 16
    dw, _ = launch.weight_gradient(x * 16, x, [1, 1], UNIT, False, algorithm)
    for a in range(4):
        for c in range(4):
            expected = torch.zeros(4)
            expected[a ^ c] = SIGN[a, c]
            assert dw[:, a, c, 0, 0].tolist() == expected.tolist()


@triton.jit
def _rounding_kernel(x_ptr, y_ptr, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, kernels._rounded(tl.load(x_ptr + at), PRECISION))


def run(x: torch.Tensor, y: torch.Tensor, precision: str) -> None:
    _launch.run(_rounding_kernel, (1,), {"x_ptr": x, "y_ptr": y, "PRECISION": precision, "BLOCK": len(x)})


def bits(*values: Any) -> Any:
    return torch.tensor(values, dtype=torch.int64).to(torch.int32).view(torch.float32)


ROUNDED = [
    (0x3F800000, 0x3F800000),  # 1
    (0x3F800FFF, 0x3F800000),  # just below half a unit: down
    (0x3F801000, 0x3F802000),  # half a unit above an even value: away from zero
    (0x3F803000, 0x3F804000),  # half a unit above an odd value
    (0x3F801001, 0x3F802000),
    (0x3FFFF000, 0x40000000),  # into the next exponent
    (0xBF801000, 0xBF802000),  # the same for negatives
    (0xBF800FFF, 0xBF800000),
    (0x00001000, 0x00002000),  # subnormals
    (0x00000FFF, 0x00000000),
    (0x807FFFFF, 0x80800000),
    (0x00000000, 0x00000000),
    (0x80000000, 0x80000000),  # -0
    (0x7F7FFFFF, 0x7F800000),  # beyond the largest tf32 value: infinity
    (0x7F800000, 0x7F800000),
    (0xFF800000, 0xFF800000),
]


def test_rounding_to_tf32() -> None:
    x = bits(*(value for value, _ in ROUNDED))
    y = torch.empty_like(x)
    run(x, y, "tf32")
    assert y.view(torch.int32).tolist() == bits(*(value for _, value in ROUNDED)).view(torch.int32).tolist()
    run(x, y, "ieee")
    assert torch.equal(y, x)


def test_rounding_keeps_nan() -> None:
    # The second one would become -0 by the addition alone.
    x = bits(0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001)
    y = torch.empty_like(x)
    run(x, y, "tf32")
    assert y.isnan().all()


@pytest.fixture
def operands_of_products(monkeypatch: pytest.MonkeyPatch) -> Any:
    """(precision, whether tf32 holds both operands) of each product."""
    seen = []
    create_dot = interpreter.InterpreterBuilder.create_dot

    def spy(self: Any, a: Any, b: Any, acc: Any, precision: Any, most: Any) -> Any:
        parts = [operand.data for operand in (a, b)]
        fits = all(part.dtype == np.float32 and not (part.view(np.uint32) & 0x1FFF).any() for part in parts)
        seen.append((precision.name, fits))
        return create_dot(self, a, b, acc, precision, most)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", spy)
    return seen


def allow(kind: Any, allowed: Any) -> None:
    switch = torch.backends.cudnn.conv if kind == "conv" else torch.backends.cuda.matmul
    switch.fp32_precision = "tf32" if allowed else "ieee"


def results(kind: Any, form: str, between: Any = lambda: None) -> Any:
    """Output and gradients of an operator on random operands, and these; `between` its forward and its backward."""
    torch.manual_seed(0)
    kernel = (1, 2) if kind == "conv" else ()
    operands = [torch.randn(2, 12, *kernel), torch.randn(4, 3, 3, *kernel), torch.randn(12)]
    x, weight, bias = (t.requires_grad_() for t in operands)
    function = qkernels.hamilton_conv2d if kind == "conv" else qkernels.hamilton_linear
    with qkernels.set_backend("triton"), qkernels.set_form(form):
        y = function(x, weight, bias)
        dy = torch.randn(y.shape)
        between()
        return [y, *torch.autograd.grad(y, operands, dy)], (x, weight, bias, dy)


def exact(kind: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dy: torch.Tensor) -> Any:
    function = reference.hamilton_conv2d if kind == "conv" else qkernels.reference.hamilton_linear
    x, weight, bias = (t.detach().double().requires_grad_() for t in (x, weight, bias))
    y = function(x, weight, bias)
    return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy.double())]


@pytest.mark.parametrize("kind", ["conv", "matmul"])
def test_tf32_operands_are_rounded_where_the_switch_allows_it(kind: str, operands_of_products: Any) -> None:
    """Products are exact here, so the result is that of the rounded operands; each kind follows its own switch.

    A backward multiplies as its forward did, whatever the switch says by then.
    """
    allow(kind, True)
    values, (x, weight, bias, dy) = results(kind, "auto", lambda: allow(kind, False))
    assert set(operands_of_products) == {("TF32", True)}
    rounded = [to_tf32(t) for t in (x, weight)]
    for value, truth in zip(values, exact(kind, *rounded, bias, to_tf32(dy)), strict=True):
        assert_accurate(value, truth, 2e-6)
    plain = exact(kind, x, weight, bias, dy)
    assert min((value - truth).norm() / truth.norm() for value, truth in zip(values, plain, strict=True)) > 5e-5
    allow({"conv": "matmul", "matmul": "conv"}[kind], True)
    for form in ("signed", "q8"):
        operands_of_products.clear()
        values, operands = results(kind, form, lambda: allow(kind, True))
        allow(kind, False)
        assert {precision for precision, _ in operands_of_products} == {"IEEE"}
        for value, truth in zip(values, exact(kind, *operands), strict=True):
            assert_accurate(value, truth, 2e-6)


@pytest.mark.parametrize("kind", ["conv", "matmul"])
def test_no_tf32_sums_of_components(kind: str) -> None:
    """q8 adds components: tensor cores would cut the low bits of the sums off."""
    allow(kind, True)
    with pytest.raises(ValueError, match="form 'q8' of the Triton kernels is for float32 operands without TF32"):
        results(kind, "q8")
