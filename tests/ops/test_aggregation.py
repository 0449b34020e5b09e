"""The research code's other aggregations and distances: against literal versions, at the extremes, reproducibly."""

import copy
import math
import pickle

import pytest
import torch
from torch.autograd import gradcheck

import qkernels
from qkernels.nn import AntiTransferLoss
from qkernels.ops.aggregation import AGGREGATIONS, DISTANCES

# N > B C and N < B C, one sample, more samples than channels, one position, no position.
SHAPES = [(2, 3, 4, 5), (2, 5, 2, 2), (1, 4, 3, 2), (5, 2, 3), (3, 4, 1), (3, 4)]
CASES = [(a, d) for a in AGGREGATIONS for d in DISTANCES if (a, d) != ("gram", "cos_squared")]
all_cases = pytest.mark.parametrize(("aggregation", "distance"), CASES)
all_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def features(shape, dtype=torch.float64, requires_grad=False, aggregation="none"):
    # The sigmoid of a mean square of Grams of numbers near 1 is 1, without gradient.
    size = 0.1 if aggregation == "gram" else 1
    return [(size * torch.rand(shape, dtype=dtype).add(0.01)).requires_grad_(requires_grad) for _ in range(2)]


def literal_maps(t, p, aggregation, channels=None):
    """Both maps as rows along the last axis, laid out as the research code lays them out."""
    t, p = (x.reshape(x.shape[0], x.shape[1], -1) for x in (t, p))
    if channels is not None:
        t, p = t[:, channels], p[:, channels]
    samples, count, _ = t.shape
    if aggregation == "gram":
        folded = [x.reshape(samples * count, -1) for x in (t, p)]
        return [torch.stack([torch.stack([u @ v for v in f]) for u in f]) / f.numel() / 0.001 for f in folded]
    if aggregation in ("pairwise", "stochastic_pairwise"):
        pairs = [(i, j) for i in range(count) for j in range(count)]
        return torch.cat([t[:, i] for i, _ in pairs], -1), torch.cat([p[:, j] for _, j in pairs], -1)
    if aggregation == "none":
        return t, p
    maps = []
    for x in (t, p):
        total = x[:, 0] if aggregation != "mul_comp" else (x[:, 0] + 1e-10) ** 0.001
        for c in range(1, count):
            if aggregation == "mul_comp":
                total = total * (x[:, c] + 1e-10) ** 0.001
            else:
                total = torch.maximum(total, x[:, c]) if aggregation == "max" else total + x[:, c]
        maps.append(total / count if aggregation == "mean" else total)
    return maps


def literal(t, p, aggregation, distance, channels=None):
    t, p = (x.reshape(-1, x.shape[-1]) for x in literal_maps(t, p, aggregation, channels))
    if distance == "mse_sigmoid":
        return -1 / (1 + torch.exp(-((t - p) ** 2).mean()))
    cosines = [(u @ v / (u @ u).sqrt() / (v @ v).sqrt()).abs() for u, v in zip(t, p, strict=True)]
    return (sum(cosines) / len(cosines)) ** 2


