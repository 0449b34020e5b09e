"""The Gram cosine and its gradient in plain PyTorch; the products alone pass over the features.

Between the rows of F `[rows, columns]`, or between its columns, whichever are fewer. The matrices that the gradient
multiplies F by are made in the forward pass, of Gram matrices that are in the processor's caches then, and kept in a
workspace:

    direct, rows <= columns:  dF_a = D_a F_a,          D_a = G_b / (|G_a| |G_b|) - cosine G_a / |G_a|^2
    dual:                     dF_a = F_b M - F_a P_a,  M = F_b^T F_a / (|G_a| |G_b|), P_a = cosine F_a^T F_a / |G_a|^2
"""

import torch
from torch import Tensor

from qkernels.ops._library import power_of_two
from qkernels.ops.gram_cosine.config import is_direct
from qkernels.ops.gram_cosine.reference import matrices

LEAST, MOST = 2.0**-60, 2.0**100
"""Bounds of |G|^2 within which features need no scale: with 2^30 of them, the largest is between 2^-45 and 2^25."""


def workspace_size(rows: int, columns: int, items: int, triangles: bool, both: bool) -> tuple[int, ...]:
    """Shape of the workspace: a matrix for each gradient, and M in front of them between columns."""
    if triangles or is_direct(rows, columns):
        return 1 + both, items, rows, rows
    return 2 + both, items, columns, columns


