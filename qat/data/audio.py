"""Decoding of audio files to mono float32 at one sample rate."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qat.config import WINDOW

SILENCE = 0.005
"""Files whose largest sample is at most this are skipped (WASPAA 2023, released preprocessing)."""


class AudioError(ValueError):
    """A file that cannot be used; the message names it and the reason. `prepare` skips such files and reports them."""


def decode(
    path: Path, sample_rate: int = 16000, start: float = 0.0, duration: float | None = None
) -> NDArray[np.float32]:
    """Decode an audio file or a segment of it, average its channels and resample it (soxr, high quality).

    Args:
        path: wav, flac, mp3, ogg, opus or anything else that libsndfile reads.
        sample_rate: sample rate of the result in Hz.
        start: start of the segment in seconds.
        duration: duration of the segment in seconds, by default up to the end of the file, where it ends at the latest.

    Returns:
        Samples `[n]`; full scale is 1.

    Raises:
        AudioError: no such file, not audio, no samples, or samples that are not finite.
    """
    # Imported here, as training on prepared spectrograms needs neither.
    import soundfile
    import soxr

    if not path.is_file():
        raise AudioError(f"{path}: no such file")
    try:
        with soundfile.SoundFile(path) as file:
            rate, first = file.samplerate, round(start * file.samplerate)
            if first:
                file.seek(min(first, file.frames))
            count = -1 if duration is None else round((start + duration) * rate) - first
            samples = file.read(count, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise AudioError(f"{path}: cannot be decoded as audio ({error})") from error
    if not len(samples):
        raise AudioError(f"{_place(path, start)}: has no samples")
    mono = samples.mean(axis=1, dtype=np.float32)
    if not np.isfinite(mono).all():
        raise AudioError(f"{_place(path, start)}: has samples that are not finite")
    resampled: NDArray[np.float32] = mono if rate == sample_rate else soxr.resample(mono, rate, sample_rate)
    return resampled


def load_audio(
    path: Path, sample_rate: int = 16000, start: float = 0.0, duration: float | None = None
) -> NDArray[np.float32]:
    """Decode an audio file for training: like `decode`, but silence is an error.

    Silent means that the largest sample (not the largest magnitude) is at most 0.005, as in the released preprocessing
    of WASPAA 2023.

    Args:
        path: audio file.
        sample_rate: sample rate of the result in Hz.
        start: start of the segment in seconds.
        duration: duration of the segment in seconds, see `decode`.

    Returns:
        Samples `[n]`; full scale is 1.

    Raises:
        AudioError: see `decode`; or silent, or shorter than one window.
    """
    samples = decode(path, sample_rate, start, duration)
    if len(samples) < WINDOW:
        raise AudioError(f"{_place(path, start)}: {len(samples)} samples, fewer than one window of {WINDOW}")
    peak = samples.max(initial=0.0)
    if peak <= SILENCE:
        raise AudioError(f"{_place(path, start)}: silent, its largest sample is {peak:.4g} and must be above {SILENCE}")
    return samples


def _place(path: Path, start: float) -> str:
    return f"{path}, from {start:g} s" if start else str(path)
