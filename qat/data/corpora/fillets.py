"""Acted comedy dialogue in Czech and Dutch, from the game Fish Fillets (Debian packages fillets-ng-data*, GPL-2).

3242 lines with transcripts, 189 minutes. Two characters, the small and the big fish, speak most of them in each
language. A corpus for the speaker task and, by the words of each line, for the word-presence task; it has no emotion
labels.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from pathlib import Path

from qat.data.corpora import _debian
from qat.data.manifest import Manifest, build_manifest

PACKAGES = ("fillets-ng-data", "fillets-ng-data-cs", "fillets-ng-data-nl")
LANGUAGES = ("cs", "nl")

MIN_LINES = 20
"""Smallest number of lines that contain a word of a language's vocabulary."""

_ROOT = Path("usr/share/games/fillets-ng")
_STRING = r'"((?:[^"\\]|\\.)*)"'
_LINE = re.compile(rf"dialogId\(\s*{_STRING}\s*,\s*{_STRING}\s*,\s*{_STRING}\s*\)\s*dialogStr\(\s*{_STRING}\s*\)")

log = logging.getLogger(__name__)


def fetch(folder: Path, from_dir: Path | None = None, progress: bool = True) -> Manifest:
    """Download (143 MB) and unpack the corpus, see `_debian.fetch`."""
    return _debian.fetch(folder, PACKAGES, read, from_dir, progress)


def read(folder: Path) -> Manifest:
    """Read the unpacked corpus.

    Args:
        folder: folder that contains `usr/share/games/fillets-ng`.

    Returns:
        One row per recorded line that has a transcript and a character: `speaker` is language and character
        ("cs-small"), `text` the line, `words` the words of the vocabulary that it says, each once and with its language
        ("cs:ryba"); further `language`, `gloss` (English) and `line` (the same for both languages, to split by lines).

    Raises:
        ValueError: the folder has none of its files.
    """
    root = Path(folder) / _ROOT
    rows: list[dict[str, str]] = []
    for language in LANGUAGES:
        lines = {}
        for script in sorted(root.glob(f"script/*/dialogs_{language}.lua")):
            for line, font, gloss, text in _LINE.findall(script.read_text(encoding="utf-8")):
                lines[script.parent.name, line] = (font.removeprefix("font_"), _unescape(gloss), _unescape(text))
        words = {key: sorted(set(re.findall(r"[^\W\d_]+", text.lower()))) for key, (_, _, text) in lines.items()}
        recorded = {
            (sound.parent.parent.name, sound.stem): sound for sound in sorted(root.glob(f"sound/*/{language}/*.ogg"))
        }
        # Lines without a font are noises.
        usable = [key for key in recorded if key in lines and lines[key][0]]
        log.info("%s: %d of %d sounds are lines with a transcript", language, len(usable), len(recorded))
        occurrences = Counter(word for key in usable for word in words[key])
        for key in usable:
            character, gloss, text = lines[key]
            rows.append(
                {
                    "path": recorded[key].relative_to(folder).as_posix(),
                    "speaker": f"{language}-{character}",
                    "text": text,
                    "emotion": "",
                    "language": language,
                    "words": " ".join(f"{language}:{word}" for word in words[key] if occurrences[word] >= MIN_LINES),
                    "gloss": gloss,
                    "line": "/".join(key),
                }
            )
    return build_manifest(Path(folder), rows, "fillets")


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", lambda escaped: " " if escaped[1] == "n" else escaped[1], text)
