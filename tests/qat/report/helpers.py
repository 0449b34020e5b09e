"""Invented runs, written as trainings write them, and what a page of a report holds."""

import csv
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qat.config import (
    AntiTransferConfig,
    CorpusConfig,
    Experiment,
    NetworkConfig,
    SplitConfig,
    TrainingConfig,
    to_plain,
)
from qat.report.report import write_report
from qat.results.runs import FinishedRun, RunsFolder

EMOTIONS = ["angry", "happy", "neutral", "sad"]
SEEDS = (1, 2, 3)
PLAIN = Experiment(
    corpus=CorpusConfig("demo", Path("corpus")),
    network=NetworkConfig(width=0.125),
    split=SplitConfig("confounded"),
    training=TrainingConfig(lr=1e-3, epochs=12),
)


def experiment(at: AntiTransferConfig | None = None, initial: Path | None = None) -> Experiment:
    training = replace(PLAIN.training, initial=initial)
    return replace(PLAIN, anti_transfer=at or AntiTransferConfig(), training=training)


SPEAKER = Path("demo/twins/voice")
SETTINGS = {
    "baseline": (experiment(), 0.50),
    "at-voice": (experiment(AntiTransferConfig(SPEAKER, [13])), 0.51),
    "from-voice": (experiment(AntiTransferConfig(SPEAKER, [13], beta=0), SPEAKER), 0.32),
    "from-voice-at-voice": (experiment(AntiTransferConfig(SPEAKER, [13]), SPEAKER), 0.45),
    "from-voice-at-random": (experiment(AntiTransferConfig(None, [13], random_twin=True), SPEAKER), 0.34),
}


class Corpus:
    """Invented test clips and withheld clips, and answers that are right with a probability of the voice's own."""

    def __init__(self, rng: np.random.Generator, voices: int = 9, sentences: int = 5) -> None:
        self.rng = rng
        rows = [
            (f"v{v}/{e}-{s}.wav", f"voice{v}", f"text {s}", e)
            for v in range(voices)
            for s in range(sentences)
            for e in EMOTIONS
        ]
        self.clips = pd.DataFrame(rows, columns=["path", "speaker", "text", "label"])
        self.ease = dict(zip(self.clips["speaker"].unique(), rng.normal(0, 0.1, voices), strict=True))

    def answers(self, part: str, accuracy: float) -> pd.DataFrame:
        chance = np.clip([accuracy + self.ease[v] for v in self.clips["speaker"]], 0, 1)
        right = self.rng.random(len(self.clips)) < chance
        wrong = [str(self.rng.choice([e for e in EMOTIONS if e != label])) for label in self.clips["label"]]
        predicted = np.where(right, self.clips["label"], wrong)
        table = self.clips.assign(part=part, predicted=predicted, p_angry=0.25)
        return table.sample(frac=1, random_state=int(self.rng.integers(1 << 30)))


def judged(table: pd.DataFrame) -> dict[str, Any]:
    confusion = pd.crosstab(table["label"], table["predicted"]).reindex(index=EMOTIONS, columns=EMOTIONS, fill_value=0)
    counts = confusion.to_numpy()
    return {
        "accuracy": float(np.trace(counts) / counts.sum()),
        "uar": float(np.mean(np.diag(counts) / counts.sum(1))),
        "confusion": counts.tolist(),
        "samples": len(table),
    }


