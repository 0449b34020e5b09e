"""The promised figures, judged by the rows of a run."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from bench.atl import ATL, FOLDED, LossCase
from bench.case import MODES, STEP, Case
from bench.layers import COMPILED, CONV, DW, DX, LINEAR, PRODUCT, WIDE, LayerCase, count_of
from bench.network import CACHED, EPOCHS, TRAIN, NetworkCase
from bench.results import Row
from bench.sharing import Shared, most
from bench.summary import NO_AT, RESEARCH, best, median, ratio


class Target(NamedTuple):
    """A figure that was promised; `worst` is the layer furthest from it."""

    target: str
    wanted: str
    measured: str
    worst: str
    verdict: str  # "met", "MISSED", "not measured"


Values = dict[str, float]
OURS = {"conv": "ours auto", "linear": "ours auto", "atl": "ours"}
SPEED_UPS = {"paper": (4.0, 4.0, 4.0, 8.0, 8.0), FOLDED: (3.0, 3.0, 25.0, 150.0, 150.0)}
MEGABYTES = {"quaternion": 3.0, "real": 11.0}
AT, DEEPEST = "AT at layer 2", "AT at layer 13"
MILLISECONDS, STRETCH = 0.90, 0.55  # of a step with anti-transfer at layer 2


def targets(rows: Sequence[Row], shared: Sequence[Shared] = ()) -> list[Target]:
    """The promised figures in the rows, and in those of trainings side by side.

    Layers of one shape count as often as the network has them.
    """

    def conv(against: str, work: str, batch: int, precision: str = "bf16", mode: str = "graph") -> Values | None:
        wide = (precision, work) != ("bf16", STEP)
        return _speed_ups(rows, _convolutions(work, batch, precision, wide), mode, against)

    linears = _cases(LINEAR.cases, STEP, 20, "bf16")
    products = [case for case in _convolutions(PRODUCT, 256, "bf16", wide=True) if case.layer != "conv 4"]
    roofs = _of_ours(rows, products, lambda row: row.percent_of_roof and row.percent_of_roof / 100)
    floors = _of_ours(rows, linears, lambda row: row.floor_us and row.median_us and row.floor_us / row.median_us)
    found = [
        _judged("conv step against concatenated, batch 20, graph", conv("concatenated", STEP, 20), 1.6, 1.2),
        _judged("conv step against concatenated, batch 20, eager",
                conv("concatenated", STEP, 20, mode="eager"), 3.0),
        _judged("conv step against concatenated, batch 256, graph", conv("concatenated", STEP, 256), 1.25),
        _judged("forward product against the real convolution, batch 256", conv("real", PRODUCT, 256), 1.0),
        _judged("dX against the real convolution, batch 256", conv("real", DX, 256), 1.0),
        _judged("dW against the real convolution, batch 256", conv("real", DW, 256), 0.9),
        _judged("float32 step against the real layer, TF32 off, batch 20", conv("real", STEP, 20, "float32"), 2.0),
        _judged("linear step against concatenated, batch 20",
                _speed_ups(rows, linears, "graph", "concatenated"), 3.0, 3.0),
        _judged("share of the measured roof, forward product, layers 5-13, batch 256", roofs, 0.6),
        _judged("linear step: kernels' floor over time, 1 / 1.5", floors, 1 / 1.5, 1 / 1.5),
    ]  # fmt: skip
    return [*found, *_of_the_loss(rows), *_of_the_training(rows), _of_sharing(shared)]


def _of_the_loss(rows: Sequence[Row]) -> list[Target]:
    found = []
    for variant, factors in SPEED_UPS.items():
        cases = _cases(ATL.cases, STEP, 20, "bf16", variant)
        for case, factor in zip(cases, factors, strict=True):
            ratios = _speed_ups(rows, [case], "graph", "materialised")
            found.append(_judged(f"loss, {variant}, quaternion, {case.layer}: speed-up", ratios, factor))
    for network, wanted in MEGABYTES.items():
        cases = _cases(ATL.cases, STEP, 20, "bf16", "paper", network)
        found.append(_judged_memory(f"loss, {network}: MB beside features and gradient", rows, cases, wanted))
    return found


def _of_the_training(rows: Sequence[Row]) -> list[Target]:
    """Whole steps of the quaternion network in bfloat16, batch 20, in a CUDA graph unless said."""
    by_key = {row.key: row for row in rows}

    def step(layer: str, provider: str = "ours", variant: str = "", mode: str = "graph") -> float | None:
        return median(by_key.get(("step", "quaternion", layer, variant, 20, "bf16", TRAIN, mode, provider)))

    def against_real(layer: str, measure: Callable[[Row], float | None]) -> float | None:
        plain = ("step", layer, "", 20, "bf16", TRAIN, "graph")
        mine = [r for r in rows if (r.suite, r.layer, r.variant, r.batch, r.precision, r.work, r.mode) == plain]
        quaternion, real = (best(mine, network, measure) for network in ("quaternion", "real"))
        return 100 * (quaternion[0] / real[0] - 1) if quaternion and real else None

    def memory(row: Row) -> float | None:
        return row.peak_bytes if row.status == "ok" else None

    def cost(layer: str, variant: str = "") -> float | None:
        return ratio(step(layer, variant=variant), step(NO_AT))

    compiled = [us for mode in MODES if (us := step(AT, "torch.compile", COMPILED, mode))]
    ms = {AT: ratio(step(AT), 1000)}
    return [
        _judged("step, AT at layer 2, against research style in eager mode",
                _known({AT: ratio(step(AT, RESEARCH, mode="eager"), step(AT))}), 5.0),
        _judged("step, AT at layer 13, against research style in eager mode",
                _known({DEEPEST: ratio(step(DEEPEST, RESEARCH, mode="eager"), step(DEEPEST))}), 10.0),
        _judged("step, AT at layer 2, against torch.compile at its best",
                _known({AT: ratio(min(compiled, default=None), step(AT, variant=COMPILED))}), 1.6),
        _at_most("step, AT at layer 2, milliseconds", _known(ms), MILLISECONDS),
        _at_most("step, AT at layer 2, milliseconds: the stretch", _known(ms), STRETCH),
        _at_most("step, AT at layer 2 over none", _known({AT: cost(AT)}), 1.12),
        _at_most("step, AT at layer 13 over none", _known({DEEPEST: cost(DEEPEST)}), 1.30),
        _at_most("step, AT with cached targets over none",
                 _known({f"AT at layer {n}": cost(f"AT at layer {n}", CACHED) for n in (2, 7, 13)}), 1.06),
        _at_most("step, quaternion against real network, each at its best: time, %",
                 _known({layer: against_real(layer, median) for layer in (NO_AT, AT)}), -87),
        _at_most("step, quaternion against real network, each at its best: memory, %",
                 _known({AT: against_real(AT, memory)}), -90),
        _at_most("epoch over its steps", _known(_epochs(rows, step)), 1.05),
    ]  # fmt: skip


def _epochs(rows: Sequence[Row], step: Callable[..., float | None]) -> dict[str, float | None]:
    """Time of an epoch, whose targets were computed before it, over that of its steps."""
    found: dict[str, float | None] = {}
    for case in EPOCHS.cases:
        if isinstance(case, NetworkCase) and (case.network, case.batch, case.precision) == ("quaternion", 20, "bf16"):
            times = [us for mode in case.modes if (us := median(_rows(rows, case, mode).get("ours")))]
            one = step(case.layer, variant=CACHED if case.at else "")
            steps = one and one * math.ceil(case.samples / case.batch)
            found[case.layer] = ratio(min(times, default=None), steps)
    return found


def _of_sharing(shared: Sequence[Shared]) -> Target:
    row = most(shared, "bf16")
    gains = {f"{row.mode}, {row.processes}": row.trainings_relative} if row else {}
    return _judged("trainings an hour, side by side against one after another", _known(gains), 4.0)


def _known(values: Mapping[str, float | None]) -> Values | None:
    """The values; None where one of them, or all, were not measured."""
    known = {name: value for name, value in values.items() if value is not None}
    return known if known and len(known) == len(values) else None


def _convolutions(work: str, batch: int, precision: str, wide: bool) -> list[Case]:
    """Of layers 2 to 13, or of those with at least `WIDE` input channels."""
    least = WIDE if wide else 5
    cases = _cases(CONV.cases, work, batch, precision)
    return [case for case in cases if isinstance(case, LayerCase) and case.channels_in >= least]


def _cases(
    cases: Sequence[Case], work: str, batch: int, precision: str, variant: str = "", network: str = "quaternion"
) -> list[Case]:
    """Those that a promised figure rests on."""
    wanted = (network, variant, work, batch, precision)
    return [case for case in cases if (case.network, case.variant, case.work, case.batch, case.precision) == wanted]


def _rows(rows: Sequence[Row], case: Case, mode: str) -> dict[str, Row]:
    """The timed rows of a case by provider."""
    return {row.provider: row for row in rows if row.case == (*case.key, mode) and row.median_us}


def _speed_ups(rows: Sequence[Row], cases: Sequence[Case], mode: str, against: str) -> Values | None:
    """Time of the best baseline over ours, per layer; None where not every layer was measured."""
    ratios = {}
    for case in cases:
        found = _rows(rows, case, mode)
        others = [row.median_us for name, row in found.items() if name.startswith(against) and row.median_us]
        ours = found.get(OURS[case.suite])
        if not others or not ours or not ours.median_us:
            return None
        ratios[case.layer] = min(others) / ours.median_us
    return ratios or None


def _of_ours(rows: Sequence[Row], cases: Sequence[Case], value: Callable[[Row], float | None]) -> Values | None:
    """A figure of our row of each case; None where one is missing."""
    values = {}
    for case in cases:
        row = _rows(rows, case, "graph").get(OURS[case.suite])
        found = value(row) if row else None
        if not found:
            return None
        values[case.layer] = found
    return values or None


def _judged(name: str, ratios: Values | None, wanted: float, at_least: float = 0.0) -> Target:
    text = f">= {wanted:.2f}" + (f", no layer under {at_least:.2f}" if at_least else "")
    if not ratios:
        return Target(name, text, "", "", "not measured")
    logs = [math.log(ratio) for layer, ratio in ratios.items() for _ in range(count_of(layer))]
    mean, worst = math.exp(statistics.mean(logs)), min(ratios, key=lambda layer: ratios[layer])
    met = mean >= wanted and ratios[worst] >= at_least
    return Target(name, text, f"{mean:.2f}", f"{worst}: {ratios[worst]:.2f}", "met" if met else "MISSED")


def _judged_memory(name: str, rows: Sequence[Row], cases: Sequence[Case], wanted: float) -> Target:
    taken: dict[str, float | None] = {}
    for case in cases:
        row = _rows(rows, case, "graph").get("ours")
        assert isinstance(case, LossCase)
        beside = case.elements * case.dtype.itemsize
        taken[case.layer] = None if row is None or row.peak_bytes is None else 1e-6 * (row.peak_bytes - beside)
    return _at_most(name, _known(taken), wanted)


def _at_most(name: str, values: Values | None, wanted: float) -> Target:
    if not values:
        return Target(name, f"<= {wanted:g}", "", "", "not measured")
    worst = max(values, key=lambda layer: values[layer])
    verdict = "met" if values[worst] <= wanted else "MISSED"
    return Target(name, f"<= {wanted:g}", f"{values[worst]:.2f}", worst, verdict)
