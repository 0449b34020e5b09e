"""The Gram cosine and the anti-transfer loss: against materialised Grams, by their properties, at the extremes."""

import itertools

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch._dynamo.testing
from torch.autograd import gradcheck

import qkernels
from qkernels import anti_transfer_loss, gram_cosine
from qkernels.ops.gram_cosine.config import GRAMS, gram_form

# Channel form where C <= N, position form elsewhere.
SHAPES = [(3, 2, 3, 4), (2, 7, 2, 2), (1, 4, 4), (2, 5, 1), (2, 3), (1, 1, 1, 1)]
all_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def features(shape, dtype=torch.float64, requires_grad=False):
    """As after a ReLU: non-negative, so that Gram matrices are similar and gradients nearly cancel."""
    return [torch.randn(shape, dtype=dtype).relu().add(0.01).requires_grad_(requires_grad) for _ in range(2)]


def naive_cosine(a, b):
    values = []
    for sample_a, sample_b in zip(a.reshape(*a.shape[:2], -1), b.reshape(*b.shape[:2], -1), strict=True):
        gram_a, gram_b = sample_a @ sample_a.T, sample_b @ sample_b.T
        values.append((gram_a * gram_b).sum() / (gram_a.norm() * gram_b.norm()))
    return torch.stack(values)


@all_shapes
def test_values_and_gradients_equal_materialised_grams(shape):
    a, b = features(shape, requires_grad=True)
    cosine, expected = gram_cosine(a, b), naive_cosine(a, b)
    torch.testing.assert_close(cosine, expected)
    torch.testing.assert_close(qkernels.reference.gram_cosine(a, b), expected)
    weight = torch.randn(shape[0], dtype=a.dtype)
    actual = torch.autograd.grad(cosine, (a, b), weight)
    for gradient, exact in zip(actual, torch.autograd.grad(expected, (a, b), weight), strict=True):
        torch.testing.assert_close(gradient, exact, atol=1e-12, rtol=1e-9)


@all_shapes
def test_gradcheck(shape):
    a, b = torch.randn(2, *shape, dtype=torch.float64).unbind(0)
    inputs = a.clone().requires_grad_(), b.clone().requires_grad_()
    assert gradcheck(gram_cosine, inputs)
    assert gradcheck(lambda a, b: anti_transfer_loss(a, b, beta=1.7), inputs)


