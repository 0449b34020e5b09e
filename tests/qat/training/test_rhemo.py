"""RH-Emo's stages."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from qat.config import (
    Experiment,
    RHEmoExperiment,
    from_plain,
)
from qat.data.manifest import Manifest
from qat.training.checkpoint import load_checkpoint
from qat.training.data import load_data
from qat.training.rhemo import pretrain_rhemo
from tests.qat.training.trainings import louder


def test_rhemo_stage_2_starts_from_stage_1(rhemo: Path, experiment: Experiment, tmp_path: Path) -> None:
    first = from_plain(RHEmoExperiment, json.loads((rhemo / "result.json").read_text())["experiment"])
    second = replace(
        first,
        rhemo=replace(first.rhemo, beta=0.01),
        training=replace(first.training, initial=rhemo, lr=1e-12, epochs=1),
    )
    result = pretrain_rhemo(second, tmp_path / "stage2", quiet=True)
    assert {"reconstruction", "emotion", "total", "constant", "live_channels"} <= result["parts"]["test"].keys()
    a, b = (load_checkpoint(f, "rhemo").tensors for f in (rhemo, tmp_path / "stage2"))
    weights_only = [k for k in a if "running" not in k and "num_batches" not in k]
    assert all(torch.allclose(a[k], b[k], atol=1e-9) for k in weights_only)


def test_constant_predictor_and_live_channels_are_measured(rhemo: Path) -> None:
    result = json.loads((rhemo / "result.json").read_text())
    experiment = from_plain(RHEmoExperiment, result["experiment"])
    data = load_data(experiment, quiet=True)
    x = data.spectrograms(torch.tensor(data.parts["test"]), None)
    constant = torch.full_like(x, x.mean().item())
    expected = torch.nn.functional.binary_cross_entropy(constant, x).item()
    assert result["parts"]["test"]["constant"] == pytest.approx(expected, rel=1e-4)
    assert 1 <= result["parts"]["test"]["live_channels"] <= 4


def test_rhemo_takes_clips_louder_than_the_training_maximum(rhemo: Path, corpus: Manifest, tmp_path: Path) -> None:
    split = json.loads((rhemo / "split.json").read_text())
    first = from_plain(RHEmoExperiment, json.loads((rhemo / "result.json").read_text())["experiment"])
    loud = replace(
        first, corpus=louder(corpus, tmp_path, split, "validation"), training=replace(first.training, epochs=1)
    )
    result = pretrain_rhemo(loud, tmp_path / "run", quiet=True)
    assert np.isfinite(result["parts"]["validation"]["reconstruction"])
    assert np.isfinite(result["parts"]["validation"]["constant"])
