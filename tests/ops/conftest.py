"""SpeechBrain's quaternion layers, an independent implementation."""

import importlib.util
from typing import Any

import pytest


@pytest.fixture
def speechbrain_layers() -> Any:
    """Its layers by module name; skipped where it is not installed."""
    pytest.importorskip("qat.data.torchaudio_import")
    if not importlib.util.find_spec("speechbrain"):  # importing it here would patch PyTorch
        pytest.skip("SpeechBrain is not installed")
    from bench.layers import speechbrain_module

    return {name: speechbrain_module(name) for name in ("q_CNN", "q_linear")}
