"""The kernels' unrolled signs against the one table, and what tf32 does to operands."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from interpreted import FORMS, assert_accurate
from triton.runtime import interpreter

import qkernels
from qkernels.algebra import SIGNS
from qkernels.ops import _launch
from qkernels.ops.hamilton_conv import kernels, launch, reference
from qkernels.ops.hamilton_conv.launch import Source

ONES = ([1, 1], [0, 0], [1, 1], 1)
# sign[component of y, of x]; the weight's component is the exclusive or of both.
SIGN = torch.tensor(SIGNS, dtype=torch.float32)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_all_unit_products(form, splits, tiles):
    """16 products of units through the convolution, its adjoint and the weight gradient, as one sum or split."""
    tiles.splits = splits
    # Row b of the weight is the unit b; image c is the unit c. The second tap lies on zeros.
    weight = torch.eye(4).view(4, 4, 1, 1, 1).repeat(1, 1, 1, 1, 2)
    x = torch.nn.functional.pad(torch.eye(4).view(4, 4, 1, 1), (0, 1))
    y = launch.forward(x, weight, None, *ONES, False, form).view(4, 4, 4)  # [image, component, row]
    for b in range(4):
        for c in range(4):
            expected = torch.zeros(4)
            expected[b ^ c] = SIGN[b ^ c, c]
            assert y[c, :, b].tolist() == expected.tolist()
    # <dy, w x> seen from x: the unit b is a column now, dy the unit a.
    dy = torch.eye(4).view(4, 4, 1, 1)
    dx = launch.data_gradient(Source(dy), weight.transpose(1, 2), None, [1, 2], *ONES, form)
    for b in range(4):
        for a in range(4):
            expected = torch.zeros(4)
            expected[a ^ b] = SIGN[a, a ^ b]
            assert dx.view(4, 4, 4, 2)[a, :, b, 0].tolist() == expected.tolist()
    # Seen from w, over two images of which the second is empty: row a of dy is the unit a, column c of x the unit c.
    x = torch.stack([torch.eye(4), torch.zeros(4, 4)]).view(2, 16, 1, 1)
    dw, _ = launch.weight_gradient(Source(x), x, [1, 1], *ONES, False, form)
    for a in range(4):
        for c in range(4):
            expected = torch.zeros(4)
            expected[a ^ c] = SIGN[a, c]
            assert dw[:, a, c, 0, 0].tolist() == expected.tolist()


@triton.jit
def _rounding_kernel(x_ptr, y_ptr, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, kernels._rounded(tl.load(x_ptr + at), PRECISION))


def run(x, y, precision):
    _launch.run(_rounding_kernel, (1,), {"x_ptr": x, "y_ptr": y, "PRECISION": precision, "BLOCK": len(x)})


def bits(*values):
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


def test_rounding_to_tf32():
    x = bits(*(value for value, _ in ROUNDED))
    y = torch.empty_like(x)
    run(x, y, "tf32")
    assert y.view(torch.int32).tolist() == bits(*(value for _, value in ROUNDED)).view(torch.int32).tolist()
    run(x, y, "ieee")
    assert torch.equal(y, x)


def test_rounding_keeps_nan():
    # The second one would become -0 by the addition alone.
    x = bits(0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001)
    y = torch.empty_like(x)
    run(x, y, "tf32")
    assert y.isnan().all()


def to_tf32(x):
    """The nearest multiple of 2^-10 of the power of two below, in Python numbers."""

    def nearest(value):
        if value == 0:
            return 0.0
        unit = 2.0 ** (math.frexp(value)[1] - 11)
        return math.copysign(math.floor(abs(value) / unit + 0.5) * unit, value)

    return torch.tensor([nearest(value) for value in x.flatten().tolist()], dtype=torch.float64).view(x.shape)


@pytest.fixture
def operands_of_products(monkeypatch):
    """(precision, whether tf32 holds both operands) of each product."""
    seen = []
    create_dot = interpreter.InterpreterBuilder.create_dot

    def spy(self, a, b, acc, precision, most):
        parts = [operand.data for operand in (a, b)]
        fits = all(part.dtype == np.float32 and not (part.view(np.uint32) & 0x1FFF).any() for part in parts)
        seen.append((precision.name, fits))
        return create_dot(self, a, b, acc, precision, most)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", spy)
    return seen


def allow(kind, allowed):
    switch = torch.backends.cudnn.conv if kind == "conv" else torch.backends.cuda.matmul
    switch.fp32_precision = "tf32" if allowed else "ieee"


def results(kind, form):
    """Output and gradients of an operator on random operands, and the function and the operands themselves."""
    torch.manual_seed(0)
    kernel = (1, 2) if kind == "conv" else ()
    operands = [torch.randn(2, 12, *kernel), torch.randn(4, 3, 3, *kernel), torch.randn(12)]
    x, weight, bias = (t.requires_grad_() for t in operands)
    function = qkernels.hamilton_conv2d if kind == "conv" else qkernels.hamilton_linear
    with qkernels.set_backend("triton"), qkernels.set_form(form):
        y = function(x, weight, bias)
        dy = torch.randn(y.shape)
        return [y, *torch.autograd.grad(y, operands, dy)], (x, weight, bias, dy)


def exact(kind, x, weight, bias, dy):
    function = reference.hamilton_conv2d if kind == "conv" else qkernels.reference.hamilton_linear
    x, weight, bias = (t.detach().double().requires_grad_() for t in (x, weight, bias))
    y = function(x, weight, bias)
    return [y.detach(), *torch.autograd.grad(y, (x, weight, bias), dy.double())]


@pytest.mark.parametrize("form", ["dense", "q16"])
@pytest.mark.parametrize("kind", ["conv", "matmul"])
def test_tf32_operands_are_rounded_where_the_switch_allows_it(kind, form, operands_of_products):
    """Products are exact here, so the result is that of the rounded operands; each kind follows its own switch."""
    allow(kind, True)
    values, (x, weight, bias, dy) = results(kind, form)
    assert set(operands_of_products) == {("TF32", True)}
    y, dx, dw, db = values
    rounded = [to_tf32(t) for t in (x, weight)]
    for value, truth in zip((y, dx, dw), exact(kind, *rounded, bias, to_tf32(dy)), strict=False):
        assert_accurate(value, truth, 2e-6)
    _, *plain, exact_db = exact(kind, x, weight, bias, dy)
    assert_accurate(db, exact_db, 2e-6)  # a sum, not a product
    assert min((value - truth).norm() / truth.norm() for value, truth in zip((dx, dw), plain, strict=True)) > 5e-5
    operands_of_products.clear()
    allow(kind, False)
    allow({"conv": "matmul", "matmul": "conv"}[kind], True)
    values, operands = results(kind, form)
    assert {precision for precision, _ in operands_of_products} == {"IEEE"}
    for value, truth in zip(values, exact(kind, *operands), strict=True):
        assert_accurate(value, truth, 2e-6)


@pytest.mark.parametrize("kind", ["conv", "matmul"])
def test_tf32_sums_of_components_are_rounded(kind, operands_of_products):
    """q8: tensor cores would cut the low bits of the Hadamard operands off, for the error of section 4."""
    allow(kind, True)
    values, operands = results(kind, "q8")
    assert set(operands_of_products) == {("TF32", True)}
    for value, truth in zip(values, exact(kind, *operands), strict=True):
        assert_accurate(value, truth, 6e-4)
