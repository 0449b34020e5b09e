"""The definitions called by themselves: their defaults are those of the public functions, whose checks they lack."""

import pytest
import torch

import qkernels
from qkernels import reference


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_defaults_are_those_of_the_functions() -> None:
    x, weight, maps = random(2, 8, 5, 4), random(4, 2, 2, 3, 2), random(2, 2, 4, 3)
    torch.testing.assert_close(reference.hamilton_conv2d(x, weight), qkernels.hamilton_conv2d(x, weight))
    torch.testing.assert_close(
        reference.hamilton_conv_transpose2d(x, weight), qkernels.hamilton_conv_transpose2d(x, weight)
    )
    torch.testing.assert_close(reference.gram_cosine(*maps), qkernels.gram_cosine(*maps))
    for scale in (1, 1e-4):  # at which the clamps differ
        expected = qkernels.anti_transfer_loss(*(scale * maps), loss="folded-rowwise")
        torch.testing.assert_close(reference.folded_rowwise(*(scale * maps)), expected)


def test_rows_of_features_may_have_any_number_of_dimensions() -> None:
    x, weight, bias = random(2, 3, 8), random(4, 3, 2), random(12)
    rows = [reference.hamilton_linear(row, weight, bias) for row in x.flatten(0, 1)]
    torch.testing.assert_close(reference.hamilton_linear(x, weight, bias).flatten(0, 1), torch.stack(rows))


def test_the_released_codes_loss_of_one_number() -> None:
    """Gram matrices of 1 x 1, scaled by 1000, whose norms of 1e-9 are clamped at 1e-8."""
    one = torch.full((1, 1, 1), 1e-6, dtype=torch.float64)
    assert reference.folded_rowwise(one, one).item() == pytest.approx((1e-18 / 1e-16) ** 2)
