"""Whether the kernels are right on this GPU, with its driver and this Triton: `python -m qkernels.runtime --check`.

Every form, type and direction on small shapes, compared with float64, and repeated, which must give the same bits. New
memory is filled with NaN, so that elements that a kernel does not write are found. On a GPU several processes share the
checks: most of the time is compilation, and a kernel that breaks its process ends no other check.

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
TYPES = ("bf16", "fp16", "float32")  # of features and gradients, for which tf32 is float32
# The products of each check's name: the precision, and the algorithm as the launch functions take it.
PRODUCTS = {
    "bf16": ("bf16", "signed-half"),
    "fp16": ("fp16", "signed-half"),
    "tf32": ("tf32", "signed-tf32"),
    "float32": ("float32", "signed-ieee"),
    "float32 q8": ("float32", "q8-ieee"),
}
REPEATS, INTERPRETED_REPEATS = 20, 2
# The tolerances are for whole layers; sums of few terms vary more (as in the tests of layers with one channel).
SLACK = 1.5
# Triton's interpreter truncates float32 to bfloat16 where hardware rounds it, which doubles the error.
TRUNCATION = 2.0
DROPOUT = 0.5
BETA = 0.7
DLOSS = 1e3  # brings gradients of float16 out of its subnormal numbers
MOST_PROCESSES = 16
# Limits for a check with its compilation, and for the start of a process; beyond them it counts as hung.
KERNEL_SECONDS, START_SECONDS = 60.0, 120.0
RIGHT = "right"

Results = dict[str, Tensor]


class Check(NamedTuple):
    """Some results of kernels.

    Attributes:
        run: computes them.
        exact: computes the right results from those of `run`, some of which it may replace by what is compared instead.
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
        splits: number of programs that share a sum; 0: as planned.
    """

    batch: int
    q: int
    p: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    window: tuple[int, ...] = (1, 1, 1, 1, 1, 1, 1)
    splits: int = 0

    @property
    def is_linear(self) -> bool:
        return self.size == (1, 1)

    @property
    def y_size(self) -> tuple[int, int]:
        return conv.Window.of(self.size, self.kernel, self.window).y_size

    @property
    def pixels(self) -> int:
        return self.batch * math.prod(self.y_size)


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
# Samples, channels, spatial sizes; "triangles" compares with a `gram_target`.
FEATURES = {"stored": (3, 100, 14, 9), "triangles": (3, 64, 14, 9), "direct": (2, 160, 14, 12), "dual": (3, 160, 6, 5)}
TINY_FEATURES = {"stored": (2, 18, 5, 4), "triangles": (2, 9, 5, 3), "direct": (1, 130, 12, 11), "dual": (2, 35, 3, 5)}
FOLDED_FEATURES, TINY_FOLDED_FEATURES = (2, 140, 8, 7), (2, 20, 3, 4)


def checks(tiny: bool) -> dict[str, Callable[[torch.device], Check]]:
    """The checks by name, as functions that draw the operands; a name begins with the operators that use the kernel."""
    by_name: dict[str, Callable[[torch.device], Check]] = {}
    layers = TINY if tiny else LAYERS
    for products in PRODUCTS:
        by_name[f"conv, linear pack {products}"] = functools.partial(_pack, layers["deep"], layers["odd"], products)
    for dtype in TYPES:
        draw: Callable[..., Check] = functools.partial(_epilogue_gradient, layers["first"], dtype)
        by_name[f"conv, linear epilogue's gradient {dtype}"] = draw
    for (name, layer), products in itertools.product(layers.items(), PRODUCTS):
        if name in FEW_CHANNELS and "q8" in products:
            continue
        for direction in DIRECTIONS[name]:
            shown = f"linear {direction} {products}" if layer.is_linear else f"conv {direction}, {name}, {products}"
            by_name[shown] = functools.partial(_layer, layer, direction, products)
    losses = [
        (f"gram {{}}, {mode}", functools.partial(_gram, shape, mode == "triangles"))
        for mode, shape in (TINY_FEATURES if tiny else FEATURES).items()
    ]
    losses.append(("folded-rowwise {}", functools.partial(_folded, TINY_FOLDED_FEATURES if tiny else FOLDED_FEATURES)))
    for (name, draw), dtype, direction in itertools.product(losses, TYPES, ("forward", "backward")):
        by_name[f"{name.format(direction)}, {dtype}"] = functools.partial(draw, direction == "backward", dtype)
    return by_name


class Operands(NamedTuple):
    """Operands of a layer: maps of the products' type and parameters in float32, as in training under autocast."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor
    packed: conv.Packed
    algorithm: str

    def exact(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In float64."""
        return self.x.double(), self.weight.double(), self.bias.double(), self.dy.double()


def _layer(layer: Layer, direction: str, products: str, device: torch.device) -> Check:
    draw = {"forward": _forward, "pool": _pool, "dx": _dx, "dw": _dw, "transposed": _transposed}[direction]
    precision, algorithm = PRODUCTS[products]
    dtype = PRECISIONS[precision]
    fan_in = 4 * layer.q // layer.window[6] * math.prod(layer.kernel)
    x = _map((layer.batch, 4 * layer.q, *layer.size), dtype, device)
    dy = _map((layer.batch, 4 * layer.p, *layer.y_size), dtype, device, layer.pixels**-0.25)
    weight = _weight(layer, device) / math.sqrt(fan_in)
    weight = weight.to(dtype).float()  # packing, which rounds, has a check of its own
    # Packed once for all repeats, so that counters must be left as zeros.
    packed = conv.Packed(*conv.pack([weight], [algorithm], dtype))
    operands = Operands(x, weight, torch.randn(4 * layer.p, device=device), dy, packed, algorithm)
    check = draw(layer, operands, functools.partial(_allowed, precision))

    def run() -> Results:
        with _splits(layer, direction, algorithm, device):
            return check.run()

    return check._replace(run=run)


@contextlib.contextmanager
def _splits(layer: Layer, direction: str, algorithm: str, device: torch.device) -> Iterator[None]:
    """Plans the layer with the number of splits that it says, if any."""
    if not layer.splits:
        yield
        return
    place = torch.empty(0, device=device)
    n, k = (layer.q, layer.p) if direction == "dx" else (layer.p, layer.q)
    epilogue = direction == "pool" or (direction == "forward" and layer.is_linear)
    kernel, positions = "dw" if direction == "dw" else "gather", math.prod(layer.kernel)
    problem = Problem(kernel, layer.pixels, n, k, positions, epilogue=epilogue)
    form, precision = algorithm.split("-")
    plan = config.plan(problem, form, precision, arch_of(place), multiprocessors_of(place))
    with config.force(replace(plan, splits=layer.splits)):
        yield


def _map(shape: Sequence[int], dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, device=device)).to(dtype, memory_format=torch.channels_last)


def _weight(layer: Layer, device: torch.device) -> Tensor:
    return torch.randn(4, layer.p, layer.q // layer.window[6], *layer.kernel, device=device)


def _allowed(precision: str, result: str, widened: bool = False) -> float:
    half = precision in ("bf16", "fp16")
    truncation = TRUNCATION if INTERPRETED and precision == "bf16" and not widened else 1.0
    return SLACK * truncation * tolerance(result, precision, widened and half)


def _pack(first: Layer, second: Layer, products: str, device: torch.device) -> Check:
    """Two weights in one launch, with counters."""
    precision, algorithm = PRODUCTS[products]
    dtype, weights = PRECISIONS[precision], [_weight(layer, device) for layer in (first, second)]

    def run() -> Results:
        tiles, tickets = conv.pack(weights, [algorithm] * 2, dtype)
        return {"tiles": tiles, "tickets": tickets}

    def exact(actual: Results) -> Results:
        tiles = torch.cat([forms.pack(weight, algorithm, dtype) for weight in weights])
        return {"tiles": tiles.double(), "tickets": torch.zeros(2 * config.MOST_TICKETS, device=device).double()}

    # Values that are only copied and rounded are equal, except where the interpreter truncates.
    truncated = INTERPRETED and precision == "bf16"
    allowed = _allowed(precision, "y") if truncated or algorithm.startswith("q8") else 0.0
    return Check(run, exact, {"tiles": allowed, "tickets": 0.0})


def _epilogue_gradient(layer: Layer, precision: str, device: torch.device) -> Check:
    """Behind a ReLU, a pool and a returned map."""
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

    return Check(run, exact, {"dy": _allowed(precision, "dx")})


def _forward(layer: Layer, o: Operands, allowed: Callable[..., float]) -> Check:
    """Bias and ReLU; for a linear map dropout, too."""
    seed = torch.randint(2**62, (1,), device=o.x.device) if layer.is_linear else None
    epilogue = Epilogue(o.bias, True, seed, 1 / (1 - DROPOUT) if layer.is_linear else 1.0)

    def run() -> Results:
        return {"y": conv.forward(o.x, o.weight, layer.window, o.algorithm, epilogue, o.packed)}

    def exact(actual: Results) -> Results:
        x, weight, bias, _ = o.exact()
        y = forms.forward(x, weight, bias, layer.window, "dense").relu() * epilogue.scale
        if not layer.is_linear:
            return {"y": y}
        # Which elements are zeroed is random; their share is about one half.
        actual["share"] = ((actual["y"] > 0).sum() / (y > 0).sum())[None]
        return {"y": y * (actual["y"] > 0), "share": torch.full_like(actual["share"], 1 - DROPOUT).double()}

    return Check(run, exact, {"y": allowed("y"), "share": 0.5})


def _pool(layer: Layer, o: Operands, allowed: Callable[..., float]) -> Check:
    """Bias, ReLU, pool, and the map in front of it."""

    def run() -> Results:
        epilogue = Epilogue(o.bias, True)
        pooled, argmax, y = conv.forward_pool(o.x, o.weight, layer.window, o.algorithm, epilogue, o.packed, True)
        return {"y": y, "pooled": pooled, "argmax": argmax}

    def exact(actual: Results) -> Results:
        x, weight, bias, _ = o.exact()
        y = forms.forward(x, weight, bias, layer.window, "dense").relu()
        # The value at the argmax in the kernel's own map must be the maximum; 4 stands for nothing above 0.
        pooled, argmax = actual["pooled"].double(), actual["argmax"]
        height, width = (2 * length for length in pooled.shape[2:])
        windows = actual["y"].double()[..., :height, :width].unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        windows = windows.transpose(3, 4).flatten(4, 5)
        maxima = windows.gather(-1, argmax.clamp_max(3).long()[..., None])[..., 0]
        actual["argmax"] = maxima.where(argmax < 4, -1)
        return {"y": y, "pooled": F.max_pool2d(y, 2), "argmax": pooled.where(pooled > 0, -1)}

    return Check(run, exact, {"y": allowed("y"), "pooled": allowed("y"), "argmax": 0.0})


def _dx(layer: Layer, o: Operands, allowed: Callable[..., float]) -> Check:
    """Through the mask of the ReLU in front of x; for a linear map scaled, too."""
    epilogue = Epilogue(scale=2.0 if layer.is_linear else 1.0, relu_output=o.x)

    def run() -> Results:
        return {"dx": conv.data_gradient(o.dy, o.weight, layer.size, layer.window, o.algorithm, epilogue, o.packed)}

    def exact(actual: Results) -> Results:
        x, weight, _, dy = o.exact()
        return {"dx": epilogue.scale * (x > 0) * forms.data_gradient(dy, weight, layer.size, layer.window, "dense")}

    return Check(run, exact, {"dx": allowed("dx")})


def _transposed(layer: Layer, o: Operands, allowed: Callable[..., float]) -> Check:
    """The transposed convolution as a layer, with a bias."""
    bias = torch.randn(4 * layer.q, device=o.x.device)

    def run() -> Results:
        epilogue = Epilogue(bias)
        return {"y": conv.data_gradient(o.dy, o.weight, layer.size, layer.window, o.algorithm, epilogue, o.packed)}

    def exact(actual: Results) -> Results:
        _, weight, _, dy = o.exact()
        y = forms.data_gradient(dy, weight, layer.size, layer.window, "dense")
        return {"y": y + bias.double().view(-1, 1, 1)}

    return Check(run, exact, {"y": allowed("y")})


def _dw(layer: Layer, o: Operands, allowed: Callable[..., float]) -> Check:
    """By weight and bias; for a linear map scaled, too."""
    scale = 2.0 if layer.is_linear else 1.0

    def run() -> Results:
        options: dict[str, Any] = {"scale": scale, "tickets": o.packed.tickets, "dtype": torch.float32}
        dw, db = conv.weight_gradient(o.dy, o.x, layer.kernel, layer.window, True, o.algorithm, **options)
        return {"dw": dw, "db": db}

    def exact(actual: Results) -> Results:
        x, _, _, dy = o.exact()
        dw = forms.weight_gradient(dy, x, layer.kernel, layer.window, "dense")
        return {"dw": scale * dw, "db": scale * dy.sum((0, 2, 3))}

    return Check(run, exact, {"dw": allowed("dw", True), "db": allowed("db", True)})


def _features(shape: Sequence[int], precision: str, device: torch.device) -> list[Tensor]:
    """Features of two networks after a ReLU, the second close to the first."""
    a = torch.randn(*shape, device=device).relu()
    b = (a + 0.5 * torch.randn_like(a)).relu()
    return [x.to(PRECISIONS[precision], memory_format=torch.channels_last) for x in (a, b)]


def _loss_allowed(precision: str) -> dict[str, float]:
    value, gradient = LOSS_TOLERANCES[precision]
    truncation = TRUNCATION if INTERPRETED and precision == "bf16" else 1.0
    return {"loss": value, "da": SLACK * gradient * truncation}


def _gram(shape: Sequence[int], triangles: bool, backward: bool, precision: str, device: torch.device) -> Check:
    """Cosines and loss; or the gradient by the features, added to an incoming one."""
    a, b = _features(shape, precision, device)
    dloss = torch.tensor(DLOSS, device=device)
    frozen, frozen_stats = gram_op.target(b, "channel", False, True, "torch") if triangles else (b, None)
    options = (triangles, "channel", False)

    def differentiated() -> tuple[Tensor, Tensor, Tensor]:
        exact_a = a.double().requires_grad_()
        cosine = gram_cosine(exact_a, b.double())
        loss = BETA * cosine.square().mean()
        return cosine.detach(), loss.detach(), torch.autograd.grad(DLOSS * loss, exact_a)[0]

    # As large as the gradient, whose errors it would hide otherwise.
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

    allowed = _loss_allowed(precision)
    return Check(run, exact, {"cosine": allowed["loss"], "loss": 2 * allowed["loss"], "da": allowed["da"]})


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

    return Check(run, exact, _loss_allowed(precision))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New tensors are filled with NaN, or the largest integer."""
    fill: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), fill.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    fill.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        fill.fill_uninitialized_memory = before[1]


