import errno
import fcntl
import json
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from qat.config import SpectrogramConfig
from qat.data import store as store_module
from qat.data.audio import load_audio
from qat.data.manifest import Manifest, build_manifest
from qat.data.spectrogram import cut
from qat.data.store import SpectrogramStore, prepare
from qat.files import sha256_of

CONFIG = SpectrogramConfig()


def quietly(manifest: Manifest, config: Any, folder: Path, workers: int = 0) -> Any:
    return prepare(manifest, config, folder, workers=workers, progress=False)


def visible(folder: Path) -> Any:
    return [path for path in folder.iterdir() if not path.match(".*.lock*")]


@pytest.mark.parametrize("rule", ["audio", "reference", "word"])
def test_rows_are_the_cuts_of_the_files_in_order(
    make_corpus: Callable[..., Manifest], tmp_path: Path, rule: str
) -> None:
    manifest = make_corpus({"a/1.wav": 1.0, "b/2.wav": 8.5, "c/3.wav": 4.0}, rate=22050)
    config = SpectrogramConfig(cut=rule)
    store = quietly(manifest, config, tmp_path / "prepared")
    expected = [cut(load_audio(manifest.root / path), config) for path in manifest.table["path"]]
    assert torch.equal(torch.from_numpy(np.array(store.magnitudes)), torch.cat(expected))
    assert isinstance(store.magnitudes, np.memmap)
    assert store.magnitudes.dtype == np.float32
    index = store.index
    assert index["path"].tolist() == [p for p, c in zip(manifest.table["path"], expected, strict=True) for _ in c]
    assert index["cut"].tolist() == [i for c in expected for i in range(len(c))]
    assert index["emotion"].tolist() == index["path"].map(manifest.table.set_index("path")["emotion"]).tolist()
    for row, frames in enumerate(index["frames"]):
        assert store.magnitudes[row, :frames].any(axis=1).all()
        assert not store.magnitudes[row, frames:].any()
    chosen = [len(store) - 1, 0]
    assert torch.equal(store.rows(chosen), torch.cat(expected)[chosen])


