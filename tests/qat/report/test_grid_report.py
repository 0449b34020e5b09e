"""The report of a grid against folders of invented runs, whose figures are recomputed here from the raw files."""

import csv
import json
import re
import shutil
import tomllib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from math import isnan
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Self
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from qat.cli import main
from qat.config import (
    AntiTransferConfig,
    CorpusConfig,
    Experiment,
    NetworkConfig,
    RHEmoExperiment,
    SplitConfig,
    TrainingConfig,
    to_plain,
)
from qat.report.report import write_report
from qat.report.view import guess, read_view
from qat.results import paper
from qat.results.runs import RunsFolder
from qat.results.statistics import cluster_interval
from tests.qat.report.helpers import Page, page_of

METHODS = ("none", "single_S", "single_W", "dual_SW", "dual_WS")
SPEAKERS = {
    ("iemocap", "random"): 10,
    ("iemocap", "actor"): 2,
    ("ravdess", "random"): 24,
    ("ravdess", "actor"): 1,
    ("tess", "random"): 2,
    ("tess", "actor"): 1,
}
CLASSES = {"iemocap": 4, "ravdess": 8, "tess": 7}
DEVICE = "NVIDIA H200"


class Plan:
    """A grid on disk: ``plan.csv``, and the runs that are finished."""

    def __init__(self, folder: Path, rng: np.random.Generator) -> None:
        self.folder, self.rng = folder, rng
        self.rows: list[dict[str, str]] = []
        self.clips: dict[tuple[str, str], int] = {}

    def add(
        self, stage: str, *, seed: int | None = 1, address: str | None = None, **labels: object
    ) -> tuple[Path, dict[str, str]]:
        row = {"run": address or f"{len(self.rows):016x}", "stage": stage, "seed": "" if seed is None else str(seed)}
        row |= {key: str(labels.get(key, "")) for key in ("network", "corpus", "split", "at", "layer")}
        words = [stage, row["network"], row["corpus"], row["split"], row["at"]]
        name = " ".join(word for word in words if word)
        row["name"] = f"{name} layer {row['layer']}" if int(row["layer"] or 0) else name
        self.rows.append(row)
        return self.folder / "runs" / row["run"], row

    def write(self) -> Path:
        columns = ["run", "stage", "network", "corpus", "split", "at", "layer", "seed", "name"]
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "plan.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        (self.folder / "campaign.yaml").write_text("preset: paper\nseeds: [1, 2]\n")
        return self.folder

    def emotion(
        self,
        network: str,
        corpus: str,
        split: str,
        at: str,
        layer: int,
        seed: int,
        *,
        read_as: str | None = None,
        validation: float | None = None,
        accuracy: float | None = None,
        done: bool = True,
        address: str | None = None,
    ) -> Path:
        """A training, and unless told otherwise its run, with random answers."""
        labels = {"network": network, "corpus": corpus, "split": split, "at": at, "layer": layer}
        run, row = self.add("emotion", seed=seed, address=address, **labels)
        if not done or run.exists():
            return run
        classes = [f"class{n}" for n in range(CLASSES.get(corpus, 4))]
        twin = Path("runs/speaker") if at != "none" else None
        experiment = Experiment(
            corpus=CorpusConfig(read_as or corpus, Path("corpora")),
            network=NetworkConfig(domain=network),
            split=SplitConfig("paper-actor" if split == "actor" else "random", seed=seed),
            anti_transfer=AntiTransferConfig(twin, [layer or 2]),
            training=TrainingConfig(seed=seed),
        )
        parts = {"train": {"accuracy": 1.0, "samples": 300}}
        parts["validation"] = self.judged(60, classes, validation)[0]
        parts["test"], answers = self.judged(self.size(corpus, split), classes, accuracy)
        real = network == "real"
        seconds = (8 if real else 1) * (1 + (0.02 * layer + 0.1 if layer else 0)) * (1 + 0.1 * self.rng.random())
        memory = int(2**30 * (4 if real else 1) * (1 + 0.01 * layer) * (1 + 0.01 * self.rng.random()))
        self.result(
            run,
            kind="classifier",
            name=row["run"],
            seed=seed,
            experiment=to_plain(experiment),
            classes=classes,
            parts=parts,
            seconds_per_epoch=seconds,
            seconds=seconds * 12,
            peak_memory=memory,
            parameters=165_733_060 if real else 9_998_020,
        )
        self.predictions(run, corpus, split, seed, classes, answers)
        return run

    def size(self, corpus: str, split: str) -> int:
        """Test clips; every seed has the same."""
        return self.clips.setdefault((corpus, split), int(self.rng.integers(50, 90)))

    def judged(self, clips: int, classes: list[str], accuracy: float | None) -> tuple[dict[str, Any], np.ndarray]:
        """The scores of random answers, and `[clips, 2]`: the class of each clip and the answer."""
        truth = np.arange(clips) % len(classes)
        guesses = self.rng.integers(len(classes), size=clips)
        share = self.rng.uniform(0.2, 0.7) if accuracy is None else accuracy
        right = self.rng.permutation(np.arange(clips) < round(share * clips))
        guesses = np.where(guesses == truth, (guesses + 1) % len(classes), guesses)
        answers = np.where(right, truth, guesses)
        counts = np.zeros((len(classes), len(classes)), int)
        np.add.at(counts, (truth, answers), 1)
        recalls = np.diag(counts) / counts.sum(1)
        scores = {
            "accuracy": float(np.float32(right.mean())) if accuracy is None else accuracy,
            "uar": float(recalls.mean()),
            "confusion": counts.tolist(),
            "samples": clips,
        }
        return scores, np.stack([truth, answers], 1)

    def predictions(
        self, run: Path, corpus: str, split: str, seed: int, classes: list[str], answers: np.ndarray
    ) -> None:
        speakers = SPEAKERS.get((corpus, split), 6)
        order = self.rng.permutation(len(answers))  # clips may come in any order
        with (run / "predictions.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["part", "path", "cut", "speaker", "text", "label", "predicted"])
            writer.writerow(["validation", "other.wav", 0, "nobody", "", classes[0], classes[1]])
            for n in order:
                label, predicted = (classes[k] for k in answers[n])
                writer.writerow(["test", f"{corpus}{n}.wav", 0, f"speaker{n % speakers}", "", label, predicted])

    def result(self, run: Path, **result: object) -> None:
        run.mkdir(parents=True)
        versions = {"qat": "0.1.0", "torch": "2.13.0"}
        common = {"versions": versions, "device": DEVICE, "processes": 1, "kept_epoch": 9, "epochs": 12}
        (run / "result.json").write_text(json.dumps(common | result))
        with (run / "metrics.csv").open("w") as file:
            file.write("epoch,train_total,validation_total,validation_accuracy,seconds\n")
            for epoch in range(12):
                loss = 1.4 * np.exp(-epoch / 8) + 0.05 * self.rng.random()
                file.write(f"{epoch},{loss},{loss + 0.1},{0.6 - loss / 5},1.0\n")

    def beforehand(self, *, read_as: str = "iemocap") -> None:
        for stage in ("rhemo-1", "rhemo-2"):
            run, row = self.add(stage, seed=None)
            experiment = to_plain(replace(RHEmoExperiment(), corpus=CorpusConfig(read_as, Path("corpora"))))
            scores = {"reconstruction": 0.126, "constant": 0.55, "live_channels": 4, "samples": 99}
            parts = {"validation": scores, "test": scores}
            self.result(run, kind="rhemo", name=row["run"], seed=1, experiment=experiment, parts=parts, seconds=700.0)
        for stage, network in product(("word", "speaker"), ("real", "quaternion")):
            run, row = self.add(stage, seed=None, network=network)
            corpus = CorpusConfig("librispeech" if stage == "word" else read_as, Path("corpora"))
            experiment = replace(Experiment(), task=stage, corpus=corpus, network=NetworkConfig(domain=network))
            parts = {"test": {"accuracy": 0.9, "uar": 0.88, "samples": 200}}
            labels = {"classes": [f"{stage}{n}" for n in range(5)], "parts": parts, "seconds": 90.0}
            self.result(run, kind="classifier", name=row["run"], seed=1, experiment=to_plain(experiment), **labels)

    def grid(
        self,
        corpora: Iterable[str],
        networks: Iterable[str] = ("real", "quaternion"),
        splits: Iterable[str] = ("random", "actor"),
        methods: Iterable[str] = METHODS,
        layers: Iterable[int] = range(1, 14),
        seeds: Iterable[int] = (1,),
    ) -> Self:
        """Every training of a grid; ``corpora`` may say which corpus is read under which name."""
        read = dict(corpora) if isinstance(corpora, dict) else {name: name for name in corpora}
        for corpus, network, split, at, seed in product(read, networks, splits, methods, seeds):
            for layer in (0,) if at == "none" else layers:
                self.emotion(network, corpus, split, at, layer, seed, read_as=read[corpus])
        return self


SINGLE = ("none", "single_S")
Cell = tuple[str, str, str, str]  # corpus, network, split, method
Key = tuple[str, str, str, str, int]  # and layer


def grid_of(folder: Path) -> paper.PaperGrid:
    grid = paper.PaperGrid.of(RunsFolder.read(folder))
    assert grid is not None
    return grid


class Raw:
    """What the files of a grid say, read and averaged in plain Python."""

    def __init__(self, folder: Path) -> None:
        with (folder / "plan.csv").open(newline="") as file:
            plan = [row for row in csv.DictReader(file) if row["stage"] == "emotion"]
        self.planned: dict[Key, list[str]] = defaultdict(list)
        self.runs: dict[Key, dict[int, dict[str, Any]]] = defaultdict(dict)
        for row in plan:
            key = (row["corpus"], row["network"], row["split"], row["at"], int(row["layer"] or 0))
            self.planned[key].append(row["run"])
            run = folder / "runs" / row["run"]
            if not (run / "result.json").is_file():
                continue
            found = json.loads((run / "result.json").read_text())
            if (run / "predictions.csv").is_file():
                with (run / "predictions.csv").open(newline="") as file:
                    found["answers"] = {
                        answer["path"]: (answer["speaker"], float(answer["label"] == answer["predicted"]))
                        for answer in csv.DictReader(file)
                        if answer["part"] == "test"
                    }
            self.runs[key][int(row["seed"])] = found

    def accuracies(self, key: Key, part: str) -> list[float]:
        return [run["parts"][part]["accuracy"] for run in self.runs[key].values()]

    def mean(self, key: Key, part: str) -> float | None:
        values = self.accuracies(key, part)
        return fmean(values) if values else None

    def layers(self, cell: Cell) -> list[Key]:
        return sorted(key for key in self.planned if key[:4] == cell)

    def best(self, cell: Cell, part: str) -> Key | None:
        """The highest mean of all layers; of equal ones the shallowest."""
        best, most = None, -1.0
        for key in self.layers(cell):
            mean = self.mean(key, part)
            if mean is not None and mean > most + 1e-6:
                best, most = key, mean
        return best

    def pooled(self, key: Key) -> tuple[list[float], list[str]]:
        """Right or wrong, and whose clip, seed after seed, by path."""
        answers = [run["answers"][path] for _, run in sorted(self.runs[key].items()) for path in sorted(run["answers"])]
        return [right for _, right in answers], [speaker for speaker, _ in answers]

    def gain(self, key: Key, base: Key) -> tuple[list[float], list[str]]:
        """Right minus the baseline's right of every clip and seed that both have."""
        differences, speakers = [], []
        for seed in sorted(self.runs[key].keys() & self.runs[base].keys()):
            ours, theirs = self.runs[key][seed]["answers"], self.runs[base][seed]["answers"]
            assert ours.keys() == theirs.keys()
            for path in sorted(ours):
                differences.append(ours[path][1] - theirs[path][1])
                speakers.append(ours[path][0])
        return differences, speakers


@pytest.fixture(scope="module")
def half_finished(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> tuple[Path, Path]:
    """Two seeds, two corpora and the demo; with runs missing and equal."""
    plan = Plan(tmp_path_factory.mktemp("grid"), np.random.default_rng(pytestconfig.option.seed))
    plan.beforehand()
    plan.grid(("iemocap",), splits=("random",), layers=(1, 2, 13), seeds=(1, 2))
    plan.grid(("ravdess",), networks=("quaternion",), layers=(1, 2, 13), seeds=(1, 2))
    plan.grid(("demo",), networks=("quaternion",), splits=("random",), layers=(2, 7), seeds=(1, 2))
    folder = plan.write()
    by_name = defaultdict(dict)
    for row in plan.rows:
        by_name[row["name"]][row["seed"]] = folder / "runs" / row["run"]
    gone = [
        by_name["emotion quaternion iemocap random single_S layer 13"]["2"],
        *by_name["emotion quaternion ravdess actor dual_WS layer 1"].values(),
        *by_name["emotion quaternion ravdess actor none"].values(),
        by_name["emotion quaternion ravdess random none"]["1"],
        *(by_name[f"emotion real iemocap random dual_SW layer {layer}"][s] for layer in (1, 2, 13) for s in "12"),
    ]
    for run in gone:
        shutil.rmtree(run)
    gone[0].mkdir()
    (gone[0] / "error.txt").write_text("ValueError: <no> memory\n\nTraceback (most recent call last):\n  here\n")
    # Equal means of other accuracies, of which float32 makes more at the deeper layer: the shallower wins all the same.
    for layer, values in {1: (0.1, 0.9), 2: (0.9, 0.9), 13: (0.85, 0.95)}.items():
        for seed, value in zip("12", values, strict=True):
            file = by_name[f"emotion quaternion ravdess random single_W layer {layer}"][seed] / "result.json"
            result = json.loads(file.read_text())
            result["parts"]["validation"]["accuracy"] = float(np.float32(value))
            file.write_text(json.dumps(result))
    return folder, write_report(folder)


def read(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / "report-files" / f"{name}.csv")


def same(value: float, expected: float | None) -> bool:
    return isnan(value) if expected is None else value == pytest.approx(expected, abs=1e-9)


def test_table1_is_what_the_files_say(half_finished: tuple[Path, Path]) -> None:
    folder, _ = half_finished
    raw, table = Raw(folder), read(folder, "table1")
    assert len(table) == len({key[:4] for key in raw.planned}) == 25
    empty = with_interval = with_gain = 0
    for row in table.to_dict("records"):
        cell = (row["corpus"], row["network"], row["split"], row["at"])
        keys = raw.layers(cell)
        assert row["planned"] == sum(len(raw.planned[key]) for key in keys)
        assert row["finished"] == sum(len(raw.runs[key]) for key in keys)
        chosen, best = raw.best(cell, "validation"), raw.best(cell, "test")
        if chosen is None:
            assert isnan(row["accuracy"])
            assert isnan(row["layer"])
            empty += 1
            continue
        values = raw.accuracies(chosen, "test")
        assert row["layer"] == chosen[4]
        assert row["seeds"] == len(values)
        assert row["validation_accuracy"] == pytest.approx(raw.mean(chosen, "validation"))
        assert row["accuracy"] == pytest.approx(fmean(values))
        assert same(row["accuracy_sd"], stdev(values) if len(values) > 1 else None)
        assert row["uar"] == pytest.approx(fmean(run["parts"]["test"]["uar"] for run in raw.runs[chosen].values()))
        assert row["test_layer"] == best[4]
        assert row["test_accuracy"] == pytest.approx(raw.mean(best, "test"))
        assert row["optimism"] == pytest.approx(row["test_accuracy"] - row["accuracy"], abs=1e-6)
        assert row["optimism"] >= 0
        right, speakers = raw.pooled(chosen)
        assert fmean(right) == pytest.approx(row["accuracy"], abs=1e-6)
        assert row["speakers"] == len(set(speakers))
        low, high = cluster_interval(right, speakers) or (None, None)
        assert same(row["accuracy_low"], low)
        assert same(row["accuracy_high"], high)
        assert low is None or len(set(speakers)) > 1
        with_interval += low is not None
        base = (*cell[:3], "none", 0)
        shared = raw.runs[chosen].keys() & raw.runs[base].keys()
        if cell[3] == "none" or not shared:
            assert isnan(row["gain"])
            continue
        differences, speakers = raw.gain(chosen, base)
        low, high = cluster_interval(differences, speakers) or (None, None)
        assert row["gain"] == pytest.approx(fmean(differences))
        assert row["gain_seeds"] == len(shared)
        assert same(row["gain_low"], low)
        assert same(row["gain_high"], high)
        with_gain += 1
    assert empty == 2
    assert with_interval > 10
    assert with_gain > 10
    tied = table.query("corpus == 'ravdess' and split == 'random' and at == 'single_W'").iloc[0]
    assert (tied["layer"], tied["validation_accuracy"]) == (2, pytest.approx(0.9))


def test_settings_may_share_a_training(tmp_path: Path, rng: np.random.Generator) -> None:
    plan = Plan(tmp_path, rng)
    for layer, seed in product((1, 2, 13), (1, 2)):  # position pool5 knows no layers
        plan.emotion("real", "tess", "random", "single_S", layer, seed, address=f"{0xABC0 + seed:016x}")
    for seed in (1, 2):
        plan.emotion("real", "tess", "random", "none", 0, seed, done=seed == 1)
    grid = grid_of(plan.write())
    assert (grid.planned, grid.finished) == (4, 3)
    row = paper.table1(grid).set_index("at").loc["single_S"]
    assert (row["layer"], row["test_layer"], row["finished"], row["planned"]) == (1, 1, 6, 6)
    differences, _ = Raw(tmp_path).gain(*(("tess", "real", "random", *rest) for rest in (("single_S", 1), ("none", 0))))
    assert row["gain"] == pytest.approx(fmean(differences))
    assert row["gain_seeds"] == 1


def test_the_papers_figures_stand_beside_its_corpora_only(half_finished: tuple[Path, Path]) -> None:
    folder, _ = half_finished
    with (Path(paper.__file__).parent / "paper_table1.csv").open() as file:
        theirs = {(row["corpus"].lower(), row["network"][:4], row["at_type"]): row for row in csv.DictReader(file)}
    for row in read(folder, "table1").to_dict("records"):
        stated = theirs.get((row["corpus"], row["network"][:4], row["at"]))
        if stated is None:
            assert row["corpus"] == "demo"
            assert all(isnan(row[name]) for name in ("paper_accuracy", "difference", "paper_gain", "paper_parameters"))
            continue
        value = float(stated[f"acc_{row['split']}"]) / 100
        assert row["paper_accuracy"] == pytest.approx(value)
        assert row["paper_layer"] == int(stated[f"layer_{row['split']}"] or 0)
        assert row["paper_parameters"] == float(stated["params"])
        assert same(row["difference"], None if isnan(row["accuracy"]) else row["accuracy"] - value)


def test_layers_are_what_the_files_say(half_finished: tuple[Path, Path]) -> None:
    folder, _ = half_finished
    raw, table = Raw(folder), read(folder, "layers")
    assert len(table) == len(raw.planned)
    for row in table.to_dict("records"):
        key = (row["corpus"], row["network"], row["split"], row["at"], row["layer"])
        for part, name in (("validation", "validation_accuracy"), ("test", "accuracy")):
            values = raw.accuracies(key, part)
            assert same(row[name], fmean(values) if values else None)
            deviation = row["accuracy_sd" if part == "test" else "validation_sd"]
            assert same(deviation, stdev(values) if len(values) > 1 else None)
        assert (row["planned"], row["seeds"]) == (len(raw.planned[key]), len(raw.runs[key]))
        assert row["chosen"] == (raw.best(key[:4], "validation") == key)
        assert row["best_by_test"] == (raw.best(key[:4], "test") == key)


def test_figure2_averages_over_corpora_that_have_every_run(tmp_path: Path, rng: np.random.Generator) -> None:
    plan = Plan(tmp_path, rng).grid(("iemocap", "tess", "ravdess", "demo"), layers=(2, 7), seeds=(1, 2))
    folder = plan.write()
    # One seed is enough; without any, the corpus is out, of this network alone.
    for row in plan.rows:
        one = (row["corpus"], row["network"], row["split"], row["at"], row["layer"])
        if one == ("tess", "real", "actor", "single_W", "7") or (
            one == ("iemocap", "real", "actor", "single_W", "7") and row["seed"] == "1"
        ):
            shutil.rmtree(folder / "runs" / row["run"])
    table = figure2_of(folder)
    raw = Raw(folder)
    expected = {}
    for corpora, network in (
        (["iemocap", "ravdess"], "real"),
        (["iemocap", "ravdess", "tess"], "quaternion"),
        (["demo"], "real"),
        (["demo"], "quaternion"),
    ):
        named, lines = "+".join(corpora), defaultdict(list)
        for split, at, layer in [
            *product(("random", "actor"), ("single_S", "single_W"), (2, 7)),
            *product(("random", "actor"), ("none",), (0,)),
        ]:
            mean = fmean(raw.mean((corpus, network, split, at, layer), "test") for corpus in corpora)
            expected[network, split, at, layer, named] = mean
            if at != "none":
                lines[layer].append(mean)
        for layer, values in lines.items():
            expected[network, "", "mean", layer, named] = fmean(values)
    assert table.keys() == expected.keys()
    assert table == pytest.approx(expected)


def figure2_of(folder: Path) -> dict[tuple[Any, ...], float]:
    grid = grid_of(folder)
    layers = paper.layers(grid)
    parts = [paper.figure2(layers[layers["corpus"].isin(c)]) for c in (["iemocap", "ravdess", "tess"], ["demo"])]
    rows = pd.concat(parts).to_dict("records")
    return {
        tuple(row[name] for name in ("network", "split", "at", "layer", "corpora")): row["accuracy"] for row in rows
    }


def kinds(cells: list[Cell]) -> dict[str, list[Cell]]:
    """What the paper averages over, of cells (corpus, network, split, at)."""
    return {
        "all": cells,
        **{name: [c for c in cells if c[1] == name] for name in ("real", "quaternion")},
        **{name: [c for c in cells if c[3].startswith(name)] for name in ("single", "dual")},
        **{name: [c for c in cells if c[2] == name] for name in ("random", "actor")},
        **{name: [c for c in cells if c[0] == name] for name in ("iemocap", "ravdess", "tess", "demo")},
        "single speaker": [c for c in cells if c[3] == "single_S"],
        "single word": [c for c in cells if c[3] == "single_W"],
    }


def test_gains_are_means_over_cells(half_finished: tuple[Path, Path]) -> None:
    folder, _ = half_finished
    raw, table = Raw(folder), read(folder, "gains")
    for corpora in (["iemocap", "ravdess"], ["demo"]):
        found = {}
        for key in {key[:4] for key in raw.planned if key[0] in corpora and key[3] != "none"}:
            chosen, base = raw.best(key, "validation"), (*key[:3], "none", 0)
            if chosen and raw.runs[chosen].keys() & raw.runs[base].keys():
                found[key] = fmean(raw.gain(chosen, base)[0])
        assert found
        rows = table[table["corpora"] == "+".join(corpora)].set_index("what").to_dict("index")
        for what, cells in kinds(list(found)).items():
            if what in rows or cells:
                assert rows[what]["cells"] == len(cells)
                assert same(rows[what]["gain"], fmean(found[cell] for cell in cells) if cells else None)
        if corpora == ["demo"]:
            assert all(
                isnan(row[name]) for row in rows.values() for name in ("paper_same", "paper_table", "paper_text")
            )


def test_the_papers_table_as_runs_gives_the_papers_recomputed_gains(tmp_path: Path, rng: np.random.Generator) -> None:
    plan = Plan(tmp_path, rng)
    with (Path(paper.__file__).parent / "paper_table1.csv").open() as file:
        for row, split in product(list(csv.DictReader(file)), ("random", "actor")):
            network = "quaternion" if row["network"] == "quat" else row["network"]
            layer, accuracy = int(row[f"layer_{split}"] or 0), float(row[f"acc_{split}"]) / 100
            run = plan.emotion(network, row["corpus"].lower(), split, row["at_type"], layer, 1, accuracy=accuracy)
            (run / "predictions.csv").unlink()  # of so many clips nobody gives 97.62 %
    table = paper.table1(grid_of(plan.write()))
    assert len(table) == 60
    assert (table["difference"].abs() < 1e-9).all()
    assert (table["layer"] == table["paper_layer"]).all()
    rows = paper.gains(table).set_index("what")
    recomputed = {"all": 4.31, "real": 3.82, "quaternion": 4.81, "single": 4.08, "dual": 4.55, "random": 4.29}
    recomputed |= {"actor": 4.34, "iemocap": 3.01, "ravdess": 6.17, "tess": 3.76, "single speaker": 4.33}
    recomputed |= {"single word": 3.82}
    for what, points in recomputed.items():
        for column in ("gain", "paper_same", "paper_table"):
            assert 100 * rows[column][what] == pytest.approx(points, abs=0.0051)
    stated = {"real": 3.66, "quaternion": 2.6, "single": 3.12, "dual": 3.15, "random": 3.82, "actor": 2.45}
    stated |= {"iemocap": 3.01, "ravdess": 2.62, "tess": 3.77, "single speaker": 2.93, "single word": 3.33}
    assert (100 * rows["paper_text"]).dropna().to_dict() == pytest.approx(stated)


def test_time_and_memory_are_compared_on_one_device(tmp_path: Path, rng: np.random.Generator) -> None:
    plan = Plan(tmp_path, rng).grid(("tess",), splits=("random",), methods=SINGLE, layers=(2, 7), seeds=(1, 2))
    folder = plan.write()
    moved = next(row for row in plan.rows if row["name"] == "emotion real tess random single_S layer 7")
    file = folder / "runs" / moved["run"] / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"device": "cpu, 2 threads"}))
    costs: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for planned in plan.rows:
        result = json.loads((folder / "runs" / planned["run"] / "result.json").read_text())
        costs[result["device"], planned["network"], planned["at"], int(planned["layer"])].append(result)
    write_report(folder)
    table = read(folder, "resources")
    assert len(table) == len(costs) == 7
    time: dict[tuple[Any, ...], float] = {}
    memory: dict[tuple[Any, ...], int] = {}
    for row in table.to_dict("records"):
        key = (row["device"], row["network"], row["at"], row["layer"])
        time[key] = fmean(result["seconds_per_epoch"] for result in costs[key])
        memory[key] = max(result["peak_memory"] for result in costs[key])
        assert (row["epoch_seconds"], row["peak_memory"]) == (pytest.approx(time[key]), memory[key])
        assert (row["seeds"], row["train_clips"]) == (len(costs[key]), 300)
    ratios = read(folder, "ratios")
    seen = 0
    for row in ratios.to_dict("records"):
        key = (row["device"], row["network"], row["at"], row["layer"])
        other = (key[0], "real", *key[2:]) if row["what"] == "quaternion / real" else (*key[:2], "none", 0)
        assert row["epoch_seconds"] == pytest.approx(time[key] / time[other])
        assert row["peak_memory"] == pytest.approx(memory[key] / memory[other])
        seen += 1
    assert seen == 3 + 4  # nothing on the CPU has anything to be compared with
    page = Page((folder / "report.html").read_text())
    for what, network in (("quaternion / real", "quaternion"), ("AT / no AT", "real")):
        mine = ratios[(ratios["what"] == what) & (ratios["network"] == network)]["epoch_seconds"]
        (cells,) = [c for c in page.rows if c[0].startswith(what) and "quaternion net" not in c[0] and "time" in c[1]]
        assert cells[2:] == [
            DEVICE,
            "×0.195 (−80.5 %)" if what == "quaternion / real" else "×2.8 (+180.0 %)",
            f"×{mine.mean():.3g} ({100 * mine.mean() - 100:+.1f} %)".replace("-", "−"),
            f"×{mine.min():.3g} to ×{mine.max():.3g}",
            str(len(mine)),
        ]