def test_forms_of_the_same_shape_agree(monkeypatch):
    a, b = features((2, 5, 3, 2), requires_grad=True)
    results = []
    for form in ("channel", "position"):
        monkeypatch.setattr("qkernels.ops.gram_cosine.op.is_direct", lambda *_, direct=form == "channel": direct)
        cosine = gram_cosine(a, b)
        results.append((cosine, *torch.autograd.grad(cosine.sum(), (a, b))))
    for channel, position in zip(*results, strict=True):
        torch.testing.assert_close(channel, position)


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
    shape = draw(st.tuples(*(st.integers(1, n) for n in (3, 6, 3, 3))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    a, b = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    return a, b, generator


properties = hypothesis.settings(max_examples=40, deadline=None)


@properties
@hypothesis.given(feature_maps())
def test_cosine_lies_between_0_and_1_and_is_1_for_equals(maps):
    a, b, _ = maps
    cosine = gram_cosine(a, b)
    assert (cosine >= 0).all()
    assert (cosine <= 1 + 1e-12).all()
    torch.testing.assert_close(gram_cosine(a, a), torch.ones_like(cosine))
    torch.testing.assert_close(gram_cosine(b, a), cosine)


@properties
@hypothesis.given(feature_maps())
def test_cosine_ignores_positions_and_common_channel_order(maps):
    a, b, generator = maps
    cosine = gram_cosine(a, b)
    channels = torch.randperm(a.shape[1], generator=generator)
    torch.testing.assert_close(gram_cosine(a[:, channels], b[:, channels]), cosine)
    positions = torch.randperm(a.shape[2] * a.shape[3], generator=generator)
    moved = a.flatten(2)[..., positions].view(a.shape)
    torch.testing.assert_close(gram_cosine(moved, b), cosine)
    torch.testing.assert_close(gram_cosine(b, moved), cosine)


@properties
@hypothesis.given(feature_maps(), st.floats(-140, 140), st.floats(-140, 140))
def test_cosine_ignores_scale(maps, log_a, log_b):
    a, b, _ = maps
    torch.testing.assert_close(gram_cosine(a * 10**log_a, b * -(10**log_b)), gram_cosine(a, b))


def test_samples_do_not_mix():
    a, b = features((3, 4, 5))
    alone = torch.cat([gram_cosine(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(gram_cosine(a, b), alone)
    assert alone.unique().numel() == 3


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 8, 3)])
def test_float32_of_any_size(scale, shape):
    a, b = features(shape, torch.float32)
    big = (a * scale).requires_grad_(), (b / scale).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in big]
    cosine, expected = gram_cosine(*big), naive_cosine(*exact)
    torch.testing.assert_close(cosine, expected.float(), rtol=1e-5, atol=0)
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


def test_dead_features_give_zero_and_no_gradient():
    a, b = features((3, 2, 4), requires_grad=True)
    with torch.no_grad():
        a[1], b[2] = 0, 0
    cosine = gram_cosine(a, b)
    assert cosine[0] > 0
    assert cosine[1:].tolist() == [0, 0]
    da, db = torch.autograd.grad(cosine.sum(), (a, b))
    for gradient in (da, db):
        assert gradient[0].abs().sum() > 0
        assert gradient[1:].eq(0).all()
    assert gram_cosine(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)).item() == 0
    assert qkernels.reference.gram_cosine(a, b)[1:].tolist() == [0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("other_is_dead", [False, True])
@pytest.mark.parametrize("shape", [(2, 2, 5), (2, 5, 2)])
def test_nan_is_not_silenced(bad, other_is_dead, shape):
    a, b = features(shape)
    a[0, 1, 1] = bad
    if other_is_dead:
        b[0] = 0
    for cosine in (gram_cosine(a, b), gram_cosine(b, a)):
        assert cosine[0].isnan()
        assert not cosine[1].isnan()
    assert anti_transfer_loss(a, b).isnan()
    a.requires_grad_()
    assert torch.autograd.grad(gram_cosine(a, b).sum(), a)[0][0].isnan().any()


def test_any_strides_and_untouched_inputs():
    a, b = features((2, 4, 6, 6))
    expected = gram_cosine(a[..., ::2], b[..., 1::2])
    for view in (
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        moved = view(a).requires_grad_()
        before = moved.detach().clone()
        cosine = gram_cosine(moved[..., ::2], view(b)[..., 1::2])
        torch.testing.assert_close(cosine, expected)
        assert torch.equal(moved, before)
        plain = a.clone().requires_grad_()
        exact = torch.autograd.grad(gram_cosine(plain[..., ::2], b[..., 1::2]).sum(), plain)[0]
        torch.testing.assert_close(torch.autograd.grad(cosine.sum(), moved)[0], exact)


def test_expanded_features_and_empty_batch():
    a, b = features((1, 3, 4))
    torch.testing.assert_close(gram_cosine(a.expand(5, -1, -1), b.expand(5, -1, -1)), gram_cosine(a, b).expand(5))
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


def test_loss_is_beta_times_the_mean_square():
    a, b = features((3, 4, 5))
    squares = naive_cosine(a, b) ** 2
    torch.testing.assert_close(anti_transfer_loss(a, b, beta=0.3), 0.3 * squares.mean())
    torch.testing.assert_close(anti_transfer_loss(a, b, beta=0.3, reduction="sum"), 0.3 * squares.sum())
    torch.testing.assert_close(anti_transfer_loss(a, b, beta=0.3, reduction="none"), 0.3 * squares)


def naive_folded(trained, frozen, beta, clamp):
    """The released code step by step (its quirks included), row by row in Python."""
    batch, channels, height, width = trained.shape
    grams = []
    for f in (trained, frozen):
        rows = f.reshape(batch * channels, height * width)
        grams.append(rows @ rows.T / (batch * channels * height * width) / 0.001)
    cosines = []
    for t, p in zip(*grams, strict=True):
        norm_t, norm_p = t.norm().item(), p.norm().item()
        norms = max(norm_t, 1e-8) * max(norm_p, 1e-8) if clamp == "each" else max(norm_t * norm_p, 1e-8)
        cosines.append(abs((t @ p).item() / norms))
    return beta * beta * (sum(cosines) / len(cosines)) ** 2


@pytest.mark.parametrize("clamp", ["each", "product"])
@pytest.mark.parametrize("scale", [1.0, 3e-4, 1e-7])
def test_folded_rowwise_is_the_released_code(clamp, scale):
    trained, frozen = torch.randn(2, 2, 3, 2, 2, dtype=torch.float64).unbind(0)
    frozen[0, 1] = 0
    trained = trained * scale
    value = anti_transfer_loss(trained, frozen * scale, beta=1.5, semantics="folded-rowwise", clamp=clamp)
    assert value.item() == pytest.approx(naive_folded(trained, frozen * scale, 1.5, clamp), rel=1e-9)


def test_the_two_clamps_differ_for_small_features():
    a, b = features((2, 3, 2, 2))
    each, product = (
        anti_transfer_loss(1e-4 * a, 1e-4 * b, semantics="folded-rowwise", clamp=clamp) for clamp in ("each", "product")
    )
    assert product < 0.5 * each


@pytest.mark.parametrize("clamp", ["each", "product"])
def test_folded_rowwise_gradcheck(clamp):
    a, b = features((2, 2, 2, 2), requires_grad=True)
    assert gradcheck(lambda a, b: anti_transfer_loss(a, b, semantics="folded-rowwise", clamp=clamp), (a, b))


def test_folded_rowwise_mixes_samples_and_paper_does_not():
    a, b = features((2, 3, 4))
    losses = [anti_transfer_loss(a, b, semantics=s).item() for s in ("paper", "folded-rowwise")]
    halves = [
        sum(anti_transfer_loss(a[i : i + 1], b[i : i + 1], semantics=s).item() for i in range(2)) / 2
        for s in ("paper", "folded-rowwise")
    ]
    assert losses[0] == pytest.approx(halves[0])
    assert losses[1] != pytest.approx(halves[1])


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
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        anti_transfer_loss(F, F, **options)
    with pytest.raises(ValueError, match=message):
        qkernels.nn.AntiTransferLoss(**options)
