"""Batches of samples on the device, the next ones read while it computes."""

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
"""Batches that are read before they are asked for."""


@dataclass(frozen=True)
class Examples:
    """What is known of samples, by number.

    Args:
        rows: ``inputs``, ``targets`` (`[n]` class indices or `[n, V]` values), and whatever else an objective is given.
        offsets: ``(count, generator or None) -> [count]``: inputs are words `[n, frames, bins]`, which are put on their
            canvas at these frames, drawn anew in training (with a generator).
    """

    rows: Mapping[str, Rows]
    offsets: Offsets | None = None

    @property
    def resident(self) -> bool:
        return all(rows.resident for rows in self.rows.values())

    def gather(self, loaded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What an objective is given of a batch; on the device, and nothing that a CUDA graph could not hold.

        Args:
            loaded: as :func:`batches` gives it.
        """
        numbers = loaded["numbers"]
        found = {name: rows.pick(numbers) if rows.resident else loaded[name] for name, rows in self.rows.items()}
        if "offsets" in loaded:
            found["inputs"] = place_words(found["inputs"], loaded["offsets"])
        return found


@dataclass(frozen=True)
class Batch:
    """This process's share of a batch.

    Args:
        loaded: on the device: ``numbers`` `[b]`, the samples', and what :meth:`Examples.gather` cannot find there.
        samples: b; or 0 where a short last batch has none for this process, which then gets another's.
        everyones: samples of the whole batch.
    """

    loaded: dict[str, Tensor]
    samples: int
    everyones: int


def batches(
    examples: Examples,
    order: Tensor,
    size: int,
    device: torch.device,
    generator: torch.Generator | None = None,
    shared: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Batches of samples.

    What is drawn anew is drawn for the whole batch, so that it does not depend on the number of processes. What is not
    on the device is read by another thread, and copied to a GPU on a stream of its own, two batches ahead.

    Args:
        examples: the source.
        order: `[n]`, numbers of the samples.
        size: of a batch, over all processes.
        device: where batches are wanted.
        generator: of what is drawn anew; none in evaluation.
        shared: number of this process, and of how many that share each batch.
    """
    rank, processes = shared
    copying = _copying(device) if device.type == "cuda" and not examples.resident else None

    def load(numbers: Tensor, there: Tensor) -> tuple[Batch, torch.cuda.Event | None]:
        mine = len(numbers[rank::processes])
        share = slice(rank, None, processes) if mine else slice(1)
        found = {name: rows.read(numbers[share]) for name, rows in examples.rows.items() if not rows.resident}
        if examples.offsets is not None:
            found["offsets"] = examples.offsets(len(numbers), generator)[share]
        with torch.cuda.stream(copying):
            moved = {name: to_device(value, device) for name, value in found.items()}
            copied = copying.record_event() if copying else None
        return Batch(moved | {"numbers": there[share]}, mine, len(numbers)), copied

    if not len(order):
        return
    pairs = zip(order.split(size), order.to(device).split(size), strict=True)
    if examples.resident:
        for numbers, there in pairs:
            yield load(numbers, there)[0]
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
    """The stream of all copies; of high priority, as no stream is that computes and may be captured."""
    return torch.cuda.Stream(device, priority=-1)


def _begin(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
