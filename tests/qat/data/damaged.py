"""Audio files in every coding that libsndfile writes, and what can happen to a file."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cache

import numpy as np
import soundfile

RATES = (16_000, 8_000)  # some codings have but one


@cache
def intact() -> dict[str, bytes]:
    """A file of half a second of each coding that libsndfile also reads, by its name and ending: `PCM_16.wav`."""
    files = {}
    for ending in sorted(soundfile.available_formats().keys() - {"SD2"}):  # which libsndfile divides into two files
        for coding in soundfile.available_subtypes(ending):
            for rate in RATES:
                sound = 0.4 * np.sin(2 * np.pi * 220 * np.arange(rate // 2) / rate)
                file = io.BytesIO()
                try:
                    soundfile.write(file, sound, rate, format=ending, subtype=coding)
                    length = len(soundfile.read(io.BytesIO(file.getvalue()))[0])
                except (TypeError, ValueError, soundfile.LibsndfileError):
                    continue
                if length >= len(sound):
                    files.setdefault(f"{coding}.{ending.lower()}", file.getvalue())
    return files


def damaged(rng: np.random.Generator, count: int) -> Iterator[tuple[str, bytes]]:
    """Names and contents of files that were cut, overwritten, or lost or won bytes."""
    files = intact()
    for number in range(count):
        name = list(files)[rng.integers(len(files))]
        content = bytearray(files[name])
        header = min(128, len(content))
        match number % 5:
            case 0:
                del content[rng.integers(1, len(content)) :]
            case 1:
                content[rng.integers(header)] = rng.integers(256)
            case 2:
                content[rng.integers(header)] ^= 1 << int(rng.integers(8))
            case 3:
                for place in rng.integers(len(content), size=20):
                    content[place] = rng.integers(256)
            case _:
                place = rng.integers(len(content))
                content[place : place + rng.integers(64)] = rng.bytes(rng.integers(64))
        yield f"{number}-{name}", bytes(content)
