"""Every kernel, form and type over odd geometries, against the definition in float64."""

import itertools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import triton.language as tl
from interpreted import DTYPES, KINDS, TOLERANCE, Tiles, assert_accurate, cut, in_nan, multiplied, to_tf32
from triton.runtime import interpreter

from qkernels import algebra
from qkernels.ops.hamilton_conv import config, launch, reference
from qkernels.ops.hamilton_conv.config import Tile
from qkernels.ops.hamilton_conv.launch import Epilogue, Packed

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
    # More than a signed step takes: blocks of channels with a rest.
    "33 channels": (1, 33, 34, 2, 2, (1, 1), (1, 1), (0, 0), (1, 1), 1),
}
POOLED = {
    "odd map": (2, 1, 2, 5, 7, (1, 3), (1, 1), (0, 1), (1, 1), 1),
    "strided": (1, 2, 1, 9, 8, (2, 1), (2, 1), (1, 0), (1, 1), 1),
    "grouped": (1, 2, 4, 4, 3, (1, 2), (1, 1), (0, 1), (1, 1), 2),
    "one window": (3, 3, 3, 3, 2, (1, 1), (1, 1), (0, 0), (1, 1), 1),
}


QUICK = 3  # kinds of each case


def square(cases: Any, quick: Any = QUICK) -> Any:
    """(case, algorithm, type, splits, style, bias): a Latin square of kinds, splits, styles; other kinds are slow."""
    parameters = []
    for i, (name, case) in enumerate(cases.items()):
        for f, (algorithm, dtype) in enumerate(KINDS):
            splits, style, biased = 1 + (i + 2 * f) % 3, ("whole", "cut")[(i + f) % 2], (i // 2 + f) % 2 == 0
            values = (case, algorithm, dtype, splits, style, biased)
            id = f"{name}-{algorithm}-{str(dtype)[6:]}-{splits} splits-{style}{'-bias' * biased}"
            marks = [] if (f + i) % len(KINDS) < quick else [pytest.mark.slow]
            parameters.append(pytest.param(*values, id=id, marks=marks))
    return parameters


def window7(case: Any) -> Any:
    """The last five of a case as launch functions take them."""
    return (*case[6], *case[7], *case[8], case[9])


def operands(case: Any, dtype: torch.dtype) -> Any:
    batch, q, p, height, width, kernel, *_, groups = case
    x = in_nan(torch.randn(batch, 4 * q, height, width).to(dtype))
    return x, torch.randn(4, p, q // groups, *kernel).to(dtype), torch.randn(4 * p).to(dtype)


def definition(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, case: Any, algorithm: str) -> Any:
    """Exact operands that want gradients, and what they give in front of an epilogue."""
    leaves = [t.requires_grad_() for t in (multiplied(x, algorithm), multiplied(weight, algorithm), bias.double())]
    return leaves, reference.hamilton_conv2d(*leaves, *case[6:])


def zeroed(x: torch.Tensor) -> Any:
    """What a ReLU could have given: about half of it zeros."""
    return in_nan(torch.randn(x.shape).to(x.dtype).relu())


def check_products(
    case: Any, algorithm: str, dtype: torch.dtype, splits: int, style: str, biased: Any, tiles: Tiles
) -> None:
    """The three products with the epilogues that layers use; one packed weight and its counters serve all of them."""
    tiles.splits, tiles.style = splits, style
    x, weight, bias = operands(case, dtype)
    window, kernel = window7(case), case[5]
    bias = bias if biased else torch.zeros_like(bias)
    leaves, exact = definition(x, weight, bias, case, algorithm)
    packed = Packed(*launch.pack([weight], [algorithm], dtype))
    y = launch.forward(x, weight, window, algorithm, Epilogue(bias if biased else None, relu=True), packed)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_accurate(y, exact.detach().relu(), TOLERANCE[dtype])
    dy = torch.randn(y.shape).to(dtype)
    dx, dw, db = torch.autograd.grad(exact, leaves, multiplied(dy, algorithm))
    # A transposed convolution may have a bias of its own; a gradient is scaled, and goes through the mask of a ReLU.
    shift, scale, of_relu = torch.randn(x.shape[1]).to(dtype), 1.0 if style == "whole" else 1.25, zeroed(x)
    if biased:
        epilogue, expected = Epilogue(shift, scale=scale), (dx + shift.double().view(-1, 1, 1)) * scale
    else:
        epilogue, expected = Epilogue(scale=scale, relu_output=of_relu), dx * scale * (of_relu > 0)
    actual = launch.data_gradient(in_nan(dy), weight, x.shape[2:], window, algorithm, epilogue, packed)
    assert actual.dtype == dtype
    assert_accurate(actual, expected, TOLERANCE[dtype])
    options = {"scale": scale, "tickets": packed.tickets}
    actual, actual_bias = launch.weight_gradient(in_nan(dy), x, kernel, window, biased, algorithm, **options)
    assert_accurate(actual, dw * scale, TOLERANCE[dtype])
    if biased:
        assert_accurate(actual_bias, db * scale, TOLERANCE[dtype])
    else:
        assert actual_bias.numel() == 0
    assert not packed.tickets.any()


@pytest.mark.parametrize(("case", "algorithm", "dtype", "splits", "style", "biased"), square(CASES))
def test_products_equal_the_definition(
    case: Any, algorithm: str, dtype: torch.dtype, splits: int, style: str, biased: Any, tiles: Tiles
) -> None:
    check_products(case, algorithm, dtype, splits, style, biased, tiles)


def test_large_kernel(tiles: Tiles) -> None:
    """11x11, positions far outside of the map, the whole sum in one kernel's few steps."""
    case = (1, 1, 1, 5, 4, (11, 11), (1, 1), (5, 5), (1, 1), 1)
    check_products(case, "signed-ieee", torch.float32, 2, Tile(32, 4, 128, 4, 1), True, tiles)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["signed-ieee", "q8-ieee"])
def test_large_kernel_position_by_position(algorithm: str, tiles: Tiles) -> None:
    case = (1, 1, 2, 12, 13, (11, 11), (1, 1), (5, 5), (1, 1), 1)
    check_products(case, algorithm, torch.float32, 3, Tile(256, 4, 1, 4, 1), True, tiles)


@pytest.mark.parametrize(("algorithm", "dtype"), KINDS)
@pytest.mark.parametrize("style", ["whole", "cut"])
def test_parts_are_added_in_their_order_whoever_comes_last(
    algorithm: str, dtype: torch.dtype, style: str, tiles: Tiles, memory: Any
) -> None:
    """The last program to arrive adds the parts of a shared sum: backwards that is the first one."""
    case = (1, 3, 2, 5, 4, (2, 1), (1, 1), (1, 0), (1, 1), 1)
    tiles.splits, tiles.style = 3, style
    x, weight, bias = operands(case, dtype)
    dy = torch.randn(1, 8, 6, 4).to(dtype)

    def products() -> Any:
        memory.counted.clear()
        yield launch.forward(x, weight, window7(case), algorithm, Epilogue(bias))
        yield launch.data_gradient(dy, weight, x.shape[2:], window7(case), algorithm)
        yield from launch.weight_gradient(dy, x, case[5], window7(case), True, algorithm)

    forwards = list(products())
    assert len(set(memory.counted)) == 2
    memory.backwards = True
    for value, expected in zip(products(), forwards, strict=True):
        assert torch.equal(value, expected)


def unpooled(dpooled: Any, argmax: Any, size: Any) -> Any:
    """The gradient of a map of that size, one position of the windows at a time."""
    gradient = torch.zeros(*dpooled.shape[:2], *size, dtype=torch.float64)
    height, width = (2 * n for n in dpooled.shape[2:])
    for position in range(4):
        h, w = divmod(position, 2)
        gradient[:, :, h:height:2, w:width:2] = dpooled.double() * (argmax == position)
    return gradient


EPILOGUES = [(True, False), (True, True), (False, True), (False, False)]


def pooled_square() -> Any:
    """`square` of the pooled cases with (relu, return_map), one of them for each; the others are slow."""
    parameters = []
    for i, parameter in enumerate(square(POOLED, len(KINDS))):
        for e, (relu, return_map) in enumerate(EPILOGUES):
            id = parameter.id + "-relu" * relu + "-map" * return_map
            marks = [] if e == (i // len(KINDS) + i % len(KINDS)) % len(EPILOGUES) else [pytest.mark.slow]
            parameters.append(pytest.param(*parameter.values, relu, return_map, id=id, marks=marks))
    return parameters


@pytest.mark.parametrize(
    ("case", "algorithm", "dtype", "splits", "style", "biased", "relu", "return_map"), pooled_square()
)
def test_pooled_products_equal_the_definition(
    case: Any,
    algorithm: str,
    dtype: torch.dtype,
    splits: int,
    style: str,
    biased: Any,
    relu: Any,
    return_map: Any,
    tiles: Tiles,
) -> None:
    """The maxima, which pixel each is of, and the map."""
    tiles.splits, tiles.style = splits, style
    x, weight, bias = operands(case, dtype)
    bias = bias if biased else torch.zeros_like(bias)
    _, exact = definition(x, weight, bias, case, algorithm)
    exact = exact.detach().relu() if relu else exact.detach()
    epilogue = Epilogue(bias if biased else None, relu)
    pooled, argmax, y = launch.forward_pool(x, weight, window7(case), algorithm, epilogue, None, return_map)
    tolerance = TOLERANCE[dtype]
    assert_accurate(pooled, torch.nn.functional.max_pool2d(exact, 2), tolerance)
    assert argmax.dtype == torch.uint8
    assert argmax.max() <= (4 if relu else 3)
    # The maximum is where argmax says, up to rounding; 4 is a window without a positive pixel.
    there = unpooled(torch.ones_like(pooled), argmax, exact.shape[2:]) * exact
    there = there.unfold(2, 2, 2).unfold(3, 2, 2).sum((4, 5))
    assert_accurate(torch.where(argmax < 4, pooled, 0), there, tolerance)
    assert torch.equal(argmax == 4, (pooled <= 0) & relu)
    if return_map:
        assert_accurate(y, exact, tolerance)
        maxima, places = torch.nn.functional.max_pool2d(y.float(), 2, return_indices=True)
        assert torch.equal(pooled, maxima.to(dtype))
        h, w = places // y.shape[3], places % y.shape[3]
        assert torch.equal(argmax, torch.where((pooled <= 0) & relu, 4, h % 2 * 2 + w % 2))
    else:
        assert y.numel() == 0


OPTIONS = list(itertools.product([False, True], repeat=4))


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("algorithm", ["signed-ieee", "q8-ieee"])
def test_every_epilogue(algorithm: str, splits: int, tiles: Tiles) -> None:
    """Bias, ReLU, scale and mask in every combination, in this order; the mask lets pass what NaN hides."""
    tiles.splits = splits
    case = (1, 2, 1, 2, 3, (1, 2), (1, 1), (0, 0), (1, 1), 1)
    x, weight, bias = operands(case, torch.float32)
    _, plain = definition(x, weight, torch.zeros_like(bias), case, algorithm)
    of_relu = zeroed(plain.float())
    of_relu[0, 1, 0, 0] = torch.nan
    for biased, relu, scaled, masked in OPTIONS:
        expected = plain.detach() + (bias.double().view(-1, 1, 1) if biased else 0)
        expected = expected.relu() if relu else expected
        expected = expected * (0.75 if scaled else 1)
        expected = torch.where((of_relu <= 0) & masked, 0, expected)
        epilogue = Epilogue(bias if biased else None, relu, None, 0.75 if scaled else 1.0, of_relu if masked else None)
        y = launch.forward(x, weight, window7(case), algorithm, epilogue)
        assert_accurate(y, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize(("algorithm", "dtype"), KINDS[:3])
def test_dropout(algorithm: str, dtype: torch.dtype, tiles: Tiles) -> None:
    """Which elements are zeroed depends on the seed and the element alone, not on who computes it."""
    case = (2, 1, 6, 20, 20, (1, 1), (1, 1), (0, 0), (1, 1), 1)
    x, weight, bias = operands(case, dtype)
    bias = bias.abs() + 20  # nothing but the dropout makes zeros
    _, exact = definition(x, weight, bias, case, algorithm)
    exact, rate = exact.detach(), 0.3
    assert exact.min() > 0

    def dropped(seed: Any) -> Any:
        epilogue = Epilogue(bias, relu=True, seed=torch.tensor([seed]), scale=1 / (1 - rate))
        return launch.forward(x, weight, window7(case), algorithm, epilogue)

    y = dropped(5)
    kept = y > 0
    assert_accurate(y, exact * kept / (1 - rate), TOLERANCE[dtype])
    count = kept.numel()
    assert abs(kept.sum().item() - (1 - rate) * count) < 4 * (rate * (1 - rate) * count) ** 0.5
    # No image, channel or pixel has a pattern of its own.
    for axes in ((1, 2, 3), (0, 2, 3), (0, 1)):
        part = kept.double().mean(axes)
        assert (part - (1 - rate)).abs().max() < 5 * (rate * (1 - rate) * part.numel() / count) ** 0.5
    assert torch.equal(dropped(5), y)

    def assert_independent(one: Any, other: Any) -> None:
        expected = rate**2 + (1 - rate) ** 2
        agreeing = (one == other).double().mean().item()
        assert abs(agreeing - expected) < 4 * (expected * (1 - expected) / one.numel()) ** 0.5

    tiles.style = Tile(256, 8, 4, 4, 1)
    assert torch.equal(dropped(5) > 0, kept)
    for seed in (6, 5 + 2**33):
        assert_independent(dropped(seed) > 0, kept)
    # Nothing repeats along memory: not pixels, rows, images, nor blocks of any size.
    in_memory = kept.permute(0, 2, 3, 1).flatten()
    for shift in (24, 480, 9600, *(1 << n for n in range(14))):
        assert_independent(in_memory[shift:], in_memory[:-shift])


@pytest.mark.parametrize(("style", "splits"), [("whole", 1), ("cut", 3)])
@pytest.mark.parametrize(("algorithm", "dtype"), [("signed-half", torch.float16), ("signed-half", torch.bfloat16)])
def test_float32_parameters_and_results_of_half_maps(
    algorithm: str, dtype: torch.dtype, style: str, splits: int, tiles: Tiles
) -> None:
    """As under autocast: the weight is rounded once, the bias never, and what is written as float32 is not rounded."""
    tiles.splits, tiles.style = splits, style
    case = (1, 6, 5, 4, 5, (1, 2), (1, 1), (0, 1), (1, 1), 1)
    x, weight, bias = operands(case, torch.float32)
    x = in_nan(x.to(dtype))
    leaves, exact = definition(x, cut(weight, dtype), bias, case, algorithm)
    y = launch.forward(x, weight, window7(case), algorithm, Epilogue(bias))
    assert y.dtype == dtype
    assert_accurate(y, exact.detach(), TOLERANCE[dtype])
    dy = torch.randn(y.shape).to(dtype)
    dx, dw, db = torch.autograd.grad(exact, leaves, dy.double())
    to = torch.float32
    values = (
        launch.forward(x, weight, window7(case), algorithm, Epilogue(bias), dtype=to),
        launch.data_gradient(dy, weight, x.shape[2:], window7(case), algorithm, dtype=to),
        *launch.weight_gradient(dy, x, case[5], window7(case), True, algorithm, dtype=to),
    )
    for value, truth in zip(values, (exact.detach(), dx, dw, db), strict=True):
        assert value.dtype == to
        assert_accurate(value, truth, TOLERANCE[to])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(5, 7), (4, 2)], ids=str)
def test_gradient_in_front_of_an_epilogue(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Of the map and of the maxima of its windows, alone and together, masked, scaled, in another type."""
    shape, half = (3, 12, *size), (3, 12, size[0] // 2, size[1] // 2)
    dy, dpooled = (in_nan(torch.randn(s).to(dtype)) for s in (shape, half))
    argmax = in_nan(torch.randint(5, half, dtype=torch.uint8))
    of_relu = zeroed(dy)
    of_relu[1, 2, 1, 1] = torch.nan
    routed = unpooled(dpooled, argmax, size).float()
    for has_dy, masked, pooled, scaled in OPTIONS:
        if not has_dy and (masked or scaled or not pooled):
            continue
        scale = 1.25 if scaled else 1.0
        expected = torch.where((of_relu <= 0) & masked, 0, dy).float() * scale if has_dy else torch.zeros(shape)
        expected = expected + routed if pooled else expected
        sources = (dy if has_dy else None, of_relu if masked else None, *((dpooled, argmax) if pooled else (None,) * 2))
        for to in {dtype, torch.float32}:
            actual = launch.epilogue_gradient(*sources, size, scale, to)
            assert actual.is_contiguous(memory_format=torch.channels_last)
            assert actual.dtype == to
            assert torch.equal(actual, cut(expected, to))


def test_gradient_of_more_than_one_block() -> None:
    """Any layout is read, and all of a map is written."""
    dy, of_relu = torch.randn(3, 24, 5, 9), torch.randn(5, 9, 24, 3).permute(3, 2, 0, 1)
    assert dy.numel() > 3 * launch.ELEMENTWISE_BLOCK
    actual = launch.epilogue_gradient(dy, of_relu, None, None, [5, 9], 1.0, torch.float32)
    assert torch.equal(actual, dy * (of_relu > 0))
    assert torch.equal(launch.operand(dy, "tf32"), to_tf32(dy).float())
    assert launch.operand(actual, "ieee") is actual


def packed_by_pytorch(weight: torch.Tensor, algorithm: str, dtype: torch.dtype) -> Any:
    """`[tile, position, rows, Q]`, and for tf32 once more as `[tile, position, Q, rows]`, in a row."""
    form, precision = algorithm.split("-")
    quaternions = weight.reshape(*weight.shape[:3], -1).permute(0, 3, 1, 2).double()
    if form == "q8":
        hadamard = torch.tensor(algebra.HADAMARD, dtype=torch.float64)
        plain = -2 * quaternions[list(algebra.WEIGHT_ORDER)]
        tiles = torch.cat([torch.einsum("ab,b...->a...", hadamard, quaternions), plain])
    else:
        tiles = torch.cat([quaternions, -quaternions])
    if precision == "tf32":
        tiles = to_tf32(tiles)
        return torch.cat([tiles.flatten(), tiles.mT.flatten()])
    return cut(tiles.float(), dtype).double().flatten()


PACKED = {
    torch.float32: ["signed-ieee", "q8-ieee", "signed-tf32", "signed-ieee"],
    torch.float16: ["signed-half"] * 4,
    torch.bfloat16: ["signed-half"] * 4,
}


@pytest.mark.parametrize("weights_type", ["float32", "maps"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_weights(dtype: torch.dtype, weights_type: str) -> None:
    """Several weights in one launch, of any size and stride; exact but for the sums of q8; and zeros to count with."""
    shapes = ((4, 3, 5, 2, 3), (4, 40, 30, 1, 1), (4, 1, 1), (4, 7, 2, 3, 3))
    weights = [torch.randn(shape) for shape in shapes]
    weights[0] = torch.randn(4, 3, 5, 3, 2).mT
    weights = [w.to(dtype if weights_type == "maps" else torch.float32) for w in weights]
    for first in range(4):  # each place for each form
        algorithms = PACKED[dtype][first:] + PACKED[dtype][:first]
        tiles, tickets = launch.pack(weights, algorithms, dtype)
        assert tiles.dtype == dtype
        sizes = [config.packed_size(w.numel(), algorithm) for w, algorithm in zip(weights, algorithms, strict=True)]
        for actual, weight, algorithm in zip(tiles.split(sizes), weights, algorithms, strict=True):
            tolerance = 1e-6 if algorithm.startswith("q8") else 0
            expected = packed_by_pytorch(weight, algorithm, dtype)
            torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)
        assert tickets.shape == (4 * config.MOST_TICKETS,)
        assert not tickets.any()
        if dtype != torch.float32:
            break


def test_interpreter_cuts_bfloat16_off() -> None:
    """Why bounds of bfloat16 are doubled: here it is the upper 16 bits of a float32, on hardware a rounded one."""
    values = np.array([1 + 2**-8 + 2**-9, 1 + 2**-7 - 2**-20, -1 - 2**-8 - 2**-10], np.float32)
    handle = interpreter.TensorHandle(values, tl.float32)
    bits = interpreter.interpreter_builder.create_fp_trunc(handle, tl.bfloat16).data.astype(np.int32)
    assert (bits << 16).view(np.float32).tolist() == [1, 1, -1]
    assert torch.from_numpy(values).bfloat16().tolist() == [1 + 2**-7, 1 + 2**-7, -1 - 2**-7]


def test_memory_check_finds_what_it_should(memory: Any) -> None:
    memory.kernel, memory.tensors = "kernel", [(100, 200, "x_ptr")]
    memory._check("reads", np.array([100, 196], np.uint64), 4)
    for addresses in ([96], [100, 198]):
        with pytest.raises(AssertionError, match="kernel reads outside of its tensors"):
            memory._check("reads", np.array(addresses, np.uint64), 4)


@st.composite
def geometries(draw: Any) -> Any:
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
@hypothesis.settings(max_examples=40, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    geometries(),
    st.sampled_from(KINDS),
    st.integers(1, 4),
    st.sampled_from(["whole", "cut"]),
    st.booleans(),
)
def test_random_geometries(tiles: Tiles, case: Any, kind: Any, splits: int, style: str, biased: Any) -> None:
    check_products(case, *kind, splits, style, biased, tiles)
