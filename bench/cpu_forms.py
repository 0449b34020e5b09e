"""Which plain-PyTorch form is faster on a CPU: the expanded weight ("dense") or 8 thin products ("q8").

`python -m bench.cpu_forms` times forward + backward of every layer shape of the quaternion VGG16 (WASPAA 2023) at
batch 20 in float32, at full width and at 1/8, with 1 and 2 threads, and writes bench/results/cpu_forms.csv, on which
`cpu_form` of qkernels/ops/hamilton_conv/config.py rests.
"""

import csv
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import qkernels
from qkernels.runtime.__main__ import cpu_name

RESULTS = Path(__file__).parent / "results" / "cpu_forms.csv"
BATCH = 20
REPEATS = 7
FORMS = ("dense", "q8")
# Relative Frobenius error between the forms; the weight gradient of conv 1 sums 82k products.
TOLERANCE = 1e-5


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


def operands(layer: Layer) -> tuple[Callable[..., Tensor], Tensor, Tensor]:
    """The layer's function of (x, weight, bias), and random x and weight."""
    p, q, kernel = layer.channels_out // 4, layer.channels_in // 4, layer.kernel
    if kernel == 0:
        return qkernels.hamilton_linear, torch.randn(BATCH, 4 * q), torch.randn(4, p, q)
    function = functools.partial(qkernels.hamilton_conv2d, padding=kernel // 2)
    return function, torch.randn(BATCH, 4 * q, layer.side, layer.side), torch.randn(4, p, q, kernel, kernel)


def step(
    function: Callable[..., Tensor], arguments: tuple[Tensor, ...], dy: Tensor, form: str, activation: str | None
) -> list[Tensor]:
    """Output and all gradients."""
    with qkernels.set_form(form):
        y = function(*arguments, activation=activation)
    return [y.detach(), *torch.autograd.grad(y, arguments, dy)]


def measure(function: Callable[..., Tensor], x: Tensor, weight: Tensor) -> dict[str, float]:
    """Median milliseconds of forward + backward per form, the forms taking turns."""
    arguments = tuple(t.requires_grad_() for t in (x, weight, torch.zeros(4 * weight.shape[1])))
    dy = torch.randn_like(function(*arguments))
    # Compared without the ReLU, whose gradient jumps where the output is 0 to rounding.
    for dense, q8 in zip(*(step(function, arguments, dy, form, None) for form in FORMS), strict=True):
        error = ((dense - q8).norm() / dense.norm()).item()
        if error > TOLERANCE:
            raise SystemExit(f"the forms disagree: relative error {error:.1e}")
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(REPEATS):
        for form in FORMS:
            start = time.perf_counter()
            step(function, arguments, dy, form, "relu")
            times[form].append(1e3 * (time.perf_counter() - start))
    return {form: statistics.median(values) for form, values in times.items()}


def table() -> Iterator[dict[str, str | int]]:
    """One row per layer, width and number of threads."""
    torch.manual_seed(0)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for divisor in (1, 8):
            for full in LAYERS:
                layer = full._replace(
                    channels_in=max(4, full.channels_in // divisor), channels_out=full.channels_out // divisor
                )
                function, x, weight = operands(layer)
                times = measure(function, x, weight)
                yield {
                    "layer": layer.name,
                    "width": f"1/{divisor}",
                    "threads": threads,
                    "channels_in": layer.channels_in,
                    "channels_out": layer.channels_out,
                    "side": layer.side,
                    "batch": BATCH,
                    "dense_ms": f"{times['dense']:.2f}",
                    "q8_ms": f"{times['q8']:.2f}",
                    "dense_over_q8": f"{times['dense'] / times['q8']:.2f}",
                    "auto": qkernels.form_of("hamilton_conv2d" if layer.kernel else "hamilton_linear", x, weight),
                    "load_average": f"{os.getloadavg()[0]:.1f}",  # well above `threads`: other programs were running
                    "cpu": cpu_name(),
                    "torch": torch.__version__,
                }


def main() -> None:
    """Prints the table row by row and writes it."""
    rows = []
    for row in table():
        rows.append(row)
        print(*(f"{value!s:>13}" for value in list(row.values())[:-2]), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
