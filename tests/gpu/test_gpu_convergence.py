"""Training with the kernels follows training with PyTorch's products from the same start."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from qat.config import NetworkConfig
from qat.models import VGG16
from qkernels import runtime
from qkernels.runtime.precision import switched

BATCH, CLASSES, STEPS = 20, 4, 50


def losses(device: torch.device, dtype: torch.dtype) -> Iterator[float]:
    """Of the quaternion VGG16 at full width on one batch of noisy patterns, one per class."""
    torch.manual_seed(0)
    net = VGG16(NetworkConfig(dropout=0.0, init="he"), CLASSES).to(device)
    labels = torch.arange(BATCH, device=device) % CLASSES
    patterns = torch.randn(CLASSES, 4, 64, 64, device=device)
    x = patterns[labels] + torch.randn(BATCH, 4, 64, 64, device=device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-6)
    for _ in range(STEPS):
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = F.cross_entropy(net(x)[0].float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)], ids=str)
def test_kernels_train_as_pytorch_does(
    dtype: torch.dtype, allowed: float, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    with switched("float32"):
        kernels = torch.tensor(list(losses(device, dtype)))
        # The einsum definition would take minutes; PyTorch's own convolution with the expanded weight is tested
        # against it.
        monkeypatch.setattr(runtime, "backend_of", lambda *_: "torch")
        pytorch = torch.tensor(list(losses(device, dtype)))
    assert pytorch[-1] < 0.9 * pytorch[0]
    assert ((kernels - pytorch).abs() <= allowed * pytorch).all(), list(
        zip(kernels.tolist(), pytorch.tolist(), strict=True)
    )
