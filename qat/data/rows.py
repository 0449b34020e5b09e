"""What is known of samples, by number: on the device where it fits, else read from the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Read = Callable[[Tensor], Tensor]
_BLOCK = 256
"""Samples that are read at once to fill a table."""


@dataclass(frozen=True)
class Rows:
    """One thing that is known of every sample, such as its input, by number.

    Args:
        source: all of it, `[n, ...]`, or ``numbers [B] -> [B, ...]``, both on the CPU.
        device: where it is wanted. A table that lies there is *resident*: its rows are picked on the device.
        axis: of a table, along which its rows lie; 0 but for few numbers a sample.
    """

    source: Tensor | Read
    device: torch.device
    axis: int = 0

    @classmethod
    def within(
        cls, read: Read, numbers: Sequence[int], device: torch.device, mib: float, dtype: torch.dtype | None = None
    ) -> Rows:
        """Resident if a table takes at most ``mib`` MiB of the device's memory (of the host's, on a CPU), else read.

        Args:
            read: ``numbers [B] -> [B, ...]``, on the CPU, the same for a sample each time.
            numbers: of the samples that will be asked for.
            device: where they are wanted.
            mib: what the table may take.
            dtype: what they are converted to; none keeps theirs.
        """

        def converted(rows: Tensor) -> Tensor:
            return read(rows) if dtype is None else read(rows).to(dtype)

        wanted = torch.as_tensor(sorted(numbers))
        first, count = converted(wanted[:1]), int(wanted[-1]) + 1
        if first.nbytes * count > mib * 2**20:
            return cls(converted, device)
        table = empty_rows(first.to(device), count)
        for block in wanted.split(_BLOCK):
            table[block.to(device)] = converted(block).to(device)
        return cls(table, device)

    @property
    def resident(self) -> bool:
        return isinstance(self.source, Tensor) and self.source.device == self.device

    def read(self, numbers: Tensor) -> Tensor:
        """These rows `[B, ...]`, from the host."""
        return self._picked(numbers) if isinstance(self.source, Tensor) else self.source(numbers)

    def fetch(self, numbers: Tensor) -> Tensor:
        """These rows `[B, ...]`, on the device, by numbers on the CPU."""
        return self.pick(numbers.to(self.device)) if self.resident else to_device(self.read(numbers), self.device)

    def pick(self, numbers: Tensor) -> Tensor:
        """These rows `[B, ...]` of a resident table, by numbers on the device."""
        assert self.resident
        return self._picked(numbers)

    def _picked(self, numbers: Tensor) -> Tensor:
        table = self.source
        assert isinstance(table, Tensor)
        if table.dim() == 4 and table.stride(1) == 1:  # NHWC, which `index_select` would not keep
            return table.permute(0, 2, 3, 1).index_select(0, numbers).permute(0, 3, 1, 2)
        return table.index_select(self.axis, numbers)


def empty_rows(like: Tensor, count: int, device: torch.device | None = None) -> Tensor:
    """A table of NaN for ``count`` rows like those of ``like``; `[B, C, H, W]` on a GPU in NHWC, elsewhere as it is.

    Args:
        like: `[B, ...]`.
        count: rows of the table.
        device: of the table; that of ``like`` if absent.
    """
    nhwc = like.dim() == 4 and (like.is_cuda or not like.is_contiguous())
    shape = [count, *like.shape[1:]]
    shape = [shape[0], shape[2], shape[3], shape[1]] if nhwc else shape
    table = torch.empty(shape, dtype=like.dtype, device=device or like.device)
    if table.is_floating_point():
        table.fill_(torch.nan)
    return table.permute(0, 3, 1, 2) if nhwc else table


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy from the host; to a GPU from pinned memory, while it computes, and `[B, C, H, W]` in NHWC."""
    if device.type != "cuda":
        return values.to(device)
    layout = torch.channels_last if values.dim() == 4 else torch.contiguous_format
    pinned = torch.empty_like(values, memory_format=layout, pin_memory=True).copy_(values)
    return pinned.to(device, non_blocking=True)
