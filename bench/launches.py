"""Counts the kernels that a training step of the quaternion network launches on a GPU; needs no GPU.

The step is that of `qat train`, on tensors without data. Our kernels are recorded instead of launched. A PyTorch
operator counts if it would launch a kernel; libraries may launch more than one kernel for an operator.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qkernels
from bench.network import CACHED, CLASSES, TRAIN, NetworkCase, network_case, training
from bench.run import tensor_bytes
from qat.config import NetworkConfig
from qat.data.rows import Rows
from qat.models import SpeechClassifier
from qat.models.vgg import INPUT, VGG16
from qat.training.examples import Batch
from qat.training.steps import WARM, Steps
from qkernels.ops._library import implementation
from qkernels.runtime.recording import Launch, Recording, record

PARTS = ("gather", "twin", "forward", "loss", "backward", "optimiser", "sums")
ARCH = 90
CPU = torch.device("cpu")
# Operators that allocate or reinterpret memory without a kernel, and are not marked as views.
SILENT = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "_unsafe_view"}
# Limits of one multi-tensor kernel: number of tensors, by the number of tensor lists, and number of blocks of elements
# (MultiTensorApply.cuh of PyTorch 2.11; ten times as many from 2.12 on with CUDA 13).
TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
BLOCKS, BLOCK_ELEMENTS = 320, 65536


class Event(NamedTuple):
    """One kernel of a step: part, name, the launch if it is ours, and size of its tensors in bytes, each counted
    once."""

    part: str
    name: str
    launch: Launch | None
    bytes: int


def step_case(at: int, cached: bool, batch: int, precision: str) -> NetworkCase:
    """A training step of the quaternion network with anti-transfer at layer `at`; 0: none."""
    variant = CACHED if cached else ""
    return network_case("step", "quaternion", at, precision, TRAIN, batch=batch, variant=variant)


def cases() -> list[NetworkCase]:
    """The cases that are reported."""
    return [
        step_case(at, cached, batch, precision)
        for precision, batch, at in itertools.product(("bf16", "float32"), (20, 256), (0, 2, 7, 13))
        for cached in ((False, True) if at else (False,))
    ]


def step_launches(case: NetworkCase, arch: int = ARCH) -> list[Event]:
    """The kernels of a step in their order, after the warm steps."""
    samples = torch.arange(case.batch)  # not a fake tensor: its values are read
    with FakeTensorMode(allow_non_fake_inputs=True), qkernels.set_backend("triton"), record(arch) as recording:
        config, (channels, *size) = NetworkConfig(domain="quaternion"), INPUT["quaternion"]
        inputs = Rows(torch.empty(case.batch, *size, channels).permute(0, 3, 1, 2), CPU)
        targets, twin = Rows(torch.zeros(case.batch, dtype=torch.long), CPU), VGG16(config, CLASSES)
        classifier = SpeechClassifier(config, CLASSES)
        trained = training(case, classifier, twin if case.at else None, inputs, targets, samples)
        steps, batch = Steps(*trained, CPU, training=True), Batch({"numbers": samples}, case.batch, case.batch)
        counter = _Counter(recording)
        with steps.running(True), counter:
            for _ in range(WARM):
                counter.events.clear()
                steps.train(batch)
        return counter.events


def by_part(events: Iterable[Event]) -> dict[str, int]:
    """The number of kernels of each part."""
    counts = Counter(event.part for event in events)
    return {part: counts[part] for part in PARTS}


def where(case: NetworkCase) -> str:
    """The layer of anti-transfer as text."""
    return f"{case.at}, cached" if case.variant == CACHED else str(case.at or "none")


def fields(case: NetworkCase) -> dict[str, Any]:
    """The fields of a case, for JSON."""
    plain = {"network": case.network, "at_layer": case.at, "cached": case.variant == CACHED}
    return plain | {"batch": case.batch, "precision": case.precision}


def plain() -> list[dict[str, Any]]:
    """The numbers of launches of all cases, for JSON."""
    counted = [(case, step_launches(case)) for case in cases()]
    return [{**fields(case), "launches": len(events), "by_part": by_part(events)} for case, events in counted]


def report() -> Iterator[str]:
    """A table of launches by part, then the launches of the first case with anti-transfer."""
    yield f"{'AT at':12}{'batch':>5}  {'precision':9}" + "".join(f"{part:>11}" for part in (*PARTS, "launches"))
    shown: tuple[NetworkCase, list[Event]] | None = None
    for case in cases():
        events = step_launches(case)
        numbers = "".join(f"{n:11}" for n in (*by_part(events).values(), len(events)))
        yield f"{where(case):12}{case.batch:5}  {case.precision:9}{numbers}"
        if shown is None and case.at:
            shown = case, events
    if shown:
        case, events = shown
        yield f"\nAT at {where(case)}, batch {case.batch}, {case.precision}"
        counts = Counter((event.part, event.name) for event in events)
        for (part, name), n in sorted(counts.items(), key=lambda item: (PARTS.index(item[0][0]), -item[1])):
            yield f"{part:12}{n:5}  {name}"


class _Counter(TorchDispatchMode):
    """Collects the kernels that would be launched, by part; the training step marks its parts."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self._recording = recording
        self._marks: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "qkernels":
            with self:
                result = implementation(func)(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        self._ours()
        if func.namespace == "profiler":
            if "enter" in func.name():
                self._marks.append(args[0])
            else:
                self._marks.pop()
        elif func.namespace == "aten":
            count, name = _kernels(func, args, result)
            size = tensor_bytes((args, kwargs, result)) // max(count, 1)
            self.events += [Event(self._part, name, None, size)] * count
        return result

    def _ours(self) -> None:
        """Collect the launches that were recorded since the last call."""
        for entry in self._recording.launches:
            # Without its tensors: a reference to a gradient would make autograd copy it.
            size = tensor_bytes(entry.arguments)
            launch = replace(entry, arguments={name: _described(value) for name, value in entry.arguments.items()})
            self.events.append(Event(self._part, entry.kernel.__name__, launch, size))
        self._recording.launches.clear()

    @property
    def _part(self) -> str:
        """The innermost marked part; after the last mark, the sums of losses are computed."""
        return next((mark for mark in reversed(self._marks) if mark in PARTS), PARTS[-1])


def _described(value: Any) -> Any:
    """An argument whose tensors are replaced by tensors without memory."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, tuple):
        inner = [_described(part) for part in value]
        return type(value)(*inner) if hasattr(value, "_fields") else tuple(inner)
    return value


def _kernels(func: Any, args: tuple[Any, ...], result: Any) -> tuple[int, str]:
    """Number of kernels that an operator launches, and its name."""
    name = func.overloadpacket.__name__
    if name.startswith(("_foreach", "_fused")):
        lists = [arg for arg in args if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor)]
        if name.startswith("_fused"):
            lists.pop()  # the numbers of steps
        return _multi_tensor(len(lists), [x.numel() for x in lists[0]]), name
    written = [x for x in tree_leaves((result, args[0] if func._schema.is_mutable else None)) if isinstance(x, Tensor)]
    if func.is_view or name in SILENT or not any(x.numel() for x in written):
        return 0, name
    if name == "_to_copy" and args[0].dtype != result.dtype:
        return 1, f"cast of {str(args[0].dtype)[6:]} to {str(result.dtype)[6:]}"
    return 1, name


def _multi_tensor(depth: int, sizes: Iterable[int]) -> int:
    """Number of launches for lists of tensors of these sizes; each launch has a maximum of tensors and of blocks."""
    launches = tensors = blocks = 0
    for size in sizes:
        tensors += 1
        left = -(-size // BLOCK_ELEMENTS)
        while left:
            taken = min(left, BLOCKS - blocks)
            left, blocks = left - taken, blocks + taken
            if blocks == BLOCKS or (not left and tensors == TENSORS[depth]):
                launches, blocks, tensors = launches + 1, 0, int(left > 0)
    return launches + (blocks > 0)
