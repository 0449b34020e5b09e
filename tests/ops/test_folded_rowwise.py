"""The released code's loss: against its materialised definition, by what it allocates, at the extremes."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import literal
import pytest
import torch
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qkernels
from qkernels import anti_transfer_loss
from qkernels.losses import FoldedRowwise
from qkernels.ops.folded_rowwise.config import is_row_form, panel_rows

FORMS = {"row": (3, 5, 2, 3), "gram": (2, 3, 4, 5)}
all_forms = pytest.mark.parametrize("shape", FORMS.values(), ids=FORMS)
all_clamps = pytest.mark.parametrize("clamp", ["each", "product"])


def features(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> Any:
    """As after a ReLU: non-negative, so that Gram matrices are similar and gradients nearly cancel."""
    return [torch.randn(shape, dtype=dtype).relu().add(0.01).requires_grad_(requires_grad) for _ in range(2)]


def loss_of(trained: torch.Tensor, frozen: torch.Tensor, clamp: str = "each", beta: float = 1.0) -> Any:
    return anti_transfer_loss(trained, frozen, loss=FoldedRowwise(clamp), beta=beta)


def with_gradients(function: Callable[..., Any], inputs: Any, *args: Any) -> Any:
    inputs = [x.detach().requires_grad_() for x in inputs]
    value = function(*inputs, *args)
    return value.detach(), *torch.autograd.grad(value, inputs)


def exact_of(inputs: Any, clamp: str = "each", beta: float = 1.0) -> Any:
    """Value and gradients of the definition, in float64."""
    with qkernels.set_backend("reference"):
        return with_gradients(loss_of, [x.double() for x in inputs], clamp, beta)


def error(actual: Any, exact: Any) -> Any:
    return ((actual.double() - exact).norm() / exact.norm()).item()


@all_forms
@all_clamps
def test_it_is_the_released_code(shape: tuple[int, ...], clamp: str) -> None:
    for scale in (1.0, 3e-4, 1e-7):
        trained, frozen = scale * torch.randn(2, *shape, dtype=torch.float64)
        frozen[0, 1] = 0
        expected = 1.5**2 * literal.folded(trained, frozen, clamp).item()
        for backend in ("auto", "reference"):
            with qkernels.set_backend(backend):
                assert loss_of(trained, frozen, clamp, 1.5).item() == pytest.approx(expected, rel=1e-9)


def test_the_two_clamps_differ_for_small_features() -> None:
    a, b = features((2, 3, 2, 2))
    each, product = (loss_of(1e-4 * a, 1e-4 * b, clamp) for clamp in ("each", "product"))
    assert product < 0.5 * each


@all_forms
@all_clamps
def test_values_and_gradients_equal_materialised_grams(shape: tuple[int, ...], clamp: str) -> None:
    for scale in (1.0, 2e-4, 1e-6):  # all norms free, some of them clamped, all of them
        trained, frozen = features(shape)
        # Rows of several sizes, so that the bound lies between them.
        spread = torch.logspace(-1.5, 1.5, shape[1], dtype=torch.float64).view(1, -1, 1, 1)
        inputs = trained * spread * scale, -frozen * spread.flip(1) * scale
        for actual, exact in zip(
            with_gradients(loss_of, inputs, clamp, 1.5), exact_of(inputs, clamp, 1.5), strict=True
        ):
            torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-12 * exact.abs().max().item())


@all_clamps
def test_gradcheck(clamp: str) -> None:
    for shape in (*FORMS.values(), (4, 3), (1, 1, 1, 1), (1, 9, 4)):
        inputs = features(shape, requires_grad=True)
        assert gradcheck(lambda a, b: loss_of(a, b, clamp, 1.5), inputs)


@all_forms
@pytest.mark.parametrize("panel", [1, 4, 100])
def test_forms_of_the_same_shape_agree(shape: tuple[int, ...], panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = features(shape)
    monkeypatch.setattr("qkernels.ops.folded_rowwise.forms.panel_rows", lambda *_: panel)
    results = []
    for row_form in (True, False):
        monkeypatch.setattr("qkernels.ops.folded_rowwise.forms.is_row_form", lambda *_, row_form=row_form: row_form)
        results.append(with_gradients(loss_of, inputs))
    for row, gram in zip(*results, strict=True):
        torch.testing.assert_close(row, gram, rtol=1e-9, atol=1e-14)


def test_form_is_the_one_with_fewer_operations() -> None:
    batch, layers = 20, {1: (64, 4096), 5: (256, 256), 8: (512, 64), 11: (512, 16)}
    rows = {n: batch * channels for n, (channels, _) in layers.items()}
    assert [is_row_form(rows[n], positions) for n, (_, positions) in layers.items()] == [False, True, True, True]
    assert not is_row_form(10, 5)
    assert [panel_rows(rows, size) for rows, size in ((1280, 4), (5120, 8), (2**30, 4))] == [409, 51, 1]


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any function returns, or that its views look at."""

    elements = 0

    def __torch_dispatch__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


