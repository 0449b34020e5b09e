"""Convolution and its transpose: the definition against scalar arithmetic, every form against the definition."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import qkernels
from qkernels import algebra, hamilton_conv2d, hamilton_conv_transpose2d
from qkernels.ops.hamilton_conv import config
from qkernels.ops.hamilton_conv.config import cpu_form

FORMS = ["dense", "q8"]
# B, Q, P, H, W, kernel, stride, padding, dilation, groups
CASES = {
    "1x1": (2, 2, 3, 4, 5, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "3x3": (2, 1, 2, 5, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "5x5": (1, 2, 1, 7, 6, (5, 5), (2, 1), (2, 2), (1, 1), 1),
    "4x2 strided": (2, 1, 1, 7, 8, (4, 2), (3, 2), (1, 0), (1, 1), 1),
    "3x2 dilated": (1, 2, 1, 8, 7, (3, 2), (1, 2), (2, 1), (2, 3), 1),
    "grouped": (2, 4, 6, 4, 5, (2, 3), (1, 1), (1, 1), (1, 1), 2),
    "depthwise": (1, 3, 3, 5, 5, (3, 3), (2, 2), (1, 1), (1, 1), 3),
}
all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
all_forms = pytest.mark.parametrize("form", FORMS)


def operands(case: Any, dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> Any:
    batch, q, p, height, width, kernel, *_, groups = case
    shapes = (batch, 4 * q, height, width), (4, p, q // groups, *kernel), (4 * p,)
    return [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes]


def window_of(case: Any) -> Any:
    """As the operators take it."""
    stride, padding, dilation, groups = case[6:]
    return [*stride, *padding, *dilation, groups]


def transposed_operands(case: Any, dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> Any:
    """Operands of the transposed convolution that maps back to the case's input, and the output padding it needs."""
    x, weight, _ = operands(case, dtype)
    y = hamilton_conv2d(x, weight, None, *case[6:])
    _, _, _, height, width, kernel, stride, padding, dilation, _ = case
    output_padding = tuple(
        (size + 2 * pad - d * (k - 1) - 1) % s
        for size, pad, d, k, s in zip((height, width), padding, dilation, kernel, stride, strict=True)
    )
    bias = torch.randn(x.shape[1], dtype=dtype)
    tensors = [t.detach().requires_grad_(requires_grad) for t in (torch.randn_like(y), weight, bias)]
    return tensors, output_padding


def transpose(y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, case: Any, output_padding: Any) -> Any:
    *_, stride, padding, dilation, groups = case
    return hamilton_conv_transpose2d(y, weight, bias, stride, padding, output_padding, groups, dilation)


def reference(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with qkernels.set_backend("reference"):
        return function(*args, **kwargs)


def relative_error(actual: Any, exact: Any) -> Any:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def quaternion_product(p: Any, q: Any) -> Any:
    a, b, c, d = p
    e, f, g, h = q
    return (
        a * e - b * f - c * g - d * h,
        a * f + b * e + c * h - d * g,
        a * g - b * h + c * e + d * f,
        a * h + b * g - c * f + d * e,
    )


def scalar_convolution(
    x: torch.Tensor, weight: torch.Tensor, stride: Any, padding: Any, dilation: Any, groups: Any
) -> Any:
    """One quaternion product at a time, in Python numbers."""
    batch, channels, height, width = x.shape
    q, (_, p, group_q, kh, kw) = channels // 4, weight.shape
    size = [
        (n + 2 * pad - d * (k - 1) - 1) // s + 1
        for n, k, s, pad, d in zip((height, width), (kh, kw), stride, padding, dilation, strict=True)
    ]
    y = torch.zeros(batch, 4, p, *size, dtype=x.dtype)
    for b, o, c, row, column, u, v in itertools.product(*map(range, (batch, p, group_q, *size, kh, kw))):
        h, w = row * stride[0] - padding[0] + u * dilation[0], column * stride[1] - padding[1] + v * dilation[1]
        if 0 <= h < height and 0 <= w < width:
            channel = o // (p // groups) * group_q + c
            pixel = [x[b, component * q + channel, h, w].item() for component in range(4)]
            tap = weight[:, o, c, u, v].tolist()
            y[b, :, o, row, column] += torch.tensor(quaternion_product(tap, pixel), dtype=x.dtype)
    return y.flatten(1, 2)


@pytest.mark.parametrize("name", ["3x3", "4x2 strided", "depthwise"])
def test_definition_is_quaternion_arithmetic(name: str) -> None:
    case = CASES[name]
    x, weight, bias = operands(case)
    expected = scalar_convolution(x, weight, *case[6:]) + bias.view(-1, 1, 1)
    torch.testing.assert_close(reference(hamilton_conv2d, x, weight, bias, *case[6:]), expected)


def test_definition_is_speechbrains_layer(speechbrain_layers: Any) -> None:
    layer = speechbrain_layers["q_CNN"].QConv2d(3, (3, 3), input_shape=[2, 7, 6, 8], padding="valid")
    weight = torch.stack([layer.r_weight, layer.i_weight, layer.j_weight, layer.k_weight])
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 8, 6, 7)
    # It exchanges axes 1 and 3 before the convolution and after it.
    expected = layer(x.transpose(1, 3)).transpose(1, 3)
    torch.testing.assert_close(reference(hamilton_conv2d, x, weight, layer.bias), expected)