def test_the_page_shows_what_table1_holds(half_finished: tuple[Path, Path]) -> None:
    folder, out = half_finished
    page = Page(out.read_text(encoding="utf-8"))
    names = {"iemocap": "IEMOCAP", "ravdess": "RAVDESS", "tess": "TESS", "demo": "demo (synthesised)"}
    head = ["Corpus", "Network, split", "no AT", "single S", "single W", "dual SW", "dual WS"]
    first = page.rows.index(head)
    rows = {(cells[0], cells[1].split("1")[0].split("9")[0]): cells for cells in page.rows[first + 1 : first + 6]}
    for row in read(folder, "table1").to_dict("records"):
        cells = rows[names[row["corpus"]], f"{row['network']}, {row['split']}"]
        cell = cells[2 + METHODS.index(row["at"])]
        if isnan(row["accuracy"]):
            assert cell == f"{row['finished']} of {row['planned']}"
            continue
        shown = f"{100 * row['accuracy']:.1f}"
        shown += "" if isnan(row["accuracy_sd"]) else f" ± {100 * row['accuracy_sd']:.1f}"
        shown += f" ({row['layer']:.0f})" if row["layer"] else ""
        if not isnan(row["accuracy_low"]):
            shown += f"{100 * row['accuracy_low']:.1f} to {100 * row['accuracy_high']:.1f}"
        if row["corpus"] != "demo":
            layer = f" ({row['paper_layer']:.0f})" if row["paper_layer"] else ""
            shown += f"paper {100 * row['paper_accuracy']:.1f}{layer}{100 * row['difference']:+.1f}".replace("-", "−")
        assert cell == shown
    assert "relu (after ReLU, before pooling)" in page.text
    assert rows["IEMOCAP", "real, random"][1] == "real, random"
    common = "Common to all rows: beta 1.0, anti-transfer loss one cosine per sample, learning rate 1e-05, batch 20"
    assert common in page.text
    assert "Parameters: real 165,733,060, the paper's 1.6e8; quaternion 9,998,020" in page.text


