"""Definitions of the Gram cosine and of the released research code's loss: materialised, by plain autograd."""

import torch
from torch import Tensor


def matrices(features: Tensor, gram: str, centred: bool = False) -> Tensor:
    """The matrices F `[items, rows, columns]` whose Gram matrices F F^T `gram` names.

    Args:
        features: `[B, C, *spatial]`, N positions.
        gram: "channel", F `[B, C, N]`; "position", F `[B, N, C]`; "batch", F `[1, B, C N]`.
        centred: subtract from each column its mean over the rows.

    Returns:
        A view where `features` allows one, or centred values.
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
        gram: whose matrix, see `matrices`.
        centred: of centred columns.

    Returns:
        `[B]`, or `[1]` for "batch"; 0 where a matrix is all zero. Squares of features must not leave the dtype's range.
    """
    gram_a, gram_b = (torch.einsum("brk,bsk->brs", f, f) for f in (matrices(x, gram, centred) for x in (a, b)))
    inner, norm_a, norm_b = (
        torch.einsum("brs,brs->b", g, h) for g, h in ((gram_a, gram_b), (gram_a, gram_a), (gram_b, gram_b))
    )
    norms = norm_a * norm_b
    return inner * torch.where(norms == 0, 1, norms).rsqrt()


def folded_rowwise(trained: Tensor, frozen: Tensor, clamp: str = "each", eps: float = 1e-8) -> Tensor:
    """The similarity that the released code computes: the batch folded into the channels, one cosine per row.

    F `[B C, H W]`, G = F F^T / (B C H W) / 0.001 `[B C, B C]`; the mean over rows of the absolute cosine,
    squared.

    Args:
        trained: `[B, C, *spatial]`.
        frozen: `[B, C, *spatial]`.
        clamp: "each" clamps each row's norm at `eps` (torch >= 1.12), "product" the product of both (torch
        1.7). eps: the clamp; it acts on the scaled rows, so the scale of the features matters.

    Returns:
        One scalar for the batch.
    """
    rows = trained.shape[0] * trained.shape[1]
    scale = 1 / trained.numel() / 0.001
    gram_t, gram_p = ((f @ f.T) * scale for f in (trained.reshape(rows, -1), frozen.reshape(rows, -1)))
    inner, square_t, square_p = (gram_t * gram_p).sum(1), gram_t.square().sum(1), gram_p.square().sum(1)
    if clamp == "each":
        norms = (square_t.clamp_min(eps**2) * square_p.clamp_min(eps**2)).sqrt()
    else:
        norms = (square_t * square_p).clamp_min(eps**2).sqrt()
    return (inner / norms).abs().mean().square()
