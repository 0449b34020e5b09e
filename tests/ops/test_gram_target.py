"""What surrounds the Gram cosine in training: targets that are computed once, the tap, processes that share a batch."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from literal import EVERY, every_gram_loss
from torch.autograd import gradcheck

import qkernels
from qkernels import GramTarget, anti_transfer_loss, anti_transfer_tap, gram_target
from qkernels.losses import CKA, FoldedRowwise, GramChannel, GramPosition, Loss

WITH_TARGET = [loss for loss in EVERY if loss.per_sample]
every_loss_with_target = pytest.mark.parametrize("loss", WITH_TARGET, ids=repr)
# Packed by channel; by position; by neither. All centred cosines differ from 1: no matrix has two rows.
SHAPES = [(3, 4, 3, 5), (3, 9, 2, 2), (3, 5, 2, 2)]


def features(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> Any:
    maps = (torch.randn(shape, dtype=torch.float64).relu() + 0.1 * torch.rand(shape).double() for _ in range(2))
    return [x.to(dtype).requires_grad_(requires_grad) for x in maps]


def relative(actual: Any, exact: Any) -> Any:
    return ((actual.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    ("shape", "loss", "dtype", "triangles"),
    [
        ((2, 7, 4), GramChannel(), torch.float32, False),  # 28 numbers against 28: as much
        ((2, 7, 5), GramChannel(), torch.float32, True),
        ((2, 4, 7), GramPosition(), torch.float32, False),
        ((2, 5, 7), GramPosition(), torch.float32, True),
        ((2, 7, 5), GramChannel(), torch.float64, True),
        ((2, 7, 8), GramChannel(), torch.bfloat16, False),  # 28 numbers of 4 bytes against 56 of 2
        ((2, 7, 9), GramChannel(), torch.bfloat16, True),
        ((2, 5), GramChannel(), torch.float32, False),
        ((2, 5), GramPosition(), torch.float32, True),
    ],
)
def test_a_target_is_what_takes_less_memory(
    shape: tuple[int, ...], loss: Loss, dtype: torch.dtype, triangles: bool
) -> None:
    frozen = features(shape, dtype, requires_grad=True)[0]
    target = gram_target(frozen, loss=loss)
    assert (target.triangles, target.loss) == (triangles, loss)
    assert target.stats.shape == (2, 2)
    assert not target.values.requires_grad
    if triangles:
        rows = shape[1] if loss == GramChannel() else frozen[0, 0].numel()
        assert target.values.shape == (2, rows * (rows + 1) // 2)
        assert target.values.dtype == torch.promote_types(dtype, torch.float32)
        assert target.values.nbytes < frozen.nbytes
    else:
        assert target.values.dtype == dtype
        assert torch.equal(target.values, frozen)


@every_loss_with_target
def test_triangles_are_of_scaled_gram_matrices(loss: Loss) -> None:
    for size in (1e-10, 1, 1e10):
        of_channels = loss.name == "gram-channel"
        frozen = features((19, 4, 20) if of_channels else (19, 20, 4))[0] * size
        target = gram_target(frozen, loss=loss)
        square, scale = target.stats
        f = frozen.double() if of_channels else frozen.double().mT
        f = f - f.mean(1, keepdim=True) if loss.centred else f
        gram = scale.view(-1, 1, 1).double() ** 2 * f @ f.mT
        i, j = zip(*((i, j) for i in range(4) for j in range(i, 4)), strict=True)
        torch.testing.assert_close(target.values, gram[:, i, j].float())
        torch.testing.assert_close(square, gram.square().sum((1, 2)).float())
        assert torch.frexp(scale).mantissa.eq(0.5).all()  # a power of two


@every_loss_with_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_loss_and_gradient_of_a_target_are_those_of_its_features(loss: Loss, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        trained, frozen = features(shape, dtype, requires_grad=True)
        target = gram_target(frozen, loss=loss)
        expected = anti_transfer_loss(trained, frozen.detach(), loss=loss, beta=1.3)
        gradient = torch.autograd.grad(expected, trained)[0]
        exact = trained.detach().double().requires_grad_()
        truth = torch.autograd.grad(anti_transfer_loss(exact, frozen.detach().double(), loss=loss, beta=1.3), exact)[0]
        for backend in ("auto", "reference"):
            with qkernels.set_backend(backend):
                value = anti_transfer_loss(trained, target, loss=loss, beta=1.3)
                actual = torch.autograd.grad(value, trained)[0]
            assert (value.dtype, actual.dtype) == (expected.dtype, dtype)
            if not target.triangles:
                assert torch.equal(value, expected)
                assert torch.equal(actual, gradient)
                continue
            eps = torch.finfo(expected.dtype).eps
            assert (value - expected).abs().item() < 8 * eps  # below 1e-6 in float32
            assert relative(actual, truth) < max(2 * relative(gradient, truth), 32 * eps)


@every_loss_with_target
def test_targets_of_some_samples(loss: Loss) -> None:
    for shape in SHAPES:
        trained, frozen = features((19, *shape[1:]))  # more than are summed at a time
        target, index = gram_target(frozen, loss=loss), torch.tensor([18, 3, 3, 0])
        some = target.of(index)
        assert isinstance(some, GramTarget)
        assert torch.equal(some.values, target.values[index])
        assert torch.equal(some.stats, target.stats[:, index])
        assert (some.triangles, some.loss) == (target.triangles, loss)
        values = [anti_transfer_loss(trained[index], t, loss=loss, reduction="none") for t in (frozen[index], some)]
        torch.testing.assert_close(values[1], values[0], rtol=1e-6, atol=1e-7)
        assert values[0].unique().numel() == 3


@every_loss_with_target
def test_reductions_with_a_target(loss: Loss) -> None:
    for shape in SHAPES:
        trained, frozen = features(shape)
        target, options = gram_target(frozen, loss=loss), {"loss": loss, "beta": 0.3}
        each = anti_transfer_loss(trained, target, reduction="none", **options)
        assert each.shape == (3,)
        for reduction in ("mean", "sum"):
            value = anti_transfer_loss(trained, target, reduction=reduction, **options)
            torch.testing.assert_close(value, getattr(each, reduction)())


@every_loss_with_target
def test_targets_of_any_size(loss: Loss) -> None:
    options = {"loss": loss, "reduction": "none"}
    for scale, shape in itertools.product((1e-30, 1e-10, 1e10, 1e30), ((2, 3, 8), (2, 8, 3))):
        trained, frozen = features(shape)
        expected = anti_transfer_loss(trained.double(), (frozen * scale).double(), **options)
        value = anti_transfer_loss(trained / scale, gram_target(frozen * scale, loss=loss), **options)
        torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=0)


@every_loss_with_target
def test_dead_and_broken_targets(loss: Loss) -> None:
    for shape in ((3, 3, 8), (3, 8, 3)):
        trained, frozen = features(shape, requires_grad=True)
        with torch.no_grad():
            frozen[0], frozen[1, 1, 1] = 0, float("nan")
        each = anti_transfer_loss(trained, gram_target(frozen, loss=loss), loss=loss, reduction="none")
        assert each[0] == 0
        assert each[1].isnan()
        assert each[2] > 0
        assert torch.autograd.grad(each[0], trained)[0][0].eq(0).all()


def test_types_of_features_and_target_may_differ() -> None:
    trained, frozen = features((3, 4, 20), torch.float64)
    for shape in (slice(None), slice(0, 2)):  # triangles, and features
        a, b = trained[..., shape].contiguous().requires_grad_(), frozen[..., shape].float()
        loss = anti_transfer_loss(a, gram_target(b))
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, anti_transfer_loss(a, b), rtol=1e-6, atol=0)
        assert torch.autograd.grad(loss, a)[0].dtype == torch.float64
        low = anti_transfer_loss(a.bfloat16(), gram_target(b))
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, anti_transfer_loss(a.bfloat16(), b), rtol=1e-6, atol=0)


def test_target_of_an_empty_batch() -> None:
    trained = torch.zeros(0, 3, 8, requires_grad=True)
    for loss in WITH_TARGET:
        value = anti_transfer_loss(trained, gram_target(trained, loss=loss), loss=loss, reduction="sum")
        assert value == 0
        value.backward()


F = torch.rand(3, 4, 20)
TRIANGLES, KEPT = gram_target(F), gram_target(F[..., :2])


@pytest.mark.parametrize(
    ("trained", "frozen", "options", "message"),
    [
        (
            F,
            TRIANGLES,
            {"loss": GramPosition()},
            r"frozen must be features or a target of GramPosition\(.*\); got one of GramChannel\(centred=False\)",
        ),
        (F, TRIANGLES, {"loss": GramChannel(centred=True)}, r"a target of GramChannel\(centred=True\); got one of"),
        (F, TRIANGLES, {"loss": CKA()}, r"a target of CKA\(\); got one of"),
        (F, TRIANGLES, {"loss": FoldedRowwise()}, "a target of FoldedRowwise"),
        (F[:2], TRIANGLES, {}, r"frozen.values must have shape \(2, 10\) for .* of shape \(2, 4, 20\); got \(3, 10\)"),
        (F[:, :3], TRIANGLES, {}, r"frozen.values must have shape \(3, 6\)"),
        (F, KEPT, {}, r"frozen.values must have shape \(3, 4, 20\)"),
        (F.to("meta"), TRIANGLES, {}, "frozen must be on the device of .*; got cpu and meta"),
        (F.long(), TRIANGLES, {}, "must be of a floating-point type"),
    ],
)
def test_bad_targets(trained: torch.Tensor, frozen: torch.Tensor, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        anti_transfer_loss(trained, frozen, **options)
    with pytest.raises(ValueError, match=message):
        anti_transfer_tap(trained, frozen, **options)


def test_bad_features_of_a_target() -> None:
    for loss in EVERY:
        if not loss.per_sample:
            with pytest.raises(
                ValueError, match=f"loss must be 'gram-channel' or 'gram-position' .*; got '{loss.name}'"
            ):
                gram_target(F, loss=loss)
    with pytest.raises(ValueError, match=r"frozen must have dimensions \[B, C, \*spatial\]"):
        gram_target(F[0, 0])
    with pytest.raises(ValueError, match="frozen must be of a floating-point type"):
        gram_target(F.long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@every_loss_with_target
def test_opcheck_with_a_target(dtype: torch.dtype, loss: Loss) -> None:
    for shape in (SHAPES[0], SHAPES[2]):
        trained, frozen = features(shape, dtype, requires_grad=True)
        target = gram_target(frozen.float(), loss=loss)
        operands = (trained, target.values, target.stats, target.triangles, *loss.gram, 0.5, True, False, "torch")
        torch.library.opcheck(torch.ops.qkernels.gram_cosine, operands)


def frozen_of(kind: Any, frozen: torch.Tensor, loss: str = "gram-channel") -> Any:
    return gram_target(frozen, loss=loss) if kind == "target" else frozen


@every_loss_with_target
def test_tap_with_a_target_adds_the_gradient_of_the_loss_to_the_incoming_one(loss: Loss) -> None:
    for shape, reduction in itertools.product(SHAPES, ("mean", "sum")):
        trained, frozen = features(shape, torch.float64, requires_grad=True)
        target, options = gram_target(frozen, loss=loss), {"loss": loss, "beta": 1.3, "reduction": reduction}
        expected = anti_transfer_loss(trained, target, **options)
        own = torch.autograd.grad(expected, trained)[0]
        incoming = torch.randn(shape, dtype=trained.dtype)
        same, value = anti_transfer_tap(trained, target, **options)
        assert torch.equal(value, expected)
        assert torch.equal(same, trained)
        assert same.data_ptr() == trained.data_ptr()
        actual = torch.autograd.grad((same * incoming).sum() + 0.7 * value, trained)[0]
        torch.testing.assert_close(actual, incoming + 0.7 * own)


@every_gram_loss
def test_tap_with_one_of_both_unused(loss: Loss) -> None:
    trained, frozen = features((3, 4, 5), torch.float64, requires_grad=True)
    frozen = frozen.detach()
    own = torch.autograd.grad(anti_transfer_loss(trained, frozen, loss=loss), trained)[0]
    same, value = anti_transfer_tap(trained, frozen, loss=loss)
    incoming = torch.randn_like(trained)
    assert torch.equal(torch.autograd.grad(same, trained, incoming, retain_graph=True)[0], incoming)
    torch.testing.assert_close(torch.autograd.grad(value, trained, retain_graph=True)[0], own)
    # Several backward passes add up, each with its own factor.
    for factor in (1, 2, 0.5):
        (factor * (same * incoming).sum() + 3 * factor * value).backward(retain_graph=True)
    torch.testing.assert_close(trained.grad, 3.5 * (incoming + 3 * own))


@every_gram_loss
@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_tap_takes_gradients_of_any_strides(loss: Loss, layout: str) -> None:
    trained, frozen = features((3, 4, 5), torch.float64, requires_grad=True)
    frozen = frozen.detach()
    own = torch.autograd.grad(anti_transfer_loss(trained, frozen, loss=loss), trained)[0]
    same, value = anti_transfer_tap(trained, frozen, loss=loss)
    if layout == "expanded":
        incoming = torch.tensor(0.3, dtype=trained.dtype).expand(3, 4, 5)
    else:
        incoming = torch.randn(5, 4, 3, dtype=trained.dtype).transpose(0, 2)
    before = incoming.clone()
    actual = torch.autograd.grad((same, value), trained, (incoming, torch.ones_like(value)))[0]
    torch.testing.assert_close(actual, incoming + own)
    assert torch.equal(incoming, before)


@every_gram_loss
def test_tap_gives_frozen_features_alone_their_gradient(loss: Loss) -> None:
    trained, frozen = features((3, 4, 5), torch.float64, requires_grad=True)
    expected = torch.autograd.grad(anti_transfer_loss(trained, frozen, loss=loss), frozen)[0]
    # The trained network's tap is a constant.
    _, value = anti_transfer_tap(trained.detach(), frozen, loss=loss)
    torch.testing.assert_close(torch.autograd.grad(value, frozen)[0], expected)


@every_loss_with_target
def test_tap_gradcheck(loss: Loss) -> None:
    trained, frozen = (torch.randn(2, 3, 5, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert gradcheck(lambda a, b: anti_transfer_tap(a, b, loss=loss, beta=1.7), (trained, frozen))
    target = gram_target(frozen.detach(), loss=loss)
    assert gradcheck(lambda a: anti_transfer_tap(a, target, loss=loss, beta=1.7), trained)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["features", "target"])
def test_tap_of_half_types_rounds_the_sum_once(dtype: torch.dtype, kind: str) -> None:
    trained, frozen = features((3, 4, 50), dtype, requires_grad=True)
    frozen = frozen_of(kind, frozen.detach())
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
def test_tap_under_autocast(kind: str) -> None:
    trained, frozen = features((3, 4, 50), requires_grad=True)
    frozen = frozen_of(kind, frozen.detach())
    incoming, results = torch.randn(trained.shape), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            same, loss = anti_transfer_tap(trained, frozen)
            gradient = torch.autograd.grad((same, loss), trained, (incoming, torch.ones_like(loss)))[0]
        results.append((same, loss, gradient))
    for value, expected in zip(*results, strict=True):
        assert torch.equal(value, expected)
        assert value.dtype == torch.float32


@pytest.mark.parametrize("kind", ["features", "triangles", "kept"])
def test_tap_compiles_to_one_graph(kind: str) -> None:
    torch._dynamo.reset()
    trained, frozen = features((2, 5, 7, 9) if kind != "kept" else (2, 130, 7, 9), requires_grad=True)
    frozen = frozen.detach() if kind == "features" else gram_target(frozen)
    assert kind == "features" or frozen.triangles == (kind == "triangles")

    def step(x: torch.Tensor, frozen: torch.Tensor) -> Any:
        same, loss = anti_transfer_tap(x.relu(), frozen, beta=0.5)
        return (same * same).sum() + loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    value, expected = compiled(trained, frozen), step(trained, frozen)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, trained), torch.autograd.grad(expected, trained))


NET = """
import sys
from pathlib import Path
import torch
from torch import nn
from qkernels import anti_transfer_tap, gram_target
from qkernels.losses import GramChannel, GramPosition


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 6, 3), nn.Linear(6, 1)

    def forward(self, x, frozen, loss):
        y, value = anti_transfer_tap(self.first(x).relu(), frozen, loss=loss, beta=0.7)
        return self.last(y.mean((2, 3))).square().mean() + value