def test_the_page_says_what_is_real_and_what_is_missing(half_finished: tuple[Path, Path]) -> None:
    folder, out = half_finished
    page = Page(out.read_text(encoding="utf-8"))
    with (folder / "plan.csv").open() as file:
        runs = {row["run"] for row in csv.DictReader(file)}
    finished = sum((folder / "runs" / run / "result.json").is_file() for run in runs)
    assert f"Preset paper. {finished} of {len(runs)} trainings are finished, with the seeds 1, 2." in page.text
    assert "Every accuracy on demo (synthesised) was measured on synthesised speech" in page.text
    assert "its results cannot be compared with the paper's." in page.text
    assert "1 training failed" in page.text
    assert "ValueError: <no> memory" in page.text
    assert ["RAVDESS", "quaternion, actor", "0 of 2", *["6 of 6"] * 3, "4 of 6"] in page.rows
    assert "Only one test speaker, so no interval: RAVDESS actor" in page.text
    text = out.read_text(encoding="utf-8")
    captions = re.findall(r"<(?:caption|figcaption)>(.*?)</(?:caption|figcaption)>", text)
    assert all("(synthesised)" in caption for caption in captions if "demo" in caption and "corpus.name" not in caption)


def test_the_page_is_one_file_that_asks_for_nothing(half_finished: tuple[Path, Path]) -> None:
    folder, out = half_finished
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert "http" not in text.lower()
    assert not {"script", "link", "iframe", "object", "base", "img", "image"} & {tag for tag, _ in page.seen}
    links = [v for _, a in page.seen for n, v in a.items() if n in ("src", "href", "xlink:href") and v]
    assert all(link.startswith("#") for link in links)
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    ids = [attributes["id"] for _, attributes in page.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links} <= set(ids)
    assert out.stat().st_size < 4_000_000
    drawn = {file.stem for file in (folder / "report-files").glob("*.svg")}
    assert drawn == {file.stem for file in (folder / "report-files").glob("*.png")}
    assert len(drawn) == sum(tag == "svg" for tag, _ in page.seen)
    assert {"figure2-paper", "layers-demo", "losses-ravdess-actor", "confusions-iemocap-random"} <= drawn
    for name in drawn:
        ElementTree.parse(folder / "report-files" / f"{name}.svg")


