"""What is timed: the products of every layer of the quaternion VGG16 (WASPAA 2023), and the ways to compute them.

Ours, in each form, against the way of the public libraries, a real weight concatenated in each step and multiplied by
cuDNN, and against cuDNN's real convolution of the same shape. Baselines come in both memory formats.
"""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import qkernels
from bench.cpu_forms import LAYERS, Layer
from bench.tolerances import tolerance
from qkernels import algebra, runtime
from qkernels.ops import _launch
from qkernels.ops.hamilton_conv import op as conv_op

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


def _window(case: Case) -> tuple[list[int], list[int], list[int], int]:
    pad = case.layer.kernel // 2
    return [1, 1], [pad, pad], [1, 1], 1


def _as(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    return tensor.contiguous(memory_format=memory_format) if tensor.dim() == 4 else tensor
