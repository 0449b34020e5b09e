"""Every tile of every architecture's table compiles into machine code that may ship, on a machine without that GPU."""

import itertools

import pytest
import torch
from harness import compile_launch

from qkernels.ops import _launch
from qkernels.ops.hamilton_conv import config, launch
from qkernels.ops.hamilton_conv.config import Plan
from qkernels.ops.hamilton_conv.launch import Source

WINDOW = ([1, 1], [1, 1], [1, 1], 1)
LINEAR = ([1, 1], [0, 0], [1, 1], 1)
DTYPES = {"half": (torch.bfloat16, torch.float16), "tf32": (torch.float32,), "ieee": (torch.float32,)}
DTYPES["tf32x3"] = DTYPES["ieee"]
BATCH, CHANNELS, SIDE = 20, 512, 8


def maps(dtype, side=SIDE):
    return torch.empty(BATCH, CHANNELS, side, side, dtype=dtype, device="meta")


def weight(dtype):
    return torch.empty(4, CHANNELS // 4, CHANNELS // 4, 3, 3, dtype=dtype, device="meta")


def pooled(dtype):
    return maps(dtype, SIDE // 2), maps(torch.uint8, SIDE // 2)


def forward(dtype):
    launch.forward(maps(dtype), weight(dtype), maps(dtype)[0, :, 0, 0], *WINDOW, True, "auto")


def forward_pool(dtype):
    launch.forward_pool(maps(dtype), weight(dtype), maps(dtype)[0, :, 0, 0], *WINDOW, True, True, "auto")


def adjoint(source):
    def run(dtype):
        launch.data_gradient(source(dtype), weight(dtype), None, [SIDE, SIDE], *WINDOW, "auto")

    return run


def strided_adjoint(dtype):
    """Four classes; with a 1x1 kernel three of them have no tap, and their loop may not run."""
    launch.data_gradient(relu(dtype), weight(dtype), None, [2 * SIDE, 2 * SIDE], [2, 2], [1, 1], [1, 1], 1, "auto")


def gradient(source):
    def run(dtype):
        launch.weight_gradient(source(dtype), maps(dtype), [3, 3], *WINDOW, True, "auto")

    return run


def relu(dtype):
    return Source(maps(dtype), maps(dtype))


def relu_and_pool(dtype):
    return Source(maps(dtype), maps(dtype), *pooled(dtype))


def linear_operands(dtype):
    x = torch.empty(BATCH, 2048, 1, 1, dtype=dtype, device="meta")
    y = torch.empty(BATCH, 4096, 1, 1, dtype=dtype, device="meta")
    return x, torch.empty(4, 1024, 512, 1, 1, dtype=dtype, device="meta"), y


def linear(dtype):
    x, w, y = linear_operands(dtype)
    launch.forward(x, w, y[0, :, 0, 0], *LINEAR, True, "auto", kind="matmul")


def linear_adjoint(dtype):
    _, w, y = linear_operands(dtype)
    launch.data_gradient(Source(y, y), w, None, [1, 1], *LINEAR, "auto", kind="matmul")


def linear_dw(dtype):
    x, _, y = linear_operands(dtype)
    launch.weight_gradient(Source(y, y), x, [1, 1], *LINEAR, True, "auto", kind="matmul")


VARIANTS = {
    "gather": {
        "forward": forward,
        "forward and pool": forward_pool,
        "adjoint behind a ReLU": adjoint(relu),
        "adjoint behind both": adjoint(relu_and_pool),
        "adjoint of stride 2": strided_adjoint,
        "linear": linear,
        "linear adjoint": linear_adjoint,
    },
    "dw": {
        "dw behind a ReLU": gradient(relu),
        "dw behind both": gradient(relu_and_pool),
        "linear dw": linear_dw,
    },
}
MAIN = {"gather": "_hamilton_conv_kernel", "dw": "_hamilton_conv_dw_kernel"}


def cases():
    """One variant of the first tile of each (kernel, form, type, architecture) now, by turns; all else when slow.

    float16 and bfloat16 differ in nothing but the instruction's type: the slow cases take the latter.
    """
    turn = itertools.count()
    for arch, kernel in itertools.product(config.TILES, VARIANTS):
        for form, precision in sorted({key[-2:] for key in config.TILES[arch]}):
            tiles = config.tiles(kernel, form, precision, arch)
            for dtype in DTYPES[precision]:
                quick = next(turn) % len(VARIANTS[kernel])
                for tile, (index, variant) in itertools.product(tiles, enumerate(VARIANTS[kernel])):
                    now = tile == tiles[0] and index == quick
                    if now or dtype != torch.float16:
                        numbers = "x".join(map(str, (tile.m, tile.n, tile.k, tile.warps, tile.stages)))
                        label = f"sm_{arch}-{form}-{precision}-{str(dtype)[6:]}-{numbers}-{variant}"
                        marks = () if now else pytest.mark.slow
                        yield pytest.param(arch, kernel, form, precision, dtype, tile, variant, id=label, marks=marks)


def recorded(arch, plan, run, dtype):
    with _launch.record(arch) as recording, config.force(plan):
        run(dtype)
    return recording.launches


@pytest.mark.parametrize(("arch", "kernel", "form", "precision", "dtype", "tile", "variant"), [*cases()])
def test_tile(arch, kernel, form, precision, dtype, tile, variant, tmp_path):
    launches = recorded(arch, Plan(form, precision, tile, 1), VARIANTS[kernel][variant], dtype)
    (main,) = [entry for entry in launches if entry.kernel.__name__ == MAIN[kernel]]
    usage = compile_launch(main, arch, tmp_path)
    assert usage.problems(arch, tensor_cores=precision != "ieee") == []


def first_layer(dtype):
    x = torch.empty(BATCH, 4, 64, 64, dtype=dtype, device="meta")
    w = torch.empty(4, 16, 1, 3, 3, dtype=dtype, device="meta")
    y = torch.empty(BATCH, 64, 64, 64, dtype=dtype, device="meta")
    launch.forward(x, w, y[0, :, 0, 0], *WINDOW, True, "auto")
    launch.weight_gradient(Source(y, y), x, [3, 3], *WINDOW, True, "auto")


def decoder_layer(dtype):
    x = torch.empty(BATCH, 4, 64, 64, dtype=dtype, device="meta")
    w = torch.empty(4, 1, 1, 3, 3, dtype=dtype, device="meta")
    launch.data_gradient(Source(x), w, x[0, :, 0, 0], [128, 64], [2, 1], [1, 1], [1, 1], 1, "auto")


def shared_sums(dtype):
    option = Plan("q16", "ieee" if dtype == torch.float32 else "half", config.Tile(16, 16, 16, 4, 1), 2)
    with config.force(option):
        forward(dtype)
        forward_pool(dtype)
        gradient(relu)(dtype)


@pytest.mark.parametrize("arch", config.TILES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("call", [first_layer, decoder_layer, shared_sums])
def test_other_kernels(call, dtype, arch, tmp_path):
    """Few channels, the classes of a stride, and all the small kernels, with the settings that these calls take."""
    with _launch.record(arch) as recording:
        call(dtype)
    seen, problems = set(), []
    for entry in recording.launches:
        main = entry.kernel.__name__ in MAIN.values()
        if main and call is shared_sums:
            continue
        seen.add(entry.kernel.__name__)
        tensor_cores = main and (dtype == torch.bfloat16 or entry.arguments["PRECISION"] == "tf32")
        found = compile_launch(entry, arch, tmp_path).problems(arch, tensor_cores)
        problems += [(entry.kernel.__name__, entry.options, *found)] if found else []
    assert problems == []
    assert (
        seen
        == {
            first_layer: {"_hamilton_pack_kernel", *MAIN.values(), "_hamilton_finish_dw_kernel"},
            decoder_layer: {"_hamilton_pack_kernel", "_hamilton_conv_kernel"},
            shared_sums: {"_hamilton_pack_kernel", "_hamilton_finish_kernel", "_hamilton_finish_dw_kernel"},
        }[call]
    )
