"""What computes a Hamilton product and with which launch settings: pure functions of shape, type and architecture."""

import functools
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMS = ("dense", "q16", "q8")
# A summed or written dimension below this many quaternion channels leaves a tile of 16 products too small for tensor cores.
Q16_CHANNELS = 32
Q8_CHANNELS = 16


def cpu_form(p: int, q: int, kernel_area: int = 1, pixels: int = 1) -> str:
    """The fastest plain-PyTorch form on a CPU in float32, forward and backward (bench/results/cpu_forms.csv).

    "q8" halves the p q kernel_area products of a pixel and pays with passes over p + q maps, which cost more the less
    of them fits the caches. The batch is left out, so that its size never changes what is compiled.

    Args:
        p: quaternion channels of the output.
        q: quaternion channels of the input, per group.
        kernel_area: kh kw; 1 for a linear map.
        pixels: H W of the input; 1 for a linear map.

    Returns:
        "dense" or "q8".

    >>> cpu_form(128, 128, 9, 64), cpu_form(16, 16, 9, 4096)
    ('q8', 'dense')
    """
    products_per_map = 80 if pixels <= 64 else 160 if pixels <= 256 else 320
    return "q8" if p * q * kernel_area >= products_per_map * (p + q) else "dense"


def triton_form(p: int, q: int, precision: str) -> str:
    """The form that Triton kernels take by themselves, computed from the model of `_clocks`, not measured yet.

    Args:
        p: quaternion channels of the output, per group.
        q: quaternion channels of the input, per group.
        precision: "half", "tf32", "ieee" or "tf32x3", see `Plan`.

    Returns:
        "q16" for half types and tf32, whose q8 would round sums of components; "q8" for accurate float32, where
        products, not loads, take the time; "dense" for few channels.

    >>> triton_form(128, 128, "half"), triton_form(128, 128, "ieee"), triton_form(16, 1, "ieee")
    ('q16', 'q8', 'dense')
    """
    accurate = precision in ("ieee", "tf32x3")
    if min(p, q) < (Q8_CHANNELS if accurate else Q16_CHANNELS):
        return "dense"
    return "q8" if accurate else "q16"


@dataclass(frozen=True)
class Tile:
    """Launch settings of one program.

    Args:
        m: rows: pixels of a gather, output channels of a weight gradient.
        n: columns: output channels of a gather, input channels (under one tap) of a weight gradient.
        k: summed per step: input channels of a gather, pixels of a weight gradient.
        warps: warps of a program.
        stages: depth of the software pipeline.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """How one product is computed.

    Args:
        form: "dense", "q16" or "q8".
        precision: of the products: "half" (float16, bfloat16), "tf32", "ieee" (float32), "tf32x3" (three tf32 products
            for one of float32).
        tile: launch settings.
        splits: programs that share one sum; more than one costs a second kernel that adds their parts.
    """

    form: str
    precision: str
    tile: Tile
    splits: int


@dataclass(frozen=True)
class Problem:
    """The size of one product.

    Args:
        kernel: "gather" (convolution, data gradient, transposed convolution) or "dw" (weight gradient).
        rows: pixels of one class of the output; for "dw" pixels that are summed.
        n: quaternion channels of a group that are written; for "dw" those of the output.
        k: quaternion channels of a group that are summed; for "dw" those of the input.
        taps: kernel positions.
        copies: groups times classes.
    """

    kernel: str
    rows: int
    n: int
    k: int
    taps: int
    copies: int = 1


# Tiles per (kernel, form, precision), of which each architecture takes those that compile for it without spills, within its
# shared and tensor memory and with tensor-core instructions (tests/compile_only).
TILES: dict[int, dict[tuple[str, str, str], tuple[Tile, ...]]] = {
    90: {
        ("gather", "dense", "half"): (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 3), Tile(64, 64, 64, 4, 4), Tile(32, 32, 64, 4, 4)),
        ("gather", "q16", "half"): (Tile(128, 64, 32, 8, 3), Tile(128, 32, 32, 8, 3), Tile(64, 32, 32, 4, 3), Tile(32, 32, 32, 4, 3)),
        ("gather", "q8", "half"): (Tile(128, 64, 32, 8, 3), Tile(64, 32, 32, 4, 3)),
        ("dw", "dense", "half"): (Tile(64, 64, 64, 4, 3),),
        ("dw", "q16", "half"): (Tile(64, 64, 32, 8, 3), Tile(64, 32, 32, 4, 3)),
        ("dw", "q8", "half"): (Tile(64, 64, 32, 8, 3), Tile(64, 32, 32, 4, 3)),
    }
}


def plan(problem, form, precision, arch, multiprocessors):
    form = triton_form(problem.n, problem.k, precision) if form == "auto" else form
    import os
    return Plan(form, precision, Tile(int(os.environ.get("TM", 32)), 16, 16, 4, 3), int(os.environ.get("SPLITS", 1)))
