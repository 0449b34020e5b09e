"""Definition of the Gram cosine: with the matrices in memory, by plain autograd."""

import torch
from torch import Tensor


def matrices(features: Tensor, gram: str, centred: bool = False) -> Tensor:
    """The matrices F `[items, rows, columns]` whose Gram matrices F F^T `gram` names.

    Args:
        features: `[B, C, *spatial]`, N positions.
        gram: "channel", F `[B, C, N]`; "position", F `[B, N, C]`; "batch", F `[1, B, C N]`.
        centred: subtract from each column its mean over the rows.

    Returns:
        A view if the strides allow it, or centred values.
    """
    if gram == "batch":
        f = features.flatten(1)[None]
    else:
        f = features.flatten(2) if features.dim() > 2 else features[..., None]
        f = f.mT if gram == "position" else f
    return f - f.mean(1, keepdim=True) if centred else f


def gram_cosine(a: Tensor, b: Tensor, gram: str = "channel", centred: bool = False) -> Tensor:
    """<G_a, G_b> / (|G_a| |G_b|), with the Gram matrices G = F F^T in memory.

    Args:
        a: `[B, C, *spatial]`.
        b: `[B, C, *spatial]`.
        gram: rows of the matrices, see `matrices`.
        centred: whether columns are centred first.

    Returns:
        `[B]`, or `[1]` for "batch"; 0 where a matrix is all zero. Squares of features must not leave the dtype's range.
    """
    gram_a, gram_b = (torch.einsum("brk,bsk->brs", f, f) for f in (matrices(x, gram, centred) for x in (a, b)))
    inner, norm_a, norm_b = (
        torch.einsum("brs,brs->b", g, h) for g, h in ((gram_a, gram_b), (gram_a, gram_a), (gram_b, gram_b))
    )
    norms = norm_a * norm_b
    return inner * torch.where(norms == 0, 1, norms).rsqrt()
