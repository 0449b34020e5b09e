"""The Gram cosine and the anti-transfer loss: against materialised Grams, by their properties, at the extremes."""

import functools
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch._dynamo.testing
from torch.autograd import gradcheck

import qkernels
from qkernels import anti_transfer_loss, gram_cosine, linear_cka
from qkernels.functional import REDUCTIONS
from qkernels.ops.gram_cosine.config import GRAMS, gram_form

# More rows than columns and fewer, of every Gram matrix; odd; one sample, one channel, one position, no position.
SHAPES = [(3, 2, 3, 4), (2, 7, 2, 2), (5, 2, 2), (1, 4, 4), (3, 1, 5), (2, 5, 1), (2, 3), (1, 1, 1, 1)]
all_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_gram = pytest.mark.parametrize(
    ("gram", "centred"), [(gram, centred) for gram in GRAMS for centred in (False, True)]
)


def features(shape, dtype=torch.float64, requires_grad=False):
    """As after a ReLU: non-negative, so that Gram matrices are similar and gradients nearly cancel; not all alike."""
    maps = (torch.randn(shape, dtype=dtype).relu() + 0.1 * torch.rand(shape, dtype=dtype) + 0.01 for _ in range(2))
    return [x.requires_grad_(requires_grad) for x in maps]


def naive_cosine(a, b, gram="channel", centred=False):
    """Sample by sample, with the Gram matrices in memory: centred H G H, H = I - 1 1^T / rows."""
    values = []
    for sample_a, sample_b in zip(*([x] if gram == "batch" else x for x in (a, b)), strict=True):
        grams = []
        for sample in (sample_a, sample_b):
            f = sample.reshape(sample.shape[0], -1)
            f = f.T if gram == "position" else f
            h = torch.eye(len(f), dtype=f.dtype) - torch.full((len(f), len(f)), 1 / len(f), dtype=f.dtype)
            grams.append(h @ (f @ f.T) @ h if centred else f @ f.T)
        gram_a, gram_b = grams
        values.append((gram_a * gram_b).sum() / (gram_a.norm() * gram_b.norm()))
    return values[0] if gram == "batch" else torch.stack(values)


def rows_of(shape, gram):
    return {"channel": shape[1], "position": math.prod(shape[2:]), "batch": shape[0]}[gram]


@all_shapes
@every_gram
def test_values_and_gradients_equal_materialised_grams(shape, gram, centred):
    a, b = features(shape, requires_grad=True)
    cosine = gram_cosine(a, b, gram=gram, centred=centred)
    weight = torch.randn(cosine.shape, dtype=a.dtype)
    actual = torch.autograd.grad(cosine, (a, b), weight)
    if centred and rows_of(shape, gram) == 1:  # a row less itself
        assert cosine.eq(0).all()
        assert all(gradient.eq(0).all() for gradient in actual)
        return
    expected = naive_cosine(a, b, gram, centred)
    torch.testing.assert_close(cosine, expected)
    reference = qkernels.reference.gram_cosine(a, b, gram, centred)
    torch.testing.assert_close(reference[0] if gram == "batch" else reference, expected)
    for gradient, exact in zip(actual, torch.autograd.grad(expected, (a, b), weight), strict=True):
        torch.testing.assert_close(gradient, exact, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 4, 2), (4, 3), (2, 2, 3, 1)], ids=str)
@every_gram
def test_gradcheck(shape, gram, centred):
    a, b = torch.randn(2, *shape, dtype=torch.float64).unbind(0)
    inputs = a.clone().requires_grad_(), b.clone().requires_grad_()
    how = {"gram": gram, "centred": centred}
    assert gradcheck(lambda a, b: gram_cosine(a, b, **how), inputs)
    assert gradcheck(lambda a, b: anti_transfer_loss(a, b, beta=1.7, **how), inputs)


@every_gram
@pytest.mark.parametrize("shape", [(2, 5, 3, 2), (3, 2, 7), (4, 3, 3)])
def test_forms_of_the_same_shape_agree(monkeypatch, gram, centred, shape):
    a, b = features(shape, requires_grad=True)
    results = []
    for direct in (True, False):
        monkeypatch.setattr("qkernels.ops.gram_cosine.op.is_direct", lambda *_, direct=direct: direct)
        cosine = gram_cosine(a, b, gram=gram, centred=centred)
        results.append((cosine, *torch.autograd.grad(cosine.sum(), (a, b))))
    for direct, dual in zip(*results, strict=True):
        torch.testing.assert_close(direct, dual)


