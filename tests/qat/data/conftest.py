from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import soundfile

from qat.data.manifest import Manifest, build_manifest


@pytest.fixture
def make_corpus(tmp_path: Path, rng: np.random.Generator) -> Callable[..., Manifest]:
    """Write noise wavs of the given lengths in seconds and give their manifest."""

    def make(seconds: Mapping[str, float], rate: int = 16000) -> Manifest:
        folder = tmp_path / "corpus"
        rows = []
        for path, length in seconds.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(folder / path, rng.uniform(-0.5, 0.5, round(length * rate)), rate, subtype="PCM_16")
            rows.append({"path": path, "speaker": path[0], "text": "", "emotion": "sad" if len(rows) % 2 else "happy"})
        return build_manifest(folder, rows, "noise")

    return make
