"""Single layers of the quaternion VGG16 (WASPAA 2023): convolutions and linear layers.

Ours, in each form, is compared with the method of the public libraries (a real weight that is concatenated in each
step, and cuDNN) and with cuDNN's real convolution of the same shape. Baselines run in both memory formats.
"""

import functools
import importlib
import importlib.util
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

import qkernels
from bench.case import BACKWARD, FORWARD, MODES, ROTATED_BYTES, STEP, Case, Provider, Results, Run, Suite
from bench.gradients import differentiated, reference_run, relative_error
from qkernels import algebra
from qkernels.ops.hamilton_conv.config import PLAIN_FORMS
from qkernels.runtime.tolerances import tolerance

PRODUCT, DX, DW = BARE = ("product", "dx", "dw")  # without bias and ReLU
# Baselines may round more: they sum gradients of concatenated parts in the half type, and cuDNN may use Winograd's
# algorithm for float32.
BASELINE_TOLERANCE = {"bf16": 1e-2, "fp16": 2e-3, "tf32": 2e-3, "float32": 1e-4}
X, WEIGHT = range(2)
T = TypeVar("T")


class Layer(NamedTuple):
    """A layer: real channels, kernel size (0: linear layer) and side of the square map."""

    name: str
    channels_in: int
    channels_out: int
    kernel: int
    side: int


# The last four are not from the networks; they show the effect of kernel size and map size.
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


class Operands(NamedTuple, Generic[T]):
    """The operands or their shapes; `real` is the weight of the real layer of the same shape."""

    x: T
    weight: T
    bias: T
    dy: T
    real: T


