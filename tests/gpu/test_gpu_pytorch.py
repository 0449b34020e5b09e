"""The operators inside PyTorch: streams, graphs, compilation, autocast, all kinds of gradients, DDP; extreme inputs."""

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.distributed
import torch.nn.functional as F
from problems import ALGORITHMS, PRECISIONS, nhwc
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import qkernels
from qkernels import hamilton_conv2d
from qkernels.nn import QuaternionConv2d, QuaternionConvTranspose2d, QuaternionLinear
from qkernels.ops.hamilton_conv import launch
from qkernels.runtime.precision import switched
from qkernels.runtime.tolerances import tolerance


class Net(nn.Module):
    """All three layers, with a fused ReLU and a fused pool; 8x8 maps of 64 channels to 8 logits."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.conv = QuaternionConv2d(64, 128, 3, padding=1, activation="relu", device=device, dtype=dtype)
        self.pooled = QuaternionConv2d(128, 64, 3, padding=1, device=device, dtype=dtype)
        self.up = QuaternionConvTranspose2d(
            64, 32, 3, stride=2, padding=1, output_padding=1, device=device, dtype=dtype
        )
        self.linear = QuaternionLinear(32 * 64, 8, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = hamilton_conv2d(x, self.pooled.weight, self.pooled.bias, padding=1, activation="relu", pool=2)
        y: Tensor = self.linear(self.up(x).flatten(1))
        return y


def maps(device: torch.device, batch: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    x: Tensor = nhwc(torch.randn(batch, 64, 8, 8, device=device, dtype=dtype))
    return x


def step(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients of x and all parameters."""
    x = x.detach().requires_grad_()
    y = net(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *net.parameters()])]