def test_form_is_the_smaller_of_every_gram():
    sizes = ((4, 3, 8), (4, 8, 3), (40, 3, 8))
    assert [gram_form(gram, *size) for gram in GRAMS for size in sizes] == [
        *("channel", "position", "channel"),
        *("channel", "position", "channel"),
        *("batch", "batch", "feature"),
    ]


def test_form_is_the_smaller_matrix():
    assert [gram_form("channel", 20, *sizes) for sizes in ((64, 4096), (512, 16), (8, 8))] == [
        "channel",
        "position",
        "channel",
    ]
    assert qkernels.form_of(gram_cosine, torch.ones(2, 512, 4, 4), torch.ones(2, 512, 4, 4)) == "position"


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_frozen_features_get_no_gradient(needed):
    a, b = features((2, 3, 4))
    for tensor, need in zip((a, b), needed, strict=True):
        tensor.requires_grad_(need)
    anti_transfer_loss(a, b).backward()
    both = [t.detach().clone().requires_grad_() for t in (a, b)]
    anti_transfer_loss(*both).backward()
    for tensor, full, need in zip((a, b), both, needed, strict=True):
        assert torch.equal(tensor.grad, full.grad) if need else tensor.grad is None


@st.composite
def feature_maps(draw):
    shape = draw(st.tuples(*(st.integers(1, n) for n in (4, 6, 3, 3))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    a, b = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    return a, b, generator


properties = hypothesis.settings(max_examples=60)
how_drawn = st.fixed_dictionaries({"gram": st.sampled_from(GRAMS), "centred": st.booleans()})


def rotation(size, generator):
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q


@properties
@hypothesis.given(feature_maps(), how_drawn)
def test_cosine_lies_between_0_and_1_and_is_1_for_equals(maps, how):
    a, b, _ = maps
    cosine = gram_cosine(a, b, **how)
    assert (cosine >= 0).all()
    assert (cosine <= 1 + 1e-12).all()
    degenerate = how["centred"] and rows_of(a.shape, how["gram"]) == 1
    torch.testing.assert_close(gram_cosine(a, a, **how), torch.full_like(cosine, 1 - degenerate))
    torch.testing.assert_close(gram_cosine(b, a, **how), cosine)


@properties
@hypothesis.given(feature_maps(), how_drawn)
def test_cosine_ignores_a_common_order_of_the_rows(maps, how):
    a, b, generator = maps
    gram, cosine = how["gram"], gram_cosine(a, b, **how)
    order = torch.randperm(rows_of(a.shape, gram), generator=generator)
    if gram == "batch":
        a, b = a[order], b[order]
    elif gram == "channel":
        a, b = a[:, order], b[:, order]
    else:
        a, b = (x.flatten(2)[..., order].view(x.shape) for x in (a, b))
    torch.testing.assert_close(gram_cosine(a, b, **how), cosine)


@properties
@hypothesis.given(feature_maps(), how_drawn)
def test_cosine_ignores_order_and_rotation_of_the_columns_of_either(maps, how):
    a, b, generator = maps
    cosine = gram_cosine(a, b, **how)
    shape, positions, features = a.shape, a[0, 0].numel(), a[0].numel()
    if how["gram"] == "channel":
        order, turn = torch.randperm(positions, generator=generator), rotation(positions, generator)
        moves = [lambda x: x.flatten(2)[..., order].view(shape), lambda x: (x.flatten(2) @ turn).view(shape)]
    elif how["gram"] == "position":
        order, turn = torch.randperm(shape[1], generator=generator), rotation(shape[1], generator)
        moves = [lambda x: x[:, order], lambda x: torch.einsum("dc,bchw->bdhw", turn, x)]
    else:
        order, turn = torch.randperm(features, generator=generator), rotation(features, generator)
        moves = [lambda x: x.flatten(1)[:, order].view(shape), lambda x: (x.flatten(1) @ turn).view(shape)]
    for move in moves:
        torch.testing.assert_close(gram_cosine(move(a), b, **how), cosine)
        torch.testing.assert_close(gram_cosine(a, move(b), **how), cosine)


@properties
@hypothesis.given(feature_maps(), how_drawn, st.floats(-140, 140), st.floats(-140, 140))
def test_cosine_ignores_scale(maps, how, log_a, log_b):
    a, b, _ = maps
    torch.testing.assert_close(gram_cosine(a * 10**log_a, b * -(10**log_b), **how), gram_cosine(a, b, **how))


@every_gram
def test_only_a_centred_cosine_ignores_what_is_added_to_all_rows(gram, centred):
    a, b = features((3, 4, 5))
    row = torch.randn(a[:1].shape if gram == "batch" else a[:, :1].shape if gram == "channel" else a[..., :1].shape)
    same = torch.allclose(*(gram_cosine(x, b, gram=gram, centred=centred) for x in (a, a + row)), rtol=1e-9)
    assert same == centred


def test_samples_do_not_mix():
    a, b = features((3, 4, 5))
    alone = torch.cat([gram_cosine(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(gram_cosine(a, b), alone)
    assert alone.unique().numel() == 3


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 8, 3)])
@every_gram
def test_float32_of_any_size(scale, shape, gram, centred):
    a, b = features(shape, torch.float32)
    big = (a * scale).requires_grad_(), (b / scale).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in big]
    cosine, expected = gram_cosine(*big, gram=gram, centred=centred), naive_cosine(*exact, gram, centred)
    torch.testing.assert_close(cosine, expected.float(), rtol=1e-5, atol=0)
    if centred and rows_of(shape, gram) == 2:
        return  # one direction is left: the cosine is 1, the gradient 0
    for actual, truth in zip(
        torch.autograd.grad(cosine.sum(), big), torch.autograd.grad(expected.sum(), exact), strict=True
    ):
        assert ((actual.double() - truth).norm() / truth.norm()).item() < 1e-4


def test_subnormal_and_largest_floats():
    a, b = features((2, 3, 8), torch.float32)
    tiny, huge = a * 1e-40, b / b.amax() * torch.finfo(torch.float32).max
    expected = naive_cosine(tiny.double(), huge.double()).float()
    torch.testing.assert_close(gram_cosine(tiny, huge), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("dtype", "scales"), [(torch.float16, (1e-6, 6e4)), (torch.bfloat16, (1e-30, 1e30))])
def test_half_types_neither_overflow_nor_vanish(dtype, scales):
    a, b = features((3, 6, 40), torch.float32)
    a, b = (t / t.amax((1, 2), keepdim=True) for t in (a, b))
    for scale_a, scale_b in itertools.product(scales, repeat=2):
        half_a, half_b = (a * scale_a).to(dtype), (b * scale_b).to(dtype)
        expected = naive_cosine(half_a.double(), half_b.double()).float()
        torch.testing.assert_close(gram_cosine(half_a, half_b), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_terms_are_combined_before_rounding(dtype):
    """With nearly equal features the two terms cancel; rounded one by one they would leave noise of the type's eps."""
    a = torch.rand(2, 4, 30).add(1).to(dtype)
    b = (a.float() * (1 + 0.02 * torch.randn(a.shape))).to(dtype).requires_grad_()
    exact = b.detach().double().requires_grad_()
    # Multiplied by 2^10, else the gradient's small entries are subnormal in float16.
    expected = torch.autograd.grad(1024 * naive_cosine(a.double(), exact).sum(), exact)[0]
    actual = torch.autograd.grad(1024 * gram_cosine(a, b).sum(), b)[0]
    assert actual.dtype == dtype
    assert ((actual.double() - expected).norm() / expected.norm()).item() < torch.finfo(dtype).eps


@every_gram
@pytest.mark.parametrize("shape", [(3, 2, 4), (3, 4, 2)])
def test_dead_features_give_zero_and_no_gradient(gram, centred, shape):
    a, b = features(shape, requires_grad=True)
    with torch.no_grad():
        if gram == "batch":
            a.zero_()
        else:
            a[1], b[2] = 0, 0
    how = {"gram": gram, "centred": centred}
    cosine = gram_cosine(a, b, **how)
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
    assert gram_cosine(torch.zeros_like(a), torch.zeros_like(a), **how).tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("other_is_dead", [False, True])
@pytest.mark.parametrize("shape", [(2, 2, 5), (2, 5, 2)])
@every_gram
def test_nan_is_not_silenced(bad, other_is_dead, shape, gram, centred):
    a, b = features(shape)
    a[0, 1, 1] = bad
    if other_is_dead:
        b[0] = 0
    how = {"gram": gram, "centred": centred}
    for cosine in (gram_cosine(a, b, **how), gram_cosine(b, a, **how)):
        cosine = cosine.view(-1)
        assert cosine[0].isnan()
        assert not cosine[1:].isnan().any()
    assert anti_transfer_loss(a, b, **how).isnan()
    a.requires_grad_()
    assert torch.autograd.grad(gram_cosine(a, b, **how).sum(), a)[0][0].isnan().any()


@every_gram
def test_any_strides_and_untouched_inputs(gram, centred):
    a, b = features((3, 4, 6, 6))
    cosine_of = functools.partial(gram_cosine, gram=gram, centred=centred)
    expected = cosine_of(a[..., ::2], b[..., 1::2])
    for view in (
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        moved = view(a).requires_grad_()
        before = moved.detach().clone()
        cosine = cosine_of(moved[..., ::2], view(b)[..., 1::2])
        torch.testing.assert_close(cosine, expected)
        assert torch.equal(moved, before)
        plain = a.clone().requires_grad_()
        exact = torch.autograd.grad(cosine_of(plain[..., ::2], b[..., 1::2]).sum(), plain)[0]
        torch.testing.assert_close(torch.autograd.grad(cosine.sum(), moved)[0], exact)


@every_gram
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_expanded_features_and_gradients(gram, centred, axis):
    """`.sum()` hands stride 0 to the derivative."""
    shape = [3, 4, 5]
    wide = torch.Size(shape)
    shape[axis] = 1
    a, b = features(shape, requires_grad=True)[0], features(wide)[1]
    cosine = gram_cosine(a.expand(wide), b, gram=gram, centred=centred)
    copied = a.expand(wide).detach().clone().requires_grad_()
    expected = gram_cosine(copied, b, gram=gram, centred=centred)
    torch.testing.assert_close(cosine, expected)
    exact = torch.autograd.grad(expected, copied, torch.ones_like(expected).clone())[0]
    torch.testing.assert_close(torch.autograd.grad(cosine.sum(), a)[0], exact.sum(axis, keepdim=True))


def test_empty_batch():
    empty = torch.zeros(0, 3, 4, requires_grad=True)
    assert gram_cosine(empty, empty).shape == (0,)
    assert anti_transfer_loss(empty, empty, reduction="sum").item() == 0
    gram_cosine(empty, empty).sum().backward()


def test_second_derivative_says_where_it_is():
    a, b = features((2, 3, 4), requires_grad=True)
    (gradient,) = torch.autograd.grad(gram_cosine(a, b).sum(), a, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative.*set_backend\('reference'\)"):
        gradient.sum().backward()
    with qkernels.set_backend("reference"):
        (gradient,) = torch.autograd.grad(gram_cosine(a, b).sum(), a, create_graph=True)
        gradient.square().sum().backward()
    assert a.grad.isfinite().all()


@pytest.mark.parametrize("semantics", ["paper", "folded-rowwise"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_computes_in_float32(semantics, backend):
    a, b = features((2, 8, 20), torch.float32, requires_grad=True)

    with qkernels.set_backend(backend):
        expected = anti_transfer_loss(a, b, semantics=semantics)
        with torch.autocast("cpu", torch.bfloat16):
            loss = anti_transfer_loss(a, b, semantics=semantics)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    for actual, exact in zip(torch.autograd.grad(loss, (a, b)), torch.autograd.grad(expected, (a, b)), strict=True):
        assert torch.equal(actual, exact)


def test_backward_under_autocast_computes_in_float32():
    a, b = features((2, 8, 20), torch.float32, requires_grad=True)
    cosine = gram_cosine(a, b).sum()
    expected = torch.autograd.grad(cosine, (a, b), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(cosine, (a, b))
    for value, exact in zip(actual, expected, strict=True):
        assert torch.equal(value, exact)


@pytest.mark.parametrize(
    ("a", "b", "result"),
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_types(a, b, result, backend):
    with qkernels.set_backend(backend):
        assert gram_cosine(torch.ones(1, 2, 3, dtype=a), torch.ones(1, 2, 3, dtype=b)).dtype == result


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 8, 3)])
@pytest.mark.parametrize("gram", GRAMS)
@pytest.mark.parametrize("centred", [False, True])
def test_opcheck(shape, gram, centred):
    a, b = features(shape, torch.float32, requires_grad=True)
    how = (False, gram, centred, 0.5, True)
    torch.library.opcheck(torch.ops.qkernels.gram_cosine, (a, b, None, *how, True, "torch"))
    a, b = a.detach(), b.detach()
    cosine, loss, *rest = torch.ops.qkernels.gram_cosine(a, b, None, *how, True, "torch")
    gradients = (torch.randn_like(cosine), torch.randn_like(loss), torch.randn_like(a))
    torch.library.opcheck(torch.ops.qkernels.gram_cosine_da, (*gradients, cosine, a, b, *rest, 0, *how, "torch"))


@pytest.mark.parametrize("semantics", ["paper", "folded-rowwise"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(semantics, dynamic):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    loss = qkernels.nn.AntiTransferLoss(semantics=semantics)
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=counter)
    frames = 0
    for batch in (2, 3, 5) if dynamic else (2, 2):
        a, b = features((batch, 7, 6, 8), torch.float32, requires_grad=True)  # no size twice: they would be tied
        value = compiled(a, b)
        torch.testing.assert_close(value, loss(a, b))
        torch.testing.assert_close(torch.autograd.grad(value, a), torch.autograd.grad(loss(a, b), a))
        # Dynamo begins anew when it meets the number beta, which an operator takes as a constant.
        frames = frames or counter.frame_count
    assert counter.frame_count == frames <= 2


@every_gram
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_loss_is_beta_times_the_squares(gram, centred, reduction, backend):
    if gram == "batch" and reduction == "none":
        with pytest.raises(ValueError, match="reduction 'none' has no meaning for gram 'batch'"):
            anti_transfer_loss(F, F, gram=gram, reduction=reduction)
        return
    a, b = features((3, 4, 5), requires_grad=True)
    squares = 0.3 * naive_cosine(a, b, gram, centred) ** 2
    expected = squares if reduction == "none" else getattr(squares, reduction)()
    with qkernels.set_backend(backend):
        loss = anti_transfer_loss(a, b, beta=0.3, reduction=reduction, gram=gram, centred=centred)
    torch.testing.assert_close(loss, expected)
    weight = torch.randn_like(expected)
    for actual, exact in zip(
        torch.autograd.grad(loss, (a, b), weight), torch.autograd.grad(expected, (a, b), weight), strict=True
    ):
        torch.testing.assert_close(actual, exact, atol=1e-12, rtol=1e-9)


def textbook_cka(a, b):
    """|A^T B|^2 / (|A^T A| |B^T B|) of centred columns, row by row in Python."""
    a, b = (x.reshape(len(x), -1) - sum(x.reshape(len(x), -1)) / len(x) for x in (a, b))
    products = [sum(torch.outer(u, v) for u, v in zip(x, y, strict=True)) for x, y in ((a, b), (a, a), (b, b))]
    return (products[0] ** 2).sum() / (products[1].norm() * products[2].norm())


@pytest.mark.parametrize(
    ("shape_a", "shape_b"),
    [((6, 4), (6, 4)), ((5, 3), (5, 8)), ((9, 3), (9, 2)), ((5, 2, 3, 2), (5, 4)), ((4, 3, 5), (4, 3, 5))],
)
def test_linear_cka_is_the_textbook_formula(shape_a, shape_b):
    a, b = (torch.randn(shape, dtype=torch.float64).add(1).requires_grad_() for shape in (shape_a, shape_b))
    value, expected = linear_cka(a, b), textbook_cka(a, b)
    torch.testing.assert_close(value, expected)
    assert value.shape == ()
    for actual, exact in zip(torch.autograd.grad(value, (a, b)), torch.autograd.grad(expected, (a, b)), strict=True):
        torch.testing.assert_close(actual, exact, atol=1e-12, rtol=1e-9)
    assert gradcheck(linear_cka, (a, b))


@properties
@hypothesis.given(st.integers(2, 9), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**31))
def test_linear_cka_ignores_rotation_scale_and_translation(samples, width_a, width_b, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(samples, n, dtype=torch.float64, generator=generator) for n in (width_a, width_b))
    value = linear_cka(a, b)
    assert 0 <= value <= 1 + 1e-12
    moved = 3.7 * a @ rotation(width_a, generator) + torch.randn(width_a, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(linear_cka(moved, b), value)
    torch.testing.assert_close(linear_cka(b, moved), value)
    torch.testing.assert_close(linear_cka(moved, a), torch.ones_like(value))


def test_linear_cka_types_and_one_sample():
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
def test_bad_representations(a, b, message):
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
def test_bad_features(a, b, message):
    with pytest.raises(ValueError, match=message):
        gram_cosine(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "max"}, "reduction must be one of 'mean', 'none', 'sum'; got 'max'"),
        ({"semantics": "gram"}, "semantics must be one of 'paper', 'folded-rowwise'; got 'gram'"),
        ({"clamp": "none"}, "clamp must be one of"),
        ({"semantics": "folded-rowwise", "reduction": "none"}, "reduction 'none' has no meaning"),
        ({"clamp": "product"}, "clamp 'product' needs semantics 'folded-rowwise'"),
        ({"gram": "row"}, "gram must be one of 'channel', 'position', 'batch'; got 'row'"),
        ({"gram": "batch", "reduction": "none"}, "reduction 'none' has no meaning for gram 'batch'"),
        ({"semantics": "folded-rowwise", "gram": "position"}, "'folded-rowwise' has gram 'channel', not centred"),
        ({"semantics": "folded-rowwise", "centred": True}, "got gram 'channel', centred True"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        anti_transfer_loss(F, F, **options)
    with pytest.raises(ValueError, match=message):
        qkernels.nn.AntiTransferLoss(**options)
