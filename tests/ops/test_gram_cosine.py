"""The Gram cosine and linear CKA: against materialised Grams, by their properties, at the extremes."""

import itertools
import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from literal import cosine as materialised
from literal import features, rows_of
from torch.autograd import gradcheck

import qkernels
from qkernels import anti_transfer_loss, gram_cosine, linear_cka
from qkernels.ops.gram_cosine.config import GRAMS, gram_form

# More rows than columns and fewer, of every Gram matrix; odd; one sample, one channel, one position, no position.
SHAPES = [(3, 2, 3, 4), (2, 7, 2, 2), (5, 2, 2), (1, 4, 4), (3, 1, 5), (2, 5, 1), (2, 3), (1, 1, 1, 1)]
every_gram = pytest.mark.parametrize(
    ("gram", "centred"), [(gram, centred) for gram in GRAMS for centred in (False, True)]
)


@every_gram
def test_values_and_gradients_equal_materialised_grams(gram: str, centred: bool) -> None:
    for shape in SHAPES:
        a, b = features(shape, requires_grad=True)
        cosine = gram_cosine(a, b, gram=gram, centred=centred)
        if centred and rows_of(shape, gram) == 1:  # a row less itself
            assert all(x.eq(0).all() for x in (cosine, *torch.autograd.grad(cosine.sum(), (a, b))))
            continue
        expected = materialised(a, b, gram, centred)
        torch.testing.assert_close(cosine, expected)
        reference = qkernels.reference.gram_cosine(a, b, gram, centred)
        torch.testing.assert_close(reference[0] if gram == "batch" else reference, expected)
        # An expanded gradient, which is what `.sum()` hands on, and one of its own for each sample.
        for weight in (torch.ones((), dtype=a.dtype).expand_as(cosine), torch.randn_like(cosine)):
            actual, exact = (torch.autograd.grad(x, (a, b), weight, retain_graph=True) for x in (cosine, expected))
            torch.testing.assert_close(actual, exact, atol=1e-12, rtol=1e-9)


@every_gram
def test_gradcheck(gram: str, centred: bool) -> None:
    for shape in ((2, 3, 4), (3, 4, 2), (4, 3), (2, 2, 3, 1)):
        inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        assert gradcheck(lambda a, b: gram_cosine(a, b, gram=gram, centred=centred), inputs)


@every_gram
def test_forms_of_the_same_shape_agree(monkeypatch: pytest.MonkeyPatch, gram: str, centred: bool) -> None:
    for shape in ((2, 5, 3, 2), (3, 2, 7), (4, 3, 3)):
        a, b = features(shape, requires_grad=True)
        results = []
        for direct in (True, False):
            monkeypatch.setattr("qkernels.ops.gram_cosine.forms.is_direct", lambda *_, direct=direct: direct)
            cosine = gram_cosine(a, b, gram=gram, centred=centred)
            results.append((cosine, *torch.autograd.grad(cosine.sum(), (a, b))))
        torch.testing.assert_close(*results)


def test_form_is_the_smaller_of_every_gram() -> None:
    sizes = ((4, 3, 8), (4, 8, 3), (40, 3, 8))
    assert [gram_form(gram, *size) for gram in GRAMS for size in sizes] == [
        *("channel", "position", "channel"),
        *("channel", "position", "channel"),
        *("batch", "batch", "feature"),
    ]


def test_form_is_the_smaller_matrix() -> None:
    assert [gram_form("channel", 20, *sizes) for sizes in ((64, 4096), (512, 16), (8, 8))] == [
        "channel",
        "position",
        "channel",
    ]
    assert qkernels.form_of(gram_cosine, torch.ones(2, 512, 4, 4), torch.ones(2, 512, 4, 4)) == "position"


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_frozen_features_get_no_gradient(needed: tuple[bool, bool]) -> None:
    a, b = features((2, 3, 4))
    for tensor, need in zip((a, b), needed, strict=True):
        tensor.requires_grad_(need)
    anti_transfer_loss(a, b).backward()
    both = [t.detach().clone().requires_grad_() for t in (a, b)]
    anti_transfer_loss(*both).backward()
    for tensor, full, need in zip((a, b), both, needed, strict=True):
        assert torch.equal(tensor.grad, full.grad) if need else tensor.grad is None