def verdict_of(name: str, draw: Callable[[torch.device], Check], device: torch.device, repeats: int) -> str:
    """ "right", or "wrong: " or "failed: " and the reason, in one line."""
    torch.manual_seed(zlib.crc32(name.encode()))
    try:
        check = draw(device)
        with poisoned():
            first = check.run()
            unequal = {result: torch.zeros((), dtype=torch.int64, device=device) for result in first}
            for _ in range(repeats - 1):
                for result, value in check.run().items():
                    unequal[result] += (value != first[result]).any()
        actual = dict(first)
        problems = list(_errors(actual, check.exact(actual), check.allowed))
        if not problems:
            problems = [f"{x} has other bits in {n} of {repeats - 1} repeats" for x, n in unequal.items() if n]
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
            if wrong := int((value != right).sum()):
                yield f"{wrong} of {value.numel()} values of {name} are wrong"
        else:
            error, rms = value - right, right.square().mean().sqrt()
            frobenius = (error.norm() / right.norm()).item()
            largest = (error.abs() / (rms + right.abs())).max().item() / LARGEST_ERROR
            worst = max(frobenius, largest)
            if not worst <= allowed[name]:
                yield f"{name} has an error of {worst:.1e}, and {allowed[name]:.1e} is allowed"


def run(log: Callable[[str], None], select: Callable[[str], bool] = lambda name: True) -> dict[str, str]:
    """The verdict on each kernel, on the present GPU, or in Triton's interpreter.

    Args:
        log: called with a line for each verdict as soon as there is one.
        select: whether a check, given its name, is run.
    """
    tiny = INTERPRETED or not torch.cuda.is_available()
    device = torch.device("cpu") if tiny else torch.device("cuda", torch.cuda.current_device())
    repeats = INTERPRETED_REPEATS if tiny else REPEATS
    by_name = checks(tiny)
    names = [name for name in by_name if select(name)]
    verdicts: dict[str, str] = {}

    def record(name: str, verdict: str) -> None:
        verdicts[name] = verdict
        outcome, _, why = verdict.partition(": ")
        log(f"{outcome:6} {name}{': ' if why else ''}{why}")

    unchecked = names if tiny else _check_in_processes(names, device, repeats, record)
    for name in unchecked:
        record(name, verdict_of(name, by_name[name], device, repeats))
    return {name: verdicts[name] for name in names}


