"""The training loop: standard PyTorch, with early stopping, checkpoints, resuming and several processes."""

from __future__ import annotations

import csv
import io
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from qat.config import TrainingConfig, identity_settings
from qat.files import write_text
from qat.training import distributed
from qat.training.checkpoint import load_checkpoint, load_optimizer, optimizer_tensors, save_checkpoint
from qat.training.examples import batches
from qat.training.metrics import MetricsOf
from qat.training.steps import Steps
from qat.training.stopping import best_epoch, should_stop

History = list[dict[str, float]]


def fit(
    steps: Steps,
    state: nn.Module,
    train: Tensor,
    validation: Tensor,
    folder: Path,
    record: dict[str, Any],
    metrics_of: MetricsOf,
    *,
    resume: bool = False,
    title: str = "train",
    quiet: bool = False,
) -> History:
    """Minimise the objective until early stopping; keep the best and the last state on disk.

    Adam; every epoch visits the training part once in an order drawn from ``(seed, epoch)``; the total validation loss
    (anti-transfer included) decides which state is the best, when the learning rate falls and when to stop. Every batch
    is shared out over the processes and gradients are weighted by samples, so that the global batch is the same with
    any number of them.

    Args:
        steps: of the objective, with what is trained how on which device.
        state: the module inside the objective whose state is saved.
        train, validation: `[n]`, numbers of the samples of these parts.
        folder: run folder; gets ``model.safetensors``, ``last.safetensors``, ``metrics.csv`` and TensorBoard events.
        record: saved with the kept state; must hold ``kind`` and ``experiment``.
        metrics_of: metrics of the validation part, of which the numbers are logged as ``validation_*``.
        resume: go on from ``last.safetensors`` if it is there; the result equals an uninterrupted run.

    Returns:
        One row per epoch, as in ``metrics.csv``.

    Raises:
        FloatingPointError: the training loss is not finite.
        ValueError: ``last.safetensors`` is of another run.
    """
    config, optimizer = steps.config, steps.optimizer
    assert optimizer is not None
    history: History = []
    if resume and (folder / "last.safetensors").is_file():
        saved = load_checkpoint(folder / "last.safetensors", "training")
        if _but_execution(saved.record["of"]) != _but_execution(record):
            raise ValueError(f"{saved.path}: state of another experiment; resume with the same settings or start anew")
        saved.load_into(state, "state")
        load_optimizer(optimizer, saved.part("optimizer"))
        history = saved.record["history"]
    schedule = _Plateaus(optimizer, config)
    for loss in _losses(history):
        schedule.step(loss)
    leads = distributed.rank() == 0
    quiet = quiet or not leads
    with _Keeper(folder, steps, state, record, history, leads) as keeper, _progress(quiet) as progress:
        bar = progress.add_task(title, total=config.epochs, completed=len(history), note="")
        while not _finished(history, config):
            epoch = len(history)
            row: dict[str, float] = {"epoch": epoch}
            started = time.perf_counter()
            row |= {f"train_{k}": v for k, v in train_epoch(steps, train, epoch).items()}
            row["seconds"] = time.perf_counter() - started
            parts, outputs, targets = evaluate(steps, validation)
            metrics = parts | metrics_of(outputs, targets)
            row |= {f"validation_{k}": v for k, v in metrics.items() if isinstance(v, float)}
            history.append(row)
            schedule.step(row["validation_total"])
            keeper.keep(ended=_finished(history, config))
            distributed.barrier()
            note = f"loss {row['train_total']:.4f} validation {row['validation_total']:.4f}"
            progress.update(bar, advance=1, note=note)
    return history


def train_epoch(steps: Steps, train: Tensor, epoch: int) -> dict[str, float]:
    """One pass over the training part, a step of the optimizer for each batch.

    Args:
        steps: of the objective, the same in every process.
        train: `[n]`, numbers of the training samples.
        epoch: number of this pass, from 0; with the seed it gives the order of the samples and the dropout.

    Returns:
        Mean losses per sample, each from before its batch's step: ``total`` and the parts, over all processes.

    Raises:
        FloatingPointError: the mean total loss is not finite.
    """
    config = steps.config
    order_generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    # Dropout is drawn anew from (seed, epoch, rank), so that a resumed run continues as if never interrupted.
    torch.manual_seed((config.seed * 1_000_003 + epoch) * 1009 + distributed.rank())
    order = train[torch.randperm(len(train), generator=order_generator)]
    with steps.running(training=True):
        shared = distributed.rank(), distributed.world_size()
        for batch in batches(steps.examples, order, config.batch, steps.device, order_generator, shared):
            steps.train(batch)
        means = _means(steps.sums(), len(train))
    if not math.isfinite(means["total"]):
        raise FloatingPointError(
            f"training loss is {means['total']} in epoch {epoch}; a lower training.lr than {config.lr:g} may help"
        )
    return means


