"""The published corpora, each as a miniature tree in its own layout and naming."""

import json
import random
import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from praatio import textgrid

from qat import cli
from qat.config import CorpusConfig, Experiment, NetworkConfig, SpectrogramConfig, SplitConfig, TrainingConfig
from qat.data import corpora
from qat.data.corpora import cremad, emodb, emovo, iemocap, ravdess, savee, tess
from qat.data.manifest import Manifest
from qat.data.store import prepare
from qat.training.checkpoint import load_checkpoint
from qat.training.classifier import train_classifier
from qat.training.data import divide, load_data, read_corpus


def sound(path: Path, samples: int = 400) -> Path:
    """A wav of noise, whatever its name ends in, so that no two are the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(random.randbytes(2 * samples))
    return path


def rows(manifest: Manifest, *columns: str) -> dict[str, tuple[Any, ...]]:
    return {row["path"].rpartition("/")[2]: tuple(row[c] for c in columns) for row in manifest.table.to_dict("records")}


def notes(table: Any) -> dict[str, str]:
    return dict(zip(table["path"], table["problem"], strict=True))


def checked(name: str, folder: Path, **options: Any) -> Any:
    found = corpora.check(name, folder, progress=False, **options)
    return found.manifest, notes(found.problems), notes(found.remarks)


def counts(table: Any) -> set[str]:
    """What is known by its count only."""
    return set(table.loc[table["path"] == "", "problem"])


# RAVDESS, TESS, EmoDB, EMOVO, SAVEE, CREMA-D: the file name tells everything.


def test_ravdess(tmp_path: Path) -> None:
    for name in ("03-01-01-01-01-01-01.wav", "03-01-08-02-02-01-24.WAV", "03-01-06-01-01-02-12.wav"):
        sound(tmp_path / f"Actor_{name[18:20]}" / name)
    sound(tmp_path / "audio_speech_actors_01-24/Actor_01/03-01-01-01-01-01-01.wav")  # as one mirror has it, twice
    odd = {
        "03-02-03-01-01-01-01.wav": "song, not speech",
        "01-01-03-01-01-01-01.mp4": "video, not audio only",
        "03-01-01-02-01-01-01.wav": "no file of the published corpus",  # neutral, but strong
        "03-01-03-01-01-01-25.wav": "no file of the published corpus",
        "readme.wav": "seven numbers",
    }
    for name in odd:
        sound(tmp_path / "Actor_01" / name)
    (tmp_path / "Actor_01/._03-01-01-01-01-01-01.wav").write_bytes(b"\0\5\x16\7Mac OS X")
    (tmp_path / "LICENSE.txt").write_text("CC BY-NC-SA")
    manifest, problems, remarks = checked("ravdess", tmp_path)
    kids, dogs = ravdess.STATEMENTS.values()
    assert rows(manifest, "speaker", "emotion", "text", "intensity", "repetition", "sex") == {
        "03-01-01-01-01-01-01.wav": ("01", "neutral", kids, "normal", "01", "male"),
        "03-01-08-02-02-01-24.WAV": ("24", "surprise", dogs, "strong", "01", "female"),
        "03-01-06-01-01-02-12.wav": ("12", "fear", kids, "normal", "02", "female"),
    }
    for name, reason in odd.items():
        assert reason in remarks.pop(f"Actor_01/{name}")
    twice = remarks.popitem()
    assert (twice[0].startswith("audio_speech"), twice[1].endswith("Actor_01/03-01-01-01-01-01-01.wav")) == (True, True)
    assert not remarks
    assert problems["03-01-01-01-01-02-01.wav"] == "is not there"
    assert "03-01-01-01-01-01-01.wav" not in problems
    assert sum(path != "" for path in problems) == 1440 - 3


def test_complete_corpora_have_no_problem_and_a_lost_file_is_named(tmp_path: Path) -> None:
    trees = {
        "ravdess": ([f"Actor_{name[-2:]}/{name}.wav" for name in ravdess._names()], "03-01-05-02-01-02-09.wav"),
        "savee": ([f"AudioData/{n[:2]}/{n[3:]}.wav" for n in savee._names()], "JK_n30.wav"),
        "emovo": (
            [
                f"EMOVO/{speaker}/{emotion}-{speaker}-{text}.wav"
                for speaker in ("f1", "f2", "f3", "m1", "m2", "m3")
                for emotion in emovo.EMOTIONS
                for text in (*(f"{letter}{n}" for letter in "bdln" for n in (1, 2, 3)), "n4", "n5")
            ],
            "rab-m2-n5.wav",
        ),
    }
    sizes = {"ravdess": 1440, "savee": 480, "emovo": 588}
    for name, (files, lost) in trees.items():
        for file in files:
            sound(tmp_path / name / file)
        manifest, problems, remarks = checked(name, tmp_path / name)
        assert (len(manifest), problems, remarks) == (sizes[name], {}, {})
        table = manifest.table
        assert not table.duplicated(["speaker", "text", "emotion", *table.columns[6:]]).any()
        (victim,) = [f for f in files if f.endswith(lost) or f.endswith(lost.replace("_", "/"))]
        (tmp_path / name / victim).unlink()
        found = corpora.check(name, tmp_path / name, progress=False)
        assert found.problems["path"].tolist()[0] == lost
        assert any("emotion" in problem for problem in counts(found.problems))
        assert any("speaker" in problem for problem in counts(found.problems))
        assert len(found.problems) == 3


def test_tess_takes_the_file_with_the_short_prefix(tmp_path: Path) -> None:
    names = {
        "OAF_angry/OAF_back_angry.wav": ("OAF", "angry", "back"),
        "OAF_neutral/OA_bite_neutral.wav": ("OAF", "neutral", "bite"),
        "OAF_Pleasant_surprise/OAF_back_ps.wav": ("OAF", "surprise", "back"),
        "YAF_fear/YAF_back_fear.WAV": ("YAF", "fear", "back"),
        "YAF_disgust/yaf_Bite_disgust.wav": ("YAF", "disgust", "bite"),
    }
    for name in names:
        sound(tmp_path / name)
    strays = ["OAF_back_calm.wav", "XAF_back_sad.wav", "OAFF_back_sad.wav", "twice/OAF_bite_neutral.wav"]
    for stray in strays:
        sound(tmp_path / stray)
    manifest, problems, remarks = checked("tess", tmp_path)
    read = rows(manifest, "speaker", "emotion", "text")
    assert read == {name.rpartition("/")[2]: row for name, row in names.items()}
    assert set(remarks) == set(strays)
    assert "is there already: OAF_neutral/OA_bite_neutral.wav" in remarks["twice/OAF_bite_neutral.wav"]
    assert sum(path != "" for path in problems) == 2 * 2 * 7 - 5  # both words, by both, in seven emotions
    assert "speaker OAF: 3 files, published are 1400" in counts(
        corpora.check("tess", tmp_path, progress=False).problems
    )


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("03a01Fa.wav", ("03", "happy", "a01", "male", "a")),
        ("08b02Wb.wav", ("08", "angry", "b02", "female", "b")),
        ("16a07Lc.wav", ("16", "bored", "a07", "female", "c")),
        ("09b10Ed.WAV", ("09", "disgust", "b10", "female", "d")),
        ("10a04Ab.wav", ("10", "fear", "a04", "male", "b")),
        ("11b01Ta.wav", ("11", "sad", "b01", "male", "a")),
        ("15a02Na.wav", ("15", "neutral", "a02", "male", "a")),
        ("03A01FA.WAV", ("03", "happy", "a01", "male", "a")),
        ("03a01Xa.wav", None),
        ("04a01Fa.wav", None),
        ("03a01F.wav", None),
    ],
)
def test_emodb(tmp_path: Path, name: str, row: tuple[str, str, str, str, str] | None) -> None:
    sound(tmp_path / "wav" / name)
    sound(tmp_path / "wav/13a05Wa.wav")
    (tmp_path / "lablaut").mkdir()
    (tmp_path / "lablaut/03a01Fa.lablaut").write_text("labels")
    manifest, problems, remarks = checked("emodb", tmp_path)
    assert rows(manifest, "speaker", "emotion", "text", "sex", "version").get(name) == row
    assert len(manifest) == (1 if row is None else 2)
    assert list(remarks) == ([f"wav/{name}"] if row is None else [])
    assert not [path for path in problems if path]
    assert "emotion angry:" in " ".join(counts(corpora.check("emodb", tmp_path, progress=False).problems))


def test_emovo(tmp_path: Path) -> None:
    names = {"dis-f1-b1.wav": "disgust", "gio-f1-b1.wav": "happy", "neu-m3-n5.wav": "neutral", "pau-f2-l4.wav": "fear"}
    names |= {"rab-m1-d1.wav": "angry", "sor-m2-b3.wav": "surprise", "tri-f3-n1.WAV": "sad"}
    for name in names:
        sound(tmp_path / "EMOVO" / name[4:6] / name)
    sound(tmp_path / "EMOVO/f1/cal-f1-b1.wav")
    (tmp_path / "EMOVO/documents").mkdir()
    (tmp_path / "EMOVO/documents/emovo.pdf").write_bytes(b"%PDF")
    manifest, _, remarks = checked("emovo", tmp_path)
    expected = {n: (n[4:6], e, n[7:9], "female" if n[4] == "f" else "male") for n, e in names.items()}
    assert rows(manifest, "speaker", "emotion", "text", "sex") == expected
    assert list(remarks) == ["EMOVO/f1/cal-f1-b1.wav"]


@pytest.mark.parametrize("flat", [False, True])
def test_savee_in_both_layouts(tmp_path: Path, flat: bool) -> None:
    codes = {"a01": "angry", "d15": "disgust", "f02": "fear", "h03": "happy", "n30": "neutral", "sa04": "sad"}
    codes["su05"] = "surprise"
    for speaker in savee.SPEAKERS:
        for code in codes:
            name = f"{speaker}_{code}.wav" if flat else f"AudioData/{speaker}/{code}.wav"
            sound(tmp_path / "ALL" / name if flat else tmp_path / name)
    strays = ["DC/s01.wav", "DC/a16.wav", "DC/n31.wav", "other/a02.wav", "DC_a001.wav"]
    for stray in strays:
        sound(tmp_path / stray)
    manifest, problems, remarks = checked("savee", tmp_path)
    table = manifest.table
    assert {(row.speaker, row.text): row.emotion for row in table.itertuples()} == {
        (speaker, code): emotion for speaker in savee.SPEAKERS for code, emotion in codes.items()
    }
    assert set(remarks) == set(strays)
    assert "tells a speaker" in remarks["other/a02.wav"]
    assert sum(path != "" for path in problems) == 480 - 28


def test_savee_in_both_layouts_at_once_is_read_once(tmp_path: Path) -> None:
    for name in ("ALL/DC_a01.wav", "AudioData/DC/a01.wav"):
        sound(tmp_path / name)
    manifest, _, remarks = checked("savee", tmp_path)
    assert manifest.table["path"].tolist() == ["ALL/DC_a01.wav"]
    assert "DC_a01 is there already" in remarks["AudioData/DC/a01.wav"]


def test_cremad(tmp_path: Path) -> None:
    names = {
        "1001_IEO_ANG_LO.wav": ("1001", "angry", "it's eleven o'clock", "low"),
        "1091_WSI_NEU_XX.wav": ("1091", "neutral", "we'll stop in a couple of minutes", "unspecified"),
        "1040_ITH_SAD_X.wav": ("1040", "sad", "i think i have a doctor's appointment", "unspecified"),
        "1050_IEO_FEA_MD.wav": ("1050", "fear", "it's eleven o'clock", "medium"),
        "1050_IEO_DIS_HI.WAV": ("1050", "disgust", "it's eleven o'clock", "high"),
        "1050_DFA_HAP_XX.wav": ("1050", "happy", "don't forget a jacket", "unspecified"),
    }
    for name in names:
        sound(tmp_path / "AudioWAV" / name)
    sound(tmp_path / "AudioMP3/1001_IEO_ANG_LO.mp3")
    strays = ["1092_IEO_ANG_LO.wav", "1000_IEO_ANG_LO.wav", "1001_IEO_SUR_LO.wav", "1001_ABC_ANG_XX.wav"]
    for stray in strays:
        sound(tmp_path / "AudioWAV" / stray)
    (tmp_path / "AudioWAV/1002_DFA_ANG_XX.wav").write_text("version https://git-lfs.github.com/spec/v1\n")
    soundfile.write(tmp_path / "AudioWAV/1076_MTI_SAD_XX.wav", np.zeros(4000), 16000)
    manifest, problems, remarks = checked("cremad", tmp_path)
    read = rows(manifest, "speaker", "emotion", "text", "level")
    assert len(read) == 8
    assert {name: read[name] for name in names} == names
    assert set(remarks) == {f"AudioWAV/{stray}" for stray in strays}
    assert "git lfs pull" in problems["AudioWAV/1002_DFA_ANG_XX.wav"]
    assert "silent" in problems["AudioWAV/1076_MTI_SAD_XX.wav"]


@pytest.mark.parametrize(
    ("corpus", "total", "speakers"),
    [
        (ravdess, 1440, 24),
        (tess, 2800, 2),
        (emodb, 535, 10),
        (emovo, 588, 6),
        (savee, 480, 4),
        (cremad, 7442, None),
        (iemocap, 10039, None),
    ],
)
def test_published_counts_add_up(corpus: Any, total: int, speakers: int | None) -> None:
    assert {column: sum(counts.values()) for column, counts in corpus.PUBLISHED.items()} == dict.fromkeys(
        corpus.PUBLISHED, total
    )
    if speakers:
        assert len(corpus.PUBLISHED["speaker"]) == speakers
    assert sum(iemocap.PUBLISHED["emotion"][name] for name in iemocap.CLASSES) == 4490


# IEMOCAP


IMPRO = """% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]

