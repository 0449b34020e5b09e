"""Modules, their initialisation, and the batch norm against a naive formula."""

import math
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck

import qkernels
from qkernels import functional as F
from qkernels.init import quaternion_glorot_, quaternion_he_
from qkernels.losses import FoldedRowwise, GramPosition
from qkernels.nn import (
    AntiTransferLoss,
    QuaternionBatchNorm2d,
    QuaternionConv2d,
    QuaternionConvTranspose2d,
    QuaternionLinear,
)


def test_modules_call_their_function() -> None:
    x = torch.randn(2, 8, 7, 6)
    conv = QuaternionConv2d(8, 16, (3, 2), 2, 1, (1, 2), 2, activation="relu")
    expected = F.hamilton_conv2d(x, conv.weight, conv.bias, 2, 1, (1, 2), 2, activation="relu")
    assert torch.equal(conv(x), expected)
    conv.pool = 2
    assert torch.equal(conv(x), torch.nn.functional.max_pool2d(expected, 2))
    assert repr(conv).endswith("activation='relu', pool=2)")
    up = QuaternionConvTranspose2d(8, 16, 3, (2, 1), 1, (1, 0), 2, dilation=2)
    assert torch.equal(
        up(x), F.hamilton_conv_transpose2d(x, up.weight, up.bias, (2, 1), 1, (1, 0), groups=2, dilation=2)
    )
    linear = QuaternionLinear(8, 12, activation="relu")
    assert torch.equal(
        linear(x[..., 0, 0]), F.hamilton_linear(x[..., 0, 0], linear.weight, linear.bias, activation="relu")
    )
    linear = QuaternionLinear(8, 12, activation="relu", dropout=0.5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = linear(x[..., 0, 0])
        torch.manual_seed(0)
        expected = F.hamilton_linear(x[..., 0, 0], linear.weight, linear.bias, activation="relu", dropout=0.5)
    assert torch.equal(dropped, expected)
    undropped = F.hamilton_linear(x[..., 0, 0], linear.weight, linear.bias, activation="relu")
    assert not torch.equal(dropped, undropped)
    assert torch.equal(linear.eval()(x[..., 0, 0]), undropped)
    options = {"loss": FoldedRowwise("product"), "beta": 0.5, "reduction": "sum"}
    assert torch.equal(AntiTransferLoss(**options)(x, x + 1), F.anti_transfer_loss(x, x + 1, **options))
    options = {"loss": GramPosition(centred=True), "beta": 0.5, "reduction": "none"}
    assert torch.equal(AntiTransferLoss(**options)(x, x + 1), F.anti_transfer_loss(x, x + 1, **options))
    target = F.gram_target(x.abs(), loss=options["loss"])
    assert torch.equal(AntiTransferLoss(**options)(x, target), F.anti_transfer_loss(x, target, **options))


@pytest.mark.parametrize(
    ("layer", "weight"),
    [
        (QuaternionConv2d(8, 12, (3, 5)), (4, 3, 2, 3, 5)),
        (QuaternionConv2d(8, 16, 3, groups=2), (4, 4, 1, 3, 3)),
        (QuaternionConvTranspose2d(8, 12, 3), (4, 2, 3, 3, 3)),
        (QuaternionConvTranspose2d(8, 16, 3, groups=2), (4, 2, 2, 3, 3)),
        (QuaternionLinear(8, 12), (4, 3, 2)),
    ],
)
def test_one_weight_and_a_zero_bias(layer: Any, weight: tuple[int, ...]) -> None:
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "weight": weight,
        "bias": (layer.bias.shape[0],),
    }
    assert layer.bias.eq(0).all()
    assert layer.weight.std() > 0


def test_layers_without_bias_and_on_meta() -> None:
    for layer in (
        QuaternionConv2d(4, 8, 3, bias=False, device="meta"),
        QuaternionConvTranspose2d(4, 8, 3, bias=False, device="meta"),
        QuaternionLinear(4, 8, bias=False, device="meta", dtype=torch.float64),
    ):
        assert layer.bias is None
        assert [p.device.type for p in layer.parameters()] == ["meta"]
    assert layer.weight.dtype == torch.float64
    assert QuaternionLinear(4, 8, bias=False)(torch.ones(1, 4)).shape == (1, 8)


