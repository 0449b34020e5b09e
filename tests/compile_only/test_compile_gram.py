"""The Gram cosine's kernels compile into machine code that may ship, with every tile of every architecture's tables."""

import contextlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qkernels.ops.gram_cosine import config, launch
from qkernels.runtime.recording import record
from tests.compile_only.harness import compile_launch

# Channels and side of features whose matrices have so many rows on chip; the largest have more than any tile.
SHAPES = {
    "stored": {16: (16, 8, 8), 32: (32, 8, 8), 64: (64, 64, 64), 128: (128, 32, 32)},
    "direct": {256: (256, 16, 16), 512: (512, 64, 16), 1024: (1024, 64, 16)},
    "dual": {
        16: (512, 4, 4),
        32: (512, 8, 4),
        64: (512, 8, 8),
        128: (512, 16, 8),
        256: (512, 16, 16),
        512: (1024, 16, 32),
    },
}
LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}
MAIN = ("_gram_kernel", "_gram_squares_kernel", "_gram_backward_kernel")


def cases() -> Any:
    """Of each (architecture, mode, type) one size and layout now, by turns; everything else when slow."""
    turn = itertools.count()
    for arch, mode, dtype in itertools.product(config.BACKWARD, SHAPES, (torch.bfloat16, torch.float32)):
        sizes = [*SHAPES[mode]]
        variants = [(False, False)]
        variants += [(True, False)] + ([(False, True)] if mode != "dual" else [])
        now = next(turn)
        for size, (index, layout), (centred, triangles) in itertools.product(sizes, enumerate(LAYOUTS), variants):
            quick = size == sizes[now % len(sizes)] and index == now % 2 and not centred and not triangles
            kind = centred * "-centred" + triangles * "-triangles"
            label = f"sm_{arch}-{mode}-{size}-{str(dtype)[6:]}-{layout}{kind}"
            marks = () if quick else pytest.mark.slow
            yield pytest.param(arch, mode, size, dtype, layout, centred, triangles, id=label, marks=marks)


class Work(TorchDispatchMode):
    """PyTorch's own operators that would launch something: all but those that only allocate, or look another way."""

    FREE = ("empty", "new_empty", "empty_like", "select", "view", "promote_types")

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.overloadpacket.__name__ not in self.FREE:
            self.operators.append(operator)
        return operator(*args, **(kwargs or {}))


def recorded(arch: Any, shape: Any, dtype: Any, layout: Any, centred: Any, triangles: Any, work: Any = None) -> Any:
    def empty() -> Any:
        return torch.empty(20, *shape, dtype=dtype, device="meta").contiguous(memory_format=LAYOUTS[layout])

    a, b, incoming, known = empty(), empty(), empty(), None
    if triangles:
        b = torch.empty(20, shape[0] * (shape[0] + 1) // 2, device="meta")
        known = torch.empty(2, 20, device="meta")
    how = (triangles, "channel", centred, 0.5, True)
    with record(arch) as recording, work or contextlib.nullcontext():
        cosine, loss, *rest = launch.forward(a, b, known, *how, False)
        launch.gradient(None, loss, incoming, cosine, a, b, *rest, 0, *how)
    return recording.launches


@pytest.mark.parametrize(("arch", "mode", "size", "dtype", "layout", "centred", "triangles"), [*cases()])
def test_kernels(
    arch: Any, mode: Any, size: Any, dtype: Any, layout: Any, centred: Any, triangles: Any, tmp_path: Path
) -> None:
    launches = recorded(arch, SHAPES[mode][size], dtype, layout, centred, triangles)
    assert mode == launches[-1].arguments["META"].MODE
    problems = {
        entry.kernel.__name__: found
        for entry in launches
        if (found := compile_launch(entry, arch, tmp_path).problems(arch, entry.kernel.__name__ in MAIN))
    }
    assert problems == {}


def test_every_tile_is_among_the_cases() -> None:
    taken = set()
    for arch, mode, size, dtype, *_ in (case.values for case in cases()):
        entry = recorded(arch, SHAPES[mode][size], dtype, "NHWC", False, False)[-1].arguments["META"]
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_C")
        taken.add((arch, mode, dtype, tuple(getattr(entry, name) for name in names)))
    for arch, table in config.BACKWARD.items():
        for (mode, precision), tiles in table.items():
            dtype = torch.bfloat16 if precision == "half" else torch.float32
            assert {tile[:4] for tile in tiles} == {tile for *key, tile in taken if key == [arch, mode, dtype]}


@pytest.mark.parametrize(("mode", "triangles"), [*itertools.product(SHAPES, (False, True))])
def test_a_tap_is_three_launches_and_nothing_else(mode: Any, triangles: Any) -> None:
    """Two forward and one backward; what is triangles is never dual."""
    for shape in SHAPES[mode].values():
        work = Work()
        launches = recorded(90, shape, torch.bfloat16, "NHWC", False, triangles, work)
        assert len(launches) == 3
        assert work.operators == []
