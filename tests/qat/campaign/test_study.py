import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression

from qat.campaign.study import LAYER, Study, recorded, synthetic
from qat.data.corpora import demo
from qat.results.probes import linear_probe, shortcut_rate
from qat.training.data import read_corpus


def test_no_pretrained_network_hears_a_voice_of_the_emotion_validation_or_test(tmp_path):
    demo.make(tmp_path / "corpus", sentences=demo.SENTENCES[:1], words=demo.WORDS[:1], progress=False)
    study = Study(tmp_path, synthetic(tmp_path / "corpus"))
    heard = {
        speaker
        for experiment in (study.rhemo(1), study.rhemo(2), study.twin("voice"), study.twin("word"))
        for speaker in read_corpus(experiment.corpus).table["speaker"]
    }
    unseen = {
        speaker
        for experiment in study.trainings().values()
        for speaker in (*experiment.split.validation, *experiment.split.test)
    }
    assert heard == set(demo.VOICES["train"])
    assert unseen == {*demo.VOICES["validation"], *demo.VOICES["test"]}
    assert not heard & unseen


def test_recorded_study_learns_voices_and_emotions_from_different_people(tmp_path):
    study = Study(tmp_path, recorded(tmp_path))
    pretraining = {e.corpus.name for e in (study.rhemo(1), study.rhemo(2), study.twin("voice"), study.twin("word"))}
    assert pretraining == {"fillets"}
    assert {e.corpus.name for e in study.trainings().values()} == {"hedgewars"}
    assert study.twin("word").task == "word-presence"


def test_comparisons_differ_in_one_thing_only(tmp_path):
    study = Study(tmp_path, synthetic(tmp_path), seeds=(1, 2))
    runs = {str(path): experiment for path, experiment in study.trainings().items()}
    assert len(runs) == 12
    for name, baseline in (("at-voice", "baseline"), ("from-voice-at-voice", "from-voice")):
        for seed in (1, 2):
            a, b = runs[f"emotion/{name}/seed{seed}"], runs[f"emotion/{baseline}/seed{seed}"]
            assert replace(a, anti_transfer=b.anti_transfer) == b
            assert (a.anti_transfer.beta, b.anti_transfer.beta) == (1.0, 0.0)
            assert a.anti_transfer.layers == b.anti_transfer.layers == [LAYER]
    assert runs["emotion/from-voice-at-random/seed1"].anti_transfer.twin is None


def test_a_study_runs_from_recordings_to_a_report_and_keeps_what_is_finished(tiny_study):
    report = tiny_study.run()
    assert report.is_file()
    assert len(pd.read_csv(tiny_study.folder / "summary.csv")) == 2 + 2 + 6
    results = sorted(tiny_study.folder.glob("emotion/*/seed1/result.json"))
    assert len(results) == 6
    for path in results:
        analysis = json.loads((path.parent / "analysis.json").read_text())
        assert 0 <= analysis["shortcut_rate"] <= 1
        assert 0 <= analysis["voice_probe"] <= 1
        assert 0 <= analysis["word_probe"] <= 1
        assert analysis["layers"] == {"13": {name: analysis[name] for name in ("voice_probe", "word_probe")}}
    about = json.loads((tiny_study.folder / "demo.json").read_text())
    assert about["synthetic"]
    assert [stage["name"] for stage in about["stages"]][-1] == "train and probe the emotion networks"
    assert "ynthesised speech" in report.read_text()
    before = {path: path.stat().st_mtime_ns for path in results}
    tiny_study.run()
    assert {path: path.stat().st_mtime_ns for path in results} == before


def test_shortcut_rate_counts_answers_that_are_the_voices_own_emotion():
    predictions = pd.DataFrame(
        [("train", "a", "sad", "sad"), ("train", "a", "sad", "sad"), ("train", "a", "happy", "sad"),
         ("train", "b", "angry", "sad"), ("withheld", "a", "happy", "sad"), ("withheld", "a", "happy", "happy"),
         ("withheld", "b", "sad", "angry"), ("withheld", "b", "sad", "sad"), ("test", "c", "sad", "sad")],
        columns=["part", "speaker", "label", "predicted"],
    )  # fmt: skip
    assert shortcut_rate(predictions) == 0.5


def test_linear_probe_finds_what_is_there_and_not_what_is_not():
    rng = np.random.default_rng()
    labels = np.repeat(["x", "y", "z"], 60).astype(object)
    texts = np.tile([f"t{i}" for i in range(20)], 9).astype(object)
    noise = rng.normal(size=(180, 30)).astype(np.float32)
    assert linear_probe(noise, labels, texts) < 0.65
    signal = noise.copy()
    for column, label in enumerate("xyz"):
        signal[:, column] += 6 * (labels == label)
    assert linear_probe(signal, labels, texts) > 0.9


def test_linear_probe_is_logistic_regression_on_standardised_features_of_any_number():
    rng = np.random.default_rng()
    labels = np.tile(["x", "y", "z"], 40).astype(object)
    texts = np.repeat([f"t{i:02d}" for i in range(24)], 5).astype(object)
    for width in (7, 500):
        x = rng.normal(size=(120, width)).astype(np.float32) + 0.3 * (labels[:, None] == "x")
        tested = np.isin(texts, sorted(set(texts))[::4])
        mean, deviation = x[~tested].mean(0), x[~tested].std(0)
        z = (x - mean) / deviation
        plain = LogisticRegression(C=0.1, max_iter=5000, tol=1e-8).fit(z[~tested], labels[~tested])
        answers = plain.predict(z[tested])
        assert linear_probe(x, labels, texts) == pytest.approx((answers == labels[tested]).mean(), abs=1.01 / 30)


def test_linear_probe_is_tested_on_texts_that_it_has_not_seen():
    """Features that are the text itself tell the voice of every text, unless the text is new."""
    texts = np.array([f"t{i:02d}" for i in range(16)], dtype=object)
    labels = np.array(["x", "y"] * 8, dtype=object)
    assert linear_probe(np.eye(16, dtype=np.float32), labels, texts) < 1


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_demo_learns_emotions_of_unseen_voices_over_three_seeds(tmp_path):
    study = Study(tmp_path, synthetic(tmp_path / "corpus"), seeds=(1, 2, 3))
    baselines = {path: e for path, e in study.trainings().items() if path.parts[1] == "baseline"}
    study.material.obtain()
    from qat.training.classifier import train_classifier
    from qat.training.rhemo import pretrain_rhemo

    for stage in (1, 2):
        result = pretrain_rhemo(study.rhemo(stage), tmp_path / f"rhemo/stage{stage}", quiet=True)
        for part in result["parts"].values():
            assert part["reconstruction"] < 0.75 * part["constant"]
            assert part["live_channels"] == 4
    train_classifier(study.twin("voice"), tmp_path / "twins/voice", quiet=True)
    accuracies = [
        train_classifier(e, tmp_path / path, quiet=True)["parts"]["test"]["accuracy"] for path, e in baselines.items()
    ]
    assert np.mean(accuracies) >= 0.45
