"""The public functions on the Triton backend: autograd, layouts, autocast, compilation, all against the reference."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from interpreted import FORMS, OF_ONE_ELEMENT, TOLERANCE, Tiles, assert_accurate, cut
from torch.utils._python_dispatch import TorchDispatchMode

import qkernels
from qkernels import hamilton_conv2d, hamilton_conv_transpose2d, hamilton_linear, pack_weights

# B, Q, P, H, W, kernel, stride, padding, dilation, groups
CASE = (2, 2, 3, 4, 5, (2, 2), (1, 1), (1, 0), (1, 1), 1)
CASES = {
    "plain": CASE,
    "strided": (2, 1, 2, 6, 5, (2, 1), (2, 1), (1, 0), (1, 1), 1),
    "grouped": (1, 2, 4, 4, 4, (1, 2), (1, 1), (0, 1), (1, 2), 2),
}
EPILOGUES = [(None, None, False), ("relu", None, False), ("relu", 2, False), ("relu", 2, True), (None, 2, True)]
FEW = 4 * OF_ONE_ELEMENT * TOLERANCE[torch.float32]  # of one element: atol and rtol of float32


@pytest.fixture(autouse=True)
def backend(memory: Any) -> Any:
    """The Triton backend; a test that launched no kernel tests nothing."""
    with qkernels.set_backend("triton"):
        yield
    assert memory.launches > 0


all_forms = pytest.mark.parametrize("form", FORMS)


def operands(case: Any, dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> Any:
    batch, q, p, height, width, kernel, *_, groups = case
    shapes = (batch, 4 * q, height, width), (4, p, q // groups, *kernel), (4 * p,)
    return [torch.randn(shape, dtype=dtype).requires_grad_(requires_grad) for shape in shapes]


def reference(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with qkernels.set_backend("reference"):
        return function(*args, **kwargs)


def exactly(tensors: Any) -> Any:
    return [t.detach().double().requires_grad_() for t in tensors]


def close(actual: Any, exact: Any) -> None:
    for value, truth in zip(actual, exact, strict=True):
        torch.testing.assert_close(value.double(), truth.double(), rtol=FEW, atol=FEW)


def as_tuple(value: Any) -> Any:
    return value if isinstance(value, tuple) else (value,)


@all_forms
@pytest.mark.parametrize(("activation", "pool", "tap"), EPILOGUES)
def test_convolution_equals_the_reference(form: str, activation: Any, pool: Any, tap: Any) -> None:
    """Values and all gradients; which case goes with which epilogue is rotated."""
    index = EPILOGUES.index((activation, pool, tap)) + FORMS.index(form)
    case = list(CASES.values())[index % len(CASES)]
    tensors = operands(case, requires_grad=True)
    exact = exactly(tensors)
    options = {"activation": activation, "pool": pool, "return_map": tap}
    with qkernels.set_form(form):
        outputs = as_tuple(hamilton_conv2d(*tensors, *case[6:], **options))
    expected = as_tuple(reference(hamilton_conv2d, *exact, *case[6:], **options))
    for output, truth in zip(outputs, expected, strict=True):
        assert_accurate(output, truth.detach(), TOLERANCE[torch.float32])
        assert output.is_contiguous(memory_format=torch.channels_last)
    gradients = [torch.randn_like(output) for output in outputs]
    close(
        torch.autograd.grad(outputs, tensors, gradients),
        torch.autograd.grad(expected, exact, [g.double() for g in gradients]),
    )


DECODER = [((2, 1), (1, 0)), ((2, 1), (1, 0)), ((2, 2), (1, 1))]


@all_forms
def test_decoder_of_rh_emo(form: str) -> None:
    """Its three transposed convolutions in a row, of one quaternion channel each."""
    x = torch.randn(2, 4, 2, 3, requires_grad=True)
    layers = [(torch.randn(4, 1, 1, 3, 3, requires_grad=True), torch.randn(4, requires_grad=True)) for _ in DECODER]

    def decode(x: torch.Tensor, layers: Any) -> Any:
        for (weight, bias), (stride, output_padding) in zip(layers, DECODER, strict=True):
            x = hamilton_conv_transpose2d(x, weight, bias, stride, 1, output_padding).tanh()
        return x

    leaves = [x, *itertools.chain(*layers)]
    exact = exactly(leaves)
    with qkernels.set_form(form):
        y = decode(x, layers)
        gradients = torch.autograd.grad(y.sum(), leaves)
    expected = reference(decode, exact[0], list(zip(exact[1::2], exact[2::2], strict=True)))
    assert y.shape == (2, 4, 16, 6)
    assert y.is_contiguous(memory_format=torch.channels_last)
    close([y], [expected])
    close(gradients, torch.autograd.grad(expected.sum(), exact))


def test_transposed_groups_and_unequal_window() -> None:
    x, weight, bias = torch.randn(2, 16, 3, 2), torch.randn(4, 4, 1, 2, 3), torch.randn(8)
    arguments = ((2, 3), (0, 1), (1, 0), 2, (1, 2))
    tensors = [t.requires_grad_() for t in (x, weight, bias)]
    exact = exactly(tensors)
    y = hamilton_conv_transpose2d(*tensors, *arguments)
    expected = reference(hamilton_conv_transpose2d, *exact, *arguments)
    dy = torch.randn_like(y)
    close([y], [expected])
    close(torch.autograd.grad(y, tensors, dy), torch.autograd.grad(expected, exact, dy.double()))


@all_forms
@pytest.mark.parametrize("leading", [(), (5,), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_linear_equals_the_reference(form: str, leading: Any, activation: str | None) -> None:
    tensors = [torch.randn(*leading, 12), torch.randn(4, 5, 3), torch.randn(20)]
    exact = exactly(tensors)
    tensors = [t.requires_grad_() for t in tensors]
    with qkernels.set_form(form):
        y = hamilton_linear(*tensors, activation=activation)
    expected = reference(hamilton_linear, *exact, activation=activation)
    assert y.shape == (*leading, 20)
    assert y.is_contiguous()
    dy = torch.randn_like(y)
    close([y], [expected])
    close(torch.autograd.grad(y, tensors, dy), torch.autograd.grad(expected, exact, dy.double()))


def test_ties_at_zero_are_torchs() -> None:
    """A ReLU at exactly 0 passes no gradient, a pool gives all of it to the first of equal pixels."""
    # Windows: equal positives; zeros only; the maximum last; negatives only.
    x = torch.zeros(1, 4, 2, 8)
    x[0, 0] = torch.tensor([[3.0, 3, 0, 0, 1, 1, -2, -2], [3, 3, 0, 0, 1, 2, -1, -2]])
    one = torch.tensor([1.0, 0, 0, 0]).view(4, 1, 1, 1, 1)
    for options in ({}, {"pool": 2}, {"pool": 2, "return_map": True}):
        for activation in (None, "relu"):
            leaves = [t.clone().requires_grad_() for t in (x, one)]
            exact = [t.clone().requires_grad_() for t in (x, one)]
            outputs = as_tuple(hamilton_conv2d(*leaves, activation=activation, **options))
            expected = as_tuple(reference(hamilton_conv2d, *exact, activation=activation, **options))
            gradients = [torch.arange(1.0, 1 + o.numel()).view(o.shape) for o in outputs]
            for value, truth in zip(outputs, expected, strict=True):
                assert torch.equal(value, truth)
            values = torch.autograd.grad(outputs, leaves, gradients)
            for value, truth in zip(values, torch.autograd.grad(expected, exact, gradients), strict=True):
                assert torch.equal(value, truth)


def test_nan_reaches_what_it_would_in_torch() -> None:
    """Through the convolution, a ReLU and a pool; where there is none, nothing is NaN."""
    x, weight, bias = operands(CASE)
    x[1, 0, 2, 1] = float("nan")
    y, pooled = hamilton_conv2d(x, weight, bias, padding=1, activation="relu", pool=2, return_map=True)
    expected = reference(hamilton_conv2d, x, weight, bias, padding=1, activation="relu")
    assert y.isnan().any()
    assert not y[0].isnan().any()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(pooled.isnan(), torch.nn.functional.max_pool2d(expected, 2).isnan())
    alone = hamilton_conv2d(x, weight, bias, padding=1, pool=2)
    assert torch.equal(alone.isnan(), pooled.isnan())


class Calls(TorchDispatchMode):
    """The names of this package's operators, in the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "qkernels":
            self.names.append(func._schema.name.rpartition("hamilton_")[2].removeprefix("conv2d_"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("needed", list(itertools.product([True, False], repeat=3))[:-1])
@pytest.mark.parametrize("name", ["conv", "pool", "linear"])
def test_frozen_operands_cost_nothing_and_change_nothing(needed: Any, name: str) -> None:
    def function(*tensors: Any) -> Any:
        if name == "linear":
            return (hamilton_linear(*tensors, activation="relu"),)
        tap = name == "pool"
        return as_tuple(hamilton_conv2d(*tensors, activation="relu", pool=2 if tap else None, return_map=tap))

    tensors = [torch.randn(3, 8), torch.randn(4, 3, 2), torch.randn(12)] if name == "linear" else operands(CASE)
    full = [t.clone().requires_grad_() for t in tensors]
    outputs = function(*full)
    dys = [torch.randn_like(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, full, dys)
    some = [t.clone().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]
    with Calls() as calls:
        frozen = function(*some)
        torch.autograd.backward(frozen, dys)
    for value, truth in zip(frozen, outputs, strict=True):
        assert torch.equal(value, truth)
    forward = ["pack", "pool" if name == "pool" else "conv2d", "dy"]
    assert calls.names == forward + ["dx"] * needed[0] + ["dw"] * needed[1]
    for i, (tensor, gradient, need) in enumerate(zip(some, gradients, needed, strict=True)):
        if i == 2 and need and not needed[1]:
            # Without dw, in whose kernel it is summed, the gradient of the bias is a sum of torch.
            torch.testing.assert_close(tensor.grad, gradient)
        else:
            assert torch.equal(tensor.grad, gradient) if need else tensor.grad is None


@pytest.mark.parametrize("relu", [True, False])
def test_gradient_of_the_tap_of_the_pool_or_of_both(relu: bool) -> None:
    options = {"activation": "relu" if relu else None, "pool": 2, "return_map": True}
    tensors = operands(CASES["grouped"], requires_grad=True)
    exact = exactly(tensors)
    window = CASES["grouped"][6:]
    outputs = hamilton_conv2d(*tensors, *window, **options)
    expected = reference(hamilton_conv2d, *exact, *window, **options)
    dys = [torch.randn_like(y) for y in outputs]
    for used in ([0], [1], [0, 1]):
        actual = torch.autograd.grad([outputs[i] for i in used], tensors, [dys[i] for i in used], retain_graph=True)
        truth = [[expected[i] for i in used], exact, [dys[i].double() for i in used]]
        close(actual, torch.autograd.grad(*truth, retain_graph=True))
        if used != [0, 1]:  # the bias alone is summed by torch, from the same two sources
            (alone,) = torch.autograd.grad(
                [outputs[i] for i in used], tensors[2:], [dys[i] for i in used], retain_graph=True
            )
            close([alone], actual[2:])


@pytest.mark.parametrize(
    "options", [{}, {"activation": "relu"}, {"activation": "relu", "pool": 2, "return_map": True}], ids=str
)
def test_expanded_and_strided_gradients(options: Any) -> None:
    tensors = operands(CASE, requires_grad=True)

    def gradients(dy: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        outputs = as_tuple(hamilton_conv2d(*tensors, *CASE[6:], **options))
        return torch.autograd.grad(outputs, tensors, [dy(y) for y in outputs])

    expected = gradients(torch.ones_like)
    for dy in (
        lambda y: torch.ones(()).expand_as(y),
        lambda y: torch.ones(y.shape),
        lambda y: torch.ones(*y.shape[:3], 2 * y.shape[3])[..., ::2],
        lambda y: torch.ones(y.shape[::-1]).permute(3, 2, 1, 0),
    ):
        close(gradients(dy), expected)
    y = as_tuple(hamilton_conv2d(*tensors, *CASE[6:], **options))
    close(torch.autograd.grad(sum(t.sum() for t in y), tensors), expected)


def test_expanded_and_strided_gradients_of_the_linear_map() -> None:
    tensors = [torch.randn(3, 8), torch.randn(4, 3, 2), torch.randn(12)]
    tensors = [t.requires_grad_() for t in tensors]
    y = hamilton_linear(*tensors, activation="relu")
    expected = torch.autograd.grad(y, tensors, torch.ones_like(y), retain_graph=True)
    for dy in (torch.ones(()).expand_as(y), torch.ones(12, 3).t(), torch.ones(3, 24)[:, ::2]):
        close(torch.autograd.grad(y, tensors, dy, retain_graph=True), expected)


@all_forms
@pytest.mark.parametrize("kernel", [(2, 2), (1, 1)])
def test_operands_of_any_stride_are_left_alone(form: str, kernel: tuple[int, int]) -> None:
    x, weight, bias = operands((*CASE[:5], kernel, *CASE[6:]))
    strided_x = (
        x.to(memory_format=torch.channels_last),
        x.repeat(1, 2, 1, 1)[:, : x.shape[1]],
        x.repeat(1, 1, 1, 2)[..., : x.shape[3]].transpose(2, 3).contiguous().transpose(2, 3),
    )
    strided_weights = (
        weight.transpose(0, 2).contiguous().transpose(0, 2),
        weight.repeat(1, 1, 1, 2, 1)[:, :, :, : kernel[0]],
    )
    strided_bias = torch.stack([bias, bias], 1)[:, 0]
    with qkernels.set_form(form):
        expected = hamilton_conv2d(x, weight, bias, activation="relu")
        exact = torch.autograd.grad(
            hamilton_conv2d(
                *(leaves := [t.clone().requires_grad_() for t in (x, weight, bias)]), activation="relu"
            ).sum(),
            leaves,
        )
        for moved in (*((s, weight) for s in strided_x), *((x, s) for s in strided_weights)):
            leaves = [t.detach().requires_grad_() for t in (*moved, strided_bias)]
            assert not all(t.is_contiguous() for t in leaves)
            before = [t.detach().clone() for t in leaves]
            y = hamilton_conv2d(*leaves, activation="relu")
            assert torch.equal(y, expected)
            close(torch.autograd.grad(y.sum(), leaves), exact)
            for tensor, value in zip(leaves, before, strict=True):
                assert torch.equal(tensor, value)


def test_linear_operands_of_any_stride() -> None:
    x, weight, bias = torch.randn(3, 8), torch.randn(4, 3, 2), torch.randn(12)
    expected = hamilton_linear(x, weight, bias)
    for strided in (x.t().contiguous().t(), x.repeat(1, 2)[:, :8], x.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(hamilton_linear(strided, weight.mT.contiguous().mT, bias), expected)
    expanded = hamilton_linear(x[:1].expand(3, 8), weight, bias)
    assert torch.equal(expanded, expected[:1].expand(3, 12))


def test_empty_batch(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no pixel: nothing is launched but for the weights. The gradients of weight and bias are zeros."""
    run, launched = memory._run, []

    def spy(kernel: Any, grid: Any, *rest: Any) -> None:
        launched.extend([kernel.fn.__name__] if 0 not in grid else [])
        run(kernel, grid, *rest)

    monkeypatch.setattr(memory, "_run", spy)
    for options in ({}, {"activation": "relu"}, {"activation": "relu", "pool": 2, "return_map": True}):
        tensors = operands((0, *CASE[1:]), requires_grad=True)
        outputs = as_tuple(hamilton_conv2d(*tensors, *CASE[6:], **options))
        sum(y.sum() for y in outputs).backward()
        assert outputs[0].shape == (0, 12, 5, 4)
        assert tensors[0].grad.shape == tensors[0].shape
        assert all(t.grad.eq(0).all() for t in tensors[1:])
    _, weight, bias = operands((0, *CASE[1:]), requires_grad=True)
    z = hamilton_conv_transpose2d(torch.zeros(0, 12, 3, 3), weight)
    assert z.shape == (0, 8, 4, 4)
    y = hamilton_linear(torch.zeros(0, 8), torch.randn(4, 3, 2, requires_grad=True), bias, activation="relu")
    y.sum().backward()
    assert y.shape == (0, 12)
    assert bias.grad.eq(0).all()
    assert set(launched) == {"_hamilton_pack_kernel"}


def second_order(function: Callable[..., Any], tensors: Any) -> Any:
    """Gradients of a scalar made of the gradients, by everything."""
    y = function(*tensors)
    torch.manual_seed(1)
    dy = torch.randn(y.shape).to(y.dtype).requires_grad_()
    first = torch.autograd.grad(y, tensors, dy, create_graph=True)
    scalar = sum((g * torch.linspace(-1, 1, g.numel()).view(g.shape).to(g.dtype)).sum() for g in first)
    return torch.autograd.grad(scalar, [*tensors, dy], allow_unused=True)


@pytest.mark.parametrize("name", ["conv", "transposed", "linear"])
def test_second_derivatives_equal_the_reference(name: str) -> None:
    window = CASES["strided"][6:]
    function, tensors = {
        "conv": (lambda *t: hamilton_conv2d(*t, *window), operands(CASES["strided"])),
        "transposed": (
            lambda *t: hamilton_conv_transpose2d(*t, 2, 1, 1),
            [torch.randn(2, 8, 2, 2), torch.randn(4, 2, 1, 2, 1), torch.randn(4)],
        ),
        "linear": (hamilton_linear, [torch.randn(3, 8), torch.randn(4, 3, 2), torch.randn(12)]),
    }[name]
    exact = exactly(tensors)
    actual = second_order(function, [t.requires_grad_() for t in tensors])
    expected = reference(second_order, function, exact)
    for value, truth in zip(actual, expected, strict=True):
        # The bias enters linearly: no second derivative, which autograd may leave out.
        if truth is None or value is None:
            assert all(t is None or t.eq(0).all() for t in (value, truth))
        else:
            torch.testing.assert_close(value.double(), truth, rtol=1e-4, atol=1e-4)


FUSED = {
    "relu": lambda x: hamilton_conv2d(x, torch.randn(4, 1, 2, 1, 1), activation="relu"),
    "pool": lambda x: hamilton_conv2d(x, torch.randn(4, 1, 2, 1, 1), pool=2),
    "tap": lambda x: hamilton_conv2d(x, torch.randn(4, 1, 2, 1, 1), activation="relu", pool=2, return_map=True)[0],
    "linear": lambda x: hamilton_linear(x.flatten(2).mT, torch.randn(4, 1, 2), activation="relu"),
    "dropout": lambda x: hamilton_linear(
        x, torch.randn(4, 1, 8), activation="relu", dropout=0.1, mask_gradient=False, flatten=True
    ),
    "of a ReLU": lambda x: hamilton_conv2d(x.relu(), torch.randn(4, 1, 2, 1, 1), x_is_relu=True),
}


@pytest.mark.parametrize("function", FUSED.values(), ids=FUSED)
def test_second_derivative_behind_an_epilogue_says_where_it_is(function: Callable[..., Any]) -> None:
    x = torch.randn(1, 8, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative after.*set_backend\('reference'\)"):
        gradient.square().sum().backward()


def chain(
    x: torch.Tensor, layers: Any, linked: Any, dropout: float = 0.0, flatten: bool = True, packed: Any = (None,) * 5
) -> Any:
    """Three convolutions, the last of them pooled, and two linear maps; where `linked` each mask is applied once."""
    last, nothing = {"mask_gradient": False}, {}
    first, inner, end = (last, {"x_is_relu": True, **last}, {"x_is_relu": True}) if linked else (nothing,) * 3
    (a, b, c, d, e), relu = layers, "relu"
    x = hamilton_conv2d(x, *a, 1, 1, activation=relu, packed=packed[0], **first)
    x = hamilton_conv2d(x, *b, activation=relu, packed=packed[1], **inner)
    x = hamilton_conv2d(x, *c, activation=relu, pool=2, packed=packed[2], **end)
    x = x if flatten else torch.flatten(x, 1)
    x = hamilton_linear(x, *d, activation=relu, dropout=dropout, flatten=flatten, packed=packed[3], **first)
    return hamilton_linear(x, *e, packed=packed[4], **end)


def chained(dtype: torch.dtype = torch.float32) -> Any:
    """Operands of `chain`: maps of 4 x 5, 5 x 6, 4 x 6 and 2 x 2 pixels."""
    shapes = ((4, 3, 1, 2, 2), (4, 2, 3, 2, 1), (4, 2, 2, 1, 2), (4, 3, 8), (4, 2, 3))
    layers = [[torch.randn(shape), torch.randn(4 * shape[1]).abs()] for shape in shapes]
    layers = [[t.to(dtype).requires_grad_() for t in layer] for layer in layers]
    return torch.randn(2, 4, 4, 5).to(dtype).requires_grad_(), layers


def packed_of(x: torch.Tensor, layers: Any, flatten: bool = True) -> Any:
    weights = [layer[0] for layer in layers]
    weights[3] = weights[3].unflatten(2, (-1, 2, 2)) if flatten else weights[3]
    names = ["hamilton_conv2d"] * 3 + ["hamilton_linear"] * 2
    return pack_weights(list(zip(names, weights, strict=True)), x)


@pytest.mark.parametrize(("form", "dtype"), [(f, torch.float32) for f in FORMS] + [("auto", torch.bfloat16)])
def test_a_chain_of_layers_is_the_plain_one_bit_for_bit(form: str, dtype: torch.dtype) -> None:
    """With its masks at the gradients by the ReLUs' outputs, where they are free, and weights packed in one launch."""
    x, layers = chained(dtype)
    leaves = [x, *itertools.chain(*layers)]

    def run(**options: Any) -> Any:
        with qkernels.set_form(form), Calls() as calls:
            y = chain(x, layers, **options)
            gradients = torch.autograd.grad(y.square().sum(), leaves)
        return [y, *gradients], calls.names

    expected, plain_calls = run(linked=False)
    assert all(value.abs().max() > 0 for value in expected)
    with qkernels.set_form(form):
        packed = packed_of(x, layers)
    linked, calls = run(linked=True, packed=packed)
    for value, truth in zip(linked, expected, strict=True):
        assert torch.equal(value, truth)
    assert (plain_calls.count("dy"), plain_calls.count("pack")) == (4, 5)
    assert (calls.count("dy"), calls.count("pack")) == (1, 0)  # the pool's
    if dtype == torch.float32:
        exact = exactly(leaves)
        y = reference(chain, exact[0], list(zip(exact[1::2], exact[2::2], strict=True)), False)
        for value, truth in zip(expected, [y.detach(), *torch.autograd.grad(y.square().sum(), exact)], strict=True):
            assert_accurate(value, truth, 5 * TOLERANCE[dtype])  # layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_flattened_maps(dtype: torch.dtype) -> None:
    """Maps as they are, and torch.flatten's copy: of either layout, gradients as the maps."""
    weight, bias = torch.randn(4, 3, 12).to(dtype).requires_grad_(), torch.randn(12).to(dtype).requires_grad_()
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(3, 8, 2, 3).to(dtype, memory_format=layout).requires_grad_()
        runs = []
        for flatten in (True, False):
            options = {"activation": "relu", "flatten": flatten}
            y = hamilton_linear(x if flatten else torch.flatten(x, 1), weight, bias, **options)
            dy = torch.linspace(-1, 1, y.numel()).view(y.shape).to(dtype)
            runs.append([y, *torch.autograd.grad(y, (x, weight, bias), dy)])
        for value, expected in zip(*runs, strict=True):
            assert_accurate(value, expected.double(), 2 * TOLERANCE[dtype])
        assert runs[0][1].is_contiguous(memory_format=torch.channels_last)


def test_packed_is_refused_where_it_does_not_fit() -> None:
    """Of another size, type, form or precision; plain PyTorch needs none, and ignores it."""
    x, layers = chained()
    packed = packed_of(x, layers)
    (weight, bias), _, (other, _), *_ = layers
    assert [p.algorithm for p in packed] == ["signed-ieee"] * 5
    assert packed[0].tiles.shape == (2 * weight.numel(),)
    message = "packed must be of this weight, for torch.float32 and 'signed-ieee'; got"
    with pytest.raises(ValueError, match=f"{message} {2 * other.numel()} elements for torch.float32 and 'signed-ieee'"):
        hamilton_conv2d(x, weight, bias, packed=packed[2])
    for unlike in (
        packed[0]._replace(algorithm="q8-ieee"),
        packed[0]._replace(tiles=packed[0].tiles.half()),
    ):
        with pytest.raises(ValueError, match=message):
            hamilton_conv2d(x, weight, bias, pool=2, packed=unlike)
    with pytest.raises(ValueError, match=message):
        hamilton_linear(torch.ones(1, 12), layers[4][0], packed=packed[0])
    with pytest.raises(ValueError, match="op must be one of"):
        pack_weights([("conv2d", weight)], x)
    with pytest.raises(ValueError, match=r"'triton' is set, but .* not torch.float64"):
        pack_weights([("hamilton_conv2d", weight.double())], x.double())
    expected = hamilton_conv2d(x, weight, bias)
    with qkernels.set_backend("reference"):
        assert packed_of(x, layers) == [None] * 5
        close([hamilton_conv2d(x, weight, bias, packed=packed[1])], [expected])
    with qkernels.set_backend("auto"):  # plain PyTorch here, which reads other tiles
        assert "signed-ieee" not in [own.algorithm for own in packed_of(x, layers) if own is not None]
        with pytest.raises(ValueError, match=r"packed must be of this weight, for torch.float32 and 'dense'"):
            hamilton_conv2d(x, weight, bias, packed=packed[1])
    assert pack_weights([], x) == []


def test_weights_are_packed_for_the_type_of_the_maps() -> None:
    """Under autocast as without it; half as many bytes, each weight in its own form, its own counters."""
    x, weights = torch.randn(1, 4, 3, 3), [("hamilton_conv2d", torch.randn(4, 2, 1, 1, 1))] * 2
    with torch.autocast("cpu", torch.float16):
        packed = pack_weights(weights, x)
        y = hamilton_conv2d(x, weights[0][1], packed=packed[1])
        assert torch.equal(y, hamilton_conv2d(x, weights[0][1]))
    assert [(p.tiles.dtype, p.algorithm) for p in packed] == [(torch.float16, "signed-half")] * 2
    assert packed[0].tickets.data_ptr() != packed[1].tickets.data_ptr()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    kinds = pack_weights([weights[0], ("hamilton_linear", torch.randn(4, 2, 1)), weights[0]], x)
    assert [(p.tiles.numel(), p.algorithm) for p in kinds] == [
        (16, "signed-ieee"),
        (32, "signed-tf32"),
        (16, "signed-ieee"),
    ]
    assert torch.equal(kinds[2].tiles, kinds[0].tiles)


RATE = 0.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout(dtype: torch.dtype) -> None:
    """Seeded by PyTorch's generator, other elements every time; the gradient goes where values went."""
    x, weight, bias = (t.to(dtype) for t in (torch.randn(64, 8), torch.randn(4, 10, 2), torch.randn(40)))
    tensors = [t.requires_grad_() for t in (x, weight, bias)]

    def run(**options: Any) -> Any:
        torch.manual_seed(3)
        return hamilton_linear(*tensors, activation="relu", **options)

    whole, y = run(), run(dropout=RATE)
    assert torch.equal(y, run(dropout=RATE, x_is_relu=True, mask_gradient=False))
    assert not torch.equal(y, hamilton_linear(*tensors, activation="relu", dropout=RATE))
    torch.testing.assert_close(y, torch.where(y > 0, whole.float() / (1 - RATE), 0).to(dtype), rtol=0.01, atol=0)
    positive = (whole > 0).sum().item()
    spread = (RATE * (1 - RATE) * positive) ** 0.5
    assert abs((y > 0).sum().item() - (1 - RATE) * positive) < 4 * spread
    dy = torch.randn(y.shape).to(dtype)
    masked = torch.where(y > 0, dy.float() / (1 - RATE), 0).to(dtype).double()
    exact = exactly(tensors)
    truth = torch.autograd.grad(reference(hamilton_linear, *exact), exact, masked)
    tolerance = {torch.float32: 1, torch.bfloat16: 2}[dtype] * TOLERANCE[dtype]  # dy is rounded too
    for value, expected in zip(torch.autograd.grad(y, tensors, dy), truth, strict=True):
        assert_accurate(value, expected, tolerance)


def test_dropout_in_a_chain() -> None:
    """Left to the next layer, the mask is that of what the dropout kept; the scale stays with the layer."""
    x, layers = chained()
    leaves, runs = [x, *itertools.chain(*layers)], []
    for options in ({"linked": False}, {"linked": True}, {"linked": True, "packed": packed_of(x, layers)}):
        torch.manual_seed(1)
        y = chain(x, layers, dropout=RATE, **options)
        runs.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(value.abs().max() > 0 for value in runs[0])
    for value, linked, packed in zip(*runs, strict=True):
        close([linked], [value])
        assert torch.equal(packed, linked)


def test_dropout_that_is_not_fused() -> None:
    """Without a ReLU, which alone tells what was dropped, and of everything."""
    x, weight, bias = torch.randn(3, 8), torch.randn(4, 3, 2), torch.randn(12).requires_grad_()
    y, plain = hamilton_linear(x, weight, bias, dropout=RATE), hamilton_linear(x, weight, bias)
    close([y], [torch.where(y != 0, plain / (1 - RATE), 0)])
    assert 0 < (y == 0).sum() < y.numel()
    (gradient,) = torch.autograd.grad(y.sum(), bias)
    close([gradient], [(y != 0).sum(0) / (1 - RATE)])
    for activation in (None, "relu"):
        y = hamilton_linear(x, weight, bias, activation=activation, dropout=1.0)
        assert y.eq(0).all()
        assert torch.autograd.grad(y.sum(), bias)[0].eq(0).all()
    with pytest.raises(ValueError, match=r"dropout must be a probability, 0 to 1; got 1\.5"):
        hamilton_linear(x, weight, dropout=1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_type_of_a_linear_map(dtype: torch.dtype) -> None:
    """What a head of few outputs wants of half maps, without a kernel that only casts."""
    tensors = [t.to(dtype).requires_grad_() for t in (torch.randn(3, 8), torch.randn(4, 3, 2), torch.randn(12))]
    y = hamilton_linear(*tensors, dtype=torch.float32)
    exact = exactly(tensors)
    assert y.dtype == torch.float32
    assert_accurate(y, reference(hamilton_linear, *exact), TOLERANCE[torch.float32])
    gradients = torch.autograd.grad(y.sum(), tensors)
    truth = torch.autograd.grad(reference(hamilton_linear, *exact).sum(), exact)
    for value, expected in zip(gradients, truth, strict=True):
        assert value.dtype == dtype
        assert_accurate(value, expected, TOLERANCE[dtype])


IN_PLACE = {
    "a map": ({}, True),
    "a map that the next layer masks": ({"activation": "relu", "mask_gradient": False}, True),
    "a ReLU's map": ({"activation": "relu"}, False),
    "maxima": ({"activation": "relu", "pool": 2}, True),
}


@pytest.mark.parametrize(("options", "allowed"), IN_PLACE.values(), ids=IN_PLACE)
def test_in_place_successors(options: Any, allowed: Any) -> None:
    """What the backward reads must not change: PyTorch says so; the rest may."""
    tensors = operands(CASE, requires_grad=True)
    expected = torch.autograd.grad((2 * hamilton_conv2d(*tensors, **options)).sum(), tensors)
    y = hamilton_conv2d(*tensors, **options).mul_(2)
    if allowed:
        for value, truth in zip(torch.autograd.grad(y.sum(), tensors), expected, strict=True):
            assert torch.equal(value, truth)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y.sum(), tensors)


@pytest.mark.parametrize("options", [{"activation": "relu"}, {"activation": "relu", "pool": 2}], ids=str)
def test_checkpointing_changes_nothing(options: Any) -> None:
    tensors = operands(CASE, requires_grad=True)

    def function(*tensors: Any) -> Any:
        return hamilton_conv2d(*tensors, **options)

    plain = torch.autograd.grad(function(*tensors).square().sum(), tensors)
    y = torch.utils.checkpoint.checkpoint(function, *tensors, use_reentrant=False)
    for actual, exact in zip(torch.autograd.grad(y.square().sum(), tensors), plain, strict=True):
        assert torch.equal(actual, exact)


@pytest.mark.parametrize("name", ["conv", "pool", "transposed", "linear"])
def test_autocast_casts_maps_and_leaves_parameters(name: str) -> None:
    """Gradients of parameters come in their own type, float32, without ever being rounded to the maps'."""
    function, tensors = {
        "conv": (lambda *t: hamilton_conv2d(*t, activation="relu"), operands(CASE)),
        "pool": (lambda *t: hamilton_conv2d(*t, activation="relu", pool=2), operands(CASE)),
        "transposed": (
            hamilton_conv_transpose2d,
            [torch.randn(1, 8, 3, 2), torch.randn(4, 2, 1, 2, 1), torch.randn(4)],
        ),
        "linear": (
            lambda *t: hamilton_linear(*t, activation="relu"),
            [torch.randn(3, 8), torch.randn(4, 3, 2), torch.randn(12)],
        ),
    }[name]
    tensors = [t.requires_grad_() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        y = function(*tensors)
    assert y.dtype == torch.bfloat16
    x, weight, bias = (t.detach() for t in tensors)
    exact = exactly([x.bfloat16(), cut(weight, torch.bfloat16), bias])
    expected = reference(function, *exact)
    assert_accurate(y, expected.detach(), TOLERANCE[torch.bfloat16])
    dy = torch.randn_like(y)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(y, tensors, dy)
    tolerances = [TOLERANCE[torch.bfloat16], *[TOLERANCE[torch.float32]] * 2]
    truth = torch.autograd.grad(expected, exact, dy.double())
    for value, gradient, tolerance in zip(actual, truth, tolerances, strict=True):
        assert value.dtype == torch.float32
        assert_accurate(value, gradient, tolerance)


OPS = torch.ops.qkernels
WINDOW = [2, 1, 1, 0, 1, 1, 1]
HOW = ("triton", "signed-ieee")


def samples() -> Any:
    """Arguments of each operator, with every kind of epilogue."""
    x, weight, bias = operands((2, 1, 2, 4, 3, (2, 1), None, None, None, 1), requires_grad=True)
    packed = OPS.hamilton_pack([weight.detach()], HOW[1], x.dtype, HOW[0])
    yield "pack", ([weight.detach(), torch.randn(4, 3, 2)], "signed-ieee q8-ieee", x.dtype, HOW[0])
    none, seed, dtype = (None, None), torch.tensor([3]), x.dtype
    y = OPS.hamilton_conv2d(x, weight, bias, *packed, None, WINDOW, True, 0.0, False, True, dtype, *HOW).detach()
    yield "conv2d", (x, weight, bias, *none, None, WINDOW, True, 0.0, False, True, dtype, *HOW)
    yield "conv2d", (x, weight, bias, *packed, None, WINDOW, False, 0.0, False, True, torch.float16, *HOW)
    yield "conv2d", (x, weight, bias, *packed, seed, WINDOW, True, 0.25, True, True, dtype, *HOW)
    yield "conv2d", (x, weight, bias, *packed, seed, WINDOW, True, 0.25, True, False, dtype, *HOW)
    plain = x.detach(), weight.detach(), None
    yield "conv2d", (*plain, *none, None, WINDOW, False, 0.0, False, True, dtype, *HOW)
    pool = OPS.hamilton_conv2d_pool(x, weight, bias, *packed, WINDOW, True, True, False, *HOW)
    pooled, argmax, _ = (t.detach() for t in pool)
    yield "conv2d_pool", (x, weight, bias, *packed, WINDOW, True, True, False, *HOW)
    yield "conv2d_pool", (x, weight, bias, *none, WINDOW, True, False, True, *HOW)
    yield "conv2d_pool", (*plain, *none, WINDOW, False, False, False, *HOW)
    dy, dpooled = torch.randn_like(y, requires_grad=True), torch.randn_like(pooled)
    shift = torch.randn(4, requires_grad=True)
    yield "conv2d_dx", (dy, weight, shift, *packed, None, x.shape[2:], WINDOW, 1.0, dtype, *HOW)
    yield "conv2d_dw", (dy, x, packed[1], [2, 1], WINDOW, True, 1.0, dtype, *HOW)
    # Behind an epilogue there is a derivative of the first order only: nothing wants one.
    dy, x, weight = dy.detach(), x.detach(), weight.detach()
    sources = ((dy, y, None, None), (dy, y, dpooled, argmax), (None, None, dpooled, argmax))
    for source in sources:
        yield "conv2d_dy", (*source, y.shape[2:], 1.5, torch.float16, HOW[0])
    yield "conv2d_dx", (dy, weight, None, *packed, x.relu(), x.shape[2:], WINDOW, 1.5, dtype, *HOW)
    yield "conv2d_dw", (dy, x, None, [2, 1], WINDOW, False, 1.5, torch.float16, *HOW)


def opcheck(*checks: Any) -> None:
    for name, arguments in samples():
        torch.library.opcheck(getattr(OPS, f"hamilton_{name}"), arguments, test_utils=checks)


def test_opcheck() -> None:
    opcheck("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.slow
def test_opcheck_of_compilation() -> None:
    opcheck("test_aot_dispatch_dynamic")


def test_layout_is_the_fakes() -> None:
    """Compiled code believes the fake: sizes, types and strides, channels_last or not."""

    def on_meta(value: Any) -> Any:
        if isinstance(value, list):
            return [on_meta(part) for part in value]
        return value.detach().to("meta") if isinstance(value, torch.Tensor) else value

    for name, arguments in samples():
        operator = getattr(OPS, f"hamilton_{name}")
        values, fakes = as_tuple(operator(*arguments)), as_tuple(operator(*map(on_meta, arguments)))
        for value, fake in zip(values, fakes, strict=True):
            assert (value.shape, value.dtype, value.stride()) == (fake.shape, fake.dtype, fake.stride()), name


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = qkernels.nn.QuaternionConv2d(4, 8, (1, 2), padding=1, activation="relu", pool=2)
        self.up = qkernels.nn.QuaternionConvTranspose2d(8, 4, (2, 1), (2, 1))
        self.linear = qkernels.nn.QuaternionLinear(4, 8, activation="relu")

    def forward(self, x: torch.Tensor) -> Any:
        return self.linear(self.up(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic: bool) -> None:
    torch._dynamo.reset()
    net = Net()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend=counter)
    for batch in (2, 3) if dynamic else (2, 2):
        x = torch.randn(batch, 4, 4, 3)
        expected = net(x)
        y = compiled(x)
        torch.testing.assert_close(y, expected)
        actual = torch.autograd.grad(y.square().sum(), net.parameters())
        close(actual, torch.autograd.grad(expected.square().sum(), net.parameters()))
    assert counter.frame_count == 1


def test_tap_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    x, weight, bias = operands(CASE, requires_grad=True)

    def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        return hamilton_conv2d(x, weight, bias, activation="relu", pool=2, return_map=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    outputs, expected = compiled(x, weight, bias), function(x, weight, bias)
    dys = [torch.randn_like(y) for y in outputs]
    for value, truth in zip(outputs, expected, strict=True):
        assert torch.equal(value, truth)
        assert value.stride() == truth.stride()
    close(torch.autograd.grad(outputs, (x, weight, bias), dys), torch.autograd.grad(expected, (x, weight, bias), dys))


def test_chain_compiles_to_one_graph() -> None:
    """With its weights packed inside of it, and a dropout, whose seed PyTorch draws."""
    torch._dynamo.reset()
    x, layers = chained()
    leaves = [x, *itertools.chain(*layers)]

    def function(x: torch.Tensor, layers: Any) -> Any:
        return chain(x, layers, True, RATE, packed=packed_of(x, layers))

    compiled, runs = torch.compile(function, fullgraph=True, backend="aot_eager"), []
    for call in (function, compiled):
        torch.manual_seed(1)
        y = call(x, layers)
        runs.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    close(*runs)


def test_uninitialised_memory_is_poisoned() -> None:
    """What the fixture `poison` promises of the two ways in which the launchers allocate."""
    like = hamilton_linear(torch.ones(1, 4), torch.ones(4, 1, 1))
    assert torch.empty(3).isnan().all()
    assert torch.empty((1, 2, 3, 4), memory_format=torch.channels_last, dtype=torch.bfloat16).isnan().all()
    assert like.new_empty(5).isnan().all()
    assert torch.empty(3, dtype=torch.uint8).tolist() == [255] * 3


@pytest.mark.parametrize("splits", [1, 3])
def test_two_runs_are_bitwise_equal(splits: int, tiles: Tiles) -> None:
    tiles.splits = splits
    runs = []
    for _ in range(2):
        torch.manual_seed(2)
        tensors = operands(CASE, requires_grad=True)
        outputs = hamilton_conv2d(*tensors, activation="relu", pool=2, return_map=True)
        runs.append([*outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), tensors)])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_settings_of_the_backend(memory: Any) -> None:
    """What an explicit request computes, and that nobody is sent into the interpreter unasked."""
    x, weight, _ = operands(CASE)
    hamilton_linear(torch.ones(1, 4), torch.ones(4, 1, 1))
    wide, weights = torch.ones(1, 512, 3, 3), torch.ones(4, 128, 128, 3, 3)
    assert qkernels.backend_of(hamilton_conv2d, x, weight) == "triton"
    assert qkernels.form_of(hamilton_conv2d, x, weight) == "signed"
    assert qkernels.form_of(hamilton_conv2d, wide, weights) == "q8"
    assert qkernels.form_of(hamilton_conv2d, wide.half(), weights) == "signed"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    assert qkernels.form_of(hamilton_conv2d, wide, weights) == "signed"
    assert qkernels.form_of(hamilton_linear, torch.ones(1, 512), torch.ones(4, 128, 128)) == "q8"
    with qkernels.set_form("q8"), pytest.raises(ValueError, match="float32 operands without TF32"):
        hamilton_conv2d(x, weight)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    with qkernels.set_form("q8"), pytest.raises(ValueError, match="float32 operands without TF32"):
        hamilton_conv2d(x.half(), weight.half())
    with qkernels.set_form("dense"), pytest.raises(ValueError, match="form 'dense' is plain PyTorch's"):
        hamilton_conv2d(x, weight)
    for form in FORMS:
        with qkernels.set_form(form):
            assert qkernels.form_of(hamilton_conv2d, x, weight) == form
    with qkernels.set_backend("auto"):
        assert qkernels.backend_of(hamilton_conv2d, x, weight) == "torch"
    launches = memory.launches
    with pytest.raises(ValueError, match=r"'triton' is set, but the kernels compute .*, not torch.float64"):
        hamilton_conv2d(x.double(), weight.double())
    with pytest.raises(ValueError, match=r"'triton' is set, but the kernels compute .*, not torch.float64"):
        qkernels.gram_cosine(x, x.double())
    assert memory.launches == launches


@pytest.mark.parametrize("form", FORMS)
def test_the_kernels_count_as_plain_pytorch(form: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x, weight, bias = operands(CASE, requires_grad=True)
    counts = []
    for backend, options in itertools.product(("triton", "auto"), ({}, {"activation": "relu", "pool": 2})):
        counter, chosen = FlopCounterMode(display=False), form if backend == "triton" else "dense"
        with qkernels.set_backend(backend), qkernels.set_form(chosen), counter:
            y = hamilton_conv2d(x, weight, bias, *CASE[6:], **options)
            hamilton_linear(y.flatten(1), torch.ones(4, 1, y[0].numel() // 4)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[:2] == counts[2:]
    assert min(counts) > 0