def run_of(seed, samples, channels):
    """The channels that "stochastic_pairwise" draws with this seed."""
    length = max(1, channels // samples) if samples > 1 else 1
    start = torch.randint(channels - length + 1, (1,), generator=torch.Generator().manual_seed(seed)).item()
    return slice(start, start + length)


@all_cases
@all_shapes
def test_values_and_gradients_equal_the_literal_version(aggregation, distance, shape):
    t, p = features(shape, requires_grad=True, aggregation=aggregation)
    generator, channels = None, None
    if aggregation == "stochastic_pairwise":
        generator, channels = torch.Generator().manual_seed(7), run_of(7, *shape[:2])
    loss = AntiTransferLoss(beta=1.7, aggregation=aggregation, distance=distance, generator=generator)(t, p)
    expected = 1.7 * literal(t, p, aggregation, distance, channels)
    torch.testing.assert_close(loss, expected)
    assert loss.shape == ()
    assert distance == "cos_squared" or -1.7 < loss < -0.5 * 1.7
    for actual, exact in zip(torch.autograd.grad(loss, (t, p)), torch.autograd.grad(expected, (t, p)), strict=True):
        torch.testing.assert_close(actual, exact, atol=1e-12, rtol=1e-9)


@all_cases
@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 4, 3)])
def test_gradcheck(aggregation, distance, shape):
    # Signs too, of which mul_comp has no power.
    draw = torch.rand if aggregation == "mul_comp" else torch.randn
    size = 0.1 if aggregation == "gram" else 1
    t, p = ((size * draw(shape, dtype=torch.float64).add(0.01)).requires_grad_() for _ in range(2))

    def loss(t, p):
        generator = torch.Generator().manual_seed(3) if aggregation == "stochastic_pairwise" else None
        return AntiTransferLoss(aggregation=aggregation, distance=distance, generator=generator)(t, p)

    assert gradcheck(loss, (t, p))


@pytest.mark.parametrize("aggregation", [a for a in AGGREGATIONS if a != "gram"])
def test_absolute_cosines_of_any_sign(aggregation):
    t, p = features((3, 4, 5))
    loss = AntiTransferLoss(aggregation=aggregation)
    if aggregation == "mul_comp":
        assert loss(-t, p).isnan()  # a power of a negative number
        return
    t[0], p[1] = -t[0], -p[1]
    torch.manual_seed(1)
    torch.testing.assert_close(loss(t, p), literal(t, p, aggregation, "cos_squared", _drawn(aggregation, t)))


def _drawn(aggregation, t):
    return run_of(1, *t.shape[:2]) if aggregation == "stochastic_pairwise" else None


@pytest.mark.parametrize(
    ("aggregation", "distance", "shape"),
    [
        ("pairwise", "cos_squared", (2, 128, 32, 32)),  # laid out 128 times the features
        ("pairwise", "mse_sigmoid", (2, 128, 32, 32)),
        ("gram", "mse_sigmoid", (8, 128, 2, 2)),  # B C is 256 N
        ("gram", "mse_sigmoid", (1, 2, 32, 32)),  # N is 512 B C
    ],
)
def test_memory_is_that_of_the_features(aggregation, distance, shape):
    t, p = features(shape, torch.float32, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        AntiTransferLoss(aggregation=aggregation, distance=distance)(t, p).backward()
    assert 0 < max(event.self_cpu_memory_usage for event in profile.events()) <= 4 * t.nbytes


@pytest.mark.parametrize(
    ("aggregation", "shape", "size", "noise"),
    [
        ("pairwise", (1, 2, 64), 1000, 1),
        ("pairwise", (2, 64, 4), 1000, 1),
        ("gram", (1, 2, 64), 30, 3e-4),
        ("gram", (2, 64, 4), 30, 3e-3),
    ],
)
def test_nearly_equal_maps_do_not_cancel(aggregation, shape, size, noise):
    """In float32, where a difference of squares would be wrong by 6e-8 size^2, for "gram" by 6e-8 size^4."""
    base = torch.rand(shape)[:, :1].expand(shape) + size
    t, p = base.clone().requires_grad_(), base + noise * torch.randn(shape)
    exact = t.detach().double().requires_grad_()
    loss = AntiTransferLoss(aggregation=aggregation, distance="mse_sigmoid")(t, p)
    expected = literal(exact, p.double(), aggregation, "mse_sigmoid")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
    actual, gradient = torch.autograd.grad(loss, t)[0], torch.autograd.grad(expected, exact)[0]
    # The mean of 64 pairs' noise is 1/8, of values of 1000 that are rounded by 6e-5.
    assert ((actual.double() - gradient).norm() / gradient.norm()).item() < 1e-2


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_seed_reproduces_the_channels(distance):
    t, p = features((4, 32, 3, 3))

    def losses(generator=None):
        loss = AntiTransferLoss(aggregation="stochastic_pairwise", distance=distance, generator=generator)
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


def test_every_run_of_channels_is_drawn():
    t, p = features((3, 12, 5))
    loss = AntiTransferLoss(aggregation="stochastic_pairwise")
    possible = [literal(t, p, "pairwise", "cos_squared", slice(i, i + 4)).item() for i in range(9)]
    drawn = [loss(t, p).item() for _ in range(300)]
    matches = [[i for i, value in enumerate(possible) if math.isclose(value, d, rel_tol=1e-9)] for d in drawn]
    assert all(len(match) == 1 for match in matches)
    assert {match[0] for match in matches} == set(range(9))  # of 300, one of 9 is missed once in 2e14


def test_a_generator_travels_with_the_module():
    t, p = features((2, 32, 5))
    loss = AntiTransferLoss(aggregation="stochastic_pairwise", generator=torch.Generator().manual_seed(2))
    loss(t, p)
    others = copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))
    expected = [loss(t, p) for _ in range(5)]
    for other in others:
        assert [other(t, p) for _ in range(5)] == expected


