"""What surrounds the code: the workflow of hosted CI, hooks, make targets, and the seed of random inputs."""

import re
import shutil
import subprocess
import tomllib
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "Makefile").is_file(), reason="an installed package has no repository")


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def make_targets() -> set[str]:
    rules = re.findall(r"^([\w -]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return {target for rule in rules for target in rule.split()}


def expanded(text: str, matrix: dict[str, list[str]]) -> list[str]:
    """A step's command for each value of the matrix."""
    commands = [text]
    for name, values in matrix.items():
        commands = [c.replace(f"${{{{ matrix.{name} }}}}", value) for c in commands for value in values]
    return commands


def test_the_workflow_calls_what_exists() -> None:
    called = set()
    for name, job in read(".github/workflows/ci.yml")["jobs"].items():
        matrix = job.get("strategy", {}).get("matrix", {})
        for command in [c for step in job["steps"] for c in expanded(step.get("run", ""), matrix) if c]:
            assert "${{" not in command, (name, command)
            program, *words = command.removeprefix("sudo ").split()
            if program != "make":
                assert shutil.which(ROOT / program), (name, command)
                continue
            called.add(words[0])
            for word in words[1:]:
                variable, _, value = word.partition("=")
                assert variable in ("PYTHON", "CONSTRAINTS"), (name, command)
                assert variable != "CONSTRAINTS" or (ROOT / value).exists(), (name, command)
    assert called == {"check", "test", "compat", "slow", "audit"}
    assert called <= make_targets()


def test_the_workflow_runs_the_python_versions_that_are_supported() -> None:
    required = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert required
    jobs = read(".github/workflows/ci.yml")["jobs"]
    versions = jobs["check"]["strategy"]["matrix"]["python"]
    assert versions[0] == required[1]
    assert all(isinstance(version, str) for version in versions)  # 3.10 without quotes is 3.1


def test_the_oldest_versions_are_those_that_are_required() -> None:
    required = dict(re.findall(r'"(torch|torchaudio|triton)>=([\d.]+)', (ROOT / "pyproject.toml").read_text("utf-8")))
    oldest = dict(re.findall(r"^(\w+)==(\d+\.\d+)", (ROOT / "constraints-oldest.txt").read_text("utf-8"), re.MULTILINE))
    assert oldest == required


def test_the_lock_has_every_dependency_in_an_allowed_version_with_hashes() -> None:
    text = (ROOT / "requirements.lock").read_text("utf-8")
    hashes = r"(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+"
    pins = re.findall(rf"^([\w.-]+)==(\S+)[^\\\n]*\\\n{hashes}", text, re.MULTILINE)
    assert len(pins) == len(re.findall(r"^\w", text, re.MULTILINE)) > 50
    versions = {canonicalize_name(name): version for name, version in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    required = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    required += (ROOT / "constraints.txt").read_text("utf-8").splitlines()[1:]
    for requirement in map(Requirement, required):
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_hooks_run_the_tools_of_lint() -> None:
    hooks = [hook for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [hook["id"] for hook in hooks] == ["ruff", "ruff-format", "mypy"]
    for hook in hooks:
        command = hook["entry"].removesuffix(" --force-exclude").replace(".venv/bin", "$(BIN)")
        assert command in makefile
        assert hook["language"] == "system"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_quick_tests_exist() -> None:
    command = ["make", "--dry-run", "--always-make", "check"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [word for word in printed.split() if word.startswith("tests/")]
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.fixture(scope="module")
def shared_draw() -> float:
    return torch.rand(1).item()


def test_random_inputs_follow_from_the_seed(
    shared_draw: float, rng: np.random.Generator, pytestconfig: pytest.Config
) -> None:
    """Whatever was drawn before, by other tests or by a fixture that they share."""
    seed = pytestconfig.option.seed
    assert torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(seed)).item() != shared_draw
    assert np.random.rand() == np.random.RandomState(seed).rand()
    assert rng.random() == np.random.default_rng(seed).random()
