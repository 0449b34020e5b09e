"""A README between its markers, and a page of one run: which files, whole or not at all."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import report, tables
from bench.__main__ import main
from tests.bench.measurements import committed, everything, fresh_of, line_of, measured, row, shared


def marked(*names: str) -> str:
    return "".join(f"before {name}\n<!-- bench: {name} -->\nold\n<!-- /bench -->\nafter\n" for name in names)


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_readme_is_filled_and_nothing_else_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed(tmp_path, "gpu", everything())
    readme = tmp_path / "README.md"
    readme.write_text(marked(*tables.SECTIONS), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    report.write_readme(Path("bench/results"), Path("docs"), Path("README.md"))
    text = readme.read_text(encoding="utf-8")
    assert "old" not in text
    outside = re.sub(r"(-->\n).*?(<!-- /bench -->)", r"\1old\n\2", text, flags=re.DOTALL)
    assert outside == marked(*tables.SECTIONS)
    sections = dict(re.findall(r"<!-- bench: (\S+) -->(.*?)<!-- /bench -->", text, re.DOTALL))
    images = {name: re.findall(r"!\[.*\]\((.*)\)", section) for name, section in sections.items()}
    assert images == {
        "layers": ["docs/bench/layers-gpu.svg", "docs/bench/roofline-gpu.svg"],
        "anti-transfer": ["docs/bench/memory-gpu.svg"],
        "step": ["docs/bench/step-gpu.svg"],
        "sharing": [],
        "paper": [],
        "grid": [],
    }
    assert all((tmp_path / image).is_file() for found in images.values() for image in found)
    assert "[bench/results/gpu/results.csv](bench/results/gpu/results.csv)" in sections["layers"]
    assert line_of(sections["layers"], layer="conv 2")["speed-up"] == "1.60"
    assert "layer" in sections["step"]
    assert "WASPAA 2023" in sections["paper"]
    assert len(state(tmp_path)) == 6


def test_a_second_run_changes_nothing_wherever_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed(tmp_path, "gpu", everything())
    (tmp_path / "README.md").write_text(marked(*tables.SECTIONS), encoding="utf-8")
    report.write_readme(tmp_path / "bench/results", tmp_path / "docs", tmp_path / "README.md")
    once = state(tmp_path)
    monkeypatch.chdir(tmp_path / "bench")
    report.write_readme(Path("results"), Path("../docs"), Path("../README.md"))
    assert state(tmp_path) == once


def test_line_ends_and_bytes_outside_stay() -> None:
    text = "\ufeffa \r\n\tü <!-- bench: x --> old <!-- /bench --> tail  \r\n"
    assert (
        report.fill(text, {"x": "1\n2"}, "f")
        == "\ufeffa \r\n\tü <!-- bench: x -->\r\n1\r\n2\r\n<!-- /bench --> tail  \r\n"
    )
    assert report.fill("no marker\n", {"x": "1"}, "f") == "no marker\n"


def test_windows_line_ends_stay_in_the_file(tmp_path: Path) -> None:
    committed(tmp_path, "gpu", measured(row()))
    readme = tmp_path / "README.md"
    readme.write_bytes(marked("paper").replace("\n", "\r\n").encode())
    report.write_readme(tmp_path / "bench/results", tmp_path / "docs", readme)
    assert re.search(rb"[^\r]\n", readme.read_bytes()) is None
    assert b"not measured" in readme.read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a\n<!-- bench: speed -->\n<!-- /bench -->\n",
            r":2: no section 'speed'; a marker names one of layers, anti-tra",
        ),
        ("<!-- bench: -->\n<!-- /bench -->\n", r":1: no section ''"),
        ("a\nb\n<!-- bench: step -->\n", r":3: <!-- bench: step --> needs a <!-- /bench --> before the next marker"),
        ("<!-- bench: step -->\n<!-- bench: paper -->\n<!-- /bench -->\n", r":1: <!-- bench: step --> needs a"),
        ("<!-- bench: step -->\n<!-- /bench -->\n<!-- /bench -->\n", r":3: <!-- /bench --> closes no"),
    ],
)
def test_wrong_markers_change_no_file(tmp_path: Path, text: str, message: str) -> None:
    committed(tmp_path, "gpu", everything())
    readme = tmp_path / "README.md"
    readme.write_text(text)
    before = state(tmp_path)
    with pytest.raises(ValueError, match=re.escape(str(readme)) + message) as caught:
        report.write_readme(tmp_path / "bench/results", tmp_path / "docs", readme)
    assert "\n" not in str(caught.value)
    assert state(tmp_path) == before


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed(tmp_path, "gpu", everything())
    readme = tmp_path / "README.md"
    readme.write_text(marked("layers"))
    before = state(tmp_path)

    def full(self: Any, data: Any) -> None:
        self.touch()
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="disk full"):
        report.write_readme(tmp_path / "bench/results", tmp_path / "docs", readme)
    monkeypatch.undo()
    assert state(tmp_path) == before


# A page of one's own


def test_a_page_has_all_sections_and_its_charts_beside_it(tmp_path: Path) -> None:
    m = everything()
    first = fresh_of(row(), first_call_s=2.5)
    folder = committed(tmp_path, "mine", measured(*m.results.rows, fresh=[first], shared=[shared(1, 1.0)]))
    path = report.write_page(folder)
    assert path == folder / "report.md"
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"^#+ .*$", text, re.MULTILINE) == [
        "# Some GPU", "## Layers", "## Anti-transfer", "## Step", "## Sharing", "## Paper", "## Grid",
    ]  # fmt: skip
    images = re.findall(r"^!\[.*\]\((.*)\)$", text, re.MULTILINE)
    assert images == ["layers.svg", "roofline.svg", "memory.svg", "step.svg"]
    written = {"results.csv", "fresh.csv", "sharing.csv", "report.md", *images}
    assert {file.name for file in folder.iterdir()} == written
    sections = text.split("\n## ")
    links = [re.findall(r"(?<!!)\[.*?\]\((.*?)\)", section) for section in sections[1:]]
    assert links == [["results.csv"], ["results.csv"], ["results.csv", "fresh.csv"], ["sharing.csv"], [], []]
    assert line_of(sections[1], layer="conv 2")["speed-up"] == "1.60"
    assert line_of(sections[3], **{"first call": "2.5 s"})["provider"] == "ours auto"


def test_a_page_is_the_same_again_wherever_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = committed(tmp_path, "mine", everything())
    report.write_page(folder)
    once = state(tmp_path)
    monkeypatch.chdir(folder)
    assert report.write_page(Path()) == Path("report.md")
    assert state(tmp_path) == once
    (folder / "report.md").write_text("old")
    report.write_page(Path())
    now = state(tmp_path)
    assert [name for name in now if now[name] != once[name]] == ["bench/results/mine/report.md"]
    assert {name: data for name, (data, _) in now.items()} == {name: data for name, (data, _) in once.items()}


def test_a_page_appears_after_its_charts_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = committed(tmp_path, "mine", everything())
    before = state(tmp_path)
    whole = Path.write_bytes

    def full(self: Any, data: Any) -> Any:
        if "step" in self.name:
            whole(self, data[:10])
            raise OSError("disk full")
        return whole(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="disk full"):
        report.write_page(folder)
    new = {Path(name).name for name in set(state(tmp_path)) - set(before)}
    assert new == {"layers.svg", "roofline.svg", "memory.svg"}


def test_the_command_prints_the_page_without_its_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = committed(tmp_path, "mine", everything())
    assert main(["report", str(folder)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == str(folder / "report.md")
    page = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line] == [line for line in page if line and not line.startswith("![")]
    assert "\n\n\n" not in "\n".join(lines)


@pytest.mark.parametrize("name", ["", "nothing", "results.csv"])
def test_a_folder_without_results_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / "results.csv").mkdir()
    folder = tmp_path / name if name else tmp_path
    before = state(tmp_path)
    assert main(["report", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"bench report: {folder}: has no results.csv")
    assert state(tmp_path) == before


def test_the_command_without_a_folder_fills_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed(tmp_path, "gpu", everything())
    readme = tmp_path / "README.md"
    readme.write_text(marked("layers"))
    monkeypatch.chdir(tmp_path)
    assert main(["report"]) == 0
    assert "![layers-gpu](docs/bench/layers-gpu.svg)" in readme.read_text(encoding="utf-8")
    assert not list(tmp_path.rglob("report.md"))


def test_matplotlib_is_imported_by_what_draws() -> None:
    code = "import sys, bench.report; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(report.__file__).parents[1])


def test_the_readme_says_what_the_committed_results_say(tmp_path: Path) -> None:
    root = Path(report.__file__).parents[1]
    shutil.copytree(root / "bench/results", tmp_path / "bench/results")
    shutil.copy(root / "README.md", tmp_path)
    report.write_readme(tmp_path / "bench/results", tmp_path / "docs", tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == (root / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in (tmp_path / "docs/bench").iterdir()} == {
        path.name for path in (root / "docs/bench").iterdir()
    }
