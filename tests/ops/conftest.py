"""SpeechBrain's quaternion layers, an independent implementation."""

import importlib
import sys

import pytest


@pytest.fixture
def speechbrain_layers():
    """Its layers by module name; skipped where it is not installed."""
    # speechbrain imports torchaudio, which beside a CPU build of torch needs this module's help.
    pytest.importorskip("qat.data.torchaudio_import")
    pytest.importorskip("speechbrain")
    names = ("q_CNN", "q_linear")
    yield {name: importlib.import_module(f"speechbrain.nnet.quaternion_networks.{name}") for name in names}
    # Its lazy modules raise when hypothesis looks through sys.modules.
    for name in [name for name in sys.modules if name.partition(".")[0] == "speechbrain"]:
        del sys.modules[name]
