"""The headline cases for pytest-benchmark: `pytest bench --benchmark-json=FILE`.

On a CPU those of the suite "cpu". Measures the wall clock of eager calls until the device is done.
"""

from typing import Any

import pytest
import torch

from bench.case import Case, Provider
from bench.suites import HEADLINE
from qat.memory import keep_freed_memory
from qkernels.runtime.precision import switched

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("case", "provider"),
    [pytest.param(case, provider, id=f"{case}, {provider.name}") for case, provider in HEADLINE[DEVICE.type]],
)
def test_headline(case: Case, provider: Provider, benchmark: Any) -> None:
    keep_freed_memory()
    with switched(case.precision):
        operands = case.operands(DEVICE)
        run = provider.build(case, operands)
        with case.checking(operands):
            excess, error = case.check(provider, operands, provider.read(run()))
        assert excess <= 1, f"wrong: error {error:.1e}, {excess:.2f} times the tolerance"

        def finished() -> None:
            run()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark.group = str(case)
        benchmark.extra_info |= {"provider": provider.name, "flops": case.flops, "bytes": case.bytes, "error": error}
        benchmark.pedantic(finished, rounds=20 if DEVICE.type == "cuda" else 3, warmup_rounds=1)
