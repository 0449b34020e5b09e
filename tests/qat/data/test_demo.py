import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from qat.data import corpora
from qat.data.corpora import demo
from qat.data.manifest import Manifest

VOICES = {"train": ["f2"], "validation": ["m1"], "test": ["f3"]}
SENTENCES = ["The parcel is under the table.", "The window opens on the garden."]


def make(folder: Path, **changes: Any) -> Any:
    arguments = {"voices": VOICES, "sentences": SENTENCES, "words": ["lamp"], "workers": 1, "progress": False}
    return demo.make(folder, **(arguments | changes))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make(tmp_path_factory.mktemp("corpora") / "demo")


def test_the_plan_of_the_whole_corpus() -> None:
    rows, utterances = demo._plan(demo.VOICES, demo.SENTENCES, demo.WORDS, 1)
    assert len(rows) == len(utterances) == 18 * 16 * 4 + 9 * 24 * 4
    assert len({row["path"] for row in rows}) == len(rows)
    voices = [voice for part in demo.VOICES.values() for voice in part]
    assert [len(part) for part in demo.VOICES.values()] == [9, 3, 6]
    assert len(set(voices)) == 18
    said = {word for row in rows if row["kind"] == "sentence" for word in row["words"].split()}
    assert set(demo.WORDS) <= said
    assert {row["speaker"] for row in rows if row["kind"] == "word"} == set(demo.VOICES["train"])


def test_jitter_has_the_stated_spread_and_the_emotions_their_means() -> None:
    settings = np.array([demo._settings("f2", str(n), "happy", 1) for n in range(2000)], dtype=float)
    means = np.asarray(demo.EMOTIONS["happy"])
    # Rate and pitch only: the others meet their limits.
    np.testing.assert_allclose(settings.mean(0)[[0, 2]], means[[0, 2]], rtol=0.02)
    np.testing.assert_allclose(settings.std(0)[[0, 2]] / means[[0, 2]], demo.JITTER, rtol=0.1)
    assert demo._settings("f2", "a", "sad", 1) != demo._settings("f2", "a", "sad", 2)


def test_manifest(small: Any) -> None:
    table = small.table
    assert len(table) == 3 * 2 * 4 + 4
    assert table["kind"].value_counts().to_dict() == {"sentence": 24, "word": 4}
    assert table.groupby("speaker")["part"].unique().explode().to_dict() == {
        "f2": "train",
        "f3": "test",
        "m1": "validation",
    }
    assert set(table.loc[table["kind"] == "word", "speaker"]) == {"f2"}
    assert set(table["emotion"]) == {"angry", "happy", "neutral", "sad"}
    assert set(table["source"]) == {"synthesised speech"}
    assert table["words"][0] == "the parcel is under the table"
    assert "Synthesised speech" in (small.root / "README.txt").read_text()
    for path, duration in zip(table["path"], table["duration"], strict=True):
        info = soundfile.info(small.root / path)
        assert (info.subtype, info.channels) == ("PCM_16", 1)
        assert info.duration == pytest.approx(duration, abs=1e-6)
        samples, _ = soundfile.read(small.root / path)
        assert np.abs(samples).max() == pytest.approx(0.9, abs=1e-4)
        assert 0.2 < duration < 4


def period(manifest: Manifest, where: Any) -> Any:
    samples, rate = soundfile.read(manifest.root / manifest.filter(where).table["path"][0])
    correlation = np.fft.irfft(np.abs(np.fft.rfft(samples, 2 * len(samples))) ** 2)
    return (rate // 350 + correlation[rate // 350 : rate // 70].argmax()) / rate


def test_voices_and_settings_are_heard(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert period(small, "emotion == 'neutral' and speaker == 'm1'") > 1.5 * period(
        small, "emotion == 'neutral' and speaker == 'f2'"
    )
    monkeypatch.setattr(demo, "JITTER", 0.0)
    # One setting differs from the first at a time: rate, pitch.
    settings = {"base": (165, 100, 20, 40), "fast": (300, 100, 20, 40), "high": (165, 100, 80, 40)}
    monkeypatch.setattr(demo, "EMOTIONS", settings)
    manifest = make(tmp_path / "demo", voices={"train": ["m1"]}, sentences=SENTENCES[:1], words=[])
    seconds = manifest.table.set_index("emotion")["duration"]
    assert seconds["base"] > 1.4 * seconds["fast"]
    assert seconds["high"] == pytest.approx(seconds["base"], rel=0.05)
    assert period(manifest, "emotion == 'base'") > 1.4 * period(manifest, "emotion == 'high'")
    assert period(manifest, "emotion == 'fast'") == pytest.approx(period(manifest, "emotion == 'base'"), rel=0.15)


def test_every_make_gives_the_same_bytes(small: Any, tmp_path: Path) -> None:
    again = make(tmp_path / "demo", workers=2)
    assert again.key == small.key
    for path in [*small.table["path"], "manifest.csv", "recipe.json"]:
        assert (again.root / path).read_bytes() == (small.root / path).read_bytes()


def test_a_clip_does_not_depend_on_what_else_is_spoken(small: Any, tmp_path: Path) -> None:
    alone = make(tmp_path / "demo", voices={"train": ["m1"]}, sentences=SENTENCES[1:], words=[]).table
    checksums = small.table.set_index(["speaker", "text", "emotion"])["checksum"]
    for row in alone.itertuples():
        assert row.checksum == checksums[row.speaker, row.text, row.emotion]


def test_a_finished_corpus_is_only_read(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_espeak", lambda: pytest.fail("synthesised again"))
    assert make(small.root).key == small.key
    assert corpora.read("demo", small.root).key == small.key


def test_a_folder_with_something_else_is_left_alone(small: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not empty, and not what would be made there"):
        make(small.root, seed=2)
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not empty"):
        make(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_is_filled_and_a_failure_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    monkeypatch.setattr(demo, "write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make(folder, voices={"train": ["f2"]}, sentences=[], words=["lamp"])
    assert [path for path in tmp_path.iterdir() if not path.match(".demo.lock*")] == [folder]
    assert not list(folder.iterdir())
    monkeypatch.undo()
    assert len(make(folder, voices={"train": ["f2"]}, sentences=[], words=["lamp"])) == 4


def test_unknown_voice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no variant 'nobody'; it has .*f2"):
        make(tmp_path / "demo", voices={"train": ["nobody"]})
    assert not (tmp_path / "demo").exists()


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ValueError, match=r"needs the package espeakng-loader; install it with .*\[demo\]"):
        make(tmp_path / "demo")
