"""The problems of the GPU tests: shapes, operands, results of the kernels and exact ones, tolerances.

Operands are new in every run; `QKERNELS_SEED=n` repeats those of the run whose test names say n.
"""

import contextlib
import math
import os
import random
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bench.layers import LAYERS, Layer
from qkernels.ops.hamilton_conv import forms
from qkernels.ops.hamilton_conv.reference import conv_output_size, transposed_output_size
from qkernels.ops.hamilton_linear import forms as linear_forms
from qkernels.runtime.tolerances import LARGEST_ERROR

pytest.importorskip("triton")

from qkernels.ops.hamilton_conv import launch

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "float32": torch.float32}
# The algorithms of the kernels for each of them.
ALGORITHMS = {
    "bf16": ("signed-half",),
    "fp16": ("signed-half",),
    "tf32": ("signed-tf32",),
    "float32": ("signed-ieee", "q8-ieee"),
}
DISTRIBUTIONS = ("gaussian", "relu", "correlated", "heavy")
# Processes of one xdist run must agree on the names of the tests.
SEED = int(os.environ.get("QKERNELS_SEED") or random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID")).randrange(10**6))


# Random shapes have sums of few terms, and maps that are mostly 0 behind a stride, whose RMS is small: over 365 of them
# operands rounded to tf32 without fault reach 1.1 times the Frobenius figure and 2.4 times the largest error.
RANDOM_SLACK = 2.5


class Operands(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor


@dataclass(frozen=True)
class Problem:
    """One layer: `kind` "conv", "transposed" (`q` and `p` as of its input and output) or "linear".

    `slack` multiplies the tolerances.
    """

    name: str
    kind: str
    batch: int
    q: int
    p: int
    size: tuple[int, int] = (1, 1)
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    output_padding: tuple[int, int] = (0, 0)
    slack: float = 1.0

    @property
    def window(self) -> tuple[int, ...]:
        return (*self.stride, *self.padding, *self.dilation, self.groups)

    @property
    def y_size(self) -> tuple[int, int]:
        geometry = self.size, self.kernel, self.stride, self.padding, self.dilation
        if self.kind == "transposed":
            return transposed_output_size(*geometry, self.output_padding)
        return conv_output_size(*geometry)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        q, p = self.q, self.p
        if self.kind == "linear":
            return (self.batch, 4 * q), (4, p, q), (4 * p,), (self.batch, 4 * p)
        weight = (q, p // self.groups) if self.kind == "transposed" else (p, q // self.groups)
        return (self.batch, 4 * q, *self.size), (4, *weight, *self.kernel), (4 * p,), (self.batch, 4 * p, *self.y_size)

    def operands(self, dtype: torch.dtype, distribution: str, seed: int, device: torch.device) -> Operands:
        """Maps of about unit size, a weight that keeps it, and a dy that keeps the sums over pixels within float16."""
        generator = torch.Generator(device).manual_seed(seed)
        x, weight, bias, dy = self.shapes
        fan_in = 4 * self.q // self.groups * math.prod(self.kernel)
        pixels = self.batch * math.prod(self.y_size)
        # If dy were correlated too, dW would be sums of one number under different signs, and nothing average out:
        # operands rounded to tf32 without fault reach 1.1 times its figure on layers of the VGG16, and 1.6 on others.
        dy_distribution = "gaussian" if distribution == "correlated" else distribution
        drawn = (
            draw(x, distribution, generator),
            draw(weight, "gaussian", generator) / math.sqrt(fan_in),
            draw(bias, "gaussian", generator),
            draw(dy, dy_distribution, generator) / pixels**0.25,
        )
        # Maps are NHWC, as layers hand them on.
        return Operands(*(nhwc(tensor.to(dtype)) for tensor in drawn))

    def meta(self, dtype: torch.dtype) -> Operands:
        return Operands(*(nhwc(torch.empty(shape, dtype=dtype, device="meta")) for shape in self.shapes))


def draw(shape: tuple[int, ...], distribution: str, generator: torch.Generator) -> Tensor:
    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    x = normal(shape)
    if distribution == "relu":
        return x.relu()
    if distribution == "correlated":  # over channels, by 0.9
        return math.sqrt(0.1) * x + math.sqrt(0.9) * normal((shape[0], 1, *shape[2:]))
    if distribution == "heavy":  # Student t, 3 degrees of freedom
        first, second, third = (normal(shape).square() for _ in range(3))
        return x / ((first + second + third) / 3).sqrt()
    return x


def nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def as_convolution(operands: Operands) -> Operands:
    """Those of a linear map as the kernels take them: maps of one pixel."""
    x, weight, bias, dy = operands
    return Operands(nhwc(x[..., None, None]), weight[..., None, None], bias, nhwc(dy[..., None, None]))


def kernel_results(
    problem: Problem, operands: Operands, algorithm: str, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """y, dx, dw and, where a kernel sums it, db of the kernels, all of `dtype`."""
    x, weight, bias, dy = as_convolution(operands) if problem.kind == "linear" else operands
    window, kernel, epilogue = problem.window, problem.kernel, launch.Epilogue(bias)
    dtype = dtype or x.dtype
    if problem.kind == "transposed":
        y = launch.data_gradient(x, weight, problem.y_size, window, algorithm, epilogue, dtype=dtype)
        dx = launch.forward(dy, weight, window, algorithm, dtype=dtype)
        dw, _ = launch.weight_gradient(x, dy, kernel, window, False, algorithm, dtype=dtype)
        return {"y": y, "dx": dx, "dw": dw}
    y = launch.forward(x, weight, window, algorithm, epilogue, dtype=dtype)
    dx = launch.data_gradient(dy, weight, problem.size, window, algorithm, dtype=dtype)
    dw, db = launch.weight_gradient(dy, x, kernel, window, True, algorithm, dtype=dtype)
    if problem.kind == "linear":
        y, dx, dw = y.flatten(1), dx.flatten(1), dw.flatten(2)
    return {"y": y, "dx": dx, "dw": dw, "db": db}


def exact_results(problem: Problem, operands: Operands) -> dict[str, Tensor]:
    """The same in float64, by PyTorch's own products with the expanded weight."""
    x, weight, bias, dy = (tensor.double() for tensor in operands)
    if problem.kind == "linear":
        return {
            "y": linear_forms.forward(x, weight, bias, "dense"),
            "dx": linear_forms.data_gradient(dy, weight, "dense"),
            "dw": linear_forms.weight_gradient(dy, x, "dense"),
            "db": dy.sum(0),
        }
    window = problem.window
    if problem.kind == "transposed":
        y = forms.data_gradient(x, weight, problem.y_size, window, "dense")
        return {
            "y": y + bias.view(-1, 1, 1),
            "dx": forms.forward(dy, weight, None, window, "dense"),
            "dw": forms.weight_gradient(x, dy, problem.kernel, window, "dense"),
        }
    return {"y": forms.forward(x, weight, bias, window, "dense"), **exact_gradients(problem, operands, dy)}


def exact_gradients(problem: Problem, operands: Operands, dy: Tensor) -> dict[str, Tensor]:
    """dx, dw and db of a convolution behind which the gradient is `dy`, in float64."""
    x, weight, dy = operands.x.double(), operands.weight.double(), dy.double()
    return {
        "dx": forms.data_gradient(dy, weight, problem.size, problem.window, "dense"),
        "dw": forms.weight_gradient(dy, x, problem.kernel, problem.window, "dense"),
        "db": dy.sum((0, 2, 3)),
    }


def violations(actual: Tensor, exact: Tensor, allowed: float) -> list[str]:
    """What is wrong with `actual`: not finite, or further from `exact` than allowed."""
    if actual.shape != exact.shape:
        return [f"shape {tuple(actual.shape)} instead of {tuple(exact.shape)}"]
    if not actual.isfinite().all():
        return [f"{(~actual.isfinite()).sum()} of {actual.numel()} values are not finite"]
    error = actual.double() - exact
    frobenius = (error.norm() / exact.norm()).item()
    rms = exact.square().mean().sqrt()
    largest = (error.abs() / (rms + exact.abs())).max().item()
    found = []
    if not frobenius <= allowed:
        found.append(f"relative error {frobenius:.2e} > {allowed:.1e}")
    if not largest <= LARGEST_ERROR * allowed:
        found.append(f"largest error {largest:.2e} > {LARGEST_ERROR} * {allowed:.1e}")
    return found


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New tensors hold NaN, or 255: what a kernel does not write shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def seed_of(*names: object) -> int:
    return SEED + zlib.crc32("/".join(map(str, names)).encode()) % 10**6


def _layer(layer: Layer, batch: int, size: tuple[int, int], name: str) -> Problem:
    if layer.kernel == 0:
        return Problem(name, "linear", 20, layer.channels_in // 4, layer.channels_out // 4)
    return Problem(name, "conv", batch, layer.channels_in // 4, layer.channels_out // 4, size, (3, 3), padding=(1, 1))


def random_problem(seed: int) -> Problem:
    """1 to 40 quaternion channels a group, kernels of 1 to 11 pixels, any strides, padding, dilation and groups."""
    generator = random.Random(seed)
    groups = generator.choice((1, 1, 2, 3))
    q, p = (groups * generator.choice((1, 2, 3, 5, 8, 16, 17, 31, 40)) for _ in range(2))
    axes = []
    for _ in range(2):
        kernel, stride = generator.choice((1, 2, 3, 3, 4, 5, 7, 11)), generator.choice((1, 1, 2, 3))
        padding, dilation = generator.randint(0, kernel), generator.choice((1, 1, 2, 3))
        size = max(1, dilation * (kernel - 1) + 1 - 2 * padding) + generator.randint(0, 20)
        axes.append((size, kernel, stride, padding, dilation))
    batch = generator.randint(2, 5)
    sizes, kernels, strides, paddings, dilations = zip(*axes, strict=True)
    geometry = sizes, kernels, strides, paddings, dilations
    return Problem(f"random {seed}", "conv", batch, q, p, *geometry, groups, slack=RANDOM_SLACK)


# Layers of the quaternion VGG16 at full width, those of equal shape once; and on the maps of the real one, 8 and 2
# times as large, where the first layer has 4 channels instead of 1.
VGG16 = [_layer(layer, 4, (layer.side, layer.side), layer.name) for layer in LAYERS[:11]]
# The first linear layer, as it reads maps: without their copy as rows.
VGG16.append(Problem("linear 1 of maps", "conv", 20, 128, 1024, (2, 2), (2, 2)))
REAL_MAPS = [_layer(layer, 1, (8 * layer.side, 2 * layer.side), f"{layer.name} on real maps") for layer in LAYERS[:9]]
# One quaternion channel: 36 weights, over which roundings hardly average out.
RHEMO = [
    Problem(f"decoder {n}", "transposed", 4, 1, 1, size, (3, 3), stride, (1, 1), output_padding=extra, slack=1.5)
    for n, size, stride, extra in [
        (1, (64, 64), (2, 1), (1, 0)),
        (2, (128, 64), (2, 1), (1, 0)),
        (3, (256, 64), (2, 2), (1, 1)),
    ]
]
RANDOM = [random_problem(SEED + n) for n in range(30)]
