"""The anti-transfer loss and its gradient, for features of every layer of both networks (WASPAA 2023).

Ours, also with a cached target, is compared with Gram matrices in memory: by `bmm`, or of the whole batch as in the
released code; in the features' type or in float32.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bench.case import BACKWARD, FORWARD, ROTATED_BYTES, STEP, Case, Provider, Results, Run, Suite
from bench.gradients import differentiated, relative_error
from qkernels import anti_transfer_loss, gram_target, reference
from qkernels.losses import loss_of
from qkernels.ops.gram_cosine.reference import matrices
from qkernels.runtime.flops import folded_flops, gram_flops
from qkernels.runtime.tolerances import LOSS_TOLERANCES

# For loss and gradient. Baselines round Gram matrices to bfloat16, and their gradient is a small difference of these,
# so their errors are larger than ours.
BASELINE_TOLERANCE = (2e-2, 0.5)
FOLDED = "folded-rowwise"
VARIANTS = {"paper": "gram-channel", FOLDED: FOLDED, "position": "gram-position", "linear CKA": "cka"}
"""Losses by their names in results: the paper's, the released code's, and two others."""
# Channels, height and width, by first and last layer with that shape.
SHAPES = {
    (1, 2): (64, 64, 64),
    (3, 4): (128, 32, 32),
    (5, 7): (256, 16, 16),
    (8, 10): (512, 8, 8),
    (11, 13): (512, 4, 4),
}


class Features(NamedTuple):
    """Features `[B, C, H, W]` of the trained and of the frozen network, after a ReLU."""

    trained: Tensor
    frozen: Tensor


@dataclass(frozen=True, kw_only=True)
class LossCase(Case):
    """The loss at features of one shape."""

    channels: int
    size: tuple[int, int]

    @property
    def shape(self) -> str:
        return f"{self.channels} x {self.size[0]} x {self.size[1]}"

    @property
    def elements(self) -> int:
        """Number of features of a batch."""
        return self.batch * self.channels * self.size[0] * self.size[1]

    @property
    def flops(self) -> int:
        positions = self.size[0] * self.size[1]
        if self.variant == FOLDED:
            forward, backward = folded_flops(self.batch * self.channels, positions)
        elif self.variant == "linear CKA":
            forward, backward = gram_flops(self.batch, self.channels * positions)
        else:
            forward, backward = (self.batch * flops for flops in gram_flops(self.channels, positions))
        return {FORWARD: forward, BACKWARD: backward, STEP: forward + backward}[self.work]

    @property
    def bytes(self) -> int:
        maps = {FORWARD: 2, BACKWARD: 3, STEP: 5}[self.work]  # both are read; backward also writes a gradient
        return maps * self.elements * self.dtype.itemsize

    @property
    def sets(self) -> int:
        return 2 if 4 * self.elements * self.dtype.itemsize <= ROTATED_BYTES else 1

    def operands(self, device: torch.device) -> Features:
        """Frozen features close to the trained ones, for which the terms of the gradient nearly cancel.

        NHWC, on a CPU from layer 5 on NCHW: as the quaternion network has them.
        """
        last = device.type == "cuda" or self.channels < 256
        layout = torch.channels_last if last else torch.contiguous_format
        a = torch.randn(self.batch, self.channels, *self.size, device=device).relu()
        b = (a + 0.5 * torch.randn_like(a)).relu()
        return Features(*(x.to(self.dtype).contiguous(memory_format=layout) for x in (a, b)))

    def check(self, provider: Provider, operands: Features, results: Results) -> tuple[float, float]:
        """Relative errors of loss and gradient against float64."""
        leaf = operands.trained.detach().double().requires_grad_()
        loss = anti_transfer_loss(leaf, operands.frozen.double(), loss=VARIANTS[self.variant])
        exact = (loss.detach(), *torch.autograd.grad(loss, leaf))
        allowed = LOSS_TOLERANCES[self.precision] if provider.ours else BASELINE_TOLERANCE
        errors = [relative_error(x, y) for x, y in zip(results, exact, strict=self.work != FORWARD)]
        return max(error / bound for error, bound in zip(errors, allowed, strict=False)), max(errors)

    def tiny(self) -> "LossCase":
        # Two samples have a linear CKA of 1, whatever they are.
        return replace(self, batch=4, channels=8, size=(4, 3), precision="float32")


Loss = Callable[[Tensor], Tensor]


def _provider(
    name: str,
    function: Callable[[LossCase, Tensor], Loss],
    fits: Callable[[LossCase], bool] = lambda case: True,
    layout: torch.memory_format = torch.preserve_format,
) -> Provider:
    """A provider from ``function(case, frozen)``, which returns the loss as a function of the trained features."""

    def build(case: LossCase, operands: Features) -> Run:
        unit = torch.ones((), device=operands.trained.device)
        trained, frozen = (x.clone(memory_format=layout) for x in operands)
        return differentiated(function(case, frozen), (trained,), unit, case.work)

    return Provider(name, build, fits)


def _ours(case: LossCase, frozen: Tensor) -> Loss:
    return lambda a: anti_transfer_loss(a, frozen, loss=VARIANTS[case.variant])


def _cached(case: LossCase, frozen: Tensor) -> Loss:
    target = gram_target(frozen, loss=VARIANTS[case.variant])
    return lambda a: anti_transfer_loss(a, target, loss=target.loss)


def _materialised(case: LossCase, frozen: Tensor) -> Loss:
    """Gram matrices in memory, in the features' type."""
    gram = loss_of(VARIANTS[case.variant]).gram

    def loss(a: Tensor) -> Tensor:
        if gram is None:
            return reference.folded_rowwise(a, frozen)
        a_gram, b_gram = (torch.bmm(f, f.mT).float().flatten(1) for f in (matrices(x, *gram) for x in (a, frozen)))
        return torch.nn.functional.cosine_similarity(a_gram, b_gram, eps=0.0).square().mean()

    return loss


