"""Reports: the README's tables and charts from the committed results, or a page of one's own beside one run."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.charts import charts
from bench.summary import Measured, load, load_run
from bench.tables import SECTIONS
from qat.files import replacing


def write_report(results_folder: Path, docs_folder: Path, readme: Path) -> None:
    """Write the charts to `bench/*.svg` of a folder, and into a README what belongs between its markers.

    What stands between `<!-- bench: NAME -->` and `<!-- /bench -->` becomes the section NAME, of `SECTIONS`. A file is
    replaced whole, after everything was made, and only if it changes.

    Raises:
        ValueError: of `filled` and `load`.
    """
    root, folder = readme.parent, docs_folder / "bench"
    measured = [m._replace(path=Path(os.path.relpath(m.path, root))) for m in load(results_folder)]
    sections, drawn = _made(measured, Path(os.path.relpath(folder, root)))
    text = filled(readme.read_bytes().decode(), sections, str(readme))
    _replace({**{folder / file: svg for file, svg in drawn.items()}, readme: text})


def page(folder: Path) -> Path:
    """Write all sections to `report.md` in a folder with a results.csv, and the charts beside it; returns its path.

    Files are replaced as in `write_report`.

    Raises:
        ValueError: of `load_run`.
    """
    m = load_run(folder)
    sections, drawn = _made([m._replace(path=Path(m.path.name))], Path())
    titled = [f"## {name.capitalize()}\n\n{section}" for name, section in sections.items()]
    path = folder / "report.md"
    text = "\n\n".join((f"# {m.device}", *titled)) + "\n"
    _replace({**{folder / file: svg for file, svg in drawn.items()}, path: text})
    return path


def filled(text: str, sections: Mapping[str, str], name: str) -> str:
    """A text with its sections between their markers, in the text's own line ends; nothing else is touched.

    Raises:
        ValueError: an unknown section, or an opening or closing marker alone: the message has file, line and rule.
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


def _made(measured: Sequence[Measured], images: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Sections by name, whose images are in a folder, and these: SVG by file name."""
    drawn = charts(measured)
    sections = {}
    for name, make in SECTIONS.items():
        files = [file for section, file in drawn if section == name]
        lines = [f"![{file.removesuffix('.svg')}]({(images / file).as_posix()})" for file in files]
        sections[name] = "\n\n".join((*lines, make(measured)))
    return sections, {file: svg for (_, file), svg in drawn.items()}


def _replace(files: Mapping[Path, str]) -> None:
    """Write the files that change, each at once."""
    for path, text in files.items():
        new = text.encode()
        if not path.is_file() or path.read_bytes() != new:
            with replacing(path) as draft:
                draft.write_bytes(new)
