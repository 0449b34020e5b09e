"""The Gram cosine and the anti-transfer loss on a GPU, against plain PyTorch in float64; memory; graphs."""

import itertools

import pytest
import torch
from torch import Tensor

import qkernels
from bench.warm import compile_all
from qkernels import anti_transfer_loss, anti_transfer_tap, gram_cosine, gram_target
from qkernels.ops.gram_cosine import launch
from qkernels.runtime.recording import record

# Channels and sides of the distinct layers of both networks (method, table 1.2).
QUATERNION = [(64, 64, 64), (128, 32, 32), (256, 16, 16), (512, 8, 8), (512, 4, 4)]
REAL = [(64, 512, 128), (128, 256, 64), (256, 128, 32), (512, 64, 16), (512, 32, 8)]
ODD = [(70, 9, 13), (300, 7, 5), (300, 20, 17), (5, 3, 2)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-4, torch.bfloat16: 2.1e-3}
# Post-ReLU Gram matrices are alike: the gradient is the difference of two terms up to so many times larger.
CANCELLATION = 10
COSINE = 1e-5
CASES = [
    *itertools.product(QUATERNION + ODD, [torch.bfloat16, torch.float32, torch.float16], ["channel"], [False], [True]),
    *itertools.product(QUATERNION + ODD, [torch.bfloat16, torch.float32], ["channel"], [False], [False]),
    *itertools.product(REAL, [torch.bfloat16], ["channel"], [False], [True]),
    *itertools.product(QUATERNION[1:], [torch.bfloat16], ["position", "batch"], [False, True], [True]),
    *itertools.product(QUATERNION, [torch.bfloat16], ["channel"], [True], [True]),
]


def maps(
    shape: tuple[int, int, int], dtype: torch.dtype, nhwc: bool, device: torch.device, batch: int = 3
) -> list[Tensor]:
    """Post-ReLU features, the second operand near the first one."""
    layout = torch.channels_last if nhwc else torch.contiguous_format
    a = torch.randn(batch, *shape, device=device).relu()
    b = (a + 0.5 * torch.randn_like(a)).relu()
    return [x.to(dtype).contiguous(memory_format=layout).requires_grad_() for x in (a, b)]


@pytest.fixture(scope="module", autouse=True)
def compiled(arch: int) -> None:
    with record(arch) as recording:
        for shape, dtype, gram, centred, nhwc in CASES:
            layout = torch.channels_last if nhwc else torch.contiguous_format
            a, b = (
                torch.empty(3, *shape, dtype=dtype, device="meta").contiguous(memory_format=layout) for _ in range(2)
            )
            algorithm = (gram, centred, 1.0, True)
            cosine, loss, *rest = launch.forward(a, b, None, False, *algorithm, True)
            launch.gradient(cosine, None, None, cosine, a, b, *rest, 0, False, *algorithm)
            if gram == "channel" and not centred and nhwc:
                launch.gradient(None, loss, a, cosine, a, b, *rest, 0, False, *algorithm)
    compile_all(recording.launches)


@pytest.mark.parametrize(("shape", "dtype", "gram", "centred", "nhwc"), CASES, ids=str)
def test_cosine_and_gradients(
    shape: tuple[int, int, int], dtype: torch.dtype, gram: str, centred: bool, nhwc: bool, device: torch.device
) -> None:
    a, b = maps(shape, dtype, nhwc, device)
    assert qkernels.backend_of(gram_cosine, a, b) == "triton"
    exact = [x.detach().double().requires_grad_() for x in (a, b)]
    expected = gram_cosine(*exact, gram=gram, centred=centred)
    cosine = gram_cosine(a, b, gram=gram, centred=centred)
    torch.testing.assert_close(cosine.double(), expected, rtol=COSINE, atol=0)
    gradients = torch.autograd.grad(1e3 * cosine.sum(), (a, b))
    for actual, correct in zip(gradients, torch.autograd.grad(1e3 * expected.sum(), exact), strict=True):
        error = (actual.double() - correct).norm() / correct.norm()
        assert error <= max(TOLERANCE[dtype], CANCELLATION * 1e-5)


@pytest.mark.parametrize("shape", QUATERNION + ODD, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_targets_and_taps(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    a, b = maps(shape, dtype, True, device)
    target = gram_target(b)
    plain = anti_transfer_loss(a, b.detach(), beta=3.0)
    (alone,) = torch.autograd.grad(plain, a, retain_graph=True)
    incoming = torch.randn_like(a) * alone.float().std()
    results = []
    for frozen in (b.detach(), target):
        same, loss = anti_transfer_tap(a, frozen, beta=3.0)
        results.append((loss, torch.autograd.grad((same, loss), a, (incoming, torch.ones_like(loss)))[0]))
    expected = alone.float() + incoming.float()
    for loss, gradient in results:
        torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
        assert (gradient.float() - expected).norm() / expected.norm() < 2 * TOLERANCE[dtype]
    if not target.triangles:
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("shape", QUATERNION, ids=str)
def test_two_runs_and_a_graph_give_the_same_bits(shape: tuple[int, int, int], device: torch.device) -> None:
    a, b = maps(shape, torch.bfloat16, True, device, 20)

    def run() -> tuple[Tensor, Tensor]:
        _, loss = anti_transfer_tap(a, b.detach())
        return loss, torch.autograd.grad(loss, a)[0]

    first = run()
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(first, run(), strict=True))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(first, captured, strict=True))


@pytest.mark.parametrize(("shapes", "limit"), [(QUATERNION, 3e6), (REAL, 11e6)], ids=["quaternion", "real"])
def test_memory_beyond_features_and_gradient(
    shapes: list[tuple[int, int, int]], limit: float, device: torch.device
) -> None:
    """Batch 20; the most that forward and backward hold beside a, b and da."""
    for shape in shapes:
        torch.cuda.empty_cache()
        a, b = maps(shape, torch.bfloat16, True, device, 20)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = anti_transfer_loss(a, b.detach())
        forward = torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        loss.backward()
        backward = torch.cuda.max_memory_allocated() - before - a.numel() * a.element_size()
        assert max(forward, backward) <= limit


@pytest.mark.parametrize("shape", [(512, 8, 8), (512, 4, 4), (70, 5, 6), (64, 16, 16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_folded_rowwise(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    """By its kernels, or above 64 positions by PyTorch's products; two runs give the same bits."""
    a, b = maps(shape, dtype, True, device)
    exact = [x.detach().double().requires_grad_() for x in (a, b)]
    correct = anti_transfer_loss(*exact, loss="folded-rowwise")
    runs = []
    for _ in range(2):
        loss = anti_transfer_loss(a, b, loss="folded-rowwise")
        runs.append((loss, *torch.autograd.grad(1e3 * loss, (a, b))))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))
    assert abs(runs[0][0].item() - correct.item()) <= COSINE * correct.item()
    for actual, gradient in zip(runs[0][1:], torch.autograd.grad(1e3 * correct, exact), strict=True):
        assert (actual.double() - gradient).norm() <= max(TOLERANCE[dtype], CANCELLATION * 1e-5) * gradient.norm()
