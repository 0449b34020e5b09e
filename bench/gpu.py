"""What the Triton kernels reach on a GPU: `python -m bench.gpu --out DIR`, started by `make gpu`.

Every layer of the quaternion VGG16 (WASPAA 2023) against the way of the public libraries, a real weight concatenated
in each step and multiplied by cuDNN, and against cuDNN's real convolution of the same shape. Providers take turns;
baselines run in both memory formats, and the better one counts. A provider whose result is wrong is given no time.
conv.csv is written as the cases finish, targets.csv at the end.

Modes: "graph", a captured CUDA graph between two events, behind a flush of the L2 cache; "eager", the wall clock of 10
calls in a row, in which host time dominates and the cache is not flushed.
"""

import argparse
import csv
import datetime
import functools
import importlib.metadata
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import qkernels
from bench.cpu_forms import LAYERS, Layer
from bench.tolerances import tolerance
from qkernels import algebra, runtime
from qkernels.ops import _launch
from qkernels.ops.hamilton_conv import op as conv_op

ROUNDS, EAGER_ROUNDS, EAGER_CALLS = 30, 7, 10
FLUSH_BYTES = 2**28  # several times any L2 cache; writing it takes longer than the host needs to enqueue a graph
LAUNCH_US = 3.0  # of device time that a kernel in a graph costs at least (design notes)
DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
STEP = "forward+backward"
# A baseline must compute the right thing; how it rounds is its own affair: gradients of concatenated parts are summed
# in bfloat16, and cuDNN may take Winograd's algorithm for float32.
BASELINE_TOLERANCE = {"bf16": 1e-2, "float32": 1e-4}
OPERATORS = ("forward", "dx", "dw")


class Case(NamedTuple):
    """What is timed: a product of one layer.

    "forward+backward" is the layer with bias, ReLU and all gradients; "forward", "dx" and "dw" are bare products.
    """

    suite: str
    layer: Layer
    batch: int
    precision: str
    product: str
    modes: tuple[str, ...]

    @property
    def linear(self) -> bool:
        return self.layer.kernel == 0

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def x_shape(self) -> tuple[int, ...]:
        return (self.batch, self.layer.channels_in, *self._map)

    @property
    def y_shape(self) -> tuple[int, ...]:
        return (self.batch, self.layer.channels_out, *self._map)

    @property
    def _map(self) -> tuple[int, ...]:
        return () if self.linear else (self.layer.side, self.layer.side)

    @property
    def kernel(self) -> tuple[int, ...]:
        return () if self.linear else (self.layer.kernel, self.layer.kernel)

    @property
    def flops(self) -> int:
        """Of the 16 products of the definition, which are those of a real layer of the same shape."""
        outputs = math.prod(self.y_shape)
        products = 3 if self.product == STEP else 1
        return 2 * products * outputs * self.layer.channels_in * math.prod(self.kernel)

    @property
    def bytes(self) -> int:
        """Least traffic: every operand read once, every result written once."""
        x, y = math.prod(self.x_shape), math.prod(self.y_shape)
        weight = self.layer.channels_in * self.layer.channels_out * math.prod(self.kernel) // 4
        elements = x + y + weight
        if self.product == STEP:  # forward x, w, b, y; backward dy, y, x, w, dx, dw, db
            elements = 3 * x + 3 * y + 3 * weight + 2 * self.layer.channels_out
        return elements * self.dtype.itemsize

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of x, weight, bias, dy and the weight of the real layer."""
        q, p = self.layer.channels_in // 4, self.layer.channels_out // 4
        return self.x_shape, (4, p, q, *self.kernel), (4 * p,), self.y_shape, (4 * p, 4 * q, *self.kernel)

    def __str__(self) -> str:
        return f"{self.suite}: {self.layer.name}, {self.product}"


class Operands(NamedTuple):
    """`real` is the weight of the real layer of the same shape."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor
    real: Tensor


