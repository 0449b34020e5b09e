"""The table of losses, and every loss in it: against its literal version, its gradients, types and compilation."""

import itertools
import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from literal import EVERY, computed, every_loss, features, is_zero, literal
from torch.autograd import gradcheck

import qkernels
from qkernels import anti_transfer_loss, anti_transfer_tap
from qkernels.losses import CKA, LOSSES, CosSquared, FoldedRowwise, GramChannel, GramPosition, Loss, MseSigmoid, loss_of
from qkernels.nn import AntiTransferLoss

# More rows than columns and fewer, of every matrix; odd; one sample, more samples than channels, one channel, one
# position, no position.
SHAPES = [(3, 2, 3, 4), (2, 7, 2, 2), (1, 4, 4), (5, 2, 3), (3, 1, 5), (2, 5, 1), (3, 4), (1, 1, 1, 1)]
BACKENDS = ("auto", "reference")


def test_the_table_has_every_loss() -> None:
    assert len(EVERY) == len(set(EVERY)) == 23
    assert {loss.name for loss in EVERY} == set(LOSSES)
    assert all(loss_of(name) == kind() for name, kind in LOSSES.items())
    assert [loss for loss in EVERY if loss.per_sample] == [
        *(kind(centred) for kind in (GramChannel, GramPosition) for centred in (False, True))
    ]


def test_plain_data_stand_for_a_loss() -> None:
    for loss in EVERY:
        assert loss_of(loss.plain()) == loss_of(loss) == loss
        assert isinstance(loss.plain(), str) == (loss == LOSSES[loss.name]())
    with pytest.raises(FrozenInstanceError):
        FoldedRowwise().clamp = "product"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("paper", "loss must be one of 'gram-channel', .*, or a mapping of such a name and options; got 'paper'"),
        (None, "loss must be one of .*; got None"),
        ({"clamp": "each"}, "loss must be one of .*; got {'clamp': 'each'}"),
        ({"name": ["cka"]}, "loss must be one of .*; got"),
        ({"name": "cka", "centred": False}, "centred: False must be an option of loss 'cka', which has none"),
        ({"name": "gram-batch", "clamp": "each"}, "clamp: 'each' must be an option of loss 'gram-batch'"),
        (
            {"name": "folded-rowwise", "gram": "position"},
            "gram: 'position' must be an option of loss 'folded-rowwise', which has clamp",
        ),
        ({"name": "folded-rowwise", "clamp": "none"}, "clamp of loss .* must be one of 'each', 'product'; got 'none'"),
        ({"name": "gram-channel", "centred": "yes"}, "centred of loss .* must be one of False, True; got 'yes'"),
        ({"name": "cos-squared", "aggregation": "gram"}, "aggregation of loss 'cos-squared' must be one of 'none', "),
    ],
)
def test_what_is_no_loss_is_refused(value: Any, message: str) -> None:
    for refused in (loss_of, AntiTransferLoss, lambda loss: anti_transfer_loss(*features((2, 3, 4)), loss=loss)):
        with pytest.raises(ValueError, match=message):
            refused(value)


@every_loss
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradients_are_those_of_the_literal_version(loss: Loss, backend: Any) -> None:
    for shape in SHAPES:
        a, b = features(shape, requires_grad=True, loss=loss)
        with qkernels.set_backend(backend):
            value = computed(loss, a, b, beta=1.7)
            actual = torch.autograd.grad(value, (a, b))
        assert value.shape == ()
        if is_zero(loss, shape):
            assert all(x.eq(0).all() for x in (value, *actual))
            continue
        expected = (1.7**2 if loss.name == "folded-rowwise" else 1.7) * literal(loss, a, b).mean()
        torch.testing.assert_close(value, expected, msg=str(shape))
        assert loss.name == "mse-sigmoid" or 0 < value <= 1.7**2 * (1 + 1e-12)
        assert loss.name != "mse-sigmoid" or -1.7 < value < -0.5 * 1.7
        for gradient, exact in zip(actual, torch.autograd.grad(expected, (a, b)), strict=True):
            torch.testing.assert_close(gradient, exact, atol=1e-12, rtol=1e-9, msg=str(shape))


@every_loss
def test_gradcheck(loss: Loss) -> None:
    for shape in ((3, 2, 7), (3, 5, 2)):
        # Signs too, where the loss takes them.
        draw = torch.randn if loss.takes_negative else torch.rand
        size = 0.1 if loss == MseSigmoid("gram") else 1
        a, b = ((size * draw(shape, dtype=torch.float64).add(0.01)).requires_grad_() for _ in range(2))
        assert gradcheck(lambda a, b: computed(loss, a, b, beta=1.7), (a, b))


