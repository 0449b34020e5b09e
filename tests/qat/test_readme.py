"""What the README tells people to type must work."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from qat import cli
from qat.data.corpora import CORPORA

README = (Path(__file__).parents[2] / "README.md").read_text()


EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_tap_runs() -> None:
    names: dict[str, object] = {}
    exec(EXAMPLES[1], names)
    loss = names["loss"]
    assert isinstance(loss, torch.Tensor)
    assert 0 < loss.item() <= 1


def test_the_example_runs() -> None:
    names: dict[str, object] = {}
    exec(EXAMPLES[0], names)
    loss, layer = names["loss"], names["layer"]
    assert isinstance(loss, torch.Tensor)
    assert isinstance(layer, torch.nn.Module)
    assert 0 < loss.item() <= 1
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters())


COMMANDS = [line for line in README.replace("\\\n", " ").splitlines() if line.startswith("    qat ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("corpus: {name: csv, folder: my.csv}\n")
    parser, _ = cli.build_parser()
    options = parser.instantiate(parser.parse_args(shlex.split(command)[1:]))
    if "--config my.yaml" in command and "--corpus.where" in command:
        pretraining = options.pretrain[options.pretrain.subcommand]
        assert (pretraining.corpus.name, pretraining.corpus.where) == ("csv", {"speaker": ["ann", "ben", "cem"]})


def test_every_corpus_stands_in_the_table() -> None:
    table = README.partition("## Corpora")[2].partition("\n## ")[0]
    assert [name for name in CORPORA if f"`{name}`" not in table] == []


def test_commands_were_found() -> None:
    assert len(COMMANDS) >= 5


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.findall(r"\b[A-Z]+_(?:TABLE|TIME)\b", README)
