"""Every tile of every architecture's table, and every launch of whole training steps, compiles into machine code that
may ship, on a machine without that GPU.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.launches import step_case, step_launches
from qkernels.ops.hamilton_conv import config, launch
from qkernels.ops.hamilton_conv.config import Plan
from qkernels.ops.hamilton_conv.launch import Epilogue
from qkernels.runtime.recording import flat_arguments, record
from tests.compile_only.harness import compile_launch

WINDOW = (1, 1, 1, 1, 1, 1, 1)
STRIDED = (2, 2, 1, 1, 1, 1, 1)
DTYPES = {"half": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32, "tf32x3": torch.float32}
BATCH, SIDE = 20, 8
MAIN = {"gather": ("_hamilton_conv_kernel", "_hamilton_conv_q8_kernel"),
        "dw": ("_hamilton_conv_dw_kernel", "_hamilton_conv_dw_q8_kernel")}  # fmt: skip


def maps(channels: Any, dtype: Any, side: Any = SIDE) -> Any:
    x = torch.empty(BATCH, channels, side, side, dtype=dtype, device="meta")
    return x.contiguous(memory_format=torch.channels_last)


def weight(p: Any, q: Any, kernel: int = 3) -> Any:
    """A parameter: float32 beside half types too."""
    return torch.empty(4, p, q, kernel, kernel, device="meta")


def bias(p: Any) -> Any:
    return torch.empty(4 * p, device="meta")


def forward(p: Any, q: Any, dtype: Any, how: Any) -> None:
    launch.forward(maps(4 * q, dtype), weight(p, q), WINDOW, how, Epilogue(bias(p), relu=True))


def forward_pool(p: Any, q: Any, dtype: Any, how: Any) -> None:
    epilogue = Epilogue(bias(p), relu=True)
    launch.forward_pool(maps(4 * q, dtype), weight(p, q), WINDOW, how, epilogue, return_map=True)


def masked_adjoint(p: Any, q: Any, dtype: Any, how: Any) -> None:
    epilogue = Epilogue(relu_output=maps(4 * q, dtype))
    launch.data_gradient(maps(4 * p, dtype), weight(p, q), (SIDE, SIDE), WINDOW, how, epilogue)


def strided_adjoint(p: Any, q: Any, dtype: Any, how: Any) -> None:
    """Four phases; with a 1x1 kernel three of them have no position, and their loop may not run."""
    size = (2 * SIDE, 2 * SIDE)
    launch.data_gradient(maps(4 * p, dtype), weight(p, q), size, STRIDED, how, Epilogue(bias(q)))


def dropout(p: Any, q: Any, dtype: Any, how: Any) -> None:
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    epilogue = Epilogue(bias(p), relu=True, seed=seed, scale=2.0)
    flat = (1, 1, 0, 0, 1, 1, 1)
    launch.forward(maps(4 * q, dtype, 1), weight(p, q, 1), flat, how, epilogue, dtype=torch.float32)


def weight_gradient(p: Any, q: Any, dtype: Any, how: Any) -> None:
    x, dy = maps(4 * q, dtype), maps(4 * p, dtype)
    launch.weight_gradient(dy, x, (3, 3), WINDOW, True, how, dtype=torch.float32)


def scaled_weight_gradient(p: Any, q: Any, dtype: Any, how: Any) -> None:
    x, dy = maps(4 * q, dtype), maps(4 * p, dtype)
    launch.weight_gradient(dy, x, (3, 3), WINDOW, False, how, scale=2.0, dtype=torch.float32)


VARIANTS = {
    "gather": {
        "forward": (forward, 2),
        "forward and pool": (forward_pool, 1),
        "masked adjoint": (masked_adjoint, 1),
        "shared pool": (forward_pool, 3),
        "adjoint of stride 2": (strided_adjoint, 1),
        "dropout": (dropout, 2),
    },
    "dw": {"shared": (weight_gradient, 2), "alone": (weight_gradient, 1), "scaled": (scaled_weight_gradient, 1)},
}


EPILOGUES = ("forward and pool", "shared pool", "dropout")
PHASES = ("adjoint of stride 2",)


def channels(kernel: Any, form: Any, tile: Any) -> Any:
    """Quaternion channels of output and input that the tile is made for."""
    if form != "flat":
        return 128, 128
    few = 8 if kernel == "dw" else 16
    return (16, few) if tile.n >= 16 else (1, 1)


def cases() -> Any:
    """One variant of the first tile of each (kernel, form, type, architecture) now, by turns; all else when slow."""
    turn = itertools.count()
    keys = [(arch, *key) for arch, table in config.TILES.items() for key in table]
    for arch, kernel, form, precision in keys:
        quick = next(turn) % len(VARIANTS[kernel])
        tiles = [config.Tile(*numbers) for numbers in config.TILES[arch][kernel, form, precision]]
        for tile, (index, variant) in itertools.product(tiles, enumerate(VARIANTS[kernel])):
            if variant in EPILOGUES and not config.leaves_registers(tile):
                continue
            now = tile == tiles[0] and index == (quick if config.leaves_registers(tile) else 0)
            numbers = "x".join(map(str, (tile.m, tile.n, tile.k, tile.warps, tile.stages)))
            label = f"sm_{arch}-{kernel}-{form}-{precision}-{numbers}-{variant}"
            marks = () if now else pytest.mark.slow
            yield pytest.param(arch, kernel, form, precision, tile, variant, id=label, marks=marks)


def recorded(arch: Any, kernel: Any, form: Any, precision: Any, tile: Any, variant: Any) -> Any:
    """The product's launch; of several in one call the first."""
    run, splits = VARIANTS[kernel][variant]
    form, how = ("signed" if form == "flat" else form), channels(kernel, form, tile)
    asked = f"{form}-{'ieee' if precision == 'tf32x3' else precision}"
    with record(arch) as recording, config.force(Plan(form, precision, tile, splits)):
        run(*how, DTYPES[precision], asked)
    (main,) = [entry for entry in recording.launches if entry.kernel.__name__ in MAIN[kernel]]
    return main


