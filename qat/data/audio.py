"""Decoding of audio files to mono float32 at one sample rate, whatever is wrong with them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from qat.config import WINDOW

if TYPE_CHECKING:
    from soundfile import SoundFile

SILENCE = 0.005
"""Files whose largest magnitude, at their own sample rate, is at most this are skipped."""

LOUDEST = 16.0
"""Largest magnitude of a usable sample, where full scale is 1; larger values mean that samples are on an integer
scale."""

RATES = (2_000, 768_000)
"""Sample rates in Hz that are decoded."""

LONGEST = 3600.0
"""Duration in seconds of the longest file or segment that is decoded, which bounds memory."""

_BLOCK = 1 << 20
"""Number of values, of all channels, that are decoded at a time."""

_CHUNKS: dict[tuple[bytes, bytes], tuple[Literal["little", "big"], bytes]] = {
    (b"RIFF", b"WAVE"): ("little", b"data"),
    (b"FORM", b"AIFF"): ("big", b"SSND"),
    (b"FORM", b"AIFC"): ("big", b"SSND"),
}
"""By the beginning of a file: order of the bytes of a length, and name of the chunk that holds samples."""

_UNKNOWN = 0x7FFFF000
"""Lengths of at least this mean an unknown length: a writer to a pipe writes the largest number."""

_GIT_LFS = b"version https://git-lfs.github.com/spec/"


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
        AudioError: no such file, not audio, cut short, longer than an hour, a sample rate outside `RATES`, no samples,
            or samples that are not finite or on the scale of integers.
    """
    samples, rate, _ = _decoded(path, start, duration)
    return _resampled(samples, rate, sample_rate)


def load_audio(
    path: Path, sample_rate: int = 16000, start: float = 0.0, duration: float | None = None
) -> NDArray[np.float32]:
    """Decode an audio file for training: like `decode`, but silence is an error.

    Args:
        path: audio file.
        sample_rate: sample rate of the result in Hz.
        start: start of the segment in seconds.
        duration: duration of the segment in seconds, see `decode`.

    Returns:
        Samples `[n]`; full scale is 1.

    Raises:
        AudioError: see `decode`; or silent, see `SILENCE`, or shorter than one window.
    """
    decoded, rate, peak = _decoded(path, start, duration)
    if peak <= SILENCE:
        raise AudioError(
            f"{_place(path, start)}: silent, its largest magnitude is {peak:.4g} and must be above {SILENCE}"
        )
    samples = _resampled(decoded, rate, sample_rate)
    if len(samples) < WINDOW:
        raise AudioError(f"{_place(path, start)}: {len(samples)} samples, fewer than one window of {WINDOW}")
    return samples


def duration_of(path: Path) -> float:
    """Duration of a file in seconds by its header; 0 if it has none, or one of more than a day."""
    try:
        with _opened(path) as file:
            seconds = round(file.frames / file.samplerate, 6)
            return seconds if 0 <= seconds <= 24 * 3600 else 0.0
    except AudioError:
        return 0.0


