"""The report against folders of invented runs whose figures are recomputed here."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from qat.config import AntiTransferConfig, CorpusConfig, to_plain
from qat.files import held, lock_of
from qat.report import figures
from qat.report.report import write_report
from qat.results.record import Result
from qat.results.runs import FinishedRun, group_runs, made_with
from qat.results.statistics import cluster_interval
from qat.results.tables import seed_differences, summary_table
from qkernels.losses import CKA, FoldedRowwise, GramPosition, MseSigmoid
from tests.qat.report.helpers import (
    EMOTIONS,
    PLAIN,
    SEEDS,
    SETTINGS,
    SPEAKER,
    Corpus,
    Page,
    experiment,
    judged,
    page_of,
    runs_in,
    write_demo,
    write_run,
)

Demo = tuple[Path, dict[tuple[str, int], pd.DataFrame], Path, Page]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Demo:
    top = tmp_path_factory.mktemp("demo")
    answers = write_demo(top, np.random.default_rng(pytestconfig.option.seed))
    out = write_report(top)
    return top, answers, out, Page(out.read_text(encoding="utf-8"))


def right(table: pd.DataFrame) -> pd.Series:
    return (table["label"] == table["predicted"]).astype(float)


def by_clip(answers: dict[tuple[str, int], pd.DataFrame], name: str) -> pd.DataFrame:
    tables = [answers[name, seed].assign(seed=seed) for seed in SEEDS]
    return pd.concat(tables).sort_values(["seed", "path"]).reset_index(drop=True)


def test_summary_csv_holds_the_figures_recomputed_from_the_answers(demo: Demo) -> None:
    top, answers, out, _ = demo
    assert out == top / "report.html"
    table = pd.read_csv(top / "summary.csv").set_index("name")
    bases = {
        "at-voice": "baseline",
        "from-voice-at-voice": "from-voice",
        "from-voice-at-random": "from-voice",
    }
    for name in SETTINGS:
        each = [right(answers[name, seed]).mean() for seed in SEEDS]
        row, pooled = table.loc[name], by_clip(answers, name)
        assert row["accuracy"] == pytest.approx(np.mean(each))
        assert row["accuracy_sd"] == pytest.approx(np.std(each, ddof=1))
        interval = cluster_interval(right(pooled), list(pooled["speaker"]))
        assert (row["accuracy_low"], row["accuracy_high"]) == pytest.approx(tuple(interval))
        assert row["speakers"] == 9
        assert row["seeds"] == 3
        assert row["epoch_seconds"] == pytest.approx(1.22)
        assert row["peak_memory"] == 500 * 2**20 + 3
        assert row["kept_epoch"] == 10
        if name not in bases:
            assert row[["baseline", "difference", "difference_low"]].isna().all()
            continue
        base = by_clip(answers, bases[name])
        assert (base[["seed", "path"]] == pooled[["seed", "path"]]).all(axis=None)
        apart = right(pooled) - right(base)
        assert row["baseline"] == bases[name]
        assert row["difference"] == pytest.approx(apart.mean())
        interval = cluster_interval(apart, list(pooled["speaker"]))
        assert (row["difference_low"], row["difference_high"]) == pytest.approx(tuple(interval))
    assert list(table.index[:5]) == list(SETTINGS)[:3] + list(SETTINGS)[3:]
    assert table.loc["rhemo/stage1", "reconstruction"] == 0.126
    assert table.loc["twins/voice", "task"] == "speaker"


def test_the_page_shows_what_summary_csv_holds(demo: Demo) -> None:
    top, _, _, page = demo
    table = pd.read_csv(top / "summary.csv").set_index("name")
    for name in SETTINGS:
        row = table.loc[name]
        cells = next(cells for cells in page.rows if cells[0] == name)
        assert f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_sd']:.1f}" in cells
        assert f"{100 * row['accuracy_low']:.1f} to {100 * row['accuracy_high']:.1f}" in cells
        assert f"{100 * row['withheld_accuracy']:.1f}" in cells
        if row["difference"] == row["difference"]:
            shown = [f"{100 * row[c]:+.1f}" for c in ("difference", "difference_low", "difference_high")]
            assert "{} [{}, {}]".format(*shown).replace("-", "−") in cells
    at = next(cells for cells in page.rows if cells[0] == "from-voice-at-voice")
    assert at[1] == "voice"
    assert at[2] == "layer 13 (after ReLU, before pooling), beta 1, twin voice, one cosine per sample"
    assert any("random twin (control)" in cells[2] for cells in page.rows if cells[0] == "from-voice-at-random")
    assert any("watched, beta 0" in cells[2] for cells in page.rows if cells[0] == "from-voice")


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"layers": [2, 7], "beta": [1.0, 0.5]}, "layers 2+7 (after ReLU, before pooling), beta 1+0.5, "),
        ({"layers": [2, 7], "beta": [0.0, 0.0]}, "none (layers 2+7 watched, beta 0)"),
        ({"loss": GramPosition(centred=True)}, "one cosine per sample, over positions, centred"),
        ({"loss": CKA()}, "one cosine per batch, over samples, centred"),
        ({"loss": FoldedRowwise("product")}, "batch-folded, row-wise cosine, product"),
        ({"loss": MseSigmoid("max")}, "squared difference of maps, max"),
    ],
)
def test_what_was_compared_is_said(settings: dict[str, Any], shown: str, tmp_path: Path) -> None:
    run = experiment(AntiTransferConfig(twin=Path("twins/voice"), **settings))
    result = {"kind": "classifier", "seed": 1, "experiment": to_plain(run)}
    (tmp_path / "result.json").write_text(json.dumps(result))
    (found,) = runs_in(tmp_path)
    assert shown in found.anti_transfer
    assert found.transfers == (settings.get("beta") != [0.0, 0.0])


def test_confusions_are_summed_over_seeds(demo: Demo) -> None:
    _, answers, _, page = demo
    for name in SETTINGS:
        pooled = by_clip(answers, name)
        for label, predicted in product(EMOTIONS, EMOTIONS):
            row = pooled[pooled["label"] == label]
            count = int((row["predicted"] == predicted).sum())
            assert f"{count} {100 * count / len(row):.0f} %" in page.text


def test_the_page_is_one_file_that_asks_for_nothing(demo: Demo) -> None:
    _, _, out, page = demo
    text = out.read_text(encoding="utf-8")
    assert "http" not in text.lower()
    assert not {"script", "link", "iframe", "object", "base", "img", "image"} & {tag for tag, _ in page.seen}
    assert all(
        value is None or value.startswith("#")
        for _, attributes in page.seen
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "action", "data")
    )
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    ids = [attributes["id"] for _, attributes in page.seen if "id" in attributes]
    targets = {v[1:] for _, a in page.seen for n, v in a.items() if n in ("href", "xlink:href") and v}
    assert targets <= set(ids)
    assert out.stat().st_size < 2_000_000
    assert sum(tag == "svg" for tag, _ in page.seen) == sum(tag == "figcaption" for tag, _ in page.seen) == 7


def test_differences_over_seeds_are_those_of_the_same_seed_and_layer(demo: Demo) -> None:
    top, _, _, page = demo
    table = pd.read_csv(top / "differences.csv")
    compared = {
        "at-voice": {"baseline": "baseline"},
        "from-voice-at-voice": {"baseline": "from-voice", "control": "from-voice-at-random"},
        "from-voice-at-random": {"baseline": "from-voice"},
    }
    pairs = table[["name", "against", "other"]].drop_duplicates().itertuples(index=False)
    assert {tuple(pair) for pair in pairs} == {
        (name, against, other) for name, others in compared.items() for against, other in others.items()
    }

    def read(name: str, measure: str) -> np.ndarray:
        figures = []
        for seed in SEEDS:
            folder = top / "emotion" / name / f"seed{seed}"
            parts = json.loads((folder / "result.json").read_text())["parts"]
            analysis = json.loads((folder / "analysis.json").read_text())
            figures.append(
                {
                    "accuracy": parts["test"]["accuracy"],
                    "withheld_accuracy": parts["withheld"]["accuracy"],
                    "shortcut_rate": analysis["shortcut_rate"],
                    "voice_probe": analysis["layers"]["13"]["voice_probe"],
                    "word_probe": analysis["layers"]["13"]["word_probe"],
                }[measure]
            )
        return np.array(figures)

    for row in table.to_dict("records"):
        d = read(row["name"], row["measure"]) - read(row["other"], row["measure"])
        assert row["mean"] == pytest.approx(d.mean())
        half = 4.3026527 * d.std(ddof=1) / 3**0.5  # Student's t with 2 degrees of freedom
        assert (row["low"], row["high"]) == pytest.approx((d.mean() - half, d.mean() + half))
        assert (row["rose"], row["fell"], row["seeds"]) == (sum(d > 0), sum(d < 0), 3)
    for _, same in table.groupby(["against", "measure"]):
        ranked = sorted(same["p"])
        for p, q in zip(same["p"], same["q"], strict=True):
            assert q == pytest.approx(
                min(len(ranked) * ranked[k] / (k + 1) for k in range(ranked.index(p), len(ranked)))
            )
    assert "What anti-transfer changed, over seeds" in " ".join(page.words)


def test_probes_are_compared_at_the_layer_of_anti_transfer(demo: Demo, tmp_path: Path) -> None:
    shutil.copytree(demo[0] / "emotion", tmp_path / "emotion")
    for seed in SEEDS:
        file = tmp_path / "emotion/at-voice" / f"seed{seed}" / "result.json"
        result = json.loads(file.read_text())
        result["experiment"]["anti_transfer"]["layers"] = [2]
        file.write_text(json.dumps(result))
    table = seed_differences(runs_in(tmp_path)).set_index(["name", "against", "measure"])
    layers = {
        name: [
            json.loads((tmp_path / "emotion" / name / f"seed{s}" / "analysis.json").read_text())["layers"]["2"]
            for s in SEEDS
        ]
        for name in ("at-voice", "baseline")
    }
    expected = np.mean([a["voice_probe"] - b["voice_probe"] for a, b in zip(*layers.values(), strict=True)])
    assert table.loc[("at-voice", "baseline", "voice_probe"), "mean"] == pytest.approx(expected)


def test_ids_are_unique_in_the_page(demo: Demo) -> None:
    ids = [attributes["id"] for _, attributes in demo[3].seen if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_synthesised_speech_is_said_wherever_accuracy_is(demo: Demo) -> None:
    _, _, out, page = demo
    text = out.read_text(encoding="utf-8")
    captions = re.findall(r"<(?:caption|figcaption)>(.*?)</(?:caption|figcaption)>", text)
    about = [caption for caption in captions if "ccuracy" in caption or "true class" in caption]
    assert len(about) >= 4
    assert all("ynthesised speech" in caption for caption in about)
    assert "Every accuracy below was measured on synthesised speech" in page.text
    assert "no evidence that anything was removed" in page.text
    assert "9 speakers" in page.text
    assert "3 seeds" in page.text


def test_the_same_runs_give_the_same_bytes(tmp_path: Path, rng: np.random.Generator) -> None:
    answers = Corpus(rng).answers("test", 0.5)
    plain = to_plain(experiment(AntiTransferConfig(SPEAKER, [13])))
    result = {"seed": 1, "experiment": plain, "classes": EMOTIONS, "parts": {"test": judged(answers)}}
    write_run(tmp_path / "run", result, rng, answers)
    first, again = write_report(tmp_path), write_report(tmp_path, tmp_path / "again" / "page.html")
    assert again.read_bytes() == first.read_bytes()
    assert (tmp_path / "again/summary.csv").read_bytes() == (tmp_path / "summary.csv").read_bytes()
    assert not list(tmp_path.rglob("*.part"))


def test_another_report_of_the_folder_is_waited_for(
    tmp_path: Path, rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    answers = Corpus(rng).answers("test", 0.5)
    plain = to_plain(experiment(AntiTransferConfig(SPEAKER, [13])))
    result = {"seed": 1, "experiment": plain, "classes": EMOTIONS, "parts": {"test": judged(answers)}}
    write_run(tmp_path / "run", result, rng, answers)
    with ThreadPoolExecutor(1) as pool:
        with held(lock_of(tmp_path / "report")):
            report = pool.submit(write_report, tmp_path, tmp_path / "page.html")
            while "waiting for process" not in caplog.text:
                assert not report.done()
                time.sleep(0.01)
            assert not list(tmp_path.glob("*.csv"))
        assert report.result().is_file()


def test_names_are_escaped(tmp_path: Path, rng: np.random.Generator) -> None:
    evil = "<script>alert('x')</script> & $\\frac$"
    answers = Corpus(rng).answers("test", 0.5)
    result = {
        "kind": "classifier",
        "name": evil,
        "seed": 1,
        "experiment": to_plain(experiment()),
        "classes": EMOTIONS,
        "parts": {"test": judged(answers)},
        "kept_epoch": 1,
    }
    write_run(tmp_path / "a", result, rng, answers)
    page = page_of(tmp_path)
    assert "script" not in {tag for tag, _ in page.seen}
    assert any(cells[0] == evil for cells in page.rows)


def test_a_baseline_differs_in_anti_transfer_alone(tmp_path: Path, rng: np.random.Generator) -> None:
    corpus = Corpus(rng, voices=3)
    longer = replace(experiment(), training=replace(PLAIN.training, epochs=99))
    for name, settings in (
        ("wrong-epochs", longer),
        ("wrong-start", experiment(initial=SPEAKER)),
        ("at", experiment(AntiTransferConfig(SPEAKER, [2]))),
    ):
        answers = corpus.answers("test", 0.5)
        result = {"name": name, "seed": 1, "experiment": to_plain(settings), "parts": {"test": judged(answers)}}
        write_run(tmp_path / name, result, rng, answers)
    assert summary_table(runs_in(tmp_path))["baseline"].isna().all()
    answers = corpus.answers("test", 0.5)
    elsewhere = replace(experiment(), cache=Path("other"), training=replace(PLAIN.training, device="cuda"))
    result = {"name": "right", "seed": 1, "experiment": to_plain(elsewhere), "parts": {"test": judged(answers)}}
    write_run(tmp_path / "right", result, rng, answers)
    table = summary_table(runs_in(tmp_path)).set_index("name")
    assert table.loc["at", "baseline"] == "right"


def test_other_clips_give_a_difference_without_interval(tmp_path: Path, rng: np.random.Generator) -> None:
    corpus = Corpus(rng)
    for name, settings in (("plain", experiment()), ("at", experiment(AntiTransferConfig(SPEAKER, [2])))):
        answers = corpus.answers("test", 0.6)
        answers = answers.assign(path=name + answers["path"])
        result = {"seed": 1, "experiment": to_plain(settings), "parts": {"test": judged(answers)}}
        write_run(tmp_path / name, result, rng, answers)
    table = summary_table(runs_in(tmp_path)).set_index("name")
    accuracy = table["accuracy"]
    assert table.loc["at", "difference"] == pytest.approx(accuracy["at"] - accuracy["plain"])
    assert np.isnan(table.loc["at", "difference_low"])


@pytest.mark.parametrize("speakers", [1, None])
def test_too_few_speakers_give_no_interval(tmp_path: Path, rng: np.random.Generator, speakers: int | None) -> None:
    answers = Corpus(rng).answers("test", 0.5).assign(speaker="only one" if speakers else "")
    result = {"seed": 1, "experiment": to_plain(experiment()), "parts": {"test": judged(answers)}}
    write_run(tmp_path / "a", result, rng, answers)
    row = summary_table(runs_in(tmp_path)).iloc[0]
    assert np.isnan(row["accuracy_low"])
    assert np.isnan(row["accuracy_sd"])
    assert row["accuracy"] == pytest.approx(right(answers).mean())
    page_of(tmp_path)


@pytest.mark.parametrize(
    "result",
    [
        {},
        {"kind": "rhemo"},
        {"parts": {"test": {"accuracy": 0.5}}},
        {"parts": {"test": {"accuracy": float("nan")}}, "experiment": None, "classes": None},
        {"parts": {"test": {"average_precision": 0.4}}, "experiment": {"task": "word-presence"}, "versions": None},
        {"experiment": {"training": {"initial": "x.safetensors"}}},
        {"kept_epoch": 99, "experiment": {"anti_transfer": {"twin": "t", "layers": [1, 2]}}},
    ],
)
def test_a_foreign_run_may_lack_anything(tmp_path: Path, result: dict[str, Any]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/result.json").write_text(json.dumps(result))
    (tmp_path / "run/metrics.csv").write_text("epoch,train_total,train_similarity_1\n0,1.0,0.5\n1,,\n")
    page_of(tmp_path)
    row = pd.read_csv(tmp_path / "summary.csv").iloc[0]
    assert row["name"] == "run"
    accuracy = ((result.get("parts") or {}) or {"test": {}}).get("test", {}).get("accuracy", float("nan"))
    assert row["accuracy"] == accuracy or np.isnan(row["accuracy"])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("result.json", {"schema": 2}, "schema 2 must be 1; another version of qat wrote this file"),
        ("result.json", {"seed": "one"}, "seed: 'one' must be a whole number"),
        ("result.json", {"seed": True}, "seed: True must be a whole number"),
        ("result.json", {"kind": "svm"}, "kind: 'svm' must be one of classifier, rhemo"),
        ("result.json", {"parts": []}, "parts: [] must be a mapping"),
        ("result.json", {"parts": {"test": {"confusion": "?"}}}, "parts.test.confusion: '?' must be a list"),
        ("result.json", {"parts": {"test": {"total": []}}}, "parts.test.losses.total: [] must be a number"),
        ("result.json", {"experiment": {"network": None}}, "experiment: network: null must be"),
        ("result.json", {"experiment": {"colour": 1}}, "experiment: unknown setting colour; Experiment has corpus, "),
        ("analysis.json", {"layers": {"2": 0.5}}, "layers.2: 0.5 must be a mapping of settings"),
    ],
)
def test_a_broken_record_is_refused_by_name(tmp_path: Path, file: str, content: dict[str, Any], message: str) -> None:
    (tmp_path / "result.json").write_text("{}")
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / file}: {message}")) as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_runs_are_named_by_their_path_without_the_seed(tmp_path: Path) -> None:
    for path in ("ravdess/at/seed-1", "ravdess/at/seed-2", "tess/at/seed1", "iemocap-seed3"):
        (tmp_path / path).mkdir(parents=True)
        (tmp_path / path / "result.json").write_text(json.dumps({"name": Path(path).name}))
    found = {(run.name, run.seed) for run in runs_in(tmp_path)}
    assert found == {("ravdess/at", 1), ("ravdess/at", 2), ("tess/at", 1), ("iemocap", 3)}


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: no result.json at or below")):
        write_report(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "result.json").write_text('{"kind": ')
    with pytest.raises(ValueError, match=re.escape(str(run / "result.json"))):
        write_report(tmp_path)
    (run / "result.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"result\.json: must hold a JSON object, not list"):
        write_report(tmp_path)
    (run / "result.json").write_text("{}")
    (run / "metrics.csv").write_bytes(b"")
    with pytest.raises(ValueError, match=r"metrics\.csv: not readable as CSV"):
        write_report(tmp_path)
    (run / "metrics.csv").unlink()
    (tmp_path / "campaign.yaml").write_text("not_run: [")
    with pytest.raises(ValueError, match=r"campaign\.yaml: not readable as YAML"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
    assert not (tmp_path / "summary.csv").exists()


def test_a_seed_is_counted_once(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "result.json").write_text(json.dumps({"name": "same", "seed": 4}))
    with pytest.raises(ValueError, match="has the name 'same' and the seed 4 of"):
        runs_in(tmp_path)


def test_importing_the_report_is_cheap() -> None:
    code = "import sys, qat.report.report; print({'matplotlib', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_device_is_named_with_its_processes() -> None:
    result = Result(device="H100", versions={"torch": "2.13"}, commit="abc")
    alone = FinishedRun(Path("a"), "a", 1, result)
    several = replace(alone, result=replace(result, processes=2, versions={"torch": "2.11"}))
    expected = [["devices", "2 × H100; H100"], ["commit", "abc"], ["torch", "2.11, 2.13"]]
    assert made_with([alone, several, alone]) == expected


@pytest.mark.parametrize("labels", [["mean"], ["no AT", "single S, random"] * 4, ["validation, cross-entropy"] * 4])
@pytest.mark.parametrize("panels", [1, 2, 3])
def test_a_legend_fits_its_figure(panels: int, labels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(figures, "drawing", drawn.append)
    lines = [figures.Line(f"{label} {n}", "mean", {1: 50.0, 13: 60.0}) for n, label in enumerate(labels)]
    figures.by_layer({f"panel {n}": lines for n in range(panels)}, "accuracy, %")
    [figure] = drawn
    figure.draw_without_rendering()
    legend, axis = figure.legends[0].get_window_extent(), figure.axes[0].get_window_extent()
    assert len(figure.legends[0].get_texts()) == len(labels)
    assert 0 <= legend.x0 < legend.x1 <= figure.bbox.x1
    assert legend.y0 > axis.y1
    assert axis.height > figure.dpi


def test_the_page_begins_with_a_verdict_and_one_chart(demo: Demo) -> None:
    top, _, out, page = demo
    table = pd.read_csv(top / "summary.csv")
    judged = table[table["difference"].notna()]
    clear = judged[(judged["difference_low"] > 0) | (judged["difference_high"] < 0)]
    most = (clear if len(clear) else judged).sort_values("difference", key=abs).iloc[-1]
    shown = "{} [{}, {}]".format(
        *(f"{100 * most[c]:+.1f}" for c in ("difference", "difference_low", "difference_high"))
    )
    start = page.text.partition("What was trained")[0]
    assert f"In {len(clear)} of 3 settings" in start or (not len(clear) and "No evidence" in start)
    assert most["name"] in start
    assert shown.replace("-", "−") in start
    text = out.read_text(encoding="utf-8")
    assert text.index("<svg") < text.index("<nav>") < text.index("<h2>")
    assert "Anti-transfer should raise both accuracies" in start


def test_every_test_speaker_has_a_row(demo: Demo) -> None:
    _, answers, _, page = demo
    pooled = {name: by_clip(answers, name) for name in SETTINGS}
    head = ["Speaker", *SETTINGS, "Clips"]
    assert head in page.rows
    for voice in pooled["baseline"]["speaker"].unique():
        own = {name: right(table[table["speaker"] == voice]) for name, table in pooled.items()}
        cells = [f"{100 * values.mean():.1f}" for values in own.values()]
        assert [voice, *cells, str(len(own["baseline"]) // len(SEEDS))] in page.rows


def test_figures_and_page_change_their_colours_in_the_dark(demo: Demo) -> None:
    text = demo[2].read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in text
    used = set(re.findall(r"var\(--([a-z]+)\)", text))
    light, dark = (set(re.findall(r"--([a-z]+):", part)) for part in text.split("</style>")[0].split("@media")[:2])
    assert used <= light
    assert dark <= light
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert svgs
    for svg in svgs:
        assert not re.search("#ffffff|#1d2129|#0072b2", svg)


def test_wrong_answers_can_be_heard_where_the_corpus_is(tmp_path: Path, rng: np.random.Generator) -> None:
    soundfile = pytest.importorskip("soundfile")
    table = (
        Corpus(rng, voices=4, sentences=2).answers("test", 0.5).assign(p_angry="0.2", p_happy="0.3", p_neutral="0.1")
    )
    table = table.assign(p_sad="0.4", predicted=["sad" if label == "angry" else "angry" for label in table["label"]])
    for path in table["path"]:
        (tmp_path / "corpus" / path).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "corpus" / path, rng.uniform(-0.5, 0.5, 80_000), 16000)
    settings = replace(experiment(), corpus=CorpusConfig("csv", tmp_path / "corpus/manifest.csv"))
    result = {"seed": 1, "experiment": to_plain(settings), "classes": EMOTIONS, "parts": {"test": judged(table)}}
    write_run(tmp_path / "run", result, rng, table)
    page = page_of(tmp_path / "run")
    sounds = [attributes["src"] for tag, attributes in page.seen if tag == "audio"]
    assert len(sounds) == 3
    audio, rate = soundfile.read(io.BytesIO(base64.b64decode(sounds[0].partition("base64,")[2])))
    assert (len(audio), rate) == (64_000, 16000)
    assert "angry , classified as sad with probability 40.0 %" in page.text  # the most confident errors
    shutil.rmtree(tmp_path / "corpus")
    assert "audio" not in {tag for tag, _ in page_of(tmp_path / "run").seen}


def test_failed_and_unfinished_runs_are_named(tmp_path: Path, rng: np.random.Generator) -> None:
    answers = Corpus(rng).answers("test", 0.5)
    result = {"seed": 1, "experiment": to_plain(experiment()), "classes": EMOTIONS, "parts": {"test": judged(answers)}}
    write_run(tmp_path / "good", result, rng, answers)
    for name, file, text in (
        ("bad", "error.txt", "ValueError: <no>\n\nTraceback"),
        ("half", "experiment.yaml", "a: 1"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
    page = page_of(tmp_path)
    assert "1 training failed bad: ValueError: <no> 1 training not finished half" in page.text
    shutil.rmtree(tmp_path / "bad")
    shutil.rmtree(tmp_path / "half")
    assert "What is missing" not in write_report(tmp_path).read_text(encoding="utf-8")


def test_a_plan_that_is_no_grid_names_the_runs(tmp_path: Path, rng: np.random.Generator) -> None:
    top, corpus, rows = tmp_path / "campaign", Corpus(rng, voices=3), []
    for name in ("baseline", "at-voice"):
        for seed in (1, 2):
            answers = corpus.answers("test", 0.5)
            plain = to_plain(replace(SETTINGS[name][0], training=replace(PLAIN.training, seed=seed)))
            if plain["anti_transfer"]["twin"]:
                plain["anti_transfer"]["twin"] = str(top / "runs" / ("f" * 16))
            address = f"{len(rows):016x}"
            result = {"name": address, "seed": seed, "experiment": plain, "classes": EMOTIONS}
            write_run(top / "runs" / address, result | {"parts": {"test": judged(answers)}}, rng, answers)
            rows.append(f"{address},emotion,quaternion,demo,confounded,{name},13,{seed},{name}")
    rows.append("f" * 16 + ",emotion,quaternion,demo,confounded,at-word,13,1,at-word")
    text = "run,stage,network,corpus,split,at,layer,seed,name\n" + "\n".join(rows)
    (top / "plan.csv").write_text(text)
    (top / "campaign.yaml").write_text("preset: demo\nnot_run: [Nothing at layer 5.]\n")
    page = page_of(top)
    assert {cells[0] for cells in page.rows} >= {"baseline", "at-voice"}
    assert "1 training not finished at-word, seed 1" in page.text
    assert "Nothing at layer 5." in page.text
    assert "preset: demo" in page.text
    table = pd.read_csv(top / "summary.csv").set_index("name")
    assert table.loc["at-voice", "baseline"] == "baseline"
    nested = {(run.name, run.seed) for run in runs_in(tmp_path)}
    assert ("campaign/at-voice", 2) in nested
    assert "twin at-word" in table["anti_transfer"]["at-voice"]  # its name, not its address


def test_the_axis_of_one_epoch_has_that_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(figures, "drawing", drawn.append)
    (tmp_path / "result.json").write_text('{"kept_epoch": 0}')
    (tmp_path / "metrics.csv").write_text("epoch,train_total,validation_total\n0,1.0,1.5\n")
    figures.losses(group_runs(runs_in(tmp_path)), share=True)
    [figure] = drawn
    axis = figure.axes[0]
    low, high = axis.get_xlim()
    assert low < 1 < high
    assert {tick for tick in axis.get_xticks() if low <= tick <= high} == {1}
    assert all(line.get_marker() == "o" for line in axis.lines)
