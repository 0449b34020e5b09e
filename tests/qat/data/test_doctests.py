import doctest
from typing import Any

import pytest

from qat.data import corpora, spectrogram, splits


@pytest.mark.parametrize("module", [corpora, spectrogram, splits])
def test_examples(module: Any) -> None:
    failed, attempted = doctest.testmod(module)
    assert attempted
    assert not failed
