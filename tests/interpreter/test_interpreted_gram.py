"""The Gram cosine's kernels in the interpreter, against materialised Gram matrices in float64."""

import itertools
from typing import Any

import pytest
import torch
from interpreted import assert_accurate

import qkernels
from qkernels import anti_transfer_loss, anti_transfer_tap, gram_cosine, gram_target
from qkernels.losses import CKA, FoldedRowwise, GramBatch, GramChannel, GramPosition
from qkernels.ops.gram_cosine import config, launch
from qkernels.ops.gram_cosine.config import Tile
from qkernels.ops.gram_cosine.op import gram_cosine as operator

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# One rounding of the result; the interpreter cuts bfloat16 off where hardware rounds.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-4, torch.bfloat16: 2 * 2.1e-3}
COSINE = 2e-6
# Modes: stored in one block, in three over several splits, direct, dual in one block and in several.
SHAPES = {
    "stored": (1, 9, 9, 8),
    "stored, pairs, splits": (2, 18, 5, 7),
    "direct": (2, 33, 5, 7),
    "dual": (2, 35, 3, 5),
    "dual, blocks": (2, 33, 5, 4),
}


QUICK = ("stored, pairs, splits", "direct", "dual, blocks")


def quick(names: Any, *others: Any) -> Any:
    """All shapes; those that are not among these names, or with another value, only when slow."""
    for name, shape in SHAPES.items():
        for values in itertools.product(*others):
            first = name in names and all(value == values_[0] for value, values_ in zip(values, others, strict=True))
            marks = () if first else pytest.mark.slow
            yield pytest.param(shape, *values, id="-".join(map(str, (name, *values))), marks=marks)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Small tiles, and fewer rows in memory; a program's rows of a matrix are on chip as a whole."""
    monkeypatch.setattr(config, "BLOCK", dict.fromkeys(config.BLOCK, 16))
    # Parts that do not share steps and chunks evenly.
    monkeypatch.setattr(launch, "multiprocessors_of", lambda x: 4)
    monkeypatch.setattr(config, "STORED_ROWS", 32)
    monkeypatch.setattr(config, "_forward_tile", lambda block, *_: Tile(block, block, 16, 0, 4, 1))
    monkeypatch.setattr(config, "_backward_tile", lambda n, *_: Tile(16, n, 32, 16, 4, 1))
    config.plan.cache_clear()
    with qkernels.set_backend("triton"):
        yield
    config.plan.cache_clear()


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program has room for its rows of a whole matrix."""
    monkeypatch.setattr(config, "_backward_tile", lambda n, *_: Tile(16, 16, 32, 32, 4, 1))
    config.plan.cache_clear()


def features(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Any:
    """As after a ReLU, each sample of its own size, the second operand near the first one."""
    size = torch.rand(shape[0], *[1] * (len(shape) - 1)) + 0.5
    a = torch.randn(shape).relu() * size
    b = (a + 0.5 * torch.randn(shape)).relu()
    return [x.to(dtype).to(memory_format=memory_format).requires_grad_() for x in (a, b)]


def expected(a: torch.Tensor, b: torch.Tensor, gram: str = "channel", centred: bool = False) -> Any:
    with qkernels.set_backend("reference"):
        return gram_cosine(a, b, gram=gram, centred=centred)


def doubles(*tensors: Any) -> Any:
    return [x.detach().double().requires_grad_() for x in tensors]


def check(a: torch.Tensor, b: torch.Tensor, gram: str = "channel", centred: bool = False) -> None:
    """Cosine and both gradients, for a gradient of the cosine and one of the loss."""
    exact_a, exact_b = doubles(a, b)
    exact = expected(exact_a, exact_b, gram, centred)
    cosine, loss, *_ = operator(a, b, None, False, gram, centred, 0.7, True, True, "triton")
    torch.testing.assert_close(cosine.double(), exact.expand_as(cosine), rtol=COSINE, atol=0)
    exact_loss = 0.7 * exact.square().mean()
    assert loss.item() == pytest.approx(exact_loss.item(), rel=2 * COSINE)
    weight = torch.randn_like(cosine)
    # As much as brings gradients of float16 out of its subnormal numbers.
    total, exact_total = (
        1e3 * ((c * w).sum() + 2 * v)
        for c, w, v in ((cosine, weight, loss), (exact, weight.double().view(exact.shape), exact_loss))
    )
    actual = torch.autograd.grad(total, (a, b))
    for gradient, exact_gradient, x in zip(
        actual, torch.autograd.grad(exact_total, (exact_a, exact_b)), (a, b), strict=True
    ):
        assert gradient.dtype == x.dtype
        assert gradient.stride() == torch.empty_like(x).stride()
        # Per relative change of the features. One row or column leaves a cosine nothing to change: terms cancel to 0.
        if exact_gradient.norm() * x.norm() < 1e-6:
            assert gradient.norm() * x.norm() < 1e-2
        else:
            assert_accurate(gradient, exact_gradient, TOLERANCE[x.dtype])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modes_and_types(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(*features(shape, dtype, torch.channels_last))


@pytest.mark.parametrize(("shape", "dtype", "centred"), [*quick(QUICK, [torch.bfloat16, torch.float32], [False, True])])
def test_blocks_of_columns_at_a_time(shape: tuple[int, ...], dtype: torch.dtype, centred: bool, chunked: Any) -> None:
    a, b = features(shape, dtype)
    check(a, b, centred=centred)
    a, b = (x.detach() for x in features(shape, dtype))
    check_target(a.requires_grad_(), b)


@pytest.mark.parametrize("gram", ["position", "batch"])
@pytest.mark.parametrize("shape", [(3, 9, 5, 7), (3, 20, 2, 3), (20, 5, 3, 2), (40, 6, 3, 3), (20, 3, 2, 2)], ids=str)
def test_other_grams(gram: str, shape: tuple[int, int, int, int]) -> None:
    check(*features(shape), gram)


@pytest.mark.parametrize("gram", config.GRAMS)
@pytest.mark.parametrize("shape", [(5, 9, 5, 7), (4, 35, 3, 5), (3, 33, 5, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_centred(gram: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check(*features(shape, dtype), gram, True)


def test_modes_are_those_meant() -> None:
    modes = [config.mode_of(c, h * w) for _, c, h, w in SHAPES.values()]
    assert modes == ["stored", "stored", "direct", "dual", "dual"]
    uneven = config.plan(1, 9, 72, False, 90, 4)
    assert (-(-72 // 16)) % uneven.splits
    assert (-(-72 // 16)) % uneven.column_splits
    assert config.plan(2, 33, 35, False, 90, 132).column_splits > 1


LAYOUTS = {
    "NCHW": lambda x: x,
    "NHWC": lambda x: x.to(memory_format=torch.channels_last),
    "every other column": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "some channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "one sample for all": lambda x: x[:1].expand(x.shape),
    "one position for all": lambda x: x[..., :1, :1].expand(x.shape),
    "other way round": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
}


@pytest.mark.parametrize(("layout_a", "layout_b"), [*zip(LAYOUTS, [*[*LAYOUTS][1:], "NCHW"], strict=True)])
@pytest.mark.parametrize("gram", config.GRAMS)
def test_layouts(layout_a: Any, layout_b: Any, gram: str) -> None:
    for shape in ((2, 6, 5, 7), (2, 18, 3, 4)):
        a, b = features(shape)
        check(LAYOUTS[layout_a](a.detach()).requires_grad_(), LAYOUTS[layout_b](b.detach()).requires_grad_(), gram)


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 4), (2, 5, 3, 2, 2), (1, 1, 1, 1), (1, 17, 1, 1), (1, 1, 3, 7)])
def test_any_number_of_positions(shape: tuple[int, ...]) -> None:
    for gram in config.GRAMS:
        check(*features(shape), gram)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (2, 18, 3, 4)], ids=str)
def test_tap_adds_to_the_incoming_gradient(layout: Any, shape: tuple[int, int, int, int]) -> None:
    a, b = features(shape)
    incoming = LAYOUTS[layout](torch.randn(shape))
    same, loss = anti_transfer_tap(a, b, beta=3.0)
    assert same.data_ptr() == a.data_ptr()
    (actual,) = torch.autograd.grad((same, loss), a, (incoming, torch.tensor(5.0)))
    exact_a, exact_b = doubles(a, b)
    exact = 15 * expected(exact_a, exact_b).square().mean()
    assert_accurate(actual, torch.autograd.grad(exact, exact_a)[0] + incoming.double(), TOLERANCE[torch.float32])


def test_unused_outputs_of_the_tap() -> None:
    a, b = features((2, 6, 5, 7))
    same, loss = anti_transfer_tap(a, b)
    (alone,) = torch.autograd.grad(loss, a, retain_graph=True)
    assert_accurate(alone, torch.autograd.grad(anti_transfer_loss(a, b), a)[0].double(), 1e-6)
    incoming = torch.randn(a.shape)
    assert torch.equal(torch.autograd.grad(same, a, incoming)[0], incoming)


@pytest.mark.parametrize(("shape", "gram", "centred"), [*quick(SHAPES, ["channel", "position"], [False, True])])
def test_targets(shape: tuple[int, ...], gram: str, centred: bool) -> None:
    a, b = (x.detach() for x in features(shape))
    check_target(a.requires_grad_(), b, gram, centred)


def check_target(a: torch.Tensor, b: torch.Tensor, gram: str = "channel", centred: bool = False) -> None:
    target = gram_target(b, loss=GramChannel(centred) if gram == "channel" else GramPosition(centred))
    losses = [anti_transfer_loss(a, frozen, loss=target.loss, beta=0.5) for frozen in (b, target)]
    gradients = [torch.autograd.grad(loss, a)[0] for loss in losses]
    if target.triangles:
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
        assert_accurate(gradients[1], gradients[0].double(), TOLERANCE[a.dtype])
    else:
        assert torch.equal(*losses)
        assert torch.equal(*gradients)


def test_targets_are_triangles_or_features() -> None:
    shapes = [*SHAPES.values()]
    assert [gram_target(torch.rand(shape)).triangles for shape in shapes] == [True, True, True, False, True]


@pytest.mark.parametrize(("shape", "size"), [*quick(QUICK, [1e-30, 1e30, 1e-10, 1e10])])
def test_float32_of_any_size(shape: tuple[int, ...], size: Any) -> None:
    """And each sample of another, with the second operand's going the other way."""
    a, b = (x.detach() for x in features(shape))
    sizes = size ** torch.linspace(1, 0.5, shape[0]).view(-1, 1, 1, 1)
    a, b = a * sizes, b / sizes
    check_extreme(a, b)