def test_a_corpus_is_what_was_read_whatever_the_plan_calls_it(tmp_path: Path, rng: np.random.Generator) -> None:
    plan = Plan(tmp_path, rng)
    plan.beforehand(read_as="demo")
    read_as = {"tess": "demo", "savee": "savee"}
    plan.grid(read_as, networks=("quaternion",), splits=("random",), methods=SINGLE, layers=(2,))
    out = write_report(plan.write())
    table, page = read(tmp_path, "table1"), Page(out.read_text(encoding="utf-8"))
    assert dict(zip(table["corpus"], table["kind"], strict=True)) == {"tess": "synthesised", "savee": "recorded"}
    assert table[["paper_accuracy", "difference", "paper_gain"]].isna().all(axis=None)
    assert read(tmp_path, "gains")["paper_table"].isna().all()
    assert "TESS (synthesised)" in page.text
    assert "trained beforehand (rhemo-1, rhemo-2, speaker) learnt from synthesised speech" in page.text
    assert set(read(tmp_path, "figure2")["corpora"]) == {"tess", "savee"}  # never averaged with each other


def test_accuracy_over_batches_and_outputs_without_a_class_are_minded(tmp_path: Path, rng: np.random.Generator) -> None:
    plan = Plan(tmp_path, rng).grid(("tess",), networks=("real",), splits=("random",), methods=("none",))
    file = tmp_path / "runs" / plan.rows[0]["run"] / "result.json"
    result = json.loads(file.read_text())
    assert "means over batches" not in read_view(plan.write()).conventions()
    result["experiment"]["training"]["accuracy"] = "batches"
    result["classes"].append("unused-8")
    file.write_text(json.dumps(result))
    view = read_view(tmp_path)
    assert "means over batches (training.accuracy batches)" in view.conventions()
    assert guess(view.grid.runs_on("tess")) == pytest.approx(100 / 7)


