"""A network whose kernels Triton cannot build is computed by plain PyTorch in their place."""

import warnings
from typing import Any

import pytest
import torch

from qat.config import NetworkConfig
from qat.models.vgg import VGG16
from qkernels import anti_transfer_tap, runtime
from qkernels.ops import _launch, _library
from qkernels.runtime.precision import switched

pytest.importorskip("triton")


def gradients(net: Any, x: torch.Tensor, frozen: torch.Tensor) -> Any:
    """Logits and gradients of a step with anti-transfer in front of a pool."""
    net.zero_grad()
    logits, made = net(x, {"relu2": lambda features: anti_transfer_tap(features, frozen)})
    (torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1])) + made["relu2"]).backward()
    return logits.detach(), {name: p.grad.clone() for name, p in net.named_parameters()}


def test_plain_pytorch_in_place_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    net = VGG16(NetworkConfig(width=1 / 16, dropout=0.0), 3)
    x, frozen = torch.rand(2, 4, 64, 64), torch.rand(2, 4, 64, 64)
    expected, exact = gradients(net, x, frozen)

    def run(kernel: Any, *arguments: Any, **options: Any) -> None:
        raise _launch.KernelUnavailable(f"Triton cannot build {kernel.__name__}")

    monkeypatch.setattr(_launch, "run", run)
    monkeypatch.setattr(_library, "_warned", set())
    monkeypatch.setattr(runtime, "backend_of", lambda *args, **kwargs: "triton")
    # In TF32 it is the rounding of the operands that fails first, and no product is ever tried.
    with switched("ieee"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual, approximate = gradients(net, x, frozen)
        gradients(net, x, frozen)
    torch.testing.assert_close(actual, expected)
    for name, gradient in exact.items():
        torch.testing.assert_close(approximate[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max())
    named = [str(warning.message) for warning in caught if "cannot build" in str(warning.message)]
    assert len(named) == len(set(named))
    kernels = ("pack", "conv", "conv_dw", "gradient")
    assert {name.split(";")[0] for name in named} >= {
        f"Triton cannot build _hamilton_{name}_kernel" for name in kernels
    }
