"""Quaternion layers and the anti-transfer loss for PyTorch.

>>> import torch, qkernels
>>> layer = qkernels.nn.QuaternionConv2d(4, 8, 3, padding=1, activation="relu")
>>> layer(torch.rand(1, 4, 16, 16)).shape
torch.Size([1, 8, 16, 16])
"""

from qkernels import init, nn, reference
from qkernels.functional import (
    GramTarget,
    PackedWeight,
    anti_transfer_loss,
    anti_transfer_tap,
    gram_cosine,
    gram_target,
    hamilton_conv2d,
    hamilton_conv_transpose2d,
    hamilton_linear,
    linear_cka,
    pack_weights,
)
from qkernels.runtime import backend_of, form_of, set_backend, set_form

__all__ = [
    "GramTarget",
    "PackedWeight",
    "anti_transfer_loss",
    "anti_transfer_tap",
    "backend_of",
    "form_of",
    "gram_cosine",
    "gram_target",
    "hamilton_conv2d",
    "hamilton_conv_transpose2d",
    "hamilton_linear",
    "init",
    "linear_cka",
    "nn",
    "pack_weights",
    "reference",
    "set_backend",
    "set_form",
]