def write_run(
    folder: Path, result: dict[str, Any], rng: np.random.Generator, answers: pd.DataFrame | None = None
) -> None:
    folder.mkdir(parents=True)
    epochs = result.get("epochs", 5)
    at = result["experiment"].get("anti_transfer", {})
    with (folder / "metrics.csv").open("w") as file:
        writer = csv.writer(file)
        layer = (at.get("twin") or at.get("random_twin")) and at["layers"][0]
        names = [
            "epoch",
            "seconds",
            "train_total",
            "train_cross_entropy",
            "validation_total",
            "validation_cross_entropy",
        ]
        writer.writerow([*names, "validation_accuracy", *([f"validation_similarity_{layer}"] if layer else [])])
        for e in range(epochs):
            ce, drop = 1.4 * np.exp(-e / 8) + 0.05 * rng.random(), 0.9 * np.exp(-e / 2) * at.get("beta", 0)
            total = ce + drop if layer else ce
            row = [e, 1.2, total, ce, total + 0.1, ce + 0.1, 0.6 - 0.35 * np.exp(-e / 5) + 0.05 * rng.random()]
            writer.writerow([*row, *([0.9 * np.exp(-e / 2) + 0.002] if layer else [])])
    if answers is not None:
        answers.to_csv(folder / "predictions.csv", index=False)
    (folder / "result.json").write_text(json.dumps(result))


def write_demo(
    top: Path, rng: np.random.Generator, seeds: tuple[int, ...] = SEEDS
) -> dict[tuple[str, int], pd.DataFrame]:
    """A folder like the demo's; returns every emotion run's test answers."""
    corpus, kept = Corpus(rng), {}
    common = {"versions": {"torch": "2.13.0"}, "device": "cpu, 1 threads", "kept_epoch": 9, "epochs": 12}
    for name, (settings, accuracy) in SETTINGS.items():
        for seed in seeds:
            answers, withheld = corpus.answers("test", accuracy), corpus.answers("withheld", accuracy - 0.1)
            kept[name, seed] = answers
            plain = to_plain(replace(settings, training=replace(settings.training, seed=seed)))
            result = common | {
                "kind": "classifier",
                "name": name,
                "seed": seed,
                "experiment": plain,
                "classes": EMOTIONS,
                "parts": {"test": judged(answers), "withheld": judged(withheld)},
                "seconds": 14.5 + seed,
                "seconds_per_epoch": 1.2 + seed / 100,
                "peak_memory": 500 * 2**20 + seed,
                "parameters": 160_000,
            }
            folder = top / "emotion" / name / f"seed{seed}"
            write_run(folder, result, rng, pd.concat([answers, withheld]))
            layers = {str(layer): {"voice_probe": rng.random(), "word_probe": rng.random()} for layer in (2, 7, 13)}
            probe = {"shortcut_rate": 0.9 - accuracy + rng.random() / 20, "voice_probe_chance": 1 / 9, "layers": layers}
            (folder / "analysis.json").write_text(json.dumps(probe | layers["13"]))
    for task, name in (("speaker", "voice"), ("word", "word")):
        result = common | {
            "kind": "classifier",
            "name": name,
            "seed": 1,
            "experiment": to_plain(replace(experiment(), task=task)),
            "classes": [f"{name} {n}" for n in range(9)],
            "parts": {"test": {"accuracy": 0.9 + rng.random() / 20, "uar": 0.9, "samples": 200}},
            "seconds": 20.0,
        }
        write_run(top / "twins" / name, result, rng)
    for stage in (1, 2):
        scores = {"reconstruction": 0.126, "constant": 0.55, "live_channels": 4, "samples": 99}
        result = common | {
            "kind": "rhemo",
            "seed": 1,
            "experiment": {},
            "parts": {"test": scores, "validation": scores},
        }
        write_run(top / "rhemo" / f"stage{stage}", result, rng)
    stages = [{"name": "synthesise the corpus", "seconds": 13.1}, {"name": "train", "seconds": 180.0}]
    demo = {"corpus": "synthesised speech (eSpeak NG)", "synthetic": True, "recipe": "small", "stages": stages}
    (top / "demo.json").write_text(json.dumps(demo))
    return kept


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps what is asked about."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr", "base", "embed", "source"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], (tag, self.open)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def runs_in(folder: Path) -> list[FinishedRun]:
    return RunsFolder.read(folder).runs


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))
