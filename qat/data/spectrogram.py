"""From audio to network input: magnitude spectrograms, cutting, normalisation, padding (WASPAA 2023, section 3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qat.data.audio import WINDOW
from qat.data.torchaudio_import import torchaudio

INPUT_FRAMES = 512
INPUT_BINS = 128
WORD_FRAMES = 170
"""Frames that one isolated word is cut or padded to, 1.35 s (Guizzo et al. 2021)."""

LAST_WORD_OFFSET = 340

_LOG_GAIN = 1000.0


@dataclass(frozen=True)
class SpectrogramConfig:
    """How audio becomes spectrograms.

    Args:
        sample_rate: in Hz.
        hop: between windows, in samples.
        frame_seconds: length of one cut.
        cut: "audio" cuts the audio in non-overlapping pieces of `frame_seconds`, drops the remainder and fills a short
            file with zeros at its end (WASPAA 2023). "reference" is the released code's rule: blocks are counted from
            the end of the file's spectrogram, and a file longer than two blocks ends with a block that overlaps.
            "word" makes one cut per file, cut or filled with zeros to 170 frames.
        time_order: "natural", or "reversed" (last frame first) as in the released code.
    """

    sample_rate: int = 16000
    window: ClassVar[int] = WINDOW  # samples of the periodic Hamming window; 129 bins, which the networks' shape needs
    hop: int = 128
    frame_seconds: float = 4.0
    cut: Literal["audio", "reference", "word"] = "audio"
    time_order: Literal["natural", "reversed"] = "natural"

    def __post_init__(self) -> None:
        for name in ("sample_rate", "hop", "frame_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be positive")
        if self.hop > self.window:
            raise ValueError(f"hop={self.hop} must not be above the window of {self.window} samples")
        if self.cut != "word" and self.frames > INPUT_FRAMES:
            raise ValueError(
                f"frame_seconds={self.frame_seconds} at sample_rate={self.sample_rate} and hop={self.hop} gives "
                f"{self.frames} frames; the networks take at most {INPUT_FRAMES}"
            )
        if self.samples < self.window:
            raise ValueError(
                f"frame_seconds={self.frame_seconds} must hold at least one window of {self.window} samples"
            )
        for name, known in (("cut", ("audio", "reference", "word")), ("time_order", ("natural", "reversed"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}")

    @property
    def samples(self) -> int:
        """Audio samples in one cut."""
        return round(self.frame_seconds * self.sample_rate)

    @property
    def frames(self) -> int:
        """Rows of one cut: 501 for 4 s, 170 for a word."""
        return WORD_FRAMES if self.cut == "word" else -(-self.samples // self.hop) + 1

    @property
    def bins(self) -> int:
        """Columns of one cut."""
        return self.window // 2 + 1


def magnitude(audio: NDArray[np.float32] | Tensor, config: SpectrogramConfig) -> Tensor:
    """Magnitude spectrogram of whole clips, time ascending.

        S[t, f] = | sum_n w[n] x[t hop + n - window / 2] exp(-2 pi i f n / window) | / sum(w),   x = 0 outside

    with a periodic Hamming window: the same numbers as `abs(scipy.signal.stft(x, window="hamming", nperseg=window))`.

    Args:
        audio: `[..., n]`.
        config: the window and hop.

    Returns:
        `[..., T, bins]` with T = ceil(n / hop) + 1, float32.

    Raises:
        ValueError: fewer samples than one window.

    >>> magnitude(torch.ones(64000), SpectrogramConfig()).shape
    torch.Size([501, 129])
    """
    audio = torch.as_tensor(audio, dtype=torch.float32)
    n = audio.shape[-1]
    if n < config.window:
        raise ValueError(f"audio has {n} samples, fewer than one window of {config.window}")
    transform, scale = _transform(config.window, config.hop)
    # torchaudio drops an incomplete last hop; scipy, hence the method, fills it with zeros.
    return transform(torch.nn.functional.pad(audio, (0, -n % config.hop))).transpose(-1, -2) * scale


def cut(audio: NDArray[np.float32] | Tensor, config: SpectrogramConfig) -> Tensor:
    """Spectrograms of equal length from one clip, by the rule `config.cut` and in the order `config.time_order`.

    Args:
        audio: `[n]`.
        config: the rule.

    Returns:
        `[cuts, config.frames, config.bins]`, at least one cut.

    Raises:
        ValueError: fewer samples than one window.

    >>> cut(torch.ones(9 * 16000), SpectrogramConfig()).shape
    torch.Size([2, 501, 129])
    >>> cut(torch.ones(9 * 16000), SpectrogramConfig(cut="reference")).shape
    torch.Size([3, 501, 129])
    """
    audio = torch.as_tensor(audio, dtype=torch.float32)
    n, frames = audio.shape[-1], config.frames
    if n < config.window:
        raise ValueError(f"audio has {n} samples, fewer than one window of {config.window}")
    if config.cut == "word":
        rows = magnitude(audio, config)[:frames]
        cuts = torch.nn.functional.pad(rows, (0, 0, 0, frames - len(rows)))[None]
        return cuts.flip(1) if config.time_order == "reversed" else cuts
    audio = torch.nn.functional.pad(audio, (0, max(0, config.samples - n)))
    if config.cut == "audio":
        count = len(audio) // config.samples
        cuts = magnitude(audio[: count * config.samples].view(count, config.samples), config)
        return cuts.flip(1) if config.time_order == "reversed" else cuts
    backwards = magnitude(audio, config).flip(0)
    count = len(backwards) // frames
    cuts = backwards[: count * frames].view(count, frames, config.bins)
    if len(backwards) > 2 * frames and len(backwards) % frames:
        cuts = torch.cat([cuts, backwards[None, -frames:]])
    return cuts if config.time_order == "reversed" else cuts.flip(1)


@dataclass(frozen=True)
class Normalisation:
    """Global scaling by statistics of the training spectrograms, one scalar each.

    "max": S / maximum, for quaternion networks; "standard": (S - mean) / std, for real ones (WASPAA 2023, section 3);
    "log": log1p(1000 S / maximum) / log(1001), which maps [0, maximum] to [0, 1] and lifts the quiet parts.

    Args:
        kind: "max", "standard" or "log".
        maximum, mean, std: of the training spectrograms, over all bins and frames, before padding.
    """

    kind: Literal["max", "standard", "log"]
    maximum: float
    mean: float
    std: float

    def __post_init__(self) -> None:
        if self.kind not in ("max", "standard", "log"):
            raise ValueError(f"kind={self.kind!r} must be one of max, standard, log")
        if not (self.maximum > 0 and self.std > 0):
            raise ValueError(
                f"maximum={self.maximum} and std={self.std} must be positive: the training data is constant"
            )

    @classmethod
    def fit(
        cls, kind: Literal["max", "standard", "log"], magnitudes: NDArray[np.float32], rows: Sequence[int]
    ) -> "Normalisation":
        """Take the statistics from some rows.

        Args:
            kind: of scaling.
            magnitudes: `[n, frames, bins]`, may be memory-mapped.
            rows: the training rows, and no others.

        Raises:
            ValueError: no rows, or constant data.
        """
        if not len(rows):
            raise ValueError("rows is empty: normalisation needs at least one training spectrogram")
        maximum, total, squares, count = 0.0, 0.0, 0.0, 0
        order = np.sort(np.asarray(rows))
        for block in np.array_split(order, -(-len(order) // 64)):
            values = np.asarray(magnitudes[block])
            maximum = max(maximum, float(values.max()))
            total += float(values.sum(dtype=np.float64))
            squares += float(np.square(values, dtype=np.float64).sum())
            count += values.size
        mean = total / count
        return cls(kind, maximum, mean, float(np.sqrt(max(squares / count - mean**2, 0.0))))

    def __call__(self, magnitudes: Any) -> Tensor:
        """Scale spectrograms `[...]`, in any shape; gives float32."""
        values = torch.as_tensor(magnitudes, dtype=torch.float32)
        if self.kind == "max":
            return values / self.maximum
        if self.kind == "standard":
            return (values - self.mean) / self.std
        return torch.log1p(values * (_LOG_GAIN / self.maximum)) / float(np.log1p(_LOG_GAIN))


def to_input(rows: Tensor) -> Tensor:
    """Shape normalised spectrograms for the networks: zeros after the last frame up to 512, the Nyquist bin dropped.

    The zeros come after normalising, so under "standard" they stand for the mean, not for silence, as in the method.

    Args:
        rows: `[..., frames <= 512, 129]`.

    Returns:
        `[..., 1, 512, 128]`.
    """
    _check_rows(rows, INPUT_FRAMES)
    padded = torch.nn.functional.pad(rows[..., :INPUT_BINS], (0, 0, 0, INPUT_FRAMES - rows.shape[-2]))
    return padded.unsqueeze(-3)


def word_offsets(
    count: int, placing: Literal["sample", "batch", "centre"], generator: torch.Generator | None = None
) -> Tensor:
    """First frame of each word in its canvas: uniform over 0..340, or the middle.

    Args:
        count: words in the batch.
        placing: "sample" draws one per word (training), "batch" one for all (released code), "centre" takes the middle
            (evaluation).
        generator: of the draws.

    Returns:
        `[count]`, int64.
    """
    if placing == "centre":
        return torch.full((count,), (INPUT_FRAMES - WORD_FRAMES) // 2)
    if placing not in ("sample", "batch"):
        raise ValueError(f"placing={placing!r} must be one of sample, batch, centre")
    drawn = torch.randint(LAST_WORD_OFFSET + 1, (count if placing == "sample" else 1,), generator=generator)
    return drawn.expand(count)


def place_words(rows: Tensor, offsets: Tensor) -> Tensor:
    """Put words on a canvas of zeros, each at its own frame (Guizzo et al. 2021).

    Args:
        rows: `[B, frames <= 170, 129]`, normalised.
        offsets: `[B]`, from `word_offsets`; where rows are; on a GPU, which would have to be waited for, not checked.

    Returns:
        `[B, 1, 512, 128]`.

    >>> place_words(torch.ones(2, 170, 129), torch.tensor([0, 340]))[:, 0, [0, 169, 340, 509], 0].tolist()
    [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]
    """
    _check_rows(rows, WORD_FRAMES)
    batch, frames = rows.shape[:2]
    outside = offsets.device.type == "cpu" and (int(offsets.min()) < 0 or int(offsets.max()) + frames > INPUT_FRAMES)
    if offsets.shape != (batch,) or outside:
        raise ValueError(f"offsets must be {batch} frames from 0 to {INPUT_FRAMES - frames}, got {offsets.tolist()}")
    frame = torch.arange(INPUT_FRAMES, device=rows.device) - offsets[:, None]
    inside = (frame >= 0) & (frame < frames)
    there = rows[torch.arange(batch, device=rows.device)[:, None], frame.clamp(0, frames - 1), :INPUT_BINS]
    return torch.where(inside[..., None], there, there.new_zeros(()))[:, None]


def _check_rows(rows: Tensor, frames: int) -> None:
    if rows.ndim < 2 or rows.shape[-1] != INPUT_BINS + 1 or rows.shape[-2] > frames:
        raise ValueError(f"rows must be [..., at most {frames}, {INPUT_BINS + 1}], got {list(rows.shape)}")


@lru_cache
def _transform(window: int, hop: int) -> tuple[torch.nn.Module, float]:
    transform = torchaudio.transforms.Spectrogram(
        n_fft=window,
        hop_length=hop,
        window_fn=torch.hamming_window,
        power=1.0,
        pad_mode="constant",  # the default mirrors the edges, which differs by up to 0.1
    )
    return transform, 1.0 / float(transform.window.sum(dtype=torch.float64))
