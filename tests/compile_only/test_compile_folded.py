"""The kernels of the released code's loss compile into machine code that may ship, in every layout of the features."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from qkernels.ops.folded_rowwise import launch
from qkernels.runtime.recording import record
from tests.compile_only.harness import compile_launch

LAYOUTS = {
    "NHWC": lambda x: x.to(memory_format=torch.channels_last),
    "NCHW": lambda x: x,
    "strided": lambda x: x.mT.contiguous().mT,
}
# Of 64, 30 and 16 positions, in tiles of 64, 32 and 16.
MAPS = {"64": (8, 8), "32": (6, 5), "16": (4, 4)}
KERNELS = {
    "_folded_products_kernel": 2,
    "_folded_sum_kernel": 2,
    "_folded_rows_kernel": 1,
    "_folded_loss_kernel": 1,
    "_folded_gradient_kernel": 1,
}


def cases() -> Any:
    """One layout of each (architecture, type, size) now, by turns; all else when slow."""
    turn = itertools.count()
    for arch, dtype, size in itertools.product((80, 90, 100), (torch.float32, torch.bfloat16, torch.float16), MAPS):
        quick = next(turn) % len(LAYOUTS)
        for index, layout in enumerate(LAYOUTS):
            marks = () if index == quick and dtype != torch.float16 else pytest.mark.slow
            yield pytest.param(arch, dtype, size, layout, id=f"sm_{arch}-{dtype}-{size}-{layout}", marks=marks)


def recorded(arch: Any, dtype: Any, size: Any, layout: Any, which: Any) -> Any:
    maps = [LAYOUTS[layout](torch.empty(20, 512, *MAPS[size], dtype=dtype, device="meta")) for _ in range(2)]
    with record(arch) as recording:
        loss, *rest = launch.forward(*maps, "each" if which else "product", 1.0)
        launch.gradient(loss, *(reversed(maps) if which else maps), *rest, which, 1.0)
    return recording.launches


@pytest.mark.parametrize(("arch", "dtype", "size", "layout"), list(cases()))
def test_kernels(arch: Any, dtype: Any, size: Any, layout: Any, tmp_path: Path) -> None:
    which = list(LAYOUTS).index(layout) % 2
    launches = recorded(arch, dtype, size, layout, which)
    names = [entry.kernel.__name__ for entry in launches]
    assert {name: names.count(name) for name in names} == KERNELS
    problems = {}
    for name, entry in zip(names, launches, strict=True):
        if found := compile_launch(entry, arch, tmp_path).problems(arch, tensor_cores="PRECISION" in entry.arguments):
            problems[name] = found
    assert problems == {}
