"""Tests that need a GPU: all of them are skipped where there is none."""

from pathlib import Path

import pytest
import torch

from qkernels.runtime.device import INTERPRETED, arch_of


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if INTERPRETED:
        reason = "TRITON_INTERPRET=1 is set: kernels would run in the interpreter"
    elif not torch.cuda.is_available():
        reason = "no CUDA device"
    elif torch.cuda.get_device_capability() < (8, 0):
        reason = f"the kernels need compute capability 8.0; {torch.cuda.get_device_name()} has less"
    else:
        return
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def arch(device: torch.device) -> int:
    """What launch settings are looked up by, 90 for compute capability 9.0."""
    return arch_of(torch.empty(0, device=device))
