"""What `python -m bench model` says is what the planner says, of every launch, and is marked as computed."""

from typing import Any

import pytest

pytest.importorskip("triton")

from bench import model
from bench.launches import PARTS, step_case, step_launches
from qkernels.ops.hamilton_conv import config
from qkernels.runtime.device import MULTIPROCESSORS

CASES = [step_case(2, False, batch, "bf16") for batch in (20, 256)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_plans_are_read_back_from_launches(case: Any) -> None:
    """Tile, registers, splits: those with which the launch was planned."""
    read = [model._planned(event.launch, 90) for event in step_launches(case) if "hamilton_conv" in event.name]
    assert len(read) == 46  # 2 of the twin, 15 forward, 14 data and 15 weight gradients
    for problem, plan in read:
        assert plan == config.plan(problem, plan.form, plan.precision, 90, MULTIPROCESSORS[90])


def test_no_launch_is_faster_than_it_can_be() -> None:
    for estimate in model.estimates(CASES[0]):
        assert estimate.predicted_us >= estimate.floor_us >= model.LAUNCH_US, estimate


def test_sums_are_of_all_launches_and_say_that_they_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "cases", lambda: CASES[:1])
    estimates, (plain,), lines = model.estimates(CASES[0]), model.plain(), list(model.report())
    assert plain["launches"] == len(estimates)
    assert plain["predicted_us"] == pytest.approx(sum(each.predicted_us for each in estimates), abs=0.1)
    assert plain["predicted_us"] == pytest.approx(sum(plain["by_part"].values()), abs=1)
    assert list(plain["by_part"]) == list(PARTS)
    assert plain["source"] == "computed, not measured"
    assert all("computed, not measured" in line for line in lines if line.startswith(("AT at", "sum of")))
    assert f"sum of {len(estimates)} launches: {plain['predicted_us']:.0f} us" in lines[-1]
