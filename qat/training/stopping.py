"""Early stopping."""

from __future__ import annotations

from collections.abc import Sequence


def best_epoch(losses: Sequence[float]) -> int:
    """The first epoch, from 0, with the lowest loss; a NaN is never lower.

    >>> best_epoch([3.0, 1.0, 2.0, 1.0])
    1
    """
    best = 0
    for epoch, loss in enumerate(losses):
        if loss < losses[best] or losses[best] != losses[best]:
            best = epoch if loss == loss else best
    return best


def should_stop(losses: Sequence[float], patience: int, rule: str = "standard") -> bool:
    """Whether training ends after the epochs so far.

    Args:
        losses: validation loss of every epoch so far.
        patience: number of epochs without a strictly lower loss before training stops.
        rule: ``standard``, or ``reference-window`` of the released code: from epoch index patience + 1 on, stop if the
            oldest of the last patience - 1 losses is their minimum.

    >>> should_stop([1.0, 2.0, 2.0], patience=2), should_stop([1.0, 2.0, 0.5], patience=2)
    (True, False)
    """
    if rule == "reference-window":
        window = losses[-(patience - 1) :]
        return len(losses) > patience + 1 and window[0] == min(window)
    return len(losses) - 1 - best_epoch(losses) >= patience
