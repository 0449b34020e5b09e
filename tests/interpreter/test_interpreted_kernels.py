"""Every kernel, form and type over odd geometries, against the definition in float64."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import triton.language as tl
from interpreted import DTYPES, FORMS, TOLERANCE, assert_accurate, in_nan
from triton.runtime import interpreter

from qkernels import algebra
from qkernels.ops.hamilton_conv import launch, reference
from qkernels.ops.hamilton_conv.config import Plan, Tile
from qkernels.ops.hamilton_conv.launch import Source

# B, Q, P, H, W, kernel, stride, padding, dilation, groups
CASES = {
    "one pixel": (1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1": (2, 2, 3, 3, 4, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1 strided": (1, 3, 2, 5, 4, (1, 1), (2, 3), (0, 0), (1, 1), 1),
    "3x3": (1, 1, 2, 5, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "padding over the kernel": (1, 2, 1, 2, 3, (1, 2), (1, 1), (2, 3), (1, 1), 1),
    "3x2 strided": (2, 1, 1, 7, 6, (3, 2), (2, 1), (1, 0), (1, 1), 1),
    "stride over the kernel": (2, 2, 3, 6, 5, (2, 1), (3, 2), (1, 0), (1, 1), 1),
    "dilated": (1, 2, 1, 8, 7, (3, 2), (1, 2), (2, 1), (2, 3), 1),
    "stride and dilation of a common factor": (1, 1, 2, 14, 3, (4, 2), (6, 1), (1, 0), (4, 1), 1),
    "pixels under no window": (1, 2, 2, 6, 7, (2, 2), (1, 4), (0, 0), (3, 1), 1),
    "grouped": (2, 4, 6, 3, 4, (1, 2), (1, 1), (0, 1), (1, 1), 2),
    "depthwise": (1, 3, 3, 5, 5, (2, 2), (2, 2), (1, 1), (1, 1), 3),
    "17 channels": (1, 17, 17, 2, 3, (1, 2), (1, 1), (0, 1), (1, 1), 1),
    "17 to 1": (3, 17, 1, 3, 3, (2, 1), (1, 1), (0, 0), (1, 1), 1),
    "1 to 17": (3, 1, 17, 3, 3, (1, 2), (1, 2), (0, 1), (1, 1), 1),
}
POOLED = {
    "odd map": (2, 1, 2, 5, 7, (1, 3), (1, 1), (0, 1), (1, 1), 1),
    "strided": (1, 2, 1, 9, 8, (2, 1), (2, 1), (1, 0), (1, 1), 1),
    "grouped": (1, 2, 4, 4, 3, (1, 2), (1, 1), (0, 1), (1, 1), 2),
    "one window": (3, 3, 3, 3, 2, (1, 1), (1, 1), (0, 0), (1, 1), 1),
}


def square(cases, everything=False):
    """(case, form, type, splits, style, bias): a Latin square of forms, types and splits; other types are slow."""
    parameters = []
    for i, (name, case) in enumerate(cases.items()):
        for f, form in enumerate(FORMS):
            for d in range(3) if everything else [0]:
                dtype = DTYPES[(i + f + d) % 3]
                splits, style, biased = 1 + (i + 2 * f) % 3, ("whole", "cut")[(i + f) % 2], (i // 2 + f) % 2 == 0
                values = (case, form, dtype, splits, style, biased)
                id = f"{name}-{form}-{str(dtype)[6:]}-{splits} splits-{style}{'-bias' * biased}"
                marks = [pytest.mark.slow] if d else []
                parameters.append(pytest.param(*values, id=id, marks=marks))
    return parameters


def operands(case, dtype):
    batch, q, p, height, width, kernel, *_, groups = case
    x = in_nan(torch.randn(batch, 4 * q, height, width).to(dtype))
    return x, torch.randn(4, p, q // groups, *kernel).to(dtype), torch.randn(4 * p).to(dtype)


def definition(x, weight, bias, window):
    """Exact operands that want gradients, and what they give in front of an epilogue."""
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    return leaves, reference.hamilton_conv2d(*leaves, *window)


def check_gradients(source, gradient, case, x, weight, bias, form, biased):
    """Both gradients of the source, which is `gradient`; a transposed convolution may have a bias of its own."""
    dtype, window, kernel = x.dtype, case[6:], case[5]
    leaves, y = definition(x, weight, bias, window)
    dx, dw, db = torch.autograd.grad(y, leaves, gradient)
    shift = torch.randn(x.shape[1]).to(dtype) if biased else None
    actual = launch.data_gradient(source, weight, shift, x.shape[2:], *window, form)
    assert_accurate(actual, dx + shift.double().view(-1, 1, 1) if biased else dx, TOLERANCE[dtype, form])
    actual, actual_bias = launch.weight_gradient(source, x, kernel, *window, biased, form)
    assert_accurate(actual, dw, TOLERANCE[dtype, form])
    if biased:
        assert_accurate(actual_bias, db, TOLERANCE[dtype, "dense"])
    else:
        assert actual_bias.numel() == 0


def check_products(case, form, dtype, splits, style, biased, tiles):
    tiles.splits, tiles.style = splits, style
    x, weight, bias = operands(case, dtype)
    window = case[6:]
    bias = bias if biased else torch.zeros_like(bias)
    _, exact = definition(x, weight, bias, window)
    y = launch.forward(x, weight, bias if biased else None, *window, True, form)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_accurate(y, exact.detach().relu(), TOLERANCE[dtype, form])
    dy = torch.randn(y.shape).to(dtype)
    source = Source(in_nan(dy), in_nan(y)) if biased else Source(in_nan(dy))
    gradient = dy.double() * (y > 0) if biased else dy.double()
    check_gradients(source, gradient, case, x, weight, bias, form, biased)


@pytest.mark.parametrize(("case", "form", "dtype", "splits", "style", "biased"), square(CASES, everything=True))
def test_products_equal_the_definition(case, form, dtype, splits, style, biased, tiles):
    """y = relu(w (x) x + b), and the gradients behind that ReLU, whose mask is the kernel's own output."""
    check_products(case, form, dtype, splits, style, biased, tiles)


