"""A corpus so small that a training takes seconds: beeps; their pitch is the speaker, their rhythm the emotion."""

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from qat.config import (
    CorpusConfig,
    Experiment,
    NetworkConfig,
    RHEmoConfig,
    RHEmoExperiment,
    SpectrogramConfig,
    TrainingConfig,
)
from qat.data.manifest import Manifest, build_manifest, write_manifest
from qat.data.store import prepare
from qat.training.classifier import train_classifier
from qat.training.rhemo import pretrain_rhemo

os.environ["LOKY_MAX_CPU_COUNT"] = "1"  # processes of a pool: each imports PyTorch for 2 s

SPEAKERS, TEXTS, EMOTIONS = ("ann", "ben", "cem", "dan"), ("one", "two", "three"), ("angry", "neutral", "sad")


def beeps(pitch: float, rate: float, seed: int, seconds: float = 1.0) -> np.ndarray:
    t = np.arange(int(seconds * 16000)) / 16000
    noise = np.random.default_rng(seed).normal(0, 0.01, len(t))
    return 0.5 * np.sin(2 * np.pi * pitch * t) * (np.sin(2 * np.pi * rate * t) > 0) + noise


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    root = tmp_path_factory.mktemp("corpus")
    rows = []
    for s, speaker in enumerate(SPEAKERS):
        for t, text in enumerate(TEXTS):
            for e, emotion in enumerate(EMOTIONS):
                path = f"{speaker}-{text}-{emotion}.wav"
                soundfile.write(root / path, beeps(300 * (s + 1) + 40 * t, 3.0 * (e + 1), len(rows)), 16000)
                rows.append(
                    {"path": path, "speaker": speaker, "text": text, "emotion": emotion, "words": f"say {text}"}
                )
    manifest = build_manifest(root, rows, "tiny")
    write_manifest(manifest, root / "tiny.csv")
    return manifest


@pytest.fixture(scope="session")
def cache(corpus: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the corpus's spectrograms."""
    folder = tmp_path_factory.mktemp("cache")
    prepare(corpus, SpectrogramConfig(), folder, workers=0, progress=False)
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_training() -> TrainingConfig:
    return TrainingConfig(lr=1e-3, batch=8, epochs=2, device="cpu")


@pytest.fixture(scope="session")
def rhemo(
    corpus: Manifest, cache: Path, tiny_training: TrainingConfig, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run folder of RH-Emo's first stage."""
    experiment = RHEmoExperiment(
        corpus=CorpusConfig("csv", corpus.root / "tiny.csv"),
        normalisation="log",
        rhemo=RHEmoConfig(width=0.01),
        training=tiny_training,
        cache=cache,
    )
    folder = tmp_path_factory.mktemp("rhemo") / "stage1"
    pretrain_rhemo(experiment, folder, quiet=True)
    return folder


@pytest.fixture(scope="session")
def experiment(corpus: Manifest, cache: Path, rhemo: Path, tiny_training: TrainingConfig) -> Experiment:
    """Emotion, quaternion domain, the smallest network."""
    return Experiment(
        corpus=CorpusConfig("csv", corpus.root / "tiny.csv"),
        normalisation="log",
        network=NetworkConfig(width=0.01, init="he", rhemo=rhemo, embedding_scale="max"),
        training=tiny_training,
        cache=cache,
    )


@pytest.fixture(scope="session")
def twin(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a speaker recogniser."""
    from dataclasses import replace

    folder = tmp_path_factory.mktemp("twins") / "speaker"
    train_classifier(replace(experiment, task="speaker"), folder, quiet=True)
    return folder
