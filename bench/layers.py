"""The layers of the quaternion VGG16 (WASPAA 2023): convolutions and linear maps, on their own.

Ours, in each form, against the way of the public libraries, a real weight concatenated in each step and multiplied by
cuDNN, and against cuDNN's real convolution of the same shape; baselines come in both memory formats.
"""

import functools
import importlib
import importlib.util
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import qkernels
from bench.case import (
    BACKWARD,
    FORWARD,
    STEP,
    Case,
    Provider,
    Results,
    Run,
    Suite,
    differentiated,
    reference_run,
    relative_error,
)
from qkernels import algebra
from qkernels.runtime.tolerances import tolerance

# Bare products, without bias and ReLU.
PRODUCT, DX, DW = "product", "dx", "dw"
BARE = (PRODUCT, DX, DW)
# A baseline must compute the right thing; how it rounds is its own affair: gradients of concatenated parts are summed
# in the half type, and cuDNN may take Winograd's algorithm for float32.
BASELINE_TOLERANCE = {"bf16": 1e-2, "fp16": 2e-3, "tf32": 2e-3, "float32": 1e-4}
# Operands that runs rotate through take no more bytes than this.
ROTATED_BYTES = 2**30
X, WEIGHT, BIAS = range(3)


class Layer(NamedTuple):
    """Real channels, kernel size and side of the square map; kernel 0 is a linear map."""

    name: str
    channels_in: int
    channels_out: int
    kernel: int
    side: int


# The last four, of no network here, tell what the kernel's and the map's size do.
LAYERS = [
    Layer("conv 1", 4, 64, 3, 64),
    Layer("conv 2", 64, 64, 3, 64),
    Layer("conv 3", 64, 128, 3, 32),
    Layer("conv 4", 128, 128, 3, 32),
    Layer("conv 5", 128, 256, 3, 16),
    Layer("conv 6-7", 256, 256, 3, 16),
    Layer("conv 8", 256, 512, 3, 8),
    Layer("conv 9-10", 512, 512, 3, 8),
    Layer("conv 11-13", 512, 512, 3, 4),
    Layer("linear 1", 2048, 4096, 0, 1),
    Layer("linear 2", 4096, 4096, 0, 1),
    Layer("1x1 on 16x16", 1024, 512, 1, 16),
    Layer("1x1 on 8x8", 1024, 512, 1, 8),
    Layer("5x5 on 32x32", 128, 128, 5, 32),
    Layer("5x5 on 16x16", 128, 64, 5, 16),
]


class Shapes(NamedTuple):
    """Of the operands."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    bias: tuple[int, ...]
    dy: tuple[int, ...]
    real: tuple[int, ...]


class Operands(NamedTuple):
    """`real` is the weight of the real layer of the same shape."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor
    real: Tensor


