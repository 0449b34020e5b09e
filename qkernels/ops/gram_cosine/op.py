"""The Gram cosine as an operator that keeps three scalars per sample.

With F `[rows, columns]` of one item, n = <G_a, G_b> = |F_a^T F_b|^2, aa = |G_a|^2, bb = |G_b|^2 and cosine = n /
sqrt(aa bb):

    dcosine/dF_a = 2 ( G_b F_a / sqrt(aa bb) - cosine G_a F_a / aa ),    G_b F_a = F_b (F_b^T F_a)

Each item of a and of b is scaled by a power of two that brings its products near 1: fourth powers leave the range of
float32 at features of 1e-10 and 1e10. Centred, F is F less its columns' means; as every G then has rows that sum to 0,
the derivative above is the one by the features too.

The second operand may be a target of an earlier call: `b` its features, or the triangles of its Gram matrices,
`b_stats` their statistics.
"""

from typing import Any

import torch
from torch import Tensor

from qkernels.ops._library import compute_dtype, define, first_order_only, or_plain
from qkernels.ops.gram_cosine import forms
from qkernels.ops.gram_cosine.config import block_of, mode_of, sizes, workspace_size
from qkernels.ops.gram_cosine.reference import matrices
from qkernels.runtime.device import arch_of

Gradient = Tensor | None