def test_representations_show_what_is_not_default() -> None:
    assert repr(QuaternionConv2d(4, 8, 3)) == "QuaternionConv2d(4, 8, kernel_size=(3, 3))"
    assert repr(QuaternionConv2d(4, 8, 3, 2, 1, bias=False, activation="relu")) == (
        "QuaternionConv2d(4, 8, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), activation='relu', bias=False)"
    )
    assert "output_padding=(1, 1)" in repr(QuaternionConvTranspose2d(4, 8, 3, 2, 1, 1))
    assert repr(QuaternionLinear(4, 8, activation="relu")) == "QuaternionLinear(4, 8, activation='relu')"
    assert repr(QuaternionLinear(4, 8)) == "QuaternionLinear(4, 8)"
    assert repr(QuaternionLinear(4, 8, dropout=0.1)) == "QuaternionLinear(4, 8, dropout=0.1)"
    assert repr(QuaternionBatchNorm2d(8)) == "QuaternionBatchNorm2d(8, eps=1e-05, momentum=0.1)"
    assert repr(AntiTransferLoss()) == "AntiTransferLoss(GramChannel(centred=False), beta=1.0, reduction='mean')"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: QuaternionConv2d(6, 8, 3), "in_channels must be a positive multiple of 4; got 6"),
        (lambda: QuaternionConv2d(8, 8, 3, pool=3), "pool must be one of None, 2; got 3"),
        (lambda: QuaternionConv2d(8, 0, 3), "out_channels must be a positive multiple of 4; got 0"),
        (
            lambda: QuaternionConv2d(8, 12, 3, groups=2),
            r"out_channels must be a positive multiple of 4 \* groups = 8; got 12",
        ),
        (lambda: QuaternionConv2d(8, 8, 3, groups=0), "groups must be an integer >= 1; got 0"),
        (lambda: QuaternionConv2d(8, 8, 0), "kernel_size must be an integer >= 1 or a pair of them; got 0"),
        (lambda: QuaternionConv2d(8, 8, 3, stride=0), "stride must be"),
        (lambda: QuaternionConv2d(8, 8, 3, activation="tanh"), "activation must be one of None, 'relu'; got 'tanh'"),
        (lambda: QuaternionConv2d(8, 8, 3, init="xavier"), "init must be one of 'glorot', 'he'; got 'xavier'"),
        (lambda: QuaternionConvTranspose2d(8, 6, 3), "out_channels must be a positive multiple of 4; got 6"),
        (lambda: QuaternionConvTranspose2d(8, 8, 3, output_padding=-1), "output_padding must be"),
        (lambda: QuaternionLinear(6, 8), "in_features must be a positive multiple of 4; got 6"),
        (lambda: QuaternionLinear(8, 8, activation="tanh"), "activation must be one of"),
        (lambda: QuaternionBatchNorm2d(6), "num_features must be a positive multiple of 4; got 6"),
        (lambda: quaternion_glorot_(torch.empty(3, 2, 2)), r"weight must have shape .*; got \(3, 2, 2\)"),
        (lambda: quaternion_he_(torch.empty(4, 2)), r"weight must have shape .*; got \(4, 2\)"),
        (lambda: QuaternionBatchNorm2d(4)(torch.ones(1, 8, 2, 2)), r"x must have shape \[B, 4, H, W\]; got"),
    ],
)
def test_bad_arguments(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("fill", "sigma"),
    [
        (quaternion_glorot_, 1 / math.sqrt(2 * (60 * 6 + 50 * 6))),
        (quaternion_he_, 1 / math.sqrt(2 * 60 * 6)),
    ],
)
def test_law_of_the_initialisation(fill: Any, sigma: Any) -> None:
    weight = fill(torch.empty(4, 50, 60, 2, 3), torch.Generator().manual_seed(3)).double()
    n = weight[0].numel()
    squares = weight.square().flatten(1).mean(1) / sigma**2
    # Relative standard errors of these means at n = 18,000 are below 1.5 %.
    assert squares[0].item() == pytest.approx(2, rel=0.06)
    assert squares[1:].tolist() == pytest.approx([2 / 3] * 3, rel=0.06)
    assert weight.flatten(1).mean(1).abs().max() < 5 * sigma * math.sqrt(2 / n)
    # The modulus is chi with 4 degrees of freedom: distribution function 1 - exp(-m^2/2) (1 + m^2/2).
    modulus = (weight.square().sum(0).sqrt() / sigma).flatten().sort().values
    expected = 1 - torch.exp(-modulus.square() / 2) * (1 + modulus.square() / 2)
    assert (expected - torch.arange(1, n + 1) / n).abs().max() < 2 / math.sqrt(n)
    # The phase is uniform: of cos, the r part over the modulus has the arcsine distribution.
    cosine = (weight[0].flatten() / weight.square().sum(0).sqrt().flatten()).sort().values
    arcsine = 0.5 + torch.asin(cosine.clamp(-1, 1)) / math.pi
    assert (arcsine - torch.arange(1, n + 1) / n).abs().max() < 2 / math.sqrt(n)
    # A cube projected on the sphere leans to its corners: E[v_i^4] is 0.2 on the sphere, 0.180 here.
    v = (weight[1:] / weight[1:].norm(dim=0)).flatten(1)
    assert v.pow(4).mean().item() == pytest.approx(0.1802, abs=0.003)


