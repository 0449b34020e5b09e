"""Counts what a training step of the quaternion network launches on a GPU, on a machine without one.

The step is that of `qat train`, on tensors without data. Our kernels are recorded where they would be launched; of
PyTorch's operators those count that would launch a kernel. Libraries may launch more than one kernel for one of theirs.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qkernels
from bench.network import CLASSES, LEARNING_RATE
from qat.anti_transfer import AntiTransfer
from qat.config import AntiTransferConfig, NetworkConfig, TrainingConfig
from qat.data.rows import Rows
from qat.models import SpeechClassifier
from qat.models.vgg import INPUT, VGG16
from qat.training.examples import Batch, Examples
from qat.training.objectives import ClassificationObjective
from qat.training.steps import WARM, Steps, autocast
from qkernels.runtime.recording import Launch, Recording, record

PARTS = ("gather", "twin", "forward", "loss", "backward", "optimiser", "sums")
ARCH = 90
CPU = torch.device("cpu")
# What allocates, or looks at memory in another way, and is not marked as a view.
SILENT = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "_unsafe_view"}
# A kernel for many tensors, by the lists of them that it is given: so many tensors, and so many blocks of so many
# elements, for each launch (MultiTensorApply.cuh of PyTorch 2.11; ten times as many from 2.12 on with CUDA 13).
TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
BLOCKS, BLOCK_ELEMENTS = 320, 65536


class Event(NamedTuple):
    """One kernel of a step: in which part, its name; if it is ours, all of it; bytes of its tensors, each once."""

    part: str
    name: str
    launch: Launch | None
    bytes: int


@dataclass(frozen=True, kw_only=True)
class StepCase:
    """A training step of the quaternion network.

    Args:
        at_layer: of anti-transfer, or 0.
        cached: the twin does not run: what it gives was computed before.
        batch: samples.
        precision: as in `TrainingConfig`.
    """

    at_layer: int
    cached: bool
    batch: int
    precision: str

    @property
    def where(self) -> str:
        """The layer of anti-transfer, in words."""
        return f"{self.at_layer}, cached" if self.cached else str(self.at_layer or "none")


def cases() -> list[StepCase]:
    """Those that are reported."""
    return [
        StepCase(at_layer=at_layer, cached=cached, batch=batch, precision=precision)
        for precision, batch, at_layer in itertools.product(("bf16", "float32"), (20, 256), (0, 2, 7, 13))
        for cached in ((False, True) if at_layer else (False,))
    ]


def step_launches(case: StepCase, arch: int = ARCH) -> list[Event]:
    """The kernels of a step in their order, as it is when the first ones are over."""
    samples = torch.arange(case.batch)  # numbers that are known
    with FakeTensorMode(allow_non_fake_inputs=True), qkernels.set_backend("triton"), record(arch) as recording:
        steps, batch = _steps(case, samples)
        counter = _Counter(recording)
        with steps.running(True), counter:
            for _ in range(WARM):
                counter.events.clear()
                steps.train(batch)
        return counter.events


def by_part(events: Iterable[Event]) -> dict[str, int]:
    """How many there are in each part."""
    counted = Counter(event.part for event in events)
    return {part: counted[part] for part in PARTS}


def report(wanted: Sequence[StepCase]) -> Iterator[str]:
    """A table of launches by part, then what is launched in the first case with anti-transfer."""
    yield f"{'AT at':12}{'batch':>5}  {'precision':9}" + "".join(f"{part:>11}" for part in (*PARTS, "launches"))
    shown: tuple[StepCase, list[Event]] | None = None
    for case in wanted:
        events = step_launches(case)
        numbers = "".join(f"{n:11}" for n in (*by_part(events).values(), len(events)))
        yield f"{case.where:12}{case.batch:5}  {case.precision:9}{numbers}"
        if shown is None and case.at_layer:
            shown = case, events
    if shown:
        case, events = shown
        yield f"\nAT at {case.where}, batch {case.batch}, {case.precision}"
        counted = Counter((event.part, event.name) for event in events)
        for (part, name), n in sorted(counted.items(), key=lambda item: (PARTS.index(item[0][0]), -item[1])):
            yield f"{part:12}{n:5}  {name}"


def plain(case: StepCase) -> dict[str, Any]:
    """The launches of a case, for a program."""
    events = step_launches(case)
    return {"network": "quaternion", **vars(case), "launches": len(events), "by_part": by_part(events)}


def _steps(case: StepCase, samples: Tensor) -> tuple[Steps, Batch]:
    """What `qat train` runs when the samples' embeddings fit into the GPU's memory, as they do."""
    config = NetworkConfig(domain="quaternion")
    channels, *size = INPUT["quaternion"]
    inputs = Rows(torch.empty(case.batch, *size, channels).permute(0, 3, 1, 2), CPU)
    rows = {"inputs": inputs, "targets": Rows(torch.zeros(case.batch, dtype=torch.long), CPU)}
    training = TrainingConfig(lr=LEARNING_RATE, batch=case.batch, precision=case.precision)  # type: ignore[arg-type]
    anti_transfer = None
    if case.at_layer:
        anti_transfer = AntiTransfer(
            AntiTransferConfig(random_twin=True, layers=[case.at_layer]), VGG16(config, CLASSES)
        )
        if case.cached:
            with autocast(case.precision, CPU):
                rows |= anti_transfer.remember(inputs.fetch, samples, case.batch)
    classifier = SpeechClassifier(config, CLASSES)
    objective = ClassificationObjective(classifier, anti_transfer, embedded=True, multi_label=False).train()
    steps = Steps(objective, Examples(rows), training, CPU, training=True)
    return steps, Batch({"numbers": samples}, case.batch, case.batch)


class _Counter(TorchDispatchMode):
    """Notes what would be launched; the program's own marks say in which part."""

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
                result = OPDEFS[func.name()]._init_fn(*args, **(kwargs or {}))
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
            size = _bytes((args, kwargs, result)) // max(count, 1)
            self.events += [Event(self._part, name, None, size)] * count
        return result

    def _ours(self) -> None:
        """Notes the launches that were recorded since."""
        for entry in self._recording.launches:
            # Whoever holds a gradient makes autograd copy it.
            size = _bytes(entry.arguments)
            launch = replace(entry, arguments={name: _described(value) for name, value in entry.arguments.items()})
            self.events.append(Event(self._part, entry.kernel.__name__, launch, size))
        self._recording.launches.clear()

    @property
    def _part(self) -> str:
        """The innermost; behind the last are the sums of losses over a pass."""
        return next((mark for mark in reversed(self._marks) if mark in PARTS), PARTS[-1])