@pytest.mark.parametrize("shape", [(4, 100, 5, 5), (4, 100, 15, 15)], ids=["row", "gram"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_size_of_a_gram_matrix_is_allocated(
    shape: tuple[int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qkernels.ops.folded_rowwise.forms.panel_rows", lambda *_: 20)
    rows, positions = 400, shape[2] * shape[3]
    a, b = features(shape, dtype, requires_grad=True)
    with Largest() as largest:
        loss = loss_of(a, b)
        loss.backward()
    assert a.grad is not None
    assert b.grad is not None
    # The products of the features are 3 N x N.
    assert largest.elements <= max(rows * positions, 3 * positions**2 if is_row_form(rows, positions) else 0)
    with qkernels.set_backend("reference"), Largest() as definition:
        loss_of(a, b).backward()
    assert definition.elements == rows**2 > largest.elements


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
@all_forms
def test_frozen_features_get_no_gradient(shape: tuple[int, ...], needed: tuple[bool, bool]) -> None:
    inputs = features(shape)
    both = with_gradients(loss_of, inputs)[1:]
    for tensor, need in zip(inputs, needed, strict=True):
        tensor.requires_grad_(need)
    loss_of(*inputs).backward()
    for tensor, full, need in zip(inputs, both, needed, strict=True):
        assert torch.equal(tensor.grad, full) if need else tensor.grad is None


@all_forms
def test_any_strides_untouched_inputs_and_expanded_gradients(shape: tuple[int, ...]) -> None:
    batch, channels, height, width = shape
    inputs = features((batch, channels, height, 2 * width))
    halves = [x[..., ::2].contiguous() for x in inputs]
    loss, *gradients = with_gradients(loss_of, halves)
    for view in (
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        moved = [view(x) for x in inputs]
        before = [x.clone() for x in moved]
        strided = [x[..., ::2].requires_grad_() for x in moved]
        # A sum passes an expanded scalar on.
        actual = loss_of(*strided).expand(3).sum() / 3
        torch.testing.assert_close(actual, loss)
        for x, gradient in zip(torch.autograd.grad(actual, strided), gradients, strict=True):
            torch.testing.assert_close(x, gradient)
        assert all(torch.equal(*pair) for pair in zip(moved, before, strict=True))
    one = features((1, *shape[1:]))
    repeated = [x.expand(shape) for x in one]
    torch.testing.assert_close(loss_of(*repeated), loss_of(*(x.clone() for x in repeated)))


@all_forms
@all_clamps
def test_float32_of_any_size(shape: tuple[int, ...], clamp: str) -> None:
    """Scaled rows of 1e-24 have squares of 1e-48, which float32 does not hold; and those of 1e20 none either."""
    for scales in ((1e-3, 1e-3), (1e-12, 1e-3), (1e10, 1e10), (1e25, 1e-25), (1e-25, 1e25)):
        inputs = [x * scale for x, scale in zip(features(shape, torch.float32), scales, strict=True)]
        loss, *gradients = with_gradients(loss_of, inputs, clamp)
        exact, *exact_gradients = exact_of(inputs, clamp)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-44)
        for actual, truth in zip(gradients, exact_gradients, strict=True):
            reachable = torch.finfo(torch.float32).tiny < truth.abs().max() < torch.finfo(torch.float32).max
            assert not reachable or error(actual, truth) < 1e-4


@all_forms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = [x.to(dtype) for x in features(shape)]
    loss, *gradients = with_gradients(loss_of, inputs)
    assert loss.dtype == torch.float32
    exact, *exact_gradients = exact_of(inputs)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    # Multiplied by 2^10, else the gradient's small entries are subnormal in float16.
    gradients = with_gradients(lambda *x: 1024 * loss_of(*x), inputs)[1:]
    for actual, truth in zip(gradients, exact_gradients, strict=True):
        assert actual.dtype == dtype
        # The type's one rounding, and nothing of the terms that cancel.
        assert error(actual, 1024 * truth) < 0.5 * torch.finfo(dtype).eps


@all_forms
@all_clamps
def test_dead_channels_give_zero_and_no_gradient(shape: tuple[int, ...], clamp: str) -> None:
    for scale in (1.0, 1e-6):
        inputs = [scale * x for x in features(shape)]
        inputs[0][0, 1], inputs[1][1, 2], inputs[0][1, 0], inputs[1][1, 0] = 0, 0, 0, 0
        loss, da, db = with_gradients(loss_of, inputs, clamp)
        exact = exact_of(inputs, clamp)
        torch.testing.assert_close((loss, da, db), exact, rtol=1e-9, atol=1e-12 * exact[1].abs().max().item())
        # Dead in one of them, a channel still takes part in the rows of the others.
        assert da[1, 0].eq(0).all()
        assert db[1, 0].eq(0).all()
        for dead in ([torch.zeros(shape), inputs[1].float()], [torch.zeros(shape)] * 2):
            assert all(x.eq(0).all() for x in with_gradients(loss_of, dead, clamp))


@all_forms
@all_clamps
def test_nan_is_not_silenced(shape: tuple[int, ...], clamp: str) -> None:
    cases = ((1.0, False), (1e-9, False), (1.0, True))
    for bad, (scale, other_is_dead) in itertools.product((math.nan, math.inf), cases):
        a, b = [scale * x for x in features(shape)]
        a[0, 1, 1] = bad
        b = torch.zeros_like(b) if other_is_dead else b
        for inputs in ((a, b), (b, a)):
            loss, *gradients = with_gradients(loss_of, inputs, clamp)
            assert loss.isnan()
            assert all(x.isnan().any() for x in gradients)


def test_empty_batch_has_no_mean() -> None:
    for backend in ("auto", "reference"):
        with qkernels.set_backend(backend):
            loss, *gradients = with_gradients(loss_of, [torch.zeros(0, 3, 4)] * 2)
        assert loss.isnan()
        assert all(x.shape == (0, 3, 4) for x in gradients)


@all_forms
def test_second_derivative_says_where_it_is(shape: tuple[int, ...]) -> None:
    a, b = features(shape, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss_of(a, b), a, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative.*set_backend\('reference'\)"):
        gradient.sum().backward()
    with qkernels.set_backend("reference"):
        (gradient,) = torch.autograd.grad(loss_of(a, b), a, create_graph=True)
        gradient.square().sum().backward()
    assert a.grad.isfinite().all()


@all_forms
def test_backward_under_autocast_computes_in_float32(shape: tuple[int, ...]) -> None:
    a, b = features(shape, torch.float32, requires_grad=True)
    loss = loss_of(a, b)
    expected = torch.autograd.grad(loss, (a, b), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss_of(a, b), loss)
        actual = torch.autograd.grad(loss, (a, b))
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@all_forms
@all_clamps
def test_opcheck(shape: tuple[int, ...], clamp: str) -> None:
    a, b = features(shape, torch.float32, requires_grad=True)
    torch.library.opcheck(torch.ops.qkernels.folded_rowwise, (a, b, clamp, 0.5, "torch"))
    a, b = a.detach(), b.detach()
    loss, *rest = torch.ops.qkernels.folded_rowwise(a, b, clamp, 0.5, "torch")
    for which in range(2):
        torch.library.opcheck(
            torch.ops.qkernels.folded_rowwise_da, (torch.randn_like(loss), a, b, *rest, which, 0.5, "torch")
        )
