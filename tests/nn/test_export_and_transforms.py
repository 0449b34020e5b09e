"""The layers and losses under `torch.export` and `torch.func`, which take PyTorch's own operators alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qkernels
from qkernels import functional as F
from qkernels.losses import LOSSES
from qkernels.nn import QuaternionBatchNorm2d, QuaternionConv2d, QuaternionConvTranspose2d, QuaternionLinear

X = (2, 8, 6, 6)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: QuaternionConv2d(8, 8, 3, padding=1, groups=2, activation="relu", pool=2),
    "transposed": lambda: QuaternionConvTranspose2d(8, 8, 3, stride=2, output_padding=1),
    "linear": lambda: nn.Sequential(nn.Flatten(), QuaternionLinear(288, 8, activation="relu", dropout=0.5)),
    "all": lambda: nn.Sequential(
        QuaternionConv2d(8, 16, 3, padding=1, activation="relu", pool=2),
        QuaternionBatchNorm2d(16),
        QuaternionConvTranspose2d(16, 8, 2, stride=2),
        nn.Flatten(),
        QuaternionLinear(288, 12),
    ),
}


@pytest.mark.parametrize("form", ["dense", "q8"])
@pytest.mark.parametrize("name", MODELS)
def test_exported_networks_need_pytorch_alone(name: str, form: str) -> None:
    model, x = MODELS[name]().eval(), torch.randn(X)
    batch = torch.export.Dim("batch", min=2, max=64)
    with qkernels.set_form(form):
        expected = model(x)
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        program = exported.run_decompositions()
    assert not [node.target for node in program.graph.nodes if "qkernels" in str(node.target)]
    torch.testing.assert_close(program.module()(x), expected)
    assert program.module()(torch.randn(5, *X[1:])).shape[0] == 5


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_single_samples(name: str) -> None:
    """`vmap` of `grad`, the usual way to them."""
    model = MODELS[name]().double().eval()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    x = torch.randn(3, *X[1:], dtype=torch.float64)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(model, (parameters, buffers), (sample[None],))
        return y.square().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for number in range(3):
        model.zero_grad()
        model(x[number : number + 1]).square().sum().backward()
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(together[key][number], parameter.grad)


@pytest.mark.parametrize("name", MODELS)
def test_directional_derivatives(name: str) -> None:
    model = MODELS[name]().double().eval()
    x, direction = torch.randn(X, dtype=torch.float64), torch.randn(X, dtype=torch.float64)
    tangent = torch.func.jvp(model, (x,), (direction,))[1]
    step = 1e-6
    torch.testing.assert_close(
        tangent, (model(x + step * direction) - model(x - step * direction)) / (2 * step), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_losses(loss: str) -> None:
    a, b = torch.randn(4, 5, 6, dtype=torch.float64), torch.randn(4, 5, 6, dtype=torch.float64)
    leaf = a.clone().requires_grad_()
    torch.manual_seed(0)
    F.anti_transfer_loss(leaf, b, loss=loss).backward()
    torch.manual_seed(0)
    found = torch.func.grad(lambda features: F.anti_transfer_loss(features, b, loss=loss))(a)
    torch.testing.assert_close(found, leaf.grad)


def test_kernels_that_are_asked_for_are_refused_with_the_reason() -> None:
    layer = QuaternionConv2d(8, 8, 3)
    refused = pytest.raises(ValueError, match=r"torch\.export and torch\.func take PyTorch's own operators")
    with qkernels.set_backend("triton"), refused:
        torch.func.vmap(lambda sample: layer(sample[None]))(torch.randn(X))
