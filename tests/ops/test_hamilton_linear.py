"""The linear map: the definition against scalar arithmetic, every form against the definition."""

import itertools
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch.autograd import gradcheck, gradgradcheck

import qkernels
from qkernels import hamilton_linear

FORMS = ["dense", "q8"]
# leading shape, K, N
CASES = [((5,), 3, 2), ((), 1, 4), ((2, 3), 2, 1), ((1, 1, 4), 1, 1)]
all_cases = pytest.mark.parametrize("case", CASES, ids=str)
all_forms = pytest.mark.parametrize("form", FORMS)


def operands(case: Any, dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> Any:
    leading, k, n = case
    shapes = (*leading, 4 * k), (4, n, k), (4 * n,)
    return [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes]


def reference(*args: Any, **kwargs: Any) -> Any:
    with qkernels.set_backend("reference"):
        return hamilton_linear(*args, **kwargs)


def test_definition_is_quaternion_arithmetic() -> None:
    (x, weight, bias), k, n = operands(((), 3, 2)), 3, 2
    y = bias.view(4, n).clone()
    for row in range(n):
        for column in range(k):
            a, b, c, d = weight[:, row, column].tolist()
            e, f, g, h = x.view(4, k)[:, column].tolist()
            y[0, row] += a * e - b * f - c * g - d * h
            y[1, row] += a * f + b * e + c * h - d * g
            y[2, row] += a * g - b * h + c * e + d * f
            y[3, row] += a * h + b * g - c * f + d * e
    torch.testing.assert_close(reference(x, weight, bias), y.view(-1))


def test_definition_is_speechbrains_layer(speechbrain_layers: Any) -> None:
    layer = speechbrain_layers["q_linear"].QLinear(n_neurons=3, input_shape=[2, 8])
    torch.nn.init.normal_(layer.bias)
    weight = torch.stack([layer.r_weight, layer.i_weight, layer.j_weight, layer.k_weight]).mT
    x = torch.randn(2, 8)
    torch.testing.assert_close(reference(x, weight, layer.bias), layer(x))


@all_cases
@all_forms
@pytest.mark.parametrize(("with_bias", "activation"), [(False, None), (True, "relu")])
def test_forms_equal_the_definition(case: Any, form: str, with_bias: bool, activation: str | None) -> None:
    x, weight, bias = operands(case, requires_grad=True)
    inputs = (x, weight, bias)[: 2 + with_bias]
    with qkernels.set_form(form):
        y = hamilton_linear(*inputs, activation=activation)
    expected = reference(*inputs, activation=activation)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for actual, exact in zip(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True
    ):
        torch.testing.assert_close(actual, exact)


@all_forms
def test_derivatives_of_any_order(form: str) -> None:
    inputs = operands(((3,), 2, 2), requires_grad=True)

    def function(*inputs: Any) -> Any:
        with qkernels.set_form(form):
            return hamilton_linear(*inputs, activation="relu")

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@all_forms
@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_frozen_operands(form: str, needed: tuple[bool, bool, bool]) -> None:
    tensors = operands(((3,), 2, 2))
    with qkernels.set_form(form):
        full = [t.clone().requires_grad_() for t in tensors]
        y = hamilton_linear(*full, activation="relu")
        gradients = torch.autograd.grad(y.sum(), full)
        some = [t.clone().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]
        frozen = hamilton_linear(*some, activation="relu")
        frozen.sum().backward()
    assert torch.equal(frozen, y)
    for tensor, gradient, need in zip(some, gradients, needed, strict=True):
        assert torch.equal(tensor.grad, gradient) if need else tensor.grad is None


@all_forms
def test_strides_and_expanded_gradients(form: str) -> None:
    x, weight, bias = operands(((4,), 3, 2), requires_grad=True)
    with qkernels.set_form(form):
        y = hamilton_linear(x, weight, bias)
        expected = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
        strided = hamilton_linear(x.t().contiguous().t(), weight.mT.contiguous().mT, bias)
        torch.testing.assert_close(strided, y)
        for scale in (strided.sum(), hamilton_linear(x, weight, bias).sum()):
            for actual, exact in zip(torch.autograd.grad(scale, (x, weight, bias)), expected, strict=True):
                torch.testing.assert_close(actual, exact)


@all_forms
def test_empty_batch(form: str) -> None:
    x, weight, bias = operands(((0,), 2, 3), requires_grad=True)
    with qkernels.set_form(form):
        y = hamilton_linear(x, weight, bias, activation="relu")
    assert y.shape == (0, 12)
    y.sum().backward()
    assert weight.grad.eq(0).all()


@all_forms
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 6e-4), (torch.bfloat16, 4.5e-3)]
)
def test_types_against_float64(form: str, dtype: torch.dtype, tolerance: float) -> None:
    tensors = operands(((20,), 40, 24), dtype, requires_grad=True)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    with qkernels.set_form(form):
        y = hamilton_linear(*tensors)
    expected = reference(*exact)
    dy = torch.randn_like(y)
    pairs = [(y, expected)]
    pairs += zip(torch.autograd.grad(y, tensors, dy), torch.autograd.grad(expected, exact, dy.double()), strict=True)
    for actual, truth in pairs:
        assert actual.dtype == dtype
        assert ((actual.double() - truth).norm() / truth.norm()).item() < tolerance


