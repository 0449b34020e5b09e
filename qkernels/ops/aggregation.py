"""The research code's other comparisons of feature maps, in plain PyTorch: an aggregation, then a distance.

Source: the code of Guizzo et al., "Anti-transfer learning for task invariance in convolutional neural networks for
speech processing", 2021.
"""

import torch
from torch import Tensor


def similarity(
    trained: Tensor, frozen: Tensor, aggregation: str, distance: str, generator: torch.Generator | None = None
) -> Tensor:
    """Distance of the aggregated maps.

    Args:
        trained: `[B, C, *spatial]`, float32 or float64, N positions.
        frozen: `[B, C, *spatial]`.
        aggregation: as in `losses.CosSquared` and `losses.MseSigmoid`; "none" leaves `[B, C, N]`, "pairwise" gives
            `[B, 1, C C N]`, the others over channels `[B, 1, N]`.
        distance: "cos-squared", the square of the mean of the absolute cosines along the last axis; "mse-sigmoid",
            -sigmoid(mean squared difference).
        generator: source of randomness of "stochastic_pairwise"; None is PyTorch's for the features' device.

    Returns:
        A scalar for the batch. The cosine with a vector of zeros is 0, with gradient 0; NaN gives NaN.
    """
    t, p = (x.flatten(2) if x.dim() > 2 else x[..., None] for x in (trained, frozen))
    compare = _mean_cosine if distance == "cos-squared" else _mean_square
    if aggregation == "stochastic_pairwise":
        channels = _run_of_channels(t, generator)
        t, p = (x.index_select(1, channels) for x in (t, p))
    if aggregation.endswith("pairwise"):
        compare = _mean_cosine_of_pairs if distance == "cos-squared" else _mean_square_of_pairs
    elif aggregation == "gram":
        assert distance == "mse-sigmoid"
        compare = _mean_square_of_grams
    elif aggregation != "none":
        t, p = (_over_channels(x, aggregation) for x in (t, p))
    value = compare(t, p)
    return value.square() if distance == "cos-squared" else -value.sigmoid()


def _over_channels(x: Tensor, aggregation: str) -> Tensor:
    if aggregation == "mul_comp":
        return (0.001 * (x + 1e-10).log().sum(1, keepdim=True)).exp()
    if aggregation == "max":
        return x.amax(1, keepdim=True)
    return x.mean(1, keepdim=True) if aggregation == "mean" else x.sum(1, keepdim=True)


def _run_of_channels(x: Tensor, generator: torch.Generator | None) -> Tensor:
    samples, channels, _ = x.shape
    length = max(1, channels // samples) if samples > 1 else 1
    device = x.device if generator is None else generator.device
    start = torch.randint(channels - length + 1, (1,), generator=generator, device=device)
    return start.to(x.device) + torch.arange(length, device=x.device)


def _mean_cosine(t: Tensor, p: Tensor) -> Tensor:
    return (_unit(t) * _unit(p)).sum(-1).abs().mean()


def _mean_square(t: Tensor, p: Tensor) -> Tensor:
    return (t - p).square().mean()


def _mean_cosine_of_pairs(t: Tensor, p: Tensor) -> Tensor:
    """sum_ij <t_i, p_j> = <sum_i t_i, sum_j p_j>, and the paired maps' norms are sqrt(C) |t| and sqrt(C) |p|."""
    sum_t, sum_p = (_unit(x.flatten(1)).view_as(x).sum(1) for x in (t, p))
    return (sum_t * sum_p).sum(-1).abs().mean() / t.shape[1]


def _mean_square_of_pairs(t: Tensor, p: Tensor) -> Tensor:
    """The mean of |t_i - p_j|^2 over i, j: the variances over the channels plus the square between their means.

    These are sums of squares, which do not cancel if the maps are nearly equal.
    """
    mean_t, mean_p = (x.mean(1, keepdim=True) for x in (t, p))
    return _mean_square(t, mean_t) + _mean_square(p, mean_p) + _mean_square(mean_t, mean_p)


def _mean_square_of_grams(t: Tensor, p: Tensor) -> Tensor:
    """With S = T + P and D = T - P, T T^T - P P^T = (S D^T + D S^T) / 2: rounding is relative to D, not to T.

    If a sample has fewer positions N than the batch has channels, its square is summed over N x N matrices.
    """
    scale = 1 / t.numel() / 0.001
    t, p = t.flatten(0, 1), p.flatten(0, 1)
    rows, columns = t.shape
    s, d = (t + p) * scale, t - p
    if rows <= columns:
        half = s @ d.T
        return (half + half.T).square().mean() / 4
    cross = d.T @ s
    return ((s.T @ s * (d.T @ d)).sum() + (cross * cross.T).sum()) / 2 / rows**2


def _unit(x: Tensor) -> Tensor:
    """x / |x| along the last axis, 0 where x is 0; also for 1e-30 and 1e30, whose squares leave float32's range."""
    largest = x.detach().abs().amax(-1, keepdim=True)
    x = x / torch.where(largest == 0, 1, largest)
    norm = x.norm(dim=-1, keepdim=True)
    return x / torch.where(norm == 0, 1, norm)
