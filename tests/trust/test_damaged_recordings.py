"""Damaged recordings through `corpus check`, `prepare` and `predict`: the three agree on each, and none is lost."""

from pathlib import Path

import numpy as np
import pytest

from qat.config import Experiment, SpectrogramConfig
from qat.data.manifest import build_manifest, check_files
from qat.data.store import prepare
from qat.training.classifier import train_classifier
from qat.training.inference import predict
from tests.qat.data.damaged import damaged


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_every_file_is_used_or_named(
    count: int, experiment: Experiment, tmp_path: Path, rng: np.random.Generator
) -> None:
    folder = tmp_path / "recordings"
    folder.mkdir()
    for name, content in damaged(rng, count):
        (folder / name).write_bytes(content)
    files = sorted(folder.iterdir())
    rows = [{"path": file.name, "speaker": "s", "text": "t", "emotion": "e"} for file in files]
    manifest = build_manifest(folder, rows, "damaged")

    store = prepare(manifest, SpectrogramConfig(), tmp_path / "cache", workers=1, progress=False)
    used, skipped = set(store.index["path"]), set(store.skipped["path"])
    assert not used & skipped
    assert used | skipped == {file.name for file in files}
    assert np.isfinite(store.magnitudes).all()

    checked = check_files(manifest, progress=False)
    assert set(checked["path"]) == skipped
    assert all(str(folder / path) in problem for path, problem in zip(checked["path"], checked["problem"], strict=True))

    train_classifier(experiment, tmp_path / "run", quiet=True)
    predictions, problems = predict(tmp_path / "run", files)
    assert [Path(path).name for path in predictions["path"]] == sorted(used)
    assert [Path(path).name for path in problems["path"]] == sorted(skipped)
    assert predictions.notna().to_numpy().all()