@pytest.mark.parametrize("beforehand", [False, True])
def test_a_grid_without_a_finished_emotion_training_has_a_report(
    tmp_path: Path, rng: np.random.Generator, beforehand: bool
) -> None:
    plan = Plan(tmp_path, rng)
    if beforehand:
        plan.beforehand()
    plan.emotion("real", "iemocap", "random", "none", 0, 1, done=False)
    plan.emotion("real", "iemocap", "random", "single_S", 2, 1, done=False)
    page = page_of(plan.write())
    assert f"{6 * beforehand} of {2 + 6 * beforehand} trainings are finished" in page.text
    assert ["IEMOCAP", "real, random", "0 of 1", "0 of 1"] in page.rows
    assert read(tmp_path, "table1")["accuracy"].isna().all()


def test_the_same_runs_give_the_same_bytes(tmp_path: Path, rng: np.random.Generator) -> None:
    plan = Plan(tmp_path / "grid", rng)
    plan.grid(("tess",), networks=("real",), splits=("random",), methods=SINGLE, layers=(2,))
    first, again = write_report(plan.write()), write_report(tmp_path / "grid", tmp_path / "again" / "page.html")
    assert again.read_bytes() == first.read_bytes()
    for file in sorted((tmp_path / "grid/report-files").iterdir()):
        assert (tmp_path / "again/page-files" / file.name).read_bytes() == file.read_bytes()
    assert not list(tmp_path.rglob("*.part"))


