"""Batches of samples on the device; the next batches are read while it computes."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.data.rows import Rows, to_device
from qat.data.spectrogram import place_words

Offsets = Callable[[int, torch.Generator | None], Tensor]

_AHEAD = 2
"""Number of batches that are read ahead."""


@dataclass(frozen=True)
class Examples:
    """The arguments of an objective for every sample, by sample number.

    Args:
        rows: ``inputs``, ``targets`` (`[n]` class indices or `[n, V]` values), and further arguments of the objective.
        offsets: ``(count, generator or None) -> [count]`` if inputs are words `[n, frames, bins]`: the first frame of
            each in its canvas, random in training (with a generator).
    """

    rows: Mapping[str, Rows]
    offsets: Offsets | None = None

    @property
    def resident(self) -> bool:
        return all(rows.resident for rows in self.rows.values())

    def gather(self, loaded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The objective's arguments for a batch, on the device; every operation can be captured in a CUDA graph.

        Args:
            loaded: ``loaded`` of a :class:`Batch`.
        """
        numbers = loaded["numbers"]
        batch = {name: rows.pick(numbers) if rows.resident else loaded[name] for name, rows in self.rows.items()}
        if "offsets" in loaded:
            batch["inputs"] = place_words(batch["inputs"], loaded["offsets"])
        return batch


@dataclass(frozen=True)
class Batch:
    """This process's share of a batch.

    Args:
        loaded: tensors on the device: the sample ``numbers`` `[b]`, and the rows that are not resident there.
        samples: b, or 0 if a short last batch has no sample for this process, which then computes another's.
        whole: number of samples of the whole batch.
    """

    loaded: dict[str, Tensor]
    samples: int
    whole: int


def batches(
    examples: Examples,
    order: Tensor,
    size: int,
    device: torch.device,
    generator: torch.Generator | None = None,
    shared: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """This process's shares of all batches, in order.

    Random offsets are drawn for the whole batch, so that they do not depend on the number of processes. Rows that are
    not on the device are read by another thread, two batches ahead, and copied to a GPU on a separate stream.

    Args:
        examples: source of the batches.
        order: numbers of the samples `[n]`, in the order of the pass.
        size: batch size over all processes.
        device: device of the batches.
        generator: generator of random offsets; None in evaluation.
        shared: rank of this process, and number of processes.
    """
    rank, processes = shared
    copying = _copying(device) if device.type == "cuda" and not examples.resident else None

    def load(numbers: Tensor, device_numbers: Tensor) -> tuple[Batch, torch.cuda.Event | None]:
        mine = len(numbers[rank::processes])
        share = slice(rank, None, processes) if mine else slice(1)
        values = {name: rows.read(numbers[share]) for name, rows in examples.rows.items() if not rows.resident}
        if examples.offsets is not None:
            values["offsets"] = examples.offsets(len(numbers), generator)[share]
        with torch.cuda.stream(copying):
            moved = {name: to_device(value, device) for name, value in values.items()}
            copied = copying.record_event() if copying else None
        return Batch(moved | {"numbers": device_numbers[share]}, mine, len(numbers)), copied

    if not len(order):
        return
    pairs = zip(order.split(size), order.to(device).split(size), strict=True)
    if examples.resident:
        for pair in pairs:
            yield load(*pair)[0]
        return
    with ThreadPoolExecutor(1, initializer=_begin, initargs=(device,)) as thread:
        loading = deque(thread.submit(load, *pair) for pair in itertools.islice(pairs, _AHEAD))
        while loading:
            batch, copied = loading.popleft().result()
            loading.extend(thread.submit(load, *pair) for pair in itertools.islice(pairs, 1))
            if copied is not None:
                current = torch.cuda.current_stream()
                current.wait_event(copied)
                for value in batch.loaded.values():
                    value.record_stream(current)
            yield batch


@functools.cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """The stream of all copies, with high priority: no stream that computes, and may be captured, has it."""
    return torch.cuda.Stream(device, priority=-1)


def _begin(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