def test_a_few_files_are_prepared_without_processes(
    make_corpus: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_corpus({"a/1.wav": 1.0, "b/2.wav": 1.0})
    asked = []
    whole = store_module.process_map
    monkeypatch.setattr(store_module, "process_map", lambda workers, *_: asked.append(workers) or whole(0, print))
    prepare(manifest, CONFIG, tmp_path / "few", progress=False)
    monkeypatch.setattr(store_module, "_FEW", 2)
    prepare(manifest, CONFIG, tmp_path / "many", progress=False)
    assert asked == [0, None]


def test_workers_change_no_byte(make_corpus: Callable[..., Manifest], tmp_path: Path) -> None:
    manifest = make_corpus({f"{name}.wav": 0.5 for name in "abcdefghij"})
    alone = quietly(manifest, CONFIG, tmp_path / "alone")
    spread = quietly(manifest, CONFIG, tmp_path / "spread", workers=2)
    for name in ("magnitudes.npy", "index.csv", "skipped.csv", "meta.json"):
        assert (alone.folder / name).read_bytes() == (spread.folder / name).read_bytes()


def test_the_second_call_decodes_nothing(
    make_corpus: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_corpus({"a.wav": 0.5, "b.wav": 0.5})
    first = quietly(manifest, CONFIG, tmp_path)
    monkeypatch.setattr(store_module, "load_audio", lambda *_: pytest.fail("decoded again"))
    second = quietly(manifest, CONFIG, tmp_path)
    assert second.folder == first.folder
    assert second.config == CONFIG


def test_other_settings_or_content_are_another_store(make_corpus: Callable[..., Manifest], tmp_path: Path) -> None:
    manifest = make_corpus({"a.wav": 0.5, "b.wav": 0.5})
    relabelled = type(manifest)(manifest.root, manifest.table.assign(emotion="sad"), manifest.name)
    folders = {
        quietly(manifest, CONFIG, tmp_path).folder,
        quietly(manifest, SpectrogramConfig(time_order="reversed"), tmp_path).folder,
        quietly(relabelled, CONFIG, tmp_path).folder,
        quietly(manifest.filter([True, False]), CONFIG, tmp_path).folder,
    }
    assert len(folders) == 4


def test_skipped_files_are_listed_with_the_reason(
    make_corpus: Callable[..., Manifest], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = make_corpus({f"{name}.wav": 0.5 for name in ("good", "silent", "broken", "tiny")})
    soundfile.write(manifest.root / "silent.wav", np.full(8000, 0.004), 16000)
    (manifest.root / "broken.wav").write_bytes(b"RIFF....WAVE")
    soundfile.write(manifest.root / "tiny.wav", np.full(200, 0.5), 16000)
    rows = manifest.table[["path", "speaker", "text", "emotion"]].to_dict("records")
    manifest = build_manifest(manifest.root, rows, "noise")
    for _ in range(2):  # made, then opened
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            store = quietly(manifest, CONFIG, tmp_path)
        assert "3 of 4 files skipped" in caplog.text
        assert store.index["path"].tolist() == ["good.wav"]
        reasons = store.skipped.set_index("path")["reason"]
        assert "silent" in reasons["silent.wav"]
        assert "cannot be decoded" in reasons["broken.wav"]
        assert "200 samples, fewer than one window of 256" in reasons["tiny.wav"]


def test_no_usable_file_leaves_nothing(make_corpus: Callable[..., Manifest], tmp_path: Path) -> None:
    manifest = make_corpus({"a.wav": 0.005})
    with pytest.raises(ValueError, match=r"noise: no usable audio file among 1; the first: .*a\.wav: 80 samples"):
        quietly(manifest, CONFIG, tmp_path / "prepared")
    assert not visible(tmp_path / "prepared")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_changed_file_is_refused_and_leaves_nothing(
    make_corpus: Callable[..., Manifest], tmp_path: Path, workers: int
) -> None:
    manifest = make_corpus({"a.wav": 0.5, "b.wav": 0.5})
    soundfile.write(manifest.root / "b.wav", np.full(8000, 0.5), 16000)
    with pytest.raises(ValueError, match=r"b\.wav: changed since the manifest was made"):
        quietly(manifest, CONFIG, tmp_path / "prepared", workers)
    assert not visible(tmp_path / "prepared")


def test_interruption_leaves_nothing(
    make_corpus: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_corpus({"a.wav": 0.5, "b.wav": 0.5})

    def interrupted(path: Path, rate: Any) -> Any:
        if path.name == "b.wav":
            raise KeyboardInterrupt
        return load_audio(path, rate)

    monkeypatch.setattr(store_module, "load_audio", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quietly(manifest, CONFIG, tmp_path / "prepared")
    assert not visible(tmp_path / "prepared")


def test_one_process_prepares_for_all_that_wait(
    make_corpus: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_corpus({"a.wav": 0.5})
    started, go, written = threading.Event(), threading.Event(), []
    write = store_module._write

    def slowly(*arguments: Any) -> Any:
        written.append(manifest)
        started.set()
        assert go.wait(60)
        return write(*arguments)

    monkeypatch.setattr(store_module, "_write", slowly)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(quietly, manifest, CONFIG, tmp_path)
        assert started.wait(60)
        second = pool.submit(quietly, manifest, CONFIG, tmp_path)
        with pytest.raises(TimeoutError):
            second.result(timeout=0.5)
        go.set()
        assert first.result().folder == second.result().folder
    assert len(written) == 1


def test_where_nothing_can_be_locked_the_first_result_stays(
    make_corpus: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_corpus({"a.wav": 0.5})
    write = store_module._write
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "no locks available")))

    def overtaken(*arguments: Any) -> Any:
        monkeypatch.setattr(store_module, "_write", write)
        monkeypatch.setattr(os, "getpid", lambda: 0)  # as another process
        quietly(manifest, CONFIG, tmp_path / "prepared")
        return write(*arguments)

    monkeypatch.setattr(store_module, "_write", overtaken)
    store = quietly(manifest, CONFIG, tmp_path / "prepared")
    assert len(store) == 1
    assert visible(tmp_path / "prepared") == [store.folder]


def test_open_refuses_what_is_no_store(make_corpus: Callable[..., Manifest], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no prepared spectrograms"):
        SpectrogramStore.open(tmp_path)
    store = quietly(make_corpus({"a.wav": 0.5}), CONFIG, tmp_path)
    meta = json.loads((store.folder / "meta.json").read_text())
    (store.folder / "meta.json").write_text(json.dumps(meta | {"layout": 0}))
    with pytest.raises(ValueError, match="layout 0 is not"):
        SpectrogramStore.open(store.folder)


def test_negative_workers(make_corpus: Callable[..., Manifest], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers=-1 must not be negative"):
        quietly(make_corpus({"a.wav": 0.5}), CONFIG, tmp_path, workers=-1)


@pytest.mark.parametrize("workers", [0, 2])
def test_segments_are_prepared_as_if_they_were_files(
    make_corpus: Callable[..., Manifest], tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_corpus({"a.wav": 1.0, "b.wav": 1.0})
    rows = [("a.wav", 0.0, 0.25), ("a.wav", 0.25, 0.5), ("a.wav", 2.0, 0.5), ("b.wav", 0.5, 0.125), ("a.wav", 0.9, 0.1)]
    table = pd.DataFrame(rows, columns=["path", "start", "duration"]).assign(speaker="s", text=[*"vwxyz"], emotion="")
    words = build_manifest(manifest.root, table.to_dict("records"), "words")
    hashed = []
    monkeypatch.setattr(store_module, "sha256_of", lambda file: hashed.append(file.name) or sha256_of(file))
    config = SpectrogramConfig(cut="word")
    store = quietly(words, config, tmp_path / "prepared", workers)
    assert store.index["text"].tolist() == ["v", "w", "y", "z"]
    assert store.skipped.to_dict("list") == {
        "path": ["a.wav"],
        "reason": [f"{manifest.root}/a.wav, from 2 s: has no samples"],
    }
    for row, (path, start, duration) in enumerate([rows[0], rows[1], rows[3], rows[4]]):
        audio, _ = soundfile.read(manifest.root / path, dtype="float32")
        piece = audio[round(start * 16000) : round((start + duration) * 16000)]
        assert torch.equal(store.rows([row]), cut(piece, config))
        assert store.index["frames"][row] == -(-len(piece) // 128) + 1
    if not workers:
        assert hashed[:3] == ["a.wav", "b.wav", "a.wav"]  # once for adjacent segments; then the tables of the store


def test_a_changed_file_of_segments_is_refused(make_corpus: Callable[..., Manifest], tmp_path: Path) -> None:
    manifest = make_corpus({"a.wav": 1.0})
    rows = [
        {"path": "a.wav", "start": s, "duration": 0.2, "speaker": "s", "text": "", "emotion": ""} for s in (0.1, 0.5)
    ]
    words = build_manifest(manifest.root, rows, "words")
    soundfile.write(manifest.root / "a.wav", np.full(16000, 0.5), 16000)
    with pytest.raises(ValueError, match=r"a\.wav: changed since the manifest was made"):
        quietly(words, CONFIG, tmp_path / "prepared")