@st.composite
def feature_maps(draw: Any) -> Any:
    shape = draw(st.tuples(*(st.integers(1, n) for n in (4, 6, 3, 3))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    a, b = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    return a, b, generator


properties = hypothesis.settings(max_examples=60)
drawn_options = st.fixed_dictionaries({"gram": st.sampled_from(GRAMS), "centred": st.booleans()})


def rotation(size: Any, generator: torch.Generator) -> Any:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q


@properties
@hypothesis.given(feature_maps(), drawn_options)
def test_cosine_lies_between_0_and_1_and_is_1_for_equals(maps: Any, options: Any) -> None:
    a, b, _ = maps
    cosine = gram_cosine(a, b, **options)
    assert (cosine >= 0).all()
    assert (cosine <= 1 + 1e-12).all()
    degenerate = options["centred"] and rows_of(a.shape, options["gram"]) == 1
    torch.testing.assert_close(gram_cosine(a, a, **options), torch.full_like(cosine, 1 - degenerate))
    torch.testing.assert_close(gram_cosine(b, a, **options), cosine)


@properties
@hypothesis.given(feature_maps(), drawn_options)
def test_cosine_ignores_a_common_order_of_the_rows(maps: Any, options: Any) -> None:
    a, b, generator = maps
    gram, cosine = options["gram"], gram_cosine(a, b, **options)
    order = torch.randperm(rows_of(a.shape, gram), generator=generator)
    if gram == "batch":
        a, b = a[order], b[order]
    elif gram == "channel":
        a, b = a[:, order], b[:, order]
    else:
        a, b = (x.flatten(2)[..., order].view(x.shape) for x in (a, b))
    torch.testing.assert_close(gram_cosine(a, b, **options), cosine)


@properties
@hypothesis.given(feature_maps(), drawn_options)
def test_cosine_ignores_order_and_rotation_of_the_columns_of_either(maps: Any, options: Any) -> None:
    a, b, generator = maps
    cosine = gram_cosine(a, b, **options)
    shape, positions, features = a.shape, a[0, 0].numel(), a[0].numel()
    if options["gram"] == "channel":
        order, turn = torch.randperm(positions, generator=generator), rotation(positions, generator)
        moves = [lambda x: x.flatten(2)[..., order].view(shape), lambda x: (x.flatten(2) @ turn).view(shape)]
    elif options["gram"] == "position":
        order, turn = torch.randperm(shape[1], generator=generator), rotation(shape[1], generator)
        moves = [lambda x: x[:, order], lambda x: torch.einsum("dc,bchw->bdhw", turn, x)]
    else:
        order, turn = torch.randperm(features, generator=generator), rotation(features, generator)
        moves = [lambda x: x.flatten(1)[:, order].view(shape), lambda x: (x.flatten(1) @ turn).view(shape)]
    for move in moves:
        torch.testing.assert_close(gram_cosine(move(a), b, **options), cosine)
        torch.testing.assert_close(gram_cosine(a, move(b), **options), cosine)


@properties
@hypothesis.given(feature_maps(), drawn_options, st.floats(-140, 140), st.floats(-140, 140))
def test_cosine_ignores_scale(maps: Any, options: Any, log_a: Any, log_b: Any) -> None:
    a, b, _ = maps
    torch.testing.assert_close(gram_cosine(a * 10**log_a, b * -(10**log_b), **options), gram_cosine(a, b, **options))


@every_gram
def test_only_a_centred_cosine_ignores_what_is_added_to_all_rows(gram: str, centred: bool) -> None:
    a, b = features((3, 4, 5))
    row = torch.randn(a[:1].shape if gram == "batch" else a[:, :1].shape if gram == "channel" else a[..., :1].shape)
    first, second = (gram_cosine(x, b, gram=gram, centred=centred) for x in (a, a + row))
    same = torch.allclose(first, second, rtol=1e-9)
    assert same == centred


@every_gram
def test_float32_of_any_size(gram: str, centred: bool) -> None:
    for scale, shape in itertools.product((1e-30, 1e-10, 1e10, 1e30), ((2, 3, 8), (2, 8, 3))):
        a, b = features(shape, torch.float32)
        big = (a * scale).requires_grad_(), (b / scale).requires_grad_()
        exact = [t.detach().double().requires_grad_() for t in big]
        cosine, expected = gram_cosine(*big, gram=gram, centred=centred), materialised(*exact, gram, centred)
        torch.testing.assert_close(cosine, expected.float(), rtol=1e-5, atol=0)
        if centred and rows_of(shape, gram) == 2:
            continue  # one direction is left: the cosine is 1, the gradient 0
        for actual, truth in zip(
            torch.autograd.grad(cosine.sum(), big), torch.autograd.grad(expected.sum(), exact), strict=True
        ):
            assert ((actual.double() - truth).norm() / truth.norm()).item() < 1e-4


def test_subnormal_and_largest_floats() -> None:
    a, b = features((2, 3, 8), torch.float32)
    tiny, huge = a * 1e-40, b / b.amax() * torch.finfo(torch.float32).max
    expected = materialised(tiny.double(), huge.double()).float()
    torch.testing.assert_close(gram_cosine(tiny, huge), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("dtype", "scales"), [(torch.float16, (1e-6, 6e4)), (torch.bfloat16, (1e-30, 1e30))])
def test_half_types_neither_overflow_nor_vanish(dtype: torch.dtype, scales: tuple[float, float]) -> None:
    a, b = features((3, 6, 40), torch.float32)
    a, b = (t / t.amax((1, 2), keepdim=True) for t in (a, b))
    for scale_a, scale_b in itertools.product(scales, repeat=2):
        half_a, half_b = (a * scale_a).to(dtype), (b * scale_b).to(dtype)
        expected = materialised(half_a.double(), half_b.double()).float()
        torch.testing.assert_close(gram_cosine(half_a, half_b), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_terms_are_combined_before_rounding(dtype: torch.dtype) -> None:
    """With nearly equal features the two terms cancel; rounded one by one they would leave noise of the type's eps."""
    a = torch.rand(2, 4, 30).add(1).to(dtype)
    b = (a.float() * (1 + 0.02 * torch.randn(a.shape))).to(dtype).requires_grad_()
    exact = b.detach().double().requires_grad_()
    # Multiplied by 2^10, else the gradient's small entries are subnormal in float16.
    expected = torch.autograd.grad(1024 * materialised(a.double(), exact).sum(), exact)[0]
    actual = torch.autograd.grad(1024 * gram_cosine(a, b).sum(), b)[0]
    assert actual.dtype == dtype
    assert ((actual.double() - expected).norm() / expected.norm()).item() < torch.finfo(dtype).eps


@every_gram
@pytest.mark.parametrize("shape", [(3, 2, 4), (3, 4, 2)])
def test_dead_features_give_zero_and_no_gradient(gram: str, centred: bool, shape: tuple[int, int, int]) -> None:
    a, b = features(shape, requires_grad=True)
    with torch.no_grad():
        if gram == "batch":
            a.zero_()
        else:
            a[1], b[2] = 0, 0
    options = {"gram": gram, "centred": centred}
    cosine = gram_cosine(a, b, **options)
    da, db = torch.autograd.grad(cosine.sum(), (a, b))
    reference = qkernels.reference.gram_cosine(a, b, gram, centred)
    if gram == "batch":
        assert cosine == reference == 0
        assert da.eq(0).all()
        assert db.eq(0).all()
        return
    assert cosine[0] > 0
    assert cosine[1:].tolist() == reference[1:].tolist() == [0, 0]
    for gradient in (da, db):
        # A centred matrix of two rows is [[1, -1], [-1, 1]] but for its scale.
        assert gradient[0].abs().sum() > 0 or (centred and rows_of(shape, gram) == 2)
        assert gradient[1:].eq(0).all()
    assert gram_cosine(torch.zeros_like(a), torch.zeros_like(a), **options).tolist() == [0, 0, 0]


@every_gram
def test_nan_is_not_silenced(gram: str, centred: bool) -> None:
    shapes = ((2, 2, 5), (2, 5, 2))
    for bad, other_is_dead, shape in itertools.product((math.nan, math.inf), (False, True), shapes):
        a, b = features(shape)
        a[0, 1, 1] = bad
        if other_is_dead:
            b[0] = 0
        options = {"gram": gram, "centred": centred}
        for cosine in (gram_cosine(a, b, **options), gram_cosine(b, a, **options)):
            cosine = cosine.view(-1)
            assert cosine[0].isnan()
            assert not cosine[1:].isnan().any()
        a.requires_grad_()
        assert torch.autograd.grad(gram_cosine(a, b, **options).sum(), a)[0][0].isnan().any()


def test_empty_batch() -> None:
    empty = torch.zeros(0, 3, 4, requires_grad=True)
    assert gram_cosine(empty, empty).shape == (0,)
    assert anti_transfer_loss(empty, empty, reduction="sum").item() == 0
    gram_cosine(empty, empty).sum().backward()


def test_second_derivative_says_where_it_is() -> None:
    a, b = features((2, 3, 4), requires_grad=True)
    (gradient,) = torch.autograd.grad(gram_cosine(a, b).sum(), a, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative.*set_backend\('reference'\)"):
        gradient.sum().backward()
    with qkernels.set_backend("reference"):
        (gradient,) = torch.autograd.grad(gram_cosine(a, b).sum(), a, create_graph=True)
        gradient.square().sum().backward()
    assert a.grad.isfinite().all()


def test_backward_under_autocast_computes_in_float32() -> None:
    a, b = features((2, 8, 20), torch.float32, requires_grad=True)
    cosine = gram_cosine(a, b).sum()
    expected = torch.autograd.grad(cosine, (a, b), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(cosine, (a, b))
    for value, exact in zip(actual, expected, strict=True):
        assert torch.equal(value, exact)


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 8, 3)])
@every_gram
def test_opcheck(shape: tuple[int, int, int], gram: str, centred: bool) -> None:
    a, b = features(shape, torch.float32, requires_grad=True)
    options = (False, gram, centred, 0.5, True)
    torch.library.opcheck(torch.ops.qkernels.gram_cosine, (a, b, None, *options, True, "torch"))
    a, b = a.detach(), b.detach()
    cosine, loss, *rest = torch.ops.qkernels.gram_cosine(a, b, None, *options, True, "torch")
    gradients = (torch.randn_like(cosine), torch.randn_like(loss), torch.randn_like(a))
    torch.library.opcheck(torch.ops.qkernels.gram_cosine_da, (*gradients, cosine, a, b, *rest, 0, *options, "torch"))


def textbook_cka(a: torch.Tensor, b: torch.Tensor) -> Any:
    """|A^T B|^2 / (|A^T A| |B^T B|) of centred columns, row by row in Python."""
    a, b = (x.reshape(len(x), -1) - sum(x.reshape(len(x), -1)) / len(x) for x in (a, b))
    products: list[Any] = [sum(map(torch.outer, x, y)) for x, y in ((a, b), (a, a), (b, b))]
    return (products[0] ** 2).sum() / (products[1].norm() * products[2].norm())


@pytest.mark.parametrize(
    ("shape_a", "shape_b"),
    [((6, 4), (6, 4)), ((5, 3), (5, 8)), ((9, 3), (9, 2)), ((5, 2, 3, 2), (5, 4)), ((4, 3, 5), (4, 3, 5))],
)
def test_linear_cka_is_the_textbook_formula(shape_a: tuple[int, ...], shape_b: tuple[int, ...]) -> None:
    a, b = (torch.randn(shape, dtype=torch.float64).add(1).requires_grad_() for shape in (shape_a, shape_b))
    value, expected = linear_cka(a, b), textbook_cka(a, b)
    torch.testing.assert_close(value, expected)
    assert value.shape == ()
    for actual, exact in zip(torch.autograd.grad(value, (a, b)), torch.autograd.grad(expected, (a, b)), strict=True):
        torch.testing.assert_close(actual, exact, atol=1e-12, rtol=1e-9)
    assert gradcheck(linear_cka, (a, b))


@properties
@hypothesis.given(st.integers(2, 9), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
def test_linear_cka_ignores_rotation_scale_and_translation(samples: Any, width_a: Any, width_b: Any, seed: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(samples, n, dtype=torch.float64, generator=generator) for n in (width_a, width_b))
    value = linear_cka(a, b)
    assert 0 <= value <= 1 + 1e-12
    moved = 3.7 * a @ rotation(width_a, generator) + torch.randn(width_a, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(linear_cka(moved, b), value)
    torch.testing.assert_close(linear_cka(b, moved), value)
    torch.testing.assert_close(linear_cka(moved, a), torch.ones_like(value))


def test_linear_cka_types_and_one_sample() -> None:
    a, b = torch.randn(6, 4), torch.randn(6, 5)
    for dtype in (torch.bfloat16, torch.float16):
        value = linear_cka(a.to(dtype), b)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, textbook_cka(a.to(dtype).double(), b.double()).float(), rtol=1e-5, atol=0)
    assert linear_cka(a[:1], b[:1]) == 0


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.ones(3), torch.ones(3, 2), r"a must have dimensions \[B, ...\]; got shape \(3,\)"),
        (torch.ones(3, 2), torch.ones(3), r"b must have dimensions \[B, ...\]; got shape \(3,\)"),
        (torch.ones(3, 2), torch.ones(4, 2), "b must have as many samples as a; got 4 and 3"),
        (torch.ones(3, 2).long(), torch.ones(3, 4), "a must be of a floating-point type; got torch.int64"),
        (torch.ones(3, 2), torch.ones(3, 4, device="meta"), "b must be on the device of a; got meta and cpu"),
        (torch.ones(3, 0), torch.ones(3, 0), "at least one channel"),
    ],
)
def test_bad_representations(a: torch.Tensor, b: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_cka(a, b)


F = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (F[0, 0], F[0, 0], r"a must have dimensions \[B, C, \*spatial\]; got shape \(4,\)"),
        (F, F[:1], r"b must have the shape of a; got \(1, 3, 4\) and \(2, 3, 4\)"),
        (F[:, :0], F[:, :0], "a must have at least one channel and one position"),
        (F.long(), F.long(), "a must be of a floating-point type; got torch.int64"),
        (F, F.to("meta"), "b must be on the device of a; got meta and cpu"),
    ],
)
def test_bad_features(a: torch.Tensor, b: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gram_cosine(a, b)
