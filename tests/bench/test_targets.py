"""The promised figures, from rows made by hand."""

from dataclasses import astuple, replace
from typing import Any

import pytest

from bench.atl import ATL, FOLDED
from bench.case import STEP
from bench.layers import COMPILED, CONV, LINEAR, PRODUCT
from bench.network import CACHED, CONTROL, EPOCHS, STEPS, TRAIN
from bench.results import Row
from bench.suites import SUITES
from bench.targets import targets, targets_on_a_cpu
from tests.bench.measurements import shared


def row(case: Any, provider: Any, us: Any, mode: str = "graph", **more: Any) -> Any:
    sizes = {"shape": case.shape, "flops": case.flops, "bytes": case.bytes}
    names = {"mode": mode, "provider": provider, "status": "ok", "median_us": us}
    return Row(**{**case.case, **sizes, **names, **more})


def cases(
    suite: Any,
    work: Any = STEP,
    batch: int = 20,
    variant: str = "",
    network: str = "quaternion",
    precision: str = "bf16",
) -> Any:
    wanted = (work, batch, variant, network, precision)
    return [c for c in suite.cases if (c.work, c.batch, c.variant, c.network, c.precision) == wanted]


def judged(rows: Any) -> Any:
    return {target.target: target for target in targets(rows)}


def test_layers_are_weighed_by_their_number() -> None:
    """A speed-up of 2 everywhere but for one shape, which three layers have, where it is 1.4."""
    rows = []
    for case in cases(CONV):
        slow = 14.0 if case.layer == "conv 11-13" else 20.0
        rows += [row(case, "ours auto", 10.0), row(case, "concatenated, NCHW", slow),
                 row(case, "concatenated, NHWC", 50.0), row(case, "real, NHWC", 1.0)]  # fmt: skip
    found = judged(rows)
    target = found["conv step against concatenated, batch 20, graph"]
    assert target.measured == f"{(2**9 * 1.4**3) ** (1 / 12):.2f}"
    assert (target.worst, target.verdict) == ("conv 11-13: 1.40", "met")
    assert found["conv step against concatenated, batch 20, eager"].verdict == "not measured"
    # Without one of the layers there is no figure.
    incomplete = judged([r for r in rows if r.layer != "conv 2"])
    assert incomplete[target.target].verdict == "not measured"
    # One layer under its own bound misses.
    rows = [replace(r, median_us=18.0) if (r.layer, r.provider) == ("conv 2", "ours auto") else r for r in rows]
    assert astuple(judged(rows)[target.target])[3:] == ("conv 2: 1.11", "MISSED")


def test_the_share_of_the_roof_is_of_layers_5_to_13() -> None:
    rows = [
        row(case, "ours auto", 1.0, percent_of_roof=10.0 if case.layer == "conv 4" else 64.0)
        for case in cases(CONV, PRODUCT, 256)
    ]
    target = judged(rows)["share of the measured roof, forward product, layers 5-13, batch 256"]
    assert (target.measured, target.verdict) == ("0.64", "met")


def test_the_floor_of_linear_maps() -> None:
    rows = [row(case, "ours auto", 30.0, floor_us=10.0) for case in cases(LINEAR)]
    target = judged(rows)["linear step: kernels' floor over time, 1 / 1.5"]
    assert (target.measured, target.verdict) == ("0.33", "MISSED")


@pytest.mark.parametrize(("variant", "bound"), [("paper", 8.0), (FOLDED, 150.0)])
def test_the_loss_is_compared_with_the_better_baseline(variant: Any, bound: float) -> None:
    (case,) = (case for case in cases(ATL, variant=variant) if case.layer == "layers 8-10")
    rows = [
        row(case, "ours", 10.0),
        row(case, "materialised", 99 * bound),
        row(case, "materialised, float32", 10.1 * bound),
        row(case, "ours, cached target", 1.0),
    ]
    name = f"loss, {variant}, quaternion, layers 8-10: speed-up"
    assert astuple(judged(rows)[name])[2:] == (f"{1.01 * bound:.2f}", f"layers 8-10: {1.01 * bound:.2f}", "met")
    rows[1] = row(case, "materialised", 9 * bound)
    assert judged(rows)[name].verdict == "MISSED"


def test_memory_of_the_loss_is_beside_the_gradient() -> None:
    rows = [row(case, "ours", 1.0, peak_bytes=2 * case.elements + 2_500_000) for case in cases(ATL, variant="paper")]
    name = "loss, quaternion: MB beside features and gradient"
    assert astuple(judged(rows)[name])[2::2] == ("2.50", "met")
    assert judged(rows[1:])[name].verdict == "not measured"
    rows[2] = replace(rows[2], peak_bytes=rows[2].peak_bytes + 10**6)
    assert astuple(judged(rows)[name])[2:] == ("3.50", rows[2].layer, "MISSED")