def narrowest(kernel: Any, form: Any, precision: Any) -> Any:
    """Bytes of a copy. Tensor cores of sm_90 read 32-bit operands along the sum alone, which in dw is over pixels."""
    return 4 if (kernel, precision) == ("dw", "tf32") else 16


@pytest.mark.parametrize(("arch", "kernel", "form", "precision", "tile", "variant"), [*cases()])
def test_tile(arch: Any, kernel: Any, form: Any, precision: Any, tile: Any, variant: Any, tmp_path: Path) -> None:
    usage = compile_launch(recorded(arch, kernel, form, precision, tile, variant), arch, tmp_path)
    # Addresses of few channels are made one by one; those of the full network's first layers are held to more below.
    pipelined = form == "signed" and precision in ("half", "tf32") and variant not in ("adjoint of stride 2", "dropout")
    stages = tile.stages if pipelined else 0
    problems = usage.problems(arch, precision != "ieee", stages, narrowest(kernel, form, precision))
    assert problems == []
    if variant in ("dropout", "scaled"):  # of linear maps alone
        return
    extra = config.EPILOGUE_REGISTERS * (variant in EPILOGUES) + config.PHASE_REGISTERS * (variant in PHASES)
    assert usage.registers <= tile.registers + 16 + extra  # versions of Triton differ by some


@pytest.mark.parametrize("kernel", ["gather", "dw"])
def test_geforce_blackwell_takes_the_tiles_of_sm_80(kernel: str, tmp_path: Path) -> None:
    (tile, *_) = config.tiles(kernel, "signed", "half", 120)
    entry = recorded(120, kernel, "signed", "half", tile, next(iter(VARIANTS[kernel])))
    assert compile_launch(entry, 120, tmp_path).problems(120, True, tile.stages) == []


