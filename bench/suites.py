"""The suites by name, and the headline cases, which have further measurements."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from bench.atl import ATL
from bench.case import STEP, Case, Provider, Suite
from bench.layers import CALLS, COMPILED, CONV, FORMS, LAYERS, LINEAR, layer_case
from bench.network import CACHED, EPOCHS, INFERENCE, NETWORKS, NO_AT, STEPS, TRAIN

AT = "AT at layer 2"


def _on_cpu(case: Any, **changes: Any) -> Any:
    return replace(case, suite="cpu", precision="float32", modes=("eager",), rank=0, **changes)


def _cpu() -> list[Suite]:
    """Suites for a CPU that take some minutes; whole networks at full width mostly with batches of 4."""
    small: dict[str, Any] = {"width": 1 / 8, "samples": 200, "variant": "width 1/8, 200 clips"}
    narrow: dict[str, Any] = {"width": 1 / 8, "variant": "width 1/8"}
    layers = [_on_cpu(layer_case(layer, "quaternion", 20, "float32", STEP)) for layer in LAYERS[:11]]
    calls = [_on_cpu(layer_case(layer, "quaternion", 1, "float32", STEP)) for layer in CALLS]
    paper = ATL.where(network="quaternion", variant="paper", batch=20, precision="bf16", work=STEP)
    losses = [_on_cpu(case) for case in paper]
    plain = [(NO_AT, ""), (AT, "")]
    more = [("AT at layer 7", ""), ("AT at layer 13", ""), (AT, CACHED), ("AT at layer 13", CACHED)]
    steps = [
        _on_cpu(STEPS.where(network=network, layer=layer, variant=variant, work=TRAIN)[0], batch=4)
        for network in NETWORKS
        for layer, variant in (plain + more if network == "quaternion" else plain)
    ]
    compiled = [STEPS.where(network="quaternion", layer=layer, variant=COMPILED, work=TRAIN)[0] for layer, _ in plain]
    steps += [_on_cpu(case, batch=20) for case in compiled]
    logits = [INFERENCE.where(network=network, batch=1)[0] for network in NETWORKS]
    quaternion = [INFERENCE.where(network="quaternion", batch=batch)[0] for batch in (1, 20)]
    inference = [*map(_on_cpu, logits + quaternion[1:]), *(_on_cpu(case, **narrow) for case in quaternion)]
    epochs = [_on_cpu(EPOCHS.where(network="quaternion", layer=layer)[0], **small) for layer, _ in plain]
    parts = ((layers + calls, CONV), (losses, ATL), (steps, STEPS), (inference, INFERENCE), (epochs, EPOCHS))
    return [Suite(cases, suite.providers) for cases, suite in parts]


SUITES: dict[str, Sequence[Suite]] = {
    "step": [STEPS],
    "conv": [CONV],
    "atl": [ATL],
    "linear": [LINEAR],
    "inference": [INFERENCE],
    "epoch": [EPOCHS],
    "cpu": _cpu(),
    "forms": [FORMS],
}
ON_CPU = ("cpu", "forms")  # the other suites need a GPU


def chosen(names: Sequence[str], device: torch.device, smoke: bool) -> list[Suite]:
    """The suites with these names; by default all for the device except "forms", which takes long.

    Raises:
        ValueError: there is no such suite, or it is for another kind of device.
    """
    usable = [name for name in SUITES if smoke or (name in ON_CPU) == (device.type == "cpu")]
    for name in names:
        if name not in SUITES:
            raise ValueError(f"suite {name!r}: must be one of {', '.join(SUITES)}")
        if name not in usable:
            need = "a machine without GPU" if name in ON_CPU else "a CUDA device, and there is none"
            raise ValueError(f"suite {name!r}: needs {need}; this machine can run {', '.join(usable)}, or --smoke")
    return [suite for name in names or [n for n in usable if smoke or n != "forms"] for suite in SUITES[name]]


def _headline(suite: Suite, providers: Sequence[str], **wanted: Any) -> list[tuple[Case, Provider]]:
    case = suite.where(**wanted)[0]
    return [(case, provider) for provider in suite.providers if provider.name in providers]


def _gpu_headline() -> list[tuple[Case, Provider]]:
    """Ten cases (steps, losses, layers) with ours and the best-known baseline."""
    pairs, both = [], ("ours", "research style")
    for network, layer in (("quaternion", AT), ("real", AT), ("quaternion", NO_AT), ("real", NO_AT),
                           ("quaternion", "AT at layer 13")):  # fmt: skip
        pairs += _headline(STEPS, both, network=network, layer=layer, variant="", work=TRAIN)
    for layer in ("layers 1-2", "layers 11-13"):
        pairs += _headline(ATL, ("ours", "materialised"), network="quaternion", layer=layer, variant="paper")
    for layer in ("conv 2", "conv 6-7", "conv 11-13"):
        pairs += _headline(CONV, ("ours auto", "concatenated, NHWC"), network="quaternion", layer=layer, work=STEP)
    return pairs


def _cpu_headline() -> list[tuple[Case, Provider]]:
    """Whole steps, to measure their memory; a loss and a layer."""
    layers, losses, steps, *_ = SUITES["cpu"]
    pairs = []
    for network, layer in (("quaternion", NO_AT), ("quaternion", AT), ("real-on-embedding", NO_AT), ("real", NO_AT),
                           ("real", AT)):  # fmt: skip
        pairs += _headline(steps, ("ours", "research style"), network=network, layer=layer, variant="")
    pairs += _headline(losses, ("ours", "materialised"), layer="layers 1-2", variant="paper")
    pairs += _headline(layers, ("ours auto", "concatenated, NCHW"), layer="conv 6-7")
    return pairs


HEADLINE = {"cuda": _gpu_headline(), "cpu": _cpu_headline()}
