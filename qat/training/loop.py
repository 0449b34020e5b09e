"""The training loop: epochs of steps, early stopping, checkpoints, resumption, several processes."""

from __future__ import annotations

import csv
import io
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.progress import TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from qat.config import TrainingConfig, difference, flatten, identity_settings, prefix_errors
from qat.files import write_json, write_text
from qat.processes import bar
from qat.training import distributed
from qat.training.checkpoint import Checkpoint, load_checkpoint, load_optimizer, optimizer_tensors, save_checkpoint
from qat.training.examples import batches
from qat.training.metrics import MetricsOf
from qat.training.nonfinite import first_finding
from qat.training.steps import Steps
from qat.training.stopping import best_epoch, should_stop

History = list[dict[str, float]]

Rates = list[tuple[int, float]]
"""The first epoch of each ``training.lr`` that a run was trained with, and that rate."""

log = logging.getLogger(__name__)


def fit(
    steps: Steps,
    model: nn.Module,
    train: Tensor,
    validation: Tensor,
    folder: Path,
    record: dict[str, Any],
    metrics_of: MetricsOf,
    paths: Sequence[str],
    *,
    resume: bool = False,
    title: str = "train",
    quiet: bool = False,
) -> tuple[History, Rates]:
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
        folder: run folder; gets ``experiment.yaml``, ``split.json``, ``model.safetensors``, ``last.safetensors``,
            ``metrics.csv`` and TensorBoard events.
        record: record of the checkpoints; must hold ``kind``, ``experiment`` and ``files``.
        metrics_of: metrics of the validation part; its numbers are logged as ``validation_*``.
        paths: file of every sample, for messages.
        resume: continue from ``last.safetensors`` if it exists; the result equals an uninterrupted run. With a lower
            ``training.lr`` it is that of the epochs to come.
        title: label of the progress bar.
        quiet: no progress bar.

    Returns:
        One row per epoch, as in ``metrics.csv``, and the learning rates.

    Raises:
        FloatingPointError: the training or validation loss is not finite; names the step, the layer and the files, and
            the state of the epoch before is kept.
        ValueError: ``last.safetensors`` or ``model.safetensors`` is broken, or belongs to another run.
    """
    config = steps.config
    course = _Course(steps, model, folder, record, resume)
    history = course.history
    leads = distributed.rank() == 0
    columns = TimeElapsedColumn(), TextColumn("{task.fields[note]}")
    shown = leads and not quiet
    if leads:  # also of a resumed run: its rate, its device may be others now
        write_json(folder / "split.json", record["files"])
        write_text(folder / "experiment.yaml", yaml.safe_dump(record["experiment"], sort_keys=False))
    with _Checkpoints(course, leads) as checkpoints, bar(shown, *columns) as progress:
        task = progress.add_task(title, total=config.epochs, completed=len(history), note="")
        while not _finished(history, config):
            epoch = len(history)
            try:
                row = _epoch(steps, train, validation, epoch, metrics_of)
            except FloatingPointError as error:
                log.warning("%s; the steps since the last state are computed again, to find where it comes from", error)
                raise FloatingPointError(f"{error}{course.diagnosis(train, validation, paths, checkpoints)}") from None
            history.append(row)
            course.rate.step(row["validation_total"])
            checkpoints.update(ended=_finished(history, config))
            course.initial = None  # there is a file now
            distributed.barrier()
            note = f"loss {row['train_total']:.4f} validation {row['validation_total']:.4f}"
            progress.update(task, advance=1, note=note)
    return history, course.rates


def _epoch(steps: Steps, train: Tensor, validation: Tensor, epoch: int, metrics_of: MetricsOf) -> dict[str, float]:
    """Train one epoch and validate; returns its row of ``metrics.csv``.

    Raises:
        FloatingPointError: the training or validation loss is not finite.
    """
    row: dict[str, float] = {"epoch": epoch}
    started = time.perf_counter()
    row |= {f"train_{k}": v for k, v in train_epoch(steps, train, epoch).items()}
    row["seconds"] = time.perf_counter() - started
    parts, outputs, targets = evaluate(steps, validation)
    metrics = parts | metrics_of(outputs, targets)
    row |= {f"validation_{k}": v for k, v in metrics.items() if isinstance(v, float)}
    if not math.isfinite(row["validation_total"]):
        raise FloatingPointError(f"validation loss is {row['validation_total']} after epoch {epoch}")
    return row


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
        raise FloatingPointError(f"training loss is {means['total']} in epoch {epoch}")
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


def _losses(history: History) -> list[float]:
    return [row["validation_total"] for row in history]


class _Rate:
    """The learning rate, which falls when the validation loss stagnates; it follows from rates and losses alone.

    Args:
        optimizer: optimiser.
        config: optimisation settings.
        rates: ``training.lr`` from each epoch on.
        losses: validation losses of the epochs so far.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, config: TrainingConfig, rates: Rates, losses: Sequence[float]
    ) -> None:
        self._optimizer, self._schedule, from_epoch = optimizer, None, dict(rates)
        if config.lr_factor < 1:
            patience = config.lr_patience - 1  # PyTorch lowers it one epoch after its patience
            self._schedule = ReduceLROnPlateau(optimizer, "min", config.lr_factor, patience, threshold=0, eps=0)
        for epoch, loss in enumerate([*losses, None]):
            if epoch in from_epoch:
                self._set(from_epoch[epoch])
            if loss is not None:
                self.step(loss)

    def step(self, loss: float) -> None:
        if self._schedule is not None:
            self._schedule.step(loss)

    @property
    def value(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])

    def _set(self, value: float) -> None:
        for group in self._optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # where a captured step reads it
                group["lr"].fill_(value)
            else:
                group["lr"] = value