# Training

TWO, SEVEN, THIRTEEN = (f"AT at layer {n}" for n in (2, 7, 13))


def step(
    us: Any,
    layer: Any = TWO,
    provider: str = "ours",
    variant: str = "",
    mode: str = "graph",
    network: str = "quaternion",
    **more: Any,
) -> Any:
    """A row of a case that the suite has."""
    (case,) = (c for c in cases(STEPS, TRAIN, variant=variant, network=network) if c.layer == layer)
    assert mode in case.modes
    return row(case, provider, us, mode, **more)


def others() -> Any:
    """Rows that no figure of training may come from."""
    strange = [c for c in STEPS.cases if c.precision != "bf16" or c.work != TRAIN or c.network == CONTROL]
    return [
        row(case, provider, 1.0, mode, peak_bytes=1)
        for case in [*strange, *SUITES["cpu"][2].cases]
        for provider in ("ours", "research style", "torch.compile")
        for mode in ("graph", "eager")
    ]


def verdict(name: Any, *rows: Any) -> Any:
    """Measured, worst and verdict; without one of the rows, or with one that is not right, there is none."""
    found = judged([*others(), *rows])[name]
    for one in rows:
        rest = [other for other in rows if other is not one]
        for lacking in (rest, [*rest, replace(one, status="failed")]):
            assert astuple(judged([*others(), *lacking])[name])[2:] == ("", "", "not measured")
    return astuple(found)[1:]


@pytest.mark.parametrize(("layer", "factor"), [(TWO, 5.0), (THIRTEEN, 10.0)])
def test_a_step_in_a_graph_against_research_style_from_python(layer: Any, factor: float) -> None:
    name = f"step, {layer}, against research style in eager mode"
    ours, graph = step(100.0, layer), step(1.0, layer, "research style")
    other = step(99.0 * factor, layer, "research style", mode="eager")
    assert verdict(name, ours, other)[1:] == (f"{0.99 * factor:.2f}", f"{layer}: {0.99 * factor:.2f}", "MISSED")
    assert verdict(name, ours, replace(other, median_us=101.0 * factor))[3] == "met"
    eager = step(1.0, layer, mode="eager")
    assert judged([ours, other, graph, eager])[name].measured == f"{0.99 * factor:.2f}"


def test_a_step_against_torch_compile_at_its_best() -> None:
    name = "step, AT at layer 2, against torch.compile at its best"
    ours = step(100.0, variant=COMPILED)
    graph, eager = (step(us, provider="torch.compile", variant=COMPILED, mode=mode)
                    for us, mode in ((165.0, "graph"), (155.0, "eager")))  # fmt: skip
    assert verdict(name, ours, graph)[1::2] == ("1.65", "met")
    assert astuple(judged([ours, graph, eager, step(1.0)])[name])[2::2] == ("1.55", "MISSED")


def test_milliseconds_of_a_step() -> None:
    name = "step, AT at layer 2, milliseconds"
    assert verdict(name, step(899.0)) == ("<= 0.9", "0.90", TWO, "met")
    assert verdict(name, step(910.0))[3] == "MISSED"
    stretch = f"{name}: the stretch"
    assert verdict(stretch, step(899.0)) == ("<= 0.55", "0.90", TWO, "MISSED")
    assert verdict(stretch, step(540.0))[3] == "met"


@pytest.mark.parametrize(("layer", "bound"), [(TWO, 1.12), (THIRTEEN, 1.30)])
def test_what_anti_transfer_costs(layer: Any, bound: float) -> None:
    name = f"step, {layer} over none"
    none = step(100.0, "no AT")
    assert verdict(name, none, step(100 * bound - 1, layer)) == (f"<= {bound:g}", f"{bound - 0.01:.2f}", layer, "met")
    assert verdict(name, none, step(100 * bound + 1, layer))[3] == "MISSED"


def test_what_it_costs_with_cached_targets() -> None:
    name = "step, AT with cached targets over none"
    rows = [step(100.0, "no AT"), *(step(us, layer, variant=CACHED)
                                    for us, layer in ((105.0, TWO), (104.0, SEVEN), (103.0, THIRTEEN)))]  # fmt: skip
    assert verdict(name, *rows) == ("<= 1.06", "1.05", TWO, "met")
    rows[2] = replace(rows[2], median_us=107.0)
    assert verdict(name, *rows) == ("<= 1.06", "1.07", SEVEN, "MISSED")