@all_cases
@all_forms
@pytest.mark.parametrize(("with_bias", "activation"), [(False, None), (True, "relu")])
def test_forms_equal_the_definition(case: Any, form: str, with_bias: bool, activation: str | None) -> None:
    x, weight, bias = operands(case, requires_grad=True)
    inputs = (x, weight, bias) if with_bias else (x, weight)
    arguments = (x, weight, bias if with_bias else None, *case[6:])
    with qkernels.set_form(form):
        y = hamilton_conv2d(*arguments, activation=activation)
    expected = reference(hamilton_conv2d, *arguments, activation=activation)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous()
    if activation:
        assert (y == 0).any()
    dy = torch.randn_like(y)
    for actual, exact in zip(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True
    ):
        torch.testing.assert_close(actual, exact)


@all_cases
@all_forms
def test_derivatives_of_any_order(case: Any, form: str) -> None:
    x, weight, bias = operands(case, requires_grad=True)

    def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        with qkernels.set_form(form):
            return hamilton_conv2d(x, weight, bias, *case[6:], activation="relu")

    assert gradcheck(function, (x, weight, bias), fast_mode=True)
    assert gradgradcheck(function, (x, weight, bias), fast_mode=True)


@all_forms
def test_gradcheck_of_every_entry(form: str) -> None:
    x, weight, bias = operands((1, 2, 2, 3, 3, (2, 2), (1, 1), (1, 0), (1, 1), 2)[:10], requires_grad=True)

    def function(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        with qkernels.set_form(form):
            return hamilton_conv2d(x, weight, bias, 1, (1, 0), 1, 2, activation="relu")

    assert gradcheck(function, (x, weight, bias))
    assert gradgradcheck(function, (x, weight, bias))


@all_cases
@all_forms
def test_transposed_is_the_adjoint(case: Any, form: str) -> None:
    x, weight, _ = operands(case)
    (y, _, bias), output_padding = transposed_operands(case)
    with qkernels.set_form(form):
        forward = hamilton_conv2d(x, weight, None, *case[6:])
        backward = transpose(y, weight, None, case, output_padding)
        shifted = transpose(y, weight, bias, case, output_padding)
    assert backward.shape == x.shape
    torch.testing.assert_close((forward * y).sum(), (x * backward).sum())
    torch.testing.assert_close(shifted, backward + bias.view(-1, 1, 1))
    torch.testing.assert_close(backward, reference(transpose, y, weight, None, case, output_padding))


@all_cases
@all_forms
def test_transposed_derivatives(case: Any, form: str) -> None:
    tensors, output_padding = transposed_operands(case, requires_grad=True)

    def function(*tensors: Any) -> Any:
        with qkernels.set_form(form):
            return transpose(*tensors, case, output_padding)

    assert gradcheck(function, tensors, fast_mode=True)
    assert gradgradcheck(function, tensors, fast_mode=True)
    y, expected = function(*tensors), reference(transpose, *tensors, case, output_padding)
    dy = torch.randn_like(y)
    for actual, exact in zip(
        torch.autograd.grad(y, tensors, dy), torch.autograd.grad(expected, tensors, dy), strict=True
    ):
        torch.testing.assert_close(actual, exact)


def test_transposed_multiplies_by_the_conjugate() -> None:
    x, weight = torch.randn(1, 4, 1, 1), torch.randn(4, 1, 1, 1, 1)
    conjugate = weight * torch.tensor([1.0, -1, -1, -1]).view(4, 1, 1, 1, 1)
    torch.testing.assert_close(hamilton_conv_transpose2d(x, weight), hamilton_conv2d(x, conjugate))


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_transposed_output_size_is_torchs(stride: int) -> None:
    x, weight = torch.randn(1, 4, 4, 5), torch.randn(4, 1, 2, 3, 4)
    y = hamilton_conv_transpose2d(x, weight, None, stride, (1, 2), (stride - 1, 0), dilation=(2, 1))
    torch_y = torch.nn.functional.conv_transpose2d(
        x, torch.randn(4, 8, 3, 4), None, stride, (1, 2), (stride - 1, 0), dilation=(2, 1)
    )
    assert y.shape == torch_y.shape


class Calls(TorchDispatchMode):
    """The names of this package's operators, in the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "qkernels":
            self.names.append(func._schema.name.removeprefix("qkernels::hamilton_conv2d"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("needed", list(itertools.product([True, False], repeat=3))[:-1])
@all_forms
def test_frozen_operands_cost_nothing_and_change_nothing(needed: Any, form: str) -> None:
    x, weight, bias = operands(CASES["3x3"])
    with qkernels.set_form(form):
        full = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = hamilton_conv2d(*full, padding=1, activation="relu")
        dy = torch.randn_like(y)
        gradients = torch.autograd.grad(y, full, dy)
        some = [t.clone().requires_grad_(need) for t, need in zip((x, weight, bias), needed, strict=True)]
        with Calls() as calls:
            frozen = hamilton_conv2d(*some, padding=1, activation="relu")
            frozen.backward(dy)
    assert torch.equal(frozen, y)
    assert calls.names == [""] + ["_dx"] * needed[0] + ["_dw"] * needed[1]
    for tensor, gradient, need in zip(some, gradients, needed, strict=True):
        assert torch.equal(tensor.grad, gradient) if need else tensor.grad is None


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_frozen_operands_of_the_transposed(needed: tuple[bool, bool]) -> None:
    (y, weight, _), output_padding = transposed_operands(CASES["grouped"])
    some = [t.requires_grad_(need) for t, need in zip((y, weight), needed, strict=True)]
    with Calls() as calls:
        transpose(*some, None, CASES["grouped"], output_padding).sum().backward()
    assert calls.names == ["_dx"] + [""] * needed[0] + ["_dw"] * needed[1]


def saved_by(form: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), qkernels.set_form(form):
        hamilton_conv2d(*tensors, padding=1)
    return saved


def test_saves_only_what_the_backward_needs() -> None:
    x, weight, bias = operands(CASES["3x3"])
    saved = saved_by("q8", x.requires_grad_(), weight, bias)
    assert [t.data_ptr() for t in saved] == [weight.data_ptr()]
    saved = saved_by("dense", x, weight.requires_grad_(), bias)  # what `torch.nn.functional.conv2d` saves
    assert saved[0].data_ptr() == x.data_ptr()
    assert torch.equal(saved[1], algebra.expand_weight(weight.detach()))
    assert len(saved) == 2


@all_forms
@pytest.mark.parametrize("groups", [1, 2])
def test_expanded_and_strided_gradients(form: str, groups: int) -> None:
    x, weight, bias = operands((2, 2, 4, 5, 6, (3, 3), (1, 1), (1, 1), (1, 1), groups), requires_grad=True)

    def gradients(dy: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        with qkernels.set_form(form):
            y = hamilton_conv2d(x, weight, bias, padding=1, groups=groups, activation="relu")
        return torch.autograd.grad(y, (x, weight, bias), dy(y))

    expected = gradients(torch.ones_like)
    for dy in (
        lambda y: torch.ones((), dtype=y.dtype).expand_as(y),
        lambda y: torch.ones_like(y, memory_format=torch.channels_last),
        lambda y: torch.ones(*y.shape[:3], 2 * y.shape[3], dtype=y.dtype)[..., ::2],
    ):
        assert not dy(hamilton_conv2d(x, weight, padding=1, groups=groups)).is_contiguous()
        for actual, exact in zip(gradients(dy), expected, strict=True):
            torch.testing.assert_close(actual, exact)


@all_forms
@pytest.mark.parametrize("groups", [1, 2])
def test_operands_of_any_stride(form: str, groups: int) -> None:
    x, weight, bias = operands((2, 2, 4, 5, 6, (3, 3), (1, 1), (1, 1), (1, 1), groups))
    with qkernels.set_form(form):
        y = hamilton_conv2d(x, weight, bias, padding=1, groups=groups)
        for strided in (
            x.to(memory_format=torch.channels_last),
            x.repeat(1, 2, 1, 1)[:, : x.shape[1]],
            x.transpose(2, 3).contiguous().transpose(2, 3),
        ):
            before = strided.clone()
            swapped = weight.transpose(0, 3).contiguous().transpose(0, 3)
            assert not swapped.is_contiguous()
            torch.testing.assert_close(hamilton_conv2d(strided, swapped, bias, padding=1, groups=groups), y)
            assert torch.equal(strided, before)


@all_forms
def test_empty_batch(form: str) -> None:
    x, weight, bias = operands((0, 2, 3, 5, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1), requires_grad=True)
    with qkernels.set_form(form):
        y = hamilton_conv2d(x, weight, bias, padding=1, activation="relu")
        z = hamilton_conv_transpose2d(y, weight, padding=1)
    assert y.shape == (0, 12, 5, 5)
    assert z.shape == x.shape
    z.sum().backward()
    assert x.grad.shape == x.shape
    assert weight.grad.eq(0).all()
    assert bias.grad.eq(0).all()


@all_forms
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 6e-4), (torch.bfloat16, 4.5e-3)]
)
def test_types_against_float64(form: str, dtype: torch.dtype, tolerance: float) -> None:
    """Errors against the exact result of the operands as stored; bounds of one rounding of operands and result."""
    case = (3, 16, 8, 6, 7, (3, 3), (1, 1), (1, 1), (1, 1), 1)
    tensors = [t.requires_grad_() for t in operands(case, dtype)]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    with qkernels.set_form(form):
        y = hamilton_conv2d(*tensors, padding=1)
        z = hamilton_conv_transpose2d(y.detach(), tensors[1], padding=1)
    expected = reference(hamilton_conv2d, *exact, padding=1)
    assert y.dtype == z.dtype == dtype
    assert relative_error(y, expected) < tolerance
    assert relative_error(z, reference(hamilton_conv_transpose2d, y.detach().double(), exact[1], padding=1)) < tolerance
    dy = torch.randn_like(y)
    for actual, truth in zip(
        torch.autograd.grad(y, tensors, dy), torch.autograd.grad(expected, exact, dy.double()), strict=True
    ):
        assert actual.dtype == dtype
        assert relative_error(actual, truth) < tolerance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_definition_in_every_type(dtype: torch.dtype) -> None:
    x, weight, bias = operands(CASES["grouped"], dtype)
    exact = reference(hamilton_conv2d, x.double(), weight.double(), bias.double(), *CASES["grouped"][6:])
    actual = reference(hamilton_conv2d, x, weight, bias, *CASES["grouped"][6:])
    assert actual.dtype == dtype
    assert relative_error(actual, exact) < 8 * torch.finfo(dtype).eps


@all_forms
@pytest.mark.parametrize("name", ["3x3", "4x2 strided", "grouped"])
def test_opcheck(form: str, name: str) -> None:
    case = CASES[name]
    x, weight, bias = operands(case, torch.float32, requires_grad=True)
    window = window_of(case)
    y = hamilton_conv2d(x, weight, bias, *case[6:]).detach().requires_grad_()
    ops, nothing = torch.ops.qkernels, (None, None, None)
    how, scaled = (torch.float32, "torch", form), (1.0, torch.float32, "torch", form)
    for masks in itertools.product([False, True], repeat=2):
        torch.library.opcheck(ops.hamilton_conv2d, (x, weight, bias, *nothing, window, True, 0.0, *masks, *how))
    plain = (window, False, 0.0, False, True)
    torch.library.opcheck(ops.hamilton_conv2d, (x.detach(), weight, None, *nothing, *plain, *how))
    torch.library.opcheck(ops.hamilton_conv2d_dx, (y, weight, None, *nothing, x.shape[2:], window, *scaled))
    shift = torch.randn(x.shape[1], requires_grad=True)
    torch.library.opcheck(ops.hamilton_conv2d_dx, (y, weight, shift, *nothing, x.shape[2:], window, *scaled))
    for with_bias in (False, True):
        torch.library.opcheck(ops.hamilton_conv2d_dw, (y, x, None, weight.shape[3:], window, with_bias, *scaled))


@all_forms
@pytest.mark.parametrize("with_bias", [True, False])
def test_weight_gradient_sums_the_bias_gradient_too(form: str, with_bias: bool) -> None:
    x, weight, bias = operands(CASES["grouped"], requires_grad=True)
    y = reference(hamilton_conv2d, x, weight, bias, *CASES["grouped"][6:])
    dy = torch.randn_like(y)
    how = (1.0, torch.float64, "torch", form)
    arguments = (dy, x.detach(), None, weight.shape[3:], window_of(CASES["grouped"]), with_bias, *how)
    dw, db = torch.ops.qkernels.hamilton_conv2d_dw(*arguments)
    exact_dw, exact_db = torch.autograd.grad(y, (weight, bias), dy)
    torch.testing.assert_close(dw, exact_dw)
    torch.testing.assert_close(db, exact_db if with_bias else db.new_empty(0))


@all_forms
@pytest.mark.parametrize("activation", [None, "relu"])
def test_pool_is_torchs(form: str, activation: str | None) -> None:
    """Of maps of odd size too; with the map in front of it where a tap is asked for, and the gradients of both."""
    x, weight, bias = operands((2, 2, 3, 6, 8, (2, 2), (1, 1), (0, 0), (1, 1), 1), requires_grad=True)
    tensors = (x, weight, bias)
    with qkernels.set_form(form):
        y = hamilton_conv2d(*tensors, activation=activation)
        pooled = hamilton_conv2d(*tensors, activation=activation, pool=2)
        tapped, tapped_pool = hamilton_conv2d(*tensors, activation=activation, pool=2, return_map=True)
    assert pooled.shape == (2, 12, 2, 3)
    assert pooled.is_contiguous()
    assert torch.equal(pooled, torch.nn.functional.max_pool2d(y, 2))
    assert torch.equal(tapped, y)
    assert torch.equal(tapped_pool, pooled)
    expected = reference(hamilton_conv2d, *tensors, activation=activation, pool=2, return_map=True)
    for value, truth in zip((tapped, tapped_pool), expected, strict=True):
        torch.testing.assert_close(value, truth)
    dys = [torch.randn_like(t) for t in expected]
    for used in ([0], [1], [0, 1]):
        actual, exact = (
            torch.autograd.grad([pair[i] for i in used], tensors, [dys[i] for i in used], retain_graph=True)
            for pair in ((tapped, tapped_pool), expected)
        )
        for value, truth in zip(actual, exact, strict=True):
            torch.testing.assert_close(value, truth)


@pytest.mark.parametrize("dynamic", [False, True])
def test_pool_and_tap_compile_to_one_graph(dynamic: bool) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(hamilton_conv2d, fullgraph=True, dynamic=dynamic, backend=counter)
    for batch in (5, 7, 9) if dynamic else (5, 5):  # no size twice: they would be tied
        x, weight, bias = operands((batch, 1, 2, 11, 10, (3, 3), None, None, None, 1), torch.float32)
        options = {"activation": "relu", "pool": 2, "return_map": True}
        for value, truth in zip(
            compiled(x, weight, bias, **options), hamilton_conv2d(x, weight, bias, **options), strict=True
        ):
            torch.testing.assert_close(value, truth)
    assert counter.frame_count == 1


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = qkernels.nn.QuaternionConv2d(4, 8, 3, padding=1, activation="relu")
        self.up = qkernels.nn.QuaternionConvTranspose2d(8, 4, 3, 2, 1, 1)

    def forward(self, x: torch.Tensor) -> Any:
        return self.up(self.conv(x))


@all_forms
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(form: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    net = Net().double()  # in float32 q8 differs with the memory layout, which a graph may choose
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend=counter)
    with qkernels.set_form(form):
        for batch in (2, 3, 5) if dynamic else (2, 2):
            x = torch.randn(batch, 4, 6, 6, dtype=torch.float64)
            expected = torch.autograd.grad(net(x).square().sum(), net.parameters())
            y = compiled(x)
            torch.testing.assert_close(y, net(x))
            for actual, exact in zip(torch.autograd.grad(y.square().sum(), net.parameters()), expected, strict=True):
                torch.testing.assert_close(actual, exact)
    assert counter.frame_count == 1


def test_compiled_code_follows_the_settings() -> None:
    torch._dynamo.reset()
    x, weight, _ = operands(CASES["3x3"], torch.float32)
    graphs = []

    def record(graph: Any, _: Any) -> Any:
        graphs.append(any("qkernels" in str(node.target) for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(hamilton_conv2d, fullgraph=True, backend=record)
    for backend in ("auto", "reference", "auto"):
        with qkernels.set_backend(backend):
            torch.testing.assert_close(compiled(x, weight), reference(hamilton_conv2d, x, weight))
    assert graphs == [True, False]  # the third call found the first graph


@all_forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_torch(form: str, dtype: torch.dtype) -> None:
    x, weight, bias = operands((2, 4, 4, 5, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1), torch.float32, requires_grad=True)
    with qkernels.set_form(form):
        with torch.autocast("cpu", dtype):
            y = hamilton_conv2d(x, weight, bias, padding=1, activation="relu")
            z = hamilton_conv_transpose2d(x, weight, bias)
        expected = hamilton_conv2d(x.to(dtype), weight.to(dtype), bias.to(dtype), padding=1, activation="relu")
    assert y.dtype == z.dtype == dtype
    assert torch.equal(y, expected)
    gradients = torch.autograd.grad(y.float().sum(), (x, weight, bias))
    exact = torch.autograd.grad(expected.float().sum(), (x, weight, bias))
    for actual, truth in zip(gradients, exact, strict=True):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, truth)


@all_forms
def test_autocast_leaves_float64_alone(form: str) -> None:
    x, weight, bias = operands(CASES["3x3"])
    with qkernels.set_form(form):
        y = hamilton_conv2d(x, weight, bias, padding=1)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(hamilton_conv2d(x, weight, bias, padding=1), y)


@all_forms
def test_operator_itself_ignores_autocast(form: str) -> None:
    x, weight, _ = operands(CASES["3x3"], torch.float32)
    plain = ([1, 1, 0, 0, 1, 1, 1], False, 0.0, False, True)
    arguments = (x, weight, None, None, None, None, *plain, torch.float32, "torch", form)
    y = torch.ops.qkernels.hamilton_conv2d(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.ops.qkernels.hamilton_conv2d(*arguments), y)


def test_backward_under_autocast_keeps_its_types() -> None:
    x, weight, bias = operands(CASES["3x3"], torch.float32, requires_grad=True)
    outside = torch.autograd.grad(hamilton_conv2d(x, weight, bias, padding=1).sum(), (x, weight, bias))
    y = hamilton_conv2d(x, weight, bias, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y.sum(), (x, weight, bias))
    for actual, exact in zip(inside, outside, strict=True):
        assert torch.equal(actual, exact)


def test_checkpointing_changes_nothing() -> None:
    tensors = operands(CASES["3x3"], requires_grad=True)

    def function(*tensors: Any) -> Any:
        return hamilton_conv2d(*tensors, padding=1, activation="relu")

    plain = torch.autograd.grad(function(*tensors).square().sum(), tensors)
    y = torch.utils.checkpoint.checkpoint(function, *tensors, use_reentrant=False)
    for actual, exact in zip(torch.autograd.grad(y.square().sum(), tensors), plain, strict=True):
        assert torch.equal(actual, exact)


def test_meta_tensors_give_shapes() -> None:
    x, weight = torch.empty(2, 8, 9, 9, device="meta"), torch.empty(4, 5, 2, 3, 3, device="meta")
    assert hamilton_conv2d(x, weight, stride=2).shape == (2, 20, 4, 4)
    assert [t.shape for t in hamilton_conv2d(x, weight, pool=2, return_map=True)] == [(2, 20, 7, 7), (2, 20, 3, 3)]


def test_layout_of_the_triton_operators() -> None:
    """Their fakes promise dense NHWC, of a pool also its argmax and an empty map where there is no tap."""
    x, weight = torch.empty(2, 8, 9, 9, device="meta"), torch.empty(4, 5, 2, 3, 3, device="meta")
    window, ops, how = [1, 1, 0, 0, 1, 1, 1], torch.ops.qkernels, "signed-half"
    scaled = (1.0, torch.bfloat16, "triton", how)
    tiles, tickets = ops.hamilton_pack([weight, weight], f"{how} signed-tf32", torch.bfloat16, "auto")
    assert (tiles.numel(), tiles.dtype) == ((2 + 4) * weight.numel(), torch.bfloat16)
    assert (tickets.numel(), tickets.dtype) == (2 * config.MOST_TICKETS, torch.int32)
    packed = (tiles, tickets)
    plain = (None, window, True, 0.0, False, True)
    y = ops.hamilton_conv2d(x, weight, None, *packed, *plain, torch.bfloat16, "triton", how)
    dx = ops.hamilton_conv2d_dx(y, weight, None, *packed, None, [9, 9], window, *scaled)
    pooled, argmax, tapped = ops.hamilton_conv2d_pool(
        x, weight, None, *packed, window, True, True, False, "triton", how
    )
    dy = ops.hamilton_conv2d_dy(y, y, pooled, argmax, [7, 7], 1.0, torch.float16, "triton")
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, dx, pooled, argmax, tapped, dy))
    assert [(t.shape, t.dtype) for t in (y, dx, pooled, argmax, tapped, dy)] == [
        ((2, 20, 7, 7), torch.bfloat16),
        ((2, 8, 9, 9), torch.bfloat16),
        ((2, 20, 3, 3), torch.float32),
        ((2, 20, 3, 3), torch.uint8),
        ((2, 20, 7, 7), torch.float32),
        ((2, 20, 7, 7), torch.float16),
    ]
    assert ops.hamilton_conv2d_pool(x, weight, None, *packed, window, True, False, False, "triton", how)[2].shape == (
        0,
    )
    for with_bias in (False, True):
        dw, db = ops.hamilton_conv2d_dw(y, x, tickets, [3, 3], window, with_bias, *scaled)
        assert (dw.shape, dw.dtype, db.shape, db.dtype) == (weight.shape, torch.bfloat16, (20 * with_bias,), dw.dtype)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@all_forms
def test_a_chain_applies_each_mask_once(form: str, backend: str) -> None:
    """`x_is_relu` and `mask_gradient` move a ReLU's mask from one layer to the next, and change no gradient."""
    x, weight, bias = operands((2, 2, 3, 5, 6, (3, 3), None, None, None, 1), requires_grad=True)
    second, shift = (t.requires_grad_() for t in (torch.randn(4, 2, 3, 3, 3).double(), torch.randn(8).double()))
    tensors = (x, weight, bias, second, shift)

    def chain(moved: Any, **options: Any) -> Any:
        y = hamilton_conv2d(x, weight, bias, activation="relu", mask_gradient=not moved)
        assert (y == 0).any()
        return hamilton_conv2d(y, second, shift, padding=1, x_is_relu=moved, **options)

    with qkernels.set_form(form), qkernels.set_backend(backend):
        for options in ({}, {"activation": "relu"}, {"activation": "relu", "pool": 2}):
            values = [chain(moved, **options) for moved in (False, True)]
            assert torch.equal(*values)
            dy = torch.randn_like(values[0])
            expected, actual = (torch.autograd.grad(value, tensors, dy) for value in values)
            for gradient, truth in zip(actual, expected, strict=True):
                torch.testing.assert_close(gradient, truth)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_each_end_of_a_chain_masks_by_itself(backend: str) -> None:
    """The gradient by x goes through x's mask whatever made x; that of a ReLU not masked here is the linear map's."""
    x, weight, bias = operands(CASES["3x3"])
    x.relu_().requires_grad_()
    with qkernels.set_backend(backend):
        y, linear = (hamilton_conv2d(x, weight, bias, padding=1, x_is_relu=relu) for relu in (True, False))
        dy = torch.randn_like(y)
        assert torch.equal(y, linear)
        (masked,), (plain,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(linear, x, dy)
        assert torch.equal(masked, plain * (x > 0))
        assert not torch.equal(masked, plain)
    if backend == "auto":  # the reference and the form "dense" are right in any chain, and mask once more
        with qkernels.set_form("q8"):
            y = hamilton_conv2d(x, weight, bias, padding=1, activation="relu", mask_gradient=False)
            torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], plain)


