"""Which product of the features is squared: a pure function of their shape."""

GRAMS = ("channel", "position", "batch")


def is_direct(rows: int, columns: int) -> bool:
    """Whether of the matrices F F^T, rows x rows, and F^T F, columns x columns, the first is the smaller one."""
    return rows <= columns


def gram_form(gram: str, samples: int, channels: int, positions: int) -> str:
    """Between what the products run whose squares are summed: "channel", "position", "batch" or "feature".

    The cosine of the Gram matrices F F^T follows from the products F_a^T F_b, F_a^T F_a and F_b^T F_b too.

    >>> gram_form("channel", 20, 512, 16)
    'position'
    """
    if gram == "batch":
        return "batch" if is_direct(samples, channels * positions) else "feature"
    return "channel" if channels <= positions else "position"
