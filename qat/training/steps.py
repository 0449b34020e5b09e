"""Training and evaluation steps; on a GPU, each is one captured CUDA graph.

At the paper's batch of 20 a step of the quaternion network is a quarter of a millisecond of arithmetic in some two
hundred kernels; launching them one by one from Python takes longer than running them.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from qat.config import TrainingConfig
from qat.training import distributed
from qat.training.examples import Batch, Examples
from qat.training.objectives import Losses
from qkernels.runtime.precision import switched

WARM = 3
"""Steps of each kind before it is captured, while kernels are compiled and libraries and Adam allocate memory."""

SYNC_WARNING = "called a synchronizing CUDA operation"
"""Beginning of PyTorch's warning (`warn_or_error_on_sync` in its c10/cuda/CUDAFunctions.cpp)."""

log = logging.getLogger(__name__)

Loaded = Mapping[str, Tensor]
Function = Callable[[Loaded], Any]
Around = Callable[[Batch], contextlib.AbstractContextManager[object]]


@contextlib.contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """Computes in ``training.precision``: ``tf32``, full float32, or ``bf16`` by autocast."""
    with switched(name), autocast(name, device):
        yield


def autocast(name: str, device: torch.device) -> torch.autocast:
    """Autocast for a forward pass; does nothing unless ``name`` is ``bf16``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16")


def adam(parameters: Iterable[nn.Parameter], config: TrainingConfig, device: torch.device) -> torch.optim.Adam:
    """Fused Adam; on a GPU it can be captured in a CUDA graph, with a learning rate that may change later."""
    cuda = device.type == "cuda"
    lr = torch.tensor(config.lr, device=device) if cuda else config.lr
    trainable = [p for p in parameters if p.requires_grad]
    return torch.optim.Adam(trainable, lr, weight_decay=config.weight_decay, fused=True, capturable=cuda)


class Steps:
    """The steps of a training, or of an evaluation.

    Args:
        objective: module ``(inputs=, targets=, ...) -> Losses`` on ``device``; its arguments are the rows of
            ``examples``.
        examples: source of all batches.
        config: optimisation settings.
        device: device to compute on.
        training: create an optimiser; not needed to evaluate.
    """

    def __init__(
        self, objective: nn.Module, examples: Examples, config: TrainingConfig, device: torch.device, *, training: bool
    ) -> None:
        self.objective, self.examples, self.config, self.device = objective, examples, config, device
        self.optimizer = adam(objective.parameters(), config, device) if training else None
        self.around: Around = lambda batch: contextlib.nullcontext()
        self.graphs: Graphs | None = None
        self._wrapped = distributed.parallel(objective) if training else objective
        self._names: list[str] = []
        self._sums: Tensor | None = None
        if device.type == "cuda" and config.capture:
            if distributed.world_size() == 1:
                self.graphs = Graphs()
            elif distributed.rank() == 0:
                log.warning("training.capture: the steps of several processes are not captured as CUDA graphs")

    @contextlib.contextmanager
    def running(self, training: bool) -> Iterator[None]:
        """Context of all steps of a pass: train or eval mode, precision, and on a GPU the stream; sums start at 0."""
        self.objective.train(training)
        stream = self.graphs.on_stream() if self.graphs else contextlib.nullcontext()
        with stream, switched(self.config.precision), torch.set_grad_enabled(training):
            if self._sums is not None:
                self._sums.zero_()
            yield

    def train(self, batch: Batch) -> Tensor:
        """Forward and backward pass, clipping and the optimiser's step; adds the losses to the sums.

        Returns:
            Total loss before the step, on the device; the next step may overwrite it.
        """

        def step(loaded: Loaded) -> Tensor:
            assert self.optimizer is not None
            self.optimizer.zero_grad()
            losses, _ = self._losses(self._wrapped, loaded)
            total = losses.total
            if distributed.world_size() > 1:  # DDP averages over processes, however large their shares
                total = total * (batch.samples * distributed.world_size() / batch.whole)
            with record_function("backward"):
                total.backward()
            with record_function("optimiser"):
                if self.config.clip is not None:
                    torch.nn.utils.clip_grad_norm_(self.objective.parameters(), self.config.clip)
                self.optimizer.step()
            self._add(losses, batch.samples)
            return losses.total.detach()

        with self.around(batch):
            return self._run("train", step, batch.loaded)

    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Outputs and targets of a batch, on the device; adds the losses to the sums."""

        def step(loaded: Loaded) -> tuple[Tensor, Tensor]:
            losses, targets = self._losses(self.objective, loaded)
            self._add(losses, batch.samples)
            return losses.outputs.float(), targets

        outputs, targets = self._run("evaluate", step, batch.loaded)
        # The next replay of a graph overwrites its results.
        return (outputs.clone(), targets.clone()) if self.graphs else (outputs, targets)

    def end(self) -> None:
        """End the training: from now on the steps evaluate only.

        DistributedDataParallel would keep the group of processes beyond its end where an error's traceback keeps this
        object. Python then frees the group with its lock held, which the group's own thread may wait for: a deadlock.
        """
        self._wrapped = self.objective

    def sums(self) -> dict[str, float]:
        """Sums of ``total`` and of each part over this process's samples of this pass."""
        return dict(zip(self._names, [] if self._sums is None else self._sums.tolist(), strict=True))

    def _losses(self, objective: nn.Module, loaded: Loaded) -> tuple[Losses, Tensor]:
        with record_function("gather"):
            batch = self.examples.gather(loaded)
        with record_function("forward"), autocast(self.config.precision, self.device):
            losses: Losses = objective(**batch)
        return losses, batch["targets"]

    def _add(self, losses: Losses, samples: int) -> None:
        means = {"total": losses.total.detach(), **losses.parts}
        if self._sums is None:
            self._names = list(means)
            self._sums = torch.zeros(len(means), device=self.device)
        self._sums.add_(torch.stack([means[name] for name in self._names]), alpha=samples)

    def _run(self, name: str, step: Function, loaded: Loaded) -> Any:
        return self.graphs.run(name, step, loaded) if self.graphs else step(loaded)


