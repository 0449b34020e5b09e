"""Phrases by the voice packs of the game Hedgewars (Debian package hedgewars-data, sounds GFDL-1.3).

839 clips, 15 minutes, 15 voices in several languages. Emotion is known only through the phrase, so it is confounded
with the words, which makes a hard test for anti-transfer: a linear model gets 0.36 on unseen voices (0.29 by always
answering the most frequent emotion).
"""

from __future__ import annotations

from pathlib import Path

from qat.data.corpora import _debian
from qat.data.manifest import Manifest, build_manifest

PACKAGES = ("hedgewars-data",)

PHRASES = {
    "angry": "Illgetyou Justyouwait Gonnagetyou Revenge Stupid Traitor Nutter Bugger Drat Youllregretthat Cutitout "
    "Watchit Leavemealone Comeonthen",
    "fear": "Incoming Takecover Runaway Coward Uh-oh Fire Grenade Reinforcements Whatthe",
    "happy": "Amazing Brilliant Excellent Flawless Victory Laugh Yessir Firstblood Enemydown Hello Watchthis",
    "neutral": "Boring Hmm Hurry Sameteam Kamikaze Melon Thisoneismine",
    "sad": "Ow1 Ow2 Ow3 Ow4 Ouch Ohdear Nooo Oops Byebye Solong Missed Ooff1 Ooff2 Ooff3 PoisonMoan Flyaway",
}
"""Phrases of each emotion (sad includes pain); the other phrases are noises without one."""

_EMOTION = {phrase: emotion for emotion, phrases in PHRASES.items() for phrase in phrases.split()}
_ROOT = Path("usr/share/games/hedgewars/Data/Sounds/voices")


def fetch(folder: Path, from_dir: Path | None = None, progress: bool = True) -> Manifest:
    """Download (145 MB) and unpack the corpus, see `_debian.fetch`."""
    return _debian.fetch(folder, PACKAGES, read, from_dir, progress)


def read(folder: Path) -> Manifest:
    """Read the unpacked corpus.

    Args:
        folder: folder that contains `usr/share/games/hedgewars`.

    Returns:
        One row per clip: `speaker` is the voice pack, `text` and `words` the phrase, `emotion` that of the phrase or
        empty (95 noises).

    Raises:
        ValueError: the folder has none of its files.
    """
    rows = [
        {
            "path": clip.relative_to(folder).as_posix(),
            "speaker": clip.parent.name,
            "text": clip.stem,
            "emotion": _EMOTION.get(clip.stem, ""),
            "words": clip.stem.lower(),
        }
        for clip in sorted(Path(folder).glob(f"{_ROOT}/*/*.ogg"))
    ]
    return build_manifest(Path(folder), rows, "hedgewars")