@pytest.mark.parametrize(
    ("shape", "kind"), [*quick(QUICK[:2], [(torch.float16, 1e-4, 6e3), (torch.bfloat16, 1e-30, 1e30)])]
)
def test_half_types_of_any_size(shape: tuple[int, ...], kind: Any) -> None:
    dtype, *sizes = kind
    for size_a, size_b in itertools.product(sizes, repeat=2):
        a, b = (x.detach() * size for x, size in zip(features(shape), (size_a, size_b), strict=True))
        check_extreme(a.to(dtype), b.to(dtype))


def check_extreme(a: torch.Tensor, b: torch.Tensor) -> None:
    """Against the plain operator in float64, which scales too; the gradient is brought near 1."""
    a.requires_grad_()
    exact_a, exact_b = doubles(a, b)
    with qkernels.set_backend("auto"):
        exact = gram_cosine(exact_a, exact_b)
    cosine = gram_cosine(a, b)
    torch.testing.assert_close(cosine.double(), exact, rtol=COSINE, atol=0)
    exact_gradient = torch.autograd.grad(exact.sum(), exact_a)[0][0]
    weight = 1 / exact_gradient.abs().amax().float()
    gradient = torch.autograd.grad(cosine.sum() * weight, a)[0][0]
    assert_accurate(gradient, exact_gradient * weight.double(), 2 * TOLERANCE[a.dtype])


