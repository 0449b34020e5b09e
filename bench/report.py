"""Reports: the README's tables and charts of the committed results, or a page about one folder of results."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.charts import charts
from bench.summary import Folder, load, load_folder
from bench.tables import SECTIONS
from qat.files import replacing


def write_readme(results_folder: Path, docs_folder: Path, readme: Path) -> None:
    """Write the charts to `docs_folder/bench/*.svg`, and the sections into a README between its markers.

    The text between `<!-- bench: NAME -->` and `<!-- /bench -->` becomes the section NAME of `SECTIONS`. When all files
    are computed, those that changed are replaced atomically.

    Raises:
        ValueError: see `fill` and `load`.
    """
    root, folder = readme.parent, docs_folder / "bench"
    folders = [each._replace(path=Path(os.path.relpath(each.path, root))) for each in load(results_folder)]
    sections, drawn = _sections(folders, Path(os.path.relpath(folder, root)))
    text = fill(readme.read_bytes().decode(), sections, str(readme))
    _replace({**{folder / file: svg for file, svg in drawn.items()}, readme: text})


def write_page(folder: Path) -> Path:
    """Write all sections to `report.md` in a folder with a results.csv, with charts beside it; return its path.

    Files are replaced as by `write_readme`.

    Raises:
        ValueError: see `load_folder`.
    """
    loaded = load_folder(folder)
    sections, drawn = _sections([loaded._replace(path=Path(loaded.path.name))], Path())
    titled = [f"## {name.capitalize()}\n\n{section}" for name, section in sections.items()]
    path = folder / "report.md"
    text = "\n\n".join((f"# {loaded.device}", *titled)) + "\n"
    _replace({**{folder / file: svg for file, svg in drawn.items()}, path: text})
    return path


def fill(text: str, sections: Mapping[str, str], name: str) -> str:
    """A text with the sections between their markers, with the text's line ends; the rest is unchanged.

    Raises:
        ValueError: an unknown section, or a marker without its counterpart; the message has file, line and rule.
    """
    end = "\r\n" if "\r\n" in text else "\n"
    pieces, copied, opened, line = [], 0, None, ""
    for marker in re.finditer(r"<!--\s*(?:bench:\s*(?P<name>.*?)|(?P<close>/bench))\s*-->", text):
        if opened and not marker["close"]:
            break
        line = f"{name}:{text.count(chr(10), 0, marker.start()) + 1}"
        if opened:
            pieces += [text[copied : opened.end()], end, sections[opened["name"]].replace("\n", end), end]
            copied, opened = marker.start(), None
        elif marker["close"]:
            raise ValueError(f"{line}: <!-- /bench --> closes no <!-- bench: NAME -->")
        elif marker["name"] not in sections:
            raise ValueError(f"{line}: no section {marker['name']!r}; a marker names one of {', '.join(sections)}")
        else:
            opened = marker
    if opened:
        raise ValueError(f"{line}: <!-- bench: {opened['name']} --> needs a <!-- /bench --> before the next marker")
    return "".join((*pieces, text[copied:]))


def _sections(folders: Sequence[Folder], images: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Sections by name, which refer to images in the folder `images`; and the images, SVG by file name."""
    drawn = charts(folders)
    sections = {}
    for name, section in SECTIONS.items():
        files = [file for of, file in drawn if of == name]
        lines = [f"![{file.removesuffix('.svg')}]({(images / file).as_posix()})" for file in files]
        sections[name] = "\n\n".join((*lines, section(folders)))
    return sections, {file: svg for (_, file), svg in drawn.items()}


def _replace(files: Mapping[Path, str]) -> None:
    """Atomically replace the files that change."""
    for path, text in files.items():
        new = text.encode()
        if not path.is_file() or path.read_bytes() != new:
            with replacing(path) as draft:
                draft.write_bytes(new)
