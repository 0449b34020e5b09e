"""What surrounds the Gram cosine in training: targets that are computed once, the tap, processes that share a batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from torch.autograd import gradcheck

import qkernels
from qkernels import GramTarget, anti_transfer_loss, anti_transfer_tap, gram_target
from qkernels.ops.gram_cosine.config import GRAMS

HOW = [{"gram": gram, "centred": centred} for gram in GRAMS for centred in (False, True)]
every_gram = pytest.mark.parametrize("how", HOW, ids=lambda how: "-".join(map(str, how.values())))
every_own_gram = pytest.mark.parametrize("how", HOW[:4], ids=lambda how: "-".join(map(str, how.values())))
# Packed by channel; by position; by neither. All centred cosines differ from 1: no matrix has two rows.
SHAPES = [(3, 4, 3, 5), (3, 9, 2, 2), (3, 5, 2, 2)]
all_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def features(shape, dtype=torch.float32, requires_grad=False):
    maps = (torch.randn(shape, dtype=torch.float64).relu() + 0.1 * torch.rand(shape).double() for _ in range(2))
    return [x.to(dtype).requires_grad_(requires_grad) for x in maps]


def relative(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    ("shape", "gram", "dtype", "packed"),
    [
        ((2, 7, 4), "channel", torch.float32, False),  # 28 numbers against 28: as much
        ((2, 7, 5), "channel", torch.float32, True),
        ((2, 4, 7), "position", torch.float32, False),
        ((2, 5, 7), "position", torch.float32, True),
        ((2, 7, 5), "channel", torch.float64, True),
        ((2, 7, 8), "channel", torch.bfloat16, False),  # 28 numbers of 4 bytes against 56 of 2
        ((2, 7, 9), "channel", torch.bfloat16, True),
        ((2, 5), "channel", torch.float32, False),
        ((2, 5), "position", torch.float32, True),
    ],
)
def test_a_target_is_what_takes_less_memory(shape, gram, dtype, packed):
    frozen = features(shape, dtype, requires_grad=True)[0]
    target = gram_target(frozen, gram=gram)
    assert (target.packed, target.gram, target.centred) == (packed, gram, False)
    assert target.stats.shape == (2, 2)
    assert not target.values.requires_grad
    if packed:
        rows = shape[1] if gram == "channel" else frozen[0, 0].numel()
        assert target.values.shape == (2, rows * (rows + 1) // 2)
        assert target.values.dtype == torch.promote_types(dtype, torch.float32)
        assert target.values.nbytes < frozen.nbytes
    else:
        assert target.values.dtype == dtype
        assert torch.equal(target.values, frozen)


@pytest.mark.parametrize("size", [1e-10, 1, 1e10])
@every_own_gram
def test_packed_values_are_scaled_gram_matrices(how, size):
    frozen = features((19, 4, 20) if how["gram"] == "channel" else (19, 20, 4))[0] * size
    target = gram_target(frozen, **how)
    square, scale = target.stats
    f = frozen.double() if how["gram"] == "channel" else frozen.double().mT
    f = f - f.mean(1, keepdim=True) if how["centred"] else f
    gram = scale.view(-1, 1, 1).double() ** 2 * f @ f.mT
    i, j = zip(*((i, j) for i in range(4) for j in range(i, 4)), strict=True)
    torch.testing.assert_close(target.values, gram[:, i, j].float())
    torch.testing.assert_close(square, gram.square().sum((1, 2)).float())
    assert torch.frexp(scale).mantissa.eq(0.5).all()  # a power of two


@all_shapes
@every_own_gram
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_loss_and_gradient_of_a_target_are_those_of_its_features(shape, how, dtype, backend):
    trained, frozen = features(shape, dtype, requires_grad=True)
    target = gram_target(frozen, **how)
    expected = anti_transfer_loss(trained, frozen.detach(), beta=1.3, **how)
    gradient = torch.autograd.grad(expected, trained)[0]
    with qkernels.set_backend(backend):
        loss = anti_transfer_loss(trained, target, beta=1.3, **how)
        actual = torch.autograd.grad(loss, trained)[0]
    assert (loss.dtype, actual.dtype) == (expected.dtype, dtype)
    if not target.packed:
        assert torch.equal(loss, expected)
        assert torch.equal(actual, gradient)
        return
    eps = torch.finfo(expected.dtype).eps
    assert (loss - expected).abs().item() < 8 * eps  # below 1e-6 in float32
    exact = trained.detach().double().requires_grad_()
    truth = torch.autograd.grad(anti_transfer_loss(exact, frozen.detach().double(), beta=1.3, **how), exact)[0]
    assert relative(actual, truth) < max(2 * relative(gradient, truth), 32 * eps)


@all_shapes
@every_own_gram
def test_targets_of_some_samples(shape, how):
    trained, frozen = features((19, *shape[1:]))  # more than are packed at a time
    target, index = gram_target(frozen, **how), torch.tensor([18, 3, 3, 0])
    some = target.of(index)
    assert isinstance(some, GramTarget)
    assert torch.equal(some.values, target.values[index])
    assert torch.equal(some.stats, target.stats[:, index])
    assert (some.packed, some.gram, some.centred) == (target.packed, target.gram, target.centred)
    losses = [anti_transfer_loss(trained[index], t, reduction="none", **how) for t in (frozen[index], some)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-7)
    assert losses[0].unique().numel() == 3


@every_own_gram
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]])
def test_reductions_with_a_target(how, shape):
    trained, frozen = features(shape)
    target = gram_target(frozen, **how)
    each = anti_transfer_loss(trained, target, beta=0.3, reduction="none", **how)
    assert each.shape == (3,)
    for reduction in ("mean", "sum"):
        loss = anti_transfer_loss(trained, target, beta=0.3, reduction=reduction, **how)
        torch.testing.assert_close(loss, getattr(each, reduction)())


@every_own_gram
@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 8, 3)])
@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_targets_of_any_size(how, shape, scale):
    trained, frozen = features(shape)
    expected = anti_transfer_loss(trained.double(), (frozen * scale).double(), reduction="none", **how)
    loss = anti_transfer_loss(trained / scale, gram_target(frozen * scale, **how), reduction="none", **how)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=0)


@every_own_gram
@pytest.mark.parametrize("shape", [(3, 3, 8), (3, 8, 3)])
def test_dead_and_broken_targets(how, shape):
    trained, frozen = features(shape, requires_grad=True)
    with torch.no_grad():
        frozen[0], frozen[1, 1, 1] = 0, float("nan")
    each = anti_transfer_loss(trained, gram_target(frozen, **how), reduction="none", **how)
    assert each[0] == 0
    assert each[1].isnan()
    assert each[2] > 0
    assert torch.autograd.grad(each[0], trained)[0][0].eq(0).all()


def test_types_of_features_and_target_may_differ():
    trained, frozen = features((3, 4, 20), torch.float64)
    for shape in (slice(None), slice(0, 2)):  # packed, and not
        a, b = trained[..., shape].contiguous().requires_grad_(), frozen[..., shape].float()
        loss = anti_transfer_loss(a, gram_target(b))
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, anti_transfer_loss(a, b), rtol=1e-6, atol=0)
        assert torch.autograd.grad(loss, a)[0].dtype == torch.float64
        low = anti_transfer_loss(a.bfloat16(), gram_target(b))
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, anti_transfer_loss(a.bfloat16(), b), rtol=1e-6, atol=0)


def test_target_of_an_empty_batch():
    trained = torch.zeros(0, 3, 8, requires_grad=True)
    for gram in ("channel", "position"):
        loss = anti_transfer_loss(trained, gram_target(trained, gram=gram), gram=gram, reduction="sum")
        assert loss == 0
        loss.backward()


F = torch.rand(3, 4, 20)
PACKED, KEPT = gram_target(F), gram_target(F[..., :2])


@pytest.mark.parametrize(
    ("trained", "frozen", "options", "message"),
    [
        (
            F,
            PACKED,
            {"gram": "position"},
            "frozen is a target of gram 'channel', centred False, .*; got gram 'position'",
        ),
        (F, PACKED, {"centred": True}, "got gram 'channel', centred True"),
        (F, PACKED, {"semantics": "folded-rowwise"}, "semantics 'folded-rowwise'"),
        (F[:2], PACKED, {}, r"frozen.values must have shape \(2, 10\) for .* of shape \(2, 4, 20\); got \(3, 10\)"),
        (F[:, :3], PACKED, {}, r"frozen.values must have shape \(3, 6\)"),
        (F, KEPT, {}, r"frozen.values must have shape \(3, 4, 20\)"),
        (F.to("meta"), PACKED, {}, "frozen must be on the device of .*; got cpu and meta"),
        (F.long(), PACKED, {}, "must be of a floating-point type"),
    ],
)
def test_bad_targets(trained, frozen, options, message):
    with pytest.raises(ValueError, match=message):
        anti_transfer_loss(trained, frozen, **options)
    if "semantics" not in options:
        with pytest.raises(ValueError, match=message):
            anti_transfer_tap(trained, frozen, **options)


def test_bad_features_of_a_target():
    with pytest.raises(ValueError, match="gram must be one of 'channel', 'position'; got 'batch'"):
        gram_target(F, gram="batch")
    with pytest.raises(ValueError, match=r"frozen must have dimensions \[B, C, \*spatial\]"):
        gram_target(F[0, 0])
    with pytest.raises(ValueError, match="frozen must be of a floating-point type"):
        gram_target(F.long())


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@every_own_gram
def test_opcheck_with_a_target(shape, dtype, how):
    trained, frozen = features(shape, dtype, requires_grad=True)
    target = gram_target(frozen.float(), **how)
    options = (target.packed, how["gram"], how["centred"], 0.5, True)
    torch.library.opcheck(
        torch.ops.qkernels.gram_cosine, (trained, target.values, target.stats, *options, False, "torch")
    )


def frozen_of(kind, frozen, how):
    return gram_target(frozen, **how) if kind == "target" else frozen


@all_shapes
@every_gram
@pytest.mark.parametrize("kind", ["features", "target"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_tap_adds_the_gradient_of_the_loss_to_the_incoming_one(shape, how, kind, reduction):
    if how["gram"] == "batch" and kind == "target":
        with pytest.raises(ValueError, match="gram must be one of"):
            gram_target(torch.ones(shape), **how)
        return
    trained, frozen = features(shape, torch.float64, requires_grad=True)
    frozen = frozen_of(kind, frozen.detach(), how)
    options = {"beta": 1.3, "reduction": reduction, **how}
    expected = anti_transfer_loss(trained, frozen, **options)
    own = torch.autograd.grad(expected, trained)[0]
    incoming = torch.randn(shape, dtype=trained.dtype)

    same, loss = anti_transfer_tap(trained, frozen, **options)
    assert torch.equal(loss, expected)
    assert torch.equal(same, trained)
    assert same.data_ptr() == trained.data_ptr()
    actual = torch.autograd.grad((same * incoming).sum() + 0.7 * loss, trained)[0]
    torch.testing.assert_close(actual, incoming + 0.7 * own)


@every_gram
def test_tap_with_one_of_both_unused(how):
    trained, frozen = features((3, 4, 5), torch.float64, requires_grad=True)
    frozen = frozen.detach()
    own = torch.autograd.grad(anti_transfer_loss(trained, frozen, **how), trained)[0]
    same, loss = anti_transfer_tap(trained, frozen, **how)
    incoming = torch.randn_like(trained)
    assert torch.equal(torch.autograd.grad(same, trained, incoming, retain_graph=True)[0], incoming)
    torch.testing.assert_close(torch.autograd.grad(loss, trained, retain_graph=True)[0], own)
    # Several backward passes add up, each with its own factor.
    for factor in (1, 2, 0.5):
        (factor * (same * incoming).sum() + 3 * factor * loss).backward(retain_graph=True)
    torch.testing.assert_close(trained.grad, 3.5 * (incoming + 3 * own))


@every_gram
@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_tap_takes_gradients_of_any_strides(how, layout):
    trained, frozen = features((3, 4, 5), torch.float64, requires_grad=True)
    frozen = frozen.detach()
    own = torch.autograd.grad(anti_transfer_loss(trained, frozen, **how), trained)[0]
    same, loss = anti_transfer_tap(trained, frozen, **how)
    if layout == "expanded":
        incoming = torch.tensor(0.3, dtype=trained.dtype).expand(3, 4, 5)
    else:
        incoming = torch.randn(5, 4, 3, dtype=trained.dtype).transpose(0, 2)
    before = incoming.clone()
    actual = torch.autograd.grad((same, loss), trained, (incoming, torch.ones_like(loss)))[0]
    torch.testing.assert_close(actual, incoming + own)
    assert torch.equal(incoming, before)


@every_gram
def test_tap_gives_frozen_features_their_gradient(how):
    trained, frozen = features((3, 4, 5), torch.float64, requires_grad=True)
    expected = torch.autograd.grad(anti_transfer_loss(trained, frozen, **how), (trained, frozen))
    same, loss = anti_transfer_tap(trained, frozen, **how)
    actual = torch.autograd.grad(same.sum() + loss, (trained, frozen))
    torch.testing.assert_close(actual[0], expected[0] + 1)
    torch.testing.assert_close(actual[1], expected[1])
    # Frozen alone: the trained network's tap is a constant.
    same, loss = anti_transfer_tap(trained.detach(), frozen, **how)
    torch.testing.assert_close(torch.autograd.grad(loss, frozen)[0], expected[1])


@pytest.mark.parametrize("kind", ["features", "target"])
@every_own_gram
def test_tap_gradcheck(how, kind):
    trained, frozen = (torch.randn(2, 3, 5, dtype=torch.float64).requires_grad_() for _ in range(2))
    if kind == "features":
        assert gradcheck(lambda a, b: anti_transfer_tap(a, b, beta=1.7, **how), (trained, frozen))
    else:
        target = gram_target(frozen.detach(), **how)
        assert gradcheck(lambda a: anti_transfer_tap(a, target, beta=1.7, **how), trained)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["features", "target"])
def test_tap_of_half_types_rounds_the_sum_once(dtype, kind):
    trained, frozen = features((3, 4, 50), dtype, requires_grad=True)
    frozen = frozen_of(kind, frozen.detach(), {})
    same, loss = anti_transfer_tap(trained, frozen)
    assert (same.dtype, loss.dtype) == (dtype, torch.float32)
    assert same.data_ptr() == trained.data_ptr()
    incoming = 1e-3 * torch.randn(trained.shape).to(dtype)
    actual = torch.autograd.grad((same, loss), trained, (incoming, torch.ones_like(loss)))[0]
    assert actual.dtype == dtype
    exact = trained.detach().double().requires_grad_()
    twin = frozen if kind == "target" else frozen.double()
    truth = incoming.double() + torch.autograd.grad(anti_transfer_loss(exact, twin), exact)[0]
    rounded = truth.to(dtype)
    assert relative(actual, truth) < 1.1 * relative(rounded, truth)


@pytest.mark.parametrize("kind", ["features", "target"])
def test_tap_under_autocast(kind):
    trained, frozen = features((3, 4, 50), requires_grad=True)
    frozen = frozen_of(kind, frozen.detach(), {})
    incoming, results = torch.randn(trained.shape), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            same, loss = anti_transfer_tap(trained, frozen)
            gradient = torch.autograd.grad((same, loss), trained, (incoming, torch.ones_like(loss)))[0]
        results.append((same, loss, gradient))
    for value, expected in zip(*results, strict=True):
        assert torch.equal(value, expected)
        assert value.dtype == torch.float32


@pytest.mark.parametrize("kind", ["features", "packed", "kept"])
def test_tap_compiles_to_one_graph(kind):
    torch._dynamo.reset()
    trained, frozen = features((2, 5, 7, 9) if kind != "kept" else (2, 130, 7, 9), requires_grad=True)
    frozen = frozen.detach() if kind == "features" else gram_target(frozen)
    assert kind == "features" or frozen.packed == (kind == "packed")

    def step(x, frozen):
        same, loss = anti_transfer_tap(x.relu(), frozen, beta=0.5)
        return (same * same).sum() + loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    value, expected = compiled(trained, frozen), step(trained, frozen)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, trained), torch.autograd.grad(expected, trained))


@every_gram
def test_tap_on_the_reference_backend(how):
    trained, frozen = features((3, 4, 5), torch.float64, requires_grad=True)
    results = []
    for backend in ("auto", "reference"):
        with qkernels.set_backend(backend):
            same, loss = anti_transfer_tap(trained, frozen, beta=0.4, **how)
            results.append((same, loss, *torch.autograd.grad(same.square().sum() + loss, (trained, frozen))))
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(
    ("frozen", "options", "message"),
    [
        (F, {"reduction": "none"}, "reduction must be one of 'mean', 'sum'; got 'none'"),
        (F, {"gram": "row"}, "gram must be one of"),
        (F[:2], {}, r"frozen must have the shape of features; got \(2, 4, 20\) and \(3, 4, 20\)"),
        (F.to("meta"), {}, "frozen must be on the device of features; got meta and cpu"),
    ],
)
def test_bad_taps(frozen, options, message):
    with pytest.raises(ValueError, match=message):
        anti_transfer_tap(F, frozen, **options)


NET = """
import sys
from pathlib import Path
import torch
from torch import nn
from qkernels import anti_transfer_tap, gram_target


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 6, 3), nn.Linear(6, 1)

    def forward(self, x, frozen, how):
        y, loss = anti_transfer_tap(self.first(x).relu(), frozen, beta=0.7, **how)
        return self.last(y.mean((2, 3))).square().mean() + loss


