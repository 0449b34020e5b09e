"""What commands print."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from qat.commands.output import grouped, show


def test_problems_are_grouped_by_kind_with_the_first_files() -> None:
    silent = [{"path": f"{n}/a{n}.wav", "problem": f"/c/{n}/a{n}.wav: silent, at {n}"} for n in range(1440)]
    rows = [
        {"path": "", "problem": "speaker 07: 3 files, published are 60"},
        *silent[:700],
        {"path": "b (1).wav", "problem": "/c/b (1).wav: has no samples"},
        *silent[700:],
        {"path": "twin.wav", "problem": "holds the same bytes as a.wav"},
    ]
    assert grouped(rows) == [
        {
            "files": 1440,
            "the first": "/c/0/a0.wav: silent, at 0",
            "others": "1/a1.wav, 2/a2.wav and 1437 more",
        },
        {"files": 1, "the first": "speaker 07: 3 files, published are 60", "others": ""},
        {"files": 1, "the first": "/c/b (1).wav: has no samples", "others": ""},
        {"files": 1, "the first": "twin.wav: holds the same bytes as a.wav", "others": ""},
    ]


def test_many_problems_leave_the_terminal_readable(capsys: pytest.CaptureFixture[str]) -> None:
    show(
        {"unusable": 5000, "problems": [{"path": f"{n}.wav", "problem": f"{n}.wav: silent"} for n in range(5000)]},
        False,
    )
    assert len(capsys.readouterr().out.splitlines()) < 12


def test_problems_of_trainings_are_a_row_each(capsys: pytest.CaptureFixture[str]) -> None:
    show({"problems": [{"training": "base, seed 1", "run": "runs/ab", "problem": "busy"}]}, False)
    assert "base, seed 1" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["song [take 1].wav", "[bold]{x}[/].wav", "old[/x] :smile:.wav", "línea \u4e2d.wav"])
def test_the_users_text_is_text(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Square brackets are markup in rich, colons emoji, braces fields in str.format."""
    show({"folder": name, "predictions": [{"path": name, name: 0.5}]}, False)
    assert capsys.readouterr().out.count(name) == 3


def test_a_terminal_without_unicode_gets_escapes() -> None:
    code = "import sys; from qat.cli import main; sys.exit(main(['predict', '/nowhere/\u4e2d[x].wav', 'a.wav']))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (2, rb"qat predict: /nowhere/\u4e2d[x].wav: no such checkpoint" + b"\n")
    code = code.replace("'predict', '/nowhere/\u4e2d[x].wav', 'a.wav'", "'report', '/nowhere/\u4e2d'")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=False)
    assert rb"/nowhere/\u4e2d" in done.stderr