@pytest.mark.parametrize("aggregation", [a for a in AGGREGATIONS if a not in ("gram", "mul_comp")])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_cosines_of_any_size_in_float32(aggregation, scale):
    base = features((2, 4, 6), torch.float32)
    t, p = (base[0] * scale).requires_grad_(), base[1] / scale
    torch.manual_seed(1)
    loss = AntiTransferLoss(aggregation=aggregation)(t, p)
    exact = t.detach().double().requires_grad_()
    expected = literal(exact, p.double(), aggregation, "cos_squared", _drawn(aggregation, t))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    actual, gradient = torch.autograd.grad(loss, t)[0].double(), torch.autograd.grad(expected, exact)[0]
    assert ((actual - gradient).norm() / gradient.norm()).item() < 1e-4


@all_cases
@pytest.mark.parametrize("dead", [("t",), ("p",), ("t", "p")])
def test_dead_features(aggregation, distance, dead):
    """Their cosine is 0, with gradient 0; the other sample and the other distances stay finite."""
    t, p = features((2, 3, 8), torch.float32)
    for name in dead:
        {"t": t, "p": p}[name][0] = 0
    t.requires_grad_()
    p.requires_grad_()
    torch.manual_seed(1)
    loss = AntiTransferLoss(aggregation=aggregation, distance=distance)(t, p)
    gradients = torch.autograd.grad(loss, (t, p))
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)
    if distance == "cos_squared" and aggregation != "mul_comp":
        torch.manual_seed(1)
        channels = _drawn(aggregation, t)
        alone = literal(t[1:], p[1:], aggregation, distance, channels)
        torch.testing.assert_close(loss, alone / 4)  # half the mean, squared
        assert gradients[0][0].eq(0).all() or "t" not in dead
        assert gradients[0][1].abs().sum() > 0
        # Where one of both is dead, the other's direction does not matter either.
        assert all(gradient[0].eq(0).all() for gradient, name in zip(gradients, "tp", strict=True) if name not in dead)


@all_cases
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1])
def test_nan_is_not_silenced(aggregation, distance, bad, where):
    maps = features((1, 1, 8))
    maps[where][0, 0, 1] = bad
    maps[1 - where].mul_(0 if aggregation != "mul_comp" else 1)
    loss = AntiTransferLoss(aggregation=aggregation, distance=distance)(*maps)
    if math.isinf(bad) and distance == "mse_sigmoid" and loss == -1:
        return  # an infinite difference
    assert loss.isnan()