@pytest.mark.parametrize("size", [1.0, 1e-25, 1e25])
def test_dead_parts_of_features_do_not_hide_the_rest(size: float) -> None:
    """Whole splits, blocks and samples are zero; the rest is as small or as large as float32 can be."""
    for shape in ((3, 18, 6, 7), (3, 33, 6, 7), (3, 35, 5, 4)):
        a, b = (x.detach() for x in features(shape))
        a[0, :, : shape[2] // 2], a[1, :16], b[1, 3:] = 0, 0, 0
        a[2] = 0
        a, b = (a * size).requires_grad_(), (b / size).requires_grad_()
        cosine = gram_cosine(a, b)
        torch.testing.assert_close(cosine.double(), expected(*doubles(a, b)), rtol=COSINE, atol=0)
        assert cosine[0] > 0
        assert cosine[2] == 0
        gradients = torch.autograd.grad(cosine.sum(), (a, b))
        for gradient in gradients:
            assert gradient[0].abs().sum() > 0
            assert gradient[2].eq(0).all()


@pytest.mark.parametrize(
    ("shape", "bad", "other_is_dead"), [*quick(QUICK, [float("nan"), float("inf")], [True, False])]
)
def test_nan_is_not_silenced(bad: Any, shape: tuple[int, ...], other_is_dead: Any) -> None:
    a, b = (x.detach() for x in features((2, *shape[1:])))
    a[0, 1, 1, 1] = bad
    if other_is_dead:
        b[0] = 0
    for cosine in (gram_cosine(a, b), gram_cosine(b, a)):
        assert cosine[0].isnan()
        assert cosine[1].isfinite()
    assert anti_transfer_loss(a, b).isnan()
    a.requires_grad_()
    (gradient,) = torch.autograd.grad(gram_cosine(a, b).sum(), a)
    assert gradient[0].isnan().any()
    assert gradient[1].isfinite().all()


@pytest.mark.parametrize("shape", [SHAPES[name] for name in QUICK], ids=QUICK)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_types(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """As if the half type were float32: tiles, and the other operand's size."""
    a, b = features(shape)
    check(a.detach().to(dtype).requires_grad_(), b)
    check_extreme(a.detach().to(dtype), b.detach() * 1e-25)


def test_nearly_orthogonal_features() -> None:
    """A cosine that is all but 0 leaves one of the two terms of the gradient."""
    for shape in SHAPES.values():
        a, b = torch.zeros(2, *shape[1:]), torch.zeros(2, *shape[1:])
        a[:, ::2, ::2], b[:, 1::2, 1::2] = 1, 1
        check((a + 1e-3 * torch.rand_like(a)).requires_grad_(), (b + 1e-3 * torch.rand_like(b)).requires_grad_())


def test_empty_batch() -> None:
    empty = torch.zeros(0, 3, 4, requires_grad=True)
    gram_cosine(empty, empty).sum().backward()
    assert gram_cosine(empty, empty, gram="batch").isnan()
    for loss in (GramChannel(), GramPosition(centred=True), GramBatch(), CKA(), FoldedRowwise()):
        total, mean = (anti_transfer_loss(empty, empty, loss=loss, reduction=each) for each in ("sum", "mean"))
        assert total == 0 if loss.per_sample else total.isnan()
        assert mean.isnan()
        same, tapped = anti_transfer_tap(empty, empty.detach(), loss=loss)
        (same.sum() + mean + total + tapped).backward()
    target = gram_target(empty)
    assert anti_transfer_loss(empty, target).isnan()
    assert anti_transfer_loss(empty, target, reduction="sum") == 0


def test_inputs_and_their_neighbours_stay(memory: Any) -> None:
    for shape in SHAPES.values():
        a, b = features(shape)
        before = a.detach().clone(), b.detach().clone()
        launches = memory.launches
        gram_cosine(a, b).sum().backward()
        assert memory.launches == launches + 4
        assert torch.equal(a, before[0])
        assert torch.equal(b, before[1])


@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (2, 18, 3, 4)], ids=str)
def test_opcheck(shape: tuple[int, int, int, int]) -> None:
    a, b = features(shape)
    how = (False, "channel", False, 0.5, True)
    torch.library.opcheck(operator, (a, b, None, *how, True, "triton"))
    a, b = a.detach(), b.detach()
    cosine, loss, *rest = operator(a, b, None, *how, True, "triton")
    gradients = (torch.randn_like(cosine), torch.randn_like(loss), torch.randn_like(a))
    torch.library.opcheck(torch.ops.qkernels.gram_cosine_da, (*gradients, cosine, a, b, *rest, 0, *how, "triton"))
