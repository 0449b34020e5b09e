import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from qat.data.manifest import Manifest, build_manifest, check_files, read_manifest, write_manifest


def test_facts_come_from_the_files(make_corpus: Callable[..., Manifest]) -> None:
    manifest = make_corpus({"a/1.wav": 0.5, "b/2.wav": 0.25})
    assert manifest.table["duration"].tolist() == [0.5, 0.25]
    digest = hashlib.sha256((manifest.root / "a/1.wav").read_bytes()).hexdigest()
    assert manifest.table["checksum"][0] == digest


def test_round_trip(make_corpus: Callable[..., Manifest], tmp_path: Path) -> None:
    manifest = make_corpus({"a/1.wav": 0.5, "b/2.wav": 0.25})
    table = manifest.table.assign(text=["NA", 'a "quoted", žluťoučký\nline'], valence=[2.5, float("nan")], number="007")
    manifest = type(manifest)(manifest.root, table, "noise")
    write_manifest(manifest, manifest.root / "manifest.csv")
    again = read_manifest(manifest.root / "manifest.csv", name="noise")
    pd.testing.assert_frame_equal(again.table, table, check_dtype=False)
    assert again.root == manifest.root
    assert again.key == manifest.key
    assert not list(manifest.root.glob("*.part"))


def test_duration_and_checksum_are_optional_in_a_csv(make_corpus: Callable[..., Manifest]) -> None:
    manifest = make_corpus({"a/1.wav": 0.5})
    csv = manifest.root / "mine.csv"
    csv.write_text("path,speaker,text,emotion\na/1.wav,anna,hello,happy\n")
    read = read_manifest(csv)
    assert read.name == "mine"
    assert read.table["checksum"].tolist() == manifest.table["checksum"].tolist()
    assert read.table["duration"].tolist() == [0.5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,text,emotion\na/1.wav,,\n", r"mine\.csv: column 'speaker' is missing"),
        ("path,speaker,text,emotion\n", r"mine\.csv: has no rows"),
        ("", r"mine\.csv: not a CSV table"),
        ("path,speaker,text,emotion\na/1.wav,a,,\n,a,,\n", r"row 2, column 'path': '' must not be empty"),
        (
            "path,speaker,text,emotion\na/1.wav,a,,\na/1.wav,a,,\n",
            r"row 2, column 'path': 'a/1.wav' must be in one row",
        ),
        ("path,speaker,text,emotion\n../1.wav,a,,\n", r"row 1, column 'path': '../1.wav' must be relative"),
        ("path,speaker,text,emotion\n/1.wav,a,,\n", r"row 1, column 'path': '/1.wav' must be relative"),
        ("path,speaker,text,emotion\na/2.wav,a,,\n", r"row 1, column 'path': 'a/2.wav' is no file under"),
        ("path,speaker,text,emotion,duration\na/1.wav,a,,,long\n", r"column 'duration': 'long' must be a number"),
        (
            "path,speaker,text,emotion,duration\na/1.wav,a,,,-1\n",
            r"mine\.csv: row 1, column 'duration': -1\.0 must be a number",
        ),
        ("path,speaker,text,emotion,checksum\na/1.wav,a,,,abc\n", r"column 'checksum': 'abc' must be 64"),
        ("path,speaker,text,emotion,valence\na/1.wav,a,,,high\n", r"column 'valence': 'high' must be a number"),
    ],
)
def test_bad_csv_is_named(make_corpus: Callable[..., Manifest], content: str, message: str) -> None:
    csv = make_corpus({"a/1.wav": 0.1}).root / "mine.csv"
    csv.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_manifest(csv)


def test_no_such_manifest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.csv: no such manifest"):
        read_manifest(tmp_path / "none.csv")


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no audio file of the corpus 'mine'"):
        build_manifest(tmp_path, [], "mine")


def test_filter(make_corpus: Callable[..., Manifest]) -> None:
    manifest = make_corpus({"a/1.wav": 0.1, "b/2.wav": 0.1, "a/3.wav": 0.1})
    assert manifest.filter("speaker == 'a'").table["path"].tolist() == ["a/1.wav", "a/3.wav"]
    by_mask = manifest.filter(manifest.table["speaker"] == "b")
    assert by_mask.table["path"].tolist() == ["b/2.wav"]
    assert by_mask.table.index.tolist() == [0]
    with pytest.raises(ValueError, match="noise: no row is left"):
        manifest.filter("speaker == 'z'")


