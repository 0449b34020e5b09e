from pathlib import Path

import numpy as np
import pytest
import soundfile

from qat.data.audio import AudioError, decode, load_audio


def tone(rate: int, seconds: float = 0.5, hertz: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100])
def test_resampling_keeps_the_tone(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "tone.wav", tone(rate), rate, subtype="FLOAT")
    samples = load_audio(tmp_path / "tone.wav")
    assert samples.dtype == np.float32
    assert samples.shape == (8000,)
    np.testing.assert_allclose(samples[500:-500], tone(16000)[500:-500], atol=2e-3)


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = tone(16000), tone(16000, hertz=1000.0)
    soundfile.write(tmp_path / "stereo.flac", np.stack([left, right], axis=1), 16000)
    np.testing.assert_allclose(load_audio(tmp_path / "stereo.flac"), (left + right) / 2, atol=1e-4)


def test_silence_is_judged_by_the_largest_magnitude_at_the_files_own_rate(tmp_path: Path) -> None:
    """Of quiet speech the largest positive sample after resampling may be below the limit, as in RAVDESS twice."""
    samples = np.full(48_000, 0.004)
    soundfile.write(tmp_path / "quiet.wav", samples, 48_000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"quiet\.wav: silent, its largest magnitude is 0\.004 and must"):
        load_audio(tmp_path / "quiet.wav")
    assert len(decode(tmp_path / "quiet.wav")) == 16_000
    samples[3] = -0.006
    soundfile.write(tmp_path / "quiet.wav", samples, 48_000, subtype="FLOAT")
    assert len(load_audio(tmp_path / "quiet.wav")) == 16_000


def test_unusable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("not audio at all")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.5, np.nan]), 16000, subtype="FLOAT")
    for name, why in [
        ("none.wav", "no such file"),
        ("text.wav", "cannot be decoded as audio"),
        ("empty.wav", "has no samples"),
        ("nan.wav", "not finite"),
    ]:
        with pytest.raises(AudioError, match=rf"{name}: .*{why}"):
            load_audio(tmp_path / name)


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg"])
def test_a_segment_is_what_the_file_holds_there(tmp_path: Path, rng: np.random.Generator, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    soundfile.write(path, rng.uniform(-0.5, 0.5, 16000), 16000)
    whole = load_audio(path)
    for start, duration in ((0.0, 0.25), (0.3, 0.1), (0.5, 0.5), (0.73, 0.02)):
        segment = load_audio(path, 16000, start, duration)
        first = round(16000 * start)
        # Vorbis decodes from the block before, which differs in the last bits.
        np.testing.assert_allclose(segment, whole[first : round(16000 * (start + duration))], atol=1e-4)
    np.testing.assert_allclose(load_audio(path, 16000, 0.9), whole[14400:], atol=1e-4)
    assert len(load_audio(path, 16000, 0.9, 5.0)) == 1600  # it ends with the file
    assert len(load_audio(path, 8000, 0.5, 0.25)) == 2000
    np.testing.assert_array_equal(load_audio(path, 16000, 0.0), whole)


def test_a_segment_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.r_[np.full(8000, 0.5), np.zeros(8000)], 16000)
    for segment, message in (
        ((1.5, 0.5), r"a\.wav, from 1\.5 s: has no samples"),
        ((0.25, 0.01), r"a\.wav, from 0\.25 s: 160 samples, fewer than one window"),
        ((0.5, 0.25), r"a\.wav, from 0\.5 s: silent"),
    ):
        with pytest.raises(AudioError, match=message):
            load_audio(tmp_path / "a.wav", 16000, *segment)
    assert len(load_audio(tmp_path / "a.wav", 16000, 0.25, 0.25)) == 4000