def test_transposed_convolution_swaps_the_fans() -> None:
    """The fan_in of its he initialisation is out/4 kh kw, by its weight's shape: 9, sigma 0.236 for the decoder."""
    layer = QuaternionConvTranspose2d(400, 40, 3, generator=torch.Generator().manual_seed(0))
    assert layer.weight.square().sum(0).mean().item() == pytest.approx(4 / (2 * 10 * 9), rel=0.05)
    conv = QuaternionConv2d(400, 40, 3, init="he", generator=torch.Generator().manual_seed(0))
    assert conv.weight.square().sum(0).mean().item() == pytest.approx(4 / (2 * 100 * 9), rel=0.05)


def test_defaults_of_the_initialisation() -> None:
    for layer, fill in (
        (QuaternionConv2d(8, 16, 3), quaternion_glorot_),
        (QuaternionLinear(8, 16), quaternion_he_),
        (QuaternionConvTranspose2d(8, 16, 3), quaternion_he_),
    ):
        layer.reset_parameters(torch.Generator().manual_seed(1))
        expected = fill(torch.empty_like(layer.weight), torch.Generator().manual_seed(1))
        assert torch.equal(layer.weight, expected)


def test_generator_determines_the_weights() -> None:
    def build(seed: Any) -> Any:
        return QuaternionConv2d(8, 8, 3, generator=torch.Generator().manual_seed(seed)).weight

    torch.manual_seed(0)
    first = build(1)
    state = torch.get_rng_state()
    assert torch.equal(first, build(1))
    assert not torch.equal(first, build(2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    one = QuaternionLinear(8, 8).weight
    torch.manual_seed(5)
    assert torch.equal(one, QuaternionLinear(8, 8).weight)
    assert quaternion_he_(torch.empty(4, 2, 2, dtype=torch.bfloat16)).isfinite().all()


def naive_batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    mean: Any = None,
    var: Any = None,
    eps: float = 1e-5,
) -> Any:
    """Component by component, as in the reference code."""
    components = x.chunk(4, dim=1)
    means = [c.mean() for c in components] if mean is None else mean
    centred = [c - m for c, m in zip(components, means, strict=True)]
    if var is None:
        var = sum(c**2 for c in centred).mean()
    y = torch.cat([weight.view(-1, 1, 1) * c / torch.sqrt(var + eps) for c in centred], dim=1)
    return y + bias.view(-1, 1, 1), torch.stack(list(means)), var


def batch_norm(channels: int = 12) -> Any:
    norm = QuaternionBatchNorm2d(channels, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return norm


def test_batch_norm_in_training() -> None:
    norm, x = batch_norm(), torch.randn(3, 12, 4, 5, dtype=torch.float64) * 3 + torch.arange(12).view(12, 1, 1)
    expected, mean, var = naive_batch_norm(x, norm.weight, norm.bias)
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * var.view(1))
    assert gradcheck(norm, x[:1, :, :2, :2].clone().requires_grad_())


def test_batch_norm_in_evaluation() -> None:
    norm, x = batch_norm(), torch.randn(3, 12, 4, 5, dtype=torch.float64, requires_grad=True)
    norm.running_mean.copy_(torch.randn(4))
    norm.running_var.fill_(2.5)
    norm.eval()
    before = {name: b.clone() for name, b in norm.named_buffers()}
    y = norm(x)
    expected, *_ = naive_batch_norm(x, norm.weight, norm.bias, before["running_mean"], norm.running_var)
    torch.testing.assert_close(y, expected)
    assert torch.equal(norm(x[:1]), y[:1])
    assert all(torch.equal(b, before[name]) for name, b in norm.named_buffers())
    y.square().sum().backward()
    assert all(t.grad.abs().sum() > 0 for t in (x, norm.weight, norm.bias))


def test_batch_norm_parameters_and_types() -> None:
    norm = QuaternionBatchNorm2d(8)
    shapes = {name: tuple(t.shape) for name, t in norm.state_dict().items()}
    assert shapes == {
        "weight": (2,), "bias": (8,), "running_mean": (4,), "running_var": (1,), "num_batches_tracked": ()
    }  # fmt: skip
    assert torch.equal(norm.weight, torch.ones(2))
    x = torch.randn(2, 8, 3, 3)
    half = QuaternionBatchNorm2d(8)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), norm(x), atol=0.03, rtol=0.03)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_compiles(training: bool) -> None:
    torch._dynamo.reset()
    norm, other, x = QuaternionBatchNorm2d(8), QuaternionBatchNorm2d(8), torch.randn(2, 8, 3, 3)
    compiled = torch.compile(norm.train(training), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), other.train(training)(x))
    torch.testing.assert_close(norm.running_mean, other.running_mean)


def test_state_survives_a_round_trip() -> None:
    net, twin = (torch.nn.Sequential(QuaternionConv2d(4, 8, 3), QuaternionBatchNorm2d(8)) for _ in range(2))
    x = torch.randn(2, 4, 6, 6)
    net(x)
    twin.load_state_dict(net.state_dict())
    assert torch.equal(net.eval()(x), twin.eval()(x))
    with qkernels.set_backend("reference"):
        torch.testing.assert_close(net(x), twin(x))