def problem():
    torch.manual_seed(0)
    net, x, frozen = Net().double(), torch.randn(4, 2, 8, 8).double(), torch.rand(4, 6, 6, 6).double()
    hows = [{"gram": g, "centred": c} for g in ("channel", "position") for c in (False, True)]
    return net, x, [(twin, how) for how in hows for twin in (frozen, gram_target(frozen, **how))]


def part(frozen, index):
    return frozen[index] if isinstance(frozen, torch.Tensor) else frozen.of(index)
"""
DDP = """
import torch.distributed as dist

dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=int(sys.argv[2]), world_size=2)
net, x, problems = problem()
wrapped, index = nn.parallel.DistributedDataParallel(net), torch.arange(4)[dist.get_rank() :: 2]
gradients = []
for frozen, how in problems:
    net.zero_grad()
    wrapped(x[index], part(frozen, index), how).backward()
    gradients.append([p.grad.clone() for p in net.parameters()])
if dist.get_rank() == 0:
    torch.save(gradients, sys.argv[1])
dist.destroy_process_group()
"""


def test_two_processes_compute_the_gradient_of_one(tmp_path):
    """One cosine per sample: the mean over two processes' means is the batch's."""
    (tmp_path / "ddp.py").write_text(NET + DDP)
    environment = os.environ | {"PYTHONPATH": str(Path(qkernels.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tmp_path / "ddp.py"), str(tmp_path / "gradients")]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], env=environment, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    module = {}
    exec(NET, module)
    net, x, problems = module["problem"]()
    for (frozen, how), actual in zip(problems, torch.load(tmp_path / "gradients"), strict=True):
        net.zero_grad()
        net(x, frozen, how).backward()
        for gradient, parameter in zip(actual, net.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)
