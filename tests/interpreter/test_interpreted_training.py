"""A whole network trained by the kernels and by plain PyTorch from the same seed."""

from typing import Any

import pytest
import torch

import qkernels
from qat.config import NetworkConfig
from qat.models import vgg

STEPS = 10


def losses(backend: Any) -> Any:
    """Ten steps of Adam on random crops, with fresh parameters."""
    torch.manual_seed(0)
    net = vgg.VGG16(NetworkConfig(width=1 / 8, dropout=0, init="he"), 4)
    x, labels = torch.rand(4, 4, 16, 16), torch.arange(4)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    values = []
    with qkernels.set_backend(backend):
        for _ in range(STEPS):
            loss = torch.nn.functional.cross_entropy(net(x)[0], labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
    return values


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_training_curve_is_that_of_plain_pytorch(monkeypatch: pytest.MonkeyPatch, memory: Any) -> None:
    """VGG16 at width 1/8 on crops of 16x16, batch 4, float32, without the last pool: the map is one pixel by then."""
    monkeypatch.setattr(vgg, "POOL_AFTER", (2, 4, 7, 10))
    monkeypatch.setattr(vgg, "INPUT", {"quaternion": (4, 32, 32)})
    expected = losses("auto")
    assert memory.launches == 0
    assert expected[-1] < 0.9 * expected[0]  # it learns, so its gradients matter
    actual = losses("triton")
    assert memory.launches > 0
    assert actual == pytest.approx(expected, rel=1e-4)
