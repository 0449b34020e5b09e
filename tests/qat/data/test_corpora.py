import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from qat.data import corpora
from qat.data.corpora import _debian, fillets, gcin, hedgewars


def sound(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.5 * np.sin(np.arange(2205) * 0.1)
    soundfile.write(path, samples, 22050, format="OGG", subtype="VORBIS")


@pytest.fixture
def gcin_tree(tmp_path: Path) -> Any:
    for name in ("ㄇㄚ/3", "ㄇㄚ/5", "ㄇㄚ1/3", "ㄇㄚ2/3", "ㄇㄚ3/3", "ㄇㄚ4/5"):
        sound(tmp_path / f"tree/usr/share/gcin-voice/ogg/{name}.ogg")
    return tmp_path / "tree"


def test_gcin(gcin_tree: Path) -> None:
    manifest = corpora.read("gcin", gcin_tree)
    got = {(row.words, row.speaker): (row.text, row.emotion) for row in manifest.table.itertuples()}
    assert got == {
        ("ㄇㄚ", "3"): ("ㄇㄚ", "tone-1"),
        ("ㄇㄚ", "5"): ("ㄇㄚ", "tone-1"),
        ("ㄇㄚ1", "3"): ("ㄇㄚ", "tone-5"),
        ("ㄇㄚ2", "3"): ("ㄇㄚ", "tone-2"),
        ("ㄇㄚ3", "3"): ("ㄇㄚ", "tone-3"),
        ("ㄇㄚ4", "5"): ("ㄇㄚ", "tone-4"),
    }
    assert manifest.table["duration"].tolist() == [0.1] * 6


def test_hedgewars(tmp_path: Path) -> None:
    voices = tmp_path / "usr/share/games/hedgewars/Data/Sounds/voices"
    expected = {
        ("Pirate", "Illgetyou"): "angry",
        ("Pirate", "Uh-oh"): "fear",
        ("Default_uk", "Laugh"): "happy",
        ("Default_uk", "Ow4"): "sad",
        ("Default_uk", "Boring"): "neutral",
        ("Default_uk", "Jump1"): "",
    }
    for pack, phrase in expected:
        sound(voices / pack / f"{phrase}.ogg")
    sound(voices.parent / "explosion.ogg")
    table = corpora.read("hedgewars", tmp_path).table
    assert {(row.speaker, row.text): row.emotion for row in table.itertuples()} == expected


def test_no_phrase_has_two_emotions() -> None:
    phrases = [phrase for text in hedgewars.PHRASES.values() for phrase in text.split()]
    assert len(phrases) == len(set(phrases)) == 57


def test_fillets(tmp_path: Path) -> None:
    root = tmp_path / "usr/share/games/fillets-ng"
    lines = [f'dialogId("m-{n}", "font_small", "A fish.")\ndialogStr("Ryba, ryba {n}!")\n' for n in range(19)]
    lines += [
        '-- a comment\ndialogId("v-0", "font_big", "He said \\"no\\".")\n\ndialogStr("Řekl \\"ne\\", ryba.")\n',
        'dialogId("noise", "", "")\ndialogStr("ryba")\n',
        'dialogId("not-recorded", "font_big", "Fish.")\ndialogStr("Ryba.")\n',
    ]
    (root / "script/reef").mkdir(parents=True)
    (root / "script/reef/dialogs_cs.lua").write_text("\n".join(lines), encoding="utf-8")
    (root / "script/reef/dialogs_nl.lua").write_text('dialogId("v-0", "font_big", "No.")\ndialogStr("Nee.")')
    for name in ("v-0", "noise", "no-text", *(f"m-{n}" for n in range(19))):
        sound(root / f"sound/reef/cs/{name}.ogg")
    sound(root / "sound/reef/nl/v-0.ogg")
    sound(root / "sound/reef/en/v-0.ogg")
    table = corpora.read("fillets", tmp_path).table.set_index("path")
    assert len(table) == 21
    big: Any = table.loc["usr/share/games/fillets-ng/sound/reef/cs/v-0.ogg"]
    assert big[["speaker", "text", "gloss", "language", "line"]].tolist() == [
        "cs-big",
        'Řekl "ne", ryba.',
        'He said "no".',
        "cs",
        "reef/v-0",
    ]
    # "ryba" is said in 20 recorded lines, counted once in each; nothing else is.
    assert set(table["words"][table["language"] == "cs"]) == {"cs:ryba"}
    assert table["words"]["usr/share/games/fillets-ng/sound/reef/nl/v-0.ogg"] == ""
    assert table["speaker"].value_counts().to_dict() == {"cs-small": 19, "cs-big": 1, "nl-big": 1}


def test_a_word_of_nineteen_lines_is_no_class(tmp_path: Path) -> None:
    root = tmp_path / "usr/share/games/fillets-ng"
    (root / "script/reef").mkdir(parents=True)
    lines = [f'dialogId("m-{n}", "font_small", "")dialogStr("ryba {n}")' for n in range(19)]
    (root / "script/reef/dialogs_cs.lua").write_text("\n".join(lines))
    for n in range(19):
        sound(root / f"sound/reef/cs/m-{n}.ogg")
    assert set(fillets.read(tmp_path).table["words"]) == {""}


def test_unknown_corpus(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown corpus 'timit'; known are demo, .*, librispeech, and csv"):
        corpora.read("timit", tmp_path)


@pytest.mark.parametrize("name", corpora.CORPORA)
def test_empty_and_foreign_folders(tmp_path: Path, name: str) -> None:
    how = {
        "demo": "fill it with `qat corpus make demo --folder",
        "gcin": "fill it with `qat corpus fetch gcin --folder",
    }
    for folder in (tmp_path, tmp_path / "none"):
        for look in (corpora.read, corpora.check):
            with pytest.raises(ValueError, match=f"{folder}: empty or no folder; {how.get(name, '')}"):
                look(name, folder)
    (tmp_path / "other.txt").write_text("something else")
    with pytest.raises(ValueError, match=f"{tmp_path}: (holds no demo corpus|no audio file of the corpus '{name}')"):
        corpora.read(name, tmp_path)


def test_csv(gcin_tree: Path) -> None:
    clip = next(gcin_tree.rglob("*.ogg")).relative_to(gcin_tree)
    (gcin_tree / "mine.csv").write_text(f"path,speaker,text,emotion\n{clip.as_posix()},anna,,happy\n")
    assert corpora.read("csv", gcin_tree / "mine.csv").table["speaker"].tolist() == ["anna"]


@pytest.fixture
def package(gcin_tree: Path, tmp_path: Path) -> Any:
    if shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb")
    (gcin_tree / "DEBIAN").mkdir()
    control = "Package: gcin-voice\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: voices\n"
    (gcin_tree / "DEBIAN/control").write_text(control)
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    deb = downloads / "gcin-voice_1_all.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", gcin_tree, deb], check=True, capture_output=True)
    return downloads