def test_a_pool_masks_the_gradient_whatever_is_asked() -> None:
    """Its gradient is no product's operand, so that no layer behind it could mask it at no cost."""
    x, weight, bias = operands(CASES["3x3"], requires_grad=True)
    results = [
        torch.autograd.grad(
            hamilton_conv2d(x, weight, bias, activation="relu", pool=2, mask_gradient=mask).sum(), (x, weight, bias)
        )
        for mask in (True, False)
    ]
    for masked, asked in zip(*results, strict=True):
        assert torch.equal(masked, asked)


@pytest.mark.parametrize("p", [16, 32, 64, 128])
def test_automatic_form_depends_on_the_shape_alone(p: int) -> None:
    """More channels never turn q8 back into dense, more pixels never dense into q8."""
    by_pixels = [cpu_form(p, p, 9, pixels) for pixels in (4096, 1024, 256, 64, 16)]
    assert by_pixels == sorted(by_pixels)
    assert [cpu_form(p, q, 9, 64) for q in (1, 4, 64, 128)] == sorted(cpu_form(p, q, 9, 64) for q in (1, 4, 64, 128))
    x, weight = torch.empty(1, 4 * p, 8, 8), torch.empty(4, p, p, 3, 3)
    assert qkernels.form_of(hamilton_conv2d, x, weight) == cpu_form(p, p, 9, 64)
    assert qkernels.form_of(hamilton_conv2d, x.bfloat16(), weight.bfloat16()) == "dense"