def _materialised_wide(case: LossCase, frozen: Tensor) -> Loss:
    return lambda a: _materialised(case, frozen.float())(a.float())


PROVIDERS = [
    _provider("ours", _ours),
    _provider("ours, cached target", _cached, lambda case: case.variant in ("paper", "position")),
    _provider("materialised", _materialised),
    *(
        _provider(f"materialised, {name}", _materialised, lambda case: case.suite == "cpu", layout)
        for name, layout in (("NCHW", torch.contiguous_format), ("NHWC", torch.channels_last))
    ),
    _provider("materialised, float32", _materialised_wide, lambda case: case.precision != "float32"),
]


def _rank(network: str, variant: str, batch: int, precision: str, work: str) -> int:
    """Priority: the cases of promised figures first, then by the number of differences from them."""
    if variant in ("paper", FOLDED) and (batch, precision, work) == (20, "bf16", STEP):
        return (network == "real") + (variant == FOLDED)
    far = (network == "real", variant not in ("paper", FOLDED), batch != 20, precision != "bf16", work != STEP)
    return 2 + sum(far)


def _cases() -> Iterator[LossCase]:
    networks, works = ("quaternion", "real"), (STEP, FORWARD, BACKWARD)
    names = itertools.product(networks, VARIANTS, (20, 256), ("bf16", "float32"), works, SHAPES.items())
    for network, variant, batch, precision, work, ((first, last), (channels, height, width)) in names:
        yield LossCase(
            suite="atl",
            network=network,
            layer=f"layers {first}-{last}",
            variant=variant,
            batch=batch,
            precision=precision,
            work=work,
            rank=_rank(network, variant, batch, precision, work),
            channels=channels,
            size=(8 * height, 2 * width) if network == "real" else (height, width),
        )


ATL = Suite.of(_cases(), *PROVIDERS)
