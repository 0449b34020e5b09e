"""`torch.utils.flop_counter.FlopCounterMode` counts the operators: as the real layers of the same shapes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import qkernels
from qkernels.nn import QuaternionConv2d, QuaternionConvTranspose2d, QuaternionLinear
from qkernels.ops import _library
from qkernels.runtime.flops import FORMULAS, folded_flops, gram_flops

LAYERS = {
    "convolution": (QuaternionConv2d(8, 16, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1), (2, 8, 6, 5)),
    "groups, stride": (
        QuaternionConv2d(16, 8, (3, 2), (2, 1), groups=2),
        nn.Conv2d(16, 8, (3, 2), (2, 1), groups=2),
        (2, 16, 7, 5),
    ),
    "transposed": (
        QuaternionConvTranspose2d(16, 8, 3, 2, 1, 1, groups=2),
        nn.ConvTranspose2d(16, 8, 3, 2, 1, 1, groups=2),
        (2, 16, 4, 5),
    ),
    "linear": (QuaternionLinear(8, 12), nn.Linear(8, 12), (3, 2, 8)),
}


def counted(function: Callable[..., Tensor], *shape: int) -> tuple[int, int]:
    """Operations of a function of maps of this shape, and of its gradients."""
    x = torch.rand(shape, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = function(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("form", ["dense", "q8"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_counts_as_the_real_one(name: str, form: str) -> None:
    layer, real, shape = LAYERS[name]
    expected = counted(real, *shape)[0]
    with qkernels.set_form(form):
        assert counted(layer, *shape) == (expected, 2 * expected)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            layer(torch.rand(shape))
    assert counter.get_total_flops() == expected > 0


@pytest.mark.parametrize("name", LAYERS)
def test_pytorchs_own_operators_count_the_same(name: str) -> None:
    """Of which a layer consists in an exported program, and within `torch.func`."""
    layer, real, shape = LAYERS[name]
    expected = counted(real, *shape)
    assert counted(torch.export.export(layer, (torch.rand(shape),)).module(), *shape) == expected
    x = torch.rand(shape)
    with FlopCounterMode(display=False) as counter:
        torch.func.vmap(layer)(x[None])
    assert counter.get_total_flops() == expected[0]


@pytest.mark.parametrize("name", LAYERS)
def test_the_definition_counts_its_products_and_the_expansion_of_the_weight(name: str) -> None:
    layer, real, shape = LAYERS[name]
    expansion = 2 * 4 * 16 * layer.weight[0].numel()
    with qkernels.set_backend("reference"):
        assert counted(layer, *shape)[0] == counted(real, *shape)[0] + expansion


def test_frozen_operands_are_not_counted() -> None:
    layer, real, shape = LAYERS["convolution"]
    forward, _ = counted(real, *shape)
    with FlopCounterMode(display=False) as counter:
        layer(torch.rand(shape)).sum().backward()
    assert counter.get_total_flops() == 2 * forward  # no gradient by x


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 9, 2, 2)], ids=str)
@pytest.mark.parametrize("which", ["channel", "position", "batch", "folded", "tap", "target"])
def test_losses_count_as_in_bench(which: str, shape: tuple[int, ...]) -> None:
    samples, channels, positions = shape[0], shape[1], torch.Size(shape[2:]).numel()
    frozen: Any = torch.rand(shape)
    loss = "folded-rowwise" if which == "folded" else "gram-channel"
    if which == "target":
        frozen = qkernels.gram_target(frozen)
    functions: dict[str, Callable[[Tensor], Any]] = {
        "tap": lambda x: sum(part.sum() for part in qkernels.anti_transfer_tap(x, frozen)),
        "folded": lambda x: qkernels.anti_transfer_loss(x, frozen, loss=loss),
        "target": lambda x: qkernels.anti_transfer_loss(x, frozen),
    }
    function = functions.get(which, lambda x: qkernels.gram_cosine(x, frozen, gram=which))
    one = gram_flops(channels, positions)
    expected: Any = {
        "position": [samples * n for n in gram_flops(positions, channels)],
        "batch": gram_flops(samples, channels * positions),
        "folded": folded_flops(samples * channels, positions),
    }.get(which, [samples * n for n in one])
    if which == "target" and frozen.triangles:  # of the frozen features nothing is computed
        expected = [samples * n for n in (channels * (channels + 1) * positions, 2 * channels**2 * positions)]
    assert counted(function, *shape) == tuple(expected)


@pytest.mark.parametrize("first", ["qkernels.nn", "torch.utils.flop_counter"])
def test_any_order_of_imports(first: str) -> None:
    """And without a counter nothing is imported for it."""
    code = f"""
import importlib, sys
importlib.import_module({first!r})
import qkernels
layer = qkernels.nn.QuaternionLinear(4, 8)
assert ("torch.utils.flop_counter" in sys.modules) == ({first!r} != "qkernels.nn")
assert "triton" not in sys.modules or {first!r} != "qkernels.nn"
from torch.utils import flop_counter
import torch
with flop_counter.FlopCounterMode(display=False) as counter:
    layer(torch.ones(3, 4))
print(counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str(2 * 3 * 4 * 8), done.stderr


def test_every_operator_that_multiplies_has_a_formula() -> None:
    own = (op for op, functions in _library._functions.items() if functions.body.__module__.startswith("qkernels."))
    operators = {op.name().removeprefix("qkernels::").partition(".")[0] for op in own}
    assert operators - {*FORMULAS} == {"hamilton_pack", "hamilton_conv2d_dy"}  # which copy, and choose elements