def test_vgg_layers_take_the_measured_form() -> None:
    """The committed bench/results/cpu_forms.csv: no layer of the full network is slower for the choice."""
    layers = [(4, 64, 64), (64, 64, 64), (64, 128, 32), (128, 128, 32), (128, 256, 16), (256, 256, 16)]
    layers += [(256, 512, 8), (512, 512, 8), (512, 512, 4)]
    forms = [cpu_form(p // 4, q // 4, 9, side * side) for q, p, side in layers]
    assert forms == ["dense"] * 4 + ["q8"] * 5


X, W = torch.zeros(1, 8, 5, 5), torch.zeros(4, 3, 2, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(8, 5, 5), W), r"x must have shape \[B, 4 Q, H, W\]; got \(8, 5, 5\)"),
        ((torch.zeros(1, 6, 5, 5), W), "x must have a number of channels divisible by 4 .*; got 6"),
        ((torch.zeros(1, 12, 5, 5), W), "x must have 8 = .* channels; got 12"),
        ((X, torch.zeros(3, 2, 3, 3)), r"weight must have shape .*; got \(3, 2, 3, 3\)"),
        ((X, torch.zeros(3, 3, 2, 3, 3)), r"weight must have shape \[4, P.*; got \(3, 3, 2, 3, 3\)"),
        ((X, torch.zeros(4, 0, 2, 3, 3)), "weight must have shape"),
        ((X, W, torch.zeros(3)), r"bias must have shape \(12,\); got \(3,\)"),
        ((X.double(), W), "weight must have the type of x; got torch.float32 and torch.float64"),
        ((X.long(), W.long()), "x must be of a floating-point type; got torch.int64"),
        ((X, W, None, 0), "stride must be an integer >= 1 or a pair of them; got 0"),
        ((X, W, None, (1, 2, 3)), r"stride must be an integer >= 1 or a pair of them; got \(1, 2, 3\)"),
        ((X, W, None, 1, -1), "padding must be an integer >= 0 or a pair of them; got -1"),
        ((X, W, None, 1, "same"), "padding must be an integer >= 0 or a pair of them; got 'same'"),
        ((X, W, None, 1, 0, 0), "dilation must be"),
        ((X, W, None, 1, 0, 3), "the output would be empty, -1 x -1 pixels"),
        ((X, W, None, 1, 0, 1, 2), "groups must divide the 3 quaternion channels .*; got 2"),
        ((X, W, None, 1, 0, 1, 0), "groups must divide .*; got 0"),
        ((X, W.to("meta")), "weight must be on the device of x; got meta and cpu"),
    ],
)
def test_bad_input(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hamilton_conv2d(*arguments)


def test_bad_options() -> None:
    for pool in (0, 1, 3, (2, 2), "max"):
        with pytest.raises(ValueError, match="pool must be one of None, 2; got "):
            hamilton_conv2d(X, W, pool=pool)
    with pytest.raises(ValueError, match="return_map=True needs pool=2"):
        hamilton_conv2d(X, W, return_map=True)
    for backend in ("auto", "reference"):
        with qkernels.set_backend(backend), pytest.raises(ValueError, match="the output would be empty, 1 x 0 pixels"):
            hamilton_conv2d(X[..., :3], W, pool=2)
    with pytest.raises(ValueError, match="activation must be one of None, 'relu'; got 'gelu'"):
        hamilton_conv2d(X, W, activation="gelu")
    with pytest.raises(ValueError, match="output_padding must be smaller than stride or dilation; got \\(1, 1\\)"):
        hamilton_conv_transpose2d(X, torch.zeros(4, 2, 3, 3, 3), output_padding=1)
    with pytest.raises(ValueError, match=r"x must have 12 = 4 \* weight.shape\[1\] channels; got 8"):
        hamilton_conv_transpose2d(X, W)
    with pytest.raises(ValueError, match="the output would be empty"):
        hamilton_conv_transpose2d(X[:, :, :1, :1], torch.zeros(4, 2, 3, 1, 1), padding=1)


@pytest.mark.parametrize("form", ["dense", "q8"])
def test_packed_weights_on_a_cpu(form: str) -> None:
    """They change nothing, those of "dense" take the gradient to the weight, and each fits its weight alone."""
    x, weight, bias = operands(CASES["3x3"], requires_grad=True)
    matrix, rows = (torch.randn(*shape, dtype=x.dtype) for shape in ((4, 3, 2), (5, 8)))
    matrix.requires_grad_()
    weights = [("hamilton_conv2d", weight), ("hamilton_linear", matrix)]
    with qkernels.set_form(form):
        exact = hamilton_conv2d(x, weight, bias, padding=1, activation="relu")
        dy = torch.randn_like(exact)
        gradients = torch.autograd.grad(exact, (x, weight, bias), dy)
        for gradient_wanted in (True, False):
            with torch.set_grad_enabled(gradient_wanted):
                packed, of_matrix = qkernels.pack_weights(weights, x)
            assert (packed is None) == (of_matrix is None) == (form == "q8" and gradient_wanted)
            y = hamilton_conv2d(x, weight, bias, padding=1, activation="relu", packed=packed)
            assert torch.equal(y, exact)
            for actual, truth in zip(torch.autograd.grad(y, (x, weight, bias), dy), gradients, strict=True):
                assert torch.equal(actual, truth)
            linear = qkernels.hamilton_linear(rows, matrix, packed=of_matrix)
            assert torch.equal(linear, qkernels.hamilton_linear(rows, matrix))
    assert packed is not None
    assert packed.algorithm == form
    with pytest.raises(ValueError, match=r"packed must be of this weight.*got"):
        hamilton_conv2d(x, weight, bias, padding=1, packed=of_matrix)
    grouped = operands((2, 2, 4, 5, 6, (3, 3), (1, 1), (1, 1), (1, 1), 2))
    with torch.no_grad(), qkernels.set_form(form):
        packed = qkernels.pack_weights([("hamilton_conv2d", grouped[1])], grouped[0])[0]
        y = hamilton_conv2d(*grouped, padding=1, groups=2, packed=packed)
        assert torch.equal(y, hamilton_conv2d(*grouped, padding=1, groups=2))


def test_the_form_of_a_packed_weight_follows_the_size_of_its_layer() -> None:
    weight = torch.zeros(4, 32, 32, 3, 3)
    sizes = [(32, 32), (8, 8)]
    assert [cpu_form(32, 32, 9, height * width) for height, width in sizes] == ["dense", "q8"]
    packed = qkernels.pack_weights([("hamilton_conv2d", weight)] * 2, torch.zeros(1, 128, 2, 2), sizes)
    assert [each.algorithm for each in packed if each is not None] == ["dense", "q8"]
    for wrong in ([(8, 8)], 8, [8.5, 8]):
        with pytest.raises(ValueError, match="sizes must be"):
            qkernels.pack_weights([("hamilton_conv2d", weight)] * 2, torch.zeros(1, 128, 2, 2), wrong)


def test_maps_are_not_copied_on_a_cpu() -> None:
    """Dense layers of one group keep maps as they are, in both directions; the eight products take them in NCHW."""
    x = torch.randn(2, 8, 6, 5).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(4, 2, 2, 3, 3, requires_grad=True)
    dy = torch.randn(2, 8, 6, 5).to(memory_format=torch.channels_last)
    copies = []
    for form, layout in (("dense", torch.channels_last), ("q8", torch.contiguous_format)):
        with qkernels.set_form(form), torch.profiler.profile(record_shapes=True) as profile:
            y = hamilton_conv2d(x, weight, padding=1, activation="relu")
            dx, _ = torch.autograd.grad(y, (x, weight), dy)
        copied = [event for event in profile.events() if event.name in ("aten::copy_", "aten::clone")]
        copies.append([event.name for event in copied if [2, 8, 6, 5] in event.input_shapes])
        assert y.is_contiguous(memory_format=layout)
    assert dx.shape == x.shape
    assert copies[0] == []
    assert copies[1]  # that such copies are seen