@dataclass(frozen=True, kw_only=True)
class LayerCase(Case):
    """A convolution, or a linear layer (kernel 0).

    The works "forward", "backward" and "forward+backward" include bias, ReLU and all gradients; "product", "dx" and
    "dw" are single products. A layer with one input channel, the real network's first, has no quaternion weight.
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
    def shapes(self) -> Operands[tuple[int, ...]]:
        c, d, window = self.channels_in, self.channels_out, self._window
        maps = () if self.linear else self.size
        weight = (4, d // 4, c // 4, *window) if self.quaternion else (0,)
        return Operands((self.batch, c, *maps), weight, (d,), (self.batch, d, *maps), (d, c, *window))

    @property
    def flops(self) -> int:
        """Operations of the 16 products of the definition, as many as in a real layer of the same shape."""
        products = {STEP: 3, BACKWARD: 2}.get(self.work, 1)
        return 2 * products * math.prod(self.shapes.dy) * self.channels_in * math.prod(self._window)

    @property
    def bytes(self) -> int:
        x, weight, bias, y, real = (math.prod(shape) for shape in self.shapes)
        w = weight or real
        forward, backward = x + w + bias + y, 2 * y + 2 * (x + w) + bias  # reads dy, y, x, w; writes dx, dw, db
        elements = {FORWARD: forward, BACKWARD: backward, STEP: forward + backward}.get(self.work, x + w + y)
        return elements * self.dtype.itemsize

    @property
    def sets(self) -> int:
        return 2 if 2 * sum(map(math.prod, self.shapes)) * self.dtype.itemsize <= ROTATED_BYTES else 1

    def operands(self, device: torch.device) -> Operands[Tensor]:
        """Operands in the memory format of our layers: channels last on a GPU, and on a CPU for the form "dense".

        Baselines convert them before they are timed.
        """
        generator = torch.Generator(device)
        generator.manual_seed(int(torch.randint(2**62, ())))
        drawn = [torch.randn(shape, generator=generator, device=device) for shape in self.shapes]
        scale = (self.channels_in * math.prod(self._window)) ** -0.5
        x, weight, bias, dy, real = (tensor.to(self.dtype) for tensor in drawn)
        last = device.type == "cuda"
        if not last and self.quaternion and not self.linear:
            last = qkernels.form_of(qkernels.hamilton_conv2d, x, weight) == "dense"
        layout = torch.channels_last if last else torch.contiguous_format
        return Operands(*(_as(tensor, layout) for tensor in (x, scale * weight, bias, dy, scale * real)))

    def check(self, provider: Provider, operands: Operands[Tensor], results: Results) -> tuple[float, float]:
        """Relative Frobenius errors of output and gradients against float64."""
        names = {PRODUCT: ("y",), FORWARD: ("y",), DX: ("dx",), DW: ("dw",)}.get(self.work, ("y", "dx", "dw", "db"))
        worst = (0.0, 0.0)
        for name, actual, exact in zip(names, results, self._exact(operands, provider.real, results[0]), strict=True):
            error = relative_error(actual, exact)
            allowed = tolerance(name, self.precision) if provider.ours else BASELINE_TOLERANCE[self.precision]
            worst = max(worst, (error / allowed, error))
        return worst

    def tiny(self) -> "LayerCase":
        channels_in = 64 if self.quaternion else 1  # enough for every form
        return replace(self, batch=2, channels_in=channels_in, channels_out=12, size=(4, 3), precision="float32")

    @property
    def _window(self) -> tuple[int, ...]:
        return () if self.linear else (self.kernel, self.kernel)

    def _exact(self, operands: Operands[Tensor], real: bool, y: Tensor) -> Sequence[Tensor]:
        """Reference results: in float64 for float32; in float32 for half types, with an error of 1/1000 of the
        tolerance.

        Gradients pass the ReLU where the provider's own `y` is positive, because they jump at 0.
        """
        wide, bare = torch.float64 if self.dtype == torch.float32 else torch.float32, self.work in BARE
        x, weight, bias, dy, dense = (tensor.to(wide).contiguous() for tensor in operands)
        if not real:
            dense = algebra.expand_weight(weight)
        leaves = [leaf.requires_grad_() for leaf in {DX: [x], DW: [dense]}.get(self.work, [x, dense, bias])]
        with reference_run():
            offset = None if bare else bias
            exact = F.linear(x, dense, offset) if self.linear else F.conv2d(x, dense, offset, padding=self.kernel // 2)
            output = exact.detach() if bare else exact.detach().relu()
            if self.work in (PRODUCT, FORWARD):
                return [output]
            gradients = torch.autograd.grad(exact, leaves, dy if bare else dy * (y > 0))
        if not real:
            gradients = tuple(
                algebra.contract_weight(gradient.contiguous()) if leaf is dense else gradient
                for leaf, gradient in zip(leaves, gradients, strict=True)
            )
        return gradients if bare else (output, *gradients)


def building(
    layer: Callable[[Tensor, Tensor, Tensor | None, bool], Tensor],
    prepare: Callable[[Operands[Tensor]], Operands[Tensor]] = lambda operands: operands,
) -> Callable[[LayerCase, Operands[Tensor]], Run]:
    """``(case, operands) -> run`` for a function of x, weight, bias (or None) and whether a ReLU follows."""

    def bare(x: Tensor, weight: Tensor) -> Tensor:
        return layer(x, weight, None, False)

    def whole(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer(x, weight, bias, True)

    def build(case: LayerCase, operands: Operands[Tensor]) -> Run:
        x, weight, bias, dy, _ = prepare(operands)
        if case.work not in BARE:
            return differentiated(whole, (x, weight, bias), dy, case.work)
        if case.work == PRODUCT:
            return differentiated(bare, (x, weight), dy, FORWARD)
        run = differentiated(bare, (x, weight), dy, BACKWARD, (X if case.work == DX else WEIGHT,))
        return lambda: run()[1:]

    return build


def ours(form: str, fits: Callable[[LayerCase], bool]) -> Provider:
    """The library's layer in one of its forms, on maps in the memory format that the form computes in."""

    def layer(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        activation = "relu" if relu else None
        with qkernels.set_form(form):
            if x.dim() == 2:
                return qkernels.hamilton_linear(x, weight, bias, activation=activation)
            y = qkernels.hamilton_conv2d(x, weight, bias, padding=weight.shape[-1] // 2, activation=activation)
        assert isinstance(y, Tensor)
        return y

    def prepare(operands: Operands[Tensor]) -> Operands[Tensor]:
        if form not in PLAIN_FORMS or operands.x.is_cuda:
            return operands
        layout = torch.channels_last if form == "dense" else torch.contiguous_format
        return operands._replace(x=_as(operands.x, layout), dy=_as(operands.dy, layout))

    return Provider(f"ours {form}", building(layer, prepare), fits, cpu=form != "signed")


def concatenated(weight: Tensor) -> Tensor:
    """The real weight as the public libraries build it: rows of signed components, concatenated."""
    parts = weight.unbind(0)
    signed = {1: parts, -1: [-part for part in parts]}
    rows = [torch.cat([signed[algebra.SIGNS[a][c]][a ^ c] for c in range(4)], 1) for a in range(4)]
    return torch.cat(rows, 0)


def baseline(name: str, memory_format: torch.memory_format, real: bool, fits: Callable[[LayerCase], bool]) -> Provider:
    """PyTorch's own layer with a concatenated or with a real weight."""

    def layer(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        return _layer(x, weight if real else concatenated(weight), bias, relu)

    def prepare(operands: Operands[Tensor]) -> Operands[Tensor]:
        x, weight, bias, dy, wide = operands
        x, dy, wide = (_as(tensor, memory_format) for tensor in (x, dy, wide))
        return Operands(x, wide if real else weight, bias, dy, wide)

    return Provider(name, building(layer, prepare), fits, real=real)


def compiled(name: str, layers: Sequence[str], smoke: bool = True, **options: Any) -> Provider:
    """`torch.compile` of the layer with a concatenated weight, for the named layers."""

    def build(case: LayerCase, operands: Operands[Tensor]) -> Run:
        @functools.partial(torch.compile, fullgraph=True, dynamic=False, **options)
        def layer(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
            return _layer(x, concatenated(weight), bias, relu)

        return building(layer)(case, operands)

    return Provider(name, build, lambda case: case.variant == COMPILED and case.layer in layers, smoke=smoke)


@functools.cache
def speechbrain_module(name: str) -> Any:
    """A module of SpeechBrain's quaternion networks, without the side effects of its import.

    SpeechBrain leaves modules in `sys.modules` that raise when `inspect` looks at them, and patches PyTorch's iterators
    of batches in place: imported again it would patch its own patch, which then calls itself.
    """
    from torch.utils.data import dataloader

    importlib.import_module("qat.data.torchaudio_import")  # for SpeechBrain, which imports torchaudio as well
    iterator: Any = dataloader._BaseDataLoaderIter
    own = {attribute: vars(iterator).get(attribute) for attribute in ("__init__", "_reset", "__old_init__")}
    try:
        return importlib.import_module(f"speechbrain.nnet.quaternion_networks.{name}")
    finally:
        for attribute, value in own.items():
            setattr(iterator, attribute, value)
        for module in [module for module in sys.modules if module.partition(".")[0] == "speechbrain"]:
            del sys.modules[module]


def _speechbrain(case: LayerCase, operands: Operands[Tensor]) -> Run:
    """The functions behind SpeechBrain's layers, without the transpositions around them."""
    ops = speechbrain_module("q_ops")

    def layer(x: Tensor, r: Tensor, i: Tensor, j: Tensor, k: Tensor, bias: Tensor) -> Tensor:
        if case.linear:
            y: Tensor = ops.quaternion_linear_op(x, r.mT, i.mT, j.mT, k.mT, bias)
        else:
            y = ops.quaternion_conv_op(x, r, i, j, k, bias, 1, case.kernel // 2, 1, 1, False)
        return y.relu()

    x, dy = (_as(tensor, torch.contiguous_format) for tensor in (operands.x, operands.dy))
    return differentiated(layer, (x, *operands.weight.contiguous().unbind(0), operands.bias), dy, case.work)


def _stacked(results: Results) -> Results:
    """The four gradients of SpeechBrain's components as one."""
    y, *gradients = results
    return (y, gradients[0], torch.stack(gradients[1:5]), gradients[5]) if gradients else (y,)


def _layer(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    y = F.linear(x, weight, bias) if x.dim() == 2 else F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
    return y.relu() if relu else y


def _as(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    return tensor.contiguous(memory_format=memory_format) if tensor.dim() == 4 else tensor


def _whole(case: LayerCase) -> bool:
    return case.quaternion and case.work not in BARE


def _by_form(case: LayerCase) -> bool:
    """Forms differ in accurate float32 alone; on a CPU they are q8 and dense."""
    wide = case.quaternion and case.channels_in >= 64
    return wide and case.precision == "float32" and (case.work in BARE or case.suite == "cpu")


_quaternion = attrgetter("quaternion")
COMPILED = "against torch.compile"
_AUTOTUNED = ("conv 2", "conv 6-7", "conv 11-13")
PROVIDERS = [
    ours("auto", _quaternion),
    ours("signed", _by_form),
    ours("q8", _by_form),
    ours("dense", lambda case: case.suite == "cpu" and _by_form(case)),
    baseline("concatenated, NCHW", torch.contiguous_format, False, _whole),
    baseline("concatenated, NHWC", torch.channels_last, False, _whole),
    baseline("real, NCHW", torch.contiguous_format, True, lambda case: not case.variant),
    baseline("real, NHWC", torch.channels_last, True, lambda case: not case.variant),
    compiled("torch.compile", [layer.name for layer in LAYERS]),
    compiled("torch.compile, max-autotune", _AUTOTUNED, smoke=False, mode="max-autotune-no-cudagraphs"),
]
if importlib.util.find_spec("speechbrain"):
    PROVIDERS.append(Provider("SpeechBrain", _speechbrain, _whole, read=_stacked))

WIDE = 128  # minimum number of input channels for the works in `BARE`
BATCHES, PRECISIONS, WORKS = (20, 256), ("bf16", "float32", "fp16", "tf32"), (STEP, FORWARD, BACKWARD)


def layer_case(layer: Layer, network: str, batch: int, precision: str, work: str, **more: Any) -> LayerCase:
    """A layer in one of the two networks; maps in the real one are 8 times as high and twice as wide."""
    tall, wide = (8, 2) if network == "real" else (1, 1)
    channels_in = layer.channels_in
    if network == "real":
        channels_in = {"conv 1": 1, "linear 1": channels_in * tall * wide}.get(layer.name, channels_in)
    fields: dict[str, Any] = {"suite": "conv" if layer.kernel else "linear", "layer": layer.name, **more}
    return LayerCase(
        network=network,
        batch=batch,
        precision=precision,
        work=work,
        channels_in=channels_in,
        channels_out=layer.channels_out,
        kernel=layer.kernel,
        size=(layer.side * tall, layer.side * wide),
        **fields,
    )


def count_of(name: str) -> int:
    """Number of layers that a name stands for.

    >>> count_of("conv 11-13"), count_of("conv 2")
    (3, 1)
    """
    first, _, last = name.split()[-1].partition("-")
    return int(last) - int(first) + 1 if last else 1


def _rank(layer: Layer, network: str, batch: int, precision: str, work: str) -> int:
    """Priority: steps at the paper's batch, then cases of other promised figures, then by number of differences."""
    if network == "quaternion" and precision == "bf16" and work == STEP:
        return 0 if batch == 20 else 1
    if network == "quaternion" and layer.channels_in >= WIDE:
        if (batch, precision) == (256, "bf16") and work in BARE:
            return 2
        if (batch, precision, work) == (20, "float32", STEP):
            return 1
    far = (network == "real", batch != 20, precision != "bf16", precision in ("fp16", "tf32"), work != STEP)
    return 2 + sum(far)


def _cases(layers: Sequence[Layer], works: Sequence[str]) -> Iterator[LayerCase]:
    names = itertools.product(("quaternion", "real"), BATCHES, PRECISIONS, works, layers)
    for network, batch, precision, work, layer in names:
        if network == "real" and layer.name == "conv 1" and work in BARE:
            continue  # one real product of one input channel: nothing to compare
        rank = _rank(layer, network, batch, precision, work)
        modes = ("graph",) if work in BARE else MODES
        yield layer_case(layer, network, batch, precision, work, rank=rank, modes=modes)


def _form_cases() -> Iterator[LayerCase]:
    for divisor, full in itertools.product((1, 8), LAYERS):
        channels_in, channels_out = max(4, full.channels_in // divisor), full.channels_out // divisor
        layer = full._replace(channels_in=channels_in, channels_out=channels_out)
        more: dict[str, Any] = {"suite": "forms", "variant": f"width 1/{divisor}", "modes": ("eager",)}
        yield layer_case(layer, "quaternion", 20, "float32", STEP, **more)


# Layers so small that the time is that of the calls.
CALLS = [Layer("small conv", 8, 8, 3, 4), Layer("small linear", 8, 8, 0, 1)]
CONVS, LINEARS = LAYERS[:9], LAYERS[9:11]
_MORE: dict[str, Any] = {"variant": COMPILED, "rank": 3, "modes": ("graph",)}
_compiled = (layer_case(layer, "quaternion", 20, "bf16", STEP, **_MORE) for layer in CONVS)
CONV = Suite.of([*_cases(CONVS, (*WORKS, *BARE)), *_compiled], *PROVIDERS)
LINEAR = Suite.of(_cases(LINEARS, WORKS), *PROVIDERS)
# Measures which form is faster, for `cpu_form` in qkernels/ops/hamilton_conv/config.py.
FORMS = Suite.of(_form_cases(), *(ours(form, _quaternion) for form in ("dense", "q8", "auto")))
