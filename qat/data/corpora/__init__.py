"""The corpora that can be had without a licence form, each a module with `read(folder)` and `make` or `fetch`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

from qat.data.manifest import Manifest, read_manifest

CORPORA = {
    "demo": "synthesised speech: 18 voices, 16 sentences, 4 emotions, and single words",
    "fillets": "acted comedy dialogue in Czech and Dutch: 4 main voices, 3242 lines",
    "hedgewars": "game phrases by 15 voice packs; emotion by the phrase",
    "gcin": "Mandarin syllables by 2 speakers; tone as label",
}
"""Name of each corpus and what it is."""


def module(name: str) -> ModuleType:
    """The module of a corpus.

    Raises:
        ValueError: no such corpus.

    >>> module("gcin").__name__
    'qat.data.corpora.gcin'
    """
    if name not in CORPORA:
        raise ValueError(f"unknown corpus {name!r}; known are {', '.join(CORPORA)}, and csv for a manifest of your own")
    return import_module(f"{__name__}.{name}")


def read(name: str, folder: Path) -> Manifest:
    """Read a corpus that has been made or fetched.

    Args:
        name: a key of `CORPORA`, or `csv`.
        folder: of the corpus; for `csv` the manifest file.

    Raises:
        ValueError: no such corpus, or nothing of it in the folder.
    """
    if name == "csv":
        return read_manifest(Path(folder))
    corpus, folder = module(name), Path(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        verb = "make" if hasattr(corpus, "make") else "fetch"
        raise ValueError(f"{folder}: empty or no folder; fill it with `qat corpus {verb} {name} --folder {folder}`")
    return corpus.read(folder)