def test_unaligned_memory_is_copied() -> None:
    """`bias[1:]`, odd slices: the binary that Triton would compile for them, and that nobody has seen, spills."""

    def odd(x: Any) -> Any:
        stored = torch.empty(x.numel() + 1, dtype=x.dtype, device="meta")
        return stored[1:].as_strided(x.shape, x.stride())

    x, w, b = odd(maps(64, torch.bfloat16)), odd(weight(16, 16)), odd(bias(16))
    with record(90) as recording:
        launch.forward(x, w, WINDOW, "signed-half", Epilogue(b, relu_output=odd(maps(64, torch.bfloat16))))
        launch.weight_gradient(x, x, (3, 3), WINDOW, True, "signed-half")
        launch.epilogue_gradient(x, x, None, None, (SIDE, SIDE), 1.0, torch.bfloat16)
    tensors = [value for entry in recording.launches for _, value in flat_arguments(entry.arguments)]
    assert {t.storage_offset() * t.element_size() % 16 for t in tensors if isinstance(t, torch.Tensor)} == {0}


def steps() -> Any:
    """Whole training steps; the paper's batch with the paper's best layer now."""
    for precision, batch, at_layer in itertools.product(("bf16", "float32"), (20, 256), (0, 2, 7, 13)):
        now = (precision, batch, at_layer) == ("bf16", 20, 2)
        label = f"AT {at_layer}, batch {batch}, {precision}"
        yield pytest.param(at_layer, batch, precision, id=label, marks=() if now else pytest.mark.slow)


def distinct(events: Any) -> Any:
    """One launch of each binary, roughly: settings, types, and which sizes are special to Triton's launcher."""
    found: dict[Any, Any] = {}
    for event in events:
        if event.launch is not None:
            entry = event.launch
            key = [entry.kernel.__name__, tuple(entry.options.items())]
            for name, value in entry.arguments.items():
                flat = value if isinstance(value, tuple) and not hasattr(value, "BLOCK_M") else (value,)
                key.append((name, *(special(part) for part in flat)))
            found.setdefault(tuple(key), entry)
    return list(found.values())


def special(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return str(value.dtype)
    if isinstance(value, tuple):
        return tuple(map(special, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return value == 1, value % 16 == 0
    return str(value)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("at_layer", "batch", "precision"), [*steps()])
def test_every_launch_of_a_step(at_layer: Any, batch: Any, precision: Any, tmp_path: Path) -> None:
    entries = distinct(step_launches(step_case(at_layer, False, batch, precision)))
    problems, kinds = [], set()
    for entry in entries:
        name, how = entry.kernel.__name__, entry.arguments.get("META")
        kinds.add(name)
        usage = compile_launch(entry, 90, tmp_path)
        hamilton = name.startswith("_hamilton_conv")
        half = hamilton and precision == "bf16"
        # Four channels of a pixel are one copy of 8 bytes.
        stages = entry.options["num_stages"] if half and usage.loops else 0
        found = usage.problems(90, half, stages, 8 if half and how.FLAT == 1 else 16)
        problems += [(name, how, *found)] if found else []
    assert problems == []
    assert {
        "_hamilton_pack_kernel",
        "_hamilton_gradient_kernel",
        *(["_gram_backward_kernel"] * bool(at_layer)),
    } <= kinds
    assert sum(name in itertools.chain(*MAIN.values()) for name in kinds) >= 2


@pytest.mark.parametrize("arch", config.TILES)
def test_all_weights_in_one_launch(arch: Any, tmp_path: Path) -> None:
    """Of every kind, side by side; also `_hamilton_gradient_kernel` with all of its parts."""
    for hows, dtype in (
        (("signed-half",) * 15, torch.bfloat16),
        (("signed-tf32", "q8-ieee", "signed-ieee"), torch.float32),
    ):
        with record(arch) as recording:
            launch.pack([weight(64, 16) for _ in hows], hows, dtype)
            dy, pooled = maps(64, dtype), maps(64, dtype, SIDE // 2)
            launch.epilogue_gradient(dy, dy, pooled, pooled.to(torch.uint8), (SIDE, SIDE), 2.0, dtype)
        assert len(recording.launches) == 2
        for entry in recording.launches:
            assert compile_launch(entry, arch, tmp_path).problems(arch, tensor_cores=False) == []
