"""The Gram cosine as an operator that keeps three scalars per sample.

With F `[C, N]` of one sample, n = <G_a, G_b> = |F_a^T F_b|^2, aa = |G_a|^2, bb = |G_b|^2 and cosine = n /
sqrt(aa bb):

    dcosine/dF_a = 2 ( G_b F_a / sqrt(aa bb) - cosine G_a F_a / aa ),    G_b F_a = F_b (F_b^T F_a)

Each sample of a and of b is first scaled by a power of two that brings its largest feature into [1, 2):
fourth powers leave the range of float32 at features of 1e-10 and 1e10.
"""

import math
from typing import Any

import torch
from torch import Tensor

from qkernels.ops._library import define
from qkernels.ops.gram_cosine.config import gram_form


def _forward_fake(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _compute_dtype(a, b)
    stats = a.new_empty(2, a.shape[0], dtype=dtype)
    return a.new_empty(a.shape[0], dtype=dtype), stats, torch.empty_like(stats)


def _forward_save(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs, *output)


def _forward_backward(ctx: Any, dcosine: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b, cosine, stats_a, stats_b = ctx.saved_tensors
    need_a, need_b = ctx.needs_input_grad
    da = gram_cosine_da(dcosine, cosine, a, b, stats_a, stats_b) if need_a else None
    db = gram_cosine_da(dcosine, cosine, b, a, stats_b, stats_a) if need_b else None
    return da, db


@define("gram_cosine", fake=_forward_fake, save=_forward_save, backward=_forward_backward)
def gram_cosine(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosine `[B]`, and for each operand `[2, B]`: |G|^2 of the scaled sample, and its scale."""
    dtype = _compute_dtype(a, b)
    scale_a, scale_b = _power_of_two(a, dtype), _power_of_two(b, dtype)
    fa, fb = _matrix(a, scale_a), _matrix(b, scale_b)
    if gram_form(fa.shape[1], fa.shape[2]) == "channel":
        gram_a, gram_b = fa @ fa.mT, fb @ fb.mT
        n = (gram_a * gram_b).sum((1, 2))
    else:
        gram_a, gram_b = fa.mT @ fa, fb.mT @ fb
        n = (fa.mT @ fb).square().sum((1, 2))
    aa, bb = gram_a.square().sum((1, 2)), gram_b.square().sum((1, 2))
    return n * _inverse_norm(aa, bb), torch.stack([aa, scale_a]), torch.stack([bb, scale_b])


def _da_fake(dcosine: Tensor, cosine: Tensor, a: Tensor, b: Tensor, stats_a: Tensor, stats_b: Tensor) -> Tensor:
    return a.new_empty(a.shape)


def _da_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _da_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    raise NotImplementedError(
        "gram_cosine has no second derivative; compute it under qkernels.set_backend('reference')"
    )


@define("gram_cosine_da", fake=_da_fake, save=_da_save, backward=_da_backward)
def gram_cosine_da(dcosine: Tensor, cosine: Tensor, a: Tensor, b: Tensor, stats_a: Tensor, stats_b: Tensor) -> Tensor:
    """Gradient of the cosine by `a`; its two terms nearly cancel, so they are summed before any rounding."""
    (aa, scale_a), (bb, scale_b) = stats_a, stats_b
    fa, fb = _matrix(a, scale_a), _matrix(b, scale_b)
    factor = 2 * dcosine * scale_a
    cross = (factor * _inverse_norm(aa, bb)).view(-1, 1, 1)
    own = (factor * cosine / torch.where(aa == 0, 1, aa)).view(-1, 1, 1)
    if gram_form(fa.shape[1], fa.shape[2]) == "channel":
        da = (fb @ fb.mT * cross - fa @ fa.mT * own) @ fa
    else:
        da = fb @ (fb.mT @ fa * cross) - fa @ (fa.mT @ fa * own)
    return da.view(a.shape).to(a.dtype)


def _compute_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)


def _power_of_two(f: Tensor, dtype: torch.dtype) -> Tensor:
    """Per sample, what brings the largest |feature| into [1, 2), as far as the type's normal numbers reach."""
    largest = f.flatten(1).abs().amax(1).to(dtype)
    top = math.frexp(torch.finfo(dtype).max)[1]
    exponent = torch.frexp(largest).exponent.clamp(3 - top, top - 1)
    return torch.exp2((1 - exponent).to(dtype))


def _matrix(f: Tensor, scale: Tensor) -> Tensor:
    return f.reshape(*f.shape[:2], math.prod(f.shape[2:])).to(scale.dtype) * scale.view(-1, 1, 1)


def _inverse_norm(aa: Tensor, bb: Tensor) -> Tensor:
    """1 / sqrt(aa bb); 1 where a sample is all zero, whose products are 0 already; NaN stays NaN."""
    norm = aa.sqrt() * bb.sqrt()
    return torch.where(norm == 0, 1, norm).reciprocal()
