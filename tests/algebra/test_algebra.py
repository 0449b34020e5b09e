"""The sign table against quaternion arithmetic written out, and everything that is derived from it."""

from typing import Any

import pytest
import torch

from qkernels import algebra


def product(p: Any, q: Any) -> Any:
    """Hamilton's rules i^2 = j^2 = k^2 = ijk = -1, multiplied out by hand."""
    a, b, c, d = p
    e, f, g, h = q
    return torch.stack(
        [
            a * e - b * f - c * g - d * h,
            a * f + b * e + c * h - d * g,
            a * g - b * h + c * e + d * f,
            a * h + b * g - c * f + d * e,
        ]
    )


def random(*shape: Any, dtype: torch.dtype = torch.float64) -> Any:
    return torch.randn(*shape, dtype=dtype)


def test_structure_tensor_is_the_hamilton_product() -> None:
    w, x = random(4), random(4)
    y = torch.einsum("abc,b,c->a", algebra.structure_tensor(), w, x)
    torch.testing.assert_close(y, product(w, x))
    assert algebra.structure_tensor(torch.float16, "meta").device.type == "meta"
    assert algebra.structure_tensor(torch.float16).dtype == torch.float16


def test_product_is_associative_and_multiplies_norms() -> None:
    def times(p: Any, q: Any) -> Any:
        return torch.einsum("abc,b,c->a", algebra.structure_tensor(), p, q)

    p, q, r = random(3, 4)
    torch.testing.assert_close(times(times(p, q), r), times(p, times(q, r)))
    torch.testing.assert_close(times(p, q).norm(), p.norm() * q.norm())
    assert not torch.allclose(times(p, q), times(q, p))


def test_eight_products_are_the_structure_tensor() -> None:
    a, b, c = algebra.eight_products()
    assert torch.equal(torch.einsum("am,mb,mc->abc", c, a, b), algebra.structure_tensor())
    assert a.dtype == b.dtype == c.dtype == torch.float64


@pytest.mark.parametrize(
    ("transform", "matrix"),
    [
        (algebra.input_products, lambda a, b, c: b),
        (algebra.output_products, lambda a, b, c: c.T),
        (algebra.input_from_products, lambda a, b, c: b.T),
        (algebra.output_from_products, lambda a, b, c: c),
    ],
)
def test_map_transforms_apply_their_matrix(transform: Any, matrix: Any) -> None:
    m = matrix(*algebra.eight_products())
    x = random(3, m.shape[1], 5, 2)
    expected = torch.einsum("mc,bc...->bm...", m, x)
    torch.testing.assert_close(transform(x.clone()), expected)
    torch.testing.assert_close(transform(x.transpose(0, 3).contiguous().transpose(0, 3)), expected)


def test_weight_transforms_apply_their_matrix() -> None:
    a, _, _ = algebra.eight_products()
    w, z = random(4, 3, 2), random(8, 3, 2)
    torch.testing.assert_close(algebra.weight_products(w), torch.einsum("mb,b...->m...", a, w))
    torch.testing.assert_close(algebra.weight_from_products(z.clone()), torch.einsum("mb,m...->b...", a, z))


def test_transforms_do_not_write_to_their_operands() -> None:
    w, x = random(4, 3), random(2, 4, 3)
    before = w.clone(), x.clone()
    algebra.weight_products(w), algebra.input_products(x), algebra.output_products(x)
    assert torch.equal(w, before[0])
    assert torch.equal(x, before[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_components_are_summed_in_float32(dtype: torch.dtype) -> None:
    x = random(2, 4, 7, dtype=torch.float32).to(dtype)
    assert algebra.input_products(x).dtype == torch.float32
    assert torch.equal(algebra.input_products(x), algebra.input_products(x.float()))


@pytest.mark.parametrize("groups", [1, 3])
def test_expanded_weight_multiplies_and_contracts(groups: int) -> None:
    p, q = 2, 5
    w, x = random(4, groups * p, q), random(4, groups, q)
    real = algebra.expand_weight(w, groups)
    y = torch.stack([m @ x[:, g].reshape(-1) for g, m in enumerate(real.view(groups, 4 * p, 4 * q))])
    expected = torch.einsum("abc,bgpq,cgq->gap", algebra.structure_tensor(), w.view(4, groups, p, q), x)
    torch.testing.assert_close(y, expected.reshape(groups, -1))
    gradient = random(*real.shape)
    torch.testing.assert_close((real * gradient).sum(), (w * algebra.contract_weight(gradient, groups)).sum())
    plain = algebra.real_weight(w, groups)
    assert torch.equal(plain, real)
    assert torch.equal(algebra.expand_weight(w[..., None], groups), real[..., None])
    assert torch.equal(algebra.real_weight(w[..., None], groups), real[..., None])
    half = random(*real.shape, dtype=torch.float32).to(torch.bfloat16)  # summed in float32, and rounded once
    assert torch.equal(algebra.contract_weight(half, groups), algebra.contract_weight(half.double(), groups).bfloat16())
    assert algebra.contract_weight(half.to("meta"), groups).device.type == "meta"
    if groups == 1:
        assert torch.equal(algebra.expand_weight(w), real)
        assert torch.equal(algebra.real_weight(w), real)
        assert torch.equal(algebra.contract_weight(gradient), algebra.contract_weight(gradient, groups))
    w.requires_grad_()
    (by_autograd,) = torch.autograd.grad(algebra.real_weight(w, groups), w, gradient)
    torch.testing.assert_close(by_autograd, algebra.contract_weight(gradient, groups))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("few", [0, algebra.FEW])  # one by one, and in one product
def test_several_weights_are_expanded_and_contracted_to_any_order(
    groups: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(algebra, "FEW", few)
    weights = [
        random(4, 2, 3, 2, 1).requires_grad_(),
        random(4, 4, 1).requires_grad_(),
        random(4, 2, 5).requires_grad_(),
    ]
    reals = algebra.ExpandWeights.apply(groups, *weights)
    for real, weight in zip(reals, weights, strict=True):
        assert torch.equal(real, algebra.real_weight(weight, groups))
    assert torch.autograd.gradcheck(lambda *w: algebra.ExpandWeights.apply(groups, *w), weights)
    assert torch.autograd.gradgradcheck(lambda *w: algebra.ExpandWeights.apply(groups, *w), weights)
    by_some = torch.autograd.grad(reals[1].square().sum(), weights, allow_unused=True)
    torch.testing.assert_close(by_some[1], 8 * weights[1])
    assert (by_some[0], by_some[2]) == (None, None)
    frozen, trained, _ = algebra.ExpandWeights.apply(groups, weights[0].detach(), *weights[1:])
    assert not frozen.requires_grad
    assert trained.requires_grad
