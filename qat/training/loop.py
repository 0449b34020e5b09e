"""The training loop: standard PyTorch, with early stopping, checkpoints, resuming and several processes."""

from __future__ import annotations

import csv
import io
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
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

from qat.config import TrainingConfig
from qat.files import write_text
from qat.training import distributed
from qat.training.checkpoint import load_checkpoint, load_optimizer, optimizer_tensors, save_checkpoint
from qat.training.objectives import Losses
from qat.training.stopping import best_epoch, should_stop

History = list[dict[str, float]]


@dataclass(frozen=True)
class Examples:
    """Samples by number.

    Args:
        inputs: ``(indices [B], generator or None) -> [B, ...]``; the generator is there in training only, for what is
            drawn anew each time a sample is seen (a word's place in its canvas).
        targets: `[n]` class indices or `[n, V]` values.
        indices: the samples of this part.
    """

    inputs: Callable[[Tensor, torch.Generator | None], Tensor]
    targets: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def part(self, indices: list[int]) -> Examples:
        """The same source, other samples."""
        return Examples(self.inputs, self.targets, torch.as_tensor(indices, dtype=torch.long))

    def batch(
        self,
        indices: Tensor,
        device: torch.device,
        generator: torch.Generator | None = None,
        share: slice = slice(None),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs and targets of the samples ``indices`` on ``device``, or of this process's share, and their numbers.

        What is drawn anew is drawn for the whole batch, so that it does not depend on the number of processes.
        """
        inputs = self.inputs(indices, generator)[share].to(device, non_blocking=True)
        samples = indices[share]
        return inputs, self.targets[samples].to(device, non_blocking=True), samples


def fit(
    objective: nn.Module,
    state: nn.Module,
    train: Examples,
    validation: Examples,
    config: TrainingConfig,
    folder: Path,
    record: dict[str, Any],
    judge: Callable[[Tensor, Tensor], dict[str, float]],
    device: torch.device,
    *,
    resume: bool = False,
    title: str = "train",
    quiet: bool = False,
) -> History:
    """Minimise the objective until early stopping; keep the best and the last state on disk.

    Adam; every epoch visits the training part once in an order drawn from ``(seed, epoch)``; the total validation loss
    (anti-transfer included) decides which state is the best and when to stop. Every batch is shared out over the
    processes and gradients are weighted by samples, so that the global batch is the same with any number of them.

    Args:
        objective: ``(inputs, targets, samples) -> Losses``, already on ``device``.
        state: the module inside ``objective`` whose state is saved.
        train, validation: the parts.
        config: learning rate, batch, epochs, patience, seed.
        folder: run folder; gets ``model.safetensors``, ``last.safetensors``, ``metrics.csv`` and TensorBoard events.
        record: saved with the kept state; must hold ``kind``.
        judge: ``(outputs, targets) -> metrics`` of the validation part, logged as ``validation_*``.
        resume: go on from ``last.safetensors`` if it is there; the result equals an uninterrupted run.

    Returns:
        One row per epoch, as in ``metrics.csv``.

    Raises:
        FloatingPointError: the training loss is not finite.
        ValueError: ``last.safetensors`` is of another run.
    """
    optimizer = torch.optim.Adam(
        [p for p in objective.parameters() if p.requires_grad], lr=config.lr, weight_decay=config.weight_decay
    )
    history: History = []
    last = folder / "last.safetensors"
    if resume and last.is_file():
        saved = load_checkpoint(last, "training")
        if saved.record["of"] != record:
            raise ValueError(f"{last}: state of another experiment; resume with the same settings or start anew")
        saved.load_into(state, "state")
        load_optimizer(optimizer, saved.part("optimizer"))
        history = saved.record["history"]
    leads = distributed.rank() == 0
    wrapped = distributed.parallel(objective)
    quiet = quiet or not leads
    with _Log(folder if leads else None) as log, _progress(quiet) as progress:
        bar = progress.add_task(title, total=config.epochs, completed=len(history), note="")
        while len(history) < config.epochs and not _finished(history, config):
            epoch = len(history)
            row: dict[str, float] = {"epoch": epoch}
            started = time.perf_counter()
            row |= {f"train_{k}": v for k, v in train_epoch(wrapped, optimizer, train, config, epoch, device).items()}
            row["seconds"] = time.perf_counter() - started
            parts, outputs, targets = evaluate(objective, validation, config.batch, device)
            row |= {f"validation_{k}": v for k, v in (parts | judge(outputs, targets)).items()}
            history.append(row)
            if leads:
                if config.keep == "last" or best_epoch(_losses(history)) == epoch:
                    save_checkpoint(folder / "model.safetensors", state.state_dict(), record | {"epoch": epoch})
                tensors = {f"state.{k}": v for k, v in state.state_dict().items()}
                tensors |= {f"optimizer.{k}": v for k, v in optimizer_tensors(optimizer).items()}
                save_checkpoint(last, tensors, {"kind": "training", "of": record, "history": history})
                log.write(history)
            distributed.barrier()
            note = f"loss {row['train_total']:.4f} validation {row['validation_total']:.4f}"
            progress.update(bar, advance=1, note=note)
    return history


def train_epoch(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Examples,
    config: TrainingConfig,
    epoch: int,
    device: torch.device,
) -> dict[str, float]:
    """One pass over the training part, a step of the optimizer for each batch.

    Args:
        objective: ``(inputs, targets, samples) -> Losses`` on ``device``, the same module in every process.
        optimizer: of its parameters.
        train: the training part.
        config: batch, over all processes together, and seed.
        epoch: number of this pass, from 0; with the seed it gives the order of the samples and the dropout.
        device: where batches are sent.

    Returns:
        Mean losses per sample, each from before its batch's step: ``total`` and the parts, over all processes.

    Raises:
        FloatingPointError: the mean total loss is not finite.
    """
    objective.train()
    order_generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    rank, processes = distributed.rank(), distributed.world_size()
    # Dropout is drawn anew from (seed, epoch, rank), so that a resumed run continues as if never interrupted.
    torch.manual_seed((config.seed * 1_000_003 + epoch) * 1009 + rank)
    order = train.indices[torch.randperm(len(train), generator=order_generator)]
    sums: dict[str, Tensor] = {}
    for everyones in order.split(config.batch):
        mine = len(everyones[rank::processes])
        # A process without a share of a short last batch still takes part in the averaging, with weight 0.
        share = slice(rank, None, processes) if mine else slice(1)
        x, y, samples = train.batch(everyones, device, order_generator, share)
        losses: Losses = objective(x, y, samples)
        optimizer.zero_grad(set_to_none=True)
        (losses.total * (mine * processes / len(everyones))).backward()
        optimizer.step()
        for name, value in {"total": losses.total.detach(), **losses.parts}.items():
            sums[name] = sums.get(name, torch.zeros((), device=device)) + value * mine
    means = _means({name: value.item() for name, value in sums.items()}, len(train))
    if not torch.isfinite(torch.tensor(means["total"])):
        raise FloatingPointError(
            f"training loss is {means['total']} in epoch {epoch}; a lower training.lr than {config.lr:g} may help"
        )
    return means


def evaluate(
    objective: nn.Module, examples: Examples, batch: int, device: torch.device
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Mean losses per sample, outputs and targets of a part, in eval mode, in the part's order.

    The samples are shared out over the processes; every process returns the whole result.
    """
    objective.eval()
    mine = examples.indices[distributed.rank() :: distributed.world_size()]
    sums: dict[str, float] = {}
    outputs: list[Tensor] = []
    targets: list[Tensor] = []
    with torch.no_grad():
        for indices in mine.split(batch) if len(mine) else ():
            x, y, samples = examples.batch(indices, device)
            losses: Losses = objective(x, y, samples)
            for name, value in {"total": losses.total, **losses.parts}.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(indices)
            outputs.append(losses.outputs.float().cpu())
            targets.append(y.cpu())
    return _means(sums, len(examples)), _interleaved(outputs), _interleaved(targets)


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


def _losses(history: History) -> list[float]:
    return [row["validation_total"] for row in history]


def _finished(history: History, config: TrainingConfig) -> bool:
    return bool(history) and should_stop(_losses(history), config.patience, config.stopping)


def _means(sums: dict[str, float], samples: int) -> dict[str, float]:
    """Mean per sample, from every process's sums over its own samples."""
    everyones = distributed.gather(sums)
    names = dict.fromkeys(name for one in everyones for name in one)
    return {name: sum(one.get(name, 0.0) for one in everyones) / samples for name in names}


def _interleaved(batches: list[Tensor]) -> Tensor:
    """All processes' rows in the order of the samples, undoing ``[rank::world_size]``."""
    shares = [torch.cat(share) for share in distributed.gather(batches) if share]
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


class _Log:
    """The rows of every epoch as ``metrics.csv`` and TensorBoard events; nothing when there is no folder."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def __enter__(self) -> _Log:
        if self.folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.folder / "tensorboard"))
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder is not None:
            self.board.close()

    def write(self, history: History) -> None:
        assert self.folder is not None
        text = io.StringIO()
        columns = list(dict.fromkeys(name for row in history for name in row))
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        write_text(self.folder / "metrics.csv", text.getvalue())
        for name, value in history[-1].items():
            self.board.add_scalar(name.replace("_", "/", 1), value, int(history[-1]["epoch"]))
