"""``qat demo``: the whole method, small enough for a laptop, on synthesised speech.

Voices that the emotion classifiers are tested on are heard by no pretrained network. In the training part every voice
says one emotion almost always, so a network may take the voice for the emotion: the shortcut that anti-transfer is
meant to remove. Networks start from random weights, or from the very network that anti-transfer pushes away from.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from qat.config import (
    AntiTransferConfig,
    CorpusConfig,
    Experiment,
    NetworkConfig,
    RHEmoConfig,
    RHEmoExperiment,
    SplitConfig,
    TrainingConfig,
)
from qat.data._processes import bar, ordered_map
from qat.data.corpora import demo as corpus
from qat.data.spectrogram import SpectrogramConfig
from qat.data.store import prepare
from qat.experiments.probes import analyse
from qat.experiments.report import write_report
from qat.files import write_json
from qat.training.data import read_corpus
from qat.training.pipeline import pretrain_rhemo, train_classifier

LAYER = 13
"""Where the demo applies anti-transfer: the layer with the largest effect in the feasibility study."""


@dataclass(frozen=True)
class Recipe:
    """The settings of every stage of the demo.

    Args:
        network: width, initialisation and dropout of every VGG16.
        normalisation: of the spectrograms.
        rhemo: the heads' width.
        stage1, stage2: RH-Emo's two trainings.
        twin: training of the voice and the word network.
        emotion: training of the emotion networks.
    """

    network: NetworkConfig
    normalisation: Literal["max", "log"]
    rhemo: RHEmoConfig
    stage1: TrainingConfig
    stage2: TrainingConfig
    twin: TrainingConfig
    emotion: TrainingConfig


RECIPES = {
    # Found on this corpus: with the paper's rate and initialisation nothing is learnt in minutes. The last state is kept,
    # because the lowest loss on the validation voices comes before a network has learnt any shortcut.
    "small": Recipe(
        network=NetworkConfig(width=1 / 8, init="he", embedding_scale="max"),
        normalisation="log",
        rhemo=RHEmoConfig(width=1 / 8),
        stage1=TrainingConfig(lr=1e-2, batch=12, epochs=10, patience=10),
        stage2=TrainingConfig(lr=1e-3, batch=20, epochs=2, patience=2),
        twin=TrainingConfig(lr=1e-3, epochs=25, patience=25),
        emotion=TrainingConfig(lr=1e-3, epochs=30, patience=30, keep="last"),
    ),
    "paper": Recipe(
        network=NetworkConfig(),
        normalisation="max",
        rhemo=RHEmoConfig(),
        stage1=TrainingConfig(lr=1e-3, batch=50, epochs=200_000, patience=100),
        stage2=TrainingConfig(lr=1e-6, batch=20, epochs=200_000, patience=30, weight_decay=1e-5),
        twin=TrainingConfig(lr=5e-5, batch=300, epochs=500, patience=20),
        emotion=TrainingConfig(),
    ),
}


@dataclass
class Demo:
    """One demo in one folder; every stage that is finished there already is skipped.

    Args:
        folder: for everything that is made.
        recipe: a key of ``RECIPES``.
        seeds: of the emotion trainings.
        workers: trainings at once, one thread each.
    """

    folder: Path
    recipe: str = "small"
    seeds: tuple[int, ...] = (1,)
    workers: int = 2
    stages: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> Path:
        """Do everything; returns the report's path."""
        torch.set_num_threads(1)  # two threads on two cores with anything else to do took three times as long as one
        with self._stage("synthesise the corpus"):
            corpus.make(self.folder / "corpus", workers=self.workers)
        with self._stage("prepare spectrograms"):
            for experiment in (self.twin("word"), self.twin("voice"), next(iter(self.trainings().values()))):
                prepare(read_corpus(experiment.corpus), experiment.features, experiment.cache, workers=self.workers)
        with self._stage("pretrain RH-Emo to reconstruct"):
            pretrain_rhemo(self.rhemo(1), self.folder / "rhemo/stage1", resume=True)
        with self._stage("pretrain RH-Emo with emotions"):
            pretrain_rhemo(self.rhemo(2), self.folder / "rhemo/stage2", resume=True)
        with self._stage("pretrain the voice and the word network"):
            self._train({Path("twins", twin): self.twin(twin) for twin in ("voice", "word")})
        with self._stage("train the emotion networks"):
            self._train(self.trainings())
        with self._stage("probe what the networks know"):
            for path in self.trainings():
                analyse(self.folder / path)
        stages = {"corpus": "synthesised speech (eSpeak NG)", "synthetic": True, "recipe": self.recipe}
        write_json(self.folder / "demo.json", stages | {"stages": self.stages})
        return write_report(self.folder)

    def rhemo(self, stage: int) -> RHEmoExperiment:
        """RH-Emo's training, on the training voices' sentences only."""
        recipe = RECIPES[self.recipe]
        if stage == 1:
            return RHEmoExperiment(
                corpus=self._corpus("sentence", training_voices=True),
                normalisation=recipe.normalisation,
                rhemo=recipe.rhemo,
                training=recipe.stage1,
                cache=self.folder / "cache",
            )
        return replace(
            self.rhemo(1),
            rhemo=replace(recipe.rhemo, beta=0.01),
            training=replace(recipe.stage2, initial=self.folder / "rhemo/stage1"),
        )

    def twin(self, task: str) -> Experiment:
        """The network of an orthogonal task, ``voice`` or ``word``, on the training voices only."""
        spoken = "word" if task == "word" else "sentence"
        return replace(
            self._experiment(),
            corpus=self._corpus(spoken, training_voices=True),
            task="word" if task == "word" else "speaker",
            features=SpectrogramConfig(cut="word" if task == "word" else "audio"),
            training=RECIPES[self.recipe].twin,
        )

    def trainings(self) -> dict[Path, Experiment]:
        """Every emotion training by its folder: from random weights and from each twin, with anti-transfer and without."""
        voices = {part: list(names) for part, names in corpus.VOICES.items()}
        plain = replace(
            self._experiment(),
            corpus=self._corpus("sentence", training_voices=False),
            split=SplitConfig(
                "confounded", train=voices["train"], validation=voices["validation"], test=voices["test"]
            ),
            training=RECIPES[self.recipe].emotion,
        )
        voice, word = self.folder / "twins/voice", self.folder / "twins/word"
        variants: dict[str, tuple[Path | None, AntiTransferConfig]] = {
            "baseline": (None, _at(voice, beta=0)),
            "at-voice": (None, _at(voice)),
            "at-word": (None, _at(word)),
            "from-voice": (voice, _at(voice, beta=0)),
            "from-voice-at-voice": (voice, _at(voice)),
            "from-voice-at-random": (voice, AntiTransferConfig(layers=[LAYER], random_twin=True)),
            "from-word": (word, _at(word, beta=0)),
            "from-word-at-word": (word, _at(word)),
        }
        return {
            Path("emotion", name, f"seed{seed}"): replace(
                plain, anti_transfer=anti_transfer, training=replace(plain.training, initial=initial, seed=seed)
            )
            for seed in self.seeds
            for name, (initial, anti_transfer) in variants.items()
        }

    def _experiment(self) -> Experiment:
        recipe = RECIPES[self.recipe]
        return Experiment(
            normalisation=recipe.normalisation,
            network=replace(recipe.network, rhemo=self.folder / "rhemo/stage2"),
            cache=self.folder / "cache",
        )

    def _corpus(self, kind: str, *, training_voices: bool) -> CorpusConfig:
        where = {"kind": [kind]}
        if training_voices:
            where["speaker"] = list(corpus.VOICES["train"])
        return CorpusConfig("demo", self.folder / "corpus", where)

    def _train(self, trainings: Mapping[Path, Experiment]) -> None:
        """Run trainings side by side, one thread each: faster than one after another with all threads."""
        folders = [self.folder / path for path in trainings]
        with ordered_map(self.workers, __name__, torch.set_num_threads, (1,), chunk=1) as run, bar(True) as progress:
            task = progress.add_task("trainings", total=len(folders))
            for _ in run(_train_quietly, list(trainings.values()), folders):
                progress.advance(task)

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        Console(stderr=True).print(f"[bold]{len(self.stages) + 1}/7 {name}[/bold]")
        started = time.perf_counter()
        yield
        self.stages.append({"name": name, "seconds": time.perf_counter() - started})


def _at(twin: Path, beta: float = 1.0) -> AntiTransferConfig:
    return AntiTransferConfig(twin, [LAYER], beta)


def _train_quietly(experiment: Experiment, folder: Path) -> None:
    name = folder.parent.name if folder.name.startswith("seed") else folder.name
    train_classifier(experiment, folder, resume=True, quiet=True, name=name)