@all_forms
def test_opcheck(form: str) -> None:
    x, weight, bias = operands(((3,), 2, 3), torch.float32, requires_grad=True)
    dy = torch.randn(3, 12, requires_grad=True)
    ops = torch.ops.qkernels
    for masks in itertools.product([False, True], repeat=2):
        torch.library.opcheck(ops.hamilton_linear, (x, weight, bias, None, True, *masks, form))
    torch.library.opcheck(ops.hamilton_linear, (x, weight.detach(), None, None, False, False, True, form))
    torch.library.opcheck(ops.hamilton_linear_dx, (dy, weight, form))
    for with_bias in (False, True):
        torch.library.opcheck(ops.hamilton_linear_dw, (dy, x, with_bias, form))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@all_forms
def test_a_chain_applies_each_mask_once(form: str, backend: str) -> None:
    x, weight, bias = operands(((3,), 2, 4), requires_grad=True)
    second = torch.randn(4, 3, 4, dtype=torch.float64, requires_grad=True)
    tensors = (x, weight, bias, second)
    with qkernels.set_form(form), qkernels.set_backend(backend):
        values = []
        for moved in (False, True):
            y = hamilton_linear(x, weight, bias, activation="relu", mask_gradient=not moved)
            assert (y == 0).any()
            values.append(hamilton_linear(y, second, x_is_relu=moved))
        assert torch.equal(*values)
        dy = torch.randn_like(values[0])
        expected, actual = (torch.autograd.grad(value, tensors, dy) for value in values)
        for gradient, truth in zip(actual, expected, strict=True):
            torch.testing.assert_close(gradient, truth)
        x = x.detach().relu().requires_grad_()
        (masked,) = torch.autograd.grad(hamilton_linear(x, weight, x_is_relu=True).sum(), x)
        (plain,) = torch.autograd.grad(hamilton_linear(x, weight).sum(), x)
        assert torch.equal(masked, plain * (x > 0))
        assert not torch.equal(masked, plain)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@all_forms
def test_flatten_is_torchs(form: str, backend: str) -> None:
    """Of maps in either layout; the gradient has the maps' shape."""
    maps = torch.randn(3, 8, 2, 5, dtype=torch.float64)
    _, weight, bias = operands(((3,), 20, 4))
    with qkernels.set_form(form), qkernels.set_backend(backend):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = maps.to(memory_format=layout).requires_grad_()
            flat = maps.flatten(1).requires_grad_()
            y = hamilton_linear(x, weight, bias, activation="relu", flatten=True)
            expected = hamilton_linear(flat, weight, bias, activation="relu")
            torch.testing.assert_close(y, expected)
            dy = torch.randn_like(y)
            (actual,), (exact,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, flat, dy)
            torch.testing.assert_close(actual, exact.view_as(maps))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_dropout_zeroes_a_share_and_scales_the_rest(backend: str, activation: str | None) -> None:
    x, weight, bias = operands(((400,), 8, 16), requires_grad=True)
    with qkernels.set_backend(backend):
        # The mask that a layer behind it could apply is not the dropout's.
        y = hamilton_linear(x, weight, bias, activation=activation, dropout=0.3, mask_gradient=False)
        plain = hamilton_linear(x, weight, bias, activation=activation)
        zero = (y == 0) & (plain != 0)
        assert 0.28 < zero.sum() / (plain != 0).sum() < 0.32
        torch.testing.assert_close(y, plain / 0.7 * ~zero)
        dy = torch.randn_like(y)
        for actual, exact in zip(
            torch.autograd.grad(y, (x, weight, bias), dy),
            torch.autograd.grad(plain, (x, weight, bias), dy / 0.7 * ~zero),
            strict=True,
        ):
            torch.testing.assert_close(actual, exact)
        assert torch.equal(hamilton_linear(x, weight, activation=activation, dropout=1.0), torch.zeros_like(y))


