"""Every public function and module with any arguments: a right result, or one line that says what is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor

import qkernels
from qkernels import functional as F
from qkernels import init, losses, nn

# Those that memory does not allow are left out: what is 1 below 2**31 may be computed.
NUMBERS = (-(2**70), -1, 0, 1, 2, 3, 4, 6, 8, 2**31, 2**40, 2**62, 10**30)
ANYTHING = st.sampled_from(
    [
        None,
        False,
        True,
        *NUMBERS,
        *map(np.int64, NUMBERS[1:-1]),
        np.int8(2),
        np.array(2),
        np.bool_(1),
        -0.5,
        0.0,
        0.5,
        1.0,
        2.0,
        math.nan,
        math.inf,
        1e300,
        1j,
        10**400,
        np.float32(0.5),
        np.float64("nan"),
        "",
        "relu",
        "sum",
        "cka",
        "two\nlines",
        b"relu",
        np.str_("relu"),
        "meta",
        "cuda:7",
        torch.device("meta"),
        (),
        (1,),
        (1, 2),
        [2, 1],
        (1, 2, 3),
        (1, "2"),
        (0.5, 1),
        (2**40, 1),
        (None, True),
        {1, 2},
        {},
        ...,
        len,
        np.array([1, 2]),
        np.ones((40, 40)),
        np.array([0.5, 1]),
        {"name": "cka"},
        object(),
        losses.Loss(),
        torch.float64,
        torch.int64,
        torch.complex64,
        torch.float8_e4m3fn,
        torch.Generator(),
        torch.tensor(1),
    ]
) | st.sampled_from(
    [(0,), (3,), (8,), (0, 4, 2), (2, 3, 4), (4, 2, 2), (2, 8, 0, 3), (1, 8, 3, 3), (4, 1, 2, 3, 3)]
).map(torch.rand)
TYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
CHANGES: tuple[Callable[[Tensor], Tensor], ...] = (
    *[lambda x, dtype=dtype: x.to(dtype) for dtype in TYPES],
    lambda x: x.to("meta"),
    lambda x: x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() else x,
    lambda x: x.new_ones(()).expand(x.shape),
    lambda x: x.double().requires_grad_(),
    lambda x: x * math.nan,
    lambda x: x.to_sparse(),
    lambda x: x.unsqueeze(0),
    lambda x: x[:0],
    lambda x: x[..., :0],
)
PAIRS = st.one_of(st.integers(1, 2), st.tuples(st.integers(1, 3), st.integers(1, 3)), st.sampled_from([np.int64(2)]))
PADDING = st.one_of(st.integers(0, 2), st.sampled_from([(0, 1), [1, 0], np.array([0, 2])]))
FLAGS, RELU = st.booleans(), st.sampled_from([None, "relu"])
LOSSES = st.sampled_from(
    [*losses.LOSSES, losses.GramPosition(True), *map(losses.MseSigmoid, ("gram", "pairwise", "max"))]
)
INTEGERS = st.integers(1, 2).map(lambda n: 4 * n)
PLACE: dict[str, Any] = {
    "generator": st.sampled_from([None, torch.Generator()]),
    "device": st.sampled_from([None, "cpu", "meta"]),
    "dtype": st.sampled_from([None, torch.float64, torch.bfloat16]),
}


def maps(*shape: int) -> Tensor:
    return torch.rand(shape)


@st.composite
def convolution(draw: st.DrawFn, transposed: bool = False) -> dict[str, Any]:
    groups, p, q, height, width, *kernel = (draw(st.integers(1, n)) for n in (2, 2, 2, 6, 6, 3, 3))
    first, second, outputs = (groups * q, p, groups * p) if transposed else (groups * p, q, groups * p)
    arguments = {
        "x": maps(draw(st.integers(0, 2)), 4 * groups * q, height, width),
        "weight": maps(4, first, second, *kernel),
        "bias": maps(4 * outputs) if draw(FLAGS) else None,
        **{name: draw(PAIRS) for name in ("stride", "dilation")},
        "padding": draw(PADDING),
        "groups": groups,
    }
    if transposed:
        return arguments | {"output_padding": draw(st.integers(0, 1))}
    pool = draw(st.sampled_from([None, 2]))
    extra = {"activation": RELU, "return_map": FLAGS if pool else st.just(False), "x_is_relu": FLAGS}
    return arguments | {"pool": pool, "mask_gradient": True, "packed": None} | {k: draw(v) for k, v in extra.items()}


@st.composite
def linear(draw: st.DrawFn) -> dict[str, Any]:
    n, q, leading = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.lists(st.integers(0, 2), max_size=2))
    flatten = draw(FLAGS)
    extra = {"activation": RELU, "dropout": st.sampled_from([0.0, 1]), "x_is_relu": FLAGS, "dtype": PLACE["dtype"]}
    return {
        "x": maps(2, 4 * q, 2, 3) if flatten else maps(*leading, 4 * q),
        "weight": maps(4, n, 6 * q if flatten else q),
        "bias": maps(4 * n) if draw(FLAGS) else None,
        "flatten": flatten,
        "mask_gradient": True,
        "packed": None,
    } | {name: draw(strategy) for name, strategy in extra.items()}


@st.composite
def features(draw: st.DrawFn, first: str, second: str | None, **options: Any) -> dict[str, Any]:
    shape = draw(st.sampled_from([(2, 3, 4), (3, 2, 2, 2), (0, 3, 4), (1, 4), (2, 1, 1)]))
    named = {name: maps(*shape) for name in (first, second) if name}
    return named | {name: draw(strategy) for name, strategy in options.items()}


def arguments(**strategies: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(strategies)


def built(layer: type[torch.nn.Module]) -> Callable[..., Any]:
    """Builds a layer, and computes with it."""

    def build(**arguments: Any) -> Any:
        module = layer(**arguments)
        weight = module.weight
        channels = getattr(module, "in_channels", None) or getattr(module, "in_features", None) or module.num_features
        shape = (2, channels) if layer is nn.QuaternionLinear else (2, channels, 9, 9)
        y = module(torch.rand(shape, dtype=weight.dtype, device=weight.device))
        numbers = {name: value for name, value in vars(module).items() if isinstance(value, (int, float, tuple))}
        assert all(type(value) in (int, float, bool, tuple) for value in numbers.values())
        return y.shape  # the values are random

    return build


def setting(setter: Callable[[Any], Any]) -> Callable[..., str]:
    def call(value: Any) -> str:
        with setter(value):
            return str(value)

    return call


def loss_of_target(values: Any, stats: Any, triangles: Any, loss: Any, trained: Any, index: Any) -> Tensor:
    return F.anti_transfer_loss(trained, F.GramTarget(values, stats, triangles, loss).of(index), loss=loss)


TARGET = {name: st.just(value) for name, value in F.gram_target(maps(2, 3, 8))._asdict().items()}
LAYER = {"kernel_size": PAIRS, "stride": PAIRS, "padding": PADDING, "dilation": PAIRS, "groups": st.integers(1, 2)}
CHANNELS = {"in_channels": st.sampled_from([8, np.int64(8)]), "out_channels": st.sampled_from([8, 16])}
SHARED = {"bias": FLAGS, "init": st.sampled_from(["he", "glorot"]), **PLACE}
BETA = {"loss": LOSSES, "beta": st.sampled_from([0.5, 1, np.float64(2)]), "reduction": st.sampled_from(["mean", "sum"])}
OPERANDS = {"x": st.just(maps(1, 8)), "weight": st.just(maps(4, 2, 2))}
CASES: dict[str, tuple[Callable[..., Any], st.SearchStrategy[dict[str, Any]]]] = {
    "hamilton_conv2d": (F.hamilton_conv2d, convolution()),
    "hamilton_conv_transpose2d": (F.hamilton_conv_transpose2d, convolution(transposed=True)),
    "hamilton_linear": (F.hamilton_linear, linear()),
    "gram_cosine": (
        F.gram_cosine,
        features("a", "b", gram=st.sampled_from(["channel", "position", "batch"]), centred=FLAGS),
    ),
    "linear_cka": (F.linear_cka, features("a", "b")),
    "anti_transfer_loss": (F.anti_transfer_loss, features("trained", "frozen", generator=st.none(), **BETA)),
    "anti_transfer_tap": (F.anti_transfer_tap, features("features", "frozen", **BETA)),
    "gram_target": (F.gram_target, features("frozen", None, loss=st.sampled_from(["gram-channel", "gram-position"]))),
    "GramTarget": (
        loss_of_target,
        arguments(trained=st.just(maps(2, 3, 8)), index=st.just(torch.tensor([1, 0])), **TARGET),
    ),
    "pack_weights": (F.pack_weights, arguments(x=OPERANDS["x"], weights=st.just([("hamilton_linear", maps(4, 2, 2))]))),
    "backend_of": (
        lambda op, args: qkernels.backend_of(op, args),
        arguments(op=st.just("gram_cosine"), args=OPERANDS["x"]),
    ),
    "form_of": (
        lambda op, args, weight: qkernels.form_of(op, args, weight),
        arguments(
            op=st.sampled_from(["hamilton_linear", F.gram_cosine]), args=OPERANDS["x"], weight=OPERANDS["weight"]
        ),
    ),
    "set_backend": (setting(lambda backend: qkernels.set_backend(backend)), arguments(value=st.just("auto"))),
    "set_form": (setting(lambda form: qkernels.set_form(form)), arguments(value=st.just("auto"))),
    **{
        name: (getattr(init, name), arguments(weight=st.just(maps(4, 2, 2, 3)), generator=PLACE["generator"]))
        for name in ("quaternion_glorot_", "quaternion_he_")
    },
    "loss_of": (losses.loss_of, arguments(value=LOSSES)),
    **{
        kind.__name__: (kind, arguments(**{name: st.sampled_from(values) for name, values in kind.options().items()}))
        for kind in losses.LOSSES.values()
        if kind.options()
    },
    "QuaternionConv2d": (
        built(nn.QuaternionConv2d),
        arguments(**CHANNELS, **LAYER, **SHARED, activation=RELU, pool=st.sampled_from([None, 2])),
    ),
    "QuaternionConvTranspose2d": (
        built(nn.QuaternionConvTranspose2d),
        arguments(**CHANNELS, **LAYER, **SHARED, output_padding=st.integers(0, 1)),
    ),
    "QuaternionLinear": (
        built(nn.QuaternionLinear),
        arguments(in_features=INTEGERS, out_features=INTEGERS, **SHARED, activation=RELU, dropout=st.just(0.5)),
    ),
    "QuaternionBatchNorm2d": (
        built(nn.QuaternionBatchNorm2d),
        arguments(
            num_features=INTEGERS,
            eps=st.just(1e-5),
            momentum=st.sampled_from([None, 0.1]),
            device=PLACE["device"],
            dtype=PLACE["dtype"],
        ),
    ),
    "AntiTransferLoss": (
        lambda **options: nn.AntiTransferLoss(**options)(maps(2, 3, 4), maps(2, 3, 4)).shape,
        arguments(**BETA, generator=st.none()),
    ),
}


def outcome(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[Any, str]:
    """The result, or what is refused."""
    torch.manual_seed(1)
    try:
        return function(**arguments), ""
    except (ValueError, TypeError) as error:
        message = str(error)
        assert "\n" not in message, message
        named = {*arguments, "loss", "frozen", "backend", "form", "output", "weight"}
        assert any(name in message for name in named), message
        assert any(rule in message for rule in (" must ", " would ", " needs ")), message
        return None, message


def check(name: str, data: st.DataObject) -> None:
    function, strategy = CASES[name]
    values = data.draw(strategy)
    for argument in data.draw(st.lists(st.sampled_from(sorted(values)), max_size=2, unique=True)):
        value = values[argument]
        if isinstance(value, Tensor) and data.draw(FLAGS):
            values[argument] = data.draw(st.sampled_from(CHANGES))(value)
        else:
            values[argument] = data.draw(ANYTHING)
    with qkernels.set_form(data.draw(st.sampled_from(["auto", "dense", "q8"]))):
        result, refusal = outcome(function, values)
    with qkernels.set_backend("reference"):
        expected, same_refusal = outcome(function, values)
    assert refusal == same_refusal
    if isinstance(expected, Tensor) and expected.device.type == "meta":
        assert (result.shape, result.dtype, result.device) == (expected.shape, expected.dtype, expected.device)
    elif isinstance(expected, (Tensor, tuple)) and name != "gram_target":
        half = any(getattr(value, "dtype", value) in TYPES[1:3] for value in values.values())
        tolerance = 0.1 if half else 1e-4
        torch.testing.assert_close(result, expected, equal_nan=True, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", CASES)
@hypothesis.settings(max_examples=20)
@hypothesis.given(st.data())
def test_a_right_result_or_one_line(name: str, data: st.DataObject) -> None:
    check(name, data)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@hypothesis.settings(max_examples=400)
@hypothesis.given(st.data())
def test_a_right_result_or_one_line_in_many_examples(name: str, data: st.DataObject) -> None:
    check(name, data)


def test_every_public_function_is_among_them() -> None:
    public = {*qkernels.__all__} - {"init", "losses", "nn", "reference", "PackedWeight"}
    public |= {name for name, kind in vars(nn).items() if isinstance(kind, type) and kind.__module__ == nn.__name__}
    public |= {name for name, kind in vars(init).items() if getattr(kind, "__module__", "") == init.__name__}
    public |= {kind.__name__ for kind in losses.LOSSES.values() if kind.options()}
    assert {name for name in public if not name.startswith("_")} <= set(CASES)