def test_the_quaternion_network_against_the_real_one() -> None:
    """Each by its best provider, in a graph."""
    name = "step, quaternion against real network, each at its best: {}, %"
    time, memory = name.format("time"), name.format("memory")
    rows = [step(us, layer, network=network, peak_bytes=size)
            for us, layer, network, size in ((12.0, "no AT", "quaternion", 5), (100.0, "no AT", "real", 6),
                                             (12.5, TWO, "quaternion", 9), (100.0, TWO, "real", 100))]  # fmt: skip
    assert verdict(time, *rows) == ("<= -87", "-87.50", TWO, "met")
    assert verdict(memory, *rows[2:]) == ("<= -90", "-91.00", TWO, "met")
    faster = step(90.0, TWO, "research style", network="real", peak_bytes=89)
    eager = step(10.0, TWO, "research style", network="real", mode="eager", peak_bytes=1)
    found = judged([*rows, faster, eager])
    assert astuple(found[time])[2:] == ("-86.11", TWO, "MISSED")
    assert astuple(found[memory])[2:] == ("-89.89", TWO, "MISSED")


def test_an_epoch_costs_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """With anti-transfer those with cached targets: an epoch's are computed before the first."""
    name = "epoch over its steps"
    quaternion = [case for case in EPOCHS.cases if case.network == "quaternion" and case.precision == "float32"]
    none, two = (replace(case, precision="bf16", samples=3143) for case in quaternion)
    assert (none.layer, two.layer) == ("no AT", TWO)
    others = [replace(none, network=CONTROL), *quaternion]
    monkeypatch.setattr("bench.targets.EPOCHS", EPOCHS._replace(cases=[none, two, *others]))
    rows = [step(100.0, none.layer), step(110.0, variant=CACHED)]  # 158 of them
    rows += [row(none, "ours", 16_300.0, "eager"), row(two, "ours", 17_900.0, "eager")]
    assert verdict(name, *rows) == ("<= 1.05", "1.03", "no AT", "met")
    rows += [row(case, "ours", 99_999.0, "eager") for case in others]
    assert judged(rows)[name].verdict == "met"
    rows[3] = replace(rows[3], median_us=18_500.0)
    assert astuple(judged(rows)[name])[2:] == ("1.06", TWO, "MISSED")


def test_trainings_side_by_side() -> None:
    name = "trainings per hour, side by side against one after another"
    rows = [shared(1, 1.0), shared(8, 4.1, mode="MPS"), shared(16, 3.9), shared(16, 9.0, precision="float32"),
            shared(4, 9.0, status="failed")]  # fmt: skip
    (target,) = (target for target in targets([], rows) if target.target == name)
    assert astuple(target)[1:] == (">= 4.00", "4.10", "MPS, 8: 4.10", "met")
    (target,) = (target for target in targets([], [rows[0], *rows[2:]]) if target.target == name)
    assert astuple(target)[2:] == ("3.90", "processes, 16: 3.90", "MISSED")
    assert judged([])[name].verdict == "not measured"


def test_nothing_is_claimed_of_nothing() -> None:
    assert {target.verdict for target in targets([])} == {"not measured"}


def test_figures_of_a_cpu_are_of_the_fastest_baseline() -> None:
    """Whatever its layout; each kind of case has a figure, and a slower layer misses."""
    suites = SUITES["cpu"]
    rows = [
        row(case, provider.name, 10.0 if provider.ours else 40.0 if "NHWC" in provider.name else 50.0, "eager")
        for suite in suites
        for case in suite.cases
        for provider in suite.providers
        if provider.fits(case) and provider.cpu
    ]
    found = {target.target: target for target in targets_on_a_cpu(rows)}
    assert {target.verdict for target in found.values()} == {"met"}
    assert found["epoch, width 1/8, AT at layer 2"].measured == "4.00"
    assert found["step, batch 20, against torch.compile, no AT"].measured == "5.00"
    assert found["call of a small layer over the concatenated one's"].measured == "0.25"
    assert len(found) == 16
    cached = [replace(r, median_us=30.0) if r.provider == "ours, cached target" else r for r in rows]
    missed = [target.target for target in targets_on_a_cpu(cached) if target.verdict == "MISSED"]
    assert missed == ["loss with a cached target against materialised"]
    slow = [
        replace(r, median_us=11.0) if (r.layer, r.provider) == ("conv 2", "concatenated, NHWC") else r for r in rows
    ]
    slow = [replace(r, median_us=12.0) if (r.layer, r.provider) == ("conv 2", "ours auto") else r for r in slow]
    missed = [target.target for target in targets_on_a_cpu(slow) if target.verdict == "MISSED"]
    assert missed == ["conv 1-4 against concatenated"]
    assert {target.verdict for target in targets_on_a_cpu([])} == {"not measured"}
