"""Initialisation of quaternion weights, vectorised."""

import math

import torch
from torch import Tensor

from qkernels import checks


def quaternion_glorot_(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fills a weight with quaternions of sigma = 1 / sqrt(2 (fan_in + fan_out)), in place.

    Modulus: chi with 4 degrees of freedom times sigma; phase: U(-pi, pi); imaginary direction: v / sqrt(|v|^2 + 1e-4)
    with v ~ U(-1, 1)^3, as in the reference code, which projects a cube and is not quite isotropic. Mean squares:
    2 sigma^2 for r, nearly 2/3 sigma^2 for each of i, j, k.

    Args:
        weight: `[4, out/4, in/4, *kernel]`; fan_in = in/4 * kernel area, fan_out = out/4 * kernel area. A
            transposed convolution's `[4, in/4, out/4, *kernel]` swaps the two fans, as in the reference code.
        generator: source of randomness; its device may differ from the weight's.

    Returns:
        The weight.

    Raises:
        ValueError: not `[4, out/4, in/4, *kernel]`.

    >>> weight = quaternion_glorot_(torch.empty(4, 16, 16, 3, 3), torch.Generator().manual_seed(0))
    >>> round(weight.square().sum(0).mean().item() / (4 / (2 * (16 + 16) * 9)), 1)  # the modulus: 4 sigma^2
    1.0

    (Trabelsi et al. 2018; Parcollet et al. 2019.)
    """
    fan_in, fan_out = _fans(weight)
    return _quaternion_(weight, 1 / math.sqrt(2 * (fan_in + fan_out)), generator)


def quaternion_he_(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fills a weight with quaternions of sigma = 1 / sqrt(2 fan_in), in place; else as `quaternion_glorot_`.

    Args:
        weight: `[4, out/4, in/4, *kernel]`, or `[4, in/4, out/4, *kernel]` of a transposed convolution.
        generator: source of randomness.

    Returns:
        The weight.

    Raises:
        ValueError: not `[4, out/4, in/4, *kernel]`.
    """
    fan_in, _ = _fans(weight)
    return _quaternion_(weight, 1 / math.sqrt(2 * fan_in), generator)


def _fans(weight: Tensor) -> tuple[int, int]:
    checks.initialised(weight)
    _, fan_out, fan_in, *kernel = weight.shape
    area = math.prod(kernel)
    return fan_in * area, fan_out * area


@torch.no_grad()
def _quaternion_(weight: Tensor, sigma: float, generator: torch.Generator | None) -> Tensor:
    checks.generator(generator)
    shape, dtype = weight.shape[1:], torch.promote_types(weight.dtype, torch.float32)
    device = weight.device if generator is None else generator.device

    def uniform(*size: int) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device).uniform_(-1, 1, generator=generator)

    normal = torch.empty(4, *shape, dtype=dtype, device=device).normal_(0, sigma, generator=generator)
    modulus = normal.square().sum(0).sqrt()
    phase = math.pi * uniform(*shape)
    direction = uniform(3, *shape)
    direction /= (direction.square().sum(0) + 1e-4).sqrt()
    weight[0].copy_(modulus * phase.cos())
    weight[1:].copy_(modulus * phase.sin() * direction)
    return weight
