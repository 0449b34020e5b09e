"""Decoding: any audio file to mono float32 at one sample rate."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qat.config import WINDOW

SILENCE = 0.005
"""A file whose largest sample is not above this is skipped (WASPAA 2023, released preprocessing)."""


class AudioError(ValueError):
    """A file that cannot be used; the message says which and why. `prepare` skips such files and reports them."""


def decode(
    path: Path, sample_rate: int = 16000, start: float = 0.0, duration: float | None = None
) -> NDArray[np.float32]:
    """Decode an audio file or a segment of it, average its channels and resample it (soxr, high quality).

    Args:
        path: wav, flac, mp3, ogg, opus or anything else that libsndfile reads.
        sample_rate: of the result, in Hz.
        start: where the segment begins, in seconds.
        duration: of the segment, in seconds; it ends with the file by default, and at the latest.

    Returns:
        `[n]`, full scale = 1.

    Raises:
        AudioError: no such file, not audio, no samples, or samples that are not finite.
    """
    # Here, not above: training reads prepared spectrograms and runs where neither is installed.
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
        raise AudioError(f"{_named(path, start)}: has no samples")
    mono = samples.mean(axis=1, dtype=np.float32)
    if not np.isfinite(mono).all():
        raise AudioError(f"{_named(path, start)}: has samples that are not finite")
    resampled: NDArray[np.float32] = mono if rate == sample_rate else soxr.resample(mono, rate, sample_rate)
    return resampled


def load_audio(
    path: Path, sample_rate: int = 16000, start: float = 0.0, duration: float | None = None
) -> NDArray[np.float32]:
    """Decode an audio file that is worth training on: like `decode`, but a silent one is an error.

    Silent means that the largest sample (not the largest magnitude) is at most 0.005, as in the method's preprocessing
    (WASPAA 2023, released code).

    Args:
        path: the file.
        sample_rate: of the result, in Hz.
        start: as in `decode`.
        duration: as in `decode`.

    Returns:
        `[n]`, full scale = 1.

    Raises:
        AudioError: as `decode`, or silent, or shorter than one window.
    """
    samples = decode(path, sample_rate, start, duration)
    if len(samples) < WINDOW:
        raise AudioError(f"{_named(path, start)}: {len(samples)} samples, fewer than one window of {WINDOW}")
    peak = samples.max(initial=0.0)
    if peak <= SILENCE:
        raise AudioError(f"{_named(path, start)}: silent, its largest sample is {peak:.4g} and must be above {SILENCE}")
    return samples


def _named(path: Path, start: float) -> str:
    return f"{path}, from {start:g} s" if start else str(path)
