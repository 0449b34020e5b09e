"""Checkpoints as safetensors files: tensors, and one JSON record that describes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qat.config import (
    AnyExperiment,
    Experiment,
    difference,
    from_plain,
    identity_settings,
    prefix_errors,
    to_plain,
    typed_setting,
)
from qat.data.spectrogram import Normalisation
from qat.files import read_json, read_yaml, replacing


@dataclass(frozen=True)
class _Record:
    """Types of the entries of a checkpoint's record, of whatever kind."""

    experiment: dict[str, Any]
    normalisation: dict[str, Any]
    classes: list[str]
    files: dict[str, list[str]]
    epoch: int
    of: dict[str, Any]
    history: list[dict[str, float]]
    rates: list[list[float]]


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file.

    Args:
        path: file that it was read from.
        tensors: tensors by name, on the CPU.
        record: description of them: ``kind`` (``classifier``, ``rhemo`` or ``training``), ``experiment``,
            ``classes``...
    """

    path: Path
    tensors: dict[str, Tensor]
    record: dict[str, Any]

    @property
    def experiment(self) -> Experiment:
        """Settings of the classifier's training."""
        with prefix_errors(self.path):
            return from_plain(Experiment, self.value("experiment"))

    @property
    def classes(self) -> list[str]:
        """Names of the classifier's outputs."""
        classes: list[str] = self.value("classes")
        return classes

    @property
    def normalisation(self) -> Normalisation:
        """Normalisation of the inputs, fitted on the training part."""
        with prefix_errors(self.path):
            return from_plain(Normalisation, self.value("normalisation"))

    def value(self, name: str) -> Any:
        """An entry of the record.

        Raises:
            ValueError: it is missing, or of a wrong type.
        """
        if name not in self.record:
            raise ValueError(f"{self.path}: its record lacks {name!r}")
        with prefix_errors(self.path, "record"):
            return typed_setting(_Record, name, self.record[name])

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose names begin with ``prefix`` and a dot, by the rest of their names; all of them for ``""``."""
        dotted = f"{prefix}." if prefix else ""
        return {k.removeprefix(dotted): v for k, v in self.tensors.items() if k.startswith(dotted)}

    def load_into(self, module: nn.Module, prefix: str = "") -> None:
        """Load the part ``prefix`` into ``module``.

        Raises:
            ValueError: the checkpoint is of another network, as names, types or shapes differ, or its weights are not
                finite; nothing is loaded then.
        """
        own = module.state_dict()
        # Batch norms of version 0.1 did not count batches.
        counts = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
        tensors = counts | self.part(prefix)
        missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        if missing or extra:
            problem = f"lacks {missing[:3]}" if missing else f"has unknown {extra[:3]}"
            raise ValueError(f"{self.path}: checkpoint of another network: {problem}")
        for name, tensor in sorted(tensors.items()):
            if tensor.shape != own[name].shape:
                raise ValueError(
                    f"{self.path}: checkpoint of another network: {name} is {tuple(tensor.shape)}, "
                    f"this network's is {tuple(own[name].shape)}"
                )
            if tensor.is_floating_point() != own[name].is_floating_point():
                raise ValueError(f"{self.path}: {name} is {tensor.dtype}, this network's is {own[name].dtype}")
            if not tensor.isfinite().all():
                raise ValueError(f"{self.path}: {name} is not finite; the training that wrote it had failed")
        module.load_state_dict(tensors)


def check_run(folder: Path, experiment: AnyExperiment, *, resume: bool = False) -> None:
    """Refuse a folder that holds a run, finished or interrupted, of other settings.

    Args:
        folder: run folder.
        experiment: settings of the training that is wanted.
        resume: an interrupted run is to be resumed, which may be with a lower ``training.lr``.

    Raises:
        ValueError: names the first setting that differs, of those that a run is identified by, and both values.
    """
    finished = (folder / "result.json").is_file()
    if not finished and not ((folder / "last.safetensors").is_file() and (folder / "experiment.yaml").is_file()):
        return
    file = folder / ("result.json" if finished else "experiment.yaml")
    plain = read_json(file, "experiment")["experiment"] if finished else read_yaml(file)
    with prefix_errors(file):
        theirs, ours = identity_settings(plain), identity_settings(to_plain(experiment))
    if resume and not finished and ours["training.lr"] < theirs["training.lr"]:
        theirs["training.lr"] = ours["training.lr"]
    if changed := difference(theirs, ours):
        raise ValueError(f"{folder}: holds a run with {changed}; choose another folder, or delete this one")


def save_checkpoint(path: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write tensors, record and their checksum to ``path`` atomically; an interrupted write leaves the older file."""
    layout = torch.contiguous_format
    plain = {name: tensor.detach().to("cpu", copy=True, memory_format=layout) for name, tensor in tensors.items()}
    # One entry: safetensors writes several in random order, and equal checkpoints are to be equal files.
    metadata = {"record": json.dumps({"sha256": _checksum(plain, json.dumps(record)), **record})}
    with replacing(path) as draft:
        draft.touch()  # with the umask's mode; safetensors alone would make it unreadable for others
        mode = draft.stat().st_mode
        try:
            save_file(plain, draft, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error}); what was there before is unchanged") from None
        draft.chmod(mode)