@all_cases
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_and_autocast_compute_in_float32(aggregation, distance, dtype):
    t, p = (x.to(dtype) for x in features((2, 8, 20), torch.float32, aggregation=aggregation))
    loss = AntiTransferLoss(aggregation=aggregation, distance=distance)
    results = []
    for cast in (False, True):
        for wide in (False, True):
            torch.manual_seed(1)
            a, b = ((x.float() if wide else x.clone()).requires_grad_() for x in (t, p))
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                value = loss(a, b)
            gradients = torch.autograd.grad(value, (a, b))
            assert gradients[0].dtype == a.dtype
            results.append((value, *(gradient.to(dtype) for gradient in gradients)))
    assert results[0][0].dtype == torch.float32
    for result in results[1:]:
        for value, expected in zip(result, results[0], strict=True):
            assert torch.equal(value, expected)


@all_cases
def test_any_strides(aggregation, distance):
    t, p = features((4, 6, 6, 8), aggregation=aggregation)
    loss = AntiTransferLoss(aggregation=aggregation, distance=distance)
    plain = t[:, ::2, :, 1::2].contiguous().requires_grad_(), p[:, ::2, :, 1::2].contiguous()
    moved = t.to(memory_format=torch.channels_last)[:, ::2, :, 1::2].requires_grad_(), p[:, ::2, :, 1::2]
    values = []
    for maps in (plain, moved):
        torch.manual_seed(1)
        value = loss(*maps)
        values.append((value, torch.autograd.grad(value, maps[0])[0]))
    for value, expected in zip(*values, strict=True):
        torch.testing.assert_close(value, expected)
    assert loss(plain[0][:1].expand(3, -1, -1, -1), plain[1][:3]).isfinite()


@all_cases
def test_compiles_to_one_graph(aggregation, distance):
    torch._dynamo.reset()
    t, p = features((2, 7, 6, 9), torch.float32, requires_grad=True, aggregation=aggregation)
    loss = AntiTransferLoss(beta=0.5, aggregation=aggregation, distance=distance)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    value = compiled(t, p)
    torch.manual_seed(1)
    expected = loss(t, p)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, t), torch.autograd.grad(expected, t))


def test_the_default_is_the_gram_cosine():
    t, p = features((2, 3, 4))
    loss = AntiTransferLoss(aggregation="gram", distance="cos_squared", beta=0.5)
    assert torch.equal(loss(t, p), qkernels.anti_transfer_loss(t, p, beta=0.5))
    target = qkernels.gram_target(p)
    assert torch.equal(loss(t, target), qkernels.anti_transfer_loss(t, target, beta=0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregation": "median"}, "aggregation must be one of 'none', 'mean', .*; got 'median'"),
        ({"distance": "cosine"}, "distance must be one of 'cos_squared', 'mse_sigmoid'; got 'cosine'"),
        ({"aggregation": "mean", "semantics": "folded-rowwise"}, "semantics 'folded-rowwise' needs aggregation 'gram'"),
        (
            {"distance": "mse_sigmoid", "semantics": "folded-rowwise"},
            "needs aggregation 'gram' with distance 'cos_squared'; got aggregation 'gram', distance 'mse_sigmoid'",
        ),
        ({"aggregation": "none", "gram": "position"}, "gram 'position' needs aggregation 'gram'"),
        ({"aggregation": "none", "centred": True}, "centred True needs aggregation 'gram'"),
        ({"aggregation": "max", "reduction": "sum"}, "reduction 'sum' needs aggregation 'gram'"),
        ({"aggregation": "max", "reduction": "none"}, "reduction 'none' needs aggregation 'gram'"),
        (
            {"aggregation": "pairwise", "generator": torch.Generator()},
            "generator needs aggregation 'stochastic_pairwise'; got aggregation 'pairwise'",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        AntiTransferLoss(**options)


def test_bad_features():
    t, p = features((2, 3, 4))
    loss = AntiTransferLoss(aggregation="mean")
    with pytest.raises(ValueError, match=r"frozen must have the shape of trained; got \(1, 3, 4\) and \(2, 3, 4\)"):
        loss(t, p[:1])
    with pytest.raises(ValueError, match="trained must be of a floating-point type"):
        loss(t.long(), p.long())
    with pytest.raises(ValueError, match="frozen must be features: a target needs aggregation 'gram'"):
        loss(t, qkernels.gram_target(p))