def forward(
    a: Tensor,
    b: Tensor,
    b_stats: Tensor | None,
    triangles: bool,
    gram: str,
    centred: bool,
    dtype: torch.dtype,
    both: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cosines `[items]`, statistics `[2, items]` of both operands, and the workspace; arguments as of the operator."""
    b_stats = None if b_stats is None else b_stats.to(dtype)
    known_b = None if b_stats is None else b_stats[1]

    def computed(scale_a: Tensor | None, scale_b: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        fa, scale_a = scaled(a, gram, centred, dtype, scale_a)
        if triangles:
            assert scale_b is not None
            fb = b.to(dtype)
        else:
            fb, scale_b = scaled(b, gram, centred, dtype, scale_b)
        direct = triangles or is_direct(*fa.shape[1:])
        squares, grams = _products(fa, fb, b_stats, triangles, direct, both)
        return _finished(*squares, grams, scale_a, scale_b, direct, both)

    # Scaling passes over the features. On the CPU, where the host can look at values, it is left out if it can be.
    if a.device.type == "cpu" and (known_b is None or triangles or bool((known_b == 1).all())):
        one = a.new_ones(matrices(a, gram).shape[0], dtype=dtype)
        results = computed(one, one if known_b is None else known_b)
        if all(bool(((stats[0] > LEAST) & (stats[0] < MOST)).all()) for stats in results[1:3]):
            return results
    return computed(None, known_b)


def _products(
    fa: Tensor, fb: Tensor, b_stats: Tensor | None, triangles: bool, direct: bool, both: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
    """(<G_a, G_b>, |G_a|^2, |G_b|^2); and G_b, G_a, or F_b^T F_a, F_a^T F_a and, where it is needed, F_b^T F_b."""
    if direct:
        gram_a = fa @ fa.mT
        gram_b = from_triangles(fb, fa.shape[1]) if triangles else fb @ fb.mT
        bb = _square(gram_b) if b_stats is None else b_stats[0]
        return (_inner(gram_a, gram_b), _square(gram_a), bb), [gram_b, gram_a]
    grams = [fb.mT @ fa, fa.mT @ fa]
    if b_stats is None or both:
        grams.append(fb.mT @ fb)
    bb = _square(grams[2]) if b_stats is None else b_stats[0]
    return (_square(grams[0]), _square(grams[1]), bb), grams[: 2 + both]


def _finished(
    inner: Tensor,
    aa: Tensor,
    bb: Tensor,
    grams: list[Tensor],
    scale_a: Tensor,
    scale_b: Tensor,
    direct: bool,
    both: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    norm = aa.sqrt() * bb.sqrt()
    inverse = torch.where(norm == 0, 1, norm).reciprocal()  # 1 where a sample is all zero; NaN stays NaN
    cosine = inner * inverse
    own = (cosine / torch.where(square == 0, 1, square) for square in (aa, bb))
    cross, own_a, own_b = (factor.view(-1, 1, 1) for factor in (inverse, *own))
    if direct:
        gram_b, gram_a = grams
        parts = [(gram_a * cross).addcmul_(gram_b, own_b, value=-1)] if both else []
        parts.insert(0, gram_b.mul_(cross).addcmul_(gram_a, own_a, value=-1))
    else:
        parts = [matrix.mul_(factor) for matrix, factor in zip(grams, (cross, own_a, own_b), strict=False)]
    workspace = torch.stack(parts) if len(parts) > 1 else parts[0][None]
    return cosine, torch.stack([aa, scale_a]), torch.stack([bb, scale_b]), workspace


def gradient(
    factor: Tensor,
    incoming: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    workspace: Tensor,
    which: int,
    triangles: bool,
    gram: str,
    centred: bool,
) -> Tensor:
    """`factor` `[items]` times the derivative of the cosines by `a`, operand `which` of the forward, plus `incoming`.

    In the features' own order in memory: channels-last features have a channels-last gradient, without a copy.
    """
    fa = scaled(a, gram, centred, factor.dtype, scale_a)[0]
    factor = (2 * factor * scale_a).view(-1, 1, 1)
    df = None if incoming is None else matrices(incoming, gram).to(factor.dtype)
    by_rows = fa.stride(2) == 1
    if triangles or is_direct(*fa.shape[1:]):
        df = _product(df, workspace[which] * factor, fa, by_rows)
    else:
        fb = scaled(b, gram, centred, factor.dtype, scale_b)[0]
        cross = workspace[0] * factor
        df = _product(df, fb, cross.mT if which else cross, by_rows)
        df = _product(df, fa, workspace[1 + which] * -factor, by_rows)
    df = df.mT if gram == "position" else df
    df = df.reshape(a.shape) if gram == "batch" or a.dim() == 2 else df.unflatten(2, a.shape[2:])
    da = torch.empty_like(a)  # costs nothing where it is not written
    return df if (df.stride(), df.dtype) == (da.stride(), da.dtype) else da.copy_(df)


def _product(add: Tensor | None, x: Tensor, y: Tensor, by_rows: bool) -> Tensor:
    """x y + add, written by rows or by columns."""
    if not by_rows:
        x, y, add = y.mT, x.mT, None if add is None else add.mT
    z = x @ y if add is None else torch.baddbmm(add, x, y)
    return z if by_rows else z.mT


def scaled(
    features: Tensor, gram: str, centred: bool, dtype: torch.dtype, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The matrices F `[items, rows, columns]`, and the power of two that scales each."""
    f = matrices(features, gram).to(dtype)
    unchanged = scale is not None and f.device.type == "cpu" and bool((scale == 1).all())
    scale = power_of_two(f) if scale is None else scale
    f = f if unchanged else f * scale.view(-1, 1, 1)
    return (_centred(f) if centred else f), scale


def from_triangles(triangles: Tensor, rows: int) -> Tensor:
    """Symmetric matrices `[items, rows, rows]` of their upper triangles, row by row."""
    i, j = torch.triu_indices(rows, rows, device=triangles.device).unbind()
    place = torch.empty(rows, rows, dtype=torch.long, device=triangles.device)
    place[i, j] = place[j, i] = torch.arange(len(i), device=triangles.device)
    return triangles.index_select(1, place.flatten()).view(-1, rows, rows)


def _centred(f: Tensor) -> Tensor:
    return f - f.mean(1, keepdim=True)


def _square(matrix: Tensor) -> Tensor:
    return _inner(matrix, matrix)


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """<x, y> of each item, without the products in memory."""
    inner: Tensor = torch.linalg.vecdot(x.flatten(1), y.flatten(1))
    return inner