def evaluate(steps: Steps, samples: Tensor) -> tuple[dict[str, float], Tensor, Tensor]:
    """Mean losses per sample, outputs and targets of a part `[n]`, in eval mode, in the part's order.

    The samples are shared out over the processes; every process returns the whole result.
    """
    outputs: list[Tensor] = []
    targets: list[Tensor] = []
    mine = samples[distributed.rank() :: distributed.world_size()]
    with steps.running(training=False):
        for batch in batches(steps.examples, mine, steps.config.batch, steps.device):
            found, truth = steps.evaluate(batch)
            outputs.append(found)
            targets.append(truth)
        sums = steps.sums()
    return _means(sums, len(samples)), _interleaved(outputs), _interleaved(targets)


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by PyTorch's allocator on a GPU, by the whole process on a CPU (0 where nobody knows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _but_execution(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"experiment": identity_settings(record["experiment"])}


def _losses(history: History) -> list[float]:
    return [row["validation_total"] for row in history]


class _Plateaus:
    """Lowers the learning rate where the validation loss stays; what it did follows from the losses alone."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainingConfig) -> None:
        self._schedule = None
        if config.lr_factor < 1:
            patience = config.lr_patience - 1  # PyTorch counts the epochs that are waited for beyond the first
            self._schedule = ReduceLROnPlateau(optimizer, "min", config.lr_factor, patience, threshold=0, eps=0)

    def step(self, loss: float) -> None:
        if self._schedule is not None:
            self._schedule.step(loss)


def _finished(history: History, config: TrainingConfig) -> bool:
    stopped = bool(history) and should_stop(_losses(history), config.patience, config.stopping)
    return stopped or len(history) >= config.epochs


def _means(sums: dict[str, float], samples: int) -> dict[str, float]:
    """Mean per sample, from every process's sums over its own samples."""
    everyones = distributed.gather(sums)
    names = dict.fromkeys(name for one in everyones for name in one)
    return {name: sum(one.get(name, 0.0) for one in everyones) / samples for name in names}


def _interleaved(batches: list[Tensor]) -> Tensor:
    """All processes' rows in the order of the samples, undoing ``[rank::world_size]``."""
    whole_share = torch.cat(batches).cpu() if batches else None
    shares = [share for share in distributed.gather(whole_share) if share is not None]
    whole = shares[0].new_empty(sum(map(len, shares)), *shares[0].shape[1:])
    for rank, share in enumerate(shares):
        whole[rank :: distributed.world_size()] = share
    return whole


def _progress(quiet: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        disable=quiet,
    )


class _Keeper:
    """Writes the kept state, the last one and the rows of ``history``, now and then: the disk shall not set the pace.

    An interrupted training goes on from the last state that was written, and the kept one belongs to it. Rows are also
    written on the way out, whatever ended the training.
    """

    def __init__(
        self, folder: Path, steps: Steps, state: nn.Module, record: dict[str, Any], history: History, leads: bool
    ) -> None:
        self.folder, self.steps, self.state, self.record = folder, steps, state, record
        self.history, self.leads = history, leads
        self._best: tuple[int, dict[str, Tensor]] | None = None
        self._written = -math.inf
        self._logged = len(history)

    def __enter__(self) -> _Keeper:
        if self.leads:
            from torch.utils.tensorboard import SummaryWriter

            # What an interrupted training logged beyond the state that it is resumed from comes again.
            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self._logged or None)
        return self

    def __exit__(self, *_: object) -> None:
        if self.leads:
            try:
                self._write_rows()
            finally:
                self._board.close()

    def keep(self, *, ended: bool) -> None:
        """Note an epoch's end; write what has not been for ``training.checkpoint_seconds``, at the end all."""
        if not self.leads:
            return
        config, epoch = self.steps.config, len(self.history) - 1
        due = ended or time.monotonic() - self._written >= config.checkpoint_seconds
        if config.keep == "last" and due:
            self._best = epoch, self.state.state_dict()
        elif config.keep == "best" and best_epoch(_losses(self.history)) == epoch:
            tensors = self.state.state_dict()
            self._best = epoch, tensors if due else {name: tensor.clone() for name, tensor in tensors.items()}
        if due:
            if self._best is not None:
                best, tensors = self._best
                save_checkpoint(self.folder / "model.safetensors", tensors, self.record | {"epoch": best})
                self._best = None
            assert self.steps.optimizer is not None
            tensors = {f"state.{k}": v for k, v in self.state.state_dict().items()}
            tensors |= {f"optimizer.{k}": v for k, v in optimizer_tensors(self.steps.optimizer).items()}
            record = {"kind": "training", "of": self.record, "history": self.history}
            save_checkpoint(self.folder / "last.safetensors", tensors, record)
            self._write_rows()
            self._written = time.monotonic()

    def _write_rows(self) -> None:
        if not self.history:
            return
        text = io.StringIO()
        columns = list(dict.fromkeys(name for row in self.history for name in row))
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        write_text(self.folder / "metrics.csv", text.getvalue())
        for row in self.history[self._logged :]:
            for name, value in row.items():
                self._board.add_scalar(name.replace("_", "/", 1), value, int(row["epoch"]))
        self._logged = len(self.history)
