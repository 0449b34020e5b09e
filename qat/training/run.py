"""A training and its run folder: it is opened, trained, evaluated, and recorded in ``result.json``."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qat
from qat import torchrun
from qat.config import AnyExperiment, to_plain
from qat.files import LOCK, Busy, held, read_json
from qat.results.record import origin, read_result
from qat.training import distributed
from qat.training.checkpoint import check_run, load_checkpoint
from qat.training.data import Data, problems_of
from qat.training.examples import Examples
from qat.training.loop import evaluate, fit, peak_memory
from qat.training.metrics import Metrics, MetricsOf
from qat.training.profile import Profile
from qat.training.steps import Steps


@dataclass(frozen=True)
class TrainingRun:
    """A training in progress.

    Args:
        experiment: all settings.
        folder: run folder.
        name: name in reports.
        device: device to compute on.
        resume: continue from ``last.safetensors`` if there is one.
        quiet: no progress bars.
        profile: profile some of the first steps.
    """

    experiment: AnyExperiment
    folder: Path
    name: str
    device: torch.device
    resume: bool
    quiet: bool
    profile: bool

    def train(
        self,
        objective: nn.Module,
        model: nn.Module,
        data: Data,
        examples: Examples,
        metrics_of: MetricsOf,
        about: dict[str, Any],
    ) -> tuple[Metrics, dict[str, Tensor]]:
        """Train until early stopping, load the saved state, and evaluate it on every part.

        Args:
            objective: loss to minimise; holds ``model``.
            model: network that is saved.
            data: samples and parts.
            examples: source of the batches.
            metrics_of: metrics of a part's outputs and targets.
            about: further entries of the checkpoint's record, at least ``kind``.

        Returns:
            The result for ``result.json``, and the outputs of every part.
        """
        training, record = self.experiment.training, self._record(data, about)
        steps = Steps(objective, examples, training, self.device, training=True)
        parts = {part: torch.tensor(numbers) for part, numbers in data.parts.items()}
        profiled = self.profile and distributed.rank() == 0
        with contextlib.ExitStack() as stack:
            stack.callback(steps.end)
            if profiled:
                stack.enter_context(Profile(steps, self.folder))
            history, rates = fit(
                steps,
                model,
                parts["train"],
                parts["validation"],
                self.folder,
                record,
                metrics_of,
                data.index["path"].tolist(),
                resume=self.resume,
                title=self.name,
                quiet=self.quiet,
            )
        checkpoint = load_checkpoint(self.folder / "model.safetensors", record["kind"])
        checkpoint.load_into(model)
        metrics, outputs = {}, {}
        # Random numbers of an evaluation must not depend on whether the run was resumed.
        torch.manual_seed(training.seed)
        for part, numbers in parts.items():
            metrics[part], outputs[part] = evaluate_part(steps, numbers, metrics_of)
        seconds = sum(row["seconds"] for row in history)
        result = {
            **origin(),
            "kind": record["kind"],
            "name": self.name,
            "seed": training.seed,
            "experiment": record["experiment"],
            "classes": record.get("classes", []),
            "problems": problems_of(data.spectrograms.store),
            "parts": metrics,
            "epochs": len(history),
            "rates": rates,
            "kept_epoch": checkpoint.value("epoch"),
            "seconds": seconds,
            "seconds_per_epoch": seconds / len(history),
            "peak_memory": peak_memory(self.device),
            "device": distributed.device_name(self.device),
            "processes": distributed.world_size(),
            "versions": {"qat": qat.__version__, "torch": torch.__version__, "python": platform.python_version()},
        }
        return result, outputs

    def _record(self, data: Data, about: dict[str, Any]) -> dict[str, Any]:
        """The record of the run's checkpoints."""
        files = {part: data.index["path"].iloc[numbers].unique().tolist() for part, numbers in data.parts.items()}
        settings = to_plain(self.experiment)
        normalisation = to_plain(data.spectrograms.normalisation)
        return about | {"experiment": settings, "normalisation": normalisation, "files": files}


@contextlib.contextmanager
def open_run(
    experiment: AnyExperiment, folder: Path, *, resume: bool, quiet: bool, name: str | None, profile: bool
) -> Iterator[tuple[TrainingRun, Metrics | None]]:
    """A training in its folder, ready to start, and its result if this training is already finished.

    Raises:
        ValueError: another process writes to the folder, or it holds a run with other settings, or a run and
            ``resume`` is not set.
    """
    with _only_writer(folder):
        check_run(folder, experiment, resume=resume)
        finished = folder / "result.json"
        result = None
        if finished.is_file():
            if not resume:
                raise ValueError(f"{folder}: holds a finished run; choose another folder, or delete this one")
            read_result(finished)  # which checks it
            result = read_json(finished)
        elif (folder / "last.safetensors").is_file() and not resume:
            raise ValueError(
                f"{folder}: holds an interrupted run; resume it, choose another folder, or delete this one"
            )
        with (
            _algorithms(experiment.training.deterministic),
            distributed.process_group(experiment.training.device) as device,
        ):
            yield TrainingRun(experiment, folder, name or folder.name, device, resume, quiet, profile), result


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which a campaign's jobs hold too; of several processes under torchrun the first does."""
    if not torchrun.leads():
        yield
        return
    new = not folder.exists()
    try:
        with held(folder / LOCK, nested=True):
            yield
    except Busy as error:
        raise ValueError(f"{folder}: {error} writes there; choose another folder, or wait") from None
    finally:
        # Where nothing was trained, nothing is left.
        if new and folder.is_dir() and all(file.name.startswith(LOCK) for file in folder.iterdir()):
            shutil.rmtree(folder)


@contextlib.contextmanager
def _algorithms(deterministic: bool) -> Iterator[None]:
    """PyTorch's deterministic algorithms, or the fastest that cuDNN finds."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    options: Any = torch.utils.deterministic
    fill, options.fill_uninitialized_memory = options.fill_uninitialized_memory, False
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, not deterministic
    if deterministic:
        # cuBLAS is deterministic only with a fixed workspace, which it reads when CUDA starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        options.fill_uninitialized_memory = fill


def evaluate_part(steps: Steps, numbers: Tensor, metrics_of: MetricsOf) -> tuple[Metrics, Tensor]:
    """Mean losses and metrics of the samples with these numbers, and their outputs."""
    losses, outputs, targets = evaluate(steps, numbers)
    return losses | metrics_of(outputs, targets), outputs


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
