"""The research code's distances of aggregated maps: signs, memory, cancellation, what is drawn, dead features."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from literal import SEED, computed, features, literal, run_of_channels

from qkernels.losses import CosSquared, Loss, MseSigmoid
from qkernels.nn import AntiTransferLoss

COSINES = [CosSquared(aggregation) for aggregation in CosSquared.options()["aggregation"]]
every_cosine = pytest.mark.parametrize("loss", [loss for loss in COSINES if loss.takes_negative], ids=repr)


@every_cosine
def test_absolute_cosines_of_any_sign(loss: Loss) -> None:
    t, p = features((3, 4, 5))
    t[0], p[1] = -t[0], -p[1]
    torch.testing.assert_close(computed(loss, t, p), literal(loss, t, p))


def test_a_product_over_channels_takes_no_negative_features() -> None:
    t, p = features((3, 4, 5))
    assert computed(CosSquared("mul_comp"), -t, p).isnan()  # a power of a negative number


@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (CosSquared("pairwise"), (2, 128, 32, 32)),  # laid out 128 times the features
        (MseSigmoid("pairwise"), (2, 128, 32, 32)),
        (MseSigmoid("gram"), (8, 128, 2, 2)),  # B C is 256 N
        (MseSigmoid("gram"), (1, 2, 32, 32)),  # N is 512 B C
    ],
)
def test_memory_is_that_of_the_features(loss: Loss, shape: tuple[int, int, int, int]) -> None:
    t, p = features(shape, torch.float32, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        computed(loss, t, p).backward()
    assert 0 < max(event.self_cpu_memory_usage for event in profile.events()) <= 4 * t.nbytes


@pytest.mark.parametrize(
    ("loss", "shape", "size", "noise"),
    [
        (MseSigmoid("pairwise"), (1, 2, 64), 1000, 1),
        (MseSigmoid("pairwise"), (2, 64, 4), 1000, 1),
        (MseSigmoid("gram"), (1, 2, 64), 30, 3e-4),
        (MseSigmoid("gram"), (2, 64, 4), 30, 3e-3),
    ],
)
def test_nearly_equal_maps_do_not_cancel(loss: Loss, shape: tuple[int, int, int], size: int, noise: float) -> None:
    """In float32, where a difference of squares would be wrong by 6e-8 size^2, for "gram" by 6e-8 size^4."""
    base = torch.rand(shape)[:, :1].expand(shape) + size
    t, p = base.clone().requires_grad_(), base + noise * torch.randn(shape)
    exact = t.detach().double().requires_grad_()
    value, expected = computed(loss, t, p), literal(loss, exact, p.double())
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=0)
    actual, gradient = torch.autograd.grad(value, t)[0], torch.autograd.grad(expected, exact)[0]
    # The mean of 64 pairs' noise is 1/8, of values of 1000 that are rounded by 6e-5.
    assert ((actual.double() - gradient).norm() / gradient.norm()).item() < 1e-2


@pytest.mark.parametrize("kind", [CosSquared, MseSigmoid])
def test_a_seed_reproduces_the_channels(kind: Any) -> None:
    t, p = features((4, 32, 3, 3))

    def losses(generator: torch.Generator = None) -> Any:
        loss = AntiTransferLoss(kind("stochastic_pairwise"), generator=generator)
        return [loss(t, p).item() for _ in range(20)]

    torch.manual_seed(0)
    first = losses()
    torch.manual_seed(0)
    assert losses() == first
    state = torch.get_rng_state()
    own = losses(torch.Generator().manual_seed(0))
    assert own == first
    assert torch.equal(torch.get_rng_state(), state)
    assert losses(torch.Generator().manual_seed(1)) != own


def test_every_run_of_channels_is_drawn() -> None:
    t, p = features((3, 12, 5))
    loss = AntiTransferLoss(CosSquared("stochastic_pairwise"))
    possible = [literal(loss.loss, t, p, slice(i, i + 4)).item() for i in range(9)]
    drawn = [loss(t, p).item() for _ in range(300)]
    matches = [[i for i, value in enumerate(possible) if math.isclose(value, d, rel_tol=1e-9)] for d in drawn]
    assert all(len(match) == 1 for match in matches)
    assert {match[0] for match in matches} == set(range(9))  # of 300, one of 9 is missed once in 2e14


def test_a_generator_travels_with_the_module() -> None:
    t, p = features((2, 32, 5))
    loss = AntiTransferLoss(CosSquared("stochastic_pairwise"), generator=torch.Generator().manual_seed(SEED))
    loss(t, p)
    others = copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))
    expected = [loss(t, p) for _ in range(5)]
    for other in others:
        assert [other(t, p) for _ in range(5)] == expected


@every_cosine
def test_cosines_of_any_size_in_float32(loss: Loss) -> None:
    for scale in (1e-30, 1.0, 1e30):
        base = features((2, 4, 6), torch.float32)
        t, p = (base[0] * scale).requires_grad_(), base[1] / scale
        exact = t.detach().double().requires_grad_()
        value, expected = computed(loss, t, p), literal(loss, exact, p.double())
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
        actual, gradient = torch.autograd.grad(value, t)[0].double(), torch.autograd.grad(expected, exact)[0]
        assert ((actual - gradient).norm() / gradient.norm()).item() < 1e-4


@every_cosine
def test_dead_features_have_cosine_and_gradient_0(loss: Loss) -> None:
    for dead in ("t", "p", "tp"):
        t, p = features((2, 3, 8))
        for name in dead:
            {"t": t, "p": p}[name][0] = 0
        drawn = run_of_channels(SEED, 2, 3) if loss.aggregation == "stochastic_pairwise" else None
        value = computed(loss, t.requires_grad_(), p.requires_grad_())
        gradients = torch.autograd.grad(value, (t, p))
        torch.testing.assert_close(value, literal(loss, t[1:], p[1:], drawn) / 4)  # half the mean, squared
        assert gradients[0][0].eq(0).all() or "t" not in dead
        assert gradients[0][1].abs().sum() > 0
        # Where one of both is dead, the other's direction does not matter either.
        assert all(gradient[0].eq(0).all() for gradient, name in zip(gradients, "tp", strict=True) if name not in dead)
