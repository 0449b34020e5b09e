"""Definitions of the Gram cosine and of the released research code's loss: materialised, by plain autograd."""

import torch
from torch import Tensor


def gram_cosine(a: Tensor, b: Tensor) -> Tensor:
    """<G_a, G_b> / (|G_a| |G_b|) per sample, with the Gram matrices G = F F^T `[B, C, C]` in memory.

    Args:
        a: `[B, C, *spatial]`.
        b: `[B, C, *spatial]`.

    Returns:
        `[B]`; 0 where a sample of a or of b is all zero. Squares of features must not leave the dtype's
        range.
    """
    gram_a, gram_b = (torch.einsum("bc...,bd...->bcd", f, f) for f in (a, b))
    inner, norm_a, norm_b = (
        torch.einsum("bcd,bcd->b", g, h) for g, h in ((gram_a, gram_b), (gram_a, gram_a), (gram_b, gram_b))
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
