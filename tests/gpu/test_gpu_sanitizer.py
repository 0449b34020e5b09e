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
from qkernels.ops import _launch

TOOL = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
UNSUPPORTED = ("Device not supported", "is not supported on this device", "Unable to find injection library")
FOUND = 99  # exit code of a run with findings
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def compiled(arch):
    """All of it beforehand: the tool slows a compiler down too."""
    if TOOL is None:
        pytest.skip("compute-sanitizer is not installed")
    with _launch.record(arch) as recording, _launch.switched("float32"):
        for problem, form, precision in sanitized.RUNS:
            sanitized.run(problem, problem.meta(problems.PRECISIONS[precision]), form)
    compile_all(recording.launches)


@pytest.mark.parametrize("check", ["memcheck", "racecheck"])
@pytest.mark.usefixtures("compiled")
def test_sanitizer_finds_nothing(check):
    # Without PyTorch's cache each tensor has its own allocation, so that a step beyond it shows.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[1]), environment.get("PYTHONPATH", "")])
    program = [sys.executable, str(HERE / "sanitized.py")]
    result = subprocess.run(
        [TOOL, "--tool", check, "--error-exitcode", str(FOUND), *program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    output = result.stdout + result.stderr
    for message in UNSUPPORTED:
        if message in output:
            pytest.skip(f"compute-sanitizer does not run here: {message}")
    assert result.returncode == 0, output[-5000:]
    assert "all kernels ran" in output
