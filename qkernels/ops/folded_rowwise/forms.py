"""The loss and its gradient in plain PyTorch, without anything of size M x M.

With F `[M, N]` of all rows (b, c), G = F F^T and, for each row a,

    inner = sum_b G_t[a,b] G_p[a,b]     tt = sum_b G_t[a,b]^2     pp = sum_b G_p[a,b]^2     cosine = inner / norms

the row form has inner = f_t (F_t^T F_p) f_p^T, tt = f_t (F_t^T F_t) f_t^T, and with alpha, beta the derivatives of the
loss by inner and tt

    dF_t = alpha F_p (F_p^T F_t) + F_p (F_p^T alpha F_t) + 2 beta F_t (F_t^T F_t) + 2 F_t (F_t^T beta F_t)

where alpha and beta scale rows. The gram form computes the rows of both G panel by panel, and

    dF_t[a] = sum_b ( (alpha[a] + alpha[b]) G_p[a,b] + 2 (beta[a] + beta[b]) G_t[a,b] ) F_t[b]

Fourth powers leave the range of float32, so each F is scaled by a power of two that brings its largest value near 1.
That changes no cosine but where a norm is clamped; the bound is scaled instead, exactly.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from qkernels.ops._library import compute_dtype, power_of_two
from qkernels.ops.folded_rowwise.config import is_row_form, panel_rows

EPS = 1e-8


def forward(trained: Tensor, frozen: Tensor, clamp: str, weight: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, factors, statistics and products, as `op.folded_rowwise` returns them."""
    dtype = compute_dtype(trained, frozen)
    t, p = _matrix(trained, dtype), _matrix(frozen, dtype)
    (scale_t,), (scale_p,) = power_of_two(t[None]), power_of_two(p[None])
    t, p = t * scale_t, p * scale_p
    if is_row_form(*t.shape):
        products = torch.stack([t.mT @ t, p.mT @ p, t.mT @ p])
        tt, pp, inner = (_row_sums(f @ k, g) for f, k, g in zip((t, p, t), products, (t, p, p), strict=True))
    else:
        products = t.new_empty(0)
        tt, pp, inner = t.new_empty(3, t.shape[0])
        for part in _panels(t):
            gram_t, gram_p = t[part] @ t.mT, p[part] @ p.mT
            tt[part], pp[part] = _row_sums(gram_t, gram_t), _row_sums(gram_p, gram_p)
            inner[part] = _row_sums(gram_t, gram_p)
    factors, cosine = _factors(inner, tt, pp, scale_t, scale_p, clamp, t.numel())
    mean = cosine.mean()
    return weight * mean.square(), factors, torch.stack([scale_t, scale_p, mean]), products


def gradient(
    dloss: Tensor, a: Tensor, b: Tensor, factors: Tensor, stats: Tensor, products: Tensor, which: int, weight: float
) -> Tensor:
    """The gradient by `a`, see `op.folded_rowwise_da`."""
    alpha, beta = factors[0, :, None], factors[1 + which, :, None]
    scale = stats[which]
    fa, fb = _matrix(a, factors.dtype) * scale, _matrix(b, factors.dtype) * stats[1 - which]
    if products.numel():
        cross = products[2] if which else products[2].mT
        df = (alpha * fb) @ cross + fb @ (fb.mT @ (alpha * fa))
        df += 2 * ((beta * fa) @ products[which] + fa @ (fa.mT @ (beta * fa)))
    else:
        df = torch.empty_like(fa)
        for part in _panels(fa):
            gram_a, gram_b = fa[part] @ fa.mT, fb[part] @ fb.mT
            gram_b *= alpha[part] + alpha.mT
            gram_a *= 2 * (beta[part] + beta.mT)
            df[part] = (gram_a + gram_b) @ fa
    da = torch.empty_like(a)
    da.copy_((df * (2 * weight / len(fa) * stats[2] * dloss * scale)).view(a.shape))
    return da


def raw(products: Tensor, stats: Tensor, size: int) -> Tensor:
    """Products as the kernels store them: of unscaled features, padded with zeros."""
    left, right = _scales(stats)
    room = size - products.shape[-1]
    return torch.nn.functional.pad(products / left / right, (0, room, 0, room))


def scaled(products: Tensor, stats: Tensor, positions: int) -> Tensor:
    """The inverse of `raw`: products as `gradient` takes them."""
    left, right = _scales(stats)
    return products[:, :positions, :positions] * left * right


def _scales(stats: Tensor) -> tuple[Tensor, Tensor]:
    """The scales of both factors of each product."""
    t, p, _ = stats
    return torch.stack([t, p, t]).view(3, 1, 1), torch.stack([t, p, p]).view(3, 1, 1)


def _factors(
    inner: Tensor, tt: Tensor, pp: Tensor, scale_t: Tensor, scale_p: Tensor, clamp: str, numel: int
) -> tuple[Tensor, Tensor]:
    """Derivatives `[3, M]` of the absolute cosines by inner, tt and pp, and these cosines `[M]`."""
    scale = 1 / numel / 0.001
    root_t, root_p = tt.rsqrt(), pp.rsqrt()
    if clamp == "each":
        most_t, most_p = scale / EPS / scale_t / scale_t, scale / EPS / scale_p / scale_p
        free_t, free_p = root_t < most_t, root_p < most_p
        root = torch.minimum(root_t, most_t) * torch.minimum(root_p, most_p)
    else:
        most = (scale / scale_t / scale_p).square() / EPS
        root = root_t * root_p
        free_t = free_p = root < most
        root = torch.minimum(root, most)
    # A dead channel: its products are 0, or too small for the type's normal numbers.
    alive = ~(torch.minimum(tt, pp) < torch.finfo(tt.dtype).tiny)
    root = torch.where(alive, root, 0)
    cosine = (inner * root).abs()
    by_tt, by_pp = (
        torch.where(alive & free, -cosine / (2 * square), 0) for free, square in ((free_t, tt), (free_p, pp))
    )
    return torch.stack([inner.sign() * root, by_tt, by_pp]), cosine


def _matrix(features: Tensor, dtype: torch.dtype) -> Tensor:
    return features.reshape(features.shape[0] * features.shape[1], features.shape[2:].numel()).to(dtype)


def _row_sums(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


def _panels(f: Tensor) -> Iterator[slice]:
    step = panel_rows(f.shape[0], f.element_size())
    return (slice(start, start + step) for start in range(0, f.shape[0], step))
