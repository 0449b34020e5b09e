"""What torchrun says to the processes that it starts, in their environment."""

from __future__ import annotations

import os
from typing import NamedTuple

NUMBERS = ("RANK", "WORLD_SIZE")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")


class Place(NamedTuple):
    """A process's place among those that train together: ``local_rank`` is that on its own machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def place() -> Place | None:
    """The place that torchrun gave this process; None without torchrun.

    Raises:
        ValueError: its variables are there in part, as one that an earlier session has left, or are no places.
    """
    there = {name: os.environ[name] for name in (*NUMBERS, *ADDRESS) if name in os.environ}
    if not there.keys() & set(NUMBERS):
        return None
    told = " and ".join(f"{name}={there[name]}" for name in NUMBERS if name in there)
    told += f" {'are' if there.keys() >= set(NUMBERS) else 'is'} set, as by torchrun, "
    advice = "; unset them, or start with torchrun"
    if absent := [name for name in (*NUMBERS, *ADDRESS) if name not in there]:
        raise ValueError(f"{told}but {', '.join(absent)} {'are' if absent[1:] else 'is'} not{advice}")
    try:
        found = Place(*(int(os.environ.get(name, "0")) for name in (*NUMBERS, "LOCAL_RANK")))
    except ValueError:
        raise ValueError(f"{told}but a place is whole numbers (LOCAL_RANK too){advice}") from None
    if not (0 <= found.rank < found.world_size and found.local_rank >= 0):
        raise ValueError(f"{told}but a rank is from 0 to below the number of processes{advice}")
    return found


def leads() -> bool:
    """Whether this process is the first, or the only one: it writes and prints.

    Raises:
        ValueError: see :func:`place`.
    """
    return (place() or Place()).rank == 0