def test_fetch_from_downloaded_packages(package: Any, tmp_path: Path) -> None:
    manifest = gcin.fetch(tmp_path / "gcin", from_dir=package, progress=False)
    assert len(manifest) == 6
    assert manifest.root == tmp_path / "gcin"
    # The second time the folder is only read.
    assert gcin.fetch(tmp_path / "gcin", from_dir=tmp_path / "none", progress=False).key == manifest.key


def test_fetch_downloads_with_a_private_state(package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """apt-get is imitated by a script that records how it is called and delivers the package."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "apt-get").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncp {package}/*.deb .\n')
    (tools / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    assert len(gcin.fetch(tmp_path / "gcin", progress=False)) == 6
    update, download = (tmp_path / "calls").read_text().splitlines()
    assert update.endswith("update")
    assert download.endswith("download gcin-voice")
    assert all("Dir::State=/" in call and "Dir::Cache=/" in call for call in (update, download))


def test_failed_fetches_leave_nothing(package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "corpora/gcin"
    with pytest.raises(ValueError, match=r"none: no package file gcin-voice_\*\.deb in this folder"):
        gcin.fetch(target, from_dir=tmp_path / "none", progress=False)
    deb = package / "gcin-voice_1_all.deb"
    (package / "gcin-voice_2_all.deb").write_bytes(deb.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"dpkg-deb failed with status 2: .*gcin-voice_2_all\.deb"):
        gcin.fetch(target, from_dir=package, progress=False)
    (package / "hedgewars-data_1_all.deb").write_bytes(deb.read_bytes())
    with pytest.raises(ValueError, match="no audio file of the corpus 'hedgewars'"):
        hedgewars.fetch(tmp_path / "corpora/hedgewars", from_dir=package, progress=False)
    which = shutil.which
    monkeypatch.setattr(_debian.shutil, "which", lambda name: None if name == "apt-get" else which(name))
    with pytest.raises(ValueError, match=r"apt-get is not on this machine; .* gcin-voice .* --from"):
        gcin.fetch(target, progress=False)
    monkeypatch.setattr(_debian.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="dpkg-deb is needed to unpack gcin-voice"):
        gcin.fetch(target, from_dir=package, progress=False)
    assert not [path for path in (tmp_path / "corpora").iterdir() if not path.match(".*.lock*")]


def test_labels_are_stripped_and_near_equal_ones_remarked(tmp_path: Path) -> None:
    rows = ["path,speaker,text,emotion"]
    for number, (speaker, emotion) in enumerate(
        (("ann", "happy"), (" ann ", "Happy"), ("José", "sad"), ("Jose\u0301", "s ad"))
    ):
        tone(tmp_path / f"{number}.wav", number)
        rows.append(f"./{number}.wav,{speaker}, hello ,{emotion}")
    (tmp_path / "my.csv").write_text("\n".join(rows) + "\n")
    checked = corpora.check("csv", tmp_path / "my.csv", progress=False)
    table = checked.manifest.table
    assert table["path"].tolist() == ["0.wav", "1.wav", "2.wav", "3.wav"]
    assert table["speaker"].tolist()[:2] == ["ann", "ann"]
    assert set(table["text"]) == {"hello"}
    remarks = checked.remarks["problem"].tolist()
    assert len(remarks) == 3
    assert "emotion has 'Happy' and 'happy', which are different labels" in remarks
    assert any(remark.startswith("speaker has 'Jose") for remark in remarks)


def tone(path: Path, number: int) -> None:
    soundfile.write(path, 0.5 * np.sin(np.arange(4000) * (number + 1) / 10), 16000)


def test_of_a_package_only_plain_files_are_left(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/tool").write_text("x")
    (tmp_path / "bin/tool").chmod(0o6755)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "out").symlink_to("/etc/passwd")
    (tmp_path / "inside").symlink_to("bin/tool")
    _debian._drop_all_but_files(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bin", "inside", "tool"]
    assert (tmp_path / "bin/tool").stat().st_mode & 0o7777 == 0o755