[6.2901 - 8.2357]\tSes01F_impro01_F000\tneu\t[2.5000, 2.6000, 2.7000]
C-E2:\tNeutral;\t()
C-E3:\tNeutral; Sadness;\t(Ses01F_impro01_F000 again)
A-E3:\tval 3; act 2; dom  2;\t()

[10.0100 - 11.3925]\tSes01F_impro01_M000\txxx\t[3.0000, 3.0000, 3.0000]
C-E2:\tAnger;\t()

[14.8872 - 18.0175]\tSes01F_impro01_F001\texc\t[4.5000, 4.0000, 3.5000]
[14.8872 - 18.0175]\tSes01F_impro01_F001\tang\t[1.0000, 1.0000, 1.0000]
"""
CODES = {"fru": "frustrated", "ang": "angry", "hap": "happy", "sad": "sad", "fea": "fear", "sur": "surprise"}
CODES |= {"dis": "disgust", "oth": "other"}


@pytest.fixture
def iemocap_tree(tmp_path: Path) -> Any:
    root = tmp_path / "IEMOCAP_full_release"
    wavs = {"Ses01F_impro01": ["F000", "M000", "F001"]}
    texts = {"Ses01F_impro01": IMPRO}
    wavs["Ses05M_script01_1b"] = [f"{'MF'[i % 2]}{i:03}" for i in range(len(CODES))]
    texts["Ses05M_script01_1b"] = "".join(
        f"[1.0 - 2.0]\tSes05M_script01_1b_{utterance}\t{code}\t[2.0, 3.5, 5.0]\n"
        for utterance, code in zip(wavs["Ses05M_script01_1b"], CODES, strict=True)
    )
    for dialogue, utterances in wavs.items():
        session = root / f"Session{dialogue[4]}"
        for utterance in utterances:
            sound(session / "sentences/wav" / dialogue / f"{dialogue}_{utterance}.wav")
        sound(session / "dialog/wav" / f"{dialogue}.wav")
        evaluation = session / "dialog/EmoEvaluation"
        (evaluation / "Categorical").mkdir(parents=True)
        (evaluation / f"{dialogue}.txt").write_text(texts[dialogue])
        (evaluation / f"._{dialogue}.txt").write_bytes(b"\0\5\x16\7\xff\xfe[1 - 2]")
        (evaluation / "Categorical" / f"{dialogue}_e1_cat.txt").write_text(f"{dialogue}_F000 :Anger; ()\n[broken")
        transcriptions = session / "dialog/transcriptions"
        transcriptions.mkdir()
        (transcriptions / f"{dialogue}.txt").write_text(
            f"{dialogue}_F000 [006.2901-008.2357]: Excuse me.\nM: [LAUGHTER]\n{dialogue}_XX [1.0-2.0]: not cut\n"
        )
    return root


def test_iemocap(iemocap_tree: Path) -> None:
    manifest, problems, remarks = checked("iemocap", iemocap_tree)
    assert not [path for path in problems if path]
    assert not remarks
    read = rows(manifest, "speaker", "emotion", "session", "sex", "kind", "script", "text")
    assert read["Ses01F_impro01_F000.wav"] == ("1F", "neutral", "1", "female", "improvised", "impro01", "Excuse me.")
    # The dialogue is named after the actress, this utterance is the actor's.
    assert read["Ses01F_impro01_M000.wav"] == ("1M", "no-agreement", "1", "male", "improvised", "impro01", "")
    assert read["Ses01F_impro01_F001.wav"][1] == "excited"  # its first line counts
    scripted = [row for name, row in read.items() if "script" in name]
    assert [row[1] for row in sorted(scripted, key=lambda row: list(CODES.values()).index(row[1]))] == [*CODES.values()]
    assert {(row[0], row[2], row[4], row[5]) for row in scripted} == {
        ("5M", "5", "scripted", "script01_1"),
        ("5F", "5", "scripted", "script01_1"),
    }
    degrees = rows(manifest, "valence", "arousal", "dominance")
    assert degrees["Ses01F_impro01_F000.wav"] == (2.5, 2.6, 2.7)
    assert degrees["Ses05M_script01_1b_M000.wav"] == (2.0, 3.5, 5.0)


def test_iemocap_options(iemocap_tree: Path) -> None:
    sessions = corpora.read("iemocap", iemocap_tree.parent, speaker="session", merge_excited=True).table
    assert set(sessions["speaker"]) == {"1", "5"}
    assert "excited" not in set(sessions["emotion"])
    assert (sessions["emotion"] == "happy").sum() == 2
    _, problems, _ = checked("iemocap", iemocap_tree, merge_excited=True)
    happy = counts(corpora.check("iemocap", iemocap_tree, progress=False, merge_excited=True).problems)
    assert "emotion happy: 2 files, published are 1636" in happy
    assert problems
    with pytest.raises(ValueError, match="option speaker='voice' must be 'actor' or 'session'"):
        corpora.read("iemocap", iemocap_tree, speaker="voice")
    with pytest.raises(ValueError, match="corpus iemocap: no option sex; it has speaker, merge_excited"):
        corpora.read("iemocap", iemocap_tree, sex="F")


def test_iemocap_with_losses(iemocap_tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, last = iemocap_tree / "Session1", iemocap_tree / "Session5"
    (first / "sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav").unlink()
    sound(first / "sentences/wav/Ses01F_impro01/Ses01F_impro01_F009.wav")
    sound(first / "sentences/wav/Ses01F_impro01/notes.wav")
    sound(first / "copy/Ses01F_impro01_M000.wav")
    (last / "dialog/EmoEvaluation/Ses05M_script01_1b.txt").unlink()
    manifest, problems, remarks = checked("iemocap", iemocap_tree)
    assert problems["wav/Ses01F_impro01/Ses01F_impro01_F000.wav"] == "is annotated and not there"
    assert (
        "no line in EmoEvaluation/Ses01F_impro01.txt"
        in problems["Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F009.wav"]
    )
    assert problems["EmoEvaluation/Ses05M_script01_1b.txt"] == "is not there: 8 utterances have no label"
    assert "name" in remarks["Session1/sentences/wav/Ses01F_impro01/notes.wav"]
    assert len(remarks) == 2  # and the copy, or what it is a copy of
    assert "9 utterances have no annotation" in caplog.text
    unlabelled = manifest.table[manifest.table["emotion"] == ""]
    assert len(unlabelled) == 9
    assert unlabelled[["valence", "arousal", "dominance"]].isna().all(axis=None)


@pytest.mark.parametrize(
    "line",
    [
        "[1.0 - 2.0]\tSes01F_impro01_F000\tabc\t[2.0, 3.5, 5.0]",
        "[1.0 - 2.0]\tSes01F_impro01_F000\tneu\t[2.0, 3.5]",
        "[1.0 - 2.0] Ses01F_impro01_F000 neu [2.0, 3.5, 5.0]",
    ],
)
def test_iemocap_names_the_annotation_that_it_cannot_read(iemocap_tree: Path, line: str) -> None:
    file = iemocap_tree / "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt"
    file.write_text("% header\n" + line + "\n")
    with pytest.raises(
        ValueError, match=r"Ses01F_impro01\.txt: line 2: .* must be \[times\], utterance, label \(neu, "
    ):
        corpora.read("iemocap", iemocap_tree)


def test_iemocap_splits_and_tasks(iemocap_tree: Path) -> None:
    table = corpora.read("iemocap", iemocap_tree).table
    sessions = table.assign(session=[str(1 + i % 5) for i in range(len(table))])
    parts = divide(sessions, SplitConfig("paper-actor"), "iemocap")
    assert {part: set(sessions.loc[rows, "session"]) for part, rows in parts.items()} == {
        "train": {"1", "2", "3"},
        "validation": {"4"},
        "test": {"5"},
    }
    left_out = divide(sessions, SplitConfig("folds", group="session", fold=5))
    assert set(sessions.loc[left_out["test"], "session"]) == {"5"}
    assert set(sessions.loc[left_out["validation"], "session"]) == {"1"}


# LibriSpeech: words are segments.

SPOKEN = {
    "train-clean-100/103/1240/103-1240-0000": ("the", "cat", "the", "dog"),
    "train-clean-100/103/1240/103-1240-0001": ("a", "the", "cat", "bird"),
    "train-clean-100/19/198/19-198-0000": ("dog", "cat", "the", "a"),
    "dev-clean/84/121123/84-121123-0000": ("the", "cat", "dog", "owl"),
    "test-clean/61/70968/61-70968-0000": ("cat", "dog", "the", "the"),
}
LENGTH = 0.25


def librispeech_tree(root: Path, alignment: str) -> Path:
    """Each word is a constant of its own (0.1 the, 0.2 cat...) for a quarter of a second; before them is 0.9."""
    level = {text: 0.1 * (n + 1) for n, text in enumerate(("the", "cat", "dog", "a", "bird", "owl"))}
    lists: dict[str, list[str]] = {}
    for utterance, words in SPOKEN.items():
        subset, name = utterance.partition("/")[0], utterance.rpartition("/")[2]
        samples = np.concatenate([np.full(8000, 0.9), *(np.full(4000, level[word]) for word in words)])
        flac = root / f"{utterance}.flac"
        flac.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(flac, samples, 16000)
        (flac.parent / f"{name.rpartition('-')[0]}.trans.txt").write_text(f"{name} {' '.join(words).upper()}\n")
        times = [0.5 + LENGTH * n for n in range(len(words))]
        if alignment == "list":
            lists.setdefault(subset, []).extend(
                f"{name} 1 {time} {LENGTH} {word.upper()} NA" for time, word in zip(times, words, strict=True)
            )
        else:
            grid = textgrid.Textgrid()
            entries = [(time, time + LENGTH, word) for time, word in zip(times, words, strict=True)]
            grid.addTier(textgrid.IntervalTier("words", entries, 0, 1.5))
            grid.addTier(textgrid.IntervalTier("phones", [(0, 1.5, "DH")], 0, 1.5))
            grid.save(str(flac.with_suffix(".TextGrid")), alignment, True)
    for subset, lines in lists.items():
        file = root / "word_labels" / f"{subset}-selected-3.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("alignment", ["list", "long_textgrid", "short_textgrid"])
def test_librispeech(tmp_path: Path, alignment: str) -> None:
    root = librispeech_tree(tmp_path, alignment)
    manifest, problems, remarks = checked("librispeech", root, words=3)
    table = manifest.table
    # The training part says "the" and "cat" most, then "a" and "dog", which comes first, ties going by the alphabet.
    assert set(table["text"]) == {"the", "cat", "a"}
    expected = [
        (f"{path}.flac", word, round(0.5 + LENGTH * n, 6))
        for path, words in SPOKEN.items()
        for n, word in enumerate(words)
        if word in ("the", "cat", "a")
    ]
    got = table[["path", "text", "start"]].itertuples(index=False, name=None)
    assert sorted(got) == sorted(expected)
    assert set(table["duration"]) == {LENGTH}
    parts = table.groupby("part")["subset"].unique().map(list).to_dict()
    assert parts == {"train": ["train-clean-100"], "validation": ["dev-clean"], "test": ["test-clean"]}
    assert table.groupby("speaker")["utterance"].nunique().to_dict() == {"103": 2, "19": 1, "61": 1, "84": 1}
    assert set(problems) == {""}  # only the counts
    assert not remarks


def test_librispeech_takes_the_vocabulary_beside_the_lists(tmp_path: Path) -> None:
    root = librispeech_tree(tmp_path / "LibriSpeech/split", "list")
    labels = root / "word_labels"
    (labels / "3-mostfreq").write_text("dog\nowl\ncat\n")
    table = corpora.read("librispeech", root.parent, words=3).table
    assert set(table["text"]) == {"dog", "owl", "cat"}
    assert table["path"][0].startswith("split/train-clean-100/")
    elsewhere = tmp_path / "labels"
    labels.rename(elsewhere)
    again = corpora.read("librispeech", root.parent, words=3, alignments=str(elsewhere)).table
    assert again["text"].tolist() == table["text"].tolist()


def test_librispeech_limit_is_for_each_part_and_always_draws_the_same(tmp_path: Path) -> None:
    root = librispeech_tree(tmp_path, "list")
    table = corpora.read("librispeech", root, limit=3).table
    assert table["part"].value_counts().to_dict() == {"train": 3, "validation": 3, "test": 3}
    assert table.equals(corpora.read("librispeech", root, limit=3).table)
    whole = corpora.read("librispeech", root).table
    assert len(whole) == 19  # an owl is in no training sentence
    kept = whole.merge(table[["path", "start"]], on=["path", "start"])
    assert kept["text"].tolist() == table["text"].tolist()  # in order


def test_librispeech_with_losses(tmp_path: Path) -> None:
    root = librispeech_tree(tmp_path, "list")
    (root / "train-clean-100/19/198/19-198-0000.flac").unlink()
    unaligned = root / "dev-clean/84/121123/84-121123-0001.flac"
    soundfile.write(unaligned, np.full(16000, 0.5), 16000)
    soundfile.write(root / "dev-clean/stray.flac", np.full(16000, 0.4), 16000)
    found = corpora.check("librispeech", root, progress=False)
    problems, remarks = notes(found.problems), notes(found.remarks)
    assert problems["train-clean-100/19-198-0000.flac"] == "is aligned and not there"
    assert "no utterance" in remarks["dev-clean/stray.flac"]
    assert "subset dev-clean: 1 utterances have no aligned word" in counts(found.remarks)
    assert "subset dev-clean: 2 files, published are 2703" in counts(found.problems)
    (root / "word_labels/dev-clean-selected-3.txt").write_text("84-121123-0000 1 0.5 long the\n")
    with pytest.raises(ValueError, match=r"dev-clean-selected-3\.txt: line 1: .* must be utterance, channel, start"):
        corpora.read("librispeech", root)
    (root / "word_labels/dev-clean-selected-3.txt").unlink()
    with pytest.raises(ValueError, match="no word alignments of dev-clean: neither a list dev-clean-selected-1000"):
        corpora.read("librispeech", root)
    assert set(corpora.read("librispeech", root, subsets=["test-clean"]).table["subset"]) == {"test-clean"}
    (root / "dev-clean/84/121123/84-121123-0000.TextGrid").write_text("no grid")
    with pytest.raises(ValueError, match=r"84-121123-0000\.TextGrid: no TextGrid with a tier 'words'"):
        corpora.read("librispeech", root)
    for options, message in (
        ({"subsets": ["train-clean"]}, "subset train-clean is none of train-clean-100, "),
        ({"words": 0}, "options words=0 and limit=120000 must be at least 1"),
        ({"limit": 0}, "limit=0"),
    ):
        with pytest.raises(ValueError, match=message):
            corpora.read("librispeech", root, **options)


WORDS = Experiment(
    task="word",
    features=SpectrogramConfig(cut="word"),
    normalisation="max",
    network=NetworkConfig(domain="real", width=0.01),
    split=SplitConfig("part"),
    training=TrainingConfig(epochs=1, batch=8, device="cpu"),
)


def prepared(experiment: Experiment) -> Experiment:
    """In this process: others would take seconds to start."""
    manifest = read_corpus(experiment.corpus)
    prepare(manifest, experiment.features, experiment.cache, workers=0, progress=False)
    return experiment


def test_words_are_trained_on_without_being_cut_to_disk(tmp_path: Path) -> None:
    root = librispeech_tree(tmp_path / "libri", "list")
    before = sorted(root.rglob("*"))
    config = CorpusConfig("librispeech", root, where={"text": ["the", "cat", "dog"]})
    experiment = prepared(replace(WORDS, corpus=config, cache=tmp_path / "cache"))
    data = load_data(experiment, quiet=True)
    assert sorted(root.rglob("*")) == before
    assert {part: set(data.index["subset"].iloc[rows]) for part, rows in data.parts.items()} == {
        "train": {"train-clean-100"},
        "validation": {"dev-clean"},
        "test": {"test-clean"},
    }
    # What is read is the word itself, and nothing of its neighbours: a constant's first bin tells its level.
    level = {"the": 0.1, "cat": 0.2, "dog": 0.3}
    store = data.spectrograms.store
    middle = [store.magnitudes[row, 10, 0] for row in range(len(store))]
    assert middle == pytest.approx([level[text] for text in store.index["text"]], rel=1e-3)
    assert set(store.index["frames"]) == {4000 // 128 + 2}
    result = train_classifier(experiment, tmp_path / "run", quiet=True)
    assert result["classes"] == ["cat", "dog", "the"]
    again = load_data(experiment, trained=load_checkpoint(tmp_path / "run", "classifier"), quiet=True)
    assert again.parts == data.parts
    listed = json.loads((tmp_path / "run/split.json").read_text())
    assert listed["test"] == ["test-clean/61/70968/61-70968-0000.flac"]


def test_the_released_codes_words_are_the_training_part_three_times(tmp_path: Path) -> None:
    root = librispeech_tree(tmp_path, "list")
    config = CorpusConfig("librispeech", root, options={"words": 3})
    split = SplitConfig("part-train-only")
    experiment = prepared(replace(WORDS, corpus=config, split=split, cache=tmp_path / "cache"))
    data = load_data(experiment, quiet=True)
    assert data.parts["train"] == data.parts["validation"] == data.parts["test"]
    assert set(data.index["part"].iloc[data.parts["test"]]) == {"train"}
    assert set(data.index["text"]) == {"the", "cat", "a"}  # the option has its effect


# The command


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any]]:
    code = cli.main([str(word) for word in words] + ["--json"])
    return code, json.loads(capsys.readouterr().out)


def test_corpus_check_tells_problems_and_remarks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for speaker in savee.SPEAKERS:
        for name in savee._names():
            if name.startswith(speaker):
                sound(tmp_path / speaker / f"{name[3:]}.wav")
    code, report = run(capsys, "corpus", "check", "savee", tmp_path)
    assert (code, report["files"], report["problems"], report["remarks"]) == (0, 480, [], [])
    sound(tmp_path / "DC/applause.wav")
    (tmp_path / "JE/a02.wav").write_bytes((tmp_path / "JE/a01.wav").read_bytes())
    code, report = run(capsys, "corpus", "check", "savee", "--folder", tmp_path)
    assert (code, report["problems"]) == (0, [])  # what is too much or twice hinders nobody
    assert {r["path"] for r in report["remarks"]} == {"DC/applause.wav", "JE/a02.wav"}
    assert "the same bytes as JE/a01.wav" in report["remarks"][1]["problem"]
    (tmp_path / "KL/su15.wav").write_text("no audio")
    code, report = run(capsys, "corpus", "check", "savee", tmp_path)
    assert (code, report["unusable"]) == (1, 1)
    assert report["problems"][0]["path"] == "KL/su15.wav"
    (tmp_path / "KL/su15.wav").unlink()
    code, report = run(capsys, "corpus", "check", "savee", tmp_path)
    assert code == 1
    assert report["problems"][0] == {"path": "KL_su15.wav", "problem": "is not there"}
    assert cli.main(["corpus", "check", "savee", str(tmp_path)]) == 1
    assert "KL_su15.wav" in capsys.readouterr().out


def test_corpus_check_takes_options_and_names_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    librispeech_tree(tmp_path, "list")
    code, report = run(capsys, "corpus", "check", "librispeech", tmp_path, "--options", "{words: 2, limit: 3}")
    assert (code, report["segments"]) == (1, 8)
    assert report["files"] <= 5
    for words, message in (
        (["savee"], "name the folder of savee once"),
        (["savee", str(tmp_path), "--folder", str(tmp_path)], "name the folder of savee once"),
        (["savee", str(tmp_path), "--options", "{words: 2}"], "corpus savee: no option words; it has none"),
        (["csv", str(tmp_path), "--options", "{words: 2}"], "corpus csv: has no options, not words"),
    ):
        assert cli.main(["corpus", "check", *words]) == 2
        assert message in capsys.readouterr().err


def test_corpus_list_tells_how_to_get_each(capsys: pytest.CaptureFixture[str]) -> None:
    code, known = run(capsys, "corpus", "list")
    assert code == 0
    assert set(known) == set(corpora.CORPORA)
    for about in known.values():
        assert about["what"]
        assert about["layout"]
        assert about["source"].startswith(("https://", "http://", "qat corpus "))
    assert known["librispeech"]["options"] == "alignments, words, limit, subsets"
    assert cli.main(["corpus", "list"]) == 0
    assert "https://zenodo.org/records/1188976" in capsys.readouterr().out


def test_the_released_codes_actors_go_by_the_corpus(tmp_path: Path) -> None:
    for word in ("back", "bite", "dog"):
        for speaker in ("OAF", "YAF"):
            for emotion in ("sad", "ps"):
                sound(tmp_path / "tess" / f"{speaker}_{word}_{emotion}.wav")
    corpus = CorpusConfig("tess", tmp_path / "tess")
    data = load_data(
        prepared(Experiment(corpus=corpus, split=SplitConfig("paper-actor"), cache=tmp_path / "cache")),
        quiet=True,
    )
    assert {part: len(numbers) for part, numbers in data.parts.items()} == {"train": 6, "validation": 3, "test": 3}
    assert set(data.index["speaker"].iloc[data.parts["train"]]) == {"OAF"}


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    """Usual on clusters and with tools that version data."""
    disk = tmp_path / "disk/Actor_01"
    sound(disk / "03-01-03-01-01-01-01.wav")
    corpus = tmp_path / "ravdess"
    corpus.mkdir()
    (corpus / "Actor_01").symlink_to(disk)
    (disk / "again").symlink_to(corpus)
    (corpus / "lost").symlink_to(tmp_path / "nowhere")
    assert corpora.read("ravdess", corpus).table["path"].tolist() == ["Actor_01/03-01-03-01-01-01-01.wav"]
