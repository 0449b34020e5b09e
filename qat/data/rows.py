"""Tables of one row per sample: on the device if they fit, else read from the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Read = Callable[[Tensor], Tensor]
_BLOCK = 256
"""Number of samples that are read at a time to fill a table."""


@dataclass(frozen=True)
class Rows:
    """One value for every sample, such as its input, by sample number.

    Args:
        source: table `[n, ...]`, or function ``numbers [B] -> [B, ...]`` that reads rows on the CPU.
        device: device where rows are used. A table there is *resident*: rows are picked on the device.
        axis: axis of the table along which rows lie.
    """

    source: Tensor | Read
    device: torch.device
    axis: int = 0

    @classmethod
    def within(
        cls, read: Read, numbers: Sequence[int], device: torch.device, mib: float, dtype: torch.dtype | None = None
    ) -> Rows:
        """Resident if the table takes at most ``mib`` MiB on the device, else read from the host.

        Args:
            read: function ``numbers [B] -> [B, ...]`` on the CPU, whose rows never change.
            numbers: numbers of the samples that will be used.
            device: device where rows are used.
            mib: largest size of the table.
            dtype: type of the rows; by default that of ``read``.
        """

        def converted(rows: Tensor) -> Tensor:
            return read(rows) if dtype is None else read(rows).to(dtype)

        used = torch.as_tensor(sorted(numbers))
        first, count = converted(used[:1]), int(used[-1]) + 1
        if first.nbytes * count > mib * 2**20:
            return cls(converted, device)
        table = empty_rows(first.to(device), count)
        for block in used.split(_BLOCK):
            table[block.to(device)] = converted(block).to(device)
        return cls(table, device)

    @property
    def resident(self) -> bool:
        return isinstance(self.source, Tensor) and self.source.device == self.device

    def read(self, numbers: Tensor) -> Tensor:
        """Rows `[B, ...]` on the host."""
        return self._picked(numbers) if isinstance(self.source, Tensor) else self.source(numbers)

    def fetch(self, numbers: Tensor) -> Tensor:
        """Rows `[B, ...]` on the device, by numbers on the CPU."""
        return self.pick(numbers.to(self.device)) if self.resident else to_device(self.read(numbers), self.device)

    def pick(self, numbers: Tensor) -> Tensor:
        """Rows `[B, ...]` of a resident table, by numbers on the device."""
        assert self.resident
        return self._picked(numbers)

    def _picked(self, numbers: Tensor) -> Tensor:
        table = self.source
        assert isinstance(table, Tensor)
        if table.dim() == 4 and table.stride(1) == 1:  # NHWC, which `index_select` would not keep
            return table.permute(0, 2, 3, 1).index_select(0, numbers).permute(0, 3, 1, 2)
        return table.index_select(self.axis, numbers)


def empty_rows(like: Tensor, count: int, device: torch.device | None = None) -> Tensor:
    """A table of ``count`` rows of NaN, shaped like the rows of ``like``; maps on a GPU are in NHWC.

    Args:
        like: rows `[B, ...]`.
        count: number of rows.
        device: device of the table, by default that of ``like``.
    """
    nhwc = like.dim() == 4 and (like.is_cuda or not like.is_contiguous())
    shape = [count, *like.shape[1:]]
    shape = [shape[0], shape[2], shape[3], shape[1]] if nhwc else shape
    table = torch.empty(shape, dtype=like.dtype, device=device or like.device)
    if table.is_floating_point():
        table.fill_(torch.nan)
    return table.permute(0, 3, 1, 2) if nhwc else table


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy from the host; to a GPU asynchronously from pinned memory, with `[B, C, H, W]` in NHWC."""
    if device.type != "cuda":
        return values.to(device)
    layout = torch.channels_last if values.dim() == 4 else torch.contiguous_format
    pinned = torch.empty_like(values, memory_format=layout, pin_memory=True).copy_(values)
    return pinned.to(device, non_blocking=True)