def test_large_kernel(tiles):
    """11x11, taps far outside of the map, the whole sum in one kernel's few steps."""
    case = (1, 1, 1, 5, 4, (11, 11), (1, 1), (5, 5), (1, 1), 1)
    check_products(case, "dense", torch.float32, 2, Tile(32, 4, 128, 4, 1), True, tiles)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["q16", "q8"])
def test_large_kernel_by_quaternions(form, tiles):
    case = (1, 1, 2, 12, 13, (11, 11), (1, 1), (5, 5), (1, 1), 1)
    check_products(case, form, torch.float32, 3, "whole", True, tiles)


def unpooled(dpooled, code, size):
    """The gradient of a map of that size, one position of the windows at a time."""
    gradient = torch.zeros(*dpooled.shape[:2], *size, dtype=torch.float64)
    height, width = (2 * n for n in dpooled.shape[2:])
    for position in range(4):
        h, w = divmod(position, 2)
        gradient[:, :, h:height:2, w:width:2] = dpooled.double() * (code == position)
    return gradient


EPILOGUES = [(True, False), (True, True), (False, True), (False, False)]


def pooled_square():
    """`square` of the pooled cases with (relu, tap), each combination once for each form; the others are slow."""
    parameters = []
    for i, parameter in enumerate(square(POOLED)):
        for e, (relu, tap) in enumerate(EPILOGUES):
            id = parameter.id + "-relu" * relu + "-tap" * tap
            marks = [] if e == (i // len(FORMS) + i % len(FORMS)) % len(EPILOGUES) else [pytest.mark.slow]
            parameters.append(pytest.param(*parameter.values, relu, tap, id=id, marks=marks))
    return parameters


def cut(x, dtype):
    """float32 to a type as the interpreter does it, see test_interpreter_cuts_bfloat16_off."""
    return (x.view(torch.int32) & -0x10000).view(torch.float32) if dtype == torch.bfloat16 else x.to(dtype)


@pytest.mark.parametrize(("case", "form", "dtype", "splits", "style", "biased", "relu", "tap"), pooled_square())
def test_pooled_products_equal_the_definition(case, form, dtype, splits, style, biased, relu, tap, tiles):
    """The maxima, which pixel each is of, and the gradients of one or both maps by the kernel's own codes and mask."""
    tiles.splits, tiles.style = splits, style
    x, weight, bias = operands(case, dtype)
    bias = bias if biased else torch.zeros_like(bias)
    window = case[6:]
    _, exact = definition(x, weight, bias, window)
    exact = exact.detach().relu() if relu else exact.detach()
    pooled, code, y = launch.forward_pool(x, weight, bias if biased else None, *window, relu, tap, form)
    tolerance = TOLERANCE[dtype, form]
    assert_accurate(pooled, torch.nn.functional.max_pool2d(exact, 2), tolerance)
    assert code.dtype == torch.uint8
    assert code.max() <= (4 if relu else 3)
    # The maximum is where the code says, up to rounding; code 4 is a window without a positive pixel.
    assert_accurate(torch.where(code < 4, pooled, 0), unpooled(torch.ones_like(pooled), code, exact.shape[2:])
                    .mul(exact).unfold(2, 2, 2).unfold(3, 2, 2).sum((4, 5)), tolerance)  # fmt: skip
    assert torch.equal(code == 4, (pooled <= 0) & relu)
    dpooled = torch.randn(pooled.shape).to(dtype)
    gradient = unpooled(dpooled, code, exact.shape[2:])
    source = Source(None, None, in_nan(dpooled), in_nan(code))
    if tap:
        assert_accurate(y, exact, tolerance)
        assert torch.equal(pooled, torch.nn.functional.max_pool2d(y.float(), 2).to(dtype))
        dy = torch.randn(y.shape).to(dtype)
        # The sum of both gradients is of their type, as the sum that autograd makes.
        total = gradient.float() + torch.where((y > 0) | (not relu), dy, 0).float()
        gradient = (total.to(dtype) if form == "q8" else cut(total, dtype)).double()
        source = Source(in_nan(dy), in_nan(y) if relu else None, *source[2:])
    else:
        assert y.numel() == 0
    check_gradients(source, gradient, case, x, weight, bias, form, biased)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_out_of_half_types(form, dtype, tiles):
    """Without the rounding of the result: products of half types are exact in float32, only q8 rounds its operands."""
    case = (1, 6, 5, 4, 5, (1, 2), (1, 1), (0, 1), (1, 1), 1)
    x, weight, bias = operands(case, dtype)
    leaves, exact = definition(x, weight, bias, case[6:])
    y = launch.forward(x, weight, bias, *case[6:], False, form, dtype=torch.float32)
    dy = torch.randn(y.shape).to(dtype)
    dx, dw, db = torch.autograd.grad(exact, leaves, dy.double())
    # Twice the 3.2e-3 of bfloat16, see TOLERANCE.
    tolerance = {"q8": 3.5e-4 if dtype == torch.float16 else 2 * 3.2e-3}.get(form, 2e-6)
    source, options = Source(dy), {"dtype": torch.float32}
    actual = launch.weight_gradient(source, x, case[5], *case[6:], True, form, **options)
    values = (y, launch.data_gradient(source, weight, None, x.shape[2:], *case[6:], form, **options), *actual)
    for value, truth in zip(values, (exact.detach(), dx, dw, db), strict=True):
        assert value.dtype == torch.float32
        assert_accurate(value, truth, tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weights(form, dtype):
    """The weight as each form reads it, of any strides: exact, but for one rounding of the Hadamard rows."""
    weight = torch.randn(4, 2, 3, 2, 6, dtype=dtype).permute(0, 4, 2, 3, 1)  # [4, 6, 3, 2, 2]
    groups, (rows, q) = 2, weight.shape[1:3]
    plan = Plan(form, "half", Tile(16, 16, 16, 4, 1), 1)
    packed, _ = launch._packed(weight, plan, groups)
    taps = weight.permute(0, 3, 4, 1, 2).double()
    if form == "dense":
        expected = algebra.expand_weight(weight.double(), groups).unflatten(0, (groups, -1))
        expected = expected.permute(3, 4, 0, 1, 2)
    elif form == "q16":
        expected = taps
    else:
        hadamard = torch.tensor(algebra.HADAMARD, dtype=torch.float64)
        plain = -2 * taps[list(algebra.WEIGHT_ORDER)]
        expected = torch.cat([torch.einsum("ab,b...->a...", hadamard, taps), plain])
    actual = packed.double().view(expected.shape) if form == "dense" else packed.double().reshape(-1, 2, 2, rows, q)
    tolerance = 2 * torch.finfo(dtype).eps if form == "q8" else 0
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_interpreter_cuts_bfloat16_off():
    """Why bounds of bfloat16 are doubled: here it is the upper 16 bits of a float32, on hardware a rounded one."""
    values = np.array([1 + 2**-8 + 2**-9, 1 + 2**-7 - 2**-20, -1 - 2**-8 - 2**-10], np.float32)
    handle = interpreter.TensorHandle(values, tl.float32)
    bits = interpreter.interpreter_builder.create_fp_trunc(handle, tl.bfloat16).data.astype(np.int32)
    assert (bits << 16).view(np.float32).tolist() == [1, 1, -1]
    assert torch.from_numpy(values).bfloat16().tolist() == [1 + 2**-7, 1 + 2**-7, -1 - 2**-7]


def test_memory_check_finds_what_it_should(memory):
    memory.kernel, memory.tensors = "kernel", [(100, 200, "x_ptr")]
    memory._check("reads", np.array([100, 196], np.uint64), 4)
    for addresses in ([96], [100, 198]):
        with pytest.raises(AssertionError, match="kernel reads outside of its tensors"):
            memory._check("reads", np.array(addresses, np.uint64), 4)


@st.composite
def geometries(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    q, p = (groups * draw(st.integers(1, 6)) for _ in range(2))
    axes = []
    for _ in range(2):
        kernel, stride, padding, dilation = (draw(st.integers(*limits)) for limits in ((1, 4), (1, 4), (0, 4), (1, 3)))
        least = max(1, dilation * (kernel - 1) + 1 - 2 * padding)
        axes.append((draw(st.integers(least, least + 6)), kernel, stride, padding, dilation))
    (height, width), *window = zip(*axes, strict=True)
    return (draw(st.integers(1, 3)), q, p, height, width, *window, groups)


@pytest.mark.slow
@pytest.mark.timeout(900)
@hypothesis.settings(
    max_examples=40, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
    geometries(),
    st.sampled_from(FORMS),
    st.sampled_from(DTYPES),
    st.integers(1, 4),
    st.sampled_from(["whole", "cut"]),
    st.booleans(),
)
def test_random_geometries(tiles, case, form, dtype, splits, style, biased):
    check_products(case, form, dtype, splits, style, biased, tiles)


def test_nan_lets_a_gradient_pass():
    """As PyTorch's ReLU does: zeros behind a NaN would hide where it came from."""
    dy, x, weight = torch.randn(1, 8, 3, 3), torch.randn(1, 4, 3, 3), torch.randn(4, 2, 1, 3, 3)
    open_gate, nan_gate = torch.ones_like(dy), torch.ones_like(dy)
    nan_gate[0, 3, 1, 1] = float("nan")
    window = ([1, 1], [1, 1], [1, 1], 1)
    for form in FORMS:
        for gate in (open_gate, nan_gate):
            source = launch.Source(dy, gate)
            dx = launch.data_gradient(source, weight, None, [3, 3], *window, form)
            dw, _ = launch.weight_gradient(source, x, [3, 3], *window, False, form)
            if gate is open_gate:
                expected = dx, dw
        assert torch.equal(dx, expected[0])
        assert torch.equal(dw, expected[1])
