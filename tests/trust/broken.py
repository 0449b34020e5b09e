"""Small files, broken at random."""

import re
from typing import Any

import numpy as np

VALUES = [
    "",
    "null",
    "nan",
    "-1",
    "1e999",
    "9" * 400,
    "[]",
    "[[[]]]",
    "{}",
    "{a: b}",
    "'",
    '"',
    "true",
    "!!python/name:os.system",
]
"""What is put in the place of a word."""


def broken(content: bytes, rng: np.random.Generator) -> bytes:
    """The content after one random accident."""

    def somewhere(length: int = len(content)) -> int:
        return int(rng.integers(length + 1))

    at, to = sorted((somewhere(), somewhere()))
    lines = content.splitlines(keepends=True)
    line = somewhere(len(lines) - 1) if lines else 0
    accidents: list[Any] = [
        lambda: content[:at],
        lambda: b"",
        lambda: content[:at] + rng.bytes(int(rng.integers(1, 20))) + content[at:],
        lambda: content[:at] + bytes(to - at) + content[to:],  # a hole, as a crash of a file system leaves it
        lambda: content[:at] + content[to:],
        lambda: content[:at] + content[at:to] * 2 + content[to:],
        lambda: b"".join(lines[:line] + lines[line + 1 :]),
        lambda: b"".join(lines[:line] + lines[line : line + 1] * 2 + lines[line + 1 :]),
        lambda: b"".join(lines[::-1]),
        lambda: content.decode("latin-1").encode("utf-16"),
        lambda: rng.bytes(len(content)),
        *[lambda: _with_another_word(content, rng)] * 11,
    ]
    changed: bytes = accidents[int(rng.integers(len(accidents)))]()
    return changed


def _with_another_word(content: bytes, rng: np.random.Generator) -> bytes:
    """One of the words between separators, a key or a value, becomes another."""
    words = list(re.finditer(rb"[^\s,:\[\]{}]+", content))
    if not words:
        return content
    word = words[int(rng.integers(len(words)))]
    other = VALUES[int(rng.integers(len(VALUES)))].encode()
    return content[: word.start()] + other + content[word.end() :]
