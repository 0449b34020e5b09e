"""Axes of tensors as the kernels index them: with at most two strides, an outer and an inner one."""

Axis = list[tuple[int, int]]  # (size, stride) of dimensions, from the outermost one on


def merged(axes: list[Axis]) -> list[Axis]:
    """The same axis of several tensors with the fewest dimensions that all of them can have.

    >>> merged([[(4, 10), (5, 2)], [(4, 5), (5, 1)]])
    [[(20, 2)], [(20, 1)]]
    """
    out: list[Axis] = [[] for _ in axes]
    for dims in zip(*axes, strict=True):
        size = dims[0][0]
        if size == 1:
            continue
        if out[0] and all(axis[-1][1] == size * stride for axis, (_, stride) in zip(out, dims, strict=True)):
            for axis, (_, stride) in zip(out, dims, strict=True):
                axis[-1] = (axis[-1][0] * size, stride)
        else:
            for axis, dim in zip(out, dims, strict=True):
                axis.append(dim)
    return out


def two_levels(axis: Axis) -> Axis:
    """An axis of at most two dimensions as exactly two."""
    return ([(1, 0), (1, 1)] if not axis else [(1, 0), axis[0]]) if len(axis) < 2 else axis
