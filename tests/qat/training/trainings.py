"""Settings, weights and corpora of the tests of trainings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import soundfile
import torch

from qat.config import (
    AntiTransferConfig,
    CorpusConfig,
    Experiment,
)
from qat.data.manifest import Manifest
from qat.training.checkpoint import load_checkpoint


def trained(experiment: Experiment, **settings: Any) -> Experiment:
    return replace(experiment, training=replace(experiment.training, **settings))


def with_twin(experiment: Experiment, twin: Path, **settings: Any) -> Experiment:
    return replace(experiment, anti_transfer=AntiTransferConfig(twin, **settings))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder, "classifier").tensors


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def louder(corpus: Manifest, folder: Path, split: dict[str, list[str]], part: str) -> Any:
    """The same corpus with ten times louder clips in one part."""
    for path in corpus.table["path"]:
        audio, rate = soundfile.read(corpus.root / path)
        soundfile.write(folder / path, audio * (1.0 if path in split[part] else 0.1), rate)
    table = corpus.table.drop(columns=["checksum", "duration"])
    table.to_csv(folder / "tiny.csv", index=False)
    return CorpusConfig("csv", folder / "tiny.csv")