def test_key_follows_content_not_place(make_corpus: Callable[..., Manifest], tmp_path: Path) -> None:
    manifest = make_corpus({"a/1.wav": 0.1, "b/2.wav": 0.1})
    elsewhere = type(manifest)(Path("/elsewhere"), manifest.table[sorted(manifest.table.columns)], manifest.name)
    assert elsewhere.key == manifest.key
    relabelled = type(manifest)(manifest.root, manifest.table.assign(emotion="sad"), manifest.name)
    assert relabelled.key != manifest.key
    (manifest.root / "a/1.wav").write_bytes((manifest.root / "b/2.wav").read_bytes())
    rows = manifest.table[["path", "speaker", "text", "emotion"]].to_dict("records")
    assert build_manifest(manifest.root, rows, "noise").key != manifest.key


def test_check_files_finds_every_kind_of_trouble(make_corpus: Callable[..., Manifest]) -> None:
    manifest = make_corpus({f"{name}.wav": 0.1 for name in ("good", "gone", "changed", "broken")})
    assert not len(check_files(manifest, progress=False))
    (manifest.root / "gone.wav").unlink()
    (manifest.root / "changed.wav").write_bytes((manifest.root / "good.wav").read_bytes())
    (manifest.root / "broken.wav").write_bytes(b"RIFF")
    problems = check_files(manifest, progress=False).set_index("path")["problem"]
    assert set(problems.index) == {"gone.wav", "changed.wav", "broken.wav"}
    assert "no such file" in problems["gone.wav"]
    assert "checksum differs" in problems["changed.wav"]
    assert "cannot be decoded" in problems["broken.wav"]


def segments(make_corpus: Callable[..., Manifest]) -> Any:
    manifest = make_corpus({"a/1.wav": 1.0, "b/2.wav": 0.5})
    facts = manifest.table.set_index("path")["checksum"]
    rows = [("a/1.wav", 0.0, 0.25), ("a/1.wav", 0.25, 0.5), ("b/2.wav", 0.1, 0.2), ("a/1.wav", 0.75, 0.25)]
    table = pd.DataFrame(rows, columns=["path", "start", "duration"]).assign(speaker="s", text="word", emotion="")
    return type(manifest)(manifest.root, table.assign(checksum=table["path"].map(facts)), "words")


def test_segments_of_a_file_are_rows_of_their_own(make_corpus: Callable[..., Manifest], tmp_path: Path) -> None:
    manifest = segments(make_corpus)
    assert manifest.segments == [(0.0, 0.25), (0.25, 0.5), (0.1, 0.2), (0.75, 0.25)]
    assert manifest.by_file() == [[0, 1], [2], [3]]
    write_manifest(manifest, manifest.root / "words.csv")
    again = read_manifest(manifest.root / "words.csv")
    assert again.key == manifest.key
    assert again.segments == manifest.segments
    moved = manifest.table.assign(start=manifest.table["start"] + 0.001)
    assert type(manifest)(manifest.root, moved, "words").key != manifest.key
    bare = manifest.table.drop(columns="checksum").to_dict("records")
    assert build_manifest(manifest.root, bare, "words").key == manifest.key


def test_whole_files_have_no_segment(make_corpus: Callable[..., Manifest]) -> None:
    manifest = make_corpus({"a/1.wav": 0.1, "b/2.wav": 0.1})
    assert manifest.segments == [(), ()]
    assert manifest.by_file() == [[0], [1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("start\na/1.wav,s,,,0\n", "column 'duration' is missing; beside 'start' it says how long a segment is"),
        ("start,duration\na/1.wav,s,,,-1,1\n", r"row 1, column 'start': -1\.0 must be a number of seconds from 0"),
        ("start,duration\na/1.wav,s,,,,1\n", r"row 1, column 'start': nan must be a number of seconds from 0"),
        (
            "start,duration\na/1.wav,s,,,0,1\na/1.wav,s,,,0,2\n",
            r"row 2, column 'path': 'a/1.wav' must be in one row only",
        ),
    ],
)
def test_bad_segments_are_named(make_corpus: Callable[..., Manifest], content: str, message: str) -> None:
    csv = make_corpus({"a/1.wav": 0.1}).root / "mine.csv"
    csv.write_text("path,speaker,text,emotion," + content)
    with pytest.raises(ValueError, match=message):
        read_manifest(csv)


def test_check_files_reads_every_segment(make_corpus: Callable[..., Manifest]) -> None:
    manifest = segments(make_corpus)
    assert not len(check_files(manifest, progress=False))
    late = manifest.table.assign(start=[0.0, 5.0, 0.1, 0.75])
    problems = check_files(type(manifest)(manifest.root, late, "words"), progress=False)
    assert problems["path"].tolist() == ["a/1.wav"]
    assert "from 5 s: has no samples" in problems["problem"][0]
    (manifest.root / "b/2.wav").write_bytes((manifest.root / "a/1.wav").read_bytes())
    assert check_files(manifest, progress=False)["path"].tolist() == ["b/2.wav"]