class _Worker:
    """A process that checks one kernel after the other."""

    def __init__(self, context: Any, device: torch.device, repeats: int) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, str(device), repeats), daemon=True)
        self.process.start()
        theirs.close()
        self.name: str | None = None  # of the check that it runs; None until it is ready
        self.deadline = time.monotonic() + START_SECONDS

    def start(self, name: str) -> None:
        self.name, self.deadline = name, time.monotonic() + KERNEL_SECONDS
        with contextlib.suppress(OSError):  # it has died, so that this check fails
            self.pipe.send(name)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _check_in_processes(
    names: Sequence[str], device: torch.device, repeats: int, record: Callable[[str, str], None]
) -> list[str]:
    """Runs these checks in several processes; returns those for which no process could be started."""
    # The server, which has imported everything and has not touched a device, is forked for each process.
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
                elif time.monotonic() > worker.deadline:
                    answer = f"failed: no result after {KERNEL_SECONDS:.0f} s", False
                else:
                    continue
                verdict, usable = answer
                if worker.name is not None:
                    record(worker.name, verdict)
                if usable and waiting:
                    worker.start(waiting.pop())
                    continue
                workers.remove(worker)
                worker.end()
                # A process that a kernel broke is replaced; one that never became ready would fail again.
                if not usable and worker.name is not None and waiting:
                    workers.append(_Worker(context, device, repeats))
    finally:
        for worker in workers:
            worker.end()
    return waiting[::-1]


