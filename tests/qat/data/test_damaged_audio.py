"""One bad file never ends the work on others: each is read, or named with a reason, in bounded time and memory."""

from __future__ import annotations

import io
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from qat.config import SpectrogramConfig
from qat.data import audio, corpora
from qat.data.audio import AudioError, decode, duration_of, load_audio
from qat.data.manifest import read_manifest
from qat.data.spectrogram import cut
from qat.data.store import prepare
from tests.qat.data.damaged import damaged, intact

SECONDS = 2.0  # for one file


def encoded(samples: np.ndarray, coding: str = "PCM_16", ending: str = "wav", rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=ending, subtype=coding)
    return file.getvalue()


SOUND = 0.4 * np.sin(np.arange(16_000) * 0.1)


def wrong_flac() -> bytes:
    """One bit of a FLAC's 36-bit number of samples: 240 GiB would be asked for."""
    content = bytearray(encoded(SOUND, ending="flac"))
    content[21] |= 0x0F
    return bytes(content)


def wrong_rate() -> bytes:
    """A hertz: resampled to 16 kHz the second is 16,000 times as long."""
    content = bytearray(encoded(SOUND))
    content[24:28] = (1).to_bytes(4, "little")
    return bytes(content)


BAD = {
    "pointer.wav": (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"c" * 64, "Git LFS.*git lfs pull"),
    "headerless.raw": (bytes(2000), "cannot be decoded as audio"),
    "empty.wav": (b"", "cannot be decoded as audio"),
    "cut.wav": (encoded(SOUND)[:10_000], "cut short, 22044 bytes"),
    "cut.aiff": (encoded(SOUND, ending="aiff")[:10_000], "cut short, 220.. bytes"),
    "cut.flac": (wrong_flac(), "cut short|cannot be decoded as audio"),
    "rate.wav": (wrong_rate(), "sample rate of 1 Hz; 2000 to 768000 Hz"),
    "integers.wav": (encoded(10_000 * SOUND, "FLOAT"), r"reach 4000 where full scale is 1.*32768"),
    "overflow.wav": (encoded(9e38 * SOUND, "DOUBLE"), "not finite"),
    "huge.wav": (encoded(5e38 * SOUND, "FLOAT"), "its samples reach 2e.38"),
    "silent.wav": (encoded(0.004 * SOUND), "silent"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_the_reason(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(BAD[name][0])
    with pytest.raises(AudioError, match=rf"{name}: .*{BAD[name][1]}"):
        load_audio(tmp_path / name)
    assert 0 <= duration_of(tmp_path / name) <= 24 * 3600


FORGIVEN = {"avr", "ircam", "mat4", "mat5", "mpc2k", "paf", "pvf", "sd2", "svx", "voc", "wve", "xi"}
"""Formats of instruments and laboratories whose headers are not read here: libsndfile reads what is there."""


def test_a_file_of_which_a_part_is_missing_is_never_read_in_silence(tmp_path: Path) -> None:
    formats = set()
    for name, content in intact().items():
        file = tmp_path / name
        if file.suffix[1:] in FORGIVEN:
            continue
        formats.add(file.suffix)
        file.write_bytes(content)
        try:
            load_audio(file)
        except AudioError as error:  # what libsndfile writes and does not read
            assert "cannot be decoded" in str(error), name  # noqa: PT017
            continue
        file.write_bytes(content[: len(content) * 6 // 10])
        with pytest.raises(AudioError, match=r"cut short|cannot be decoded|has no samples"):
            load_audio(file)
    assert {".wav", ".flac", ".ogg", ".mp3", ".aiff", ".au", ".nist", ".w64", ".rf64", ".caf"} <= formats


@pytest.mark.parametrize("decoder", ["SoundFile.__init__", "SoundFile.read"])
def test_whatever_a_decoder_raises_is_of_its_file(
    decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise MemoryError("out of memory")

    (tmp_path / "a.wav").write_bytes(encoded(SOUND))
    monkeypatch.setattr(f"soundfile.{decoder}", broken)
    with pytest.raises(AudioError, match=r"a\.wav: cannot be decoded as audio \(out of memory\)"):
        decode(tmp_path / "a.wav")


def test_telephone_coding_is_read(tmp_path: Path) -> None:
    """GSM cannot seek: what is in front of a segment is decoded too."""
    (tmp_path / "a.wav").write_bytes(encoded(SOUND[:8000], "GSM610", rate=8000))
    whole = decode(tmp_path / "a.wav", 8000)
    assert len(whole) == pytest.approx(8000, abs=320)
    np.testing.assert_array_equal(decode(tmp_path / "a.wav", 8000, 0.25, 0.5), whole[2000:6000])


def test_a_header_written_to_a_pipe_is_no_truncated_file(tmp_path: Path) -> None:
    """Its writer did not know the length."""
    content = bytearray(encoded(SOUND))
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    (tmp_path / "a.wav").write_bytes(content)
    assert len(decode(tmp_path / "a.wav")) == 16_000


def test_blocks_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stereo = np.stack([SOUND, -0.5 * SOUND], axis=1)
    (tmp_path / "a.wav").write_bytes(encoded(stereo, "FLOAT"))
    whole = decode(tmp_path / "a.wav")
    monkeypatch.setattr(audio, "_BLOCK", 300)
    np.testing.assert_array_equal(decode(tmp_path / "a.wav"), whole)
    np.testing.assert_array_equal(decode(tmp_path / "a.wav", 16_000, 0.1, 0.5), whole[1600:9600])


def test_too_long_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.wav").write_bytes(encoded(SOUND))
    monkeypatch.setattr(audio, "LONGEST", 1.0)
    assert len(decode(tmp_path / "a.wav")) == 16_000
    monkeypatch.setattr(audio, "LONGEST", 0.5)
    with pytest.raises(AudioError, match=r"a\.wav: longer than 0\.5 s; cut it into pieces"):
        decode(tmp_path / "a.wav")
    assert len(decode(tmp_path / "a.wav", 16_000, 0.25, 0.5)) == 8000


@pytest.mark.parametrize("name", intact())
def test_intact_files_of_every_coding_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(intact()[name])
    rate = soundfile.info(tmp_path / name).samplerate  # some codings have their own
    assert 7900 <= len(decode(tmp_path / name, rate)) <= 10_400  # blocks of lossy codings are filled up


def read_all(folder: Path, rng: np.random.Generator, count: int) -> int:
    """How many of the damaged files can be read; each is read to finite spectrograms or named, within seconds."""
    config, readable = SpectrogramConfig(), 0
    for name, content in damaged(rng, count):
        file = folder / name
        file.write_bytes(content)
        start, reason = time.perf_counter(), str(file)
        try:
            duration_of(file)
            assert torch.isfinite(cut(load_audio(file), config)).all(), name
            readable += 1
        except AudioError as error:
            reason = str(error)
        assert str(file) in reason
        assert time.perf_counter() - start < SECONDS, name
        file.unlink()
    return readable


def test_damaged_files(tmp_path: Path, rng: np.random.Generator) -> None:
    assert 50 < read_all(tmp_path, rng, 500) < 500


@pytest.mark.slow
def test_many_damaged_files(tmp_path: Path, rng: np.random.Generator) -> None:
    assert 2000 < read_all(tmp_path, rng, 20_000) < 20_000


@pytest.mark.slow
def test_memory_of_a_damaged_file_is_bounded(tmp_path: Path, rng: np.random.Generator) -> None:
    """All that is decoded, in a process of its own with 500 MB beside the libraries."""
    for name, content in damaged(rng, 200):
        (tmp_path / name).write_bytes(content)
    read = (
        "import pathlib, resource, sys\n"
        "from qat.data.audio import AudioError, load_audio\n"
        "for file in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    try:\n        load_audio(file)\n    except AudioError:\n        pass\n"
    )
    subprocess.run([sys.executable, "-c", read, str(tmp_path)], check=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024 < 500 + 500


def test_the_others_of_a_corpus_are_prepared_and_checked(tmp_path: Path) -> None:
    rows = ["path,speaker,text,emotion"]
    for name, content in {"good.wav": encoded(SOUND), **{name: content for name, (content, _) in BAD.items()}}.items():
        (tmp_path / name).write_bytes(content)
        rows.append(f"{name},a,x,happy")
    (tmp_path / "my.csv").write_text("\n".join(rows) + "\n")
    store = prepare(read_manifest(tmp_path / "my.csv"), SpectrogramConfig(), tmp_path / "cache", workers=0)
    assert store.index["path"].tolist() == ["good.wav"]
    assert np.isfinite(store.magnitudes).all()
    reasons = dict(zip(store.skipped["path"], store.skipped["reason"], strict=True))
    assert set(reasons) == set(BAD)
    assert all(name in reason for name, reason in reasons.items())
    problems = corpora.check("csv", tmp_path / "my.csv", progress=False).problems
    assert set(problems["path"]) == set(BAD)
