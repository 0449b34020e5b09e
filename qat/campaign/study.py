"""One study: every stage of the method, from recordings to a report that compares anti-transfer with doing without.

``qat demo`` runs it on synthesised speech, where every training voice says one emotion almost always, so that a network
may take the voice for the emotion: the shortcut that anti-transfer is meant to remove. The same study runs on recorded
human speech. Networks start from random weights, or from the very network that anti-transfer pushes away from.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from qat.config import (
    AntiTransferConfig,
    AnyExperiment,
    CorpusConfig,
    Experiment,
    NetworkConfig,
    RHEmoConfig,
    RHEmoExperiment,
    SpectrogramConfig,
    SplitConfig,
    Task,
    TrainingConfig,
)
from qat.data.corpora import demo, fillets, hedgewars
from qat.data.store import prepare
from qat.files import write_json
from qat.processes import bar
from qat.report.report import write_report
from qat.results.probes import analyse
from qat.training.classifier import train_classifier
from qat.training.data import read_corpus
from qat.training.loop import peak_memory
from qat.training.rhemo import pretrain_rhemo

LAYER = 13
"""Where anti-transfer is applied: the layer with the largest effect in the feasibility study."""


@dataclass(frozen=True)
class Recipe:
    """The settings of every stage.

    Args:
        network: width, initialisation, dropout and embedding scale of every VGG16.
        twin_dropout: dropout of the orthogonal tasks' networks instead.
        normalisation: of the spectrograms.
        rhemo: the heads' width.
        stage1, stage2: RH-Emo's two trainings.
        voice, word: trainings of the orthogonal tasks' networks.
        emotion: training of the emotion networks.
    """

    network: NetworkConfig
    twin_dropout: float
    normalisation: Literal["max", "log"]
    rhemo: RHEmoConfig
    stage1: TrainingConfig
    stage2: TrainingConfig
    voice: TrainingConfig
    word: TrainingConfig
    emotion: TrainingConfig


# Found by trial: with the paper's rate and initialisation nothing is learnt in minutes. The last emotion state is kept,
# because the lowest loss on unseen voices comes before a network has learnt any shortcut.
_SMALL = Recipe(
    network=NetworkConfig(width=1 / 8, init="he", embedding_scale="max"),
    twin_dropout=0.2,
    normalisation="log",
    rhemo=RHEmoConfig(width=1 / 8),
    stage1=TrainingConfig(lr=1e-2, batch=12, epochs=6, patience=6),
    stage2=TrainingConfig(lr=1e-3, batch=20, epochs=1, patience=1),
    voice=TrainingConfig(lr=5e-4, epochs=25, patience=25),
    word=TrainingConfig(lr=5e-4, epochs=20, patience=20),
    emotion=TrainingConfig(lr=1e-3, epochs=20, patience=20, keep="last"),
)
_PAPER = Recipe(
    network=NetworkConfig(),
    twin_dropout=0.5,
    normalisation="max",
    rhemo=RHEmoConfig(),
    stage1=TrainingConfig(lr=1e-3, batch=50, epochs=200_000, patience=100),
    stage2=TrainingConfig(lr=1e-6, batch=20, epochs=200_000, patience=30, weight_decay=1e-5),
    voice=TrainingConfig(lr=5e-5, batch=300, epochs=1000, patience=20),
    word=TrainingConfig(lr=5e-5, batch=300, epochs=500, patience=20),
    emotion=TrainingConfig(),
)


@dataclass(frozen=True)
class Material:
    """The recordings of a study and what is learnt from which.

    Args:
        description: for the report.
        synthetic: not a human voice.
        obtain: makes or fetches the corpora.
        rhemo, voice, word, emotion: what each network is trained on. None of the first three may hold a voice that the
            emotion networks are validated or tested on.
        word_task: ``word`` for isolated words, ``word-presence`` for lines.
        split: of the emotion corpus, by seed.
        recipes: ``small`` and ``paper``.
    """

    description: str
    synthetic: bool
    obtain: Callable[[], object]
    rhemo: CorpusConfig
    voice: CorpusConfig
    word: CorpusConfig
    emotion: CorpusConfig
    word_task: Task
    split: Callable[[int], SplitConfig]
    recipes: Mapping[str, Recipe]


def synthetic(folder: Path, workers: int | None = None) -> Material:
    """The demo corpus, made in ``folder``; 9 training voices, 3 for validation, 6 for the test."""
    voices = {part: list(names) for part, names in demo.VOICES.items()}

    def spoken(kind: str, **where: list[str]) -> CorpusConfig:
        return CorpusConfig("demo", folder, {"kind": [kind], **where})

    return Material(
        description="synthesised speech (eSpeak NG)",
        synthetic=True,
        obtain=lambda: demo.make(folder, workers=workers),
        rhemo=spoken("sentence", speaker=voices["train"]),
        voice=spoken("sentence", speaker=voices["train"]),
        word=spoken("word", speaker=voices["train"]),
        emotion=spoken("sentence"),
        word_task="word",
        split=lambda seed: SplitConfig(
            "confounded", train=voices["train"], validation=voices["validation"], test=voices["test"]
        ),
        recipes={"small": _SMALL, "paper": _PAPER},
    )


def recorded(folder: Path, packages: Path | None = None) -> Material:
    """Human speech: acted dialogue (fillets) for voices and words, game phrases (hedgewars) for emotions.

    In the emotion corpus the phrase gives the emotion away, so words are the shortcut here; every seed draws new voices
    for the test.

    Args:
        folder: below it the corpora ``fillets`` and ``hedgewars`` are fetched, unless they are there.
        packages: Debian packages downloaded already.
    """

    def obtain() -> None:
        for corpus in (fillets, hedgewars):
            name = corpus.__name__.rpartition(".")[2]
            if not (folder / name).is_dir():
                corpus.fetch(folder / name, from_dir=packages)

    dialogue = CorpusConfig("fillets", folder / "fillets", {"speaker": ["cs-small", "cs-big", "nl-small", "nl-big"]})
    emotions = ["angry", "fear", "happy", "neutral", "sad"]
    small = replace(
        _SMALL,
        stage1=replace(_SMALL.stage1, epochs=3),
        voice=replace(_SMALL.voice, epochs=6),
        word=replace(_SMALL.word, epochs=12),
    )
    return Material(
        description="recorded human speech (Fish Fillets dialogue, Hedgewars phrases)",
        synthetic=False,
        obtain=obtain,
        rhemo=dialogue,
        voice=dialogue,
        word=dialogue,
        emotion=CorpusConfig("hedgewars", folder / "hedgewars", {"emotion": emotions}),
        word_task="word-presence",
        split=lambda seed: SplitConfig("speaker", seed),
        recipes={"small": small, "paper": _PAPER},
    )


@dataclass
class Study:
    """One study in one folder; whatever is finished there already is kept.

    Args:
        folder: for everything that is made.
        material: what is listened to.
        recipe: ``small`` (learns in minutes) or ``paper`` (its settings; days without a GPU).
        seeds: of the emotion trainings.
        workers: trainings at once, one thread each.
    """

    folder: Path
    material: Material
    recipe: str = "small"
    seeds: tuple[int, ...] = (1,)
    workers: int = 2

    def run(self) -> Path:
        """Do everything; returns the report's path."""
        torch.set_num_threads(1)  # two threads on two cores with anything else to do took three times as long as one
        stages: dict[str, Callable[[], int]] = {
            "get the recordings": self._obtain,
            "prepare spectrograms": self._prepare,
            "pretrain RH-Emo to reconstruct": lambda: self._pretrain_rhemo(1),
            "pretrain RH-Emo with emotions": lambda: self._pretrain_rhemo(2),
            "pretrain the networks of voices and words": lambda: self._train(_train, self.twins()),
            "train and probe the emotion networks": lambda: self._train(_train_and_probe, self.trainings()),
        }
        path = self.folder / "demo.json"
        spent = {stage["name"]: stage["seconds"] for stage in _read(path).get("stages", [])}
        about = {"corpus": self.material.description, "synthetic": self.material.synthetic, "recipe": self.recipe}
        done: list[dict[str, Any]] = []
        for number, (name, action) in enumerate(stages.items(), 1):
            Console(stderr=True).print(f"[bold]{number}/{len(stages)} {name}[/bold]")
            started = time.perf_counter()
            peak = action()
            seconds = spent.get(name, 0.0) + time.perf_counter() - started
            done.append({"name": name, "seconds": seconds, "peak_memory": peak})
        write_json(path, about | {"stages": done, "not_run": self.not_run()})
        return write_report(self.folder)

    def not_run(self) -> list[str]:
        """What this study leaves out, in sentences for the report."""
        return []

    def rhemo(self, stage: int) -> RHEmoExperiment:
        """RH-Emo's first or second training."""
        first = RHEmoExperiment(
            corpus=self.material.rhemo,
            normalisation=self._recipe.normalisation,
            rhemo=self._recipe.rhemo,
            training=self._recipe.stage1,
            cache=self.folder / "cache",
        )
        if stage == 1:
            return first
        return replace(
            first,
            rhemo=replace(first.rhemo, beta=0.01),
            training=replace(self._recipe.stage2, initial=self.folder / "rhemo/stage1"),
        )

    def twin(self, task: str) -> Experiment:
        """The network of an orthogonal task, ``voice`` or ``word``."""
        plain = self._experiment()
        plain = replace(plain, network=replace(plain.network, dropout=self._recipe.twin_dropout))
        if task == "voice":
            return replace(plain, corpus=self.material.voice, task="speaker", training=self._recipe.voice)
        return replace(
            plain,
            corpus=self.material.word,
            task=self.material.word_task,
            features=SpectrogramConfig(cut="word" if self.material.word_task == "word" else "audio"),
            training=self._recipe.word,
        )

    def twins(self) -> dict[Path, Experiment]:
        """The networks of the orthogonal tasks by their folders."""
        return {Path("twins", task): self.twin(task) for task in ("word", "voice")}

    def trainings(self) -> dict[Path, Experiment]:
        """Every emotion training by its folder: from random weights and from twins, with anti-transfer or not."""
        voice, word = self.folder / "twins/voice", self.folder / "twins/word"
        variants: dict[str, tuple[Path | None, AntiTransferConfig]] = {
            "baseline": (None, _against(voice, beta=0)),
            "at-voice": (None, _against(voice)),
            "at-word": (None, _against(word)),
            "from-voice": (voice, _against(voice, beta=0)),
            "from-voice-at-voice": (voice, _against(voice)),
            "from-voice-at-random": (voice, AntiTransferConfig(layers=[LAYER], random_twin=True)),
        }
        return {
            Path("emotion", name, f"seed{seed}"): replace(
                self._experiment(),
                corpus=self.material.emotion,
                split=self.material.split(seed),
                anti_transfer=anti_transfer,
                training=replace(self._recipe.emotion, initial=initial, seed=seed),
            )
            for seed in self.seeds
            for name, (initial, anti_transfer) in variants.items()
        }

    @property
    def _recipe(self) -> Recipe:
        return self.material.recipes[self.recipe]

    def _experiment(self) -> Experiment:
        return Experiment(
            normalisation=self._recipe.normalisation,
            network=replace(self._recipe.network, rhemo=self.folder / "rhemo/stage2"),
            cache=self.folder / "cache",
        )

    def _obtain(self) -> int:
        self.material.obtain()
        return _own_memory()

    def _prepare(self) -> int:
        one_of_each: list[AnyExperiment] = [self.rhemo(1), *self.twins().values()]
        one_of_each += list(self.trainings().values())[:1]
        for experiment in one_of_each:
            prepare(read_corpus(experiment.corpus), experiment.features, experiment.cache, workers=self.workers)
        return _own_memory()

    def _pretrain_rhemo(self, stage: int) -> int:
        folder = self.folder / f"rhemo/stage{stage}"
        peak: int = pretrain_rhemo(self.rhemo(stage), folder, resume=True)["peak_memory"]
        return peak

    def _train(self, train: Callable[[Experiment, Path], int], trainings: Mapping[Path, Experiment]) -> int:
        """Run trainings side by side, one thread each: faster than one after another with all threads.

        Returns:
            The most memory that one of them held, in bytes.
        """
        folders = [self.folder / path for path in trainings]
        peaks = [0]
        context, once = multiprocessing.get_context("forkserver"), {"max_tasks_per_child": 1}
        with (
            ProcessPoolExecutor(self.workers, context, torch.set_num_threads, (1,), **once) as pool,
            bar(True) as progress,
        ):
            task = progress.add_task("trainings", total=len(folders))
            try:
                for peak in pool.map(train, list(trainings.values()), folders):
                    peaks.append(peak)
                    progress.advance(task)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return max(peaks)


def _against(twin: Path, beta: float = 1.0) -> AntiTransferConfig:
    return AntiTransferConfig(twin, [LAYER], beta)


def _train(experiment: Experiment, folder: Path) -> int:
    name = folder.parent.name if folder.name.startswith("seed") else folder.name
    peak: int = train_classifier(experiment, folder, resume=True, quiet=True, name=name)["peak_memory"]
    return peak


def _train_and_probe(experiment: Experiment, folder: Path) -> int:
    peak = _train(experiment, folder)
    analyse(folder)
    return peak


def _own_memory() -> int:
    return peak_memory(torch.device("cpu"))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