@dataclass(frozen=True, kw_only=True)
class LayerCase(Case):
    """A convolution, or a linear map (kernel 0) with maps of one pixel.

    The works `forward`, `backward` and both are of the layer with bias and ReLU, and all gradients; `product`, `dx` and
    `dw` are bare products. A layer of one input channel, the real network's first, has no quaternion weight.
    """

    channels_in: int
    channels_out: int
    kernel: int
    size: tuple[int, int]

    @property
    def linear(self) -> bool:
        return self.kernel == 0

    @property
    def quaternion(self) -> bool:
        return self.channels_in % 4 == 0

    @property
    def shape(self) -> str:
        map_ = "" if self.linear else f" x {self.size[0]} x {self.size[1]}"
        return f"{self.channels_in} -> {self.channels_out}{map_}"

    @property
    def shapes(self) -> Shapes:
        c, d, window = self.channels_in, self.channels_out, self._window
        maps = () if self.linear else self.size
        weight = (4, d // 4, c // 4, *window) if self.quaternion else (0,)
        return Shapes((self.batch, c, *maps), weight, (d,), (self.batch, d, *maps), (d, c, *window))

    @property
    def flops(self) -> int:
        """Of the 16 products of the definition, which are those of a real layer of the same shape."""
        products = {STEP: 3, BACKWARD: 2}.get(self.work, 1)
        return 2 * products * math.prod(self.shapes.dy) * self.channels_in * math.prod(self._window)

    @property
    def bytes(self) -> int:
        x, weight, bias, y, real = (math.prod(shape) for shape in self.shapes)
        w = weight or real
        elements = {
            PRODUCT: x + w + y,
            DX: y + w + x,
            DW: y + x + w,
            FORWARD: x + w + bias + y,
            BACKWARD: 2 * y + x + w + x + w + bias,  # dy, y, x, w in; dx, dw, db out
        }
        elements[STEP] = elements[FORWARD] + elements[BACKWARD]
        return elements[self.work] * self.dtype.itemsize

    @property
    def sets(self) -> int:
        one = sum(math.prod(shape) for shape in self.shapes) * self.dtype.itemsize
        return min(2, max(1, ROTATED_BYTES // one))

    def operands(self, device: torch.device) -> Operands:
        """In the memory format that ours reads, channels last on a GPU; a baseline's own is made from it."""
        generator = torch.Generator(device)
        generator.manual_seed(int(torch.randint(2**62, ())))
        drawn = [torch.randn(shape, generator=generator, device=device) for shape in self.shapes]
        scale = (self.channels_in * math.prod(self._window)) ** -0.5
        x, weight, bias, dy, real = (tensor.to(self.dtype) for tensor in drawn)
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        return Operands(*(_as(tensor, layout) for tensor in (x, scale * weight, bias, dy, scale * real)))

    def gate(self, provider: Provider, operands: Operands, results: Results) -> tuple[float, float]:
        """Relative Frobenius errors of output and gradients against float64."""
        names = {PRODUCT: ("y",), FORWARD: ("y",), DX: ("dx",), DW: ("dw",)}.get(self.work, ("y", "dx", "dw", "db"))
        worst = (0.0, 0.0)
        exact = self._exact(operands, provider.real, results[0])
        for name, actual, expected in zip(names, results, exact, strict=True):
            error = relative_error(actual, expected)
            allowed = tolerance(name, self.precision) if provider.ours else BASELINE_TOLERANCE[self.precision]
            worst = max(worst, (error / allowed, error))
        return worst

    def tiny(self) -> "LayerCase":
        channels_in = 64 if self.quaternion else 1  # enough for every form
        return replace(self, batch=2, channels_in=channels_in, channels_out=12, size=(4, 3), precision="float32")

    @property
    def _window(self) -> tuple[int, ...]:
        return () if self.linear else (self.kernel, self.kernel)

    def _exact(self, operands: Operands, real: bool, y: Tensor) -> list[Tensor]:
        """What a provider should have returned; behind the ReLU of its own `y`: gradients jump where values are near 0.

        In float64 for float32; for half types in float32, whose error is a thousandth of the tolerance.
        """
        wide = torch.float64 if self.dtype == torch.float32 else torch.float32
        x, weight, bias, dy, real_weight = (tensor.to(wide) for tensor in operands)
        weight = real_weight if real else algebra.expand_weight(weight.contiguous())
        pad = self.kernel // 2
        if self.work not in BARE:
            dy = dy * (y > 0)

        def gradients(*wanted: bool) -> tuple[Tensor, Tensor]:
            if self.linear:
                dx, dw = dy @ weight, dy.mT @ x
            else:
                window = ([1, 1], [pad, pad], [1, 1], False, [0, 0], 1)
                dx, dw, _ = torch.ops.aten.convolution_backward(dy, x, weight, None, *window, [*wanted, False])
            return dx, dw if real or not wanted[1] else algebra.contract_weight(dw.contiguous())

        with reference_run():
            if self.work == DX:
                return [gradients(True, False)[0]]
            if self.work == DW:
                return [gradients(False, True)[1]]
            bare = F.linear(x, weight) if self.linear else F.conv2d(x, weight, None, padding=pad)
            if self.work == PRODUCT:
                return [bare]
            forward = (bare + bias.view(1, -1, *[1] * (bare.dim() - 2))).relu()
            if self.work == FORWARD:
                return [forward]
            return [forward, *gradients(True, True), dy.transpose(0, 1).flatten(1).sum(1)]


def runs(
    layer: Callable[[Tensor, Tensor, Tensor | None, bool], Tensor],
    prepare: Callable[[Operands], Operands] = lambda operands: operands,
) -> Callable[[LayerCase, Sequence[Operands]], list[Run]]:
    """Runs of a function of x, weight, bias or None, and whether a ReLU follows."""

    def build(case: LayerCase, sets: Sequence[Operands]) -> list[Run]:
        def bare(x: Tensor, weight: Tensor) -> Tensor:
            return layer(x, weight, None, False)

        def whole(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return layer(x, weight, bias, True)

        made = []
        for x, weight, bias, dy, _ in map(prepare, sets):
            if case.work in BARE:
                work, wanted = (FORWARD, ()) if case.work == PRODUCT else (BACKWARD, ({DX: X, DW: WEIGHT}[case.work],))
                made.append(differentiated(bare, (x, weight), dy, work, wanted))
            else:
                made.append(differentiated(whole, (x, weight, bias), dy, case.work))
        return made

    return build


def ours(form: str, fits: Callable[[LayerCase], bool]) -> Provider:
    """The library's layer."""

    def layer(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        with qkernels.set_form(form):
            activation = "relu" if relu else None
            if x.dim() == 2:
                return qkernels.hamilton_linear(x, weight, bias, activation=activation)
            y = qkernels.hamilton_conv2d(x, weight, bias, padding=weight.shape[-1] // 2, activation=activation)
            assert isinstance(y, Tensor)
            return y

    return Provider(f"ours {form}", runs(layer), fits, cpu=form != "signed", read=_without_output)


def concatenated(weight: Tensor) -> Tensor:
    """The real weight in the way of the public libraries: rows of signed components, put together by `cat`."""
    parts = weight.unbind(0)
    signed = {1: parts, -1: [-part for part in parts]}
    rows = [torch.cat([signed[algebra.SIGNS[a][c]][a ^ c] for c in range(4)], 1) for a in range(4)]
    return torch.cat(rows, 0)


def baseline(name: str, memory_format: torch.memory_format, real: bool, fits: Callable[[LayerCase], bool]) -> Provider:
    """PyTorch's own layer with a concatenated or with a real weight."""

    def layer(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        return _layer(x, weight if real else concatenated(weight), bias, relu)

    def prepare(operands: Operands) -> Operands:
        x, weight, bias, dy, wide = operands
        x, dy, wide = (_as(tensor, memory_format) for tensor in (x, dy, wide))
        return Operands(x, wide if real else weight, bias, dy, wide)

    return Provider(name, runs(layer, prepare), fits, real=real, read=_without_output)


def compiled(name: str, fits: Callable[[LayerCase], bool], **options: Any) -> Provider:
    """`torch.compile` of the layer with a concatenated weight."""

    def build(case: LayerCase, sets: Sequence[Operands]) -> list[Run]:
        @functools.partial(torch.compile, fullgraph=True, dynamic=False, **options)
        def layer(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
            return _layer(x, concatenated(weight), bias, relu)

        return runs(layer)(case, sets)

    return Provider(name, build, fits, read=_without_output)


@functools.cache
def speechbrain_module(name: str) -> Any:
    """A module of SpeechBrain's quaternion networks, and nothing else of its import.

    SpeechBrain leaves modules that raise when somebody looks through `sys.modules`, as `inspect` does, and patches
    PyTorch's iterators of batches in place: imported again it would patch its own patch, which then calls itself.
    """
    from torch.utils.data import dataloader

    importlib.import_module("qat.data.torchaudio_import")  # which SpeechBrain imports, and which may need this help
    iterator: Any = dataloader._BaseDataLoaderIter
    own = {attribute: vars(iterator).get(attribute) for attribute in ("__init__", "_reset", "__old_init__")}
    try:
        return importlib.import_module(f"speechbrain.nnet.quaternion_networks.{name}")
    finally:
        for attribute, value in own.items():
            setattr(iterator, attribute, value)
        for module in [module for module in sys.modules if module.partition(".")[0] == "speechbrain"]:
            del sys.modules[module]


def _speechbrain(case: LayerCase, sets: Sequence[Operands]) -> list[Run]:
    """The functions behind SpeechBrain's layers, without the transpositions around them."""
    ops = speechbrain_module("q_ops")

    def layer(x: Tensor, r: Tensor, i: Tensor, j: Tensor, k: Tensor, bias: Tensor) -> Tensor:
        if case.linear:
            y: Tensor = ops.quaternion_linear_op(x, r.mT, i.mT, j.mT, k.mT, bias)
        else:
            y = ops.quaternion_conv_op(x, r, i, j, k, bias, 1, case.kernel // 2, 1, 1, False)
        return y.relu()

    made = []
    for x, weight, bias, dy, _ in sets:
        x, dy = (_as(tensor, torch.contiguous_format) for tensor in (x, dy))
        parts = weight.contiguous().unbind(0)
        made.append(differentiated(layer, (x, *parts, bias), dy, case.work))
    return made


def _stacked(results: Results) -> Results:
    """The four gradients of SpeechBrain's components as one."""
    y, *gradients = results
    return (y, gradients[0], torch.stack(gradients[1:5]), gradients[5]) if gradients else (y,)


def _layer(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    y = F.linear(x, weight, bias) if x.dim() == 2 else F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
    return y.relu() if relu else y


def _without_output(results: Results) -> Results:
    """Gradients alone where there is one only: that of a bare product."""
    return results[1:] if len(results) == 2 else results


def _as(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    return tensor.contiguous(memory_format=memory_format) if tensor.dim() == 4 else tensor


def _quaternion(case: LayerCase) -> bool:
    return case.quaternion


def _whole(case: LayerCase) -> bool:
    return case.quaternion and case.work not in BARE


def _by_form(case: LayerCase) -> bool:
    """Only for accurate float32 there is a choice; on a CPU it is that between q8 and dense."""
    wide = case.quaternion and case.channels_in >= 64
    return wide and case.precision == "float32" and (case.work in BARE or case.suite == "cpu")


def _on_cpu(case: LayerCase) -> bool:
    return case.suite == "cpu" and _by_form(case)


COMPILED = "against torch.compile"
_AUTOTUNED = ("conv 2", "conv 6-7", "conv 11-13")
PROVIDERS = [
    ours("auto", _quaternion),
    ours("signed", _by_form),
    ours("q8", _by_form),
    ours("dense", _on_cpu),
    baseline("concatenated, NCHW", torch.contiguous_format, False, _whole),
    baseline("concatenated, NHWC", torch.channels_last, False, _whole),
    baseline("real, NCHW", torch.contiguous_format, True, lambda case: not case.variant),
    baseline("real, NHWC", torch.channels_last, True, lambda case: not case.variant),
    compiled("torch.compile", lambda case: case.variant == COMPILED),
    compiled(
        "torch.compile, max-autotune",
        lambda case: case.variant == COMPILED and case.layer in _AUTOTUNED,
        mode="max-autotune-no-cudagraphs",
    )._replace(smoke=False),
]
if importlib.util.find_spec("speechbrain"):
    PROVIDERS.append(Provider("SpeechBrain", _speechbrain, _whole, read=_stacked))

WIDE = 128  # input channels from which on products are compared
BATCHES, PRECISIONS, WORKS = (20, 256), ("bf16", "float32", "fp16", "tf32"), (STEP, FORWARD, BACKWARD)


def layer_case(layer: Layer, network: str, batch: int, precision: str, work: str, **more: Any) -> LayerCase:
    """A layer in one of the two networks; the real one's maps are 8 times as high and twice as wide."""
    tall, wide = (8, 2) if network == "real" else (1, 1)
    channels_in = layer.channels_in
    if network == "real" and layer.name == "conv 1":
        channels_in = 1
    if network == "real" and layer.name == "linear 1":
        channels_in *= tall * wide
    return LayerCase(
        suite="conv" if layer.kernel else "linear",
        network=network,
        layer=layer.name,
        batch=batch,
        precision=precision,
        work=work,
        channels_in=channels_in,
        channels_out=layer.channels_out,
        kernel=layer.kernel,
        size=(layer.side * tall, layer.side * wide),
        **more,
    )


def count_of(name: str) -> int:
    """How many layers of the network a name stands for.

    >>> count_of("conv 11-13"), count_of("conv 2")
    (3, 1)
    """
    first, _, last = name.split()[-1].partition("-")
    return int(last) - int(first) + 1 if last else 1


def _rank(layer: Layer, network: str, batch: int, precision: str, work: str) -> int:
    """The steps at the paper's batch first, then what other promised figures rest on; then by distance from that."""
    if network == "quaternion" and precision == "bf16" and work == STEP:
        return 0 if batch == 20 else 1
    if network == "quaternion" and layer.channels_in >= WIDE:
        if (batch, precision) == (256, "bf16") and work in BARE:
            return 2
        if (batch, precision, work) == (20, "float32", STEP):
            return 1
    far = (network == "real", batch != 20, precision != "bf16", precision in ("fp16", "tf32"), work != STEP)
    return 2 + sum(far)


def _grid(layers: Sequence[Layer], works: Sequence[str]) -> list[LayerCase]:
    cases = []
    names = itertools.product(("quaternion", "real"), BATCHES, PRECISIONS, works, layers)
    for network, batch, precision, work, layer in names:
        if network == "real" and layer.name == "conv 1" and work in BARE:
            continue  # one real product of one input channel: nothing to compare
        rank = _rank(layer, network, batch, precision, work)
        modes = ("graph",) if work in BARE else ("graph", "eager")
        cases.append(layer_case(layer, network, batch, precision, work, rank=rank, modes=modes))
    return sorted(cases, key=lambda case: case.rank)


CONVS, LINEARS = LAYERS[:9], LAYERS[9:11]
CONV = Suite(
    [
        *_grid(CONVS, (*WORKS, *BARE)),
        *(layer_case(layer, "quaternion", 20, "bf16", STEP, variant=COMPILED, rank=3) for layer in CONVS),
    ],
    PROVIDERS,
)
LINEAR = Suite(_grid(LINEARS, WORKS), PROVIDERS)


def _form_cases() -> list[LayerCase]:
    cases = []
    for divisor, full in itertools.product((1, 8), LAYERS):
        channels_in, channels_out = max(4, full.channels_in // divisor), full.channels_out // divisor
        layer = full._replace(channels_in=channels_in, channels_out=channels_out)
        case = layer_case(layer, "quaternion", 20, "float32", STEP)
        cases.append(replace(case, suite="forms", variant=f"width 1/{divisor}", modes=("eager",)))
    return cases


# On which `cpu_form` of qkernels/ops/hamilton_conv/config.py rests: the real product or 8 thin ones, by shape.
FORMS = Suite(_form_cases(), [ours(form, _quaternion) for form in ("dense", "q8", "auto")])
