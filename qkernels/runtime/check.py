"""Whether the kernels are right on this GPU, with its driver and this Triton: `python -m qkernels.runtime --check`.

Every form, type and direction once, on small shapes, against float64; and again and again, which must give the same
bits. New memory is NaN meanwhile, so that what a kernel does not write shows. On a GPU several processes share the
checks: most of the time goes into compiling, and a kernel that breaks its process ends no other check.

In Triton's interpreter (TRITON_INTERPRET=1) the shapes are tiny and the checks run in this process.
"""

import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels import algebra
from qkernels.ops.folded_rowwise import launch as folded
from qkernels.ops.folded_rowwise.reference import folded_rowwise
from qkernels.ops.gram_cosine import launch as gram
from qkernels.ops.gram_cosine import op as gram_op
from qkernels.ops.gram_cosine.reference import gram_cosine
from qkernels.ops.hamilton_conv import config, forms
from qkernels.ops.hamilton_conv import launch as conv
from qkernels.ops.hamilton_conv.config import Problem
from qkernels.ops.hamilton_conv.launch import Epilogue
from qkernels.runtime.device import INTERPRETED, arch_of, multiprocessors_of
from qkernels.runtime.tolerances import LARGEST_ERROR, LOSS_TOLERANCES, tolerance

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "float32": torch.float32}
# By its name: precision, form, and what the launch functions take for them.
HOWS = {
    "bf16": ("bf16", "signed", "signed-half"),
    "fp16": ("fp16", "signed", "signed-half"),
    "tf32": ("tf32", "signed", "signed-tf32"),
    "float32": ("float32", "signed", "signed-ieee"),
    "float32 q8": ("float32", "q8", "q8-ieee"),
}
REPEATS, INTERPRETED_REPEATS = 20, 2
# Sums of few terms: the tables' figures are of layers, and these are their tests' for layers of one channel.
SLACK = 1.5
# Triton's interpreter cuts float32 off where hardware rounds it to bfloat16: errors are twice as large.
CUT = 2.0
DROPOUT = 0.5
BETA = 0.7
DLOSS = 1e3  # brings gradients of float16 out of its subnormal numbers
MOST_PROCESSES = 16
# For one check, its compilation included, and for the start of a process: what takes longer hangs.
KERNEL_SECONDS, START_SECONDS = 60.0, 120.0
RIGHT = "right"
POISON: Any = torch.utils.deterministic

Results = dict[str, Tensor]


class Check(NamedTuple):
    """Some results of kernels.

    Attributes:
        run: computes them.
        exact: the right results for those of `run`; it may replace some of these by what is easier to compare.
        allowed: maximum relative Frobenius error of each; 0: equal.
    """

    run: Callable[[], Results]
    exact: Callable[[Results], Results]
    allowed: dict[str, float]


class Layer(NamedTuple):
    """A convolution.

    Attributes:
        q, p: quaternion channels of input and output.
        window: stride, padding, dilation and groups, as launch functions take them.
        splits: programs that share a sum; 0: as planned.
    """

    batch: int
    q: int
    p: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    window: tuple[int, ...] = (1, 1, 1, 1, 1, 1, 1)
    splits: int = 0


