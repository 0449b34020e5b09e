"""Recorded launches as Triton would compile them."""

from typing import Any

import pytest
import torch

from bench.warm import spec_of

pytest.importorskip("triton")


def test_no_batch_size_is_compiled_anew() -> None:
    """With the same tile, that is, which a larger batch may leave for a larger one."""
    from qkernels.ops.hamilton_conv import config, launch
    from qkernels.runtime.recording import record

    plan = config.Plan("signed", "half", config.tiles("gather", "signed", "half", 90)[0], 1)

    def specs(batch: Any, dtype: torch.dtype = torch.float16) -> Any:
        x, weight = (
            torch.empty(batch, 64, 8, 8, dtype=dtype, device="meta"),
            torch.empty(4, 16, 16, 3, 3, device="meta"),
        )
        with record(90) as recording, config.force(plan):
            launch.forward(x, weight.to(dtype), (1, 1, 1, 1, 1, 1, 1), "signed-half")
        return [spec_of(one) for one in recording.launches]

    assert specs(1) == specs(3) == specs(16)
    assert specs(3) != specs(3, torch.bfloat16)


def test_numbers_that_are_not_whole_stay_so() -> None:
    from qkernels.ops.gram_cosine import launch
    from qkernels.runtime.recording import record

    a = torch.empty(20, 512, 4, 4, device="meta")
    with record(90) as recording:
        launch.forward(a, a, None, False, "channel", False, 1.0, True, False)
        launch.forward(a, a, None, False, "channel", False, 20.0, True, False)
    specs = {spec_of(one) for one in recording.launches}
    assert len(specs) == 2
    assert any(isinstance(value, float) for spec in specs for value in spec.arguments)