def _work(pipe: Connection, device: str, repeats: int) -> None:
    """Says that it is ready; then answers each name with its verdict, and whether this process is still usable."""
    place = torch.device(device)
    torch.set_num_threads(1)
    torch.zeros(1, device=place)
    by_name = checks(tiny=False)
    pipe.send(("", True))
    with contextlib.suppress(EOFError, KeyboardInterrupt):  # the parent has ended
        while True:
            name = pipe.recv()
            verdict = verdict_of(name, by_name[name], place, repeats)
            pipe.send((verdict, _is_sound(place)))


def _is_sound(device: torch.device) -> bool:
    """Whether the device still computes: after an illegal address nothing does in this process."""
    try:
        return bool((torch.ones(1, device=device) == 1).item())
    except RuntimeError:
        return False


def summary(verdicts: dict[str, str], seconds: float) -> str:
    """The outcome in one line."""
    wrong = [name for name, verdict in verdicts.items() if verdict != RIGHT]
    count = f"{len(verdicts) - len(wrong)} of {len(verdicts)} kernels are right, checked in {seconds:.0f} s"
    return f"{count}; not {', not '.join(wrong)}" if wrong else count


def write(path: Path, environment: dict[str, str], verdicts: dict[str, str]) -> None:
    """Writes the outcome as JSON, whole or not at all."""
    draft = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        draft.write_text(json.dumps({"environment": environment, "kernels": verdicts}, indent=2) + "\n")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