def assert_same_bits(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def net(device: torch.device) -> Net:
    torch.manual_seed(0)
    return Net(device)


def test_kernels_compute_it(net: Net, device: torch.device) -> None:
    for function, layer, x in (
        ("hamilton_conv2d", net.conv, maps(device)),
        ("hamilton_conv_transpose2d", net.up, maps(device)),
        ("hamilton_linear", net.linear, torch.randn(4, 2048, device=device)),
    ):
        assert qkernels.backend_of(function, x, layer.weight) == "triton"


def test_the_current_stream_is_used(net: Net, device: torch.device) -> None:
    x, late = maps(device), torch.zeros(4, 64, 8, 8, device=device)
    expected = step(net, x)
    late = nhwc(late)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # 50 ms: on another stream the kernels would read the zeros
        late.copy_(x)
        actual = step(net, late)
    stream.synchronize()
    assert_same_bits(actual, expected)


def test_a_captured_step_is_the_eager_one(net: Net, device: torch.device) -> None:
    static = maps(device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        step(net, static)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(net, static)
    for _ in range(2):
        x = maps(device)
        static.copy_(x)
        graph.replay()
        assert_same_bits(captured, step(net, x))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(dynamic: bool, net: Net, device: torch.device) -> None:
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=dynamic)
    for batch in (4, 6, 10) if dynamic else (4,):
        x = maps(device, batch)
        for actual, expected in zip(step(compiled, x), step(net, x), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, net: Net, device: torch.device) -> None:
    x = maps(device)
    with torch.autocast("cuda", dtype):
        actual = step(net, x)
    half = Net(device, dtype)
    half.load_state_dict(net.state_dict())
    expected = step(half, x.to(dtype))
    assert actual[0].dtype == dtype
    assert all(gradient.dtype == torch.float32 for gradient in actual[1:])
    assert_same_bits(actual, [expected[0], *(gradient.float() for gradient in expected[1:])])


def conv_operands(device: torch.device, dtype: torch.dtype = torch.float32, batch: int = 4) -> list[Tensor]:
    shapes = (batch, 64, 8, 8), (4, 16, 16, 3, 3), (64,)
    return [nhwc(torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]


@pytest.mark.parametrize(
    "epilogue", [{}, {"activation": "relu"}, {"activation": "relu", "pool": 2}], ids=["", "relu", "pool"]
)
def test_expanded_and_strided_gradients(epilogue: dict[str, Any], device: torch.device) -> None:
    inputs = [tensor.requires_grad_() for tensor in conv_operands(device)]
    y = hamilton_conv2d(*inputs, padding=1, **epilogue)
    scattered = torch.randn(*y.shape, 2, device=device)
    for dy in (
        torch.ones((), device=device).expand_as(y),  # of y.sum()
        scattered[..., 0],
        torch.randn(y.shape[0], 1, 1, y.shape[3], device=device).expand_as(y),
        torch.randn(y.shape[::-1], device=device).permute(3, 2, 1, 0),
    ):
        actual = torch.autograd.grad(y, inputs, dy, retain_graph=True)
        expected = torch.autograd.grad(y, inputs, nhwc(dy.clone()), retain_graph=True)
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("wanted", [w for w in itertools.product([False, True], repeat=3) if any(w)])
@pytest.mark.parametrize(
    "epilogue", [{}, {"activation": "relu"}, {"activation": "relu", "pool": 2}], ids=["", "relu", "pool"]
)
def test_freezing_changes_nothing_else(
    wanted: tuple[bool, ...], epilogue: dict[str, Any], device: torch.device
) -> None:
    torch.manual_seed(0)
    operands = conv_operands(device)

    def run(wanted: tuple[bool, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        inputs = [tensor.detach().requires_grad_(need) for tensor, need in zip(operands, wanted, strict=True)]
        y = hamilton_conv2d(*inputs, padding=1, **epilogue)
        gradients = torch.autograd.grad(y, [tensor for tensor in inputs if tensor.requires_grad], y.detach().cos())
        return y, gradients

    y, gradients = run(wanted)
    full_y, full_gradients = run((True, True, True))
    assert torch.equal(y, full_y)
    expected = [gradient for gradient, need in zip(full_gradients, wanted, strict=True) if need]
    for actual, exact in zip(gradients, expected, strict=True):
        if exact.dim() == 1:  # without the weight's gradient, PyTorch sums the bias's
            torch.testing.assert_close(actual, exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())
        else:
            assert torch.equal(actual, exact)


def test_empty_batch(net: Net, device: torch.device) -> None:
    y, dx, *gradients = step(net, maps(device, batch=0))
    assert y.shape == (0, 8)
    assert dx.shape == (0, 64, 8, 8)
    assert all((gradient == 0).all() for gradient in gradients)


def test_activation_checkpointing(net: Net, device: torch.device) -> None:
    x = maps(device)

    def checkpointed(x: Tensor) -> Tensor:
        y: Tensor = net.linear(net.up(checkpoint(front, x, use_reentrant=False)).flatten(1))
        return y

    def front(x: Tensor) -> Tensor:
        return hamilton_conv2d(net.conv(x), net.pooled.weight, net.pooled.bias, padding=1, activation="relu", pool=2)

    expected = step(net, x)
    x = x.detach().requires_grad_()
    y = checkpointed(x)
    actual = [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])]
    assert_same_bits(actual, expected)


@pytest.mark.parametrize(
    ("precision", "algorithm"),
    [(name, algorithm) for name, algorithms in ALGORITHMS.items() for algorithm in algorithms],
)
def test_nan_reaches_the_outputs_that_read_it(precision: str, algorithm: str, device: torch.device) -> None:
    x, weight, bias = conv_operands(device, PRECISIONS[precision])
    x[1, 5, 4, 4] = float("nan")
    with qkernels.set_form(algorithm.partition("-")[0]), switched(precision):
        y, pooled = hamilton_conv2d(x, weight, bias, padding=1, activation="relu", pool=2, return_map=True)
    expected = F.max_pool2d(x[:, 5:6].isnan().float(), 3, stride=1, padding=1)
    assert torch.equal(y.isnan(), expected.bool().expand_as(y))
    assert torch.equal(pooled.isnan(), F.max_pool2d(expected, 2).bool().expand_as(pooled))


def test_ddp(net: Net, device: torch.device) -> None:
    x = maps(device)
    expected = step(net, x)[2:]
    backend = "nccl" if torch.distributed.is_nccl_available() else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(net, device_ids=[device.index])
        wrapped(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert_same_bits([parameter.grad for parameter in net.parameters()], expected)


def test_another_device(net: Net, device: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    x = maps(device)
    expected = step(net, x)
    other = torch.device("cuda", 1 - device.index)
    assert torch.cuda.current_device() == device.index
    actual = step(net.to(other), x.to(other))
    assert all(tensor.device == other for tensor in actual)
    assert_same_bits([tensor.to(device) for tensor in actual], expected)


@pytest.mark.parametrize(("q", "p"), [(16, 1), (1, 16)])
def test_more_than_2_to_the_31_elements(q: int, p: int, device: torch.device) -> None:
    """The last images, which lie beyond 2**31 elements of x or of y, come out as they do alone."""
    size, tail, batch = 32, 4, 2**31 // (64 * 32 * 32) + 32
    needed = 2 * 2 * batch * 64 * size**2 + 2**32
    free = torch.cuda.mem_get_info(device)[0]
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")

    def large(channels: int) -> Tensor:
        shape = (batch, size, size, channels)
        return torch.randn(shape, device=device, dtype=torch.bfloat16).permute(0, 3, 1, 2)

    x, dy = large(4 * q), large(4 * p)
    window, algorithm = (1, 1, 1, 1, 1, 1, 1), "signed-half"
    assert max(x.numel(), dy.numel()) > 2**31
    weight = torch.randn(4, p, q, 3, 3, device=device, dtype=torch.bfloat16)

    def gradients(x: Tensor, dy: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        dx = launch.data_gradient(dy, weight, x.shape[2:], window, algorithm)
        return dx, launch.weight_gradient(dy, x, (3, 3), window, True, algorithm, dtype=torch.float32)

    def close(actual: Tensor, expected: Tensor, allowed: float) -> None:
        assert (actual.double() - expected.double()).norm() <= allowed * expected.double().norm()

    # What is compared was rounded twice, once here and once there.
    allowed = 2 * tolerance("y", "bf16")
    y = launch.forward(x, weight, window, algorithm)
    close(y[-tail:], launch.forward(x[-tail:], weight, window, algorithm), allowed)
    del y
    dx, sums = gradients(x, dy)
    close(dx[-tail:], gradients(x[-tail:], dy[-tail:])[0], allowed)
    del dx
    parts = [gradients(*pair)[1] for pair in zip(x.split(batch // 4), dy.split(batch // 4), strict=True)]
    for actual, part in zip(sums, zip(*parts, strict=True), strict=True):
        close(
            actual, sum(part), 1e-4
        )  # sums of 33 million pixels; one image read wrongly in 1,000 would change them by 4e-2
    torch.cuda.empty_cache()
