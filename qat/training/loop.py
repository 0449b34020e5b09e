"""The training loop: epochs of steps, early stopping, checkpoints, resumption, several processes."""

from __future__ import annotations

import csv
import io
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from qat.config import TrainingConfig, identity_settings
from qat.files import write_text
from qat.processes import bar
from qat.training import distributed
from qat.training.checkpoint import load_checkpoint, load_optimizer, optimizer_tensors, save_checkpoint
from qat.training.examples import batches
from qat.training.metrics import MetricsOf
from qat.training.steps import Steps
from qat.training.stopping import best_epoch, should_stop

History = list[dict[str, float]]


def fit(
    steps: Steps,
    model: nn.Module,
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
    """Minimise the objective until early stopping; write the best and the last state to disk.

    Every epoch visits the training part once, in an order that follows from ``(seed, epoch)``. The total validation
    loss (anti-transfer included) decides which state is the best, when the learning rate falls and when to stop. Every
    batch is divided among the processes and gradients are weighted by samples, so that the global batch is the same
    with any number of processes.

    Args:
        steps: steps of the objective.
        model: module in the objective whose state is saved.
        train: numbers of the training samples `[n]`.
        validation: numbers of the validation samples `[n]`.
        folder: run folder; gets ``model.safetensors``, ``last.safetensors``, ``metrics.csv`` and TensorBoard events.
        record: record of the checkpoints; must hold ``kind`` and ``experiment``.
        metrics_of: metrics of the validation part; its numbers are logged as ``validation_*``.
        resume: continue from ``last.safetensors`` if it exists; the result equals an uninterrupted run.
        title: label of the progress bar.
        quiet: no progress bar.

    Returns:
        One row per epoch, as in ``metrics.csv``.

    Raises:
        FloatingPointError: the training or validation loss is not finite; the state of the epoch before is kept.
        ValueError: ``last.safetensors`` belongs to another run.
    """
    config, optimizer = steps.config, steps.optimizer
    assert optimizer is not None
    history: History = []
    if resume and (folder / "last.safetensors").is_file():
        last = load_checkpoint(folder / "last.safetensors", "training")
        if _without_execution(last.record["of"]) != _without_execution(record):
            raise ValueError(f"{last.path}: state of another experiment; resume with the same settings or start anew")
        last.load_into(model, "state")
        load_optimizer(optimizer, last.part("optimizer"))
        history = last.record["history"]
    schedule = _PlateauSchedule(optimizer, config)
    for loss in _losses(history):
        schedule.step(loss)
    leads = distributed.rank() == 0
    columns = TimeElapsedColumn(), TextColumn("{task.fields[note]}")
    shown = leads and not quiet
    with _Checkpoints(folder, steps, model, record, history, leads) as checkpoints, bar(shown, *columns) as progress:
        task = progress.add_task(title, total=config.epochs, completed=len(history), note="")
        while not _finished(history, config):
            epoch = len(history)
            row: dict[str, float] = {"epoch": epoch}
            started = time.perf_counter()
            row |= {f"train_{k}": v for k, v in train_epoch(steps, train, epoch).items()}
            row["seconds"] = time.perf_counter() - started
            parts, outputs, targets = evaluate(steps, validation)
            metrics = parts | metrics_of(outputs, targets)
            row |= {f"validation_{k}": v for k, v in metrics.items() if isinstance(v, float)}
            if not math.isfinite(row["validation_total"]):  # the state before this epoch is the last that is kept
                raise FloatingPointError(
                    f"validation loss is {row['validation_total']} after epoch {epoch}; "
                    f"a lower training.lr than {config.lr:g} may help"
                )
            history.append(row)
            schedule.step(row["validation_total"])
            checkpoints.update(ended=_finished(history, config))
            distributed.barrier()
            note = f"loss {row['train_total']:.4f} validation {row['validation_total']:.4f}"
            progress.update(task, advance=1, note=note)
    return history


def train_epoch(steps: Steps, train: Tensor, epoch: int) -> dict[str, float]:
    """One pass over the training part, with one step of the optimiser for each batch.

    Args:
        steps: steps of the objective, the same in every process.
        train: numbers of the training samples `[n]`.
        epoch: number of this pass, from 0; order of the samples and dropout follow from it and the seed.

    Returns:
        Mean losses per sample over all processes, ``total`` and the parts, each from before its batch's step.

    Raises:
        FloatingPointError: the mean total loss is not finite.
    """
    config = steps.config
    order_generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    # Dropout is seeded by (seed, epoch, rank), so that a resumed run continues as if never interrupted.
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
    """Mean losses per sample, outputs and targets of some samples `[n]`, in eval mode, in their order.

    The samples are divided among the processes; every process returns the whole result.
    """
    outputs: list[Tensor] = []
    targets: list[Tensor] = []
    own_share = samples[distributed.rank() :: distributed.world_size()]
    with steps.running(training=False):
        for batch in batches(steps.examples, own_share, steps.config.batch, steps.device):
            batch_outputs, batch_targets = steps.evaluate(batch)
            outputs.append(batch_outputs)
            targets.append(batch_targets)
        sums = steps.sums()
    return _means(sums, len(samples)), _interleaved(outputs), _interleaved(targets)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of PyTorch's allocator on a GPU, of the whole process on a CPU (0 where unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _without_execution(record: dict[str, Any]) -> dict[str, Any]:
    """The record without settings that do not change the result, such as the device."""
    return record | {"experiment": identity_settings(record["experiment"])}


def _losses(history: History) -> list[float]:
    return [row["validation_total"] for row in history]


class _PlateauSchedule:
    """Lowers the learning rate when the validation loss stagnates; its state follows from the losses alone."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainingConfig) -> None:
        self._schedule = None
        if config.lr_factor < 1:
            patience = config.lr_patience - 1  # PyTorch lowers it one epoch after its patience
            self._schedule = ReduceLROnPlateau(optimizer, "min", config.lr_factor, patience, threshold=0, eps=0)

    def step(self, loss: float) -> None:
        if self._schedule is not None:
            self._schedule.step(loss)


def _finished(history: History, config: TrainingConfig) -> bool:
    stopped = bool(history) and should_stop(_losses(history), config.patience, config.stopping)
    return stopped or len(history) >= config.epochs


def _means(sums: dict[str, float], samples: int) -> dict[str, float]:
    """Means per sample, from each process's sums over its own samples."""
    sums_of_all = distributed.gather(sums)
    names = dict.fromkeys(name for sums in sums_of_all for name in sums)
    return {name: sum(sums.get(name, 0.0) for sums in sums_of_all) / samples for name in names}


def _interleaved(batches: list[Tensor]) -> Tensor:
    """Rows of all processes in the order of the samples; each process has ``[rank::world_size]``."""
    own_share = torch.cat(batches).cpu() if batches else None
    shares = [share for share in distributed.gather(own_share) if share is not None]
    whole = shares[0].new_empty(sum(map(len, shares)), *shares[0].shape[1:])
    for rank, share in enumerate(shares):
        whole[rank :: distributed.world_size()] = share
    return whole


class _Checkpoints:
    """Writes the best state, the last state and the rows of ``history`` to the run folder.

    They are written at most every ``training.checkpoint_seconds``, so that writing does not bound the epoch time. A
    resumed training continues from the last state written, to which the best one written belongs. Rows are also written
    when the training ends by an error.
    """

    def __init__(
        self, folder: Path, steps: Steps, model: nn.Module, record: dict[str, Any], history: History, leads: bool
    ) -> None:
        self.folder, self.steps, self.model, self.record = folder, steps, model, record
        self.history, self.leads = history, leads
        self._best: tuple[int, dict[str, Tensor]] | None = None
        self._written = -math.inf
        self._logged = len(history)

    def __enter__(self) -> _Checkpoints:
        if self.leads:
            from torch.utils.tensorboard import SummaryWriter

            # Epochs that were logged after the state that a training is resumed from are repeated.
            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self._logged or None)
        return self

    def __exit__(self, *_: object) -> None:
        if self.leads:
            try:
                self._write_rows()
            finally:
                self._board.close()

    def update(self, *, ended: bool) -> None:
        """Take the state after an epoch; write if ``training.checkpoint_seconds`` have passed, and at the end."""
        if not self.leads:
            return
        config, epoch = self.steps.config, len(self.history) - 1
        due = ended or time.monotonic() - self._written >= config.checkpoint_seconds
        if config.keep == "last" and due:
            self._best = epoch, self.model.state_dict()
        elif config.keep == "best" and best_epoch(_losses(self.history)) == epoch:
            tensors = self.model.state_dict()
            self._best = epoch, tensors if due else {name: tensor.clone() for name, tensor in tensors.items()}
        if due:
            if self._best is not None:
                best, tensors = self._best
                save_checkpoint(self.folder / "model.safetensors", tensors, self.record | {"epoch": best})
                self._best = None
            assert self.steps.optimizer is not None
            tensors = {f"state.{k}": v for k, v in self.model.state_dict().items()}
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
