"""What a training step launches, counted without a GPU."""

import importlib.util
import json
import os
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import __main__ as bench
from bench import launches
from bench.launches import PARTS, by_part, step_case, step_launches

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="kernels are recorded, and so have to be there, as for a GPU",
)

# The most that a step of 20 samples in bfloat16 may launch, by the layer of anti-transfer.
LIMITS = {0: 69, 2: 75, 13: 86}


def step(at_layer: Any, cached: bool = False, batch: int = 20, precision: str = "bf16", arch: int = 90) -> Any:
    return step_launches(step_case(at_layer, cached, batch, precision), arch)


def names(events: Any, part: Any = None) -> Any:
    return [event.name for event in events if part in (None, event.part)]


@pytest.mark.parametrize("at_layer", LIMITS)
def test_a_step_launches_no_more_than(at_layer: Any) -> None:
    events = step(at_layer)
    assert len(events) <= LIMITS[at_layer], by_part(events)


def test_parts_of_a_step() -> None:
    events = step(2)
    parts = [event.part for event in events]
    assert sum(by_part(events).values()) == len(events)
    # Each part is in one piece; the twin and the loss, which are parts of the forward pass, are somewhere in it.
    inside = ["forward" if part in ("twin", "loss") else part for part in parts]
    pieces = [part for before, part in zip([None, *inside], inside, strict=False) if part != before]
    assert pieces == ["gather", "forward", "backward", "optimiser", "sums"]
    assert names(events, "gather") == ["index_select"] * 2
    assert names(events, "optimiser") == ["_foreach_add_", "_fused_adam_"]
    assert "_gram_kernel" in names(events, "loss")
    assert "nll_loss_forward" in names(events, "loss")
    assert names(events, "forward").count("randint") == 2  # the seeds of the hidden layers' dropout
    assert all("gram" not in name for name in names(events, "forward"))
    for event in events:
        assert (event.launch is not None) == (event.name.endswith("_kernel"))


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_weights_are_packed_in_one_launch_and_a_frozen_twins_never_again(precision: str) -> None:
    for at_layer in (0, 2, 13):
        events = step(at_layer, precision=precision)
        assert names(events).count("_hamilton_pack_kernel") == 1
        assert "_hamilton_pack_kernel" in names(events, "forward")


def test_a_layer_is_two_kernels_backward_and_one_forward() -> None:
    """ReLU, dropout, pools and flattening among them; where a pool or a tap is, one puts the gradient together."""
    events = step(0)
    assert names(events, "forward").count("_hamilton_conv_kernel") == 13 + 2
    assert names(events, "backward").count("_hamilton_conv_dw_kernel") == 13 + 2
    assert names(events, "backward").count("_hamilton_conv_kernel") == 13 + 2 - 1
    assert names(events, "backward").count("_hamilton_gradient_kernel") == 5 + 1  # the last hidden layer's mask
    copies = {"clone", "copy_", "cat", "contiguous", "relu", "native_dropout", "threshold_backward", "max_pool2d"}
    assert not copies & set(names(events))


def test_what_is_cached_is_picked_and_not_computed() -> None:
    cached, plain, without = step(13, cached=True), step(13), step(0)
    assert by_part(cached)["twin"] == 0 < by_part(plain)["twin"]
    assert names(cached, "gather") == ["index_select"] * 4
    assert names(cached, "backward") == names(plain, "backward")
    assert names(cached, "forward") == names(without, "forward")


def test_nothing_is_cast_in_float32() -> None:
    assert not any("cast" in name for name in names(step(2, precision="float32")))
    assert [name for name in names(step(2)) if "cast" in name] == ["cast of float32 to bfloat16"]  # of the input


@pytest.mark.parametrize("arch", [80, 100])
def test_other_architectures(arch: int) -> None:
    assert {event.part for event in step(2, arch=arch)} == set(PARTS)


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counted: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count, name = launches._kernels(func, args, result)
        self.counted += [name] * count
        return result


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.view(-1).view(4, 6)[1:].t().expand(2, 6, 3).detach(), []),
        (lambda x: torch.empty_like(x).new_empty(3), []),
        (lambda x: x.to(torch.float32).contiguous(), []),
        (lambda x: x[:0] + 1, []),
        (lambda x: x.to(torch.bfloat16), ["cast of float32 to bfloat16"]),
        (lambda x: x.t().contiguous(), ["clone"]),
        (lambda x: x.add_(1).copy_(x), ["add_", "copy_"]),
        (lambda x: torch.stack([x, x]).sum(), ["stack", "sum"]),
        (lambda x: x.zero_(), ["zero_"]),
        (lambda x: torch._foreach_add_([x, x, x], 1), ["_foreach_add_"]),
        (lambda x: torch._foreach_add_([x.sum() for _ in range(111)], 1), ["sum"] * 111 + ["_foreach_add_"] * 2),
    ],
)
def test_what_an_operator_launches(function: Any, expected: Any) -> None:
    with Counting() as counting:
        function(torch.empty(4, 6, device="meta"))
    assert counting.counted == expected


@pytest.mark.parametrize(
    ("depth", "sizes", "expected"),
    [
        (4, [1] * 36, 1),
        (4, [1] * 37, 2),
        (4, [320 * 65536], 1),
        (4, [320 * 65536 + 1], 2),
        (4, [319 * 65536, 65536 + 1], 2),
        # The part of a tensor that is left counts among the next launch's.
        (4, [319 * 65536, 65536 + 1] + [1] * 35, 2),
        (4, [319 * 65536, 65536 + 1] + [1] * 36, 3),
        (1, [0, 0], 0),
        (1, [1] * 220, 2),
    ],
)
def test_kernels_for_many_tensors(depth: int, sizes: Any, expected: int) -> None:
    assert launches._multi_tensor(depth, sizes) == expected


def test_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [step_case(2, True, 20, "bf16")]
    monkeypatch.setattr(launches, "cases", lambda: wanted)
    assert bench.main(["launches", "--json"]) == 0
    (case,) = json.loads(capsys.readouterr().out)["cases"]
    assert case | {"launches": 0, "by_part": {}} == {
        "network": "quaternion",
        "at_layer": 2,
        "cached": True,
        "batch": 20,
        "precision": "bf16",
        "launches": 0,
        "by_part": {},
    }
    assert case["launches"] == sum(case["by_part"].values()) > 50
    assert [*case["by_part"]] == [*PARTS]
    assert bench.main(["launches"]) == 0
    text = capsys.readouterr().out
    assert "2, cached" in text
    assert "_fused_adam_" in text