def test_dropout_follows_pytorchs_generator() -> None:
    x, weight, _ = operands(((20,), 2, 4))

    def seeded(seed: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return hamilton_linear(x, weight, dropout=0.5)

    assert torch.equal(seeded(7), seeded(7))
    assert not torch.equal(seeded(7), seeded(8))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_type_of_the_result(backend: str) -> None:
    """And the gradients' types are still the operands'."""
    x, weight, bias = operands(((3,), 2, 4), torch.bfloat16, requires_grad=True)
    with qkernels.set_backend(backend):
        y = hamilton_linear(x, weight, bias, activation="relu", dtype=torch.float32)
        assert torch.equal(y, hamilton_linear(x, weight, bias, activation="relu").float())
        assert {t.dtype for t in torch.autograd.grad(y.sum(), (x, weight, bias))} == {torch.bfloat16}
        with torch.autocast("cpu", torch.bfloat16):
            y = hamilton_linear(x.float(), weight.float(), dtype=torch.float32)
    assert y.dtype == torch.float32


@all_forms
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(form: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    layer = qkernels.nn.QuaternionLinear(8, 12, activation="relu")
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=counter)
    with qkernels.set_form(form):
        for batch in (2, 3, 5) if dynamic else (2, 2):
            x = torch.randn(batch, 3, 8)
            y = compiled(x)
            torch.testing.assert_close(y, layer(x))
            actual = torch.autograd.grad(y.square().sum(), layer.weight)
            torch.testing.assert_close(actual, torch.autograd.grad(layer(x).square().sum(), layer.weight))
    assert counter.frame_count == 1


@all_forms
def test_autocast_is_that_of_torch(form: str) -> None:
    x, weight, bias = operands(((5,), 3, 2), torch.float32, requires_grad=True)
    with qkernels.set_form(form):
        with torch.autocast("cpu", torch.bfloat16):
            y = hamilton_linear(x, weight, bias)
        expected = hamilton_linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    assert torch.autograd.grad(y.sum(), weight)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (torch.tensor(1.0), torch.ones(4, 2, 2), None, r"x must have at least one dimension.*scalar"),
        (torch.ones(2, 6), torch.ones(4, 2, 2), None, "x must have a number of channels divisible by 4 .*; got 6"),
        (torch.ones(2, 4), torch.ones(4, 2, 2), None, r"x must have 8 = 4 \* weight.shape\[2\] channels; got 4"),
        (torch.ones(2, 8), torch.ones(2, 2), None, r"weight must have shape \[4, N, K\]; got \(2, 2\)"),
        (torch.ones(2, 8), torch.ones(4, 2, 2), torch.ones(2), r"bias must have shape \(8,\); got \(2,\)"),
    ],
)
def test_bad_input(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hamilton_linear(x, weight, bias)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": -0.1}, "dropout must be a probability, 0 to 1; got -0.1"),
        ({"dropout": 1.5}, "dropout must be a probability, 0 to 1; got 1.5"),
        ({"flatten": True}, r"x must have shape \[B, 4 Q, H, W\] with flatten=True; got \(2, 8\)"),
        ({"activation": "tanh"}, "activation must be one of None, 'relu'; got 'tanh'"),
    ],
)
def test_bad_options(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hamilton_linear(torch.ones(2, 8), torch.ones(4, 2, 2), **options)


def test_flattened_maps_must_fit() -> None:
    with pytest.raises(ValueError, match=r"x must have 24 = 4 \* weight.shape\[2\] channels; got 32"):
        hamilton_linear(torch.ones(2, 8, 2, 2), torch.ones(4, 2, 6), flatten=True)
    # 4 * 6 numbers, but 6 of them are no whole number of maps of 4 x 1.
    with pytest.raises(ValueError, match=r"x must have shape \[B, 4 Q, H, W\] with flatten=True; got \(2, 6, 4, 1\)"):
        hamilton_linear(torch.ones(2, 6, 4, 1), torch.ones(4, 2, 6), flatten=True)
