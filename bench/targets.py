"""The promised figures, compared with the rows of a run."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.atl import ATL, FOLDED
from bench.case import MODES, STEP, Case, Suite
from bench.layers import COMPILED, CONV, DW, DX, LINEAR, PRODUCT, WIDE, count_of
from bench.network import CACHED, EPOCHS, NO_AT, TRAIN
from bench.results import Row, Shared
from bench.sharing import most
from bench.suites import SUITES
from bench.summary import CACHED as CACHED_TARGET
from bench.summary import OURS, RESEARCH, best, median, ratio

SPEED_UPS = {"paper": (4.0, 4.0, 4.0, 8.0, 8.0), FOLDED: (3.0, 3.0, 25.0, 150.0, 150.0)}
MEGABYTES = {"quaternion": 3.0, "real": 11.0}
QUATERNION, PAPER = {"network": "quaternion", "variant": ""}, {"work": STEP, "batch": 20, "precision": "bf16"}
AT_BEST = "step, quaternion against real network, each at its best"
TWO, SEVEN, THIRTEEN = "AT at layer 2", "AT at layer 7", "AT at layer 13"
Values = Mapping[str, float | None]
"""Values by layer; None if a row that a value needs was not measured or is not right."""


@dataclass(frozen=True)
class Target:
    """A promised figure, its bound, its measured value and the layer that is worst.

    Args:
        verdict: "met", "MISSED" or "not measured".
    """

    target: str
    wanted: str
    measured: str = ""
    worst: str = ""
    verdict: str = "not measured"

    def __str__(self) -> str:
        return f"{self.target:72} {self.wanted:32} {self.measured:6} {self.worst:18} {self.verdict}"


class Figures:
    """Figures of a run's right rows, by layer."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows: dict[tuple[object, ...], dict[str, Row]] = {}
        for row in rows:
            if median(row):
                self._rows.setdefault((*row.case_key, row.mode), {})[row.provider] = row

    def rows(self, case: Case, mode: str = "graph") -> dict[str, Row]:
        """The rows of a case by provider."""
        return self._rows.get((*case.case_key, mode), {})

    def of_ours(self, cases: Sequence[Case], value: Callable[[Row], float | None]) -> Values:
        ours = {case.layer: _ours(self.rows(case)) for case in cases}
        return {layer: value(row) if row else None for layer, row in ours.items()}

    def speed_ups(
        self, cases: Sequence[Case], against: str, mode: str = "graph", provider: str | None = None
    ) -> Values:
        """Time of the fastest baseline whose name starts with `against` over that of a provider, by default ours."""
        values = {}
        for case in cases:
            rows = self.rows(case, mode)
            others = [row.median_us for name, row in rows.items() if name.startswith(against) and row.median_us]
            own = rows.get(provider) if provider else _ours(rows)
            values[case.layer] = ratio(min(others, default=None), median(own))
        return values

    def step(self, layer: str, provider: str = "ours", variant: str = "", mode: str = "graph") -> float | None:
        """Microseconds of a step of the quaternion network in bfloat16, batch 20."""
        key = ("step", "quaternion", layer, variant, 20, "bf16", TRAIN, mode)
        return median(self._rows.get(key, {}).get(provider))

    def against_real(self, layer: str, measure: Callable[[Row], float | None]) -> float | None:
        """Difference of the quaternion network's step from the real one's in percent, each with its best provider."""
        keys = [("step", network, layer, "", 20, "bf16", TRAIN, "graph") for network in ("quaternion", "real")]
        rows = [row for key in keys for row in self._rows.get(key, {}).values()]
        quaternion, real = (best(rows, network, measure) for network in ("quaternion", "real"))
        return 100 * (quaternion[0] / real[0] - 1) if quaternion and real else None

    def epochs(self) -> Values:
        """Time of an epoch with cached targets over that of its steps."""
        values = {}
        for case in EPOCHS.where(network="quaternion", batch=20, precision="bf16"):
            times = [us for mode in case.modes if (us := median(self.rows(case, mode).get("ours")))]
            step = self.step(case.layer, variant=CACHED if case.at else "")
            steps = step and step * math.ceil(case.samples / case.batch)
            values[case.layer] = ratio(min(times, default=None), steps)
        return values


def targets(rows: Sequence[Row], shared: Sequence[Shared] = ()) -> list[Target]:
    """The promised figures, from rows and from trainings side by side."""
    figures = Figures(rows)
    return [*_of_layers(figures), *_of_the_loss(figures), *_of_the_training(figures), _of_sharing(shared)]


