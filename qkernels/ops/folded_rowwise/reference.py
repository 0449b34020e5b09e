"""Definition of the released research code's loss: both Gram matrices in memory, by plain autograd."""

from torch import Tensor


def folded_rowwise(trained: Tensor, frozen: Tensor, clamp: str = "each", eps: float = 1e-8) -> Tensor:
    """The released code's similarity: the batch folded into the channels, a cosine per row.

    F `[B C, H W]`, G = F F^T / (B C H W) / 0.001 `[B C, B C]`; the mean over rows of the absolute cosine,
    squared.

    Args:
        trained: `[B, C, *spatial]`.
        frozen: `[B, C, *spatial]`.
        clamp: "each" clamps each row's norm at `eps` (torch >= 1.12), "product" the product of both (torch 1.7).
        eps: lower bound of the norms of the scaled rows, so that the scale of the features matters.

    Returns:
        A scalar for the batch; NaN for an empty one.
    """
    rows = trained.shape[0] * trained.shape[1]
    positions = trained.shape[2:].numel()
    scale = 1 / max(trained.numel(), 1) / 0.001
    gram_t, gram_p = ((f @ f.T) * scale for f in (trained.reshape(rows, positions), frozen.reshape(rows, positions)))
    inner, square_t, square_p = (gram_t * gram_p).sum(1), gram_t.square().sum(1), gram_p.square().sum(1)
    if clamp == "each":
        norms = (square_t.clamp_min(eps**2) * square_p.clamp_min(eps**2)).sqrt()
    else:
        norms = (square_t * square_p).clamp_min(eps**2).sqrt()
    return (inner / norms).abs().mean().square()