def load_checkpoint(path: Path, kind: str) -> Checkpoint:
    """Read a checkpoint file, or the one of a run folder.

    Args:
        path: ``.safetensors`` file, or run folder that holds ``model.safetensors``.
        kind: required kind: ``classifier``, ``rhemo`` or ``training`` (a state to resume from).

    Raises:
        ValueError: no such file, not a checkpoint of this program, damaged (by its checksum; those of version 0.1
            have none), or of another kind.
    """
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            record = json.loads(metadata.get("record", "{}"))
            if not isinstance(record, dict):
                raise ValueError(f"its record is no object but {type(record).__name__}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            checksum = record.pop("sha256", metadata.get("sha256"))  # of its own entry in some of version 0.1
            if checksum not in (None, _checksum(tensors, json.dumps(record))):
                raise ValueError("its checksum is wrong, it was damaged after it was written")
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from None
    if record.get("kind") != kind:
        raise ValueError(f"{path}: a checkpoint of kind {record.get('kind')!r}, but {kind!r} is needed")
    return Checkpoint(path, tensors, record)


def _checksum(tensors: Mapping[str, Tensor], record: str) -> str:
    """SHA-256 over the record, and over names, types, shapes and bytes of the tensors."""
    digest = hashlib.sha256(record.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's per-parameter state as flat names ``<parameter number>.<field>``."""
    state = optimizer.state_dict()["state"]
    return {f"{n}.{name}": torch.as_tensor(value) for n, fields in state.items() for name, value in fields.items()}


_ADAM = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore the state that :func:`optimizer_tensors` gave.

    Raises:
        ValueError: it is of other parameters, beyond which Adam's kernel would read and write; it lacks a part, or is
            not finite.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, field = name.partition(".")
        if not number.isdecimal() or int(number) >= len(parameters) or field not in _ADAM:
            raise ValueError(f"state of the optimiser: {name!r} is of none of the {len(parameters)} parameters")
        shape = torch.Size() if field == "step" else parameters[int(number)].shape
        if tensor.shape != shape or not tensor.is_floating_point():
            raise ValueError(
                f"state of the optimiser: {name} must be floating-point of shape {tuple(shape)}; "
                f"it is {tensor.dtype} of shape {tuple(tensor.shape)}"
            )
        # The square of a gradient may overflow: its parameter stands still then.
        if not ((tensor >= 0) if field.endswith("_sq") else tensor.isfinite()).all():
            raise ValueError(f"state of the optimiser: {name} is not finite")
        state.setdefault(int(number), {})[field] = tensor
    fields = {field for of_one in state.values() for field in of_one}
    for place in range(len(parameters) if state else 0):
        if missing := fields - state.get(place, {}).keys():
            raise ValueError(f"state of the optimiser: {place}.{min(missing)} is missing")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, own in optimizer.state.items():
        for field, value in own.items():
            if value.shape == parameter.shape:  # in the parameter's layout, which Adam's kernel assumes
                own[field] = torch.empty_like(parameter).copy_(value)