class _Course:
    """How far a training has come; it can go back to the last state that was written, or to its beginning.

    Args:
        steps: steps of the objective.
        model: module whose state is saved.
        folder: run folder.
        record: record of the checkpoints.
        resume: begin with ``last.safetensors`` if it exists.
    """

    def __init__(self, steps: Steps, model: nn.Module, folder: Path, record: dict[str, Any], resume: bool) -> None:
        assert steps.optimizer is not None
        self.steps, self.model, self.folder, self.record, self.optimizer = steps, model, folder, record, steps.optimizer
        self.last = folder / "last.safetensors"
        self.history: History = []
        self.rates: Rates = [(0, steps.config.lr)]
        self.rate = _Rate(self.optimizer, steps.config, self.rates, [])
        self.initial: dict[str, Tensor] | None = None
        if resume and self.last.is_file():
            self.return_to_last()
        else:  # what a first epoch that fails goes back to
            self.initial = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}

    def return_to_last(self) -> None:
        """Go back to ``last.safetensors``.

        Raises:
            ValueError: it is broken, or belongs to another run; or ``model.safetensors`` does not belong to it.
        """
        last, config = load_checkpoint(self.last, "training"), self.steps.config
        own, former = self.record, last.value("of")
        if former | {"experiment": None} != own | {"experiment": None}:
            raise ValueError(f"{last.path}: state of another experiment; resume with the same settings or start anew")
        with prefix_errors(last.path):
            theirs, ours = (identity_settings(record.get("experiment", {})) for record in (former, own))
        if changed := difference(theirs | {"training.lr": config.lr}, ours):
            raise ValueError(f"{last.path}: state of another experiment: {changed}; resume with the same settings")
        history, rates = _recorded_history(last), _recorded_rates(last)
        self._check_kept(history, lower=config.lr < rates[-1][1])
        last.load_into(self.model, "state")
        with prefix_errors(last.path):
            load_optimizer(self.optimizer, last.part("optimizer"))
        self.rate = _Rate(self.optimizer, config, rates, _losses(history))
        if config.lr != rates[-1][1]:
            if not config.lr < self.rate.value:
                raise ValueError(
                    f"training.lr: {config.lr:g} must be {rates[-1][1]:g}, with which {last.path} was trained, "
                    f"or below {self.rate.value:g}, to which it has come"
                )
            rates.append((len(history), config.lr))
            self.rate = _Rate(self.optimizer, config, rates, _losses(history))
        self.history[:], self.rates = history, rates

    def _check_kept(self, history: History, lower: bool) -> None:
        """Check that ``model.safetensors`` is what belongs to the last state, or is one that was written just after."""
        kept, config = load_checkpoint(self.folder / "model.safetensors", self.record["kind"]), self.steps.config
        epoch, ended = kept.value("epoch"), len(history) - 1
        if epoch > ended and lower:  # the process was killed between the two, and the epochs until then will be others
            raise ValueError(
                f"{kept.path}: of epoch {epoch}, and last.safetensors of {ended}; resume with the former training.lr"
            )
        if epoch <= ended and epoch != (ended if config.keep == "last" else best_epoch(_losses(history))):
            raise ValueError(f"{kept.path}: of epoch {epoch}, which last.safetensors beside it does not belong to")

    def diagnosis(self, train: Tensor, validation: Tensor, paths: Sequence[str], checkpoints: _Checkpoints) -> str:
        """Where the epoch after the present history stops being finite, and what to do; ends the training.

        The steps since the last state are computed again, which also gives the state before that epoch: it is written.
        """
        done, steps = self.history.copy(), self.steps
        steps.graphs = None  # they write to the optimiser's present state, which is replaced
        if self.initial is None:
            self.return_to_last()
        else:
            self.model.load_state_dict(self.initial)
            self.optimizer.state.clear()
        if len(self.history) < len(done):
            for row in done[len(self.history) :]:
                train_epoch(steps, train, len(self.history))
                self.history.append(row)
                self.rate.step(row["validation_total"])
            checkpoints.update(ended=True)
            distributed.barrier()
        epoch = len(done)
        finding = first_finding(steps, paths, lambda: train_epoch(steps, train, epoch))
        count, of = -(-len(train) // steps.config.batch), "step"
        if finding is None:
            finding = first_finding(steps, paths, lambda: evaluate(steps, validation))
            count, of = -(-len(validation) // (steps.config.batch * distributed.world_size())), "validation batch"
        if finding is None:
            return "; computed again it was finite; --resume may help, or training.deterministic"
        help_ = f"a lower training.lr than {self.rate.value:g} may help, with --resume"
        if finding.place == 0:
            help_ = "leave the file out, or repair it"
        return f": in {of} {finding.step} of {count}, {finding.text}; {help_}"


def _recorded_history(last: Checkpoint) -> History:
    """The rows of a state's epochs.

    Raises:
        ValueError: there is none, or it is of another form.
    """
    rows: History = [row | {"epoch": epoch} for epoch, row in enumerate(last.value("history"))]
    needed = {"epoch", "seconds", "train_total", "validation_total"}
    if not rows or rows != last.record["history"] or not all(row.keys() >= needed for row in rows):
        raise ValueError(f"{last.path}: record: history must have a row of {', '.join(sorted(needed))} for each epoch")
    return rows


def _recorded_rates(last: Checkpoint) -> Rates:
    """The learning rates that a state was trained with; earlier versions had one only, that of the settings."""
    if "rates" not in last.record:
        return [(0, float(flatten(last.value("of")["experiment"])["training.lr"]))]
    rates: list[list[float]] = last.value("rates")
    if not rates or any(len(pair) != 2 for pair in rates) or rates[0][0] != 0:
        raise ValueError(f"{last.path}: record: rates must have an epoch and a learning rate each, from epoch 0 on")
    return [(int(epoch), rate) for epoch, rate in rates]


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

    def __init__(self, course: _Course, leads: bool) -> None:
        self.course, self.leads = course, leads
        self.folder, self.steps, self.model, self.record = course.folder, course.steps, course.model, course.record
        self.history = course.history
        self._best: tuple[int, dict[str, Tensor]] | None = None
        self._written = -math.inf
        self._logged = len(self.history)

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
                record = self.record | {"epoch": best, "rates": self.course.rates}
                save_checkpoint(self.folder / "model.safetensors", tensors, record)
                self._best = None
            tensors = {f"state.{k}": v for k, v in self.model.state_dict().items()}
            tensors |= {f"optimizer.{k}": v for k, v in optimizer_tensors(self.course.optimizer).items()}
            record = {"kind": "training", "of": self.record, "history": self.history, "rates": self.course.rates}
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