ONE_PIXEL = (1, 1, 0, 0, 1, 1, 1)
SAME = (1, 1, 1, 1, 1, 1, 1)
# "first" has few channels, "deep" fills tiles, in "shared" several programs share a sum; "odd" has strides, a dilation,
# groups, and channels that fill no tile; "decoder" is a layer of RH-Emo.
LAYERS = {
    "first": Layer(3, 1, 16, (21, 18)),
    "deep": Layer(3, 32, 64, (10, 12), (3, 3), SAME, 1),
    "shared": Layer(4, 64, 64, (6, 6), (3, 3), SAME, 3),
    "odd": Layer(2, 40, 66, (9, 8), (3, 2), (2, 1, 1, 0, 1, 2, 2)),
    "decoder": Layer(2, 1, 1, (16, 13), (3, 3), (2, 1, 1, 1, 1, 1, 1)),
    "linear": Layer(20, 40, 36, (1, 1), (1, 1), ONE_PIXEL),
}
TINY = {
    "first": Layer(1, 1, 5, (5, 4)),
    "deep": Layer(1, 32, 16, (4, 3), (1, 2), (1, 1, 0, 1, 1, 1, 1), 1),
    "shared": Layer(1, 16, 16, (9, 8), (2, 1), (1, 1, 1, 0, 1, 1, 1), 2),
    "odd": Layer(1, 6, 10, (5, 4), (3, 2), (2, 1, 1, 0, 1, 2, 2)),
    "decoder": Layer(1, 1, 1, (4, 3), (3, 3), (2, 1, 1, 1, 1, 1, 1)),
    "linear": Layer(3, 17, 12, (1, 1), (1, 1), ONE_PIXEL),
}
DIRECTIONS = {
    "first": ("pool", "dw"),
    "deep": ("forward", "pool", "dx", "dw"),
    "shared": ("forward", "dx", "dw"),
    "odd": ("forward", "dx", "dw"),
    "decoder": ("transposed",),
    "linear": ("forward", "dx", "dw"),
}
FEW_CHANNELS = ("first", "decoder")  # form q8 has no tiles for them
# Samples, channels, spatial sizes; "packed" has a target that was computed before.
FEATURES = {
    "stored": (3, 100, 14, 9),
    "packed": (3, 64, 14, 9),
    "direct": (2, 160, 14, 12),
    "dual": (3, 160, 6, 5),
}
TINY_FEATURES = {"stored": (2, 18, 5, 4), "packed": (2, 9, 5, 3), "direct": (1, 130, 12, 11), "dual": (2, 35, 3, 5)}
FOLDED_FEATURES, TINY_FOLDED_FEATURES = (2, 140, 8, 7), (2, 20, 3, 4)


def checks(tiny: bool) -> dict[str, Callable[[torch.device], Check]]:
    """Functions that draw a check's operands, by name, which begins with the operators that the kernel belongs to."""
    by_name: dict[str, Callable[[torch.device], Check]] = {}
    layers = TINY if tiny else LAYERS
    for how in HOWS:
        by_name[f"conv, linear pack {how}"] = functools.partial(_pack, layers["deep"], layers["odd"], how)
    for precision in PRECISIONS:
        if precision != "tf32":  # of the same type as float32
            by_name[f"conv, linear epilogue's gradient {precision}"] = functools.partial(
                _epilogue_gradient, layers["first"], precision
            )
    for (name, layer), how in itertools.product(layers.items(), HOWS):
        if name in FEW_CHANNELS and "q8" in how:
            continue
        for direction in DIRECTIONS[name]:
            shown = f"linear {direction} {how}" if name == "linear" else f"conv {direction}, {name}, {how}"
            draw = {"forward": _forward, "pool": _pool, "dx": _dx, "dw": _dw, "transposed": _transposed}[direction]
            by_name[shown] = functools.partial(_of_layer, draw, layer, direction, how)
    half_and_full = [precision for precision in PRECISIONS if precision != "tf32"]
    for (mode, shape), precision in itertools.product((TINY_FEATURES if tiny else FEATURES).items(), half_and_full):
        for backward in (False, True):
            name = f"gram {'backward' if backward else 'forward'}, {mode}, {precision}"
            by_name[name] = functools.partial(_gram, shape, mode == "packed", backward, precision)
    for precision, backward in itertools.product(half_and_full, (False, True)):
        name = f"folded-rowwise {'backward' if backward else 'forward'}, {precision}"
        shape = TINY_FOLDED_FEATURES if tiny else FOLDED_FEATURES
        by_name[name] = functools.partial(_folded, shape, backward, precision)
    return by_name


def _is_linear(layer: Layer) -> bool:
    return layer.size == (1, 1)


def _of_layer(
    draw: Callable[[Layer, str, torch.device], Check], layer: Layer, direction: str, how: str, device: torch.device
) -> Check:
    check = draw(layer, how, device)

    def run() -> Results:
        with _planned(layer, direction, how, device):
            return check.run()

    return check._replace(run=run)