class Graphs:
    """Runs functions of tensors on a separate stream, from the fourth call of a kind on as a captured CUDA graph.

    The first calls compute like any other and capturing computes nothing, so the training is the same with and without.
    Calls are of one kind if they have the same name and the same tensor sizes; a pass has two kinds if its last batch
    is shorter.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.warm: float = WARM
        self._pool = torch.cuda.graph_pool_handle()  # shared: graphs never run at the same time
        self._calls: dict[object, int] = {}
        self._captured: dict[object, tuple[Callable[[], None], dict[str, Tensor], Any]] = {}
        self._failed = False

    @contextlib.contextmanager
    def on_stream(self) -> Iterator[None]:
        """Run on this object's stream, after all work already submitted and before all that follows."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def run(self, name: str, function: Function, tensors: Loaded) -> Any:
        """``function(tensors)``, or a replay of it; the next replay overwrites the results."""
        kind = (name, *((key, tuple(value.shape)) for key, value in tensors.items()))
        if kind not in self._captured:
            self._calls[kind] = self._calls.get(kind, 0) + 1
            if self._failed or self._calls[kind] < self.warm:
                return function(tensors)
            if self._calls[kind] == self.warm:
                with synchronisations() as warned:
                    results = function(tensors)
                if warned:
                    self._give_up(warned[0])
                return results
            if not self._capture(kind, function, tensors):
                return function(tensors)
        replay, static, results = self._captured[kind]
        for key, value in tensors.items():
            static[key].copy_(value, non_blocking=True)
        replay()
        return results

    def _capture(self, kind: object, function: Function, tensors: Loaded) -> bool:
        static = {key: torch.empty_like(value).copy_(value) for key, value in tensors.items()}
        try:
            replay, results = captured(lambda: function(static), self.stream, self._pool)
        except RuntimeError as error:
            # The end of a failed capture raises once more, which hides the reason.
            reason = error.__context__ or error
            self._give_up(str(reason).strip().partition("\n")[0] or repr(reason))
            return False
        self._captured[kind] = replay, static, results
        return True

    def _give_up(self, reason: str) -> None:
        self._failed = True
        log.warning("training.capture: no CUDA graph can hold these steps, which run uncaptured: %s", reason)


@contextlib.contextmanager
def synchronisations() -> Iterator[list[str]]:
    """Collects warnings of operations that make the host wait for the GPU, with which a capture would fail.

    PyTorch before 2.12 does not recover from a failed capture (its pull requests 176752 and 180395).
    """
    warned: list[str] = []
    _sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield warned
    finally:
        _sync_debug_mode("default")
    for warning in caught:
        if str(warning.message).startswith(SYNC_WARNING):
            warned.append(SYNC_WARNING)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _sync_debug_mode(mode: str) -> None:
    """Set PyTorch's mode, without its notice that it "does not yet detect all synchronizing operations"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)


def captured(function: Callable[[], Any], stream: torch.cuda.Stream, pool: Any) -> tuple[Callable[[], None], Any]:
    """A CUDA graph of ``function``: its replay, and its results, which each replay overwrites."""
    graph = torch.cuda.CUDAGraph()
    # Other threads read the next batches meanwhile, which "global" would forbid.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        results = function()
    return graph.replay, results
