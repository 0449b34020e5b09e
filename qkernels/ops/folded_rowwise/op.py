"""The released code's loss as an operator that keeps three numbers per row, and nothing of size M x M; M = B C."""

from typing import Any

import torch
from torch import Tensor

from qkernels.ops._library import compute_dtype, define, first_order_only, or_plain
from qkernels.ops.folded_rowwise import forms
from qkernels.ops.folded_rowwise.config import is_row_form, padded


def _empty(trained: Tensor, frozen: Tensor, backend: str) -> tuple[Tensor, ...]:
    """The results of `folded_rowwise`, without values."""
    rows, positions = trained.shape[0] * trained.shape[1], trained.shape[2:].numel()
    size = positions if backend == "torch" else padded(positions)
    products = (3, size, size) if is_row_form(rows, positions) else (0,)
    dtype = compute_dtype(trained, frozen)
    return tuple(trained.new_empty(shape, dtype=dtype) for shape in ((), (3, rows), (3,), products))


def _loss_save(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs.trained, inputs.frozen, *output[1:])


def _loss_backward(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    trained, frozen, *saved = ctx.saved_tensors
    need_trained, need_frozen, *_ = ctx.needs_input_grad
    options = (ctx.inputs.weight, ctx.inputs.backend)
    dtrained = dfrozen = None
    if dloss is not None and need_trained:
        dtrained = folded_rowwise_da(dloss, trained, frozen, *saved, 0, *options)
    if dloss is not None and need_frozen:
        dfrozen = folded_rowwise_da(dloss, frozen, trained, *saved, 1, *options)
    return dtrained, dfrozen


@define(
    "folded_rowwise",
    lambda inputs: _empty(inputs.trained, inputs.frozen, inputs.backend),
    _loss_save,
    _loss_backward,
    ("trained", "frozen"),
)
def folded_rowwise(
    trained: Tensor, frozen: Tensor, clamp: str, weight: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight (mean_a |cosine_a|)^2, see `reference.folded_rowwise`.

    Args:
        trained: `[B, C, *spatial]`.
        frozen: the same.
        clamp: "each" or "product".
        weight: factor of the loss.
        backend: "torch"; where `config.kernel_obstacle` is None, "triton" or "auto", which replaces kernels that
            cannot be built by "torch".

    Returns:
        loss `[]`; factors `[3, M]`, the derivatives of |cosine_a| by the row sums inner, tt and pp of the scaled
        features; statistics `[3]`, the scale of both features and the mean of |cosine|; in the row form the products
        `[3, N, N]` F_t^T F_t, F_p^T F_p and F_t^T F_p, else nothing: for "torch" of scaled features, for the others of
        raw ones and padded with zeros.
    """
    if trained.numel() == 0:
        loss, factors, stats, products = _empty(trained, frozen, backend)
        return loss.fill_(torch.nan), factors, stats, products
    if backend == "torch":
        return forms.forward(trained, frozen, clamp, weight)
    from qkernels.ops.folded_rowwise import launch

    with or_plain(backend):
        return launch.forward(trained, frozen, clamp, weight)
    loss, factors, stats, products = forms.forward(trained, frozen, clamp, weight)
    return loss, factors, stats, forms.raw(products, stats, padded(len(products[0])))


@define(
    "folded_rowwise_da",
    lambda inputs: torch.empty_like(inputs.a),
    **first_order_only("folded_rowwise has no second derivative"),
)
def folded_rowwise_da(
    dloss: Tensor,
    a: Tensor,
    b: Tensor,
    factors: Tensor,
    stats: Tensor,
    products: Tensor,
    which: int,
    weight: float,
    backend: str,
) -> Tensor:
    """The gradient by `a`; `which` is 0 if a is the trained features and b the frozen ones, 1 if they are swapped."""
    if a.numel() == 0:
        return torch.empty_like(a)
    if backend != "torch":
        from qkernels.ops.folded_rowwise import launch

        with or_plain(backend):
            return launch.gradient(dloss, a, b, factors, stats, products, which, weight)
        products = forms.scaled(products, stats, a.shape[2:].numel())
    return forms.gradient(dloss, a, b, factors, stats, products, which, weight)
