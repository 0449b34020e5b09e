"""The released code's loss as an operator that keeps three numbers per row, and nothing of size M x M; M = B C."""

from typing import Any

import torch
from torch import Tensor

from qkernels.ops._library import define, first_order_only, or_plain
from qkernels.ops.folded_rowwise import forms
from qkernels.ops.folded_rowwise.config import is_row_form, padded


def _forward_fake(trained: Tensor, frozen: Tensor, clamp: str, weight: float, backend: str) -> tuple[Tensor, ...]:
    dtype = forms.compute_dtype(trained, frozen)
    rows, positions = trained.shape[0] * trained.shape[1], trained.shape[2:].numel()
    shape = (3, *[padded(positions) if backend != "torch" else positions] * 2) if is_row_form(rows, positions) else (0,)
    return tuple(trained.new_empty(size, dtype=dtype) for size in ((), (3, rows), (3,), shape))


def _forward_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    trained, frozen, _, *ctx.how = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(trained, frozen, *output[1:])


def _forward_backward(ctx: Any, dloss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    trained, frozen, *rest = ctx.saved_tensors
    need_trained, need_frozen, *_ = ctx.needs_input_grad
    dtrained = dfrozen = None
    if dloss is not None and need_trained:
        dtrained = folded_rowwise_da(dloss, trained, frozen, *rest, 0, *ctx.how)
    if dloss is not None and need_frozen:
        dfrozen = folded_rowwise_da(dloss, frozen, trained, *rest, 1, *ctx.how)
    return dtrained, dfrozen


@define(
    "folded_rowwise",
    fake=_forward_fake,
    save=_forward_save,
    backward=_forward_backward,
    differentiable=("trained", "frozen"),
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
        backend: "torch", or where `config.kernel_obstacle` is None "triton"; or "auto", for "torch" in place
            of kernels that cannot be built.

    Returns:
        loss `[]`; factors `[3, M]`, the derivatives of |cosine_a| by the row sums inner, tt and pp of the scaled
        features; statistics `[3]`, the scale of both features and the mean of |cosine|; in the row form the products
        `[3, N, N]` F_t^T F_t, F_p^T F_p and F_t^T F_p, else nothing. "torch" makes these of scaled features, the
        others of raw ones, and pad them with zeros.
    """
    if trained.numel() == 0:
        loss, factors, stats, products = _forward_fake(trained, frozen, clamp, weight, backend)
        return loss.fill_(torch.nan), factors, stats, products
    if backend == "torch":
        return forms.forward(trained, frozen, clamp, weight)
    from qkernels.ops.folded_rowwise import launch

    with or_plain(backend):
        return launch.forward(trained, frozen, clamp, weight)
    loss, factors, stats, products = forms.forward(trained, frozen, clamp, weight)
    return loss, factors, stats, forms.raw(products, stats, padded(len(products[0])))


def _da_fake(
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
    return torch.empty_like(a)


@define("folded_rowwise_da", fake=_da_fake, **first_order_only("folded_rowwise"))
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
    """Gradient by `a`, the operand number `which` of the forward; `b` is the other one."""
    if a.numel() == 0:
        return torch.empty_like(a)
    if backend != "torch":
        from qkernels.ops.folded_rowwise import launch

        with or_plain(backend):
            return launch.gradient(dloss, a, b, factors, stats, products, which, weight)
        products = forms.scaled(products, stats, a.shape[2:].numel())
    return forms.gradient(dloss, a, b, factors, stats, products, which, weight)