def _cosine_fake(inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, dtype = inputs.a, compute_dtype(inputs.a, inputs.b)
    items, rows, columns = sizes(inputs.gram, a.shape[0], a.shape[1], a.shape[2:].numel())
    if inputs.backend == "torch":
        workspace = forms.workspace_size(rows, columns, items, inputs.triangles, inputs.both)
    else:
        workspace = workspace_size(rows, columns, items, inputs.triangles, inputs.both, arch_of(a))
    cosine, loss, stats_a, stats_b, empty = (
        a.new_empty(shape, dtype=dtype) for shape in ((items,), (), (2, items), (2, items), workspace)
    )
    return cosine, loss, stats_a, stats_b, empty


def _cosine_save(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    remember(ctx, tuple(vars(inputs).values()), output)


def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Stores in `ctx` what `gradients` needs of a call of the operator."""
    a, b, _, *ctx.options, _, ctx.backend = inputs
    cosine, _, *others = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a, b, cosine, *others)


def _cosine_backward(ctx: Any, dcosine: Gradient, dloss: Gradient, *_: Gradient) -> tuple[Gradient, Gradient]:
    return gradients(ctx, dcosine, dloss, None)


def gradients(ctx: Any, dcosine: Gradient, dloss: Gradient, incoming: Gradient) -> tuple[Gradient, Gradient]:
    """The gradients by a and by b that are needed; `incoming` is added to the first."""
    a, b, cosine, stats_a, stats_b, workspace = ctx.saved_tensors
    need_a, need_b, *_ = ctx.needs_input_grad
    da, db = incoming, None
    if dcosine is None and dloss is None:
        return da, db
    options = (*ctx.options, ctx.backend)
    if need_a:
        da = gram_cosine_da(dcosine, dloss, incoming, cosine, a, b, stats_a, stats_b, workspace, 0, *options)
    if need_b:
        db = gram_cosine_da(dcosine, dloss, None, cosine, b, a, stats_b, stats_a, workspace, 1, *options)
    return da, db


@define("gram_cosine", _cosine_fake, _cosine_save, _cosine_backward, ("a", "b"))
def gram_cosine(
    a: Tensor,
    b: Tensor,
    b_stats: Tensor | None,
    triangles: bool,
    gram: str,
    centred: bool,
    beta: float,
    mean: bool,
    both: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The cosine of every item, the loss beta cos^2, and what the derivative needs.

    Args:
        a: `[B, C, *spatial]`.
        b: the same; or, with `triangles`, the upper triangles of scaled Gram matrices, `[items, rows (rows + 1) / 2]`.
        b_stats: statistics of `b` from an earlier call, or None; triangles need them.
        gram, centred: as in `reference.gram_cosine`.
        beta: weight of the loss.
        mean: the loss is the mean over the items, or else the sum.
        both: whether the derivative by `b` will be needed too.
        backend: "torch"; "triton" (launch.py); or "auto", which replaces kernels that cannot be built by "torch".

    Returns:
        cosine `[items]`; loss `[]`; for each operand statistics `[2, items]`: |G|^2 of the scaled item, and its scale;
        a workspace.
    """
    if backend != "torch":
        from qkernels.ops.gram_cosine import launch

        with or_plain(backend):
            return launch.forward(a, b, b_stats, triangles, gram, centred, beta, mean, both)
    cosine, stats_a, stats_b, workspace = forms.forward(
        a, b, b_stats, triangles, gram, centred, compute_dtype(a, b), both
    )
    squares = cosine.square()
    loss = beta * (squares.mean() if mean else squares.sum())
    if backend != "torch":  # what the derivative's kernel reads, if it can be built
        rows, columns = matrices(a, gram).shape[1:]
        stored = mode_of(rows, columns, triangles) == "stored"
        workspace = _blocks(workspace, block_of(rows, arch_of(a))) if stored else workspace.new_empty(0)
    return cosine, loss, stats_a, stats_b, workspace


@define(
    "gram_cosine_da",
    lambda inputs: torch.empty_like(inputs.a),
    **first_order_only("gram_cosine has no second derivative"),
)
def gram_cosine_da(
    dcosine: Tensor | None,
    dloss: Tensor | None,
    incoming: Tensor | None,
    cosine: Tensor,
    a: Tensor,
    b: Tensor,
    stats_a: Tensor,
    stats_b: Tensor,
    workspace: Tensor,
    which: int,
    triangles: bool,
    gram: str,
    centred: bool,
    beta: float,
    mean: bool,
    backend: str,
) -> Tensor:
    """The gradient by `a`, plus `incoming`; `which` is 0 for the first operand of the forward, 1 if they are swapped.

    Its two terms nearly cancel, so they are summed before any rounding.
    """
    if a.numel() == 0:
        return torch.empty_like(a)
    if backend != "torch":
        from qkernels.ops.gram_cosine import launch

        options = (which, triangles, gram, centred, beta, mean)
        with or_plain(backend):
            return launch.gradient(dcosine, dloss, incoming, cosine, a, b, stats_a, stats_b, workspace, *options)
    factor = torch.zeros_like(cosine) if dcosine is None else dcosine
    if dloss is not None:
        factor = factor + 2 * (beta / len(cosine) if mean else beta) * dloss * cosine
    if backend != "torch":  # the forward's workspace is for the kernel, and of features that the kernel has scaled
        _, stats_a, stats_b, workspace = forms.forward(a, b, stats_b, triangles, gram, centred, cosine.dtype, False)
        which = 0
    return forms.gradient(factor, incoming, a, b, stats_a[1], stats_b[1], workspace, which, triangles, gram, centred)


def target(features: Tensor, gram: str, centred: bool, triangles: bool, backend: str) -> tuple[Tensor, Tensor]:
    """The operands `b` and `b_stats` for these features, which stay as they are, or become `triangles`.

    Triangles are summed in float64, in parts of the batch.
    """
    dtype = compute_dtype(features)
    if not triangles:
        return features, gram_cosine(features, features, None, False, gram, centred, 1.0, True, False, backend)[2]
    rows = matrices(features, gram).shape[1]
    i, j = torch.triu_indices(rows, rows, device=features.device).unbind()
    grams, stats = [], []
    for part in [features] if gram == "batch" else features.split(16):
        f, scale = forms.scaled(part, gram, centred, torch.float64)
        g = f @ f.mT
        # As any operand: scaled by what float32 can hold.
        grams.append(g[:, i, j].to(dtype))
        stats.append(torch.stack([g.square().sum((1, 2)), scale]).to(dtype))
    return torch.cat(grams), torch.cat(stats, 1)


def _blocks(symmetric: Tensor, block: int) -> Tensor:
    """Of matrices `[..., M, M]` the blocks (p, q) with p <= q, by q and then by p: `[..., pair, block, block]`."""
    count = -(-symmetric.shape[-1] // block)
    room = count * block - symmetric.shape[-1]
    whole = torch.nn.functional.pad(symmetric, (0, room, 0, room)).unflatten(-1, (count, block))
    whole = whole.unflatten(-3, (count, block))
    return torch.stack([whole[..., p, :, q, :] for q in range(count) for p in range(q + 1)], -3)