@every_loss
def test_reductions(loss: Loss) -> None:
    a, b = features((3, 4, 5), loss=loss)
    for backend in BACKENDS:
        with qkernels.set_backend(backend):
            mean, total = (computed(loss, a, b, beta=0.3, reduction=name) for name in ("mean", "sum"))
            assert torch.equal(mean, computed(loss, a, b, beta=0.3))
            if loss.per_sample:
                each = computed(loss, a, b, beta=0.3, reduction="none")
                torch.testing.assert_close(each, 0.3 * literal(loss, a, b))
                assert each.unique().numel() == 3
                torch.testing.assert_close((mean, total), (each.mean(), each.sum()))
            else:
                assert torch.equal(mean, total)
    if loss == CosSquared("mul_comp"):
        return  # whose cosines differ by 1e-6: the square of their mean is the mean of their squares within 1e-12
    alone = torch.stack([computed(loss, a[n : n + 1], b[n : n + 1], beta=0.3) for n in range(3)]).mean()
    is_mean = math.isclose(computed(loss, a, b, beta=0.3), alone, rel_tol=1e-12)
    # The sigmoid of the small differences of mul_comp is a straight line.
    assert is_mean == (loss.per_sample or loss == MseSigmoid("mul_comp"))
    if not loss.per_sample:
        message = r"reduction must be 'mean' or 'sum' with .*; got 'none'"
        with pytest.raises(ValueError, match=message):
            AntiTransferLoss(loss, reduction="none")
        with pytest.raises(ValueError, match=message):
            anti_transfer_loss(a, b, loss=loss, reduction="none")


@every_loss
def test_strided_and_expanded_features_and_gradients(loss: Loss) -> None:
    a, b = features((4, 6, 6, 8), loss=loss)
    plain = a[:, ::2, :, 1::2].contiguous().requires_grad_(), b[:, ::2, :, 1::2].contiguous().requires_grad_()
    expected = computed(loss, *plain)
    gradients = torch.autograd.grad(expected, plain)
    for view in (
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        moved = [view(x) for x in (a, b)]
        before = [x.clone() for x in moved]
        strided = [x[:, ::2, :, 1::2].requires_grad_() for x in moved]
        # A sum hands an expanded scalar to the derivative.
        value = computed(loss, *strided).expand(3).sum() / 3
        torch.testing.assert_close(value, expected)
        for actual, exact in zip(torch.autograd.grad(value, strided), gradients, strict=True):
            torch.testing.assert_close(actual, exact)
        assert all(torch.equal(*pair) for pair in zip(moved, before, strict=True))
    for axis in range(3):
        one, other = features((3, 4, 5), loss=loss)
        one = one.narrow(axis, 0, 1).requires_grad_()
        copied = one.detach().expand(3, 4, 5).clone().requires_grad_()
        value, expected = computed(loss, one.expand(3, 4, 5), other), computed(loss, copied, other)
        torch.testing.assert_close(value, expected)
        exact = torch.autograd.grad(expected, copied)[0].sum(axis, keepdim=True)
        torch.testing.assert_close(torch.autograd.grad(value, one)[0], exact)


@every_loss
def test_types_and_autocast(loss: Loss) -> None:
    for backend, dtype in itertools.product(BACKENDS, (torch.float16, torch.bfloat16)):
        maps = [x.to(dtype) for x in features((2, 8, 20), torch.float32, loss=loss)]
        results = []
        for cast, wide in itertools.product((False, True), repeat=2):
            a, b = ((x.float() if wide else x.clone()).requires_grad_() for x in maps)
            with qkernels.set_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=cast):
                value = computed(loss, a, b)
            gradients = torch.autograd.grad(value, (a, b))
            assert [x.dtype for x in gradients] == [a.dtype, b.dtype]
            results.append((value, *(x.to(dtype) for x in gradients)))
        assert results[0][0].dtype == torch.float32
        assert all(torch.equal(*pair) for result in results[1:] for pair in zip(result, results[0], strict=True))
    a, b = features((2, 3, 4), loss=loss)
    a, b = a.requires_grad_(), b.float().requires_grad_()
    value = computed(loss, a, b)
    torch.testing.assert_close(value, computed(loss, a, b.double()))
    assert [value.dtype, *(x.dtype for x in torch.autograd.grad(value, (a, b)))] == [a.dtype, a.dtype, b.dtype]


@every_loss
def test_dead_features_leave_everything_finite(loss: Loss) -> None:
    for backend, dead in itertools.product(BACKENDS, ((0,), (1,), (0, 1))):
        for samples in (slice(1), slice(3)):
            maps = features((3, 4, 5), torch.float32, loss=loss)
            for which in dead:
                maps[which][samples] = 0
            maps = [x.requires_grad_() for x in maps]
            with qkernels.set_backend(backend):
                value = computed(loss, *maps)
            assert all(x.isfinite().all() for x in (value, *torch.autograd.grad(value, maps)))


@every_loss
def test_nan_is_not_silenced(loss: Loss) -> None:
    for bad, which, other_is_dead in itertools.product((math.nan, math.inf), (0, 1), (False, True)):
        maps = features((2, 3, 4), loss=loss)
        maps[which][:, :, 1] = bad
        if other_is_dead and loss.takes_negative:
            maps[1 - which].zero_()
        value = computed(loss, *maps)
        infinite = loss.name == "mse-sigmoid" and math.isinf(bad) and value == -1  # an infinite difference
        assert value.isnan() or infinite


