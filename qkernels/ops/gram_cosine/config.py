"""Which product of the features is squared: a pure function of their shape."""


def gram_form(channels: int, positions: int) -> str:
    """The smaller of the matrices F F^T, C x C ("channel"), and F^T F, N x N ("position").

    >>> gram_form(512, 16)
    'position'
    """
    return "channel" if channels <= positions else "position"