def problem():
    torch.manual_seed(0)
    net, x, frozen = Net().double(), torch.randn(4, 2, 8, 8).double(), torch.rand(4, 6, 6, 6).double()
    losses = [kind(centred) for kind in (GramChannel, GramPosition) for centred in (False, True)]
    return net, x, [(twin, loss) for loss in losses for twin in (frozen, gram_target(frozen, loss=loss))]


def part(frozen, index):
    return frozen[index] if isinstance(frozen, torch.Tensor) else frozen.of(index)
"""
DDP = """
import torch.distributed as dist

dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=int(sys.argv[2]), world_size=2)
net, x, problems = problem()
wrapped, index = nn.parallel.DistributedDataParallel(net), torch.arange(4)[dist.get_rank() :: 2]
gradients = []
for frozen, loss in problems:
    net.zero_grad()
    wrapped(x[index], part(frozen, index), loss).backward()
    gradients.append([p.grad.clone() for p in net.parameters()])
if dist.get_rank() == 0:
    torch.save(gradients, sys.argv[1])
dist.destroy_process_group()
"""


def test_two_processes_compute_the_gradient_of_one(tmp_path: Path) -> None:
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
    for (frozen, loss), actual in zip(problems, torch.load(tmp_path / "gradients"), strict=True):
        net.zero_grad()
        net(x, frozen, loss).backward()
        for gradient, parameter in zip(actual, net.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)


def test_samples_of_a_target_are_selected_in_one_graph() -> None:
    torch._dynamo.reset()
    trained, target = torch.rand(3, 4, 8), gram_target(torch.rand(5, 4, 8))
    index = torch.tensor([4, 0, 4])
    compiled = torch.compile(lambda x, i: anti_transfer_loss(x, target.of(i)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(trained, index), anti_transfer_loss(trained, target.of(index)))


@pytest.mark.parametrize("index", [torch.tensor([0, 5]), torch.tensor([-1]), torch.tensor([2**40])], ids=str)
def test_samples_that_a_target_does_not_have_are_refused(index: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"index must hold numbers of the 5 samples, from 0; got \["):
        gram_target(torch.rand(5, 4, 8)).of(index)
