"""compute-sanitizer finds no access out of bounds and no race in shared memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import problems
import pytest
import sanitized

from bench.warm import compile_all
from qkernels.runtime.recording import record

TOOL = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
NOTHING = "import torch; torch.zeros(1, device='cuda').add_(1).cpu(); print('ran')"
FOUND = 99  # exit code of a run with findings
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def compiled(arch: int) -> None:
    """All of it beforehand: the tool slows a compiler down too."""
    if TOOL is None:
        pytest.skip("compute-sanitizer is not installed")
    with record(arch) as recording:
        for problem, algorithm, precision in sanitized.RUNS:
            sanitized.run(problem, problem.meta(problems.PRECISIONS[precision]), algorithm)
    compile_all(recording.launches)


def sanitized_run(check: str, *program: str) -> subprocess.CompletedProcess[str]:
    # Without PyTorch's cache each tensor has its own allocation, so that a step beyond it shows.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[1]), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [TOOL, "--tool", check, "--error-exitcode", str(FOUND), sys.executable, *program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("check", ["memcheck", "racecheck"])
@pytest.mark.usefixtures("compiled")
def test_sanitizer_finds_nothing(check: str) -> None:
    # Drivers, containers and versions of the tool have many ways to say that it cannot work: it is tried without ours.
    trial = sanitized_run(check, "-c", NOTHING)
    if trial.returncode or "ran" not in trial.stdout.splitlines():
        pytest.skip(f"compute-sanitizer does not run here: {trial.stdout[-500:]}")
    result = sanitized_run(check, str(HERE / "sanitized.py"))
    assert result.returncode == 0, result.stdout[-5000:]
    assert "all kernels ran" in result.stdout
