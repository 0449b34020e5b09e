import dataclasses
from typing import Any

import numpy as np
import pytest
import scipy.signal
import torch

from qat.config import SpectrogramConfig
from qat.data.spectrogram import Normalisation, cut, magnitude, place_words, to_input, word_offsets

CONFIG = SpectrogramConfig()
REFERENCE = SpectrogramConfig(cut="reference")
WORD = SpectrogramConfig(cut="word")


def noise(samples: int) -> torch.Tensor:
    return torch.rand(samples) - 0.5


@pytest.mark.parametrize("samples", [256, 257, 1000, 1024, 64000, 70001])
def test_magnitude_is_scipy_stft(samples: int) -> None:
    audio = noise(samples)
    _, _, expected = scipy.signal.stft(audio.double().numpy(), 16000, window="hamming", nperseg=256)
    got = magnitude(audio, CONFIG)
    assert got.shape == (-(-samples // 128) + 1, 129)
    np.testing.assert_allclose(got, np.abs(expected).T, atol=2e-6)


def test_other_hops_are_scipy_stft_too() -> None:
    audio = noise(5000)
    _, _, expected = scipy.signal.stft(audio.double().numpy(), window="hamming", nperseg=256, noverlap=96)
    got = magnitude(audio, SpectrogramConfig(hop=160))
    np.testing.assert_allclose(got, np.abs(expected).T[: len(got)], atol=2e-6)


def test_magnitude_takes_batches() -> None:
    audio = noise(3 * 2000).view(3, 2000)
    torch.testing.assert_close(magnitude(audio, CONFIG)[1], magnitude(audio[1], CONFIG))


@pytest.mark.parametrize(("seconds", "count"), [(0.5, 1), (4.0, 1), (7.9, 1), (8.0, 2), (13.0, 3)])
def test_audio_cut_drops_the_remainder(seconds: float, count: int) -> None:
    audio = noise(round(seconds * 16000))
    cuts = cut(audio, CONFIG)
    assert cuts.shape == (count, 501, 129)
    padded = torch.nn.functional.pad(audio, (0, 64000))
    torch.testing.assert_close(cuts[-1], magnitude(padded[(count - 1) * 64000 : count * 64000], CONFIG))


def test_short_files_are_filled_with_zeros_at_the_end() -> None:
    cuts = cut(noise(16000), CONFIG)
    assert cuts[0, :126].min() > 0
    assert not cuts[0, 127:].any()


def reference_cuts(audio: np.ndarray) -> np.ndarray:
    """The released rule as the method's description has it: blocks of the time-reversed matrix of the whole file."""
    audio = np.pad(audio, (0, max(0, 64000 - len(audio))))
    _, _, spectrum = scipy.signal.stft(audio, 16000, window="hamming", nperseg=256)
    matrix = np.rot90(np.abs(spectrum))
    total = len(matrix)
    blocks = [matrix[start : start + 501] for start in range(0, total - 500, 501)]
    if total > 1002 and total % 501:
        blocks.append(matrix[-501:])
    return np.stack(blocks)


@pytest.mark.parametrize(
    ("samples", "count"), [(16000, 1), (64000, 1), (128000, 1), (128128, 2), (128256, 3), (150000, 3), (192256, 3)]
)
def test_reference_cut(samples: int, count: int) -> None:
    audio = noise(samples)
    expected = reference_cuts(audio.double().numpy())
    assert len(expected) == count
    reverse = dataclasses.replace(REFERENCE, time_order="reversed")
    np.testing.assert_allclose(cut(audio, reverse), expected, atol=2e-6)
    np.testing.assert_allclose(cut(audio, REFERENCE), expected[:, ::-1], atol=2e-6)


def test_a_file_of_six_seconds_gives_its_last_four_under_the_reference_rule() -> None:
    audio = torch.zeros(6 * 16000)
    audio[-16000:] = noise(16000)
    natural = cut(audio, REFERENCE)
    assert natural.shape == (1, 501, 129)
    assert natural[0, -100:].mean() > 10 * natural[0, :300].mean()


@pytest.mark.parametrize("rule", ["audio", "reference", "word"])
def test_time_order_reverses_rows_and_nothing_else(rule: str) -> None:
    audio = noise(150000 if rule != "word" else 9000)
    natural = cut(audio, SpectrogramConfig(cut=rule))
    backwards = cut(audio, SpectrogramConfig(cut=rule, time_order="reversed"))
    assert not torch.equal(natural, backwards)
    assert torch.equal(natural.flip(1), backwards)


def test_words_are_cut_or_filled_to_170_frames() -> None:
    short, long = noise(8000), noise(40000)
    assert cut(short, WORD).shape == (1, 170, 129)
    torch.testing.assert_close(cut(short, WORD)[0, :64], magnitude(short, WORD))
    assert not cut(short, WORD)[0, 64:].any()
    torch.testing.assert_close(cut(long, WORD)[0], magnitude(long, WORD)[:170])


@pytest.mark.parametrize("config", [CONFIG, REFERENCE, WORD])
def test_a_clip_shorter_than_a_window_is_refused(config: Any) -> None:
    for function in (cut, magnitude):
        with pytest.raises(ValueError, match="255 samples, fewer than one window of 256"):
            function(noise(255), config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hop": 0}, "features.hop: 0 must be above 0"),
        ({"hop": 512}, "features.hop: 512 must be at most the window of 256 samples"),
        (
            {"frame_seconds": 6.0},
            "features.frame_seconds: 6.0 must be so short .* at most 512 frames; with .* it has 751",
        ),
        ({"frame_seconds": 0.01}, "features.frame_seconds: 0.01 must be at least one window of 256 samples"),
        ({"cut": "words"}, "features.cut: 'words' must be one of audio, reference, word"),
        ({"time_order": "up"}, "features.time_order: 'up' must be one of natural, reversed"),
    ],
)
def test_bad_settings_are_named(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpectrogramConfig(**change)


def spectrograms(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.gamma(1.0, 1.0, (count, 501, 129)).astype(np.float32)


def test_statistics_come_from_the_training_rows_only_and_from_all_bins(rng: np.random.Generator) -> None:
    data = spectrograms(rng, 70)
    train = [3, 1, 69, 40]
    data[2] *= 1000  # not a training row
    data[3, 0, 128] = 50.0  # the bin that the input drops
    fitted = Normalisation.fit("max", data, train)
    chosen = data[train].astype(np.float64)
    assert fitted.maximum == 50.0
    assert fitted.mean == pytest.approx(chosen.mean(), rel=1e-9)
    assert fitted.std == pytest.approx(chosen.std(), rel=1e-9)
    many = Normalisation.fit("max", data, range(70))
    assert many.mean == pytest.approx(data.mean(dtype=np.float64), rel=1e-9)


def test_kinds_of_normalisation(rng: np.random.Generator) -> None:
    data = spectrograms(rng, 4)
    values = torch.from_numpy(data)
    fit = {kind: Normalisation.fit(kind, data, range(4)) for kind in ("max", "standard", "log")}
    torch.testing.assert_close(fit["max"](data), values / values.max())
    standard = fit["standard"](data)
    assert standard.mean().abs() < 1e-5
    assert standard.std(correction=0) == pytest.approx(1, abs=1e-5)
    expected = np.log1p(1000.0 * data / data.max()) / np.log(1001)
    np.testing.assert_allclose(fit["log"](data), expected, rtol=2e-5)
    assert fit["log"](data).max() == pytest.approx(1)
    assert fit["log"](torch.zeros(3)).tolist() == [0, 0, 0]


def test_normalisation_refuses_what_has_no_scale(rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match="rows is empty"):
        Normalisation.fit("max", spectrograms(rng, 1), [])
    broken = spectrograms(rng, 70)
    broken[66, 3, 4] = np.nan
    with pytest.raises(ValueError, match=r"the spectrogram of 66\.wav is not finite"):
        Normalisation.fit("max", broken, range(70), [f"{n}.wav" for n in range(70)])
    Normalisation.fit("max", broken, range(66))
    with pytest.raises(ValueError, match="training data is constant"):
        Normalisation.fit("max", np.zeros((2, 501, 129), np.float32), [0, 1])
    with pytest.raises(ValueError, match="kind='minmax' must be one of"):
        Normalisation("minmax", 1.0, 0.0, 1.0)


def test_input_pads_after_the_last_frame_and_drops_the_nyquist_bin() -> None:
    rows = torch.rand(3, 501, 129) + 1
    got = to_input(rows)
    assert got.shape == (3, 1, 512, 128)
    assert torch.equal(got[:, 0, :501], rows[:, :, :128])
    assert not got[:, 0, 501:].any()
    assert torch.equal(to_input(rows[0]), got[0])
    for wrong in (torch.rand(3, 501, 128), torch.rand(3, 513, 129)):
        with pytest.raises(ValueError, match=r"rows must be \[\.\.\., at most 512, 129\], got"):
            to_input(wrong)


def test_words_land_at_their_offsets() -> None:
    rows = torch.rand(4, 170, 129) + 1
    offsets = torch.tensor([0, 340, 7, 342])
    got = place_words(rows, offsets)
    assert got.shape == (4, 1, 512, 128)
    for word, offset, canvas in zip(rows, offsets.tolist(), got[:, 0], strict=True):
        expected = torch.zeros(512, 128)
        expected[offset : offset + 170] = word[:, :128]
        assert torch.equal(canvas, expected)


def test_word_offsets(rng: np.random.Generator) -> None:
    generator = torch.Generator().manual_seed(int(rng.integers(1 << 30)))
    each = word_offsets(20000, "sample", generator)
    assert (int(each.min()), int(each.max())) == (0, 340)
    assert each.double().mean() == pytest.approx(170, abs=5)
    assert len(word_offsets(50, "batch", generator).unique()) == 1
    assert len({int(word_offsets(2, "batch", generator)[0]) for _ in range(50)}) > 10
    assert word_offsets(3, "centre").tolist() == [171, 171, 171]
    with pytest.raises(ValueError, match="placing='left' must be one of"):
        word_offsets(3, "left")


@pytest.mark.parametrize("offsets", [[0, 343], [-1, 0], [0]])
def test_words_must_fit_the_canvas(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="offsets must be 2 frames from 0 to 342"):
        place_words(torch.rand(2, 170, 129), torch.tensor(offsets))
