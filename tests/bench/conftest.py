"""What benchmarks leave behind."""

import sys

import pytest


@pytest.fixture(autouse=True)
def _without_speechbrain():
    """SpeechBrain's lazy modules raise when hypothesis looks through sys.modules."""
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "speechbrain"]:
        del sys.modules[name]