Results = tuple[Tensor, ...]
Run = Callable[[], Results]


class Provider(NamedTuple):
    """A way to compute a case: `build` prepares it, untimed. `form` is None for those that are not ours."""

    name: str
    build: Callable[[Case, Operands], Run]
    form: str | None = None
    real: bool = False


class Roof(NamedTuple):
    """Measured rates: bytes per second of a copy, read and written, and FLOP per second of a matrix product."""

    bandwidth: float
    flops: dict[str, float]

    def seconds(self, case: Case) -> float:
        return max(case.bytes / self.bandwidth, case.flops / self.flops[case.precision])


def operands_of(case: Case, device: torch.device) -> Operands:
    """New random operands. Channels last: the format that the kernels read, and from which the baselines' is made."""
    generator = torch.Generator(device).manual_seed(time.time_ns() % 2**31)
    scale = (case.layer.channels_in * math.prod(case.kernel)) ** -0.5
    drawn = [torch.randn(shape, generator=generator, device=device) for shape in case.shapes]
    scaled = [scale * tensor if index in (1, 4) else tensor for index, tensor in enumerate(drawn)]
    return Operands(*(_as(tensor.to(case.dtype), torch.channels_last) for tensor in scaled))


def step(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dy: Tensor) -> Run:
    """Output and gradients of all inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    def run() -> Results:
        y = function(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)

    return run


def ours(form: str) -> Provider:
    """The library's layer; for single products its operators."""

    def build(case: Case, operands: Operands) -> Run:
        x, weight, bias, dy, _ = operands

        def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            with qkernels.set_form(form):
                if case.linear:
                    return qkernels.hamilton_linear(x, weight, bias, activation="relu")
                y = qkernels.hamilton_conv2d(x, weight, bias, padding=case.layer.kernel // 2, activation="relu")
                assert isinstance(y, Tensor)
                return y

        if case.product == STEP:
            return step(layer, (x, weight, bias), dy)
        with qkernels.set_form(form):
            how = runtime.plan_of("hamilton_conv2d", x, weight)
        window, size, kernel = _window(case), list(x.shape[2:]), list(case.kernel)
        operators: dict[str, Run] = {
            "forward": lambda: (conv_op.hamilton_conv2d(x, weight, None, *window, False, *how),),
            "dx": lambda: (conv_op.hamilton_conv2d_dx(dy, None, None, None, weight, None, size, *window, *how),),
            "dw": lambda: conv_op.hamilton_conv2d_dw(dy, None, None, None, x, kernel, *window, False, *how)[:1],
        }
        return operators[case.product]

    return Provider(f"ours {form}", build, form)


def concatenated(weight: Tensor) -> Tensor:
    """The real weight in the way of the public libraries: rows of signed components, put together by `cat`."""
    parts = weight.unbind(0)
    signed = {1: parts, -1: [-part for part in parts]}
    rows = [torch.cat([signed[algebra.SIGNS[a][c]][a ^ c] for c in range(4)], 1) for a in range(4)]
    return torch.cat(rows, 0)


def baseline(name: str, memory_format: torch.memory_format, real: bool) -> Provider:
    """PyTorch's own layer with a concatenated or with a real weight."""

    def build(case: Case, operands: Operands) -> Run:
        x, dy = (_as(tensor, memory_format) for tensor in (operands.x, operands.dy))
        weight = _as(operands.real, memory_format) if real else operands.weight

        def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            weight = weight if real else concatenated(weight)
            if case.linear:
                return F.linear(x, weight, bias).relu()
            return F.conv2d(x, weight, bias, padding=case.layer.kernel // 2).relu()

        if case.product == STEP:
            return step(layer, (x, weight, operands.bias), dy)
        assert real, "single products are compared with the real convolution's"
        window = _window(case)
        arguments = (dy, x, weight, None, *window[:3], False, [0, 0], window[3])
        operators: dict[str, Run] = {
            "forward": lambda: (F.conv2d(x, weight, None, *window),),
            "dx": lambda: torch.ops.aten.convolution_backward(*arguments, [True, False, False])[:1],
            "dw": lambda: torch.ops.aten.convolution_backward(*arguments, [False, True, False])[1:2],
        }
        return operators[case.product]

    return Provider(name, build, None, real)


AUTO = ours("auto")
FORMS = [ours(form) for form in ("q16", "q8", "dense")]
CONCATENATED = [
    baseline("concatenated, NCHW", torch.contiguous_format, False),
    baseline("concatenated, NHWC", torch.channels_last, False),
]
REAL = [baseline("real, NCHW", torch.contiguous_format, True), baseline("real, NHWC", torch.channels_last, True)]

CONVS, WIDE, LINEARS = LAYERS[1:9], [layer for layer in LAYERS[1:9] if layer.channels_in >= 128], LAYERS[9:11]
# In the order of their value: what the budget does not reach is dropped from the end.
SUITES: dict[str, tuple[list[Case], list[Provider]]] = {
    "conv, batch 20": (
        [Case("conv, batch 20", layer, 20, "bf16", STEP, ("graph", "eager")) for layer in CONVS],
        [AUTO, *CONCATENATED],
    ),
    "products, batch 256": (
        [Case("products, batch 256", layer, 256, "bf16", name, ("graph",)) for layer in WIDE for name in OPERATORS],
        [AUTO, *FORMS, *REAL],
    ),
    "conv, batch 256": (
        [Case("conv, batch 256", layer, 256, "bf16", STEP, ("graph",)) for layer in CONVS],
        [AUTO, *CONCATENATED],
    ),
    "linear, batch 20": (
        [Case("linear, batch 20", layer, 20, "bf16", STEP, ("graph",)) for layer in LINEARS],
        [AUTO, CONCATENATED[0]],
    ),
    "float32, batch 20": (
        [Case("float32, batch 20", layer, 20, "float32", STEP, ("graph",)) for layer in WIDE],
        [AUTO, *CONCATENATED, *REAL],
    ),
}


def exact(case: Case, operands: Operands, real: bool, y: Tensor) -> list[Tensor]:
    """What a provider should have returned; behind the ReLU of its own `y`, as gradients jump where values are near 0.

    In float64 for float32; for bfloat16 in float32, whose error is a thousandth of the tolerance.
    """
    wide = torch.float64 if case.precision == "float32" else torch.float32
    x, weight, bias, dy, real_weight = (tensor.to(wide) for tensor in operands)
    weight = real_weight if real else algebra.expand_weight(weight.contiguous())
    window = _window(case)
    if case.product == STEP:
        dy = dy * (y > 0)

    def forward() -> Tensor:
        return F.linear(x, weight) if case.linear else F.conv2d(x, weight, None, *window)

    def gradients(by_x: bool, by_weight: bool) -> tuple[Tensor, Tensor]:
        if case.linear:
            dx, dw = dy @ weight, dy.mT @ x
        else:
            arguments = (dy, x, weight, None, *window[:3], False, [0, 0], window[3])
            dx, dw, _ = torch.ops.aten.convolution_backward(*arguments, [by_x, by_weight, False])
        return dx, dw if real or not by_weight else algebra.contract_weight(dw.contiguous())

    if case.product == STEP:
        shape = (1, -1) if case.linear else (1, -1, 1, 1)
        return [(forward() + bias.view(shape)).relu(), *gradients(True, True), dy.transpose(0, 1).flatten(1).sum(1)]
    if case.product == "forward":
        return [forward()]
    return [gradients(True, False)[0] if case.product == "dx" else gradients(False, True)[1]]


def gate(case: Case, operands: Operands, provider: Provider, results: Results) -> tuple[float, float]:
    """The relative Frobenius error of the worst result in units of its tolerance, and that error."""
    names = ("y", "dx", "dw", "db") if case.product == STEP else ({"forward": "y"}.get(case.product, case.product),)
    form = "" if provider.form is None else _form_taken(case, operands, provider.form)
    worst = (0.0, 0.0)
    for name, actual, expected in zip(names, results, exact(case, operands, provider.real, results[0]), strict=True):
        error = ((actual.to(expected.dtype) - expected).norm() / expected.norm()).item()
        allowed = BASELINE_TOLERANCE[case.precision] if provider.form is None else tolerance(name, case.precision, form)
        excess = error / allowed if math.isfinite(error) else math.inf
        worst = max(worst, (excess, error))
    return worst


def _form_taken(case: Case, operands: Operands, form: str) -> str:
    """The form whose tolerance counts: "q8" where one of the products takes it."""
    if not operands.x.is_cuda:
        with qkernels.set_form(form):
            return runtime.plan_of("hamilton_linear" if case.linear else "hamilton_conv2d", *operands[:2])[1]
    taken = {launch.arguments.get("FORM") for launch in launches(case, form, _launch.arch_of(operands.x))}
    return "q8" if "q8" in taken else "q16"


def launches(case: Case, form: str, arch: int) -> list[_launch.Launch]:
    """The kernels of our provider."""
    from qkernels.ops.hamilton_conv import launch
    from qkernels.ops.hamilton_linear import launch as linear_launch

    x, weight, bias, dy, _ = (
        _as(torch.empty(shape, dtype=case.dtype, device="meta"), torch.channels_last) for shape in case.shapes
    )
    window, relu = _window(case), case.product == STEP
    with _launch.record(arch) as recording:
        if case.linear:
            y = linear_launch.forward(x, weight, bias, True, form)
            linear_launch.data_gradient(dy, y, weight, form)
            linear_launch.weight_gradient(dy, y, x, True, form)
        else:
            source = launch.Source(dy, dy if relu else None)
            if case.product in (STEP, "forward"):
                launch.forward(x, weight, bias if relu else None, *window, relu, form)
            if case.product in (STEP, "dx"):
                launch.data_gradient(source, weight, None, x.shape[2:], *window, form)
            if case.product in (STEP, "dw"):
                launch.weight_gradient(source, x, case.kernel, *window, relu, form)
    return recording.launches


def floor_us(case: Case, arch: int, bandwidth: float) -> float:
    """The sum over our kernels of max(3 us, bytes of the tensors that it reads or writes / bandwidth)."""
    total = 0.0
    for launch in launches(case, "auto", arch):
        tensors = {id(value): value for value in launch.arguments.values() if isinstance(value, Tensor)}
        total += max(LAUNCH_US, 1e6 * sum(t.numel() * t.itemsize for t in tensors.values()) / bandwidth)
    return total


class Clock(Protocol):
    """Samples in microseconds of each run, the runs taking turns."""

    def __call__(self, runs: dict[str, Run], mode: str) -> dict[str, list[float]]: ...


class GpuClock:
    """See the module's docstring for the two modes."""

    def __init__(self) -> None:
        self.flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def __call__(self, runs: dict[str, Run], mode: str) -> dict[str, list[float]]:
        if mode == "eager":
            return _interleaved(EAGER_ROUNDS, runs, self._eager)
        graphs = {name: _captured(run) for name, run in runs.items()}
        return _interleaved(ROUNDS, {name: graph.replay for name, graph in graphs.items()}, self._event)

    def _event(self, run: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)

    def _eager(self, run: Run) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(EAGER_CALLS):
            run()
        torch.cuda.synchronize()
        return 1e6 * (time.perf_counter() - start) / EAGER_CALLS

    def roof(self) -> Roof:
        """Of a 2 GiB copy, and of products of 8192 x 8192 matrices; float32 without tf32 by 4096."""
        source = torch.empty(2**30, dtype=torch.int8, device="cuda").random_()
        target = torch.empty_like(source)
        copy = statistics.median(self._event(lambda: target.copy_(source)) for _ in range(ROUNDS))
        rates = {}
        for precision, size in (("bf16", 8192), ("float32", 4096)):
            a, b = (torch.randn(size, size, device="cuda").to(DTYPES[precision]) for _ in range(2))
            product = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
            times = [self._event(product) for _ in range(ROUNDS)]
            rates[precision] = 2 * size**3 / (1e-6 * statistics.median(times))
        return Roof(2 * source.numel() / (1e-6 * copy), rates)

    def empty_graph(self) -> float:
        """What the events around a graph of nearly nothing measure."""
        one = torch.zeros(1, device="cuda")
        graph = _captured(lambda: (one.add_(1),))
        return statistics.median(self._event(graph.replay) for _ in range(ROUNDS))


def _interleaved(
    rounds: int, runs: dict[str, Callable[[], Any]], sample: Callable[[Callable[[], Any]], float]
) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(sample(run))
    return samples


def _captured(run: Run) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


class Row(NamedTuple):
    """One line of conv.csv; times are empty where nothing was timed."""

    suite: str
    layer: str
    channels_in: int
    channels_out: int
    side: int
    batch: int
    precision: str
    product: str
    mode: str
    provider: str
    status: str  # "ok", "REFUSED" by the gate, "smoke": right, and not timed
    error: float
    error_over_tolerance: float
    median_us: float | None
    p20_us: float | None
    p80_us: float | None
    flops: int
    bytes: int
    percent_of_roof: float | None


def measure(
    case: Case, providers: Iterable[Provider], operands: Operands, clock: Clock | None, roof: Roof | None
) -> list[Row]:
    """The rows of a case. Only providers whose results are right reach the clock."""
    admitted: dict[str, Run] = {}
    checked: list[tuple[Provider, float, float]] = []
    for provider in providers:
        run = provider.build(case, operands)
        excess, error = gate(case, operands, provider, run())
        checked.append((provider, excess, error))
        if excess <= 1:
            admitted[provider.name] = run
    rows = []
    for mode in case.modes:
        samples = clock(admitted, mode) if clock else {}
        for provider, excess, error in checked:
            status = "REFUSED" if provider.name not in admitted else "ok" if clock else "smoke"
            times = samples.get(provider.name)
            low, median, high = _quantiles(times) if times else (None, None, None)
            of_roof = 100 * 1e6 * roof.seconds(case) / median if roof and median else None
            rows.append(
                Row(case.suite, case.layer.name, *case.layer[1:3], case.layer.side, case.batch, case.precision,
                    case.product, mode, provider.name, status, error, excess, median, low, high, case.flops, case.bytes,
                    of_roof)
            )  # fmt: skip
    return rows


def _quantiles(samples: list[float]) -> tuple[float, float, float]:
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return deciles[1], statistics.median(samples), deciles[7]


class Target(NamedTuple):
    """A figure that was promised; `worst` is the layer furthest from it."""

    target: str
    wanted: str
    measured: str
    worst: str
    verdict: str  # "met", "MISSED", "not measured"


def targets(rows: list[Row], floors: dict[str, float]) -> list[Target]:
    """The promised figures in the rows. Layers of one shape count as often as the network has them."""

    def speedups(suite: str, product: str, mode: str, against: str) -> dict[str, float] | None:
        return _ratios(rows, suite, product, mode, lambda name: name.startswith(against), "ours auto")

    conv, products = "conv, batch 20", "products, batch 256"
    found = [
        _judged("conv step against concatenated, batch 20, graph", speedups(conv, STEP, "graph", "conc"), 1.6, 1.2),
        _judged("conv step against concatenated, batch 20, eager", speedups(conv, STEP, "eager", "conc"), 3.0),
        _judged("conv step against concatenated, batch 256, graph",
                speedups("conv, batch 256", STEP, "graph", "conc"), 1.25),
        _judged("forward against the real convolution, batch 256", speedups(products, "forward", "graph", "real"), 1.0),
        _judged("dX against the real convolution, batch 256", speedups(products, "dx", "graph", "real"), 1.0),
        _judged("dW against the real convolution, batch 256", speedups(products, "dw", "graph", "real"), 0.9),
        _judged("float32 step against the real layer, TF32 off, batch 20",
                speedups("float32, batch 20", STEP, "graph", "real"), 2.0),
        _judged("linear step against concatenated, batch 20",
                speedups("linear, batch 20", STEP, "graph", "conc"), 3.0, 3.0),
    ]  # fmt: skip
    roofs = {
        row.layer: row.percent_of_roof / 100
        for row in rows
        if (row.suite, row.product, row.provider) == (products, "forward", "ours auto")
        and row.percent_of_roof
        and row.layer != "conv 4"
    }
    found.append(_judged("share of the measured roof, forward, layers 5-13, batch 256", roofs or None, 0.6))
    times = {
        row.layer: row.median_us for row in rows if row.suite == "linear, batch 20" and row.provider == "ours auto"
    }
    inverse = {layer: floors[layer] / us for layer, us in times.items() if us}
    found.append(_judged("linear step: kernels' floor over time, 1 / 1.5", inverse or None, 1 / 1.5, 1 / 1.5))
    return found


def _ratios(
    rows: list[Row], suite: str, product: str, mode: str, is_baseline: Callable[[str], bool], provider: str
) -> dict[str, float] | None:
    """Time of the best baseline over ours, per layer; None where nothing, or not every layer, was measured."""
    chosen = [row for row in rows if (row.suite, row.product, row.mode) == (suite, product, mode)]
    ratios = {}
    for layer in [case.layer.name for case in SUITES[suite][0] if case.product == product]:
        times = {row.provider: row.median_us for row in chosen if row.layer == layer and row.median_us}
        others = [time for name, time in times.items() if is_baseline(name) and time]
        if not others or provider not in times:
            return None
        ratios[layer] = min(others) / (times[provider] or math.nan)
    return ratios


def _judged(name: str, ratios: dict[str, float] | None, wanted: float, at_least: float = 0.0) -> Target:
    text = f">= {wanted:.2f}" + (f", no layer under {at_least:.2f}" if at_least else "")
    if not ratios:
        return Target(name, text, "", "", "not measured")
    logs = [math.log(ratio) for layer, ratio in ratios.items() for _ in range(_count(layer))]
    mean, worst = math.exp(statistics.mean(logs)), min(ratios, key=lambda layer: ratios[layer])
    met = mean >= wanted and ratios[worst] >= at_least
    return Target(name, text, f"{mean:.2f}", f"{worst}: {ratios[worst]:.2f}", "met" if met else "MISSED")


def _count(layer: str) -> int:
    """How many layers of the network a name stands for.

    >>> _count("conv 11-13"), _count("conv 2")
    (3, 1)
    """
    first, _, last = layer.split()[-1].partition("-")
    return int(last) - int(first) + 1 if last else 1


def provenance(commit: str | None) -> dict[str, str]:
    """Where and with what the rows were measured."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "commit": commit or _git_commit(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if runtime.HAS_TRITON else "not installed",
        "cuda": torch.version.cuda or "none",
        "cudnn": str(torch.backends.cudnn.version()),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _git_commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def run_suites(device: torch.device, clock: Clock | None, roof: Roof | None, deadline: float) -> Iterator[list[Row]]:
    """The rows of one case after the other; says which the deadline drops."""
    for cases, providers in SUITES.values():
        for case in cases:
            if time.monotonic() > deadline:
                print(f"dropped, out of budget: {case}", flush=True)
            else:
                yield measure(case, providers, operands_of(case, device), clock, roof)


def smoke() -> Iterator[list[Row]]:
    """One tiny case of each suite and product on the CPU, without the form that only a kernel has.

    In float32: PyTorch's bfloat16 convolutions on a CPU are less accurate than the kernels must be.
    """
    for cases, providers in SUITES.values():
        here = [provider for provider in providers if provider.form != "q16"]
        for first in {case.product: case for case in reversed(cases)}.values():
            side = 0 if first.linear else 4
            layer = first.layer._replace(channels_in=8, channels_out=12, side=side)
            case = first._replace(layer=layer, batch=2, precision="float32")
            yield measure(case, here, operands_of(case, torch.device("cpu")), None, None)


def write(path: Path, rows: Iterable[NamedTuple], extra: dict[str, str]) -> None:
    """The rows as CSV, each with its provenance."""
    lines = [{**row._asdict(), **extra} for row in rows]
    if not lines:
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def _line(row: Row) -> str:
    times = "" if row.median_us is None else f"{row.median_us:.1f} us ({row.p20_us:.1f} to {row.p80_us:.1f})"
    roof = "" if row.percent_of_roof is None else f"{row.percent_of_roof:.0f} % of the roof"
    error = f"error {row.error:.1e} ({row.error_over_tolerance:.2f} of what is allowed)"
    what = f"{row.suite:20} {row.layer:11} {row.product:17} {row.mode:6} {row.provider:19} {row.status:8}"
    return f"{what} {error}  {times}  {roof}".rstrip()


def _window(case: Case) -> tuple[list[int], list[int], list[int], int]:
    pad = case.layer.kernel // 2
    return [1, 1], [pad, pad], [1, 1], 1


def _as(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    return tensor.contiguous(memory_format=memory_format) if tensor.dim() == 4 else tensor


def _prepare(clock: GpuClock, arch: int) -> Roof:
    """Compiles all kernels, and measures the roof."""
    from bench.warm import compile_all

    start = time.monotonic()
    wanted = [(case, p.form) for cases, providers in SUITES.values() for case in cases for p in providers if p.form]
    count, errors = compile_all(launch for case, form in wanted for launch in launches(case, form, arch))
    print(f"{count} kernels compiled in {time.monotonic() - start:.0f} s", *errors, sep="\n")
    roof = clock.roof()
    rates = ", ".join(f"{precision} {1e-12 * rate:.0f} TFLOP/s" for precision, rate in roof.flops.items())
    print(f"roof: copy {1e-12 * roof.bandwidth:.2f} TB/s, {rates}; an empty graph takes {clock.empty_graph():.1f} us")
    return roof


def main(arguments: list[str] | None = None) -> int:
    """Prints every row as it is measured, at the end the targets. Returns 2 without a GPU, 1 if a result was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results/gpu"), help="folder of the results")
    parser.add_argument(
        "--budget", type=float, default=math.inf, help="seconds after which the remaining cases are dropped"
    )
    parser.add_argument("--commit", help="what was measured, where git cannot tell")
    parser.add_argument("--smoke", action="store_true", help="tiny cases on the CPU, checked but not timed")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.budget
    if not options.smoke and not torch.cuda.is_available():
        print("bench.gpu needs a CUDA device; --smoke checks everything but the times on a CPU", file=sys.stderr)
        return 2
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    floors: dict[str, float] = {}
    if options.smoke:
        measured = smoke()
    else:
        clock = GpuClock()
        arch = _launch.arch_of(clock.flushed)
        roof = _prepare(clock, arch)
        floors = {case.layer.name: floor_us(case, arch, roof.bandwidth) for case in SUITES["linear, batch 20"][0]}
        measured = run_suites(torch.device("cuda"), clock, roof, deadline)
    extra = provenance(options.commit)
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for new in measured:
        rows += new
        for row in new:
            print(_line(row), flush=True)
        write(options.out / "conv.csv", rows, extra)
    judged = targets(rows, floors)
    write(options.out / "targets.csv", judged, extra)
    for target in judged:
        print(f"{target.target:62} {target.wanted:32} {target.measured:6} {target.worst:18} {target.verdict}")
    return int(any(row.status == "REFUSED" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
