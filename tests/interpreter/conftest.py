"""The kernels in Triton's interpreter, which runs them on a CPU: settings, and a check of every address."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


def pytest_collection_modifyitems(items: Any) -> None:
    # Triton decides when a kernel is defined, so a process is one or the other.
    if os.environ.get("TRITON_INTERPRET") != "1":
        skip = pytest.mark.skip(reason="needs TRITON_INTERPRET=1: `make test` runs it")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def switches() -> Any:
    """float32 is float32, whatever PyTorch's defaults; the switches as they were afterwards."""
    torch.manual_seed(0)
    switches = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    saved = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    yield
    for switch, precision in zip(switches, saved, strict=True):
        switch.fp32_precision = precision


@pytest.fixture(autouse=True)
def poison() -> Any:
    """Uninitialised memory is NaN (255 in bytes): an output that no program writes, or that is read before, shows."""
    saved = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(saved[0])
    torch.utils.deterministic.fill_uninitialized_memory = saved[1]


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Addresses lie in one of a launch's tensors, no two programs write the same one, counters end at zero."""
    from interpreted import MemoryCheck

    return MemoryCheck(monkeypatch)


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Launch settings for the interpreter; `tiles.style` and `tiles.splits` can be set by a test."""
    from interpreted import Tiles

    return Tiles(monkeypatch)
