"""Every loss of the table as its papers and code have it: matrices in memory, rows in Python loops."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qkernels import anti_transfer_loss
from qkernels.losses import LOSSES, Loss

EVERY = [kind(*values) for kind in LOSSES.values() for values in itertools.product(*kind.options().values())]
every_loss = pytest.mark.parametrize("loss", EVERY, ids=repr)
GRAMS = [loss for loss in EVERY if loss.gram]
every_gram_loss = pytest.mark.parametrize("loss", GRAMS, ids=repr)
SEED = 7


def features(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float64, requires_grad: bool = False, loss: Loss = None
) -> Any:
    """As after a ReLU: non-negative, so that Gram matrices are similar and gradients nearly cancel; not all alike."""
    # The sigmoid of a mean square of Grams of numbers near 1 is 1, without gradient.
    size = 0.02 if getattr(loss, "aggregation", None) == "gram" else 1
    maps = (torch.randn(shape, dtype=dtype).relu() + 0.1 * torch.rand(shape, dtype=dtype) + 0.01 for _ in range(2))
    return [(size * x).requires_grad_(requires_grad) for x in maps]


def computed(
    loss: Loss, a: torch.Tensor, b: torch.Tensor, function: Callable[..., Any] = anti_transfer_loss, **options: Any
) -> Any:
    """The loss; what is drawn has always the same seed."""
    if getattr(loss, "aggregation", None) == "stochastic_pairwise":
        options["generator"] = torch.Generator().manual_seed(SEED)
    return function(a, b, loss=loss, **options)


def literal(loss: Loss, a: torch.Tensor, b: torch.Tensor, channels: Any = None) -> Any:
    """Of a loss that is a mean over samples, the values of all of them."""
    if options := gram_options(loss):
        return cosine(a, b, *options) ** 2
    if loss.name == "folded-rowwise":
        return folded(a, b, loss.clamp)
    if channels is None and loss.aggregation == "stochastic_pairwise":
        channels = run_of_channels(SEED, *a.shape[:2])
    a, b = (x.reshape(-1, x.shape[-1]) for x in maps(a, b, loss.aggregation, channels))
    if loss.name == "mse-sigmoid":
        return -1 / (1 + torch.exp(-((a - b) ** 2).mean()))
    cosines = [(u @ v / (u @ u).sqrt() / (v @ v).sqrt()).abs() for u, v in zip(a, b, strict=True)]
    return (sum(cosines) / len(cosines)) ** 2


def gram_options(loss: Loss) -> Any:
    """Whose Gram matrix it is, and whether of centred columns, as the loss's name and fields say it."""
    if loss.name == "cka":
        return "batch", True
    return (loss.name.removeprefix("gram-"), getattr(loss, "centred", False)) if "gram-" in loss.name else None


def cosine(a: torch.Tensor, b: torch.Tensor, gram: str = "channel", centred: bool = False) -> Any:
    """Sample by sample, with the Gram matrices in memory: centred H G H, H = I - 1 1^T / rows."""
    values = []
    for sample_a, sample_b in zip(*([x] if gram == "batch" else x for x in (a, b)), strict=True):
        grams = []
        for sample in (sample_a, sample_b):
            f = sample.reshape(sample.shape[0], -1)
            f = f.T if gram == "position" else f
            h = torch.eye(len(f), dtype=f.dtype) - torch.full((len(f), len(f)), 1 / len(f), dtype=f.dtype)
            grams.append(h @ (f @ f.T) @ h if centred else f @ f.T)
        gram_a, gram_b = grams
        values.append((gram_a * gram_b).sum() / (gram_a.norm() * gram_b.norm()))
    return values[0] if gram == "batch" else torch.stack(values)


def rows_of(shape: tuple[int, ...], gram: str) -> Any:
    return {"channel": shape[1], "position": math.prod(shape[2:]), "batch": shape[0]}[gram]


def is_zero(loss: Loss, shape: tuple[int, ...]) -> Any:
    """Whether nothing is left of features of this shape: a single row less its mean."""
    gram, centred = gram_options(loss) or (None, False)
    return centred and rows_of(shape, gram) == 1


def folded(a: torch.Tensor, b: torch.Tensor, clamp: str) -> Any:
    """The released code step by step (its quirks included), row by row."""
    grams = []
    for f in (a, b):
        rows = f.reshape(f.shape[0] * f.shape[1], -1)
        grams.append(rows @ rows.T / f.numel() / 0.001)
    cosines = []
    for u, v in zip(*grams, strict=True):
        norms = u.norm(), v.norm()
        if clamp == "each":
            norms = norms[0].clamp_min(1e-8), norms[1].clamp_min(1e-8)
        cosines.append((u @ v / (norms[0] * norms[1]).clamp_min(1e-16 if clamp == "each" else 1e-8)).abs())
    return (sum(cosines) / len(cosines)) ** 2


def maps(a: torch.Tensor, b: torch.Tensor, aggregation: Any, channels: Any = None) -> Any:
    """Both maps as rows along the last axis, laid out as the research code lays them out."""
    a, b = (x.reshape(x.shape[0], x.shape[1], -1) for x in (a, b))
    if channels is not None:
        a, b = a[:, channels], b[:, channels]
    samples, count, _ = a.shape
    if aggregation == "gram":
        rows = [x.reshape(samples * count, -1) for x in (a, b)]
        return [torch.stack([torch.stack([u @ v for v in f]) for u in f]) / f.numel() / 0.001 for f in rows]
    if aggregation in ("pairwise", "stochastic_pairwise"):
        pairs = [(i, j) for i in range(count) for j in range(count)]
        return torch.cat([a[:, i] for i, _ in pairs], -1), torch.cat([b[:, j] for _, j in pairs], -1)
    if aggregation == "none":
        return a, b
    aggregated = []
    for x in (a, b):
        total = x[:, 0] if aggregation != "mul_comp" else (x[:, 0] + 1e-10) ** 0.001
        for c in range(1, count):
            if aggregation == "mul_comp":
                total = total * (x[:, c] + 1e-10) ** 0.001
            else:
                total = torch.maximum(total, x[:, c]) if aggregation == "max" else total + x[:, c]
        aggregated.append(total / count if aggregation == "mean" else total)
    return aggregated


def run_of_channels(seed: Any, samples: Any, channels: Any) -> Any:
    """The channels that "stochastic_pairwise" draws with this seed."""
    length = max(1, channels // samples) if samples > 1 else 1
    start = torch.randint(channels - length + 1, (1,), generator=torch.Generator().manual_seed(seed)).item()
    return slice(start, start + length)
