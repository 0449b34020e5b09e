"""`python -m qkernels.tune`: searches for launch settings on this machine's GPU, prints each trial, writes the table.

Only this command searches: without a table the settings come from a model (`config.cost`). The table holds, for each
product of the quaternion VGG16 (WASPAA 2023) at the given batch sizes, the fastest plan of every form, and for each
weight's shape the form whose plans have the shortest total time. Copy it into the package to ship it, or name its
folder in the environment variable QKERNELS_TABLES.
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from qkernels.ops import _launch
from qkernels.ops.hamilton_conv import config, forms, launch
from qkernels.ops.hamilton_conv.config import Plan, Problem
from qkernels.ops.hamilton_conv.launch import Epilogue, Packed
from qkernels.runtime.device import arch_of, multiprocessors_of

DTYPES = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
# The forms that may compute a precision, and the precision of their products.
FORMS = {
    "half": [("signed", "half")],
    "tf32": [("signed", "tf32")],
    "ieee": [("signed", "ieee"), ("q8", "ieee"), ("signed", "tf32x3"), ("q8", "tf32x3")],
}
# Maximum relative Frobenius errors of float32 results against float64; plans with larger errors are rejected.
TOLERANCES = {"half": 1e-5, "tf32": 6e-4, "ieee": 2e-6}


class Layer(NamedTuple):
    """Real channels, kernel size and side of the square map; odd kernels are padded to keep it, others are not."""

    channels_in: int
    channels_out: int
    kernel: int
    side: int


LAYERS = [
    Layer(4, 64, 3, 64),
    Layer(64, 64, 3, 64),
    Layer(64, 128, 3, 32),
    Layer(128, 128, 3, 32),
    Layer(128, 256, 3, 16),
    Layer(256, 256, 3, 16),
    Layer(256, 512, 3, 8),
    Layer(512, 512, 3, 8),
    Layer(512, 512, 3, 4),
    Layer(512, 4096, 2, 2),  # the first linear layer, on maps
    Layer(4096, 4096, 1, 1),
]


class Product(NamedTuple):
    """One product of a layer: its size, a function (algorithm, type of the result) that computes it, the result."""

    name: str
    problem: Problem
    run: Callable[[str, torch.dtype | None], Tensor]
    exact: Tensor


def products(layer: Layer, batch: int, dtype: torch.dtype, device: torch.device | str) -> Iterator[Product]:
    """Forward, data gradient and weight gradient of a layer, on random operands, with packed weights."""
    p, q, kernel, side = layer.channels_out // 4, layer.channels_in // 4, layer.kernel, layer.side
    padding = kernel // 2 * (kernel % 2)
    window, positions, size, kernel_size = (1, 1, padding, padding, 1, 1, 1), kernel**2, [side] * 2, [kernel] * 2
    y_side = side + 2 * padding - kernel + 1
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def maps(channels: int, side: int) -> Tensor:
        return draw(batch, channels, side, side).contiguous(memory_format=torch.channels_last)

    x, dy = maps(4 * q, side), maps(4 * p, y_side)
    weight, bias = draw(4, p, q, kernel, kernel), draw(4 * p)

    @functools.cache
    def packed(algorithm: str) -> Packed:
        return Packed(*launch.pack([weight], [algorithm], dtype))

    dw = functools.partial(launch.weight_gradient, dy, x, kernel_size, window, True)
    yield Product(
        "forward",
        Problem("gather", batch * y_side**2, p, q, positions),
        lambda algorithm, to: launch.forward(x, weight, window, algorithm, Epilogue(bias), packed(algorithm), to),
        forms.forward(x.double(), weight.double(), bias.double(), window, "dense"),
    )
    yield Product(
        "dx",
        Problem("gather", batch * side**2, q, p, positions),
        lambda algorithm, to: launch.data_gradient(
            dy, weight, size, window, algorithm, packed=packed(algorithm), dtype=to
        ),
        forms.data_gradient(dy.double(), weight.double(), size, window, "dense"),
    )
    yield Product(
        "dw",
        Problem("dw", batch * y_side**2, p, q, positions),
        lambda algorithm, to: dw(algorithm, tickets=packed(algorithm).tickets, dtype=to)[0],
        forms.weight_gradient(dy.double(), x.double(), kernel_size, window, "dense"),
    )


def search(
    layers: Iterable[Layer],
    batches: Iterable[int],
    precisions: Iterable[str],
    device: torch.device | str,
    time_of: Callable[[Callable[[], Any]], float],
    most: int,
    log: Callable[[str], None] = print,
) -> dict[str, list[dict[str, Any]]]:
    """Times the `most` plans that are fastest by the model, for every product and form.

    Args:
        layers, batches, precisions: the products to search for; "half", "tf32" and "ieee" as in `config.Plan`.
        device: device of the operands.
        time_of: function that returns the milliseconds of a call.
        most: maximum number of plans to try per product and form.
        log: called with a line for each plan.

    Returns:
        The rows "plans" and "forms" of a table.
    """
    plans: dict[tuple[Any, ...], dict[str, Any]] = {}
    times: dict[tuple[str, int, int, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for precision, layer, batch in itertools.product(precisions, layers, batches):
        weight = (precision, layer.channels_out // 4, layer.channels_in // 4, layer.kernel**2)
        for product in products(layer, batch, DTYPES[precision], device):
            name = f"{layer.channels_in}->{layer.channels_out} {layer.kernel}x{layer.kernel} on {layer.side}x"
            prefix = f"{name}{layer.side}, batch {batch}, {precision}, {product.name}: "
            best = _fastest(product, precision, device, time_of, most, lambda line, start=prefix: log(start + line))  # type: ignore[misc]
            for form, (time, plan) in best.items():
                times[weight][form].append(time)
                row = {
                    "problem": product.problem.key,
                    "form": form,
                    "asked": precision,
                    "precision": plan.precision,
                    "tile": dataclasses.astuple(plan.tile)[:-1],
                    "splits": plan.splits,
                    "microseconds": round(1e3 * time, 2),
                }
                key = (product.problem.key, form, precision)
                if key not in plans or row["microseconds"] < plans[key]["microseconds"]:
                    plans[key] = row
    forms_of = []
    for (precision, p, q, positions), by_form in times.items():
        measured = max(map(len, by_form.values()))
        totals = {form: sum(each) for form, each in by_form.items() if len(each) == measured}
        form = min(totals, key=totals.__getitem__)
        forms_of.append({"precision": precision, "p": p, "q": q, "positions": positions, "form": form})
    return {"forms": forms_of, "plans": list(plans.values())}


def _fastest(
    product: Product,
    precision: str,
    device: torch.device | str,
    time_of: Callable[[Callable[[], Any]], float],
    most: int,
    log: Callable[[str], None],
) -> dict[str, tuple[float, Plan]]:
    """The fastest plan of each form, among those that are accurate enough, with its milliseconds."""
    probe = torch.empty(0, device=device)
    arch, multiprocessors = arch_of(probe), multiprocessors_of(probe)
    best: dict[str, tuple[float, Plan]] = {}
    for form, products in FORMS[precision]:
        plans = set(config.candidates(product.problem, form, products, arch))
        ranked = sorted(plans, key=lambda plan: config.cost(product.problem, plan, arch, multiprocessors).total)
        algorithm = f"{form}-{precision}"
        for plan in ranked[:most]:
            tile, time = plan.tile, math.inf
            try:
                with config.force(plan):
                    result = product.run(algorithm, torch.float32).double()
                    error = ((result - product.exact).norm() / product.exact.norm()).item()
                    if error <= TOLERANCES[precision]:
                        time = time_of(functools.partial(product.run, algorithm, None))
                verdict = f"{f'{1e3 * time:.1f} us' if time < math.inf else 'rejected'}, error {error:.1e}"
            except (_launch.KernelUnavailable, torch.OutOfMemoryError) as problem:
                verdict = f"rejected, {type(problem).__name__}"
            log(
                f"{form} {products} {tile.m}x{tile.n}x{tile.k}, {tile.warps} warps, {tile.stages} stages, "
                f"{plan.splits} splits: {verdict}"
            )
            if time < best.get(form, (math.inf, plan))[0]:
                best[form] = time, plan
    return best


def write(table: dict[str, list[dict[str, Any]]], folder: Path, arch: int) -> Path:
    """Writes the table of an architecture and its provenance, whole or not at all."""
    provenance = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
    }
    path = folder / f"sm_{arch}.json"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f'"provenance": {json.dumps(provenance)}']
    for name, rows in table.items():
        lines.append(f'"{name}": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]")
    draft = path.with_suffix(".draft")
    draft.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    draft.replace(path)
    return path


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m qkernels.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[20, 256], help="batch sizes (default: 20 256)")
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all")
    parser.add_argument(
        "--most", type=int, default=8, help="maximum number of plans to try per product and form (default: 8)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(config.__file__).parent / "tables",
        help="folder of the table (default: the package's)",
    )
    options = parser.parse_args(arguments)
    if min([*options.batch, options.most]) < 1:
        parser.error(f"--batch and --most must be at least 1; got {options.batch} and {options.most}")
    if not torch.cuda.is_available():
        parser.exit(2, "qkernels.tune times kernels on a CUDA GPU, and PyTorch sees none\n")

    def time_of(call: Callable[[], Any]) -> float:
        return float(triton.testing.do_bench_cudagraph(call, rep=20, return_mode="median"))

    table = search(LAYERS, options.batch, options.precision, "cuda", time_of, options.most)
    path = write(table, options.out, arch_of(torch.empty(0, device="cuda")))
    print(f"{path}: {len(table['plans'])} plans", file=sys.stderr)


if __name__ == "__main__":
    main()
