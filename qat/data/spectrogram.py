"""From audio to network input: magnitude spectrograms, cutting, normalisation, padding (WASPAA 2023, section 3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qat.config.experiment import INPUT_BINS, INPUT_FRAMES, WORD_FRAMES, SpectrogramConfig

LAST_WORD_OFFSET = 340

_LOG_GAIN = 1000.0


def magnitude(audio: NDArray[np.float32] | Tensor, config: SpectrogramConfig) -> Tensor:
    """Magnitude spectrogram of whole clips, time ascending.

        S[t, f] = | sum_n w[n] x[t hop + n - window / 2] exp(-2 pi i f n / window) | / sum(w),   x = 0 outside

    with a periodic Hamming window: the same numbers as `abs(scipy.signal.stft(x, window="hamming", nperseg=window))`.

    Args:
        audio: samples `[..., n]`.
        config: window and hop.

    Returns:
        Magnitudes `[..., T, bins]` with T = ceil(n / hop) + 1, float32.

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
    # torchaudio drops an incomplete last hop; scipy, which the method uses, pads it with zeros.
    spectrogram: Tensor = transform(torch.nn.functional.pad(audio, (0, -n % config.hop)))
    return spectrogram.transpose(-1, -2) * scale


def cut(audio: NDArray[np.float32] | Tensor, config: SpectrogramConfig) -> Tensor:
    """Spectrograms of equal length from one clip, by the rule `config.cut`, with time in the order `config.time_order`.

    Args:
        audio: samples `[n]`.
        config: rule and sizes.

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
    "log": log1p(1000 S / maximum) / log(1001), which maps [0, maximum] to [0, 1] and amplifies quiet parts.

    Args:
        kind: "max", "standard" or "log".
        maximum: maximum of the training spectrograms over all bins and frames, before padding.
        mean: their mean.
        std: their standard deviation.
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
        cls,
        kind: Literal["max", "standard", "log"],
        magnitudes: NDArray[np.float32],
        rows: Sequence[int],
        paths: Sequence[str] | None = None,
    ) -> "Normalisation":
        """The normalisation with the statistics of some rows.

        Args:
            kind: "max", "standard" or "log".
            magnitudes: spectrograms `[n, frames, bins]`, possibly memory-mapped.
            rows: numbers of the training rows.
            paths: file of every spectrogram, for the error.

        Raises:
            ValueError: no rows, constant data, or a spectrogram that is not finite.
        """
        if not len(rows):
            raise ValueError("rows is empty: normalisation needs at least one training spectrogram")
        maximum, total, squares, count = 0.0, 0.0, 0.0, 0
        order = np.sort(np.asarray(rows))
        for block in np.array_split(order, -(-len(order) // 64)):
            values = np.asarray(magnitudes[block])
            if not (finite := np.isfinite(values).all((1, 2))).all():
                bad = int(block[~finite][0])
                raise ValueError(
                    f"the spectrogram of {paths[bad] if paths is not None else f'row {bad}'} is not finite"
                )
            maximum = max(maximum, float(values.max()))
            total += float(values.sum(dtype=np.float64))
            squares += float(np.square(values, dtype=np.float64).sum())
            count += values.size
        mean = total / count
        return cls(kind, maximum, mean, float(np.sqrt(max(squares / count - mean**2, 0.0))))

    def __call__(self, magnitudes: Any) -> Tensor:
        """Normalised spectrograms, in any shape, as float32."""
        values = torch.as_tensor(magnitudes, dtype=torch.float32)
        if self.kind == "max":
            return values / self.maximum
        if self.kind == "standard":
            return (values - self.mean) / self.std
        return torch.log1p(values * (_LOG_GAIN / self.maximum)) / float(np.log1p(_LOG_GAIN))


def to_input(rows: Tensor) -> Tensor:
    """Network inputs from normalised spectrograms: padded with zeros to 512 frames, without the Nyquist bin.

    As in the method, padding follows normalisation: under "standard" zeros stand for the mean, not for silence.

    Args:
        rows: spectrograms `[..., frames <= 512, 129]`.

    Returns:
        Inputs `[..., 1, 512, 128]`.
    """
    _check_rows(rows, INPUT_FRAMES)
    padded = torch.nn.functional.pad(rows[..., :INPUT_BINS], (0, 0, 0, INPUT_FRAMES - rows.shape[-2]))
    return padded.unsqueeze(-3)


def word_offsets(
    count: int, placing: Literal["sample", "batch", "centre"], generator: torch.Generator | None = None
) -> Tensor:
    """First frame of each word in its canvas: uniform over 0..340, or centred.

    Args:
        count: number of words in the batch.
        placing: "sample" draws one offset per word (training), "batch" one for all (released code), "centre" centres
            them (evaluation).
        generator: generator of the draws.

    Returns:
        Offsets `[count]`, int64.
    """
    if placing == "centre":
        return torch.full((count,), (INPUT_FRAMES - WORD_FRAMES) // 2)
    if placing not in ("sample", "batch"):
        raise ValueError(f"placing={placing!r} must be one of sample, batch, centre")
    offsets = torch.randint(LAST_WORD_OFFSET + 1, (count if placing == "sample" else 1,), generator=generator)
    return offsets.expand(count)


def place_words(rows: Tensor, offsets: Tensor) -> Tensor:
    """Place words in a canvas of zeros, each at its own frame (Guizzo et al. 2021).

    Args:
        rows: normalised spectrograms `[B, frames <= 170, 129]`.
        offsets: first frames `[B]` from `word_offsets`, on the device of `rows`; on a GPU they are not checked, as the
            host would have to wait for it.

    Returns:
        Inputs `[B, 1, 512, 128]`.

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
    values = rows[torch.arange(batch, device=rows.device)[:, None], frame.clamp(0, frames - 1), :INPUT_BINS]
    return torch.where(inside[..., None], values, values.new_zeros(()))[:, None]


def _check_rows(rows: Tensor, frames: int) -> None:
    if rows.ndim < 2 or rows.shape[-1] != INPUT_BINS + 1 or rows.shape[-2] > frames:
        raise ValueError(f"rows must be [..., at most {frames}, {INPUT_BINS + 1}], got {list(rows.shape)}")


@lru_cache
def _transform(window: int, hop: int) -> tuple[torch.nn.Module, float]:
    from qat.data.torchaudio_import import torchaudio  # which a machine that only benchmarks may lack

    transform = torchaudio.transforms.Spectrogram(
        n_fft=window,
        hop_length=hop,
        window_fn=torch.hamming_window,
        power=1.0,
        pad_mode="constant",  # the default mirrors the edges, which differs by up to 0.1
    )
    return transform, 1.0 / float(transform.window.sum(dtype=torch.float64))