def targets_on_a_cpu(rows: Sequence[Row]) -> list[Target]:
    """The promised figures of the suite "cpu", against the fastest baseline, in whichever memory format."""
    figures = Figures(rows)
    layers, losses, steps, inference, epochs = SUITES["cpu"]

    def against(name: str, cases: Sequence[Any]) -> Values:
        return figures.speed_ups(cases, name, "eager")

    def convs(*names: str) -> Values:
        return against("concatenated", [case for case in layers.cases if case.layer in names])

    small = against("concatenated", [case for case in layers.cases if case.batch == 1])
    calls = {layer: ratio(1.0, value) for layer, value in small.items()}
    cached = figures.speed_ups(losses.cases, "materialised", "eager", CACHED_TARGET)

    def of_networks(suite: Suite, name: str, bounds: Mapping[str, float], what: str, **wanted: Any) -> list[Target]:
        cases = suite.where(network="quaternion", **wanted)
        shown = what if name == "research" else f"{what}, against {name}"
        return [at_least(f"{shown}, {case.layer}", against(name, [case]), bounds[case.layer]) for case in cases]

    full, narrow = {"batch": 20, "variant": COMPILED}, {"variant": "width 1/8"}
    whole = "whole network"
    return [
        at_least("conv 1-4 against concatenated", convs("conv 1", "conv 2", "conv 3", "conv 4"), 1.0, 1.0),
        at_least("conv 5 against concatenated", convs("conv 5"), 1.3),
        at_least("conv 8-13 against concatenated", convs("conv 8", "conv 9-10", "conv 11-13"), 1.6, 1.6),
        at_most("call of a small layer over the concatenated one's", calls, 1.5),
        at_least("loss against materialised", against("materialised", losses.cases), 1.4, 1.4),
        at_least("loss with a cached target against materialised", cached, 1.7, 1.7),
        *of_networks(steps, "research", {NO_AT: 1.5, TWO: 1.8}, "step, batch 20", **full),
        *of_networks(steps, "torch.compile", {NO_AT: 1.2, TWO: 1.2}, "step, batch 20", **full),
        *of_networks(epochs, "research", {NO_AT: 1.15, TWO: 1.8}, "epoch, width 1/8"),
        *of_networks(inference, "research", {whole: 2.5}, "inference, batch 1", batch=1, variant=""),
        *of_networks(inference, "research", {whole: 1.3}, "inference, batch 20", batch=20, variant=""),
        *of_networks(inference, "research", {whole: 1.2}, "inference, batch 1, width 1/8", batch=1, **narrow),
        *of_networks(inference, "research", {whole: 1.3}, "inference, batch 20, width 1/8", batch=20, **narrow),
    ]


def _of_layers(figures: Figures) -> list[Target]:
    def conv(against: str, work: str, batch: int, precision: str = "bf16", mode: str = "graph") -> Values:
        wide = (precision, work) != ("bf16", STEP)
        return figures.speed_ups(_convolutions(work, batch, precision, wide), against, mode)

    linears = LINEAR.where(**QUATERNION, **PAPER)
    products = [case for case in _convolutions(PRODUCT, 256, "bf16", wide=True) if case.layer != "conv 4"]
    roofs = figures.of_ours(products, lambda row: row.percent_of_roof and row.percent_of_roof / 100)
    floors = figures.of_ours(linears, lambda row: ratio(row.floor_us, row.median_us))
    return [
        at_least("conv step against concatenated, batch 20, graph", conv("concatenated", STEP, 20), 1.6, 1.2),
        at_least("conv step against concatenated, batch 20, eager", conv("concatenated", STEP, 20, mode="eager"), 3.0),
        at_least("conv step against concatenated, batch 256, graph", conv("concatenated", STEP, 256), 1.25),
        at_least("forward product against the real convolution, batch 256", conv("real", PRODUCT, 256), 1.0),
        at_least("dX against the real convolution, batch 256", conv("real", DX, 256), 1.0),
        at_least("dW against the real convolution, batch 256", conv("real", DW, 256), 0.9),
        at_least("float32 step against the real layer, TF32 off, batch 20", conv("real", STEP, 20, "float32"), 2.0),
        at_least("linear step against concatenated, batch 20", figures.speed_ups(linears, "concatenated"), 3.0, 3.0),
        at_least("share of the measured roof, forward product, layers 5-13, batch 256", roofs, 0.6),
        at_least("linear step: kernels' floor over time, 1 / 1.5", floors, 1 / 1.5, 1 / 1.5),
    ]


