"""Mandarin syllables by two speakers (Debian package gcin-voice; GPL-3 or LGPL-3, and CC-BY-3), for quick trials.

2358 clips, 14 minutes, 1158 syllables by both speakers. It has no emotions: the tone stands in their place.
"""

from __future__ import annotations

from pathlib import Path

from qat.data.corpora import _debian
from qat.data.manifest import Manifest, build_manifest

PACKAGES = ("gcin-voice",)

_ROOT = Path("usr/share/gcin-voice/ogg")
_TONES = {"1": "5", "2": "2", "3": "3", "4": "4"}


def fetch(folder: Path, from_dir: Path | None = None, progress: bool = True) -> Manifest:
    """Download (8 MB) and unpack the corpus, see `_debian.fetch`."""
    return _debian.fetch(folder, PACKAGES, read, from_dir, progress)


def read(folder: Path) -> Manifest:
    """Read the unpacked corpus.

    Args:
        folder: folder that contains `usr/share/gcin-voice`.

    Returns:
        One row per clip: `speaker` is the file's name (3 or 5), `text` the syllable in bopomofo without its tone,
        `words` the same with it, `emotion` the tone from "tone-1" to "tone-5" (neutral).

    Raises:
        ValueError: the folder has none of its files.
    """
    rows = []
    for clip in sorted(Path(folder).glob(f"{_ROOT}/*/*.ogg")):
        syllable = clip.parent.name
        # The input method writes the first tone as nothing and the neutral one as 1.
        tone = _TONES.get(syllable[-1], "1")
        rows.append(
            {
                "path": clip.relative_to(folder).as_posix(),
                "speaker": clip.stem,
                "text": syllable.rstrip("1234"),
                "emotion": f"tone-{tone}",
                "words": syllable,
            }
        )
    return build_manifest(Path(folder), rows, "gcin")