@contextlib.contextmanager
def _planned(layer: Layer, direction: str, how: str, device: torch.device) -> Iterator[None]:
    """The planned tile, but as many programs that share a sum as the layer says."""
    if not layer.splits:
        yield
        return
    place = torch.empty(0, device=device)
    y_size = conv.Window.of(layer.size, layer.kernel, layer.window).y_size
    pixels, positions = layer.batch * math.prod(y_size), math.prod(layer.kernel)
    n, k = (layer.q, layer.p) if direction == "dx" else (layer.p, layer.q)
    epilogue = direction == "pool" or (direction == "forward" and _is_linear(layer))
    problem = Problem("dw" if direction == "dw" else "gather", pixels, n, k, positions, epilogue=epilogue)
    form, precision = HOWS[how][2].split("-")
    plan = config.plan(problem, form, precision, arch_of(place), multiprocessors_of(place))
    with config.force(replace(plan, splits=layer.splits)):
        yield


class Operands(NamedTuple):
    """Of a layer: maps of the type that is asked for, parameters in float32, as in training under autocast."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor
    packed: conv.Packed

    def exact(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In float64."""
        return self.x.double(), self.weight.double(), self.bias.double(), self.dy.double()


def _operands(layer: Layer, how: str, device: torch.device) -> Operands:
    precision, _, kernels = HOWS[how]
    dtype, groups = PRECISIONS[precision], layer.window[6]
    y_size = conv.Window.of(layer.size, layer.kernel, layer.window).y_size
    fan_in, pixels = 4 * layer.q // groups * math.prod(layer.kernel), layer.batch * math.prod(y_size)
    x = _map((layer.batch, 4 * layer.q, *layer.size), dtype, device)
    dy = _map((layer.batch, 4 * layer.p, *y_size), dtype, device, pixels**-0.25)
    weight = torch.randn(4, layer.p, layer.q // groups, *layer.kernel, device=device) / math.sqrt(fan_in)
    weight = weight.to(dtype).float()  # how packing rounds is a check of its own
    bias = torch.randn(4 * layer.p, device=device)
    # Packed once for all repeats, so that counters must be left as zeros.
    return Operands(x, weight, bias, dy, conv.Packed(*conv.pack([weight], [kernels], dtype)))


def _map(shape: Sequence[int], dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    x = scale * torch.randn(*shape, device=device)
    return x.to(dtype, memory_format=torch.channels_last)


def _allowed(result: str, how: str, widened: bool = False) -> float:
    precision, *_ = HOWS[how]
    half = precision in ("bf16", "fp16")
    cut = CUT if INTERPRETED and precision == "bf16" and not widened else 1.0
    return SLACK * cut * tolerance(result, precision, widened and half)


def _pack(first: Layer, second: Layer, how: str, device: torch.device) -> Check:
    """Two weights in one launch, with counters."""
    precision, form, kernels = HOWS[how]
    dtype = PRECISIONS[precision]
    weights = [torch.randn(4, x.p, x.q // x.window[6], *x.kernel, device=device) for x in (first, second)]

    def run() -> Results:
        tiles, tickets = conv.pack(weights, [kernels] * 2, dtype)
        return {"tiles": tiles, "tickets": tickets}

    def exact(actual: Results) -> Results:
        parts = []
        for weight in weights:
            if form == "q8":  # the scale of its sums is the product's
                each = algebra.weight_products(weight.double())
                each[:4] /= algebra.WEIGHT_SCALES[0]
            else:
                each = torch.cat([weight, -weight])
            tiles = each.flatten(3).permute(0, 3, 1, 2)  # [tile, position, rows, Q]
            parts += [tiles.flatten(), *([tiles.mT.flatten()] if precision == "tf32" else [])]
        whole = torch.cat(parts)
        whole = _tf32(whole) if precision == "tf32" else whole if form == "q8" else whole.to(dtype)
        return {"tiles": whole.double(), "tickets": torch.zeros(2 * config.MOST_TICKETS, device=device).double()}

    # What is only copied and rounded is so to the bit, but for the interpreter's way with bfloat16.
    cut = INTERPRETED and precision == "bf16"
    return Check(run, exact, {"tiles": _allowed("y", how) if cut or form == "q8" else 0.0, "tickets": 0.0})


def _tf32(x: Tensor) -> Tensor:
    """float32 to the nearest tf32, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def _epilogue_gradient(layer: Layer, precision: str, device: torch.device) -> Check:
    """Behind ReLU, pool and tap."""
    dtype = PRECISIONS[precision]
    dy = _map((layer.batch, 4 * layer.p, *layer.size), dtype, device)
    half = [length // 2 for length in layer.size]
    dpooled = _map((layer.batch, 4 * layer.p, *half), dtype, device)
    relu = _map(dy.shape, dtype, device).relu()
    argmax = torch.randint(5, dpooled.shape, device=device).to(torch.uint8)

    def run() -> Results:
        return {"dy": conv.epilogue_gradient(dy, relu, dpooled, argmax, layer.size, 2.0, dtype)}

    def exact(actual: Results) -> Results:
        windows = F.one_hot(argmax.long(), 5)[..., :4] * dpooled.double()[..., None]
        routed = windows.unflatten(4, (2, 2)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
        odd = (0, layer.size[1] % 2, 0, layer.size[0] % 2)
        return {"dy": 2 * dy.double() * (relu > 0) + F.pad(routed, odd)}

    return Check(run, exact, {"dy": _allowed("dx", precision)})


def _forward(layer: Layer, how: str, device: torch.device) -> Check:
    """Bias and ReLU; of a linear map dropout, too."""
    kernels, o = HOWS[how][2], _operands(layer, how, device)
    linear = _is_linear(layer)
    seed = torch.randint(2**62, (1,), device=device) if linear else None
    epilogue = Epilogue(o.bias, True, seed, 1 / (1 - DROPOUT) if linear else 1.0)

    def run() -> Results:
        return {"y": conv.forward(o.x, o.weight, layer.window, kernels, epilogue, o.packed)}

    def exact(actual: Results) -> Results:
        x, weight, bias, _ = o.exact()
        y = forms.forward(x, weight, bias, layer.window, "dense").relu() * epilogue.scale
        if not linear:
            return {"y": y}
        # Which ones are zeroed is chance; that about half are is not.
        actual["kept"] = ((actual["y"] > 0).sum() / (y > 0).sum())[None]
        return {"y": y * (actual["y"] > 0), "kept": torch.full_like(actual["kept"], 1 - DROPOUT).double()}

    return Check(run, exact, {"y": _allowed("y", how), "kept": 0.5})


def _pool(layer: Layer, how: str, device: torch.device) -> Check:
    """Bias, ReLU, pool, and a tap of the map in front of it."""
    kernels, o = HOWS[how][2], _operands(layer, how, device)

    def run() -> Results:
        epilogue = Epilogue(o.bias, True)
        pooled, argmax, y = conv.forward_pool(o.x, o.weight, layer.window, kernels, epilogue, o.packed, True)
        return {"y": y, "pooled": pooled, "argmax": argmax}

    def exact(actual: Results) -> Results:
        x, weight, bias, _ = o.exact()
        y = forms.forward(x, weight, bias, layer.window, "dense").relu()
        # Where the argmax is, in the kernel's own map, of which the maxima are; 4 if there is nothing above 0.
        pooled, argmax = actual["pooled"].double(), actual["argmax"]
        height, width = (2 * length for length in pooled.shape[2:])
        windows = actual["y"].double()[..., :height, :width].unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        windows = windows.transpose(3, 4).flatten(4, 5)
        maxima = windows.gather(-1, argmax.clamp_max(3).long()[..., None])[..., 0]
        actual["argmax"] = maxima.where(argmax < 4, -1)
        return {"y": y, "pooled": F.max_pool2d(y, 2), "argmax": pooled.where(pooled > 0, -1)}

    return Check(run, exact, {"y": _allowed("y", how), "pooled": _allowed("y", how), "argmax": 0.0})


def _dx(layer: Layer, how: str, device: torch.device) -> Check:
    """Through the mask of the ReLU that x is behind; of a linear map scaled, too."""
    kernels, o = HOWS[how][2], _operands(layer, how, device)
    scale = 2.0 if _is_linear(layer) else 1.0

    def run() -> Results:
        epilogue = Epilogue(scale=scale, relu_output=o.x)
        return {"dx": conv.data_gradient(o.dy, o.weight, layer.size, layer.window, kernels, epilogue, o.packed)}

    def exact(actual: Results) -> Results:
        x, weight, _, dy = o.exact()
        return {"dx": scale * (x > 0) * forms.data_gradient(dy, weight, layer.size, layer.window, "dense")}

    return Check(run, exact, {"dx": _allowed("dx", how)})


def _transposed(layer: Layer, how: str, device: torch.device) -> Check:
    """A layer of its own, with a bias."""
    kernels, o = HOWS[how][2], _operands(layer, how, device)
    bias = torch.randn(4 * layer.q, device=device)

    def run() -> Results:
        epilogue = Epilogue(bias)
        return {"y": conv.data_gradient(o.dy, o.weight, layer.size, layer.window, kernels, epilogue, o.packed)}

    def exact(actual: Results) -> Results:
        _, weight, _, dy = o.exact()
        y = forms.data_gradient(dy, weight, layer.size, layer.window, "dense")
        return {"y": y + bias.double().view(-1, 1, 1)}

    return Check(run, exact, {"y": _allowed("y", how)})


def _dw(layer: Layer, how: str, device: torch.device) -> Check:
    """Of weight and bias; of a linear map scaled, too."""
    kernels, o = HOWS[how][2], _operands(layer, how, device)
    scale = 2.0 if _is_linear(layer) else 1.0

    def run() -> Results:
        dw, db = conv.weight_gradient(
            o.dy,
            o.x,
            layer.kernel,
            layer.window,
            True,
            kernels,
            scale=scale,
            tickets=o.packed.tickets,
            dtype=torch.float32,
        )
        return {"dw": dw, "db": db}

    def exact(actual: Results) -> Results:
        x, _, _, dy = o.exact()
        dw = forms.weight_gradient(dy, x, layer.kernel, layer.window, "dense")
        return {"dw": scale * dw, "db": scale * dy.sum((0, 2, 3))}

    return Check(run, exact, {name: _allowed(name, how, True) for name in ("dw", "db")})


def _features(shape: Sequence[int], precision: str, device: torch.device) -> list[Tensor]:
    """Of two networks, behind a ReLU, the second near the first."""
    a = torch.randn(*shape, device=device).relu()
    b = (a + 0.5 * torch.randn_like(a)).relu()
    return [x.to(PRECISIONS[precision], memory_format=torch.channels_last) for x in (a, b)]


def _loss_allowed(precision: str) -> tuple[float, float]:
    value, gradient = LOSS_TOLERANCES[precision]
    return value, SLACK * gradient * (CUT if INTERPRETED and precision == "bf16" else 1.0)


def _gram(shape: Sequence[int], packed: bool, backward: bool, precision: str, device: torch.device) -> Check:
    """Cosines and loss; or the gradient by the features, added to an incoming one."""
    a, b = _features(shape, precision, device)
    dloss = torch.tensor(DLOSS, device=device)
    frozen, frozen_stats = gram_op.target(b, "channel", False, True, "torch") if packed else (b, None)
    options = (packed, "channel", False)

    def differentiated() -> tuple[Tensor, Tensor, Tensor]:
        exact_a = a.double().requires_grad_()
        cosine = gram_cosine(exact_a, b.double())
        loss = BETA * cosine.square().mean()
        return cosine.detach(), loss.detach(), torch.autograd.grad(DLOSS * loss, exact_a)[0]

    # Of the gradient's size, or it would hide the gradient's errors.
    incoming = (torch.randn(*shape, device=device) * differentiated()[2].std()).to(a.dtype)

    def run() -> Results:
        cosine, loss, stats_a, stats_b, workspace = gram.forward(a, frozen, frozen_stats, *options, BETA, True, False)
        if not backward:
            return {"cosine": cosine, "loss": loss[None]}
        saved = (cosine, a, frozen, stats_a, stats_b, workspace, 0, *options, BETA, True)
        return {"da": gram.gradient(None, dloss, incoming, *saved)}

    def exact(actual: Results) -> Results:
        cosine, loss, da = differentiated()
        return {"da": da + incoming} if backward else {"cosine": cosine, "loss": loss[None]}

    value, gradient = _loss_allowed(precision)
    return Check(run, exact, {"cosine": value, "loss": 2 * value, "da": gradient})


def _folded(shape: Sequence[int], backward: bool, precision: str, device: torch.device) -> Check:
    """The released code's loss, or its gradient by the trained features."""
    a, b = _features(shape, precision, device)
    dloss = torch.tensor(DLOSS, device=device)

    def run() -> Results:
        loss, factors, stats, products = folded.forward(a, b, "each", BETA)
        saved = (factors, stats, products, 0, BETA)
        return {"da": folded.gradient(dloss, a, b, *saved)} if backward else {"loss": loss[None]}

    def exact(actual: Results) -> Results:
        exact_a = a.double().requires_grad_()
        loss = BETA * folded_rowwise(exact_a, b.double())
        return {"da": torch.autograd.grad(DLOSS * loss, exact_a)[0]} if backward else {"loss": loss.detach()[None]}

    value, gradient = _loss_allowed(precision)
    return Check(run, exact, {"loss": value, "da": gradient})


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New tensors hold NaN, or the largest whole number."""
    before = torch.are_deterministic_algorithms_enabled(), POISON.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    POISON.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        POISON.fill_uninitialized_memory = before[1]


def verdict_of(name: str, draw: Callable[[torch.device], Check], device: torch.device, repeats: int) -> str:
    """ "right", or "wrong: " or "failed: " and why, in one line."""
    torch.manual_seed(zlib.crc32(name.encode()))
    try:
        check = draw(device)
        with poisoned():
            first = check.run()
            others = {result: torch.zeros((), dtype=torch.int64, device=device) for result in first}
            for _ in range(repeats - 1):
                for result, value in check.run().items():
                    others[result] += (value != first[result]).any()
        actual = dict(first)
        problems = list(_errors(actual, check.exact(actual), check.allowed))
        if not problems:
            problems = [f"{x} has other bits in {n} of {repeats - 1} repeats" for x, n in others.items() if n]
    except Exception as error:  # whatever a compiler, a driver or PyTorch raises
        why = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return f"failed: {type(error).__name__}: {why}"
    return f"wrong: {'; '.join(problems)}" if problems else RIGHT


def _errors(actual: Results, exact: Results, allowed: dict[str, float]) -> Iterator[str]:
    for name, right in exact.items():
        value = actual[name].double()
        if value.shape != right.shape:
            yield f"{name} has shape {tuple(value.shape)} instead of {tuple(right.shape)}"
        elif unwritten := int((~value.isfinite()).sum()):
            yield f"{unwritten} of {value.numel()} values of {name} are not finite, or were not written"
        elif allowed[name] == 0:
            if others := int((value != right).sum()):
                yield f"{others} of {value.numel()} values of {name} are others"
        else:
            error, rms = value - right, right.square().mean().sqrt()
            frobenius = (error.norm() / right.norm()).item()
            largest = (error.abs() / (rms + right.abs())).max().item() / LARGEST_ERROR
            worst = max(frobenius, largest)
            if not worst <= allowed[name]:
                yield f"{name} has an error of {worst:.1e}, and {allowed[name]:.1e} is allowed"


def run(say: Callable[[str], None], only: Callable[[str], bool] = lambda name: True) -> dict[str, str]:
    """The verdict on each kernel, on the present GPU, or in Triton's interpreter.

    Args:
        say: takes a line for each, as soon as it is found.
        only: says which of the names to check.
    """
    tiny = INTERPRETED or not torch.cuda.is_available()
    device = torch.device("cpu") if tiny else torch.device("cuda", torch.cuda.current_device())
    repeats = INTERPRETED_REPEATS if tiny else REPEATS
    every = checks(tiny)
    names = [name for name in every if only(name)]
    verdicts: dict[str, str] = {}

    def found(name: str, verdict: str) -> None:
        verdicts[name] = verdict
        kind, _, why = verdict.partition(": ")
        say(f"{kind:6} {name}{': ' if why else ''}{why}")

    left = names if tiny else list(_shared_out(names, device, repeats, found))
    for name in left:
        found(name, verdict_of(name, every[name], device, repeats))
    return {name: verdicts[name] for name in names}


class _Worker:
    """A process that checks one kernel after the other."""

    def __init__(self, context: Any, device: torch.device, repeats: int) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, str(device), repeats), daemon=True)
        self.process.start()
        theirs.close()
        self.name: str | None = None  # of what it is at; None until it is ready
        self.until = time.monotonic() + START_SECONDS

    def give(self, name: str) -> None:
        self.name, self.until = name, time.monotonic() + KERNEL_SECONDS
        with contextlib.suppress(OSError):  # it has died: what it is at fails
            self.pipe.send(name)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _shared_out(
    names: Sequence[str], device: torch.device, repeats: int, found: Callable[[str, str], None]
) -> Iterator[str]:
    """Has processes check these kernels; gives back those for which there was none."""
    # A server that has imported all, and has asked no device anything, is forked for each process.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    waiting = list(reversed(names))
    most = min(MOST_PROCESSES, len(os.sched_getaffinity(0)), len(names))
    workers = [_Worker(context, device, repeats) for _ in range(most)]
    try:
        while workers:
            ready = wait([worker.pipe for worker in workers], timeout=1.0)
            for worker in list(workers):
                if worker.pipe in ready:
                    try:
                        answer: tuple[str, bool] = worker.pipe.recv()
                    except (EOFError, OSError):
                        worker.process.join()
                        answer = f"failed: its process ended with code {worker.process.exitcode}", False
                elif time.monotonic() > worker.until:
                    answer = f"failed: no result after {KERNEL_SECONDS:.0f} s", False
                else:
                    continue
                verdict, goes_on = answer
                if worker.name is not None:
                    found(worker.name, verdict)
                if goes_on and waiting:
                    worker.give(waiting.pop())
                    continue
                workers.remove(worker)
                worker.end()
                # Of one that broke at a kernel another takes the place; one that never began would fail again.
                if not goes_on and worker.name is not None and waiting:
                    workers.append(_Worker(context, device, repeats))
    finally:
        for worker in workers:
            worker.end()
    yield from reversed(waiting)


def _work(pipe: Connection, device: str, repeats: int) -> None:
    """Answers each name with its verdict, and whether this process can go on; first of all that it has begun."""
    place = torch.device(device)
    torch.set_num_threads(1)
    torch.zeros(1, device=place)
    every = checks(tiny=False)
    pipe.send(("", True))
    with contextlib.suppress(EOFError, KeyboardInterrupt):  # who asks has gone
        while True:
            name = pipe.recv()
            verdict = verdict_of(name, every[name], place, repeats)
            pipe.send((verdict, _is_sound(place)))


def _is_sound(device: torch.device) -> bool:
    """Whether the device still computes: after an illegal address nothing does in this process."""
    try:
        return bool((torch.ones(1, device=device) == 1).item())
    except RuntimeError:
        return False


def summary(verdicts: dict[str, str], seconds: float) -> str:
    """One line."""
    bad = [name for name, verdict in verdicts.items() if verdict != RIGHT]
    count = f"{len(verdicts) - len(bad)} of {len(verdicts)} kernels are right, checked in {seconds:.0f} s"
    return f"{count}; not {', not '.join(bad)}" if bad else count


def write(path: Path, environment: dict[str, str], verdicts: dict[str, str]) -> None:
    """The outcome as JSON, whole or not at all."""
    draft = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        draft.write_text(json.dumps({"environment": environment, "kernels": verdicts}, indent=2) + "\n")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