def _bytes(values: Any) -> int:
    """Of the tensors among these, each once."""
    tensors = {id(x): x for x in tree_leaves(values) if isinstance(x, Tensor)}
    return sum(x.numel() * x.itemsize for x in tensors.values())


def _described(value: Any) -> Any:
    """Tensors without memory in the place of an argument's."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, tuple):
        inner = [_described(part) for part in value]
        return type(value)(*inner) if hasattr(value, "_fields") else tuple(inner)
    return value


def _kernels(func: Any, args: tuple[Any, ...], result: Any) -> tuple[int, str]:
    """How many kernels an operator launches, and its name."""
    name = func.overloadpacket.__name__
    if name.startswith(("_foreach", "_fused")):
        lists = [arg for arg in args if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor)]
        if name.startswith("_fused"):
            lists.pop()  # the numbers of steps
        return _multi_tensor(len(lists), [x.numel() for x in lists[0]]), name
    made = [x for x in tree_leaves((result, args[0] if func._schema.is_mutable else None)) if isinstance(x, Tensor)]
    if func.is_view or name in SILENT or not any(x.numel() for x in made):
        return 0, name
    if name == "_to_copy" and args[0].dtype != result.dtype:
        return 1, f"cast of {str(args[0].dtype)[6:]} to {str(result.dtype)[6:]}"
    return 1, name


def _multi_tensor(depth: int, sizes: Iterable[int]) -> int:
    """Launches for lists of tensors of these sizes: one ends when its tensors or its blocks are used up."""
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