def _of_the_loss(figures: Figures) -> list[Target]:
    promised = []
    for variant, factors in SPEED_UPS.items():
        for case, factor in zip(ATL.where(network="quaternion", variant=variant, **PAPER), factors, strict=True):
            speed_ups = figures.speed_ups([case], "materialised")
            promised.append(at_least(f"loss, {variant}, quaternion, {case.layer}: speed-up", speed_ups, factor))
    for network, bound in MEGABYTES.items():
        taken: dict[str, float | None] = {}
        for case in ATL.where(network=network, variant="paper", **PAPER):
            row = figures.rows(case).get("ours")
            gradient = case.elements * case.dtype.itemsize
            taken[case.layer] = None if row is None or row.peak_bytes is None else 1e-6 * (row.peak_bytes - gradient)
        promised.append(at_most(f"loss, {network}: MB beside features and gradient", taken, bound))
    return promised


def _of_the_training(figures: Figures) -> list[Target]:
    """Whole steps of the quaternion network in bfloat16, batch 20, in a CUDA graph unless stated otherwise."""
    step, real = figures.step, figures.against_real
    research = {layer: ratio(step(layer, RESEARCH, mode="eager"), step(layer)) for layer in (TWO, THIRTEEN)}
    modes = [us for mode in MODES if (us := step(TWO, "torch.compile", COMPILED, mode))]
    compiled = ratio(min(modes, default=None), step(TWO, variant=COMPILED))
    ms = {TWO: ratio(step(TWO), 1000)}
    cost = {layer: ratio(step(layer), step(NO_AT)) for layer in (TWO, THIRTEEN)}
    cached = {layer: ratio(step(layer, variant=CACHED), step(NO_AT)) for layer in (TWO, SEVEN, THIRTEEN)}
    return [
        at_least(f"step, {TWO}, against research style in eager mode", {TWO: research[TWO]}, 5.0),
        at_least(f"step, {THIRTEEN}, against research style in eager mode", {THIRTEEN: research[THIRTEEN]}, 10.0),
        at_least(f"step, {TWO}, against torch.compile at its best", {TWO: compiled}, 1.6),
        at_most(f"step, {TWO}, milliseconds", ms, 0.90),
        at_most(f"step, {TWO}, milliseconds: the stretch", ms, 0.55),
        at_most(f"step, {TWO} over none", {TWO: cost[TWO]}, 1.12),
        at_most(f"step, {THIRTEEN} over none", {THIRTEEN: cost[THIRTEEN]}, 1.30),
        at_most("step, AT with cached targets over none", cached, 1.06),
        at_most(f"{AT_BEST}: time, %", {layer: real(layer, median) for layer in (NO_AT, TWO)}, -87),
        at_most(f"{AT_BEST}: memory, %", {TWO: real(TWO, lambda row: row.peak_bytes)}, -90),
        at_most("epoch over its steps", figures.epochs(), 1.05),
    ]


def _of_sharing(shared: Sequence[Shared]) -> Target:
    row = most(shared, "bf16")
    gains = {f"{row.mode}, {row.processes}": row.trainings_relative} if row else {}
    return at_least("trainings per hour, side by side against one after another", gains, 4.0)


def at_least(target: str, values: Values, bound: float, each: float = 0.0) -> Target:
    """A lower bound of the geometric mean, weighted by the layers a name stands for, and one of each layer."""
    wanted = f">= {bound:.2f}" + (f", no layer under {each:.2f}" if each else "")
    if not (measured := _complete(values)):
        return Target(target, wanted)
    mean = math.exp(statistics.mean(math.log(v) for layer, v in measured.items() for _ in range(count_of(layer))))
    low, layer = min((value, layer) for layer, value in measured.items())
    return Target(
        target, wanted, f"{mean:.2f}", f"{layer}: {low:.2f}", "met" if mean >= bound and low >= each else "MISSED"
    )


def at_most(target: str, values: Values, bound: float) -> Target:
    """An upper bound of every layer."""
    if not (measured := _complete(values)):
        return Target(target, f"<= {bound:g}")
    high, layer = max((value, layer) for layer, value in measured.items())
    return Target(target, f"<= {bound:g}", f"{high:.2f}", layer, "met" if high <= bound else "MISSED")


def _complete(values: Values) -> dict[str, float]:
    """The values; empty if one of them is None."""
    measured = {layer: value for layer, value in values.items() if value is not None}
    return measured if len(measured) == len(values) else {}


def _ours(rows: Mapping[str, Row]) -> Row | None:
    return next((rows[name] for name in OURS if name in rows), None)


def _convolutions(work: str, batch: int, precision: str, wide: bool) -> list[Case]:
    """Layers 2 to 13, or those with at least `WIDE` input channels."""
    least = WIDE if wide else 5
    cases = CONV.where(**QUATERNION, work=work, batch=batch, precision=precision)
    return [case for case in cases if case.channels_in >= least]
