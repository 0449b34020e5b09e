"""Training with several processes: the calls that the loop needs, which do nothing without torchrun."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qat import torchrun

T = TypeVar("T")


def rank() -> int:
    """Rank of this process, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes that train together, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def require_one_process(subject: str) -> None:
    """Refuse to train ``subject`` with several processes.

    Raises:
        ValueError: torchrun started more than one.
    """
    if world_size() > 1:
        raise ValueError(f"{subject} is trained by one process only; run it without torchrun")


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if any, and yield this process's device.

    Args:
        device: ``auto``, or a name that ``torch.device`` takes. Under torchrun ``cuda`` is the local rank's device.

    Raises:
        ValueError: the device is unknown or absent, or the environment is not torchrun's.
    """
    own_device = device_of(device)
    joins = torchrun.place() is not None and not dist.is_initialized()
    if joins:
        dist.init_process_group("nccl" if own_device.type == "cuda" else "gloo")
    try:
        yield own_device
    finally:
        if joins:
            dist.destroy_process_group()


def device_of(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is CUDA if available, else the CPU.

    Raises:
        ValueError: the device is unknown or absent.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: {name!r} is not one of PyTorch's: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: {name!r} asked for, but PyTorch sees no CUDA device")
        if device.index is None:
            device = torch.device("cuda", (torchrun.place() or torchrun.Place()).local_rank)
        torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    """Name of a GPU, or ``cpu`` with its number of threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def parallel(module: nn.Module) -> nn.Module:
    """The module, wrapped for gradient averaging if there are several processes."""
    return module if world_size() == 1 else DistributedDataParallel(module)


def gather(value: T) -> list[T]:
    """Values of all processes, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


@contextmanager
def leader_first() -> Iterator[None]:
    """Rank 0 runs the block first, then all others do, with its results."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def barrier() -> None:
    """Wait for every process."""
    if world_size() > 1:
        dist.barrier()