def _decoded(path: Path, start: float, duration: float | None) -> tuple[NDArray[np.float32], int, float]:
    """Mono samples `[n]` at the file's own rate, the rate, and the largest magnitude."""
    with _opened(path) as file:
        rate, first = file.samplerate, round(start * file.samplerate)
        wanted = None if duration is None else round((start + duration) * rate) - first
        if not RATES[0] <= rate <= RATES[1]:
            raise AudioError(f"{path}: has a sample rate of {rate} Hz; {RATES[0]} to {RATES[1]} Hz can be read")
        if missing := _missing_bytes(path):
            raise AudioError(f"{path}: cut short, {missing} bytes of its samples are missing")
        if "lacks an end-of-stream bit" in file.extra_info:  # libsndfile's words for Ogg
            raise AudioError(f"{path}: cut short, its last page is not marked as the last")
        most = int(LONGEST * rate)
        mono = _read(file, first, most + 1 if wanted is None else min(wanted, most + 1))
        if len(mono) > most:
            raise AudioError(f"{_place(path, start)}: longer than {LONGEST:g} s; cut it into pieces")
        end = file.frames if wanted is None else min(first + wanted, file.frames)
        # Decoders of lossy codings may pad the last block, or leave it out.
        if len(mono) and first + len(mono) < end - max(4096, rate // 10):
            there = f"{first + len(mono)} of the {file.frames} samples of its header"
            raise AudioError(f"{path}: cut short, it has {there}")
    if not len(mono):
        raise AudioError(f"{_place(path, start)}: has no samples")
    if not np.isfinite(mono).all():
        raise AudioError(f"{_place(path, start)}: has samples that are not finite")
    peak = float(np.abs(mono).max())
    if peak > LOUDEST:
        raise AudioError(
            f"{_place(path, start)}: its samples reach {peak:.4g} where full scale is 1; "
            "divide samples on the scale of integers by its maximum, such as 32768"
        )
    return mono, rate, peak


def _read(file: SoundFile, first: int, count: int) -> NDArray[np.float32]:
    """At most `count` frames from `first` on, averaged over channels; read in blocks, since header sizes may be
    wrong."""
    if first and file.seekable():
        file.seek(min(first, file.frames))
        first = 0
    block = max(_BLOCK // file.channels, 1)
    blocks = []
    left = first + count  # codings that cannot seek decode the part before the segment too
    while left > 0:
        read = file.read(min(block, left), dtype="float32", always_2d=True)
        if not len(read):
            break
        left -= len(read)
        with np.errstate(invalid="ignore", over="ignore"):  # values that are not finite raise an error of their own
            blocks.append(read.mean(axis=1, dtype=np.float32)[first:])
        first = max(first - len(read), 0)
    return np.concatenate(blocks) if blocks else np.empty(0, np.float32)


def _resampled(samples: NDArray[np.float32], rate: int, sample_rate: int) -> NDArray[np.float32]:
    import soxr

    resampled: NDArray[np.float32] = samples if rate == sample_rate else soxr.resample(samples, rate, sample_rate)
    return resampled


@contextmanager
def _opened(path: Path) -> Iterator[SoundFile]:
    """The file, open for reading; any error of a decoder, here or in the block, becomes an `AudioError`."""
    # Imported here, as training on prepared spectrograms needs no decoder.
    import soundfile

    try:
        if not path.is_file():
            raise AudioError(f"{path}: no such file")
        with soundfile.SoundFile(path) as file:
            yield file
    except AudioError:
        raise
    except Exception as error:  # of libsndfile, its wrapper, the file system, or numpy where memory is short
        if _is_git_lfs_pointer(path):
            raise AudioError(f"{path}: is a pointer of Git LFS; fetch the recording with `git lfs pull`") from None
        reason = str(error).replace(f"Error opening {str(path)!r}: ", "").strip() or type(error).__name__
        raise AudioError(f"{path}: cannot be decoded as audio ({reason})") from error


def _is_git_lfs_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as raw:
            return raw.read(len(_GIT_LFS)) == _GIT_LFS
    except OSError:
        return False


def _missing_bytes(path: Path) -> int:
    """Number of bytes of samples that a file lacks by its header; libsndfile does not report them.

    Up to 64 are tolerated, as some writers count the header too.
    """
    with path.open("rb") as raw:
        missing = _promised_size(raw) - path.stat().st_size
    return missing if missing > 64 else 0


def _promised_size(raw: BinaryIO) -> int:
    """Size in bytes of a WAV, RF64, W64, AIFF, AU or NIST file by its header; 0 if it has none."""
    head = raw.read(1024)
    if head[:4] == b"RF64":
        return int.from_bytes(head[20:28], "little") + 8
    if head[:4] == b"riff":  # of W64
        return int.from_bytes(head[16:24], "little")
    if head[:4] == b".snd":
        length = int.from_bytes(head[8:12], "big")
        return int.from_bytes(head[4:8], "big") + length if length < _UNKNOWN else 0
    if head[:7] == b"NIST_1A":
        sizes = re.findall(rb"^(?:sample_count|sample_n_bytes|channel_count) -i (\d+)", head, re.MULTILINE)
        return int(head[8:16]) + math.prod(map(int, sizes))
    if (kind := (head[:4], head[8:12])) not in _CHUNKS:
        return 0
    order, samples = _CHUNKS[kind]
    raw.seek(12)
    while len(head := raw.read(8)) == 8:
        length = int.from_bytes(head[4:], order)
        if head[:4] == samples:
            return raw.tell() + length if length < _UNKNOWN else 0
        raw.seek(length + length % 2, 1)
    return 0


def _place(path: Path, start: float) -> str:
    return f"{path}, from {start:g} s" if start else str(path)
