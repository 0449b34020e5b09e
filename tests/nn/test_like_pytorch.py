"""The layers behave as PyTorch's own where a training loop expects it of any layer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.nn.utils.parametrize import remove_parametrizations
from torch.optim.swa_utils import AveragedModel, update_bn

import qkernels
from qkernels import functional as F
from qkernels.losses import LOSSES, MseSigmoid
from qkernels.nn import (
    AntiTransferLoss,
    QuaternionBatchNorm2d,
    QuaternionConv2d,
    QuaternionConvTranspose2d,
    QuaternionLinear,
)

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: QuaternionConv2d(8, 8, 3, padding=1),
    "convolution, groups": lambda: QuaternionConv2d(8, 8, 3, padding=1, groups=2),
    "transposed": lambda: QuaternionConvTranspose2d(8, 8, 3, padding=1),
    "linear": lambda: QuaternionLinear(8, 8),
    "batch norm": lambda: QuaternionBatchNorm2d(8),
}
SUCCESSORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda y, x: torch.relu_(y),
    "dropout": lambda y, x: torch.nn.functional.dropout(y, 0.5, inplace=True),
    "residual": lambda y, x: y.add_(x),
    "slice": lambda y, x: y[:1].mul_(2) and y,
    "detach": lambda y, x: y.detach_() + x * y.sum(),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("form", ["dense", "q8"])
@pytest.mark.parametrize("successor", ["relu", "dropout", "residual", "detach"])
@pytest.mark.parametrize("name", LAYERS)
def test_an_operation_in_place_may_follow(name: str, successor: str, form: str, backend: str) -> None:
    layer = LAYERS[name]()
    x = torch.randn(2, 8) if name == "linear" else torch.randn(2, 8, 6, 6)
    inputs, outputs = [x.clone().requires_grad_() for _ in range(2)], []
    with qkernels.set_backend(backend), qkernels.set_form(form):
        for leaf, own in zip(inputs, (True, False), strict=True):
            torch.manual_seed(0)
            layer.zero_grad()
            y = layer(leaf)
            outputs.append(SUCCESSORS[successor](y if own else y.clone(), leaf))
            outputs[-1].square().sum().backward()
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    with torch.no_grad():
        again = layer(x)
        assert again.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", LAYERS)
def test_memory_formats_of_a_module(name: str) -> None:
    """`Module.to(memory_format=...)` converts every parameter with four or five axes; a weight here has five."""
    layer = LAYERS[name]()
    x = torch.randn(2, 8) if name == "linear" else torch.randn(2, 8, 6, 6)
    expected, weights = layer(x), copy.deepcopy(layer.state_dict())
    moved = layer.to(memory_format=torch.channels_last)
    moved.load_state_dict(weights)
    torch.testing.assert_close(moved(x if x.dim() == 2 else x.to(memory_format=torch.channels_last)), expected)
    assert all(parameter.is_contiguous() for parameter in moved.parameters())
    assert moved.to(torch.float64)(x.double()).dtype == torch.float64


@pytest.mark.parametrize("name", LAYERS)
def test_materialisation_from_meta(name: str) -> None:
    """What sharded training and large models do: build without memory, allocate, initialise."""
    with torch.device("meta"):
        layer = LAYERS[name]()
    layer = layer.to_empty(device="cpu")
    for tensor in layer.state_dict().values():
        tensor.fill_(7)
    layer.reset_parameters()  # type: ignore[operator]
    fresh = LAYERS[name]()
    for key, tensor in fresh.state_dict().items():
        there = layer.state_dict()[key]
        assert there.shape == tensor.shape
        if key != "weight" or name == "batch norm":
            assert torch.equal(there, tensor)
        else:
            assert 0.3 < there.std() / tensor.std() < 3


def test_an_error_while_moving_is_not_hidden() -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        QuaternionConv2d(8, 8, 3)._apply(broken)


def test_running_values_of_a_weight_average_are_updated() -> None:
    model = nn.Sequential(QuaternionConv2d(8, 8, 3), QuaternionBatchNorm2d(8))
    batches = [torch.randn(4, 8, 8, 8) + 3 for _ in range(5)]
    averaged = AveragedModel(model)
    update_bn(batches, averaged)
    convolution, norm = averaged.module.children()
    with torch.no_grad():
        outputs = torch.cat([convolution(batch) for batch in batches])
    torch.testing.assert_close(norm.running_mean, outputs.unflatten(1, (4, -1)).mean((0, 2, 3, 4)))
    assert norm.num_batches_tracked == 5
    assert norm.momentum == 0.1


def test_without_momentum_all_batches_weigh_the_same() -> None:
    norm, plain = QuaternionBatchNorm2d(4, momentum=None), nn.BatchNorm2d(4, momentum=None)
    for _ in range(3):
        x = torch.randn(2, 4, 3, 3)
        norm(x), plain(x)
    torch.testing.assert_close(norm.running_mean, plain.running_mean)
    norm.reset_running_stats()
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_mean, torch.zeros(4))


def test_states_from_before_batches_were_counted_are_read() -> None:
    norm = QuaternionBatchNorm2d(8)
    state = {name: value for name, value in norm.state_dict().items() if name != "num_batches_tracked"}
    state["running_mean"] = torch.arange(4.0)
    norm.load_state_dict(dict(state))
    assert torch.equal(norm.running_mean, torch.arange(4.0))
    assert norm.num_batches_tracked == 0


@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize("dilation", [(2, 3), (4, 4)])
def test_output_padding_below_the_dilation(stride: tuple[int, int], dilation: tuple[int, int]) -> None:
    """More than a stride of it, as PyTorch allows where the dilation is larger."""
    real = nn.ConvTranspose2d(4, 4, 2, stride, 1, 0, dilation=dilation).double()
    x, weight = torch.randn(2, 4, 3, 4, dtype=torch.float64), torch.randn(4, 1, 1, 2, 2, dtype=torch.float64)
    dense = qkernels.algebra.expand_weight(weight, 1)
    for padding in (
        (1, 0),
        (0, max(stride[1], dilation[1]) - 1),
        tuple(max(sizes) - 1 for sizes in zip(stride, dilation, strict=True)),
    ):
        expected = torch.nn.functional.conv_transpose2d(x, dense, real.bias, stride, 1, padding, 1, dilation)
        for backend in ("auto", "reference"):
            with qkernels.set_backend(backend):
                y = F.hamilton_conv_transpose2d(x, weight, real.bias, stride, 1, padding, 1, dilation)
            torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("form", ["dense", "q8", "reference"])
def test_an_empty_batch_gives_an_empty_output_and_zero_gradients(name: str, form: str) -> None:
    layer, x = LAYERS[name](), torch.empty((0, 8) if name == "linear" else (0, 8, 6, 6), requires_grad=True)
    before = copy.deepcopy(layer.state_dict())
    with qkernels.set_form(form) if form != "reference" else qkernels.set_backend("reference"):
        y = layer(x)
        y.square().sum().backward()
    assert y.shape == (0, *layer(torch.zeros(1, *x.shape[1:])).shape[1:])
    assert x.grad.shape == x.shape
    assert all(torch.equal(each.grad, torch.zeros_like(each)) for each in layer.parameters())
    changed = {key for key, value in before.items() if not torch.equal(value, layer.state_dict()[key])}
    assert changed <= {"running_mean", "running_var", "num_batches_tracked"}  # of the batch that is not empty


def test_an_empty_batch_changes_no_running_value() -> None:
    norm = QuaternionBatchNorm2d(4)
    norm(torch.randn(2, 4, 3, 3))
    before = copy.deepcopy(norm.state_dict())
    norm(torch.randn(0, 4, 3, 3))
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("kind", [int, np.int64, np.int32, np.uint8])
def test_sizes_may_be_numpys(kind: Callable[[int], int]) -> None:
    pair = (kind(3), kind(2))
    convolution = QuaternionConv2d(kind(8), kind(8), pair, kind(2), np.array([1, 0]), kind(1), kind(2))
    transposed = QuaternionConvTranspose2d(kind(8), kind(8), pair, kind(2), kind(1), kind(1), kind(2))
    for layer, real in (
        (convolution, nn.Conv2d(8, 8, (3, 2), 2, (1, 0), groups=2)),
        (transposed, nn.ConvTranspose2d(8, 8, (3, 2), 2, 1, 1, groups=2)),
        (QuaternionLinear(kind(8), kind(12)), nn.Linear(8, 12)),
        (QuaternionBatchNorm2d(kind(8)), nn.BatchNorm2d(8)),
    ):
        x = torch.randn((2, 8) if isinstance(real, nn.Linear) else (2, 8, 6, 6))
        assert layer(x).shape == real(x).shape
    assert repr(convolution) == repr(QuaternionConv2d(8, 8, (3, 2), 2, (1, 0), groups=2))


def test_a_truth_value_is_no_size() -> None:
    """`bias` one place too early, as a stride, would else be a stride of 1."""
    for arguments in ((8, 8, True), (8, 8, 3, True), (8, 8, 3, 1, False), (8, 8, 3, 1, 0, 1, True), (True, 8, 3)):
        with pytest.raises(ValueError, match=r"must be .*; got (True|False)$"):
            QuaternionConv2d(*arguments)


def example(name: str) -> Tensor:
    return torch.randn(2, 8) if name == "linear" else torch.randn(2, 8, 6, 6)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_can_be_saved_copied_and_pickled(name: str, tmp_path: Path) -> None:
    layer, x = LAYERS[name](), example(name)
    layer(x).sum().backward()  # a batch norm has running values now
    expected = layer.eval()(x)
    torch.save(layer.state_dict(), tmp_path / "state")
    torch.save(layer, tmp_path / "layer")
    restored = LAYERS[name]().eval()
    restored.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    whole = torch.load(tmp_path / "layer", weights_only=False)
    copies = (restored, whole, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer))
    for other in copies:
        assert torch.equal(other(x), expected)
        assert repr(other) == repr(layer)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1)
    assert not torch.equal(layer(x), expected)
    assert all(torch.equal(other(x), expected) for other in copies[:-1])  # of which a shallow copy is none


@pytest.mark.parametrize("loss", [*LOSSES, MseSigmoid("stochastic_pairwise")], ids=str)
def test_a_loss_can_be_copied_and_pickled(loss: Any) -> None:
    generator = torch.Generator().manual_seed(3) if isinstance(loss, MseSigmoid) else None
    module, maps = AntiTransferLoss(loss, beta=0.5, generator=generator), torch.rand(2, 2, 5, 3)
    copies = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    for other in copies:
        if generator is not None:
            assert other.generator is not generator
        assert repr(other) == repr(module)
    values = [each(*maps) for each in (module, *copies)]
    assert values[0] == values[1] == values[2]
    assert module.state_dict() == {}


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "batch norm"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_parametrizations_of_the_weight(name: str, backend: str) -> None:
    """PyTorch's weight norm and spectral norm, whose weight is no parameter but is computed of others."""
    x = example(name)
    for parametrization in (weight_norm, spectral_norm):
        layer = LAYERS[name]()
        plain = copy.deepcopy(layer)
        layer = parametrization(layer)
        with qkernels.set_backend(backend):
            layer(x).square().sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())
        with torch.no_grad():
            plain.weight.copy_(layer.eval().weight)  # type: ignore[operator]
            torch.testing.assert_close(layer(x), plain.eval()(x))
        again = parametrization(LAYERS[name]())
        again.load_state_dict(layer.state_dict())
        torch.testing.assert_close(again.eval()(x), layer(x))
        remove_parametrizations(layer, "weight")
        torch.testing.assert_close(layer(x), plain(x))
        layer.reset_parameters()  # type: ignore[operator]
        assert not torch.equal(layer.weight, plain.weight)