def test_the_command_prints_table_1_and_gives_it_as_json(
    tmp_path: Path, rng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan(tmp_path, rng)
    plan.grid(("tess", "demo"), networks=("quaternion",), splits=("random",), methods=SINGLE, layers=(2,))
    folder = plan.write()
    shutil.rmtree(folder / "runs" / next(row for row in plan.rows if row["at"] == "none")["run"])
    assert main(["report", str(folder), "--json"]) == 0
    given = json.loads(capsys.readouterr().out)
    rows = {(row["corpus"], row["at"]): row for row in given["table1"]}
    accuracies = {
        key: Raw(folder).mean((key[0], "quaternion", "random", key[1], 2 * (key[1] != "none")), "test") for key in rows
    }
    assert {key: row["accuracy"] for key, row in rows.items()} == accuracies
    assert rows["tess", "none"]["accuracy"] is None
    assert rows["demo", "single_S"]["paper_accuracy"] is None
    assert given["synthesised"] == ["demo"]
    assert main(["report", str(folder)]) == 0
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines() if line.strip()]
    shown = {key: f"{100 * value:.1f}" for key, value in accuracies.items() if value is not None}
    assert ["tess", "quat", "random", "0", "of", "1", shown["tess", "single_S"], "(2)"] in lines
    assert ["demo", "quat", "random", shown["demo", "none"], shown["demo", "single_S"], "(2)"] in lines
    assert "synthesised, not comparable with the paper: demo" in text
    assert str(folder / "report.html") in text.replace("\n", "")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "plans no training"),
        ("a,emotion,real,tess,random,none,0,1\n", "lacks the column name"),
        ("a,emotion,real,tess,random,none,0,one,x\n", "line 2: seed 'one' must be a number or empty"),
        (
            "a,emotion,real,tess,random,none,0,1,x\nb,emotion,real,tess,random,none,0,1,x\n",
            "has 'x' with the seed 1 twice",
        ),
    ],
)
def test_a_bad_plan_is_named(tmp_path: Path, rows: str, message: str) -> None:
    (tmp_path / "plan.csv").write_text("run,stage,network,corpus,split,at,layer,seed,name\n" + rows)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'plan.csv'}: ") + ".*" + re.escape(message)):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_papers_table_and_the_templates_are_shipped() -> None:
    assert len(paper.published()) == 60
    with Path("pyproject.toml").open("rb") as file:
        shipped = tomllib.load(file)["tool"]["setuptools"]["package-data"]["qat"]
    templates = Path(paper.__file__).parents[1] / "report/templates"
    expected = {
        f"report/{path.relative_to(templates.parent).parent.as_posix()}/*.j2" for path in templates.rglob("*.j2")
    }
    assert {"results/*.csv", *expected} <= set(shipped)


def test_the_verdict_is_of_recorded_speech_where_there_is_any(half_finished: tuple[Path, Path]) -> None:
    folder, out = half_finished
    start = Page(out.read_text(encoding="utf-8")).text.partition("What is recorded speech")[0]
    table = read(folder, "table1").query("kind == 'paper' and gain.notna()")
    assert (
        f"On IEMOCAP, RAVDESS, anti-transfer is above the baseline in {(table['gain'] > 0).sum()} of {len(table)}"
        in start
    )
    assert f"by {100 * table['gain'].mean():+.1f} points on average".replace("-", "−") in start
