"""The kernels of the released code's loss in the interpreter, against its materialised definition in float64."""

from typing import Any

import pytest
import torch
from interpreted import DTYPES, assert_accurate

import qkernels
from qkernels import anti_transfer_loss
from qkernels.losses import FoldedRowwise
from qkernels.ops.folded_rowwise import config, launch

# One, two and four tiles of 16 positions, with tails in rows and positions; several programs and splits.
SHAPES = {"one": (3, 30, 4, 4), "two": (2, 37, 4, 5), "four": (2, 70, 8, 7), "no position": (2, 20)}
all_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
all_clamps = pytest.mark.parametrize("clamp", ["each", "product"])
# One rounding of the gradient; the interpreter cuts bfloat16 off, so twice the bound (interpreted.TOLERANCE).
ROUNDING = {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 2 * 2.1e-3}
# A multiple of the loss: else the gradient's small entries are subnormal in float16.
BETA = 32.0


@pytest.fixture(autouse=True)
def triton_backend() -> Any:
    with qkernels.set_backend("triton"):
        yield


def features(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Any:
    return [torch.randn(shape).relu().add(0.01).to(dtype) for _ in range(2)]


def run(inputs: Any, clamp: str = "each", beta: Any = BETA) -> Any:
    """The loss and its gradients by both operands."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    loss = anti_transfer_loss(*inputs, beta=beta, loss=FoldedRowwise(clamp))
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def check(inputs: Any, clamp: str = "each", tolerance: Any = None) -> None:
    with qkernels.set_backend("reference"):
        exact = run([x.double() for x in inputs], clamp)
    loss, *gradients = run(inputs, clamp)
    torch.testing.assert_close(loss.double(), exact[0], rtol=2e-6, atol=0)
    for gradient, truth, x in zip(gradients, exact[1:], inputs, strict=True):
        assert gradient.dtype == x.dtype
        assert_accurate(gradient, truth, tolerance or ROUNDING[x.dtype])


@all_shapes
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, memory: Any) -> None:
    check(features(shape, dtype))
    # The forward's four, and three for each gradient.
    assert memory.launches == 4 + 3 + 3


@all_clamps
# All norms free, some of them clamped, all of them.
@pytest.mark.parametrize("scale", [1.0, 3e-4, 1e-5])
def test_clamps(clamp: str, scale: float) -> None:
    shape = SHAPES["one"]
    spread = torch.logspace(-1.5, 1.5, shape[1]).view(1, -1, 1, 1)
    trained, frozen = features(shape)
    check([trained * spread * scale, -frozen * spread.flip(1) * scale], clamp, 4e-6)


@all_clamps
@pytest.mark.parametrize("scales", [(1e-3, 1e-3), (1e-15, 1e-3), (1e10, 1e10), (1e15, 1e-15)], ids=str)
def test_features_of_any_size(clamp: str, scales: tuple[float, float]) -> None:
    inputs = [x * scale for x, scale in zip(features(SHAPES["two"]), scales, strict=True)]
    with qkernels.set_backend("reference"):
        exact = run([x.double() for x in inputs], clamp)
    actual = run(inputs, clamp)
    for value, truth in zip(actual, exact, strict=True):
        assert value.isfinite().all()
        reachable = torch.finfo(torch.float32).tiny < truth.abs().max() < torch.finfo(torch.float32).max
        assert not reachable or (value.double() - truth).norm() < 1e-5 * truth.norm()


VIEWS = {
    "NHWC": lambda x: x.to(memory_format=torch.channels_last),
    "columns first": lambda x: x.mT.contiguous().mT,
    "channels first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every second column": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2],
    "part of a larger map": lambda x: torch.nn.functional.pad(x, (1, 2, 1, 2), value=torch.nan)[:, :, 1:-2, 1:-2],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_layout_is_read_in_place(view: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = features(SHAPES["two"])
    expected = run(inputs)
    # Each operand in a layout of its own.
    views = [[view(inputs[0]), inputs[1]], [inputs[0], view(inputs[1])]]
    monkeypatch.setattr(torch.Tensor, "contiguous", None)
    for moved in views:
        assert all(torch.equal(*pair) for pair in zip(run(moved), expected, strict=True))


def test_what_no_two_strides_reach_is_copied() -> None:
    inputs = features((2, 20, 2, 3, 2))
    expected = run(inputs)
    moved = [x.permute(0, 1, 4, 3, 2).contiguous().permute(0, 1, 4, 3, 2) for x in inputs]
    assert all(torch.equal(*pair) for pair in zip(run(moved), expected, strict=True))


def test_64_bit_offsets_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = features(SHAPES["two"])
    expected = run(inputs)
    monkeypatch.setattr(launch, "_last", lambda _: 2**31)
    assert all(torch.equal(*pair) for pair in zip(run(inputs), expected, strict=True))


@all_clamps
def test_dead_channels(clamp: str) -> None:
    inputs = features(SHAPES["one"])
    inputs[0][0, 1], inputs[1][1, 2], inputs[0][1, 0], inputs[1][1, 0] = 0, 0, 0, 0
    check(inputs, clamp)
    assert all(gradient[1, 0].eq(0).all() for gradient in run(inputs, clamp)[1:])
    assert all(x.eq(0).all() for x in run([torch.zeros(SHAPES["one"]), inputs[1]], clamp))


@all_clamps
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_nan_is_not_silenced(clamp: str, bad: Any) -> None:
    a, b = features(SHAPES["one"])
    a[0, 1, 1] = bad
    for inputs in ((a, b), (b, a), (a, torch.zeros_like(b))):
        assert all(x.isnan().any() for x in run(inputs, clamp))


def test_frozen_features_cost_no_launch(memory: Any) -> None:
    trained, frozen = features(SHAPES["one"])
    expected = run((trained, frozen))
    trained.requires_grad_()
    memory.launches = 0
    anti_transfer_loss(trained, frozen, beta=BETA, loss="folded-rowwise").backward()
    assert memory.launches == 4 + 3
    assert torch.equal(trained.grad, expected[1])
    assert torch.equal(run((trained, frozen))[1], expected[1])


def test_more_rows_than_the_splits_have_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "MOST_SPLITS", 4)
    assert config.splits_of(111) == 4
    check(features((3, 37, 4, 4)))


@all_clamps
def test_opcheck(clamp: str) -> None:
    a, b = (x.requires_grad_() for x in features(SHAPES["two"]))
    torch.library.opcheck(torch.ops.qkernels.folded_rowwise, (a, b, clamp, 0.5, "triton"))
    a, b = a.detach(), b.detach()
    loss, *rest = torch.ops.qkernels.folded_rowwise(a, b, clamp, 0.5, "triton")
    da = (torch.ones_like(loss), a, b, *rest, 0, 0.5, "triton")
    torch.library.opcheck(torch.ops.qkernels.folded_rowwise_da, da)


@pytest.mark.parametrize(
    ("shape", "types", "message"),
    [
        ((2, 200, 9, 9), (torch.float32,) * 2, "take maps of at most 64 positions"),
        ((2, 16, 4, 4), (torch.float32,) * 2, "take more than twice as many rows"),
        ((3, 16, 4, 4), (torch.float32, torch.float16), "need features of one type"),
        ((3, 16, 4, 4), (torch.float64,) * 2, "compute float32, float16 and bfloat16"),
    ],
)
def test_what_the_kernels_do_not_compute(shape: tuple[int, int, int, int], types: Any, message: str) -> None:
    trained, frozen = (torch.ones(shape, dtype=dtype) for dtype in types)
    with pytest.raises(ValueError, match=message):
        anti_transfer_loss(trained, frozen, loss="folded-rowwise")
    with qkernels.set_backend("auto"):
        anti_transfer_loss(trained, frozen, loss="folded-rowwise")