@every_loss
def test_compiles_to_one_graph(loss: Loss) -> None:
    torch._dynamo.reset()
    a, b = features((2, 7, 6, 9), torch.float32, requires_grad=True, loss=loss)
    module = AntiTransferLoss(loss, beta=0.5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, module):
        torch.manual_seed(1)
        value = function(a, b)
        results.append((value, *torch.autograd.grad(value, (a, b))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("loss", [GramChannel(), CKA(), FoldedRowwise()], ids=repr)
@pytest.mark.parametrize("positions", [(2, 3), (6, 8)], ids=str)
def test_compiles_to_one_graph_for_all_batches(loss: Loss, positions: tuple[int, int]) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = AntiTransferLoss(loss)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    frames = 0
    for batch in (4, 7, 9):
        a, b = features((batch, 5, *positions), torch.float32, requires_grad=True)  # no size twice: they would be tied
        value, expected = compiled(a, b), module(a, b)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(torch.autograd.grad(value, (a, b)), torch.autograd.grad(expected, (a, b)))
        # Dynamo begins anew when it meets the number beta, which an operator takes as a constant.
        frames = frames or counter.frame_count
    assert counter.frame_count == frames <= 2


@every_loss
def test_tap_adds_the_gradient_of_the_loss_to_the_incoming_one(loss: Loss) -> None:
    shapes, reductions = ((3, 4, 3, 5), (3, 5, 2, 2)), ("mean", "sum")
    for backend, shape, reduction in itertools.product(BACKENDS, shapes, reductions):
        a, b = features(shape, requires_grad=True, loss=loss)
        incoming, options = torch.randn_like(a), {"loss": loss, "beta": 1.3, "reduction": reduction}
        with qkernels.set_backend(backend):
            torch.manual_seed(2)
            expected = anti_transfer_loss(a, b, **options)
            own = torch.autograd.grad(expected, (a, b))
            torch.manual_seed(2)
            same, value = anti_transfer_tap(a, b, **options)
            actual = torch.autograd.grad((same * incoming).sum() + 0.7 * value, (a, b))
        assert torch.equal(value, expected)
        assert torch.equal(same, a)
        assert same.data_ptr() == a.data_ptr()
        torch.testing.assert_close(actual, (incoming + 0.7 * own[0], 0.7 * own[1]))


@pytest.mark.parametrize("loss", [kind() for kind in LOSSES.values()], ids=repr)
def test_features_that_do_not_fit_are_refused(loss: Loss) -> None:
    a, b = features((2, 3, 4))
    cases = [
        (a[0, 0], b[0, 0], r"{} must have dimensions \[B, C, \*spatial\]; got shape \(4,\)"),
        (a, b[:1], r"frozen must have the shape of {}; got \(1, 3, 4\) and \(2, 3, 4\)"),
        (a[:, :0], b[:, :0], "{} must have at least one channel and one position"),
        (a.long(), b.long(), "{} must be of a floating-point type; got torch.int64"),
        (a, b.to("meta"), "frozen must be on the device of {}; got meta and cpu"),
    ]
    for function, name in ((anti_transfer_loss, "trained"), (anti_transfer_tap, "features")):
        for trained, frozen, message in cases:
            with pytest.raises(ValueError, match=message.format(name)):
                function(trained, frozen, loss=loss)
        with pytest.raises(ValueError, match=r"reduction must be one of .*'mean', .*'sum'; got 'max'"):
            function(a, b, loss=loss, reduction="max")


def test_only_losses_that_draw_take_a_generator() -> None:
    generator, message = torch.Generator(), "generator must be None without aggregation 'stochastic_pairwise'"
    for loss in EVERY:
        if getattr(loss, "aggregation", None) == "stochastic_pairwise":
            assert AntiTransferLoss(loss, generator=generator).generator is generator
            continue
        with pytest.raises(ValueError, match=message):
            AntiTransferLoss(loss, generator=generator)
        with pytest.raises(ValueError, match=message):
            anti_transfer_loss(*features((2, 3, 4)), loss=loss, generator=generator)


@every_loss
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_has_no_mean(loss: Loss, backend: str) -> None:
    """As PyTorch's losses: `mse_loss` and `cross_entropy` of no samples are NaN, sums 0, gradients empty."""
    a, b = features((0, 3, 4), torch.float32, requires_grad=True, loss=loss)
    with qkernels.set_backend(backend):
        for function in (anti_transfer_loss, lambda *maps, **options: anti_transfer_tap(*maps, **options)[1]):
            mean, total = (function(a, b, loss=loss, reduction=each) for each in ("mean", "sum"))
            assert mean.isnan()
            assert total.dtype == mean.dtype == torch.float32
            assert total == 0 if loss.per_sample else total.isnan()
            assert mean.shape == total.shape == ()
            assert [x.shape for x in torch.autograd.grad(mean + total, (a, b))] == [a.shape, b.shape]
        if loss.per_sample:
            each = anti_transfer_loss(a, b, loss=loss, reduction="none")
            assert (each.shape, each.dtype) == ((0,), torch.float32)
